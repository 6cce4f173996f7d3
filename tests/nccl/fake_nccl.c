/* fake_nccl: the functions of NCCL that comm_nccl.c calls, for ranks that are threads of one process with device_fake's
 * streams. Built into a library of its own that a test names in TESSERA_NCCL.
 *
 * It does what makes the true one hard to use right: communicators are non-blocking, each call says "in progress" and
 * reaches its stream only at the second question about it; messages of a pair are matched by order alone; a call that
 * a peer does not join stays on the stream for ever, until it is aborted. */
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/support/device_fake.h"

#include <nccl.h>
#include <pthread.h>
#include <string.h>

enum { RANKS = 16, QUESTIONS = 2 };

struct call;

struct message {
    struct message *next;
    int from, to;
    const void *buf;
    size_t bytes;
    const struct call *owner;
    bool taken;
};

struct part {
    bool send;
    void *buf;
    size_t bytes;
    int peer;
};

enum kind { BROADCAST, ALL_REDUCE, ALL_GATHER, MESSAGES };

struct call {
    struct ncclComm *comm;
    enum kind kind;
    const void *in;
    void *out;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root;
    struct part part[512];
    size_t parts;
    struct stream *stream;
    struct call *next;
};

/* What the ranks of one unique id share. */
struct group {
    struct group *next;
    int id, size, joined, left;
    int arrived, gone; /* in the collective under way */
    struct call *at[RANKS];
    uint64_t round;
    struct message *first;
};

struct ncclComm {
    struct group *group;
    int rank;
    bool aborted;
    struct call *waiting, **last; /* not yet on their stream */
    int questions;                /* until the next of them goes there */
    ncclResult_t error;
    int kept;
    struct ncclComm *next; /* of all since fake_nccl_end */
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct group *groups;
    struct ncclComm *comms; /* all, since calls on streams may look at those that are gone */
    int ids, aborts, registered;
} world = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

static _Thread_local struct {
    int depth;
    struct call *call;
} grouping;

/* ---- what the streams run */

static size_t size_of(ncclDataType_t t)
{
    return t == ncclUint8 ? 1 : t == ncclInt32 || t == ncclFloat32 ? 4 : 8;
}

#define REDUCE(type)                                                                                                   \
    do {                                                                                                               \
        type *a = to;                                                                                                  \
        const type *b = from;                                                                                          \
        for (size_t i = 0; i < n; i++)                                                                                 \
            a[i] = (type)(op == ncclSum ? a[i] + b[i] : (op == ncclMin) == (b[i] < a[i]) ? b[i] : a[i]);               \
    } while (0)

static void reduce(void *to, const void *from, size_t n, ncclDataType_t t, ncclRedOp_t op)
{
    switch ((int)t) {
    case ncclUint8:
        REDUCE(uint8_t);
        break;
    case ncclInt32:
        REDUCE(int32_t);
        break;
    case ncclInt64:
        REDUCE(int64_t);
        break;
    case ncclUint64:
        REDUCE(uint64_t);
        break;
    case ncclFloat32:
        REDUCE(float);
        break;
    default:
        REDUCE(double);
    }
}

static void *memory(const void *p)
{
    return device_fake_memory(p);
}

/* The last to arrive does all ranks' work. */
static void complete(struct group *g)
{
    struct call *a = g->at[0];
    size_t bytes = a->count * size_of(a->type);
    for (int r = 1; r < g->size; r++)
        CHECK(g->at[r]->kind == a->kind && g->at[r]->count == a->count && g->at[r]->root == a->root,
              "the ranks' calls differ");
    if (a->kind == BROADCAST) {
        for (int r = 0; r < g->size; r++)
            memmove(memory(g->at[r]->out), memory(g->at[a->root]->in), bytes);
    } else if (a->kind == ALL_GATHER) {
        for (int from = 0; from < g->size; from++)
            for (int r = 0; r < g->size; r++)
                memmove((char *)memory(g->at[r]->out) + (size_t)from * bytes, memory(g->at[from]->in), bytes);
    } else {
        void *sum = mem_alloc(bytes);
        CHECK(sum, "out of memory in a test");
        memcpy(sum, memory(a->in), bytes);
        for (int r = 1; r < g->size; r++)
            reduce(sum, memory(g->at[r]->in), a->count, a->type, a->op);
        for (int r = 0; r < g->size; r++)
            memcpy(memory(g->at[r]->out), sum, bytes);
        mem_free(sum);
    }
}

static void run_collective(struct call *c)
{
    struct group *g = c->comm->group;
    uint64_t round = g->round;
    g->at[c->comm->rank] = c;
    if (++g->arrived == g->size) {
        complete(g);
        g->arrived = 0;
        g->round++;
        pthread_cond_broadcast(&world.changed);
    }
    while (g->round == round && !c->comm->aborted)
        pthread_cond_wait(&world.changed, &world.lock);
}

/* The earliest message of that pair. */
static struct message *earliest(struct group *g, int from, int to)
{
    struct message *m = g->first;
    while (m && (m->from != from || m->to != to || m->taken))
        m = m->next;
    return m;
}

static void run_messages(struct call *c)
{
    struct group *g = c->comm->group;
    int me = c->comm->rank;
    struct message *mine = mem_calloc(c->parts, sizeof *mine);
    CHECK(mine, "out of memory in a test");
    size_t left = 0, next[RANKS] = { 0 };
    for (size_t i = 0; i < c->parts; i++) {
        struct message **end = &g->first;
        left++;
        if (!c->part[i].send)
            continue;
        while (*end)
            end = &(*end)->next;
        mine[i] = (struct message){ NULL, me, c->part[i].peer, c->part[i].buf, c->part[i].bytes, c, false };
        *end = &mine[i];
    }
    pthread_cond_broadcast(&world.changed);
    while (left && !c->comm->aborted) {
        bool moved = false;
        left = 0;
        for (int peer = 0; peer < g->size; peer++) { /* receives of one peer in order */
            for (; next[peer] < c->parts; next[peer]++) {
                struct part *p = &c->part[next[peer]];
                if (p->send || p->peer != peer)
                    continue;
                struct message *m = earliest(g, peer, me);
                if (!m)
                    break;
                CHECK(m->bytes == p->bytes, "rank %d sends %zu bytes, rank %d wants %zu", peer, m->bytes, me, p->bytes);
                memcpy(memory(p->buf), memory(m->buf), m->bytes);
                m->taken = moved = true;
            }
            left += next[peer] < c->parts;
        }
        for (size_t i = 0; i < c->parts; i++)
            left += c->part[i].send && !mine[i].taken;
        if (moved)
            pthread_cond_broadcast(&world.changed);
        else if (left)
            pthread_cond_wait(&world.changed, &world.lock);
    }
    for (struct message **at = &g->first; *at;) {
        if ((*at)->owner == c)
            *at = (*at)->next;
        else
            at = &(*at)->next;
    }
    mem_free(mine);
}

static void run(void *arg)
{
    struct call *c = arg;
    pthread_mutex_lock(&world.lock);
    if (!c->comm->aborted) {
        if (c->kind == MESSAGES)
            run_messages(c);
        else
            run_collective(c);
    }
    pthread_mutex_unlock(&world.lock);
    mem_free(c);
}

/* ---- calls */

static struct call *new_call(struct ncclComm *c, enum kind kind, cudaStream_t s)
{
    struct call *call = mem_calloc(1, sizeof *call);
    CHECK(call, "out of memory in a test");
    call->comm = c;
    call->kind = kind;
    call->stream = (struct stream *)s;
    return call;
}

static ncclResult_t later(struct call *call)
{
    struct ncclComm *c = call->comm;
    pthread_mutex_lock(&world.lock);
    ncclResult_t rc = c->aborted || c->error ? ncclInvalidUsage : ncclInProgress;
    if (rc == ncclInProgress) {
        *c->last = call;
        c->last = &call->next;
        c->questions = QUESTIONS;
    }
    pthread_mutex_unlock(&world.lock);
    if (rc != ncclInProgress)
        mem_free(call);
    return rc;
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t count, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s)
{
    struct call *call = new_call(c, BROADCAST, s);
    call->in = in;
    call->out = out;
    call->count = count;
    call->type = t;
    call->root = root;
    return later(call);
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t count, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s)
{
    struct call *call = new_call(c, ALL_REDUCE, s);
    call->in = in;
    call->out = out;
    call->count = count;
    call->type = t;
    call->op = op;
    return later(call);
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t count, ncclDataType_t t, ncclComm_t c, cudaStream_t s)
{
    struct call *call = new_call(c, ALL_GATHER, s);
    call->in = in;
    call->out = out;
    call->count = count;
    call->type = t;
    return later(call);
}

static ncclResult_t add_part(bool send, void *buf, size_t count, ncclDataType_t t, int peer, ncclComm_t c,
                             cudaStream_t s)
{
    CHECK(grouping.depth == 1, "a message outside of a group");
    if (!grouping.call)
        grouping.call = new_call(c, MESSAGES, s);
    struct call *call = grouping.call;
    CHECK(call->comm == c && call->parts < sizeof call->part / sizeof *call->part, "a group too large or of two");
    call->part[call->parts++] = (struct part){ send, buf, count * size_of(t), peer };
    return ncclInProgress;
}

ncclResult_t ncclSend(const void *buf, size_t count, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s)
{
    return add_part(true, (void *)(uintptr_t)buf, count, t, peer, c, s);
}

ncclResult_t ncclRecv(void *buf, size_t count, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s)
{
    return add_part(false, buf, count, t, peer, c, s);
}

ncclResult_t ncclGroupStart(void)
{
    grouping.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    struct call *call = grouping.call;
    CHECK(--grouping.depth == 0, "groups inside groups");
    grouping.call = NULL;
    return call ? later(call) : ncclSuccess;
}

/* ---- communicators */

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    pthread_mutex_lock(&world.lock);
    int number = ++world.ids;
    pthread_mutex_unlock(&world.lock);
    memset(id, 0, sizeof *id);
    memcpy(id->internal, &number, sizeof number);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    int number;
    memcpy(&number, id.internal, sizeof number);
    CHECK(config->blocking == 0 && config->magic == 0xcafebeef && size <= RANKS, "not the config that is expected");
    struct ncclComm *c = mem_calloc(1, sizeof *c);
    CHECK(c, "out of memory in a test");
    c->rank = rank;
    c->last = &c->waiting;
    pthread_mutex_lock(&world.lock);
    struct group *g = world.groups;
    while (g && g->id != number)
        g = g->next;
    if (!g) {
        g = mem_calloc(1, sizeof *g);
        CHECK(g, "out of memory in a test");
        *g = (struct group){ .next = world.groups, .id = number, .size = size };
        world.groups = g;
    }
    CHECK(g->size == size && number, "the ranks disagree about the size, or have no id");
    g->joined++;
    c->group = g;
    c->next = world.comms;
    world.comms = c;
    pthread_mutex_unlock(&world.lock);
    *out = c;
    return ncclInProgress;
}

/* The second question about what was called finds it on its stream. */
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *out)
{
    pthread_mutex_lock(&world.lock);
    if (c->error) {
        *out = c->error;
    } else if (c->group->joined < c->group->size) {
        *out = ncclInProgress;
    } else if (!c->waiting) {
        *out = ncclSuccess;
    } else if (--c->questions > 0) {
        *out = ncclInProgress;
    } else {
        for (struct call *call = c->waiting, *next; call; call = next) {
            next = call->next;
            device_fake_queue(call->stream, run, call);
        }
        c->waiting = NULL;
        c->last = &c->waiting;
        *out = ncclSuccess;
    }
    pthread_mutex_unlock(&world.lock);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t c)
{
    (void)c;
    return ncclSuccess;
}

static void drop(struct ncclComm *c)
{
    struct group *g = c->group;
    for (struct call *call = c->waiting, *next; call; call = next) {
        next = call->next;
        mem_free(call);
    }
    c->waiting = NULL;
    c->last = &c->waiting;
    world.registered -= c->kept;
    c->kept = 0;
    g->left++;
}

ncclResult_t ncclCommDestroy(ncclComm_t c)
{
    pthread_mutex_lock(&world.lock);
    CHECK(!c->kept, "%d registrations were left", c->kept);
    drop(c);
    c->aborted = true;
    pthread_mutex_unlock(&world.lock);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t c)
{
    pthread_mutex_lock(&world.lock);
    c->aborted = true;
    world.aborts++;
    drop(c);
    pthread_cond_broadcast(&world.changed);
    pthread_mutex_unlock(&world.lock);
    return ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t c, void *buf, size_t bytes, void **handle)
{
    CHECK(buf && bytes && device_fake_memory(buf), "nothing to register");
    pthread_mutex_lock(&world.lock);
    c->kept++;
    world.registered++;
    pthread_mutex_unlock(&world.lock);
    *handle = buf;
    return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t c, void *handle)
{
    (void)handle;
    pthread_mutex_lock(&world.lock);
    c->kept--;
    world.registered--;
    pthread_mutex_unlock(&world.lock);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t rc)
{
    return rc == ncclRemoteError ? "remote process exited" : "an error of the fake";
}

const char *ncclGetLastError(ncclComm_t c)
{
    (void)c;
    return "in the\nfake";
}

/* ---- for tests, which find these by name */

/* From now on the communicators of that rank say that a peer is gone. */
void fake_nccl_fail(int rank);
void fake_nccl_fail(int rank)
{
    pthread_mutex_lock(&world.lock);
    for (struct ncclComm *c = world.comms; c; c = c->next)
        c->error = c->rank == rank ? ncclRemoteError : c->error;
    pthread_mutex_unlock(&world.lock);
}

/* Forget everything; every communicator must have been given back. Returns how many were aborted. */
int fake_nccl_end(void);
int fake_nccl_end(void)
{
    pthread_mutex_lock(&world.lock);
    int aborts = world.aborts;
    world.aborts = 0;
    CHECK(world.registered == 0, "%d registrations were left", world.registered);
    for (struct group *g = world.groups, *next; g; g = next) {
        next = g->next;
        CHECK(g->left == g->joined, "a communicator was not given back");
        mem_free(g);
    }
    for (struct ncclComm *c = world.comms, *next; c; c = next) {
        next = c->next;
        mem_free(c);
    }
    world.groups = NULL;
    world.comms = NULL;
    pthread_mutex_unlock(&world.lock);
    return aborts;
}
