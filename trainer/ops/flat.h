/* flat: the plain work on blocks of floats where they lie (compute.h): on the host this thread's loops, on a device its
 * kernels, queued: nothing here waits unless it says so, and errors of kernels are compute_check's. */
#ifndef TESSERA_TRAINER_OPS_FLAT_H
#define TESSERA_TRAINER_OPS_FLAT_H

#include "trainer/ops/compute.h"

/* n floats, zeroed (compute_alloc). The message says what. */
status *flat_alloc(struct compute *c, uint64_t n, const char *what, float **out) WARN_UNUSED;
void flat_free(struct compute *c, float *p, uint64_t n); /* NULL is fine */
void flat_zero(struct compute *c, float *y, uint64_t n);
void flat_copy(struct compute *c, float *y, const float *x, uint64_t n); /* no overlap */
void flat_add(struct compute *c, float *y, const float *x, uint64_t n);  /* y += x */
void flat_round(struct compute *c, float *x, uint64_t n);                /* kernels.round_low, narrow, widen */
void flat_narrow(struct compute *c, uint16_t *y, const float *x, uint64_t n);
void flat_widen(struct compute *c, float *y, const uint16_t *x, uint64_t n);

/* Show the host all bytes of a block in order: the block itself, or copies of some of it at a time, for which it takes
 * memory. Waits. */
status *flat_read(struct compute *c, const void *block, size_t bytes,
                  status *(*see)(void *arg, const void *bytes, size_t at, size_t n), void *arg) WARN_UNUSED;
status *flat_crc(struct compute *c, const void *block, size_t bytes, uint32_t *crc) WARN_UNUSED; /* CRC-32C, goes on */

#endif
