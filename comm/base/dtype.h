/* dtype: the element types a checkpoint can hold, from the first version. Numbers are stored in files: never renumber.
 */
#ifndef TESSERA_COMM_BASE_DTYPE_H
#define TESSERA_COMM_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype {
    DTYPE_NONE = 0,
    DTYPE_F64 = 1,
    DTYPE_F32 = 2,
    DTYPE_F16 = 3,
    DTYPE_BF16 = 4,
    DTYPE_F8E4M3 = 5,
    DTYPE_F8E5M2 = 6,
    DTYPE_E8M0 = 7,
    DTYPE_U4X2 = 8, /* two 4-bit values a byte: an element of the tensor is the byte */
    DTYPE_I64 = 9,
    DTYPE_I32 = 10,
    DTYPE_I16 = 11,
    DTYPE_I8 = 12,
    DTYPE_U64 = 13,
    DTYPE_U32 = 14,
    DTYPE_U16 = 15,
    DTYPE_U8 = 16,
    DTYPE_BOOL = 17,
    DTYPE_COUNT
};

size_t dtype_bytes(enum dtype t);         /* of one element; 0 for what is no dtype */
const char *dtype_name(enum dtype t);     /* "f32"; "?" */
enum dtype dtype_parse(const char *name); /* DTYPE_NONE if unknown */

/* bfloat16 is the upper half of an f32; narrowing rounds to nearest even and keeps NaN quiet. */
static inline float bf16_to_f32(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t bf16_from_f32(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

#endif
