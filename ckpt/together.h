/* together: one plan for all ranks. Descriptors go up the tree of nodes, each rank's part of the plan comes down; rank
 * 0 keeps all of it, for the metadata. A step's metadata is a plan too: a job that goes on from it on the same mesh,
 * with the same state, plans nothing. */
#ifndef TESSERA_CKPT_TOGETHER_H
#define TESSERA_CKPT_TOGETHER_H

#include "ckpt/metadata.h"
#include "ckpt/nodes.h"
#include "ckpt/state.h"

/* What rank 0 does with all descriptors before it plans, whose texts may grow and move, and with the plan. Tensors by
 * reference are settled there. */
struct plan_hooks {
    status *(*before)(void *arg, struct plan_desc *desc, uint64_t count, char **text, size_t *text_bytes);
    status *(*after)(void *arg, const struct plan *p);
    void *arg;
};
/* mine: why this rank cannot take part (taken), or NULL. irregular: as in plan_options. hooks: may be NULL. *out: the
 * whole plan on rank 0, elsewhere the rank's own part. Collective; the error is agreed. */
status *plan_together(const struct nodes *n, const tessera_state *s, status *mine, int irregular,
                      const struct plan_hooks *hooks, struct plan **out) WARN_UNUSED;

/* The plan that made this step, if this rank's state is the one that was saved: whole on rank 0, elsewhere the rank's
 * part. *out stays NULL where it cannot serve (another world or state, or the step does not say). Local; fails only
 * when memory is out. */
status *plan_of_step(const struct metadata *m, const tessera_state *s, int rank, int ranks,
                     struct plan **out) WARN_UNUSED;

#endif
