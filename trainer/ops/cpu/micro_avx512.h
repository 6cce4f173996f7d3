/* The micro-kernels of the AVX-512 tables: an 8 x 32 tile of outputs in 16 registers. Included by isa_avx512*.c only,
 * after rows_body.h. */

#define TILE_BEGIN                                                                                                     \
    __m512 acc[PANEL_M][2];                                                                                            \
    _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++)                                                             \
    {                                                                                                                  \
        acc[i][0] = load_c ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();                                       \
        acc[i][1] = load_c ? _mm512_loadu_ps(c + i * ldc + 16) : _mm512_setzero_ps();                                  \
    }
#define TILE_END                                                                                                       \
    _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++)                                                             \
    {                                                                                                                  \
        _mm512_storeu_ps(c + i * ldc, acc[i][0]);                                                                      \
        _mm512_storeu_ps(c + i * ldc + 16, acc[i][1]);                                                                 \
    }

INLINE void micro_rows(const int rows, int64_t k, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    TILE_BEGIN
    for (int64_t p = 0; p < k; p++, a += PANEL_M, b += PANEL_N) {
        __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512 x = _mm512_set1_ps(a[i]);
            acc[i][0] = _mm512_fmadd_ps(x, b0, acc[i][0]);
            acc[i][1] = _mm512_fmadd_ps(x, b1, acc[i][1]);
        }
    }
    TILE_END
}

INLINE void micro_bf16_rows(const int rows, int64_t k, const float *a, const float *b, float *c, int64_t ldc,
                            bool load_c)
{
    TILE_BEGIN
    for (int64_t p = 0; p < k; p++, a += PANEL_M, b += PANEL_N) {
        __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#if !defined(__AVX512BF16__)
        const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000);
        __m512 odd0 = (__m512)_mm512_and_si512((__m512i)b0, high), even0 = (__m512)_mm512_slli_epi32((__m512i)b0, 16);
        __m512 odd1 = (__m512)_mm512_and_si512((__m512i)b1, high), even1 = (__m512)_mm512_slli_epi32((__m512i)b1, 16);
#endif
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512 x = _mm512_set1_ps(a[i]);
#if defined(__AVX512BF16__)
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], (__m512bh)x, (__m512bh)b0);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], (__m512bh)x, (__m512bh)b1);
#else
            __m512 odd = (__m512)_mm512_and_si512((__m512i)x, high), even = (__m512)_mm512_slli_epi32((__m512i)x, 16);
            acc[i][0] = _mm512_fmadd_ps(even, even0, _mm512_fmadd_ps(odd, odd0, acc[i][0]));
            acc[i][1] = _mm512_fmadd_ps(even, even1, _mm512_fmadd_ps(odd, odd1, acc[i][1]));
#endif
        }
    }
    TILE_END
}

#define BY_ROWS(tile)                                                                                                  \
    switch (rows) {                                                                                                    \
    case 1:                                                                                                            \
        tile(1, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 2:                                                                                                            \
        tile(2, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 3:                                                                                                            \
        tile(3, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 4:                                                                                                            \
        tile(4, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 5:                                                                                                            \
        tile(5, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 6:                                                                                                            \
        tile(6, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    case 7:                                                                                                            \
        tile(7, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    default:                                                                                                           \
        tile(8, k, a, b, c, ldc, load_c);                                                                              \
        break;                                                                                                         \
    }

static OF_ONE_THREAD void micro(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    BY_ROWS(micro_rows)
}

static OF_ONE_THREAD void micro_bf16(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc,
                                     bool load_c)
{
    BY_ROWS(micro_bf16_rows)
}
