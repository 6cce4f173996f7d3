/* test_ranks_device: ops that exchange activations, on the emulated GPU and on the host, by the same ranks (threads of
 * this process) with the same numbers: what comes of them, and their gradients. Run twice, once with
 * TESSERA_EMU_LATE=1, where work is done as late as streams and events allow. The host's results are checked by test_tp
 * and test_cp. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "comm/ordered.h"
#include "tests/support/comm_threads.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/moe.h"
#include "trainer/ops/ops.h"
#include "trainer/ops/rank_sums.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LEAVES = 8, SEEN = 16, SEEN_MOST = 4096 };

/* A rank at work in one of the two memories. */
struct place {
    struct comm *ranks;
    struct compute *c; /* NULL: the host */
    struct tape *t;
    struct tensor leaf[LEAVES];
    struct tensor_cut cut[LEAVES];
    int leaves, seen;
    float value[SEEN][SEEN_MOST]; /* copies of what is compared */
    size_t elems[SEEN];
};

static float number(int what, uint64_t i)
{
    float z;
    rng_normals((struct rng_at){ .seed = 7, .sample = (uint32_t)what, .stream = RNG_DATA }, i, 1, &z);
    return z;
}

static status *take(struct place *p, int64_t n, void **out)
{
    return compute_alloc(p->c, (size_t)n * sizeof(float) + 1, out);
}

/* Drawn values, of this rank alone. */
static status *leaf(struct place *p, int ndim, const int64_t *dim, struct tensor **out)
{
    struct tensor *x = &p->leaf[p->leaves];
    float host[SEEN_MOST];
    void *data, *grad;
    *x = (struct tensor){ .dtype = DTYPE_F32, .ndim = ndim };
    memcpy(x->dim, dim, (size_t)ndim * sizeof *dim);
    int64_t n = tensor_elems(x);
    for (int64_t i = 0; i < n; i++)
        host[i] = number(10 * p->leaves + p->ranks->rank, (uint64_t)i);
    TRY(take(p, n, &data));
    TRY(take(p, n, &grad));
    TRY(compute_put(p->c, data, host, (size_t)n * sizeof *host));
    x->data = data;
    x->grad = grad;
    p->leaves++;
    *out = x;
    return NULL;
}

static void free_leaves(struct place *p)
{
    while (p->leaves--) {
        struct tensor *x = &p->leaf[p->leaves];
        size_t bytes = (size_t)tensor_elems(x) * sizeof(float) + 1;
        compute_free(p->c, x->data, bytes);
        compute_free(p->c, x->grad, bytes);
    }
}

/* This rank's part of a weight; ranks have equal ones. */
static struct tensor *cut_over(struct place *p, struct tensor *w, int dim)
{
    struct tensor_cut *cut = &p->cut[w - p->leaf];
    *cut = (struct tensor_cut){ dim, p->ranks->rank * w->dim[dim], w->dim[dim], p->ranks->size * w->dim[dim] };
    w->cut = cut;
    return w;
}

static status *see(struct place *p, const float *there, int64_t n)
{
    CHECK(p->seen < SEEN && n <= SEEN_MOST, "%lld numbers", (long long)n);
    p->elems[p->seen] = (size_t)n;
    return compute_get(p->c, p->value[p->seen++], there, (size_t)n * sizeof(float));
}

static status *see_leaves(struct place *p)
{
    for (int i = 0; i < p->leaves; i++)
        TRY(see(p, p->leaf[i].grad, tensor_elems(&p->leaf[i])));
    return NULL;
}

/* Backward from y with a gradient that differs from element to element. */
static status *go_back(struct place *p, struct tensor *y)
{
    float host[SEEN_MOST];
    TRY(tape_end(p->t));
    int64_t n = tensor_elems(y);
    for (int64_t i = 0; i < n; i++)
        host[i] = number(99, (uint64_t)i);
    TRY(see(p, y->data, n));
    TRY(compute_put(p->c, y->grad, host, (size_t)n * sizeof *host));
    TRY(tape_backward(p->t, y, NULL, TAPE_BACKWARD_ALL));
    return see_leaves(p);
}

/* ---- what is compared */

enum { TOKENS = 7, CHANNELS = 6 };

/* Cut weights, one after the other, and what leaves them; with `sequence` cut by tokens on both sides. */
static status *products(struct place *p, bool sequence)
{
    struct tensor *x, *w1, *w2;
    int64_t c = p->ranks->size, rows = sequence ? (TOKENS + c - 1) / c : TOKENS;
    TRY(leaf(p, 2, (int64_t[]){ rows, CHANNELS }, &x));
    TRY(leaf(p, 2, (int64_t[]){ 4, CHANNELS }, &w1));
    TRY(leaf(p, 2, (int64_t[]){ CHANNELS, 4 }, &w2));
    x->cut_rows = sequence ? TOKENS : 0;
    tape_spread(p->t, p->ranks, sequence);
    tape_begin(p->t, TAPE_TRAIN);
    struct tensor *h = op_linear(p->t, x, cut_over(p, w1, 0), NULL);
    struct tensor *y = op_linear(p->t, h, cut_over(p, w2, 1), NULL);
    return y ? go_back(p, y) : tape_end(p->t);
}

static status *whole(struct place *p)
{
    return products(p, false);
}

static status *by_tokens(struct place *p)
{
    return products(p, true);
}

/* A vocabulary over ranks. */
static status *vocabulary(struct place *p)
{
    static const int32_t target[TOKENS] = { 0, -1, 3, 7, 5, 2, 8 };
    struct tensor *x, *w;
    struct logprob_stats s;
    TRY(leaf(p, 2, (int64_t[]){ TOKENS, CHANNELS }, &x));
    TRY(leaf(p, 2, (int64_t[]){ 5, CHANNELS }, &w));
    tape_spread(p->t, p->ranks, false);
    tape_begin(p->t, TAPE_FORWARD);
    struct tensor *z = op_logits(p->t, x, cut_over(p, w, 0));
    TRY(tape_end(p->t));
    TRY(see(p, z->data, tensor_elems(z)));
    tape_begin(p->t, TAPE_TRAIN);
    struct tensor *y = op_logprob_stats(p->t, x, w, target, 0.7f, &s);
    if (!y)
        return tape_end(p->t);
    TRY(see(p, s.entropy, TOKENS));
    return go_back(p, y);
}

/* Tokens over ranks: a pack of 7 in 2 sequences, of which a rank has every size-th. */
static status *context(struct place *p)
{
    static const int32_t offset[] = { 0, 5, TOKENS }, position[] = { 0, 1, 2, 3, 4, 0, 1 };
    int64_t c = p->ranks->size, rows = (TOKENS + c - 1) / c;
    int32_t own[TOKENS] = { 0 };
    struct tensor *q, *k, *v;
    for (int64_t j = 0; j < rows; j++)
        own[j] = j * c + p->ranks->rank < TOKENS ? position[j * c + p->ranks->rank] : 9;
    struct segments seg = { 2, offset, own };
    TRY(leaf(p, 3, (int64_t[]){ rows, 2, 4 }, &q));
    TRY(leaf(p, 3, (int64_t[]){ rows, 1, 4 }, &k));
    TRY(leaf(p, 3, (int64_t[]){ rows, 1, 4 }, &v));
    tape_context(p->t, p->ranks);
    tape_begin(p->t, TAPE_TRAIN);
    op_segments(p->t, &seg, rows);
    struct tensor *o = op_attention(p->t, q, k, v, &seg, 0, NULL);
    return o ? go_back(p, o) : tape_end(p->t);
}

/* Numbers of all tokens, and statistics beside them. */
static status *all_tokens(struct place *p)
{
    int64_t c = p->ranks->size, rows = (TOKENS + c - 1) / c;
    struct tensor *x[5];
    for (int i = 0; i < 5; i++)
        TRY(leaf(p, 1, &rows, &x[i]));
    struct logprob_stats s = { x[1]->data, x[2]->data, x[3]->data, x[4]->data };
    tape_context(p->t, p->ranks);
    tape_begin(p->t, TAPE_TRAIN);
    struct tensor *y = op_all_tokens(p->t, op_scale(p->t, x[0], 2.0f), TOKENS, &s);
    if (!y)
        return tape_end(p->t);
    const float *all[] = { s.entropy, s.logit, s.log_square, s.top };
    for (int i = 0; i < 4; i++)
        TRY(see(p, all[i], TOKENS));
    return go_back(p, y);
}

/* Experts over ranks, two each, and tokens of each rank's own. */
static status *experts(struct place *p)
{
    struct tensor *x, *router, *gate, *up, *down;
    int64_t all = 2 * p->ranks->size;
    const struct router how = { .experts = all, .top = 2, .groups = 1, .top_groups = 1, .normalise = true, .scale = 1 };
    TRY(leaf(p, 2, (int64_t[]){ TOKENS, CHANNELS }, &x));
    TRY(leaf(p, 2, (int64_t[]){ all, CHANNELS }, &router));
    TRY(leaf(p, 3, (int64_t[]){ 2, 5, CHANNELS }, &gate));
    TRY(leaf(p, 3, (int64_t[]){ 2, 5, CHANNELS }, &up));
    TRY(leaf(p, 3, (int64_t[]){ 2, CHANNELS, 5 }, &down));
    tape_experts(p->t, p->ranks);
    tape_begin(p->t, TAPE_TRAIN);
    const struct expert_weights w = { .router = router, .gate = gate, .up = up, .down = down };
    struct tensor *y = op_moe(p->t, x, &w, &how, NULL);
    return y ? go_back(p, y) : tape_end(p->t);
}

/* Sums in order of ranks, of counts that the ranks do not divide. */
static status *sums(struct place *p)
{
    const struct ordered_at at = rank_sums_at(p->c);
    for (int64_t n = 1; n <= 23; n += 11) {
        struct tensor *x, *room, *part;
        size_t slice = ordered_slice(p->ranks, (size_t)n);
        p->leaves = 0;
        TRY(leaf(p, 1, &n, &x));
        TRY(leaf(p, 1, &(int64_t){ (int64_t)ordered_room(p->ranks, slice) }, &room));
        TRY(leaf(p, 1, &(int64_t){ (int64_t)slice }, &part));
        TRY(ordered_reduce_scatter(p->ranks, x->data, (size_t)n, slice, part->data, room->data, &at));
        TRY(see(p, part->data, (int64_t)slice));
        TRY(ordered_allreduce(p->ranks, x->data, (size_t)n, room->data, &at));
        TRY(see(p, x->data, n));
        free_leaves(p);
        p->leaves = 0;
    }
    return NULL;
}

/* ---- both places */

struct job {
    status *(*of)(struct place *p);
    double tolerance;
};

static status *work(const struct job *job, struct place *p)
{
    TRY(tape_open(NULL, p->c, 0, &p->t));
    status *st = job->of(p);
    free_leaves(p);
    tape_close(p->t);
    return st;
}

static status *compare(const struct place *got, const struct place *want, double tolerance)
{
    if (got->seen != want->seen)
        return ERR(INTERNAL, "%d arrays, not %d", got->seen, want->seen);
    for (int s = 0; s < got->seen; s++)
        for (size_t i = 0; i < want->elems[s]; i++) {
            double a = (double)got->value[s][i], b = (double)want->value[s][i];
            if (!(fabs(a - b) <= tolerance * (1 + fabs(b))))
                return ERR(INTERNAL, "array %d, element %zu: %.9g on the device, %.9g on the host", s, i, a, b);
        }
    return NULL;
}

static status *rank_main(struct comm *world, void *arg)
{
    const struct job *job = arg;
    struct place *here = mem_calloc(1, sizeof *here), *there = mem_calloc(1, sizeof *there);
    struct device *d = NULL;
    struct comm *over = NULL;
    CHECK(here && there, "out of memory in a test");
    here->ranks = world;
    status *st = work(job, here);
    if (!st)
        st = device_open("cuda", 0, &d);
    if (!st)
        st = comm_over(world, d, 0, &over);
    if (!st)
        st = compute_open(d, NULL, true, &there->c);
    there->ranks = over;
    if (!st)
        st = work(job, there);
    if (!st)
        st = compare(there, here, job->tolerance);
    compute_close(there->c);
    comm_close(over);
    device_close(d);
    mem_free(here);
    mem_free(there);
    return st;
}

static void expect_same(status *(*of)(struct place *p), double tolerance)
{
    struct job job = { of, tolerance };
    for (int ranks = 2; ranks <= 3; ranks++) {
        status *st = comm_threads_run(ranks, rank_main, &job);
        if (st)
            fail_msg("%d ranks: %s (rank %d, %s:%d)", ranks, status_message(st), status_rank(st), status_file(st),
                     status_line(st));
    }
}

static void test_sums(void **state)
{
    (void)state;
    expect_same(sums, 0);
}

static void test_tensors(void **state)
{
    (void)state;
    expect_same(whole, 1e-5);
    expect_same(by_tokens, 1e-5);
    expect_same(vocabulary, 1e-5);
}

static void test_context(void **state)
{
    (void)state;
    expect_same(context, 1e-5);
    expect_same(all_tokens, 0);
}

static void test_experts(void **state)
{
    (void)state;
    expect_same(experts, 1e-5);
}

int main(void)
{
    setenv("TESSERA_PLUGINS", "emu", 1); /* beside the test */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_context),
        cmocka_unit_test(test_experts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
