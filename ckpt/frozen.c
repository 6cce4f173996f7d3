/* frozen: tensors that the caller promises not to change, and that the newest committed step holds already, are stored
 * by reference to it (options.reference_frozen).
 *
 * Decided when a plan is made, on facts that all ranks share: the step's metadata goes to all, each rank compares the
 * stored pieces that lie in one stretch of its memory by their checksums, and a maximum over ranks tells which pieces
 * were found alike everywhere. A tensor with a piece that nobody could compare, or that differs somewhere, is written.
 * From there on it is a reference like any other. */
#include "ckpt/handle.h"
#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

enum { COMPARED = 1, DIFFERS = 2, TRIES = 2 };

/* One plan may write what the next one refers to; a tensor that was not found alike then is not frozen. */
bool frozen_due(const tessera *t)
{
    const struct cached_plan *c = &t->cache;
    return t->o.reference_frozen && c->plan && c->frozen_written && c->compared < TRIES && t->has_newest &&
           t->newest < t->save.step;
}

/* Rank 0: the newest step's metadata, if it can be had. */
static status *read_newest(tessera *t, struct metadata **out)
{
    status *st = commit_read(t->store, t->newest, out);
    if (status_code(st) == ST_NOT_FOUND || status_code(st) == ST_CORRUPT || status_code(st) == ST_UNSUPPORTED) {
        status_free(st);
        st = NULL;
    }
    return st;
}

static uint8_t compare_piece(const struct metadata *m, const struct meta_piece *stored, const unsigned char *memory)
{
    for (uint64_t b = 0; b < meta_blocks(stored->bytes); b++) {
        uint64_t at = b * META_BLOCK_BYTES, left = stored->bytes - at;
        if (crc32c(0, memory + at, left < META_BLOCK_BYTES ? left : META_BLOCK_BYTES) != m->crc[stored->first_crc + b])
            return DIFFERS;
    }
    return COMPARED;
}

static bool is_candidate(const struct meta_tensor *t, enum dtype dtype, const struct shape *s)
{
    return !t->alias_of && t->piece_count && t->dtype == dtype && t->shape.ndim == s->ndim &&
           memcmp(t->shape.dim, s->dim, (size_t)s->ndim * sizeof s->dim[0]) == 0;
}

/* Whether the stored piece lies in one stretch of a piece in memory, and at which of its elements: the boxes are alike,
 * or cut by their rows alone. */
static bool lies_in(int ndim, const struct piece *stored, const struct piece *memory, uint64_t *at)
{
    const struct box *a = &stored->box, *b = &memory->box;
    uint64_t row = 1;
    for (int d = 1; d < ndim; d++) {
        if (a->off[d] != b->off[d] || a->len[d] != b->len[d])
            return false;
        row *= a->len[d];
    }
    if (ndim && (a->off[0] < b->off[0] || a->off[0] + a->len[0] > b->off[0] + b->len[0]))
        return false;
    uint64_t shift = ndim ? (a->off[0] - b->off[0]) * row : 0;
    if (shift + stored->begin < memory->begin || shift + stored->end > memory->end)
        return false;
    *at = shift + stored->begin - memory->begin;
    return true;
}

/* Local: what this rank can say of the stored pieces. */
static void compare_state(const tessera *t, const tessera_state *s, const struct frozen *f)
{
    for (size_t i = 0; i < s->count && t->dev->host; i++) {
        const struct state_piece *p = &s->piece[i];
        int64_t k =
            p->trainable || p->alias_of || p->reference || p->strided ? -1 : metadata_find(f->m, p->part, p->name);
        if (k < 0 || !is_candidate(&f->m->tensor[k], p->dtype, &p->shape))
            continue;
        const struct meta_tensor *stored = &f->m->tensor[k];
        for (uint64_t j = stored->first_piece; j < stored->first_piece + stored->piece_count; j++) {
            const struct meta_piece *q = &f->m->piece[j];
            uint64_t at;
            if (!lies_in(p->shape.ndim, &q->piece, &p->piece, &at))
                continue;
            uint8_t found = compare_piece(f->m, q, (const unsigned char *)p->data + at * dtype_bytes(p->dtype));
            f->found[j] = found > f->found[j] ? found : f->found[j];
        }
    }
}

void frozen_free(struct frozen *f)
{
    metadata_free(f->m);
    mem_free(f->found);
    *f = (struct frozen){ 0 };
}

status *frozen_compare(tessera *t, const tessera_state *s, struct frozen *out)
{
    struct frozen f = { .step = t->newest };
    if (!t->o.reference_frozen || !t->has_newest || t->newest >= t->save.step)
        return NULL;
    status *st = t->x->rank == 0 ? read_newest(t, &f.m) : NULL;
    TRY(load_share_metadata(t, &f.m, st));
    if (!f.m)
        return NULL;
    t->cache.compared++;
    f.found = mem_calloc(f.m->piece_count, 1);
    st = comm_agree(t->x, f.found ? NULL : ERR(NO_MEMORY, "%llu pieces", (unsigned long long)f.m->piece_count));
    if (!st) {
        compare_state(t, s, &f);
        if (f.m->piece_count)
            st = comm_allreduce(t->x, f.found, f.m->piece_count, COMM_U8, COMM_MAX, NULL);
    }
    if (st) {
        frozen_free(&f);
        return st;
    }
    *out = f;
    return NULL;
}

static bool all_compared(const struct frozen *f, const struct meta_tensor *t)
{
    for (uint64_t i = t->first_piece; i < t->first_piece + t->piece_count; i++)
        if (f->found[i] != COMPARED)
            return false;
    return true;
}

/* The text that refers to tensor k, appended to the texts of the descriptors. */
static status *append_reference(const struct frozen *f, const struct meta_tensor *to, char **text, size_t *text_bytes)
{
    struct tessera_reference r = TESSERA_REFERENCE;
    char *one;
    r.step = f->step;
    TRY(refs_text(&r, to->part, to->name, &one));
    size_t n = strlen(one) + 1;
    char *more = mem_realloc(*text, *text_bytes + n + 1);
    if (more) {
        memcpy(more + *text_bytes, one, n);
        more[*text_bytes + n] = 0;
        *text = more;
        *text_bytes += n;
    }
    mem_free(one);
    return more ? NULL : ERR(NO_MEMORY, "texts of %zu bytes", *text_bytes + n);
}

status *frozen_refer(const struct frozen *f, struct plan_desc *desc, uint64_t count, char **text, size_t *text_bytes)
{
    if (!f->m)
        return NULL;
    uint64_t *at = mem_calloc(f->m->tensor_count, sizeof *at); /* 1 + offset of a tensor's text */
    status *st = at ? NULL : ERR(NO_MEMORY, "%llu tensors", (unsigned long long)f->m->tensor_count);
    for (uint64_t i = 0; i < count && !st; i++) {
        struct plan_desc *d = &desc[i];
        int64_t k = d->trainable || d->alias != UINT64_MAX || d->reference
                        ? -1
                        : metadata_find(f->m, *text + d->part, *text + d->name);
        if (k < 0 || !is_candidate(&f->m->tensor[k], d->dtype, &d->shape) || !all_compared(f, &f->m->tensor[k]))
            continue;
        if (!at[k]) {
            uint64_t offset = *text_bytes;
            st = append_reference(f, &f->m->tensor[k], text, text_bytes);
            at[k] = 1 + offset;
        }
        d->reference = at[k];
    }
    mem_free(at);
    return st;
}

void frozen_note_plan(const struct plan *p, uint8_t flags[2])
{
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        bool ok, stored = !t->alias_of && shape_volume(&t->shape, &ok);
        flags[0] |= stored && !t->piece_count;
        flags[1] |= stored && t->piece_count && !t->trainable;
    }
}
