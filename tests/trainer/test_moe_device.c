/* test_moe_device: op_moe on the emulated GPU beside the CPU: outputs, gradients and loads, in f32 and in bf16, with
 * adapters, with blocks that run again; and a steady pass, forward and backward, for which the host does not wait once.
 * Run twice, once with TESSERA_EMU_LATE=1. The CPU's results are checked by test_moe. */
#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/moe.h"
#include "trainer/ops/ops.h"
#include "trainer/ops/routes.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Of the emulator. */
unsigned long emu_waits(void);

enum { X, ROUTER, GATE, UP, DOWN, LOW, LEAVES = LOW + 6 }; /* LOW: A and B of gate's adapters, of up's, of down's */
enum { TOKENS = 37, CHANNELS = 20, WIDTH = 12, EXPERTS = 9, RANK = 3, MOST = EXPERTS * CHANNELS * WIDTH };

struct shape {
    const char *name;
    struct router how;
    bool bf16, low, recompute;
    double tolerance;
};

/* One of the two memories. */
struct place {
    struct compute *c; /* NULL: the host */
    struct tape *t;
    const struct shape *s;
    struct tensor leaf[LEAVES];
    double *balance; /* and the counts behind it */
    float y[TOKENS * CHANNELS], grad[LEAVES][MOST];
    struct {
        double balance;
        int32_t count[EXPERTS];
    } seen;
    struct expert_weights w;
    struct route_watch watch;
    struct tensor *out; /* of the pass */
};

static void assert_ok(status *st)
{
    if (st)
        print_error("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    assert_null(st);
}

static uint32_t seed;

static float draw(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed * 0x1p-31f;
}

static void *take(struct place *p, size_t bytes)
{
    void *at;
    assert_ok(compute_alloc(p->c, bytes, &at));
    return at;
}

static void fill(struct place *p)
{
    static const int64_t dims[LEAVES][3] = { { TOKENS, CHANNELS },         { EXPERTS, CHANNELS },
                                             { EXPERTS, WIDTH, CHANNELS }, { EXPERTS, WIDTH, CHANNELS },
                                             { EXPERTS, CHANNELS, WIDTH }, { EXPERTS, RANK, CHANNELS },
                                             { EXPERTS, WIDTH, RANK },     { EXPERTS, RANK, CHANNELS },
                                             { EXPERTS, WIDTH, RANK },     { EXPERTS, RANK, WIDTH },
                                             { EXPERTS, CHANNELS, RANK } };
    seed = 11;
    for (int i = 0; i < LEAVES; i++) {
        float host[MOST];
        struct tensor *x = &p->leaf[i];
        *x = (struct tensor){ .dtype = DTYPE_F32, .ndim = i < GATE ? 2 : 3 };
        memcpy(x->dim, dims[i], sizeof dims[i]);
        size_t bytes = (size_t)tensor_elems(x) * sizeof *host;
        for (int64_t k = 0; k < tensor_elems(x); k++)
            host[k] = draw();
        x->data = take(p, bytes);
        x->grad = take(p, bytes);
        assert_ok(compute_put(p->c, x->data, host, bytes));
    }
    p->balance = take(p, sizeof p->seen);
    p->w = (struct expert_weights){ &p->leaf[ROUTER], NULL,           &p->leaf[GATE],
                                    &p->leaf[UP],     &p->leaf[DOWN], { { 0 }, { 0 }, { 0 } } };
    if (p->s->low) {
        p->w.low.gate = (struct low_rank){ &p->leaf[LOW], &p->leaf[LOW + 1], 0.5f };
        p->w.low.up = (struct low_rank){ &p->leaf[LOW + 2], &p->leaf[LOW + 3], 0.5f };
        p->w.low.down = (struct low_rank){ &p->leaf[LOW + 4], &p->leaf[LOW + 5], 0.5f };
    }
    p->watch = (struct route_watch){ .count = (int32_t *)(p->balance + 1), .balance = p->balance, .balance_weight = 3 };
    assert_ok(tape_open(NULL, p->c, 0, &p->t));
    tape_bf16(p->t, p->s->bf16);
    tape_recompute(p->t, p->s->recompute ? TAPE_RECOMPUTE_BLOCK : TAPE_RECOMPUTE_NONE);
}

static void empty(struct place *p)
{
    tape_close(p->t);
    for (int i = 0; i < LEAVES; i++) {
        size_t bytes = (size_t)tensor_elems(&p->leaf[i]) * sizeof(float);
        compute_free(p->c, p->leaf[i].data, bytes);
        compute_free(p->c, p->leaf[i].grad, bytes);
    }
    compute_free(p->c, p->balance, sizeof p->seen);
}

static struct tensor *block(struct tape *t, const void *arg, int64_t index, struct tensor *x)
{
    const struct place *p = *(const struct place *const *)arg;
    (void)index;
    return op_moe(t, x, &p->w, &p->s->how, &p->watch);
}

static status *forward(struct place *p, enum tape_mode mode)
{
    tape_begin(p->t, mode);
    p->out = op_block(p->t, block, &p, sizeof p, 0, &p->leaf[X]);
    return tape_end(p->t);
}

static void go_back(struct place *p)
{
    float host[TOKENS * CHANNELS];
    seed = 5;
    for (int i = 0; i < TOKENS * CHANNELS; i++)
        host[i] = draw();
    assert_ok(compute_put(p->c, p->out->grad, host, sizeof host));
    assert_ok(tape_backward(p->t, p->out, NULL, TAPE_BACKWARD_ALL));
}

static void see(struct place *p)
{
    assert_ok(compute_get(p->c, p->y, p->out->data, sizeof p->y));
    for (int i = 0; i < LEAVES; i++)
        assert_ok(compute_get(p->c, p->grad[i], p->leaf[i].grad, (size_t)tensor_elems(&p->leaf[i]) * sizeof(float)));
    assert_ok(compute_get(p->c, &p->seen, p->balance, sizeof p->seen));
}

static void near(const struct shape *s, const char *what, int which, const float *got, const float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= s->tolerance * (1 + fabs((double)want[i]))))
            fail_msg("%s: %s %d, element %lld: %.9g on the device, %.9g on the host", s->name, what, which,
                     (long long)i, (double)got[i], (double)want[i]);
}

static void compare(const struct place *got, const struct place *want)
{
    const struct shape *s = want->s;
    near(s, "output", 0, got->y, want->y, TOKENS * CHANNELS);
    for (int i = 0; i < (s->low ? LEAVES : (int)LOW); i++)
        near(s, "gradient", i, got->grad[i], want->grad[i], tensor_elems(&want->leaf[i]));
    assert_memory_equal(got->seen.count, want->seen.count, sizeof got->seen.count);
    assert_true(fabs(got->seen.balance - want->seen.balance) <= s->tolerance * want->seen.balance);
}

/* A dry pass, one that takes what grows, and one that must not wait. */
static unsigned long passes(struct place *p)
{
    unsigned long before = 0;
    assert_ok(forward(p, TAPE_DRY));
    for (int i = 0; i < 2; i++) {
        before = emu_waits();
        assert_ok(forward(p, TAPE_TRAIN));
        go_back(p);
    }
    return emu_waits() - before;
}

static const struct shape shapes[] = {
    { "softmax", { EXPERTS, 2, 1, 1, false, true, 1 }, false, false, false, 1e-5 },
    { "sigmoid, in groups", { EXPERTS, 3, 3, 2, true, true, 2 }, false, true, false, 1e-5 },
    { "run again", { EXPERTS, 1, 1, 1, false, false, 1 }, false, true, true, 1e-5 },
    { "bf16", { EXPERTS, 4, 1, 1, false, true, 1 }, true, true, false, 2e-2 },
};

static struct place here, there;

static void a_pass_waits_for_nothing(void **state)
{
    (void)state;
    struct device *d;
    assert_ok(device_open("cuda", 0, &d));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        here = there = (struct place){ .s = &shapes[i] };
        assert_ok(compute_open(d, NULL, true, &there.c));
        fill(&here);
        fill(&there);
        (void)passes(&here);
        assert_int_equal(passes(&there), 0);
        see(&here);
        see(&there);
        compare(&there, &here);
        empty(&here);
        empty(&there);
        compute_close(there.c);
    }
    device_close(d);
}

/* Who records them waits for each layer's; who replays them takes those, and waits for nothing. */
static void routes_are_recorded(void **state)
{
    (void)state;
    struct device *d;
    assert_ok(device_open("cuda", 0, &d));
    static const struct shape s = { "routes", { EXPERTS, 2, 1, 1, false, true, 1 }, false, false, false, 1e-5 };
    struct routes list = { .step = 1 };
    there = (struct place){ .s = &s };
    assert_ok(compute_open(d, NULL, true, &there.c));
    fill(&there);
    there.watch.routes = &list;
    there.watch.key = 7;
    assert_true(passes(&there) > 0);
    see(&there);
    here = there;
    int32_t expert[TOKENS * 2], count[EXPERTS] = { 0 };
    assert_ok(routes_get(&list, 7, expert, TOKENS, 2, 0, 1));
    for (int i = 0; i < TOKENS * 2; i++)
        count[expert[i]]++;
    assert_memory_equal(count, there.seen.count, sizeof count);
    list.replay = true;
    assert_int_equal(passes(&there), 0);
    see(&there);
    assert_memory_equal(here.y, there.y, sizeof here.y);
    empty(&there);
    compute_close(there.c);
    mem_free(list.entry);
    mem_free(list.expert);
    device_close(d);
}

int main(void)
{
    setenv("TESSERA_PLUGINS", "emu", 1); /* beside the test */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pass_waits_for_nothing),
        cmocka_unit_test(routes_are_recorded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
