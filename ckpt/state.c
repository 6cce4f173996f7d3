/* state: pieces and blobs as the caller describes them, checked once, when they are added. */
#include "ckpt/state.h"

#include "ckpt/refs.h"
#include "comm/base/mem.h"

#include <limits.h>

status *tessera_state_new(tessera *t, tessera_state **out)
{
    (void)t; /* a state outlives its handle and serves any */
    tessera_state *s = mem_calloc(1, sizeof *s);
    if (!s)
        return ERR(NO_MEMORY, "a state");
    *out = s;
    return NULL;
}

static void forget_description(tessera_state *s)
{
    mem_free(s->desc);
    mem_free(s->text);
    s->desc = NULL;
    s->text = NULL;
    s->described = false;
}

void tessera_state_free(tessera_state *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->count; i++) {
        mem_free(s->piece[i].part);
        mem_free(s->piece[i].name);
        mem_free(s->piece[i].alias_of);
        mem_free(s->piece[i].reference);
    }
    for (size_t i = 0; i < s->blob_count; i++) {
        mem_free(s->blob[i].part);
        mem_free(s->blob[i].name);
        mem_free(s->blob[i].data);
    }
    forget_description(s);
    mem_free(s->piece);
    mem_free(s->blob);
    mem_free(s);
}

/* Segments of [A-Za-z0-9._-] joined by '/', none empty, "." or "..". */
static bool part_ok(const char *part)
{
    static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    for (;;) {
        size_t n = strspn(part, set);
        bool dots = (n == 1 && part[0] == '.') || (n == 2 && part[0] == '.' && part[1] == '.');
        if (!n || dots)
            return false;
        if (!part[n])
            return true;
        if (part[n] != '/')
            return false;
        part += n + 1;
    }
}

/* Any text, but its '/'-joined segments are not empty, "." or "..". */
static bool name_ok(const char *name)
{
    if (strlen(name) > 255)
        return false;
    for (;;) {
        size_t n = strcspn(name, "/");
        bool dots = (n == 1 && name[0] == '.') || (n == 2 && name[0] == '.' && name[1] == '.');
        if (!n || dots)
            return false;
        if (!name[n])
            return true;
        name += n + 1;
    }
}

static status *check_names(const char *part, const char *name)
{
    if (!part || strlen(part) > 127 || !part_ok(part))
        return ERR(INVALID,
                   "part \"%s\" of \"%s\": segments of letters, digits, '.', '_', '-' joined by '/', at most 127 bytes",
                   part ? part : "(null)", name ? name : "(null)");
    if (!name || !name_ok(name))
        return ERR(INVALID, "%s: name \"%.300s\": 1 to 255 bytes, no empty, \".\" or \"..\" segment", part,
                   name ? name : "(null)");
    return NULL;
}

static const struct tessera_reference *reference_of(const struct tessera_tensor *d)
{
    return d->size >= STATE_REFERENCE_BYTES ? d->reference : NULL;
}

static status *check_reference(const struct tessera_tensor *d)
{
    const struct tessera_reference *r = reference_of(d);
    if (!r)
        return NULL;
    if (d->alias_of)
        return ERR(INVALID, "%s/%s: an alias and a reference", d->part, d->name);
    if (r->size < sizeof *r || r->size > 4096)
        return ERR(INVALID, "%s/%s: a reference of %zu bytes; set it with TESSERA_REFERENCE", d->part, d->name,
                   r->size);
    if (r->url && (!*r->url || strlen(r->url) >= META_URL_BYTES))
        return ERR(INVALID, "%s/%s: a reference to a URL of %zu bytes", d->part, d->name, strlen(r->url));
    for (const char *c = r->url; c && *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            return ERR(INVALID, "%s/%s: a reference to a URL with a control character", d->part, d->name);
    return status_wrap(check_names(r->part ? r->part : d->part, r->name ? r->name : d->name), "%s/%s: its reference",
                       d->part, d->name);
}

static status *read_tensor(const struct tessera_tensor *d, struct state_piece *p)
{
    if (d->size < STATE_TENSOR_BYTES)
        return ERR(INVALID, "tensor: struct of %zu bytes; set it with TESSERA_TENSOR", d->size);
    TRY(check_names(d->part, d->name));
    if (d->dtype <= 0 || d->dtype >= DTYPE_COUNT)
        return ERR(INVALID, "%s/%s: dtype %d", d->part, d->name, d->dtype);
    if (d->ndim < 0 || d->ndim > LAYOUT_DIMS)
        return ERR(INVALID, "%s/%s: %d dimensions, not 0 to %d", d->part, d->name, d->ndim, LAYOUT_DIMS);
    *p = (struct state_piece){ .dtype = (enum dtype)d->dtype, .trainable = !d->frozen, .data = d->data };
    p->shape.ndim = d->ndim;
    for (int i = 0; i < d->ndim; i++) {
        p->shape.dim[i] = d->shape[i];
        p->piece.box.off[i] = d->offset[i];
        p->piece.box.len[i] = d->length[i];
        p->stride[i] = d->stride ? d->stride[i] : 0;
    }
    TRY(check_reference(d));
    p->strided = d->stride != NULL && d->ndim > 0;
    bool ok;
    uint64_t whole = shape_volume(&p->shape, &ok);
    if (!ok || whole > (uint64_t)INT64_MAX / 8)
        return ERR(INVALID, "%s/%s: its shape is too large", d->part, d->name);
    if (d->alias_of) {
        if (!name_ok(d->alias_of) || !strcmp(d->alias_of, d->name))
            return ERR(INVALID, "%s/%s: alias of \"%.300s\"", d->part, d->name, d->alias_of);
        p->piece = piece_whole(&p->shape);
        return NULL;
    }
    p->piece.begin = d->run_begin;
    p->piece.end = d->run_end;
    for (int i = 0; i < d->ndim; i++) /* before the volume below, which must not overflow */
        if (d->length[i] > d->shape[i])
            return ERR(INVALID, "%s/%s: length %llu of dimension %d is more than the tensor's %llu", d->part, d->name,
                       (unsigned long long)d->length[i], i, (unsigned long long)d->shape[i]);
    if (!d->run_begin && !d->run_end)
        p->piece.end = box_volume(d->ndim, &p->piece.box);
    TRY(status_wrap(piece_check(&p->shape, &p->piece), "%s/%s", d->part, d->name));
    if (!d->data && piece_elems(&p->piece))
        return ERR(INVALID, "%s/%s: no data", d->part, d->name);
    return NULL;
}

status *tessera_state_add_tensor(tessera_state *s, const struct tessera_tensor *d)
{
    struct state_piece p;
    TRY(read_tensor(d, &p));
    if (s->count == s->cap) {
        size_t cap = s->cap ? s->cap * 2 : 64;
        struct state_piece *more = mem_array(s->piece, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "a state of %zu pieces", cap);
        s->piece = more;
        s->cap = cap;
    }
    p.part = mem_strdup(d->part);
    p.name = mem_strdup(d->name);
    p.alias_of = d->alias_of ? mem_strdup(d->alias_of) : NULL;
    status *st = NULL;
    if (!p.part || !p.name || (d->alias_of && !p.alias_of))
        st = ERR(NO_MEMORY, "%s/%s: its names", d->part, d->name);
    else if (reference_of(d))
        st = refs_text(reference_of(d), d->part, d->name, &p.reference);
    if (st) {
        mem_free(p.part);
        mem_free(p.name);
        mem_free(p.alias_of);
        return st;
    }
    forget_description(s);
    s->piece[s->count++] = p;
    return NULL;
}

static struct state_blob *find_blob(tessera_state *s, const char *part, const char *name)
{
    for (size_t i = 0; i < s->blob_count; i++)
        if (!strcmp(s->blob[i].part, part) && !strcmp(s->blob[i].name, name))
            return &s->blob[i];
    return NULL;
}

static status *new_blob(tessera_state *s, const char *part, const char *name, struct state_blob **out)
{
    if (s->blob_count == s->blob_cap) {
        size_t cap = s->blob_cap ? s->blob_cap * 2 : 16;
        struct state_blob *more = mem_array(s->blob, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "a state of %zu blobs", cap);
        s->blob = more;
        s->blob_cap = cap;
    }
    struct state_blob b = { .part = mem_strdup(part), .name = mem_strdup(name) };
    if (!b.part || !b.name) {
        mem_free(b.part);
        mem_free(b.name);
        return ERR(NO_MEMORY, "blob %s/%s", part, name);
    }
    s->blob[s->blob_count] = b;
    *out = &s->blob[s->blob_count++];
    return NULL;
}

status *tessera_state_add_blob(tessera_state *s, const char *part, const char *name, int per_rank, const void *data,
                               size_t bytes)
{
    TRY(check_names(part, name));
    struct state_blob *b = find_blob(s, part, name);
    size_t others = s->blob_bytes - (b ? b->bytes : 0);
    if (bytes > STATE_BLOB_BYTES || others + bytes > STATE_BLOBS_BYTES)
        return ERR(INVALID, "blob %s/%s of %zu bytes: at most %d each and %d in all (here %zu); add a u8 tensor", part,
                   name, bytes, STATE_BLOB_BYTES, STATE_BLOBS_BYTES, others + bytes);
    void *copy = mem_alloc(bytes);
    if (!copy)
        return ERR(NO_MEMORY, "blob %s/%s of %zu bytes", part, name, bytes);
    status *st = b ? NULL : new_blob(s, part, name, &b);
    if (st) {
        mem_free(copy);
        return st;
    }
    if (bytes)
        memcpy(copy, data, bytes);
    mem_free(b->data);
    b->data = copy;
    b->bytes = bytes;
    b->per_rank = per_rank != 0;
    s->blob_bytes = others + bytes;
    return NULL;
}

static uint64_t put_text(tessera_state *s, const char *text)
{
    uint64_t at = s->text_bytes;
    size_t n = strlen(text) + 1;
    memcpy(s->text + at, text, n);
    s->text_bytes += n;
    return at;
}

void state_source(const struct state_piece *p, uint64_t first, uint64_t elems, struct share_source *out)
{
    const size_t elem_bytes = dtype_bytes(p->dtype);
    uintptr_t base = (uintptr_t)p->data;
    *out =
        (struct share_source){ .piece = p->piece, .strided = p->strided, .base = p->data, .begin = base, .end = base };
    memcpy(out->stride, p->stride, sizeof out->stride);
    if (!elems)
        return;
    if (!p->strided) {
        out->begin = base + first * elem_bytes;
        out->end = out->begin + elems * elem_bytes;
        return;
    }
    int64_t lo = 0, hi = 0; /* the whole box */
    for (int d = 0; d < p->shape.ndim; d++) {
        int64_t reach = p->stride[d] * (int64_t)(p->piece.box.len[d] - 1);
        lo += reach < 0 ? reach : 0;
        hi += reach > 0 ? reach : 0;
    }
    out->begin = base + (uintptr_t)(lo * (int64_t)elem_bytes);
    out->end = base + (uintptr_t)((hi + 1) * (int64_t)elem_bytes);
}

status *state_describe(tessera_state *s)
{
    if (s->described)
        return NULL;
    size_t bytes = 1;
    for (size_t i = 0; i < s->count; i++) {
        const struct state_piece *p = &s->piece[i];
        bytes += strlen(p->part) + strlen(p->name) + 2 + (p->alias_of ? strlen(p->alias_of) + 1 : 0);
        bytes += p->reference ? strlen(p->reference) + 1 : 0;
    }
    s->desc = mem_calloc(s->count ? s->count : 1, sizeof *s->desc);
    s->text = mem_calloc(bytes, 1);
    s->text_bytes = 0;
    if (!s->desc || !s->text) {
        forget_description(s);
        return ERR(NO_MEMORY, "descriptors of %zu pieces", s->count);
    }
    for (size_t i = 0; i < s->count; i++) {
        const struct state_piece *p = &s->piece[i], *q = i ? p - 1 : NULL;
        struct plan_desc *d = &s->desc[i];
        /* a part, and a tensor's pieces, usually follow one another */
        d->part = q && !strcmp(p->part, q->part) ? d[-1].part : put_text(s, p->part);
        d->name = q && !strcmp(p->name, q->name) ? d[-1].name : put_text(s, p->name);
        d->alias = p->alias_of ? put_text(s, p->alias_of) : UINT64_MAX;
        d->reference = p->reference ? 1 + put_text(s, p->reference) : 0;
        d->dtype = p->dtype;
        d->trainable = p->trainable;
        d->shape = p->shape;
        d->piece = p->piece;
        d->local = (uint32_t)i;
    }
    s->fingerprint = plan_fingerprint(s->desc, s->count, s->text);
    s->described = true;
    return NULL;
}

enum { BLOB_HEAD = 16 };

status *state_pack_blobs(const tessera_state *s, int rank, struct state_bytes *out)
{
    size_t bytes = 0;
    for (size_t i = 0; i < s->blob_count; i++)
        if (s->blob[i].per_rank || rank == 0)
            bytes += BLOB_HEAD + strlen(s->blob[i].part) + strlen(s->blob[i].name) + 2 + s->blob[i].bytes;
    if (bytes > out->cap) {
        unsigned char *more = mem_realloc(out->data, bytes);
        if (!more)
            return ERR(NO_MEMORY, "blobs of %zu bytes", bytes);
        out->data = more;
        out->cap = bytes;
    }
    out->bytes = bytes;
    unsigned char *at = out->data;
    for (size_t i = 0; i < s->blob_count; i++) {
        const struct state_blob *b = &s->blob[i];
        if (!b->per_rank && rank != 0)
            continue;
        size_t part = strlen(b->part) + 1, name = strlen(b->name) + 1;
        put_u32(at, (uint32_t)(b->per_rank ? rank : -1));
        put_u32(at + 4, (uint32_t)part);
        put_u32(at + 8, (uint32_t)name);
        put_u32(at + 12, (uint32_t)b->bytes);
        memcpy(at + BLOB_HEAD, b->part, part);
        memcpy(at + BLOB_HEAD + part, b->name, name);
        memcpy(at + BLOB_HEAD + part + name, b->data, b->bytes);
        at += BLOB_HEAD + part + name + b->bytes;
    }
    return NULL;
}

bool state_next_blob(void *buf, size_t bytes, size_t *at, struct state_blob_view *out)
{
    if (bytes - *at < BLOB_HEAD)
        return false;
    unsigned char *p = (unsigned char *)buf + *at;
    size_t part = get_u32(p + 4), name = get_u32(p + 8), data = get_u32(p + 12);
    size_t room = bytes - *at - BLOB_HEAD;
    if (!part || !name || part > room || name > room - part || data > room - part - name)
        return false;
    if (p[BLOB_HEAD + part - 1] || p[BLOB_HEAD + part + name - 1])
        return false;
    *out = (struct state_blob_view){ .rank = (int32_t)get_u32(p),
                                     .part = (char *)p + BLOB_HEAD,
                                     .name = (char *)p + BLOB_HEAD + part,
                                     .data = p + BLOB_HEAD + part + name,
                                     .bytes = (uint32_t)data };
    *at += BLOB_HEAD + part + name + data;
    return true;
}
