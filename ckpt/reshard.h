/* reshard: stored pieces x wanted pieces -> copies. Pure.
 *
 * One function intersects, whether the source is a file, a peer rank, or a training mesh feeding a generation mesh.
 * Runs are cut into boxes here and nowhere else, with no communication. Work is a sorted sweep, never all pairs. */
#ifndef TESSERA_CKPT_RESHARD_H
#define TESSERA_CKPT_RESHARD_H

#include "ckpt/layout.h"

#include <stddef.h>

/* One box of elements that lie both in stored piece `stored` and in wanted piece `wanted`. Offsets and strides are in
 * elements: src counts inside the stored run (0 = its first element), dst inside the wanted run. Dimensions are fused
 * where both sides are contiguous, so the last dimension is as long as can be. */
struct reshard_copy {
    uint32_t stored, wanted;
    int ndim; /* >= 1 */
    uint64_t len[LAYOUT_DIMS];
    uint64_t src, dst;
    uint64_t src_stride[LAYOUT_DIMS], dst_stride[LAYOUT_DIMS];
};

struct reshard_list {
    struct reshard_copy *copy;
    size_t count, cap;
};
/* Frees the copies, not the list itself, which is empty then. */
void reshard_list_free(struct reshard_list *l);

/* Append the copies for one tensor, ordered by (stored, src). Stored pieces do not overlap (a plan made sure); wanted
 * ones may. Where wanted elements are stored nowhere: NOT_FOUND with the first missing coordinates and how many are
 * missing. */
status *reshard_tensor(const struct shape *shape, const struct piece *stored, uint32_t stored_count,
                       const struct piece *wanted, uint32_t wanted_count, struct reshard_list *out) WARN_UNUSED;

/* First and one-past-last element of the stored run that a copy touches. */
void reshard_span(const struct reshard_copy *c, uint64_t *begin, uint64_t *end);
/* How many of the copy's elements lie in [lo, hi) of the stored run. */
uint64_t reshard_count(const struct reshard_copy *c, uint64_t lo, uint64_t hi);

/* Copy those elements of c that lie in [lo, hi) of the stored run. `src` points at element lo, `dst` at the wanted
 * run's element 0. */
void reshard_apply(const struct reshard_copy *c, size_t elem_bytes, const void *src, uint64_t lo, uint64_t hi,
                   void *dst);
/* The same in two halves, for a message in between: pack appends the elements in copy order to `message` and returns
 * the bytes; unpack takes them in the same order and returns the bytes it used. */
size_t reshard_pack(const struct reshard_copy *c, size_t elem_bytes, const void *src, uint64_t lo, uint64_t hi,
                    void *message);
size_t reshard_unpack(const struct reshard_copy *c, size_t elem_bytes, const void *message, uint64_t lo, uint64_t hi,
                      void *dst);

/* Gather elements [lo, hi) of piece p's run from strided memory into `out`, and back. `base` is the address of the
 * box's first element; strides (one per dimension, in elements) NULL: the memory holds the run itself, contiguous,
 * element p->begin first. */
void piece_gather(int ndim, const struct piece *p, size_t elem_bytes, const void *base, const int64_t *strides,
                  uint64_t lo, uint64_t hi, void *out);
void piece_scatter(int ndim, const struct piece *p, size_t elem_bytes, void *base, const int64_t *strides, uint64_t lo,
                   uint64_t hi, const void *in);

#endif
