/* pref_losses: names, options and what goes together. See pref_losses.h. */
#include "trainer/algo/pref_losses.h"

#define CHOICES                                                                                                        \
    "sigmoid|cdpo|robust|hinge|ipo|ipo_sum|sigmoid_norm|simpo|cpo|orpo|rpo|kto_pair|bco_pair|nca_pair|sppo_hard|"      \
    "exo_pair|apo_zero|apo_down|discopop|alphapo"

static const char *const names[] = { "sigmoid",  "cdpo",         "robust",   "hinge",    "ipo",
                                     "ipo_sum",  "sigmoid_norm", "simpo",    "cpo",      "orpo",
                                     "rpo",      "kto_pair",     "bco_pair", "nca_pair", "sppo_hard",
                                     "exo_pair", "apo_zero",     "apo_down", "discopop", "alphapo" };
_Static_assert(sizeof names / sizeof names[0] == PREF_KINDS, "a name a loss");
static const double nll_alphas[PREF_KINDS] = { [PREF_CPO] = 1, [PREF_ORPO] = 1, [PREF_RPO] = 1 }; /* unless set */

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

double pref_nll_alpha(const struct pref_config *c)
{
    double own = 0;
    for (int i = 0; i < PREF_TERMS; i++)
        own += pref_term(c, i) >= 0 ? c->weight[i] * nll_alphas[pref_term(c, i)] : 0;
    return c->nll_alpha < 0 ? own : c->nll_alpha;
}

static status *check_smoothing(const struct pref_config *c, int kind)
{
    double e = c->label_smoothing;
    if (e != 0 &&
        !(pref_any_flags(c) & PREF_SMOOTHING)) /* a sigmoid that smooths is cdpo to some, plain to others: name which */
        return ERR(INVALID, "algo.label_smoothing %g has no part in algo.loss %s: it is for cdpo, robust and exo_pair",
                   e, names[kind]);
    if (e >= 0.5)
        return ERR(INVALID, "algo.label_smoothing must be below 0.5, not %g", e);
    if (kind == PREF_EXO_PAIR && e == 0)
        return ERR(INVALID, "algo.loss exo_pair needs algo.label_smoothing above 0 (the usual value is 1e-3)");
    return NULL;
}

static status *check_term(const struct pref_config *c, int kind)
{
    TRY(check_smoothing(c, kind));
    if (c->reference_free && !(pref_any_flags(c) & PREF_REFERENCE))
        return ERR(INVALID, "algo.reference_free: algo.loss %s has no reference to leave out", names[kind]);
    if (c->f_divergence != PREF_REVERSE_KL && !((pref_flags(kind) & PREF_DIFFERENCE) && !c->reference_free))
        return ERR(
            INVALID,
            "algo.f_divergence is for losses of the difference of two summed log-ratios to a reference (sigmoid, "
            "cdpo, robust, hinge, ipo_sum, rpo, exo_pair, discopop), not for algo.loss %s%s",
            names[kind], c->reference_free ? " with algo.reference_free" : "");
    if (c->f_divergence == PREF_ALPHA && c->f_alpha == 1)
        return ERR(INVALID, "algo.f_alpha 1 is algo.f_divergence reverse_kl");
    if (c->ld_alpha != 1 && !(pref_flags(kind) & PREF_DIFFERENCE))
        return ERR(INVALID,
                   "algo.ld_alpha %g is for losses of the difference of two summed log-ratios (sigmoid, cdpo, robust, "
                   "hinge, ipo_sum, rpo, exo_pair, discopop), not for algo.loss %s",
                   c->ld_alpha, names[kind]);
    return NULL;
}

status *pref_check(const struct pref_config *c)
{
    for (int i = 0; i < PREF_TERMS; i++)
        if (pref_term(c, i) >= 0)
            TRY(check_term(c, pref_term(c, i)));
    return NULL;
}

/* ---- of a step ---- */

double pref_kl(double sum_of_ratios, double rows)
{
    return rows > 0 && !(sum_of_ratios <= 0) ? sum_of_ratios / rows : 0;
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
