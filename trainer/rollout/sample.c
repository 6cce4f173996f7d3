/* sample: see sample.h. */
#include "trainer/rollout/sample.h"

#include <math.h>

static int64_t largest(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

int32_t sample_token(const float *logits, int64_t vocab, float temperature, double u)
{
    int64_t top = largest(logits, vocab), last = top;
    if (!(temperature > 0))
        return (int32_t)top;
    double total = 0, below = 0;
    for (int64_t i = 0; i < vocab; i++)
        total += exp(((double)logits[i] - (double)logits[top]) / (double)temperature);
    for (int64_t i = 0; i < vocab; i++) {
        double share = exp(((double)logits[i] - (double)logits[top]) / (double)temperature);
        below += share;
        if (share > 0)
            last = i;
        if (below > u * total)
            return (int32_t)i;
    }
    return (int32_t)last; /* u * total was rounded up to the total */
}
