/* loadplan: wants -> copies (reshard) -> uses of blocks -> a reader for each block -> rounds. */
#include "ckpt/loadplan.h"

#include "comm/base/mem.h"

#include <stdlib.h>
#include <string.h>

void load_plan_free(struct load_plan *p)
{
    reshard_list_free(&p->list);
    mem_free(p->use);
    mem_free(p->block);
    mem_free(p->round);
    *p = (struct load_plan){ 0 };
}

/* ---- copies */

static status *add_tensor(const struct metadata *m, uint32_t tensor, const struct load_want *want, uint64_t first,
                          uint64_t count, struct reshard_list *list)
{
    const struct meta_tensor *t = &m->tensor[tensor];
    struct piece *stored = mem_calloc(t->piece_count + count + 1, sizeof *stored), *wanted = stored + t->piece_count;
    if (!stored)
        return ERR(NO_MEMORY, "pieces of %s/%s", t->part, t->name);
    for (uint64_t i = 0; i < t->piece_count; i++)
        stored[i] = m->piece[t->first_piece + i].piece;
    for (uint64_t i = 0; i < count; i++)
        wanted[i] = want[first + i].piece;
    size_t before = list->count;
    status *st = reshard_tensor(&t->shape, stored, (uint32_t)t->piece_count, wanted, (uint32_t)count, list);
    mem_free(stored);
    for (size_t i = before; !st && i < list->count; i++) {
        list->copy[i].stored += (uint32_t)t->first_piece;
        list->copy[i].wanted += (uint32_t)first;
    }
    return status_wrap(st, "step %llu: %s/%s", (unsigned long long)m->step, t->part, t->name);
}

static status *add_copies(const struct metadata *m, const struct load_want *want, uint64_t count, struct load_plan *p)
{
    if (m->piece_count > UINT32_MAX || count > UINT32_MAX)
        return ERR(UNSUPPORTED, "%llu stored and %llu wanted pieces", (unsigned long long)m->piece_count,
                   (unsigned long long)count);
    for (uint64_t i = 0, n; i < count; i += n) {
        for (n = 1; i + n < count && want[i + n].tensor == want[i].tensor; n++)
            ;
        TRY(add_tensor(m, want[i].tensor, want, i, n, &p->list));
    }
    return NULL;
}

/* ---- uses: (block, copy) pairs that share elements */

struct pair {
    uint32_t piece, block, copy;
    uint32_t place; /* of the piece, when pieces are sorted by file and offset */
    uint64_t elems;
};

struct pairs {
    struct pair *pair;
    uint64_t count, cap;
};

static status *add_pair(struct pairs *l, struct pair pair)
{
    if (l->count == l->cap) {
        uint64_t cap = l->cap ? l->cap * 2 : 256;
        struct pair *more = mem_array(l->pair, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "uses of %llu blocks", (unsigned long long)cap);
        l->pair = more;
        l->cap = cap;
    }
    l->pair[l->count++] = pair;
    return NULL;
}

static size_t elem_bytes_of(const struct meta_piece *p)
{
    uint64_t elems = piece_elems(&p->piece);
    return elems ? (size_t)(p->bytes / elems) : 1;
}

static status *add_pairs(const struct metadata *m, const struct reshard_copy *c, uint32_t index, uint32_t place,
                         struct pairs *l)
{
    const struct meta_piece *p = &m->piece[c->stored];
    uint64_t per = META_BLOCK_BYTES / elem_bytes_of(p), begin, end;
    reshard_span(c, &begin, &end);
    for (uint64_t b = begin / per; b * per < end; b++) {
        uint64_t n = reshard_count(c, b * per, (b + 1) * per);
        if (n)
            TRY(add_pair(l, (struct pair){ c->stored, (uint32_t)b, index, place, n }));
    }
    return NULL;
}

static int by_place(const void *a, const void *b, void *arg)
{
    const struct metadata *m = arg;
    uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;
    const struct meta_piece *x = &m->piece[i], *y = &m->piece[j];
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return i < j ? -1 : i > j;
}

/* place[i]: rank of piece i among all, by file and offset. */
static status *place_pieces(const struct metadata *m, uint32_t **out)
{
    uint64_t n = m->piece_count + 1;
    uint32_t *place = mem_calloc(n, sizeof *place), *order = mem_calloc(n, sizeof *order);
    if (!place || !order) {
        mem_free(place);
        mem_free(order);
        return ERR(NO_MEMORY, "places of %llu pieces", (unsigned long long)n);
    }
    for (uint64_t i = 0; i < m->piece_count; i++)
        order[i] = (uint32_t)i;
    qsort_r(order, m->piece_count, sizeof *order, by_place, (void *)(uintptr_t)m);
    for (uint64_t i = 0; i < m->piece_count; i++)
        place[order[i]] = (uint32_t)i;
    mem_free(order);
    *out = place;
    return NULL;
}

static int compare_pair(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;
    if (x->place != y->place)
        return x->place < y->place ? -1 : 1;
    if (x->block != y->block)
        return x->block < y->block ? -1 : 1;
    return x->copy < y->copy ? -1 : x->copy > y->copy;
}

static status *collect_pairs(const struct metadata *m, const struct reshard_list *list, struct pairs *l)
{
    uint32_t *place;
    if (list->count > UINT32_MAX)
        return ERR(UNSUPPORTED, "%zu copies", list->count);
    TRY(place_pieces(m, &place));
    status *st = NULL;
    for (size_t i = 0; !st && i < list->count; i++)
        st = add_pairs(m, &list->copy[i], (uint32_t)i, place[list->copy[i].stored], l);
    mem_free(place);
    if (!st && l->count)
        qsort(l->pair, l->count, sizeof *l->pair, compare_pair);
    return st;
}

static status *make_blocks(const struct pairs *l, struct load_plan *p)
{
    p->use = mem_calloc(l->count + 1, sizeof *p->use);
    p->block = mem_calloc(l->count + 1, sizeof *p->block);
    if (!p->use || !p->block)
        return ERR(NO_MEMORY, "uses of %llu blocks", (unsigned long long)l->count);
    for (uint64_t i = 0; i < l->count; i++) {
        const struct pair *q = &l->pair[i];
        struct load_block *b = p->blocks ? &p->block[p->blocks - 1] : NULL;
        if (!b || b->piece != q->piece || b->block != q->block) {
            b = &p->block[p->blocks++];
            *b = (struct load_block){ .piece = q->piece, .block = q->block, .first_use = i };
        }
        b->uses++;
        p->use[p->uses++] = (struct load_use){ .copy = q->copy, .elems = q->elems };
    }
    return NULL;
}

/* ---- readers and rounds */

struct load_rank {
    uint64_t assigned;          /* bytes to read in all */
    uint64_t round, read, send; /* the round its next block goes to, and what it holds already */
    uint64_t wants, wants_of;   /* bytes of the block at hand; wants_of: that block's number + 1 */
};

static int rank_of_use(const struct load_plan *p, const struct load_want *want, const struct load_use *u)
{
    return want[p->list.copy[u->copy].wanted].rank;
}

/* Of the ranks that want it, the one with the least to read; another one only when that one is far ahead of all. */
static int choose_reader(const struct load_plan *p, const struct load_want *want, const struct load_block *b,
                         const struct load_rank *rank, int ranks)
{
    int best = rank_of_use(p, want, &p->use[b->first_use]), least = 0;
    for (uint64_t i = 1; i < b->uses; i++) {
        int r = rank_of_use(p, want, &p->use[b->first_use + i]);
        if (rank[r].assigned < rank[best].assigned || (rank[r].assigned == rank[best].assigned && r < best))
            best = r;
    }
    if (rank[best].assigned < READ_AHEAD_BYTES)
        return best;
    for (int r = 1; r < ranks; r++)
        if (rank[r].assigned < rank[least].assigned)
            least = r;
    return rank[best].assigned - rank[least].assigned >= READ_AHEAD_BYTES ? least : best;
}

/* Bytes that each rank has still room for in each round: received[round * ranks + rank]. */
struct inbox {
    uint64_t *received;
    uint64_t rounds;
    int ranks;
};

static status *have_round(struct inbox *in, uint64_t round)
{
    if (round < in->rounds)
        return NULL;
    uint64_t rounds = (round + 1) * 2;
    size_t n = (size_t)in->ranks;
    uint64_t *more = mem_array(in->received, rounds * n, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "%llu rounds of %d ranks", (unsigned long long)rounds, in->ranks);
    memset(more + in->rounds * n, 0, (rounds - in->rounds) * n * sizeof *more);
    in->received = more;
    in->rounds = rounds;
    return NULL;
}

/* The first round at or after the reader's in which block b fits everywhere. Uses of one rank lie apart: each is tested
 * by itself. */
static status *choose_round(const struct load_plan *p, const struct load_want *want, const struct load_block *b,
                            uint64_t bytes, size_t elem, struct load_rank *reader, struct inbox *in, uint64_t *out)
{
    uint64_t send = 0;
    bytes = bytes < LEAST_READ_BYTES ? LEAST_READ_BYTES : bytes; /* bounds the blocks of a round too */
    for (uint64_t i = 0; i < b->uses; i++)
        send += p->use[b->first_use + i].elems * elem;
    for (uint64_t round = reader->round;; round++) {
        TRY(have_round(in, round));
        uint64_t read = round == reader->round ? reader->read : 0, sent = round == reader->round ? reader->send : 0;
        const uint64_t *received = in->received + round * (uint64_t)in->ranks;
        bool fits = !read || (read + bytes <= ROUND_READ_BYTES && sent + send <= ROUND_SEND_BYTES);
        for (uint64_t i = 0; fits && i < b->uses; i++) {
            uint64_t have = received[rank_of_use(p, want, &p->use[b->first_use + i])];
            fits = !have || have + p->use[b->first_use + i].elems * elem <= ROUND_SEND_BYTES;
        }
        if (!fits)
            continue;
        reader->round = round;
        reader->read = read + bytes;
        reader->send = sent + send;
        *out = round;
        return NULL;
    }
}

static int by_round(const void *a, const void *b)
{
    const struct load_block *x = a, *y = b;
    if (x->round != y->round)
        return x->round < y->round ? -1 : 1;
    if (x->reader != y->reader)
        return x->reader < y->reader ? -1 : 1;
    return x->first_use < y->first_use ? -1 : x->first_use > y->first_use; /* uses follow the places in the files */
}

/* Bytes of b that are wanted, equal pieces counted once, at most the block's. */
static uint64_t unique_in(const struct load_plan *p, const struct load_want *want, const struct load_block *b,
                          uint64_t bytes, size_t elem)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < b->uses && n < bytes; i++) {
        const struct reshard_copy *c = &p->list.copy[p->use[b->first_use + i].copy];
        bool first = true;
        for (uint64_t j = 0; first && j < i; j++) {
            const struct reshard_copy *d = &p->list.copy[p->use[b->first_use + j].copy];
            first =
                !(c->src == d->src && c->dst == d->dst && piece_equal(&want[c->wanted].piece, &want[d->wanted].piece));
        }
        n += first ? p->use[b->first_use + i].elems * elem : 0;
    }
    return n < bytes ? n : bytes;
}

static status *assign(const struct metadata *m, const struct load_want *want, struct load_plan *p,
                      struct load_rank *rank, struct inbox *in)
{
    for (uint64_t i = 0; i < p->blocks; i++) {
        struct load_block *b = &p->block[i];
        const struct meta_piece *piece = &m->piece[b->piece];
        uint64_t bytes = block_bytes(piece, b->block), round;
        size_t elem = elem_bytes_of(piece);
        b->reader = choose_reader(p, want, b, rank, in->ranks);
        TRY(choose_round(p, want, b, bytes, elem, &rank[b->reader], in, &round));
        b->round = (uint32_t)round;
        rank[b->reader].assigned += bytes;
        uint64_t *received = in->received + round * (uint64_t)in->ranks;
        for (uint64_t k = 0; k < b->uses; k++)
            received[rank_of_use(p, want, &p->use[b->first_use + k])] += p->use[b->first_use + k].elems * elem;
        p->rounds = round + 1 > p->rounds ? round + 1 : p->rounds;
        p->totals.storage_bytes += bytes;
        p->totals.unique_bytes += unique_in(p, want, b, bytes, elem);
    }
    if (p->blocks)
        qsort(p->block, p->blocks, sizeof *p->block, by_round);
    p->round = mem_calloc(p->rounds + 1, sizeof *p->round);
    if (!p->round)
        return ERR(NO_MEMORY, "%llu rounds", (unsigned long long)p->rounds);
    for (uint64_t i = 0; i < p->blocks; i++)
        p->round[p->block[i].round + 1]++;
    for (uint64_t r = 0; r < p->rounds; r++)
        p->round[r + 1] += p->round[r];
    return NULL;
}

static status *schedule(const struct metadata *m, const struct load_want *want, int ranks, struct load_plan *p)
{
    struct load_rank *rank = mem_calloc((size_t)ranks, sizeof *rank);
    struct inbox in = { .ranks = ranks };
    status *st = rank ? assign(m, want, p, rank, &in) : ERR(NO_MEMORY, "%d ranks", ranks);
    mem_free(rank);
    mem_free(in.received);
    return st;
}

status *load_plan_make(const struct metadata *m, const struct load_want *want, uint64_t count, int ranks,
                       struct load_plan *out)
{
    struct load_plan p = { 0 };
    struct pairs pairs = { 0 };
    status *st = add_copies(m, want, count, &p);
    if (!st)
        st = collect_pairs(m, &p.list, &pairs);
    if (!st)
        st = make_blocks(&pairs, &p);
    mem_free(pairs.pair);
    if (!st)
        st = schedule(m, want, ranks, &p);
    if (st) {
        load_plan_free(&p);
        return st;
    }
    *out = p;
    return NULL;
}
