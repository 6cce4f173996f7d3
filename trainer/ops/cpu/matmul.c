/* matmul: the GEMM. Each output is ONE chain of fused multiply-adds over k (kernels.h says in which order), so no bit
 * depends on rows, threads, tiles, column cuts or the instruction set, and a scalar fmaf loop gives the same bits.
 *
 * C is cut into tiles, one task each. A task walks k in blocks. For each it packs its rows of A into panels of eight
 * (they stay in L2), then, 32 columns at a time, a panel of B, and runs the micro-kernel over the pairs. An element of
 * a panel is an f32, or two values of bf16 that follow each other along k. Accumulators live in a buffer of the task
 * between blocks: storing and reloading an f32 is exact, so it is still one chain; behind the last block they go to C
 * at once. While the micro-kernel runs, the next panel of B and what it adds to of C are fetched from memory. All
 * buffers are on the task's stack; nothing is allocated. */
#include "trainer/ops/cpu/cpu.h"

#include <string.h>

/* KC: panel elements of a block; MC, NC: most rows and columns of a tile; STRIP: panel elements that are turned from
 * columns into rows, or back, at a time. */
enum { KC = 256, MC = 256, NC = 512, STRIP = 16, LINE = 64 };

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
    if (!t->g->bf16 || t->isa->transpose_pairs) {
        (t->g->bf16 ? t->isa->transpose_pairs : t->isa->transpose)(dst, width, src, ld, count, k);
        return;
    }
    for (int64_t p = 0; p < k; p += 8 * STRIP) {
        int64_t n = min64(8 * STRIP, k - p);
        for (int64_t r = 0; r < count; r++)
            t->isa->pairs(pair + r * 4 * STRIP, src + r * ld + p, n);
        t->isa->transpose(dst + p / 2 * width, width, pair, 4 * STRIP, count, (n + 1) / 2);
    }
}

/* A panel of B's columns, which are contiguous. */
static void pack_columns(const struct job *t, float *dst, const float *src, int64_t ld, int64_t count, int64_t k)
{
    if (!t->g->bf16) {
        copy_panel(dst, PANEL_N, src, ld, count, k);
        return;
    }
    t->isa->pairs_across(dst, PANEL_N, src, ld, count, k);
    for (int64_t p = 0; count < PANEL_N && p < units(t->g, k); p++)
        memset(dst + p * PANEL_N + count, 0, (size_t)(PANEL_N - count) * sizeof *dst);
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
        if (t->g->bf16)
            t->isa->pairs_across(pair, MC, src + 2 * p * ld, ld, m, min64(2 * n, k - 2 * p));
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
        pack_a_across(t, dst, (const float *)g->a + p * g->lda + i, g->lda, m, k);
        return;
    }
    for (int64_t r = 0; r < m; r += PANEL_M)
        pack_rows(t, dst + r * units(g, k), PANEL_M, (const float *)g->a + (i + r) * g->lda + p, g->lda,
                  min64(PANEL_M, m - r), k);
}

/* Finished chains [rows, cols] go to C. */
static void finish(const struct job *t, const float *acc, int64_t ld, int64_t i0, int64_t rows, int64_t j0,
                   int64_t cols)
{
    const struct gemm *g = t->g;
    float *c = (float *)g->c + i0 * g->ldc + j0;
    if (g->add)
        t->isa->add_rows(c, g->ldc, c, g->ldc, acc, ld, rows, cols);
    else if (g->bias)
        t->isa->add_rows(c, g->ldc, acc, ld, g->bias + j0, 0, rows, cols);
    else
        for (int64_t i = 0; i < rows; i++)
            memcpy(c + i * g->ldc, acc + i * ld, (size_t)cols * sizeof *c);
}

/* Rows of a matrix that will be read soon. */
struct soon {
    const char *at;
    size_t ld, bytes;
    int64_t rows;
};

/* The panel of B behind the one of columns [j, j + PANEL_N) and k in [p, p + k), if it is in the same tile. */
static struct soon next_of_b(const struct gemm *g, int64_t j, int64_t end, int64_t p, int64_t k)
{
    size_t elem = g->b_dtype == DTYPE_BF16 ? 2 : 4;
    int64_t count = min64(PANEL_N, end - j - PANEL_N),
            at = g->b_trans ? (j + PANEL_N) * g->ldb + p : p * g->ldb + j + PANEL_N;
    if (count <= 0)
        return (struct soon){ 0 };
    return (struct soon){ (const char *)g->b + (size_t)at * elem, (size_t)g->ldb * elem,
                          (size_t)(g->b_trans ? k : count) * elem, g->b_trans ? count : k };
}

/* Fetch part i of n into the second cache. */
static void fetch(const struct soon *s, int64_t i, int64_t n)
{
    for (int64_t r = s->rows * i / n; r < s->rows * (i + 1) / n; r++)
        for (size_t at = 0; at < s->bytes; at += LINE)
            __builtin_prefetch(s->at + (size_t)r * s->ld + at, 0, 2);
}

static void fetch_c(const struct gemm *g, int64_t i, int64_t rows, int64_t j)
{
    for (int64_t r = i; g->add && r < i + rows; r++)
        for (int64_t at = 0; at < PANEL_N; at += LINE / (int64_t)sizeof(float))
            __builtin_prefetch((const float *)g->c + r * g->ldc + min64(j + at, g->n - 1), 1, 2);
}

static int64_t padded(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

/* Rows and columns of C that are done by one task. */
struct tile {
    int64_t i, m, j, n;
};

/* One block of k: [p, p + k). acc: the tile's chains, or if there is no other block, room for those of two panels. */
static void run_block(const struct job *t, const struct tile *c, int64_t p, int64_t k, float *acc)
{
    const struct gemm *g = t->g;
    float rows[MC * KC] __attribute__((aligned(64)));
    float columns[KC * PANEL_N] __attribute__((aligned(64)));
    bool last = p + k == g->k, only = k == g->k;
    int64_t depth = units(g, k), ld = only ? PANEL_N : padded(c->n, PANEL_N);
    pack_a(t, rows, c->i, c->m, p, k);
    for (int64_t j = 0; j < c->n; j += PANEL_N) {
        struct soon next = next_of_b(g, c->j + j, c->j + c->n, p, k);
        pack_b(t, columns, c->j + j, min64(PANEL_N, c->n - j), p, k);
        for (int64_t i = 0; i < c->m; i += PANEL_M) {
            int64_t m = min64(PANEL_M, c->m - i);
            float *at = only ? acc : acc + i * ld + j;
            fetch(&next, i / PANEL_M, (c->m + PANEL_M - 1) / PANEL_M);
            if (last)
                fetch_c(g, c->i + i, m, c->j + j);
            (g->bf16 ? t->isa->micro_bf16 : t->isa->micro)(depth, (int)m, rows + i * depth, columns, at, ld, p > 0);
            if (last)
                finish(t, at, ld, c->i + i, m, c->j + j, min64(PANEL_N, c->n - j));
        }
    }
}

static void run_tile(void *arg, size_t index)
{
    const struct job *t = arg;
    const struct gemm *g = t->g;
    int64_t i = (int64_t)index / t->across * t->rows, j = (int64_t)index % t->across * t->cols;
    struct tile c = { i, min64(t->rows, g->m - i), j, min64(t->cols, g->n - j) };
    float acc[MC * NC] __attribute__((aligned(64)));
    if (g->k == 0) {
        memset(acc, 0, (size_t)(c.m * c.n) * sizeof *acc);
        finish(t, acc, c.n, c.i, c.m, c.j, c.n);
    }
    for (int64_t p = 0, step = g->bf16 ? 2 * KC : KC; p < g->k; p += step)
        run_block(t, &c, p, min64(step, g->k - p), acc);
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

static struct gemm of_group(const struct grouped_gemm *p, int64_t e)
{
    struct gemm g = p->one;
    int64_t begin = p->offset[e], rows = p->offset[e + 1] - begin;
    if (p->along_k) {
        g.k = rows;
        g.a = (const float *)g.a + begin * g.lda;
        g.b = (const float *)g.b + begin * g.ldb; /* is f32 on the CPU */
        g.c = (float *)g.c + e * p->step;
    } else {
        g.m = rows;
        g.a = (const float *)g.a + begin * g.lda;
        g.b = (const unsigned char *)g.b + (size_t)(e * p->step) * dtype_bytes(g.b_dtype);
        g.c = (float *)g.c + begin * g.ldc;
    }
    return g;
}

void cpu_grouped(struct workers *w, const struct grouped_gemm *p)
{
    struct jobs all = { p->room, isa_best(), NC };
    size_t threads = (size_t)workers_count(w), count = 0;
    for (int64_t e = 0; e < p->groups; e++)
        if (p->offset[e + 1] > p->offset[e] || (p->along_k && !p->one.add))
            p->room[count++] = of_group(p, e);
    while (threads > 1 && all.cols > PANEL_N && all_tiles(p->room, count, all.cols) < 2 * threads)
        all.cols /= 2;
    workers_for(w, all_tiles(p->room, count, all.cols), run_one_of, &all);
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

void cpu_bias_bwd(struct workers *w, float *db, struct array dy, int64_t n, int64_t m)
{
    workers_for(w, task_count(m, BIAS_COLS), bias_columns, &(struct bias_job){ db, dy.at, n, m });
}
