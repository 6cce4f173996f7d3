/* layout: which elements of a global tensor a rank holds. Pure functions, no I/O, no MPI.
 *
 * A tensor has a global shape. A piece of it is a box (offset and length per dimension) and a run [begin, end) of that
 * box's row-major order; a box alone is the run [0, volume). TP cuts give boxes, ZeRO gives runs of the local box.
 * Scalars have ndim 0 and volume 1; empty tensors and empty pieces are ordinary. The same values drive training,
 * saving, loading and the in-memory reshard. */
#ifndef TESSERA_CKPT_LAYOUT_H
#define TESSERA_CKPT_LAYOUT_H

#include "comm/mesh.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LAYOUT_DIMS = 8, LAYOUT_BOXES = 2 * LAYOUT_DIMS - 1 };

struct shape {
    int ndim; /* 0..LAYOUT_DIMS */
    uint64_t dim[LAYOUT_DIMS];
};

struct box {
    uint64_t off[LAYOUT_DIMS], len[LAYOUT_DIMS]; /* entries at and after ndim are 0 */
};

struct piece {
    struct box box;
    uint64_t begin, end; /* a run of the box's row-major order, in elements */
};

/* One box of a run: `start` is where its first element lies in the run (0 = the run's first element). */
struct piece_box {
    struct box box; /* global coordinates */
    uint64_t start;
};

/* Product of the dimensions; 1 for a scalar. *ok = false on overflow of 2^63 - 1. */
uint64_t shape_volume(const struct shape *s, bool *ok);
uint64_t box_volume(int ndim, const struct box *b);
/* Where element e of the box's row-major order lies in that of the whole. */
uint64_t box_element(const struct shape *s, const struct box *b, uint64_t e);
struct piece piece_whole(const struct shape *s);
struct piece piece_of_box(int ndim, const struct box *b);
uint64_t piece_elems(const struct piece *p);
bool piece_equal(const struct piece *a, const struct piece *b);
int piece_compare(const struct piece *a, const struct piece *b); /* a total order: off, len, begin, end */
bool piece_is_box(int ndim, const struct piece *p);              /* the run is the whole box */
/* "(3, 5, 7)" for messages: a shape or coordinates; "()" for a scalar; cut off with "..." where text is short. */
void dims_text(int ndim, const uint64_t *v, char *text, size_t bytes);
/* INVALID if the box leaves the shape, the run leaves the box, or a number overflows. */
status *piece_check(const struct shape *s, const struct piece *p) WARN_UNUSED;

/* Cut a run into boxes, in run order: at most 2 ndim - 1 of them (ByteCheckpoint's decomposition); 0 for an empty run,
 * 1 for a scalar. Their volumes add up to the run. */
int piece_boxes(int ndim, const struct piece *p, struct piece_box out[LAYOUT_BOXES]);

/* Part i of n of [0, total), as equal as can be: [i total / n, (i + 1) total / n). */
void layout_cut(uint64_t total, uint64_t n, uint64_t i, uint64_t *begin, uint64_t *end);
/* The same with every inner cut at a multiple of `align` (ZeRO runs: 1,024 elements); parts may be empty. */
void layout_cut_aligned(uint64_t total, uint64_t align, uint64_t n, uint64_t i, uint64_t *begin, uint64_t *end);

/* How one tensor lies on a mesh. */
struct layout {
    struct shape shape;
    int cut[LAYOUT_DIMS]; /* mesh axis that cuts this dimension (layout_cut), or -1 */
    int stage;            /* pipeline stage that holds it, or -1: all */
    unsigned run_axes; /* mask (1 << MESH_DP) of the axes whose ranks share the local box as flat runs; 0: replicated */
    /* Runs cut a flattened bucket, not the tensor: the local box's elements are [bucket_begin, + volume) of
     * bucket_total, which is cut over the ranks of run_axes at multiples of run_align. A lone tensor: 0, its volume, 1;
     * a total of 0 means the local volume, an align of 0 means 1. */
    uint64_t bucket_begin, bucket_total, run_align;
};

/* The piece rank holds (possibly empty; an empty run is always [0, 0)). Two ranks with equal pieces are replicas. */
struct piece layout_piece(const struct layout *l, const struct mesh *m, int rank);

#endif
