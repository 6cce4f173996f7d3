/* layout: see layout.h. Invariants that every function here relies on and keeps:
 *   (1) a piece that passed piece_check has a volume below 2^63, so sums and products of its parts do not overflow;
 *   (2) entries of a box at and after ndim are 0, so pieces compare without knowing ndim;
 *   (3) cuts are exact: part i ends where part i + 1 begins, part 0 begins at 0, the last ends at the total.
 * Read piece_boxes for how a flat run becomes boxes, layout_piece for how a mesh cuts a tensor. */
#include "ckpt/layout.h"

#include "comm/base/status.h"

#include <stdio.h>
#include <string.h>

uint64_t shape_volume(const struct shape *s, bool *ok)
{
    uint64_t v = 1;
    *ok = s->ndim >= 0 && s->ndim <= LAYOUT_DIMS;
    if (!*ok)
        return 0;
    for (int d = 0; d < s->ndim; d++)
        if (!s->dim[d])
            return 0; /* an empty tensor, whatever its other dimensions are */
    for (int d = 0; d < s->ndim; d++)
        if (__builtin_mul_overflow(v, s->dim[d], &v) || v > INT64_MAX) {
            *ok = false;
            return 0;
        }
    return v;
}

uint64_t box_volume(int ndim, const struct box *b)
{
    uint64_t v = 1;
    for (int d = 0; d < ndim; d++)
        v *= b->len[d];
    return v;
}

struct piece piece_of_box(int ndim, const struct box *b)
{
    return (struct piece){ .box = *b, .begin = 0, .end = box_volume(ndim, b) };
}

uint64_t box_element(const struct shape *s, const struct box *b, uint64_t e)
{
    uint64_t at = 0, stride = 1;
    for (int i = s->ndim - 1; i >= 0; i--) {
        at += (b->off[i] + e % b->len[i]) * stride;
        e /= b->len[i];
        stride *= s->dim[i];
    }
    return at;
}

struct piece piece_whole(const struct shape *s)
{
    struct box b = { 0 };
    for (int d = 0; d < s->ndim; d++)
        b.len[d] = s->dim[d];
    return piece_of_box(s->ndim, &b);
}

uint64_t piece_elems(const struct piece *p)
{
    return p->end - p->begin;
}

static int compare_u64(const uint64_t *a, const uint64_t *b, int n)
{
    for (int i = 0; i < n; i++)
        if (a[i] != b[i])
            return a[i] < b[i] ? -1 : 1;
    return 0;
}

int piece_compare(const struct piece *a, const struct piece *b)
{
    int c = compare_u64(a->box.off, b->box.off, LAYOUT_DIMS);
    if (!c)
        c = compare_u64(a->box.len, b->box.len, LAYOUT_DIMS);
    if (!c)
        c = compare_u64(&a->begin, &b->begin, 1);
    return c ? c : compare_u64(&a->end, &b->end, 1);
}

bool piece_equal(const struct piece *a, const struct piece *b)
{
    return memcmp(a, b, sizeof *a) == 0; /* numbers alone, without a gap */
}

bool piece_is_box(int ndim, const struct piece *p)
{
    return p->begin == 0 && p->end == box_volume(ndim, &p->box);
}

void dims_text(int ndim, const uint64_t *v, char *text, size_t bytes)
{
    size_t n = (size_t)snprintf(text, bytes, "(");
    for (int d = 0; d < ndim && n < bytes; d++)
        n += (size_t)snprintf(text + n, bytes - n, d ? ", %llu" : "%llu", (unsigned long long)v[d]);
    if (n + 1 < bytes)
        snprintf(text + n, bytes - n, ")");
    else if (bytes > 4)
        snprintf(text + bytes - 4, 4, "...");
}

status *piece_check(const struct shape *s, const struct piece *p)
{
    if (s->ndim < 0 || s->ndim > LAYOUT_DIMS)
        return ERR(INVALID, "a shape of %d dimensions; 0 to %d can be held", s->ndim, LAYOUT_DIMS);
    bool ok;
    shape_volume(s, &ok);
    if (!ok)
        return ERR(INVALID, "the shape has more than 2^63 - 1 elements");
    for (int d = 0; d < s->ndim; d++)
        if (p->box.off[d] > s->dim[d] || p->box.len[d] > s->dim[d] - p->box.off[d])
            return ERR(INVALID, "dimension %d: box [%llu, +%llu) leaves the shape's %llu", d,
                       (unsigned long long)p->box.off[d], (unsigned long long)p->box.len[d],
                       (unsigned long long)s->dim[d]);
    for (int d = s->ndim; d < LAYOUT_DIMS; d++)
        if (p->box.off[d] || p->box.len[d])
            return ERR(INVALID, "the box has an entry for dimension %d of a tensor of %d", d, s->ndim);
    uint64_t volume = box_volume(s->ndim, &p->box);
    if (p->begin > p->end || p->end > volume)
        return ERR(INVALID, "run [%llu, %llu) leaves its box of %llu elements", (unsigned long long)p->begin,
                   (unsigned long long)p->end, (unsigned long long)volume);
    return NULL;
}

/* From `at`, take the largest box that starts there and lies in the run: the outermost dimension d in which `at` is the
 * start of a whole row, as many rows of it as fit. On the way up each dimension gives one box, the outermost one, on
 * the way down one each: 2 ndim - 1. */
int piece_boxes(int ndim, const struct piece *p, struct piece_box out[LAYOUT_BOXES])
{
    uint64_t row[LAYOUT_DIMS]; /* row[d]: elements of one index of dimension d */
    int n = 0;

    if (p->begin >= p->end)
        return 0;
    if (!ndim || piece_is_box(ndim, p)) { /* most are */
        out[0] = (struct piece_box){ .box = p->box };
        return 1;
    }
    row[ndim - 1] = 1;
    for (int d = ndim - 1; d > 0; d--)
        row[d - 1] = row[d] * p->box.len[d];
    for (uint64_t at = p->begin; at < p->end;) {
        int d = 0;
        while (at % row[d] || row[d] > p->end - at)
            d++;
        uint64_t index = at / row[d] % p->box.len[d], rows = (p->end - at) / row[d];
        if (rows > p->box.len[d] - index)
            rows = p->box.len[d] - index;
        struct piece_box *b = &out[n++];
        *b = (struct piece_box){ .box = p->box, .start = at - p->begin };
        for (int k = 0; k < d; k++) {
            b->box.off[k] += at / row[k] % p->box.len[k];
            b->box.len[k] = 1;
        }
        b->box.off[d] += index;
        b->box.len[d] = rows;
        at += rows * row[d];
    }
    return n;
}

static uint64_t cut_at(uint64_t total, uint64_t n, uint64_t i)
{
    return (uint64_t)((unsigned __int128)i * total / n);
}

void layout_cut(uint64_t total, uint64_t n, uint64_t i, uint64_t *begin, uint64_t *end)
{
    *begin = cut_at(total, n, i);
    *end = cut_at(total, n, i + 1);
}

static uint64_t cut_at_aligned(uint64_t total, uint64_t align, uint64_t n, uint64_t i)
{
    uint64_t units = total / align + (total % align != 0);
    unsigned __int128 at = (unsigned __int128)cut_at(units, n, i) * align;
    return at < total ? (uint64_t)at : total;
}

void layout_cut_aligned(uint64_t total, uint64_t align, uint64_t n, uint64_t i, uint64_t *begin, uint64_t *end)
{
    *begin = cut_at_aligned(total, align, n, i);
    *end = cut_at_aligned(total, align, n, i + 1);
}

/* The run of the local box that belongs to the rank at `coord`: its part of the bucket, clipped to where the tensor
 * lies in it. */
static void cut_run(const struct layout *l, const struct mesh *m, const int coord[MESH_AXES], struct piece *p)
{
    uint64_t volume = p->end, n = 1, i = 0, begin, end;
    uint64_t align = l->run_align ? l->run_align : 1, total = l->bucket_total ? l->bucket_total : volume;

    for (int axis = 0; axis < MESH_AXES; axis++)
        if (l->run_axes >> axis & 1) {
            n *= (uint64_t)m->size[axis];
            i = i * (uint64_t)m->size[axis] + (uint64_t)coord[axis];
        }
    CHECK(l->bucket_begin <= total && volume <= total - l->bucket_begin, "a tensor leaves its bucket");
    layout_cut_aligned(total, align, n, i, &begin, &end);
    begin = begin > l->bucket_begin ? begin - l->bucket_begin : 0;
    end = end > l->bucket_begin ? end - l->bucket_begin : 0;
    p->begin = begin < volume ? begin : volume;
    p->end = end < volume ? end : volume;
    if (p->begin == p->end)
        p->begin = p->end = 0; /* all empty runs of a box are equal */
}

struct piece layout_piece(const struct layout *l, const struct mesh *m, int rank)
{
    int coord[MESH_AXES];
    struct box b = { 0 };

    mesh_coords(m, rank, coord);
    if (l->stage >= 0 && coord[MESH_PP] != l->stage)
        return (struct piece){ .begin = 0 };
    for (int d = 0; d < l->shape.ndim; d++) {
        uint64_t begin = 0, end = l->shape.dim[d];
        int axis = l->cut[d];
        if (axis >= 0)
            layout_cut(l->shape.dim[d], (uint64_t)m->size[axis], (uint64_t)coord[axis], &begin, &end);
        b.off[d] = begin;
        b.len[d] = end - begin;
    }
    struct piece p = piece_of_box(l->shape.ndim, &b);
    if (l->run_axes)
        cut_run(l, m, coord, &p);
    return p;
}
