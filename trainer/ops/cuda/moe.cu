/* moe: which experts a token takes, a warp a token, scores in f64 and rounded once; the order of experts, which is that
 * of a stable counting sort, and their loads; and the sum of what they make. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { TOKENS = 4, ROUTE_BLOCK = TOKENS * WARP }; /* of a block */

struct route_args {
    int64_t n;
    struct router how;
    const float *z, *bias;
    bool given;
    float *score, *weight;
    int32_t *expert;
    const float *dweight, *dshare;
    float *dz;
};

struct route_args args_of(const struct route *r)
{
    struct route_args t = {};
    t.n = r->n;
    t.how = *r->how;
    t.z = r->z;
    t.bias = r->bias;
    t.given = r->given;
    t.score = r->score;
    t.weight = r->weight;
    t.expert = r->expert;
    t.dweight = r->dweight;
    t.dshare = r->dshare;
    t.dz = r->dz;
    return t;
}

struct token_room {
    float value[EXPERTS_MAX], rank[EXPERTS_MAX];
    bool chosen[EXPERTS_MAX];
};
struct route_room {
    struct token_room token[TOKENS];
};
struct back_room {
    double ds[TOKENS][EXPERTS_MAX];
};

__device__ void scores_of(const struct router &how, const float *z, float *s)
{
    int64_t lane = threadIdx.x % WARP;
    float most = -INFINITY;
    double sum = 0;
    for (int64_t e = lane; !how.sigmoid && e < how.experts; e += WARP)
        most = fmaxf(most, z[e]);
    most = warp_max(most);
    for (int64_t e = lane; !how.sigmoid && e < how.experts; e += WARP)
        sum += exp((double)z[e] - (double)most);
    sum = warp_sum(sum);
    for (int64_t e = lane; e < how.experts; e += WARP)
        s[e] = (float)(how.sigmoid ? 1 / (1 + exp(-(double)z[e])) : exp((double)z[e] - (double)most) / sum);
}

/* The largest of value[0, n) that is not taken, on all lanes; it is then. The smallest index among equal ones; NaN is
 * below all. `taken` has the lane's own: bit k is index lane + 32 k. */
__device__ int take_largest(const float *value, unsigned *taken, int64_t n)
{
    int lane = (int)threadIdx.x % WARP, at = EXPERTS_MAX;
    float best = -INFINITY;
    for (int i = lane; i < n; i += WARP)
        if (!(*taken >> (i / WARP) & 1u) && (at == EXPERTS_MAX || value[i] > best)) {
            best = value[i] == value[i] ? value[i] : -INFINITY;
            at = i;
        }
    for (int step = WARP / 2; step; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, best, step);
        int its = __shfl_xor_sync(0xffffffffu, at, step);
        if (other > best || (other == best && its < at)) {
            best = other;
            at = its;
        }
    }
    if (at % WARP == lane)
        *taken |= 1u << (at / WARP);
    return at;
}

/* The rank of a group of n experts, by one lane. */
__device__ float group_rank(const struct router &how, const float *value, int64_t n)
{
    float first = value[0], second = -INFINITY;
    for (int64_t i = 1; i < n; i++) {
        second = value[i] > first ? first : value[i] > second ? value[i] : second;
        first = value[i] > first ? value[i] : first;
    }
    return how.sigmoid && n > 1 ? first + second : first;
}

/* Experts of all but the best groups are taken. */
__device__ unsigned limit_groups(const struct router &how, struct token_room &s)
{
    int lane = (int)threadIdx.x % WARP;
    int64_t each = how.experts / how.groups;
    unsigned taken = 0, groups = 0;
    for (int64_t g = lane; g < how.groups; g += WARP) {
        s.rank[g] = group_rank(how, s.value + g * each, each);
        s.chosen[g] = false;
    }
    __syncwarp();
    for (int64_t i = 0; i < how.top_groups; i++) {
        int g = take_largest(s.rank, &groups, how.groups);
        if (lane == 0)
            s.chosen[g] = true;
    }
    __syncwarp();
    for (int64_t e = lane; e < how.experts; e += WARP)
        taken |= (unsigned)!s.chosen[e / each] << (e / WARP);
    return taken;
}

__device__ void choose(const struct route_args &r, const float *score, int32_t *expert, struct token_room &s)
{
    int lane = (int)threadIdx.x % WARP;
    for (int64_t e = lane; e < r.how.experts; e += WARP)
        s.value[e] = r.bias ? score[e] + r.bias[e] : score[e];
    __syncwarp();
    unsigned taken = r.how.groups > 1 ? limit_groups(r.how, s) : 0;
    for (int64_t j = 0; j < r.how.top; j++) {
        int e = take_largest(s.value, &taken, r.how.experts);
        if (lane == 0)
            expert[j] = e;
    }
    __syncwarp();
}

/* On all lanes. 1e-20 keeps what is divided by from being 0 (DeepSeek-V3's). */
__device__ double sum_of_chosen(const struct router &how, const float *s, const int32_t *expert)
{
    double sum = how.sigmoid ? 1e-20 : 0;
    for (int64_t j = 0; j < how.top; j++)
        sum += (double)s[expert[j]];
    return sum;
}

__global__ void route_tokens(struct route_args r)
{
    SHARED(struct route_room, s);
    int64_t n = (int64_t)blockIdx.x * TOKENS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= r.n)
        return;
    float *score = r.score + n * r.how.experts;
    int32_t *expert = r.expert + n * r.how.top;
    scores_of(r.how, r.z + n * r.how.experts, score);
    __syncwarp();
    if (!r.given)
        choose(r, score, expert, s.token[threadIdx.x / WARP]);
    double factor = (double)r.how.scale / (r.how.normalise ? sum_of_chosen(r.how, score, expert) : 1);
    for (int64_t j = lane; j < r.how.top; j += WARP)
        r.weight[n * r.how.top + j] = (float)(factor * (double)score[expert[j]]);
}

/* ds[e] of a token. */
__device__ void score_gradient(const struct route_args &r, const float *s, const int32_t *expert, const float *dweight,
                               double *ds)
{
    const struct router &how = r.how;
    int64_t lane = threadIdx.x % WARP;
    double sum = sum_of_chosen(how, s, expert), dot = 0, all = 0, mean = 0;
    for (int64_t e = lane; e < how.experts; e += WARP)
        ds[e] = r.dshare && !how.sigmoid ? (double)r.dshare[e] : 0;
    for (int64_t j = 0; how.normalise && j < how.top; j++)
        dot += (double)dweight[j] * (double)s[expert[j]];
    __syncwarp();
    for (int64_t j = 0; lane == 0 && j < how.top; j++)
        ds[expert[j]] +=
            (double)how.scale * (how.normalise ? ((double)dweight[j] - dot / sum) / sum : (double)dweight[j]);
    __syncwarp();
    if (!r.dshare || !how.sigmoid)
        return;
    for (int64_t e = lane; e < how.experts; e += WARP)
        all += (double)s[e];
    all = warp_sum(all); /* of shares s / all */
    for (int64_t e = lane; e < how.experts; e += WARP)
        mean += (double)r.dshare[e] * (double)s[e] / all;
    mean = warp_sum(mean);
    for (int64_t e = lane; e < how.experts; e += WARP)
        ds[e] += ((double)r.dshare[e] - mean) / all;
}

__global__ void route_back(struct route_args r)
{
    SHARED(struct back_room, room);
    int64_t n = (int64_t)blockIdx.x * TOKENS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= r.n)
        return;
    double *ds = room.ds[threadIdx.x / WARP], mean = 0;
    const float *s = r.score + n * r.how.experts;
    float *dz = r.dz + n * r.how.experts;
    score_gradient(r, s, r.expert + n * r.how.top, r.dweight + n * r.how.top, ds);
    for (int64_t e = lane; e < r.how.experts; e += WARP)
        mean += r.how.sigmoid ? 0 : (double)s[e] * ds[e];
    mean = warp_sum(mean);
    for (int64_t e = lane; e < r.how.experts; e += WARP)
        dz[e] += (float)((r.how.sigmoid ? 1 - (double)s[e] : 1) * (double)s[e] * (ds[e] - mean));
}

/* ---- the order of experts: a block for each, a warp for a run of choices ---- */

__device__ inline void run_of_warp(const struct expert_sort &s, int64_t *begin, int64_t *end)
{
    int64_t choices = s.n * s.top, each = (choices + WARPS * WARP - 1) / (WARPS * WARP) * WARP;
    *begin = min_of(threadIdx.x / WARP * each, choices);
    *end = min_of(*begin + each, choices);
}

/* count [E][WARPS] */
__global__ void count_choices(struct expert_sort s, int32_t *count)
{
    int64_t begin, end;
    int sum = 0, e = (int)blockIdx.x;
    run_of_warp(s, &begin, &end);
    for (int64_t i = begin + threadIdx.x % WARP; i < end; i += WARP)
        sum += s.expert[i] == e;
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        count[e * WARPS + (int)threadIdx.x / WARP] = sum;
}

/* A warp's choices of its expert come behind all that are counted before. */
__global__ void place_choices(struct expert_sort s, const int32_t *count)
{
    int64_t begin, end;
    int at = 0, e = (int)blockIdx.x, lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    for (int i = lane; i < e * WARPS + warp; i += WARP)
        at += count[i];
    at = warp_sum(at);
    if (threadIdx.x == 0)
        s.offset[e] = at;
    if (threadIdx.x == 0 && e + 1 == s.experts)
        s.offset[s.experts] = (int32_t)(s.n * s.top);
    run_of_warp(s, &begin, &end);
    for (int64_t first = begin; first < end; first += WARP) {
        int64_t i = first + lane;
        bool hit = i < end && s.expert[i] == e;
        unsigned hits = __ballot_sync(0xffffffffu, hit);
        if (hit) {
            int to = at + __popc(hits & ((1u << lane) - 1));
            s.place[i] = to;
            s.token[to] = (int32_t)(i / s.top);
        }
        at += __popc(hits);
    }
}

/* ---- their loads ---- */

/* route_load without what is the host's. */
struct load_args {
    int64_t own, choices, experts, top;
    bool sigmoid;
    const float *score;
    const int32_t *expert, *offset;
    double *sums;
    float weight, *dshare;
    int32_t *count;
    double *balance;
};

struct load_args load_of(const struct route_load *l)
{
    struct load_args t = {};
    t.own = l->n - l->padding;
    t.choices = l->n * l->how->top;
    t.experts = l->how->experts;
    t.top = l->how->top;
    t.sigmoid = l->how->sigmoid;
    t.score = l->score;
    t.expert = l->expert;
    t.offset = l->offset;
    t.sums = l->sums;
    t.weight = l->weight;
    t.dshare = l->dshare;
    t.count = l->count;
    t.balance = l->balance;
    return t;
}

enum { SPAN = 64 }; /* tokens whose shares a block adds up */

struct share_room {
    double whole[SPAN];
};

/* part [blocks][E] */
__global__ void sum_shares(struct load_args l, double *part)
{
    SHARED(struct share_room, s);
    int64_t first = (int64_t)blockIdx.x * SPAN, count = min_of(SPAN, l.own - first);
    const float *score = l.score + first * l.experts;
    for (int64_t i = threadIdx.x / WARP; l.sigmoid && i < count; i += WARPS) {
        double sum = 0;
        for (int64_t e = threadIdx.x % WARP; e < l.experts; e += WARP)
            sum += (double)score[i * l.experts + e];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0)
            s.whole[i] = sum;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < l.experts; e += BLOCK) {
        double sum = 0;
        for (int64_t i = 0; i < count; i++) {
            double x = (double)score[i * l.experts + e];
            sum += l.sigmoid ? x / s.whole[i] : x;
        }
        part[blockIdx.x * l.experts + e] = sum;
    }
}

__global__ void sum_parts(struct load_args l, const double *part, int64_t parts)
{
    int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    double sum = 0;
    if (e >= l.experts)
        return;
    for (int64_t i = 0; i < parts; i++)
        sum += part[i * l.experts + e];
    int64_t count = l.offset[e + 1] - l.offset[e];
    for (int64_t i = l.own * l.top; i < l.choices; i++)
        count -= l.expert[i] == e;
    l.sums[1 + e] = sum;
    l.sums[1 + l.experts + e] = (double)count;
    if (e == 0)
        l.sums[0] = (double)l.own;
}

struct loss_room {
    double sum[WARPS];
};

__global__ void share_gradients(struct load_args l)
{
    SHARED(struct loss_room, s);
    const double *mean = l.sums + 1, *count = mean + l.experts;
    double n = l.sums[0], loss = 0;
    for (int64_t e = threadIdx.x; e < l.experts; e += BLOCK) {
        double slope = n > 0 ? (double)l.experts * count[e] / n / n : 0;
        loss += slope * mean[e];
        l.dshare[e] = (float)((double)l.weight * slope);
        if (l.count)
            l.count[e] = (int32_t)count[e];
    }
    loss = block_sum(loss, s.sum);
    if (l.balance && threadIdx.x == 0)
        *l.balance = loss;
}

__global__ void mix_tokens(struct mix m)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < m.n * m.c; i += step) {
        int64_t n = i / m.c, c = i % m.c;
        float sum = 0;
        for (int64_t j = n * m.k; j < (n + 1) * m.k; j++)
            sum += m.weight[j] * m.row[m.place[j] * m.c + c];
        m.y[i] = sum;
    }
}

/* A warp for each choice; a lane reads what it overwrites. */
__global__ void mix_back(struct mix m)
{
    int64_t j = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (j >= m.n * m.k)
        return;
    const float *dy = m.dy + j / m.k * m.c;
    int64_t at = m.place[j] * m.c;
    float weight = m.weight[j];
    double sum = 0;
    for (int64_t c = threadIdx.x % WARP; c < m.c; c += WARP) {
        float d = dy[c];
        if (m.dweight)
            sum += (double)m.row[at + c] * (double)d;
        if (m.drow)
            m.drow[at + c] = weight * d;
    }
    sum = warp_sum(sum);
    if (m.dweight && threadIdx.x % WARP == 0)
        m.dweight[j] += (float)sum;
}
} // namespace

void gpu_route(struct workers *w, const struct route *r)
{
    launch(w, "route", route_tokens, gpu_blocks(r->n, TOKENS), ROUTE_BLOCK, sizeof(struct route_room), args_of(r));
}

void gpu_route_bwd(struct workers *w, const struct route *r)
{
    launch(w, "route_bwd", route_back, gpu_blocks(r->n, TOKENS), ROUTE_BLOCK, sizeof(struct back_room), args_of(r));
}

void gpu_sort_experts(struct workers *w, const struct expert_sort *s)
{
    int32_t *count = static_cast<int32_t *>(gpu_scratch(w, SCRATCH_CALL, (size_t)s->experts * WARPS * sizeof *count));
    launch(w, "sort_experts", count_choices, (unsigned)s->experts, BLOCK, 0, *s, count);
    launch(w, "sort_experts", place_choices, (unsigned)s->experts, BLOCK, 0, *s, count);
}

void gpu_load_sums(struct workers *w, const struct route_load *l)
{
    struct load_args t = load_of(l);
    unsigned parts = gpu_blocks(t.own, SPAN);
    double *part = static_cast<double *>(gpu_scratch(w, SCRATCH_CALL, (parts + 1) * (size_t)t.experts * sizeof *part));
    launch(w, "load_sums", sum_shares, parts, BLOCK, sizeof(struct share_room), t, part);
    launch(w, "load_sums", sum_parts, gpu_blocks(t.experts, BLOCK), BLOCK, 0, t, part, (int64_t)parts);
}

void gpu_load_shares(struct workers *w, const struct route_load *l)
{
    launch(w, "load_shares", share_gradients, 1, BLOCK, sizeof(struct loss_room), load_of(l));
}

void gpu_mix(struct workers *w, const struct mix *m)
{
    int64_t blocks = (m->n * m->c + BLOCK - 1) / BLOCK;
    launch(w, "mix", mix_tokens, (unsigned)(blocks < (1 << 20) ? blocks : (1 << 20)), BLOCK, 0, *m);
}

void gpu_mix_bwd(struct workers *w, const struct mix *m)
{
    launch(w, "mix_bwd", mix_back, gpu_blocks(m->n * m->k, WARPS), BLOCK, 0, *m);
}
