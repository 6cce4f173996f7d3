/* gpu: what the files of CUDA kernels share. They make the table of trainer/ops/kernels.h whose arrays are in device
 * memory; for them only.
 *
 * What a kernel of the table gets as `struct workers` is a stream here, with its scratch memory. A call queues work and
 * returns: it waits for nothing and reads no device memory. A failure (of a launch, of memory for scratch) sticks to
 * the workers, later calls do nothing, and plugin.h's `check` hands it out.
 *
 * The files compile with nvcc, and with g++ against tests/support/cuda_emu.h, which stands in for what CUDA headers
 * declare (nvcc includes those by itself); so they use no more of CUDA than that has. No atomics: every sum has one
 * order that follows from shapes alone, so the same inputs give the same bits. They are not the CPU's bits: products
 * are fused where the compiler likes, and sums go up other trees. */
#ifndef TESSERA_TRAINER_OPS_CUDA_GPU_H
#define TESSERA_TRAINER_OPS_CUDA_GPU_H

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

extern "C" {
#include "trainer/ops/cuda/plugin.h"
#include "trainer/ops/kernels.h"
}

struct lt; /* lt.cu: cuBLASLt */

/* Areas that do not overlap: of the kernel that was called, and of the GEMMs it calls itself. */
enum scratch { SCRATCH_CALL, SCRATCH_GEMM, SCRATCHES };

struct workers {
    int index; /* of the GPU */
    cudaStream_t stream;
    bool deterministic;
    struct lt *lt; /* NULL: products by our own kernel */
    status *error; /* the first; owned */
    struct {
        void *p;
        size_t bytes;
    } scratch[SCRATCHES];
};

/* Keeps the error of a CUDA call; whether there was none so far. */
bool gpu_ok(struct workers *w, cudaError_t rc, const char *what);
/* At least `bytes` of an area, 256-byte aligned, of unknown content; NULL after an error. Grows to the most that was
 * asked for (waits for the stream then), so not in a steady step. */
void *gpu_scratch(struct workers *w, enum scratch area, size_t bytes);

/* C = op(A) op(B) (+ beta C) as cuBLASLt takes it: column-major, A [m, k] and B [k, n] after op. */
struct lt_call {
    bool a_trans, b_trans, bf16; /* bf16: a and b are bf16, else f32; sums are f32 */
    bool c_low;                  /* c, from and bias are bf16, else f32 */
    int64_t m, n, k, lda, ldb, ldc;
    const void *a, *b;
    void *c;
    const void *from; /* what beta multiplies: c, or another matrix with ldc */
    const void *bias; /* [m], added to every column; or NULL */
    float beta;       /* 0 or 1 */
};
/* Opens libcublasLt of the machine. UNSUPPORTED: it is not there or too old; says where it was looked for. */
status *lt_open(struct workers *w, struct lt **out) WARN_UNUSED;
void lt_close(struct lt *lt); /* NULL is fine */
/* false: the library has no algorithm for this shape, nothing was queued. */
bool lt_matmul(struct workers *w, const struct lt_call *call);

enum { WARP = 32, BLOCK = 256, WARPS = BLOCK / WARP };

#ifdef CUDA_EMULATED
#define UNROLL
#define SHARED(type, name) type &name = *static_cast<type *>(emu_shared(sizeof(type)))
#else
#define UNROLL _Pragma("unroll")
/* The block's shared memory as one struct, whose size is given at launch. */
#define SHARED(type, name)                                                                                             \
    extern __shared__ float4 gpu_shared_[];                                                                            \
    type &name = *reinterpret_cast<type *>(gpu_shared_)
#endif

static inline unsigned gpu_blocks(int64_t n, int64_t each)
{
    return (unsigned)((n + each - 1) / each);
}

/* Queue kernel(a...). Nothing if the grid is empty or something failed before. */
template <class... P, class... A>
static void launch(struct workers *w, const char *what, void (*kernel)(P...), dim3 grid, unsigned block, size_t shared,
                   A... a)
{
    if (w->error || !grid.x || !grid.y || !grid.z)
        return;
    if (shared > (48 << 10) && !gpu_ok(w,
                                       cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                            cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
                                       what))
        return;
#ifdef CUDA_EMULATED
    emu_launch(w->stream, kernel, grid, dim3(block), shared, a...);
#else
    kernel<<<grid, block, shared, w->stream>>>(static_cast<P>(a)...);
#endif
    (void)gpu_ok(w, cudaGetLastError(), what);
}

/* ---- in kernels ---- */

static __device__ inline int64_t min_of(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Of the warp's 32 values, on all of them; the same tree everywhere. */
template <class T> static __device__ inline T warp_sum(T x)
{
    for (int step = WARP / 2; step; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

static __device__ inline float warp_max(float x)
{
    for (int step = WARP / 2; step; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* Of the block's BLOCK values, on all of them. `room` is shared, WARPS long; whole warps must be there. */
template <class T> static __device__ inline T block_sum(T x, T *room)
{
    x = warp_sum(x);
    __syncthreads(); /* room may be in use */
    if (threadIdx.x % WARP == 0)
        room[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = room[0];
    for (int i = 1; i < WARPS; i++)
        sum += room[i];
    return sum;
}

/* W neighbours: 4, 16-byte aligned, or 1. */
template <int W> static __device__ inline void load(float (&v)[W], const float *p)
{
    if (W == 4) {
        float4 f = *reinterpret_cast<const float4 *>(p);
        v[0] = f.x;
        v[W > 1 ? 1 : 0] = W > 1 ? f.y : f.x;
        v[W > 2 ? 2 : 0] = W > 2 ? f.z : f.x;
        v[W > 3 ? 3 : 0] = W > 3 ? f.w : f.x;
    } else {
        v[0] = *p;
    }
}

template <int W> static __device__ inline void store(float *p, const float (&v)[W])
{
    if (W == 4)
        *reinterpret_cast<float4 *>(p) = { v[0], v[W > 1 ? 1 : 0], v[W > 2 ? 2 : 0], v[W > 3 ? 3 : 0] };
    else
        *p = v[0];
}

static __device__ inline float wide(uint16_t half)
{
    return __uint_as_float((unsigned)half << 16);
}

/* As bf16_from_f32 (dtype.h), but subnormals become 0 (kernels.h, gemm.bf16). */
static __device__ inline uint16_t narrow(float x)
{
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    if ((u & 0x7f800000u) == 0)
        return (uint16_t)(u >> 16 & 0x8000u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Two of them, to nearest; the first one is the lower half. */
static __device__ inline unsigned narrow_two(float low, float high)
{
#ifdef CUDA_EMULATED
    return (unsigned)narrow(low) | (unsigned)narrow(high) << 16;
#else
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

/* W neighbours of an array from element i on, and back. */
template <int W> static __device__ inline void load(float (&v)[W], const struct array &x, int64_t i)
{
    if (!x.low) {
        load<W>(v, static_cast<const float *>(x.at) + i);
        return;
    }
    const uint16_t *p = static_cast<const uint16_t *>(x.at) + i;
    if (W == 4) {
        uint2 u = *reinterpret_cast<const uint2 *>(p);
        v[0] = wide((uint16_t)u.x);
        v[W > 1 ? 1 : 0] = wide((uint16_t)(u.x >> (W > 1 ? 16 : 0)));
        v[W > 2 ? 2 : 0] = wide((uint16_t)(W > 2 ? u.y : u.x));
        v[W > 3 ? 3 : 0] = wide((uint16_t)(W > 3 ? u.y >> 16 : u.x));
    } else {
        v[0] = wide(*p);
    }
}

template <int W> static __device__ inline void store(const struct array &y, int64_t i, const float (&v)[W])
{
    if (!y.low) {
        store<W>(static_cast<float *>(y.at) + i, v);
        return;
    }
    uint16_t *p = static_cast<uint16_t *>(y.at) + i;
    if (W == 4)
        *reinterpret_cast<uint2 *>(p) = { narrow_two(v[0], v[W > 1 ? 1 : 0]),
                                          narrow_two(v[W > 2 ? 2 : 0], v[W > 3 ? 3 : 0]) };
    else
        *p = (uint16_t)narrow_two(v[0], 0.0f);
}

/* An array from element i on; of no array none. */
static __host__ __device__ inline struct array moved(struct array x, int64_t i)
{
    if (x.at && x.low)
        x.at = static_cast<uint16_t *>(x.at) + i;
    else if (x.at)
        x.at = static_cast<float *>(x.at) + i;
    return x;
}

static inline bool four_at(const struct array &x)
{
    return ((uintptr_t)x.at & (x.low ? 7 : 15)) == 0;
}

/* Whether rows of c floats at these places can be taken four at a time. */
static inline bool four(int64_t c, const void *a, const void *b = NULL, const void *d = NULL, const void *e = NULL)
{
    return c % 4 == 0 && (((uintptr_t)a | (uintptr_t)b | (uintptr_t)d | (uintptr_t)e) & 15) == 0;
}

static inline bool four(int64_t c, const struct array &a, const struct array &b, const void *d)
{
    return four_at(a) && four_at(b) && four(c, d);
}

/* ---- the table's kernels ---- */

template <class F> struct pointed;
template <class F> struct pointed<F *> {
    typedef F function;
};

/* In the order of struct kernels: gpu_<name> has the type of its field. */
/* clang-format off */
#define GPU_KERNELS(X) \
    X(gemm) X(grouped) X(route) X(route_bwd) X(sort_experts) X(load_sums) X(load_shares) X(mix) X(mix_bwd) X(bias_bwd) X(embedding) X(embedding_bwd) \
    X(rmsnorm) X(rmsnorm_bwd) X(rmsnorm_bwd_weight) X(rope_table) X(rope) X(rope_bwd) X(columns) \
    X(attention) X(attention_bwd) X(swiglu) X(swiglu_bwd) X(convert) X(add) X(scale) X(axpy) X(add_scalar) X(zero) X(widen) X(narrow) \
    X(round_low) X(narrow_drawn) X(copy_rows) X(block_sums) X(adds) X(add_rounds) X(clip) X(sequence_sums) X(pair_slopes) X(kto_slopes) X(even_slopes) X(sum) X(find_nonfinite) \
    X(logprob) X(logprob_merge) X(logprob_bwd) X(adamw)
/* clang-format on */
#define GPU_DECLARE(name) pointed<decltype(kernels::name)>::function gpu_##name;
GPU_KERNELS(GPU_DECLARE)
#undef GPU_DECLARE

#endif
