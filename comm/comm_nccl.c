/* comm_nccl: ranks whose GPUs exchange their memory over NCCL. Part of tessera_cuda.so; the only file that includes
 * nccl.h. libnccl itself is opened at run time ($TESSERA_NCCL, else libnccl.so.2 where the system looks): it is large,
 * and a machine that trains on GPUs has one.
 *
 * A communicator lies over one of another backend, its parent, which carries the unique id, all calls on host memory,
 * and the barrier. Calls on device memory are queued on a stream of the communicator's own; events order it after the
 * caller's stream and the caller's stream after it, so the host waits for nothing.
 *
 * NCCL's communicators are opened non-blocking: a call may say "in progress", and until it no longer does
 * (settle_locked) its kernel need not be on the stream yet, so no event may be recorded. A watchdog thread looks for
 * errors that NCCL finds by itself, and for calls that stay on the stream for longer than the time limit: a peer that
 * was killed on this machine makes no error, it only never comes. Either way it aborts the communicator, which ends its
 * kernels, and from then on every call here says so with the reason (PEER, or DEVICE where it is none of a peer's).
 *
 * Invariants: (1) NCCL's calls on one communicator, the watchdog's too, are made under synced.lock, and none of them
 * blocks; (2) an event is recorded only when all calls before it have settled; (3) requests come from a free list that
 * grows to the most ever in flight. */
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "comm/comm.h"
#include "comm/device/device.h"

#include <dlfcn.h>
#include <errno.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NCCL_FUNCTIONS(X)                                                                                              \
    X(ncclGetVersion)                                                                                                  \
    X(ncclGetUniqueId)                                                                                                 \
    X(ncclCommInitRankConfig)                                                                                          \
    X(ncclCommFinalize)                                                                                                \
    X(ncclCommDestroy)                                                                                                 \
    X(ncclCommAbort)                                                                                                   \
    X(ncclCommGetAsyncError)                                                                                           \
    X(ncclGetErrorString)                                                                                              \
    X(ncclGetLastError)                                                                                                \
    X(ncclCommRegister)                                                                                                \
    X(ncclCommDeregister)                                                                                              \
    X(ncclBroadcast)                                                                                                   \
    X(ncclAllReduce)                                                                                                   \
    X(ncclAllGather)                                                                                                   \
    X(ncclSend)                                                                                                        \
    X(ncclRecv)                                                                                                        \
    X(ncclGroupStart)                                                                                                  \
    X(ncclGroupEnd)

struct nccl_api {
#define X(f) __typeof__(&f) f;
    NCCL_FUNCTIONS(X)
#undef X
};

static const double TIMEOUT_S = 600, CLOSE_S = 30;
enum { WATCH_MS = 100, TEXT_BYTES = 300 };

struct kept {
    struct kept *next;
    void *handle;
};

/* A batch of messages or a reduction in flight: on the device, among hosts, or both. */
struct nccl_req {
    struct nccl_req *next_all, *next_free;
    struct nccl_comm *owner;
    struct event *done; /* of the device's part */
    bool device;        /* has a device's part */
    struct stream *stream;
    struct comm_req host;
    struct comm_xfer *xfer; /* [room] of the hosts' part, then the device's, which is sorted */
    size_t room;
};

struct nccl_comm {
    struct nccl_api api;
    struct device *dev;
    struct comm *parent;
    struct stream *stream;
    struct event *before, *after, *probe;
    struct nccl_req *all, *free;
    struct kept *kept;
    struct thread watchdog;
    int rank, size;
    double timeout_s;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        ncclComm_t comm;       /* NULL: aborted or not there yet */
        char text[TEXT_BYTES]; /* why it is broken; "": it is not */
        enum status_code code;
        uint64_t issued, probed; /* calls put on the stream; of them, those before the last probe */
        uint64_t probe_ns;       /* when the probe was recorded; 0: none is out */
        bool quit;
    } synced;
};

static struct nccl_comm *nccl_of(const struct comm *c)
{
    return c->impl;
}

static void lock(struct nccl_comm *n)
{
    pthread_mutex_lock(&n->synced.lock);
}

static void unlock(struct nccl_comm *n)
{
    pthread_mutex_unlock(&n->synced.lock);
}

/* ---- the library */

static status *load(struct nccl_api *api)
{
    const char *own = getenv("TESSERA_NCCL"), *file = own && *own ? own : "libnccl.so.2";
    void *lib = dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!lib)
        return ERR(UNSUPPORTED,
                   "comm: nccl was asked for, but its library cannot be opened: %s (looked for $TESSERA_NCCL, else "
                   "libnccl.so.2 in $LD_LIBRARY_PATH and the system's places)",
                   dlerror());
#define X(f)                                                                                                           \
    do {                                                                                                               \
        void *symbol_ = dlsym(lib, #f);                                                                                \
        if (!symbol_)                                                                                                  \
            return ERR(UNSUPPORTED, "comm: %s has no %s: NCCL %d.%d or later is needed", file, #f, NCCL_MAJOR,         \
                       NCCL_MINOR);                                                                                    \
        memcpy(&api->f, &symbol_, sizeof symbol_);                                                                     \
    } while (0);
    NCCL_FUNCTIONS(X)
#undef X
    int version = 0;
    if (api->ncclGetVersion(&version) != ncclSuccess || version / 100 < NCCL_VERSION_CODE / 100)
        return ERR(UNSUPPORTED, "comm: %s is NCCL %d.%d; %d.%d or later is needed", file, version / 10000,
                   version / 100 % 100, NCCL_MAJOR, NCCL_MINOR);
    return NULL;
}

/* ---- errors */

static status *broken_locked(const struct nccl_comm *n)
{
    if (!n->synced.text[0])
        return NULL;
    return status_new(__FILE__, __LINE__, n->synced.code, "comm nccl: rank %d of %d: %s", n->rank, n->size,
                      n->synced.text);
}

/* Note why and abort; only the first reason counts. */
static void break_locked(struct nccl_comm *n, enum status_code code, const char *what, const char *detail)
{
    if (n->synced.text[0])
        return;
    n->synced.code = code;
    snprintf(n->synced.text, sizeof n->synced.text, "%.100s%s%.180s", what, *detail ? ": " : "", detail);
    if (n->synced.comm)
        (void)n->api.ncclCommAbort(n->synced.comm);
    n->synced.comm = NULL;
    pthread_cond_broadcast(&n->synced.changed);
}

/* What NCCL said about the last failure is more than the result's name; and what it found by itself before a call comes
 * before what it says of the call. */
static void break_by_locked(struct nccl_comm *n, const char *call, ncclResult_t rc)
{
    char text[TEXT_BYTES];
    ncclResult_t found = ncclSuccess;
    if (n->synced.comm && n->api.ncclCommGetAsyncError(n->synced.comm, &found) == ncclSuccess && found != ncclSuccess &&
        found != ncclInProgress)
        rc = found;
    const char *last = n->synced.comm ? n->api.ncclGetLastError(n->synced.comm) : NULL;
    snprintf(text, sizeof text, "%s%s%.200s", n->api.ncclGetErrorString(rc), last && *last ? ", " : "",
             last ? last : "");
    for (char *p = text; *p; p++)
        *p = *p == '\n' ? ' ' : *p;
    break_locked(n, rc == ncclRemoteError || rc == ncclSystemError ? ST_PEER : ST_DEVICE, call, text);
}

/* Wait until NCCL has done what it was asked for, or has failed, up to the time limit. */
static status *settle_locked(struct nccl_comm *n, const char *call, ncclResult_t rc, double limit_s)
{
    struct backoff pause = { .max_us = 200 };
    uint64_t begin = clock_ns();
    while (rc == ncclInProgress && !n->synced.text[0]) {
        ncclResult_t asked = n->api.ncclCommGetAsyncError(n->synced.comm, &rc);
        rc = asked == ncclSuccess ? rc : asked;
        if (rc != ncclInProgress)
            break;
        if (ns_to_s(clock_ns() - begin) > limit_s) {
            char text[64];
            snprintf(text, sizeof text, "not all ranks came within %.3g s", limit_s);
            break_locked(n, ST_PEER, call, text);
            break;
        }
        unlock(n);
        backoff_wait(&pause);
        lock(n);
    }
    if (rc != ncclSuccess && rc != ncclInProgress)
        break_by_locked(n, call, rc);
    return broken_locked(n);
}

/* ---- the watchdog */

/* A probe is an event behind all calls so far: one that stays out for too long means that a call does not end. */
static void look_locked(struct nccl_comm *n)
{
    struct device *d = n->dev;
    ncclResult_t state = ncclSuccess;
    bool done = false;
    status *st = NULL;
    if (n->synced.probe_ns)
        st = d->ops->event_query(d, n->probe, &done); /* also makes the device current, for the calls below */
    ncclResult_t rc = n->api.ncclCommGetAsyncError(n->synced.comm, &state);
    if (rc != ncclSuccess || (state != ncclSuccess && state != ncclInProgress)) {
        break_by_locked(n, "a call failed", rc != ncclSuccess ? rc : state);
    } else if (st) {
        break_locked(n, ST_DEVICE, "the device failed", status_message(st));
    } else if (done) {
        n->synced.probe_ns = 0;
    } else if (n->synced.probe_ns && ns_to_s(clock_ns() - n->synced.probe_ns) > n->timeout_s) {
        char text[100];
        snprintf(text, sizeof text, "a call has not ended within %.3g s", n->timeout_s);
        break_locked(n, ST_PEER, text, "a peer has died or does not take part");
    }
    status_free(st);
    if (n->synced.comm && !n->synced.probe_ns && n->synced.probed != n->synced.issued && state == ncclSuccess) {
        n->synced.probed = n->synced.issued;
        st = d->ops->event_record(d, n->probe, n->stream);
        if (st)
            break_locked(n, ST_DEVICE, "the device failed", status_message(st));
        status_free(st);
        n->synced.probe_ns = clock_ns();
    }
}

static status *watch(void *arg)
{
    struct nccl_comm *n = arg;
    lock(n);
    while (!n->synced.quit) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += WATCH_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
        (void)pthread_cond_timedwait(&n->synced.changed, &n->synced.lock, &until);
        if (!n->synced.quit && n->synced.comm)
            look_locked(n);
    }
    unlock(n);
    return NULL;
}

/* ---- opening and closing */

static void nccl_free(struct nccl_comm *n)
{
    struct device *d = n->dev;
    if (n->synced.comm)
        (void)n->api.ncclCommAbort(n->synced.comm);
    for (struct nccl_req *q = n->all, *next; q; q = next) {
        next = q->next_all;
        d->ops->event_close(d, q->done);
        mem_free(q->xfer);
        mem_free(q);
    }
    for (struct kept *k = n->kept, *next; k; k = next) {
        next = k->next;
        mem_free(k);
    }
    if (n->before)
        d->ops->event_close(d, n->before);
    if (n->after)
        d->ops->event_close(d, n->after);
    if (n->probe)
        d->ops->event_close(d, n->probe);
    if (n->stream)
        d->ops->stream_close(d, n->stream);
    comm_close(n->parent);
    pthread_cond_destroy(&n->synced.changed);
    pthread_mutex_destroy(&n->synced.lock);
    mem_free(n);
}

/* This rank's part that needs no other. */
static status *prepare(struct nccl_comm *n, ncclUniqueId *id)
{
    struct device *d = n->dev;
    TRY(load(&n->api));
    TRY(d->ops->stream_open(d, &n->stream));
    TRY(d->ops->event_open(d, &n->before));
    TRY(d->ops->event_open(d, &n->after));
    TRY(d->ops->event_open(d, &n->probe));
    if (n->rank != 0)
        return NULL;
    ncclResult_t rc = n->api.ncclGetUniqueId(id);
    return rc == ncclSuccess ? NULL : ERR(DEVICE, "comm nccl: ncclGetUniqueId: %s", n->api.ncclGetErrorString(rc));
}

static status *join(struct nccl_comm *n, ncclUniqueId id)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    lock(n);
    ncclResult_t rc = n->api.ncclCommInitRankConfig(&n->synced.comm, n->size, id, n->rank, &config);
    status *st = NULL;
    if (rc != ncclSuccess && rc != ncclInProgress)
        st = ERR(DEVICE, "comm nccl: ncclCommInitRankConfig: %s, %s", n->api.ncclGetErrorString(rc),
                 n->api.ncclGetLastError(NULL));
    else
        st = settle_locked(n, "ncclCommInitRankConfig", rc, n->timeout_s);
    unlock(n);
    return st;
}

/* Takes parent, also on error. Collective over it. */
static status *open_over(struct comm *c, struct comm *parent, struct device *dev, double timeout_s)
{
    ncclUniqueId id = { { 0 } };
    struct nccl_comm *n = mem_calloc(1, sizeof *n);
    status *st = comm_agree(parent, n ? NULL : ERR(NO_MEMORY, "comm nccl: handle"));
    if (st) {
        mem_free(n);
        comm_close(parent);
        return st;
    }
    n->dev = dev;
    n->parent = parent;
    n->rank = parent->rank;
    n->size = parent->size;
    n->timeout_s = timeout_s > 0 ? timeout_s : TIMEOUT_S;
    pthread_mutex_init(&n->synced.lock, NULL);
    pthread_cond_init(&n->synced.changed, NULL);
    st = comm_agree(parent, prepare(n, &id));
    if (!st)
        st = comm_bcast(parent, &id, sizeof id, 0, NULL);
    if (!st)
        st = comm_agree(parent, join(n, id));
    if (!st)
        st = comm_agree(parent, thread_start(&n->watchdog, "tsr-nccl", watch, n));
    if (st) {
        lock(n);
        n->synced.quit = true;
        pthread_cond_broadcast(&n->synced.changed);
        unlock(n);
        status_free(thread_join(&n->watchdog));
        nccl_free(n);
        return st;
    }
    c->rank = n->rank;
    c->size = n->size;
    c->impl = n;
    return NULL;
}

static status *nccl_over(struct comm *c, struct comm *parent, struct device *dev, double timeout_s)
{
    struct comm *own = NULL;
    TRY(comm_dup(parent, &own));
    return open_over(c, own, dev, timeout_s);
}

static status *nccl_open(struct comm *c, int *argc, char ***argv)
{
    (void)c;
    (void)argc;
    (void)argv;
    return ERR(INVALID, "comm nccl: opens over another communicator (comm_over)");
}

static status *nccl_dup(struct comm *c, struct comm *out)
{
    return nccl_over(out, nccl_of(c)->parent, nccl_of(c)->dev, nccl_of(c)->timeout_s);
}

static status *nccl_split(struct comm *c, int color, int key, struct comm *out)
{
    struct comm *own = NULL;
    TRY(comm_split(nccl_of(c)->parent, color, key, &own));
    return own ? open_over(out, own, nccl_of(c)->dev, nccl_of(c)->timeout_s) : NULL;
}

static void nccl_close(struct comm *c)
{
    struct nccl_comm *n = nccl_of(c);
    status_free(n->dev->ops->stream_sync(n->dev, n->stream)); /* the watchdog is still there */
    lock(n);
    for (struct kept *k = n->kept; k && n->synced.comm; k = k->next)
        (void)n->api.ncclCommDeregister(n->synced.comm, k->handle);
    if (n->synced.comm)
        status_free(settle_locked(n, "ncclCommFinalize", n->api.ncclCommFinalize(n->synced.comm), CLOSE_S));
    if (n->synced.comm)
        (void)n->api.ncclCommDestroy(n->synced.comm);
    n->synced.comm = NULL;
    n->synced.quit = true;
    pthread_cond_broadcast(&n->synced.changed);
    unlock(n);
    status_free(thread_join(&n->watchdog));
    nccl_free(n);
}

static status *nccl_keep(struct comm *c, void *buf, size_t bytes)
{
    struct nccl_comm *n = nccl_of(c);
    struct kept *k = mem_calloc(1, sizeof *k);
    if (!k)
        return ERR(NO_MEMORY, "comm nccl: a registration");
    lock(n);
    status *st = broken_locked(n);
    ncclResult_t rc = st ? ncclSuccess : n->api.ncclCommRegister(n->synced.comm, buf, bytes, &k->handle);
    if (rc != ncclSuccess)
        st = ERR(DEVICE, "comm nccl: registering %zu bytes: %s", bytes, n->api.ncclGetErrorString(rc));
    unlock(n);
    if (st) {
        mem_free(k);
        return st;
    }
    k->next = n->kept;
    n->kept = k;
    return NULL;
}

/* ---- calls on the stream */

static bool on_device(const struct comm *c, const void *p)
{
    struct nccl_comm *n = nccl_of(c);
    return p && n->dev->ops->on_device(n->dev, p);
}

/* Locks, if the communicator is whole; its stream then waits for what the caller's has been given so far. */
static status *enter(struct comm *c)
{
    struct nccl_comm *n = nccl_of(c);
    struct device *d = n->dev;
    TRY(d->ops->event_record(d, n->before, c->stream));
    TRY(d->ops->stream_wait(d, n->stream, n->before));
    lock(n);
    status *st = broken_locked(n);
    if (st)
        unlock(n);
    return st;
}

/* Settles what was called and unlocks. */
static status *leave(struct nccl_comm *n, const char *call, ncclResult_t rc)
{
    status *st = settle_locked(n, call, rc, n->timeout_s);
    n->synced.issued += !st;
    unlock(n);
    return st;
}

/* The caller's stream waits for the communicator's. */
static status *join_streams(struct comm *c)
{
    struct nccl_comm *n = nccl_of(c);
    struct device *d = n->dev;
    TRY(d->ops->event_record(d, n->after, n->stream));
    return d->ops->stream_wait(d, c->stream, n->after);
}

static cudaStream_t stream_of(const struct nccl_comm *n)
{
    return (cudaStream_t)n->stream;
}

static ncclDataType_t type_of(enum comm_type t)
{
    static const ncclDataType_t types[] = {
        [COMM_U8] = ncclUint8,   [COMM_I32] = ncclInt32,   [COMM_I64] = ncclInt64,
        [COMM_U64] = ncclUint64, [COMM_F32] = ncclFloat32, [COMM_F64] = ncclFloat64,
    };
    return types[t];
}

static ncclRedOp_t op_of(enum comm_op op)
{
    return op == COMM_SUM ? ncclSum : op == COMM_MIN ? ncclMin : ncclMax;
}

static status *nccl_barrier(struct comm *c)
{
    return comm_barrier(nccl_of(c)->parent);
}

static status *nccl_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    struct nccl_comm *n = nccl_of(c);
    if (!on_device(c, buf))
        return comm_bcast(n->parent, buf, bytes, root, NULL);
    TRY(enter(c));
    TRY(leave(n, "ncclBroadcast",
              n->api.ncclBroadcast(buf, buf, bytes, ncclUint8, root, n->synced.comm, stream_of(n))));
    return join_streams(c);
}

static status *nccl_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    struct nccl_comm *n = nccl_of(c);
    if (!on_device(c, buf))
        return comm_allreduce(n->parent, buf, count, t, op, NULL);
    TRY(enter(c));
    TRY(leave(n, "ncclAllReduce",
              n->api.ncclAllReduce(buf, buf, count, type_of(t), op_of(op), n->synced.comm, stream_of(n))));
    return join_streams(c);
}

static status *nccl_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    struct nccl_comm *n = nccl_of(c);
    if (!on_device(c, out))
        return comm_allgather(n->parent, in, out, bytes, NULL);
    TRY(enter(c));
    TRY(leave(n, "ncclAllGather", n->api.ncclAllGather(in, out, bytes, ncclUint8, n->synced.comm, stream_of(n))));
    return join_streams(c);
}

/* ---- requests */

static void give_req(struct nccl_req *q)
{
    q->next_free = q->owner->free;
    q->owner->free = q;
}

/* An idle request with room for `room` messages. */
static status *take_req(struct comm *c, size_t room, struct nccl_req **out)
{
    struct nccl_comm *n = nccl_of(c);
    struct nccl_req *q = n->free;
    if (q) {
        n->free = q->next_free;
    } else {
        q = mem_calloc(1, sizeof *q);
        if (!q)
            return ERR(NO_MEMORY, "comm nccl: request");
        status *st = n->dev->ops->event_open(n->dev, &q->done);
        if (st) {
            mem_free(q);
            return st;
        }
        q->owner = n;
        q->next_all = n->all;
        n->all = q;
    }
    q->device = false;
    q->host = (struct comm_req){ 0 };
    q->stream = c->stream;
    if (room > q->room) {
        struct comm_xfer *xfer = mem_array(q->xfer, room, sizeof *xfer);
        if (!xfer) {
            give_req(q);
            return ERR(NO_MEMORY, "comm nccl: %zu messages", room);
        }
        q->xfer = xfer;
        q->room = room;
    }
    *out = q;
    return NULL;
}

/* NCCL matches the messages of a pair by their order alone: order them by tag, those of one tag as they are listed. */
static void sort_messages(struct comm_xfer *x, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        struct comm_xfer one = x[i];
        size_t at = i;
        for (; at && (x[at - 1].peer > one.peer || (x[at - 1].peer == one.peer && x[at - 1].tag > one.tag)); at--)
            x[at] = x[at - 1];
        x[at] = one;
    }
}

/* Queue the device's messages as one group and record q->done behind them. */
static status *post(struct comm *c, struct nccl_req *q, const struct comm_xfer *x, size_t count)
{
    struct nccl_comm *n = nccl_of(c);
    TRY(enter(c));
    ncclResult_t rc = n->api.ncclGroupStart(), worst = rc;
    for (size_t i = 0; i < count; i++) {
        rc = x[i].send ? n->api.ncclSend(x[i].buf, x[i].bytes, ncclUint8, x[i].peer, n->synced.comm, stream_of(n))
                       : n->api.ncclRecv(x[i].buf, x[i].bytes, ncclUint8, x[i].peer, n->synced.comm, stream_of(n));
        worst = worst == ncclSuccess || worst == ncclInProgress ? rc : worst;
    }
    rc = n->api.ncclGroupEnd();
    worst = worst == ncclSuccess || worst == ncclInProgress ? rc : worst;
    TRY(leave(n, "ncclSend and ncclRecv", worst));
    TRY(n->dev->ops->event_record(n->dev, q->done, n->stream));
    q->device = true;
    return NULL;
}

static status *nccl_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    struct nccl_req *q = NULL;
    TRY(take_req(c, n, &q));
    size_t host = 0, device = 0;
    for (size_t i = 0; i < n; i++)
        if (x[i].bytes && !on_device(c, x[i].buf))
            q->xfer[host++] = x[i];
    for (size_t i = 0; i < n; i++)
        if (x[i].bytes && on_device(c, x[i].buf))
            q->xfer[host + device++] = x[i];
    sort_messages(q->xfer + host, device);
    status *st = comm_iexchange(nccl_of(c)->parent, q->xfer, host, NULL, &q->host);
    if (!st && device)
        st = post(c, q, q->xfer + host, device);
    if (st)
        return st; /* the transport is lost; the request is freed with the communicator */
    req->impl = q;
    return NULL;
}

static status *nccl_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                               enum comm_op op, struct comm_req *req)
{
    struct nccl_comm *n = nccl_of(c);
    struct nccl_req *q = NULL;
    TRY(take_req(c, 0, &q));
    if (!on_device(c, out)) {
        TRY(comm_iallreduce(n->parent, in, out, count, t, op, &q->host));
    } else {
        TRY(enter(c));
        TRY(leave(n, "ncclAllReduce",
                  n->api.ncclAllReduce(in, out, count, type_of(t), op_of(op), n->synced.comm, stream_of(n))));
        TRY(n->dev->ops->event_record(n->dev, q->done, n->stream));
        q->device = true;
    }
    req->impl = q;
    return NULL;
}

/* After an abort events fire all the same. */
static status *check_whole(struct nccl_comm *n)
{
    lock(n);
    status *st = broken_locked(n);
    unlock(n);
    return st;
}

static status *nccl_test(struct comm_req *req, bool *done)
{
    struct nccl_req *q = req->impl;
    struct nccl_comm *n = q->owner;
    bool host = true, device = true;
    TRY(comm_test(&q->host, &host));
    if (q->device)
        TRY(n->dev->ops->event_query(n->dev, q->done, &device));
    TRY(check_whole(n));
    *done = host && device;
    if (*done)
        give_req(q);
    return NULL;
}

static status *nccl_wait(struct comm_req *req)
{
    struct nccl_req *q = req->impl;
    struct nccl_comm *n = q->owner;
    if (q->device)
        TRY(n->dev->ops->stream_wait(n->dev, q->stream, q->done));
    TRY(comm_wait(&q->host));
    TRY(check_whole(n));
    give_req(q);
    return NULL;
}

/* ---- parts of different sizes */

/* Root's side: parts one after another in `packed`, this rank's own in `own`. */
static status *root_side(struct comm *c, bool send, char *packed, const size_t *counts, void *own, int root)
{
    struct nccl_req *q = NULL;
    size_t messages = 0, at = 0;
    TRY(take_req(c, 2 * (size_t)c->size, &q));
    for (int r = 0; r < c->size; at += counts[r++])
        if (counts[r])
            q->xfer[messages++] = (struct comm_xfer){ r, 0, send, packed + at, counts[r] };
    if (counts[root])
        q->xfer[messages++] = (struct comm_xfer){ root, 0, !send, own, counts[root] };
    struct comm_req req = { .impl = q };
    if (messages)
        TRY(post(c, q, q->xfer, messages));
    return nccl_wait(&req);
}

static status *leaf_side(struct comm *c, bool send, void *buf, size_t bytes, int root)
{
    struct comm_xfer x = { root, 0, send, buf, bytes };
    struct comm_req req;
    TRY(nccl_iexchange(c, &x, 1, &req));
    return nccl_wait(&req);
}

static status *nccl_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    void *from = (void *)(size_t)in; /* read only: a send */
    c->stream = NULL;
    if (!on_device(c, c->rank == root ? out : in))
        return comm_gatherv(nccl_of(c)->parent, in, bytes, out, counts, root);
    return c->rank == root ? root_side(c, false, out, counts, from, root) : leaf_side(c, true, from, bytes, root);
}

static status *nccl_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    c->stream = NULL;
    if (!on_device(c, c->rank == root ? in : out))
        return comm_scatterv(nccl_of(c)->parent, in, counts, out, bytes, root);
    return c->rank == root ? root_side(c, true, (void *)(size_t)in, counts, out, root)
                           : leaf_side(c, false, out, bytes, root);
}

static void nccl_abort(struct comm *c, int code)
{
    comm_abort(nccl_of(c)->parent, code);
}

const struct comm_ops comm_nccl_ops = {
    .name = "nccl",
    .open = nccl_open,
    .close = nccl_close,
    .dup = nccl_dup,
    .split = nccl_split,
    .barrier = nccl_barrier,
    .bcast = nccl_bcast,
    .allreduce = nccl_allreduce,
    .allgather = nccl_allgather,
    .gatherv = nccl_gatherv,
    .scatterv = nccl_scatterv,
    .iallreduce = nccl_iallreduce,
    .iexchange = nccl_iexchange,
    .test = nccl_test,
    .wait = nccl_wait,
    .abort = nccl_abort,
    .over = nccl_over,
    .keep = nccl_keep,
    .thread_multiple = true,
};
