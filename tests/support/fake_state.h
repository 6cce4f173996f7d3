/* fake_state: a made-up model that any rank of any job can hold its part of, with contents that follow from (tensor,
 * element, version) alone: what one job saved another one can check, however it is cut. */
#ifndef TESSERA_TESTS_SUPPORT_FAKE_STATE_H
#define TESSERA_TESTS_SUPPORT_FAKE_STATE_H

#include "ckpt/ckpt.h"
#include "ckpt/layout.h"
#include "comm/base/dtype.h"

/* How a job of `size` ranks cuts the model. */
struct fake_cut {
    int size;
    int tp;          /* ranks that cut boxes; size / tp replicate or share runs */
    bool zero;       /* replicas hold runs of the box instead of all of it */
    bool strided;    /* memory is padded */
    uint64_t shrink; /* sizes of large tensors are divided by it; 0: 1 */
};

struct fake_piece {
    int tensor;
    struct shape shape;
    struct piece piece;
    size_t elem_bytes;
    bool strided;
    int64_t stride[LAYOUT_DIMS];
    unsigned char *memory;
    size_t memory_bytes;
    unsigned char *base; /* of the box's first element (strided), or of the run's first */
};

struct fake {
    tessera_state *state;
    struct fake_piece *piece;
    size_t count;
};

/* Describe and allocate this rank's part. */
status *fake_open(const struct fake_cut *cut, int rank, struct fake *out) WARN_UNUSED;
void fake_close(struct fake *f);
/* Write version v into every element; spoil every byte; compare every element (INTERNAL names the first that differs).
 * Padding of strided memory must stay as fake_spoil or fake_fill left it. */
void fake_fill(struct fake *f, uint64_t version);
void fake_spoil(struct fake *f);
status *fake_check(const struct fake *f, uint64_t version) WARN_UNUSED;
/* Bytes of all tensors, each element once. */
uint64_t fake_bytes(const struct fake_cut *cut);

/* For code that runs on rank threads, where cmocka's asserts may not be used. */
#define EXPECT(cond)                                                                                                   \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            return ERR(INTERNAL, "%s:%d: expected %s", __FILE__, __LINE__, #cond);                                     \
    } while (0)
/* st is consumed: it must have that code and hold that text. */
status *expect_error(status *st, enum status_code code, const char *text, const char *file, int line) WARN_UNUSED;
#define EXPECT_ERROR(expr, code, text) TRY(expect_error(expr, ST_##code, text, __FILE__, __LINE__))

#endif
