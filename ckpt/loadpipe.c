/* loadpipe: gather the wants, plan (loadplan.c), then per round: read and verify -> pack -> exchange -> place.
 *
 * A rank that fails keeps its status and goes on taking part, with whatever bytes it has, until all agree at the end.
 */
#include "ckpt/loadpipe.h"

#include "ckpt/loadplan.h"
#include "ckpt/refs.h"
#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LOAD_TAG = 2, READERS = 2, RUN_BYTES = 8 << 20, GAP_BYTES = 8 << 10 };

/* Blocks that lie behind one another in a file, read at once; the padding between them too. */
struct run {
    const struct load_block *block;
    uint64_t blocks, offset, bytes;
    unsigned char *out;
};

struct load {
    struct comm *c;
    const struct metadata *m;
    struct origins from;    /* where its files lie */
    struct load_want *want; /* [wants] of all ranks; dst only where rank is ours */
    uint64_t wants;
    struct load_plan plan;
    struct workers *workers;
    status *st;            /* this rank's first error */
    unsigned char *blocks; /* this rank's blocks of one round, as they lie in the files */
    size_t *at;            /* where each of them begins there */
    struct run *run;
    status **run_st;
    size_t runs;
    unsigned char *send, *receive; /* messages of one round, by peer */
    size_t *send_at, *receive_at;  /* [size + 1] */
    struct comm_xfer *xfer;
    struct comm_req req;
};

/* ---- wants */

/* Everybody's wants, by rank, on every rank. */
static status *gather_wants(struct load *l, struct load_want *mine, uint64_t count)
{
    void *all = NULL;
    size_t *counts = NULL, bytes = 0;
    int me = l->c->rank;
    TRY(comm_gather_bytes(l->c, mine, count * sizeof *mine, 0, &all, &counts));
    for (int r = 0; me == 0 && r < l->c->size; r++)
        bytes += counts[r];
    mem_free(counts);
    status *st = comm_bcast_bytes(l->c, &all, &bytes, 0);
    if (st) {
        mem_free(me == 0 ? all : NULL);
        return st;
    }
    l->want = all;
    l->wants = bytes / sizeof *l->want;
    return NULL; /* the pointers that travelled serve the rank they came from */
}

/* ---- one round */

/* This rank's blocks of a round: [*first, *end) of the plan's. */
static void my_blocks(const struct load *l, uint64_t round, uint64_t *first, uint64_t *end)
{
    const struct load_plan *p = &l->plan;
    uint64_t i = p->round[round];
    while (i < p->round[round + 1] && p->block[i].reader < l->c->rank)
        i++;
    *first = i;
    while (i < p->round[round + 1] && p->block[i].reader == l->c->rank)
        i++;
    *end = i;
}

static size_t elem_bytes(const struct load *l, const struct load_use *u)
{
    return dtype_bytes(l->m->tensor[use_group(&l->plan, u)->tensor].dtype);
}

/* The i-th rank's want that a use serves. */
static const struct load_want *want_of(const struct load *l, const struct load_group *g, uint64_t i)
{
    return &l->want[l->plan.member[g->first + i]];
}

static status *damaged(const struct load *l, const struct load_block *b, const char *words)
{
    const struct meta_piece *p = &l->m->piece[b->piece];
    const struct meta_tensor *t = &l->m->tensor[use_group(&l->plan, &l->plan.use[b->first_use])->tensor];
    char owner[REFS_WORDS];
    refs_words(l->m, &l->m->file[p->file], owner);
    return ERR(CORRUPT, "step %llu: %sfile %s: tensor %s/%s: block at offset %llu: %s", (unsigned long long)l->m->step,
               owner, l->m->file[p->file].name, t->part, t->name,
               (unsigned long long)(p->offset + (uint64_t)b->block * META_BLOCK_BYTES), words);
}

static uint64_t block_offset(const struct load *l, const struct load_block *b)
{
    return l->m->piece[b->piece].offset + (uint64_t)b->block * META_BLOCK_BYTES;
}

/* Group this rank's blocks of a round into runs and give each its place. Returns the bytes they take. */
static size_t lay_out(struct load *l, uint64_t round)
{
    uint64_t first, end;
    size_t total = 0;
    my_blocks(l, round, &first, &end);
    l->runs = 0;
    for (uint64_t i = first; i < end; i++) {
        const struct load_block *b = &l->plan.block[i];
        const struct meta_piece *p = &l->m->piece[b->piece];
        uint64_t offset = block_offset(l, b), bytes = block_bytes(p, b->block);
        struct run *r = l->runs ? &l->run[l->runs - 1] : NULL;
        bool joins = r && p->file == l->m->piece[r->block->piece].file && offset >= r->offset + r->bytes &&
                     offset - r->offset - r->bytes <= GAP_BYTES && offset + bytes - r->offset <= RUN_BYTES;
        if (!joins) {
            r = &l->run[l->runs++];
            *r = (struct run){ .block = b, .offset = offset, .out = l->blocks + total };
        }
        total -= r->bytes;
        l->at[i - first] = total + (offset - r->offset);
        r->blocks++;
        r->bytes = offset + bytes - r->offset;
        total += r->bytes;
    }
    return total;
}

static status *check_block(const struct load *l, const struct load_block *b, const unsigned char *payload)
{
    const struct meta_piece *p = &l->m->piece[b->piece];
    uint32_t crc = crc32c(0, payload, block_bytes(p, b->block)), stored = l->m->crc[p->first_crc + b->block];
    char words[80];
    if (crc == stored)
        return NULL;
    snprintf(words, sizeof words, "crc32c is %08x, the metadata says %08x", crc, stored);
    return damaged(l, b, words);
}

static status *read_run(const struct load *l, const struct run *r)
{
    char key[STORE_KEY_BYTES];
    const struct meta_file *f = &l->m->file[l->m->piece[r->block->piece].file];
    TRY(origins_key(l->m, f, key));
    status *st = store_get(origins_store(&l->from, f), key, r->offset, r->out, r->bytes);
    if (status_code(st) == ST_CORRUPT || status_code(st) == ST_NOT_FOUND) {
        status *named = damaged(l, r->block, status_message(st));
        status_free(st);
        return named;
    }
    for (uint64_t i = 0; !st && i < r->blocks; i++)
        st = check_block(l, &r->block[i], r->out + (block_offset(l, &r->block[i]) - r->offset));
    return st;
}

struct read_job {
    const struct load *l;
    status **st; /* [runs] */
};

static void read_one(void *arg, size_t i)
{
    struct read_job *j = arg;
    j->st[i] = read_run(j->l, &j->l->run[i]);
}

/* Read and verify this rank's blocks of a round. Local. */
static void read_round(struct load *l, uint64_t round)
{
    lay_out(l, round);
    struct read_job j = { .l = l, .st = l->run_st };
    workers_for(l->workers, l->runs, read_one, &j);
    for (size_t i = 0; i < l->runs; i++) {
        l->st = status_first(l->st, l->run_st[i]);
        l->run_st[i] = NULL;
    }
}

/* Bytes to each peer and from each peer in a round, as offsets into the two message buffers. */
static void measure_round(struct load *l, uint64_t round)
{
    const struct load_plan *p = &l->plan;
    size_t n = (size_t)l->c->size;
    int me = l->c->rank;
    memset(l->send_at, 0, (n + 1) * sizeof *l->send_at);
    memset(l->receive_at, 0, (n + 1) * sizeof *l->receive_at);
    for (uint64_t i = p->round[round]; i < p->round[round + 1]; i++) {
        const struct load_block *b = &p->block[i];
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            const struct load_group *g = use_group(p, &p->use[k]);
            size_t bytes = p->use[k].elems * elem_bytes(l, &p->use[k]);
            for (uint64_t j = 0; j < g->count; j++) {
                int to = want_of(l, g, j)->rank;
                if (b->reader == me && to != me)
                    l->send_at[to + 1] += bytes;
                if (b->reader != me && to == me)
                    l->receive_at[b->reader + 1] += bytes;
            }
        }
    }
    for (size_t r = 0; r < n; r++) {
        l->send_at[r + 1] += l->send_at[r];
        l->receive_at[r + 1] += l->receive_at[r];
    }
}

/* From the blocks into the messages, and straight into place what stays here. send_at moves on to each message's end.
 */
static void pack_round(struct load *l, uint64_t round)
{
    const struct load_plan *p = &l->plan;
    uint64_t first, end;
    my_blocks(l, round, &first, &end);
    for (uint64_t i = first; i < end; i++) {
        const struct load_block *b = &p->block[i];
        const unsigned char *src = l->blocks + l->at[i - first];
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            const struct reshard_copy *c = &p->list.copy[p->use[k].copy];
            const struct load_group *g = use_group(p, &p->use[k]);
            size_t elem = elem_bytes(l, &p->use[k]);
            uint64_t per = META_BLOCK_BYTES / elem, lo = b->block * per;
            for (uint64_t j = 0; j < g->count; j++) {
                const struct load_want *w = want_of(l, g, j);
                if (w->rank == l->c->rank)
                    reshard_apply(c, elem, src, lo, lo + per, w->dst);
                else
                    l->send_at[w->rank] += reshard_pack(c, elem, src, lo, lo + per, l->send + l->send_at[w->rank]);
            }
        }
    }
}

static void unpack_round(struct load *l, uint64_t round)
{
    const struct load_plan *p = &l->plan;
    for (uint64_t i = p->round[round]; i < p->round[round + 1]; i++) {
        const struct load_block *b = &p->block[i];
        if (b->reader == l->c->rank)
            continue;
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            const struct reshard_copy *c = &p->list.copy[p->use[k].copy];
            const struct load_group *g = use_group(p, &p->use[k]);
            size_t elem = elem_bytes(l, &p->use[k]);
            uint64_t per = META_BLOCK_BYTES / elem, lo = b->block * per;
            for (uint64_t j = 0; j < g->count; j++) {
                const struct load_want *w = want_of(l, g, j);
                if (w->rank == l->c->rank)
                    l->receive_at[b->reader] +=
                        reshard_unpack(c, elem, l->receive + l->receive_at[b->reader], lo, lo + per, w->dst);
            }
        }
    }
}

/* Message lengths are known before the bytes: list the messages, fill them, let them go. */
static status *start_exchange(struct load *l, uint64_t round)
{
    size_t n = 0;
    measure_round(l, round);
    for (int r = 0; r < l->c->size; r++) {
        size_t begin = l->send_at[r], bytes = l->send_at[r + 1] - begin;
        l->xfer[n++] =
            (struct comm_xfer){ .peer = r, .tag = LOAD_TAG, .send = true, .buf = l->send + begin, .bytes = bytes };
        begin = l->receive_at[r];
        bytes = l->receive_at[r + 1] - begin;
        l->xfer[n++] = (struct comm_xfer){ .peer = r, .tag = LOAD_TAG, .buf = l->receive + begin, .bytes = bytes };
    }
    pack_round(l, round);
    return comm_iexchange(l->c, l->xfer, n, NULL, &l->req);
}

/* Round n travels while round n + 1 is read. Only the transport's errors end it early. */
static status *run_rounds(struct load *l)
{
    uint64_t rounds = l->plan.rounds;
    if (rounds)
        read_round(l, 0);
    for (uint64_t r = 0; r < rounds; r++) {
        TRY(start_exchange(l, r));
        if (r + 1 < rounds)
            read_round(l, r + 1);
        TRY(comm_wait(&l->req));
        unpack_round(l, r);
    }
    return NULL;
}

/* Memory for the largest round of this rank. */
static status *allocate(struct load *l)
{
    size_t n = (size_t)l->c->size, blocks = 0, bytes = 0, send = 0, receive = 0;
    l->send_at = mem_calloc(n + 1, sizeof *l->send_at);
    l->receive_at = mem_calloc(n + 1, sizeof *l->receive_at);
    l->xfer = mem_calloc(2 * n, sizeof *l->xfer);
    if (!l->send_at || !l->receive_at || !l->xfer)
        return ERR(NO_MEMORY, "exchange with %zu ranks", n);
    for (uint64_t r = 0; r < l->plan.rounds; r++) {
        uint64_t first, end;
        my_blocks(l, r, &first, &end);
        measure_round(l, r);
        blocks = end - first > blocks ? end - first : blocks;
        send = l->send_at[n] > send ? l->send_at[n] : send;
        receive = l->receive_at[n] > receive ? l->receive_at[n] : receive;
    }
    l->at = mem_calloc(blocks + 1, sizeof *l->at);
    l->run = mem_calloc(blocks + 1, sizeof *l->run);
    l->run_st = mem_calloc(blocks + 1, sizeof(status *));
    if (!l->at || !l->run || !l->run_st)
        return ERR(NO_MEMORY, "a round of %zu blocks", blocks);
    for (uint64_t r = 0; r < l->plan.rounds; r++) {
        size_t need = lay_out(l, r);
        bytes = need > bytes ? need : bytes;
    }
    l->blocks = mem_calloc(bytes + 1, 1); /* zeroed: what a rank that fails sends is defined */
    l->send = mem_alloc(send);
    l->receive = mem_alloc(receive);
    if (!l->blocks || !l->send || !l->receive)
        return ERR(NO_MEMORY, "a round of %zu bytes to read, %zu to send and %zu to receive", bytes, send, receive);
    return workers_open(READERS, &l->workers);
}

static void free_load(struct load *l)
{
    workers_close(l->workers);
    origins_close(&l->from);
    load_plan_free(&l->plan);
    mem_free(l->want);
    mem_free(l->blocks);
    mem_free(l->at);
    mem_free(l->run);
    mem_free(l->run_st);
    mem_free(l->send);
    mem_free(l->receive);
    mem_free(l->send_at);
    mem_free(l->receive_at);
    mem_free(l->xfer);
}

status *loadpipe_run(struct comm *c, struct store *s, const struct metadata *m, struct load_want *want, uint64_t count,
                     struct load_totals *out)
{
    struct load l = { .c = c, .m = m };
    for (uint64_t i = 0; i < count; i++)
        want[i].rank = c->rank;
    TRY(gather_wants(&l, want, count));
    status *st = load_plan_make(m, l.want, l.wants, c->size, &l.plan);
    if (!st)
        st = allocate(&l);
    if (!st)
        st = origins_open(s, m, &l.from);
    st = comm_agree(c, st);
    if (!st) {
        st = run_rounds(&l);
        st = st ? status_first(st, l.st) : comm_agree(c, l.st);
    }
    if (!st)
        *out = l.plan.totals;
    free_load(&l);
    return st;
}
