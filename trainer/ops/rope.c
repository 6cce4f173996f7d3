/* rope: how fast rotary angles turn, with what models do to reach further than they learnt (ops.h has the formulas). */
#include "trainer/ops/ops.h"

#include <math.h>

static double clamp(double x, double lo, double hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

static double llama3(const struct rope *r, double f)
{
    double turns = r->original * f / (2 * M_PI); /* of this angle over the positions learnt: original / wavelength */
    if (turns > r->high)
        return f;
    if (turns < r->low)
        return f / r->factor;
    double s = (turns - r->low) / (r->high - r->low);
    return (1 - s) * f / r->factor + s * f;
}

/* The angle, as a fraction of D/2 in index, that makes `turns` turns over the positions learnt. */
static double angle_of_turns(const struct rope *r, double turns, int64_t d)
{
    return (double)d * log(r->original / (turns * 2 * M_PI)) / (2 * log(r->theta));
}

static double yarn(const struct rope *r, double f, int64_t i, int64_t d)
{
    double low = clamp(floor(angle_of_turns(r, r->beta_fast, d)), 0, (double)(d - 1)),
           high = clamp(ceil(angle_of_turns(r, r->beta_slow, d)), 0, (double)(d - 1));
    double ramp = clamp(((double)i - low) / (high > low ? high - low : 0.001), 0, 1);
    return (1 - ramp) * f + ramp * f / r->factor;
}

double rope_frequencies(const struct rope *how, int64_t d, double *frequency)
{
    for (int64_t i = 0; i < d / 2; i++) {
        double f = pow(how->theta, -2.0 * (double)i / (double)d);
        frequency[i] = how->scaling == ROPE_LINEAR   ? f / how->factor
                       : how->scaling == ROPE_LLAMA3 ? llama3(how, f)
                       : how->scaling == ROPE_YARN   ? yarn(how, f, i, d)
                                                     : f;
    }
    if (how->scaling != ROPE_YARN)
        return 1;
    return how->amplitude > 0 ? how->amplitude : how->factor > 1 ? 0.1 * log(how->factor) + 1 : 1;
}
