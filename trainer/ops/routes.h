/* routes: which experts tokens have taken, written down in one run and taken again in another. Meshes round
 * differently, and a router may then choose otherwise between experts of nearly the same score; with the routes of one
 * rank the losses and gradients of another mesh can be compared with its own.
 *
 * A micro-batch is known by its tokens, a pass by step, role and layer: packs do not depend on the mesh. A file is
 * "TSRROUT1", then for each micro-batch and layer, little-endian, u64 key, u64 n, n x u16 experts. */
#ifndef TESSERA_TRAINER_OPS_ROUTES_H
#define TESSERA_TRAINER_OPS_ROUTES_H

#include "trainer/ops/ops.h"

struct routes {
    bool replay;
    char *path;                /* of the file to be written */
    uint64_t step;             /* of what follows; the caller's to set */
    struct route_entry *entry; /* [cap], by key; a power of two */
    uint64_t count, cap;
    uint16_t *expert;
    uint64_t used, room;
};

/* "" is none: *out NULL. "record:PATH": to be written by routes_close. "replay:PATH": read here, INVALID or NOT_FOUND
 * if that cannot be. */
status *routes_open(const char *how, struct routes **out) WARN_UNUSED;
/* Write what was recorded. NULL is fine. */
status *routes_close(struct routes *r) WARN_UNUSED;
/* Of this step. role: of the model (policy, reference); content: of the micro-batch (model_input). */
uint64_t routes_key(const struct routes *r, uint32_t role, int64_t layer, uint64_t content);
/* Replay: expert[n][k] as they were recorded, of the tokens rank, rank + ranks, ... (pack.own; 0 and 1: all); of tokens
 * behind the last one experts 0 to k - 1. NOT_FOUND if they were not. */
status *routes_get(const struct routes *r, uint64_t key, int32_t *expert, int64_t n, int64_t k, int rank,
                   int ranks) WARN_UNUSED;
/* Record all of a micro-batch's; what was recorded under that key stays. */
status *routes_put(struct routes *r, uint64_t key, const int32_t *expert, int64_t n) WARN_UNUSED;

#endif
