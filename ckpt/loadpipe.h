/* loadpipe: from stored pieces to wanted pieces, across ranks. Rank 0 makes the schedule from the metadata and
 * everybody's wants, which come up the tree of nodes, and every rank's part of it goes down; after that nobody asks
 * anybody anything.
 *
 * The unit of reading is a checksum block of a stored piece (META_BLOCK_BYTES). Each wanted block has one reader in the
 * job, which reads and verifies it whole and brings every rank its part: through memory that the ranks of a node share,
 * and by messages, in rounds of bounded memory, to those of other nodes. */
#ifndef TESSERA_CKPT_LOADPIPE_H
#define TESSERA_CKPT_LOADPIPE_H

#include "ckpt/metadata.h"
#include "ckpt/nodes.h"
#include "ckpt/report.h"
#include "storage/store.h"

/* A piece this rank wants, and where it goes. Travels as bytes; `dst` means nothing elsewhere. */
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

/* Fill every rank's wants from step m->step in s, and from its owners. Collective over n; the error is agreed. CORRUPT
 * names step, file, tensor and offset. After an error the contents of the destinations are undefined. cost (may be
 * NULL) is told what reading, checking, exchanging and placing took this rank. */
status *loadpipe_run(const struct nodes *n, struct store *s, const struct metadata *m, struct load_want *want,
                     uint64_t count, struct load_totals *out, struct report_sum *cost) WARN_UNUSED;

struct load_source;
/* The same from elsewhere (loadmove.h). reader (rank 0): who reads each stored piece; NULL: the planner says. mine: why
 * this rank cannot take part (taken), or NULL. */
status *loadpipe_from(const struct nodes *n, const struct metadata *m, const struct load_source *from,
                      const int32_t *reader, struct load_want *want, uint64_t count, status *mine,
                      struct load_totals *out) WARN_UNUSED;

#endif
