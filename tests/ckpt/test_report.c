/* Reports: what a store that is slow on one rank leaves in them, and what `tessera ckpt report` says of numbers that
 * are known. Expected figures are worked out by hand. */
#include "ckpt/commit.h"
#include "ckpt/report.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/cli_run.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MS = 1000000 };
#define S 1000000000u

/* ---- clocks */

static void test_clock(void **state)
{
    (void)state;
    struct report_clock c = { 0 }, d = { 0 }, none = { 0 };
    report_add(&c, 100, 130, 10, 5);
    assert_true(c.first_ns == 100 && c.last_ns == 130 && c.busy_ns == 20 && c.wait_ns == 10 && c.bytes == 5);
    report_add(&c, 50, 60, 0, 7); /* another thread's, entered later */
    assert_true(c.first_ns == 50 && c.last_ns == 130 && c.busy_ns == 30 && c.wait_ns == 10 && c.bytes == 12);
    report_merge(&d, &none);
    assert_memory_equal(&d, &none, sizeof d);
    d.retries = 2;
    report_merge(&d, &c);
    report_merge(&d, &c);
    report_merge(&d, &none);
    assert_true(d.first_ns == 50 && d.last_ns == 130 && d.busy_ns == 60 && d.wait_ns == 20 && d.bytes == 24);
    assert_int_equal(d.retries, 2);
    struct report_rank r = { .stage = { [REPORT_WRITE] = d } };
    report_relative(&r, 40);
    assert_true(r.stage[REPORT_WRITE].first_ns == 10 && r.stage[REPORT_WRITE].last_ns == 90);
    assert_true(r.stage[REPORT_FSYNC].first_ns == 0 && r.stage[REPORT_FSYNC].last_ns == 0);
}

/* ---- the formula */

static void near(double got, double want)
{
    if (!(fabs(got - want) < 1e-12))
        fail_msg("%.15g, not %.15g", got, want);
}

static void test_ettr(void **state)
{
    (void)state;
    near(report_ettr(600, 0, 0, 0, 1200), 0.75);                    /* half an interval of two is done again */
    near(report_ettr(600, 0, 30, 60, 10800), 0.9638888888888889);   /* 1 - 390 / 10800 */
    near(report_ettr(600, 150, 30, 60, 10800), 0.7711111111111111); /* the same x 600 / 750 */
    near(report_ettr(100, 0, 40, 10, 100), 0);                      /* all is lost */
    near(report_ettr(100, 0, 400, 10, 100), 0);
    assert_true(isnan(report_ettr(0, 1, 1, 1, 100)));
    assert_true(isnan(report_ettr(100, 1, 1, 1, 0)));
}

/* ---- the text */

/* A report of 2 x 2 ranks (dp, tp); stage s of rank r has been busy for 10 r + s milliseconds, but for the writes,
 * which take 100, 110, 90 and 450 ms. */
static struct report *known(bool load, uint64_t step)
{
    static const uint64_t write_ms[] = { 100, 110, 90, 450 };
    struct report *r = NULL;
    assert_ok(report_new(4, &r));
    *r = (struct report){ .load = load,
                          .step = step,
                          .attempt = 0xa1b2c3d4e5f60718,
                          .time_ns = 1700000000000000001,
                          .span_ns = 2 * S,
                          .world = 4 };
    r->mesh = (struct mesh){ { 1, 2, 1, 1, 2 } };
    r->interval_ns = load ? 0 : 600 * (uint64_t)S + 500 * MS;
    r->storage_bytes = load ? 1000 : 0;
    r->unique_bytes = load ? 900 : 0;
    for (uint64_t i = 0; i < 4; i++) {
        struct report_rank *k = &r->rank[i];
        *k = (struct report_rank){ .begin_ns = i * MS, .total_ns = 500 * MS + i, .stall_ns = (5 - i) * 100 * MS };
        k->bytes = 1 << 20;
        for (uint64_t s = 0; s < REPORT_STAGES; s++) {
            if (!report_has_stage(load, (enum report_stage)s))
                continue;
            uint64_t busy = s == REPORT_WRITE ? write_ms[i] * MS : (10 * i + s) * MS;
            k->stage[s] = (struct report_clock){ 1000 * i + s, busy, s, i, s * MS + 1, s * MS + 1 + busy };
        }
    }
    return r;
}

static void test_text(void **state)
{
    (void)state;
    for (int load = 0; load < 2; load++) {
        struct report *r = known(load, 100), *back = NULL;
        char *text;
        size_t bytes;
        assert_ok(report_text(r, &text, &bytes));
        assert_int_equal(strlen(text), bytes);
        assert_ok(report_parse(text, bytes, &back));
        assert_memory_equal(back, r, sizeof *r + 4 * sizeof r->rank[0]);
        mem_free(back);
        /* cut anywhere it is none, nor with something behind it */
        char *part = mem_alloc(bytes + 2);
        for (size_t n = 0; n + 1 < bytes; n += 1 + n / 64) {
            memcpy(part, text, n);
            part[n] = 0;
            FAILS(ST_CORRUPT, "byte", report_parse(part, n, &back));
        }
        memcpy(part, text, bytes);
        memcpy(part + bytes, "x", 2);
        FAILS(ST_CORRUPT, "follows", report_parse(part, bytes + 1, &back));
        mem_free(part);
        mem_free(text);
        mem_free(r);
    }
}

static void replace(char *text, const char *from, const char *to)
{
    char *at = strstr(text, from);
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
}

/* Numbers that do not fit together, each in an otherwise good report. */
static void test_hostile(void **state)
{
    (void)state;
    static const char *const bad[][2] = {
        { "\"version\":1", "\"version\":2" },
        { "\"world\":4", "\"world\":5" },
        { "\"world\":4", "\"world\":3" },
        { "\"world\":4", "\"world\":0" },
        { "\"world\":4", "\"worle\":4" },
        { "\"dp\":2", "\"dp\":3" },
        { "\"dp\":2", "\"dp\":0" },
        { "\"kind\":\"save\"", "\"kind\":\"move\"" },
        { "\"step\":100", "\"step\":-10" },
        { "\"bytes\":[1048576,", "\"bytes\":[1048576 " },
        { "\"retries\":[0,1,2,3]", "\"retries\":[0,1,2,x]" },
        { "\"retries\":[0,1,2,3]", "\"retries\":[0,1,23 ]" },
        { "\"s\":2.000000000", "\"s\":2.000e+9999" },
    };
    struct report *r = known(false, 100), *back = NULL;
    char *text;
    size_t bytes;
    assert_ok(report_text(r, &text, &bytes));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *copy = mem_strdup(text);
        replace(copy, bad[i][0], bad[i][1]);
        FAILS(ST_CORRUPT, "byte", report_parse(copy, bytes, &back));
        mem_free(copy);
    }
    /* what is not known is passed over */
    replace(text, "\"attempt\":\"a1b2c3d4e5f60718\"", "\"attemps\":[[],{\"a\":\"\\\"]\"}]  ");
    assert_ok(report_parse(text, bytes, &back));
    assert_int_equal(back->attempt, 0);
    mem_free(back);
    FAILS(ST_CORRUPT, "world", report_parse("{\"world\":1000000000}", 20, &back));
    char deep[4096];
    memset(deep, '[', sizeof deep - 1);
    memcpy(deep, "{\"x\":", 5);
    deep[sizeof deep - 1] = 0;
    FAILS(ST_CORRUPT, "deep", report_parse(deep, sizeof deep - 1, &back));
    mem_free(text);
    mem_free(r);
}

/* ---- on the root */

static size_t count_of(struct store *s, bool load, uint64_t *least)
{
    struct store_list l;
    size_t n = 0;
    *least = UINT64_MAX;
    assert_ok(store_list(s, "reports", &l));
    for (size_t i = 0; i < l.count; i++) {
        bool is_load;
        uint64_t step;
        if (!report_parse_name(l.entry[i].name, &is_load, &step) || is_load != load)
            continue;
        n++;
        *least = step < *least ? step : *least;
    }
    store_list_free(&l);
    return n;
}

static void test_names(void **state)
{
    (void)state;
    char key[STORE_KEY_BYTES];
    bool load;
    uint64_t step;
    report_key(false, 100, key);
    assert_string_equal(key, "reports/save-000000000100.json");
    assert_true(report_parse_name("load-000000000007.json", &load, &step) && load && step == 7);
    assert_true(report_parse_name("save-1234567890123.json", &load, &step) && !load && step == 1234567890123);
    static const char *const none[] = { "",
                                        "save-",
                                        "save-7.json",
                                        "save-000000000007.jso",
                                        "save-00000000000x.json",
                                        "save-+00000000007.json",
                                        "load-000000000007.json2",
                                        "lead-000000000007.json" };
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        assert_false(report_parse_name(none[i], &load, &step));
}

static void count_one(void *arg, const char *key, uint64_t bytes)
{
    assert_true(strncmp(key, "reports/save-", 13) == 0 && bytes > 0);
    ++*(int *)arg;
}

static void test_bounded(void **state)
{
    (void)state;
    struct root root = root_open(true);
    uint64_t least;
    assert_ok(store_put(root.store, "reports/notes.txt", "mine", 4, STORE_REPLACE));
    for (uint64_t step = 1; step <= REPORT_KEEP + 6; step++) {
        struct report *r = known(step % 2, step);
        assert_ok(report_write(root.store, r));
        r->load = false;
        if (step % 2)
            assert_ok(report_write(root.store, r));
        mem_free(r);
    }
    assert_int_equal(count_of(root.store, false, &least), REPORT_KEEP);
    assert_int_equal(least, 7);
    assert_int_equal(count_of(root.store, true, &least), (REPORT_KEEP + 6) / 2);
    assert_int_equal(least, 1);
    int found = 0;
    struct report *r = known(false, 1000);
    char *text, key[STORE_KEY_BYTES];
    size_t bytes;
    assert_ok(report_text(r, &text, &bytes));
    mem_free(r);
    for (uint64_t step = 1000; step < 1003; step++) {
        report_key(false, step, key);
        assert_ok(store_put(root.store, key, text, bytes, STORE_REPLACE));
    }
    mem_free(text);
    assert_ok(report_prune(root.store, false, true, count_one, &found));
    assert_int_equal(found, 3);
    assert_int_equal(count_of(root.store, false, &least), REPORT_KEEP + 3);
    struct gc_options o = { .age_seconds = 0 };
    struct gc_result gone = { 0 };
    assert_ok(commit_gc(root.store, &o, NULL, NULL, &gone));
    assert_int_equal(gone.objects, 3);
    assert_int_equal(count_of(root.store, false, &least), REPORT_KEEP);
    assert_int_equal(least, 10);
    struct store_info info;
    assert_ok(store_stat(root.store, "reports/notes.txt", &info));
    root_close(&root);
}

/* ---- of real saves */

enum { RANKS = 4, SLOW = 2 };

struct job {
    struct store *store, *slow; /* slow: rank SLOW's */
    uint64_t first, last;       /* steps to save */
    bool fails;                 /* the last one does */
};

static status *save_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    const struct fake_cut cut = { RANKS, 2, true, false, 1 };
    struct tessera_options o = TESSERA_OPTIONS;
    o.mesh[1] = 2;
    o.mesh[4] = 2;
    o.writers = 1; /* so that what one was busy with fits into what it took */
    tessera *t;
    struct fake f;
    TRY(ckpt_open(&o, world, NULL, world->rank == SLOW ? j->slow : j->store, &t));
    TRY(fake_open(&cut, world->rank, &f));
    for (uint64_t step = j->first; step <= j->last; step++) {
        bool fails = j->fails && step == j->last;
        uint64_t committed;
        if (fails && world->rank == SLOW)
            store_fault_arm(j->slow, 1, FAULT_BEFORE);
        TRY(tessera_save(t, f.state, step));
        status *st = tessera_wait(t, &committed);
        EXPECT(fails == (st != NULL));
        EXPECT(fails || committed == step);
        status_free(st);
    }
    fake_close(&f);
    return tessera_close(t);
}

/* Save step `first` to `last` with a slow store; the reports of the last one. */
static struct report *run_save(struct root *root, const char *op, uint32_t us, uint64_t first, uint64_t last,
                               bool fails)
{
    struct store *slow;
    struct report *r = NULL;
    assert_ok(store_fault_open(root->store, &slow));
    store_fault_slow_op(slow, op, us);
    struct job j = { root->store, slow, first, last, fails };
    assert_ok(comm_threads_run(RANKS, save_job, &j));
    uint64_t step = fails ? last - 1 : last;
    assert_ok(report_read(root->store, false, &step, &r));
    store_fault_close(slow);
    return r;
}

static void check_sane(const struct report *r, uint64_t step)
{
    uint64_t bytes = 0;
    assert_true(!r->load && r->step == step && r->world == RANKS && r->time_ns > 0);
    assert_true(r->mesh.size[MESH_DP] == 2 && r->mesh.size[MESH_TP] == 2 && r->mesh.size[MESH_PP] == 1);
    for (int i = 0; i < RANKS; i++) {
        const struct report_rank *k = &r->rank[i];
        uint64_t written = k->stage[REPORT_WRITE].bytes;
        bytes += k->bytes;
        assert_true(k->total_ns > 0 && k->total_ns <= r->span_ns + k->begin_ns + r->rank[0].begin_ns + 1 * S);
        assert_true(k->bytes > 0 && written > k->bytes);             /* and headers, and padding */
        assert_int_equal(k->stage[REPORT_CHECKSUM].bytes, k->bytes); /* every byte, once */
        assert_int_equal(k->stage[REPORT_CAPTURE].bytes, k->bytes);  /* this store takes copies */
        assert_int_equal(k->stage[REPORT_FSYNC].bytes, written);     /* nothing is left out */
        assert_true(k->stage[REPORT_VOTE].bytes > 0 && k->stage[REPORT_WRITE].retries == 0);
        for (int s = 0; s < REPORT_STAGES; s++) {
            const struct report_clock *c = &k->stage[s];
            bool mine = s <= REPORT_VOTE || (s == REPORT_COMMIT && i == 0);
            assert_true(mine == (c->last_ns > 0));
            assert_true(c->first_ns <= c->last_ns);
            assert_true(s >= REPORT_VOTE || c->last_ns <= k->total_ns + 1 * MS);
        }
        assert_true(i == 0 || k->stage[REPORT_VOTE].first_ns == k->total_ns);
    }
    const struct fake_cut cut = { RANKS, 2, true, false, 1 };
    assert_int_equal(bytes, fake_bytes(&cut));
    assert_true(r->rank[0].stage[REPORT_COMMIT].last_ns <= r->span_ns);
}

static void test_slow_write(void **state)
{
    (void)state;
    struct root root = root_open(false);
    struct report *r = run_save(&root, "write", 150000, 1, 1, false);
    check_sane(r, 1);
    assert_int_equal(r->interval_ns, 0);
    uint64_t slept = r->rank[SLOW].stage[REPORT_WRITE].busy_ns;
    assert_true(slept >= 900 * (uint64_t)MS && slept <= r->rank[SLOW].total_ns); /* three headers, three chunks */
    for (int i = 0; i < RANKS; i++)                                              /* the others wait for it */
        assert_true(i == SLOW ||
                    (report_ns(r, i, REPORT_WRITE) < slept && r->rank[i].total_ns < r->rank[SLOW].total_ns &&
                     r->rank[i].stage[REPORT_VOTE].wait_ns > 0));
    assert_true(r->rank[SLOW].stage[REPORT_FSYNC].busy_ns < slept);
    struct cli c;
    struct store *folder;
    char url[FOLDER_BYTES + 16];
    cli_open(&c);
    snprintf(url, sizeof url, "%s/run", c.dir);
    assert_ok(store_open(url, true, &folder));
    assert_ok(report_write(folder, r));
    store_close(folder);
    cli_expect(&c, "report %/run", ST_OK, "  rank 2 (dp 1, tp 0): write "); /* the slowest is the first in the list */
    assert_ptr_equal(strstr(c.text, "  rank "), strstr(c.text, "  rank 2 (dp 1, tp 0): "));
    cli_close(&c);
    mem_free(r);
    root_close(&root);
}

/* Two saves in a row, and a third that fails: a report for each of the two. */
static void test_slow_fsync(void **state)
{
    (void)state;
    struct root root = root_open(false);
    uint64_t least;
    struct report *first = NULL, *r = run_save(&root, "finish", 80000, 5, 7, true);
    check_sane(r, 6);
    assert_int_equal(count_of(root.store, false, &least), 2);
    assert_int_equal(least, 5);
    assert_ok(report_read(root.store, false, &least, &first));
    check_sane(first, 5);
    assert_true(report_ns(r, SLOW, REPORT_FSYNC) >= 80 * (uint64_t)MS);
    assert_true(report_ns(r, SLOW, REPORT_WRITE) < report_ns(r, SLOW, REPORT_FSYNC));
    assert_true(r->interval_ns >= 80 * (uint64_t)MS && first->interval_ns == 0);
    uint64_t apart = r->time_ns - first->time_ns; /* the same by the wall clock */
    assert_true(r->interval_ns < apart + 200 * (uint64_t)MS && apart < r->interval_ns + 200 * (uint64_t)MS);
    mem_free(first);
    mem_free(r);
    root_close(&root);
}

/* ---- of real loads */

struct load_job {
    struct store *store, *slow;
    bool read_only;
};

static status *load_job(struct comm *world, void *arg)
{
    const struct load_job *j = arg;
    const struct fake_cut cut = { RANKS, 4, false, true, 1 }; /* not as it was saved */
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = j->read_only;
    tessera *t;
    struct fake f;
    uint64_t step;
    TRY(ckpt_open(&o, world, NULL, world->rank == SLOW ? j->slow : j->store, &t));
    TRY(fake_open(&cut, world->rank, &f));
    TRY(tessera_load_newest(t, f.state, &step));
    fake_close(&f);
    return tessera_close(t);
}

static void test_slow_read(void **state)
{
    (void)state;
    struct root root = root_open(false);
    struct store *slow;
    struct report *r = NULL;
    uint64_t least, read = 0, received = 0, sent = 0;
    mem_free(run_save(&root, NULL, 0, 3, 3, false));
    assert_ok(store_fault_open(root.store, &slow));
    store_fault_slow_op(slow, "get", 400000); /* long enough beside what a sanitizer takes */
    struct load_job j = { root.store, slow, true };
    assert_ok(comm_threads_run(RANKS, load_job, &j));
    assert_int_equal(count_of(root.store, true, &least), 0); /* read-only handles write nothing */
    j.read_only = false;
    assert_ok(comm_threads_run(RANKS, load_job, &j));
    assert_ok(report_read(root.store, true, NULL, &r));
    assert_true(r->load && r->step == 3 && r->world == RANKS && r->mesh.size[MESH_DP] == RANKS);
    const struct fake_cut cut = { RANKS, 4, false, true, 1 };
    assert_int_equal(r->unique_bytes, fake_bytes(&cut));
    for (int i = 0; i < RANKS; i++) {
        const struct report_rank *k = &r->rank[i];
        read += k->stage[REPORT_READ].bytes;
        sent += k->stage[REPORT_EXCHANGE].bytes;
        received += k->stage[REPORT_PLACE].bytes;
        assert_true(k->bytes == k->stage[REPORT_READ].bytes && k->stage[REPORT_READ].retries == 0);
        assert_int_equal(k->stage[REPORT_CHECKSUM].bytes, k->bytes);
        assert_true(i != SLOW || k->stage[REPORT_READ].busy_ns >= 100 * (uint64_t)MS);
        assert_true(i == SLOW || k->stage[REPORT_READ].busy_ns < r->rank[SLOW].stage[REPORT_READ].busy_ns);
        assert_true(k->total_ns <= k->stall_ns && k->stage[REPORT_WRITE].last_ns == 0);
        if (i != SLOW)
            assert_true(k->stage[REPORT_EXCHANGE].wait_ns >= 50 * (uint64_t)MS); /* for what the slow one reads */
    }
    assert_true(read >= r->storage_bytes); /* and the padding between */
    assert_true(received >= sent && sent > 0);
    mem_free(r);
    store_fault_close(slow);
    root_close(&root);
}

/* ---- what the command says */

static void put_known(struct cli *c, bool load, const char *name)
{
    char url[FOLDER_BYTES + 16];
    struct store *s;
    struct report *r = known(load, 100);
    snprintf(url, sizeof url, "%s/%s", c->dir, name);
    assert_ok(store_open(url, true, &s));
    assert_ok(report_write(s, r));
    store_close(s);
    mem_free(r);
}

static void test_command(void **state)
{
    (void)state;
    struct cli c;
    cli_open(&c);
    put_known(&c, false, "run");
    cli_expect(&c, "report %/run --stage write", ST_OK, "");
    assert_string_equal(c.text,
                        "save of step 100 on 4 ranks (pp=1,dp=2,ep=1,cp=1,tp=2): 4.0 MiB in 2.000 s, 2.0 MiB/s; "
                        "training was held up for 0.500 s\n"
                        "write of each rank, 9 is 0.450 s (rank 3):\n"
                        "  dp  tp\n"
                        "       0 1\n"
                        "   0   2 2\n"
                        "   1   2 9\n"
                        "stragglers, over 2 x the median:\n"
                        "  rank 3 (dp 1, tp 1): write 0.450 s, the median is 0.100 s\n"
                        "  rank 3 (dp 1, tp 1): capture 0.030 s, the median is 0.010 s\n"
                        "  rank 3 (dp 1, tp 1): checksum 0.031 s, the median is 0.011 s\n"
                        "  rank 3 (dp 1, tp 1): fsync 0.033 s, the median is 0.013 s\n"
                        /* 1 - (0 + 2 + 300) / 10800, x 600 / 600.5 */
                        "ETTR 0.97123: 600.0 s of training between saves, a save holds it up for 0.500 s and "
                        "counts after 2.000 s, a load takes 0.000 s (none was measured), a failure every "
                        "10800 s\n");
    put_known(&c, true, "run");
    cli_expect(&c, "report %/run --over 5 --mtbf=6040 --interval 1000", ST_OK, "stragglers, over 5 x the median: none");
    assert_non_null(strstr(c.text, "total of each rank, 9 is 0.500 s (rank 3)"));
    assert_non_null(strstr(c.text, "   0   9 9\n   1   9 9\n"));
    /* 1 - (2 + 2 + 500) / 6040, x 1000 / 1000.5 */
    assert_non_null(strstr(c.text, "ETTR 0.91610: "));
    cli_expect(&c, "report %/run --load --stage exchange", ST_OK, "1000 bytes read for 900 wanted");
    assert_non_null(strstr(c.text, "   0   2 4\n   1   7 9\n")); /* 7, 17, 27, 37 ms */
    assert_null(strstr(c.text, "ETTR"));
    cli_expect(&c, "report %/run/reports 100", ST_OK, "save of step 100");
    cli_expect(&c, "report %/run/step-000000000100", ST_OK, "save of step 100");
    cli_expect(&c, "report %/run 100 --json --stage=fsync", ST_OK, "\"seconds\":[0.003000000,0.013000000,0.023000000,");
    assert_non_null(strstr(c.text, "{\"rank\":3,\"stage\":\"write\",\"s\":0.450000000,\"median_s\":0.100000000}"));
    cli_expect(&c, "report %/run 101", ST_NOT_FOUND, "step 101");
    cli_expect(&c, "report %/run --stage read", ST_INVALID, "a save has no stage read");
    cli_expect(&c, "report %/run --stage reed", ST_INVALID, "capture, checksum");
    cli_expect(&c, "report %/run --over 0", ST_INVALID, "above 0");
    cli_expect(&c, "report %/run --stage", ST_INVALID, "wants a value");
    cli_expect(&c, "report", ST_INVALID, "which URL");
    cli_expect(&c, "report %/run --colour", ST_INVALID, "no option");
    cli_close(&c);
}

/* Of a real save: the trace is JSON, and nothing happens outside the save. */
static void test_trace(void **state)
{
    (void)state;
    struct cli c;
    char line[4096];
    cli_open(&c);
    snprintf(line, sizeof line, "%s/run", c.dir);
    struct root root = { 0 };
    assert_ok(store_open(line, true, &root.store));
    mem_free(run_save(&root, "write", 20000, 1, 1, false));
    cli_expect(&c, "report %/run --trace %/trace.json", ST_OK, "save of step 1 on 4 ranks");
    snprintf(
        line, sizeof line,
        "python3 -c '\n"
        "import json\n"
        "t = json.load(open(\"%s/trace.json\"))[\"traceEvents\"]\n"
        "x = [e for e in t if e[\"ph\"] == \"X\"]\n"
        "span = {e[\"pid\"]: e for e in x if e[\"tid\"] == 0}\n"
        "assert sorted(span) == [0, 1, 2, 3] and min(e[\"ts\"] for e in x) == 0\n"
        "names = {(e[\"pid\"], e[\"tid\"]): e[\"args\"][\"name\"] for e in t if e[\"name\"] == \"thread_name\"}\n"
        "for e in x:\n"
        "    s = span[e[\"pid\"]]\n"
        "    assert s[\"ts\"] <= e[\"ts\"] and e[\"ts\"] + e[\"dur\"] <= s[\"ts\"] + s[\"dur\"] + 0.01, (s, e)\n"
        "    assert e[\"tid\"] == 0 or names[e[\"pid\"], e[\"tid\"]] == e[\"name\"]\n"
        "for r in range(4):\n"
        "    mine = {e[\"name\"]: e for e in x if e[\"pid\"] == r and e[\"tid\"]}\n"
        "    want = {\"capture\", \"checksum\", \"write\", \"fsync\", \"vote\"} | ({\"commit\"} if r == 0 else set())\n"
        "    assert set(mine) | {\"capture\"} == want, mine\n"
        "    assert mine[\"checksum\"][\"args\"][\"bytes\"] == span[r][\"args\"][\"bytes\"] > 0, mine\n"
        "    busy = mine[\"write\"][\"args\"][\"busy_s\"]\n"
        "    assert r != 2 or busy >= 0.1, mine\n"
        "'",
        c.dir);
    assert_int_equal(system(line), 0);
    cli_expect(&c, "report %/run --trace %/no/such/folder", ST_NOT_FOUND, "folder");
    store_close(root.store);
    cli_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clock),      cmocka_unit_test(test_ettr),       cmocka_unit_test(test_text),
        cmocka_unit_test(test_hostile),    cmocka_unit_test(test_names),      cmocka_unit_test(test_bounded),
        cmocka_unit_test(test_slow_write), cmocka_unit_test(test_slow_fsync), cmocka_unit_test(test_slow_read),
        cmocka_unit_test(test_command),    cmocka_unit_test(test_trace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
