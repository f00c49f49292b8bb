// Copies of a program's memory, and copies of copies: each has what it wrote, and what was there before.
#include "user.h"

enum { DEPTH = 4, LEN = 4 * MB };
static char stacks[DEPTH][2 * PAGE] __attribute__((aligned(16)));
static char *ours, *file, *unread;

static volatile long *word(long at) { return (volatile long *)(ours + at); }

static void generation(long depth) {
    for (long before = 0; before < depth; before++) CHECK(*word(before * PAGE) == before + 1);
    // In small pages, a huge one, and a file's.
    *word(depth * PAGE) = depth + 1;
    *word(2 * MB + depth * PAGE) = 10 * depth;
    CHECK(*(volatile long *)(file + depth * PAGE) == depth * PAGE + 1);
    *(volatile long *)(file + depth * PAGE) = -depth;
    CHECK(unread[depth * PAGE] == 0);
    unread[depth * PAGE] = 1;
    if (depth + 1 < DEPTH) CHECK(fork_and_run(generation, depth + 1, stacks[depth] + sizeof stacks[depth]) == 0);
    // Of the child's writes, nothing; and here they come again.
    for (long i = depth + 1; i < DEPTH; i++) {
        CHECK(*word(i * PAGE) == 0 && *word(2 * MB + i * PAGE) == 0 && unread[i * PAGE] == 0);
        CHECK(*(volatile long *)(file + i * PAGE) == i * PAGE + 1);
        *word(i * PAGE) = i;
        *word(2 * MB + i * PAGE) = i;
    }
    for (long i = 0; i <= depth; i++) CHECK(*word(2 * MB + i * PAGE) == 10 * i);
    if (depth > 0) exit(0);
}

void start(long cpu, long cpus) {
    alone(cpu, cpus);
    char *room = memory(LEN + 2 * MB);
    ours = (char *)(((long)room + 2 * MB - 1) / (2 * MB) * (2 * MB));
    CHECK(advise(ours + 2 * MB, 2 * MB, HUGEPAGE) == 0);
    file = map(4 * PAGE, READ | WRITE, PRIVATE, MEMORY);
    unread = memory(DEPTH * PAGE);
    CHECK(unread[0] == 0);
    for (long round = 0; round < 3; round++) {
        for (long i = 0; i < DEPTH; i++) *word(i * PAGE) = *word(2 * MB + i * PAGE) = 0;
        CHECK(advise(file, 4 * PAGE, DONTNEED) == 0 && advise(unread, DEPTH * PAGE, DONTNEED) == 0);
        generation(0);
    }
    exit(0);
}
