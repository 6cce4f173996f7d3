/* measure: see measure.h. The kernel names a thread's CPU clock by its id, to the nanosecond; /proc/self/task has the
 * ids and names. (The times in /proc/self/task/N/stat are the same clock in units of 10 ms.) */
#include "trainer/bench/measure.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median_of(double *x, size_t n)
{
    if (!n)
        return NAN;
    qsort(x, n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

struct interval median_interval(double *x, size_t n, double wanted)
{
    qsort(x, n, sizeof *x, ascending);
    double p = pow(0.5, (double)n), below = p; /* P(B = k), P(B <= k), B ~ Binomial(n, 1/2) */
    struct interval out = { x[0], x[n - 1], 1 - 2 * below };
    for (size_t k = 1; 2 * k + 1 < n; k++) {
        p *= (double)(n - k + 1) / (double)k;
        below += p;
        if (1 - 2 * below < wanted)
            break;
        out = (struct interval){ x[k], x[n - 1 - k], 1 - 2 * below };
    }
    return out;
}

/* linux/posix-timers.h: MAKE_THREAD_CPUCLOCK(tid, CPUCLOCK_SCHED) */
static clockid_t clock_of(int tid)
{
    return (clockid_t)(~(unsigned)tid << 3 | 6u);
}

static bool name_begins(const char *tid, const char *prefix)
{
    char path[64], name[32] = "";
    snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", tid);
    FILE *f = fopen(path, "re");
    if (!f)
        return false; /* it has ended */
    bool got = fgets(name, sizeof name, f) != NULL;
    fclose(f);
    return got && !strncmp(name, prefix, strlen(prefix));
}

status *threads_cpu_ns(const char *prefix, uint64_t *out)
{
    DIR *d = opendir("/proc/self/task");
    if (!d)
        return ERR_SYS(errno, "list /proc/self/task");
    uint64_t sum = 0;
    for (struct dirent *e; (e = readdir(d));) {
        struct timespec ts;
        int tid = (int)strtol(e->d_name, NULL, 10);
        if (tid > 0 && name_begins(e->d_name, prefix) && !clock_gettime(clock_of(tid), &ts))
            sum += (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    }
    closedir(d);
    *out = sum;
    return NULL;
}

uint64_t process_cpu_ns(void)
{
    struct timespec ts = { 0 };
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

double load_average(void)
{
    double load[1];
    return getloadavg(load, 1) == 1 ? load[0] : NAN;
}
