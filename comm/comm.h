/* comm: ranks that exchange bytes. Collectives, non-blocking reductions, and one batched point-to-point exchange.
 *
 *     comm_open("mpi", &argc, &argv, &world);  comm_dup(world, &mine);  comm_allreduce(mine, x, n, COMM_F32, COMM_SUM,
 * s);
 *
 * Collective functions are called by every rank of the communicator in the same order. A comm may be used by one thread
 * at a time; two threads use two comms (comm_dup). Counts are size_t; backends chunk them for MPI's int. `s` is the
 * stream that produced the data (NULL on the CPU), see comm_over for device memory. A failure of the transport itself
 * cannot be shared: such errors are PEER or IO and the job ends through comm_abort. Backends must not print, sleep
 * while holding a lock, or keep pointers after a call returns (requests: after comm_wait, or a comm_test that said
 * done). */
#ifndef TESSERA_COMM_COMM_H
#define TESSERA_COMM_COMM_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stream;
struct device;
struct comm;

enum comm_type { COMM_U8, COMM_I32, COMM_I64, COMM_U64, COMM_F32, COMM_F64 };
enum comm_op { COMM_SUM, COMM_MIN, COMM_MAX };
size_t comm_type_bytes(enum comm_type t); /* of one element; 0 for what is no type */

/* A request in flight. Filled by comm_i*; lives in the caller until it is done. */
struct comm_req {
    void *impl;
    const struct comm_ops *ops; /* NULL: nothing in flight */
    void (*then)(void *arg);    /* comm_iexchange_then, if a call of comm.h's is to make it */
    void *arg;
    struct comm *of;             /* whose times it counts in, NULL: none */
    uint64_t began_ns, ended_ns; /* ended_ns, of a backend that knows: when it was done; 0: when it is found so */
};

enum { COMM_TAG_MAX = 32767 };

/* One message of an exchange: bytes may be 0 (skipped on both sides). tag tells messages between one pair apart. */
struct comm_xfer {
    int peer;
    int tag; /* 0..COMM_TAG_MAX */
    bool send;
    void *buf;
    size_t bytes;
};

struct comm_ops {
    const char *name;
    status *(*open)(struct comm *c, int *argc, char ***argv); /* the world */
    void (*close)(struct comm *c);
    status *(*dup)(struct comm *c, struct comm *out);
    status *(*split)(struct comm *c, int color, int key, struct comm *out); /* color < 0: out->size = 0 */
    status *(*barrier)(struct comm *c);
    status *(*bcast)(struct comm *c, void *buf, size_t bytes, int root);
    status *(*allreduce)(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op);
    status *(*allgather)(struct comm *c, const void *in, void *out, size_t bytes); /* out: size x bytes */
    status *(*gatherv)(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts, int root);
    status *(*scatterv)(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes, int root);
    status *(*iallreduce)(struct comm *c, const void *in, void *out, size_t count, enum comm_type t, enum comm_op op,
                          struct comm_req *req);
    status *(*iexchange)(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req);
    status *(*test)(struct comm_req *req, bool *done);
    status *(*wait)(struct comm_req *req); /* NULL: comm_wait tests and sleeps */
    void (*abort)(struct comm *c, int code);
    /* c over the ranks of parent, for memory of dev; NULL in backends for host memory. */
    status *(*over)(struct comm *c, struct comm *parent, struct device *dev, double timeout_s);
    status *(*keep)(struct comm *c, void *buf, size_t bytes); /* NULL: nothing to do */
    /* Other threads may use other comms at the same time, and (host memory) test or wait for requests of this one. */
    bool thread_multiple;
};

struct comm {
    const struct comm_ops *ops;
    int rank, size;
    bool owns_runtime; /* the world of comm_open: close ends the runtime */
    /* Bytes this rank has given to others: the messages of exchanges, and what a ring would send in a collective:
     * 2 (size - 1) / size of a reduction, (size - 1) times its own part of an all-gather. Other calls are not counted.
     */
    uint64_t sent_bytes;
    /* Of exchanges: time from their start until they were found done (progress.h: by its thread), and of that what
     * their caller has waited for it. */
    uint64_t flight_ns, wait_ns;
    struct stream *stream; /* of the call under way, for the backend */
    void *impl;
};

/* The world of backend `name` ("self": one rank; "mpi"). Collective over the world. */
status *comm_open(const char *name, int *argc, char ***argv, struct comm **out) WARN_UNUSED;
/* Wrap (a duplicate of) the communicator whose MPI_Comm_c2f integer is `fortran_handle`; MPI stays the caller's to
 * initialise and end. Collective over that communicator. */
status *comm_from_mpi(int fortran_handle, struct comm **out) WARN_UNUSED;
/* The ranks of parent (duplicated) with messages of their own, for memory of `dev`; a duplicate of parent where that is
 * host memory. Buffers in host memory are moved by the parent's backend, as are barriers: one communicator serves both,
 * and what takes one for numbers on the host (comm_agree, norms, counts) may be given this. With device memory in all
 * buffers of a call on all its ranks:
 * - What `s` has been given before the call is waited for by the device, and what it is given after the call sees its
 *   results: the host waits for neither. comm_wait of an exchange likewise; comm_test says whether the device is done.
 *   comm_iallreduce has no stream: its input must be ready.
 * - Calls run in the order in which they were started, which must be the same on all their ranks: no exchange passes a
 *   reduction in flight. Inside one list of messages tags are matched as ever.
 * - An error of an earlier call may come back from a later one. A peer that died, or that has not joined a call for
 *   timeout_s seconds (0: 600) after this rank, is PEER, from then on from every call: the communicator is lost.
 * Collective. UNSUPPORTED: the build or the machine lacks the library, or it is too old; DEVICE. */
status *comm_over(struct comm *parent, struct device *dev, double timeout_s, struct comm **out) WARN_UNUSED;
/* These bytes of device memory will be in many calls: let the backend prepare them (until comm_close; they must live as
 * long). Not collective. Does nothing where there is nothing to prepare. */
status *comm_keep(struct comm *c, void *buf, size_t bytes) WARN_UNUSED;
/* NULL is fine. Requests must be done. Collective. */
void comm_close(struct comm *c);

/* The same ranks with messages of their own. Collective. */
status *comm_dup(struct comm *c, struct comm **out) WARN_UNUSED;
/* One communicator per color, its ranks ordered by key, then by rank in c. color < 0: *out = NULL. Collective. */
status *comm_split(struct comm *c, int color, int key, struct comm **out) WARN_UNUSED;
/* Collective. */
status *comm_barrier(struct comm *c) WARN_UNUSED;
/* Collective; the same `bytes` everywhere. */
status *comm_bcast(struct comm *c, void *buf, size_t bytes, int root, struct stream *s) WARN_UNUSED;
/* In place. Float results depend on the backend's order; where bits are promised use comm_exchange and add. Collective.
 */
status *comm_allreduce(struct comm *c, void *buf, size_t count, enum comm_type t, enum comm_op op,
                       struct stream *s) WARN_UNUSED;
/* out: size x bytes; `in` may be this rank's place in it. Collective. */
status *comm_allgather(struct comm *c, const void *in, void *out, size_t bytes, struct stream *s) WARN_UNUSED;
/* Rank r gives counts[r] bytes (its `bytes`); `out` at root holds them one after another; out, counts NULL elsewhere.
 * Collective */
status *comm_gatherv(struct comm *c, const void *in, size_t bytes, void *out, const size_t *counts,
                     int root) WARN_UNUSED;
status *comm_scatterv(struct comm *c, const void *in, const size_t *counts, void *out, size_t bytes,
                      int root) WARN_UNUSED;
/* Gather byte strings of any length at root: allocates *out (mem_free) and *counts there. Collective. */
status *comm_gather_bytes(struct comm *c, const void *in, size_t bytes, int root, void **out,
                          size_t **counts) WARN_UNUSED;
/* Send a byte string of any length from root; allocates *buf elsewhere (mem_free), with a zero byte after the end that
 * *bytes does not count. Collective. */
status *comm_bcast_bytes(struct comm *c, void **buf, size_t *bytes, int root) WARN_UNUSED;

/* Start a reduction; `in` and `out` (distinct) stay the request's until it is done. Collective to start. */
status *comm_iallreduce(struct comm *c, const void *in, void *out, size_t count, enum comm_type t, enum comm_op op,
                        struct comm_req *req) WARN_UNUSED;
/* Start all messages of the list at once. Every send has its receive in the peer's exchange: same tag, same bytes, in
 * the same order per pair. A message to oneself is copied. Buffers stay the request's until it is done. */
status *comm_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s,
                       struct comm_req *req) WARN_UNUSED;
/* The same; when all its messages are through, then(arg) is called, once: before comm_test says that it is done, or
 * comm_wait returns, inside one of these or on another thread (progress.h); here if nothing is to be sent or is done at
 * once. Not after an error. It must not use c; what it works on is its own until the request is done. */
status *comm_iexchange_then(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s,
                            void (*then)(void *arg), void *arg, struct comm_req *req) WARN_UNUSED;
status *comm_exchange(struct comm *c, const struct comm_xfer *x, size_t n, struct stream *s) WARN_UNUSED; /* and wait */
bool comm_pending(const struct comm_req *req);
status *comm_test(struct comm_req *req, bool *done) WARN_UNUSED; /* an empty request is done */
/* Test-and-sleep until done: leaves the core to others. */
status *comm_wait(struct comm_req *req) WARN_UNUSED;

/* End the whole job with this exit code. Does not return. */
void comm_abort(struct comm *c, int code) __attribute__((noreturn));

extern const struct comm_ops *const comm_registry[]; /* generated; ends with NULL */

#endif
