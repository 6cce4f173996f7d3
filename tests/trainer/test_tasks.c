/* Tasks end to end: every row that `data prepare sort` makes is worked out again here; task files are read and refused;
 * the accuracy that training jobs report, on any number of ranks, is that of plain greedy decoding written here. */
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/test_root.h"
#include "trainer/data/prepare.h"
#include "trainer/data/tasks.h"
#include "trainer/data/tokenizer.h"
#include "trainer/trainer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/trainer/json_rows.h"

enum { PATH_BYTES = 256, WORDS = 8 };

static char root[FOLDER_BYTES];

static void must(status *st)
{
    if (st)
        fail_msg("%s (%s:%d)", status_message(st), status_file(st), status_line(st));
}

static void refused(status *st, const char *part)
{
    assert_int_equal(status_code(st), ST_INVALID);
    if (!strstr(status_message(st), part))
        assert_string_equal(status_message(st), part);
    status_free(st);
}

/* `tessera data prepare sort ROOT/dir words` */
static status *prepare(const char *dir, const char *words)
{
    char path[PATH_BYTES], text[PATH_BYTES], *argv[WORDS] = { "prepare", "sort", path };
    int argc = 3;
    snprintf(path, sizeof path, "%s/%s", root, dir);
    snprintf(text, sizeof text, "%s", words);
    for (char *save, *p = strtok_r(text, " ", &save); p; p = strtok_r(NULL, " ", &save))
        argv[argc++] = p;
    fflush(stdout);
    return data_cli(argc, argv);
}

static json_t *rows_of(const char *dir, const char *name)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s/%s", root, dir, name);
    return json_rows(path);
}

/* ---- sort ---- */

static int by_byte(const void *a, const void *b)
{
    return *(const char *)a - *(const char *)b;
}

/* One digit of `rejected` is another one; which (and, at *by, by how much it moved, 1 to 9). */
static size_t replaced(const char *chosen, const char *rejected, int *by)
{
    size_t n = strlen(chosen), where = n;
    assert_int_equal(strlen(rejected), n);
    for (size_t i = 0; i < n; i++) {
        assert_true(rejected[i] >= '0' && rejected[i] <= '9');
        if (chosen[i] == rejected[i])
            continue;
        assert_int_equal(where, n);
        where = i;
        *by = (rejected[i] - chosen[i] + 10) % 10;
    }
    assert_true(where < n);
    return where;
}

static void check_sorted(const char *prompt, const char *answer, size_t digits)
{
    char want[16];
    assert_int_equal(strlen(prompt), digits + 1);
    assert_int_equal(prompt[digits], '=');
    assert_int_equal(strspn(prompt, "0123456789"), digits);
    snprintf(want, sizeof want, "%.*s", (int)digits, prompt);
    qsort(want, digits, 1, by_byte);
    assert_string_equal(answer, want);
}

static void add_once(json_t *seen, const char *prompt)
{
    assert_null(json_object_get(seen, prompt));
    json_object_set_new(seen, prompt, json_true());
}

/* Pairs and what goes with them row by row: completions of sft.jsonl or answers of tasks.jsonl. */
static void check_pairs(const char *dir, const char *pairs, const char *other, const char *key, size_t rows,
                        size_t digits, json_t *seen)
{
    json_t *p = rows_of(dir, pairs), *o = rows_of(dir, other);
    size_t where[9] = { 0 }, off[10] = { 0 };
    assert_int_equal(json_array_size(p), rows);
    assert_int_equal(json_array_size(o), rows);
    for (size_t i = 0; i < rows; i++) {
        int by = 0;
        check_sorted(row_text(p, i, "prompt"), row_text(p, i, "chosen"), digits);
        where[replaced(row_text(p, i, "chosen"), row_text(p, i, "rejected"), &by)]++;
        off[by]++;
        assert_string_equal(row_text(p, i, "prompt"), row_text(o, i, "prompt"));
        assert_string_equal(row_text(p, i, "chosen"), row_text(o, i, key));
        add_once(seen, row_text(p, i, "prompt"));
    }
    for (size_t d = 0; rows >= 300 && d < digits; d++) /* no place and no digit is left out or preferred */
        assert_true(where[d] * digits > rows / 2 && where[d] * digits < 2 * rows);
    for (size_t d = 1; rows >= 300 && d < 10; d++)
        assert_true(off[d] * 9 > rows / 3 && off[d] * 9 < 2 * rows);
    json_decref(p);
    json_decref(o);
}

static void check_sort(const char *dir, size_t rows, size_t heldout, size_t digits)
{
    json_t *seen = json_object(); /* so the files are disjoint, too */
    check_pairs(dir, "prefs_train.jsonl", "sft.jsonl", "completion", rows, digits, seen);
    check_pairs(dir, "prefs_heldout.jsonl", "tasks.jsonl", "answer", heldout, digits, seen);
    json_decref(seen);
}

static void sort_rows(void **state)
{
    (void)state;
    must(prepare("a", "rows=700 heldout=60 digits=3"));
    check_sort("a", 700, 60, 3);
    must(prepare("a", "rows=600 heldout=300"));
    check_sort("a", 600, 300, 5);
    must(prepare("a", "rows=300 heldout=30 digits=9 seed=-4"));
    check_sort("a", 300, 30, 9);
    must(prepare("a", "rows=40 heldout=0 digits=2 seed=9"));
    check_sort("a", 40, 0, 2);
    must(prepare("a", "rows=3 heldout=0 digits=1"));
    check_sort("a", 3, 0, 1);
}

/* Whether a prompt is held out is the prompt's own: between any two calls nothing leaks. */
static void sort_split(void **state)
{
    (void)state;
    must(prepare("a", "rows=850 heldout=60 digits=3"));
    must(prepare("b", "rows=850 heldout=60 digits=3 seed=1"));
    json_t *train = rows_of("a", "sft.jsonl"), *tasks = rows_of("b", "tasks.jsonl"), *other = rows_of("b", "sft.jsonl"),
           *seen = json_object();
    for (size_t i = 0; i < 850; i++)
        add_once(seen, row_text(train, i, "prompt"));
    for (size_t i = 0; i < 60; i++)
        assert_null(json_object_get(seen, row_text(tasks, i, "prompt")));
    size_t same = 0, known = 0;
    for (size_t i = 0; i < 850; i++) {
        same += !strcmp(row_text(train, i, "prompt"), row_text(other, i, "prompt"));
        known += json_object_get(seen, row_text(other, i, "prompt")) != NULL;
    }
    assert_true(same < 50);   /* another order */
    assert_true(known > 700); /* of almost the same prompts */
    json_decref(train);
    json_decref(tasks);
    json_decref(other);
    json_decref(seen);
}

/* Two files of which one is to be the other's beginning. */
static void check_begins(const char *shorter, const char *longer, const char *name)
{
    json_t *s = rows_of(shorter, name), *l = rows_of(longer, name);
    for (size_t i = 0; i < json_array_size(s); i++)
        assert_true(json_equal(json_array_get(s, i), json_array_get(l, i)));
    json_decref(s);
    json_decref(l);
}

static void sort_sizes(void **state)
{
    (void)state;
    must(prepare("a", "rows=100 heldout=20 seed=6"));
    must(prepare("b", "rows=400 heldout=30 seed=6 digits=5"));
    check_begins("a", "b", "sft.jsonl");
    check_begins("a", "b", "prefs_train.jsonl");
    check_begins("a", "b", "prefs_heldout.jsonl");
    check_begins("a", "b", "tasks.jsonl");
    refused(prepare("c", "rows=98 heldout=3 digits=2"), "2 digits make no 98 prompts for training and 3 to hold out");
    refused(prepare("c", "rows=1 heldout=40 digits=2"), "2 digits make no 1 prompts for training and 40 to hold out");
    char words[64]; /* all of two digits: the most of either that there is */
    int most[2] = { 0 };
    for (int n = 100; !most[0] && n > 0; n--) {
        snprintf(words, sizeof words, "rows=%d heldout=0 digits=2", n);
        status *st = prepare("c", words);
        most[0] = st ? 0 : n;
        status_free(st);
    }
    snprintf(words, sizeof words, "rows=%d heldout=%d digits=2", most[0], 100 - most[0]);
    must(prepare("c", words));
    check_sort("c", (size_t)most[0], (size_t)(100 - most[0]), 2);
    assert_true(most[0] > 75 && most[0] < 99); /* one in ten is held out */
    refused(prepare("c", "digits=10"), "digits: \"10\" is out of range (legal: 1 to 9)");
    refused(prepare("c", "count=10"), "unknown key");
}

/* ---- task files ---- */

static status *open_text(const char *text, uint32_t max_length, struct tasks **out)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/t.jsonl", root);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    return tasks_open(path, max_length, out);
}

static void task_files(void **state)
{
    (void)state;
    struct tasks *t;
    must(open_text("{\"prompt\": \"ab\", \"answer\": \"xyz\", \"more\": 3}\n\n{\"answer\": \"\", \"prompt\": \"\"}\n",
                   7, &t));
    const int32_t first[] = { TOKEN_BOS, 'a', 'b', 'x', 'y', 'z', TOKEN_EOS }, second[] = { TOKEN_BOS, TOKEN_EOS };
    assert_int_equal(t->rows, 2);
    assert_int_equal(t->longest_prompt, 3);
    assert_int_equal(t->longest_answer, 4);
    assert_memory_equal(t->token + t->task[0].begin, first, sizeof first);
    assert_memory_equal(t->token + t->task[1].begin, second, sizeof second);
    assert_int_equal(t->task[0].prompt, 3);
    assert_int_equal(t->task[0].answer, 4);
    assert_int_equal(t->task[1].prompt, 1);
    assert_int_equal(t->task[1].answer, 1);
    const int32_t end[] = { TOKEN_EOS }, wrong[] = { 'x', 'y', 'y', TOKEN_EOS }, on[] = { 'x', 'y', 'z', 'z' };
    assert_true(tasks_solved(t, 0, first + 3, 4));
    assert_false(tasks_solved(t, 0, first + 3, 3)); /* it did not end */
    assert_false(tasks_solved(t, 0, wrong, 4));
    assert_false(tasks_solved(t, 0, on, 4));
    assert_false(tasks_solved(t, 0, end, 1));
    assert_true(tasks_solved(t, 1, end, 1));
    assert_false(tasks_solved(t, 1, first + 3, 4));
    tasks_close(t);
    tasks_close(NULL);
    refused(open_text("{\"prompt\": \"ab\", \"answer\": \"xyz\"}\n", 6, &t), "t.jsonl:1: a task of 7 tokens");
    refused(open_text("{\"prompt\": \"ab\", \"answer\": \"\"}\n{\"prompt\": \"ab\"}\n", 9, &t),
            "t.jsonl:2: key \"answer\" is missing");
    refused(open_text("{\"prompt\": 4, \"answer\": \"\"}\n", 9, &t), "key \"prompt\" must be a string");
    refused(open_text("\n", 9, &t), "the file has no tasks");
    refused(open_text("[]\n", 9, &t), "t.jsonl:1: a line must be a JSON object");
    status *st = tasks_open("no/such.jsonl", 9, &t);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    status_free(st);
}

/* ---- the evaluation of a training job ---- */

struct job {
    const char *tasks, *run;
    int64_t solved; /* by plain decoding with the final weights, on rank 0 */
};

/* The most likely token behind n tokens: a whole pass without a cache, the last row's logits in double. */
static int32_t plain_next(struct trainer *t, const int32_t *token, int32_t n)
{
    int32_t position[32], offset[2] = { 0, n }, best = 0;
    double most = 0;
    for (int32_t i = 0; i < n; i++)
        position[i] = i;
    struct model_input in = { .tokens = n, .token = token, .seg = { 1, offset, position } };
    tape_begin(t->tape, TAPE_FORWARD);
    struct tensor *h = t->model->ops->forward(t->model, t->tape, &in), *w = t->model->ops->head(t->model);
    must(tape_end(t->tape));
    int64_t c = h->dim[1];
    for (int32_t v = 0; v < w->dim[0]; v++) {
        double logit = 0;
        for (int64_t k = 0; k < c; k++)
            logit += (double)((const float *)h->data)[(n - 1) * c + k] * (double)((const float *)w->data)[v * c + k];
        if (v == 0 || logit > most) {
            most = logit;
            best = v;
        }
    }
    return best;
}

static int64_t plain_solved(struct trainer *t, const char *file)
{
    json_t *rows = rows_of("d", file);
    int64_t solved = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const char *prompt = row_text(rows, i, "prompt"), *answer = row_text(rows, i, "answer");
        int32_t token[32] = { TOKEN_BOS }, n = 1;
        for (; *prompt; prompt++)
            token[n++] = (unsigned char)*prompt;
        bool right = true;
        for (size_t k = 0; right && k <= strlen(answer); k++) {
            token[n] = plain_next(t, token, n);
            right = token[n++] == (k < strlen(answer) ? (unsigned char)answer[k] : TOKEN_EOS);
        }
        solved += right;
    }
    json_decref(rows);
    return solved;
}

static const char config[] =
    "comm: self\nthreads: 1\nrun: {name: t, dir: %s/%s, seed: 3}\n"
    "model: {kind: llama, layers: 1, hidden: 32, heads: 2, ffn: 64}\n"
    "data: {sft: %s/d/sft.jsonl, prefs: %s/d/prefs_train.jsonl, tasks: %s/d/%s, max_length: 32}\n"
    "algo: {kind: dpo, warmup_sft_steps: 50, warmup_sft_lr: 1e-2, beta: 0.5, nll_alpha: 1}\n"
    "train: {steps: 75, global_batch: 32, micro_batch: 4, eval_every: 25, log_every: 1000}\n"
    "optim: {lr: 3e-3, schedule: constant, warmup_steps: 0}\n"
    "checkpoint: {url: 'file:%s/%s/ckpt', every: 25, keep_last: 1, keep_best: 1, keep_metric: eval/task/accuracy, "
    "chunk_bytes: 1MiB, on_error: stop}\n";

static status *run_rank(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct log log = { LOG_WARN, world->rank };
    struct config *cfg = NULL;
    char text[2048];
    snprintf(text, sizeof text, config, root, j->run, root, root, root, j->tasks, root, j->run);
    TRY(config_parse(text, strlen(text), "job", 0, NULL, &cfg));
    struct trainer *t = NULL;
    status *st = trainer_open(cfg, world, &log, &t);
    if (!st)
        st = trainer_run(t);
    if (!st && world->rank == 0)
        j->solved = plain_solved(t, j->tasks);
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

/* (step, solved) of every evaluation, into at[], as many as there are. */
static size_t evaluations(const char *run, int64_t tasks, int64_t at[][2])
{
    json_t *rows = rows_of(run, "metrics.jsonl");
    size_t n = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *e = json_array_get(rows, i);
        if (strcmp(row_text(rows, i, "event"), "eval") != 0)
            continue;
        at[n][0] = json_integer_value(json_object_get(e, "step"));
        at[n][1] = json_integer_value(json_object_get(e, "task/solved"));
        assert_int_equal(json_integer_value(json_object_get(e, "tasks")), tasks);
        double accuracy = json_number_value(json_object_get(e, "task/accuracy"));
        assert_true(accuracy == (double)at[n][1] / (double)tasks);
        n++;
    }
    json_decref(rows);
    return n;
}

/* 70 tasks are two batches on one rank, 35 and 35 on two, 24, 23 and 23 on three. */
static void accuracy_is_that_of_plain_decoding(void **state)
{
    (void)state;
    static const char *const name[] = { "one", "two", "three" };
    int64_t at[3][16][2];
    must(prepare("d", "digits=3 rows=800 heldout=70"));
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct job j = { "tasks.jsonl", name[ranks - 1], -1 };
        must(comm_threads_run(ranks, run_rank, &j));
        assert_int_equal(evaluations(j.run, 70, at[ranks - 1]), 3); /* the switch at 50 once, though 25 divides it */
        assert_int_equal(at[ranks - 1][2][1], j.solved);
        assert_memory_equal(at[ranks - 1], at[0], 3 * sizeof at[0][0]);
    }
    for (int i = 0; i < 3; i++)
        assert_int_equal(at[0][i][0], 25 * (i + 1));
    print_message("solved: %d, %d, %d of 70\n", (int)at[0][0][1], (int)at[0][1][1], (int)at[0][2][1]);
    assert_true(at[0][2][1] > 7 && at[0][2][1] < 70); /* neither none nor all */
    char mark[PATH_BYTES];                            /* what retention sees: not in the warm-up, another loss's */
    snprintf(mark, sizeof mark, "%s/one/ckpt/step-000000000075/mark.eval.task.accuracy", root);
    assert_int_equal(access(mark, F_OK), 0);
}

static void fewer_tasks_than_ranks(void **state)
{
    (void)state;
    char path[PATH_BYTES];
    int64_t at[16][2];
    must(prepare("d", "digits=3 rows=800 heldout=70"));
    json_t *rows = rows_of("d", "tasks.jsonl");
    snprintf(path, sizeof path, "%s/d/few.jsonl", root);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    for (size_t i = 0; i < 2; i++)
        fprintf(f, "{\"prompt\": \"%s\", \"answer\": \"%s\"}\n", row_text(rows, i, "prompt"),
                row_text(rows, i, "answer"));
    fclose(f);
    json_decref(rows);
    struct job j = { "few.jsonl", "few", -1 };
    must(comm_threads_run(3, run_rank, &j));
    assert_int_equal(evaluations("few", 2, at), 3);
    assert_int_equal(at[2][1], j.solved);
}

static void keeping_by_it_needs_tasks(void **state)
{
    (void)state;
    char text[2048], *none[] = { "data.tasks=" };
    struct config *cfg;
    snprintf(text, sizeof text, config, root, "x", root, root, root, "tasks.jsonl", root, "x");
    refused(config_parse(text, strlen(text), "job", 1, none, &cfg), "eval/task/accuracy needs data.tasks");
}

static int setup(void **state)
{
    (void)state;
    folder_make(root);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    folder_remove(root);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sort_rows),
        cmocka_unit_test(sort_split),
        cmocka_unit_test(sort_sizes),
        cmocka_unit_test(task_files),
        cmocka_unit_test(accuracy_is_that_of_plain_decoding),
        cmocka_unit_test(fewer_tasks_than_ranks),
        cmocka_unit_test(keeping_by_it_needs_tasks),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
