/* Which instruction sets this machine has. */
#include "trainer/ops/cpu/isa.h"

extern const struct isa isa_portable;
#if defined(__x86_64__)
extern const struct isa isa_avx512bf16, isa_avx512, isa_avx2;

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

const struct isa *isa_at(int i)
{
#if defined(__x86_64__)
    if (has_avx512() && __builtin_cpu_supports("avx512bf16") && i-- == 0)
        return &isa_avx512bf16;
    if (has_avx512() && i-- == 0)
        return &isa_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && i-- == 0)
        return &isa_avx2;
#endif
    return i == 0 ? &isa_portable : NULL;
}

const struct isa *isa_best(void)
{
    return isa_at(0);
}
