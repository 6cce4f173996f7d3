/* ops: what models are made of. Each checks shapes, computes through the device's kernels, records itself on the tape.
 *
 * Letters: N tokens of a pack, C channels, V vocabulary, H query heads, G key/value heads (H a multiple of G), D head
 * size, S segments. Activations are f32; weights f32 or bf16 (storage only: widened on use; a bf16 tensor has no
 * gradient). Outputs live in the tape's arena. An output has a gradient if an input has one and the tape trains. Errors
 * stick to the tape (INVALID with both shapes); NULL in, NULL out. All CPU kernels give the same bits for any thread
 * count and any packing of the same segments. Sums over channels and tokens of one row are f32 unless said otherwise.
 *
 * On a tape that is spread over tensor-parallel ranks (tape_spread) weights may be cut (tensor.cut): op_embedding,
 * op_linear and op_logprob then exchange what the whole result needs, so that a model is written as if weights were
 * whole; what it sees of cut heads or columns is this rank's part of them. All ranks run the same ops on the same
 * tokens, and get the same bits where a result is whole. */
#ifndef TESSERA_TRAINER_OPS_OPS_H
#define TESSERA_TRAINER_OPS_OPS_H

#include "trainer/ops/tape.h"

/* Where sequences lie in a pack: segment s is tokens [offset[s], offset[s+1]). Borrowed; must outlive backward. */
struct segments {
    int32_t count;
    const int32_t *offset; /* [S + 1], offset[0] = 0, ascending; of the whole pack, also where ranks share its tokens */
    const int32_t *position; /* [N] position of each token in its sequence: rope angles and the causal order; of this
                              * rank's tokens */
};

/* Keys and values of earlier tokens, one cache a layer; k, v are [S, cap, G, D] f32, the first len[s] tokens of segment
 * s filled. */
struct kv_cache {
    int32_t segments, cap, kv_heads, head_dim;
    float *k, *v;
    int32_t *len; /* [S]; op_attention appends and advances */
};

/* An activation of its own: zeroed, in the arena. with_grad: give it a gradient when the tape trains. */
struct tensor *op_new(struct tape *t, int ndim, const int64_t *dim, bool with_grad);
/* The same data and gradient under other dimensions of equal volume; one of them may be -1: what remains. */
struct tensor *op_view(struct tape *t, struct tensor *x, int ndim, const int64_t *dim);

/* y[n, :] = table[id[n], :].  table [V, C], id [N] in 0..V-1 (else INVALID with the token), y [N, C].
 * Backward: dtable[id[n], :] += dy[n, :] in token order. A table cut by rows: y is summed over the ranks. */
struct tensor *op_embedding(struct tape *t, struct tensor *table, const int32_t *id, int64_t n);

/* y = x w^T + b.  x [N, K], w [M, K], b [M] or NULL, y [N, M].  Each y is one fused multiply-add chain over k ascending
 * from 0, then b. dx += dy w (one chain over m), dw += dy^T x (one chain over n from 0, then added), db += sum_n dy.
 * w cut by rows (and b with it): y has this rank's columns, dx is summed over the ranks. w cut by columns (no b, else
 * INVALID): x has this rank's columns, y is summed over the ranks. */
struct tensor *op_linear(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b);

/* A low-rank change of a weight w [M, K], which becomes w + scale b a (LoRA: Hu et al. 2021, arXiv:2106.09685, 4.1).
 * a [R, K], b [M, R], f32. Where w is cut by rows so is b, and a is whole; by columns: a, and b is whole. What is whole
 * gets one rank's summand of its gradient. */
struct low_rank {
    struct tensor *a, *b;
    float scale;
};
/* op_linear of the changed weight, which is never stored: y + (scale (x a^T)) b^T, the second product added to the
 * finished first one. y's bits are those of op_linear where b is zero (but for the sign of zeros). With u = x a^T,
 * dv = scale dy b:  dx += dv a, da += dv^T x, db += dy^T (scale u). low NULL: op_linear. */
struct tensor *op_linear_low_rank(struct tape *t, struct tensor *x, struct tensor *w, struct tensor *b,
                                  const struct low_rank *low);
/* onto [N, M] f32 + op_linear_low_rank(t, x, w, b, low), for a residual stream: one pass over its memory, and no tensor
 * between. The sum is taken after the first product's chain. */
struct tensor *op_linear_add(struct tape *t, struct tensor *onto, struct tensor *x, struct tensor *w, struct tensor *b,
                             const struct low_rank *low);

/* y = x * rsqrt(mean(x^2) + eps) * w over the last dimension (Zhang, Sennrich 2019, arXiv:1910.07467).  x, y [..., C],
 * w [C]. Keeps the reciprocal root [rows]. Works on [N, H, D] with w [D] too (q/k norm). */
struct tensor *op_rmsnorm(struct tape *t, struct tensor *x, struct tensor *w, float eps);

/* How rotary angles grow: angle i < D/2 of a head turns by f[i] = theta^(-2 i / D) a position, changed for models that
 * were stretched to longer texts than the `original` positions they learnt. With the wavelength l = 2 pi / f: LINEAR  f
 * / factor (Chen et al. 2023, arXiv:2306.15595) LLAMA3  f where l < original / high, f / factor where l > original /
 * low, between them (1 - s) f / factor + s f with s = (original / l - low) / (high - low) (Llama 3.1's rope_scaling)
 *   YARN    (1 - r) f + r f / factor, r rising linearly from 0 to 1 between the angles d(beta_fast), rounded down, and
 *           d(beta_slow), rounded up, d(b) = D ln(original / (2 pi b)) / (2 ln theta), both kept in 0..D-1 (Peng et al.
 * 2023, arXiv:2309.00071, 3.2, with the rounding of its authors' code); and cosines and sines times `amplitude`, which
 *           is 0.1 ln(factor) + 1 (eq. 22) where it is given as 0 */
enum rope_scaling { ROPE_NONE, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN };
struct rope {
    double theta;
    enum rope_scaling scaling; /* NONE: the rest is not looked at */
    double factor, original;
    double low, high;                       /* LLAMA3 */
    double beta_fast, beta_slow, amplitude; /* YARN */
};
/* frequency [D/2]; the factor of cosines and sines is returned. */
double rope_frequencies(const struct rope *how, int64_t d, double *frequency);

/* Rotary embedding in the half-split form of Llama's Hugging Face weights (Su et al. 2021, arXiv:2104.09864):
 *   y[i] = x[i] cos a - x[i + D/2] sin a,  y[i + D/2] = x[i + D/2] cos a + x[i] sin a,  a = position * frequency[i],
 * i < D/2. x, y [N, H, D], D even. Angles are computed in f64. */
struct tensor *op_rope(struct tape *t, struct tensor *x, const int32_t *position, const struct rope *how);

/* Side by side: of each token's head, the parts' elements one behind another. A part is `count` elements of x's heads,
 * `first` and those `step` apart; x [N, H, W], or [N, 1, W], [N, W]: the same for every head, whose gradients add up in
 * order of heads; x NULL: zeros. y [N, H, sum of counts]. At least one part has an x, at most JOIN_PARTS are there. */
struct join_part {
    struct tensor *x;
    int64_t first, step, count;
};
enum { JOIN_PARTS = 3 };
struct tensor *op_join(struct tape *t, int64_t heads, const struct join_part *part, int parts);

/* x [N, K] as what is computed by cut rows of w sees it: with all tokens, and a gradient that backward sums over the
 * ranks. op_linear does so with its own input; this is for an x that goes past it. w whole: x. */
struct tensor *op_enter(struct tape *t, struct tensor *x, const struct tensor *w);

/* What comes from another pipeline stage: [N, C], or where activations are cut by tokens this rank's rows of it. The
 * caller writes `data` after the call; with a gradient, zero. */
struct tensor *op_boundary(struct tape *t, int64_t tokens, int64_t c);
/* What goes to another stage, where a gradient comes back: x, which gets one, zero, if it has none. */
struct tensor *op_outgoing(struct tape *t, struct tensor *x);

/* Take the angles that op_rope will need of these positions (D = d) now: what is made inside a block goes with it. */
void op_rope_angles(struct tape *t, const int32_t *position, int64_t n, int64_t d, const struct rope *how);

/* Bring these segments, of n tokens here, to where attention computes, now; as op_rope_angles does. */
void op_segments(struct tape *t, const struct segments *seg, int64_t n);

/* A block of a model: y = run(t, arg, index, x), of x's shape, from nothing but its arguments and parameters. With
 * tape_recompute the tape keeps y alone, and backward calls `run` again; arg[bytes] is copied, what it points to must
 * outlive backward. Else this is the call and no more. */
typedef struct tensor *block_fn(struct tape *t, const void *arg, int64_t index, struct tensor *x);
struct tensor *op_block(struct tape *t, block_fn *run, const void *arg, size_t bytes, int64_t index, struct tensor *x);
/* The same for the part of a block from its input to behind the output of attention, inside op_block's `run`: it is run
 * again on a tape that recomputes attention; on others this is the call and no more. */
struct tensor *op_block_attention(struct tape *t, block_fn *run, const void *arg, size_t bytes, int64_t index,
                                  struct tensor *x);

/* Causal attention inside each segment, grouped-query: query head h reads key/value head h / (H / G).
 *   o = softmax(q k^T / sqrt(D)) v over keys whose position is <= the query's.   q, o [N, H, D], k, v [N, G, D]
 * Tiled with running maximum and sum (Milakov, Gimelshein 2018; Dao et al. 2022); no [N, N] matrix is stored; keeps
 * log-sum-exp [N, H]. Positions must ascend inside a segment (INVALID), so that their order is the tokens'. D is at
 * most 256. On a tape with a context (tape_context) q, k and v are of this rank's tokens, keys of all tokens are seen,
 * seg->offset is of the whole pack, there is no cache, and rows behind its end are 0. window > 0: a query sees its own
 * key and the window - 1 before it (sliding-window attention, Beltagy et al. 2020, arXiv:2004.05150); 0: all. cache
 * (TAPE_FORWARD only, else INVALID; TAPE_DRY leaves it alone): k, v are appended to it first and queries see everything
 * in it. A token decoded this way gets the bits of a full pass. */
struct tensor *op_attention(struct tape *t, struct tensor *q, struct tensor *k, struct tensor *v,
                            const struct segments *seg, int64_t window, struct kv_cache *cache);

/* y = silu(gate) * up, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv:2002.05202).  All the same shape. */
struct tensor *op_swiglu(struct tape *t, struct tensor *gate, struct tensor *up);

struct tensor *op_add(struct tape *t, struct tensor *a, struct tensor *b); /* same shape */
struct tensor *op_scale(struct tape *t, struct tensor *x, float s);        /* y = s x */
struct tensor *op_sum(struct tape *t, struct tensor *x); /* y [1] = sum of all elements; f64 accumulation, fixed tree */

/* logp[n] = log softmax(x[n] w^T / temperature)[target[n]], 0 where target[n] < 0.  x [N, C], w [V, C], target [N],
 * logp [N]. Keeps log-sum-exp [N], and the logits [N, V] if they have at most 64 Mi elements and take no more than a
 * quarter of a cap on activations; else they exist for one chunk of tokens at a time, and backward makes them again:
 * dlogit[n, v] = dlogp[n] (1{v = target[n]} - softmax[n, v]) / temperature. Tokens with target < 0 cost
 * nothing. Log-sum-exp is computed in f32 with f64 for the final log; tokens' bits do not depend on the chunking.
 * w cut by rows: the ranks exchange each token's maximum, sums and target logit (struct logprob_part), never logits. */
struct tensor *op_logprob(struct tape *t, struct tensor *x, struct tensor *w, const int32_t *target, float temperature);

/* What else a row of logits z = x[n] w^T / temperature says, while it is there; p = softmax(z). Each [N] f32 in the
 * arena, 0 where target[n] < 0; no part of backward. Bits depend on no chunking, packing or thread count. */
struct logprob_stats {
    float *entropy;    /* -sum_v p_v log p_v */
    float *logit;      /* mean of z over the vocabulary */
    float *log_square; /* log sum_v p_v^2 */
    float *top;        /* 1 if target[n] has the largest logit, the smallest index among equal ones; else 0 */
};
/* Logits [N, V] = x w^T whole on every rank, also where w is cut (then without backward, INVALID in TAPE_TRAIN): for
 * the few rows that tokens are drawn from. */
struct tensor *op_logits(struct tape *t, struct tensor *x, struct tensor *w);
/* All rows of x on every rank, where x may be cut by tokens. No backward then: INVALID in TAPE_TRAIN. */
struct tensor *op_whole(struct tape *t, struct tensor *x);
/* Where context-parallel ranks share a pack of `tokens` tokens (tape_context): of x, log-probabilities of this rank's
 * tokens, and *stats, if not NULL, those of all tokens on every rank, in order. Backward takes this rank's part of dy:
 * every rank makes all of it. Else x. */
struct tensor *op_all_tokens(struct tape *t, struct tensor *x, int64_t tokens, struct logprob_stats *stats);

/* op_logprob with the same bits, which also fills *stats. NULL: op_logprob. */
struct tensor *op_logprob_stats(struct tape *t, struct tensor *x, struct tensor *w, const int32_t *target,
                                float temperature, struct logprob_stats *stats);

#endif
