/* plan: see plan.h. One pass over the sorted descriptors:
 *
 *   check -> sort -> [tensor: ranks agree -> distinct pieces -> they tile it -> items] ... -> aliases -> writers
 *
 * Invariants: (1) after the sort, descriptors of one tensor, and in it of one piece, are neighbours; the holders of an
 * item are a range of them. (2) Empty pieces are not stored: a tensor without elements, like an alias, has no pieces.
 * (3) Ties are broken by content, never by position in the input, so equal inputs in any order give equal plans. */
#include "ckpt/plan.h"

#include "ckpt/tiling.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>

enum { SPLIT_ALIGN_BYTES = 4096, SPLIT_DEFAULT_BYTES = 4 << 20, DIMS_TEXT = LAYOUT_DIMS * 22 + 3 };

/* A stored piece to be: who could write it. */
struct item {
    uint32_t tensor;
    struct piece piece;
    uint64_t local_offset;
    uint64_t first, end; /* holders: descriptors [first, end) */
    uint64_t bytes;
    bool shared; /* more than one rank holds it */
};

struct maker {
    struct plan_desc *desc; /* sorted */
    const char *text;
    int ranks;
    uint64_t split_bytes;
    const int32_t *node_of;
    struct plan *plan;
    size_t text_used;
    struct item *item;
    uint64_t items, item_cap;
    struct box *box; /* of the tensor at hand */
    uint64_t boxes, box_cap;
};

static int compare_text(const char *text, uint64_t a, uint64_t b)
{
    return a == b ? 0 : strcmp(text + a, text + b);
}

static bool same_tensor(const char *text, const struct plan_desc *a, const struct plan_desc *b)
{
    return !compare_text(text, a->name, b->name) && !compare_text(text, a->part, b->part);
}

static int compare_desc(const void *va, const void *vb, void *vtext)
{
    const struct plan_desc *a = va, *b = vb;
    const char *text = vtext;
    int c = compare_text(text, a->part, b->part);
    if (!c)
        c = compare_text(text, a->name, b->name);
    if (!c)
        c = piece_compare(&a->piece, &b->piece);
    if (!c)
        c = a->rank < b->rank ? -1 : a->rank > b->rank;
    return c ? c : a->local < b->local ? -1 : a->local > b->local;
}

static status *check_descs(const struct maker *m, uint64_t count, size_t text_bytes)
{
    if (count && (!text_bytes || m->text[text_bytes - 1]))
        return ERR(INVALID, "the text of the descriptors does not end with a NUL");
    for (uint64_t i = 0; i < count; i++) {
        const struct plan_desc *d = &m->desc[i];
        if (d->part >= text_bytes || d->name >= text_bytes || (d->alias != UINT64_MAX && d->alias >= text_bytes))
            return ERR(INVALID, "descriptor %llu: a name lies outside the text", (unsigned long long)i);
        const char *part = m->text + d->part, *name = m->text + d->name;
        if (d->rank < 0 || d->rank >= m->ranks)
            return ERR(INVALID, "tensor %s/%s: rank %d of %d", part, name, d->rank, m->ranks);
        if (!dtype_bytes(d->dtype))
            return ERR(INVALID, "tensor %s/%s: dtype %d is none", part, name, (int)d->dtype);
        status *st = piece_check(&d->shape, &d->piece);
        if (st)
            return status_wrap(st, "tensor %s/%s of rank %d", part, name, d->rank);
        bool ok;
        uint64_t bytes;
        if (__builtin_mul_overflow(shape_volume(&d->shape, &ok), dtype_bytes(d->dtype), &bytes) || bytes > INT64_MAX)
            return ERR(INVALID, "tensor %s/%s has more than 2^63 - 1 bytes", part, name);
    }
    for (int r = 0; m->node_of && r < m->ranks; r++)
        if (m->node_of[r] < 0 || m->node_of[r] >= m->ranks)
            return ERR(INVALID, "rank %d is on node %d of at most %d", r, m->node_of[r], m->ranks);
    return NULL;
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

static status *check_agree(const struct maker *m, uint64_t first, uint64_t end)
{
    const struct plan_desc *a = &m->desc[first];
    for (uint64_t i = first + 1; i < end; i++) {
        const struct plan_desc *b = &m->desc[i];
        if (!same_shape(&a->shape, &b->shape))
            return disagree(m, a, b, "shape");
        if (a->dtype != b->dtype)
            return disagree(m, a, b, "dtype");
        if (!a->trainable != !b->trainable)
            return disagree(m, a, b, "being trainable");
        bool none_a = a->alias == UINT64_MAX, none_b = b->alias == UINT64_MAX;
        if (none_a != none_b || (!none_a && compare_text(m->text, a->alias, b->alias)))
            return disagree(m, a, b, "alias");
    }
    return NULL;
}

/* Room for one more element of `bytes` in an array that grows by doubling. */
static status *reserve(void *array, uint64_t used, uint64_t *cap, size_t bytes)
{
    if (used < *cap)
        return NULL;
    uint64_t more = *cap ? *cap * 2 : 64;
    void *old;
    memcpy(&old, array, sizeof old);
    void *p = mem_array(old, more, bytes);
    if (!p)
        return ERR(NO_MEMORY, "a plan of %llu entries", (unsigned long long)more);
    memcpy(array, &p, sizeof p);
    *cap = more;
    return NULL;
}

static uint64_t holders(const struct maker *m, uint64_t first, uint64_t end)
{
    uint64_t n = 1;
    for (uint64_t i = first + 1; i < end; i++)
        n += m->desc[i].rank != m->desc[i - 1].rank;
    return n;
}

/* The piece that descriptors [first, end) hold becomes one item, or as many as share its writing. */
static status *add_items(struct maker *m, uint64_t first, uint64_t end)
{
    const struct plan_desc *d = &m->desc[first];
    uint64_t size = dtype_bytes(d->dtype), elems = piece_elems(&d->piece), ranks = holders(m, first, end);
    uint64_t parts = (elems * size - 1) / m->split_bytes + 1;
    if (parts > ranks)
        parts = ranks;
    for (uint64_t i = 0; i < parts; i++) {
        uint64_t a, b;
        layout_cut_aligned(elems, SPLIT_ALIGN_BYTES / size, parts, i, &a, &b);
        if (a == b)
            continue;
        TRY(reserve(&m->item, m->items, &m->item_cap, sizeof *m->item));
        struct item *it = &m->item[m->items++];
        *it = (struct item){ .tensor = (uint32_t)m->plan->tensor_count,
                             .piece = d->piece,
                             .local_offset = a,
                             .first = first,
                             .end = end,
                             .bytes = (b - a) * size,
                             .shared = ranks > 1 };
        it->piece.begin = d->piece.begin + a;
        it->piece.end = d->piece.begin + b;
    }
    return NULL;
}

/* Distinct pieces of a tensor that is no alias: their boxes for the tiling check, their items for the writers. */
static status *add_pieces(struct maker *m, uint64_t first, uint64_t end)
{
    const struct shape *s = &m->desc[first].shape;
    m->boxes = 0;
    for (uint64_t i = first, next; i < end; i = next) {
        const struct piece *p = &m->desc[i].piece;
        struct piece_box boxes[LAYOUT_BOXES];
        for (next = i + 1; next < end && piece_equal(p, &m->desc[next].piece);)
            next++;
        int n = piece_boxes(s->ndim, p, boxes);
        for (int k = 0; k < n; k++) {
            TRY(reserve(&m->box, m->boxes, &m->box_cap, sizeof *m->box));
            m->box[m->boxes++] = boxes[k].box;
        }
        if (n)
            TRY(add_items(m, i, next));
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

static status *add_tensor(struct maker *m, uint64_t first, uint64_t end)
{
    const struct plan_desc *d = &m->desc[first];
    TRY(check_agree(m, first, end));
    struct plan_tensor *t = &m->plan->tensor[m->plan->tensor_count];
    *t = (struct plan_tensor){
        .dtype = d->dtype, .trainable = d->trainable != 0, .shape = d->shape, .first_piece = m->items
    };
    t->part = keep_text(m, d->part);
    t->name = keep_text(m, d->name);
    if (d->alias != UINT64_MAX) {
        t->alias_of = keep_text(m, d->alias);
    } else {
        status *st = add_pieces(m, first, end);
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

/* Tensors and items from sorted descriptors. */
static status *add_tensors(struct maker *m, uint64_t count)
{
    struct plan *p = m->plan;
    uint64_t tensors = 0;
    size_t text = 0;
    for (uint64_t i = 0; i < count; i++) {
        const struct plan_desc *d = &m->desc[i];
        if (i && same_tensor(m->text, d, d - 1))
            continue;
        tensors++;
        text += strlen(m->text + d->part) + strlen(m->text + d->name) + 2;
        text += d->alias != UINT64_MAX ? strlen(m->text + d->alias) + 1 : 0;
    }
    if (tensors > UINT32_MAX)
        return ERR(INVALID, "%llu tensors; 2^32 - 1 can be planned", (unsigned long long)tensors);
    p->tensor = mem_calloc(tensors, sizeof *p->tensor);
    p->text = mem_calloc(text + 1, 1);
    if (!p->tensor || !p->text)
        return ERR(NO_MEMORY, "a plan of %llu tensors", (unsigned long long)tensors);
    for (uint64_t i = 0, next; i < count; i = next) {
        for (next = i + 1; next < count && same_tensor(m->text, &m->desc[i], &m->desc[next]);)
            next++;
        TRY(add_tensor(m, i, next));
    }
    for (uint64_t i = 0; i < p->tensor_count; i++)
        if (p->tensor[i].alias_of)
            TRY(check_alias(p, &p->tensor[i]));
    return NULL;
}

/* What only one rank has is laid on it first; then what can be placed, largest first. */
static int compare_item(const void *va, const void *vb, void *items)
{
    uint64_t ia = *(const uint64_t *)va, ib = *(const uint64_t *)vb;
    const struct item *a = (const struct item *)items + ia, *b = (const struct item *)items + ib;
    if (a->shared != b->shared)
        return a->shared ? 1 : -1;
    if (a->bytes != b->bytes)
        return a->bytes > b->bytes ? -1 : 1;
    return ia < ib ? -1 : ia > ib;
}

/* The holder with the fewest bytes so far; among equals on the node with the fewest, then the lowest rank. */
static const struct plan_desc *choose(const struct maker *m, const struct item *it, const uint64_t *node_bytes)
{
    const struct plan_desc *best = &m->desc[it->first];
    const uint64_t *load = m->plan->rank_bytes;
    for (uint64_t i = it->first + 1; i < it->end; i++) {
        const struct plan_desc *d = &m->desc[i];
        uint64_t node_d = m->node_of ? node_bytes[m->node_of[d->rank]] : 0;
        uint64_t node_best = m->node_of ? node_bytes[m->node_of[best->rank]] : 0;
        if (load[d->rank] < load[best->rank] || (load[d->rank] == load[best->rank] && node_d < node_best))
            best = d;
    }
    return best;
}

static status *assign(struct maker *m)
{
    struct plan *p = m->plan;
    uint64_t *order = mem_array(NULL, m->items, sizeof *order);
    uint64_t *node_bytes = mem_calloc((size_t)m->ranks, sizeof *node_bytes);
    p->piece = mem_calloc(m->items, sizeof *p->piece);
    p->rank_bytes = mem_calloc((size_t)m->ranks, sizeof *p->rank_bytes);
    status *st = NULL;
    if (!order || !node_bytes || !p->piece || !p->rank_bytes)
        st = ERR(NO_MEMORY, "a plan of %llu pieces for %d ranks", (unsigned long long)m->items, m->ranks);
    for (uint64_t i = 0; !st && i < m->items; i++)
        order[i] = i;
    if (!st)
        qsort_r(order, m->items, sizeof *order, compare_item, m->item);
    for (uint64_t i = 0; !st && i < m->items; i++) {
        const struct item *it = &m->item[order[i]];
        const struct plan_desc *d = choose(m, it, node_bytes);
        p->piece[order[i]] = (struct plan_piece){ .tensor = it->tensor,
                                                  .writer = d->rank,
                                                  .local = d->local,
                                                  .piece = it->piece,
                                                  .local_offset = it->local_offset };
        p->rank_bytes[d->rank] += it->bytes;
        if (m->node_of)
            node_bytes[m->node_of[d->rank]] += it->bytes;
    }
    mem_free(order);
    mem_free(node_bytes);
    if (!st)
        p->piece_count = m->items;
    return st;
}

status *plan_make(struct plan_desc *desc, uint64_t count, const char *text, size_t text_bytes, int ranks,
                  const struct plan_options *o, struct plan **out)
{
    struct maker m = { .desc = desc, .text = text, .ranks = ranks, .split_bytes = SPLIT_DEFAULT_BYTES };
    if (o && o->split_bytes)
        m.split_bytes = o->split_bytes;
    if (o)
        m.node_of = o->node_of;
    if (ranks < 1)
        return ERR(INVALID, "a plan for %d ranks", ranks);
    TRY(check_descs(&m, count, text_bytes));
    m.plan = mem_calloc(1, sizeof *m.plan);
    if (!m.plan)
        return ERR(NO_MEMORY, "a plan");
    m.plan->ranks = ranks;
    if (count)
        qsort_r(desc, count, sizeof *desc, compare_desc, (void *)(uintptr_t)text);
    status *st = add_tensors(&m, count);
    if (!st)
        st = assign(&m);
    if (!st)
        m.plan->fingerprint = plan_fingerprint(desc, count, text);
    mem_free(m.item);
    mem_free(m.box);
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
    mem_free(p->rank_bytes);
    mem_free(p->text);
    mem_free(p);
}

static void hash_text(struct hash128 *h, const char *s)
{
    hash_update(h, s, strlen(s) + 1);
}

struct hash128 plan_fingerprint(const struct plan_desc *desc, uint64_t count, const char *text)
{
    struct hash128 h = hash_init(0x706c616e);
    hash_update(&h, &count, sizeof count);
    for (uint64_t i = 0; i < count; i++) {
        const struct plan_desc *d = &desc[i];
        uint64_t head[] = { (uint64_t)d->dtype, d->trainable != 0,      (uint64_t)d->shape.ndim, (uint64_t)d->rank,
                            d->local,           d->alias != UINT64_MAX, d->piece.begin,          d->piece.end };
        hash_text(&h, text + d->part);
        hash_text(&h, text + d->name);
        if (d->alias != UINT64_MAX)
            hash_text(&h, text + d->alias);
        hash_update(&h, head, sizeof head);
        hash_update(&h, d->shape.dim, (size_t)d->shape.ndim * sizeof *d->shape.dim);
        hash_update(&h, &d->piece.box, sizeof d->piece.box);
    }
    return hash_final(h);
}

/* Plans as bytes: words of 8 bytes, little-endian; text as its length and its bytes, padded to words. A tensor is its
 * texts as offsets, its fields and dimensions, then its pieces. */

/* Writes, or only counts where p is NULL. */
struct pen {
    unsigned char *p;
    size_t used;
};

static void pen_words(struct pen *w, const uint64_t *v, int n)
{
    for (int i = 0; i < n; i++, w->used += 8)
        if (w->p)
            put_u64(w->p + w->used, v[i]);
}

static void pen_tensor(struct pen *w, const struct plan *p, const struct plan_tensor *t)
{
    int n = t->shape.ndim;
    const uint64_t head[] = { (uint64_t)(t->part - p->text),
                              (uint64_t)(t->name - p->text),
                              t->alias_of ? (uint64_t)(t->alias_of - p->text) : UINT64_MAX,
                              (uint64_t)t->dtype,
                              t->trainable,
                              (uint64_t)n,
                              t->piece_count };
    pen_words(w, head, 7);
    pen_words(w, t->shape.dim, n);
    for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++) {
        const struct plan_piece *q = &p->piece[i];
        const uint64_t who[] = { (uint64_t)q->writer, q->local, q->local_offset, q->piece.begin, q->piece.end };
        pen_words(w, who, 5);
        pen_words(w, q->piece.box.off, n);
        pen_words(w, q->piece.box.len, n);
    }
}

static size_t text_bytes_of(const struct plan *p)
{
    size_t n = 0;
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        n += strlen(t->part) + strlen(t->name) + 2 + (t->alias_of ? strlen(t->alias_of) + 1 : 0);
    }
    return n;
}

static void pen_plan(struct pen *w, const struct plan *p, size_t text)
{
    const uint64_t head[] = { p->fingerprint.a, p->fingerprint.b, (uint64_t)p->ranks,
                              p->tensor_count,  p->piece_count,   text };
    pen_words(w, head, 6);
    if (w->p)
        memcpy(w->p + w->used, p->text, text);
    w->used += (text + 7) / 8 * 8;
    pen_words(w, p->rank_bytes, p->ranks);
    for (uint64_t i = 0; i < p->tensor_count; i++)
        pen_tensor(w, p, &p->tensor[i]);
}

status *plan_pack(const struct plan *p, void **buf, size_t *bytes)
{
    struct pen w = { .p = NULL };
    size_t text = text_bytes_of(p);
    pen_plan(&w, p, text);
    unsigned char *b = mem_calloc(w.used, 1);
    if (!b)
        return ERR(NO_MEMORY, "a plan of %zu bytes", w.used);
    w = (struct pen){ .p = b };
    pen_plan(&w, p, text);
    *buf = b;
    *bytes = w.used;
    return NULL;
}

struct eye {
    const unsigned char *p;
    size_t left;
};

static status *eye_words(struct eye *r, uint64_t *v, int n)
{
    if (r->left / 8 < (uint64_t)n)
        return ERR(CORRUPT, "a packed plan ends early");
    for (int i = 0; i < n; i++, r->p += 8, r->left -= 8)
        v[i] = get_u64(r->p);
    return NULL;
}

static status *eye_piece(struct eye *r, struct plan *p, const struct plan_tensor *t, uint32_t tensor)
{
    uint64_t who[5];
    struct plan_piece *q = &p->piece[p->piece_count];
    TRY(eye_words(r, who, 5));
    *q = (struct plan_piece){ .tensor = tensor,
                              .writer = (int32_t)who[0],
                              .local = (uint32_t)who[1],
                              .local_offset = who[2],
                              .piece = { .begin = who[3], .end = who[4] } };
    TRY(eye_words(r, q->piece.box.off, t->shape.ndim));
    TRY(eye_words(r, q->piece.box.len, t->shape.ndim));
    if (who[0] >= (uint64_t)p->ranks || who[1] > UINT32_MAX)
        return ERR(CORRUPT, "a packed plan: tensor %s/%s has writer %llu of %d", t->part, t->name,
                   (unsigned long long)who[0], p->ranks);
    p->piece_count++;
    return piece_check(&t->shape, &q->piece);
}

static status *eye_tensor(struct eye *r, struct plan *p, size_t text, uint64_t pieces)
{
    uint64_t head[7];
    struct plan_tensor *t = &p->tensor[p->tensor_count];
    TRY(eye_words(r, head, 7));
    if (head[0] >= text || head[1] >= text || (head[2] >= text && head[2] != UINT64_MAX) || head[5] > LAYOUT_DIMS ||
        head[3] >= DTYPE_COUNT || head[6] > pieces - p->piece_count)
        return ERR(CORRUPT, "a packed plan: tensor %llu makes no sense", (unsigned long long)p->tensor_count);
    *t = (struct plan_tensor){ .part = p->text + head[0],
                               .name = p->text + head[1],
                               .dtype = (enum dtype)head[3],
                               .trainable = head[4] != 0,
                               .shape = { .ndim = (int)head[5] },
                               .first_piece = p->piece_count,
                               .piece_count = head[6] };
    t->alias_of = head[2] != UINT64_MAX ? p->text + head[2] : NULL;
    TRY(eye_words(r, t->shape.dim, t->shape.ndim));
    for (uint64_t i = 0; i < t->piece_count; i++)
        TRY(eye_piece(r, p, t, (uint32_t)p->tensor_count));
    p->tensor_count++;
    return NULL;
}

static status *eye_plan(struct eye *r, struct plan *p)
{
    uint64_t head[6];
    TRY(eye_words(r, head, 6));
    uint64_t ranks = head[2], tensors = head[3], pieces = head[4], text = head[5];
    if (ranks < 1 || ranks > INT32_MAX || ranks > r->left / 8 || tensors > r->left / 56 || pieces > r->left / 40 ||
        text > r->left / 8 * 8)
        return ERR(CORRUPT, "a packed plan counts more than its %zu bytes hold", r->left);
    p->fingerprint = (struct hash128){ head[0], head[1] };
    p->ranks = (int)ranks;
    p->text = mem_calloc(text + 1, 1);
    p->tensor = mem_calloc(tensors, sizeof *p->tensor);
    p->piece = mem_calloc(pieces, sizeof *p->piece);
    p->rank_bytes = mem_calloc(ranks, sizeof *p->rank_bytes);
    if (!p->text || !p->tensor || !p->piece || !p->rank_bytes)
        return ERR(NO_MEMORY, "a plan of %llu pieces", (unsigned long long)pieces);
    memcpy(p->text, r->p, text);
    r->p += (text + 7) / 8 * 8;
    r->left -= (text + 7) / 8 * 8;
    TRY(eye_words(r, p->rank_bytes, p->ranks));
    while (p->tensor_count < tensors)
        TRY(eye_tensor(r, p, text, pieces));
    if (p->piece_count != pieces || r->left)
        return ERR(CORRUPT, "a packed plan has %zu bytes too many", r->left);
    return NULL;
}

status *plan_unpack(const void *buf, size_t bytes, struct plan **out)
{
    struct eye r = { .p = buf, .left = bytes };
    struct plan *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a plan");
    status *st = eye_plan(&r, p);
    if (st)
        plan_free(p);
    else
        *out = p;
    return st;
}
