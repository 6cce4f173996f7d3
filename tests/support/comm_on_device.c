/* comm_on_device: behind each copy lies a guard that nothing may write to. */
#include "tests/support/comm_on_device.h"

#include "tests/support/comm_suite.h"

#include "comm/base/mem.h"

#include <string.h>

enum { GUARD = 64, GUARD_BYTE = 0xa5, SLAB = 4 << 20 };

struct over {
    struct comm *inner;
    struct device *dev;
    struct stream *s;
    /* What buffers are cut from as long as there is room: a GPU waits for all its work when memory is taken or given,
     * and with calls in flight that wait for a peer this could be for ever. */
    char *slab;
    unsigned char *pinned;
    size_t used, out;
};

/* A buffer of the host and its copy. */
struct twin {
    void *device;
    unsigned char *host; /* pinned: bytes, then the guard */
    size_t bytes;
};

/* A call in flight: the copies of its buffers, and where they go. */
struct flight {
    struct over *over;
    struct comm_req req;
    struct stream *s; /* that the results are ordered before */
    struct comm_xfer *xfer, *inner;
    struct twin *twin;
    size_t n;
};

static struct over *over_of(const struct comm *c)
{
    return c->impl;
}

static status *twin_open(struct over *o, const void *from, size_t bytes, struct stream *s, struct twin *t)
{
    struct device *d = o->dev;
    size_t need = (bytes + GUARD + 255) / 256 * 256;
    t->bytes = bytes;
    if (o->used + need <= SLAB) {
        t->device = o->slab + o->used;
        t->host = o->pinned + o->used;
        o->used += need;
        o->out++;
    } else {
        void *host;
        TRY(d->ops->alloc_pinned(d, bytes + GUARD, &host));
        t->host = host;
        TRY(d->ops->alloc(d, bytes + GUARD, &t->device));
    }
    if (from)
        memcpy(t->host, from, bytes);
    memset(t->host + bytes, GUARD_BYTE, GUARD);
    return d->ops->copy(d, t->device, t->host, bytes + GUARD, s);
}

/* Frees t; `to` NULL: the result is not wanted. */
static status *twin_close(struct over *o, struct twin *t, void *to, struct stream *s)
{
    struct device *d = o->dev;
    status *st = d->ops->copy(d, t->host, t->device, t->bytes + GUARD, s);
    st = status_first(st, d->ops->stream_sync(d, s));
    for (size_t i = 0; !st && i < GUARD; i++)
        if (t->host[t->bytes + i] != GUARD_BYTE)
            st = ERR(INTERNAL, "device memory behind a buffer of %zu bytes was written to", t->bytes);
    if (!st && to && t->bytes)
        memcpy(to, t->host, t->bytes);
    if (t->host >= o->pinned && t->host < o->pinned + SLAB) {
        o->used = --o->out ? o->used : 0;
        return st;
    }
    d->ops->free(d, t->device, t->bytes + GUARD);
    d->ops->free_pinned(d, t->host, t->bytes + GUARD);
    return st;
}

static status *over_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    struct over *o = over_of(c);
    struct twin t;
    TRY(twin_open(o, buf, bytes, o->s, &t));
    status *st = comm_bcast(o->inner, t.device, bytes, root, o->s);
    return status_first(st, twin_close(o, &t, buf, o->s));
}

static status *over_allreduce(struct comm *c, void *buf, size_t count, enum comm_type type, enum comm_op op)
{
    struct over *o = over_of(c);
    struct twin t;
    TRY(twin_open(o, buf, count * comm_type_bytes(type), o->s, &t));
    status *st = comm_allreduce(o->inner, t.device, count, type, op, o->s);
    return status_first(st, twin_close(o, &t, buf, o->s));
}

static status *over_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    struct over *o = over_of(c);
    size_t place = (size_t)c->rank * bytes;
    bool in_place = in == (char *)out + place;
    struct twin from, to;
    TRY(twin_open(o, in, bytes, o->s, &from));
    TRY(twin_open(o, out, bytes * (size_t)c->size, o->s, &to));
    status *st = comm_allgather(o->inner, in_place ? (char *)to.device + place : from.device, to.device, bytes, o->s);
    st = status_first(st, twin_close(o, &from, NULL, o->s));
    return status_first(st, twin_close(o, &to, out, o->s));
}

static size_t total(const struct comm *c, const size_t *counts)
{
    size_t sum = 0;
    for (int r = 0; r < c->size; r++)
        sum += counts[r];
    return sum;
}

/* These take no stream: the copies must be there before, and the results are on the default stream. */
static status *over_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    struct over *o = over_of(c);
    bool mine = c->rank == root;
    struct twin from, to;
    TRY(twin_open(o, in, bytes, NULL, &from));
    TRY(twin_open(o, out, mine ? total(c, counts) : 0, NULL, &to));
    status *st = comm_gatherv(o->inner, from.device, bytes, mine ? to.device : NULL, counts, root);
    st = status_first(st, twin_close(o, &from, NULL, NULL));
    return status_first(st, twin_close(o, &to, mine ? out : NULL, NULL));
}

static status *over_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    struct over *o = over_of(c);
    bool mine = c->rank == root;
    struct twin from, to;
    TRY(twin_open(o, in, mine ? total(c, counts) : 0, NULL, &from));
    TRY(twin_open(o, out, bytes, NULL, &to));
    status *st = comm_scatterv(o->inner, mine ? from.device : NULL, counts, to.device, bytes, root);
    st = status_first(st, twin_close(o, &from, NULL, NULL));
    return status_first(st, twin_close(o, &to, out, NULL));
}

static struct flight *new_flight(struct over *o, const struct comm_xfer *x, size_t n, struct stream *s)
{
    struct flight *f = mem_calloc(1, sizeof *f);
    CHECK(f, "out of memory in a test");
    f->over = o;
    f->s = s;
    f->n = n;
    f->xfer = mem_calloc(n + 1, sizeof *f->xfer);
    f->inner = mem_calloc(n + 1, sizeof *f->inner);
    f->twin = mem_calloc(n + 1, sizeof *f->twin);
    CHECK(f->xfer && f->inner && f->twin, "out of memory in a test");
    memcpy(f->xfer, x, n * sizeof *x);
    memcpy(f->inner, x, n * sizeof *x);
    return f;
}

static status *land(struct flight *f)
{
    status *st = NULL;
    for (size_t i = 0; i < f->n; i++)
        if (f->twin[i].device)
            st = status_first(st, twin_close(f->over, &f->twin[i], f->xfer[i].send ? NULL : f->xfer[i].buf, f->s));
    mem_free(f->xfer);
    mem_free(f->inner);
    mem_free(f->twin);
    mem_free(f);
    return st;
}

static status *over_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    struct over *o = over_of(c);
    struct flight *f = new_flight(o, x, n, o->s);
    for (size_t i = 0; i < n; i++) {
        if (!x[i].bytes)
            continue;
        TRY(twin_open(o, x[i].send ? x[i].buf : NULL, x[i].bytes, o->s, &f->twin[i]));
        f->inner[i].buf = f->twin[i].device;
    }
    status *st = comm_iexchange(o->inner, f->inner, n, o->s, &f->req);
    if (st)
        return status_first(st, land(f));
    req->impl = f;
    return NULL;
}

static status *over_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type type,
                               enum comm_op op, struct comm_req *req)
{
    struct over *o = over_of(c);
    size_t bytes = count * comm_type_bytes(type);
    struct comm_xfer x[] = { { .send = true, .bytes = bytes }, { .buf = out, .bytes = bytes } };
    struct flight *f = new_flight(o, x, 2, NULL);
    TRY(twin_open(o, in, bytes, NULL, &f->twin[0]));
    TRY(twin_open(o, out, bytes, NULL, &f->twin[1]));
    TRY(o->dev->ops->stream_sync(o->dev, NULL));
    status *st = comm_iallreduce(o->inner, f->twin[0].device, f->twin[1].device, count, type, op, &f->req);
    if (st)
        return status_first(st, land(f));
    req->impl = f;
    return NULL;
}

static status *over_test(struct comm_req *req, bool *done)
{
    struct flight *f = req->impl;
    bool landed = false;
    status *st = comm_test(&f->req, &landed);
    *done = landed;
    return st || landed ? status_first(st, land(f)) : NULL;
}

static status *over_wait(struct comm_req *req)
{
    struct flight *f = req->impl;
    status *st = comm_wait(&f->req);
    return status_first(st, land(f));
}

static status *over_barrier(struct comm *c)
{
    return comm_barrier(over_of(c)->inner);
}

static void over_abort(struct comm *c, int code)
{
    comm_abort(over_of(c)->inner, code);
}

static void over_close(struct comm *c)
{
    struct over *o = over_of(c);
    o->dev->ops->stream_close(o->dev, o->s);
    o->dev->ops->free(o->dev, o->slab, SLAB);
    o->dev->ops->free_pinned(o->dev, o->pinned, SLAB);
    comm_close(o->inner);
    mem_free(o);
}

/* Takes inner. */
static status *adopt(struct comm *c, struct comm *inner, struct device *dev)
{
    struct over *o = mem_calloc(1, sizeof *o);
    CHECK(o, "out of memory in a test");
    o->inner = inner;
    o->dev = dev;
    void *slab = NULL, *pinned = NULL;
    status *st = dev->ops->stream_open(dev, &o->s);
    if (!st)
        st = dev->ops->alloc(dev, SLAB, &slab);
    if (!st)
        st = dev->ops->alloc_pinned(dev, SLAB, &pinned);
    o->slab = slab;
    o->pinned = pinned;
    if (st) {
        comm_close(inner);
        mem_free(o);
        return st;
    }
    c->impl = o;
    c->rank = inner->rank;
    c->size = inner->size;
    return NULL;
}

static status *over_dup(struct comm *c, struct comm *out)
{
    struct comm *inner;
    TRY(comm_dup(over_of(c)->inner, &inner));
    return adopt(out, inner, over_of(c)->dev);
}

static status *over_split(struct comm *c, int color, int key, struct comm *out)
{
    struct comm *inner;
    TRY(comm_split(over_of(c)->inner, color, key, &inner));
    return inner ? adopt(out, inner, over_of(c)->dev) : NULL;
}

static const struct comm_ops over_ops = {
    .name = "on_device",
    .close = over_close,
    .dup = over_dup,
    .split = over_split,
    .barrier = over_barrier,
    .bcast = over_bcast,
    .allreduce = over_allreduce,
    .allgather = over_allgather,
    .gatherv = over_gatherv,
    .scatterv = over_scatterv,
    .iallreduce = over_iallreduce,
    .iexchange = over_iexchange,
    .test = over_test,
    .wait = over_wait,
    .abort = over_abort,
};

status *comm_on_device(struct comm *inner, struct device *dev, struct comm **out)
{
    struct comm *c = mem_calloc(1, sizeof *c);
    CHECK(c, "out of memory in a test");
    c->ops = &over_ops;
    status *st = adopt(c, inner, dev);
    if (st) {
        mem_free(c);
        return st;
    }
    *out = c;
    return NULL;
}

status *comm_suite_on_device(struct comm *inner, struct device *dev)
{
    struct comm *dup, *c;
    TRY(comm_dup(inner, &dup));
    TRY(comm_on_device(dup, dev, &c));
    status *st = comm_suite_run_in_order(c);
    comm_close(c);
    return st;
}
