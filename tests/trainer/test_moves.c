/* test_moves: a job saved at one drawn layout and resumed at another. Every tensor comes back bit for bit, the samples
 * that follow are those of the run that nobody disturbed, and so are losses: within rounding, or bit for bit where
 * deterministic mode promises it.
 *
 * A case is a number: TESSERA_MOVES_FIRST (0) and TESSERA_MOVES_CASES say which are run; a failing one is told with its
 * two lines of settings. Checkpoints are files, or with TESSERA_TEST_S3 (a URL: tests/servers/with) objects. */
#include "tests/support/test_root.h"
#include "tests/trainer/layouts.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { CASES = 8 };
#else
enum { CASES = 100 };
#endif
enum { S3_CASES = 10 };

static char root[FOLDER_BYTES];

struct move {
    struct layout_job from, to;
    uint64_t at;
    char url[256];
};

static void draw_move(uint32_t number, struct move *m)
{
    static const char *const stored[] = { "default", "merge", "gather" };
    const char *s3 = getenv("TESSERA_TEST_S3");
    struct draw d = draw_from(8, number);
    draw_job(&d, &m->from);
    words_add(&m->from.what, "checkpoint.async=%s", draw_below(&d, 4) ? "true" : "false");
    words_add(&m->from.what, "checkpoint.irregular=%s", stored[draw_below(&d, 3)]);
    m->to = m->from;
    draw_other_layout(&d, &m->to);
    m->at = draw_between(&d, 1, JOB_STEPS - 2);
    snprintf(m->url, sizeof m->url, s3 ? "%s/moves-%d-%u" : "file:%s/ckpt-%d-%u", s3 ? s3 : root, (int)getpid(),
             number);
}

static bool same_computation(const struct move *m)
{
    static const char *const computed[] = { "parallel.cp", "parallel.tp", "parallel.sequence" };
    bool same = !strcmp(words_get(&m->from.what, "train.deterministic", "true"), "true") &&
                words_number(&m->from.how, "parallel.ep", 1) == 1 && words_number(&m->to.how, "parallel.ep", 1) == 1;
    for (size_t i = 0; i < sizeof computed / sizeof *computed; i++)
        same =
            same && !strcmp(words_get(&m->from.how, computed[i], "false"), words_get(&m->to.how, computed[i], "false"));
    return same;
}

static status *compare(const struct move *m, const struct layout_run *a, const struct layout_run *b,
                       const struct layout_run *whole)
{
    bool bits = same_computation(m);
    if (b->resumed_from != m->at)
        return ERR(INTERNAL, "it was resumed from step %d", (int)b->resumed_from);
    TRY(status_wrap(snapshot_same(&a->after[m->at], &whole->after[m->at]), "saved"));
    TRY(status_wrap(snapshot_same(&b->loaded, &a->after[m->at]), "loaded"));
    for (uint64_t s = m->at + 1; s <= JOB_STEPS; s++)
        if (b->dealt[s] != whole->dealt[s])
            return ERR(INTERNAL, "step %d takes other samples", (int)s);
    TRY(losses_near(root, "moved", "whole", 0, bits ? 0 : 1e-5));
    return bits ? status_wrap(snapshot_same(&b->after[JOB_STEPS], &whole->after[JOB_STEPS]), "at the end") : NULL;
}

/* Experts that tokens take on one rank. */
static status *record(const struct move *m)
{
    struct layout_job one = job_on_one_rank(&m->from);
    struct layout_run r = { .job = &one, .root = root, .name = "one", .routes = "record" };
    status *st = status_wrap(layout_run(&r), "one rank");
    layout_run_free(&r);
    return st;
}

static status *run_move(const struct move *m)
{
    const char *routes = job_has_experts(&m->from) && !same_computation(m) ? "replay" : NULL;
    struct layout_run whole = { .job = &m->from, .root = root, .name = "whole", .routes = routes },
                      a = { .job = &m->from,
                            .root = root,
                            .name = "moved",
                            .url = m->url,
                            .routes = routes,
                            .save_at = m->at,
                            .stop = true },
                      b = { .job = &m->to, .root = root, .name = "moved", .url = m->url, .routes = routes };
    whole.watch_at = m->at;
    status *st = routes ? record(m) : NULL;
    if (!st)
        st = status_wrap(layout_run(&whole), "undisturbed");
    if (!st)
        st = status_wrap(layout_run(&a), "saving");
    if (!st)
        st = status_wrap(layout_run(&b), "resuming");
    if (!st)
        st = compare(m, &a, &b, &whole);
    layout_run_free(&whole);
    layout_run_free(&a);
    layout_run_free(&b);
    return st;
}

static void clear(void)
{
    static const char *const names[] = { "whole", "moved", "one" };
    for (int i = 0; i < 3; i++) {
        char dir[FOLDER_BYTES + 16];
        snprintf(dir, sizeof dir, "%s/%s", root, names[i]);
        if (access(dir, F_OK) == 0)
            folder_remove(dir);
    }
}

static uint32_t setting(const char *name, uint32_t otherwise)
{
    const char *v = getenv(name);
    return v && *v ? (uint32_t)strtoul(v, NULL, 10) : otherwise;
}

static void moved_jobs_go_on(void **state)
{
    (void)state;
    uint32_t first = setting("TESSERA_MOVES_FIRST", 0),
             cases = setting("TESSERA_MOVES_CASES", getenv("TESSERA_TEST_S3") ? S3_CASES : CASES), failed = 0,
             exact = 0;
    for (uint32_t i = first; i < first + cases; i++) {
        static struct move m;
        char from[LINE_BYTES], to[LINE_BYTES];
        draw_move(i, &m);
        clear();
        status *st = run_move(&m);
        job_line(&m.from, from);
        job_line(&m.to, to);
        if (st)
            fprintf(stderr, "case %u, step %d: %s\nfrom %s\nto   %s\n", i, (int)m.at, status_message(st), from, to);
        failed += st != NULL;
        exact += same_computation(&m);
        status_free(st);
    }
    printf("%u of %u moves from %u on hold; %u of all promise bits\n", cases - failed, cases, first, exact);
    assert_int_equal(failed, 0);
}

static int make_data(void **state)
{
    (void)state;
    folder_make(root);
    status *st = layout_data(root);
    assert_null(st);
    return 0;
}

static int remove_data(void **state)
{
    (void)state;
    folder_remove(root);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(moved_jobs_go_on) };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
