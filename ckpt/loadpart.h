/* loadpart: what of a load plan one rank has to know: the blocks it reads, with what it hands to whom, and the blocks
 * it takes something from. Rank 0 plans, and sends every rank its part. */
#ifndef TESSERA_CKPT_LOADPART_H
#define TESSERA_CKPT_LOADPART_H

#include "ckpt/loadplan.h"
#include "ckpt/nodes.h"

/* Elements of a block that go to one want of one rank. */
struct part_use {
    uint32_t copy; /* into the part's copies */
    uint32_t want; /* of that rank's, in the order in which it named them */
    int32_t rank;
    uint32_t elems;
};

struct part_block {
    uint64_t number;    /* which of its reader's blocks, in the order of the plan */
    uint64_t first_use; /* into the part's uses: all of them where this rank reads it, else its own */
    uint32_t tensor, piece, block, round;
    int32_t reader;
    uint32_t uses;
};

struct load_part {
    struct reshard_copy *copy; /* stored and wanted are not set */
    struct part_use *use;
    struct part_block *block; /* in the order of the plan */
    uint64_t *round;          /* [rounds + 1] first block of a round */
    uint64_t copies, uses, blocks, rounds;
    struct load_totals totals;
};

/* The parts of all ranks, as messages[ranks], each with memory of its own (load_parts_free). first_want[rank]: where in
 * `want` a rank's begin. */
status *load_parts_pack(const struct load_plan *p, const struct load_want *want, const uint64_t *first_want, int ranks,
                        struct nodes_message **out) WARN_UNUSED;
void load_parts_free(struct nodes_message *m, int ranks);
/* INTERNAL: the bytes are not those of one part. */
status *load_part_unpack(const void *buf, size_t bytes, struct load_part *out) WARN_UNUSED;
void load_part_free(struct load_part *p);

#endif
