/* adamw: the update of many runs of parameters by one kernel: a block takes a piece of a run, four elements a thread at
 * a time where the run's arrays are 16-byte aligned. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { PIECE = 16 * BLOCK, RUNS = 64 /* of a launch: they are its arguments, of which CUDA takes 4 KiB */ };

struct scalars {
    float lr, beta1, beta1_rest, beta2, beta2_rest, eps, fix1, fix2, grad_scale;
    const double *scale;
};

struct some_runs {
    unsigned first[RUNS + 1]; /* block of each; and the end */
    float decay[RUNS];
    float *p[RUNS];
    const float *g[RUNS];
    float *m[RUNS], *v[RUNS];
    int64_t n[RUNS];
};
static_assert(sizeof(struct some_runs) + sizeof(struct scalars) <= 4096, "arguments of a kernel");

template <int W>
__device__ void step(const struct scalars &h, float grad_scale, float decay, float *p, const float *g, float *m,
                     float *v)
{
    float a[W], b[W], c[W], d[W];
    load<W>(a, p);
    load<W>(b, g);
    load<W>(c, m);
    load<W>(d, v);
    UNROLL
    for (int k = 0; k < W; k++) {
        float grad = b[k] * grad_scale;
        c[k] = c[k] * h.beta1 + grad * h.beta1_rest;
        d[k] = d[k] * h.beta2 + grad * grad * h.beta2_rest;
        float update = c[k] * h.fix1 / (sqrtf(d[k] * h.fix2) + h.eps);
        a[k] = a[k] - h.lr * (update + decay * a[k]);
    }
    store<W>(p, a);
    store<W>(m, c);
    store<W>(v, d);
}

__global__ void adamw_kernel(struct some_runs runs, struct scalars h)
{
    float grad_scale = h.scale ? (float)*h.scale : h.grad_scale;
    if (grad_scale != grad_scale)
        return;
    int r = 0;
    while (blockIdx.x >= runs.first[r + 1])
        r++;
    float *p = runs.p[r], *m = runs.m[r], *v = runs.v[r], decay = runs.decay[r];
    const float *g = runs.g[r];
    int64_t begin = (int64_t)(blockIdx.x - runs.first[r]) * PIECE, end = min_of(begin + PIECE, runs.n[r]);
    int64_t i = begin + threadIdx.x;
    if ((((uintptr_t)p | (uintptr_t)g | (uintptr_t)m | (uintptr_t)v) & 15) == 0) {
        for (int64_t j = begin + 4 * (int64_t)threadIdx.x; j + 4 <= end; j += 4 * BLOCK)
            step<4>(h, grad_scale, decay, p + j, g + j, m + j, v + j);
        i = end - (end - begin) % 4 + threadIdx.x;
    }
    for (; i < end; i += BLOCK)
        step<1>(h, grad_scale, decay, p + i, g + i, m + i, v + i);
}
} // namespace

void gpu_adamw(struct workers *w, const struct adamw_run *run, size_t runs, const struct adamw_how *how)
{
    struct scalars h = { (float)how->lr,
                         (float)how->beta1,
                         (float)(1 - how->beta1),
                         (float)how->beta2,
                         (float)(1 - how->beta2),
                         (float)how->eps,
                         (float)(1 / (1 - pow(how->beta1, (double)how->step))),
                         (float)(1 / (1 - pow(how->beta2, (double)how->step))),
                         (float)how->grad_scale,
                         how->scale };
    for (size_t at = 0; at < runs; at += RUNS) {
        struct some_runs s = {};
        size_t count = runs - at < RUNS ? runs - at : (size_t)RUNS;
        for (size_t k = 0; k < count; k++) {
            const struct adamw_run *r = &run[at + k];
            s.decay[k] = (float)r->weight_decay;
            s.p[k] = r->p;
            s.g[k] = r->g;
            s.m[k] = r->m;
            s.v[k] = r->v;
            s.n[k] = (int64_t)r->n;
            s.first[k + 1] = s.first[k] + gpu_blocks(s.n[k], PIECE);
        }
        launch(w, "adamw", adamw_kernel, s.first[count], BLOCK, 0, s, h);
    }
}
