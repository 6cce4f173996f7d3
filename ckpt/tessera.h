/* tessera.h: save and reshard distributed arrays. The public API, and the only installed header. Manual:
 * docs/library.md.
 *
 * A job of ranks describes its tensors (each rank the pieces it holds), saves them while it goes on computing, and
 * loads them at any other number of ranks and any other cuts, with no conversion step.
 *
 *     struct tessera_options o = TESSERA_OPTIONS;
 *     o.url = "file:/scratch/run1";  o.mpi_comm = MPI_Comm_c2f(MPI_COMM_WORLD);
 *     tessera_open(&o, &t);                                   // collective
 *     tessera_state_new(t, &s);
 *     struct tessera_tensor a = TESSERA_TENSOR;
 *     a.part = "model"; a.name = "a"; a.dtype = TESSERA_F32; a.ndim = 2; a.shape = ...; a.offset = ...; a.length = ...;
 *     a.data = mine;
 *     tessera_state_add_tensor(s, &a);
 *     tessera_load_newest(t, s, &step);                       // NOT_FOUND: nothing saved yet
 *     for (...) {
 *         compute;
 *         tessera_fence(t, NULL, 0, NULL);
 *         overwrite;
 *         if (due) tessera_save(t, s, step);
 *         tessera_tick(t, &tick);
 *     }
 *     tessera_wait(t, NULL);  tessera_close(t);  tessera_state_free(s);
 *
 * Errors: a function that returns tessera_status returns NULL for success, else an error that the caller owns
 * (tessera_status_free). Outputs are set only on success, unless said otherwise. Nothing is printed and the process is
 * never ended. A function that is not collective and returns an error has changed nothing.
 *
 * Collective functions are called by all ranks of the handle, in the same order, with the same handle, step and other
 * plain arguments (each with its own state); steps that differ are one INVALID. They return an error on all ranks or on
 * none, and the same one; so all ranks can act on it alike. A rank that leaves alone (after an error of its own code,
 * say) leaves the others waiting: end the job with MPI_Abort. What is on storage is safe from that.
 *
 * Threads: a handle and the states used with it belong to one thread at a time, the "training thread": functions must
 * not run at once on one handle. A process may have several handles, on different roots. A writing handle has threads
 * of its own (one that copies, two with TESSERA_MERGE, `writers` that write, on rank 0 one that commits); they block
 * all signals and do not call MPI, so MPI_THREAD_FUNNELED is enough.
 *
 * Structs that the caller gives begin with `size`, set by their initialiser macro, so that fields can be added: any
 * size from that of the first release on is fine, and nothing behind it is read or written. In C++ write `struct
 * tessera_tick`: a function has that name too. */
#ifndef TESSERA_H
#define TESSERA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tessera_status tessera_status; /* an error; never changes */
typedef struct tessera tessera;               /* a handle on one checkpoint root */
typedef struct tessera_state tessera_state;   /* a list of what to save or load */

/* Error codes: what the caller can do about it. The numbers never change. */
enum {
    TESSERA_OK = 0,
    TESSERA_INVALID = 1,      /* an argument or the state is wrong: fix the program or its input */
    TESSERA_NOT_FOUND = 2,    /* what was named is not there */
    TESSERA_EXISTS = 3,       /* what was to be made is there already: another live job, a committed step */
    TESSERA_NO_MEMORY = 4,    /* memory ran out */
    TESSERA_IO = 5,           /* a read or write failed for good */
    TESSERA_NO_SPACE = 6,     /* storage is full or over quota */
    TESSERA_CORRUPT = 7,      /* stored bytes are not what was written: use another step */
    TESSERA_UNAVAILABLE = 8,  /* not now: a save is in flight, or the system said to try again */
    TESSERA_TIMEOUT = 9,      /* a deadline passed */
    TESSERA_CANCELLED = 10,   /* another job has taken the root over: this one cannot save there any more */
    TESSERA_PEER = 11,        /* another rank, or MPI, failed */
    TESSERA_DEVICE = 12,      /* an accelerator failed or is missing */
    TESSERA_UNSUPPORTED = 13, /* this build or this storage cannot do it */
    TESSERA_INTERNAL = 14     /* a bug of this library: please report it */
};
int tessera_status_code(const tessera_status *st);            /* TESSERA_OK for NULL */
const char *tessera_status_message(const tessera_status *st); /* "" for NULL; lives as long as st */
int tessera_status_rank(const tessera_status *st);            /* the rank that failed, or -1 */
void tessera_status_free(tessera_status *st);                 /* NULL is fine */

/* Element types. The numbers are stored in files. Bytes are stored as they are in memory; nothing is converted. */
enum {
    TESSERA_F64 = 1,
    TESSERA_F32 = 2,
    TESSERA_F16 = 3,    /* IEEE binary16 */
    TESSERA_BF16 = 4,   /* upper half of an F32 */
    TESSERA_F8E4M3 = 5, /* one byte each: 8-bit floats and the power-of-two scale */
    TESSERA_F8E5M2 = 6,
    TESSERA_E8M0 = 7,
    TESSERA_U4X2 = 8, /* two 4-bit values a byte; the byte is the element that shapes and offsets count */
    TESSERA_I64 = 9,
    TESSERA_I32 = 10,
    TESSERA_I16 = 11,
    TESSERA_I8 = 12,
    TESSERA_U64 = 13,
    TESSERA_U32 = 14,
    TESSERA_U16 = 15,
    TESSERA_U8 = 16,
    TESSERA_BOOL = 17 /* one byte */
};
/* How a save stores runs of boxes. A load gives back the same bytes for all of them. */
enum {
    TESSERA_AS_GIVEN = 0, /* as they are: nothing is sent. A load cuts them into boxes */
    TESSERA_MERGE = 1,    /* the runs that make up a box are sent, while training goes on, to one of the ranks that have
                           * a part of it, which stores the box: a dataset of all its dimensions */
    TESSERA_GATHER = 2    /* the same files; but tessera_save itself waits until all ranks that have a part of a box
                           * have received all of it, as the loads and saves of other systems do. To compare with */
};
enum { TESSERA_DIMS = 8 }; /* most dimensions of a tensor */

/* ---- A handle on one checkpoint root ---------------------------------------- */

/* Alike on all ranks, but for build, warn and warn_arg, which matter on rank 0 alone. Texts are copied. */
struct tessera_options {
    size_t size;
    const char *url; /* file:PATH, file:///PATH or a bare path: a directory that all ranks see; a
                      * writing handle makes it, with its parents. mem: is this rank's memory, for tests of one rank */
    int mpi_comm;    /* MPI_Comm_c2f of the communicator (in Fortran, the handle itself); duplicated. MPI must be
                      * running until tessera_close. -1: this process alone, without MPI */
    int read_only;   /* 1: no lease; any number of readers beside one writer. Nothing is written but, where this
                      * job may write, a pin (PINS/...) from a find to the end of the load: it keeps that step from a
                      * writer's retention, for a minute at most if this job dies */
    int keep_last;   /* committed steps that stay, at least 0; older ones are removed after a commit; 0: all stay */
    int rewind;      /* 1: loading a step below the newest retires the later ones; 0: that is INVALID */
    uint64_t staging_bytes; /* cap of the staging pool of this rank; 0: the bytes this rank writes in a save, in whole
                             * chunks. With less, fences may wait for storage. 2 MiB and 256 KiB a writer are always
                             * taken. Of the pool 15/16 less 8 MiB are resident from the first save on, the rest once it
                             * is needed */
    /* Most that is captured and written as one; 0: 16 MiB; a multiple of 4 KiB. Whole MiB are used: at least 1, at most
     * half of staging_bytes and a 16th of what this rank writes. A rank that writes no more than this has all of it
     * staged at once */
    uint64_t chunk_bytes;
    int writers; /* writer threads of this rank, at most 64; 0: 2; on object storage, where each has a request of its
                  * own under way, 4 a core shared by the ranks of a node, at least 2 and at most 8 a rank */
    uint32_t lease_seconds; /* a job that has not renewed its lease for this long is taken for dead; 0: 30 */
    const char *build;      /* text stored as the writer's identity, for people; may be NULL */
    int mesh[5]; /* sizes of pp, dp, ep, cp, tp stored for information; all zeros: dp = all ranks, else 0 is 1
                  * and their product is the number of ranks */
    /* Told what people should know (a taken-over lease, a step found damaged, and where): a line without its newline,
     * valid during the call. On rank 0, in the training thread, out of a function of this library; must call none.
     * NULL: dropped */
    void (*warn)(void *arg, const char *line);
    void *warn_arg; /* given to warn */
    /* With keep_last above 0, these stay too: */
    uint64_t keep_every;     /* steps that it divides; 0: none */
    int keep_best;           /* so many of the steps marked with keep_metric (tessera_mark), the best ones; 0: none */
    int keep_lowest;         /* 1: the best are the smallest values; 0: the largest */
    const char *keep_metric; /* needed with keep_best; may be NULL without */
    int view; /* view.h5 beside a step's files, for h5py and h5dump: every tensor whole. Written after the commit, by
               * rank 0's thread, and only where the root is a directory. 0: for steps of up to 20,000 pieces; 1: of any
               * number; -1: never */
    /* 1: tensors added as frozen are stored by reference (tessera_reference) to the newest committed step where that
     * has their bytes. Checked when a plan is made, at the second save of a state at the latest: every stored block
     * whose bytes a rank holds in one stretch is compared by its checksum, and a tensor of which every block was found
     * and none differed is not written again. What was saved at another cut is written once more first. From then on
     * `frozen` is taken at its word: the caller must not change the bytes while the state is used */
    int reference_frozen;
    /* How runs that are no boxes of their tensors are stored: TESSERA_AS_GIVEN (0), TESSERA_MERGE or TESSERA_GATHER.
     * TESSERA_MERGE takes memory for the runs that this rank gives, once, as part of staging_bytes, or beyond it if
     * that is less; tessera_tick and tessera_fence move its messages on. TESSERA_GATHER takes memory for the boxes that
     * this rank stores and for the largest other one that it has a part of; tessera_save then waits for the other ranks
     */
    int irregular;
};
#define TESSERA_OPTIONS                                                                                                \
    {                                                                                                                  \
        sizeof(struct tessera_options), NULL, -1, 0, 0, 0, 0, 0, 0, 0, NULL, { 0, 0, 0, 0, 0 }, NULL, NULL, 0, 0, 0,   \
            NULL, 0, 0, 0                                                                                              \
    }

/* Open a root. Collective. Unless read_only, draws a new 64-bit attempt and takes the root's lease: a second live job
 * on one root is EXISTS, with its host, attempt and age (a job on this host whose process is gone does not count as
 * live; elsewhere this waits up to lease_seconds to see whether the lease is renewed). NOT_FOUND: read_only and no such
 * root. INVALID: an option, MPI is not running, or mpi_comm is no communicator (this last one may differ between
 * ranks). MPI stays the caller's: it is neither started nor ended here. */
tessera_status *tessera_open(const struct tessera_options *o, tessera **out);
/* Wait for the save in flight (tessera_wait), give the lease back and free. Collective; before MPI_Finalize. Returns
 * the save's error if it was not reported yet; the handle is gone in any case. NULL is fine. */
tessera_status *tessera_close(tessera *t);

/* ---- What is saved and loaded ---------------------------------------- */

/* A tensor of a committed step that holds the bytes of one to be saved. */
struct tessera_reference {
    size_t size;
    const char *url;         /* of the root of that step; NULL: the handle's own */
    uint64_t step;           /* of the same root: one before the step that is saved */
    const char *part, *name; /* there; NULL: the tensor's own. An alias stands for its tensor */
};
#define TESSERA_REFERENCE                                                                                              \
    {                                                                                                                  \
        sizeof(struct tessera_reference), NULL, 0, NULL, NULL                                                          \
    }

/* A piece that this rank holds of a tensor: a box of it, or a run of a box. */
struct tessera_tensor {
    size_t size;
    const char *part; /* "model", "optim", "role/part": files of its own; segments of [A-Za-z0-9._-] joined by
                       * '/', none "." or "..", at most 127 bytes */
    const char *name; /* unique in its part; any text without NUL up to 255 bytes, no empty path segment, no "."
                       * or ".." segment */
    int dtype;        /* TESSERA_F64 ... */
    int ndim;         /* 0 (a scalar: one element, no shape) to TESSERA_DIMS */
    uint64_t shape[TESSERA_DIMS];  /* of the whole tensor, last index fastest; 0 is allowed */
    uint64_t offset[TESSERA_DIMS]; /* of this rank's box */
    uint64_t length[TESSERA_DIMS]; /* of this rank's box; 0 is allowed: an empty piece */
    uint64_t run_begin;            /* a run [begin, end) of the box's row-major order, in elements; both 0: all of it */
    uint64_t run_end;
    const int64_t *stride; /* of the memory, in elements, one a dimension, may be negative; NULL: contiguous. With
                            * strides `data` is the box's first element, also when there is a run */
    void *data;            /* host memory: the piece's first element. Read by a save until the fence, written by a
                            * load. NULL if the piece is empty */
    int frozen;            /* 1: not trainable; stored as an attribute, and see tessera_options.reference_frozen */
    const char *alias_of;  /* name of the tensor of this part that shares the bytes (tied weights), with the same
                            * dtype and shape, itself no alias; then offset, length, run, stride and data are not
                            * used, and a load fills its target, once. NULL: no alias */
    /* Not NULL: a save writes no bytes of the tensor, but a reference to bytes stored before: a tensor of the same
     * dtype and shape, the same reference on all ranks that add it. The save fails with NOT_FOUND or INVALID if it is
     * not there. data, offset, length and run are of no use to a save then (a piece may be empty on every rank), a load
     * fills them as ever. What is recorded is the step that holds the bytes, also where the one named refers on itself;
     * in the same root retention, `tessera ckpt rm` and gc keep it as long as a step that refers to it stays. In
     * another root that is the caller's to see to. Copied */
    const struct tessera_reference *reference;
};
#define TESSERA_TENSOR                                                                                                 \
    {                                                                                                                  \
        sizeof(struct tessera_tensor), NULL, NULL, 0, 0, { 0 }, { 0 }, { 0 }, 0, 0, NULL, NULL, 0, NULL, NULL          \
    }

/* An empty list of tensors and blobs, owned by the caller and freed before or after the handle. It can be saved and
 * loaded any number of times, and with other handles. Not collective. NO_MEMORY. */
tessera_status *tessera_state_new(tessera *t, tessera_state **out);
void tessera_state_free(tessera_state *s); /* NULL is fine; not while a save of it is in flight */
/* Add a piece. Texts and strides are copied, data is borrowed: it must stay where it is as long as the state is used.
 * A rank adds any number of pieces of one tensor, also none; equal pieces on several ranks are replicas: they must hold
 * the same bytes and are written once. To be saved, the pieces of all ranks together must cover each tensor exactly
 * once; to be loaded, they may be any. Capture and fence follow the order of adding: add first what is overwritten
 * first. Not collective. INVALID names the tensor and what is wrong; NO_MEMORY. */
tessera_status *tessera_state_add_tensor(tessera_state *s, const struct tessera_tensor *d);
/* Add named bytes, or replace those of that part and name (copied now; data may be NULL if bytes is 0). part and name
 * as in tessera_tensor. per_rank 0: the same on all ranks, rank 0's are stored; 1: one for each rank. Blobs of up to 64
 * KiB each and 4 MiB in all go into the metadata; larger ones: INVALID (add a u8 tensor). A load leaves a state's blobs
 * alone: tessera_blob reads the stored ones. Not collective. INVALID, NO_MEMORY. */
tessera_status *tessera_state_add_blob(tessera_state *s, const char *part, const char *name, int per_rank,
                                       const void *data, size_t bytes);

/* ---- Saving ---------------------------------------- */

/* Start saving `step`. Collective. Queues the capture and returns: no disk or network I/O, no barrier. The tensors are
 * read until tessera_fence and must not be written before. The step counts only when tessera_tick or tessera_wait
 * reported it committed. Steps grow; any number below UINT64_MAX. EXISTS: this attempt has committed that step already
 * (one of an earlier attempt is replaced); UNAVAILABLE: a save is in flight; INVALID: a newer committed step exists
 * (tessera_rewind), the handle is read_only, s is NULL. On error nothing was queued; one for the step or the state
 * waits until all ranks have called. What is wrong between ranks (pieces that leave a gap or overlap, another shape,
 * dtype or step elsewhere) is found later: INVALID from tessera_tick or tessera_wait. */
tessera_status *tessera_save(tessera *t, tessera_state *s, uint64_t step);
/* Wait until the bytes [addr, addr + bytes) of the save in flight have been copied out and may be overwritten, as may
 * all tensors added before them; addr NULL: all. stream: the one that will overwrite (NULL on the CPU): on a GPU it is
 * that stream that waits, and the host only until the copies have been queued. The first call
 * of fence, tick, find or list_steps after a save is collective (it settles the plan), other fences are local. Returns
 * at once when there is no save. Never fails because the save did: that is reported by tick. PEER: MPI failed. */
tessera_status *tessera_fence(tessera *t, const void *addr, size_t bytes, void *stream);

/* Where the save in flight is, the same on all ranks. */
enum tessera_phase {
    TESSERA_IDLE,    /* there is none */
    TESSERA_CAPTURE, /* some rank is still copying tensors */
    TESSERA_WRITE,   /* all are copied; some rank is still writing */
    TESSERA_VOTE,    /* all files are durable; rank 0 gathers their lengths and checksums */
    TESSERA_COMMIT   /* rank 0 writes metadata.pb */
};
struct tessera_tick {
    size_t size;
    int32_t flag[4];    /* in: this rank's, of any meaning; out: the maximum over ranks of what they gave at the tick
                         * before (0 at the first), the same everywhere: for what all ranks must do at the same step */
    int phase;          /* out: enum tessera_phase, the same everywhere */
    uint64_t committed; /* out: the step that this call found committed, or UINT64_MAX; each is reported once */
};
#define TESSERA_TICK                                                                                                   \
    {                                                                                                                  \
        sizeof(struct tessera_tick), { 0, 0, 0, 0 }, 0, UINT64_MAX                                                     \
    }
/* Move the save on: completes the reduction that the last tick started and starts the next. Collective, called every
 * step; does not wait for storage. io may be NULL: what it would have told is kept for the next tick that asks. An
 * error is the failed save's, the same on all ranks, once; the outputs are set then too, the handle is idle again and
 * what the save wrote is removed. PEER: MPI failed; the handle can only be closed. */
tessera_status *tessera_tick(tessera *t, struct tessera_tick *io);
/* Tick until idle. *committed (may be NULL) is set always: as in tessera_tick, UINT64_MAX on an error. Collective.
 * Errors as tessera_tick. */
tessera_status *tessera_wait(tessera *t, uint64_t *committed);
/* Stop the save in flight and remove what it wrote; at once when idle. If it was committed before all ranks knew, it
 * counts and the next tick reports it. Collective. */
tessera_status *tessera_cancel(tessera *t);

/* Of this rank, unless said otherwise. */
struct tessera_progress {
    size_t size;
    int phase;                   /* enum tessera_phase */
    uint64_t step;               /* being saved; when idle, the newest committed one (0 if there is none) */
    uint64_t total_bytes;        /* that this rank writes in such a save, without headers */
    uint64_t captured_bytes;     /* of them, copied out, or written without a copy, so far */
    uint64_t written_bytes;      /* of them, given to storage so far */
    uint64_t staging_cap_bytes;  /* size of the staging pool */
    uint64_t staging_peak_bytes; /* most of it in use at once so far */
    uint64_t call_ns;            /* of the save in flight or the last one: time inside tessera_save */
    uint64_t fence_wait_ns;      /* of the same: waits in fences */
    uint64_t save_ns;            /* from tessera_save to committed, of the last finished save */
    uint64_t saves, failures;    /* since tessera_open: committed, failed; alike on all ranks */
    uint64_t live_bytes;         /* of written_bytes: straight from the tensors, never copied */
    uint64_t wire_bytes;         /* of tensors, sent to other ranks in such a save (options.irregular) */
    uint64_t plan_ns;            /* the last plan that was made: descriptors to rank 0, planning, parts back */
};
#define TESSERA_PROGRESS                                                                                               \
    {                                                                                                                  \
        sizeof(struct tessera_progress), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                   \
    }
/* Not collective; at any time, waits for nothing. */
void tessera_get_progress(tessera *t, struct tessera_progress *out);
/* Store a metric of a committed step beside it, for keep_best and for people (`tessera ckpt mark` does the same later
 * on): finite, its name of at most 127 letters, digits and "._-/". Not collective: rank 0's is stored, by its thread,
 * before the next commit; other ranks' calls do nothing. What goes wrong there is told to options.warn. INVALID: no
 * metric, or the handle is read_only; NO_MEMORY. */
tessera_status *tessera_mark(tessera *t, uint64_t step, const char *metric, double value);

/* ---- Finding a step ---------------------------------------- */

#define TESSERA_NEWEST UINT64_MAX
/* The newest step at or below `at_most` (TESSERA_NEWEST: any) whose metadata and file sizes check out, passing over
 * steps found damaged before. Its blobs and shapes can be read then. Collective. NOT_FOUND: there is none; CORRUPT:
 * there are only damaged ones (the words say where the first is, `warn` was told of each). */
tessera_status *tessera_find(tessera *t, uint64_t at_most, uint64_t *step);
/* ---- What a step holds ---------------------------------------- */

/* The committed steps, ascending, whole or not: the first `room` of them into step (may be NULL if room is 0), their
 * number into *count. Collective; room may differ. */
tessera_status *tessera_list_steps(tessera *t, uint64_t *step, size_t room, size_t *count);

/* The functions below speak of the step that tessera_find or tessera_load settled on. Texts and bytes are borrowed
 * until the next find, load, rewind or close. Not collective. NOT_FOUND also: no step yet. */
struct tessera_step {
    size_t size;
    uint64_t step;
    uint64_t time_ns; /* of its commit, since 1970 */
    uint64_t attempt, parent_attempt, run_id;
    uint64_t tensors, blobs; /* how many it holds */
    const char *build;
    int ranks;   /* that saved it */
    int mesh[5]; /* as in tessera_options */
};
#define TESSERA_STEP                                                                                                   \
    {                                                                                                                  \
        sizeof(struct tessera_step), 0, 0, 0, 0, 0, 0, 0, NULL, 0,                                                     \
        {                                                                                                              \
            0, 0, 0, 0, 0                                                                                              \
        }                                                                                                              \
    }
tessera_status *tessera_get_step(tessera *t, struct tessera_step *out);
/* A blob; rank -1 for one that was added with per_rank 0, else the rank that saved it. NOT_FOUND: no such blob. */
tessera_status *tessera_blob(tessera *t, const char *part, const char *name, int rank, const void **data,
                             size_t *bytes);
/* Whether the step holds a tensor: fills dtype, ndim and shape of d (others untouched). NOT_FOUND. */
tessera_status *tessera_stored(tessera *t, const char *part, const char *name, struct tessera_tensor *d);
/* The i-th tensor, sorted by part, then name: fills part, name, dtype, ndim, shape, frozen, alias_of and reference (to
 * the step that holds its bytes; valid until the next call; NULL: this one) of d. A part is what its tensors name.
 * NOT_FOUND: i is not below tessera_step's `tensors`. */
tessera_status *tessera_stored_at(tessera *t, uint64_t i, struct tessera_tensor *d);
struct tessera_blob_info {
    size_t size;
    const char *part, *name;
    int rank; /* as in tessera_blob */
    const void *data;
    size_t bytes;
};
#define TESSERA_BLOB_INFO                                                                                              \
    {                                                                                                                  \
        sizeof(struct tessera_blob_info), NULL, NULL, 0, NULL, 0                                                       \
    }
/* The i-th blob. NOT_FOUND: i is not below tessera_step's `blobs`. */
tessera_status *tessera_blob_at(tessera *t, uint64_t i, struct tessera_blob_info *b);

/* ---- Loading ---------------------------------------- */

/* Fill every tensor of s from `step`, whatever cuts it was saved with; what else is stored stays unread
 * (tessera_load_parts with ALLOW_UNEXPECTED). Collective. Each wanted byte is read by one rank and its checksum
 * verified. CORRUPT names step, file, tensor and offset; the step is then passed over by tessera_find, and retired
 * (renamed step-N.bad-ATTEMPT) when an older one has been loaded by a writing handle. NOT_FOUND: no such step, or it
 * lists tensors of s that are not stored; INVALID: shape or dtype differ, or a newer valid step would be lost
 * (options.rewind); UNAVAILABLE: a save is in flight. After an error the tensors' contents are undefined. A writing
 * handle goes on from the step: no save may be below it. */
tessera_status *tessera_load(tessera *t, tessera_state *s, uint64_t step);
/* What may differ between a state and a step without an error, or'ed. */
enum {
    TESSERA_ALLOW_MISSING = 1,    /* wanted and not stored: the tensor's memory stays as it is */
    TESSERA_ALLOW_UNEXPECTED = 2, /* stored, in a part that is loaded from and under a name that is selected, and wanted
                                   * by no rank: stays unread */
    TESSERA_ALLOW_MISSHAPEN = 4,  /* stored with another shape or type: the memory stays as it is */
    TESSERA_LENIENT = 7,          /* all of them */
    TESSERA_ALLOW_CAST = 8        /* f64, f32, f16 and bf16 fill each other: rounded once, to nearest even; too large
                                   * becomes infinite, NaN stays NaN. Without it, and between other types, a type that
                                   * differs is misshapen */
};
/* Lists of texts end with NULL; NULL or an empty list: everything. A pattern is a glob of POSIX fnmatch where `*` and
 * `?` match '/' too; "!PATTERN" takes away what earlier ones let in, the last one that fits decides, and a list that
 * begins with "!" begins with everything. Both speak of parts and names as the state has them. */
struct tessera_load_options {
    size_t size;
    const char *const *parts; /* patterns: load only what is in these parts */
    const char *const *names; /* patterns: of them, load only what has these names */
    const char *const *roles; /* "WANTED=STORED": a part of the state that is WANTED, or begins with WANTED/, is read
                               * from STORED instead; the first that fits counts. "policy/model=model"; all of a role:
                               * "policy="; into a role: "=policy" */
    int allow;                /* TESSERA_ALLOW_...; 0: strict */
};
#define TESSERA_LOAD_OPTIONS                                                                                           \
    {                                                                                                                  \
        sizeof(struct tessera_load_options), NULL, NULL, NULL, 0                                                       \
    }
/* As tessera_load, for the selected tensors of s; the others' memory is not touched. o NULL: everything, strict. What
 * is missing, unexpected or misshapen is seen before anything is read. INVALID also: an option, nothing of s is
 * selected, unexpected or misshapen tensors; NOT_FOUND: missing ones. The words name the first of each,
 * tessera_load_name all. Collective. A writing handle goes on from the step as after tessera_load; to begin a new run
 * with another's model, use a read_only handle on its root. */
tessera_status *tessera_load_parts(tessera *t, tessera_state *s, uint64_t step, const struct tessera_load_options *o);
enum tessera_load_list { TESSERA_MISSING = 1, TESSERA_UNEXPECTED = 2, TESSERA_MISSHAPEN = 3 };
/* The i-th "part/name" of what the last load (that got as far as comparing) found missing, unexpected or misshapen on
 * any rank, allowed or not; sorted, each once, the same on all ranks; NULL: there are not so many. Unexpected ones have
 * their stored names, others the state's. Valid until the next load or close. Not collective. */
const char *tessera_load_name(tessera *t, int list, uint64_t i);
/* tessera_find and tessera_load from the newest step down until one loads. Collective. NOT_FOUND: none is there;
 * CORRUPT: none is whole; else errors as tessera_load. A step that is removed by its writer while a read_only handle
 * reads it is passed over for a newer one. */
tessera_status *tessera_load_newest(tessera *t, tessera_state *s, uint64_t *step);
/* Retire every committed step above `step` (rename to step-N.retired-ATTEMPT); TESSERA_NEWEST: every step. Collective.
 * INVALID: the handle is read_only; UNAVAILABLE: a save is in flight. */
tessera_status *tessera_rewind(tessera *t, uint64_t step);

/* Fill the tensors of `to` from those of `from`, in memory: from one mesh to another on the same ranks (training to
 * generation), each rank with a state of its own for either, which may be empty. Selection, roles, casts and what may
 * differ are as in tessera_load_parts, with `from` in the place of the step (its tensors must be whole over all ranks:
 * else INVALID, as in a save); tessera_load_name tells what did not fit. Nothing is read or written on storage. Memory
 * of `to` must not be that of `from`. Blobs stay. Collective. After an error the contents of `to` are undefined.
 * UNSUPPORTED: memory of an accelerator. */
tessera_status *tessera_reshard(tessera *t, const tessera_state *from, tessera_state *to,
                                const struct tessera_load_options *o);

/* Sums over all ranks; the same on all but for ns. */
struct tessera_load_report {
    size_t size;
    uint64_t storage_bytes; /* read from storage: whole checksum blocks of 1 MiB */
    uint64_t unique_bytes;  /* stored bytes that some rank wanted, each counted once */
    uint64_t ns;            /* the call, on this rank */
    uint64_t wire_bytes;    /* of tensors, sent from rank to rank */
};
#define TESSERA_LOAD_REPORT                                                                                            \
    {                                                                                                                  \
        sizeof(struct tessera_load_report), 0, 0, 0, 0                                                                 \
    }
/* Of the last load that succeeded. Not collective. */
void tessera_get_load_report(tessera *t, struct tessera_load_report *out);

#ifdef __cplusplus
}
#endif
#endif
