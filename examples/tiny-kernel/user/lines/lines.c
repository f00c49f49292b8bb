// Both CPUs fault at the same time, in different leaf tables that are there, on different folios, with warm caches. Who
// watches from outside tells which cache lines both have written.
#include "two.h"

enum { PART = 2 * MB, N = 24 };

static void announce(long cpu, const char *text, size_t len) {
    if (cpu == 0) CHECK(write(text, len) == (long)len);
}
#define CASE(name) announce(cpu, "case " name "\n", sizeof "case " name)

// Frames enough for what comes next, in this CPU's cache.
static void warm(void) {
    char *p = memory(2 * N * PAGE);
    for (long i = 0; i < 2 * N; i++) p[i * PAGE] = 1;
    CHECK(unmap(p, 2 * N * PAGE) == 0);
}

// Touches every `step` bytes of `len`, counted, both CPUs at once.
static void touch(long cpu, long which, char *p, long len, long step, int how) {
    meet(cpu);
    mark(which);
    for (long i = 0; i < len; i += step) {
        if (how == WRITE) *(volatile long *)(p + i) = i;
        else *(volatile long *)(p + i);
    }
    mark(0);
    meet(cpu);
}

// A mapping of this CPU's own, with a leaf table of its own that has an entry.
static char *own(void) {
    char *p = memory(3 * PART), *at = p + (-(long)p & (PART - 1));
    // What lies beside it goes: touching the other CPU's, they would be one mapping.
    if (at > p) CHECK(unmap(p, at - p) == 0);
    CHECK(unmap(at + PART, p + 2 * PART - at) == 0);
    at[PART - PAGE] = 1;
    return at;
}

// The first CPU touches every `step` bytes, and the other one maps a page, touches and unmaps it, as often; both at once.
static void beside(long cpu, long which, char *p, long len, long step, int how) {
    if (cpu == 0) return touch(cpu, which, p, len, step, how);
    meet(cpu);
    mark(which);
    for (long i = 0; i < len; i += step) {
        char *other = memory(PAGE);
        *other = 1;
        CHECK(unmap(other, PAGE) == 0);
    }
    mark(0);
    meet(cpu);
}

// This CPU's part of memory that both map: 2 MiB, with a leaf table of its own that has an entry.
static char *part(long cpu, int prot, int flags, int file) {
    // Twice as much is mapped to find a place, and then the parts at a multiple of 2 MiB in it.
    char *p = both(cpu, 3 * PART, prot, PRIVATE | ANONYMOUS, -1);
    p += -(long)p & (PART - 1);
    if (cpu == 0) CHECK(call6(9, (long)p, 2 * PART, prot, flags | FIXED, file, 0) == (long)p);
    meet(cpu);
    p += cpu * PART;
    *(volatile long *)(p + PART - PAGE);
    meet(cpu);
    return p;
}

void start(long cpu, long cpus) {
    CHECK(cpus == 2);
    char *p;
    // Each CPU reads its half of both files in.
    for (int file = MEMORY; file <= TRACKED; file++) {
        p = part(cpu, READ, SHARED, file);
        for (long i = 0; i < PART; i += PAGE) *(volatile long *)(p + i);
    }

    CASE("1 anonymous write");
    p = part(cpu, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    warm();
    touch(cpu, 1, p, N * PAGE, PAGE, WRITE);

    CASE("2 anonymous read (zero page)");
    touch(cpu, 2, p + N * PAGE, N * PAGE, PAGE, READ);

    CASE("3 anonymous write after read");
    warm();
    touch(cpu, 3, p + N * PAGE, N * PAGE, PAGE, WRITE);

    CASE("4 file read");
    p = part(cpu, READ, PRIVATE, MEMORY);
    touch(cpu, 4, p, N * 16 * PAGE, 16 * PAGE, READ);

    CASE("5 shared write");
    p = part(cpu, READ | WRITE, SHARED, MEMORY);
    touch(cpu, 5, p, N * PAGE, PAGE, WRITE);

    CASE("6 shared write after read");
    p = part(cpu, READ | WRITE, SHARED, TRACKED);
    touch(cpu, 6, p, N * PAGE, PAGE, READ);
    touch(cpu, 6, p, N * PAGE, PAGE, WRITE);

    CASE("7 private file write");
    p = part(cpu, READ | WRITE, PRIVATE, MEMORY);
    warm();
    touch(cpu, 7, p, N * PAGE, PAGE, WRITE);

    CASE("8 access refused");
    meet(cpu);
    mark(8);
    for (long i = 0; i < N; i++) CHECK(probe((char *)((cpu + 1) * MB), READ) == SEGV + 1);
    mark(0);

    CASE("9 anonymous write, a mapping each");
    p = own();
    warm();
    touch(cpu, 9, p, N * PAGE, PAGE, WRITE);

    CASE("10 apart: new tables");
    p = both(cpu, 2 * N * PART, READ | WRITE, PRIVATE | ANONYMOUS, -1) + cpu * N * PART;
    warm();
    touch(cpu, 10, p, N * PART, PART, WRITE);

    CASE("11 apart: refills of frames");
    p = part(cpu, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    touch(cpu, 11, p, PART / 2, PAGE, WRITE);

    CASE("12 apart: map, touch, unmap");
    meet(cpu);
    mark(12);
    for (int i = 0; i < N; i++) {
        p = memory(PAGE);
        *p = 1;
        CHECK(unmap(p, PAGE) == 0);
    }
    mark(0);
    meet(cpu);

    CASE("13 apart: faults while the other maps, touches, unmaps");
    p = part(cpu, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    warm();
    beside(cpu, 13, p, N * PAGE, PAGE, WRITE);

    CASE("14 apart: file reads while the other maps, touches, unmaps");
    p = part(cpu, READ, PRIVATE, MEMORY);
    warm();
    beside(cpu, 14, p, N * 16 * PAGE, 16 * PAGE, READ);
    exit(0);
}
