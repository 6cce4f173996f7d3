/* balance: how a step's tokens spread over the routed experts: its metrics, and the biases that follow them (Wang et
 * al. 2024, arXiv:2408.15664: bias[e] += rate * sign(mean load - load of e); loads are of all tokens of the step, the
 * losses' own and no references'). */
#ifndef TESSERA_TRAINER_BALANCE_H
#define TESSERA_TRAINER_BALANCE_H

#include "trainer/model/model.h"
#include "trainer/parallel/zero.h"

struct balance;
struct load_metrics {
    double most, least; /* the largest and the smallest load of an expert of any layer, over its layer's mean */
    double loss;        /* balance loss, mean over micro-batches and layers with experts */
};

/* Let m's training passes be watched, in steps of at most `most` micro-batches; the balance loss has its coefficient
 * over (these micro-batches and the layers with experts). *out NULL: the model has no experts. m is borrowed. */
status *balance_open(struct model *m, int64_t layers, uint32_t most, struct balance **out) WARN_UNUSED;
void balance_close(struct balance *b); /* NULL is fine */
/* Before the passes of a step. */
void balance_begin(struct balance *b);
/* When all passes of a step are queued: so is, on a device, the copy of what they see, for which balance_finish waits.
 */
status *balance_fetch(struct balance *b) WARN_UNUSED;
/* After that and the update of a step of K micro-batches: metrics, the same on all ranks, and biases. data: the ranks
 * with other micro-batches; pp NULL: one stage. `fence` is called before a bias is overwritten. Collective over both.
 */
status *balance_finish(struct balance *b, struct zero *z, uint32_t k, struct comm *data, struct comm *pp,
                       status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg,
                       struct load_metrics *out) WARN_UNUSED;

#endif
