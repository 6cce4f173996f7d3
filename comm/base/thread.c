#include "comm/base/thread.h"

#include "comm/base/mem.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static void *thread_main(void *p)
{
    struct thread *t = p;
    t->result = t->fn(t->arg);
    return NULL;
}

status *thread_start(struct thread *t, const char *name, status *(*fn)(void *), void *arg)
{
    *t = (struct thread){ .fn = fn, .arg = arg };
    snprintf(t->name, sizeof t->name, "%s", name);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&t->id, NULL, thread_main, t);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return ERR_SYS(rc, "start thread %s", t->name);
    pthread_setname_np(t->id, t->name);
    t->running = 1;
    return NULL;
}

status *thread_join(struct thread *t)
{
    if (!t->running)
        return NULL;
    pthread_join(t->id, NULL);
    t->running = 0;
    status *st = t->result;
    t->result = NULL;
    return st;
}

/* Who waits looks so often, some 10 us, before it sleeps: a sleeper takes longer than that to come back. */
enum { LOOKS = 400 };

struct workers {
    int threads;
    struct thread *thread;      /* threads - 1 of them */
    atomic_size_t next;         /* the next index to run */
    atomic_uint_fast64_t round; /* a new value starts a loop; these two change with the lock held */
    atomic_int busy;            /* threads in it, beside the caller */
    struct {
        pthread_mutex_t lock;
        pthread_cond_t start, done;
        bool open; /* there may be something left to run: who comes may join */
        bool quit;
        size_t n;
        void (*fn)(void *arg, size_t i);
        void *arg;
    } synced;
};

static void run_loop(struct workers *w, size_t n, void (*fn)(void *, size_t), void *arg)
{
    for (size_t i; (i = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed)) < n;)
        fn(arg, i);
}

static void look_again(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Wait for a loop that this thread was not in, and join it. False: the end. */
static bool join_loop(struct workers *w, uint64_t *seen)
{
    for (int i = 0; i < LOOKS && atomic_load_explicit(&w->round, memory_order_relaxed) == *seen; i++)
        look_again();
    pthread_mutex_lock(&w->synced.lock);
    while (!w->synced.quit && !(w->synced.open && atomic_load(&w->round) != *seen))
        pthread_cond_wait(&w->synced.start, &w->synced.lock);
    bool joined = !w->synced.quit;
    *seen = atomic_load(&w->round);
    atomic_fetch_add(&w->busy, joined);
    pthread_mutex_unlock(&w->synced.lock);
    return joined;
}

static status *worker_main(void *p)
{
    struct workers *w = p;
    uint64_t seen = 0;
    while (join_loop(w, &seen)) {
        run_loop(w, w->synced.n, w->synced.fn, w->synced.arg); /* they stay while somebody is in the loop */
        pthread_mutex_lock(&w->synced.lock);
        if (atomic_fetch_sub(&w->busy, 1) == 1)
            pthread_cond_signal(&w->synced.done);
        pthread_mutex_unlock(&w->synced.lock);
    }
    return NULL;
}

status *workers_open(int threads, struct workers **out)
{
    if (threads < 1)
        return ERR(INVALID, "a pool needs at least 1 thread, not %d", threads);
    struct workers *w = mem_calloc(1, sizeof *w);
    struct thread *t = mem_calloc((size_t)threads, sizeof *t);
    if (!w || !t) {
        mem_free(w);
        mem_free(t);
        return ERR(NO_MEMORY, "pool of %d threads", threads);
    }
    w->thread = t;
    w->threads = 1;
    pthread_mutex_init(&w->synced.lock, NULL);
    pthread_cond_init(&w->synced.start, NULL);
    pthread_cond_init(&w->synced.done, NULL);
    for (int i = 0; i < threads - 1; i++) {
        char name[16];
        snprintf(name, sizeof name, "op-%d", i + 1);
        status *st = thread_start(&t[i], name, worker_main, w);
        if (st) {
            workers_close(w);
            return st;
        }
        w->threads++;
    }
    *out = w;
    return NULL;
}

void workers_close(struct workers *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->synced.lock);
    w->synced.quit = true;
    pthread_cond_broadcast(&w->synced.start);
    pthread_mutex_unlock(&w->synced.lock);
    for (int i = 0; i < w->threads - 1; i++)
        status_free(thread_join(&w->thread[i]));
    pthread_mutex_destroy(&w->synced.lock);
    pthread_cond_destroy(&w->synced.start);
    pthread_cond_destroy(&w->synced.done);
    mem_free(w->thread);
    mem_free(w);
}

int workers_count(const struct workers *w)
{
    return w ? w->threads : 1;
}

void workers_for(struct workers *w, size_t n, void (*fn)(void *arg, size_t i), void *arg)
{
    if (!w || w->threads == 1 || n <= 1) {
        for (size_t i = 0; i < n; i++)
            fn(arg, i);
        return;
    }
    pthread_mutex_lock(&w->synced.lock);
    atomic_store_explicit(&w->next, 0, memory_order_relaxed);
    w->synced.n = n;
    w->synced.fn = fn;
    w->synced.arg = arg;
    w->synced.open = true;
    atomic_fetch_add(&w->round, 1);
    pthread_cond_broadcast(&w->synced.start);
    pthread_mutex_unlock(&w->synced.lock);
    run_loop(w, n, fn, arg);
    /* Nobody waits for a thread that has not come yet. */
    pthread_mutex_lock(&w->synced.lock);
    w->synced.open = false;
    pthread_mutex_unlock(&w->synced.lock);
    for (int i = 0; i < LOOKS && atomic_load(&w->busy); i++)
        look_again();
    pthread_mutex_lock(&w->synced.lock);
    while (atomic_load(&w->busy))
        pthread_cond_wait(&w->synced.done, &w->synced.lock);
    pthread_mutex_unlock(&w->synced.lock);
}
