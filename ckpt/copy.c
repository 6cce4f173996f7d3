/* copy: see copy.h. The destination's plan is made by the planner of saves, from descriptors of what the ranks of the
 * destination would hold; then its files are written one after another, each element taken from the source's pieces by
 * reshard_tensor.
 *
 *   lease -> describe -> plan -> [file: header, pieces chunk by chunk, finish] ... -> lease_check -> commit_put
 *
 * Invariants: (1) a source byte is used only out of a block whose checksum was right; (2) memory is bounded by the
 * block cache and one chunk; (3) whatever happens before commit_put, commit_discard leaves nothing that counts. */
#include "ckpt/copy.h"

#include "ckpt/commit.h"
#include "ckpt/match.h"
#include "ckpt/refs.h"
#include "ckpt/reshard.h"
#include "ckpt/share.h"
#include "ckpt/view.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 8 << 20, CACHE_BLOCKS = COPY_CACHE_BYTES / META_BLOCK_BYTES };

struct cached_block {
    uint64_t piece, block; /* of the source */
    uint64_t used;         /* when; 0: empty */
    unsigned char *data;   /* [META_BLOCK_BYTES] */
};

struct copy {
    const struct copy_options *o;
    struct store *to;
    struct metadata *m; /* the source's */
    struct origins origins;
    struct lease lease;
    struct mesh mesh;
    bool *selected; /* [tensors] */
    struct cached_block cache[CACHE_BLOCKS];
    uint64_t uses;
    unsigned char *chunk; /* [CHUNK_BYTES] */
    struct plan *plan;
    struct roster roster;
    struct metadata made; /* the destination's; texts are borrowed */
    char (*names)[STORE_KEY_BYTES];
    struct copy_result r;
};

/* ---- What is copied */

static status *select_tensors(struct copy *c)
{
    const struct metadata *m = c->m;
    bool *in = c->selected = mem_calloc(m->tensor_count + 1, sizeof *in);
    if (!in)
        return ERR(NO_MEMORY, "%" PRIu64 " tensors", m->tensor_count);
    for (uint64_t i = 0; i < m->tensor_count; i++)
        if (match_selected(c->o->parts, m->tensor[i].part) && match_selected(c->o->names, m->tensor[i].name)) {
            in[i] = true;
            if (m->tensor[i].alias_of) /* never without the bytes */
                in[metadata_find(m, m->tensor[i].part, m->tensor[i].alias_of)] = true;
        }
    for (uint64_t i = 0; i < m->tensor_count; i++)
        c->r.tensors += in[i];
    if (!c->r.tensors && (c->o->parts || c->o->names))
        return ERR(NOT_FOUND, "step %" PRIu64 ": no tensor is selected by part and name", m->step);
    return NULL;
}

/* ---- The destination's descriptors */

struct describe {
    struct copy *c;
    struct plan_desc *desc;
    uint64_t count, cap;
    char *text;
    size_t text_bytes;
};

static status *add_desc(struct describe *d, const struct plan_desc *one)
{
    if (d->count == d->cap) {
        uint64_t cap = d->cap ? 2 * d->cap : 256;
        struct plan_desc *more = mem_array(d->desc, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "%" PRIu64 " descriptors", cap);
        d->desc = more;
        d->cap = cap;
    }
    d->desc[d->count++] = *one;
    return NULL;
}

/* The rank in "part-00003.ATTEMPT.h5"; for a name of another kind, one by the file's number. */
static int writer_of(const struct metadata *m, uint32_t file)
{
    const char *dash = strrchr(m->file[file].name, '-');
    char *end = NULL;
    unsigned long long n = dash && dash[1] >= '0' && dash[1] <= '9' ? strtoull(dash + 1, &end, 10) : 0;
    return end && *end == '.' && n < m->world ? (int)n : (int)(file % m->world);
}

/* As it was stored. `local` keeps the order of a file. */
static status *describe_as_stored(struct describe *d, const struct meta_tensor *t, struct plan_desc one)
{
    const struct metadata *m = d->c->m;
    for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++) {
        const struct meta_piece *p = &m->piece[i];
        if (!p->bytes)
            continue;
        one.piece = p->piece;
        one.rank = writer_of(m, p->file);
        one.local = (uint32_t)(p->offset / 4096); /* ascending in a file; equal in two is fine */
        TRY(add_desc(d, &one));
    }
    return NULL;
}

static int cut_dimension(const struct metadata *m, const struct meta_tensor *t)
{
    int longest = -1;
    for (int k = 0; k < t->shape.ndim; k++) {
        for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++)
            if (m->piece[i].piece.box.len[k] < t->shape.dim[k])
                return k;
        if (t->shape.ndim > 1 && (longest < 0 || t->shape.dim[k] > t->shape.dim[longest]))
            longest = k;
    }
    return longest;
}

/* N of a segment "N" between dots of the name; -1: it belongs to no layer. */
static int64_t layer_of(const char *name)
{
    for (const char *s = name; s; s = strchr(s, '.') ? strchr(s, '.') + 1 : NULL) {
        size_t digits = strspn(s, "0123456789");
        if (digits && digits < 10 && (s[digits] == '.' || !s[digits]))
            return strtoll(s, NULL, 10);
    }
    return -1;
}

static int64_t count_layers(const struct copy *c)
{
    int64_t layers = 0;
    for (uint64_t i = 0; i < c->m->tensor_count; i++) {
        int64_t n = c->selected[i] ? layer_of(c->m->tensor[i].name) : -1;
        layers = n >= layers ? n + 1 : layers;
    }
    return layers;
}

static status *describe_cut(struct describe *d, const struct meta_tensor *t, struct plan_desc one, int64_t layers)
{
    const struct mesh *mesh = &d->c->mesh;
    struct layout l = { .shape = t->shape, .stage = -1 };
    int cut = cut_dimension(d->c->m, t);
    int64_t layer = layer_of(t->name);
    for (int k = 0; k < LAYOUT_DIMS; k++)
        l.cut[k] = k == cut ? MESH_TP : -1;
    if (layer >= 0)
        l.stage = (int)(layer * mesh->size[MESH_PP] / layers);
    for (int r = 0; r < mesh_world(mesh); r++) {
        one.piece = layout_piece(&l, mesh, r);
        one.rank = r;
        if (piece_elems(&one.piece))
            TRY(add_desc(d, &one));
    }
    return NULL;
}

static uint64_t put_text(struct describe *d, const char *text)
{
    size_t at = d->text_bytes, n = strlen(text) + 1;
    memcpy(d->text + at, text, n);
    d->text_bytes += n;
    return at;
}

static status *describe_tensor(struct describe *d, const struct meta_tensor *t, int64_t layers)
{
    bool ok;
    struct plan_desc one = { .part = put_text(d, t->part),
                             .name = put_text(d, t->name),
                             .alias = t->alias_of ? put_text(d, t->alias_of) : UINT64_MAX,
                             .dtype = t->dtype,
                             .trainable = t->trainable,
                             .shape = t->shape,
                             .local = (uint32_t)d->count };
    if (t->alias_of || !shape_volume(&t->shape, &ok))
        return add_desc(d, &one); /* nothing is stored */
    return d->c->o->recut ? describe_cut(d, t, one, layers) : describe_as_stored(d, t, one);
}

static status *make_plan(struct copy *c)
{
    const struct metadata *m = c->m;
    struct describe d = { .c = c };
    size_t text = 1;
    for (uint64_t i = 0; i < m->tensor_count; i++)
        text += strlen(m->tensor[i].part) + strlen(m->tensor[i].name) + 2 +
                (m->tensor[i].alias_of ? strlen(m->tensor[i].alias_of) + 1 : 0);
    d.text = mem_calloc(text, 1);
    status *st = d.text ? NULL : ERR(NO_MEMORY, "names of %zu bytes", text);
    int64_t layers = count_layers(c);
    for (uint64_t i = 0; i < m->tensor_count && !st; i++)
        if (c->selected[i])
            st = describe_tensor(&d, &m->tensor[i], layers);
    if (!st)
        st = plan_make(d.desc, d.count, d.text, d.text_bytes, mesh_world(&c->mesh), NULL, &c->plan);
    mem_free(d.desc);
    mem_free(d.text);
    return st ? st : roster_make(c->plan, &c->roster);
}

/* ---- Reading the source */

static status *read_block(struct copy *c, const struct meta_tensor *t, uint64_t piece, uint64_t block,
                          unsigned char *to)
{
    const struct meta_piece *p = &c->m->piece[piece];
    uint64_t at = block * META_BLOCK_BYTES, left = p->bytes - at;
    size_t n = left < META_BLOCK_BYTES ? (size_t)left : META_BLOCK_BYTES;
    char key[STORE_KEY_BYTES];
    const struct meta_file *f = &c->m->file[p->file];
    TRY(origins_key(c->m, f, key));
    TRY(store_get(origins_store(&c->origins, f), key, p->offset + at, to, n));
    uint32_t crc = crc32c(0, to, n), want = c->m->crc[p->first_crc + block];
    char words[REFS_WORDS];
    refs_words(c->m, f, words);
    if (crc != want)
        return ERR(CORRUPT,
                   "step %" PRIu64 ": %s%s: tensor %s/%s: checksum of %zu bytes at offset %" PRIu64
                   " is %08x, not %08x",
                   c->m->step, words, f->name, t->part, t->name, n, p->offset + at, crc, want);
    c->r.read_bytes += n;
    return NULL;
}

/* A verified block; valid until the next call. */
static status *get_block(struct copy *c, const struct meta_tensor *t, uint64_t piece, uint64_t block,
                         const unsigned char **out)
{
    struct cached_block *oldest = &c->cache[0];
    for (int i = 0; i < CACHE_BLOCKS; i++) {
        struct cached_block *b = &c->cache[i];
        if (b->used && b->piece == piece && b->block == block) {
            b->used = ++c->uses;
            *out = b->data;
            return NULL;
        }
        oldest = b->used < oldest->used ? b : oldest;
    }
    oldest->used = 0;
    if (!oldest->data)
        oldest->data = mem_alloc(META_BLOCK_BYTES);
    if (!oldest->data)
        return ERR(NO_MEMORY, "a block of %d bytes", META_BLOCK_BYTES);
    TRY(read_block(c, t, piece, block, oldest->data));
    *oldest = (struct cached_block){ piece, block, ++c->uses, oldest->data };
    *out = oldest->data;
    return NULL;
}

/* One copy of stored elements into the chunk, block by block. */
static status *gather(struct copy *c, const struct meta_tensor *t, const struct reshard_copy *r, size_t elem)
{
    const uint64_t per_block = META_BLOCK_BYTES / elem, piece = t->first_piece + r->stored;
    uint64_t begin, end;
    reshard_span(r, &begin, &end);
    for (uint64_t b = begin / per_block; b * per_block < end; b++) {
        uint64_t first = b * per_block, lo = first < begin ? begin : first;
        uint64_t hi = end - first < per_block ? end : first + per_block;
        const unsigned char *data;
        if (!reshard_count(r, lo, hi))
            continue;
        TRY(get_block(c, t, piece, b, &data));
        reshard_apply(r, elem, data + (lo - first) * elem, lo, hi, c->chunk);
    }
    return NULL;
}

/* The elements of `want` into the chunk. */
static status *fill_chunk(struct copy *c, const struct meta_tensor *t, const struct piece *stored,
                          const struct piece *want)
{
    struct reshard_list l = { 0 };
    status *st = reshard_tensor(&t->shape, stored, (uint32_t)t->piece_count, want, 1, &l);
    for (size_t i = 0; i < l.count && !st; i++)
        st = gather(c, t, &l.copy[i], dtype_bytes(t->dtype));
    reshard_list_free(&l);
    return st;
}

/* ---- Writing the destination */

static status *write_piece(struct copy *c, const struct share_piece *q, struct store_writer *w, uint32_t *crc)
{
    const struct plan_piece *to = &c->plan->piece[q->plan_piece];
    const struct plan_tensor *pt = &c->plan->tensor[to->tensor];
    const struct meta_tensor *t = &c->m->tensor[metadata_find(c->m, pt->part, pt->name)];
    struct piece *stored = mem_array(NULL, t->piece_count + 1, sizeof *stored);
    if (!stored)
        return ERR(NO_MEMORY, "%" PRIu64 " pieces", t->piece_count);
    for (uint64_t i = 0; i < t->piece_count; i++)
        stored[i] = c->m->piece[t->first_piece + i].piece;
    status *st = NULL;
    for (uint64_t at = 0; at < q->bytes && !st; at += CHUNK_BYTES) {
        size_t n = q->bytes - at < CHUNK_BYTES ? (size_t)(q->bytes - at) : CHUNK_BYTES;
        struct piece want = to->piece;
        want.begin += at / q->elem_bytes;
        want.end = want.begin + n / q->elem_bytes;
        st = fill_chunk(c, t, stored, &want);
        for (size_t b = 0; b < n && !st; b += META_BLOCK_BYTES)
            *crc++ = crc32c(0, c->chunk + b, n - b < META_BLOCK_BYTES ? n - b : META_BLOCK_BYTES);
        if (!st)
            st = store_write(w, q->offset + at, c->chunk, n);
        if (!st)
            st = lease_renew(&c->lease);
        if (c->o->progress)
            c->o->progress(c->o->progress_arg, n, c->r.bytes);
    }
    mem_free(stored);
    return st;
}

static void note_piece(struct copy *c, const struct share_piece *q, uint64_t file)
{
    struct meta_piece *p = &c->made.piece[q->plan_piece];
    *p = (struct meta_piece){ .piece = c->plan->piece[q->plan_piece].piece,
                              .file = (uint32_t)file,
                              .offset = q->offset,
                              .bytes = q->bytes,
                              .first_crc = c->made.crc_count };
    c->made.crc_count += meta_blocks(q->bytes);
}

static status *write_file(struct copy *c, const struct share *s, uint32_t f, int rank)
{
    const struct share_file *from = &s->file[f];
    const uint64_t number = c->made.file_count++;
    char key[STORE_KEY_BYTES];
    struct store_writer *w;
    commit_shard_key(c->m->step, from->part, rank, c->lease.attempt, key);
    snprintf(c->names[number], sizeof c->names[number], "%s", strchr(key, '/') + 1);
    c->made.file[number] = (struct meta_file){ .name = c->names[number],
                                               .bytes = from->image.file_bytes,
                                               .header_bytes = from->image.header_bytes,
                                               .header_crc = from->header_crc };
    TRY(store_writer_open(c->to, key, from->image.file_bytes, &w));
    status *st = store_write(w, 0, from->image.header, from->image.header_bytes);
    for (uint64_t i = 0; i < s->pieces && !st; i++)
        if (s->piece[i].file == f) {
            note_piece(c, &s->piece[i], number);
            st = write_piece(c, &s->piece[i], w, c->made.crc + c->made.piece[s->piece[i].plan_piece].first_crc);
        }
    if (!st)
        return store_writer_finish(w);
    store_writer_abort(w);
    return st;
}

static status *write_files(struct copy *c)
{
    status *st = NULL;
    for (int r = 0; r < mesh_world(&c->mesh) && !st; r++) {
        struct share *s = NULL;
        if (!c->roster.files[r])
            continue;
        st = share_make(c->plan, &c->roster, r, CHUNK_BYTES, &s);
        for (uint32_t f = 0; !st && f < s->files; f++)
            st = write_file(c, s, f, r);
        share_free(s);
    }
    return st;
}

/* ---- The destination's metadata */

static status *allocate(struct copy *c)
{
    const struct plan *p = c->plan;
    uint64_t files = 0, crcs = 0;
    for (int r = 0; r < p->ranks; r++) {
        files += c->roster.files[r];
        crcs += c->roster.crcs[r];
    }
    c->made.file = mem_calloc(files + 1, sizeof *c->made.file);
    c->made.tensor = mem_calloc(p->tensor_count + 1, sizeof *c->made.tensor);
    c->made.piece = mem_calloc(p->piece_count + 1, sizeof *c->made.piece);
    c->made.crc = mem_calloc(crcs + 1, sizeof *c->made.crc);
    c->made.blob = mem_calloc(c->m->blob_count + 1, sizeof *c->made.blob);
    c->names = mem_calloc(files + 1, sizeof *c->names);
    c->chunk = mem_alloc(CHUNK_BYTES);
    return c->made.file && c->made.tensor && c->made.piece && c->made.crc && c->made.blob && c->names && c->chunk
               ? NULL
               : ERR(NO_MEMORY, "metadata of %" PRIu64 " pieces", p->piece_count);
}

static status *describe_step(struct copy *c)
{
    const struct plan *p = c->plan;
    struct metadata *to = &c->made;
    TRY(allocate(c));
    to->run_id = c->lease.run_id;
    to->attempt = c->lease.attempt;
    to->parent_attempt = c->lease.parent;
    to->step = c->m->step;
    to->mesh = c->mesh;
    to->world = (uint32_t)mesh_world(&c->mesh);
    to->build = c->m->build;
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        const struct meta_tensor *was = &c->m->tensor[metadata_find(c->m, t->part, t->name)];
        to->tensor[i] = *was;
        to->tensor[i].first_piece = t->first_piece;
        to->tensor[i].piece_count = t->piece_count;
        to->tensor[i].owner_part = to->tensor[i].owner_name = NULL; /* its bytes are copied like any */
    }
    to->tensor_count = p->tensor_count;
    to->piece_count = p->piece_count;
    for (uint64_t i = 0; i < p->piece_count; i++)
        c->r.bytes += piece_elems(&p->piece[i].piece) * dtype_bytes(p->tensor[p->piece[i].tensor].dtype);
    for (uint64_t i = 0; i < c->m->blob_count; i++) {
        const struct meta_blob *b = &c->m->blob[i];
        if (!match_selected(c->o->parts, b->part))
            continue;
        if (b->rank >= (int64_t)to->world)
            return ERR(INVALID, "blob %s/%s is of rank %d and the copy has %u: leave its part out", b->part, b->name,
                       b->rank, to->world);
        to->blob[to->blob_count++] = *b;
    }
    return NULL;
}

/* ---- The copy */

static status *refuse_committed(const struct copy *c)
{
    bool yes = false;
    TRY(commit_is_committed(c->to, c->m->step, &yes));
    return yes ? ERR(EXISTS, "%s: step %" PRIu64 " is committed there already", c->to->uri, c->m->step) : NULL;
}

static status *run(struct copy *c)
{
    TRY(refuse_committed(c)); /* under the lease: nobody else commits */
    TRY(make_plan(c));
    TRY(describe_step(c));
    TRY(write_files(c));
    TRY(lease_check(&c->lease));
    c->made.time_ns = clock_wall_ns();
    return commit_put(c->to, &c->made);
}

static void free_copy(struct copy *c)
{
    for (int i = 0; i < CACHE_BLOCKS; i++)
        mem_free(c->cache[i].data);
    mem_free(c->made.file);
    mem_free(c->made.tensor);
    mem_free(c->made.piece);
    mem_free(c->made.crc);
    mem_free(c->made.blob);
    mem_free(c->names);
    mem_free(c->chunk);
    mem_free(c->selected);
    roster_free(&c->roster);
    plan_free(c->plan);
    origins_close(&c->origins);
    metadata_free(c->m);
    mem_free(c);
}

/* Beside the commit, as a save does; the copy counts without. */
static void write_view(struct copy *c)
{
    status *st = view_check(c->to);
    if (!st && c->made.piece_count <= VIEW_PIECES)
        st = view_write(c->to, &c->made);
    status_free(st);
}

static status *copy_under_lease(struct copy *c)
{
    char note[NOTE_BYTES];
    TRY(lease_take(c->to, 0, &c->lease, note));
    status *st = run(c);
    if (st)
        st = status_first(st, commit_discard(c->to, c->m->step, c->lease.attempt));
    else
        write_view(c);
    return status_first(st, lease_give_back(&c->lease));
}

status *copy_step(struct store *from, uint64_t step, struct store *to, const struct copy_options *o,
                  struct copy_result *out)
{
    struct copy *c = mem_calloc(1, sizeof *c);
    if (!c)
        return ERR(NO_MEMORY, "a copy");
    c->o = o;
    c->to = to;
    status *st = commit_read(from, step, &c->m);
    if (!st) {
        c->mesh = o->recut ? o->mesh : c->m->mesh;
        st = select_tensors(c);
    }
    if (!st)
        st = origins_open(from, c->m, &c->origins);
    if (!st)
        st = copy_under_lease(c);
    if (!st) {
        c->r.files = c->made.file_count;
        *out = c->r;
    }
    free_copy(c);
    return st;
}
