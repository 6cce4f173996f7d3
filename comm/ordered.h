/* ordered: sums of floats over ranks with the same bits on every rank and over every backend: each element is added up
 * by one rank, in order of ranks, and given to the others by comm_exchange.
 *
 * n elements are cut into slices, one a rank: rank r has [r slice, (r + 1) slice), cut off at n; slice * size >= n.
 * A sum sends (size - 1) n elements over all ranks, a gather as many, so ordered_allreduce the 2 (size - 1) / size n a
 * rank of the textbooks. At most ORDERED_RANKS ranks (more are INVALID). All are collective; no allocation. */
#ifndef TESSERA_COMM_ORDERED_H
#define TESSERA_COMM_ORDERED_H

#include "comm/comm.h"

enum { ORDERED_RANKS = 64 };

/* Where the floats are, if they are not the host's: work is queued on `stream`, nobody waits for it. */
struct ordered_at {
    struct stream *stream;
    void *arg;
    /* out[n] = from[0] + from[1] + ...; out may be one of them. from[r] of other ranks than `own` are room, which may
     * be overwritten. NULL: host memory. */
    status *(*add_up)(void *arg, const float *const *from, int ranks, int own, size_t n, float *out);
    status *(*copy)(void *arg, void *out, const void *in, size_t bytes);
};

/* ceil(n / size): the slice of ordered_allreduce. */
size_t ordered_slice(const struct comm *c, size_t n);
/* Floats of room that a sum in slices of this size needs. */
size_t ordered_room(const struct comm *c, size_t slice);

/* out = this rank's slice of the sum of all ranks' x[n]. out may be that slice of x; room does not overlap. at NULL:
 * host memory, as in all that follow. */
status *ordered_reduce_scatter(struct comm *c, const float *x, size_t n, size_t slice, float *out, float *room,
                               const struct ordered_at *at) WARN_UNUSED;
/* out[n] = all ranks' slices; `in` (this rank's) may be its place in out. */
status *ordered_allgather(struct comm *c, const float *in, size_t n, size_t slice, float *out,
                          const struct ordered_at *at) WARN_UNUSED;
/* x[n] = the sum of all ranks' x; room: ordered_room(c, ordered_slice(c, n)) floats. */
status *ordered_allreduce(struct comm *c, float *x, size_t n, float *room, const struct ordered_at *at) WARN_UNUSED;

#endif
