/* zero against a plain implementation of its definition: gradients, norms, weights and moments bit for bit, over dp
 * sizes, stages, bucket sizes, lanes and numbers of micro-batches. Ranks are threads. The rest of what it promises:
 * test_zero_calls.c. */
#include "comm/base/bytes.h"
#include "tests/support/comm_threads.h"
#include "tests/trainer/zero_passes.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/ops.h"
#include "trainer/parallel/treesum.h"

/* ---- the definition, in one process ---- */

static float rounded(bool bf16, float x)
{
    return bf16 ? bf16_to_f32(bf16_from_f32(x)) : x;
}

/* Sum of element e over lanes [lo, hi) of `lanes`, halves first; false: no micro-batch lies in them. bf16: leaves,
 * lanes and nodes are rounded to it. */
static bool lane_tree(uint32_t step, uint32_t k, uint32_t lanes, bool bf16, uint32_t lo, uint32_t hi, uint64_t e,
                      float *out)
{
    if (hi - lo == 1) {
        uint32_t first = lo * k / lanes, end = hi * k / lanes;
        float sum = 0;
        for (uint32_t i = first; i < end; i++)
            sum += rounded(bf16, gradient[step][i][e]);
        *out = rounded(bf16, sum);
        return first < end;
    }
    float a = 0, b = 0;
    bool left = lane_tree(step, k, lanes, bf16, lo, (lo + hi) / 2, e, &a);
    bool right = lane_tree(step, k, lanes, bf16, (lo + hi) / 2, hi, e, &b);
    *out = left && right ? rounded(bf16, a + b) : left ? a : b;
    return left || right;
}

/* deterministic off: a lane a rank, added in order. */
static float lane_chain(uint32_t step, uint32_t k, uint32_t ranks, uint64_t e)
{
    float sum = 0;
    bool any = false;
    for (uint32_t r = 0; r < ranks; r++) {
        float lane;
        if (!lane_tree(step, k, ranks, false, r, r + 1, e, &lane))
            continue;
        sum = any ? sum + lane : lane;
        any = true;
    }
    return sum;
}

/* Sum of leaves [lo, lo + size) of n, halves first; false: all lie past the end. */
static bool brute_tree(const double *leaf, uint64_t n, uint64_t lo, uint64_t size, double *out)
{
    if (lo >= n)
        return false;
    if (size == 1) {
        *out = leaf[lo];
        return true;
    }
    double a = 0, b = 0;
    brute_tree(leaf, n, lo, size / 2, &a);
    *out = brute_tree(leaf, n, lo + size / 2, size / 2, &b) ? a + b : a;
    return true;
}

static double brute_norm(const float *x)
{
    double block[BLOCKS], sum;
    long double plain = 0;
    for (int b = 0; b < BLOCKS; b++)
        block_sums(NULL, x + b * PARAM_ALIGN, PARAM_ALIGN, true, &block[b]);
    brute_tree(block, BLOCKS, 0, 16, &sum);
    for (int e = 0; e < TOTAL; e++)
        plain += (long double)x[e] * (long double)x[e];
    assert_true(fabsl(plain - (long double)sum) <= 1e-13L * plain);
    return sqrt(sum);
}

struct expected {
    struct zero_options o;
    uint32_t k;
    int chunks; /* runs of units, which go backward one after another */
    struct {
        float grad[TOTAL], data[TOTAL], m[TOTAL], v[TOTAL]; /* after the step */
        double norm;
    } at[STEPS];
};

static void expect_step(struct expected *x, uint32_t s, const struct params *ps, uint32_t ranks)
{
    for (uint64_t e = 0; e < TOTAL; e++)
        if (!x->o.deterministic)
            x->at[s].grad[e] = lane_chain(s, x->k, ranks, e);
        else
            lane_tree(s, x->k, (uint32_t)x->o.lanes, x->o.grad_dtype == DTYPE_BF16, 0, (uint32_t)x->o.lanes, e,
                      &x->at[s].grad[e]);
    x->at[s].norm = brute_norm(x->at[s].grad);
    struct adamw a = adamw_of(s, x->at[s].norm);
    memcpy(x->at[s].data, s ? x->at[s - 1].data : ps->data, sizeof x->at[s].data);
    memcpy(x->at[s].m, s ? x->at[s - 1].m : x->at[s].m, sizeof x->at[s].m);
    memcpy(x->at[s].v, s ? x->at[s - 1].v : x->at[s].v, sizeof x->at[s].v);
    for (int i = 0; i < PARAMS; i++) {
        uint64_t off = ps->p[i].offset, n = param_rows[i].rows * (param_rows[i].cols ? param_rows[i].cols : 1);
        if (ps->p[i].alias < 0)
            adamw_update(NULL, x->at[s].data + off, x->at[s].grad + off, x->at[s].m + off, x->at[s].v + off, n, a.lr,
                         a.beta1, a.beta2, a.eps, ps->p[i].decay ? a.weight_decay : 0, a.step, a.grad_scale);
    }
}

static struct expected *expect(struct zero_options o, uint32_t k, uint32_t ranks)
{
    struct expected *x = mem_calloc(1, sizeof *x);
    x->o = o;
    x->k = k;
    struct params *ps = params_make();
    for (uint32_t s = 0; s < STEPS; s++)
        expect_step(x, s, ps, ranks);
    params_drop(ps);
    return x;
}

/* ---- one job ---- */

/* What the fence sees: the bytes must not have been overwritten yet. */
struct watch {
    const float *values; /* what this rank holds of the parameters */
    uint64_t value_elems;
    struct zero_moments mom;
    float data[TOTAL], m[TOTAL], v[TOTAL]; /* before the update */
    uint8_t data_seen[BLOCKS], m_seen[BLOCKS], v_seen[BLOCKS];
    bool bad;
};

static void watch_range(struct watch *w, const float *block, const float *old, uint8_t *seen, uint64_t elems,
                        const float *addr, size_t bytes)
{
    if (addr < block || addr >= block + elems)
        return;
    size_t at = (size_t)(addr - block), n = bytes / sizeof(float);
    w->bad = w->bad || at + n > elems || at % PARAM_ALIGN || n % PARAM_ALIGN || !same(addr, old + at, bytes);
    for (size_t b = at / PARAM_ALIGN; !w->bad && b < (at + n) / PARAM_ALIGN; b++)
        seen[b] = 1;
}

static status *watch_fence(void *arg, const void *addr, size_t bytes)
{
    struct watch *w = arg;
    watch_range(w, w->values, w->data, w->data_seen, w->value_elems, addr, bytes);
    watch_range(w, w->mom.m, w->m, w->m_seen, w->mom.elems, addr, bytes);
    watch_range(w, w->mom.v, w->v, w->v_seen, w->mom.elems, addr, bytes);
    return NULL;
}

static void watch_start(struct watch *w, const struct params *ps, struct zero_moments mom)
{
    *w = (struct watch){ .values = mom.w ? mom.w : ps->data, .value_elems = mom.w ? mom.elems : TOTAL, .mom = mom };
    memcpy(w->data, w->values, w->value_elems * sizeof(float));
    memcpy(w->m, mom.m, mom.elems * sizeof(float));
    memcpy(w->v, mom.v, mom.elems * sizeof(float));
}

static status *watch_check(const struct watch *w)
{
    EXPECT(!w->bad, "the fence was called for bytes that had changed, or for a wrong range");
    for (uint64_t b = 0; b < w->value_elems / PARAM_ALIGN; b++)
        EXPECT(w->data_seen[b], "parameters of block %d were not announced", (int)b);
    for (uint64_t b = 0; b < w->mom.elems / PARAM_ALIGN; b++)
        EXPECT(w->m_seen[b] && w->v_seen[b], "moments of block %d were not announced", (int)b);
    return NULL;
}

/* Compare what the moments' runs hold, and the gradients there, with the whole blocks of the definition. */
static status *check_runs(const struct zero_moments *mom, const float *grad, const struct expected *x, uint32_t s,
                          bool moments)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < mom->run_count; i++) {
        uint64_t begin = mom->run[i].begin, n = mom->run[i].end - begin;
        if (grad)
            EXPECT(same(grad + begin, x->at[s].grad + begin, n * sizeof(float)), "step %u: gradients of run %d", s,
                   (int)i);
        if (moments)
            EXPECT(same(mom->m + at, x->at[s].m + begin, n * sizeof(float)) &&
                       same(mom->v + at, x->at[s].v + begin, n * sizeof(float)),
                   "step %u: moments of run %d", s, (int)i);
        at += n;
    }
    return NULL;
}

/* Parameters after a step: of this rank's runs, and whole. */
static status *check_values(struct zero *z, struct params *ps, const struct expected *x, uint32_t s)
{
    struct zero_moments mom = zero_moments(z);
    uint64_t at = 0;
    for (uint64_t i = 0; mom.w && i < mom.run_count; i++) {
        uint64_t begin = mom.run[i].begin, n = mom.run[i].end - begin;
        EXPECT(same(mom.w + at, x->at[s].data + begin, n * sizeof(float)), "step %u: parameters of run %d", s, (int)i);
        at += n;
    }
    if (!mom.w)
        EXPECT(same(ps->data, x->at[s].data, sizeof x->at[s].data), "step %u: parameters", s);
    if (!mom.w)
        return NULL;
    uint32_t crc;
    TRY(shards_crc(zero_shards(z), &crc));
    EXPECT(crc == crc32c(0, x->at[s].data, sizeof x->at[s].data), "step %u: the whole has another checksum", s);
    TRY(shards_hold(zero_shards(z), true));
    status *st = NULL;
    for (int unit = 0; !st && unit < UNITS; unit++)
        st = check_unit(ps, unit, x->at[s].data);
    shards_release(zero_shards(z), s == 1);
    return st;
}

static status *job_step(struct zero *z, struct params *ps, struct watch *w, const struct expected *x, uint32_t s)
{
    double norm;
    TRY(run_micro_batches(z, ps, s, x->k, s ? x->at[s - 1].data : NULL));
    TRY(zero_reduce(z, &norm));
    struct zero_moments mom = zero_moments(z);
    EXPECT(same(&norm, &x->at[s].norm, sizeof norm), "step %u: norm %.17g, not %.17g", s, norm, x->at[s].norm);
    if (x->o.stage == 1)
        TRY(check_runs(&mom, ps->grad, x, s, false));
    struct adamw a = adamw_of(s, norm);
    watch_start(w, ps, mom);
    TRY(zero_update(z, &a, s ? watch_fence : NULL, w));
    if (s)
        TRY(watch_check(w));
    TRY(check_values(z, ps, x, s));
    if (x->o.stage == 0)
        EXPECT(same(ps->grad, x->at[s].grad, sizeof x->at[s].grad), "step %u: gathered gradients", s);
    return check_runs(&mom, NULL, x, s, true);
}

/* Stage 1 and up: every block has one owner a replica. Stage 0: everybody has all. Moments lie run after run and can be
 * reset. */
static status *check_tiling(struct comm *c, struct zero *z, int owned)
{
    struct zero_moments mom = zero_moments(z);
    int32_t owners[BLOCKS] = { 0 };
    uint64_t elems = 0, last = 0;
    for (uint64_t i = 0; i < mom.run_count; i++) {
        struct zero_run r = mom.run[i];
        EXPECT(r.begin >= last && r.begin < r.end && r.begin % PARAM_ALIGN == 0 && r.end % PARAM_ALIGN == 0, "run %d",
               (int)i);
        for (uint64_t b = r.begin / PARAM_ALIGN; b < r.end / PARAM_ALIGN; b++)
            owners[b]++;
        elems += r.end - r.begin;
        last = r.end;
    }
    EXPECT(elems == mom.elems, "the runs do not add up to the moments");
    TRY(comm_allreduce(c, owners, BLOCKS, COMM_I32, COMM_SUM, NULL));
    for (int b = 0; b < BLOCKS; b++)
        EXPECT(owners[b] == owned, "block %d has %d owners", b, owners[b]);
    zero_reset_moments(z);
    for (uint64_t e = 0; e < elems; e++)
        EXPECT(mom.m[e] == 0 && mom.v[e] == 0, "a moment outlived its reset");
    return NULL;
}

/* Runs of units of about the same length, all of the model. */
static void cut_chunks(struct params *ps, int chunks)
{
    ps->chunks = chunks;
    for (int c = 0; c < chunks; c++) {
        ps->chunk[c] = (struct param_chunk){ .unit_begin = UNITS * c / chunks, .unit_end = UNITS * (c + 1) / chunks };
        for (int i = 0; i < PARAMS; i++)
            if (ps->p[i].alias < 0 && ps->p[i].unit < ps->chunk[c].unit_begin)
                ps->chunk[c].begin = ps->p[i].offset + (elems_of_row(i) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
        ps->chunk[c].before = ps->chunk[c].begin;
    }
}

static status *job(struct comm *c, void *arg)
{
    const struct expected *x = arg;
    struct params *ps = params_make();
    struct watch *w = mem_alloc(sizeof *w);
    struct zero *z = NULL;
    struct zero_options o = x->o;
    status *st = x->chunks ? comm_split(c, c->rank, 0, &o.pp) : NULL; /* a pipeline of one rank */
    cut_chunks(ps, x->chunks);
    if (!st)
        st = zero_open(&o, ps, c, &z);
    if (!st && x->o.stage == 3) { /* values from before; paddings too */
        st = shards_hold(zero_shards(z), true);
        if (!st)
            memcpy(ps->p[0].value.data, ps->data, TOTAL * sizeof(float));
        shards_release(zero_shards(z), true);
    }
    for (uint32_t s = 0; !st && s < STEPS; s++)
        st = job_step(z, ps, w, x, s);
    if (!st)
        st = check_tiling(c, z, !x->o.stage ? c->size : x->o.shards ? c->size / x->o.shards : 1);
    zero_close(z);
    comm_close(o.pp);
    mem_free(w);
    params_drop(ps);
    return st;
}

static const uint64_t bucket_sizes[] = { PARAM_ALIGN, 3 * PARAM_ALIGN, 1 << 30 };

static void run_jobs(struct expected *x, int dp)
{
    for (x->o.stage = 0; x->o.stage <= 3; x->o.stage++)
        for (size_t b = 0; b < 3; b++) {
            x->o.bucket_elems = bucket_sizes[b];
            x->o.shards = x->o.deterministic && dp % 2 == 0 && b ? dp / 2 << (b - 1) : 0; /* dp / 2, dp */
            if (!x->o.deterministic && x->o.stage > 1)
                continue; /* another sum: see test_not_deterministic */
            status *st = comm_threads_run(dp, job, x);
            expect_ok(status_wrap(st, "dp %d, %d shards, stage %d, buckets of %llu, K = %u, %d lanes", dp, x->o.shards,
                                  x->o.stage, (unsigned long long)bucket_sizes[b], x->k, x->o.lanes));
        }
}

static void test_eight_lanes(void **state)
{
    (void)state;
    const uint32_t ks[] = { 0, 1, 2, 5, 8, 13, 16 };
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
        struct expected *x = expect((struct zero_options){ .deterministic = true, .lanes = 8 }, ks[i], 0);
        for (int dp = 1; dp <= 8; dp++)
            run_jobs(x, dp);
        mem_free(x);
    }
}

static void test_other_lanes(void **state)
{
    (void)state;
    const int lanes[] = { 1, 2, 4, 16, 64 };
    const uint32_t ks[] = { 3, 19, 40 };
    for (size_t l = 0; l < sizeof lanes / sizeof *lanes; l++)
        for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
            struct expected *x = expect((struct zero_options){ .deterministic = true, .lanes = lanes[l] }, ks[i], 0);
            for (int dp = 1; dp <= 5 && dp <= lanes[l]; dp += 2)
                run_jobs(x, dp);
            mem_free(x);
        }
}

/* Gradients that travel in bf16. */
static void test_low_gradients(void **state)
{
    (void)state;
    static const struct {
        int lanes, dp;
        uint32_t k;
    } cases[] = { { 8, 1, 13 }, { 8, 4, 13 }, { 8, 3, 5 }, { 4, 2, 19 }, { 8, 8, 8 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct zero_options o = { .deterministic = true, .lanes = cases[i].lanes, .grad_dtype = DTYPE_BF16 };
        struct expected *x = expect(o, cases[i].k, 0);
        run_jobs(x, cases[i].dp);
        mem_free(x);
    }
}

static void test_not_deterministic(void **state)
{
    (void)state;
    const uint32_t ks[] = { 2, 7, 13 };
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++)
        for (int dp = 1; dp <= 6; dp += dp == 3 ? 3 : 1) {
            struct expected *x = expect((struct zero_options){ .lanes = 3 }, ks[i], (uint32_t)dp);
            run_jobs(x, dp);
            mem_free(x);
        }
    for (int shards = 1; shards <= 6; shards += shards == 3 ? 3 : 1) { /* a replica is a lane */
        struct expected *x = expect((struct zero_options){ .lanes = 3 }, 13, 6 / (uint32_t)shards);
        x->o.shards = shards;
        x->o.bucket_elems = 3 * PARAM_ALIGN;
        for (x->o.stage = 2; x->o.stage <= 3; x->o.stage++)
            expect_ok(status_wrap(comm_threads_run(6, job, x), "%d shards, stage %d", shards, x->o.stage));
        mem_free(x);
    }
}

/* Stages of the pipeline that take turns on a rank: buckets lie in two or three of them. */
static void test_chunks(void **state)
{
    (void)state;
    for (uint32_t k = 0; k <= 13; k += k == 0 ? 3 : 5) {
        struct expected *x = expect((struct zero_options){ .deterministic = true, .lanes = 8 }, k, 0);
        for (x->chunks = 2; x->chunks <= UNITS; x->chunks++)
            for (int i = 0; i < 24; i++) {
                x->o.stage = i % 2;
                x->o.bucket_elems = bucket_sizes[i / 2 % 3];
                int dp = 1 + i / 6;
                expect_ok(status_wrap(comm_threads_run(dp, job, x),
                                      "dp %d, %d chunks, stage %d, buckets of %llu, K = %u", dp, x->chunks, x->o.stage,
                                      (unsigned long long)x->o.bucket_elems, k));
            }
        mem_free(x);
    }
}

/* ---- AdamW, written again in double ---- */

static void test_adamw_in_double(void **state)
{
    (void)state;
    struct expected *x = expect((struct zero_options){ .deterministic = true, .lanes = 8 }, 8, 0);
    struct params *ps = params_make();
    for (uint64_t e = 0; e < TOTAL; e++) {
        double p = ps->data[e], m = 0, v = 0;
        int owner = -1;
        for (int i = 0; i < PARAMS; i++)
            if (param_rows[i].alias < 0 && e >= ps->p[i].offset)
                owner = i;
        for (uint32_t s = 0; s < STEPS && in_param(ps, e); s++) {
            struct adamw a = adamw_of(s, x->at[s].norm);
            double g = a.grad_scale * (double)x->at[s].grad[e], t = s + 1;
            m = 0.9 * m + 0.1 * g;
            v = 0.95 * v + 0.05 * g * g;
            double hat_m = m / (1 - pow(0.9, t)), hat_v = v / (1 - pow(0.95, t));
            p -= a.lr * (hat_m / (sqrt(hat_v) + 1e-8) + (param_rows[owner].decay ? 0.1 * p : 0));
        }
        assert_true(fabs(p - (double)x->at[STEPS - 1].data[e]) <= 1e-6 * (1 + fabs(p)));
    }
    params_drop(ps);
    mem_free(x);
}

/* ---- the tree of scalars ---- */

/* Every cut of n leaves into three runs, each cut into its nodes alone, finishes to the bits of one pass. */
static void test_tree(void **state)
{
    (void)state;
    double leaf[64], copy[64], whole = 0;
    for (uint32_t i = 0; i < 64; i++)
        leaf[i] = scalar(i, 1);
    for (uint64_t n = 0; n <= 37; n++) {
        brute_tree(leaf, n, 0, 64, &whole);
        memcpy(copy, leaf, sizeof leaf);
        double once = tree_sum(copy, (int64_t)n);
        assert_true(n ? same(&once, &whole, sizeof whole) : once == 0);
        for (uint64_t cut = 0; cut <= n * n; cut++) {
            uint64_t a = n ? cut / n : 0, b = n ? a + cut % n : 0, ends[] = { 0, a, b < n ? b : n, n };
            struct tree all = { 0 };
            struct sum_plan p = { 0 };
            uint32_t at_leaf = plan_slots(&p, n);
            for (int run = 0; run < 3; run++) {
                struct tree part = { 0 };
                for (uint64_t i = ends[run]; i < ends[run + 1]; i++)
                    tree_push(&p, &part, 0, i, at_leaf + (uint32_t)i);
                uint64_t at = ends[run];
                assert_int_equal(part.n, tree_node_count(at, ends[run + 1]));
                for (int i = 0; i < part.n; i++) {
                    unsigned level = tree_level(at, ends[run + 1]);
                    tree_push(&p, &all, level, at >> level, part.node[i].slot);
                    at += (uint64_t)1 << level;
                }
            }
            uint32_t total = tree_total(&p, &all);
            int phase = plan_phase(&p);
            expect_ok(plan_ready(&p, NULL, NULL));
            memcpy(p.v + at_leaf, leaf, n * sizeof *leaf);
            plan_run(&p, phase);
            double sum = p.v[total];
            plan_close(&p);
            assert_true(n ? same(&sum, &whole, sizeof sum) : sum == 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tree),
        cmocka_unit_test(test_eight_lanes),
        cmocka_unit_test(test_other_lanes),
        cmocka_unit_test(test_low_gradients),
        cmocka_unit_test(test_not_deterministic),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_adamw_in_double),
    };
    return cmocka_run_group_tests(tests, make_gradients, drop_gradients);
}
