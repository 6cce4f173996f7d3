/* Rounding to bf16 on the CPU, to nearest and by draws, against its definition; rows that move; on one thread and on
 * three. */
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

enum { N = 20000, DIM0 = 41, DIM1 = 30, DIM2 = 50 };

static const struct kernels *const k = &kernels_cpu;

static float value(int i)
{
    return (float)sin(i * 0.7) * (i % 5 ? 1.0f : 1e-3f);
}

/* The two bf16 numbers that x lies between, as bits: towards zero, away from it. */
static void neighbours(float x, uint16_t *in, uint16_t *out)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *in = (uint16_t)(bits >> 16);
    *out = (uint16_t)(*in + ((bits & 0xffffu) != 0));
}

static void each_element_has_its_own_draw(void **state)
{
    (void)state;
    struct workers *three;
    assert_null(workers_open(3, &three));
    float *x = mem_array(NULL, N, sizeof *x);
    uint16_t *y = mem_array(NULL, N, sizeof *y);
    struct rounding r = { .at = { .seed = 99, .sample = 3, .step = 12, .stream = RNG_ROUND },
                          .ndim = 3,
                          .dim = { DIM0, DIM1, DIM2 },
                          .off = { 1, 4, 7 },
                          .len = { 30, 20, 40 },
                          .first = 123 };
    for (int i = 0; i < N; i++)
        x[i] = value(i);
    k->narrow_drawn(three, y, x, N, &r);
    for (int i = 0; i < N; i++) {
        uint64_t e = r.first + (uint64_t)i;
        uint64_t place = ((r.off[0] + e / 800) * DIM1 + r.off[1] + e / 40 % 20) * DIM2 + r.off[2] + e % 40;
        uint16_t in, out;
        uint32_t bits, draw = rng_u32(r.at, place) & 0xffffu;
        memcpy(&bits, &x[i], sizeof bits);
        neighbours(x[i], &in, &out);
        assert_int_equal(y[i], (bits & 0xffffu) + draw >= 0x10000u ? out : in);
    }
    workers_close(three);
    mem_free(x);
    mem_free(y);
}

/* A box cut into two calls, at a whole inner dimension and not, gives the same. */
static void cuts_change_nothing(void **state)
{
    (void)state;
    float x[2000];
    uint16_t whole[2000], parts[2000];
    struct rounding r = {
        .at = { .seed = 5, .stream = RNG_ROUND }, .ndim = 2, .dim = { 100, 40 }, .off = { 20, 0 }, .len = { 50, 40 }
    };
    for (int i = 0; i < 2000; i++)
        x[i] = value(i);
    k->narrow_drawn(NULL, whole, x, 2000, &r);
    k->narrow_drawn(NULL, parts, x, 777, &r);
    r.first = 777;
    k->narrow_drawn(NULL, parts + 777, x + 777, 2000 - 777, &r);
    assert_memory_equal(whole, parts, sizeof whole);
    struct rounding flat = { .at = r.at, .ndim = 1, .dim = { 4000 }, .off = { 800 }, .len = { 2000 } };
    k->narrow_drawn(NULL, parts, x, 2000, &flat);
    assert_memory_equal(whole, parts, sizeof whole);
}

/* On average nothing is lost: the standard error of the mean of N draws is below a hundredth of a step of bf16. */
static void the_mean_stays(void **state)
{
    (void)state;
    float *x = mem_array(NULL, N, sizeof *x);
    uint16_t *y = mem_array(NULL, N, sizeof *y);
    struct rounding r = { .at = { .seed = 1, .stream = RNG_ROUND }, .ndim = 1, .dim = { N }, .len = { N } };
    double sum = 0, step = 0x1p-7;
    for (int i = 0; i < N; i++)
        x[i] = 1.0f + 0.3f * (float)step;
    k->narrow_drawn(NULL, y, x, N, &r);
    for (int i = 0; i < N; i++)
        sum += (double)bf16_to_f32(y[i]);
    assert_true(fabs(sum / N - (double)x[0]) < 0.02 * step);
    mem_free(x);
    mem_free(y);
}

static void nearest(void **state)
{
    (void)state;
    struct workers *three;
    assert_null(workers_open(3, &three));
    float *x = mem_array(NULL, N, sizeof *x), *low = mem_array(NULL, N, sizeof *low);
    uint16_t *y = mem_array(NULL, N, sizeof *y);
    for (int i = 0; i < N; i++)
        x[i] = low[i] = value(i);
    k->narrow(three, y, x, N);
    k->round_low(three, low, N);
    for (int i = 0; i < N; i++) {
        assert_int_equal(y[i], bf16_from_f32(x[i]));
        assert_true(low[i] == bf16_to_f32(y[i]));
    }
    workers_close(three);
    mem_free(x);
    mem_free(low);
    mem_free(y);
}

static void rows_move(void **state)
{
    (void)state;
    enum { ROWS = 900, COLS = 30, LDY = 37, LDX = 41 };
    struct workers *three;
    assert_null(workers_open(3, &three));
    float *x = mem_array(NULL, (size_t)ROWS * LDX, sizeof *x), *y = mem_array(NULL, (size_t)ROWS * LDY, sizeof *y);
    for (int add = 0; add < 2; add++) {
        for (int i = 0; i < ROWS * LDX; i++)
            x[i] = value(i);
        for (int i = 0; i < ROWS * LDY; i++)
            y[i] = (float)i;
        k->copy_rows(three, y, LDY, x, LDX, ROWS, COLS, add);
        for (int i = 0; i < ROWS * LDY; i++) {
            float from = x[i / LDY * LDX + i % LDY], want = i % LDY >= COLS ? (float)i : add ? (float)i + from : from;
            assert_true(y[i] == want);
        }
    }
    workers_close(three);
    mem_free(x);
    mem_free(y);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_element_has_its_own_draw),
        cmocka_unit_test(cuts_change_nothing),
        cmocka_unit_test(the_mean_stays),
        cmocka_unit_test(nearest),
        cmocka_unit_test(rows_move),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
