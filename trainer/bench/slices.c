/* slices: see slices.h. */
#include "trainer/bench/slices.h"

#include "comm/base/dtype.h"
#include "comm/base/mem.h"

#include <stdio.h>
#include <string.h>

enum { ALIGN = 4096, ZERO_ALIGN = 1024 };

static const struct {
    const char *part, *suffix;
    enum dtype dtype;
} kinds[SLICES_KINDS] = { { "model", "", DTYPE_BF16 }, { "optim", "/m", DTYPE_F32 }, { "optim", "/v", DTYPE_F32 } };

static uint64_t layer_bytes(void)
{
    uint64_t n = 0;
    for (int k = 0; k < SLICES_KINDS; k++)
        n += dtype_bytes(kinds[k].dtype);
    return n * SLICES_ROWS * SLICES_COLS;
}

static struct layout layout_of(int kind, bool zero)
{
    struct layout l = { .shape = { .ndim = 2, .dim = { SLICES_ROWS, SLICES_COLS } }, .stage = -1 };
    for (int d = 0; d < LAYOUT_DIMS; d++)
        l.cut[d] = -1;
    l.cut[1] = MESH_TP;
    if (kind && zero) {
        l.run_axes = 1u << MESH_DP;
        l.run_align = ZERO_ALIGN;
    }
    return l;
}

status *slices_open(uint64_t state_bytes, const struct mesh *m, int rank, bool zero, struct slices *out)
{
    struct slices s = { .layers = state_bytes / layer_bytes() };
    if (!s.layers)
        return ERR(INVALID, "state_bytes=%llu: a layer takes %llu", (unsigned long long)state_bytes,
                   (unsigned long long)layer_bytes());
    if (m->size[MESH_TP] > SLICES_COLS)
        return ERR(INVALID, "%d ranks cannot cut %d columns", m->size[MESH_TP], SLICES_COLS);
    uint64_t count = s.layers * SLICES_KINDS;
    s.slice = mem_calloc(count, sizeof *s.slice);
    if (!s.slice)
        return ERR(NO_MEMORY, "%llu slices", (unsigned long long)count);
    for (uint64_t i = 0; i < count; i++) {
        int kind = (int)(i % SLICES_KINDS);
        struct layout l = layout_of(kind, zero);
        struct slice *x = &s.slice[i];
        x->piece = layout_piece(&l, m, rank);
        x->elem_bytes = dtype_bytes(kinds[kind].dtype);
        x->bytes = piece_elems(&x->piece) * x->elem_bytes;
        s.block_bytes += (x->bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    s.block = mem_block(s.block_bytes, ALIGN);
    if (!s.block) {
        mem_free(s.slice);
        return ERR(NO_MEMORY, "%zu bytes of tensors", s.block_bytes);
    }
    for (uint64_t i = 0, at = 0; i < count; at += (s.slice[i++].bytes + ALIGN - 1) / ALIGN * ALIGN)
        s.slice[i].data = s.block + at;
    *out = s;
    return NULL;
}

void slices_close(struct slices *s)
{
    if (s->block)
        mem_block_free(s->block, s->block_bytes);
    mem_free(s->slice);
    *s = (struct slices){ 0 };
}

uint64_t slices_total_bytes(const struct slices *s)
{
    return s->layers * layer_bytes();
}

/* Of the run's element e of slice i. */
static uint64_t value_at(const struct slices *s, uint64_t i, uint64_t e)
{
    const struct piece *p = &s->slice[i].piece;
    uint64_t row = p->box.off[0] + (p->begin + e) / p->box.len[1];
    uint64_t col = p->box.off[1] + (p->begin + e) % p->box.len[1];
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u ^ (row * SLICES_COLS + col) * 0xd1342543de82ef95u;
    return x ^ x >> 29;
}

void slices_fill(struct slices *s)
{
    for (uint64_t i = 0; i < s->layers * SLICES_KINDS; i++) {
        const struct slice *x = &s->slice[i];
        for (uint64_t e = 0; e < piece_elems(&x->piece); e++) {
            uint64_t v = value_at(s, i, e);
            memcpy(x->data + e * x->elem_bytes, &v, x->elem_bytes);
        }
    }
}

status *slices_check(const struct slices *s)
{
    for (uint64_t i = 0; i < s->layers * SLICES_KINDS; i++) {
        const struct slice *x = &s->slice[i];
        for (uint64_t e = 0; e < piece_elems(&x->piece); e++) {
            uint64_t v = value_at(s, i, e);
            if (memcmp(x->data + e * x->elem_bytes, &v, x->elem_bytes) != 0)
                return ERR(CORRUPT, "layer %llu%s, element %llu of this rank was not loaded as it was saved",
                           (unsigned long long)(i / SLICES_KINDS), kinds[i % SLICES_KINDS].suffix,
                           (unsigned long long)e);
        }
    }
    return NULL;
}

status *slices_state(const struct slices *s, tessera *t, tessera_state **out)
{
    tessera_state *state = NULL;
    status *st = tessera_state_new(t, &state);
    for (uint64_t i = 0; !st && i < s->layers * SLICES_KINDS; i++) {
        const struct slice *x = &s->slice[i];
        char name[48];
        snprintf(name, sizeof name, "layers.%03llu%s", (unsigned long long)(i / SLICES_KINDS),
                 kinds[i % SLICES_KINDS].suffix);
        struct tessera_tensor d = TESSERA_TENSOR;
        d.part = kinds[i % SLICES_KINDS].part;
        d.name = name;
        d.dtype = (int)kinds[i % SLICES_KINDS].dtype;
        d.ndim = 2;
        d.shape[0] = SLICES_ROWS;
        d.shape[1] = SLICES_COLS;
        for (int k = 0; k < 2; k++) {
            d.offset[k] = x->piece.box.off[k];
            d.length[k] = x->bytes ? x->piece.box.len[k] : 0;
        }
        d.run_begin = x->piece.begin;
        d.run_end = x->piece.end;
        d.data = x->data;
        st = tessera_state_add_tensor(state, &d);
    }
    if (st)
        tessera_state_free(state);
    else
        *out = state;
    return st;
}
