#include "comm/base/clock.h"

#include <errno.h>
#include <sched.h>
#include <time.h>

static uint64_t read_clock(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t clock_ns(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

uint64_t clock_thread_cpu_ns(void)
{
    return read_clock(CLOCK_THREAD_CPUTIME_ID);
}

uint64_t clock_wall_ns(void)
{
    return read_clock(CLOCK_REALTIME);
}

void clock_sleep_us(uint32_t us)
{
    struct timespec t = { us / 1000000, (long)(us % 1000000) * 1000 };
    while (nanosleep(&t, &t) != 0 && errno == EINTR)
        ;
}

void backoff_wait(struct backoff *b)
{
    if (b->tries++ < 64) {
        sched_yield();
        return;
    }
    uint32_t cap = b->max_us ? b->max_us : 1000, shift = (b->tries - 64) / 4, us = shift < 10 ? 50u << shift : cap;
    clock_sleep_us(us < cap ? us : cap);
}
