/* ops: shape checks, memory and records around the kernels. Each op reads: check, take memory, compute (not in a dry
 * pass), record; its backward stands above it.
 *
 * Invariants: a dry pass takes exactly the memory of a training pass, so kernels and backward never allocate; an op
 * records itself only if its output has a gradient; what backward reads lives in the arena, in parameters, or in what
 * the caller keeps (ids, segments). */
#include "trainer/ops/context.h"
#include "trainer/ops/op.h"
#include "trainer/ops/spread.h"

struct tensor *op_new(struct tape *t, int ndim, const int64_t *dim, bool with_grad)
{
    if (ndim < 1 || ndim > TENSOR_DIMS)
        return tape_fail(t, ERR(INVALID, "op_new: %d dimensions", ndim));
    struct tensor *x = make(t, ndim, dim, with_grad);
    if (x && runs(t)) {
        t->kernels->zero(t->workers, x->data, tensor_elems(x));
        clear_grad(t, x);
    }
    return x;
}

/* ---- from bf16 ---- */

struct cast_record {
    struct tape_record base;
    struct tensor *x, *y;
};

static void cast_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct cast_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        t->kernels->convert(t->workers, grad_to(t, r->x), grad_of(t, r->y), tensor_elems(r->y));
}

struct tensor *as_f32(struct tape *t, struct tensor *x)
{
    if (!x || !is_low(x))
        return x;
    struct tensor *y = make_like(t, x, learns(t, x), false);
    if (!y)
        return NULL;
    if (runs(t))
        t->kernels->convert(t->workers, (struct array){ .at = y->data, .fresh = true }, data_of(x), tensor_elems(x));
    struct cast_record *r = y->grad ? record(t, sizeof *r, cast_backward) : NULL;
    if (r) {
        r->x = x;
        r->y = y;
        r->base.look = (struct tape_look){ "widening", { x }, { NULL } };
    }
    return t->error ? NULL : y;
}

struct tensor *op_view(struct tape *t, struct tensor *x, int ndim, const int64_t *dim)
{
    if (!x)
        return missing(t, "op_view");
    struct tensor v = *x;
    v.ndim = ndim;
    v.owner = owner_of(x);
    v.cut = NULL;
    if (ndim < 1 || ndim > TENSOR_DIMS)
        return tape_fail(t, ERR(INVALID, "op_view: %d dimensions", ndim));
    memcpy(v.dim, dim, (size_t)ndim * sizeof *dim);
    for (int i = 0; i < ndim; i++)
        if (dim[i] < 0) {
            v.dim[i] = 1;
            v.dim[i] = tensor_elems(&v) > 0 ? tensor_elems(x) / tensor_elems(&v) : 0;
            break;
        }
    if (tensor_elems(&v) != tensor_elems(x))
        return misfit(t, "op_view", "not the same volume", x, &v);
    struct tensor *y = take(t, 1, sizeof *y);
    if (y)
        *y = v;
    return y;
}

/* ---- embedding ---- */

struct embedding_record {
    struct tape_record base;
    struct tensor *table, *y;
    const int32_t *id;
};

static void embedding_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct embedding_record *r = (const void *)base;
    if (WEIGHT_HALF(halves))
        t->kernels->embedding_bwd(t->workers, r->table->grad, grad_f32(t, r->y), r->id, r->y->dim[0], r->y->dim[1]);
}

/* Ids as rows of this rank's part; -1: of another's. */
static const int32_t *own_ids(struct tape *t, const struct tensor_cut *cut, const int32_t *id, int64_t n)
{
    int32_t *own = take(t, (size_t)n, sizeof *own);
    for (int64_t i = 0; own && runs(t) && i < n; i++)
        own[i] = id[i] >= cut->first && id[i] < cut->first + cut->count ? (int32_t)(id[i] - cut->first) : -1;
    return own;
}

struct tensor *op_embedding(struct tape *t, struct tensor *table, const int32_t *id, int64_t n)
{
    if (!table)
        return missing(t, "op_embedding");
    if (table->ndim != 2 || !is_weight(table))
        return misfit(t, "op_embedding", "a table is [V, C]", table, NULL);
    const char *why = cut_misfit(t, table, 1);
    if (why)
        return misfit(t, "op_embedding", why, table, NULL);
    int64_t rows = table->cut ? table->cut->total : table->dim[0];
    for (int64_t i = 0; runs(t) && i < n; i++)
        if (id[i] < 0 || id[i] >= rows)
            return tape_fail(t, ERR(INVALID, "op_embedding: token %lld has id %d, the table has %lld rows",
                                    (long long)i, id[i], (long long)rows));
    if (table->cut)
        id = own_ids(t, table->cut, id, n);
    id = on_device(t, id, n);
    struct tensor *y = make(t, 2, (int64_t[]){ n, table->dim[1] }, learns(t, table));
    if (!y)
        return NULL;
    if (runs(t))
        t->kernels->embedding(t->workers, y->data, table->data, table->dtype, id, n, table->dim[1]);
    struct embedding_record *r = y->grad ? record(t, sizeof *r, embedding_backward) : NULL;
    if (r) {
        r->table = table;
        r->y = y;
        r->id = id;
        r->base.look = (struct tape_look){ "op_embedding", { NULL }, { table } };
    }
    y = done(t, "op_embedding", y, table);
    return y && table->cut ? tp_leave(t, y) : y;
}

/* ---- rmsnorm ---- */

struct rmsnorm_record {
    struct tape_record base;
    struct tensor *x, *w, *y;
    const float *weight; /* w as f32 */
    float *rrms;         /* [rows] */
    int64_t rows, c;
};

static void rmsnorm_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct rmsnorm_record *r = (const void *)base;
    if (INPUT_HALF(halves) && r->x->grad)
        t->kernels->rmsnorm_bwd(t->workers, grad_to(t, r->x), grad_of(t, r->y), data_of(r->x), r->weight, r->rrms,
                                r->rows, r->c);
    if (WEIGHT_HALF(halves) && r->w->grad)
        t->kernels->rmsnorm_bwd_weight(t->workers, r->w->grad, grad_of(t, r->y), data_of(r->x), r->rrms, r->rows, r->c);
}

struct tensor *op_rmsnorm(struct tape *t, struct tensor *x, struct tensor *w, float eps)
{
    if (!x || !w)
        return missing(t, "op_rmsnorm");
    if (x->ndim < 1 || w->ndim != 1 || x->dim[x->ndim - 1] != w->dim[0] || w->dim[0] < 1 || !is_activation(t, x) ||
        !is_weight(w))
        return misfit(t, "op_rmsnorm", "x is f32 [..., C], w [C]", x, w);
    int64_t c = w->dim[0], rows = tensor_elems(x) / c;
    /* several products add to its gradient, which therefore stays f32 */
    struct tensor *y = make_of(t, x->ndim, x->dim, learns(t, x) || learns(t, w), t->low, false);
    float *rrms = take_floats(t, rows);
    const float *weight = widened(t, w);
    if (t->error)
        return NULL;
    y->cut_rows = x->cut_rows;
    if (runs(t))
        t->kernels->rmsnorm(t->workers, data_of(y), rrms, data_of(x), weight, rows, c, eps);
    struct rmsnorm_record *r = y->grad ? record(t, sizeof *r, rmsnorm_backward) : NULL;
    if (r) {
        r->x = x;
        r->w = w;
        r->y = y;
        r->weight = weight;
        r->rrms = rrms;
        r->rows = rows;
        r->c = c;
        r->base.look = (struct tape_look){ "op_rmsnorm", { x }, { w } };
    }
    return done(t, "op_rmsnorm", y, w);
}

/* ---- rope ---- */

struct rope_table {
    struct rope_table *next;
    const int32_t *position;
    int64_t n, d;
    struct rope how;
    float *angles; /* [N, D] */
};

struct rope_record {
    struct tape_record base;
    struct tensor *x, *y;
    const float *angles;
};

static bool same_number(double a, double b)
{
    return !memcmp(&a, &b, sizeof a);
}

static bool same_rope(const struct rope *a, const struct rope *b)
{
    if (a->scaling != b->scaling || !same_number(a->theta, b->theta))
        return false;
    return a->scaling == ROPE_NONE ||
           (same_number(a->factor, b->factor) && same_number(a->original, b->original) && same_number(a->low, b->low) &&
            same_number(a->high, b->high) && same_number(a->beta_fast, b->beta_fast) &&
            same_number(a->beta_slow, b->beta_slow) && same_number(a->amplitude, b->amplitude));
}

/* The angles for these positions: made by the first rope of a pass, shared by the rest. */
static const float *rope_angles(struct tape *t, const int32_t *position, int64_t n, int64_t d, const struct rope *how)
{
    for (const struct rope_table *r = t->rope; r; r = r->next)
        if (r->position == position && r->n == n && r->d == d && same_rope(&r->how, how))
            return r->angles;
    struct rope_table *r = take(t, 1, sizeof *r);
    float *angles = take_floats(t, n * d);
    double *frequency = take(t, (size_t)(d / 2), sizeof *frequency);
    if (t->error)
        return NULL;
    double amplitude = rope_frequencies(how, d, frequency);
    const int32_t *there = on_device(t, position, n);
    if (runs(t) && !t->error)
        t->kernels->rope_table(t->workers, angles, there, n, d, frequency, amplitude);
    *r = (struct rope_table){ t->rope, position, n, d, *how, angles };
    t->rope = r;
    return angles;
}

void op_rope_angles(struct tape *t, const int32_t *position, int64_t n, int64_t d, const struct rope *how)
{
    if (!t->error)
        (void)rope_angles(t, position, n, d, how);
}

static void rope_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct rope_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        t->kernels->rope_bwd(t->workers, grad_to(t, r->x), grad_of(t, r->y), r->angles, r->x->dim[0], r->x->dim[1],
                             r->x->dim[2]);
}

struct tensor *op_rope(struct tape *t, struct tensor *x, const int32_t *position, const struct rope *how)
{
    if (!x)
        return missing(t, "op_rope");
    if (x->ndim != 3 || x->dim[2] % 2 || !is_activation(t, x))
        return misfit(t, "op_rope", "x is f32 [N, H, D], D even", x, NULL);
    struct tensor *y = make_like(t, x, learns(t, x), is_low(x));
    const float *angles = y ? rope_angles(t, position, x->dim[0], x->dim[2], how) : NULL;
    if (!angles)
        return NULL;
    if (runs(t))
        t->kernels->rope(t->workers, data_of(y), data_of(x), angles, x->dim[0], x->dim[1], x->dim[2]);
    struct rope_record *r = y->grad ? record(t, sizeof *r, rope_backward) : NULL;
    if (r) {
        r->x = x;
        r->y = y;
        r->angles = angles;
        r->base.look = (struct tape_look){ "op_rope", { x }, { NULL } };
    }
    return done(t, "op_rope", y, NULL);
}

/* ---- attention ---- */

struct attention_record {
    struct tape_record base;
    struct tensor *q, *k, *v, *o;
    const struct segments *seg;
    struct segments there; /* as kernels see them */
    int64_t window;
    float *lse;
};

static struct segments segments_there(struct tape *t, const struct segments *seg, int64_t n)
{
    struct segments there = *seg;
    there.offset = on_device(t, seg->offset, seg->count + 1);
    there.position = on_device(t, seg->position, n);
    return there;
}

void op_segments(struct tape *t, const struct segments *seg, int64_t n)
{
    if (!t->error)
        (void)segments_there(t, seg, n);
    context_prepare(t, n);
}

static struct attention attention_of(const struct tape *t, const struct tensor *q, const struct tensor *k,
                                     const struct tensor *v, const struct segments *seg)
{
    return (struct attention){ .n = q->dim[0],
                               .heads = (int)q->dim[1],
                               .kv_heads = (int)k->dim[1],
                               .head_dim = (int)q->dim[2],
                               .seg = seg,
                               .q = q->data,
                               .k = k->data,
                               .v = v->data,
                               .bf16 = t->bf16,
                               .low = is_low(q) };
}

static void attention_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct attention_record *r = (const void *)base;
    if (!INPUT_HALF(halves))
        return;
    struct attention a = attention_of(t, r->q, r->k, r->v, r->seg);
    a.window = r->window;
    a.o = r->o->data;
    a.lse = r->lse;
    a.d_o = grad_of(t, r->o).at;
    a.fresh = !at_home(t) && !t->context && is_fresh(r->q) && is_fresh(r->k) && is_fresh(r->v);
    a.dq = a.fresh ? grad_to(t, r->q).at : grad_of(t, r->q).at;
    a.dk = a.fresh ? grad_to(t, r->k).at : grad_of(t, r->k).at;
    a.dv = a.fresh ? grad_to(t, r->v).at : grad_of(t, r->v).at;
    if (t->context) {
        context_keys(t, r->k, r->v, &a);
        context_gradients(t, r->k, r->v, &a);
    }
    if (t->error)
        return;
    a.seg = &r->there;
    t->kernels->attention_bwd(t->workers, &a);
    a.seg = r->seg;
    if (t->context)
        context_sum(t, r->k, r->v, &a);
}

static status *check_segments(const struct tape *t, const struct segments *seg, int64_t n)
{
    if (t->context)
        return context_check(t, seg, n);
    if (seg->offset[0] != 0 || seg->offset[seg->count] != n)
        return ERR(INVALID, "op_attention: %d segments run from %d to %d, the pack has %lld tokens", seg->count,
                   seg->offset[0], seg->offset[seg->count], (long long)n);
    for (int32_t s = 0; s < seg->count; s++) {
        if (seg->offset[s + 1] < seg->offset[s])
            return ERR(INVALID, "op_attention: segment %d ends before it starts", s);
        for (int32_t i = seg->offset[s] + 1; seg->position && i < seg->offset[s + 1]; i++)
            if (seg->position[i] <= seg->position[i - 1])
                return ERR(INVALID, "op_attention: position %d of token %d in segment %d does not ascend",
                           seg->position[i], i, s);
    }
    return NULL;
}

static status *check_cache(const struct tape *t, const struct kv_cache *c, const struct tensor *k,
                           const struct segments *seg)
{
    if (t->mode == TAPE_TRAIN || t->context)
        return ERR(INVALID, "op_attention: a cache in a %s", t->context ? "pack that ranks share" : "training pass");
    if (c->kv_heads != k->dim[1] || c->head_dim != k->dim[2])
        return ERR(INVALID, "op_attention: the cache has [%d, %d], k %s", c->kv_heads, c->head_dim, text_of(k).s);
    if (!runs(t))
        return NULL;
    if (c->segments != seg->count)
        return ERR(INVALID, "op_attention: the cache has %d segments, the pack %d", c->segments, seg->count);
    for (int32_t s = 0; s < seg->count; s++)
        if (c->len[s] + (seg->offset[s + 1] - seg->offset[s]) > c->cap)
            return ERR(INVALID, "op_attention: %d + %d tokens of segment %d do not fit in a cache of %d", c->len[s],
                       seg->offset[s + 1] - seg->offset[s], s, c->cap);
    return NULL;
}

/* k and v go behind what the cache holds; a->past says how much that was. */
static void append(struct tape *t, struct kv_cache *c, const struct segments *seg, int32_t *past, struct attention *a)
{
    int64_t row = (int64_t)c->kv_heads * c->head_dim;
    for (int32_t s = 0; s < seg->count; s++) {
        int64_t from = seg->offset[s], count = seg->offset[s + 1] - from, to = (int64_t)s * c->cap + c->len[s];
        copy_there(t, c->k + to * row, (const float *)a->k + from * row, (size_t)(count * row) * sizeof(float));
        copy_there(t, c->v + to * row, (const float *)a->v + from * row, (size_t)(count * row) * sizeof(float));
        past[s] = c->len[s];
        c->len[s] += (int32_t)count;
    }
    a->k = c->k;
    a->v = c->v;
    a->past = on_device(t, past, c->segments);
    a->cap = c->cap;
}

static const char *attention_misfit(const struct tensor *q, const struct tensor *k, const struct tensor *v)
{
    if (q->ndim != 3 || k->ndim != 3 || !same_shape(k, v) || q->dtype != k->dtype || q->dtype != v->dtype)
        return "q is f32 [N, H, D], k and v f32 [N, G, D]";
    if (q->dim[0] != k->dim[0] || q->dim[2] != k->dim[2] || k->dim[1] < 1 || q->dim[1] % k->dim[1])
        return "equal N and D are needed, and H a multiple of G";
    if (q->dim[2] < 1 || q->dim[2] > ATTENTION_HEAD_MAX)
        return "heads have 1 to 256 elements";
    return NULL;
}

/* In bf16, with such a gradient if any. */
static bool lows(const struct tensor *x)
{
    return is_low(x) && (!x->grad || x->low_grad);
}

struct tensor *op_attention(struct tape *t, struct tensor *q, struct tensor *k, struct tensor *v,
                            const struct segments *seg, int64_t window, struct kv_cache *cache)
{
    if (!q || !k || !v)
        return missing(t, "op_attention");
    if (!is_activation(t, q) || !is_activation(t, k) || !is_activation(t, v))
        return misfit(t, "op_attention", "q is f32 [N, H, D], k and v f32 [N, G, D]", q, is_f32(k) ? v : k);
    if (cache || t->context || !lows(q) || !lows(k) || !lows(v)) { /* all of one type */
        q = as_f32(t, q);
        k = as_f32(t, k);
        v = as_f32(t, v);
        if (t->error)
            return NULL;
    }
    const char *why = attention_misfit(q, k, v);
    if (why)
        return misfit(t, "op_attention", why, q, same_shape(k, v) ? k : v);
    status *st = runs(t) ? check_segments(t, seg, q->dim[0]) : NULL;
    if (!st && cache)
        st = check_cache(t, cache, k, seg);
    if (st)
        return tape_fail(t, st);
    struct tensor *o = make_like(t, q, learns(t, q) || learns(t, k) || learns(t, v), is_low(q));
    float *lse = o && o->grad ? take_floats(t, q->dim[0] * q->dim[1]) : NULL;
    int32_t *past = cache ? take(t, (size_t)cache->segments, sizeof *past) : NULL;
    if (cache && !runs(t))
        (void)on_device(t, past, cache->segments);
    struct segments there = segments_there(t, seg, q->dim[0]);
    if (t->error || (t->context && !context_room(t, k)))
        return NULL;
    struct attention a = attention_of(t, q, k, v, seg);
    a.window = window;
    a.o = o->data;
    a.lse = lse;
    if (cache && runs(t))
        append(t, cache, seg, past, &a);
    if (t->context && runs(t))
        context_keys(t, k, v, &a);
    a.seg = &there;
    if (runs(t) && !t->error)
        t->kernels->attention(t->workers, &a);
    struct attention_record *r = o->grad ? record(t, sizeof *r, attention_backward) : NULL;
    if (r) {
        r->q = q;
        r->k = k;
        r->v = v;
        r->o = o;
        r->seg = seg;
        r->there = there;
        r->window = window;
        r->lse = lse;
        r->base.look = (struct tape_look){ "op_attention", { q, k, v }, { NULL } };
    }
    return done(t, "op_attention", o, NULL);
}

/* ---- elementwise and sums ---- */

struct elementwise_record {
    struct tape_record base;
    struct tensor *a, *b, *y;
    float s;
};

static struct tensor *push(struct tape *t, const char *op, struct tensor *a, struct tensor *b, struct tensor *y,
                           float s, void (*backward)(struct tape *, const struct tape_record *, unsigned))
{
    struct elementwise_record *r = y->grad ? record(t, sizeof *r, backward) : NULL;
    if (r) {
        r->a = a;
        r->b = b;
        r->y = y;
        r->s = s;
        r->base.look = (struct tape_look){ op, { a, b }, { NULL } };
    }
    return done(t, op, y, NULL);
}

static void swiglu_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct elementwise_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        t->kernels->swiglu_bwd(t->workers, grad_to(t, r->a), grad_to(t, r->b), grad_of(t, r->y), data_of(r->a),
                               data_of(r->b), tensor_elems(r->y));
}

struct tensor *op_swiglu(struct tape *t, struct tensor *gate, struct tensor *up)
{
    if (!gate || !up)
        return missing(t, "op_swiglu");
    if (!same_shape(gate, up) || !is_activation(t, gate) || !is_activation(t, up))
        return misfit(t, "op_swiglu", "two f32 tensors of one shape are needed", gate, up);
    struct tensor *y = make_like(t, gate, learns(t, gate) || learns(t, up), is_low(gate) && is_low(up));
    if (!y)
        return NULL;
    if (runs(t))
        t->kernels->swiglu(t->workers, data_of(y), data_of(gate), data_of(up), tensor_elems(y));
    return push(t, "op_swiglu", gate, up, y, 0, swiglu_backward);
}

static void add_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct elementwise_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        add_grad(t, r->a, r->y, 1.0f);
    if (INPUT_HALF(halves))
        add_grad(t, r->b, r->y, 1.0f);
}

struct tensor *op_add(struct tape *t, struct tensor *a, struct tensor *b)
{
    if (!a || !b)
        return missing(t, "op_add");
    if (!same_shape(a, b) || !is_activation(t, a) || !is_activation(t, b))
        return misfit(t, "op_add", "two f32 tensors of one shape are needed", a, b);
    a = as_f32(t, a);
    b = as_f32(t, b);
    struct tensor *y = a && b ? make_like(t, a, learns(t, a) || learns(t, b), false) : NULL;
    if (!y)
        return NULL;
    if (runs(t))
        t->kernels->add(t->workers, y->data, a->data, b->data, tensor_elems(y));
    return push(t, "op_add", a, b, y, 0, add_backward);
}

static void scale_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct elementwise_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        add_grad(t, r->a, r->y, r->s);
}

struct tensor *op_scale(struct tape *t, struct tensor *x, float s)
{
    if (!x)
        return missing(t, "op_scale");
    if (!is_activation(t, x))
        return misfit(t, "op_scale", "an f32 tensor is needed", x, NULL);
    x = as_f32(t, x);
    struct tensor *y = x ? make_like(t, x, learns(t, x), false) : NULL;
    if (!y)
        return NULL;
    if (runs(t))
        t->kernels->scale(t->workers, y->data, x->data, s, tensor_elems(y));
    return push(t, "op_scale", x, NULL, y, s, scale_backward);
}

static void sum_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct elementwise_record *r = (const void *)base;
    if (INPUT_HALF(halves))
        t->kernels->add_scalar(t->workers, grad_f32(t, r->a), grad_f32(t, r->y), tensor_elems(r->a));
}

struct tensor *op_sum(struct tape *t, struct tensor *x)
{
    if (!x)
        return missing(t, "op_sum");
    if (!is_activation(t, x))
        return misfit(t, "op_sum", "an f32 tensor is needed", x, NULL);
    x = as_f32(t, x);
    if (!x)
        return NULL;
    int64_t n = tensor_elems(x);
    struct tensor *y = make(t, 1, (int64_t[]){ 1 }, learns(t, x));
    double *partial = take_there(t, (size_t)((n + SUM_BLOCK - 1) / SUM_BLOCK), sizeof *partial);
    if (t->error)
        return NULL;
    if (runs(t))
        t->kernels->sum(t->workers, y->data, x->data, n, partial);
    return push(t, "op_sum", x, NULL, y, 0, sum_backward);
}
