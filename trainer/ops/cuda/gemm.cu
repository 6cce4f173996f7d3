/* gemm: products by cuBLASLt where it is there, groups of them and what it cannot do by our own kernels: with gemm.bf16
 * that of gemm_mma.cu, else a plain tiled one here: a block makes a tile of 64 x 64 in steps of 16 along k, a thread
 * 4 x 4 of it, one chain over k ascending in f32 each.
 *
 * For cuBLASLt, which is column-major, C = A B becomes C^T = B^T A^T: a row-major matrix is its transpose in columns,
 * so B goes first and neither is moved. With gemm.bf16 factors that are f32 are narrowed into scratch first, rows
 * padded to 16 bytes; without it a bf16 factor is widened. */
#include "trainer/ops/cuda/gemm.h"

namespace
{
enum { TILE = 64, DEPTH = 16, PER = 4, PADDED = TILE + 4 };

struct tiles {
    float a[DEPTH][PADDED], b[DEPTH][PADDED];
};

/* Row i and column j of the group's product, k along both. */
__device__ inline float a_at(const struct gemm &g, const struct product_tile &t, int64_t i, int64_t k)
{
    if (i >= t.m || k >= t.k)
        return 0.0f;
    return static_cast<const float *>(g.a)[t.a + (g.a_trans ? k * g.lda + i : i * g.lda + k)];
}

__device__ inline float b_at(const struct gemm &g, const struct product_tile &t, int64_t k, int64_t j)
{
    if (k >= t.k || j >= g.n)
        return 0.0f;
    int64_t at = t.b + (g.b_trans ? j * g.ldb + k : k * g.ldb + j);
    return g.b_dtype == DTYPE_BF16 ? wide(static_cast<const uint16_t *>(g.b)[at]) : static_cast<const float *>(g.b)[at];
}

/* Neighbouring threads take what are neighbours in memory. */
__device__ void take_tiles(const struct gemm &g, const struct product_tile &t, struct tiles &s, int64_t k0)
{
    for (int e = (int)threadIdx.x; e < TILE * DEPTH; e += BLOCK) {
        int i = g.a_trans ? e % TILE : e / DEPTH, k = g.a_trans ? e / TILE : e % DEPTH;
        s.a[k][i] = a_at(g, t, t.i0 + i, k0 + k);
        int j = g.b_trans ? e / DEPTH : e % TILE, q = g.b_trans ? e % DEPTH : e / TILE;
        s.b[q][j] = b_at(g, t, k0 + q, t.j0 + j);
    }
}

__device__ void finish(const struct gemm &g, const struct product_tile &t, const float (&sum)[PER][PER], int64_t i0,
                       int64_t j0)
{
    float *c = static_cast<float *>(g.c) + t.c;
    const float *from = g.from ? g.from + t.c : c;
    for (int r = 0; r < PER; r++)
        for (int q = 0; q < PER; q++) {
            int64_t i = i0 + r, j = j0 + q, at = i * g.ldc + j;
            if (i >= t.m || j >= g.n)
                continue;
            c[at] = g.add ? from[at] + sum[r][q] : g.bias ? sum[r][q] + g.bias[j] : sum[r][q];
        }
}

__global__ void __launch_bounds__(BLOCK) multiply(struct grouped_gemm p)
{
    SHARED(struct tiles, s);
    const struct gemm &g = p.one;
    struct product_tile t;
    int row = (int)threadIdx.x / 16 * PER, col = (int)threadIdx.x % 16 * PER;
    if (!find_product(p, TILE, &t))
        return;
    float sum[PER][PER] = {};
    for (int64_t k0 = 0; k0 < t.k; k0 += DEPTH) {
        take_tiles(g, t, s, k0);
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
    finish(g, t, sum, t.i0 + row, t.j0 + col);
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

} // namespace

void gpu_grouped(struct workers *w, const struct grouped_gemm *p)
{
    if (p->one.bf16)
        mma_grouped(w, p);
    else
        launch(w, "gemm", multiply, product_blocks(p, TILE), BLOCK, sizeof(struct tiles), *p);
}

void gpu_gemm(struct workers *w, const struct gemm *g)
{
    struct grouped_gemm alone = {};
    alone.one = *g;
    if (g->m < 1 || g->n < 1)
        return;
    if (!w->lt || g->k < 1 || !by_library(w, g))
        gpu_grouped(w, &alone);
}
