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
    bool bf16, low, fresh;
    int tail; /* tokens of the pack behind its last segment */
};

enum { Q, K, V, O, LSE, D_O, DQ, DK, DV, OFFSET, PAST };

/* Elements of arrays Q to DV; rows of queries and of keys. */
static int64_t rows_of(const struct heads *h, bool queries)
{
    int64_t all = h->tail;
    for (int s = 0; s < h->segments; s++)
        all += h->length[s];
    if (!queries && h->cached)
        return h->segments * h->cap;
    return queries && h->ranks > 1 ? (all + h->ranks - 1) / h->ranks : all;
}

static int64_t elements_of(const struct heads *h, int b)
{
    bool queries = b != K && b != V && b != DK && b != DV;
    return rows_of(h, queries) * (b == LSE  ? h->heads
                                  : queries ? (int64_t)h->heads * h->d
                                            : (int64_t)h->kv_heads * h->d);
}

static bool is_gradient(int b)
{
    return b == DQ || b == DK || b == DV;
}

/* A second backward wants the gradient of keys alone; not where errors of bf16 would add up. */
static void call_backward(const struct kernels *k, struct workers *w, const struct heads *h, struct attention *a)
{
    k->attention_bwd(w, a);
    a->dq = NULL;
    a->dv = NULL;
    if ((h->bf16 || h->low) && !h->fresh)
        return;
    if (h->fresh && k == &kernels_cpu)
        memset(a->dk, 0, (size_t)elements_of(h, DK) * sizeof(float));
    k->attention_bwd(w, a);
}

static void call_attention(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct heads *h = arg;
    struct segments seg = { .count = h->segments, .offset = p[OFFSET] };
    struct array x[DV + 1];
    for (int b = 0; b <= DV; b++)
        x[b] = array_begin(k, p[b], h->low && b != LSE, h->fresh && is_gradient(b), elements_of(h, b));
    struct attention a = { .n = rows_of(h, true),
                           .heads = h->heads,
                           .kv_heads = h->kv_heads,
                           .head_dim = h->d,
                           .window = h->window,
                           .rank = h->rank,
                           .ranks = h->ranks,
                           .seg = &seg,
                           .q = x[Q].at,
                           .k = x[K].at,
                           .v = x[V].at,
                           .past = h->cached ? p[PAST] : NULL,
                           .cap = h->cap,
                           .o = x[O].at,
                           .lse = x[LSE].at,
                           .d_o = x[D_O].at,
                           .dq = x[DQ].at,
                           .dk = x[DK].at,
                           .dv = x[DV].at,
                           .bf16 = h->bf16 || h->low,
                           .low = h->low,
                           .fresh = h->fresh };
    k->attention(w, &a);
    for (int64_t i = 0; h->low && k == &kernels_cpu && i < elements_of(h, O); i++) /* as backward finds it */
        ((float *)a.o)[i] = bf16_to_f32(bf16_from_f32(((float *)a.o)[i]));
    if (!h->cached)
        call_backward(k, w, h, &a);
    for (int b = 0; b <= DV; b++)
        array_done(k, p[b], h->low && b != LSE, x[b], elements_of(h, b));
}

static void check_attention(struct heads h, bool skewed)
{
    struct run r = { .what = "attention", .call = call_attention, .arg = &h };
    r.tolerance = h.bf16 || h.low ? 2e-2 : 2e-5; /* weights of 1 in bf16 are 2e-3 off, and add up */
    for (int b = 0; b <= DV; b++)
        array_buffer(&r, b == O || b == LSE || is_gradient(b) ? CLOSE : READ, h.low && b != LSE, elements_of(&h, b));
    r.b[LSE].tolerance = 2e-5;                  /* products of bf16 are exact */
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

/* Arrays in bf16 or not, gradients added to or written, aligned or not; bf16: on tensor cores where there are any. */
static void check_arrays(struct heads h)
{
    for (int how = 0; how < 8; how++) {
        if (how == 2 || how == 4) /* f32 has fewer ways */
            continue;
        h.low = how & 1;
        h.fresh = how & 2 && !h.cached; /* is of gradients */
        h.bf16 = !h.low && h.d % 2 == 0;
        check_attention(h, how & 4);
    }
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

void test_attention_of_arrays(void **state)
{
    (void)state;
    check_arrays((struct heads){ 1, 1, 1, .segments = 1, .length = { 1 } });
    check_arrays((struct heads){ 2, 1, 7, .segments = 4, .length = { 3, 0, 1, 70 }, .tail = 3 });
    check_arrays((struct heads){ 4, 2, 64, .segments = 3, .length = { 65, 1, 130 }, .tail = 130 });
    check_arrays((struct heads){ 2, 2, 20, .window = 5, .segments = 2, .length = { 150, 4 } });
    check_arrays((struct heads){ 1, 1, 16, .window = 127, .segments = 1, .length = { 260 }, .tail = 1 });
    check_arrays((struct heads){ 3, 1, 80, .segments = 3, .length = { 5, 0, 66 } });
    check_arrays((struct heads){ 2, 1, 128, .window = 70, .segments = 1, .length = { 197 } });
    check_arrays((struct heads){ 4, 1, 120, .segments = 2, .length = { 129, 64 }, .tail = 70 });
    check_arrays((struct heads){ 1, 1, 129, .segments = 1, .length = { 35 } });
    check_arrays((struct heads){ 2, 1, 200, .window = 20, .segments = 3, .length = { 33, 1, 40 }, .tail = 40 });
    check_arrays((struct heads){ 1, 1, 256, .segments = 1, .length = { 70 } });
}

void test_attention_of_arrays_of_ranks(void **state)
{
    (void)state;
    for (int rank = 0; rank < 3; rank++) {
        check_arrays((struct heads){ 2, 2, 8, 40, 3, rank, 4, .length = { 2, 100, 0, 101 } });
        check_arrays((struct heads){ 2, 1, 72, 0, 3, rank, 3, .length = { 7, 1, 410 } });
        check_arrays((struct heads){ 1, 1, 136, 9, 3, rank, 2, .length = { 50, 51 } });
    }
}

void test_attention_of_arrays_with_cache(void **state)
{
    (void)state;
    check_arrays((struct heads){ 4, 2, 16, .segments = 4, .length = { 1, 1, 3, 1 }, .past = { 0, 62, 63, 64 },
                                 .cached = true, .cap = 80 });
    check_arrays((struct heads){ 2, 1, 128, .window = 50, .segments = 3, .length = { 140, 0, 3 }, .past = { 20, 1, 90 },
                                 .cached = true, .cap = 160 });
}
