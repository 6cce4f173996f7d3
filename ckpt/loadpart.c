/* loadpart: see loadpart.h. A message is
 *
 *   head; blocks and uses as they lie in memory; then each copy as words: ndim, src, dst, and ndim each of len,
 *   src_stride, dst_stride
 *
 * Work and memory are by what the parts hold in all: a use counts for its reader and for who takes it. */
#include "ckpt/loadpart.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"

typedef unsigned long long ull;

struct head {
    uint64_t blocks, uses, copies, rounds;
    struct load_totals totals;
};

enum { COPY_WORDS = 3 };

/* ---- all ranks' blocks and uses */

struct tally {
    uint64_t blocks, uses; /* so far; while they are laid out: where the next one goes */
    uint64_t seen;         /* 1 + the plan's last block that this rank has to do with */
    uint64_t read;         /* blocks it reads */
};

struct sorter {
    const struct load_plan *p;
    const struct load_want *want;
    const uint64_t *first_want;
    struct tally *rank;                /* [ranks] */
    uint64_t *first_block, *first_use; /* [ranks + 1] */
    struct part_block *block;          /* by rank; NULL: count only */
    struct part_use *use;
};

/* Rank r has to do with the plan's block i. */
static void note_block(struct sorter *s, uint64_t i, uint64_t number, int r)
{
    const struct load_block *b = &s->p->block[i];
    struct tally *t = &s->rank[r];
    if (t->seen == i + 1)
        return;
    t->seen = i + 1;
    if (s->block)
        s->block[t->blocks] = (struct part_block){ .number = number,
                                                   .first_use = t->uses - s->first_use[r],
                                                   .tensor = use_group(s->p, &s->p->use[b->first_use])->tensor,
                                                   .piece = b->piece,
                                                   .block = b->block,
                                                   .round = b->round,
                                                   .reader = b->reader };
    t->blocks++;
}

static void note_use(struct sorter *s, const struct load_use *u, uint32_t want, int r)
{
    struct tally *t = &s->rank[r];
    const struct load_want *w = &s->want[want];
    if (s->use) {
        s->use[t->uses] = (struct part_use){
            .copy = u->copy, .want = (uint32_t)(want - s->first_want[w->rank]), .rank = w->rank, .elems = u->elems
        };
        s->block[t->blocks - 1].uses++;
    }
    t->uses++;
}

static void walk(struct sorter *s)
{
    const struct load_plan *p = s->p;
    for (uint64_t i = 0; i < p->blocks; i++) {
        const struct load_block *b = &p->block[i];
        uint64_t number = s->rank[b->reader].read++;
        note_block(s, i, number, b->reader);
        for (const struct load_use *u = &p->use[b->first_use]; u < &p->use[b->first_use + b->uses]; u++) {
            const struct load_group *g = use_group(p, u);
            for (uint64_t j = g->first; j < g->first + g->count; j++) {
                int to = s->want[p->member[j]].rank;
                note_use(s, u, p->member[j], b->reader);
                if (to == b->reader)
                    continue;
                note_block(s, i, number, to);
                note_use(s, u, p->member[j], to);
            }
        }
    }
}

static status *sort_by_rank(struct sorter *s, int ranks)
{
    size_t n = (size_t)ranks;
    s->rank = mem_calloc(n, sizeof *s->rank);
    s->first_block = mem_calloc(n + 1, sizeof *s->first_block);
    s->first_use = mem_calloc(n + 1, sizeof *s->first_use);
    if (!s->rank || !s->first_block || !s->first_use)
        return ERR(NO_MEMORY, "parts of %d ranks", ranks);
    walk(s);
    for (size_t r = 0; r < n; r++) {
        s->first_block[r + 1] = s->first_block[r] + s->rank[r].blocks;
        s->first_use[r + 1] = s->first_use[r] + s->rank[r].uses;
        s->rank[r] = (struct tally){ .blocks = s->first_block[r], .uses = s->first_use[r] };
    }
    s->block = mem_array(NULL, s->first_block[n] + 1, sizeof *s->block);
    s->use = mem_array(NULL, s->first_use[n] + 1, sizeof *s->use);
    if (!s->block || !s->use)
        return ERR(NO_MEMORY, "parts of %llu blocks and %llu uses", (ull)s->first_block[n], (ull)s->first_use[n]);
    walk(s);
    return NULL;
}

/* ---- a part as bytes */

/* Which of a part's copies a copy of the plan is. */
struct mark {
    uint32_t rank; /* 1 + the rank that it was marked for last */
    uint32_t index;
};

/* The rank's uses get copies of its own: list[*count]. */
static void own_copies(struct sorter *s, int r, struct mark *mark, uint32_t *list, uint64_t *count)
{
    *count = 0;
    for (uint64_t k = s->first_use[r]; k < s->first_use[r + 1]; k++) {
        struct mark *m = &mark[s->use[k].copy];
        if (m->rank != (uint32_t)r + 1) {
            *m = (struct mark){ (uint32_t)r + 1, (uint32_t)*count };
            list[(*count)++] = s->use[k].copy;
        }
        s->use[k].copy = m->index;
    }
}

static unsigned char *put_words(unsigned char *at, const uint64_t *word, int n)
{
    for (int i = 0; i < n; i++, at += 8)
        put_u64(at, word[i]);
    return at;
}

static const unsigned char *get_words(const unsigned char *at, uint64_t *word, int n)
{
    for (int i = 0; i < n; i++, at += 8)
        word[i] = get_u64(at);
    return at;
}

static unsigned char *put_raw(unsigned char *at, const void *from, size_t n)
{
    if (n)
        memcpy(at, from, n);
    return at + n;
}

static unsigned char *put_copy(unsigned char *at, const struct reshard_copy *c)
{
    const uint64_t word[COPY_WORDS] = { (uint64_t)c->ndim, c->src, c->dst };
    at = put_words(at, word, COPY_WORDS);
    at = put_words(at, c->len, c->ndim);
    at = put_words(at, c->src_stride, c->ndim);
    return put_words(at, c->dst_stride, c->ndim);
}

static status *pack_part(struct sorter *s, int r, struct mark *mark, uint32_t *list, struct nodes_message *out)
{
    struct head h = { .blocks = s->first_block[r + 1] - s->first_block[r],
                      .uses = s->first_use[r + 1] - s->first_use[r],
                      .rounds = s->p->rounds,
                      .totals = s->p->totals };
    own_copies(s, r, mark, list, &h.copies);
    size_t n = sizeof h + h.blocks * sizeof *s->block + h.uses * sizeof *s->use;
    for (uint64_t i = 0; i < h.copies; i++)
        n += (COPY_WORDS + 3 * (size_t)load_copy_whole(s->p, list[i]).ndim) * 8;
    unsigned char *buf = mem_alloc(n), *at = buf;
    if (!buf)
        return ERR(NO_MEMORY, "rank %d's part of %zu bytes", r, n);
    at = put_raw(at, &h, sizeof h);
    at = put_raw(at, s->block + s->first_block[r], h.blocks * sizeof *s->block);
    at = put_raw(at, s->use + s->first_use[r], h.uses * sizeof *s->use);
    for (uint64_t i = 0; i < h.copies; i++) {
        const struct reshard_copy c = load_copy_whole(s->p, list[i]);
        at = put_copy(at, &c);
    }
    *out = (struct nodes_message){ buf, n };
    return NULL;
}

void load_parts_free(struct nodes_message *m, int ranks)
{
    for (int r = 0; m && r < ranks; r++)
        mem_free((void *)(uintptr_t)m[r].data);
    mem_free(m);
}

status *load_parts_pack(const struct load_plan *p, const struct load_want *want, const uint64_t *first_want, int ranks,
                        struct nodes_message **out)
{
    struct sorter s = { .p = p, .want = want, .first_want = first_want };
    struct nodes_message *m = mem_calloc((size_t)ranks, sizeof *m);
    struct mark *mark = mem_calloc(p->copies + 1, sizeof *mark);
    uint32_t *list = mem_array(NULL, p->copies + 1, sizeof *list);
    status *st = m && mark && list ? NULL : ERR(NO_MEMORY, "parts of %d ranks", ranks);
    if (!st)
        st = sort_by_rank(&s, ranks);
    for (int r = 0; !st && r < ranks; r++)
        st = pack_part(&s, r, mark, list, &m[r]);
    mem_free(mark);
    mem_free(list);
    mem_free(s.rank);
    mem_free(s.first_block);
    mem_free(s.first_use);
    mem_free(s.block);
    mem_free(s.use);
    if (st)
        load_parts_free(m, ranks);
    else
        *out = m;
    return st;
}

/* ---- and back */

void load_part_free(struct load_part *p)
{
    mem_free(p->copy);
    mem_free(p->use);
    mem_free(p->block);
    mem_free(p->round);
    *p = (struct load_part){ 0 };
}

/* NULL: there is less than a copy. */
static const unsigned char *get_copy(const unsigned char *at, const unsigned char *end, struct reshard_copy *c)
{
    uint64_t word[COPY_WORDS];
    if ((size_t)(end - at) < sizeof word)
        return NULL;
    at = get_words(at, word, COPY_WORDS);
    if (word[0] < 1 || word[0] > LAYOUT_DIMS || (size_t)(end - at) < word[0] * 24)
        return NULL;
    *c = (struct reshard_copy){ .ndim = (int)word[0], .src = word[1], .dst = word[2] };
    at = get_words(at, c->len, c->ndim);
    at = get_words(at, c->src_stride, c->ndim);
    return get_words(at, c->dst_stride, c->ndim);
}

static status *unpack(const unsigned char *at, const unsigned char *end, struct load_part *p)
{
    p->copy = mem_array(NULL, p->copies + 1, sizeof *p->copy);
    p->use = mem_array(NULL, p->uses + 1, sizeof *p->use);
    p->block = mem_array(NULL, p->blocks + 1, sizeof *p->block);
    p->round = mem_calloc(p->rounds + 1, sizeof *p->round);
    if (!p->copy || !p->use || !p->block || !p->round)
        return ERR(NO_MEMORY, "a part of %llu blocks and %llu uses", (ull)p->blocks, (ull)p->uses);
    memcpy(p->block, at, p->blocks * sizeof *p->block);
    at += p->blocks * sizeof *p->block;
    memcpy(p->use, at, p->uses * sizeof *p->use);
    at += p->uses * sizeof *p->use;
    for (uint64_t i = 0; at && i < p->copies; i++)
        at = get_copy(at, end, &p->copy[i]);
    if (at != end)
        return ERR(INTERNAL, "a part of a load plan has not the length of its %llu copies", (ull)p->copies);
    for (uint64_t i = 0; i < p->blocks; i++)
        p->round[p->block[i].round + 1]++;
    for (uint64_t r = 0; r < p->rounds; r++)
        p->round[r + 1] += p->round[r];
    return NULL;
}

status *load_part_unpack(const void *buf, size_t bytes, struct load_part *out)
{
    struct head h;
    if (bytes < sizeof h)
        return ERR(INTERNAL, "a part of a load plan of %zu bytes", bytes);
    memcpy(&h, buf, sizeof h);
    size_t rest = bytes - sizeof h;
    if (h.blocks > rest / sizeof *out->block || h.uses > (rest - h.blocks * sizeof *out->block) / sizeof *out->use)
        return ERR(INTERNAL, "a part of a load plan: %llu blocks and %llu uses in %zu bytes", (ull)h.blocks,
                   (ull)h.uses, bytes);
    struct load_part p = {
        .copies = h.copies, .uses = h.uses, .blocks = h.blocks, .rounds = h.rounds, .totals = h.totals
    };
    const unsigned char *at = buf;
    status *st = unpack(at + sizeof h, at + bytes, &p);
    if (st)
        load_part_free(&p);
    else
        *out = p;
    return st;
}
