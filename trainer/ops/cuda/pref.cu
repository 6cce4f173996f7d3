/* pref: losses of sequences: a block adds up a sequence's tokens, or gives them their gradient. The formulas are
 * pref.h's, in f64. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
struct sums_room {
    double part[WARPS];
};

__global__ void sums_kernel(struct loss_work l)
{
    SHARED(sums_room, room);
    int32_t s = (int32_t)blockIdx.x, end = l.offset[s + 1], shared = l.shared[s];
    bool stats = l.stats.logit != NULL;
    double plain = 0, weighted = 0, log_weight = 0, logit = 0, entropy = 0, top = 0;
    for (int32_t i = l.offset[s] + (int32_t)threadIdx.x; i < end; i += BLOCK) {
        double p = (double)l.logp[i];
        plain += p;
        weighted += (i < shared ? 1 : l.alpha) * p;
        if (!stats)
            continue;
        log_weight += p - (double)l.stats.log_square[i];
        logit += (double)l.stats.logit[i];
        entropy += (double)l.stats.entropy[i];
        top += (double)l.stats.top[i];
    }
    struct sequence_sums y;
    y.plain = block_sum(plain, room.part);
    y.weighted = block_sum(weighted, room.part);
    y.log_weight = block_sum(log_weight, room.part);
    y.logit = block_sum(logit, room.part);
    y.entropy = block_sum(entropy, room.part);
    y.top = block_sum(top, room.part);
    if (!stats)
        y.log_weight = (double)NAN;
    if (threadIdx.x == 0)
        l.sums[s] = y;
}

struct of_pair {
    struct pref_step step;
    __device__ struct loss_slopes operator()(const struct loss_work &l, int32_t s) const
    {
        int32_t first = s - s % 2;
        double ref[2] = { 0, 0 };
        for (int i = 0; l.ref && i < 2; i++)
            ref[i] = l.ref[(first + i) * l.ref_step];
        return pref_slopes(&step, l.sums + first, ref, l.scored + first, (int)(s % 2));
    }
};

struct of_row {
    struct kto_step step;
    __device__ struct loss_slopes operator()(const struct loss_work &l, int32_t s) const
    {
        struct loss_slopes y = { 0, kto_of_row(&step, l.sums[s].plain, l.ref[s * l.ref_step], l.good[s] != 0) };
        return y;
    }
};

struct of_all {
    double slope;
    __device__ struct loss_slopes operator()(const struct loss_work &, int32_t) const
    {
        struct loss_slopes y = { 0, slope };
        return y;
    }
};

struct slopes_room {
    struct loss_slopes y;
};

template <class F> __global__ void slopes_kernel(struct loss_work l, F f)
{
    SHARED(slopes_room, room);
    int32_t s = (int32_t)blockIdx.x, end = l.offset[s + 1], shared = l.shared[s];
    if (threadIdx.x == 0)
        room.y = f(l, s);
    __syncthreads();
    for (int32_t i = l.offset[s] + (int32_t)threadIdx.x; i < end; i += BLOCK)
        l.dlogp[i] = l.target[i] < 0 ? 0 : (float)((i < shared ? 1 : l.alpha) * room.y.by_sum + room.y.by_plain);
}

template <class F> void slopes(struct workers *w, const char *what, const struct loss_work *l, const F &f)
{
    launch(w, what, slopes_kernel<F>, (unsigned)l->segments, BLOCK, sizeof(struct slopes_room), *l, f);
}
} // namespace

void gpu_sequence_sums(struct workers *w, const struct loss_work *l)
{
    launch(w, "sequence_sums", sums_kernel, (unsigned)l->segments, BLOCK, sizeof(struct sums_room), *l);
}

void gpu_pair_slopes(struct workers *w, const struct loss_work *l, const struct pref_step *s)
{
    slopes(w, "pair_slopes", l, of_pair{ *s });
}

void gpu_kto_slopes(struct workers *w, const struct loss_work *l, const struct kto_step *s)
{
    slopes(w, "kto_slopes", l, of_row{ *s });
}

void gpu_even_slopes(struct workers *w, const struct loss_work *l, double slope)
{
    slopes(w, "even_slopes", l, of_all{ slope });
}
