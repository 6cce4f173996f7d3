/* embed: rows of a table by id. The gradient adds tokens in order: tasks are runs of columns, each walks all tokens. */
#include "trainer/ops/cpu/cpu.h"

#include <string.h>

struct embed_job {
    const struct isa *isa;
    float *out; /* y or dtable */
    const void *table;
    enum dtype dtype;
    const float *dy;
    const int32_t *id;
    int64_t n, c, each;
};

static void gather(void *arg, size_t index)
{
    const struct embed_job *t = arg;
    int64_t first = (int64_t)index * t->each, last = min64(first + t->each, t->n);
    for (int64_t i = first; i < last; i++) {
        float *y = t->out + i * t->c;
        int64_t from = t->id[i] * t->c;
        if (from < 0)
            memset(y, 0, (size_t)t->c * sizeof(float));
        else if (t->dtype == DTYPE_BF16)
            for (int64_t j = 0; j < t->c; j++)
                y[j] = bf16_to_f32(((const uint16_t *)t->table)[from + j]);
        else
            memcpy(y, (const float *)t->table + from, (size_t)t->c * sizeof(float));
    }
}

void cpu_embedding(struct workers *w, float *y, const void *table, enum dtype t, const int32_t *id, int64_t n,
                   int64_t c)
{
    struct embed_job job = { .out = y, .table = table, .dtype = t, .id = id, .n = n, .c = c, .each = task_rows(c) };
    workers_for(w, task_count(n, job.each), gather, &job);
}

static void scatter(void *arg, size_t index)
{
    const struct embed_job *t = arg;
    int64_t j = (int64_t)index * t->each, cols = min64(t->each, t->c - j);
    for (int64_t i = 0; i < t->n; i++) {
        float *row = t->out + t->id[i] * t->c + j;
        if (t->id[i] >= 0)
            t->isa->add(row, row, t->dy + i * t->c + j, cols);
    }
}

void cpu_embedding_bwd(struct workers *w, float *dtable, const float *dy, const int32_t *id, int64_t n, int64_t c)
{
    struct embed_job job = { .isa = isa_best(), .out = dtable, .dy = dy, .id = id, .n = n, .c = c, .each = 64 };
    workers_for(w, task_count(c, job.each), scatter, &job);
}
