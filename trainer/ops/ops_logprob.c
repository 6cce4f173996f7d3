/* ops_logprob: from hidden states and the output matrix to log-probabilities of tokens, or to logits. */
#include "ckpt/layout.h"
#include "trainer/ops/op.h"
#include "trainer/ops/spread.h"

/* Tokens of a chunk, and logits of one (32 MiB), at most; and logits that are kept for backward at most (256 MiB), all
 * or none. */
enum { LOGPROB_CHUNK = 128, LOGPROB_ELEMS = 8 << 20, LOGPROB_KEPT = 64 << 20 };

struct logprob_record {
    struct tape_record base;
    struct tensor *x, *w, *y;
    struct logprob p;
};

static void logprob_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct logprob_record *r = (const void *)base;
    struct logprob p = r->p;
    p.dlogp = grad_f32(t, r->y);
    p.dx = INPUT_HALF(halves) && r->x->grad ? grad_f32(t, r->x) : NULL;
    p.dw = WEIGHT_HALF(halves) ? r->w->grad : NULL;
    if (p.dx || p.dw)
        t->kernels->logprob_bwd(t->workers, &p);
}

/* Whether backward finds the logits of all tokens. A cap on activations is not there to be filled with them. */
static bool keeps_logits(const struct tape *t, const struct logprob *p)
{
    size_t cap = t->arena.cap_bytes / 4 / sizeof(float);
    int64_t most = cap && cap < LOGPROB_KEPT ? (int64_t)cap : LOGPROB_KEPT;
    return p->n <= most / (p->v > 0 ? p->v : 1);
}

static bool take_logprob_scratch(struct tape *t, struct logprob *p, bool train)
{
    int64_t chunk = LOGPROB_ELEMS / (p->v > 0 ? p->v : 1);
    chunk = chunk < 1 ? 1 : chunk > LOGPROB_CHUNK ? LOGPROB_CHUNK : chunk;
    bool keep = train && keeps_logits(t, p);
    p->bf16 = t->bf16;
    p->chunk = chunk < p->n && !keep ? chunk : p->n;
    p->kept = keep ? take(t, 1, sizeof *p->kept) : NULL;
    p->lse = take_floats(t, p->n);
    p->rows = take_floats(t, p->chunk * p->c);
    p->drows = train ? take_floats(t, p->chunk * p->c) : NULL;
    p->logits = take_floats(t, p->chunk * p->v);
    p->index = take_there(t, (size_t)p->chunk, sizeof *p->index);
    if (p->kept)
        *p->kept = LOGPROB_NOTHING;
    return !t->error;
}

/* What the ranks tell each other of each token: all of it, this rank's at its place. */
static bool take_parts(struct tape *t, struct logprob *p)
{
    p->parts = t->tp->size;
    p->own = t->tp->rank;
    p->part = take_there(t, (size_t)p->parts * (size_t)p->n, sizeof *p->part);
    return p->part != NULL;
}

static void exchange_parts(struct tape *t, const struct logprob *p)
{
    size_t n = (size_t)p->n;
    status *st =
        comm_allgather(t->tp, p->part + (size_t)p->own * n, p->part, n * sizeof *p->part, compute_stream(t->compute));
    if (st)
        tape_fail(t, status_wrap(st, "op_logprob: parts of %lld tokens", (long long)p->n));
    else
        t->kernels->logprob_merge(t->workers, p);
}

static bool take_logprob_stats(struct tape *t, int64_t n, struct logprob_stats *s)
{
    *s = (struct logprob_stats){ take_floats(t, n), take_floats(t, n), take_floats(t, n), take_floats(t, n) };
    return !t->error;
}

struct tensor *op_logprob(struct tape *t, struct tensor *x, struct tensor *w, const int32_t *target, float temperature)
{
    return op_logprob_stats(t, x, w, target, temperature, NULL);
}

struct tensor *op_logprob_stats(struct tape *t, struct tensor *x, struct tensor *w, const int32_t *target,
                                float temperature, struct logprob_stats *stats)
{
    if (!x || !w)
        return missing(t, "op_logprob");
    if (x->ndim != 2 || w->ndim != 2 || x->dim[1] != w->dim[1] || w->dim[0] < 1 || !is_activation(t, x) ||
        !is_weight(w))
        return misfit(t, "op_logprob", "x is f32 [N, C], w [V, C]", x, w);
    if (!(temperature > 0))
        return tape_fail(t, ERR(INVALID, "op_logprob: temperature %g is not above 0", (double)temperature));
    const char *why = cut_misfit(t, w, 1);
    if (why)
        return misfit(t, "op_logprob", why, x, w);
    if (x->low_grad && !(x = as_f32(t, x)))
        return NULL;
    if (w->cut && !(x = tp_enter(t, x)))
        return NULL;
    int64_t n = x->dim[0], vocab = w->cut ? w->cut->total : w->dim[0];
    for (int64_t i = 0; runs(t) && i < n; i++)
        if (target[i] >= vocab)
            return tape_fail(t, ERR(INVALID, "op_logprob: token %lld has target %d, the vocabulary has %lld",
                                    (long long)i, target[i], (long long)vocab));
    target = on_device(t, target, n);
    struct tensor *y = make(t, 1, &n, learns(t, x) || learns(t, w));
    struct logprob p = { .n = n,
                         .c = x->dim[1],
                         .v = w->cut ? w->cut->count : vocab,
                         .first = w->cut ? w->cut->first : 0,
                         .vocab = vocab,
                         .x = x->data,
                         .x_low = is_low(x),
                         .w = w->data,
                         .w_dtype = w->dtype,
                         .target = target,
                         .temperature = temperature };
    if (!y || !take_logprob_scratch(t, &p, y->grad != NULL) || (stats && !take_logprob_stats(t, n, &p.stats)) ||
        (w->cut && !take_parts(t, &p)))
        return NULL;
    if (stats)
        *stats = p.stats;
    p.logp = y->data;
    if (runs(t))
        t->kernels->logprob(t->workers, &p);
    if (runs(t) && w->cut)
        exchange_parts(t, &p);
    struct logprob_record *r = y->grad ? record(t, sizeof *r, logprob_backward) : NULL;
    if (r) {
        r->x = x;
        r->w = w;
        r->y = y;
        r->p = p;
        r->base.look = (struct tape_look){ "op_logprob", { x }, { w } };
    }
    return done(t, "op_logprob", y, w);
}

/* ---- logits ---- */

/* Columns of every rank, one rank's [N, count] after another's, go to their places in y. */
static void place_columns(struct tape *t, const struct tensor_cut *cut, const float *from, size_t stride,
                          struct tensor *y)
{
    for (int r = 0; r < t->tp->size; r++, from += stride) {
        uint64_t begin, end;
        layout_cut((uint64_t)cut->total, (uint64_t)t->tp->size, (uint64_t)r, &begin, &end);
        for (int64_t i = 0; i < y->dim[0]; i++)
            copy_there(t, (float *)y->data + i * cut->total + (int64_t)begin, from + (uint64_t)i * (end - begin),
                       (end - begin) * sizeof(float));
    }
}

struct tensor *op_logits(struct tape *t, struct tensor *x, struct tensor *w)
{
    if (!x || !w)
        return missing(t, "op_logits");
    if (!w->cut)
        return linear_f32(t, x, w);
    if (x->ndim != 2 || w->ndim != 2 || x->dim[1] != w->dim[1] || !is_activation(t, x) || !is_weight(w))
        return misfit(t, "op_logits", "x is f32 [N, C], w [V, C]", x, w);
    const char *why = t->mode == TAPE_TRAIN ? "a cut weight has no backward here" : cut_misfit(t, w, 1);
    if (why)
        return misfit(t, "op_logits", why, x, w);
    x = op_whole(t, x);
    int64_t n = x ? x->dim[0] : 0;
    struct tensor *y = make(t, 2, (int64_t[]){ n, w->cut->total }, false);
    size_t stride = (size_t)(n * w->dim[0]); /* padding included: the same on all ranks */
    float *all = take_floats(t, t->tp->size * n * w->dim[0]);
    if (t->error || !runs(t))
        return t->error ? NULL : y;
    float *own = all + (size_t)t->tp->rank * stride;
    t->kernels->zero(t->workers, own, (int64_t)stride);
    t->kernels->gemm(t->workers, &(struct gemm){ .m = n,
                                                 .n = w->cut->count,
                                                 .k = x->dim[1],
                                                 .a = x->data,
                                                 .a_low = is_low(x),
                                                 .lda = x->dim[1],
                                                 .b = w->data,
                                                 .b_dtype = w->dtype,
                                                 .ldb = x->dim[1],
                                                 .b_trans = true,
                                                 .c = own,
                                                 .ldc = w->cut->count,
                                                 .bf16 = t->bf16 });
    status *st = comm_allgather(t->tp, own, all, stride * sizeof *own, compute_stream(t->compute));
    if (st)
        return tape_fail(t, status_wrap(st, "op_logits"));
    place_columns(t, w->cut, all, stride, y);
    return done(t, "op_logits", y, w);
}
