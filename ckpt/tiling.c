/* tiling: divide along planes that no box crosses, then sweep what is left.
 *
 * A region is covered exactly if, along some dimension, its boxes fall into groups that follow one another without a
 * gap and each group covers its own slab exactly. Grids, runs cut into boxes, and runs inside a grid's cells divide
 * down to single boxes, one sort a level. What does not divide (boxes that overlap, a pinwheel) is swept along one
 * dimension with a list of the boxes that the sweep plane cuts; without an overlap the volumes decide. Invariant: every
 * box given to `cover` lies inside its region. */
#include "ckpt/tiling.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>

enum { DEPTH_MAX = 64 /* divisions inside divisions; deeper than any cut of a mesh */ };

static uint64_t box_end(const struct box *b, int d)
{
    return b->off[d] + b->len[d];
}

static int compare_begin(const void *a, const void *b, void *dim)
{
    int d = *(const int *)dim;
    uint64_t x = ((const struct box *)a)->off[d], y = ((const struct box *)b)->off[d];
    return x < y ? -1 : x > y;
}

static void sort_along(int d, struct box *b, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if (b[i - 1].off[d] > b[i].off[d]) { /* most come in order */
            qsort_r(b, n, sizeof *b, compare_begin, &d);
            return;
        }
}

static status *hole_at(int ndim, const uint64_t *coord)
{
    char text[LAYOUT_DIMS * 22 + 3];
    dims_text(ndim, coord, text, sizeof text);
    return ERR(INVALID, "element %s is in no piece", text);
}

static status *overlap(int ndim, const struct box *a, const struct box *b)
{
    uint64_t coord[LAYOUT_DIMS];
    char text[LAYOUT_DIMS * 22 + 3];
    for (int d = 0; d < ndim; d++)
        coord[d] = a->off[d] > b->off[d] ? a->off[d] : b->off[d];
    dims_text(ndim, coord, text, sizeof text);
    return ERR(INVALID, "element %s is in two pieces", text);
}

static bool intersect(int ndim, const struct box *a, const struct box *b)
{
    for (int d = 0; d < ndim; d++)
        if (a->off[d] >= box_end(b, d) || b->off[d] >= box_end(a, d))
            return false;
    return true;
}

/* The first uncovered element of a region whose boxes do not overlap but have less volume. Its coordinate in each
 * dimension is the region's begin or some box's end; the slab at that coordinate has less volume than it should. */
static status *find_hole(int ndim, const struct box *region, struct box *b, size_t n)
{
    uint64_t coord[LAYOUT_DIMS] = { 0 };
    for (int d = 0; d < ndim; d++) {
        uint64_t full = 1, at = region->off[d];
        for (int k = d + 1; k < ndim; k++)
            full *= region->len[k];
        for (;;) {
            uint64_t have = 0, next = box_end(region, d);
            for (size_t i = 0; i < n; i++) {
                if (box_end(&b[i], d) > at && box_end(&b[i], d) < next)
                    next = box_end(&b[i], d);
                if (b[i].off[d] > at && b[i].off[d] < next)
                    next = b[i].off[d];
                uint64_t v = 1;
                for (int k = d + 1; k < ndim; k++)
                    v *= b[i].len[k];
                if (b[i].off[d] <= at && at < box_end(&b[i], d))
                    have += v;
            }
            if (have < full || next == box_end(region, d))
                break;
            at = next;
        }
        coord[d] = at;
        size_t kept = 0;
        for (size_t i = 0; i < n; i++)
            if (b[i].off[d] <= at && at < box_end(&b[i], d))
                b[kept++] = b[i];
        n = kept;
    }
    return hole_at(ndim, coord);
}

/* The dimension along which the boxes begin at most places: there the sweep plane cuts the fewest. Leaves them sorted
 * along it. */
static int sort_for_sweep(int ndim, struct box *b, size_t n)
{
    int best = 0;
    size_t most = 0;
    for (int d = 0; d < ndim; d++) {
        size_t places = 1;
        sort_along(d, b, n);
        for (size_t i = 1; i < n; i++)
            places += b[i].off[d] != b[i - 1].off[d];
        if (places > most) {
            most = places;
            best = d;
        }
    }
    sort_along(best, b, n);
    return best;
}

static status *sweep(int ndim, const struct box *region, struct box *b, size_t n)
{
    size_t *active = mem_array(NULL, n, sizeof *active), actives = 0;
    if (!active)
        return ERR(NO_MEMORY, "tiling of %zu boxes", n);
    int d = sort_for_sweep(ndim, b, n);
    uint64_t volume = 0;
    status *st = NULL;
    for (size_t i = 0; i < n && !st; i++) {
        size_t kept = 0;
        for (size_t k = 0; k < actives && !st; k++) {
            const struct box *o = &b[active[k]];
            if (box_end(o, d) <= b[i].off[d])
                continue;
            active[kept++] = active[k];
            if (intersect(ndim, o, &b[i]))
                st = overlap(ndim, o, &b[i]);
        }
        active[kept++] = i;
        actives = kept;
        volume += box_volume(ndim, &b[i]);
    }
    mem_free(active);
    if (!st && volume != box_volume(ndim, region))
        st = find_hole(ndim, region, b, n);
    return st;
}

/* How many groups follow one another along d (the boxes are sorted along it); an error where there is a gap. */
static status *count_groups(int ndim, const struct box *region, const struct box *b, size_t n, int d, size_t *groups)
{
    uint64_t reach = region->off[d];
    *groups = 0;
    for (size_t i = 0; i <= n; i++) {
        uint64_t begin = i < n ? b[i].off[d] : box_end(region, d);
        if (begin > reach) {
            uint64_t coord[LAYOUT_DIMS];
            for (int k = 0; k < ndim; k++)
                coord[k] = k == d ? reach : region->off[k];
            return hole_at(ndim, coord);
        }
        if (i == n)
            break;
        *groups += begin == reach;
        if (box_end(&b[i], d) > reach)
            reach = box_end(&b[i], d);
    }
    return NULL;
}

static status *cover(int ndim, const struct box *region, struct box *b, size_t n, int depth)
{
    for (int d = 0; d < ndim; d++) {
        size_t groups;
        sort_along(d, b, n);
        TRY(count_groups(ndim, region, b, n, d, &groups));
        if (groups < 2 || depth == DEPTH_MAX)
            continue;
        for (size_t i = 0; i < n;) {
            struct box slab = *region;
            size_t first = i;
            uint64_t reach = box_end(&b[i], d);
            for (i++; i < n && b[i].off[d] < reach; i++)
                if (box_end(&b[i], d) > reach)
                    reach = box_end(&b[i], d);
            slab.off[d] = b[first].off[d];
            slab.len[d] = reach - slab.off[d];
            TRY(cover(ndim, &slab, b + first, i - first, depth + 1));
        }
        return NULL;
    }
    return n > 1 ? sweep(ndim, region, b, n) : NULL;
}

status *tiling_check(const struct shape *s, struct box *box, size_t count)
{
    struct box region = piece_whole(s).box;
    if (!box_volume(s->ndim, &region))
        return NULL;
    if (!count)
        return hole_at(s->ndim, region.off);
    if (!s->ndim) /* one element: no dimension to divide */
        return count == 1 ? NULL : overlap(0, box, box);
    return cover(s->ndim, &region, box, count, 0);
}
