/* bytes: little-endian put and get, crc32c, hashes of byte strings. */
#ifndef TESSERA_COMM_BASE_BYTES_H
#define TESSERA_COMM_BASE_BYTES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void put_u32(void *p, uint32_t v)
{
    unsigned char b[4] = { (unsigned char)v, (unsigned char)(v >> 8), (unsigned char)(v >> 16),
                           (unsigned char)(v >> 24) };
    memcpy(p, b, 4);
}

static inline void put_u64(void *p, uint64_t v)
{
    put_u32(p, (uint32_t)v);
    put_u32((unsigned char *)p + 4, (uint32_t)(v >> 32));
}

static inline uint32_t get_u32(const void *p)
{
    unsigned char b[4];
    memcpy(b, p, 4);
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static inline uint64_t get_u64(const void *p)
{
    return get_u32(p) | (uint64_t)get_u32((const unsigned char *)p + 4) << 32;
}

/* CRC-32C (Castagnoli, iSCSI) of n bytes, continuing from `crc` (0 to start): crc32c(0, "123456789", 9) == 0xe3069283.
 */
uint32_t crc32c(uint32_t crc, const void *p, size_t n);

/* A 128-bit fingerprint that is fed in pieces: two independent multiply-rotate lanes over 8-byte words. Not
 * cryptographic; for telling equal plans, names and token sequences from unequal ones. hash_update of the same bytes in
 * other cuts gives another value, so feed whole fields. */
struct hash128 {
    uint64_t a, b;
};
struct hash128 hash_init(uint64_t seed);
void hash_update(struct hash128 *h, const void *p, size_t n);
struct hash128 hash_final(struct hash128 h);
uint64_t hash64(const void *p, size_t n);

#endif
