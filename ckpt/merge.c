/* merge: see merge.h. Read merge_prepare (who gives what to whom, and where it lands), then merge_poll. */
#include "ckpt/merge.h"

#include "ckpt/reshard.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdlib.h>
#include <string.h>

enum { BOX_ALIGN = 4096, TAG = 0 };

typedef unsigned long long ull;

/* A run that this rank gives. */
struct give {
    struct plan_source s;
    size_t outbox; /* its first byte there */
    struct share_source from;
    int ndim;
};

/* A part of a chunk of a merged piece: a message, or bytes of the outbox. */
struct part {
    int32_t rank;
    uint64_t at, bytes; /* in the chunk */
    uint64_t outbox;    /* of this rank's own */
};

/* A box that this rank gives to; gather only. */
struct group {
    uint64_t first, count; /* of source */
    uint64_t bytes;
    uint64_t gathered; /* where it lies; UINT64_MAX: in the scratch, another rank writes it */
    uint32_t piece;    /* of the share, if this rank writes it */
};

struct handed {
    uint64_t chunk;
    void *block;
    struct comm_req req;
};

struct merge {
    struct comm *c;
    struct device *dev;
    struct stream *stream;
    struct pipeline *pipe;
    bool gather;
    struct thread thread; /* not for gather */
    /* of the plan */
    struct share *share;
    const struct plan_source *source; /* the plan's, that concern this rank */
    uint64_t sources;
    struct plan_source *own_source; /* where the plan has more */
    struct give *give;              /* [gives] as in the plan */
    uint32_t *by_local;             /* [gives] as in the state */
    uint64_t gives;
    struct comm_xfer *send; /* [sends] */
    uint64_t sends, wire_bytes;
    struct part *part;    /* of all chunks from share->own_chunks on */
    uint64_t *first_part; /* [merged chunks + 1] */
    uint64_t merged_chunks;
    struct comm_xfer *xfer; /* room for the messages of any chunk, or group */
    struct group *group;    /* [groups] */
    uint64_t groups;
    uint64_t *seen; /* [ranks] scratch of merge_gather */
    unsigned char *memory;
    size_t memory_bytes;
    unsigned char *scratch; /* in memory: for messages nobody wants any more (1 MiB), or a box of another writer */
    /* of the save; the training thread's */
    bool armed, posted, sent;
    uint64_t next;         /* no receive was posted for chunks from here on */
    struct handed *flying; /* [merged chunks] */
    uint64_t flights;
    struct comm_req sending;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        uint64_t copied, wanted; /* of by_local */
        struct report_clock copies;
        bool busy, stopped, quit;
        struct handed *handed; /* [merged chunks] */
        uint64_t put, got;
    } synced;
};

/* ---- copying out */

static status *copy_run(struct merge *m, const struct give *g, unsigned char *out)
{
    const struct share_source *f = &g->from;
    uint64_t lo = g->s.local_offset, hi = lo + g->s.elems;
    if (m->dev->host) {
        piece_gather(g->ndim, &f->piece, g->s.elem_bytes, f->base, f->strided ? f->stride : NULL, lo, hi, out);
        return NULL;
    }
    if (f->strided)
        return ERR(UNSUPPORTED, "strided memory on device %s", m->dev->ops->name);
    const unsigned char *base = (const unsigned char *)f->base + lo * g->s.elem_bytes;
    TRY(m->dev->ops->copy(m->dev, out, base, g->s.elems * g->s.elem_bytes, m->stream));
    return m->dev->ops->stream_sync(m->dev, m->stream);
}

static status *copy_main(void *arg)
{
    struct merge *m = arg;
    pthread_mutex_lock(&m->synced.lock);
    while (!m->synced.quit) {
        if (m->synced.stopped || m->synced.copied == m->synced.wanted) {
            pthread_cond_wait(&m->synced.changed, &m->synced.lock);
            continue;
        }
        const struct give *g = &m->give[m->by_local[m->synced.copied]];
        m->synced.busy = true;
        pthread_mutex_unlock(&m->synced.lock);
        uint64_t begin = clock_ns();
        status *st = copy_run(m, g, m->memory + g->outbox);
        uint64_t end = clock_ns();
        if (st)
            pipeline_fail(m->pipe, st);
        pthread_mutex_lock(&m->synced.lock);
        report_add(&m->synced.copies, begin, end, 0, g->s.elems * g->s.elem_bytes);
        m->synced.busy = false;
        m->synced.copied++;
        pthread_cond_broadcast(&m->synced.changed);
    }
    pthread_mutex_unlock(&m->synced.lock);
    return NULL;
}

static void set_sources(struct merge *m, const tessera_state *from)
{
    for (uint64_t i = 0; i < m->gives; i++) {
        struct give *g = &m->give[i];
        const struct state_piece *p = &from->piece[g->s.local];
        g->ndim = p->shape.ndim;
        state_source(p, g->s.local_offset, g->s.elems, &g->from);
    }
}

void merge_start(struct merge *m, const tessera_state *from)
{
    if (m->gather)
        return;
    set_sources(m, from);
    pthread_mutex_lock(&m->synced.lock);
    m->synced.copied = 0;
    m->synced.wanted = m->gives;
    m->synced.copies = (struct report_clock){ 0 };
    m->synced.stopped = false;
    m->synced.put = m->synced.got = 0;
    pthread_cond_broadcast(&m->synced.changed);
    pthread_mutex_unlock(&m->synced.lock);
}

uint64_t merge_fence(struct merge *m, uint32_t local)
{
    uint64_t start = 0, count = 0;
    while (count < m->gives && m->give[m->by_local[count]].s.local <= local)
        count++;
    pthread_mutex_lock(&m->synced.lock);
    while (m->synced.copied < count && m->synced.wanted && !m->synced.stopped) {
        start = start ? start : clock_ns();
        pthread_cond_wait(&m->synced.changed, &m->synced.lock);
    }
    pthread_mutex_unlock(&m->synced.lock);
    return start ? clock_ns() - start : 0;
}

/* ---- chunks */

static const struct part *parts_of(const struct merge *m, uint64_t chunk, uint64_t *count)
{
    uint64_t i = chunk - m->share->own_chunks;
    *count = m->first_part[i + 1] - m->first_part[i];
    return m->part + m->first_part[i];
}

/* Zeros between the pieces, and what this rank has itself. */
static void fill_own(const struct merge *m, uint64_t chunk, unsigned char *block)
{
    const struct share *s = m->share;
    const struct share_chunk *c = &s->chunk[chunk];
    uint64_t end = 0, n;
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++) {
        memset(block + end, 0, s->segment[i].at - end);
        end = s->segment[i].at + s->segment[i].hi - s->segment[i].lo;
    }
    memset(block + end, 0, c->bytes - end);
    const struct part *p = parts_of(m, chunk, &n);
    for (uint64_t i = 0; i < n; i++)
        if (p[i].rank == m->c->rank)
            memcpy(block + p[i].at, m->memory + p[i].outbox, p[i].bytes);
}

bool merge_hand(void *arg, uint64_t chunk, void *block)
{
    struct merge *m = arg;
    pthread_mutex_lock(&m->synced.lock);
    while (m->synced.copied < m->synced.wanted && !m->synced.stopped)
        pthread_cond_wait(&m->synced.changed, &m->synced.lock);
    bool go_on = !m->synced.stopped;
    pthread_mutex_unlock(&m->synced.lock);
    if (go_on)
        fill_own(m, chunk, block);
    pthread_mutex_lock(&m->synced.lock);
    go_on = !m->synced.stopped;
    if (go_on)
        m->synced.handed[m->synced.put++] = (struct handed){ .chunk = chunk, .block = block };
    pthread_mutex_unlock(&m->synced.lock);
    return go_on;
}

static bool take_handed(struct merge *m, struct handed *out)
{
    pthread_mutex_lock(&m->synced.lock);
    bool got = m->synced.got < m->synced.put;
    if (got)
        *out = m->synced.handed[m->synced.got++];
    pthread_mutex_unlock(&m->synced.lock);
    return got;
}

/* ---- messages */

void merge_arm(struct merge *m)
{
    m->armed = !m->gather;
    m->posted = m->sent = false;
    m->next = m->share->own_chunks;
}

static status *post_sends(struct merge *m)
{
    m->posted = true;
    m->sent = !m->sends;
    return m->sends ? comm_iexchange(m->c, m->send, m->sends, NULL, &m->sending) : NULL;
}

/* Post the receives of a chunk that was handed. */
static status *receive(struct merge *m, const struct handed *h)
{
    uint64_t n, messages = 0;
    const struct part *p = parts_of(m, h->chunk, &n);
    m->next = h->chunk + 1;
    for (uint64_t i = 0; i < n; i++)
        if (p[i].rank != m->c->rank)
            m->xfer[messages++] = (struct comm_xfer){
                .peer = p[i].rank, .tag = TAG, .buf = (unsigned char *)h->block + p[i].at, .bytes = p[i].bytes
            };
    struct handed *f = &m->flying[m->flights++];
    *f = *h;
    return messages ? comm_iexchange(m->c, m->xfer, messages, NULL, &f->req) : NULL;
}

/* Pass on what has come. */
static status *land(struct merge *m)
{
    uint64_t left = 0;
    status *st = NULL;
    for (uint64_t i = 0; i < m->flights; i++) {
        struct handed *f = &m->flying[i];
        bool done = false;
        if (!st)
            st = comm_test(&f->req, &done);
        if (done && !st)
            pipeline_filled(m->pipe, f->chunk, f->block);
        else
            m->flying[left++] = *f;
    }
    m->flights = left;
    return st;
}

static bool all_copied(struct merge *m)
{
    pthread_mutex_lock(&m->synced.lock);
    bool yes = m->synced.copied == m->gives && m->synced.wanted == m->gives;
    pthread_mutex_unlock(&m->synced.lock);
    return yes;
}

status *merge_poll(struct merge *m)
{
    struct handed h;
    if (!m->armed)
        return NULL;
    if (!m->posted && all_copied(m))
        TRY(post_sends(m));
    while (take_handed(m, &h))
        TRY(receive(m, &h));
    TRY(land(m));
    return m->posted && !m->sent ? comm_test(&m->sending, &m->sent) : NULL;
}

/* ---- the end */

/* Afterwards nobody writes to the outbox, and no more chunks are taken over. */
static void stop_copying(struct merge *m)
{
    pthread_mutex_lock(&m->synced.lock);
    m->synced.stopped = true;
    m->synced.wanted = 0;
    pthread_cond_broadcast(&m->synced.changed);
    while (m->synced.busy)
        pthread_cond_wait(&m->synced.changed, &m->synced.lock);
    pthread_mutex_unlock(&m->synced.lock);
}

void merge_end(struct merge *m)
{
    stop_copying(m);
    for (struct handed h; take_handed(m, &h);)
        pipeline_filled(m->pipe, h.chunk, h.block);
    while (m->flights) {
        m->flights--;
        pipeline_filled(m->pipe, m->flying[m->flights].chunk, m->flying[m->flights].block);
    }
    m->armed = m->posted = m->sent = false;
}

/* What was never posted, into the scratch, a message after another: all ranks' sends are under way. */
static status *receive_rest(struct merge *m)
{
    for (uint64_t chunk = m->next; chunk < m->share->chunks; chunk++) {
        uint64_t n;
        const struct part *p = parts_of(m, chunk, &n);
        for (uint64_t i = 0; i < n; i++) {
            struct comm_xfer x = { .peer = p[i].rank, .tag = TAG, .buf = m->scratch, .bytes = p[i].bytes };
            if (p[i].rank != m->c->rank)
                TRY(comm_exchange(m->c, &x, 1, NULL));
        }
    }
    return NULL;
}

static status *complete(struct merge *m)
{
    if (!m->posted)
        TRY(post_sends(m));
    for (uint64_t i = 0; i < m->flights; i++)
        TRY(comm_wait(&m->flying[i].req));
    TRY(receive_rest(m));
    return comm_wait(&m->sending);
}

status *merge_drain(struct merge *m, struct comm *x)
{
    uint64_t any = m->posted || (m->armed && m->next > m->share->own_chunks);
    stop_copying(m); /* what is sent from here on is not looked at, but it must not change meanwhile */
    status *st = comm_allreduce(x, &any, 1, COMM_U64, COMM_MAX, NULL);
    if (!st && any)
        st = complete(m);
    merge_end(m);
    return st;
}

/* ---- gather */

/* This rank's runs of a box, to their places in it; then all others'. */
static status *gather_box(struct merge *m, const struct group *g, struct give **give, status **mine)
{
    unsigned char *box = g->gathered == UINT64_MAX ? m->scratch : m->memory + g->gathered;
    const struct plan_source *s = m->source + g->first;
    uint64_t n = 0, mark = s->order + 1;
    for (uint64_t i = 0; i < g->count; i++) {
        unsigned char *at = box + s[i].at * s[i].elem_bytes;
        if (s[i].rank == m->c->rank)
            *mine = status_first(*mine, copy_run(m, (*give)++, at));
        else
            m->xfer[n++] =
                (struct comm_xfer){ .peer = s[i].rank, .tag = TAG, .buf = at, .bytes = s[i].elems * s[i].elem_bytes };
        if (s[i].rank == m->c->rank || m->seen[s[i].rank] == mark)
            continue;
        m->seen[s[i].rank] = mark;
        for (uint64_t k = 0; k < g->count; k++)
            if (s[k].rank == m->c->rank)
                m->xfer[n++] = (struct comm_xfer){ .peer = s[i].rank,
                                                   .tag = TAG,
                                                   .send = true,
                                                   .buf = box + s[k].at * s[k].elem_bytes,
                                                   .bytes = s[k].elems * s[k].elem_bytes };
    }
    return comm_exchange(m->c, m->xfer, n, NULL);
}

status *merge_gather(struct merge *m, const tessera_state *from, status **mine)
{
    struct give *give = m->give;
    set_sources(m, from);
    memset(m->seen, 0, (size_t)m->c->size * sizeof *m->seen);
    for (uint64_t i = 0; i < m->groups; i++) {
        const struct group *g = &m->group[i];
        TRY(gather_box(m, g, &give, mine));
        if (g->gathered == UINT64_MAX)
            continue;
        struct share_source *to = &m->share->source[g->piece];
        const unsigned char *box = m->memory + g->gathered;
        *to = (struct share_source){ .base = box, .begin = (uintptr_t)box, .end = (uintptr_t)box + g->bytes };
        to->piece.end = g->bytes / m->source[g->first].elem_bytes;
    }
    return NULL;
}

/* ---- books */

static int by_state(const void *va, const void *vb, void *vm)
{
    const struct merge *m = vm;
    const struct plan_source *a = &m->give[*(const uint32_t *)va].s, *b = &m->give[*(const uint32_t *)vb].s;
    if (a->local != b->local)
        return a->local < b->local ? -1 : 1;
    return (a->local_offset > b->local_offset) - (a->local_offset < b->local_offset);
}

static bool concerns(const struct merge *m, const struct plan_source *s, uint64_t from, uint64_t end)
{
    for (uint64_t i = from; m->gather && i < end; i++)
        if (s[i].rank == m->c->rank)
            return true;
    return false;
}

/* The whole plan has the sources of all ranks. */
static status *pick_sources(struct merge *m, const struct plan *p)
{
    m->own_source = mem_array(NULL, p->source_count, sizeof *m->own_source);
    if (!m->own_source)
        return ERR(NO_MEMORY, "sources of %llu runs", (ull)p->source_count);
    for (uint64_t from = 0, end; from < p->source_count; from = end) {
        for (end = from + 1; end < p->source_count && p->source[end].order == p->source[from].order;)
            end++;
        bool all = concerns(m, p->source, from, end);
        for (uint64_t i = from; i < end; i++)
            if (all || (!m->gather && (p->source[i].rank == m->c->rank || p->source[i].writer == m->c->rank)))
                m->own_source[m->sources++] = p->source[i];
    }
    m->source = m->own_source;
    return NULL;
}

static status *list_gives(struct merge *m)
{
    for (uint64_t i = 0; i < m->sources; i++)
        m->gives += m->source[i].rank == m->c->rank;
    m->give = mem_calloc(m->gives, sizeof *m->give);
    m->by_local = mem_array(NULL, m->gives, sizeof *m->by_local);
    if (!m->give || !m->by_local)
        return ERR(NO_MEMORY, "books of %llu runs", (ull)m->gives);
    for (uint64_t i = 0, n = 0; i < m->sources; i++) {
        if (m->source[i].rank != m->c->rank)
            continue;
        m->by_local[n] = (uint32_t)n;
        m->give[n++].s = m->source[i];
    }
    if (m->gives)
        qsort_r(m->by_local, m->gives, sizeof *m->by_local, by_state, m);
    for (uint64_t i = 0; !m->gather && i < m->gives; i++) {
        struct give *g = &m->give[m->by_local[i]];
        g->outbox = m->memory_bytes;
        m->memory_bytes += g->s.elems * g->s.elem_bytes;
    }
    return NULL;
}

/* From byte `at` of a box to the end of its block, but not past `end`. */
static uint64_t message_bytes(uint64_t at, uint64_t end)
{
    uint64_t n = META_BLOCK_BYTES - at % META_BLOCK_BYTES;
    return n < end - at ? n : end - at;
}

static void list_sends(struct merge *m)
{
    m->sends = m->wire_bytes = 0;
    for (uint64_t i = 0; i < m->gives; i++) {
        const struct give *g = &m->give[i];
        uint64_t begin = g->s.at * g->s.elem_bytes, end = begin + g->s.elems * g->s.elem_bytes;
        for (uint64_t at = begin, n; g->s.writer != m->c->rank && at < end; at += n) {
            n = message_bytes(at, end);
            m->wire_bytes += n;
            if (m->send)
                m->send[m->sends] = (struct comm_xfer){ .peer = g->s.writer,
                                                        .tag = TAG,
                                                        .send = true,
                                                        .buf = m->memory + g->outbox + (at - begin),
                                                        .bytes = n };
            m->sends++;
        }
    }
}

/* The next source of a piece that this rank writes, from *at on. */
static bool next_piece(const struct merge *m, uint64_t *at, uint64_t *end)
{
    for (*at = *end; *at < m->sources && m->source[*at].writer != m->c->rank;)
        ++*at;
    for (*end = *at; *end < m->sources && m->source[*end].order == m->source[*at].order;)
        ++*end;
    return *at < *end;
}

/* The parts of bytes [seg->lo, seg->hi) of a piece with sources [from, end). *give: this rank's next run. */
static void add_parts(const struct merge *m, const struct share_segment *seg, uint64_t from, uint64_t end,
                      const uint64_t *outbox, struct part *part, uint64_t *parts)
{
    for (uint64_t i = from; i < end; i++) {
        const struct plan_source *s = &m->source[i];
        uint64_t begin = s->at * s->elem_bytes, stop = begin + s->elems * s->elem_bytes;
        uint64_t lo = begin > seg->lo ? begin : seg->lo, hi = stop < seg->hi ? stop : seg->hi;
        for (uint64_t at = lo, n; at < hi; at += n) {
            n = message_bytes(at, hi);
            if (part)
                part[*parts] = (struct part){
                    .rank = s->rank, .at = seg->at + at - seg->lo, .bytes = n, .outbox = outbox[i] + at - begin
                };
            ++*parts;
        }
    }
}

/* Count the parts, then list them: m->part NULL, then room for them. first: [pieces + 1] of source, by merged piece. */
static void list_parts(struct merge *m, const uint64_t *first, const uint64_t *last, const uint64_t *outbox)
{
    const struct share *s = m->share;
    uint64_t n = 0;
    for (uint64_t c = 0; c < m->merged_chunks; c++) {
        const struct share_chunk *chunk = &s->chunk[s->own_chunks + c];
        m->first_part[c] = n;
        for (uint64_t i = chunk->first_segment; i < chunk->first_segment + chunk->segments; i++) {
            uint64_t piece = s->segment[i].piece - s->own_pieces;
            add_parts(m, &s->segment[i], first[piece], last[piece], outbox, m->part, &n);
        }
    }
    m->first_part[m->merged_chunks] = n;
}

/* What of merge_prepare is only needed there. */
struct lists {
    uint64_t *first, *last; /* [merged pieces of the share] their sources */
    uint64_t *outbox;       /* [sources] of this rank's: where they lie */
};

static void free_lists(struct lists *l)
{
    mem_free(l->first);
    mem_free(l->last);
    mem_free(l->outbox);
}

static status *make_lists(const struct merge *m, struct lists *l)
{
    const struct share *s = m->share;
    uint64_t pieces = s->pieces - s->own_pieces, n = 0, give = 0;
    l->first = mem_array(NULL, pieces, sizeof *l->first);
    l->last = mem_array(NULL, pieces, sizeof *l->last);
    l->outbox = mem_array(NULL, m->sources, sizeof *l->outbox);
    if (!l->first || !l->last || !l->outbox)
        return ERR(NO_MEMORY, "books of %llu merged pieces", (ull)pieces);
    for (uint64_t at, end = 0; next_piece(m, &at, &end); n++) {
        uint64_t bytes = 0;
        for (uint64_t i = at; i < end; i++)
            bytes += m->source[i].elems * m->source[i].elem_bytes;
        if (n == pieces || bytes != s->piece[s->own_pieces + n].bytes)
            return ERR(INTERNAL, "the sources of merged piece %llu are not its own", (ull)n);
        l->first[n] = at;
        l->last[n] = end;
    }
    if (n != pieces)
        return ERR(INTERNAL, "%llu merged pieces, sources of %llu", (ull)pieces, (ull)n);
    for (uint64_t i = 0; i < m->sources; i++)
        l->outbox[i] = m->source[i].rank == m->c->rank ? m->give[give++].outbox : 0;
    return NULL;
}

static uint64_t most_messages(const struct merge *m)
{
    uint64_t most = 1;
    for (uint64_t c = 0; c < m->merged_chunks; c++) {
        uint64_t n = m->first_part[c + 1] - m->first_part[c];
        most = n > most ? n : most;
    }
    return most;
}

static status *take_memory(struct merge *m, size_t scratch)
{
    void *memory;
    if (!m->memory_bytes && !scratch)
        return NULL;
    m->memory_bytes = (m->memory_bytes + BOX_ALIGN - 1) / BOX_ALIGN * BOX_ALIGN + scratch;
    status *st = m->dev->ops->alloc_pinned(m->dev, m->memory_bytes, &memory);
    if (st) {
        m->memory_bytes = 0;
        return st;
    }
    m->memory = memory;
    m->scratch = m->memory + m->memory_bytes - scratch;
    return NULL;
}

static status *prepare_merge(struct merge *m, const struct lists *l)
{
    struct share *s = m->share;
    m->merged_chunks = s->chunks - s->own_chunks;
    m->first_part = mem_calloc(m->merged_chunks + 1, sizeof *m->first_part);
    m->flying = mem_calloc(m->merged_chunks, sizeof *m->flying);
    m->synced.handed = mem_calloc(m->merged_chunks, sizeof *m->synced.handed);
    if (!m->first_part || !m->flying || !m->synced.handed)
        return ERR(NO_MEMORY, "books of %llu chunks", (ull)m->merged_chunks);
    list_parts(m, l->first, l->last, l->outbox);
    list_sends(m);
    TRY(take_memory(m, m->merged_chunks ? META_BLOCK_BYTES : 0));
    m->part = mem_array(NULL, m->first_part[m->merged_chunks], sizeof *m->part);
    m->send = mem_array(NULL, m->sends, sizeof *m->send);
    m->xfer = mem_array(NULL, most_messages(m), sizeof *m->xfer);
    if (!m->part || !m->send || !m->xfer)
        return ERR(NO_MEMORY, "books of %llu messages", (ull)m->sends);
    list_parts(m, l->first, l->last, l->outbox);
    list_sends(m);
    return NULL;
}

/* One group a box, and the most messages of one. */
static uint64_t list_groups(struct merge *m, size_t *scratch)
{
    uint64_t written = m->share->own_pieces, most = 1;
    for (uint64_t from = 0, end; from < m->sources; from = end) {
        const struct plan_source *s = &m->source[from];
        uint64_t own = 0, bytes = 0;
        for (end = from; end < m->sources && m->source[end].order == s->order; end++) {
            own += m->source[end].rank == m->c->rank;
            bytes += m->source[end].elems * s->elem_bytes;
        }
        struct group g = { .first = from, .count = end - from, .bytes = bytes, .gathered = UINT64_MAX };
        if (s->writer == m->c->rank) {
            g.gathered = m->memory_bytes;
            g.piece = (uint32_t)written++;
            m->memory_bytes += (bytes + BOX_ALIGN - 1) / BOX_ALIGN * BOX_ALIGN;
        } else {
            *scratch = bytes > *scratch ? bytes : *scratch;
        }
        m->group[m->groups++] = g;
        uint64_t messages = (g.count - own) * (1 + own);
        most = messages > most ? messages : most;
    }
    return most;
}

/* What merge_gather sends: each run to every other rank that gives to its box. */
static uint64_t gather_wire_bytes(struct merge *m)
{
    uint64_t sum = 0;
    memset(m->seen, 0, (size_t)m->c->size * sizeof *m->seen);
    for (uint64_t i = 0; i < m->groups; i++) {
        const struct plan_source *s = m->source + m->group[i].first;
        uint64_t others = 0, own = 0;
        for (uint64_t k = 0; k < m->group[i].count; k++) {
            bool mine = s[k].rank == m->c->rank;
            own += mine ? s[k].elems * s[k].elem_bytes : 0;
            others += !mine && m->seen[s[k].rank] != s->order + 1;
            m->seen[s[k].rank] = s->order + 1;
        }
        sum += own * others;
    }
    return sum;
}

static status *prepare_gather(struct merge *m)
{
    size_t scratch = 0;
    m->share->own_chunks = m->share->chunks; /* merged pieces lie in memory by then */
    m->group = mem_calloc(m->sources, sizeof *m->group);
    m->seen = mem_calloc((size_t)m->c->size, sizeof *m->seen);
    if (!m->group || !m->seen)
        return ERR(NO_MEMORY, "books of %llu runs", (ull)m->sources);
    m->xfer = mem_array(NULL, list_groups(m, &scratch), sizeof *m->xfer);
    if (!m->xfer)
        return ERR(NO_MEMORY, "messages of a box");
    m->wire_bytes = gather_wire_bytes(m);
    return take_memory(m, scratch);
}

static status *prepare(struct merge *m, const struct plan *p)
{
    struct lists l = { 0 };
    TRY(pick_sources(m, p));
    TRY(list_gives(m));
    status *st = make_lists(m, &l);
    if (!st)
        st = m->gather ? prepare_gather(m) : prepare_merge(m, &l);
    free_lists(&l);
    return st;
}

void merge_forget(struct merge *m)
{
    if (m->memory)
        m->dev->ops->free_pinned(m->dev, m->memory, m->memory_bytes);
    mem_free(m->own_source);
    mem_free(m->give);
    mem_free(m->by_local);
    mem_free(m->send);
    mem_free(m->part);
    mem_free(m->first_part);
    mem_free(m->xfer);
    mem_free(m->group);
    mem_free(m->seen);
    mem_free(m->flying);
    mem_free(m->synced.handed);
    m->share = NULL;
    m->source = m->own_source = NULL;
    m->give = NULL;
    m->by_local = NULL;
    m->send = NULL;
    m->part = NULL;
    m->first_part = NULL;
    m->xfer = NULL;
    m->group = NULL;
    m->seen = NULL;
    m->flying = m->synced.handed = NULL;
    m->memory = m->scratch = NULL;
    m->memory_bytes = 0;
    m->sources = m->gives = m->sends = m->wire_bytes = m->merged_chunks = m->groups = 0;
}

status *merge_prepare(struct merge *m, const struct plan *p, struct share *s)
{
    merge_forget(m);
    m->share = s;
    status *st = prepare(m, p);
    if (st)
        merge_forget(m);
    return st;
}

/* ---- open and close */

static status *start(struct merge *m)
{
    TRY(m->dev->ops->stream_open(m->dev, &m->stream));
    return m->gather ? NULL : thread_start(&m->thread, "tsr-merge", copy_main, m);
}

status *merge_open(struct comm *world, struct device *dev, int irregular, struct merge **out)
{
    struct merge *m = mem_calloc(1, sizeof *m);
    status *st = comm_agree(world, m ? NULL : ERR(NO_MEMORY, "merging"));
    if (st) {
        mem_free(m);
        return st;
    }
    m->dev = dev;
    m->gather = irregular == PLAN_GATHER;
    m->synced.stopped = true;
    pthread_mutex_init(&m->synced.lock, NULL);
    pthread_cond_init(&m->synced.changed, NULL);
    st = comm_dup(world, &m->c);
    if (!st)
        st = comm_agree(world, start(m));
    if (st) {
        merge_close(m);
        return st;
    }
    *out = m;
    return NULL;
}

void merge_close(struct merge *m)
{
    if (!m)
        return;
    pthread_mutex_lock(&m->synced.lock);
    m->synced.quit = true;
    pthread_cond_broadcast(&m->synced.changed);
    pthread_mutex_unlock(&m->synced.lock);
    status_free(thread_join(&m->thread));
    merge_forget(m);
    if (m->stream)
        m->dev->ops->stream_close(m->dev, m->stream);
    comm_close(m->c);
    pthread_cond_destroy(&m->synced.changed);
    pthread_mutex_destroy(&m->synced.lock);
    mem_free(m);
}

void merge_bind(struct merge *m, struct pipeline *p)
{
    m->pipe = p;
}

void merge_look(struct merge *m, struct merge_view *out)
{
    *out = (struct merge_view){
        .captured = m->gather || all_copied(m),
        .drained = !m->armed || m->sent,
        .memory_bytes = m->memory_bytes,
        .wire_bytes = m->wire_bytes,
    };
    pthread_mutex_lock(&m->synced.lock);
    out->copies = m->synced.copies;
    pthread_mutex_unlock(&m->synced.lock);
}
