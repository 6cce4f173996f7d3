/* tape: models are written once, forward only. Each op appends a record; tape_backward replays the records in reverse.
 *
 *     tape_begin(t, TAPE_TRAIN);
 *     struct tensor *h = op_linear(t, x, w, NULL);          // NULL in, NULL out: errors stick to the tape
 *     ...
 *     status *st = tape_end(t);                             // the first error, or NULL
 *     tape_backward(t, logp, dlogp, TAPE_BACKWARD_ALL);     // adds into the .grad of every tensor that has one
 *
 * A tape owns its arenas and holds one micro-batch: outputs, what forward keeps for backward, and gradients of
 * activations live there until the next tape_begin. On
 * a device they are in its memory, which the host does not read or write (compute.h); records, tensors' descriptions
 * and what the host alone needs are in an arena of the host's. After shapes have been seen once (a TAPE_DRY pass with
 * the largest shapes) nothing is allocated. Backward accumulates (+=) into gradients. One thread drives a tape; kernels
 * share the rank's workers. Results depend on no thread count. */
#ifndef TESSERA_TRAINER_OPS_TAPE_H
#define TESSERA_TRAINER_OPS_TAPE_H

#include "comm/base/arena.h"
#include "comm/base/dtype.h"
#include "comm/base/thread.h"

#include <stdbool.h>
#include <stdint.h>

enum { TENSOR_DIMS = 4 };

/* How tensor-parallel ranks share a weight: this rank's part of dimension `dim` is [first, first + count) of `total`;
 * rows of the tensor behind `count` are padding. */
struct tensor_cut {
    int dim;
    int64_t first, count, total;
};

/* Row-major, contiguous, last index fastest. */
struct tensor {
    enum dtype dtype; /* DTYPE_F32, or DTYPE_BF16 for stored weights and on a tape_low tape for activations */
    int ndim;
    int64_t dim[TENSOR_DIMS];
    void *data;
    void *grad;           /* same shape, f32 or, of an activation with low_grad, bf16; NULL: no gradient is wanted */
    bool low_grad;        /* what it is */
    bool fresh;           /* of an activation: nothing is in grad yet, it stands for zeros */
    struct tensor *owner; /* of a view: whose gradient it is, and what says where that is and whether it is fresh */
    const struct tensor_cut *cut; /* of a weight; NULL: whole on every tensor-parallel rank */
    /* Of an activation, 0, or the rows of a whole that the tensor-parallel ranks hold cut by tokens: each has
     * ceil(cut_rows / ranks) of them in dim[0], zeros behind the last. */
    int64_t cut_rows;
};

/* Product of the dimensions. */
int64_t tensor_elems(const struct tensor *x);

enum tape_mode {
    TAPE_DRY,     /* check shapes and take memory; compute nothing; ids, targets, positions and offsets are not read */
    TAPE_FORWARD, /* compute, keep nothing for backward */
    TAPE_TRAIN,   /* compute and record */
};

enum tape_backward {
    TAPE_BACKWARD_INPUT = 1,  /* gradients of activations */
    TAPE_BACKWARD_WEIGHT = 2, /* gradients of parameters; needs the activations' ones */
    TAPE_BACKWARD_ALL = 3,
};

enum tape_recompute { TAPE_RECOMPUTE_NONE, TAPE_RECOMPUTE_BLOCK, TAPE_RECOMPUTE_ATTENTION };

struct compute; /* trainer/ops/compute.h */
struct kernels; /* trainer/ops/kernels.h: one table of raw kernels a device */
struct rope_table;
struct comm;
struct watch;
struct tape;

/* What of the host a device has a copy of since tape_begin: on_device in op.h. */
struct tape_copy {
    struct tape_copy *next;
    const int32_t *host;
    int64_t n;
    int32_t *there;
};

/* For tape_watch: what a record's backward adds gradients to, in each half; NULL: nothing more. */
enum { TAPE_LOOK = 3 };
struct tape_look {
    const char *op; /* "op_linear" */
    struct tensor *input[TAPE_LOOK], *weight[TAPE_LOOK];
};

/* One op's part of backward. Ops put their own fields behind it (ops.c). */
struct tape_record {
    struct tape_record *prev;
    void (*backward)(struct tape *t, const struct tape_record *r, unsigned halves); /* adds into gradients */
    struct tape_look look;
    int64_t block; /* that the op was called in, -1: none */
};

/* Called around each block (op_block), in forward and again in backward: what a block's parameters need before it runs,
 * and what becomes of their gradients. Not called in TAPE_DRY. An error becomes the tape's. */
struct tape_blocks {
    void *arg;
    status *(*enter)(void *arg, int64_t block, bool backward);
    status *(*leave)(void *arg, int64_t block, bool backward); /* backward: their gradients are all there */
};

struct tape {
    struct arena arena;            /* activations and gradients */
    struct arena host;             /* of a device: what the host writes and reads */
    struct arena *records;         /* that one, or on the CPU the same as activations */
    struct compute *compute;       /* borrowed; NULL: the CPU */
    struct workers *workers;       /* what its kernels take; borrowed; may be NULL */
    const struct kernels *kernels; /* its table */
    enum tape_mode mode;
    struct tape_record *last; /* newest record; linked backwards */
    struct rope_table *rope;  /* angles made since tape_begin, shared by all layers */
    struct tape_copy *copies; /* the same of index arrays on a device */
    status *error;            /* first error since tape_begin */

    enum tape_recompute recompute;    /* tape_recompute */
    bool bf16, low, share;            /* tape_bf16, tape_low, tape_share */
    const struct tape_blocks *blocks; /* tape_blocks; may be NULL */
    size_t block_bytes, block_host;   /* with it, the most that a block has taken since tape_begin, of both arenas */
    /* Where the gradients of a block's activations lie: backward needs those of one block at a time. */
    struct {
        char *at;                 /* since tape_begin, once it was needed */
        size_t used, most, bytes; /* by this block; by any since tape_begin; at `at`, or what a dry pass has found */
        bool open;                /* a block is running */
    } grads;

    struct watch *watch;  /* tape_watch; NULL: nobody looks */
    int64_t block;        /* that is running (op_block), or -1 */
    uint32_t micro_batch; /* of this pass, for messages; whoever drives the tape sets it */

    struct comm *tp; /* tape_spread */
    bool sequence;
    /* since tape_begin: the last activation that weights cut by rows were applied to, and what they saw; room for sums
     * over ranks */
    struct tensor *outside, *inside;
    float *room;
    int64_t room_floats;

    struct comm *ep;      /* tape_experts */
    int64_t routed;       /* with it, since tape_begin: rows that all its ranks have sent to experts */
    struct comm *context; /* tape_context; NULL: every pack is whole */
    float *context_part;  /* since tape_begin: room for the keys and values of all tokens */
    int64_t context_floats;
    int32_t *context_order; /* since tape_begin: of context_rows rows a rank; on a device only (context.c) */
    int64_t context_rows;
};

/* c: where to compute; NULL: on the CPU, with the threads w (may be NULL). Borrowed. cap_bytes 0: no cap on
 * activations. */
status *tape_open(struct workers *w, struct compute *c, size_t cap_bytes, struct tape **out) WARN_UNUSED;
void tape_close(struct tape *t); /* NULL is fine */
/* From now on blocks (op_block), or what is attention in them (op_block_attention), keep their outputs only; backward
 * runs each again. The same bits, for a second forward pass of these and the memory of one's activations instead of
 * all. */
void tape_recompute(struct tape *t, enum tape_recompute what);
/* From now on the products of op_linear, of experts and of op_logprob, forward and backward, are of factors rounded to
 * bf16, added up in f32 (kernels.h, gemm.bf16), and on a GPU those of op_attention too; all else, and what is stored,
 * stays f32. */
void tape_bf16(struct tape *t, bool bf16);
/* On a device, from now on activations that only products, normalisations, rope, attention and swiglu read are kept in
 * bf16, and so are their gradients, but for those of what several products read; what is added to the residual stream,
 * and the stream itself, stays f32. Needs tape_bf16; of no effect on the CPU. */
void tape_low(struct tape *t, bool low);
/* From now on backward always runs both halves at once, so that the gradients of activations inside blocks whose
 * activations are kept (op_block) can share the memory of one block's, as far as a dry pass has seen how much that is.
 */
void tape_share(struct tape *t, bool share);
/* From now on the outputs of every op, and after it the gradients that its backward adds to, are looked at, and the
 * first one that is not finite is an error, INVALID, that names the op, its block, the shape, the place and the value
 * (watch.h); borrowed; NULL: nobody looks, which costs nothing. */
void tape_watch(struct tape *t, struct watch *w);
/* From now on call these around each block; borrowed; NULL: none. */
void tape_blocks(struct tape *t, const struct tape_blocks *b);
/* From now on weights may be cut (tensor.cut) over the ranks of tp, which all run the same passes; borrowed. sequence:
 * between blocks activations are cut by tokens. */
void tape_spread(struct tape *t, struct comm *tp, bool sequence);
/* From now on experts (op_moe) are cut over the ranks of ep, which all run passes of the same layers, with tokens of
 * their own or none; borrowed. NULL: every rank has all. */
void tape_experts(struct tape *t, struct comm *ep);
/* From now on the ranks of this communicator share the tokens of every pack (context.h); borrowed; NULL or of one rank:
 * packs are whole. */
void tape_context(struct tape *t, struct comm *context);
/* Forget all records and tensors of before. */
void tape_begin(struct tape *t, enum tape_mode mode);
/* Take the tape's first error, of a device's kernels too as far as they have come. After TAPE_DRY the tensors are gone,
 * and each arena is one block that holds as much as was taken. */
status *tape_end(struct tape *t) WARN_UNUSED;
/* Seed `root` with droot (same shape, f32, where activations are; overwrites root->grad; NULL: what root->grad holds
 * already) and replay. Only
 * after TAPE_TRAIN without error, once for each half: INPUT first and WEIGHT later, or both at once. INVALID if root
 * has no gradient. Collective over the ranks of a spread tape, as a pass is; an error of the transport is returned. */
status *tape_backward(struct tape *t, struct tensor *root, const float *droot, unsigned halves) WARN_UNUSED;

/* Records from `last` on, newest first; for tape.c and block.c. */
void tape_replay(struct tape *t, const struct tape_record *last, unsigned halves);
/* Set the first error; returns NULL, so that an op can `return tape_fail(...)`. Takes st. */
struct tensor *tape_fail(struct tape *t, status *st);

#endif
