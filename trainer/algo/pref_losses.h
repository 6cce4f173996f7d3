/* pref_losses: the losses of the DPO family over sequence log-probabilities of a (chosen, rejected) pair. Pure f64
 * functions; no packs, no batches. One row a loss in pref_losses.c, where each has its formula and source.
 *
 * A pair's log-probabilities become two scores: the log-ratio to the reference (or the plain log-probability, for
 * losses without one), divided by the sequence's length if the loss averages, mapped by the f-divergence. The row's
 * function makes loss and slopes of the two scores; slopes with respect to log-probabilities follow by the chain rule.
 * A step's loss is the mean of its pairs' losses, plus nll_alpha times the negative log-likelihood of the chosen.
 * A pair's loss is one row of the table times its weight, or a sum of up to three. */
#ifndef TESSERA_TRAINER_ALGO_PREF_LOSSES_H
#define TESSERA_TRAINER_ALGO_PREF_LOSSES_H

#include "comm/base/options.h"

enum pref_nll_norm { PREF_NLL_SEQUENCE, PREF_NLL_TOKEN };
enum pref_divergence { PREF_REVERSE_KL, PREF_FORWARD_KL, PREF_JS, PREF_ALPHA };

enum { PREF_TERMS = 3 };

struct pref_config {
    int loss;                  /* row of the table: index into pref_options' choices */
    int more[PREF_TERMS - 1];  /* further terms: 0 none, else 1 + row */
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

extern const struct option_table pref_options; /* section "algo" */

/* INVALID names the keys that do not go together. */
status *pref_check(const struct pref_config *c) WARN_UNUSED;
/* False: reference values are not read. */
bool pref_uses_reference(const struct pref_config *c);
/* True: pref_loss reads kl, the pref_kl of both sides over the step's global batch. */
bool pref_uses_kl(const struct pref_config *c);

enum pref_side { PREF_CHOSEN, PREF_REJECTED };

struct pref_pair {
    double policy[2], reference[2]; /* sums of scored tokens' log-probabilities */
    double length[2];               /* scored tokens */
};

struct pref_value {
    double loss, d[2]; /* d loss / d policy[side] */
};

/* Loss of a pair without the NLL term and WPO's weight. kl may be NULL where pref_uses_kl is false. */
struct pref_value pref_loss(const struct pref_config *c, const struct pref_pair *x, const double *kl);
/* policy - reference of a side, or policy where no term reads the reference. */
double pref_ratio(const struct pref_config *c, const struct pref_pair *x, enum pref_side side);
/* WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2, as TRL): y times e^(log_weight[0] + log_weight[1]), each the
 * mean over a side's scored tokens of log p(token) - log sum_v p(v)^2. The weight takes no part in gradients. */
struct pref_value pref_wpo(struct pref_value y, const double log_weight[2]);
/* max(0, mean of the ratios): an estimate of KL(policy || reference) that takes no part in gradients. 0 for no rows. */
double pref_kl(double sum_of_ratios, double rows);

/* Weight of the NLL term: the config's or the losses' own. */
double pref_nll_alpha(const struct pref_config *c);
/* NLL of a chosen sequence, normalised so that the mean over a step's pairs is the batch's, and its slope by
 * chosen_sum. sequence: -sum / length (Iterative RPO, arXiv:2404.19733). token: -sum / mean_length, where mean_length =
 * chosen tokens of the step / pairs of the step, so that every token of the step weighs the same (TRL). */
double pref_nll(const struct pref_config *c, double chosen_sum, double length, double mean_length, double *slope);

/* LD-DPO (arXiv:2409.06411): sum of the first `shared` scored tokens + alpha * the sum of the others, in token order;
 * shared = min(|chosen|, |rejected|). n tokens; those with target < 0 are not scored. Taken of policy and reference
 * alike. */
double pref_ld_sum(const float *logp, const int32_t *target, int32_t n, uint32_t shared, double alpha);

enum { PREF_REWARD_CHOSEN, PREF_REWARD_REJECTED, PREF_REWARD_MARGIN, PREF_REWARD_ACCURACY, PREF_REWARDS };
/* Implicit rewards, beta times the ratio (of sums, whatever loss and divergence), their difference, and 1 if it is
 * strictly positive. */
void pref_rewards(const struct pref_config *c, const struct pref_pair *x, double out[PREF_REWARDS]);

/* KTO without pairs (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8): ratio = policy - reference of one completion,
 *   desirable: weight (1 - s(beta (ratio - z0))),  undesirable: weight (1 - s(beta (z0 - ratio)))
 * z0 = pref_kl of mismatched (prompt, completion) rows over the step's global batch. Slope by the policy's sum. */
double pref_kto(double beta, double ratio, double z0, bool desirable, double weight, double *slope);

#endif
