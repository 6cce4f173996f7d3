/* Casts against independent arithmetic: every 16-bit value widened by its definition; narrowing against the nearest of
 * all values, found by searching, at and around every value and every midpoint. */
#include "ckpt/cast.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

/* The value of 16 bits, by ldexp. */
static double value(uint16_t h, bool bf)
{
    int fraction_bits = bf ? 7 : 10, most = bf ? 255 : 31, bias = bf ? 127 : 15;
    int e = (h & 0x7fff) >> fraction_bits, m = h & ((1 << fraction_bits) - 1);
    double x;
    if (e == most)
        x = m ? NAN : INFINITY;
    else
        x = ldexp(e ? m + (1 << fraction_bits) : m, (e ? e : 1) - bias - fraction_bits);
    return h & 0x8000 ? -x : x;
}

static uint16_t narrowed(double x, bool bf)
{
    uint16_t h;
    cast_elems(DTYPE_F64, bf ? DTYPE_BF16 : DTYPE_F16, &x, &h, 1);
    return h;
}

static void test_widen(void **state)
{
    (void)state;
    static uint16_t h[65536];
    static double d[65536];
    static float f[65536];
    for (int i = 0; i < 65536; i++)
        h[i] = (uint16_t)i;
    for (int bf = 0; bf < 2; bf++) {
        cast_elems(bf ? DTYPE_BF16 : DTYPE_F16, DTYPE_F64, h, d, 65536);
        cast_elems(bf ? DTYPE_BF16 : DTYPE_F16, DTYPE_F32, h, f, 65536);
        for (int i = 0; i < 65536; i++) {
            double want = value(h[i], bf);
            if (isnan(want)) {
                assert_true(isnan(d[i]) && isnan(f[i]));
                assert_true((narrowed(d[i], bf) & 0x7fff) > (bf ? 0x7f80 : 0x7c00));
                continue;
            }
            assert_true(d[i] == want && (double)f[i] == want && signbit(d[i]) == signbit(want));
            assert_int_equal(narrowed(want, bf), h[i]); /* and back */
        }
    }
}

/* Between neighbours a < b of one sign the midpoint goes to the even one, its neighbours in f64 to the near one. */
static void test_narrow(void **state)
{
    (void)state;
    for (int bf = 0; bf < 2; bf++) {
        uint16_t infinite = bf ? 0x7f80 : 0x7c00;
        for (uint16_t h = 0; h < infinite; h++) {
            double a = value(h, bf), b = value((uint16_t)(h + 1), bf);
            if (h + 1 == infinite) /* as if the exponent went on */
                b = 2 * a - value((uint16_t)(h - 1), bf);
            double mid = a + (b - a) / 2;
            for (int sign = 0; sign < 2; sign++) {
                double s = sign ? -1 : 1;
                uint16_t bit = sign ? 0x8000 : 0;
                assert_int_equal(narrowed(s * mid, bf), (h & 1 ? h + 1 : h) | bit);
                assert_int_equal(narrowed(s * nextafter(mid, 0), bf), h | bit);
                assert_int_equal(narrowed(s * nextafter(mid, INFINITY), bf), (h + 1) | bit);
                assert_int_equal(narrowed(s * nextafter(b, 0), bf), (h + 1) | bit);
            }
        }
        assert_int_equal(narrowed(1e300, bf), infinite);
        assert_int_equal(narrowed(-INFINITY, bf), infinite | 0x8000);
        assert_int_equal(narrowed(5e-324, bf), 0);
        assert_int_equal(narrowed(-1e-300, bf), 0x8000);
    }
}

/* f32 -> f16 is the one rounding of its exact f64; f32 -> bf16 is what training does. */
static void test_f32(void **state)
{
    (void)state;
    uint64_t x = 88172645463325252u;
    for (int i = 0; i < 300000; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint32_t u = (uint32_t)(x >> 20);
        if (i % 2) /* exponents that an f16 has */
            u = (u & 0x807fffff) | (uint32_t)(100 + u % 50) << 23;
        float f;
        uint16_t h, b;
        memcpy(&f, &u, 4);
        cast_elems(DTYPE_F32, DTYPE_BF16, &f, &b, 1);
        cast_elems(DTYPE_F32, DTYPE_F16, &f, &h, 1);
        if (isnan(f)) {
            assert_true(isnan(value(h, false)) && isnan(value(b, true)));
            continue;
        }
        assert_int_equal(b, bf16_from_f32(f));
        assert_int_equal(h, narrowed((double)f, false));
        double d = (double)f * (1 + 1e-9);
        float back;
        cast_elems(DTYPE_F64, DTYPE_F32, &d, &back, 1);
        assert_true(back == (float)d);
    }
}

static void test_which(void **state)
{
    (void)state;
    for (int a = 1; a < DTYPE_COUNT; a++)
        for (int b = 1; b < DTYPE_COUNT; b++)
            assert_int_equal(cast_possible((enum dtype)a, (enum dtype)b), a == b || (a <= 4 && b <= 4));
}

/* Any count, at odd addresses, and not a byte more. */
static void test_counts(void **state)
{
    (void)state;
    static const enum dtype types[] = { DTYPE_F64, DTYPE_F32, DTYPE_F16, DTYPE_BF16 };
    unsigned char in[8 * 600 + 1], out[8 * 600 + 2], one[8];
    for (size_t i = 0; i < sizeof in; i++)
        in[i] = (unsigned char)(i * 7 + 3);
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++)
            for (size_t n = 0; n < 600; n += n % 256 < 2 || n % 256 == 255 ? 1 : 127) {
                size_t from = dtype_bytes(types[a]), to = dtype_bytes(types[b]);
                memset(out, 0xee, sizeof out);
                cast_elems(types[a], types[b], in + 1, out + 1, n);
                for (size_t i = 0; i < n; i++) {
                    cast_elems(types[a], types[b], in + 1 + i * from, one, 1);
                    assert_memory_equal(out + 1 + i * to, one, to);
                }
                assert_true(out[0] == 0xee && out[1 + n * to] == 0xee);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_widen), cmocka_unit_test(test_narrow),
                                        cmocka_unit_test(test_f32), cmocka_unit_test(test_which),
                                        cmocka_unit_test(test_counts) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
