/* Retention and metrics over every store: what stays against a plain statement of the rules, over drawn lists of steps
 * and marks; ties, signs, missing and broken marks; marks that must not outlive what they speak of; and failures at
 * every removal, after which the newest step and every listed one must be whole. */
#include "ckpt/ckpt.h"
#include "comm/base/bytes.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/test_root.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

enum { STEPS = 12, A = 0xaaaa, B = 0xbbbb };

struct fixture {
    char dir[64];
    struct store *s;
    const struct store_ops *real;
    struct store_ops ops;
    int removals_left; /* fail from then on; -1: never */
};

static struct fixture *fixture_of(struct store *s)
{
    return (struct fixture *)(void *)((char *)(size_t)s->ops - offsetof(struct fixture, ops));
}

static status *limited_remove(struct store *s, const char *key)
{
    struct fixture *f = fixture_of(s);
    if (f->removals_left == 0)
        return ERR(IO, "remove %s: planted", key);
    f->removals_left -= f->removals_left > 0;
    return f->real->remove(s, key);
}

static status *limited_remove_tree(struct store *s, const char *dir)
{
    struct fixture *f = fixture_of(s);
    if (f->removals_left == 0)
        return ERR(IO, "remove %s: planted", dir);
    f->removals_left -= f->removals_left > 0;
    return f->real->remove_tree(s, dir);
}

static void fixture_open(struct fixture *f, const char *scheme)
{
    char uri[96];
    folder_make(f->dir);
    snprintf(uri, sizeof uri, "%s:%s", scheme, strcmp(scheme, "file") == 0 ? f->dir : "");
    OK(store_open(uri, true, &f->s));
    f->real = f->s->ops;
    f->ops = *f->real;
    f->ops.remove = limited_remove;
    f->ops.remove_tree = limited_remove_tree;
    f->s->ops = &f->ops;
    f->removals_left = -1;
}

static void fixture_close(struct fixture *f)
{
    store_close(f->s);
    folder_remove(f->dir);
}

/* The smallest step that can be committed: no files. */
static void commit_small(struct store *s, uint64_t step, uint64_t attempt)
{
    struct metadata m = { .run_id = 1,
                          .attempt = attempt,
                          .step = step,
                          .time_ns = 1,
                          .world = 1,
                          .mesh = { { 1, 1, 1, 1, 1 } },
                          .build = (char *)(size_t) "" };
    OK(commit_put(s, &m));
}

static void expect_steps(struct store *s, const uint64_t *want, size_t count)
{
    struct step_list l;
    OK(commit_list(s, &l));
    bool same = l.count == count;
    for (size_t i = 0; same && i < count; i++)
        same = l.step[i] == want[i];
    if (!same)
        fail_msg("%zu steps stay, not %zu", l.count, count);
    step_list_free(&l);
}

static void expect_mark(struct store *s, uint64_t step, const char *name, double value)
{
    struct mark_list l;
    OK(commit_marks(s, step, &l));
    size_t found = 0;
    for (size_t i = 0; i < l.count; i++)
        found += strcmp(l.mark[i].name, name) == 0 && l.mark[i].value == value;
    if (found != 1)
        fail_msg("step %llu has %zu metrics, %zu of them %s = %g", (unsigned long long)step, l.count, found, name,
                 value);
    mark_list_free(&l);
}

static void check_marks(struct store *s)
{
    commit_small(s, 3, A);
    struct mark_list l;
    OK(commit_marks(s, 3, &l));
    assert_int_equal(l.count, 0);
    mark_list_free(&l);
    OK(commit_mark(s, 3, "loss", 0.1));
    OK(commit_mark(s, 3, "rewards/accuracies", -1e-300));
    expect_mark(s, 3, "loss", 0.1);
    expect_mark(s, 3, "rewards/accuracies", -1e-300);
    OK(commit_mark(s, 3, "loss", 12345678.9012345));
    expect_mark(s, 3, "loss", 12345678.9012345);
    FAILS(ST_NOT_FOUND, "step 4 is not committed", commit_mark(s, 4, "loss", 1));
    FAILS(ST_INVALID, "finite", commit_mark(s, 3, "loss", (double)NAN));
    FAILS(ST_INVALID, "finite", commit_mark(s, 3, "loss", (double)INFINITY));
    FAILS(ST_INVALID, "characters", commit_mark(s, 3, "", 1));
    FAILS(ST_INVALID, "name", commit_mark(s, 3, "a b", 1));
    FAILS(ST_INVALID, "name", commit_mark(s, 3, "a\n", 1));
    char longest[MARK_NAME_BYTES + 1];
    memset(longest, 'x', sizeof longest);
    longest[MARK_NAME_BYTES] = 0;
    FAILS(ST_INVALID, "characters", commit_mark(s, 3, longest, 1));
    longest[MARK_NAME_BYTES - 1] = 0;
    OK(commit_mark(s, 3, longest, 7));
    expect_mark(s, 3, longest, 7);
    struct metadata *m;
    OK(commit_read(s, 3, &m)); /* they are no part of the step */
    metadata_free(m);
    /* another attempt's step of that number has other weights */
    commit_small(s, 3, B);
    OK(commit_marks(s, 3, &l));
    assert_int_equal(l.count, 0);
    OK(commit_mark(s, 3, "loss", 2));
    OK(commit_remove(s, 3));
    commit_small(s, 3, A);
    OK(commit_marks(s, 3, &l));
    assert_int_equal(l.count, 0);
}

/* Whether a step stays, said plainly: of `marked` values how many come before it. */
static bool stays(const struct keep_rules *k, const uint64_t *step, const double *value, size_t count, size_t i)
{
    if (i + (size_t)k->last >= count || (k->every && step[i] % k->every == 0))
        return true;
    int better = 0;
    for (size_t j = 0; j < count; j++)
        better += !isnan(value[j]) && (k->lowest ? value[j] < value[i] : value[j] > value[i]);
    for (size_t j = i + 1; j < count; j++)
        better += value[j] == value[i];
    return !isnan(value[i]) && better < k->best;
}

static void check_drawn(struct store *s, uint64_t seed)
{
    uint64_t step[STEPS], want[STEPS], left = 0, at = 1, r[4] = { 0 };
    double value[STEPS];
    size_t count = 1 + seed % STEPS;
    for (size_t i = 0; i < count; i++) {
        for (int n = 0; n < 4; n++)
            r[n] = hash64(&(uint64_t[]){ seed, i, (uint64_t)n }, 24);
        at += 1 + r[0] % 4;
        step[i] = at;
        commit_small(s, at, A);
        value[i] = r[1] % 4 ? (double)(r[2] % 5) - 2 : (double)NAN;
        if (!isnan(value[i]))
            OK(commit_mark(s, at, "m/x", value[i]));
        OK(commit_mark(s, at, "other", (double)(r[3] % 100)));
    }
    struct keep_rules k = { .last = 1 + (int)(seed / 7 % 4),
                            .every = seed / 3 % 4,
                            .best = (int)(seed / 5 % 4),
                            .metric = "m/x",
                            .lowest = seed / 11 % 2 };
    for (size_t i = 0; i < count; i++)
        if (stays(&k, step, value, count, i))
            want[left++] = step[i];
    OK(commit_retain(s, step[count - 1], &k));
    expect_steps(s, want, left);
    OK(commit_retain(s, step[count - 1], &k)); /* again: nothing changes */
    expect_steps(s, want, left);
    OK(store_remove(s, "LATEST"));
    for (size_t i = 0; i < count; i++)
        OK(commit_remove(s, step[i]));
}

static void check_broken(struct fixture *f)
{
    struct store *s = f->s;
    struct keep_rules k = { .last = 1, .best = 1, .metric = "m" };
    for (uint64_t step = 1; step <= 4; step++)
        commit_small(s, step, A);
    OK(commit_mark(s, 2, "m", 5));
    static const char *const broken[] = { "", "x", "5", "5 ", "5 m", "nan m\n", "5 m\n!", " \n" };
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        OK(store_put(s, "step-000000000003/mark.m", broken[i], strlen(broken[i]), STORE_REPLACE));
        FAILS(ST_CORRUPT, "mark.m", commit_retain(s, 4, &k));
        expect_steps(s, (uint64_t[]){ 1, 2, 3, 4 }, 4);
    }
    OK(commit_mark(s, 3, "m", 4)); /* mended */
    OK(commit_retain(s, 4, &k));
    expect_steps(s, (uint64_t[]){ 2, 4 }, 2);
    OK(commit_mark(s, 4, "m", 5)); /* as good, and later */
    OK(commit_retain(s, 4, &k));
    expect_steps(s, (uint64_t[]){ 4 }, 1);
    for (uint64_t step = 5; step <= 8; step++)
        OK(fake_step_commit(s, step, A));
    for (int n = 0;; n++) { /* whatever removal fails, what is listed is whole, and trying again gets there */
        f->removals_left = n;
        status *st = commit_retain(s, 8, &(struct keep_rules){ .last = 1, .every = 6 });
        bool done = !st;
        status_free(st);
        f->removals_left = -1;
        struct step_list l;
        OK(commit_list(s, &l));
        assert_int_equal(l.step[l.count - 1], 8);
        for (size_t i = 0; i < l.count; i++) {
            struct metadata *m;
            OK(commit_read(s, l.step[i], &m));
            metadata_free(m);
        }
        step_list_free(&l);
        if (done)
            break;
        assert_true(n < 20);
    }
    expect_steps(s, (uint64_t[]){ 6, 8 }, 2);
}

/* ckpt_best over drawn steps, of which some have the metric and some another one: the extreme value, the later of equal
 * ones, as retention keeps it. */
static void check_best(struct store *s, uint64_t seed)
{
    static const double values[] = { -2, -1e-9, 0, 0.5, 0.5 };
    struct tessera_options o = TESSERA_OPTIONS;
    struct comm *self;
    tessera *t;
    uint64_t high = UINT64_MAX, low = UINT64_MAX, step = 7;
    double highest = 0, lowest = 0;
    for (uint64_t i = 1; i <= 6; i++) {
        commit_small(s, i, A);
        OK(commit_mark(s, i, "other", (double)i));
        uint64_t pick = hash64(&(uint64_t[]){ seed, i }, 16) % 8;
        if (pick >= sizeof values / sizeof *values)
            continue;
        double v = values[pick];
        OK(commit_mark(s, i, "eval/loss", v));
        if (high == UINT64_MAX || v >= highest)
            highest = v, high = i;
        if (low == UINT64_MAX || v <= lowest)
            lowest = v, low = i;
    }
    OK(comm_open("self", NULL, NULL, &self));
    o.url = "unused:";
    o.read_only = 1;
    OK(ckpt_open(&o, self, NULL, s, &t));
    if (high == UINT64_MAX) {
        FAILS(ST_NOT_FOUND, "eval/loss", ckpt_best(t, "eval/loss", false, &step));
        assert_int_equal(step, 7);
    } else {
        OK(ckpt_best(t, "eval/loss", false, &step));
        assert_int_equal(step, high);
        OK(ckpt_best(t, "eval/loss", true, &step));
        assert_int_equal(step, low);
    }
    OK(ckpt_best(t, "other", false, &step));
    assert_int_equal(step, 6);
    OK(tessera_close(t));
    comm_close(self);
    for (uint64_t i = 1; i <= 6; i++)
        OK(commit_remove(s, i));
}

static void with_store(const char *scheme, uint64_t draws)
{
    struct fixture f;
    fixture_open(&f, scheme);
    for (uint64_t seed = 0; seed < draws; seed++)
        check_drawn(f.s, seed);
    for (uint64_t seed = 0; seed < 60; seed++)
        check_best(f.s, seed);
    check_marks(f.s);
    OK(commit_remove(f.s, 3));
    check_broken(&f);
    fixture_close(&f);
}

static void test_posix(void **state)
{
    (void)state;
    with_store("file", 40);
}

static void test_mem(void **state)
{
    (void)state;
    with_store("mem", 2000);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_posix), cmocka_unit_test(test_mem) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
