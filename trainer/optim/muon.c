/* muon: see muon.h. Sums of products are the GEMM's chains, the norm is a tree of f64 sums: bits depend on the matrix
 * alone. */
#include "trainer/optim/muon.h"

#include "trainer/ops/flat.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <string.h>

enum { STEPS = 5, SEEN = 1024 };
static const float coefficient[3] = { 3.4445f, -4.7750f, 2.0315f };
static const double smallest_norm = 1e-7;

/* y = s y + r x, by kernels. */
static void mix_there(struct compute *c, float *y, float s, const float *x, float r, uint64_t n)
{
    c->kernels->scale(c->workers, y, y, s, (int64_t)n);
    c->kernels->axpy(c->workers, y, x, r, (int64_t)n);
}

void muon_momentum(const struct muon *o, struct compute *c, float *g, float *buffer, size_t n)
{
    float mu = (float)o->momentum, rest = (float)(1 - o->momentum), scale = (float)o->grad_scale;
    if (!compute_host(c)) {
        mix_there(c, buffer, mu, g, rest * scale, n);
        if (o->nesterov)
            mix_there(c, g, rest * scale, buffer, mu, n);
        else
            flat_copy(c, g, buffer, n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        float grad = scale * g[i];
        buffer[i] = mu * buffer[i] + rest * grad;
        g[i] = o->nesterov ? mu * buffer[i] + rest * grad : buffer[i];
    }
}

size_t muon_room(uint64_t rows, uint64_t cols)
{
    uint64_t less = rows < cols ? rows : cols;
    return 2 * rows * cols + 2 * less * less + (rows * cols + SUM_BLOCK - 1) / SUM_BLOCK * 2;
}

static void transpose(float *to, const float *from, uint64_t rows, uint64_t cols)
{
    for (uint64_t i = 0; i < rows; i++)
        for (uint64_t j = 0; j < cols; j++)
            to[j * rows + i] = from[i * cols + j];
}

/* C [m, n] = A [m, k] B [k, n], or B [n, k] transposed. */
static void multiply(struct workers *w, float *c, const float *a, const float *b, bool b_trans, uint64_t m, uint64_t n,
                     uint64_t k)
{
    kernels_cpu.gemm(w, &(struct gemm){ .m = (int64_t)m,
                                        .n = (int64_t)n,
                                        .k = (int64_t)k,
                                        .a = a,
                                        .lda = (int64_t)k,
                                        .b = b,
                                        .b_dtype = DTYPE_F32,
                                        .ldb = (int64_t)(b_trans ? k : n),
                                        .b_trans = b_trans,
                                        .c = c,
                                        .ldc = (int64_t)n });
}

/* y = s y + r x */
static void combine(float *y, float s, const float *x, float r, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        y[i] = s * y[i] + r * x[i];
}

/* C [m, n] = A [m, k] B [k, n], or of A [k, m] transposed, B [n, k] transposed; by kernels. */
static void multiply_there(struct compute *c, float *y, const float *a, bool a_trans, const float *b, bool b_trans,
                           uint64_t m, uint64_t n, uint64_t k)
{
    c->kernels->gemm(c->workers, &(struct gemm){ .m = (int64_t)m,
                                                 .n = (int64_t)n,
                                                 .k = (int64_t)k,
                                                 .a = a,
                                                 .lda = (int64_t)(a_trans ? m : k),
                                                 .a_trans = a_trans,
                                                 .b = b,
                                                 .b_dtype = DTYPE_F32,
                                                 .ldb = (int64_t)(b_trans ? k : n),
                                                 .b_trans = b_trans,
                                                 .c = y,
                                                 .ldc = (int64_t)n });
}

/* The same in place, without transposing: with M > K, A = X^T X multiplies from the right. */
static status *orthogonalise_there(struct compute *c, float *x, uint64_t rows, uint64_t cols, float *room)
{
    bool tall = rows > cols;
    uint64_t m = tall ? cols : rows, n = rows * cols, blocks = (n + SUM_BLOCK - 1) / SUM_BLOCK;
    double *sums = (double *)(void *)room, seen[SEEN], squares = 0;
    float *next = room + 2 * blocks, *gram = next + n, *square = gram + m * m;
    c->kernels->block_sums(c->workers, x, (int64_t)n, true, sums);
    for (uint64_t at = 0, some; at < blocks; at += some) {
        some = blocks - at < SEEN ? blocks - at : SEEN;
        TRY(compute_get(c, seen, sums + at, some * sizeof *seen));
        squares += tree_sum(seen, (int64_t)some);
    }
    c->kernels->scale(c->workers, x, x, (float)(1 / fmax(sqrt(squares), smallest_norm)), (int64_t)n);
    for (int i = 0; i < STEPS; i++) {
        multiply_there(c, gram, x, tall, x, !tall, m, m, tall ? rows : cols);
        multiply_there(c, square, gram, false, gram, false, m, m, m);
        mix_there(c, gram, coefficient[1], square, coefficient[2], m * m);
        if (tall)
            multiply_there(c, next, x, false, gram, false, rows, cols, m);
        else
            multiply_there(c, next, gram, false, x, false, rows, cols, m);
        mix_there(c, x, coefficient[0], next, 1, n);
    }
    return NULL;
}

status *muon_orthogonalise(struct compute *c, struct workers *w, float *u, uint64_t rows, uint64_t cols, float *room)
{
    if (!compute_host(c))
        return orthogonalise_there(c, u, rows, cols, room);
    uint64_t m = rows < cols ? rows : cols, k = rows < cols ? cols : rows, n = m * k,
             blocks = (n + SUM_BLOCK - 1) / SUM_BLOCK;
    double *sums = (double *)(void *)room;
    float *x = room + 2 * blocks, *next = x + n, *gram = next + n, *square = gram + m * m;
    block_sums(w, u, (int64_t)n, true, sums);
    double norm = sqrt(tree_sum(sums, (int64_t)blocks));
    if (rows > cols)
        transpose(x, u, rows, cols);
    else
        memcpy(x, u, n * sizeof *x);
    kernels_cpu.scale(w, x, x, (float)(1 / fmax(norm, smallest_norm)), (int64_t)n);
    for (int i = 0; i < STEPS; i++) {
        multiply(w, gram, x, x, true, m, m, k);
        multiply(w, square, gram, gram, false, m, m, m);
        combine(gram, coefficient[1], square, coefficient[2], m * m);
        multiply(w, next, gram, x, false, m, k, m);
        combine(x, coefficient[0], next, 1, n);
    }
    if (rows > cols)
        transpose(u, x, cols, rows);
    else
        memcpy(u, x, n * sizeof *u);
    return NULL;
}

void muon_apply(const struct muon *o, struct compute *c, float *w, const float *orthogonal, size_t n, uint64_t rows,
                uint64_t cols)
{
    double m = (double)rows, k = (double)cols;
    double scale = o->scale == MUON_ORIGINAL ? sqrt(fmax(1, m / k)) : 0.2 * sqrt(fmax(m, k));
    float keep = (float)(1 - o->lr * o->weight_decay), by = (float)(o->lr * scale);
    if (!compute_host(c)) {
        mix_there(c, w, keep, orthogonal, -by, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        w[i] = keep * w[i] - by * orthogonal[i];
}
