/* holders: who holds what. Equal pieces of a tensor form a group; its holders are the ranks that have it. Groups with
 * the same ranks share a set, which knows its least loaded member. Plans of saves (who writes) and of loads (who reads)
 * stand on this. Pure. */
#ifndef TESSERA_CKPT_HOLDERS_H
#define TESSERA_CKPT_HOLDERS_H

#include "ckpt/layout.h"

#include <stddef.h>

/* Open addressing over entries numbered from 0: a slot holds a number + 1. */
struct table {
    uint32_t *slot;
    uint64_t mask, used;
};
/* The hash of entry i, for growing. */
typedef uint64_t table_hash(const void *owner, uint32_t i);
/* Have room for one more at half load. */
status *table_room(struct table *t, table_hash *hash, const void *owner) WARN_UNUSED;
static inline uint64_t hash_mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 29;
}
/* Room for one more element of `bytes` in an array (the address of its pointer) that grows by doubling. */
status *array_room(void *array, uint64_t used, uint64_t *cap, size_t bytes) WARN_UNUSED;

struct holder {
    int32_t rank;
    uint32_t tag; /* the caller's */
};

/* What is held: records of the caller's, `stride` bytes from one to the next, which stay where they are. */
struct holder_records {
    const struct piece *piece; /* of record 0 */
    const int32_t *rank;
    const uint32_t *tag; /* NULL: the record's number */
    size_t stride;
    uint64_t count;         /* below 2^32 */
    const uint32_t *tensor; /* [count] */
};

struct holder_group {
    const struct piece *piece; /* of one of the records */
    uint64_t first;            /* holders [first, first + count), by rank, then tag */
    uint32_t count;
    uint32_t set; /* HOLDER_LONE: one holder */
};
enum { HOLDER_LONE = UINT32_MAX };

struct holder_set {
    uint64_t first, hash; /* holders of one of its groups */
    uint32_t count;
    struct heap_entry *heap; /* NULL: not used yet */
};

struct holders {
    struct holder_records of;
    uint32_t *record;           /* [count] by tensor, else as given */
    uint64_t *first_record;     /* [tensors + 1] */
    struct record_key *key;     /* of the tensor at hand */
    struct holder *holder;      /* [count] */
    uint64_t used, key_cap;     /* holders so far */
    struct holder_group *group; /* of the tensor at hand, in piece_compare order */
    uint64_t groups, group_cap;
    struct holder_set *set;
    uint64_t sets, set_cap;
    struct table set_table;
};

/* Sort the records by tensor, [0, tensors). *h: overwritten; holders_free it after an error, too. */
status *holders_open(struct holders *h, const struct holder_records *of, uint64_t tensors) WARN_UNUSED;
/* The groups of one tensor, instead of those of the one before; each tensor once. Its holders stay. once: a rank that
 * holds a piece twice counts with its lowest tag. */
status *holders_tensor(struct holders *h, uint32_t tensor, const struct shape *s, bool once) WARN_UNUSED;
void holders_free(struct holders *h);

/* What members are compared by: bytes, then bytes of the node, then rank. Loads only grow while a set is in use. */
struct holder_load {
    const uint64_t *bytes;  /* [ranks] */
    const int32_t *node_of; /* [ranks], or NULL */
    const uint64_t *node_bytes;
};
/* The member of a set with the least load: its place among the group's holders. */
status *holders_least(struct holders *h, uint32_t set, const struct holder_load *l, uint32_t *at) WARN_UNUSED;

#endif
