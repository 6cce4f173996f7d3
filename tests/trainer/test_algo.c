/* algo: losses against known numbers, their gradients against differences, packs against one another, and the table of
 * reference values. The DPO numbers come from a calculation in decimal arithmetic. What a pair's loss is,
 * test_pref_losses.c checks; here it goes through packs. */
#include "trainer/algo/algo.h"

#include "comm/base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ROWS = 3, PROMPT = 2, TOKENS_MAX = 128, SEGMENTS = 2 * ROWS };

static void near(double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance))
        fail_msg("%.17g, not %.17g", a, b);
}

/* ---- data: sequences of PROMPT unscored tokens and as many scored ones as `scored` says ---- */

struct fixture {
    struct dataset d;
    struct sequence seq[SEGMENTS];
    uint64_t hash[ROWS];
    int32_t token[TOKENS_MAX];
    uint8_t score[TOKENS_MAX];
    struct pack p;
    float logp[TOKENS_MAX], dlogp[TOKENS_MAX];
};

static struct fixture *fixture_make(int sequences, const uint32_t *scored)
{
    struct fixture *f = mem_calloc(1, sizeof *f);
    f->d =
        (struct dataset){ .kind = sequences == 2 ? DATASET_PREFS : DATASET_SFT, .sequences = sequences, .rows = ROWS };
    f->d.seq = f->seq;
    f->d.hash = f->hash;
    f->d.token = f->token;
    f->d.score = f->score;
    for (int s = 0; s < ROWS * sequences; s++) {
        f->seq[s] = (struct sequence){ f->d.tokens, PROMPT + scored[s], scored[s] };
        for (uint32_t i = 0; i < f->seq[s].length; i++) {
            f->token[f->d.tokens] = (int32_t)(7 * f->d.tokens % 11);
            f->score[f->d.tokens++] = i >= PROMPT;
        }
    }
    for (uint64_t r = 0; r < ROWS; r++)
        f->hash[r] = 1000 + r;
    assert_true(f->d.tokens <= TOKENS_MAX);
    assert_null(pack_init(&f->p, &f->d, ROWS));
    return f;
}

static void fixture_drop(struct fixture *f)
{
    pack_fini(&f->p);
    mem_free(f);
}

/* Token log-probabilities whose sums are total[dataset sequence], exact in f32: all but the last token have -1/4.
 * Tokens without a target hold a number that would spoil every sum. */
static void lay_out_sides(struct fixture *f, const uint64_t *row, uint32_t rows, const double *total, int first,
                          int sides)
{
    uint32_t n = (uint32_t)sides;
    pack_build_sides(&f->p, row, rows, first, sides);
    for (int64_t i = 0; i < f->p.in.tokens; i++)
        f->logp[i] = f->p.target[i] >= 0 ? -0.25f : 123;
    for (uint32_t s = 0; s < rows * n; s++) {
        uint64_t of = row[s / n] * (uint64_t)f->d.sequences + (uint64_t)first + s % n;
        int32_t last = f->p.offset[s + 1] - 2; /* the row before the last token predicts it */
        f->logp[last] = (float)(total[of] + 0.25 * (f->seq[of].scored - 1));
    }
    for (int i = 0; i < TOKENS_MAX; i++)
        f->dlogp[i] = 99;
}

static void lay_out(struct fixture *f, const uint64_t *row, uint32_t rows, const double *total)
{
    lay_out_sides(f, row, rows, total, 0, f->d.sequences);
}

static const struct algo_ops *algo(const char *name)
{
    const struct algo_ops *ops = NULL;
    assert_null(algo_lookup(name, &ops));
    assert_string_equal(ops->name, name);
    return ops;
}

/* The algorithm's config with its defaults, then settings "loss=hinge beta=1". */
static void *settings_of(const char *name, const char *settings)
{
    const struct algo_ops *ops = algo(name);
    void *config = mem_calloc(1, ops->config_bytes);
    char pair[80];
    int n;
    assert_null(options_defaults(ops->options, config));
    for (const char *at = settings; sscanf(at, "%79s%n", pair, &n) == 1; at += n) {
        char *eq = strchr(pair, '=');
        assert_non_null(eq);
        *eq = 0;
        assert_null(options_set(ops->options, pair, eq + 1, config, "here"));
    }
    if (ops->check)
        assert_null(ops->check(config));
    return config;
}

static void *dpo_settings(const char *settings)
{
    return settings_of("dpo", settings);
}

static void *dpo_config(const char *beta)
{
    char text[40] = "";
    if (beta)
        snprintf(text, sizeof text, "beta=%s", beta);
    return dpo_settings(text);
}

static double metric_of(const struct algo_ops *ops, const double *metric, const char *name)
{
    for (int i = 0; i < ops->metric_count; i++)
        if (!strcmp(ops->metrics[i].name, name))
            return metric[i];
    fail_msg("no metric is called %s", name);
    return 0;
}

/* ---- DPO ---- */

static const uint32_t lengths[SEGMENTS] = { 5, 6, 8, 7, 3, 4 }; /* chosen, rejected, chosen, ... */
static const double policy[SEGMENTS] = { -12.5, -14.0, -20.0, -18.5, -7.25, -9.75 };
static const double reference[SEGMENTS] = { -13.0, -13.5, -19.0, -19.25, -8.0, -9.0 };
static const uint64_t all_rows[ROWS] = { 0, 1, 2 };

static void check_dlogp(const struct fixture *f, const double *of_segment)
{
    for (int32_t s = 0; s < f->p.in.seg.count; s++)
        for (int32_t i = f->p.offset[s]; i < f->p.offset[s + 1]; i++)
            if (f->p.target[i] < 0)
                assert_true(f->dlogp[i] == 0);
            else
                near((double)f->dlogp[i], of_segment[s], 1e-7 * fabs(of_segment[s])); /* f32 */
}

static void test_dpo_known(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    void *config = dpo_config(NULL); /* beta 0.1 is the default */
    struct fixture *f = fixture_make(2, lengths);
    struct batch_counts counts = { .rows = ROWS, .sequences = SEGMENTS, .scored_tokens = 33 };
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS];
    assert_true(ops->needs_reference && ops->data == DATASET_PREFS && ops->metric_count <= ALGO_METRICS);
    lay_out(f, all_rows, ROWS, policy);
    ops->loss(config, &f->p, f->logp, NULL, reference, &counts, scratch, f->dlogp, metric);
    assert_string_equal(ops->metrics[0].name, "loss");
    near(metric[0], 0.683274712842, 1e-12);
    const struct {
        const char *name;
        double mean;
    } want[] = { { "rewards/chosen", 0.00833333333333 },
                 { "rewards/rejected", -0.0166666666667 },
                 { "rewards/margins", 0.025 },
                 { "rewards/accuracies", 0.666666666667 },
                 { "logps/chosen", -13.25 },
                 { "logps/rejected", -14.0833333333 },
                 { "nll_loss", 2.47222222222222 } };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        near(metric_of(ops, metric, want[i].name) / ROWS, want[i].mean, 1e-10);
    assert_int_equal(ops->metrics[0].per, PER_STEP);
    for (int i = 1; i < ops->metric_count; i++)
        assert_true(ops->metrics[i].per == PER_ROW || metric[i] == 0); /* those of tokens: see test_token_metrics */
    const double gradient[SEGMENTS] = { -0.015834027084, 0.015834027084,   -0.0181212895746,
                                        0.0181212895746, -0.0154190051552, 0.0154190051552 };
    check_dlogp(f, gradient);
    double again[ALGO_METRICS];
    ops->loss(config, &f->p, f->logp, NULL, reference, &counts, scratch, NULL, again);
    assert_memory_equal(again, metric, sizeof *metric * (size_t)ops->metric_count);
    fixture_drop(f);
    mem_free(config);
}

/* Where policy and reference agree: ln 2, no reward, accuracy 0, half of beta as the gradient. */
static void test_dpo_at_reference(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    void *config = dpo_config("0.1");
    struct fixture *f = fixture_make(2, lengths);
    double total[SEGMENTS] = { -5, -6, -0.75, -123456.5, -7, -7 }, scratch[4 * SEGMENTS], metric[ALGO_METRICS];
    for (uint64_t r = 0; r < ROWS; r++) {
        struct batch_counts counts = { .rows = 1, .sequences = 2 };
        lay_out(f, &r, 1, total);
        ops->loss(config, &f->p, f->logp, NULL, total + 2 * r, &counts, scratch, f->dlogp, metric);
        assert_true(metric[0] == 0.69314718055994530942);
        assert_true(metric_of(ops, metric, "rewards/accuracies") == 0);
        assert_true(metric_of(ops, metric, "rewards/margins") == 0);
        assert_true(metric_of(ops, metric, "rewards/chosen") == 0 && metric_of(ops, metric, "rewards/rejected") == 0);
        const double gradient[2] = { -0.05, 0.05 };
        check_dlogp(f, gradient);
    }
    fixture_drop(f);
    mem_free(config);
}

/* Losses and gradients of packs add up to those of all rows in one pack; row numbers are the dataset's. */
static void test_dpo_packs(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    void *config = dpo_config("0.7");
    struct fixture *f = fixture_make(2, lengths);
    struct batch_counts counts = { .rows = ROWS };
    double scratch[4 * SEGMENTS], one[ALGO_METRICS], part[ALGO_METRICS], sum[ALGO_METRICS] = { 0 };
    float dlogp[TOKENS_MAX];
    lay_out(f, all_rows, ROWS, policy);
    ops->loss(config, &f->p, f->logp, NULL, reference, &counts, scratch, f->dlogp, one);
    memcpy(dlogp, f->dlogp, sizeof dlogp);
    int64_t first_of_row[ROWS];
    for (int r = 0; r < ROWS; r++)
        first_of_row[r] = f->p.offset[2 * r];
    const uint64_t packs[2][2] = { { 2, 0 }, { 1 } };
    for (int k = 0; k < 2; k++) {
        uint32_t n = k ? 1 : 2;
        double ref[4];
        for (uint32_t r = 0; r < n; r++)
            memcpy(ref + 2 * r, reference + 2 * packs[k][r], 2 * sizeof *ref);
        lay_out(f, packs[k], n, policy);
        ops->loss(config, &f->p, f->logp, NULL, ref, &counts, scratch, f->dlogp, part);
        for (int j = 0; j < ops->metric_count; j++)
            sum[j] += part[j];
        for (uint32_t r = 0; r < n; r++)
            assert_memory_equal(f->dlogp + f->p.offset[2 * r], dlogp + first_of_row[packs[k][r]],
                                sizeof *dlogp * (size_t)(f->p.offset[2 * r + 2] - f->p.offset[2 * r]));
    }
    for (int j = 0; j < ops->metric_count; j++)
        near(sum[j], one[j], 1e-12);
    lay_out(f, all_rows, 0, policy); /* an empty pack, also in an empty step */
    ops->loss(config, &f->p, f->logp, NULL, reference, &counts, scratch, f->dlogp, part);
    assert_true(part[0] == 0);
    counts.rows = 0;
    ops->loss(config, &f->p, f->logp, NULL, reference, &counts, scratch, f->dlogp, part);
    assert_true(part[0] == 0);
    fixture_drop(f);
    mem_free(config);
}

/* ---- gradients against central differences; loss values are f64 and steps exact in f32 ---- */

static void check_differences(const struct algo_ops *ops, const void *config, struct fixture *f, const double *ref,
                              const struct batch_counts *counts)
{
    const float h = 0x1p-12f;
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS], up[ALGO_METRICS], down[ALGO_METRICS];
    ops->loss(config, &f->p, f->logp, NULL, ref, counts, scratch, f->dlogp, metric);
    for (int64_t i = 0; i < f->p.in.tokens; i++) {
        float keep = f->logp[i];
        f->logp[i] = keep + h;
        ops->loss(config, &f->p, f->logp, NULL, ref, counts, scratch, NULL, up);
        f->logp[i] = keep - h;
        ops->loss(config, &f->p, f->logp, NULL, ref, counts, scratch, NULL, down);
        f->logp[i] = keep;
        double slope = (up[0] - down[0]) / (2 * (double)h);
        near((double)f->dlogp[i], slope, 2e-9 + 1e-6 * fabs(slope));
        assert_true(f->p.target[i] >= 0 || f->dlogp[i] == 0);
    }
}

static void test_differences(void **state)
{
    (void)state;
    const char *const betas[] = { "0.01", "0.1", "1", "2.5" };
    struct batch_counts counts = { .rows = 5, .sequences = 10, .scored_tokens = 77 }; /* more than this pack has */
    struct fixture *f = fixture_make(2, lengths);
    lay_out(f, all_rows, ROWS, policy);
    for (size_t i = 0; i < sizeof betas / sizeof *betas; i++) {
        void *config = dpo_config(betas[i]);
        check_differences(algo("dpo"), config, f, reference, &counts);
        mem_free(config);
    }
    fixture_drop(f);
    struct fixture *g = fixture_make(1, lengths);
    lay_out(g, all_rows, ROWS, policy);
    check_differences(algo("sft"), NULL, g, NULL, &counts);
    fixture_drop(g);
}

/* ---- the family: through packs, with NLL, weights of tails and means over the batch ---- */

struct family {
    const char *settings;
    double loss; /* of `policy` and `reference`; NAN: only gradients are checked */
};
static const struct family family[] = {
    { "loss=sigmoid", 0.683274712842 },
    { "loss=cdpo label_smoothing=0.1", 0.685774712842 },
    { "loss=robust label_smoothing=0.1", 0.680149712842 },
    { "loss=hinge", 0.975 },
    { "loss=hinge beta=0.75", 0.854166666667 },
    { "loss=ipo", 23.7973343018 },
    { "loss=ipo_sum", 24.6041666667 },
    { "loss=sigmoid_norm", 0.686785210425 },
    { "reference_free=true", 0.655951171819 },
    { "loss=simpo beta=2 simpo_gamma=0.5", 0.982860963781 },
    { "loss=simpo beta=2 nll_alpha=0.5", NAN },
    { "loss=cpo", 0.655951171819 + 2.47222222222222 },
    { "loss=orpo nll_norm=token", 2.55402212964 },
    { "loss=rpo", 3.15549693506 },
    { "loss=rpo nll_norm=token", 3.16764971284 },
    { "loss=kto_pair", 0.495833431149 },
    { "loss=bco_pair", 1.37512212619 },
    { "loss=nca_pair", 1.38146321273 },
    { "loss=sppo_hard", 48.5625 },
    { "loss=exo_pair label_smoothing=0.001", 2.72063884073 },
    { "loss=apo_zero", 0.993747726211 },
    { "loss=apo_down", 0.995829693099 },
    { "loss=discopop", 0.839841211442 },
    { "f_divergence=forward_kl", 0.689474123904 },
    { "f_divergence=js", 0.688449623237 },
    { "f_divergence=alpha", 0.685708792815 },
    { "loss=alphapo beta=2", 0.997889290969 },
    { "weight=0.8 loss_2=bco_pair weight_2=0.2 nll_alpha=1", 0.821644195512 + 2.47222222222222 }, /* MPO */
    { "loss=simpo loss_2=kto_pair loss_3=rpo weight_3=0.5", NAN },
    { "ld_alpha=0.5", NAN },
    { "ld_alpha=0 nll_alpha=1", NAN },
    { "loss=ipo_sum ld_alpha=0.25 nll_alpha=0.7 nll_norm=token", NAN },
};
enum { FAMILY = sizeof family / sizeof family[0] };

/* The step's counts: these rows, and what the algorithm wants to know of them, summed over packs of `pack` rows. */
static struct batch_counts count_step(const struct algo_ops *ops, const void *config, struct fixture *f, uint32_t pack,
                                      const double *total, double *statistic)
{
    double scratch[4 * SEGMENTS], part[ALGO_STATISTICS];
    struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
    int n = algo_statistics(ops, config);
    assert_true(n <= ALGO_STATISTICS);
    memset(statistic, 0, ALGO_STATISTICS * sizeof *statistic);
    for (uint32_t at = 0; n && at < ROWS; at += pack) {
        lay_out(f, all_rows + at, at + pack > ROWS ? ROWS - at : pack, total);
        ops->statistic(config, &f->p, f->logp, reference + 2 * at, scratch, part);
        for (int i = 0; i < n; i++)
            statistic[i] += part[i];
    }
    counts.statistic = n ? statistic : NULL;
    return counts;
}

static void test_family_known(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    struct fixture *f = fixture_make(2, lengths);
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS], statistic[ALGO_STATISTICS];
    for (int k = 0; k < FAMILY; k++)
        for (uint32_t pack = 1; pack <= ROWS; pack++) { /* packs add up, whatever their size */
            void *config = dpo_settings(family[k].settings);
            struct batch_counts counts = count_step(ops, config, f, pack, policy, statistic);
            bool needed = algo_needs_reference(ops, config);
            double loss = 0, nll = 0, accuracy = 0;
            for (uint32_t at = 0; at < ROWS; at += pack) {
                lay_out(f, all_rows + at, at + pack > ROWS ? ROWS - at : pack, policy);
                ops->loss(config, &f->p, f->logp, NULL, needed ? reference + 2 * at : NULL, &counts, scratch, f->dlogp,
                          metric);
                loss += metric[0];
                nll += metric_of(ops, metric, "nll_loss") / ROWS;
                accuracy += metric_of(ops, metric, "rewards/accuracies") / ROWS;
            }
            if (!isnan(family[k].loss) && !(fabs(loss - family[k].loss) <= 1e-10 * fabs(loss)))
                fail_msg("%s in packs of %u: %.15g, not %.15g", family[k].settings, pack, loss, family[k].loss);
            near(nll, strstr(family[k].settings, "token") ? 2.484375 : 2.47222222222222, 1e-12);
            if (!strstr(family[k].settings, "ld_alpha"))
                near(accuracy, 2.0 / 3, 1e-12);
            mem_free(config);
        }
    fixture_drop(f);
}

static void test_family_differences(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    struct fixture *f = fixture_make(2, lengths);
    double statistic[ALGO_STATISTICS];
    for (int k = 0; k < FAMILY; k++) {
        void *config = dpo_settings(family[k].settings);
        struct batch_counts counts = count_step(ops, config, f, ROWS, policy, statistic);
        counts.rows = 5; /* more than this pack has */
        counts.first_tokens = 29;
        lay_out(f, all_rows, ROWS, policy);
        check_differences(ops, config, f, reference, &counts); /* the statistic stays: it is detached */
        mem_free(config);
    }
    fixture_drop(f);
}

/* Sums beyond the pair's common length weigh ld_alpha; reference values are sums of the same kind. */
static void test_ld_sums(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    struct fixture *f = fixture_make(2, lengths);
    void *config = dpo_settings("ld_alpha=0.5"), *plain = dpo_settings("");
    double sums[SEGMENTS], scratch[4 * SEGMENTS], metric[ALGO_METRICS];
    struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
    lay_out(f, all_rows, ROWS, policy);
    algo_sums(ops, plain, &f->p, f->logp, sums);
    for (int s = 0; s < SEGMENTS; s++)
        near(sums[s], policy[s], 0);
    algo_sums(ops, config, &f->p, f->logp, sums);
    /* lengths 5 6, 8 7, 3 4: one token too many each, the last one, which makes the sum up */
    const double last[SEGMENTS] = { 0, -14 + 1.25, -20 + 1.75, 0, 0, -9.75 + 0.75 };
    for (int s = 0; s < SEGMENTS; s++)
        near(sums[s], policy[s] - 0.5 * last[s], 1e-14);
    ops->loss(config, &f->p, f->logp, NULL, sums, &counts, scratch, f->dlogp, metric);
    near(metric[0], 0.69314718055994530942, 1e-15);
    assert_true(metric_of(ops, metric, "rewards/accuracies") == 0);
    near(metric_of(ops, metric, "logps/chosen"), -39.75, 1e-13);
    int32_t end = f->p.offset[2] - 2; /* last scored token of the first rejected sequence */
    near((double)f->dlogp[end], 0.5 * (double)f->dlogp[end - 1], 1e-9);
    pack_build(&f->p, all_rows, 0);
    algo_sums(algo("sft"), NULL, &f->p, f->logp, sums);
    mem_free(config);
    mem_free(plain);
    fixture_drop(f);
}

/* WPO weighs a pair's loss and its slopes, not the NLL; the weight is e^ of means over either side's tokens. */
static void test_wpo(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo");
    struct fixture *f = fixture_make(2, lengths);
    void *plain = dpo_settings(""), *wpo = dpo_settings("wpo=true"), *both = dpo_settings("wpo=true nll_alpha=0.5");
    static float log_square[TOKENS_MAX], none[TOKENS_MAX];
    struct logprob_stats tok = { none, none, log_square, none };
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS], want = 0, weight[ROWS];
    float dlogp[TOKENS_MAX];
    struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
    lay_out(f, all_rows, ROWS, policy);
    for (int i = 0; i < TOKENS_MAX; i++)
        log_square[i] = -(float)(i * 7 % 13) / 8;
    for (uint32_t r = 0; r < ROWS; r++) {
        double log_weight = 0, loss[ALGO_METRICS];
        for (uint32_t s = 2 * r; s < 2 * r + 2; s++) {
            double sum = policy[s];
            for (int32_t i = f->p.offset[s]; i < f->p.offset[s + 1]; i++)
                sum -= f->p.target[i] >= 0 ? (double)log_square[i] : 0;
            log_weight += sum / lengths[s];
        }
        weight[r] = exp(log_weight);
        lay_out(f, all_rows + r, 1, policy);
        ops->loss(plain, &f->p, f->logp, NULL, reference + 2 * r, &counts, scratch, NULL, loss);
        want += weight[r] * loss[0];
        lay_out(f, all_rows, ROWS, policy);
    }
    ops->loss(plain, &f->p, f->logp, NULL, reference, &counts, scratch, dlogp, metric);
    ops->loss(wpo, &f->p, f->logp, &tok, reference, &counts, scratch, f->dlogp, metric);
    near(metric[0], want, 1e-12);
    for (uint32_t s = 0; s < SEGMENTS; s++)
        for (int32_t i = f->p.offset[s]; i < f->p.offset[s + 1]; i++)
            if (f->p.target[i] >= 0)
                near((double)f->dlogp[i], weight[s / 2] * (double)dlogp[i], 1e-7 * fabs((double)f->dlogp[i]));
    ops->loss(both, &f->p, f->logp, &tok, reference, &counts, scratch, f->dlogp, metric);
    near(metric[0], want + 0.5 * 2.47222222222222, 1e-12);
    ops->loss(wpo, &f->p, f->logp, NULL, reference, &counts, scratch, f->dlogp, metric);
    assert_true(isnan(metric[0]));
    mem_free(plain);
    mem_free(wpo);
    mem_free(both);
    fixture_drop(f);
}

/* What the trainer asks before a step: counts, whether references and statistics are wanted. */
static void test_wants(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("dpo"), *sft = algo("sft");
    struct fixture *f = fixture_make(2, lengths);
    const uint64_t some[2] = { 2, 0 };
    struct batch_counts c = algo_count(&f->d, some, 2), none = algo_count(&f->d, some, 0);
    assert_true(c.rows == 2 && c.sequences == 4 && c.scored_tokens == 18 && c.first_tokens == 8 && !c.statistic);
    assert_true(none.rows == 0 && none.sequences == 0 && none.scored_tokens == 0 && none.first_tokens == 0);
    assert_true(!algo_needs_reference(sft, NULL) && algo_statistics(sft, NULL) == 0);
    static const struct {
        const char *settings;
        bool reference;
        int statistics;
    } of[] = { { "", true, 0 },          { "reference_free=true", false, 0 }, { "loss=simpo", false, 0 },
               { "loss=cpo", false, 0 }, { "loss=orpo", false, 0 },           { "loss=kto_pair", true, 2 } };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        void *config = dpo_settings(of[i].settings);
        assert_int_equal(algo_needs_reference(ops, config), of[i].reference);
        assert_int_equal(algo_statistics(ops, config), of[i].statistics);
        mem_free(config);
    }
    /* a mean over the batch that nobody took must not become a loss */
    void *config = dpo_settings("loss=kto_pair");
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS];
    lay_out(f, all_rows, ROWS, policy);
    c = algo_count(&f->d, all_rows, ROWS);
    ops->loss(config, &f->p, f->logp, NULL, reference, &c, scratch, f->dlogp, metric);
    assert_true(isnan(metric[0]));
    assert_null(options_set(ops->options, "ld_alpha", "0.5", config, "here"));
    status *st = ops->check(config);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    mem_free(config);
    fixture_drop(f);
}

/* ---- SFT ---- */

static void test_sft_known(void **state)
{
    (void)state;
    const struct algo_ops *ops = algo("sft");
    const uint32_t scored[ROWS] = { 4, 1, 5 };
    const double total[ROWS] = { -3, -0.5, -9.25 };
    struct fixture *f = fixture_make(1, scored);
    struct batch_counts counts = { .rows = ROWS, .sequences = ROWS, .scored_tokens = 10 };
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS], part[ALGO_METRICS];
    assert_true(!ops->needs_reference && ops->data == DATASET_SFT);
    lay_out(f, all_rows, ROWS, total);
    ops->loss(NULL, &f->p, f->logp, NULL, NULL, &counts, scratch, f->dlogp, metric);
    assert_string_equal(ops->metrics[0].name, "loss");
    near(metric[0], 1.275, 1e-15);
    near(metric_of(ops, metric, "mean_logp"), -12.75, 1e-15);
    assert_int_equal(ops->metrics[1].per, PER_TOKEN);
    const double gradient[ROWS] = { -0.1, -0.1, -0.1 };
    check_dlogp(f, gradient);
    /* the same rows in two packs of the same step */
    double sum = 0;
    for (uint64_t r = 0; r < ROWS; r += 2) {
        lay_out(f, all_rows + r, r ? 1 : 2, total);
        ops->loss(NULL, &f->p, f->logp, NULL, NULL, &counts, scratch, f->dlogp, part);
        sum += part[0];
        check_dlogp(f, gradient);
    }
    near(sum, 1.275, 1e-15);
    counts.scored_tokens = 0;
    lay_out(f, all_rows, 0, total);
    ops->loss(NULL, &f->p, f->logp, NULL, NULL, &counts, scratch, f->dlogp, part);
    assert_true(part[0] == 0);
    fixture_drop(f);
}

/* ---- KTO: completions are sequences 0 of the rows, mismatched ones sequences 1 ---- */

static struct fixture *labelled(uint8_t *labels)
{
    struct fixture *f = fixture_make(2, lengths);
    f->d.kind = DATASET_LABELLED;
    f->d.desirable = labels;
    return f;
}

static double plain_sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* c: log-ratios of the completions 0.5, -1, 0.75; of the mismatched ones as given. */
static void check_kto(const char *settings, uint8_t *labels, const double *mismatched, uint32_t pack, double beta,
                      double good, double bad, double z0)
{
    const struct algo_ops *ops = algo("kto");
    void *config = settings_of("kto", settings);
    struct fixture *f = labelled(labels);
    double scratch[4 * SEGMENTS], part[ALGO_METRICS], sum[ALGO_METRICS] = { 0 }, statistic = 0, ref[ROWS];
    double want = 0, count[2] = { 0 }, reward[2] = { 0 }, logps[2] = { 0 };
    struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
    assert_true(algo_needs_reference(ops, config) && ops->data == DATASET_LABELLED);
    for (uint32_t at = 0; at < ROWS && algo_statistics(ops, config); at += pack) {
        uint32_t n = at + pack > ROWS ? ROWS - at : pack;
        for (uint32_t r = 0; r < n; r++)
            ref[r] = policy[2 * (at + r) + 1] - mismatched[at + r];
        lay_out_sides(f, all_rows + at, n, policy, 1, 1);
        ops->statistic(config, &f->p, f->logp, ref, scratch, part);
        statistic += part[0];
    }
    counts.statistic = algo_statistics(ops, config) ? &statistic : NULL;
    for (int r = 0; r < ROWS; r++) {
        double c = policy[2 * r] - reference[2 * r];
        want += (labels[r] ? good * (1 - plain_sigmoid(beta * (c - z0))) : bad * (1 - plain_sigmoid(beta * (z0 - c)))) /
                ROWS;
        count[!labels[r]]++;
        reward[!labels[r]] += beta * c;
        logps[!labels[r]] += policy[2 * r];
    }
    for (uint32_t at = 0; at < ROWS; at += pack) {
        uint32_t n = at + pack > ROWS ? ROWS - at : pack;
        for (uint32_t r = 0; r < n; r++)
            ref[r] = reference[2 * (at + r)];
        lay_out_sides(f, all_rows + at, n, policy, 0, 1);
        ops->loss(config, &f->p, f->logp, NULL, ref, &counts, scratch, f->dlogp, part);
        for (int j = 0; j < ops->metric_count; j++)
            sum[j] += part[j];
        check_differences(ops, config, f, ref, &counts);
    }
    near(sum[0], want, 1e-14);
    for (int j = 0; j < ops->metric_count; j++)
        sum[j] /= algo_divisor(&counts, ops->metrics[j].per);
    near(metric_of(ops, sum, "kl"), z0, 1e-15);
    near(metric_of(ops, sum, "count/chosen"), count[0], 0);
    near(metric_of(ops, sum, "count/rejected"), count[1], 0);
    static const char *const names[2][2] = { { "rewards/chosen", "logps/chosen" },
                                             { "rewards/rejected", "logps/rejected" } };
    for (int side = 0; side < 2; side++) {
        double r = metric_of(ops, sum, names[side][0]), l = metric_of(ops, sum, names[side][1]);
        assert_true(count[side] > 0 || (isnan(r) && isnan(l)));
        if (count[side] > 0) {
            near(r, reward[side] / count[side], 1e-15);
            near(l, logps[side] / count[side], 1e-13);
        }
    }
    double margin = metric_of(ops, sum, "rewards/margins");
    assert_true((count[0] > 0 && count[1] > 0) || isnan(margin));
    if (count[0] > 0 && count[1] > 0)
        near(margin, reward[0] / count[0] - reward[1] / count[1], 1e-14);
    fixture_drop(f);
    mem_free(config);
}

static void test_kto(void **state)
{
    (void)state;
    uint8_t labels[][ROWS] = { { 1, 0, 1 }, { 0, 0, 1 }, { 1, 1, 1 }, { 0, 0, 0 } };
    const double above[ROWS] = { 0.5, 0.75, -0.25 }, below[ROWS] = { -0.5, 0.25, -0.25 };
    for (int k = 0; k < 4; k++)
        for (uint32_t pack = 1; pack <= ROWS; pack++) {
            check_kto("", labels[k], above, pack, 0.1, 1, 1, 1.0 / 3);
            check_kto("beta=2 desirable_weight=1.5", labels[k], above, pack, 2, 1.5, 1, 1.0 / 3);
            check_kto("undesirable_weight=0.25 beta=0.7", labels[k], above, pack, 0.7, 1, 0.25, 1.0 / 3);
            check_kto("beta=0.5", labels[k], below, pack, 0.5, 1, 1, 0);
            check_kto("beta=0.5 loss=apo_zero_unpaired", labels[k], above, pack, 0.5, 1, 1, 0);
        }
    /* without the statistic that it wants, no number */
    const struct algo_ops *ops = algo("kto");
    void *config = settings_of("kto", "");
    struct fixture *f = labelled(labels[0]);
    double scratch[4 * SEGMENTS], metric[ALGO_METRICS], ref[ROWS] = { 0 };
    struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
    assert_true(counts.desirable == 2 && counts.desirable_tokens == 8 && counts.first_tokens == 16);
    lay_out_sides(f, all_rows, ROWS, policy, 0, 1);
    ops->loss(config, &f->p, f->logp, NULL, ref, &counts, scratch, f->dlogp, metric);
    assert_true(isnan(metric[0]));
    /* rows of a step where policy and reference agree: half of either weight, no reward, margin 0 */
    double at[ROWS] = { policy[0], policy[2], policy[4] }, zero = 0;
    counts.statistic = &zero;
    ops->loss(config, &f->p, f->logp, NULL, at, &counts, scratch, f->dlogp, metric);
    assert_true(metric[0] == 0.5 && metric_of(ops, metric, "rewards/margins") == 0);
    fixture_drop(f);
    mem_free(config);
}

/* ---- what comes from the logits: means over scored tokens ---- */

static void test_token_metrics(void **state)
{
    (void)state;
    uint8_t labels[ROWS] = { 0, 1, 1 };
    for (int kind = 0; kind < DATASET_KINDS; kind++) {
        const char *name = kind == DATASET_SFT ? "sft" : kind == DATASET_PREFS ? "dpo" : "kto";
        const struct algo_ops *ops = algo(name);
        struct fixture *f =
            kind == DATASET_LABELLED ? labelled(labels) : fixture_make(kind == DATASET_SFT ? 1 : 2, lengths);
        static float v[3][TOKENS_MAX];
        struct logprob_stats tok = { v[0], v[1], NULL, v[2] };
        double scratch[4 * SEGMENTS], metric[ALGO_METRICS], zero[ALGO_STATISTICS] = { 0 }, entropy[2] = { 0 },
                                                            logit[2] = { 0 }, top[2] = { 0 }, tokens[2] = { 0 };
        int sides = kind == DATASET_PREFS ? 2 : 1;
        struct batch_counts counts = algo_count(&f->d, all_rows, ROWS);
        counts.statistic = zero;
        lay_out_sides(f, all_rows, ROWS, policy, 0, sides);
        memset(v, 0, sizeof v);
        for (int32_t s = 0; s < f->p.in.seg.count; s++)
            for (int32_t i = f->p.offset[s]; i < f->p.offset[s + 1]; i++) {
                int side = kind == DATASET_PREFS ? s % 2 : kind == DATASET_LABELLED ? !labels[s] : 0;
                if (f->p.target[i] < 0)
                    continue;
                entropy[side] += v[0][i] = (float)(i * 5 % 7) / 8;
                logit[side] += v[1][i] = (float)(i * 3 % 11) / 4 - 1;
                top[side] += v[2][i] = i % 3 == 0;
                tokens[side]++;
            }
        void *config = kind == DATASET_SFT ? NULL : settings_of(name, "");
        ops->loss(config, &f->p, f->logp, &tok, reference, &counts, scratch, f->dlogp, metric);
        for (int j = 0; j < ops->metric_count; j++)
            metric[j] /= algo_divisor(&counts, ops->metrics[j].per);
        near(metric_of(ops, metric, "entropy"), (entropy[0] + entropy[1]) / (tokens[0] + tokens[1]), 1e-14);
        bool both = kind != DATASET_PREFS; /* of pairs: the chosen alone */
        near(metric_of(ops, metric, "mean_token_accuracy"),
             both ? (top[0] + top[1]) / (tokens[0] + tokens[1]) : top[0] / tokens[0], 1e-14);
        if (kind != DATASET_SFT) {
            near(metric_of(ops, metric, "logits/chosen"), logit[0] / tokens[0], 1e-14);
            near(metric_of(ops, metric, "logits/rejected"), logit[1] / tokens[1], 1e-14);
        }
        fixture_drop(f);
        mem_free(config);
    }
}

/* ---- the rest ---- */

static void test_logistic(void **state)
{
    (void)state;
    near(pref_nls(0), 0.69314718055994530942, 1e-16);
    near(pref_nls(2), 0.12692801104297249644, 1e-16);
    near(pref_nls(-2), 2.12692801104297249644, 1e-15);
    near(pref_nls(40), 4.24835425529158899533e-18, 1e-32);
    near(pref_nls(-1000), 1000, 0);
    near(pref_nls(1000), 0, 0);
    near(pref_sg(0), 0.5, 0);
    near(pref_sg(1), 0.73105857863000487926, 1e-15);
    near(pref_sg(-1), 0.26894142136999512075, 1e-15);
    near(pref_sg(-40), 4.24835425529158899533e-18, 1e-32);
    near(pref_sg(1000), 1, 0);
    near(pref_sg(-1000), 0, 0);
}

static void test_lookup_and_options(void **state)
{
    (void)state;
    const struct algo_ops *ops = NULL;
    status *st = algo_lookup("dop", &ops);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_null(ops);
    assert_non_null(strstr(status_message(st), "\"dop\""));
    for (size_t i = 0; algo_registry[i]; i++)
        assert_non_null(strstr(status_message(st), algo_registry[i]->name));
    status_free(st);
    const struct algo_ops *dpo = algo("dpo");
    assert_string_equal(dpo->options->section, "algo");
    const char *const bad[] = { "0", "-0.1", "x", "inf", "nan" };
    void *config = dpo_config(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        st = options_set(dpo->options, "beta", bad[i], config, "here");
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
    mem_free(config);
}

static void expect_stale(const struct ref_logps *r, const struct dataset *d, const char *words)
{
    status *st = ref_logps_check(r, d);
    assert_int_equal(status_code(st), ST_INVALID);
    if (!strstr(status_message(st), words))
        fail_msg("\"%s\" does not say \"%s\"", status_message(st), words);
    status_free(st);
}

static void test_ref_logps(void **state)
{
    (void)state;
    struct fixture *f = fixture_make(2, lengths);
    struct ref_logps r;
    assert_null(ref_logps_init(&r, &f->d));
    assert_int_equal(r.rows, ROWS);
    assert_int_equal(r.sequences, 2);
    for (uint64_t i = 0; i < ROWS; i++)
        assert_true(r.row[i] == i && r.hash[i] == 1000 + i && r.logp[2 * i] == 0 && r.logp[2 * i + 1] == 0);
    assert_null(ref_logps_check(&r, &f->d));
    f->hash[ROWS - 1] ^= 1;
    expect_stale(&r, &f->d, "row 2");
    f->hash[1] ^= (uint64_t)1 << 63;
    expect_stale(&r, &f->d, "row 1");
    f->hash[1] = 1001;
    f->hash[ROWS - 1] = 1000 + ROWS - 1;
    r.row[1] = 2;
    expect_stale(&r, &f->d, "row 2 stands where row 1");
    r.row[1] = 1;
    f->d.rows = ROWS - 1;
    expect_stale(&r, &f->d, "3 rows");
    f->d.rows = ROWS;
    f->d.sequences = 1;
    expect_stale(&r, &f->d, "2 sequences");
    ref_logps_fini(&r);
    assert_null(r.logp);
    ref_logps_fini(&r);
    f->d.rows = 0;
    f->d.sequences = 2;
    assert_null(ref_logps_init(&r, &f->d));
    assert_null(ref_logps_check(&r, &f->d));
    ref_logps_fini(&r);
    fixture_drop(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dpo_known),
        cmocka_unit_test(test_dpo_at_reference),
        cmocka_unit_test(test_dpo_packs),
        cmocka_unit_test(test_differences),
        cmocka_unit_test(test_sft_known),
        cmocka_unit_test(test_kto),
        cmocka_unit_test(test_token_metrics),
        cmocka_unit_test(test_logistic),
        cmocka_unit_test(test_ref_logps),
        cmocka_unit_test(test_family_known),
        cmocka_unit_test(test_family_differences),
        cmocka_unit_test(test_ld_sums),
        cmocka_unit_test(test_wants),
        cmocka_unit_test(test_wpo),
        cmocka_unit_test(test_lookup_and_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
