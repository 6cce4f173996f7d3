#include "trainer/bench/site.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { RUNS = 5 };

/* Dense bf16 products on tensor cores, from NVIDIA's data sheets of each (half of what they give with sparsity). The
 * first row that is part of the name counts. */
static const struct {
    const char *part;
    double peak;
} chips[] = {
    { "H100 PCIe", 756e12 },                     /* H100 Tensor Core GPU */
    { "H100 NVL", 835e12 },  { "H100", 989e12 }, /* SXM */
    { "H200 NVL", 835e12 },                      /* H200 Tensor Core GPU */
    { "H200", 989e12 },                          /* SXM; GH200 Grace Hopper Superchip has the same */
    { "A100", 312e12 },                          /* A100 Tensor Core GPU, PCIe and SXM */
    { "B200", 2250e12 },                         /* HGX B200 */
};

double site_peak(const char *name)
{
    for (size_t i = 0; i < sizeof chips / sizeof *chips; i++)
        if (strstr(name, chips[i].part))
            return chips[i].peak;
    return NAN;
}

status *site_open(const char *device, int nth, int threads, struct site *out)
{
    *out = (struct site){ .peak = NAN };
    TRY(device_open_nth(device, nth, &out->device));
    device_model(out->device, out->name, sizeof out->name);
    out->peak = site_peak(out->name);
    if (threads)
        TRY(workers_open(threads, &out->workers));
    return compute_open(out->device, out->workers, false, &out->compute);
}

void site_close(struct site *s)
{
    compute_close(s->compute);
    workers_close(s->workers);
    device_close(s->device);
    *s = (struct site){ .peak = NAN };
}

/* ---- products */

static size_t square(const struct gemms *g)
{
    return (size_t)(g->side * g->side);
}

static status *fill(const struct gemms *g)
{
    float *x = mem_array(NULL, square(g), sizeof *x);
    if (!x)
        return ERR(NO_MEMORY, "a matrix of side %lld", (long long)g->side);
    for (size_t i = 0; i < square(g); i++)
        x[i] = (float)(i % 7) * 0.125f;
    status *st = compute_put(g->compute, g->block, x, square(g) * sizeof *x);
    if (!st)
        st = compute_put(g->compute, g->block + square(g), x, square(g) * sizeof *x);
    mem_free(x);
    return st;
}

status *gemms_open(struct compute *c, int64_t side, bool bf16, struct gemms *out)
{
    struct gemms g = { c, side, bf16, NULL };
    void *block;
    TRY(compute_alloc(c, 3 * square(&g) * sizeof *g.block, &block));
    g.block = block;
    *out = g;
    return fill(&g);
}

void gemms_close(struct gemms *g)
{
    compute_free(g->compute, g->block, 3 * square(g) * sizeof *g->block);
    g->block = NULL;
}

void gemms_run(const struct gemms *g, int64_t times)
{
    const struct kernels *k = g->compute ? g->compute->kernels : &kernels_cpu;
    const struct gemm one = { .m = g->side,
                              .n = g->side,
                              .k = g->side,
                              .lda = g->side,
                              .ldb = g->side,
                              .ldc = g->side,
                              .a = g->block,
                              .b = g->block + square(g),
                              .b_dtype = DTYPE_F32,
                              .c = g->block + 2 * square(g),
                              .bf16 = g->bf16 };
    for (int64_t i = 0; i < times; i++)
        k->gemm(g->compute ? g->compute->workers : NULL, &one);
}

status *gemms_rate(const struct gemms *g, double *out)
{
    const int64_t each = compute_host(g->compute) ? 1 : 10;
    double side = (double)g->side, best = 0;
    for (int i = 0; i <= RUNS; i++) { /* the first one finds algorithms and takes scratch */
        uint64_t t0 = clock_ns();
        gemms_run(g, each);
        TRY(compute_check(g->compute, true));
        double rate = 2 * side * side * side * (double)each / ns_to_s(clock_ns() - t0);
        best = i && rate > best ? rate : best;
    }
    *out = best;
    return NULL;
}

/* ---- copies */

static status *copy_rate(const struct site *s, void *to, const void *from, size_t bytes, double *out)
{
    const struct device_ops *ops = s->device->ops;
    double best = 0;
    for (int i = 0; i < RUNS; i++) {
        uint64_t t0 = clock_ns();
        TRY(ops->copy(s->device, to, from, bytes, s->compute->stream));
        TRY(ops->stream_sync(s->device, s->compute->stream));
        double rate = (double)bytes / ns_to_s(clock_ns() - t0);
        best = rate > best ? rate : best;
    }
    *out = best;
    return NULL;
}

status *site_copy_rates(const struct site *s, size_t bytes, double *to_host, double *to_device)
{
    const struct device_ops *ops = s->device->ops;
    void *there = NULL, *pinned = NULL;
    *to_host = *to_device = NAN;
    if (s->compute->host)
        return NULL;
    status *st = ops->alloc(s->device, bytes, &there);
    if (!st)
        st = ops->alloc_pinned(s->device, bytes, &pinned);
    if (!st)
        st = copy_rate(s, pinned, there, bytes, to_host);
    if (!st)
        st = copy_rate(s, there, pinned, bytes, to_device);
    if (there)
        ops->free(s->device, there, bytes);
    if (pinned)
        ops->free_pinned(s->device, pinned, bytes);
    return st;
}
