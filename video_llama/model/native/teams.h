/* Threads that share an image and meet after each step. */
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

/* Keeps the compiler from moving memory accesses over instructions for tiles, which do not say what memory they read. */
#define FENCE() __asm__ volatile("" ::: "memory")

/* A thread and those that work on the same image. */
struct team {
    _Alignas(64) atomic_int arrived;
    atomic_int round;
    int members;
};

struct worker {
    struct team *team;
    int member;
};

/* Waits until all members of the team are here. */
static void meet(const struct worker *worker) {
    struct team *team = worker->team;
    FENCE();
    if (team->members == 1) return;
    const int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->members) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->round, round + 1);
        return;
    }
    for (int turns = 0; atomic_load(&team->round) == round; turns++) {
        if (turns < 4096)
            _mm_pause();
        else
            sched_yield(); /* another process has the core of one that is waited for */
    }
}

/* This worker's part of `count` things: from the first to before the last. */
static inline int64_t first_of(const struct worker *worker, int64_t count) {
    return count * worker->member / worker->team->members;
}

static inline int64_t end_of(const struct worker *worker, int64_t count) {
    return count * (worker->member + 1) / worker->team->members;
}
