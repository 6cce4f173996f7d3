#include "comm/base/dtype.h"

static const struct {
    const char *name;
    size_t bytes;
} table[DTYPE_COUNT] = {
    [DTYPE_NONE] = { "?", 0 },        [DTYPE_F64] = { "f64", 8 },   [DTYPE_F32] = { "f32", 4 },
    [DTYPE_F16] = { "f16", 2 },       [DTYPE_BF16] = { "bf16", 2 }, [DTYPE_F8E4M3] = { "f8e4m3", 1 },
    [DTYPE_F8E5M2] = { "f8e5m2", 1 }, [DTYPE_E8M0] = { "e8m0", 1 }, [DTYPE_U4X2] = { "u4x2", 1 },
    [DTYPE_I64] = { "i64", 8 },       [DTYPE_I32] = { "i32", 4 },   [DTYPE_I16] = { "i16", 2 },
    [DTYPE_I8] = { "i8", 1 },         [DTYPE_U64] = { "u64", 8 },   [DTYPE_U32] = { "u32", 4 },
    [DTYPE_U16] = { "u16", 2 },       [DTYPE_U8] = { "u8", 1 },     [DTYPE_BOOL] = { "bool", 1 },
};

size_t dtype_bytes(enum dtype t)
{
    return (unsigned)t < DTYPE_COUNT ? table[t].bytes : 0;
}

const char *dtype_name(enum dtype t)
{
    return (unsigned)t < DTYPE_COUNT ? table[t].name : "?";
}

enum dtype dtype_parse(const char *name)
{
    for (int i = 1; i < DTYPE_COUNT; i++)
        if (!strcmp(table[i].name, name))
            return (enum dtype)i;
    return DTYPE_NONE;
}
