/* dispatch: rows of tokens on their way to experts and back. For op files only.
 *
 * A rank's choices (token n's j-th expert) are sorted by expert, and for each expert by token: its sorted rows. With
 * expert parallelism (tape_experts) the experts lie on several ranks, neighbours together, and every rank gets the
 * sorted rows of its experts from all: expert after expert, for each in order of ranks. Without, these are the rows
 * that experts see already. Collective over the ranks of tape.ep. */
#ifndef TESSERA_TRAINER_OPS_DISPATCH_H
#define TESSERA_TRAINER_OPS_DISPATCH_H

#include "comm/comm.h"
#include "trainer/ops/kernels.h"

/* Where the rows of a layer's tokens go. In the arena. */
struct routing {
    const struct router *how;
    int64_t n;       /* tokens here */
    int64_t experts; /* here, of how->experts */
    int64_t rows;    /* that they get */
    int32_t *expert; /* [N, K], as kernels see it, as the next three */
    int32_t *place;  /* [N, K]: the sorted row of each choice */
    int32_t *token;  /* [N K]: the token of each sorted row */
    int32_t *begin;  /* [E + 1]: of each expert's rows among the sorted ones */
    int32_t *offset; /* [experts here + 1]: of each expert's rows among those that they get */
    int32_t *chosen; /* [N, K]: room for the host's copy of expert; on the CPU that itself */
    /* with expert parallelism, the host's: begin, offset, and [ranks][E] the rows of each rank for each expert */
    int32_t *begin_here, *from;
    int32_t *counts;
    struct comm_xfer *xfer; /* room for all messages */
};

/* Take memory for the routing of n tokens to experts of which `experts` are here. NULL: the tape has failed. */
struct routing *routing_new(struct tape *t, const struct router *how, int64_t n, int64_t experts);
/* Experts are chosen: sort, and tell the other ranks, for which the host waits for the counts. Without expert
 * parallelism it waits for nothing. */
void routing_sort(struct tape *t, struct routing *g);
/* [rows, C] from x [N, C]; backward adds the rows' gradients to their tokens' in the sorted order. */
struct tensor *op_dispatch(struct tape *t, struct tensor *x, struct routing *g);
/* y [N, C], each token's sum of its rows [rows, C] times weight [N, K] (struct mix). */
struct tensor *op_combine(struct tape *t, struct tensor *rows, struct tensor *weight, struct routing *g);

#endif
