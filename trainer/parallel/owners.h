/* owners: Muon's step of matrices of which ZeRO leaves a rank runs, and tensor parallelism a part: whole matrices are
 * owned by one rank each; a tensor of experts [E, M, K] is E of them.
 *
 * A rank keeps the momentum of its runs (zero_moments.m). What the momentum makes of them goes to the owner of each
 * matrix, who puts it together and makes it orthogonal; the runs come back, and each rank changes its own weights,
 * which zero_update then gathers. Owners are chosen by the work of their matrices, largest first, to the rank with the
 * least: a pure function of the model and the number of ranks; each does one matrix at a time, so it has room for one.
 * Replicas have the same momentum: an owner takes it from its own. What it computes depends on the matrix alone, so
 * bits depend on no dp, dp_shard, ZeRO stage or pp. */
#ifndef TESSERA_TRAINER_PARALLEL_OWNERS_H
#define TESSERA_TRAINER_PARALLEL_OWNERS_H

#include "trainer/optim/muon.h"
#include "trainer/parallel/zero.h"

struct owners;

/* For the parameters of z that are Muon's (param.muon). dp and tp are those of z, tp NULL: one rank; all: the ranks of
 * both, tp fastest (dp itself where tp is NULL). Collective over `all`; all is borrowed. All memory is taken here. */
status *owners_open(struct params *p, struct zero *z, struct comm *dp, struct comm *tp, struct comm *all,
                    struct workers *w, struct owners **out) WARN_UNUSED;
void owners_close(struct owners *o); /* NULL is fine */
/* Between zero_squares and zero_update. fence as there; its error is returned after the exchanges. Collective. */
status *owners_step(struct owners *o, const struct muon *muon,
                    status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg) WARN_UNUSED;
/* Bytes of the room for a matrix; bytes given to ranks of `all`, where that is not dp. */
uint64_t owners_bytes(const struct owners *o);

#endif
