/* progress: see progress.h. A backend over another communicator, `below`.
 *
 * Invariants:
 * - A request under way is in the queue, or it is `testing` (the thread is in its comm_test), or a waiter has taken it
 *   back, or it is done. In the first two cases it is the thread's, in the others its caller's. `wanted` and who has it
 *   change with the lock held; the lock is not held while messages move.
 * - Objects of requests belong to one communicator, and so to the one thread at a time that uses it; the thread never
 *   frees or takes one. They come POOL at a time: how many are in flight at once depends on timing, and a steady step
 *   shall allocate nothing. */
#include "comm/progress.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <pthread.h>
#include <stdatomic.h>

enum { POOL = 64, PAUSE_US = 200 /* as comm_wait's */ };

/* A request under way. */
struct driven {
    struct driven *next; /* in the queue; or among the idle ones */
    struct link *of;
    struct comm_req req; /* below */
    void (*then)(void *arg);
    void *arg;
    bool wanted; /* a waiter will have it back */
    status *st;
    uint64_t ended_ns;
    atomic_bool done; /* then st and ended_ns are the caller's */
};

struct pool {
    struct pool *next;
    struct driven q[POOL];
};

/* comm.impl */
struct link {
    struct progress *p;
    struct comm *below;
    struct pool *pools;
    struct driven *idle;
};

struct progress {
    struct thread thread;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t start, tested; /* something is queued, or the end; `testing` is through */
        struct driven *first, *last;
        size_t queued;
        struct driven *testing;
        bool fresh; /* something was queued since the thread has looked */
        bool quit;
    } synced;
};

static struct link *link_of(const struct comm *c)
{
    return c->impl;
}

/* The communicator below, for a call of c. */
static struct comm *below(const struct comm *c)
{
    struct comm *b = link_of(c)->below;
    b->stream = c->stream;
    return b;
}

/* ---- the queue: with the lock held ---- */

static void append(struct progress *p, struct driven *q)
{
    q->next = NULL;
    if (p->synced.last)
        p->synced.last->next = q;
    else
        p->synced.first = q;
    p->synced.last = q;
    p->synced.queued++;
}

static void take_out(struct progress *p, const struct driven *q)
{
    struct driven *before = NULL;
    for (struct driven *at = p->synced.first; at; before = at, at = at->next) {
        if (at != q)
            continue;
        if (before)
            before->next = q->next;
        else
            p->synced.first = q->next;
        if (p->synced.last == q)
            p->synced.last = before;
        p->synced.queued--;
        return;
    }
}

/* ---- the thread ---- */

/* What comes after a request that is done, for who has it. */
static void go_on(struct driven *q, status *st)
{
    q->st = st;
    q->ended_ns = clock_ns();
    if (!st && q->then)
        q->then(q->arg);
}

/* Is it done? */
static bool drive(struct driven *q)
{
    bool done = false;
    status *st = comm_test(&q->req, &done);
    if (st || done)
        go_on(q, st);
    return st || done;
}

/* Test what is queued now, each once. False: nothing was done. Called and left with the lock held. */
static bool round_through(struct progress *p)
{
    bool any = false;
    for (size_t left = p->synced.queued; left && p->synced.first; left--) {
        struct driven *q = p->synced.first;
        take_out(p, q);
        p->synced.testing = q;
        pthread_mutex_unlock(&p->synced.lock);
        bool done = drive(q);
        pthread_mutex_lock(&p->synced.lock);
        p->synced.testing = NULL;
        if (!done && !q->wanted)
            append(p, q);
        any |= done;
        if (done) /* the last that the thread does with it */
            atomic_store_explicit(&q->done, true, memory_order_release);
        pthread_cond_broadcast(&p->synced.tested);
    }
    return any;
}

static status *progress_main(void *arg)
{
    struct progress *p = arg;
    struct backoff pause = { .max_us = PAUSE_US };
    pthread_mutex_lock(&p->synced.lock);
    while (!p->synced.quit) {
        if (!p->synced.first) {
            pthread_cond_wait(&p->synced.start, &p->synced.lock);
            continue;
        }
        bool fresh = p->synced.fresh;
        p->synced.fresh = false;
        if (round_through(p) || fresh)
            pause.tries = 0;
        if (!p->synced.first)
            continue;
        pthread_mutex_unlock(&p->synced.lock);
        backoff_wait(&pause);
        pthread_mutex_lock(&p->synced.lock);
    }
    pthread_mutex_unlock(&p->synced.lock);
    return NULL;
}

status *progress_open(struct progress **out)
{
    struct progress *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "thread for messages");
    pthread_mutex_init(&p->synced.lock, NULL);
    pthread_cond_init(&p->synced.start, NULL);
    pthread_cond_init(&p->synced.tested, NULL);
    status *st = thread_start(&p->thread, "comm", progress_main, p);
    if (st) {
        progress_close(p);
        return st;
    }
    *out = p;
    return NULL;
}

void progress_close(struct progress *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->synced.lock);
    CHECK(!p->synced.first && !p->synced.testing, "a communicator that is driven is open still");
    p->synced.quit = true;
    pthread_cond_signal(&p->synced.start);
    pthread_mutex_unlock(&p->synced.lock);
    status_free(thread_join(&p->thread));
    pthread_mutex_destroy(&p->synced.lock);
    pthread_cond_destroy(&p->synced.start);
    pthread_cond_destroy(&p->synced.tested);
    mem_free(p);
}

/* ---- requests ---- */

static status *take_idle(struct link *l, struct driven **out)
{
    if (!l->idle) {
        struct pool *more = mem_calloc(1, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "%d requests", POOL);
        more->next = l->pools;
        l->pools = more;
        for (int i = 0; i < POOL; i++) {
            more->q[i].of = l;
            more->q[i].next = l->idle;
            l->idle = &more->q[i];
        }
    }
    struct driven *q = l->idle;
    l->idle = q->next;
    q->wanted = false;
    q->st = NULL;
    atomic_store_explicit(&q->done, false, memory_order_relaxed);
    *out = q;
    return NULL;
}

static void give_idle(struct driven *q)
{
    q->next = q->of->idle;
    q->of->idle = q;
}

/* What the call below that filled q->req has started (or its error) is the thread's. */
static status *hand_over(struct driven *q, const struct comm *b, status *st, struct comm_req *req)
{
    struct progress *p = q->of->p;
    if (st || !q->req.impl) {
        give_idle(q);
        return st;
    }
    q->req.ops = b->ops;
    q->then = req->then;
    q->arg = req->arg;
    req->then = NULL;
    req->impl = q;
    pthread_mutex_lock(&p->synced.lock);
    append(p, q);
    p->synced.fresh = true;
    pthread_cond_signal(&p->synced.start);
    pthread_mutex_unlock(&p->synced.lock);
    return NULL;
}

/* The request is its caller's again, done or not. */
static void take_back(struct driven *q)
{
    struct progress *p = q->of->p;
    pthread_mutex_lock(&p->synced.lock);
    q->wanted = true;
    while (p->synced.testing == q)
        pthread_cond_wait(&p->synced.tested, &p->synced.lock);
    take_out(p, q);
    pthread_mutex_unlock(&p->synced.lock);
}

static status *end(struct driven *q, struct comm_req *req)
{
    status *st = q->st;
    q->st = NULL;
    req->ended_ns = q->ended_ns;
    give_idle(q);
    return st;
}

static status *progress_test(struct comm_req *req, bool *done)
{
    struct driven *q = req->impl;
    *done = atomic_load_explicit(&q->done, memory_order_acquire);
    return *done ? end(q, req) : NULL;
}

static status *progress_wait(struct comm_req *req)
{
    struct driven *q = req->impl;
    if (!atomic_load_explicit(&q->done, memory_order_acquire))
        take_back(q);
    if (!atomic_load_explicit(&q->done, memory_order_acquire))
        go_on(q, comm_wait(&q->req));
    return end(q, req);
}

static status *progress_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    struct comm *b = below(c);
    struct driven *q;
    TRY(take_idle(link_of(c), &q));
    q->req = (struct comm_req){ 0 };
    return hand_over(q, b, b->ops->iexchange(b, x, n, &q->req), req);
}

static status *progress_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                                   enum comm_op op, struct comm_req *req)
{
    struct comm *b = below(c);
    struct driven *q;
    TRY(take_idle(link_of(c), &q));
    q->req = (struct comm_req){ 0 };
    return hand_over(q, b, b->ops->iallreduce(b, in, out, count, t, op, &q->req), req);
}

/* ---- communicators ---- */

static const struct comm_ops progress_ops;

/* Fill c for b, which becomes c's. */
static status *adopt(struct progress *p, struct comm *b, struct comm *c)
{
    struct link *l = mem_calloc(1, sizeof *l);
    if (!l)
        return ERR(NO_MEMORY, "communicator");
    *l = (struct link){ .p = p, .below = b };
    *c = *b;
    c->ops = &progress_ops;
    c->impl = l;
    return NULL;
}

status *progress_drive(struct progress *p, struct comm **c)
{
    if (!p || !*c || (*c)->size == 1)
        return NULL;
    if (!(*c)->ops->thread_multiple || (*c)->ops->over)
        return ERR(UNSUPPORTED, "a %s communicator cannot be driven by another thread", (*c)->ops->name);
    struct comm *driven = mem_calloc(1, sizeof *driven);
    status *st = driven ? adopt(p, *c, driven) : ERR(NO_MEMORY, "comm: handle");
    if (st) {
        mem_free(driven);
        return st;
    }
    *c = driven;
    return NULL;
}

/* What is under way still, after an error, stays with the communicator below. */
static void progress_end(struct comm *c)
{
    struct link *l = link_of(c);
    for (struct pool *pool = l->pools, *next; pool; pool = next) {
        next = pool->next;
        for (int i = 0; i < POOL; i++) {
            take_back(&pool->q[i]);
            status_free(pool->q[i].st);
        }
        mem_free(pool);
    }
    comm_close(l->below);
    mem_free(l);
}

/* What comm_dup or comm_split below has made becomes out. */
static status *adopt_child(const struct comm *c, status *st, struct comm *child, struct comm *out)
{
    if (!st && child)
        st = adopt(link_of(c)->p, child, out);
    if (st)
        comm_close(child);
    return st;
}

static status *progress_dup(struct comm *c, struct comm *out)
{
    struct comm *child = NULL;
    status *st = comm_dup(below(c), &child);
    return adopt_child(c, st, child, out);
}

static status *progress_split(struct comm *c, int color, int key, struct comm *out)
{
    struct comm *child = NULL;
    status *st = comm_split(below(c), color, key, &child);
    return adopt_child(c, st, child, out);
}

/* ---- collectives: below ---- */

static status *progress_barrier(struct comm *c)
{
    return below(c)->ops->barrier(below(c));
}

static status *progress_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    return below(c)->ops->bcast(below(c), buf, bytes, root);
}

static status *progress_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    return below(c)->ops->allreduce(below(c), buf, count, t, op);
}

static status *progress_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    return below(c)->ops->allgather(below(c), in, out, bytes);
}

static status *progress_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    return below(c)->ops->gatherv(below(c), in, bytes, out, counts, root);
}

static status *progress_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes,
                                 int root)
{
    return below(c)->ops->scatterv(below(c), in, counts, out, bytes, root);
}

static void progress_abort(struct comm *c, int code)
{
    comm_abort(below(c), code);
}

static const struct comm_ops progress_ops = {
    .name = "progress",
    .close = progress_end,
    .dup = progress_dup,
    .split = progress_split,
    .barrier = progress_barrier,
    .bcast = progress_bcast,
    .allreduce = progress_allreduce,
    .allgather = progress_allgather,
    .gatherv = progress_gatherv,
    .scatterv = progress_scatterv,
    .iallreduce = progress_iallreduce,
    .iexchange = progress_iexchange,
    .test = progress_test,
    .wait = progress_wait,
    .abort = progress_abort,
    .thread_multiple = true,
};
