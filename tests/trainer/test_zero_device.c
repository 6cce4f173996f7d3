/* zero on an emulated GPU, whose memory the host cannot touch, against zero on the CPU, which test_zero.c holds against
 * its definition: summed gradients and norms bit for bit, parameters and moments as close as AdamW's own rounding, over
 * stages, dp, buckets and what travels or is kept in bf16. The same for initial values. Ranks are threads. */
#include "comm/base/bytes.h"
#include "comm/device/device.h"
#include "tests/trainer/zero_passes.h"
#include "trainer/ops/flat.h"
#include "trainer/ops/kernels.h"
#include "trainer/optim/muon.h"

#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 4, K = 5, PASSES = 8 };

/* What a rank sees; `data` are all parameters, the others its runs of the block. */
struct seen {
    double norm[STEPS];
    float grad[STEPS][TOTAL], data[STEPS][TOTAL];
    float m[TOTAL], v[TOTAL];
    float used[STEPS][PASSES][TOTAL]; /* parameters where tensors point, in each pass */
};

struct run {
    struct zero_options o;
    bool gpu;
    struct seen *seen; /* [RANKS] */
};

/* A rank on its device. */
struct place {
    struct params *ps;
    struct zero *z;
    struct compute *c;       /* NULL: the host */
    float *room;             /* [TOTAL] there */
    struct clipped *clipped; /* there */
    struct seen *seen;
};

/* Backward of a unit, by kernels. */
static status *add_unit(const struct place *w, int unit, uint32_t step, uint32_t micro)
{
    for (int i = 0; i < PARAMS; i++) {
        const struct param *p = &w->ps->p[i];
        if (p->alias >= 0 || p->block + 1 != unit)
            continue;
        TRY(compute_put(w->c, w->room + p->offset, gradient[step][micro] + p->offset, elems_of_row(i) * sizeof(float)));
        flat_add(w->c, p->value.grad, w->room + p->offset, elems_of_row(i));
    }
    return NULL;
}

/* What a pass finds where tensors of a unit point. */
static status *look_at(const struct place *w, int unit, float *used)
{
    static const size_t bytes[] = { [DTYPE_F32] = 4, [DTYPE_BF16] = 2 };
    for (int i = 0; i < PARAMS; i++) {
        const struct param *p = &w->ps->p[i];
        float *to = used + p->offset;
        uint16_t low[70 * 70];
        if (p->alias >= 0 || p->block + 1 != unit)
            continue;
        bool bf16 = p->value.dtype == DTYPE_BF16;
        TRY(compute_get(w->c, bf16 ? (void *)low : to, p->value.data,
                        elems_of_row(i) * bytes[bf16 ? DTYPE_BF16 : DTYPE_F32]));
        for (uint64_t e = 0; bf16 && e < elems_of_row(i); e++)
            to[e] = bf16_to_f32(low[e]);
    }
    return NULL;
}

static status *pass_of(const struct place *w, uint32_t step, uint32_t micro, float *used)
{
    struct shards *s = zero_shards(w->z);
    const struct tape_blocks *h = s ? shards_hooks(s) : NULL;
    if (s)
        TRY(shards_begin(s, true));
    TRY(look_at(w, 0, used));
    for (int i = 0; i < UNITS - 1; i++) {
        if (s)
            TRY(h->enter(h->arg, i, false));
        TRY(look_at(w, i + 1, used));
        if (s)
            TRY(h->leave(h->arg, i, false));
    }
    for (int i = UNITS - 1; i-- > 0;) {
        if (s)
            TRY(h->enter(h->arg, i, true));
        TRY(add_unit(w, i + 1, step, micro));
        if (s)
            TRY(h->leave(h->arg, i, true));
        TRY(zero_left(w->z, i + 1));
    }
    TRY(add_unit(w, 0, step, micro));
    return zero_added(w->z, micro);
}

static status *passes_of(const struct place *w, uint32_t step)
{
    uint32_t i;
    zero_begin(w->z, K);
    for (uint32_t pass = 0; pass < zero_passes(w->z, K); pass++) {
        if (zero_micro_batch(w->z, K, pass, &i)) {
            TRY(pass_of(w, step, i, w->seen->used[step][pass]));
        } else {
            TRY(shards_idle(zero_shards(w->z), 0));
            TRY(zero_idle(w->z, 0));
        }
    }
    return NULL;
}

/* Of runs, from where they lie one after another. */
static status *take(const struct place *w, const float *from, const struct zero_run *run, uint64_t runs, float *to)
{
    for (uint64_t r = 0; r < runs; from += run[r].end - run[r].begin, r++)
        TRY(compute_get(w->c, to + run[r].begin, from, (run[r].end - run[r].begin) * sizeof *to));
    return NULL;
}

static status *all_values(const struct place *w, float *to)
{
    struct shards *s = zero_shards(w->z);
    if (!s || !shards_cut_values(s))
        return compute_get(w->c, to, w->ps->data, TOTAL * sizeof *to);
    TRY(shards_hold(s, true));
    status *st = compute_get(w->c, to, w->ps->p[0].value.data, TOTAL * sizeof *to);
    shards_release(s, false);
    return st;
}

static status *no_fence(void *arg, const void *addr, size_t bytes)
{
    *(size_t *)arg += addr ? bytes : 0;
    return NULL;
}

/* Moments, and parameters as far as this rank updates them or has them all. */
static status *look_at_state(const struct place *w, float *to)
{
    struct zero_moments m = zero_moments(w->z);
    TRY(take(w, m.m, m.run, m.run_count, to));
    TRY(take(w, m.v, m.v_run, m.v_run_count, to + TOTAL));
    return m.w ? take(w, m.w, m.run, m.run_count, to + 2 * TOTAL)
               : compute_get(w->c, to + 2 * TOTAL, w->ps->data, TOTAL * sizeof *to);
}

/* A norm that is not finite makes a factor by which an update leaves all as it is. */
static status *nothing_changes(const struct place *w, const struct adamw *a)
{
    static const double bad[] = { NAN, INFINITY };
    const struct kernels *k = compute_kernels(w->c);
    float *seen = mem_calloc(6 * TOTAL, sizeof *seen);
    struct adamw none = *a;
    struct clipped got = { 0 };
    none.scale = &w->clipped->scale;
    for (int i = 0; i < 2; i++) {
        TRY(look_at_state(w, seen));
        TRY(compute_put(w->c, &w->clipped->norm, &bad[i], sizeof *bad));
        k->clip(compute_workers(w->c, NULL), w->clipped, &w->clipped->norm, 1);
        TRY(zero_update(w->z, &none, NULL, NULL));
        TRY(compute_get(w->c, &got, w->clipped, sizeof got));
        EXPECT(isnan(got.scale) && !isfinite(got.norm), "a factor of %g", got.scale);
        TRY(look_at_state(w, seen + 3 * TOTAL));
        EXPECT(same(seen, seen + 3 * TOTAL, 3 * TOTAL * sizeof *seen), "an update without a norm");
    }
    mem_free(seen);
    return NULL;
}

static status *step_of(const struct place *w, uint32_t s)
{
    struct seen *x = w->seen;
    struct zero_moments m = zero_moments(w->z);
    TRY(passes_of(w, s));
    TRY(zero_reduce(w->z, &x->norm[s]));
    TRY(zero_spread_sums(w->z));
    for (uint64_t r = 0, before = 0; r < m.run_count; before += m.run[r].end - m.run[r].begin, r++)
        TRY(compute_get(w->c, x->grad[s] + m.run[r].begin, zero_sums(w->z, m.run[r], before),
                        (m.run[r].end - m.run[r].begin) * sizeof(float)));
    struct adamw a = adamw_of(s, x->norm[s]);
    size_t fenced = 0;
    TRY(nothing_changes(w, &a));
    TRY(compute_put(w->c, w->clipped, &(struct clipped){ x->norm[s], a.grad_scale }, sizeof *w->clipped));
    a.scale = &w->clipped->scale;
    a.grad_scale = NAN;
    TRY(zero_update(w->z, &a, no_fence, &fenced));
    EXPECT(fenced > 0, "nothing was announced");
    if (zero_shards(w->z))
        TRY(shards_refresh(zero_shards(w->z), s + 1, false));
    return all_values(w, x->data[s]);
}

static status *values_before(const struct place *w, const float *data)
{
    struct shards *s = zero_shards(w->z);
    if (!s || !shards_cut_values(s))
        return NULL;
    TRY(shards_hold(s, true));
    status *st = compute_put(w->c, w->ps->p[0].value.data, data, TOTAL * sizeof *data);
    shards_release(s, true);
    return st ? st : shards_refresh(s, 0, true);
}

/* The flat block's values and gradients go where the rank computes. */
static status *settle(struct place *w, float **data, float **grad)
{
    struct params *ps = w->ps;
    *data = ps->data;
    *grad = ps->grad;
    ps->compute = w->c;
    TRY(flat_alloc(w->c, TOTAL, "a test", &w->room));
    void *clipped;
    TRY(compute_alloc(w->c, sizeof *w->clipped, &clipped));
    w->clipped = clipped;
    if (compute_host(w->c))
        return NULL;
    ps->data = ps->grad = NULL;
    TRY(flat_alloc(w->c, TOTAL, "a test", &ps->data));
    TRY(flat_alloc(w->c, TOTAL, "a test", &ps->grad));
    TRY(compute_put(w->c, ps->data, *data, TOTAL * sizeof(float)));
    return compute_put(w->c, ps->grad, *grad, TOTAL * sizeof(float));
}

static void leave(struct place *w, float *data, float *grad)
{
    flat_free(w->c, w->room, TOTAL);
    compute_free(w->c, w->clipped, sizeof *w->clipped);
    if (!compute_host(w->c)) {
        flat_free(w->c, w->ps->data, TOTAL);
        flat_free(w->c, w->ps->grad, TOTAL);
    }
    w->ps->data = data;
    w->ps->grad = grad;
    params_drop(w->ps);
}

static status *steps_of(struct place *w, const struct zero_options *o, struct comm *dp)
{
    float *data, *grad;
    w->ps = params_make();
    status *st = settle(w, &data, &grad);
    for (int i = 0; i < PARAMS; i++) {
        w->ps->p[i].value.data = w->ps->data + w->ps->p[i].offset;
        w->ps->p[i].value.grad = w->ps->grad + w->ps->p[i].offset;
        w->ps->p[i].value.dtype = DTYPE_F32;
        w->ps->p[i].box = piece_whole(&w->ps->p[i].shape).box;
        snprintf(w->ps->p[i].name, sizeof w->ps->p[i].name, "parameter %d", i);
    }
    if (!st)
        st = zero_open(o, w->ps, dp, &w->z);
    if (!st)
        st = values_before(w, data);
    for (uint32_t s = 0; s < STEPS && !st; s++)
        st = step_of(w, s);
    if (!st) {
        struct zero_moments m = zero_moments(w->z);
        st = take(w, m.m, m.run, m.run_count, w->seen->m);
        if (!st)
            st = take(w, m.v, m.v_run, m.v_run_count, w->seen->v);
    }
    zero_close(w->z);
    leave(w, data, grad);
    return st;
}

static status *rank_main(struct comm *world, void *arg)
{
    const struct run *r = arg;
    struct place w = { .seen = &r->seen[world->rank] };
    struct device *d = NULL;
    struct comm *dp = NULL;
    if (!r->gpu)
        return steps_of(&w, &r->o, world);
    TRY(device_open("cuda", world->rank, &d));
    status *st = compute_open(d, NULL, true, &w.c);
    if (!st)
        st = comm_over(world, d, 0, &dp);
    if (!st)
        st = steps_of(&w, &r->o, dp);
    comm_close(dp);
    compute_close(w.c);
    device_close(d);
    return st;
}

/* The largest |a - b| / (|b| + floor). */
static double apart(const float *a, const float *b, size_t n, double floor)
{
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        double off = fabs((double)a[i] - (double)b[i]) / (fabs((double)b[i]) + floor);
        most = off > most ? off : most;
        if (isnan(off))
            return INFINITY;
    }
    return most;
}

static void compare(const struct zero_options *o, int dp, const struct seen *gpu, const struct seen *cpu)
{
    bool bf16 = o->param_dtype == DTYPE_BF16;
    for (int r = 0; r < dp; r++) {
        const struct seen *g = &gpu[r], *c = &cpu[r];
        for (int s = 0; s < STEPS; s++) {
            if (!same(g->grad[s], c->grad[s], sizeof c->grad[s]))
                fail_msg("stage %d, dp %d, rank %d, step %d: other gradients", o->stage, dp, r, s);
            assert_true(c->norm[s] > 0 && same(&g->norm[s], &c->norm[s], sizeof c->norm[s]));
            assert_true(apart(g->data[s], c->data[s], TOTAL, 1e-3) < 1e-4);
            for (int pass = 0; pass < PASSES; pass++)
                assert_true(apart(g->used[s][pass], c->used[s][pass], TOTAL, 1e-3) < (bf16 ? 0.01 : 1e-4));
        }
        assert_true(same(g->used[0], c->used[0], sizeof c->used[0])); /* before any update; rounded values too */
        assert_true(apart(g->m, c->m, TOTAL, 1e-3) < 1e-4 && apart(g->v, c->v, TOTAL, 1e-3) < 1e-4);
    }
    assert_true(cpu->norm[0] != cpu->norm[1] && !same(cpu->used[0][0], cpu->used[1][0], sizeof cpu->used[0][0]));
}

static void run_both(struct zero_options o, int dp)
{
    struct seen *seen[2];
    for (int gpu = 0; gpu < 2; gpu++) {
        seen[gpu] = mem_calloc(RANKS, sizeof(struct seen));
        struct run r = { o, gpu, seen[gpu] };
        expect_ok(status_wrap(comm_threads_run(dp, rank_main, &r), "stage %d, dp %d, %d shards%s", o.stage, dp,
                              o.shards, gpu ? ", on the GPU" : ""));
    }
    compare(&o, dp, seen[1], seen[0]);
    mem_free(seen[0]);
    mem_free(seen[1]);
}

static void all_stages(void **state)
{
    (void)state;
    for (int stage = 0; stage <= 3; stage++)
        for (int dp = 1; dp <= 4; dp *= 2)
            run_both((struct zero_options){ .stage = stage,
                                            .deterministic = true,
                                            .lanes = 4,
                                            .bucket_elems = dp == 2 ? 3 * PARAM_ALIGN : 1 << 20,
                                            .shards = stage && dp == 4 ? 2 : 0 },
                     dp);
}

static void lanes_off(void **state)
{
    (void)state;
    for (int stage = 0; stage <= 3; stage += 2)
        run_both((struct zero_options){ .stage = stage, .lanes = 4, .bucket_elems = 3 * PARAM_ALIGN }, 3);
}

static void bf16(void **state)
{
    (void)state;
    for (int stage = 0; stage <= 3; stage++)
        for (int dp = 1; dp <= 3; dp += 2)
            run_both((struct zero_options){ .stage = stage,
                                            .deterministic = true,
                                            .lanes = 4,
                                            .bucket_elems = 3 * PARAM_ALIGN,
                                            .param_dtype = DTYPE_BF16,
                                            .grad_dtype = DTYPE_BF16,
                                            .stochastic = stage % 2,
                                            .seed = 9 },
                     dp);
}

/* ---- initial values ---- */

static void initial_values(void **state)
{
    (void)state;
    const struct tp_place places[] = { { .size = 1 }, { .size = 2, .rank = 1 } };
    const struct model_ops *ops;
    struct device *d;
    struct compute *c;
    expect_ok(model_lookup("llama", &ops));
    expect_ok(device_open("cuda", 0, &d));
    expect_ok(compute_open(d, NULL, true, &c));
    for (int i = 0; i < 2; i++) {
        struct model *m[2];
        void *config = mem_calloc(1, ops->config_bytes);
        expect_ok(options_defaults(ops->options, config));
        static const char *const set[][2] = {
            { "layers", "2" }, { "hidden", "328" }, { "heads", "4" }, { "ffn", "450" }
        };
        for (size_t k = 0; k < 4; k++)
            expect_ok(options_set(ops->options, set[k][0], set[k][1], config, "test"));
        for (int gpu = 0; gpu < 2; gpu++) {
            expect_ok(model_open_at(ops, config, 301, &places[i], &m[gpu]));
            m[gpu]->params.compute = m[gpu]->tied.compute = gpu ? c : NULL;
            expect_ok(model_alloc(m[gpu], true));
            expect_ok(params_init(&m[gpu]->params, 42));
        }
        options_fini(ops->options, config);
        mem_free(config);
        size_t bytes = params_bytes(&m[0]->params);
        float *there = mem_alloc(bytes);
        expect_ok(compute_get(c, there, m[1]->params.data, bytes));
        assert_memory_equal(there, m[0]->params.data, bytes);
        uint32_t crc = 0;
        expect_ok(flat_crc(c, m[1]->params.data, bytes, &crc));
        assert_int_equal(crc, crc32c(0, there, bytes));
        mem_free(there);
        model_close(m[0]);
        model_close(m[1]);
    }
    compute_close(c);
    device_close(d);
}

/* ---- Muon's matrices, by kernels ---- */

static void matrices(void **state)
{
    (void)state;
    static const uint64_t shapes[][2] = { { 24, 24 }, { 20, 63 }, { 71, 18 }, { 1, 40 }, { 40, 1 }, { 33, 64 } };
    enum { MOST = 64 * 72 };
    struct device *d;
    struct compute *c;
    expect_ok(device_open("cuda", 0, &d));
    expect_ok(compute_open(d, NULL, true, &c));
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        uint64_t rows = shapes[i / 2][0], cols = shapes[i / 2][1], n = rows * cols, room = muon_room(rows, cols) + 2;
        struct muon o = { 0.02, 0.95, 0.1, 0.5, i % 2, i % 2 ? MUON_ORIGINAL : MUON_MATCH_RMS_ADAMW };
        float host[3][MOST], got[3][MOST], *there[3], *there_room, *host_room = mem_array(NULL, room, sizeof(float));
        expect_ok(flat_alloc(c, room, "a test", &there_room));
        for (int k = 0; k < 3; k++) { /* gradient, momentum, weights */
            for (uint64_t e = 0; e < n; e++)
                host[k][e] = draw((uint32_t)(k + 5), (uint32_t)i, e) / 64;
            expect_ok(flat_alloc(c, n, "a test", &there[k]));
            expect_ok(compute_put(c, there[k], host[k], n * sizeof(float)));
        }
        muon_momentum(&o, NULL, host[0], host[1], n);
        expect_ok(muon_orthogonalise(NULL, NULL, host[0], rows, cols, host_room));
        muon_apply(&o, NULL, host[2], host[0], n, rows, cols);
        muon_momentum(&o, c, there[0], there[1], n);
        expect_ok(muon_orthogonalise(c, NULL, there[0], rows, cols, there_room));
        muon_apply(&o, c, there[2], there[0], n, rows, cols);
        for (int k = 0; k < 3; k++) {
            expect_ok(compute_get(c, got[k], there[k], n * sizeof(float)));
            if (apart(got[k], host[k], n, 1) > 1e-4)
                fail_msg("[%d, %d]: %s apart by %g", (int)rows, (int)cols,
                         k == 0   ? "directions"
                         : k == 1 ? "momentum"
                                  : "weights",
                         apart(got[k], host[k], n, 1));
            flat_free(c, there[k], n);
        }
        flat_free(c, there_room, room);
        mem_free(host_room);
    }
    compute_close(c);
    device_close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(initial_values), cmocka_unit_test(matrices), cmocka_unit_test(all_stages),
        cmocka_unit_test(lanes_off),      cmocka_unit_test(bf16),
    };
    if (setenv("TESSERA_PLUGINS", "emu", 1))
        return 1;
    return cmocka_run_group_tests(tests, make_gradients, drop_gradients);
}
