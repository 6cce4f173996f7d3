/* pref_losses: what a config may say of the losses of the DPO family, whose formulas are trainer/ops/pref.h's. A step's
 * loss is the mean of its pairs' losses, plus nll_alpha times the negative log-likelihood of the chosen. A pair's loss
 * is one of the table times its weight, or a sum of up to three. */
#ifndef TESSERA_TRAINER_ALGO_PREF_LOSSES_H
#define TESSERA_TRAINER_ALGO_PREF_LOSSES_H

#include "comm/base/options.h"
#include "trainer/ops/pref.h"

extern const struct option_table pref_options; /* section "algo" */

/* INVALID names the keys that do not go together. */
status *pref_check(const struct pref_config *c) WARN_UNUSED;
/* max(0, mean of the ratios): an estimate of KL(policy || reference) that takes no part in gradients. 0 for no rows. */
double pref_kl(double sum_of_ratios, double rows);
/* Weight of the NLL term: the config's or the losses' own. */
double pref_nll_alpha(const struct pref_config *c);

/* LD-DPO (arXiv:2409.06411): sum of the first `shared` scored tokens + alpha * the sum of the others, in token order;
 * shared = min(|chosen|, |rejected|). n tokens; those with target < 0 are not scored. Taken of policy and reference
 * alike. */
double pref_ld_sum(const float *logp, const int32_t *target, int32_t n, uint32_t shared, double alpha);

enum { PREF_REWARD_CHOSEN, PREF_REWARD_REJECTED, PREF_REWARD_MARGIN, PREF_REWARD_ACCURACY, PREF_REWARDS };
/* Implicit rewards, beta times the ratio (of sums, whatever loss and divergence), their difference, and 1 if it is
 * strictly positive. */
void pref_rewards(const struct pref_config *c, const struct pref_pair *x, double out[PREF_REWARDS]);

#endif
