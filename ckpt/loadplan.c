/* loadplan: wants -> [tensor: groups (holders.c) -> copies (reshard)] -> blocks and their uses; then loadassign.c: a
 * reader for each -> rounds.
 *
 * Invariants: (1) blocks are made in the order of the files, and given to readers in that order; (2) a copy is made
 * once a group, whatever the number of ranks in it; only the bounds of rounds look at every rank. */
#include "ckpt/loadplan.h"

#include "ckpt/loadassign.h"
#include "ckpt/order.h"
#include "comm/base/mem.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

void load_plan_free(struct load_plan *p)
{
    mem_free(p->copy);
    mem_free(p->grid);
    mem_free(p->group);
    mem_free(p->member);
    mem_free(p->use);
    mem_free(p->block);
    mem_free(p->round);
    *p = (struct load_plan){ 0 };
}

/* What is at hand while a plan is made. */
struct maker {
    const struct metadata *m;
    const struct load_want *want;
    uint64_t wants;
    int ranks;
    struct load_reading how;
    struct load_plan *p;
    struct holders holders;   /* tag: index into want */
    struct reshard_list list; /* of the tensor at hand */
    uint8_t *elem;            /* [pieces] bytes of an element, where there are copies of the piece */
    uint32_t *place;          /* [pieces] pieces by file and offset */
    uint64_t *first_copy;     /* [pieces + 1] copies of a piece */
    struct piece *room;       /* stored and wanted pieces of the tensor at hand */
    uint64_t room_cap, copy_cap, grid_cap, group_cap, use_cap, block_cap;
};

/* ---- groups and copies */

/* Records of holders: the wants by tensor. */
static status *sort_wants(struct maker *k, uint32_t *tensor)
{
    static const struct load_want none;
    const struct load_want *w = k->wants ? k->want : &none;
    const struct holder_records of = {
        .piece = &w->piece, .rank = &w->rank, .stride = sizeof *w, .count = k->wants, .tensor = tensor
    };
    for (uint64_t i = 0; i < k->wants; i++) {
        if (w[i].tensor >= k->m->tensor_count)
            return ERR(INTERNAL, "a want of tensor %u of %llu", w[i].tensor, (ull)k->m->tensor_count);
        tensor[i] = w[i].tensor;
    }
    return holders_open(&k->holders, &of, k->m->tensor_count);
}

struct reshard_copy load_copy_whole(const struct load_plan *p, uint64_t i)
{
    const struct load_copy *c = &p->copy[i];
    struct reshard_copy r = { .stored = c->stored, .wanted = c->wanted, .src = c->src, .dst = c->dst };
    r.ndim = c->ndim ? (int)c->ndim : 1;
    r.len[0] = c->len;
    r.src_stride[0] = r.dst_stride[0] = 1;
    for (uint32_t d = 0; d < c->ndim; d++) {
        const uint64_t *word = p->grid + c->len + d;
        r.len[d] = word[0];
        r.src_stride[d] = word[c->ndim];
        r.dst_stride[d] = word[2 * c->ndim];
    }
    return r;
}

static status *add_copy(struct maker *k, const struct reshard_copy *r, uint64_t first_stored, uint64_t first_group)
{
    struct load_plan *p = k->p;
    TRY(array_room(&p->copy, p->copies, &k->copy_cap, sizeof *p->copy));
    struct load_copy *c = &p->copy[p->copies++];
    *c = (struct load_copy){ .stored = (uint32_t)(r->stored + first_stored),
                             .wanted = (uint32_t)(r->wanted + first_group),
                             .src = r->src,
                             .dst = r->dst,
                             .len = r->len[0] };
    if (r->ndim == 1 && r->src_stride[0] == 1 && r->dst_stride[0] == 1)
        return NULL;
    c->ndim = (uint32_t)r->ndim;
    c->len = p->words;
    for (uint32_t i = 0; i < 3 * c->ndim; i++) {
        const uint64_t *from = i < c->ndim ? r->len : i < 2 * c->ndim ? r->src_stride : r->dst_stride;
        TRY(array_room(&p->grid, p->words, &k->grid_cap, sizeof *p->grid));
        p->grid[p->words++] = from[i % c->ndim];
    }
    return NULL;
}

/* The groups of one tensor, and their copies. */
static status *add_tensor(struct maker *k, uint32_t tensor)
{
    const struct metadata *m = k->m;
    const struct meta_tensor *t = &m->tensor[tensor];
    struct load_plan *p = k->p;
    const struct holders *h = &k->holders;
    TRY(holders_tensor(&k->holders, tensor, &t->shape, false));
    uint64_t first = p->groups, need = t->piece_count + h->groups;
    if (need > k->room_cap) {
        struct piece *more = mem_array(k->room, need * 2, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "%llu pieces", (ull)need);
        k->room = more;
        k->room_cap = need * 2;
    }
    struct piece *wanted = k->room + t->piece_count;
    for (uint64_t i = 0; i < t->piece_count; i++)
        k->room[i] = m->piece[t->first_piece + i].piece;
    memset(k->elem + t->first_piece, (int)dtype_bytes(t->dtype), t->piece_count);
    for (uint64_t i = 0; i < h->groups; i++) {
        const struct holder_group *g = &h->group[i];
        TRY(array_room(&p->group, p->groups, &k->group_cap, sizeof *p->group));
        p->group[p->groups++] =
            (struct load_group){ .tensor = tensor, .set = g->set, .first = g->first, .count = g->count };
        wanted[i] = *g->piece;
    }
    k->list.count = 0;
    status *st = reshard_tensor(&t->shape, k->room, (uint32_t)t->piece_count, wanted, (uint32_t)h->groups, &k->list);
    for (size_t i = 0; !st && i < k->list.count; i++)
        st = add_copy(k, &k->list.copy[i], t->first_piece, first);
    return status_wrap(st, "step %llu: %s/%s", (ull)m->step, t->part, t->name);
}

static status *add_copies(struct maker *k)
{
    struct load_plan *p = k->p;
    uint32_t *tensor = mem_array(NULL, k->wants, sizeof *tensor);
    status *st = tensor ? sort_wants(k, tensor) : ERR(NO_MEMORY, "%llu wanted pieces", (ull)k->wants);
    mem_free(tensor);
    TRY(st);
    p->member = mem_array(NULL, k->wants, sizeof *p->member);
    k->elem = mem_calloc(k->m->piece_count, 1);
    if (!p->member || !k->elem)
        return ERR(NO_MEMORY, "%llu wanted pieces", (ull)k->wants);
    for (uint64_t t = 0; t < k->m->tensor_count; t++)
        if (k->holders.first_record[t + 1] > k->holders.first_record[t])
            TRY(add_tensor(k, (uint32_t)t));
    for (uint64_t i = 0; i < k->wants; i++)
        p->member[i] = k->holders.holder[i].tag;
    return p->copies > UINT32_MAX ? ERR(UNSUPPORTED, "%llu copies", (ull)p->copies) : NULL;
}

/* ---- blocks */

static bool lies_behind(const struct meta_piece *a, const struct meta_piece *b)
{
    return a->file != b->file ? a->file > b->file : a->offset > b->offset;
}

/* order[0, n), with room for as many again: pieces, ascending; then by file and offset. */
static void sort_places(const struct metadata *m, struct order_key *order, uint64_t n)
{
    bool by_offset = true; /* as a rule the pieces of a file are listed so */
    for (uint64_t i = 0; i < n; i++)
        order[i].key = m->piece[order[i].item].file;
    order_sort(order, order + n, n);
    for (uint64_t i = 1; i < n && by_offset; i++)
        by_offset = !lies_behind(&m->piece[order[i - 1].item], &m->piece[order[i].item]);
    if (by_offset)
        return;
    for (uint64_t i = 0; i < n; i++)
        order[i].key = m->piece[order[i].item].offset;
    order_sort(order, order + n, n);
    for (uint64_t i = 0; i < n; i++)
        order[i].key = m->piece[order[i].item].file;
    order_sort(order, order + n, n);
}

/* place: the pieces that copies are taken from, by file and offset; first_copy: the copies of each. */
static status *place_pieces(struct maker *k, uint64_t *count)
{
    const struct metadata *m = k->m;
    const struct load_plan *p = k->p;
    uint64_t n = 0;
    struct order_key *order = mem_array(NULL, m->piece_count, 2 * sizeof *order);
    k->place = mem_array(NULL, m->piece_count, sizeof *k->place);
    k->first_copy = mem_calloc(m->piece_count + 1, sizeof *k->first_copy);
    if (!order || !k->place || !k->first_copy) {
        mem_free(order);
        return ERR(NO_MEMORY, "places of %llu pieces", (ull)m->piece_count);
    }
    for (uint64_t i = 0; i < p->copies; i++) /* groups follow the tensors, so copies follow the stored pieces */
        k->first_copy[p->copy[i].stored + 1]++;
    for (uint64_t i = 0; i < m->piece_count; i++) {
        if (k->first_copy[i + 1])
            order[n++].item = i;
        k->first_copy[i + 1] += k->first_copy[i];
    }
    sort_places(m, order, n);
    for (uint64_t i = 0; i < n; i++)
        k->place[i] = (uint32_t)order[i].item;
    mem_free(order);
    *count = n;
    return NULL;
}

/* First and one-past-last element of the stored run that a copy touches. */
static void span_of(const struct load_plan *p, uint64_t i, uint64_t *begin, uint64_t *end)
{
    const struct load_copy *c = &p->copy[i];
    *begin = c->src;
    *end = c->src + c->len;
    if (c->ndim) {
        const struct reshard_copy r = load_copy_whole(p, i);
        reshard_span(&r, begin, end);
    }
}

/* Elements of a copy in block b of a payload of `per` elements a block. */
static uint64_t elems_in(const struct load_plan *p, uint64_t i, uint64_t b, uint64_t per)
{
    const struct load_copy *c = &p->copy[i];
    uint64_t lo = b * per, hi = lo + per;
    if (c->ndim) {
        const struct reshard_copy r = load_copy_whole(p, i);
        return reshard_count(&r, lo, hi);
    }
    uint64_t begin = c->src > lo ? c->src : lo, end = c->src + c->len;
    end = end < hi ? end : hi;
    return end > begin ? end - begin : 0;
}

static status *add_use(struct maker *k, uint32_t copy, uint64_t elems)
{
    struct load_plan *p = k->p;
    if (p->uses == UINT32_MAX)
        return ERR(UNSUPPORTED, "more than %llu parts of blocks", (ull)p->uses);
    TRY(array_room(&p->use, p->uses, &k->use_cap, sizeof *p->use));
    p->use[p->uses++] = (struct load_use){ .copy = copy, .group = p->copy[copy].wanted, .elems = (uint32_t)elems };
    return NULL;
}

/* The wanted blocks of one stored piece, each with its uses in the order of the copies. A walk over the blocks with the
 * list of copies that reach into the one at hand: the copies come by where they begin. */
static status *add_piece(struct maker *k, uint32_t piece, uint32_t *active)
{
    struct load_plan *p = k->p;
    uint64_t next = k->first_copy[piece], end = k->first_copy[piece + 1], lo, hi, n = 0;
    uint64_t elem = k->elem[piece], per = META_BLOCK_BYTES / elem, blocks = meta_blocks(k->m->piece[piece].bytes);
    for (uint64_t b = p->copy[next].src / per; b < blocks && (n || next < end); b++) {
        uint64_t kept = 0, first = p->uses;
        while (next < end && p->copy[next].src < (b + 1) * per)
            active[n++] = (uint32_t)next++;
        for (uint64_t i = 0; i < n; i++) {
            uint32_t c = active[i];
            uint64_t elems = elems_in(p, c, b, per);
            span_of(p, c, &lo, &hi);
            if (hi > (b + 1) * per)
                active[kept++] = c;
            if (elems)
                TRY(add_use(k, c, elems));
        }
        n = kept;
        if (p->uses == first)
            continue;
        TRY(array_room(&p->block, p->blocks, &k->block_cap, sizeof *p->block));
        p->totals.storage_bytes += block_bytes(&k->m->piece[piece], (uint32_t)b);
        p->block[p->blocks++] = (struct load_block){
            .piece = piece, .block = (uint32_t)b, .first_use = (uint32_t)first, .uses = (uint32_t)(p->uses - first)
        };
    }
    return NULL;
}

/* Ask for the memory that add_piece needs for the pieces after the i-th. */
static void prefetch_piece(const struct maker *k, uint64_t i, uint64_t pieces)
{
    enum { AHEAD = 8 };
    if (i + 2 * AHEAD < pieces)
        __builtin_prefetch(&k->first_copy[k->place[i + 2 * AHEAD]]);
    if (i + AHEAD < pieces) {
        uint32_t piece = k->place[i + AHEAD];
        __builtin_prefetch(&k->m->piece[piece].bytes);
        __builtin_prefetch(&k->p->copy[k->first_copy[piece]]);
        __builtin_prefetch(&k->p->copy[k->first_copy[piece] + 1]);
    }
}

static status *add_blocks(struct maker *k)
{
    uint64_t pieces, most = 0;
    TRY(place_pieces(k, &pieces));
    for (uint64_t i = 0; i < pieces; i++) {
        uint64_t n = k->first_copy[k->place[i] + 1] - k->first_copy[k->place[i]];
        most = n > most ? n : most;
    }
    uint32_t *active = mem_array(NULL, most + 1, sizeof *active);
    status *st = active ? NULL : ERR(NO_MEMORY, "%llu copies", (ull)most);
    for (uint64_t i = 0; !st && i < pieces; i++) {
        prefetch_piece(k, i, pieces);
        st = add_piece(k, k->place[i], active);
    }
    mem_free(active);
    return st;
}

/* ---- all of it */

static status *make(struct maker *k)
{
    if (k->m->piece_count > UINT32_MAX || k->wants >= UINT32_MAX)
        return ERR(UNSUPPORTED, "%llu stored and %llu wanted pieces", (ull)k->m->piece_count, (ull)k->wants);
    TRY(add_copies(k));
    TRY(add_blocks(k));
    return load_assign(k->m, k->elem, k->ranks, &k->how, &k->holders, k->p);
}

status *load_plan_make(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                       struct load_plan *out)
{
    const struct load_reading how = { 0 };
    return load_plan_make_from(m, want, count, ranks, &how, out);
}

status *load_plan_make_from(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                            const struct load_reading *how, struct load_plan *out)
{
    struct load_plan p = { 0 };
    struct maker k = { .m = m, .want = want, .wants = count, .ranks = ranks, .how = *how, .p = &p };
    k.how.run_bytes = how->run_bytes > READ_RUN_BYTES ? how->run_bytes : READ_RUN_BYTES;
    status *st = make(&k);
    holders_free(&k.holders);
    reshard_list_free(&k.list);
    mem_free(k.room);
    mem_free(k.elem);
    mem_free(k.place);
    mem_free(k.first_copy);
    if (st) {
        load_plan_free(&p);
        return st;
    }
    *out = p;
    return NULL;
}
