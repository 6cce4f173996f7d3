/* rope: rotary embedding, half-split form. Angles are taken once for all layers of a pass (rope_table), in f64. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

struct rope_job {
    const struct isa *isa;
    float *y, *table;
    const float *x, *angles;
    const int32_t *position;
    int64_t n, h, d, each;
    const double *frequency;
    double amplitude;
    float sign;
    bool add;
};

static void table_rows(void *arg, size_t index)
{
    const struct rope_job *t = arg;
    int64_t half = t->d / 2, first = (int64_t)index * t->each, last = min64(first + t->each, t->n);
    for (int64_t j = 0; j < half; j++) {
        for (int64_t i = first; i < last; i++) {
            double a = (double)t->position[i] * t->frequency[j];
            t->table[i * t->d + j] = (float)(t->amplitude * cos(a));
            t->table[i * t->d + half + j] = (float)(t->amplitude * sin(a));
        }
    }
}

void cpu_rope_table(struct workers *w, float *table, const int32_t *position, int64_t n, int64_t d,
                    const double *frequency, double amplitude)
{
    struct rope_job t = {
        .table = table, .position = position, .n = n, .d = d, .each = 64, .frequency = frequency, .amplitude = amplitude
    };
    workers_for(w, task_count(n, t.each), table_rows, &t);
}

static void rotate_rows(void *arg, size_t index)
{
    const struct rope_job *t = arg;
    int64_t first = (int64_t)index * t->each, last = min64(first + t->each, t->n);
    for (int64_t i = first; i < last; i++)
        for (int64_t j = i * t->h; j < (i + 1) * t->h; j++)
            t->isa->rotate(t->y + j * t->d, t->x + j * t->d, t->angles + i * t->d, t->sign, t->add, t->d / 2);
}

static void rotate(struct workers *w, float *y, const float *x, const float *table, int64_t n, int64_t h, int64_t d,
                   float sign, bool add)
{
    struct rope_job t = {
        .isa = isa_best(), .y = y, .x = x, .angles = table, .n = n, .h = h, .d = d, .sign = sign, .add = add
    };
    t.each = task_rows(h * d);
    workers_for(w, task_count(n, t.each), rotate_rows, &t);
}

void cpu_rope(struct workers *w, struct array y, struct array x, const float *table, int64_t n, int64_t h, int64_t d)
{
    rotate(w, y.at, x.at, table, n, h, d, 1.0f, false);
}

/* A rotation's gradient is turned back by the same angle (and times the same amplitude: the transposed matrix). */
void cpu_rope_bwd(struct workers *w, struct array dx, struct array dy, const float *table, int64_t n, int64_t h,
                  int64_t d)
{
    rotate(w, dx.at, dy.at, table, n, h, d, -1.0f, true);
}
