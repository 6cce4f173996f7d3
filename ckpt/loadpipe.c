/* loadpipe: gather the wants at rank 0, plan there (loadplan.c), send every rank its part (loadpart.c), and carry it
 * out (loadmove.c); here also what it is to read from files: ranges of them, and a checksum for every block. */
#include "ckpt/loadpipe.h"

#include "ckpt/loadmove.h"
#include "ckpt/refs.h"
#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <stdio.h>
#include <string.h>

/* ---- the plan */

/* Rank 0: all ranks' wants one behind another; first[ranks + 1]. */
static status *join_wants(const struct nodes_message *m, int ranks, struct load_want **out, uint64_t **first)
{
    uint64_t *f = mem_calloc((size_t)ranks + 1, sizeof *f);
    if (!f)
        return ERR(NO_MEMORY, "%d ranks", ranks);
    for (int r = 0; r < ranks; r++)
        f[r + 1] = f[r] + m[r].bytes / sizeof **out;
    struct load_want *all = mem_array(NULL, f[ranks] + 1, sizeof *all);
    for (int r = 0; all && r < ranks; r++)
        if (m[r].bytes)
            memcpy(all + f[r], m[r].data, m[r].bytes); /* the pointers in it serve the rank they came from */
    *first = f;
    *out = all;
    return all ? NULL : ERR(NO_MEMORY, "%llu wanted pieces", (unsigned long long)f[ranks]);
}

/* Rank 0: everybody's part. */
static status *plan_parts(const struct metadata *m, const struct nodes_message *wants, int ranks,
                          const struct load_reading *how, struct nodes_message **out)
{
    struct load_want *all = NULL;
    uint64_t *first = NULL;
    struct load_plan plan = { 0 };
    status *st = join_wants(wants, ranks, &all, &first);
    if (!st)
        st = load_plan_make_from(m, all, first[ranks], ranks, how, &plan);
    if (!st)
        st = load_parts_pack(&plan, all, first, ranks, out);
    load_plan_free(&plan);
    mem_free(all);
    mem_free(first);
    return st;
}

/* This rank's part. mine: as for loadpipe_from. Collective; the error is agreed. */
static status *plan_load(const struct nodes *n, const struct metadata *m, const struct load_reading *how,
                         const struct load_want *want, uint64_t count, status *mine, struct load_part *out)
{
    struct nodes_message *wants = NULL, *parts = NULL;
    void *buf = NULL;
    size_t bytes = 0;
    int ranks = n->all->size;
    status *st = comm_agree(n->all, mine);
    if (!st)
        st = nodes_gather(n, want, count * sizeof *want, &wants, &buf, &bytes);
    if (!st)
        st = comm_agree(n->all, n->all->rank == 0 ? plan_parts(m, wants, ranks, how, &parts) : NULL);
    mem_free(buf);
    mem_free(wants);
    buf = NULL;
    if (!st)
        st = nodes_scatter(n, parts, &buf, &bytes);
    load_parts_free(parts, ranks);
    if (!st)
        st = comm_agree(n->all, load_part_unpack(buf, bytes, out));
    mem_free(buf);
    return st;
}

/* ---- from files */

struct files {
    const struct metadata *m;
    struct origins from; /* where they lie */
    struct report_sum *cost;
    bool streams; /* runs that lie together are read by one request */
};

static status *damaged(const struct metadata *m, const struct part_block *b, const char *words)
{
    const struct meta_piece *at = &m->piece[b->piece];
    const struct meta_tensor *t = &m->tensor[b->tensor];
    char owner[REFS_WORDS];
    refs_words(m, &m->file[at->file], owner);
    return ERR(CORRUPT, "step %llu: %sfile %s: tensor %s/%s: block at offset %llu: %s", (unsigned long long)m->step,
               owner, m->file[at->file].name, t->part, t->name, (unsigned long long)block_offset(m, b), words);
}

static status *check_block(const struct metadata *m, const struct part_block *b, const unsigned char *payload)
{
    const struct meta_piece *p = &m->piece[b->piece];
    uint32_t crc = crc32c(0, payload, block_bytes(p, b->block)), stored = m->crc[p->first_crc + b->block];
    char words[80];
    if (crc == stored)
        return NULL;
    snprintf(words, sizeof words, "crc32c is %08x, the metadata says %08x", crc, stored);
    return damaged(m, b, words);
}

/* A request that goes on from run to run. */
struct going {
    struct store_stream *stream;
    uint64_t end;
};

static void stop_going(void *keep)
{
    struct going *g = keep;
    store_stream_close(g->stream);
    mem_free(g);
}

/* Start one at the run that is to be read, for all that the reader reads from there. */
static status *start_going(const struct files *x, const struct load_run *r, const char *key)
{
    const struct meta_file *f = &x->m->file[x->m->piece[r->block->piece].file];
    struct going *g = *r->keep ? *r->keep : mem_calloc(1, sizeof *g);
    if (!g)
        return ERR(NO_MEMORY, "%s: a request", key);
    *r->keep = g;
    store_stream_close(g->stream);
    g->stream = NULL;
    g->end = r->offset + r->ahead;
    return store_stream_open(origins_store(&x->from, f), key, r->offset, r->ahead, &g->stream);
}

/* The run's bytes. Runs that lie together come in their order. */
static status *get_run(const struct files *x, const struct load_run *r, const char *key, unsigned char *to)
{
    struct going *g = *r->keep;
    char between[MOVE_GAP_BYTES];
    if (!x->streams)
        return store_get_direct(origins_store(&x->from, &x->m->file[x->m->piece[r->block->piece].file]), key, r->offset,
                                to, r->bytes);
    bool goes_on = g && g->stream && g->end == r->offset + r->ahead && store_stream_at(g->stream) <= r->offset;
    if (!goes_on)
        TRY(start_going(x, r, key));
    g = *r->keep;
    status *st = store_stream_read(g->stream, between, r->offset - store_stream_at(g->stream));
    if (!st)
        st = store_stream_read(g->stream, to, r->bytes);
    if (st) {
        store_stream_close(g->stream);
        g->stream = NULL;
    }
    return st;
}

static status *read_run(const void *arg, const struct load_run *r, unsigned char *to)
{
    const struct files *x = arg;
    const struct metadata *m = x->m;
    char key[STORE_KEY_BYTES];
    const struct meta_file *f = &m->file[m->piece[r->block->piece].file];
    TRY(origins_key(m, f, key));
    uint64_t begin = clock_ns();
    status *st = get_run(x, r, key, to);
    if (status_code(st) == ST_CORRUPT || status_code(st) == ST_NOT_FOUND) {
        status *named = damaged(m, r->block, status_message(st));
        status_free(st);
        return named;
    }
    report_note(x->cost, REPORT_READ, begin, 0, r->bytes);
    begin = clock_ns();
    for (uint32_t i = 0; !st && i < r->blocks; i++)
        st = check_block(m, &r->block[i], to + (block_offset(m, &r->block[i]) - r->offset));
    report_note(x->cost, REPORT_CHECKSUM, begin, 0, r->bytes);
    return st;
}

/* ---- all of it */

status *loadpipe_from(const struct nodes *n, const struct metadata *m, const struct load_source *from,
                      const int32_t *reader, struct load_want *want, uint64_t count, status *mine,
                      struct load_totals *out)
{
    struct load_part part = { 0 };
    /* a source with dear requests wants them long */
    const struct load_reading how = { .reader = reader,
                                      .run_bytes = from->ahead_bytes,
                                      .node_of = from->ahead_bytes ? n->node_of : NULL };
    for (uint64_t i = 0; i < count; i++)
        want[i].rank = n->all->rank;
    TRY(plan_load(n, m, &how, want, count, mine, &part));
    status *st = load_move(n, m, want, &part, from);
    *out = part.totals;
    load_part_free(&part);
    return st;
}

status *loadpipe_run(const struct nodes *n, struct store *s, const struct metadata *m, struct load_want *want,
                     uint64_t count, struct load_totals *out, struct report_sum *cost)
{
    int streams = s->ops->streams;
    struct files files = { .m = m, .cost = cost, .streams = s->ops->request_bytes };
    const struct load_source from = { .arg = &files,
                                      .read = read_run,
                                      .readers = nodes_share(n, streams, MOVE_READERS),
                                      .request_bytes = streams ? META_BLOCK_BYTES : 0,
                                      .ahead_bytes = s->ops->request_bytes,
                                      .drop = stop_going,
                                      .align = STORE_DIRECT_BYTES,
                                      .cost = cost };
    status *st = loadpipe_from(n, m, &from, NULL, want, count, origins_open(s, m, &files.from), out);
    origins_close(&files.from);
    return st;
}
