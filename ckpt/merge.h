/* merge: the runs of a box that several ranks hold, brought together while it is saved. Two ways, over one plan
 * (merge_plan.h).
 *
 * Merge: nobody waits for anybody.
 *
 *   merge_start -> thread tsr-merge: runs -> outbox        merge_fence waits for this, and for nothing else
 *   capture thread -> merge_hand: a block for a chunk of a merged piece; what this rank gives itself is copied there
 *   merge_poll (each tick and fence): post all sends, once the outbox is full; post the receives of every chunk that
 *     was handed; give back chunks that have come (pipeline_filled). A chunk's receives are waited for only by the
 *     writer that is to write it
 *
 * Gather: merge_gather, inside tessera_save. For one box after another each rank that gives to it sends its run to all
 * the others, and waits; then the box's writer has it in memory, and it is saved like any tensor. What is gathered
 * without need is thrown away: this is the way to compare with.
 *
 * Messages of a pair of ranks follow the order of the plan, then of the box, cut at multiples of META_BLOCK_BYTES of
 * the box; so both sides know them without a word, and chunks, which are cut there too, hold whole ones.
 *
 * Invariants: (1) no message is posted before all ranks know that the plan stands (merge_arm); (2) a rank that failed
 * posts and receives on; (3) once any message was posted a save ends only after all of them: merge_drain; (4) all
 * memory is taken by merge_prepare; (5) only the training thread uses the communicator. */
#ifndef TESSERA_CKPT_MERGE_H
#define TESSERA_CKPT_MERGE_H

#include "ckpt/pipeline.h"
#include "ckpt/state.h"
#include "comm/comm.h"

struct merge;

/* For PLAN_MERGE or PLAN_GATHER (irregular). world is duplicated. Collective; the error is agreed. */
status *merge_open(struct comm *world, struct device *dev, int irregular, struct merge **out) WARN_UNUSED;
/* NULL is fine. No message may be in flight, unless MPI has failed. Collective. */
void merge_close(struct merge *m);
/* p's chunks are handed to merge_hand(m, ...). Before the first merge_start. */
void merge_bind(struct merge *m, struct pipeline *p);

/* Books and memory for a plan, and s, this rank's share of it; both must stay until the next merge_prepare or
 * merge_forget. Only while no save is in flight. NO_MEMORY, INTERNAL: nothing is prepared then. */
status *merge_prepare(struct merge *m, const struct plan *p, struct share *s) WARN_UNUSED;
void merge_forget(struct merge *m);

/* Begin to copy this rank's runs out. Does nothing for gather. */
void merge_start(struct merge *m, const tessera_state *from);
/* All ranks save by the plan that was prepared. */
void merge_arm(struct merge *m);
/* As in stage_sink. */
bool merge_hand(void *m, uint64_t chunk, void *block);
/* Move messages on; waits for nothing. Fails only with the transport. */
status *merge_poll(struct merge *m) WARN_UNUSED;
/* Wait until pieces 0 to `local` of the state were copied out. Returns the nanoseconds waited. */
uint64_t merge_fence(struct merge *m, uint32_t local);

/* Exchange everything now, and let the share's sources of merged pieces point there. Collective. Fails only with the
 * transport; *mine: what went wrong here (the exchange took place all the same), else untouched. */
status *merge_gather(struct merge *m, const tessera_state *from, status **mine) WARN_UNUSED;

/* The save is given up (pipeline_give_up): complete or drop what is under way and give handed chunks back. Collective
 * on x; afterwards as after merge_end. Fails only with the transport. */
status *merge_drain(struct merge *m, struct comm *x) WARN_UNUSED;
/* This rank's save is over. Local: no message has been posted, or all have arrived, or MPI has failed. */
void merge_end(struct merge *m);

struct merge_view {
    bool captured;              /* nothing reads a tensor any more */
    bool drained;               /* all that this rank sends has gone */
    uint64_t memory_bytes;      /* beside the staging pool */
    uint64_t wire_bytes;        /* sent to other ranks in a save */
    struct report_clock copies; /* into the outbox */
};
/* Of the save in flight, or the last one. Training thread. */
void merge_look(struct merge *m, struct merge_view *out);

#endif
