/* ops_linear: products with weights, whole or cut over tensor-parallel ranks, as they are or changed by a product of
 * low rank. */
#include "trainer/ops/op.h"
#include "trainer/ops/spread.h"

/* C [m, n] = A B, A [m, k] and B [k, n] stored so, or transposed: their rows' lengths follow. */
static void multiply(struct tape *t, int64_t m, int64_t n, int64_t k, struct gemm g)
{
    g.m = m;
    g.n = n;
    g.k = k;
    g.lda = g.a_trans ? m : k;
    g.ldb = g.b_trans ? k : n;
    g.ldc = n;
    g.bf16 = t->bf16;
    t->kernels->gemm(t->workers, &g);
}

/* ---- as they are ---- */

struct linear_record {
    struct tape_record base;
    struct tensor *x, *w, *b, *y;
};

static void linear_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct linear_record *r = (const void *)base;
    int64_t n = r->x->dim[0], k = r->x->dim[1], m = r->w->dim[0];
    if (INPUT_HALF(halves) && r->x->grad)
        multiply(
            t, n, k, m,
            (struct gemm){ .a = r->y->grad, .b = r->w->data, .b_dtype = r->w->dtype, .c = r->x->grad, .add = true });
    if (WEIGHT_HALF(halves) && r->w->grad)
        multiply(t, m, k, n,
                 (struct gemm){ .a = r->y->grad,
                                .a_trans = true,
                                .b = r->x->data,
                                .b_dtype = DTYPE_F32,
                                .c = r->w->grad,
                                .add = true });
    if (WEIGHT_HALF(halves) && r->b && r->b->grad)
        t->kernels->bias_bwd(t->workers, r->b->grad, grad_of(r->y), n, m);
}

/* Of x as the weight sees it, without what the ranks do afterwards. also: y depends on something else that learns. */
static struct tensor *product(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b, bool also)
{
    int64_t n = x->dim[0], k = x->dim[1], m = w->dim[0];
    struct tensor *y = make(t, 2, (int64_t[]){ n, m }, also || learns(t, x) || learns(t, w) || learns(t, b));
    const float *bias = b ? widened(t, b) : NULL;
    if (t->error)
        return NULL;
    y->cut_rows = x->cut_rows;
    if (runs(t))
        multiply(t, n, m, k,
                 (struct gemm){
                     .a = x->data, .b = w->data, .b_dtype = w->dtype, .b_trans = true, .c = y->data, .bias = bias });
    struct linear_record *r = y->grad ? record(t, sizeof *r, linear_backward) : NULL;
    if (r) {
        r->x = x;
        r->w = w;
        r->b = b;
        r->y = y;
        r->base.look = (struct tape_look){ "op_linear", { x }, { w, b } };
    }
    return done(t, "op_linear", y, w);
}

/* ---- changed by a product of low rank ---- */

struct low_rank_record {
    struct tape_record base;
    struct tensor *x, *y;
    struct low_rank low;
    float *u, *du; /* [N, R]: scale x a^T, and scale dy b, which the half of the inputs leaves to that of the weights */
};

static void low_rank_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct low_rank_record *r = (const void *)base;
    const struct tensor *a = r->low.a, *b = r->low.b;
    int64_t n = r->x->dim[0], k = r->x->dim[1], m = b->dim[0], rank = a->dim[0];
    if (INPUT_HALF(halves)) {
        multiply(t, n, rank, m, (struct gemm){ .a = r->y->grad, .b = b->data, .b_dtype = b->dtype, .c = r->du });
        t->kernels->scale(t->workers, r->du, r->du, r->low.scale, n * rank);
    }
    if (INPUT_HALF(halves) && r->x->grad)
        multiply(t, n, k, rank,
                 (struct gemm){ .a = r->du, .b = a->data, .b_dtype = a->dtype, .c = r->x->grad, .add = true });
    if (WEIGHT_HALF(halves) && a->grad)
        multiply(t, rank, k, n,
                 (struct gemm){
                     .a = r->du, .a_trans = true, .b = r->x->data, .b_dtype = DTYPE_F32, .c = a->grad, .add = true });
    if (WEIGHT_HALF(halves) && b->grad)
        multiply(t, m, rank, n,
                 (struct gemm){
                     .a = r->y->grad, .a_trans = true, .b = r->u, .b_dtype = DTYPE_F32, .c = b->grad, .add = true });
}

/* y += scale (x a^T) b^T. */
static struct tensor *add_low_rank(struct tape *t, struct tensor *x, struct tensor *y, const struct low_rank *low)
{
    int64_t n = x->dim[0], rank = low->a->dim[0];
    float *u = take_floats(t, n * rank), *du = y->grad ? take_floats(t, n * rank) : NULL;
    if (t->error)
        return NULL;
    if (runs(t)) {
        multiply(t, n, rank, x->dim[1],
                 (struct gemm){ .a = x->data, .b = low->a->data, .b_dtype = low->a->dtype, .b_trans = true, .c = u });
        t->kernels->scale(t->workers, u, u, low->scale, n * rank);
        multiply(t, n, y->dim[1], rank,
                 (struct gemm){
                     .a = u, .b = low->b->data, .b_dtype = low->b->dtype, .b_trans = true, .c = y->data, .add = true });
    }
    struct low_rank_record *r = y->grad ? record(t, sizeof *r, low_rank_backward) : NULL;
    if (r) {
        r->x = x;
        r->y = y;
        r->low = *low;
        r->u = u;
        r->du = du;
        r->base.look = (struct tape_look){ "op_linear_low_rank", { x }, { low->a, low->b } };
    }
    return done(t, "op_linear_low_rank", y, low->a);
}

static const char *low_rank_misfit(const struct tensor *w, const struct low_rank *low)
{
    const struct tensor *a = low->a, *b = low->b;
    if (!a || !b)
        return "an adapter has two matrices";
    if (a->ndim != 2 || b->ndim != 2 || a->dim[1] != w->dim[1] || b->dim[0] != w->dim[0] || a->dim[0] != b->dim[1] ||
        !is_weight(a) || !is_weight(b))
        return "its adapter is [R, K] and [M, R]";
    if (!same_cut(b->cut, cut_along(w, 0) ? w->cut : NULL) || !same_cut(a->cut, cut_along(w, 1) ? w->cut : NULL))
        return "its adapter is not cut as it is";
    return NULL;
}

/* ---- the ops ---- */

static const char *linear_misfit(const struct tape *t, const struct tensor *w, const struct tensor *b)
{
    const char *why = cut_misfit(t, w, 3);
    if (!why && cut_along(w, 1) && b)
        why = "a bias cannot be added to one rank's summand";
    if (!why && w->cut && w->cut->count != w->dim[w->cut->dim])
        why = "the ranks' parts are not equal";
    return why;
}

struct tensor *op_linear(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b)
{
    return op_linear_low_rank(t, x, w, b, NULL);
}

struct tensor *op_linear_low_rank(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b,
                                  const struct low_rank *low)
{
    if (!x || !w)
        return missing(t, "op_linear");
    if (x->ndim != 2 || w->ndim != 2 || x->dim[1] != w->dim[1] || !is_f32(x) || !is_weight(w))
        return misfit(t, "op_linear", "x is f32 [N, K], w [M, K]", x, w);
    if (b && (b->ndim != 1 || b->dim[0] != w->dim[0] || !is_weight(b)))
        return misfit(t, "op_linear", "w is [M, K], b [M]", w, b);
    const char *why = linear_misfit(t, w, b);
    if (why)
        return misfit(t, "op_linear", why, w, b);
    why = low ? low_rank_misfit(w, low) : NULL;
    if (why)
        return misfit(t, "op_linear_low_rank", why, w, low->a);
    if (cut_along(w, 0) && !(x = tp_enter(t, x)))
        return NULL;
    struct tensor *y = product(t, x, w, b, low && (learns(t, low->a) || learns(t, low->b)));
    if (y && low)
        y = add_low_rank(t, x, y, low);
    return y && cut_along(w, 1) ? tp_leave(t, y) : y;
}
