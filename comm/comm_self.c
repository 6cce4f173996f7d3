/* comm_self: a world of one rank. comm.c answers most calls of one rank itself; left are copies to oneself.
 *
 * It holds no state, so every communicator of it is alike and requests are done when they are started. */
#include "comm/comm.h"

#include <stdlib.h>
#include <string.h>

static status *self_open(struct comm *c, int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    c->rank = 0;
    c->size = 1;
    c->owns_runtime = true;
    return NULL;
}

static void self_close(struct comm *c)
{
    (void)c;
}

static status *self_dup(struct comm *c, struct comm *out)
{
    (void)c;
    out->size = 1;
    return NULL;
}

static status *self_split(struct comm *c, int color, int key, struct comm *out)
{
    (void)c;
    (void)key;
    out->size = color < 0 ? 0 : 1;
    return NULL;
}

static status *self_barrier(struct comm *c)
{
    (void)c;
    return NULL;
}

static status *self_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    (void)c;
    (void)buf;
    (void)bytes;
    (void)root;
    return NULL;
}

static status *self_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    (void)c;
    (void)buf;
    (void)count;
    (void)t;
    (void)op;
    return NULL;
}

static void copy(void *out, const void *in, size_t bytes)
{
    if (bytes)
        memmove(out, in, bytes);
}

static status *self_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    (void)c;
    copy(out, in, bytes);
    return NULL;
}

static status *self_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    (void)c;
    (void)counts;
    (void)root;
    copy(out, in, bytes);
    return NULL;
}

static status *self_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    (void)c;
    (void)counts;
    (void)root;
    copy(out, in, bytes);
    return NULL;
}

static status *self_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                               enum comm_op op, struct comm_req *req)
{
    (void)c;
    (void)op;
    (void)req;
    copy(out, in, count * comm_type_bytes(t));
    return NULL;
}

/* The receive that x[i], a send, goes to: of its tag, as many before it as sends before x[i]. NULL: there is none. */
static const struct comm_xfer *receive_of(const struct comm_xfer *x, size_t n, size_t i)
{
    size_t before = 0;
    for (size_t j = 0; j < i; j++)
        before += x[j].send && x[j].bytes && x[j].tag == x[i].tag;
    for (size_t j = 0; j < n; j++)
        if (!x[j].send && x[j].bytes && x[j].tag == x[i].tag && before-- == 0)
            return &x[j];
    return NULL;
}

static status *self_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    (void)c;
    (void)req;
    size_t sends = 0, receives = 0;
    for (size_t i = 0; i < n; i++) {
        if (!x[i].bytes)
            continue;
        sends += x[i].send;
        receives += !x[i].send;
        const struct comm_xfer *to = x[i].send ? receive_of(x, n, i) : &x[i];
        if (!to || to->bytes != x[i].bytes)
            return ERR(INVALID, "exchange: a message of %zu bytes to oneself, tag %d, has no receive of its size",
                       x[i].bytes, x[i].tag);
        if (x[i].send)
            copy(to->buf, x[i].buf, x[i].bytes);
    }
    if (sends != receives)
        return ERR(INVALID, "exchange: %zu sends to oneself and %zu receives", sends, receives);
    return NULL;
}

static status *self_test(struct comm_req *req, bool *done)
{
    (void)req;
    *done = true;
    return NULL;
}

static void self_abort(struct comm *c, int code)
{
    (void)c;
    _Exit(code);
}

const struct comm_ops comm_self_ops = {
    .name = "self",
    .open = self_open,
    .close = self_close,
    .dup = self_dup,
    .split = self_split,
    .barrier = self_barrier,
    .bcast = self_bcast,
    .allreduce = self_allreduce,
    .allgather = self_allgather,
    .gatherv = self_gatherv,
    .scatterv = self_scatterv,
    .iallreduce = self_iallreduce,
    .iexchange = self_iexchange,
    .test = self_test,
    .abort = self_abort,
    .thread_multiple = true,
};
