// Two CPUs in one space: the same pages first touched by both at once, and each in its own.
#include "two.h"

enum { LEN = 4 * MB };

void start(long cpu, long cpus) {
    CHECK(cpus == 2);
    for (int round = 0; round < 8; round++) {
        char *p = both(cpu, LEN, READ | WRITE, PRIVATE | ANONYMOUS, -1);
        for (long i = 0; i < LEN; i += PAGE) __sync_fetch_and_add((long *)(p + i), i + 1);
        meet(cpu);
        for (long i = 0; i < LEN; i += PAGE) CHECK(*(long *)(p + i) == 2 * (i + 1));
        meet(cpu);
        // One protects and discards while the other writes.
        if (cpu == 0) {
            for (long i = 0; i < LEN / 2; i += 16 * PAGE) CHECK(advise(p + i, 16 * PAGE, DONTNEED) == 0);
        } else {
            for (long i = 0; i < LEN; i += PAGE) *(long *)(p + i + 8) = 7;
        }
        meet(cpu);
        for (long i = LEN / 2; i < LEN; i += PAGE) CHECK(*(long *)(p + i) == 2 * (i + 1) && *(long *)(p + i + 8) == 7);
        meet(cpu);
        if (cpu == 0) CHECK(unmap(p, LEN) == 0);
        char *f = both(cpu, LEN, READ | WRITE, PRIVATE, MEMORY);
        for (long i = 0; i < LEN; i += PAGE) __sync_fetch_and_add((long *)(f + i), 1);
        meet(cpu);
        for (long i = 0; i < LEN; i += PAGE) CHECK(*(long *)(f + i) == i + 3);
        meet(cpu);
        if (cpu == 0) CHECK(unmap(f, LEN) == 0);
    }
    exit(0);
}
