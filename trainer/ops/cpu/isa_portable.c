/* The table that runs anywhere. fmaf is exact by definition, in hardware or not; the compiler may vectorise its
 * columns. */
#include "trainer/ops/cpu/rows_body.h"

#include "comm/base/dtype.h"

static OF_ONE_THREAD void micro(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
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

/* The two values of a pair. */
static float odd_of(float pair)
{
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bf16_to_f32((uint16_t)(bits >> 16));
}

static float even_of(float pair)
{
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bf16_to_f32((uint16_t)bits);
}

static OF_ONE_THREAD void micro_bf16(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc,
                                     bool load_c)
{
    for (int i = 0; i < rows; i++) {
        float acc[PANEL_N] = { 0 };
        if (load_c)
            memcpy(acc, c + i * ldc, sizeof acc);
        for (int64_t p = 0; p < k; p++) {
            float odd = odd_of(a[p * PANEL_M + i]), even = even_of(a[p * PANEL_M + i]);
            for (int j = 0; j < PANEL_N; j++) {
                float x = b[p * PANEL_N + j];
                acc[j] = fmaf(even, even_of(x), fmaf(odd, odd_of(x), acc[j]));
            }
        }
        memcpy(c + i * ldc, acc, sizeof acc);
    }
}

static void transpose(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t p = 0; p < k; p++)
        for (int64_t r = 0; r < width; r++)
            dst[p * width + r] = r < count ? src[r * ld + p] : 0.0f;
}

const struct isa isa_portable = {
    .name = "portable", .micro = micro, .micro_bf16 = micro_bf16, .transpose = transpose, ISA_ROWS
};
