/* tiling: do boxes cover a tensor, every element exactly once? Pure. */
#ifndef TESSERA_CKPT_TILING_H
#define TESSERA_CKPT_TILING_H

#include "ckpt/layout.h"

/* The boxes (not empty, inside the shape, whose volume does not overflow) are reordered. O(n log n) for what TP, ZeRO
 * and their products cut; never all pairs. Errors: INVALID with the coordinates of an element that is in none of them
 * or in two; NO_MEMORY. */
status *tiling_check(const struct shape *s, struct box *box, size_t count) WARN_UNUSED;

#endif
