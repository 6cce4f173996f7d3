#include "comm/base/rng.h"

#include "comm/base/philox.h"

#include <math.h>

uint32_t rng_u32(struct rng_at at, uint64_t element)
{
    uint32_t w[4];
    philox_block(&at, element / 4, w);
    return w[element % 4];
}

void rng_u32s(struct rng_at at, uint64_t first, size_t n, uint32_t *out)
{
    uint32_t w[4];
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || (first + i) % 4 == 0)
            philox_block(&at, (first + i) / 4, w);
        out[i] = w[(first + i) % 4];
    }
}

static double unit(uint32_t w)
{
    return ((double)w + 0.5) * 0x1p-32;
}

double rng_uniform(struct rng_at at, uint64_t element)
{
    return unit(rng_u32(at, element));
}

uint64_t rng_below(struct rng_at at, uint64_t i, uint64_t n)
{
    uint32_t w[4];
    philox_block(&at, i / 2, w);
    uint64_t x = (uint64_t)w[i % 2 * 2] << 32 | w[i % 2 * 2 + 1];
    return (uint64_t)((unsigned __int128)x * n >> 64);
}

static void normals4(const uint32_t w[4], double out[4])
{
    const double tau = 6.283185307179586476925286766559;
    for (int i = 0; i < 4; i += 2) {
        double r = sqrt(-2 * log(unit(w[i]))), a = tau * unit(w[i + 1]);
        out[i] = r * cos(a);
        out[i + 1] = r * sin(a);
    }
}

double rng_normal(struct rng_at at, uint64_t element)
{
    uint32_t w[4];
    double z[4];
    philox_block(&at, element / 4, w);
    normals4(w, z);
    return z[element % 4];
}

void rng_normals(struct rng_at at, uint64_t first, size_t n, float *out)
{
    uint32_t w[4];
    double z[4];
    uint64_t have = UINT64_MAX;
    for (size_t i = 0; i < n; i++) {
        uint64_t e = first + i;
        if (e / 4 != have) {
            have = e / 4;
            philox_block(&at, have, w);
            normals4(w, z);
        }
        out[i] = (float)z[e % 4];
    }
}

uint64_t rng_permute(uint64_t seed, uint32_t epoch, uint64_t i, uint64_t n)
{
    if (n <= 1)
        return 0;
    int bits = 64 - __builtin_clzll(n - 1);
    int half = (bits + 1) / 2; /* 2^(2 half) >= n, and less than 4 n: walking the cycle ends after a few turns */
    uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t x = i;
    do {
        uint64_t l = x >> half, r = x & mask;
        for (uint32_t round = 0; round < 4; round++) {
            uint32_t counter[4] = { (uint32_t)r, (uint32_t)(r >> 32) ^ round << 24, epoch, RNG_SHUFFLE }, w[4];
            uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
            philox4x32(counter, key, w);
            uint64_t f = ((uint64_t)w[1] << 32 | w[0]) & mask, t = l ^ f;
            l = r;
            r = t;
        }
        x = l << half | r;
    } while (x >= n);
    return x;
}
