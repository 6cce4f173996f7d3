/* loadplan: wants -> [tensor: groups (holders.c) -> copies (reshard)] -> blocks and their uses -> a reader for each ->
 * rounds.
 *
 * Invariants: (1) blocks are made in the order of the files, and given to readers in that order; (2) a copy is made
 * once a group, whatever the number of ranks in it; only the bounds of rounds look at every rank. */
#include "ckpt/loadplan.h"

#include "ckpt/holders.h"
#include "comm/base/mem.h"

#include <stdlib.h>
#include <string.h>

typedef unsigned long long ull;

void load_plan_free(struct load_plan *p)
{
    reshard_list_free(&p->list);
    mem_free(p->group);
    mem_free(p->member);
    mem_free(p->use);
    mem_free(p->block);
    mem_free(p->round);
    *p = (struct load_plan){ 0 };
}

/* Blocks behind one another in a file, given to one reader. */
struct stretch {
    int reader;
    uint32_t file;
    uint64_t end, bytes;
};

/* Rounds that are known to have no room left for a block of a set: [0, before) and [lo, hi). */
struct full {
    uint64_t before, lo, hi;
};

/* What is at hand while a plan is made. */
struct maker {
    const struct metadata *m;
    const struct load_want *want;
    uint64_t wants;
    int ranks;
    const int32_t *reader; /* [pieces] as given, or NULL */
    uint64_t run_bytes;
    struct load_plan *p;
    struct holders holders; /* tag: index into want */
    uint32_t *place;        /* [pieces] pieces by file and offset */
    uint64_t *first_copy;   /* [pieces + 1] copies of a piece */
    struct piece *room;     /* stored and wanted pieces of the tensor at hand */
    uint64_t room_cap, group_cap, use_cap, block_cap;
    struct rank_state *rank; /* [ranks] */
    uint64_t *assigned;      /* [ranks] bytes to read in all */
    uint64_t fair;           /* what a rank may read before others help it */
    struct stretch last;     /* what was assigned last */
    uint64_t *received;      /* [rounds][ranks] */
    uint64_t rounds;
    struct full *full; /* [sets] */
};

struct rank_state {
    uint64_t round, read, send; /* the round its next block goes to, and what it holds already */
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

/* The groups of one tensor, and their copies. */
static status *add_tensor(struct maker *k, uint32_t tensor)
{
    const struct metadata *m = k->m;
    const struct meta_tensor *t = &m->tensor[tensor];
    struct load_plan *p = k->p;
    const struct holders *h = &k->holders;
    TRY(holders_tensor(&k->holders, tensor, &t->shape, false));
    uint64_t first = p->groups, before = p->list.count, need = t->piece_count + h->groups;
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
    for (uint64_t i = 0; i < h->groups; i++) {
        const struct holder_group *g = &h->group[i];
        TRY(array_room(&p->group, p->groups, &k->group_cap, sizeof *p->group));
        p->group[p->groups++] =
            (struct load_group){ .tensor = tensor, .set = g->set, .first = g->first, .count = g->count };
        wanted[i] = *g->piece;
    }
    status *st = reshard_tensor(&t->shape, k->room, (uint32_t)t->piece_count, wanted, (uint32_t)h->groups, &p->list);
    for (uint64_t i = before; !st && i < p->list.count; i++) {
        p->list.copy[i].stored += (uint32_t)t->first_piece;
        p->list.copy[i].wanted += (uint32_t)first;
    }
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
    if (!p->member)
        return ERR(NO_MEMORY, "%llu wanted pieces", (ull)k->wants);
    for (uint64_t t = 0; t < k->m->tensor_count; t++)
        if (k->holders.first_record[t + 1] > k->holders.first_record[t])
            TRY(add_tensor(k, (uint32_t)t));
    for (uint64_t i = 0; i < k->wants; i++)
        p->member[i] = k->holders.holder[i].tag;
    return p->list.count > UINT32_MAX ? ERR(UNSUPPORTED, "%zu copies", p->list.count) : NULL;
}

/* ---- blocks */

struct placed {
    uint64_t offset;
    uint32_t file, piece;
};

static int by_place(const void *va, const void *vb)
{
    const struct placed *a = va, *b = vb;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    return a->piece < b->piece ? -1 : a->piece > b->piece;
}

/* place: the pieces that copies are taken from, by file and offset; first_copy: the copies of each. */
static status *place_pieces(struct maker *k, uint64_t *count)
{
    const struct metadata *m = k->m;
    const struct reshard_list *list = &k->p->list;
    uint64_t n = 0;
    struct placed *placed = mem_array(NULL, m->piece_count, sizeof *placed);
    k->place = mem_array(NULL, m->piece_count, sizeof *k->place);
    k->first_copy = mem_calloc(m->piece_count + 1, sizeof *k->first_copy);
    if (!placed || !k->place || !k->first_copy) {
        mem_free(placed);
        return ERR(NO_MEMORY, "places of %llu pieces", (ull)m->piece_count);
    }
    for (size_t i = 0; i < list->count; i++) /* groups follow the tensors, so copies follow the stored pieces */
        k->first_copy[list->copy[i].stored + 1]++;
    bool sorted = true;
    for (uint64_t i = 0; i < m->piece_count; i++) {
        if (k->first_copy[i + 1]) {
            placed[n] = (struct placed){ .offset = m->piece[i].offset, .file = m->piece[i].file, .piece = (uint32_t)i };
            sorted = sorted && (!n || by_place(&placed[n - 1], &placed[n]) < 0);
            n++;
        }
        k->first_copy[i + 1] += k->first_copy[i];
    }
    if (!sorted)
        qsort(placed, n, sizeof *placed, by_place);
    for (uint64_t i = 0; i < n; i++)
        k->place[i] = placed[i].piece;
    mem_free(placed);
    *count = n;
    return NULL;
}

static size_t elem_bytes_of(const struct metadata *m, const struct load_plan *p, const struct load_block *b)
{
    return dtype_bytes(m->tensor[use_group(p, &p->use[b->first_use])->tensor].dtype);
}

/* Elements of copy c in block b of a payload of `per` elements a block. */
static uint64_t elems_in(const struct reshard_copy *c, uint64_t b, uint64_t per)
{
    uint64_t lo = b * per, hi = lo + per;
    if (c->ndim > 1 || c->src_stride[0] != 1)
        return reshard_count(c, lo, hi);
    uint64_t begin = c->src > lo ? c->src : lo, end = c->src + c->len[0];
    end = end < hi ? end : hi;
    return end > begin ? end - begin : 0;
}

/* The wanted blocks of one stored piece, each with its uses in the order of the copies. A walk over the blocks with the
 * list of copies that reach into the one at hand: the copies come by where they begin. */
static status *add_piece(struct maker *k, uint32_t piece, uint32_t *active)
{
    const struct metadata *m = k->m;
    struct load_plan *p = k->p;
    uint64_t next = k->first_copy[piece], end = k->first_copy[piece + 1], lo, hi, n = 0;
    const struct meta_tensor *t = &m->tensor[p->group[p->list.copy[next].wanted].tensor];
    uint64_t per = META_BLOCK_BYTES / dtype_bytes(t->dtype), blocks = meta_blocks(m->piece[piece].bytes);
    reshard_span(&p->list.copy[next], &lo, &hi);
    for (uint64_t b = lo / per; b < blocks && (n || next < end); b++) {
        uint64_t kept = 0, first = p->uses;
        while (next < end && p->list.copy[next].src < (b + 1) * per)
            active[n++] = (uint32_t)next++;
        for (uint64_t i = 0; i < n; i++) {
            const struct reshard_copy *c = &p->list.copy[active[i]];
            uint64_t elems = elems_in(c, b, per);
            reshard_span(c, &lo, &hi);
            if (hi > (b + 1) * per)
                active[kept++] = active[i];
            if (!elems)
                continue;
            TRY(array_room(&p->use, p->uses, &k->use_cap, sizeof *p->use));
            p->use[p->uses++] = (struct load_use){ .copy = active[i], .elems = (uint32_t)elems };
        }
        n = kept;
        if (p->uses == first)
            continue;
        TRY(array_room(&p->block, p->blocks, &k->block_cap, sizeof *p->block));
        p->block[p->blocks++] = (struct load_block){
            .piece = piece, .block = (uint32_t)b, .first_use = first, .uses = (uint32_t)(p->uses - first)
        };
    }
    return NULL;
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
    for (uint64_t i = 0; !st && i < pieces; i++)
        st = add_piece(k, k->place[i], active);
    mem_free(active);
    return st;
}

/* ---- readers */

/* Of the ranks that want it, the one with the least to read. */
static status *least_of_wanting(struct maker *k, const struct load_block *b, const struct holder_load *load, int *out)
{
    struct holders *h = &k->holders;
    int best = -1;
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_group *g = use_group(k->p, &k->p->use[b->first_use + i]);
        uint32_t at = 0;
        if (g->set != HOLDER_LONE)
            TRY(holders_least(h, g->set, load, &at));
        int r = h->holder[g->first + at].rank;
        if (best < 0 || k->assigned[r] < k->assigned[best] || (k->assigned[r] == k->assigned[best] && r < best))
            best = r;
    }
    *out = best;
    return NULL;
}

static bool is_wanted_by(const struct maker *k, const struct load_block *b, int rank)
{
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_group *g = use_group(k->p, &k->p->use[b->first_use + i]);
        const struct holder *h = k->holders.holder + g->first;
        uint64_t lo = 0, hi = g->count; /* by rank */
        while (lo < hi) {
            uint64_t mid = lo + (hi - lo) / 2;
            if (h[mid].rank < rank)
                lo = mid + 1;
            else
                hi = mid;
        }
        if (lo < g->count && h[lo].rank == rank)
            return true;
    }
    return false;
}

/* The one of those that want it that has the least to read; another one only when that one has more than its share; but
 * the reader of what lies before it, while that is not much: one read of 2 MiB is faster than two of 1 MiB. */
static status *choose_reader(struct maker *k, const struct load_block *b, uint64_t bytes,
                             const struct holder_load *load, uint32_t everybody, int *out)
{
    struct holders *h = &k->holders;
    const struct meta_piece *piece = &k->m->piece[b->piece];
    const struct stretch *last = &k->last;
    bool goes_on = last->bytes && last->file == piece->file && last->bytes + bytes <= k->run_bytes &&
                   last->end == piece->offset + (uint64_t)b->block * META_BLOCK_BYTES;
    int best;
    uint32_t at;
    if (k->reader) {
        *out = k->reader[b->piece];
        return NULL;
    }
    *out = last->reader;
    if (goes_on && is_wanted_by(k, b, last->reader))
        return NULL;
    TRY(least_of_wanting(k, b, load, &best));
    if (goes_on && k->assigned[best] >= k->fair)
        return NULL;
    *out = best;
    if (k->assigned[best] < k->fair)
        return NULL;
    TRY(holders_least(h, everybody, load, &at));
    int least = h->holder[h->set[everybody].first + at].rank;
    if (k->assigned[least] < k->assigned[best])
        *out = least;
    return NULL;
}

static void lengthen(struct stretch *last, const struct load_block *b, const struct meta_piece *p, uint64_t bytes,
                     uint64_t most)
{
    uint64_t offset = p->offset + (uint64_t)b->block * META_BLOCK_BYTES;
    bool goes_on =
        last->reader == b->reader && last->file == p->file && last->end == offset && last->bytes + bytes <= most;
    *last = (struct stretch){ b->reader, p->file, offset + bytes, goes_on ? last->bytes + bytes : bytes };
}

/* A set of all ranks, for who has the least to read of all. */
static status *add_everybody(struct maker *k, uint32_t *out)
{
    struct holders *h = &k->holders;
    struct holder *more = mem_array(h->holder, h->used + (uint64_t)k->ranks, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "%d ranks", k->ranks);
    h->holder = more;
    for (int r = 0; r < k->ranks; r++)
        more[h->used + (uint64_t)r] = (struct holder){ .rank = r };
    TRY(array_room(&h->set, h->sets, &h->set_cap, sizeof *h->set));
    h->set[h->sets] = (struct holder_set){ .first = h->used, .count = (uint32_t)k->ranks };
    *out = (uint32_t)h->sets++;
    return NULL;
}

/* ---- rounds */

static status *have_round(struct maker *k, uint64_t round)
{
    if (round < k->rounds)
        return NULL;
    uint64_t rounds = (round + 1) * 2, n = (uint64_t)k->ranks;
    uint64_t *more = mem_array(k->received, rounds * n, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "%llu rounds of %d ranks", (ull)rounds, k->ranks);
    memset(more + k->rounds * n, 0, (rounds - k->rounds) * n * sizeof *more);
    k->received = more;
    k->rounds = rounds;
    return NULL;
}

/* Every rank of the group has room in that round. Uses of one rank lie apart: each is tested by itself. */
static bool has_room(const struct maker *k, const struct load_group *g, uint64_t bytes, uint64_t round)
{
    const uint64_t *received = k->received + round * (uint64_t)k->ranks;
    const struct holder *h = k->holders.holder + g->first;
    for (uint64_t i = 0; i < g->count; i++)
        if (received[h[i].rank] && received[h[i].rank] + bytes > ROUND_SEND_BYTES)
            return false;
    return true;
}

/* The first round from `round` on in which the groups of b may have room, as far as is known. */
static uint64_t next_round(const struct maker *k, const struct load_block *b, uint64_t round)
{
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_group *g = use_group(k->p, &k->p->use[b->first_use + i]);
        if (g->set == HOLDER_LONE)
            continue;
        const struct full *f = &k->full[g->set];
        round = round < f->before ? f->before : round;
        round = round >= f->lo && round < f->hi ? f->hi : round;
    }
    return round;
}

/* No room for one of its blocks in that round, so less than a block's: a smaller one need not go there either. */
static void note_full(struct full *f, uint64_t round)
{
    if (round != f->hi)
        f->lo = round;
    f->hi = round + 1;
    if (f->lo <= f->before)
        f->before = f->hi;
}

/* The first round at or after the reader's in which block b fits everywhere. */
static status *choose_round(struct maker *k, const struct load_block *b, uint64_t bytes, size_t elem, uint64_t *out)
{
    const struct load_plan *p = k->p;
    struct rank_state *reader = &k->rank[b->reader];
    uint64_t send = 0;
    bytes = bytes < LEAST_READ_BYTES ? LEAST_READ_BYTES : bytes; /* bounds the blocks of a round too */
    for (uint32_t i = 0; i < b->uses; i++)
        send += p->use[b->first_use + i].elems * elem * use_group(p, &p->use[b->first_use + i])->count;
    for (uint64_t round = next_round(k, b, reader->round);; round = next_round(k, b, round + 1)) {
        TRY(have_round(k, round));
        uint64_t read = round == reader->round ? reader->read : 0, sent = round == reader->round ? reader->send : 0;
        if (read && (read + bytes > 2 * k->run_bytes || sent + send > ROUND_SEND_BYTES))
            continue;
        bool fits = true;
        for (uint32_t i = 0; fits && i < b->uses; i++) {
            const struct load_use *u = &p->use[b->first_use + i];
            const struct load_group *g = use_group(p, u);
            fits = has_room(k, g, u->elems * elem, round);
            if (!fits && g->set != HOLDER_LONE)
                note_full(&k->full[g->set], round);
        }
        if (!fits)
            continue;
        *reader = (struct rank_state){ .round = round, .read = read + bytes, .send = sent + send };
        *out = round;
        return NULL;
    }
}

static void receive(struct maker *k, const struct load_block *b, size_t elem)
{
    uint64_t *received = k->received + b->round * (uint64_t)k->ranks;
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_use *u = &k->p->use[b->first_use + i];
        const struct load_group *g = use_group(k->p, u);
        const struct holder *h = k->holders.holder + g->first;
        for (uint64_t j = 0; j < g->count; j++) {
            received[h[j].rank] += u->elems * elem;
            k->p->totals.wire_bytes += h[j].rank == b->reader ? 0 : u->elems * elem;
        }
    }
}

/* ---- the schedule */

/* Bytes of b that are wanted, equal pieces counted once, at most the block's. */
static uint64_t unique_in(const struct load_plan *p, const struct load_block *b, uint64_t bytes, size_t elem)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < b->uses && n < bytes; i++)
        n += p->use[b->first_use + i].elems * elem;
    return n < bytes ? n : bytes;
}

static status *assign(struct maker *k)
{
    struct load_plan *p = k->p;
    const struct holder_load load = { .bytes = k->assigned };
    uint32_t everybody;
    TRY(add_everybody(k, &everybody));
    uint64_t all = 0;
    for (uint64_t i = 0; i < p->blocks; i++)
        all += block_bytes(&k->m->piece[p->block[i].piece], p->block[i].block);
    k->fair = all / (uint64_t)k->ranks + READ_AHEAD_BYTES;
    for (uint64_t i = 0; i < p->blocks; i++) {
        struct load_block *b = &p->block[i];
        uint64_t bytes = block_bytes(&k->m->piece[b->piece], b->block), round = 0;
        size_t elem = elem_bytes_of(k->m, p, b);
        TRY(choose_reader(k, b, bytes, &load, everybody, &b->reader));
        lengthen(&k->last, b, &k->m->piece[b->piece], bytes, k->run_bytes);
        TRY(choose_round(k, b, bytes, elem, &round));
        b->round = (uint32_t)round;
        k->assigned[b->reader] += bytes;
        receive(k, b, elem);
        p->rounds = round + 1 > p->rounds ? round + 1 : p->rounds;
        p->totals.storage_bytes += bytes;
        p->totals.unique_bytes += unique_in(p, b, bytes, elem);
    }
    return NULL;
}

/* One pass of a radix sort: `to` is `from` by reader or by round, [0, values), and else as before. */
static void sort_pass(const struct load_block *from, struct load_block *to, uint64_t n, uint64_t *at, uint64_t values,
                      bool round)
{
    memset(at, 0, (values + 1) * sizeof *at);
    for (uint64_t i = 0; i < n; i++)
        at[(round ? from[i].round : (uint32_t)from[i].reader) + 1]++;
    for (uint64_t v = 0; v < values; v++)
        at[v + 1] += at[v];
    for (uint64_t i = 0; i < n; i++)
        to[at[round ? from[i].round : (uint32_t)from[i].reader]++] = from[i];
}

/* Blocks by round, then reader; and where each round begins. */
static status *order_blocks(struct load_plan *p, int ranks)
{
    uint64_t values = p->rounds > (uint64_t)ranks ? p->rounds : (uint64_t)ranks;
    struct load_block *other = mem_array(NULL, p->blocks, sizeof *other);
    uint64_t *at = mem_array(NULL, values + 1, sizeof *at);
    p->round = mem_calloc(p->rounds + 1, sizeof *p->round);
    status *st = other && at && p->round ? NULL : ERR(NO_MEMORY, "%llu blocks", (ull)p->blocks);
    if (!st && p->blocks) {
        sort_pass(p->block, other, p->blocks, at, (uint64_t)ranks, false);
        sort_pass(other, p->block, p->blocks, at, p->rounds, true);
    }
    for (uint64_t i = 0; !st && i < p->blocks; i++)
        p->round[p->block[i].round + 1]++;
    for (uint64_t r = 0; !st && r < p->rounds; r++)
        p->round[r + 1] += p->round[r];
    mem_free(other);
    mem_free(at);
    return st;
}

static status *make(struct maker *k)
{
    if (k->m->piece_count > UINT32_MAX || k->wants >= UINT32_MAX)
        return ERR(UNSUPPORTED, "%llu stored and %llu wanted pieces", (ull)k->m->piece_count, (ull)k->wants);
    TRY(add_copies(k));
    TRY(add_blocks(k));
    k->rank = mem_calloc((size_t)k->ranks, sizeof *k->rank);
    k->assigned = mem_calloc((size_t)k->ranks, sizeof *k->assigned);
    k->full = mem_calloc(k->holders.sets + 1, sizeof *k->full);
    if (!k->rank || !k->assigned || !k->full)
        return ERR(NO_MEMORY, "%d ranks", k->ranks);
    TRY(assign(k));
    return order_blocks(k->p, k->ranks);
}

status *load_plan_make(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                       struct load_plan *out)
{
    return load_plan_make_from(m, want, count, ranks, NULL, 0, out);
}

status *load_plan_make_from(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                            const int32_t *reader, uint64_t run_bytes, struct load_plan *out)
{
    struct load_plan p = { 0 };
    struct maker k = { .m = m, .want = want, .wants = count, .ranks = ranks, .reader = reader, .p = &p };
    k.run_bytes = run_bytes > READ_RUN_BYTES ? run_bytes : READ_RUN_BYTES;
    status *st = make(&k);
    holders_free(&k.holders);
    mem_free(k.room);
    mem_free(k.place);
    mem_free(k.first_copy);
    mem_free(k.rank);
    mem_free(k.assigned);
    mem_free(k.received);
    mem_free(k.full);
    if (st) {
        load_plan_free(&p);
        return st;
    }
    *out = p;
    return NULL;
}
