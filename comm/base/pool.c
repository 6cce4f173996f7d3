#include "comm/base/pool.h"

#include "comm/base/mem.h"

status *pool_init(struct pool *p, void *memory, size_t block_bytes, size_t count)
{
    *p = (struct pool){ 0 };
    if (!block_bytes)
        return ERR(INVALID, "a pool of blocks of 0 bytes");
    void **slot = mem_array(NULL, count ? count : 1, sizeof *slot);
    if (!slot)
        return ERR(NO_MEMORY, "a pool of %zu blocks", count);
    *p = (struct pool){ .memory = memory, .block_bytes = block_bytes, .count = count };
    for (size_t i = 0; i < count; i++)
        slot[i] = p->memory + (count - 1 - i) * block_bytes;
    p->synced.free = slot;
    p->synced.frees = count;
    pthread_mutex_init(&p->synced.lock, NULL);
    pthread_cond_init(&p->synced.changed, NULL);
    return NULL;
}

void pool_fini(struct pool *p)
{
    if (!p->synced.free)
        return;
    pthread_cond_destroy(&p->synced.changed);
    pthread_mutex_destroy(&p->synced.lock);
    mem_free(p->synced.free);
    p->synced.free = NULL;
}

static void *get(struct pool *p, bool wait)
{
    pthread_mutex_lock(&p->synced.lock);
    while (wait && !p->synced.frees && !p->synced.closed)
        pthread_cond_wait(&p->synced.changed, &p->synced.lock);
    bool got = p->synced.frees && !p->synced.closed;
    void *block = got ? p->synced.free[--p->synced.frees] : NULL;
    pthread_mutex_unlock(&p->synced.lock);
    return block;
}

void *pool_get(struct pool *p)
{
    return get(p, true);
}

void *pool_try_get(struct pool *p)
{
    return get(p, false);
}

void pool_put(struct pool *p, void *block)
{
    size_t offset = (size_t)((unsigned char *)block - p->memory);
    CHECK(offset % p->block_bytes == 0 && offset / p->block_bytes < p->count, "block is not of this pool");
    pthread_mutex_lock(&p->synced.lock);
    CHECK(p->synced.frees < p->count, "block was given back twice");
    p->synced.free[p->synced.frees++] = block;
    pthread_cond_signal(&p->synced.changed);
    pthread_mutex_unlock(&p->synced.lock);
}

size_t pool_free_count(struct pool *p)
{
    pthread_mutex_lock(&p->synced.lock);
    size_t n = p->synced.frees;
    pthread_mutex_unlock(&p->synced.lock);
    return n;
}

void pool_close(struct pool *p)
{
    pthread_mutex_lock(&p->synced.lock);
    p->synced.closed = true;
    pthread_cond_broadcast(&p->synced.changed);
    pthread_mutex_unlock(&p->synced.lock);
}
