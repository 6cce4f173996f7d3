/* live: read write_segment: how much of a segment goes straight, and how much through the bounce buffer.
 *
 * Invariants: (1) the bounce buffer holds one run of the file, from the beginning of a page on; (2) every byte of the
 * chunk is written at most once, and those that are not are padding, which reads back as zero. */
#include "ckpt/live.h"

#include "comm/base/clock.h"

#include <string.h>

struct walk {
    struct share *s;
    struct store_writer *w;
    struct store_direct align;
    unsigned char *bounce;
    size_t room, used;
    uint64_t offset; /* in the file, of the first byte in bounce */
    uint64_t straight;
    struct report_clock *clock; /* by stage */
};

static status *put(struct walk *k, uint64_t at, const void *from, size_t n)
{
    uint64_t begin = clock_ns();
    status *st = store_write(k->w, at, from, n);
    report_add(&k->clock[REPORT_WRITE], begin, clock_ns(), 0, st ? 0 : n);
    return st;
}

static void checksum(struct walk *k, const struct share_segment *seg, uint64_t from, const void *payload, size_t n)
{
    uint64_t begin = clock_ns();
    share_checksum(k->s, seg, from, payload, n);
    report_add(&k->clock[REPORT_CHECKSUM], begin, clock_ns(), 0, n);
}

static void gather(struct walk *k, const struct share_segment *seg, uint64_t from, size_t n, void *out)
{
    uint64_t begin = clock_ns();
    share_gather(k->s, seg, from, n, out);
    report_add(&k->clock[REPORT_CAPTURE], begin, clock_ns(), 0, n);
}

/* Write what is gathered, up to the end of its page, but not past `limit`. */
static status *flush(struct walk *k, uint64_t limit)
{
    uint64_t end = (k->offset + k->used + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
    end = end < limit ? end : limit;
    size_t n = (size_t)(end - k->offset);
    if (!k->used)
        return NULL;
    memset(k->bounce + k->used, 0, n - k->used);
    k->used = 0;
    return put(k, k->offset, k->bounce, n);
}

/* Where a segment's bytes lie one after another; NULL: nowhere. */
static const unsigned char *contiguous(const struct share *s, const struct share_segment *seg)
{
    const struct share_piece *p = &s->piece[seg->piece];
    const struct share_source *src = &s->source[seg->piece];
    return src->strided ? NULL : (const unsigned char *)src->base + p->local_offset * p->elem_bytes + seg->lo;
}

/* How many bytes from `from` on can go straight to `at` in the file: whole pages. */
static uint64_t straight_bytes(const struct walk *k, const unsigned char *from, uint64_t at, uint64_t left)
{
    if (!from)
        return 0;
    if (!k->align.offset) /* a copy it will be, but the storage's */
        return left;
    if ((uintptr_t)from % k->align.memory || at % k->align.offset || left < k->room)
        return 0;
    return left / k->align.offset * k->align.offset;
}

/* at: of the segment, in the file. While the bounce buffer holds something, what follows fills it up. */
static status *write_segment(struct walk *k, const struct share_segment *seg, uint64_t at)
{
    const unsigned char *memory = contiguous(k->s, seg);
    uint64_t length = seg->hi - seg->lo;
    if (k->used && at - k->offset >= k->room)
        TRY(flush(k, at));
    if (k->used) {
        memset(k->bounce + k->used, 0, (size_t)(at - k->offset) - k->used);
        k->used = (size_t)(at - k->offset);
    }
    for (uint64_t done = 0; done < length;) {
        uint64_t left = length - done;
        uint64_t n = k->used ? 0 : straight_bytes(k, memory ? memory + done : NULL, at + done, left);
        if (n) {
            checksum(k, seg, done, memory + done, n);
            TRY(put(k, at + done, memory + done, n));
            k->straight += k->align.offset ? n : 0;
            done += n;
            continue;
        }
        if (!k->used)
            k->offset = at + done;
        n = left < k->room - k->used ? left : k->room - k->used;
        gather(k, seg, done, n, k->bounce + k->used);
        checksum(k, seg, done, k->bounce + k->used, n);
        k->used += n;
        done += n;
        if (k->used == k->room)
            TRY(flush(k, k->offset + k->room));
    }
    return NULL;
}

status *live_write(struct share *s, const struct share_chunk *c, struct store_writer *w, unsigned char *bounce,
                   size_t bounce_bytes, uint64_t *straight, struct report_clock clock[REPORT_STAGES])
{
    struct walk k = {
        .s = s, .w = w, .align = store_writer_direct(w), .bounce = bounce, .room = bounce_bytes, .clock = clock
    };
    for (uint64_t i = c->first_segment; i < c->first_segment + c->segments; i++)
        TRY(write_segment(&k, &s->segment[i], c->offset + s->segment[i].at));
    TRY(flush(&k, c->offset + c->bytes));
    *straight = k.straight;
    return NULL;
}
