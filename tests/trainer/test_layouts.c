/* test_layouts: the promise that a layout changes who computes what and nothing else: drawn jobs of every loss, at
 * drawn meshes of 1 to 8 ranks (threads), against the same job on one rank: losses and gradients of every tensor within
 * rounding, and bit for bit where deterministic mode promises it. What all ranks hold is put together, so that a copy
 * that went its own way is seen. Jobs with a mistake are refused on every rank, in words that name it.
 *
 * A case is a number: TESSERA_LAYOUTS_FIRST (0) and TESSERA_LAYOUTS_CASES say which are run. A failing one is told as a
 * line of settings: TESSERA_LAYOUT="ranks=4 ..." runs that line alone. */
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
enum { CASES = 12, MISTAKES = 12 }; /* these look for wrong code, not for odd layouts */
#else
enum { CASES = 160, MISTAKES = 60 };
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

static status *start(const struct layout_job *j, const char *name, struct layout_run *r)
{
    *r = (struct layout_run){ .job = j, .root = root, .name = name, .gradients = true };
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

/* The job without what deterministic mode promises to change no bit: only what is part of the computation stays. */
static struct layout_job base_of(const struct layout_job *j, bool whole)
{
    static const char *const computed[] = { "parallel.cp", "parallel.tp", "parallel.sequence" };
    struct layout_job base = { .ranks = 1, .what = j->what };
    words_add(&base.how, "parallel.zero=0");
    words_add(&base.how, "threads=1");
    for (size_t i = 0; !whole && i < sizeof computed / sizeof *computed; i++) {
        const char *value = words_get(&j->how, computed[i], NULL);
        if (value)
            words_add(&base.how, "%s=%s", computed[i], value);
    }
    base.ranks = (int)(words_number(&base.how, "parallel.cp", 1) * words_number(&base.how, "parallel.tp", 1));
    return base;
}

static status *run_case(const struct layout_job *j)
{
    struct layout_job one = base_of(j, true), base = base_of(j, false);
    bool bits = !strcmp(words_get(&j->what, "train.deterministic", "true"), "true");
    struct layout_run got, want = { 0 }, same = { 0 };
    status *st = status_wrap(start(j, "got", &got), "the layout");
    if (!st && (base.ranks > 1 || !bits)) {
        st = status_wrap(start(&one, "one", &want), "one rank");
        st = st ? st : status_wrap(compare(&got, &want, 1e-5), "against one rank");
    }
    if (!st && bits) {
        st = status_wrap(start(&base, "base", &same), "the same cp and tp alone");
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

/* ---- mistakes ---- */

static status *run_mistake(const struct layout_job *j, const char *words)
{
    struct layout_run r;
    char ckpt[FOLDER_BYTES + 32];
    status *st = start(j, "bad", &r);
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
        cmocka_unit_test(drawn_mistakes_are_refused),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
