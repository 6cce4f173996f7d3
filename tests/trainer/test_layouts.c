/* test_layouts: the promise that a layout changes who computes what and nothing else: drawn jobs of every loss, at
 * drawn meshes of 1 to 8 ranks (threads), against the same job on one rank: losses and gradients of every tensor within
 * rounding, and bit for bit where deterministic mode promises it. What all ranks hold is put together, so that a copy
 * that went its own way is seen. Then meshes out of the list of all (layout_grid.c). Jobs with a mistake are refused on
 * every rank, in words that name it.
 *
 * A case is a number: TESSERA_LAYOUTS_FIRST (0) and TESSERA_LAYOUTS_CASES say which drawn ones are run,
 * TESSERA_MESHES_FIRST and TESSERA_MESHES_CASES which of the list (otherwise: some that are drawn). A failing one is
 * told as a line of settings: TESSERA_LAYOUT="ranks=4 ..." runs that line alone. */
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
enum { CASES = 12, MESHES = 4, MISTAKES = 12 }; /* these look for wrong code, not for odd layouts */
#else
enum { CASES = 120, MESHES = 40, MISTAKES = 60 };
#endif

static char root[FOLDER_BYTES];

static uint32_t setting(const char *name, uint32_t otherwise)
{
    const char *v = getenv(name);
    return v && *v ? (uint32_t)strtoul(v, NULL, 10) : otherwise;
}

static void forget(const char *name)
{
    char dir[FOLDER_BYTES + 32];
    snprintf(dir, sizeof dir, "%s/%s", root, name);
    if (access(dir, F_OK) == 0)
        folder_remove(dir);
}

static status *start(const struct layout_job *j, const char *name, const char *routes, struct layout_run *r)
{
    *r = (struct layout_run){ .job = j, .root = root, .name = name, .routes = routes, .gradients = true };
    forget(name);
    return layout_run(r);
}

/* ---- the grid ---- */

static double worst; /* difference of a gradient so far */

static status *compare(const struct layout_run *got, const struct layout_run *want, double bound)
{
    TRY(losses_near(root, got->name, want->name, 0, bound));
    for (int s = 1; s <= JOB_STEPS; s++) {
        if (got->dealt[s] != want->dealt[s])
            return ERR(INTERNAL, "step %d takes other samples", s);
        if (watch_step((uint64_t)s))
            TRY(status_wrap(bound > 0 ? snapshot_near(&got->after[s], &want->after[s], bound, &worst)
                                      : snapshot_same(&got->after[s], &want->after[s]),
                            "step %d", s));
    }
    return NULL;
}

/* What must have the same bits: the job without what deterministic mode promises to change none. With experts on
 * several ranks that is little: the mesh is part of the computation. */
static struct layout_job base_of(const struct layout_job *j)
{
    static const char *const all[] = { "parallel.cp",       "parallel.tp",     "parallel.sequence", "parallel.ep",
                                       "parallel.pp",       "parallel.dp",     "parallel.zero",     "parallel.dp_shard",
                                       "parallel.schedule", "parallel.chunks", "parallel.stages" };
    bool dealt = words_number(&j->how, "parallel.ep", 1) > 1;
    struct layout_job base = { .ranks = 1, .what = j->what };
    for (size_t i = 0; i < (dealt ? sizeof all / sizeof *all : 3); i++) {
        const char *value = words_get(&j->how, all[i], NULL);
        if (value)
            words_add(&base.how, "%s=%s", all[i], value);
    }
    if (!dealt)
        words_add(&base.how, "parallel.zero=0");
    words_add(&base.how, "threads=1");
    base.ranks =
        dealt ? j->ranks : (int)(words_number(&base.how, "parallel.cp", 1) * words_number(&base.how, "parallel.tp", 1));
    return base;
}

/* With experts routes are replayed where the layout rounds otherwise: two scores may be nearly the same. */
static status *run_case(const struct layout_job *j)
{
    struct layout_job one = job_on_one_rank(j), base = base_of(j);
    bool bits = !strcmp(words_get(&j->what, "train.deterministic", "true"), "true"), rounds = base.ranks > 1 || !bits;
    const char *routes = rounds && job_has_experts(j) ? "replay" : NULL;
    struct layout_run got = { 0 }, want = { 0 }, same = { 0 };
    status *st = rounds ? status_wrap(start(&one, "one", routes ? "record" : NULL, &want), "one rank") : NULL;
    if (!st)
        st = status_wrap(start(j, "got", routes, &got), "the layout");
    if (!st && rounds)
        st = status_wrap(compare(&got, &want, 1e-5), "against one rank");
    if (!st && bits) {
        st = status_wrap(start(&base, "base", routes, &same), "what must have the same bits");
        st = st ? st : status_wrap(compare(&got, &same, 0), "bits");
    }
    layout_run_free(&got);
    layout_run_free(&want);
    layout_run_free(&same);
    return st;
}

static bool case_holds(const struct layout_job *j, const char *name)
{
    char line[LINE_BYTES];
    job_line(j, line);
    status *st = run_case(j);
    if (st)
        fprintf(stderr, "%s: %s\nTESSERA_LAYOUT=\"%s\"\n", name, status_message(st), line);
    bool good = st == NULL;
    status_free(st);
    return good;
}

static void drawn_layouts_are_one_rank(void **state)
{
    (void)state;
    uint32_t first = setting("TESSERA_LAYOUTS_FIRST", 0), cases = setting("TESSERA_LAYOUTS_CASES", CASES), failed = 0;
    static struct layout_job j;
    const char *line = getenv("TESSERA_LAYOUT");
    if (line && *line) {
        assert_true(job_parse(line, &j));
        assert_true(case_holds(&j, "TESSERA_LAYOUT"));
        return;
    }
    for (uint32_t i = first; i < first + cases; i++) {
        char name[32];
        struct draw d = draw_from(6, i);
        snprintf(name, sizeof name, "case %u", i);
        draw_job(&d, &j);
        failed += !case_holds(&j, name);
    }
    printf("%u of %u layouts from %u on hold; gradients are off by %.2g of their norm at most\n", cases - failed, cases,
           first, worst);
    assert_int_equal(failed, 0);
}

static void meshes_are_one_rank(void **state)
{
    (void)state;
    uint32_t all = grid_jobs(), first = setting("TESSERA_MESHES_FIRST", 0), listed = setting("TESSERA_MESHES_CASES", 0),
             cases = listed ? listed : MESHES, failed = 0, run = 0;
    const char *line = getenv("TESSERA_LAYOUT");
    if (line && *line)
        return;
    for (uint32_t i = first; i < first + cases && (!listed || i < all); i++) {
        static struct layout_job j;
        char name[32];
        struct draw d = draw_from(9, i);
        uint32_t number = listed ? i : (uint32_t)draw_below(&d, all);
        assert_true(grid_job(number, &j));
        snprintf(name, sizeof name, "mesh %u", number);
        failed += !case_holds(&j, name);
        run++;
    }
    printf("%u of %u meshes hold, out of a list of %u\n", run - failed, run, all);
    assert_int_equal(failed, 0);
}

/* ---- mistakes ---- */

static status *run_mistake(const struct layout_job *j, const char *words)
{
    struct layout_run r;
    char ckpt[FOLDER_BYTES + 32];
    status *st = start(j, "bad", NULL, &r);
    layout_run_free(&r);
    bool told = status_code(st) == ST_INVALID && strstr(status_message(st), words);
    status *bad = told ? NULL
                       : ERR(INTERNAL, "\"%s\" is expected, not %s: %s", words, status_code_name(status_code(st)),
                             status_message(st));
    status_free(st);
    for (int i = 0; !bad && i < j->ranks; i++)
        if (r.codes[i] != ST_INVALID)
            bad = ERR(INTERNAL, "rank %d ends with %s", i, status_code_name(r.codes[i]));
    snprintf(ckpt, sizeof ckpt, "%s/bad/ckpt", root);
    return !bad && access(ckpt, F_OK) == 0 ? ERR(INTERNAL, "it has made its checkpoint root") : bad;
}

static void drawn_mistakes_are_refused(void **state)
{
    (void)state;
    uint32_t first = setting("TESSERA_LAYOUTS_FIRST", 0), cases = setting("TESSERA_LAYOUTS_CASES", MISTAKES),
             failed = 0;
    for (uint32_t i = first; i < first + cases; i++) {
        static struct layout_job j;
        char line[LINE_BYTES];
        struct draw d = draw_from(7, i);
        draw_job(&d, &j);
        const char *words = draw_mistake(&d, &j);
        status *st = run_mistake(&j, words);
        job_line(&j, line);
        if (st)
            fprintf(stderr, "mistake %u: %s\n%s\n", i, status_message(st), line);
        failed += st != NULL;
        status_free(st);
    }
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
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(drawn_layouts_are_one_rank),
        cmocka_unit_test(meshes_are_one_rank),
        cmocka_unit_test(drawn_mistakes_are_refused),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
