/* holders: see holders.h. Records lie all over memory, so each is looked at once, when its tensor is at hand.
 * Invariant: loads only grow, so a heap whose keys are old is right once its top is up to date. */
#include "ckpt/holders.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>
#include <string.h>

/* ---- arrays and tables */

status *array_room(void *array, uint64_t used, uint64_t *cap, size_t bytes)
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

status *table_room(struct table *t, table_hash *hash, const void *owner)
{
    if (t->slot && t->used * 2 < t->mask)
        return NULL;
    uint64_t slots = t->slot ? (t->mask + 1) * 4 : 1024;
    uint32_t *slot = mem_calloc(slots, sizeof *slot);
    if (!slot)
        return ERR(NO_MEMORY, "a table of %llu", (unsigned long long)slots);
    for (uint64_t i = 0; i < t->used; i++) {
        uint64_t at = hash(owner, (uint32_t)i) & (slots - 1);
        while (slot[at])
            at = (at + 1) & (slots - 1);
        slot[at] = (uint32_t)i + 1;
    }
    mem_free(t->slot);
    t->slot = slot;
    t->mask = slots - 1;
    return NULL;
}

/* ---- groups */

static uint64_t hash_of_set(const void *owner, uint32_t i)
{
    return ((const struct holders *)owner)->set[i].hash;
}

void holders_free(struct holders *h)
{
    for (uint64_t i = 0; i < h->sets; i++)
        mem_free(h->set[i].heap);
    mem_free(h->record);
    mem_free(h->first_record);
    mem_free(h->key);
    mem_free(h->group);
    mem_free(h->holder);
    mem_free(h->set);
    mem_free(h->set_table.slot);
    *h = (struct holders){ 0 };
}

/* ---- order */

status *holders_open(struct holders *h, const struct holder_records *of, uint64_t tensors)
{
    *h = (struct holders){ .of = *of };
    h->record = mem_array(NULL, of->count, sizeof *h->record);
    h->holder = mem_array(NULL, of->count, sizeof *h->holder);
    h->first_record = mem_calloc(tensors + 2, sizeof *h->first_record);
    if (!h->record || !h->holder || !h->first_record)
        return ERR(NO_MEMORY, "%llu holders of %llu tensors", (unsigned long long)of->count,
                   (unsigned long long)tensors);
    for (uint64_t i = 0; i < of->count; i++)
        h->first_record[of->tensor[i] + 2]++;
    for (uint64_t t = 0; t < tensors; t++)
        h->first_record[t + 2] += h->first_record[t + 1];
    for (uint64_t i = 0; i < of->count; i++)
        h->record[h->first_record[of->tensor[i] + 1]++] = (uint32_t)i;
    return NULL;
}

/* A record's piece by where its box begins and its run in it: almost always that decides. */
struct record_key {
    uint64_t corner, begin;
    uint32_t record;
};

static const void *field_of(const struct holders *h, const void *first, uint32_t record)
{
    return (const char *)first + h->of.stride * record;
}

static const struct piece *piece_of(const struct holders *h, uint32_t record)
{
    return field_of(h, h->of.piece, record);
}

static int compare_key(const void *va, const void *vb)
{
    const struct record_key *a = va, *b = vb;
    if (a->corner != b->corner)
        return a->corner < b->corner ? -1 : 1;
    if (a->begin != b->begin)
        return a->begin < b->begin ? -1 : 1;
    return a->record < b->record ? -1 : a->record > b->record;
}

static int compare_piece(const void *va, const void *vb, void *vh)
{
    const struct record_key *a = va, *b = vb;
    int c = piece_compare(piece_of(vh, a->record), piece_of(vh, b->record));
    return c ? c : a->record < b->record ? -1 : a->record > b->record;
}

/* Ask for the memory of a record that is needed soon. */
static void prefetch(const struct holders *h, uint32_t record)
{
    enum { LINE = 64 };
    const char *p = (const char *)piece_of(h, record);
    for (size_t at = 0; at < sizeof(struct piece); at += LINE)
        __builtin_prefetch(p + at);
    __builtin_prefetch(field_of(h, h->of.rank, record));
}

/* key[0, n): the records of a tensor in the order of their pieces. */
static void sort_records(const struct holders *h, const struct shape *s, const uint32_t *record, uint64_t n,
                         struct record_key *key)
{
    enum { AHEAD = 8 };
    bool sorted = true;
    for (uint64_t i = 0; i < n; i++) {
        if (i + AHEAD < n)
            prefetch(h, record[i + AHEAD]);
        const struct piece *p = piece_of(h, record[i]);
        uint64_t corner = 0;
        for (int k = 0; k < s->ndim; k++) /* row-major, so in the order of the offsets, unless it wraps */
            corner = corner * (s->dim[k] + 1) + p->box.off[k];
        key[i] = (struct record_key){ .corner = corner, .begin = p->begin, .record = record[i] };
        sorted = sorted && (!i || compare_key(&key[i - 1], &key[i]) < 0);
    }
    if (!sorted)
        qsort(key, n, sizeof *key, compare_key);
    sorted = true;
    for (uint64_t i = 1; i < n && sorted; i++)
        sorted = piece_compare(piece_of(h, key[i - 1].record), piece_of(h, key[i].record)) <= 0;
    if (!sorted) /* boxes of one corner and other lengths, or a corner that wrapped */
        qsort_r(key, n, sizeof *key, compare_piece, (void *)(uintptr_t)h);
}

static int compare_holder(const void *va, const void *vb)
{
    const struct holder *a = va, *b = vb;
    if (a->rank != b->rank)
        return a->rank < b->rank ? -1 : 1;
    return a->tag < b->tag ? -1 : a->tag > b->tag;
}

static void order_holders(struct holders *h, struct holder_group *g, bool once)
{
    struct holder *x = &h->holder[g->first];
    uint32_t kept = 1;
    for (uint32_t i = 1; i < g->count; i++)
        if (compare_holder(&x[i - 1], &x[i]) > 0) {
            qsort(x, g->count, sizeof *x, compare_holder);
            break;
        }
    if (!once)
        return;
    for (uint32_t i = 1; i < g->count; i++)
        if (x[i].rank != x[kept - 1].rank)
            x[kept++] = x[i];
    h->used -= g->count - kept;
    g->count = kept;
}

static bool same_holders(const struct holders *h, const struct holder_set *s, const struct holder_group *g)
{
    if (s->count != g->count)
        return false;
    for (uint32_t i = 0; i < g->count; i++)
        if (h->holder[s->first + i].rank != h->holder[g->first + i].rank)
            return false;
    return true;
}

static status *find_set(struct holders *h, struct holder_group *g)
{
    uint64_t hash = g->count;
    for (uint32_t i = 0; i < g->count; i++)
        hash = hash_mix(hash, (uint64_t)h->holder[g->first + i].rank);
    TRY(table_room(&h->set_table, hash_of_set, h));
    struct table *t = &h->set_table;
    uint64_t at = hash & t->mask;
    for (; t->slot[at]; at = (at + 1) & t->mask)
        if (h->set[t->slot[at] - 1].hash == hash && same_holders(h, &h->set[t->slot[at] - 1], g)) {
            g->set = t->slot[at] - 1;
            return NULL;
        }
    TRY(array_room(&h->set, h->sets, &h->set_cap, sizeof *h->set));
    h->set[h->sets] = (struct holder_set){ .first = g->first, .hash = hash, .count = g->count };
    g->set = (uint32_t)h->sets++;
    t->slot[at] = (uint32_t)h->sets;
    t->used++;
    return NULL;
}

/* The group of the piece that comes first in key[0, n); *end: how many records it has. */
static status *add_group(struct holders *h, const struct record_key *key, uint64_t n, bool once, uint64_t *end)
{
    const struct piece *p = piece_of(h, key->record);
    TRY(array_room(&h->group, h->groups, &h->group_cap, sizeof *h->group));
    struct holder_group *g = &h->group[h->groups++];
    *g = (struct holder_group){ .piece = p, .first = h->used, .set = HOLDER_LONE };
    do {
        uint32_t i = key[g->count++].record;
        h->holder[h->used++] = (struct holder){ .rank = *(const int32_t *)field_of(h, h->of.rank, i),
                                                .tag = h->of.tag ? *(const uint32_t *)field_of(h, h->of.tag, i) : i };
    } while (g->count < n && piece_equal(piece_of(h, key[g->count].record), p));
    *end = g->count;
    if (g->count == 1)
        return NULL;
    order_holders(h, g, once);
    return g->count > 1 ? find_set(h, g) : NULL;
}

status *holders_tensor(struct holders *h, uint32_t tensor, const struct shape *s, bool once)
{
    uint64_t first = h->first_record[tensor], n = h->first_record[tensor + 1] - first;
    if (n > h->key_cap) {
        struct record_key *more = mem_array(h->key, n, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "%llu pieces", (unsigned long long)n);
        h->key = more;
        h->key_cap = n;
    }
    sort_records(h, s, h->record + first, n, h->key);
    h->groups = 0;
    for (uint64_t i = 0, count; i < n; i += count)
        TRY(add_group(h, h->key + i, n - i, once, &count));
    return NULL;
}

/* ---- the least loaded */

struct heap_entry {
    uint64_t bytes, node_bytes; /* as they were when last looked at */
    uint32_t at;
};

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

static struct heap_entry entry_now(const struct holders *h, const struct holder_set *s, const struct holder_load *l,
                                   uint32_t at)
{
    int32_t r = h->holder[s->first + at].rank;
    return (struct heap_entry){ .bytes = l->bytes[r],
                                .node_bytes = l->node_of ? l->node_bytes[l->node_of[r]] : 0,
                                .at = at };
}

status *holders_least(struct holders *h, uint32_t set, const struct holder_load *l, uint32_t *at)
{
    struct holder_set *s = &h->set[set];
    if (!s->heap) {
        s->heap = mem_array(NULL, s->count, sizeof *s->heap);
        if (!s->heap)
            return ERR(NO_MEMORY, "%u holders", s->count);
        for (uint32_t i = 0; i < s->count; i++)
            s->heap[i] = entry_now(h, s, l, i);
        for (uint32_t i = s->count / 2; i-- > 0;)
            sift_down(s->heap, s->count, i);
    }
    for (;;) {
        struct heap_entry *top = &s->heap[0], now = entry_now(h, s, l, top->at);
        if (now.bytes == top->bytes && now.node_bytes == top->node_bytes)
            break;
        *top = now;
        sift_down(s->heap, s->count, 0);
    }
    *at = s->heap[0].at;
    return NULL;
}
