#include "comm/base/pool.h"

status *pool_init(struct pool *p, void *memory, size_t block_bytes, size_t count)
{
    *p = (struct pool){ 0 };
    if (!block_bytes)
        return ERR(INVALID, "a pool of blocks of 0 bytes");
    *p = (struct pool){ .memory = memory, .block_bytes = block_bytes, .count = count };
    TRY(queue_init(&p->free, count ? count : 1));
    for (size_t i = 0; i < count; i++)
        CHECK(queue_try_put(&p->free, p->memory + i * block_bytes));
    return NULL;
}

void pool_fini(struct pool *p)
{
    queue_fini(&p->free);
}

void *pool_get(struct pool *p)
{
    void *b = NULL;
    return queue_get(&p->free, &b) ? b : NULL;
}

void *pool_try_get(struct pool *p)
{
    void *b = NULL;
    return queue_try_get(&p->free, &b) ? b : NULL;
}

void pool_put(struct pool *p, void *block)
{
    size_t offset = (size_t)((unsigned char *)block - p->memory);
    CHECK(offset % p->block_bytes == 0 && offset / p->block_bytes < p->count, "block is not of this pool");
    queue_try_put(&p->free, block); /* cannot be full; a closed pool no longer hands out */
}

size_t pool_free_count(struct pool *p)
{
    pthread_mutex_lock(&p->free.synced.lock);
    size_t n = p->free.synced.count;
    pthread_mutex_unlock(&p->free.synced.lock);
    return n;
}

void pool_close(struct pool *p)
{
    queue_close(&p->free);
    void *b;
    while (queue_try_get(&p->free, &b)) /* a closed queue still hands out, a closed pool does not */
        ;
}
