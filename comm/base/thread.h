/* thread: named threads whose join returns their status, and a rank's own pool for parallel loops. */
#ifndef TESSERA_COMM_BASE_THREAD_H
#define TESSERA_COMM_BASE_THREAD_H

#include "comm/base/status.h"

#include <pthread.h>
#include <stddef.h>

struct thread {
    pthread_t id;
    status *(*fn)(void *);
    void *arg;
    status *result;
    char name[16];
    int running;
};

/* Start fn(arg) on a thread with that name (15 characters are kept). All signals are blocked in it. */
status *thread_start(struct thread *t, const char *name, status *(*fn)(void *), void *arg) WARN_UNUSED;
/* Wait for it and return what fn returned; NULL if it was never started. May be called once. */
status *thread_join(struct thread *t) WARN_UNUSED;

/* workers: `threads` - 1 waiting threads plus the caller. Which thread runs which index changes no bit of any result,
 * because a loop body writes only what its index owns. */
struct workers;
status *workers_open(int threads, struct workers **out) WARN_UNUSED;
void workers_close(struct workers *w);      /* NULL is fine */
int workers_count(const struct workers *w); /* 1 for NULL */
/* Run fn(arg, i) for i in [0, n), each once; returns when all are done. w may be NULL: runs here. Not reentrant.
 * Makes no allocation. */
void workers_for(struct workers *w, size_t n, void (*fn)(void *arg, size_t i), void *arg);

#endif
