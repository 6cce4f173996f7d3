/* logps: log-probabilities of a pack's tokens and their statistics where the host reads them, and their gradient where
 * it writes it. On the CPU they are where passes have made them; on a device they are copied to room of the host's. */
#ifndef TESSERA_TRAINER_LOGPS_H
#define TESSERA_TRAINER_LOGPS_H

#include "trainer/ops/ops.h"

struct trainer;

/* Until the next call of any of these. */
struct logps {
    const float *logp;
    struct logprob_stats tok; /* of NULLs if they were not asked for */
    float *dlogp;             /* NULL: none is wanted */
};

/* Of a device; else all zero. */
struct logps_room {
    float *host; /* [6][most tokens of a pack]: five to be read, dlogp */
    int64_t most;
    float *kept; /* [slots][5][most], in the device's memory; NULL: no algorithm can do with it */
    uint32_t slots, used, *micro_batch; /* used: of the step so far */
};

/* Room for the largest pack; t's data, compute and zero are open. */
status *logps_open(struct trainer *t) WARN_UNUSED;
void logps_close(struct trainer *t);
/* tok may be NULL. On a device it waits for all that is queued. */
status *logps_get(struct trainer *t, const struct tensor *logp, const struct logprob_stats *tok,
                  struct logps *out) WARN_UNUSED;
/* dlogp, which the host has written, becomes the gradient of logp. */
status *logps_put(struct trainer *t, const struct logps *x, struct tensor *logp) WARN_UNUSED;

/* On a device: what micro-batch k has made stays in a slot until it is read; nobody waits. Slots are taken from 0 on.
 */
status *logps_keep(struct trainer *t, uint32_t slot, uint32_t k, const struct tensor *logp,
                   const struct logprob_stats *tok) WARN_UNUSED;
/* Room to write dlogp of what has not been read: the values are of no meaning. */
struct logps logps_unread(const struct trainer *t, const struct tensor *logp);
uint32_t logps_kept_of(const struct trainer *t, uint32_t slot); /* its micro-batch */
/* Of a pack of n tokens. Waits. */
status *logps_get_kept(struct trainer *t, uint32_t slot, int64_t n, struct logps *out) WARN_UNUSED;

#endif
