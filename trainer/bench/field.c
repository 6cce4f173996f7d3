/* field: see field.h. */
#include "trainer/bench/field.h"

#include "comm/base/mem.h"

#include <stdio.h>
#include <string.h>

enum { ALIGN = 4096 };

static uint64_t begin_of(uint64_t n, int rank, int ranks)
{
    return n * (uint64_t)rank / (uint64_t)ranks;
}

status *field_open(uint64_t state_bytes, uint64_t tensors, struct field_cut cut, struct field *out)
{
    return field_open_on(NULL, state_bytes, tensors, cut, out);
}

status *field_open_on(struct compute *c, uint64_t state_bytes, uint64_t tensors, struct field_cut cut,
                      struct field *out)
{
    uint64_t rows = state_bytes / tensors / FIELD_COLS / sizeof(float);
    if (rows < (uint64_t)cut.ranks || cut.ranks > FIELD_COLS)
        return ERR(INVALID, "state_bytes=%llu: %llu tensors of %d columns over %d ranks need at least %llu",
                   (unsigned long long)state_bytes, (unsigned long long)tensors, FIELD_COLS, cut.ranks,
                   (unsigned long long)cut.ranks * tensors * FIELD_COLS * sizeof(float));
    struct field f = {
        .tensors = tensors, .rows = rows, .cut = cut, .compute = c, .box_rows = rows, .box_cols = FIELD_COLS
    };
    uint64_t *n = cut.columns ? &f.box_cols : &f.box_rows;
    *n = begin_of(*n, cut.rank + 1, cut.ranks) - begin_of(*n, cut.rank, cut.ranks);
    size_t bytes = (size_t)(f.box_rows * f.box_cols) * sizeof(float);
    f.stride = (bytes + ALIGN - 1) / ALIGN * ALIGN / sizeof(float);
    f.block_bytes = (size_t)tensors * f.stride * sizeof(float);
    void *block;
    TRY(status_wrap(compute_alloc(c, f.block_bytes, &block), "the tensors"));
    f.block = block;
    *out = f;
    return NULL;
}

void field_close(struct field *f)
{
    compute_free(f->compute, f->block, f->block_bytes);
    f->block = NULL;
}

uint64_t field_total_bytes(const struct field *f)
{
    return f->tensors * f->rows * FIELD_COLS * sizeof(float);
}

/* In [0, 1), exactly representable. */
static float value_at(uint64_t tensor, uint64_t row, uint64_t col)
{
    uint64_t x = (tensor * 0x9e3779b97f4a7c15u) ^ (row * FIELD_COLS + col) * 0xd1342543de82ef95u;
    return (float)((x ^ x >> 29) >> 40 & 0xffffff) * 0x1p-24f;
}

static uint64_t first_row(const struct field *f)
{
    return f->cut.columns ? 0 : begin_of(f->rows, f->cut.rank, f->cut.ranks);
}

static uint64_t first_col(const struct field *f)
{
    return f->cut.columns ? begin_of(FIELD_COLS, f->cut.rank, f->cut.ranks) : 0;
}

void field_fill(struct field *f)
{
    for (uint64_t i = 0; i < f->tensors; i++)
        for (uint64_t r = 0; r < f->box_rows; r++)
            for (uint64_t c = 0; c < f->box_cols; c++)
                field_tensor(f, i)[r * f->box_cols + c] = value_at(i, first_row(f) + r, first_col(f) + c);
}

void field_clear(struct field *f)
{
    memset(f->block, 0xff, f->block_bytes);
}

status *field_check(const struct field *f)
{
    for (uint64_t i = 0; i < f->tensors; i++)
        for (uint64_t r = 0; r < f->box_rows; r++)
            for (uint64_t c = 0; c < f->box_cols; c++) {
                float want = value_at(i, first_row(f) + r, first_col(f) + c);
                if (memcmp(&field_tensor(f, i)[r * f->box_cols + c], &want, sizeof want) != 0)
                    return ERR(CORRUPT, "tensor %llu [%llu, %llu] was not loaded as it was saved",
                               (unsigned long long)i, (unsigned long long)(first_row(f) + r),
                               (unsigned long long)(first_col(f) + c));
            }
    return NULL;
}

status *field_state(const struct field *f, tessera *t, tessera_state **out)
{
    tessera_state *s = NULL;
    status *st = tessera_state_new(t, &s);
    for (uint64_t i = 0; !st && i < f->tensors; i++) {
        char name[32];
        snprintf(name, sizeof name, "layers.%03llu", (unsigned long long)i);
        struct tessera_tensor d = TESSERA_TENSOR;
        d.part = i % 3 ? "optim" : "model";
        d.name = name;
        d.dtype = TESSERA_F32;
        d.ndim = 2;
        d.shape[0] = f->rows;
        d.shape[1] = FIELD_COLS;
        d.offset[0] = first_row(f);
        d.offset[1] = first_col(f);
        d.length[0] = f->box_rows;
        d.length[1] = f->box_cols;
        d.data = field_tensor(f, i);
        st = tessera_state_add_tensor(s, &d);
    }
    if (st)
        tessera_state_free(s);
    else
        *out = s;
    return st;
}
