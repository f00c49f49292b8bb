// A copy of the program's memory stays what it was while the other CPU writes on, through what it has cached from before
// too; it shows one moment, and no write is lost.
#include "two.h"

enum { PAGES = 16, FORKS = 60 };
static char stack[2 * PAGE] __attribute__((aligned(16)));
static volatile long stop;
static char *ours;

static volatile long *word(long i) { return (volatile long *)(ours + i * PAGE); }

static void child(long number) {
    long seen[PAGES];
    for (long i = 0; i < PAGES; i++) seen[i] = *word(i);
    // The other CPU writes the number of its round to one page after the other.
    for (long i = 1; i < PAGES; i++) CHECK(seen[i] <= seen[i - 1] && seen[0] - seen[i] <= 1);
    for (long i = 0; i < 2000; i++) __builtin_ia32_pause();
    for (long i = 0; i < PAGES; i++) CHECK(*word(i) == seen[i]);
    for (long i = number % 3; i < PAGES; i += 3) *word(i) = -i;
    for (long i = 0; i < PAGES; i++) CHECK(*word(i) == (i % 3 == number % 3 ? -i : seen[i]));
    exit(0);
}

void start(long cpu, long cpus) {
    CHECK(cpus == 2);
    ours = both(cpu, PAGES * PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    for (long round = 1; cpu == 1 && !stop; round++) {
        for (long i = 0; i < PAGES; i++) {
            CHECK(*word(i) == round - 1);
            *word(i) = round;
        }
    }
    for (long number = 0; cpu == 0 && number < FORKS; number++) CHECK(fork_and_run(child, number, stack + sizeof stack) == 0);
    stop = 1;
    meet(cpu);
    exit(0);
}
