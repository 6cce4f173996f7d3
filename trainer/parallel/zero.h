/* zero: data parallelism with ZeRO 0 and 1, and sums that do not depend on the number of ranks.
 *
 * The flat block of parameters (model.h) is cut into buckets of a fixed size; each bucket is cut over the dp ranks at
 * multiples of 1,024 elements. A rank owns those runs: it sums their gradients, and with stage 1 keeps AdamW's moments
 * of them only (irregular pieces).
 *
 * A step has K micro-batches in L lanes: lane l adds micro-batches [l K / L, (l + 1) K / L) in order, rank r has lanes
 * [r L / dp, (r + 1) L / dp). Lane sums combine pairwise up a fixed binary tree over lane numbers; a rank sends the
 * largest aligned nodes inside its run of lanes, and the owner of a run finishes the same tree; an empty node is
 * skipped, never added as zero. So gradients, losses and weights are bitwise equal for every dp <= L, ZeRO stage and
 * thread count. deterministic off: a rank has one lane, and the owner adds ranks in order. */
#ifndef TESSERA_TRAINER_PARALLEL_ZERO_H
#define TESSERA_TRAINER_PARALLEL_ZERO_H

#include "comm/comm.h"
#include "trainer/model/model.h"

struct zero_options {
    int stage; /* 0 or 1; others UNSUPPORTED by name */
    bool deterministic;
    int lanes;             /* deterministic: a power of two, 1..64; INVALID if below dp */
    uint64_t bucket_elems; /* multiple of PARAM_ALIGN; 0: 4 Mi */
    struct comm *tp;       /* ranks that hold the other parts of the parameters; NULL: none. Borrowed */
    struct comm *pp;       /* ranks that hold the other stages' parameters, in their order; NULL: none. Borrowed */
    bool sums_only;        /* no update: no moments, values are not looked at (tied.h) */
};

/* A run of the flat block that this rank owns; buckets in order. */
struct zero_run {
    uint64_t begin, end;
};

struct zero; /* opaque but for the moments */
struct zero_moments {
    float *m, *v; /* stage 0: [params.total]; stage 1: the owned runs one after another */
    uint64_t elems;
    const struct zero_run
        *run; /* what m and v hold, in flat-block elements, in order: stage 0: one run, the whole block */
    uint64_t run_count;
};

/* Collective over dp, tp and pp. params must have gradients; both are borrowed. All memory is taken here. */
status *zero_open(const struct zero_options *o, struct params *p, struct comm *dp, struct zero **out) WARN_UNUSED;
void zero_close(struct zero *z); /* NULL is fine */
struct zero_moments zero_moments(struct zero *z);
void zero_reset_moments(struct zero *z); /* to zero: the optimiser restarts */

/* Which of K micro-batches this rank runs: [*first, *end), possibly empty; in order. */
void zero_micro_batches(const struct zero *z, uint32_t k, uint32_t *first, uint32_t *end);

/* A step: zero_begin; for each own micro-batch i in order: backward into params.grad, zero_added(i); zero_reduce;
 * zero_update. */
void zero_begin(struct zero *z, uint32_t k); /* clears gradients */
void zero_added(struct zero *z,
                uint32_t micro_batch); /* params.grad now also holds this micro-batch; closes lanes as they fill */
/* Sum gradients over all ranks, and over those of tp where several hold summands (shared_grads.h); each rank then has
 * its owned runs. *norm = global L2 norm of the whole model: f64 sums of squares of aligned 1,024-element blocks up a
 * dyadic tree over the blocks of all pipeline stages, the same bits on any dp and pp; over tp in order of ranks, what
 * several hold once. norm NULL: no norm. Collective over dp and tp, with a norm over pp too. */
status *zero_reduce(struct zero *z, double *norm) WARN_UNUSED;
/* The norm alone, of what zero_reduce has left in the owned runs. Collective over dp, tp and pp. */
status *zero_norm(struct zero *z, double *norm) WARN_UNUSED;
/* After zero_reduce: every rank's owned runs of the gradients to every rank. Collective over dp. */
status *zero_gather(struct zero *z) WARN_UNUSED;

struct adamw {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    uint64_t step; /* 1 for the first update: bias correction */
};
/* AdamW on the owned runs (stage 0: after all-gathering gradients, everything), weight decay by each parameter's mask,
 * then all-gather parameters (stage 1). `fence` (may be NULL) is called before bytes [addr, addr + n) of parameters or
 * moments are overwritten; every rank calls it first for the same bytes. Its error is returned after the collectives;
 * parameters and moments are then of no use. Collective. */
status *zero_update(struct zero *z, const struct adamw *a, status *(*fence)(void *arg, const void *addr, size_t bytes),
                    void *arg) WARN_UNUSED;

/* Sum scalars of K micro-batches: value[k * width + j] as filled by the rank that ran micro-batch k; out[j] = sum over
 * k ascending in f64, the same on all ranks and for any dp. Collective. No allocation after the first call with these
 * sizes. */
status *zero_sum_scalars(struct zero *z, const double *value, uint32_t k, uint32_t width, double *out) WARN_UNUSED;

#endif
