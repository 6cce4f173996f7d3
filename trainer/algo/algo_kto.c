/* kto: Kahneman-Tversky optimisation on rows that are desirable or not, without pairs (Ethayarajh et al. 2024,
 * arXiv:2402.01306, eq. 8; as TRL). With c = l - l_ref of a completion and s the logistic function
 *
 *   desirable: w_D (1 - s(beta (c - z0))),  undesirable: w_U (1 - s(beta (z0 - c)));  the step's loss is the mean
 *   z0 = max(0, mean of l - l_ref over the step's mismatched sequences): all rows of all ranks, no gradient
 *
 * Packs of `loss` hold completions, packs of `statistic` the mismatched sequences (trainer/data/dataset.h). APO-zero
 * without pairs is the same with z0 = 0, and needs no mismatched ones. */
#include "trainer/algo/algo.h"
#include "trainer/algo/pref_losses.h"
#include "trainer/ops/kernels.h"

#include <math.h>

enum kto_loss { KTO, APO_ZERO_UNPAIRED };

struct kto_config {
    int loss; /* enum kto_loss */
    double beta, desirable_weight, undesirable_weight;
};

#define ROW(type, field, key, def, min, max, choices, help)                                                            \
    {                                                                                                                  \
        key, type, def, min, max, choices, "", help, offsetof(struct kto_config, field)                                \
    }
static const struct option options[] = {
    ROW(OPT_ENUM, loss, "loss", "kto", 0, 0, "kto|apo_zero_unpaired",
        "kto: against the divergence of mismatched completions; apo_zero_unpaired: against 0"),
    ROW(OPT_FLOAT, beta, "beta", "0.1", 1e-6, 1e3, NULL,
        "strength of the pull towards the reference; rewards are beta times log-ratios"),
    ROW(OPT_FLOAT, desirable_weight, "desirable_weight", "1", 0, 1e3, NULL,
        "weight of desirable rows; times their number, 1 to 4/3 of the same for undesirable ones is advised"),
    ROW(OPT_FLOAT, undesirable_weight, "undesirable_weight", "1", 0, 1e3, NULL, "weight of undesirable rows"),
};
static const struct option_table kto_options = { "algo", options, sizeof options / sizeof options[0] };

static const struct algo_preset presets[] = {
    { "kto", "loss=kto beta=0.1 desirable_weight=1 undesirable_weight=1",
      "Ethayarajh et al. 2024, arXiv:2402.01306; TRL" },
    { "apo_zero_unpaired", "loss=apo_zero_unpaired beta=0.1", "D'Oosterlinck et al. 2024, arXiv:2408.06266, 5.2" },
    { 0 },
};

/* Those of chosen and rejected are means over the step's desirable and undesirable rows; null where it has none. */
static const struct algo_metric metrics[] = {
    { "loss", PER_STEP },
    { "rewards/chosen", PER_DESIRABLE },
    { "rewards/rejected", PER_UNDESIRABLE },
    { "rewards/margins", PER_STEP },
    { "logps/chosen", PER_DESIRABLE },
    { "logps/rejected", PER_UNDESIRABLE },
    { "logits/chosen", PER_DESIRABLE_TOKEN },
    { "logits/rejected", PER_UNDESIRABLE_TOKEN },
    { "kl", PER_ROW }, /* z0 */
    { "count/chosen", PER_STEP },
    { "count/rejected", PER_STEP },
    { "entropy", PER_FIRST_TOKEN },
    { "mean_token_accuracy", PER_FIRST_TOKEN },
};
enum {
    LOSS,
    REWARDS, /* those that have two are at [undesirable] */
    MARGINS = REWARDS + 2,
    LOGPS,
    LOGITS = LOGPS + 2,
    KL = LOGITS + 2,
    COUNTS,
    ENTROPY = COUNTS + 2,
    TOKEN_ACCURACY,
    COUNT
};
_Static_assert(sizeof metrics / sizeof metrics[0] == COUNT, "a name a metric");
_Static_assert((int)COUNT <= (int)ALGO_METRICS, "the trainer has room for them");

static int kto_statistics(const void *config)
{
    const struct kto_config *c = config;
    return c->loss == KTO;
}

static void kto_statistic(const void *config, const struct pack *p, const float *logp, const double *ref,
                          double *scratch, double *value)
{
    (void)config;
    *value = 0;
    pack_sequence_sums(p, logp, scratch, NULL);
    for (uint32_t r = 0; r < p->rows; r++)
        *value += scratch[r] - ref[r];
}

/* NAN without statistics: a loss that wants them and did not get them must not look like one. */
static double baseline(const struct kto_config *c, const struct batch_counts *counts)
{
    if (c->loss != KTO)
        return 0;
    return counts->statistic ? pref_kl(counts->statistic[0], (double)counts->rows) : NAN;
}

static struct kto_step step_of(const struct kto_config *c, const struct batch_counts *counts)
{
    return (struct kto_step){
        c->beta, baseline(c, counts), { c->undesirable_weight, c->desirable_weight }, (double)counts->rows
    };
}

/* Row r, whose completion has these sums: the step's loss by its plain sum. */
static double take_row(const struct kto_step *s, const struct pack *p, uint32_t r, const struct sequence_sums *sums,
                       double ref, const struct batch_counts *counts, double *metric)
{
    bool good = p->data->desirable[p->row[r]];
    double slope, ratio = sums->plain - ref, reward = s->beta * ratio,
                  group = algo_divisor(counts, good ? PER_DESIRABLE : PER_UNDESIRABLE);
    metric[LOSS] += pref_kto(s->beta, ratio, s->z0, good, s->weight[good], &slope) / s->rows;
    metric[REWARDS + !good] += reward;
    metric[MARGINS] += group < s->rows ? (good ? reward : -reward) / group : NAN; /* a difference needs both */
    metric[LOGPS + !good] += sums->plain;
    metric[KL] += s->z0;
    metric[COUNTS + !good]++;
    metric[LOGITS + !good] += sums->logit;
    metric[ENTROPY] += sums->entropy;
    metric[TOKEN_ACCURACY] += sums->top;
    return slope / s->rows;
}

static void kto_from_sums(const void *config, const struct pack *p, const struct sequence_sums *sums, const double *ref,
                          const struct batch_counts *counts, double *metric)
{
    struct kto_step s = step_of(config, counts);
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (uint32_t r = 0; r < p->rows; r++)
        (void)take_row(&s, p, r, &sums[r], ref[r], counts, metric);
}

static void kto_slopes(const void *config, const struct batch_counts *counts, const struct kernels *k,
                       struct workers *w, struct loss_work *work)
{
    struct kto_step s = step_of(config, counts);
    k->sequence_sums(w, work);
    k->kto_slopes(w, work, &s);
}

static void kto_loss(const void *config, const struct pack *p, const float *logp, const struct logprob_stats *tok,
                     const double *ref, const struct batch_counts *counts, double *scratch, float *dlogp,
                     double *metric)
{
    struct kto_step s = step_of(config, counts);
    (void)scratch;
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (uint32_t r = 0; r < p->rows; r++) {
        struct sequence_sums sums = algo_sequence_sums(p, r, logp, tok, UINT32_MAX, 1);
        double slope = take_row(&s, p, r, &sums, ref[r], counts, metric);
        for (int32_t i = p->offset[r]; dlogp && i < p->offset[r + 1]; i++)
            dlogp[i] = p->target[i] >= 0 ? (float)slope : 0;
    }
}

const struct algo_ops algo_kto_ops = {
    .name = "kto",
    .data = DATASET_LABELLED,
    .needs_reference = true,
    .options = &kto_options,
    .presets = presets,
    .config_bytes = sizeof(struct kto_config),
    .metrics = metrics,
    .metric_count = COUNT,
    .loss = kto_loss,
    .slopes = kto_slopes,
    .from_sums = kto_from_sums,
    .statistics = kto_statistics,
    .statistic = kto_statistic,
};
