/* Every op against formulas written here in double: outputs, and gradients by central differences of a random
 * projection of the output. Each case also holds: gradients are added to what is there; the two halves of backward give
 * the bits of both at once; neither threads nor tape modes change a bit; a dry pass takes all memory. Then errors, and
 * the rules of the tape. What is fast in them is held against what is plain in test_kernels.c. */
#include "comm/base/mem.h"
#include "tests/trainer/big.h"
#include "trainer/ops/cpu/isa.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { INPUTS = 5, ELEMS = 4096 };

/* A case: inputs, how to call the op, and the same in double. */
struct problem {
    const char *name;
    int count;                            /* inputs */
    int64_t dim[INPUTS][TENSOR_DIMS + 1]; /* ended by 0 */
    struct tensor *(*op)(struct tape *t, const struct problem *p);
    void (*ref)(const struct problem *p, double *y);
    const int32_t *id; /* ids, targets or positions */
    struct segments seg;
    int64_t window;
    double tolerance; /* 0: 2e-6 */
    /* filled by the harness */
    struct tensor x[INPUTS];
    double *in[INPUTS];
    float data[INPUTS][ELEMS], grad[INPUTS][ELEMS];
    double value[INPUTS][ELEMS];
};

static void fill(struct problem *p)
{
    uint32_t s = 7;
    for (int i = 0; i < p->count; i++) {
        struct tensor *x = &p->x[i];
        *x = (struct tensor){ .dtype = DTYPE_F32, .data = p->data[i], .grad = p->grad[i] };
        while (x->ndim < TENSOR_DIMS && p->dim[i][x->ndim]) {
            x->dim[x->ndim] = p->dim[i][x->ndim];
            x->ndim++;
        }
        p->in[i] = p->value[i];
        assert_true(tensor_elems(x) <= ELEMS);
        for (int64_t e = 0; e < tensor_elems(x); e++) {
            p->data[i][e] = 1.5f * draw(&s);
            p->value[i][e] = (double)p->data[i][e];
        }
    }
}

static void prefill(struct problem *p)
{
    for (int i = 0; i < p->count; i++)
        for (int e = 0; e < ELEMS; e++)
            p->grad[i][e] = 0.25f * (float)(e % 5) - 0.5f;
}

static double project(const struct problem *p, const float *proj, int64_t n, double *y)
{
    double sum = 0;
    p->ref(p, y);
    for (int64_t i = 0; i < n; i++)
        sum += (double)proj[i] * y[i];
    return sum;
}

/* One pass; gradients land on the prefilled buffers. Returns the output's data, valid until the next pass. */
static const float *pass(struct problem *p, struct tape *t, enum tape_mode mode, const float *proj, unsigned first,
                         unsigned second)
{
    prefill(p);
    tape_begin(t, mode);
    struct tensor *y = p->op(t, p);
    status *st = tape_end(t);
    if (st)
        fail_msg("%s: %s", p->name, status_message(st));
    if (mode == TAPE_TRAIN)
        assert_null(tape_backward(t, y, proj, first));
    if (second)
        assert_null(tape_backward(t, y, proj, second));
    return mode == TAPE_DRY ? NULL : y->data;
}

static void check_gradients(struct problem *p, const float *proj, int64_t n)
{
    static double y[ELEMS];
    double tolerance = p->tolerance > 0 ? p->tolerance : 2e-6, h = 1e-5;
    for (int i = 0; i < p->count; i++) {
        for (int64_t e = 0; e < tensor_elems(&p->x[i]); e++) {
            double *v = &p->value[i][e], at = *v;
            *v = at + h;
            double up = project(p, proj, n, y);
            *v = at - h;
            double down = project(p, proj, n, y);
            *v = at;
            double want = (up - down) / (2 * h), got = (double)p->grad[i][e] - (0.25 * (double)(e % 5) - 0.5);
            if (!(fabs(got - want) <= tolerance * (1 + fabs(want))))
                fail_msg("%s: gradient of input %d at %lld is %.9g, not %.9g", p->name, i, (long long)e, got, want);
        }
    }
}

static void run_problem(struct problem *p)
{
    static float proj[ELEMS], out[ELEMS], grads[INPUTS][ELEMS];
    static double y[ELEMS];
    struct tape *t, *wide;
    struct workers *w;
    uint32_t s = 99;
    fill(p);
    for (int i = 0; i < ELEMS; i++)
        proj[i] = draw(&s);
    assert_null(workers_open(3, &w));
    assert_null(tape_open(NULL, NULL, 0, &t));
    assert_null(tape_open(w, NULL, 0, &wide));

    pass(p, t, TAPE_DRY, NULL, 0, 0);
    for (int e = 0; e < ELEMS; e++)
        assert_true(p->grad[0][e] == 0.25f * (float)(e % 5) - 0.5f);
    size_t dry_bytes = t->arena.used_bytes; /* so small that tape_end had no blocks to join */
    uint64_t allocations = mem_count();
    const float *got = pass(p, t, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0);
    assert_true(dry_bytes > 0);
    assert_int_equal(t->arena.used_bytes, dry_bytes);
    assert_int_equal(mem_count(), allocations);

    tape_begin(wide, TAPE_DRY);
    int64_t n = tensor_elems(p->op(wide, p));
    p->ref(p, y);
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - y[i]) <= 2e-6 * (1 + fabs(y[i]))))
            fail_msg("%s: output %lld is %.9g, not %.9g", p->name, (long long)i, (double)got[i], y[i]);
    check_gradients(p, proj, n);
    memcpy(out, got, (size_t)n * sizeof(float));
    memcpy(grads, p->grad, sizeof grads);

    got = pass(p, t, TAPE_TRAIN, proj, TAPE_BACKWARD_INPUT, TAPE_BACKWARD_WEIGHT);
    assert_memory_equal(got, out, (size_t)n * sizeof(float));
    assert_memory_equal(p->grad, grads, sizeof grads);
    got = pass(p, wide, TAPE_TRAIN, proj, TAPE_BACKWARD_ALL, 0);
    assert_memory_equal(got, out, (size_t)n * sizeof(float));
    assert_memory_equal(p->grad, grads, sizeof grads);
    got = pass(p, wide, TAPE_FORWARD, NULL, 0, 0);
    assert_memory_equal(got, out, (size_t)n * sizeof(float));

    for (int i = 0; i < p->count; i++) { /* a tensor without gradient gets none, the others the same */
        prefill(p);
        p->x[i].grad = NULL;
        tape_begin(t, TAPE_TRAIN);
        struct tensor *o = p->op(t, p);
        assert_null(tape_end(t));
        assert_true(o->grad != NULL || p->count == 1);
        if (o->grad)
            assert_null(tape_backward(t, o, proj, TAPE_BACKWARD_ALL));
        for (int j = 0; j < p->count; j++)
            if (j != i)
                assert_memory_equal(p->grad[j], grads[j], sizeof grads[j]);
        for (int e = 0; e < ELEMS; e++)
            assert_true(p->grad[i][e] == 0.25f * (float)(e % 5) - 0.5f);
        p->x[i].grad = p->grad[i];
    }
    tape_close(t);
    tape_close(wide);
    workers_close(w);
}

/* ---- the ops and their formulas ---- */

static struct tensor *in(const struct problem *p, int i)
{
    return (struct tensor *)&p->x[i];
}

static const int32_t ids[] = { 3, 0, 6, 3, 3, 1 };

static struct tensor *do_embedding(struct tape *t, const struct problem *p)
{
    return op_embedding(t, in(p, 0), ids, 6);
}

static void ref_embedding(const struct problem *p, double *y)
{
    int64_t c = p->x[0].dim[1];
    for (int64_t i = 0; i < 6 * c; i++)
        y[i] = p->in[0][ids[i / c] * c + i % c];
}

static struct tensor *do_linear(struct tape *t, const struct problem *p)
{
    return op_linear(t, in(p, 0), in(p, 1), p->count > 2 ? in(p, 2) : NULL);
}

static void ref_linear(const struct problem *p, double *y)
{
    int64_t n = p->x[0].dim[0], k = p->x[0].dim[1], m = p->x[1].dim[0];
    for (int64_t i = 0; i < n * m; i++) {
        y[i] = p->count > 2 ? p->in[2][i % m] : 0;
        for (int64_t e = 0; e < k; e++)
            y[i] += p->in[0][i / m * k + e] * p->in[1][i % m * k + e];
    }
}

static struct tensor *do_low_rank(struct tape *t, const struct problem *p)
{
    struct low_rank low = { in(p, 2), in(p, 3), -0.75f };
    return op_linear_low_rank(t, in(p, 0), in(p, 1), p->count > 4 ? in(p, 4) : NULL, &low);
}

static void ref_low_rank(const struct problem *p, double *y)
{
    int64_t n = p->x[0].dim[0], k = p->x[0].dim[1], m = p->x[1].dim[0], rank = p->x[2].dim[0];
    for (int64_t i = 0; i < n * m; i++) {
        y[i] = p->count > 4 ? p->in[4][i % m] : 0;
        for (int64_t e = 0; e < k; e++) {
            double w = p->in[1][i % m * k + e];
            for (int64_t r = 0; r < rank; r++)
                w -= 0.75 * p->in[3][i % m * rank + r] * p->in[2][r * k + e];
            y[i] += p->in[0][i / m * k + e] * w;
        }
    }
}

static struct tensor *do_rmsnorm(struct tape *t, const struct problem *p)
{
    return op_rmsnorm(t, in(p, 0), in(p, 1), 0.01f);
}

static void ref_rmsnorm(const struct problem *p, double *y)
{
    int64_t c = p->x[1].dim[0];
    for (int64_t i = 0; i < tensor_elems(&p->x[0]) / c; i++) {
        double sum = 0;
        for (int64_t j = i * c; j < (i + 1) * c; j++)
            sum += p->in[0][j] * p->in[0][j];
        for (int64_t j = i * c; j < (i + 1) * c; j++)
            y[j] = p->in[0][j] / sqrt(sum / (double)c + (double)0.01f) * p->in[1][j - i * c];
    }
}

static const int32_t whole[] = { 0, 7 };
static const int32_t positions[] = { 0, 1, 5, 1000, 0, 1, 2 };

static struct tensor *do_rope(struct tape *t, const struct problem *p)
{
    return op_rope(t, in(p, 0), positions, &(struct rope){ .theta = 500 });
}

/* Yarn, whose amplitude the gradient has too. */
static const struct rope stretched = { 500, ROPE_YARN, 4, 64, 0, 0, 32, 1, 1.5 };

static struct tensor *do_stretched(struct tape *t, const struct problem *p)
{
    return op_rope(t, in(p, 0), positions, &stretched);
}

static void ref_stretched(const struct problem *p, double *y)
{
    int64_t h = p->x[0].dim[1], d = p->x[0].dim[2];
    double frequency[64];
    assert_true(rope_frequencies(&stretched, d, frequency) == 1.5);
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i += d) {
        for (int64_t j = 0; j < d / 2; j++) {
            double a = positions[i / (h * d)] * frequency[j], u = p->in[0][i + j], v = p->in[0][i + j + d / 2];
            y[i + j] = 1.5 * (u * cos(a) - v * sin(a));
            y[i + j + d / 2] = 1.5 * (v * cos(a) + u * sin(a));
        }
    }
}

static void ref_rope(const struct problem *p, double *y)
{
    int64_t h = p->x[0].dim[1], d = p->x[0].dim[2];
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i += d) {
        for (int64_t j = 0; j < d / 2; j++) {
            double a = positions[i / (h * d)] * pow(500.0, -2.0 * (double)j / (double)d), u = p->in[0][i + j],
                   v = p->in[0][i + j + d / 2];
            y[i + j] = u * cos(a) - v * sin(a);
            y[i + j + d / 2] = v * cos(a) + u * sin(a);
        }
    }
}

/* Columns 1, 3, 5 of heads, two of a row that all heads have, zeros. */
static struct tensor *do_join(struct tape *t, const struct problem *p)
{
    const struct join_part parts[] = { { in(p, 0), 1, 2, 3 }, { in(p, 1), 1, 1, 2 }, { NULL, 0, 0, 2 } };
    return op_join(t, 3, parts, 3);
}

static void ref_join(const struct problem *p, double *y)
{
    int64_t n = p->x[0].dim[0], own = p->x[0].dim[2], shared = p->x[1].dim[p->x[1].ndim - 1];
    for (int64_t i = 0; i < n * 3; i++, y += 7) {
        for (int j = 0; j < 3; j++)
            y[j] = p->in[0][i * own + 1 + 2 * j];
        for (int j = 0; j < 2; j++)
            y[3 + j] = p->in[1][i / 3 * shared + 1 + j];
        y[5] = y[6] = 0;
    }
}

static struct tensor *do_attention(struct tape *t, const struct problem *p)
{
    return op_attention(t, in(p, 0), in(p, 1), in(p, 2), &p->seg, p->window, NULL);
}

static void ref_attention(const struct problem *p, double *y)
{
    int64_t heads = p->x[0].dim[1], groups = p->x[1].dim[1], d = p->x[0].dim[2];
    for (int32_t s = 0; s < p->seg.count; s++) {
        for (int64_t i = p->seg.offset[s]; i < p->seg.offset[s + 1]; i++) {
            for (int64_t h = 0; h < heads; h++) {
                const double *q = p->in[0] + (i * heads + h) * d;
                double *o = y + (i * heads + h) * d, total = 0;
                memset(o, 0, (size_t)d * sizeof *o);
                for (int64_t j = p->seg.offset[s]; j <= i; j++) {
                    if (p->window && i - j >= p->window)
                        continue;
                    int64_t row = (j * groups + h / (heads / groups)) * d;
                    double score = 0;
                    for (int64_t e = 0; e < d; e++)
                        score += q[e] * p->in[1][row + e] / sqrt((double)d);
                    total += exp(score);
                    for (int64_t e = 0; e < d; e++)
                        o[e] += exp(score) * p->in[2][row + e];
                }
                for (int64_t e = 0; e < d; e++)
                    o[e] /= total;
            }
        }
    }
}

static struct tensor *do_swiglu(struct tape *t, const struct problem *p)
{
    return op_swiglu(t, in(p, 0), in(p, 1));
}

static void ref_swiglu(const struct problem *p, double *y)
{
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i++)
        y[i] = p->in[0][i] / (1 + exp(-p->in[0][i])) * p->in[1][i];
}

static struct tensor *do_add(struct tape *t, const struct problem *p)
{
    return op_add(t, in(p, 0), in(p, 1));
}

static void ref_add(const struct problem *p, double *y)
{
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i++)
        y[i] = p->in[0][i] + p->in[1][i];
}

static struct tensor *do_scale(struct tape *t, const struct problem *p)
{
    return op_scale(t, in(p, 0), -2.5f);
}

static void ref_scale(const struct problem *p, double *y)
{
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i++)
        y[i] = -2.5 * p->in[0][i];
}

static struct tensor *do_sum(struct tape *t, const struct problem *p)
{
    return op_sum(t, in(p, 0));
}

static void ref_sum(const struct problem *p, double *y)
{
    y[0] = 0;
    for (int64_t i = 0; i < tensor_elems(&p->x[0]); i++)
        y[0] += p->in[0][i];
}

static struct tensor *do_logprob(struct tape *t, const struct problem *p)
{
    return op_logprob(t, in(p, 0), in(p, 1), p->id, 0.7f);
}

static void ref_logprob(const struct problem *p, double *y)
{
    int64_t c = p->x[0].dim[1], v = p->x[1].dim[0];
    for (int64_t i = 0; i < p->x[0].dim[0]; i++) {
        double sum = 0, mine = 0;
        for (int64_t j = 0; j < v; j++) {
            double logit = 0;
            for (int64_t e = 0; e < c; e++)
                logit += p->in[0][i * c + e] * p->in[1][j * c + e] / (double)0.7f;
            sum += exp(logit);
            mine = j == p->id[i] ? logit : mine;
        }
        y[i] = p->id[i] < 0 ? 0 : mine - log(sum);
    }
}

/* x twice, so that gradients of one activation are added up from several uses; views between. */
static struct tensor *do_chain(struct tape *t, const struct problem *p)
{
    struct tensor *a = op_linear(t, in(p, 0), in(p, 1), NULL);
    struct tensor *b =
        op_view(t, op_swiglu(t, op_add(t, a, a), a), 3, (int64_t[]){ p->x[0].dim[0], 2, p->x[1].dim[0] / 2 });
    return op_add(t, b, op_scale(t, op_view(t, a, 3, (int64_t[]){ p->x[0].dim[0], 2, p->x[1].dim[0] / 2 }), 3.0f));
}

static void ref_chain(const struct problem *p, double *y)
{
    ref_linear(p, y);
    for (int64_t i = 0; i < p->x[0].dim[0] * p->x[1].dim[0]; i++)
        y[i] = 2 * y[i] / (1 + exp(-2 * y[i])) * y[i] + 3 * y[i];
}

static const int32_t some_targets[] = { 4, -1, 0, -1, 18, 4 };
static const int32_t no_targets[] = { -1, -1 };
static const int32_t offsets[] = { 0, 3, 3, 4, 7 };

static void each_op(void **state)
{
    (void)state;
    static struct problem all[] = {
        { .name = "embedding", .count = 1, .dim = { { 7, 35 } }, .op = do_embedding, .ref = ref_embedding },
        { .name = "linear", .count = 2, .dim = { { 5, 19 }, { 35, 19 } }, .op = do_linear, .ref = ref_linear },
        { .name = "adapted",
          .count = 4,
          .dim = { { 5, 19 }, { 33, 19 }, { 3, 19 }, { 33, 3 } },
          .op = do_low_rank,
          .ref = ref_low_rank,
          .tolerance = 2e-5 },
        { .name = "adapted, with bias",
          .count = 5,
          .dim = { { 7, 4 }, { 6, 4 }, { 8, 4 }, { 6, 8 }, { 6 } },
          .op = do_low_rank,
          .ref = ref_low_rank,
          .tolerance = 2e-5 },
        { .name = "linear with bias",
          .count = 3,
          .dim = { { 9, 7 }, { 70, 7 }, { 70 } },
          .op = do_linear,
          .ref = ref_linear },
        { .name = "linear of one",
          .count = 3,
          .dim = { { 1, 1 }, { 1, 1 }, { 1 } },
          .op = do_linear,
          .ref = ref_linear },
        { .name = "rmsnorm", .count = 2, .dim = { { 5, 35 }, { 35 } }, .op = do_rmsnorm, .ref = ref_rmsnorm },
        { .name = "rmsnorm of heads", .count = 2, .dim = { { 3, 4, 6 }, { 6 } }, .op = do_rmsnorm, .ref = ref_rmsnorm },
        { .name = "rmsnorm, wide", .count = 2, .dim = { { 2, 130 }, { 130 } }, .op = do_rmsnorm, .ref = ref_rmsnorm },
        { .name = "rope", .count = 1, .dim = { { 7, 3, 34 } }, .op = do_rope, .ref = ref_rope },
        { .name = "rope, stretched", .count = 1, .dim = { { 7, 2, 16 } }, .op = do_stretched, .ref = ref_stretched },
        { .name = "rope of 2", .count = 1, .dim = { { 7, 1, 2 } }, .op = do_rope, .ref = ref_rope },
        { .name = "join", .count = 2, .dim = { { 5, 3, 7 }, { 5, 4 } }, .op = do_join, .ref = ref_join },
        { .name = "join, as a head", .count = 2, .dim = { { 2, 3, 6 }, { 2, 1, 3 } }, .op = do_join, .ref = ref_join },
        { .name = "attention",
          .count = 3,
          .dim = { { 7, 4, 6 }, { 7, 2, 6 }, { 7, 2, 6 } },
          .op = do_attention,
          .ref = ref_attention,
          .seg = { 4, offsets, positions } },
        { .name = "attention, one head",
          .count = 3,
          .dim = { { 7, 1, 18 }, { 7, 1, 18 }, { 7, 1, 18 } },
          .op = do_attention,
          .ref = ref_attention,
          .seg = { 4, offsets, NULL } },
        { .name = "attention in a window",
          .count = 3,
          .dim = { { 7, 2, 6 }, { 7, 1, 6 }, { 7, 1, 6 } },
          .op = do_attention,
          .ref = ref_attention,
          .seg = { 1, whole, NULL },
          .window = 3 },
        { .name = "swiglu", .count = 2, .dim = { { 3, 35 }, { 3, 35 } }, .op = do_swiglu, .ref = ref_swiglu },
        { .name = "add", .count = 2, .dim = { { 3, 4, 5 }, { 3, 4, 5 } }, .op = do_add, .ref = ref_add },
        { .name = "scale", .count = 1, .dim = { { 35 } }, .op = do_scale, .ref = ref_scale },
        { .name = "sum", .count = 1, .dim = { { 3, 1100 } }, .op = do_sum, .ref = ref_sum },
        { .name = "logprob",
          .count = 2,
          .dim = { { 6, 7 }, { 19, 7 } },
          .op = do_logprob,
          .ref = ref_logprob,
          .id = some_targets },
        { .name = "logprob of nothing",
          .count = 2,
          .dim = { { 2, 3 }, { 5, 3 } },
          .op = do_logprob,
          .ref = ref_logprob,
          .id = no_targets },
        { .name = "chain",
          .count = 2,
          .dim = { { 5, 6 }, { 8, 6 } },
          .op = do_chain,
          .ref = ref_chain,
          .tolerance = 4e-6 },
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        run_problem(&all[i]);
}

/* ---- errors ---- */

static void expect_error(struct tape *t, struct tensor *y, const char *words)
{
    assert_null(y);
    status *st = tape_end(t);
    assert_non_null(st);
    if (status_code(st) != ST_INVALID || !strstr(status_message(st), words))
        fail_msg("\"%s\" is not in \"%s\"", words, status_message(st));
    status_free(st);
    tape_begin(t, TAPE_TRAIN);
}

static struct tensor of(int ndim, int64_t a, int64_t b, int64_t c)
{
    return (struct tensor){ .dtype = DTYPE_F32, .ndim = ndim, .dim = { a, b, c }, .data = big[0], .grad = big[1] };
}

static void shape_errors(void **state)
{
    (void)state;
    fill_big();
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    tape_begin(t, TAPE_TRAIN);
    struct tensor x = of(2, 4, 8, 0), w = of(2, 3, 7, 0), b = of(1, 4, 0, 0), q = of(3, 4, 3, 8), k = of(3, 4, 2, 8),
                  odd = of(3, 4, 2, 7);
    struct tensor w8 = of(2, 3, 8, 0), big_head = of(3, 4, 1, 258);
    expect_error(t, op_linear(t, &x, &w, NULL), "op_linear: [4, 8] and [3, 7]");
    expect_error(t, op_linear(t, &x, &w8, &b), "op_linear: [3, 8] and [4]");
    expect_error(t, op_linear(t, &q, &w8, NULL), "op_linear");
    expect_error(t, op_rmsnorm(t, &x, &b, 1), "op_rmsnorm: [4, 8] and [4]");
    expect_error(t, op_rope(t, &odd, positions, &(struct rope){ .theta = 10 }), "op_rope: [4, 2, 7]");
    expect_error(t, op_rope(t, &x, positions, &(struct rope){ .theta = 10 }), "op_rope");
    expect_error(t, op_join(t, 3, &(struct join_part){ &q, 0, 1, 9 }, 1), "op_join: [4, 3, 8]");
    expect_error(t, op_join(t, 3, &(struct join_part){ &q, 3, 2, 4 }, 1), "not so many columns");
    expect_error(t, op_join(t, 3, &(struct join_part){ &k, 0, 1, 2 }, 1), "op_join: [4, 2, 8]");
    expect_error(t, op_join(t, 3, (struct join_part[]){ { &q, 0, 1, 2 }, { &w8, 0, 1, 2 } }, 2), "of the same tokens");
    expect_error(t, op_swiglu(t, &x, &w8), "op_swiglu: [4, 8] and [3, 8]");
    expect_error(t, op_add(t, &x, &w8), "op_add: [4, 8] and [3, 8]");
    expect_error(t, op_view(t, &x, 1, (int64_t[]){ 31 }), "op_view: [4, 8] and [31]");
    expect_error(t, op_new(t, 5, (int64_t[]){ 1, 1, 1, 1, 1 }, false), "op_new");
    static const int32_t all[] = { 0, 4 }, shorter[] = { 0, 3 }, back[] = { 0, 3, 2, 4 }, up[] = { 0, 1, 2, 3 },
                         flat[] = { 0, 1, 1, 2 };
    struct segments seg = { 1, all, up };
    expect_error(t, op_attention(t, &q, &k, &k, &seg, 0, NULL), "multiple of G");
    expect_error(t, op_attention(t, &k, &k, &odd, &seg, 0, NULL), "op_attention: [4, 2, 8] and [4, 2, 7]");
    expect_error(t, op_attention(t, &big_head, &big_head, &big_head, &seg, 0, NULL), "256");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 1, shorter, up }, 0, NULL), "4 tokens");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 3, back, NULL }, 0, NULL), "segment 1");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 1, all, flat }, 0, NULL), "token 2");
    static const int32_t target[] = { 0, 1, 2, 3 }, negative[] = { 0, 0, -1, 0 };
    expect_error(t, op_logprob(t, &x, &w8, target, 1), "token 3 has target 3");
    expect_error(t, op_logprob(t, &x, &w8, target, 0), "temperature");
    expect_error(t, op_logprob(t, &x, &w, target, 1), "op_logprob: [4, 8] and [3, 7]");
    expect_error(t, op_embedding(t, &x, (int32_t[]){ 0, 4 }, 2), "token 1 has id 4");
    expect_error(t, op_embedding(t, &x, negative, 4), "token 2 has id -1");
    expect_error(t, op_linear(t, NULL, &w, NULL), "NULL");
    /* the first error stays; NULL goes through */
    struct tensor *none = op_scale(t, op_linear(t, &x, &w, NULL), 2);
    assert_null(op_add(t, none, op_add(t, &x, &w8)));
    expect_error(t, op_sum(t, NULL), "op_linear: [4, 8] and [3, 7]");
    tape_close(t);
}

static void tape_rules(void **state)
{
    (void)state;
    fill_big();
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    struct tensor x = of(2, 40, 80, 0), fixed = x, bad = of(2, 3, 7, 0);
    fixed.grad = NULL;
    status *st;
    tape_begin(t, TAPE_FORWARD);
    struct tensor *y = op_scale(t, &x, 2);
    assert_null(y->grad);
    assert_null(tape_end(t));
    assert_non_null(st = tape_backward(t, y, big[2], TAPE_BACKWARD_ALL));
    status_free(st);
    tape_begin(t, TAPE_TRAIN);
    y = op_scale(t, &fixed, 2);
    assert_null(y->grad); /* nothing to learn below */
    assert_null(tape_end(t));
    assert_non_null(st = tape_backward(t, y, big[2], TAPE_BACKWARD_ALL));
    status_free(st);
    tape_begin(t, TAPE_TRAIN);
    y = op_scale(t, &x, 2);
    assert_null(op_add(t, &x, &bad));
    assert_non_null(st = tape_end(t));
    status_free(st);
    assert_non_null(st = tape_backward(t, y, big[2], TAPE_BACKWARD_ALL)); /* a failed pass is not replayed */
    status_free(st);
    tape_begin(t, TAPE_TRAIN);
    y = op_scale(t, &x, 2);
    assert_null(tape_end(t));
    assert_non_null(st = tape_backward(t, y, big[2], 0));
    status_free(st);
    /* droot NULL: what root->grad holds */
    memset(big[1], 0, sizeof big[1]);
    for (int i = 0; i < 40 * 80; i++)
        ((float *)y->grad)[i] = (float)i;
    assert_null(tape_backward(t, y, NULL, TAPE_BACKWARD_INPUT));
    for (int i = 0; i < 40 * 80; i++)
        assert_true(((float *)x.grad)[i] == 2 * (float)i);
    /* op_new is zeroed after use of the same memory, with and without gradient */
    tape_begin(t, TAPE_TRAIN);
    y = op_new(t, 2, x.dim, true);
    struct tensor *z = op_new(t, 1, x.dim, false);
    for (int i = 0; i < 40 * 80; i++)
        assert_true(((float *)y->data)[i] == 0 && ((float *)y->grad)[i] == 0);
    assert_null(z->grad);
    tape_close(t);

    /* a cap is an error in the dry pass, not a crash later */
    assert_null(tape_open(NULL, NULL, 1 << 20, &t));
    tape_begin(t, TAPE_DRY);
    for (int i = 0; i < 1000; i++)
        op_scale(t, &x, 2);
    assert_non_null(st = tape_end(t));
    assert_int_equal(status_code(st), ST_NO_MEMORY);
    status_free(st);
    tape_close(t);
    tape_close(NULL);
}

/* Dry with the largest shapes, then passes of smaller ones whose sizes would not fill the dry pass's blocks in order.
 */
static void dry_holds_for_smaller(void **state)
{
    (void)state;
    fill_big();
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    struct tensor x = of(2, 512, 512, 0);
    tape_begin(t, TAPE_DRY);
    for (int i = 0; i < 12; i++)
        op_scale(t, &x, 2);
    assert_null(tape_end(t));
    uint64_t before = mem_count();
    for (int64_t n = 512; n > 0; n = n * 4 / 5) {
        struct tensor y = of(2, n, 512, 0);
        tape_begin(t, TAPE_TRAIN);
        struct tensor *last = NULL;
        for (int i = 0; i < 12; i++)
            last = op_scale(t, &y, 2);
        assert_null(tape_end(t));
        assert_null(tape_backward(t, last, big[2], TAPE_BACKWARD_ALL));
    }
    assert_int_equal(mem_count(), before);
    tape_close(t);
}

/* Angles are shared inside a pass, but only by ropes of the same positions, size and growth. */
static void rope_tables_are_told_apart(void **state)
{
    (void)state;
    fill_big();
    static const int32_t other[] = { 3, 4, 5, 6, 7, 8, 9 };
    const struct {
        int64_t n, d;
        const int32_t *position;
        struct rope how;
    } use[] = { { 7, 4, positions, { .theta = 10 } },
                { 7, 8, positions, { .theta = 10 } },
                { 7, 4, other, { .theta = 10 } },
                { 7, 4, positions, { .theta = 20 } },
                { 6, 4, positions, { .theta = 10 } },
                { 7, 4, positions, { 10, ROPE_LINEAR, .factor = 2 } },
                { 7, 4, positions, { 10, ROPE_LINEAR, .factor = 3 } },
                { 7, 4, positions, { 10, ROPE_YARN, 4, 64, 0, 0, 32, 1, 0 } },
                { 7, 4, positions, { 10, ROPE_YARN, 4, 64, 0, 0, 32, 1, 2 } },
                { 7, 4, positions, { .theta = 10 } } };
    enum { USES = sizeof use / sizeof *use };
    struct tape *t;
    struct tensor *y[USES];
    float want[USES][7 * 8];
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int together = 0; together < 2; together++) {
        for (int i = 0; i < USES; i++) {
            struct tensor x = of(3, use[i].n, 1, use[i].d);
            if (!together || i == 0)
                tape_begin(t, TAPE_FORWARD);
            y[i] = op_rope(t, &x, use[i].position, &use[i].how);
            assert_non_null(y[i]);
            if (!together)
                memcpy(want[i], y[i]->data, (size_t)tensor_elems(y[i]) * sizeof(float));
        }
    }
    for (int i = 0; i < USES; i++)
        assert_memory_equal(want[i], y[i]->data, (size_t)tensor_elems(y[i]) * sizeof(float));
    tape_close(t);
}

static void empty_packs(void **state)
{
    (void)state;
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    static const int32_t none[] = { 0 };
    struct segments seg = { 0, none, NULL };
    struct tensor table = of(2, 5, 8, 0), w = of(2, 6, 8, 0), norm = of(1, 8, 0, 0);
    static float grad[64];
    table.grad = w.grad = norm.grad = grad;
    tape_begin(t, TAPE_TRAIN);
    struct tensor *x = op_rmsnorm(t, op_embedding(t, &table, NULL, 0), &norm, 1e-5f);
    struct tensor *q = op_rope(t, op_view(t, x, 3, (int64_t[]){ 0, 2, 4 }), NULL, &(struct rope){ .theta = 100 });
    x = op_view(t, op_attention(t, q, q, q, &seg, 0, NULL), 2, (int64_t[]){ 0, 8 });
    x = op_logprob(t, op_swiglu(t, x, x), &w, NULL, 1);
    struct tensor *sum = op_sum(t, x);
    assert_null(tape_end(t));
    assert_true(*(float *)sum->data == 0);
    assert_null(tape_backward(t, sum, (float[]){ 1 }, TAPE_BACKWARD_ALL));
    for (int i = 0; i < 64; i++)
        assert_true(grad[i] == 0);
    tape_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_op),
        cmocka_unit_test(shape_errors),
        cmocka_unit_test(tape_rules),
        cmocka_unit_test(dry_holds_for_smaller),
        cmocka_unit_test(rope_tables_are_told_apart),
        cmocka_unit_test(empty_packs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
