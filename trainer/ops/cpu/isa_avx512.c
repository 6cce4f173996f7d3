/* The table for AVX-512: an 8 x 32 tile of outputs in 16 registers. */
#if defined(__AVX512F__)

#include "trainer/ops/cpu/rows_body.h"
#include "trainer/ops/cpu/transpose8.h"

INLINE void micro_rows(const int rows, int64_t k, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    __m512 acc[PANEL_M][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        acc[i][0] = load_c ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();
        acc[i][1] = load_c ? _mm512_loadu_ps(c + i * ldc + 16) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < k; p++, a += PANEL_M, b += PANEL_N) {
        __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512 x = _mm512_set1_ps(a[i]);
            acc[i][0] = _mm512_fmadd_ps(x, b0, acc[i][0]);
            acc[i][1] = _mm512_fmadd_ps(x, b1, acc[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(c + i * ldc, acc[i][0]);
        _mm512_storeu_ps(c + i * ldc + 16, acc[i][1]);
    }
}

static void micro(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load_c)
{
    switch (rows) {
    case 1:
        micro_rows(1, k, a, b, c, ldc, load_c);
        break;
    case 2:
        micro_rows(2, k, a, b, c, ldc, load_c);
        break;
    case 3:
        micro_rows(3, k, a, b, c, ldc, load_c);
        break;
    case 4:
        micro_rows(4, k, a, b, c, ldc, load_c);
        break;
    case 5:
        micro_rows(5, k, a, b, c, ldc, load_c);
        break;
    case 6:
        micro_rows(6, k, a, b, c, ldc, load_c);
        break;
    case 7:
        micro_rows(7, k, a, b, c, ldc, load_c);
        break;
    default:
        micro_rows(8, k, a, b, c, ldc, load_c);
        break;
    }
}

const struct isa isa_avx512 = { .name = "avx512", .micro = micro, .transpose = transpose, ISA_ROWS };

#else
typedef int isa_avx512_not_built; /* another machine's compiler: isa.c does not ask for the table */
#endif
