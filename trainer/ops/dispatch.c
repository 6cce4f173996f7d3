/* dispatch: see dispatch.h. An exchange has a message for each pair of a rank and an expert, so that rows arrive where
 * experts see them; those of the way back are the same in reverse. */
#include "trainer/ops/dispatch.h"

#include "trainer/ops/op.h"

/* In a dry pass how many rows come is not known: room is made for twice a balanced load. What a rank needs beyond that
 * its arena gets when it comes. */
enum { DRY_LOAD = 2 };

static int ranks_of(const struct tape *t)
{
    return t->ep ? t->ep->size : 1;
}

/* Three arrays in one. */
static struct routing_index index_at(int32_t *p, size_t choices)
{
    return (struct routing_index){ p, p + choices, p + 2 * choices };
}

struct routing *routing_new(struct tape *t, const struct router *how, int64_t n, int64_t experts)
{
    struct routing *g = take(t, 1, sizeof *g);
    size_t choices = (size_t)(n * how->top), all = (size_t)how->experts, ranks = (size_t)ranks_of(t);
    int32_t *there = take_there(t, 3 * choices, sizeof *there);
    int32_t *here = at_home(t) ? there : take(t, 3 * choices, sizeof *here);
    int32_t *begin = take(t, all + (size_t)experts + 2, sizeof *begin), *from = t->ep ? begin + all + 1 : begin;
    int32_t *offset = at_home(t) ? from : take_there(t, (size_t)experts + 1, sizeof *offset);
    int32_t *counts = t->ep ? take(t, (ranks + 1) * all, sizeof *counts) : NULL;
    struct comm_xfer *xfer = t->ep ? take(t, all + ranks * (size_t)experts, sizeof *xfer) : NULL;
    if (t->error)
        return NULL;
    *g = (struct routing){ .how = how, .n = n, .experts = experts, .rows = n * how->top };
    if (!runs(t))
        g->rows *= ranks_of(t) < DRY_LOAD ? ranks_of(t) : DRY_LOAD;
    g->there = index_at(there, choices);
    g->here = index_at(here, choices);
    g->begin = begin;
    g->from = from;
    g->offset = offset;
    g->counts = counts;
    g->xfer = xfer;
    return g;
}

/* Choices in order of experts, and for each expert in order of tokens. */
static void sort_choices(struct routing *g)
{
    int64_t k = g->how->top, choices = g->n * k, experts = g->how->experts;
    memset(g->begin, 0, (size_t)(experts + 1) * sizeof *g->begin);
    for (int64_t i = 0; i < choices; i++)
        g->begin[g->here.expert[i] + 1]++;
    for (int64_t e = 0; e < experts; e++)
        g->begin[e + 1] += g->begin[e];
    for (int64_t i = 0; i < choices; i++) { /* begin moves to the end of the expert's rows */
        int64_t to = g->begin[g->here.expert[i]]++;
        g->here.place[i] = (int32_t)to;
        g->here.token[to] = (int32_t)(i / k);
    }
    for (int64_t e = experts; e > 0; e--)
        g->begin[e] = g->begin[e - 1];
    g->begin[0] = 0;
}

static void failed(struct tape *t, status *st)
{
    if (st)
        tape_fail(t, status_wrap(st, "expert-parallel exchange"));
}

/* Rows of all ranks' for all experts, and so what this rank's experts get. */
static void tell_counts(struct tape *t, struct routing *g)
{
    int64_t experts = g->how->experts, at = 0;
    int32_t *mine = g->counts + t->ep->size * experts;
    for (int64_t e = 0; e < experts; e++)
        mine[e] = (int32_t)(g->begin[e + 1] - g->begin[e]);
    failed(t, comm_allgather(t->ep, mine, g->counts, (size_t)experts * sizeof *mine, NULL));
    for (int64_t e = 0; !t->error && e < g->experts; e++) {
        g->from[e] = (int32_t)at;
        for (int r = 0; r < t->ep->size; r++)
            at += g->counts[r * experts + t->ep->rank * g->experts + e];
    }
    g->rows = t->error ? 0 : at;
    g->from[g->experts] = (int32_t)g->rows;
    for (int64_t i = 0; !t->error && i < t->ep->size * experts; i++)
        t->routed += g->counts[i];
}

void routing_sort(struct tape *t, struct routing *g)
{
    sort_choices(g);
    put_there(t, g->there.place, g->here.place, 2 * (size_t)(g->n * g->how->top) * sizeof(int32_t));
    if (t->ep)
        tell_counts(t, g);
    put_there(t, g->offset, g->from, (size_t)(g->experts + 1) * sizeof *g->from);
}

/* Sorted rows to the ranks of their experts, or (back) experts' rows to the ranks of their tokens. */
static void exchange(struct tape *t, const struct routing *g, float *sorted, float *rows, int64_t c, bool back)
{
    size_t n = 0, row = (size_t)c * sizeof(float);
    for (int64_t e = 0; e < g->how->experts; e++)
        g->xfer[n++] = (struct comm_xfer){ (int)(e / g->experts), (int)(e % g->experts), !back,
                                           sorted + g->begin[e] * c, (size_t)(g->begin[e + 1] - g->begin[e]) * row };
    for (int64_t e = 0; e < g->experts; e++) {
        float *to = rows + g->from[e] * c;
        for (int r = 0; r < t->ep->size; r++) {
            int64_t count = g->counts[r * g->how->experts + t->ep->rank * g->experts + e];
            g->xfer[n++] = (struct comm_xfer){ r, (int)e, back, to, (size_t)count * row };
            to += count * c;
        }
    }
    failed(t, comm_exchange(t->ep, g->xfer, n, compute_stream(t->compute)));
}

/* ---- to the experts ---- */

struct dispatch_record {
    struct tape_record base;
    const struct routing *g;
    struct tensor *x, *rows;
    float *sorted; /* [N K, C] */
};

static void dispatch_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct dispatch_record *r = (const void *)base;
    int64_t c = r->x->dim[1];
    if (!INPUT_HALF(halves) || t->error)
        return;
    float *sorted = t->ep ? r->sorted : r->rows->grad;
    if (t->ep)
        exchange(t, r->g, sorted, r->rows->grad, c, true);
    if (r->x->grad && !t->error)
        t->kernels->embedding_bwd(t->workers, r->x->grad, sorted, r->g->there.token, r->g->n * r->g->how->top, c);
}

struct tensor *op_dispatch(struct tape *t, struct tensor *x, struct routing *g)
{
    int64_t c = x->dim[1], choices = g->n * g->how->top;
    struct tensor *rows = make(t, 2, (int64_t[]){ g->rows, c }, t->mode != TAPE_FORWARD);
    float *sorted = t->ep ? take_floats(t, choices * c) : rows ? rows->data : NULL;
    if (t->error)
        return NULL;
    if (runs(t))
        t->kernels->embedding(t->workers, sorted, x->data, DTYPE_F32, g->there.token, choices, c);
    if (runs(t) && t->ep)
        exchange(t, g, sorted, rows->data, c, false);
    struct dispatch_record *r = rows->grad ? record(t, sizeof *r, dispatch_backward) : NULL;
    if (r) {
        r->g = g;
        r->x = x;
        r->rows = rows;
        r->sorted = sorted;
        r->base.look = (struct tape_look){ "op_dispatch", { x }, { NULL } };
    }
    return done(t, "op_dispatch", rows, NULL);
}

/* ---- and back ---- */

struct combine_record {
    struct tape_record base;
    const struct routing *g;
    struct tensor *rows, *weight, *y;
    float *sorted; /* [N K, C]: the sorted rows' results; with expert parallelism backward puts gradients there */
};

static struct mix mix_of(const struct routing *g, const float *sorted, const struct tensor *weight, int64_t c)
{
    return (struct mix){
        .n = g->n, .k = g->how->top, .c = c, .row = sorted, .weight = weight->data, .place = g->there.place
    };
}

static void combine_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct combine_record *r = (const void *)base;
    int64_t c = r->y->dim[1];
    if (!INPUT_HALF(halves) || t->error)
        return;
    struct mix m = mix_of(r->g, r->sorted, r->weight, c);
    m.dy = r->y->grad;
    m.drow = t->ep ? r->sorted : r->rows->grad; /* nothing else has a gradient for `rows` */
    m.dweight = r->weight->grad;
    t->kernels->mix_bwd(t->workers, &m);
    if (t->ep)
        exchange(t, r->g, r->sorted, r->rows->grad, c, false);
}

struct tensor *op_combine(struct tape *t, struct tensor *rows, struct tensor *weight, struct routing *g)
{
    if (!rows || !weight)
        return missing(t, "op_combine");
    int64_t c = rows->dim[1];
    float *sorted = t->ep ? take_floats(t, g->n * g->how->top * c) : rows->data;
    struct tensor *y = make(t, 2, (int64_t[]){ g->n, c }, t->mode != TAPE_FORWARD);
    if (t->error)
        return NULL;
    if (runs(t) && t->ep)
        exchange(t, g, sorted, rows->data, c, true);
    struct mix m = mix_of(g, sorted, weight, c);
    m.y = y->data;
    if (runs(t) && !t->error)
        t->kernels->mix(t->workers, &m);
    struct combine_record *r = y->grad ? record(t, sizeof *r, combine_backward) : NULL;
    if (r) {
        r->g = g;
        r->rows = rows;
        r->weight = weight;
        r->y = y;
        r->sorted = sorted;
        r->base.look = (struct tape_look){ "op_combine", { rows, weight }, { NULL } };
    }
    return done(t, "op_combine", y, NULL);
}
