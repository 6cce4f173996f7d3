/* share: read roster_make (who writes what, in order), then share_make: pieces, files with their HDF5 headers, chunks.
 */
#include "ckpt/share.h"

#include "ckpt/reshard.h"
#include "comm/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GAP_BYTES = 64 << 10, /* zeros worth writing to keep a chunk going */ LEAST_CHUNKS = 16 };

void roster_free(struct roster *r)
{
    mem_free(r->piece);
    mem_free(r->file);
    mem_free(r->first);
    mem_free(r->files);
    mem_free(r->crcs);
    *r = (struct roster){ 0 };
}

static uint64_t payload_bytes(const struct plan *p, uint32_t i)
{
    return piece_elems(&p->piece[i].piece) * dtype_bytes(p->tensor[p->piece[i].tensor].dtype);
}

/* A writer's entries so far; its newest file, which is of the part that its newest entry is of. */
struct writer {
    uint64_t next;
    const char *part;
};

/* One file a part, numbered by first appearance: the pieces come part by part. */
static void add_entry(const struct plan *p, struct roster *r, struct writer *writer, uint32_t i)
{
    int32_t who = p->piece[i].writer;
    struct writer *w = &writer[who];
    const char *part = p->tensor[p->piece[i].tensor].part;
    if (!w->part || (w->part != part && strcmp(w->part, part) != 0))
        r->files[who]++;
    w->part = part;
    r->piece[w->next] = i;
    r->file[w->next++] = r->files[who] - 1;
    r->crcs[who] += meta_blocks(payload_bytes(p, i));
}

status *roster_make(const struct plan *p, struct roster *out)
{
    size_t ranks = (size_t)p->ranks, n = p->piece_count ? p->piece_count : 1;
    struct roster r = { .piece = mem_calloc(n, sizeof *r.piece),
                        .file = mem_calloc(n, sizeof *r.file),
                        .first = mem_calloc(ranks + 1, sizeof *r.first),
                        .files = mem_calloc(ranks, sizeof *r.files),
                        .crcs = mem_calloc(ranks, sizeof *r.crcs) };
    struct writer *writer = mem_calloc(ranks, sizeof *writer);
    if (!r.piece || !r.file || !r.first || !r.files || !r.crcs || !writer) {
        mem_free(writer);
        roster_free(&r);
        return ERR(NO_MEMORY, "roster of %llu pieces", (unsigned long long)p->piece_count);
    }
    for (uint64_t i = 0; i < p->piece_count; i++)
        r.first[p->piece[i].writer + 1]++;
    for (size_t i = 0; i < ranks; i++) {
        writer[i].next = r.first[i];
        r.first[i + 1] += r.first[i];
    }
    for (uint64_t i = 0; i < p->piece_count; i++)
        add_entry(p, &r, writer, (uint32_t)i);
    mem_free(writer);
    *out = r;
    return NULL;
}

void share_free(struct share *s)
{
    if (!s)
        return;
    for (uint64_t i = 0; s->file && i < s->files; i++)
        h5shard_image_free(&s->file[i].image);
    mem_free(s->piece);
    mem_free(s->by_plan);
    mem_free(s->source);
    mem_free(s->file);
    mem_free(s->segment);
    mem_free(s->chunk);
    mem_free(s->crc);
    mem_free(s);
}

/* An entry of the roster by the order of the state. */
struct capture {
    uint64_t local_offset, entry;
    uint32_t local;
};

static int by_capture(const void *va, const void *vb)
{
    const struct capture *a = va, *b = vb;
    if (a->local != b->local)
        return a->local < b->local ? -1 : 1;
    if (a->local_offset != b->local_offset)
        return a->local_offset < b->local_offset ? -1 : 1;
    return a->entry < b->entry ? -1 : a->entry > b->entry;
}

static status *fill_pieces(const struct plan *p, const struct roster *r, int rank, struct share *s)
{
    struct capture *c = mem_array(NULL, s->pieces, sizeof *c);
    if (!c)
        return ERR(NO_MEMORY, "share of %llu pieces", (unsigned long long)s->pieces);
    for (uint64_t i = 0; i < s->pieces; i++) {
        const struct plan_piece *q = &p->piece[r->piece[r->first[rank] + i]];
        c[i] = (struct capture){ .local_offset = q->local_offset, .entry = r->first[rank] + i, .local = q->local };
    }
    if (s->pieces)
        qsort(c, s->pieces, sizeof *c, by_capture);
    for (uint64_t i = 0; i < s->pieces; i++) {
        uint64_t e = c[i].entry;
        const struct plan_piece *q = &p->piece[r->piece[e]];
        const struct plan_tensor *t = &p->tensor[q->tensor];
        s->piece[i] = (struct share_piece){ .plan_piece = r->piece[e],
                                            .file = r->file[e],
                                            .local = q->local,
                                            .local_offset = q->local_offset,
                                            .ndim = t->shape.ndim,
                                            .elem_bytes = dtype_bytes(t->dtype),
                                            .bytes = payload_bytes(p, r->piece[e]),
                                            .first_crc = s->crcs };
        s->own_pieces += q->local != PLAN_MERGED;
        s->crcs += meta_blocks(s->piece[i].bytes);
        s->payload_bytes += s->piece[i].bytes;
        s->file[r->file[e]].part = t->part;
        s->by_plan[e - r->first[rank]] = (uint32_t)i;
    }
    mem_free(c);
    return NULL;
}

/* The HDF5 image of file f, and with it the offsets of its pieces. */
static status *make_image(const struct plan *p, struct share *s, uint32_t f, struct h5shard_item *item,
                          char (*name)[16])
{
    size_t n = 0;
    for (uint64_t i = 0; i < s->pieces; i++) {
        if (s->piece[i].file != f)
            continue;
        const struct plan_piece *q = &p->piece[s->piece[i].plan_piece];
        const struct plan_tensor *t = &p->tensor[q->tensor];
        snprintf(name[n], sizeof name[n], "p%u", q->number);
        item[n] = (struct h5shard_item){
            .tensor = t->name, .name = name[n], .dtype = t->dtype, .shape = t->shape, .piece = q->piece
        };
        n++;
    }
    struct h5shard_image *image = &s->file[f].image;
    TRY(status_wrap(h5shard_image(item, n, image), "part %s", s->file[f].part));
    s->file[f].header_crc = crc32c(0, image->header, image->header_bytes);
    n = 0;
    for (uint64_t i = 0; i < s->pieces; i++)
        if (s->piece[i].file == f)
            s->piece[i].offset = image->offset[n++];
    return NULL;
}

static status *make_images(const struct plan *p, struct share *s)
{
    size_t n = s->pieces ? s->pieces : 1;
    struct h5shard_item *item = mem_calloc(n, sizeof *item);
    char(*name)[16] = mem_calloc(n, sizeof *name);
    status *st = item && name ? NULL : ERR(NO_MEMORY, "headers of %zu datasets", n);
    for (uint32_t f = 0; !st && f < s->files; f++)
        st = make_image(p, s, f, item, name);
    mem_free(item);
    mem_free(name);
    return st;
}

/* Close the chunk: its padding up to 4 KiB is written too, so that all but a file's last write is whole pages. */
static void close_chunk(struct share *s, struct share_chunk *c)
{
    if (!c || !c->segments)
        return;
    uint64_t end = c->offset + c->bytes, file_bytes = s->file[c->file].image.file_bytes;
    end = (end + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
    c->bytes = (end < file_bytes ? end : file_bytes) - c->offset;
    uint64_t block = (c->bytes + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
    s->block_bytes = block > s->block_bytes ? block : s->block_bytes;
    s->data_chunks++;
}

static struct share_chunk *new_chunk(struct share *s, uint64_t piece, uint64_t offset)
{
    uint32_t file = s->piece[piece].file;
    s->chunk[s->chunks] = (struct share_chunk){
        .file = file, .first_piece = (uint32_t)piece, .offset = offset, .first_segment = s->segments
    };
    s->file[file].chunks++;
    return &s->chunk[s->chunks++];
}

/* How many bytes of [lo, bytes) of piece q fit behind what chunk c holds; 0: start another. */
static uint64_t fits(const struct share_chunk *c, const struct share_piece *q, uint64_t lo, uint64_t chunk_bytes)
{
    uint64_t at = q->offset + lo;
    if (!c || !c->segments || c->file != q->file || at < c->offset + c->bytes ||
        at - c->offset - c->bytes > GAP_BYTES || at - c->offset >= chunk_bytes)
        return 0;
    uint64_t room = chunk_bytes - (at - c->offset), left = q->bytes - lo;
    return left <= room ? left : room / META_BLOCK_BYTES * META_BLOCK_BYTES;
}

/* Most that one chunk holds: whole checksum blocks. */
static uint64_t most_of_chunk(const struct share *s)
{
    uint64_t blocks = s->payload_bytes / LEAST_CHUNKS / META_BLOCK_BYTES + 1;
    return blocks * META_BLOCK_BYTES < s->chunk_bytes ? blocks * META_BLOCK_BYTES : s->chunk_bytes;
}

/* Put piece i behind what chunk c (NULL: none) holds, and into as many more chunks as it takes; before the first piece
 * of a file, its header. Returns the last chunk. */
static struct share_chunk *cut_piece(struct share *s, uint64_t i, struct share_chunk *c, uint64_t most)
{
    const struct share_piece *q = &s->piece[i];
    if (!s->file[q->file].chunks) {
        close_chunk(s, c);
        c = new_chunk(s, i, 0);
        c->bytes = s->file[q->file].image.header_bytes;
    }
    for (uint64_t lo = 0; lo < q->bytes;) {
        uint64_t n = fits(c, q, lo, most);
        if (!n) {
            close_chunk(s, c);
            c = new_chunk(s, i, q->offset + lo);
            n = q->bytes - lo < most ? q->bytes - lo : most;
        }
        uint64_t at = q->offset + lo - c->offset;
        s->segment[s->segments++] = (struct share_segment){ .piece = (uint32_t)i, .lo = lo, .hi = lo + n, .at = at };
        c->segments++;
        c->payload_bytes += n;
        c->bytes = at + n;
        lo += n;
    }
    return c;
}

static int by_first_piece(const void *va, const void *vb)
{
    const struct share_chunk *a = va, *b = vb;
    if (a->first_piece != b->first_piece)
        return a->first_piece < b->first_piece ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset; /* of one file, then */
}

/* Pieces of this rank's own tensors: file by file. */
static void cut_own(struct share *s, uint64_t most)
{
    for (uint32_t f = 0; f < s->files; f++) {
        struct share_chunk *c = NULL;
        for (uint64_t i = 0; i < s->own_pieces; i++)
            if (s->piece[i].file == f)
                c = cut_piece(s, i, c, most);
        close_chunk(s, c);
    }
    if (s->chunks)
        qsort(s->chunk, s->chunks, sizeof *s->chunk, by_first_piece);
    for (uint64_t i = 0, past = 0; i < s->own_pieces; i++) {
        while (past < s->chunks && s->chunk[past].first_piece <= i)
            past++;
        s->piece[i].past_chunk = past;
    }
    s->tensor_chunks = s->own_chunks = s->chunks;
}

/* Merged ones, whose bytes others send in the order of the pieces: as they come. */
static void cut_merged(struct share *s, uint64_t most)
{
    struct share_chunk *c = NULL;
    for (uint64_t i = s->own_pieces; i < s->pieces; i++) {
        c = cut_piece(s, i, c, most);
        s->piece[i].past_chunk = s->chunks;
    }
    close_chunk(s, c);
}

static void cut_chunks(struct share *s)
{
    const uint64_t most = most_of_chunk(s);
    cut_own(s, most);
    cut_merged(s, most);
}

status *share_make(const struct plan *p, const struct roster *r, int rank, uint64_t chunk_bytes, struct share **out)
{
    struct share *s = mem_calloc(1, sizeof *s);
    if (!s)
        return ERR(NO_MEMORY, "a share");
    s->pieces = r->first[rank + 1] - r->first[rank];
    s->files = r->files[rank];
    s->chunk_bytes = chunk_bytes;
    size_t n = s->pieces ? s->pieces : 1, blocks = r->crcs[rank];
    s->piece = mem_calloc(n, sizeof *s->piece);
    s->by_plan = mem_calloc(n, sizeof *s->by_plan);
    s->source = mem_calloc(n, sizeof *s->source);
    s->file = mem_calloc(s->files ? s->files : 1, sizeof *s->file);
    s->crc = mem_calloc(blocks ? blocks : 1, sizeof *s->crc);
    /* a segment ends its piece or holds at least one checksum block */
    s->segment = mem_calloc(n + blocks, sizeof *s->segment);
    s->chunk = mem_calloc(n + blocks + s->files, sizeof *s->chunk);
    status *st = NULL;
    if (!s->piece || !s->by_plan || !s->source || !s->file || !s->crc || !s->segment || !s->chunk)
        st = ERR(NO_MEMORY, "share of %zu pieces", n);
    if (!st)
        st = fill_pieces(p, r, rank, s);
    if (!st)
        st = make_images(p, s);
    if (st) {
        share_free(s);
        return st;
    }
    cut_chunks(s);
    *out = s;
    return NULL;
}

void share_gather(const struct share *s, const struct share_segment *seg, uint64_t from, size_t n, void *out)
{
    const struct share_piece *p = &s->piece[seg->piece];
    const struct share_source *src = &s->source[seg->piece];
    uint64_t lo = p->local_offset + (seg->lo + from) / p->elem_bytes;
    piece_gather(p->ndim, &src->piece, p->elem_bytes, src->base, src->strided ? src->stride : NULL, lo,
                 lo + n / p->elem_bytes, out);
}

void share_checksum(struct share *s, const struct share_segment *seg, uint64_t from, const void *payload, size_t n)
{
    uint32_t *crc = s->crc + s->piece[seg->piece].first_crc;
    const unsigned char *p = payload;
    for (uint64_t at = seg->lo + from, end = at + n; at < end;) {
        uint64_t k = META_BLOCK_BYTES - at % META_BLOCK_BYTES;
        k = k < end - at ? k : end - at;
        uint32_t *c = crc + at / META_BLOCK_BYTES;
        *c = crc32c(at % META_BLOCK_BYTES ? *c : 0, p, k);
        p += k;
        at += k;
    }
}
