/* fake_state: a table of tensors, one rule for who holds what, one function for what every element is. */
#include "tests/support/fake_state.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"

enum cut_rule { REPLICATED, ROWS, COLUMNS, OWNED, TWO_PIECES };

struct fake_tensor {
    const char *part, *name, *alias_of;
    enum dtype dtype;
    int ndim;
    uint64_t dim[LAYOUT_DIMS];
    enum cut_rule rule;
};

static const struct fake_tensor table[] = {
    { "model", "embed.weight", NULL, DTYPE_F32, 2, { 67, 16 }, ROWS },
    { "model", "layers.0.q/weight", NULL, DTYPE_BF16, 2, { 33, 7 }, COLUMNS },
    { "model", "big", NULL, DTYPE_F32, 2, { 1500, 1024 }, ROWS },
    { "model", "head.weight", "embed.weight", DTYPE_F32, 2, { 67, 16 }, ROWS },
    { "model", "norm", NULL, DTYPE_F32, 1, { 5 }, REPLICATED },
    { "model", "empty", NULL, DTYPE_F32, 2, { 0, 5 }, ROWS },
    { "optim", "big.m", NULL, DTYPE_F32, 2, { 1024, 1500 }, COLUMNS },
    { "optim", "scalar", NULL, DTYPE_F64, 0, { 0 }, REPLICATED },
    { "optim", "cube", NULL, DTYPE_I16, 3, { 5, 6, 7 }, COLUMNS },
    { "optim", "flat", NULL, DTYPE_U8, 1, { (3 << 20) + 1 }, ROWS },
    { "ref/data", "owned", NULL, DTYPE_I64, 1, { 13 }, OWNED },
    { "ref/data", "two", NULL, DTYPE_BOOL, 2, { 8, 9 }, TWO_PIECES },
    { "ref/data", "one", NULL, DTYPE_U4X2, 5, { 1, 1, 1, 1, 1 }, REPLICATED },
};
enum { TENSORS = sizeof table / sizeof *table };

static struct shape shape_of(const struct fake_cut *cut, int t)
{
    struct shape s = { .ndim = table[t].ndim };
    for (int d = 0; d < s.ndim; d++) {
        s.dim[d] = table[t].dim[d];
        if (cut->shrink > 1 && s.dim[d] > 1000)
            s.dim[d] = s.dim[d] / cut->shrink + 1;
    }
    return s;
}

uint64_t fake_bytes(const struct fake_cut *cut)
{
    uint64_t n = 0;
    for (int t = 0; t < TENSORS; t++) {
        struct shape s = shape_of(cut, t);
        bool ok;
        n += table[t].alias_of ? 0 : shape_volume(&s, &ok) * dtype_bytes(table[t].dtype);
    }
    return n;
}

/* Pieces of tensor t on this rank: 0, 1 or 2. */
static int pieces_of(const struct fake_cut *cut, int rank, int t, const struct shape *s, struct piece out[2])
{
    struct piece whole = piece_whole(s);
    uint64_t begin, end, tp = (uint64_t)cut->tp, replicas = (uint64_t)(cut->size / cut->tp);
    uint64_t at = (uint64_t)rank % tp, replica = (uint64_t)rank / tp;
    enum cut_rule rule = table[t].rule;
    if (rule == OWNED && rank != t % cut->size)
        return 0;
    struct box b = whole.box;
    if (rule == TWO_PIECES) { /* rows i and, from the other end, n - 1 - i, dealt over the tensor-parallel ranks */
        int n = 0;
        layout_cut(s->dim[0], 2 * tp, at, &begin, &end);
        for (int k = 0; k < 2; k++) {
            b.off[0] = begin;
            b.len[0] = end - begin;
            out[n++] = piece_of_box(s->ndim, &b);
            layout_cut(s->dim[0], 2 * tp, 2 * tp - 1 - at, &begin, &end);
        }
        return n;
    }
    if ((rule == ROWS || rule == COLUMNS) && s->ndim) {
        int d = rule == ROWS ? 0 : s->ndim - 1;
        layout_cut(s->dim[d], tp, at, &begin, &end);
        b.off[d] = begin;
        b.len[d] = end - begin;
    }
    *out = piece_of_box(s->ndim, &b);
    if (cut->zero && rule != OWNED && rule != REPLICATED && out->end) {
        layout_cut(out->end, replicas, replica, &begin, &end);
        if (begin == end) /* an empty run cannot be told from a whole box: such a rank holds nothing */
            return 0;
        out->begin = begin;
        out->end = end;
    }
    return 1;
}

static status *add(struct fake *f, const struct fake_cut *cut, int t, const struct shape *s, const struct piece *piece)
{
    const struct fake_tensor *d = &table[t];
    struct fake_piece *p = &f->piece[f->count];
    *p = (struct fake_piece){ .tensor = t, .shape = *s, .piece = *piece, .elem_bytes = dtype_bytes(d->dtype) };
    p->strided = cut->strided && s->ndim > 0 && !d->alias_of;
    uint64_t elems = piece_elems(piece);
    if (p->strided) { /* every dimension is padded by one; the last is not adjacent for odd tensors */
        int64_t step = 1 + t % 2;
        for (int i = s->ndim - 1; i >= 0; i--) {
            p->stride[i] = step;
            step *= (int64_t)piece->box.len[i] + 1;
        }
        elems = (uint64_t)step;
    }
    p->memory_bytes = elems * p->elem_bytes;
    p->memory = mem_calloc(p->memory_bytes + 1, 1);
    if (!p->memory)
        return ERR(NO_MEMORY, "fake tensor");
    p->base = p->memory;
    f->count++;
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = d->part;
    a.name = d->name;
    a.alias_of = d->alias_of;
    a.dtype = (int)d->dtype;
    a.ndim = s->ndim;
    memcpy(a.shape, s->dim, sizeof a.shape);
    memcpy(a.offset, piece->box.off, sizeof a.offset);
    memcpy(a.length, piece->box.len, sizeof a.length);
    a.run_begin = piece->begin;
    a.run_end = piece->end;
    a.stride = p->strided ? p->stride : NULL;
    a.data = d->alias_of ? NULL : p->base;
    return tessera_state_add_tensor(f->state, &a);
}

status *fake_open(const struct fake_cut *cut, int rank, struct fake *out)
{
    struct fake f = { .piece = mem_calloc(2 * TENSORS, sizeof *f.piece) };
    status *st = f.piece ? tessera_state_new(NULL, &f.state) : ERR(NO_MEMORY, "fake state");
    for (int t = 0; t < TENSORS && !st; t++) {
        struct shape s = shape_of(cut, t);
        struct piece p[2];
        int n = pieces_of(cut, rank, t, &s, p);
        for (int k = 0; k < n && !st; k++)
            st = add(&f, cut, t, &s, &p[k]);
    }
    if (st) {
        fake_close(&f);
        return st;
    }
    *out = f;
    return NULL;
}

void fake_close(struct fake *f)
{
    tessera_state_free(f->state);
    for (size_t i = 0; i < f->count; i++)
        mem_free(f->piece[i].memory);
    mem_free(f->piece);
    *f = (struct fake){ 0 };
}

/* Address of element i of a piece's run, and its global row-major number. */
static unsigned char *element(const struct fake_piece *p, uint64_t i, uint64_t *number)
{
    uint64_t at = p->piece.begin + i, n = 0, scale = 1;
    int64_t offset = 0;
    for (int d = p->shape.ndim - 1; d >= 0; d--) {
        uint64_t x = at % p->piece.box.len[d];
        at /= p->piece.box.len[d];
        n += (p->piece.box.off[d] + x) * scale;
        scale *= p->shape.dim[d];
        offset += (int64_t)x * p->stride[d];
    }
    *number = n;
    return p->strided ? p->base + offset * (int64_t)p->elem_bytes : p->base + i * p->elem_bytes;
}

static uint64_t value(int tensor, uint64_t number, uint64_t version)
{
    uint64_t x =
        number * 0x9e3779b97f4a7c15u + (uint64_t)tensor * 0xbf58476d1ce4e5b9u + version * 0x94d049bb133111ebu + 1;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

void fake_fill(struct fake *f, uint64_t version)
{
    for (size_t k = 0; k < f->count; k++) {
        const struct fake_piece *p = &f->piece[k];
        for (uint64_t i = 0, n; !table[p->tensor].alias_of && i < piece_elems(&p->piece); i++) {
            unsigned char *to = element(p, i, &n);
            uint64_t v = value(p->tensor, n, version);
            memcpy(to, &v, p->elem_bytes);
        }
    }
}

void fake_spoil(struct fake *f)
{
    for (size_t k = 0; k < f->count; k++)
        memset(f->piece[k].memory, 0xa5, f->piece[k].memory_bytes);
}

/* Elements are checked one by one; then, for strided memory, that exactly they differ from the spoilt pattern or may.
 */
static status *check_padding(const struct fake_piece *p)
{
    unsigned char *seen = mem_calloc(p->memory_bytes + 1, 1);
    status *st = seen ? NULL : ERR(NO_MEMORY, "padding");
    for (uint64_t i = 0, n; !st && i < piece_elems(&p->piece); i++)
        memset(seen + (element(p, i, &n) - p->memory), 1, p->elem_bytes);
    for (size_t i = 0; !st && i < p->memory_bytes; i++)
        if (!seen[i] && p->memory[i] != 0xa5 && p->memory[i] != 0)
            st = ERR(INTERNAL, "%s: padding byte %zu was written", table[p->tensor].name, i);
    mem_free(seen);
    return st;
}

status *fake_check(const struct fake *f, uint64_t version)
{
    for (size_t k = 0; k < f->count; k++) {
        const struct fake_piece *p = &f->piece[k];
        if (table[p->tensor].alias_of)
            continue;
        for (uint64_t i = 0, n; i < piece_elems(&p->piece); i++) {
            const unsigned char *at = element(p, i, &n);
            uint64_t v = value(p->tensor, n, version);
            if (memcmp(at, &v, p->elem_bytes) != 0)
                return ERR(INTERNAL, "%s/%s: element %llu is not that of version %llu", table[p->tensor].part,
                           table[p->tensor].name, (unsigned long long)n, (unsigned long long)version);
        }
        if (p->strided)
            TRY(check_padding(p));
    }
    return NULL;
}

status *expect_error(status *st, enum status_code code, const char *text, const char *file, int line)
{
    if (status_code(st) == code && strstr(status_message(st), text)) {
        status_free(st);
        return NULL;
    }
    status *wrong = ERR(INTERNAL, "%s:%d: expected %s with \"%s\", got %s: %s", file, line, status_code_name(code),
                        text, status_code_name(status_code(st)), status_message(st));
    status_free(st);
    return wrong;
}
