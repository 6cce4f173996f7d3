/* round: f32 to bf16, to nearest or by draws; and rows from one stride to another. */
#include "comm/base/rng.h"
#include "trainer/ops/cpu/cpu.h"

struct round_job {
    uint16_t *half;
    float *y;
    const float *x;
    const struct rounding *how;
    int64_t n;
};

static void narrow_task(void *arg, size_t index)
{
    const struct round_job *t = arg;
    int64_t first = (int64_t)index * TASK_ELEMS, end = min64(first + TASK_ELEMS, t->n);
    for (int64_t i = first; i < end; i++)
        t->half[i] = bf16_from_f32(t->x[i]);
}

void cpu_narrow(struct workers *w, uint16_t *y, const float *x, int64_t n)
{
    struct round_job t = { .half = y, .x = x, .n = n };
    workers_for(w, task_count(n, TASK_ELEMS), narrow_task, &t);
}

static void low_task(void *arg, size_t index)
{
    const struct round_job *t = arg;
    int64_t first = (int64_t)index * TASK_ELEMS, end = min64(first + TASK_ELEMS, t->n);
    for (int64_t i = first; i < end; i++)
        t->y[i] = bf16_to_f32(bf16_from_f32(t->y[i]));
}

void cpu_round_low(struct workers *w, float *x, int64_t n)
{
    struct round_job t = { .y = x, .n = n };
    workers_for(w, task_count(n, TASK_ELEMS), low_task, &t);
}

/* x, up or down: the chance of the larger magnitude is how much of the way x has gone to it. */
static uint16_t round_by(float x, uint32_t draw)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) == 0x7f800000u) /* no number, or infinite */
        return bf16_from_f32(x);
    return (uint16_t)((bits + (draw & 0xffffu)) >> 16);
}

static uint64_t place_of(const struct rounding *r, uint64_t e)
{
    uint64_t at = 0, stride = 1;
    for (int i = r->ndim - 1; i >= 0; i--) {
        at += (r->off[i] + (i ? e % r->len[i] : e)) * stride;
        e /= i ? r->len[i] : 1;
        stride *= r->dim[i];
    }
    return at;
}

enum { DRAWS = 256 };

/* Of a row, whose elements are neighbours in the whole tensor, at once. */
static void drawn_task(void *arg, size_t index)
{
    const struct round_job *t = arg;
    const struct rounding *r = t->how;
    int64_t i = (int64_t)index * TASK_ELEMS, end = min64(i + TASK_ELEMS, t->n);
    for (int64_t n; i < end; i += n) {
        uint32_t draw[DRAWS];
        uint64_t e = r->first + (uint64_t)i, left = (uint64_t)min64(end - i, DRAWS);
        uint64_t row = r->ndim > 1 ? r->len[r->ndim - 1] - e % r->len[r->ndim - 1] : left;
        n = (int64_t)(row < left ? row : left);
        rng_u32s(r->at, place_of(r, e), (size_t)n, draw);
        for (int64_t k = 0; k < n; k++)
            t->half[i + k] = round_by(t->x[i + k], draw[k]);
    }
}

void cpu_narrow_drawn(struct workers *w, uint16_t *y, const float *x, int64_t n, const struct rounding *how)
{
    struct rounding joined = rounding_joined(how);
    struct round_job t = { .half = y, .x = x, .how = &joined, .n = n };
    workers_for(w, task_count(n, TASK_ELEMS), drawn_task, &t);
}

struct rows_job {
    float *y;
    const float *x;
    int64_t ldy, ldx, n, c, each;
    bool add;
};

static void rows_task(void *arg, size_t index)
{
    const struct rows_job *t = arg;
    int64_t first = (int64_t)index * t->each, end = min64(first + t->each, t->n);
    for (int64_t i = first; i < end; i++) {
        float *y = t->y + i * t->ldy;
        const float *x = t->x + i * t->ldx;
        if (!t->add)
            memcpy(y, x, (size_t)t->c * sizeof *y);
        for (int64_t j = 0; t->add && j < t->c; j++)
            y[j] += x[j];
    }
}

void cpu_copy_rows(struct workers *w, float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, int64_t c,
                   bool add)
{
    struct rows_job t = { y, x, ldy, ldx, n, c, task_rows(c), add };
    workers_for(w, c > 0 ? task_count(n, t.each) : 0, rows_task, &t);
}
