/* Every store of the registry under the contract of storage/store.h, and what store.c adds: keys, ranges, loops,
 * retries. */
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "storage/store.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

struct fixture {
    char dir[64], uri[256];
    struct store *s;
};

static void fixture_open(struct fixture *f, const struct store_ops *ops)
{
    char dir[FOLDER_BYTES + 8];
    folder_make(f->dir);
    snprintf(dir, sizeof dir, "%s/a/root", f->dir);
    store_test_uri(ops, dir, f->uri);
    OK(store_open(f->uri, true, &f->s));
}

static void fixture_close(struct fixture *f)
{
    store_close(f->s);
    folder_remove(f->dir);
}

/* Byte i of a test object. */
static unsigned char pattern(uint64_t i)
{
    return (unsigned char)((i * 2654435761u) >> 16 ^ i);
}

static unsigned char *pattern_bytes(size_t n)
{
    unsigned char *b = mem_alloc(n);
    for (size_t i = 0; i < n; i++)
        b[i] = pattern(i);
    return b;
}

static void expect_text(struct store *s, const char *key, const char *text)
{
    void *buf;
    size_t n;
    OK(store_get_all(s, key, 1000, &buf, &n));
    assert_int_equal(n, strlen(text));
    assert_string_equal(buf, text);
    mem_free(buf);
}

static void expect_list(struct store *s, const char *dir, const char *names)
{
    struct store_list l;
    char have[1024] = "";
    OK(store_list(s, dir, &l));
    for (size_t i = 0; i < l.count; i++) {
        size_t n = strlen(have);
        snprintf(have + n, sizeof have - n, "%s%s%s", i ? " " : "", l.entry[i].name, l.entry[i].info.is_dir ? "/" : "");
    }
    store_list_free(&l);
    assert_string_equal(have, names);
}

static void check_objects(struct store *s)
{
    struct store_info info;
    FAILS(ST_NOT_FOUND, "", store_stat(s, "none", &info));
    char byte;
    FAILS(ST_NOT_FOUND, "", store_get(s, "none", 0, &byte, 1));
    FAILS(ST_NOT_FOUND, "", store_get(s, "no/such/key", 0, &byte, 1));

    uint64_t before, after;
    OK(store_now(s, &before));
    OK(store_put(s, "one", "first", 5, STORE_EXCLUSIVE));
    OK(store_now(s, &after));
    OK(store_stat(s, "one", &info));
    assert_int_equal(info.bytes, 5);
    assert_false(info.is_dir);
    /* HTTP writes whole seconds: a clock is rounded down, a file's date down or up (Swift), and taken for the end of
     * that second */
    uint64_t late = strcmp(s->ops->name, "s3") == 0 ? 2000000000u : 0;
    assert_true(before <= info.mtime_ns && info.mtime_ns <= after + late);
    FAILS(ST_EXISTS, "", store_put(s, "one", "second!", 7, STORE_EXCLUSIVE));
    expect_text(s, "one", "first");
    OK(store_put(s, "one", "second!", 7, STORE_REPLACE));
    expect_text(s, "one", "second!");
    OK(store_put(s, "one", "3", 1, STORE_REPLACE)); /* shorter than before */
    expect_text(s, "one", "3");
    OK(store_put(s, "deep/er/empty", NULL, 0, STORE_EXCLUSIVE));
    expect_text(s, "deep/er/empty", "");
    OK(store_stat(s, "deep/er", &info));
    assert_true(info.is_dir);
    FAILS(ST_NOT_FOUND, "", store_get(s, "deep/er", 0, &byte, 1));
    void *buf;
    size_t n;
    FAILS(ST_NOT_FOUND, "", store_get_all(s, "deep", 10, &buf, &n));
    OK(store_put(s, "long", "0123456789", 10, STORE_REPLACE));
    FAILS(ST_CORRUPT, "", store_get_all(s, "long", 9, &buf, &n));
    OK(store_get_all(s, "long", 10, &buf, &n));
    mem_free(buf);

    OK(store_remove(s, "one"));
    OK(store_remove(s, "one"));
    OK(store_remove(s, "no/such/key"));
    FAILS(ST_NOT_FOUND, "", store_stat(s, "one", &info));
    OK(store_put(s, "one", "back", 4, STORE_EXCLUSIVE));
    expect_text(s, "one", "back");
}

static void check_ranges(struct store *s)
{
    enum { N = 3 * 4096 + 17 };
    static const size_t cut[] = { 0, 1, 2, 4095, 4096, 4097, N - 1, N };
    unsigned char *all = pattern_bytes(N), *got = mem_alloc(N + 1);
    OK(store_put(s, "d/ranges", all, N, STORE_REPLACE));
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++)
        for (size_t j = i; j < sizeof cut / sizeof *cut; j++) {
            size_t n = cut[j] - cut[i];
            memset(got, 0xee, N + 1);
            OK(store_get(s, "d/ranges", cut[i], got, n));
            assert_memory_equal(got, all + cut[i], n);
            assert_int_equal(got[n], 0xee);
        }
    FAILS(ST_CORRUPT, "", store_get(s, "d/ranges", 0, got, N + 1));
    FAILS(ST_CORRUPT, "", store_get(s, "d/ranges", N, got, 1));
    FAILS(ST_CORRUPT, "", store_get(s, "d/ranges", UINT64_MAX / 4, got, 1));
    FAILS(ST_INVALID, "", store_get(s, "d/ranges", UINT64_MAX, got, 1));
    status *st = store_get(s, "d/ranges", N - 1, got, 2);
    assert_non_null(strstr(status_message(st), "d/ranges"));
    assert_non_null(strstr(status_message(st), "12305")); /* the length found */
    assert_non_null(strstr(status_message(st), "12304")); /* the offset */
    status_free(st);
    mem_free(all);
    mem_free(got);
}

/* Reads [at, at + bytes) of "streamed" in bits of up to `most` bytes, of every size in between. */
static void check_stream(struct store *s, const unsigned char *all, size_t at, size_t bytes, size_t most)
{
    struct store_stream *k;
    unsigned char *got = mem_alloc(most + 1);
    uint64_t random = most;
    OK(store_stream_open(s, "streamed", at, bytes, &k));
    for (size_t done = 0; done < bytes;) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        size_t n = (random >> 33) % (most + 1);
        n = n < bytes - done ? n : bytes - done;
        got[n] = 0xee;
        assert_int_equal(store_stream_at(k), at + done);
        OK(store_stream_read(k, got, n));
        assert_memory_equal(got, all + at + done, n);
        assert_int_equal(got[n], 0xee);
        done += n;
    }
    store_stream_close(k);
    mem_free(got);
}

static void check_streams(struct store *s)
{
    enum { N = (3 << 20) + 17, HALVES = 3 };
    static const size_t most[] = { 100, 16384, 300000, 2 << 20 };
    unsigned char *all = pattern_bytes(N), *got = mem_alloc(N + 1);
    struct store_stream *half[HALVES], *k;
    OK(store_put(s, "streamed", all, N, STORE_REPLACE));
    check_stream(s, all, 12345, 50000, 10);
    for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
        check_stream(s, all, 0, N, most[i] < 16384 ? 16384 : most[i]);
        check_stream(s, all, N - 7 * most[i] % N, 7 * most[i] % N - most[i] / 2, most[i]); /* the object goes on */
    }
    /* left in the middle, one after another, while other requests are made */
    for (size_t i = 0; i < HALVES; i++) {
        OK(store_stream_open(s, "streamed", i, N - i, &half[i]));
        OK(store_stream_read(half[i], got, N / 2 - i));
        assert_memory_equal(got, all + i, N / 2 - i);
    }
    OK(store_get(s, "streamed", 0, got, N));
    for (size_t i = 0; i + 1 < HALVES; i++)
        store_stream_close(half[i]);
    OK(store_stream_read(half[HALVES - 1], got, N - N / 2));
    assert_memory_equal(got, all + N / 2, N - N / 2);
    store_stream_close(half[HALVES - 1]);

    OK(store_stream_open(s, "streamed", N - 100, 1000, &k));
    OK(store_stream_read(k, got, 99));
    assert_memory_equal(got, all + N - 100, 99);
    FAILS(ST_CORRUPT, "3145745 bytes", store_stream_read(k, got, 2)); /* the length found */
    store_stream_close(k);
    OK(store_stream_open(s, "none", 0, 10, &k));
    FAILS(ST_NOT_FOUND, "none", store_stream_read(k, got, 10));
    store_stream_close(k);
    FAILS(ST_INVALID, "", store_stream_open(s, "streamed", UINT64_MAX, 10, &k));
    FAILS(ST_INVALID, "", store_stream_open(s, "../streamed", 0, 10, &k));
    store_stream_close(NULL);
    mem_free(all);
    mem_free(got);
}

static void check_lists(struct store *s)
{
    expect_list(s, "", "");
    expect_list(s, "nowhere", "");
    static const char *const keys[] = { "b/2", "b/10", "b/1", "a", "c/x/y", "b/1.h5", "B" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        OK(store_put(s, keys[i], "x", 1, STORE_EXCLUSIVE));
    expect_list(s, "", "B a b/ c/");
    expect_list(s, "b", "1 1.h5 10 2");
    expect_list(s, "c", "x/");
    struct store_list l;
    OK(store_list(s, "b", &l));
    assert_int_equal(l.entry[0].info.bytes, 1);
    assert_true(l.entry[0].info.mtime_ns > 0);
    store_list_free(&l);
    FAILS(ST_INVALID, "", store_list(s, "/", &l));
    FAILS(ST_INVALID, "", store_list(s, "..", &l));

    FAILS(ST_EXISTS, "", store_remove(s, "b"));
    expect_list(s, "b", "1 1.h5 10 2");
    OK(store_remove_tree(s, "b"));
    OK(store_remove_tree(s, "b"));
    OK(store_remove_tree(s, "not/there"));
    expect_list(s, "", "B a c/");
    OK(store_remove(s, "c/x/y"));
    OK(store_remove(s, "c/x")); /* an empty directory, where there is such a thing */
    OK(store_remove(s, "c"));
    expect_list(s, "", "B a");
    OK(store_remove_tree(s, "a")); /* an object is a tree of one */
    expect_list(s, "", "B");
    FAILS(ST_INVALID, "", store_remove_tree(s, ""));
}

static void check_rename(struct store *s)
{
    if (!s->ops->rename_tree)
        return;
    OK(store_put(s, "from/1", "one", 3, STORE_EXCLUSIVE));
    OK(store_put(s, "from/sub/2", "two", 3, STORE_EXCLUSIVE));
    OK(store_put(s, "from2/1", "other", 5, STORE_EXCLUSIVE)); /* begins alike and must stay */
    OK(store_put(s, "taken/1", "taken", 5, STORE_EXCLUSIVE));
    FAILS(ST_EXISTS, "", store_rename_tree(s, "from", "taken"));
    FAILS(ST_NOT_FOUND, "", store_rename_tree(s, "missing", "to"));
    FAILS(ST_INVALID, "", store_rename_tree(s, "from", "../to"));
    FAILS(ST_INVALID, "", store_rename_tree(s, "../from", "to"));
    OK(store_rename_tree(s, "from", "to.bad-1"));
    expect_list(s, "", "from2/ taken/ to.bad-1/");
    expect_text(s, "to.bad-1/1", "one");
    expect_text(s, "to.bad-1/sub/2", "two");
    expect_text(s, "taken/1", "taken");
    FAILS(ST_NOT_FOUND, "", store_rename_tree(s, "from", "again"));
}

static void check_writer(struct store *s)
{
    enum { N = 10000 };
    unsigned char *all = pattern_bytes(N), *got = mem_alloc(N);
    struct store_writer *w;
    struct store_info info;

    OK(store_writer_open(s, "step/part.h5", N, &w));
    OK(store_write(w, 9000, all + 9000, 1000)); /* out of order, up to the end */
    OK(store_write(w, 0, all, 100));
    OK(store_write(w, 100, all, 0));
    FAILS(ST_NOT_FOUND, "", store_stat(s, "step/part.h5", &info));
    expect_list(s, "step", "");
    FAILS(ST_INVALID, "", store_write(w, N, all, 1));
    FAILS(ST_INVALID, "", store_write(w, N - 1, all, 2));
    FAILS(ST_INVALID, "", store_write(w, UINT64_MAX, all, 2));
    FAILS(ST_INVALID, "", store_write(w, 1, all, SIZE_MAX));
    OK(store_writer_finish(w));
    expect_list(s, "step", "part.h5");
    OK(store_stat(s, "step/part.h5", &info));
    assert_int_equal(info.bytes, N);
    OK(store_get(s, "step/part.h5", 0, got, N));
    for (int i = 0; i < N; i++)
        assert_int_equal(got[i], i < 100 || i >= 9000 ? all[i] : 0);

    OK(store_writer_open(s, "step/gone.h5", N, &w));
    OK(store_write(w, 0, all, N));
    store_writer_abort(w);
    store_writer_abort(NULL);
    expect_list(s, "step", "part.h5");

    OK(store_writer_open(s, "step/part.h5", 3, &w)); /* the object stays until another one takes its place */
    OK(store_write(w, 0, "new", 3));
    OK(store_stat(s, "step/part.h5", &info));
    assert_int_equal(info.bytes, N);
    OK(store_writer_finish(w));
    expect_text(s, "step/part.h5", "new");

    OK(store_writer_open(s, "empty", 0, &w));
    OK(store_writer_finish(w));
    expect_text(s, "empty", "");
    FAILS(ST_INVALID, "", store_writer_open(s, "../x", 1, &w));
    FAILS(ST_INVALID, "", store_writer_open(s, "big", UINT64_MAX, &w));
    mem_free(all);
    mem_free(got);
}

static void check_keys(struct store *s)
{
    char longest[STORE_KEY_BYTES + 100], segment[300];
    memset(segment, 's', sizeof segment - 1);
    segment[299] = 0;
    for (size_t i = 0; i < sizeof longest; i++)
        longest[i] = i % 100 == 50 ? '/' : 'k';
    longest[sizeof longest - 1] = 0; /* about 600 characters */
    const char *const bad[] = { "",         "../x", "a/../b", "a//b",        "/a",    "a/",   ".",
                                "..",       "a/.",  "a/..",   "a b",         "a\\b",  "a:b",  "a\n",
                                "\xc3\xa9", "a*",   ".tmp-x", "a/.tmp-0123", segment, longest };
    struct store_info info;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FAILS(ST_INVALID, "", store_check_key(bad[i]));
        FAILS(ST_INVALID, "", store_put(s, bad[i], "x", 1, STORE_REPLACE));
        FAILS(ST_INVALID, "", store_stat(s, bad[i], &info));
        FAILS(ST_INVALID, "", store_remove(s, bad[i]));
    }
    FAILS(ST_INVALID, "", store_check_key(NULL));
    expect_list(s, "", "");
    longest[STORE_KEY_BYTES] = 0; /* one too long, then the longest */
    FAILS(ST_INVALID, "", store_check_key(longest));
    longest[STORE_KEY_BYTES - 1] = 0;
    segment[256] = 0; /* one too long, then the longest that every file system takes */
    FAILS(ST_INVALID, "", store_check_key(segment));
    segment[255] = 0;
    const char *const good[] = { "a", "...", ".hidden", "a.b", "-", "_", "AZaz09._-", "x/.y/z", segment, longest };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        OK(store_put(s, good[i], "x", 1, STORE_EXCLUSIVE));
        expect_text(s, good[i], "x");
        OK(store_put(s, good[i], "y", 1, STORE_REPLACE));
        OK(store_remove(s, good[i]));
    }
}

/* ---- Threads */

enum { THREADS = 8, ROUNDS = 20 };

struct racer {
    struct store *s;
    int id, round, won;
    pthread_barrier_t *start;
};

static status *race_put(void *arg)
{
    struct racer *r = arg;
    char key[32], text[16];
    snprintf(key, sizeof key, "race/%d", r->round);
    snprintf(text, sizeof text, "%d", r->id);
    pthread_barrier_wait(r->start);
    status *st = store_put(r->s, key, text, strlen(text), STORE_EXCLUSIVE);
    r->won = !st;
    if (status_code(st) == ST_EXISTS) {
        status_free(st);
        st = NULL;
    }
    return st;
}

static void check_exclusive_race(struct store *s)
{
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, THREADS);
        struct racer r[THREADS];
        struct thread t[THREADS];
        for (int i = 0; i < THREADS; i++) {
            r[i] = (struct racer){ s, i, round, 0, &start };
            OK(thread_start(&t[i], "racer", race_put, &r[i]));
        }
        int winners = 0, winner = -1;
        for (int i = 0; i < THREADS; i++) {
            OK(thread_join(&t[i]));
            winners += r[i].won;
            winner = r[i].won ? i : winner;
        }
        pthread_barrier_destroy(&start);
        assert_int_equal(winners, 1);
        char key[32], text[16];
        snprintf(key, sizeof key, "race/%d", round);
        snprintf(text, sizeof text, "%d", winner);
        expect_text(s, key, text);
    }
}

enum { SHARED = 1 << 20, SLICE = 1000 };

struct slicer {
    struct store_writer *w;
    const unsigned char *all;
    int id;
};

static status *write_slices(void *arg)
{
    const struct slicer *k = arg;
    for (uint64_t at = (uint64_t)k->id * SLICE; at < SHARED; at += (uint64_t)THREADS * SLICE)
        TRY(store_write(k->w, at, k->all + at, at + SLICE < SHARED ? SLICE : (size_t)(SHARED - at)));
    return NULL;
}

static void check_shared_writer(struct store *s)
{
    unsigned char *all = pattern_bytes(SHARED), *got = mem_alloc(SHARED);
    struct store_writer *w;
    OK(store_writer_open(s, "shared", SHARED, &w));
    struct slicer k[THREADS];
    struct thread t[THREADS];
    for (int i = 0; i < THREADS; i++) {
        k[i] = (struct slicer){ w, all, i };
        OK(thread_start(&t[i], "slicer", write_slices, &k[i]));
    }
    for (int i = 0; i < THREADS; i++)
        OK(thread_join(&t[i]));
    OK(store_writer_finish(w));
    OK(store_get(s, "shared", 0, got, SHARED));
    assert_memory_equal(got, all, SHARED);
    mem_free(all);
    mem_free(got);
}

/* An object large enough for parts: said what will be written, written from both ends, one gap left. */
static void check_large(struct store *s)
{
    enum { N = 21 << 20, CHUNK = 6 << 20, HEAD = 5000, GAP = 20 << 20, GAP_END = GAP + 70000 };
    static const uint64_t cut[] = { 0, HEAD, HEAD + CHUNK, HEAD + 2 * CHUNK, HEAD + 3 * CHUNK };
    static const struct store_extent extent[] = {
        { 0, HEAD },
        { HEAD, CHUNK },
        { HEAD + CHUNK, CHUNK },
        { HEAD + 2 * CHUNK, CHUNK },
        { HEAD + 3 * CHUNK, GAP - HEAD - 3 * CHUNK },
        { GAP_END, N - GAP_END },
    };
    unsigned char *all = pattern_bytes(N), *got = mem_alloc(N);
    struct store_writer *w;
    struct store_info info;
    OK(store_writer_open(s, "large", N, &w));
    OK(store_writer_extents(w, extent, sizeof extent / sizeof *extent));
    OK(store_write(w, GAP_END, all + GAP_END, N - GAP_END));
    OK(store_write(w, cut[4], all + cut[4], GAP - cut[4]));
    OK(store_write(w, cut[3], all + cut[3], CHUNK));
    OK(store_write(w, 0, all, HEAD));
    OK(store_write(w, cut[1], all + cut[1], 2 * CHUNK)); /* two at once */
    FAILS(ST_NOT_FOUND, "", store_stat(s, "large", &info));
    OK(store_writer_finish(w));
    OK(store_get(s, "large", 0, got, N));
    memset(all + GAP, 0, GAP_END - GAP);
    assert_memory_equal(got, all, N);
    OK(store_writer_open(s, "gone", N, &w));
    OK(store_write(w, 0, all, N));
    store_writer_abort(w);
    expect_list(s, "", "large");
    mem_free(all);
    mem_free(got);
}

/* More names than a server tells at once. */
static void check_many(struct store *s)
{
    enum { NAMES = 1003 };
    char key[32];
    struct store_list l;
    for (int i = 0; i < NAMES; i++) {
        snprintf(key, sizeof key, "many/%04d", i);
        OK(store_put(s, key, "", 0, STORE_REPLACE));
    }
    OK(store_list(s, "many", &l));
    assert_int_equal(l.count, NAMES);
    for (int i = 0; i < NAMES; i++) {
        snprintf(key, sizeof key, "%04d", i);
        assert_string_equal(l.entry[i].name, key);
    }
    store_list_free(&l);
    OK(store_remove_tree(s, "many"));
    expect_list(s, "", "");
}

/* Puts, removals of the directory and lists side by side: none may fail, or see half an object. */
static status *churn(void *arg)
{
    const struct racer *r = arg;
    char key[32];
    snprintf(key, sizeof key, "churn/%d", r->id);
    for (int i = 0; i < 30; i++) {
        unsigned char buf[64], got[64];
        size_t n;
        void *all;
        memset(buf, r->id, sizeof buf);
        TRY(store_put(r->s, key, buf, sizeof buf, STORE_REPLACE));
        TRY(store_get(r->s, key, 0, got, sizeof got));
        if (memcmp(buf, got, sizeof buf) != 0)
            return ERR(CORRUPT, "%s", key);
        TRY(store_get_all(r->s, key, 64, &all, &n));
        mem_free(all);
        struct store_list l;
        TRY(store_list(r->s, "churn", &l));
        store_list_free(&l);
        TRY(store_remove(r->s, key));
        status_free(store_remove(r->s, "churn"));
    }
    return NULL;
}

static void check_churn(struct store *s)
{
    struct racer r[THREADS];
    struct thread t[THREADS];
    for (int i = 0; i < THREADS; i++) {
        r[i] = (struct racer){ .s = s, .id = i };
        OK(thread_start(&t[i], "churn", churn, &r[i]));
    }
    for (int i = 0; i < THREADS; i++)
        OK(thread_join(&t[i]));
    expect_list(s, "churn", "");
}

static void test_conformance(void **state)
{
    (void)state;
    static void (*const checks[])(struct store *) = { check_objects, check_ranges,         check_streams,
                                                      check_lists,   check_rename,         check_writer,
                                                      check_keys,    check_exclusive_race, check_shared_writer,
                                                      check_churn,   check_large,          check_many };
    int stores = 0;
    for (size_t i = 0; store_registry[i]; i++, stores++)
        for (size_t k = 0; store_is_tested(store_registry[i]) && k < sizeof checks / sizeof *checks; k++) {
            struct fixture f;
            fixture_open(&f, store_registry[i]);
            checks[k](f.s);
            fixture_close(&f);
        }
    assert_true(stores >= 2);
}

/* ---- Opening */

static void test_open(void **state)
{
    (void)state;
    struct store *s;
    FAILS(ST_INVALID, "", store_open("", true, &s));
    FAILS(ST_INVALID, "", store_open(NULL, true, &s));
    status *st = store_open("gopher://x/y", true, &s);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "file:"));
    assert_non_null(strstr(status_message(st), "mem:"));
    status_free(st);
    FAILS(ST_INVALID, "", store_open("mem:x", true, &s));
    FAILS(ST_INVALID, "", store_open("file:", true, &s));
    FAILS(ST_INVALID, "", store_open("file://host/path", true, &s));
    FAILS(ST_NOT_FOUND, "", store_open("file:/tmp/tessera-no-such-directory", false, &s));
    FAILS(ST_NOT_FOUND, "", store_open("/tmp/tessera-no-such-directory", false, &s));
    status *dev = store_open("/proc/self/nothing/here", true, &s); /* cannot be made, by root neither */
    assert_non_null(dev);
    assert_non_null(strstr(status_message(dev), "/proc/self/nothing"));
    status_free(dev);

    char dir[FOLDER_BYTES], text[128];
    folder_make(dir);
    static const char *const forms[] = {
        "%s/x/y", "file:%s/x/y", "file://%s/x/y", "%s//x/y/", "file:%s/x//y", "/%s/x/y"
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) { /* all name one place */
        snprintf(text, sizeof text, forms[i], dir);
        OK(store_open(text, i == 0, &s));
        assert_string_equal(s->uri, text);
        if (i == 0)
            OK(store_put(s, "k", "v", 1, STORE_EXCLUSIVE));
        expect_text(s, "k", "v");
        store_close(s);
    }
    snprintf(text, sizeof text, "%s/x/y/k", dir);
    FAILS(ST_INVALID, "", store_open(text, false, &s)); /* a file */
    assert_int_equal(chdir(dir), 0);
    OK(store_open("rel/root", true, &s)); /* a relative path; what follows must not depend on the working directory */
    assert_int_equal(chdir("/"), 0);
    OK(store_put(s, "k", "rel", 3, STORE_EXCLUSIVE));
    store_close(s);
    snprintf(text, sizeof text, "%s/rel/root", dir);
    OK(store_open(text, false, &s));
    expect_text(s, "k", "rel");
    store_close(s);
    store_close(NULL);
    folder_remove(dir);
}

/* ---- What only a directory has: files that others see */

static int count_files(const char *dir)
{
    char command[160];
    int n = -1;
    snprintf(command, sizeof command, "find %s -type f | wc -l", dir);
    FILE *p = popen(command, "r");
    assert_non_null(p);
    assert_int_equal(fscanf(p, "%d", &n), 1);
    pclose(p);
    return n;
}

static void test_posix_temporaries(void **state)
{
    (void)state;
    struct fixture f;
    uint64_t ns;
    struct store_writer *w[3];
    for (size_t i = 0; store_registry[i]; i++)
        if (strcmp(store_registry[i]->scheme, "file") == 0)
            fixture_open(&f, store_registry[i]);
    OK(store_put(f.s, "step/x", "x", 1, STORE_REPLACE));
    FAILS(ST_EXISTS, "", store_put(f.s, "step/x", "x", 1, STORE_EXCLUSIVE));
    OK(store_now(f.s, &ns));
    assert_int_equal(count_files(f.dir), 1); /* no temporary stays, after an error neither */
    FAILS(ST_INVALID, "", store_put(f.s, "step/x/below", "x", 1, STORE_REPLACE));
    FAILS(ST_IO, "", store_put(f.s, "step", "x", 1, STORE_REPLACE)); /* a directory is there */
    FAILS(ST_EXISTS, "", store_put(f.s, "step", "x", 1, STORE_EXCLUSIVE));
    assert_int_equal(count_files(f.dir), 1);

    OK(store_writer_open(f.s, "step/model.aaaa.h5", 1, &w[0]));
    OK(store_writer_open(f.s, "step/model.bbbb.h5", 1, &w[1]));
    OK(store_writer_open(f.s, "other/model.aaaa.h5", 1, &w[2]));
    assert_int_equal(count_files(f.dir), 4);
    expect_list(f.s, "step", "x");
    OK(store_sweep(f.s, "step", "aaaa"));
    OK(store_sweep(f.s, "nowhere", "aaaa"));
    FAILS(ST_INVALID, "", store_sweep(f.s, "step", ""));
    assert_int_equal(count_files(f.dir), 3);
    FAILS(ST_NOT_FOUND, "", store_writer_finish(w[0])); /* it was taken for dead */
    OK(store_writer_finish(w[1]));
    OK(store_writer_finish(w[2]));
    expect_list(f.s, "step", "model.bbbb.h5 x");
    assert_int_equal(count_files(f.dir), 3);

    /* links are neither followed out of the root by a removal, nor do they keep it from finishing */
    char command[512];
    snprintf(command, sizeof command, "mkdir %s/out && touch %s/out/keep && ln -s %s/out %s/a/root/step/link", f.dir,
             f.dir, f.dir, f.dir);
    assert_int_equal(system(command), 0);
    OK(store_remove_tree(f.s, "step"));
    expect_list(f.s, "", "other/");
    assert_int_equal(count_files(f.dir), 2);
    fixture_close(&f);
}

/* ---- What store.c adds, over a store that does little at a time and is often busy */

struct halting {
    int busy, calls; /* UNAVAILABLE this many times, then it works */
    unsigned char data[64];
    size_t most; /* bytes a call */
};

static status *halt(struct halting *h)
{
    h->calls++;
    return h->busy-- > 0 ? ERR(UNAVAILABLE, "busy") : NULL;
}

static status *halting_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    struct halting *h = s->impl;
    (void)key;
    TRY(halt(h));
    size_t left = offset < sizeof h->data ? sizeof h->data - (size_t)offset : 0;
    n = n < h->most ? n : h->most;
    *got = n < left ? n : left;
    memcpy(buf, h->data + offset, *got);
    return NULL;
}

static status *halting_stat(struct store *s, const char *key, struct store_info *out)
{
    (void)key;
    TRY(halt(s->impl));
    *out = (struct store_info){ .bytes = 64 };
    return NULL;
}

static status *halting_list(struct store *s, const char *dir, struct store_list *out)
{
    (void)dir;
    struct store_info info = { .bytes = 1 };
    TRY(store_list_add(out, "b", &info));
    TRY(halt(s->impl)); /* what was added before the error must not be listed twice */
    return store_list_add(out, "a", &info);
}

static status *halting_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    (void)key, (void)buf, (void)n, (void)mode;
    return halt(s->impl);
}

static status *halting_writer_open(struct store_writer *w)
{
    w->impl = w->store->impl;
    return NULL;
}

static status *halting_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    struct halting *h = w->impl;
    TRY(halt(h));
    n = n < h->most ? n : h->most;
    memcpy(h->data + offset, buf, n);
    *put = n;
    return NULL;
}

static status *halting_finish(struct store_writer *w)
{
    return halt(w->impl);
}

static void halting_abort(struct store_writer *w)
{
    (void)w;
}

static void test_loops_and_retries(void **state)
{
    (void)state;
    static const struct store_ops ops = { .name = "halting",
                                          .scheme = "halting",
                                          .put = halting_put,
                                          .get = halting_get,
                                          .stat = halting_stat,
                                          .list = halting_list,
                                          .writer_open = halting_writer_open,
                                          .write = halting_write,
                                          .finish = halting_finish,
                                          .abort = halting_abort };
    struct halting h = { .most = 7 };
    struct store s = { .ops = &ops, .impl = &h };
    struct store_writer *w;
    unsigned char all[64], got[64];
    for (size_t i = 0; i < 64; i++)
        all[i] = pattern(i);

    OK(store_writer_open(&s, "k", 64, &w));
    h.busy = 3;
    OK(store_write(w, 0, all, 64));
    assert_memory_equal(h.data, all, 64);
    OK(store_writer_finish(w));
    h.busy = 3;
    OK(store_get(&s, "k", 1, got, 63));
    assert_memory_equal(got, all + 1, 63);
    h.busy = 0;
    FAILS(ST_CORRUPT, "", store_get(&s, "k", 1, got, 64));
    h.most = 0; /* an empty transfer is the end when reading and an error when writing, never a loop */
    FAILS(ST_CORRUPT, "", store_get(&s, "k", 0, got, 1));
    OK(store_writer_open(&s, "k", 64, &w));
    FAILS(ST_INTERNAL, "", store_write(w, 0, all, 1));
    store_writer_abort(w);

    h.busy = 1000;
    h.calls = 0;
    FAILS(ST_UNAVAILABLE, "", store_put(&s, "k", "x", 1, STORE_REPLACE));
    assert_in_range(h.calls, 2, 20); /* again, but not for ever */
    OK(store_writer_open(&s, "k", 64, &w));
    h.calls = 0;
    FAILS(ST_UNAVAILABLE, "", store_writer_finish(w));
    assert_int_equal(h.calls, 1); /* it has consumed its writer */
    h.busy = 2;
    expect_list(&s, "", "a b");
    FAILS(ST_UNSUPPORTED, "", store_rename_tree(&s, "a", "b"));
    OK(store_sweep(&s, "a", "b"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_conformance),
        cmocka_unit_test(test_posix_temporaries),
        cmocka_unit_test(test_loops_and_retries),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
