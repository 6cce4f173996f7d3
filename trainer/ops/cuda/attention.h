/* attention: what the two kinds of attention kernels share: where a segment's queries and keys are, who sees whom
 * (cpu/attention.c says the same of the CPU's), and how a grid becomes tiles. attention.cu computes in f32,
 * attention_mma.cu on tensor cores. For these two files only. */
#ifndef TESSERA_TRAINER_OPS_CUDA_ATTENTION_H
#define TESSERA_TRAINER_OPS_CUDA_ATTENTION_H

#include "trainer/ops/cuda/gpu.h"

/* On tensor cores; head_dim is at most MMA_HEAD_MAX. delta [N, H] = dO . O. */
enum { MMA_HEAD_MAX = 128 };
void mma_attention(struct workers *w, const struct attention *a);
void mma_attention_bwd(struct workers *w, const struct attention *a, const float *delta);

struct att_job {
    int64_t window, cap;
    int heads, kv_heads, d, segments, rank, ranks;
    const int32_t *offset, *past;
    const float *q, *k, *v, *d_o, *delta;
    float *o, *lse, *dq, *dk, *dv;
    float scale;
    bool wide; /* rows can be taken four floats at a time */
};

/* Where a segment's keys and queries are. */
struct span {
    int64_t first, count; /* queries: rows [first, first + count) of q */
    int64_t past, step;   /* the first one's own key is number `past` of the segment; from one to the next */
    int64_t from, keys;   /* rows of k and v; the pack's own keys, without a cache */
};

static __device__ inline int64_t rows_before(const struct att_job &t, int64_t token)
{
    return t.ranks > 1 ? (token + t.ranks - 1 - t.rank) / t.ranks : token;
}

static __device__ inline struct span span_of(const struct att_job &t, int s)
{
    int64_t at = t.offset[s], end = t.offset[s + 1];
    struct span p;
    p.first = rows_before(t, at);
    p.count = rows_before(t, end) - p.first;
    p.step = t.ranks > 1 ? t.ranks : 1;
    p.past = t.past ? t.past[s] : t.ranks > 1 ? p.first * p.step + t.rank - at : 0;
    p.from = t.past ? s * t.cap : at;
    p.keys = end - at;
    return p;
}

/* Tile `index` of all segments': which segment's, and where it starts in it. */
static __device__ inline bool find_tile(const struct att_job &t, int64_t index, int tile, bool of_keys, struct span *p,
                                        int64_t *start)
{
    for (int s = 0; s < t.segments; s++) {
        *p = span_of(t, s);
        int64_t tiles = ((of_keys ? p->keys : p->count) + tile - 1) / tile;
        if (index < tiles) {
            *start = index * tile;
            return true;
        }
        index -= tiles;
    }
    return false;
}

/* Keys up to and with the own one of query i. */
static __device__ inline int64_t visible_to(const struct span &p, int64_t i)
{
    return p.past + i * p.step + 1;
}

static __device__ inline bool sees(const struct att_job &t, const struct span &p, int64_t query, int64_t key)
{
    int64_t visible = visible_to(p, query);
    return query < p.count && key < visible && (t.window == 0 || key >= visible - t.window);
}

/* The first tile of keys, counted from the segment's first key, that query q0 sees any of. */
static __device__ inline int64_t first_tile(const struct att_job &t, const struct span &p, int64_t q0, int tile)
{
    int64_t left = t.window ? visible_to(p, q0) - t.window : 0;
    return left > 0 ? left / tile * tile : 0;
}

/* A block's tile of queries of a head (blockIdx.y), and the keys that it sees any of. */
struct query_tile {
    struct span p;
    int64_t q0, count;   /* queries of the segment */
    int64_t begin, end;  /* tiles of keys of the segment */
    int64_t q_ld, kv_ld; /* from row to row */
    int64_t query, key;  /* of q's row q0; of the segment's first row of k and v */
    int64_t head;
};

static __device__ inline bool find_query_tile(const struct att_job &t, int tile, struct query_tile *a)
{
    int64_t d = t.d;
    if (!find_tile(t, blockIdx.x, tile, false, &a->p, &a->q0))
        return false;
    a->head = blockIdx.y;
    a->count = min_of(tile, a->p.count - a->q0);
    a->begin = first_tile(t, a->p, a->q0, tile);
    a->end = visible_to(a->p, a->q0 + a->count - 1);
    a->q_ld = t.heads * d;
    a->kv_ld = t.kv_heads * d;
    a->query = (a->p.first + a->q0) * a->q_ld + a->head * d;
    a->key = a->p.from * a->kv_ld + a->head / (t.heads / t.kv_heads) * d;
    return true;
}

/* Of keys [k0, k0 + count): the first query that sees k0, down to a tile's start; returns the first one after it that
 * sees none of them any more. */
static __device__ inline int64_t queries_of(const struct att_job &t, const struct span &p, int64_t k0, int64_t count,
                                            int tile, int64_t *begin)
{
    int64_t gone = k0 + count - 1 + t.window - p.past;
    *begin = (k0 > p.past ? (k0 - p.past + p.step - 1) / p.step : 0) / tile * tile;
    if (!t.window)
        return p.count;
    return min_of(p.count, gone > 0 ? (gone + p.step - 1) / p.step : 0);
}

static inline struct att_job att_job_of(const struct attention *a)
{
    struct att_job t = {};
    t.window = a->window;
    t.cap = a->cap;
    t.heads = a->heads;
    t.kv_heads = a->kv_heads;
    t.d = a->head_dim;
    t.segments = a->seg->count;
    t.rank = a->rank;
    t.ranks = a->ranks;
    t.offset = a->seg->offset;
    t.past = a->past;
    t.q = static_cast<const float *>(a->q);
    t.k = static_cast<const float *>(a->k);
    t.v = static_cast<const float *>(a->v);
    t.d_o = static_cast<const float *>(a->d_o);
    t.o = static_cast<float *>(a->o);
    t.lse = a->lse;
    t.dq = static_cast<float *>(a->dq);
    t.dk = static_cast<float *>(a->dk);
    t.dv = static_cast<float *>(a->dv);
    t.scale = (float)(1 / sqrt((double)a->head_dim));
    t.wide = four(a->head_dim, a->q, a->k, a->v, a->d_o);
    return t;
}

/* Tiles of `each` that so many rows in so many segments can make at most. */
static inline unsigned most_tiles(int64_t rows, int each, int segments)
{
    return (unsigned)(rows / each + segments);
}

/* Tokens whose keys are in the pack, at most. */
static inline int64_t att_tokens(const struct attention *a)
{
    return a->n * (a->ranks > 1 ? a->ranks : 1);
}

#endif
