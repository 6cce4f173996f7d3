/* verify: commit_verify on several threads and ranks, with the same report. */
#ifndef TESSERA_CKPT_VERIFY_H
#define TESSERA_CKPT_VERIFY_H

#include "ckpt/commit.h"
#include "comm/comm.h"

struct verify_options {
    int threads;       /* of this rank; 0: 1 */
    struct comm *comm; /* NULL: this rank alone */
    /* A line for each damage, in the order of files and offsets, whatever read them; on rank 0, at the end. */
    void (*found)(void *arg, const char *line);
    void *arg;
    /* This rank has read so many bytes more of its share of the step; from any thread, one at a time. May be NULL. */
    void (*progress)(void *arg, uint64_t bytes, uint64_t share);
    void *progress_arg;
};
/* As commit_verify; collective where there is a comm, with the same outcome and result on all ranks. */
status *verify_step(struct store *s, uint64_t step, const struct verify_options *o,
                    struct verify_result *out) WARN_UNUSED;

#endif
