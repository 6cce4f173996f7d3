/* stage: capture_main waits for a share and walks its chunks; everything else is bookkeeping around it. */
#include "ckpt/stage.h"

#include "ckpt/reshard.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <string.h>

static status *copy_segment(struct stage *g, const struct share *s, const struct share_segment *seg, unsigned char *out)
{
    const struct share_piece *p = &s->piece[seg->piece];
    const struct share_source *src = &s->source[seg->piece];
    uint64_t lo = p->local_offset + seg->lo / p->elem_bytes, hi = p->local_offset + seg->hi / p->elem_bytes;
    if (g->dev->host) {
        piece_gather(p->ndim, &src->piece, p->elem_bytes, src->base, src->strided ? src->stride : NULL, lo, hi, out);
        return NULL;
    }
    if (src->strided)
        return ERR(UNSUPPORTED, "strided memory on device %s", g->dev->ops->name);
    const unsigned char *from = (const unsigned char *)src->base + lo * p->elem_bytes;
    return g->dev->ops->copy(g->dev, out, from, seg->hi - seg->lo, g->stream);
}

static void captured(struct stage *g, uint64_t pieces, uint64_t bytes)
{
    pthread_mutex_lock(&g->synced.lock);
    g->synced.captured_pieces = pieces;
    g->synced.captured_bytes += bytes;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
}

/* Fill the block with the chunk as it will lie in the file. */
static status *fill(struct stage *g, const struct share *s, const struct share_chunk *c, unsigned char *block)
{
    uint64_t end = 0, whole = 0;
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++) {
        const struct share_segment *seg = &s->segment[i];
        memset(block + end, 0, seg->at - end);
        TRY(copy_segment(g, s, seg, block + seg->at));
        end = seg->at + seg->hi - seg->lo;
        bool ended = seg->hi == s->piece[seg->piece].bytes;
        whole = seg->piece + (ended ? 1 : 0);
        while (ended && whole < s->pieces && !s->piece[whole].bytes) /* pieces of no bytes have no segment */
            whole++;
        if (g->dev->host)
            captured(g, whole, seg->hi - seg->lo);
    }
    memset(block + end, 0, c->bytes - end);
    if (!g->dev->host) {
        TRY(g->dev->ops->stream_sync(g->dev, g->stream));
        captured(g, whole, c->bytes);
    }
    return NULL;
}

static void *take_block(struct stage *g)
{
    void *block = pool_get(&g->pool);
    size_t used = g->pool.count - pool_free_count(&g->pool);
    pthread_mutex_lock(&g->synced.lock);
    g->synced.peak_blocks = used > g->synced.peak_blocks ? used : g->synced.peak_blocks;
    pthread_mutex_unlock(&g->synced.lock);
    return block;
}

static void capture(struct stage *g, const struct share *s)
{
    const uint64_t chunks = s->chunks; /* after the last emit the share may be gone */
    for (uint64_t i = 0; i < chunks; i++) {
        const struct share_chunk *c = &s->chunk[i];
        void *block = NULL;
        if (c->segments && !atomic_load(g->sink.failed)) {
            block = take_block(g);
            status *st = fill(g, s, c, block);
            if (st) {
                g->sink.fail(g->sink.arg, st);
                stage_give(g, block);
                block = NULL;
            }
        }
        if (atomic_load(g->sink.failed)) /* a failed save reads no tensor any more */
            captured(g, s->pieces, 0);
        g->sink.emit(g->sink.arg, i, block);
    }
}

static status *capture_main(void *arg)
{
    struct stage *g = arg;
    pthread_mutex_lock(&g->synced.lock);
    for (;;) {
        while (!g->synced.share && !g->synced.quit)
            pthread_cond_wait(&g->synced.changed, &g->synced.lock);
        if (!g->synced.share)
            break;
        struct share *s = g->synced.share;
        /* Once its last chunk is out the next save may start at once: be idle by then. */
        g->synced.share = NULL;
        pthread_mutex_unlock(&g->synced.lock);
        capture(g, s);
        pthread_mutex_lock(&g->synced.lock);
    }
    pthread_mutex_unlock(&g->synced.lock);
    return NULL;
}

status *stage_open(struct stage *g, struct device *dev, struct stage_sink sink)
{
    *g = (struct stage){ .dev = dev, .sink = sink };
    pthread_mutex_init(&g->synced.lock, NULL);
    pthread_cond_init(&g->synced.changed, NULL);
    status *st = dev->ops->stream_open(dev, &g->stream);
    if (!st)
        st = thread_start(&g->thread, "tsr-capture", capture_main, g);
    if (st)
        stage_close(g);
    return st;
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

void stage_close(struct stage *g)
{
    if (!g->dev)
        return;
    pthread_mutex_lock(&g->synced.lock);
    g->synced.quit = true;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
    status_free(thread_join(&g->thread));
    free_memory(g);
    if (g->stream)
        g->dev->ops->stream_close(g->dev, g->stream);
    pthread_cond_destroy(&g->synced.changed);
    pthread_mutex_destroy(&g->synced.lock);
    g->dev = NULL;
}

status *stage_prepare(struct stage *g, size_t block_bytes, size_t blocks)
{
    if (g->memory && g->pool.block_bytes == block_bytes && g->pool.count == blocks)
        return NULL;
    free_memory(g);
    if (!blocks)
        return NULL;
    void *memory;
    TRY(g->dev->ops->alloc_pinned(g->dev, block_bytes * blocks, &memory));
    status *st = pool_init(&g->pool, memory, block_bytes, blocks);
    if (st) {
        g->dev->ops->free_pinned(g->dev, memory, block_bytes * blocks);
        return st;
    }
    g->memory = memory;
    g->memory_bytes = block_bytes * blocks;
    return NULL;
}

void stage_start(struct stage *g, struct share *s)
{
    pthread_mutex_lock(&g->synced.lock);
    g->synced.captured_bytes = 0;
    g->synced.peak_blocks = 0;
    uint64_t lead = 0;
    while (lead < s->pieces && !s->piece[lead].bytes)
        lead++;
    g->synced.captured_pieces = lead;
    g->synced.share = s;
    pthread_cond_broadcast(&g->synced.changed);
    pthread_mutex_unlock(&g->synced.lock);
}

uint64_t stage_wait(struct stage *g, uint64_t count)
{
    uint64_t start = 0;
    pthread_mutex_lock(&g->synced.lock);
    while (g->synced.captured_pieces < count) {
        start = start ? start : clock_ns();
        pthread_cond_wait(&g->synced.changed, &g->synced.lock);
    }
    pthread_mutex_unlock(&g->synced.lock);
    return start ? clock_ns() - start : 0;
}

void stage_give(struct stage *g, void *block)
{
    pool_put(&g->pool, block);
}
