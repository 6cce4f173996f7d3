/* holders: see holders.h. Invariant: loads only grow, so a heap whose keys are old is right once its top is up to date.
 */
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

static uint64_t hash_of_group(const void *owner, uint32_t i)
{
    return ((const struct holders *)owner)->group[i].hash;
}

static uint64_t hash_of_set(const void *owner, uint32_t i)
{
    return ((const struct holders *)owner)->set[i].hash;
}

static uint64_t hash_piece(uint32_t tensor, int ndim, const struct piece *p)
{
    uint64_t h = hash_mix(hash_mix(tensor, p->begin), p->end);
    for (int d = 0; d < ndim; d++)
        h = hash_mix(hash_mix(h, p->box.off[d]), p->box.len[d]);
    return h;
}

static status *find_group(struct holders *h, uint32_t tensor, int ndim, const struct piece *p, bool *fresh,
                          uint32_t *out)
{
    uint64_t hash = hash_piece(tensor, ndim, p);
    TRY(table_room(&h->group_table, hash_of_group, h));
    struct table *t = &h->group_table;
    uint64_t at = hash & t->mask;
    *fresh = false;
    for (; t->slot[at]; at = (at + 1) & t->mask) {
        struct holder_group *g = &h->group[t->slot[at] - 1];
        if (g->hash == hash && g->tensor == tensor && piece_equal(g->piece, p)) {
            *out = t->slot[at] - 1;
            return NULL;
        }
    }
    TRY(array_room(&h->group, h->groups, &h->group_cap, sizeof *h->group));
    h->group[h->groups] = (struct holder_group){ .piece = p, .hash = hash, .tensor = tensor, .set = HOLDER_LONE };
    *out = (uint32_t)h->groups++;
    t->slot[at] = (uint32_t)h->groups;
    t->used++;
    *fresh = true;
    return NULL;
}

status *holders_add(struct holders *h, uint32_t tensor, int ndim, const struct piece *p, int rank, uint32_t tag,
                    bool *fresh)
{
    uint32_t group;
    TRY(find_group(h, tensor, ndim, p, fresh, &group));
    TRY(array_room(&h->entry, h->entries, &h->entry_cap, sizeof *h->entry));
    TRY(array_room(&h->group_of, h->entries, &h->of_cap, sizeof *h->group_of));
    h->group[group].count++;
    h->group_of[h->entries] = group;
    h->entry[h->entries++] = (struct holder){ .rank = rank, .tag = tag };
    return NULL;
}

void holders_free(struct holders *h)
{
    for (uint64_t i = 0; i < h->sets; i++)
        mem_free(h->set[i].heap);
    mem_free(h->group);
    mem_free(h->group_of);
    mem_free(h->entry);
    mem_free(h->order);
    mem_free(h->holder);
    mem_free(h->set);
    mem_free(h->group_table.slot);
    mem_free(h->set_table.slot);
    *h = (struct holders){ 0 };
}

/* ---- order */

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

static int compare_piece(const void *va, const void *vb, void *vh)
{
    const struct holders *h = vh;
    const struct piece_key *a = va, *b = vb;
    return piece_compare(h->group[a->group].piece, h->group[b->group].piece);
}

/* The groups of one tensor, in order[0, n), by piece. */
static void sort_tensor(struct holders *h, const struct shape *s, uint32_t *order, uint64_t n, struct piece_key *key)
{
    bool sorted = true;
    for (uint64_t i = 0; i < n; i++) {
        const struct piece *p = h->group[order[i]].piece;
        uint64_t corner = 0;
        for (int k = 0; k < s->ndim; k++) /* row-major, so in the order of the offsets, unless it wraps */
            corner = corner * (s->dim[k] + 1) + p->box.off[k];
        key[i] = (struct piece_key){ .corner = corner, .begin = p->begin, .group = order[i] };
        sorted = sorted && (!i || compare_key(&key[i - 1], &key[i]) < 0);
    }
    if (!sorted)
        qsort(key, n, sizeof *key, compare_key);
    sorted = true;
    for (uint64_t i = 1; i < n && sorted; i++)
        sorted = compare_piece(&key[i - 1], &key[i], h) < 0;
    if (!sorted) /* boxes of one corner and other lengths, or a corner that wrapped */
        qsort_r(key, n, sizeof *key, compare_piece, h);
    for (uint64_t i = 0; i < n; i++)
        order[i] = key[i].group;
}

static status *sort_groups(struct holders *h, const uint32_t *rank_of_tensor, uint64_t tensors,
                           const struct shape *const *shape)
{
    uint64_t *at = mem_calloc(tensors + 2, sizeof *at), most = 0;
    h->order = mem_array(NULL, h->groups, sizeof *h->order);
    for (uint64_t g = 0; at && g < h->groups; g++)
        at[rank_of_tensor[h->group[g].tensor] + 2]++;
    for (uint64_t t = 0; at && t < tensors; t++) {
        most = at[t + 2] > most ? at[t + 2] : most;
        at[t + 2] += at[t + 1];
    }
    struct piece_key *key = mem_array(NULL, most + 1, sizeof *key);
    status *st = at && h->order && key ? NULL : ERR(NO_MEMORY, "%llu pieces", (unsigned long long)h->groups);
    for (uint64_t g = 0; !st && g < h->groups; g++)
        h->order[at[rank_of_tensor[h->group[g].tensor] + 1]++] = (uint32_t)g;
    for (uint64_t t = 0; !st && t < tensors; t++) {
        uint64_t n = at[t + 1] - at[t];
        if (n > 1)
            sort_tensor(h, shape[h->group[h->order[at[t]]].tensor], h->order + at[t], n, key);
    }
    mem_free(at);
    mem_free(key);
    return st;
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

status *holders_close(struct holders *h, const uint32_t *rank_of_tensor, uint64_t tensors,
                      const struct shape *const *shape, bool once)
{
    uint64_t next = 0;
    h->holder = mem_array(NULL, h->entries, sizeof *h->holder);
    if (!h->holder)
        return ERR(NO_MEMORY, "%llu holders", (unsigned long long)h->entries);
    TRY(sort_groups(h, rank_of_tensor, tensors, shape));
    for (uint64_t i = 0; i < h->groups; i++) {
        struct holder_group *g = &h->group[h->order[i]];
        g->first = next;
        next += g->count;
        g->count = 0;
    }
    for (uint64_t i = 0; i < h->entries; i++) {
        struct holder_group *g = &h->group[h->group_of[i]];
        h->holder[g->first + g->count++] = h->entry[i];
    }
    for (uint64_t i = 0; i < h->groups; i++) {
        struct holder_group *g = &h->group[h->order[i]];
        order_holders(h, g, once);
        if (g->count > 1)
            TRY(find_set(h, g));
    }
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
