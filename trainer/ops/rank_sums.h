/* rank_sums: sums over ranks in their order (comm/ordered.h) of floats where kernels compute: on the host the host's
 * own, on a device by its kernels, in the order of its stream. */
#ifndef TESSERA_TRAINER_OPS_RANK_SUMS_H
#define TESSERA_TRAINER_OPS_RANK_SUMS_H

#include "comm/ordered.h"
#include "trainer/ops/compute.h"

/* What the calls of ordered.h take for memory of c. */
struct ordered_at rank_sums_at(struct compute *c);

#endif
