#include "trainer/when.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static sigset_t our_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    return set;
}

void signals_hold(void)
{
    sigset_t set = our_signals();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

void signals_release(void)
{
    sigset_t set = our_signals();
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

enum ask signals_take(void)
{
    const struct timespec at_once = { 0, 0 };
    sigset_t set = our_signals();
    enum ask ask = ASK_NOTHING;
    for (int n; (n = sigtimedwait(&set, NULL, &at_once)) > 0 || errno == EINTR;) {
        enum ask one = n == SIGTERM ? ASK_STOP_SIGNAL : n == SIGUSR1 ? ASK_SAVE : ASK_NOTHING;
        ask = one > ask ? one : ask;
    }
    return ask;
}

bool period_parse(const char *text, struct period *out)
{
    struct period p = { .kind = PERIOD_AUTO };
    size_t digits = strspn(text, "0123456789"), number = strspn(text, "0123456789.");
    if (!strcmp(text, "auto")) {
        *out = p;
        return true;
    }
    if (digits && digits <= 15 && !text[digits]) {
        p.kind = PERIOD_STEPS;
        p.steps = strtoull(text, NULL, 10);
        *out = p;
        return true;
    }
    char *end;
    p.kind = PERIOD_SECONDS;
    p.seconds = strtod(text, &end);
    if (!number || end != text + number || strcmp(end, "s") != 0 || !(p.seconds > 0) || p.seconds > 1e9)
        return false;
    *out = p;
    return true;
}

double period_daly(double cost, double mtbf)
{
    if (cost >= 2 * mtbf)
        return mtbf;
    double x = cost / (2 * mtbf);
    return sqrt(2 * cost * mtbf) * (1 + sqrt(x) / 3 + x / 9) - cost;
}

void save_cost_step(struct save_cost *c, bool saving, double seconds)
{
    if (saving) {
        c->excess_s += c->plain_steps ? seconds - c->plain_s : 0;
        return;
    }
    c->plain_steps++;
    double weight = c->plain_steps < 20 ? 1.0 / (double)c->plain_steps : 0.05;
    c->plain_s += weight * (seconds - c->plain_s);
}

void save_cost_committed(struct save_cost *c, double call_s, double fence_s, double write_s)
{
    double excess = c->excess_s > fence_s ? c->excess_s : fence_s; /* a fence's wait is part of its step */
    c->cost_s = call_s + excess;
    c->write_s = write_s;
    c->excess_s = 0;
    c->saves++;
}

double save_cost_period(const struct save_cost *c, double mtbf)
{
    double period = period_daly(c->saves ? c->cost_s : 1.0, mtbf);
    return period > c->write_s ? period : c->write_s;
}
