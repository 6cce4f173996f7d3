/* Loops over one row, compiled once per instruction set: included by isa_*.c only, which then name these functions in
 * their table.
 *
 * A V is 16 floats; the compiler cuts it to what the machine has. No operation here is fused and every lane keeps its
 * own elements, so the width changes no bit. Tails are loaded into a zeroed vector and only their n elements are
 * stored. */
#include "trainer/ops/cpu/isa.h"

#include <math.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors never cross a call: all helpers are inlined */

#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint64_t W __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t J __attribute__((vector_size(32), aligned(4), may_alias));
typedef float H __attribute__((vector_size(32), aligned(4), may_alias));  /* half a V */
typedef double D __attribute__((vector_size(64), aligned(8), may_alias)); /* 8 lanes */

INLINE V load(const float *p)
{
    return *(const V *)p;
}

INLINE void store(float *p, V x)
{
    *(V *)p = x;
}

/* n < 16 elements, then zeros. */
INLINE V load_tail(const float *p, int64_t n)
{
    V x = { 0 };
    memcpy(&x, p, (size_t)n * sizeof(float));
    return x;
}

INLINE void store_tail(float *p, V x, int64_t n)
{
    memcpy(p, &x, (size_t)n * sizeof(float));
}

INLINE V splat(float s)
{
    return (V){ s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s };
}

INLINE V choose(I mask, V yes, V no)
{
    return (V)((mask & (I)yes) | (~mask & (I)no));
}

INLINE float tree(V x)
{
    float t[LANES];
    store(t, x);
    for (int step = LANES / 2; step; step /= 2)
        for (int l = 0; l < step; l++)
            t[l] += t[l + step];
    return t[0];
}

/* The body runs for whole vectors with n_ = 16 and for the tail with fewer; LOAD and STORE do the right thing. */
#define EACH_VECTOR(i, n, body)                                                                                        \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= (n); i += LANES) {                                                                         \
            enum { whole = 1 };                                                                                        \
            int64_t left = LANES;                                                                                      \
            body                                                                                                       \
        }                                                                                                              \
        if (i < (n)) {                                                                                                 \
            enum { whole = 0 };                                                                                        \
            int64_t left = (n)-i;                                                                                      \
            body                                                                                                       \
        }                                                                                                              \
    } while (0)
#define LOAD(p)     (whole ? load(p) : load_tail(p, left))
#define STORE(p, x) (whole ? store(p, x) : store_tail(p, x, left))

/* e^x: x = n ln2 + r with ln2 in two parts (n ln2_high is exact), a polynomial of degree 6 in r (least squares weighted
 * by r^2 e^-r, error 0.04 ulp before rounding), and 2^n in two exact factors, so that the ends of the range round like
 * any other result. Overflows to inf, underflows through denormals to 0, keeps NaN. */
INLINE V exp_vector(V x)
{
    const V low = splat(-104.0f), high = splat(89.0f),
            magic = splat(12582912.0f); /* 1.5 x 2^23: adding it rounds to an integer */
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    V shifted = x * splat(1.44269504f) + magic;
    I n = (I)shifted - (I)magic;
    V nf = shifted - magic;
    V r = x - nf * splat(0.693359375f);
    r = r - nf * splat(-2.12194440e-4f);
    V p = splat(0.00137512793f);
    p = p * r + splat(0.0083689522f);
    p = p * r + splat(0.0416695401f);
    p = p * r + splat(0.166665182f);
    p = p * r + splat(0.499999881f);
    p = (p * r) * r + r + splat(1.0f);
    I half = n >> 1, rest = n - half;
    return p * (V)((half + 127) << 23) * (V)((rest + 127) << 23);
}

#if defined(__AVX512BF16__)

/* The instruction rounds as below. */
static void row_pairs(float *dst, const float *x, int64_t n)
{
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_ps(dst + i / 2, (__m512)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
    if (i < n) {
        uint32_t there = (1u << (n - i)) - 1;
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, x + i);
        __m512 high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), n - i > 16 ? x + i + 16 : x + i);
        _mm512_mask_storeu_ps(dst + i / 2, (__mmask16)((1u << (n - i + 1) / 2) - 1),
                              (__m512)_mm512_cvtne2ps_pbh(high, low));
    }
}

INLINE __m512 interleaved(__m512 low, __m512 high)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (__m512)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static void row_pairs_across(float *dst, int64_t width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t p = 0; p < k; p += 2, src += 2 * ld, dst += width) {
        const float *next = src + ld;
        int64_t j = 0;
        for (; p + 1 < k && j + 16 <= count; j += 16)
            _mm512_storeu_ps(dst + j, interleaved(_mm512_loadu_ps(src + j), _mm512_loadu_ps(next + j)));
        for (; j < count; j += 16) {
            __mmask16 there = (__mmask16)(count - j < 16 ? (1u << (count - j)) - 1 : 0xffff);
            __m512 high = p + 1 < k ? _mm512_maskz_loadu_ps(there, next + j) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(dst + j, there, interleaved(_mm512_maskz_loadu_ps(there, src + j), high));
        }
    }
}

#else

/* The upper 16 bits of each lane: bf16, rounded to nearest, ties to even; a NaN stays one, subnormals become 0. */
INLINE I rounded(V x)
{
    I bits = (I)x, magnitude = bits & 0x7fffffff;
    I up = bits + 0x7fff + ((bits >> 16) & 1);
    up = (I)choose(magnitude > 0x7f800000, (V)(bits | 0x400000), (V)up);
    return (I)choose(magnitude < 0x800000, (V)(bits & (int32_t)0x80000000), (V)up);
}

static void row_pairs(float *dst, const float *x, int64_t n)
{
    EACH_VECTOR(i, n, {
        W two = (W)rounded(LOAD(x + i));
        J pair = __builtin_convertvector((two >> 32 & 0xffff0000) | (two & 0xffffffff) >> 16, J);
        if (whole)
            *(J *)(dst + i / 2) = pair;
        else
            memcpy(dst + i / 2, &pair, (size_t)(left + 1) / 2 * sizeof *dst);
    });
}

static void row_pairs_across(float *dst, int64_t width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    for (int64_t p = 0; p < k; p += 2, src += 2 * ld, dst += width)
        EACH_VECTOR(j, count, {
            I low = rounded(LOAD(src + j));
            I high = { 0 };
            if (p + 1 < k)
                high = rounded(LOAD(src + ld + j));
            STORE(dst + j, (V)((high & (int32_t)0xffff0000) | (low >> 16 & 0xffff)));
        });
}

#endif

static float row_dot(const float *a, const float *b, int64_t n)
{
    V sum = { 0 };
    EACH_VECTOR(i, n, { sum += LOAD(a + i) * LOAD(b + i); });
    return tree(sum);
}

static float row_dot3(const float *a, const float *b, const float *c, int64_t n)
{
    V sum = { 0 };
    EACH_VECTOR(i, n, { sum += LOAD(a + i) * LOAD(b + i) * LOAD(c + i); });
    return tree(sum);
}

static float row_max(const float *x, int64_t n)
{
    V most = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        V y = load(x + i);
        most = choose(y > most, y, most);
    }
    float best = -INFINITY;
    for (; i < n; i++)
        best = x[i] > best ? x[i] : best;
    float t[LANES];
    store(t, most);
    for (int l = 0; l < LANES; l++)
        best = t[l] > best ? t[l] : best;
    return best;
}

static void row_exp(float *y, const float *x, int64_t n)
{
    EACH_VECTOR(i, n, {
        V e = exp_vector(LOAD(x + i));
        STORE(y + i, e);
    });
}

static float row_exp_sum(float *x, float scale, float shift, int64_t n)
{
    V sum = { 0 };
    EACH_VECTOR(i, n, {
        V e = exp_vector(LOAD(x + i) * splat(scale) - splat(shift));
        STORE(x + i, e);
        sum += LOAD(x + i); /* read again: a tail's unused lanes are zero */
    });
    return tree(sum);
}

static double row_exp_sum_wide(const float *x, float scale, float shift, int64_t n)
{
    double total = 0;
    for (int64_t b = 0; b < n; b += 1024) {
        int64_t count = n - b < 1024 ? n - b : 1024;
        const float *block = x + b;
        V sum = { 0 };
        EACH_VECTOR(i, count, {
            V e = exp_vector(LOAD(block + i) * splat(scale) - splat(shift));
            sum += whole ? e : load_tail((const float *)&e, left);
        });
        total += (double)tree(sum);
    }
    return total;
}

static void row_exp_sums_wide(const float *x, float scale, float shift, int64_t n, double *out)
{
    out[0] = out[1] = out[2] = 0;
    for (int64_t b = 0; b < n; b += 1024) {
        int64_t count = n - b < 1024 ? n - b : 1024;
        const float *block = x + b;
        V sum = { 0 }, first = { 0 }, square = { 0 };
        EACH_VECTOR(i, count, {
            V u = LOAD(block + i) * splat(scale) - splat(shift);
            V e = exp_vector(u);
            e = whole ? e : load_tail((const float *)&e, left);
            sum += e;
            first += e * u;
            square += e * e;
        });
        out[0] += (double)tree(sum);
        out[1] += (double)tree(first);
        out[2] += (double)tree(square);
    }
}

static void row_exp_scaled(float *x, float scale, float shift, float times, int64_t n)
{
    EACH_VECTOR(i, n, {
        V e = exp_vector(LOAD(x + i) * splat(scale) - splat(shift)) * splat(times);
        STORE(x + i, e);
    });
}

static void row_softmax_bwd(float *dp, const float *p, float delta, float scale, int64_t n)
{
    EACH_VECTOR(i, n, {
        V ds = LOAD(p + i) * (LOAD(dp + i) - splat(delta)) * splat(scale);
        STORE(dp + i, ds);
    });
}

static void row_scale(float *y, const float *x, float s, int64_t n)
{
    EACH_VECTOR(i, n, { STORE(y + i, LOAD(x + i) * splat(s)); });
}

static void row_axpy(float *y, const float *x, float s, int64_t n)
{
    EACH_VECTOR(i, n, { STORE(y + i, LOAD(y + i) + LOAD(x + i) * splat(s)); });
}

static void row_add(float *y, const float *a, const float *b, int64_t n)
{
    EACH_VECTOR(i, n, { STORE(y + i, LOAD(a + i) + LOAD(b + i)); });
}

static void row_add_rows(float *y, int64_t y_ld, const float *a, int64_t a_ld, const float *b, int64_t b_ld,
                         int64_t rows, int64_t n)
{
    for (int64_t i = 0; i < rows; i++, y += y_ld, a += a_ld, b += b_ld)
        EACH_VECTOR(j, n, { STORE(y + j, LOAD(a + j) + LOAD(b + j)); });
}

static void row_mul_scaled(float *y, const float *x, const float *w, float s, int64_t n)
{
    EACH_VECTOR(i, n, { STORE(y + i, LOAD(x + i) * splat(s) * LOAD(w + i)); });
}

static void row_mul_add(float *y, const float *a, const float *b, float s, int64_t n)
{
    EACH_VECTOR(i, n, { STORE(y + i, LOAD(y + i) + LOAD(b + i) * splat(s) * LOAD(a + i)); });
}

static void row_rmsnorm_bwd(float *dx, const float *dy, const float *w, const float *x, float r, float s, int64_t n)
{
    EACH_VECTOR(i, n,
                { STORE(dx + i, LOAD(dx + i) + (LOAD(dy + i) * LOAD(w + i) * splat(r) - LOAD(x + i) * splat(s))); });
}

/* y = x turned by (cos, sign sin); cs holds half cosines, then half sines. add: y += instead. */
static void row_rotate(float *y, const float *x, const float *cs, float sign, bool add, int64_t half)
{
    EACH_VECTOR(i, half, {
        V a = LOAD(x + i);
        V b = LOAD(x + half + i);
        V c = LOAD(cs + i);
        V s = LOAD(cs + half + i) * splat(sign);
        V u = a * c - b * s;
        V v = b * c + a * s;
        if (add) {
            u += LOAD(y + i);
            v += LOAD(y + half + i);
        }
        STORE(y + i, u);
        STORE(y + half + i, v);
    });
}

static void row_swiglu(float *y, const float *gate, const float *up, int64_t n)
{
    EACH_VECTOR(i, n, {
        V g = LOAD(gate + i);
        V s = g / (splat(1.0f) + exp_vector(-g));
        STORE(y + i, s * LOAD(up + i));
    });
}

/* silu'(x) = sg (1 + x (1 - sg)), sg = 1 / (1 + e^-x). */
static void row_swiglu_bwd(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t n)
{
    EACH_VECTOR(i, n, {
        V g = LOAD(gate + i);
        V d = LOAD(dy + i);
        V sg = splat(1.0f) / (splat(1.0f) + exp_vector(-g));
        if (dup)
            STORE(dup + i, LOAD(dup + i) + d * (g * sg));
        if (dgate)
            STORE(dgate + i, LOAD(dgate + i) + d * LOAD(up + i) * (sg * (splat(1.0f) + g * (splat(1.0f) - sg))));
    });
}

static double row_sum(const float *x, bool squared, int64_t n)
{
    D low = { 0 };
    D high = { 0 };
    EACH_VECTOR(i, n, {
        V y = LOAD(x + i);
        D a = __builtin_convertvector(*(const H *)&y, D);
        D b = __builtin_convertvector(*((const H *)&y + 1), D);
        if (squared) {
            a *= a;
            b *= b;
        }
        low += a;
        high += b;
    });
    double t[8];
    *(D *)t = low + high;
    for (int step = 4; step; step /= 2)
        for (int l = 0; l < step; l++)
            t[l] += t[l + step];
    return t[0];
}

/* x[l] = sqrt(x[l]), correctly rounded everywhere. */
INLINE void square_roots(float x[LANES])
{
#if defined(__AVX512F__)
    _mm512_storeu_ps(x, _mm512_sqrt_ps(_mm512_loadu_ps(x)));
#elif defined(__AVX__)
    _mm256_storeu_ps(x, _mm256_sqrt_ps(_mm256_loadu_ps(x)));
    _mm256_storeu_ps(x + 8, _mm256_sqrt_ps(_mm256_loadu_ps(x + 8)));
#else
    for (int l = 0; l < LANES; l++)
        x[l] = sqrtf(x[l]);
#endif
}

static void row_adamw(float *p, const float *g, float *m, float *v, const struct adamw_scalars *scalars, int64_t n)
{
    const struct adamw_scalars h = *scalars;
    EACH_VECTOR(i, n, {
        V gi = LOAD(g + i) * splat(h.grad_scale);
        V mi = LOAD(m + i) * splat(h.beta1) + gi * splat(h.beta1_rest);
        V vi = LOAD(v + i) * splat(h.beta2) + gi * gi * splat(h.beta2_rest);
        STORE(m + i, mi);
        STORE(v + i, vi);
        V root = vi * splat(h.fix2);
        square_roots((float *)&root);
        V pi = LOAD(p + i);
        V update = mi * splat(h.fix1) / (root + splat(h.eps));
        STORE(p + i, pi - splat(h.lr) * (update + splat(h.decay) * pi));
    });
}

#define ISA_ROWS                                                                                                       \
    .pairs = row_pairs, .pairs_across = row_pairs_across, .dot = row_dot, .dot3 = row_dot3, .max = row_max,            \
    .exp = row_exp, .exp_sum = row_exp_sum, .exp_sum_wide = row_exp_sum_wide, .exp_sums_wide = row_exp_sums_wide,      \
    .exp_scaled = row_exp_scaled, .softmax_bwd = row_softmax_bwd, .scale = row_scale, .axpy = row_axpy,                \
    .add = row_add, .add_rows = row_add_rows, .mul_scaled = row_mul_scaled, .mul_add = row_mul_add,                    \
    .rmsnorm_bwd = row_rmsnorm_bwd, .rotate = row_rotate, .swiglu = row_swiglu, .swiglu_bwd = row_swiglu_bwd,          \
    .sum = row_sum, .adamw = row_adamw
