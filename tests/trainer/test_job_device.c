/* test_job_device: whole jobs with device: cuda on the emulated GPU (tests/support/cuda_emu.h), whose memory the host
 * cannot touch; ranks are threads of this process that share it, and its memory moves between them as over NCCL. Losses
 * and norms on every axis of the mesh are those of one rank on the CPU; what was saved is resumed at other meshes and
 * on the CPU. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

enum { STEPS = 3, MESH_WORDS = 6 };

static const char *const common[] = { "threads=1",           "train.steps=3",           "train.global_batch=4",
                                      "train.micro_batch=1", "algo.warmup_sft_steps=1", "model.hidden=16",
                                      "model.ffn=32",        "data.max_length=48",      "data.heldout=" };
enum { COMMON = sizeof common / sizeof *common };

struct mesh_case {
    int ranks;
    const char *o[MESH_WORDS]; /* up to a NULL */
};

/* Run it under that name, on the device or the CPU. */
static struct job run_case(const char *name, const struct mesh_case *c, bool device, const char *const *more)
{
    char text[2048], prefs[160];
    const char *o[32];
    int n = 0;
    snprintf(prefs, sizeof prefs, "data.prefs=%s/data/prefs_heldout.jsonl", root); /* few rows, for the reference */
    for (; n < COMMON; n++)
        o[n] = common[n];
    o[n++] = prefs;
    o[n++] = device ? "device=cuda" : "device=cpu";
    for (int i = 0; i < MESH_WORDS && c->o[i]; i++)
        o[n++] = c->o[i];
    for (int i = 0; more && more[i]; i++)
        o[n++] = more[i];
    make_config(text, sizeof text, name);
    return run(text, c->ranks, n, o);
}

static double tolerance = 1e-5; /* relative */

static void expect_near(const char *got_run, const char *want_run, int step, const char *key, const char *what)
{
    double got = metric(got_run, step, key), want = metric(want_run, step, key);
    if (!(fabs(got - want) <= tolerance * fmax(fabs(want), 0.1)))
        fail_msg("%s: step %d: %s is %.9g, not %.9g", what, step, key, got, want);
}

static void expect_run(const char *got, const char *want, const struct mesh_case *c)
{
    char what[256] = "";
    for (int i = 0; i < MESH_WORDS && c->o[i]; i++)
        snprintf(what + strlen(what), sizeof what - strlen(what), "%s ", c->o[i]);
    for (int step = 1; step <= STEPS; step++) {
        expect_near(got, want, step, "loss", what);
        expect_near(got, want, step, "grad_norm", what);
        expect_near(got, want, step, "entropy", what);
        if (step > 1)
            expect_near(got, want, step, "rewards/margins", what);
    }
}

static const struct mesh_case one = { 1, { "parallel.zero=0" } };
static const char *const no_saves[] = { "checkpoint.url=", NULL };

/* With one rank on the CPU, or, if activations are bf16, which they are on a GPU alone, with one on the GPU. */
static void compare(const struct mesh_case *cases, size_t n, const char *const *more)
{
    bool low = tolerance > 1e-4;
    const char *settings[8] = { "checkpoint.url=" };
    for (int i = 0; more && more[i]; i++)
        settings[i + 1] = more[i];
    (void)run_case("cpu", &one, low, settings);
    for (size_t i = 0; i < n; i++) {
        (void)run_case("gpu", &cases[i], true, settings);
        expect_run("gpu", "cpu", &cases[i]);
    }
}

static void test_axes(void **state)
{
    static const struct mesh_case cases[] = {
        { 2, { "parallel.dp=2", "parallel.zero=3" } },
        { 2, { "parallel.tp=2", "parallel.zero=0" } },
        { 2, { "parallel.tp=2", "parallel.sequence=true", "memory.recompute=block" } },
        { 2, { "parallel.pp=2" } },
        { 2, { "parallel.pp=2", "parallel.schedule=zero-bubble" } },
        { 2, { "parallel.pp=2", "parallel.schedule=interleaved" } },
        { 2, { "parallel.cp=2" } },
    };
    (void)state;
    compare(cases, sizeof cases / sizeof *cases, NULL);
}

static void test_together(void **state)
{
    static const struct mesh_case cases[] = {
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=1", "model.tied=true" } },
        { 4, { "parallel.dp=2", "parallel.tp=2", "parallel.zero=3", "parallel.sequence=true" } },
        { 4, { "parallel.cp=2", "parallel.dp=2", "parallel.zero=2", "memory.recompute=attention" } },
    };
    (void)state;
    compare(cases, sizeof cases / sizeof *cases, NULL);
}

/* Routed experts on several ranks: counts by the host, rows from device to device. */
static void test_experts(void **state)
{
    static const char *const experts[] = { "model.experts=4",      "model.experts_per_token=2", "model.expert_ffn=24",
                                           "model.dense_layers=1", "model.balance_loss=0.05",   NULL };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.ep=2", "parallel.zero=3" } },
    };
    (void)state;
    compare(cases, sizeof cases / sizeof *cases, experts);
}

/* Activations in bf16, on every axis: gathered, summed, sent and cut. */
static void test_low(void **state)
{
    static const char *const bf16[] = { "train.dtype=bf16",    "model.experts=4",      "model.experts_per_token=2",
                                        "model.expert_ffn=24", "model.dense_layers=1", NULL };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.tp=2", "parallel.zero=0" } },
        { 2, { "parallel.tp=2", "parallel.sequence=true", "memory.recompute=attention" } },
        { 2, { "parallel.pp=2", "parallel.schedule=zero-bubble" } },
        { 2, { "parallel.cp=2", "parallel.zero=3" } },
        { 2, { "parallel.ep=2" } },
    };
    (void)state;
    tolerance = 1e-2;
    compare(cases, sizeof cases / sizeof *cases, bf16);
    tolerance = 1e-5;
}

/* Saved in the middle at one mesh, resumed at another one and on the CPU: as if nothing had been. */
static void test_moves(void **state)
{
    static const struct mesh_case cases[] = {
        { 2, { "parallel.tp=2" } },
        { 2, { "parallel.dp=2", "parallel.zero=3" } },
        { 1, { "parallel.zero=1" } },
    };
    static const char *const first[] = { "train.steps=2", NULL };
    (void)state;
    (void)run_case("cpu", &one, false, no_saves);
    for (int i = 1; i < 3; i++) { /* the last one on the CPU */
        char name[16];
        snprintf(name, sizeof name, "moved%d", i);
        (void)run_case(name, &cases[i - 1], true, first);
        struct job j = run_case(name, &cases[i], i < 2, NULL);
        assert_int_equal(j.resumed_from, 2);
        expect_run(name, "cpu", &cases[i]);
    }
}

static int open_gpu(void **state)
{
    setenv("TESSERA_PLUGINS", "emu", 1); /* beside the test */
    setenv("TESSERA_EMU_LATE", "1", 0);  /* work is done as late as streams and events allow */
    setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
    return make_data(state);
}

int main(void)
{
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    puts("skipped: 30 times slower under a sanitizer; test_ranks_device and test_zero_device run there");
    return 77;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_axes), cmocka_unit_test(test_together), cmocka_unit_test(test_experts),
        cmocka_unit_test(test_low),  cmocka_unit_test(test_moves),
    };
    return cmocka_run_group_tests(tests, open_gpu, remove_data);
}
