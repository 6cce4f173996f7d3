/* test_job: whole training jobs whose ranks are threads of this process: SFT into DPO with asynchronous saves, stopped
 * and resumed on other numbers of ranks. The thread sanitizer sees every thread of every rank. What is compared: final
 * weights, bit for bit, with an undisturbed run. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

static uint32_t undisturbed(void)
{
    char text[2048];
    make_config(text, sizeof text, "undisturbed");
    const char *clean[] = { "checkpoint.resume=never", "checkpoint.rewind=true", "parallel.zero=0" };
    return run(text, 1, 3, clean).weights;
}

static void resumes_on_other_ranks_with_the_same_bits(void **state)
{
    (void)state;
    static const int ranks[][3] = { { 3, 2, 5 }, { 4, 1, 4 }, { 2, 6, 3 } }; /* to step 3 (the switch), to 7, to 9 */
    uint32_t want = undisturbed();
    for (size_t c = 0; c < sizeof ranks / sizeof ranks[0]; c++) {
        char text[2048], name[32];
        snprintf(name, sizeof name, "resumed-%zu", c);
        make_config(text, sizeof text, name);
        const char *to4[] = { "train.steps=4" }, *to7[] = { "train.steps=7", "parallel.zero=0" },
                   *to9[] = { "parallel.zero=1" };
        struct job a = run(text, ranks[c][0], 1, to4);
        assert_int_equal(a.saved, 4);
        struct job b = run(text, ranks[c][1], 2, to7);
        assert_int_equal(b.resumed_from, 4);
        struct job d = run(text, ranks[c][2], 1, to9);
        assert_int_equal(d.resumed_from, 7);
        assert_int_equal(d.weights, want);
    }
}

static void a_run_that_is_done_changes_nothing(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "undisturbed");
    uint32_t want = undisturbed();
    struct job again = run(text, 2, 0, NULL);
    assert_int_equal(again.resumed_from, 9);
    assert_int_equal(again.weights, want);
}

static void another_model_is_refused(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "undisturbed");
    (void)undisturbed();
    struct job j = { .config = text, .overrides = { "model.layers=3" }, .override_count = 1 };
    status *st = comm_threads_run(2, run_rank, &j);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "model.layers: 2 -> 3"));
    status_free(st);
}

/* train.dtype: bf16 computes something else, but not much, and that alike on any ranks. */
static void products_in_bf16(void **state)
{
    (void)state;
    char text[2048];
    const char *o[] = { "train.dtype=f32", "checkpoint.url=", "optim.lr=3e-3" };
    make_config(text, sizeof text, "f32");
    uint32_t f32 = run(text, 1, 3, o).weights;
    o[0] = "train.dtype=bf16";
    make_config(text, sizeof text, "bf16");
    uint32_t bf16 = run(text, 1, 3, o).weights;
    assert_int_equal(run(text, 3, 3, o).weights, bf16);
    assert_int_not_equal(bf16, f32);
    for (int step = 1; step <= 9; step++) {
        double want = metric("f32", step, "loss"), got = metric("bf16", step, "loss");
        assert_true(fabs(got - want) < 0.01 * want);
    }
}

/* A loss that wants means over the whole step: the same ones however the step is cut. */
static void batch_statistics_do_not_depend_on_ranks(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "kto");
    const char *kto[] = { "algo.loss=kto_pair", "checkpoint.url=", "optim.lr=3e-3" };
    uint32_t want = run(text, 1, 3, kto).weights;
    assert_int_equal(run(text, 3, 3, kto).weights, want);
    assert_int_not_equal(run(text, 2, 2, kto + 1).weights, want);
}

/* Where policy and reference agree, to the last bit: the first step after the switch, on any ranks, either reference.
 */
static void the_first_step_is_at_the_reference(void **state)
{
    (void)state;
    for (int a = 0; a < ALGORITHMS; a++)
        for (int ranks = 1; ranks <= 3; ranks++)
            for (int live = 0; live < 2; live++) {
                char text[2048];
                make_config(text, sizeof text, "first");
                const char *o[] = { algorithms[a][0],    algorithms[a][1],
                                    labelled_override(), live ? "algo.reference=live" : "algo.reference=precomputed",
                                    "train.steps=5",     "checkpoint.url=",
                                    "optim.lr=1e-3" };
                (void)run(text, ranks, 7, o);
                bool kto = a == 3, pair = a == 1;
                assert_true(metric("first", 4, "loss") == (kto || pair ? 0.5 : 0.69314718055994530942));
                assert_true(metric("first", 4, "rewards/margins") == 0);
                assert_true(metric("first", 4, "rewards/chosen") == 0 && metric("first", 4, "rewards/rejected") == 0);
                assert_true(metric("first", 4, kto ? "kl" : "rewards/accuracies") == 0);
                assert_true(metric("first", 5, "loss") != metric("first", 4, "loss")); /* and then it learns */
                assert_true(metric("first", 5, "rewards/margins") != 0);
            }
}

/* Precomputed and live references: the same bits, whatever the ranks, and after resumes on others. */
static void live_and_precomputed_references_agree(void **state)
{
    (void)state;
    for (int a = 0; a < ALGORITHMS; a++) {
        char text[2048], name[32];
        make_config(text, sizeof text, "precomputed");
        const char *o[] = { algorithms[a][0], algorithms[a][1],  labelled_override(), "algo.reference=precomputed",
                            "optim.lr=1e-3",  "checkpoint.url=", "train.steps=9" };
        uint32_t want = run(text, 1, 7, o).weights;
        assert_int_equal(run(text, 4, 7, o).weights, want);
        o[3] = "algo.reference=live";
        assert_int_equal(run(text, 2, 7, o).weights, want);
        for (int live = 0; live < 2; live++) {
            snprintf(name, sizeof name, "cut-%d-%d", a, live);
            make_config(text, sizeof text, name);
            o[3] = live ? "algo.reference=live" : "algo.reference=precomputed";
            o[5] = "checkpoint.async=true";
            o[6] = "train.steps=5";
            assert_int_equal(run(text, 2, 7, o).saved, 5);
            o[6] = "train.steps=9";
            struct job end = run(text, 3, 7, o);
            assert_int_equal(end.resumed_from, 5);
            assert_int_equal(end.weights, want);
        }
        struct job other = { .config = text, .override_count = 4 };
        memcpy(other.overrides, o, 3 * sizeof *o);
        other.overrides[3] = "algo.reference=precomputed"; /* what the checkpoint does not have */
        status *st = comm_threads_run(1, run_rank, &other);
        assert_int_equal(status_code(st), ST_INVALID);
        assert_non_null(strstr(status_message(st), "algo.reference: live -> precomputed"));
        status_free(st);
    }
}

/* A reference that follows at once is always where the policy is; one that never moves is one that stays. */
static void the_reference_follows(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "sync");
    const char *o[] = { "algo.reference=live", "algo.ref_sync_steps=1", "algo.ref_sync_alpha=1",
                        "checkpoint.url=",     "optim.lr=1e-3",         "train.steps=9" };
    (void)run(text, 2, 6, o);
    for (int step = 4; step <= 9; step++)
        assert_true(metric("sync", step, "loss") == 0.69314718055994530942);
    o[2] = "algo.ref_sync_alpha=0";
    uint32_t still = run(text, 2, 6, o).weights;
    o[1] = "algo.ref_sync_steps=0";
    assert_int_equal(run(text, 1, 6, o).weights, still);
    /* between the two: in the checkpoint as it is at that step */
    o[1] = "algo.ref_sync_steps=2";
    o[2] = "algo.ref_sync_alpha=0.6";
    uint32_t want = run(text, 1, 6, o).weights;
    assert_int_not_equal(want, still);
    o[3] = "checkpoint.every=1";
    o[5] = "train.steps=6"; /* one step after the first move, one before the second */
    (void)run(text, 3, 6, o);
    o[5] = "train.steps=9";
    struct job end = run(text, 2, 6, o);
    assert_int_equal(end.resumed_from, 6);
    assert_int_equal(end.weights, want);
    o[0] = "algo.reference=precomputed";
    struct job refused = { .config = text, .override_count = 2 };
    memcpy(refused.overrides, o, 2 * sizeof *o);
    status *st = comm_threads_run(1, run_rank, &refused);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "algo.reference: live"));
    status_free(st);
}

/* Desirable rows with prompts of their own; one row's completion may be another. */
static void write_labelled(const char *name, int rows, int other)
{
    char path[128];
    snprintf(path, sizeof path, "%s/data/%s", root, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    for (int i = 0; i < rows; i++)
        fprintf(f, "{\"prompt\": \"p%d\", \"completion\": \"%s%d\", \"label\": true}\n", i, i == other ? "x" : "c",
                i * i * i);
    assert_int_equal(fclose(f), 0);
}

/* Reference values of other tokens than the data's are refused; a live reference has none to go stale. */
static void a_stale_reference_is_an_error(void **state)
{
    (void)state;
    char text[2048], path[128];
    snprintf(path, sizeof path, "data.labelled=%s/data/stale.jsonl", root);
    for (int live = 0; live < 2; live++) {
        make_config(text, sizeof text, live ? "fresh" : "stale");
        const char *o[] = { "algo.kind=kto", path, live ? "algo.reference=live" : "algo.reference=precomputed",
                            "train.steps=5" };
        write_labelled("stale.jsonl", 9, -1);
        assert_int_equal(run(text, 2, 4, o).saved, 5);
        write_labelled("stale.jsonl", 9, 7);
        struct job j = { .config = text, .override_count = 3 };
        memcpy(j.overrides, o, 3 * sizeof *o);
        status *st = comm_threads_run(3, run_rank, &j);
        if (live) {
            must(st);
            continue;
        }
        assert_int_equal(status_code(st), ST_INVALID);
        assert_non_null(strstr(status_message(st), "row 6 are stale")); /* row 7 is its mismatched one */
        status_free(st);
    }
}

/* The baseline is of mismatched sequences: where all rows are alike desirable, not the mean of what is trained. */
static void the_baseline_is_of_mismatched_sequences(void **state)
{
    (void)state;
    char text[2048], path[128];
    snprintf(path, sizeof path, "data.labelled=%s/data/alike.jsonl", root);
    write_labelled("alike.jsonl", 8, -1);
    make_config(text, sizeof text, "alike");
    const char *o[] = { "algo.kind=kto", path, "optim.lr=5e-3", "checkpoint.url=", "train.steps=9" };
    (void)run(text, 2, 5, o);
    double kl = metric("alike", 9, "kl"), matched = metric("alike", 9, "rewards/chosen") / 0.2;
    assert_true(kl > 0.1 * matched && fabs(kl - matched) > 1e-3 * matched); /* near, and not the same */
    assert_true(isnan(metric("alike", 9, "rewards/margins")) && isnan(metric("alike", 9, "rewards/rejected")));
}

/* Every metric is a mean over the step: the same bits on any ranks, the same number in packs of any size. */
static void metrics_do_not_depend_on_cuts(void **state)
{
    (void)state;
    static const char *const common[] = {
        "loss",          "entropy",      "mean_token_accuracy", "grad_norm",       "rewards/chosen",
        "logits/chosen", "logps/chosen", "rewards/margins",     "logits/rejected", "rewards/rejected",
        "epoch",         "num_tokens",   "learning_rate"
    };
    enum { COMMON = sizeof common / sizeof common[0] };
    for (int a = 0; a < ALGORITHMS; a++) {
        double want[COMMON] = { 0 };
        for (int cut = 0; cut < 5; cut++) {
            char text[2048];
            make_config(text, sizeof text, "cuts");
            static const char *const pack[] = { "train.micro_batch=1", "train.micro_batch=1", "train.micro_batch=2",
                                                "train.micro_batch=4", "train.micro_batch=8" };
            const char *o[] = { algorithms[a][0], algorithms[a][1],  labelled_override(), pack[cut],
                                "train.steps=5",  "checkpoint.url=", "optim.lr=1e-3" };
            (void)run(text, cut == 1 ? 4 : 1, 7, o);
            for (int m = 0; m < COMMON; m++) {
                double got = metric("cuts", 5, common[m]);
                want[m] = cut ? want[m] : got;
                if (cut == 1 ? got != want[m] : !(fabs(got - want[m]) <= 2e-5 * (1 + fabs(want[m]))))
                    fail_msg("%s, %s, %s: %.17g, not %.17g", algorithms[a][1], common[m], pack[cut], got, want[m]);
            }
            assert_true(metric("cuts", 5, "epoch") < 1 && metric("cuts", 3, "entropy") > 1);
            double tokens = 0;
            for (int step = 1; step <= 5; step++)
                tokens += metric("cuts", step, "tokens");
            assert_true(metric("cuts", 5, "num_tokens") == tokens);
        }
    }
}

static void other_seeds_give_other_weights(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "seed");
    const char *seed[] = { "run.seed=4", "checkpoint.url=" };
    assert_int_not_equal(run(text, 2, 2, seed).weights, undisturbed());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resumes_on_other_ranks_with_the_same_bits),
        cmocka_unit_test(a_run_that_is_done_changes_nothing),
        cmocka_unit_test(another_model_is_refused),
        cmocka_unit_test(products_in_bf16),
        cmocka_unit_test(batch_statistics_do_not_depend_on_ranks),
        cmocka_unit_test(other_seeds_give_other_weights),
        cmocka_unit_test(the_first_step_is_at_the_reference),
        cmocka_unit_test(live_and_precomputed_references_agree),
        cmocka_unit_test(the_reference_follows),
        cmocka_unit_test(metrics_do_not_depend_on_cuts),
        cmocka_unit_test(a_stale_reference_is_an_error),
        cmocka_unit_test(the_baseline_is_of_mismatched_sequences),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
