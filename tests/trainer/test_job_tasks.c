/* test_job_tasks: whole jobs that complete data.tasks, their ranks threads of this process: a model is trained on one
 * rank until it answers some of the tasks, whose answers differ in length, and every mesh goes on from there and finds
 * as many of them solved as one rank does: those that can be. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

enum { TRAINED = 98, STEPS = 100, MOST = 90 };

struct mesh_case {
    int ranks;
    const char *o[7];
};

enum { ROWS = 40 };

static void write_prompt(FILE *f, int row)
{
    fprintf(f, "{\"prompt\": \"%c%d=\", ", row % 2 ? 'a' : 'b', row * 7 % 50);
}

static const char *answer_to(int row)
{
    return row % 2 ? "7" : "8888";
}

/* Prompts of several lengths, with short and long answers; of the tasks each fifth wants another one. */
static void write_files(const char *sft, const char *tasks, int count)
{
    FILE *f = fopen(sft, "w");
    assert_non_null(f);
    for (int i = 0; i < ROWS; i++) {
        write_prompt(f, i);
        fprintf(f, "\"completion\": \"%s\"}\n", answer_to(i));
    }
    assert_int_equal(fclose(f), 0);
    f = fopen(tasks, "w");
    assert_non_null(f);
    for (int i = 0; i < count; i++) {
        write_prompt(f, i % ROWS);
        fprintf(f, "\"answer\": \"%s%s\"}\n", answer_to(i % ROWS), i % 5 == 4 ? "8" : "");
    }
    assert_int_equal(fclose(f), 0);
}

/* What a job finds after its last step, of `count` tasks: from its beginning on one rank, or from step TRAINED on. */
static double solved(const struct mesh_case *c, const char *const *model, int count)
{
    const char *name = "tasks";
    char text[2048], sft[160], tasks[160], got[32];
    snprintf(sft, sizeof sft, "%s/data/letters.jsonl", root);
    snprintf(tasks, sizeof tasks, "%s/data/answers.jsonl", root);
    write_files(sft, tasks, count);
    snprintf(text, sizeof text,
             "comm: self\nthreads: 1\nrun: {name: %s, dir: %s/%s, seed: 3}\n"
             "model: {kind: llama, layers: 3, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, tied: true}\n"
             "data: {sft: %s, tasks: %s, max_length: 16}\nalgo: {kind: sft}\n"
             "train: {steps: %d, global_batch: 8, micro_batch: 1}\noptim: {lr: 1e-2, schedule: constant}\n"
             "parallel: {zero: 1, bucket: 16K}\n"
             "checkpoint: {url: 'file:%s/%s/ckpt', every: %d, keep_last: 0, rewind: true, resume: %s}\n",
             name, root, name, sft, tasks, STEPS, root, name, TRAINED, c ? "98" : "never");
    struct job j = { .config = text };
    for (; *model; model++)
        j.overrides[j.override_count++] = *model;
    for (int i = 0; c && c->o[i]; i++)
        j.overrides[j.override_count++] = c->o[i];
    must(comm_threads_run(c ? c->ranks : 1, run_rank, &j));
    assert_true(!c || j.resumed_from == TRAINED);
    last_value(name, "eval", STEPS, "tasks", got);
    assert_int_equal(strtol(got, NULL, 10), count);
    last_value(name, "eval", STEPS, "task/solved", got);
    return strtod(got, NULL);
}

/* all: one rank solves what can be solved. */
static void expect_solved(const char *const *model, const struct mesh_case *cases, size_t n, bool all)
{
    static const struct mesh_case one = { 1, { NULL } };
    static const int counts[] = { MOST, 5 }; /* several batches of a rank; ranks without tasks */
    for (size_t k = 0; k < 2; k++) {
        double want = counts[k] - counts[k] / 5, got = solved(k ? &one : NULL, model, counts[k]);
        if (all ? got != want : !(got > 0 && got < counts[k]))
            fail_msg("one rank has solved %.0f of %d tasks, not %.0f", got, counts[k], want);
        want = got;
        for (size_t c = k; c < n; c += 2) {
            got = solved(&cases[c], model, counts[k]);
            if (got != want)
                fail_msg("mesh %zu has solved %.0f of %d tasks, not %.0f", c, got, counts[k], want);
        }
    }
}

static void with_experts_on_ranks(void **state)
{
    (void)state;
    static const char *const model[] = { "model.layers=3",      "model.experts=4",     "model.experts_per_token=2",
                                         "model.expert_ffn=24", "model.first_dense=1", NULL };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.ep=2" } },
        { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=0" } },
        { 4, { "parallel.ep=2", "parallel.tp=2", "parallel.sequence=true" } },
        { 4, { "parallel.ep=2", "parallel.cp=2", "memory.recompute=block" } },
        { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=3" } },
    };
    expect_solved(model, cases, sizeof cases / sizeof *cases, true);
}

static void on_stages(void **state)
{
    (void)state;
    static const char *const model[] = { "model.kind=llama", NULL };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.pp=2" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3" } },
        { 4, { "parallel.pp=2", "parallel.tp=2", "parallel.sequence=true", "parallel.stages=1,2" } },
        { 4, { "parallel.pp=2", "parallel.cp=2", "memory.recompute=block" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved", "parallel.chunks=2" } },
        { 4, { "parallel.pp=4", "parallel.schedule=zero-bubble", "parallel.stages=0,1,2,0" } },
    };
    expect_solved(model, cases, sizeof cases / sizeof *cases, true);
}

static void on_stages_with_adapters(void **state)
{
    (void)state;
    static const char *const model[] = { "lora.targets=*_proj", "lora.rank=8", "lora.alpha=32", "model.tied=false",
                                         NULL };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.pp=2" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved" } },
    };
    expect_solved(model, cases, sizeof cases / sizeof *cases, false);
}

static void on_stages_with_experts(void **state)
{
    (void)state;
    static const char *const model[] = { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24",
                                         "model.first_dense=1", NULL };
    static const struct mesh_case cases[] = {
        { 4, { "parallel.pp=2", "parallel.ep=2", "parallel.stages=1,2" } },
        { 4, { "parallel.pp=2", "parallel.ep=2", "parallel.schedule=interleaved" } },
    };
    expect_solved(model, cases, sizeof cases / sizeof *cases, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(with_experts_on_ranks),
        cmocka_unit_test(on_stages),
        cmocka_unit_test(on_stages_with_adapters),
        cmocka_unit_test(on_stages_with_experts),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
