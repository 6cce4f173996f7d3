/* gemm_mma: products of factors in bf16, or rounded to it, on tensor cores, sums in f32 (mma.h says what an instruction
 * does). Those of groups of rows (struct grouped_gemm) are one launch, whose sizes the host need not know.
 *
 * A block makes a tile of 128 x 128, a warp 64 x 32 of it, in steps of 32 along k, ascending; nobody else adds to it.
 * Tiles of the factors lie in shared memory as they do in memory: lines along k, or (ACROSS) along the other dimension,
 * which ldmatrix turns. A line is 8 elements longer than needed, so that eight of them begin in different banks. There
 * are three stages: while one is multiplied, the next has arrived or is in registers, and the one behind it is under
 * way. What is bf16 is copied past the registers; what is f32 goes through them and is rounded. */
#include "trainer/ops/cuda/gemm.h"
#include "trainer/ops/cuda/mma.h"

namespace
{
enum { TILE = 128, DEPTH = 32, STEP = 16, ACROSS_STEP = 8, STAGES = 3 };
enum { WARP_ROWS = 64, WARP_COLS = 32, WARPS_ACROSS = TILE / WARP_COLS };
enum { DOWN = WARP_ROWS / STEP, COLS = WARP_COLS / ACROSS_STEP }; /* instructions' results a warp */
enum { CHUNK = 8, CHUNKS = TILE * DEPTH / CHUNK / BLOCK };        /* neighbours that a thread moves; how often */

/* Neighbours along a line, two to a word. */
struct alignas(16) chunk {
    unsigned pair[CHUNK / 2];
};

template <bool ACROSS> struct slab {
    enum { LINES = ACROSS ? DEPTH : TILE, LENGTH = (ACROSS ? TILE : DEPTH) / CHUNK };
    struct chunk at[LINES][LENGTH + 1];

    /* Element `first` of a line, the first one of a chunk. */
    __device__ const struct chunk *row(int line, int first) const
    {
        return &at[line][first / CHUNK];
    }
};

template <bool A_ACROSS, bool B_ACROSS> struct tiles {
    struct {
        slab<A_ACROSS> a;
        slab<B_ACROSS> b;
    } stage[STAGES];
};

/* A factor on its way to shared memory. */
template <bool LOW, bool ACROSS> struct mover {
    const unsigned char *from; /* the tile's first element at k = 0 */
    int64_t ld, other, k;      /* of the dimension that is not k, and of k: how much there is from there on */
    bool aligned;
    float v[LOW ? 1 : CHUNKS][CHUNK]; /* of f32 */

    __device__ mover(const void *p, int64_t start, int64_t ld_, int64_t first, int64_t end, int64_t k_)
        : from(static_cast<const unsigned char *>(p) + (start + (ACROSS ? first : first * ld_)) * (LOW ? 2 : 4)),
          ld(ld_), other(end - first), k(k_)
    {
        aligned = (((uintptr_t)from | (uintptr_t)(ld * (LOW ? 2 : 4))) & 15) == 0;
    }

    /* Where the thread's chunk q is in shared memory. */
    __device__ struct chunk &place(slab<ACROSS> &to, int q) const
    {
        int i = (int)threadIdx.x + q * BLOCK;
        return to.at[i / slab<ACROSS>::LENGTH][i % slab<ACROSS>::LENGTH];
    }

    /* What of it there is of the step at k0, 0 to 8 elements, and where. */
    __device__ int find(int q, int64_t k0, int64_t *at) const
    {
        int i = (int)threadIdx.x + q * BLOCK, line = i / slab<ACROSS>::LENGTH, first = i % slab<ACROSS>::LENGTH * CHUNK;
        int64_t lines = ACROSS ? k - k0 : other, length = ACROSS ? other : k - k0;
        *at = ACROSS ? (k0 + line) * ld + first : line * ld + k0 + first;
        int64_t left = line < lines ? length - first : 0;
        return left < 0 ? 0 : left < CHUNK ? (int)left : (int)CHUNK;
    }

    __device__ void begin(slab<ACROSS> &to, int64_t k0)
    {
        UNROLL
        for (int q = 0; q < CHUNKS; q++) {
            int64_t at;
            int count = find(q, k0, &at);
            if (LOW)
                begin_low(place(to, q), at, count);
            else
                begin_wide(v[LOW ? 0 : q], at, count);
        }
    }

    __device__ void begin_low(struct chunk &to, int64_t at, int count) const
    {
        const uint16_t *p = reinterpret_cast<const uint16_t *>(from);
        if (aligned) {
            copy_async(&to, count ? p + at : p, count * 2);
            return;
        }
        UNROLL
        for (int i = 0; i < CHUNK; i += 2)
            to.pair[i / 2] = (i < count ? p[at + i] : 0u) | (i + 1 < count ? (unsigned)p[at + i + 1] << 16 : 0u);
    }

    __device__ void begin_wide(float (&to)[CHUNK], int64_t at, int count) const
    {
        const float *p = reinterpret_cast<const float *>(from) + at;
        if (aligned && count == CHUNK) {
            float low[CHUNK / 2], high[CHUNK / 2];
            load<CHUNK / 2>(low, p);
            load<CHUNK / 2>(high, p + CHUNK / 2);
            UNROLL
            for (int i = 0; i < CHUNK; i++)
                to[i] = i < CHUNK / 2 ? low[i % (CHUNK / 2)] : high[i % (CHUNK / 2)];
            return;
        }
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            to[i] = i < count ? p[i] : 0.0f;
    }

    /* What was begun last; of bf16 nothing is left to do but copy_wait. */
    __device__ void end(slab<ACROSS> &to) const
    {
        UNROLL
        for (int q = 0; q < CHUNKS && !LOW; q++)
            UNROLL
        for (int i = 0; i < CHUNK; i += 2)
            place(to, q).pair[i / 2] = narrow_two(v[LOW ? 0 : q][i], v[LOW ? 0 : q][i + 1]);
    }
};

typedef float warp_sums[DOWN][COLS][4];

/* The warp's part of a stage's product: rows from `row` on, columns from `col` on. */
template <bool A_ACROSS, bool B_ACROSS>
__device__ void multiply_stage(warp_sums &sum, const slab<A_ACROSS> &a, const slab<B_ACROSS> &b, int row, int col)
{
    int lane = (int)threadIdx.x % WARP, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    UNROLL
    for (int k = 0; k < DEPTH; k += STEP) {
        struct first_factor x[DOWN];
        unsigned y[COLS / 2][4];
        UNROLL
        for (int r = 0; r < DOWN; r++)
            load_matrices<A_ACROSS>(x[r].v, A_ACROSS ? a.row(k + high + low, row + r * STEP + middle)
                                                     : a.row(row + r * STEP + middle + low, k + high));
        UNROLL
        for (int c = 0; c < COLS / 2; c++)
            load_matrices<B_ACROSS>(y[c], B_ACROSS ? b.row(k + middle + low, col + c * STEP + high)
                                                   : b.row(col + c * STEP + high + low, k + middle));
        UNROLL
        for (int r = 0; r < DOWN; r++)
            UNROLL
        for (int c = 0; c < COLS; c++)
            mma(sum[r][c], x[r], y[c / 2][c % 2 * 2], y[c / 2][c % 2 * 2 + 1]);
    }
}

struct alignas(8) two {
    float v[2];
};

/* Sums of columns j and j + 1 of a row go to C, `at` elements on; `pairs`: both can be written at once. */
__device__ void finish(const struct gemm &g, int64_t at, int64_t j, float low, float high, bool pairs)
{
    float v[2] = { low, high };
    int count = j + 1 < g.n ? 2 : 1;
    float *wide_c = static_cast<float *>(g.c) + at;
    uint16_t *low_c = static_cast<uint16_t *>(g.c) + at;
    for (int i = 0; i < count; i++) {
        if (g.add)
            v[i] += g.c_low ? wide(low_c[i]) : g.from ? g.from[at + i] : wide_c[i];
        else if (g.bias)
            v[i] += g.bias[j + i];
    }
    if (pairs && count == 2 && g.c_low)
        *reinterpret_cast<unsigned *>(low_c) = narrow_two(v[0], v[1]);
    else if (pairs && count == 2)
        *reinterpret_cast<struct two *>(wide_c) = { { v[0], v[1] } };
    else
        for (int i = 0; i < count; i++) {
            if (g.c_low)
                low_c[i] = (uint16_t)narrow_two(v[i], 0.0f);
            else
                wide_c[i] = v[i];
        }
}

/* The warp's sums, of a tile's rows from i0 and columns from j0 on. */
__device__ void finish_warp(const struct gemm &g, const struct product_tile &t, int64_t i0, int64_t j0,
                            const warp_sums &sum)
{
    int64_t row = i0 + threadIdx.x % WARP / 4, col = j0 + threadIdx.x % 4 * 2;
    bool pairs = ((t.c | g.ldc) & 1) == 0 && ((uintptr_t)g.c & (g.c_low ? 3 : 7)) == 0;
    UNROLL
    for (int r = 0; r < DOWN * 2; r++) {
        int64_t i = row + r * 8;
        UNROLL
        for (int c = 0; c < COLS; c++) {
            int64_t j = col + c * ACROSS_STEP;
            if (i < t.m && j < g.n)
                finish(g, t.c + i * g.ldc + j, j, sum[r / 2][c][r % 2 * 2], sum[r / 2][c][r % 2 * 2 + 1], pairs);
        }
    }
}

template <bool A_LOW, bool A_ACROSS, bool B_LOW, bool B_ACROSS>
__global__ void __launch_bounds__(BLOCK) multiply(struct grouped_gemm p)
{
    typedef tiles<A_ACROSS, B_ACROSS> room;
    SHARED(room, s);
    const struct gemm &g = p.one;
    struct product_tile t;
    if (!find_product(p, TILE, &t))
        return;
    int row = (int)threadIdx.x / WARP / WARPS_ACROSS * WARP_ROWS,
        col = (int)threadIdx.x / WARP % WARPS_ACROSS * WARP_COLS;
    bool busy = t.i0 + row < t.m && t.j0 + col < g.n;
    int64_t steps = (t.k + DEPTH - 1) / DEPTH;
    mover<A_LOW, A_ACROSS> a(g.a, t.a, g.lda, t.i0, t.m, t.k);
    mover<B_LOW, B_ACROSS> b(g.b, t.b, g.ldb, t.j0, g.n, t.k);
    warp_sums sum = {};
    /* Every step's copies are one group, also where there are none. */
    for (int i = 0; i < 2; i++) {
        if (i == 1 && steps > 0) {
            a.end(s.stage[0].a);
            b.end(s.stage[0].b);
        }
        if (i < steps) {
            a.begin(s.stage[i].a, i * DEPTH);
            b.begin(s.stage[i].b, i * DEPTH);
        }
        copy_commit();
    }
    for (int64_t i = 0; i < steps; i++) {
        int now = (int)(i % STAGES), next = (now + 1) % STAGES, then = (now + 2) % STAGES;
        copy_wait<1>();
        __syncthreads(); /* this stage is there, and nobody reads that of the step before any more */
        if (i + 1 < steps) {
            a.end(s.stage[next].a);
            b.end(s.stage[next].b);
        }
        if (i + 2 < steps) {
            a.begin(s.stage[then].a, (i + 2) * DEPTH);
            b.begin(s.stage[then].b, (i + 2) * DEPTH);
        }
        copy_commit();
        if (busy)
            multiply_stage<A_ACROSS, B_ACROSS>(sum, s.stage[now].a, s.stage[now].b, row, col);
    }
    if (busy)
        finish_warp(g, t, t.i0 + row, t.j0 + col, sum);
}

template <bool A_LOW, bool A_ACROSS, bool B_LOW> void run(struct workers *w, const struct grouped_gemm *p)
{
    if (p->one.b_trans)
        launch(w, "gemm", multiply<A_LOW, A_ACROSS, B_LOW, false>, product_blocks(p, TILE), BLOCK,
               sizeof(tiles<A_ACROSS, false>), *p);
    else
        launch(w, "gemm", multiply<A_LOW, A_ACROSS, B_LOW, true>, product_blocks(p, TILE), BLOCK,
               sizeof(tiles<A_ACROSS, true>), *p);
}

template <bool A_LOW, bool A_ACROSS> void run_of(struct workers *w, const struct grouped_gemm *p)
{
    if (p->one.b_dtype == DTYPE_BF16)
        run<A_LOW, A_ACROSS, true>(w, p);
    else
        run<A_LOW, A_ACROSS, false>(w, p);
}
} // namespace

void mma_grouped(struct workers *w, const struct grouped_gemm *p)
{
    if (p->one.a_low && p->one.a_trans)
        run_of<true, true>(w, p);
    else if (p->one.a_low)
        run_of<true, false>(w, p);
    else if (p->one.a_trans)
        run_of<false, true>(w, p);
    else
        run_of<false, false>(w, p);
}
