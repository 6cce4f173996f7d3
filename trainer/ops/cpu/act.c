/* act: swiglu and the elementwise loops. A task is a run of elements; its bounds change no bit. */
#include "trainer/ops/cpu/cpu.h"

#include <string.h>

struct act_job {
    const struct isa *isa;
    void (*run)(const struct act_job *t, int64_t first, int64_t n);
    float *y, *y2;
    const float *a, *b, *c;
    const uint16_t *half;
    float s;
    int64_t n;
};

static void run_task(void *arg, size_t index)
{
    const struct act_job *t = arg;
    int64_t first = (int64_t)index * TASK_ELEMS;
    t->run(t, first, min64(TASK_ELEMS, t->n - first));
}

static void each(struct workers *w, struct act_job t)
{
    t.isa = isa_best();
    workers_for(w, task_count(t.n, TASK_ELEMS), run_task, &t);
}

static float *at(float *p, int64_t i)
{
    return p ? p + i : NULL;
}

static void run_swiglu(const struct act_job *t, int64_t i, int64_t n)
{
    t->isa->swiglu(t->y + i, t->a + i, t->b + i, n);
}

void cpu_swiglu(struct workers *w, struct array y, struct array gate, struct array up, int64_t n)
{
    each(w, (struct act_job){ .run = run_swiglu, .y = y.at, .a = gate.at, .b = up.at, .n = n });
}

static void run_swiglu_bwd(const struct act_job *t, int64_t i, int64_t n)
{
    t->isa->swiglu_bwd(at(t->y, i), at(t->y2, i), t->c + i, t->a + i, t->b + i, n);
}

void cpu_swiglu_bwd(struct workers *w, struct array dgate, struct array dup, struct array dy, struct array gate,
                    struct array up, int64_t n)
{
    each(w, (struct act_job){
                .run = run_swiglu_bwd, .y = dgate.at, .y2 = dup.at, .c = dy.at, .a = gate.at, .b = up.at, .n = n });
}

static void run_add(const struct act_job *t, int64_t i, int64_t n)
{
    t->isa->add(t->y + i, t->a + i, t->b + i, n);
}

void cpu_add(struct workers *w, float *y, const float *a, const float *b, int64_t n)
{
    each(w, (struct act_job){ .run = run_add, .y = y, .a = a, .b = b, .n = n });
}

static void run_scale(const struct act_job *t, int64_t i, int64_t n)
{
    t->isa->scale(t->y + i, t->a + i, t->s, n);
}

void cpu_scale(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    each(w, (struct act_job){ .run = run_scale, .y = y, .a = x, .s = s, .n = n });
}

static void run_axpy(const struct act_job *t, int64_t i, int64_t n)
{
    t->isa->axpy(t->y + i, t->a + i, t->s, n);
}

void cpu_axpy(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    each(w, (struct act_job){ .run = run_axpy, .y = y, .a = x, .s = s, .n = n });
}

static void run_add_scalar(const struct act_job *t, int64_t i, int64_t n)
{
    for (int64_t j = i; j < i + n; j++)
        t->y[j] += *t->a;
}

void cpu_add_scalar(struct workers *w, float *y, const float *s, int64_t n)
{
    each(w, (struct act_job){ .run = run_add_scalar, .y = y, .a = s, .n = n });
}

static void run_zero(const struct act_job *t, int64_t i, int64_t n)
{
    memset(t->y + i, 0, (size_t)n * sizeof(float));
}

void cpu_zero(struct workers *w, float *y, int64_t n)
{
    each(w, (struct act_job){ .run = run_zero, .y = y, .n = n });
}

static void run_widen(const struct act_job *t, int64_t i, int64_t n)
{
    for (int64_t j = i; j < i + n; j++)
        t->y[j] = bf16_to_f32(t->half[j]);
}

void cpu_widen(struct workers *w, float *y, const uint16_t *x, int64_t n)
{
    each(w, (struct act_job){ .run = run_widen, .y = y, .half = x, .n = n });
}
