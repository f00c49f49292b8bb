// What one CPU takes away or replaces, the other must not see any more: its TLB had it.
#include "two.h"

void start(long cpu, long cpus) {
    CHECK(cpus == 2);
    for (long round = 1; round <= 20; round++) {
        long changer = round % 2;
        volatile long *p = (volatile long *)both(cpu, 2 * PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1);
        volatile long *f = (volatile long *)both(cpu, PAGE, READ | WRITE, PRIVATE, MEMORY);
        CHECK(*p == 0 && *f == 1);  // both have the zero page and the file's,
        meet(cpu);
        if (cpu == changer) *p = *f = round;
        meet(cpu);
        CHECK(*p == round && *f == round);  // and then what was put in their place.
        meet(cpu);
        if (cpu != changer) *p = *f = -round;
        meet(cpu);
        CHECK(*p == -round && *f == -round);
        meet(cpu);
        if (cpu == changer) CHECK(protect((void *)p, PAGE, READ) == 0);
        meet(cpu);
        CHECK(probe((char *)p, WRITE) == SEGV + 2);
        meet(cpu);
        if (cpu == changer) CHECK(advise((void *)p, PAGE, DONTNEED) == 0 && advise((void *)f, PAGE, DONTNEED) == 0);
        meet(cpu);
        CHECK(*p == 0 && *f == 1);
        meet(cpu);
        // Many at once: up to 32 pages are forgotten one by one, more by forgetting all.
        for (long n = 8; n <= 64; n *= 8) {
            char *m = both(cpu, n * PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1);
            for (long i = 0; i < n; i++) __sync_fetch_and_add((long *)(m + i * PAGE), 1);
            meet(cpu);
            if (cpu == changer) CHECK(advise(m, n * PAGE, DONTNEED) == 0);
            meet(cpu);
            for (long i = 0; i < n; i++) CHECK(*(volatile long *)(m + i * PAGE) == 0);
            meet(cpu);
            if (cpu == changer) CHECK(unmap(m, n * PAGE) == 0);
        }
        meet(cpu);
        if (cpu == changer) CHECK(unmap((void *)p, 2 * PAGE) == 0 && unmap((void *)f, PAGE) == 0);
        meet(cpu);
        CHECK(probe((char *)p, READ) == SEGV + 1 && probe((char *)f, READ) == SEGV + 1);
    }
    exit(0);
}
