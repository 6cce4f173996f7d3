/* cuda_products: cases of products and log-probabilities; see test_cuda_kernels.c. */
#include "tests/trainer/cuda_cases.h"

/* ---- products ---- */

static void call_gemm(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    struct gemm g = *(const struct gemm *)arg;
    g.a = p[0];
    g.b = p[1];
    g.c = p[2];
    g.bias = g.bias ? p[3] : NULL;
    k->gemm(w, &g);
}

static void check_gemm(struct gemm g, int64_t pad, int which)
{
    struct run r = { .what = "gemm", .call = call_gemm, .arg = &g, .tolerance = 1e-5, .gemm = which };
    g.lda = (g.a_trans ? g.m : g.k) + pad;
    g.ldb = (g.b_trans ? g.k : g.n) + 2 * pad;
    g.ldc = g.n + pad;
    floats(&r, READ, (g.a_trans ? g.k : g.m) * g.lda);
    int64_t elems = (g.b_trans ? g.n : g.k) * g.ldb;
    if (g.b_dtype == DTYPE_BF16) {
        uint16_t *b = add_buffer(&r, READ, (size_t)elems * sizeof *b);
        for (int64_t i = 0; i < elems; i++)
            b[i] = bf16_from_f32(draw());
    } else {
        floats(&r, READ, elems);
    }
    floats(&r, CLOSE, g.m * g.ldc);
    floats(&r, READ, g.n);
    check_one(&r, pad > 0);
}

void test_gemm(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = { { 1, 1, 1 }, { 3, 5, 7 }, { 64, 64, 16 }, { 65, 130, 33 }, { 130, 3, 64 } };
    static const float some_bias = 0;
    for (size_t i = 0; i < 5; i++)
        for (int how = 0; how < 32; how++)
            for (int which = 0; which < 2; which++) {
                struct gemm g = { .m = sizes[i][0], .n = sizes[i][1], .k = sizes[i][2] };
                g.a_trans = how & 1;
                g.b_trans = how & 2;
                g.b_dtype = how & 4 ? DTYPE_BF16 : DTYPE_F32;
                g.bf16 = how & 8;
                g.add = how & 16;
                g.bias = !g.add && (how & 1) ? &some_bias : NULL;
                check_gemm(g, how % 3, which);
            }
    check_gemm((struct gemm){ .m = 5, .n = 70, .k = 0, .b_dtype = DTYPE_F32, .bias = &some_bias }, 1, LIBRARY);
    check_gemm((struct gemm){ .m = 5, .n = 70, .k = 0, .b_dtype = DTYPE_F32, .add = true }, 1, OWN);
}

/* Of factors that bf16 can hold, so that the CPU's product in bf16 is the same sum. */
static void call_gemm_low(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    struct gemm g = *(const struct gemm *)arg;
    int64_t a_all = (g.a_trans ? g.k : g.m) * g.lda, c_all = g.m * g.ldc;
    struct array a = array_begin(k, p[0], g.a_low, false, a_all), c = array_begin(k, p[2], g.c_low, false, c_all);
    bool a_low = g.a_low, c_low = g.c_low;
    g.a = a.at;
    g.a_low = a.low;
    g.b = p[1];
    g.c = c.at;
    g.c_low = c.low;
    g.bias = g.bias ? p[3] : NULL;
    g.from = g.from ? p[4] : NULL;
    if (k == &kernels_cpu && g.from) {
        for (int64_t i = 0; i < g.m; i++)
            memcpy((float *)g.c + i * g.ldc, g.from + i * g.ldc, (size_t)g.n * sizeof(float));
        g.from = NULL;
    }
    k->gemm(w, &g);
    array_done(k, p[0], a_low, a, a_all);
    array_done(k, p[2], c_low, c, c_all);
}

static void check_gemm_low(struct gemm g, int64_t pad, int which)
{
    struct run r = { .what = "gemm of bf16", .call = call_gemm_low, .arg = &g, .tolerance = 1e-4, .gemm = which };
    g.lda = (g.a_trans ? g.m : g.k) + pad;
    g.ldb = (g.b_trans ? g.k : g.n) + 2 * pad;
    g.ldc = g.n + pad;
    array_buffer(&r, READ, g.a_low, (g.a_trans ? g.k : g.m) * g.lda);
    array_buffer(&r, READ, g.b_dtype == DTYPE_BF16, (g.b_trans ? g.n : g.k) * g.ldb);
    array_buffer(&r, CLOSE, g.c_low, g.m * g.ldc);
    float *bias = floats(&r, READ, g.n);
    for (int64_t j = 0; j < g.n; j++)
        bias[j] = bf16_to_f32(bf16_from_f32(bias[j]));
    floats(&r, READ, g.m * g.ldc);
    check_one(&r, pad > 0);
}

void test_gemm_low(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = { { 1, 1, 1 },     { 3, 5, 7 },    { 64, 64, 16 },
                                        { 65, 130, 33 }, { 130, 3, 64 }, { 136, 129, 200 } };
    static const float some = 0;
    for (size_t i = 0; i < 6; i++)
        for (int how = 0; how < 64; how++)
            for (int which = 0; which < (i < 5 ? 2 : 1); which++) { /* the last one is for our own */
                struct gemm g = { .m = sizes[i][0], .n = sizes[i][1], .k = sizes[i][2], .bf16 = true };
                g.a_trans = how & 1;
                g.b_trans = how & 2;
                g.b_dtype = how & 4 ? DTYPE_BF16 : DTYPE_F32;
                g.a_low = how & 8;
                g.c_low = how & 16;
                g.add = how & 32;
                g.bias = !g.add && (how & 1) ? &some : NULL;
                g.from = g.add && !g.c_low && (how & 1) ? &some : NULL;
                check_gemm_low(g, how % 3, which);
            }
}

enum { GROUPS = 50 };

static int64_t a_elems(const struct grouped_gemm *p)
{
    return (p->one.a_trans ? p->one.k : p->one.m) * p->one.lda;
}

static int64_t b_elems(const struct grouped_gemm *p)
{
    int64_t one = (p->one.b_trans ? p->one.n : p->one.k) * p->one.ldb;
    return p->along_k ? one : p->groups * p->step;
}

static int64_t c_elems(const struct grouped_gemm *p)
{
    return p->along_k ? p->groups * p->step : p->one.m * p->one.ldc;
}

static void call_grouped(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    struct grouped_gemm g = *(const struct grouped_gemm *)arg;
    struct gemm room[GROUPS];
    bool a_low = g.one.a_low, b_low = g.one.b_dtype == DTYPE_BF16, c_low = g.one.c_low;
    struct array a = array_begin(k, p[0], a_low, false, a_elems(&g)),
                 b = array_begin(k, p[1], b_low, false, b_elems(&g)),
                 c = array_begin(k, p[2], c_low, false, c_elems(&g));
    g.one.a = a.at;
    g.one.a_low = a.low;
    g.one.b = b.at;
    g.one.b_dtype = b.low ? DTYPE_BF16 : DTYPE_F32;
    g.one.c = c.at;
    g.one.c_low = c.low;
    g.offset = p[3];
    g.room = room;
    k->grouped(w, &g);
    array_done(k, p[0], a_low, a, a_elems(&g));
    array_done(k, p[1], b_low, b, b_elems(&g));
    array_done(k, p[2], c_low, c, c_elems(&g));
}

/* kind: rows times matrices that are transposed, or not; matrices of rows. m and k are a matrix's. */
static void check_grouped(const int64_t *rows, int64_t groups, int64_t m, int64_t k, int kind, int how)
{
    int64_t all = 0;
    struct grouped_gemm p = { .groups = groups, .along_k = kind == 2, .step = m * k };
    for (int64_t e = 0; e < groups; e++)
        all += rows[e];
    p.one = kind == 0   ? (struct gemm){ .m = all, .n = m, .k = k, .lda = k, .ldb = k, .ldc = m, .b_trans = true }
            : kind == 1 ? (struct gemm){ .m = all, .n = k, .k = m, .lda = m, .ldb = k, .ldc = k }
                        : (struct gemm){ .m = m, .n = k, .k = all, .lda = m, .ldb = k, .ldc = k, .a_trans = true };
    p.one.bf16 = how > 0;
    p.one.add = how & 1;
    p.one.a_low = how & 2;
    p.one.b_dtype = how & 4 ? DTYPE_BF16 : DTYPE_F32;
    p.one.c_low = how & 8;
    struct run r = { .what = "grouped", .call = call_grouped, .arg = &p, .tolerance = 1e-4, .gemm = how % 2 };
    array_buffer(&r, READ, p.one.a_low, a_elems(&p));
    array_buffer(&r, READ, p.one.b_dtype == DTYPE_BF16, b_elems(&p));
    array_buffer(&r, CLOSE, p.one.c_low, c_elems(&p));
    int32_t *offset = ints(&r, groups + 1);
    for (int64_t e = 0; e < groups; e++)
        offset[e + 1] = offset[e] + (int32_t)rows[e];
    check_one(&r, how % 3 == 1);
}

void test_grouped(void **state)
{
    (void)state;
    static const int64_t alone[] = { 0, 0, 150, 0 }, none[3] = { 0 }, one[] = { 17 };
    int64_t mixed[GROUPS];
    for (int i = 0; i < GROUPS; i++)
        mixed[i] = i % 6 == 1 ? 0 : i == 3 ? 129 : i % 11 == 3 ? 70 : i % 4;
    for (int kind = 0; kind < 3; kind++)
        for (int how = 0; how < 16; how++) {
            check_grouped(alone, 4, 136, 72, kind, how);
            check_grouped(none, 3, 8, 16, kind, how);
            check_grouped(one, 1, 5, 40, kind, how);
            check_grouped(mixed, GROUPS, 9, 20, kind, how);
        }
}

/* ---- log-probabilities ---- */

struct scores {
    int64_t n, c, v, chunk, first, vocab;
    int parts;
    bool half, bf16, stats, keep;
};

enum { X, W, TARGET, LOGP, LSE_OF, STATS, DLOGP, DX, DW, LOGITS, ROWS, DROWS, INDEX, PART };

static void call_logprob(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct scores *s = arg;
    enum logprob_kept kept = LOGPROB_NOTHING;
    float *stats = p[STATS];
    struct logprob a = { .n = s->n,
                         .c = s->c,
                         .v = s->v,
                         .chunk = s->chunk,
                         .vocab = s->vocab,
                         .parts = s->parts,
                         .part = s->parts ? p[PART] : NULL,
                         .x = p[X],
                         .w_dtype = s->half ? DTYPE_BF16 : DTYPE_F32,
                         .target = p[TARGET],
                         .temperature = 1.3f,
                         .logp = p[LOGP],
                         .lse = p[LSE_OF],
                         .dlogp = p[DLOGP],
                         .rows = p[ROWS],
                         .drows = p[DROWS],
                         .logits = p[LOGITS],
                         .kept = s->keep ? &kept : NULL,
                         .bf16 = s->bf16,
                         .index = p[INDEX] };
    if (s->stats)
        a.stats = (struct logprob_stats){ stats, stats + s->n, stats + 2 * s->n, stats + 3 * s->n };
    for (int i = 0; i < (s->parts ? s->parts : 1); i++) {
        a.own = i;
        a.first = i * s->v;
        a.w = (const unsigned char *)p[W] + (size_t)(a.first * s->c) * (s->half ? 2 : 4);
        k->logprob(w, &a);
    }
    if (s->parts)
        k->logprob_merge(w, &a);
    for (int i = 0; i < (s->parts ? s->parts : 1); i++) { /* each part's share */
        a.own = i;
        a.first = i * s->v;
        a.w = (const unsigned char *)p[W] + (size_t)(a.first * s->c) * (s->half ? 2 : 4);
        a.dx = s->keep ? NULL : p[DX];
        a.dw = (float *)p[DW] + a.first * s->c;
        k->logprob_bwd(w, &a);
        a.dx = p[DX];
        a.dw = NULL;
        if (s->keep)
            k->logprob_bwd(w, &a);
    }
}

static void put_weight(void *weights, bool half, int64_t i, float x)
{
    if (half)
        ((uint16_t *)weights)[i] = bf16_from_f32(x);
    else
        ((float *)weights)[i] = x;
}

static void check_logprob(struct scores s, int which)
{
    struct run r = { .what = "logprob", .call = call_logprob, .arg = &s, .tolerance = 1e-5, .gemm = which };
    int64_t all = s.v * (s.parts ? s.parts : 1);
    s.vocab = all;
    const float *x = floats(&r, READ, s.n * s.c);
    void *weights = add_buffer(&r, READ, (size_t)(all * s.c) * (s.half ? 2 : 4));
    for (int64_t i = 0; i < all * s.c; i++)
        put_weight(weights, s.half, i, draw());
    for (int64_t i = 0; all > 1 && i < s.c; i++) { /* two equal rows, of which the first one is the last token's top */
        put_weight(weights, s.half, i, 2 * x[(s.n - 1) * s.c + i]);
        put_weight(weights, s.half, (all - 1) * s.c + i, 2 * x[(s.n - 1) * s.c + i]);
        put_weight(weights, s.half, all * 5 / 6 * s.c + i, 2 * x[2 * s.c + i]); /* and what the third one wants */
    }
    int32_t *target = ints(&r, s.n);
    for (int64_t i = 0; i < s.n; i++)
        target[i] = i % 4 == 1 ? -1 : draw_below((int32_t)all);
    target[s.n > 2 ? 2 : 0] = (int32_t)(all * 5 / 6);
    target[s.n - 1] = (int32_t)all - 1;
    floats(&r, CLOSE, s.n);
    floats(&r, CLOSE, s.n);
    floats(&r, CLOSE, 4 * s.n);
    floats(&r, READ, s.n);
    floats(&r, CLOSE, s.n * s.c);
    floats(&r, CLOSE, all * s.c);
    floats(&r, JUNK, s.chunk * s.v);
    floats(&r, JUNK, s.chunk * s.c);
    floats(&r, JUNK, s.chunk * s.c);
    add_buffer(&r, JUNK, (size_t)s.chunk * sizeof(int32_t));
    add_buffer(&r, JUNK, (size_t)(s.n * (s.parts ? s.parts : 1)) * sizeof(struct logprob_part));
    check_one(&r, false);
}

void test_logprob(void **state)
{
    (void)state;
    for (int which = 0; which < 2; which++) {
        check_logprob((struct scores){ .n = 20, .c = 12, .v = 300, .chunk = 20, .stats = true, .keep = true }, which);
        check_logprob((struct scores){ .n = 21, .c = 9, .v = 700, .chunk = 8, .half = true }, which);
        check_logprob((struct scores){ .n = 13, .c = 8, .v = 33, .chunk = 5, .stats = true, .bf16 = true }, which);
        check_logprob((struct scores){ .n = 7, .c = 8, .v = 40, .chunk = 3, .half = true, .bf16 = true }, which);
        check_logprob((struct scores){ .n = 9, .c = 5, .v = 50, .chunk = 4, .parts = 3, .stats = true }, which);
        check_logprob((struct scores){ .n = 9, .c = 5, .v = 50, .chunk = 9, .parts = 2 }, which);
    }
    check_logprob((struct scores){ .n = 1, .c = 1, .v = 1, .chunk = 1, .stats = true }, OWN);
}
