/* The GEMM against scalar fmaf loops, bit for bit: every remainder, block boundary, layout, thread count and
 * instruction set. Speed is printed beside OpenBLAS's, not asserted. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/ops/cpu/isa.h"
#include "trainer/ops/kernels.h"

#include <cblas.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 700 * 700, BF16 = 64 };

static float *a, *b, *want, *got, *start;
static uint16_t *half;

static float draw(uint32_t *s)
{
    *s = *s * 1664525u + 1013904223u;
    return (float)(int32_t)*s * 0x1p-31f;
}

static int setup(void **state)
{
    (void)state;
    float **all[] = { &a, &b, &want, &got, &start };
    uint32_t s = 1;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        *all[i] = mem_alloc(MOST * sizeof(float));
        for (size_t j = 0; j < MOST; j++)
            (*all[i])[j] = draw(&s);
    }
    half = mem_alloc(MOST * sizeof *half);
    for (size_t j = 0; j < MOST; j++)
        half[j] = bf16_from_f32(b[j]);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    float *all[] = { a, b, want, got, start };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        mem_free(all[i]);
    mem_free(half);
    return 0;
}

static struct gemm shape_of(int64_t m, int64_t n, int64_t k, unsigned variant, float *c)
{
    bool a_trans = variant & 1, b_trans = variant & 2, bf16 = variant & 4; /* of B as stored; BF16: of the products */
    int64_t pad = variant & 8 ? 3 : 0;
    return (struct gemm){ .m = m,
                          .n = n,
                          .k = k,
                          .a = a,
                          .lda = (a_trans ? m : k) + pad,
                          .a_trans = a_trans,
                          .b = bf16 ? (void *)half : b,
                          .b_dtype = bf16 ? DTYPE_BF16 : DTYPE_F32,
                          .ldb = (b_trans ? k : n) + pad,
                          .b_trans = b_trans,
                          .c = c,
                          .ldc = n + pad,
                          .bias = variant & 16 ? start + 7 : NULL,
                          .add = variant & 32,
                          .bf16 = variant & BF16 };
}

/* Everything of c is compared, what lies between its rows too. */
static void check(const struct isa *isa, struct workers *w, int64_t m, int64_t n, int64_t k, unsigned variant)
{
    struct gemm g = shape_of(m, n, k, variant, want);
    size_t bytes = (size_t)((m + 1) * g.ldc) * sizeof(float);
    assert_true((size_t)((m + 4) * (n + 4)) < MOST && (size_t)((m + 4) * (k + 4)) < MOST &&
                (size_t)((n + 4) * (k + 4)) < MOST);
    memcpy(want, start, bytes);
    memcpy(got, start, bytes);
    gemm_ref(&g);
    g.c = got;
    gemm_with(isa, w, &g);
    if (memcmp(want, got, bytes))
        fail_msg("%s, %d threads: %lld x %lld x %lld, variant %u", isa->name, workers_count(w), (long long)m,
                 (long long)n, (long long)k, variant);
}

static void every_remainder(void **state)
{
    (void)state;
    const struct isa *isa;
    for (int i = 0; (isa = isa_at(i)); i++) {
        for (int64_t m = 1; m <= 70; m += m < 18 ? 1 : 7)
            for (int64_t n = 1; n <= 70; n += n < 18 ? 3 : 5)
                for (int64_t k = 1; k <= 70; k += k < 18 ? 4 : 17)
                    check(isa, NULL, m, n, k, (unsigned)(m * 5 + n * 3 + k) & 127);
        for (int64_t j = 1; j <= 70; j++)
            for (unsigned variant = 0; variant < 128; variant++) {
                check(isa, NULL, j, 5, 9, variant);
                check(isa, NULL, 5, j, 9, variant);
                check(isa, NULL, 5, 9, j, variant);
            }
    }
}

static void block_boundaries(void **state)
{
    (void)state;
    static const int64_t edge[] = { 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513 };
    enum { EDGES = sizeof edge / sizeof *edge };
    const struct isa *isa;
    for (int i = 0; (isa = isa_at(i)); i++) {
        if (!strcmp(isa->name, "portable") && i > 0)
            continue; /* a library call per product where the compiler may not use FMA; the remainders above cover it */
        for (size_t e = 0; e < EDGES; e++)
            for (unsigned variant = 0; variant < 4; variant++) {
                check(isa, NULL, edge[e], 33, 40, variant + (e & 1 ? 32 : 0));
                check(isa, NULL, 9, edge[e], 40, variant + (e & 1 ? 16 : 0));
                check(isa, NULL, 9, 33, edge[e], variant + 32);
                check(isa, NULL, 9, 33, edge[e], variant + 16 + 4);
                check(isa, NULL, edge[e], 33, 40, variant + BF16);
                check(isa, NULL, 9, edge[e], 40, variant + BF16);
                check(isa, NULL, 9, 33, edge[e], variant + BF16 + (e & 1 ? 4 : 0));
            }
        check(isa, NULL, 300, 290, 530, 2);
        check(isa, NULL, 270, 290, 530, 1 + BF16);
        check(isa, NULL, 1, 513, 600, 2 + 16);
        check(isa, NULL, 20, 9, 1025, 1);
        check(isa, NULL, 9, 20, 1025, 2 + BF16);
    }
    check(isa_at(0), NULL, 130, 40, 0, 32); /* no k: nothing is added */
    check(isa_at(0), NULL, 130, 40, 0, 16);
}

static void threads_change_no_bit(void **state)
{
    (void)state;
    static const int64_t dim[][3] = {
        { 1, 400, 300 }, { 7, 33, 300 }, { 129, 257, 257 }, { 300, 64, 64 }, { 2, 16, 8 }
    };
    for (int threads = 1; threads <= 3; threads++) {
        struct workers *w;
        assert_null(workers_open(threads, &w));
        for (size_t i = 0; i < sizeof dim / sizeof *dim; i++)
            for (unsigned variant = 0; variant < 128; variant += 7)
                check(isa_at(0), w, dim[i][0], dim[i][1], dim[i][2], variant);
        workers_close(w);
    }
}

/* Exact sums, so that an error in both the fast and the plain version would show too. */
static void small_integers(void **state)
{
    (void)state;
    float x[6] = { 1, 2, 3, 4, 5, 6 }, w[6] = { 1, 0, -1, 2, 1, 0 }, y[4], bias[2] = { 10, 20 };
    struct gemm g = { .m = 2,
                      .n = 2,
                      .k = 3,
                      .a = x,
                      .lda = 3,
                      .b = w,
                      .b_dtype = DTYPE_F32,
                      .ldb = 3,
                      .b_trans = true,
                      .c = y,
                      .ldc = 2,
                      .bias = bias };
    static const float expected[4] = { 8, 24, 8, 33 };
    for (int i = 0; isa_at(i); i++) {
        gemm_with(isa_at(i), NULL, &g);
        assert_memory_equal(y, expected, sizeof y);
    }
}

/* Rounding to bf16: ties, the largest, subnormals, infinities and NaN, in every place of a row, as a factor and its
 * transpose. */
static void rounds_to_bf16(void **state)
{
    (void)state;
    static const uint32_t bits[] = { 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0xbf808000, 0x7f7fffff, 0xff7f8000,
                                     0x00000001, 0x007fffff, 0x807fffff, 0x00800000, 0x7f800000, 0xff800000, 0x80000000,
                                     0x7f800001, 0x7fc12345, 0xffffffff, 0x3f800000, 0x40490fdb };
    enum { COUNT = sizeof bits / sizeof *bits, ROW = 37 };
    float x[ROW], one = 1, out[ROW];
    for (int i = 0; isa_at(i); i++)
        for (size_t shift = 0; shift < COUNT; shift++)
            for (int across = 0; across < 2; across++) {
                for (size_t j = 0; j < ROW; j++)
                    memcpy(&x[j], &bits[(j + shift) % COUNT], sizeof x[j]);
                struct gemm g = {
                    ROW, 1,        1,        .a = x,      .lda = across ? ROW : 1, .a_trans = across, &one, DTYPE_F32,
                    1,   .c = out, .ldc = 1, .bf16 = true
                };
                gemm_with(isa_at(i), NULL, &g);
                for (size_t j = 0; j < ROW; j++) {
                    bool small = fabsf(x[j]) < 0x1p-126f;
                    float expected = small ? 0.0f : bf16_to_f32(bf16_from_f32(x[j]));
                    assert_true(isnan(expected) ? isnan(out[j]) : out[j] == expected);
                }
            }
}

static void allocates_nothing(void **state)
{
    (void)state;
    struct gemm g = shape_of(200, 300, 400, 2, got);
    uint64_t before = mem_count();
    kernels_cpu.gemm(NULL, &g);
    assert_int_equal(mem_count(), before);
}

static double rate(int64_t m, int64_t n, int64_t k, unsigned variant, bool blas)
{
    struct gemm g = shape_of(m, n, k, variant, got);
    double best = 0;
    for (int rep = 0; rep < 5; rep++) {
        int loops = (int)(2e8 / (2.0 * (double)m * (double)n * (double)k)) + 1;
        uint64_t from = clock_ns();
        for (int i = 0; i < loops; i++) {
            if (blas)
                cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, 1, a, (int)k, b, (int)k, 0,
                            got, (int)n);
            else
                gemm_with(isa_at(0), NULL, &g);
        }
        double r = 2.0 * (double)m * (double)n * (double)k * loops / (double)(clock_ns() - from);
        best = r > best ? r : best;
    }
    return best;
}

void openblas_set_num_threads(int n);

static void speed(void **state)
{
    (void)state;
    static const int64_t dim[][3] = { { 1, 512, 512 },   { 8, 512, 512 },   { 64, 256, 256 }, { 256, 256, 256 },
                                      { 512, 512, 512 }, { 640, 700, 640 }, { 512, 256, 688 } };
    openblas_set_num_threads(1);
    for (size_t i = 0; i < sizeof dim / sizeof *dim; i++) {
        const int64_t *d = dim[i];
        double ours = rate(d[0], d[1], d[2], 2, false), theirs = rate(d[0], d[1], d[2], 2, true);
        print_message("%s %4lld x %4lld x %4lld: %6.1f GFLOP/s, OpenBLAS %6.1f (%.0f %%); bf16 %6.1f\n",
                      isa_at(0)->name, (long long)d[0], (long long)d[1], (long long)d[2], ours, theirs,
                      100 * ours / theirs, rate(d[0], d[1], d[2], 2 + BF16, false));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_integers),
        cmocka_unit_test(every_remainder),
        cmocka_unit_test(block_boundaries),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(rounds_to_bf16),
        cmocka_unit_test(allocates_nothing),
        cmocka_unit_test(speed),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
