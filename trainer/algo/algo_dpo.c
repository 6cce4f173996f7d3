/* dpo: direct preference optimisation and its relatives. What a pair's loss is, pref_losses.c says; this file takes
 * pairs from packs and gives tokens their gradients.
 *
 * The step's loss is the mean over its pairs of pref_loss + nll_alpha pref_nll. A sequence's log-probability is a sum
 * of its scored tokens' (weighted beyond the pair's common length: LD-DPO), so a token's gradient is its weight times
 * its sequence's. kto_pair's KLs are means over the step's global batch, whatever packs and ranks it is cut into. */
#include "trainer/algo/algo.h"
#include "trainer/algo/pref_losses.h"
#include "trainer/ops/kernels.h"

#include <math.h>

/* Values that make the algorithm; learning rates and batches are those of models of billions of parameters. Where the
 * source is TRL, its documentation attributes the values to the paper. */
static const struct algo_preset presets[] = {
    { "dpo", "loss=sigmoid beta=0.1", "Rafailov et al. 2023, arXiv:2305.18290, B" },
    { "robust", "loss=robust beta=0.01 label_smoothing=0.1", "Chowdhury et al. 2024, arXiv:2403.00409, B; TRL" },
    { "slic", "loss=hinge beta=0.1", "Zhao et al. 2023, arXiv:2305.10425; beta of TRL" },
    { "ipo", "loss=ipo beta=0.1", "Azar et al. 2023, arXiv:2310.12036; beta and averages of TRL" },
    { "tulu3", "loss=sigmoid_norm beta=5", "Lambert et al. 2024, arXiv:2411.15124" },
    { "simpo", "loss=simpo beta=2 simpo_gamma=1",
      "Meng et al. 2024, arXiv:2405.14734, Llama-3-Base: gamma / beta 0.5" },
    { "alphapo", "loss=alphapo beta=2.5 simpo_gamma=0.1 alphapo_alpha=0.25",
      "Gupta et al. 2025, arXiv:2501.03884, table 3, Mistral-Instruct; TRL" },
    { "cpo", "loss=cpo beta=0.1 nll_alpha=1", "Xu et al. 2024, arXiv:2401.08417" },
    { "orpo", "loss=orpo beta=0.1 nll_alpha=1 nll_norm=token", "Hong et al. 2024, arXiv:2403.07691, lambda 0.1; TRL" },
    { "rpo", "loss=rpo beta=0.1 nll_alpha=1 nll_norm=sequence", "Pang et al. 2024, arXiv:2404.19733" },
    { "kto_pair", "loss=kto_pair beta=0.1", "Ethayarajh et al. 2024, arXiv:2402.01306; TRL before 0.12" },
    { "bco", "loss=bco_pair beta=0.01", "Jung et al. 2024, arXiv:2404.04656, C; TRL" },
    { "nca", "loss=nca_pair beta=0.01", "Chen et al. 2024, arXiv:2402.05369, C; TRL" },
    { "sppo", "loss=sppo_hard beta=0.001", "Wu et al. 2024, arXiv:2405.00675: eta 1000" },
    { "exo", "loss=exo_pair beta=0.1 label_smoothing=0.001", "Ji et al. 2024, arXiv:2402.00856, B; smoothing of TRL" },
    { "apo_zero", "loss=apo_zero beta=0.1", "D'Oosterlinck et al. 2024, arXiv:2408.06266, 5.2; TRL" },
    { "apo_down", "loss=apo_down beta=0.1", "D'Oosterlinck et al. 2024, arXiv:2408.06266, 5.2; TRL" },
    { "discopop", "loss=discopop beta=0.05 discopop_tau=0.05", "Lu et al. 2024, arXiv:2406.08414, B.1 and E; TRL" },
    { "mpo", "loss=sigmoid weight=0.8 loss_2=bco_pair weight_2=0.2 nll_alpha=1 nll_norm=token beta=0.1",
      "Wang et al. 2024, arXiv:2411.10442: weights 0.8, 0.2, 1; TRL" },
    { "tr_dpo", "loss=sigmoid beta=0.1 reference=live ref_sync_steps=512 ref_sync_alpha=0.6",
      "Gorbatovski et al. 2024, arXiv:2404.09656; steps and alpha of TRL" },
    { 0 },
};

static const struct algo_metric metrics[] = {
    { "loss", PER_STEP },
    { "rewards/chosen", PER_ROW },
    { "rewards/rejected", PER_ROW },
    { "rewards/margins", PER_ROW },
    { "rewards/accuracies", PER_ROW },
    { "logps/chosen", PER_ROW },
    { "logps/rejected", PER_ROW },
    { "nll_loss", PER_ROW }, /* with algo.nll_norm, without algo.nll_alpha */
    { "logits/chosen", PER_FIRST_TOKEN },
    { "logits/rejected", PER_OTHER_TOKEN },
    { "entropy", PER_TOKEN },
    { "mean_token_accuracy", PER_FIRST_TOKEN }, /* of the chosen, as TRL has it */
};
enum {
    LOSS,
    REWARDS,
    LOGPS_CHOSEN = REWARDS + PREF_REWARDS,
    LOGPS_REJECTED,
    NLL_LOSS,
    LOGITS_CHOSEN,
    LOGITS_REJECTED,
    ENTROPY,
    TOKEN_ACCURACY,
    COUNT
};
_Static_assert(sizeof metrics / sizeof metrics[0] == COUNT, "a name a metric");
_Static_assert((int)COUNT <= (int)ALGO_METRICS, "the trainer has room for them");

/* Tokens of row r's sequences that weigh 1. */
static uint32_t shared_tokens(const struct pack *p, uint32_t r)
{
    const struct sequence *seq = p->data->seq + 2 * p->row[r];
    return seq[0].scored < seq[1].scored ? seq[0].scored : seq[1].scored;
}

static void dpo_sums(const void *config, const struct pack *p, const float *logp, double *sums)
{
    const struct pref_config *c = config;
    for (uint32_t s = 0; s < 2 * p->rows; s++) {
        int32_t at = p->offset[s];
        sums[s] = pref_ld_sum(logp + at, p->target + at, p->offset[s + 1] - at, shared_tokens(p, s / 2), c->ld_alpha);
    }
}

/* Row r of a pack, of which sums and ref are; ref may be NULL if it is not used. */
static struct pref_pair pair_of(const struct pack *p, uint32_t r, const double sums[2], const double *ref)
{
    const struct sequence *seq = p->data->seq + 2 * p->row[r];
    struct pref_pair x;
    for (uint32_t side = PREF_CHOSEN; side <= PREF_REJECTED; side++) {
        x.policy[side] = sums[side];
        x.reference[side] = ref ? ref[side] : 0;
        x.length[side] = seq[side].scored;
    }
    return x;
}

/* d loss / d logp of segment s: `sum` through the weighted sum, `plain` through the NLL. */
static void put_gradient(const struct pack *p, uint32_t s, double alpha, double sum, double plain, float *dlogp)
{
    uint32_t shared = shared_tokens(p, s / 2), seen = 0;
    for (int32_t i = p->offset[s]; i < p->offset[s + 1]; i++)
        dlogp[i] = p->target[i] >= 0 ? (float)((seen++ < shared ? sum : alpha * sum) + plain) : 0;
}

static int dpo_statistics(const void *config)
{
    return pref_uses_kl(config) ? 2 : 0;
}

static void dpo_statistic(const void *config, const struct pack *p, const float *logp, const double *ref,
                          double *scratch, double *value)
{
    value[PREF_CHOSEN] = value[PREF_REJECTED] = 0;
    dpo_sums(config, p, logp, scratch);
    for (uint32_t r = 0; r < p->rows; r++) {
        struct pref_pair x = pair_of(p, r, scratch + 2 * r, ref ? ref + 2 * r : NULL);
        value[PREF_CHOSEN] += pref_ratio(config, &x, PREF_CHOSEN);
        value[PREF_REJECTED] += pref_ratio(config, &x, PREF_REJECTED);
    }
}

/* NAN without statistics: a loss that wants them and did not get them must not look like one. */
static void batch_kl(const struct batch_counts *counts, double kl[2])
{
    for (int side = 0; side < 2; side++)
        kl[side] = counts->statistic ? pref_kl(counts->statistic[side], (double)counts->rows) : NAN;
}

static struct pref_step step_of(const struct pref_config *c, const struct batch_counts *counts)
{
    double rows = (double)counts->rows;
    struct pref_step s = { .c = *c,
                           .weight = rows > 0 ? 1 / rows : 0,
                           .nll_alpha = pref_nll_alpha(c),
                           .mean_length = (double)counts->first_tokens / rows };
    batch_kl(counts, s.kl);
    return s;
}

/* Row r, whose sequences have these sums. */
static struct pref_result take_row(const struct pref_step *s, const struct pack *p, uint32_t r,
                                   const struct sequence_sums sums[2], const double *ref, double *metric)
{
    struct pref_pair x = pair_of(p, r, (double[]){ sums[0].weighted, sums[1].weighted }, ref ? ref + 2 * r : NULL);
    struct pref_result y = pref_of_pair(s, &x, sums);
    double reward[PREF_REWARDS];
    pref_rewards(&s->c, &x, reward);
    for (int j = 0; j < PREF_REWARDS; j++)
        metric[REWARDS + j] += reward[j];
    metric[LOGPS_CHOSEN] += sums[PREF_CHOSEN].plain;
    metric[LOGPS_REJECTED] += sums[PREF_REJECTED].plain;
    metric[NLL_LOSS] += y.nll;
    metric[LOGITS_CHOSEN] += sums[PREF_CHOSEN].logit;
    metric[LOGITS_REJECTED] += sums[PREF_REJECTED].logit;
    metric[ENTROPY] += sums[PREF_CHOSEN].entropy + sums[PREF_REJECTED].entropy;
    metric[TOKEN_ACCURACY] += sums[PREF_CHOSEN].top;
    metric[LOSS] += (y.y.loss + (s->nll_alpha > 0 ? s->nll_alpha * y.nll : 0)) * s->weight;
    return y;
}

static void dpo_from_sums(const void *config, const struct pack *p, const struct sequence_sums *sums, const double *ref,
                          const struct batch_counts *counts, double *metric)
{
    struct pref_step s = step_of(config, counts);
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (uint32_t r = 0; r < p->rows; r++)
        (void)take_row(&s, p, r, sums + 2 * r, ref, metric);
}

static double dpo_alpha(const void *config)
{
    return ((const struct pref_config *)config)->ld_alpha;
}

static void dpo_slopes(const void *config, const struct batch_counts *counts, const struct kernels *k,
                       struct workers *w, struct loss_work *work)
{
    struct pref_step s = step_of(config, counts);
    work->alpha = dpo_alpha(config);
    k->sequence_sums(w, work);
    k->pair_slopes(w, work, &s);
}

static void dpo_loss(const void *config, const struct pack *p, const float *logp, const struct logprob_stats *tok,
                     const double *ref, const struct batch_counts *counts, double *scratch, float *dlogp,
                     double *metric)
{
    const struct pref_config *c = config;
    struct pref_step s = step_of(c, counts);
    (void)scratch;
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (uint32_t r = 0; r < p->rows; r++) {
        struct sequence_sums sums[2];
        for (uint32_t side = 0; side < 2; side++)
            sums[side] = algo_sequence_sums(p, 2 * r + side, logp, tok, shared_tokens(p, r), c->ld_alpha);
        struct pref_result y = take_row(&s, p, r, sums, ref, metric);
        for (uint32_t side = 0; dlogp && side < 2; side++)
            put_gradient(p, 2 * r + side, c->ld_alpha, y.by_sum[side], side == PREF_CHOSEN ? y.by_plain : 0, dlogp);
    }
}

static status *dpo_check(const void *config)
{
    return pref_check(config);
}

static bool dpo_reference_free(const void *config)
{
    return !pref_uses_reference(config);
}

const struct algo_ops algo_dpo_ops = {
    .name = "dpo",
    .data = DATASET_PREFS,
    .needs_reference = true,
    .options = &pref_options,
    .presets = presets,
    .config_bytes = sizeof(struct pref_config),
    .metrics = metrics,
    .metric_count = COUNT,
    .loss = dpo_loss,
    .slopes = dpo_slopes,
    .alpha = dpo_alpha,
    .from_sums = dpo_from_sums,
    .check = dpo_check,
    .reference_free = dpo_reference_free,
    .sums = dpo_sums,
    .statistics = dpo_statistics,
    .statistic = dpo_statistic,
};
