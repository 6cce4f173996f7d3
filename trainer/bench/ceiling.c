#include "trainer/bench/ceiling.h"

#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
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
    float **const all[] = { &c->x, &c->y, &c->dx };
    c->bytes = elems * sizeof(float);
    for (int i = 0; i < 3; i++) {
        void *p;
        TRY(compute_alloc(c->compute, c->bytes, &p));
        *all[i] = p;
    }
    float *some = mem_array(NULL, elems, sizeof *some);
    if (!some)
        return ERR(NO_MEMORY, "activations of %lld tokens", (long long)c->tokens);
    for (size_t i = 0; i < elems; i++)
        some[i] = (float)(i % 7) * 0x1p-10f;
    status *st = compute_put(c->compute, c->x, some, c->bytes);
    if (!st)
        st = compute_put(c->compute, c->y, some, c->bytes);
    mem_free(some);
    return st;
}

void ceiling_close(struct ceiling *c)
{
    compute_free(c->compute, c->x, c->bytes);
    compute_free(c->compute, c->y, c->bytes);
    compute_free(c->compute, c->dx, c->bytes);
    c->x = c->y = c->dx = NULL;
}

/* y = x w^T, dx += dy w, dw += dy^T x. */
static void products(struct ceiling *c, const struct tensor *w)
{
    int64_t n = c->tokens, in = w->dim[1], m = w->dim[0];
    struct gemm y = {
        n, m, in, .a = c->x, .lda = in, .b = w->data, .b_dtype = w->dtype, .ldb = in, .c = c->y, .ldc = m
    };
    struct gemm dx = { n, in, m, .a = c->y, .lda = m, .b = w->data, .b_dtype = w->dtype, .ldb = in, .c = c->dx };
    struct gemm dw = { m, in, n, .a = c->y, .lda = m, .b = c->x, .b_dtype = DTYPE_F32, .ldb = in, .c = w->grad };
    dx.ldc = dw.ldc = in;
    dx.add = dw.add = true;
    y.b_trans = dw.a_trans = true;
    y.bf16 = dx.bf16 = dw.bf16 = c->bf16;
    const struct kernels *k = c->compute->kernels;
    k->gemm(c->compute->workers, &y);
    k->gemm(c->compute->workers, &dx);
    k->gemm(c->compute->workers, &dw);
}

void ceiling_run(struct ceiling *c)
{
    struct params *ps = &c->m->params;
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].linear && !ps->p[i].experts)
            products(c, &ps->p[i].value);
    products(c, c->m->ops->head(c->m));
    const struct adamw_run all = { ps->data, ps->grad, c->moment, c->v, ps->total, 0.1 };
    const struct adamw_how how = { .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .step = 1, .grad_scale = 1 };
    c->compute->kernels->adamw(c->compute->workers, &all, 1, &how);
}
