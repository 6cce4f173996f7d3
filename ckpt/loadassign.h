/* loadassign: the second half of a load's plan: a reader and a round for each block. Pure. For loadplan.c alone. */
#ifndef TESSERA_CKPT_LOADASSIGN_H
#define TESSERA_CKPT_LOADASSIGN_H

#include "ckpt/holders.h"
#include "ckpt/loadplan.h"

/* p: everything but readers and rounds is there, blocks in the order of the files, totals.storage_bytes their sum.
 * elem: [the metadata's pieces] bytes of an element. reader: as in load_plan_make_from; run_bytes: what lies behind one
 * another goes to one reader up to that. h: the groups' holders, whose tags are overwritten; a set is added. */
status *load_assign(const struct metadata *m, const uint8_t *elem, int ranks, const int32_t *reader, uint64_t run_bytes,
                    struct holders *h, struct load_plan *p) WARN_UNUSED;

#endif
