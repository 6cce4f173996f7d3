/* pref: the losses of the DPO family over sequence log-probabilities of a (chosen, rejected) pair, and of KTO without
 * pairs: the formulas, each with its source, for the host and for kernels of a GPU. Pure f64 functions; what a config
 * may say is trainer/algo/pref_losses.h's.
 *
 * A pair's log-probabilities become two scores: the log-ratio to the reference (or the plain log-probability, for
 * losses without one), divided by the sequence's length if the loss averages, mapped by the f-divergence. A loss's
 * function makes loss and slopes of the two scores; slopes with respect to log-probabilities follow by the chain rule.
 * With s the logistic function, w and l the scores of chosen and rejected, h = w - l and z = beta h. Losses with
 * PREF_DIFFERENCE see only h: they take f-divergences and LD-DPO sums.
 *
 * A NaN in a log-probability must come out as a NaN: comparisons are written so that it passes (no fmin, fmax).
 *
 * To add a loss: a function, its name in enum pref_kind and in the two switches here, and in pref_losses.c's table and
 * CHOICES at the same place; tests check gradients and order. */
#ifndef TESSERA_TRAINER_OPS_PREF_H
#define TESSERA_TRAINER_OPS_PREF_H

#include "comm/base/both.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* In the order of pref_options' choices. */
enum pref_kind {
    PREF_SIGMOID,
    PREF_CDPO,
    PREF_ROBUST,
    PREF_HINGE,
    PREF_IPO,
    PREF_IPO_SUM,
    PREF_SIGMOID_NORM,
    PREF_SIMPO,
    PREF_CPO,
    PREF_ORPO,
    PREF_RPO,
    PREF_KTO_PAIR,
    PREF_BCO_PAIR,
    PREF_NCA_PAIR,
    PREF_SPPO_HARD,
    PREF_EXO_PAIR,
    PREF_APO_ZERO,
    PREF_APO_DOWN,
    PREF_DISCOPOP,
    PREF_ALPHAPO,
    PREF_KINDS
};
enum pref_nll_norm { PREF_NLL_SEQUENCE, PREF_NLL_TOKEN };
enum pref_divergence { PREF_REVERSE_KL, PREF_FORWARD_KL, PREF_JS, PREF_ALPHA };

enum { PREF_TERMS = 3 };

struct pref_config {
    int loss;                  /* enum pref_kind */
    int more[PREF_TERMS - 1];  /* further terms: 0 none, else 1 + kind */
    double weight[PREF_TERMS]; /* of loss, of more */
    double beta;               /* IPO's tau, ORPO's lambda */
    double label_smoothing;
    bool reference_free;
    int f_divergence; /* enum pref_divergence */
    double f_alpha;
    double nll_alpha; /* negative: the loss's own */
    int nll_norm;     /* enum pref_nll_norm */
    double ld_alpha;
    double simpo_gamma, discopop_tau, alphapo_alpha;
    bool wpo;
};

enum pref_side { PREF_CHOSEN, PREF_REJECTED };

struct pref_pair {
    double policy[2], reference[2]; /* sums of scored tokens' log-probabilities */
    double length[2];               /* scored tokens */
};

struct pref_value {
    double loss, d[2]; /* d loss / d policy[side] */
};

BOTH struct pref_value pref_made(double loss, double chosen, double rejected)
{
    struct pref_value y;
    y.loss = loss;
    y.d[PREF_CHOSEN] = chosen;
    y.d[PREF_REJECTED] = rejected;
    return y;
}

/* Stable -log s(z) = max(-z, 0) + log1p(exp(-|z|)), and s(z). */
BOTH double pref_nls(double z)
{
    return (z < 0 ? -z : 0) + log1p(exp(-fabs(z)));
}

BOTH double pref_sg(double z)
{
    double e = exp(-fabs(z));
    return (z < 0 ? e : 1) / (1 + e);
}

/* KTO without pairs (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8): ratio = policy - reference of one completion,
 *   desirable: weight (1 - s(beta (ratio - z0))),  undesirable: weight (1 - s(beta (z0 - ratio)))
 * z0 = pref_kl of mismatched (prompt, completion) rows over the step's global batch. Slope by the policy's sum. */
BOTH double pref_kto(double beta, double ratio, double z0, bool desirable, double weight, double *slope)
{
    double sign = desirable ? 1 : -1, u = sign * beta * (ratio - z0);
    *slope = -sign * weight * beta * pref_sg(u) * pref_sg(-u);
    return weight * pref_sg(-u);
}

struct pref_scores {
    double w, l, kl_w, kl_l;
};

BOTH double pref_z_of(const struct pref_config *c, const struct pref_scores *x)
{
    return c->beta * (x->w - x->l);
}

/* A loss of z alone, with slope dz. */
BOTH struct pref_value pref_of_z(const struct pref_config *c, double loss, double dz)
{
    return pref_made(loss, c->beta * dz, -c->beta * dz);
}

/* DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log s(z).  Averaged scores: Tulu 3 (arXiv:2411.15124).  Without
 * reference: CPO (arXiv:2401.08417).  With NLL: RPO (arXiv:2404.19733). */
BOTH struct pref_value pref_sigmoid(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x);
    return pref_of_z(c, pref_nls(z), -pref_sg(-z));
}

/* cDPO (Mitchell 2023, "A note on DPO with noisy preferences"), e = label_smoothing: -(1-e) log s(z) - e log s(-z) */
BOTH struct pref_value pref_cdpo(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x), e = c->label_smoothing;
    return pref_of_z(c, (1 - e) * pref_nls(z) + e * pref_nls(-z), e * pref_sg(z) - (1 - e) * pref_sg(-z));
}

/* Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): [-(1-e) log s(z) + e log s(-z)] / (1 - 2e) */
BOTH struct pref_value pref_robust(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x), e = c->label_smoothing, by = 1 - 2 * e;
    return pref_of_z(c, ((1 - e) * pref_nls(z) - e * pref_nls(-z)) / by,
                     -((1 - e) * pref_sg(-z) + e * pref_sg(z)) / by);
}

/* SLiC (Zhao et al. 2023, arXiv:2305.10425): max(0, 1 - z) */
BOTH struct pref_value pref_hinge(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x);
    return z >= 1 ? pref_of_z(c, 0, 0) : pref_of_z(c, 1 - z, -1);
}

/* IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), beta = tau: (h - 1 / (2 beta))^2.  `ipo` has averaged scores as
 * TRL, `ipo_sum` the paper's sums as OpenRLHF. */
BOTH struct pref_value pref_ipo(const struct pref_config *c, const struct pref_scores *x)
{
    double off = x->w - x->l - 1 / (2 * c->beta);
    return pref_made(off * off, 2 * off, -2 * off);
}

/* SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): -log s(z - gamma), averaged scores, no reference. */
BOTH struct pref_value pref_simpo(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x) - c->simpo_gamma;
    return pref_of_z(c, pref_nls(z), -pref_sg(-z));
}

/* e^x with x at most PREF_EXP_MAX (as TRL's clamp for f32), and its slope. */
#define PREF_EXP_MAX 80.0
BOTH double pref_exp_clamped(double x, double *slope)
{
    double e = exp(x > PREF_EXP_MAX ? PREF_EXP_MAX : x);
    *slope = x < PREF_EXP_MAX ? e : 0;
    return e;
}

/* AlphaPO (Gupta et al. 2025, arXiv:2501.03884): SimPO with r = (1 - p^-a) / a of the average probability p in
 * place of log p, which it becomes as a goes to 0. */
BOTH double pref_alpha_reward(double log_p, double a, double *slope)
{
    if (a == 0) {
        *slope = 1;
        return log_p;
    }
    double e = pref_exp_clamped(-a * log_p, slope);
    return (1 - e) / a;
}

BOTH struct pref_value pref_alphapo(const struct pref_config *c, const struct pref_scores *x)
{
    double dw, dl, a = c->alphapo_alpha, w = pref_alpha_reward(x->w, a, &dw), l = pref_alpha_reward(x->l, a, &dl);
    struct pref_scores rewards = { w, l, 0, 0 };
    struct pref_value y = pref_simpo(c, &rewards);
    return pref_made(y.loss, y.d[0] * dw, y.d[1] * dl);
}

/* log odds of an average log-probability a, and its slope 1 / (1 - e^a). f32 log-probabilities cannot tell e^a from 1
 * beyond PREF_ODDS_MAX, where odds are infinite. */
#define PREF_ODDS_MAX (-1.0 / 16777216)
BOTH double pref_log_odds(double a, double *slope)
{
    a = a > PREF_ODDS_MAX ? PREF_ODDS_MAX : a;
    double one_minus = -expm1(a);
    *slope = 1 / one_minus;
    return a - log(one_minus);
}

/* ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 7), beta = lambda, odds of averaged scores, no reference:
 * -beta log s(log odds w - log odds l); the NLL term completes it. */
BOTH struct pref_value pref_orpo(const struct pref_config *c, const struct pref_scores *x)
{
    double dw, dl, u = pref_log_odds(x->w, &dw) - pref_log_odds(x->l, &dl), pull = c->beta * pref_sg(-u);
    return pref_made(c->beta * pref_nls(u), -pull * dw, pull * dl);
}

/* KTO on pairs (Ethayarajh et al. 2024, arXiv:2402.01306; TRL before 0.12), mean of two terms:
 * 1 - s(beta (w - KL_l)) and 1 - s(beta (KL_w - l)), each with the other half's KL. */
BOTH struct pref_value pref_kto_pair(const struct pref_config *c, const struct pref_scores *x)
{
    struct pref_value y;
    y.loss = (pref_kto(c->beta, x->w, x->kl_l, true, 1, &y.d[0]) + pref_kto(c->beta, x->l, x->kl_w, false, 1, &y.d[1]));
    return pref_made(y.loss / 2, y.d[0] / 2, y.d[1] / 2);
}

/* BCO (Jung et al. 2024, arXiv:2404.04656) in TRL's code, without its running mean: -log s(beta w) - log s(-beta l) */
BOTH struct pref_value pref_bco_pair(const struct pref_config *c, const struct pref_scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return pref_made(pref_nls(w) + pref_nls(-l), -b * pref_sg(-w), b * pref_sg(l));
}

/* NCA (Chen et al. 2024, arXiv:2402.05369): -log s(beta w) - .5 log s(-beta w) - .5 log s(-beta l) */
BOTH struct pref_value pref_nca_pair(const struct pref_config *c, const struct pref_scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return pref_made(pref_nls(w) + (pref_nls(-w) + pref_nls(-l)) / 2, b * (pref_sg(w) / 2 - pref_sg(-w)),
                     b * pref_sg(l) / 2);
}

/* SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675): (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 */
BOTH struct pref_value pref_sppo_hard(const struct pref_config *c, const struct pref_scores *x)
{
    double half = 1 / (2 * c->beta), w = x->w - half, l = x->l + half;
    return pref_made(w * w + l * l, 2 * w, 2 * l);
}

/* EXO on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16), e = label_smoothing > 0:
 * s(z) (log s(z) - log(1-e)) + s(-z) (log s(-z) - log e) */
BOTH struct pref_value pref_exo_pair(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x), p = pref_sg(z), q = pref_sg(-z), log_1e = log1p(-c->label_smoothing),
           log_e = log(c->label_smoothing);
    return pref_of_z(c, p * (-pref_nls(z) - log_1e) + q * (-pref_nls(-z) - log_e), p * q * (z - log_1e + log_e));
}

/* APO (D'Oosterlinck et al. 2024, arXiv:2408.06266), zero: 1 - s(beta w) + s(beta l) */
BOTH struct pref_value pref_apo_zero(const struct pref_config *c, const struct pref_scores *x)
{
    double b = c->beta, w = b * x->w, l = b * x->l;
    return pref_made(pref_sg(-w) + pref_sg(l), -b * pref_sg(w) * pref_sg(-w), b * pref_sg(l) * pref_sg(-l));
}

/* APO, down: s(beta w) + 1 - s(z) */
BOTH struct pref_value pref_apo_down(const struct pref_config *c, const struct pref_scores *x)
{
    double b = c->beta, w = b * x->w, z = pref_z_of(c, x), by_z = b * pref_sg(z) * pref_sg(-z);
    return pref_made(pref_sg(w) + pref_sg(-z), b * pref_sg(w) * pref_sg(-w) - by_z, by_z);
}

/* DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 7), m = s(z / tau): (1 - m) (-log s(z)) + m e^-z.  Where e^-z would
 * overflow, m is 0. */
BOTH struct pref_value pref_discopop(const struct pref_config *c, const struct pref_scores *x)
{
    double z = pref_z_of(c, x), m = pref_sg(z / c->discopop_tau), q = pref_sg(-z / c->discopop_tau),
           e = exp(z < -700 ? 700 : -z);
    return pref_of_z(c, q * pref_nls(z) + m * e, m * q / c->discopop_tau * (e - pref_nls(z)) - q * pref_sg(-z) - m * e);
}

/* ---- from log-probabilities to losses ---- */

enum {
    PREF_REFERENCE = 1,  /* scores are ratios to the reference */
    PREF_AVERAGE = 2,    /* scores are divided by length */
    PREF_DIFFERENCE = 4, /* of h alone */
    PREF_SMOOTHING = 8,  /* reads label_smoothing */
    PREF_KL = 16,        /* reads kl */
};

BOTH unsigned pref_flags(int kind)
{
    switch (kind) {
    case PREF_CDPO:
    case PREF_ROBUST:
    case PREF_EXO_PAIR:
        return PREF_REFERENCE | PREF_DIFFERENCE | PREF_SMOOTHING;
    case PREF_SIGMOID:
    case PREF_HINGE:
    case PREF_IPO_SUM:
    case PREF_RPO:
    case PREF_DISCOPOP:
        return PREF_REFERENCE | PREF_DIFFERENCE;
    case PREF_IPO:
    case PREF_SIGMOID_NORM:
        return PREF_REFERENCE | PREF_AVERAGE;
    case PREF_SIMPO:
    case PREF_ORPO:
    case PREF_ALPHAPO:
        return PREF_AVERAGE;
    case PREF_KTO_PAIR:
        return PREF_REFERENCE | PREF_KL;
    case PREF_CPO:
        return 0;
    default:
        return PREF_REFERENCE;
    }
}

BOTH struct pref_value pref_of_scores(int kind, const struct pref_config *c, const struct pref_scores *x)
{
    switch (kind) {
    case PREF_CDPO:
        return pref_cdpo(c, x);
    case PREF_ROBUST:
        return pref_robust(c, x);
    case PREF_HINGE:
        return pref_hinge(c, x);
    case PREF_IPO:
    case PREF_IPO_SUM:
        return pref_ipo(c, x);
    case PREF_SIMPO:
        return pref_simpo(c, x);
    case PREF_ORPO:
        return pref_orpo(c, x);
    case PREF_KTO_PAIR:
        return pref_kto_pair(c, x);
    case PREF_BCO_PAIR:
        return pref_bco_pair(c, x);
    case PREF_NCA_PAIR:
        return pref_nca_pair(c, x);
    case PREF_SPPO_HARD:
        return pref_sppo_hard(c, x);
    case PREF_EXO_PAIR:
        return pref_exo_pair(c, x);
    case PREF_APO_ZERO:
        return pref_apo_zero(c, x);
    case PREF_APO_DOWN:
        return pref_apo_down(c, x);
    case PREF_DISCOPOP:
        return pref_discopop(c, x);
    case PREF_ALPHAPO:
        return pref_alphapo(c, x);
    default: /* sigmoid, sigmoid_norm, cpo, rpo */
        return pref_sigmoid(c, x);
    }
}

/* The kind of term i of the pair's loss, or -1: there is none. */
BOTH int pref_term(const struct pref_config *c, int i)
{
    return i == 0 ? c->loss : c->more[i - 1] - 1;
}

/* Flags that one term has at least. */
BOTH unsigned pref_any_flags(const struct pref_config *c)
{
    unsigned flags = 0;
    for (int i = 0; i < PREF_TERMS; i++)
        flags |= pref_term(c, i) >= 0 ? pref_flags(pref_term(c, i)) : 0;
    return flags;
}

/* False: reference values are not read. */
BOTH bool pref_uses_reference(const struct pref_config *c)
{
    return (pref_any_flags(c) & PREF_REFERENCE) && !c->reference_free;
}

/* True: pref_loss reads kl, the pref_kl of both sides over the step's global batch. */
BOTH bool pref_uses_kl(const struct pref_config *c)
{
    return (pref_any_flags(c) & PREF_KL) != 0;
}

/* policy - reference of a side, or policy where no term reads the reference. */
BOTH double pref_ratio(const struct pref_config *c, const struct pref_pair *x, int side)
{
    return x->policy[side] - (pref_uses_reference(c) ? x->reference[side] : 0);
}

/* f-DPO (Wang et al. 2023, arXiv:2309.16240): f'(e^x) up to a constant, for the generator f of the divergence. */
BOTH double pref_diverge(const struct pref_config *c, double x, double *slope)
{
    double a = c->f_alpha - 1;
    switch (c->f_divergence) {
    case PREF_FORWARD_KL:
        return -pref_exp_clamped(-x, slope);
    case PREF_JS:
        *slope = pref_sg(-x);
        return -pref_nls(x);
    case PREF_ALPHA:
        return pref_exp_clamped(a * x, slope) / a;
    default: /* PREF_REVERSE_KL */
        *slope = 1;
        return x;
    }
}

BOTH double pref_score(const struct pref_config *c, int kind, const struct pref_pair *x, int side, double *slope)
{
    bool reference = (pref_flags(kind) & PREF_REFERENCE) && !c->reference_free;
    double ratio = x->policy[side] - (reference ? x->reference[side] : 0), n = x->length[side];
    if (!(pref_flags(kind) & PREF_AVERAGE))
        return pref_diverge(c, ratio, slope);
    *slope = n > 0 ? 1 / n : 0;
    return n > 0 ? ratio / n : 0;
}

BOTH struct pref_value pref_term_loss(const struct pref_config *c, int kind, const struct pref_pair *x,
                                      const double *kl)
{
    double slope[2];
    struct pref_scores s;
    s.w = pref_score(c, kind, x, PREF_CHOSEN, &slope[PREF_CHOSEN]);
    s.l = pref_score(c, kind, x, PREF_REJECTED, &slope[PREF_REJECTED]);
    s.kl_w = kl ? kl[PREF_CHOSEN] : 0;
    s.kl_l = kl ? kl[PREF_REJECTED] : 0;
    struct pref_value y = pref_of_scores(kind, c, &s);
    y.d[PREF_CHOSEN] *= slope[PREF_CHOSEN];
    y.d[PREF_REJECTED] *= slope[PREF_REJECTED];
    return y;
}

/* Loss of a pair without the NLL term and WPO's weight. kl may be NULL where pref_uses_kl is false. */
BOTH struct pref_value pref_loss(const struct pref_config *c, const struct pref_pair *x, const double *kl)
{
    struct pref_value sum = pref_made(0, 0, 0);
    for (int i = 0; i < PREF_TERMS; i++) {
        int kind = pref_term(c, i);
        if (kind < 0)
            continue;
        struct pref_value y = pref_term_loss(c, kind, x, kl);
        sum.loss += c->weight[i] * y.loss;
        for (int side = 0; side < 2; side++)
            sum.d[side] += c->weight[i] * y.d[side];
    }
    return sum;
}

/* WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2, as TRL): y times e^(log_weight[0] + log_weight[1]), each the
 * mean over a side's scored tokens of log p(token) - log sum_v p(v)^2. The weight takes no part in gradients. */
BOTH struct pref_value pref_wpo(struct pref_value y, const double log_weight[2])
{
    double w = exp(log_weight[PREF_CHOSEN] + log_weight[PREF_REJECTED]);
    return pref_made(w * y.loss, w * y.d[PREF_CHOSEN], w * y.d[PREF_REJECTED]);
}

/* NLL of a chosen sequence, normalised so that the mean over a step's pairs is the batch's, and its slope by
 * chosen_sum. sequence: -sum / length (Iterative RPO, arXiv:2404.19733). token: -sum / mean_length, where mean_length =
 * chosen tokens of the step / pairs of the step, so that every token of the step weighs the same (TRL). */
BOTH double pref_nll(const struct pref_config *c, double chosen_sum, double length, double mean_length, double *slope)
{
    double by = c->nll_norm == PREF_NLL_TOKEN ? mean_length : length;
    *slope = -1 / by;
    return -chosen_sum / by;
}

/* ---- a step's ---- */

/* Of a sequence's scored tokens: sums of log-probabilities, plain and weighted (those beyond the pair's common length
 * by ld_alpha), of log p(token) - log sum_v p(v)^2, and of the statistics (ops.h). */
struct sequence_sums {
    double plain, weighted, log_weight, logit, entropy, top;
};

/* What the pairs of a step have in common. */
struct pref_step {
    struct pref_config c;
    double weight, nll_alpha, mean_length, kl[2]; /* weight: 1 / pairs of the step */
};

/* Of one of them: its loss, NLL, and slopes of the step's loss by the chosen and rejected sequences' weighted sums, and
 * by the chosen one's plain sum. */
struct pref_result {
    struct pref_value y;
    double nll, by_sum[2], by_plain;
};

BOTH struct pref_result pref_of_pair(const struct pref_step *s, const struct pref_pair *x,
                                     const struct sequence_sums sums[2])
{
    struct pref_result r;
    double slope, log_weight[2];
    r.y = pref_loss(&s->c, x, s->kl);
    for (int side = 0; side < 2; side++)
        log_weight[side] = x->length[side] > 0 ? sums[side].log_weight / x->length[side] : sums[side].log_weight;
    if (s->c.wpo)
        r.y = pref_wpo(r.y, log_weight);
    r.nll = pref_nll(&s->c, sums[PREF_CHOSEN].plain, x->length[PREF_CHOSEN], s->mean_length, &slope);
    for (int side = 0; side < 2; side++)
        r.by_sum[side] = r.y.d[side] * s->weight;
    r.by_plain = s->nll_alpha > 0 ? s->nll_alpha * slope * s->weight : 0;
    return r;
}

/* What the rows of a step of KTO have in common; weight: of undesirable, desirable ones. */
struct kto_step {
    double beta, z0, weight[2], rows;
};

/* The step's loss by this row's plain sum. */
BOTH double kto_of_row(const struct kto_step *s, double sum, double ref, bool good)
{
    double slope;
    (void)pref_kto(s->beta, sum - ref, s->z0, good, s->weight[good ? 1 : 0], &slope);
    return slope / s->rows;
}

/* What a token's gradient is made of: its weight times by_sum, plus by_plain. */
struct loss_slopes {
    double by_sum, by_plain;
};
BOTH struct loss_slopes pref_slopes(const struct pref_step *s, const struct sequence_sums sums[2],
                                    const double reference[2], const int32_t scored[2], int side)
{
    struct pref_pair x;
    struct loss_slopes y;
    for (int i = 0; i < 2; i++) {
        x.policy[i] = sums[i].weighted;
        x.reference[i] = reference[i];
        x.length[i] = scored[i];
    }
    struct pref_result r = pref_of_pair(s, &x, sums);
    y.by_sum = r.by_sum[side];
    y.by_plain = side == PREF_CHOSEN ? r.by_plain : 0;
    return y;
}

#endif
