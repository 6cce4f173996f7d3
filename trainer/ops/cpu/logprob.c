/* logprob: log-probabilities of given tokens under softmax(x w^T / temperature), a chunk of scored tokens at a time, so
 * that logits [tokens, vocabulary] never exist. Backward makes a chunk's logits again from the same chains.
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
        memcpy(p->rows + count * p->c, p->x + *next * p->c, (size_t)p->c * sizeof(float));
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
                                .ldc = p->v });
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
    float *const stats[] = { p->stats.entropy, p->stats.logit, p->stats.log_square, p->stats.top };
    for (size_t i = 0; p->stats.entropy && i < sizeof stats / sizeof stats[0]; i++)
        memset(stats[i], 0, (size_t)p->n * sizeof(float));
    for (int64_t next = 0, count; (count = gather(p, &next)) > 0;) {
        chunk_logits(w, p, count);
        workers_for(w, (size_t)count, score_row, &t);
    }
}

/* logits become their gradients: dlogp (1{target} - softmax) / temperature. */
static void score_row_bwd(void *arg, size_t i)
{
    const struct row_job *t = arg;
    const struct logprob *p = t->p;
    float *logit = p->logits + (int64_t)i * p->v;
    int64_t token = p->index[i];
    float inverse = 1.0f / p->temperature, g = p->dlogp[token] * inverse;
    t->isa->exp_scaled(logit, inverse, p->lse[token], -g, p->v);
    logit[p->target[token]] += g;
}

void cpu_logprob_bwd(struct workers *w, const struct logprob *p)
{
    struct row_job t = { isa_best(), p };
    for (int64_t next = 0, count; (count = gather(p, &next)) > 0;) {
        chunk_logits(w, p, count);
        workers_for(w, (size_t)count, score_row_bwd, &t);
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
                                        .ldc = p->c });
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
                                        .add = true });
    }
}
