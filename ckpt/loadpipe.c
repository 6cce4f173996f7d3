/* loadpipe: gather the wants, plan (loadplan.c), and carry it out (loadmove.c); here also what it is to read from
 * files: ranges of them, and a checksum for every block. */
#include "ckpt/loadpipe.h"

#include "ckpt/loadmove.h"
#include "ckpt/refs.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <stdio.h>

/* ---- wants */

/* Everybody's wants, by rank, on every rank. */
static status *gather_wants(struct comm *c, struct load_want *mine, uint64_t count, struct load_want **out,
                            uint64_t *wants)
{
    void *all = NULL;
    size_t *counts = NULL, bytes = 0;
    int me = c->rank;
    TRY(comm_gather_bytes(c, mine, count * sizeof *mine, 0, &all, &counts));
    for (int r = 0; me == 0 && r < c->size; r++)
        bytes += counts[r];
    mem_free(counts);
    status *st = comm_bcast_bytes(c, &all, &bytes, 0);
    if (st) {
        mem_free(me == 0 ? all : NULL);
        return st;
    }
    *out = all;
    *wants = bytes / sizeof **out;
    return NULL; /* the pointers that travelled serve the rank they came from */
}

/* ---- from files */

struct files {
    const struct metadata *m;
    struct origins from; /* where they lie */
    struct report_sum *cost;
};

static status *damaged(const struct metadata *m, const struct load_plan *p, const struct load_block *b,
                       const char *words)
{
    const struct meta_piece *at = &m->piece[b->piece];
    const struct meta_tensor *t = &m->tensor[use_group(p, &p->use[b->first_use])->tensor];
    char owner[REFS_WORDS];
    refs_words(m, &m->file[at->file], owner);
    return ERR(CORRUPT, "step %llu: %sfile %s: tensor %s/%s: block at offset %llu: %s", (unsigned long long)m->step,
               owner, m->file[at->file].name, t->part, t->name, (unsigned long long)block_offset(m, b), words);
}

static status *check_block(const struct metadata *m, const struct load_plan *plan, const struct load_block *b,
                           const unsigned char *payload)
{
    const struct meta_piece *p = &m->piece[b->piece];
    uint32_t crc = crc32c(0, payload, block_bytes(p, b->block)), stored = m->crc[p->first_crc + b->block];
    char words[80];
    if (crc == stored)
        return NULL;
    snprintf(words, sizeof words, "crc32c is %08x, the metadata says %08x", crc, stored);
    return damaged(m, plan, b, words);
}

static status *read_run(const void *arg, const struct load_plan *p, const struct load_run *r, unsigned char *to)
{
    const struct files *x = arg;
    const struct metadata *m = x->m;
    char key[STORE_KEY_BYTES];
    const struct meta_file *f = &m->file[m->piece[r->block->piece].file];
    TRY(origins_key(m, f, key));
    uint64_t begin = clock_ns();
    status *st = store_get_direct(origins_store(&x->from, f), key, r->offset, to, r->bytes);
    if (status_code(st) == ST_CORRUPT || status_code(st) == ST_NOT_FOUND) {
        status *named = damaged(m, p, r->block, status_message(st));
        status_free(st);
        return named;
    }
    report_note(x->cost, REPORT_READ, begin, 0, r->bytes);
    begin = clock_ns();
    for (uint32_t i = 0; !st && i < r->blocks; i++)
        st = check_block(m, p, &r->block[i], to + (block_offset(m, &r->block[i]) - r->offset));
    report_note(x->cost, REPORT_CHECKSUM, begin, 0, r->bytes);
    return st;
}

/* ---- all of it */

status *loadpipe_from(struct comm *c, const struct metadata *m, const struct load_source *from, const int32_t *reader,
                      struct load_want *want, uint64_t count, status *mine, struct load_totals *out)
{
    struct load_want *all = NULL;
    struct load_plan plan = { 0 };
    uint64_t wants = 0;
    for (uint64_t i = 0; i < count; i++)
        want[i].rank = c->rank;
    status *st = gather_wants(c, want, count, &all, &wants);
    if (st) {
        status_free(mine);
        return st;
    }
    st = status_first(mine, load_plan_make_from(m, all, wants, c->size, reader, &plan));
    st = load_move(c, m, all, &plan, from, st);
    if (!st)
        *out = plan.totals;
    load_plan_free(&plan);
    mem_free(all);
    return st;
}

status *loadpipe_run(struct comm *c, struct store *s, const struct metadata *m, struct load_want *want, uint64_t count,
                     struct load_totals *out, struct report_sum *cost)
{
    struct files files = { .m = m, .cost = cost };
    const struct load_source from = { .arg = &files, .read = read_run, .align = STORE_DIRECT_BYTES, .cost = cost };
    status *st = loadpipe_from(c, m, &from, NULL, want, count, origins_open(s, m, &files.from), out);
    origins_close(&files.from);
    return st;
}
