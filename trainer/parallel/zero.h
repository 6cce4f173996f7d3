/* zero: data parallelism with ZeRO 0 to 3, and sums that do not depend on the number of ranks.
 *
 * The flat block of parameters (model.h) is cut into buckets, and those over the shards of dp = replicas x shards ranks
 * (buckets.h). A shard's runs are what its moments (stage 1), gradients (2) and parameters (3) are kept of; stage 0
 * keeps all of everything. Stages 2 and 3 work in windows of two blocks (shards.h).
 *
 * A step has K micro-batches in L lanes: lane l adds the gradients of micro-batches [l K / L, (l + 1) K / L), each
 * summed from zero, in order. Lane sums combine pairwise up a fixed binary tree over lane numbers; an empty node is
 * skipped, never added as zero. So gradients, losses and weights are bitwise equal for every dp <= L, ZeRO stage,
 * dp_shard and thread count.
 *
 * A group is what adds up gradients alone: with stages 0 and 1 a rank, with 2 and 3 a replica. Group g of G has lanes
 * [g L / G, (g + 1) L / G). A group of one rank runs its micro-batches one after another; a replica of S shards S at a
 * time, neighbours beside each other, and each shard takes all S gradients of its runs in order of micro-batches.
 * Groups send the largest aligned nodes inside their lanes when these are complete, and the owner of a part finishes
 * the tree. deterministic off: a group has one lane, and groups are added in order. */
#ifndef TESSERA_TRAINER_PARALLEL_ZERO_H
#define TESSERA_TRAINER_PARALLEL_ZERO_H

#include "comm/comm.h"
#include "trainer/model/model.h"
#include "trainer/parallel/buckets.h"

struct shards;

struct zero_options {
    int stage; /* 0 to 3 */
    bool deterministic;
    int lanes;               /* deterministic: a power of two, 1..64; INVALID if there are more groups */
    uint64_t bucket_elems;   /* multiple of PARAM_ALIGN; 0: 4 Mi */
    struct comm *cp;         /* ranks that hold the same parameters, each with summands of all gradients; NULL: none.
                              * Borrowed */
    struct comm *tp;         /* ranks that hold the other parts of the parameters; NULL: none. Borrowed */
    struct comm *pp;         /* ranks that hold the other stages' parameters, in their order; NULL: none. Borrowed */
    bool sums_only;          /* no update: no moments, values are not looked at (tied.h) */
    int shards;              /* 0: dp; INVALID if it does not divide dp */
    uint32_t micro_batches;  /* a step has at most so many, 0: any number. If no lane has two, a buffer is saved */
    struct workers *workers; /* for norms and updates, where params.compute is NULL; may be NULL. Borrowed */
    /* DTYPE_BF16: tensors hold bf16, rounded from f32 parameters that are kept as the moments are (0: DTYPE_F32: they
     * hold the parameters). At every stage they get their memory here, and zero_update is followed by shards_refresh.
     */
    enum dtype param_dtype;
    bool stochastic; /* shards.h */
    uint64_t seed;
    /* DTYPE_BF16: gradients travel over dp in bf16. So that bits stay those of any dp and stage, what may travel is
     * rounded to the nearest everywhere: each micro-batch's gradient, the sum of each lane, of each node above, and
     * what the step's gradient is in the end. */
    enum dtype grad_dtype;
};

struct zero; /* opaque but for the moments */
struct zero_moments {
    float *m; /* stage 0: [params.total]; else the shard's runs one after another */
    float *v; /* the same but for Muon's matrices, which have no second moment */
    float *w; /* stage 3, or bf16 tensors: the parameters of m's runs; else NULL: they are where their tensors are */
    uint64_t elems, v_elems;
    const struct zero_run
        *run; /* what m and w hold, in flat-block elements, in order: stage 0: one run, the whole block */
    uint64_t run_count;
    const struct zero_run *v_run; /* and v */
    uint64_t v_run_count;
};

/* Collective over dp, cp, tp and pp. With stages 0 and 1 params must have values and gradients, with 2 values; else
 * they get their memory here, and tensors point into it until zero_close. Both are borrowed. All memory is taken here,
 * where params.compute is: all ranks' communicators must move it. On a device a step's work is queued, and the host
 * waits for nothing but the norm that it asks zero_reduce for. */
status *zero_open(const struct zero_options *o, struct params *p, struct comm *dp, struct zero **out) WARN_UNUSED;
void zero_close(struct zero *z); /* NULL is fine; collective */
struct zero_moments zero_moments(struct zero *z);
void zero_reset_moments(struct zero *z);          /* to zero: the optimiser restarts */
struct shards *zero_shards(const struct zero *z); /* stages 2 and 3, or bf16 tensors; else NULL */
uint64_t zero_sent_bytes(const struct zero *z);   /* comm.sent_bytes of dp and all that it was split into */
/* Of the same: time of exchanges in flight, and what of it was waited for (comm.h). */
void zero_times(const struct zero *z, uint64_t *flight_ns, uint64_t *wait_ns);
/* What a rank holds, in bytes. */
struct zero_memory {
    uint64_t parameters, gradients, moments;
    uint64_t windows, messages; /* whole units at work (stages 2 and 3); other ranks' gradients while they are added */
};
struct zero_memory zero_memory(const struct zero *z);

/* How many passes this rank makes in a step of K micro-batches, and the micro-batch of a pass: false: none, the others
 * of its replica have one. */
uint32_t zero_passes(const struct zero *z, uint32_t k);
bool zero_micro_batch(const struct zero *z, uint32_t k, uint32_t pass, uint32_t *micro_batch);
uint32_t zero_most_passes(const struct zero *z, uint32_t k); /* of any rank */
/* Where a pass has none, its *micro_batch is this or more: the end of those of the ranks that add with this one. */
uint32_t zero_micro_batches_end(const struct zero *z, uint32_t k);

/* A step: zero_begin; for each pass: forward and backward between shards_begin and shards_end if there are shards, and
 * zero_added, or zero_idle; zero_reduce; zero_update. With stages 0 and 1 backward adds into params.grad. From the
 * last backward pass on messages are under way, until zero_reduce: it is called even if the step is of no use. */
void zero_begin(struct zero *z, uint32_t k); /* clears gradients */
/* Backward has left this unit of the model (param.unit): the gradients of this pass of it, and of what of its chunk has
 * higher units, are complete. In the last pass of stages 0 and 1 the sums of buckets that are begin here and those that
 * have come are finished; else nothing happens. Not necessary, and not collective: each rank at its own time. */
status *zero_left(struct zero *z, int unit) WARN_UNUSED;
/* This pass's gradients are there. Stages 2 and 3: collective over the replica's shards. */
status *zero_added(struct zero *z, uint32_t micro_batch) WARN_UNUSED;
/* The same of one chunk of the model (params.chunk), which come one by one and each in order of micro-batches. */
status *zero_added_chunk(struct zero *z, uint32_t micro_batch, int chunk) WARN_UNUSED;
/* The same of a pass that was run without micro-batch: every rank may make zero_most_passes (experts.h). */
status *zero_added_none(struct zero *z, int chunk) WARN_UNUSED;
/* A backward pass of a chunk without micro-batch, after shards_idle. Collective over the replica's shards. */
status *zero_idle(struct zero *z, int chunk) WARN_UNUSED;
/* Sum gradients over all ranks, over those of cp in their order, and over those of tp where several hold summands
 * (shared_grads.h); each rank then has its shard's runs. *norm = global L2 norm of the whole model: f64 sums of squares
 * of aligned 1,024-element blocks up a dyadic tree over the blocks of all pipeline stages, the same bits on any dp and
 * pp; over tp in order of ranks, what several hold once. norm NULL: no norm. Collective over dp, cp and tp, with a norm
 * over pp too. */
status *zero_reduce(struct zero *z, double *norm) WARN_UNUSED;
/* The norm's square alone, of what zero_reduce has left in the shard's runs: *squares is where the parameters are
 * (params.compute), until the next call. Queued, as all of a step on a device. Collective over dp, tp and pp. */
status *zero_squares(struct zero *z, const double **squares) WARN_UNUSED;
/* Stages 0 and 1, after zero_reduce: every rank's runs of the gradients to every rank. Collective over dp. */
status *zero_gather(struct zero *z) WARN_UNUSED;
/* After zero_squares, for an optimiser of its own between that and zero_update: each rank then has the sums of all its
 * runs (moments.run). Stage 0: collective over dp. */
status *zero_spread_sums(struct zero *z) WARN_UNUSED;
/* Where they lie: run is one of moments.run, `before` the elements of those before it. */
float *zero_sums(const struct zero *z, struct zero_run run, uint64_t before);
/* So many neighbours of dp hold the runs of all parameters together: the shards of a replica; stage 0: 1. */
int zero_holders(const struct zero *z);
/* Stages 2 and 3: where this shard's runs of the sums of a parameter of unit 0 lie, one after another: *n elements. The
 * same ones of a parameter of that shape wherever it is. */
float *zero_own_sums(const struct zero *z, uint64_t offset, uint64_t elems, uint64_t *n);

struct adamw {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    uint64_t step;       /* 1 for the first update: bias correction */
    const double *scale; /* in place of grad_scale, where the parameters are; NaN: nothing changes. NULL: grad_scale */
};
/* AdamW on the shard's runs (stage 0: after all-gathering gradients, everything), weight decay by each parameter's
 * mask, then all-gather parameters (stages 1 and 2). `fence` (may be NULL) is called before bytes [addr, addr + n) of
 * parameters or moments are overwritten; every rank calls it first for the same bytes. Its error is returned after the
 * collectives; parameters and moments are then of no use. Collective. */
status *zero_update(struct zero *z, const struct adamw *a, status *(*fence)(void *arg, const void *addr, size_t bytes),
                    void *arg) WARN_UNUSED;

/* Sum scalars of K micro-batches: value[k * width + j] as filled by the rank that ran micro-batch k; out[j] = sum over
 * k ascending in f64, the same on all ranks and for any dp. Collective. No allocation after the first call with these
 * sizes. */
status *zero_sum_scalars(struct zero *z, const double *value, uint32_t k, uint32_t width, double *out) WARN_UNUSED;

#endif
