/* adamw: the update of kernels.h, elementwise. Powers are taken in f64 here, once. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

struct adamw_job {
    const struct isa *isa;
    float *p, *m, *v;
    const float *g;
    struct adamw_scalars h;
    int64_t n;
};

static void update(void *arg, size_t index)
{
    const struct adamw_job *t = arg;
    int64_t i = (int64_t)index * TASK_ELEMS;
    t->isa->adamw(t->p + i, t->g + i, t->m + i, t->v + i, &t->h, min64(TASK_ELEMS, t->n - i));
}

void adamw_update(struct workers *w, float *p, const float *g, float *m, float *v, size_t n, double lr, double beta1,
                  double beta2, double eps, double weight_decay, uint64_t step, double grad_scale)
{
    struct adamw_job t = { .isa = isa_best(), .p = p, .m = m, .v = v, .g = g, .n = (int64_t)n };
    t.h = (struct adamw_scalars){
        .lr = (float)lr,
        .beta1 = (float)beta1,
        .beta1_rest = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .beta2_rest = (float)(1 - beta2),
        .eps = (float)eps,
        .decay = (float)weight_decay,
        .fix1 = (float)(1 / (1 - pow(beta1, (double)step))),
        .fix2 = (float)(1 / (1 - pow(beta2, (double)step))),
        .grad_scale = (float)grad_scale,
    };
    workers_for(w, task_count(t.n, TASK_ELEMS), update, &t);
}

void cpu_adamw(struct workers *w, const struct adamw_run *run, size_t runs, const struct adamw_how *how)
{
    double scale = how->scale ? *how->scale : how->grad_scale;
    for (size_t i = 0; i < runs && !isnan(scale); i++)
        adamw_update(w, run[i].p, run[i].g, run[i].m, run[i].v, run[i].n, how->lr, how->beta1, how->beta2, how->eps,
                     run[i].weight_decay, how->step, scale);
}
