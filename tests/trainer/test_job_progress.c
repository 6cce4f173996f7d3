/* test_job_progress: whole jobs with a thread that drives the messages of dp and pp, their ranks threads of this
 * process: the bits of the same jobs without it, across checkpoints, too; and when auto takes one. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

enum { STEPS = 5, WORDS = 7 };

struct mesh_case {
    int ranks;
    const char *o[WORDS];
};

static const struct mesh_case meshes[] = {
    { 2, { "parallel.zero=0" } },
    { 4, { "parallel.zero=1", "parallel.dp_shard=2", "train.grad_dtype=bf16" } },
    { 3, { "parallel.zero=2", "train.deterministic=false" } },
    { 4, { "parallel.zero=3", "parallel.dp_shard=2", "memory.recompute=block", "algo.reference=live" } },
    { 4, { "parallel.pp=2", "parallel.zero=3", "parallel.schedule=zero-bubble", "parallel.tp=2" } },
    { 4, { "parallel.pp=2", "parallel.schedule=interleaved", "parallel.dp=2", "model.layers=4" } },
    { 4,
      { "parallel.ep=2", "parallel.dp=2", "parallel.zero=2", "model.experts=4", "model.experts_per_token=2",
        "model.expert_ffn=24" } },
    { 4, { "parallel.cp=2", "parallel.dp=2", "optim.kind=muon", "parallel.zero=1" } },
};

/* The text of a key of event "run". */
static void run_text(const char *run_name, const char *key, char out[16])
{
    char line[4096], want[32];
    last_event(run_name, "run", line);
    snprintf(want, sizeof want, "\"%s\": \"", key);
    const char *at = strstr(line, want);
    snprintf(out, 16, "%.*s", at ? (int)strcspn(at + strlen(want), "\"") : 0, at ? at + strlen(want) : "");
}

static struct job job(const char *name, const struct mesh_case *m, const char *progress, const char *steps)
{
    char text[2048], got[16];
    const char *o[WORDS + 4] = { progress, steps, "threads=1", "optim.lr=1e-3" };
    int n = 4;
    for (int i = 0; i < WORDS && m->o[i]; i++)
        o[n++] = m->o[i];
    make_config(text, sizeof text, name);
    struct job j = run(text, m->ranks, n, o);
    run_text(name, "progress", got);
    assert_string_equal(got, strrchr(progress, '=') + 1);
    return j;
}

/* Steps 4 and 5 are resumed, from a save of the other kind of job. */
static void bits_do_not_depend_on_who_drives(void **state)
{
    (void)state;
    static const char *const keys[] = { "loss", "grad_norm" };
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
        char name[2][32];
        struct job j[2];
        for (int driven = 0; driven < 2; driven++) {
            snprintf(name[driven], sizeof name[driven], "driven-%zu-%d", i, driven);
            j[0] = job(name[driven], &meshes[i], driven ? "parallel.progress=thread" : "parallel.progress=calls",
                       "train.steps=4");
            assert_int_equal(j[0].saved, 4);
        }
        for (int driven = 0; driven < 2; driven++) {
            j[driven] = job(name[driven], &meshes[i], driven ? "parallel.progress=calls" : "parallel.progress=thread",
                            "train.steps=5");
            assert_int_equal(j[driven].resumed_from, 4);
        }
        if (j[0].weights != j[1].weights)
            fail_msg("mesh %zu: weights %08x, and with a thread first %08x", i, j[0].weights, j[1].weights);
        for (int step = 1; step <= STEPS; step++)
            for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
                if (metric(name[0], step, keys[k]) != metric(name[1], step, keys[k]))
                    fail_msg("mesh %zu, step %d: %s is %.17g and %.17g", i, step, keys[k],
                             metric(name[0], step, keys[k]), metric(name[1], step, keys[k]));
    }
}

static status *look(struct trainer *t)
{
    bool spare = t->world->size > 1 && t->place.share >= workers_count(t->workers) + 0.5;
    return (t->progress != NULL) == spare ? NULL
                                          : ERR(INTERNAL, "%d ranks, share %g: %s", t->world->size, t->place.share,
                                                t->progress ? "a thread" : "none");
}

static void auto_takes_spare_cores(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int threads = 0; threads < 2; threads++) {
            char text[2048];
            make_config(text, sizeof text, "auto");
            struct job j = { .config = text, .after = look };
            const char *o[] = { "train.steps=1", "checkpoint.url=", "algo.warmup_sft_steps=0",
                                threads ? "threads=1" : "threads=0" };
            for (j.override_count = 0; j.override_count < 4; j.override_count++)
                j.overrides[j.override_count] = o[j.override_count];
            must(comm_threads_run(ranks, run_rank, &j));
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bits_do_not_depend_on_who_drives),
        cmocka_unit_test(auto_takes_spare_cores),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
