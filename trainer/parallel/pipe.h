/* pipe: micro-batches through the stages of a model (Huang et al. 2019, arXiv:1811.06965), in the order of a schedule
 * (schedule.h). A rank has one stage of the pipeline, or with the interleaved schedule several, its chunks.
 *
 * Gradients of weights are added in order of micro-batches on every stage: sums have the same bits on any number of
 * stages, by any schedule. Activations and their gradients go to the neighbours as they are; their sizes follow from
 * the micro-batch, which every stage builds itself. One stage is the same with nothing to send. */
#ifndef TESSERA_TRAINER_PARALLEL_PIPE_H
#define TESSERA_TRAINER_PARALLEL_PIPE_H

#include "comm/comm.h"
#include "trainer/ops/tape.h"
#include "trainer/parallel/schedule.h"

struct pipe;

/* What is done in a pass, with micro-batch k. A micro-batch is prepared before its forward and again before its
 * backward pass, so that one place holds the ids and offsets that both read.
 *
 * Of ranks that gather and sum together (shards.h) each makes as many passes as the others: without micro-batch it has
 * `idle` called where others run theirs, in the order of the schedule. */
struct pipe_work {
    bool (*micro_batch)(void *arg, uint32_t pass, uint32_t *k); /* false: none; NULL: k is the pass */
    /* Before a pass of a chunk runs, and instead of it. halves: 0 forward, else of backward (tape_backward). NULL:
     * nothing */
    status *(*begin)(void *arg, int chunk, unsigned halves);
    status *(*idle)(void *arg, int chunk, unsigned halves);
    int64_t (*prepare)(void *arg, uint32_t k); /* its tokens */
    /* A chunk of the model, on t; x: from the stage before, NULL on the first. Errors stick to the tape. */
    struct tensor *(*forward)(void *arg, struct tape *t, int chunk, struct tensor *x);
    /* Last stage only, what forward has made of it; in training also d loss / d y, into y->grad. */
    status *(*result)(void *arg, uint32_t k, struct tensor *y);
    status *(*added)(void *arg, uint32_t k, int chunk); /* its gradients of this chunk are in place */
    void *arg;
};

/* pp: this rank and its neighbours, in order; NULL: one stage. chunks: of a rank, with PIPE_INTERLEAVED; else 1. most:
 * micro-batches that a rank runs in a step, at most; width: channels between two stages. cap_bytes: of all activations,
 * 0: none. w: threads of the CPU; c: where passes compute (tape_open). w, c, pp are borrowed.
 * Collective over pp where c is a device. */
status *pipe_open(struct comm *pp, enum pipe_schedule how, int chunks, uint32_t most, int64_t width, struct workers *w,
                  struct compute *c, size_t cap_bytes, struct pipe **out) WARN_UNUSED;
void pipe_close(struct pipe *p); /* NULL is fine */
/* The tapes, to be set up alike: tapes [0, pipe_tapes) */
int pipe_tapes(const struct pipe *p);
struct tape *pipe_tape(struct pipe *p, int i);
bool pipe_last(const struct pipe *p);            /* is the last stage on this rank? */
bool pipe_ends(const struct pipe *p, int chunk); /* is this chunk the last stage? */
/* Dry passes of a micro-batch of `tokens` on all tapes: what it needs is taken now. Not collective. */
status *pipe_dry(struct pipe *p, int64_t tokens, const struct pipe_work *w) WARN_UNUSED;

/* Passes [first, end), at most `most`, the same on all stages. Collective over pp; a rank's error leaves the
 * others waiting. No allocation after dry passes of the largest shapes. */
status *pipe_train(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w) WARN_UNUSED;
/* Forward only, any number; `added` is not called. */
status *pipe_forward(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w) WARN_UNUSED;
/* Most micro-batches whose activations were kept at a time, since pipe_open; each chunk of one counts. */
int pipe_peak(const struct pipe *p);
uint64_t pipe_sent_bytes(const struct pipe *p); /* comm.sent_bytes of pp and of what it was split into; one stage: 0 */

#endif
