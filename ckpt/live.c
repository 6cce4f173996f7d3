/* live: read write_segment: how much of a segment goes straight, and how much through the bounce buffer; then
 * copy_rest, for when training cannot wait.
 *
 * Invariants: (1) the bounce buffer holds one run of the file, from the beginning of a page on; (2) every byte of the
 * chunk is written at most once, and those that are not are padding, which reads back as zero. */
#include "ckpt/live.h"

#include "comm/base/clock.h"

#include <string.h>

struct walk {
    struct live *l;
    struct share *s;
    struct store_direct align;
    size_t used;
    uint64_t offset; /* in the file, of the first byte in the bounce buffer */
};

static status *put(struct live *l, uint64_t at, const void *from, size_t n)
{
    uint64_t begin = clock_ns();
    status *st = store_write(l->w, at, from, n);
    report_add(&l->clock[REPORT_WRITE], begin, clock_ns(), 0, st ? 0 : n);
    return st;
}

static void checksum(struct live *l, const struct share_segment *seg, uint64_t from, const void *payload, size_t n)
{
    uint64_t begin = clock_ns();
    share_checksum(l->s, seg, from, payload, n);
    report_add(&l->clock[REPORT_CHECKSUM], begin, clock_ns(), 0, n);
}

static void gather(struct walk *k, const struct share_segment *seg, uint64_t from, size_t n, void *out)
{
    uint64_t begin = clock_ns();
    share_gather(k->s, seg, from, n, out);
    report_add(&k->l->clock[REPORT_CAPTURE], begin, clock_ns(), 0, n);
}

/* Write what is gathered, up to the end of its page, but not past `limit`. */
static status *flush(struct walk *k, uint64_t limit)
{
    uint64_t end = (k->offset + k->used + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
    end = end < limit ? end : limit;
    size_t n = (size_t)(end - k->offset);
    if (!k->used)
        return NULL;
    memset(k->l->bounce + k->used, 0, n - k->used);
    k->used = 0;
    return put(k->l, k->offset, k->l->bounce, n);
}

/* Where a segment's bytes lie one after another; NULL: nowhere. */
static const unsigned char *contiguous(const struct share *s, const struct share_segment *seg)
{
    const struct share_piece *p = &s->piece[seg->piece];
    const struct share_source *src = &s->source[seg->piece];
    return src->strided ? NULL : (const unsigned char *)src->base + p->local_offset * p->elem_bytes + seg->lo;
}

/* How many bytes from `from` on can go straight to `at` in the file, in one write: whole pages. */
static uint64_t straight_bytes(const struct walk *k, const unsigned char *from, uint64_t at, uint64_t left)
{
    uint64_t most = left < k->l->piece_bytes ? left : k->l->piece_bytes;
    if (!from)
        return 0;
    if (!k->align.offset) /* a copy it will be, but the storage's */
        return most;
    if ((uintptr_t)from % k->align.memory || at % k->align.offset || left < k->l->bounce_bytes)
        return 0;
    return most / k->align.offset * k->align.offset;
}

/* All that was not written yet, the bounce buffer's bytes first: from byte `done` of segment i on. */
static void copy_rest(struct walk *k, uint64_t i, uint64_t done)
{
    struct live *l = k->l;
    const struct share_chunk *c = l->c;
    const struct share_segment *seg = &k->s->segment[i];
    l->rest = k->used ? k->offset - c->offset : seg->at + done;
    l->rest_segment = i;
    l->rest_done = done;
    uint64_t end = l->rest + k->used;
    if (k->used)
        memcpy(l->given + l->rest, l->bounce, k->used);
    for (; i < c->first_segment + c->segments; i++, done = 0) {
        seg = &k->s->segment[i];
        uint64_t at = seg->at + done, n = seg->hi - seg->lo - done;
        memset(l->given + end, 0, at - end);
        gather(k, seg, done, n, l->given + at);
        end = at + n;
    }
    memset(l->given + end, 0, c->bytes - end);
}

/* Until its end, or until there is a block. at: of the segment, in the file. While the bounce buffer holds something,
 * what follows fills it up. */
static status *write_segment(struct walk *k, uint64_t i, uint64_t at)
{
    struct live *l = k->l;
    const struct share_segment *seg = &k->s->segment[i];
    const unsigned char *memory = contiguous(k->s, seg);
    uint64_t length = seg->hi - seg->lo;
    if (k->used && at - k->offset >= l->bounce_bytes)
        TRY(flush(k, at));
    if (k->used) {
        memset(l->bounce + k->used, 0, (size_t)(at - k->offset) - k->used);
        k->used = (size_t)(at - k->offset);
    }
    for (uint64_t done = 0; done < length;) {
        if ((l->given = l->block(l->arg))) {
            copy_rest(k, i, done);
            return NULL;
        }
        uint64_t left = length - done;
        uint64_t n = k->used ? 0 : straight_bytes(k, memory ? memory + done : NULL, at + done, left);
        if (n) {
            checksum(l, seg, done, memory + done, n);
            TRY(put(l, at + done, memory + done, n));
            l->straight += k->align.offset ? n : 0;
            done += n;
            continue;
        }
        if (!k->used)
            k->offset = at + done;
        n = left < l->bounce_bytes - k->used ? left : l->bounce_bytes - k->used;
        gather(k, seg, done, n, l->bounce + k->used);
        checksum(l, seg, done, l->bounce + k->used, n);
        k->used += n;
        done += n;
        if (k->used == l->bounce_bytes)
            TRY(flush(k, k->offset + l->bounce_bytes));
    }
    return NULL;
}

status *live_write(struct live *l)
{
    const struct share_chunk *c = l->c;
    struct walk k = { .l = l, .s = l->s, .align = store_writer_direct(l->w) };
    l->straight = 0;
    l->given = NULL;
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments && !l->given; i++)
        TRY(write_segment(&k, i, c->offset + l->s->segment[i].at));
    return l->given ? NULL : flush(&k, c->offset + c->bytes);
}

status *live_write_rest(struct live *l)
{
    const struct share_chunk *c = l->c;
    uint64_t done = l->rest_done;
    for (uint64_t i = l->rest_segment; i < c->first_segment + c->segments; i++, done = 0) {
        const struct share_segment *seg = &l->s->segment[i];
        checksum(l, seg, done, l->given + seg->at + done, seg->hi - seg->lo - done);
    }
    return put(l, c->offset + l->rest, l->given + l->rest, c->bytes - l->rest);
}
