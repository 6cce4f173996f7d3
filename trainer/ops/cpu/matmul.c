/* matmul: the f32 GEMM. Each output is ONE chain of fused multiply-adds over k ascending, so no bit depends on rows,
 * threads, tiles, column cuts or the instruction set, and a scalar fmaf loop gives the same bits.
 *
 * C is cut into tiles, one task each. A task walks k in blocks of KC. For each it packs its columns of B into panels
 * (they stay in L2), then, eight rows at a time, a panel of A (stays in L1), and runs the micro-kernel over the pairs.
 * Accumulators live in a buffer of the task between k-blocks: storing and reloading an f32 is exact, so it is still one
 * chain. All buffers are on the task's stack; nothing is allocated. */
#include "trainer/ops/cpu/cpu.h"

#include <string.h>

enum { KC = 256, MC = 128, NC = 256 };

struct job {
    const struct gemm *g;
    const struct isa *isa;
    int64_t rows, cols; /* of a tile */
    int64_t across;     /* tiles in a row */
};

/* rows x cols of bf16 to f32, into rows of KC or PANEL_N floats. */
static void widen_block(float *dst, int64_t dst_ld, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            dst[i * dst_ld + j] = bf16_to_f32(src[i * ld + j]);
}

/* Columns [j, j + count) and k in [p, p + k) of B as one panel. */
static void pack_b(const struct job *t, float *dst, int64_t j, int64_t count, int64_t p, int64_t k)
{
    const struct gemm *g = t->g;
    int64_t at = g->b_trans ? j * g->ldb + p : p * g->ldb + j, ld = g->ldb;
    const float *src = NULL;
    float wide[PANEL_N * KC];
    if (g->b_dtype == DTYPE_BF16) {
        ld = g->b_trans ? KC : PANEL_N;
        widen_block(wide, ld, (const uint16_t *)g->b + at, g->ldb, g->b_trans ? count : k, g->b_trans ? k : count);
        src = wide;
    } else {
        src = (const float *)g->b + at;
    }
    if (g->b_trans)
        t->isa->transpose(dst, PANEL_N, src, ld, count, k);
    else
        copy_panel(dst, PANEL_N, src, ld, count, k);
}

static void pack_a(const struct job *t, float *dst, int64_t i, int64_t count, int64_t p, int64_t k)
{
    const struct gemm *g = t->g;
    if (g->a_trans)
        copy_panel(dst, PANEL_M, g->a + p * g->lda + i, g->lda, count, k);
    else
        t->isa->transpose(dst, PANEL_M, g->a + i * g->lda + p, g->lda, count, k);
}

/* The finished chains of a tile go to C. */
static void finish(const struct job *t, const float *acc, int64_t i0, int64_t m, int64_t j0, int64_t n)
{
    const struct gemm *g = t->g;
    for (int64_t i = 0; i < m; i++) {
        float *c = g->c + (i0 + i) * g->ldc + j0;
        const float *from = acc + i * NC;
        if (g->add)
            t->isa->add(c, c, from, n);
        else if (g->bias)
            t->isa->add(c, from, g->bias + j0, n);
        else
            memcpy(c, from, (size_t)n * sizeof(float));
    }
}

static void run_tile(void *arg, size_t index)
{
    const struct job *t = arg;
    const struct gemm *g = t->g;
    int64_t i0 = (int64_t)index / t->across * t->rows, j0 = (int64_t)index % t->across * t->cols;
    int64_t m = min64(t->rows, g->m - i0), n = min64(t->cols, g->n - j0);
    float acc[MC * NC] __attribute__((aligned(64)));
    float panels[KC * NC] __attribute__((aligned(64)));
    float rows[KC * PANEL_M] __attribute__((aligned(64)));
    if (g->k == 0)
        memset(acc, 0, sizeof acc);
    for (int64_t p = 0; p < g->k; p += KC) {
        int64_t k = min64(KC, g->k - p);
        for (int64_t j = 0; j < n; j += PANEL_N)
            pack_b(t, panels + j * k, j0 + j, min64(PANEL_N, n - j), p, k);
        for (int64_t i = 0; i < m; i += PANEL_M) {
            int64_t count = min64(PANEL_M, m - i);
            pack_a(t, rows, i0 + i, count, p, k);
            for (int64_t j = 0; j < n; j += PANEL_N)
                t->isa->micro(k, (int)count, rows, panels + j * k, acc + i * NC + j, NC, p > 0);
        }
    }
    finish(t, acc, i0, m, j0, n);
}

void gemm_with(const struct isa *isa, struct workers *w, const struct gemm *g)
{
    struct job t = { g, isa, MC, NC, 0 };
    size_t threads = (size_t)workers_count(w);
    /* Narrower tiles until every thread has something to do. */
    while (threads > 1 && t.cols > PANEL_N && task_count(g->m, t.rows) * task_count(g->n, t.cols) < 2 * threads)
        t.cols /= 2;
    t.across = (int64_t)task_count(g->n, t.cols);
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
