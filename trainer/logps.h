/* logps: log-probabilities of a pack's tokens and their statistics where the host reads them. On the
 * CPU they are where passes have made them; on a device they are copied to room of the host's. Losses of training are
 * made on the device: log-probabilities stay there, and the host fetches sums of sequences when the step is queued. */
#ifndef TESSERA_TRAINER_LOGPS_H
#define TESSERA_TRAINER_LOGPS_H

#include "trainer/ops/ops.h"
#include "trainer/ops/pref.h"

struct batch_counts;
struct phase;
struct trainer;

/* Until the next call of any of these. */
struct logps {
    const float *logp;
    struct logprob_stats tok; /* of NULLs if they were not asked for */
};

/* Of sums that stay on the device, one after another's pass: [slots][segments]. */
struct kept_sums {
    struct sequence_sums *there, *seen; /* seen: of the host, once they have been fetched */
    uint32_t used, *micro_batch;        /* [slots]: whose each is */
};

/* Of a device; else all zero. */
struct logps_room {
    float *host; /* [6][most tokens of a pack], for logps_get and logps_put */
    int64_t most;
    uint32_t slots; /* passes of a step; 0: this rank has no losses of its own to make */
    int32_t segments;
    struct kept_sums step, live; /* of the model that trains; of a live reference */
    int32_t *about, *about_host; /* what kernels read of a pack (struct loss_work) */
    double *ref;                 /* [segments] there */
};

/* Room for the largest pack; t's data, compute and zero are open. */
status *logps_open(struct trainer *t) WARN_UNUSED;
void logps_close(struct trainer *t);
/* tok may be NULL. On a device it waits for all that is queued. */
status *logps_get(struct trainer *t, const struct tensor *logp, const struct logprob_stats *tok,
                  struct logps *out) WARN_UNUSED;
/* Where the host writes dlogp[N] of what logps_get gave, and then sends it to where passes read it. */
float *logps_dlogp(struct trainer *t, const struct tensor *logp);
status *logps_put(struct trainer *t, struct tensor *logp) WARN_UNUSED;
/* Whether losses can be made where log-probabilities are, so that nobody waits for these. */
bool logps_stay(const struct trainer *t);
/* The loss of micro-batch k, whose pack this is, is made on the device: dlogp is queued, sums are kept. ref: NULL, or
 * the host's; without it those of a live reference that were kept, if `live`. */
status *logps_loss(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts,
                   struct tensor *logp, const struct logprob_stats *tok, const double *ref, bool live) WARN_UNUSED;
/* The live reference's sums of it, kept. */
status *logps_live(struct trainer *t, struct phase *p, uint32_t k, const struct tensor *logp) WARN_UNUSED;
/* Has what was kept fetched (compute_fetch). */
status *logps_fetch(struct trainer *t) WARN_UNUSED;

#endif
