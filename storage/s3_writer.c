/* s3_writer: read s3_writer_write: who copies and who sends.
 *
 * Invariants: (1) a part is sent once, by whoever claimed its last byte (or by finish, when nobody wrote some); (2) its
 * buffer is only read when every copy into it has ended: copied + the last write == what is wanted of the part. */
#include "storage/s3_writer.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "storage/s3_multipart.h"
#include "storage/s3_put.h"

#include <pthread.h>
#include <string.h>

enum { SMALL_BYTES = 8 << 20, PART_BYTES = 16 << 20, HEDGE_LEAST_MS = 1000, HEDGE_TIMES = 3, HEDGE_BLIND_MS = 10000 };

struct part {
    uint64_t begin, end;
    unsigned char *buffer;    /* [end - begin], zero where nothing was copied; NULL: nothing was */
    uint64_t wanted;          /* bytes that will be written; the others are zero */
    uint64_t claimed, copied; /* bytes that writes have claimed, and of these those that are in the buffer */
    bool sent;
};

struct s3_writer {
    struct s3 *s;
    bool small; /* one part that is put, not uploaded */
    bool begun; /* there is an upload */
    char id[S3_UPLOAD_ID_BYTES], mark[S3_MARK_BYTES];
    struct s3_part *done; /* [parts] as the server acknowledged them */
    size_t parts;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t copied;
        struct part *part; /* [parts] */
        size_t started;
        uint64_t sent_bytes, sent_ns; /* of parts that are through, by one connection each */
    } synced;
};

/* ---- Parts */

static uint64_t at_least(uint64_t bytes, uint64_t parts, uint64_t least)
{
    uint64_t n = (bytes + parts - 1) / parts;
    return n > least ? n : least;
}

/* Cut [from, to) evenly, if it is much. */
static void add_parts(uint64_t from, uint64_t to, uint64_t piece, uint64_t *begin, size_t *n)
{
    for (; to - from > 2 * piece; from += piece)
        begin[(*n)++] = from;
    begin[(*n)++] = from;
}

void s3_writer_parts(uint64_t bytes, const uint64_t *cut, size_t cuts, uint64_t *begin, size_t *parts)
{
    const uint64_t least = at_least(bytes, S3_PARTS / 2, S3_PART_LEAST);
    const uint64_t piece = at_least(bytes, S3_PARTS / 2, PART_BYTES);
    size_t n = 0;
    uint64_t from = 0;
    for (size_t i = 0; i < cuts; i++) {
        if (cut[i] >= bytes || cut[i] < from + least)
            continue;
        add_parts(from, cut[i], piece, begin, &n);
        from = cut[i];
    }
    if (!cuts)
        for (; bytes - from > piece; from += piece)
            begin[n++] = from;
    add_parts(from, bytes, piece, begin, &n);
    begin[n] = bytes;
    *parts = n;
}

static void free_parts(struct s3_writer *k)
{
    for (size_t i = 0; i < k->parts; i++)
        mem_free(k->synced.part[i].buffer);
    mem_free(k->synced.part);
    mem_free(k->done);
    k->synced.part = NULL;
    k->done = NULL;
    k->parts = 0;
}

static status *make_parts(struct s3_writer *k, const char *key, const uint64_t *begin, size_t parts)
{
    struct part *part = mem_calloc(parts, sizeof *part);
    struct s3_part *done = mem_calloc(parts, sizeof *done);
    if (!part || !done) {
        mem_free(part);
        mem_free(done);
        return ERR(NO_MEMORY, "%s: %zu parts", key, parts);
    }
    for (size_t i = 0; i < parts; i++) {
        part[i].begin = begin[i];
        part[i].end = begin[i + 1];
        part[i].wanted = begin[i + 1] - begin[i];
    }
    free_parts(k);
    k->synced.part = part;
    k->done = done;
    k->parts = parts;
    return NULL;
}

/* How much of each part the extents fill. */
static void want(struct s3_writer *k, const struct store_extent *e, size_t n)
{
    size_t i = 0;
    for (struct part *p = k->synced.part; p < k->synced.part + k->parts; p++) {
        p->wanted = 0;
        while (i < n && e[i].offset + e[i].bytes <= p->begin)
            i++;
        for (size_t j = i; j < n && e[j].offset < p->end; j++) {
            uint64_t lo = e[j].offset > p->begin ? e[j].offset : p->begin, hi = e[j].offset + e[j].bytes;
            p->wanted += (hi < p->end ? hi : p->end) - lo;
        }
    }
}

static status *cut_parts(struct store_writer *w, const uint64_t *cut, size_t cuts)
{
    uint64_t *begin = mem_array(NULL, S3_PARTS + 1, sizeof *begin);
    size_t parts;
    if (!begin)
        return ERR(NO_MEMORY, "%s: parts", w->key);
    s3_writer_parts(w->bytes, cut, cuts, begin, &parts);
    status *st = make_parts(w->impl, w->key, begin, parts);
    mem_free(begin);
    return st;
}

status *s3_writer_extents(struct store_writer *w, const struct store_extent *e, size_t n)
{
    struct s3_writer *k = w->impl;
    CHECK(k->synced.started == 0, "extents come before writes");
    if (k->small)
        return NULL;
    uint64_t *cut = mem_array(NULL, n + 1, sizeof *cut);
    if (!cut)
        return ERR(NO_MEMORY, "%s: %zu extents", w->key, n);
    for (size_t i = 0; i < n; i++)
        cut[i] = e[i].offset;
    status *st = cut_parts(w, cut, n);
    mem_free(cut);
    if (!st)
        want(k, e, n);
    return st;
}

static void writer_free(struct s3_writer *k)
{
    free_parts(k);
    pthread_cond_destroy(&k->synced.copied);
    pthread_mutex_destroy(&k->synced.lock);
    mem_free(k);
}

status *s3_writer_open(struct s3 *s, struct store_writer *w)
{
    struct s3_writer *k = mem_calloc(1, sizeof *k);
    if (!k)
        return ERR(NO_MEMORY, "writer of %s", w->key);
    pthread_mutex_init(&k->synced.lock, NULL);
    pthread_cond_init(&k->synced.copied, NULL);
    k->s = s;
    k->small = w->bytes <= SMALL_BYTES;
    w->impl = k;
    const uint64_t whole[2] = { 0, w->bytes };
    status *st = k->small ? make_parts(k, w->key, whole, 1) : cut_parts(w, NULL, 0);
    if (!st)
        st = s3_mark_draw(k->mark);
    if (!st && !k->small)
        st = s3_multipart_begin(s, w->key, k->mark, k->id);
    if (st) {
        writer_free(k);
        w->impl = NULL;
        return st;
    }
    k->begun = !k->small;
    return NULL;
}

/* ---- Sending */

struct hedging {
    struct s3_writer *k;
    uint64_t bytes;
};

/* Whether this part is late: everything else is on its way or through, and it takes much longer than its like. */
static bool is_late(void *arg, uint64_t elapsed_ns)
{
    const struct hedging *h = arg;
    struct s3_writer *k = h->k;
    pthread_mutex_lock(&k->synced.lock);
    bool near_end = k->synced.started == k->parts;
    uint64_t bytes = k->synced.sent_bytes, ns = k->synced.sent_ns;
    pthread_mutex_unlock(&k->synced.lock);
    uint64_t usual = bytes ? (uint64_t)((double)ns / (double)bytes * (double)h->bytes) : 0;
    uint64_t limit = bytes ? HEDGE_TIMES * usual : HEDGE_BLIND_MS * 1000000ull;
    uint64_t least = HEDGE_LEAST_MS * 1000000ull;
    return near_end && elapsed_ns > (limit > least ? limit : least);
}

/* Send part i: what was copied, with the n bytes at `last` (0: none) in their place at offset `at` of the part. */
static status *send_part(struct store_writer *w, size_t i, uint64_t at, const void *last, size_t n)
{
    struct s3_writer *k = w->impl;
    const struct part *p = &k->synced.part[i];
    size_t size = (size_t)(p->end - p->begin), count = 0;
    struct http_piece piece[3];
    if (at)
        piece[count++] = (struct http_piece){ p->buffer, (size_t)at };
    if (n)
        piece[count++] = (struct http_piece){ last, n };
    if (at + n < size)
        piece[count++] = (struct http_piece){ p->buffer + at + n, size - n - (size_t)at };
    struct hedging h = { .k = k, .bytes = size };
    pthread_mutex_lock(&k->synced.lock);
    k->synced.started++;
    pthread_mutex_unlock(&k->synced.lock);
    uint64_t begin = clock_ns();
    status *st = s3_multipart_part(k->s, w->key, k->id, (uint32_t)(i + 1), piece, count, is_late, &h, &k->done[i]);
    pthread_mutex_lock(&k->synced.lock);
    if (!st) {
        k->synced.sent_bytes += size;
        k->synced.sent_ns += clock_ns() - begin;
    }
    unsigned char *done_with = k->synced.part[i].buffer;
    k->synced.part[i].sent = true;
    k->synced.part[i].buffer = NULL;
    pthread_mutex_unlock(&k->synced.lock);
    mem_free(done_with);
    return st;
}

/* ---- Writing */

static size_t part_at(const struct s3_writer *k, uint64_t offset)
{
    size_t lo = 0, hi = k->parts;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (k->synced.part[mid].begin <= offset)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Claim n bytes. *last: they complete the part, all others are in its buffer now. There is a buffer, but for a write
 * that is the whole part. */
static status *claim(struct s3_writer *k, struct part *p, size_t n, bool *last)
{
    status *st = NULL;
    pthread_mutex_lock(&k->synced.lock);
    p->claimed += n;
    CHECK(p->claimed <= p->wanted, "writes keep to the extents");
    *last = p->claimed == p->wanted && !k->small;
    while (*last && p->copied < p->claimed - n)
        pthread_cond_wait(&k->synced.copied, &k->synced.lock);
    if (!p->buffer && !(*last && n == p->end - p->begin)) {
        p->buffer = mem_calloc(1, (size_t)(p->end - p->begin));
        st = p->buffer ? NULL : ERR(NO_MEMORY, "a part of %llu bytes", (unsigned long long)(p->end - p->begin));
    }
    pthread_mutex_unlock(&k->synced.lock);
    return st;
}

status *s3_writer_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    struct s3_writer *k = w->impl;
    size_t i = part_at(k, offset);
    struct part *p = &k->synced.part[i];
    n = n < p->end - offset ? n : (size_t)(p->end - offset);
    *put = n;
    bool last;
    TRY(claim(k, p, n, &last));
    if (last)
        return send_part(w, i, offset - p->begin, buf, n);
    memcpy(p->buffer + (offset - p->begin), buf, n);
    pthread_mutex_lock(&k->synced.lock);
    p->copied += n;
    pthread_cond_broadcast(&k->synced.copied);
    pthread_mutex_unlock(&k->synced.lock);
    return NULL;
}

/* ---- The end */

static status *put_small(struct store_writer *w)
{
    struct s3_writer *k = w->impl;
    struct part *p = &k->synced.part[0];
    if (!p->buffer && w->bytes)
        p->buffer = mem_calloc(1, (size_t)w->bytes);
    if (!p->buffer && w->bytes)
        return ERR(NO_MEMORY, "%s: %llu bytes", w->key, (unsigned long long)w->bytes);
    return s3_put(k->s, w->key, p->buffer, (size_t)w->bytes);
}

/* Parts with bytes that nobody wrote: zero. */
static status *send_rest(struct store_writer *w)
{
    struct s3_writer *k = w->impl;
    for (size_t i = 0; i < k->parts; i++) {
        struct part *p = &k->synced.part[i];
        if (p->sent)
            continue;
        if (!p->buffer)
            p->buffer = mem_calloc(1, (size_t)(p->end - p->begin));
        if (!p->buffer)
            return ERR(NO_MEMORY, "%s: a part of %llu bytes", w->key, (unsigned long long)(p->end - p->begin));
        TRY(send_part(w, i, 0, NULL, 0));
    }
    return NULL;
}

status *s3_writer_finish(struct store_writer *w)
{
    struct s3_writer *k = w->impl;
    status *st = k->small ? put_small(w) : send_rest(w);
    if (!st && !k->small)
        st = s3_multipart_complete(k->s, w->key, k->id, k->mark, k->done, k->parts, false);
    if (st && k->begun)
        status_free(s3_multipart_abort(k->s, w->key, k->id)); /* gc does it otherwise */
    writer_free(k);
    return st;
}

void s3_writer_abort(struct store_writer *w)
{
    struct s3_writer *k = w->impl;
    if (k->begun)
        status_free(s3_multipart_abort(k->s, w->key, k->id)); /* gc does it otherwise */
    writer_free(k);
}
