/* logprob: log-probabilities of given tokens under softmax(x w^T / temperature), a chunk of tokens at a time, so that
 * logits [tokens, vocabulary] exist only where they are few. A block takes a token's row; sums over it are f64.
 *
 * How many tokens are scored is not known to the host, so chunks are of all tokens: those without a target cost their
 * products here, and what comes of them is not looked at, or is 0. Nothing is gathered; `rows`, `drows` and `index` are
 * not used. */
#include "trainer/ops/cuda/gpu.h"

#include <limits.h>

namespace
{
struct row_room {
    double sum[WARPS];
    int64_t first[WARPS];
    float most[WARPS];
};

__device__ float block_max(float x, float *room)
{
    x = warp_max(x);
    if (threadIdx.x % WARP == 0)
        room[threadIdx.x / WARP] = x;
    __syncthreads();
    x = room[0];
    for (int i = 1; i < WARPS; i++)
        x = fmaxf(x, room[i]);
    return x;
}

__device__ int64_t block_min(int64_t x, int64_t *room)
{
    for (int step = WARP / 2; step; step /= 2)
        x = min_of(x, __shfl_xor_sync(0xffffffffu, x, step));
    if (threadIdx.x % WARP == 0)
        room[threadIdx.x / WARP] = x;
    __syncthreads();
    x = room[0];
    for (int i = 1; i < WARPS; i++)
        x = min_of(x, room[i]);
    return x;
}

/* What a row of logits says of token n (struct logprob_part), on all threads; stats: all of it. */
__device__ struct logprob_part read_row(const struct logprob &p, const float *logit, int64_t n, bool stats,
                                        struct row_room &s)
{
    struct logprob_part part = {};
    float inverse = 1.0f / p.temperature, most = -INFINITY;
    for (int64_t v = threadIdx.x; v < p.v; v += BLOCK)
        most = fmaxf(most, logit[v]);
    part.raw = block_max(most, s.most);
    double sum[3] = {}, total = 0;
    int64_t first = LONG_MAX, at = p.target[n] - p.first;
    for (int64_t v = threadIdx.x; v < p.v; v += BLOCK) {
        float u = logit[v] * inverse - part.raw * inverse;
        double e = (double)expf(u);
        sum[0] += e;
        if (!stats)
            continue;
        sum[1] += e * (double)u;
        sum[2] += e * e;
        total += (double)logit[v];
        if (logit[v] == part.raw && v < first)
            first = v;
    }
    part.sum[0] = block_sum(sum[0], s.sum);
    part.target = at >= 0 && at < p.v ? logit[at] : -INFINITY;
    if (!stats)
        return part;
    part.sum[1] = block_sum(sum[1], s.sum);
    part.sum[2] = block_sum(sum[2], s.sum);
    part.total = block_sum(total, s.sum);
    part.top = p.first + block_min(first, s.first);
    return part;
}

/* A token's outputs from its whole row, in parts or not: sums around the largest maximum. */
__device__ void put_token(const struct logprob &p, int64_t n, const struct logprob_part *part, int parts, int64_t step)
{
    float inverse = 1.0f / p.temperature, raw = -INFINITY, target = -INFINITY;
    int64_t top = -1;
    double sum[3] = {}, total = 0;
    for (int r = 0; r < parts; r++) {
        const struct logprob_part &q = part[r * step];
        top = q.raw > raw ? q.top : top;
        raw = q.raw > raw ? q.raw : raw;
        target = q.target > target ? q.target : target;
    }
    double most = (double)(raw * inverse);
    for (int r = 0; r < parts; r++) {
        const struct logprob_part &q = part[r * step];
        double below = (double)(q.raw * inverse) - most, scale = exp(below);
        sum[0] += scale * q.sum[0];
        sum[1] += scale * (q.sum[1] + below * q.sum[0]);
        sum[2] += scale * scale * q.sum[2];
        total += q.total;
    }
    double log_sum = log(sum[0]);
    p.lse[n] = (float)(most + log_sum);
    p.logp[n] = (float)((double)(target * inverse) - (most + log_sum));
    if (!p.stats.entropy)
        return;
    p.stats.entropy[n] = (float)(log_sum - sum[1] / sum[0]);
    p.stats.logit[n] = (float)(total / (double)p.vocab * (double)inverse);
    p.stats.log_square[n] = (float)(log(sum[2]) - 2 * log_sum);
    p.stats.top[n] = top == p.target[n] ? 1.0f : 0.0f;
}

__device__ void put_nothing(const struct logprob &p, int64_t n)
{
    p.lse[n] = 0;
    p.logp[n] = 0;
    if (p.stats.entropy) {
        p.stats.entropy[n] = 0;
        p.stats.logit[n] = 0;
        p.stats.log_square[n] = 0;
        p.stats.top[n] = 0;
    }
}

/* Tokens [first, ...) have the rows of p.logits. */
__global__ void score(struct logprob p, int64_t first)
{
    SHARED(struct row_room, s);
    int64_t n = first + blockIdx.x;
    struct logprob_part part = {};
    if (p.target[n] >= 0)
        part = read_row(p, p.logits + (int64_t)blockIdx.x * p.v, n, p.stats.entropy != NULL, s);
    if (threadIdx.x > 0)
        return;
    if (p.part)
        p.part[(int64_t)p.own * p.n + n] = part;
    if (p.part || p.target[n] < 0)
        put_nothing(p, n);
    else
        put_token(p, n, &part, 1, 0);
}

__global__ void merge(struct logprob p)
{
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < p.n && p.target[n] >= 0)
        put_token(p, n, p.part + n, p.parts, p.n);
}

/* Logits become their gradients: dlogp (1{target} - softmax) / temperature. */
__global__ void score_bwd(struct logprob p, int64_t first)
{
    int64_t n = first + blockIdx.x, at = p.target[n] - p.first;
    float *logit = p.logits + (int64_t)blockIdx.x * p.v;
    float inverse = 1.0f / p.temperature, g = p.dlogp[n] * inverse, lse = p.lse[n];
    bool scored = p.target[n] >= 0;
    for (int64_t v = threadIdx.x; v < p.v; v += BLOCK)
        logit[v] = scored ? (v == at ? g : 0.0f) - g * expf(logit[v] * inverse - lse) : 0.0f;
}

const void *rows_of(const struct logprob *p, int64_t first)
{
    struct array x = { const_cast<void *>(p->x), p->x_low, false };
    return moved(x, first * p->c).at;
}

void chunk_logits(struct workers *w, const struct logprob *p, int64_t first, int64_t count)
{
    struct gemm g = {};
    g.m = count;
    g.n = p->v;
    g.k = p->c;
    g.a = rows_of(p, first);
    g.a_low = p->x_low;
    g.lda = p->c;
    g.b = p->w;
    g.b_dtype = p->w_dtype;
    g.ldb = p->c;
    g.b_trans = true;
    g.c = p->logits;
    g.ldc = p->v;
    g.bf16 = p->bf16;
    gpu_gemm(w, &g);
}

/* dx += dlogits w;  dw += dlogits^T x */
void chunk_gradients(struct workers *w, const struct logprob *p, int64_t first, int64_t count)
{
    struct gemm g = {};
    g.a = p->logits;
    g.lda = p->v;
    g.n = p->c;
    g.ldb = p->c;
    g.ldc = p->c;
    g.add = true;
    g.bf16 = p->bf16;
    if (p->dx) {
        g.m = count;
        g.k = p->v;
        g.b = p->w;
        g.b_dtype = p->w_dtype;
        g.c = p->dx + first * p->c;
        gpu_gemm(w, &g);
    }
    if (p->dw) {
        g.m = p->v;
        g.k = count;
        g.a_trans = true;
        g.b = rows_of(p, first);
        g.b_dtype = p->x_low ? DTYPE_BF16 : DTYPE_F32;
        g.c = p->dw;
        gpu_gemm(w, &g);
    }
}

int64_t chunk_at(const struct logprob *p, int64_t first)
{
    return p->n - first < p->chunk ? p->n - first : p->chunk;
}
} // namespace

void gpu_logprob(struct workers *w, const struct logprob *p)
{
    struct logprob whole = *p;
    whole.vocab = p->part ? p->vocab : p->v;
    for (int64_t first = 0; first < p->n; first += p->chunk) {
        int64_t count = chunk_at(p, first);
        chunk_logits(w, p, first, count);
        launch(w, "logprob", score, (unsigned)count, BLOCK, sizeof(struct row_room), whole, first);
    }
    if (p->kept)
        *p->kept = LOGPROB_LOGITS;
}

void gpu_logprob_merge(struct workers *w, const struct logprob *p)
{
    launch(w, "logprob_merge", merge, gpu_blocks(p->n, BLOCK), BLOCK, 0, *p);
}

void gpu_logprob_bwd(struct workers *w, const struct logprob *p)
{
    for (int64_t first = 0; first < p->n; first += p->chunk) {
        int64_t count = chunk_at(p, first);
        if (!p->kept || *p->kept == LOGPROB_NOTHING)
            chunk_logits(w, p, first, count);
        if (!p->kept || *p->kept != LOGPROB_GRADIENTS)
            launch(w, "logprob_bwd", score_bwd, (unsigned)count, BLOCK, 0, *p, first);
        if (p->kept)
            *p->kept = LOGPROB_GRADIENTS;
        chunk_gradients(w, p, first, count);
    }
}
