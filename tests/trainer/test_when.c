/* What asks for a save: signals (raised here for real), periods as people write them, Daly's optimum against a search
 * of the exact expected run time, and the measured cost of saves against made-up steps. */
#include "comm/base/thread.h"
#include "trainer/when.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

static status *raise_both(void *arg)
{
    (void)arg;
    kill(getpid(), SIGTERM);
    kill(getpid(), SIGUSR1);
    return NULL;
}

static void test_signals(void **state)
{
    (void)state;
    signals_hold();
    assert_int_equal(signals_take(), ASK_NOTHING);
    for (int i = 0; i < 3; i++)
        kill(getpid(), SIGUSR1);
    assert_int_equal(signals_take(), ASK_SAVE);
    assert_int_equal(signals_take(), ASK_NOTHING);
    struct thread t;
    assert_null(thread_start(&t, "other", raise_both, NULL));
    assert_null(thread_join(&t));
    assert_int_equal(signals_take(), ASK_STOP_SIGNAL); /* the weightier of the two, and neither is left */
    assert_int_equal(signals_take(), ASK_NOTHING);
    sigset_t now;
    signals_release();
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    assert_false(sigismember(&now, SIGTERM) || sigismember(&now, SIGUSR1));
}

static void test_parse(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        struct period want;
    } good[] = { { "0", { PERIOD_STEPS, 0, 0 } },          { "1", { PERIOD_STEPS, 1, 0 } },
                 { "100", { PERIOD_STEPS, 100, 0 } },      { "600s", { PERIOD_SECONDS, 0, 600 } },
                 { "0.25s", { PERIOD_SECONDS, 0, 0.25 } }, { "auto", { PERIOD_AUTO, 0, 0 } } };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct period p = { .kind = PERIOD_STEPS, .steps = 7 };
        assert_true(period_parse(good[i].text, &p));
        assert_int_equal(p.kind, good[i].want.kind);
        assert_int_equal(p.steps, good[i].want.steps);
        assert_true(p.seconds == good[i].want.seconds);
    }
    static const char *const bad[] = { "",       "s",    "-1",   "-1s",  "0s",           "1m",
                                       "1 s",    " 1",   "1.5",  "Auto", "auto ",        "1ss",
                                       "1.2.3s", "1e3s", "nans", "x",    "99999999999s", "9999999999999999" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct period p;
        if (period_parse(bad[i], &p))
            fail_msg("\"%s\" was taken", bad[i]);
    }
}

/* Daly's exact expected time of a unit of work, a save of `cost` every tau seconds of work, failures every m seconds.
 */
static double expected(double tau, double cost, double m)
{
    return m * expm1((tau + cost) / m) / tau;
}

static void test_daly(void **state)
{
    (void)state;
    static const double cost[] = { 1e-3, 0.1, 1, 60, 300 };
    for (size_t i = 0; i < sizeof cost / sizeof *cost; i++) {
        double m = 3600, best = INFINITY, at = 0;
        for (double tau = 0.1; tau < 20000; tau *= 1.0005)
            if (expected(tau, cost[i], m) < best) {
                best = expected(tau, cost[i], m);
                at = tau;
            }
        double got = period_daly(cost[i], m);
        if (fabs(got - at) > 0.002 * at)
            fail_msg("cost %g: period %g, the search says %g", cost[i], got, at);
    }
    assert_true(period_daly(20, 10) == 10 && period_daly(1e6, 10) == 10); /* saves dearer than the job lives */
    assert_true(period_daly(0, 10) == 0);
}

static void test_cost(void **state)
{
    (void)state;
    struct save_cost c = { 0 };
    assert_true(save_cost_period(&c, 3600) == period_daly(1, 3600));
    for (int i = 0; i < 10; i++)
        save_cost_step(&c, false, i % 2 ? 1.5 : 0.5); /* mean 1 */
    for (int i = 0; i < 4; i++)
        save_cost_step(&c, true, 1.25);
    save_cost_committed(&c, 0.5, 0.75, 5);
    assert_true(fabs(c.cost_s - 1.5) < 1e-12); /* the call, and a quarter of each of four steps */
    assert_true(fabs(save_cost_period(&c, 3600) - period_daly(1.5, 3600)) < 1e-9);
    assert_true(save_cost_period(&c, 1e-3) == 5); /* never more often than a save takes */
    save_cost_step(&c, true, 0.9);
    save_cost_committed(&c, 0.5, 2, 5); /* steps that happen to be short do not hide the fence */
    assert_true(fabs(c.cost_s - 2.5) < 1e-12);
    struct save_cost first = { 0 }; /* a save before any other step: nothing to compare with */
    save_cost_step(&first, true, 100);
    save_cost_committed(&first, 0.25, 0, 1);
    assert_true(first.cost_s == 0.25);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_signals), cmocka_unit_test(test_parse),
                                        cmocka_unit_test(test_daly), cmocka_unit_test(test_cost) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
