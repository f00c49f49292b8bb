// Counts instructions from trap to return: with QEMU's -icount a tick of the time-stamp counter is one. What a loop takes
// without faults is taken off.
#include "user.h"

enum { ROOM = 1024 * MB, FILE_LEN = 4 * MB };

static uint64_t now(void) {
    uint32_t low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

static void report(long which, long ops, uint64_t instructions, const char *name, size_t len) {
    CHECK(call6(1002, which, ops, instructions, (long)name, len, 0) == (long)len);
}

// Counts `work`, less what `idle` takes.
#define COUNT(which, name, ops, work, idle) do {                                 \
        mark(which);                                                             \
        uint64_t t0 = now();                                                     \
        work;                                                                    \
        uint64_t t1 = now();                                                     \
        mark(0);                                                                 \
        uint64_t t2 = now();                                                     \
        idle;                                                                    \
        uint64_t t3 = now();                                                     \
        report(which, ops, (t1 - t0) - (t3 - t2), name "\n", sizeof name);       \
    } while (0)

static void write_each(char *p, long len, long step) {
    for (long i = 0; i < len; i += step) *(volatile long *)(p + i) = i;
}
static void read_each(char *p, long len, long step) {
    for (long i = 0; i < len; i += step) *(volatile long *)(p + i);
}
// A mapping at a multiple of 2 MiB.
static char *at(char *place, long len, int prot, int flags, int file) {
    CHECK(call6(9, (long)place, len, prot, flags | FIXED, file, 0) == (long)place);
    return place;
}

static char stack[2 * PAGE] __attribute__((aligned(16)));
static char *shared;
static uint64_t before_fork;

// A copy of the program that has just been made.
static void child(long len) {
    uint64_t t = now();
    mark(0);
    static const char name[] = "fork, per mapped 4 KiB page\n";
    report(16, len / PAGE, t - before_fork, name, sizeof name - 1);
    COUNT(17, "COW in child, per page", len / PAGE, write_each(shared, len, PAGE), write_each(shared, len, PAGE));
    exit(0);
}

void start(long cpu, long cpus) {
    char *room = memory(ROOM), *p = room;
    CHECK((long)room % (2 * MB) == 0 && unmap(room, ROOM) == 0);

    COUNT(1, "null system call", 1000, for (int i = 0; i < 1000; i++) call(39, 0, 0, 0), for (volatile int i = 0; i < 0;) {});

    at(p, 16 * MB, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    COUNT(2, "anonymous write, 4 KiB", 4096, write_each(p, 16 * MB, PAGE), write_each(p, 16 * MB, PAGE));
    COUNT(3, "anonymous munmap, per page", 4096, unmap(p, 16 * MB), );

    at(p, 16 * MB, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    COUNT(4, "anonymous read (zero page)", 4096, read_each(p, 16 * MB, PAGE), read_each(p, 16 * MB, PAGE));
    COUNT(5, "anonymous write after read", 4096, write_each(p, 16 * MB, PAGE), write_each(p, 16 * MB, PAGE));
    CHECK(unmap(p, 16 * MB) == 0);

    at(p, 512 * MB, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    COUNT(6, "anonymous write, one per 2 MiB (new table)", 256, write_each(p, 512 * MB, 2 * MB), write_each(p, 512 * MB, 2 * MB));
    COUNT(7, "anonymous munmap, one per 2 MiB", 256, unmap(p, 512 * MB), );

    at(p, 16 * MB, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    CHECK(advise(p, 16 * MB, HUGEPAGE) == 0);
    COUNT(8, "huge anonymous, per 2 MiB", 8, write_each(p, 16 * MB, 2 * MB), write_each(p, 16 * MB, 2 * MB));
    CHECK(unmap(p, 16 * MB) == 0);

    // The file is in memory from here on.
    at(p, FILE_LEN, READ, SHARED, MEMORY);
    read_each(p, FILE_LEN, PAGE);
    CHECK(unmap(p, FILE_LEN) == 0);
    for (int i = 0; i < 16; i++) at(p + i * FILE_LEN, FILE_LEN, READ, PRIVATE, MEMORY);
    COUNT(9, "file read, per 64 KiB fault (16 pages)", 1024, read_each(p, 16 * FILE_LEN, 16 * PAGE), read_each(p, 16 * FILE_LEN, 16 * PAGE));
    COUNT(10, "file munmap, per page", 16384, unmap(p, 16 * FILE_LEN), );

    for (int i = 0; i < 4; i++) at(p + i * FILE_LEN, FILE_LEN, READ | WRITE, SHARED, MEMORY);
    COUNT(11, "shared file write, per page", 4096, write_each(p, 4 * FILE_LEN, PAGE), write_each(p, 4 * FILE_LEN, PAGE));
    CHECK(unmap(p, 4 * FILE_LEN) == 0);

    for (int i = 0; i < 4; i++) at(p + i * FILE_LEN, FILE_LEN, READ | WRITE, PRIVATE, MEMORY);
    COUNT(12, "private file write (COW)", 4096, write_each(p, 4 * FILE_LEN, PAGE), write_each(p, 4 * FILE_LEN, PAGE));
    CHECK(unmap(p, 4 * FILE_LEN) == 0);

    at(p, FILE_LEN, READ | WRITE, SHARED, TRACKED);
    read_each(p, FILE_LEN, PAGE);
    COUNT(13, "shared file write after read", 1024, write_each(p, FILE_LEN, PAGE), write_each(p, FILE_LEN, PAGE));
    CHECK(unmap(p, FILE_LEN) == 0);

    at(p, 512 * MB, READ, PRIVATE, SHORT);
    read_each(p, PAGE, PAGE);
    on_refusal(refused);
    COUNT(14, "fault beyond end of file, empty range", 255,
          for (long i = 2 * MB; i < 512 * MB; i += 2 * MB) CHECK(touch_read(p + i) == BUS + 2),
          for (long i = 2 * MB; i < 512 * MB; i += 2 * MB) CHECK(touch_read(p) == 0));
    on_refusal(NULL);
    CHECK(unmap(p, 512 * MB) == 0);

    COUNT(15, "mmap + touch + munmap, 4 KiB", 512,
          for (int i = 0; i < 512; i++) { char *q = memory(PAGE); *(volatile char *)q = 1; CHECK(unmap(q, PAGE) == 0); }, );

    // In memory from here on, in folios of 2 MiB.
    at(p, 16 * MB, READ, SHARED, HUGE);
    read_each(p, 16 * MB, 2 * MB);
    CHECK(unmap(p, 16 * MB) == 0);
    for (int i = 0; i < 16; i++) at(p + i * 16 * MB, 16 * MB, READ, SHARED, HUGE);
    COUNT(20, "huge tmpfs read, per 2 MiB", 128, read_each(p, 256 * MB, 2 * MB), read_each(p, 256 * MB, 2 * MB));
    COUNT(21, "huge tmpfs munmap, per 2 MiB", 128, unmap(p, 256 * MB), );
    // The same mapped beside what the tables have it, by small entries.
    at(p + PAGE, 16 * MB - PAGE, READ, SHARED, HUGE);
    COUNT(22, "large folio read, per 64 KiB fault (16 pages)", 256, read_each(p + 16 * PAGE, 16 * MB - 16 * PAGE, 16 * PAGE), read_each(p + 16 * PAGE, 16 * MB - 16 * PAGE, 16 * PAGE));
    COUNT(23, "large folio munmap, per page", 4096, unmap(p, 16 * MB), );

    shared = at(p, 16 * MB, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    write_each(p, 16 * MB, PAGE);
    mark(16);
    before_fork = now();
    CHECK(fork_and_run(child, 16 * MB, stack + sizeof stack) == 0);
    COUNT(18, "write-protect reuse in parent", 4096, write_each(p, 16 * MB, PAGE), write_each(p, 16 * MB, PAGE));
    CHECK(unmap(p, 16 * MB) == 0);
    exit(0);
}
