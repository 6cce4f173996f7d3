/* plan: see plan.h. Descriptors come in whatever order, rank by rank as a rule, so those of a tensor lie far apart:
 *
 *   find: descriptor -> tensor, one pass; tensors sorted by name
 *   lay:  [tensor: groups of equal pieces (holders.c), its groups tile it -> pieces, lone ones to their holder] ->
 * aliases give: the other pieces, largest first, to the least loaded holder
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
    uint32_t next; /* the tensor that came after it when it was met last */
};
enum { NO_TENSOR = UINT32_MAX };

/* A stored piece that several ranks hold: those of group's set. */
struct shared {
    uint64_t bytes, piece, first_holder;
    uint32_t set;
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
    uint32_t *tensor_of; /* [count] */
    uint32_t *by_name;   /* [tensors] */
    struct table tensor_table;
    struct holders holders; /* tag: index in the rank's state */
    uint64_t piece_cap;     /* of the plan's pieces */
    struct shared *shared;
    uint64_t shareds, shared_cap;
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

static bool is_named(const struct maker *m, uint32_t tensor, const struct plan_desc *d)
{
    const struct plan_desc *e = &m->desc[m->found[tensor].desc];
    return !compare_text(m->text, e->name, d->name) && !compare_text(m->text, e->part, d->part);
}

static status *look_up(struct maker *m, uint64_t i, uint32_t *out)
{
    const struct plan_desc *d = &m->desc[i];
    const char *part = m->text + d->part, *name = m->text + d->name;
    uint64_t hash = hash_mix(hash64(name, strlen(name)), hash64(part, strlen(part)));
    TRY(table_room(&m->tensor_table, hash_of_tensor, m));
    struct table *t = &m->tensor_table;
    uint64_t at = hash & t->mask;
    for (; t->slot[at]; at = (at + 1) & t->mask)
        if (m->found[t->slot[at] - 1].hash == hash && is_named(m, t->slot[at] - 1, d)) {
            *out = t->slot[at] - 1;
            return NULL;
        }
    TRY(check_tensor(m, d));
    TRY(array_room(&m->found, m->tensors, &m->tensor_cap, sizeof *m->found));
    m->found[m->tensors] = (struct found){ .desc = i, .hash = hash, .next = NO_TENSOR };
    *out = (uint32_t)m->tensors++;
    t->slot[at] = (uint32_t)m->tensors;
    t->used++;
    return NULL;
}

/* In *tensor, that of the descriptor before i: ranks tell of the same tensors in the same order, as a rule. */
static status *find_tensor(struct maker *m, uint64_t i, uint32_t *tensor)
{
    const struct plan_desc *d = &m->desc[i];
    uint32_t before = *tensor, next = before == NO_TENSOR ? NO_TENSOR : m->found[before].next;
    if (before != NO_TENSOR && d->part == d[-1].part && d->name == d[-1].name)
        return NULL;
    if (next != NO_TENSOR && is_named(m, next, d)) {
        *tensor = next;
        return NULL;
    }
    TRY(look_up(m, i, tensor));
    if (before != NO_TENSOR)
        m->found[before].next = *tensor;
    return NULL;
}

static status *find_tensors(struct maker *m)
{
    uint32_t tensor = NO_TENSOR;
    for (uint64_t i = 0; i < m->count; i++) {
        const struct plan_desc *d = &m->desc[i];
        TRY(check_desc(m, i));
        TRY(find_tensor(m, i, &tensor));
        TRY(check_agree(m, &m->desc[m->found[tensor].desc], d));
        m->tensor_of[i] = tensor;
        status *st = piece_check(&d->shape, &d->piece);
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

/* by_name: tensors by name; records of holders by tensor. */
static status *sort_found(struct maker *m)
{
    static const struct plan_desc none;
    const struct plan_desc *d = m->count ? m->desc : &none;
    const struct holder_records of = { .piece = &d->piece,
                                       .rank = &d->rank,
                                       .tag = &d->local,
                                       .stride = sizeof *d,
                                       .count = m->count,
                                       .tensor = m->tensor_of };
    m->by_name = mem_array(NULL, m->tensors, sizeof *m->by_name);
    if (!m->by_name)
        return ERR(NO_MEMORY, "a plan of %llu tensors", (ull)m->tensors);
    for (uint64_t i = 0; i < m->tensors; i++)
        m->by_name[i] = (uint32_t)i;
    if (m->tensors)
        qsort_r(m->by_name, m->tensors, sizeof *m->by_name, compare_found, m);
    return holders_open(&m->holders, &of, m->tensors);
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

static void give(struct maker *m, struct plan_piece *q, uint64_t bytes, const struct holder *h)
{
    q->writer = h->rank;
    q->local = h->tag;
    m->plan->rank_bytes[h->rank] += bytes;
    m->load[h->rank] += bytes;
    if (m->node_of)
        m->node_load[m->node_of[h->rank]] += bytes;
}

/* Elements [begin, end) of a group's piece are stored as one. */
static status *add_piece(struct maker *m, const struct plan_tensor *t, const struct holder_group *g, uint64_t begin,
                         uint64_t end)
{
    struct plan *p = m->plan;
    uint64_t bytes = (end - begin) * dtype_bytes(t->dtype);
    TRY(array_room(&p->piece, p->piece_count, &m->piece_cap, sizeof *p->piece));
    struct plan_piece *q = &p->piece[p->piece_count];
    *q = (struct plan_piece){ .tensor = (uint32_t)p->tensor_count,
                              .number = (uint32_t)(p->piece_count - t->first_piece),
                              .piece = *g->piece,
                              .local_offset = begin };
    q->piece.end = q->piece.begin + end;
    q->piece.begin += begin;
    if (g->set == HOLDER_LONE) {
        give(m, q, bytes, &m->holders.holder[g->first]);
    } else {
        TRY(array_room(&m->shared, m->shareds, &m->shared_cap, sizeof *m->shared));
        m->shared[m->shareds++] =
            (struct shared){ .bytes = bytes, .piece = p->piece_count, .first_holder = g->first, .set = g->set };
    }
    p->piece_count++;
    return NULL;
}

/* The piece of a group is stored as one, or as many as share its writing. */
static status *add_parts(struct maker *m, const struct plan_tensor *t, const struct holder_group *g)
{
    uint64_t size = dtype_bytes(t->dtype), elems = piece_elems(g->piece);
    uint64_t parts = (elems * size - 1) / m->split_bytes + 1, align;
    if (parts > g->count)
        parts = g->count;
    if (parts == 1 || !(align = split_align(m, t->shape.ndim, g->piece, size)))
        return add_piece(m, t, g, 0, elems);
    for (uint64_t i = 0; i < parts; i++) {
        uint64_t a, b;
        layout_cut_aligned(elems, align, parts, i, &a, &b);
        if (a != b)
            TRY(add_piece(m, t, g, a, b));
    }
    return NULL;
}

/* Distinct pieces of a tensor that is no alias: their boxes for the tiling check, and what is stored of them. */
static status *add_pieces(struct maker *m, const struct plan_tensor *t, uint32_t tensor)
{
    const struct holders *h = &m->holders;
    TRY(holders_tensor(&m->holders, tensor, &t->shape, true));
    m->boxes = 0;
    for (uint64_t i = 0; i < h->groups; i++) {
        struct piece_box boxes[LAYOUT_BOXES];
        int k = piece_boxes(t->shape.ndim, h->group[i].piece, boxes);
        for (int b = 0; b < k; b++) {
            TRY(array_room(&m->box, m->boxes, &m->box_cap, sizeof *m->box));
            m->box[m->boxes++] = boxes[b].box;
        }
        if (k)
            TRY(add_parts(m, t, &h->group[i]));
    }
    return tiling_check(&t->shape, m->box, m->boxes);
}

static const char *keep_text(struct maker *m, uint64_t at)
{
    char *to = m->plan->text + m->text_used;
    size_t n = strlen(m->text + at) + 1;
    memcpy(to, m->text + at, n);
    m->text_used += n;
    return to;
}

static status *add_tensor(struct maker *m, uint32_t tensor)
{
    const struct plan_desc *d = &m->desc[m->found[tensor].desc];
    struct plan_tensor *t = &m->plan->tensor[m->plan->tensor_count];
    *t = (struct plan_tensor){
        .dtype = d->dtype, .trainable = d->trainable != 0, .shape = d->shape, .first_piece = m->plan->piece_count
    };
    t->part = keep_text(m, d->part);
    t->name = keep_text(m, d->name);
    if (d->alias != UINT64_MAX) {
        t->alias_of = keep_text(m, d->alias);
    } else if (d->reference) {
        t->reference = m->text + d->reference - 1;
    } else {
        status *st = add_pieces(m, t, tensor);
        if (st) {
            char shape[DIMS_TEXT];
            dims_text(d->shape.ndim, d->shape.dim, shape, sizeof shape);
            return status_wrap(st, "tensor %s/%s of shape %s", t->part, t->name, shape);
        }
    }
    t->piece_count = m->plan->piece_count - t->first_piece;
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

/* Tensors and pieces. */
static status *lay(struct maker *m)
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
    TRY(array_room(&p->piece, 0, &m->piece_cap, sizeof *p->piece));
    for (uint64_t i = 0; i < m->tensors; i++)
        TRY(add_tensor(m, m->by_name[i]));
    for (uint64_t i = 0; i < p->tensor_count; i++)
        if (p->tensor[i].alias_of)
            TRY(check_alias(p, &p->tensor[i]));
    return NULL;
}

/* ---- give */

static int compare_size(const void *va, const void *vb)
{
    const struct shared *a = va, *b = vb;
    if (a->bytes != b->bytes)
        return a->bytes > b->bytes ? -1 : 1;
    return a->piece < b->piece ? -1 : a->piece > b->piece;
}

/* What only one rank has is laid on it before; now what can be placed, largest first. */
static status *give_shared(struct maker *m)
{
    const struct holder_load load = { .bytes = m->load, .node_of = m->node_of, .node_bytes = m->node_load };
    if (m->shareds)
        qsort(m->shared, m->shareds, sizeof *m->shared, compare_size);
    for (uint64_t i = 0; i < m->shareds; i++) {
        const struct shared *s = &m->shared[i];
        uint32_t at;
        TRY(holders_least(&m->holders, s->set, &load, &at));
        give(m, &m->plan->piece[s->piece], s->bytes, &m->holders.holder[s->first_holder + at]);
    }
    return NULL;
}

static status *start_loads(struct maker *m, const uint64_t *extra_bytes)
{
    m->load = mem_calloc((size_t)m->ranks, sizeof *m->load);
    m->node_load = mem_calloc((size_t)m->ranks, sizeof *m->node_load);
    m->plan->rank_bytes = mem_calloc((size_t)m->ranks, sizeof *m->plan->rank_bytes);
    if (!m->load || !m->node_load || !m->plan->rank_bytes)
        return ERR(NO_MEMORY, "a plan for %d ranks", m->ranks);
    for (int r = 0; extra_bytes && r < m->ranks; r++) {
        m->load[r] = extra_bytes[r];
        if (m->node_of)
            m->node_load[m->node_of[r]] += extra_bytes[r];
    }
    return NULL;
}

/* ---- all of it */

static void hash_text(struct hash128 *h, const char *s)
{
    hash_update(h, s, strlen(s) + 1);
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
    m->tensor_of = mem_array(NULL, m->count, sizeof *m->tensor_of);
    if (!m->tensor_of)
        return ERR(NO_MEMORY, "a plan of %llu descriptors", (ull)m->count);
    TRY(find_tensors(m));
    TRY(sort_found(m));
    TRY(start_loads(m, extra_bytes));
    TRY(lay(m));
    TRY(give_shared(m));
    return m->whole_rows ? plan_merge(m->plan, m->node_of, extra_bytes) : NULL;
}

static void free_maker(struct maker *m)
{
    holders_free(&m->holders);
    mem_free(m->found);
    mem_free(m->tensor_of);
    mem_free(m->by_name);
    mem_free(m->tensor_table.slot);
    mem_free(m->shared);
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
