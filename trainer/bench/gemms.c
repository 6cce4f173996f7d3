#include "trainer/bench/gemms.h"

#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

enum { SIDE = 384, SQUARE = SIDE * SIDE };

float *gemms_open(void)
{
    float *block = mem_calloc(3 * SQUARE, sizeof *block);
    for (int i = 0; block && i < 2 * SQUARE; i++)
        block[i] = (float)(i % 7) * 0.125f;
    return block;
}

void gemms_run(float *block, int64_t times)
{
    const struct gemm g = { .m = SIDE,
                            .n = SIDE,
                            .k = SIDE,
                            .lda = SIDE,
                            .ldb = SIDE,
                            .ldc = SIDE,
                            .a = block,
                            .b = block + SQUARE,
                            .b_dtype = DTYPE_F32,
                            .c = block + 2 * SQUARE };
    for (int64_t i = 0; i < times; i++)
        kernels_cpu.gemm(NULL, &g);
}
