/* debug: nan: elements that are not finite are planted in weights, activations and gradients of every op, in summed
 * gradients and in updated parameters; the error names the op and its block, or the parameter, and the place. Jobs that
 * are well are left alone, on every kind of mesh, and keep their bits. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/ops/moe.h"
#include "trainer/parallel/zero_impl.h"

enum { INPUTS = 5, ELEMS = 256 };

/* ---- ops ---- */

struct leaf {
    struct tensor t;
    float data[ELEMS], grad[ELEMS];
};

struct op_case {
    const char *name;
    int count;
    int64_t dim[INPUTS][TENSOR_DIMS]; /* ended by 0 */
    struct tensor *(*call)(struct tape *t, struct leaf *x);
    const char *forward[INPUTS];  /* the op that is named where this input is bad; NULL: none is */
    const char *backward[INPUTS]; /* and where its gradient is */
    bool weight[INPUTS];
};

static const int32_t ids[] = { 2, 0, 1, 2 }, places[] = { 0, 1, 2, 3 }, offsets[] = { 0, 4 };
static const struct segments seg = { .count = 1, .offset = offsets };
static const struct rope plain = { .theta = 100 };
static const struct router router = { .experts = 2, .top = 2, .normalise = true, .scale = 1 };

static struct tensor *call_embedding(struct tape *t, struct leaf *x)
{
    return op_embedding(t, &x[0].t, ids, 4);
}

static struct tensor *call_linear(struct tape *t, struct leaf *x)
{
    return op_linear(t, &x[0].t, &x[1].t, &x[2].t);
}

static struct tensor *call_low_rank(struct tape *t, struct leaf *x)
{
    const struct low_rank low = { &x[2].t, &x[3].t, 2 };
    return op_linear_low_rank(t, &x[0].t, &x[1].t, NULL, &low);
}

static struct tensor *call_rmsnorm(struct tape *t, struct leaf *x)
{
    return op_rmsnorm(t, &x[0].t, &x[1].t, 1e-5f);
}

static struct tensor *call_rope(struct tape *t, struct leaf *x)
{
    return op_rope(t, &x[0].t, places, &plain);
}

static struct tensor *call_attention(struct tape *t, struct leaf *x)
{
    return op_attention(t, &x[0].t, &x[1].t, &x[2].t, &seg, 0, NULL);
}

static struct tensor *call_swiglu(struct tape *t, struct leaf *x)
{
    return op_swiglu(t, &x[0].t, &x[1].t);
}

static struct tensor *call_add(struct tape *t, struct leaf *x)
{
    return op_add(t, &x[0].t, &x[1].t);
}

static struct tensor *call_scale(struct tape *t, struct leaf *x)
{
    return op_scale(t, &x[0].t, 3);
}

static struct tensor *call_sum(struct tape *t, struct leaf *x)
{
    return op_sum(t, &x[0].t);
}

static struct tensor *call_logprob(struct tape *t, struct leaf *x)
{
    return op_logprob(t, &x[0].t, &x[1].t, ids, 1);
}

static struct tensor *call_moe(struct tape *t, struct leaf *x)
{
    const struct expert_weights w = { .router = &x[1].t, .gate = &x[2].t, .up = &x[3].t, .down = &x[4].t };
    return op_moe(t, &x[0].t, &w, &router, NULL);
}

#define SAME(op)                                                                                                       \
    { op, op, op, op, op },                                                                                            \
    {                                                                                                                  \
        op, op, op, op, op                                                                                             \
    }
#define EXPERTS "op_moe (experts)"
static const struct op_case cases[] = {
    { "embedding", 1, { { 3, 4 } }, call_embedding, SAME("op_embedding"), { true } },
    { "linear", 3, { { 4, 8 }, { 3, 8 }, { 3 } }, call_linear, SAME("op_linear"), { false, true, true } },
    { "low rank",
      4,
      { { 4, 8 }, { 3, 8 }, { 2, 8 }, { 3, 2 } },
      call_low_rank,
      { "op_linear", "op_linear", "op_linear_low_rank", "op_linear_low_rank" },
      { "op_linear_low_rank", "op_linear", "op_linear_low_rank", "op_linear_low_rank" },
      { false, true, true, true } },
    { "rmsnorm", 2, { { 4, 8 }, { 8 } }, call_rmsnorm, SAME("op_rmsnorm"), { false, true } },
    { "rope", 1, { { 4, 2, 4 } }, call_rope, SAME("op_rope"), { false } },
    { "attention", 3, { { 4, 2, 4 }, { 4, 1, 4 }, { 4, 1, 4 } }, call_attention, SAME("op_attention"), { false } },
    { "swiglu", 2, { { 4, 8 }, { 4, 8 } }, call_swiglu, SAME("op_swiglu"), { false } },
    { "add", 2, { { 4, 8 }, { 4, 8 } }, call_add, SAME("op_add"), { false } },
    { "scale", 1, { { 4, 8 } }, call_scale, SAME("op_scale"), { false } },
    { "sum", 1, { { 4, 8 } }, call_sum, SAME("op_sum"), { false } },
    { "logprob", 2, { { 4, 8 }, { 3, 8 } }, call_logprob, SAME("op_logprob"), { false, true } },
    { "moe",
      5,
      { { 4, 8 }, { 2, 8 }, { 2, 6, 8 }, { 2, 6, 8 }, { 2, 8, 6 } },
      call_moe,
      { "op_linear", "op_linear", EXPERTS, EXPERTS, EXPERTS },
      { "op_dispatch", "op_linear", EXPERTS, EXPERTS, EXPERTS },
      { false, true, true, true, true } },
};

static void fill(const struct op_case *c, struct leaf *x)
{
    for (int i = 0; i < c->count; i++) {
        x[i].t = (struct tensor){ .dtype = DTYPE_F32, .data = x[i].data, .grad = x[i].grad };
        for (; x[i].t.ndim < TENSOR_DIMS && c->dim[i][x[i].t.ndim]; x[i].t.ndim++)
            x[i].t.dim[x[i].t.ndim] = c->dim[i][x[i].t.ndim];
        for (int e = 0; e < ELEMS; e++) {
            x[i].data[e] = 0.1f * (float)((e * 7 + i) % 11) - 0.4f;
            x[i].grad[e] = 0;
        }
    }
}

static const char *leaf_name(const void *arg, const struct tensor *weight)
{
    const struct leaf *x = arg;
    static const char *const names[] = { "zero", "one", "two", "three", "four" };
    for (int i = 0; i < INPUTS; i++)
        if (&x[i].t == weight)
            return names[i];
    return NULL;
}

/* Forward, and halves of backward one after another, until one fails. */
static status *pass(struct tape *t, const struct op_case *c, struct leaf *x, const unsigned *halves)
{
    float droot[ELEMS];
    for (int e = 0; e < ELEMS; e++)
        droot[e] = 0.01f;
    tape_begin(t, TAPE_TRAIN);
    t->micro_batch = 7;
    struct tensor *y = c->call(t, x);
    TRY(tape_end(t));
    for (int i = 0; halves[i]; i++)
        TRY(tape_backward(t, y, i ? NULL : droot, halves[i]));
    return NULL;
}

static void expect(status *st, const char *what, const char *begin, const char *end)
{
    const char *said = status_message(st);
    size_t n = strlen(said), m = strlen(end);
    if (status_code(st) != ST_INVALID || strncmp(said, begin, strlen(begin)) || n < m || strcmp(said + n - m, end))
        fail_msg("%s: \"%s\" is not \"%s...%s\"", what, said, begin, end);
    status_free(st);
}

static void every_op_is_named(void **state)
{
    (void)state;
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    static const char *const words[] = { "nan", "inf", "-inf" };
    static const unsigned both[] = { TAPE_BACKWARD_ALL, 0 }, inputs[] = { TAPE_BACKWARD_INPUT, 0 },
                          in_turn[] = { TAPE_BACKWARD_INPUT, TAPE_BACKWARD_WEIGHT, 0 };
    struct leaf x[INPUTS];
    struct tape *t;
    struct watch *w;
    char begin[128], end[128];
    must(tape_open(NULL, NULL, 0, &t));
    must(watch_open(NULL, leaf_name, x, &w));
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const struct op_case *c = &cases[k];
        fill(c, x);
        tape_watch(t, w);
        must(pass(t, c, x, in_turn)); /* all is well */
        for (int i = 0; i < c->count; i++) {
            fill(c, x);
            int e = (int)tensor_elems(&x[i].t) - 2 - (int)k % 2;
            e = e < 0 ? 0 : e;
            x[i].data[e] = NAN;
            snprintf(begin, sizeof begin, "%s", c->forward[i]);
            expect(pass(t, c, x, both), c->name, begin, "");
            tape_watch(t, NULL);
            must(pass(t, c, x, both)); /* nobody looks */
            tape_watch(t, w);
            fill(c, x);
            int64_t cols = x[i].t.dim[x[i].t.ndim - 1];
            x[i].grad[e] = bad[k % 3];
            snprintf(end, sizeof end, "%s%lld], element %d", x[i].t.ndim > 1 ? ", " : "[", (long long)(e % cols), e);
            snprintf(begin, sizeof begin, "%s", c->backward[i]);
            expect(pass(t, c, x, both), c->name, begin, end);
            fill(c, x);
            x[i].grad[e] = bad[k % 3];
            if (c->weight[i]) { /* found in its own half, under its name */
                must(pass(t, c, x, inputs));
                fill(c, x);
                x[i].grad[e] = bad[k % 3];
                snprintf(begin, sizeof begin, "%s of %s, backward of micro-batch 7: the gradient of its weight [",
                         c->backward[i], leaf_name(x, &x[i].t));
            } else {
                snprintf(begin, sizeof begin, "%s", c->backward[i]);
            }
            status *st = pass(t, c, x, in_turn);
            snprintf(end, sizeof end, " is %s at ", words[k % 3]);
            assert_non_null(strstr(status_message(st), end));
            expect(st, c->name, begin, "");
        }
    }
    watch_close(w);
    tape_close(t);
}

/* The first bad element is the one that is told, with all that is known of it. */
static void the_words(void **state)
{
    (void)state;
    static const unsigned both[] = { TAPE_BACKWARD_ALL, 0 };
    const struct op_case *c = &cases[1];
    struct leaf x[INPUTS];
    struct tape *t;
    struct watch *w;
    must(tape_open(NULL, NULL, 0, &t));
    must(watch_open(NULL, leaf_name, x, &w));
    tape_watch(t, w);
    fill(c, x);
    x[1].data[17] = INFINITY; /* row 2 */
    x[1].data[23] = NAN;
    x[0].data[1] = 0.5f; /* 0.5 inf + nan */
    status *st = pass(t, c, x, both);
    assert_string_equal(status_message(st), "op_linear of one, forward of micro-batch 7: its output [4, 3] is nan at "
                                            "[0, 2], element 2; its weight [3, 8] is inf at [2, 1], element 17");
    status_free(st);
    fill(c, x);
    float droot[ELEMS] = { 0, 0, 0, 0, 0, -INFINITY, NAN };
    tape_begin(t, TAPE_TRAIN);
    struct tensor *y = c->call(t, x);
    must(tape_end(t));
    st = tape_backward(t, y, droot, TAPE_BACKWARD_ALL);
    assert_string_equal(status_message(st),
                        "backward of micro-batch 7: the gradient that it begins with [4, 3] is -inf "
                        "at [1, 2], element 5");
    status_free(st);
    watch_close(w);
    tape_close(t);
}

/* ---- blocks ---- */

static struct tensor *block(struct tape *t, const void *arg, int64_t index, struct tensor *x)
{
    struct leaf *w = *(struct leaf *const *)arg;
    return op_add(t, x, op_linear(t, x, &w[1 + index].t, NULL));
}

static struct tensor *call_blocks(struct tape *t, struct leaf *x)
{
    struct tensor *y = op_scale(t, &x[0].t, 1);
    for (int64_t i = 0; i < 2; i++)
        y = op_block(t, block, &x, sizeof x, i, y);
    return op_scale(t, y, 2);
}

static void blocks_are_named(void **state)
{
    (void)state;
    static const unsigned both[] = { TAPE_BACKWARD_ALL, 0 };
    static const struct op_case c = { "blocks", 3, { { 2, 4 }, { 4, 4 }, { 4, 4 } }, call_blocks, SAME(""), { false } };
    struct leaf x[INPUTS];
    struct tape *t;
    struct watch *w;
    must(tape_open(NULL, NULL, 0, &t));
    must(watch_open(NULL, NULL, NULL, &w));
    tape_watch(t, w);
    for (int again = 0; again < 2; again++) {
        tape_recompute(t, again ? TAPE_RECOMPUTE_BLOCK : TAPE_RECOMPUTE_NONE);
        fill(&c, x);
        must(pass(t, &c, x, both));
        x[2].data[5] = NAN;
        expect(pass(t, &c, x, both), "block", "op_linear, block 1, forward of",
               "its weight [4, 4] is nan at [1, 1], element 5");
        fill(&c, x);
        x[1].grad[7] = INFINITY;
        expect(pass(t, &c, x, both), "block", "op_linear, block 0, backward of",
               "weight [4, 4] is inf at [1, 3], element 7");
        fill(&c, x);
        memset(x[1].data, 0, sizeof x[1].data);
        memset(x[2].data, 0, sizeof x[2].data);
        x[0].data[3] = 3e38f; /* overflows behind the blocks */
        expect(pass(t, &c, x, both), "block", "op_scale, forward of", "inf at [0, 3], element 3");
    }
    watch_close(w);
    tape_close(t);
}

/* ---- steps ---- */

static const char *victim; /* parameter whose element is made bad once it is summed or updated; set before jobs run */
static uint64_t bad_at;    /* of this rank's part */
static bool in_gradient, before_norm, on_last_tp;

static bool plants(const struct zero *z, bool gradient, const struct param **out)
{
    const struct param *p = victim && gradient == in_gradient ? params_find(z->p, victim) : NULL;
    *out = p;
    return p && !p->away && !(on_last_tp && z->o.tp && z->o.tp->rank + 1 < z->o.tp->size);
}

status *__real_zero_squares(struct zero *z, const double **squares);
status *__wrap_zero_squares(struct zero *z, const double **squares);
status *__wrap_zero_squares(struct zero *z, const double **squares)
{
    const struct param *p;
    struct zero_moments m = zero_moments(z);
    uint64_t before = 0;
    if (!before_norm)
        TRY(__real_zero_squares(z, squares));
    if (!plants(z, true, &p))
        return before_norm ? __real_zero_squares(z, squares) : NULL;
    for (uint64_t r = 0; r < m.run_count; before += run_elems(m.run[r]), r++)
        if (m.run[r].begin <= p->offset + bad_at && p->offset + bad_at < m.run[r].end)
            zero_sums(z, m.run[r], before)[p->offset + bad_at - m.run[r].begin] = NAN;
    return before_norm ? __real_zero_squares(z, squares) : NULL;
}

status *__real_zero_update(struct zero *z, const struct adamw *a,
                           status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg);
status *__wrap_zero_update(struct zero *z, const struct adamw *a,
                           status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg);
status *__wrap_zero_update(struct zero *z, const struct adamw *a,
                           status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    const struct param *p;
    TRY(__real_zero_update(z, a, fence, arg));
    if (!plants(z, false, &p))
        return NULL;
    struct shards *s = zero_shards(z);
    if (!s || !shards_cut_values(s)) {
        if (z->dp->rank + 1 == z->dp->size) /* one rank of them */
            ((float *)p->value.data)[bad_at] = -INFINITY;
        return NULL;
    }
    struct shard_runs own = shards_own(s, false);
    for (uint64_t r = 0, at = 0; r < own.runs; at += run_elems(own.run[r]), r++)
        if (own.run[r].begin <= p->offset + bad_at && p->offset + bad_at < own.run[r].end)
            own.value[at + (p->offset + bad_at - own.run[r].begin)] = -INFINITY;
    return NULL;
}

#define UP "model.layers.1.mlp.up_proj.weight"

static void gradients_and_values_are_named(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *mesh, *zero;
    } jobs[] = { { 1, "parallel.tp=1", "parallel.zero=0" }, { 3, "parallel.tp=1", "parallel.zero=1" },
                 { 2, "parallel.tp=1", "parallel.zero=2" }, { 3, "parallel.tp=1", "parallel.zero=3" },
                 { 2, "parallel.tp=2", "parallel.zero=1" }, { 2, "parallel.pp=2", "parallel.zero=0" } };
    for (size_t k = 0; k < sizeof jobs / sizeof *jobs; k++)
        for (int gradient = 0; gradient < 2; gradient++) {
            bool cut = !strcmp(jobs[k].mesh, "parallel.tp=2");
            const char *settings[] = { jobs[k].mesh, jobs[k].zero, "debug=nan", "checkpoint.url=", NULL };
            char words[256];
            victim = UP; /* [64, 32]; its second half is on rank 1 of two */
            bad_at = 5 * 32 + 7;
            in_gradient = gradient;
            on_last_tp = cut;
            snprintf(words, sizeof words, "step 1: %s of " UP " (64, 32) is %s at (%d, 7), element %d",
                     gradient ? "the summed gradient" : "after the update the value", gradient ? "nan" : "-inf",
                     cut ? 37 : 5, (cut ? 37 : 5) * 32 + 7);
            refused(jobs[k].ranks, settings, words);
            victim = NULL;
        }
}

/* Without it the step after a bad one is the first to be seen. */
static void off_says_that_it_is_there(void **state)
{
    (void)state;
    const char *settings[] = { "checkpoint.url=", NULL };
    victim = UP;
    in_gradient = true;
    refused(1, settings, "the loss is not finite at step 2");
    before_norm = true;
    refused(1, settings, "the gradient is not finite at step 1");
    before_norm = false;
    victim = NULL;
}

/* ---- jobs that are well ---- */

static void nothing_is_found_where_nothing_is(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[4];
    } jobs[] = {
        { 1, { "memory.recompute=block", "train.dtype=bf16" } },
        { 2, { "parallel.tp=2", "parallel.sequence=true" } },
        { 2, { "parallel.cp=2", "algo.reference=live" } },
        { 2, { "parallel.pp=2", "parallel.schedule=zero-bubble", "lora.targets=*.q_proj" } },
        { 3, { "parallel.zero=3", "train.param_dtype=bf16", "memory.recompute=attention" } },
        { 2, { "parallel.ep=2", "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24" } },
    };
    for (size_t k = 0; k < sizeof jobs / sizeof *jobs; k++) {
        uint32_t weights[2];
        for (int debug = 0; debug < 2; debug++) {
            char text[2048];
            make_config(text, sizeof text, "well");
            const char *o[8] = { debug ? "debug=nan" : "debug=off", "train.steps=4", "checkpoint.url=" };
            int n = 3;
            for (int i = 0; i < 4 && jobs[k].o[i]; i++)
                o[n++] = jobs[k].o[i];
            weights[debug] = run(text, jobs[k].ranks, n, o).weights;
        }
        assert_int_equal(weights[0], weights[1]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_op_is_named),         cmocka_unit_test(the_words),
        cmocka_unit_test(blocks_are_named),          cmocka_unit_test(gradients_and_values_are_named),
        cmocka_unit_test(off_says_that_it_is_there), cmocka_unit_test(nothing_is_found_where_nothing_is),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
