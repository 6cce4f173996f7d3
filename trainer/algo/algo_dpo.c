/* dpo: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), sigmoid loss.
 *
 * For a pair, with l = sum of the scored tokens' log-probabilities of a sequence, w = chosen, l = rejected:
 *   cw = l_policy(w) - l_ref(w),  cl = l_policy(l) - l_ref(l),  z = beta (cw - cl)
 *   loss = -log sigmoid(z),  d loss / d cw = -beta sigmoid(-z),  d loss / d cl = +beta sigmoid(-z)
 * The step's loss is the mean over its pairs. A token's gradient is its sequence's: l is a plain sum.
 *
 * sigmoid_loss knows one pair and nothing of packs: a variant of the loss is another such function. */
#include "trainer/algo/algo.h"

struct dpo_config {
    double beta;
};

static const struct option rows[] = {
    { "beta", OPT_FLOAT, "0.1", 1e-6, 1e3, NULL, "",
      "strength of the pull towards the reference; rewards are beta times log-ratios",
      offsetof(struct dpo_config, beta) },
};
static const struct option_table options = { "algo", rows, sizeof rows / sizeof rows[0] };

/* rewards are the implicit ones, beta times the log-ratio; accuracy counts pairs whose chosen reward is strictly
 * larger, so that it is 0 where policy and reference agree. */
static const struct algo_metric metrics[] = {
    { "loss", PER_ROW },
    { "rewards/chosen", PER_ROW },
    { "rewards/rejected", PER_ROW },
    { "rewards/margins", PER_ROW },
    { "rewards/accuracies", PER_ROW },
    { "logps/chosen", PER_ROW },
    { "logps/rejected", PER_ROW },
};
enum { LOSS, CHOSEN, REJECTED, MARGINS, ACCURACIES, LOGPS_CHOSEN, LOGPS_REJECTED, COUNT };
_Static_assert(sizeof metrics / sizeof metrics[0] == COUNT, "a name a metric");

struct pair {
    double cw, cl;               /* log-ratios of chosen and rejected */
    uint32_t length_w, length_l; /* scored tokens */
};

struct pair_loss {
    double loss, dw, dl; /* d loss / d cw, d loss / d cl */
};

static struct pair_loss sigmoid_loss(const struct dpo_config *c, const struct pair *x)
{
    double z = c->beta * (x->cw - x->cl), pull = c->beta * algo_sigmoid(-z);
    return (struct pair_loss){ algo_neg_log_sigmoid(z), -pull, pull };
}

/* Give every scored token of segment s the gradient d, the others 0. */
static void put_gradient(const struct pack *p, uint32_t s, double d, float *dlogp)
{
    for (int32_t i = p->offset[s]; i < p->offset[s + 1]; i++)
        dlogp[i] = p->target[i] >= 0 ? (float)d : 0;
}

static void dpo_loss(const void *config, const struct pack *p, const float *logp, const double *ref,
                     const struct batch_counts *counts, double *scratch, float *dlogp, double *metric)
{
    const struct dpo_config *c = config;
    double weight = counts->rows ? 1 / (double)counts->rows : 0, *sum = scratch;
    pack_sequence_sums(p, logp, sum, NULL);
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (uint32_t r = 0; r < p->rows; r++) {
        uint32_t w = 2 * r, l = 2 * r + 1;
        const struct sequence *seq = p->data->seq + 2 * p->row[r];
        struct pair x = { sum[w] - ref[w], sum[l] - ref[l], seq[0].scored, seq[1].scored };
        struct pair_loss y = sigmoid_loss(c, &x);
        double chosen = c->beta * x.cw, rejected = c->beta * x.cl;
        metric[LOSS] += y.loss * weight;
        metric[CHOSEN] += chosen;
        metric[REJECTED] += rejected;
        metric[MARGINS] += chosen - rejected;
        metric[ACCURACIES] += chosen > rejected;
        metric[LOGPS_CHOSEN] += sum[w];
        metric[LOGPS_REJECTED] += sum[l];
        if (!dlogp)
            continue;
        put_gradient(p, w, y.dw * weight, dlogp);
        put_gradient(p, l, y.dl * weight, dlogp);
    }
}

const struct algo_ops algo_dpo_ops = {
    .name = "dpo",
    .data = DATASET_PREFS,
    .needs_reference = true,
    .options = &options,
    .config_bytes = sizeof(struct dpo_config),
    .metrics = metrics,
    .metric_count = COUNT,
    .loss = dpo_loss,
};
