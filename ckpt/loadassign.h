/* loadassign: the second half of a load's plan: a reader and a round for each block. Pure. For loadplan.c alone. */
#ifndef TESSERA_CKPT_LOADASSIGN_H
#define TESSERA_CKPT_LOADASSIGN_H

#include "ckpt/holders.h"
#include "ckpt/loadplan.h"

/* p: everything but readers and rounds is there, blocks in the order of the files, totals.storage_bytes their sum.
 * elem: [the metadata's pieces] bytes of an element. h: the groups' holders, whose tags are overwritten; a set is
 * added. */
status *load_assign(const struct metadata *m, const uint8_t *elem, int ranks, const struct load_reading *how,
                    struct holders *h, struct load_plan *p) WARN_UNUSED;

#endif
