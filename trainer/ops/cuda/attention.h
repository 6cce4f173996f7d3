/* attention: what the two kinds of attention kernels share: where a segment's queries and keys are, who sees whom
 * (cpu/attention.c says the same of the CPU's), and how a grid becomes tiles. attention.cu computes in f32,
 * attention_mma.cu on tensor cores; of either, E is the type of the arrays in memory: float or uint16_t (bf16). For
 * these two files only. */
#ifndef TESSERA_TRAINER_OPS_CUDA_ATTENTION_H
#define TESSERA_TRAINER_OPS_CUDA_ATTENTION_H

#include "trainer/ops/cuda/gpu.h"

/* On tensor cores; head_dim is at most MMA_HEAD_MAX. delta [N, H] = dO . O. */
enum { MMA_HEAD_MAX = 128 };
void mma_attention(struct workers *w, const struct attention *a);
void mma_attention_bwd(struct workers *w, const struct attention *a, const float *delta);

struct att_job {
    int64_t n, window, cap; /* n: rows of q */
    int heads, kv_heads, d, segments, rank, ranks;
    const int32_t *offset, *past;
    const void *q, *k, *v, *d_o; /* f32 or bf16, as o and the gradients */
    void *o, *dq, *dk, *dv;
    const float *delta;
    float *lse;
    float scale;
    bool wide;  /* all rows are whole 16-byte pieces: of eight elements; of four, where attention.cu reads f32 */
    bool fresh; /* gradients are written, not added to */
};

/* Where a segment's keys and queries are. */
struct span {
    int first, count; /* queries: rows [first, first + count) of q */
    int past, step;   /* the first one's own key is number `past` of the segment; from one to the next */
    int64_t from;     /* the first row of k and v */
    int keys;         /* the pack's own ones, without a cache */
};

static __device__ inline int least(int a, int b)
{
    return a < b ? a : b;
}

static __device__ inline int rows_before(const struct att_job &t, int token)
{
    return t.ranks > 1 ? (int)(((int64_t)token + t.ranks - 1 - t.rank) / t.ranks) : token;
}

static __device__ inline struct span span_of(const struct att_job &t, int s)
{
    int at = t.offset[s], end = t.offset[s + 1];
    struct span p;
    p.first = rows_before(t, at);
    p.count = rows_before(t, end) - p.first;
    p.step = t.ranks > 1 ? t.ranks : 1;
    p.past = t.past ? t.past[s] : t.ranks > 1 ? p.first * p.step + t.rank - at : 0;
    p.from = t.past ? s * t.cap : at;
    p.keys = end - at;
    return p;
}

/* Tile `index` of all segments': which segment's, and where it starts in it. false: there are fewer; it would start so
 * far behind the last one's end. */
static __device__ inline bool find_tile(const struct att_job &t, int index, int tile, bool of_keys, struct span *p,
                                        int *start)
{
    for (int s = 0; s < t.segments; s++) {
        *p = span_of(t, s);
        int tiles = ((of_keys ? p->keys : p->count) + tile - 1) / tile;
        if (index < tiles) {
            *start = index * tile;
            return true;
        }
        index -= tiles;
    }
    *start = index * tile;
    return false;
}

/* [from, to) */
struct range {
    int from, to;
};

/* Keys up to and with the own one of query i. */
static __device__ inline int visible_to(const struct span &p, int i)
{
    return p.past + i * p.step + 1;
}

static __device__ inline struct range keys_seen_by(const struct att_job &t, const struct span &p, int query)
{
    struct range r;
    r.to = visible_to(p, query);
    r.from = t.window && r.to > t.window ? (int)(r.to - t.window) : 0;
    return r;
}

static __device__ inline bool sees(const struct att_job &t, const struct span &p, int query, int key)
{
    struct range r = keys_seen_by(t, p, query);
    return query < p.count && key >= r.from && key < r.to;
}

static __device__ inline struct range queries_that_see(const struct att_job &t, const struct span &p, int key)
{
    int64_t own = key - p.past, gone = own + t.window;
    struct range r;
    r.from = own > 0 ? (int)((own + p.step - 1) / p.step) : 0;
    r.to = !t.window ? p.count : gone > 0 ? (int)min_of(p.count, (gone + p.step - 1) / p.step) : 0;
    return r;
}

/* A block's tile of queries of a head, and the keys that it sees any of. */
struct query_tile {
    struct span p;
    int head;
    int q0, count;       /* queries of the segment */
    int begin, end;      /* keys of the segment; begin is a tile's start */
    int64_t q_ld, kv_ld; /* from row to row */
    int64_t query, key;  /* of q's row q0; of the segment's first row of k and v */
};

/* false: there is no such tile, and q0 is how far behind the last segment's end it would be. */
static __device__ inline bool find_query_tile(const struct att_job &t, int index, int head, int tile,
                                              struct query_tile *a)
{
    int64_t d = t.d;
    a->head = head;
    a->q_ld = t.heads * d;
    a->kv_ld = t.kv_heads * d;
    if (!find_tile(t, index, tile, false, &a->p, &a->q0))
        return false;
    a->count = least(tile, a->p.count - a->q0);
    a->begin = keys_seen_by(t, a->p, a->q0).from / tile * tile;
    a->end = visible_to(a->p, a->q0 + a->count - 1);
    a->query = (a->p.first + a->q0) * a->q_ld + a->head * d;
    a->key = a->p.from * a->kv_ld + a->head / (t.heads / t.kv_heads) * d;
    return true;
}

/* The same of a tile of keys of a group, and the queries that see any of them. */
struct key_tile {
    struct span p;
    int k0, count;
    struct range seen; /* queries of the segment; from is a tile's start */
    int64_t q_ld, kv_ld;
    int64_t key; /* of k's row k0 */
};

static __device__ inline bool find_key_tile(const struct att_job &t, int index, int group, int tile, struct key_tile *a)
{
    int64_t d = t.d;
    a->q_ld = t.heads * d;
    a->kv_ld = t.kv_heads * d;
    if (!find_tile(t, index, tile, true, &a->p, &a->k0))
        return false;
    a->count = least(tile, a->p.keys - a->k0);
    a->seen.from = queries_that_see(t, a->p, a->k0).from / tile * tile;
    a->seen.to = queries_that_see(t, a->p, a->k0 + a->count - 1).to;
    a->key = (a->p.from + a->k0) * a->kv_ld + group * d;
    return true;
}

/* An element as it is in memory, and back. */
static __device__ inline float value(float x)
{
    return x;
}

static __device__ inline float value(uint16_t x)
{
    return wide(x);
}

static __device__ inline void put(float *to, float x, bool fresh)
{
    *to = fresh ? x : *to + x;
}

static __device__ inline void put(uint16_t *to, float x, bool fresh)
{
    *to = (uint16_t)narrow_two(fresh ? x : wide(*to) + x, 0.0f);
}

/* Neighbours of which W > 1 are 16 bytes, aligned so. */
static __device__ inline void piece(float (&x)[1], const float *p)
{
    x[0] = *p;
}

static __device__ inline void piece(float (&x)[1], const uint16_t *p)
{
    x[0] = wide(*p);
}

static __device__ inline void piece(float (&x)[4], const float *p)
{
    load<4>(x, p);
}

static __device__ inline void piece(float (&x)[8], const uint16_t *p)
{
    const uint4 u = *reinterpret_cast<const uint4 *>(p);
    const unsigned two[4] = { u.x, u.y, u.z, u.w };
    UNROLL
    for (int i = 0; i < 4; i++) {
        x[2 * i] = wide((uint16_t)two[i]);
        x[2 * i + 1] = wide((uint16_t)(two[i] >> 16));
    }
}

/* A fresh gradient is 0 where no segment is: of [end, n), the rows of the tile that begins `start` behind end, d
 * columns of each. */
template <class E>
static __device__ void clear_rows(void *to, int64_t end, int64_t n, int64_t start, int tile, int64_t ld, int64_t column,
                                  int d)
{
    int64_t rows = min_of(tile, n - end - start);
    for (int64_t e = threadIdx.x; e < rows * d; e += blockDim.x)
        static_cast<E *>(to)[(end + start + e / d) * ld + column + e % d] = 0;
}

template <class E> static __device__ void clear_queries(const struct att_job &t, const struct query_tile &a, int tile)
{
    if (t.fresh)
        clear_rows<E>(t.dq, rows_before(t, t.offset[t.segments]), t.n, a.q0, tile, a.q_ld, (int64_t)a.head * t.d, t.d);
}

/* Of ranks' packs there are no such rows of keys. */
template <class E>
static __device__ void clear_keys(const struct att_job &t, const struct key_tile &a, int group, int tile)
{
    int64_t end = t.offset[t.segments];
    if (t.fresh && t.ranks <= 1 && t.dk)
        clear_rows<E>(t.dk, end, t.n, a.k0, tile, a.kv_ld, (int64_t)group * t.d, t.d);
    if (t.fresh && t.ranks <= 1 && t.dv)
        clear_rows<E>(t.dv, end, t.n, a.k0, tile, a.kv_ld, (int64_t)group * t.d, t.d);
}

static inline struct att_job att_job_of(const struct attention *a)
{
    struct att_job t = {};
    t.n = a->n;
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
    t.q = a->q;
    t.k = a->k;
    t.v = a->v;
    t.d_o = a->d_o;
    t.o = a->o;
    t.lse = a->lse;
    t.dq = a->dq;
    t.dk = a->dk;
    t.dv = a->dv;
    t.scale = (float)(1 / sqrt((double)a->head_dim));
    t.fresh = a->fresh;
    return t;
}

/* Tiles of `each` that so many rows, in so many segments and behind them, can make at most. */
static inline unsigned most_tiles(int64_t rows, int each, int segments)
{
    return (unsigned)(rows / each + segments + 1);
}

/* Whether rows of these arrays are whole pieces of 16 bytes, `elements` each. */
static inline bool whole_pieces(const struct attention *a, int elements)
{
    uintptr_t at = (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->d_o | (uintptr_t)a->o |
                   (uintptr_t)a->dq | (uintptr_t)a->dk | (uintptr_t)a->dv;
    return a->head_dim % elements == 0 && (at & 15) == 0;
}

/* Tokens whose keys are in the pack, at most. */
static inline int64_t att_tokens(const struct attention *a)
{
    return a->n * (a->ranks > 1 ? a->ranks : 1);
}

#endif
