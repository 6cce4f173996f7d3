/* norm: root-mean-square normalisation. A row is one unit of work; weight gradients add rows in order, by columns. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

struct norm_job {
    const struct isa *isa;
    float *out, *rrms; /* y, dx or dweight */
    const float *dy, *x, *weight, *kept;
    int64_t rows, c, each;
    float eps;
};

static void norm_rows(void *arg, size_t index)
{
    const struct norm_job *t = arg;
    int64_t first = (int64_t)index * t->each, last = min64(first + t->each, t->rows);
    for (int64_t i = first; i < last; i++) {
        const float *x = t->x + i * t->c;
        float r = 1.0f / sqrtf(t->isa->dot(x, x, t->c) / (float)t->c + t->eps);
        t->rrms[i] = r;
        t->isa->mul_scaled(t->out + i * t->c, x, t->weight, r, t->c);
    }
}

void cpu_rmsnorm(struct workers *w, struct array y, float *rrms, struct array x, const float *weight, int64_t rows,
                 int64_t c, float eps)
{
    struct norm_job t = {
        .isa = isa_best(), .out = y.at, .rrms = rrms, .x = x.at, .weight = weight, .rows = rows, .c = c, .eps = eps
    };
    t.each = task_rows(c);
    workers_for(w, task_count(rows, t.each), norm_rows, &t);
}

/* dx += r dy w - x r^3 / C sum(dy w x) */
static void norm_bwd_rows(void *arg, size_t index)
{
    const struct norm_job *t = arg;
    int64_t first = (int64_t)index * t->each, last = min64(first + t->each, t->rows);
    for (int64_t i = first; i < last; i++) {
        const float *x = t->x + i * t->c, *dy = t->dy + i * t->c;
        float r = t->kept[i];
        float s = t->isa->dot3(dy, t->weight, x, t->c) * r * r * r / (float)t->c;
        t->isa->rmsnorm_bwd(t->out + i * t->c, dy, t->weight, x, r, s, t->c);
    }
}

void cpu_rmsnorm_bwd(struct workers *w, struct array dx, struct array dy, struct array x, const float *weight,
                     const float *rrms, int64_t rows, int64_t c)
{
    struct norm_job t = {
        .isa = isa_best(), .out = dx.at, .kept = rrms, .dy = dy.at, .x = x.at, .weight = weight, .rows = rows, .c = c
    };
    t.each = task_rows(c);
    workers_for(w, task_count(rows, t.each), norm_bwd_rows, &t);
}

enum { COLS = 64 };

static void norm_weight_columns(void *arg, size_t index)
{
    const struct norm_job *t = arg;
    int64_t j = (int64_t)index * COLS, cols = min64(COLS, t->c - j);
    float sum[COLS] = { 0 };
    for (int64_t i = 0; i < t->rows; i++)
        t->isa->mul_add(sum, t->dy + i * t->c + j, t->x + i * t->c + j, t->kept[i], cols);
    t->isa->add(t->out + j, t->out + j, sum, cols);
}

void cpu_rmsnorm_bwd_weight(struct workers *w, float *dweight, struct array dy, struct array x, const float *rrms,
                            int64_t rows, int64_t c)
{
    struct norm_job t = {
        .isa = isa_best(), .out = dweight, .kept = rrms, .dy = dy.at, .x = x.at, .rows = rows, .c = c
    };
    workers_for(w, task_count(c, COLS), norm_weight_columns, &t);
}
