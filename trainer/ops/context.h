/* context: context parallelism as ops. The ranks of a tape's context (tape_context) run the same passes, each with
 * every ranks-th token of a pack: rank r of c has tokens r, r + c, ... in that order, on all ranks ceil(N / c) rows; of
 * the rows behind the pack's end there is one at most on a rank, with an id and a position that are legal and no
 * target. So each rank has the same share of every sequence's causal work, but for a token's (Brandon et al. 2023,
 * arXiv:2311.09431), and what a rank holds depends on N alone. Only attention and the log-probabilities' sums look at
 * other tokens:
 *
 *   op_attention gathers the keys and values of a layer for its rank's queries; backward gathers them again, and the
 *   ranks' summands of their gradients are added in order of ranks
 *   op_all_tokens (ops.h) gathers log-probabilities
 *
 * For op files only. Collective over the context. */
#ifndef TESSERA_TRAINER_OPS_CONTEXT_H
#define TESSERA_TRAINER_OPS_CONTEXT_H

#include "trainer/ops/kernels.h"
#include "trainer/ops/tape.h"

/* What reordering needs, once a pass, for `rows` rows a rank: before what is made may be forgotten again.
 * Without a context nothing. */
void context_prepare(struct tape *t, int64_t rows);
/* Room for the whole of k and v, of one layer at a time, and in training for their gradients. False: the tape has
 * failed. */
bool context_room(struct tape *t, const struct tensor *k);
/* a->k, a->v = those of all tokens, in order; a->rank, a->ranks; the rows of a->o behind the pack's end = 0. */
void context_keys(struct tape *t, const struct tensor *k, const struct tensor *v, struct attention *a);
/* a->dk, a->dv, where k and v want them: room for the summands of all tokens' gradients, zero. */
void context_gradients(struct tape *t, const struct tensor *k, const struct tensor *v, struct attention *a);
/* Add this rank's tokens' sums of these to the gradients of k and v; a->k and a->v are of no use then. */
void context_sum(struct tape *t, struct tensor *k, struct tensor *v, const struct attention *a);
/* INVALID: seg is not of a pack of which a rank has n rows, or positions do not ascend in a sequence. */
status *context_check(const struct tape *t, const struct segments *seg, int64_t n) WARN_UNUSED;
/* In place, the sum of the ranks' values; without a context, what they are. */
void context_add(struct tape *t, double *value, size_t count);

#endif
