/* clip: formulas that the host and kernels of a GPU share: each is written once, and compiled for both. */
#ifndef TESSERA_TRAINER_OPS_CLIP_H
#define TESSERA_TRAINER_OPS_CLIP_H

#include "comm/base/both.h"

#include <math.h>

/* Factor for gradients of global norm `norm`: min(1, clip / (norm + 1e-6)) (torch.nn.utils.clip_grad_norm_); 1 when
 * clip is 0. */
BOTH double clip_scale(double clip, double norm)
{
    if (clip == 0)
        return 1;
    double scale = clip / (norm + 1e-6);
    return scale >= 1 ? 1 : scale; /* a norm that is no number is passed on */
}

/* The two numbers that an update takes from a norm (kernels.clip): with a norm that is not finite the factor is NaN, by
 * which an update knows that it must change nothing. */
struct clipped {
    double norm, scale;
};
BOTH struct clipped clip_squares(double clip, double squares)
{
    struct clipped c;
    c.norm = sqrt(squares);
    c.scale = isfinite(c.norm) ? clip_scale(clip, c.norm) : (double)NAN;
    return c;
}

#endif
