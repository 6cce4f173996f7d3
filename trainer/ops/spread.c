/* spread: see spread.h. What is cut by tokens has equal slices of ceil(N / ranks) rows on all ranks: rows behind the
 * N-th are zero and have no gradient, so that shapes, and with them memory, depend on N alone. */
#include "trainer/ops/spread.h"

#include "comm/ordered.h"
#include "trainer/ops/op.h"
#include "trainer/ops/rank_sums.h"

struct crossing {
    struct tape_record base;
    struct tensor *from, *to;
    size_t elems, slice; /* of the whole; of a rank */
};

bool cut_along(const struct tensor *w, int dim)
{
    return w->cut && w->cut->dim == dim;
}

bool same_cut(const struct tensor_cut *a, const struct tensor_cut *b)
{
    if (!a || !b)
        return !a && !b;
    return a->dim == b->dim && a->first == b->first && a->count == b->count && a->total == b->total;
}

const char *cut_misfit(const struct tape *t, const struct tensor *w, unsigned dims)
{
    if (!w->cut)
        return NULL;
    if (!t->tp)
        return "the weight is cut over ranks, the tape is not spread over any";
    return dims >> w->cut->dim & 1 ? NULL : "a weight cut along this dimension is of no use here";
}

/* Rows of a rank's slice. */
static int64_t slice_rows(const struct tape *t, int64_t rows)
{
    return (int64_t)ordered_slice(t->tp, (size_t)rows);
}

/* Room for the sum of `rows` rows of c floats; backward finds it on the tape. */
static bool take_room(struct tape *t, int64_t rows, int64_t c)
{
    int64_t floats = (int64_t)ordered_room(t->tp, (size_t)(slice_rows(t, rows) * c));
    if (t->room_floats < floats) {
        t->room = take_floats(t, floats);
        t->room_floats = floats;
    }
    return !t->error;
}

/* This rank's slice of a whole. */
static float *own_slice(const struct tape *t, const struct crossing *r, float *whole, int64_t *elems)
{
    size_t begin = (size_t)t->tp->rank * r->slice, left = begin < r->elems ? r->elems - begin : 0;
    *elems = (int64_t)(left < r->slice ? left : r->slice);
    return whole + (r->elems - left);
}

static void failed(struct tape *t, status *st)
{
    if (st)
        tape_fail(t, status_wrap(st, "tensor-parallel exchange"));
}

/* ---- into cut weights ---- */

static void enter_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct crossing *r = (const void *)base;
    int64_t own = (int64_t)r->elems;
    const struct ordered_at at = rank_sums_at(t->compute);
    if (!INPUT_HALF(halves) || t->error)
        return;
    float *dy = grad_f32(t, r->to), *sum = dy;
    if (r->from->cut_rows) {
        sum = own_slice(t, r, sum, &own);
        failed(t, ordered_reduce_scatter(t->tp, dy, r->elems, r->slice, sum, t->room, &at));
    } else {
        failed(t, ordered_allreduce(t->tp, sum, r->elems, t->room, &at));
    }
    t->kernels->axpy(t->workers, grad_f32(t, r->from), sum, 1.0f, own);
}

/* x itself with another gradient, or the gathered rows. */
static struct tensor *inside_of(struct tape *t, struct tensor *x, int64_t rows, int64_t c)
{
    if (x->cut_rows)
        return make(t, 2, (int64_t[]){ rows, c }, learns(t, x));
    return twin(t, x);
}

struct tensor *tp_enter(struct tape *t, struct tensor *x)
{
    if (t->inside && t->outside == x)
        return t->inside;
    t->outside = x;
    t->inside = NULL;
    if (x->cut_rows || x->low_grad)
        x = as_f32(t, x);
    if (!x)
        return NULL;
    int64_t rows = x->cut_rows ? x->cut_rows : x->dim[0], c = x->dim[1];
    struct tensor *y = inside_of(t, x, rows, c);
    if (!y || (y->grad && !take_room(t, rows, c)))
        return NULL;
    size_t elems = (size_t)(rows * c), slice = (size_t)(slice_rows(t, rows) * c);
    const struct ordered_at at = rank_sums_at(t->compute);
    if (x->cut_rows && runs(t))
        failed(t, ordered_allgather(t->tp, x->data, elems, slice, y->data, &at));
    struct crossing *r = y->grad ? record(t, sizeof *r, enter_backward) : NULL;
    if (r) {
        r->from = x;
        r->to = y;
        r->elems = elems;
        r->slice = slice;
        r->base.look = (struct tape_look){ "sum over tensor-parallel ranks", { x }, { NULL } };
    }
    t->inside = t->error ? NULL : y;
    return t->inside;
}

struct tensor *op_enter(struct tape *t, struct tensor *x, const struct tensor *w)
{
    if (!x || !w)
        return missing(t, "op_enter");
    if (x->ndim != 2 || !is_activation(t, x))
        return misfit(t, "op_enter", "x is f32 [N, K]", x, NULL);
    return cut_along(w, 0) ? tp_enter(t, x) : x;
}

struct tensor *op_boundary(struct tape *t, int64_t tokens, int64_t c)
{
    bool cut = t->tp && t->sequence;
    struct tensor *x = make(t, 2, (int64_t[]){ cut ? slice_rows(t, tokens) : tokens, c }, true);
    if (x && cut)
        x->cut_rows = tokens;
    if (x && runs(t))
        clear_grad(t, x); /* others read it */
    return x;
}

struct tensor *op_outgoing(struct tape *t, struct tensor *x)
{
    if (!x)
        return missing(t, "op_outgoing");
    if (!x->grad && t->mode != TAPE_FORWARD)
        x->grad = take_floats(t, tensor_elems(x));
    return t->error ? NULL : x;
}

struct tensor *op_whole(struct tape *t, struct tensor *x)
{
    if (!x)
        return missing(t, "op_whole");
    if (!x->cut_rows)
        return x;
    if (t->mode == TAPE_TRAIN)
        return tape_fail(t, ERR(INVALID, "op_whole: it has no backward"));
    return tp_enter(t, x);
}

/* ---- out of cut weights ---- */

static void leave_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct crossing *r = (const void *)base;
    const struct ordered_at at = rank_sums_at(t->compute);
    if (INPUT_HALF(halves) && !t->error) /* nothing else has a gradient for `from` */
        failed(t, ordered_allgather(t->tp, grad_f32(t, r->to), r->elems, r->slice, grad_over(r->from), &at));
}

struct tensor *tp_leave(struct tape *t, struct tensor *y)
{
    int64_t rows = y->dim[0], c = y->dim[1], part = slice_rows(t, rows);
    size_t elems = (size_t)(rows * c), slice = (size_t)(part * c);
    const struct ordered_at at = rank_sums_at(t->compute);
    if (!take_room(t, rows, c))
        return NULL;
    if (!t->sequence) { /* backward: every rank has dy already */
        if (runs(t))
            failed(t, ordered_allreduce(t->tp, y->data, elems, t->room, &at));
        return done(t, "sum over tensor-parallel ranks", y, NULL);
    }
    struct tensor *z = make(t, 2, (int64_t[]){ part, c }, y->grad != NULL);
    if (!z)
        return NULL;
    z->cut_rows = rows;
    if (runs(t)) {
        t->kernels->zero(t->workers, z->data, part * c);
        failed(t, ordered_reduce_scatter(t->tp, y->data, elems, slice, z->data, t->room, &at));
    }
    struct crossing *r = z->grad ? record(t, sizeof *r, leave_backward) : NULL;
    if (r) {
        r->from = y;
        r->to = z;
        r->elems = elems;
        r->slice = slice;
        r->base.look = (struct tape_look){ "gather over tensor-parallel ranks", { y }, { NULL } };
    }
    return done(t, "sum over tensor-parallel ranks", z, NULL);
}
