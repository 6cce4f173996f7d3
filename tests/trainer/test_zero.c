/* zero against a plain implementation of its definition: gradients, norms, weights and moments bit for bit, over dp
 * sizes, stages, bucket sizes, lanes and numbers of micro-batches. Ranks are threads. Micro-batches' gradients are
 * tables of wide range, so that another order of additions shows. Rank functions return errors; only the main thread
 * asserts. */
#include "trainer/parallel/zero.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/ops.h"
#include "trainer/parallel/shards.h"
#include "trainer/parallel/treesum.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

enum { BLOCKS = 13, TOTAL = BLOCKS * PARAM_ALIGN, STEPS = 3, MICRO = 40, PARAMS = 6 };

static const struct {
    uint64_t rows, cols; /* cols 0: a vector */
    bool decay;
    int alias, block; /* block -1: in none */
} param_rows[PARAMS] = {
    { 60, 50, true, -1, -1 }, { 1024, 0, false, -1, 0 }, { 2, 1025, true, -1, 1 },
    { 60, 50, false, 0, -1 }, /* shares the first one's memory; were it updated, it would be updated twice */
    { 1, 0, false, -1, 1 },   { 70, 70, true, -1, 2 },
};
enum { UNITS = 4 };

#define EXPECT(cond, ...)                                                                                              \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            return ERR(INTERNAL, __VA_ARGS__);                                                                         \
    } while (0)

static void expect_ok(status *st)
{
    if (st)
        fail_msg("rank %d: %s (%s:%d)", status_rank(st), status_message(st), status_file(st), status_line(st));
}

static void expect_code(status *st, enum status_code code)
{
    assert_int_equal(status_code(st), code);
    status_free(st);
}

static bool same(const void *a, const void *b, size_t n)
{
    return memcmp(a, b, n) == 0;
}

/* ---- parameters and gradients ---- */

/* Is element e of the flat block part of a parameter? */
static bool in_param(const struct params *ps, uint64_t e)
{
    for (int i = 0; i < ps->count; i++)
        if (e >= ps->p[i].offset &&
            e < ps->p[i].offset + param_rows[i].rows * (param_rows[i].cols ? param_rows[i].cols : 1))
            return true;
    return false;
}

static float draw(uint32_t sample, uint32_t step, uint64_t e)
{
    struct rng_at at = { 5, sample, step, RNG_DATA };
    double u = 2 * rng_uniform(at, 2 * e) - 1;
    return (float)ldexp(u, (int)(rng_u32(at, 2 * e + 1) % 14) - 7);
}

/* Paddings hold 7: nothing may touch them. */
static struct params *params_make(void)
{
    struct params *ps = mem_calloc(1, sizeof *ps);
    ps->p = mem_calloc(PARAMS, sizeof *ps->p);
    ps->count = ps->cap = PARAMS;
    for (int i = 0; i < PARAMS; i++) {
        struct param *p = &ps->p[i];
        uint64_t rows = param_rows[i].rows, cols = param_rows[i].cols;
        p->shape = (struct shape){ .ndim = cols ? 2 : 1, .dim = { rows, cols } };
        p->value = (struct tensor){ .ndim = p->shape.ndim, .dim = { (int64_t)rows, (int64_t)cols } };
        p->decay = param_rows[i].decay;
        p->alias = param_rows[i].alias;
        p->block = param_rows[i].block;
        p->unit = p->block + 1;
        p->offset = p->alias >= 0 ? ps->p[p->alias].offset : ps->total;
        if (p->alias < 0)
            ps->total += (rows * (cols ? cols : 1) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    }
    assert_int_equal(ps->total, TOTAL);
    ps->data = mem_alloc(TOTAL * sizeof(float));
    ps->grad = mem_alloc(TOTAL * sizeof(float));
    for (int i = 0; i < PARAMS; i++)
        ps->p[i].value.data = ps->data + ps->p[i].offset;
    for (uint64_t e = 0; e < TOTAL; e++) {
        ps->data[e] = in_param(ps, e) ? draw(1000, 0, e) : 7;
        ps->grad[e] = 99; /* zero_begin clears it */
    }
    return ps;
}

static void params_drop(struct params *ps)
{
    mem_free(ps->grad);
    mem_free(ps->data);
    mem_free(ps->p);
    mem_free(ps);
}

/* gradient[step][micro][e], 0 in paddings: a pure function of its indices. */
static float (*gradient)[MICRO][TOTAL];

static int make_gradients(void **state)
{
    (void)state;
    gradient = mem_alloc(STEPS * sizeof *gradient);
    struct params *ps = params_make();
    for (uint32_t s = 0; s < STEPS; s++)
        for (uint32_t i = 0; i < MICRO; i++)
            for (uint64_t e = 0; e < TOTAL; e++)
                gradient[s][i][e] = in_param(ps, e) ? draw(i, s, e) : 0;
    params_drop(ps);
    return 0;
}

static int drop_gradients(void **state)
{
    (void)state;
    mem_free(gradient);
    return 0;
}

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

static struct adamw adamw_of(uint32_t step, double norm)
{
    return (struct adamw){ 1e-2 / (step + 1), 0.9, 0.95, 1e-8, 0.1, norm > 10 ? 10 / norm : 1, step + 1 };
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

static uint64_t elems_of_row(int i)
{
    return param_rows[i].rows * (param_rows[i].cols ? param_rows[i].cols : 1);
}

/* What backward does in a window: adds to what is there. */
static void add_gradients(struct params *ps, int unit, uint32_t step, uint32_t micro)
{
    for (int i = 0; i < PARAMS; i++)
        for (uint64_t e = 0; ps->p[i].alias < 0 && ps->p[i].block + 1 == unit && e < elems_of_row(i); e++)
            ps->p[i].value.grad[e] += gradient[step][micro][ps->p[i].offset + e];
}

/* Parameters of a unit, where tensors point, are those of step `step` - 1 (NULL: not compared). */
static status *check_unit(const struct params *ps, int unit, const float *want)
{
    for (int i = 0; i < PARAMS; i++)
        if (want && ps->p[i].block + 1 == unit)
            EXPECT(same(ps->p[i].value.data, want + ps->p[i].offset, elems_of_row(i) * sizeof(float)),
                   "unit %d has other parameters when it is used", unit);
    return NULL;
}

/* A pass as tape and trainer make it. */
static status *windowed_pass(struct zero *z, struct params *ps, uint32_t step, uint32_t micro, const float *data)
{
    struct shards *s = zero_shards(z);
    const struct tape_blocks *h = shards_hooks(s);
    TRY(shards_begin(s, true));
    TRY(check_unit(ps, 0, data));
    for (int i = 0; i < UNITS - 1; i++) {
        TRY(h->enter(h->arg, i, false));
        TRY(check_unit(ps, i + 1, data));
        TRY(h->leave(h->arg, i, false));
    }
    for (int i = UNITS - 1; i-- > 0;) {
        TRY(h->enter(h->arg, i, true));
        TRY(check_unit(ps, i + 1, data));
        add_gradients(ps, i + 1, step, micro);
        TRY(h->leave(h->arg, i, true));
    }
    add_gradients(ps, 0, step, micro);
    return zero_added(z, micro);
}

/* What backward does in the flat block, unit by unit: the others' gradients are not there yet. A rank may say that it
 * has left a unit, or not. */
static status *backward_of_chunk(struct zero *z, struct params *ps, uint32_t step, uint32_t micro, int chunk)
{
    for (int unit = UNITS; unit-- > 0;) {
        if (!params_hold(ps, chunk, unit))
            continue;
        for (int i = 0; i < PARAMS; i++)
            for (uint64_t e = 0; ps->p[i].alias < 0 && ps->p[i].unit == unit && e < elems_of_row(i); e++)
                ps->grad[ps->p[i].offset + e] += gradient[step][micro][ps->p[i].offset + e];
        if ((step + micro + (uint32_t)unit) % 4)
            TRY(zero_left(z, unit));
    }
    return NULL;
}

/* data: what parameters shall be; NULL: anything. */
static status *run_micro_batches(struct zero *z, struct params *ps, uint32_t step, uint32_t k, const float *data)
{
    uint32_t i;
    zero_begin(z, k);
    for (uint32_t pass = 0; pass < zero_passes(z, k); pass++) {
        if (!zero_micro_batch(z, k, pass, &i)) {
            TRY(shards_idle(zero_shards(z), 0));
            TRY(zero_idle(z, 0));
        } else if (zero_shards(z)) {
            TRY(windowed_pass(z, ps, step, i, data));
        } else if (params_chunks(ps) == 1) {
            TRY(backward_of_chunk(z, ps, step, i, 0));
            TRY(zero_added(z, i));
        }
    }
    for (int c = params_chunks(ps) > 1 ? params_chunks(ps) : 0; c-- > 0;)
        for (uint32_t pass = 0; pass < zero_passes(z, k) && zero_micro_batch(z, k, pass, &i); pass++) {
            TRY(backward_of_chunk(z, ps, step, i, c));
            TRY(zero_added_chunk(z, i, c));
        }
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

/* ---- a rank that fails while sums are under way ---- */

static status *broken_job(struct comm *c, void *arg)
{
    struct zero_options o = { .stage = *(int *)arg, .deterministic = true, .lanes = 8, .bucket_elems = PARAM_ALIGN };
    struct params *ps = params_make();
    struct zero *z = NULL;
    double norm;
    status *st = zero_open(&o, ps, c, &z);
    if (!st)
        zero_begin(z, (uint32_t)c->size);
    for (int unit = UNITS; !st && unit-- > 1;)
        st = zero_left(z, unit);
    if (!st && c->rank == 1)
        st = ERR(IO, "planted");
    if (!st)
        st = zero_added(z, (uint32_t)c->rank);
    st = st ? st : zero_reduce(z, &norm);
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_broken(void **state)
{
    (void)state;
    for (int stage = 0; stage <= 1; stage++)
        expect_code(comm_threads_run(4, broken_job, &stage), ST_IO);
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

/* ---- micro-batches and scalars ---- */

/* Each micro-batch is one rank's; groups have runs of them, the ranks of a group neighbours. */
static status *partition_job(struct comm *c, void *arg)
{
    struct zero_options o = *(struct zero_options *)arg;
    struct params *ps = params_make();
    struct zero *z = NULL;
    status *st = zero_open(&o, ps, c, &z);
    for (uint32_t k = 0; !st && k <= 70; k++) {
        int32_t runs[70] = { 0 }, wrong = 0;
        uint32_t width = o.stage < 2 ? 1 : (uint32_t)(o.shards ? o.shards : c->size),
                 groups = (uint32_t)c->size / width, group = (uint32_t)c->rank / width,
                 lanes = o.deterministic ? (uint32_t)o.lanes : groups, i, lane = group * lanes / groups,
                 last = (group + 1) * lanes / groups;
        for (uint32_t pass = 0; pass < zero_passes(z, k); pass++)
            if (zero_micro_batch(z, k, pass, &i)) {
                runs[i]++;
                wrong += i < lane * k / lanes || i >= last * k / lanes ||
                         i != lane * k / lanes + pass * width + (uint32_t)c->rank % width;
            }
        st = comm_allreduce(c, runs, 70, COMM_I32, COMM_SUM, NULL);
        for (i = 0; !st && i < 70; i++)
            if (runs[i] != (i < k) || wrong)
                st = ERR(INTERNAL, "K = %u: micro-batch %u is run %d times (%d out of place)", k, i, runs[i], wrong);
    }
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_micro_batches(void **state)
{
    (void)state;
    for (int lanes = 1; lanes <= 64; lanes *= 2)
        for (int dp = 1; dp <= 8; dp++) {
            struct zero_options o = { .deterministic = dp <= lanes, .lanes = lanes };
            expect_ok(comm_threads_run(dp, partition_job, &o));
            struct zero_options cut = { .stage = 2 + dp % 2, .deterministic = true, .lanes = lanes };
            cut.shards = dp % 2 || lanes < 2 ? dp : dp / 2;
            expect_ok(comm_threads_run(dp, partition_job, &cut));
        }
}

static double scalar(uint32_t k, uint32_t j)
{
    return (double)draw(k, 77 + j, 3) * 1e10 + (double)draw(k, 99, j);
}

static status *scalar_job(struct comm *c, void *arg)
{
    struct params *ps = params_make();
    struct zero_options o = { .stage = *(int *)arg, .deterministic = true, .lanes = 8 };
    struct zero *z = NULL;
    status *st = zero_open(&o, ps, c, &z);
    for (uint32_t k = 0; !st && k <= 13; k++)
        for (uint32_t width = 1; !st && width <= 4; width += 3) {
            double value[13 * 4], out[4];
            uint32_t mine;
            for (uint32_t i = 0; i < k * width; i++) /* what others ran is not ours to know */
                value[i] = NAN;
            for (uint32_t pass = 0; pass < zero_passes(z, k); pass++)
                for (uint32_t j = 0; zero_micro_batch(z, k, pass, &mine) && j < width; j++)
                    value[mine * width + j] = scalar(mine, j);
            st = zero_sum_scalars(z, value, k, width, out);
            for (uint32_t j = 0; !st && j < width; j++) {
                double sum = 0;
                for (uint32_t i = 0; i < k; i++)
                    sum += scalar(i, j);
                if (!same(&sum, &out[j], sizeof sum))
                    st = ERR(INTERNAL, "K = %u, scalar %u: %.17g, not %.17g", k, j, out[j], sum);
            }
        }
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_scalars(void **state)
{
    (void)state;
    for (int stage = 1; stage <= 2; stage++)
        for (int dp = 1; dp <= 8; dp++)
            expect_ok(comm_threads_run(dp, scalar_job, &stage));
}

/* ---- no allocation, failures, options ---- */

static status *steady_step(struct zero *z, struct params *ps, uint32_t s)
{
    double norm, value[2 * 13] = { 0 }, out[2];
    TRY(run_micro_batches(z, ps, s, 13, NULL));
    TRY(zero_reduce(z, &norm));
    struct adamw a = adamw_of(s, norm);
    TRY(zero_update(z, &a, NULL, NULL));
    return zero_sum_scalars(z, value, 13, 2, out);
}

static status *steady_job(struct comm *c, void *arg)
{
    struct zero_options o = *(struct zero_options *)arg;
    struct params *ps = params_make();
    struct zero *z = NULL;
    status *st = zero_open(&o, ps, c, &z);
    if (!st)
        st = steady_step(z, ps, 0);
    if (!st)
        st = comm_barrier(c);
    uint64_t before = mem_count();
    if (!st)
        st = comm_barrier(c); /* nobody has begun what is counted before all have read the count */
    for (uint32_t s = 1; !st && s < STEPS; s++)
        st = steady_step(z, ps, s);
    if (!st)
        st = comm_barrier(c);
    uint64_t calls = mem_count() - before;
    if (!st)
        st = comm_barrier(c);
    if (!st && calls)
        st = ERR(INTERNAL, "%llu allocations in a steady step", (unsigned long long)calls);
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_no_allocation(void **state)
{
    (void)state;
    for (int dp = 1; dp <= 5; dp++)
        for (int stage = 0; stage <= 3; stage++) {
            struct zero_options o = {
                .stage = stage, .deterministic = true, .lanes = 8, .bucket_elems = 3 * PARAM_ALIGN
            };
            o.shards = dp == 4 ? 2 : 0;
            expect_ok(comm_threads_run(dp, steady_job, &o));
        }
}

static status *failing_fence(void *arg, const void *addr, size_t bytes)
{
    (void)addr;
    (void)bytes;
    return ++*(int *)arg == 2 ? ERR(IO, "planted") : NULL;
}

/* A fence that fails on one rank is that rank's error, and nobody hangs. */
static status *failing_job(struct comm *c, void *arg)
{
    struct zero_options o = {
        .stage = *(int *)arg, .deterministic = true, .lanes = 8, .bucket_elems = 3 * PARAM_ALIGN
    };
    struct params *ps = params_make();
    struct zero *z = NULL;
    double norm;
    int calls = 0;
    status *st = zero_open(&o, ps, c, &z);
    if (!st) {
        st = run_micro_batches(z, ps, 0, 5, NULL);
        st = st ? st : zero_reduce(z, &norm);
    }
    if (!st) {
        struct adamw a = adamw_of(0, norm);
        st = zero_update(z, &a, c->rank == 1 ? failing_fence : NULL, &calls);
        bool right = c->rank == 1 ? status_code(st) == ST_IO && calls == 2 : !st;
        struct zero_moments mom = zero_moments(z);
        for (uint64_t e = 0; c->rank == 1 && e < mom.elems; e++) /* what it guards was not overwritten */
            right = right && mom.m[e] == 0 && mom.v[e] == 0;
        status_free(st);
        st = right ? comm_barrier(c) : ERR(INTERNAL, "the planted error went astray");
    }
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_failing_fence(void **state)
{
    (void)state;
    for (int stage = 0; stage <= 3; stage++)
        expect_ok(comm_threads_run(3, failing_job, &stage));
}

struct open_case {
    struct zero_options o;
    bool no_grad;
};

static status *open_job(struct comm *c, void *arg)
{
    const struct open_case *t = arg;
    struct params *ps = params_make();
    float *grad = ps->grad;
    struct zero *z = NULL;
    if (t->no_grad)
        ps->grad = NULL;
    status *st = zero_open(&t->o, ps, c, &z);
    ps->grad = grad;
    zero_close(z);
    params_drop(ps);
    return st;
}

static void test_options(void **state)
{
    (void)state;
    struct open_case good = { .o = { .stage = 1, .deterministic = true, .lanes = 4 } };
    expect_code(comm_threads_run(4, open_job, &good), ST_OK);
    expect_code(comm_threads_run(5, open_job, &good), ST_INVALID);
    const int lanes[] = { -8, 0, 3, 6, 128 };
    for (size_t i = 0; i < sizeof lanes / sizeof *lanes; i++) {
        struct open_case t = { .o = { .deterministic = true, .lanes = lanes[i] } };
        expect_code(comm_threads_run(1, open_job, &t), ST_INVALID);
        t.o.deterministic = false; /* lanes are not used then */
        expect_code(comm_threads_run(1, open_job, &t), ST_OK);
    }
    struct open_case wide = { .o = { .stage = 2, .deterministic = true, .lanes = 2, .shards = 2 } };
    expect_code(comm_threads_run(4, open_job, &wide), ST_OK); /* a lane a replica will do */
    expect_code(comm_threads_run(6, open_job, &wide), ST_INVALID);
    struct open_case stages[] = { { .o = { .stage = 4, .lanes = 8 } }, { .o = { .stage = -1, .lanes = 8 } } };
    for (size_t i = 0; i < 2; i++) {
        status *st = comm_threads_run(2, open_job, &stages[i]);
        assert_non_null(strstr(status_message(st), "stage"));
        expect_code(st, ST_UNSUPPORTED);
    }
    struct open_case odd = { .o = { .stage = 3, .deterministic = true, .lanes = 8, .shards = 4 } };
    status *st = comm_threads_run(6, open_job, &odd);
    assert_non_null(strstr(status_message(st), "dp_shard: 4 does not divide 6 data-parallel ranks (legal: 1, 2, 3, 6"));
    expect_code(st, ST_INVALID);
    struct open_case bucket = { .o = { 1, true, 8, PARAM_ALIGN + 1, NULL, 0, 0 } }, bare = { good.o, true };
    expect_code(comm_threads_run(2, open_job, &bucket), ST_INVALID);
    expect_code(comm_threads_run(2, open_job, &bare), ST_INVALID);
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
            for (int run = 0; run < 3; run++) {
                struct tree part = { 0 };
                for (uint64_t i = ends[run]; i < ends[run + 1]; i++)
                    tree_push(&part, 0, i, leaf[i]);
                uint64_t at = ends[run];
                assert_int_equal(part.n, tree_node_count(at, ends[run + 1]));
                for (int i = 0; i < part.n; i++) {
                    unsigned level = tree_level(at, ends[run + 1]);
                    tree_push(&all, level, at >> level, part.node[i].value);
                    at += (uint64_t)1 << level;
                }
            }
            double sum = tree_total(&all);
            assert_true(n ? same(&sum, &whole, sizeof sum) : sum == 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tree),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_eight_lanes),
        cmocka_unit_test(test_other_lanes),
        cmocka_unit_test(test_low_gradients),
        cmocka_unit_test(test_not_deterministic),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_broken),
        cmocka_unit_test(test_adamw_in_double),
        cmocka_unit_test(test_micro_batches),
        cmocka_unit_test(test_scalars),
        cmocka_unit_test(test_no_allocation),
        cmocka_unit_test(test_failing_fence),
    };
    return cmocka_run_group_tests(tests, make_gradients, drop_gradients);
}
