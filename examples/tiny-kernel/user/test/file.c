// A file read through a mapping: once it is in memory, a fault maps 16 pages.
#include "user.h"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    for (int round = 0; round < 2; round++) {
        char *p = map(4 * MB, READ, PRIVATE, MEMORY);
        long before = faults();
        for (long i = 0; i < 4 * MB; i += 512) CHECK(*(long *)(p + i) == i + 1);
        long taken = faults() - before;
        CHECK(round == 0 ? taken <= 1024 : taken <= 65);  // windows are aligned, the mapping may not be
        CHECK(probe(p, WRITE) == SEGV + 2);
        CHECK(unmap(p, 4 * MB) == 0);
    }
    exit(0);
}
