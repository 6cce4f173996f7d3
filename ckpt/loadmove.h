/* loadmove: carries out a rank's part of a load plan: reading, exchange and placing, overlapped. Where the bytes come
 * from (files, memory) is a load_source.
 *
 * Memory of a rank, whatever the size of the load: as many buffers of MOVE_RUN_BYTES as it has readers; RING_SLOTS of
 * them that the ranks of its node see, which take the place of the others where they have huge pages; and messages of
 * MOVE_ROUNDS rounds (ROUND_SEND_BYTES each way, loadplan.h) for ranks of other nodes, or of all where nothing can be
 * shared; each as far as the plan has use for it. */
#ifndef TESSERA_CKPT_LOADMOVE_H
#define TESSERA_CKPT_LOADMOVE_H

#include "ckpt/loadpart.h"
#include "ckpt/report.h"

enum { MOVE_READERS = 2, MOVE_READERS_MOST = 8, MOVE_ROUNDS = 3, MOVE_RUN_BYTES = 2 << 20, MOVE_GAP_BYTES = 8 << 10 };

/* Blocks of one round that lie behind one another in a file, read at once; the padding between them too. */
struct load_run {
    const struct part_block *block;
    uint32_t blocks;
    uint32_t trip; /* of those that send or bring messages, the one that it belongs to (loadmove.c) */
    uint64_t offset, bytes;
    unsigned char *home; /* where this rank wants just these bytes, or NULL */
    uint64_t first_place;
    bool given; /* other ranks of the node take parts of it */
    /* When it is read: what the reader keeps from one run to the next (NULL at first), and bytes that it goes on to
     * read from `offset` on: this run's, those between, and the next ones' */
    void **keep;
    uint64_t ahead;
};

/* Its functions are called by several threads at once. */
struct load_source {
    const void *arg;
    /* The run's bytes to `to`, each block verified. Reports what is damaged as CORRUPT. */
    status *(*read)(const void *arg, const struct load_run *r, unsigned char *to);
    void (*drop)(void *keep); /* of a reader, at its end; NULL: nothing is kept */
    /* Where they lie in memory already; NULL: nowhere. May be NULL itself */
    const unsigned char *(*at)(const void *arg, const struct load_run *r);
    int readers; /* threads that read; 0: MOVE_READERS, at most MOVE_READERS_MOST */
    /* A request costs as much as reading so many bytes: less is not read into its place, if it can be read together
     * with what lies beside it. 0: every run that can is */
    uint64_t request_bytes;
    uint64_t ahead_bytes; /* it is best if one reader reads so much that lies together; 0: MOVE_RUN_BYTES */
    size_t align;         /* read is at its best where `to` - offset is a multiple of it; a power of two up to 4096 */
    struct report_sum *cost; /* told what exchange and placing took; NULL: nobody wants to know */
};

/* Fill this rank's wants, by its part of the plan, together with all ranks of n. Collective; the error is agreed. After
 * an error what the destinations hold is undefined. */
status *load_move(const struct nodes *n, const struct metadata *m, const struct load_want *want,
                  const struct load_part *p, const struct load_source *from) WARN_UNUSED;

static inline uint64_t block_offset(const struct metadata *m, const struct part_block *b)
{
    return m->piece[b->piece].offset + (uint64_t)b->block * META_BLOCK_BYTES;
}

#endif
