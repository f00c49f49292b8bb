// Private memory: reads as zero, keeps what is written, forgets what is discarded.
#include "user.h"

static volatile long counter = 42, zeroed[2000];

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    CHECK(counter == 42 && zeroed[0] == 0 && zeroed[1999] == 0);
    counter++;
    CHECK(counter == 43);
    char *p = memory(4 * MB);
    long before = faults();
    for (long i = 0; i < 4 * MB; i += PAGE) CHECK(p[i] == 0);
    CHECK(faults() - before == 1024);
    for (long i = 0; i < 4 * MB; i += PAGE) *(long *)(p + i) = i;
    CHECK(faults() - before == 2048);
    for (long i = 0; i < 4 * MB; i += 8) CHECK(*(long *)(p + i) == (i % PAGE ? 0 : i));
    CHECK(advise(p, 2 * MB, DONTNEED) == 0);
    for (long i = 0; i < 4 * MB; i += PAGE) CHECK(*(long *)(p + i) == (i < 2 * MB ? 0 : i));
    CHECK(unmap(p + MB, 2 * MB) == 0);
    CHECK(probe(p + MB, READ) == SEGV + 1 && probe(p + 3 * MB - 1, WRITE) == SEGV + 1);
    CHECK(*(long *)(p + 3 * MB) == 3 * MB);
    exit(0);
}
