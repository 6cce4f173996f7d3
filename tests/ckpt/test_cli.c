/* `tessera ckpt`: what it prints and returns. Its JSON is read by Python's parser, which shares no code with the
 * printer. */
#include "ckpt/ckpt.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/cli_run.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

/* A tensor's name that every printer must take care of: a quote, a backslash, control characters, UTF-8 good and bad.
 */
#define HARD_NAME "a\"b\\c\n\t\x01\x7f\xc3\xa9\xff\xe2\x82 z"
#define HARD_JSON "a\\\"b\\\\c\\u000a\\u0009\\u0001\\u007f\xc3\xa9\\ufffd\\ufffd\\ufffd z"

static void setup(struct cli *f)
{
    struct store *s;
    cli_open(f);
    char root[80];
    snprintf(root, sizeof root, "%s/run", f->dir);
    assert_null(store_open(root, true, &s));
    for (uint64_t step = 100; step <= 300; step += 100) {
        struct fake_step *x = fake_step_make(step, 0xa1, step == 200 ? HARD_NAME : "big");
        assert_null(fake_step_put_files(s, x));
        assert_null(commit_put(s, &x->m));
        fake_step_free(x);
    }
    store_close(s);
}

/* The last output as `d` in Python; `check` must hold. */
static void expect_json(const struct cli *f, const char *check)
{
    char command[1024];
    snprintf(command, sizeof command,
             "python3 -c 'import json\nd = json.load(open(\"%s\", encoding=\"utf-8\"))\nassert %s, d'", f->out, check);
    if (system(command) != 0)
        fail_msg("%s does not hold of %s", check, f->text);
}

static void test_usage(void **state)
{
    struct cli *f = *state;
    static const char *const wrong[] = { "", "lst", "list %/run", "-x", "--json" };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cli_expect(f, wrong[i], ST_INVALID, "ls, show, verify");
        assert_null(strchr(f->message, '\n')); /* one clear line */
        assert_string_equal(f->text, "");
    }
    static const char *const wrong_arguments[] = { "ls",
                                                   "ls --json",
                                                   "verify %/run --json",
                                                   "show %/run --jsn",
                                                   "show %/run 100 200",
                                                   "verify %/run abc",
                                                   "verify %/run 1x",
                                                   "verify %/run -1",
                                                   "verify %/run 99999999999999999999",
                                                   "show %/run/step-000000000100 200",
                                                   "show s3x://nowhere/x" };
    for (size_t i = 0; i < sizeof wrong_arguments / sizeof *wrong_arguments; i++)
        cli_expect(f, wrong_arguments[i], ST_INVALID, "");
    cli_expect(f, "verify %/run --json", ST_INVALID, "URL [STEP]");
    cli_expect(f, "ls %/nothing", ST_NOT_FOUND, "nothing");
    cli_expect(f, "--help", ST_OK, "verify");
    cli_expect(f, "ls --help", ST_OK, "usage: tessera ckpt ls");
    assert_int_equal(access(f->out, F_OK), 0);
    char path[96];
    snprintf(path, sizeof path, "%s/nothing", f->dir);
    assert_int_not_equal(access(path, F_OK), 0); /* looking makes nothing */
}

static void test_ls(void **state)
{
    struct cli *f = *state;
    cli_expect(f, "ls %/run", ST_OK, "100");
    assert_non_null(strstr(f->text, "STEP"));
    assert_non_null(strstr(f->text, "00000000000000a1"));
    assert_non_null(strstr(f->text, "extra,model,policy/optim,rng"));
    assert_null(strstr(f->text, "DAMAGED"));
    cli_expect(f, "ls %/run --json", ST_OK, "");
    expect_json(f, "[s[\"step\"] for s in d] == [100, 200, 300]");
    expect_json(
        f, "all(s[\"tensors\"] == 5 and s[\"files\"] == 2 and s[\"blobs\"] == 2 and s[\"damage\"] is None for s in d)");
    expect_json(f, "d[0][\"parts\"] == [\"extra\", \"model\", \"policy/optim\", \"rng\"] and d[0][\"attempt\"] == "
                   "\"00000000000000a1\"");
    expect_json(f, "d[0][\"run\"] == \"000000000000004d\" and d[0][\"parent\"] == \"0000000000000005\" and "
                   "d[0][\"time_ns\"] == 1700000000000000000");
    char path[256];
    snprintf(path, sizeof path, "rm %s/run/step-000000000200/model-*", f->dir);
    assert_int_equal(system(path), 0);
    cli_expect(f, "ls %/run", ST_OK, "DAMAGED: step 200: file model-00000.00000000000000a1.h5 is missing");
    assert_non_null(strstr(f->text, "         300  "));
    cli_expect(f, "--json ls %/run", ST_INVALID, "");
    cli_expect(f, "ls --json %/run", ST_OK, "");
    expect_json(f, "\"missing\" in d[1][\"damage\"] and d[1][\"step\"] == 200 and d[2][\"damage\"] is None");
    snprintf(path, sizeof path, "rm -r %s/run/step-*", f->dir);
    assert_int_equal(system(path), 0);
    cli_expect(f, "ls %/run", ST_OK, "no committed step");
    cli_expect(f, "ls %/run --json", ST_OK, "");
    expect_json(f, "d == []");
    cli_expect(f, "show %/run", ST_NOT_FOUND, "no committed step");
    cli_expect(f, "verify %/run", ST_NOT_FOUND, "no committed step");
}

static void test_show(void **state)
{
    struct cli *f = *state;
    cli_expect(f, "show %/run", ST_OK, "step 300");
    assert_non_null(strstr(f->text, "model big  f32[3,200001]  2400012 bytes in 2 pieces\n"));
    assert_non_null(strstr(f->text, "model norm  u8[5]  5 bytes in 1 piece\n"));
    assert_non_null(strstr(f->text, "model tied  u8[5]  alias of norm  frozen\n"));
    assert_non_null(strstr(f->text, "policy/optim t  f64[]  8 bytes in 1 piece\n"));
    assert_non_null(strstr(f->text, "rng state  of rank 1  3 bytes"));
    cli_expect(f, "show %/run 100", ST_OK, "step 100");
    cli_expect(f, "show file:%/run/step-000000000100", ST_OK, "step 100");
    cli_expect(f, "show %/run/step-000000000100/", ST_OK, "step 100");
    cli_expect(f, "show %/run/step-000000000100 100", ST_OK, "step 100");
    cli_expect(f, "show %/run 150", ST_NOT_FOUND, "from 100 to 300");
    cli_expect(f, "show %/run 200", ST_OK,
               "model a\"b\\c????\xc3\xa9??? z  f32"); /* no control character reaches a terminal */
}

static void test_show_json(void **state)
{
    struct cli *f = *state;
    cli_expect(f, "show %/run 200 --json", ST_OK, HARD_JSON);
    expect_json(f, "d[\"step\"] == 200 and d[\"world\"] == 2 and d[\"mesh\"] == dict(pp=1, dp=2, ep=1, cp=1, tp=1) and "
                   "d[\"build\"] == \"v0 \\\"test\\\"\"");
    expect_json(f, "[t[\"name\"] for t in d[\"tensors\"]][1:] == [\"norm\", \"tied\", \"a.empty\", \"t\"]");
    expect_json(f, "[t[\"shape\"] for t in d[\"tensors\"]] == [[3, 200001], [5], [5], [0], []]");
    expect_json(f, "[t[\"dtype\"] for t in d[\"tensors\"]] == [\"f32\", \"u8\", \"u8\", \"f32\", \"f64\"]");
    expect_json(f, "[t[\"trainable\"] for t in d[\"tensors\"]] == [True, True, False, True, True]");
    expect_json(f, "[t[\"alias_of\"] for t in d[\"tensors\"]] == [None, None, \"norm\", None, None]");
    expect_json(f, "[p[\"run\"] for p in d[\"tensors\"][0][\"pieces\"]] == [[0, 550000], [550000, 600003]]");
    expect_json(f, "d[\"tensors\"][0][\"pieces\"][0] == dict(file=0, offset=4096, bytes=2200000, box_offset=[0, 0], "
                   "box_length=[3, 200001], run=[0, 550000])");
    expect_json(f,
                "d[\"tensors\"][0][\"pieces\"][1][\"offset\"] == 2211840 and d[\"tensors\"][0][\"bytes\"] == 2400012");
    expect_json(f, "d[\"files\"][1][\"bytes\"] == 4096 + 8 + 50 and d[\"files\"][1][\"header_bytes\"] == 3000");
    expect_json(f, "d[\"bytes\"] == sum(x[\"bytes\"] for x in d[\"files\"])");
    expect_json(f, "d[\"blobs\"] == [dict(part=\"extra\", name=\"config\", rank=-1, bytes=5), dict(part=\"rng\", "
                   "name=\"state\", rank=1, bytes=3)]");
}

static void flip(const struct cli *f, const char *file, off_t at)
{
    char path[160];
    unsigned char byte;
    snprintf(path, sizeof path, "%s/run/%s", f->dir, file);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

static int count_lines(const char *text)
{
    int n = 0;
    for (; *text; text++)
        n += *text == '\n';
    return n;
}

static void test_verify(void **state)
{
    struct cli *f = *state;
    cli_expect(f, "verify %/run", ST_OK, "verified 3 steps, 6 files, 15 tensors");
    assert_non_null(strstr(f->text, "no damage"));
    assert_int_equal(count_lines(f->text), 1);
    cli_expect(f, "verify %/run 200", ST_OK, "verified 1 step, 2 files, 5 tensors");
    flip(f, "step-000000000200/policy.optim-00000.00000000000000a1.h5", 4096);
    flip(f, "step-000000000200/model-00000.00000000000000a1.h5", 0);
    flip(f, "step-000000000300/model-00000.00000000000000a1.h5", 3500);
    cli_expect(f, "verify %/run", ST_CORRUPT, "3 damages in 2 steps");
    assert_int_equal(count_lines(f->text), 4); /* three damages and the summary */
    assert_non_null(strstr(f->text, "step 200: policy.optim-00000.00000000000000a1.h5: tensor policy/optim/t: "));
    assert_non_null(strstr(f->text, "step 200: model-00000.00000000000000a1.h5: header: "));
    assert_non_null(strstr(f->text, "step 300: model-00000.00000000000000a1.h5: padding: byte at offset 3500"));
    cli_expect(f, "verify %/run 100", ST_OK, "no damage");
    cli_expect(f, "verify %/run/step-000000000300", ST_CORRUPT, "1 damage in 1 step");
    cli_expect(f, "verify %/run 400", ST_NOT_FOUND, "step 400");
    flip(f, "step-000000000100/metadata.pb", 40);
    cli_expect(f, "verify %/run 100", ST_CORRUPT, "1 damage");
    assert_non_null(strstr(f->text, "step 100: metadata.pb: "));
}

/* Relative URLs, whole and cut at the step. */
static void test_relative(void **state)
{
    struct cli *f = *state;
    char *here = getcwd(NULL, 0), root[80];
    snprintf(root, sizeof root, "%s/run", f->dir);
    assert_int_equal(chdir(root), 0);
    cli_expect(f, "show step-000000000100", ST_OK, "step 100");
    cli_expect(f, "show file:step-000000000100", ST_OK, "step 100");
    cli_expect(f, "show ./step-000000000100", ST_OK, "step 100");
    cli_expect(f, "show .", ST_OK, "step 300");
    assert_int_equal(chdir(here), 0);
    free(here);
}

static void test_full_stdout(void **state)
{
    struct cli *f = *state;
    char url[96], verb[] = "show", json[] = "--json", *argv[] = { verb, url, json, NULL };
    snprintf(url, sizeof url, "%s/run", f->dir);
    fflush(stdout);
    int keep = dup(1), fd = open("/dev/full", O_WRONLY);
    dup2(fd, 1);
    close(fd);
    status *st = ckpt_cli(3, argv);
    dup2(keep, 1);
    close(keep);
    clearerr(stdout);
    assert_int_equal(status_code(st), ST_NO_SPACE);
    assert_non_null(strstr(status_message(st), "standard output"));
    status_free(st);
}

static int each_setup(void **state)
{
    struct cli *f = mem_calloc(1, sizeof *f);
    setup(f);
    *state = f;
    return 0;
}

static int each_teardown(void **state)
{
    cli_close(*state);
    mem_free(*state);
    return 0;
}

#define CASE(t) cmocka_unit_test_setup_teardown(t, each_setup, each_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_usage),  CASE(test_ls),       CASE(test_show),        CASE(test_show_json),
        CASE(test_verify), CASE(test_relative), CASE(test_full_stdout),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
