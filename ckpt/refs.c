/* refs: see refs.h. A reference as text is "STEP PARTBYTES NAMEBYTES PARTNAMEURL"; an empty URL is the same root.
 *
 * Invariant: what refs_find puts together names the step that holds the bytes: an alias is followed to its tensor, a
 * reference to its owner, so there are no chains. */
#include "ckpt/refs.h"

#include "comm/base/mem.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- text */

status *refs_text(const struct tessera_reference *r, const char *part, const char *name, char **out)
{
    const char *url = r->url ? r->url : "";
    part = r->part ? r->part : part;
    name = r->name ? r->name : name;
    size_t room = strlen(part) + strlen(name) + strlen(url) + 64;
    char *text = mem_alloc(room);
    if (!text)
        return ERR(NO_MEMORY, "a reference to %s/%s", part, name);
    snprintf(text, room, "%" PRIu64 " %zu %zu %s%s%s", r->step, strlen(part), strlen(name), part, name, url);
    *out = text;
    return NULL;
}

struct parsed {
    uint64_t step;
    char part[128], name[256];
    const char *url; /* "": the same root */
};

static bool parse(const char *text, struct parsed *out)
{
    char *at;
    uint64_t step = strtoull(text, &at, 10), part = strtoull(at, &at, 10), name = strtoull(at, &at, 10);
    if (*at != ' ' || part >= sizeof out->part || name >= sizeof out->name || strlen(at + 1) < part + name)
        return false;
    *out = (struct parsed){ .step = step, .url = at + 1 + part + name };
    memcpy(out->part, at + 1, part);
    memcpy(out->name, at + 1 + part, name);
    return true;
}

/* A root's URL that means the same wherever it is read from: paths of files become absolute, without links. */
static status *absolute(const char *url, char **out)
{
    const char *path = strncmp(url, "file:", 5) == 0 ? url + 5 : !strchr(url, ':') || *url == '/' ? url : NULL;
    char buffer[PATH_MAX], *real = path ? realpath(strncmp(path, "//", 2) == 0 ? path + 2 : path, buffer) : NULL;
    size_t room = strlen(real ? real : url) + 8;
    char *text = mem_alloc(room);
    if (text)
        snprintf(text, room, "%s%s", real ? "file:" : "", real ? real : url);
    if (!text)
        return ERR(NO_MEMORY, "a URL of %zu bytes", room);
    *out = text;
    return NULL;
}

/* ---- where files lie */

static uint64_t step_of(const struct metadata *m, const struct meta_file *f)
{
    return f->owner ? m->owner[f->owner - 1].step : m->step;
}

static const struct meta_tensor *user_of(const struct metadata *m, const struct meta_file *f)
{
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        for (uint64_t k = t->first_piece; k < t->first_piece + t->piece_count; k++)
            if (&m->file[m->piece[k].file] == f)
                return t;
    }
    return NULL;
}

void refs_words(const struct metadata *m, const struct meta_file *f, char text[REFS_WORDS])
{
    const struct meta_tensor *t = f->owner ? user_of(m, f) : NULL;
    text[0] = 0;
    if (!f->owner)
        return;
    const struct meta_owner *o = &m->owner[f->owner - 1];
    snprintf(text, REFS_WORDS, "tensor %s%s%.300s lies in step %" PRIu64 "%s%.500s: ", t ? t->part : "",
             t ? "/" : "none", t ? t->name : "", o->step, o->url ? " of " : "", o->url ? o->url : "");
}

void origins_close(struct origins *o)
{
    for (uint64_t i = 0; o->other && i < o->count; i++)
        store_close(o->other[i]);
    mem_free(o->other);
    *o = (struct origins){ 0 };
}

/* Why an owner's root cannot be opened, in words of the step that refers to it. */
static status *no_root(const struct metadata *m, uint64_t owner, status *st)
{
    char words[REFS_WORDS] = "";
    for (uint64_t f = 0; f < m->file_count && !words[0]; f++)
        if (m->file[f].owner == owner + 1)
            refs_words(m, &m->file[f], words);
    if (status_code(st) != ST_NOT_FOUND && status_code(st) != ST_INVALID)
        return status_wrap(st, "step %" PRIu64 ": %s", m->step, words);
    status *named = ERR(CORRUPT, "step %" PRIu64 ": %s%s", m->step, words, status_message(st));
    status_free(st);
    return named;
}

status *origins_open(struct store *own, const struct metadata *m, struct origins *out)
{
    struct origins o = { .own = own, .count = m->owner_count };
    o.other = mem_calloc(m->owner_count, sizeof *o.other);
    status *st = o.other ? NULL : ERR(NO_MEMORY, "%" PRIu64 " owners", m->owner_count);
    for (uint64_t i = 0; i < m->owner_count && !st; i++)
        if (m->owner[i].url) {
            st = store_open(m->owner[i].url, false, &o.other[i]);
            st = st ? no_root(m, i, st) : NULL;
        }
    if (st) {
        origins_close(&o);
        return st;
    }
    *out = o;
    return NULL;
}

struct store *origins_store(const struct origins *o, const struct meta_file *f)
{
    return f->owner && o->other[f->owner - 1] ? o->other[f->owner - 1] : o->own;
}

status *origins_key(const struct metadata *m, const struct meta_file *f, char key[STORE_KEY_BYTES])
{
    return commit_file_key(step_of(m, f), f->name, key);
}

static status *check_file(const struct origins *o, const struct metadata *m, const struct meta_file *f)
{
    char key[STORE_KEY_BYTES], words[REFS_WORDS];
    struct store_info info = { 0 };
    TRY(origins_key(m, f, key));
    status *st = store_stat(origins_store(o, f), key, &info);
    bool missing = status_code(st) == ST_NOT_FOUND || (!st && info.is_dir);
    if (st && !missing)
        return st;
    status_free(st);
    if (!missing && info.bytes == f->bytes)
        return NULL;
    refs_words(m, f, words);
    if (missing)
        return ERR(CORRUPT, "step %" PRIu64 ": %sfile %s is missing", m->step, words, f->name);
    return ERR(CORRUPT, "step %" PRIu64 ": %sfile %s has %" PRIu64 " bytes, not %" PRIu64, m->step, words, f->name,
               info.bytes, f->bytes);
}

status *refs_check_files(struct store *own, const struct metadata *m, bool only_owned)
{
    struct origins o;
    TRY(origins_open(own, m, &o));
    status *st = NULL;
    for (uint64_t i = 0; i < m->file_count && !st; i++)
        if (m->file[i].owner || !only_owned)
            st = check_file(&o, m, &m->file[i]);
    origins_close(&o);
    return st;
}

/* ---- looking references up */

/* A step that was read for them. */
struct source {
    char *url; /* "": the same root */
    uint64_t step;
    struct metadata *m;
};

struct finder {
    struct store *own;
    char *own_url; /* absolute */
    uint64_t step;
    struct source *source;
    uint64_t sources;
    struct refs r;
};

void refs_free(struct refs *r)
{
    for (uint64_t i = 0; i < r->owner_count; i++)
        mem_free(r->owner[i].url);
    for (uint64_t i = 0; i < r->file_count; i++)
        mem_free(r->file[i].name);
    for (uint64_t i = 0; i < r->tensor_count; i++) {
        mem_free(r->tensor[i].part);
        mem_free(r->tensor[i].name);
    }
    mem_free(r->owner);
    mem_free(r->file);
    mem_free(r->tensor);
    mem_free(r->piece);
    mem_free(r->crc);
    *r = (struct refs){ 0 };
}

/* One more element at the end of an array; NULL when memory is out. */
static void *more(void *array, uint64_t count, size_t bytes)
{
    void *old;
    memcpy(&old, array, sizeof old);
    bool full = (count & (count - 1)) == 0; /* capacities are powers of two */
    void *p = full ? mem_array(old, count ? count * 2 : 1, bytes) : old;
    if (!p)
        return NULL;
    memcpy(array, &p, sizeof p);
    return memset((char *)p + count * bytes, 0, bytes);
}

/* The metadata of a step, read once. */
static status *read_source(struct finder *f, const struct parsed *ref, const struct source **out)
{
    char *url = NULL;
    if (*ref->url)
        TRY(absolute(ref->url, &url));
    if (url && strcmp(url, f->own_url) == 0)
        url[0] = 0;
    for (uint64_t i = 0; i < f->sources; i++)
        if (f->source[i].step == ref->step && strcmp(f->source[i].url, url ? url : "") == 0) {
            mem_free(url);
            *out = &f->source[i];
            return NULL;
        }
    url = url ? url : mem_strdup("");
    struct source *s = more(&f->source, f->sources, sizeof *s);
    if (!url || !s) {
        mem_free(url);
        return ERR(NO_MEMORY, "a list of %" PRIu64 " owners", f->sources);
    }
    f->sources++;
    *s = (struct source){ .url = url, .step = ref->step };
    struct store *root = NULL;
    status *st = *url ? store_open(url, false, &root) : NULL;
    if (!st)
        st = commit_read(root ? root : f->own, ref->step, &s->m);
    store_close(root);
    *out = s;
    return st;
}

/* The owner of t's bytes in step s->m, as this root sees it; its number. */
static status *put_owner(struct finder *f, const struct source *s, const struct meta_tensor *t, uint32_t *out)
{
    const struct meta_owner *o = metadata_owner(s->m, t),
                            self = { .step = s->step, .run_id = s->m->run_id, .attempt = s->m->attempt };
    const char *url = o && o->url ? o->url : s->url;
    o = o ? o : &self;
    url = strcmp(url, f->own_url) == 0 ? "" : url;
    if (!*url && o->step >= f->step)
        return ERR(INVALID, "step %" PRIu64 " is not before step %" PRIu64, o->step, f->step);
    if (strlen(url) >= META_URL_BYTES)
        return ERR(INVALID, "the URL of its owner has %zu bytes", strlen(url));
    for (uint64_t i = 0; i < f->r.owner_count; i++) {
        const struct meta_owner *have = &f->r.owner[i];
        if (have->step == o->step && have->attempt == o->attempt && strcmp(have->url ? have->url : "", url) == 0) {
            *out = (uint32_t)i + 1;
            return NULL;
        }
    }
    struct meta_owner *to = more(&f->r.owner, f->r.owner_count, sizeof *to);
    if (!to)
        return ERR(NO_MEMORY, "a list of owners");
    f->r.owner_count++;
    *to = (struct meta_owner){ .step = o->step, .run_id = o->run_id, .attempt = o->attempt };
    to->url = *url ? mem_strdup(url) : NULL;
    *out = (uint32_t)f->r.owner_count;
    return *url && !to->url ? ERR(NO_MEMORY, "a URL") : NULL;
}

static status *put_file(struct finder *f, uint32_t owner, const struct meta_file *from, uint32_t *out)
{
    for (uint64_t i = f->r.file_count; i-- > 0;) /* the last one, most often */
        if (f->r.file[i].owner == owner && strcmp(f->r.file[i].name, from->name) == 0) {
            *out = (uint32_t)i;
            return NULL;
        }
    struct meta_file *to = more(&f->r.file, f->r.file_count, sizeof *to);
    if (!to)
        return ERR(NO_MEMORY, "a list of files");
    *out = (uint32_t)f->r.file_count++;
    *to = *from;
    to->owner = owner;
    to->name = mem_strdup(from->name);
    return to->name ? NULL : ERR(NO_MEMORY, "a file's name");
}

static status *put_piece(struct finder *f, uint32_t owner, const struct metadata *m, const struct meta_piece *from)
{
    struct refs *r = &f->r;
    struct meta_piece *to = more(&r->piece, r->piece_count, sizeof *to);
    if (!to)
        return ERR(NO_MEMORY, "%" PRIu64 " pieces", r->piece_count);
    r->piece_count++;
    *to = *from;
    to->first_crc = r->crc_count;
    TRY(put_file(f, owner, &m->file[from->file], &to->file));
    for (uint64_t b = 0; b < meta_blocks(from->bytes); b++) {
        uint32_t *crc = more(&r->crc, r->crc_count, sizeof *crc);
        if (!crc)
            return ERR(NO_MEMORY, "%" PRIu64 " checksums", r->crc_count);
        *crc = m->crc[from->first_crc + b];
        r->crc_count++;
    }
    return NULL;
}

static status *put_tensor(struct finder *f, const struct source *s, const struct meta_tensor *t, uint32_t tensor)
{
    struct refs *r = &f->r;
    uint32_t owner;
    TRY(put_owner(f, s, t, &owner));
    struct ref_tensor *to = more(&r->tensor, r->tensor_count, sizeof *to);
    if (!to)
        return ERR(NO_MEMORY, "%" PRIu64 " tensors", r->tensor_count);
    r->tensor_count++;
    to->tensor = tensor;
    to->first_piece = r->piece_count;
    to->part = mem_strdup(t->owner_part ? t->owner_part : t->part);
    to->name = mem_strdup(t->owner_name ? t->owner_name : t->name);
    if (!to->part || !to->name)
        return ERR(NO_MEMORY, "a tensor's name");
    for (uint64_t i = 0; i < t->piece_count; i++)
        TRY(put_piece(f, owner, s->m, &s->m->piece[t->first_piece + i]));
    to->piece_count = r->piece_count - to->first_piece;
    return NULL;
}

static bool same_kind(const struct plan_tensor *a, const struct meta_tensor *b)
{
    return a->dtype == b->dtype && a->shape.ndim == b->shape.ndim &&
           memcmp(a->shape.dim, b->shape.dim, (size_t)a->shape.ndim * sizeof a->shape.dim[0]) == 0;
}

static status *find_one(struct finder *f, const struct plan_tensor *t, uint32_t tensor, const struct parsed *ref)
{
    const struct source *s;
    TRY(read_source(f, ref, &s));
    int64_t i = metadata_find(s->m, ref->part, ref->name);
    if (i >= 0 && s->m->tensor[i].alias_of)
        i = metadata_find(s->m, ref->part, s->m->tensor[i].alias_of);
    if (i < 0)
        return ERR(NOT_FOUND, "it is not stored there");
    const struct meta_tensor *from = &s->m->tensor[i];
    if (!same_kind(t, from)) {
        char a[256], b[256];
        dims_text(t->shape.ndim, t->shape.dim, a, sizeof a);
        dims_text(from->shape.ndim, from->shape.dim, b, sizeof b);
        return ERR(INVALID, "it is %s %s there, not %s %s", dtype_name(from->dtype), b, dtype_name(t->dtype), a);
    }
    return from->piece_count ? put_tensor(f, s, from, tensor) : NULL; /* no bytes, nothing to refer to */
}

static status *find_all(struct finder *f, const struct plan *p)
{
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        struct parsed ref;
        if (!t->reference)
            continue;
        if (!parse(t->reference, &ref))
            return ERR(INTERNAL, "tensor %s/%s: \"%s\" is no reference", t->part, t->name, t->reference);
        status *st = find_one(f, t, (uint32_t)i, &ref);
        if (st)
            return status_wrap(st, "tensor %s/%s by reference to %s/%s of step %" PRIu64 "%s%s", t->part, t->name,
                               ref.part, ref.name, ref.step, *ref.url ? " of " : "", ref.url);
    }
    return NULL;
}

status *refs_find(struct store *own, uint64_t step, const struct plan *p, struct refs *out)
{
    struct finder f = { .own = own, .step = step };
    TRY(absolute(own->uri ? own->uri : "", &f.own_url));
    status *st = find_all(&f, p);
    for (uint64_t i = 0; i < f.sources; i++) {
        mem_free(f.source[i].url);
        metadata_free(f.source[i].m);
    }
    mem_free(f.source);
    mem_free(f.own_url);
    if (st) {
        refs_free(&f.r);
        return st;
    }
    *out = f.r;
    return NULL;
}
