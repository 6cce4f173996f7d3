#include "trainer/bench/ceiling.h"

#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

static int64_t widest(const struct ceiling *c)
{
    int64_t most = 0;
    for (int i = 0; i < c->m->params.count; i++) {
        const struct tensor *w = &c->m->params.p[i].value;
        for (int d = 0; d < w->ndim; d++)
            most = w->dim[d] > most ? w->dim[d] : most;
    }
    return most;
}

status *ceiling_open(struct ceiling *c)
{
    size_t elems = (size_t)(c->tokens * widest(c));
    c->x = mem_calloc(elems, sizeof *c->x);
    c->y = mem_calloc(elems, sizeof *c->y);
    c->dx = mem_calloc(elems, sizeof *c->dx);
    for (size_t i = 0; c->x && c->y && i < elems; i++)
        c->x[i] = c->y[i] = (float)(i % 7) * 0x1p-10f;
    return c->x && c->y && c->dx ? NULL : ERR(NO_MEMORY, "activations of %lld tokens", (long long)c->tokens);
}

void ceiling_close(struct ceiling *c)
{
    mem_free(c->x);
    mem_free(c->y);
    mem_free(c->dx);
}

/* y = x w^T, dx += dy w, dw += dy^T x. */
static void products(struct ceiling *c, const struct tensor *w)
{
    int64_t n = c->tokens, k = w->dim[1], m = w->dim[0];
    struct gemm y = { n, m, k, .a = c->x, .lda = k, .b = w->data, .b_dtype = w->dtype, .ldb = k, .c = c->y, .ldc = m };
    struct gemm dx = { n, k, m, .a = c->y, .lda = m, .b = w->data, .b_dtype = w->dtype, .ldb = k, .c = c->dx };
    struct gemm dw = { m, k, n, .a = c->y, .lda = m, .b = c->x, .b_dtype = DTYPE_F32, .ldb = k, .c = w->grad };
    dx.ldc = dw.ldc = k;
    dx.add = dw.add = true;
    y.b_trans = dw.a_trans = true;
    y.bf16 = dx.bf16 = dw.bf16 = c->bf16;
    kernels_cpu.gemm(c->workers, &y);
    kernels_cpu.gemm(c->workers, &dx);
    kernels_cpu.gemm(c->workers, &dw);
}

void ceiling_run(struct ceiling *c)
{
    struct params *ps = &c->m->params;
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].linear && !ps->p[i].experts)
            products(c, &ps->p[i].value);
    products(c, c->m->ops->head(c->m));
    adamw_update(c->workers, ps->data, ps->grad, c->moment, c->v, ps->total, 0, 0.9, 0.95, 1e-8, 0.1, 1, 1);
}
