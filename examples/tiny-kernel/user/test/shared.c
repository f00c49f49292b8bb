// A shared mapping: what is written to one is seen in the other, and stays when both are gone.
#include "user.h"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    for (int file = MEMORY; file <= TRACKED; file++) {
        char *a = map(MB, READ | WRITE, SHARED, file), *b = map(MB, READ, SHARED, file);
        for (long i = 0; i < MB; i += PAGE) {
            CHECK(*(long *)(a + i) == i + 1);
            *(long *)(a + i) = -i;
            CHECK(*(long *)(b + i) == -i);
        }
        CHECK(probe(b, WRITE) == SEGV + 2);
        CHECK(unmap(a, MB) == 0 && unmap(b, MB) == 0);
        a = map(MB, READ, PRIVATE, file);
        for (long i = 0; i < MB; i += PAGE) CHECK(*(long *)(a + i) == -i && *(long *)(a + i + 8) == i + 9);
    }
    exit(0);
}
