/* site: where a bench computes: the CPU, or a GPU with its name and what its maker says that it can do. */
#ifndef TESSERA_TRAINER_BENCH_SITE_H
#define TESSERA_TRAINER_BENCH_SITE_H

#include "trainer/ops/compute.h"

struct site {
    struct device *device;
    struct workers *workers; /* of the CPU; NULL: the caller alone */
    struct compute *compute;
    char name[96]; /* "cpu", "NVIDIA H100 80GB HBM3" */
    double peak;   /* of its dense products in bf16, operations a second; NAN: not known here */
};
/* device: "cpu" or "cuda"; nth: of the GPUs, modulo their number; threads: of the CPU, 0: no workers. */
status *site_open(const char *device, int nth, int threads, struct site *out) WARN_UNUSED;
void site_close(struct site *s); /* {0} is fine; accepts a half-open one */
/* Of a chip by its name; NAN. */
double site_peak(const char *name);

/* Square products of a side, to fill steps with and to see what products can do: with the kernels that training uses.
 */
enum { GEMMS_SIDE = 384 }; /* that a core has done in no time */
struct gemms {
    struct compute *compute; /* borrowed; NULL: this thread of the CPU */
    int64_t side;
    bool bf16;
    float *block; /* two factors and a product */
};
status *gemms_open(struct compute *c, int64_t side, bool bf16, struct gemms *out) WARN_UNUSED;
void gemms_close(struct gemms *g); /* {0} is fine */
/* Multiply so many times, 2 side^3 operations each; on a GPU they are queued. */
void gemms_run(const struct gemms *g, int64_t times);
/* The fastest of some runs, operations a second. */
status *gemms_rate(const struct gemms *g, double *out) WARN_UNUSED;

/* Copies between pinned memory and the device's, the fastest of some, bytes a second; of so many bytes. On the CPU NAN.
 */
status *site_copy_rates(const struct site *s, size_t bytes, double *to_host, double *to_device) WARN_UNUSED;

#endif
