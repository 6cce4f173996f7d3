#include "comm/base/bytes.h"

#include <isa-l/crc.h>

uint32_t crc32c(uint32_t crc, const void *p, size_t n)
{
    const unsigned char *b = p;
    crc = ~crc;
    while (n) { /* the library takes an int */
        size_t part = n < (size_t)1 << 30 ? n : (size_t)1 << 30;
        crc = crc32_iscsi((unsigned char *)(size_t)b, (int)part, crc);
        b += part;
        n -= part;
    }
    return ~crc;
}

/* splitmix64's finaliser (Steele, Lea, Flood 2014; constants by Stafford, variant 13). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

struct hash128 hash_init(uint64_t seed)
{
    return (struct hash128){ mix(seed + 0x9e3779b97f4a7c15u), mix(seed + 0x3c6ef372fe94f82au) };
}

void hash_update(struct hash128 *h, const void *p, size_t n)
{
    const unsigned char *b = p;
    uint64_t length = n;
    while (n) {
        unsigned char word[8] = { 0 };
        size_t part = n < 8 ? n : 8;
        memcpy(word, b, part);
        uint64_t w = get_u64(word);
        h->a = mix(h->a ^ w) + 0x9e3779b97f4a7c15u;
        h->b = mix(h->b + w * 0xd6e8feb86659fd93u);
        b += part;
        n -= part;
    }
    h->a = mix(h->a ^ length);
    h->b = mix(h->b + length);
}

struct hash128 hash_final(struct hash128 h)
{
    return (struct hash128){ mix(h.a ^ h.b), mix(h.b + 0x9e3779b97f4a7c15u) };
}

uint64_t hash64(const void *p, size_t n)
{
    struct hash128 h = hash_init(0);
    hash_update(&h, p, n);
    return hash_final(h).a;
}
