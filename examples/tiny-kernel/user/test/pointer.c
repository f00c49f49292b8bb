// A system call that is given a bad pointer answers with an error, and the kernel lives on.
#include "user.h"

enum { EFAULT = 14 };

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    char *p = memory(2 * PAGE);
    CHECK(write("", 0) == 0);
    CHECK(write((char *)8, 1) == -EFAULT);
    CHECK(write((char *)0xffffffff80100000, 8) == -EFAULT);
    CHECK(write((char *)0x123456789abcdef0, 8) == -EFAULT);
    CHECK(write((char *)-8, 256) == -EFAULT);
    CHECK(unmap(p + PAGE, PAGE) == 0);
    CHECK(write(p + PAGE - 8, 16) == -EFAULT);
    CHECK(protect(p, PAGE, 0) == 0 && write(p, 1) == -EFAULT);
    char *f = map(4 * PAGE, READ, SHARED, SHORT);
    CHECK(write(f + 2 * PAGE, 1) == -EFAULT);
    // Nothing is mapped yet, so the copy takes the fault. The second byte of the word at 0x2000 is a space.
    CHECK(write(map(3 * PAGE, READ, PRIVATE, MEMORY) + 0x2001, 1) == 1);
    exit(0);
}
