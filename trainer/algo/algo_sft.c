/* sft: supervised fine-tuning: the mean negative log-probability of the step's scored tokens.
 *
 *   loss = -sum logp / scored_tokens,   d loss / d logp = -1 / scored_tokens
 *
 * Every token of the step weighs the same, in whatever sequence, pack or rank it is. */
#include "trainer/algo/algo.h"
#include "trainer/ops/kernels.h"

static const struct algo_metric metrics[] = {
    { "loss", PER_STEP },
    { "mean_logp", PER_TOKEN },
    { "entropy", PER_TOKEN },
    { "mean_token_accuracy", PER_TOKEN },
};
enum { LOSS, MEAN_LOGP, ENTROPY, TOKEN_ACCURACY, COUNT };
_Static_assert(sizeof metrics / sizeof metrics[0] == COUNT, "a name a metric");

static void sft_loss(const void *config, const struct pack *p, const float *logp, const struct logprob_stats *tok,
                     const double *ref, const struct batch_counts *counts, double *scratch, float *dlogp,
                     double *metric)
{
    (void)config;
    (void)ref;
    (void)scratch;
    double weight = counts->scored_tokens ? 1 / (double)counts->scored_tokens : 0, sum = 0;
    for (int64_t i = 0; i < p->in.tokens; i++) {
        bool scored = p->target[i] >= 0;
        if (scored)
            sum += (double)logp[i];
        if (dlogp)
            dlogp[i] = scored ? (float)-weight : 0;
    }
    metric[LOSS] = -sum * weight;
    metric[MEAN_LOGP] = sum;
    metric[ENTROPY] = metric[TOKEN_ACCURACY] = 0;
    for (uint32_t s = 0; tok && s < (uint32_t)p->in.seg.count; s++) {
        metric[ENTROPY] += algo_segment_sum(p, s, tok->entropy);
        metric[TOKEN_ACCURACY] += algo_segment_sum(p, s, tok->top);
    }
}

static void sft_from_sums(const void *config, const struct pack *p, const struct sequence_sums *sums, const double *ref,
                          const struct batch_counts *counts, double *metric)
{
    (void)config;
    (void)ref;
    for (int j = 0; j < COUNT; j++)
        metric[j] = 0;
    for (int32_t s = 0; s < p->in.seg.count; s++) {
        metric[MEAN_LOGP] += sums[s].plain;
        metric[ENTROPY] += sums[s].entropy;
        metric[TOKEN_ACCURACY] += sums[s].top;
    }
    metric[LOSS] = counts->scored_tokens ? -metric[MEAN_LOGP] / (double)counts->scored_tokens : 0;
}

static void sft_slopes(const void *config, const struct batch_counts *counts, const struct kernels *k,
                       struct workers *w, struct loss_work *work)
{
    (void)config;
    k->sequence_sums(w, work);
    k->even_slopes(w, work, counts->scored_tokens ? -1 / (double)counts->scored_tokens : 0);
}

const struct algo_ops algo_sft_ops = {
    .name = "sft",
    .data = DATASET_SFT,
    .metrics = metrics,
    .metric_count = COUNT,
    .loss = sft_loss,
    .slopes = sft_slopes,
    .from_sums = sft_from_sums,
};
