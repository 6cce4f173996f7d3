/* pipe: micro-batches through the stages of a model (Huang et al. 2019, arXiv:1811.06965), by one of two schedules.
 *
 * 1F1B (Narayanan et al. 2019, PipeDream, as flushed once a step: 2021, arXiv:2104.04473): stage s of P runs
 * min(n, P - s - 1) of its n micro-batches forward, then one forward and one backward in turn, then the backward passes
 * that are left. At most P - s micro-batches have activations at a time, each on a tape of its own.
 *
 * Zero bubble (Qi et al. 2023, arXiv:2401.10241, ZB-H1): the same, but a backward pass makes gradients of activations
 * only, which the stage before waits for; those of weights follow s passes later, where a stage would wait otherwise.
 * At most P micro-batches have activations on every stage, as on the first of 1F1B.
 *
 * Gradients of weights are added in order of micro-batches on every stage: sums have the same bits on any number of
 * stages, by either schedule. Activations and their gradients go to the neighbours as they are; their sizes follow from
 * the micro-batch, which every stage builds itself. One stage is the same with nothing to send. */
#ifndef TESSERA_TRAINER_PARALLEL_PIPE_H
#define TESSERA_TRAINER_PARALLEL_PIPE_H

#include "comm/comm.h"
#include "trainer/ops/tape.h"

struct pipe;
enum pipe_schedule { PIPE_1F1B, PIPE_ZERO_BUBBLE };

/* What is done with micro-batch k. A micro-batch is prepared before its forward and again before its backward pass, so
 * that one place holds the ids and offsets that both read. */
struct pipe_work {
    int64_t (*prepare)(void *arg, uint32_t k); /* its tokens */
    /* This stage's part of the model, on t; x: from the stage before, NULL on the first. Errors stick to the tape. */
    struct tensor *(*forward)(void *arg, struct tape *t, struct tensor *x);
    /* Last stage only, what forward has made of it; in training also d loss / d y, into y->grad. */
    void (*result)(void *arg, uint32_t k, struct tensor *y);
    status *(*added)(void *arg, uint32_t k); /* its gradients are in place */
    void *arg;
};

/* pp: this stage and its neighbours, in order; NULL: one stage. most: micro-batches that a rank runs at once, at most;
 * width: channels between two stages. cap_bytes: of all activations, 0: none. w, pp are borrowed. Not collective. */
status *pipe_open(struct comm *pp, enum pipe_schedule how, uint32_t most, int64_t width, struct workers *w,
                  size_t cap_bytes, struct pipe **out) WARN_UNUSED;
void pipe_close(struct pipe *p); /* NULL is fine */
/* The tapes, to be set up alike: tapes [0, pipe_tapes) */
int pipe_tapes(const struct pipe *p);
struct tape *pipe_tape(struct pipe *p, int i);
bool pipe_last(const struct pipe *p); /* is this the last stage? */
/* Dry passes of a micro-batch of `tokens` on all tapes: what it needs is taken now. Not collective. */
status *pipe_dry(struct pipe *p, int64_t tokens, const struct pipe_work *w) WARN_UNUSED;

/* Micro-batches [first, end), the same on all stages. Collective over pp; a rank's error leaves the others waiting. No
 * allocation after dry passes of the largest shapes. */
status *pipe_train(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w) WARN_UNUSED;
/* Forward only; `added` is not called. */
status *pipe_forward(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w) WARN_UNUSED;
/* Most micro-batches whose activations were kept at a time, since pipe_open. */
int pipe_peak(const struct pipe *p);

#endif
