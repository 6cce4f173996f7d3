/* rng: Philox4x32-10 against the known answers of its authors' Random123 (kat_vectors), Box-Muller normals against
 * numbers computed independently in double, and rng_permute against the definition of a permutation. */
#include "comm/base/mem.h"
#include "comm/base/philox.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void test_known_answers(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } kat[] = {
        { { 0, 0, 0, 0 }, { 0, 0 }, { 1713891541u, 3781805453u, 3159862348u, 2600524760u } },
        { { 4294967295u, 4294967295u, 4294967295u, 4294967295u },
          { 4294967295u, 4294967295u },
          { 1083123565u, 1103641358u, 2718681030u, 1834242557u } },
        { { 608135816u, 2242054355u, 320440878u, 57701188u },
          { 2752067618u, 698298832u },
          { 3513581065u, 2499661035u, 1342301216u, 605187745u } },
    };
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        uint32_t out[4];
        philox4x32(kat[i].counter, kat[i].key, out);
        assert_memory_equal(out, kat[i].out, sizeof out);
    }
}

/* Where each part of an address goes: counter = (element/4, sample, step, stream), key = (seed low, seed high). */
static void test_addresses(void **state)
{
    (void)state;
    struct rng_at at = { .seed = 0x0123456789abcdefu, .sample = 77, .step = 5, .stream = RNG_NOISE };
    for (uint64_t element = 0; element < 24; element++) {
        uint32_t counter[4] = { (uint32_t)(element / 4), 77, 5, 5 }, key[2] = { 0x89abcdefu, 0x01234567u }, out[4];
        philox4x32(counter, key, out);
        assert_int_equal(rng_u32(at, element), out[element % 4]);
        assert_true(fabs(rng_uniform(at, element) - ((double)out[element % 4] + 0.5) / 4294967296.0) < 1e-18);
    }
    assert_int_not_equal(rng_u32(at, 3), rng_u32(at, 3 + ((uint64_t)1 << 34))); /* elements beyond 32 bits of blocks */
}

/* counter {0,0,0,0} of key {1,2}, and {5,7,11,13} of key {42,0}. */
static void test_normals(void **state)
{
    (void)state;
    static const double first[4] = { -2.2676372160536853, -1.5822972237060373, 1.680460477848731, -0.9675584818644529 };
    static const double second[4] = { 0.3092419604872271, 0.5157698865755515, 2.6840284340713154, 0.4398512710585709 };
    struct rng_at a = { .seed = 1 | (uint64_t)2 << 32 }, b = { .seed = 42, .sample = 7, .step = 11, .stream = 13 };
    float block[11];
    for (size_t i = 0; i < 4; i++) {
        assert_true(fabs(rng_normal(a, i) - first[i]) < 1e-14);
        assert_true(fabs(rng_normal(b, 20 + i) - second[i]) < 1e-14);
    }
    for (uint64_t from = 0; from < 9; from++) { /* any start, any length: the same numbers */
        for (size_t n = 0; n < 10; n++) {
            memset(block, 0x7f, sizeof block);
            rng_normals(b, from, n, block);
            for (size_t i = 0; i < n; i++)
                assert_true(fabs((double)block[i] - rng_normal(b, from + i)) < 1e-6);
            unsigned char guard[sizeof *block];
            memset(guard, 0x7f, sizeof guard);
            assert_memory_equal(&block[n], guard, sizeof guard);
        }
    }
}

/* Mean and variance of 40,000 normals lie within five standard errors. */
static void test_normal_moments(void **state)
{
    (void)state;
    enum { N = 40000 };
    double sum = 0, squares = 0;
    for (uint64_t i = 0; i < N; i++) {
        double z = rng_normal((struct rng_at){ .seed = 3, .stream = RNG_NOISE }, i);
        sum += z;
        squares += z * z;
    }
    assert_true(fabs(sum / N) < 5 / sqrt(N));
    assert_true(fabs(squares / N - 1) < 5 * sqrt(2.0 / N));
}

static void test_below(void **state)
{
    (void)state;
    static const uint64_t ns[] = { 1, 2, 3, 7, 100, 1u << 20, (uint64_t)1 << 32, ((uint64_t)1 << 63) + 1, UINT64_MAX };
    struct rng_at at = { .seed = 9, .stream = RNG_DATA };
    for (size_t k = 0; k < sizeof ns / sizeof *ns; k++) {
        uint64_t low = UINT64_MAX, high = 0;
        for (uint64_t i = 0; i < 2000; i++) {
            uint64_t v = rng_below(at, i, ns[k]);
            assert_true(v < ns[k]);
            low = v < low ? v : low;
            high = v > high ? v : high;
        }
        assert_true(low <= ns[k] / 100 && high >= ns[k] - 1 - ns[k] / 100); /* both ends are reached */
    }
    unsigned count[6] = { 0 }; /* and evenly: 60,000 throws of a die, five standard deviations */
    for (uint64_t i = 0; i < 60000; i++)
        count[rng_below(at, i, 6)]++;
    for (int i = 0; i < 6; i++)
        assert_in_range(count[i], 10000 - 460, 10000 + 460);
    uint64_t wide = (uint64_t)rng_u32(at, 6) << 32 | rng_u32(at, 7); /* element 3 is words 6 and 7 */
    assert_int_equal(rng_below(at, 3, UINT64_MAX), (uint64_t)((unsigned __int128)wide * UINT64_MAX >> 64));
}

static void check_bijection(uint64_t seed, uint32_t epoch, uint64_t n)
{
    unsigned char *seen = mem_calloc(n, 1);
    assert_non_null(seen);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t v = rng_permute(seed, epoch, i, n);
        assert_true(v < n);
        assert_int_equal(seen[v], 0);
        seen[v] = 1;
    }
    mem_free(seen);
}

static void test_permute(void **state)
{
    (void)state;
    for (uint64_t n = 1; n <= 70; n++)
        for (uint64_t seed = 0; seed < 4; seed++)
            check_bijection(seed, (uint32_t)seed * 3, n);
    static const uint64_t ns[] = { 97,   101,  127,  128,  129,  255,  256,   257,  1009,
                                   1023, 1024, 1025, 4096, 4097, 7473, 65536, 65537 };
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
        check_bijection(0xfeedbeefcafe0000u + i, (uint32_t)i, ns[i]);
    uint64_t big = ((uint64_t)1 << 40) + 1; /* distinct and in range, where all cannot be tried */
    for (uint64_t i = 0; i < 200; i++) {
        assert_true(rng_permute(1, 1, i, big) < big);
        assert_int_not_equal(rng_permute(1, 1, i, big), rng_permute(1, 1, i + 1, big));
    }
}

/* Another seed or epoch is another order, and orders look like chance: a random permutation of 1,000 has about one
 * fixed point and about half of its neighbours ascending. */
static void test_permute_mixes(void **state)
{
    (void)state;
    enum { N = 1000 };
    unsigned fixed = 0, rising = 0, same_epoch = 0, same_seed = 0;
    for (uint64_t i = 0; i < N; i++) {
        uint64_t v = rng_permute(5, 0, i, N);
        fixed += v == i;
        rising += i > 0 && v > rng_permute(5, 0, i - 1, N);
        same_epoch += v == rng_permute(5, 1, i, N);
        same_seed += v == rng_permute((uint64_t)6 << 32 | 5, 0, i, N);
    }
    assert_true(fixed < 10 && same_epoch < 10 && same_seed < 10);
    assert_in_range(rising, 440, 560);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers),  cmocka_unit_test(test_addresses), cmocka_unit_test(test_normals),
        cmocka_unit_test(test_normal_moments), cmocka_unit_test(test_below),     cmocka_unit_test(test_permute),
        cmocka_unit_test(test_permute_mixes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
