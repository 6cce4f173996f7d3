/* ops_moe: routed experts: route, dispatch (dispatch.h), products of each expert's rows, combine. */
#include "trainer/ops/context.h"
#include "trainer/ops/dispatch.h"
#include "trainer/ops/op.h"
#include "trainer/ops/routes.h"
#include "trainer/ops/spread.h"

/* ---- route ---- */

struct route_record {
    struct tape_record base;
    struct tensor *z, *weight;
    struct route r;
};

static void route_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct route_record *r = (const void *)base;
    if (!INPUT_HALF(halves))
        return;
    struct route back = r->r;
    back.dweight = grad_f32(t, r->weight);
    back.dz = grad_f32(t, r->z);
    t->kernels->route_bwd(t->workers, &back);
}

/* Tell the watch; sums [1 + 2 E]. What all ranks with a context have is added up by the host, which waits for it. */
static void watch_load(struct tape *t, const struct routing *g, const float *score, const struct route_watch *watch,
                       double *sums, float *dshare)
{
    struct route_load l = { .n = g->n,
                            .padding = watch->padding,
                            .how = g->how,
                            .score = score,
                            .expert = g->expert,
                            .offset = g->begin,
                            .sums = sums,
                            .weight = watch->balance_weight,
                            .dshare = dshare,
                            .count = watch->count,
                            .balance = watch->balance };
    double here[2 * EXPERTS_MAX + 1];
    size_t count = 2 * (size_t)g->how->experts + 1;
    t->kernels->load_sums(t->workers, &l);
    if (t->context) {
        get_here(t, here, sums, count * sizeof *here);
        context_add(t, here, count);
        put_there(t, sums, here, count * sizeof *here);
    }
    t->kernels->load_shares(t->workers, &l);
}

/* Experts are chosen, or those of another run are taken; false: the tape has failed. */
static bool choose(struct tape *t, struct route *r, const struct routing *g, const struct route_watch *watch)
{
    int32_t *expert = g->chosen;
    struct routes *routes = watch && r->n ? watch->routes : NULL;
    int64_t choices = r->n * r->how->top;
    r->given = routes && routes->replay;
    int ranks = t->context ? t->context->size : 1, rank = t->context ? t->context->rank : 0;
    status *st = r->given ? routes_get(routes, watch->key, expert, r->n, r->how->top, rank, ranks) : NULL;
    for (int64_t i = 0; r->given && !st && i < choices; i++)
        if (expert[i] < 0 || expert[i] >= r->how->experts)
            st = ERR(INVALID, "recorded expert %d is none of %lld", expert[i], (long long)r->how->experts);
    if (st)
        tape_fail(t, st);
    if (r->given)
        put_there(t, r->expert, expert, (size_t)choices * sizeof *expert);
    if (t->error)
        return false;
    t->kernels->route(t->workers, r);
    if (routes && !r->given)
        get_here(t, expert, r->expert, (size_t)choices * sizeof *expert); /* waits, to record them */
    st = routes && !routes->replay && !t->error ? routes_put(routes, watch->key, expert, choices) : NULL;
    if (st)
        tape_fail(t, st);
    return !t->error;
}

/* Weights [N, K] of the experts that are chosen by z [N, E]. */
static struct tensor *route(struct tape *t, struct tensor *z, const struct tensor *bias, struct routing *g,
                            const struct route_watch *watch)
{
    int64_t experts = g->how->experts;
    bool learning = t->mode != TAPE_FORWARD;
    struct tensor *weight = make(t, 2, (int64_t[]){ g->n, g->how->top }, learning);
    float *score = take_floats(t, g->n * experts), *dshare = learning ? take_floats(t, experts) : NULL;
    double *sums = learning ? take_there(t, (size_t)(2 * experts + 1), sizeof *sums) : NULL;
    if (t->error)
        return NULL;
    struct route r = { .n = g->n,
                       .how = g->how,
                       .z = z->data,
                       .bias = bias ? widened(t, bias) : NULL,
                       .score = score,
                       .expert = g->expert,
                       .weight = weight->data };
    if (runs(t) && choose(t, &r, g, watch))
        routing_sort(t, g);
    if (t->mode == TAPE_TRAIN && watch && !t->error) {
        watch_load(t, g, score, watch, sums, dshare);
        bool counts =
            watch->balance_weight > 0 && (!t->tp || t->tp->rank == 0); /* all have the same loss: one adds it */
        r.dshare = counts ? dshare : NULL;
    }
    struct route_record *rec = z->grad ? record(t, sizeof *rec, route_backward) : NULL;
    if (rec) {
        rec->z = z;
        rec->weight = weight;
        rec->r = r;
        rec->r.n -= watch ? watch->padding : 0; /* no gradient comes to it */
        rec->base.look = (struct tape_look){ "op_moe (routing)", { z }, { NULL } };
    }
    return done(t, "op_moe (routing)", weight, bias);
}

/* ---- each expert's rows ---- */

/* y[i] = w[e] x[i] for each row i of expert e, and its gradients. x [rows, K], w [experts, M, K], y [rows, M]. */
struct grouped {
    const struct routing *g;
    const struct tensor *w;
    float *x, *y, *dx, *dy;
    struct gemm *room; /* [experts] */
};

enum product { FORWARD, TO_INPUT, TO_WEIGHT };

/* Of all rows, with the first expert's matrix. */
static struct gemm product(const struct grouped *r, enum product kind)
{
    int64_t m = r->w->dim[1], k = r->w->dim[2], rows = r->g->rows;
    if (kind == FORWARD)
        return (struct gemm){ .m = rows,
                              .n = m,
                              .k = k,
                              .a = r->x,
                              .lda = k,
                              .b = r->w->data,
                              .b_dtype = r->w->dtype,
                              .ldb = k,
                              .b_trans = true,
                              .c = r->y,
                              .ldc = m };
    if (kind == TO_INPUT)
        return (struct gemm){ .m = rows,
                              .n = k,
                              .k = m,
                              .a = r->dy,
                              .lda = m,
                              .b = r->w->data,
                              .b_dtype = r->w->dtype,
                              .ldb = k,
                              .c = r->dx,
                              .ldc = k };
    return (struct gemm){ .m = m,
                          .n = k,
                          .k = rows,
                          .a = r->dy,
                          .lda = m,
                          .a_trans = true,
                          .b = r->x,
                          .b_dtype = DTYPE_F32,
                          .ldb = k,
                          .c = r->w->grad,
                          .ldc = k };
}

/* All experts' products of a kind. */
static void multiply(struct tape *t, struct grouped r, enum product kind, bool sum)
{
    struct grouped_gemm p = { .one = product(&r, kind),
                              .along_k = kind == TO_WEIGHT,
                              .groups = r.g->experts,
                              .step = r.w->dim[1] * r.w->dim[2],
                              .offset = r.g->offset,
                              .room = r.room };
    p.one.add = sum;
    p.one.bf16 = t->bf16;
    t->kernels->grouped(t->workers, &p);
}

struct grouped_record {
    struct tape_record base;
    const struct routing *g;
    struct tensor *x, *w, *y;
    struct gemm *room;
    struct low_rank low; /* a NULL: none */
    float *u, *du; /* [rows, R]: scale x a^T, and scale dy b, which the half of the inputs leaves to the weights' */
};

static struct grouped of_weight(const struct grouped_record *r)
{
    return (struct grouped){ r->g, r->w, r->x->data, r->y->data, r->x->grad, r->y->grad, r->room };
}

static struct grouped of_a(const struct grouped_record *r)
{
    return (struct grouped){ r->g, r->low.a, r->x->data, r->u, r->x->grad, r->du, r->room };
}

static struct grouped of_b(const struct grouped_record *r)
{
    return (struct grouped){ r->g, r->low.b, r->u, r->y->data, r->du, r->y->grad, r->room };
}

static void scale_rows(struct tape *t, const struct grouped_record *r, float *u)
{
    t->kernels->scale(t->workers, u, u, r->low.scale, r->g->rows * r->low.a->dim[1]);
}

static void grouped_forward(struct tape *t, const struct grouped_record *r)
{
    multiply(t, of_weight(r), FORWARD, false);
    if (!r->low.a)
        return;
    multiply(t, of_a(r), FORWARD, false);
    scale_rows(t, r, r->u);
    multiply(t, of_b(r), FORWARD, true);
}

static void grouped_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct grouped_record *r = (const void *)base;
    bool low = r->low.a != NULL;
    (void)grad_of(t, r->y); /* no view, and no more fresh */
    (void)grad_of(t, r->x);
    if (INPUT_HALF(halves) && r->x->grad)
        multiply(t, of_weight(r), TO_INPUT, true);
    if (INPUT_HALF(halves) && low) {
        multiply(t, of_b(r), TO_INPUT, false);
        scale_rows(t, r, r->du);
    }
    if (INPUT_HALF(halves) && low && r->x->grad)
        multiply(t, of_a(r), TO_INPUT, true);
    if (WEIGHT_HALF(halves) && r->w->grad)
        multiply(t, of_weight(r), TO_WEIGHT, true);
    if (WEIGHT_HALF(halves) && low && r->low.a->grad)
        multiply(t, of_a(r), TO_WEIGHT, true);
    if (WEIGHT_HALF(halves) && low && r->low.b->grad)
        multiply(t, of_b(r), TO_WEIGHT, true);
}

/* y[i] = (w[e] + scale b[e] a[e]) x[i] for each row i of expert e. */
static struct tensor *grouped(struct tape *t, struct tensor *x, struct tensor *w, const struct low_rank *low,
                              const struct routing *g)
{
    if (!x)
        return NULL;
    struct grouped_record now = { .g = g, .x = x, .w = w, .low = *low };
    int64_t least = low->a ? g->rows * low->a->dim[1] : 0;
    now.y = make(t, 2, (int64_t[]){ g->rows, w->dim[1] }, t->mode != TAPE_FORWARD);
    now.room = take(t, (size_t)g->experts, sizeof *now.room);
    now.u = low->a ? take_floats(t, least) : NULL;
    now.du = low->a && t->mode != TAPE_FORWARD ? take_floats(t, least) : NULL;
    if (t->error)
        return NULL;
    if (runs(t))
        grouped_forward(t, &now);
    struct grouped_record *r = now.y->grad ? record(t, sizeof *r, grouped_backward) : NULL;
    if (r) {
        now.base = r->base;
        *r = now;
        r->base.look = (struct tape_look){ "op_moe (experts)", { x }, { w, low->a, low->b } };
    }
    return done(t, "op_moe (experts)", now.y, w);
}

/* ---- the op ---- */

static bool is_stack(const struct tensor *w, int64_t experts, int64_t rows, int64_t cols)
{
    return w->ndim == 3 && w->dim[0] == experts && w->dim[1] == rows && w->dim[2] == cols && is_weight(w);
}

static const char *low_rank_misfit(const struct tensor *w, const struct low_rank *low)
{
    const struct tensor *a = low->a, *b = low->b;
    if (!a && !b)
        return NULL;
    int64_t rank = a && a->ndim == 3 ? a->dim[1] : 0;
    if (!a || !b || !is_stack(a, w->dim[0], rank, w->dim[2]) || !is_stack(b, w->dim[0], w->dim[1], rank))
        return "an expert's adapter is [E, R, K] and [E, M, R]";
    if (!same_cut(b->cut, cut_along(w, 1) ? w->cut : NULL) || !same_cut(a->cut, cut_along(w, 2) ? w->cut : NULL))
        return "its adapter is not cut as it is";
    return NULL;
}

static struct tensor *bad_experts(struct tape *t, const struct tensor *x, const struct expert_weights *w,
                                  const struct router *r)
{
    int64_t c = x->dim[1], here = r->experts / (t->ep ? t->ep->size : 1), width = w->gate->dim[1];
    const char *why;
    if (x->ndim != 2 || !is_activation(t, x) || w->router->ndim != 2 || w->router->dim[0] != r->experts)
        return misfit(t, "op_moe", "x is f32 [N, C], the router [E, C]", x, w->router);
    if (r->experts < 1 || r->experts > EXPERTS_MAX || r->top < 1 || r->top > r->experts || r->top > TOP_MAX ||
        (t->ep && r->experts % t->ep->size))
        return misfit(t, "op_moe", "1 to 1024 experts, of which a token takes 1 to 64, as many on each rank", w->router,
                      NULL);
    if (!is_stack(w->gate, here, width, c) || !is_stack(w->up, here, width, c))
        return misfit(t, "op_moe", "of experts' gate and up [E, F, C]", w->gate, w->up);
    if (!is_stack(w->down, here, c, width))
        return misfit(t, "op_moe", "of experts' gate [E, F, C] and down [E, C, F]", w->gate, w->down);
    if (w->bias && (w->bias->ndim != 1 || w->bias->dim[0] != r->experts || !is_weight(w->bias)))
        return misfit(t, "op_moe", "the bias is [E]", w->bias, NULL);
    why = cut_misfit(t, w->gate, 2);
    why = why ? why : cut_misfit(t, w->up, 2);
    why = why ? why : cut_misfit(t, w->down, 4);
    if (!why && !w->gate->cut != !w->down->cut)
        why = "one is cut over ranks, the other is not";
    why = why ? why : low_rank_misfit(w->gate, &w->low.gate);
    why = why ? why : low_rank_misfit(w->up, &w->low.up);
    why = why ? why : low_rank_misfit(w->down, &w->low.down);
    return why ? misfit(t, "op_moe", why, w->gate, w->down) : (struct tensor *)(size_t)x;
}

struct tensor *op_moe(struct tape *t, struct tensor *x, const struct expert_weights *w, const struct router *r,
                      const struct route_watch *watch)
{
    if (!x || !w->router || !w->gate || !w->up || !w->down)
        return missing(t, "op_moe");
    if (!bad_experts(t, x, w, r) || !(x = as_f32(t, x)))
        return NULL;
    if (w->gate->cut && !(x = tp_enter(t, x)))
        return NULL;
    struct tensor *z = linear_f32(t, x, w->router);
    struct routing *g = z ? routing_new(t, r, x->dim[0], w->gate->dim[0]) : NULL;
    struct tensor *weight = g ? route(t, z, w->bias, g, watch) : NULL;
    struct tensor *rows = weight ? op_dispatch(t, x, g) : NULL;
    struct tensor *gate = grouped(t, rows, w->gate, &w->low.gate, g), *up = grouped(t, rows, w->up, &w->low.up, g);
    struct tensor *made = rows ? grouped(t, op_swiglu(t, gate, up), w->down, &w->low.down, g) : NULL;
    struct tensor *y = made ? op_combine(t, made, weight, g) : NULL;
    return y && w->gate->cut ? tp_leave(t, y) : y;
}
