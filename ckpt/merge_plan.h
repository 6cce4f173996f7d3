/* merge_plan: which runs of a box are merged, and where. Pure.
 *
 * ZeRO cuts the box that a rank holds of a tensor into runs of its row-major order, which are not boxes of the tensor
 * (irregular). As given, each run is stored by itself. Merged, the runs of one box are stored as that box by one of
 * the ranks that give a run of it, and the others send it theirs. ByteCheckpoint (arXiv 2407.20143, section 3) names
 * this way as the one of earlier systems, which gather before they save. */
#ifndef TESSERA_CKPT_MERGE_PLAN_H
#define TESSERA_CKPT_MERGE_PLAN_H

#include "ckpt/plan.h"

/* Elements of a row, if the piece is one box of its tensor: those of one index of its first dimension that is longer
 * than 1, so that any number of rows, one after another, is a box again. 0: it is more than one box, or empty. */
uint64_t merge_row_elems(int ndim, const struct piece *p);

/* Change a whole plan in which every piece is as some rank holds it, or a run of that, so that it stores boxes:
 *
 * - Pieces that are runs of one box, tile it, and are not all boxes themselves become that box (local PLAN_MERGED);
 *   p->source says which writers of before give what. The runs of a box that they do not tile stay as they are.
 * - What is a box, but was described as a run of a larger one, is described as that box.
 *
 * Writers of merged boxes: largest first, to the one of those who give to it with the fewest bytes so far, among equals
 * on the node with the fewest, then to the lowest rank. node_of, extra_bytes: as in plan_options. */
status *plan_merge(struct plan *p, const int32_t *node_of, const uint64_t *extra_bytes) WARN_UNUSED;

/* What each rank has to know: list[first[r], first[r + 1]) are the sources that rank r gives, or that its own merged
 * pieces are made of, in the order of the plan; with `gather` all of the boxes that it gives to. The arrays are the
 * caller's to mem_free. */
status *plan_sources_by_rank(const struct plan *p, bool gather, struct plan_source **list,
                             uint64_t **first) WARN_UNUSED;

/* Bytes of tensors that a save by this (whole) plan sends from rank to rank. */
uint64_t merge_wire_bytes(const struct plan *p, bool gather);

#endif
