/* comm_threads: see the header.
 *
 * One lock and one condition per job guard everything below `synced`. Invariants:
 *  (1) A collective is: publish own pointers in slot[rank], meet, read the others' slots, meet. Between the two
 *      meetings nobody writes what others read. A meeting is a counter with a generation.
 *  (2) A reduction in flight is an `inflight`, found by its sequence number; who arrives last computes all results,
 *      who tests last recycles it.
 *  (3) A message waits in its communicator's list until the other side is posted; who comes second copies, under
 *      the lock.
 *  (4) A group lives until its last rank has closed it.
 *
 * Objects are recycled, and a group starts with SPARE of each: how many are in flight at once depends on timing, and a
 * steady job shall allocate nothing, as over MPI. */
#include "tests/support/comm_threads.h"

#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SPARE = 128 };

struct job {
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        int broken; /* rank in the world that returned an error first; -1: none */
    } synced;
};

/* What a rank shows the others during a collective. */
struct slot {
    const void *in;
    const size_t *counts;
    size_t bytes;
    int color, key;
    struct group *child;
};

struct message { /* one half of a message that waits for the other */
    struct message *next;
    int src, dst, tag;
    bool send;
    void *buf;
    size_t bytes;
    struct request *owner;
};

struct inflight {
    struct inflight *next;
    uint64_t seq;
    int arrived, left; /* ranks that started it; ranks that have seen it done */
    size_t count;
    enum comm_type type;
    enum comm_op op;
    const void **in; /* [size] */
    void **out;      /* [size] */
};

struct request {
    struct request *next, *next_all;
    struct group *group;
    struct inflight *reduction; /* NULL: an exchange */
    size_t pending;             /* messages of an exchange not yet copied */
    bool mismatch;              /* a peer's message had another size */
};

struct group {
    struct job *job;
    int size, open; /* `open` ranks have not closed it */
    int waiting;
    uint64_t generation;
    struct slot *slot; /* [size] */
    struct message *first, *last, *free_messages;
    struct inflight *reductions, *free_reductions;
    struct request *free_requests, *all_requests;
};

struct rank { /* comm.impl */
    struct group *group;
    uint64_t reductions; /* started here */
    void *scratch;
    size_t scratch_bytes;
};

static struct group *group_of(const struct comm *c)
{
    return ((struct rank *)c->impl)->group;
}

static void lock(struct group *g)
{
    pthread_mutex_lock(&g->job->synced.lock);
}

static void unlock(struct group *g)
{
    pthread_mutex_unlock(&g->job->synced.lock);
}

static void wake(struct group *g)
{
    pthread_cond_broadcast(&g->job->synced.changed);
}

static status *peer_error(const struct group *g)
{
    return ERR(PEER, "rank %d of the job ended with an error", g->job->synced.broken);
}

/* Wait until all ranks of the group are here; with `breakable`, or until the job is broken. */
static status *meet_or_break(struct group *g, bool breakable)
{
    lock(g);
    uint64_t generation = g->generation;
    if (++g->waiting == g->size) {
        g->waiting = 0;
        g->generation++;
        wake(g);
    }
    while (g->generation == generation && !(breakable && g->job->synced.broken >= 0))
        pthread_cond_wait(&g->job->synced.changed, &g->job->synced.lock);
    status *st = g->generation == generation ? peer_error(g) : NULL;
    unlock(g);
    return st;
}

/* The first meeting of a collective: a peer may never come. */
static status *meet(struct group *g)
{
    return meet_or_break(g, true);
}

/* A later meeting: all ranks passed the first and are on their way, so nobody leaves while another reads its memory. */
static status *meet_again(struct group *g)
{
    return meet_or_break(g, false);
}

static status *publish(struct comm *c, struct slot s)
{
    struct group *g = group_of(c);
    g->slot[c->rank] = s;
    return meet(g);
}

/* ---- groups ---- */

static void group_free(struct group *g)
{
    for (struct message *m = g->first, *next; m; m = next) {
        next = m->next;
        mem_free(m);
    }
    for (struct message *m = g->free_messages, *next; m; m = next) {
        next = m->next;
        mem_free(m);
    }
    for (int list = 0; list < 2; list++) {
        for (struct inflight *f = list ? g->reductions : g->free_reductions, *next; f; f = next) {
            next = f->next;
            mem_free(f->in);
            mem_free(f->out);
            mem_free(f);
        }
    }
    for (struct request *r = g->all_requests, *next; r; r = next) {
        next = r->next_all;
        mem_free(r);
    }
    mem_free(g->slot);
    mem_free(g);
}

/* One more idle object of each kind. */
static void add_message(struct group *g)
{
    struct message *m = mem_alloc(sizeof *m);
    CHECK(m, "out of memory in a test");
    *m = (struct message){ .next = g->free_messages };
    g->free_messages = m;
}

static void add_request(struct group *g)
{
    struct request *q = mem_alloc(sizeof *q);
    CHECK(q, "out of memory in a test");
    *q = (struct request){ .next = g->free_requests, .next_all = g->all_requests };
    g->free_requests = g->all_requests = q;
}

static void add_reduction(struct group *g)
{
    struct inflight *f = mem_calloc(1, sizeof *f);
    CHECK(f, "out of memory in a test");
    f->in = mem_calloc((size_t)g->size, sizeof *f->in);
    f->out = mem_calloc((size_t)g->size, sizeof *f->out);
    CHECK(f->in && f->out, "out of memory in a test");
    f->next = g->free_reductions;
    g->free_reductions = f;
}

static struct group *group_new(struct job *job, int size)
{
    struct group *g = mem_calloc(1, sizeof *g);
    CHECK(g, "out of memory in a test");
    *g = (struct group){ .job = job, .size = size, .open = size };
    g->slot = mem_calloc((size_t)size, sizeof *g->slot);
    CHECK(g->slot, "out of memory in a test");
    for (int i = 0; i < SPARE; i++) {
        add_message(g);
        add_request(g);
        if (i < SPARE / 8)
            add_reduction(g);
    }
    return g;
}

static void join_group(struct comm *c, struct group *g, int rank)
{
    struct rank *r = mem_calloc(1, sizeof *r);
    CHECK(r, "out of memory in a test");
    r->group = g;
    c->rank = rank;
    c->size = g->size;
    c->impl = r;
}

static void threads_close(struct comm *c)
{
    struct rank *r = c->impl;
    struct group *g = r->group;
    lock(g);
    bool last = --g->open == 0;
    unlock(g);
    if (last)
        group_free(g);
    mem_free(r->scratch);
    mem_free(r);
}

/* Members of my color are counted in (key, rank) order; the lowest rank of the color makes the group. */
static status *threads_split(struct comm *c, int color, int key, struct comm *out)
{
    struct group *g = group_of(c);
    TRY(publish(c, (struct slot){ .color = color, .key = key }));
    int size = 0, before = 0, maker = -1;
    for (int r = 0; r < c->size; r++) {
        const struct slot *s = &g->slot[r];
        if (s->color != color)
            continue;
        maker = maker < 0 ? r : maker;
        size++;
        before += s->key < key || (s->key == key && r < c->rank);
    }
    TRY(meet_again(g)); /* all have read the colors: `child` may be written */
    if (color >= 0 && maker == c->rank)
        g->slot[maker].child = group_new(g->job, size);
    TRY(meet_again(g));
    if (color >= 0)
        join_group(out, g->slot[maker].child, before);
    return meet_again(g);
}

static status *threads_dup(struct comm *c, struct comm *out)
{
    return threads_split(c, 0, c->rank, out);
}

static status *threads_open(struct comm *c, int *argc, char ***argv)
{
    (void)c;
    (void)argc;
    (void)argv;
    return ERR(UNSUPPORTED, "ranks as threads start with comm_threads_run");
}

/* ---- collectives ---- */

#define REDUCE(T)                                                                                                      \
    do {                                                                                                               \
        T *a = acc;                                                                                                    \
        const T *b = in;                                                                                               \
        for (size_t i = 0; i < count; i++)                                                                             \
            a[i] = op == COMM_SUM ? (T)(a[i] + b[i]) : (op == COMM_MIN) == (b[i] < a[i]) ? b[i] : a[i];                \
    } while (0)

static void reduce(void *acc, const void *in, size_t count, enum comm_type t, enum comm_op op)
{
    switch (t) {
    case COMM_U8:
        REDUCE(uint8_t);
        break;
    case COMM_I32:
        REDUCE(int32_t);
        break;
    case COMM_I64:
        REDUCE(int64_t);
        break;
    case COMM_U64:
        REDUCE(uint64_t);
        break;
    case COMM_F32:
        REDUCE(float);
        break;
    case COMM_F64:
        REDUCE(double);
        break;
    }
}

static status *threads_barrier(struct comm *c)
{
    return meet(group_of(c));
}

static status *threads_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    struct group *g = group_of(c);
    TRY(publish(c, (struct slot){ .in = buf, .bytes = bytes }));
    CHECK(g->slot[root].bytes == bytes, "bcast: rank %d says %zu bytes, root %zu", c->rank, bytes, g->slot[root].bytes);
    if (c->rank != root)
        memcpy(buf, g->slot[root].in, bytes);
    return meet_again(g);
}

static status *threads_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    struct rank *r = c->impl;
    size_t bytes = count * comm_type_bytes(t);
    if (bytes > r->scratch_bytes) {
        mem_free(r->scratch);
        r->scratch = mem_alloc(bytes);
        r->scratch_bytes = bytes;
        CHECK(r->scratch, "out of memory in a test");
    }
    TRY(publish(c, (struct slot){ .in = buf, .bytes = bytes }));
    for (int i = 0; i < c->size; i++) {
        const struct slot *s = &r->group->slot[i];
        CHECK(s->bytes == bytes, "allreduce: rank %d says %zu bytes, rank %d %zu", c->rank, bytes, i, s->bytes);
        if (i == 0)
            memcpy(r->scratch, s->in, bytes);
        else
            reduce(r->scratch, s->in, count, t, op);
    }
    TRY(meet_again(r->group));
    memcpy(buf, r->scratch, bytes);
    return NULL;
}

static status *threads_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    struct group *g = group_of(c);
    char *mine = (char *)out + (size_t)c->rank * bytes;
    TRY(publish(c, (struct slot){ .in = in, .bytes = bytes }));
    for (int r = 0; r < c->size; r++) {
        CHECK(g->slot[r].bytes == bytes, "allgather: ranks %d and %d differ in bytes", r, c->rank);
        if (r != c->rank)
            memcpy((char *)out + (size_t)r * bytes, g->slot[r].in, bytes);
    }
    if (mine != in)
        memmove(mine, in, bytes);
    return meet_again(g);
}

static status *threads_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    struct group *g = group_of(c);
    TRY(publish(c, (struct slot){ .in = in, .bytes = bytes }));
    char *at = out;
    for (int r = 0; c->rank == root && r < c->size; at += counts[r++]) {
        CHECK(g->slot[r].bytes == counts[r], "gatherv: rank %d gives %zu bytes, root expects %zu", r, g->slot[r].bytes,
              counts[r]);
        if (counts[r])
            memcpy(at, g->slot[r].in, counts[r]);
    }
    return meet_again(g);
}

static status *threads_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    struct group *g = group_of(c);
    TRY(publish(c, (struct slot){ .in = in, .counts = counts }));
    const struct slot *s = &g->slot[root];
    const char *at = s->in;
    for (int r = 0; r < c->rank; r++)
        at += s->counts[r];
    CHECK(s->counts[c->rank] == bytes, "scatterv: rank %d takes %zu bytes, root gives %zu", c->rank, bytes,
          s->counts[c->rank]);
    if (bytes)
        memcpy(out, at, bytes);
    return meet_again(g);
}

/* ---- requests (all under the job's lock) ---- */

/* Nothing new starts in a broken job: what the peers that left had posted points to memory that may be gone. */
static status *lock_unbroken(struct group *g)
{
    lock(g);
    status *st = g->job->synced.broken >= 0 ? peer_error(g) : NULL;
    if (st)
        unlock(g);
    return st;
}

static struct request *new_request(struct group *g)
{
    if (!g->free_requests)
        add_request(g);
    struct request *q = g->free_requests;
    g->free_requests = q->next;
    *q = (struct request){ .group = g, .next_all = q->next_all };
    return q;
}

static struct inflight *new_inflight(struct group *g, uint64_t seq)
{
    if (!g->free_reductions)
        add_reduction(g);
    struct inflight *f = g->free_reductions;
    g->free_reductions = f->next;
    f->seq = seq;
    f->arrived = f->left = 0;
    f->next = g->reductions;
    g->reductions = f;
    return f;
}

static void complete(struct inflight *f, int size)
{
    size_t bytes = f->count * comm_type_bytes(f->type);
    memcpy(f->out[0], f->in[0], bytes);
    for (int r = 1; r < size; r++)
        reduce(f->out[0], f->in[r], f->count, f->type, f->op);
    for (int r = 1; r < size; r++)
        memcpy(f->out[r], f->out[0], bytes);
}

static status *threads_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                                  enum comm_op op, struct comm_req *req)
{
    struct rank *r = c->impl;
    struct group *g = r->group;
    TRY(lock_unbroken(g));
    struct inflight *f = g->reductions;
    while (f && f->seq != r->reductions)
        f = f->next;
    if (!f)
        f = new_inflight(g, r->reductions);
    if (f->arrived == 0) {
        f->count = count;
        f->type = t;
        f->op = op;
    }
    CHECK(f->count == count && f->type == t && f->op == op, "iallreduce: the ranks disagree");
    r->reductions++;
    f->in[c->rank] = in;
    f->out[c->rank] = out;
    if (++f->arrived == g->size) {
        complete(f, g->size);
        wake(g);
    }
    struct request *q = new_request(g);
    q->reduction = f;
    req->impl = q;
    unlock(g);
    return NULL;
}

/* The earliest waiting message that is the other half of x; taken out of the list. */
static struct message *take_match(struct group *g, const struct message *x)
{
    struct message *before = NULL;
    for (struct message *m = g->first; m; before = m, m = m->next) {
        if (m->send == x->send || m->src != x->src || m->dst != x->dst || m->tag != x->tag)
            continue;
        if (before)
            before->next = m->next;
        else
            g->first = m->next;
        if (g->last == m)
            g->last = before;
        return m;
    }
    return NULL;
}

/* Copy between x and its other half, if that is there; else leave x waiting. */
static void post_message(struct group *g, struct message x)
{
    struct message *m = take_match(g, &x);
    if (!m) {
        if (!g->free_messages)
            add_message(g);
        m = g->free_messages;
        g->free_messages = m->next;
        *m = x;
        m->next = NULL;
        if (g->last)
            g->last->next = m;
        else
            g->first = m;
        g->last = m;
        return;
    }
    if (m->bytes != x.bytes)
        m->owner->mismatch = x.owner->mismatch = true;
    else
        memmove(x.send ? m->buf : x.buf, x.send ? x.buf : m->buf, x.bytes);
    m->owner->pending--;
    x.owner->pending--;
    m->next = g->free_messages;
    g->free_messages = m;
}

static status *threads_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    struct group *g = group_of(c);
    TRY(lock_unbroken(g));
    struct request *q = new_request(g);
    for (size_t i = 0; i < n; i++) {
        if (!x[i].bytes)
            continue;
        q->pending++;
        post_message(g, (struct message){ .src = x[i].send ? c->rank : x[i].peer,
                                          .dst = x[i].send ? x[i].peer : c->rank,
                                          .tag = x[i].tag,
                                          .send = x[i].send,
                                          .buf = x[i].buf,
                                          .bytes = x[i].bytes,
                                          .owner = q });
    }
    req->impl = q;
    wake(g);
    unlock(g);
    return NULL;
}

static bool is_done(const struct request *q)
{
    return q->reduction ? q->reduction->arrived == q->group->size : q->pending == 0;
}

/* Recycle a request that is done. */
static status *end_request(struct request *q)
{
    struct group *g = q->group;
    struct inflight *f = q->reduction;
    bool mismatch = q->mismatch;
    if (f && ++f->left == g->size) {
        struct inflight **at = &g->reductions;
        while (*at != f)
            at = &(*at)->next;
        *at = f->next;
        f->next = g->free_reductions;
        g->free_reductions = f;
    }
    q->next = g->free_requests;
    g->free_requests = q;
    return mismatch ? ERR(INTERNAL, "exchange: two ranks disagree about the size of a message") : NULL;
}

static status *threads_test(struct comm_req *req, bool *done)
{
    struct request *q = req->impl;
    struct group *g = q->group;
    status *st = NULL;
    lock(g);
    bool finished = is_done(q);
    if (finished)
        st = end_request(q);
    else if (g->job->synced.broken >= 0)
        st = peer_error(g); /* messages still point to the request: it is freed with the group */
    unlock(g);
    if (!st)
        *done = finished;
    return st;
}

static status *threads_wait(struct comm_req *req)
{
    struct request *q = req->impl;
    struct group *g = q->group;
    lock(g);
    while (!is_done(q) && g->job->synced.broken < 0)
        pthread_cond_wait(&g->job->synced.changed, &g->job->synced.lock);
    status *st = is_done(q) ? end_request(q) : peer_error(g);
    unlock(g);
    return st;
}

static void threads_abort(struct comm *c, int code)
{
    fprintf(stderr, "comm_threads: rank %d of %d aborts the job with code %d\n", c->rank, c->size, code);
    abort();
}

static const struct comm_ops threads_ops = {
    .name = "threads",
    .open = threads_open,
    .close = threads_close,
    .dup = threads_dup,
    .split = threads_split,
    .barrier = threads_barrier,
    .bcast = threads_bcast,
    .allreduce = threads_allreduce,
    .allgather = threads_allgather,
    .gatherv = threads_gatherv,
    .scatterv = threads_scatterv,
    .iallreduce = threads_iallreduce,
    .iexchange = threads_iexchange,
    .test = threads_test,
    .wait = threads_wait,
    .abort = threads_abort,
    .thread_multiple = true,
};

/* ---- the job ---- */

struct start {
    struct thread thread;
    struct comm comm;
    struct job *job;
    status *(*fn)(struct comm *, void *);
    void *arg;
};

static status *rank_main(void *p)
{
    struct start *s = p;
    status *st = status_at_rank(s->fn(&s->comm, s->arg), s->comm.rank);
    if (st) {
        pthread_mutex_lock(&s->job->synced.lock);
        if (s->job->synced.broken < 0)
            s->job->synced.broken = s->comm.rank;
        pthread_cond_broadcast(&s->job->synced.changed);
        pthread_mutex_unlock(&s->job->synced.lock);
    }
    return st;
}

status *comm_threads_run(int size, status *(*fn)(struct comm *world, void *arg), void *arg)
{
    struct job job = { .synced = { .broken = -1 } };
    struct start *start = mem_calloc((size_t)size, sizeof *start);
    CHECK(start && size >= 1, "a job of %d ranks", size);
    pthread_mutex_init(&job.synced.lock, NULL);
    pthread_cond_init(&job.synced.changed, NULL);
    struct group *world = group_new(&job, size);
    for (int r = 0; r < size; r++) {
        struct start *s = &start[r];
        *s = (struct start){ .comm = { .ops = &threads_ops }, .job = &job, .fn = fn, .arg = arg };
        join_group(&s->comm, world, r);
    }
    for (int r = 0; r < size; r++) {
        char name[16];
        snprintf(name, sizeof name, "rank-%d", r % 1000);
        status *st = thread_start(&start[r].thread, name, rank_main, &start[r]);
        CHECK(!st, "%s", status_message(st)); /* the ranks that run could not be told */
    }
    status *first = NULL;
    for (int r = 0; r < size; r++) {
        status *st = thread_join(&start[r].thread);
        if (r == job.synced.broken && first) {
            status_free(first);
            first = NULL;
        }
        first = status_first(first, st);
    }
    for (int r = 0; r < size; r++)
        threads_close(&start[r].comm);
    pthread_mutex_destroy(&job.synced.lock);
    pthread_cond_destroy(&job.synced.changed);
    mem_free(start);
    return first;
}
