/* prepare and show: every generated row is worked out again here; GSM8K conversion on a source made up here;
 * complaints. */
#include "tests/support/test_root.h"
#include "trainer/data/dataset.h"
#include "trainer/data/prepare.h"
#include "trainer/data/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/trainer/json_rows.h"

enum { WORDS = 12, PATH_BYTES = 512 };

/* ---- a folder for a test, and a call with stdout kept ---- */

struct work {
    char dir[FOLDER_BYTES];
    char out[65536]; /* stdout of the last call */
};

static int setup(void **state)
{
    struct work *w = test_calloc(1, sizeof *w);
    folder_make(w->dir);
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    struct work *w = *state;
    folder_remove(w->dir);
    test_free(w);
    return 0;
}

/* Split `line` at blanks, '@' standing for the work folder, and call data_cli. */
static status *call(struct work *w, const char *line)
{
    char text[1024], *word[WORDS];
    size_t n = 0;
    int words = 0;
    for (const char *p = line; *p; p++)
        n += (size_t)snprintf(text + n, sizeof text - n, *p == '@' ? "%s" : "%.1s", *p == '@' ? w->dir : p);
    text[n] = 0;
    for (char *save, *p = strtok_r(text, " ", &save); p; p = strtok_r(NULL, " ", &save))
        word[words++] = p;
    FILE *to = tmpfile();
    fflush(stdout);
    int kept = dup(1);
    dup2(fileno(to), 1);
    status *st = data_cli(words, word);
    fflush(stdout);
    dup2(kept, 1);
    close(kept);
    rewind(to);
    w->out[fread(w->out, 1, sizeof w->out - 1, to)] = 0;
    fclose(to);
    return st;
}

static void good(struct work *w, const char *line)
{
    status *st = call(w, line);
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

static void bad(struct work *w, const char *line, enum status_code code, const char *part)
{
    status *st = call(w, line);
    assert_int_equal(status_code(st), code);
    if (!strstr(status_message(st), part))
        assert_string_equal(status_message(st), part);
    assert_null(strchr(status_message(st), '\n'));
    status_free(st);
}

static void path_of(const struct work *w, const char *name, char path[PATH_BYTES])
{
    snprintf(path, PATH_BYTES, "%s/%s", w->dir, name);
}

static bool exists(const struct work *w, const char *name)
{
    char path[PATH_BYTES];
    path_of(w, name, path);
    return access(path, F_OK) == 0;
}

static int entries(const struct work *w, const char *name)
{
    char path[PATH_BYTES];
    int n = 0;
    path_of(w, name, path);
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));)
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

static json_t *rows_of(const struct work *w, const char *name)
{
    char path[PATH_BYTES];
    path_of(w, name, path);
    return json_rows(path);
}

static void write_file(const struct work *w, const char *name, const char *text)
{
    char path[PATH_BYTES];
    path_of(w, name, path);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* ---- arithmetic ---- */

static long long compute(char op, long long a, long long b)
{
    return op == '*' ? a * b : op == '+' ? a + b : a - b;
}

/* Work the solution through: returns how many of its two steps are wrong by themselves, and its answer. */
static int faults(const char *prompt, const char *solution, long long *answer)
{
    long long a, b, c, r1, l2, c2, r2, a2, b2, end, n = 0;
    char op1, op2, o1, o2, tail[8];
    int used = 0;
    assert_int_equal(sscanf(prompt, "%lld%c%lld%c%lld%7s", &a, &op1, &b, &op2, &c, tail), 6);
    assert_string_equal(tail, "=?");
    assert_int_equal(prompt[strlen(prompt) - 1], '\n');
    assert_int_equal(sscanf(solution, "%lld%c%lld=%lld\n%lld%c%lld=%lld\nA: %lld%n", &a2, &o1, &b2, &r1, &l2, &o2, &c2,
                            &r2, &end, &used),
                     9);
    assert_int_equal((size_t)used, strlen(solution));
    assert_true(a2 == a && b2 == b && c2 == c && o1 == op1 && o2 == op2); /* the problem is copied right */
    assert_true(l2 == r1 && end == r2);                                   /* and carried on */
    assert_true(r1 >= 0 && r2 >= 0);
    n = (r1 != compute(op1, a, b)) + (r2 != compute(op2, l2, c));
    *answer = end;
    return (int)n;
}

static int by_text(const void *a, const void *b)
{
    const char *x, *y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return strcmp(x, y);
}

/* No prompt stands twice in the two lists. */
static void expect_distinct(const json_t *a, const json_t *b)
{
    size_t na = json_array_size(a), n = na + json_array_size(b);
    const char **all = test_calloc(n, sizeof *all);
    for (size_t i = 0; i < n; i++)
        all[i] = i < na ? row_text(a, i, "prompt") : row_text(b, i - na, "prompt");
    qsort(all, n, sizeof *all, by_text);
    for (size_t i = 1; i < n; i++)
        assert_true(strcmp(all[i - 1], all[i]) != 0);
    test_free(all);
}

static void check_arithmetic(struct work *w, size_t rows, size_t heldout, long long limit)
{
    json_t *sft = rows_of(w, "a/sft.jsonl"), *train = rows_of(w, "a/prefs_train.jsonl");
    json_t *held = rows_of(w, "a/prefs_heldout.jsonl");
    assert_int_equal(json_array_size(sft), rows);
    assert_int_equal(json_array_size(train), rows);
    assert_int_equal(json_array_size(held), heldout);
    expect_distinct(train, held);
    size_t op[3] = { 0 }, first = 0;
    for (size_t i = 0; i < rows + heldout; i++) {
        const json_t *from = i < heldout ? held : train;
        size_t at = i < heldout ? i : i - heldout;
        const char *prompt = row_text(from, at, "prompt"), *chosen = row_text(from, at, "chosen");
        long long right, wrong, a, b, c;
        char op1, op2;
        assert_int_equal(faults(prompt, chosen, &right), 0);
        assert_int_equal(faults(prompt, row_text(from, at, "rejected"), &wrong), 1);
        assert_true(right != wrong);
        assert_int_equal(json_integer_value(json_object_get(json_array_get(from, at), "problem")), i);
        sscanf(prompt, "%lld%c%lld%c%lld", &a, &op1, &b, &op2, &c);
        assert_true(a >= 1 && a < limit && b >= 1 && b < limit && c >= 1 && c < limit);
        assert_true(op1 != '*' || (b >= 2 && b <= 9));
        assert_true(op2 == '+' || op2 == '-');
        op[op1 == '+' ? 0 : op1 == '-' ? 1 : 2]++;
        /* which of the two steps went wrong */
        const char *rejected = row_text(from, at, "rejected");
        size_t line = (size_t)(strchr(chosen, '\n') - chosen) + 1;
        first += strncmp(chosen, rejected, line) != 0;
        if (i >= heldout) {
            assert_string_equal(row_text(sft, at, "prompt"), prompt);
            assert_string_equal(row_text(sft, at, "completion"), chosen);
        }
    }
    for (int k = 0; k < 3; k++)
        assert_true(op[k] >= (rows + heldout) / 3 && op[k] <= (rows + heldout + 2) / 3);
    if (rows > 500) /* each step goes wrong about half of the time */
        assert_true(first > rows / 3 && first < 2 * (rows + heldout) / 3);
    json_decref(sft);
    json_decref(train);
    json_decref(held);
}

static void test_arithmetic(void **state)
{
    struct work *w = *state;
    good(w, "prepare arithmetic @/a rows=1200 heldout=100");
    assert_non_null(strstr(w->out, "a/prefs_train.jsonl: 1200 pairs of 1200 problems"));
    assert_int_equal(entries(w, "a"), 3);
    check_arithmetic(w, 1200, 100, 100);
    struct dataset *d;
    char path[PATH_BYTES];
    path_of(w, "a/prefs_train.jsonl", path);
    assert_null(dataset_open(path, DATASET_PREFS, 64, &d));
    assert_int_equal(d->rows, 1200);
    assert_int_equal(d->dropped, 0);
    assert_true(d->longest < 64);
    for (uint64_t i = 0; i < 2 * d->rows; i++)
        assert_int_equal(d->token[d->seq[i].begin + d->seq[i].length - 1], TOKEN_EOS);
    dataset_close(d);
    good(w, "prepare arithmetic @/a rows=4000 heldout=400 seed=-3");
    check_arithmetic(w, 4000, 400, 100);
    good(w, "prepare arithmetic @/a rows=1 heldout=0 digits=6");
    check_arithmetic(w, 1, 0, 1000000);
    good(w, "prepare arithmetic @/a rows=300 heldout=7 digits=4 seed=5");
    check_arithmetic(w, 300, 7, 10000);
    good(w, "prepare arithmetic @/a rows=200 heldout=30 digits=1");
    check_arithmetic(w, 200, 30, 10);
}

/* digits=1 is small enough to count: the scarcest kind decides how many rows there can be. */
static void test_arithmetic_exhausted(void **state)
{
    struct work *w = *state;
    int valid[3] = { 0 };
    for (int kind = 0; kind < 3; kind++)
        for (int a = 1; a <= 9; a++)
            for (int b = kind == 2 ? 2 : 1; b <= 9; b++)
                for (int c = 1; c <= 9; c++)
                    for (int minus = 0; minus < 2; minus++) {
                        long long r = compute("+-*"[kind], a, b);
                        valid[kind] += r >= 0 && (minus ? r - c : r + c) >= 0;
                    }
    assert_true(valid[1] < valid[0] && valid[1] < valid[2]);
    int most = 3 * valid[1] + 1; /* plus, minus, times, ..., plus; then a minus is wanted */
    char line[128], part[64];
    snprintf(line, sizeof line, "prepare arithmetic @/a digits=1 heldout=10 rows=%d", most - 10);
    good(w, line);
    check_arithmetic(w, (size_t)most - 10, 10, 10);
    json_t *before = rows_of(w, "a/sft.jsonl");
    snprintf(line, sizeof line, "prepare arithmetic @/a digits=1 heldout=10 rows=%d", most - 9);
    snprintf(part, sizeof part, "no %d different problems of 1 digits, only %d", most + 1, most);
    bad(w, line, ST_INVALID, part);
    json_t *after = rows_of(w, "a/sft.jsonl"); /* what was there before is untouched, and nothing is left over */
    assert_true(json_equal(before, after));
    assert_int_equal(entries(w, "a"), 3);
    json_decref(before);
    json_decref(after);
}

static bool same_rows(const struct work *w, const char *a, const char *b)
{
    json_t *x = rows_of(w, a), *y = rows_of(w, b);
    bool same = json_equal(x, y);
    json_decref(x);
    json_decref(y);
    return same;
}

static void test_arithmetic_seeds(void **state)
{
    struct work *w = *state;
    good(w, "prepare arithmetic @/a rows=300 heldout=50");
    good(w, "prepare arithmetic @/b rows=300 heldout=50 seed=0 digits=2");
    good(w, "prepare arithmetic @/c rows=90 heldout=50");
    good(w, "prepare arithmetic @/d rows=300 heldout=50 seed=1");
    assert_true(same_rows(w, "a/sft.jsonl", "b/sft.jsonl"));
    assert_true(same_rows(w, "a/prefs_train.jsonl", "b/prefs_train.jsonl"));
    assert_true(same_rows(w, "a/prefs_heldout.jsonl", "b/prefs_heldout.jsonl"));
    assert_true(same_rows(w, "a/prefs_heldout.jsonl", "c/prefs_heldout.jsonl"));
    assert_false(same_rows(w, "a/prefs_heldout.jsonl", "d/prefs_heldout.jsonl"));
    assert_false(same_rows(w, "a/sft.jsonl", "d/sft.jsonl"));
}

/* ---- gsm8k ---- */

static void make_source(struct work *w)
{
    char path[PATH_BYTES];
    path_of(w, "src", path);
    mkdir(path, 0777);
    write_file(w, "src/train.jsonl",
               "{\"question\": \"Q1 \xe2\x80\x99?\", \"answer\": \"a = <<1+1=2>>2 and <<x>>y\\nso\\n#### 1,080\"}\n"
               "{\"question\": \"Q2\", \"answer\": \"#### -5\\n\"}\n"
               "{\"question\": \"Q3\", \"answer\": \"1 < 2 << 3\\nA<B>>C\\n#### no ####\"}\n"
               "{\"question\": \"Q4\", \"answer\": \"x\\n#### 1\\nnot last\"}\n"
               "{\"question\": \"Q5\", \"answer\": \"<<<1>>><<\"}\n");
    write_file(
        w, "src/example_model_solutions.jsonl",
        /* 0: two right, two wrong; a copy of a right one that only its annotation tells apart */
        "{\"question\": \"P0\", \"ground_truth\": \"g\", \"note\": {\"solution\": \"n\"}, \"other\": "
        "{\"is_correct\": 1},"
        "\"m1\": {\"is_correct\": true, \"solution\": \"r1 <<1>>\\nA: 1\"}, \"m2\": {\"is_correct\": false, "
        "\"solution\": \"w1\"},"
        "\"m3\": {\"is_correct\": true, \"solution\": \"r2\"}, \"m4\": {\"is_correct\": false, \"solution\": "
        "\"w2 <<3=\"},"
        "\"m5\": {\"is_correct\": true, \"solution\": \"r1 \\nA: 1\\n\"}}\n"
        /* 1: nothing wrong; 2: the only wrong one is also called right */
        "{\"question\": \"P1\", \"m\": {\"is_correct\": true, \"solution\": \"r\"}}\n"
        "{\"question\": \"P2\", \"a\": {\"is_correct\": true, \"solution\": \"t\"}, \"b\": {\"is_correct\": "
        "false, \"solution\": \"t\"},"
        " \"c\": {\"is_correct\": true, \"solution\": \"u\"}}\n"
        /* 3: one pair */
        "{\"question\": \"P3\", \"a\": {\"is_correct\": true, \"solution\": \"yes\"}, \"b\": {\"solution\": "
        "\"no\", \"is_correct\": false}}\n"
        /* 4: t and w are called right and wrong, so one pair is left */
        "{\"question\": \"P4\", \"a\": {\"is_correct\": true, \"solution\": \"t\"}, \"b\": {\"is_correct\": false, "
        "\"solution\": \"t\"},"
        "\"c\": {\"is_correct\": true, \"solution\": \"t\"}, \"d\": {\"is_correct\": true, \"solution\": \"u\"},"
        "\"e\": {\"is_correct\": false, \"solution\": \"v\"}, \"f\": {\"is_correct\": false, \"solution\": \"w\"},"
        "\"g\": {\"is_correct\": true, \"solution\": \"w\"}}\n");
}

static void test_gsm8k_texts(void **state)
{
    struct work *w = *state;
    make_source(w);
    good(w, "prepare gsm8k @/src @/deep/er/out heldout=0");
    assert_non_null(strstr(w->out, "sft.jsonl: 5 solutions"));
    assert_non_null(strstr(w->out, "prefs_train.jsonl: 6 pairs of 3 problems"));
    assert_non_null(strstr(w->out, "prefs_heldout.jsonl: 0 pairs of 0 problems"));
    assert_non_null(strstr(w->out, "no GSM8K score may be reported"));
    json_t *sft = rows_of(w, "deep/er/out/sft.jsonl");
    assert_string_equal(row_text(sft, 0, "prompt"), "Question: Q1 \xe2\x80\x99?\nAnswer:\n");
    assert_string_equal(row_text(sft, 0, "completion"), "a = 2 and y\nso\nA: 1,080");
    assert_string_equal(row_text(sft, 1, "completion"), "A: -5");
    assert_string_equal(row_text(sft, 2, "completion"), "1 < 2 \nA<B>>C\nA: no ####");
    assert_string_equal(row_text(sft, 3, "completion"), "x\n#### 1\nnot last");
    assert_string_equal(row_text(sft, 4, "completion"), ">");
    json_decref(sft);
    good(w, "prepare gsm8k @/src @/keep heldout=0 annotations=keep pairs=9");
    sft = rows_of(w, "keep/sft.jsonl");
    assert_string_equal(row_text(sft, 0, "completion"), "a = <<1+1=2>>2 and <<x>>y\nso\nA: 1,080");
    json_decref(sft);
    assert_non_null(strstr(w->out, "prefs_train.jsonl: 8 pairs of 3 problems"));
}

static void test_gsm8k_pairs(void **state)
{
    struct work *w = *state;
    make_source(w);
    good(w, "prepare gsm8k @/src @/out heldout=0");
    json_t *rows = rows_of(w, "out/prefs_train.jsonl");
    assert_int_equal(json_array_size(rows), 6);
    int seen[2][2] = { { 0 } };
    for (size_t i = 0; i < 4; i++) {
        const char *c = row_text(rows, i, "chosen"), *r = row_text(rows, i, "rejected");
        assert_string_equal(row_text(rows, i, "prompt"), "Question: P0\nAnswer:\n");
        assert_int_equal(json_integer_value(json_object_get(json_array_get(rows, i), "problem")), 0);
        int second = !strcmp(c, "r2"), wrong = !strcmp(r, "w2");
        assert_true(second || !strcmp(c, "r1 \nA: 1"));
        assert_true(wrong || !strcmp(r, "w1"));
        seen[second][wrong]++;
    }
    assert_true(seen[0][0] == 1 && seen[0][1] == 1 && seen[1][0] == 1 && seen[1][1] == 1);
    assert_string_equal(row_text(rows, 4, "chosen"), "yes");
    assert_string_equal(row_text(rows, 4, "rejected"), "no");
    assert_int_equal(json_integer_value(json_object_get(json_array_get(rows, 4), "problem")), 3);
    assert_string_equal(row_text(rows, 5, "chosen"), "u");
    assert_string_equal(row_text(rows, 5, "rejected"), "v");
    assert_int_equal(json_integer_value(json_object_get(json_array_get(rows, 5), "problem")), 4);
    json_t *few;
    for (int most = 1; most <= 5; most++) { /* fewer pairs are the first of the more */
        char line[96];
        snprintf(line, sizeof line, "prepare gsm8k @/src @/few heldout=0 pairs=%d", most);
        good(w, line);
        few = rows_of(w, "few/prefs_train.jsonl");
        assert_int_equal(json_array_size(few), (most < 4 ? most : 4) + 2);
        for (int i = 0; i < most && i < 4; i++)
            assert_true(json_equal(json_array_get(few, (size_t)i), json_array_get(rows, (size_t)i)));
        json_decref(few);
    }
    json_decref(rows);
}

/* n problems with a pair each, the last two with the same question, and as many without, which must not count. */
static void make_problems(struct work *w, int n)
{
    char *text = test_calloc((size_t)n, 240);
    size_t used = 0;
    for (int i = 0; i < n; i++) {
        used += (size_t)snprintf(text + used, 80,
                                 "{\"question\": \"N%d\", \"a\": {\"is_correct\": %s, \"solution\": \"y\"}}\n", i,
                                 i % 2 ? "true" : "false");
        used += (size_t)snprintf(text + used, 160,
                                 "{\"question\": \"P%d\", \"a\": {\"is_correct\": true, \"solution\": \"y\"}, "
                                 "\"b\": {\"is_correct\": false, \"solution\": \"n\"}}\n",
                                 i == n - 1 ? n - 2 : i);
    }
    write_file(w, "src/example_model_solutions.jsonl", text);
    test_free(text);
}

static void test_gsm8k_split(void **state)
{
    struct work *w = *state;
    static const struct {
        int n;
        const char *share;
        int want;
    } cases[] = { { 100, "0.2", 20 }, { 101, "0.2", 20 }, { 103, "0.2", 21 },
                  { 50, "1", 50 },    { 50, "0", 0 },     { 7, "0.5", 4 } };
    make_source(w);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char line[96];
        int n = cases[c].n, together = 0;
        make_problems(w, n);
        json_t *held[3];
        for (int seed = 0; seed < 3; seed++) {
            snprintf(line, sizeof line, "prepare gsm8k @/src @/out heldout=%s seed=%d", cases[c].share, seed);
            good(w, line);
            held[seed] = rows_of(w, "out/prefs_heldout.jsonl");
            json_t *train = rows_of(w, "out/prefs_train.jsonl");
            size_t h = json_array_size(held[seed]);
            int twice = 0;
            for (size_t i = 0; i < h; i++) {
                char last[64];
                snprintf(last, sizeof last, "Question: P%d\nAnswer:\n", n - 2);
                twice += !strcmp(row_text(held[seed], i, "prompt"), last);
            }
            /* the two equal questions are never parted, which may cost the one at the border */
            assert_true(twice == 0 || twice == 2);
            assert_true((int)h == cases[c].want || (int)h == cases[c].want - 1);
            together += (int)h == cases[c].want;
            assert_int_equal(h + json_array_size(train), n);
            json_decref(train);
        }
        assert_true(together > 0);
        if (n >= 100) {
            assert_false(json_equal(held[0], held[1]));
            assert_false(json_equal(held[1], held[2]));
        }
        for (int seed = 0; seed < 3; seed++)
            json_decref(held[seed]);
    }
}

static void test_gsm8k_bad(void **state)
{
    struct work *w = *state;
    bad(w, "prepare gsm8k @/nowhere @/out", ST_NOT_FOUND, "/nowhere/train.jsonl: cannot open");
    assert_int_equal(entries(w, "out"), 0);
    make_source(w);
    write_file(w, "src/train.jsonl",
               "{\"question\": \"q\", \"answer\": \"a\"}\n{\"question\": \"q\", \"answer\": 7}\n");
    bad(w, "prepare gsm8k @/src @/out", ST_INVALID,
        "/src/train.jsonl:2: key \"answer\" must be a string, not a number");
    assert_int_equal(entries(w, "out"), 0);
    write_file(w, "src/train.jsonl", "{\"question\": \"q\", \"answer\": \"a\"}\n");
    write_file(w, "src/example_model_solutions.jsonl",
               "{\"question\": \"q\", \"m\": {\"is_correct\": \"yes\", \"solution\": \"\"}}\n");
    bad(w, "prepare gsm8k @/src @/out", ST_INVALID, ":1: key \"is_correct\" of \"m\" must be true or false");
    write_file(w, "src/example_model_solutions.jsonl",
               "{\"question\": \"q\", \"m\": {\"is_correct\": true, \"solution\": null}}\n");
    bad(w, "prepare gsm8k @/src @/out", ST_INVALID, ":1: key \"solution\" must be a string, not null");
    assert_int_equal(entries(w, "out"), 0);
}

/* ---- show ---- */

static void test_show(void **state)
{
    struct work *w = *state;
    write_file(w, "p.jsonl",
               "{\"prompt\": \"one\\ntwo\\n\", \"chosen\": \"yes\\n\\u001b[1m\", \"rejected\": \"\"}\n"
               "{\"prompt\": \"x\", \"chosen\": \"y\", \"rejected\": \"y\"}\n"
               "{\"prompt\": \"x\", \"chosen\": \"y\", \"rejected\": \"zz\"}\n");
    good(w, "show @/p.jsonl 1");
    char want[1024];
    snprintf(want, sizeof want,
             "row 0: chosen 18 tokens (9 scored), rejected 10 tokens (1 scored)\n"
             "  prompt     | one\n"
             "             | two\n"
             "  chosen     | yes\n"
             "             | \\x1b[1m[EOS]\n"
             "  rejected   | [EOS]\n"
             "\n"
             "%s/p.jsonl: 2 preference rows, 1 dropped (chosen and rejected equal); 37 tokens, 15 scored; a sequence "
             "has 9.2 "
             "tokens in the mean, the longest 18\n",
             w->dir);
    assert_string_equal(w->out, want);
    good(w, "show @/p.jsonl");
    assert_non_null(strstr(w->out, "row 1: chosen 4 tokens (2 scored), rejected 5 tokens (3 scored)\n"));
    assert_null(strstr(w->out, "row 2"));
    good(w, "show @/p.jsonl 0");
    assert_null(strstr(w->out, "row"
                               " 0"));
    write_file(w, "m.jsonl",
               "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": "
               "\"yo\"}, {\"role\": \"user\", \"content\": \"so\"}]}\n");
    good(w, "show @/m.jsonl");
    assert_ptr_equal(strstr(w->out, "row 0: 34 tokens (4 scored)\n"
                                    "  prompt     | user: hi\n"
                                    "             | assistant: \n"
                                    "  completion | yo[EOS]\n"
                                    "  prompt     | user: so\n"
                                    "\n"),
                     w->out);
    assert_non_null(strstr(w->out, "1 SFT rows"));
}

/* ---- complaints ---- */

static void test_complaints(void **state)
{
    struct work *w = *state;
    bad(w, "", ST_INVALID, "what shall be done? (legal: prepare gsm8k");
    bad(w, "prepaer", ST_INVALID, "\"prepaer\" is no verb (legal: prepare, show, help)");
    bad(w, "prepare", ST_INVALID, "which data? (legal: prepare gsm8k");
    bad(w, "prepare mnist @/x", ST_INVALID, "\"mnist\" is no data we know (legal: gsm8k, arithmetic, sort)");
    bad(w, "prepare gsm8k @/x", ST_INVALID, "two folders are needed");
    bad(w, "prepare arithmetic", ST_INVALID, "a folder is needed");
    bad(w, "prepare arithmetic @/x row=3", ST_INVALID,
        "row: unknown key; did you mean \"rows\"? (legal: rows, heldout, digits, seed)");
    bad(w, "prepare arithmetic @/x rows", ST_INVALID, "\"rows\" is not of the form key=value");
    bad(w, "prepare arithmetic @/x rows=0", ST_INVALID, "rows: \"0\" is out of range (legal: 1 to 1e7)");
    bad(w, "prepare arithmetic @/x digits=7", ST_INVALID, "digits: \"7\" is out of range (legal: 1 to 6)");
    bad(w, "prepare gsm8k @/x @/y annotations=kept", ST_INVALID, "(legal: strip, keep)");
    assert_false(exists(w, "x")); /* a bad word makes no folder */
    bad(w, "show", ST_INVALID, "a file is needed");
    bad(w, "show a b c", ST_INVALID, "a file is needed");
    bad(w, "show @/none.jsonl", ST_NOT_FOUND, "/none.jsonl: cannot open");
    write_file(w, "p.jsonl", "{\"prompt\": \"x\", \"completion\": \"y\"}\n");
    write_file(w, "e.jsonl", "");
    bad(w, "show @/p.jsonl -1", ST_INVALID, "N: \"-1\" is out of range");
    bad(w, "show @/p.jsonl two", ST_INVALID, "N: \"two\" is not an integer");
    bad(w, "show @/e.jsonl", ST_INVALID, "the file has no rows");
    /* paths that cannot be written: below a file, and a folder in a file's place */
    bad(w, "prepare arithmetic @/p.jsonl/x", ST_NOT_FOUND, "/p.jsonl/x: cannot make the folder");
    bad(w, "prepare arithmetic @/p.jsonl", ST_NOT_FOUND, "/p.jsonl/sft.jsonl: cannot create");
    good(w, "prepare arithmetic @/x rows=5 heldout=1");
    char path[PATH_BYTES];
    path_of(w, "x/sft.jsonl", path);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0777), 0);
    bad(w, "prepare arithmetic @/x rows=5 heldout=1", ST_IO, "cannot rename");
    assert_int_equal(entries(w, "x"), 3);
    good(w, "help");
    assert_non_null(strstr(w->out, "annotations"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_arithmetic, setup, teardown),
        cmocka_unit_test_setup_teardown(test_arithmetic_exhausted, setup, teardown),
        cmocka_unit_test_setup_teardown(test_arithmetic_seeds, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gsm8k_texts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gsm8k_pairs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gsm8k_split, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gsm8k_bad, setup, teardown),
        cmocka_unit_test_setup_teardown(test_show, setup, teardown),
        cmocka_unit_test_setup_teardown(test_complaints, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
