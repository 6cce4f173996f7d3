/* The transposing copy of the AVX tables: eight rows by eight columns in registers. Included by isa_avx*.c only, after
 * rows_body.h. */

INLINE void turn8(__m256 r[8])
{
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = t[i];
}

INLINE void transpose8(float *dst, int width, const float *src, int64_t ld)
{
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_ps(src + i * ld);
    turn8(r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        _mm256_storeu_ps(dst + i * width, r[i]);
}

static void transpose(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t r0 = 0; r0 < width; r0 += 8) {
        int64_t p = 0;
        if (r0 + 8 <= count)
            for (; p + 8 <= k; p += 8)
                transpose8(dst + p * width + r0, width, src + r0 * ld + p, ld);
        for (; p < k; p++)
            for (int64_t r = r0; r < r0 + 8; r++)
                dst[p * width + r] = r < count ? src[r * ld + p] : 0.0f;
    }
}

#if defined(__AVX512BF16__)

/* Up to eight rows of up to sixteen values: a row of dst a pair. */
INLINE void pairs8(float *dst, int width, const float *src, int64_t ld, int64_t rows, int64_t values)
{
    __mmask16 there = (__mmask16)((1u << values) - 1);
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = i < rows ? (__m256)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, src + i * ld)) : _mm256_setzero_ps();
    turn8(r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        if (2 * i < values)
            _mm256_storeu_ps(dst + i * width, r[i]);
}

static void transpose_pairs(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int r0 = 0; r0 < width; r0 += 8, src += 8 * ld) {
        int64_t p = 0;
        for (; r0 + 8 <= count && p + 16 <= k; p += 16)
            pairs8(dst + p / 2 * width + r0, width, src + p, ld, 8, 16);
        for (; p < k; p += 16)
            pairs8(dst + p / 2 * width + r0, width, src + p, ld, count - r0, k - p < 16 ? k - p : 16);
    }
}

#endif
