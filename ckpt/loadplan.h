/* loadplan: who reads which block for whom, in which round. Pure: the metadata and all ranks' wants in, one schedule
 * out. Ranks that want the same piece (a group) are planned for once. */
#ifndef TESSERA_CKPT_LOADPLAN_H
#define TESSERA_CKPT_LOADPLAN_H

#include "ckpt/loadpipe.h"
#include "ckpt/reshard.h"

enum {
    READ_RUN_BYTES = 2 << 20,              /* blocks behind one another go to one reader up to that, if it may read them
                                              at all */
    ROUND_READ_BYTES = 2 * READ_RUN_BYTES, /* a reader's blocks in a round */
    LEAST_READ_BYTES = 4096,               /* what a small block counts as there */
    ROUND_SEND_BYTES = 8 << 20,  /* what it sends then, and what a rank receives, unless one block alone is more */
    READ_AHEAD_BYTES = 16 << 20, /* how much more than the mean a rank reads before others help out */
};

/* Wants of one piece of one tensor: member[first, + count), by rank. */
struct load_group {
    uint32_t tensor;
    uint32_t set; /* groups of equal sets have the same ranks */
    uint64_t first, count;
};

/* A reshard_copy in a fifth of its memory: nearly all are one row. */
struct load_copy {
    uint32_t stored, wanted; /* piece of the metadata; group */
    uint64_t src, dst;
    uint64_t len;  /* of a row; else where its lengths, source strides and destination strides begin in `grid` */
    uint32_t ndim; /* 0: a row, contiguous on both sides */
};

/* One block's elements that one copy takes. */
struct load_use {
    uint32_t copy;  /* of the plan */
    uint32_t group; /* that it serves */
    uint32_t elems; /* at most a block's */
};

struct load_block {
    uint32_t piece; /* of the metadata */
    uint32_t block; /* of that piece's payload */
    int32_t reader;
    uint32_t round;
    uint32_t first_use, uses;
};

struct load_plan {
    struct load_copy *copy; /* by (stored, src) */
    uint64_t *grid;         /* of the copies that are no rows */
    struct load_group *group;
    uint32_t *member; /* indices into the wants */
    uint64_t copies, words, groups;
    struct load_use *use;
    struct load_block *block; /* by (round, reader, place in the files) */
    uint64_t *round;          /* [rounds + 1] first block of a round */
    uint64_t uses, blocks, rounds;
    struct load_totals totals;
};

/* want: in any order; must stay where it is while the plan is made. */
status *load_plan_make(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                       struct load_plan *out) WARN_UNUSED;
/* How blocks are read. Zeroed: from a disk, by whom the planner chooses. */
struct load_reading {
    const int32_t *reader; /* [pieces] the rank that reads a stored piece; NULL: the planner chooses */
    uint64_t run_bytes;    /* instead of READ_RUN_BYTES, if it is more; a round then has room for two of them */
    /* [ranks] Requests are dear: what lies behind one another is read by one rank, up to run_bytes, also where other
     * ranks of its node want it. NULL: a block is read by one that wants it, for balance alone by others */
    const int32_t *node_of;
};
status *load_plan_make_from(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                            const struct load_reading *how, struct load_plan *out) WARN_UNUSED;
void load_plan_free(struct load_plan *p);

/* The group that a use serves. */
static inline const struct load_group *use_group(const struct load_plan *p, const struct load_use *u)
{
    return &p->group[u->group];
}

/* Copy i of the plan as reshard made it. */
struct reshard_copy load_copy_whole(const struct load_plan *p, uint64_t i);

/* A block's place in its piece's payload. */
static inline uint64_t block_bytes(const struct meta_piece *p, uint32_t block)
{
    uint64_t lo = (uint64_t)block * META_BLOCK_BYTES;
    return p->bytes - lo < META_BLOCK_BYTES ? p->bytes - lo : META_BLOCK_BYTES;
}

#endif
