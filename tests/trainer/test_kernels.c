/* What the ops compute with, at sizes that have many tiles and chunks: the fast kernels against the plain ones, rows on
 * each instruction set against each other and against libm, sums, and AdamW. */
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

/* ---- fast against plain, at sizes with many tiles and chunks ---- */

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
    kernels_cpu.rmsnorm(NULL, array_of(big[2]), rrms[0], array_of(big[0]), big[1], rows, c, 1e-6f);
    rmsnorm_ref(big[3], rrms[1], big[0], big[1], rows, c, 1e-6f);
    expect_near("rmsnorm", big[2], big[3], n, 2e-6);
    expect_near("rrms", rrms[0], rrms[1], rows, 1e-6);
    memcpy(big[5], big[4], sizeof big[4]);
    kernels_cpu.rmsnorm_bwd(NULL, array_of(big[4]), array_of(big[6]), array_of(big[0]), big[1], rrms[0], rows, c);
    kernels_cpu.rmsnorm_bwd_weight(NULL, dw[0], array_of(big[6]), array_of(big[0]), rrms[0], rows, c);
    rmsnorm_bwd_ref(big[5], dw[1], big[6], big[0], big[1], rows, c, 1e-6f);
    expect_near("rmsnorm dx", big[4], big[5], n, 3e-6);
    expect_near("rmsnorm dw", dw[0], dw[1], c, 1e-5);

    fill_big();
    for (int64_t i = 0; i < n; i++)
        big[0][i] *= 30;
    big[0][3] = -200;
    big[0][4] = 200;
    kernels_cpu.swiglu(NULL, array_of(big[2]), array_of(big[0]), array_of(big[1]), n);
    swiglu_ref(big[3], big[0], big[1], n);
    expect_near("swiglu", big[2], big[3], n, 1e-6);
    memcpy(big[2], big[3], sizeof big[2]);
    memcpy(big[4], big[5], sizeof big[4]);
    kernels_cpu.swiglu_bwd(NULL, array_of(big[2]), array_of(big[4]), array_of(big[6]), array_of(big[0]),
                           array_of(big[1]), n);
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

/* Logits that are kept and logits that are made again, chunk by chunk: the same bits of tokens, and of their gradients;
 * those of the weights are the same sums in parts. Both halves of backward at once, and one after the other. */
static void logits_kept_or_not(void **state)
{
    (void)state;
    enum { N = 150, C = 6, V = 400 };
    static float dx[4][N * C], dw[4][V * C], logp[4][N];
    static int32_t target[N];
    fill_big();
    for (int i = 0; i < N; i++)
        target[i] = i % 11 ? i * 331 % V : -1;
    for (int run = 0; run < 4; run++) {
        struct tape *t;
        bool kept = run < 2;
        assert_null(tape_open(NULL, NULL, kept ? 0 : 900000, &t)); /* a quarter is less than N V floats */
        struct tensor x = { .dtype = DTYPE_F32, .ndim = 2, .dim = { N, C }, .data = big[0], .grad = dx[run] };
        struct tensor w = { .dtype = DTYPE_F32, .ndim = 2, .dim = { V, C }, .data = big[1], .grad = dw[run] };
        tape_begin(t, TAPE_TRAIN);
        struct tensor *y = op_logprob(t, &x, &w, target, 0.7f);
        assert_null(tape_end(t));
        memcpy(logp[run], y->data, sizeof logp[run]);
        assert_null(tape_backward(t, y, big[2], run % 2 ? TAPE_BACKWARD_INPUT : TAPE_BACKWARD_ALL));
        if (run % 2)
            assert_null(tape_backward(t, y, NULL, TAPE_BACKWARD_WEIGHT));
        tape_close(t);
        assert_memory_equal(logp[run], logp[0], sizeof logp[0]);
        assert_memory_equal(dx[run], dx[0], sizeof dx[0]);
        assert_memory_equal(dw[run], dw[kept ? 0 : 2], sizeof dw[0]);
    }
    double most = 0;
    for (int i = 0; i < V * C; i++)
        most = fmax(most, fabs((double)dw[0][i]));
    for (int i = 0; i < V * C; i++)
        assert_true(fabs((double)dw[0][i] - (double)dw[2][i]) < 1e-6 * most);
    assert_true(most > 0.1);
}

/* A tape that multiplies in bf16: every product of a linear layer is gemm_ref's, forward and backward; the
 * log-probabilities and their gradients are those of rounded factors. */
static void products_in_bf16(void **state)
{
    (void)state;
    enum { N = 21, K = 40, M = 27 };
    static float dx[N * K], dw[M * K], want[N * K + N * M + M * K], wide[2][N * K + M * K], dl[2][N * K + M * K];
    static int32_t target[N];
    fill_big();
    memset(dx, 0, sizeof dx);
    memset(dw, 0, sizeof dw);
    struct tensor x = { .dtype = DTYPE_F32, .ndim = 2, .dim = { N, K }, .data = big[0], .grad = dx };
    struct tensor w = { .dtype = DTYPE_F32, .ndim = 2, .dim = { M, K }, .data = big[1], .grad = dw };
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    tape_bf16(t, true);
    tape_begin(t, TAPE_TRAIN);
    struct tensor *y = op_linear(t, &x, &w, NULL);
    assert_null(tape_end(t));
    assert_null(tape_backward(t, y, big[2], TAPE_BACKWARD_ALL));
    struct gemm g = { N, M, K, .a = big[0], .lda = K, .b = big[1], .b_dtype = DTYPE_F32, .ldb = K, .b_trans = true };
    g.c = want;
    g.ldc = M;
    g.bf16 = true;
    gemm_ref(&g);
    assert_memory_equal(y->data, want, N * M * sizeof *want);
    g = (struct gemm){ N, K, M, .a = big[2], .lda = M, .b = big[1], .b_dtype = DTYPE_F32, .ldb = K, .c = want };
    g.ldc = K;
    g.bf16 = true;
    gemm_ref(&g);
    assert_memory_equal(dx, want, sizeof dx);
    g = (struct gemm){ M, K, N, .a = big[2], .lda = M, .a_trans = true, .b = big[0], .b_dtype = DTYPE_F32, .ldb = K };
    g.c = want;
    g.ldc = K;
    g.bf16 = true;
    gemm_ref(&g);
    assert_memory_equal(dw, want, sizeof dw);
    for (int i = 0; i < N; i++)
        target[i] = i * 5 % M;
    for (int i = 0; i < N * K; i++)
        wide[0][i] = bf16_to_f32(bf16_from_f32(big[0][i]));
    for (int i = 0; i < M * K; i++)
        wide[1][i] = bf16_to_f32(bf16_from_f32(big[1][i]));
    float logp[2][N];
    for (int bf16 = 0; bf16 < 2; bf16++) {
        x = (struct tensor){ .dtype = DTYPE_F32, .ndim = 2, .dim = { N, K }, .data = bf16 ? big[0] : wide[0] };
        w = (struct tensor){ .dtype = DTYPE_F32, .ndim = 2, .dim = { M, K }, .data = bf16 ? big[1] : wide[1] };
        x.grad = dl[bf16];
        w.grad = dl[bf16] + N * K;
        tape_bf16(t, bf16);
        tape_begin(t, TAPE_TRAIN);
        y = op_logprob(t, &x, &w, target, 1.0f);
        assert_null(tape_end(t));
        memcpy(logp[bf16], y->data, sizeof logp[0]);
        assert_null(tape_backward(t, y, big[2], TAPE_BACKWARD_ALL));
    }
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)logp[0][i] - (double)logp[1][i]) < 1e-5 * fabs((double)logp[0][i]));
    double most = 0;
    for (int i = 0; i < N * K + M * K; i++)
        most = fmax(most, fabs((double)dl[0][i]));
    assert_true(memcmp(dl[0], dl[1], sizeof dl[0]) != 0);
    for (int i = 0; i < N * K + M * K; i++) /* gradients of logits are rounded */
        assert_true(fabs((double)dl[0][i] - (double)dl[1][i]) < 0.01 * most);
    tape_close(t);
}

static void bf16_weights(void **state)
{
    (void)state;
    static const int32_t ids[] = { 3, 0, 6, 3, 3, 1 };
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_and_act_against_plain),
        cmocka_unit_test(logprob_against_plain),
        cmocka_unit_test(logprob_chunks),
        cmocka_unit_test(logits_kept_or_not),
        cmocka_unit_test(products_in_bf16),
        cmocka_unit_test(logprob_stats_against_plain),
        cmocka_unit_test(logprob_stats_of_ties),
        cmocka_unit_test(bf16_weights),
        cmocka_unit_test(rows_agree),
        cmocka_unit_test(rows_count),
        cmocka_unit_test(exp_accuracy),
        cmocka_unit_test(sums),
        cmocka_unit_test(adamw),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
