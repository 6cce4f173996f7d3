/* kv_cache: see kv_cache.h. */
#include "trainer/rollout/kv_cache.h"

#include "comm/base/mem.h"
#include "trainer/ops/compute.h"

#include <string.h>

static bool is_here(const struct params *here, int32_t layer)
{
    for (int chunk = 0; here && chunk < params_chunks(here); chunk++)
        if (params_hold(here, chunk, layer + 1))
            return true;
    return !here;
}

status *kv_caches_init(struct kv_caches *c, const struct kv_shape *shape, const struct params *here, int32_t segments,
                       int32_t cap)
{
    size_t floats, all, layers = (size_t)shape->layers, held = 0, at = 0;
    for (int32_t i = 0; i < shape->layers; i++)
        held += is_here(here, i);
    bool over = __builtin_mul_overflow((size_t)segments * (size_t)cap,
                                       (size_t)shape->kv_heads * (size_t)shape->head_dim, &floats) ||
                __builtin_mul_overflow(floats, 2 * held * sizeof(float), &all);
    *c = (struct kv_caches){ .layers = shape->layers, .segments = segments, .compute = here ? here->compute : NULL };
    void *block = NULL;
    c->layer = mem_calloc(layers, sizeof *c->layer);
    int32_t *len = mem_calloc(layers * (size_t)segments, sizeof *len);
    if (!over && held)
        status_free(compute_alloc(c->compute, all, &block));
    c->block = block;
    if (!c->layer || !len || (held && !c->block)) {
        mem_free(len);
        compute_free(c->compute, c->block, c->block ? all : 0);
        mem_free(c->layer);
        *c = (struct kv_caches){ 0 };
        return ERR(NO_MEMORY, "a cache of %d sequences of %d tokens, %zu layers of 2 x %d x %d floats a token",
                   segments, cap, held, shape->kv_heads, shape->head_dim);
    }
    c->block_bytes = c->block ? all : 0;
    for (size_t i = 0; i < layers; i++) {
        bool own = is_here(here, (int32_t)i);
        c->layer[i] = (struct kv_cache){ .segments = segments,
                                         .cap = cap,
                                         .kv_heads = shape->kv_heads,
                                         .head_dim = shape->head_dim,
                                         .k = own ? c->block + 2 * at * floats : NULL,
                                         .v = own ? c->block + (2 * at + 1) * floats : NULL,
                                         .len = len + i * (size_t)segments };
        at += own;
    }
    return NULL;
}

void kv_caches_fini(struct kv_caches *c)
{
    if (c->layer)
        mem_free(c->layer[0].len);
    mem_free(c->layer);
    compute_free(c->compute, c->block, c->block_bytes);
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
