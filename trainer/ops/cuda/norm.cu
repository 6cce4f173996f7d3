/* norm: root-mean-square normalisation, a warp a row; and sums over rows or over everything. Columns are added in runs
 * of SPLIT rows, each by eight threads a column, and then run by run: an order that follows from the row count. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { SPLIT = 256, COLUMNS = WARP, LANES = BLOCK / COLUMNS, SUM_LANES = 16 };

template <int W>
__global__ void norm_rows(struct array y, float *rrms, struct array x, const float *weight, int64_t rows, int64_t c,
                          float eps)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows)
        return;
    x = moved(x, row * c);
    y = moved(y, row * c);
    float sum = 0;
    for (int64_t j = lane * W; j < c; j += WARP * W) {
        float v[W];
        load<W>(v, x, j);
        UNROLL
        for (int k = 0; k < W; k++)
            sum += v[k] * v[k];
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)c + eps);
    for (int64_t j = lane * W; j < c; j += WARP * W) {
        float v[W], s[W];
        load<W>(v, x, j);
        load<W>(s, weight + j);
        UNROLL
        for (int k = 0; k < W; k++)
            v[k] = v[k] * r * s[k];
        store<W>(y, j, v);
    }
    if (lane == 0)
        rrms[row] = r;
}

/* dx += r dy w - x r^3 / C sum(dy w x) */
template <int W>
__global__ void norm_rows_bwd(struct array dx, struct array dy, struct array x, const float *weight, const float *rrms,
                              int64_t rows, int64_t c)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows)
        return;
    dx = moved(dx, row * c);
    dy = moved(dy, row * c);
    x = moved(x, row * c);
    float sum = 0, r = rrms[row];
    for (int64_t j = lane * W; j < c; j += WARP * W) {
        float v[W], s[W], d[W];
        load<W>(v, x, j);
        load<W>(s, weight + j);
        load<W>(d, dy, j);
        UNROLL
        for (int k = 0; k < W; k++)
            sum += d[k] * s[k] * v[k];
    }
    float mean = warp_sum(sum) * r * r * r / (float)c;
    for (int64_t j = lane * W; j < c; j += WARP * W) {
        float v[W], s[W], d[W], to[W] = {};
        load<W>(v, x, j);
        load<W>(s, weight + j);
        load<W>(d, dy, j);
        if (!dx.fresh)
            load<W>(to, dx, j);
        UNROLL
        for (int k = 0; k < W; k++)
            to[k] += r * d[k] * s[k] - mean * v[k];
        store<W>(dx, j, to);
    }
}

__device__ inline float at_of(const struct array &x, int64_t i)
{
    float v[1];
    load<1>(v, x, i);
    return v[0];
}

/* partial[split][m]: sums of dy, or of dy x rrms, over a run of rows. */
__global__ void column_sums(float *partial, struct array dy, struct array x, const float *rrms, int64_t rows, int64_t m)
{
    struct room {
        float sum[LANES][COLUMNS];
    };
    SHARED(room, s);
    int64_t lane = threadIdx.x / COLUMNS, at = threadIdx.x % COLUMNS, j = (int64_t)blockIdx.x * COLUMNS + at;
    int64_t first = (int64_t)blockIdx.y * SPLIT, end = min_of(first + SPLIT, rows);
    float sum = 0;
    for (int64_t i = first + lane; j < m && i < end; i += LANES)
        sum += x.at ? at_of(dy, i * m + j) * (at_of(x, i * m + j) * rrms[i]) : at_of(dy, i * m + j);
    s.sum[lane][at] = sum;
    __syncthreads();
    if (lane > 0 || j >= m)
        return;
    for (int k = 1; k < LANES; k++)
        sum += s.sum[k][at];
    partial[(int64_t)blockIdx.y * m + j] = sum;
}

__global__ void add_splits(float *y, const float *partial, int64_t splits, int64_t m)
{
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= m)
        return;
    float sum = 0;
    for (int64_t i = 0; i < splits; i++)
        sum += partial[i * m + j];
    y[j] += sum;
}

void columns(struct workers *w, const char *what, float *y, struct array dy, struct array x, const float *rrms,
             int64_t rows, int64_t m)
{
    enum { MOST = 32768 }; /* splits of a launch */
    int64_t each = (int64_t)MOST * SPLIT;
    for (int64_t at = 0; at < rows; at += each) {
        int64_t n = rows - at < each ? rows - at : each;
        unsigned splits = gpu_blocks(n, SPLIT);
        float *partial = (float *)gpu_scratch(w, SCRATCH_CALL, (size_t)splits * (size_t)m * sizeof *partial);
        launch(w, what, column_sums, dim3(gpu_blocks(m, COLUMNS), splits), BLOCK, LANES * COLUMNS * sizeof(float),
               partial, moved(dy, at * m), moved(x, at * m), rrms ? rrms + at : NULL, n, m);
        launch(w, what, add_splits, gpu_blocks(m, BLOCK), BLOCK, 0, y, partial, (int64_t)splits, m);
    }
}

/* out[b]: the f64 sum of elements [1024 b, 1024 (b + 1)), or of their squares, by SUM_LANES threads in the CPU's order:
 * a lane's elements are SUM_LANES apart, then lanes are added pairwise, the farthest first. Squares are exact in f64.
 */
__global__ void sum_blocks(double *out, const float *x, int64_t n, bool squared)
{
    int64_t b = (int64_t)blockIdx.x * (BLOCK / SUM_LANES) + threadIdx.x / SUM_LANES;
    int64_t end = min_of((b + 1) * SUM_BLOCK, n);
    double sum = 0;
    for (int64_t i = b * SUM_BLOCK + threadIdx.x % SUM_LANES; i < end; i += SUM_LANES)
        sum += squared ? (double)x[i] * (double)x[i] : (double)x[i];
    for (int step = SUM_LANES / 2; step; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % SUM_LANES == 0 && b * SUM_BLOCK < n)
        out[b] = sum;
}

/* tree_sum, by one block. A level's sums go to the front of what they are made of: read, wait, write. */
__global__ void sum_tree(float *y, double *s, int64_t n)
{
    for (; n > 1; n = (n + 1) / 2)
        for (int64_t first = 0; first < (n + 1) / 2; first += BLOCK) {
            int64_t i = first + threadIdx.x;
            double sum = 0;
            if (i < (n + 1) / 2)
                sum = 2 * i + 1 < n ? s[2 * i] + s[2 * i + 1] : s[2 * i];
            __syncthreads();
            if (i < (n + 1) / 2)
                s[i] = sum;
            __syncthreads();
        }
    if (threadIdx.x == 0)
        *y = n ? (float)s[0] : 0.0f;
}

struct add_room {
    double x[ADD_MOST];
};

/* A block adds one up: tree_sum, in shared memory. */
__global__ void add_up(double *v, const struct add *all)
{
    enum { EACH = ADD_MOST / 2 / BLOCK };
    SHARED(add_room, s);
    struct add a = all[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < a.count; i += BLOCK)
        s.x[i] = v[(uint32_t)(a.from + i * a.step)];
    __syncthreads();
    for (uint32_t n = a.count; n > 1; n = (n + 1) / 2) {
        double sum[EACH] = {};
        UNROLL
        for (uint32_t k = 0; k < EACH; k++) {
            uint32_t i = threadIdx.x + k * BLOCK;
            if (i < (n + 1) / 2)
                sum[k] = 2 * i + 1 < n ? s.x[2 * i] + s.x[2 * i + 1] : s.x[2 * i];
        }
        __syncthreads();
        UNROLL
        for (uint32_t k = 0; k < EACH; k++)
            if (threadIdx.x + k * BLOCK < (n + 1) / 2)
                s.x[threadIdx.x + k * BLOCK] = sum[k];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        v[a.to] = s.x[0];
}

/* One block: a thread an addition, and a barrier behind each round. */
__global__ void add_rounds(double *v, const struct add *all, const uint32_t *begin, uint32_t rounds)
{
    for (uint32_t r = 0; r < rounds; r++) {
        for (uint32_t i = begin[r] + threadIdx.x; i < begin[r + 1]; i += BLOCK) {
            struct add a = all[i];
            v[a.to] = a.count > 1 ? v[a.from] + v[(uint32_t)(a.from + a.step)] : v[a.from];
        }
        __syncthreads();
    }
}

__global__ void clip_kernel(struct clipped *c, const double *squares, double clip)
{
    if (threadIdx.x == 0)
        *c = clip_squares(clip, *squares);
}

struct least_room {
    int64_t least[BLOCK];
};

/* The least of the block's values, on thread 0. */
__device__ int64_t block_least(int64_t i, least_room &s)
{
    s.least[threadIdx.x] = i;
    __syncthreads();
    for (int t = 1; t < BLOCK && threadIdx.x == 0; t++)
        i = min_of(i, s.least[t]);
    return i;
}

/* out[b]: where the first element that is not finite is, of those that block b looks at; n: nowhere. */
__global__ void first_of_blocks(int64_t *out, struct array x, int64_t n)
{
    SHARED(least_room, s);
    int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x, step = (int64_t)gridDim.x * BLOCK;
    while (i < n && (__float_as_uint(at_of(x, i)) & 0x7f800000u) != 0x7f800000u)
        i += step;
    i = block_least(min_of(i, n), s);
    if (threadIdx.x == 0)
        out[blockIdx.x] = i;
}

__global__ void first_of_all(int64_t *first, const int64_t *found, int64_t blocks, int64_t n)
{
    SHARED(least_room, s);
    int64_t least = n;
    for (int64_t i = threadIdx.x; i < blocks; i += BLOCK)
        least = min_of(least, found[i]);
    least = block_least(least, s);
    if (threadIdx.x == 0)
        *first = least;
}
} // namespace

void gpu_rmsnorm(struct workers *w, struct array y, float *rrms, struct array x, const float *weight, int64_t rows,
                 int64_t c, float eps)
{
    launch(w, "rmsnorm", four(c, y, x, weight) ? norm_rows<4> : norm_rows<1>, gpu_blocks(rows, WARPS), BLOCK, 0, y,
           rrms, x, weight, rows, c, eps);
}

void gpu_rmsnorm_bwd(struct workers *w, struct array dx, struct array dy, struct array x, const float *weight,
                     const float *rrms, int64_t rows, int64_t c)
{
    bool wide = four(c, dx, dy, weight) && four_at(x);
    launch(w, "rmsnorm_bwd", wide ? norm_rows_bwd<4> : norm_rows_bwd<1>, gpu_blocks(rows, WARPS), BLOCK, 0, dx, dy, x,
           weight, rrms, rows, c);
}

void gpu_rmsnorm_bwd_weight(struct workers *w, float *dweight, struct array dy, struct array x, const float *rrms,
                            int64_t rows, int64_t c)
{
    columns(w, "rmsnorm_bwd_weight", dweight, dy, x, rrms, rows, c);
}

void gpu_bias_bwd(struct workers *w, float *db, struct array dy, int64_t n, int64_t m)
{
    columns(w, "bias_bwd", db, dy, array_of(NULL), NULL, n, m);
}

void gpu_block_sums(struct workers *w, const float *x, int64_t n, bool squared, double *out)
{
    launch(w, "block_sums", sum_blocks, gpu_blocks(n, (int64_t)SUM_BLOCK * (BLOCK / SUM_LANES)), BLOCK, 0, out, x, n,
           squared);
}

void gpu_adds(struct workers *w, double *v, const struct add *a, uint32_t n)
{
    launch(w, "adds", add_up, n, BLOCK, sizeof(struct add_room), v, a);
}

void gpu_add_rounds(struct workers *w, double *v, const struct add *a, const uint32_t *begin, uint32_t rounds)
{
    launch(w, "add_rounds", add_rounds, rounds ? 1 : 0, BLOCK, 0, v, a, begin, rounds);
}

void gpu_clip(struct workers *w, struct clipped *c, const double *squares, double clip)
{
    launch(w, "clip", clip_kernel, 1, WARP, 0, c, squares, clip);
}

void gpu_sum(struct workers *w, float *y, const float *x, int64_t n, double *partial)
{
    gpu_block_sums(w, x, n, false, partial);
    launch(w, "sum", sum_tree, 1, BLOCK, 0, y, partial, (n + SUM_BLOCK - 1) / SUM_BLOCK);
}

void gpu_find_nonfinite(struct workers *w, int64_t *first, struct array x, int64_t n)
{
    enum { MOST = 128 };
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    blocks = blocks < MOST ? blocks : (int64_t)MOST;
    int64_t *found = (int64_t *)gpu_scratch(w, SCRATCH_CALL, (size_t)(blocks + 1) * sizeof *found);
    launch(w, "find_nonfinite", first_of_blocks, (unsigned)blocks, BLOCK, sizeof(struct least_room), found, x, n);
    launch(w, "find_nonfinite", first_of_all, 1, BLOCK, sizeof(struct least_room), first, found, blocks, n);
}
