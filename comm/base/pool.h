/* pool: equal blocks of memory under a byte cap; the count of free blocks is the ticket office. The block given back
 * last is handed out first, so that memory which is never needed is never touched. The memory is the caller's. */
#ifndef TESSERA_COMM_BASE_POOL_H
#define TESSERA_COMM_BASE_POOL_H

#include "comm/base/status.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

struct pool {
    unsigned char *memory; /* borrowed; count x block_bytes */
    size_t block_bytes, count;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        void **free; /* [count]; the last one is handed out next */
        size_t frees;
        bool closed;
    } synced;
};

/* Cut `memory` into `count` blocks. pool_fini: also after a failed pool_init. */
status *pool_init(struct pool *p, void *memory, size_t block_bytes, size_t count) WARN_UNUSED;
void pool_fini(struct pool *p);
void *pool_get(struct pool *p);     /* waits; NULL: closed */
void *pool_try_get(struct pool *p); /* NULL: none free now */
void pool_put(struct pool *p, void *block);
size_t pool_free_count(struct pool *p);
void pool_close(struct pool *p); /* wakes all that wait; from now on nobody gets a block */

#endif
