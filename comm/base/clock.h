/* clock: monotonic nanoseconds, deadlines, wall time for people. */
#ifndef TESSERA_COMM_BASE_CLOCK_H
#define TESSERA_COMM_BASE_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

uint64_t clock_ns(void);            /* monotonic */
uint64_t clock_thread_cpu_ns(void); /* CPU time of the calling thread */
uint64_t clock_wall_ns(void);       /* since 1970; for people and lease ages, never for measuring */
void clock_sleep_us(uint32_t us);   /* between two tests of something; never as synchronisation */

static inline double ns_to_s(uint64_t ns)
{
    return (double)ns * 1e-9;
}

/* A backoff for test-and-wait loops: first yields, then sleeps 50 us doubling up to `max_us`. Start from {0}. */
struct backoff {
    uint32_t tries, max_us; /* max_us 0: 1000 */
};
void backoff_wait(struct backoff *b);

#endif
