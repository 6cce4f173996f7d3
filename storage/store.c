/* store: what all backends share: choosing one by URI, checking keys and ranges, looping over short transfers,
 * retrying.
 *
 * Invariants: (1) no backend sees a key that store_check_key refuses; (2) no backend sees a write outside the length
 * promised at open; (3) what a backend reports as UNAVAILABLE is tried again a bounded number of times, except finish,
 * which consumes its writer; (4) a list is sorted by name.
 *
 * To read: store_open at the top, then the plain operations, then writers. */
#include "storage/store.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RETRIES = 6, RETRY_FIRST_US = 500, SEGMENT_BYTES = 255, TRANSFER_BYTES = 1 << 30 };

/* Whether to call again: the error is "try later" and tries are left. Takes *st then, and waits 0.5 ms, doubling (32 ms
 * in all). */
static bool retry(struct store *s, status **st, int *tries)
{
    if (status_code(*st) != ST_UNAVAILABLE || s->ops->retries || *tries >= RETRIES)
        return false;
    status_free(*st);
    *st = NULL;
    atomic_fetch_add(&s->retries, 1);
    clock_sleep_us((uint32_t)RETRY_FIRST_US << (*tries)++);
    return true;
}

#define RETRY(s, st, call)                                                                                             \
    do {                                                                                                               \
        int tries_ = 0;                                                                                                \
        do                                                                                                             \
            (st) = (call);                                                                                             \
        while (retry(s, &(st), &tries_));                                                                              \
    } while (0)

/* ---- Opening */

static status *unknown_scheme(const char *uri)
{
    char known[256] = "";
    size_t n = 0;
    for (size_t i = 0; store_registry[i] && n < sizeof known; i++)
        n += (size_t)snprintf(known + n, sizeof known - n, "%s%s:", i ? ", " : "", store_registry[i]->scheme);
    return ERR(INVALID, "%s: no store of that scheme in this build (known: %s; a path with ':' is written file:PATH)",
               uri, known);
}

/* The backend for a URI and what follows its scheme. A text without "scheme:" before its first '/' is a path. */
static status *find_ops(const char *uri, const struct store_ops **ops, const char **path)
{
    size_t n = strcspn(uri, ":/");
    bool bare = uri[n] != ':';
    const char *scheme = bare ? "file" : uri;
    size_t len = bare ? strlen(scheme) : n;
    for (size_t i = 0; store_registry[i]; i++) {
        const char *have = store_registry[i]->scheme;
        if (strlen(have) != len || memcmp(have, scheme, len) != 0)
            continue;
        *ops = store_registry[i];
        *path = bare ? uri : uri + n + 1;
        while (bare && (*path)[0] == '/' && (*path)[1] == '/') /* "//x" is no host here */
            (*path)++;
        return NULL;
    }
    return unknown_scheme(uri);
}

status *store_open(const char *uri, bool create, struct store **out)
{
    const struct store_ops *ops = NULL;
    const char *path = NULL;
    if (!uri || !*uri)
        return ERR(INVALID, "the URL of a store is empty");
    TRY(find_ops(uri, &ops, &path));
    struct store *s = mem_calloc(1, sizeof *s);
    char *copy = mem_strdup(uri);
    status *st = s && copy ? NULL : ERR(NO_MEMORY, "store %s", uri);
    if (!st) {
        *s = (struct store){ .ops = ops, .uri = copy };
        RETRY(s, st, ops->open(s, path, create));
    }
    if (st) {
        mem_free(copy);
        mem_free(s);
        return st;
    }
    *out = s;
    return NULL;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    s->ops->close(s);
    mem_free(s->uri);
    mem_free(s);
}

/* ---- Keys */

static bool key_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
}

/* What is wrong with the segment of n bytes at p, or NULL. */
static const char *segment_fault(const char *p, size_t n)
{
    if (n == 0)
        return "an empty segment";
    if (n > SEGMENT_BYTES)
        return "a segment of more than 255 bytes";
    if (p[0] == '.' && (n == 1 || (n == 2 && p[1] == '.')))
        return "a segment \".\" or \"..\"";
    if (n >= 5 && memcmp(p, ".tmp-", 5) == 0)
        return "a segment that begins with \".tmp-\"";
    for (size_t i = 0; i < n; i++)
        if (!key_char(p[i]))
            return "a character outside [A-Za-z0-9._-]";
    return NULL;
}

status *store_check_key(const char *key)
{
    if (!key || !*key)
        return ERR(INVALID, "the key of an object is empty");
    if (strlen(key) >= STORE_KEY_BYTES)
        return ERR(INVALID, "key %.60s...: longer than %d bytes", key, STORE_KEY_BYTES - 1);
    for (const char *p = key;; p++) {
        size_t n = strcspn(p, "/");
        const char *fault = segment_fault(p, n);
        if (fault)
            return ERR(INVALID, "key \"%s\" has %s", key, fault);
        p += n;
        if (!*p)
            return NULL;
    }
}

/* ---- Objects */

status *store_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    status *st;
    TRY(store_check_key(key));
    RETRY(s, st, s->ops->put(s, key, buf, n, mode));
    return st;
}

/* Up to n bytes, short only at the object's end. */
static status *get_some(struct store *s, bool direct, const char *key, uint64_t offset, void *buf, size_t n,
                        size_t *got)
{
    status *(*get)(struct store *, const char *, uint64_t, void *, size_t, size_t *) =
        direct && s->ops->get_direct ? s->ops->get_direct : s->ops->get;
    size_t done = 0;
    while (done < n) {
        size_t part = n - done < TRANSFER_BYTES ? n - done : TRANSFER_BYTES, k = 0;
        status *st;
        RETRY(s, st, get(s, key, offset + done, (char *)buf + done, part, &k));
        if (st)
            return st;
        if (k == 0)
            break;
        CHECK(k <= part);
        done += k;
    }
    *got = done;
    return NULL;
}

/* The object ends before n bytes from offset. */
static status *too_short(struct store *s, const char *key, uint64_t offset, size_t n)
{
    struct store_info info = { 0 };
    TRY(store_stat(s, key, &info));
    return ERR(CORRUPT, "%s: wanted %zu bytes at offset %llu, but the object has %llu bytes", key, n,
               (unsigned long long)offset, (unsigned long long)info.bytes);
}

static status *get_exactly(struct store *s, bool direct, const char *key, uint64_t offset, void *buf, size_t n)
{
    size_t got;
    TRY(store_check_key(key));
    if (offset > UINT64_MAX - n)
        return ERR(INVALID, "%s: range of %zu bytes at offset %llu", key, n, (unsigned long long)offset);
    TRY(get_some(s, direct, key, offset, buf, n, &got));
    return got == n ? NULL : too_short(s, key, offset, n);
}

status *store_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n)
{
    return get_exactly(s, false, key, offset, buf, n);
}

status *store_get_direct(struct store *s, const char *key, uint64_t offset, void *buf, size_t n)
{
    return get_exactly(s, true, key, offset, buf, n);
}

struct store_stream {
    struct store *s;
    void *impl; /* NULL: gets serve */
    uint64_t at, end;
    char key[STORE_KEY_BYTES];
};

status *store_stream_open(struct store *s, const char *key, uint64_t offset, uint64_t bytes, struct store_stream **out)
{
    TRY(store_check_key(key));
    if (offset > UINT64_MAX - bytes)
        return ERR(INVALID, "%s: range of %llu bytes at offset %llu", key, (unsigned long long)bytes,
                   (unsigned long long)offset);
    struct store_stream *k = mem_calloc(1, sizeof *k);
    if (!k)
        return ERR(NO_MEMORY, "%s: a request", key);
    *k = (struct store_stream){ .s = s, .at = offset, .end = offset + bytes };
    memcpy(k->key, key, strlen(key));
    status *st = s->ops->stream_open ? s->ops->stream_open(s, key, offset, bytes, &k->impl) : NULL;
    if (st) {
        mem_free(k);
        return st;
    }
    *out = k;
    return NULL;
}

status *store_stream_read(struct store_stream *k, void *buf, size_t n)
{
    size_t got = 0;
    CHECK(n <= k->end - k->at);
    if (n == 0)
        return NULL;
    if (k->impl)
        TRY(k->s->ops->stream_read(k->impl, buf, n, &got));
    else
        TRY(get_some(k->s, true, k->key, k->at, buf, n, &got));
    if (got < n)
        return too_short(k->s, k->key, k->at, n);
    k->at += n;
    return NULL;
}

uint64_t store_stream_at(const struct store_stream *k)
{
    return k->at;
}

void store_stream_close(struct store_stream *k)
{
    if (k && k->impl)
        k->s->ops->stream_close(k->impl);
    mem_free(k);
}

status *store_get_all(struct store *s, const char *key, size_t max, void **buf, size_t *n)
{
    struct store_info info;
    TRY(store_stat(s, key, &info));
    if (info.is_dir)
        return ERR(NOT_FOUND, "%s: is a directory", key);
    if (info.bytes > max)
        return ERR(CORRUPT, "%s: %llu bytes, where at most %zu are expected", key, (unsigned long long)info.bytes, max);
    size_t want = (size_t)info.bytes, got;
    char *b = mem_alloc(want + 1);
    if (!b)
        return ERR(NO_MEMORY, "%s: %zu bytes", key, want);
    status *st = get_some(s, false, key, 0, b, want, &got);
    if (st) {
        mem_free(b);
        return st;
    }
    b[got] = 0;
    *buf = b;
    *n = got;
    return NULL;
}

status *store_stat(struct store *s, const char *key, struct store_info *out)
{
    status *st;
    TRY(store_check_key(key));
    RETRY(s, st, s->ops->stat(s, key, out));
    return st;
}

status *store_remove(struct store *s, const char *key)
{
    status *st;
    TRY(store_check_key(key));
    RETRY(s, st, s->ops->remove(s, key));
    return st;
}

status *store_remove_tree(struct store *s, const char *dir)
{
    status *st;
    TRY(store_check_key(dir));
    RETRY(s, st, s->ops->remove_tree(s, dir));
    return st;
}

status *store_rename_tree(struct store *s, const char *from, const char *to)
{
    status *st;
    TRY(store_check_key(from));
    TRY(store_check_key(to));
    if (!s->ops->rename_tree)
        return ERR(UNSUPPORTED, "%s: a %s store cannot rename", from, s->ops->name);
    RETRY(s, st, s->ops->rename_tree(s, from, to));
    return st;
}

status *store_sweep(struct store *s, const char *dir, const char *mark)
{
    status *st;
    TRY(store_check_key(dir));
    TRY(store_check_key(mark)); /* an empty mark would match the living */
    if (!s->ops->sweep)
        return NULL;
    RETRY(s, st, s->ops->sweep(s, dir, mark));
    return st;
}

status *store_now(struct store *s, uint64_t *ns)
{
    status *st;
    RETRY(s, st, s->ops->now(s, ns));
    return st;
}

/* ---- Lists */

status *store_list_add(struct store_list *l, const char *name, const struct store_info *info)
{
    if ((l->count & (l->count - 1)) == 0) { /* full at 0, 1, 2, 4, ... entries */
        struct store_entry *e = mem_array(l->entry, l->count ? 2 * l->count : 1, sizeof *e);
        if (!e)
            return ERR(NO_MEMORY, "a list of %zu names", l->count);
        l->entry = e;
    }
    char *copy = mem_strdup(name);
    if (!copy)
        return ERR(NO_MEMORY, "a list of %zu names", l->count);
    l->entry[l->count++] = (struct store_entry){ .name = copy, .info = *info };
    return NULL;
}

void store_list_free(struct store_list *l)
{
    for (size_t i = 0; i < l->count; i++)
        mem_free(l->entry[i].name);
    mem_free(l->entry);
    *l = (struct store_list){ 0 };
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct store_entry *)a)->name, ((const struct store_entry *)b)->name);
}

status *store_list(struct store *s, const char *dir, struct store_list *out)
{
    if (!dir || *dir)
        TRY(store_check_key(dir));
    struct store_list l = { 0 };
    status *st;
    int tries = 0;
    do {
        store_list_free(&l);
        st = s->ops->list(s, dir, &l);
    } while (retry(s, &st, &tries));
    if (st) {
        store_list_free(&l);
        return st;
    }
    if (l.count)
        qsort(l.entry, l.count, sizeof *l.entry, by_name);
    *out = l;
    return NULL;
}

/* ---- Writers */

static void writer_free(struct store_writer *w)
{
    mem_free(w->key);
    mem_free(w);
}

status *store_writer_open(struct store *s, const char *key, uint64_t bytes, struct store_writer **out)
{
    TRY(store_check_key(key));
    if (bytes > INT64_MAX)
        return ERR(INVALID, "%s: an object of %llu bytes", key, (unsigned long long)bytes);
    struct store_writer *w = mem_calloc(1, sizeof *w);
    if (!w)
        return ERR(NO_MEMORY, "writer of %s", key);
    *w = (struct store_writer){ .store = s, .bytes = bytes, .key = mem_strdup(key) };
    status *st = w->key ? NULL : ERR(NO_MEMORY, "writer of %s", key);
    if (!st)
        RETRY(s, st, s->ops->writer_open(w));
    if (st) {
        writer_free(w);
        return st;
    }
    *out = w;
    return NULL;
}

status *store_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n)
{
    if (offset > w->bytes || n > w->bytes - offset)
        return ERR(INVALID, "%s: write of %zu bytes at offset %llu, past the promised length %llu", w->key, n,
                   (unsigned long long)offset, (unsigned long long)w->bytes);
    for (size_t done = 0; done < n;) {
        size_t part = n - done < TRANSFER_BYTES ? n - done : TRANSFER_BYTES, put = 0;
        status *st;
        RETRY(w->store, st, w->store->ops->write(w, offset + done, (const char *)buf + done, part, &put));
        if (st)
            return st;
        if (put == 0 || put > part)
            return ERR(INTERNAL, "%s: the %s store wrote %zu of %zu bytes and gave no error", w->key,
                       w->store->ops->name, put, part);
        done += put;
    }
    return NULL;
}

status *store_writer_extents(struct store_writer *w, const struct store_extent *e, size_t n)
{
    return w->store->ops->extents ? w->store->ops->extents(w, e, n) : NULL;
}

struct store_direct store_writer_direct(struct store_writer *w)
{
    return w->store->ops->direct ? w->store->ops->direct(w) : (struct store_direct){ 0, 0 };
}

status *store_writer_finish(struct store_writer *w)
{
    status *st = w->store->ops->finish(w);
    writer_free(w);
    return st;
}

void store_writer_abort(struct store_writer *w)
{
    if (!w)
        return;
    w->store->ops->abort(w);
    writer_free(w);
}
