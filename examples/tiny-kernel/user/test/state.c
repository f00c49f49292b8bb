// Nothing of a program's registers is lost in the kernel, and no flag of its is the kernel's trouble.
#include "user.h"

typedef unsigned char vector[16] __attribute__((aligned(16)));
static vector before[16], after[16];

#define ALL(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) do(14) do(15)
#define LOAD(n) "movdqa " #n "*16(%1), %%xmm" #n "\n"
#define STORE(n) "movdqa %%xmm" #n ", " #n "*16(%2)\n"

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    for (int i = 0; i < 256; i++) before[i / 16][i % 16] = i + 1;
    char *p = memory(64 * PAGE), *f = map(64 * PAGE, READ | WRITE, PRIVATE, MEMORY);
    for (long i = 0; i < 64 * PAGE; i += PAGE) {
        uint32_t wanted = 0x1f80 | (uint32_t)(i / PAGE % 4) << 13, found;  // rounding, another each time
        asm volatile("ldmxcsr %0" ::"m"(wanted));
        // A page cleared, a page copied, and a system call that maps.
        asm volatile(ALL(LOAD) "movb $1, (%3)\n movb $1, (%4)\n"
                     "mov $9, %%eax; xor %%edi, %%edi; mov $4096, %%esi; mov $3, %%edx; mov $0x22, %%r10d\n"
                     "mov $-1, %%r8; xor %%r9d, %%r9d; syscall\n" ALL(STORE)
                     : "=m"(after) : "b"(before), "r"(after), "r"(p + i), "r"(f + i)
                     : "rax", "rcx", "rdx", "rdi", "rsi", "r8", "r9", "r10", "r11", "memory");
        asm volatile("stmxcsr %0" : "=m"(found));
        CHECK(found == wanted);
        for (int j = 0; j < 256; j++) CHECK(after[j / 16][j % 16] == (unsigned char)(j + 1));
    }
    // Nested task, alignment check, direction, identification: across a system call and a fault.
    asm volatile("pushfq; orq $0x244400, (%%rsp); popfq; mov $39, %%eax; syscall; pushfq; andq $~0x244400, (%%rsp); popfq"
                 ::: "rax", "rcx", "r11", "memory", "cc");
    char *q = memory(PAGE);
    asm volatile("pushfq; orq $0x204400, (%%rsp); popfq; movb $1, (%0); pushfq; andq $~0x204400, (%%rsp); popfq"
                 ::"r"(q) : "memory", "cc");
    CHECK(*q == 1);
    // A place to go on at that nothing needs.
    on_refusal(refused);
    CHECK(touch_read(q) == 0);
    on_refusal(NULL);
    exit(0);
}
