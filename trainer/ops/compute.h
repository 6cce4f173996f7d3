/* compute: where a rank computes: the memory of a device, the stream that its work is queued on, and the kernels.
 *
 * On the CPU memory is the host's and every call has finished when it returns. On a GPU the host must not read or write
 * what compute_alloc gave: kernels do, and the copies below; both run in the order in which they were queued, and
 * nothing here waits unless it says so. NULL stands for the CPU: plain memory. One thread at a time uses it. */
#ifndef TESSERA_TRAINER_OPS_COMPUTE_H
#define TESSERA_TRAINER_OPS_COMPUTE_H

#include "comm/base/thread.h"
#include "comm/device/device.h"

struct kernels;
struct ops_plugin;

struct compute {
    struct device *device; /* borrowed */
    bool host;             /* its memory is the host's */
    const struct kernels *kernels;
    struct workers *workers; /* what kernels take: on the CPU the rank's threads */
    struct stream *stream;   /* where kernels and copies are queued; NULL on the CPU */
    /* of compute.c */
    const struct ops_plugin *plugin;
    struct compute_half {
        char *bytes; /* pinned */
        size_t used; /* copies from these may be under way */
        struct event *free;
    } half[2];
    int now;
    struct compute_fetches {
        char *bytes; /* pinned */
        size_t used;
        int n;
        struct event *done;
        struct {
            void *dst;
            size_t at, bytes;
        } to[32];
    } fetch;
};

/* threads (may be NULL): borrowed, as d is; what kernels of the CPU take. deterministic: libraries may choose only what
 * adds in one order. Errors: UNSUPPORTED: no kernels for this device; DEVICE. */
status *compute_open(struct device *d, struct workers *threads, bool deterministic, struct compute **out) WARN_UNUSED;
/* After all its work is done and its memory freed. NULL is fine. */
void compute_close(struct compute *c);
static inline bool compute_host(const struct compute *c)
{
    return !c || c->host;
}
static inline struct stream *compute_stream(const struct compute *c)
{
    return c ? c->stream : NULL;
}
/* Its kernels, and what they take: for NULL the CPU's, with `threads`. */
const struct kernels *compute_kernels(const struct compute *c);
static inline struct workers *compute_workers(const struct compute *c, struct workers *threads)
{
    return c ? c->workers : threads;
}

/* 4 KiB aligned, zeroed. Errors: NO_MEMORY with the size. */
status *compute_alloc(struct compute *c, size_t bytes, void **out) WARN_UNUSED;
void compute_free(struct compute *c, void *p, size_t bytes); /* NULL is fine; waits for the work queued */

/* From the host to the memory; src may change when it returns. Small ones do not wait for the stream. */
status *compute_put(struct compute *c, void *dst, const void *src, size_t bytes) WARN_UNUSED;
/* From the memory to the host, once all work queued is done. Waits. */
status *compute_get(struct compute *c, void *dst, const void *src, size_t bytes) WARN_UNUSED;
/* The same without waiting: *dst has it when the next compute_fetched returns, or before. */
status *compute_fetch(struct compute *c, void *dst, const void *src, size_t bytes) WARN_UNUSED;
/* Waits until what the last compute_fetch was queued behind is done, and for nothing behind it; if there was none, not
 * at all. */
status *compute_fetched(struct compute *c) WARN_UNUSED;
/* Within the memory; no overlap. */
status *compute_copy(struct compute *c, void *dst, const void *src, size_t bytes) WARN_UNUSED;
/* The first error of kernels since the last check; wait: of all work queued, after it is done. */
status *compute_check(struct compute *c, bool wait) WARN_UNUSED;

#endif
