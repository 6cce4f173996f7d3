/* test_job_tp: whole jobs with tensor parallelism, their ranks threads of this process: every loss, evaluation and
 * metric against one rank; the same bits for any dp and ZeRO stage at one tp; saved at one mesh, resumed at others:
 * every tensor bit for bit (by a hash that no cut changes), losses within rounding. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

struct mesh_case {
    int ranks;
    const char *dp, *tp, *zero, *sequence;
};
enum { MESH_WORDS = 4 };

static void add_mesh(const char **o, const struct mesh_case *c)
{
    o[0] = c->dp;
    o[1] = c->tp;
    o[2] = c->zero;
    o[3] = c->sequence;
}

#define CASE(ranks, dp, tp, zero, sequence)                                                                            \
    {                                                                                                                  \
        ranks, "parallel.dp=" #dp, "parallel.tp=" #tp, "parallel.zero=" #zero, "parallel.sequence=" #sequence          \
    }
static const struct mesh_case one = CASE(1, 1, 1, 0, false);

/* ---- against one rank ---- */

static void expect_near(const char *got_run, const char *want_run, int step, const char *key)
{
    double got = metric(got_run, step, key), want = metric(want_run, step, key);
    bool both_null = isnan(got) && isnan(want);
    if (!both_null && !(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1)))
        fail_msg("%s: step %d: %s is %.12g, not %.12g", got_run, step, key, got, want);
}

static const char *const keys[] = { "loss", "grad_norm", "entropy", "mean_token_accuracy" };
static const char *const pair_keys[] = { "rewards/chosen", "rewards/margins", "logps/chosen", "logits/rejected" };

static void every_loss_as_on_one_rank(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = { CASE(2, 1, 2, 1, false), CASE(4, 1, 4, 0, true), CASE(4, 2, 2, 1, true),
                                              CASE(6, 3, 2, 0, false) };
    for (int a = 0; a < ALGORITHMS; a++)
        for (int c = -1; c < (int)(sizeof cases / sizeof *cases); c++) {
            char text[2048], name[32];
            if (c >= 0 && !runs_kind((size_t)c, (size_t)a, 2))
                continue;
            snprintf(name, sizeof name, c < 0 ? "whole-%d" : "cut-%d", a);
            make_config(text, sizeof text, name);
            const char *o[16] = {
                algorithms[a][0],    algorithms[a][1],
                labelled_override(), a % 2 == (c & 1) ? "algo.reference=live" : "algo.reference=precomputed",
                "checkpoint.url=",   "train.steps=9"
            };
            add_mesh(o + 6, c < 0 ? &one : &cases[c]);
            (void)run(text, c < 0 ? 1 : cases[c].ranks, 6 + MESH_WORDS, o);
            for (int step = 1; c >= 0 && step <= 9; step++) {
                char want[32];
                snprintf(want, sizeof want, "whole-%d", a);
                for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
                    expect_near(name, want, step, keys[k]);
                for (size_t k = 0; step > 3 && k < sizeof pair_keys / sizeof *pair_keys; k++)
                    expect_near(name, want, step, pair_keys[k]);
            }
        }
}

/* For one tp: dp, ZeRO and recomputation change no bit. */
static void other_axes_change_no_bit(void **state)
{
    (void)state;
    static const struct mesh_case cases[][2] = { { CASE(2, 1, 2, 0, false), CASE(6, 3, 2, 1, false) },
                                                 { CASE(4, 1, 4, 1, true), CASE(8, 2, 4, 0, true) } };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        uint32_t weights[2];
        for (int i = 0; i < 2; i++) {
            char text[2048];
            make_config(text, sizeof text, i ? "wide" : "narrow");
            const char *o[16] = { "checkpoint.url=", "optim.clip=0.3",
                                  !i  ? "memory.recompute=none"
                                  : c ? "memory.recompute=attention"
                                      : "memory.recompute=block" };
            add_mesh(o + 3, &cases[c][i]);
            weights[i] = run(text, cases[c][i].ranks, 3 + MESH_WORDS, o).weights;
        }
        assert_int_equal(weights[0], weights[1]);
        for (int step = 1; step <= 9; step++) {
            assert_true(metric("wide", step, "loss") == metric("narrow", step, "loss"));
            assert_true(metric("wide", step, "grad_norm") == metric("narrow", step, "grad_norm"));
        }
    }
}

/* ---- from one mesh to another ---- */

enum { AT = 5 };

static void resumes_at_another_mesh(void **state)
{
    (void)state;
    static const struct mesh_case to[] = { CASE(4, 4, 1, 1, false), CASE(4, 1, 4, 1, true), CASE(1, 1, 1, 1, false),
                                           CASE(2, 1, 2, 0, true), CASE(6, 3, 2, 1, false) },
                                  from = CASE(4, 2, 2, 1, false);
    for (int live = 0; live < 2; live++) {
        char text[2048], want[HASHES][32];
        const char *o[16] = { live ? "algo.reference=live" : "algo.reference=precomputed", "checkpoint.state_hash=true",
                              "checkpoint.keep_last=0", "checkpoint.every=1" };
        make_config(text, sizeof text, "undisturbed-tp");
        add_mesh(o + 4, &from);
        o[8] = "checkpoint.rewind=true";
        o[9] = "checkpoint.resume=never";
        (void)run(text, from.ranks, 10, o);
        make_config(text, sizeof text, live ? "moved-live" : "moved");
        o[8] = "train.steps=5";
        assert_int_equal(run(text, from.ranks, 9, o).saved, AT);
        const char *name = live ? "moved-live" : "moved";
        state_hashes_of(name, "save_start", AT, want);
        assert_string_not_equal(want[0], want[1]);
        assert_string_not_equal(want[0], want[2]); /* the policy has left its reference */
        for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
            add_mesh(o + 4, &to[c]);
            o[8] = "train.steps=9";
            o[9] = "checkpoint.resume=5";
            o[10] = "checkpoint.rewind=true";
            assert_int_equal(run(text, to[c].ranks, 11, o).resumed_from, AT);
            expect_resumed(name, AT, want);
            for (int step = AT + 1; step <= 9; step++)
                expect_near(name, "undisturbed-tp", step, "loss");
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
        { 3,
          { "parallel.tp=3" },
          "parallel.tp: 3 does not fit model.heads: 4 (this model can be cut over 1, 2, 4 ranks)" },
        { 4, { "parallel.tp=4", "model.ffn=66" }, "model.ffn: 66 (this model can be cut over 1, 2 ranks)" },
        { 3, { "parallel.tp=2" }, "does not fit 3 ranks" },
        { 4,
          { "parallel.tp=2", "parallel.dp=1" },
          "pp=1,dp=1,ep=1,cp=1,tp=2 does not fit 4 ranks: the sizes must multiply to that; each is one of 1, 2, 4" },
        { 2, { "parallel.tp=9" }, "parallel.tp" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].ranks, bad[i].o, bad[i].words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refusals),
        cmocka_unit_test(every_loss_as_on_one_rank),
        cmocka_unit_test(other_axes_change_no_bit),
        cmocka_unit_test(resumes_at_another_mesh),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
