/* pipeline: read write_chunk and account (what the last chunk of a file, and the last file, set off). */
#include "ckpt/pipeline.h"

#include "ckpt/commit.h"
#include "ckpt/live.h"
#include "ckpt/stage.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdio.h>
#include <string.h>

/* `writer` is opened under open_lock by whoever has the file's first chunk, and ended by whoever accounts for its last.
 */
struct file {
    struct store_writer *writer;
    uint64_t chunks_left;
    bool finished;
};

struct writer {
    struct pipeline *p;
    int index;
    struct thread thread;
    uint64_t saves, idle_ns; /* which save it last wrote for, and since when it has had nothing to write */
};

struct pipeline {
    struct pipeline_options o;
    struct stage stage;
    struct writer *writer;  /* [o.writers] */
    struct file *file;      /* [files] */
    uint64_t chunks, files; /* of the share that was prepared */
    bool small;             /* it is staged at once */
    struct share
        *share; /* of the save in flight or the last one; set by the training thread while nothing is in flight */
    uint64_t step, saves; /* set as share is; saves: how many were started */
    atomic_bool failed;
    atomic_bool buffered; /* a file of this store took no direct writes: stage everything */
    pthread_mutex_t open_lock;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t over;
        bool drained;
        uint64_t files_left, written_bytes, live_bytes;
        struct report_clock clock[REPORT_STAGES];
        uint64_t drained_ns, retries; /* retries: of the store, before the save */
        status *error;
    } synced;
};

static void fail(void *arg, status *st)
{
    struct pipeline *p = arg;
    pthread_mutex_lock(&p->synced.lock);
    if (p->synced.error)
        status_free(st);
    else
        p->synced.error = st;
    atomic_store(&p->failed, true);
    pthread_mutex_unlock(&p->synced.lock);
}

static void file_key(const struct pipeline *p, const struct share_file *f, char key[STORE_KEY_BYTES])
{
    commit_shard_key(p->step, f->part, p->o.rank, p->o.attempt, key);
}

/* Tell the store what this file's chunks are, so that each can be a part of its own. */
static status *tell_extents(const struct pipeline *p, uint32_t f)
{
    const struct share *s = p->share;
    size_t n = 0;
    struct store_extent *e = mem_array(NULL, s->file[f].chunks, sizeof *e);
    if (!e)
        return ERR(NO_MEMORY, "the chunks of a file");
    for (uint64_t i = 0; i < s->chunks && n < s->file[f].chunks; i++)
        if (s->chunk[i].file == f)
            e[n++] = (struct store_extent){ s->chunk[i].offset, s->chunk[i].bytes };
    status *st = store_writer_extents(p->file[f].writer, e, n);
    mem_free(e);
    return st;
}

static status *open_file(struct pipeline *p, uint32_t f)
{
    status *st = NULL;
    pthread_mutex_lock(&p->open_lock);
    if (!p->file[f].writer) {
        char key[STORE_KEY_BYTES];
        file_key(p, &p->share->file[f], key);
        st = store_writer_open(p->o.store, key, p->share->file[f].image.file_bytes, &p->file[f].writer);
        if (!st && p->o.store->ops->extents)
            st = tell_extents(p, f);
    }
    pthread_mutex_unlock(&p->open_lock);
    return st;
}

static status *timed_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n,
                           struct report_clock *clock)
{
    uint64_t begin = clock_ns();
    status *st = store_write(w, offset, buf, n);
    report_add(clock, begin, clock_ns(), 0, st ? 0 : n);
    return st;
}

static status *write_staged(struct share *s, const struct share_chunk *c, struct store_writer *w,
                            const unsigned char *block, struct report_clock clock[REPORT_STAGES])
{
    uint64_t begin = clock_ns();
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++) {
        const struct share_segment *seg = &s->segment[i];
        share_checksum(s, seg, 0, block + seg->at, seg->hi - seg->lo);
    }
    report_add(&clock[REPORT_CHECKSUM], begin, clock_ns(), 0, c->payload_bytes);
    return timed_write(w, c->offset, block, c->bytes, &clock[REPORT_WRITE]);
}

static void *block_for_rest(void *arg)
{
    struct pipeline *p = arg;
    return stage_try_block(&p->stage);
}

static size_t live_piece_bytes(const struct pipeline_options *o)
{
    enum { LEAST = 256 << 10, MOST = 4 << 20, GRAIN = 64 << 10 };
    size_t n = LIVE_FLIGHT_BYTES / ((size_t)o->writers * (size_t)o->node_ranks) / GRAIN * GRAIN;
    return n < LEAST ? LEAST : n > MOST ? MOST : n;
}

/* From the tensors, as long as nobody wants to overwrite them. */
static status *write_live(struct pipeline *p, int writer, struct live *l)
{
    l->bounce = stage_bounce(&p->stage, writer);
    l->bounce_bytes = BOUNCE_BYTES;
    l->piece_bytes = live_piece_bytes(&p->o);
    l->block = block_for_rest;
    l->arg = p;
    status *st = live_write(l);
    stage_release(&p->stage, writer, st ? 0 : l->c->payload_bytes);
    if (!l->given)
        return st;
    st = live_write_rest(l);
    stage_give(&p->stage, l->given);
    return st;
}

/* Write what a writer has taken; *live: how much of it was not copied. */
static status *write_chunk(struct pipeline *p, int writer, const struct stage_item *it, uint64_t *live,
                           struct report_clock clock[REPORT_STAGES])
{
    struct share *s = p->share;
    const struct share_chunk *c = &s->chunk[it->chunk];
    TRY(open_file(p, c->file));
    struct store_writer *w = p->file[c->file].writer;
    if (it->live && !store_writer_direct(w).offset) {
        atomic_store(&p->buffered, true);
        stage_end_live(&p->stage);
    }
    if (!c->segments)
        return timed_write(w, c->offset, s->file[c->file].image.header, c->bytes, &clock[REPORT_WRITE]);
    if (!it->live)
        return write_staged(s, c, w, it->block, clock);
    struct live l = { .s = s, .c = c, .w = w, .clock = clock };
    status *st = write_live(p, writer, &l);
    *live = l.straight;
    return st;
}

static void end_save(struct pipeline *p)
{
    for (uint64_t f = 0; f < p->files; f++) {
        if (!p->file[f].finished)
            store_writer_abort(p->file[f].writer);
        p->file[f].writer = NULL;
    }
    pthread_mutex_lock(&p->synced.lock);
    p->synced.drained = true;
    p->synced.drained_ns = clock_ns();
    pthread_cond_broadcast(&p->synced.over);
    pthread_mutex_unlock(&p->synced.lock);
}

static void account(struct pipeline *p, uint32_t f)
{
    struct file *file = &p->file[f];
    pthread_mutex_lock(&p->synced.lock);
    bool last_chunk = --file->chunks_left == 0;
    pthread_mutex_unlock(&p->synced.lock);
    if (!last_chunk)
        return;
    struct report_clock fsync = { 0 };
    if (!atomic_load(&p->failed)) {
        uint64_t begin = clock_ns();
        status *st = store_writer_finish(file->writer);
        report_add(&fsync, begin, clock_ns(), 0, p->share->file[f].image.file_bytes);
        file->writer = NULL; /* freed either way */
        file->finished = true;
        if (st)
            fail(p, st);
    }
    pthread_mutex_lock(&p->synced.lock);
    report_merge(&p->synced.clock[REPORT_FSYNC], &fsync);
    bool last_file = --p->synced.files_left == 0;
    pthread_mutex_unlock(&p->synced.lock);
    if (last_file)
        end_save(p);
}

/* One chunk, from its taking to its account; waited_ns: how long the writer had waited for it. */
static void handle(struct writer *w, const struct stage_item *it, uint64_t waited_ns)
{
    struct pipeline *p = w->p;
    const struct share_chunk *c = &p->share->chunk[it->chunk];
    uint64_t live = 0, written = 0;
    struct report_clock clock[REPORT_STAGES] = { 0 };
    if (!atomic_load(&p->failed)) {
        status *st = write_chunk(p, w->index, it, &live, clock);
        written = st ? 0 : c->payload_bytes;
        if (st)
            fail(p, st);
    }
    if (it->live)
        stage_release(&p->stage, w->index, 0); /* also when it was never looked at */
    if (it->block)
        stage_give(&p->stage, it->block);
    pthread_mutex_lock(&p->synced.lock);
    p->synced.written_bytes += written;
    p->synced.live_bytes += live;
    for (int i = REPORT_CAPTURE; i <= REPORT_WRITE; i++)
        report_merge(&p->synced.clock[i], &clock[i]);
    p->synced.clock[REPORT_WRITE].wait_ns += waited_ns;
    pthread_mutex_unlock(&p->synced.lock);
    account(p, c->file);
}

static status *writer_main(void *arg)
{
    struct writer *w = arg;
    struct stage_item it;
    while (stage_take(&w->p->stage, w->index, &it)) {
        bool same = w->saves == w->p->saves; /* as the one before: between saves nobody waits for chunks */
        w->saves = w->p->saves;
        handle(w, &it, same ? clock_ns() - w->idle_ns : 0);
        w->idle_ns = clock_ns();
    }
    return NULL;
}

static bool hand(void *arg, uint64_t chunk, void *block)
{
    struct pipeline *p = arg;
    return p->o.hand && p->o.hand(p->o.hand_arg, chunk, block);
}

void pipeline_fail(struct pipeline *p, status *st)
{
    fail(p, st);
}

void pipeline_filled(struct pipeline *p, uint64_t chunk, void *block)
{
    stage_filled(&p->stage, chunk, block);
}

status *pipeline_open(const struct pipeline_options *o, struct pipeline **out)
{
    struct pipeline *p = mem_calloc(1, sizeof *p);
    struct writer *writer = mem_calloc((size_t)o->writers, sizeof *writer);
    if (!p || !writer) {
        mem_free(p);
        mem_free(writer);
        return ERR(NO_MEMORY, "pipeline of %d writers", o->writers);
    }
    p->o = *o;
    p->writer = writer;
    p->synced.drained = true;
    atomic_init(&p->failed, false);
    atomic_init(&p->buffered, false);
    pthread_mutex_init(&p->open_lock, NULL);
    pthread_mutex_init(&p->synced.lock, NULL);
    pthread_cond_init(&p->synced.over, NULL);
    struct stage_sink sink = { .arg = p, .fail = fail, .failed = &p->failed, .hand = hand };
    status *st = stage_open(&p->stage, o->dev, o->writers, sink);
    for (int i = 0; !st && i < o->writers; i++) {
        char name[24];
        snprintf(name, sizeof name, "tsr-write-%d", i);
        writer[i].p = p;
        writer[i].index = i;
        st = thread_start(&writer[i].thread, name, writer_main, &writer[i]);
    }
    if (st) {
        pipeline_close(p);
        return st;
    }
    *out = p;
    return NULL;
}

static void stop(struct pipeline *p)
{
    pthread_mutex_lock(&p->synced.lock);
    atomic_store(&p->failed, true);
    while (!p->synced.drained)
        pthread_cond_wait(&p->synced.over, &p->synced.lock);
    pthread_mutex_unlock(&p->synced.lock);
}

void pipeline_close(struct pipeline *p)
{
    if (!p)
        return;
    stop(p);
    stage_quit(&p->stage);
    for (int i = 0; i < p->o.writers; i++)
        status_free(thread_join(&p->writer[i].thread));
    stage_close(&p->stage);
    status_free(p->synced.error);
    pthread_cond_destroy(&p->synced.over);
    pthread_mutex_destroy(&p->synced.lock);
    pthread_mutex_destroy(&p->open_lock);
    mem_free(p->writer);
    mem_free(p->file);
    mem_free(p);
}

/* What is resident from the start: so much that this and all else that saves take (books, votes, HDF5's own: some MiB)
 * stay below the cap. The rest is for a first fence that comes before a 16th of the share is written. */
static uint64_t touched_blocks(const struct share *s, uint64_t staging_bytes, uint64_t bounce)
{
    uint64_t cap = staging_bytes < s->payload_bytes ? staging_bytes : s->payload_bytes;
    uint64_t others = cap / 16 + (8 << 20) + bounce;
    return s->block_bytes && cap > others ? (cap - others) / s->block_bytes : 0;
}

status *pipeline_prepare(struct pipeline *p, const struct share *s, uint64_t staging_bytes)
{
    struct file *file = mem_calloc(s->files ? s->files : 1, sizeof *file);
    if (!file)
        return ERR(NO_MEMORY, "books of %llu files", (unsigned long long)s->files);
    mem_free(p->file);
    p->file = file;
    p->chunks = s->chunks;
    p->files = s->files;
    uint64_t bounce = p->o.dev->host ? (uint64_t)p->o.writers * BOUNCE_BYTES : 0;
    uint64_t room = staging_bytes > bounce ? staging_bytes - bounce : 0;
    uint64_t blocks = s->block_bytes ? room / s->block_bytes : 0;
    blocks = blocks < 2 ? 2 : blocks;
    blocks = blocks > s->data_chunks ? s->data_chunks : blocks;
    p->small = s->payload_bytes <= s->chunk_bytes && blocks == s->data_chunks;
    uint64_t touched = p->small ? blocks : touched_blocks(s, staging_bytes, bounce);
    return stage_prepare(&p->stage, s->block_bytes, blocks, touched < blocks ? touched : blocks, s->chunks);
}

void pipeline_start(struct pipeline *p, struct share *s, uint64_t step)
{
    CHECK(p->chunks == s->chunks && p->files == s->files, "the share was prepared");
    p->share = s;
    p->step = step;
    p->saves++;
    for (uint64_t f = 0; f < s->files; f++)
        p->file[f] = (struct file){ .chunks_left = s->file[f].chunks };
    pthread_mutex_lock(&p->synced.lock);
    CHECK(p->synced.drained, "one save at a time");
    status_free(p->synced.error);
    p->synced.error = NULL;
    p->synced.drained = s->files == 0;
    p->synced.files_left = s->files;
    p->synced.written_bytes = p->synced.live_bytes = 0;
    memset(p->synced.clock, 0, sizeof p->synced.clock);
    p->synced.drained_ns = clock_ns(); /* without files */
    p->synced.retries = atomic_load(&p->o.store->retries);
    atomic_store(&p->failed, false);
    pthread_mutex_unlock(&p->synced.lock);
    stage_start(&p->stage, s, p->o.dev->host && !atomic_load(&p->buffered) && !p->small);
}

void pipeline_set_stream(struct pipeline *p, struct stream *s)
{
    p->stage.writes = s;
}

uint64_t pipeline_fence(struct pipeline *p, const void *addr, size_t bytes, struct stream *stream)
{
    const struct share *s = p->share;
    if (!s)
        return 0;
    if (!addr)
        return stage_wait(&p->stage, s->tensor_chunks, stream);
    uintptr_t begin = (uintptr_t)addr, end = begin + bytes;
    for (uint64_t i = s->pieces; i-- > 0;)
        if (s->source[i].begin < end && begin < s->source[i].end)
            return stage_wait(&p->stage, s->piece[i].past_chunk, stream);
    return 0;
}

void pipeline_look(struct pipeline *p, struct pipeline_view *out)
{
    *out = (struct pipeline_view){ 0 };
    pthread_mutex_lock(&p->synced.lock); /* one look: a failure comes before the end it leads to, never after */
    out->drained = p->synced.drained;
    out->failed = atomic_load(&p->failed);
    out->written_bytes = p->synced.written_bytes;
    out->live_bytes = p->synced.live_bytes;
    pthread_mutex_unlock(&p->synced.lock);
    struct stage_view stage;
    stage_look(&p->stage, &stage);
    out->captured = !p->share || stage.captured;
    out->captured_bytes = stage.captured_bytes;
    out->staging_cap_bytes = stage.cap_bytes;
    out->staging_peak_bytes = stage.peak_bytes;
}

void pipeline_report(struct pipeline *p, struct report_rank *r)
{
    struct stage_view stage;
    stage_look(&p->stage, &stage);
    report_merge(&r->stage[REPORT_CAPTURE], &stage.clock);
    pthread_mutex_lock(&p->synced.lock);
    for (int i = REPORT_CAPTURE; i <= REPORT_FSYNC; i++)
        report_merge(&r->stage[i], &p->synced.clock[i]);
    r->stage[REPORT_WRITE].retries += atomic_load(&p->o.store->retries) - p->synced.retries;
    r->bytes = p->synced.written_bytes;
    r->total_ns = p->synced.drained_ns;
    pthread_mutex_unlock(&p->synced.lock);
}

status *pipeline_take_error(struct pipeline *p)
{
    pthread_mutex_lock(&p->synced.lock);
    status *st = p->synced.error;
    p->synced.error = NULL;
    pthread_mutex_unlock(&p->synced.lock);
    return st;
}

void pipeline_give_up(struct pipeline *p)
{
    if (p->share)
        atomic_store(&p->failed, true);
}

void pipeline_end(struct pipeline *p, enum pipeline_end how)
{
    if (!p->share)
        return;
    if (how != PIPELINE_KEEP)
        stop(p);
    for (uint64_t f = 0; f < p->files && how == PIPELINE_REMOVE; f++) {
        if (!p->file[f].finished)
            continue;
        char key[STORE_KEY_BYTES];
        file_key(p, &p->share->file[f], key);
        status_free(store_remove(p->o.store, key)); /* a leftover never counts: no metadata names it */
    }
    p->share = NULL;
    atomic_store(&p->failed, false);
}
