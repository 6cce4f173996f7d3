/* order: numbered items by a key, without comparing pairs of them. Pure. */
#ifndef TESSERA_CKPT_ORDER_H
#define TESSERA_CKPT_ORDER_H

#include <stdint.h>

struct order_key {
    uint64_t key, item;
};

/* Sort k[0, n) by key, equal keys as they were. other: room for n more, overwritten. A pass for each of the eight bytes
 * in which keys differ, none where they are in order. */
void order_sort(struct order_key *k, struct order_key *other, uint64_t n);

#endif
