/* store_s3: objects in a bucket: s3://BUCKET or s3://BUCKET/PREFIX. docs/s3.md says what is guaranteed on which server.
 *
 * A directory is what keys imply; it comes and goes with the objects below it. Names that begin with ".tmp-" (claims,
 * probes) are left out of lists by the same check that refuses them as keys. There is no renaming: a server can only
 * copy, and a copy that stops in between would show a step twice or not at all. */
#include "comm/base/mem.h"
#include "storage/s3_call.h"
#include "storage/s3_list.h"
#include "storage/s3_multipart.h"
#include "storage/s3_put.h"
#include "storage/s3_writer.h"
#include "storage/store.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PUT_MOST = 1 << 30, STREAMS = 8, READ_BYTES = 16 << 20 };

/* ---- Opening */

static status *s3_store_open(struct store *s, const char *path, bool create)
{
    struct s3 *b = mem_calloc(1, sizeof *b);
    bool any = false;
    if (!b)
        return ERR(NO_MEMORY, "store %s", s->uri);
    status *st = s3_open(path, &s->retries, b);
    if (st) {
        mem_free(b);
        return st;
    }
    /* The first request shows whether address, credentials, region and bucket are right. */
    st = s3_any_below(b, "", &any);
    if (!st && !create && !any)
        st = ERR(NOT_FOUND, "%s: nothing is there", s->uri);
    if (st) {
        s3_close(b);
        mem_free(b);
        return st;
    }
    s->impl = b;
    return NULL;
}

static void s3_store_close(struct store *s)
{
    s3_close(s->impl);
    mem_free(s->impl);
}

/* ---- Objects */

static status *s3_store_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    if (n > PUT_MOST)
        return ERR(INVALID, "%s: %zu bytes in one put; %d at most", key, n, PUT_MOST);
    return mode == STORE_EXCLUSIVE ? s3_put_exclusive(s->impl, key, buf, n) : s3_put(s->impl, key, buf, n);
}

/* "bytes 5-9/100" */
static bool content_range(const struct http_reply *r, uint64_t *first, uint64_t *total)
{
    char text[80], *end;
    if (!http_header(r, "content-range", text, sizeof text) || strncmp(text, "bytes ", 6) != 0)
        return false;
    *first = strtoull(text + 6, &end, 10);
    if (*end != '-')
        return false;
    strtoull(end + 1, &end, 10);
    if (*end != '/' || end[1] < '0' || end[1] > '9')
        return false;
    *total = strtoull(end + 1, &end, 10);
    return !*end;
}

/* A get under way: what has come stays, and a try begins where the one before broke. */
struct getting {
    struct s3 *b;
    const char *key;
    uint64_t offset;
    char *buf;
    size_t n, done;
    uint64_t more;            /* bytes that are wanted behind these, of the same request */
    char etag[S3_ETAG_BYTES]; /* of the first reply: later ones must be of the same object */
    uint64_t total;           /* bytes of the object; 0: not known yet */
    bool at_end;
    struct s3_tries tries;
    struct http_reply reply;
};

/* Whether a 2xx is what was asked for. */
static status *check_part(struct getting *g)
{
    const struct http_reply *r = &g->reply;
    uint64_t from = g->offset + g->done, first, total;
    if (r->status != 206 || !content_range(r, &first, &total) || first != from || total <= from)
        return ERR(IO, "%s: asked for bytes from %" PRIu64 " on, the server sent others (HTTP %d)", g->key, from,
                   r->status);
    uint64_t want = total - from < g->n - g->done ? total - from : g->n - g->done;
    if (r->got > want)
        return ERR(IO, "%s: asked for %" PRIu64 " bytes at %" PRIu64 ", the server sent more", g->key, want, from);
    if (!g->etag[0])
        (void)http_header(r, "etag", g->etag, sizeof g->etag);
    g->total = total;
    return NULL;
}

static status *get_try(struct getting *g)
{
    char range[64];
    struct http_reply *r = &g->reply;
    uint64_t from = g->offset + g->done;
    snprintf(range, sizeof range, "bytes=%" PRIu64 "-%" PRIu64, from, from + (g->n - g->done) + g->more - 1);
    const struct s3_call c = { .method = "GET",
                               .key = g->key,
                               .header = { { "range", range }, { g->etag[0] ? "if-match" : NULL, g->etag } },
                               .into = g->buf + g->done,
                               .room = g->n - g->done,
                               .more = g->more };
    status *st = s3_try(g->b, &c, &g->tries, r);
    if (r->status == 416 && st) { /* the object ends before */
        status_free(st);
        g->at_end = true;
        return NULL;
    }
    if (r->status == 412 && st) { /* replaced meanwhile: from the beginning, of the new one */
        status_free(st);
        g->done = 0;
        g->etag[0] = 0;
        g->total = 0;
        return ERR(UNAVAILABLE, "%s: replaced while it was read", g->key);
    }
    if (r->got) {
        st = status_first(check_part(g), st);
        if (!st || status_code(st) == ST_UNAVAILABLE)
            g->done += r->got;
        else
            http_leave(g->b->http, r);
    }
    return st;
}

static status *get_more(struct getting *g)
{
    status *st = http_more(g->b->http, &g->reply, g->buf + g->done, g->n - g->done, g->more);
    g->done += g->reply.got;
    return st;
}

/* Fill buf, from the reply that is under way or by a request. Short only at the object's end. */
static status *fill(struct getting *g)
{
    while (g->done < g->n && !g->at_end) {
        size_t before = g->done;
        bool more = g->reply.rest;
        status *st = more ? get_more(g) : get_try(g);
        bool again = st && s3_again(g->b, &g->tries, &g->reply, &st);
        http_reply_free(&g->reply);
        g->at_end = g->at_end || (g->total && g->offset + g->done == g->total);
        if (st && !again)
            return st;
        if (g->done > before)
            g->tries.first_failure_ns = 0; /* it goes on */
        else if (!again && !more && !g->at_end)
            return ERR(IO, "%s: an empty reply at %" PRIu64, g->key, g->offset + g->done);
    }
    return NULL;
}

static status *s3_store_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    struct getting g = { .b = s->impl, .key = key, .offset = offset, .buf = buf, .n = n };
    if (offset > INT64_MAX - (uint64_t)n)
        return ERR(INVALID, "%s: offset %" PRIu64, key, offset);
    TRY(fill(&g));
    *got = g.done;
    return NULL;
}

/* Many gets that are one request: a server takes time for each. */
struct s3_stream {
    struct getting g;
    uint64_t end;
    char key[STORE_KEY_BYTES];
};

static status *s3_stream_open(struct store *s, const char *key, uint64_t offset, uint64_t bytes, void **impl)
{
    if (offset > INT64_MAX - bytes)
        return ERR(INVALID, "%s: offset %" PRIu64, key, offset);
    struct s3_stream *k = mem_calloc(1, sizeof *k);
    if (!k)
        return ERR(NO_MEMORY, "a request");
    snprintf(k->key, sizeof k->key, "%s", key);
    k->g = (struct getting){ .b = s->impl, .key = k->key, .offset = offset };
    k->end = offset + bytes;
    *impl = k;
    return NULL;
}

static status *s3_stream_read(void *impl, void *buf, size_t n, size_t *got)
{
    struct s3_stream *k = impl;
    struct getting *g = &k->g;
    g->offset += g->done;
    g->buf = buf;
    g->n = n;
    g->done = 0;
    g->more = k->end - g->offset - n;
    TRY(fill(g));
    *got = g->done;
    return NULL;
}

static void s3_stream_close(void *impl)
{
    struct s3_stream *k = impl;
    http_leave(k->g.b->http, &k->g.reply);
    mem_free(k);
}

static status *s3_store_stat(struct store *s, const char *key, struct store_info *out)
{
    const struct s3_call c = { .method = "HEAD", .key = key };
    struct http_reply r;
    char modified[64];
    uint64_t seconds;
    status *st = s3_send(s->impl, &c, &r);
    http_reply_free(&r);
    if (!st) {
        if (r.length == UINT64_MAX || !http_header(&r, "last-modified", modified, sizeof modified) ||
            !http_date(modified, &seconds))
            return ERR(IO, "%s: the server's reply lacks length or date", key);
        /* the end of that second: nothing shall look older than it is, a lease least of all */
        *out = (struct store_info){ .bytes = r.length, .mtime_ns = seconds * 1000000000u + 999999999u };
        return NULL;
    }
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    char dir[STORE_KEY_BYTES + 1];
    bool any = false;
    snprintf(dir, sizeof dir, "%s/", key);
    status *look = s3_any_below(s->impl, dir, &any);
    if (look || any) {
        status_free(st);
        st = look;
    }
    if (!st)
        *out = (struct store_info){ .is_dir = true };
    return st;
}

/* ---- Directories */

/* "" or "dir/" */
static void prefix_of(const char *dir, char prefix[STORE_KEY_BYTES + 1])
{
    snprintf(prefix, STORE_KEY_BYTES + 1, "%s%s", dir, *dir ? "/" : "");
}

struct child_list {
    struct store_list *out;
    size_t head; /* bytes of the prefix */
};

static status *add_child(void *arg, const char *key, const struct s3_found *f)
{
    const struct child_list *k = arg;
    char name[STORE_KEY_BYTES];
    size_t n = strlen(key);
    if (n <= k->head || n - k->head >= sizeof name) /* the directory's own marker; what is no key of ours */
        return NULL;
    memcpy(name, key + k->head, n - k->head + 1);
    n -= k->head;
    if (f->is_prefix && name[n - 1] == '/')
        name[n - 1] = 0;
    status *st = store_check_key(name);
    bool legal = !st && !strchr(name, '/');
    status_free(st);
    const struct store_info info = { .bytes = f->bytes, .mtime_ns = f->mtime_ns, .is_dir = f->is_prefix };
    return legal ? store_list_add(k->out, name, &info) : NULL;
}

static status *s3_store_list(struct store *s, const char *dir, struct store_list *out)
{
    char prefix[STORE_KEY_BYTES + 1];
    prefix_of(dir, prefix);
    struct child_list k = { .out = out, .head = strlen(prefix) };
    const struct s3_listing l = { .prefix = prefix, .found = add_child, .arg = &k };
    return s3_list(s->impl, &l, NULL);
}

static status *remove_object(struct s3 *b, const char *key)
{
    const struct s3_call c = { .method = "DELETE", .key = key };
    status *st = s3_send_only(b, &c);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

static status *s3_store_remove(struct store *s, const char *key)
{
    char prefix[STORE_KEY_BYTES + 1];
    bool any = false;
    prefix_of(key, prefix);
    TRY(remove_object(s->impl, key));
    TRY(s3_any_below(s->impl, prefix, &any));
    return any ? ERR(EXISTS, "%s is a directory and not empty", key) : NULL;
}

static status *s3_store_remove_tree(struct store *s, const char *dir)
{
    char prefix[STORE_KEY_BYTES + 1];
    prefix_of(dir, prefix);
    TRY(remove_object(s->impl, dir));
    return s3_remove_below(s->impl, prefix);
}

struct sweep {
    struct s3 *b;
    const char *mark;
};

static bool is_marked(const char *key, const char *mark)
{
    const char *slash = strrchr(key, '/');
    return strstr(slash ? slash + 1 : key, mark);
}

static status *sweep_upload(void *arg, const char *key, const struct s3_found *f)
{
    const struct sweep *k = arg;
    return is_marked(key, k->mark) ? s3_multipart_abort(k->b, key, f->upload_id) : NULL;
}

static status *sweep_object(void *arg, const char *key, const struct s3_found *f)
{
    const struct sweep *k = arg;
    (void)f;
    return is_marked(key, k->mark) ? remove_object(k->b, key) : NULL;
}

static status *s3_store_sweep(struct store *s, const char *dir, const char *mark)
{
    char prefix[STORE_KEY_BYTES + 1], temps[STORE_KEY_BYTES + 8];
    struct sweep k = { .b = s->impl, .mark = mark };
    prefix_of(dir, prefix);
    snprintf(temps, sizeof temps, "%s.tmp-", prefix);
    const struct s3_listing uploads = { .prefix = prefix, .uploads = true, .found = sweep_upload, .arg = &k };
    const struct s3_listing objects = { .prefix = temps, .flat = true, .found = sweep_object, .arg = &k };
    TRY(s3_list(s->impl, &uploads, NULL));
    return s3_list(s->impl, &objects, NULL);
}

static status *s3_store_now(struct store *s, uint64_t *ns)
{
    const struct s3_call c = { .method = "HEAD" };
    struct http_reply r;
    status *st = s3_send(s->impl, &c, &r);
    http_reply_free(&r);
    return st ? st : s3_date(&r, ns);
}

/* ---- Writers */

static status *s3_store_writer_open(struct store_writer *w)
{
    return s3_writer_open(w->store->impl, w);
}

extern const struct store_ops store_s3_ops;
const struct store_ops store_s3_ops = {
    .name = "s3",
    .scheme = "s3",
    .open = s3_store_open,
    .close = s3_store_close,
    .put = s3_store_put,
    .get = s3_store_get,
    .stat = s3_store_stat,
    .list = s3_store_list,
    .remove = s3_store_remove,
    .remove_tree = s3_store_remove_tree,
    .sweep = s3_store_sweep,
    .now = s3_store_now,
    .writer_open = s3_store_writer_open,
    .extents = s3_writer_extents,
    .write = s3_writer_write,
    .finish = s3_writer_finish,
    .abort = s3_writer_abort,
    .stream_open = s3_stream_open,
    .stream_read = s3_stream_read,
    .stream_close = s3_stream_close,
    .streams = STREAMS,
    .request_bytes = READ_BYTES,
    .retries = true,
};
