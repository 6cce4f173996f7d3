/* op: what the files of ops share: checks, memory of the arenas, records, what kernels read of the host. For op files
 * only. */
#ifndef TESSERA_TRAINER_OPS_OP_H
#define TESSERA_TRAINER_OPS_OP_H

#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/ops.h"
#include "trainer/ops/watch.h"

#include <stdio.h>
#include <string.h>

#define WEIGHT_HALF(halves) ((halves) & (unsigned)TAPE_BACKWARD_WEIGHT)
#define INPUT_HALF(halves)  ((halves) & (unsigned)TAPE_BACKWARD_INPUT)

struct shape_text {
    char s[96];
};

static inline struct shape_text text_of(const struct tensor *x)
{
    struct shape_text t;
    size_t used = (size_t)snprintf(t.s, sizeof t.s, "[");
    for (int i = 0; i < x->ndim; i++)
        used += (size_t)snprintf(t.s + used, sizeof t.s - used, "%s%lld", i ? ", " : "", (long long)x->dim[i]);
    snprintf(t.s + used, sizeof t.s - used, "]%s", x->dtype == DTYPE_F32 ? "" : dtype_name(x->dtype));
    return t;
}

/* "op_linear: x [4, 8] and w [3, 7]: why". b may be NULL. */
static inline struct tensor *misfit(struct tape *t, const char *op, const char *why, const struct tensor *a,
                                    const struct tensor *b)
{
    if (b)
        return tape_fail(t, ERR(INVALID, "%s: %s and %s: %s", op, text_of(a).s, text_of(b).s, why));
    return tape_fail(t, ERR(INVALID, "%s: %s: %s", op, text_of(a).s, why));
}

/* An input is missing: an earlier op failed, or the caller forgot it. */
static inline struct tensor *missing(struct tape *t, const char *op)
{
    return t->error ? NULL : tape_fail(t, ERR(INVALID, "%s: an input is NULL", op));
}

static inline bool same_shape(const struct tensor *a, const struct tensor *b)
{
    return a->ndim == b->ndim && !memcmp(a->dim, b->dim, (size_t)a->ndim * sizeof *a->dim) &&
           a->cut_rows == b->cut_rows;
}

static inline bool is_f32(const struct tensor *x)
{
    return x->dtype == DTYPE_F32;
}

/* Or bf16, where activations may be. */
static inline bool is_activation(const struct tape *t, const struct tensor *x)
{
    return x->dtype == DTYPE_F32 || (t->low && x->dtype == DTYPE_BF16);
}

static inline bool is_low(const struct tensor *x)
{
    return x->dtype == DTYPE_BF16;
}

static inline bool is_weight(const struct tensor *x)
{
    return x->dtype == DTYPE_F32 || x->dtype == DTYPE_BF16;
}

/* As kernels take them. */
static inline struct array data_of(const struct tensor *x)
{
    return (struct array){ .at = x->data, .low = x->dtype == DTYPE_BF16 };
}

static inline bool runs(const struct tape *t)
{
    return t->mode != TAPE_DRY;
}

/* Whether an output that depends on x gets a gradient. */
static inline bool learns(const struct tape *t, const struct tensor *x)
{
    return t->mode != TAPE_FORWARD && x && x->grad;
}

static inline void *take_from(struct tape *t, struct arena *a, size_t bytes)
{
    void *p = t->error ? NULL : arena_alloc(a, bytes);
    if (!p && !t->error)
        tape_fail(t,
                  ERR(NO_MEMORY, "%zu bytes of activations: %zu in use, cap %zu", bytes, a->used_bytes, a->cap_bytes));
    return p;
}

/* What the host writes and reads: records, descriptions, its own index arrays. */
static inline void *take(struct tape *t, size_t count, size_t bytes)
{
    return take_from(t, t->records, count * bytes);
}

/* What kernels write and read. On the CPU the same. */
static inline void *take_there(struct tape *t, size_t count, size_t bytes)
{
    return take_from(t, &t->arena, count * bytes);
}

static inline float *take_floats(struct tape *t, int64_t n)
{
    return take_there(t, (size_t)n, sizeof(float));
}

/* Where it is plain memory, nothing has to be copied between host and kernels. */
static inline bool at_home(const struct tape *t)
{
    return compute_host(t->compute);
}

/* dst and src where kernels see them. */
static inline void copy_there(struct tape *t, void *dst, const void *src, size_t bytes)
{
    status *st = t->error ? NULL : compute_copy(t->compute, dst, src, bytes);
    if (st)
        tape_fail(t, st);
}

/* From the host to where kernels see it, and back, which waits for all that is queued: only for what decides what is
 * done next, or how much. */
static inline void put_there(struct tape *t, void *there, const void *here, size_t bytes)
{
    status *st = t->error || there == here ? NULL : compute_put(t->compute, there, here, bytes);
    if (st)
        tape_fail(t, st);
}

static inline void get_here(struct tape *t, void *here, const void *there, size_t bytes)
{
    status *st = t->error || there == here ? NULL : compute_get(t->compute, here, there, bytes);
    if (st)
        tape_fail(t, st);
}

/* What kernels read of an index array of the host: itself, or a copy that all ops of this pass share. A dry pass takes
 * its memory and does not read it. NULL stays NULL. */
static inline const int32_t *on_device(struct tape *t, const int32_t *host, int64_t n)
{
    if (at_home(t) || !host)
        return host;
    for (const struct tape_copy *c = t->copies; c; c = c->next)
        if (c->host == host && c->n == n)
            return c->there;
    struct tape_copy *c = take(t, 1, sizeof *c);
    int32_t *there = take_there(t, (size_t)n, sizeof *there);
    if (t->error)
        return NULL;
    if (runs(t))
        put_there(t, there, host, (size_t)n * sizeof *there);
    *c = (struct tape_copy){ t->copies, host, n, there };
    t->copies = c;
    return there;
}

/* Memory for a gradient: inside a block that of all blocks, as far as a dry pass has seen that it is needed. */
static inline void *take_grad(struct tape *t, size_t bytes)
{
    if (!t->grads.open)
        return take_there(t, 1, bytes);
    size_t used = t->grads.used, end = used + (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    if (t->mode != TAPE_DRY && !t->grads.at && t->grads.bytes)
        t->grads.at = take_there(t, 1, t->grads.bytes);
    if (t->error || (t->mode != TAPE_DRY && end > t->grads.bytes))
        return take_there(t, 1, bytes);
    t->grads.used = end;
    t->grads.most = end > t->grads.most ? end : t->grads.most;
    return t->mode == TAPE_DRY ? (void *)t : t->grads.at + used; /* a dry pass writes to none */
}

/* A tensor with data not yet written, in bf16 or not, and a fresh gradient, if any, in bf16 or not. */
static inline struct tensor *make_of(struct tape *t, int ndim, const int64_t *dim, bool with_grad, bool low,
                                     bool low_grad)
{
    struct tensor *x = take(t, 1, sizeof *x);
    if (!x)
        return NULL;
    *x = (struct tensor){ .dtype = low ? DTYPE_BF16 : DTYPE_F32, .ndim = ndim, .low_grad = low_grad, .fresh = true };
    memcpy(x->dim, dim, (size_t)ndim * sizeof *dim);
    size_t n = (size_t)tensor_elems(x);
    x->data = take_there(t, n, low ? sizeof(uint16_t) : sizeof(float));
    if (with_grad && t->mode != TAPE_FORWARD)
        x->grad = take_grad(t, n * (low_grad ? sizeof(uint16_t) : sizeof(float)));
    return t->error ? NULL : x;
}

static inline struct tensor *make(struct tape *t, int ndim, const int64_t *dim, bool with_grad)
{
    return make_of(t, ndim, dim, with_grad, false, false);
}

static inline struct tensor *make_like(struct tape *t, const struct tensor *x, bool with_grad, bool low)
{
    struct tensor *y = make_of(t, x->ndim, x->dim, with_grad, low, low);
    if (y)
        y->cut_rows = x->cut_rows;
    return y;
}

/* x with a gradient of its own, f32; NULL: the tape has failed. */
static inline struct tensor *twin(struct tape *t, const struct tensor *x)
{
    struct tensor *y = take(t, 1, sizeof *y);
    if (!y)
        return NULL;
    *y = *x;
    y->owner = NULL;
    y->low_grad = false;
    y->fresh = true;
    y->grad = learns(t, x) ? take_grad(t, (size_t)tensor_elems(x) * sizeof(float)) : NULL;
    return t->error ? NULL : y;
}

/* x itself, or if it is bf16 an f32 tensor of its values, for ops that know f32 only. NULL stays NULL. */
struct tensor *as_f32(struct tape *t, struct tensor *x);
/* op_linear whose output is f32 in any case. */
struct tensor *linear_f32(struct tape *t, struct tensor *x, struct tensor *w);

/* ---- gradients, in backward. A fresh one stands for zeros. ---- */

static inline struct tensor *owner_of(struct tensor *x)
{
    return x->owner ? x->owner : x;
}

static inline bool is_fresh(struct tensor *x)
{
    return !x->grad || owner_of(x)->fresh;
}

static inline void clear_grad(struct tape *t, struct tensor *x)
{
    if (x->grad && x->fresh) /* zeros are the same in either type */
        t->kernels->zero(t->workers, x->grad, (tensor_elems(x) + x->low_grad) / (1 + x->low_grad));
    x->fresh = false;
}

/* To read, or to add to. */
static inline struct array grad_of(struct tape *t, struct tensor *x)
{
    struct tensor *own = owner_of(x);
    clear_grad(t, own);
    return (struct array){ .at = own->grad, .low = own->low_grad };
}

/* For a product, which adds to it or, if it is fresh, writes all of it. */
static inline struct array grad_product(struct tensor *x)
{
    struct tensor *own = owner_of(x);
    struct array dx = { .at = own->grad, .low = own->low_grad, .fresh = own->fresh };
    own->fresh = false;
    return dx;
}

/* The same for other kernels, of which the CPU's can only add. */
static inline struct array grad_to(struct tape *t, struct tensor *x)
{
    return at_home(t) ? grad_of(t, x) : grad_product(x);
}

/* As f32, of what is never bf16. */
static inline float *grad_f32(struct tape *t, struct tensor *x)
{
    return grad_of(t, x).at;
}

/* To write all of it, whatever was in it. */
static inline float *grad_over(struct tensor *x)
{
    struct tensor *own = owner_of(x);
    own->fresh = false;
    return own->grad;
}

/* x's gradient += s times y's, both f32. */
static inline void add_grad(struct tape *t, struct tensor *x, struct tensor *y, float s)
{
    if (!x->grad)
        return;
    const float *dy = grad_f32(t, y);
    if (is_fresh(x))
        t->kernels->scale(t->workers, grad_over(x), dy, s, tensor_elems(y));
    else
        t->kernels->axpy(t->workers, grad_f32(t, x), dy, s, tensor_elems(y));
}

/* A record of `bytes` with its first fields set, put on the tape once its op has filled it. NULL: the tape has failed.
 */
static inline void *record(struct tape *t, size_t bytes,
                           void (*backward)(struct tape *, const struct tape_record *, unsigned))
{
    struct tape_record *r = take(t, 1, bytes);
    if (!r)
        return NULL;
    memset(r, 0, bytes);
    r->prev = t->last;
    r->backward = backward;
    r->block = t->block;
    t->last = r;
    return r;
}

/* What an op returns: y, or NULL if the tape has failed, which it does if somebody looks and y is not finite. weight:
 * what y was made with, for the message, or NULL. */
static inline struct tensor *done(struct tape *t, const char *op, struct tensor *y, const struct tensor *weight)
{
    if (t->watch && y && !t->error && runs(t))
        watch_output(t, op, y, weight);
    return t->error ? NULL : y;
}

/* A small weight as f32: its data, or a widened copy in the arena. */
static inline const float *widened(struct tape *t, const struct tensor *x)
{
    if (is_f32(x))
        return x->data;
    float *y = take_floats(t, tensor_elems(x));
    if (y && runs(t))
        t->kernels->widen(t->workers, y, x->data, tensor_elems(x));
    return y;
}

#endif
