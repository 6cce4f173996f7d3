/* cuda_emu_lt: what trainer/ops/cuda/lt.cu is on a GPU: the product as cuBLASLt defines it, column-major, in plain
 * loops. Asks for leading dimensions that cover the rows, and has no algorithm for products of three columns. */
#include "trainer/ops/cuda/gpu.h"

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

static double element(const struct lt_call *c, const void *p, bool trans, int64_t ld, int64_t row, int64_t col)
{
    int64_t at = trans ? row * ld + col : col * ld + row; /* element (row, col) of what is used */
    return c->bf16 ? (double)wide(static_cast<const uint16_t *>(p)[at]) : (double)static_cast<const float *>(p)[at];
}

bool lt_matmul(struct workers *w, const struct lt_call *c)
{
    if (c->m == 3)
        return false;
    if (c->lda < (c->a_trans ? c->k : c->m) || c->ldb < (c->b_trans ? c->n : c->k) || c->ldc < c->m)
        w->error = status_first(w->error, ERR(INTERNAL, "a leading dimension is too small"));
    if ((c->beta != 0 && c->beta != 1) || (c->bias && c->beta != 0))
        w->error = status_first(w->error, ERR(INTERNAL, "a beta of %g", (double)c->beta));
    for (int64_t j = 0; j < c->n && !w->error; j++)
        for (int64_t i = 0; i < c->m; i++) {
            double sum = 0;
            for (int64_t k = 0; k < c->k; k++)
                sum += element(c, c->a, c->a_trans, c->lda, i, k) * element(c, c->b, c->b_trans, c->ldb, k, j);
            float *to = c->c + j * c->ldc + i;
            *to = (float)sum + (c->bias ? c->bias[i] : 0.0f) + (c->beta != 0 ? *to : 0.0f);
        }
    return true;
}
