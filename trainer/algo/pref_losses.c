/* pref_losses: the table. With s the logistic function, w and l the scores of chosen and rejected (pref_losses.h),
 * h = w - l and z = beta h. Losses marked [h] see only the difference: they take f-divergences and LD-DPO sums.
 *
 * A NaN in a log-probability must come out as a NaN: comparisons are written so that it passes (no fmin, fmax).
 *
 * To add a loss: a function, a row, its name in CHOICES at the same place; tests check gradients and order. */
#include "trainer/algo/pref_losses.h"

#include "trainer/algo/algo.h"

#include <math.h>

struct scores {
    double w, l, kl_w, kl_l;
};

typedef struct pref_value (*loss_fn)(const struct pref_config *c, const struct scores *x);

static double z_of(const struct pref_config *c, const struct scores *x)
{
    return c->beta * (x->w - x->l);
}

/* A loss of z alone, with slope dz. */
static struct pref_value of_z(const struct pref_config *c, double loss, double dz)
{
    return (struct pref_value){ loss, { c->beta * dz, -c->beta * dz } };
}

static double nls(double z) /* -log s(z) */
{
    return algo_neg_log_sigmoid(z);
}

static double sg(double z)
{
    return algo_sigmoid(z);
}

/* DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log s(z).  Averaged scores: Tulu 3 (arXiv:2411.15124).  Without
 * reference: CPO (arXiv:2401.08417).  With NLL: RPO (arXiv:2404.19733). */
static struct pref_value sigmoid(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x);
    return of_z(c, nls(z), -sg(-z));
}

/* cDPO (Mitchell 2023, "A note on DPO with noisy preferences"), e = label_smoothing: -(1-e) log s(z) - e log s(-z) */
static struct pref_value cdpo(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x), e = c->label_smoothing;
    return of_z(c, (1 - e) * nls(z) + e * nls(-z), e * sg(z) - (1 - e) * sg(-z));
}

/* Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): [-(1-e) log s(z) + e log s(-z)] / (1 - 2e) */
static struct pref_value robust(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x), e = c->label_smoothing, by = 1 - 2 * e;
    return of_z(c, ((1 - e) * nls(z) - e * nls(-z)) / by, -((1 - e) * sg(-z) + e * sg(z)) / by);
}

/* SLiC (Zhao et al. 2023, arXiv:2305.10425): max(0, 1 - z) */
static struct pref_value hinge(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x);
    return z >= 1 ? of_z(c, 0, 0) : of_z(c, 1 - z, -1);
}

/* IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), beta = tau: (h - 1 / (2 beta))^2.  `ipo` has averaged scores as
 * TRL, `ipo_sum` the paper's sums as OpenRLHF. */
static struct pref_value ipo(const struct pref_config *c, const struct scores *x)
{
    double off = x->w - x->l - 1 / (2 * c->beta);
    return (struct pref_value){ off * off, { 2 * off, -2 * off } };
}

/* SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): -log s(z - gamma), averaged scores, no reference. */
static struct pref_value simpo(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x) - c->simpo_gamma;
    return of_z(c, nls(z), -sg(-z));
}

/* e^x with x at most EXP_MAX (as TRL's clamp for f32), and its slope. */
static const double EXP_MAX = 80;
static double exp_clamped(double x, double *slope)
{
    double e = exp(x > EXP_MAX ? EXP_MAX : x);
    *slope = x < EXP_MAX ? e : 0;
    return e;
}

/* AlphaPO (Gupta et al. 2025, arXiv:2501.03884): SimPO with r = (1 - p^-a) / a of the average probability p in
 * place of log p, which it becomes as a goes to 0. */
static double alpha_reward(double log_p, double a, double *slope)
{
    if (a == 0) {
        *slope = 1;
        return log_p;
    }
    double e = exp_clamped(-a * log_p, slope);
    return (1 - e) / a;
}

static struct pref_value alphapo(const struct pref_config *c, const struct scores *x)
{
    double dw, dl, a = c->alphapo_alpha, w = alpha_reward(x->w, a, &dw), l = alpha_reward(x->l, a, &dl);
    struct pref_value y = simpo(c, &(struct scores){ .w = w, .l = l });
    return (struct pref_value){ y.loss, { y.d[0] * dw, y.d[1] * dl } };
}

/* log odds of an average log-probability a, and its slope 1 / (1 - e^a). f32 log-probabilities cannot tell e^a from 1
 * beyond ODDS_MAX, where odds are infinite. */
static const double ODDS_MAX = -0x1p-24;
static double log_odds(double a, double *slope)
{
    a = a > ODDS_MAX ? ODDS_MAX : a;
    double one_minus = -expm1(a);
    *slope = 1 / one_minus;
    return a - log(one_minus);
}

/* ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 7), beta = lambda, odds of averaged scores, no reference:
 * -beta log s(log odds w - log odds l); the NLL term completes it. */
static struct pref_value orpo(const struct pref_config *c, const struct scores *x)
{
    double dw, dl, u = log_odds(x->w, &dw) - log_odds(x->l, &dl), pull = c->beta * sg(-u);
    return (struct pref_value){ c->beta * nls(u), { -pull * dw, pull * dl } };
}

/* KTO on pairs (Ethayarajh et al. 2024, arXiv:2402.01306; TRL before 0.12), mean of two terms:
 * 1 - s(beta (w - KL_l)) and 1 - s(beta (KL_w - l)), each with the other half's KL. */
static struct pref_value kto_pair(const struct pref_config *c, const struct scores *x)
{
    struct pref_value y;
    y.loss = (pref_kto(c->beta, x->w, x->kl_l, true, 1, &y.d[0]) + pref_kto(c->beta, x->l, x->kl_w, false, 1, &y.d[1]));
    return (struct pref_value){ y.loss / 2, { y.d[0] / 2, y.d[1] / 2 } };
}

/* BCO (Jung et al. 2024, arXiv:2404.04656) in TRL's code, without its running mean: -log s(beta w) - log s(-beta l) */
static struct pref_value bco_pair(const struct pref_config *c, const struct scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return (struct pref_value){ nls(w) + nls(-l), { -b * sg(-w), b * sg(l) } };
}

/* NCA (Chen et al. 2024, arXiv:2402.05369): -log s(beta w) - .5 log s(-beta w) - .5 log s(-beta l) */
static struct pref_value nca_pair(const struct pref_config *c, const struct scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return (struct pref_value){ nls(w) + (nls(-w) + nls(-l)) / 2, { b * (sg(w) / 2 - sg(-w)), b * sg(l) / 2 } };
}

/* SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675): (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 */
static struct pref_value sppo_hard(const struct pref_config *c, const struct scores *x)
{
    double half = 1 / (2 * c->beta), w = x->w - half, l = x->l + half;
    return (struct pref_value){ w * w + l * l, { 2 * w, 2 * l } };
}

/* EXO on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16), e = label_smoothing > 0:
 * s(z) (log s(z) - log(1-e)) + s(-z) (log s(-z) - log e) */
static struct pref_value exo_pair(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x), p = sg(z), q = sg(-z), log_1e = log1p(-c->label_smoothing), log_e = log(c->label_smoothing);
    return of_z(c, p * (-nls(z) - log_1e) + q * (-nls(-z) - log_e), p * q * (z - log_1e + log_e));
}

/* APO (D'Oosterlinck et al. 2024, arXiv:2408.06266), zero: 1 - s(beta w) + s(beta l) */
static struct pref_value apo_zero(const struct pref_config *c, const struct scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return (struct pref_value){ sg(-w) + sg(l), { -b * sg(w) * sg(-w), b * sg(l) * sg(-l) } };
}

/* APO, down: s(beta w) + 1 - s(z) */
static struct pref_value apo_down(const struct pref_config *c, const struct scores *x)
{
    double b = c->beta, w = b * x->w, z = z_of(c, x), by_z = b * sg(z) * sg(-z);
    return (struct pref_value){ sg(w) + sg(-z), { b * sg(w) * sg(-w) - by_z, by_z } };
}

/* DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 7), m = s(z / tau): (1 - m) (-log s(z)) + m e^-z.  Where e^-z would
 * overflow, m is 0. */
static struct pref_value discopop(const struct pref_config *c, const struct scores *x)
{
    double z = z_of(c, x), m = sg(z / c->discopop_tau), q = sg(-z / c->discopop_tau), e = exp(z < -700 ? 700 : -z);
    return of_z(c, q * nls(z) + m * e, m * q / c->discopop_tau * (e - nls(z)) - q * sg(-z) - m * e);
}

/* ---- the table ---- */

enum {
    REFERENCE = 1,  /* scores are ratios to the reference */
    AVERAGE = 2,    /* scores are divided by length */
    DIFFERENCE = 4, /* [h] */
    SMOOTHING = 8,  /* reads label_smoothing */
    KL = 16,
};

#define CHOICES                                                                                                        \
    "sigmoid|cdpo|robust|hinge|ipo|ipo_sum|sigmoid_norm|simpo|cpo|orpo|rpo|kto_pair|bco_pair|nca_pair|sppo_hard|"      \
    "exo_pair|apo_zero|apo_down|discopop|alphapo"

static const struct loss_row {
    const char *name;
    unsigned flags;
    double nll_alpha; /* unless the config has one */
    loss_fn f;
} table[] = {
    { "sigmoid", REFERENCE | DIFFERENCE, 0, sigmoid },
    { "cdpo", REFERENCE | DIFFERENCE | SMOOTHING, 0, cdpo },
    { "robust", REFERENCE | DIFFERENCE | SMOOTHING, 0, robust },
    { "hinge", REFERENCE | DIFFERENCE, 0, hinge },
    { "ipo", REFERENCE | AVERAGE, 0, ipo },
    { "ipo_sum", REFERENCE | DIFFERENCE, 0, ipo },
    { "sigmoid_norm", REFERENCE | AVERAGE, 0, sigmoid },
    { "simpo", AVERAGE, 0, simpo },
    { "cpo", 0, 1, sigmoid },
    { "orpo", AVERAGE, 1, orpo },
    { "rpo", REFERENCE | DIFFERENCE, 1, sigmoid },
    { "kto_pair", REFERENCE | KL, 0, kto_pair },
    { "bco_pair", REFERENCE, 0, bco_pair },
    { "nca_pair", REFERENCE, 0, nca_pair },
    { "sppo_hard", REFERENCE, 0, sppo_hard },
    { "exo_pair", REFERENCE | DIFFERENCE | SMOOTHING, 0, exo_pair },
    { "apo_zero", REFERENCE, 0, apo_zero },
    { "apo_down", REFERENCE, 0, apo_down },
    { "discopop", REFERENCE | DIFFERENCE, 0, discopop },
    { "alphapo", AVERAGE, 0, alphapo },
};

#define ROW(type, field, key, def, min, max, choices, help)                                                            \
    {                                                                                                                  \
        key, type, def, min, max, choices, "", help, offsetof(struct pref_config, field)                               \
    }
static const struct option options[] = {
    ROW(OPT_ENUM, loss, "loss", "sigmoid", 0, 0, CHOICES, "the loss of a pair (docs/recipes.md has the formulas)"),
    ROW(OPT_FLOAT, weight[0], "weight", "1", 0, 1e3, NULL, "weight of loss"),
    ROW(OPT_ENUM, more[0], "loss_2", "none", 0, 0, "none|" CHOICES, "a second loss, added to the first"),
    ROW(OPT_FLOAT, weight[1], "weight_2", "1", 0, 1e3, NULL, "weight of loss_2"),
    ROW(OPT_ENUM, more[1], "loss_3", "none", 0, 0, "none|" CHOICES, "a third loss, added to the others"),
    ROW(OPT_FLOAT, weight[2], "weight_3", "1", 0, 1e3, NULL, "weight of loss_3"),
    ROW(OPT_FLOAT, beta, "beta", "0.1", 1e-6, 1e3, NULL,
        "strength of the pull towards the reference; rewards are beta times log-ratios; tau of ipo, lambda of orpo"),
    ROW(OPT_FLOAT, label_smoothing, "label_smoothing", "0", 0, 0.5, NULL,
        "share of pairs taken to be labelled the wrong way round, below 0.5; for cdpo, robust and exo_pair"),
    ROW(OPT_BOOL, reference_free, "reference_free", "false", 0, 0, NULL, "take the reference's log-probabilities as 0"),
    ROW(OPT_ENUM, f_divergence, "f_divergence", "reverse_kl", 0, 0, "reverse_kl|forward_kl|js|alpha",
        "the divergence from the reference that the loss is derived from"),
    ROW(OPT_FLOAT, f_alpha, "f_alpha", "0.5", -10, 10, NULL, "order of the alpha divergence, not 1"),
    ROW(OPT_FLOAT, nll_alpha, "nll_alpha", "-1", -1, 1e3, NULL,
        "weight of the chosen sequences' negative log-likelihood; negative: 1 (times the loss's weight) for rpo, orpo "
        "and cpo, 0 for the others"),
    ROW(OPT_ENUM, nll_norm, "nll_norm", "sequence", 0, 0, "sequence|token",
        "mean of that term: over tokens of a sequence, then sequences; or over all chosen tokens of the step"),
    ROW(OPT_FLOAT, ld_alpha, "ld_alpha", "1", 0, 1, NULL,
        "LD-DPO: weight of the tokens by which the longer sequence of a pair is longer"),
    ROW(OPT_FLOAT, simpo_gamma, "simpo_gamma", "0.5", 0, 1e3, NULL, "margin of simpo and alphapo"),
    ROW(OPT_FLOAT, alphapo_alpha, "alphapo_alpha", "0.25", -10, 10, NULL, "shape of alphapo's reward; 0: simpo"),
    ROW(OPT_FLOAT, discopop_tau, "discopop_tau", "0.05", 1e-6, 1e3, NULL, "temperature of discopop's blend"),
    ROW(OPT_BOOL, wpo, "wpo", "false", 0, 0, NULL,
        "WPO: weight pairs by how likely the policy finds both their sequences"),
};
const struct option_table pref_options = { "algo", options, sizeof options / sizeof options[0] };

/* Term i of the pair's loss, or NULL. */
static const struct loss_row *term(const struct pref_config *c, int i)
{
    return i == 0 ? &table[c->loss] : c->more[i - 1] ? &table[c->more[i - 1] - 1] : NULL;
}

/* Flags that one term has at least. */
static unsigned any_flags(const struct pref_config *c)
{
    unsigned flags = 0;
    for (int i = 0; i < PREF_TERMS; i++)
        flags |= term(c, i) ? term(c, i)->flags : 0;
    return flags;
}

bool pref_uses_reference(const struct pref_config *c)
{
    return (any_flags(c) & REFERENCE) && !c->reference_free;
}

bool pref_uses_kl(const struct pref_config *c)
{
    return any_flags(c) & KL;
}

double pref_nll_alpha(const struct pref_config *c)
{
    double own = 0;
    for (int i = 0; i < PREF_TERMS; i++)
        own += term(c, i) ? c->weight[i] * term(c, i)->nll_alpha : 0;
    return c->nll_alpha < 0 ? own : c->nll_alpha;
}

static status *check_smoothing(const struct pref_config *c, const struct loss_row *r)
{
    double e = c->label_smoothing;
    if (e != 0 && !(any_flags(c) & SMOOTHING)) /* a sigmoid that smooths is cdpo to some, plain to others: name which */
        return ERR(INVALID, "algo.label_smoothing %g has no part in algo.loss %s: it is for cdpo, robust and exo_pair",
                   e, r->name);
    if (e >= 0.5)
        return ERR(INVALID, "algo.label_smoothing must be below 0.5, not %g", e);
    if (r->f == exo_pair && e == 0)
        return ERR(INVALID, "algo.loss exo_pair needs algo.label_smoothing above 0 (the usual value is 1e-3)");
    return NULL;
}

static status *check_term(const struct pref_config *c, const struct loss_row *r)
{
    TRY(check_smoothing(c, r));
    if (c->reference_free && !(any_flags(c) & REFERENCE))
        return ERR(INVALID, "algo.reference_free: algo.loss %s has no reference to leave out", r->name);
    if (c->f_divergence != PREF_REVERSE_KL && !((r->flags & DIFFERENCE) && !c->reference_free))
        return ERR(
            INVALID,
            "algo.f_divergence is for losses of the difference of two summed log-ratios to a reference (sigmoid, "
            "cdpo, robust, hinge, ipo_sum, rpo, exo_pair, discopop), not for algo.loss %s%s",
            r->name, c->reference_free ? " with algo.reference_free" : "");
    if (c->f_divergence == PREF_ALPHA && c->f_alpha == 1)
        return ERR(INVALID, "algo.f_alpha 1 is algo.f_divergence reverse_kl");
    if (c->ld_alpha != 1 && !(r->flags & DIFFERENCE))
        return ERR(INVALID,
                   "algo.ld_alpha %g is for losses of the difference of two summed log-ratios (sigmoid, cdpo, robust, "
                   "hinge, ipo_sum, rpo, exo_pair, discopop), not for algo.loss %s",
                   c->ld_alpha, r->name);
    return NULL;
}

status *pref_check(const struct pref_config *c)
{
    for (int i = 0; i < PREF_TERMS; i++)
        if (term(c, i))
            TRY(check_term(c, term(c, i)));
    return NULL;
}

/* ---- from log-probabilities to losses ---- */

double pref_ratio(const struct pref_config *c, const struct pref_pair *x, enum pref_side side)
{
    return x->policy[side] - (pref_uses_reference(c) ? x->reference[side] : 0);
}

/* f-DPO (Wang et al. 2023, arXiv:2309.16240): f'(e^x) up to a constant, for the generator f of the divergence. */
static double diverge(const struct pref_config *c, double x, double *slope)
{
    double a = c->f_alpha - 1;
    switch ((enum pref_divergence)c->f_divergence) {
    case PREF_FORWARD_KL:
        return -exp_clamped(-x, slope);
    case PREF_JS:
        *slope = sg(-x);
        return -nls(x);
    case PREF_ALPHA:
        return exp_clamped(a * x, slope) / a;
    case PREF_REVERSE_KL:
        break;
    }
    *slope = 1;
    return x;
}

static double score(const struct pref_config *c, const struct loss_row *r, const struct pref_pair *x,
                    enum pref_side side, double *slope)
{
    bool reference = (r->flags & REFERENCE) && !c->reference_free;
    double ratio = x->policy[side] - (reference ? x->reference[side] : 0), n = x->length[side];
    if (!(r->flags & AVERAGE))
        return diverge(c, ratio, slope);
    *slope = n > 0 ? 1 / n : 0;
    return n > 0 ? ratio / n : 0;
}

static struct pref_value term_loss(const struct pref_config *c, const struct loss_row *r, const struct pref_pair *x,
                                   const double *kl)
{
    double slope[2];
    struct scores s = { .w = score(c, r, x, PREF_CHOSEN, &slope[PREF_CHOSEN]),
                        .l = score(c, r, x, PREF_REJECTED, &slope[PREF_REJECTED]),
                        .kl_w = kl ? kl[PREF_CHOSEN] : 0,
                        .kl_l = kl ? kl[PREF_REJECTED] : 0 };
    struct pref_value y = r->f(c, &s);
    y.d[PREF_CHOSEN] *= slope[PREF_CHOSEN];
    y.d[PREF_REJECTED] *= slope[PREF_REJECTED];
    return y;
}

struct pref_value pref_loss(const struct pref_config *c, const struct pref_pair *x, const double *kl)
{
    struct pref_value sum = { 0 };
    for (int i = 0; i < PREF_TERMS; i++) {
        const struct loss_row *r = term(c, i);
        if (!r)
            continue;
        struct pref_value y = term_loss(c, r, x, kl);
        sum.loss += c->weight[i] * y.loss;
        for (int side = 0; side < 2; side++)
            sum.d[side] += c->weight[i] * y.d[side];
    }
    return sum;
}

struct pref_value pref_wpo(struct pref_value y, const double log_weight[2])
{
    double w = exp(log_weight[PREF_CHOSEN] + log_weight[PREF_REJECTED]);
    return (struct pref_value){ w * y.loss, { w * y.d[PREF_CHOSEN], w * y.d[PREF_REJECTED] } };
}

double pref_kl(double sum_of_ratios, double rows)
{
    return rows > 0 && !(sum_of_ratios <= 0) ? sum_of_ratios / rows : 0;
}

double pref_nll(const struct pref_config *c, double chosen_sum, double length, double mean_length, double *slope)
{
    double by = c->nll_norm == PREF_NLL_TOKEN ? mean_length : length;
    *slope = -1 / by;
    return -chosen_sum / by;
}

double pref_ld_sum(const float *logp, const int32_t *target, int32_t n, uint32_t shared, double alpha)
{
    double sum = 0;
    uint32_t seen = 0;
    for (int32_t i = 0; i < n; i++)
        if (target[i] >= 0)
            sum += (seen++ < shared ? 1 : alpha) * (double)logp[i];
    return sum;
}

void pref_rewards(const struct pref_config *c, const struct pref_pair *x, double out[PREF_REWARDS])
{
    out[PREF_REWARD_CHOSEN] = c->beta * pref_ratio(c, x, PREF_CHOSEN);
    out[PREF_REWARD_REJECTED] = c->beta * pref_ratio(c, x, PREF_REJECTED);
    out[PREF_REWARD_MARGIN] = out[PREF_REWARD_CHOSEN] - out[PREF_REWARD_REJECTED];
    out[PREF_REWARD_ACCURACY] = out[PREF_REWARD_CHOSEN] > out[PREF_REWARD_REJECTED];
}

double pref_kto(double beta, double ratio, double z0, bool desirable, double weight, double *slope)
{
    double sign = desirable ? 1 : -1, u = sign * beta * (ratio - z0);
    *slope = -sign * weight * beta * sg(u) * sg(-u);
    return weight * sg(-u);
}
