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

/* dX of dY and w [M, K], and w's gradient of dY and X. */
static struct gemm to_input(struct array dy, const struct tensor *w, struct array dx)
{
    return (struct gemm){
        .a = dy.at, .a_low = dy.low, .b = w->data, .b_dtype = w->dtype, .c = dx.at, .c_low = dx.low, .add = !dx.fresh
    };
}

static struct gemm to_weight(struct array dy, struct array x, const struct tensor *w)
{
    return (struct gemm){ .a = dy.at,
                          .a_low = dy.low,
                          .a_trans = true,
                          .b = x.at,
                          .b_dtype = x.low ? DTYPE_BF16 : DTYPE_F32,
                          .c = w->grad,
                          .add = true };
}

/* y = x w^T. */
static struct gemm to_output(struct array x, const struct tensor *w, struct array y)
{
    return (struct gemm){
        .a = x.at, .a_low = x.low, .b = w->data, .b_dtype = w->dtype, .b_trans = true, .c = y.at, .c_low = y.low
    };
}

/* ---- as they are ---- */

struct linear_record {
    struct tape_record base;
    struct tensor *x, *w, *b, *y;
    struct tensor *onto; /* what y is added to; may be NULL */
};

static void linear_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct linear_record *r = (const void *)base;
    int64_t n = r->x->dim[0], k = r->x->dim[1], m = r->w->dim[0];
    struct array dy = grad_of(t, r->y);
    if (INPUT_HALF(halves) && r->onto)
        add_grad(t, r->onto, r->y, 1.0f);
    if (INPUT_HALF(halves) && r->x->grad)
        multiply(t, n, k, m, to_input(dy, r->w, grad_product(r->x)));
    if (WEIGHT_HALF(halves) && r->w->grad)
        multiply(t, m, k, n, to_weight(dy, data_of(r->x), r->w));
    if (WEIGHT_HALF(halves) && r->b && r->b->grad)
        t->kernels->bias_bwd(t->workers, r->b->grad, dy, n, m);
}

/* What y = x w^T (+ b) is added to, and whether y is f32 in any case. */
struct target {
    struct tensor *onto; /* or NULL */
    bool f32;
};

static void run_product(struct tape *t, const struct tensor *x, const struct tensor *w, const float *bias,
                        const struct tensor *onto, const struct tensor *y)
{
    struct gemm g = to_output(data_of(x), w, data_of(y));
    g.bias = bias;
    g.add = onto != NULL;
    if (onto && at_home(t))
        t->kernels->scale(t->workers, y->data, onto->data, 1.0f, tensor_elems(y));
    else if (onto)
        g.from = onto->data;
    multiply(t, x->dim[0], w->dim[0], x->dim[1], g);
}

/* Of x as the weight sees it, without what the ranks do afterwards. also: y depends on something else that learns. */
static struct tensor *product(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b, bool also,
                              struct target to)
{
    bool learning = also || learns(t, x) || learns(t, w) || learns(t, b) || learns(t, to.onto),
         low = t->low && !to.onto && !to.f32 && !cut_along(w, 1);
    struct tensor *y = make_of(t, 2, (int64_t[]){ x->dim[0], w->dim[0] }, learning, low, low);
    const float *bias = b ? widened(t, b) : NULL;
    if (t->error)
        return NULL;
    y->cut_rows = x->cut_rows;
    if (runs(t))
        run_product(t, x, w, bias, to.onto, y);
    struct linear_record *r = y->grad ? record(t, sizeof *r, linear_backward) : NULL;
    if (r) {
        r->x = x;
        r->w = w;
        r->b = b;
        r->y = y;
        r->onto = to.onto;
        r->base.look = (struct tape_look){ "op_linear", { x, to.onto }, { w, b } };
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
    struct array dy = grad_of(t, r->y), du = array_of(r->du);
    if (INPUT_HALF(halves)) {
        multiply(t, n, rank, m, to_input(dy, b, (struct array){ .at = r->du, .fresh = true }));
        t->kernels->scale(t->workers, r->du, r->du, r->low.scale, n * rank);
    }
    if (INPUT_HALF(halves) && r->x->grad)
        multiply(t, n, k, rank, to_input(du, a, grad_product(r->x)));
    if (WEIGHT_HALF(halves) && a->grad)
        multiply(t, rank, k, n, to_weight(du, data_of(r->x), a));
    if (WEIGHT_HALF(halves) && b->grad)
        multiply(t, m, rank, n, to_weight(dy, array_of(r->u), b));
}

/* y += scale (x a^T) b^T. */
static struct tensor *add_low_rank(struct tape *t, struct tensor *x, struct tensor *y, const struct low_rank *low)
{
    int64_t n = x->dim[0], rank = low->a->dim[0];
    float *u = take_floats(t, n * rank), *du = y->grad ? take_floats(t, n * rank) : NULL;
    if (t->error)
        return NULL;
    if (runs(t)) {
        struct gemm up = to_output(array_of(u), low->b, data_of(y));
        up.add = true;
        multiply(t, n, rank, x->dim[1], to_output(data_of(x), low->a, array_of(u)));
        t->kernels->scale(t->workers, u, u, low->scale, n * rank);
        multiply(t, n, y->dim[1], rank, up);
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

static struct tensor *linear(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b,
                             const struct low_rank *low, struct target to)
{
    if (!x || !w)
        return missing(t, "op_linear");
    if (x->ndim != 2 || w->ndim != 2 || x->dim[1] != w->dim[1] || !is_activation(t, x) || !is_weight(w))
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
    struct tensor *y = product(t, x, w, b, low && (learns(t, low->a) || learns(t, low->b)), to);
    if (y && low)
        y = add_low_rank(t, x, y, low);
    return y && cut_along(w, 1) ? tp_leave(t, y) : y;
}

struct tensor *op_linear(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b)
{
    return linear(t, x, w, b, NULL, (struct target){ NULL, false });
}

struct tensor *op_linear_low_rank(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b,
                                  const struct low_rank *low)
{
    return linear(t, x, w, b, low, (struct target){ NULL, false });
}

struct tensor *linear_f32(struct tape *t, struct tensor *x, struct tensor *w)
{
    return linear(t, x, w, NULL, NULL, (struct target){ NULL, true });
}

struct tensor *op_linear_add(struct tape *t, struct tensor *onto, struct tensor *x, struct tensor *w, struct tensor *b,
                             const struct low_rank *low)
{
    if (!onto || !x || !w)
        return missing(t, "op_linear_add");
    if (b || cut_along(w, 1)) /* what the ranks sum up is added to it once */
        return op_add(t, onto, linear(t, x, w, b, low, (struct target){ NULL, true }));
    if (onto->ndim != 2 || !is_f32(onto) || x->ndim != 2 || w->ndim != 2 || onto->dim[0] != x->dim[0] ||
        onto->dim[1] != w->dim[0] || onto->cut_rows != x->cut_rows)
        return misfit(t, "op_linear_add", "it is added to f32 [N, M], w is [M, K]", onto, w);
    return linear(t, x, w, NULL, low, (struct target){ onto, true });
}
