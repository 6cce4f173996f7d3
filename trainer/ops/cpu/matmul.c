/* matmul: the GEMM. Each output is ONE chain of fused multiply-adds over k (kernels.h says in which order), so no bit
 * depends on rows, threads, tiles, column cuts or the instruction set, and a scalar fmaf loop gives the same bits.
 *
 * C is cut into tiles, one task each. A task walks k in blocks. For each it packs its rows of A into panels of eight
 * (they stay in L2), then, 32 columns at a time, a panel of B, and runs the micro-kernel over the pairs. An element of
 * a panel is an f32, or two values of bf16 that follow each other along k. Accumulators live in a buffer of the task
 * between blocks: storing and reloading an f32 is exact, so it is still one chain. All buffers are on the task's stack;
 * nothing is allocated. */
#include "trainer/ops/cpu/cpu.h"

#include <string.h>

/* KC: panel elements of a block; MC, NC: most rows and columns of a tile; STRIP: panel elements that are turned from
 * columns into rows, or back, at a time. */
enum { KC = 256, MC = 256, NC = 512, STRIP = 16 };

struct job {
    const struct gemm *g;
    const struct isa *isa;
    int64_t rows, cols; /* of a tile */
    int64_t across;     /* tiles in a row */
};

/* rows x cols of bf16 to f32. */
static void widen_block(float *dst, int64_t dst_ld, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            dst[i * dst_ld + j] = bf16_to_f32(src[i * ld + j]);
}

/* Panel elements of k values. */
static int64_t units(const struct gemm *g, int64_t k)
{
    return g->bf16 ? (k + 1) / 2 : k;
}

/* A panel of `count` rows: src is [count, k]. */
static void pack_rows(const struct job *t, float *dst, int width, const float *src, int64_t ld, int64_t count,
                      int64_t k)
{
    float pair[PANEL_N * 4 * STRIP];
    if (!t->g->bf16) {
        t->isa->transpose(dst, width, src, ld, count, k);
        return;
    }
    for (int64_t p = 0; p < k; p += 8 * STRIP) {
        int64_t n = min64(8 * STRIP, k - p);
        for (int64_t r = 0; r < count; r++)
            t->isa->pairs(pair + r * 4 * STRIP, src + r * ld + p, n);
        t->isa->transpose(dst + p / 2 * width, width, pair, 4 * STRIP, count, (n + 1) / 2);
    }
}

/* Panel element p of `count` columns: src is [k, count]. */
static void pair_columns(const struct job *t, float *dst, const float *src, int64_t ld, int64_t count, int64_t k,
                         int64_t p)
{
    const float *row = src + 2 * p * ld;
    t->isa->pairs_across(dst, row, 2 * p + 1 < k ? row + ld : NULL, count);
}

/* A panel of B's columns, which are contiguous. */
static void pack_columns(const struct job *t, float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    if (!t->g->bf16) {
        copy_panel(dst, PANEL_N, src, ld, count, k);
        return;
    }
    for (int64_t p = 0; p < units(t->g, k); p++, dst += PANEL_N) {
        pair_columns(t, dst, src, ld, count, k, p);
        memset(dst + count, 0, (size_t)(PANEL_N - count) * sizeof *dst);
    }
}

/* Columns [j, j + count) and k in [p, p + k) of B as one panel. */
static void pack_b(const struct job *t, float *dst, int64_t j, int64_t count, int64_t p, int64_t k)
{
    const struct gemm *g = t->g;
    int64_t at = g->b_trans ? j * g->ldb + p : p * g->ldb + j, ld = g->ldb;
    const float *src = NULL;
    float wide[PANEL_N * 2 * KC];
    if (g->b_dtype == DTYPE_BF16) {
        ld = g->b_trans ? 2 * KC : PANEL_N;
        widen_block(wide, ld, (const uint16_t *)g->b + at, g->ldb, g->b_trans ? count : k, g->b_trans ? k : count);
        src = wide;
    } else {
        src = (const float *)g->b + at;
    }
    if (g->b_trans)
        pack_rows(t, dst, PANEL_N, src, ld, count, k);
    else
        pack_columns(t, dst, src, ld, count, k);
}

/* Panels of A's rows, which lie across: src is [k, m]. Strip by strip, so that lines of it are read once. */
static void pack_a_across(const struct job *t, float *dst, const float *src, int64_t ld, int64_t m, int64_t k)
{
    float pair[STRIP * MC];
    int64_t depth = units(t->g, k);
    for (int64_t p = 0; p < depth; p += STRIP) {
        int64_t n = min64(STRIP, depth - p), from_ld = t->g->bf16 ? MC : ld;
        for (int64_t q = 0; t->g->bf16 && q < n; q++)
            pair_columns(t, pair + q * MC, src, ld, m, k, p + q);
        const float *from = t->g->bf16 ? pair : src + p * ld;
        for (int64_t i = 0; i < m; i += PANEL_M)
            copy_panel(dst + i * depth + p * PANEL_M, PANEL_M, from + i, from_ld, min64(PANEL_M, m - i), n);
    }
}

/* Rows [i, i + m) and k in [p, p + k) of A as panels. */
static void pack_a(const struct job *t, float *dst, int64_t i, int64_t m, int64_t p, int64_t k)
{
    const struct gemm *g = t->g;
    if (g->a_trans) {
        pack_a_across(t, dst, g->a + p * g->lda + i, g->lda, m, k);
        return;
    }
    for (int64_t r = 0; r < m; r += PANEL_M)
        pack_rows(t, dst + r * units(g, k), PANEL_M, g->a + (i + r) * g->lda + p, g->lda, min64(PANEL_M, m - r), k);
}

/* The finished chains of a tile go to C. */
static void finish(const struct job *t, const float *acc, int64_t ld, int64_t i0, int64_t m, int64_t j0, int64_t n)
{
    const struct gemm *g = t->g;
    for (int64_t i = 0; i < m; i++) {
        float *c = g->c + (i0 + i) * g->ldc + j0;
        const float *from = acc + i * ld;
        if (g->add)
            t->isa->add(c, c, from, n);
        else if (g->bias)
            t->isa->add(c, from, g->bias + j0, n);
        else
            memcpy(c, from, (size_t)n * sizeof(float));
    }
}

static int64_t padded(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

static void run_tile(void *arg, size_t index)
{
    const struct job *t = arg;
    const struct gemm *g = t->g;
    int64_t i0 = (int64_t)index / t->across * t->rows, j0 = (int64_t)index % t->across * t->cols;
    int64_t m = min64(t->rows, g->m - i0), n = min64(t->cols, g->n - j0), ld = padded(n, PANEL_N);
    float acc[MC * NC] __attribute__((aligned(64)));
    float rows[MC * KC] __attribute__((aligned(64)));
    float columns[KC * PANEL_N] __attribute__((aligned(64)));
    if (g->k == 0)
        memset(acc, 0, (size_t)(m * ld) * sizeof *acc);
    for (int64_t p = 0, step = g->bf16 ? 2 * KC : KC; p < g->k; p += step) {
        int64_t k = min64(step, g->k - p), depth = units(g, k);
        pack_a(t, rows, i0, m, p, k);
        for (int64_t j = 0; j < n; j += PANEL_N) {
            pack_b(t, columns, j0 + j, min64(PANEL_N, n - j), p, k);
            for (int64_t i = 0; i < m; i += PANEL_M)
                (g->bf16 ? t->isa->micro_bf16 : t->isa->micro)(depth, (int)min64(PANEL_M, m - i), rows + i * depth,
                                                               columns, acc + i * ld + j, ld, p > 0);
        }
    }
    finish(t, acc, ld, i0, m, j0, n);
}

/* Tiles: two a thread at least, if there is that much to do, and so that least is packed: A once a column of tiles, B
 * once a row of them. */
static void cut_tiles(struct job *t, int64_t threads)
{
    const struct gemm *g = t->g;
    int64_t wanted = threads > 1 ? 2 * threads : 1, first = (g->m + MC - 1) / MC, best = INT64_MAX;
    for (int64_t down = first; down < first + wanted; down++) {
        int64_t across = (g->n + NC - 1) / NC;
        across = across * down < wanted ? (wanted + down - 1) / down : across;
        int64_t packed = across * g->m + down * g->n;
        if (packed >= best)
            continue;
        best = packed;
        t->rows = padded((g->m + down - 1) / down, PANEL_M);
        t->cols = padded((g->n + across - 1) / across, PANEL_N);
    }
    t->across = (g->n + t->cols - 1) / t->cols;
}

void gemm_with(const struct isa *isa, struct workers *w, const struct gemm *g)
{
    struct job t = { g, isa, 0, 0, 0 };
    if (g->m < 1 || g->n < 1)
        return;
    cut_tiles(&t, workers_count(w));
    workers_for(w, task_count(g->m, t.rows) * (size_t)t.across, run_tile, &t);
}

void cpu_gemm(struct workers *w, const struct gemm *g)
{
    gemm_with(isa_best(), w, g);
}

/* ---- several products ---- */

struct jobs {
    const struct gemm *g;
    const struct isa *isa;
    int64_t cols;
};

static size_t tiles_of(const struct gemm *g, int64_t cols)
{
    return task_count(g->m, MC) * task_count(g->n, cols);
}

static size_t all_tiles(const struct gemm *g, size_t count, int64_t cols)
{
    size_t n = 0;
    for (size_t i = 0; i < count; i++)
        n += tiles_of(&g[i], cols);
    return n;
}

static void run_one_of(void *arg, size_t index)
{
    const struct jobs *all = arg;
    const struct gemm *g = all->g;
    for (size_t n; index >= (n = tiles_of(g, all->cols)); g++)
        index -= n;
    struct job t = { g, all->isa, MC, all->cols, (int64_t)task_count(g->n, all->cols) };
    run_tile(&t, index);
}

void cpu_gemms(struct workers *w, const struct gemm *g, size_t count)
{
    struct jobs all = { g, isa_best(), NC };
    size_t threads = (size_t)workers_count(w);
    while (threads > 1 && all.cols > PANEL_N && all_tiles(g, count, all.cols) < 2 * threads)
        all.cols /= 2;
    workers_for(w, all_tiles(g, count, all.cols), run_one_of, &all);
}

/* ---- column sums of dy ---- */

struct bias_job {
    float *db;
    const float *dy;
    int64_t n, m;
};

enum { BIAS_COLS = 64 };

static void bias_columns(void *arg, size_t index)
{
    const struct bias_job *t = arg;
    int64_t j0 = (int64_t)index * BIAS_COLS, cols = min64(BIAS_COLS, t->m - j0);
    float sum[BIAS_COLS] = { 0 };
    for (int64_t i = 0; i < t->n; i++)
        for (int64_t j = 0; j < cols; j++)
            sum[j] += t->dy[i * t->m + j0 + j];
    for (int64_t j = 0; j < cols; j++)
        t->db[j0 + j] += sum[j];
}

void cpu_bias_bwd(struct workers *w, float *db, const float *dy, int64_t n, int64_t m)
{
    workers_for(w, task_count(m, BIAS_COLS), bias_columns, &(struct bias_job){ db, dy, n, m });
}
