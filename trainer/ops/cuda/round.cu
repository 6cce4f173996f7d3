/* round: f32 to bf16, to nearest or by draws; and rows from one stride to another. All bits are the CPU's. */
#include "comm/base/philox.h"
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { MOST_BLOCKS = 132 * 16, EACH = 4 };

/* As bf16_from_f32 (dtype.h); subnormals stay. */
__device__ inline uint16_t nearest(float x)
{
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

__global__ void narrow_kernel(uint16_t *y, const float *x, int64_t n)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        y[i] = nearest(x[i]);
}

__global__ void low_kernel(float *x, int64_t n)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        x[i] = wide(nearest(x[i]));
}

__device__ inline uint64_t place_of(const struct rounding &r, uint64_t e)
{
    uint64_t at = 0, stride = 1;
    for (int i = r.ndim - 1; i > 0; i--) {
        at += (r.off[i] + e % r.len[i]) * stride;
        e /= r.len[i];
        stride *= r.dim[i];
    }
    return at + (r.off[0] + e) * stride;
}

/* A thread rounds EACH neighbours, which mostly take their draws from one block of the sequence, or two. */
__global__ void drawn_kernel(uint16_t *y, const float *x, int64_t n, struct rounding r)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x * EACH;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * EACH; i < n; i += step) {
        uint32_t draw[4] = {};
        uint64_t have = 0;
        for (int k = 0; k < EACH && i + k < n; k++) {
            uint64_t place = place_of(r, r.first + (uint64_t)(i + k));
            if (k == 0 || place / 4 != have)
                philox_block(&r.at, place / 4, draw);
            have = place / 4;
            unsigned u = __float_as_uint(x[i + k]), lane = (unsigned)(place % 4);
            unsigned d = lane < 2 ? lane ? draw[1] : draw[0] : lane < 3 ? draw[2] : draw[3];
            y[i + k] = (u & 0x7f800000u) == 0x7f800000u ? nearest(x[i + k]) : (uint16_t)((u + (d & 0xffffu)) >> 16);
        }
    }
}

template <int W>
__global__ void rows_kernel(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, int64_t c, bool add)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x, across = c / W;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n * across; i += step) {
        int64_t row = i / across, j = i % across * W;
        float v[W], sum[W] = {};
        load<W>(v, x + row * ldx + j);
        if (add)
            load<W>(sum, y + row * ldy + j);
        UNROLL
        for (int k = 0; k < W; k++)
            v[k] = add ? sum[k] + v[k] : v[k];
        store<W>(y + row * ldy + j, v);
    }
}

unsigned blocks_of(int64_t n)
{
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    return (unsigned)(blocks < MOST_BLOCKS ? blocks : (int64_t)MOST_BLOCKS);
}
} // namespace

void gpu_narrow(struct workers *w, uint16_t *y, const float *x, int64_t n)
{
    launch(w, "narrow", narrow_kernel, blocks_of(n), BLOCK, 0, y, x, n);
}

void gpu_round_low(struct workers *w, float *x, int64_t n)
{
    launch(w, "round_low", low_kernel, blocks_of(n), BLOCK, 0, x, n);
}

void gpu_narrow_drawn(struct workers *w, uint16_t *y, const float *x, int64_t n, const struct rounding *how)
{
    struct rounding r = rounding_joined(how); /* less to divide by */
    launch(w, "narrow_drawn", drawn_kernel, blocks_of((n + EACH - 1) / EACH), BLOCK, 0, y, x, n, r);
}

void gpu_copy_rows(struct workers *w, float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, int64_t c,
                   bool add)
{
    bool wide = four(c | ldy | ldx, y, x);
    launch(w, "copy_rows", wide ? rows_kernel<4> : rows_kernel<1>, blocks_of(wide ? n * c / 4 : n * c), BLOCK, 0, y,
           ldy, x, ldx, n, c, add);
}
