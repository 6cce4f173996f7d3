/* base: status, memory, arena, pool, threads and workers, bytes, dtypes, log, clock. */
#include "comm/base/arena.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/dtype.h"
#include "comm/base/log.h"
#include "comm/base/mem.h"
#include "comm/base/pool.h"
#include "comm/base/thread.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

/* ---- status ---- */

static void test_status(void **state)
{
    (void)state;
    int line = __LINE__ + 1;
    status *st = ERR(CORRUPT, "object %s: crc %x", "a/b", 0xabcu);
    assert_int_equal(status_code(st), ST_CORRUPT);
    assert_string_equal(status_message(st), "object a/b: crc abc");
    assert_int_equal(status_line(st), line);
    assert_non_null(strstr(status_file(st), "test_base.c"));
    assert_int_equal(status_rank(st), -1);
    st = status_wrap(st, "step %d", 7);
    assert_string_equal(status_message(st), "step 7: object a/b: crc abc");
    assert_int_equal(status_code(st), ST_CORRUPT);
    assert_int_equal(status_line(st), line);
    st = status_wrap(st, "%s", status_message(st)); /* an argument that lies in the message */
    assert_string_equal(status_message(st), "step 7: object a/b: crc abc: step 7: object a/b: crc abc");
    st = status_at_rank(status_at_rank(st, 3), 5); /* the first one counts */
    assert_int_equal(status_rank(st), 3);
    status *copy = status_copy(st);
    assert_ptr_not_equal(copy, st);
    status_free(st);
    assert_int_equal(status_code(copy), ST_CORRUPT);
    assert_int_equal(status_rank(copy), 3);
    assert_int_equal(status_exit_code(copy), 64 + 7);
    status_free(copy);
}

static void test_status_null(void **state)
{
    (void)state;
    assert_int_equal(status_code(NULL), ST_OK);
    assert_string_equal(status_message(NULL), "");
    assert_string_equal(status_file(NULL), "");
    assert_int_equal(status_exit_code(NULL), 0);
    assert_int_equal(status_rank(NULL), -1);
    assert_null(status_copy(NULL));
    assert_null(status_wrap(NULL, "no"));
    assert_null(status_at_rank(NULL, 1));
    status_free(NULL);
}

static void test_status_first(void **state)
{
    (void)state;
    status *a = ERR(IO, "a"), *b = ERR(PEER, "b"), *c = ERR(INVALID, "c");
    assert_null(status_first(NULL, NULL));
    assert_ptr_equal(status_first(a, NULL), a);
    assert_ptr_equal(status_first(NULL, a), a);
    assert_ptr_equal(status_first(a, b), a); /* b is freed: the address sanitizer watches */
    assert_ptr_equal(status_first(a, c), a);
    assert_string_equal(status_message(a), "a");
    status_free(a);
}

static void test_status_long(void **state)
{
    (void)state;
    char text[3000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    status *st = ERR(IO, "%s", text);
    assert_int_equal(strlen(status_message(st)), 1023);
    st = status_wrap(st, "%s", text);
    assert_int_equal(strlen(status_message(st)), 1023);
    status_free(st);
    st = status_wrap(ERR(IO, "end"), "%.1019s", text);
    assert_int_equal(strlen(status_message(st)), 1023);
    assert_string_equal(status_message(st) + 1019, ": en");
    status_free(st);
    st = ERR_SYS(ENOSPC, "%s", text);
    assert_int_equal(status_code(st), ST_NO_SPACE);
    status_free(st);
}

static void test_status_sys(void **state)
{
    (void)state;
    static const struct {
        int errnum;
        enum status_code code;
    } cases[] = { { ENOSPC, ST_NO_SPACE },   { EDQUOT, ST_NO_SPACE },  { ENOENT, ST_NOT_FOUND },
                  { EEXIST, ST_EXISTS },     { ENOMEM, ST_NO_MEMORY }, { EAGAIN, ST_UNAVAILABLE },
                  { EINTR, ST_UNAVAILABLE }, { EIO, ST_IO },           { EACCES, ST_IO } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        status *st = ERR_SYS(cases[i].errnum, "open %s", "x");
        char want[200];
        snprintf(want, sizeof want, "open x: %s", strerror(cases[i].errnum));
        assert_int_equal(status_code(st), cases[i].code);
        assert_string_equal(status_message(st), want);
        status_free(st);
    }
    static const char *const names[] = { "OK",        "INVALID",  "NOT_FOUND", "EXISTS",      "NO_MEMORY",
                                         "IO",        "NO_SPACE", "CORRUPT",   "UNAVAILABLE", "TIMEOUT",
                                         "CANCELLED", "PEER",     "DEVICE",    "UNSUPPORTED", "INTERNAL" };
    for (int i = 0; i < ST_CODE_COUNT; i++)
        assert_string_equal(status_code_name((enum status_code)i), names[i]);
    assert_string_equal(status_code_name((enum status_code)99), "?");
}

/* ---- log: one write per line, to where stderr goes ---- */

static void test_log(void **state)
{
    (void)state;
    char text[4096] = "", longer[4000];
    int old = dup(STDERR_FILENO);
    FILE *f = tmpfile();
    assert_true(old >= 0 && f);
    memset(longer, 'y', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    dup2(fileno(f), STDERR_FILENO);
    struct log l = { LOG_INFO, 4 }, none = { LOG_ERROR, -1 };
    status *st = status_at_rank(ERR(IO, "disk"), 2);
    log_line(&l, LOG_INFO, "hello %d", 5);
    log_line(&l, LOG_DEBUG, "dropped");
    log_line(NULL, LOG_ERROR, "dropped");
    log_line(&none, LOG_WARN, "dropped");
    log_status(&none, LOG_ERROR, st);
    log_status(&none, LOG_ERROR, NULL);
    log_line(&l, LOG_ERROR, "%s", longer);
    dup2(old, STDERR_FILENO);
    close(old);
    rewind(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = 0;
    fclose(f);
    const char *first = "tessera[4] info: hello 5\ntessera: error: disk (rank 2) [IO, ";
    assert_memory_equal(text, first, strlen(first));
    assert_null(strstr(text, "dropped"));
    assert_int_equal(text[n - 1], '\n'); /* a long line is cut, not run into the next */
    status_free(st);
}

/* ---- memory, arena ---- */

static void test_mem(void **state)
{
    (void)state;
    uint64_t before = mem_count();
    void *p = mem_alloc(0);
    assert_non_null(p);
    p = mem_realloc(p, 100);
    char *s = mem_strdup("abc");
    assert_string_equal(s, "abc");
    unsigned char *z = mem_calloc(10, 3);
    for (int i = 0; i < 30; i++)
        assert_int_equal(z[i], 0);
    assert_int_equal(mem_count() - before, 4);
    mem_free(p);
    mem_free(s);
    mem_free(z);
    mem_free(NULL);
    assert_int_equal(mem_count() - before, 4);
    assert_null(mem_array(NULL, SIZE_MAX / 2, 3));
    for (size_t bytes = 0; bytes < (size_t)6 << 20; bytes = bytes * 3 + 1) {
        unsigned char *b = mem_block(bytes, 8192);
        assert_non_null(b);
        assert_int_equal((size_t)b % 8192, 0);
        for (size_t i = 0; i < bytes; i++)
            if (b[i])
                fail_msg("block of %zu bytes is not zero at %zu", bytes, i);
        memset(b, 1, bytes);
        mem_block_free(b, bytes);
    }
    assert_null(mem_block(SIZE_MAX - 10, 4096));
    assert_true(mem_peak_rss_bytes() > 1 << 20 && mem_peak_rss_bytes() < (uint64_t)1 << 40);
}

static void test_arena(void **state)
{
    (void)state;
    struct arena a;
    arena_init(&a, 1000, 0);
    struct arena_mark empty = arena_mark(&a);
    unsigned char *p[200];
    for (size_t round = 0; round < 3; round++) {
        uint64_t grown = a.grown;
        for (size_t i = 0; i < 200; i++) { /* sizes below, at and above a block */
            size_t n = i * 37 % 1500;
            p[i] = i % 2 ? arena_alloc(&a, n) : arena_zalloc(&a, n);
            assert_non_null(p[i]);
            assert_int_equal((size_t)p[i] % 64, 0);
            for (size_t k = 0; i % 2 == 0 && k < n; k++)
                assert_int_equal(p[i][k], 0);
            memset(p[i], (int)i, n);
        }
        for (size_t i = 0; i < 200; i++) /* nothing overlaps */
            for (size_t k = 0; k < i * 37 % 1500; k++)
                assert_int_equal(p[i][k], (unsigned char)i);
        assert_true(round == 0 || a.grown == grown); /* the second time makes no allocation */
        assert_true(a.used_bytes <= a.held_bytes && a.peak_bytes >= a.used_bytes);
        if (round == 1)
            arena_release(&a, empty);
        else
            arena_reset(&a);
        assert_int_equal(a.used_bytes, 0);
    }
    arena_fini(&a);
}

static void test_arena_marks(void **state)
{
    (void)state;
    struct arena a;
    arena_init(&a, 4096, 0);
    unsigned char *keep = arena_alloc(&a, 1000);
    memset(keep, 7, 1000);
    struct arena_mark m = arena_mark(&a);
    size_t used = a.used_bytes;
    void *first = arena_alloc(&a, 100);
    for (int i = 0; i < 10; i++)
        memset(arena_alloc(&a, 3000), 9, 3000);
    arena_release(&a, m);
    assert_int_equal(a.used_bytes, used);
    assert_ptr_equal(arena_alloc(&a, 100), first); /* the same place again */
    for (int i = 0; i < 10; i++)
        memset(arena_alloc(&a, 3000), 9, 3000);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(keep[i], 7);
    arena_fini(&a);
}

static void test_arena_cap(void **state)
{
    (void)state;
    struct arena a;
    arena_init(&a, 4096, 10000);
    assert_non_null(arena_alloc(&a, 4096));
    assert_non_null(arena_alloc(&a, 4096));
    assert_null(arena_alloc(&a, 4096)); /* 12,288 held would be over the cap */
    assert_null(arena_alloc(&a, SIZE_MAX));
    assert_null(arena_alloc(&a, SIZE_MAX - 64));
    assert_null(arena_alloc(&a, SIZE_MAX - 200));
    assert_int_equal(a.held_bytes, 8192);
    arena_reset(&a);
    assert_non_null(arena_alloc(&a, 4096));
    assert_null(arena_alloc(&a, SIZE_MAX - 200)); /* does not wrap round inside a block either */
    arena_fini(&a);
    arena_init(&a, 0, 0);
    assert_non_null(arena_alloc(&a, 0));
    arena_fini(&a);
    arena_fini(&a);
}

/* ---- pool ---- */

static status *take_block(void *p)
{
    return pool_get(p) ? NULL : ERR(CANCELLED, "closed");
}

static void test_pool(void **state)
{
    (void)state;
    unsigned char memory[5 * 100];
    struct pool p;
    void *b[5];
    assert_ok(pool_init(&p, memory, 100, 5));
    for (int i = 0; i < 5; i++) {
        assert_int_equal(pool_free_count(&p), 5 - i);
        b[i] = i % 2 ? pool_get(&p) : pool_try_get(&p);
        assert_non_null(b[i]);
        memset(b[i], i, 100);
    }
    assert_null(pool_try_get(&p));
    for (int i = 0; i < 5; i++) { /* five blocks that do not overlap */
        for (int k = 0; k < 100; k++)
            assert_int_equal(((unsigned char *)b[i])[k], i);
        pool_put(&p, b[i]);
    }
    assert_int_equal(pool_free_count(&p), 5);
    for (int i = 0; i < 7; i++) { /* what was touched last comes first, and nothing else is touched */
        assert_ptr_equal(pool_get(&p), b[4]);
        pool_put(&p, b[4]);
    }
    for (int i = 0; i < 5; i++)
        b[i] = pool_get(&p);
    struct thread t;
    assert_ok(thread_start(&t, "a name longer than fifteen", take_block, &p));
    pool_put(&p, b[0]); /* wakes the one that waits */
    assert_ok(thread_join(&t));
    assert_null(thread_join(&t));
    assert_ok(thread_start(&t, "waits", take_block, &p));
    pool_close(&p);
    status *st = thread_join(&t);
    assert_int_equal(status_code(st), ST_CANCELLED);
    status_free(st);
    pool_put(&p, b[1]);
    assert_null(pool_get(&p));
    assert_null(pool_try_get(&p));
    pool_fini(&p);
    assert_ok(pool_init(&p, memory, 100, 3));
    pool_close(&p); /* free blocks are not handed out any more */
    assert_null(pool_get(&p));
    pool_fini(&p);
    st = pool_init(&p, memory, 0, 3);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    pool_fini(&p);
}

struct sharing {
    struct pool pool;
    atomic_uint used[3]; /* by block */
};

static status *use_blocks(void *p)
{
    struct sharing *s = p;
    unsigned char *b;
    while ((b = pool_get(&s->pool))) {
        atomic_uint *used = &s->used[(b - s->pool.memory) / 100];
        if (atomic_fetch_add(used, 1)) /* somebody else has it */
            return ERR(INTERNAL, "a block was handed out twice");
        clock_sleep_us(*b % 7); /* another turn each time; not needed for the result */
        (*b)++;
        atomic_fetch_sub(used, 1);
        pool_put(&s->pool, b);
    }
    return ERR(CANCELLED, "closed");
}

/* A block is one thread's until it is put back; close ends those that wait and those that do not. */
static void test_pool_threads(void **state)
{
    (void)state;
    unsigned char memory[3 * 100] = { 0 };
    struct sharing s = { 0 };
    struct thread t[5];
    assert_ok(pool_init(&s.pool, memory, 100, 3));
    for (int i = 0; i < 5; i++)
        assert_ok(thread_start(&t[i], "shares", use_blocks, &s));
    for (int i = 0; i < 500; i++) {
        unsigned char *b = pool_get(&s.pool);
        assert_int_equal(atomic_fetch_add(&s.used[(b - memory) / 100], 1), 0);
        atomic_fetch_sub(&s.used[(b - memory) / 100], 1);
        pool_put(&s.pool, b);
    }
    pool_close(&s.pool);
    for (int i = 0; i < 5; i++) {
        status *st = thread_join(&t[i]);
        assert_int_equal(status_code(st), ST_CANCELLED); /* join returns what the function returned */
        status_free(st);
    }
    assert_int_equal(pool_free_count(&s.pool), 3);
    pool_fini(&s.pool);
    struct thread never = { 0 };
    assert_null(thread_join(&never));
}

/* ---- workers ---- */

static void count_one(void *arg, size_t i)
{
    ((atomic_uint *)arg)[i]++;
}

static void test_workers(void **state)
{
    (void)state;
    static const size_t ns[] = { 0, 1, 2, 3, 64, 1000 };
    for (int threads = 0; threads <= 5; threads++) {
        struct workers *w = NULL;
        if (threads) /* 0: no pool, runs here */
            assert_ok(workers_open(threads, &w));
        assert_int_equal(workers_count(w), threads ? threads : 1);
        for (int round = 0; round < 50; round++) {
            for (size_t k = 0; k < sizeof ns / sizeof *ns; k++) {
                atomic_uint seen[1001] = { 0 };
                uint64_t before = mem_count();
                workers_for(w, ns[k], count_one, seen);
                assert_int_equal(mem_count(), before);
                for (size_t i = 0; i <= 1000; i++) /* each index once, and none beyond */
                    if (seen[i] != (i < ns[k]))
                        fail_msg("%d threads, n %zu: index %zu ran %u times", threads, ns[k], i, seen[i]);
            }
        }
        workers_close(w);
    }
    struct workers *w = NULL;
    status *st = workers_open(0, &w);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
}

/* ---- bytes, dtype, clock ---- */

static uint32_t crc32c_by_bits(const unsigned char *p, size_t n)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int b = 0; b < 8; b++)
            crc = crc >> 1 ^ (0x82f63b78u & (0u - (crc & 1)));
    }
    return ~crc;
}

static void test_bytes(void **state)
{
    (void)state;
    unsigned char b[300];
    assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283u);
    memset(b, 0, 32); /* RFC 3720, B.4 */
    assert_int_equal(crc32c(0, b, 32), 0x8a9136aau);
    memset(b, 0xff, 32);
    assert_int_equal(crc32c(0, b, 32), 0x62a8ab43u);
    assert_int_equal(crc32c(0, b, 0), 0);
    for (size_t i = 0; i < sizeof b; i++)
        b[i] = (unsigned char)(i * i + 3);
    for (size_t n = 0; n <= sizeof b; n += 1 + n / 7)
        for (size_t cut = 0; cut <= n; cut += 1 + n / 5) {
            assert_int_equal(crc32c(0, b, n), crc32c_by_bits(b, n));
            assert_int_equal(crc32c(crc32c(0, b, cut), b + cut, n - cut), crc32c(0, b, n));
        }
    put_u32(b + 1, 0x01020304u);
    put_u64(b + 9, 0x1122334455667788u);
    static const unsigned char le[] = { 4, 3, 2, 1 }, le8[] = { 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11 };
    assert_memory_equal(b + 1, le, 4);
    assert_memory_equal(b + 9, le8, 8);
    assert_int_equal(get_u32(b + 1), 0x01020304u);
    assert_int_equal(get_u64(b + 9), 0x1122334455667788u);
}

static struct hash128 hash_of(const void *p, size_t n, uint64_t seed)
{
    struct hash128 h = hash_init(seed);
    hash_update(&h, p, n);
    return hash_final(h);
}

static void test_hash(void **state)
{
    (void)state;
    unsigned char b[40] = { 0 };
    uint64_t a_values[41 * 8 + 41], b_values[41 * 8 + 41];
    size_t n = 0;
    for (size_t length = 0; length <= 40; length++) { /* zeros of each length, and each single bit of 40 bytes */
        struct hash128 h = hash_of(b, length, 0);
        a_values[n] = h.a;
        b_values[n++] = h.b;
        assert_int_equal(hash64(b, length), h.a);
    }
    for (size_t bit = 0; bit < 320; bit++) {
        b[bit / 8] = (unsigned char)(1u << bit % 8);
        struct hash128 h = hash_of(b, 40, 0);
        a_values[n] = h.a;
        b_values[n++] = h.b;
        b[bit / 8] = 0;
    }
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < i; k++)
            assert_true(a_values[i] != a_values[k] && b_values[i] != b_values[k]);
    assert_true(hash_of(b, 8, 1).a != hash_of(b, 8, 0).a && hash_of(b, 8, 1).b != hash_of(b, 8, 0).b);
    struct hash128 two = hash_init(0), one = two; /* fields keep apart: "ab" + "c" is not "a" + "bc" */
    hash_update(&two, "ab", 2);
    hash_update(&two, "c", 1);
    hash_update(&one, "a", 1);
    hash_update(&one, "bc", 2);
    assert_true(hash_final(two).a != hash_final(one).a);
}

static void test_dtype(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        size_t bytes;
    } want[] = { { "f64", 8 },  { "f32", 4 },  { "f16", 2 }, { "bf16", 2 }, { "f8e4m3", 1 }, { "f8e5m2", 1 },
                 { "e8m0", 1 }, { "u4x2", 1 }, { "i64", 8 }, { "i32", 4 },  { "i16", 2 },    { "i8", 1 },
                 { "u64", 8 },  { "u32", 4 },  { "u16", 2 }, { "u8", 1 },   { "bool", 1 } };
    assert_int_equal(DTYPE_COUNT, 18);
    for (int i = 1; i < DTYPE_COUNT; i++) { /* the numbers are in files */
        assert_string_equal(dtype_name((enum dtype)i), want[i - 1].name);
        assert_int_equal(dtype_bytes((enum dtype)i), want[i - 1].bytes);
        assert_int_equal(dtype_parse(want[i - 1].name), i);
    }
    assert_int_equal(dtype_parse("?"), DTYPE_NONE);
    assert_int_equal(dtype_parse("F32"), DTYPE_NONE);
    assert_int_equal(dtype_bytes(DTYPE_NONE), 0);
    assert_int_equal(dtype_bytes((enum dtype)200), 0);
    assert_string_equal(dtype_name((enum dtype)200), "?");
    static const struct {
        float in;
        uint16_t out;
    } bf[] = { { 1.0f, 0x3f80 },
               { -2.0f, 0xc000 },
               { 0x1.01p0f, 0x3f80 }, /* tie to even: down */
               { 0x1.03p0f, 0x3f82 },
               { 0x1.010002p0f, 0x3f81 },
               { 0x1.ffp127f, 0x7f80 }, /* rounds to infinity */
               { (float)INFINITY, 0x7f80 },
               { 0.0f, 0 } };
    for (size_t i = 0; i < sizeof bf / sizeof *bf; i++)
        assert_int_equal(bf16_from_f32(bf[i].in), bf[i].out);
    assert_true(isnan(bf16_to_f32(bf16_from_f32((float)NAN))));
    uint32_t low_nan = 0x7f800001u; /* its payload is all in the lower half */
    float f;
    memcpy(&f, &low_nan, 4);
    assert_true(isnan(bf16_to_f32(bf16_from_f32(f))));
    for (uint32_t h = 0; h < 0x7f80; h++)
        assert_int_equal(bf16_from_f32(bf16_to_f32((uint16_t)h)), h);
}

static void test_clock(void **state)
{
    (void)state;
    uint64_t start = clock_ns(), cpu = clock_thread_cpu_ns();
    struct backoff b = { .max_us = 100 };
    for (int i = 0; i < 164; i++) /* 64 yields, then sleeps of 50 and 100 us */
        backoff_wait(&b);
    uint64_t took = clock_ns() - start;
    assert_true(took > 5000000 && took < 2000000000);
    assert_true(clock_thread_cpu_ns() - cpu < took);
    assert_true(clock_wall_ns() > (uint64_t)1700000000 * 1000000000);
    assert_true(fabs(ns_to_s(1500000000) - 1.5) < 1e-12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status),      cmocka_unit_test(test_status_null),  cmocka_unit_test(test_status_first),
        cmocka_unit_test(test_status_long), cmocka_unit_test(test_status_sys),   cmocka_unit_test(test_log),
        cmocka_unit_test(test_mem),         cmocka_unit_test(test_arena),        cmocka_unit_test(test_arena_marks),
        cmocka_unit_test(test_arena_cap),   cmocka_unit_test(test_pool_threads), cmocka_unit_test(test_pool),
        cmocka_unit_test(test_workers),     cmocka_unit_test(test_bytes),        cmocka_unit_test(test_hash),
        cmocka_unit_test(test_dtype),       cmocka_unit_test(test_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
