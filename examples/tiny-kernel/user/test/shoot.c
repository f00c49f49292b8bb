// Both CPUs unmap and shoot at each other, interrupts off in their fault handlers and calls.
#include "two.h"

void start(long cpu, long cpus) {
    CHECK(cpus == 2);
    char *ours = memory(64 * PAGE);
    for (long round = 0; round < 100; round++) {
        char *p = memory(4 * PAGE);
        for (long i = 0; i < 4 * PAGE; i += PAGE) *(long *)(p + i) = round;
        for (long i = 0; i < 4 * PAGE; i += PAGE) CHECK(*(long *)(p + i) == round);
        CHECK(unmap(p, 4 * PAGE) == 0);
        long at = round % 64 * PAGE;
        CHECK(ours[at] == 0);              // the zero page,
        *(volatile long *)(ours + at) = 1; // a copy of it, which needs a flush in the fault,
        CHECK(protect(ours + at, PAGE, READ) == 0 && probe(ours + at, WRITE) == SEGV + 2);
        CHECK(protect(ours + at, PAGE, READ | WRITE) == 0 && advise(ours + at, PAGE, DONTNEED) == 0);
    }
    meet(cpu);
    exit(0);
}
