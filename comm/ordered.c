/* ordered: see ordered.h. */
#include "comm/ordered.h"

#include <string.h>

size_t ordered_slice(const struct comm *c, size_t n)
{
    return n / (size_t)c->size + (n % (size_t)c->size > 0);
}

size_t ordered_room(const struct comm *c, size_t slice)
{
    return ((size_t)c->size - 1) * slice;
}

static size_t slice_begin(size_t n, size_t slice, int rank)
{
    size_t at = (size_t)rank * slice;
    return at < n ? at : n;
}

static size_t slice_elems(size_t n, size_t slice, int rank)
{
    return slice_begin(n, slice, rank + 1) - slice_begin(n, slice, rank);
}

static status *check(const struct comm *c, size_t n, size_t slice)
{
    if (c->size > ORDERED_RANKS)
        return ERR(INVALID, "ordered sum: %d ranks, at most %d can take part", c->size, ORDERED_RANKS);
    if (slice_begin(n, slice, c->size) < n)
        return ERR(INVALID, "ordered sum: %d slices of %zu elements do not hold %zu", c->size, slice, n);
    return NULL;
}

/* out[n] = from[0] + from[1] + ..., through a block, since out may be one of them. */
static void add_up(const float *const *from, int ranks, size_t n, float *out)
{
    enum { BLOCK = 512 };
    float sum[BLOCK];
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t count = n - at < BLOCK ? n - at : BLOCK;
        memcpy(sum, from[0] + at, count * sizeof *sum);
        for (int r = 1; r < ranks; r++)
            for (size_t i = 0; i < count; i++)
                sum[i] += from[r][at + i];
        memcpy(out + at, sum, count * sizeof *sum);
    }
}

static bool on_host(const struct ordered_at *at)
{
    return !at || !at->add_up;
}

status *ordered_reduce_scatter(struct comm *c, const float *x, size_t n, size_t slice, float *out, float *room,
                               const struct ordered_at *at)
{
    TRY(check(c, n, slice));
    struct comm_xfer xfer[2 * ORDERED_RANKS];
    const float *from[ORDERED_RANKS];
    size_t messages = 0, mine = slice_elems(n, slice, c->rank);
    for (int r = 0; r < c->size; r++) {
        const float *part = x + slice_begin(n, slice, r);
        from[r] = part;
        if (r == c->rank)
            continue;
        from[r] = room;
        xfer[messages++] =
            (struct comm_xfer){ r, 0, true, (float *)(size_t)part, slice_elems(n, slice, r) * sizeof *x };
        xfer[messages++] = (struct comm_xfer){ r, 0, false, room, mine * sizeof *x };
        room += mine;
    }
    TRY(comm_exchange(c, xfer, messages, at ? at->stream : NULL));
    if (!on_host(at))
        return at->add_up(at->arg, from, c->size, c->rank, mine, out);
    add_up(from, c->size, mine, out);
    return NULL;
}

status *ordered_allgather(struct comm *c, const float *in, size_t n, size_t slice, float *out,
                          const struct ordered_at *at)
{
    TRY(check(c, n, slice));
    struct comm_xfer xfer[2 * ORDERED_RANKS];
    size_t messages = 0, bytes = slice_elems(n, slice, c->rank) * sizeof *in;
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank)
            continue;
        xfer[messages++] = (struct comm_xfer){ r, 0, true, (float *)(size_t)in, bytes };
        xfer[messages++] =
            (struct comm_xfer){ r, 0, false, out + slice_begin(n, slice, r), slice_elems(n, slice, r) * sizeof *out };
    }
    float *own = out + slice_begin(n, slice, c->rank);
    if (bytes && on_host(at))
        memmove(own, in, bytes);
    else if (bytes && own != in)
        TRY(at->copy(at->arg, own, in, bytes));
    return comm_exchange(c, xfer, messages, at ? at->stream : NULL);
}

status *ordered_allreduce(struct comm *c, float *x, size_t n, float *room, const struct ordered_at *at)
{
    size_t slice = ordered_slice(c, n);
    float *mine = x + slice_begin(n, slice, c->rank);
    TRY(ordered_reduce_scatter(c, x, n, slice, mine, room, at));
    return ordered_allgather(c, mine, n, slice, x, at);
}
