/* experts: expert parallelism: experts lie on the ranks of ep, each rank's tokens of the step go to them and back
 * (ops/dispatch.h; Lepikhin et al. 2020, arXiv:2006.16668).
 *
 * Micro-batches are dealt to dp x ep ranks. Parameters that all tokens use are replicated over these, experts over dp
 * alone. So the block of parameters (model.h) has two parts, each of which has its own ZeRO: `dense` at its front, and
 * the experts behind. A pass is made by all ranks of ep together, each with its micro-batch or none: gradients of
 * experts are of a pass, not of a micro-batch, and are added in order of passes and dp ranks.
 *
 * With ZeRO 2 and 3 a replica's shards (zero.h) are of dp x ep; of these, the ranks with the same experts cut them. A
 * block of the model has a window in each of the two ZeROs, gathered and collected together (shards_join). As ranks of
 * all replicas exchange tokens and experts, all make as many passes, and in each of them all have gradients of experts,
 * whether or not they have a micro-batch. */
#ifndef TESSERA_TRAINER_PARALLEL_EXPERTS_H
#define TESSERA_TRAINER_PARALLEL_EXPERTS_H

#include "trainer/parallel/owners.h"
#include "trainer/parallel/shards.h"
#include "trainer/parallel/treesum.h"
#include "trainer/parallel/zero.h"

struct experts {
    struct params dense, own;         /* views of the model's: what is not theirs is away there */
    struct params ref_dense, ref_own; /* the same of a live reference's, if that is cut or rounded */
    struct shards *ref_shards;        /* of ref_own; NULL: none, as zero */
    struct zero *zero;                /* of own; NULL: nothing to train, cut or round */
    struct comm *dp, *ep, *pp;        /* borrowed; dp: ranks with the same experts; pp NULL: one stage */
    struct owners *owners;            /* of own's matrices; NULL: none is Muon's */
    struct sum_plan plan;             /* sums of squares of gradients: `dense`'s, [ep] of own's, [pp] of all own's */
    uint32_t norm_dense, norm_ep, norm_pp, norm_all;
    int over_ep, over_pp;      /* phases */
    bool cut;                  /* ZeRO 2 and 3 */
    uint32_t passes;           /* of the step */
    uint32_t pass[CHUNKS_MAX]; /* cut: done, of each chunk of the model */
};

/* After the parameters have memory; before the ZeRO of `dense`. o: of that. Collective over dp, ep, o->tp and o->pp. */
status *experts_open(const struct zero_options *o, struct params *p, struct comm *dp, struct comm *ep,
                     struct experts **out) WARN_UNUSED;
void experts_close(struct experts *e); /* NULL is fine; collective */
/* The live reference's views and the shards of its experts; o: of those of ref_dense, which the caller opens.
 * Collective over dp and ep. */
status *experts_open_reference(struct experts *e, const struct shards_options *o, struct params *ref) WARN_UNUSED;
/* Muon (owners.h) of those that are param.muon; all: the ranks of dp and tp, borrowed. Collective over `all`. */
status *experts_open_muon(struct experts *e, struct comm *tp, struct comm *all, struct workers *w) WARN_UNUSED;
/* A step in which every rank makes so many passes; before the first one. */
void experts_begin(struct experts *e, uint32_t passes);
/* A pass of a chunk of the model is done, with a micro-batch or without. ZeRO 2 and 3: collective over the shards. */
status *experts_added(struct experts *e, int chunk) WARN_UNUSED;
/* Sum gradients; *squares, zero_squares of `dense`, becomes that of the whole model. Collective over dp, ep, tp and pp.
 */
status *experts_reduce(struct experts *e, const double **squares) WARN_UNUSED;
/* zero_update of the experts. Collective over dp. */
status *experts_update(struct experts *e, const struct adamw *a, const struct muon *muon,
                       status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg) WARN_UNUSED;
/* The ZeRO that trains parameter *p of the model, `zero` being that of `dense`; *p: the parameter as it knows it. e
 * NULL: no expert parallelism. */
struct zero *experts_zero(const struct experts *e, struct zero *zero, const struct params *ps, const struct param **p);
/* The same of the live reference's shards, `dense` being those of ref_dense, or of all. */
struct shards *experts_ref_shards(const struct experts *e, struct shards *dense, const struct params *ps,
                                  const struct param **p);

#endif
