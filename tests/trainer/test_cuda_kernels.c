/* The CUDA kernels against the CPU's, forward and backward, on odd shapes. Without arguments they run in an emulator
 * (tests/support/cuda_emu.h), which needs no GPU and no nvcc; `--device cuda` runs the same cases on a GPU with the
 * real plugin, and counts as skipped where there is none.
 *
 * A case is one function over an array of buffers; it runs with kernels_cpu on copies in host memory, and twice with
 * the CUDA kernels on copies in device memory. What they leave must be close to the CPU's, everything else untouched,
 * guards behind the buffers too, and both runs must give the same bits: in the emulator threads and blocks take turns
 * in ascending order in one of them and in descending order in the other, so that a missing barrier shows. Cases run
 * with buffers that are 16-byte aligned and with such that are not. */
#include "comm/base/mem.h"
#include "comm/device/device.h"
#include "trainer/ops/device_kernels.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Of the emulator. */
extern ops_plugin_fn ops_plugin;
void emu_order(bool descending);

enum { SKIPPED = 77, MOST = 16, GUARD = 64, OWN = 0, LIBRARY = 1 };

/* ---- where cases run ---- */

static struct device *device; /* a GPU's; NULL: the emulator */
static struct stream *stream;
static const struct ops_plugin *plugin;
static struct workers *workers[2]; /* with products by our own kernel; by the library */

static void assert_ok(status *st)
{
    if (st)
        print_error("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    assert_null(st);
}

static void *device_take(size_t bytes)
{
    void *p = NULL;
    if (device)
        assert_ok(device->ops->alloc(device, bytes, &p));
    else
        p = mem_alloc(bytes);
    assert_non_null(p);
    return p;
}

static void device_give(void *p, size_t bytes)
{
    if (device)
        device->ops->free(device, p, bytes);
    else
        mem_free(p);
}

static void device_copy(void *dst, const void *src, size_t bytes)
{
    if (device) {
        assert_ok(device->ops->copy(device, dst, src, bytes, stream));
        assert_ok(device->ops->stream_sync(device, stream));
    } else {
        memcpy(dst, src, bytes);
    }
}

static int open_all(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct ops_options o = { .stream = stream, .deterministic = true, .own_gemm = i == OWN };
        assert_ok(plugin->open(&o, &workers[i]));
    }
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++)
        plugin->close(workers[i]);
    return 0;
}

/* ---- a case ---- */

enum kind {
    READ,
    INTS,
    CLOSE,
    EXACT,
    JUNK
}; /* READ and INTS must not change; CLOSE: f32, near the CPU's; JUNK: scratch */

struct buffer {
    enum kind kind;
    size_t bytes;
    void *value; /* before */
};

struct run {
    const char *what;
    void (*call)(const struct kernels *k, struct workers *w, void **p, const void *arg);
    const void *arg;
    struct buffer b[MOST];
    int count;
    double tolerance;
    int gemm; /* OWN or LIBRARY */
};

static uint32_t seed = 1;

static float draw(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed * 0x1p-30f;
}

static int32_t draw_below(int32_t n)
{
    seed = seed * 1664525u + 1013904223u;
    return (int32_t)((seed >> 8) % (uint32_t)n);
}

static void *add_buffer(struct run *r, enum kind kind, size_t bytes)
{
    assert_true(r->count < MOST);
    void *p = mem_calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    r->b[r->count++] = (struct buffer){ kind, bytes, p };
    return p;
}

static float *floats(struct run *r, enum kind kind, int64_t n)
{
    float *p = add_buffer(r, kind, (size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++)
        p[i] = draw();
    return p;
}

static int32_t *ints(struct run *r, int64_t n)
{
    return add_buffer(r, INTS, (size_t)n * sizeof(int32_t));
}

static void near_cpu(const struct run *r, int b, const void *got, const void *want, int round)
{
    const float *g = got, *w = want;
    for (size_t i = 0; r->b[b].kind == CLOSE && i < r->b[b].bytes / sizeof *g; i++)
        if (!(fabs((double)g[i] - (double)w[i]) <= r->tolerance * (1 + fabs((double)w[i]))) && !(g[i] == w[i]))
            fail_msg("%s: buffer %d, element %zu is %.9g, the CPU's %.9g (run %d)", r->what, b, i, (double)g[i],
                     (double)w[i], round);
    if (r->b[b].kind != CLOSE && r->b[b].kind != JUNK && memcmp(got, want, r->b[b].bytes))
        fail_msg("%s: buffer %d differs (run %d)", r->what, b, round);
}

/* Once with the CUDA kernels: results into `out`. */
static void run_device(const struct run *r, size_t skew, bool descending, unsigned char **out)
{
    void *p[MOST] = { 0 }, *base[MOST];
    size_t size[MOST];
    for (int b = 0; b < r->count; b++) {
        size[b] = r->b[b].bytes + skew + GUARD;
        unsigned char *image = mem_alloc(size[b]);
        memset(image, 0x5a, size[b]);
        memcpy(image + skew, r->b[b].value, r->b[b].bytes);
        base[b] = device_take(size[b]);
        device_copy(base[b], image, size[b]);
        p[b] = (unsigned char *)base[b] + skew;
        mem_free(image);
    }
    if (!device)
        emu_order(descending);
    r->call(plugin->kernels, workers[r->gemm], p, r->arg);
    assert_ok(plugin->check(workers[r->gemm], true));
    for (int b = 0; b < r->count; b++) {
        unsigned char *image = mem_alloc(size[b]);
        device_copy(image, base[b], size[b]);
        for (size_t i = 0; i < size[b]; i++)
            if ((i < skew || i >= skew + r->b[b].bytes) && image[i] != 0x5a)
                fail_msg("%s: buffer %d of %zu bytes is written at %zd", r->what, b, r->b[b].bytes,
                         (ssize_t)i - (ssize_t)skew);
        memcpy(out[b], image + skew, r->b[b].bytes);
        mem_free(image);
        device_give(base[b], size[b]);
    }
}

static void finish(struct run *r)
{
    for (int b = 0; b < r->count; b++)
        mem_free(r->b[b].value);
    r->count = 0;
}

/* Run the case everywhere, and forget its buffers. */
static void check_one(struct run *r, bool skewed)
{
    void *host[MOST];
    unsigned char *out[2][MOST];
    for (int b = 0; b < r->count; b++) {
        size_t bytes = r->b[b].bytes + 1;
        host[b] = mem_alloc(bytes);
        out[0][b] = mem_alloc(bytes);
        out[1][b] = mem_alloc(bytes);
        memcpy(host[b], r->b[b].value, r->b[b].bytes);
    }
    r->call(&kernels_cpu, NULL, host, r->arg);
    for (int i = 0; i < 2; i++) {
        run_device(r, skewed ? sizeof(double) : 0, i == 1, out[i]);
        for (int b = 0; b < r->count; b++)
            near_cpu(r, b, out[i][b], host[b], i);
    }
    for (int b = 0; b < r->count; b++) {
        if (r->b[b].kind != JUNK && memcmp(out[0][b], out[1][b], r->b[b].bytes))
            fail_msg("%s: buffer %d has other bits in a second run", r->what, b);
        mem_free(host[b]);
        mem_free(out[0][b]);
        mem_free(out[1][b]);
    }
    finish(r);
}

/* ---- elements ---- */

static void call_elements(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    int64_t n = *(const int64_t *)arg;
    k->swiglu(w, p[0], p[1], p[2], n);
    k->swiglu_bwd(w, p[3], p[4], p[5], p[1], p[2], n);
    k->swiglu_bwd(w, NULL, p[4], p[5], p[1], p[2], n);
    k->swiglu_bwd(w, p[3], NULL, p[5], p[1], p[2], n);
    k->add(w, p[6], p[1], p[2], n);
    k->scale(w, p[7], p[1], -1.7f, n);
    k->axpy(w, p[8], p[1], 0.3f, n);
    k->add_scalar(w, p[9], p[1], n);
    k->zero(w, p[10], n);
    k->widen(w, p[11], p[12], n);
    k->scale(w, p[13], p[13], 3.0f, n); /* in place */
}

static void elements(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 1, 3, 4, 1025, 4099 };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            int64_t n = sizes[i];
            struct run r = { .what = "elements", .call = call_elements, .arg = &n, .tolerance = 1e-6 };
            for (int b = 0; b < 12; b++) {
                float *x = floats(&r, b == 1 || b == 2 || b == 5 ? READ : CLOSE, n);
                for (int64_t j = 0; b == 1 && j < n; j++)
                    x[j] *= j % 7 == 3 ? 60 : 4;
            }
            uint16_t *half = add_buffer(&r, READ, (size_t)n * sizeof *half);
            for (int64_t j = 0; j < n; j++)
                half[j] = bf16_from_f32(draw());
            floats(&r, CLOSE, n);
            check_one(&r, skew);
        }
}

static void call_adamw(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    size_t n = (size_t) * (const int64_t *)arg;
    k->adamw(w, p[0], p[1], p[2], p[3], n, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 0.5);
    k->adamw(w, p[0], p[1], p[2], p[3], n, 3e-2, 0.8, 0.99, 1e-6, 0.0, 7, 1.0);
}

static void adamw(void **state)
{
    (void)state;
    for (int64_t n = 1; n < 3000; n = n * 7 + 2) {
        struct run r = { .what = "adamw", .call = call_adamw, .arg = &n, .tolerance = 2e-6 };
        floats(&r, CLOSE, n);
        floats(&r, READ, n);
        floats(&r, CLOSE, n);
        float *v = floats(&r, CLOSE, n);
        for (int64_t i = 0; i < n; i++)
            v[i] = fabsf(v[i]);
        check_one(&r, n % 2);
    }
}

/* ---- rows and columns ---- */

struct shape {
    int64_t rows, c;
};

static void call_norm(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct shape *s = arg;
    k->rmsnorm(w, p[0], p[1], p[2], p[3], s->rows, s->c, 1e-5f);
    k->rmsnorm_bwd(w, p[4], p[5], p[2], p[3], p[1], s->rows, s->c);
    k->rmsnorm_bwd_weight(w, p[6], p[5], p[2], p[1], s->rows, s->c);
    k->bias_bwd(w, p[7], p[5], s->rows, s->c);
}

static void norms(void **state)
{
    (void)state;
    static const struct shape shapes[] = { { 1, 1 },   { 5, 7 },    { 9, 64 },   { 17, 300 }, { 3, 1028 },
                                           { 255, 3 }, { 256, 33 }, { 700, 36 }, { 2, 130 },  { 0, 8 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            const struct shape *s = &shapes[i];
            struct run r = { .what = "norm", .call = call_norm, .arg = s, .tolerance = 1e-5 };
            floats(&r, CLOSE, s->rows * s->c);
            floats(&r, CLOSE, s->rows);
            floats(&r, READ, s->rows * s->c);
            floats(&r, READ, s->c);
            floats(&r, CLOSE, s->rows * s->c);
            floats(&r, READ, s->rows * s->c);
            floats(&r, CLOSE, s->c);
            floats(&r, CLOSE, s->c);
            check_one(&r, skew);
        }
}

static void call_sum(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    k->sum(w, p[0], p[1], *(const int64_t *)arg, p[2]);
}

static void sums(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 0, 1, 1023, 1024, 1025, 5000, 1024 * 7, 1024 * 270 + 5 };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct run r = { .what = "sum", .call = call_sum, .arg = &sizes[i], .tolerance = 1e-6 };
        floats(&r, CLOSE, 1);
        floats(&r, READ, sizes[i]);
        add_buffer(&r, JUNK, (size_t)(sizes[i] / SUM_BLOCK + 1) * sizeof(double));
        check_one(&r, i % 2);
    }
}

/* ---- tables and angles ---- */

struct lookup {
    int64_t n, c, rows;
    bool half;
};

static void call_embedding(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct lookup *l = arg;
    k->embedding(w, p[0], p[1], l->half ? DTYPE_BF16 : DTYPE_F32, p[2], l->n, l->c);
    k->embedding_bwd(w, p[3], p[4], p[2], l->n, l->c);
}

static void embeddings(void **state)
{
    (void)state;
    static const struct lookup lookups[] = { { 1, 1, 1, false },      { 31, 5, 4, true },    { 33, 64, 50, false },
                                             { 100, 130, 900, true }, { 70, 700, 3, false }, { 40, 516, 40, false } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof lookups / sizeof *lookups; i++) {
            const struct lookup *l = &lookups[i];
            struct run r = { .what = "embedding", .call = call_embedding, .arg = l, .tolerance = 3e-6 };
            floats(&r, CLOSE, l->n * l->c);
            uint16_t *table = add_buffer(&r, READ, (size_t)(l->rows * l->c) * (l->half ? 2 : 4));
            for (int64_t j = 0; j < l->rows * l->c; j++)
                if (l->half)
                    table[j] = bf16_from_f32(draw());
                else
                    ((float *)(void *)table)[j] = draw();
            int32_t *id = ints(&r, l->n);
            for (int64_t j = 0; j < l->n; j++)
                id[j] = j % 5 == 4 ? -1 : j % 3 == 2 ? 0 : draw_below((int32_t)l->rows);
            floats(&r, CLOSE, l->rows * l->c);
            floats(&r, READ, l->n * l->c);
            check_one(&r, skew);
        }
}

struct angles {
    int64_t n, h, d;
    double frequency[200], amplitude;
};

static void call_rope(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct angles *a = arg;
    k->rope_table(w, p[0], p[1], a->n, a->d, a->frequency, a->amplitude);
    k->rope(w, p[2], p[3], p[0], a->n, a->h, a->d);
    k->rope_bwd(w, p[4], p[5], p[0], a->n, a->h, a->d);
}

static void ropes(void **state)
{
    (void)state;
    static const int64_t heads[][3] = { { 1, 1, 2 }, { 7, 3, 6 }, { 20, 2, 64 }, { 5, 4, 260 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < 4; i++) {
            struct angles a = { .n = heads[i][0], .h = heads[i][1], .d = heads[i][2], .amplitude = 1.25 };
            for (int64_t j = 0; j < a.d / 2; j++)
                a.frequency[j] = pow(10000.0, -2.0 * (double)j / (double)a.d);
            struct run r = { .what = "rope", .call = call_rope, .arg = &a, .tolerance = 1e-6 };
            floats(&r, CLOSE, a.n * a.d);
            int32_t *position = ints(&r, a.n);
            for (int64_t j = 0; j < a.n; j++)
                position[j] = draw_below(3000);
            for (int b = 0; b < 4; b++)
                floats(&r, b % 2 ? READ : CLOSE, a.n * a.h * a.d);
            check_one(&r, skew);
        }
}

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

static void gemm(void **state)
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

enum { GROUPS = 50 };

static void call_gemms(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const int64_t *rows = arg;
    struct gemm g[GROUPS];
    int64_t n = 9, depth = 20, at = 0;
    for (int i = 0; i < GROUPS; i++) {
        g[i] = (struct gemm){ .m = rows[i],
                              .n = n,
                              .k = depth,
                              .a = (float *)p[0] + at * depth,
                              .lda = depth,
                              .b = (float *)p[1] + i * n * depth,
                              .b_dtype = DTYPE_F32,
                              .ldb = depth,
                              .b_trans = true,
                              .c = (float *)p[2] + at * n,
                              .ldc = n };
        at += rows[i];
    }
    k->gemms(w, g, GROUPS);
}

static void gemms(void **state)
{
    (void)state;
    int64_t rows[GROUPS], all = 0;
    for (int i = 0; i < GROUPS; i++)
        all += rows[i] = i % 6 == 1 ? 0 : i % 11 == 3 ? 70 : i % 4;
    for (int which = 0; which < 2; which++) {
        struct run r = { .what = "gemms", .call = call_gemms, .arg = rows, .tolerance = 1e-5, .gemm = which };
        floats(&r, READ, all * 20);
        floats(&r, READ, GROUPS * 9 * 20);
        floats(&r, CLOSE, all * 9);
        check_one(&r, false);
    }
}

/* ---- attention ---- */

struct heads {
    int heads, kv_heads, d;
    int64_t window;
    int ranks, rank, segments;
    int32_t length[6], past[6];
    bool cached;
    int64_t cap;
    bool bf16;
};

enum { Q, K, V, O, LSE, D_O, DQ, DK, DV, OFFSET, PAST };

static void call_attention(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct heads *h = arg;
    int32_t all = 0;
    for (int s = 0; s < h->segments; s++)
        all += h->length[s];
    struct segments seg = { .count = h->segments, .offset = p[OFFSET] };
    struct attention a = { .n = h->ranks > 1 ? (all + h->ranks - 1) / h->ranks : all,
                           .heads = h->heads,
                           .kv_heads = h->kv_heads,
                           .head_dim = h->d,
                           .window = h->window,
                           .rank = h->rank,
                           .ranks = h->ranks,
                           .seg = &seg,
                           .q = p[Q],
                           .k = p[K],
                           .v = p[V],
                           .past = h->cached ? p[PAST] : NULL,
                           .cap = h->cap,
                           .o = p[O],
                           .lse = p[LSE],
                           .d_o = p[D_O],
                           .bf16 = h->bf16 };
    k->attention(w, &a);
    if (h->cached)
        return;
    a.dq = p[DQ];
    a.dk = p[DK];
    a.dv = p[DV];
    k->attention_bwd(w, &a);
    a.dq = NULL;
    a.dv = NULL;
    k->attention_bwd(w, &a);
}

static void check_attention(struct heads h, bool skewed)
{
    struct run r = { .what = "attention", .call = call_attention, .arg = &h, .tolerance = h.bf16 ? 2e-2 : 2e-5 };
    int64_t all = 0, rows, keys;
    for (int s = 0; s < h.segments; s++)
        all += h.length[s];
    rows = h.ranks > 1 ? (all + h.ranks - 1) / h.ranks : all;
    keys = h.cached ? h.segments * h.cap : all;
    floats(&r, READ, rows * h.heads * h.d);
    floats(&r, READ, keys * h.kv_heads * h.d);
    floats(&r, READ, keys * h.kv_heads * h.d);
    floats(&r, CLOSE, rows * h.heads * h.d);
    floats(&r, CLOSE, rows * h.heads);
    floats(&r, READ, rows * h.heads * h.d);
    floats(&r, CLOSE, rows * h.heads * h.d);
    floats(&r, CLOSE, keys * h.kv_heads * h.d);
    floats(&r, CLOSE, keys * h.kv_heads * h.d);
    for (int b = 0; h.bf16 && b < r.count; b++) /* what is rounded then are weights and gradients of scores alone */
        for (size_t i = 0; i < r.b[b].bytes / sizeof(float); i++) {
            float *x = (float *)r.b[b].value + i;
            *x = bf16_to_f32(bf16_from_f32(*x));
        }
    int32_t *offset = ints(&r, h.segments + 1), *past = ints(&r, h.segments);
    for (int s = 0; s < h.segments; s++) {
        offset[s + 1] = offset[s] + h.length[s];
        past[s] = h.past[s];
    }
    check_one(&r, skewed);
}

static void attention(void **state)
{
    (void)state;
    check_attention((struct heads){ 1, 1, 1, .segments = 1, .length = { 1 } }, false);
    check_attention((struct heads){ 2, 1, 6, .segments = 3, .length = { 3, 0, 70 } }, true);
    check_attention((struct heads){ 4, 2, 64, .segments = 2, .length = { 65, 20 } }, false);
    check_attention((struct heads){ 2, 2, 20, .window = 5, .segments = 2, .length = { 150, 4 } }, false);
    check_attention((struct heads){ 1, 1, 12, .window = 64, .segments = 1, .length = { 200 } }, false);
    check_attention((struct heads){ 3, 1, 80, .segments = 2, .length = { 5, 66 } }, true);
    check_attention((struct heads){ 2, 1, 128, .window = 70, .segments = 1, .length = { 130 } }, false);
    check_attention((struct heads){ 2, 1, 200, .segments = 2, .length = { 33, 40 } }, false);
    check_attention((struct heads){ 1, 1, 256, .window = 33, .segments = 1, .length = { 70 } }, false);
    check_attention((struct heads){ 1, 1, 129, .segments = 1, .length = { 35 } }, true);
}

static void attention_of_ranks(void **state)
{
    (void)state;
    for (int rank = 0; rank < 3; rank++) {
        check_attention((struct heads){ 2, 1, 8, 0, 3, rank, 3, .length = { 7, 1, 210 } }, false);
        check_attention((struct heads){ 2, 2, 8, 40, 3, rank, 4, .length = { 2, 100, 0, 101 } }, true);
        check_attention((struct heads){ 1, 1, 136, 9, 3, rank, 2, .length = { 50, 51 } }, false);
    }
}

static void attention_with_cache(void **state)
{
    (void)state;
    struct heads h = {
        4, 2, 16, .segments = 4, .length = { 1, 1, 1, 1 }, .past = { 0, 5, 63, 64 }, .cached = true, .cap = 80
    };
    check_attention(h, false);
    h.window = 7;
    check_attention(h, true);
    h = (struct heads){ 2,         1, 72, .segments = 3, .length = { 70, 0, 3 }, .past = { 20, 1, 90 }, .cached = true,
                        .cap = 100 };
    check_attention(h, false);
}

static void attention_in_bf16(void **state)
{
    (void)state;
    check_attention((struct heads){ 1, 1, 1, .segments = 1, .length = { 1 }, .bf16 = true }, false);
    check_attention((struct heads){ 2, 1, 7, .segments = 3, .length = { 3, 0, 70 }, .bf16 = true }, true);
    check_attention((struct heads){ 4, 2, 64, .segments = 2, .length = { 65, 20 }, .bf16 = true }, false);
    check_attention((struct heads){ 2, 2, 20, .window = 5, .segments = 2, .length = { 150, 4 }, .bf16 = true }, false);
    check_attention((struct heads){ 1, 1, 12, .window = 64, .segments = 1, .length = { 200 }, .bf16 = true }, false);
    check_attention((struct heads){ 3, 1, 80, .segments = 2, .length = { 5, 66 }, .bf16 = true }, true);
    check_attention((struct heads){ 2, 1, 128, .window = 70, .segments = 1, .length = { 130 }, .bf16 = true }, false);
    check_attention((struct heads){ 1, 1, 136, .segments = 1, .length = { 35 }, .bf16 = true }, true);
    for (int rank = 0; rank < 3; rank++)
        check_attention((struct heads){ 2, 2, 8, 40, 3, rank, 4, .length = { 2, 100, 0, 101 }, .bf16 = true }, true);
    check_attention((struct heads){ 4, 2, 16, .segments = 4, .length = { 1, 1, 3, 1 }, .past = { 0, 5, 63, 64 },
                                    .cached = true, .cap = 80, .bf16 = true },
                    false);
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

static void check_logprob(struct scores s, int which)
{
    struct run r = { .what = "logprob", .call = call_logprob, .arg = &s, .tolerance = 1e-5, .gemm = which };
    int64_t all = s.v * (s.parts ? s.parts : 1);
    s.vocab = all;
    floats(&r, READ, s.n * s.c);
    void *weights = add_buffer(&r, READ, (size_t)(all * s.c) * (s.half ? 2 : 4));
    for (int64_t i = 0; i < all * s.c; i++)
        if (s.half)
            ((uint16_t *)weights)[i] = bf16_from_f32(draw());
        else
            ((float *)weights)[i] = draw();
    if (!s.half) /* two equal rows: the first one is the top */
        memcpy((float *)weights + (all - 1) * s.c, weights, (size_t)s.c * sizeof(float));
    int32_t *target = ints(&r, s.n);
    for (int64_t i = 0; i < s.n; i++)
        target[i] = i % 4 == 1 ? -1 : draw_below((int32_t)all);
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

static void logprob(void **state)
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

/* ---- experts ---- */

struct choices {
    int64_t n;
    struct router how;
    bool bias, given, share;
};

static void call_route(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct choices *c = arg;
    struct route r = { .n = c->n,
                       .how = &c->how,
                       .z = p[0],
                       .bias = c->bias ? p[1] : NULL,
                       .given = c->given,
                       .score = p[2],
                       .expert = p[3],
                       .weight = p[4],
                       .dweight = p[5],
                       .dshare = c->share ? p[6] : NULL,
                       .dz = p[7] };
    k->route(w, &r);
    k->route_bwd(w, &r);
}

static void check_route(struct choices c)
{
    struct run r = { .what = "route", .call = call_route, .arg = &c, .tolerance = 2e-6 };
    int64_t e = c.how.experts, top = c.how.top;
    float *z = floats(&r, READ, c.n * e), *bias = floats(&r, READ, e);
    for (int64_t i = 0; i < c.n * e; i++)
        z[i] = i % 3 == 0 ? roundf(z[i]) : z[i]; /* ties */
    for (int64_t i = 0; i < e; i++)
        bias[i] = roundf(bias[i]) * 0.125f;
    floats(&r, CLOSE, c.n * e);
    int32_t *expert = add_buffer(&r, EXACT, (size_t)(c.n * top) * sizeof *expert);
    for (int64_t i = 0; c.given && i < c.n * top; i++)
        expert[i] = (int32_t)((i / top * 3 + i % top) % e);
    floats(&r, CLOSE, c.n * top);
    floats(&r, READ, c.n * top);
    floats(&r, READ, e);
    floats(&r, CLOSE, c.n * e);
    check_one(&r, false);
}

static void routes(void **state)
{
    (void)state;
    check_route((struct choices){ 1, { .experts = 1, .top = 1, .scale = 1 }, false, false, false });
    check_route((struct choices){ 9, { .experts = 8, .top = 2, .normalise = true, .scale = 1 }, false, false, true });
    check_route((struct choices){ 6, { .experts = 100, .top = 40, .scale = 2.5f }, true, false, true });
    check_route((struct choices){
        7,
        { .experts = 64, .top = 6, .groups = 8, .top_groups = 3, .sigmoid = true, .normalise = true, .scale = 2.5f },
        true,
        false,
        true });
    check_route((struct choices){
        5, { .experts = 160, .top = 3, .groups = 40, .top_groups = 2, .scale = 1 }, false, false, false });
    check_route(
        (struct choices){ 3, { .experts = 1024, .top = 64, .normalise = true, .scale = 1 }, false, false, true });
    check_route((struct choices){ 5, { .experts = 33, .top = 4, .sigmoid = true, .scale = 1 }, true, true, true });
}

struct mixing {
    int64_t n, k, c;
    bool in_place;
};

static void call_mix(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct mixing *t = arg;
    struct mix m = {
        .n = t->n, .k = t->k, .c = t->c, .row = p[0], .weight = p[1], .place = p[2], .y = p[3], .dy = p[4]
    };
    k->mix(w, &m);
    m.dweight = p[6];
    k->mix_bwd(w, &m);
    m.drow = t->in_place ? p[0] : p[5];
    k->mix_bwd(w, &m);
}

static void mixes(void **state)
{
    (void)state;
    static const struct mixing shapes[] = { { 1, 1, 1, false }, { 5, 3, 70, false }, { 13, 2, 33, true } };
    for (size_t i = 0; i < 3; i++) {
        const struct mixing *t = &shapes[i];
        struct run r = { .what = "mix", .call = call_mix, .arg = t, .tolerance = 3e-6 };
        floats(&r, t->in_place ? CLOSE : READ, t->n * t->k * t->c);
        floats(&r, READ, t->n * t->k);
        int32_t *place = ints(&r, t->n * t->k);
        for (int64_t j = 0; j < t->n * t->k; j++)
            place[j] = (int32_t)(t->n * t->k - 1 - j);
        floats(&r, CLOSE, t->n * t->c);
        floats(&r, READ, t->n * t->c);
        floats(&r, CLOSE, t->n * t->k * t->c);
        floats(&r, CLOSE, t->n * t->k);
        check_one(&r, false);
    }
}

/* ---- errors ---- */

static void no_such_gpu(void **state)
{
    (void)state;
    struct workers *w = NULL;
    status *st = plugin->open(&(struct ops_options){ .index = 1000, .own_gemm = true }, &w);
    assert_int_equal(status_code(st), ST_DEVICE);
    assert_non_null(strstr(status_message(st), "1000"));
    assert_null(w);
    status_free(st);
}

static void refuses(const char *name, const char *words)
{
    const struct ops_plugin *found = NULL;
    status *st = device_kernels(name, &found);
    assert_int_equal(status_code(st), ST_UNSUPPORTED);
    assert_non_null(strstr(status_message(st), words));
    assert_null(found);
    status_free(st);
}

static void no_plugin(void **state)
{
    (void)state;
    refuses("cpu", "device cpu: no plugin has kernels for it");
    assert_int_equal(setenv("TESSERA_PLUGINS", "/nowhere", 1), 0);
    refuses("cuda", "cuda was asked for, but this program was built or installed without tessera_ops_cuda.so");
}

/* 0, or why the cases cannot run on a GPU. */
static int open_gpu(void)
{
    if (!getenv("TESSERA_PLUGINS"))
        assert_int_equal(setenv("TESSERA_PLUGINS", "..", 1), 0);
    status *st = device_open("cuda", 0, &device);
    st = st ? st : device_kernels("cuda", &plugin);
    st = st ? st : device->ops->stream_open(device, &stream);
    if (!st)
        return 0;
    printf("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    int code = status_code(st) == ST_DEVICE || !device ? SKIPPED : 1;
    status_free(st);
    return code;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(elements),
        cmocka_unit_test(adamw),
        cmocka_unit_test(norms),
        cmocka_unit_test(sums),
        cmocka_unit_test(embeddings),
        cmocka_unit_test(ropes),
        cmocka_unit_test(gemm),
        cmocka_unit_test(gemms),
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_of_ranks),
        cmocka_unit_test(attention_with_cache),
        cmocka_unit_test(attention_in_bf16),
        cmocka_unit_test(logprob),
        cmocka_unit_test(routes),
        cmocka_unit_test(mixes),
        cmocka_unit_test(no_such_gpu),
    };
    const struct CMUnitTest without[] = { cmocka_unit_test(no_plugin) };
    plugin = ops_plugin();
    int rc = argc > 2 && !strcmp(argv[1], "--device") && !strcmp(argv[2], "cuda") ? open_gpu() : 0;
    if (rc)
        return rc;
    rc = cmocka_run_group_tests(tests, open_all, close_all);
    rc += device ? 0 : cmocka_run_group_tests(without, NULL, NULL);
    if (device)
        device->ops->stream_close(device, stream);
    device_close(device);
    return rc;
}
