/* loadpipe: from stored pieces to wanted pieces, across ranks. Every rank computes the same schedule from the metadata
 * and everybody's wants; after that nobody asks anybody anything.
 *
 * The unit of reading is a checksum block of a stored piece (META_BLOCK_BYTES). Each wanted block has one reader in the
 * job, which reads and verifies it whole and sends every rank its part. Work goes in rounds of bounded memory, some of
 * which travel while others are read. */
#ifndef TESSERA_CKPT_LOADPIPE_H
#define TESSERA_CKPT_LOADPIPE_H

#include "ckpt/metadata.h"
#include "ckpt/report.h"
#include "comm/comm.h"
#include "storage/store.h"

/* A piece this rank wants, and where it goes. Travels as bytes, but for `dst`. */
struct load_want {
    uint32_t tensor; /* of the metadata; not an alias */
    int32_t rank;
    struct piece piece;
    void *dst; /* contiguous: the run's first element first */
};

struct load_totals {
    uint64_t storage_bytes; /* read, over all ranks */
    uint64_t unique_bytes;  /* wanted, each stored byte once; pieces that overlap without being equal count up to a
                               block's bytes */
    uint64_t wire_bytes;    /* sent by readers to other ranks */
};

/* Fill every rank's wants from step m->step in s, and from its owners. `want` is sorted in place. Collective; the error
 * is agreed. CORRUPT names step, file, tensor and offset. After an error the contents of the destinations are
 * undefined. cost (may be NULL) is told what reading, checking, exchanging and placing took this rank. */
status *loadpipe_run(struct comm *c, struct store *s, const struct metadata *m, struct load_want *want, uint64_t count,
                     struct load_totals *out, struct report_sum *cost) WARN_UNUSED;

struct load_source;
/* The same from elsewhere (loadmove.h). reader: who reads each stored piece; NULL: the planner says. mine: why this
 * rank cannot take part (taken), or NULL. */
status *loadpipe_from(struct comm *c, const struct metadata *m, const struct load_source *from, const int32_t *reader,
                      struct load_want *want, uint64_t count, status *mine, struct load_totals *out) WARN_UNUSED;

#endif
