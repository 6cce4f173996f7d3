/* copy: a committed step of one root as a committed step of another, whole or in part, cut as it was or anew. */
#ifndef TESSERA_CKPT_COPY_H
#define TESSERA_CKPT_COPY_H

#include "ckpt/metadata.h"
#include "storage/store.h"

struct copy_options {
    const char *const *parts; /* patterns as in tessera_load_options; NULL: everything */
    const char *const *names;
    /* Cut as a job of this mesh would: tensors over tp along the dimension that the source's boxes cut (else the
     * longest one), layers ("...layers.N...") over pp, and what several ranks would hold shared out among them.
     * Without, pieces and files are those of the source. */
    bool recut;
    struct mesh mesh;
    void (*progress)(void *arg, uint64_t bytes, uint64_t total); /* so many more of all; may be NULL */
    void *progress_arg;
};

struct copy_result {
    uint64_t files, tensors;
    uint64_t bytes;      /* of tensors */
    uint64_t read_bytes; /* from the source, in whole checksum blocks */
};

/* Each checksum block that is read is verified (CORRUPT names it), so what is committed is what was saved. What the
 * step refers to in others is copied into it. The step keeps its number, build and blobs (of the parts that are
 * copied); it is a new attempt's, under the destination's lease. Until the commit nothing is listed; an error removes
 * what was written, and what a killed copy leaves is gc's. EXISTS: the destination has that step, or a live job.
 * NOT_FOUND: no such step, or nothing is selected. INVALID: a blob of a rank that `mesh` does not have. What the step
 * has by reference is copied like the rest. Memory: COPY_CACHE_BYTES and a few MiB, beside the metadata and the
 * headers. */
enum { COPY_CACHE_BYTES = 64 << 20 };
status *copy_step(struct store *from, uint64_t step, struct store *to, const struct copy_options *o,
                  struct copy_result *out) WARN_UNUSED;

#endif
