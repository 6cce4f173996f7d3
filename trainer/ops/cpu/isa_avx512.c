/* The table for AVX-512 without BF16. */
#if defined(__AVX512F__)

#include "trainer/ops/cpu/rows_body.h"

#include "trainer/ops/cpu/micro_avx512.h"
#include "trainer/ops/cpu/transpose8.h"

const struct isa isa_avx512 = {
    .name = "avx512", .micro = micro, .micro_bf16 = micro_bf16, .transpose = transpose, ISA_ROWS
};

#else
typedef int isa_avx512_not_built; /* another machine's compiler: isa.c does not ask for the table */
#endif
