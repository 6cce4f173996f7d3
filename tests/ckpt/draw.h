/* draw: random numbers for tests, counted so that a failing case is named by (seed, case) and can be run alone. */
#ifndef TESSERA_TESTS_CKPT_DRAW_H
#define TESSERA_TESTS_CKPT_DRAW_H

#include "ckpt/layout.h"
#include "comm/base/rng.h"

struct draw {
    struct rng_at at;
    uint64_t used;
};

static inline struct draw draw_from(uint64_t seed, uint32_t number)
{
    return (struct draw){ .at = { .seed = seed, .sample = number, .step = 0, .stream = RNG_DATA }, .used = 0 };
}

/* In [0, n); n >= 1. */
static inline uint64_t draw_below(struct draw *d, uint64_t n)
{
    return rng_below(d->at, d->used++, n);
}

/* In [lo, hi]. */
static inline uint64_t draw_between(struct draw *d, uint64_t lo, uint64_t hi)
{
    return lo + draw_below(d, hi - lo + 1);
}

/* A box inside the shape, possibly empty, and a run of it: whole, empty or any. */
static inline struct piece draw_piece(struct draw *d, const struct shape *s)
{
    struct box b = { 0 };
    for (int k = 0; k < s->ndim; k++) {
        b.off[k] = draw_below(d, s->dim[k] + 1);
        b.len[k] = draw_below(d, s->dim[k] - b.off[k] + 1);
        if (draw_below(d, 2)) { /* most pieces should not be empty */
            b.off[k] = 0;
            b.len[k] = s->dim[k];
        }
    }
    struct piece p = piece_of_box(s->ndim, &b);
    uint64_t volume = p.end;
    if (draw_below(d, 3)) {
        p.begin = draw_below(d, volume + 1);
        p.end = draw_between(d, p.begin, volume);
    }
    return p;
}

/* Row-major index of the global element that is the i-th of a box. */
static inline uint64_t box_global(const struct shape *s, const struct box *b, uint64_t i)
{
    uint64_t coord[LAYOUT_DIMS] = { 0 }, g = 0;
    for (int d = s->ndim - 1; d >= 0; d--) {
        coord[d] = b->off[d] + i % b->len[d];
        i /= b->len[d];
    }
    for (int d = 0; d < s->ndim; d++)
        g = g * s->dim[d] + coord[d];
    return g;
}

#endif
