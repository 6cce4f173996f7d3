/* pref: losses of sequences, as a GPU makes them (kernels.h), plainly. What trains on the CPU is algo/. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>

void cpu_sequence_sums(struct workers *w, const struct loss_work *l)
{
    (void)w;
    for (int32_t s = 0; s < l->segments; s++) {
        struct sequence_sums y = { .log_weight = l->stats.logit ? 0 : NAN };
        for (int32_t i = l->offset[s]; i < l->offset[s + 1]; i++) {
            double p = (double)l->logp[i];
            y.plain += p;
            y.weighted += (i < l->shared[s] ? 1 : l->alpha) * p;
            if (!l->stats.logit)
                continue;
            y.log_weight += p - (double)l->stats.log_square[i];
            y.logit += (double)l->stats.logit[i];
            y.entropy += (double)l->stats.entropy[i];
            y.top += (double)l->stats.top[i];
        }
        l->sums[s] = y;
    }
}

static void spread(const struct loss_work *l, int32_t s, struct loss_slopes y)
{
    for (int32_t i = l->offset[s]; i < l->offset[s + 1]; i++)
        l->dlogp[i] = l->target[i] < 0 ? 0 : (float)((i < l->shared[s] ? 1 : l->alpha) * y.by_sum + y.by_plain);
}

void cpu_pair_slopes(struct workers *w, const struct loss_work *l, const struct pref_step *step)
{
    (void)w;
    for (int32_t s = 0; s < l->segments; s++) {
        int32_t first = s - s % 2;
        double ref[2] = { 0, 0 };
        for (int i = 0; l->ref && i < 2; i++)
            ref[i] = l->ref[(first + i) * l->ref_step];
        spread(l, s, pref_slopes(step, l->sums + first, ref, l->scored + first, s % 2));
    }
}

void cpu_kto_slopes(struct workers *w, const struct loss_work *l, const struct kto_step *step)
{
    (void)w;
    for (int32_t s = 0; s < l->segments; s++)
        spread(l, s,
               (struct loss_slopes){ 0, kto_of_row(step, l->sums[s].plain, l->ref[s * l->ref_step], l->good[s]) });
}

void cpu_even_slopes(struct workers *w, const struct loss_work *l, double slope)
{
    (void)w;
    for (int32_t s = 0; s < l->segments; s++)
        spread(l, s, (struct loss_slopes){ 0, slope });
}
