/* stage: capture_main and stage_take are the two that take chunks; everything else is bookkeeping around them. */
#include "ckpt/stage.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <string.h>

#define NO_CHUNK UINT64_MAX

static status *copy_segment(struct stage *g, const struct share *s, const struct share_segment *seg, unsigned char *out)
{
    const struct share_piece *p = &s->piece[seg->piece];
    const struct share_source *src = &s->source[seg->piece];
    if (g->dev->host) {
        share_gather(s, seg, 0, seg->hi - seg->lo, out);
        return NULL;
    }
    if (src->strided)
        return ERR(UNSUPPORTED, "strided memory on device %s", g->dev->ops->name);
    const unsigned char *from = (const unsigned char *)src->base + p->local_offset * p->elem_bytes + seg->lo;
    return g->dev->ops->copy(g->dev, out, from, seg->hi - seg->lo, g->stream);
}

/* Fill the block with the chunk as it will lie in the file. */
static status *fill(struct stage *g, const struct share *s, const struct share_chunk *c, unsigned char *block)
{
    uint64_t end = 0;
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++) {
        const struct share_segment *seg = &s->segment[i];
        memset(block + end, 0, seg->at - end);
        TRY(copy_segment(g, s, seg, block + seg->at));
        end = seg->at + seg->hi - seg->lo;
    }
    memset(block + end, 0, c->bytes - end);
    return NULL;
}

static void note_peak_locked(struct stage *g)
{
    size_t used = g->pool.count - pool_free_count(&g->pool);
    g->synced.peak_blocks = used > g->synced.peak_blocks ? used : g->synced.peak_blocks;
}

static void *take_block(struct stage *g, uint64_t *waited_ns)
{
    uint64_t begin = clock_ns();
    void *block = pool_get(&g->pool);
    *waited_ns = clock_ns() - begin;
    pthread_mutex_lock(&g->synced.lock);
    note_peak_locked(g);
    pthread_mutex_unlock(&g->synced.lock);
    return block;
}

/* The chunk in a block, or a block for it where it is not own; NULL if it needs none, or none any more. */
static void *capture(struct stage *g, const struct share *s, const struct share_chunk *c, bool own, uint64_t *waited_ns)
{
    if (!c->segments || atomic_load(g->sink.failed))
        return NULL;
    void *block = take_block(g, waited_ns);
    status *st = atomic_load(g->sink.failed) || !own ? NULL : fill(g, s, c, block);
    if (st)
        g->sink.fail(g->sink.arg, st);
    if (!atomic_load(g->sink.failed))
        return block;
    stage_give(g, block);
    return NULL;
}

/* ---- copies of another device */

static struct event *event_of(struct stage *g, const void *block)
{
    return g->filled[(size_t)((const unsigned char *)block - g->memory) / g->pool.block_bytes];
}

/* Queue the copies of chunk i. False: no block is free, and some that are under way will be. */
static bool queue(struct stage *g, const struct share *s, uint64_t i, bool may_wait)
{
    const struct share_chunk *c = &s->chunk[i];
    struct stage_flight f = { .begin_ns = clock_ns(), .own = i < s->own_chunks };
    if (c->segments && !atomic_load(g->sink.failed)) {
        f.block = may_wait ? take_block(g, &f.waited_ns) : pool_try_get(&g->pool);
        if (!f.block)
            return false;
        status *st = atomic_load(g->sink.failed) || !f.own ? NULL : fill(g, s, c, f.block);
        if (!st && f.own)
            st = g->dev->ops->event_record(g->dev, event_of(g, f.block), g->stream);
        if (st) {
            g->sink.fail(g->sink.arg, st);
            status_free(g->dev->ops->stream_sync(g->dev, g->stream)); /* some of them may be under way */
        }
        if (st || (!f.own && atomic_load(g->sink.failed))) {
            stage_give(g, f.block);
            f.block = NULL;
        }
    }
    f.gone = !f.own && f.block && g->sink.hand(g->sink.arg, i, f.block);
    g->flight[i] = f;
    return true;
}

/* Wait for the copies of chunk i; its block for the writers. */
static void *land(struct stage *g, uint64_t i)
{
    struct stage_flight *f = &g->flight[i];
    struct backoff pause = { .max_us = 100 };
    status *st = NULL;
    for (bool done = !f->own || !f->block; !st && !done;) {
        st = g->dev->ops->event_query(g->dev, event_of(g, f->block), &done);
        if (!st && !done)
            backoff_wait(&pause);
    }
    if (st)
        g->sink.fail(g->sink.arg, st);
    return f->block;
}

static void put_ready_locked(struct stage *g, uint64_t chunk, void *block)
{
    g->synced.ready[g->synced.put++] = (struct stage_item){ .chunk = chunk, .block = block };
    pthread_cond_broadcast(&g->synced.changed);
}

/* One step of the capture thread on such a device: queue a chunk's copies, or see the oldest ones end. */
static void device_step_locked(struct stage *g)
{
    const struct share *s = g->synced.share;
    bool under_way = g->synced.landed < g->synced.queued, queued = false;
    uint64_t i = g->synced.queued;
    if (i < g->synced.chunks) {
        pthread_mutex_unlock(&g->synced.lock);
        queued = queue(g, s, i, !under_way);
        pthread_mutex_lock(&g->synced.lock);
        note_peak_locked(g);
    }
    if (queued) {
        g->synced.queued++;
        g->synced.next = g->synced.queued;
        pthread_cond_broadcast(&g->synced.changed);
    } else {
        i = g->synced.landed;
        pthread_mutex_unlock(&g->synced.lock);
        void *block = land(g, i);
        pthread_mutex_lock(&g->synced.lock);
        const struct stage_flight *f = &g->flight[i];
        uint64_t bytes = block ? s->chunk[i].payload_bytes : 0;
        g->synced.landed++;
        if (!f->gone) {
            g->synced.captured_bytes += bytes;
            if (block)
                report_add(&g->synced.clock, f->begin_ns, clock_ns(), f->waited_ns, bytes);
            put_ready_locked(g, i, block);
        }
    }
    g->synced.reading[g->writers] = g->synced.landed < g->synced.queued ? g->synced.landed : NO_CHUNK;
}

static status *capture_device(struct stage *g)
{
    pthread_mutex_lock(&g->synced.lock);
    while (!g->synced.quit) {
        if (g->synced.landed == g->synced.chunks)
            pthread_cond_wait(&g->synced.changed, &g->synced.lock);
        else
            device_step_locked(g);
    }
    pthread_mutex_unlock(&g->synced.lock);
    return NULL;
}

/* The host waits until the copies are queued, s for the last of them that is still under way. */
static uint64_t wait_device(struct stage *g, uint64_t count, struct stream *s)
{
    uint64_t start = 0;
    struct event *last = NULL;
    pthread_mutex_lock(&g->synced.lock);
    while (g->synced.queued < count && !g->synced.quit) {
        start = start ? start : clock_ns();
        pthread_cond_wait(&g->synced.changed, &g->synced.lock);
    }
    for (uint64_t i = count < g->synced.queued ? count : g->synced.queued; i-- > g->synced.landed && !last;)
        last = g->flight[i].own && g->flight[i].block ? event_of(g, g->flight[i].block) : NULL;
    /* under the lock: the block, and with it the event, is not given to another chunk meanwhile */
    status *st = last ? g->dev->ops->stream_wait(g->dev, s, last) : NULL;
    pthread_mutex_unlock(&g->synced.lock);
    if (st)
        g->sink.fail(g->sink.arg, st);
    return start ? clock_ns() - start : 0;
}

/* ---- the capture thread */

static status *capture_main(void *arg)
{
    struct stage *g = arg;
    if (!g->dev->host)
        return capture_device(g);
    pthread_mutex_lock(&g->synced.lock);
    while (!g->synced.quit) {
        if (g->synced.next == g->synced.chunks || (g->synced.live && g->synced.next < g->synced.own_chunks)) {
            pthread_cond_wait(&g->synced.changed, &g->synced.lock);
            continue;
        }
        uint64_t i = g->synced.next++;
        const struct share *s = g->synced.share;
        g->synced.reading[g->writers] = i;
        pthread_mutex_unlock(&g->synced.lock);
        uint64_t bytes = s->chunk[i].payload_bytes;
        uint64_t begin = clock_ns(), waited = 0;
        bool own = i < s->own_chunks;
        void *block = capture(g, s, &s->chunk[i], own, &waited);
        bool handed = !own && block && g->sink.hand(g->sink.arg, i, block);
        uint64_t end = clock_ns();
        pthread_mutex_lock(&g->synced.lock);
        g->synced.reading[g->writers] = NO_CHUNK;
        if (handed)
            continue;
        g->synced.captured_bytes += block ? bytes : 0;
        if (block)
            report_add(&g->synced.clock, begin, end, waited, bytes);
        put_ready_locked(g, i, block);
    }
    pthread_mutex_unlock(&g->synced.lock);
    return NULL;
}

static bool try_take_locked(struct stage *g, int writer, struct stage_item *out)
{
    if (g->synced.got < g->synced.put) {
        *out = g->synced.ready[g->synced.got++];
        return true;
    }
    if (!g->synced.live || g->synced.next >= g->synced.own_chunks)
        return false;
    *out = (struct stage_item){ .chunk = g->synced.next++, .live = true };
    if (g->synced.share->chunk[out->chunk].segments) /* a header is no tensor's */
        g->synced.reading[writer] = out->chunk;
    return true;
}

bool stage_take(struct stage *g, int writer, struct stage_item *out)
{
    bool got;
    pthread_mutex_lock(&g->synced.lock);
    while (!(got = try_take_locked(g, writer, out)) && !g->synced.quit)
        pthread_cond_wait(&g->synced.changed, &g->synced.lock);
    pthread_mutex_unlock(&g->synced.lock);
    return got;
}

void stage_release(struct stage *g, int writer, uint64_t bytes)
{
    pthread_mutex_lock(&g->synced.lock);
    g->synced.reading[writer] = NO_CHUNK;
    g->synced.captured_bytes += bytes;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
}

void stage_give(struct stage *g, void *block)
{
    pool_put(&g->pool, block);
}

void stage_filled(struct stage *g, uint64_t chunk, void *block)
{
    pthread_mutex_lock(&g->synced.lock);
    g->synced.captured_bytes += g->synced.share->chunk[chunk].payload_bytes;
    put_ready_locked(g, chunk, block);
    pthread_mutex_unlock(&g->synced.lock);
}

void *stage_try_block(struct stage *g)
{
    pthread_mutex_lock(&g->synced.lock);
    void *block = g->synced.live ? NULL : pool_try_get(&g->pool);
    if (block)
        note_peak_locked(g);
    pthread_mutex_unlock(&g->synced.lock);
    return block;
}

void *stage_bounce(struct stage *g, int writer)
{
    return g->memory + g->memory_bytes - (size_t)(g->writers - writer) * BOUNCE_BYTES;
}

static void end_live_locked(struct stage *g)
{
    if (!g->synced.live)
        return;
    g->synced.live = false;
    pthread_cond_broadcast(&g->synced.changed);
}

void stage_end_live(struct stage *g)
{
    pthread_mutex_lock(&g->synced.lock);
    end_live_locked(g);
    pthread_mutex_unlock(&g->synced.lock);
}

static bool is_free_locked(const struct stage *g, uint64_t count)
{
    for (int i = 0; i <= g->writers; i++)
        if (g->synced.reading[i] < count)
            return false;
    return g->synced.next >= count;
}

uint64_t stage_wait(struct stage *g, uint64_t count, struct stream *s)
{
    if (!g->dev->host)
        return wait_device(g, count, s);
    uint64_t start = 0;
    pthread_mutex_lock(&g->synced.lock);
    end_live_locked(g);
    while (!is_free_locked(g, count)) {
        start = start ? start : clock_ns();
        pthread_cond_wait(&g->synced.changed, &g->synced.lock);
    }
    pthread_mutex_unlock(&g->synced.lock);
    return start ? clock_ns() - start : 0;
}

void stage_look(struct stage *g, struct stage_view *out)
{
    pthread_mutex_lock(&g->synced.lock);
    size_t blocks = g->memory ? g->pool.block_bytes * g->pool.count : 0;
    out->captured = is_free_locked(g, g->synced.tensor_chunks);
    out->captured_bytes = g->synced.captured_bytes;
    out->clock = g->synced.clock;
    out->cap_bytes = g->memory_bytes;
    out->peak_bytes = g->memory ? g->synced.peak_blocks * g->pool.block_bytes + g->memory_bytes - blocks : 0;
    pthread_mutex_unlock(&g->synced.lock);
}

/* ---- open, prepare, start, close */

status *stage_open(struct stage *g, struct device *dev, int writers, struct stage_sink sink)
{
    uint64_t *reading = mem_array(NULL, (size_t)writers + 1, sizeof *reading);
    if (!reading)
        return ERR(NO_MEMORY, "staging for %d writers", writers);
    *g = (struct stage){ .dev = dev, .writers = writers, .sink = sink };
    for (int i = 0; i <= writers; i++)
        reading[i] = NO_CHUNK;
    g->synced.reading = reading;
    pthread_mutex_init(&g->synced.lock, NULL);
    pthread_cond_init(&g->synced.changed, NULL);
    status *st = dev->ops->stream_open_low(dev, &g->stream);
    if (!st)
        st = dev->ops->event_open(dev, &g->begin);
    if (!st)
        st = thread_start(&g->thread, "tsr-capture", capture_main, g);
    if (st)
        stage_close(g);
    return st;
}

static void free_events(struct stage *g)
{
    for (size_t i = 0; i < g->filled_count; i++)
        g->dev->ops->event_close(g->dev, g->filled[i]);
    mem_free(g->filled);
    g->filled = NULL;
    g->filled_count = 0;
}

/* An event for each block. */
static status *make_events(struct stage *g, size_t blocks)
{
    free_events(g);
    g->filled = mem_calloc(blocks, sizeof(struct event *));
    if (!g->filled)
        return ERR(NO_MEMORY, "events of %zu blocks", blocks);
    for (; g->filled_count < blocks; g->filled_count++)
        TRY(g->dev->ops->event_open(g->dev, &g->filled[g->filled_count]));
    return NULL;
}

static void free_memory(struct stage *g)
{
    if (g->memory) {
        pool_fini(&g->pool);
        g->dev->ops->free_pinned(g->dev, g->memory, g->memory_bytes);
    }
    g->memory = NULL;
    g->memory_bytes = 0;
}

void stage_quit(struct stage *g)
{
    if (!g->dev)
        return;
    pthread_mutex_lock(&g->synced.lock);
    g->synced.quit = true;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
}

void stage_close(struct stage *g)
{
    if (!g->dev)
        return;
    stage_quit(g);
    status_free(thread_join(&g->thread));
    if (g->stream && !g->dev->host)
        status_free(g->dev->ops->stream_sync(g->dev, g->stream));
    free_memory(g);
    free_events(g);
    if (g->begin)
        g->dev->ops->event_close(g->dev, g->begin);
    if (g->stream)
        g->dev->ops->stream_close(g->dev, g->stream);
    mem_free(g->flight);
    mem_free(g->synced.reading);
    mem_free(g->synced.ready);
    pthread_cond_destroy(&g->synced.changed);
    pthread_mutex_destroy(&g->synced.lock);
    g->dev = NULL;
}

status *stage_prepare(struct stage *g, size_t block_bytes, size_t blocks, size_t touched, uint64_t chunks)
{
    if (chunks > g->synced.room) {
        struct stage_item *ready = mem_array(g->synced.ready, chunks, sizeof *ready);
        if (!ready)
            return ERR(NO_MEMORY, "books of %llu chunks", (unsigned long long)chunks);
        g->synced.ready = ready;
        struct stage_flight *flight = g->dev->host ? NULL : mem_array(g->flight, chunks, sizeof *flight);
        if (!flight && !g->dev->host)
            return ERR(NO_MEMORY, "books of %llu chunks", (unsigned long long)chunks);
        g->flight = flight;
        g->synced.room = chunks;
    }
    if (g->memory && g->pool.block_bytes == block_bytes && g->pool.count == blocks)
        return NULL;
    free_memory(g);
    if (!blocks)
        return NULL;
    if (!g->dev->host)
        TRY(make_events(g, blocks));
    void *memory;
    size_t bytes = block_bytes * blocks + (g->dev->host ? (size_t)g->writers * BOUNCE_BYTES : 0);
    TRY(g->dev->ops->alloc_pinned(g->dev, bytes, &memory));
    status *st = pool_init(&g->pool, memory, block_bytes, blocks);
    if (st) {
        g->dev->ops->free_pinned(g->dev, memory, bytes);
        return st;
    }
    g->memory = memory;
    g->memory_bytes = bytes;
    memset(g->memory, 0, touched * block_bytes);
    memset(g->memory + blocks * block_bytes, 0, bytes - blocks * block_bytes);
    return NULL;
}

void stage_start(struct stage *g, struct share *s, bool live)
{
    CHECK(s->chunks <= g->synced.room && (!live || g->dev->host));
    status *st = NULL;
    if (!g->dev->host) {
        st = g->dev->ops->event_record(g->dev, g->begin, g->writes);
        if (!st)
            st = g->dev->ops->stream_wait(g->dev, g->stream, g->begin);
    }
    if (st)
        g->sink.fail(g->sink.arg, st);
    pthread_mutex_lock(&g->synced.lock);
    g->synced.share = s;
    g->synced.live = live;
    g->synced.chunks = s->chunks;
    g->synced.own_chunks = s->own_chunks;
    g->synced.tensor_chunks = s->tensor_chunks;
    g->synced.next = g->synced.put = g->synced.got = 0;
    g->synced.queued = g->synced.landed = 0;
    g->synced.captured_bytes = 0;
    g->synced.clock = (struct report_clock){ 0 };
    g->synced.peak_blocks = 0;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
}
