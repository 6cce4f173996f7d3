/* measure: order statistics, CPU seconds of threads by name. */
#ifndef TESSERA_TRAINER_BENCH_MEASURE_H
#define TESSERA_TRAINER_BENCH_MEASURE_H

#include "comm/base/status.h"

#include <stddef.h>
#include <stdint.h>

/* Middle value, or the mean of the two. Sorts x. NaN for n = 0. */
double median_of(double *x, size_t n);

/* A confidence interval of the median from order statistics (no distribution is assumed): the k-th smallest and the
 * k-th largest value, with the largest k whose coverage 1 - 2 P(Binomial(n, 1/2) < k) is at least `wanted`; the
 * extremes where n is too small for that. coverage: what it really is. Sorts x; n >= 1. */
struct interval {
    double lo, hi, coverage;
};
struct interval median_interval(double *x, size_t n, double wanted);

/* CPU nanoseconds this process's living threads have used whose name begins with prefix. */
status *threads_cpu_ns(const char *prefix, uint64_t *out) WARN_UNUSED;
uint64_t process_cpu_ns(void); /* of all threads, dead ones too */
double load_average(void);     /* of the last minute; NaN: the system does not say */

#endif
