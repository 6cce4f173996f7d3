/* pipeline: read write_item (one chunk) and account (what the last chunk of a file, and the last file, set off). */
#include "ckpt/pipeline.h"

#include "ckpt/commit.h"
#include "ckpt/stage.h"
#include "comm/base/mem.h"
#include "comm/base/queue.h"
#include "comm/base/thread.h"

#include <stdio.h>

enum { QUEUE_ITEMS = 256 };

struct item {
    uint64_t chunk;
    void *block;
};

/* `writer` is opened under open_lock by whoever has the file's first chunk, and ended by whoever accounts for its last.
 */
struct file {
    struct store_writer *writer;
    uint64_t chunks_left;
    bool finished;
};

struct pipeline {
    struct pipeline_options o;
    struct stage stage;
    struct queue queue;
    struct thread *thread; /* [o.writers] */
    struct item *item;     /* [items] one a chunk */
    struct file *file;     /* [files] */
    uint64_t items, files;
    struct share
        *share; /* of the save in flight or the last one; set by the training thread while nothing is in flight */
    uint64_t step;
    atomic_bool failed;
    pthread_mutex_t open_lock;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t over;
        bool drained;
        uint64_t files_left, written_bytes;
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

static void emit(void *arg, uint64_t i, void *block)
{
    struct pipeline *p = arg;
    p->item[i] = (struct item){ .chunk = i, .block = block };
    CHECK(queue_put(&p->queue, &p->item[i]), "the queue closes after the last save");
}

static void file_key(const struct pipeline *p, const struct share_file *f, char key[STORE_KEY_BYTES])
{
    commit_shard_key(p->step, f->part, p->o.rank, p->o.attempt, key);
}

static status *open_file(struct pipeline *p, uint32_t f)
{
    status *st = NULL;
    pthread_mutex_lock(&p->open_lock);
    if (!p->file[f].writer) {
        char key[STORE_KEY_BYTES];
        file_key(p, &p->share->file[f], key);
        st = store_writer_open(p->o.store, key, p->share->file[f].image.file_bytes, &p->file[f].writer);
    }
    pthread_mutex_unlock(&p->open_lock);
    return st;
}

/* crc32c of each checksum block of a segment: segments start at block boundaries. */
static void checksum(const struct share *s, const struct share_segment *seg, const unsigned char *payload)
{
    uint32_t *crc = s->crc + s->piece[seg->piece].first_crc + seg->lo / META_BLOCK_BYTES;
    uint64_t n = seg->hi - seg->lo;
    for (uint64_t at = 0; at < n; at += META_BLOCK_BYTES)
        *crc++ = crc32c(0, payload + at, n - at < META_BLOCK_BYTES ? n - at : META_BLOCK_BYTES);
}

static status *write_item(struct pipeline *p, const struct item *it)
{
    const struct share *s = p->share;
    const struct share_chunk *c = &s->chunk[it->chunk];
    TRY(open_file(p, c->file));
    const void *from = c->segments ? it->block : s->file[c->file].image.header;
    uint64_t payload = 0;
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++) {
        checksum(s, &s->segment[i], (const unsigned char *)it->block + s->segment[i].at);
        payload += s->segment[i].hi - s->segment[i].lo;
    }
    TRY(store_write(p->file[c->file].writer, c->offset, from, c->bytes));
    pthread_mutex_lock(&p->synced.lock);
    p->synced.written_bytes += payload;
    pthread_mutex_unlock(&p->synced.lock);
    return NULL;
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
    if (!atomic_load(&p->failed)) {
        status *st = store_writer_finish(file->writer);
        file->writer = NULL; /* freed either way */
        file->finished = true;
        if (st)
            fail(p, st);
    }
    pthread_mutex_lock(&p->synced.lock);
    bool last_file = --p->synced.files_left == 0;
    pthread_mutex_unlock(&p->synced.lock);
    if (last_file)
        end_save(p);
}

static status *writer_main(void *arg)
{
    struct pipeline *p = arg;
    void *got;
    while (queue_get(&p->queue, &got)) {
        struct item *it = got;
        status *st = atomic_load(&p->failed) ? NULL : write_item(p, it);
        if (st)
            fail(p, st);
        if (it->block)
            stage_give(&p->stage, it->block);
        account(p, p->share->chunk[it->chunk].file);
    }
    return NULL;
}

status *pipeline_open(const struct pipeline_options *o, struct pipeline **out)
{
    struct pipeline *p = mem_calloc(1, sizeof *p);
    struct thread *thread = mem_calloc((size_t)o->writers, sizeof *thread);
    if (!p || !thread) {
        mem_free(p);
        mem_free(thread);
        return ERR(NO_MEMORY, "pipeline of %d writers", o->writers);
    }
    p->o = *o;
    p->thread = thread;
    p->synced.drained = true;
    atomic_init(&p->failed, false);
    pthread_mutex_init(&p->open_lock, NULL);
    pthread_mutex_init(&p->synced.lock, NULL);
    pthread_cond_init(&p->synced.over, NULL);
    status *st = queue_init(&p->queue, QUEUE_ITEMS);
    struct stage_sink sink = { .arg = p, .emit = emit, .fail = fail, .failed = &p->failed };
    if (!st)
        st = stage_open(&p->stage, o->dev, sink);
    for (int i = 0; !st && i < o->writers; i++) {
        char name[24];
        snprintf(name, sizeof name, "tsr-write-%d", i);
        st = thread_start(&thread[i], name, writer_main, p);
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
    stage_close(&p->stage);
    if (p->queue.slot)
        queue_close(&p->queue);
    for (int i = 0; i < p->o.writers; i++)
        status_free(thread_join(&p->thread[i]));
    queue_fini(&p->queue);
    status_free(p->synced.error);
    pthread_cond_destroy(&p->synced.over);
    pthread_mutex_destroy(&p->synced.lock);
    pthread_mutex_destroy(&p->open_lock);
    mem_free(p->thread);
    mem_free(p->item);
    mem_free(p->file);
    mem_free(p);
}

status *pipeline_prepare(struct pipeline *p, const struct share *s, uint64_t staging_bytes)
{
    struct item *item = mem_calloc(s->chunks ? s->chunks : 1, sizeof *item);
    struct file *file = mem_calloc(s->files ? s->files : 1, sizeof *file);
    if (!item || !file) {
        mem_free(item);
        mem_free(file);
        return ERR(NO_MEMORY, "books of %llu chunks", (unsigned long long)s->chunks);
    }
    mem_free(p->item);
    mem_free(p->file);
    p->item = item;
    p->file = file;
    p->items = s->chunks;
    p->files = s->files;
    uint64_t blocks = s->block_bytes ? staging_bytes / s->block_bytes : 0;
    blocks = blocks < 2 ? 2 : blocks;
    blocks = blocks > s->data_chunks ? s->data_chunks : blocks;
    return stage_prepare(&p->stage, s->block_bytes, blocks);
}

void pipeline_start(struct pipeline *p, struct share *s, uint64_t step)
{
    CHECK(p->items == s->chunks && p->files == s->files, "the share was prepared");
    p->share = s;
    p->step = step;
    for (uint64_t f = 0; f < s->files; f++)
        p->file[f] = (struct file){ .chunks_left = s->file[f].chunks };
    pthread_mutex_lock(&p->synced.lock);
    CHECK(p->synced.drained, "one save at a time");
    status_free(p->synced.error);
    p->synced.error = NULL;
    p->synced.drained = s->files == 0;
    p->synced.files_left = s->files;
    p->synced.written_bytes = 0;
    atomic_store(&p->failed, false);
    pthread_mutex_unlock(&p->synced.lock);
    stage_start(&p->stage, s);
}

uint64_t pipeline_fence(struct pipeline *p, const void *addr, size_t bytes)
{
    const struct share *s = p->share;
    if (!s)
        return 0;
    if (!addr)
        return stage_wait(&p->stage, s->pieces);
    uintptr_t begin = (uintptr_t)addr, end = begin + bytes;
    for (uint64_t i = s->pieces; i-- > 0;)
        if (s->source[i].begin < end && begin < s->source[i].end)
            return stage_wait(&p->stage, i + 1);
    return 0;
}

void pipeline_look(struct pipeline *p, struct pipeline_view *out)
{
    *out = (struct pipeline_view){ 0 };
    pthread_mutex_lock(&p->synced.lock); /* one look: a failure comes before the end it leads to, never after */
    out->drained = p->synced.drained;
    out->failed = atomic_load(&p->failed);
    out->written_bytes = p->synced.written_bytes;
    pthread_mutex_unlock(&p->synced.lock);
    pthread_mutex_lock(&p->stage.synced.lock);
    out->captured = !p->share || p->stage.synced.captured_pieces >= p->share->pieces;
    out->captured_bytes = p->stage.synced.captured_bytes;
    out->staging_cap_bytes = p->stage.memory_bytes;
    out->staging_peak_bytes = p->stage.synced.peak_blocks * (p->stage.memory ? p->stage.pool.block_bytes : 0);
    pthread_mutex_unlock(&p->stage.synced.lock);
}

status *pipeline_take_error(struct pipeline *p)
{
    pthread_mutex_lock(&p->synced.lock);
    status *st = p->synced.error;
    p->synced.error = NULL;
    pthread_mutex_unlock(&p->synced.lock);
    return st;
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
