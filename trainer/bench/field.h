/* field: the tensors that the benches save and load, cut over some ranks by rows or by columns.
 *
 * `tensors` tensors of f32 [rows, FIELD_COLS], a third of them in part "model", the rest in "optim". A rank's boxes
 * lie one after another in one block, each from a multiple of 4 KiB. An element's value follows from its place. */
#ifndef TESSERA_TRAINER_BENCH_FIELD_H
#define TESSERA_TRAINER_BENCH_FIELD_H

#include "ckpt/ckpt.h"
#include "trainer/ops/compute.h"

enum { FIELD_COLS = 1024 };

struct field_cut {
    int rank, ranks;
    bool columns; /* cut by columns, as tensor parallelism does, instead of by rows */
};
struct field {
    uint64_t tensors, rows;
    struct field_cut cut;
    uint64_t box_rows, box_cols; /* of this rank, of every tensor */
    struct compute *compute;     /* where the block is; NULL: the host. Borrowed */
    float *block;                /* touched */
    size_t block_bytes, stride;  /* floats from one tensor to the next */
};
/* About state_bytes over all ranks. INVALID: too few for that many tensors and ranks. */
status *field_open(uint64_t state_bytes, uint64_t tensors, struct field_cut cut, struct field *out) WARN_UNUSED;
/* In a device's memory, zero, where field_fill, field_clear and field_check do not reach. */
status *field_open_on(struct compute *c, uint64_t state_bytes, uint64_t tensors, struct field_cut cut,
                      struct field *out) WARN_UNUSED;
void field_close(struct field *f);
uint64_t field_total_bytes(const struct field *f); /* of all ranks */
static inline float *field_tensor(const struct field *f, uint64_t i)
{
    return f->block + i * f->stride;
}
void field_fill(struct field *f);
void field_clear(struct field *f);
/* CORRUPT names the first element that is not what field_fill put there. */
status *field_check(const struct field *f) WARN_UNUSED;
/* A state with the field's boxes, in order. */
status *field_state(const struct field *f, tessera *t, tessera_state **out) WARN_UNUSED;

#endif
