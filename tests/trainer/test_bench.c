/* What the benches' figures rest on: medians and their intervals against binomial tables, CPU time by thread name,
 * plain reads that read everything, and a check of loaded values that sees a single wrong one. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "tests/support/test_root.h"
#include "trainer/bench/field.h"
#include "trainer/bench/limits.h"
#include "trainer/bench/measure.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/vfs.h>

#include <cmocka.h>
#include <linux/magic.h>

static void medians(void **unused)
{
    (void)unused;
    double odd[] = { 5, 1, 9 }, even[] = { 4, 1, 3, 2 }, one[] = { 7 };
    assert_true(isnan(median_of(odd, 0)));
    assert_true(median_of(odd, 3) == 5 && median_of(even, 4) == 2.5 && median_of(one, 1) == 7);
}

/* 1 - 2 P(B < k), B ~ Binomial(n, 1/2), by counting subsets. */
static double coverage(int n, int k)
{
    double below = 0;
    for (int s = 0; s < 1 << n; s++)
        below += __builtin_popcount((unsigned)s) < k;
    return 1 - 2 * below / (double)(1 << n);
}

static void intervals(void **unused)
{
    (void)unused;
    for (int n = 1; n <= 18; n++) {
        double x[18];
        int k = 1; /* the largest with a coverage of .9, counted from 1; the extremes if there is none */
        for (int i = 0; i < n; i++)
            x[i] = (i * 7 + 3) % n; /* any order: 0 .. n - 1 where 7 does not divide n */
        if (n % 7 == 0)
            continue;
        while (2 * (k + 1) <= n && coverage(n, k + 1) >= 0.9)
            k++;
        struct interval i = median_interval(x, (size_t)n, 0.9);
        assert_true(i.lo == k - 1 && i.hi == n - k);
        assert_true(fabs(i.coverage - coverage(n, k)) < 1e-12);
    }
}

static status *spin(void *arg)
{
    atomic_int *stage = arg;
    while (clock_thread_cpu_ns() < 30 * 1000 * 1000)
        ;
    atomic_store(stage, 1);
    for (struct backoff b = { 0 }; atomic_load(stage) != 2;)
        backoff_wait(&b);
    return NULL;
}

static void cpu_by_name(void **unused)
{
    (void)unused;
    atomic_int stage = 0;
    struct thread t;
    uint64_t mine, other;
    assert_ok(thread_start(&t, "spinner-1", spin, &stage));
    for (struct backoff b = { 0 }; atomic_load(&stage) != 1;)
        backoff_wait(&b);
    assert_ok(threads_cpu_ns("spinner-", &mine));
    assert_ok(threads_cpu_ns("spinner-2", &other));
    uint64_t all = process_cpu_ns();
    atomic_store(&stage, 2);
    assert_ok(thread_join(&t));
    assert_true(mine >= 30u * 1000 * 1000 && mine <= all && other == 0);
}

static size_t read_file(const char *path, void *to, size_t bytes)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(to, 1, bytes, f);
    fclose(f);
    return n;
}

/* Files of odd lengths, one empty, in folders; only ".h5" counts. Every method must arrive at the end of each. */
static void plain_reads(void **unused)
{
    (void)unused;
    struct root root = root_open(true);
    static const struct {
        const char *key;
        size_t bytes;
    } file[] = { { "a.h5", 4097 }, { "b/c.h5", 9u << 20 }, { "b/d.h5", 0 }, { "b/e.pb", 77 }, { "f.h5", 5 } };
    size_t to_bytes = (size_t)LIMIT_THREADS * LIMIT_PIECE_BYTES, total = 4097 + (9u << 20) + 5;
    unsigned char *to = mem_block(to_bytes, 4096), *from = mem_block(9u << 20, 4096);
    memset(from, 0x5a, 9u << 20);
    for (size_t i = 0; i < sizeof file / sizeof *file; i++)
        assert_ok(store_put(root.store, file[i].key, from, file[i].bytes, STORE_REPLACE));
    struct file_list l = { 0 };
    struct limits r = { 0 };
    assert_ok(files_below(root.path, ".h5", &l));
    assert_true(l.count == 4 && l.total == total);
    assert_ok(limits_read(&r, &l, to, to_bytes));
    assert_true(r.repeats == 1 && to[0] == 0x5a && to[to_bytes / 4] == 0x5a);
    double cached;
    assert_ok(files_drop(&l));
    assert_ok(files_cached(&l, &cached));
    struct statfs fs;
    assert_int_equal(statfs(root.path, &fs), 0);
    if (fs.f_type != TMPFS_MAGIC) /* there the page cache is the storage */
        assert_true(cached < 0.5);
    for (size_t i = 0; i < l.count; i++) /* through the cache */
        assert_true(read_file(l.path[i], to, to_bytes) == l.bytes[i]);
    assert_ok(files_cached(&l, &cached));
    assert_true(cached == 1);
    l.bytes[0]++; /* whichever it is, it ends before */
    status *st = limits_read(&r, &l, to, to_bytes);
    assert_int_equal(status_code(st), ST_IO);
    status_free(st);
    files_free(&l);
    struct limits w = { 0 };
    assert_ok(limits_write(&w, root.path, from, 9u << 20, 10 << 20));
    size_t best;
    assert_true(w.repeats == 1 && limits_median(&w, &best) > 0 && limits_least(&w) > 0 && !w.missing[0]);
    assert_ok(files_below(root.path, "", &l));
    assert_int_equal(l.count, 5); /* what was written plainly is gone */
    files_free(&l);
    mem_block_free(from, 9u << 20);
    mem_block_free(to, to_bytes);
    root_close(&root);
}

/* Boxes of all ranks tile each tensor, and one wrong bit anywhere is seen. */
static void fields(void **unused)
{
    (void)unused;
    for (int columns = 0; columns < 2; columns++)
        for (int n = 1; n <= 5; n++) {
            uint64_t elems = 0, total = 0;
            for (int r = 0; r < n; r++) {
                struct field f;
                assert_ok(field_open(3 * 7 * 4096, 3, (struct field_cut){ r, n, columns }, &f));
                field_fill(&f);
                assert_ok(field_check(&f));
                elems += f.tensors * f.box_rows * f.box_cols;
                total = field_total_bytes(&f);
                uint32_t *last = (uint32_t *)(void *)(field_tensor(&f, 2) + f.box_rows * f.box_cols - 1);
                *last ^= 1;
                status *st = field_check(&f);
                assert_int_equal(status_code(st), ST_CORRUPT);
                status_free(st);
                field_clear(&f);
                st = field_check(&f);
                assert_int_equal(status_code(st), ST_CORRUPT);
                status_free(st);
                field_close(&f);
            }
            assert_int_equal(elems * sizeof(float), 3 * 7 * 4096);
            assert_int_equal(total, 3 * 7 * 4096);
        }
    struct field f;
    status *st = field_open(4096, 2, (struct field_cut){ 0, 1, false }, &f);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(medians),     cmocka_unit_test(intervals), cmocka_unit_test(cpu_by_name),
        cmocka_unit_test(plain_reads), cmocka_unit_test(fields),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
