/* tessera.h: save and reshard distributed arrays. The public API, and the only installed header.
 *
 * A job of ranks describes its tensors (each rank the pieces it holds), saves them while it goes on computing, and loads them at any
 * other number of ranks and any other cuts, with no conversion step.
 *
 *     struct tessera_options o = TESSERA_OPTIONS;
 *     o.url = "file:/scratch/run1";  o.mpi_comm = MPI_Comm_c2f(MPI_COMM_WORLD);
 *     tessera_open(&o, &t);                                   // collective
 *     tessera_state_new(t, &s);
 *     struct tessera_tensor a = TESSERA_TENSOR;
 *     a.part = "model"; a.name = "a"; a.dtype = TESSERA_F32; a.ndim = 2; a.shape = ...; a.offset = ...; a.length = ...; a.data = mine;
 *     tessera_state_add_tensor(s, &a);
 *     tessera_load_newest(t, s, &step);                       // NOT_FOUND: nothing saved yet
 *     for (...) { compute; tessera_fence(t, NULL, 0, NULL); overwrite; if (due) tessera_save(t, s, step); tessera_tick(t, &tick); }
 *     tessera_wait(t);  tessera_close(t);
 *
 * Errors: every function returns NULL or an error object that the caller owns (tessera_status_free). Collective functions are called by
 * all ranks of the handle in the same order and return an error on all of them or on none. "Training thread" is the one thread
 * that calls this library. Structs that the caller fills begin with `size`, set by their initialiser macro, so that fields can be added. */
#ifndef TESSERA_H
#define TESSERA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tessera_status tessera_status;
typedef struct tessera tessera;
typedef struct tessera_state tessera_state;

/* Error codes: what the caller can do about it. */
enum {
    TESSERA_OK = 0, TESSERA_INVALID = 1, TESSERA_NOT_FOUND = 2, TESSERA_EXISTS = 3, TESSERA_NO_MEMORY = 4, TESSERA_IO = 5,
    TESSERA_NO_SPACE = 6, TESSERA_CORRUPT = 7, TESSERA_UNAVAILABLE = 8, TESSERA_TIMEOUT = 9, TESSERA_CANCELLED = 10,
    TESSERA_PEER = 11, TESSERA_DEVICE = 12, TESSERA_UNSUPPORTED = 13, TESSERA_INTERNAL = 14
};
int tessera_status_code(const tessera_status *st);            /* TESSERA_OK for NULL */
const char *tessera_status_message(const tessera_status *st); /* "" for NULL; lives as long as st */
int tessera_status_rank(const tessera_status *st);            /* the rank that failed, or -1 */
void tessera_status_free(tessera_status *st);                 /* NULL is fine */

/* Element types. The numbers are stored in files. */
enum {
    TESSERA_F64 = 1, TESSERA_F32 = 2, TESSERA_F16 = 3, TESSERA_BF16 = 4, TESSERA_F8E4M3 = 5, TESSERA_F8E5M2 = 6, TESSERA_E8M0 = 7,
    TESSERA_U4X2 = 8, TESSERA_I64 = 9, TESSERA_I32 = 10, TESSERA_I16 = 11, TESSERA_I8 = 12, TESSERA_U64 = 13, TESSERA_U32 = 14,
    TESSERA_U16 = 15, TESSERA_U8 = 16, TESSERA_BOOL = 17
};
enum { TESSERA_DIMS = 8 };

/* ---- A handle on one checkpoint root ------------------------------------------------------------------------------------------ */

struct tessera_options {
    size_t size;
    const char *url;         /* file:PATH, file:///PATH or a bare path; mem: */
    int mpi_comm;            /* MPI_Comm_c2f of the communicator (in Fortran, the handle itself); duplicated. -1: this process alone */
    int read_only;           /* 1: no lease, nothing is ever written */
    int keep_last;           /* committed steps that stay; 0: all */
    int rewind;              /* 1: loading a step below the newest retires the later ones; 0: that is INVALID */
    uint64_t staging_bytes;  /* cap of the staging pool of this rank, at least 2 MiB; 0: the bytes this rank writes in a save */
    uint64_t chunk_bytes;    /* unit of capture and writing; 0: 16 MiB; a multiple of 4 KiB. Used in whole MiB, at least 1, at most half of staging_bytes */
    int writers;             /* writer threads of this rank; 0: 1 */
    uint32_t lease_seconds;  /* a job that has not renewed its lease for this long is taken for dead; 0: 30 */
    const char *build;       /* text stored as the writer's identity; may be NULL */
    int mesh[5];             /* sizes of pp, dp, ep, cp, tp stored for information; all zeros: dp = all ranks, else 0 is 1 */
    void (*warn)(void *arg, const char *line); /* what people should know (a taken-over lease, a step found damaged); NULL: dropped. Rank 0 */
    void *warn_arg;
};
#define TESSERA_OPTIONS { sizeof(struct tessera_options), NULL, -1, 0, 0, 0, 0, 0, 0, 0, NULL, { 0, 0, 0, 0, 0 }, NULL, NULL }

/* Open a root. Collective. Unless read_only, draws a new 64-bit attempt and takes the root's lease: a second live job on one root is EXISTS, with its host,
 * attempt and age (a job on this host whose process is gone does not count as live; elsewhere this waits up to lease_seconds to see whether
 * the lease is renewed). NOT_FOUND: read_only and no such root. MPI stays the caller's. */
tessera_status *tessera_open(const struct tessera_options *o, tessera **out);
/* Wait for the save in flight (tessera_wait), give the lease back and free. Collective. Returns the save's error if it was not
 * reported yet. NULL is fine. */
tessera_status *tessera_close(tessera *t);

/* ---- What is saved and loaded --------------------------------------------------------------------------------------------------- */

struct tessera_tensor {
    size_t size;
    const char *part;       /* "model", "optim", "role/part": loads independently; segments of [A-Za-z0-9._-] joined by '/' */
    const char *name;       /* unique in its part; any text without NUL up to 255 bytes, no empty path segment, no "." or ".." segment */
    int dtype;
    int ndim;               /* 0 for a scalar */
    uint64_t shape[TESSERA_DIMS];  /* of the whole tensor */
    uint64_t offset[TESSERA_DIMS]; /* of this rank's box */
    uint64_t length[TESSERA_DIMS];
    uint64_t run_begin, run_end; /* a run of the box's row-major order, in elements; both 0: the whole box */
    const int64_t *stride;  /* of the memory, in elements, one a dimension; NULL: contiguous. With strides, `data` is the box's first element */
    void *data;             /* read by save until the fence, written by load */
    int frozen;             /* 1: not trainable; stored as an attribute */
    const char *alias_of;   /* name of the tensor of this part that shares the bytes (tied weights); then data is not used */
};
#define TESSERA_TENSOR { sizeof(struct tessera_tensor), NULL, NULL, 0, 0, { 0 }, { 0 }, { 0 }, 0, 0, NULL, NULL, 0, NULL }

/* An empty list of tensors and blobs, owned by the caller and freed before or after the handle. Not collective. */
tessera_status *tessera_state_new(tessera *t, tessera_state **out);
void tessera_state_free(tessera_state *s); /* NULL is fine; not while a save of it is in flight */
/* Add a piece that this rank holds. Texts and strides are copied, data is borrowed. A rank adds any number of pieces of one tensor, also none;
 * equal pieces on several ranks are replicas and are written once. Capture and fence follow the order of adding. Not collective.
 * INVALID names the tensor and what is wrong. */
tessera_status *tessera_state_add_tensor(tessera_state *s, const struct tessera_tensor *d);
/* Add or replace named bytes (copied now). per_rank 0: the same on all ranks, rank 0's are stored; 1: one for each rank. Blobs of up to 64 KiB
 * each and 4 MiB in all go into the metadata; larger ones: INVALID (add a u8 tensor). Not collective. */
tessera_status *tessera_state_add_blob(tessera_state *s, const char *part, const char *name, int per_rank, const void *data, size_t bytes);

/* ---- Saving -------------------------------------------------------------------------------------------------------------------- */

/* Start saving `step`. Collective; training thread. Queues the capture and returns: no disk or network I/O, no barrier. The
 * tensors are read until tessera_fence and must not be written before. The step counts only when tessera_tick or tessera_wait reported it
 * committed. EXISTS: this attempt has committed that step already; UNAVAILABLE: a save is in flight; INVALID: a newer committed step exists
 * (rewind). On error nothing was queued. */
tessera_status *tessera_save(tessera *t, tessera_state *s, uint64_t step);
/* Wait until the bytes [addr, addr + bytes) of the save in flight have been copied out and may be overwritten; addr NULL: all. stream: the one that will
 * overwrite (NULL on the CPU). The first call after a save is collective (it settles the plan), the others are local. Never fails because
 * the save did: that is reported by tick. */
tessera_status *tessera_fence(tessera *t, const void *addr, size_t bytes, void *stream);

enum tessera_phase { TESSERA_IDLE, TESSERA_CAPTURE, TESSERA_WRITE, TESSERA_VOTE, TESSERA_COMMIT };
struct tessera_tick {
    size_t size;
    int32_t flag[4];        /* in: this rank's; out: the maximum over ranks of what they gave at the tick before, the same everywhere */
    int phase;              /* out: enum tessera_phase, the same everywhere */
    uint64_t committed;     /* out: the step that this call found committed, or UINT64_MAX */
};
#define TESSERA_TICK { sizeof(struct tessera_tick), { 0, 0, 0, 0 }, 0, UINT64_MAX }
/* Move the save on: completes the reduction that the last tick started and starts the next. Collective, called every step; does not
 * wait for storage. io may be NULL. An error is the failed save's, the same on all ranks, once; the handle is idle again and what the save
 * wrote is removed. */
tessera_status *tessera_tick(tessera *t, struct tessera_tick *io);
/* Tick until idle; *committed (may be NULL) as in tessera_tick. Collective. */
tessera_status *tessera_wait(tessera *t, uint64_t *committed);
/* Stop the save in flight and remove what it wrote; at once when idle. Collective. */
tessera_status *tessera_cancel(tessera *t);

struct tessera_progress {
    size_t size;
    int phase;
    uint64_t step, total_bytes, captured_bytes, written_bytes; /* of this rank */
    uint64_t staging_cap_bytes, staging_peak_bytes;
    uint64_t call_ns, fence_wait_ns; /* of the save in flight or the last one: time inside tessera_save, waits in fences */
    uint64_t save_ns;                /* from tessera_save to committed, of the last finished save */
    uint64_t saves, failures;
};
#define TESSERA_PROGRESS { sizeof(struct tessera_progress), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
void tessera_get_progress(tessera *t, struct tessera_progress *out); /* Not collective; any time */

/* ---- Loading ---------------------------------------------------------------------------------------------------------------------- */

#define TESSERA_NEWEST UINT64_MAX
/* The newest step at or below `at_most` (TESSERA_NEWEST: any) whose metadata and file sizes check out, passing over steps found damaged
 * before. Its blobs can be read then. Collective. NOT_FOUND: there is none. */
tessera_status *tessera_find(tessera *t, uint64_t at_most, uint64_t *step);
/* A blob of the step that tessera_find or tessera_load settled on; rank -1 for a replicated one. *data is borrowed until the next find or
 * load. Not collective. NOT_FOUND. */
tessera_status *tessera_blob(tessera *t, const char *part, const char *name, int rank, const void **data, size_t *bytes);
/* Whether that step holds a tensor: fills dtype, ndim and shape of d (others untouched). Not collective. NOT_FOUND. */
tessera_status *tessera_stored(tessera *t, const char *part, const char *name, struct tessera_tensor *d);
/* Fill every tensor of s from `step`, whatever cuts it was saved with. Collective. Each wanted byte is read by one rank and its checksum verified.
 * CORRUPT names step, file, tensor and offset; the step is then passed over by tessera_find, and retired (renamed step-N.bad-ATTEMPT) when
 * an older one has been loaded by a writing handle. NOT_FOUND lists tensors of s that are not stored; INVALID: shape or dtype differ. After an error the
 * tensors' contents are undefined. A writing handle that loads a step below the newest valid one needs `rewind`. */
tessera_status *tessera_load(tessera *t, tessera_state *s, uint64_t step);
/* tessera_find and tessera_load from the newest step down until one loads. Collective. NOT_FOUND: none is there; CORRUPT: none is whole. */
tessera_status *tessera_load_newest(tessera *t, tessera_state *s, uint64_t *step);
/* Retire every committed step above `step` (rename to step-N.retired-ATTEMPT); TESSERA_NEWEST: every step. Collective; writing handles. */
tessera_status *tessera_rewind(tessera *t, uint64_t step);

struct tessera_load_report {
    size_t size;
    uint64_t storage_bytes, unique_bytes; /* read from storage and wanted (each stored byte once), over all ranks */
    uint64_t ns;
};
#define TESSERA_LOAD_REPORT { sizeof(struct tessera_load_report), 0, 0, 0 }
void tessera_get_load_report(tessera *t, struct tessera_load_report *out); /* of the last load; the same on all ranks */

#ifdef __cplusplus
}
#endif
#endif
