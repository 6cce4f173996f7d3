/* plan: see plan.h. One pass over the descriptors, in whatever order they come, then only what is distinct counts:
 *
 *   find: descriptor -> tensor (hash table), group of equal pieces (holders.c); sort tensors by name, groups by piece
 *   lay:  [tensor: its groups tile it -> items] ... -> aliases
 *   give: lone items to their holder; the others, largest first, to the least loaded one
 *
 * Invariants: (1) empty pieces are not stored: a tensor without elements, like an alias, has no pieces. (2) Ties are
 * broken by content, never by position in the input, so equal inputs in any order give equal plans. */
#include "ckpt/plan.h"

#include "ckpt/holders.h"
#include "ckpt/merge_plan.h"
#include "ckpt/tiling.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>

enum { SPLIT_ALIGN_BYTES = 4096, SPLIT_DEFAULT_BYTES = 4 << 20, DIMS_TEXT = LAYOUT_DIMS * 22 + 3 };

typedef unsigned long long ull;

/* A tensor, by the descriptor that was met first. */
struct found {
    uint64_t desc, hash;
};

/* A stored piece to be: elements [begin, end) of its group's. */
struct item {
    uint32_t tensor, group;
    uint64_t begin, end;
};

struct maker {
    const struct plan_desc *desc;
    uint64_t count;
    const char *text;
    size_t text_bytes;
    int ranks;
    uint64_t split_bytes;
    const int32_t *node_of;
    bool whole_rows; /* parts of a split piece are boxes */
    struct plan *plan;
    size_t text_used;
    struct found *found;
    uint64_t tensors, tensor_cap;
    uint32_t *by_name; /* [tensors] */
    struct table tensor_table;
    struct holders holders; /* tag: index in the rank's state */
    struct item *item;
    uint64_t items, item_cap;
    struct box *box; /* of the tensor at hand */
    uint64_t boxes, box_cap;
    uint64_t *load, *node_load; /* [ranks] bytes given so far, with the extra ones */
};

/* ---- find */

static uint64_t hash_of_tensor(const void *owner, uint32_t i)
{
    return ((const struct maker *)owner)->found[i].hash;
}

static int compare_text(const char *text, uint64_t a, uint64_t b)
{
    return a == b ? 0 : strcmp(text + a, text + b);
}

/* Of texts that may be none. */
static bool same_text(const char *text, uint64_t a, uint64_t b)
{
    return a == b || (a != UINT64_MAX && b != UINT64_MAX && !strcmp(text + a, text + b));
}

static bool same_shape(const struct shape *a, const struct shape *b)
{
    return a->ndim == b->ndim && !memcmp(a->dim, b->dim, (size_t)a->ndim * sizeof *a->dim);
}

static status *disagree(const struct maker *m, const struct plan_desc *a, const struct plan_desc *b, const char *what)
{
    char sa[DIMS_TEXT], sb[DIMS_TEXT];
    dims_text(a->shape.ndim, a->shape.dim, sa, sizeof sa);
    dims_text(b->shape.ndim, b->shape.dim, sb, sizeof sb);
    return ERR(INVALID, "tensor %s/%s: ranks disagree on its %s: rank %d has %s %s%s, rank %d %s %s%s",
               m->text + a->part, m->text + a->name, what, a->rank, dtype_name(a->dtype), sa,
               a->trainable ? "" : " frozen", b->rank, dtype_name(b->dtype), sb, b->trainable ? "" : " frozen");
}

static status *check_agree(const struct maker *m, const struct plan_desc *a, const struct plan_desc *b)
{
    if (!same_shape(&a->shape, &b->shape))
        return disagree(m, a, b, "shape");
    if (a->dtype != b->dtype)
        return disagree(m, a, b, "dtype");
    if (!a->trainable != !b->trainable)
        return disagree(m, a, b, "being trainable");
    if (!same_text(m->text, a->alias, b->alias))
        return disagree(m, a, b, "alias");
    if (!same_text(m->text, a->reference - 1, b->reference - 1))
        return disagree(m, a, b, "reference");
    return NULL;
}

/* A tensor met for the first time. */
static status *check_tensor(const struct maker *m, const struct plan_desc *d)
{
    const char *part = m->text + d->part, *name = m->text + d->name;
    bool ok = true;
    uint64_t bytes;
    if (!dtype_bytes(d->dtype))
        return ERR(INVALID, "tensor %s/%s: dtype %d is none", part, name, (int)d->dtype);
    if (d->shape.ndim < 0 || d->shape.ndim > LAYOUT_DIMS)
        return ERR(INVALID, "tensor %s/%s: %d dimensions", part, name, d->shape.ndim);
    if (__builtin_mul_overflow(shape_volume(&d->shape, &ok), dtype_bytes(d->dtype), &bytes) || !ok || bytes > INT64_MAX)
        return ERR(INVALID, "tensor %s/%s has more than 2^63 - 1 bytes", part, name);
    return NULL;
}

static status *check_desc(const struct maker *m, uint64_t i)
{
    const struct plan_desc *d = &m->desc[i];
    if (d->part >= m->text_bytes || d->name >= m->text_bytes || (d->alias != UINT64_MAX && d->alias >= m->text_bytes) ||
        d->reference > m->text_bytes)
        return ERR(INVALID, "descriptor %llu: a name lies outside the text", (ull)i);
    if (d->rank < 0 || d->rank >= m->ranks)
        return ERR(INVALID, "tensor %s/%s: rank %d of %d", m->text + d->part, m->text + d->name, d->rank, m->ranks);
    return NULL;
}

static status *find_tensor(struct maker *m, uint64_t i, uint32_t *out)
{
    const struct plan_desc *d = &m->desc[i];
    const char *part = m->text + d->part, *name = m->text + d->name;
    uint64_t hash = hash_mix(hash64(name, strlen(name)), hash64(part, strlen(part)));
    TRY(table_room(&m->tensor_table, hash_of_tensor, m));
    struct table *t = &m->tensor_table;
    uint64_t at = hash & t->mask;
    for (; t->slot[at]; at = (at + 1) & t->mask) {
        const struct found *f = &m->found[t->slot[at] - 1];
        const struct plan_desc *e = &m->desc[f->desc];
        if (f->hash == hash && !compare_text(m->text, e->name, d->name) && !compare_text(m->text, e->part, d->part)) {
            *out = t->slot[at] - 1;
            return check_agree(m, e, d);
        }
    }
    TRY(check_tensor(m, d));
    TRY(array_room(&m->found, m->tensors, &m->tensor_cap, sizeof *m->found));
    m->found[m->tensors] = (struct found){ .desc = i, .hash = hash };
    *out = (uint32_t)m->tensors++;
    t->slot[at] = (uint32_t)m->tensors;
    t->used++;
    return NULL;
}

static status *find_groups(struct maker *m)
{
    uint32_t tensor = 0;
    for (uint64_t i = 0; i < m->count; i++) {
        const struct plan_desc *d = &m->desc[i];
        TRY(check_desc(m, i));
        if (i && d->part == d[-1].part && d->name == d[-1].name) /* pieces of a tensor often follow one another */
            TRY(check_agree(m, &m->desc[m->found[tensor].desc], d));
        else
            TRY(find_tensor(m, i, &tensor));
        bool fresh;
        TRY(holders_add(&m->holders, tensor, d->shape.ndim, &d->piece, d->rank, d->local, &fresh));
        status *st = fresh ? piece_check(&d->shape, &d->piece) : NULL;
        if (st)
            return status_wrap(st, "tensor %s/%s of rank %d", m->text + d->part, m->text + d->name, d->rank);
    }
    return NULL;
}

static int compare_found(const void *va, const void *vb, void *vm)
{
    const struct maker *m = vm;
    const struct plan_desc *a = &m->desc[m->found[*(const uint32_t *)va].desc];
    const struct plan_desc *b = &m->desc[m->found[*(const uint32_t *)vb].desc];
    int c = compare_text(m->text, a->part, b->part);
    return c ? c : compare_text(m->text, a->name, b->name);
}

/* by_name: tensors by name; holders closed in that order. */
static status *sort_found(struct maker *m, uint32_t *by_name)
{
    uint32_t *rank_of = mem_array(NULL, m->tensors, sizeof *rank_of);
    const struct shape **shape = mem_array(NULL, m->tensors, sizeof *shape);
    status *st = rank_of && shape ? NULL : ERR(NO_MEMORY, "a plan of %llu tensors", (ull)m->tensors);
    for (uint64_t i = 0; !st && i < m->tensors; i++)
        by_name[i] = (uint32_t)i;
    if (!st && m->tensors)
        qsort_r(by_name, m->tensors, sizeof *by_name, compare_found, m);
    for (uint64_t i = 0; !st && i < m->tensors; i++) {
        rank_of[by_name[i]] = (uint32_t)i;
        shape[i] = &m->desc[m->found[i].desc].shape;
    }
    if (!st)
        st = holders_close(&m->holders, rank_of, m->tensors, shape, true);
    mem_free(rank_of);
    mem_free(shape);
    return st;
}

/* ---- lay */

/* Where a piece may be split: at multiples of so many elements. 0: nowhere. */
static uint64_t split_align(const struct maker *m, int ndim, const struct piece *p, uint64_t size)
{
    uint64_t page = SPLIT_ALIGN_BYTES / size;
    if (!m->whole_rows)
        return page;
    uint64_t row = merge_row_elems(ndim, p);
    return row ? (page + row - 1) / row * row : 0;
}

/* The piece of a group becomes one item, or as many as share its writing. */
static status *add_items(struct maker *m, uint32_t group, int ndim, uint64_t size)
{
    const struct holder_group *g = &m->holders.group[group];
    uint64_t elems = piece_elems(g->piece), align = split_align(m, ndim, g->piece, size);
    uint64_t parts = (elems * size - 1) / m->split_bytes + 1;
    if (parts > g->count)
        parts = g->count;
    if (!align)
        parts = align = 1;
    for (uint64_t i = 0; i < parts; i++) {
        uint64_t a, b;
        layout_cut_aligned(elems, align, parts, i, &a, &b);
        if (a == b)
            continue;
        TRY(array_room(&m->item, m->items, &m->item_cap, sizeof *m->item));
        m->item[m->items++] =
            (struct item){ .tensor = (uint32_t)m->plan->tensor_count, .group = group, .begin = a, .end = b };
    }
    return NULL;
}

/* Distinct pieces of a tensor that is no alias: their boxes for the tiling check, their items for the writers. */
static status *add_pieces(struct maker *m, const struct plan_tensor *t, const uint32_t *order, uint64_t n)
{
    const struct shape *s = &t->shape;
    m->boxes = 0;
    for (uint64_t i = 0; i < n; i++) {
        const struct piece *p = m->holders.group[order[i]].piece;
        struct piece_box boxes[LAYOUT_BOXES];
        int k = piece_boxes(s->ndim, p, boxes);
        for (int b = 0; b < k; b++) {
            TRY(array_room(&m->box, m->boxes, &m->box_cap, sizeof *m->box));
            m->box[m->boxes++] = boxes[b].box;
        }
        if (k)
            TRY(add_items(m, order[i], s->ndim, dtype_bytes(t->dtype)));
    }
    return tiling_check(s, m->box, m->boxes);
}

static const char *keep_text(struct maker *m, uint64_t at)
{
    char *to = m->plan->text + m->text_used;
    size_t n = strlen(m->text + at) + 1;
    memcpy(to, m->text + at, n);
    m->text_used += n;
    return to;
}

static status *add_tensor(struct maker *m, const struct found *f, const uint32_t *order, uint64_t groups)
{
    const struct plan_desc *d = &m->desc[f->desc];
    struct plan_tensor *t = &m->plan->tensor[m->plan->tensor_count];
    *t = (struct plan_tensor){
        .dtype = d->dtype, .trainable = d->trainable != 0, .shape = d->shape, .first_piece = m->items
    };
    t->part = keep_text(m, d->part);
    t->name = keep_text(m, d->name);
    if (d->alias != UINT64_MAX) {
        t->alias_of = keep_text(m, d->alias);
    } else if (d->reference) {
        t->reference = m->text + d->reference - 1;
    } else {
        status *st = add_pieces(m, t, order, groups);
        if (st) {
            char shape[DIMS_TEXT];
            dims_text(d->shape.ndim, d->shape.dim, shape, sizeof shape);
            return status_wrap(st, "tensor %s/%s of shape %s", t->part, t->name, shape);
        }
    }
    t->piece_count = m->items - t->first_piece;
    m->plan->tensor_count++;
    return NULL;
}

static int compare_tensor(const struct plan_tensor *t, const char *part, const char *name)
{
    int c = strcmp(t->part, part);
    return c ? c : strcmp(t->name, name);
}

static status *check_alias(const struct plan *p, const struct plan_tensor *t)
{
    uint64_t lo = 0, hi = p->tensor_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (compare_tensor(&p->tensor[mid], t->part, t->alias_of) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    const struct plan_tensor *to = &p->tensor[lo];
    if (lo == p->tensor_count || compare_tensor(to, t->part, t->alias_of))
        return ERR(INVALID, "tensor %s/%s is an alias of %s, which this part does not have", t->part, t->name,
                   t->alias_of);
    if (to->alias_of)
        return ERR(INVALID, "tensor %s/%s is an alias of %s, itself an alias of %s", t->part, t->name, t->alias_of,
                   to->alias_of);
    if (to->dtype != t->dtype || !same_shape(&to->shape, &t->shape))
        return ERR(INVALID, "tensor %s/%s is an alias of %s but differs in shape or dtype", t->part, t->name,
                   t->alias_of);
    return NULL;
}

/* Tensors and items. */
static status *lay(struct maker *m, const uint32_t *by_name)
{
    struct plan *p = m->plan;
    size_t text = 0;
    for (uint64_t i = 0; i < m->tensors; i++) {
        const struct plan_desc *d = &m->desc[m->found[i].desc];
        text += strlen(m->text + d->part) + strlen(m->text + d->name) + 2;
        text += d->alias != UINT64_MAX ? strlen(m->text + d->alias) + 1 : 0;
    }
    p->tensor = mem_calloc(m->tensors, sizeof *p->tensor);
    p->text = mem_calloc(text + 1, 1);
    if (!p->tensor || !p->text)
        return ERR(NO_MEMORY, "a plan of %llu tensors", (ull)m->tensors);
    const struct holders *h = &m->holders;
    for (uint64_t i = 0, at = 0, end = 0; i < m->tensors; i++, at = end) {
        while (end < h->groups && h->group[h->order[end]].tensor == by_name[i])
            end++;
        TRY(add_tensor(m, &m->found[by_name[i]], h->order + at, end - at));
    }
    for (uint64_t i = 0; i < p->tensor_count; i++)
        if (p->tensor[i].alias_of)
            TRY(check_alias(p, &p->tensor[i]));
    return NULL;
}

/* ---- give */

static uint64_t item_bytes(const struct maker *m, const struct item *it)
{
    return (it->end - it->begin) * dtype_bytes(m->plan->tensor[it->tensor].dtype);
}

static void give(struct maker *m, uint64_t item, uint32_t at)
{
    const struct item *it = &m->item[item];
    const struct holder_group *g = &m->holders.group[it->group];
    const struct holder *h = &m->holders.holder[g->first + at];
    struct plan *p = m->plan;
    struct plan_piece *q = &p->piece[item];
    uint64_t bytes = item_bytes(m, it);
    *q = (struct plan_piece){ .tensor = it->tensor,
                              .writer = h->rank,
                              .local = h->tag,
                              .number = (uint32_t)(item - p->tensor[it->tensor].first_piece),
                              .piece = *g->piece,
                              .local_offset = it->begin };
    q->piece.end = q->piece.begin + it->end;
    q->piece.begin += it->begin;
    p->rank_bytes[h->rank] += bytes;
    m->load[h->rank] += bytes;
    if (m->node_of)
        m->node_load[m->node_of[h->rank]] += bytes;
}

struct by_size {
    uint64_t bytes, item;
};

static int compare_size(const void *va, const void *vb)
{
    const struct by_size *a = va, *b = vb;
    if (a->bytes != b->bytes)
        return a->bytes > b->bytes ? -1 : 1;
    return a->item < b->item ? -1 : a->item > b->item;
}

/* What only one rank has is laid on it first; then what can be placed, largest first. */
static status *give_all(struct maker *m, struct by_size *shared)
{
    const struct holder_load load = { .bytes = m->load, .node_of = m->node_of, .node_bytes = m->node_load };
    uint64_t n = 0;
    for (uint64_t i = 0; i < m->items; i++) {
        if (m->holders.group[m->item[i].group].set == HOLDER_LONE)
            give(m, i, 0);
        else
            shared[n++] = (struct by_size){ item_bytes(m, &m->item[i]), i };
    }
    if (n)
        qsort(shared, n, sizeof *shared, compare_size);
    for (uint64_t i = 0; i < n; i++) {
        uint32_t at;
        TRY(holders_least(&m->holders, m->holders.group[m->item[shared[i].item].group].set, &load, &at));
        give(m, shared[i].item, at);
    }
    return NULL;
}

static status *assign(struct maker *m, const uint64_t *extra_bytes)
{
    struct plan *p = m->plan;
    struct by_size *shared = mem_array(NULL, m->items, sizeof *shared);
    m->load = mem_calloc((size_t)m->ranks, sizeof *m->load);
    m->node_load = mem_calloc((size_t)m->ranks, sizeof *m->node_load);
    p->piece = mem_calloc(m->items, sizeof *p->piece);
    p->rank_bytes = mem_calloc((size_t)m->ranks, sizeof *p->rank_bytes);
    status *st = NULL;
    if (!shared || !m->load || !m->node_load || !p->piece || !p->rank_bytes)
        st = ERR(NO_MEMORY, "a plan of %llu pieces for %d ranks", (ull)m->items, m->ranks);
    for (int r = 0; !st && extra_bytes && r < m->ranks; r++) {
        m->load[r] = extra_bytes[r];
        if (m->node_of)
            m->node_load[m->node_of[r]] += extra_bytes[r];
    }
    if (!st)
        st = give_all(m, shared);
    mem_free(shared);
    if (!st)
        p->piece_count = m->items;
    return st;
}

/* ---- all of it */

static void hash_text(struct hash128 *h, const char *s)
{
    hash_update(h, s, strlen(s) + 1);
}

/* Of what all ranks described: tensors, pieces, who holds them. */
static struct hash128 fingerprint_all(const struct maker *m)
{
    struct hash128 h = hash_init(0x706c616e6e6572);
    uint32_t tensor = UINT32_MAX;
    for (uint64_t i = 0; i < m->holders.groups; i++) {
        const struct holder_group *g = &m->holders.group[m->holders.order[i]];
        const struct plan_desc *d = &m->desc[m->found[g->tensor].desc];
        if (g->tensor != tensor) {
            uint64_t head[] = { (uint64_t)d->dtype, d->trainable != 0, (uint64_t)d->shape.ndim,
                                d->alias != UINT64_MAX };
            hash_text(&h, m->text + d->part);
            hash_text(&h, m->text + d->name);
            if (d->alias != UINT64_MAX)
                hash_text(&h, m->text + d->alias);
            hash_update(&h, head, sizeof head);
            hash_update(&h, d->shape.dim, (size_t)d->shape.ndim * sizeof *d->shape.dim);
            tensor = g->tensor;
        }
        uint64_t piece[2 * LAYOUT_DIMS + 3] = { g->count, g->piece->begin, g->piece->end };
        for (int k = 0; k < d->shape.ndim; k++) {
            piece[3 + 2 * k] = g->piece->box.off[k];
            piece[4 + 2 * k] = g->piece->box.len[k];
        }
        hash_update(&h, piece, (3 + 2 * (size_t)d->shape.ndim) * sizeof *piece);
        hash_update(&h, &m->holders.holder[g->first], g->count * sizeof(struct holder));
    }
    return hash_final(h);
}

static status *check_input(const struct maker *m)
{
    if (m->ranks < 1)
        return ERR(INVALID, "a plan for %d ranks", m->ranks);
    if (m->count >= UINT32_MAX)
        return ERR(INVALID, "%llu descriptors; 2^32 - 2 can be planned", (ull)m->count);
    if (m->count && (!m->text_bytes || m->text[m->text_bytes - 1]))
        return ERR(INVALID, "the text of the descriptors does not end with a NUL");
    for (int r = 0; m->node_of && r < m->ranks; r++)
        if (m->node_of[r] < 0 || m->node_of[r] >= m->ranks)
            return ERR(INVALID, "rank %d is on node %d of at most %d", r, m->node_of[r], m->ranks);
    return NULL;
}

static status *make(struct maker *m, const uint64_t *extra_bytes)
{
    TRY(find_groups(m));
    m->by_name = mem_array(NULL, m->tensors, sizeof *m->by_name);
    if (!m->by_name)
        return ERR(NO_MEMORY, "a plan of %llu tensors", (ull)m->tensors);
    TRY(sort_found(m, m->by_name));
    TRY(lay(m, m->by_name));
    TRY(assign(m, extra_bytes));
    if (m->whole_rows)
        TRY(plan_merge(m->plan, m->node_of, extra_bytes));
    m->plan->fingerprint = fingerprint_all(m);
    return NULL;
}

static void free_maker(struct maker *m)
{
    holders_free(&m->holders);
    mem_free(m->found);
    mem_free(m->by_name);
    mem_free(m->tensor_table.slot);
    mem_free(m->item);
    mem_free(m->box);
    mem_free(m->load);
    mem_free(m->node_load);
}

status *plan_make(const struct plan_desc *desc, uint64_t count, const char *text, size_t text_bytes, int ranks,
                  const struct plan_options *o, struct plan **out)
{
    struct maker m = { .desc = desc,
                       .count = count,
                       .text = text,
                       .text_bytes = text_bytes,
                       .ranks = ranks,
                       .split_bytes = o && o->split_bytes ? o->split_bytes : SPLIT_DEFAULT_BYTES,
                       .node_of = o ? o->node_of : NULL,
                       .whole_rows = o && o->irregular != PLAN_AS_GIVEN };
    TRY(check_input(&m));
    m.plan = mem_calloc(1, sizeof *m.plan);
    if (!m.plan)
        return ERR(NO_MEMORY, "a plan");
    m.plan->ranks = ranks;
    status *st = make(&m, o ? o->extra_bytes : NULL);
    free_maker(&m);
    if (st)
        plan_free(m.plan);
    else
        *out = m.plan;
    return st;
}

void plan_free(struct plan *p)
{
    if (!p)
        return;
    mem_free(p->tensor);
    mem_free(p->piece);
    mem_free(p->source);
    mem_free(p->rank_bytes);
    mem_free(p->rank_print);
    mem_free(p->text);
    mem_free(p);
}

struct hash128 plan_fingerprint(const struct plan_desc *desc, uint64_t count, const char *text)
{
    struct hash128 h = hash_init(0x706c616e);
    hash_update(&h, &count, sizeof count);
    for (uint64_t i = 0; i < count; i++) {
        const struct plan_desc *d = &desc[i];
        uint64_t texts = (uint64_t)(d->alias != UINT64_MAX) + 2 * (uint64_t)(d->reference != 0);
        uint64_t head[] = { (uint64_t)d->dtype, d->trainable != 0, (uint64_t)d->shape.ndim,
                            (uint64_t)d->rank,  d->local,          texts,
                            d->piece.begin,     d->piece.end };
        hash_text(&h, text + d->part);
        hash_text(&h, text + d->name);
        if (d->alias != UINT64_MAX)
            hash_text(&h, text + d->alias);
        if (d->reference)
            hash_text(&h, text + d->reference - 1);
        hash_update(&h, head, sizeof head);
        hash_update(&h, d->shape.dim, (size_t)d->shape.ndim * sizeof *d->shape.dim);
        hash_update(&h, &d->piece.box, sizeof d->piece.box);
    }
    return hash_final(h);
}
