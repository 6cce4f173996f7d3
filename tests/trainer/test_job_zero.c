/* test_job_zero: whole jobs at every ZeRO stage and split of dp, their ranks threads of this process: final weights and
 * losses bit for bit those of one rank that keeps everything, with every loss, lane and idle rank; the same across
 * checkpoints written at one of them and resumed at another. And what a rank then holds. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

struct zero_case {
    int ranks;
    const char *stage, *shard, *recompute;
};
enum { ZERO_WORDS = 3 };

#define CASE(ranks, stage, shard, recompute)                                                                           \
    {                                                                                                                  \
        ranks, "parallel.zero=" #stage, "parallel.dp_shard=" #shard, "memory.recompute=" #recompute                    \
    }

static void add_case(const char **o, const struct zero_case *c)
{
    o[0] = c->stage;
    o[1] = c->shard;
    o[2] = c->recompute;
}

static const char *const keys[] = { "loss", "grad_norm", "entropy" };

static void expect_the_same(const char *got, const char *want, int steps, const struct zero_case *c)
{
    for (int step = 1; step <= steps; step++)
        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
            if (metric(got, step, keys[k]) != metric(want, step, keys[k]))
                fail_msg("%d ranks, %s, %s, %s: step %d: %s is %.17g, not %.17g", c->ranks, c->stage, c->shard,
                         c->recompute, step, keys[k], metric(got, step, keys[k]), metric(want, step, keys[k]));
}

/* o[words]: what all cases share. */
static void compare(const char *const *words, int count, const struct zero_case *cases, size_t n)
{
    static const struct zero_case one = CASE(1, 0, 0, none);
    char text[2048];
    const char *o[16];
    memcpy(o, words, (size_t)count * sizeof *o);
    o[count++] = "threads=1";
    add_case(o + count, &one);
    make_config(text, sizeof text, "whole");
    uint32_t want = run(text, 1, count + ZERO_WORDS, o).weights;
    for (size_t c = 0; c < n; c++) {
        make_config(text, sizeof text, "cut");
        add_case(o + count, &cases[c]);
        uint32_t got = run(text, cases[c].ranks, count + ZERO_WORDS, o).weights;
        expect_the_same("cut", "whole", 6, &cases[c]);
        if (got != want)
            fail_msg("%d ranks, %s, %s, %s: weights %08x, not %08x", cases[c].ranks, cases[c].stage, cases[c].shard,
                     cases[c].recompute, got, want);
    }
}

/* 8 micro-batches of 8 lanes; of 4, so that lanes add several; and 7, so that ranks idle. */
static void layouts_change_no_bit(void **state)
{
    (void)state;
    static const struct zero_case cases[] = {
        CASE(1, 3, 0, none),      CASE(2, 2, 0, none), CASE(4, 3, 0, none), CASE(8, 2, 0, none),
        CASE(8, 3, 0, block),     CASE(4, 1, 2, none), CASE(4, 2, 2, none), CASE(4, 3, 2, block),
        CASE(8, 3, 4, attention), CASE(4, 3, 1, none), CASE(3, 3, 0, none), CASE(2, 0, 0, none),
    };
    const size_t n = sizeof cases / sizeof *cases;
    const char *o[] = { "checkpoint.url=", "train.steps=6", "optim.clip=0.3", "optim.lr=1e-3", "train.lanes=8" };
    compare(o, 5, cases, n);
    o[4] = "train.lanes=4";
    compare(o, 5, cases + 2, 1);
    compare(o, 5, cases + 5, 4);
    const char *odd[] = { "checkpoint.url=", "train.steps=6", "train.global_batch=7", "model.tied=false" };
    compare(odd, 4, cases + 4, 4);
}

/* References that are computed once or run at every step, and statistics that need a pass of their own. */
static void every_loss(void **state)
{
    (void)state;
    static const struct zero_case cases[] = { CASE(3, 3, 0, none), CASE(4, 3, 2, block), CASE(2, 2, 0, none) };
    for (int a = 0; a < ALGORITHMS; a++) {
        const char *o[] = { algorithms[a][0],
                            algorithms[a][1],
                            labelled_override(),
                            a % 2 ? "algo.reference=precomputed" : "algo.reference=live",
                            "checkpoint.url=",
                            "train.steps=6",
                            a % 2 ? "algo.ref_sync_steps=0" : "algo.ref_sync_steps=2" };
        compare(o, 7, cases, 3);
    }
}

/* Completions too, of which ranks make different numbers of passes. */
static void tasks_are_completed(void **state)
{
    (void)state;
    static const struct zero_case cases[] = { CASE(3, 3, 0, none), CASE(4, 2, 2, none) };
    char tasks[128];
    snprintf(tasks, sizeof tasks, "data.tasks=%s/data/tasks.jsonl", root);
    FILE *f = fopen(tasks + strlen("data.tasks="), "w");
    assert_non_null(f);
    for (int i = 0; i < 7; i++)
        fprintf(f, "{\"prompt\": \"%d=\", \"answer\": \"%d\"}\n", i * i * i, i);
    assert_int_equal(fclose(f), 0);
    const char *o[] = { tasks, "checkpoint.url=", "train.steps=6", "train.eval_every=2" };
    compare(o, 4, cases, 2);
}

/* Adapters of a frozen base, with the base as the reference; some parameters frozen, with a copy. */
static void beside_frozen_parameters(void **state)
{
    (void)state;
    static const struct zero_case cases[] = { CASE(4, 2, 2, block), CASE(3, 3, 0, none), CASE(8, 3, 4, block) };
    const char *lora[] = { "lora.targets=*_proj", "algo.reference=base", "algo.warmup_sft_steps=0",
                           "checkpoint.url=",     "train.steps=6",       "optim.lr=1e-2" },
               *freeze[] = { "train.freeze=*.embed_tokens.*", "algo.reference=live", "algo.ref_sync_steps=1",
                             "checkpoint.url=", "train.steps=6" },
               *between[] = { "train.freeze=*.layers.1.*", "model.layers=3", "checkpoint.url=", "train.steps=6" };
    compare(lora, 6, cases, 3);
    compare(freeze, 5, cases, 3);
    compare(between, 4, cases, 3); /* a block without gradients between two that share a window */
}

/* For one tp too. */
static void beside_tensor_parallel(void **state)
{
    (void)state;
    uint32_t want = 0;
    static const struct zero_case cases[] = { CASE(2, 0, 0, none), CASE(4, 2, 0, none), CASE(4, 3, 0, block),
                                              CASE(8, 3, 2, none) };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char text[2048];
        make_config(text, sizeof text, c ? "cut" : "whole");
        const char *o[9] = { "checkpoint.url=",        "train.steps=6", "parallel.tp=2",
                             "parallel.sequence=true", "threads=1",     "model.qk_norm=true" };
        add_case(o + 6, &cases[c]);
        uint32_t got = run(text, cases[c].ranks, 6 + ZERO_WORDS, o).weights;
        want = c ? want : got;
        expect_the_same(c ? "cut" : "whole", "whole", 6, &cases[c]);
        assert_int_equal(got, want);
    }
}

static void resumes_at_any_other_with_the_same_bits(void **state)
{
    (void)state;
    static const struct zero_case cases[][3] = {
        { CASE(4, 3, 0, none), CASE(2, 0, 0, none), CASE(3, 3, 0, none) },
        { CASE(2, 0, 0, none), CASE(4, 3, 0, none), CASE(4, 3, 2, block) },
        { CASE(4, 2, 2, none), CASE(8, 3, 4, attention), CASE(1, 1, 0, none) },
    };
    for (int live = 0; live < 2; live++) {
        char text[2048], name[32];
        const char *o[16] = { live ? "algo.reference=live" : "algo.reference=precomputed", "optim.lr=1e-3",
                              "threads=1" };
        make_config(text, sizeof text, "undisturbed");
        o[3] = "checkpoint.url=";
        uint32_t want = run(text, 1, 4, o).weights;
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            snprintf(name, sizeof name, "moved-%zu-%d", c, live);
            make_config(text, sizeof text, name);
            static const char *const until[] = { "train.steps=4", "train.steps=7", "train.steps=9" };
            for (int i = 0; i < 3; i++) {
                o[3] = until[i];
                add_case(o + 4, &cases[c][i]);
                struct job j = run(text, cases[c][i].ranks, 4 + ZERO_WORDS, o);
                assert_int_equal(j.resumed_from, i == 0 ? UINT64_MAX : i == 1 ? 4 : 7);
                if (i == 2 && j.weights != want)
                    fail_msg("%s: weights %08x, not %08x", name, j.weights, want);
            }
        }
    }
}

/* ---- what a rank holds ---- */

static double run_metric(const char *run_name, const char *key)
{
    char path[128], line[4096], name[64];
    double value = NAN;
    snprintf(path, sizeof path, "%s/%s/metrics.jsonl", root, run_name);
    snprintf(name, sizeof name, "\"%s\": ", key);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) {
        const char *at = strncmp(line, "{\"event\": \"run\"", 15) ? NULL : strstr(line, name);
        value = at ? strtod(at + strlen(name), NULL) : value;
    }
    fclose(f);
    return value;
}

static void a_shard_holds_its_share(void **state)
{
    (void)state;
    static const struct zero_case cases[] = { CASE(4, 0, 0, none), CASE(4, 1, 0, none), CASE(4, 2, 0, none),
                                              CASE(4, 3, 0, none), CASE(4, 3, 2, none) };
    static const double shares[][3] = { /* of parameters, one sum of gradients, moments */
                                        { 1, 1, 1 },
                                        { 1, 1, 0.25 },
                                        { 1, 0.25, 0.25 },
                                        { 0.25, 0.25, 0.25 },
                                        { 0.5, 0.5, 0.5 }
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char text[2048];
        make_config(text, sizeof text, "held");
        const char *o[16] = { "checkpoint.url=", "train.steps=4",    "model.hidden=64", "model.ffn=256",
                              "model.layers=4",  "model.tied=false", "train.lanes=4",   "train.global_batch=4" };
        add_case(o + 8, &cases[c]);
        (void)run(text, 4, 8 + ZERO_WORDS, o);
        double whole = run_metric("held", "parameters") * 4;
        /* a group of S shards adds S micro-batches of 4, at a time: as many sums as wait in a tree of its lanes */
        double sums = c < 2 ? 1 : c == 4 ? 1 : 2;
        double got[3] = { run_metric("held", "parameter_bytes"), run_metric("held", "gradient_bytes") / sums,
                          run_metric("held", "optimizer_bytes") / 2 };
        for (int i = 0; i < 3; i++)
            if (!(fabs(got[i] / whole - shares[c][i]) <= 0.06 * shares[c][i]))
                fail_msg("%s, %s: %d: %.0f bytes of %.0f are no share of %g", cases[c].stage, cases[c].shard, i, got[i],
                         whole, shares[c][i]);
        double windows = run_metric("held", "window_bytes");
        assert_true(c < 2 ? windows == 0 : windows > 0 && windows < 2 * whole);
    }
}

static void what_does_not_fit_is_refused(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "refused");
    struct job j = { .config = text, .override_count = 1, .overrides = { "parallel.dp_shard=3" } };
    status *st = comm_threads_run(4, run_rank, &j);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "parallel.dp_shard: 3 does not divide 4"));
    assert_non_null(strstr(status_message(st), "legal: 1, 2, 4;"));
    status_free(st);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_change_no_bit),   cmocka_unit_test(every_loss),
        cmocka_unit_test(tasks_are_completed),     cmocka_unit_test(beside_frozen_parameters),
        cmocka_unit_test(beside_tensor_parallel),  cmocka_unit_test(resumes_at_any_other_with_the_same_bits),
        cmocka_unit_test(a_shard_holds_its_share), cmocka_unit_test(what_does_not_fit_is_refused),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
