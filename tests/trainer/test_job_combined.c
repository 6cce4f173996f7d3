/* test_job_combined: whole jobs of features that other tests have one by one, their ranks threads of this process, up
 * to 16 of them: against the same job on one rank, whose routes are replayed where the mesh rounds otherwise. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/hf/hf_cli.h"

enum { STEPS = 5 };

#define EXPERTS                                                                                                        \
    "model.layers=3", "model.experts=8", "model.experts_per_token=2", "model.expert_ffn=12", "model.router_bias=true", \
        "model.router=sigmoid", "model.balance_rate=0.01", "model.balance_loss=0.01", "model.first_dense=1"

struct mesh_case {
    int ranks;
    const char *o[8];
};

/* Two lists up to their NULLs. */
static struct job run_case(const char *name, const struct mesh_case *c, const char *const *what)
{
    char text[2048];
    struct job j = { .config = text };
    make_config(text, sizeof text, name);
    static const char *const common[] = { "threads=1", "train.steps=5", "algo.warmup_sft_steps=1", "optim.lr=3e-3" };
    for (size_t i = 0; i < sizeof common / sizeof *common; i++)
        j.overrides[j.override_count++] = common[i];
    for (int i = 0; what[i]; i++)
        j.overrides[j.override_count++] = what[i];
    for (int i = 0; i < 8 && c->o[i]; i++)
        j.overrides[j.override_count++] = c->o[i];
    status *st = comm_threads_run(c->ranks, run_rank, &j);
    must(status_wrap(st, "%s on %d ranks, %s", name, c->ranks, c->o[0]));
    return j;
}

static const struct mesh_case one = { 1, { "parallel.zero=0" } };

static void routes_of(const char *name, char record[160], char replay[160])
{
    snprintf(record, 160, "train.routes=record:%s/routes-%s", root, name);
    snprintf(replay, 160, "train.routes=replay:%s/routes-%s", root, name);
}

static void expect_near(const char *name, const char *want, double bound, const struct mesh_case *c)
{
    static const char *const keys[] = { "loss", "grad_norm" };
    for (int step = 1; step <= STEPS; step++)
        for (int k = 0; k < 2; k++) {
            double a = metric(name, step, keys[k]), b = metric(want, step, keys[k]);
            if (!(fabs(a - b) <= bound * fmax(fabs(b), 0.1)))
                fail_msg("%d ranks, %s: step %d: %s is %.9g, not %.9g", c->ranks, c->o[0], step, keys[k], a, b);
        }
}

static void expect_same(const char *name, const char *want, const struct job *got, const struct job *whole,
                        const struct mesh_case *c)
{
    expect_near(name, want, 0, c);
    if (got->hashes.weights != whole->hashes.weights || got->hashes.moments != whole->hashes.moments ||
        got->hashes.reference != whole->hashes.reference)
        fail_msg("%d ranks, %s: other weights, moments or reference", c->ranks, c->o[0]);
}

/* ---- pipeline and data, 8 ranks ---- */

static void eight_ranks_change_no_bit(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 8, { "parallel.pp=4", "parallel.dp=2", "parallel.zero=1" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=3", "parallel.schedule=interleaved" } },
        { 8, { "parallel.pp=4", "parallel.dp=2", "parallel.zero=2", "parallel.schedule=zero-bubble" } },
        { 8, { "parallel.pp=2", "parallel.dp=4", "parallel.zero=3", "parallel.dp_shard=2", "memory.recompute=block" } },
    };
    static const char *const kinds[][16] = {
        { EXPERTS, "checkpoint.url=", "algo.reference=live", "algo.ref_sync_steps=2" },
        { EXPERTS, "checkpoint.url=", "optim.kind=muon", "train.param_dtype=bf16", "train.grad_dtype=bf16",
          "train.param_rounding=stochastic" },
    };
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        struct job want = run_case("whole", &one, kinds[k]);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (!runs_kind(c, k, 2))
                continue;
            struct job got = run_case("cut", &cases[c], kinds[k]);
            expect_same("cut", "whole", &got, &want, &cases[c]);
        }
    }
}

/* ---- experts on several ranks ---- */

/* Gradients that are rounded on the way: those of other ranks' experts once, not once a micro-batch. */
static void bf16_experts(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 4, { "parallel.ep=2", "parallel.zero=2" } },
        { 8, { "parallel.ep=2", "parallel.zero=2", "parallel.dp_shard=2" } },
        { 8, { "parallel.ep=4", "parallel.pp=2", "parallel.zero=2" } },
        { 8, { "parallel.ep=2", "parallel.cp=2", "parallel.zero=2", "memory.recompute=attention" } },
    };
    char record[160], replay[160];
    routes_of("bf16", record, replay);
    const char *what[] = {
        EXPERTS, "train.param_dtype=bf16", "train.grad_dtype=bf16", "checkpoint.url=", record, NULL
    };
    (void)run_case("whole", &one, what);
    what[12] = replay;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        (void)run_case("cut", &cases[c], what);
        expect_near("cut", "whole", 4e-3, &cases[c]);
    }
}

static void bf16_experts_go_on_anywhere(void **state)
{
    (void)state;
    static const struct mesh_case hops[] = { { 4, { "parallel.ep=2", "parallel.zero=2", "train.steps=3" } },
                                             { 3, { "parallel.zero=3", "train.steps=4" } },
                                             { 8, { "parallel.ep=4", "parallel.zero=2", "train.steps=5" } } };
    static const char *const what[] = { EXPERTS,
                                        "train.param_dtype=bf16",
                                        "train.grad_dtype=bf16",
                                        "train.param_rounding=stochastic",
                                        "checkpoint.every=1",
                                        "checkpoint.state_hash=true",
                                        NULL };
    char saved[HASHES][32];
    for (int i = 0; i < 3; i++) {
        struct job j = run_case("bf16-hops", &hops[i], what);
        if (i) {
            assert_int_equal(j.resumed_from, 2 + i);
            expect_resumed("bf16-hops", 2 + i, saved);
        }
        state_hashes_of("bf16-hops", "save_start", 3 + i, saved);
    }
}

/* Weights of a folder of Hugging Face: what was exported is what begins, and it learns what one rank does. */
static void folders_onto_cut_experts(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 4, { "parallel.ep=2", "parallel.zero=3", "parallel.bucket=8K" } },
        { 8, { "parallel.ep=4", "parallel.zero=3", "parallel.dp_shard=4" } },
        { 8, { "parallel.ep=2", "parallel.pp=2", "parallel.zero=3", "parallel.schedule=interleaved" } },
        { 8, { "parallel.ep=2", "parallel.tp=2", "parallel.zero=3" } },
        { 8, { "parallel.ep=2", "parallel.cp=2", "parallel.zero=3" } },
    };
    static const char *const source[] = { EXPERTS, "model.qk_norm=true", "checkpoint.every=5", NULL };
    char record[160], replay[160], url[160], folder[160], from[192];
    struct job made = run_case("source", &one, source);
    snprintf(url, sizeof url, "file:%s/source/ckpt", root);
    snprintf(folder, sizeof folder, "%s/folder", root);
    snprintf(from, sizeof from, "model.init_from=%s", folder);
    char *argv[] = { "export", url, "5", folder };
    must(hf_cli(4, argv));
    routes_of("folder", record, replay);
    const char *what[] = { EXPERTS, "checkpoint.url=", from, "run.seed=11", "model.qk_norm=true", record, NULL },
               *still[] = { EXPERTS,      "checkpoint.url=",      from, "model.qk_norm=true",
                            "optim.lr=0", "model.balance_rate=0", NULL };
    (void)run_case("whole", &one, what);
    what[13] = replay;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        (void)run_case("cut", &cases[c], what);
        expect_near("cut", "whole", 1e-5, &cases[c]);
        assert_true(run_case("kept", &cases[c], still).hashes.weights == made.hashes.weights);
    }
}

/* ---- 16 ranks ---- */

static void sixteen_ranks(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 16, { "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.tp=2", "parallel.sequence=true" } },
        { 16,
          { "parallel.pp=2", "parallel.ep=4", "parallel.cp=2", "parallel.zero=3", "parallel.schedule=zero-bubble" } },
        { 16, { "parallel.dp=4", "parallel.ep=2", "parallel.cp=2", "parallel.zero=2", "parallel.dp_shard=4" } },
        { 16, { "parallel.dp=2", "parallel.ep=8", "parallel.zero=3", "memory.recompute=block" } },
    };
    char record[160], replay[160];
    routes_of("sixteen", record, replay);
    const char *what[] = { EXPERTS, "checkpoint.url=", "train.global_batch=24", record, NULL };
    (void)run_case("whole", &one, what);
    what[11] = replay;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        (void)run_case("cut", &cases[c], what);
        expect_near("cut", "whole", 1e-5, &cases[c]);
    }
}

/* ---- Muon ---- */

/* Resumed at other cuts of the experts and of the rest, the run is the undisturbed one of one rank. */
static void muon_of_cut_experts_goes_on_anywhere(void **state)
{
    (void)state;
    static const struct mesh_case hops[] = {
        { 4, { "parallel.ep=2", "parallel.zero=3", "parallel.bucket=8K", "train.steps=2" } },
        { 8, { "parallel.ep=4", "parallel.zero=3", "parallel.dp_shard=4", "train.steps=3" } },
        { 4, { "parallel.ep=2", "parallel.pp=2", "parallel.zero=3", "train.steps=4" } },
        { 8, { "parallel.ep=2", "parallel.cp=2", "parallel.zero=3", "train.steps=5" } },
    };
    char record[160], replay[160], saved[HASHES][32];
    routes_of("muon", record, replay);
    const char *what[] = { EXPERTS,
                           "optim.kind=muon",
                           "data.heldout=",
                           "algo.reference=live",
                           "checkpoint.state_hash=true",
                           "checkpoint.every=1",
                           record,
                           NULL };
    (void)run_case("whole", &one, what);
    what[14] = replay;
    for (int i = 0; i < 4; i++) {
        struct job j = run_case("muon-hops", &hops[i], what);
        if (i) {
            assert_int_equal(j.resumed_from, 1 + i);
            expect_resumed("muon-hops", 1 + i, saved);
        }
        state_hashes_of("muon-hops", "save_start", 2 + i, saved);
    }
    expect_near("muon-hops", "whole", 2e-5, &hops[3]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(eight_ranks_change_no_bit),
        cmocka_unit_test(bf16_experts),
        cmocka_unit_test(bf16_experts_go_on_anywhere),
        cmocka_unit_test(folders_onto_cut_experts),
        cmocka_unit_test(sixteen_ranks),
        cmocka_unit_test(muon_of_cut_experts_goes_on_anywhere),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
