/* test_job_moe: whole jobs of models with routed experts, their ranks threads of this process: the same bits on any dp,
 * pp and ZeRO stage, as without experts; on other meshes losses within rounding; across resumes, biases included. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

enum { STEPS = 4 };

struct mesh_case {
    int ranks;
    const char *o[6];
};

/* Two kinds of layers with experts. */
static const char *const kinds[][9] = {
    { "model.layers=3", "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24", "model.dense_layers=1",
      "model.balance_loss=0.05", "algo.reference=live" },
    { "model.layers=3", "model.experts=8", "model.experts_per_token=3", "model.expert_ffn=16", "model.first_dense=1",
      "model.shared_experts=2", "model.router=sigmoid", "model.router_bias=true", "model.balance_rate=0.01" },
};

static struct job run_case(const char *name, int kind, const struct mesh_case *c, const char *const *more)
{
    char text[2048];
    struct job j = { .config = text };
    make_config(text, sizeof text, name);
    static const char *const common[] = { "threads=1",      "train.steps=4", "algo.warmup_sft_steps=2",
                                          "optim.clip=0.3", "optim.lr=2e-3", NULL };
    const char *const *lists[] = { common, kinds[kind], c ? c->o : NULL, more };
    for (size_t l = 0; l < sizeof lists / sizeof *lists; l++)
        for (int i = 0; lists[l] && i < 9 && lists[l][i]; i++)
            j.overrides[j.override_count++] = lists[l][i];
    must(comm_threads_run(c ? c->ranks : 1, run_rank, &j));
    return j;
}

static const char *const keys[] = { "loss", "grad_norm", "balance_loss", "expert_load_max", "expert_load_min" };
enum { KEYS = sizeof keys / sizeof *keys };
static const char *const unsaved[] = { "checkpoint.url=", NULL };

static void same_bits(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.dp=2", "parallel.zero=0" } },
        { 4, { "parallel.dp=4", "parallel.zero=1" } },
        { 2, { "parallel.dp=2", "parallel.zero=2" } },
        { 2, { "parallel.pp=2", "parallel.zero=1", "parallel.schedule=zero-bubble", "memory.recompute=block" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=1" } },
        { 2, { "parallel.dp=2", "parallel.zero=3" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3" } },
    };
    for (int kind = 0; kind < 2; kind++) {
        struct job want = run_case("whole", kind, NULL, unsaved);
        assert_true(metric("whole", STEPS, "expert_load_max") > 1 && metric("whole", STEPS, "expert_load_min") < 1);
        assert_true(metric("whole", STEPS, "balance_loss") > 1);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            struct job got = run_case("spread", kind, &cases[c], unsaved);
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++)
                    if (metric("spread", step, keys[k]) != metric("whole", step, keys[k]))
                        fail_msg("kind %d, mesh %zu, step %d: %s is %.17g, not %.17g", kind, c, step, keys[k],
                                 metric("spread", step, keys[k]), metric("whole", step, keys[k]));
            assert_true(got.hashes.weights == want.hashes.weights);
            assert_true(got.hashes.moments == want.hashes.moments);
            assert_true(got.hashes.reference == want.hashes.reference);
        }
    }
}

/* What keeps loads equal does something. */
static void loads_become_equal(void **state)
{
    (void)state;
    static const char *const off[][3] = { { "model.balance_loss=0", "checkpoint.url=" },
                                          { "model.balance_rate=0", "checkpoint.url=" } };
    for (int kind = 0; kind < 2; kind++) {
        struct job with = run_case("with", kind, NULL, unsaved), without = run_case("without", kind, NULL, off[kind]);
        assert_true(metric("with", 1, "balance_loss") == metric("without", 1, "balance_loss"));
        assert_true(metric("with", 1, "loss") == metric("without", 1, "loss"));
        assert_true((metric("with", 1, "grad_norm") == metric("without", 1, "grad_norm")) == (kind == 1));
        assert_true(with.hashes.weights != without.hashes.weights);
    }
}

static void tensor_parallel(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.tp=2", "parallel.zero=0" } },
        { 4, { "parallel.tp=2", "parallel.dp=2", "parallel.sequence=true" } },
        { 4, { "parallel.tp=4", "parallel.sequence=true", "memory.recompute=block" } },
    };
    for (int kind = 0; kind < 2; kind++) {
        (void)run_case("whole", kind, NULL, unsaved);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            (void)run_case("cut", kind, &cases[c], unsaved);
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++) {
                    double got = metric("cut", step, keys[k]), want = metric("whole", step, keys[k]);
                    if (!(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1)))
                        fail_msg("kind %d, mesh %zu, step %d: %s is %.12g, not %.12g", kind, c, step, keys[k], got,
                                 want);
                }
        }
    }
}

/* Saved at one mesh, resumed at another: the same weights and moments (biases are weights), and the same bits after. */
static void resumes(void **state)
{
    (void)state;
    static const struct mesh_case from = { 4, { "parallel.pp=2", "parallel.dp=2" } },
                                  to[] = { { 1, { "parallel.zero=0" } },
                                           { 2, { "parallel.dp=2", "parallel.zero=1" } } };
    static const char *const all[] = { "checkpoint.every=1", "checkpoint.keep_last=0", "checkpoint.state_hash=true",
                                       NULL },
                             *const rest[] = { "checkpoint.every=1",         "checkpoint.keep_last=0",
                                               "checkpoint.resume=2",        "checkpoint.rewind=true",
                                               "checkpoint.state_hash=true", NULL };
    for (int kind = 0; kind < 2; kind++) {
        const char *name = kind ? "moved-1" : "moved-0";
        char saved[32], got[32];
        struct job want = run_case(name, kind, &from, all);
        double loss = metric(name, STEPS, "loss");
        last_value(name, "save_start", 2, "weights_hash", saved);
        for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
            struct job again = run_case(name, kind, &to[c], rest);
            assert_int_equal(again.resumed_from, 2);
            last_value(name, "resume", 2, "weights_hash", got);
            assert_string_equal(got, saved);
            assert_true(metric(name, STEPS, "loss") == loss);
            assert_true(again.hashes.weights == want.hashes.weights && again.hashes.moments == want.hashes.moments);
        }
    }
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[6], *words;
    } bad[] = {
        { 1, { "model.experts=4", "model.expert_ffn=8" }, "model.experts_per_token: 0 is not one of 1 to" },
        { 1, { "model.experts=4", "model.experts_per_token=5", "model.expert_ffn=8" }, "is not one of 1 to" },
        { 1, { "model.experts=4", "model.experts_per_token=2" }, "model.expert_ffn: 0" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.dense_layers=7" },
          "model.dense_layers: \"7\" is not one of the layers 0 to 1" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.router_groups=3" },
          "model.router_groups: 3 does not divide model.experts: 4" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.router_groups=4" },
          "too few to take model.experts_per_token: 2" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.balance_rate=0.1" },
          "needs model.router_bias" },
        { 2,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=9", "parallel.tp=2" },
          "model.expert_ffn: 9 (this model can be cut over 1 ranks)" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].ranks, bad[i].o, bad[i].words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refusals),        cmocka_unit_test(same_bits), cmocka_unit_test(loads_become_equal),
        cmocka_unit_test(tensor_parallel), cmocka_unit_test(resumes),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
