/* metadata: see metadata.h. Two forms, the struct and the protobuf message, and one judge of what is sane, `check`, for
 * both directions.
 *
 *   encode: check -> message (columns) -> pack -> header with length and crc
 *   decode: header -> crc -> unpack -> struct (counts against counts, before anything is allocated by them) -> check
 *
 * Invariants: (1) nothing is allocated whose size is not bounded by a count of entries that the buffer really holds;
 * (2) a struct that decode returns has passed every rule of `check`, so users index it without looking. */
#include "ckpt/metadata.h"

#include "ckpt/tiling.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdlib.h>
#include <string.h>

#include "metadata.pb-c.h"

enum { HEADER_BYTES = 24, PAGE = 4096, NAME_MAX_BYTES = 255, DIMS_TEXT = LAYOUT_DIMS * 22 + 3 };
static const char magic[8] = { 'T', 'E', 'S', 'S', 'E', 'R', 'A', (char)0x89 };

#define BAD(code, ...) status_new(__FILE__, __LINE__, code, __VA_ARGS__)
typedef unsigned long long ull;

/* ---- what is sane ---- */

static bool name_is_safe(const char *s)
{
    size_t n = strlen(s);
    if (!n || n > NAME_MAX_BYTES || !strcmp(s, ".") || !strcmp(s, "..") || !strcmp(s, "metadata.pb") ||
        !strcmp(s, "view.h5"))
        return false;
    return strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == n;
}

static status *check_owners(const struct metadata *m, enum status_code code)
{
    for (uint64_t i = 0; i < m->owner_count; i++) {
        const struct meta_owner *o = &m->owner[i];
        if (!o->url && o->step >= m->step)
            return BAD(code, "step %llu owns bytes of step %llu of the same root, which is not after it", (ull)o->step,
                       (ull)m->step);
        if (o->url && (!*o->url || strlen(o->url) >= META_URL_BYTES))
            return BAD(code, "owner %llu has a URL of %zu bytes", (ull)i, strlen(o->url));
        for (const char *c = o->url; c && *c; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7f)
                return BAD(code, "owner %llu has a control character in its URL", (ull)i);
    }
    return NULL;
}

static int compare_file(const void *a, const void *b)
{
    const struct meta_file *x = *(const struct meta_file *const *)a, *y = *(const struct meta_file *const *)b;
    if (x->owner != y->owner)
        return x->owner < y->owner ? -1 : 1;
    return strcmp(x->name, y->name);
}

static status *check_files(const struct metadata *m, enum status_code code)
{
    const struct meta_file **sorted = mem_array(NULL, m->file_count, sizeof *sorted);
    status *st = NULL;
    if (!sorted)
        return ERR(NO_MEMORY, "%llu files", (ull)m->file_count);
    for (uint64_t i = 0; i < m->file_count && !st; i++) {
        const struct meta_file *f = sorted[i] = &m->file[i];
        if (!f->name || !name_is_safe(f->name))
            st = BAD(code, "file %llu has a name that is no file of a step", (ull)i);
        else if (f->header_bytes > f->bytes)
            st = BAD(code, "file %s has a header of %llu bytes and %llu in all", f->name, (ull)f->header_bytes,
                     (ull)f->bytes);
        else if (f->owner > m->owner_count)
            st = BAD(code, "file %s is of owner %u of %llu", f->name, f->owner, (ull)m->owner_count);
    }
    if (!st && m->file_count)
        qsort(sorted, m->file_count, sizeof *sorted, compare_file);
    for (uint64_t i = 1; i < m->file_count && !st; i++)
        if (!compare_file(&sorted[i], &sorted[i - 1]))
            st = BAD(code, "file %s is listed twice", sorted[i]->name);
    mem_free(sorted);
    return st;
}

static status *check_piece(const struct metadata *m, const struct meta_tensor *t, const struct meta_piece *p,
                           enum status_code code)
{
    status *st = piece_check(&t->shape, &p->piece);
    if (st) {
        status *named = BAD(code, "a piece of it: %s", status_message(st));
        status_free(st);
        return named;
    }
    if (p->file >= m->file_count)
        return BAD(code, "a piece lies in file %u of %llu", p->file, (ull)m->file_count);
    const struct meta_file *f = &m->file[p->file];
    uint64_t bytes = piece_elems(&p->piece) * dtype_bytes(t->dtype); /* below 2^63: the tensor's are */
    if (p->bytes != bytes)
        return BAD(code, "a piece of %llu elements has %llu bytes", (ull)piece_elems(&p->piece), (ull)p->bytes);
    if (!bytes && p->offset)
        return BAD(code, "an empty piece lies at %llu", (ull)p->offset);
    if (bytes &&
        (p->offset % PAGE || p->offset < f->header_bytes || p->offset > f->bytes || bytes > f->bytes - p->offset))
        return BAD(code, "a piece lies at [%llu, +%llu) of %s, which has %llu bytes, %llu of them header",
                   (ull)p->offset, (ull)bytes, f->name, (ull)f->bytes, (ull)f->header_bytes);
    if (p->first_crc > m->crc_count || meta_blocks(bytes) > m->crc_count - p->first_crc)
        return BAD(code, "a piece has checksums [%llu, +%llu) of %llu", (ull)p->first_crc, (ull)meta_blocks(bytes),
                   (ull)m->crc_count);
    return NULL;
}

/* All pieces of a tensor lie in files of one step, this one or its owner. */
static status *check_reference(const struct metadata *m, const struct meta_tensor *t, enum status_code code)
{
    bool by_reference = t->owner_name != NULL;
    if (!t->owner_part != !t->owner_name || (by_reference && (!*t->owner_part || !*t->owner_name)))
        return BAD(code, "its owner calls it nothing");
    if (by_reference && (t->alias_of || !t->piece_count))
        return BAD(code, "it is by reference and %s", t->alias_of ? "an alias" : "has no bytes");
    for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++) {
        uint32_t first = m->file[m->piece[t->first_piece].file].owner, owner = m->file[m->piece[i].file].owner;
        if (owner != first || !owner != !by_reference)
            return BAD(code, "a piece lies in a file of owner %u, its first one in one of %u, and it is %sby reference",
                       owner, first, by_reference ? "" : "not ");
    }
    return NULL;
}

static bool same_shape(const struct shape *a, const struct shape *b)
{
    return a->ndim == b->ndim && !memcmp(a->dim, b->dim, (size_t)a->ndim * sizeof *a->dim);
}

static status *check_alias(const struct metadata *m, const struct meta_tensor *t, enum status_code code)
{
    int64_t i = metadata_find(m, t->part, t->alias_of);
    if (i < 0)
        return BAD(code, "it is an alias of %s, which is not there", t->alias_of);
    const struct meta_tensor *to = &m->tensor[i];
    if (to->alias_of || to->dtype != t->dtype || !same_shape(&to->shape, &t->shape))
        return BAD(code, "it is an alias of %s, which is an alias or differs in shape or dtype", t->alias_of);
    if (t->piece_count)
        return BAD(code, "it is an alias with %llu pieces", (ull)t->piece_count);
    return NULL;
}

/* The pieces hold every element once. Each was checked alone before. */
static status *check_tiles(const struct metadata *m, const struct meta_tensor *t, enum status_code code)
{
    const struct meta_piece *p = &m->piece[t->first_piece];
    struct piece_box cut[LAYOUT_BOXES];
    uint64_t n = 0;
    for (uint64_t i = 0; i < t->piece_count; i++)
        n += (uint64_t)piece_boxes(t->shape.ndim, &p[i].piece, cut);
    struct box *box = mem_array(NULL, n, sizeof *box);
    if (!box)
        return ERR(NO_MEMORY, "%llu pieces", (ull)t->piece_count);
    n = 0;
    for (uint64_t i = 0; i < t->piece_count; i++)
        for (int k = 0, boxes = piece_boxes(t->shape.ndim, &p[i].piece, cut); k < boxes; k++)
            box[n++] = cut[k].box;
    status *st = tiling_check(&t->shape, box, n);
    mem_free(box);
    if (status_code(st) != ST_INVALID)
        return st;
    status *named = BAD(code, "%s", status_message(st));
    status_free(st);
    return named;
}

static status *check_tensor(const struct metadata *m, const struct meta_tensor *t, enum status_code code)
{
    bool ok;
    uint64_t volume = shape_volume(&t->shape, &ok), bytes;
    if (!dtype_bytes(t->dtype))
        return BAD(code, "its dtype is %d", (int)t->dtype);
    if (!ok || __builtin_mul_overflow(volume, dtype_bytes(t->dtype), &bytes) || bytes > INT64_MAX)
        return BAD(code, "its shape has more than 2^63 - 1 bytes");
    for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++)
        TRY(check_piece(m, t, &m->piece[i], code));
    TRY(check_reference(m, t, code));
    return t->alias_of ? check_alias(m, t, code) : check_tiles(m, t, code);
}

static int compare_names(const char *part_a, const char *name_a, const char *part_b, const char *name_b)
{
    int c = strcmp(part_a, part_b);
    return c ? c : strcmp(name_a, name_b);
}

static status *check_tensors(const struct metadata *m, enum status_code code)
{
    uint64_t next = 0, blocks = 0;
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        if (!t->part || !t->name || !*t->part || !*t->name)
            return BAD(code, "tensor %llu has no name", (ull)i);
        if (i && compare_names(t[-1].part, t[-1].name, t->part, t->name) >= 0)
            return BAD(code, "tensor %s/%s does not come after %s/%s", t->part, t->name, t[-1].part, t[-1].name);
        if (t->first_piece != next || t->piece_count > m->piece_count - next)
            return BAD(code, "tensor %s/%s has pieces [%llu, +%llu) of %llu", t->part, t->name, (ull)t->first_piece,
                       (ull)t->piece_count, (ull)m->piece_count);
        next += t->piece_count;
    }
    if (next != m->piece_count)
        return BAD(code, "%llu pieces belong to no tensor", (ull)(m->piece_count - next));
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        status *st = check_tensor(m, t, code);
        if (st) {
            char shape[DIMS_TEXT];
            bool known = t->shape.ndim >= 0 && t->shape.ndim <= LAYOUT_DIMS;
            dims_text(known ? t->shape.ndim : 0, t->shape.dim, shape, sizeof shape);
            return status_wrap(st, "tensor %s/%s %s %s", t->part, t->name, dtype_name(t->dtype), shape);
        }
    }
    for (uint64_t i = 0; i < m->piece_count; i++)
        blocks += meta_blocks(m->piece[i].bytes);
    if (blocks != m->crc_count)
        return BAD(code, "%llu checksums for %llu blocks", (ull)m->crc_count, (ull)blocks);
    return NULL;
}

static int compare_place(const void *va, const void *vb)
{
    const struct meta_piece *a = *(const struct meta_piece *const *)va, *b = *(const struct meta_piece *const *)vb;
    if (a->file != b->file)
        return a->file < b->file ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

static status *check_overlap(const struct metadata *m, enum status_code code)
{
    uint64_t n = 0;
    status *st = NULL;
    const struct meta_piece **sorted = mem_array(NULL, m->piece_count, sizeof *sorted);
    if (!sorted)
        return ERR(NO_MEMORY, "%llu pieces", (ull)m->piece_count);
    for (uint64_t i = 0; i < m->piece_count; i++)
        if (m->piece[i].bytes && !m->file[m->piece[i].file].owner) /* two tensors may refer to the same bytes */
            sorted[n++] = &m->piece[i];
    if (n)
        qsort(sorted, n, sizeof *sorted, compare_place);
    for (uint64_t i = 1; i < n && !st; i++) {
        const struct meta_piece *a = sorted[i - 1], *b = sorted[i];
        if (a->file == b->file && b->offset - a->offset < a->bytes)
            st = BAD(code, "two pieces share byte %llu of %s", (ull)b->offset, m->file[b->file].name);
    }
    mem_free(sorted);
    return st;
}

static int compare_blob(const void *va, const void *vb)
{
    const struct meta_blob *a = *(const struct meta_blob *const *)va, *b = *(const struct meta_blob *const *)vb;
    int c = compare_names(a->part, a->name, b->part, b->name);
    return c ? c : a->rank < b->rank ? -1 : a->rank > b->rank;
}

static status *check_blobs(const struct metadata *m, enum status_code code)
{
    status *st = NULL;
    const struct meta_blob **sorted = mem_array(NULL, m->blob_count, sizeof *sorted);
    if (!sorted)
        return ERR(NO_MEMORY, "%llu blobs", (ull)m->blob_count);
    for (uint64_t i = 0; i < m->blob_count && !st; i++) {
        const struct meta_blob *b = sorted[i] = &m->blob[i];
        if (!b->part || !b->name || !*b->part || !*b->name)
            st = BAD(code, "blob %llu has no name", (ull)i);
        else if (b->rank < -1 || b->rank >= (int64_t)m->world)
            st = BAD(code, "blob %s/%s is of rank %d of %u", b->part, b->name, b->rank, m->world);
        else if (b->bytes && !b->data)
            st = BAD(code, "blob %s/%s has %llu bytes that are nowhere", b->part, b->name, (ull)b->bytes);
    }
    if (!st && m->blob_count)
        qsort(sorted, m->blob_count, sizeof *sorted, compare_blob);
    for (uint64_t i = 1; i < m->blob_count && !st; i++)
        if (!compare_blob(&sorted[i - 1], &sorted[i]))
            st = BAD(code, "blob %s/%s of rank %d is there twice", sorted[i]->part, sorted[i]->name, sorted[i]->rank);
    mem_free(sorted);
    return st;
}

static status *check(const struct metadata *m, enum status_code code)
{
    int64_t ranks = 1;
    for (int a = 0; a < MESH_AXES; a++) {
        ranks *= m->mesh.size[a];
        if (m->mesh.size[a] < 1 || ranks > m->world)
            ranks = -1;
        if (ranks < 1)
            break;
    }
    if (ranks != m->world || m->world > INT32_MAX)
        return BAD(code, "the mesh (%d, %d, %d, %d, %d) does not fit %u ranks", m->mesh.size[0], m->mesh.size[1],
                   m->mesh.size[2], m->mesh.size[3], m->mesh.size[4], m->world);
    TRY(check_owners(m, code));
    TRY(check_files(m, code));
    TRY(check_tensors(m, code));
    TRY(check_overlap(m, code));
    return check_blobs(m, code);
}

/* ---- struct -> message. The message borrows strings and blobs; its arrays lie in `owned`. ---- */

struct writer {
    Tessera__Metadata msg;
    void *owned[24];
    int count;
    bool failed;
};

static void *take(struct writer *w, uint64_t count, size_t bytes)
{
    void *p = mem_calloc(count, bytes);
    if (!p)
        w->failed = true;
    else
        w->owned[w->count++] = p;
    return p;
}

/* Part texts, each once: tensors come sorted by part, blobs look theirs up. */
static uint32_t part_index(Tessera__Metadata *msg, char *part)
{
    for (size_t i = msg->n_part; i > 0; i--)
        if (!strcmp(msg->part[i - 1], part))
            return (uint32_t)(i - 1);
    msg->part[msg->n_part++] = part;
    return (uint32_t)(msg->n_part - 1);
}

static void write_files(struct writer *w, const struct metadata *m)
{
    Tessera__File *file = take(w, m->file_count, sizeof *file), **list = take(w, m->file_count, sizeof *list);
    for (uint64_t i = 0; i < m->file_count && !w->failed; i++) {
        tessera__file__init(&file[i]);
        file[i].name = m->file[i].name;
        file[i].bytes = m->file[i].bytes;
        file[i].header_bytes = m->file[i].header_bytes;
        file[i].header_crc = m->file[i].header_crc;
        file[i].has_owner = m->file[i].owner != 0;
        file[i].owner = m->file[i].owner;
        list[i] = &file[i];
    }
    w->msg.file = list;
    w->msg.n_file = m->file_count;
}

static void write_owners(struct writer *w, const struct metadata *m)
{
    Tessera__Owner *owner = take(w, m->owner_count, sizeof *owner), **list = take(w, m->owner_count, sizeof *list);
    for (uint64_t i = 0; i < m->owner_count && !w->failed; i++) {
        tessera__owner__init(&owner[i]);
        owner[i].step = m->owner[i].step;
        owner[i].run_id = m->owner[i].run_id;
        owner[i].attempt = m->owner[i].attempt;
        owner[i].url = m->owner[i].url;
        list[i] = &owner[i];
    }
    w->msg.owner = list;
    w->msg.n_owner = m->owner_count;
    w->msg.has_version = m->owner_count != 0;
    w->msg.version = META_VERSION;
}

static void write_tensors(struct writer *w, const struct metadata *m)
{
    Tessera__Tensor *tensor = take(w, m->tensor_count, sizeof *tensor), **list = take(w, m->tensor_count, sizeof *list);
    for (uint64_t i = 0; i < m->tensor_count && !w->failed; i++) {
        struct meta_tensor *t = &m->tensor[i];
        tessera__tensor__init(&tensor[i]);
        tensor[i].part = part_index(&w->msg, t->part);
        tensor[i].name = t->name;
        tensor[i].dtype = (uint32_t)t->dtype;
        tensor[i].n_dim = (size_t)t->shape.ndim;
        tensor[i].dim = t->shape.dim;
        tensor[i].trainable = t->trainable;
        tensor[i].alias_of = t->alias_of;
        tensor[i].pieces = t->piece_count;
        tensor[i].owner_part = t->owner_part;
        tensor[i].owner_name = t->owner_name;
        list[i] = &tensor[i];
    }
    w->msg.tensor = list;
    w->msg.n_tensor = m->tensor_count;
}

static void write_piece(Tessera__Metadata *msg, int ndim, const struct meta_piece *p, uint64_t *since_run)
{
    for (int d = 0; d < ndim; d++) {
        msg->box_off[msg->n_box_off++] = p->piece.box.off[d];
        msg->box_len[msg->n_box_len++] = p->piece.box.len[d];
    }
    if (piece_is_box(ndim, &p->piece)) {
        ++*since_run;
    } else {
        msg->run_gap[msg->n_run_gap++] = *since_run;
        msg->run_begin[msg->n_run_begin++] = p->piece.begin;
        msg->run_length[msg->n_run_length++] = piece_elems(&p->piece);
        *since_run = 0;
    }
    msg->piece_file[msg->n_piece_file++] = p->file;
    msg->piece_page[msg->n_piece_page++] = p->offset / PAGE;
}

static void write_pieces(struct writer *w, const struct metadata *m)
{
    Tessera__Metadata *msg = &w->msg;
    uint64_t entries = 0, since_run = 0;
    for (uint64_t i = 0; i < m->tensor_count; i++)
        entries += m->tensor[i].piece_count * (uint64_t)m->tensor[i].shape.ndim;
    msg->box_off = take(w, entries, sizeof *msg->box_off);
    msg->box_len = take(w, entries, sizeof *msg->box_len);
    msg->run_gap = take(w, m->piece_count, sizeof *msg->run_gap);
    msg->run_begin = take(w, m->piece_count, sizeof *msg->run_begin);
    msg->run_length = take(w, m->piece_count, sizeof *msg->run_length);
    msg->piece_file = take(w, m->piece_count, sizeof *msg->piece_file);
    msg->piece_page = take(w, m->piece_count, sizeof *msg->piece_page);
    msg->crc = take(w, m->crc_count, sizeof *msg->crc);
    for (uint64_t i = 0; i < m->tensor_count && !w->failed; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        for (uint64_t k = t->first_piece; k < t->first_piece + t->piece_count; k++) {
            uint64_t blocks = meta_blocks(m->piece[k].bytes);
            write_piece(msg, t->shape.ndim, &m->piece[k], &since_run);
            if (blocks)
                memcpy(msg->crc + msg->n_crc, m->crc + m->piece[k].first_crc, blocks * sizeof *m->crc);
            msg->n_crc += blocks;
        }
    }
}

static void write_blobs(struct writer *w, const struct metadata *m)
{
    Tessera__Blob *blob = take(w, m->blob_count, sizeof *blob), **list = take(w, m->blob_count, sizeof *list);
    for (uint64_t i = 0; i < m->blob_count && !w->failed; i++) {
        tessera__blob__init(&blob[i]);
        blob[i].part = part_index(&w->msg, m->blob[i].part);
        blob[i].name = m->blob[i].name;
        blob[i].rank = m->blob[i].rank;
        blob[i].data = (ProtobufCBinaryData){ .len = m->blob[i].bytes, .data = m->blob[i].data };
        list[i] = &blob[i];
    }
    w->msg.blob = list;
    w->msg.n_blob = m->blob_count;
}

static status *pack(struct writer *w, void **buf, size_t *bytes)
{
    size_t body = tessera__metadata__get_packed_size(&w->msg);
    unsigned char *b = mem_alloc(HEADER_BYTES + body);
    if (!b)
        return ERR(NO_MEMORY, "metadata of %zu bytes", body);
    tessera__metadata__pack(&w->msg, b + HEADER_BYTES);
    memcpy(b, magic, sizeof magic);
    put_u32(b + 8, w->msg.has_version ? w->msg.version : 1);
    put_u64(b + 12, body);
    put_u32(b + 20, crc32c(0, b + HEADER_BYTES, body));
    *buf = b;
    *bytes = HEADER_BYTES + body;
    return NULL;
}

status *metadata_encode(const struct metadata *m, void **buf, size_t *bytes)
{
    static const char no_build[1] = "";
    struct writer w = { .count = 0 };
    uint32_t mesh[MESH_AXES];
    TRY(check(m, ST_INTERNAL));
    tessera__metadata__init(&w.msg);
    for (int a = 0; a < MESH_AXES; a++)
        mesh[a] = (uint32_t)m->mesh.size[a];
    w.msg.run_id = m->run_id;
    w.msg.attempt = m->attempt;
    w.msg.parent_attempt = m->parent_attempt;
    w.msg.step = m->step;
    w.msg.time_ns = m->time_ns;
    w.msg.mesh = mesh;
    w.msg.n_mesh = MESH_AXES;
    w.msg.world = m->world;
    w.msg.build = m->build ? m->build : (char *)(uintptr_t)no_build;
    w.msg.state_print = m->state_print;
    w.msg.n_state_print = m->state_print ? 2 * (size_t)m->world : 0;
    w.msg.part = take(&w, m->tensor_count + m->blob_count, sizeof *w.msg.part);
    write_owners(&w, m);
    write_files(&w, m);
    write_tensors(&w, m);
    write_pieces(&w, m);
    write_blobs(&w, m);
    status *st = w.failed ? ERR(NO_MEMORY, "metadata of %llu pieces", (ull)m->piece_count) : pack(&w, buf, bytes);
    while (w.count)
        mem_free(w.owned[--w.count]);
    return st;
}

/* ---- message -> struct ---- */

/* failed: tells a message that could not be unpacked for want of memory from one that is none. */
static void *pb_alloc(void *failed, size_t bytes)
{
    void *p = mem_alloc(bytes);
    if (!p)
        *(bool *)failed = true;
    return p;
}

static void pb_free(void *unused, void *p)
{
    (void)unused;
    mem_free(p);
}

static status *keep(char **to, const char *from)
{
    *to = mem_strdup(from);
    return *to ? NULL : ERR(NO_MEMORY, "metadata");
}

static status *read_files(const Tessera__Metadata *msg, struct metadata *m)
{
    m->file = mem_calloc(msg->n_file, sizeof *m->file);
    if (!m->file)
        return ERR(NO_MEMORY, "%zu files", msg->n_file);
    for (size_t i = 0; i < msg->n_file; i++) {
        const Tessera__File *f = msg->file[i];
        m->file[i] = (struct meta_file){ .bytes = f->bytes,
                                         .header_bytes = f->header_bytes,
                                         .header_crc = f->header_crc,
                                         .owner = f->has_owner ? f->owner : 0 };
        m->file_count++;
        TRY(keep(&m->file[i].name, f->name));
    }
    return NULL;
}

static status *read_owners(const Tessera__Metadata *msg, struct metadata *m)
{
    m->owner = mem_calloc(msg->n_owner, sizeof *m->owner);
    if (!m->owner)
        return ERR(NO_MEMORY, "%zu owners", msg->n_owner);
    for (size_t i = 0; i < msg->n_owner; i++) {
        const Tessera__Owner *o = msg->owner[i];
        m->owner[i] = (struct meta_owner){ .step = o->step, .run_id = o->run_id, .attempt = o->attempt };
        m->owner_count++;
        if (o->url)
            TRY(keep(&m->owner[i].url, o->url));
    }
    return NULL;
}

static status *read_part(const Tessera__Metadata *msg, uint32_t part, char **to)
{
    if (part >= msg->n_part)
        return ERR(CORRUPT, "part %u of %zu", part, msg->n_part);
    return keep(to, msg->part[part]);
}

/* Tensors, and the columns' lengths against what they say. */
static status *read_tensors(const Tessera__Metadata *msg, struct metadata *m)
{
    uint64_t pieces = 0, entries = 0;
    m->tensor = mem_calloc(msg->n_tensor, sizeof *m->tensor);
    if (!m->tensor)
        return ERR(NO_MEMORY, "%zu tensors", msg->n_tensor);
    for (size_t i = 0; i < msg->n_tensor; i++) {
        const Tessera__Tensor *t = msg->tensor[i];
        if (t->n_dim > LAYOUT_DIMS || t->dtype >= DTYPE_COUNT)
            return ERR(CORRUPT, "tensor %s has %zu dimensions and dtype %u", t->name, t->n_dim, t->dtype);
        if (t->pieces > msg->n_piece_file - pieces)
            return ERR(CORRUPT, "tensor %s has %llu pieces; there are %zu in all", t->name, (ull)t->pieces,
                       msg->n_piece_file);
        struct meta_tensor *to = &m->tensor[m->tensor_count++];
        *to = (struct meta_tensor){ .dtype = (enum dtype)t->dtype,
                                    .shape = { .ndim = (int)t->n_dim },
                                    .trainable = t->trainable != 0,
                                    .first_piece = pieces,
                                    .piece_count = t->pieces };
        if (t->n_dim)
            memcpy(to->shape.dim, t->dim, t->n_dim * sizeof *t->dim);
        TRY(read_part(msg, t->part, &to->part));
        TRY(keep(&to->name, t->name));
        if (t->alias_of)
            TRY(keep(&to->alias_of, t->alias_of));
        if (t->owner_part)
            TRY(keep(&to->owner_part, t->owner_part));
        if (t->owner_name)
            TRY(keep(&to->owner_name, t->owner_name));
        pieces += t->pieces;
        entries += t->pieces * t->n_dim; /* at most LAYOUT_DIMS x a column's length */
    }
    if (pieces != msg->n_piece_file || pieces != msg->n_piece_page || entries != msg->n_box_off ||
        entries != msg->n_box_len)
        return ERR(CORRUPT, "tensors have %llu pieces with %llu dimensions; the columns hold %zu, %zu and %zu, %zu",
                   (ull)pieces, (ull)entries, msg->n_piece_file, msg->n_piece_page, msg->n_box_off, msg->n_box_len);
    if (msg->n_run_begin != msg->n_run_gap || msg->n_run_length != msg->n_run_gap)
        return ERR(CORRUPT, "the columns of runs hold %zu, %zu and %zu entries", msg->n_run_gap, msg->n_run_begin,
                   msg->n_run_length);
    return NULL;
}

/* Where the next unread entry of each column is. */
struct columns {
    size_t box, run;
    uint64_t since_run, crc;
};

static status *read_piece(const Tessera__Metadata *msg, struct columns *at, const struct meta_tensor *t,
                          struct meta_piece *p, uint64_t i)
{
    struct box b = { 0 };
    for (int d = 0; d < t->shape.ndim; d++, at->box++) {
        b.off[d] = msg->box_off[at->box];
        b.len[d] = msg->box_len[at->box];
    }
    p->piece = piece_of_box(t->shape.ndim, &b); /* box_volume may wrap here; check looks at the box before the run */
    if (at->run < msg->n_run_gap && msg->run_gap[at->run] == at->since_run) {
        p->piece.begin = msg->run_begin[at->run];
        if (__builtin_add_overflow(p->piece.begin, msg->run_length[at->run], &p->piece.end))
            return ERR(CORRUPT, "tensor %s/%s: a run of %llu elements", t->part, t->name,
                       (ull)msg->run_length[at->run]);
        at->run++;
        at->since_run = 0;
    } else {
        at->since_run++;
    }
    p->file = msg->piece_file[i];
    if (msg->piece_page[i] > UINT64_MAX / PAGE)
        return ERR(CORRUPT, "tensor %s/%s: a piece at page %llu", t->part, t->name, (ull)msg->piece_page[i]);
    p->offset = msg->piece_page[i] * PAGE;
    TRY(piece_check(&t->shape, &p->piece));
    if (__builtin_mul_overflow(piece_elems(&p->piece), dtype_bytes(t->dtype), &p->bytes) || p->bytes > INT64_MAX)
        return ERR(CORRUPT, "tensor %s/%s: a piece of %llu elements", t->part, t->name, (ull)piece_elems(&p->piece));
    p->first_crc = at->crc;
    at->crc += meta_blocks(p->bytes); /* below 2^44 each, so the sum does not wrap */
    return NULL;
}

static status *read_pieces(const Tessera__Metadata *msg, struct metadata *m)
{
    struct columns at = { 0 };
    m->piece = mem_calloc(msg->n_piece_file, sizeof *m->piece);
    m->crc = mem_calloc(msg->n_crc, sizeof *m->crc);
    if (!m->piece || !m->crc)
        return ERR(NO_MEMORY, "%zu pieces", msg->n_piece_file);
    for (uint64_t i = 0; i < m->tensor_count; i++)
        for (uint64_t k = 0; k < m->tensor[i].piece_count; k++) {
            status *st = read_piece(msg, &at, &m->tensor[i], &m->piece[m->piece_count], m->piece_count);
            if (status_code(st) == ST_INVALID) { /* piece_check's word for it; here it is damage */
                status *named =
                    ERR(CORRUPT, "tensor %s/%s: a piece: %s", m->tensor[i].part, m->tensor[i].name, status_message(st));
                status_free(st);
                return named;
            }
            TRY(st);
            m->piece_count++;
        }
    if (at.run != msg->n_run_gap)
        return ERR(CORRUPT, "%zu runs belong to no piece", msg->n_run_gap - at.run);
    if (at.crc != msg->n_crc)
        return ERR(CORRUPT, "%zu checksums for %llu blocks", msg->n_crc, (ull)at.crc);
    if (msg->n_crc)
        memcpy(m->crc, msg->crc, msg->n_crc * sizeof *m->crc);
    m->crc_count = msg->n_crc;
    return NULL;
}

static status *read_blobs(const Tessera__Metadata *msg, struct metadata *m)
{
    m->blob = mem_calloc(msg->n_blob, sizeof *m->blob);
    if (!m->blob)
        return ERR(NO_MEMORY, "%zu blobs", msg->n_blob);
    for (size_t i = 0; i < msg->n_blob; i++) {
        const Tessera__Blob *b = msg->blob[i];
        struct meta_blob *to = &m->blob[m->blob_count++];
        *to = (struct meta_blob){ .rank = b->rank, .bytes = b->data.len };
        TRY(read_part(msg, b->part, &to->part));
        TRY(keep(&to->name, b->name));
        to->data = mem_alloc(b->data.len);
        if (!to->data)
            return ERR(NO_MEMORY, "a blob of %zu bytes", b->data.len);
        if (b->data.len)
            memcpy(to->data, b->data.data, b->data.len);
    }
    return NULL;
}

static status *read_prints(const Tessera__Metadata *msg, struct metadata *m)
{
    size_t n = msg->n_state_print;
    if (!n)
        return NULL;
    if (n != 2 * (uint64_t)msg->world)
        return ERR(CORRUPT, "%zu words of fingerprints for %u ranks", n, msg->world);
    m->state_print = mem_array(NULL, n, sizeof *m->state_print);
    if (!m->state_print)
        return ERR(NO_MEMORY, "fingerprints of %u ranks", msg->world);
    memcpy(m->state_print, msg->state_print, n * sizeof *m->state_print);
    return NULL;
}

static status *read_message(const Tessera__Metadata *msg, struct metadata *m)
{
    m->run_id = msg->run_id;
    m->attempt = msg->attempt;
    m->parent_attempt = msg->parent_attempt;
    m->step = msg->step;
    m->time_ns = msg->time_ns;
    m->world = msg->world;
    if (msg->n_mesh != MESH_AXES)
        return ERR(CORRUPT, "a mesh of %zu axes", msg->n_mesh);
    for (int a = 0; a < MESH_AXES; a++)
        m->mesh.size[a] = msg->mesh[a] <= INT32_MAX ? (int)msg->mesh[a] : 0;
    TRY(keep(&m->build, msg->build));
    TRY(read_prints(msg, m));
    TRY(read_owners(msg, m));
    TRY(read_files(msg, m));
    TRY(read_tensors(msg, m));
    TRY(read_pieces(msg, m));
    TRY(read_blobs(msg, m));
    return check(m, ST_CORRUPT);
}

/* The frame is that of every version, so a damaged file of a newer one is CORRUPT, too. */
static status *check_header(const unsigned char *b, size_t bytes)
{
    if (bytes < HEADER_BYTES || memcmp(b, magic, sizeof magic))
        return ERR(CORRUPT, "metadata of %zu bytes does not begin as metadata does", bytes);
    if (get_u64(b + 12) != bytes - HEADER_BYTES)
        return ERR(CORRUPT, "metadata has %zu bytes; its header says %llu", bytes - HEADER_BYTES, (ull)get_u64(b + 12));
    uint32_t crc = crc32c(0, b + HEADER_BYTES, bytes - HEADER_BYTES);
    if (crc != get_u32(b + 20))
        return ERR(CORRUPT, "metadata has crc32c %08x; its header says %08x", crc, get_u32(b + 20));
    return NULL;
}

/* The checksum does not cover the header's version; the body repeats it. msg NULL: no body that this build can read. */
static status *check_version(uint32_t version, const Tessera__Metadata *msg)
{
    uint32_t body = msg && msg->has_version ? msg->version : 1;
    if (version < 1 || (msg && version != body))
        return ERR(CORRUPT, "metadata's header says version %u; its body is of version %u", version, body);
    if (msg && version == 1 && msg->n_owner)
        return ERR(CORRUPT, "metadata of version 1 has owners");
    if (version > META_VERSION)
        return ERR(UNSUPPORTED, "metadata of version %u; this build reads up to %d", version, META_VERSION);
    return msg ? NULL : ERR(CORRUPT, "the body of metadata is no message of ours");
}

status *metadata_decode(const void *buf, size_t bytes, struct metadata **out)
{
    bool no_memory = false;
    ProtobufCAllocator alloc = { .alloc = pb_alloc, .free = pb_free, .allocator_data = &no_memory };
    const unsigned char *b = buf;
    TRY(check_header(b, bytes));
    Tessera__Metadata *msg = tessera__metadata__unpack(&alloc, bytes - HEADER_BYTES, b + HEADER_BYTES);
    struct metadata *m = NULL;
    status *st = no_memory ? ERR(NO_MEMORY, "metadata of %zu bytes", bytes) : check_version(get_u32(b + 8), msg);
    if (!st) {
        m = mem_calloc(1, sizeof *m);
        st = m ? read_message(msg, m) : ERR(NO_MEMORY, "metadata");
    }
    if (msg)
        tessera__metadata__free_unpacked(msg, &alloc);
    if (st) {
        metadata_free(m);
        return status_wrap(st, "metadata");
    }
    *out = m;
    return NULL;
}

bool metadata_may_refer(const unsigned char head[META_HEAD_BYTES])
{
    return memcmp(head, magic, sizeof magic) == 0 && get_u32(head + 8) != 1;
}

void metadata_free(struct metadata *m)
{
    if (!m)
        return;
    for (uint64_t i = 0; i < m->file_count; i++)
        mem_free(m->file[i].name);
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        mem_free(m->tensor[i].part);
        mem_free(m->tensor[i].name);
        mem_free(m->tensor[i].alias_of);
        mem_free(m->tensor[i].owner_part);
        mem_free(m->tensor[i].owner_name);
    }
    for (uint64_t i = 0; i < m->owner_count; i++)
        mem_free(m->owner[i].url);
    for (uint64_t i = 0; i < m->blob_count; i++) {
        mem_free(m->blob[i].part);
        mem_free(m->blob[i].name);
        mem_free(m->blob[i].data);
    }
    mem_free(m->file);
    mem_free(m->owner);
    mem_free(m->tensor);
    mem_free(m->piece);
    mem_free(m->crc);
    mem_free(m->blob);
    mem_free(m->state_print);
    mem_free(m->build);
    mem_free(m);
}

int64_t metadata_find(const struct metadata *m, const char *part, const char *name)
{
    uint64_t lo = 0, hi = m->tensor_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        int c = compare_names(m->tensor[mid].part, m->tensor[mid].name, part, name);
        if (!c)
            return (int64_t)mid;
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return -1;
}

const struct meta_owner *metadata_owner(const struct metadata *m, const struct meta_tensor *t)
{
    uint32_t owner = t->piece_count ? m->file[m->piece[t->first_piece].file].owner : 0;
    return owner ? &m->owner[owner - 1] : NULL;
}

const struct meta_blob *metadata_blob(const struct metadata *m, const char *part, const char *name, int32_t rank)
{
    for (uint64_t i = 0; i < m->blob_count; i++)
        if (m->blob[i].rank == rank && !strcmp(m->blob[i].name, name) && !strcmp(m->blob[i].part, part))
            return &m->blob[i];
    return NULL;
}
