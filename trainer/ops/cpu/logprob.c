/* logprob: log-probabilities of given tokens under softmax(x w^T / temperature), a chunk of scored tokens at a time, so
 * that logits [tokens, vocabulary] exist only where they are few. Backward makes a chunk's logits again from the same
 * chains, if it cannot keep them.
 *
 * A token's logits are GEMM chains and its sum runs over its own row: its bits do not depend on which chunk it falls
 * in. The weight's gradient gets one chain a chunk. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

/* The next scored tokens, at most a chunk, gathered into p->rows; returns how many. *next moves on. */
static int64_t gather(const struct logprob *p, int64_t *next)
{
    int64_t count = 0;
    for (; *next < p->n && count < p->chunk; ++*next) {
        if (p->target[*next] < 0)
            continue;
        memcpy(p->rows + count * p->c, (const float *)p->x + *next * p->c, (size_t)p->c * sizeof(float));
        p->index[count++] = (int32_t)*next;
    }
    return count;
}

static void chunk_logits(struct workers *w, const struct logprob *p, int64_t count)
{
    cpu_gemm(w, &(struct gemm){ .m = count,
                                .n = p->v,
                                .k = p->c,
                                .a = p->rows,
                                .lda = p->c,
                                .b = p->w,
                                .b_dtype = p->w_dtype,
                                .ldb = p->c,
                                .b_trans = true,
                                .c = p->logits,
                                .ldc = p->v,
                                .bf16 = p->bf16 });
}

struct row_job {
    const struct isa *isa;
    const struct logprob *p;
};

/* The smallest index of the largest logit? */
static bool is_top(const float *logit, int32_t target, float most)
{
    for (int32_t v = 0; v < target && logit[target] == most; v++)
        if (logit[v] == most)
            return false;
    return logit[target] == most;
}

/* Sums over u = z - most (isa.h) to what they say; returns log-sum-exp of u. */
static double put_stats(const struct row_job *t, const float *logit, int64_t token, float inverse, float raw_most)
{
    const struct logprob *p = t->p;
    double sum[3];
    t->isa->exp_sums_wide(logit, inverse, raw_most * inverse, p->v, sum);
    double log_sum = log(sum[0]);
    p->stats.entropy[token] = (float)(log_sum - sum[1] / sum[0]);
    p->stats.logit[token] = (float)(t->isa->sum(logit, false, p->v) / (double)p->v * (double)inverse);
    p->stats.log_square[token] = (float)(log(sum[2]) - 2 * log_sum);
    p->stats.top[token] = is_top(logit, p->target[token], raw_most);
    return log_sum;
}

/* One part of the vocabulary's. */
static void score_part(void *arg, size_t i)
{
    const struct row_job *t = arg;
    const struct logprob *p = t->p;
    const float *logit = p->logits + (int64_t)i * p->v;
    int64_t token = p->index[i], at = p->target[token] - p->first;
    struct logprob_part *part = p->part + (int64_t)p->own * p->n + token;
    float inverse = 1.0f / p->temperature, raw = t->isa->max(logit, p->v);
    part->raw = raw;
    part->target = at >= 0 && at < p->v ? logit[at] : -INFINITY;
    if (!p->stats.entropy) {
        part->sum[0] = t->isa->exp_sum_wide(logit, inverse, raw * inverse, p->v);
        return;
    }
    t->isa->exp_sums_wide(logit, inverse, raw * inverse, p->v, part->sum);
    part->total = t->isa->sum(logit, false, p->v);
    for (part->top = 0; part->top < p->v - 1 && logit[part->top] != raw;)
        part->top++;
    part->top += p->first;
}

/* All parts of a token, in order: sums around the largest maximum. */
static void merge_row(const struct logprob *p, int64_t token)
{
    float inverse = 1.0f / p->temperature, raw = -INFINITY, target = -INFINITY;
    int64_t top = -1;
    double sum[3] = { 0 }, total = 0;
    const struct logprob_part *part = p->part + token;
    for (int r = 0; r < p->parts; r++) {
        const struct logprob_part *q = part + (int64_t)r * p->n;
        top = q->raw > raw ? q->top : top;
        raw = q->raw > raw ? q->raw : raw;
        target = q->target > target ? q->target : target;
    }
    double most = (double)(raw * inverse);
    for (int r = 0; r < p->parts; r++) {
        const struct logprob_part *q = part + (int64_t)r * p->n;
        double below = (double)(q->raw * inverse) - most, scale = exp(below);
        sum[0] += scale * q->sum[0];
        sum[1] += scale * (q->sum[1] + below * q->sum[0]);
        sum[2] += scale * scale * q->sum[2];
        total += q->total;
    }
    double log_sum = log(sum[0]);
    p->lse[token] = (float)(most + log_sum);
    p->logp[token] = (float)((double)(target * inverse) - (most + log_sum));
    if (!p->stats.entropy)
        return;
    p->stats.entropy[token] = (float)(log_sum - sum[1] / sum[0]);
    p->stats.logit[token] = (float)(total / (double)p->vocab * (double)inverse);
    p->stats.log_square[token] = (float)(log(sum[2]) - 2 * log_sum);
    p->stats.top[token] = top == p->target[token];
}

enum { MERGE_ROWS = 64 };

static void merge_rows(void *arg, size_t i)
{
    const struct logprob *p = ((const struct row_job *)arg)->p;
    int64_t first = (int64_t)i * MERGE_ROWS, last = min64(first + MERGE_ROWS, p->n);
    for (int64_t n = first; n < last; n++)
        if (p->target[n] >= 0)
            merge_row(p, n);
}

void cpu_logprob_merge(struct workers *w, const struct logprob *p)
{
    struct row_job t = { isa_best(), p };
    workers_for(w, task_count(p->n, MERGE_ROWS), merge_rows, &t);
}

static void score_row(void *arg, size_t i)
{
    const struct row_job *t = arg;
    const struct logprob *p = t->p;
    const float *logit = p->logits + (int64_t)i * p->v;
    int64_t token = p->index[i];
    float inverse = 1.0f / p->temperature, raw = t->isa->max(logit, p->v), most = raw * inverse;
    double lse = (double)most + (p->stats.entropy ? put_stats(t, logit, token, inverse, raw)
                                                  : log(t->isa->exp_sum_wide(logit, inverse, most, p->v)));
    p->lse[token] = (float)lse;
    p->logp[token] = (float)((double)(logit[p->target[token]] * inverse) - lse);
}

void cpu_logprob(struct workers *w, const struct logprob *p)
{
    struct row_job t = { isa_best(), p };
    memset(p->logp, 0, (size_t)p->n * sizeof(float));
    memset(p->lse, 0, (size_t)p->n * sizeof(float));
    if (p->part)
        memset(p->part + (int64_t)p->own * p->n, 0, (size_t)p->n * sizeof *p->part);
    float *const stats[] = { p->stats.entropy, p->stats.logit, p->stats.log_square, p->stats.top };
    for (size_t i = 0; p->stats.entropy && i < sizeof stats / sizeof stats[0]; i++)
        memset(stats[i], 0, (size_t)p->n * sizeof(float));
    for (int64_t next = 0, count; (count = gather(p, &next)) > 0;) {
        chunk_logits(w, p, count);
        workers_for(w, (size_t)count, p->part ? score_part : score_row, &t);
    }
    if (p->kept)
        *p->kept = LOGPROB_LOGITS;
}

/* logits become their gradients: dlogp (1{target} - softmax) / temperature. */
static void score_row_bwd(void *arg, size_t i)
{
    const struct row_job *t = arg;
    const struct logprob *p = t->p;
    float *logit = p->logits + (int64_t)i * p->v;
    int64_t token = p->index[i], at = p->target[token] - p->first;
    float inverse = 1.0f / p->temperature, g = p->dlogp[token] * inverse;
    t->isa->exp_scaled(logit, inverse, p->lse[token], -g, p->v);
    if (at >= 0 && at < p->v)
        logit[at] += g;
}

void cpu_logprob_bwd(struct workers *w, const struct logprob *p)
{
    struct row_job t = { isa_best(), p };
    for (int64_t next = 0, count; (count = gather(p, &next)) > 0;) {
        if (!p->kept || *p->kept == LOGPROB_NOTHING)
            chunk_logits(w, p, count);
        if (!p->kept || *p->kept != LOGPROB_GRADIENTS)
            workers_for(w, (size_t)count, score_row_bwd, &t);
        if (p->kept)
            *p->kept = LOGPROB_GRADIENTS;
        if (p->dx) {
            cpu_gemm(w, &(struct gemm){ .m = count,
                                        .n = p->c,
                                        .k = p->v,
                                        .a = p->logits,
                                        .lda = p->v,
                                        .b = p->w,
                                        .b_dtype = p->w_dtype,
                                        .ldb = p->c,
                                        .c = p->drows,
                                        .ldc = p->c,
                                        .bf16 = p->bf16 });
            for (int64_t i = 0; i < count; i++)
                t.isa->add(p->dx + p->index[i] * p->c, p->dx + p->index[i] * p->c, p->drows + i * p->c, p->c);
        }
        if (p->dw)
            cpu_gemm(w, &(struct gemm){ .m = p->v,
                                        .n = p->c,
                                        .k = count,
                                        .a = p->logits,
                                        .lda = p->v,
                                        .a_trans = true,
                                        .b = p->rows,
                                        .b_dtype = DTYPE_F32,
                                        .ldb = p->c,
                                        .c = p->dw,
                                        .ldc = p->c,
                                        .add = true,
                                        .bf16 = p->bf16 });
    }
}
