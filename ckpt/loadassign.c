/* loadassign: see loadassign.h.
 *
 * Invariants: (1) blocks are given out in the order of the files; (2) a round's bounds hold for every rank: what its
 * readers read and send, what everyone receives. */
#include "ckpt/loadassign.h"

#include "comm/base/mem.h"

#include <string.h>

typedef unsigned long long ull;

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

/* Ranks are numbered anew as slots, set after set, so that what is asked of all members lies together. */
enum { NO_SLOT = UINT32_MAX };

struct rank_state {
    uint64_t round, read, send; /* the round its next block goes to, and what it holds already */
};

/* What is at hand while blocks are given out. */
struct maker {
    const struct metadata *m;
    const uint8_t *elem; /* [pieces] bytes of an element */
    int ranks;
    struct load_reading how;
    struct load_plan *p;
    struct holders *holders; /* tag: slot */
    struct rank_state *rank; /* [ranks] */
    uint64_t *assigned;      /* [ranks] bytes to read in all */
    uint64_t *alone;         /* [ranks] bytes of blocks that come yet and that nobody else wants */
    uint64_t fair;           /* what a rank may read before others help it */
    struct stretch last;     /* what was assigned last */
    uint32_t **received;     /* [rounds][slots] bytes, or INT32_MAX: that or more */
    uint64_t rounds, round_cap;
    uint32_t everybody, node_set; /* sets of all ranks; of those of node 0, and behind it of the others */
    uint32_t *first_slot;         /* [sets] its members have slots from here on, one after another, or NO_SLOT */
    struct full *full;            /* [sets] */
};

/* ---- readers */

/* The only rank that wants it; -1: there are several. */
static int lone_rank(const struct maker *k, const struct load_block *b)
{
    int rank = -1;
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_group *g = use_group(k->p, &k->p->use[b->first_use + i]);
        int r = k->holders->holder[g->first].rank;
        if (g->set != HOLDER_LONE || (i && r != rank))
            return -1;
        rank = r;
    }
    return rank;
}

static void find_alone(struct maker *k)
{
    for (const struct load_block *b = k->p->block; b < k->p->block + k->p->blocks; b++) {
        int r = lone_rank(k, b);
        if (r >= 0)
            k->alone[r] += block_bytes(&k->m->piece[b->piece], b->block);
    }
}

/* What a rank reads by what is given out, and by what can only go to it. */
static uint64_t reads(const struct maker *k, int rank)
{
    return k->assigned[rank] + k->alone[rank];
}

/* Of the ranks that want it, the one that reads the least. */
static status *least_of_wanting(struct maker *k, const struct load_block *b, const struct holder_load *load, int *out)
{
    struct holders *h = k->holders;
    int best = -1;
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_group *g = use_group(k->p, &k->p->use[b->first_use + i]);
        uint32_t at = 0;
        if (g->set != HOLDER_LONE)
            TRY(holders_least(h, g->set, load, &at));
        int r = h->holder[g->first + at].rank;
        if (best < 0 || reads(k, r) < reads(k, best) || (reads(k, r) == reads(k, best) && r < best))
            best = r;
    }
    *out = best;
    return NULL;
}

/* How often a rank is a member of a group. */
static uint64_t times_in(const struct maker *k, const struct load_group *g, int rank)
{
    const struct holder *h = k->holders->holder + g->first;
    uint64_t lo = 0, hi = g->count, n = 0; /* by rank */
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (h[mid].rank < rank)
            lo = mid + 1;
        else
            hi = mid;
    }
    while (lo + n < g->count && h[lo + n].rank == rank)
        n++;
    return n;
}

static bool is_wanted_by(const struct maker *k, const struct load_block *b, int rank)
{
    for (uint32_t i = 0; i < b->uses; i++)
        if (times_in(k, use_group(k->p, &k->p->use[b->first_use + i]), rank))
            return true;
    return false;
}

/* What one reads is as good as in the other one's memory, beside the request that it spares. */
static bool shares_node(const struct maker *k, int a, int b)
{
    return k->how.node_of && k->how.node_of[a] == k->how.node_of[b];
}

/* The one of those that want it that reads the least; another one only when that one has more than its share; but the
 * reader of what lies before it, while neither that nor what it reads more is much: one read of 2 MiB is faster than
 * two of 1 MiB. */
static status *choose_reader(struct maker *k, const struct load_block *b, uint64_t bytes,
                             const struct holder_load *load, int *out)
{
    struct holders *h = k->holders;
    const struct meta_piece *piece = &k->m->piece[b->piece];
    const struct stretch *last = &k->last;
    bool goes_on = last->bytes && last->file == piece->file && last->bytes + bytes <= k->how.run_bytes &&
                   last->end == piece->offset + (uint64_t)b->block * META_BLOCK_BYTES;
    int best;
    uint32_t at;
    if (k->how.reader) {
        *out = k->how.reader[b->piece];
        return NULL;
    }
    TRY(least_of_wanting(k, b, load, &best));
    *out = last->reader;
    bool may = goes_on && (shares_node(k, last->reader, best) || is_wanted_by(k, b, last->reader));
    if (may && reads(k, last->reader) < reads(k, best) + k->how.run_bytes)
        return NULL;
    if (k->how.node_of) {
        uint32_t set = k->node_set + (uint32_t)k->how.node_of[best];
        TRY(holders_least(h, set, load, &at));
        int least = h->holder[h->set[set].first + at].rank;
        if (reads(k, best) >= reads(k, least) + k->how.run_bytes / 2)
            best = least;
    }
    if (goes_on && k->assigned[best] >= k->fair)
        return NULL;
    *out = best;
    if (k->assigned[best] < k->fair)
        return NULL;
    TRY(holders_least(h, k->everybody, load, &at));
    int least = h->holder[h->set[k->everybody].first + at].rank;
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

/* A set of those of `rank` [count] behind the holders in use. */
static status *add_set(struct holders *h, uint64_t first, uint32_t count)
{
    TRY(array_room(&h->set, h->sets, &h->set_cap, sizeof *h->set));
    h->set[h->sets++] = (struct holder_set){ .first = first, .count = count };
    return NULL;
}

/* Sets of all ranks, and of each node's, for who has the least to read of them. */
static status *add_everybody(struct maker *k)
{
    struct holders *h = k->holders;
    const int32_t *node_of = k->how.node_of;
    uint64_t ranks = (uint64_t)k->ranks, at = h->used + ranks;
    int32_t nodes = 0;
    struct holder *more = mem_array(h->holder, h->used + 2 * ranks, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "%d ranks", k->ranks);
    h->holder = more;
    for (int r = 0; r < k->ranks; r++) {
        more[h->used + (uint64_t)r] = (struct holder){ .rank = r };
        nodes = node_of && node_of[r] >= nodes ? node_of[r] + 1 : nodes;
    }
    k->everybody = (uint32_t)h->sets;
    TRY(add_set(h, h->used, (uint32_t)ranks));
    k->node_set = (uint32_t)h->sets;
    uint64_t *end = mem_calloc((size_t)nodes + 1, sizeof *end); /* of each node's members, counted from `at` */
    if (!end)
        return ERR(NO_MEMORY, "%d nodes", nodes);
    for (int r = 0; node_of && r < k->ranks; r++)
        end[node_of[r] + 1]++;
    status *st = NULL;
    for (int32_t n = 0; !st && n < nodes; n++) {
        st = add_set(h, at + end[n], (uint32_t)end[n + 1]);
        end[n + 1] += end[n];
    }
    for (int r = 0; !st && node_of && r < k->ranks; r++)
        more[at + end[node_of[r]]++] = (struct holder){ .rank = r };
    mem_free(end);
    return st;
}

/* ---- rounds */

static status *number_slots(struct maker *k)
{
    struct holders *h = k->holders;
    uint32_t *slot = mem_array(NULL, (size_t)k->ranks, sizeof *slot), slots = 0;
    k->first_slot = mem_array(NULL, h->sets, sizeof *k->first_slot);
    if (!slot || !k->first_slot) {
        mem_free(slot);
        return ERR(NO_MEMORY, "%d ranks", k->ranks);
    }
    for (int r = 0; r < k->ranks; r++)
        slot[r] = NO_SLOT;
    for (uint64_t s = 0; s < h->sets; s++)
        for (uint64_t i = h->set[s].first; i < h->set[s].first + h->set[s].count; i++)
            if (slot[h->holder[i].rank] == NO_SLOT)
                slot[h->holder[i].rank] = slots++;
    for (int r = 0; r < k->ranks; r++)
        slot[r] = slot[r] == NO_SLOT ? slots++ : slot[r];
    for (uint64_t i = 0; i < h->used; i++)
        h->holder[i].tag = slot[h->holder[i].rank];
    for (uint64_t s = 0; s < h->sets; s++) {
        const struct holder *x = &h->holder[h->set[s].first];
        k->first_slot[s] = x->tag;
        for (uint32_t i = 1; i < h->set[s].count; i++)
            if (x[i].tag != x->tag + i)
                k->first_slot[s] = NO_SLOT;
    }
    mem_free(slot);
    return NULL;
}

static status *have_round(struct maker *k, uint64_t round)
{
    while (round >= k->rounds) {
        TRY(array_room(&k->received, k->rounds, &k->round_cap, sizeof *k->received));
        k->received[k->rounds] = mem_calloc((size_t)k->ranks, sizeof **k->received);
        if (!k->received[k->rounds])
            return ERR(NO_MEMORY, "round %llu of %d ranks", (ull)k->rounds, k->ranks);
        k->rounds++;
    }
    return NULL;
}

/* Every rank of the group has room in that round: as a block's bytes are less than what a rank receives, one that has
 * received nothing always has. Uses of one rank lie apart: each is tested by itself. */
static bool has_room(const struct maker *k, const struct load_group *g, uint64_t bytes, uint64_t round)
{
    const uint32_t *received = k->received[round], most = (uint32_t)(ROUND_SEND_BYTES - bytes);
    const struct holder *h = k->holders->holder + g->first;
    uint32_t first = g->set == HOLDER_LONE ? h->tag : k->first_slot[g->set];
    uint32_t left = 0; /* of all together: the top bit is that of a difference below 0 */
    for (uint64_t i = 0; first != NO_SLOT && i < g->count; i++)
        left |= most - received[first + i];
    for (uint64_t i = 0; first == NO_SLOT && i < g->count; i++)
        left |= most - received[h[i].tag];
    return left <= INT32_MAX;
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
        if (read && (read + bytes > 2 * k->how.run_bytes || sent + send > ROUND_SEND_BYTES))
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

static void add_received(uint32_t *received, uint32_t bytes)
{
    uint32_t sum = *received + bytes;
    *received = (sum | -(sum >> 31)) & INT32_MAX; /* at most */
}

static void receive(struct maker *k, const struct load_block *b, size_t elem)
{
    uint32_t *received = k->received[b->round];
    for (uint32_t i = 0; i < b->uses; i++) {
        const struct load_use *u = &k->p->use[b->first_use + i];
        const struct load_group *g = use_group(k->p, u);
        const struct holder *h = k->holders->holder + g->first;
        uint32_t bytes = (uint32_t)(u->elems * elem);
        uint32_t first = g->set == HOLDER_LONE ? h->tag : k->first_slot[g->set];
        for (uint64_t j = 0; first != NO_SLOT && j < g->count; j++)
            add_received(&received[first + j], bytes);
        for (uint64_t j = 0; first == NO_SLOT && j < g->count; j++)
            add_received(&received[h[j].tag], bytes);
        k->p->totals.wire_bytes += (g->count - times_in(k, g, b->reader)) * bytes;
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

/* Ask for the memory that a block after the i-th needs. */
static void prefetch_block(const struct maker *k, uint64_t i)
{
    enum { AHEAD = 8 };
    const struct load_plan *p = k->p;
    if (i + AHEAD >= p->blocks)
        return;
    const struct load_block *b = &p->block[i + AHEAD];
    __builtin_prefetch(&k->m->piece[b->piece].offset);
    __builtin_prefetch(use_group(p, &p->use[b->first_use]));
}

static status *assign(struct maker *k)
{
    struct load_plan *p = k->p;
    const struct holder_load load = { .bytes = k->assigned };
    TRY(add_everybody(k));
    find_alone(k);
    k->fair = p->totals.storage_bytes / (uint64_t)k->ranks + READ_AHEAD_BYTES;
    for (uint64_t i = 0; i < p->blocks; i++) {
        prefetch_block(k, i);
        struct load_block *b = &p->block[i];
        uint64_t bytes = block_bytes(&k->m->piece[b->piece], b->block), round = 0;
        size_t elem = k->elem[b->piece];
        int lone = lone_rank(k, b);
        if (lone >= 0)
            k->alone[lone] -= bytes;
        TRY(choose_reader(k, b, bytes, &load, &b->reader));
        lengthen(&k->last, b, &k->m->piece[b->piece], bytes, k->how.run_bytes);
        TRY(choose_round(k, b, bytes, elem, &round));
        b->round = (uint32_t)round;
        k->assigned[b->reader] += bytes;
        receive(k, b, elem);
        p->rounds = round + 1 > p->rounds ? round + 1 : p->rounds;
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
    k->rank = mem_calloc((size_t)k->ranks, sizeof *k->rank);
    k->assigned = mem_calloc((size_t)k->ranks, sizeof *k->assigned);
    k->alone = mem_calloc((size_t)k->ranks, sizeof *k->alone);
    k->full = mem_calloc(k->holders->sets + 1, sizeof *k->full);
    if (!k->rank || !k->assigned || !k->alone || !k->full)
        return ERR(NO_MEMORY, "%d ranks", k->ranks);
    TRY(number_slots(k));
    TRY(assign(k));
    return order_blocks(k->p, k->ranks);
}

status *load_assign(const struct metadata *m, const uint8_t *elem, int ranks, const struct load_reading *how,
                    struct holders *h, struct load_plan *p)
{
    struct maker k = { .m = m, .elem = elem, .ranks = ranks, .how = *how, .holders = h, .p = p };
    status *st = make(&k);
    mem_free(k.rank);
    mem_free(k.assigned);
    mem_free(k.alone);
    mem_free(k.full);
    mem_free(k.first_slot);
    for (uint64_t i = 0; i < k.rounds; i++)
        mem_free(k.received[i]);
    mem_free(k.received);
    return st;
}
