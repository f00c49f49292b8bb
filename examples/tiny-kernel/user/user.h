// What the user programs share: system calls, checks, faults that may be refused. No C library.
#include <stddef.h>
#include <stdint.h>

enum { PAGE = 4096, MB = 1 << 20 };
enum { READ = 1, WRITE = 2, EXEC = 4 };
enum { SHARED = 1, PRIVATE = 2, FIXED = 0x10, ANONYMOUS = 0x20 };
enum { DONTNEED = 4, HUGEPAGE = 14 };
enum { MEMORY = 3, TRACKED = 4, SHORT = 5, HUGE = 6 };  // files: 4 MiB each, 6,000 bytes, 16 MiB of huge pages
enum { SEGV = 11 << 8, BUS = 7 << 8 };        // what `probe` answers, plus the code of the signal

static inline long call6(long n, long a, long b, long c, long d, long e, long f) {
    register long r10 asm("r10") = d;
    register long r8 asm("r8") = e;
    register long r9 asm("r9") = f;
    asm volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return n;
}
static inline long call(long n, long a, long b, long c) { return call6(n, a, b, c, 0, 0, 0); }

static inline long write(const void *text, size_t len) { return call(1, 1, (long)text, len); }
static inline char *map(size_t len, int prot, int flags, int file) {
    return (char *)call6(9, 0, len, prot, flags, file, 0);
}
static inline char *memory(size_t len) { return map(len, READ | WRITE, PRIVATE | ANONYMOUS, -1); }
static inline long protect(void *at, size_t len, int prot) { return call(10, (long)at, len, prot); }
static inline long unmap(void *at, size_t len) { return call(11, (long)at, len, 0); }
static inline long advise(void *at, size_t len, int advice) { return call(28, (long)at, len, advice); }
static inline void exit(long status) { call(60, status, 0, 0); __builtin_unreachable(); }
static inline void mark(long which) { call(1001, which, 0, 0); }
static inline long faults(void) { return call(1003, 0, 0, 0); }

// Ends the program with the number of the line whose check fails.
#define CHECK(what) do { if (!(what)) exit(__LINE__); } while (0)

// Where the program goes on when an access is refused, with signal and code in RAX; NULL for the end.
static inline void on_refusal(const void *place) { CHECK(call(1000, (long)place, 0, 0) >= 0); }

// Each of these accesses a byte and answers 0; refused, it answers with signal and code.
long touch_read(volatile char *at), touch_write(volatile char *at), touch_exec(volatile char *at);
extern const char refused[];
asm("touch_read: testb $1, (%rdi); xor %eax, %eax; ret\n"
    "touch_write: movb $1, (%rdi); xor %eax, %eax; ret\n"
    "touch_exec: xor %eax, %eax; jmp *%rdi\n"
    "refused: ret");

// Touches a byte: 0, or the signal and its code if that is refused.
static inline long probe(volatile char *at, int how) {
    on_refusal(refused);
    long result = how == WRITE ? touch_write(at) : how == EXEC ? touch_exec(at) : touch_read(at);
    on_refusal(NULL);
    return result;
}

// Runs `child(argument)` on this CPU in a copy of this program's memory, until it exits; then this goes on.
extern const char child_start[];
asm("child_start: call *%rsi; ud2");
static inline long fork_and_run(void (*child)(long), long argument, char *stack) {
    return call6(1004, (long)child_start, (long)stack, argument, (long)child, 0, 0);
}

// For a program that wants one CPU: the others leave, and touch nothing any more.
static inline void alone(long cpu, long cpus) {
    static volatile long gone;
    if (cpu > 0) {
        gone = 1;
        exit(0);
    }
    while (cpus > 1 && !gone) __builtin_ia32_pause();
}

void start(long cpu, long cpus);
asm(".global _start\n_start:\ncall start\nud2");
