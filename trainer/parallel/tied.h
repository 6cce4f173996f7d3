/* tied: a weight with two uses, embedding and output matrix (model.tied). Each use has a gradient of its own, summed
 * over micro-batches and data-parallel ranks like all others, until the end of the step; then the head's is added to
 * the embedding's, once. So the sum has the same bits whether one rank has both uses or the first and the last pipeline
 * stage have one each. What is updated, saved and counted in norms is the first stage's; the last stage gets its values
 * from there. */
#ifndef TESSERA_TRAINER_PARALLEL_TIED_H
#define TESSERA_TRAINER_PARALLEL_TIED_H

#include "trainer/parallel/zero.h"

struct tied;

/* o: as for the model's zero_open. pp NULL: one stage. *out NULL: the model has no tied weight that is kept apart, or
 * this stage has no part in it. All memory is taken here. Collective over dp and pp; m and the communicators are
 * borrowed. */
status *tied_open(const struct zero_options *o, struct model *m, struct comm *dp, struct comm *pp,
                  struct tied **out) WARN_UNUSED;
void tied_close(struct tied *t); /* NULL is fine, as in all that follow */

/* Beside zero_begin, shards_begin (training), zero_added and zero_idle. */
void tied_begin(struct tied *t, uint32_t k);
void tied_begin_pass(struct tied *t);
status *tied_left(struct tied *t) WARN_UNUSED; /* zero_left, of the last block: the head lies behind it */
status *tied_added(struct tied *t, uint32_t micro_batch) WARN_UNUSED;
status *tied_idle(struct tied *t) WARN_UNUSED;
status *tied_added_none(struct tied *t) WARN_UNUSED; /* beside zero_added_none */
/* After zero_reduce of z, the model's, without norm: the embedding's gradient becomes the sum of both uses. Collective
 * over dp and pp. */
status *tied_sum(struct tied *t, struct zero *z) WARN_UNUSED;
uint64_t tied_sent_bytes(const struct tied *t); /* zero_sent_bytes, without those of dp itself */
void tied_times(const struct tied *t, uint64_t *flight_ns, uint64_t *wait_ns); /* zero_times, the same */
void tied_memory(const struct tied *t, struct zero_memory *m); /* adds to it what is held for the head's gradient */

/* After the first stage's values have changed: give them to the last stage, which holds them whole at any ZeRO stage.
 * s: what m's are cut into (shards.h), or NULL. Collective over pp, and over the first stage's shards; NULL, or a model
 * without a tied weight: nothing to do. */
status *tied_share(struct model *m, struct shards *s, struct comm *pp) WARN_UNUSED;

#endif
