/* context: see context.h. What ranks exchange lies rank by rank; keys, values and their gradients in order of tokens.
 * Room has four parts, each as large as the whole of k: keys, values, and two for the gradients, or, before these are
 * made, for what is gathered; when the gradients are made, keys and values are of no more use. */
#include "trainer/ops/context.h"

#include "comm/ordered.h"
#include "trainer/ops/op.h"
#include "trainer/ops/rank_sums.h"

static size_t part_elems(const struct tape *t, const struct tensor *k)
{
    return (size_t)t->context->size * (size_t)tensor_elems(k);
}

bool context_room(struct tape *t, const struct tensor *k)
{
    int64_t floats = (t->mode == TAPE_FORWARD ? 3 : 4) * (int64_t)part_elems(t, k);
    if (t->context_floats < floats) {
        t->context_part = take_floats(t, floats);
        t->context_floats = floats;
    }
    return !t->error;
}

static float *part(const struct tape *t, const struct tensor *k, size_t i)
{
    return t->context_part + i * part_elems(t, k);
}

static void failed(struct tape *t, status *st)
{
    if (st)
        tape_fail(t, status_wrap(st, "context-parallel exchange"));
}

/* This rank's rows among those of the pack's first n tokens. */
static int64_t own_rows(const struct tape *t, int64_t n)
{
    const struct attention a = { .rank = t->context->rank, .ranks = t->context->size };
    return attention_rows(&a, n);
}

/* This rank's rows of a pack that ranks share. */
status *context_check(const struct tape *t, const struct segments *seg, int64_t n)
{
    int64_t c = t->context->size, all = seg->offset[seg->count];
    if (seg->offset[0] != 0 || (all + c - 1) / c != n)
        return ERR(INVALID, "op_attention: %d segments run from %d to %lld, of which %lld tokens are no %lld-th part",
                   seg->count, seg->offset[0], (long long)all, (long long)n, (long long)c);
    for (int32_t s = 0; s < seg->count; s++) {
        int64_t first = own_rows(t, seg->offset[s]), end = own_rows(t, seg->offset[s + 1]);
        if (seg->offset[s + 1] < seg->offset[s])
            return ERR(INVALID, "op_attention: segment %d ends before it starts", s);
        for (int64_t i = first + 1; seg->position && i < end; i++)
            if (seg->position[i] <= seg->position[i - 1])
                return ERR(INVALID, "op_attention: position %d of row %lld in segment %d does not ascend",
                           seg->position[i], (long long)i, s);
    }
    return NULL;
}

/* Index arrays of `rows` rows a rank: where token i lies in the order of ranks, and then where what is i-th there lies
 * in that of tokens. Made once a pass. */
static const int32_t *order(struct tape *t, int64_t rows)
{
    int64_t c = t->context->size, n = c * rows;
    if (t->context_rows != rows || !t->context_order) {
        int32_t *index = take(t, 2 * (size_t)n, sizeof *index);
        for (int64_t i = 0; index && i < n; i++) {
            index[i] = (int32_t)(i % c * rows + i / c);
            index[n + i] = (int32_t)(i % rows * c + i / rows);
        }
        t->context_order = index;
        t->context_rows = rows;
    }
    return on_device(t, t->context_order, 2 * n);
}

void context_prepare(struct tape *t, int64_t rows)
{
    if (t->context)
        (void)order(t, rows);
}

/* Between the order of tokens and that of ranks, `row` floats a token. */
static void reorder(struct tape *t, float *tokens, float *ranks, int64_t rows, int64_t row, bool to_tokens)
{
    int64_t c = t->context->size;
    const int32_t *from = order(t, rows);
    if (from && !t->error)
        t->kernels->embedding(t->workers, to_tokens ? tokens : ranks, to_tokens ? ranks : tokens, DTYPE_F32,
                              to_tokens ? from : from + c * rows, c * rows, row);
}

static void gather(struct tape *t, const struct tensor *x, float *whole, float *room)
{
    int64_t rows = x->dim[0], row = rows ? tensor_elems(x) / rows : 0;
    size_t bytes = (size_t)tensor_elems(x) * sizeof *room;
    failed(t, t->error ? NULL : comm_allgather(t->context, x->data, room, bytes, compute_stream(t->compute)));
    if (!t->error)
        reorder(t, whole, room, rows, row, true);
}

void context_keys(struct tape *t, const struct tensor *k, const struct tensor *v, struct attention *a)
{
    a->rank = t->context->rank;
    a->ranks = t->context->size;
    a->k = part(t, k, 0);
    a->v = part(t, k, 1);
    gather(t, k, part(t, k, 0), part(t, k, 2));
    gather(t, v, part(t, k, 1), part(t, k, 2));
    int64_t own = own_rows(t, a->seg->offset[a->seg->count]), row = (int64_t)a->heads * a->head_dim;
    t->kernels->zero(t->workers, (float *)a->o + own * row, (a->n - own) * row);
}

void context_gradients(struct tape *t, const struct tensor *k, const struct tensor *v, struct attention *a)
{
    a->dk = k->grad ? part(t, k, 2) : NULL;
    a->dv = v->grad ? part(t, k, 3) : NULL;
    t->kernels->zero(t->workers, part(t, k, 2), 2 * (int64_t)part_elems(t, k));
}

static void sum(struct tape *t, struct tensor *x, float *whole, float *by_rank, float *room)
{
    int64_t own = tensor_elems(x), rows = x->dim[0], row = rows ? own / rows : 0;
    float *mine = by_rank + (int64_t)t->context->rank * own;
    if (t->error || !x->grad)
        return;
    const struct ordered_at at = rank_sums_at(t->compute);
    reorder(t, whole, by_rank, rows, row, false);
    if (!t->error)
        failed(t, ordered_reduce_scatter(t->context, by_rank, part_elems(t, x), (size_t)own, mine, room, &at));
    t->kernels->axpy(t->workers, grad_f32(t, x), mine, 1.0f, own);
}

void context_sum(struct tape *t, struct tensor *k, struct tensor *v, const struct attention *a)
{
    sum(t, k, a->dk, part(t, k, 0), part(t, k, 1));
    sum(t, v, a->dv, part(t, k, 0), part(t, k, 1));
}

void context_add(struct tape *t, double *value, size_t count)
{
    if (t->context && !t->error)
        failed(t, comm_allreduce(t->context, value, count, COMM_F64, COMM_SUM, NULL));
}

/* ---- log-probabilities ---- */

struct tokens_record {
    struct tape_record base;
    struct tensor *x, *y;
    const int32_t *token; /* [rows]: the token of each row here, -1: none */
    float *room;          /* [rows] */
};

static void tokens_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct tokens_record *r = (const void *)base;
    if (INPUT_HALF(halves)) {
        t->kernels->embedding(t->workers, r->room, grad_f32(t, r->y), DTYPE_F32, r->token, r->x->dim[0], 1);
        t->kernels->axpy(t->workers, grad_f32(t, r->x), r->room, 1.0f, r->x->dim[0]);
    }
}

enum { VALUES = 5 }; /* of a token: x and the stats */

/* The token of each row here, -1: none; then where each token's first value lies among those of all ranks, of which
 * each has n arrays of `rows`. */
static const int32_t *token_index(struct tape *t, int64_t tokens, int64_t n, int64_t rows)
{
    int64_t c = t->context->size;
    int32_t *index = take(t, (size_t)(rows + tokens), sizeof *index);
    for (int64_t j = 0, i = t->context->rank; index && j < rows; j++, i += c)
        index[j] = i < tokens ? (int32_t)i : -1;
    for (int64_t i = 0; index && i < tokens; i++)
        index[rows + i] = (int32_t)(i % c * n * rows + i / c);
    return on_device(t, index, rows + tokens);
}

struct tensor *op_all_tokens(struct tape *t, struct tensor *x, int64_t tokens, struct logprob_stats *stats)
{
    if (!x)
        return missing(t, "op_all_tokens");
    if (!t->context)
        return x;
    int64_t c = t->context->size, rows = x->dim[0], n = stats ? VALUES : 1;
    if (x->ndim != 1 || !is_f32(x) || rows != (tokens + c - 1) / c)
        return misfit(t, "op_all_tokens", "x is f32 [ceil(N / ranks)]", x, NULL);
    struct tensor *y = make(t, 1, &tokens, learns(t, x));
    float *own = take_floats(t, n * rows), *all = take_floats(t, c * n * rows);
    float *to[VALUES] = { y ? y->data : NULL };
    for (int64_t v = 1; v < n; v++)
        to[v] = take_floats(t, tokens);
    const int32_t *index = token_index(t, tokens, n, rows);
    if (t->error)
        return NULL;
    if (runs(t)) {
        const float *from[VALUES] = { x->data };
        if (stats)
            memcpy(from + 1, (const float *[]){ stats->entropy, stats->logit, stats->log_square, stats->top },
                   (VALUES - 1) * sizeof *from);
        for (int64_t v = 0; v < n; v++)
            copy_there(t, own + v * rows, from[v], (size_t)rows * sizeof *own);
        failed(t, comm_allgather(t->context, own, all, (size_t)(n * rows) * sizeof *own, compute_stream(t->compute)));
        for (int64_t v = 0; v < n; v++)
            t->kernels->embedding(t->workers, to[v], all + v * rows, DTYPE_F32, index + rows, tokens, 1);
    }
    if (stats)
        *stats = (struct logprob_stats){ to[1], to[2], to[3], to[4] };
    struct tokens_record *r = y->grad ? record(t, sizeof *r, tokens_backward) : NULL;
    if (r) {
        r->x = x;
        r->y = y;
        r->token = index;
        r->room = own;
        r->base.look = (struct tape_look){ "op_all_tokens", { x }, { NULL } };
    }
    return done(t, "op_all_tokens", y, NULL);
}
