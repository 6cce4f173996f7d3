/* Attention against a plain softmax in double (attention_ref, which keeps the whole row of scores in mind): ragged
 * packs, grouped heads, odd head sizes, tile boundaries. What else is in the pack, threads and decoding piecewise
 * change no bit. */
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 1 << 19, SEGMENTS = 16 };

struct pack {
    int heads, kv_heads, d;
    int64_t window;
    struct segments seg;
    int32_t offset[SEGMENTS + 1];
    int64_t n;
};

static float *q, *k, *v, *d_o, *o[2], *lse[2], *dq[2], *dk[2], *dv[2];

static int setup(void **state)
{
    (void)state;
    float **all[] = {
        &q, &k, &v, &d_o, &o[0], &o[1], &lse[0], &lse[1], &dq[0], &dq[1], &dk[0], &dk[1], &dv[0], &dv[1]
    };
    uint32_t s = 3;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        *all[i] = mem_alloc(MOST * sizeof(float));
        for (size_t j = 0; j < MOST; j++) {
            s = s * 1664525u + 1013904223u;
            (*all[i])[j] = (float)(int32_t)s * 0x1p-30f;
        }
    }
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    float *all[] = { q, k, v, d_o, o[0], o[1], lse[0], lse[1], dq[0], dq[1], dk[0], dk[1], dv[0], dv[1] };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        mem_free(all[i]);
    return 0;
}

static struct pack pack_of(int heads, int kv_heads, int d, int count, const int32_t *length)
{
    struct pack p = { .heads = heads, .kv_heads = kv_heads, .d = d };
    for (int s = 0; s < count; s++)
        p.offset[s + 1] = p.offset[s] + length[s];
    p.seg.count = count;
    p.n = p.offset[count];
    assert_true(p.n * heads * d <= MOST);
    return p;
}

/* Forward and backward of a pack whose rows start at token `at` of the inputs, into outputs `side`, cleared first. */
static struct attention attention_of(struct pack *p, int64_t at, int side)
{
    int64_t qr = (int64_t)p->heads * p->d, kr = (int64_t)p->kv_heads * p->d;
    p->seg.offset = p->offset;
    memset(dq[side], 0, (size_t)(p->n * qr) * sizeof(float));
    memset(dk[side], 0, (size_t)(p->n * kr) * sizeof(float));
    memset(dv[side], 0, (size_t)(p->n * kr) * sizeof(float));
    return (struct attention){ .n = p->n,
                               .heads = p->heads,
                               .kv_heads = p->kv_heads,
                               .head_dim = p->d,
                               .window = p->window,
                               .seg = &p->seg,
                               .q = q + at * qr,
                               .k = k + at * kr,
                               .v = v + at * kr,
                               .o = o[side],
                               .lse = lse[side],
                               .d_o = d_o + at * qr,
                               .dq = dq[side],
                               .dk = dk[side],
                               .dv = dv[side] };
}

static void run(struct workers *w, struct pack *p, int64_t at, int side)
{
    struct attention a = attention_of(p, at, side);
    kernels_cpu.attention(w, &a);
    kernels_cpu.attention_bwd(w, &a);
}

static void expect_near(const struct pack *p, const char *what, const float *got, const float *want, int64_t n,
                        double tolerance)
{
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= tolerance * (1 + fabs((double)want[i]))))
            fail_msg("%s, %d/%d heads of %d, %lld tokens: %lld is %.9g, not %.9g", what, p->heads, p->kv_heads, p->d,
                     (long long)p->n, (long long)i, (double)got[i], (double)want[i]);
}

static void check_window(int heads, int kv_heads, int d, int64_t window, int count, const int32_t *length)
{
    struct pack p = pack_of(heads, kv_heads, d, count, length);
    p.window = window;
    int64_t qn = p.n * heads * d, kn = p.n * kv_heads * d;
    run(NULL, &p, 0, 0);
    struct attention a = attention_of(&p, 0, 1);
    attention_ref(&a);
    attention_bwd_ref(&a);
    expect_near(&p, "o", o[0], o[1], qn, 3e-6);
    expect_near(&p, "lse", lse[0], lse[1], p.n * heads, 3e-6);
    expect_near(&p, "dq", dq[0], dq[1], qn, 1e-5);
    expect_near(&p, "dk", dk[0], dk[1], kn, 1e-5);
    expect_near(&p, "dv", dv[0], dv[1], kn, 1e-5);
}

static void check(int heads, int kv_heads, int d, int count, const int32_t *length)
{
    check_window(heads, kv_heads, d, 0, count, length);
}

static void against_plain(void **state)
{
    (void)state;
    static const int32_t edge[] = { 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200 };
    static const int dims[] = { 1, 2, 7, 16, 20, 31, 32, 33, 64, 80 };
    for (size_t i = 0; i < sizeof edge / sizeof *edge; i++)
        check(2, 1, dims[i % 10], 1, &edge[i]);
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        check(1, 1, dims[i], 1, (int32_t[]){ 66 });
    check(2, 2, 128, 1, (int32_t[]){ 70 });
    check(1, 1, 256, 1, (int32_t[]){ 67 });
}

static void ragged_packs(void **state)
{
    (void)state;
    uint32_t s = 11;
    for (int round = 0; round < 24; round++) {
        int32_t length[SEGMENTS];
        int count = 1 + round % 7, kv = 1 + round % 3, ratio = 1 << round % 3;
        for (int i = 0; i < count; i++) {
            s = s * 1664525u + 1013904223u;
            length[i] = (int32_t)(s >> 16) % (round % 2 ? 80 : 20);
        }
        check(kv * ratio, kv, 4 + 2 * (round % 9), count, length);
    }
}

static void windows(void **state)
{
    (void)state;
    static const int64_t window[] = { 1, 2, 5, 63, 64, 65, 127, 128, 129, 199, 200, 201, 1000000 };
    static const int32_t edge[] = { 1, 64, 65, 129, 200 }, ragged[] = { 70, 0, 3, 131, 64 };
    for (size_t i = 0; i < sizeof window / sizeof *window; i++) {
        for (size_t j = 0; j < sizeof edge / sizeof *edge; j++)
            check_window(2, 1, 20, window[i], 1, &edge[j]);
        check_window(4, 2, 16, window[i], 5, ragged);
    }
    /* the reference's own window: each output of a window of one is that token's value */
    struct pack p = pack_of(1, 1, 16, 1, (int32_t[]){ 130 });
    p.window = 1;
    struct attention a = attention_of(&p, 0, 1);
    attention_ref(&a);
    expect_near(&p, "o", o[1], v, p.n * 16, 1e-6);
}

/* The same segment alone, and in the middle of a pack. */
static void pack_windowed(int64_t window)
{
    static const int32_t length[] = { 5, 130, 0, 64, 77 };
    struct pack p = pack_of(4, 2, 20, 5, length);
    p.window = window;
    int64_t qr = 4 * 20, kr = 2 * 20;
    run(NULL, &p, 0, 0);
    for (int s = 0; s < 5; s++) {
        struct pack alone = pack_of(4, 2, 20, 1, &length[s]);
        alone.window = window;
        int64_t at = p.offset[s];
        run(NULL, &alone, at, 1);
        assert_memory_equal(o[0] + at * qr, o[1], (size_t)(length[s] * qr) * sizeof(float));
        assert_memory_equal(lse[0] + at * 4, lse[1], (size_t)(length[s] * 4) * sizeof(float));
        assert_memory_equal(dq[0] + at * qr, dq[1], (size_t)(length[s] * qr) * sizeof(float));
        assert_memory_equal(dk[0] + at * kr, dk[1], (size_t)(length[s] * kr) * sizeof(float));
        assert_memory_equal(dv[0] + at * kr, dv[1], (size_t)(length[s] * kr) * sizeof(float));
    }
}

static void packing_changes_no_bit(void **state)
{
    (void)state;
    pack_windowed(0);
    pack_windowed(37);
}

static void threads_change_no_bit(void **state)
{
    (void)state;
    struct pack p = pack_of(6, 3, 32, 4, (int32_t[]){ 100, 3, 65, 190 });
    run(NULL, &p, 0, 0);
    for (int threads = 2; threads <= 3; threads++) {
        struct workers *w;
        assert_null(workers_open(threads, &w));
        run(w, &p, 0, 1);
        workers_close(w);
        assert_memory_equal(o[0], o[1], (size_t)(p.n * 6 * 32) * sizeof(float));
        assert_memory_equal(lse[0], lse[1], (size_t)(p.n * 6) * sizeof(float));
        assert_memory_equal(dq[0], dq[1], (size_t)(p.n * 6 * 32) * sizeof(float));
        assert_memory_equal(dk[0], dk[1], (size_t)(p.n * 3 * 32) * sizeof(float));
        assert_memory_equal(dv[0], dv[1], (size_t)(p.n * 3 * 32) * sizeof(float));
    }
}

/* Gradients that nobody wants are left out; the others keep their bits. */
static void some_gradients(void **state)
{
    (void)state;
    struct pack p = pack_of(4, 2, 12, 2, (int32_t[]){ 30, 70 });
    int64_t qn = p.n * 4 * 12, kn = p.n * 2 * 12;
    run(NULL, &p, 0, 0);
    for (int skip = 0; skip < 3; skip++) {
        struct attention a = attention_of(&p, 0, 1);
        kernels_cpu.attention(NULL, &a);
        void **grad = skip == 0 ? &a.dq : skip == 1 ? &a.dk : &a.dv;
        *grad = NULL;
        kernels_cpu.attention_bwd(NULL, &a);
        assert_true(!a.dq || !memcmp(dq[0], dq[1], (size_t)qn * sizeof(float)));
        assert_true(!a.dk || !memcmp(dk[0], dk[1], (size_t)kn * sizeof(float)));
        assert_true(!a.dv || !memcmp(dv[0], dv[1], (size_t)kn * sizeof(float)));
    }
}

/* Scores far apart and far from 0: the running maximum must carry the sum. An f32 score of 300 is good to 3e-5, and so
 * is its e^. */
static void large_scores(void **state)
{
    (void)state;
    enum { T = 200, D = 16 };
    for (int i = 0; i < T * D; i++)
        k[i] *= 40.0f * (float)(i / D % 70) / 70.0f;
    struct pack p = pack_of(1, 1, D, 1, (int32_t[]){ T });
    run(NULL, &p, 0, 0);
    struct attention a = attention_of(&p, 0, 1);
    attention_ref(&a);
    expect_near(&p, "o", o[0], o[1], T * D, 2e-4);
    expect_near(&p, "lse", lse[0], lse[1], T, 1e-6);
    for (int i = 0; i < T * D; i++)
        assert_true(isfinite(dq[0][i]) && isfinite(dk[0][i]) && isfinite(dv[0][i]));
}

/* ---- decoding against a cache, through the op ---- */

enum { TOKENS = 150, HEADS = 4, GROUPS = 2, DIM = 20, CAP = 160, TWO = 2 };

static struct tensor rows(float *p, int64_t n, int64_t heads)
{
    return (struct tensor){ .dtype = DTYPE_F32, .ndim = 3, .dim = { n, heads, DIM }, .data = p };
}

/* Tokens [from[s], to[s]) of two sequences as one pack, through a cache; outputs land where the full pass has them. */
static status *step(struct tape *t, struct kv_cache *c, const int32_t from[TWO], const int32_t to[TWO], int64_t window,
                    float *out)
{
    static float part[3][TWO * TOKENS * HEADS * DIM];
    static int32_t offset[TWO + 1], position[TWO * TOKENS];
    int64_t n = 0;
    for (int s = 0; s < TWO; s++) {
        int64_t at = s * TOKENS + from[s], count = to[s] - from[s];
        memcpy(part[0] + n * HEADS * DIM, q + at * HEADS * DIM, (size_t)(count * HEADS * DIM) * sizeof(float));
        memcpy(part[1] + n * GROUPS * DIM, k + at * GROUPS * DIM, (size_t)(count * GROUPS * DIM) * sizeof(float));
        memcpy(part[2] + n * GROUPS * DIM, v + at * GROUPS * DIM, (size_t)(count * GROUPS * DIM) * sizeof(float));
        for (int32_t i = 0; i < count; i++)
            position[n + i] = from[s] + i;
        n += count;
        offset[s + 1] = (int32_t)n;
    }
    struct tensor qs = rows(part[0], n, HEADS), ks = rows(part[1], n, GROUPS), vs = rows(part[2], n, GROUPS);
    struct segments seg = { TWO, offset, position };
    tape_begin(t, TAPE_FORWARD);
    struct tensor *y = op_attention(t, &qs, &ks, &vs, &seg, window, c);
    TRY(tape_end(t));
    for (int s = 0; s < TWO; s++)
        memcpy(out + (s * TOKENS + from[s]) * HEADS * DIM, (float *)y->data + (int64_t)offset[s] * HEADS * DIM,
               (size_t)((to[s] - from[s]) * HEADS * DIM) * sizeof(float));
    return NULL;
}

static void decode(int64_t window)
{
    static float ck[TWO * CAP * GROUPS * DIM], cv[TWO * CAP * GROUPS * DIM], out[TWO * TOKENS * HEADS * DIM];
    int32_t len[TWO] = { 0 };
    struct kv_cache c = { TWO, CAP, GROUPS, DIM, ck, cv, len };
    struct pack p = pack_of(HEADS, GROUPS, DIM, TWO, (int32_t[]){ TOKENS, TOKENS });
    p.window = window;
    run(NULL, &p, 0, 0);
    struct tape *t;
    assert_null(tape_open(NULL, NULL, 0, &t));
    /* a prompt, then pieces that straddle tiles, then one at a time; the second sequence lags and pauses */
    int32_t from[TWO] = { 0, 0 }, to[TWO] = { 60, 3 };
    for (int round = 0; from[0] < TOKENS || from[1] < TOKENS; round++) {
        assert_null(step(t, &c, from, to, window, out));
        assert_int_equal(len[0], to[0]);
        assert_int_equal(len[1], to[1]);
        for (int s = 0; s < TWO; s++) {
            int32_t more = round % 3 == 2 && s == 1 ? 0 : round < 3 ? 10 + 9 * s : 1 + s;
            from[s] = to[s];
            to[s] = to[s] + more < TOKENS ? to[s] + more : TOKENS;
        }
    }
    for (int i = 0; i < TWO * TOKENS * HEADS * DIM; i++)
        if (out[i] != o[0][i])
            fail_msg("element %d is %.9g decoded, %.9g in a full pass", i, (double)out[i], (double)o[0][i]);

    /* what does not fit is refused before anything is written */
    status *st = step(t, &c, (int32_t[]){ 0, 0 }, (int32_t[]){ 10, 11 }, window, out);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "segment 1"));
    status_free(st);
    assert_int_equal(len[0], TOKENS);
    assert_null(step(t, &c, (int32_t[]){ 0, 0 }, (int32_t[]){ 10, 10 }, window, out));

    static const int32_t offset[] = { 0, 0, 1 }, position[] = { 0 };
    struct tensor one_q = rows(q, 1, HEADS), one = rows(k, 1, GROUPS);
    struct segments seg = { TWO, offset, position };
    len[0] = len[1] = 0;
    tape_begin(t, TAPE_TRAIN);
    assert_null(op_attention(t, &one_q, &one, &one, &seg, 0, &c));
    assert_non_null(st = tape_end(t));
    status_free(st);
    tape_begin(t, TAPE_DRY);
    assert_non_null(op_attention(t, &one_q, &one, &one, &seg, 0, &c));
    assert_null(tape_end(t));
    assert_true(len[0] == 0 && len[1] == 0);
    struct kv_cache other = { TWO, CAP, GROUPS + 1, DIM, ck, cv, len };
    tape_begin(t, TAPE_FORWARD);
    assert_null(op_attention(t, &one_q, &one, &one, &seg, 0, &other));
    assert_non_null(st = tape_end(t));
    status_free(st);
    tape_close(t);
}

static void decoding_equals_full_pass(void **state)
{
    (void)state;
    decode(0);
    decode(7);
    decode(64);
    decode(70);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_plain),
        cmocka_unit_test(ragged_packs),
        cmocka_unit_test(packing_changes_no_bit),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(some_gradients),
        cmocka_unit_test(decoding_equals_full_pass),
        cmocka_unit_test(windows),
        cmocka_unit_test(large_scores), /* last: it changes k */
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
