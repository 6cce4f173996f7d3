/* The table that runs anywhere. fmaf is exact by definition, in hardware or not; the compiler may vectorise its
 * columns. */
#include "trainer/ops/cpu/rows_body.h"

static void micro(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    for (int i = 0; i < rows; i++) {
        float acc[PANEL_N] = { 0 };
        if (load_c)
            memcpy(acc, c + i * ldc, sizeof acc);
        for (int64_t p = 0; p < k; p++)
            for (int j = 0; j < PANEL_N; j++)
                acc[j] = fmaf(a[p * PANEL_M + i], b[p * PANEL_N + j], acc[j]);
        memcpy(c + i * ldc, acc, sizeof acc);
    }
}

static void transpose(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t p = 0; p < k; p++)
        for (int64_t r = 0; r < width; r++)
            dst[p * width + r] = r < count ? src[r * ld + p] : 0.0f;
}

const struct isa isa_portable = { .name = "portable", .micro = micro, .transpose = transpose, ISA_ROWS };
