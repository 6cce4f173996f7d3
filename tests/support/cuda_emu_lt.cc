/* cuda_emu_lt: what trainer/ops/cuda/lt.cu is on a GPU: the product as cuBLASLt defines it, column-major, sums in
 * f64. Asks for leading dimensions that cover the rows, and has no algorithm for products of three columns. */
#include "trainer/ops/cuda/gpu.h"

#include <vector>

struct lt {
    int unused;
};

static struct lt the_one;

status *lt_open(struct workers *, struct lt **out)
{
    *out = &the_one;
    return NULL;
}

void lt_close(struct lt *)
{
}

static float value(bool low, const void *p, int64_t at)
{
    return low ? wide(static_cast<const uint16_t *>(p)[at]) : static_cast<const float *>(p)[at];
}

/* Element (row, col) of what is used. */
static double element(bool bf16, const void *p, bool trans, int64_t ld, int64_t row, int64_t col)
{
    int64_t at = trans ? row * ld + col : col * ld + row;
    return bf16 ? (double)wide(static_cast<const uint16_t *>(p)[at]) : (double)static_cast<const float *>(p)[at];
}

static void multiply(const struct lt_call &c)
{
    size_t m = (size_t)c.m;
    std::vector<double> a(m * (size_t)c.k), sum(m);
    for (int64_t k = 0; k < c.k; k++)
        for (int64_t i = 0; i < c.m; i++)
            a[(size_t)(k * c.m + i)] = element(c.bf16, c.a, c.a_trans, c.lda, i, k);
    for (int64_t j = 0; j < c.n; j++) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t k = 0; k < c.k; k++) {
            const double *column = &a[(size_t)k * m];
            double b = element(c.bf16, c.b, c.b_trans, c.ldb, k, j);
            for (size_t i = 0; i < m; i++)
                sum[i] += column[i] * b;
        }
        for (size_t i = 0; i < m; i++) {
            int64_t at = j * c.ldc + (int64_t)i;
            float y = (float)sum[i] + (c.bias ? value(c.c_low, c.bias, (int64_t)i) : 0.0f);
            y += c.beta != 0 ? value(c.c_low, c.from, at) : 0.0f;
            if (c.c_low)
                static_cast<uint16_t *>(c.c)[at] = (uint16_t)narrow_two(y, 0.0f);
            else
                static_cast<float *>(c.c)[at] = y;
        }
    }
}

bool lt_matmul(struct workers *w, const struct lt_call *c)
{
    if (c->m == 3)
        return false;
    if (c->lda < (c->a_trans ? c->k : c->m) || c->ldb < (c->b_trans ? c->n : c->k) || c->ldc < c->m)
        w->error = status_first(w->error, ERR(INTERNAL, "a leading dimension is too small"));
    if (c->c_low && !c->bf16)
        w->error = status_first(w->error, ERR(INTERNAL, "a bf16 result of f32 factors"));
    if ((c->beta != 0 && c->beta != 1) || (c->bias && c->beta != 0))
        w->error = status_first(w->error, ERR(INTERNAL, "a beta of %g", (double)c->beta));
    struct lt_call call = *c;
    if (!w->error)
        emu_queue(w->stream, [=] { multiply(call); });
    return true;
}
