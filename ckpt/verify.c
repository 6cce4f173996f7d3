/* verify: read every byte of a step and say what is not as it was written.
 *
 * Invariant: each byte of each file is judged exactly once, by the header's checksum, by the checksum of the block it
 * lies in, or by being zero (padding between datasets). A file's regions are walked in the order of its payloads:
 * header, gap, payload, gap, ..., end. One line a damage; what a short file has lost is told once for the file and once
 * for each tensor that lost bytes. */
#include "ckpt/commit.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_BYTES = 1024 };

struct region {
    const struct meta_tensor *tensor;
    const struct meta_piece *piece;
};

struct verify {
    struct store *store;
    const struct metadata *m;
    void (*found)(void *arg, const char *line);
    void *arg;
    unsigned char *buf; /* [META_BLOCK_BYTES] */
    struct verify_result r;
};

/* The file being walked. */
struct walk {
    struct verify *v;
    const struct meta_file *file;
    char key[STORE_KEY_BYTES];
    uint64_t have; /* bytes that are there */
};

static void damage(struct verify *v, uint64_t step, const char *file, const char *fmt, ...) PRINTF(4, 5);
static void damage(struct verify *v, uint64_t step, const char *file, const char *fmt, ...)
{
    char line[LINE_BYTES];
    int n = snprintf(line, sizeof line, "step %" PRIu64 ": %.300s: ", step, file);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line + n, sizeof line - (size_t)n, fmt, ap);
    va_end(ap);
    v->r.damages++;
    if (v->found)
        v->found(v->arg, line);
}

static int by_place(const void *a, const void *b)
{
    const struct meta_piece *x = ((const struct region *)a)->piece, *y = ((const struct region *)b)->piece;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* Every piece with bytes, by file and offset. */
static status *sort_regions(const struct metadata *m, struct region **out, uint64_t *count)
{
    struct region *r = mem_array(NULL, (size_t)m->piece_count + 1, sizeof *r);
    uint64_t n = 0;
    if (!r)
        return ERR(NO_MEMORY, "a list of %" PRIu64 " pieces", m->piece_count);
    for (uint64_t t = 0; t < m->tensor_count; t++)
        for (uint64_t p = 0; p < m->tensor[t].piece_count; p++) {
            const struct meta_piece *piece = &m->piece[m->tensor[t].first_piece + p];
            if (piece->bytes)
                r[n++] = (struct region){ &m->tensor[t], piece };
        }
    qsort(r, n, sizeof *r, by_place);
    *out = r;
    *count = n;
    return NULL;
}

/* n bytes into the buffer; false with *st NULL: they are not there (a file cut short while we read). */
static bool read_bytes(struct walk *w, uint64_t offset, size_t n, status **st)
{
    if (offset + n <= w->have)
        *st = store_get(w->v->store, w->key, offset, w->v->buf, n);
    else
        *st = NULL;
    if (!*st && offset + n <= w->have) {
        w->v->r.bytes += n;
        return true;
    }
    if (status_code(*st) == ST_CORRUPT || status_code(*st) == ST_NOT_FOUND) {
        status_free(*st);
        *st = NULL;
    }
    return false;
}

static status *verify_header(struct walk *w)
{
    struct verify *v = w->v;
    uint32_t crc = 0;
    for (uint64_t at = 0; at < w->file->header_bytes;) {
        uint64_t left = w->file->header_bytes - at;
        size_t n = left < META_BLOCK_BYTES ? (size_t)left : META_BLOCK_BYTES;
        status *st;
        if (!read_bytes(w, at, n, &st)) {
            if (!st)
                damage(v, v->m->step, w->file->name, "header: bytes at offset %" PRIu64 " are not there", at);
            return st;
        }
        crc = crc32c(crc, v->buf, n);
        at += n;
    }
    if (crc != w->file->header_crc)
        damage(v, v->m->step, w->file->name, "header: checksum of bytes 0 to %" PRIu64 " is %08x, not %08x",
               w->file->header_bytes, crc, w->file->header_crc);
    return NULL;
}

static status *verify_zero(struct walk *w, uint64_t begin, uint64_t end)
{
    struct verify *v = w->v;
    for (uint64_t at = begin; at < end && at < w->have;) {
        uint64_t left = (end < w->have ? end : w->have) - at;
        size_t n = left < META_BLOCK_BYTES ? (size_t)left : META_BLOCK_BYTES;
        status *st;
        if (!read_bytes(w, at, n, &st))
            return st; /* what a file has lost is told already */
        for (size_t i = 0; i < n; i++)
            if (v->buf[i]) {
                damage(v, v->m->step, w->file->name, "padding: byte at offset %" PRIu64 " is 0x%02x, not 0", at + i,
                       v->buf[i]);
                return NULL;
            }
        at += n;
    }
    return NULL;
}

static status *verify_piece(struct walk *w, const struct region *r)
{
    struct verify *v = w->v;
    const struct meta_piece *p = r->piece;
    for (uint64_t b = 0; b < meta_blocks(p->bytes); b++) {
        uint64_t at = b * META_BLOCK_BYTES, left = p->bytes - at;
        size_t n = left < META_BLOCK_BYTES ? (size_t)left : META_BLOCK_BYTES;
        status *st;
        if (!read_bytes(w, p->offset + at, n, &st)) {
            if (!st)
                damage(v, v->m->step, w->file->name, "tensor %s/%s: bytes at offset %" PRIu64 " are not there",
                       r->tensor->part, r->tensor->name, p->offset + at);
            return st;
        }
        uint32_t crc = crc32c(0, v->buf, n), want = v->m->crc[p->first_crc + b];
        if (crc != want)
            damage(v, v->m->step, w->file->name,
                   "tensor %s/%s: checksum of %zu bytes at offset %" PRIu64 " is %08x, not %08x", r->tensor->part,
                   r->tensor->name, n, p->offset + at, crc, want);
    }
    return NULL;
}

/* The length, and whether there is anything to read. */
static status *verify_length(struct walk *w, bool *there)
{
    struct verify *v = w->v;
    struct store_info info = { 0 };
    *there = false;
    status *st = store_stat(v->store, w->key, &info);
    if (status_code(st) == ST_NOT_FOUND || (!st && info.is_dir)) {
        status_free(st);
        damage(v, v->m->step, w->file->name, "the file is missing");
        return NULL;
    }
    if (st)
        return st;
    if (info.bytes != w->file->bytes)
        damage(v, v->m->step, w->file->name, "%" PRIu64 " bytes, not %" PRIu64 "; differs from offset %" PRIu64,
               info.bytes, w->file->bytes, info.bytes < w->file->bytes ? info.bytes : w->file->bytes);
    w->have = info.bytes < w->file->bytes ? info.bytes : w->file->bytes;
    *there = true;
    return NULL;
}

static status *verify_file(struct verify *v, const struct meta_file *file, const struct region *r, uint64_t count)
{
    struct walk w = { .v = v, .file = file };
    bool there;
    TRY(commit_file_key(v->m->step, file->name, w.key));
    v->r.files++;
    TRY(verify_length(&w, &there));
    if (!there)
        return NULL;
    TRY(verify_header(&w));
    uint64_t at = file->header_bytes;
    for (uint64_t i = 0; i < count; i++) {
        TRY(verify_zero(&w, at, r[i].piece->offset));
        TRY(verify_piece(&w, &r[i]));
        at = r[i].piece->offset + r[i].piece->bytes;
    }
    return verify_zero(&w, at, file->bytes);
}

static status *verify_files(struct verify *v)
{
    struct region *r = NULL;
    uint64_t count = 0, first = 0;
    TRY(sort_regions(v->m, &r, &count));
    status *st = NULL;
    for (uint64_t f = 0; f < v->m->file_count && !st; f++) {
        uint64_t end = first;
        while (end < count && r[end].piece->file == f)
            end++;
        st = verify_file(v, &v->m->file[f], r + first, end - first);
        first = end;
    }
    mem_free(r);
    return st;
}

status *commit_verify(struct store *s, uint64_t step, void (*found)(void *arg, const char *line), void *arg,
                      struct verify_result *out)
{
    struct verify v = { .store = s, .found = found, .arg = arg };
    char key[STORE_KEY_BYTES];
    void *bytes;
    size_t n;
    struct metadata *m = NULL;
    TRY(commit_file_key(step, "metadata.pb", key));
    status *st = store_get_all(s, key, MAX_METADATA_BYTES, &bytes, &n);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return ERR(NOT_FOUND, "step %" PRIu64 " is not committed", step);
    }
    if (!st) {
        v.r.bytes = n;
        st = metadata_decode(bytes, n, &m);
        mem_free(bytes);
    }
    if (!st && m->step != step)
        st = ERR(CORRUPT, "it is of step %" PRIu64, m->step);
    if (status_code(st) == ST_CORRUPT) {
        damage(&v, step, "metadata.pb", "%s", status_message(st));
        status_free(st);
        st = NULL;
    } else if (!st) {
        v.m = m;
        v.r.tensors = m->tensor_count;
        v.buf = mem_alloc(META_BLOCK_BYTES);
        st = v.buf ? verify_files(&v) : ERR(NO_MEMORY, "a block of %d bytes", META_BLOCK_BYTES);
    }
    mem_free(v.buf);
    metadata_free(m);
    if (!st)
        *out = v.r;
    return st;
}
