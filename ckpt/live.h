/* live: write a chunk from where the tensors are. */
#ifndef TESSERA_CKPT_LIVE_H
#define TESSERA_CKPT_LIVE_H

#include "ckpt/report.h"
#include "ckpt/share.h"
#include "storage/store.h"

struct live {
    struct share *s;
    const struct share_chunk *c;
    struct store_writer *w;
    unsigned char *bounce; /* page-aligned; bounce_bytes: a multiple of the pages */
    size_t bounce_bytes;
    size_t piece_bytes; /* most that one write takes from a tensor; whole pages of any size */
    /* Asked before each write: NULL, or a block of the size of a chunk, when the rest of the chunk shall be copied */
    void *(*block)(void *arg);
    void *arg;
    struct report_clock *clock; /* [REPORT_STAGES] added to */
    /* results */
    uint64_t straight;                      /* bytes that were not copied */
    unsigned char *given;                   /* the block; the chunk from byte `rest` on is in it, to be written */
    uint64_t rest, rest_segment, rest_done; /* checksums are in up to byte rest_done of rest_segment */
};
/* Checksum the chunk and write it. Whole, aligned pages of contiguous tensors go from their memory; what lies between
 * (ends of tensors, small ones, strided or unaligned ones) is gathered in the bounce buffer and leaves in its order.
 * The tensors must not change before it returns; how long that can take once block() gives one: one piece by the store,
 * a chunk by memory. */
status *live_write(struct live *k) WARN_UNUSED;
/* After a live_write that went well with a block: checksum and write the rest of the chunk, from the block alone. */
status *live_write_rest(struct live *k) WARN_UNUSED;

#endif
