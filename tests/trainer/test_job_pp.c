/* test_job_pp: whole jobs on pipelines, their ranks threads of this process. Losses, metrics, norms, weights, moments
 * and evaluations have the same bits on any number of stages, however layers are dealt to them, with any dp and ZeRO
 * stage, for every loss, at one tp; across resumes, too. Micro-batches in flight are counted. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/model/stages.h"
#include "trainer/parallel/treesum.h"

enum { STEPS = 6, LAYERS = 4 };

struct mesh_case {
    int ranks;
    const char *o[8];
};

/* The common part of a job's overrides; returns how many. */
static int common(const char **o)
{
    const char *const all[] = { "threads=1", "model.layers=4", "train.steps=6", "algo.warmup_sft_steps=2",
                                "optim.clip=0.3" };
    memcpy(o, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

/* With ZeRO 2 and 3: a window for what is outside of blocks, and two of the largest block, or one, if all blocks here
 * have odd numbers or all even ones. */
static status *check_windows(struct trainer *t)
{
    uint64_t outside = 0, block[LAYERS] = { 0 }, most[2] = { 0 };
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        uint64_t n = p->alias >= 0 || p->away ? 0 : (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
        *(p->block < 0 ? &outside : &block[p->block]) += p->frozen ? 0 : n;
    }
    for (int b = 0; b < LAYERS; b++)
        most[b % 2] = block[b] > most[b % 2] ? block[b] : most[b % 2];
    uint64_t got = zero_memory(t->zero).windows, stage = (uint64_t)t->cfg->parallel.zero,
             want = stage < 2 ? 0 : (stage - 1) * 4 * (outside + most[0] + most[1]);
    bool frozen = t->model->params.frozen && stage == 3; /* values of these lie beside them */
    return frozen || got == want
               ? NULL
               : ERR(INTERNAL, "%llu bytes of windows, not %llu", (unsigned long long)got, (unsigned long long)want);
}

/* On every rank: as many micro-batches had activations at a time as the schedule says, and no more have room. */
static status *count_in_flight(struct trainer *t)
{
    const struct config *c = t->cfg;
    int stages = (int)c->parallel.pp, stage = t->pp ? t->pp->rank : 0,
        chunks = !t->pp || c->parallel.schedule != PIPE_INTERLEAVED ? 1
                 : c->parallel.chunks                               ? (int)c->parallel.chunks
                                                                    : 2,
        most = c->parallel.schedule == PIPE_1F1B ? stages - stage : stages;
    uint32_t k = (uint32_t)(c->train.global_batch / c->train.micro_batch) * (uint32_t)chunks;
    if (c->parallel.schedule == PIPE_INTERLEAVED && t->pp)
        most = (chunks - 1) * stages + 2 * (stages - stage - 1) + 1;
    int here = 0;
    for (uint32_t pass = 0, i; pass < zero_passes(t->zero, k / (uint32_t)chunks); pass++)
        here += zero_micro_batch(t->zero, k / (uint32_t)chunks, pass, &i) ? chunks : 0;
    int want = here < most ? here : most;
    bool whole = chunks == 1 || here % (stages * chunks) == 0; /* groups: else fewer may do */
    if (pipe_peak(t->pipe) > want || (whole && pipe_peak(t->pipe) < want))
        return ERR(INTERNAL, "stage %d of %d: %d micro-batches in flight, not %d", stage, stages, pipe_peak(t->pipe),
                   want);
    TRY(check_windows(t));
    int room = (int)k < most ? (int)k : most;
    return pipe_tapes(t->pipe) == room ? NULL : ERR(INTERNAL, "%d tapes, not %d", pipe_tapes(t->pipe), room);
}

static struct job run_case(const char *name, const struct mesh_case *c, int more, const char *const *extra)
{
    char text[2048];
    const char *o[16];
    int n = common(o);
    make_config(text, sizeof text, name);
    for (int i = 0; i < more; i++)
        o[n++] = extra[i];
    for (int i = 0; c && c->o[i]; i++)
        o[n++] = c->o[i];
    struct job j = { .config = text, .override_count = n, .after = count_in_flight };
    memcpy(j.overrides, o, (size_t)n * sizeof *o);
    must(comm_threads_run(c ? c->ranks : 1, run_rank, &j));
    return j;
}

static void expect_same(const char *got_run, const char *want_run, int step, const char *key)
{
    double got = metric(got_run, step, key), want = metric(want_run, step, key);
    if (!(isnan(got) && isnan(want)) && got != want) /* bits: nothing else is promised */
        fail_msg("%s: step %d: %s is %.17g, not %.17g", got_run, step, key, got, want);
}

static void expect_same_run(const char *name, const struct job *got, const char *want_name, const struct job *want,
                            bool pairs)
{
    static const char *const keys[] = { "loss", "grad_norm", "entropy", "mean_token_accuracy", "tokens" };
    static const char *const pair_keys[] = { "rewards/chosen", "rewards/margins", "logps/chosen", "logits/rejected" };
    for (int step = 1; step <= STEPS; step++) {
        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
            expect_same(name, want_name, step, keys[k]);
        for (size_t k = 0; pairs && step > 2 && k < sizeof pair_keys / sizeof *pair_keys; k++)
            expect_same(name, want_name, step, pair_keys[k]);
    }
    assert_true(got->hashes.weights == want->hashes.weights);
    assert_true(got->hashes.moments == want->hashes.moments);
    assert_true(got->hashes.reference == want->hashes.reference);
}

/* ---- bits ---- */

static void stages_change_no_bit(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.pp=2", "parallel.zero=1" } },
        { 4, { "parallel.pp=4", "parallel.zero=0" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=0", "parallel.stages=1,3" } },
        { 8, { "parallel.pp=4", "parallel.dp=2", "parallel.zero=1" } },
        { 3, { "parallel.pp=3", "parallel.stages=0,4,0", "memory.recompute=block" } },
        { 6, { "parallel.pp=6", "parallel.zero=1" } },
        { 2, { "parallel.pp=2", "parallel.zero=1", "parallel.schedule=zero-bubble" } },
        { 8, { "parallel.pp=4", "parallel.dp=2", "parallel.schedule=zero-bubble", "memory.recompute=attention" } },
        { 6, { "parallel.pp=6", "memory.recompute=block", "parallel.schedule=zero-bubble" } },
        { 2, { "parallel.pp=2", "parallel.schedule=interleaved" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved", "parallel.stages=1,2,1,0" } },
        { 3, { "parallel.pp=3", "parallel.schedule=interleaved", "parallel.zero=0", "memory.recompute=block" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.schedule=interleaved", "parallel.chunks=3" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3" } },
        { 8, { "parallel.pp=4", "parallel.dp=2", "parallel.zero=2", "parallel.schedule=zero-bubble" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=3", "parallel.dp_shard=2", "parallel.bucket=4K" } },
        { 6,
          { "parallel.pp=2", "parallel.dp=3", "parallel.zero=3", "parallel.schedule=zero-bubble",
            "memory.recompute=block" } }, /* a rank idles in its last pass */
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3", "parallel.schedule=interleaved" } },
        { 6,
          { "parallel.pp=2", "parallel.dp=3", "parallel.zero=3", "parallel.schedule=interleaved",
            "parallel.stages=1,2,1,0", "parallel.bucket=4K", "memory.recompute=block" } },
        { 8,
          { "parallel.pp=2", "parallel.dp=4", "parallel.zero=2", "parallel.schedule=interleaved", "parallel.chunks=3",
            "parallel.dp_shard=2" } },
    };
    for (int tied = 0; tied < 2; tied++) {
        const char *o[2] = { tied ? "model.tied=true" : "model.tied=false", "checkpoint.url=" };
        struct job want = run_case("whole", NULL, 2, o);
        char eval[4096], got_eval[4096];
        last_event("whole", "eval", eval);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (!tied && c >= 3 && c < 13)
                continue;
            struct job got = run_case("staged", &cases[c], 2, o);
            expect_same_run("staged", &got, "whole", &want, true);
            last_event("staged", "eval", got_eval);
            assert_string_equal(got_eval, eval);
            assert_true(metric("staged", STEPS, "pp_sent_bytes") > 0 && metric("whole", STEPS, "pp_sent_bytes") == 0);
        }
    }
}

static void every_loss_has_its_bits(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.pp=2", "parallel.stages=3,1" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved" } },
        { 6, { "parallel.pp=3", "parallel.dp=2", "parallel.zero=3", "parallel.schedule=zero-bubble" } },
        { 6, { "parallel.pp=2", "parallel.dp=3", "parallel.zero=3", "parallel.schedule=interleaved" } },
    };
    for (int a = 0; a < ALGORITHMS; a++)
        for (int live = 0; live < 2; live++) {
            const char *o[6] = { algorithms[a][0],
                                 algorithms[a][1],
                                 labelled_override(),
                                 "checkpoint.url=",
                                 live ? "algo.reference=live" : "algo.reference=precomputed",
                                 live ? "algo.ref_sync_steps=2" : "algo.ref_sync_steps=0" };
            struct job want = run_case("whole", NULL, 6, o), got = run_case("staged", &cases[(3 * a + live) % 4], 6, o);
            expect_same_run("staged", &got, "whole", &want, true);
        }
}

static void fewer_micro_batches_than_stages(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 4, { "parallel.pp=4" } },
        { 4, { "parallel.pp=4", "parallel.schedule=zero-bubble" } },
        { 6, { "parallel.pp=3", "parallel.dp=2", "parallel.schedule=zero-bubble" } },
        { 8, { "parallel.pp=2", "parallel.dp=4" } }, /* ranks without any */
        { 3, { "parallel.pp=3", "parallel.schedule=interleaved" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.schedule=interleaved", "parallel.chunks=3" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=3", "parallel.schedule=zero-bubble" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=2", "parallel.dp_shard=2" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=3", "parallel.schedule=interleaved" } },
    };
    const char *o[2] = { "train.global_batch=2", "checkpoint.url=" };
    struct job want = run_case("whole", NULL, 2, o);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct job got = run_case("staged", &cases[c], 2, o);
        expect_same_run("staged", &got, "whole", &want, true);
    }
}

/* What does not train has no gradient; stages that are all of it pass gradients by, and send none of a tied weight. */
static void adapters_and_frozen_weights(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.pp=2", "parallel.stages=3,1" } },
        { 6, { "parallel.pp=6", "parallel.schedule=zero-bubble" } },
        { 3, { "parallel.pp=3", "parallel.schedule=interleaved" } },
        { 6,
          { "parallel.pp=3", "parallel.dp=2", "parallel.zero=3", "parallel.schedule=zero-bubble",
            "memory.recompute=block" } },
        { 6, { "parallel.pp=3", "parallel.dp=2", "parallel.zero=3", "parallel.schedule=interleaved" } }
    };
    static const char *const settings[][3] = {
        { "lora.targets=*.q_proj,*.2.mlp.*", "algo.reference=base", "algo.warmup_sft_steps=0" },
        { "lora.targets=model.layers.1.*", "algo.reference=live", "algo.ref_sync_steps=2" },
        { "train.freeze=*.[013].*,*embed*", "algo.reference=live", "algo.ref_sync_steps=2" },
    };
    for (size_t s = 0; s < sizeof settings / sizeof *settings; s++) {
        const char *o[4] = { settings[s][0], settings[s][1], settings[s][2], "checkpoint.url=" };
        struct job want = run_case("whole", NULL, 4, o);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (!runs_kind(c, s, sizeof settings / sizeof *settings))
                continue;
            struct job got = run_case("staged", &cases[c], 4, o);
            expect_same_run("staged", &got, "whole", &want, true);
        }
    }
}

/* Sent by the first rank of two: activations of each of its stages, gradients of all but the first's, the nodes of the
 * norm, and a tied weight's values; nothing else. */
static void bytes_between_stages(void **state)
{
    (void)state;
    static const struct mesh_case staged = { 2, { "parallel.pp=2" } },
                                  three = { 2,
                                            { "parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=3" } };
    enum { WIDTH = 32, VOCAB = 258 };
    for (int i = 0; i < 4; i++) {
        bool tied = i & 1;
        int chunks = i < 2 ? 1 : 3;
        const char *o[2] = { tied ? "model.tied=true" : "model.tied=false", "checkpoint.url=" };
        (void)run_case("counted", chunks > 1 ? &three : &staged, 2, o);
        for (int step = 1; step <= STEPS; step++) {
            double want = 4 * WIDTH * ((2 * chunks - 1) * metric("counted", step, "tokens") + (tied ? VOCAB : 0)) +
                          (double)chunks * TREE_NODES * sizeof(double);
            if (metric("counted", step, "pp_sent_bytes") != want)
                fail_msg("step %d sent %.0f bytes, not %.0f", step, metric("counted", step, "pp_sent_bytes"), want);
        }
    }
}

/* For one tp. */
static void with_tensor_parallelism(void **state)
{
    (void)state;
    static const struct mesh_case whole = { 2, { "parallel.tp=2", "parallel.sequence=true" } }, cases[] = {
        { 4, { "parallel.pp=2", "parallel.tp=2", "parallel.sequence=true" } },
        { 8,
          { "parallel.pp=2", "parallel.tp=2", "parallel.sequence=true", "parallel.dp=2", "parallel.zero=3",
            "parallel.schedule=zero-bubble" } },
        { 4, { "parallel.pp=2", "parallel.tp=2", "parallel.sequence=true", "parallel.schedule=interleaved" } },
        { 8,
          { "parallel.pp=2", "parallel.tp=2", "parallel.dp=2", "parallel.sequence=true", "parallel.zero=2",
            "parallel.schedule=interleaved" } }
    };
    const char *o[1] = { "checkpoint.url=" };
    struct job want = run_case("whole", &whole, 1, o);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct job got = run_case("staged", &cases[c], 1, o);
        expect_same_run("staged", &got, "whole", &want, true);
    }
}

/* Without deterministic mode there are no bits to keep, but sums are the same sums. */
static void without_deterministic_mode(void **state)
{
    (void)state;
    static const struct mesh_case staged = { 6, { "parallel.pp=3", "parallel.dp=2" } };
    const char *o[2] = { "train.deterministic=false", "checkpoint.url=" };
    (void)run_case("whole", NULL, 2, o);
    (void)run_case("staged", &staged, 2, o);
    for (int step = 1; step <= STEPS; step++) {
        double got = metric("staged", step, "loss"), want = metric("whole", step, "loss");
        assert_true(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1));
    }
}

/* ---- across resumes ---- */

static void resumes_at_other_stages(void **state)
{
    (void)state;
    static const struct mesh_case hops[] = {
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved", "train.steps=3" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3", "train.steps=4" } },
        { 4,
          { "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved", "parallel.chunks=3", "parallel.zero=3",
            "train.steps=5" } },
        { 6, { "parallel.pp=3", "parallel.stages=2,1,1", "parallel.zero=3", "train.steps=6" } },
    };
    for (int live = 0; live < 2; live++) {
        const char *o[3] = { live ? "algo.reference=live" : "algo.reference=precomputed", "checkpoint.every=1",
                             "checkpoint.url=" },
                   *name = live ? "hops-live" : "hops";
        struct job want = run_case("whole", NULL, 3, o), got = { 0 };
        for (size_t h = 0; h < sizeof hops / sizeof *hops; h++) {
            got = run_case(name, &hops[h], 2, o);
            assert_true(got.resumed_from == (h ? h + 2 : UINT64_MAX));
        }
        expect_same_run(name, &got, "whole", &want, true);
    }
}

/* ---- stages ---- */

static void layers_are_dealt(void **state)
{
    (void)state;
    static const struct {
        const char *list;
        int layers, stages, end[6];
    } good[] = {
        { "", 4, 2, { 3, 6 } },       { NULL, 4, 4, { 1, 3, 4, 6 } },   { "", 12, 3, { 4, 9, 14 } },
        { "", 2, 4, { 1, 2, 3, 4 } }, { "3,5,4", 12, 3, { 4, 9, 14 } }, { "0,12,0", 12, 3, { 1, 13, 14 } },
        { "7", 7, 1, { 9 } },
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        for (int s = 0, from = 0; s < good[i].stages; s++) {
            int begin, end;
            must(stages_cut(good[i].list, good[i].layers, good[i].stages, 1, s, &begin, &end));
            assert_int_equal(begin, from);
            assert_int_equal(end, good[i].end[s]);
            from = end;
        }
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[4], *words;
    } bad[] = {
        { 5, { "parallel.pp=5" }, "parallel.pp: 5 stages are more than the parts" },
        { 2, { "parallel.pp=2", "parallel.stages=1,2" }, "\"1,2\" does not add up" },
        { 2, { "parallel.pp=2", "parallel.stages=1" }, "is too short" },
        { 2, { "parallel.pp=2", "parallel.stages=1,1,0" }, "is too long" },
        { 2, { "parallel.pp=2", "parallel.stages=2,-1" }, "is no list of numbers" },
        { 2, { "parallel.pp=2", "parallel.stages=1;1" }, "is no list of numbers" },
        { 2, { "parallel.pp=2", "parallel.stages=1,1," }, "is too long" },
        { 2, { "parallel.pp=2", "parallel.stages=99999999999999999999,1" }, "more layers than the model" },
        { 3, { "parallel.pp=3", "parallel.stages=1,0,1" }, "in the middle without a layer" },
        { 1, { "parallel.stages=2" }, "needs parallel.pp above 1" },
        { 2, { "parallel.pp=2", "parallel.schedule=gpipe" }, "1f1b, zero-bubble, interleaved" },
        { 2, { "parallel.pp=2", "parallel.chunks=2" }, "parallel.chunks: 2 needs parallel.schedule: interleaved" },
        { 2,
          { "parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=3" },
          "parallel.chunks: 3 on each of parallel.pp: 2 ranks are more than the parts of a model with model.layers: 2 "
          "(embedding, layers and head: legal is 1 to 2)" },
        { 2,
          { "parallel.pp=2", "parallel.schedule=interleaved", "parallel.stages=1,1" },
          "\"1,1\" is too short: it needs 4 numbers of layers, one for each of parallel.pp x parallel.chunks stages" },
        { 3,
          { "parallel.pp=2" },
          "does not fit 3 ranks: dp=0 takes what remains, so the other sizes must multiply to one of 1, 3" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].ranks, bad[i].o, bad[i].words);
}

/* A list in YAML is one in an override. */
static void a_list_of_stages(void **state)
{
    (void)state;
    char text[2048], yaml[2200];
    make_config(text, sizeof text, "list");
    char *at = strstr(text, "parallel: {");
    assert_non_null(at);
    at += strlen("parallel: {");
    snprintf(yaml, sizeof yaml, "%.*spp: 2, stages: [0, 2], %s", (int)(at - text), text, at);
    struct config *cfg;
    must(config_parse(yaml, strlen(yaml), "job", 0, NULL, &cfg));
    assert_string_equal(cfg->parallel.stages, "0,2");
    config_free(cfg);
    snprintf(yaml, sizeof yaml, "%.*sdp: [1, 2], %s", (int)(at - text), text, at);
    status *st = config_parse(yaml, strlen(yaml), "job", 0, NULL, &cfg);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "parallel.dp must have a single value, not a list"));
    status_free(st);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layers_are_dealt),
        cmocka_unit_test(refusals),
        cmocka_unit_test(a_list_of_stages),
        cmocka_unit_test(stages_change_no_bit),
        cmocka_unit_test(every_loss_has_its_bits),
        cmocka_unit_test(fewer_micro_batches_than_stages),
        cmocka_unit_test(adapters_and_frozen_weights),
        cmocka_unit_test(bytes_between_stages),
        cmocka_unit_test(with_tensor_parallelism),
        cmocka_unit_test(without_deterministic_mode),
        cmocka_unit_test(resumes_at_other_stages),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
