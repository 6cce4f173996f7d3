/* columns: parts of rows are put side by side, with the heads of a token, and taken apart again. */
#include "trainer/ops/cpu/cpu.h"

struct columns_job {
    const struct column_copy *c;
    int64_t each;
};

/* Of one token, into the row of head h, or of all. */
static void one_row(const struct column_copy *c, int64_t i, int64_t h)
{
    const float *x = c->x ? c->x + i * c->x_token + h * c->x_head : NULL;
    float *y = c->y + i * c->y_token + h * c->y_head;
    int64_t heads = c->y_head ? 1 : c->heads;
    if (x && heads == 1 && !c->add && c->x_step == 1 && c->y_step == 1) {
        memcpy(y, x, (size_t)c->count * sizeof *y);
        return;
    }
    for (int64_t j = 0; j < c->count; j++) {
        float sum = 0;
        for (int64_t k = 0; x && k < heads; k++)
            sum += x[k * c->x_head + j * c->x_step];
        y[j * c->y_step] = c->add ? y[j * c->y_step] + sum : sum;
    }
}

static void some_tokens(void *arg, size_t index)
{
    const struct columns_job *job = arg;
    const struct column_copy *c = job->c;
    int64_t first = (int64_t)index * job->each, last = min64(first + job->each, c->n);
    for (int64_t i = first; i < last; i++)
        for (int64_t h = 0; h < (c->y_head ? c->heads : 1); h++)
            one_row(c, i, h);
}

void cpu_columns(struct workers *w, const struct column_copy *c)
{
    struct columns_job job = { c, task_rows(c->heads * c->count) };
    workers_for(w, task_count(c->n, job.each), some_tokens, &job);
}
