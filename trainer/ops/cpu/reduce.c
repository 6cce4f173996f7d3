/* reduce: sums that depend on no thread count and on no cut at multiples of 1,024: f64 over aligned blocks, then a
 * dyadic tree. And where the first number is that is none. */
#include "trainer/ops/cpu/cpu.h"

struct sum_job {
    const struct isa *isa;
    const float *x;
    double *out;
    int64_t n;
    bool squared;
};

enum { BLOCKS = 16 }; /* of a task */

static void sum_blocks(void *arg, size_t index)
{
    const struct sum_job *t = arg;
    int64_t first = (int64_t)index * BLOCKS, last = min64(first + BLOCKS, (int64_t)task_count(t->n, SUM_BLOCK));
    for (int64_t b = first; b < last; b++)
        t->out[b] = t->isa->sum(t->x + b * SUM_BLOCK, t->squared, min64(SUM_BLOCK, t->n - b * SUM_BLOCK));
}

void block_sums(struct workers *w, const float *x, int64_t n, bool squared, double *out)
{
    struct sum_job t = { isa_best(), x, out, n, squared };
    workers_for(w, task_count(n, (int64_t)SUM_BLOCK * BLOCKS), sum_blocks, &t);
}

double tree_sum(double *s, int64_t n)
{
    if (n == 0)
        return 0;
    for (; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n / 2; i++)
            s[i] = s[2 * i] + s[2 * i + 1];
        if (n % 2)
            s[n / 2] = s[n - 1];
    }
    return s[0];
}

void cpu_adds(struct workers *w, double *v, const struct add *a, uint32_t n)
{
    (void)w;
    for (uint32_t k = 0; k < n; k++) {
        double s[ADD_MOST];
        for (uint32_t i = 0; i < a[k].count; i++)
            s[i] = v[(uint32_t)(a[k].from + i * a[k].step)];
        v[a[k].to] = tree_sum(s, a[k].count);
    }
}

void cpu_add_rounds(struct workers *w, double *v, const struct add *a, const uint32_t *begin, uint32_t rounds)
{
    cpu_adds(w, v, a + begin[0], begin[rounds] - begin[0]);
}

void cpu_clip(struct workers *w, struct clipped *c, const double *squares, double clip)
{
    (void)w;
    *c = clip_squares(clip, *squares);
}

void cpu_sum(struct workers *w, float *y, const float *x, int64_t n, double *partial)
{
    block_sums(w, x, n, false, partial);
    *y = (float)tree_sum(partial, (int64_t)task_count(n, SUM_BLOCK));
}

/* A NaN or an infinity has an exponent of ones. */
static bool any_nonfinite(const float *x, int64_t n)
{
    const uint32_t ones = 0x7f800000;
    uint32_t found = 0, bits;
    for (int64_t i = 0; i < n; i++) {
        memcpy(&bits, x + i, sizeof bits);
        found |= (bits & ones) == ones;
    }
    return found;
}

void cpu_find_nonfinite(struct workers *w, int64_t *first, struct array array, int64_t n)
{
    const float *x = array.at;
    int64_t i = 0;
    (void)w;
    while (i < n && !any_nonfinite(x + i, min64(SUM_BLOCK, n - i)))
        i += SUM_BLOCK;
    while (i < n && !any_nonfinite(x + i, 1))
        i++;
    *first = min64(i, n);
}
