/* muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as
 * torch.optim.Muon computes it, in f32. A step of W [M, K] with gradient G and buffer B:
 *
 *   B = mu B + (1 - mu) G,   U = B, or with Nesterov's momentum mu B + (1 - mu) G of this B
 *   W = (1 - lr decay) W - lr scale O,   O = U V^T of U's singular vectors, about
 *
 * by five steps of Newton and Schulz: X = U / |U|, then X = a X + (b A + c A A) X with A = X X^T and
 * (a, b, c) = (3.4445, -4.7750, 2.0315), which brings singular values to 0.7 .. 1.2; a matrix with M > K is transposed
 * for that. The scale makes updates of all shapes alike: sqrt(max(1, M / K)) (Jordan's, torch's "original"), or 0.2
 * sqrt(max(M, K)), an update as large as AdamW's (Liu et al. 2025, arXiv:2502.16982, eq. 4; "match_rms_adamw"). */
#ifndef TESSERA_TRAINER_OPTIM_MUON_H
#define TESSERA_TRAINER_OPTIM_MUON_H

#include "comm/base/status.h"
#include "comm/base/thread.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum muon_scale { MUON_ORIGINAL, MUON_MATCH_RMS_ADAMW };
struct muon {
    double lr, momentum, weight_decay, grad_scale; /* G is grad_scale times what is given */
    bool nesterov;
    enum muon_scale scale;
};

struct compute; /* trainer/ops/compute.h: where all floats are; NULL: the host */

/* B and, in place of G, U. Elementwise. */
void muon_momentum(const struct muon *o, struct compute *c, float *g, float *buffer, size_t n);
/* Floats that muon_orthogonalise works in. */
size_t muon_room(uint64_t rows, uint64_t cols);
/* U [rows, cols] becomes O. The same bits for any number of workers (w; on the host). Zeros stay zeros. On a device the
 * host waits for the norm. */
status *muon_orthogonalise(struct compute *c, struct workers *w, float *u, uint64_t rows, uint64_t cols,
                           float *room) WARN_UNUSED;
/* n elements of W, from the same of O; of a matrix of that shape. */
void muon_apply(const struct muon *o, struct compute *c, float *w, const float *orthogonal, size_t n, uint64_t rows,
                uint64_t cols);

#endif
