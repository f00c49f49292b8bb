// Huge pages where they are asked for, and their parts once a piece is taken out.
#include "user.h"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    char *p = memory(8 * MB);
    CHECK((long)p % (2 * MB) == 0 && advise(p, 8 * MB, HUGEPAGE) == 0);
    long before = faults();
    for (long i = 0; i < 4 * MB; i += PAGE) CHECK(p[i] == 0);
    CHECK(faults() - before == 2);
    for (long i = 0; i < 8 * MB; i += PAGE) *(long *)(p + i) = i;
    CHECK(faults() - before == 6);
    CHECK(unmap(p + 2 * MB + PAGE, PAGE) == 0);
    CHECK(protect(p + 4 * MB, 2 * PAGE, READ) == 0);
    CHECK(probe(p + 2 * MB + PAGE, READ) == SEGV + 1);
    CHECK(probe(p + 4 * MB + PAGE, WRITE) == SEGV + 2 && probe(p + 4 * MB + 2 * PAGE, WRITE) == 0);
    for (long i = 8; i < 8 * MB; i += PAGE) CHECK(i == 2 * MB + PAGE + 8 || *(long *)(p + i) == 0);
    for (long i = 0; i < 8 * MB; i += PAGE)
        CHECK(i == 2 * MB + PAGE || i == 4 * MB + 2 * PAGE || *(long *)(p + i) == i);
    exit(0);
}
