/* cast: by way of f64, which holds every value of the other types exactly; so only the way out of it rounds. */
#include "ckpt/cast.h"

#include <string.h>

enum { BLOCK = 256 };

/* Of a 16-bit type: how many bits its exponent and its fraction have. */
struct half {
    int exponent, fraction;
};
static const struct half f16 = { 5, 10 };
static const struct half bf16 = { 8, 7 };

static uint64_t bits_of(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static double from_bits(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Exact. */
static double widen(uint16_t h, struct half t)
{
    uint64_t sign = (uint64_t)(h >> 15) << 63, fraction = h & ((1u << t.fraction) - 1);
    int most = (1 << t.exponent) - 1, exponent = (h >> t.fraction) & most, bias = most >> 1;
    if (exponent == most)
        return from_bits(sign | 0x7ffull << 52 | (fraction ? 1ull << 51 : 0) | fraction << (52 - t.fraction));
    if (exponent)
        return from_bits(sign | (uint64_t)(exponent - bias + 1023) << 52 | fraction << (52 - t.fraction));
    /* subnormal: fraction x 2^(1 - bias - t.fraction), as a product that is exact */
    double unit = from_bits((uint64_t)(1 - bias - t.fraction + 1023) << 52);
    return from_bits(sign | bits_of((double)fraction * unit));
}

/* Rounded once: the fraction's bits that go are compared with half of the last one that stays. */
static uint16_t narrow(double x, struct half t)
{
    uint64_t u = bits_of(x), fraction = u & ((1ull << 52) - 1);
    uint32_t sign = (uint32_t)(u >> 63) << 15, top = ((1u << t.exponent) - 1) << t.fraction;
    int exponent = (int)(u >> 52 & 0x7ff), bias = (1 << (t.exponent - 1)) - 1;
    if (exponent == 0x7ff)
        return (uint16_t)(sign | top |
                          (fraction ? 1u << (t.fraction - 1) | (uint32_t)(fraction >> (52 - t.fraction)) : 0));
    int e = exponent - 1023 + bias; /* of the result, if normal */
    int drop = 52 - t.fraction;
    uint64_t kept = fraction;
    if (e >= 1 << t.exponent)
        return (uint16_t)(sign | top);
    if (e <= 0) { /* subnormal: the leading one is written out and moved down */
        drop += 1 - e;
        if (drop > 54) /* below half of the smallest */
            return (uint16_t)sign;
        kept |= 1ull << 52; /* an f64 that is subnormal itself went above */
        e = 0;
    }
    uint64_t half = 1ull << (drop - 1), rest = kept & ((half << 1) - 1);
    uint32_t r = ((uint32_t)e << t.fraction) + (uint32_t)(kept >> drop);
    r += rest > half || (rest == half && (r & 1)); /* a carry goes up into the exponent, at most to infinity */
    return (uint16_t)(sign | (r < top ? r : top));
}

static void read_block(enum dtype from, const unsigned char *in, double *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float f;
        uint16_t h;
        switch (from) {
        case DTYPE_F64:
            memcpy(&out[i], in + i * 8, 8);
            break;
        case DTYPE_F32:
            memcpy(&f, in + i * 4, 4);
            out[i] = (double)f;
            break;
        default:
            memcpy(&h, in + i * 2, 2);
            out[i] = widen(h, from == DTYPE_F16 ? f16 : bf16);
        }
    }
}

static void write_block(enum dtype to, const double *in, unsigned char *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float f;
        uint16_t h;
        switch (to) {
        case DTYPE_F64:
            memcpy(out + i * 8, &in[i], 8);
            break;
        case DTYPE_F32:
            f = (float)in[i];
            memcpy(out + i * 4, &f, 4);
            break;
        default:
            h = narrow(in[i], to == DTYPE_F16 ? f16 : bf16);
            memcpy(out + i * 2, &h, 2);
        }
    }
}

static bool is_float(enum dtype t)
{
    return t == DTYPE_F64 || t == DTYPE_F32 || t == DTYPE_F16 || t == DTYPE_BF16;
}

bool cast_possible(enum dtype from, enum dtype to)
{
    return from == to || (is_float(from) && is_float(to));
}

void cast_elems(enum dtype from, enum dtype to, const void *in, void *out, size_t n)
{
    double block[BLOCK];
    size_t from_bytes = dtype_bytes(from), to_bytes = dtype_bytes(to);
    if (from == to) {
        memcpy(out, in, n * from_bytes);
        return;
    }
    for (size_t i = 0, count; i < n; i += count) {
        count = n - i < BLOCK ? n - i : BLOCK;
        read_block(from, (const unsigned char *)in + i * from_bytes, block, count);
        write_block(to, block, (unsigned char *)out + i * to_bytes, count);
    }
}
