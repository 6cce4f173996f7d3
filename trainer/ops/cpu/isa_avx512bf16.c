/* The table for AVX-512 with BF16: VDPBF16PS multiplies and adds two pairs a lane. */
#if defined(__AVX512BF16__)

#include "trainer/ops/cpu/rows_body.h"

#include "trainer/ops/cpu/micro_avx512.h"
#include "trainer/ops/cpu/transpose8.h"

const struct isa isa_avx512bf16 = { .name = "avx512bf16",
                                    .micro = micro,
                                    .micro_bf16 = micro_bf16,
                                    .transpose = transpose,
                                    .transpose_pairs = transpose_pairs,
                                    ISA_ROWS };

#else
typedef int isa_avx512bf16_not_built; /* another machine's compiler: isa.c does not ask for the table */
#endif
