/* cuda_emu: as much of CUDA as trainer/ops/cuda and comm/device/device_cuda.cu use, on the CPU, so that the same .cu
 * files compile with g++ and their tests run without a GPU. Included before anything else (-include).
 *
 * A block's threads are fibers that take turns on one thread; they change at __syncthreads, __syncwarp and warp
 * exchanges only. What differs from a GPU is meant to find mistakes: blocks and threads run in ascending or in
 * descending order (emu_order), so that what needs a barrier that is not there comes out differently in one of them;
 * shared memory and cudaMalloc's are full of NaN, freed memory too; a barrier that not all threads of a block reach, an
 * exchange that not all 32 threads of a warp reach, a launch that a GPU would refuse, an access of several words that
 * is not aligned (kernels are built with -fsanitize=alignment), and a copy across the end of a block of memory end the
 * program. What cp.async copies arrives when its thread waits for it, no earlier; what it overwrites is gone as soon as
 * it begins; a thread that never waits for it ends the program. There are no atomics.
 *
 * Device memory is one region that can be read and written only while a kernel, a copy or a fill runs: what else
 * touches it ends the process with SIGSEGV, after a line that says so and the callers' addresses. (While one thread of
 * a process runs a kernel, others of it are not caught.)
 *
 * Work on a stream is done when the call returns. With TESSERA_EMU_LATE=1 it is queued, and runs as late as CUDA
 * allows: when the host waits for its stream, or asks for the second time for an event behind it; then a wait that is
 * missing shows. TESSERA_EMU_GPUS: how many GPUs there are (8), all with the same memory; TESSERA_EMU_BYTES: how much
 * of it (16 GiB). */
#ifndef TESSERA_TESTS_SUPPORT_CUDA_EMU_H
#define TESSERA_TESTS_SUPPORT_CUDA_EMU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CUDA_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct emu_triple {
    unsigned x, y, z;
};
struct emu_place {
    struct emu_triple thread, block, block_dim, grid_dim;
};
extern __thread struct emu_place emu_here __attribute__((tls_model("initial-exec")));
#define threadIdx (emu_here.thread)
#define blockIdx  (emu_here.block)
#define blockDim  (emu_here.block_dim)
#define gridDim   (emu_here.grid_dim)

typedef struct emu_stream *cudaStream_t;
typedef struct emu_event *cudaEvent_t;

/* How often the host has waited for a stream, an event or for all so far, in all threads. */
extern "C" unsigned long emu_waits(void);
/* Of all launches from now on, on this thread. */
extern "C" void emu_order(bool descending);
bool emu_descending(void);
/* Ends the program if no GPU would take such a launch. */
void emu_check(dim3 grid, dim3 block, size_t shared_bytes);
void emu_run(dim3 grid, dim3 block, size_t shared_bytes, bool descending, void (*body)(void *), void *arg);
/* Work of a stream: run now with device memory open, or, where emu_late(), queued; run(arg) is called once. */
bool emu_late(void);
void emu_now(void (*run)(void *), void *arg);
void emu_push(cudaStream_t s, void (*run)(void *), void *arg);
/* The block's shared memory; ends the program if fewer bytes were asked for at launch. */
void *emu_shared(size_t bytes);
void __syncthreads(void);
/* cp.async of `size` bytes (4, 8 or 16), `bytes` of which are read and the others become 0; a group's end; the wait
 * until no more than the last `left` groups may be under way. */
void emu_copy_async(void *to, const void *from, unsigned size, unsigned bytes);
void emu_copy_commit(void);
void emu_copy_wait(unsigned left);
/* Ends the program if p is no multiple of `size` bytes. */
void emu_aligned(const void *p, unsigned size);
/* Leave bytes for the others of the warp, wait until all have, and return where theirs are, `stride` bytes apart. */
const unsigned char *emu_exchange(unsigned mask, const void *mine, size_t bytes, size_t *stride);

template <class F> static void emu_call(void *f)
{
    (*static_cast<F *>(f))();
}

template <class F> static void emu_call_last(void *f)
{
    emu_call<F>(f);
    delete static_cast<F *>(f);
}

template <class F> static void emu_queue(cudaStream_t s, F work)
{
    if (emu_late())
        emu_push(s, emu_call_last<F>, new F(work));
    else
        emu_now(emu_call<F>, &work);
}

template <class... P, class... A>
static void emu_launch(cudaStream_t s, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... a)
{
    bool descending = emu_descending();
    emu_check(grid, block, shared_bytes);
    emu_queue(s, [=] {
        auto body = [&] { kernel(static_cast<P>(a)...); };
        emu_run(grid, block, shared_bytes, descending, emu_call<decltype(body)>, &body);
    });
}

static inline unsigned emu_lane(void)
{
    return threadIdx.x % 32;
}

static inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    size_t stride;
    (void)emu_exchange(mask, "", 1, &stride);
}

template <class T> static T emu_take(unsigned mask, T value, unsigned lane)
{
    size_t stride;
    const unsigned char *all = emu_exchange(mask, &value, sizeof value, &stride);
    memcpy(&value, all + lane * stride, sizeof value);
    return value;
}

template <class T> static T __shfl_xor_sync(unsigned mask, T value, int lane_mask)
{
    return emu_take(mask, value, (emu_lane() ^ (unsigned)lane_mask) % 32);
}

template <class T> static T __shfl_sync(unsigned mask, T value, int lane)
{
    return emu_take(mask, value, (unsigned)lane % 32);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    size_t stride;
    unsigned bits = 0;
    const unsigned char *all = emu_exchange(mask, &predicate, sizeof predicate, &stride);
    for (unsigned i = 0; i < 32; i++) {
        int theirs;
        memcpy(&theirs, all + i * stride, sizeof theirs);
        bits |= (unsigned)(theirs != 0) << i;
    }
    return bits;
}

static inline float __uint_as_float(unsigned u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* mma.sync.m16n8k16, bf16 to f32: c += a b, the warp's fragments as the PTX ISA has them. */
static inline void emu_mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    const unsigned mine[6] = { a[0], a[1], a[2], a[3], b0, b1 };
    size_t stride;
    const unsigned char *all = emu_exchange(0xffffffffu, mine, sizeof mine, &stride);
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = emu_lane() / 4 + i / 2 * 8, col = emu_lane() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            unsigned x, y, half = k % 2 * 16, across = k % 8 / 2;
            memcpy(&x, all + (row % 8 * 4 + across) * stride + (k / 8 * 2 + row / 8) * sizeof x, sizeof x);
            memcpy(&y, all + (col * 4 + across) * stride + (4 + k / 8) * sizeof y, sizeof y);
            c[i] += __uint_as_float(x >> half << 16) * __uint_as_float(y >> half << 16);
        }
    }
}

/* ldmatrix.x4: four matrices of 8 x 8 elements of 16 bits; lane l names the 16 bytes of row l % 8 of matrix l / 8, and
 * gets of each matrix elements 2 (l % 4) and the next of row l / 4; trans: of the matrices' transposes. */
static inline void emu_ldmatrix(unsigned (&v)[4], const void *row, bool trans)
{
    uint16_t mine[8];
    size_t stride;
    emu_aligned(row, sizeof mine);
    memcpy(mine, row, sizeof mine);
    const unsigned char *all = emu_exchange(0xffffffffu, mine, sizeof mine, &stride);
    for (unsigned i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; e++) {
            unsigned outer = emu_lane() / 4, inner = emu_lane() % 4 * 2 + e;
            memcpy(&pair[e], all + (i * 8 + (trans ? inner : outer)) * stride + (trans ? outer : inner) * sizeof *pair,
                   sizeof *pair);
        }
        v[i] = (unsigned)pair[0] | (unsigned)pair[1] << 16;
    }
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

static inline unsigned __float_as_uint(float f)
{
    unsigned u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* ---- the runtime (cuda_emu_runtime.cc): names and meanings are CUDA's ---- */

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorMemoryAllocation,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault };
enum { cudaHostAllocPortable = 1, cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
    enum cudaMemoryType type;
};
struct cudaDeviceProp {
    char name[256];
    struct {
        char bytes[16];
    } uuid;
};

const char *cudaGetErrorString(cudaError_t rc);
cudaError_t cudaGetLastError(void);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index);
cudaError_t cudaSetDevice(int index);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaFuncSetAttribute(const void *kernel, int attribute, int value);

cudaError_t cudaMalloc(void **p, size_t bytes); /* 4 KiB aligned */
cudaError_t cudaFree(void *p);
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p);
cudaError_t cudaMemset(void *p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, int kind, cudaStream_t s);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s);
cudaError_t cudaEventQuery(cudaEvent_t e);
cudaError_t cudaEventSynchronize(cudaEvent_t e);

#endif
