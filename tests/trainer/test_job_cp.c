/* test_job_cp: whole jobs with context parallelism, their ranks threads of this process: every loss, evaluation and
 * metric against one rank, beside all other axes; the same bits for any dp, pp and ZeRO stage at one cp; what ranks
 * send each other; a micro-batch that is too long for one rank's memory; saved at one mesh, resumed at others. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/data/tokenizer.h"

enum { MESH_WORDS = 6 };
struct mesh_case {
    int ranks;
    const char *o[MESH_WORDS]; /* up to a NULL */
};
static const struct mesh_case one = { 1, { "parallel.zero=1" } };

/* Overrides of the case behind the first n of o; how many there are then. */
static int add_mesh(const char **o, int n, const struct mesh_case *c)
{
    for (int i = 0; i < MESH_WORDS && c->o[i]; i++)
        o[n++] = c->o[i];
    return n;
}

/* ---- against one rank ---- */

static void expect_close(const char *run_name, int step, const char *key, double got, double want)
{
    bool both_null = isnan(got) && isnan(want);
    if (!both_null && !(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1)))
        fail_msg("%s: step %d: %s is %.12g, not %.12g", run_name, step, key, got, want);
}

static void expect_near(const char *got_run, const char *want_run, int step, const char *key)
{
    expect_close(got_run, step, key, metric(got_run, step, key), metric(want_run, step, key));
}

static const char *const keys[] = { "loss", "grad_norm", "entropy", "mean_token_accuracy" };
static const char *const pair_keys[] = { "rewards/chosen", "rewards/margins", "logps/chosen", "logits/rejected" };
static const char *const eval_keys[] = { "rewards/accuracy", "logps/margin" };

static void expect_run(const char *got, const char *want, int steps)
{
    for (int step = 1; step <= steps; step++) {
        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
            expect_near(got, want, step, keys[k]);
        for (size_t k = 0; step > 3 && k < sizeof pair_keys / sizeof *pair_keys; k++)
            expect_near(got, want, step, pair_keys[k]);
    }
    for (size_t k = 0; k < sizeof eval_keys / sizeof *eval_keys; k++) {
        char a[32], b[32];
        last_value(got, "eval", steps, eval_keys[k], a);
        last_value(want, "eval", steps, eval_keys[k], b);
        expect_close(got, steps, eval_keys[k], strtod(a, NULL), strtod(b, NULL));
    }
}

enum { STEPS = 6 };

/* o[count]: what the run on one rank and those on each of the meshes share. */
static void compare(const char *const *common, int count, const struct mesh_case *cases, size_t n)
{
    char text[2048];
    const char *o[16] = { "checkpoint.url=", "train.steps=6", "threads=1" };
    int fixed = 3;
    for (int i = 0; i < count; i++)
        o[fixed++] = common[i];
    make_config(text, sizeof text, "whole");
    (void)run(text, 1, add_mesh(o, fixed, &one), o);
    for (size_t c = 0; c < n; c++) {
        make_config(text, sizeof text, "shared");
        (void)run(text, cases[c].ranks, add_mesh(o, fixed, &cases[c]), o);
        expect_run("shared", "whole", STEPS);
    }
}

/* Every algorithm, with references of both kinds. Packs of one row have too few tokens for some of these ranks. */
static void every_loss_as_on_one_rank(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.cp=2", "parallel.zero=1" } },
        { 3, { "parallel.cp=3", "memory.recompute=attention" } },
    };
    for (int a = 0; a < ALGORITHMS; a++) {
        const char *o[] = { algorithms[a][0], algorithms[a][1], labelled_override(),
                            a % 2 ? "algo.reference=live" : "algo.reference=precomputed" };
        if (UNDER_TSAN)
            compare(o, 4, &cases[a % 2], 1);
        else
            compare(o, 4, cases, 2);
    }
}

static void beside_all_other_axes(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 8, { "parallel.cp=8", "memory.recompute=block" } },
        { 4, { "parallel.cp=2", "parallel.tp=2", "parallel.sequence=true", "memory.recompute=attention" } },
        { 4, { "parallel.cp=2", "parallel.pp=2", "parallel.zero=1" } },
        { 8, { "parallel.cp=2", "parallel.pp=4", "parallel.schedule=zero-bubble", "memory.recompute=block" } },
        { 4, { "parallel.cp=2", "parallel.dp=2", "parallel.zero=3" } },
        { 6, { "parallel.cp=3", "parallel.dp=2", "parallel.zero=2" } },
        { 8, { "parallel.cp=2", "parallel.dp=2", "parallel.tp=2", "parallel.zero=3", "parallel.dp_shard=2" } },
        { 8, { "parallel.cp=2", "parallel.pp=2", "parallel.tp=2", "parallel.schedule=interleaved" } },
        { 4, { "parallel.cp=2", "parallel.dp=2", "parallel.zero=1", "train.deterministic=false" } },
    };
    static const struct mesh_case whole_matrices[] = {
        { 4, { "parallel.cp=2", "parallel.dp=2" } },
        { 6, { "parallel.cp=3", "parallel.pp=2", "memory.recompute=block" } },
    };
    const char *tied[] = { "algo.reference=live", "model.qk_norm=true" };
    compare(tied, 2, cases, sizeof cases / sizeof *cases);
    const char *muon[] = { "optim.kind=muon", "model.tied=false", "model.sliding_window=5" };
    compare(muon, 3, whole_matrices, 2);
}

/* Loads and the balance loss are of all tokens of a pack, and of no row that is none. */
static void routed_experts(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 3, { "parallel.cp=3", "memory.recompute=block" } },
        { 4, { "parallel.cp=2", "parallel.tp=2", "parallel.sequence=true" } },
    };
    static const char *const more[] = { "balance_loss", "expert_load_max", "expert_load_min" };
    const char *o[] = { "model.experts=4",        "model.experts_per_token=2", "model.expert_ffn=16",
                        "model.balance_loss=0.5", "model.router_bias=true",    "model.balance_rate=0.01" };
    char text[2048];
    for (int c = -1; c < 2; c++) {
        const char *all[16] = { "checkpoint.url=", "train.steps=6", "threads=1" };
        memcpy(all + 3, o, sizeof o);
        make_config(text, sizeof text, c < 0 ? "whole" : "shared");
        const struct mesh_case *m = c < 0 ? &one : &cases[c];
        (void)run(text, m->ranks, add_mesh(all, 3 + (int)(sizeof o / sizeof *o), m), all);
        if (c >= 0)
            expect_run("shared", "whole", STEPS);
        for (int step = 1; c >= 0 && step <= STEPS; step++)
            for (size_t k = 0; k < sizeof more / sizeof *more; k++)
                expect_near("shared", "whole", step, more[k]);
    }
}

static void adapters(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.cp=2", "parallel.zero=2" } },
        { 4, { "parallel.cp=2", "parallel.tp=2", "memory.recompute=attention" } },
    };
    const char *o[] = { "lora.targets=[\"*.q_proj\", \"*.down_proj\"]", "lora.rank=3" };
    compare(o, 2, cases, 2);
}

/* ---- for one cp ---- */

static void other_axes_change_no_bit(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.cp=2", "parallel.zero=0" } },
        { 4, { "parallel.cp=2", "parallel.dp=2", "parallel.zero=1", "memory.recompute=attention" } },
        { 8, { "parallel.cp=2", "parallel.dp=4", "parallel.zero=3", "parallel.dp_shard=2" } },
        { 4, { "parallel.cp=2", "parallel.pp=2", "parallel.zero=1", "memory.recompute=block" } },
    };
    uint64_t hash[2] = { 0 };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char text[2048];
        make_config(text, sizeof text, c ? "wide" : "narrow");
        const char *o[16] = { "checkpoint.url=", "optim.clip=0.3", "train.steps=6" };
        hash[c > 0] = run(text, cases[c].ranks, add_mesh(o, 3, &cases[c]), o).hashes.weights;
        assert_true(!c || hash[0] == hash[1]);
        for (int step = 1; c && step <= STEPS; step++) {
            assert_true(metric("wide", step, "loss") == metric("narrow", step, "loss"));
            assert_true(metric("wide", step, "grad_norm") == metric("narrow", step, "grad_norm"));
        }
    }
}

/* ---- bytes ---- */

/* Rows of this rank's share of the micro-batches of a step: in the order of `row`, one row of the data set each. */
static uint64_t shared_rows(struct trainer *t, uint64_t first)
{
    struct phase *p = &t->phase[t->phases - 1];
    uint64_t n = 0, c = (uint64_t)t->cp->size;
    stream_deal(&p->stream, first);
    for (uint32_t k = 0; k < p->stream.global_batch; k++) {
        pack_build(&p->pack, p->stream.row + k, 1);
        n += ((uint64_t)p->pack.in.tokens + c - 1) / c;
    }
    return n;
}

static double want_sent;

/* The formula of docs/parallelism.md for the last step. */
static status *count_sent(struct trainer *t)
{
    if (t->world->rank)
        return NULL;
    uint64_t c = (uint64_t)t->cp->size, rows = shared_rows(t, t->samples[t->phases - 1] - 8),
             keys_and_values = (uint64_t)t->model->params.p[3].value.dim[0], layers = 2;
    uint64_t moved = t->cfg->memory.recompute ? 8 : 6, head = 32 * TOKEN_VOCAB;
    uint64_t elems = t->model->params.total + (head + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    want_sent = (double)((c - 1) * rows * (moved * layers * keys_and_values + 5) * sizeof(float)) +
                (double)(2 * (c - 1) * elems * sizeof(float)) / (double)c;
    return NULL;
}

static void bytes_are_those_of_the_formula(void **state)
{
    (void)state;
    for (int c = 2; c <= 4; c += 2)
        for (int again = 0; again < 2; again++) {
            char text[2048];
            make_config(text, sizeof text, "counted");
            struct job j = { .config = text, .after = count_sent, .override_count = 6 };
            const char *o[] = { "checkpoint.url=",
                                "train.steps=6",
                                c == 2 ? "parallel.cp=2" : "parallel.cp=4",
                                again ? "memory.recompute=attention" : "memory.recompute=none",
                                "algo.reference=precomputed",
                                "train.eval_every=0" };
            memcpy(j.overrides, o, sizeof o);
            must(comm_threads_run(c, run_rank, &j));
            double got = metric("counted", STEPS, "cp_sent_bytes");
            if (fabs(got - want_sent) > 0.5)
                fail_msg("cp %d, again %d: %.0f bytes were sent, not %.0f", c, again, got, want_sent);
        }
}

/* ---- memory ---- */

static size_t held[9];

static status *look_at_memory(struct trainer *t)
{
    if (t->world->rank == 0)
        held[t->cp ? t->cp->size : 1] = t->tape->arena.peak_bytes;
    return NULL;
}

/* 8 rows a micro-batch: what one rank has no memory for fits on four. */
static void more_ranks_hold_longer_packs(void **state)
{
    (void)state;
    static const char *const sizes[] = { "parallel.cp=1", "parallel.cp=2", "parallel.cp=4" };
    const char *o[] = { "checkpoint.url=", "train.steps=4",   "train.micro_batch=8",  "data.tasks=",
                        "model.ffn=128",   "model.layers=12", "memory.activations=0", NULL };
    for (int i = 0; i < 3; i++) {
        char text[2048];
        make_config(text, sizeof text, "long");
        struct job j = { .config = text, .after = look_at_memory, .override_count = 8 };
        memcpy(j.overrides, o, sizeof o);
        j.overrides[7] = sizes[i];
        must(comm_threads_run(1 << i, run_rank, &j));
    }
    /* keys and values of one of twelve layers are whole: 4 of some 12 (6 C + 3 Q + 3 K + 3 F) */
    assert_true((double)held[2] < 0.56 * (double)held[1] && (double)held[4] < 0.34 * (double)held[1]);
    char cap[64];
    size_t enough = held[4] + (5 << 20); /* blocks of 4 MiB are taken while sizes are not known */
    assert_true(enough < held[2]);
    snprintf(cap, sizeof cap, "memory.activations=%zu", enough);
    const char *capped[16] = { o[0], o[1], o[2], o[3], o[4], o[5], cap, sizes[2] };
    char text[2048];
    make_config(text, sizeof text, "long");
    (void)run(text, 4, 8, capped);
    struct job j = { .config = text, .override_count = 8 };
    memcpy(j.overrides, capped, sizeof capped);
    j.overrides[7] = sizes[0];
    status *st = comm_threads_run(1, run_rank, &j);
    assert_int_equal(status_code(st), ST_NO_MEMORY);
    status_free(st);
}

/* ---- from one mesh to another ---- */

enum { AT = 5 };

static void resumes_at_another_mesh(void **state)
{
    (void)state;
    static const struct mesh_case to[] = {
        { 1, { "parallel.cp=1" } },
        { 4, { "parallel.cp=4", "parallel.zero=1" } },
        { 8, { "parallel.cp=2", "parallel.dp=2", "parallel.tp=2", "parallel.zero=0" } },
        { 3, { "parallel.dp=3", "parallel.zero=1" } },
    };
    static const struct mesh_case from = { 4, { "parallel.cp=2", "parallel.dp=2", "parallel.zero=1" } };
    for (int live = 0; live < 2; live++) {
        char text[2048], want[HASHES][32];
        const char *o[16] = { live ? "algo.reference=live" : "algo.reference=precomputed", "checkpoint.state_hash=true",
                              "checkpoint.keep_last=0", "checkpoint.every=1" };
        make_config(text, sizeof text, "undisturbed-cp");
        int n = add_mesh(o, 4, &from);
        o[n] = "checkpoint.rewind=true";
        o[n + 1] = "checkpoint.resume=never";
        o[n + 2] = "train.steps=8";
        (void)run(text, from.ranks, n + 3, o);
        const char *name = live ? "moved-cp-live" : "moved-cp";
        make_config(text, sizeof text, name);
        o[n] = "train.steps=5";
        assert_int_equal(run(text, from.ranks, n + 1, o).saved, AT);
        state_hashes_of(name, "save_start", AT, want);
        assert_string_not_equal(want[0], want[1]);
        assert_string_not_equal(want[0], want[2]); /* the policy has left its reference */
        for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
            n = add_mesh(o, 4, &to[c]);
            o[n] = "train.steps=8";
            o[n + 1] = "checkpoint.resume=5";
            o[n + 2] = "checkpoint.rewind=true";
            assert_int_equal(run(text, to[c].ranks, n + 3, o).resumed_from, AT);
            expect_resumed(name, AT, want);
            for (int step = AT + 1; step <= 8; step++)
                expect_near(name, "undisturbed-cp", step, "loss");
        }
    }
}

/* ---- refusals ---- */

static void refusals(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[4], *words;
    } bad[] = {
        { 3, { "parallel.cp=2" }, "does not fit 3 ranks" },
        { 4, { "parallel.cp=2", "parallel.dp=1" }, "pp=1,dp=1,ep=1,cp=2,tp=1 does not fit 4 ranks" },
        { 1, { "parallel.cp=65" }, "parallel.cp" },
        { 1, { "parallel.cp=0" }, "parallel.cp" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].ranks, bad[i].o, bad[i].words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refusals),
        cmocka_unit_test(every_loss_as_on_one_rank),
        cmocka_unit_test(beside_all_other_axes),
        cmocka_unit_test(routed_experts),
        cmocka_unit_test(adapters),
        cmocka_unit_test(other_axes_change_no_bit),
        cmocka_unit_test(bytes_are_those_of_the_formula),
        cmocka_unit_test(more_ranks_hold_longer_packs),
        cmocka_unit_test(resumes_at_another_mesh),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
