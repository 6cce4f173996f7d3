/* gemms: what the steps of a bench compute: products of square f32 matrices with the project's own kernel, one thread a
 * rank. */
#ifndef TESSERA_TRAINER_BENCH_GEMMS_H
#define TESSERA_TRAINER_BENCH_GEMMS_H

#include <stdint.h>

/* Two factors and a product; the caller's to mem_free. NULL: out of memory. */
float *gemms_open(void);
/* Multiply so many times; 2 * 384^3 operations each. */
void gemms_run(float *block, int64_t times);

#endif
