/* pool: equal blocks of memory under a byte cap; the count of free blocks is the ticket office. The memory is the
 * caller's. */
#ifndef TESSERA_COMM_BASE_POOL_H
#define TESSERA_COMM_BASE_POOL_H

#include "comm/base/queue.h"

struct pool {
    unsigned char *memory; /* borrowed; count x block_bytes */
    size_t block_bytes, count;
    struct queue free;
};

/* Cut `memory` into `count` blocks. */
status *pool_init(struct pool *p, void *memory, size_t block_bytes, size_t count) WARN_UNUSED;
void pool_fini(struct pool *p);
void *pool_get(struct pool *p);     /* waits; NULL: closed */
void *pool_try_get(struct pool *p); /* NULL: none free now */
void pool_put(struct pool *p, void *block);
size_t pool_free_count(struct pool *p);
void pool_close(struct pool *p); /* wakes all that wait; from now on nobody gets a block */

#endif
