/* gemm: what the two kernels of products share: which tile of which group's product a block makes. gemm.cu computes in
 * f32, gemm_mma.cu on tensor cores. For these two files only. */
#ifndef TESSERA_TRAINER_OPS_CUDA_GEMM_H
#define TESSERA_TRAINER_OPS_CUDA_GEMM_H

#include "trainer/ops/cuda/gpu.h"

/* On tensor cores; p->one.bf16 is set. */
void mma_grouped(struct workers *w, const struct grouped_gemm *p);

/* Rows from i0 and columns from j0 on of a product of m rows over k, whose matrices begin so many elements behind those
 * of grouped_gemm.one. */
struct product_tile {
    int64_t i0, j0, m, k, a, b, c;
};

/* Tile `down` of all groups' rows, by whole warps: lanes count the tiles of 32 groups at a time. */
static __device__ inline bool find_rows(const struct grouped_gemm &p, int tile, int64_t down, struct product_tile *t)
{
    int lane = (int)threadIdx.x % WARP;
    for (int64_t first = 0; first < p.groups; first += WARP) {
        int64_t e = first + lane;
        int begin = e < p.groups ? p.offset[e] : 0, rows = e < p.groups ? p.offset[e + 1] - begin : 0;
        int tiles = (rows + tile - 1) / tile, end = tiles; /* of this group's tiles among those of the 32 */
        for (int step = 1; step < WARP; step *= 2) {
            int before = __shfl_sync(0xffffffffu, end, lane - step);
            end += lane >= step ? before : 0;
        }
        unsigned behind = __ballot_sync(0xffffffffu, end > down);
        if (behind) {
            int at = __ffs((int)behind) - 1;
            t->i0 = (down - __shfl_sync(0xffffffffu, end - tiles, at)) * tile;
            t->m = __shfl_sync(0xffffffffu, rows, at);
            begin = __shfl_sync(0xffffffffu, begin, at);
            t->a = begin * p.one.lda;
            t->b = (first + at) * p.step;
            t->c = begin * p.one.ldc;
            return true;
        }
        down -= __shfl_sync(0xffffffffu, end, WARP - 1);
    }
    return false;
}

/* The block's tile, neighbouring blocks along a row of them; false: there is nothing to do. */
static __device__ inline bool find_product(const struct grouped_gemm &p, int tile, struct product_tile *t)
{
    int64_t across = (p.one.n + tile - 1) / tile, down = blockIdx.x / across, tiles = (p.one.m + tile - 1) / tile;
    *t = { down * tile, blockIdx.x % across * tile, p.one.m, p.one.k, 0, 0, 0 };
    if (!p.offset)
        return true;
    if (!p.along_k)
        return find_rows(p, tile, down, t);
    int64_t e = down / tiles, begin = p.offset[e];
    t->i0 = down % tiles * tile;
    t->k = p.offset[e + 1] - begin;
    t->a = begin * p.one.lda;
    t->b = begin * p.one.ldb;
    t->c = e * p.step;
    return t->k > 0 || !p.one.add;
}

/* Blocks for all tiles, however rows are divided among groups. */
static inline unsigned product_blocks(const struct grouped_gemm *p, int tile)
{
    int64_t m = p->one.m, down = (m + tile - 1) / tile;
    if (p->offset && p->along_k)
        down *= p->groups;
    else if (p->offset)
        down = m / tile + (m < p->groups ? m : p->groups);
    return (unsigned)(down * ((p->one.n + tile - 1) / tile));
}

#endif
