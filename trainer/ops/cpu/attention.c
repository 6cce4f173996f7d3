/* attention: causal, per segment, grouped-query, perhaps in a window; tiles of 64 queries by 64 keys with a running
 * maximum and sum, so that no [T, T] matrix exists (Milakov, Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
 * arXiv:2205.14135).
 *
 * Tiles are counted from the segment's first token, products are the GEMM's chains, and row sums run over 16 lanes: a
 * segment's bits depend neither on threads nor on what else is in the pack, and a token decoded alone against a cache
 * gets those of a full pass. Queries may be every ranks-th token of the pack only (context parallelism: Brandon et al.
 * 2023, arXiv:2311.09431, deal tokens like that); keys are always all. Forward: one task a (segment, head, query tile).
 * Backward: one task a (segment, key/value head), which owns all gradients it adds to; it takes key tiles in order, and
 * for each the heads of the group and their query tiles in order. Buffers are on the task's stack. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

enum { TILE = 64, TILE_PANELS = TILE / PANEL_N, DMAX = ATTENTION_HEAD_MAX };

struct att_job {
    const struct isa *isa;
    const struct attention *a;
    int d, wide; /* head size; padded to whole panels */
    const float *q, *k, *v, *d_o;
    float *o, *dq, *dk, *dv;
    int64_t q_ld, kv_ld;
    float scale;
};

static struct att_job att_job(const struct attention *a)
{
    struct att_job t = { .isa = isa_best(), .a = a, .d = a->head_dim, .q = a->q, .k = a->k, .v = a->v, .d_o = a->d_o };
    t.o = a->o;
    t.dq = a->dq;
    t.dk = a->dk;
    t.dv = a->dv;
    t.wide = (t.d + PANEL_N - 1) / PANEL_N * PANEL_N;
    t.q_ld = (int64_t)a->heads * t.d;
    t.kv_ld = (int64_t)a->kv_heads * t.d;
    t.scale = (float)(1 / sqrt((double)t.d));
    return t;
}

/* Panels of PANEL_M rows: src is [count, k]. */
static void pack_rows(const struct att_job *t, float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t i = 0; i < count; i += PANEL_M)
        t->isa->transpose(dst + i * k, PANEL_M, src + i * ld, ld, min64(PANEL_M, count - i), k);
}

/* The same when the rows are src's columns: src is [k, count]. */
static void pack_rows_across(float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t i = 0; i < count; i += PANEL_M)
        copy_panel(dst + i * k, PANEL_M, src + i, ld, min64(PANEL_M, count - i), k);
}

/* Panels of PANEL_N columns, the columns being src's rows: src is [count, k]. */
static void pack_columns(const struct att_job *t, float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t j = 0; j < count; j += PANEL_N)
        t->isa->transpose(dst + j * k, PANEL_N, src + j * ld, ld, min64(PANEL_N, count - j), k);
}

/* Panels of PANEL_N columns: src is [k, count]. */
static void pack_columns_across(float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t j = 0; j < count; j += PANEL_N)
        copy_panel(dst + j * k, PANEL_N, src + j, ld, min64(PANEL_N, count - j), k);
}

/* c [m, n] = (or continues with, if load) a b over packed panels. */
static void multiply(const struct att_job *t, float *c, int64_t ldc, const float *a, int64_t m, const float *b,
                     int64_t n, int64_t k, bool load)
{
    for (int64_t i = 0; i < m; i += PANEL_M)
        for (int64_t j = 0; j < n; j += PANEL_N)
            t->isa->micro(k, (int)min64(PANEL_M, m - i), a + i * k, b + j * k, c + i * ldc + j, ldc, load);
}

/* Where a segment's keys and queries are. */
struct span {
    int64_t first, count; /* queries: rows [first, first + count) of q */
    int64_t past, step;   /* the first one's own key is number `past` of the segment; from one to the next */
    int64_t at, keys;     /* keys: the pack's tokens [at, at + keys), without a cache */
    const float *k, *v;
};

static struct span span_of(const struct att_job *t, int64_t s)
{
    const struct attention *a = t->a;
    int64_t at = a->seg->offset[s], end = a->seg->offset[s + 1], from = a->past ? s * a->cap : at;
    int64_t first = attention_rows(a, at), step = a->ranks > 1 ? a->ranks : 1;
    int64_t own = a->ranks > 1 ? first * step + a->rank - at : 0;
    return (struct span){ .first = first,
                          .count = attention_rows(a, end) - first,
                          .past = a->past ? a->past[s] : own,
                          .step = step,
                          .at = at,
                          .keys = end - at,
                          .k = t->k + from * t->kv_ld,
                          .v = t->v + from * t->kv_ld };
}

/* Keys up to and with the own one of query i. */
static int64_t visible_to(const struct span *p, int64_t i)
{
    return p->past + i * p->step + 1;
}

/* The first query whose own key is number `key` or a later one. */
static int64_t first_seeing(const struct span *p, int64_t key)
{
    return key > p->past ? (key - p->past + p->step - 1) / p->step : 0;
}

/* Of a tile's keys, those [first, end) that a row sees: the `visible` ones from the tile's first on (the causal order;
 * may be none), without those that have left the window. */
struct seen {
    int64_t first, end;
};

static struct seen seen_in(const struct att_job *t, int64_t visible, int64_t keys)
{
    int64_t end = visible < 0 ? 0 : min64(visible, keys);
    int64_t first = t->a->window && visible > t->a->window ? min64(visible - t->a->window, end) : 0;
    return (struct seen){ first, end };
}

static void mask(float *row, struct seen seen)
{
    memset(row, 0, (size_t)seen.first * sizeof(float));
    memset(row + seen.end, 0, (size_t)(TILE - seen.end) * sizeof(float));
}

/* One tile of scores becomes probabilities; the running maximum, sum and output of its rows are brought up to date. */
static void softmax_tile(const struct att_job *t, float *score, float *out, float *top, float *sum, int64_t rows,
                         int64_t keys, int64_t visible, int64_t step)
{
    for (int64_t i = 0; i < rows; i++) {
        float *s = score + i * TILE;
        struct seen seen = seen_in(t, visible + i * step, keys);
        mask(s, seen);
        if (seen.first == seen.end)
            continue;
        int64_t n = seen.end - seen.first;
        s += seen.first;
        float most = t->isa->max(s, n) * t->scale;
        if (most > top[i]) {
            float shrink = top[i] - most;
            t->isa->exp(&shrink, &shrink, 1); /* 0 from -inf */
            sum[i] *= shrink;
            t->isa->scale(out + i * t->wide, out + i * t->wide, shrink, t->wide);
            top[i] = most;
        }
        sum[i] += t->isa->exp_sum(s, t->scale, top[i], n);
    }
}

static void query_tile(const struct att_job *t, const struct span *p, int64_t head, int64_t q0)
{
    const struct attention *a = t->a;
    int64_t d = t->d, rows = min64(TILE, p->count - q0), from = head / (a->heads / a->kv_heads) * d;
    float qs[TILE * DMAX], keys[TILE * DMAX], values[TILE * DMAX], out[TILE * DMAX];
    float score[TILE * TILE], weights[TILE * TILE], top[TILE], sum[TILE];
    for (int64_t i = 0; i < rows; i++) {
        top[i] = -INFINITY;
        sum[i] = 0;
        memset(out + i * t->wide, 0, (size_t)t->wide * sizeof(float));
    }
    pack_rows(t, qs, t->q + (p->first + q0) * t->q_ld + head * d, t->q_ld, rows, d);
    int64_t left = a->window ? visible_to(p, q0) - a->window : 0; /* the first key that the first row sees */
    int64_t end = visible_to(p, q0 + rows - 1);
    for (int64_t k0 = left > 0 ? left / TILE * TILE : 0; k0 < end; k0 += TILE) {
        int64_t n = min64(TILE, end - k0);
        pack_columns(t, keys, p->k + k0 * t->kv_ld + from, t->kv_ld, n, d);
        multiply(t, score, TILE, qs, rows, keys, n, d, false);
        softmax_tile(t, score, out, top, sum, rows, n, visible_to(p, q0) - k0, p->step);
        pack_rows(t, weights, score, TILE, rows, n);
        pack_columns_across(values, p->v + k0 * t->kv_ld + from, t->kv_ld, d, n);
        multiply(t, out, t->wide, weights, rows, values, d, n, true);
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = p->first + q0 + i;
        t->isa->scale(t->o + token * t->q_ld + head * d, out + i * t->wide, 1.0f / sum[i], d);
        if (a->lse)
            a->lse[token * a->heads + head] = (float)((double)top[i] + log((double)sum[i]));
    }
}

/* Task index -> (segment, head, query tile); tiles of a segment are neighbours. */
static void forward_task(void *arg, size_t index)
{
    const struct att_job *t = arg;
    int64_t at = (int64_t)index;
    for (int64_t s = 0; s < t->a->seg->count; s++) {
        struct span p = span_of(t, s);
        int64_t tiles = (int64_t)task_count(p.count, TILE), here = tiles * t->a->heads;
        if (at < here) {
            query_tile(t, &p, at / tiles, at % tiles * TILE);
            return;
        }
        at -= here;
    }
}

void cpu_attention(struct workers *w, const struct attention *a)
{
    struct att_job t = att_job(a);
    size_t tasks = 0;
    for (int32_t s = 0; s < a->seg->count; s++)
        tasks += task_count(span_of(&t, s).count, TILE) * (size_t)a->heads;
    workers_for(w, tasks, forward_task, &t);
}

/* ---- backward ---- */

/* One key tile and what is gathered for it. */
struct key_tile {
    int64_t k0, n;
    float keys[TILE * DMAX], values[TILE * DMAX]; /* as columns: for scores and for dP */
    float keys_across[TILE * DMAX];               /* for dQ */
    float dk[TILE * DMAX], dv[TILE * DMAX];
};

/* P and dS of a (query tile, key tile) from recomputed scores and dP = dO V^T; masked entries are 0. */
static void score_gradients(const struct att_job *t, const struct key_tile *kt, float *score, float *dp, int64_t token,
                            int64_t rows, int64_t visible, int64_t step, int64_t head)
{
    const struct attention *a = t->a;
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = (token + i) * t->q_ld + head * t->d;
        struct seen seen = seen_in(t, visible + i * step, kt->n);
        float *p = score + i * TILE, *ds = dp + i * TILE;
        float delta = t->isa->dot(t->d_o + row, t->o + row, t->d);
        int64_t n = seen.end - seen.first;
        t->isa->exp_scaled(p + seen.first, t->scale, a->lse[(token + i) * a->heads + head], 1.0f, n);
        t->isa->softmax_bwd(ds + seen.first, p + seen.first, delta, t->scale, n);
        mask(p, seen);
        mask(ds, seen);
    }
}

static void tile_pair(const struct att_job *t, const struct span *p, struct key_tile *kt, int64_t head, int64_t q0)
{
    int64_t d = t->d, rows = min64(TILE, p->count - q0), token = p->first + q0, at = token * t->q_ld + head * d;
    float score[TILE * TILE], dp[TILE * TILE], left[TILE * DMAX], right[TILE * DMAX];
    pack_rows(t, left, t->q + at, t->q_ld, rows, d);
    multiply(t, score, TILE, left, rows, kt->keys, kt->n, d, false);
    pack_rows(t, left, t->d_o + at, t->q_ld, rows, d);
    multiply(t, dp, TILE, left, rows, kt->values, kt->n, d, false);
    score_gradients(t, kt, score, dp, token, rows, visible_to(p, q0) - kt->k0, p->step, head);
    if (t->dv) { /* dV += P^T dO */
        pack_rows_across(left, score, TILE, kt->n, rows);
        pack_columns_across(right, t->d_o + at, t->q_ld, d, rows);
        multiply(t, kt->dv, t->wide, left, kt->n, right, d, rows, true);
    }
    if (t->dk) { /* dK += dS^T Q */
        pack_rows_across(left, dp, TILE, kt->n, rows);
        pack_columns_across(right, t->q + at, t->q_ld, d, rows);
        multiply(t, kt->dk, t->wide, left, kt->n, right, d, rows, true);
    }
    if (t->dq) { /* dQ += dS K */
        float *dq = right;
        pack_rows(t, left, dp, TILE, rows, kt->n);
        multiply(t, dq, t->wide, left, rows, kt->keys_across, d, kt->n, false);
        for (int64_t i = 0; i < rows; i++) {
            float *to = t->dq + at + i * t->q_ld;
            t->isa->add(to, to, dq + i * t->wide, d);
        }
    }
}

static void backward_task(void *arg, size_t index)
{
    const struct att_job *t = arg;
    const struct attention *a = t->a;
    int64_t g = (int64_t)index % a->kv_heads, from = g * t->d, group = a->heads / a->kv_heads;
    struct span p = span_of(t, (int64_t)index / a->kv_heads);
    struct key_tile kt;
    for (kt.k0 = 0; kt.k0 < p.keys; kt.k0 += TILE) {
        kt.n = min64(TILE, p.keys - kt.k0);
        int64_t at = kt.k0 * t->kv_ld + from;
        pack_columns(t, kt.keys, p.k + at, t->kv_ld, kt.n, t->d);
        pack_columns(t, kt.values, p.v + at, t->kv_ld, kt.n, t->d);
        pack_columns_across(kt.keys_across, p.k + at, t->kv_ld, t->d, kt.n);
        memset(kt.dk, 0, (size_t)(kt.n * t->wide) * sizeof(float));
        memset(kt.dv, 0, (size_t)(kt.n * t->wide) * sizeof(float));
        /* queries before `begin` and from `last` on see none of these keys */
        int64_t begin = first_seeing(&p, kt.k0) / TILE * TILE;
        int64_t last = a->window ? min64(p.count, first_seeing(&p, kt.k0 + kt.n - 1 + a->window)) : p.count;
        for (int64_t head = g * group; head < (g + 1) * group; head++)
            for (int64_t q0 = begin; q0 < last; q0 += TILE)
                tile_pair(t, &p, &kt, head, q0);
        for (int64_t i = 0; i < kt.n; i++) {
            int64_t row = (p.at + kt.k0 + i) * t->kv_ld + from;
            if (t->dk)
                t->isa->add(t->dk + row, t->dk + row, kt.dk + i * t->wide, t->d);
            if (t->dv)
                t->isa->add(t->dv + row, t->dv + row, kt.dv + i * t->wide, t->d);
        }
    }
}

void cpu_attention_bwd(struct workers *w, const struct attention *a)
{
    struct att_job t = att_job(a);
    workers_for(w, (size_t)(a->seg->count * a->kv_heads), backward_task, &t);
}
