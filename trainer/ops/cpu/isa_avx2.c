/* The table for AVX2 with FMA: the 8 x 32 tile is done as 4 x 16 tiles of 8 registers. */
#if defined(__AVX2__) && defined(__FMA__)

#include "trainer/ops/cpu/rows_body.h"
#include "trainer/ops/cpu/transpose8.h"

INLINE void micro_rows(const int rows, int64_t k, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    __m256 acc[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        acc[i][0] = load_c ? _mm256_loadu_ps(c + i * ldc) : _mm256_setzero_ps();
        acc[i][1] = load_c ? _mm256_loadu_ps(c + i * ldc + 8) : _mm256_setzero_ps();
    }
    for (int64_t p = 0; p < k; p++, a += PANEL_M, b += PANEL_N) {
        __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m256 x = _mm256_set1_ps(a[i]);
            acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        _mm256_storeu_ps(c + i * ldc, acc[i][0]);
        _mm256_storeu_ps(c + i * ldc + 8, acc[i][1]);
    }
}

INLINE __m256 high_half(__m256 x)
{
    return (__m256)_mm256_and_si256((__m256i)x, _mm256_set1_epi32((int32_t)0xffff0000));
}

INLINE __m256 low_half(__m256 x)
{
    return (__m256)_mm256_slli_epi32((__m256i)x, 16);
}

INLINE void micro_bf16_rows(const int rows, int64_t k, const float *a, const float *b, float *c, int64_t ldc,
                            bool load_c)
{
    __m256 acc[4];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        acc[i] = load_c ? _mm256_loadu_ps(c + i * ldc) : _mm256_setzero_ps();
    for (int64_t p = 0; p < k; p++, a += PANEL_M, b += PANEL_N) {
        __m256 two = _mm256_loadu_ps(b), odd = high_half(two), even = low_half(two);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m256 x = _mm256_set1_ps(a[i]);
            acc[i] = _mm256_fmadd_ps(high_half(x), odd, acc[i]);
            acc[i] = _mm256_fmadd_ps(low_half(x), even, acc[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        _mm256_storeu_ps(c + i * ldc, acc[i]);
}

/* The tile in parts of 4 rows and `width` columns. */
#define BY_ROWS(tile, width)                                                                                           \
    for (int i = 0; i < rows; i += 4) {                                                                                \
        for (int j = 0; j < PANEL_N; j += (width)) {                                                                   \
            float *cij = c + i * ldc + j;                                                                              \
            switch (rows - i) {                                                                                        \
            case 1:                                                                                                    \
                tile(1, k, a + i, b + j, cij, ldc, load_c);                                                            \
                break;                                                                                                 \
            case 2:                                                                                                    \
                tile(2, k, a + i, b + j, cij, ldc, load_c);                                                            \
                break;                                                                                                 \
            case 3:                                                                                                    \
                tile(3, k, a + i, b + j, cij, ldc, load_c);                                                            \
                break;                                                                                                 \
            default:                                                                                                   \
                tile(4, k, a + i, b + j, cij, ldc, load_c);                                                            \
                break;                                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

static OF_ONE_THREAD void micro(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    BY_ROWS(micro_rows, 16)
}

static OF_ONE_THREAD void micro_bf16(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc,
                                     bool load_c)
{
    BY_ROWS(micro_bf16_rows, 8)
}

const struct isa isa_avx2 = {
    .name = "avx2", .micro = micro, .micro_bf16 = micro_bf16, .transpose = transpose, ISA_ROWS
};

#else
typedef int isa_avx2_not_built; /* another machine's compiler: isa.c does not ask for the table */
#endif
