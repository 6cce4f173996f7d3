/* shards: parameters (ZeRO 3), frozen ones too, and gradients (ZeRO 2 and 3) that a rank keeps its shard's runs of
 * only, and windows in which the whole ones of a few units at a time appear.
 *
 * A window is memory of a fixed place: one for unit 0 (what is used outside of the model's blocks), and two that blocks
 * share in turn, even and odd ones. Tensors point into their unit's window for good. So a pass goes
 *
 *     shards_begin(s, training);                           // unit 0 is gathered
 *     forward (tape_blocks(tape, shards_hooks(s)))         // block i is gathered before it runs, block i + 1 meanwhile
 *     tape_backward                                        // the same in reverse; a block's gradients are handed to
 *     shards_end(s, chunk);                                // `collect` when it is done, unit 0's here
 *
 * Gathers are exchanges among the shards of a replica, so all of them make the same passes; who has nothing to compute
 * calls shards_idle and shards_idle_backward. On a pipeline passes of several micro-batches take turns: a backward pass
 * then has a shards_begin (training) of its own. Each is of one chunk of the model (params.chunk): of its units alone.
 * What a window holds stays good until the parameters change (shards_changed). No allocation after shards_open, but for
 * shards_hold. */
#ifndef TESSERA_TRAINER_PARALLEL_SHARDS_H
#define TESSERA_TRAINER_PARALLEL_SHARDS_H

#include "comm/comm.h"
#include "trainer/parallel/buckets.h"

struct shards_options {
    bool data, grad;       /* what is cut: parameters, gradients; at least one. data false: they have their memory */
    uint64_t bucket_elems; /* most elements of a bucket */
    int shards;            /* of a replica; divides dp */
    /* With data: what tensors hold, DTYPE_F32 or DTYPE_BF16: a rounded copy of the shards' f32 parameters, which is
     * what is gathered; and whether all of it stays on every rank (ZeRO 0 to 2): no windows, gathered by
     * shards_refresh. */
    enum dtype dtype;
    bool resident;
    bool stochastic; /* bf16: up or down by chance, as near as it is, drawn at (seed, tensor, step, element) */
    uint64_t seed;
};

struct shards; /* opaque */

/* Points the tensors of p into windows. Borrows p and dp, which moves memory of p->compute, where all is taken now.
 * Collective over dp. */
status *shards_open(const struct shards_options *o, struct params *p, struct comm *dp, struct shards **out) WARN_UNUSED;
void shards_close(struct shards *s); /* NULL is fine */
const struct buckets *shards_buckets(const struct shards *s);
/* The ranks of this replica, in order of shards. */
struct comm *shards_comm(const struct shards *s);
/* Are values cut? Else gradients are alone. */
bool shards_cut_values(const struct shards *s);
/* This shard's parameters that train, or frozen ones: run after run, bucket after bucket (bucket.own). */
struct shard_runs {
    float *value; /* NULL: they are whole */
    uint64_t elems;
    const struct zero_run *run; /* in flat-block elements, in order */
    uint64_t runs;
};
struct shard_runs shards_own(const struct shards *s, bool frozen);
const struct params *shards_params(const struct shards *s); /* runs are in elements of this block */
/* Bucket b's gradients in its unit's window. */
float *shards_grad(const struct shards *s, uint64_t b);
/* Bytes of windows; of parameters, rounded copies and resident ones too. */
uint64_t shards_window_bytes(const struct shards *s);
uint64_t shards_value_bytes(const struct shards *s);

/* Called when a unit's gradients of this pass are all in its window: from then on until the next call they stay. */
void shards_collect(struct shards *s, status *(*collect)(void *arg, int unit), void *arg);

/* From now on hooks of s are those of `other`, too: parameters of the same units that are cut over other ranks
 * (experts.h), none of unit 0. NULL: none. Borrowed. */
void shards_join(struct shards *s, struct shards *other);

/* Each collective over the replica's shards. */
status *shards_begin(struct shards *s, bool training) WARN_UNUSED;
void shards_clear(struct shards *s); /* of shards_begin in training, what clears unit 0's gradients. Not collective */
const struct tape_blocks *shards_hooks(struct shards *s);
status *shards_end(struct shards *s, int chunk) WARN_UNUSED;
/* A forward or a backward pass without computing anything; weights: what makes gradients of weights, else of
 * activations only (tape_backward), which gathers alone. */
status *shards_idle(struct shards *s, int chunk) WARN_UNUSED;
status *shards_idle_backward(struct shards *s, int chunk, bool weights) WARN_UNUSED;
/* The shards' parameters have changed. Not between shards_begin and shards_end. */
void shards_changed(struct shards *s);
/* The same, those that train by a step or all by other means: what tensors will hold is rounded anew, after `step`
 * steps of the run, and gathered if it is resident. Collective over the replica's shards. */
status *shards_refresh(struct shards *s, uint64_t step, bool all) WARN_UNUSED;

/* Initial values (params_init), unit by unit; shards_refresh follows. Not collective. */
status *shards_init(struct shards *s, uint64_t seed) WARN_UNUSED;
/* CRC-32C of the whole block, bucket by bucket. */
status *shards_crc(struct shards *s, uint32_t *crc) WARN_UNUSED;
/* Memory for all parameters, gathered, for work that is not done block by block; tensors point there until
 * shards_release. exact: in f32; then keep: what was written there becomes the shards' parameters. Else as tensors hold
 * them in passes. Collective, but shards_release. */
status *shards_hold(struct shards *s, bool exact) WARN_UNUSED;
void shards_release(struct shards *s, bool keep);

#endif
