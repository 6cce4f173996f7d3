/* merge_plan: see merge_plan.h. Pieces of a tensor are in piece_compare order, so the runs of a box follow one another,
 * ascending:
 *
 *   collect: pieces -> lots (a box, or a piece as it was); give: writers of the merged ones; store: lots -> the plan
 *
 * Invariant: the plan changes only once everything has been found and all memory is there. */
#include "ckpt/merge_plan.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>
#include <string.h>

/* A stored piece to be: the plan's pieces [first, first + count). */
struct lot {
    struct plan_piece piece;
    uint64_t first, count, bytes;
    bool merged;
};

struct merger {
    struct plan *p;
    const int32_t *node_of;
    struct lot *lot;
    uint64_t lots, sources;
    uint64_t *load, *node_load; /* [ranks] */
};

uint64_t merge_row_elems(int ndim, const struct piece *p)
{
    struct piece_box box[LAYOUT_BOXES];
    if (piece_boxes(ndim, p, box) != 1)
        return 0;
    uint64_t row = piece_elems(p);
    for (int d = 0; d < ndim; d++)
        if (box[0].box.len[d] > 1)
            return row / box[0].box.len[d];
    return row;
}

/* ---- collect */

static int ndim_of(const struct plan *p, uint64_t piece)
{
    return p->tensor[p->piece[piece].tensor].shape.ndim;
}

static uint64_t bytes_of(const struct plan *p, const struct plan_piece *q)
{
    return piece_elems(&q->piece) * dtype_bytes(p->tensor[q->tensor].dtype);
}

/* Pieces [from, end) are runs of one box: whether they make it up, and cannot be boxes by themselves. */
static bool is_irregular(const struct plan *p, uint64_t from, uint64_t end)
{
    int ndim = ndim_of(p, from);
    uint64_t at = 0;
    bool boxes = true;
    for (uint64_t i = from; i < end; i++) {
        const struct piece *q = &p->piece[i].piece;
        if (q->begin != at)
            return false;
        at = q->end;
        boxes = boxes && merge_row_elems(ndim, q);
    }
    return !boxes && at == box_volume(ndim, &p->piece[from].piece.box);
}

static void add_lot(struct merger *m, uint64_t first, uint64_t count, bool merged)
{
    const struct plan *p = m->p;
    struct lot *l = &m->lot[m->lots++];
    int ndim = ndim_of(p, first);
    *l = (struct lot){ .piece = p->piece[first], .first = first, .count = count, .merged = merged };
    struct piece_box box[LAYOUT_BOXES];
    if (merged) {
        l->piece.local = PLAN_MERGED;
        l->piece.local_offset = 0;
        l->piece.piece = piece_of_box(ndim, &l->piece.piece.box);
        m->sources += count;
    } else if (piece_boxes(ndim, &l->piece.piece, box) == 1) {
        l->piece.piece = piece_of_box(ndim, &box[0].box);
    }
    l->bytes = bytes_of(p, &l->piece);
}

static int compare_lots(const void *a, const void *b)
{
    return piece_compare(&((const struct lot *)a)->piece.piece, &((const struct lot *)b)->piece.piece);
}

/* The lots of a tensor, in piece_compare order: boxes described anew may have moved. */
static void collect(struct merger *m, const struct plan_tensor *t)
{
    const struct plan *p = m->p;
    uint64_t from = t->first_piece, all = from + t->piece_count, lots = m->lots;
    for (uint64_t end; from < all; from = end) {
        const struct box *box = &p->piece[from].piece.box;
        for (end = from + 1; end < all && !memcmp(&p->piece[end].piece.box, box, sizeof *box);)
            end++;
        if (is_irregular(p, from, end)) {
            add_lot(m, from, end - from, true);
            continue;
        }
        for (uint64_t i = from; i < end; i++)
            add_lot(m, i, 1, false);
    }
    if (m->lots > lots)
        qsort(m->lot + lots, m->lots - lots, sizeof *m->lot, compare_lots);
}

/* ---- give */

static void load_rank(struct merger *m, int32_t rank, uint64_t bytes)
{
    m->load[rank] += bytes;
    if (m->node_of)
        m->node_load[m->node_of[rank]] += bytes;
}

static bool is_better(const struct merger *m, int32_t a, int32_t b)
{
    if (m->load[a] != m->load[b])
        return m->load[a] < m->load[b];
    uint64_t na = m->node_of ? m->node_load[m->node_of[a]] : 0, nb = m->node_of ? m->node_load[m->node_of[b]] : 0;
    return na != nb ? na < nb : a < b;
}

static int compare_size(const void *va, const void *vb)
{
    const struct lot *a = *(const struct lot *const *)va, *b = *(const struct lot *const *)vb;
    if (a->bytes != b->bytes)
        return a->bytes > b->bytes ? -1 : 1;
    return (a > b) - (a < b);
}

/* by_size: room for every lot. */
static void give_all(struct merger *m, const uint64_t *extra_bytes, struct lot **by_size)
{
    const struct plan *p = m->p;
    uint64_t n = 0;
    for (int32_t r = 0; extra_bytes && r < p->ranks; r++)
        load_rank(m, r, extra_bytes[r]);
    for (uint64_t i = 0; i < m->lots; i++) {
        if (m->lot[i].merged)
            by_size[n++] = &m->lot[i];
        else
            load_rank(m, m->lot[i].piece.writer, m->lot[i].bytes);
    }
    if (n)
        qsort(by_size, n, sizeof(struct lot *), compare_size);
    for (uint64_t i = 0; i < n; i++) {
        struct lot *l = by_size[i];
        for (uint64_t k = l->first; k < l->first + l->count; k++)
            if (is_better(m, p->piece[k].writer, l->piece.writer))
                l->piece.writer = p->piece[k].writer;
        load_rank(m, l->piece.writer, l->bytes);
    }
}

/* ---- store */

static void add_sources(struct merger *m, const struct lot *l, uint64_t order, struct plan_source *to)
{
    const struct plan *p = m->p;
    for (uint64_t i = 0; i < l->count; i++) {
        const struct plan_piece *q = &p->piece[l->first + i];
        to[i] = (struct plan_source){ .order = order,
                                      .writer = l->piece.writer,
                                      .rank = q->writer,
                                      .local = q->local,
                                      .elem_bytes = (uint32_t)dtype_bytes(p->tensor[q->tensor].dtype),
                                      .local_offset = q->local_offset,
                                      .at = q->piece.begin,
                                      .elems = piece_elems(&q->piece) };
    }
}

/* source: room for all sources. The plan's pieces are overwritten last. */
static void store(struct merger *m, struct plan_source *source)
{
    struct plan *p = m->p;
    uint64_t sources = 0;
    for (uint64_t i = 0; i < m->lots; i++)
        if (m->lot[i].merged) {
            add_sources(m, &m->lot[i], i, source + sources);
            sources += m->lot[i].count;
        }
    memset(p->rank_bytes, 0, (size_t)p->ranks * sizeof *p->rank_bytes);
    uint64_t at = 0;
    for (uint64_t t = 0; t < p->tensor_count; t++) {
        uint64_t first = at;
        for (; at < m->lots && m->lot[at].piece.tensor == t; at++) {
            p->piece[at] = m->lot[at].piece;
            p->piece[at].number = (uint32_t)(at - first);
            p->rank_bytes[p->piece[at].writer] += m->lot[at].bytes;
        }
        p->tensor[t].first_piece = first;
        p->tensor[t].piece_count = at - first;
    }
    p->piece_count = m->lots;
    p->source = source;
    p->source_count = sources;
}

status *plan_merge(struct plan *p, const int32_t *node_of, const uint64_t *extra_bytes)
{
    struct merger m = { .p = p, .node_of = node_of };
    m.lot = mem_array(NULL, p->piece_count, sizeof *m.lot);
    m.load = mem_calloc((size_t)p->ranks, sizeof *m.load);
    m.node_load = mem_calloc((size_t)p->ranks, sizeof *m.node_load);
    struct lot **by_size = mem_array(NULL, p->piece_count, sizeof(struct lot *));
    struct plan_source *source = NULL;
    if (m.lot && m.load && m.node_load && by_size) {
        for (uint64_t t = 0; t < p->tensor_count; t++)
            collect(&m, &p->tensor[t]);
        give_all(&m, extra_bytes, by_size);
        source = mem_array(NULL, m.sources, sizeof *source);
    }
    if (source)
        store(&m, source);
    mem_free(by_size);
    mem_free(m.lot);
    mem_free(m.load);
    mem_free(m.node_load);
    return source ? NULL : ERR(NO_MEMORY, "merging %llu pieces", (unsigned long long)p->piece_count);
}

/* ---- who has to know what */

/* Hands out (rank, source) pairs; counts them where list is NULL. */
struct dealer {
    uint64_t *at; /* [ranks] */
    struct plan_source *list;
};

static void deal(struct dealer *d, int32_t rank, const struct plan_source *s)
{
    uint64_t at = d->at[rank]++;
    if (d->list)
        d->list[at] = *s;
}

/* Sources [from, end) of one merged piece. seen: [ranks], of the piece whose order it says, plus 1. */
static void deal_piece(struct dealer *d, const struct plan_source *s, uint64_t from, uint64_t end, uint64_t *seen)
{
    for (uint64_t i = from; !seen && i < end; i++) {
        deal(d, s[i].writer, &s[i]);
        if (s[i].rank != s[i].writer)
            deal(d, s[i].rank, &s[i]);
    }
    for (uint64_t i = from; seen && i < end; i++) {
        if (seen[s[i].rank] == s[from].order + 1)
            continue;
        seen[s[i].rank] = s[from].order + 1;
        for (uint64_t k = from; k < end; k++)
            deal(d, s[i].rank, &s[k]);
    }
}

static void deal_all(struct dealer *d, const struct plan *p, uint64_t *seen)
{
    if (seen)
        memset(seen, 0, (size_t)p->ranks * sizeof *seen);
    for (uint64_t from = 0, end; from < p->source_count; from = end) {
        for (end = from + 1; end < p->source_count && p->source[end].order == p->source[from].order;)
            end++;
        deal_piece(d, p->source, from, end, seen);
    }
}

status *plan_sources_by_rank(const struct plan *p, bool gather, struct plan_source **list, uint64_t **first)
{
    size_t ranks = (size_t)p->ranks;
    uint64_t *f = mem_calloc(ranks + 1, sizeof *f);
    uint64_t *seen = mem_calloc(ranks, sizeof *seen);
    struct dealer d = { .at = mem_calloc(ranks, sizeof *d.at) };
    if (f && seen && d.at) {
        deal_all(&d, p, gather ? seen : NULL);
        for (size_t r = 0; r < ranks; r++)
            f[r + 1] = f[r] + d.at[r];
        memcpy(d.at, f, ranks * sizeof *d.at);
        d.list = mem_array(NULL, f[ranks], sizeof *d.list);
    }
    if (d.list)
        deal_all(&d, p, gather ? seen : NULL);
    mem_free(seen);
    mem_free(d.at);
    if (!d.list) {
        mem_free(f);
        return ERR(NO_MEMORY, "%llu sources of merged pieces", (unsigned long long)p->source_count);
    }
    *list = d.list;
    *first = f;
    return NULL;
}

uint64_t merge_wire_bytes(const struct plan *p, bool gather)
{
    uint64_t sum = 0;
    for (uint64_t from = 0, end; from < p->source_count; from = end) {
        const struct plan_source *s = p->source + from;
        uint64_t ranks = 0;
        for (end = from; end < p->source_count && p->source[end].order == s->order; end++) {
            bool first = true;
            for (uint64_t k = from; gather && first && k < end; k++)
                first = p->source[k].rank != p->source[end].rank;
            ranks += first;
        }
        for (uint64_t i = from; i < end; i++) {
            uint64_t bytes = p->source[i].elems * p->source[i].elem_bytes;
            sum += gather ? bytes * (ranks - 1) : p->source[i].rank == p->source[i].writer ? 0 : bytes;
        }
    }
    return sum;
}
