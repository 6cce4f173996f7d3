/* reshard: see reshard.h. Two halves that meet in struct reshard_copy:
 *
 *   which elements: runs -> boxes -> one sweep over both sides -> intersections -> strided copies -> fused, sorted
 *   moving them:    a copy clipped to [lo, hi) of the stored run is a range of its elements in row-major order (`walk`)
 *
 * Invariants: (1) a box cut from a run is contiguous in it, so its element at coordinate x lies at start + sum (x -
 * off) stride, strides being those of the piece's whole box; (2) so in a copy both positions ascend with the row-major
 * order of its elements, and stride[d] exceeds every position inside one index of d: counting and clipping need no
 * walk. */
#include "ckpt/reshard.h"

#include "ckpt/order.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>
#include <string.h>

/* A box of a stored or wanted run. */
struct part {
    struct box box;
    uint64_t start; /* position in the run of its first element */
    uint32_t piece;
    bool wanted;
};

void reshard_list_free(struct reshard_list *l)
{
    mem_free(l->copy);
    *l = (struct reshard_list){ .copy = NULL };
}

/* ---- positions ---- */

/* Elements of a grid whose position, counted from its first element, is below `at`. */
static uint64_t grid_below(int ndim, const uint64_t *len, const uint64_t *stride, uint64_t at)
{
    uint64_t inner = 1, n = 0;
    for (int d = 0; d < ndim; d++)
        inner *= len[d];
    for (int d = 0; d < ndim && at; d++) {
        uint64_t q = at / stride[d], volume = inner;
        inner /= len[d];
        if (q >= len[d])
            return n + volume;
        n += q * inner;
        at -= q * stride[d];
    }
    return n + (at > 0);
}

static uint64_t src_below(const struct reshard_copy *c, uint64_t at)
{
    return at > c->src ? grid_below(c->ndim, c->len, c->src_stride, at - c->src) : 0;
}

static uint64_t dst_below(const struct reshard_copy *c, uint64_t at)
{
    return at > c->dst ? grid_below(c->ndim, c->len, c->dst_stride, at - c->dst) : 0;
}

static uint64_t copy_elems(const struct reshard_copy *c)
{
    uint64_t n = 1;
    for (int d = 0; d < c->ndim; d++)
        n *= c->len[d];
    return n;
}

void reshard_span(const struct reshard_copy *c, uint64_t *begin, uint64_t *end)
{
    uint64_t last = c->src;
    for (int d = 0; d < c->ndim; d++)
        last += (c->len[d] - 1) * c->src_stride[d];
    *begin = c->src;
    *end = last + 1;
}

uint64_t reshard_count(const struct reshard_copy *c, uint64_t lo, uint64_t hi)
{
    return hi > lo ? src_below(c, hi) - src_below(c, lo) : 0;
}

/* ---- which elements ---- */

/* Cut pieces into parts, appended at parts[*n]. */
static void add_parts(int ndim, const struct piece *p, uint32_t count, bool wanted, struct part *parts, size_t *n)
{
    for (uint32_t i = 0; i < count; i++) {
        struct piece_box boxes[LAYOUT_BOXES];
        int k = piece_boxes(ndim, &p[i], boxes);
        for (int b = 0; b < k; b++)
            parts[(*n)++] = (struct part){ .box = boxes[b].box, .start = boxes[b].start, .piece = i, .wanted = wanted };
    }
}

static size_t count_parts(int ndim, const struct piece *p, uint32_t count)
{
    struct piece_box boxes[LAYOUT_BOXES];
    size_t n = 0;
    for (uint32_t i = 0; i < count; i++)
        n += (size_t)piece_boxes(ndim, &p[i], boxes);
    return n;
}

static int compare_u64(uint64_t a, uint64_t b)
{
    return a < b ? -1 : a > b;
}

/* Sort along dimension d, parts that begin at one place as they were; returns at how many places they begin. order,
 * other: [n]. */
static size_t sort_along(int d, const struct part *parts, size_t n, struct order_key *order, struct order_key *other)
{
    size_t places = 1;
    for (size_t i = 0; i < n; i++)
        order[i].key = parts[order[i].item].box.off[d];
    order_sort(order, other, n);
    for (size_t i = 1; i < n; i++)
        places += order[i].key != order[i - 1].key;
    return places;
}

/* Sort along the dimension in which parts begin at most places, where the sweep plane cuts the fewest of them; returns
 * it. */
static int sort_for_sweep(int ndim, const struct part *parts, size_t n, struct order_key *order,
                          struct order_key *other)
{
    int best = 0;
    size_t most = 0;
    for (size_t i = 0; i < n; i++)
        order[i].item = i;
    for (int d = 0; d < ndim; d++) {
        size_t places = sort_along(d, parts, n, order, other);
        if (places > most) {
            most = places;
            best = d;
        }
    }
    if (best != ndim - 1)
        sort_along(best, parts, n, order, other);
    return best;
}

static void strides_of(int ndim, const uint64_t *len, uint64_t *stride)
{
    uint64_t s = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        stride[d] = s;
        s *= len[d];
    }
}

/* The intersection of a stored and a wanted part; false if there is none. Dimensions of one index are left out, those
 * that are contiguous on both sides become one. */
static bool make_copy(int ndim, const struct part *s, const struct part *w, struct reshard_copy *c)
{
    uint64_t src_stride[LAYOUT_DIMS], dst_stride[LAYOUT_DIMS];
    *c = (struct reshard_copy){ .stored = s->piece, .wanted = w->piece, .src = s->start, .dst = w->start };
    strides_of(ndim, s->box.len,
               src_stride); /* the part's own: where they differ from its piece's, the part has one index */
    strides_of(ndim, w->box.len, dst_stride);
    for (int d = 0; d < ndim; d++) {
        uint64_t begin = s->box.off[d] > w->box.off[d] ? s->box.off[d] : w->box.off[d];
        uint64_t s_end = s->box.off[d] + s->box.len[d], w_end = w->box.off[d] + w->box.len[d];
        uint64_t end = s_end < w_end ? s_end : w_end;
        if (begin >= end)
            return false;
        uint64_t len = end - begin;
        c->src += (begin - s->box.off[d]) * src_stride[d];
        c->dst += (begin - w->box.off[d]) * dst_stride[d];
        if (len == 1)
            continue;
        int last = c->ndim - 1;
        if (c->ndim && c->src_stride[last] == len * src_stride[d] && c->dst_stride[last] == len * dst_stride[d]) {
            c->len[last] *= len;
        } else {
            last = c->ndim++;
            c->len[last] = len;
        }
        c->src_stride[last] = src_stride[d];
        c->dst_stride[last] = dst_stride[d];
    }
    if (!c->ndim) {
        c->ndim = 1;
        c->len[0] = c->src_stride[0] = c->dst_stride[0] = 1;
    }
    return true;
}

static status *have_room(struct reshard_list *l)
{
    if (l->count < l->cap)
        return NULL;
    size_t cap = l->cap ? l->cap * 2 : 16;
    struct reshard_copy *more = mem_array(l->copy, cap, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "%zu copies", cap);
    l->copy = more;
    l->cap = cap;
    return NULL;
}

/* The parts of one side that the sweep plane cuts. */
struct active {
    uint32_t *index; /* into the parts; there are less than 2^32 of them */
    size_t count;
};

/* Meet `p` with the other side's active parts; those that have ended leave the list. */
static status *meet(int ndim, int d, const struct part *parts, const struct part *p, struct active *other,
                    struct reshard_list *out)
{
    size_t kept = 0;
    for (size_t k = 0; k < other->count; k++) {
        const struct part *o = &parts[other->index[k]];
        if (ndim && o->box.off[d] + o->box.len[d] <= p->box.off[d])
            continue;
        other->index[kept++] = other->index[k];
        TRY(have_room(out));
        out->count += make_copy(ndim, p->wanted ? o : p, p->wanted ? p : o, &out->copy[out->count]);
    }
    other->count = kept;
    return NULL;
}

static status *sweep(int ndim, struct part *parts, size_t n, struct reshard_list *out)
{
    struct active side[2] = { { mem_array(NULL, n, sizeof(uint32_t)), 0 },
                              { mem_array(NULL, n, sizeof(uint32_t)), 0 } };
    struct order_key *order = mem_array(NULL, 2 * n, sizeof *order);
    status *st = NULL;
    if (!side[0].index || !side[1].index || !order)
        st = ERR(NO_MEMORY, "%zu boxes", n);
    int d = st ? 0 : sort_for_sweep(ndim, parts, n, order, order + n);
    for (size_t i = 0; i < n && !st; i++) {
        const struct part *p = &parts[order[i].item];
        struct active *own = &side[p->wanted];
        st = meet(ndim, d, parts, p, &side[!p->wanted], out);
        own->index[own->count++] = (uint32_t)order[i].item;
    }
    mem_free(side[0].index);
    mem_free(side[1].index);
    mem_free(order);
    return st;
}

/* By pair of pieces, so that what continues comes next. */
static int compare_pair(const void *va, const void *vb)
{
    const struct reshard_copy *a = va, *b = vb;
    int c = compare_u64(a->stored, b->stored);
    if (!c)
        c = compare_u64(a->wanted, b->wanted);
    return c ? c : compare_u64(a->src, b->src);
}

static int compare_order(const void *va, const void *vb)
{
    const struct reshard_copy *a = va, *b = vb;
    int c = compare_u64(a->stored, b->stored);
    if (!c)
        c = compare_u64(a->src, b->src);
    return c ? c : compare_u64(a->wanted, b->wanted);
}

static bool is_row(const struct reshard_copy *c)
{
    return c->ndim == 1 && c->src_stride[0] == 1 && c->dst_stride[0] == 1;
}

static void sort_copies(struct reshard_copy *c, size_t n, int (*compare)(const void *, const void *))
{
    for (size_t i = 1; i < n; i++)
        if (compare(&c[i - 1], &c[i]) > 0) { /* most come in order */
            qsort(c, n, sizeof *c, compare);
            return;
        }
}

/* Where a run was cut into boxes on both sides at the same places, the rows on either side of a cut are one again. */
static size_t join(struct reshard_copy *c, size_t n)
{
    size_t kept = 0;
    sort_copies(c, n, compare_pair);
    for (size_t i = 0; i < n; i++) {
        struct reshard_copy *last = kept ? &c[kept - 1] : NULL;
        if (last && last->stored == c[i].stored && last->wanted == c[i].wanted && is_row(last) && is_row(&c[i]) &&
            last->src + last->len[0] == c[i].src && last->dst + last->len[0] == c[i].dst)
            last->len[0] += c[i].len[0];
        else if (kept++ != i)
            c[kept - 1] = c[i];
    }
    sort_copies(c, kept, compare_order);
    return kept;
}

/* The first position of a wanted run that no copy fills: below it as many elements are filled as there are positions.
 */
static uint64_t first_missing(const struct reshard_copy *c, size_t n, uint32_t wanted, uint64_t elems)
{
    uint64_t full = 0, not_full = elems;
    while (not_full - full > 1) {
        uint64_t at = full + (not_full - full) / 2, have = 0;
        for (size_t i = 0; i < n; i++)
            have += c[i].wanted == wanted ? dst_below(&c[i], at) : 0;
        if (have == at)
            full = at;
        else
            not_full = at;
    }
    return full;
}

static status *missing(int ndim, const struct piece *p, uint64_t at, uint64_t count)
{
    uint64_t coord[LAYOUT_DIMS] = { 0 }, i = p->begin + at;
    char text[LAYOUT_DIMS * 22 + 3];
    for (int d = ndim - 1; d >= 0; d--) {
        coord[d] = p->box.off[d] + i % p->box.len[d];
        i /= p->box.len[d];
    }
    dims_text(ndim, coord, text, sizeof text);
    return ERR(NOT_FOUND, "element %s is stored nowhere, and %llu of the piece's %llu elements in all", text,
               (unsigned long long)count, (unsigned long long)piece_elems(p));
}

static status *check_complete(int ndim, const struct piece *wanted, uint32_t count, const struct reshard_copy *c,
                              size_t n)
{
    uint64_t *have = mem_calloc(count, sizeof *have);
    status *st = have ? NULL : ERR(NO_MEMORY, "%u pieces", count);
    for (size_t i = 0; i < n && !st; i++)
        if (__builtin_add_overflow(have[c[i].wanted], copy_elems(&c[i]), &have[c[i].wanted]))
            have[c[i].wanted] = UINT64_MAX;
    for (uint32_t w = 0; w < count && !st; w++) {
        uint64_t elems = piece_elems(&wanted[w]);
        if (have[w] < elems)
            st = missing(ndim, &wanted[w], first_missing(c, n, w, elems), elems - have[w]);
        else if (have[w] > elems)
            st = ERR(INVALID, "stored pieces overlap: %llu elements for a piece of %llu", (unsigned long long)have[w],
                     (unsigned long long)elems);
    }
    mem_free(have);
    return st;
}

static status *check_pieces(const struct shape *s, const struct piece *p, uint32_t count, const char *what)
{
    for (uint32_t i = 0; i < count; i++) {
        status *st = piece_check(s, &p[i]);
        if (st)
            return status_wrap(st, "%s piece %u", what, i);
    }
    return NULL;
}

status *reshard_tensor(const struct shape *shape, const struct piece *stored, uint32_t stored_count,
                       const struct piece *wanted, uint32_t wanted_count, struct reshard_list *out)
{
    TRY(check_pieces(shape, stored, stored_count, "stored"));
    TRY(check_pieces(shape, wanted, wanted_count, "wanted"));
    size_t n = 0, before = out->count;
    size_t total = count_parts(shape->ndim, stored, stored_count) + count_parts(shape->ndim, wanted, wanted_count);
    if (total > UINT32_MAX)
        return ERR(INVALID, "%zu boxes; 2^32 - 1 can be met", total);
    struct part *parts = mem_array(NULL, total, sizeof *parts);
    if (!parts)
        return ERR(NO_MEMORY, "%zu boxes", total);
    add_parts(shape->ndim, stored, stored_count, false, parts, &n);
    add_parts(shape->ndim, wanted, wanted_count, true, parts, &n);
    status *st = n ? sweep(shape->ndim, parts, n, out) : NULL;
    mem_free(parts);
    if (!st && out->count > before)
        out->count = before + join(out->copy + before, out->count - before);
    if (!st)
        st = check_complete(shape->ndim, wanted, wanted_count, out->count > before ? out->copy + before : NULL,
                            out->count - before);
    if (st)
        out->count = before;
    return st;
}

/* ---- moving them ---- */

/* One side of a move: memory seen through strides, or elements that follow one another in walking order. */
struct side {
    unsigned char *base;   /* of the grid's element (0, 0, ...); in sequence: of the first element walked */
    const int64_t *stride; /* in elements, may be negative; NULL: in sequence */
};

/* n elements from `from`, `from_step` bytes apart, to `to`. */
static void copy_row(unsigned char *to, int64_t to_step, const unsigned char *from, int64_t from_step, uint64_t n,
                     size_t elem_bytes)
{
    if (to_step == (int64_t)elem_bytes && from_step == (int64_t)elem_bytes) {
        memcpy(to, from, n * elem_bytes);
        return;
    }
    switch (elem_bytes) { /* constant sizes become plain moves */
    case 1:
        for (uint64_t i = 0; i < n; i++, to += to_step, from += from_step)
            *to = *from;
        break;
    case 2:
        for (uint64_t i = 0; i < n; i++, to += to_step, from += from_step)
            memcpy(to, from, 2);
        break;
    case 4:
        for (uint64_t i = 0; i < n; i++, to += to_step, from += from_step)
            memcpy(to, from, 4);
        break;
    default:
        for (uint64_t i = 0; i < n; i++, to += to_step, from += from_step)
            memcpy(to, from, elem_bytes);
        break;
    }
}

static int64_t side_offset(const struct side *s, int ndim, const uint64_t *index, uint64_t walked)
{
    int64_t at = 0;
    if (!s->stride)
        return (int64_t)walked;
    for (int d = 0; d < ndim; d++)
        at += (int64_t)index[d] * s->stride[d];
    return at;
}

/* Move elements [first, end) of a grid, counted in row-major order, one row of the last dimension at a time. ndim >= 1.
 */
static void walk(int ndim, const uint64_t *len, uint64_t first, uint64_t end, size_t elem_bytes, struct side to,
                 struct side from)
{
    uint64_t index[LAYOUT_DIMS], rest = first, row = len[ndim - 1];
    int64_t size = (int64_t)elem_bytes;
    int64_t to_step = to.stride ? to.stride[ndim - 1] * size : size;
    int64_t from_step = from.stride ? from.stride[ndim - 1] * size : size;

    if (first >= end)
        return;
    for (int d = ndim - 1; d >= 0; d--) {
        index[d] = rest % len[d];
        rest /= len[d];
    }
    for (uint64_t at = first; at < end;) {
        uint64_t n = row - index[ndim - 1];
        if (n > end - at)
            n = end - at;
        copy_row(to.base + side_offset(&to, ndim, index, at - first) * size, to_step,
                 from.base + side_offset(&from, ndim, index, at - first) * size, from_step, n, elem_bytes);
        at += n;
        index[ndim - 1] = 0;
        for (int d = ndim - 2; d >= 0 && ++index[d] == len[d]; d--)
            index[d] = 0;
    }
}

/* The copy's elements in [lo, hi), as a range of its elements in row-major order. */
static uint64_t clip(const struct reshard_copy *c, uint64_t lo, uint64_t hi, uint64_t *first)
{
    *first = src_below(c, lo);
    return hi > lo ? src_below(c, hi) : *first;
}

static void signed_strides(const struct reshard_copy *c, int64_t *src, int64_t *dst)
{
    for (int d = 0; d < c->ndim; d++) {
        src[d] = (int64_t)c->src_stride[d];
        dst[d] = (int64_t)c->dst_stride[d];
    }
}

/* Base addresses may lie outside their memory (a copy that begins before lo), so they are computed as numbers. */
static unsigned char *address(const void *p, int64_t elems, size_t elem_bytes)
{
    return (unsigned char *)((uintptr_t)p + (uintptr_t)(elems * (int64_t)elem_bytes));
}

void reshard_apply(const struct reshard_copy *c, size_t elem_bytes, const void *src, uint64_t lo, uint64_t hi,
                   void *dst)
{
    int64_t src_stride[LAYOUT_DIMS], dst_stride[LAYOUT_DIMS];
    uint64_t first, end = clip(c, lo, hi, &first);
    signed_strides(c, src_stride, dst_stride);
    walk(c->ndim, c->len, first, end, elem_bytes,
         (struct side){ address(dst, (int64_t)c->dst, elem_bytes), dst_stride },
         (struct side){ address(src, (int64_t)(c->src - lo), elem_bytes), src_stride });
}

size_t reshard_pack(const struct reshard_copy *c, size_t elem_bytes, const void *src, uint64_t lo, uint64_t hi,
                    void *message)
{
    int64_t src_stride[LAYOUT_DIMS], dst_stride[LAYOUT_DIMS];
    uint64_t first, end = clip(c, lo, hi, &first);
    signed_strides(c, src_stride, dst_stride);
    walk(c->ndim, c->len, first, end, elem_bytes, (struct side){ message, NULL },
         (struct side){ address(src, (int64_t)(c->src - lo), elem_bytes), src_stride });
    return (end - first) * elem_bytes;
}

size_t reshard_unpack(const struct reshard_copy *c, size_t elem_bytes, const void *message, uint64_t lo, uint64_t hi,
                      void *dst)
{
    int64_t src_stride[LAYOUT_DIMS], dst_stride[LAYOUT_DIMS];
    uint64_t first, end = clip(c, lo, hi, &first);
    signed_strides(c, src_stride, dst_stride);
    walk(c->ndim, c->len, first, end, elem_bytes,
         (struct side){ address(dst, (int64_t)c->dst, elem_bytes), dst_stride },
         (struct side){ address(message, 0, elem_bytes), NULL });
    return (end - first) * elem_bytes;
}

/* A box seen through strides, dimensions fused where the memory is contiguous. Returns its dimensions, at least 1. */
static int strided_grid(int ndim, const struct piece *p, const int64_t *strides, uint64_t *len, int64_t *stride)
{
    int n = 0;
    for (int d = 0; d < ndim; d++) {
        if (p->box.len[d] == 1)
            continue;
        if (n && stride[n - 1] == (int64_t)p->box.len[d] * strides[d]) {
            len[n - 1] *= p->box.len[d];
            stride[n - 1] = strides[d];
        } else {
            len[n] = p->box.len[d];
            stride[n++] = strides[d];
        }
    }
    if (!n) {
        len[0] = 1;
        stride[n++] = 1;
    }
    return n;
}

void piece_gather(int ndim, const struct piece *p, size_t elem_bytes, const void *base, const int64_t *strides,
                  uint64_t lo, uint64_t hi, void *out)
{
    uint64_t len[LAYOUT_DIMS];
    int64_t stride[LAYOUT_DIMS];
    if (lo >= hi)
        return;
    if (!strides) {
        memcpy(out, (const unsigned char *)base + lo * elem_bytes, (hi - lo) * elem_bytes);
        return;
    }
    int n = strided_grid(ndim, p, strides, len, stride);
    walk(n, len, p->begin + lo, p->begin + hi, elem_bytes, (struct side){ out, NULL },
         (struct side){ address(base, 0, elem_bytes), stride });
}

void piece_scatter(int ndim, const struct piece *p, size_t elem_bytes, void *base, const int64_t *strides, uint64_t lo,
                   uint64_t hi, const void *in)
{
    uint64_t len[LAYOUT_DIMS];
    int64_t stride[LAYOUT_DIMS];
    if (lo >= hi)
        return;
    if (!strides) {
        memcpy((unsigned char *)base + lo * elem_bytes, in, (hi - lo) * elem_bytes);
        return;
    }
    int n = strided_grid(ndim, p, strides, len, stride);
    walk(n, len, p->begin + lo, p->begin + hi, elem_bytes, (struct side){ base, stride },
         (struct side){ address(in, 0, elem_bytes), NULL });
}
