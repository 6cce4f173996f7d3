/* philox: the block function of rng.h as an inline, for rng.c and for kernels that run on a GPU: the same draws. */
#ifndef TESSERA_COMM_BASE_PHILOX_H
#define TESSERA_COMM_BASE_PHILOX_H

#include "comm/base/both.h"
#include "comm/base/rng.h"

/* Philox4x32-10: out[4] from counter[4] and key[2]. */
BOTH void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Words 4 index to 4 index + 3 of the sequence at `at`. */
BOTH void philox_block(const struct rng_at *at, uint64_t index, uint32_t out[4])
{
    /* what of the index exceeds 32 bits moves into the stream word's upper half */
    const uint32_t counter[4] = { (uint32_t)index, at->sample, at->step, at->stream ^ (uint32_t)(index >> 32) << 16 };
    const uint32_t key[2] = { (uint32_t)at->seed, (uint32_t)(at->seed >> 32) };
    philox4x32(counter, key, out);
}

#endif
