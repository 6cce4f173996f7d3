/* schedule: the order in which a stage of a pipeline runs its passes. Pure.
 *
 * 1F1B (Narayanan et al. 2019, PipeDream, as flushed once a step: 2021, arXiv:2104.04473): stage s of P runs
 * min(n, P - s - 1) of its n micro-batches forward, then one forward and one backward in turn, then the backward passes
 * that are left. At most P - s micro-batches have activations at a time.
 *
 * Zero bubble (Qi et al. 2023, arXiv:2401.10241, ZB-H1): the same, but a backward pass makes gradients of activations
 * only, which the stage before waits for; those of weights follow s passes later, where a stage would wait otherwise.
 * At most P micro-batches have activations on every stage, as on the first of 1F1B.
 *
 * Interleaved (2021, arXiv:2104.04473, section 2.2): a stage has V chunks of the model, the v-th being virtual stage
 * v P + s of V P. Micro-batches go in groups of P, the last one smaller if P does not divide n; a group goes through
 * one chunk after another. At most (V - 1) P + 2 (P - s - 1) + 1 pieces (a micro-batch on a chunk) have activations.
 * Where P divides n the order is the paper's; otherwise that would come to a stand, so in general the order is what a
 * run with passes of equal length would do: forward wherever a piece has come and there is room, else backward.
 *
 * On every stage a chunk's gradients of weights are made in order of micro-batches. */
#ifndef TESSERA_TRAINER_PARALLEL_SCHEDULE_H
#define TESSERA_TRAINER_PARALLEL_SCHEDULE_H

#include <stddef.h>
#include <stdint.h>

enum pipe_schedule { PIPE_1F1B, PIPE_ZERO_BUBBLE, PIPE_INTERLEAVED };

struct pipe_shape {
    enum pipe_schedule how;
    int stages, stage, chunks; /* chunks: V; 1 but for PIPE_INTERLEAVED */
};

enum pipe_pass {
    PIPE_PASS_FORWARD,
    PIPE_PASS_BACKWARD, /* both halves */
    PIPE_PASS_INPUT,    /* gradients of activations */
    PIPE_PASS_WEIGHT,   /* of weights */
};
struct pipe_op {
    uint32_t k; /* micro-batch of 0..n-1 */
    int chunk;
    enum pipe_pass pass;
};

/* Most pieces with activations that n micro-batches can need. */
int schedule_in_flight(const struct pipe_shape *s, uint32_t n);
/* How many ops n micro-batches make at most, and how many elements of scratch that takes. */
size_t schedule_ops(const struct pipe_shape *s, uint32_t n);
size_t schedule_scratch(const struct pipe_shape *s, uint32_t n);
/* Fill op; returns how many. */
size_t schedule_make(const struct pipe_shape *s, uint32_t n, uint64_t *scratch, struct pipe_op *op);

#endif
