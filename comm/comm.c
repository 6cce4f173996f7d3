/* comm: checks arguments, answers what needs no transport, and dispatches to the backend's table.
 *
 * Checks are of this rank's own arguments; ranks that disagree (another root, other sizes) are a bug that the transport
 * may or may not report. What is trivial for one rank or for zero bytes is done here, so that every backend may assume
 * at least one byte and, but for `self`, at least two ranks in bcast, allreduce and allgather. */
#include "comm/comm.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/device/device.h"

#include <stdio.h>
#include <string.h>

size_t comm_type_bytes(enum comm_type t)
{
    static const size_t bytes[] = {
        [COMM_U8] = 1, [COMM_I32] = 4, [COMM_I64] = 8, [COMM_U64] = 8, [COMM_F32] = 4, [COMM_F64] = 8,
    };
    return (unsigned)t < sizeof bytes / sizeof *bytes ? bytes[t] : 0;
}

/* ---- handles ---- */

static status *unknown_backend(const char *name)
{
    char names[256] = "";
    for (size_t i = 0, used = 0; comm_registry[i] && used < sizeof names; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", comm_registry[i]->name);
    return ERR(INVALID, "comm: no backend is called \"%s\" (this build has: %s)", name, names);
}

status *comm_open(const char *name, int *argc, char ***argv, struct comm **out)
{
    const struct comm_ops *ops = NULL;
    for (size_t i = 0; comm_registry[i]; i++)
        if (!strcmp(comm_registry[i]->name, name))
            ops = comm_registry[i];
    if (!ops)
        return unknown_backend(name);
    struct comm *c = mem_calloc(1, sizeof *c);
    if (!c)
        return ERR(NO_MEMORY, "comm: handle");
    c->ops = ops;
    status *st = ops->open(c, argc, argv);
    if (st) {
        mem_free(c);
        return status_wrap(st, "comm: open %s", name);
    }
    *out = c;
    return NULL;
}

status *comm_over(struct comm *parent, struct device *dev, double timeout_s, struct comm **out)
{
    if (dev->host)
        return comm_dup(parent, out);
    if (!dev->ops->comm)
        return ERR(UNSUPPORTED, "comm: this build of device %s cannot move its memory between ranks", dev->ops->name);
    struct comm *c = mem_calloc(1, sizeof *c);
    status *st = comm_agree(parent, c ? NULL : ERR(NO_MEMORY, "comm: handle"));
    if (!st) {
        c->ops = dev->ops->comm;
        c->rank = parent->rank;
        c->size = parent->size;
        st = c->ops->over(c, parent, dev, timeout_s);
    }
    if (st) {
        mem_free(c);
        return st;
    }
    *out = c;
    return NULL;
}

status *comm_keep(struct comm *c, void *buf, size_t bytes)
{
    return c->ops->keep && bytes ? c->ops->keep(c, buf, bytes) : NULL;
}

void comm_close(struct comm *c)
{
    if (!c)
        return;
    c->ops->close(c);
    mem_free(c);
}

/* Finish a dup or split: hand over `child`, or free it. Takes child and st. */
static status *give_child(struct comm *child, status *st, struct comm **out)
{
    if (st || child->size == 0) {
        mem_free(child);
        child = NULL;
    }
    if (!st)
        *out = child;
    return st;
}

/* A child shares its parent's table but never its runtime. */
static struct comm *new_child(const struct comm *parent)
{
    struct comm *child = mem_calloc(1, sizeof *child);
    if (child)
        child->ops = parent->ops;
    return child;
}

status *comm_dup(struct comm *c, struct comm **out)
{
    struct comm *child = new_child(c);
    if (!child)
        return ERR(NO_MEMORY, "comm: handle");
    return give_child(child, c->ops->dup(c, child), out);
}

status *comm_split(struct comm *c, int color, int key, struct comm **out)
{
    struct comm *child = new_child(c);
    if (!child)
        return ERR(NO_MEMORY, "comm: handle");
    return give_child(child, c->ops->split(c, color, key, child), out);
}

/* ---- collectives ---- */

static status *check_root(const struct comm *c, int root, const char *what)
{
    if (root < 0 || root >= c->size)
        return ERR(INVALID, "%s: root %d is not a rank of %d", what, root, c->size);
    return NULL;
}

static status *check_reduce(size_t count, enum comm_type t, enum comm_op op, const char *what)
{
    size_t size = comm_type_bytes(t);
    if (!size || (unsigned)op > COMM_MAX)
        return ERR(INVALID, "%s: type %d or operation %d does not exist", what, (int)t, (int)op);
    if (count > SIZE_MAX / size)
        return ERR(INVALID, "%s: %zu elements do not fit in memory", what, count);
    return NULL;
}

status *comm_barrier(struct comm *c)
{
    return c->size == 1 ? NULL : c->ops->barrier(c);
}

status *comm_bcast(struct comm *c, void *buf, size_t bytes, int root, struct stream *s)
{
    c->stream = s;
    TRY(check_root(c, root, "comm_bcast"));
    return c->size == 1 || !bytes ? NULL : c->ops->bcast(c, buf, bytes, root);
}

static void count_reduction(struct comm *c, size_t bytes)
{
    c->sent_bytes += 2 * ((uint64_t)c->size - 1) * bytes / (uint64_t)c->size;
}

status *comm_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op, struct stream *s)
{
    c->stream = s;
    TRY(check_reduce(count, t, op, "comm_allreduce"));
    count_reduction(c, count * comm_type_bytes(t));
    return c->size == 1 || !count ? NULL : c->ops->allreduce(c, buf, count, t, op);
}

status *comm_allgather(struct comm *c, const void *in, void *out, size_t bytes, struct stream *s)
{
    c->stream = s;
    if (!bytes)
        return NULL;
    if (bytes > SIZE_MAX / (size_t)c->size)
        return ERR(INVALID, "comm_allgather: %d times %zu bytes do not fit in memory", c->size, bytes);
    c->sent_bytes += ((uint64_t)c->size - 1) * bytes;
    if (c->size > 1 || c->ops->over)
        return c->ops->allgather(c, in, out, bytes);
    memmove(out, in, bytes); /* may be the same place */
    return NULL;
}

status *comm_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    TRY(check_root(c, root, "comm_gatherv"));
    if (c->rank == root && counts[root] != bytes)
        return ERR(INVALID, "comm_gatherv: root %d gives %zu bytes and expects %zu from itself", root, bytes,
                   counts[root]);
    return c->ops->gatherv(c, in, bytes, out, counts, root);
}

status *comm_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    TRY(check_root(c, root, "comm_scatterv"));
    if (c->rank == root && counts[root] != bytes)
        return ERR(INVALID, "comm_scatterv: root %d takes %zu bytes and sends %zu to itself", root, bytes,
                   counts[root]);
    return c->ops->scatterv(c, in, counts, out, bytes, root);
}

/* Root's memory for comm_gather_bytes, once it knows the lengths. */
static status *gather_room(const size_t *sizes, int ranks, void **out)
{
    size_t total = 0;
    for (int r = 0; r < ranks; r++)
        if (__builtin_add_overflow(total, sizes[r], &total))
            return ERR(INVALID, "comm_gather_bytes: the lengths of %d ranks overflow", ranks);
    *out = mem_alloc(total);
    return *out ? NULL : ERR(NO_MEMORY, "comm_gather_bytes: %zu bytes of %d ranks", total, ranks);
}

status *comm_gather_bytes(struct comm *c, const void *in, size_t bytes, int root, void **out, size_t **counts)
{
    TRY(check_root(c, root, "comm_gather_bytes"));
    size_t *sizes = NULL, *each = NULL;
    void *all = NULL;
    status *st = NULL;
    if (c->rank == root) {
        sizes = mem_array(NULL, (size_t)c->size, sizeof *sizes);
        each = mem_array(NULL, (size_t)c->size, sizeof *each); /* the same count from everyone: one length */
        if (!sizes || !each)
            st = ERR(NO_MEMORY, "comm_gather_bytes: lengths of %d ranks", c->size);
        for (int r = 0; !st && r < c->size; r++)
            each[r] = sizeof bytes;
    }
    st = comm_agree(c, st); /* nobody sends to a root that cannot receive */
    if (!st)
        st = comm_gatherv(c, &bytes, sizeof bytes, sizes, each, root);
    if (!st)
        st = comm_agree(c, c->rank == root ? gather_room(sizes, c->size, &all) : NULL);
    if (!st)
        st = comm_gatherv(c, in, bytes, all, sizes, root);
    mem_free(each);
    if (st || c->rank != root) {
        mem_free(sizes);
        mem_free(all);
        return st;
    }
    *out = all;
    *counts = sizes;
    return NULL;
}

status *comm_bcast_bytes(struct comm *c, void **buf, size_t *bytes, int root)
{
    TRY(check_root(c, root, "comm_bcast_bytes"));
    bool mine = c->rank == root;
    uint64_t n = mine ? *bytes : 0;
    TRY(comm_bcast(c, &n, sizeof n, root, NULL));
    unsigned char *p = mine ? *buf : n < SIZE_MAX ? mem_alloc((size_t)n + 1) : NULL;
    bool room = mine || p;
    status *st = comm_agree(c, room ? NULL : ERR(NO_MEMORY, "comm_bcast_bytes: %llu bytes", (unsigned long long)n));
    if (!st)
        st = comm_bcast(c, p, (size_t)n, root, NULL);
    if (mine)
        return st;
    if (st) {
        mem_free(p);
        return st;
    }
    p[n] = 0;
    *buf = p;
    *bytes = (size_t)n;
    return NULL;
}

/* ---- requests ---- */

status *comm_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t, enum comm_op op,
                        struct comm_req *req)
{
    *req = (struct comm_req){ 0 };
    c->stream = NULL;
    TRY(check_reduce(count, t, op, "comm_iallreduce"));
    if (!count)
        return NULL;
    if (c->size == 1 && !c->ops->over) {
        memcpy(out, in, count * comm_type_bytes(t));
        return NULL;
    }
    count_reduction(c, count * comm_type_bytes(t));
    TRY(c->ops->iallreduce(c, in, out, count, t, op, req));
    req->ops = req->impl ? c->ops : NULL; /* a backend that is done at once leaves impl NULL */
    return NULL;
}

static status *check_xfer(const struct comm *c, const struct comm_xfer *x)
{
    if (x->peer < 0 || x->peer >= c->size)
        return ERR(INVALID, "comm_exchange: peer %d is not a rank of %d", x->peer, c->size);
    if (x->tag < 0 || x->tag > COMM_TAG_MAX)
        return ERR(INVALID, "comm_exchange: tag %d is not in 0..%d", x->tag, COMM_TAG_MAX);
    return NULL;
}

/* A request is done. */
static void go_on(struct comm_req *req)
{
    if (req->then)
        req->then(req->arg);
    req->then = NULL;
}

status *comm_iexchange_then(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s,
                            void (*then)(void *arg), void *arg, struct comm_req *req)
{
    c->stream = s;
    *req = (struct comm_req){ 0 };
    size_t messages = 0;
    for (size_t i = 0; i < n; i++) {
        TRY(check_xfer(c, &x[i]));
        messages += x[i].bytes > 0;
    }
    for (size_t i = 0; i < n; i++)
        c->sent_bytes += x[i].send && x[i].peer != c->rank ? x[i].bytes : 0;
    uint64_t began = clock_ns();
    req->then = then;
    req->arg = arg;
    status *st = messages ? c->ops->iexchange(c, x, n, req) : NULL;
    if (st) {
        *req = (struct comm_req){ 0 };
        return st;
    }
    req->ops = req->impl ? c->ops : NULL;
    req->of = messages ? c : NULL;
    req->began_ns = began;
    if (!req->ops)
        go_on(req);
    return NULL;
}

status *comm_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s, struct comm_req *req)
{
    return comm_iexchange_then(c, x, n, s, NULL, NULL, req);
}

/* A request is done; waited_ns of its time somebody waited. */
static void count_time(const struct comm_req *req, uint64_t waited_ns)
{
    if (!req->of)
        return;
    req->of->flight_ns += (req->ended_ns ? req->ended_ns : clock_ns()) - req->began_ns;
    req->of->wait_ns += waited_ns;
}

status *comm_exchange(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s)
{
    struct comm_req req;
    TRY(comm_iexchange(c, x, n, s, &req));
    return comm_wait(&req);
}

bool comm_pending(const struct comm_req *req)
{
    return req->ops != NULL;
}

status *comm_test(struct comm_req *req, bool *done)
{
    bool finished = true;
    status *st = req->ops ? req->ops->test(req, &finished) : NULL;
    if (!st && finished) {
        count_time(req, 0);
        go_on(req);
    }
    if (st || finished)
        *req = (struct comm_req){ 0 };
    if (!st)
        *done = finished;
    return st;
}

status *comm_wait(struct comm_req *req)
{
    struct comm *of = req->of;
    uint64_t began = of ? clock_ns() : 0;
    if (req->ops && req->ops->wait) {
        status *st = req->ops->wait(req);
        count_time(req, clock_ns() - began);
        if (!st)
            go_on(req);
        *req = (struct comm_req){ 0 };
        return st;
    }
    /* 200 us: long transfers move only inside the test, so a longer sleep would cost them bandwidth */
    struct backoff pause = { .max_us = 200 };
    for (bool done = false;;) {
        TRY(comm_test(req, &done));
        if (done && of)
            of->wait_ns += clock_ns() - began;
        if (done)
            return NULL;
        backoff_wait(&pause);
    }
}

void comm_abort(struct comm *c, int code)
{
    c->ops->abort(c, code);
    CHECK(false, "the %s backend returned from its abort", c->ops->name);
}
