/* comm_emu: what comm_nccl is on GPUs, for the emulated one, under the same name: ranks whose device memory moves over
 * another communicator, through host memory.
 *
 * A call on device memory waits for the caller's stream, copies what it sends, and lets a duplicate of the parent move
 * it; what arrives is copied to the device when the call ends (an exchange: when it is waited for, or found done). Host
 * memory goes over another duplicate: where ranks disagree whose memory a call is for, they wait for ever, as over
 * NCCL. As there messages of a pair are matched by their order alone, by tag only inside one list. Until a message is
 * done the memory it will arrive in is full of NaN, and what is sent must not change: both are looked at. */
#include "comm/base/mem.h"
#include "comm/comm.h"
#include "comm/device/device.h"

#include <string.h>

struct emu_req {
    struct emu_req *next_all, *next_free;
    struct emu_comm *owner;
    struct stream *stream;
    struct comm_req host, device;
    struct comm_xfer *xfer, *copy; /* [room] of the hosts' part, then the device's; the device's in `bytes` */
    size_t room, count;            /* of the device's part */
    struct comm_xfer *xfers;       /* of the device's part, inside xfer */
    char *bytes, *after;           /* host memory: what is sent and received; what was sent, at the end */
    size_t bytes_room;
};

struct emu_comm {
    struct device *dev;
    struct comm *parent, *wire; /* for host memory; for the device's */
    struct emu_req *all, *free;
    char *room; /* of a collective under way */
    size_t room_bytes;
};

static struct emu_comm *emu_of(const struct comm *c)
{
    return c->impl;
}

static bool on_device(const struct comm *c, const void *p)
{
    struct device *d = emu_of(c)->dev;
    return p && d->ops->on_device(d, p);
}

/* ---- opening and closing */

/* Takes both, also on error. */
static status *open_over(struct comm *c, struct comm *parent, struct comm *wire, struct device *dev)
{
    struct emu_comm *n = mem_calloc(1, sizeof *n);
    CHECK(n, "out of memory in a test");
    *n = (struct emu_comm){ .dev = dev, .parent = parent, .wire = wire };
    c->rank = parent->rank;
    c->size = parent->size;
    c->impl = n;
    return NULL;
}

static status *emu_over(struct comm *c, struct comm *parent, struct device *dev, double timeout_s)
{
    struct comm *own = NULL, *wire = NULL;
    (void)timeout_s;
    TRY(comm_dup(parent, &own));
    TRY(comm_dup(parent, &wire));
    return open_over(c, own, wire, dev);
}

static status *emu_open(struct comm *c, int *argc, char ***argv)
{
    (void)c;
    (void)argc;
    (void)argv;
    return ERR(INVALID, "comm nccl: opens over another communicator (comm_over)");
}

static status *emu_dup(struct comm *c, struct comm *out)
{
    return emu_over(out, emu_of(c)->parent, emu_of(c)->dev, 0);
}

static status *emu_split(struct comm *c, int color, int key, struct comm *out)
{
    struct comm *own = NULL, *wire = NULL;
    TRY(comm_split(emu_of(c)->parent, color, key, &own));
    TRY(comm_split(emu_of(c)->wire, color, key, &wire));
    return own ? open_over(out, own, wire, emu_of(c)->dev) : NULL;
}

static void emu_close(struct comm *c)
{
    struct emu_comm *n = emu_of(c);
    for (struct emu_req *q = n->all, *next; q; q = next) {
        next = q->next_all;
        mem_free(q->xfer);
        mem_free(q->copy);
        mem_free(q->bytes);
        mem_free(q->after);
        mem_free(q);
    }
    comm_close(n->parent);
    comm_close(n->wire);
    mem_free(n->room);
    mem_free(n);
}

/* ---- collectives */

/* Between the host's memory and the device's, done when it returns, and all that the stream was given before too. */
static status *move(struct comm *c, void *dst, const void *src, size_t bytes)
{
    struct device *d = emu_of(c)->dev;
    TRY(d->ops->copy(d, dst, src, bytes, c->stream));
    return d->ops->stream_sync(d, c->stream);
}

static char *room(struct comm *c, size_t bytes)
{
    struct emu_comm *n = emu_of(c);
    if (bytes > n->room_bytes) {
        n->room = mem_realloc(n->room, bytes);
        CHECK(n->room, "out of memory in a test");
        n->room_bytes = bytes;
    }
    return n->room;
}

static status *emu_barrier(struct comm *c)
{
    return comm_barrier(emu_of(c)->parent);
}

static status *emu_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    if (!on_device(c, buf))
        return comm_bcast(emu_of(c)->parent, buf, bytes, root, NULL);
    char *host = room(c, bytes);
    TRY(move(c, host, buf, bytes));
    TRY(comm_bcast(emu_of(c)->wire, host, bytes, root, NULL));
    return move(c, buf, host, bytes);
}

static status *emu_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    if (!on_device(c, buf))
        return comm_allreduce(emu_of(c)->parent, buf, count, t, op, NULL);
    size_t bytes = count * comm_type_bytes(t);
    char *host = room(c, bytes);
    TRY(move(c, host, buf, bytes));
    TRY(comm_allreduce(emu_of(c)->wire, host, count, t, op, NULL));
    return move(c, buf, host, bytes);
}

static status *emu_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    if (!on_device(c, out))
        return comm_allgather(emu_of(c)->parent, in, out, bytes, NULL);
    char *host = room(c, (size_t)c->size * bytes), *mine = host + (size_t)c->rank * bytes;
    TRY(move(c, mine, in, bytes));
    TRY(comm_allgather(emu_of(c)->wire, mine, host, bytes, NULL));
    return move(c, out, host, (size_t)c->size * bytes);
}

static size_t total(const struct comm *c, const size_t *counts)
{
    size_t sum = 0;
    for (int r = 0; r < c->size; r++)
        sum += counts[r];
    return sum;
}

static status *emu_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    bool is_root = c->rank == root;
    c->stream = NULL;
    if (!on_device(c, is_root ? out : in))
        return comm_gatherv(emu_of(c)->parent, in, bytes, out, counts, root);
    char *host = room(c, bytes + (is_root ? total(c, counts) : 0));
    TRY(move(c, host, in, bytes));
    TRY(comm_gatherv(emu_of(c)->wire, host, bytes, is_root ? host + bytes : NULL, counts, root));
    return is_root ? move(c, out, host + bytes, total(c, counts)) : NULL;
}

static status *emu_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    bool is_root = c->rank == root;
    c->stream = NULL;
    if (!on_device(c, is_root ? in : out))
        return comm_scatterv(emu_of(c)->parent, in, counts, out, bytes, root);
    char *host = room(c, bytes + (is_root ? total(c, counts) : 0));
    if (is_root)
        TRY(move(c, host + bytes, in, total(c, counts)));
    TRY(comm_scatterv(emu_of(c)->wire, is_root ? host + bytes : NULL, counts, host, bytes, root));
    return move(c, out, host, bytes);
}

/* ---- requests */

/* An idle request with room for so many messages and bytes of the device's. */
static struct emu_req *take_req(struct comm *c, size_t messages, size_t bytes)
{
    struct emu_comm *n = emu_of(c);
    struct emu_req *q = n->free;
    if (q) {
        n->free = q->next_free;
    } else {
        q = mem_calloc(1, sizeof *q);
        CHECK(q, "out of memory in a test");
        q->owner = n;
        q->next_all = n->all;
        n->all = q;
    }
    if (messages > q->room) {
        q->xfer = mem_array(q->xfer, messages, sizeof *q->xfer);
        q->copy = mem_array(q->copy, messages, sizeof *q->copy);
        CHECK(q->xfer && q->copy, "out of memory in a test");
        q->room = messages;
    }
    if (bytes > q->bytes_room) {
        q->bytes = mem_realloc(q->bytes, bytes);
        q->after = mem_realloc(q->after, bytes);
        CHECK(q->bytes && q->after, "out of memory in a test");
        q->bytes_room = bytes;
    }
    q->stream = c->stream;
    q->host = q->device = (struct comm_req){ 0 };
    q->count = 0;
    return q;
}

/* By peer, then tag, those of one tag as they are listed: their order is all that the other side knows of them. */
static void add_message(struct comm_xfer *list, size_t n, const struct comm_xfer *x)
{
    for (; n && (list[n - 1].peer > x->peer || (list[n - 1].peer == x->peer && list[n - 1].tag > x->tag)); n--)
        list[n] = list[n - 1];
    list[n] = *x;
}

static status *start(struct comm *c, struct emu_req *q)
{
    char *at = q->bytes;
    for (size_t i = 0; i < q->count; i++) {
        struct comm_xfer *x = &q->xfers[i];
        q->copy[i] = (struct comm_xfer){ x->peer, 0, x->send, at, x->bytes };
        if (x->send)
            TRY(move(c, at, x->buf, x->bytes));
        at += x->bytes;
    }
    for (size_t i = 0; i < q->count; i++) {
        if (q->copy[i].send)
            continue;
        memset(q->copy[i].buf, 0xff, q->copy[i].bytes);
        TRY(move(c, q->xfers[i].buf, q->copy[i].buf, q->copy[i].bytes));
    }
    return comm_iexchange(emu_of(c)->wire, q->copy, q->count, NULL, &q->device);
}

static status *emu_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    size_t host = 0, bytes = 0;
    for (size_t i = 0; i < n; i++)
        bytes += x[i].bytes && on_device(c, x[i].buf) ? x[i].bytes : 0;
    struct emu_req *q = take_req(c, n, bytes);
    for (size_t i = 0; i < n; i++)
        if (x[i].bytes && !on_device(c, x[i].buf))
            q->xfer[host++] = x[i];
    q->xfers = q->xfer + host;
    for (size_t i = 0; i < n; i++)
        if (x[i].bytes && on_device(c, x[i].buf))
            add_message(q->xfers, q->count++, &x[i]);
    TRY(comm_iexchange(emu_of(c)->parent, q->xfer, host, NULL, &q->host));
    if (q->count)
        TRY(start(c, q));
    req->impl = q;
    return NULL;
}

static status *emu_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                              enum comm_op op, struct comm_req *req)
{
    struct emu_comm *n = emu_of(c);
    size_t bytes = count * comm_type_bytes(t);
    if (!on_device(c, out)) {
        struct emu_req *q = take_req(c, 0, 0);
        TRY(comm_iallreduce(n->parent, in, out, count, t, op, &q->host));
        req->impl = q;
        return NULL;
    }
    struct emu_req *q = take_req(c, 1, 2 * bytes); /* the result behind the input, as a message that arrives */
    q->xfers = q->xfer;
    q->xfers[0] = (struct comm_xfer){ c->rank, 0, false, out, bytes };
    q->copy[0] = (struct comm_xfer){ c->rank, 0, false, q->bytes + bytes, bytes };
    q->count = 1;
    TRY(move(c, q->bytes, in, bytes));
    if (c->size > 1)
        TRY(comm_iallreduce(n->wire, q->bytes, q->bytes + bytes, count, t, op, &q->device));
    else
        memcpy(q->bytes + bytes, q->bytes, bytes);
    req->impl = q;
    return NULL;
}

/* The device's part, and the request. */
static status *finish(struct emu_req *q)
{
    struct device *d = q->owner->dev;
    for (size_t i = 0; i < q->count; i++) {
        const struct comm_xfer *x = &q->xfers[i], *copy = &q->copy[i];
        TRY(d->ops->copy(d, copy->send ? q->after : x->buf, copy->send ? x->buf : copy->buf, x->bytes, q->stream));
        TRY(d->ops->stream_sync(d, q->stream));
        CHECK(!copy->send || !memcmp(q->after, copy->buf, x->bytes), "%zu bytes changed while they were being sent",
              x->bytes);
    }
    q->next_free = q->owner->free;
    q->owner->free = q;
    return NULL;
}

static status *emu_test(struct comm_req *req, bool *done)
{
    struct emu_req *q = req->impl;
    bool host = true, device = true;
    TRY(comm_test(&q->host, &host));
    TRY(comm_test(&q->device, &device));
    *done = host && device;
    return *done ? finish(q) : NULL;
}

static status *emu_wait(struct comm_req *req)
{
    struct emu_req *q = req->impl;
    TRY(comm_wait(&q->host));
    TRY(comm_wait(&q->device));
    return finish(q);
}

static void emu_abort(struct comm *c, int code)
{
    comm_abort(emu_of(c)->parent, code);
}

const struct comm_ops comm_nccl_ops = {
    .name = "nccl",
    .open = emu_open,
    .close = emu_close,
    .dup = emu_dup,
    .split = emu_split,
    .barrier = emu_barrier,
    .bcast = emu_bcast,
    .allreduce = emu_allreduce,
    .allgather = emu_allgather,
    .gatherv = emu_gatherv,
    .scatterv = emu_scatterv,
    .iallreduce = emu_iallreduce,
    .iexchange = emu_iexchange,
    .test = emu_test,
    .wait = emu_wait,
    .abort = emu_abort,
    .over = emu_over,
    .thread_multiple = true,
};
