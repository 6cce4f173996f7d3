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

struct routing *routing_new(struct tape *t, const struct router *how, int64_t n, int64_t experts)
{
    struct routing *g = take(t, 1, sizeof *g);
    size_t choices = (size_t)(n * how->top), all = (size_t)how->experts, ranks = (size_t)ranks_of(t);
    int32_t *index = take_there(t, 3 * choices + all + 1, sizeof *index);
    int32_t *offset = t->ep ? take_there(t, (size_t)experts + 1, sizeof *offset) : NULL;
    int32_t *chosen = at_home(t) ? index : take(t, choices, sizeof *chosen);
    int32_t *here = t->ep ? take(t, all + (size_t)experts + 2, sizeof *here) : NULL;
    int32_t *counts = t->ep ? take(t, (ranks + 1) * all, sizeof *counts) : NULL;
    struct comm_xfer *xfer = t->ep ? take(t, all + ranks * (size_t)experts, sizeof *xfer) : NULL;
    if (t->error)
        return NULL;
    *g = (struct routing){ .how = how, .n = n, .experts = experts, .rows = n * how->top };
    if (!runs(t))
        g->rows *= ranks_of(t) < DRY_LOAD ? ranks_of(t) : DRY_LOAD;
    g->expert = index;
    g->place = index + choices;
    g->token = g->place + choices;
    g->begin = g->token + choices;
    g->offset = t->ep ? offset : g->begin;
    g->chosen = chosen;
    g->begin_here = here;
    g->from = t->ep ? here + all + 1 : NULL;
    g->counts = counts;
    g->xfer = xfer;
    return g;
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
        mine[e] = g->begin_here[e + 1] - g->begin_here[e];
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
    struct expert_sort s = { g->n, g->how->top, g->how->experts, g->expert, g->place, g->token, g->begin };
    t->kernels->sort_experts(t->workers, &s);
    if (!t->ep)
        return;
    get_here(t, g->begin_here, g->begin, (size_t)(s.experts + 1) * sizeof *g->begin); /* waits: sizes of messages */
    tell_counts(t, g);
    put_there(t, g->offset, g->from, (size_t)(g->experts + 1) * sizeof *g->from);
}

/* Sorted rows to the ranks of their experts, or (back) experts' rows to the ranks of their tokens. */
static void exchange(struct tape *t, const struct routing *g, float *sorted, float *rows, int64_t c, bool back)
{
    size_t n = 0, row = (size_t)c * sizeof(float);
    for (int64_t e = 0; e < g->how->experts; e++)
        g->xfer[n++] =
            (struct comm_xfer){ (int)(e / g->experts), (int)(e % g->experts), !back, sorted + g->begin_here[e] * c,
                                (size_t)(g->begin_here[e + 1] - g->begin_here[e]) * row };
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
    float *sorted = t->ep ? r->sorted : grad_f32(t, r->rows);
    if (t->ep)
        exchange(t, r->g, sorted, grad_f32(t, r->rows), c, true);
    if (r->x->grad && !t->error)
        t->kernels->embedding_bwd(t->workers, grad_f32(t, r->x), sorted, r->g->token, r->g->n * r->g->how->top, c);
}

struct tensor *op_dispatch(struct tape *t, struct tensor *x, struct routing *g)
{
    int64_t c = x->dim[1], choices = g->n * g->how->top;
    struct tensor *rows = make(t, 2, (int64_t[]){ g->rows, c }, t->mode != TAPE_FORWARD);
    float *sorted = t->ep ? take_floats(t, choices * c) : rows ? rows->data : NULL;
    if (t->error)
        return NULL;
    if (runs(t))
        t->kernels->embedding(t->workers, sorted, x->data, DTYPE_F32, g->token, choices, c);
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
    return (
        struct mix){ .n = g->n, .k = g->how->top, .c = c, .row = sorted, .weight = weight->data, .place = g->place };
}

static void combine_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct combine_record *r = (const void *)base;
    int64_t c = r->y->dim[1];
    if (!INPUT_HALF(halves) || t->error)
        return;
    struct mix m = mix_of(r->g, r->sorted, r->weight, c);
    m.dy = grad_f32(t, r->y);
    m.drow = t->ep ? r->sorted : grad_over(r->rows); /* nothing else has a gradient for `rows` */
    m.dweight = grad_f32(t, r->weight);
    t->kernels->mix_bwd(t->workers, &m);
    if (t->ep)
        exchange(t, r->g, r->sorted, grad_f32(t, r->rows), c, false);
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
