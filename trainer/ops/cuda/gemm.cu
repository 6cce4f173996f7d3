/* gemm: products by cuBLASLt where it is there; else, and for what it cannot do, by a plain tiled kernel: a block makes
 * a tile of 64 x 64 in steps of 16 along k, a thread 4 x 4 of it, one chain over k ascending in f32 each.
 *
 * For cuBLASLt, which is column-major, C = A B becomes C^T = B^T A^T: a row-major matrix is its transpose in columns,
 * so B goes first and neither is moved. With gemm.bf16 factors that are f32 are narrowed into scratch first, rows
 * padded to 16 bytes; without it a bf16 factor is widened. */
#include "trainer/ops/cuda/gpu.h"

namespace
{
enum { TILE = 64, DEPTH = 16, PER = 4, PADDED = TILE + 4, BATCH = 24 };

struct batch {
    struct gemm g[BATCH];
};

struct tiles {
    float a[DEPTH][PADDED], b[DEPTH][PADDED];
};

__device__ inline float rounded(float x, bool bf16)
{
    return bf16 ? wide(narrow(x)) : x;
}

__device__ inline float a_at(const struct gemm &g, int64_t i, int64_t k)
{
    if (i >= g.m || k >= g.k)
        return 0.0f;
    int64_t at = g.a_trans ? k * g.lda + i : i * g.lda + k;
    return g.a_low ? wide(static_cast<const uint16_t *>(g.a)[at]) : static_cast<const float *>(g.a)[at];
}

__device__ inline float b_at(const struct gemm &g, int64_t k, int64_t j)
{
    if (k >= g.k || j >= g.n)
        return 0.0f;
    int64_t at = g.b_trans ? j * g.ldb + k : k * g.ldb + j;
    return g.b_dtype == DTYPE_BF16 ? wide(static_cast<const uint16_t *>(g.b)[at]) : static_cast<const float *>(g.b)[at];
}

/* Neighbouring threads take what are neighbours in memory. */
__device__ void take_tiles(const struct gemm &g, struct tiles &s, int64_t i0, int64_t j0, int64_t k0)
{
    for (int e = (int)threadIdx.x; e < TILE * DEPTH; e += BLOCK) {
        int i = g.a_trans ? e % TILE : e / DEPTH, k = g.a_trans ? e / TILE : e % DEPTH;
        s.a[k][i] = rounded(a_at(g, i0 + i, k0 + k), g.bf16);
        int j = g.b_trans ? e / DEPTH : e % TILE, q = g.b_trans ? e % DEPTH : e / TILE;
        s.b[q][j] = rounded(b_at(g, k0 + q, j0 + j), g.bf16);
    }
}

__device__ void finish(const struct gemm &g, const float (&sum)[PER][PER], int64_t i0, int64_t j0)
{
    for (int r = 0; r < PER; r++)
        for (int q = 0; q < PER; q++) {
            int64_t i = i0 + r, j = j0 + q;
            if (i >= g.m || j >= g.n)
                continue;
            struct array c = { g.c, g.c_low, false };
            float v[1] = { 0 };
            if (g.add && g.from)
                v[0] = g.from[i * g.ldc + j];
            else if (g.add)
                load<1>(v, c, i * g.ldc + j);
            v[0] += g.bias && !g.add ? sum[r][q] + g.bias[j] : sum[r][q];
            store<1>(c, i * g.ldc + j, v);
        }
}

__global__ void __launch_bounds__(BLOCK) multiply(struct batch all)
{
    SHARED(struct tiles, s);
    const struct gemm &g = all.g[blockIdx.z];
    int64_t i0 = (int64_t)blockIdx.x * TILE, j0 = (int64_t)blockIdx.y * TILE;
    int row = (int)threadIdx.x / 16 * PER, col = (int)threadIdx.x % 16 * PER;
    if (i0 >= g.m || j0 >= g.n)
        return;
    float sum[PER][PER] = {};
    for (int64_t k0 = 0; k0 < g.k; k0 += DEPTH) {
        take_tiles(g, s, i0, j0, k0);
        __syncthreads();
        UNROLL
        for (int k = 0; k < DEPTH; k++) {
            float a[PER], b[PER];
            load<PER>(a, &s.a[k][row]);
            load<PER>(b, &s.b[k][col]);
            UNROLL
            for (int r = 0; r < PER; r++)
                UNROLL
            for (int q = 0; q < PER; q++)
                sum[r][q] = fmaf(a[r], b[q], sum[r][q]);
        }
        __syncthreads();
    }
    finish(g, sum, i0 + row, j0 + col);
}

enum { EACH = 4 }; /* elements a thread */

/* Row blockIdx.x of `cols` elements to `to` of them, zeros behind the end; wide: rows can be taken four at a time.
 * Words of two bf16. */
__global__ void narrow_rows(unsigned *dst, int64_t to, const float *src, int64_t from, int64_t cols, bool wide)
{
    int64_t row = blockIdx.x, j = ((int64_t)blockIdx.y * BLOCK + threadIdx.x) * EACH;
    float v[EACH] = {};
    if (j >= to)
        return;
    if (wide && j < cols)
        load<EACH>(v, src + row * from + j);
    for (int k = 0; k < EACH && !wide; k++)
        if (j + k < cols)
            v[k] = src[row * from + j + k];
    dst[(row * to + j) / 2] = narrow_two(v[0], v[1]);
    dst[(row * to + j) / 2 + 1] = narrow_two(v[2], v[3]);
}

__global__ void widen_rows(float *dst, int64_t to, const uint16_t *src, int64_t from, int64_t cols)
{
    int64_t row = blockIdx.x, j = ((int64_t)blockIdx.y * BLOCK + threadIdx.x) * EACH;
    float v[EACH] = {};
    if (j >= to)
        return;
    for (int k = 0; k < EACH; k++)
        if (j + k < cols)
            v[k] = wide(src[row * from + j + k]);
    store<EACH>(dst + row * to + j, v);
}

/* A factor as it is stored, and as cuBLASLt gets it. */
struct factor {
    const void *p;
    bool half;
    int64_t ld, rows, cols;
    size_t bytes; /* of a copy in the other type; 0: none is needed */
};

struct factor factor_of(const void *p, bool half, bool wanted, int64_t ld, bool trans, int64_t rows, int64_t cols)
{
    struct factor f = { p, half, ld, trans ? cols : rows, trans ? rows : cols, 0 };
    if (half != wanted)
        f.bytes = (size_t)f.rows * (size_t)((f.cols + 7) / 8 * 8) * (wanted ? sizeof(uint16_t) : sizeof(float));
    f.bytes = (f.bytes + 255) / 256 * 256;
    return f;
}

void convert(struct workers *w, struct factor *f, void *to)
{
    if (!f->bytes)
        return;
    int64_t ld = (f->cols + 7) / 8 * 8;
    dim3 grid((unsigned)f->rows, gpu_blocks(ld, BLOCK * EACH));
    if (f->half) {
        launch(w, "gemm", widen_rows, grid, BLOCK, 0, static_cast<float *>(to), ld, static_cast<const uint16_t *>(f->p),
               f->ld, f->cols);
    } else {
        const float *from = static_cast<const float *>(f->p);
        launch(w, "gemm", narrow_rows, grid, BLOCK, 0, static_cast<unsigned *>(to), ld, from, f->ld, f->cols,
               four(f->cols, from) && f->ld % 4 == 0);
    }
    f->p = to;
    f->ld = ld;
}

/* false: the library cannot. */
bool by_library(struct workers *w, const struct gemm *g)
{
    struct factor a = factor_of(g->a, g->a_low, g->bf16, g->lda, g->a_trans, g->m, g->k);
    struct factor b = factor_of(g->b, g->b_dtype == DTYPE_BF16, g->bf16, g->ldb, g->b_trans, g->k, g->n);
    /* a row; of c's type */
    struct factor bias = factor_of(g->bias, false, g->c_low && g->bias && !g->add, g->n, false, 1, g->n);
    size_t bytes = a.bytes + b.bytes + bias.bytes;
    unsigned char *room = bytes ? static_cast<unsigned char *>(gpu_scratch(w, SCRATCH_GEMM, bytes)) : NULL;
    convert(w, &a, room);
    convert(w, &b, room + a.bytes);
    convert(w, &bias, room + a.bytes + b.bytes);
    struct lt_call call = {};
    call.a_trans = g->b_trans;
    call.b_trans = g->a_trans;
    call.bf16 = g->bf16;
    call.m = g->n;
    call.n = g->m;
    call.k = g->k;
    call.a = b.p;
    call.lda = b.ld;
    call.b = a.p;
    call.ldb = a.ld;
    call.c = g->c;
    call.c_low = g->c_low;
    call.from = g->from ? g->from : g->c;
    call.ldc = g->ldc;
    call.bias = g->add ? NULL : bias.p;
    call.beta = g->add ? 1.0f : 0.0f;
    return w->error || lt_matmul(w, &call);
}

void by_kernel(struct workers *w, const struct gemm *g, size_t count)
{
    for (size_t at = 0; at < count; at += BATCH) {
        struct batch all = {};
        unsigned n = (unsigned)(count - at < BATCH ? count - at : (size_t)BATCH);
        dim3 grid(0, 0, n);
        for (unsigned i = 0; i < n; i++) {
            all.g[i] = g[at + i];
            unsigned across = gpu_blocks(g[at + i].n, TILE), down = gpu_blocks(g[at + i].m, TILE);
            grid.x = down > grid.x ? down : grid.x;
            grid.y = across > grid.y ? across : grid.y;
        }
        launch(w, "gemm", multiply, grid, BLOCK, sizeof(struct tiles), all);
    }
}
} // namespace

void gpu_gemm(struct workers *w, const struct gemm *g)
{
    gpu_gemms(w, g, 1);
}

void gpu_gemms(struct workers *w, const struct gemm *g, size_t count)
{
    if (!w->lt) {
        by_kernel(w, g, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        if (g[i].m < 1 || g[i].n < 1)
            continue;
        if (g[i].k < 1 || !by_library(w, &g[i]))
            by_kernel(w, &g[i], 1);
    }
}
