/* Where an object is cut into parts: legal for every server, and where the caller's writes begin if that can be. */
#include "comm/base/mem.h"
#include "storage/s3_multipart.h"
#include "storage/s3_writer.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define MiB ((uint64_t)1 << 20)

/* The parts of an object, with what holds for all. */
static size_t parts_of(uint64_t bytes, const uint64_t *cut, size_t cuts, uint64_t *begin)
{
    size_t n = 0;
    memset(begin, 0xee, (S3_PARTS + 1) * sizeof *begin);
    s3_writer_parts(bytes, cut, cuts, begin, &n);
    assert_in_range(n, 1, S3_PARTS);
    assert_int_equal(begin[0], 0);
    assert_int_equal(begin[n], bytes);
    for (size_t i = 0; i + 1 < n; i++)
        assert_true(begin[i + 1] >= begin[i] + S3_PART_LEAST);
    assert_true(begin[n] > begin[n - 1]);
    for (size_t i = 0; i < n; i++)
        assert_true(begin[i + 1] - begin[i] <= 5 * 1024 * MiB);
    return n;
}

static void test_without_cuts(void **state)
{
    (void)state;
    uint64_t *begin = mem_array(NULL, S3_PARTS + 1, sizeof *begin);
    assert_int_equal(parts_of(9 * MiB, NULL, 0, begin), 1);
    assert_int_equal(parts_of(16 * MiB, NULL, 0, begin), 1);
    assert_int_equal(parts_of(16 * MiB + 1, NULL, 0, begin), 2);
    assert_int_equal(begin[1], 16 * MiB);
    assert_int_equal(parts_of(64 * MiB, NULL, 0, begin), 4);
    for (uint64_t bytes = MiB; bytes <= 5u * 1024 * 1024 * MiB; bytes = bytes * 7 / 3 + 1)
        (void)parts_of(bytes, NULL, 0, begin);
    mem_free(begin);
}

static void test_at_cuts(void **state)
{
    (void)state;
    uint64_t *begin = mem_array(NULL, S3_PARTS + 1, sizeof *begin);
    /* a header, three chunks, a small end: the header goes with the first chunk */
    const uint64_t cut[] = { 0, 4096, 16 * MiB + 4096, 31 * MiB, 47 * MiB };
    assert_int_equal(parts_of(48 * MiB, cut, 5, begin), 4);
    assert_int_equal(begin[1], 16 * MiB + 4096);
    assert_int_equal(begin[2], 31 * MiB);
    assert_int_equal(begin[3], 47 * MiB);
    /* small chunks are put together up to a legal part */
    uint64_t many[400];
    for (size_t i = 0; i < 400; i++)
        many[i] = i * MiB;
    size_t n = parts_of(400 * MiB, many, 400, begin);
    assert_int_equal(n, 80);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(begin[i], i * 5 * MiB);
    /* large ones are divided; cuts out of order or past the end are none */
    const uint64_t odd[] = { 0, 200 * MiB, 100 * MiB, 900 * MiB };
    n = parts_of(300 * MiB, odd, 4, begin);
    assert_true(n >= 10);
    bool kept = false;
    for (size_t i = 0; i < n; i++)
        kept = kept || begin[i] == 200 * MiB;
    assert_true(kept);
    for (uint64_t bytes = 6 * MiB; bytes <= 5u * 1024 * 1024 * MiB; bytes = bytes * 7 / 3 + 1)
        for (size_t k = 1; k < 6; k++) {
            uint64_t some[1000];
            for (size_t i = 0; i < 1000; i++)
                some[i] = bytes / 1000 * i * k + i % 7 * MiB;
            (void)parts_of(bytes, some, 1000, begin);
        }
    mem_free(begin);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_without_cuts), cmocka_unit_test(test_at_cuts) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
