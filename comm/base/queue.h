/* queue: a bounded FIFO of pointers between threads. queue_close wakes everyone; what is in it can still be taken. */
#ifndef TESSERA_COMM_BASE_QUEUE_H
#define TESSERA_COMM_BASE_QUEUE_H

#include "comm/base/status.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

struct queue {
    void **slot;
    size_t cap;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t not_empty, not_full;
        size_t head, count;
        bool closed;
    } synced;
};

/* Room for cap items, at least 1. queue_fini frees the slots, not the items; also after a failed queue_init. */
status *queue_init(struct queue *q, size_t cap) WARN_UNUSED;
void queue_fini(struct queue *q);
bool queue_put(struct queue *q, void *item);     /* waits for room; false: closed, item not taken */
bool queue_try_put(struct queue *q, void *item); /* false: full or closed */
bool queue_get(struct queue *q, void **item);    /* waits; false: closed and empty */
bool queue_try_get(struct queue *q, void **item);
void queue_close(struct queue *q);

#endif
