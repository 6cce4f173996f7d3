/* op_moe against formulas written here in double: outputs, the balance loss, and gradients by central differences of
 * both, with adapters of the experts too. Then: halves, threads and recomputed passes change no bit, a token's bits
 * depend on no other token, experts without tokens and with all of them, and experts on several ranks, each with tokens
 * of its own or none, have the bits of one rank with all tokens. */
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/moe.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { X, ROUTER, GATE, UP, DOWN, LOW, INPUTS = LOW + 6 }; /* LOW: A and B of gate's adapters, of up's, of down's */
enum { ELEMS = 2048, MOST = 64 };

struct problem {
    const char *name;
    int n, c, f;
    struct router how;
    float lean; /* bias[e] = lean * (e - E/2); 0: no bias */
    float balance_weight;
    int rank; /* of every expert's adapters; 0: none */
};

static const struct problem problems[] = {
    { "qwen3", 9, 6, 5, { 5, 2, 1, 1, false, true, 1 }, 0, 0.7f, 0 },
    { "not normalised", 7, 4, 3, { 4, 3, 1, 1, false, false, 1.5f }, 0, 0, 0 },
    { "one of one", 3, 4, 3, { 1, 1, 1, 1, false, true, 1 }, 0, 0.5f, 3 },
    { "all of them", 5, 3, 4, { 4, 4, 1, 1, true, true, 1 }, 0, 0.3f, 0 },
    { "deepseek v3", 8, 6, 4, { 8, 3, 4, 2, true, true, 2.5f }, 0.03f, 0.9f, 0 },
    { "sigmoid, as it is", 6, 5, 4, { 6, 2, 1, 1, true, false, 1 }, -0.05f, 0.4f, 0 },
    { "groups of a softmax", 8, 5, 3, { 6, 2, 3, 1, false, false, 4 }, 0, 0.2f, 0 },
    { "all to the last one", 6, 4, 3, { 4, 1, 1, 1, false, true, 1 }, 100, 0.5f, 0 },
    { "adapters", 7, 5, 3, { 4, 2, 1, 1, false, true, 1 }, 0, 0.6f, 2 },
    { "adapters, all to the last one", 5, 4, 3, { 4, 1, 1, 1, true, false, 2 }, 100, 0, 1 },
};
enum { PROBLEMS = sizeof problems / sizeof *problems };

/* Tensors of a problem; data in f32 as in f64. */
struct inputs {
    struct tensor t[INPUTS], bias;
    float data[INPUTS][ELEMS], grad[INPUTS][ELEMS], lean[MOST];
    double value[INPUTS][ELEMS];
    int chosen[MOST][MOST]; /* at the values that were filled in: differences leave it */
    bool freeze;
};

static const float low_scale = 1.5f;

static float draw(uint32_t *s)
{
    *s = *s * 1664525u + 1013904223u;
    return (float)(*s >> 8) / (float)(1 << 23) - 1;
}

static void fill(const struct problem *p, struct inputs *in)
{
    int64_t e = p->how.experts, c = p->c, f = p->f, r = p->rank;
    const int64_t dims[INPUTS][3] = { { p->n, c }, { e, c },    { e, f, c }, { e, f, c }, { e, c, f }, { e, r, c },
                                      { e, f, r }, { e, r, c }, { e, f, r }, { e, r, f }, { e, c, r } };
    uint32_t s = 5;
    memset(in, 0, sizeof *in);
    for (int i = 0; i < INPUTS; i++) {
        in->t[i] =
            (struct tensor){ .dtype = DTYPE_F32, .ndim = i < 2 ? 2 : 3, .data = in->data[i], .grad = in->grad[i] };
        memcpy(in->t[i].dim, dims[i], sizeof dims[i]);
        assert_true(tensor_elems(&in->t[i]) <= ELEMS);
        for (int64_t k = 0; k < ELEMS; k++)
            in->value[i][k] = (double)(in->data[i][k] = draw(&s));
    }
    for (int i = 0; i < e; i++)
        in->lean[i] = p->lean * (float)(i - e / 2);
    in->bias = (struct tensor){ .dtype = DTYPE_F32, .ndim = 1, .dim = { e }, .data = in->lean };
}

static struct expert_weights weights_of(const struct problem *p, struct inputs *in)
{
    struct expert_weights w = { .router = &in->t[ROUTER],
                                .bias = p->lean != 0 ? &in->bias : NULL,
                                .gate = &in->t[GATE],
                                .up = &in->t[UP],
                                .down = &in->t[DOWN] };
    if (p->rank) {
        w.low.gate = (struct low_rank){ &in->t[LOW], &in->t[LOW + 1], low_scale };
        w.low.up = (struct low_rank){ &in->t[LOW + 2], &in->t[LOW + 3], low_scale };
        w.low.down = (struct low_rank){ &in->t[LOW + 4], &in->t[LOW + 5], low_scale };
    }
    return w;
}

/* ---- the same in double ---- */

static bool in_best_group(const struct problem *p, const double *value, int e)
{
    int each = (int)(p->how.experts / p->how.groups), better = 0;
    double rank[MOST];
    for (int g = 0; g < p->how.groups; g++) {
        double first = -1e300, second = -1e300;
        for (int i = g * each; i < (g + 1) * each; i++) {
            second = fmax(second, fmin(first, value[i]));
            first = fmax(first, value[i]);
        }
        rank[g] = p->how.sigmoid && each > 1 ? first + second : first;
    }
    for (int g = 0; g < p->how.groups; g++)
        better += rank[g] > rank[e / each];
    return better < p->how.top_groups;
}

/* The number of experts that come before e. */
static int before(const struct problem *p, const double *value, int e)
{
    int n = 0;
    for (int i = 0; i < p->how.experts; i++)
        n += in_best_group(p, value, i) && (value[i] > value[e] || (i < e && value[i] == value[e]));
    return n;
}

/* Element [e, row, col] of a stack of matrices with their adapters. */
static double adapted(const struct problem *p, const struct inputs *in, int which, int e, int row, int col)
{
    int m = which == DOWN ? p->c : p->f, k = which == DOWN ? p->f : p->c, low = LOW + 2 * (which - GATE);
    double w = in->value[which][(e * m + row) * k + col];
    for (int r = 0; r < p->rank; r++)
        w += (double)low_scale * in->value[low + 1][(e * m + row) * p->rank + r] *
             in->value[low][(e * p->rank + r) * k + col];
    return w;
}

static double plain(const struct problem *p, struct inputs *in, double *y, int *count)
{
    int experts = (int)p->how.experts, top = (int)p->how.top;
    double share[MOST] = { 0 }, balance = 0, load[MOST] = { 0 };
    for (int n = 0; n < p->n; n++) {
        double s[MOST], value[MOST], all = 0, taken = 0;
        for (int e = 0; e < experts; e++) {
            double z = 0;
            for (int c = 0; c < p->c; c++)
                z += in->value[X][n * p->c + c] * in->value[ROUTER][e * p->c + c];
            all += s[e] = p->how.sigmoid ? 1 / (1 + exp(-z)) : exp(z);
        }
        for (int e = 0; e < experts; e++) {
            share[e] += s[e] / all / p->n;
            s[e] /= p->how.sigmoid ? 1 : all;
            value[e] = s[e] + (double)in->lean[e];
        }
        for (int e = 0; e < experts && !in->freeze; e++)
            in->chosen[n][e] = in_best_group(p, value, e) && before(p, value, e) < top;
        for (int e = 0; e < experts; e++)
            taken += in->chosen[n][e] ? s[e] : 0;
        memset(y + n * p->c, 0, (size_t)p->c * sizeof *y);
        for (int e = 0; e < experts; e++) {
            if (!in->chosen[n][e])
                continue;
            load[e]++;
            double w = (double)p->how.scale * s[e] / (p->how.normalise ? taken : 1);
            for (int f = 0; f < p->f; f++) {
                double g = 0, u = 0;
                for (int c = 0; c < p->c; c++) {
                    g += adapted(p, in, GATE, e, f, c) * in->value[X][n * p->c + c];
                    u += adapted(p, in, UP, e, f, c) * in->value[X][n * p->c + c];
                }
                for (int c = 0; c < p->c; c++)
                    y[n * p->c + c] += w * adapted(p, in, DOWN, e, c, f) * g / (1 + exp(-g)) * u;
            }
        }
    }
    for (int e = 0; e < experts; e++) {
        balance += experts * load[e] / p->n * share[e];
        count[e] = (int)load[e];
    }
    return balance;
}

static double objective(const struct problem *p, struct inputs *in, const float *proj)
{
    static double y[ELEMS];
    int count[MOST];
    double sum = (double)p->balance_weight * plain(p, in, y, count);
    for (int i = 0; i < p->n * p->c; i++)
        sum += (double)proj[i] * y[i];
    return sum;
}

/* ---- against it ---- */

struct seen {
    int32_t count[MOST];
    double balance;
    float y[ELEMS];
};

static void pass(const struct problem *p, struct inputs *in, struct tape *t, enum tape_mode mode, const float *proj,
                 unsigned first, unsigned second, struct seen *out)
{
    struct expert_weights w = weights_of(p, in);
    struct route_watch watch = { .count = out->count, .balance = &out->balance, .balance_weight = p->balance_weight };
    memset(in->grad, 0, sizeof in->grad);
    tape_begin(t, mode);
    struct tensor *y = op_moe(t, &in->t[X], &w, &p->how, &watch);
    status *st = tape_end(t);
    if (st)
        fail_msg("%s: %s", p->name, status_message(st));
    if (mode == TAPE_DRY)
        return;
    memcpy(out->y, y->data, (size_t)(p->n * p->c) * sizeof(float));
    if (mode == TAPE_TRAIN)
        assert_null(tape_backward(t, y, proj, first));
    if (second)
        assert_null(tape_backward(t, y, proj, second));
}

static void check_gradients(const struct problem *p, struct inputs *in, const float *proj)
{
    double h = 1e-5;
    in->freeze = true;
    for (int i = 0; i < INPUTS; i++)
        for (int64_t e = 0; e < tensor_elems(&in->t[i]); e++) {
            double *v = &in->value[i][e], at = *v;
            *v = at + h;
            double up = objective(p, in, proj);
            *v = at - h;
            double down = objective(p, in, proj);
            *v = at;
            double want = (up - down) / (2 * h), got = (double)in->grad[i][e];
            if (!(fabs(got - want) <= 4e-6 * (1 + fabs(want))))
                fail_msg("%s: gradient of input %d at %lld is %.9g, not %.9g", p->name, i, (long long)e, got, want);
        }
    in->freeze = false;
}

static struct inputs in, again;
static struct seen seen, other;
static float proj[ELEMS];
static double want[ELEMS];

static void draw_projection(void)
{
    uint32_t s = 99;
    for (int i = 0; i < ELEMS; i++)
        proj[i] = draw(&s);
}

static void against_formulas(void **state)
{
    (void)state;
    struct tape *t, *wide;
    struct workers *workers;
    draw_projection();
    assert_null(workers_open(3, &workers));
    for (int i = 0; i < PROBLEMS; i++) {
        const struct problem *p = &problems[i];
        int count[MOST];
        assert_null(tape_open(NULL, NULL, 0, &t));
        assert_null(tape_open(workers, NULL, 0, &wide));
        fill(p, &in);
        pass(p, &in, t, TAPE_DRY, NULL, 0, 0, &seen);
        size_t bytes = t->arena.used_bytes;
        uint64_t allocations = mem_count();
        pass(p, &in, t, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0, &seen);
        assert_int_equal(mem_count(), allocations);
        assert_int_equal(t->arena.used_bytes, bytes);
        double balance = plain(p, &in, want, count);
        for (int k = 0; k < p->n * p->c; k++)
            if (!(fabs((double)seen.y[k] - want[k]) <= 2e-6 * (1 + fabs(want[k]))))
                fail_msg("%s: output %d is %.9g, not %.9g", p->name, k, (double)seen.y[k], want[k]);
        for (int e = 0; e < p->how.experts; e++)
            assert_int_equal(seen.count[e], count[e]);
        assert_true(fabs(seen.balance - balance) <= 1e-5 * balance);
        check_gradients(p, &in, proj);
        if (p->lean > 1)
            for (int64_t k = 0; k < tensor_elems(&in.t[DOWN]); k++) /* experts without tokens have no gradient */
                assert_true(in.grad[DOWN][k] == 0 || k / (p->c * p->f) == p->how.experts - 1);
        fill(p, &again);
        pass(p, &again, t, TAPE_TRAIN, proj, TAPE_BACKWARD_INPUT, TAPE_BACKWARD_WEIGHT, &other);
        assert_memory_equal(again.grad, in.grad, sizeof in.grad);
        pass(p, &again, wide, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0, &other);
        assert_memory_equal(again.grad, in.grad, sizeof in.grad);
        assert_memory_equal(other.y, seen.y, sizeof(float) * (size_t)(p->n * p->c));
        memset(other.count, 1, sizeof other.count);
        pass(p, &again, wide, TAPE_FORWARD, NULL, 0, 0, &other);
        assert_memory_equal(other.y, seen.y, sizeof(float) * (size_t)(p->n * p->c));
        assert_true(other.count[0] == 0x01010101); /* only training passes are watched */
        tape_close(t);
        tape_close(wide);
    }
    workers_close(workers);
}

/* Each token alone, and none at all. */
static void tokens_do_not_meet(void **state)
{
    (void)state;
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int i = 0; i < PROBLEMS; i++) {
        const struct problem *p = &problems[i];
        struct problem one = *p;
        fill(p, &in);
        pass(p, &in, t, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0, &seen);
        one.n = 1;
        one.balance_weight = 0;
        for (int n = 0; n < p->n; n++) {
            fill(&one, &again);
            memcpy(again.data[X], in.data[X] + n * p->c, (size_t)p->c * sizeof(float));
            pass(&one, &again, t, TAPE_TRAIN, proj + n * p->c, TAPE_BACKWARD_ALL, 0, &other);
            assert_memory_equal(other.y, seen.y + n * p->c, (size_t)p->c * sizeof(float));
            if (p->balance_weight <= 0)
                assert_memory_equal(again.grad[X], in.grad[X] + n * p->c, (size_t)p->c * sizeof(float));
        }
        one.n = 0;
        fill(&one, &again);
        pass(&one, &again, t, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0, &other);
        for (int64_t k = 0; k < tensor_elems(&again.t[DOWN]); k++)
            assert_true(again.grad[DOWN][k] == 0);
        assert_true(other.balance == 0);
    }
    tape_close(t);
}

/* ---- products of groups ---- */

static void products_of_groups(void **state)
{
    (void)state;
    enum { COUNT = 9, SIDE = 300, DEPTH = 40, MOST_ROWS = 824 };
    static float a[MOST_ROWS * SIDE], b[COUNT * SIDE * DEPTH], got[MOST_ROWS * SIDE], ref[MOST_ROWS * SIDE];
    static const int32_t offset[COUNT + 1] = { 0, 1, 1, 130, 137, 437, 437, 565, 567, MOST_ROWS };
    struct gemm room[COUNT];
    uint32_t s = 3;
    for (int i = 0; i < COUNT * SIDE * DEPTH; i++)
        b[i] = draw(&s);
    for (int how = 0; how < 8; how++) {
        struct workers *w;
        bool along = how & 2;
        struct gemm one = { .m = along ? SIDE : MOST_ROWS,
                            .n = along ? DEPTH : SIDE,
                            .k = along ? MOST_ROWS : DEPTH,
                            .a = a,
                            .lda = along ? SIDE : DEPTH,
                            .a_trans = along,
                            .b = b,
                            .b_dtype = DTYPE_F32,
                            .ldb = DEPTH,
                            .b_trans = !along,
                            .ldc = along ? DEPTH : SIDE,
                            .add = how & 1 };
        int64_t step = SIDE * DEPTH;
        assert_null(workers_open(how & 4 ? 3 : 1, &w));
        for (int i = 0; i < MOST_ROWS * SIDE; i++) {
            a[i] = draw(&s);
            got[i] = ref[i] = draw(&s);
        }
        for (int e = 0; e < COUNT; e++) {
            int rows = offset[e + 1] - offset[e];
            struct gemm g = one;
            g.a = a + offset[e] * one.lda;
            g.b = b + (along ? offset[e] * one.ldb : e * step);
            g.c = ref + (along ? e * step : offset[e] * one.ldc);
            *(along ? &g.k : &g.m) = rows;
            if (rows || !one.add)
                gemm_ref(&g);
        }
        one.c = got;
        struct grouped_gemm p = { one, along, COUNT, step, offset, room };
        kernels_cpu.grouped(w, &p);
        assert_memory_equal(got, ref, sizeof got);
        p.groups = 0;
        kernels_cpu.grouped(w, &p);
        workers_close(w);
    }
}

/* ---- experts on several ranks ---- */

struct spread {
    const struct problem *p;
    const int *first;                    /* [ranks + 1] tokens of each rank */
    float y[ELEMS], grad[INPUTS][ELEMS]; /* experts' gradients, and x's; each rank writes its part */
    float router[4][ELEMS];              /* each rank's */
    bool recompute;
};

static struct tensor *run_block(struct tape *t, const void *arg, int64_t index, struct tensor *x)
{
    void *const *with = arg;
    (void)index;
    return op_moe(t, x, with[0], with[1], with[2]);
}

static status *rank_of_experts(struct comm *world, void *arg)
{
    struct spread *job = arg;
    struct problem p = *job->p;
    struct inputs *mine = mem_calloc(1, sizeof *mine);
    struct seen *out = mem_calloc(1, sizeof *out);
    struct tape *t;
    if (!mine || !out)
        return ERR(NO_MEMORY, "a rank");
    int first = job->first[world->rank], here = (int)p.how.experts / world->size;
    fill(&p, mine);
    mine->t[X].dim[0] = job->first[world->rank + 1] - first;
    memmove(mine->data[X], mine->data[X] + first * p.c, (size_t)(mine->t[X].dim[0] * p.c) * sizeof(float));
    for (int i = GATE; i < INPUTS; i++) {
        mine->t[i].dim[0] = here;
        mine->t[i].data = mine->data[i] + world->rank * tensor_elems(&mine->t[i]);
    }
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_experts(t, world);
    tape_recompute(t, job->recompute);
    struct expert_weights w = weights_of(&p, mine);
    const void *with[3] = { &w, &p.how, NULL };
    for (int pass_ = 0; pass_ < 2; pass_++) { /* dry, then in earnest */
        tape_begin(t, pass_ ? TAPE_TRAIN : TAPE_DRY);
        struct tensor *y = op_block(t, run_block, with, sizeof with, 0, &mine->t[X]);
        TRY(tape_end(t));
        if (!pass_)
            continue;
        memcpy(job->y + first * p.c, y->data, (size_t)tensor_elems(y) * sizeof(float));
        TRY(tape_backward(t, y, proj + first * p.c, TAPE_BACKWARD_INPUT));
        TRY(tape_backward(t, y, proj + first * p.c, TAPE_BACKWARD_WEIGHT));
    }
    memcpy(job->grad[X] + first * p.c, mine->grad[X], (size_t)tensor_elems(&mine->t[X]) * sizeof(float));
    memcpy(job->router[world->rank], mine->grad[ROUTER], sizeof job->router[0]);
    for (int i = GATE; i < INPUTS; i++)
        memcpy(job->grad[i] + world->rank * tensor_elems(&mine->t[i]), mine->grad[i],
               (size_t)tensor_elems(&mine->t[i]) * sizeof(float));
    tape_close(t);
    mem_free(mine);
    mem_free(out);
    return NULL;
}

static void on_several_ranks(void **state)
{
    (void)state;
    static const int halves[] = { 0, 3, 6 }, all_but_none[] = { 0, 0, 6 }, quarters[] = { 0, 1, 1, 4, 6 };
    static const struct {
        int ranks;
        const int *first;
    } cuts[] = { { 2, halves }, { 2, all_but_none }, { 4, quarters } };
    static struct spread job;
    struct tape *t;
    draw_projection();
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int i = 0; i < PROBLEMS; i++)
        for (size_t c = 0; c < 2 * sizeof cuts / sizeof *cuts; c++) {
            struct problem p = problems[i];
            int ranks = cuts[c / 2].ranks;
            p.balance_weight = 0; /* is of a rank's own tokens */
            p.n = 6;
            if (p.how.experts % ranks)
                continue;
            fill(&p, &in);
            pass(&p, &in, t, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0, &seen);
            memset(&job, 0, sizeof job);
            job.p = &p;
            job.first = cuts[c / 2].first;
            job.recompute = c % 2;
            status *st = comm_threads_run(ranks, rank_of_experts, &job);
            if (st)
                fail_msg("%s: %s", p.name, status_message(st));
            assert_memory_equal(job.y, seen.y, (size_t)(p.n * p.c) * sizeof(float));
            assert_memory_equal(job.grad[X], in.grad[X], (size_t)(p.n * p.c) * sizeof(float));
            for (int k = GATE; k < INPUTS; k++)
                assert_memory_equal(job.grad[k], in.grad[k], (size_t)tensor_elems(&in.t[k]) * sizeof(float));
            for (int64_t e = 0; e < tensor_elems(&in.t[ROUTER]); e++) {
                double sum = 0;
                for (int r = 0; r < ranks; r++)
                    sum += (double)job.router[r][e];
                assert_true(fabs(sum - (double)in.grad[ROUTER][e]) <= 1e-6 * (1 + fabs(sum)));
            }
        }
    tape_close(t);
}

static void errors(void **state)
{
    (void)state;
    struct tape *t;
    const struct problem *p = &problems[0], *low = &problems[PROBLEMS - 2];
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int i = 0; i < 7; i++) {
        if (i > 4)
            p = low;
        fill(p, &in);
        struct expert_weights w = weights_of(p, &in);
        struct router how = p->how;
        struct tensor bad = in.t[i < 4 ? i + 1 : DOWN];
        bad.dim[i == 3 ? 2 : 0]++;
        struct tensor **const at[] = { &w.router, &w.gate, &w.up, &w.down };
        if (i < 4)
            *at[i] = &bad;
        else if (i == 5)
            w.low.up.b = NULL;
        else if (i == 6)
            w.low.down = w.low.gate; /* of another shape */
        else
            how.top = how.experts + 1;
        tape_begin(t, TAPE_TRAIN);
        assert_null(op_moe(t, &in.t[X], &w, &how, NULL));
        status *st = tape_end(t);
        assert_int_equal(status_code(st), ST_INVALID);
        assert_non_null(strstr(status_message(st), "op_moe"));
        status_free(st);
    }
    tape_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_formulas),
        cmocka_unit_test(tokens_do_not_meet),
        cmocka_unit_test(products_of_groups),
        cmocka_unit_test(on_several_ranks),
        cmocka_unit_test(errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
