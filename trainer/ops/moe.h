/* moe: feed-forward layers whose tokens choose their experts (Shazeer et al. 2017, arXiv:1701.06538).
 *
 *   z = x router^T;  s = softmax(z), or sigmoid(z);  every token n takes the K experts e with the largest s[n, e] (+
 * bias[e]) w[n, j] = scale s[n, e_j], divided by their sum if `normalise` y[n] = sum_j w[n, j] down_e (silu(gate_e
 * x[n]) * up_e x[n]),  e = e_j: in order of j, largest first
 *
 * No token is dropped, whatever an expert's load. Letters as in ops.h; E experts, K of them a token, F their width. */
#ifndef TESSERA_TRAINER_OPS_MOE_H
#define TESSERA_TRAINER_OPS_MOE_H

#include "trainer/ops/ops.h"

struct routes; /* trainer/ops/routes.h */

enum { EXPERTS_MAX = 1024, TOP_MAX = 64 };

struct router {
    int64_t experts, top; /* E, K */
    /* Above 1: experts are in so many groups of neighbours, and a token's K are of the top_groups best ones; a group's
     * rank is its largest s + bias, or with sigmoid the sum of its two largest (DeepSeek-V2: arXiv:2405.04434, 2.1.3;
     * V3: arXiv:2412.19437, 2.1.2). */
    int64_t groups, top_groups;
    bool sigmoid, normalise;
    float scale;
};

/* f32 or bf16. */
struct expert_weights {
    struct tensor *router;    /* [E, C] */
    struct tensor *bias;      /* [E], or NULL: selects only, has no gradient (Wang et al. 2024, arXiv:2408.15664) */
    struct tensor *gate, *up; /* [E, F, C]; over tensor-parallel ranks cut along F */
    struct tensor *down;      /* [E, C, F]; the same */
    struct {                  /* each expert's, a [E, R, K], b [E, M, R], cut as in ops.h; a NULL: none */
        struct low_rank gate, up, down;
    } low;
};

/* What else there is to say of a layer's micro-batch. Borrowed, fields may be NULL; arrays must outlive backward. count
 * and balance are in the memory of activations: a device's kernels write them, and nobody waits. */
struct route_watch {
    /* TAPE_TRAIN: tokens that chose each expert [E], and the balance loss E sum_e f[e] P[e]: f[e] are these counts over
     * N, P[e] is the mean over the N tokens of s[n, e] (with sigmoid, of s[n, e] / sum_e s[n, e]); so it is K where
     * loads are equal (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6, summed over the K as in Qwen's models). 0 for
     * N = 0. Written, not added to. */
    int32_t *count;
    double *balance;
    float balance_weight; /* backward adds the gradient of so many times the balance loss; f is constant */
    /* With a context (tape_context) the N tokens are those of all its ranks; `padding` of this rank's, the last ones,
     * do not count. */
    int64_t padding;
    struct routes *routes; /* which experts are taken is written to it, or (replay) read from it, under this key */
    uint64_t key;
};

/* x, y [N, C]. Each product is one fused multiply-add chain, as in op_linear: bits depend on no grouping and no thread
 * count. watch may be NULL. */
struct tensor *op_moe(struct tape *t, struct tensor *x, const struct expert_weights *w, const struct router *r,
                      const struct route_watch *watch);

#endif
