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

struct holder_group {
    const struct piece *piece; /* the first one added; borrowed */
    uint64_t hash;
    uint32_t tensor, count;
    uint64_t first; /* holders [first, + count), by rank, then tag */
    uint32_t set;   /* HOLDER_LONE: one holder */
};
enum { HOLDER_LONE = UINT32_MAX };

struct holder_set {
    uint64_t first, hash; /* holders of one of its groups */
    uint32_t count;
    struct heap_entry *heap; /* NULL: not used yet */
};

struct holders {
    struct holder_group *group;
    uint64_t groups, group_cap;
    uint32_t *group_of; /* [entries] in the order of adding */
    struct holder *entry;
    uint64_t entries, entry_cap, of_cap;
    uint32_t *order;       /* holders_close: groups by tensor, then piece_compare */
    struct holder *holder; /* holders_close */
    struct holder_set *set;
    uint64_t sets, set_cap;
    struct table group_table, set_table;
};

/* Zeroed is empty. The piece must stay where it is. *fresh: the first of its group, to be checked by the caller. */
status *holders_add(struct holders *h, uint32_t tensor, int ndim, const struct piece *p, int rank, uint32_t tag,
                    bool *fresh) WARN_UNUSED;
/* After the last one: sort. rank_of_tensor[tensor]: where it comes in `order` (a permutation of [0, tensors)); shapes
 * by tensor. once: a rank that holds a piece twice counts with its lowest tag. */
status *holders_close(struct holders *h, const uint32_t *rank_of_tensor, uint64_t tensors,
                      const struct shape *const *shape, bool once) WARN_UNUSED;
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
