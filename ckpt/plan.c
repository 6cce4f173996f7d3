/* plan: see plan.h. One pass over the descriptors, in whatever order they come, then only what is distinct counts:
 *
 *   find: descriptor -> tensor, group (hash tables) -> sort tensors by name, groups by piece -> holders of each group
 *   lay:  [tensor: its groups tile it -> items] ... -> aliases
 *   give: lone items to their holder; the others, largest first, to the least loaded one (a heap a set of holders)
 *
 * Invariants: (1) a group is the descriptors of one piece of one tensor; holder[first, +count) are its ranks,
 * ascending, each once. (2) Empty pieces are not stored: a tensor without elements, like an alias, has no pieces.
 * (3) Ties are broken by content, never by position in the input, so equal inputs in any order give equal plans.
 * (4) Loads only grow, so a heap whose keys are old is right once its top is up to date. */
#include "ckpt/plan.h"

#include "ckpt/tiling.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>

enum { SPLIT_ALIGN_BYTES = 4096, SPLIT_DEFAULT_BYTES = 4 << 20, DIMS_TEXT = LAYOUT_DIMS * 22 + 3 };

typedef unsigned long long ull;

/* A tensor, by the descriptor that was met first. */
struct found {
    uint64_t desc, hash;
    uint32_t groups;
};

struct group {
    uint64_t desc, hash; /* desc: the one met first */
    uint32_t tensor, count;
    uint64_t first; /* into holder */
    uint32_t set;   /* of its holders; NO_SET: one holder */
};
enum { NO_SET = UINT32_MAX };

struct holder {
    int32_t rank;
    uint32_t local;
};

/* The ranks of one or more groups, as a heap by load. */
struct holder_set {
    uint64_t first, hash; /* holders of the first such group: who is in it */
    uint32_t count;
    struct heap_entry *heap; /* [count]; NULL: not used yet */
};
struct heap_entry {
    uint64_t bytes, node_bytes; /* as they were when last looked at */
    uint32_t at;                /* in the set */
};

/* A stored piece to be: elements [begin, end) of its group's. */
struct item {
    uint32_t tensor, group;
    uint64_t begin, end;
};

/* Open addressing: slots hold a number + 1. */
struct table {
    uint32_t *slot;
    uint64_t mask, used;
};

struct maker {
    const struct plan_desc *desc;
    uint64_t count;
    const char *text;
    size_t text_bytes;
    int ranks;
    uint64_t split_bytes;
    const int32_t *node_of;
    struct plan *plan;
    size_t text_used;
    struct found *found;
    uint64_t tensors, tensor_cap;
    struct group *group;
    uint64_t groups, group_cap;
    struct table tensor_table, group_table, set_table;
    uint32_t *group_of; /* [count] */
    uint32_t *order;    /* [groups] by tensor (name), then piece */
    struct holder *holder;
    struct holder_set *set;
    uint64_t sets, set_cap;
    struct item *item;
    uint64_t items, item_cap;
    struct box *box; /* of the tensor at hand */
    uint64_t boxes, box_cap;
    uint64_t *load, *node_load; /* [ranks] bytes given so far, with the extra ones */
};

/* ---- memory and tables */

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
        return ERR(NO_MEMORY, "a plan of %llu entries", (ull)more);
    memcpy(array, &p, sizeof p);
    *cap = more;
    return NULL;
}

static uint64_t mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 29;
}

/* The hash of entry i, for growing. */
typedef uint64_t hash_fn(const struct maker *m, uint32_t i);

static uint64_t hash_of_tensor(const struct maker *m, uint32_t i)
{
    return m->found[i].hash;
}
static uint64_t hash_of_group(const struct maker *m, uint32_t i)
{
    return m->group[i].hash;
}
static uint64_t hash_of_set(const struct maker *m, uint32_t i)
{
    return m->set[i].hash;
}

/* Have room for one more at half load. */
static status *table_room(const struct maker *m, struct table *t, hash_fn *hash)
{
    if (t->slot && t->used * 2 < t->mask)
        return NULL;
    uint64_t slots = t->slot ? (t->mask + 1) * 4 : 1024;
    uint32_t *slot = mem_calloc(slots, sizeof *slot);
    if (!slot)
        return ERR(NO_MEMORY, "a table of %llu", (ull)slots);
    for (uint64_t i = 0; i < t->used; i++) {
        uint64_t at = hash(m, (uint32_t)i) & (slots - 1);
        while (slot[at])
            at = (at + 1) & (slots - 1);
        slot[at] = (uint32_t)i + 1;
    }
    mem_free(t->slot);
    t->slot = slot;
    t->mask = slots - 1;
    return NULL;
}

/* ---- find */

static int compare_text(const char *text, uint64_t a, uint64_t b)
{
    return a == b ? 0 : strcmp(text + a, text + b);
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
    bool none_a = a->alias == UINT64_MAX, none_b = b->alias == UINT64_MAX;
    if (none_a != none_b || (!none_a && compare_text(m->text, a->alias, b->alias)))
        return disagree(m, a, b, "alias");
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
    if (d->part >= m->text_bytes || d->name >= m->text_bytes || (d->alias != UINT64_MAX && d->alias >= m->text_bytes))
        return ERR(INVALID, "descriptor %llu: a name lies outside the text", (ull)i);
    if (d->rank < 0 || d->rank >= m->ranks)
        return ERR(INVALID, "tensor %s/%s: rank %d of %d", m->text + d->part, m->text + d->name, d->rank, m->ranks);
    return NULL;
}

static status *find_tensor(struct maker *m, uint64_t i, uint32_t *out)
{
    const struct plan_desc *d = &m->desc[i];
    const char *part = m->text + d->part, *name = m->text + d->name;
    uint64_t hash = mix(hash64(name, strlen(name)), hash64(part, strlen(part)));
    TRY(table_room(m, &m->tensor_table, hash_of_tensor));
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
    TRY(reserve(&m->found, m->tensors, &m->tensor_cap, sizeof *m->found));
    m->found[m->tensors] = (struct found){ .desc = i, .hash = hash };
    *out = (uint32_t)m->tensors++;
    t->slot[at] = (uint32_t)m->tensors;
    t->used++;
    return NULL;
}

static uint64_t hash_piece(uint32_t tensor, int ndim, const struct piece *p)
{
    uint64_t h = mix(mix(tensor, p->begin), p->end);
    for (int d = 0; d < ndim; d++)
        h = mix(mix(h, p->box.off[d]), p->box.len[d]);
    return h;
}

static status *find_group(struct maker *m, uint64_t i, uint32_t tensor)
{
    const struct plan_desc *d = &m->desc[i];
    uint64_t hash = hash_piece(tensor, d->shape.ndim, &d->piece);
    TRY(table_room(m, &m->group_table, hash_of_group));
    struct table *t = &m->group_table;
    uint64_t at = hash & t->mask;
    for (; t->slot[at]; at = (at + 1) & t->mask) {
        struct group *g = &m->group[t->slot[at] - 1];
        if (g->hash == hash && g->tensor == tensor && piece_equal(&m->desc[g->desc].piece, &d->piece)) {
            g->count++;
            m->group_of[i] = t->slot[at] - 1;
            return NULL;
        }
    }
    status *st = piece_check(&d->shape, &d->piece);
    if (st)
        return status_wrap(st, "tensor %s/%s of rank %d", m->text + d->part, m->text + d->name, d->rank);
    TRY(reserve(&m->group, m->groups, &m->group_cap, sizeof *m->group));
    m->group[m->groups] = (struct group){ .desc = i, .hash = hash, .tensor = tensor, .count = 1, .set = NO_SET };
    m->group_of[i] = (uint32_t)m->groups++;
    m->found[tensor].groups++;
    t->slot[at] = (uint32_t)m->groups;
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
        TRY(find_group(m, i, tensor));
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

/* A piece by where its box begins and its run in it: almost always that decides. */
struct piece_key {
    uint64_t corner, begin;
    uint32_t group;
};

static int compare_key(const void *va, const void *vb)
{
    const struct piece_key *a = va, *b = vb;
    if (a->corner != b->corner)
        return a->corner < b->corner ? -1 : 1;
    if (a->begin != b->begin)
        return a->begin < b->begin ? -1 : 1;
    return a->group < b->group ? -1 : a->group > b->group;
}

static int compare_group_piece(const void *va, const void *vb, void *vm)
{
    const struct maker *m = vm;
    const struct piece_key *a = va, *b = vb;
    return piece_compare(&m->desc[m->group[a->group].desc].piece, &m->desc[m->group[b->group].desc].piece);
}

/* The groups of one tensor, in order[0, n), by piece. */
static void sort_groups(const struct maker *m, uint32_t *order, uint64_t n, struct piece_key *key)
{
    bool sorted = true;
    for (uint64_t i = 0; i < n; i++) {
        const struct plan_desc *d = &m->desc[m->group[order[i]].desc];
        uint64_t corner = 0;
        for (int k = 0; k < d->shape.ndim; k++) /* row-major: the order of the offsets; below 2^64, or all are empty */
            corner = corner * (d->shape.dim[k] + 1) + d->piece.box.off[k];
        key[i] = (struct piece_key){ .corner = corner, .begin = d->piece.begin, .group = order[i] };
        sorted = sorted && (!i || compare_key(&key[i - 1], &key[i]) < 0);
    }
    if (!sorted)
        qsort(key, n, sizeof *key, compare_key);
    sorted = true;
    for (uint64_t i = 1; i < n && sorted; i++)
        sorted = compare_group_piece(&key[i - 1], &key[i], (void *)(uintptr_t)m) < 0;
    if (!sorted) /* boxes of one corner and other lengths, or a corner that wrapped */
        qsort_r(key, n, sizeof *key, compare_group_piece, (void *)(uintptr_t)m);
    for (uint64_t i = 0; i < n; i++)
        order[i] = key[i].group;
}

/* order: groups by tensor name, then piece; by_name: tensors by name. */
static status *sort_found(struct maker *m, uint32_t *by_name)
{
    uint64_t *at = mem_array(NULL, m->tensors + 1, sizeof *at), most = 0, next = 0;
    for (uint64_t i = 0; i < m->tensors; i++) {
        by_name[i] = (uint32_t)i;
        most = m->found[i].groups > most ? m->found[i].groups : most;
    }
    struct piece_key *key = mem_array(NULL, most + 1, sizeof *key);
    if (!at || !key) {
        mem_free(at);
        mem_free(key);
        return ERR(NO_MEMORY, "a plan of %llu tensors", (ull)m->tensors);
    }
    if (m->tensors)
        qsort_r(by_name, m->tensors, sizeof *by_name, compare_found, m);
    for (uint64_t i = 0; i < m->tensors; i++) {
        at[by_name[i]] = next;
        next += m->found[by_name[i]].groups;
    }
    for (uint64_t g = 0; g < m->groups; g++)
        m->order[at[m->group[g].tensor]++] = (uint32_t)g;
    next = 0;
    for (uint64_t i = 0; i < m->tensors; i++) {
        sort_groups(m, m->order + next, m->found[by_name[i]].groups, key);
        next += m->found[by_name[i]].groups;
    }
    mem_free(at);
    mem_free(key);
    return NULL;
}

static int compare_holder(const void *va, const void *vb)
{
    const struct holder *a = va, *b = vb;
    if (a->rank != b->rank)
        return a->rank < b->rank ? -1 : 1;
    return a->local < b->local ? -1 : a->local > b->local;
}

/* Each rank once, ascending, with the first of its equal pieces. */
static void order_holders(struct maker *m, struct group *g)
{
    struct holder *h = &m->holder[g->first];
    uint32_t kept = 1;
    for (uint32_t i = 1; i < g->count; i++)
        if (compare_holder(&h[i - 1], &h[i]) > 0) {
            qsort(h, g->count, sizeof *h, compare_holder);
            break;
        }
    for (uint32_t i = 1; i < g->count; i++)
        if (h[i].rank != h[kept - 1].rank)
            h[kept++] = h[i];
    g->count = kept;
}

static bool same_holders(const struct maker *m, const struct holder_set *s, const struct group *g)
{
    if (s->count != g->count)
        return false;
    for (uint32_t i = 0; i < g->count; i++)
        if (m->holder[s->first + i].rank != m->holder[g->first + i].rank)
            return false;
    return true;
}

static status *find_set(struct maker *m, struct group *g)
{
    uint64_t hash = g->count;
    for (uint32_t i = 0; i < g->count; i++)
        hash = mix(hash, (uint64_t)m->holder[g->first + i].rank);
    TRY(table_room(m, &m->set_table, hash_of_set));
    struct table *t = &m->set_table;
    uint64_t at = hash & t->mask;
    for (; t->slot[at]; at = (at + 1) & t->mask)
        if (m->set[t->slot[at] - 1].hash == hash && same_holders(m, &m->set[t->slot[at] - 1], g)) {
            g->set = t->slot[at] - 1;
            return NULL;
        }
    TRY(reserve(&m->set, m->sets, &m->set_cap, sizeof *m->set));
    m->set[m->sets] = (struct holder_set){ .first = g->first, .hash = hash, .count = g->count };
    g->set = (uint32_t)m->sets++;
    t->slot[at] = (uint32_t)m->sets;
    t->used++;
    return NULL;
}

/* Who holds each group, in the order of the plan. */
static status *find_holders(struct maker *m)
{
    uint64_t next = 0;
    for (uint64_t i = 0; i < m->groups; i++) {
        struct group *g = &m->group[m->order[i]];
        g->first = next;
        next += g->count;
        g->count = 0;
    }
    for (uint64_t i = 0; i < m->count; i++) {
        struct group *g = &m->group[m->group_of[i]];
        m->holder[g->first + g->count++] = (struct holder){ m->desc[i].rank, m->desc[i].local };
    }
    for (uint64_t i = 0; i < m->groups; i++) {
        struct group *g = &m->group[m->order[i]];
        order_holders(m, g);
        if (g->count > 1)
            TRY(find_set(m, g));
    }
    return NULL;
}

/* ---- lay */

/* The piece of a group becomes one item, or as many as share its writing. */
static status *add_items(struct maker *m, uint32_t group)
{
    const struct group *g = &m->group[group];
    const struct plan_desc *d = &m->desc[g->desc];
    uint64_t size = dtype_bytes(d->dtype), elems = piece_elems(&d->piece);
    uint64_t parts = (elems * size - 1) / m->split_bytes + 1;
    if (parts > g->count)
        parts = g->count;
    for (uint64_t i = 0; i < parts; i++) {
        uint64_t a, b;
        layout_cut_aligned(elems, SPLIT_ALIGN_BYTES / size, parts, i, &a, &b);
        if (a == b)
            continue;
        TRY(reserve(&m->item, m->items, &m->item_cap, sizeof *m->item));
        m->item[m->items++] =
            (struct item){ .tensor = (uint32_t)m->plan->tensor_count, .group = group, .begin = a, .end = b };
    }
    return NULL;
}

/* Distinct pieces of a tensor that is no alias: their boxes for the tiling check, their items for the writers. */
static status *add_pieces(struct maker *m, const struct shape *s, const uint32_t *order, uint64_t n)
{
    m->boxes = 0;
    for (uint64_t i = 0; i < n; i++) {
        const struct piece *p = &m->desc[m->group[order[i]].desc].piece;
        struct piece_box boxes[LAYOUT_BOXES];
        int k = piece_boxes(s->ndim, p, boxes);
        for (int b = 0; b < k; b++) {
            TRY(reserve(&m->box, m->boxes, &m->box_cap, sizeof *m->box));
            m->box[m->boxes++] = boxes[b].box;
        }
        if (k)
            TRY(add_items(m, order[i]));
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

static status *add_tensor(struct maker *m, const struct found *f, const uint32_t *order)
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
    } else {
        status *st = add_pieces(m, &t->shape, order, f->groups);
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
    uint64_t at = 0;
    for (uint64_t i = 0; i < m->tensors; i++) {
        TRY(add_tensor(m, &m->found[by_name[i]], m->order + at));
        at += m->found[by_name[i]].groups;
    }
    for (uint64_t i = 0; i < p->tensor_count; i++)
        if (p->tensor[i].alias_of)
            TRY(check_alias(p, &p->tensor[i]));
    return NULL;
}

/* ---- give */

static bool entry_before(const struct heap_entry *a, const struct heap_entry *b)
{
    if (a->bytes != b->bytes)
        return a->bytes < b->bytes;
    if (a->node_bytes != b->node_bytes)
        return a->node_bytes < b->node_bytes;
    return a->at < b->at;
}

static void sift_down(struct heap_entry *h, uint32_t n, uint32_t i)
{
    struct heap_entry e = h[i];
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && entry_before(&h[child + 1], &h[child]))
            child++;
        if (!entry_before(&h[child], &e))
            break;
        h[i] = h[child];
    }
    h[i] = e;
}

static struct heap_entry entry_now(const struct maker *m, const struct holder_set *s, uint32_t at)
{
    int32_t r = m->holder[s->first + at].rank;
    return (
        struct heap_entry){ .bytes = m->load[r], .node_bytes = m->node_of ? m->node_load[m->node_of[r]] : 0, .at = at };
}

/* The member with the fewest bytes so far; among equals on the node with the fewest, then the lowest rank. */
static status *least_loaded(const struct maker *m, struct holder_set *s, uint32_t *out)
{
    if (!s->heap) {
        s->heap = mem_array(NULL, s->count, sizeof *s->heap);
        if (!s->heap)
            return ERR(NO_MEMORY, "%u holders", s->count);
        for (uint32_t i = 0; i < s->count; i++)
            s->heap[i] = entry_now(m, s, i);
        for (uint32_t i = s->count / 2; i-- > 0;)
            sift_down(s->heap, s->count, i);
    }
    for (;;) {
        struct heap_entry *top = &s->heap[0], now = entry_now(m, s, top->at);
        if (now.bytes == top->bytes && now.node_bytes == top->node_bytes)
            break;
        *top = now;
        sift_down(s->heap, s->count, 0);
    }
    *out = s->heap[0].at;
    return NULL;
}

static uint64_t item_bytes(const struct maker *m, const struct item *it)
{
    return (it->end - it->begin) * dtype_bytes(m->plan->tensor[it->tensor].dtype);
}

static void give(struct maker *m, uint64_t item, uint32_t at)
{
    const struct item *it = &m->item[item];
    const struct group *g = &m->group[it->group];
    const struct holder *h = &m->holder[g->first + at];
    struct plan *p = m->plan;
    struct plan_piece *q = &p->piece[item];
    uint64_t bytes = item_bytes(m, it);
    *q = (struct plan_piece){ .tensor = it->tensor,
                              .writer = h->rank,
                              .local = h->local,
                              .number = (uint32_t)(item - p->tensor[it->tensor].first_piece),
                              .piece = m->desc[g->desc].piece,
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
    uint64_t n = 0;
    for (uint64_t i = 0; i < m->items; i++) {
        if (m->group[m->item[i].group].set == NO_SET)
            give(m, i, 0);
        else
            shared[n++] = (struct by_size){ item_bytes(m, &m->item[i]), i };
    }
    if (n)
        qsort(shared, n, sizeof *shared, compare_size);
    for (uint64_t i = 0; i < n; i++) {
        uint32_t at;
        TRY(least_loaded(m, &m->set[m->group[m->item[shared[i].item].group].set], &at));
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
    for (uint64_t i = 0; i < m->groups; i++) {
        const struct group *g = &m->group[m->order[i]];
        const struct plan_desc *d = &m->desc[g->desc];
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
        uint64_t piece[2 * LAYOUT_DIMS + 3] = { g->count, d->piece.begin, d->piece.end };
        for (int k = 0; k < d->shape.ndim; k++) {
            piece[3 + 2 * k] = d->piece.box.off[k];
            piece[4 + 2 * k] = d->piece.box.len[k];
        }
        hash_update(&h, piece, (3 + 2 * (size_t)d->shape.ndim) * sizeof *piece);
        hash_update(&h, &m->holder[g->first], g->count * sizeof *m->holder);
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
    m->group_of = mem_array(NULL, m->count, sizeof *m->group_of);
    m->holder = mem_array(NULL, m->count, sizeof *m->holder);
    if (!m->group_of || !m->holder)
        return ERR(NO_MEMORY, "a plan of %llu descriptors", (ull)m->count);
    TRY(find_groups(m));
    m->order = mem_array(NULL, m->groups + m->tensors, sizeof *m->order);
    if (!m->order)
        return ERR(NO_MEMORY, "a plan of %llu pieces", (ull)m->groups);
    uint32_t *by_name = m->order + m->groups;
    TRY(sort_found(m, by_name));
    TRY(find_holders(m));
    TRY(lay(m, by_name));
    TRY(assign(m, extra_bytes));
    m->plan->fingerprint = fingerprint_all(m);
    return NULL;
}

static void free_maker(struct maker *m)
{
    for (uint64_t i = 0; i < m->sets; i++)
        mem_free(m->set[i].heap);
    mem_free(m->found);
    mem_free(m->group);
    mem_free(m->tensor_table.slot);
    mem_free(m->group_table.slot);
    mem_free(m->set_table.slot);
    mem_free(m->group_of);
    mem_free(m->order);
    mem_free(m->holder);
    mem_free(m->set);
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
                       .node_of = o ? o->node_of : NULL };
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
    mem_free(p->rank_bytes);
    mem_free(p->text);
    mem_free(p);
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
