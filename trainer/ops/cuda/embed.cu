/* embed: rows of a table by id, and rotary angles and rotations. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { OWNERS = 4096, STEPS = 4, FREQUENCIES = 128 };

__global__ void gather(float *y, const void *table, bool half, const int32_t *id, int64_t n, int64_t c)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n * c; i += step) {
        int64_t from = id[i / c];
        if (from < 0)
            y[i] = 0;
        else
            y[i] = half ? wide(static_cast<const uint16_t *>(table)[from * c + i % c])
                        : static_cast<const float *>(table)[from * c + i % c];
    }
}

/* A warp's columns of one table row, added up while the same id comes again. */
template <int W> struct row_sum {
    int64_t row; /* -1: none */
    float v[STEPS][W];

    __device__ void flush(float *table, int64_t c, int64_t first)
    {
        for (int k = 0; row >= 0 && k < STEPS; k++) {
            int64_t j = first + k * WARP * W;
            if (j >= c)
                break;
            float to[W];
            load<W>(to, table + row * c + j);
            for (int e = 0; e < W; e++)
                to[e] += v[k][e];
            store<W>(table + row * c + j, to);
        }
    }

    __device__ void add(const float *dy, int64_t c, int64_t first, bool begins)
    {
        for (int k = 0; k < STEPS; k++) {
            int64_t j = first + k * WARP * W;
            if (j >= c)
                break;
            float from[W];
            load<W>(from, dy + j);
            for (int e = 0; e < W; e++)
                v[k][e] = begins ? from[e] : v[k][e] + from[e];
        }
    }
};

/* Warp `owner` of `owners` adds the tokens whose id is its own modulo `owners`, in their order; blockIdx.y: columns. */
template <int W>
__global__ void scatter(float *table, const float *dy, const int32_t *id, int64_t n, int64_t c, int64_t owners)
{
    int64_t owner = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int64_t first = (int64_t)blockIdx.y * WARP * W * STEPS + lane * W;
    struct row_sum<W> sum;
    sum.row = -1;
    for (int64_t at = 0; at < n; at += WARP) {
        int32_t mine = at + lane < n ? id[at + lane] : -1;
        unsigned hits = __ballot_sync(0xffffffffu, mine >= 0 && mine % owners == owner);
        while (hits) {
            int from = __ffs((int)hits) - 1;
            int64_t row = __shfl_sync(0xffffffffu, mine, from);
            hits &= hits - 1;
            bool begins = row != sum.row;
            if (begins) {
                sum.flush(table, c, first);
                sum.row = row;
            }
            sum.add(dy + (at + from) * c, c, first, begins);
        }
    }
    sum.flush(table, c, first);
}

struct frequencies {
    double f[FREQUENCIES];
};

/* Of the angles [first, first + count) of D/2. */
__global__ void angles(float *table, const int32_t *position, int64_t n, int64_t half, int64_t first, int64_t count,
                       struct frequencies f, double amplitude)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * count)
        return;
    int64_t token = i / count, j = i % count;
    double a = (double)position[token] * f.f[j];
    table[token * 2 * half + first + j] = (float)(amplitude * cos(a));
    table[token * 2 * half + half + first + j] = (float)(amplitude * sin(a));
}

/* y = (or += if `add`) x turned by `sign` times the token's angles. */
template <int W>
__global__ void rotate(struct array y, struct array x, const float *table, int64_t n, int64_t h, int64_t half,
                       float sign, bool add)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x, across = half / W;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n * h * across; i += step) {
        int64_t head = i / across, j = i % across * W, at = head * 2 * half + j, angle = head / h * 2 * half + j;
        float a[W], b[W], cosine[W], sine[W], low[W] = {}, high[W] = {};
        load<W>(a, x, at);
        load<W>(b, x, at + half);
        load<W>(cosine, table + angle);
        load<W>(sine, table + angle + half);
        if (add) {
            load<W>(low, y, at);
            load<W>(high, y, at + half);
        }
        UNROLL
        for (int k = 0; k < W; k++) {
            low[k] += a[k] * cosine[k] - b[k] * (sign * sine[k]);
            high[k] += b[k] * cosine[k] + a[k] * (sign * sine[k]);
        }
        store<W>(y, at, low);
        store<W>(y, at + half, high);
    }
}

void turn(struct workers *w, const char *what, struct array y, struct array x, const float *table, int64_t n, int64_t h,
          int64_t d, float sign, bool add)
{
    bool wide = four(d / 2, y, x, table);
    int64_t blocks = (n * h * (d / 2) / (wide ? 4 : 1) + BLOCK - 1) / BLOCK;
    launch(w, what, wide ? rotate<4> : rotate<1>, (unsigned)(blocks < (1 << 20) ? blocks : (1 << 20)), BLOCK, 0, y, x,
           table, n, h, d / 2, sign, add);
}
} // namespace

void gpu_embedding(struct workers *w, float *y, const void *table, enum dtype t, const int32_t *id, int64_t n,
                   int64_t c)
{
    int64_t blocks = (n * c + BLOCK - 1) / BLOCK;
    launch(w, "embedding", gather, (unsigned)(blocks < (1 << 20) ? blocks : (1 << 20)), BLOCK, 0, y, table,
           t == DTYPE_BF16, id, n, c);
}

void gpu_embedding_bwd(struct workers *w, float *dtable, const float *dy, const int32_t *id, int64_t n, int64_t c)
{
    bool wide = four(c, dtable, dy);
    int64_t owners = n < OWNERS ? (n + WARPS - 1) / WARPS * WARPS : (int64_t)OWNERS;
    dim3 grid(gpu_blocks(owners, WARPS), gpu_blocks(c, WARP * STEPS * (wide ? 4 : 1)));
    launch(w, "embedding_bwd", wide ? scatter<4> : scatter<1>, grid, BLOCK, 0, dtable, dy, id, n, c, owners);
}

void gpu_rope_table(struct workers *w, float *table, const int32_t *position, int64_t n, int64_t d,
                    const double *frequency, double amplitude)
{
    for (int64_t first = 0; first < d / 2; first += FREQUENCIES) {
        struct frequencies f = {};
        int64_t count = d / 2 - first < FREQUENCIES ? d / 2 - first : (int64_t)FREQUENCIES;
        memcpy(f.f, frequency + first, (size_t)count * sizeof f.f[0]);
        launch(w, "rope_table", angles, gpu_blocks(n * count, BLOCK), BLOCK, 0, table, position, n, d / 2, first, count,
               f, amplitude);
    }
}

void gpu_rope(struct workers *w, struct array y, struct array x, const float *table, int64_t n, int64_t h, int64_t d)
{
    turn(w, "rope", y, x, table, n, h, d, 1.0f, false);
}

void gpu_rope_bwd(struct workers *w, struct array dx, struct array dy, const float *table, int64_t n, int64_t h,
                  int64_t d)
{
    turn(w, "rope_bwd", dx, dy, table, n, h, d, -1.0f, !dx.fresh);
}
