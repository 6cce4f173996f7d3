/* test_job: whole training jobs whose ranks are threads of this process: SFT into DPO with asynchronous saves, stopped
 * and resumed on other numbers of ranks. The thread sanitizer sees every thread of every rank. What is compared: final
 * weights, bit for bit, with an undisturbed run. */
#include "tests/support/comm_threads.h"
#include "trainer/data/prepare.h"
#include "trainer/trainer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

struct job {
    const char *config;
    const char *overrides[8];
    int override_count;
    uint32_t weights; /* of rank 0 at the end */
    uint64_t resumed_from, saved;
};

static char root[64];

static status *run_rank(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct log log = { LOG_WARN, world->rank };
    struct config *cfg = NULL;
    TRY(config_parse(j->config, strlen(j->config), "job", j->override_count, (char **)(size_t)j->overrides, &cfg));
    struct trainer *t = NULL;
    status *st = trainer_open(cfg, world, &log, &t);
    if (!st)
        st = trainer_run(t);
    if (!st && world->rank == 0) {
        j->weights = state_weights_crc(t);
        j->resumed_from = t->resumed_from;
        j->saved = t->saved_step;
    }
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

static void must(status *st)
{
    if (st)
        fail_msg("%s (rank %d, %s:%d)", status_message(st), status_rank(st), status_file(st), status_line(st));
}

/* A constant schedule, so that a run cut short by train.steps is the beginning of a longer one. */
static void make_config(char *text, size_t bytes, const char *name)
{
    snprintf(text, bytes,
             "comm: self\nthreads: 2\nrun: {name: %s, dir: %s/%s, seed: 3}\n"
             "model: {kind: llama, layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, tied: true}\n"
             "data: {sft: %s/data/sft.jsonl, prefs: %s/data/prefs_train.jsonl, heldout: %s/data/prefs_heldout.jsonl, "
             "max_length: 64}\n"
             "algo: {kind: dpo, warmup_sft_steps: 3, beta: 0.2}\n"
             "train: {steps: 9, global_batch: 8, micro_batch: 1}\n"
             "optim: {lr: 3e-4, schedule: constant}\n"
             "parallel: {zero: 1, bucket: 16K}\n"
             "checkpoint: {url: 'file:%s/%s/ckpt', every: 2, keep_last: 2, chunk_bytes: 1MiB, on_error: stop}\n",
             name, root, name, root, root, root, root, name);
}

static struct job run(const char *config, int ranks, int overrides, const char **override)
{
    struct job j = { .config = config, .override_count = overrides };
    for (int i = 0; i < overrides; i++)
        j.overrides[i] = override[i];
    must(comm_threads_run(ranks, run_rank, &j));
    return j;
}

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

static void other_seeds_give_other_weights(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "seed");
    const char *seed[] = { "run.seed=4", "checkpoint.url=" };
    assert_int_not_equal(run(text, 2, 2, seed).weights, undisturbed());
}

static int make_data(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/tsr-job-XXXXXX");
    if (!mkdtemp(root))
        return -1;
    char dir[128];
    snprintf(dir, sizeof dir, "%s/data", root);
    char *argv[] = { "prepare", "arithmetic", dir, "rows=40", "heldout=10" };
    status *st = data_cli(5, argv);
    must(st);
    return 0;
}

static int remove_data(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resumes_on_other_ranks_with_the_same_bits),
        cmocka_unit_test(a_run_that_is_done_changes_nothing),
        cmocka_unit_test(another_model_is_refused),
        cmocka_unit_test(batch_statistics_do_not_depend_on_ranks),
        cmocka_unit_test(other_seeds_give_other_weights),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
