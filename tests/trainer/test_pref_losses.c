/* pref_losses: every loss against numbers of a decimal calculation (tests/golden has the whole set), slopes against
 * differences, values at the reference against closed forms, far-out pairs, and configs that must be refused. */
#include "trainer/algo/pref_losses.h"

#include "comm/base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static void near(const char *what, double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance))
        fail_msg("%s: %.17g, not %.17g", what, a, b);
}

/* Defaults, then settings "loss=hinge beta=1". */
static struct pref_config config_of(const char *settings)
{
    struct pref_config c;
    char pair[80];
    int n;
    assert_null(options_defaults(&pref_options, &c));
    for (const char *at = settings; sscanf(at, "%79s%n", pair, &n) == 1; at += n) {
        char *eq = strchr(pair, '=');
        assert_non_null(eq);
        *eq = 0;
        assert_null(options_set(&pref_options, pair, eq + 1, &c, "test"));
    }
    return c;
}

/* One setting for every row of the table, and the switches. In the table's order: test_all_losses_are_here. */
#define LN2 0.69314718055994530942
static const struct known {
    const char *settings;
    double loss;         /* mean over `given`, 12 digits */
    double at_reference; /* of a pair whose ratios are 0, lengths 5 and 6; NAN: not a matter of ratios */
} known[] = {
    { "loss=sigmoid", 0.683274712842, LN2 },
    { "loss=cdpo label_smoothing=0.1", 0.685774712842, LN2 },
    { "loss=robust label_smoothing=0.1", 0.680149712842, LN2 },
    { "loss=hinge", 0.975, 1 },
    { "loss=ipo", 23.7973343018, 25 },
    { "loss=ipo_sum", 24.6041666667, 25 },
    { "loss=sigmoid_norm", 0.686785210425, LN2 },
    { "loss=simpo beta=2 simpo_gamma=0.5", 0.982860963781, NAN },
    { "loss=cpo", 0.655951171819, NAN },
    { "loss=orpo", 0.069647129641, NAN },
    { "loss=rpo", 0.683274712842, LN2 },
    { "loss=kto_pair", 0.495833431149, 0.5 },
    { "loss=bco_pair", 1.37512212619, 2 * LN2 },
    { "loss=nca_pair", 1.38146321273, 2 * LN2 },
    { "loss=sppo_hard", 48.5625, 50 },
    { "loss=exo_pair label_smoothing=0.001", 2.72063884073, 2.761230709097915 },
    { "loss=apo_zero", 0.993747726211, 1 },
    { "loss=apo_down", 0.995829693099, 1 },
    { "loss=discopop", 0.839841211442, 0.5 * LN2 + 0.5 },
    { "loss=alphapo beta=2", 0.997889290969, NAN },
    { "loss=hinge beta=0.75", 0.854166666667, 1 },
    { "weight=0.8 loss_2=bco_pair weight_2=0.2", 0.821644195512, 1.2 * LN2 },
    { "loss=sppo_hard weight=0 loss_3=nca_pair", 1.38146321273, 2 * LN2 },
    { "loss=sigmoid reference_free=true", 0.655951171819, NAN },
    { "loss=sigmoid f_divergence=forward_kl", 0.689474123904, LN2 },
    { "loss=sigmoid f_divergence=js", 0.688449623237, LN2 },
    { "loss=sigmoid f_divergence=alpha f_alpha=0.5", 0.685708792815, LN2 },
};
enum { KNOWN = sizeof known / sizeof known[0], LOSSES = 20 };

static const struct pref_pair given[3] = { { { -12.5, -14.0 }, { -13.0, -13.5 }, { 5, 6 } },
                                           { { -20.0, -18.5 }, { -19.0, -19.25 }, { 8, 7 } },
                                           { { -7.25, -9.75 }, { -8.0, -9.0 }, { 3, 4 } } };
static const double given_kl[2] = { 0.0833333333333333, 0 };

static void test_known(void **state)
{
    (void)state;
    for (int k = 0; k < KNOWN; k++) {
        struct pref_config c = config_of(known[k].settings);
        assert_null(pref_check(&c));
        double sum = 0;
        for (int i = 0; i < 3; i++)
            sum += pref_loss(&c, &given[i], given_kl).loss;
        near(known[k].settings, sum / 3, known[k].loss, 1e-10 * fabs(known[k].loss) + 1e-13);
    }
}

/* The rows above are the table's, in its order: a name and its function cannot be at different places. */
static void test_all_losses_are_here(void **state)
{
    (void)state;
    const char *at = options_find(&pref_options, "loss")->choices;
    for (int k = 0; k < LOSSES; k++) {
        struct pref_config c = config_of(known[k].settings);
        size_t n = strcspn(at, "|");
        assert_int_equal(c.loss, k);
        assert_true(!strncmp(known[k].settings + strlen("loss="), at, n));
        at += n + (at[n] == '|');
    }
    assert_string_equal(at, "");
}

static void test_at_reference(void **state)
{
    (void)state;
    const double kl[2] = { 0, 0 };
    const double of[][2] = { { -5, -6 }, { -0.1, -123456.75 }, { -30.3, -30.3 } };
    for (int k = 0; k < KNOWN; k++) {
        struct pref_config c = config_of(known[k].settings);
        for (size_t i = 0; i < sizeof of / sizeof of[0] && !isnan(known[k].at_reference); i++) {
            struct pref_pair x = { { of[i][0], of[i][1] }, { of[i][0], of[i][1] }, { 5, 6 } };
            double reward[PREF_REWARDS];
            near(known[k].settings, pref_loss(&c, &x, kl).loss, known[k].at_reference, 4e-15 * known[k].at_reference);
            pref_rewards(&c, &x, reward);
            for (int j = 0; j < PREF_REWARDS; j++)
                assert_true(reward[j] == 0);
        }
    }
    struct pref_config c = config_of("");
    struct pref_pair x = { { -5, -6 }, { -5, -6 }, { 1, 1 } };
    struct pref_value y = pref_loss(&c, &x, NULL);
    assert_true(y.loss == LN2 && y.d[0] == -0.05 && y.d[1] == 0.05);
}

/* A log-probability that is no number is never a loss that looks like one. */
static void test_not_a_number(void **state)
{
    (void)state;
    for (int k = 0; k < KNOWN; k++)
        for (int side = 0; side < 2; side++) {
            struct pref_config c = config_of(known[k].settings);
            struct pref_pair x = given[0];
            x.policy[side] = NAN;
            struct pref_value y = pref_loss(&c, &x, given_kl);
            assert_true(isnan(y.loss) && isnan(y.d[side]) == (c.loss != config_of("loss=hinge").loss));
        }
    assert_true(isnan(pref_kl(NAN, 3)));
}

/* ---- slopes ---- */

static double draw(uint32_t *s, double lo, double hi)
{
    *s = *s * 1664525u + 1013904223u;
    return lo + (hi - lo) * ((double)(*s >> 8) / 0x1p24);
}

static double loss_at(const struct pref_config *c, struct pref_pair x, int side, double by, const double *kl)
{
    x.policy[side] += by;
    return pref_loss(c, &x, kl).loss;
}

static void check_slopes(const char *settings, const struct pref_config *c, const struct pref_pair *x, const double *kl,
                         double h)
{
    struct pref_value y = pref_loss(c, x, kl);
    for (int side = 0; side < 2; side++) {
        double want = (loss_at(c, *x, side, h, kl) - loss_at(c, *x, side, -h, kl)) / (2 * h);
        near(settings, y.d[side], want, 1e-7 * (1e-3 + fabs(want)) + 1e-15 * fabs(y.loss) / h);
    }
}

static void test_slopes(void **state)
{
    (void)state;
    static const char *const more[] = { "loss=hinge f_divergence=js",
                                        "loss=ipo_sum f_divergence=alpha f_alpha=1.5",
                                        "loss=cdpo label_smoothing=0.3 f_divergence=forward_kl",
                                        "loss=exo_pair label_smoothing=0.2 f_divergence=alpha f_alpha=-0.5",
                                        "loss=ipo reference_free=true",
                                        "loss=kto_pair reference_free=true",
                                        "loss=discopop discopop_tau=1.5",
                                        "loss=robust label_smoothing=0.45",
                                        "loss=simpo simpo_gamma=0",
                                        "loss=alphapo alphapo_alpha=-0.7",
                                        "loss=alphapo alphapo_alpha=0 simpo_gamma=1",
                                        "loss=simpo weight=0.3 loss_2=sigmoid weight_2=2 loss_3=orpo weight_3=0.7",
                                        "loss=kto_pair weight=3 loss_2=alphapo loss_3=ipo weight_3=0.01" };
    const char *const betas[] = { "0.01", "0.1", "1.7" };
    uint32_t seed = 7;
    for (int k = 0; k < KNOWN + (int)(sizeof more / sizeof more[0]); k++)
        for (size_t b = 0; b < sizeof betas / sizeof betas[0]; b++) {
            const char *settings = k < KNOWN ? known[k].settings : more[k - KNOWN];
            struct pref_config c = config_of(settings);
            assert_null(pref_check(&c));
            assert_null(options_set(&pref_options, "beta", betas[b], &c, "test"));
            for (int i = 0; i < 20; i++) {
                double at[2] = { draw(&seed, -30, -4), draw(&seed, -30, -4) };
                double kl[2] = { draw(&seed, 0, 1), draw(&seed, 0, 1) };
                struct pref_pair x = { { at[0] + draw(&seed, -3, 3), at[1] + draw(&seed, -3, 3) },
                                       { at[0], at[1] },
                                       { 1 + floor(draw(&seed, 0, 30)), 1 + floor(draw(&seed, 0, 30)) } };
                check_slopes(settings, &c, &x, kl, 1e-5);
            }
        }
}

/* Terms add up with their weights, whatever each of them reads. */
static void test_terms(void **state)
{
    (void)state;
    struct pref_config all = config_of("loss=simpo weight=0.5 loss_2=kto_pair weight_2=3 loss_3=cpo weight_3=0.25");
    struct pref_config one[PREF_TERMS] = { config_of("loss=simpo"), config_of("loss=kto_pair"), config_of("loss=cpo") };
    const double weight[PREF_TERMS] = { 0.5, 3, 0.25 };
    assert_true(pref_uses_kl(&all) && pref_uses_reference(&all) && pref_nll_alpha(&all) == 0.25);
    for (int i = 0; i < 3; i++) {
        struct pref_value sum = { 0 }, got = pref_loss(&all, &given[i], given_kl);
        for (int k = 0; k < PREF_TERMS; k++) {
            struct pref_value y = pref_loss(&one[k], &given[i], given_kl);
            sum.loss += weight[k] * y.loss;
            sum.d[0] += weight[k] * y.d[0];
            sum.d[1] += weight[k] * y.d[1];
        }
        near("terms", got.loss, sum.loss, 1e-14);
        near("terms", got.d[0], sum.d[0], 1e-15);
        near("terms", got.d[1], sum.d[1], 1e-15);
    }
    struct pref_value y = { 2, { -3, 0.5 } }, w = pref_wpo(y, (double[]){ LN2, -2 * LN2 });
    near("wpo", w.loss, 1, 1e-15);
    near("wpo", w.d[0], -1.5, 1e-15);
    near("wpo", w.d[1], 0.25, 1e-15);
    assert_true(isnan(pref_wpo(y, (double[]){ 0, NAN }).loss));
}

/* AlphaPO becomes SimPO as alpha goes to 0, from either side. */
static void test_alphapo_ends(void **state)
{
    (void)state;
    static const char *const near_0[] = { "0", "1e-7", "-1e-7" };
    for (size_t a = 0; a < 3; a++)
        for (int i = 0; i < 3; i++) {
            struct pref_config c = config_of("loss=alphapo"), simpo = config_of("loss=simpo");
            assert_null(options_set(&pref_options, "alphapo_alpha", near_0[a], &c, "test"));
            struct pref_value x = pref_loss(&c, &given[i], NULL), y = pref_loss(&simpo, &given[i], NULL);
            near(near_0[a], x.loss, y.loss, 1e-6);
            near(near_0[a], x.d[0], y.d[0], 1e-6);
            near(near_0[a], x.d[1], y.d[1], 1e-6);
        }
    struct pref_config c = config_of("loss=alphapo beta=1e-6 alphapo_alpha=1 simpo_gamma=0");
    for (double ratio = -82; ratio <= -78; ratio++) { /* the power stops at e^80 */
        struct pref_value y = pref_loss(&c, &(struct pref_pair){ { ratio, 0 }, { 0, 0 }, { 1, 1 } }, NULL);
        assert_true(ratio > -80 ? y.d[0] < -1e20 : y.d[0] == 0);
    }
}

/* The hinge is flat beyond the margin, and on it. */
static void test_hinge_ends(void **state)
{
    (void)state;
    struct pref_config c = config_of("loss=hinge beta=0.5");
    struct pref_value below = pref_loss(&c, &(struct pref_pair){ { -1, -2.5 }, { -1, -1 }, { 1, 1 } }, NULL);
    struct pref_value on = pref_loss(&c, &(struct pref_pair){ { -1, -3 }, { -1, -1 }, { 1, 1 } }, NULL);
    struct pref_value beyond = pref_loss(&c, &(struct pref_pair){ { -1, -9 }, { -1, -1 }, { 1, 1 } }, NULL);
    assert_true(below.loss == 0.25 && below.d[0] == -0.5 && below.d[1] == 0.5);
    assert_true(on.loss == 0 && on.d[0] == 0 && on.d[1] == 0);
    assert_true(beyond.loss == 0 && beyond.d[0] == 0 && beyond.d[1] == 0);
}

/* No overflow and no NaN at ratios that a broken run reaches; probabilities of exactly 1 too. */
static void test_far_out(void **state)
{
    (void)state;
    const double far[] = { -1e5, -1e3, -90, -1, 0, 1, 90, 1e3, 1e5 };
    const double kl[2] = { 3, 4 };
    enum { FAR = sizeof far / sizeof far[0] };
    for (int k = 0; k < KNOWN; k++)
        for (int i = 0; i < FAR * FAR; i++) {
            struct pref_config c = config_of(known[k].settings);
            struct pref_pair x = { { -2e5 + far[i / FAR], -2e5 + far[i % FAR] }, { -2e5, -2e5 }, { 5, 6 } };
            if (isnan(known[k].at_reference)) /* log-probabilities are never positive */
                x = (struct pref_pair){ { -fabs(far[i / FAR]), -fabs(far[i % FAR]) }, { -2e5, -2e5 }, { 5, 6 } };
            struct pref_value y = pref_loss(&c, &x, kl);
            if (!isfinite(y.loss) || !isfinite(y.d[0]) || !isfinite(y.d[1]))
                fail_msg("%s at %g, %g: %g, slopes %g, %g", known[k].settings, far[i / FAR], far[i % FAR], y.loss,
                         y.d[0], y.d[1]);
        }
}

/* Beyond e^80 a divergence's score is constant, so its slope is 0. */
static void test_clamp(void **state)
{
    (void)state;
    struct pref_config c = config_of("f_divergence=forward_kl beta=1e-6");
    for (double ratio = -82; ratio <= -78; ratio++) {
        struct pref_value y = pref_loss(&c, &(struct pref_pair){ { ratio, 0 }, { 0, 0 }, { 1, 1 } }, NULL);
        assert_true(ratio > -80 ? y.d[0] < -1e20 : y.d[0] == 0);
        near("clamp", y.loss / (1e-6 * exp(-(ratio < -80 ? -80 : ratio))), 1, 1e-9);
    }
}

/* ---- NLL, KTO, KL, LD sums ---- */

static void test_nll(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        double alpha, nll, slope;
    } of[] = { { "loss=sigmoid", 0, 2.5, -0.2 },
               { "loss=rpo", 1, 2.5, -0.2 },
               { "loss=orpo nll_norm=token", 1, 1.5625, -0.125 },
               { "loss=cpo nll_alpha=0", 0, 2.5, -0.2 },
               { "loss=simpo nll_alpha=0.25", 0.25, 2.5, -0.2 },
               { "loss=sigmoid nll_alpha=3 nll_norm=token", 3, 1.5625, -0.125 } };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        struct pref_config c = config_of(of[i].settings);
        double slope;
        near(of[i].settings, pref_nll_alpha(&c), of[i].alpha, 0);
        near(of[i].settings, pref_nll(&c, -12.5, 5, 8, &slope), of[i].nll, 1e-15);
        near(of[i].settings, slope, of[i].slope, 1e-15);
    }
}

static void test_kto_and_kl(void **state)
{
    (void)state;
    double slope, h = 1e-6;
    near("kto", pref_kto(0.1, 0.5, 0.3, true, 1, &slope), 0.49500016666, 1e-12);
    near("kto", pref_kto(0.1, -0.5, 0.3, false, 1.33, &slope), 0.638414177593, 1e-12);
    for (int desirable = 0; desirable < 2; desirable++)
        for (double ratio = -8; ratio <= 8; ratio += 1.6) {
            double up = pref_kto(0.7, ratio + h, 0.4, desirable, 1.5, &slope);
            double down = pref_kto(0.7, ratio - h, 0.4, desirable, 1.5, &slope);
            pref_kto(0.7, ratio, 0.4, desirable, 1.5, &slope);
            near("kto slope", slope, (up - down) / (2 * h), 1e-9);
        }
    assert_true(pref_kl(6, 4) == 1.5 && pref_kl(-6, 4) == 0 && pref_kl(0, 4) == 0 && pref_kl(0, 0) == 0);
}

static void test_ld_sum(void **state)
{
    (void)state;
    const float logp[] = { 9, -1, -0.5f, 9, -2, -0.25f, -1.5f };
    const int32_t target[] = { -1, 0, 3, -1, 7, 1, 2 }; /* five scored tokens */
    const double want[] = { -2.625, -3.125, -3.375, -4.375, -4.5, -5.25 };
    for (uint32_t shared = 0; shared < 6; shared++)
        near("half", pref_ld_sum(logp, target, 7, shared, 0.5), want[shared], 0);
    near("none", pref_ld_sum(logp, target, 7, 3, 0), -3.5, 0);
    near("all", pref_ld_sum(logp, target, 7, 0, 1), -5.25, 0);
    near("no tokens", pref_ld_sum(logp, target, 0, 3, 0.5), 0, 0);
}

/* ---- configs ---- */

static void test_rewards_and_reference(void **state)
{
    (void)state;
    struct pref_config c = config_of("beta=0.5 f_divergence=js"), f = config_of("beta=0.5 reference_free=true");
    double r[PREF_REWARDS];
    pref_rewards(&c, &given[0], r);
    assert_true(r[0] == 0.25 && r[1] == -0.25 && r[2] == 0.5 && r[3] == 1);
    pref_rewards(&c, &given[1], r);
    assert_true(r[0] == -0.5 && r[1] == 0.375 && r[2] == -0.875 && r[3] == 0);
    pref_rewards(&f, &given[0], r);
    assert_true(r[0] == -6.25 && r[1] == -7 && r[3] == 1);
    for (int k = 0; k < KNOWN; k++) {
        c = config_of(known[k].settings);
        struct pref_pair x = given[1];
        x.reference[0] = x.reference[1] = NAN; /* not read where there is none */
        assert_int_equal(pref_uses_reference(&c), !isnan(known[k].at_reference));
        assert_int_equal(isnan(pref_loss(&c, &x, given_kl).loss), pref_uses_reference(&c));
        const double nans[2] = { NAN, NAN };
        assert_int_equal(isnan(pref_loss(&c, &given[1], nans).loss), pref_uses_kl(&c));
    }
}

static void test_check(void **state)
{
    (void)state;
    static const struct {
        const char *settings, *words;
    } refused[] = { { "label_smoothing=0.1", "cdpo" },
                    { "loss=hinge label_smoothing=0.1", "label_smoothing" },
                    { "loss=cdpo label_smoothing=0.5", "below 0.5" },
                    { "loss=robust label_smoothing=0.5", "below 0.5" },
                    { "loss=exo_pair", "above 0" },
                    { "loss=orpo reference_free=true", "orpo" },
                    { "loss=simpo reference_free=true", "simpo" },
                    { "loss=cpo reference_free=true", "cpo" },
                    { "loss=ipo f_divergence=js", "f_divergence" },
                    { "loss=simpo f_divergence=forward_kl", "simpo" },
                    { "loss=bco_pair f_divergence=js", "bco_pair" },
                    { "loss=kto_pair f_divergence=alpha", "kto_pair" },
                    { "reference_free=true f_divergence=js", "reference_free" },
                    { "f_divergence=alpha f_alpha=1", "reverse_kl" },
                    { "loss=ipo ld_alpha=0.5", "ld_alpha" },
                    { "loss=orpo ld_alpha=0", "orpo" },
                    { "loss=kto_pair ld_alpha=0.9", "kto_pair" },
                    { "loss_2=ipo ld_alpha=0.5", "algo.loss ipo" },
                    { "loss_3=simpo f_divergence=js", "algo.loss simpo" },
                    { "loss=simpo loss_2=orpo reference_free=true", "no reference" },
                    { "loss_3=exo_pair", "above 0" },
                    { "loss_2=hinge label_smoothing=0.1", "label_smoothing" } };
    static const char *const fine[] = { "loss=cdpo",
                                        "loss=cdpo label_smoothing=0.49",
                                        "reference_free=true ld_alpha=0.3",
                                        "loss=hinge f_divergence=alpha f_alpha=2 ld_alpha=0",
                                        "f_alpha=1",
                                        "loss=simpo loss_2=sigmoid reference_free=true",
                                        "loss=hinge loss_2=cdpo label_smoothing=0.1 ld_alpha=0.5",
                                        "loss=simpo loss_3=kto_pair wpo=true",
                                        "loss=kto_pair reference_free=true nll_alpha=2",
                                        "loss=rpo nll_alpha=0.5 nll_norm=token" };
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        struct pref_config c = config_of(refused[i].settings);
        status *st = pref_check(&c);
        if (!st || status_code(st) != ST_INVALID || !strstr(status_message(st), refused[i].words))
            fail_msg("%s: %s", refused[i].settings, st ? status_message(st) : "taken");
        status_free(st);
    }
    for (size_t i = 0; i < sizeof fine / sizeof fine[0]; i++) {
        struct pref_config c = config_of(fine[i]);
        assert_null(pref_check(&c));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known),        cmocka_unit_test(test_all_losses_are_here),
        cmocka_unit_test(test_slopes),       cmocka_unit_test(test_at_reference),
        cmocka_unit_test(test_hinge_ends),   cmocka_unit_test(test_far_out),
        cmocka_unit_test(test_nll),          cmocka_unit_test(test_kto_and_kl),
        cmocka_unit_test(test_ld_sum),       cmocka_unit_test(test_rewards_and_reference),
        cmocka_unit_test(test_check),        cmocka_unit_test(test_not_a_number),
        cmocka_unit_test(test_clamp),        cmocka_unit_test(test_terms),
        cmocka_unit_test(test_alphapo_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
