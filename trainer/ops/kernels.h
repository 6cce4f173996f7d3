/* kernels: one const table of raw kernels a device. Plain pointers and sizes; ops.c has checked shapes and taken
 * memory.
 *
 * A kernel neither allocates, nor fails, nor keeps a pointer. Sizes may be 0. `_bwd` kernels add (+=) into gradients
 * unless said otherwise. Activations and gradients are row-major, contiguous, and f32, but for what a `struct array` or
 * a flag says is bf16; a `const void *` with a dtype is a weight, f32 or bf16. The CPU's give the same bits for any
 * number of workers and on every instruction set (cpu/isa.h says how; the f64 sines, powers and logarithms are the C
 * library's). Tiled and fused kernels have plain ones beside them, <name>_ref, at the end of this header; tests compare
 * them. */
#ifndef TESSERA_TRAINER_OPS_KERNELS_H
#define TESSERA_TRAINER_OPS_KERNELS_H

#include "comm/base/dtype.h"
#include "comm/base/rng.h"
#include "comm/base/thread.h"
#include "trainer/ops/clip.h"
#include "trainer/ops/moe.h"
#include "trainer/ops/ops.h"
#include "trainer/ops/pref.h"

#include <stdbool.h>
#include <stdint.h>

/* An activation or a gradient. */
struct array {
    void *at;
    bool low;   /* bf16 instead of f32; computed with in f32. A GPU's only */
    bool fresh; /* of a gradient: nothing is in it yet, and it is written instead of added to. A GPU's only */
};
static inline struct array array_of(const float *x)
{
    struct array a = { (void *)(size_t)x, false, false };
    return a;
}

/* C[i, j] = sum_k A(i, k) B(k, j), i < m, j < n, k < K: one fused multiply-add chain over k ascending, from 0.
 * bf16: of A and B rounded to bf16 (to nearest, ties to even; subnormals are 0), the chain in f32 over k in the order
 * 1, 0, 3, 2, 5, 4, ..., which is that of the instruction VDPBF16PS; a sum that is subnormal may be taken as 0. */
struct gemm {
    int64_t m, n, k;
    const void *a; /* A(i, k) = a[i * lda + k], or a[k * lda + i] if a_trans */
    bool a_low;    /* a is bf16 instead of f32, on a GPU; `bf16` is set then */
    int64_t lda;
    bool a_trans;
    const void *b; /* B(k, j) = b[k * ldb + j], or b[j * ldb + k] if b_trans */
    enum dtype b_dtype;
    int64_t ldb;
    bool b_trans;
    void *c;    /* c[i * ldc + j] */
    bool c_low; /* c is bf16 instead of f32, on a GPU; `bf16` is set then */
    int64_t ldc;
    const float *bias; /* [n], added after the chain; or NULL */
    bool add;          /* the finished chain is added to c, instead of overwriting it */
    const float *from; /* with `add`, on a GPU: c = this (rows ldc apart, f32 as c) plus the chain; or NULL */
    bool bf16;
};

/* The product `one` for groups of rows, each with a matrix of its own. Group e has rows [offset[e], offset[e + 1]) of
 *   a and c, and b begins e * step elements on (a is not transposed, m is how many rows all have), or
 *   along_k: a and b, over which it adds up, and c begins e * step elements on (a_trans, b is not, k is how many all
 *   have). A group without rows adds nothing.
 * The host need not know the offsets. */
struct grouped_gemm {
    struct gemm one;
    bool along_k;
    int64_t groups, step;
    const int32_t *offset; /* [groups + 1], from 0, ascending */
    struct gemm *room;     /* scratch [groups], of the host's memory everywhere */
};

/* Causal attention over the pack's segments (op_attention). Keys of segment s are at k_base + s * k_segment when `past`
 * is given (a cache: past[s] tokens were there before this pack's), else at the segment's tokens in k and v. */
struct attention {
    int64_t n;
    int heads, kv_heads, head_dim; /* head_dim at most ATTENTION_HEAD_MAX */
    int64_t window;                /* a query sees so many keys at most, its own among them; 0: all before it */
    int rank, ranks;               /* ranks > 1: q, o, lse and their gradients are of tokens rank, rank + ranks, ... of
                                    * the pack alone, their rows in that order; those behind its end are left alone */
    const struct segments *seg;    /* of the whole pack */
    const void *q;                 /* [N, H, D] */
    const void *k, *v;             /* [N, G, D]; with a cache [S, cap, G, D] */
    const int32_t *past;           /* [S], or NULL */
    int64_t cap;
    void *o;            /* [N, H, D] */
    float *lse;         /* [N, H], or NULL */
    const void *d_o;    /* backward: [N, H, D] */
    void *dq, *dk, *dv; /* backward: any may be NULL */
    bool bf16;          /* products may be of factors rounded to bf16, added up in f32; the CPU's are not */
    bool low;           /* q, k, v, o, d_o, dq, dk, dv are bf16 instead of f32, on a GPU; `bf16` is set then */
    bool fresh;         /* dq, dk, dv are written instead of added to, on a GPU */
};
enum { ATTENTION_HEAD_MAX = 256 };
/* Rows of q that belong to the pack's tokens before `token`. */
static inline int64_t attention_rows(const struct attention *a, int64_t token)
{
    return a->ranks > 1 ? (token + a->ranks - 1 - a->rank) / a->ranks : token;
}

/* What a part of the vocabulary says of a token, to be merged with the other parts; u = z - most. */
struct logprob_part {
    double sum[3]; /* of e^u, e^u u, e^2u; without stats the first one only */
    double total;  /* of x w^T */
    float raw;     /* the largest of x w^T; most = raw / temperature */
    float target;  /* the target's x w^T, or -inf: it is in another part */
    int64_t top;   /* index of the first one equal to raw, in the whole vocabulary; of no meaning without stats */
};

/* Of all tokens, from the forward kernel to the backward ones. */
enum logprob_kept { LOGPROB_NOTHING, LOGPROB_LOGITS, LOGPROB_GRADIENTS };

/* op_logprob: rows with target >= 0 are gathered `chunk` at a time. */
struct logprob {
    int64_t n, c, v, chunk;
    int64_t first, vocab; /* w is rows [first, first + v) of `vocab` */
    /* [parts][N], or NULL: w is the whole matrix. Else the forward kernel fills row `own` of it, and no output;
     * logprob_merge makes the outputs of all rows, in their order. */
    struct logprob_part *part;
    int parts, own;
    const void *x; /* [N, C] */
    bool x_low;    /* x is bf16 instead of f32, on a GPU; `bf16` is set then */
    const void *w; /* [V, C] */
    enum dtype w_dtype;
    const int32_t *target; /* [N] */
    float temperature;
    float *logp, *lse;          /* [N] */
    struct logprob_stats stats; /* forward: [N] each; all NULL: not wanted */
    const float *dlogp;         /* backward: [N] */
    float *dx, *dw;             /* backward: either may be NULL */
    float *rows, *drows;        /* scratch [chunk, C] each; drows only for dx */
    float *logits;              /* scratch [chunk, V] */
    enum logprob_kept *kept;    /* NULL, or what is in them: only if the chunk is all, and nobody writes them between */
    bool bf16;                  /* products as of gemm.bf16 */
    int32_t *index;             /* scratch [chunk] */
};

/* Routing of N tokens (op_moe). */
struct route {
    int64_t n;
    const struct router *how;
    const float *z;       /* [N, E] */
    const float *bias;    /* [E], or NULL */
    bool given;           /* experts are there already */
    float *score;         /* [N, E]: s */
    int32_t *expert;      /* [N, K], largest s + bias first, the smaller index among equal ones */
    float *weight;        /* [N, K] */
    const float *dweight; /* backward: [N, K] */
    const float *dshare;  /* [E], or NULL: of each s[n, e] (with sigmoid, of s[n, e] / sum_e s[n, e]) besides */
    float *dz;            /* [N, E] */
};

/* Choices (token n's j-th expert) in order of experts, and for each expert in order of tokens. */
struct expert_sort {
    int64_t n, top, experts;
    const int32_t *expert; /* [N, K] */
    int32_t *place;        /* [N, K]: where in that order a choice comes */
    int32_t *token;        /* [N K]: whose it is */
    int32_t *offset;       /* [E + 1]: where each expert's begin */
};

/* How N tokens spread over experts (struct route_watch), of whom the last `padding` do not count: sums of theirs, to
 * which those of other ranks may be added, and then what follows from all. */
struct route_load {
    int64_t n, padding;
    const struct router *how;
    const float *score;    /* [N, E] */
    const int32_t *expert; /* [N, K] */
    const int32_t *offset; /* [E + 1], expert_sort's */
    /* [1 + 2 E]: tokens; of each expert the sum over tokens of s[n, e] (with sigmoid, of s[n, e] / sum_e s[n, e]), from
     * 0 in their order; of each expert the tokens that chose it */
    double *sums;
    float weight;
    float *dshare;   /* [E]: the gradient of weight times the balance loss for each token's share */
    int32_t *count;  /* [E], or NULL */
    double *balance; /* or NULL */
};

/* y[n] = sum_j weight[n, j] row[place[n, j]], j ascending from 0. */
struct mix {
    int64_t n, k, c;
    const float *row;
    const float *weight;  /* [N, K] */
    const int32_t *place; /* [N, K], each row once */
    float *y;             /* [N, C] */
    const float *dy;      /* backward */
    float *drow;          /* written: weight[n, j] dy[n]; may be `row`; or NULL */
    float *dweight;       /* [N, K] += row[place[n, j]] . dy[n], in f64; or NULL */
};

/* Draws that round: element i of a call is element first + i of a box in a tensor, row-major, and takes word e of the
 * sequence at `at` (comm/base/rng.h), e being its place in the whole tensor. */
enum { ROUNDING_DIMS = 8 };
struct rounding {
    struct rng_at at;
    int ndim; /* at least 1 */
    uint64_t dim[ROUNDING_DIMS], off[ROUNDING_DIMS], len[ROUNDING_DIMS];
    uint64_t first;
};
/* The same draws with inner dimensions that the box has whole made one with the next outer one. */
static inline struct rounding rounding_joined(const struct rounding *r)
{
    struct rounding j = *r;
    for (; j.ndim > 1 && j.len[j.ndim - 1] == j.dim[j.ndim - 1]; j.ndim--) {
        int inner = j.ndim - 1, outer = inner - 1;
        j.off[outer] *= j.dim[inner];
        j.len[outer] *= j.dim[inner];
        j.dim[outer] *= j.dim[inner];
    }
    return j;
}

/* y[i, h, j] = x[i, h, j], or += : elements `x_step` and `y_step` apart, of N tokens and H heads whose rows begin at
 * the distances x_token, x_head, y_token, y_head. x_head 0: all heads read the same. y_head 0: y[i, j] gets the sum
 * over heads, ascending from 0. x NULL: zeros. */
struct column_copy {
    int64_t n, heads, count; /* j < count */
    const float *x;
    float *y;
    int64_t x_token, x_head, x_step, y_token, y_head, y_step;
    bool add;
};

/* v[to] = the sum of v[from], v[from + step], ... (modulo 2^32), `count` of them, neighbours pairwise as tree_sum. */
enum { ADD_MOST = 1024 };
struct add {
    uint32_t to, from, step, count; /* count: 1..ADD_MOST */
};

/* AdamW with decoupled decay (Loshchilov, Hutter 2019, arXiv:1711.05101, algorithm 2 with schedule multiplier in lr),
 * step >= 1:
 *   g' = s g,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2
 *   p -= lr (m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + weight_decay p)     with the old p on the right
 * s = *scale, which is where the arrays are, or grad_scale where that is NULL; s is NaN: nothing is changed. Scalars
 * become f32 after their powers were taken in f64. Elementwise: bits depend on no cut into runs. */
struct adamw_run {
    float *p;
    const float *g;
    float *m, *v; /* no two overlap */
    size_t n;
    double weight_decay;
};
struct adamw_how {
    double lr, beta1, beta2, eps;
    uint64_t step;
    double grad_scale;
    const double *scale;
};

/* Losses of sequences, from log-probabilities of a pack's N tokens, which are 0 where a token has no target, as the
 * statistics are. Sums are f64, in an order of the device's. */
struct loss_work {
    int32_t segments;
    const int32_t *offset;      /* [segments + 1] */
    const int32_t *shared;      /* [segments]: tokens of the pack from this one on weigh alpha instead of 1 */
    const int32_t *scored;      /* [segments]: tokens with a target */
    const int32_t *good;        /* [segments]: 1: of a desirable row, else 0 */
    const int32_t *target;      /* [N] */
    const float *logp;          /* [N] */
    struct logprob_stats stats; /* [N]; of NULLs: sums of 0, and log_weight NAN */
    double alpha;
    const double *ref; /* of segment s: ref[s * ref_step]; NULL: none is read */
    int64_t ref_step;
    struct sequence_sums *sums; /* [segments] */
    float *dlogp;               /* [N], 0 where a token has no target */
};

struct kernels {
    const char *name;
    void (*gemm)(struct workers *w, const struct gemm *g);
    void (*grouped)(struct workers *w, const struct grouped_gemm *p);
    void (*route)(struct workers *w, const struct route *r);
    void (*route_bwd)(struct workers *w, const struct route *r);
    void (*sort_experts)(struct workers *w, const struct expert_sort *s);
    void (*load_sums)(struct workers *w, const struct route_load *l);
    void (*load_shares)(struct workers *w, const struct route_load *l);
    void (*mix)(struct workers *w, const struct mix *m);
    void (*mix_bwd)(struct workers *w, const struct mix *m);
    /* db[j] += sum over rows of dy[n, j], rows ascending from 0, then added. */
    void (*bias_bwd)(struct workers *w, float *db, struct array dy, int64_t n, int64_t m);
    /* id < 0: a row of zeros, without a gradient. */
    void (*embedding)(struct workers *w, float *y, const void *table, enum dtype t, const int32_t *id, int64_t n,
                      int64_t c);
    void (*embedding_bwd)(struct workers *w, float *dtable, const float *dy, const int32_t *id, int64_t n, int64_t c);
    /* rrms [rows] = 1 / sqrt(mean(x^2) + eps). */
    void (*rmsnorm)(struct workers *w, struct array y, float *rrms, struct array x, const float *weight, int64_t rows,
                    int64_t c, float eps);
    void (*rmsnorm_bwd)(struct workers *w, struct array dx, struct array dy, struct array x, const float *weight,
                        const float *rrms, int64_t rows, int64_t c);
    void (*rmsnorm_bwd_weight)(struct workers *w, float *dweight, struct array dy, struct array x, const float *rrms,
                               int64_t rows, int64_t c);
    /* table [N, D]: D/2 cosines, then D/2 sines, of position * frequency[i], times amplitude. */
    void (*rope_table)(struct workers *w, float *table, const int32_t *position, int64_t n, int64_t d,
                       const double *frequency, double amplitude);
    void (*rope)(struct workers *w, struct array y, struct array x, const float *table, int64_t n, int64_t h,
                 int64_t d);
    void (*rope_bwd)(struct workers *w, struct array dx, struct array dy, const float *table, int64_t n, int64_t h,
                     int64_t d);
    void (*columns)(struct workers *w, const struct column_copy *c);
    void (*attention)(struct workers *w, const struct attention *a);
    void (*attention_bwd)(struct workers *w, const struct attention *a); /* reads o and lse of the forward */
    void (*swiglu)(struct workers *w, struct array y, struct array gate, struct array up, int64_t n);
    /* Either gradient may be of no array (at NULL). */
    void (*swiglu_bwd)(struct workers *w, struct array dgate, struct array dup, struct array dy, struct array gate,
                       struct array up, int64_t n);
    /* y = x, or y += x if not y.fresh, in either's type. A GPU's only: NULL on the CPU. */
    void (*convert)(struct workers *w, struct array y, struct array x, int64_t n);
    void (*add)(struct workers *w, float *y, const float *a, const float *b, int64_t n); /* y = a + b */
    void (*scale)(struct workers *w, float *y, const float *x, float s, int64_t n);      /* y = s x */
    void (*axpy)(struct workers *w, float *y, const float *x, float s, int64_t n);       /* y += s x */
    void (*add_scalar)(struct workers *w, float *y, const float *s, int64_t n);          /* y += *s */
    void (*zero)(struct workers *w, float *y, int64_t n);
    void (*widen)(struct workers *w, float *y, const uint16_t *x, int64_t n); /* bf16 to f32 */
    /* bf16 of x, to nearest, ties to even, as bf16_from_f32 (dtype.h). */
    void (*narrow)(struct workers *w, uint16_t *y, const float *x, int64_t n);
    /* x = what of it bf16 can hold, as narrow and widen. */
    void (*round_low)(struct workers *w, float *x, int64_t n);
    /* bf16 of x, up or down by draws: the chance of the larger magnitude is how much of the way x has gone to it. What
     * is no number or infinite as narrow. */
    void (*narrow_drawn)(struct workers *w, uint16_t *y, const float *x, int64_t n, const struct rounding *how);
    /* y[i ldy + j] = (or += if `add`) x[i ldx + j], i < n, j < c. No overlap. */
    void (*copy_rows)(struct workers *w, float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, int64_t c,
                      bool add);
    /* As the function of this name below. */
    void (*block_sums)(struct workers *w, const float *x, int64_t n, bool squared, double *out);
    /* n of them, none of which reads or writes what another one writes. */
    void (*adds)(struct workers *w, double *v, const struct add *a, uint32_t n);
    /* Of at most two numbers each, in rounds: round r is a[begin[r]..begin[r + 1]), and may read what those before it
     * wrote. a and begin are where the numbers are. */
    void (*add_rounds)(struct workers *w, double *v, const struct add *a, const uint32_t *begin, uint32_t rounds);
    /* *c = clip_squares(clip, *squares) (clip.h). */
    void (*clip)(struct workers *w, struct clipped *c, const double *squares, double clip);
    void (*sequence_sums)(struct workers *w, const struct loss_work *l);
    /* dlogp from the sums: of pairs (segments 2 r and 2 r + 1: chosen, rejected), of KTO's rows, or the same for all.
     */
    void (*pair_slopes)(struct workers *w, const struct loss_work *l, const struct pref_step *s);
    void (*kto_slopes)(struct workers *w, const struct loss_work *l, const struct kto_step *s);
    void (*even_slopes)(struct workers *w, const struct loss_work *l, double slope);
    /* *y = sum of x: block_sums, then tree_sum; partial [ceil(n / 1024)] is scratch. */
    void (*sum)(struct workers *w, float *y, const float *x, int64_t n, double *partial);
    /* *first = the index of the first NaN or infinity of x, n if there is none. */
    void (*find_nonfinite)(struct workers *w, int64_t *first, struct array x, int64_t n);
    void (*logprob)(struct workers *w, const struct logprob *p);
    void (*logprob_merge)(struct workers *w, const struct logprob *p);
    void (*logprob_bwd)(struct workers *w, const struct logprob *p);
    void (*adamw)(struct workers *w, const struct adamw_run *run, size_t runs, const struct adamw_how *how);
};

extern const struct kernels kernels_cpu;

enum { SUM_BLOCK = 1024 }; /* elements; what every sum that must not depend on cuts is made of */

/* out[b] = f64 sum of x (or of x^2 if squared) over elements [1024 b, 1024 (b + 1)) of [0, n). Count the blocks from an
 * aligned start. */
void block_sums(struct workers *w, const float *x, int64_t n, bool squared, double *out);
/* Sum of n values up the dyadic tree: neighbours pairwise, a last odd one moves up alone. Overwrites s. 0 for n = 0. */
double tree_sum(double *s, int64_t n);

/* kernels_cpu.adamw of one run. */
void adamw_update(struct workers *w, float *p, const float *g, float *m, float *v, size_t n, double lr, double beta1,
                  double beta2, double eps, double weight_decay, uint64_t step, double grad_scale);

/* ---- plain references, one thread, in the order of the formulas (cpu/reference.c) ---- */
void gemm_ref(const struct gemm *g); /* the same bits as the fast one */
void attention_ref(const struct attention *a);
void attention_bwd_ref(const struct attention *a);
void rmsnorm_ref(float *y, float *rrms, const float *x, const float *weight, int64_t rows, int64_t c, float eps);
void rmsnorm_bwd_ref(float *dx, float *dweight, const float *dy, const float *x, const float *weight, int64_t rows,
                     int64_t c, float eps);
void swiglu_ref(float *y, const float *gate, const float *up, int64_t n);
void swiglu_bwd_ref(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t n);
void logprob_ref(const struct logprob *p); /* scratch is not used */
void logprob_stats_ref(const struct logprob *p);
void logprob_bwd_ref(const struct logprob *p); /* reads no lse */
void adamw_ref(float *p, const float *g, float *m, float *v, size_t n, double lr, double beta1, double beta2,
               double eps, double weight_decay, uint64_t step, double grad_scale);

#endif
