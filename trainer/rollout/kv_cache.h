/* kv_cache: memory for the keys and values of a batch of growing sequences, all layers that are here in one block. */
#ifndef TESSERA_TRAINER_ROLLOUT_KV_CACHE_H
#define TESSERA_TRAINER_ROLLOUT_KV_CACHE_H

#include "trainer/model/model.h"

struct kv_caches {
    struct kv_cache *layer; /* [layers]: model_input.cache; of those of other pipeline stages without memory */
    int32_t layers, segments;
    float *block;
    size_t block_bytes;
    struct compute *compute; /* whose memory that is; NULL: the host's. Borrowed */
};

/* Room for `cap` tokens of each of `segments` sequences, in the layers that `here` holds (NULL: in all; a layer i is
 * unit i + 1), in the memory that parameters are in. NO_MEMORY names the sizes. */
status *kv_caches_init(struct kv_caches *c, const struct kv_shape *shape, const struct params *here, int32_t segments,
                       int32_t cap) WARN_UNUSED;
void kv_caches_fini(struct kv_caches *c); /* also of {0} */
/* Forget all tokens; the first `segments` sequences are in use from now on (at most as many as there is room for). */
void kv_caches_reset(struct kv_caches *c, int32_t segments);

#endif
