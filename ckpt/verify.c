/* verify: read every byte of a step and say what is not as it was written.
 *
 * Invariant: each byte of each of the step's own files is judged exactly once, by the header's checksum, by the
 * checksum of the block it lies in, or by being zero (padding between datasets). A file's regions are walked in the
 * order of its payloads: header, gap, payload, gap, ..., end. One line a damage; what a short file has lost is told
 * once for the file and once for each tensor that lost bytes. Of an owner's files (metadata.h) just the payloads that
 * the step refers to are judged: the rest is the owner's own.
 *
 * The walk is cut into units (list_units): a header, a gap, up to UNIT_BYTES of a payload. Units are independent, so
 * ranks take stretches of the list and threads take units of a stretch; what they found is put back into the list's
 * order before it is told, so the report does not depend on how many there were. */
#include "ckpt/verify.h"

#include "ckpt/refs.h"
#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_BYTES = 2048, UNIT_BYTES = 16 << 20 };
#define MISSING UINT64_MAX

struct region {
    const struct meta_tensor *tensor;
    const struct meta_piece *piece;
};

enum unit_kind { UNIT_LENGTH, UNIT_HEADER, UNIT_GAP, UNIT_PAYLOAD };

struct unit {
    enum unit_kind kind;
    uint32_t file;
    struct region region; /* of a payload */
    uint64_t begin, end;  /* bytes of the file; of a payload, of the piece */
};

struct unit_list {
    struct unit *unit;
    size_t count, cap;
};

struct finding {
    size_t unit, order;
    char *line;
};

struct verify {
    const struct verify_options *o;
    struct store *store;
    uint64_t step;
    const struct metadata *m;
    struct origins from;
    uint64_t *have; /* [files] their length as it is; MISSING */
    struct unit_list units;
    size_t first;   /* of this rank's stretch */
    uint64_t total; /* bytes of it */
    struct {
        pthread_mutex_t lock;
        struct finding *found;
        size_t count, cap;
        uint64_t bytes; /* read */
        status *error;  /* of the unit error_unit, the first in order of those that failed */
        size_t error_unit;
    } synced;
};

/* A unit being walked. */
struct walk {
    struct verify *v;
    size_t unit;
    const struct meta_file *file;
    char key[STORE_KEY_BYTES];
    char name[REFS_WORDS + 256]; /* the file's, for messages, and whose it is */
    uint64_t have;               /* bytes that are there of those that should be */
    uint64_t bytes;              /* read */
    unsigned char *buf;          /* [META_BLOCK_BYTES] */
};

/* ---- Findings */

static void add_finding(struct verify *v, size_t unit, const char *line)
{
    pthread_mutex_lock(&v->synced.lock);
    if (v->synced.count == v->synced.cap) {
        size_t cap = v->synced.cap ? 2 * v->synced.cap : 16;
        struct finding *more = mem_array(v->synced.found, cap, sizeof *more);
        if (more) {
            v->synced.found = more;
            v->synced.cap = cap;
        }
    }
    char *copy = v->synced.count < v->synced.cap ? mem_strdup(line) : NULL;
    if (copy) {
        v->synced.found[v->synced.count] = (struct finding){ unit, v->synced.count, copy };
        v->synced.count++;
    } else {
        v->synced.error = status_first(v->synced.error, ERR(NO_MEMORY, "a list of damages"));
    }
    pthread_mutex_unlock(&v->synced.lock);
}

static void damage(struct verify *v, size_t unit, const char *file, const char *fmt, ...) PRINTF(4, 5);
static void damage(struct verify *v, size_t unit, const char *file, const char *fmt, ...)
{
    char line[LINE_BYTES];
    int n = snprintf(line, sizeof line, "step %" PRIu64 ": %.1300s: ", v->step, file);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line + n, sizeof line - (size_t)n, fmt, ap);
    va_end(ap);
    add_finding(v, unit, line);
}

static int by_unit(const void *a, const void *b)
{
    const struct finding *x = a, *y = b;
    if (x->unit != y->unit)
        return x->unit < y->unit ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

static void keep_error(struct verify *v, size_t unit, status *st)
{
    if (!st)
        return;
    pthread_mutex_lock(&v->synced.lock);
    if (!v->synced.error || unit < v->synced.error_unit) {
        status_free(v->synced.error);
        v->synced.error = st;
        v->synced.error_unit = unit;
    } else {
        status_free(st);
    }
    pthread_mutex_unlock(&v->synced.lock);
}

/* ---- Units */

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

static status *add_unit(struct unit_list *l, struct unit u)
{
    if (l->count == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        struct unit *more = mem_array(l->unit, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "a list of %zu units", cap);
        l->unit = more;
        l->cap = cap;
    }
    l->unit[l->count++] = u;
    return NULL;
}

static status *add_gap(struct unit_list *l, uint32_t file, uint64_t begin, uint64_t end)
{
    return begin < end ? add_unit(l, (struct unit){ .kind = UNIT_GAP, .file = file, .begin = begin, .end = end })
                       : NULL;
}

/* Units end with the first that a short file has not got whole: its tensor's loss is told once. */
static status *add_payload(struct unit_list *l, const struct region *r, uint64_t have)
{
    const struct meta_piece *p = r->piece;
    for (uint64_t at = 0; at < p->bytes; at += UNIT_BYTES) {
        struct unit u = { .kind = UNIT_PAYLOAD, .file = p->file, .region = *r, .begin = at };
        u.end = p->bytes - at < UNIT_BYTES ? p->bytes : at + UNIT_BYTES;
        TRY(add_unit(l, u));
        if (p->offset + u.end > have)
            return NULL;
    }
    return NULL;
}

static uint64_t there(const struct verify *v, uint32_t f)
{
    return v->have[f] < v->m->file[f].bytes ? v->have[f] : v->m->file[f].bytes;
}

static status *list_file(struct verify *v, uint32_t f, const struct region *r, uint64_t count)
{
    const struct meta_file *file = &v->m->file[f];
    struct unit_list *l = &v->units;
    if (v->have[f] != file->bytes)
        TRY(add_unit(l, (struct unit){ .kind = UNIT_LENGTH, .file = f }));
    if (v->have[f] == MISSING)
        return NULL;
    if (!file->owner)
        TRY(add_unit(l, (struct unit){ .kind = UNIT_HEADER, .file = f, .end = file->header_bytes }));
    uint64_t at = file->header_bytes;
    for (uint64_t i = 0; i < count; i++) {
        if (!file->owner)
            TRY(add_gap(l, f, at, r[i].piece->offset));
        TRY(add_payload(l, &r[i], there(v, f)));
        at = r[i].piece->offset + r[i].piece->bytes;
    }
    return file->owner ? NULL : add_gap(l, f, at, file->bytes);
}

static status *list_units(struct verify *v)
{
    struct region *r = NULL;
    uint64_t count = 0, first = 0;
    TRY(sort_regions(v->m, &r, &count));
    status *st = NULL;
    for (uint32_t f = 0; f < v->m->file_count && !st; f++) {
        uint64_t end = first;
        while (end < count && r[end].piece->file == f)
            end++;
        st = list_file(v, f, r + first, end - first);
        first = end;
    }
    mem_free(r);
    return st;
}

/* ---- Reading a unit */

/* n bytes into the buffer; false with *st NULL: they are not there (a file cut short while we read). */
static bool read_bytes(struct walk *w, uint64_t offset, size_t n, status **st)
{
    bool whole = offset + n <= w->have;
    *st = whole ? store_get(origins_store(&w->v->from, w->file), w->key, offset, w->buf, n) : NULL;
    if (!*st && whole) {
        w->bytes += n;
        return true;
    }
    if (status_code(*st) == ST_CORRUPT || status_code(*st) == ST_NOT_FOUND) {
        status_free(*st);
        *st = NULL;
    }
    return false;
}

static void tell_length(struct walk *w)
{
    struct verify *v = w->v;
    uint64_t have = v->have[w->file - v->m->file], want = w->file->bytes;
    if (have == MISSING)
        damage(v, w->unit, w->name, "the file is missing");
    else
        damage(v, w->unit, w->name, "%" PRIu64 " bytes, not %" PRIu64 "; differs from offset %" PRIu64, have, want,
               have < want ? have : want);
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
                damage(v, w->unit, w->name, "header: bytes at offset %" PRIu64 " are not there", at);
            return st;
        }
        crc = crc32c(crc, w->buf, n);
        at += n;
    }
    if (crc != w->file->header_crc)
        damage(v, w->unit, w->name, "header: checksum of bytes 0 to %" PRIu64 " is %08x, not %08x",
               w->file->header_bytes, crc, w->file->header_crc);
    return NULL;
}

static status *verify_zero(struct walk *w, uint64_t begin, uint64_t end)
{
    for (uint64_t at = begin; at < end && at < w->have;) {
        uint64_t left = (end < w->have ? end : w->have) - at;
        size_t n = left < META_BLOCK_BYTES ? (size_t)left : META_BLOCK_BYTES;
        status *st;
        if (!read_bytes(w, at, n, &st))
            return st; /* what a file has lost is told already */
        for (size_t i = 0; i < n; i++)
            if (w->buf[i]) {
                damage(w->v, w->unit, w->name, "padding: byte at offset %" PRIu64 " is 0x%02x, not 0", at + i,
                       w->buf[i]);
                return NULL;
            }
        at += n;
    }
    return NULL;
}

/* Bytes [begin, end) of a piece; begin is a block's. */
static status *verify_payload(struct walk *w, const struct region *r, uint64_t begin, uint64_t end)
{
    struct verify *v = w->v;
    const struct meta_piece *p = r->piece;
    for (uint64_t at = begin; at < end; at += META_BLOCK_BYTES) {
        size_t n = end - at < META_BLOCK_BYTES ? (size_t)(end - at) : META_BLOCK_BYTES;
        status *st;
        if (!read_bytes(w, p->offset + at, n, &st)) {
            if (!st)
                damage(v, w->unit, w->name, "tensor %s/%s: bytes at offset %" PRIu64 " are not there", r->tensor->part,
                       r->tensor->name, p->offset + at);
            return st;
        }
        uint32_t crc = crc32c(0, w->buf, n), want = v->m->crc[p->first_crc + at / META_BLOCK_BYTES];
        if (crc != want)
            damage(v, w->unit, w->name, "tensor %s/%s: checksum of %zu bytes at offset %" PRIu64 " is %08x, not %08x",
                   r->tensor->part, r->tensor->name, n, p->offset + at, crc, want);
    }
    return NULL;
}

static status *verify_unit(struct walk *w, const struct unit *u)
{
    char words[REFS_WORDS];
    TRY(origins_key(w->v->m, w->file, w->key));
    refs_words(w->v->m, w->file, words);
    snprintf(w->name, sizeof w->name, "%s%s", words, w->file->name);
    switch (u->kind) {
    case UNIT_LENGTH:
        tell_length(w);
        return NULL;
    case UNIT_HEADER:
        return verify_header(w);
    case UNIT_GAP:
        return verify_zero(w, u->begin, u->end);
    default:
        return verify_payload(w, &u->region, u->begin, u->end);
    }
}

/* Unit i of this rank's stretch, on any thread. */
static void run_unit(void *arg, size_t i)
{
    struct verify *v = arg;
    const struct unit *u = &v->units.unit[v->first + i];
    pthread_mutex_lock(&v->synced.lock);
    bool failed = v->synced.error != NULL;
    pthread_mutex_unlock(&v->synced.lock);
    if (failed)
        return;
    struct walk w = { .v = v, .unit = v->first + i, .file = &v->m->file[u->file], .have = there(v, u->file) };
    w.buf = mem_alloc(META_BLOCK_BYTES);
    status *st = w.buf ? verify_unit(&w, u) : ERR(NO_MEMORY, "a block of %d bytes", META_BLOCK_BYTES);
    mem_free(w.buf);
    keep_error(v, w.unit, st);
    pthread_mutex_lock(&v->synced.lock);
    v->synced.bytes += w.bytes;
    if (v->o->progress)
        v->o->progress(v->o->progress_arg, w.bytes, v->total);
    pthread_mutex_unlock(&v->synced.lock);
}

/* ---- The step, on all ranks */

/* Rank 0: metadata.pb's bytes; none if it is damaged, which is found then. */
static status *read_metadata(struct verify *v, void **bytes, size_t *n)
{
    char key[STORE_KEY_BYTES];
    struct metadata *m = NULL;
    TRY(commit_file_key(v->step, "metadata.pb", key));
    status *st = store_get_all(v->store, key, MAX_METADATA_BYTES, bytes, n);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return ERR(NOT_FOUND, "step %" PRIu64 " is not committed", v->step);
    }
    if (!st) {
        v->synced.bytes = *n;
        st = metadata_decode(*bytes, *n, &m);
    }
    if (!st && m->step != v->step)
        st = ERR(CORRUPT, "it is of step %" PRIu64, m->step);
    metadata_free(m);
    if (status_code(st) == ST_CORRUPT) {
        damage(v, 0, "metadata.pb", "%s", status_message(st));
        status_free(st);
        st = NULL;
        *n = 0;
    }
    return st;
}

/* Rank 0: how long the files are. */
static status *read_lengths(struct verify *v)
{
    for (uint64_t f = 0; f < v->m->file_count; f++) {
        char key[STORE_KEY_BYTES];
        struct store_info info = { 0 };
        TRY(origins_key(v->m, &v->m->file[f], key));
        status *st = store_stat(origins_store(&v->from, &v->m->file[f]), key, &info);
        v->have[f] = info.bytes;
        if (status_code(st) == ST_NOT_FOUND || (!st && info.is_dir)) {
            status_free(st);
            st = NULL;
            v->have[f] = MISSING;
        }
        TRY(st);
    }
    return NULL;
}

static status *share_bytes(struct comm *c, status *st, void **bytes, size_t *n)
{
    if (!c)
        return st;
    TRY(comm_agree(c, st));
    return comm_bcast_bytes(c, bytes, n, 0);
}

/* The same units on every rank. Without any: metadata.pb is damaged, or there is nothing. */
static status *prepare(struct verify *v, struct metadata **m)
{
    struct comm *c = v->o->comm;
    bool leads = !c || c->rank == 0;
    void *bytes = NULL;
    size_t n = 0;
    status *st = share_bytes(c, leads ? read_metadata(v, &bytes, &n) : NULL, &bytes, &n);
    if (!st && n)
        st = metadata_decode(bytes, n, m);
    mem_free(bytes);
    v->m = *m;
    if (!st && n)
        v->have = mem_calloc(v->m->file_count + 1, sizeof *v->have);
    if (!st && n && !v->have)
        st = ERR(NO_MEMORY, "a list of %" PRIu64 " files", v->m->file_count);
    if (!st && n)
        st = origins_open(v->store, v->m, &v->from);
    if (!st && n && leads)
        st = read_lengths(v);
    if (c)
        st = comm_agree(c, st);
    if (status_code(st) == ST_CORRUPT) { /* an owner's root is not there */
        if (leads)
            damage(v, 0, "metadata.pb", "%s", status_message(st));
        status_free(st);
        return NULL;
    }
    TRY(st);
    if (!st && n && c)
        st = comm_bcast(c, v->have, (size_t)v->m->file_count * sizeof *v->have, 0, NULL);
    if (!st && n)
        st = list_units(v);
    return c ? comm_agree(c, st) : st;
}

/* This rank's stretch of the list, by bytes. */
static void take_stretch(struct verify *v, size_t *count)
{
    struct comm *c = v->o->comm;
    uint64_t ranks = c ? (uint64_t)c->size : 1, rank = c ? (uint64_t)c->rank : 0, total = 0, at = 0;
    size_t first = v->units.count, end = 0;
    for (size_t i = 0; i < v->units.count; i++)
        total += v->units.unit[i].end - v->units.unit[i].begin + 1; /* + 1: each costs something */
    for (size_t i = 0; i < v->units.count; i++) {
        if ((uint64_t)((unsigned __int128)at * ranks / total) == rank) {
            first = i < first ? i : first;
            end = i + 1;
            v->total += v->units.unit[i].end - v->units.unit[i].begin;
        }
        at += v->units.unit[i].end - v->units.unit[i].begin + 1;
    }
    v->first = first;
    *count = end > first ? end - first : 0;
}

/* Lines one after another, each with its NUL. */
static char *join_lines(const struct verify *v, size_t *bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < v->synced.count; i++)
        n += strlen(v->synced.found[i].line) + 1;
    char *text = mem_alloc(n + 1), *at = text;
    for (size_t i = 0; text && i < v->synced.count; i++, at += strlen(at) + 1)
        memcpy(at, v->synced.found[i].line, strlen(v->synced.found[i].line) + 1);
    *bytes = n;
    return text;
}

/* Tell rank 0's caller, in the order of the list: stretches follow each other by rank. */
static status *tell(struct verify *v, uint64_t *damages)
{
    struct comm *c = v->o->comm;
    if (v->synced.count)
        qsort(v->synced.found, v->synced.count, sizeof *v->synced.found, by_unit);
    size_t n = 0, *counts = NULL;
    char *mine = join_lines(v, &n), *all = NULL;
    status *st = mine ? NULL : ERR(NO_MEMORY, "%zu damages", v->synced.count);
    if (c) {
        st = comm_agree(c, st);
        if (!st)
            st = comm_gather_bytes(c, mine, n, 0, (void **)&all, &counts);
        n = 0;
        for (int r = 0; counts && r < c->size; r++)
            n += counts[r];
    }
    const char *text = c ? all : mine;
    for (const char *at = text; !st && text && at < text + n; at += strlen(at) + 1) {
        ++*damages;
        if (v->o->found)
            v->o->found(v->o->arg, at);
    }
    mem_free(mine);
    mem_free(all);
    mem_free(counts);
    return st;
}

static status *run_units(struct verify *v)
{
    struct workers *w = NULL;
    size_t count = 0;
    take_stretch(v, &count);
    TRY(workers_open(v->o->threads > 1 ? v->o->threads : 1, &w));
    workers_for(w, count, run_unit, v);
    workers_close(w);
    status *st = v->synced.error;
    v->synced.error = NULL;
    return st;
}

static status *finish(struct verify *v, struct verify_result *out)
{
    struct comm *c = v->o->comm;
    struct verify_result r = { .bytes = v->synced.bytes };
    TRY(tell(v, &r.damages));
    uint64_t sum[2] = { r.bytes, r.damages };
    if (c)
        TRY(comm_allreduce(c, sum, 2, COMM_U64, COMM_SUM, NULL));
    r.bytes = sum[0];
    r.damages = sum[1];
    r.files = v->m ? v->m->file_count : 0;
    r.tensors = v->m ? v->m->tensor_count : 0;
    *out = r;
    return NULL;
}

status *verify_step(struct store *s, uint64_t step, const struct verify_options *o, struct verify_result *out)
{
    struct verify v = { .o = o, .store = s, .step = step };
    struct metadata *m = NULL;
    pthread_mutex_init(&v.synced.lock, NULL);
    status *st = prepare(&v, &m);
    if (!st) {
        st = run_units(&v);
        if (o->comm)
            st = comm_agree(o->comm, st);
    }
    if (!st)
        st = finish(&v, out);
    status_free(v.synced.error);
    for (size_t i = 0; i < v.synced.count; i++)
        mem_free(v.synced.found[i].line);
    mem_free(v.synced.found);
    mem_free(v.units.unit);
    mem_free(v.have);
    origins_close(&v.from);
    metadata_free(m);
    pthread_mutex_destroy(&v.synced.lock);
    return st;
}

status *commit_verify(struct store *s, uint64_t step, void (*found)(void *arg, const char *line), void *arg,
                      struct verify_result *out)
{
    struct verify_options o = { .found = found, .arg = arg };
    return verify_step(s, step, &o, out);
}
