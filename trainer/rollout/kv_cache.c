/* kv_cache: see kv_cache.h. */
#include "trainer/rollout/kv_cache.h"

#include "comm/base/mem.h"

#include <string.h>

status *kv_caches_init(struct kv_caches *c, const struct kv_shape *shape, int32_t segments, int32_t cap)
{
    size_t floats, all, layers = (size_t)shape->layers;
    bool over = __builtin_mul_overflow((size_t)segments * (size_t)cap,
                                       (size_t)shape->kv_heads * (size_t)shape->head_dim, &floats) ||
                __builtin_mul_overflow(floats, 2 * layers * sizeof(float), &all);
    *c = (struct kv_caches){ .layers = shape->layers, .segments = segments };
    c->layer = mem_calloc(layers, sizeof *c->layer);
    int32_t *len = mem_calloc(layers * (size_t)segments, sizeof *len);
    c->block = over ? NULL : mem_block(all, 4096);
    if (!c->layer || !len || !c->block) {
        mem_free(len);
        mem_block_free(c->block, c->block ? all : 0);
        mem_free(c->layer);
        *c = (struct kv_caches){ 0 };
        return ERR(NO_MEMORY, "a cache of %d sequences of %d tokens, %d layers of 2 x %d x %d floats a token", segments,
                   cap, shape->layers, shape->kv_heads, shape->head_dim);
    }
    c->block_bytes = all;
    for (size_t i = 0; i < layers; i++)
        c->layer[i] = (struct kv_cache){ segments,
                                         cap,
                                         shape->kv_heads,
                                         shape->head_dim,
                                         c->block + 2 * i * floats,
                                         c->block + (2 * i + 1) * floats,
                                         len + i * (size_t)segments };
    return NULL;
}

void kv_caches_fini(struct kv_caches *c)
{
    if (c->layer)
        mem_free(c->layer[0].len);
    mem_free(c->layer);
    mem_block_free(c->block, c->block_bytes);
    *c = (struct kv_caches){ 0 };
}

void kv_caches_reset(struct kv_caches *c, int32_t segments)
{
    CHECK(segments <= c->segments, "%d sequences for a cache of %d", segments, c->segments);
    for (int32_t i = 0; i < c->layers; i++) {
        c->layer[i].segments = segments;
        memset(c->layer[i].len, 0, (size_t)segments * sizeof(int32_t));
    }
}
