/* cuda_attention: cases of attention; see test_cuda_kernels.c. */
#include "tests/trainer/cuda_cases.h"

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

void test_attention(void **state)
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

void test_attention_of_ranks(void **state)
{
    (void)state;
    for (int rank = 0; rank < 3; rank++) {
        check_attention((struct heads){ 2, 1, 8, 0, 3, rank, 3, .length = { 7, 1, 210 } }, false);
        check_attention((struct heads){ 2, 2, 8, 40, 3, rank, 4, .length = { 2, 100, 0, 101 } }, true);
        check_attention((struct heads){ 1, 1, 136, 9, 3, rank, 2, .length = { 50, 51 } }, false);
    }
}

void test_attention_with_cache(void **state)
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

void test_attention_in_bf16(void **state)
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
