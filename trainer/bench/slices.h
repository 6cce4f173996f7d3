/* slices: the state that `bench irregular` saves: weights cut over tensor-parallel ranks by columns, and two moments of
 * each, which ZeRO-1 cuts once more, over the data-parallel ranks, into runs of those boxes.
 *
 * A layer is a weight [SLICES_ROWS, SLICES_COLS] of bf16 and moments m and v of its shape, f32. A row of a box is no
 * multiple of where ZeRO cuts (1,024 elements), so runs are no boxes. An element's value follows from its place. */
#ifndef TESSERA_TRAINER_BENCH_SLICES_H
#define TESSERA_TRAINER_BENCH_SLICES_H

#include "ckpt/ckpt.h"
#include "ckpt/layout.h"

enum { SLICES_ROWS = 1001, SLICES_COLS = 1500, SLICES_KINDS = 3 };

struct slice {
    struct piece piece;
    size_t elem_bytes;
    unsigned char *data;
    size_t bytes;
};
struct slices {
    uint64_t layers;
    struct slice *slice;  /* [layers x SLICES_KINDS] weights, then m and v, layer by layer */
    unsigned char *block; /* where they lie, each from a multiple of 4 KiB; touched */
    size_t block_bytes;
};
/* About state_bytes over all ranks of the mesh. zero: moments are cut over dp; else replicated. */
status *slices_open(uint64_t state_bytes, const struct mesh *m, int rank, bool zero, struct slices *out) WARN_UNUSED;
void slices_close(struct slices *s);
uint64_t slices_total_bytes(const struct slices *s); /* each element once */
void slices_fill(struct slices *s);
/* CORRUPT names the first element that is not what slices_fill put there. */
status *slices_check(const struct slices *s) WARN_UNUSED;
status *slices_state(const struct slices *s, tessera *t, tessera_state **out) WARN_UNUSED;

#endif
