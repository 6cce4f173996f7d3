/* owners: Muon's step of matrices whose runs are ZeRO's: whole tensors are owned by one rank each.
 *
 * A rank keeps the momentum of its runs (zero_moments.m). What the momentum makes of them goes to the owner of each
 * matrix, who makes it orthogonal; its runs come back, and each rank changes its own weights, which zero_update then
 * gathers. Owners are chosen by the work of their matrices, largest first, to the rank with the least: a pure function
 * of the model and dp. What an owner computes depends on the matrix alone, so bits depend on no dp. */
#ifndef TESSERA_TRAINER_PARALLEL_OWNERS_H
#define TESSERA_TRAINER_PARALLEL_OWNERS_H

#include "trainer/optim/muon.h"
#include "trainer/parallel/zero.h"

struct owners;

/* For the parameters of z that are Muon's (param.muon); stage 1. Collective over dp; all is borrowed. All memory is
 * taken here. */
status *owners_open(struct params *p, struct zero_moments z, struct comm *dp, struct workers *w,
                    struct owners **out) WARN_UNUSED;
void owners_close(struct owners *o); /* NULL is fine */
/* Between zero_reduce and zero_update. fence as there; its error is returned after the exchanges. Collective. */
status *owners_step(struct owners *o, const struct muon *muon,
                    status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg) WARN_UNUSED;

#endif
