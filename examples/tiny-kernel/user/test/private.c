// A private mapping of a file: a write is a copy, and the file stays as it is.
#include "user.h"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    char *ours = map(MB, READ | WRITE, PRIVATE, MEMORY), *theirs = map(MB, READ, SHARED, MEMORY);
    for (long i = 0; i < MB; i += 2 * PAGE) CHECK(*(long *)(ours + i) == i + 1);
    for (long i = 0; i < MB; i += PAGE) *(long *)(ours + i) = -i;
    for (long i = 0; i < MB; i += PAGE) {
        CHECK(*(long *)(ours + i) == -i && *(long *)(theirs + i) == i + 1);
        for (long j = i + 8; j < i + PAGE; j += 8) CHECK(*(long *)(ours + j) == j + 1);
    }
    CHECK(advise(ours, MB, DONTNEED) == 0);
    for (long i = 0; i < MB; i += PAGE) CHECK(*(long *)(ours + i) == i + 1);
    exit(0);
}
