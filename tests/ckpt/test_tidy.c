/* `tessera ckpt mark|rm|gc|diff` on a root in a folder: what goes, what must stay (the newest valid step, a live job's
 * files, what is young, what is unknown), and values that were changed by hand at known places. */
#include "ckpt/ckpt.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/cli_run.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

struct fixture {
    struct cli cli;
    struct store *s;
};

static void shell(const struct fixture *f, const char *command)
{
    char line[1024];
    snprintf(line, sizeof line, "cd %s && %s", f->cli.dir, command);
    if (system(line) != 0)
        fail_msg("%s", line);
}

static int each_setup(void **state)
{
    struct fixture *f = mem_calloc(1, sizeof *f);
    char root[80];
    cli_open(&f->cli);
    snprintf(root, sizeof root, "%s/run", f->cli.dir);
    OK(store_open(root, true, &f->s));
    for (uint64_t step = 100; step <= 300; step += 100)
        OK(fake_step_commit(f->s, step, 0xa1));
    *state = f;
    return 0;
}

static int each_teardown(void **state)
{
    struct fixture *f = *state;
    store_close(f->s);
    cli_close(&f->cli);
    mem_free(f);
    return 0;
}

static void expect_steps(const struct fixture *f, const char *want)
{
    struct step_list l;
    char got[128] = "";
    OK(commit_list(f->s, &l));
    for (size_t i = 0; i < l.count; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), "%s%llu", i ? " " : "", (unsigned long long)l.step[i]);
    step_list_free(&l);
    assert_string_equal(got, want);
}

static void expect_latest(const struct fixture *f, const char *want)
{
    void *text;
    size_t n;
    OK(store_get_all(f->s, "LATEST", 64, &text, &n));
    assert_string_equal(text, want);
    mem_free(text);
}

static void test_mark(void **state)
{
    struct fixture *f = *state;
    struct mark_list l;
    cli_expect(&f->cli, "mark %/run 100 eval/accuracy=0.75", ST_OK, "");
    cli_expect(&f->cli, "mark %/run/step-000000000100 loss=-1e-3", ST_OK, "");
    OK(commit_marks(f->s, 100, &l));
    assert_int_equal(l.count, 2);
    assert_string_equal(l.mark[0].name, "eval/accuracy");
    assert_true(l.mark[0].value == 0.75 && l.mark[1].value == -1e-3);
    mark_list_free(&l);
    cli_expect(&f->cli, "show %/run 100", ST_OK, "metrics\n  eval/accuracy  0.75\n  loss  -0.001\n");
    cli_expect(&f->cli, "show %/run 100 --json", ST_OK, "\"metrics\":{\"eval/accuracy\":0.75,\"loss\":-0.001}}");
    cli_expect(&f->cli, "show %/run 200 --json", ST_OK, "\"metrics\":{}}");
    cli_expect(&f->cli, "mark %/run 150 loss=1", ST_NOT_FOUND, "150");
    static const char *const wrong[] = { "mark %/run",          "mark %/run 100",         "mark %/run loss=1",
                                         "mark %/run 100 loss", "mark %/run 100 loss=",   "mark %/run 100 loss=x",
                                         "mark %/run 100 =1",   "mark %/run 100 loss=nan" };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cli_expect(&f->cli, wrong[i], ST_INVALID, "");
}

static void test_rm(void **state)
{
    struct fixture *f = *state;
    cli_expect(&f->cli, "rm %/run", ST_INVALID, "which steps");
    cli_expect(&f->cli, "rm %/run 100 300", ST_INVALID, "newest valid");
    cli_expect(&f->cli, "rm %/run 100 250", ST_NOT_FOUND, "250");
    expect_steps(f, "100 200 300"); /* all or nothing */
    struct lease l;
    char note[NOTE_BYTES];
    OK(lease_take(f->s, 30, &l, note));
    cli_expect(&f->cli, "rm %/run 100", ST_EXISTS, "live job");
    OK(lease_give_back(&l));
    expect_steps(f, "100 200 300");
    cli_expect(&f->cli, "rm %/run 100", ST_OK, "removed step 100");
    expect_steps(f, "200 300");
    shell(f, "test ! -e run/step-000000000100");
    /* with 300 damaged, 200 is the one to keep */
    shell(f, "rm run/step-000000000300/model-*");
    cli_expect(&f->cli, "rm %/run 200", ST_INVALID, "step 200 is the newest valid");
    cli_expect(&f->cli, "rm %/run 300", ST_OK, "removed step 300");
    expect_latest(f, "step-000000000200\n");
    cli_expect(&f->cli, "rm %/run 200 --force", ST_OK, "removed step 200");
    expect_steps(f, "");
    shell(f, "test ! -e run/LATEST");
    OK(lease_take(f->s, 30, &l, note)); /* was given back: no wait, no note */
    assert_string_equal(note, "");
    OK(lease_give_back(&l));
}

static void litter(struct fixture *f)
{
    shell(f, "cd run && echo 1 >step-000000000200/model-00000.00000000000000b2.h5"
             " && echo 2 >step-000000000200/.tmp-0123456789abcdef-model-00000.00000000000000b2.h5"
             " && mkdir step-000000000400 && echo 3 >step-000000000400/model-00001.00000000000000b2.h5"
             " && mkdir step-000000000500 && mkdir step-000000000050.bad-00000000000000b2"
             " && echo 4 >step-000000000050.bad-00000000000000b2/metadata.pb"
             " && mkdir step-000000000060.retired-00000000000000b2"
             " && mkdir other step-1.bad-1 && echo 5 >other/file && echo 6 >notes.h5");
}

static void test_gc(void **state)
{
    struct fixture *f = *state;
    OK(commit_mark(f->s, 200, "loss", 1));
    litter(f);
    cli_expect(&f->cli, "gc %/run", ST_OK,
               "removed 0 objects"); /* all is younger than a day, but for temporary files */
    shell(f, "test $(ls -A run/step-000000000200 | wc -l) = 5");
    shell(f, "find run -type f | sort | xargs sha256sum >before");
    cli_expect(&f->cli, "gc %/run --age=0 --dry-run", ST_OK, "would remove 6 objects");
    shell(f, "rm run/.tmp-* 2>/dev/null; find run -type f ! -path '*LEASE*' | sort | xargs sha256sum >after;"
             "grep -v LEASE before | diff - after");
    cli_expect(&f->cli, "gc %/run --age=0", ST_OK, "removed 6 objects");
    shell(f,
          "cd run && test ! -e step-000000000400 && test ! -e step-000000000500 &&"
          " test ! -e step-000000000050.bad-00000000000000b2 && test ! -e step-000000000060.retired-00000000000000b2");
    shell(f, "cd run && test -e other/file && test -e notes.h5 && test -d step-1.bad-1 &&"
             " test -e step-000000000200/mark.loss && test $(ls -A step-000000000200 | wc -l) = 4");
    cli_expect(&f->cli, "gc %/run --age=0", ST_OK, "removed 0 objects");
    cli_expect(&f->cli, "verify %/run", ST_OK, "no damage");
    expect_steps(f, "100 200 300");
    cli_expect(&f->cli, "gc %/run/step-000000000100", ST_INVALID, "root");
    cli_expect(&f->cli, "gc %/run --age=x", ST_INVALID, "seconds");
    cli_expect(&f->cli, "gc %/run 100", ST_INVALID, "too many");
}

/* Beside a live job: its attempt's files, temporary files and empty directories stay. */
static void test_gc_live(void **state)
{
    struct fixture *f = *state;
    struct lease l;
    char note[NOTE_BYTES], line[256];
    litter(f);
    OK(lease_take(f->s, 30, &l, note));
    snprintf(line, sizeof line, "echo 7 >run/step-000000000400/model-00000.%016llx.h5", (unsigned long long)l.attempt);
    shell(f, line);
    cli_expect(&f->cli, "gc %/run --age=0", ST_OK, "left alone");
    shell(f, "cd run && test $(ls -A step-000000000400 | wc -l) = 1 && test -d step-000000000500 &&"
             " test -e step-000000000200/.tmp-0123456789abcdef-model-00000.00000000000000b2.h5 &&"
             " test ! -e step-000000000200/model-00000.00000000000000b2.h5");
    OK(lease_check(&l)); /* still the job's */
    OK(lease_give_back(&l));
    cli_expect(&f->cli, "gc %/run --age=0", ST_OK, "removed");
    shell(f, "cd run && test ! -e step-000000000400");
    /* a damaged metadata.pb: nobody knows what belongs to it */
    shell(f, "cd run/step-000000000300 && echo x >>metadata.pb && echo 8 >model-00009.00000000000000b2.h5");
    cli_expect(&f->cli, "gc %/run --age=0", ST_OK, "removed 0 objects");
    shell(f, "cd run/step-000000000300 && test $(ls | wc -l) = 4");
}

static void put_float(const struct fixture *f, const char *root, uint64_t offset, float v)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s/step-000000000100/model-00000.00000000000000a1.h5", f->cli.dir, root);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, &v, sizeof v, (off_t)offset), sizeof v);
    close(fd);
}

static void test_diff(void **state)
{
    struct fixture *f = *state;
    shell(f, "cp -r run copy");
    cli_expect(&f->cli, "diff %/run 100 %/copy 100", ST_OK, "steps 100 and 100: 5 tensors alike, 0 not");
    cli_expect(&f->cli, "diff %/run %/copy", ST_OK, "steps 300 and 300");
    cli_expect(&f->cli, "diff %/run@200 %/copy/step-000000000200", ST_OK, "steps 200 and 200");
    cli_expect(&f->cli, "diff %/run 100 %/copy 200", ST_INVALID, "differ");
    /* big is f32[3, 200001]: its second piece, elements 550000 on, begins at 2211840 (test_cli.c) */
    for (int i = 0; i < 2; i++) {
        put_float(f, i ? "copy" : "run", 4096, i ? 1.5f : 1);
        put_float(f, i ? "copy" : "run", 2211840 + 4 * 50002, i ? -3 : 5.25f);
    }
    cli_expect(&f->cli, "diff %/run 100 %/copy 100", ST_INVALID, "1 tensor differs");
    assert_non_null(strstr(f->cli.text, "differs  model/big.weight  2 of 600003 elements, max abs difference 8.25\n"));
    assert_non_null(strstr(f->cli.text, "4 tensors alike, 1 not"));
    put_float(f, "copy", 4096, NAN);
    cli_expect(&f->cli, "diff %/copy 100 %/run 100", ST_INVALID, "1 tensor differs");
    assert_non_null(strstr(f->cli.text, "max abs difference nan"));
    struct store *s;
    char root[80];
    snprintf(root, sizeof root, "%s/third", f->cli.dir);
    OK(store_open(root, true, &s));
    struct fake_step *x = fake_step_make(100, 0xa1, "bog.weight");
    OK(fake_step_put_files(s, x));
    OK(commit_put(s, &x->m));
    fake_step_free(x);
    store_close(s);
    cli_expect(&f->cli, "diff %/run 100 %/third", ST_INVALID, "2 tensors differ");
    assert_non_null(strstr(f->cli.text, "only in the first   model/big.weight\n"));
    assert_non_null(strstr(f->cli.text, "only in the second  model/bog.weight\n"));
    static const char *const wrong[] = { "diff", "diff %/run", "diff %/run 100", "diff %/run 100 %/copy 100 100",
                                         "diff %/run@100 200 %/copy" };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cli_expect(&f->cli, wrong[i], ST_INVALID, "");
    cli_expect(&f->cli, "diff %/run 100 %/copy 150", ST_NOT_FOUND, "150");
    cli_expect(&f->cli, "diff %/run 100 %/none 150", ST_NOT_FOUND, "none");
}

#define CASE(t) cmocka_unit_test_setup_teardown(t, each_setup, each_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { CASE(test_mark), CASE(test_rm), CASE(test_gc), CASE(test_gc_live),
                                        CASE(test_diff) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
