/* zero's calls beside the sums themselves (test_zero.c): legal options, who runs which micro-batch, sums of scalars, no
 * allocation in a steady step, and ranks that fail. */
#include "tests/support/comm_threads.h"
#include "tests/trainer/zero_passes.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options),       cmocka_unit_test(test_micro_batches), cmocka_unit_test(test_scalars),
        cmocka_unit_test(test_no_allocation), cmocka_unit_test(test_failing_fence), cmocka_unit_test(test_broken),
    };
    return cmocka_run_group_tests(tests, make_gradients, drop_gradients);
}
