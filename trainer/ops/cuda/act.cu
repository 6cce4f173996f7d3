/* act: everything that works on one element at a time: swiglu, sums of arrays. One kernel over all of them, four
 * elements a thread where all arrays are 16-byte aligned. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { INPUTS = 5, OUTPUTS = 3, MOST_BLOCKS = 132 * 16 };

/* What F reads and writes at each element; an output that is also an input is added to. No array: left out. */
struct arrays {
    struct array in[INPUTS], out[OUTPUTS];
};

template <class F, int W> __device__ void at(const struct arrays &io, const F &f, int64_t i)
{
    float in[F::IN][W] = {}, out[F::OUT][W];
    UNROLL
    for (int k = 0; k < F::IN; k++)
        if (io.in[k].at)
            load<W>(in[k], io.in[k], i);
    UNROLL
    for (int j = 0; j < W; j++) {
        float a[F::IN], b[F::OUT];
        UNROLL
        for (int k = 0; k < F::IN; k++)
            a[k] = in[k][j];
        f(a, b);
        UNROLL
        for (int k = 0; k < F::OUT; k++)
            out[k][j] = b[k];
    }
    UNROLL
    for (int k = 0; k < F::OUT; k++)
        if (io.out[k].at)
            store<W>(io.out[k], i, out[k]);
}

template <class F, int W> __global__ void each_element(struct arrays io, F f, int64_t n)
{
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first; i < n / W; i += step)
        at<F, W>(io, f, i * W);
    for (int64_t i = n / W * W + first; i < n; i += step)
        at<F, 1>(io, f, i);
}

template <class F> void each(struct workers *w, const char *what, const struct arrays &io, const F &f, int64_t n)
{
    bool wide = true;
    for (int k = 0; k < F::IN; k++)
        wide = wide && four_at(io.in[k]);
    for (int k = 0; k < F::OUT; k++)
        wide = wide && four_at(io.out[k]);
    unsigned blocks = (unsigned)((n + 4 * BLOCK - 1) / (4 * BLOCK));
    blocks = blocks < MOST_BLOCKS ? blocks : (unsigned)MOST_BLOCKS;
    if (wide)
        launch(w, what, each_element<F, 4>, blocks, BLOCK, 0, io, f, n);
    else
        launch(w, what, each_element<F, 1>, blocks, BLOCK, 0, io, f, n);
}

__device__ inline float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

struct swiglu_of {
    enum { IN = 2, OUT = 1 };
    __device__ void operator()(const float *a, float *y) const
    {
        y[0] = a[0] * sigmoid(a[0]) * a[1];
    }
};

struct swiglu_gradient { /* dy, gate, up, dgate, dup */
    enum { IN = 5, OUT = 2 };
    __device__ void operator()(const float *a, float *y) const
    {
        float s = sigmoid(a[1]);
        y[0] = a[3] + a[0] * a[2] * s * (1.0f + a[1] * (1.0f - s));
        y[1] = a[4] + a[0] * a[1] * s;
    }
};

struct sum_of {
    enum { IN = 2, OUT = 1 };
    __device__ void operator()(const float *a, float *y) const
    {
        y[0] = a[0] + a[1];
    }
};

struct times {
    enum { IN = 1, OUT = 1 };
    float s;
    __device__ void operator()(const float *a, float *y) const
    {
        y[0] = s * a[0];
    }
};

struct plus_times {
    enum { IN = 2, OUT = 1 };
    float s;
    __device__ void operator()(const float *a, float *y) const
    {
        y[0] = a[1] + s * a[0];
    }
};

struct plus_one {
    enum { IN = 1, OUT = 1 };
    const float *s;
    __device__ void operator()(const float *a, float *y) const
    {
        y[0] = a[0] + *s;
    }
};

/* What a gradient is before it is added to. */
struct array before(struct array dx)
{
    return dx.fresh ? array_of(NULL) : dx;
}

__global__ void widen_kernel(float *y, const uint16_t *x, int64_t n)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        y[i] = wide(x[i]);
}
} // namespace

void gpu_swiglu(struct workers *w, struct array y, struct array gate, struct array up, int64_t n)
{
    each(w, "swiglu", { { gate, up }, { y } }, swiglu_of(), n);
}

void gpu_swiglu_bwd(struct workers *w, struct array dgate, struct array dup, struct array dy, struct array gate,
                    struct array up, int64_t n)
{
    each(w, "swiglu_bwd", { { dy, gate, up, before(dgate), before(dup) }, { dgate, dup } }, swiglu_gradient(), n);
}

void gpu_convert(struct workers *w, struct array y, struct array x, int64_t n)
{
    each(w, "convert", { { x, before(y) }, { y } }, plus_times{ 1.0f }, n);
}

void gpu_add(struct workers *w, float *y, const float *a, const float *b, int64_t n)
{
    each(w, "add", { { array_of(a), array_of(b) }, { array_of(y) } }, sum_of(), n);
}

void gpu_scale(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    each(w, "scale", { { array_of(x) }, { array_of(y) } }, times{ s }, n);
}

void gpu_axpy(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    each(w, "axpy", { { array_of(x), array_of(y) }, { array_of(y) } }, plus_times{ s }, n);
}

void gpu_add_scalar(struct workers *w, float *y, const float *s, int64_t n)
{
    each(w, "add_scalar", { { array_of(y) }, { array_of(y) } }, plus_one{ s }, n);
}

void gpu_zero(struct workers *w, float *y, int64_t n)
{
    if (!w->error && n > 0)
        (void)gpu_ok(w, cudaMemsetAsync(y, 0, (size_t)n * sizeof *y, w->stream), "zero");
}

void gpu_widen(struct workers *w, float *y, const uint16_t *x, int64_t n)
{
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    launch(w, "widen", widen_kernel, (unsigned)(blocks < MOST_BLOCKS ? blocks : (int64_t)MOST_BLOCKS), BLOCK, 0, y, x,
           n);
}
