/* optim: schedules at named steps against closed forms, the clip factor, and the option rows. */
#include "trainer/optim/optim.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

static void near(double a, double b)
{
    if (!(fabs(a - b) <= 1e-15 + 1e-12 * fabs(b)))
        fail_msg("%.17g, not %.17g", a, b);
}

static void test_warmup(void **state)
{
    (void)state;
    for (int kind = SCHEDULE_CONSTANT; kind <= SCHEDULE_COSINE; kind++) {
        struct optim_config c = { .lr = 9, .min_lr = 0.1, .schedule = kind, .warmup_steps = 4 };
        const double peak = 0.8; /* the argument counts, not c.lr */
        near(schedule_lr(&c, peak, 0, 10), 0.2);
        near(schedule_lr(&c, peak, 1, 10), 0.4);
        near(schedule_lr(&c, peak, 2, 10), 0.6);
        near(schedule_lr(&c, peak, 3, 10), 0.8);
        /* a run that ends inside its warm-up, and one that ends with it */
        near(schedule_lr(&c, peak, 1, 2), 0.4);
        near(schedule_lr(&c, peak, 3, 4), 0.8);
        c.warmup_steps = 1;
        near(schedule_lr(&c, peak, 0, 10), 0.8);
        c.warmup_steps = 0;
        near(schedule_lr(&c, peak, 0, 10), 0.8);
        near(schedule_lr(&c, peak, 0, 1), 0.8);
    }
}

static void test_constant(void **state)
{
    (void)state;
    struct optim_config c = { .min_lr = 0.1, .schedule = SCHEDULE_CONSTANT, .warmup_steps = 2 };
    for (uint64_t s = 1; s < 30; s++)
        near(schedule_lr(&c, 0.5, s, 10), 0.5);
}

/* Without a warm-up the peak is at step 0; with W steps of it, at step W - 1; min_lr at total - 1. */
static void test_linear(void **state)
{
    (void)state;
    struct optim_config c = { .min_lr = 0.2, .schedule = SCHEDULE_LINEAR };
    const double want[] = { 1.0, 0.8, 0.6, 0.4, 0.2, 0.2 };
    for (uint64_t s = 0; s < 6; s++)
        near(schedule_lr(&c, 1, s, 5), want[s]);
    c.warmup_steps = 3;
    const double after[] = { 1.0 / 3, 2.0 / 3, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2 };
    for (uint64_t s = 0; s < 8; s++)
        near(schedule_lr(&c, 1, s, 7), after[s]);
    c.min_lr = 0;
    near(schedule_lr(&c, 1, 3, 4), 0); /* one step after the warm-up: the last */
    near(schedule_lr(&c, 1, 1000000, 4), 0);
}

static void test_cosine(void **state)
{
    (void)state;
    struct optim_config c = { .min_lr = 0.2, .schedule = SCHEDULE_COSINE, .warmup_steps = 2 };
    /* steps 1..7: 1/6 of the way each; cos(60 deg) = 1/2, cos(90) = 0, cos(120) = -1/2 */
    near(schedule_lr(&c, 1, 1, 8), 1);
    near(schedule_lr(&c, 1, 2, 8), 0.2 + 0.8 * (1 + sqrt(3) / 2) / 2);
    near(schedule_lr(&c, 1, 3, 8), 0.2 + 0.8 * 0.75);
    near(schedule_lr(&c, 1, 4, 8), 0.2 + 0.8 * 0.5);
    near(schedule_lr(&c, 1, 5, 8), 0.2 + 0.8 * 0.25);
    near(schedule_lr(&c, 1, 6, 8), 0.2 + 0.8 * (1 - sqrt(3) / 2) / 2);
    near(schedule_lr(&c, 1, 7, 8), 0.2);
    near(schedule_lr(&c, 1, 8, 8), 0.2);
    c.warmup_steps = 0;
    near(schedule_lr(&c, 1, 0, 3), 1);
    near(schedule_lr(&c, 1, 1, 3), 0.6);
    near(schedule_lr(&c, 1, 2, 3), 0.2);
}

static void test_clip(void **state)
{
    (void)state;
    near(clip_scale(1, 4), 1 / (4 + 1e-6));
    near(clip_scale(2.5, 10), 2.5 / (10 + 1e-6));
    assert_true(clip_scale(1, 0.5) == 1);
    assert_true(clip_scale(1, 0) == 1);
    assert_true(clip_scale(1, 1) < 1 && clip_scale(1, 1) > 1 - 2e-6); /* as torch: the 1e-6 counts */
    assert_true(clip_scale(0, 0) == 1);
    assert_true(clip_scale(0, 1e9) == 1);
    assert_true(clip_scale(1, INFINITY) == 0);
    assert_true(isnan(clip_scale(1, NAN)));
}

static void test_options(void **state)
{
    (void)state;
    struct optim_config c;
    memset(&c, 0xff, sizeof c);
    assert_string_equal(optim_options.section, "optim");
    assert_int_equal(optim_options.count, 15);
    assert_null(options_defaults(&optim_options, &c));
    assert_true(c.lr == 3e-4 && c.min_lr == 0 && c.beta1 == 0.9 && c.beta2 == 0.95 && c.eps == 1e-8);
    assert_true(c.weight_decay == 0 && c.clip == 1 && c.schedule == SCHEDULE_COSINE && c.warmup_steps == 0);
    assert_true(c.kind == OPTIM_ADAMW && !strcmp(c.muon, "*") && c.muon_lr == 0.02 && c.muon_momentum == 0.95);
    assert_true(c.muon_nesterov && c.muon_scale == 0);
    assert_null(options_set(&optim_options, "schedule", "constant", &c, "here"));
    assert_int_equal(c.schedule, SCHEDULE_CONSTANT);
    assert_null(options_set(&optim_options, "schedule", "linear", &c, "here"));
    assert_int_equal(c.schedule, SCHEDULE_LINEAR);
    assert_null(options_set(&optim_options, "warmup_steps", "12", &c, "here"));
    assert_int_equal(c.warmup_steps, 12);
    const char *const bad[][2] = { { "lr", "-1e-4" },        { "beta1", "1" },         { "beta2", "1" },
                                   { "eps", "0" },           { "clip", "-1" },         { "warmup_steps", "-1" },
                                   { "lr", "fast" },         { "schedule", "x" },      { "min_lr", "-1" },
                                   { "weight_decay", "-1" }, { "muon_momentum", "1" }, { "kind", "sgd" } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        status *st = options_set(&optim_options, bad[i][0], bad[i][1], &c, "here");
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
    options_fini(&optim_options, &c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_warmup), cmocka_unit_test(test_constant), cmocka_unit_test(test_linear),
        cmocka_unit_test(test_cosine), cmocka_unit_test(test_clip),     cmocka_unit_test(test_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
