/* Every op against formulas written here in double: outputs, and gradients by central differences of a random
 * projection of the output. Each case also holds: gradients are added to what is there; the two halves of backward give
 * the bits of both at once; neither threads nor tape modes change a bit; a dry pass takes all memory. Then the row
 * kernels on each instruction set, errors, and AdamW. */
#include "comm/base/mem.h"
#include "trainer/ops/cpu/isa.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { INPUTS = 3, ELEMS = 4096 };

/* A case: inputs, how to call the op, and the same in double. */
struct problem {
    const char *name;
    int count;                            /* inputs */
    int64_t dim[INPUTS][TENSOR_DIMS + 1]; /* ended by 0 */
    struct tensor *(*op)(struct tape *t, const struct problem *p);
    void (*ref)(const struct problem *p, double *y);
    const int32_t *id; /* ids, targets or positions */
    struct segments seg;
    double tolerance; /* 0: 2e-6 */
    /* filled by the harness */
    struct tensor x[INPUTS];
    double *in[INPUTS];
    float data[INPUTS][ELEMS], grad[INPUTS][ELEMS];
    double value[INPUTS][ELEMS];
};

static float draw(uint32_t *s)
{
    *s = *s * 1664525u + 1013904223u;
    return (float)(int32_t)(*s & 0xffffff00u) * 0x1p-31f;
}

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

static const int32_t positions[] = { 0, 1, 5, 1000, 0, 1, 2 };

static struct tensor *do_rope(struct tape *t, const struct problem *p)
{
    return op_rope(t, in(p, 0), positions, 500.0f);
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

static struct tensor *do_attention(struct tape *t, const struct problem *p)
{
    return op_attention(t, in(p, 0), in(p, 1), in(p, 2), &p->seg, NULL);
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
        { .name = "rope of 2", .count = 1, .dim = { { 7, 1, 2 } }, .op = do_rope, .ref = ref_rope },
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

/* ---- fast against plain, at sizes with many tiles and chunks ---- */

enum { BIG = 1 << 18 };
static float big[8][BIG];

static void fill_big(void)
{
    uint32_t s = 5;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < BIG; j++)
            big[i][j] = draw(&s);
}

static void expect_near(const char *what, const float *got, const float *want, int64_t n, double tolerance)
{
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= tolerance * (1 + fabs((double)want[i]))))
            fail_msg("%s: %lld is %.9g, not %.9g", what, (long long)i, (double)got[i], (double)want[i]);
}

static void norm_and_act_against_plain(void **state)
{
    (void)state;
    fill_big();
    int64_t rows = 150, c = 300, n = rows * c;
    static float rrms[2][150], dw[2][300];
    memset(dw, 0, sizeof dw);
    kernels_cpu.rmsnorm(NULL, big[2], rrms[0], big[0], big[1], rows, c, 1e-6f);
    rmsnorm_ref(big[3], rrms[1], big[0], big[1], rows, c, 1e-6f);
    expect_near("rmsnorm", big[2], big[3], n, 2e-6);
    expect_near("rrms", rrms[0], rrms[1], rows, 1e-6);
    memcpy(big[5], big[4], sizeof big[4]);
    kernels_cpu.rmsnorm_bwd(NULL, big[4], big[6], big[0], big[1], rrms[0], rows, c);
    kernels_cpu.rmsnorm_bwd_weight(NULL, dw[0], big[6], big[0], rrms[0], rows, c);
    rmsnorm_bwd_ref(big[5], dw[1], big[6], big[0], big[1], rows, c, 1e-6f);
    expect_near("rmsnorm dx", big[4], big[5], n, 3e-6);
    expect_near("rmsnorm dw", dw[0], dw[1], c, 1e-5);

    fill_big();
    for (int64_t i = 0; i < n; i++)
        big[0][i] *= 30;
    big[0][3] = -200;
    big[0][4] = 200;
    kernels_cpu.swiglu(NULL, big[2], big[0], big[1], n);
    swiglu_ref(big[3], big[0], big[1], n);
    expect_near("swiglu", big[2], big[3], n, 1e-6);
    memcpy(big[2], big[3], sizeof big[2]);
    memcpy(big[4], big[5], sizeof big[4]);
    kernels_cpu.swiglu_bwd(NULL, big[2], big[4], big[6], big[0], big[1], n);
    swiglu_bwd_ref(big[3], big[5], big[6], big[0], big[1], n);
    expect_near("swiglu dgate", big[2], big[3], n, 2e-6);
    expect_near("swiglu dup", big[4], big[5], n, 2e-6);
}

/* Chunk sizes, bf16 weights, vocabularies beyond one block of the sum: against the plain version, and logp bit for bit
 * across chunks. */
static void logprob_against_plain(void **state)
{
    (void)state;
    enum { N = 60, C = 20, V = 1500 };
    static float logp[3][N], lse[3][N], dx[2][N * C], dw[2][V * C], rows[N * C], drows[N * C], logits[N * V];
    static int32_t target[N], index[N];
    static uint16_t half[V * C];
    fill_big();
    for (int i = 0; i < V * C; i++)
        half[i] = bf16_from_f32(big[1][i]);
    for (int i = 0; i < N; i++)
        target[i] = i % 3 == 1 ? -1 : i * 25 % V;
    target[0] = V - 1;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        struct logprob p = { .n = N,
                             .c = C,
                             .v = V,
                             .chunk = N,
                             .x = big[0],
                             .w = bf16 ? (void *)half : big[1],
                             .temperature = 1.3f,
                             .w_dtype = bf16 ? DTYPE_BF16 : DTYPE_F32,
                             .target = target,
                             .rows = rows,
                             .drows = drows,
                             .logits = logits,
                             .index = index,
                             .dlogp = big[2] };
        p.logp = logp[2];
        p.lse = lse[2];
        p.dx = dx[1];
        p.dw = dw[1];
        memset(dx, 0, sizeof dx);
        memset(dw, 0, sizeof dw);
        logprob_ref(&p);
        logprob_bwd_ref(&p);
        static const int64_t chunk[] = { N, 1, 7, 40 };
        for (size_t i = 0; i < sizeof chunk / sizeof *chunk; i++) {
            p.chunk = chunk[i];
            p.logp = logp[i > 0];
            p.lse = lse[i > 0];
            p.dx = dx[0];
            p.dw = dw[0];
            memset(dx[0], 0, sizeof dx[0]);
            memset(dw[0], 0, sizeof dw[0]);
            kernels_cpu.logprob(NULL, &p);
            kernels_cpu.logprob_bwd(NULL, &p);
            expect_near("logp", p.logp, logp[2], N, 2e-6);
            expect_near("dx", dx[0], dx[1], N * C, 2e-6);
            expect_near("dw", dw[0], dw[1], V * C, 2e-6);
            assert_memory_equal(p.logp, logp[0], sizeof logp[0]);
        }
    }
}

/* Entropy and the rest against the plain version; logp keeps its bits; bits depend on no chunk. */
static void logprob_stats_against_plain(void **state)
{
    (void)state;
    enum { N = 60, C = 20, STATS = 4 };
    static float logp[2][N], lse[2][N], stats[3][STATS][N], rows[N * C], logits[N * 1500];
    static int32_t target[N], index[N];
    fill_big();
    for (int i = 0; i < N * C; i++)
        big[0][i] *= (float)(1 + i / C % 7); /* flat rows and sharp ones */
    for (int64_t v = 1; v <= 1500; v += v < 40 ? 1 : 365) {
        struct logprob p = {
            .n = N, .c = C, .v = v, .x = big[0], .w = big[1], .w_dtype = DTYPE_F32, .temperature = 0.8f
        };
        p.target = target;
        p.rows = rows;
        p.logits = logits;
        p.index = index;
        for (int i = 0; i < N; i++)
            target[i] = i % 5 == 1 ? -1 : (int32_t)(i * 25 % v);
        for (int i = 0; i < N; i += 2) { /* every other one hits the top */
            double best = -INFINITY;
            for (int64_t j = 0; j < v && target[i] >= 0; j++) {
                double z = 0;
                for (int c = 0; c < C; c++)
                    z += (double)big[0][i * C + c] * (double)big[1][j * C + c];
                target[i] = z > best ? (int32_t)j : target[i];
                best = z > best ? z : best;
            }
        }
        static const int64_t chunk[] = { N, 1, 7, 40 };
        memset(stats, 0x7f, sizeof stats);
        for (int i = 0; i < 5; i++) {
            float(*s)[N] = stats[i == 4 ? 2 : i > 0];
            p.chunk = i < 4 ? chunk[i] : N;
            p.logp = logp[0];
            p.lse = lse[0];
            p.stats = (struct logprob_stats){ 0 };
            kernels_cpu.logprob(NULL, &p);
            p.logp = logp[1];
            p.lse = lse[1];
            p.stats = (struct logprob_stats){ s[0], s[1], s[2], s[3] };
            (i < 4 ? kernels_cpu.logprob(NULL, &p) : logprob_stats_ref(&p));
            assert_memory_equal(logp[0], logp[1], sizeof logp[0]);
            assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
            if (i < 4)
                assert_memory_equal(s, stats[0], sizeof stats[0]);
        }
        for (int k = 0; k < STATS; k++)
            expect_near("stats", stats[0][k], stats[2][k], N, k == 3 ? 0 : 3e-6);
        for (int i = 0; i < N; i += 2)
            assert_true(stats[0][3][i] == (target[i] >= 0 ? 1.0f : 0.0f));
    }
}

/* Equal logits: entropy log V, sum of squares 1 / V, and the top is the smallest index. */
static void logprob_stats_of_ties(void **state)
{
    (void)state;
    enum { V = 9 };
    float one[1] = { 2 }, w[V] = { 3, 3, 3, 3, 3, 3, 3, 3, 3 };
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int32_t low = 0; low < V; low++) /* logits before index `low` are lower */
        for (int32_t target = 0; target < V; target++) {
            for (int32_t v = 0; v < V; v++)
                w[v] = v < low ? -60 : 3;
            struct tensor x = { .dtype = DTYPE_F32, .ndim = 2, .dim = { 1, 1 }, .data = one };
            struct tensor y = { .dtype = DTYPE_F32, .ndim = 2, .dim = { V, 1 }, .data = w };
            struct logprob_stats s;
            tape_begin(t, TAPE_FORWARD);
            struct tensor *logp = op_logprob_stats(t, &x, &y, &target, 2.0f, &s);
            assert_null(tape_end(t));
            float equal = (float)(V - low);
            assert_true(*s.top == (target == low ? 1.0f : 0.0f));
            assert_true(fabsf(*s.entropy - logf(equal)) < 1e-6f && fabsf(*s.log_square + logf(equal)) < 1e-6f);
            assert_true(fabsf(*s.logit - (3 * equal - 60 * (float)low) / V) < 1e-5f);
            assert_true(target < low || fabsf(*(float *)logp->data + logf(equal)) < 1e-6f);
        }
    tape_close(t);
}

/* An op whose scored tokens do not fit in one chunk, and whose vocabulary makes the chunk smaller. */
static void logprob_chunks(void **state)
{
    (void)state;
    enum { N = 300, C = 2, V = 100000 };
    fill_big();
    static int32_t target[N];
    for (int i = 0; i < N; i++)
        target[i] = i * 331 % V;
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    for (int64_t v = 1000; v <= V; v *= 100) {
        struct tensor x = { .dtype = DTYPE_F32, .ndim = 2, .dim = { N, C }, .data = big[0] };
        struct tensor w = { .dtype = DTYPE_F32, .ndim = 2, .dim = { v, C }, .data = big[1] };
        for (int i = 0; i < N; i++)
            target[i] = target[i] % (int32_t)v;
        tape_begin(t, TAPE_FORWARD);
        struct tensor *y = op_logprob(t, &x, &w, target, 1.0f);
        assert_null(tape_end(t));
        for (int i = 0; i < N; i += 37) {
            double sum = 0, mine = 0;
            for (int64_t j = 0; j < v; j++) {
                double logit = (double)big[0][i * C] * (double)big[1][j * C] +
                               (double)big[0][i * C + 1] * (double)big[1][j * C + 1];
                sum += exp(logit);
                mine = j == target[i] ? logit : mine;
            }
            assert_true(fabs(((float *)y->data)[i] - (mine - log(sum))) < 3e-6 * fabs(mine - log(sum)));
        }
    }
    tape_close(t);
}

static void bf16_weights(void **state)
{
    (void)state;
    fill_big();
    static uint16_t half[64 * 40];
    for (int i = 0; i < 64 * 40; i++) {
        half[i] = bf16_from_f32(big[1][i]);
        big[1][i] = bf16_to_f32(half[i]);
    }
    struct tensor x = { .dtype = DTYPE_F32, .ndim = 2, .dim = { 9, 40 }, .data = big[0], .grad = big[6] };
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    static float out[2][4][64 * 40];
    for (int b = 0; b < 2; b++) {
        struct tensor w = {
            .dtype = b ? DTYPE_BF16 : DTYPE_F32, .ndim = 2, .dim = { 64, 40 }, .data = b ? (void *)half : big[1]
        };
        struct tensor v = { .dtype = w.dtype, .ndim = 1, .dim = { 40 }, .data = w.data }, bias = v;
        bias.dim[0] = 64;
        memset(big[6], 0, sizeof big[6]);
        tape_begin(t, TAPE_TRAIN);
        struct tensor *y = op_linear(t, op_rmsnorm(t, &x, &v, 1e-5f), &w, &bias), *e = op_embedding(t, &w, ids, 6);
        assert_null(tape_end(t));
        assert_null(tape_backward(t, y, big[3], TAPE_BACKWARD_ALL));
        memcpy(out[b][0], y->data, 9 * 64 * sizeof(float));
        memcpy(out[b][1], e->data, 6 * 40 * sizeof(float));
        memcpy(out[b][2], big[6], 9 * 40 * sizeof(float));
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    tape_close(t);
}

/* ---- rows on every instruction set ---- */

static void rows_agree(void **state)
{
    (void)state;
    fill_big();
    for (int j = 0; j < 4096; j++)
        big[4][j] = fabsf(big[4][j]);
    const struct isa *best = isa_at(0), *isa;
    for (int i = 1; (isa = isa_at(i)); i++) {
        for (int64_t n = 0; n < 1200; n += n < 70 ? 1 : 113) {
            const float *a = big[0] + 1, *b = big[1], *c = big[2] + 3;
            float x[2][1200], y[2][1200], z[2][1200], u[2][4];
            double d[2][6];
            for (int k = 0; k < 2; k++) {
                const struct isa *s = k ? isa : best;
                memcpy(x[k], big[3], sizeof x[k]);
                memcpy(y[k], big[4], sizeof y[k]);
                memcpy(z[k], big[5], sizeof z[k]);
                u[k][0] = s->dot(a, b, n);
                u[k][1] = s->dot3(a, b, c, n);
                u[k][2] = s->max(a, n);
                d[k][0] = s->sum(a, true, n);
                d[k][1] = s->sum(a, false, n);
                d[k][2] = s->exp_sum_wide(a, 3.0f, 0.5f, n);
                s->exp_sums_wide(a, 3.0f, 0.5f, n, d[k] + 3);
                assert_true(d[k][2] == d[k][3]);
                s->softmax_bwd(x[k], b, 0.3f, 0.2f, n);
                u[k][3] = s->exp_sum(x[k], 9.0f, 0.25f, n);
                s->exp(z[k], z[k], n);
                s->exp_scaled(z[k], 2.0f, 0.1f, -0.3f, n);
                s->scale(z[k], z[k], 0.7f, n);
                s->axpy(z[k], a, 0.3f, n);
                s->add(z[k], z[k], c, n);
                s->mul_add(z[k], a, b, 0.7f, n);
                s->rmsnorm_bwd(z[k], a, b, c, 1.3f, 0.7f, n);
                struct adamw_scalars h = { 0.1f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-8f, 0.01f, 1.1f, 1.2f, 0.7f };
                s->adamw(x[k], a, z[k], y[k], &h, n);
                s->swiglu_bwd(x[k], y[k], a, b, c, n);
                s->rotate(x[k], a, b, -1.0f, true, n / 2);
                s->swiglu(y[k] + 0, x[k], c, n);
                s->mul_scaled(x[k], a, z[k], 0.3f, n);
            }
            assert_memory_equal(x[0], x[1], sizeof x[0]);
            assert_memory_equal(y[0], y[1], sizeof y[0]);
            assert_memory_equal(z[0], z[1], sizeof z[0]);
            assert_memory_equal(u[0], u[1], sizeof u[0]);
            assert_memory_equal(d[0], d[1], sizeof d[0]);
        }
    }
}

/* Rows touch n elements and no more, and sums count each once. */
static void rows_count(void **state)
{
    (void)state;
    float one[100], x[100];
    for (int i = 0; i < 100; i++)
        one[i] = 1;
    for (int k = 0; isa_at(k); k++) {
        const struct isa *s = isa_at(k);
        assert_true(s->max(one, 0) == -INFINITY);
        for (int64_t n = 0; n < 90; n++) {
            assert_true(s->dot(one, one, n) == (float)n && s->dot3(one, one, one, n) == (float)n &&
                        s->sum(one, true, n) == (double)n);
            for (int64_t hot = 0; hot < n; hot++) {
                memcpy(x, one, sizeof x);
                x[hot] = 2;
                assert_true(s->max(x, n) == 2.0f && s->dot(x, one, n) == (float)(n + 1));
            }
            for (int i = 0; i < 100; i++)
                x[i] = 0;
            double sum[3];
            s->exp_sums_wide(x, 5.0f, 0.0f, n, sum);
            assert_true(sum[0] == (double)n && sum[1] == 0 && sum[2] == (double)n);
            assert_true(s->exp_sum(x, 1.0f, 0.0f, n) == (float)n && s->exp_sum_wide(x, 0.0f, 0.0f, n) == (double)n);
            for (int64_t i = 0; i < 100; i++)
                assert_true(x[i] == (i < n ? 1.0f : 0.0f));
            s->axpy(x, one, 1.0f, n);
            for (int64_t i = 0; i < 100; i++)
                assert_true(x[i] == (i < n ? 2.0f : 0.0f));
        }
    }
}

/* e^x within 2 ulp over the whole range, its ends, and what is no number. */
static void exp_accuracy(void **state)
{
    (void)state;
    double worst = 0;
    float x[16], y[16];
    for (float v = -87.3f; v < 88.7f; v += 0.00013f * 16) {
        for (int i = 0; i < 16; i++)
            x[i] = v + 0.00013f * (float)i;
        isa_best()->exp(y, x, 16);
        for (int i = 0; i < 16; i++) {
            double want = exp((double)x[i]), ulp = (double)(nextafterf((float)want, INFINITY) - (float)want);
            double off = fabs((double)y[i] - want) / ulp;
            worst = off > worst ? off : worst;
        }
    }
    print_message("exp: %.3f ulp at worst\n", worst);
    assert_true(worst < 2);
    static const float edge[] = { 0.0f,  -0.0f,    1.0f,      -1.0f,   88.72f, 88.73f,  89.5f,
                                  1e30f, INFINITY, -INFINITY, -103.0f, -1e30f, -104.5f, 1e-30f };
    isa_best()->exp(y, edge, 14);
    for (int i = 0; i < 14; i++) {
        float want = expf(edge[i]);
        assert_true(y[i] == want || fabsf(y[i] - want) <= 2e-7f * want + 0x1p-148f);
    }
    x[0] = NAN;
    isa_best()->exp(y, x, 1);
    assert_true(isnan(y[0]));
}

/* ---- sums ---- */

static void sums(void **state)
{
    (void)state;
    fill_big();
    static double part[300], again[300];
    struct workers *w;
    assert_null(workers_open(3, &w));
    static const int64_t length[] = { 0, 1, 1023, 1024, 1025, 5000, 200000 };
    for (size_t i = 0; i < sizeof length / sizeof *length; i++) {
        int64_t n = length[i], blocks = (n + 1023) / 1024;
        for (int squared = 0; squared < 2; squared++) {
            double want = 0;
            for (int64_t j = 0; j < n; j++)
                want += squared ? (double)big[0][j] * (double)big[0][j] : (double)big[0][j];
            block_sums(NULL, big[0], n, squared, part);
            block_sums(w, big[0], n, squared, again);
            assert_memory_equal(part, again, (size_t)blocks * sizeof *part);
            double got = tree_sum(part, blocks);
            assert_true(fabs(got - want) <= 1e-12 * (1 + fabs(want)) * 1000);
            /* aligned cuts meet in the same nodes: 4 blocks, then the rest */
            if (blocks > 4 && blocks <= 8) {
                double low[4], high[4];
                memcpy(low, again, sizeof low);
                memcpy(high, again + 4, (size_t)(blocks - 4) * sizeof *high);
                assert_true(tree_sum(low, 4) + tree_sum(high, blocks - 4) == got);
            }
        }
    }
    workers_close(w);
    double s[] = { 1e16, 1, -1e16, 1, 1 }; /* ((1e16 + 1) + (-1e16 + 1)) + 1: neighbours first */
    assert_true(tree_sum(s, 5) == ((1e16 + 1) + (-1e16 + 1)) + 1);
}

/* ---- AdamW ---- */

static void adamw(void **state)
{
    (void)state;
    /* step 1 from zero moments: the update is lr sign(g) for eps = 0, plus decay */
    float p[3] = { 1, -2, 3 }, g[3] = { 0.5f, -4, 1e-3f }, m[3] = { 0 }, v[3] = { 0 };
    adamw_update(NULL, p, g, m, v, 3, 0.01, 0.9, 0.999, 0, 0.1, 1, 1);
    static const double want[] = { 1 - 0.01 - 0.001, -2 + 0.01 + 0.002, 3 - 0.01 - 0.003 };
    for (int i = 0; i < 3; i++)
        assert_true(fabs((double)p[i] - want[i]) < 1e-6 && fabs((double)m[i] - 0.1 * (double)g[i]) < 1e-6);

    enum { N = 20000 };
    fill_big();
    struct workers *w;
    assert_null(workers_open(3, &w));
    memset(big[2], 0, sizeof big[2]);
    memset(big[3], 0, sizeof big[3]);
    memcpy(big[4], big[0], sizeof big[0]);
    memset(big[5], 0, sizeof big[5]);
    memset(big[6], 0, sizeof big[6]);
    for (uint64_t step = 1; step <= 20; step++) {
        for (int i = 0; i < N; i++)
            big[1][i] = big[1][i] * 0.9f + 0.05f * big[7][(i * 7 + (int)step) % BIG];
        adamw_update(w, big[0], big[1], big[2], big[3], N, 3e-3, 0.9, 0.95, 1e-8, 0.1, step, 0.5);
        adamw_ref(big[4], big[1], big[5], big[6], N, 3e-3, 0.9, 0.95, 1e-8, 0.1, step, 0.5);
    }
    expect_near("adamw p", big[0], big[4], N, 2e-6);
    expect_near("adamw m", big[2], big[5], N, 1e-6);
    expect_near("adamw v", big[3], big[6], N, 1e-6);
    expect_near("adamw rest", big[0] + N, big[4] + N, BIG - N, 0);

    /* cuts of the run change no bit */
    fill_big();
    memset(big[3], 0, sizeof big[3]);
    memcpy(big[4], big[0], sizeof big[0]);
    memcpy(big[5], big[2], sizeof big[0]);
    memset(big[6], 0, sizeof big[6]);
    adamw_update(NULL, big[0], big[1], big[2], big[3], N, 1e-3, 0.9, 0.95, 1e-8, 0.1, 3, 1);
    for (size_t at = 0, n; at < N; at += n) {
        n = at < 50 ? 7 : 6001;
        n = n < N - at ? n : N - at;
        adamw_update(w, big[4] + at, big[1] + at, big[5] + at, big[6] + at, n, 1e-3, 0.9, 0.95, 1e-8, 0.1, 3, 1);
    }
    assert_memory_equal(big[0], big[4], sizeof big[0]);
    assert_memory_equal(big[2], big[5], sizeof big[0]);
    workers_close(w);
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
    expect_error(t, op_rope(t, &odd, positions, 10), "op_rope: [4, 2, 7]");
    expect_error(t, op_rope(t, &x, positions, 10), "op_rope");
    expect_error(t, op_swiglu(t, &x, &w8), "op_swiglu: [4, 8] and [3, 8]");
    expect_error(t, op_add(t, &x, &w8), "op_add: [4, 8] and [3, 8]");
    expect_error(t, op_view(t, &x, 1, (int64_t[]){ 31 }), "op_view: [4, 8] and [31]");
    expect_error(t, op_new(t, 5, (int64_t[]){ 1, 1, 1, 1, 1 }, false), "op_new");
    static const int32_t all[] = { 0, 4 }, shorter[] = { 0, 3 }, back[] = { 0, 3, 2, 4 }, up[] = { 0, 1, 2, 3 },
                         flat[] = { 0, 1, 1, 2 };
    struct segments seg = { 1, all, up };
    expect_error(t, op_attention(t, &q, &k, &k, &seg, NULL), "multiple of G");
    expect_error(t, op_attention(t, &k, &k, &odd, &seg, NULL), "op_attention: [4, 2, 8] and [4, 2, 7]");
    expect_error(t, op_attention(t, &big_head, &big_head, &big_head, &seg, NULL), "256");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 1, shorter, up }, NULL), "4 tokens");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 3, back, NULL }, NULL), "segment 1");
    expect_error(t, op_attention(t, &k, &k, &k, &(struct segments){ 1, all, flat }, NULL), "token 2");
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
        y->grad[i] = (float)i;
    assert_null(tape_backward(t, y, NULL, TAPE_BACKWARD_INPUT));
    for (int i = 0; i < 40 * 80; i++)
        assert_true(x.grad[i] == 2 * (float)i);
    /* op_new is zeroed after use of the same memory, with and without gradient */
    tape_begin(t, TAPE_TRAIN);
    y = op_new(t, 2, x.dim, true);
    struct tensor *z = op_new(t, 1, x.dim, false);
    for (int i = 0; i < 40 * 80; i++)
        assert_true(((float *)y->data)[i] == 0 && y->grad[i] == 0);
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

/* Angles are shared inside a pass, but only by ropes of the same positions, size and base. */
static void rope_tables_are_told_apart(void **state)
{
    (void)state;
    fill_big();
    static const int32_t other[] = { 3, 4, 5, 6, 7, 8, 9 };
    const struct {
        int64_t n, d;
        const int32_t *position;
        float theta;
    } use[] = { { 7, 4, positions, 10 }, { 7, 8, positions, 10 }, { 7, 4, other, 10 },
                { 7, 4, positions, 20 }, { 6, 4, positions, 10 }, { 7, 4, positions, 10 } };
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
            y[i] = op_rope(t, &x, use[i].position, use[i].theta);
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
    struct tensor *q = op_rope(t, op_view(t, x, 3, (int64_t[]){ 0, 2, 4 }), NULL, 100);
    x = op_view(t, op_attention(t, q, q, q, &seg, NULL), 2, (int64_t[]){ 0, 8 });
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
        cmocka_unit_test(norm_and_act_against_plain),
        cmocka_unit_test(logprob_against_plain),
        cmocka_unit_test(logprob_chunks),
        cmocka_unit_test(logprob_stats_against_plain),
        cmocka_unit_test(logprob_stats_of_ties),
        cmocka_unit_test(bf16_weights),
        cmocka_unit_test(rows_agree),
        cmocka_unit_test(rows_count),
        cmocka_unit_test(exp_accuracy),
        cmocka_unit_test(sums),
        cmocka_unit_test(adamw),
        cmocka_unit_test(shape_errors),
        cmocka_unit_test(tape_rules),
        cmocka_unit_test(dry_holds_for_smaller),
        cmocka_unit_test(rope_tables_are_told_apart),
        cmocka_unit_test(empty_packs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
