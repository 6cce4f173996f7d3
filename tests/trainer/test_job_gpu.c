/* test_job_gpu: whole jobs with device: cuda on the emulated GPU, whose memory the host cannot touch, beside the
 * same jobs on the CPU: losses of every step agree within rounding, a checkpoint of one goes on on the other, what is
 * left of a resumed state is what was saved, and a steady step allocates nothing. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

enum { SFT_STEPS = 3, STEPS = 8, CUT = 5, OVERRIDES = 10 };

struct device_case {
    const char *name;
    double tolerance; /* of a loss, relative */
    const char *o[OVERRIDES];
};

static const struct device_case cases[] = {
    { "untied", 1e-5, { "model.tied=false", "model.qkv_bias=true", "memory.recompute=attention" } },
    { "lora", 1e-5, { "lora.rank=4", "lora.targets=[\"*.q_proj\", \"*.down_proj\"]" } },
    { "experts",
      1e-5,
      { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24", "model.balance_loss=0.05",
        "memory.recompute=block" } },
    { "latent",
      1e-5,
      { "model.kv_heads=4", "model.kv_lora_rank=16", "model.q_lora_rank=12", "model.qk_nope_head_dim=8",
        "model.qk_rope_head_dim=4", "model.v_head_dim=6" } },
    { "weighed", 1e-5, { "algo.ld_alpha=0.5", "algo.wpo=true", "algo.nll_alpha=0.5", "algo.loss_2=cdpo" } },
    { "kl", 1e-5, { "algo.loss=kto_pair", "algo.reference=live" } },
    /* on the GPU activations are in bf16 too */
    { "bf16",
      5e-3,
      { "train.dtype=bf16", "algo.reference=live", "model.tied=false", "model.qkv_bias=true", "model.qk_norm=true" } },
    { "bf16-experts",
      5e-3,
      { "train.dtype=bf16", "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24",
        "memory.recompute=attention", "lora.rank=4", "lora.targets=[\"*.q_proj\", \"*.down_proj\"]" } },
};
enum { CASES = sizeof cases / sizeof *cases };

/* Up to that step, of an own name, on this device; `more` may be NULL. */
static struct job run_on(const struct device_case *c, const char *device, const char *name, int steps, const char *more)
{
    char text[2048], on[32], to[32], prefs[160];
    const char *o[OVERRIDES + 11] = { on,
                                      to,
                                      prefs,
                                      "data.heldout=",
                                      "threads=1",
                                      "train.micro_batch=2",
                                      "train.global_batch=4",
                                      "checkpoint.every=0",
                                      "checkpoint.state_hash=true" };
    int n = 9;
    snprintf(prefs, sizeof prefs, "data.prefs=%s/data/prefs_heldout.jsonl", root); /* few rows, for the reference */
    snprintf(on, sizeof on, "device=%s", device);
    snprintf(to, sizeof to, "train.steps=%d", steps);
    make_config(text, sizeof text, name);
    for (int i = 0; i < OVERRIDES && c->o[i]; i++)
        o[n++] = c->o[i];
    if (more)
        o[n++] = more;
    return run(text, 1, n, o);
}

static void compare(const char *a, const char *b, int from, int to, double tolerance)
{
    for (int step = from; step <= to; step++) {
        double want = metric(a, step, "loss"), got = metric(b, step, "loss");
        if (!(fabs(got - want) <= tolerance * fabs(want)))
            fail_msg("step %d: loss %.9g of %s, %.9g of %s", step, want, a, got, b);
        static const char *const sums[] = { "entropy", "rewards/margins", "logits/chosen", "logps/chosen" };
        for (size_t i = 0; i < (step > SFT_STEPS ? sizeof sums / sizeof *sums : 1); i++) {
            want = metric(a, step, sums[i]);
            got = metric(b, step, sums[i]);
            if (!(fabs(got - want) <= 100 * tolerance * (fabs(want) + 1e-3)))
                fail_msg("step %d: %s %.9g of %s, %.9g of %s", step, sums[i], want, a, got, b);
        }
        want = metric(a, step, "grad_norm");
        got = metric(b, step, "grad_norm");
        if (!(fabs(got - want) <= fmin(100 * tolerance, 0.03) * fabs(want)))
            fail_msg("step %d: norm %.9g of %s, %.9g of %s", step, want, a, got, b);
    }
}

static void losses_agree(void **state)
{
    (void)state;
    for (int i = 0; i < CASES; i += UNDER_ASAN ? 3 : 1) {
        const struct device_case *c = &cases[i];
        char cpu[48], cuda[48];
        snprintf(cpu, sizeof cpu, "cpu-%s", c->name);
        snprintf(cuda, sizeof cuda, "cuda-%s", c->name);
        (void)run_on(c, "cpu", cpu, STEPS, "checkpoint.url=");
        (void)run_on(c, "cuda", cuda, STEPS, "checkpoint.url=");
        compare(cpu, cuda, 1, STEPS, c->tolerance);
    }
}

/* A checkpoint of one device goes on on the other, as if nothing had been. */
static void checkpoints_go_on_on_the_other(void **state)
{
    (void)state;
    static const struct device_case plain = { "moved", 1e-5, { "memory.recompute=block" } };
    (void)run_on(&plain, "cpu", "whole", STEPS, "checkpoint.url=");
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "from-cuda" : "from-cpu", *first = i ? "cuda" : "cpu", *then = i ? "cpu" : "cuda";
        char saved[HASHES][32];
        assert_int_equal(run_on(&plain, first, name, CUT, NULL).saved, CUT);
        state_hashes_of(name, "save_start", CUT, saved);
        struct job end = run_on(&plain, then, name, STEPS, NULL);
        assert_int_equal(end.resumed_from, CUT);
        expect_resumed(name, CUT, saved);
        compare("whole", name, 1, STEPS, plain.tolerance);
    }
}

static void steady_steps_allocate_nothing(void **state)
{
    (void)state;
    static const struct device_case plain = { "steady", 0, { "model.tied=false" } };
    (void)run_on(&plain, "cuda", "steady", 6, "checkpoint.url=");
    assert_true(metric("steady", 3, "allocations") == 0 && metric("steady", 6, "allocations") == 0);
}

unsigned long emu_waits(void); /* tests/support/cuda_emu.h */

/* Its only wait is for what the host reports, and for the norm, when all is queued. Scratch of kernels may grow once,
 * at a pack longer than those before: for the stream, and in cudaFree. */
static void steady_steps_wait_once(void **state)
{
    (void)state;
    static const struct device_case jobs[] = {
        { "sft", 0, { "checkpoint.url=" } },
        { "dpo", 0, { "checkpoint.url=", "algo.ld_alpha=0.5", "algo.wpo=true" } },
        { "live", 0, { "checkpoint.url=", "algo.reference=live", "algo.nll_alpha=0.5" } },
    };
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) {
        unsigned long waits[2];
        for (int more = 0; more < 2; more++) {
            unsigned long before = emu_waits();
            const char *sft = i ? NULL : more ? "algo.warmup_sft_steps=6" : "algo.warmup_sft_steps=3";
            (void)run_on(&jobs[i], "cuda", jobs[i].name, more ? 7 : 4, sft);
            waits[more] = emu_waits() - before;
        }
        if (waits[1] - waits[0] != 3 && waits[1] - waits[0] != 3 + 2)
            fail_msg("%s: three steps more wait %lu times", jobs[i].name, waits[1] - waits[0]);
    }
}

/* The same losses, as if they had no kernels. */
static void without_kernels(struct trainer *t)
{
    static struct algo_ops algo[2];
    for (int i = 0; i < t->phases; i++) {
        algo[i] = *t->phase[i].algo;
        algo[i].slopes = NULL;
        t->phase[i].algo = &algo[i];
    }
}

static void losses_of_the_host(void **state)
{
    (void)state;
    static const char *const references[] = { "algo.reference=precomputed", "algo.reference=live" };
    for (int i = UNDER_ASAN; i < 2; i++) {
        char text[2048], prefs[160];
        snprintf(prefs, sizeof prefs, "data.prefs=%s/data/prefs_heldout.jsonl", root);
        struct job j = { .override_count = 8, .before = without_kernels };
        const char *o[] = { "device=cuda",   "threads=1", "train.micro_batch=2", "checkpoint.url=", references[i],
                            "train.steps=5", prefs,       "data.heldout=" };
        memcpy(j.overrides, o, sizeof o);
        make_config(text, sizeof text, "kernels");
        (void)run(text, 1, 8, o);
        make_config(text, sizeof text, "host");
        j.config = text;
        must(comm_threads_run(1, run_rank, &j));
        compare("kernels", "host", 1, 5, 1e-6);
    }
}

int main(void)
{
#if defined __SANITIZE_THREAD__
    puts("skipped: one rank, and 20 times slower under tsan; test_ranks_device and test_zero_device run there");
    return 77;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(losses_agree),
        cmocka_unit_test(checkpoints_go_on_on_the_other),
        cmocka_unit_test(steady_steps_allocate_nothing),
        cmocka_unit_test(steady_steps_wait_once),
        cmocka_unit_test(losses_of_the_host),
    };
    if (setenv("TESSERA_PLUGINS", "emu", 1))
        return 1;
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
