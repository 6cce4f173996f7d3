/* shared_grads: gradients of parameters that several tensor-parallel ranks hold, each with a summand of them
 * (param.partial: norms of activations that are cut by tokens or by heads, key and value heads on more than one rank).
 * Summed once a step, over the runs that ZeRO gives this rank, in order of ranks: equal bits on all that hold them, and
 * on any dp. */
#ifndef TESSERA_TRAINER_PARALLEL_SHARED_GRADS_H
#define TESSERA_TRAINER_PARALLEL_SHARED_GRADS_H

#include "comm/comm.h"
#include "trainer/model/model.h"
#include "trainer/parallel/buckets.h"

struct shared_grads;

/* run[runs]: this rank's runs of the flat block, the same on all ranks of tp; at[runs]: where in the gradients that are
 * summed later each begins. tp NULL or of one rank: there is nothing
 * to sum. Takes all memory. Collective over tp; p and tp are borrowed. */
status *shared_grads_open(const struct params *p, const struct zero_run *run, const uint64_t *at, uint64_t runs,
                          struct comm *tp, struct shared_grads **out) WARN_UNUSED;
void shared_grads_close(struct shared_grads *s); /* NULL is fine; collective */
/* In place in `grads`. Collective over tp. */
status *shared_grads_sum(struct shared_grads *s, float *grads) WARN_UNUSED;

#endif
