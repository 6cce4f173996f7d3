/* comm_mpi: ranks of an MPI job. The only file that includes mpi.h.
 *
 * Invariants: every communicator used here is a duplicate of our own, so that our messages never meet the caller's, and
 * returns errors instead of ending the job. Request objects come from the communicator's free list, SPARE at a time,
 * and all idle ones have room for the most messages that one ever had: how many are in flight at once, and which are
 * idle, depends on timing, and a steady job shall make no allocation of ours. Counts are cut to what MPI's int holds,
 * alike on all ranks because all know the same sizes. gatherv and scatterv are plain messages under a tag of their own,
 * since only the root knows the total. MPI may block with a busy core in the collectives (it yields); comm_wait does
 * not. */
#include "comm/comm.h"

#include "comm/base/mem.h"

#include <limits.h>
#include <mpi.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CHUNK_BYTES = 1 << 30,  /* of one message */
    REDUCE_BYTES = 4 << 20, /* of one allreduce: Open MPI 4.1 on 2 cores does 4 MiB pieces 2x faster than 256 MiB */
    SPARE = 8,              /* requests */
    TAG_GATHER = COMM_TAG_MAX + 1,
    TAG_SCATTER = COMM_TAG_MAX + 2,
};

/* One request of ours: n requests of MPI. Who has it tests it, on whichever thread; the lists have a lock. */
struct mpi_req {
    struct mpi_req *next_all, *next_free;
    struct mpi_comm *owner;
    size_t n, cap;
    MPI_Request *r; /* [cap] */
    MPI_Status *s;  /* [cap] */
    int *want;      /* [cap] bytes a receive must bring; -1: not a receive */
};

struct mpi_comm {
    MPI_Comm comm;
    struct {
        pthread_mutex_t lock;
        struct mpi_req *all, *free;
        size_t most; /* messages of one request so far */
    } synced;
};

/* ---- errors ---- */

static status *mpi_error(int line, int rc, const char *call)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0, class = MPI_ERR_UNKNOWN;
    MPI_Error_string(rc, text, &length);
    MPI_Error_class(rc, &class);
    enum status_code code = class == MPI_ERR_NO_MEM ? ST_NO_MEMORY : class == MPI_ERR_TRUNCATE ? ST_INTERNAL : ST_PEER;
    return status_new(__FILE__, line, code, "%.40s: %s", call, text);
}

#define MPI_TRY(call)                                                                                                  \
    do {                                                                                                               \
        int mpi_rc_ = (call);                                                                                          \
        if (mpi_rc_ != MPI_SUCCESS)                                                                                    \
            return mpi_error(__LINE__, mpi_rc_, #call);                                                                \
    } while (0)

static MPI_Comm handle(const struct comm *c)
{
    return ((struct mpi_comm *)c->impl)->comm;
}

/* ---- communicators ---- */

/* Fill c for `comm`, which becomes m's. */
static status *adopt(struct comm *c, struct mpi_comm *m, MPI_Comm comm)
{
    m->comm = comm;
    pthread_mutex_init(&m->synced.lock, NULL);
    MPI_TRY(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
    MPI_TRY(MPI_Comm_rank(comm, &c->rank));
    MPI_TRY(MPI_Comm_size(comm, &c->size));
    c->impl = m;
    return NULL;
}

/* The duplicate of `from`, as c. */
static status *duplicate(MPI_Comm from, struct comm *c)
{
    struct mpi_comm *m = mem_calloc(1, sizeof *m);
    if (!m)
        return ERR(NO_MEMORY, "communicator");
    MPI_Comm comm;
    int rc = MPI_Comm_dup(from, &comm);
    status *st = rc == MPI_SUCCESS ? adopt(c, m, comm) : mpi_error(__LINE__, rc, "MPI_Comm_dup");
    if (st)
        mem_free(m);
    return st;
}

/* Undo the binding to one core that mpirun gives jobs of 1 or 2 ranks when nobody asked for one: all threads of the
 * rank would share that core. A core has up to two hardware threads; the kernel keeps us inside our cpuset. */
static void drop_core_binding(void)
{
    cpu_set_t now, all;
    if (!getenv("OMPI_MCA_orte_bound_at_launch") || getenv("OMPI_MCA_hwloc_base_binding_policy"))
        return;
    if (sched_getaffinity(0, sizeof now, &now) != 0 || CPU_COUNT(&now) > 2)
        return;
    CPU_ZERO(&all);
    long cpus = sysconf(_SC_NPROCESSORS_CONF);
    for (int i = 0; i < cpus && i < CPU_SETSIZE; i++)
        CPU_SET((unsigned)i, &all);
    (void)sched_setaffinity(0, sizeof all, &all); /* only speed is at stake */
}

static status *start_runtime(int *argc, char ***argv, bool *started)
{
    int initialised = 0, finalised = 0, level = 0;
    MPI_Initialized(&initialised);
    MPI_Finalized(&finalised);
    if (finalised)
        return ERR(UNSUPPORTED, "MPI has ended in this process and cannot start again");
    if (!initialised) {
        drop_core_binding();
        setenv("OMPI_MCA_mpi_yield_when_idle", "1",
               0); /* else a barrier of more ranks than cores takes 8 ms, not 10 us */
        setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 0);
        if (MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &level) != MPI_SUCCESS)
            return ERR(UNAVAILABLE, "MPI_Init_thread failed");
    }
    *started = !initialised;
    return NULL;
}

extern const struct comm_ops comm_mpi_ops;
static const struct comm_ops one_thread_ops;

/* The table that tells the truth about threads. */
static status *choose_ops(struct comm *c)
{
    int level = 0;
    MPI_TRY(MPI_Query_thread(&level));
    c->ops = level == MPI_THREAD_MULTIPLE ? &comm_mpi_ops : &one_thread_ops;
    return NULL;
}

static status *mpi_open(struct comm *c, int *argc, char ***argv)
{
    bool started = false;
    TRY(start_runtime(argc, argv, &started));
    void *top = NULL;
    int set = 0;
    status *st = choose_ops(c);
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, (void *)&top, &set);
    if (!st && (!set || *(int *)top < TAG_SCATTER))
        st = ERR(UNSUPPORTED, "this MPI has fewer than %d message tags", TAG_SCATTER);
    if (!st)
        st = duplicate(MPI_COMM_WORLD, c);
    c->owns_runtime = started;
    if (st && started)
        MPI_Finalize();
    return st;
}

status *comm_from_mpi(int fortran_handle, struct comm **out)
{
    int initialised = 0, finalised = 0;
    MPI_Initialized(&initialised);
    MPI_Finalized(&finalised);
    if (!initialised || finalised)
        return ERR(INVALID, "comm_from_mpi: MPI is not running");
    MPI_Comm from = MPI_Comm_f2c((MPI_Fint)fortran_handle);
    if (from == MPI_COMM_NULL || from == (MPI_Comm)0)
        return ERR(INVALID, "comm_from_mpi: %d is no communicator", fortran_handle);
    struct comm *c = mem_calloc(1, sizeof *c);
    if (!c)
        return ERR(NO_MEMORY, "comm: handle");
    status *st = choose_ops(c);
    if (!st)
        st = duplicate(from, c);
    if (st) {
        mem_free(c);
        return st;
    }
    *out = c;
    return NULL;
}

static void mpi_close(struct comm *c)
{
    struct mpi_comm *m = c->impl;
    int finalised = 0;
    MPI_Finalized(&finalised);
    if (!finalised)
        MPI_Comm_free(&m->comm);
    pthread_mutex_destroy(&m->synced.lock);
    for (struct mpi_req *q = m->synced.all, *next; q; q = next) {
        next = q->next_all;
        mem_free(q->r);
        mem_free(q->s);
        mem_free(q->want);
        mem_free(q);
    }
    mem_free(m);
    if (c->owns_runtime && !finalised)
        MPI_Finalize();
}

static status *mpi_dup(struct comm *c, struct comm *out)
{
    out->ops = c->ops;
    return duplicate(handle(c), out);
}

static status *mpi_split(struct comm *c, int color, int key, struct comm *out)
{
    struct mpi_comm *m = mem_calloc(1, sizeof *m);
    if (!m)
        return ERR(NO_MEMORY, "communicator");
    MPI_Comm comm = MPI_COMM_NULL;
    int rc = MPI_Comm_split(handle(c), color < 0 ? MPI_UNDEFINED : color, key, &comm);
    status *st = NULL;
    if (rc != MPI_SUCCESS)
        st = mpi_error(__LINE__, rc, "MPI_Comm_split");
    else if (comm != MPI_COMM_NULL)
        st = adopt(out, m, comm);
    if (st || comm == MPI_COMM_NULL)
        mem_free(m);
    return st;
}

/* ---- requests ---- */

static size_t parts(size_t bytes)
{
    return bytes / CHUNK_BYTES + (bytes % CHUNK_BYTES != 0);
}

/* Grow q to `need` requests. */
static status *reserve(struct mpi_req *q, size_t need)
{
    if (need <= q->cap)
        return NULL;
    if (need > INT_MAX)
        return ERR(INVALID, "%zu messages at once", need);
    size_t cap = q->cap * 2 > need ? q->cap * 2 : need;
    MPI_Request *r = mem_array(q->r, cap, sizeof *r);
    q->r = r ? r : q->r;
    MPI_Status *s = mem_array(q->s, cap, sizeof *s);
    q->s = s ? s : q->s;
    int *want = mem_array(q->want, cap, sizeof *want);
    q->want = want ? want : q->want;
    if (!r || !s || !want)
        return ERR(NO_MEMORY, "%zu requests", cap);
    q->cap = cap;
    return NULL;
}

static void give_req(struct mpi_req *q)
{
    struct mpi_comm *m = q->owner;
    pthread_mutex_lock(&m->synced.lock);
    status_free(reserve(q, m->synced.most)); /* who takes it tries again */
    q->next_free = m->synced.free;
    m->synced.free = q;
    pthread_mutex_unlock(&m->synced.lock);
}

/* With the lock held: idle objects, where there are none. */
static void add_spare(struct mpi_comm *m)
{
    for (int i = 0; i < SPARE; i++) {
        struct mpi_req *q = mem_calloc(1, sizeof *q);
        if (!q)
            return;
        q->owner = m;
        q->next_all = m->synced.all;
        q->next_free = m->synced.free;
        m->synced.all = m->synced.free = q;
    }
}

/* With the lock held: an idle object, NULL: there is no memory. Others get as much room as it needs. */
static struct mpi_req *take_idle(struct mpi_comm *m, size_t need)
{
    bool more = need > m->synced.most || !m->synced.free;
    if (!m->synced.free)
        add_spare(m);
    m->synced.most = need > m->synced.most ? need : m->synced.most;
    for (struct mpi_req *q = m->synced.free; more && q; q = q->next_free)
        status_free(reserve(q, m->synced.most));
    struct mpi_req *q = m->synced.free;
    if (q)
        m->synced.free = q->next_free;
    return q;
}

/* An idle request object with room for `need` MPI requests. */
static status *take_req(struct comm *c, size_t need, struct mpi_req **out)
{
    struct mpi_comm *m = c->impl;
    pthread_mutex_lock(&m->synced.lock);
    struct mpi_req *q = take_idle(m, need);
    pthread_mutex_unlock(&m->synced.lock);
    if (!q)
        return ERR(NO_MEMORY, "request");
    q->n = 0;
    status *st = reserve(q, need);
    if (st) {
        give_req(q);
        return st;
    }
    *out = q;
    return NULL;
}

/* Start one message, in as many parts as MPI's int asks for. q has room for them. */
static status *post(struct mpi_req *q, bool send, void *buf, size_t bytes, int peer, int tag)
{
    for (size_t done = 0; done < bytes; done += CHUNK_BYTES) {
        int part = (int)(bytes - done < CHUNK_BYTES ? bytes - done : CHUNK_BYTES);
        void *at = (char *)buf + done;
        if (send)
            MPI_TRY(MPI_Isend(at, part, MPI_BYTE, peer, tag, q->owner->comm, &q->r[q->n]));
        else
            MPI_TRY(MPI_Irecv(at, part, MPI_BYTE, peer, tag, q->owner->comm, &q->r[q->n]));
        q->want[q->n++] = send ? -1 : part;
    }
    return NULL;
}

/* Every receive brought as many bytes as were asked for (more is MPI's own error). */
static status *check_received(const struct mpi_req *q)
{
    for (size_t i = 0; i < q->n; i++) {
        int got = 0;
        if (q->want[i] < 0)
            continue;
        MPI_TRY(MPI_Get_count(&q->s[i], MPI_BYTE, &got));
        if (got != q->want[i])
            return ERR(INTERNAL, "exchange: rank %d sent %d bytes under tag %d where %d were expected",
                       q->s[i].MPI_SOURCE, got, q->s[i].MPI_TAG, q->want[i]);
    }
    return NULL;
}

/* The first error among the statuses after a call returned MPI_ERR_IN_STATUS. */
static status *in_status_error(const struct mpi_req *q)
{
    for (size_t i = 0; i < q->n; i++)
        if (q->s[i].MPI_ERROR != MPI_SUCCESS && q->s[i].MPI_ERROR != MPI_ERR_PENDING)
            return mpi_error(__LINE__, q->s[i].MPI_ERROR, "a message");
    return ERR(PEER, "MPI reported an error in no message");
}

/* After an error the object stays out of the free list: MPI may still hold some of its requests. mpi_close frees it. */
static status *finish(struct mpi_req *q, int rc, bool done)
{
    if (rc == MPI_ERR_IN_STATUS)
        return in_status_error(q);
    if (rc != MPI_SUCCESS)
        return mpi_error(__LINE__, rc, "completing messages");
    if (!done)
        return NULL;
    status *st = check_received(q);
    give_req(q);
    return st;
}

static status *mpi_test(struct comm_req *req, bool *done)
{
    struct mpi_req *q = req->impl;
    int flag = 0, rc = MPI_Testall((int)q->n, q->r, &flag, q->s);
    TRY(finish(q, rc, flag));
    *done = flag;
    return NULL;
}

/* For messages that the caller waits for inside a collective: blocks like the collectives do. */
static status *wait_here(struct mpi_req *q)
{
    int rc = MPI_Waitall((int)q->n, q->r, q->s);
    return finish(q, rc, true);
}

static status *mpi_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    size_t need = 0;
    struct mpi_req *q = NULL;
    for (size_t i = 0; i < n; i++)
        need += parts(x[i].bytes);
    TRY(take_req(c, need, &q));
    for (size_t i = 0; i < n; i++) /* receives first: what arrives finds its place */
        if (!x[i].send)
            TRY(post(q, false, x[i].buf, x[i].bytes, x[i].peer, x[i].tag));
    for (size_t i = 0; i < n; i++)
        if (x[i].send)
            TRY(post(q, true, x[i].buf, x[i].bytes, x[i].peer, x[i].tag));
    req->impl = q;
    return NULL;
}

/* ---- collectives ---- */

static MPI_Datatype type_of(enum comm_type t)
{
    switch (t) {
    case COMM_U8:
        return MPI_UINT8_T;
    case COMM_I32:
        return MPI_INT32_T;
    case COMM_I64:
        return MPI_INT64_T;
    case COMM_U64:
        return MPI_UINT64_T;
    case COMM_F32:
        return MPI_FLOAT;
    case COMM_F64:
        return MPI_DOUBLE;
    }
    return MPI_DATATYPE_NULL;
}

static MPI_Op op_of(enum comm_op op)
{
    return op == COMM_SUM ? MPI_SUM : op == COMM_MIN ? MPI_MIN : MPI_MAX;
}

static status *mpi_barrier(struct comm *c)
{
    MPI_TRY(MPI_Barrier(handle(c)));
    return NULL;
}

static status *mpi_bcast(struct comm *c, void *buf, size_t bytes, int root)
{
    for (size_t done = 0; done < bytes; done += CHUNK_BYTES) {
        size_t part = bytes - done < CHUNK_BYTES ? bytes - done : CHUNK_BYTES;
        MPI_TRY(MPI_Bcast((char *)buf + done, (int)part, MPI_BYTE, root, handle(c)));
    }
    return NULL;
}

static status *mpi_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op)
{
    size_t size = comm_type_bytes(t), piece = REDUCE_BYTES / size;
    for (size_t done = 0; done < count; done += piece) {
        size_t part = count - done < piece ? count - done : piece;
        MPI_TRY(MPI_Allreduce(MPI_IN_PLACE, (char *)buf + done * size, (int)part, type_of(t), op_of(op), handle(c)));
    }
    return NULL;
}

static status *mpi_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t,
                              enum comm_op op, struct comm_req *req)
{
    size_t size = comm_type_bytes(t), piece = CHUNK_BYTES / size;
    struct mpi_req *q = NULL;
    TRY(take_req(c, parts(count * size), &q));
    for (size_t done = 0; done < count; done += piece) {
        size_t part = count - done < piece ? count - done : piece;
        MPI_TRY(MPI_Iallreduce((const char *)in + done * size, (char *)out + done * size, (int)part, type_of(t),
                               op_of(op), handle(c), &q->r[q->n]));
        q->want[q->n++] = -1;
    }
    req->impl = q;
    return NULL;
}

static status *mpi_allgather(struct comm *c, const void *in, void *out, size_t bytes)
{
    char *mine = (char *)out + (size_t)c->rank * bytes;
    bool in_place = in == mine;
    if (bytes <= INT_MAX / (size_t)c->size) {
        MPI_TRY(
            MPI_Allgather(in_place ? MPI_IN_PLACE : in, (int)bytes, MPI_BYTE, out, (int)bytes, MPI_BYTE, handle(c)));
        return NULL;
    }
    if (!in_place)
        memcpy(mine, in, bytes);
    for (int r = 0; r < c->size; r++)
        TRY(mpi_bcast(c, (char *)out + (size_t)r * bytes, bytes, r));
    return NULL;
}

/* Root's side of gatherv and scatterv: a message per rank, its own part copied. `packed` holds the parts one after
 * another. */
static status *root_side(struct comm *c, bool send, char *packed, const size_t *counts, void *own, int tag)
{
    size_t need = 0, at = 0;
    struct mpi_req *q = NULL;
    for (int r = 0; r < c->size; r++)
        need += r == c->rank ? 0 : parts(counts[r]);
    TRY(take_req(c, need, &q));
    for (int r = 0; r < c->size; at += counts[r++]) {
        if (r != c->rank)
            TRY(post(q, send, packed + at, counts[r], r, tag));
        else if (counts[r])
            memmove(send ? own : packed + at, send ? packed + at : own, counts[r]);
    }
    return wait_here(q);
}

static status *leaf_side(struct comm *c, bool send, void *buf, size_t bytes, int root, int tag)
{
    struct mpi_req *q = NULL;
    TRY(take_req(c, parts(bytes), &q));
    TRY(post(q, send, buf, bytes, root, tag));
    return wait_here(q);
}

static status *mpi_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root)
{
    void *from = (void *)(size_t)in; /* read only: a send */
    if (c->rank == root)
        return root_side(c, false, out, counts, from, TAG_GATHER);
    return leaf_side(c, true, from, bytes, root, TAG_GATHER);
}

static status *mpi_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root)
{
    if (c->rank == root)
        return root_side(c, true, (void *)(size_t)in, counts, out, TAG_SCATTER);
    return leaf_side(c, false, out, bytes, root, TAG_SCATTER);
}

static void mpi_abort(struct comm *c, int code)
{
    (void)c;
    MPI_Abort(MPI_COMM_WORLD, code);
    _Exit(code); /* some MPIs return while the launcher is on its way */
}

#define MPI_OPS(multiple)                                                                                              \
    {                                                                                                                  \
        .name = "mpi", .open = mpi_open, .close = mpi_close, .dup = mpi_dup, .split = mpi_split,                       \
        .barrier = mpi_barrier, .bcast = mpi_bcast, .allreduce = mpi_allreduce, .allgather = mpi_allgather,            \
        .gatherv = mpi_gatherv, .scatterv = mpi_scatterv, .iallreduce = mpi_iallreduce, .iexchange = mpi_iexchange,    \
        .test = mpi_test, .abort = mpi_abort, .thread_multiple = multiple,                                             \
    }

const struct comm_ops comm_mpi_ops = MPI_OPS(true);
static const struct comm_ops one_thread_ops = MPI_OPS(false); /* the caller started MPI with a lower thread level */
