#include "comm/base/queue.h"

#include "comm/base/mem.h"

status *queue_init(struct queue *q, size_t cap)
{
    *q = (struct queue){ 0 };
    if (!cap)
        return ERR(INVALID, "a queue of 0 slots");
    *q = (struct queue){ .cap = cap, .slot = mem_array(NULL, cap, sizeof *q->slot) };
    if (!q->slot)
        return ERR(NO_MEMORY, "queue of %zu slots", cap);
    pthread_mutex_init(&q->synced.lock, NULL);
    pthread_cond_init(&q->synced.not_empty, NULL);
    pthread_cond_init(&q->synced.not_full, NULL);
    return NULL;
}

void queue_fini(struct queue *q)
{
    if (!q->slot)
        return;
    mem_free(q->slot);
    q->slot = NULL;
    pthread_mutex_destroy(&q->synced.lock);
    pthread_cond_destroy(&q->synced.not_empty);
    pthread_cond_destroy(&q->synced.not_full);
}

static bool put(struct queue *q, void *item, bool wait)
{
    pthread_mutex_lock(&q->synced.lock);
    while (wait && q->synced.count == q->cap && !q->synced.closed)
        pthread_cond_wait(&q->synced.not_full, &q->synced.lock);
    bool ok = q->synced.count < q->cap && !q->synced.closed;
    if (ok) {
        q->slot[(q->synced.head + q->synced.count++) % q->cap] = item;
        pthread_cond_signal(&q->synced.not_empty);
    }
    pthread_mutex_unlock(&q->synced.lock);
    return ok;
}

static bool get(struct queue *q, void **item, bool wait)
{
    pthread_mutex_lock(&q->synced.lock);
    while (wait && !q->synced.count && !q->synced.closed)
        pthread_cond_wait(&q->synced.not_empty, &q->synced.lock);
    bool ok = q->synced.count > 0;
    if (ok) {
        *item = q->slot[q->synced.head];
        q->synced.head = (q->synced.head + 1) % q->cap;
        q->synced.count--;
        pthread_cond_signal(&q->synced.not_full);
    }
    pthread_mutex_unlock(&q->synced.lock);
    return ok;
}

bool queue_put(struct queue *q, void *item)
{
    return put(q, item, true);
}

bool queue_try_put(struct queue *q, void *item)
{
    return put(q, item, false);
}

bool queue_get(struct queue *q, void **item)
{
    return get(q, item, true);
}

bool queue_try_get(struct queue *q, void **item)
{
    return get(q, item, false);
}

void queue_close(struct queue *q)
{
    pthread_mutex_lock(&q->synced.lock);
    q->synced.closed = true;
    pthread_cond_broadcast(&q->synced.not_empty);
    pthread_cond_broadcast(&q->synced.not_full);
    pthread_mutex_unlock(&q->synced.lock);
}
