// What is refused, with the signal and code that Linux gives.
#include "user.h"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    char *p = memory(4 * PAGE);
    CHECK(probe(p, READ) == 0 && probe(p, WRITE) == 0);
    CHECK(protect(p, PAGE, READ) == 0 && protect(p + PAGE, PAGE, 0) == 0);
    CHECK(probe(p, READ) == 0 && probe(p, WRITE) == SEGV + 2);
    CHECK(probe(p + PAGE, READ) == SEGV + 2 && probe(p + PAGE, WRITE) == SEGV + 2);
    CHECK(probe(p + 2 * PAGE, WRITE) == 0);
    p[2 * PAGE] = (char)0xc3;  // ret
    CHECK(probe(p + 2 * PAGE, EXEC) == SEGV + 2);
    CHECK(protect(p + 2 * PAGE, PAGE, READ | EXEC) == 0 && probe(p + 2 * PAGE, EXEC) == 0);
    CHECK(probe(p + 2 * PAGE, WRITE) == SEGV + 2);
    CHECK(unmap(p + 3 * PAGE, PAGE) == 0 && probe(p + 3 * PAGE, READ) == SEGV + 1);
    CHECK(probe((char *)8, READ) == SEGV + 1);
    CHECK(probe((char *)0xffff800000000000, READ) == SEGV + 1);   // the direct map
    CHECK(probe((char *)0xffffffff80100000, WRITE) == SEGV + 1);  // the kernel
    CHECK(probe((char *)0x123456789abcdef0, READ) == SEGV + 128);
    CHECK(call(1000, 0x8000000000000000, 0, 0) < 0);  // no place to go on at
    char *f = map(4 * PAGE, READ | WRITE, SHARED, SHORT);
    CHECK(*(long *)(f + PAGE) == PAGE + 1 && f[6000] == 0 && f[2 * PAGE - 1] == 0);
    CHECK(probe(f + 2 * PAGE, READ) == BUS + 2 && probe(f + 3 * PAGE, WRITE) == BUS + 2);
    exit(0);
}
