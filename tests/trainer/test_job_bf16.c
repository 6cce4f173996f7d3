/* test_job_bf16: whole jobs whose tensors and gradients' messages are bf16 over f32 parameters, their ranks threads of
 * this process: the same bits on any mesh and after resumes, tensors that are the parameters' roundings, half the bytes
 * between ranks, and losses near those of f32. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/rng.h"
#include "tests/trainer/thread_jobs.h"

enum { STEPS = 6 };

struct mesh_case {
    int ranks;
    const char *o[6];
};

/* ---- tensors are roundings ---- */

/* Sums over the elements of what is held: how far a tensor's element is from the parameter, in steps of bf16 there, and
 * how many are not the nearest. */
struct rounding {
    double off, others, elems;
};

/* By which x, element `element` of the whole tensor, is raised before its lower half is dropped. */
static uint32_t draw(const struct trainer *t, const struct param *p, uint64_t element)
{
    struct rng_at at = { .seed = (uint64_t)t->cfg->run.seed,
                         .sample = (uint32_t)hash64(p->name, strlen(p->name)),
                         .step = (uint32_t)t->step,
                         .stream = RNG_ROUND };
    return rng_u32(at, element) % 0x10000;
}

static status *look_at(const struct trainer *t, const struct param *p, const uint16_t *tensor, struct zero_run part,
                       const float *exact, bool stochastic, struct rounding *r)
{
    const uint16_t *held = tensor + (part.begin - p->offset);
    for (uint64_t e = 0; e < run_elems(part); e++) {
        uint32_t bits;
        memcpy(&bits, &exact[e], sizeof bits);
        uint16_t down = (uint16_t)(bits >> 16), nearest = bf16_from_f32(exact[e]), want = nearest;
        uint64_t at = part.begin + e - p->offset;
        if (stochastic && at < box_volume(p->shape.ndim, &p->box))
            want = (uint16_t)((bits + draw(t, p, box_element(&p->shape, &p->box, at))) >> 16);
        if (held[e] != want)
            return ERR(INTERNAL, "%s, element %llu: %g is held as %04x", p->name, (unsigned long long)at,
                       (double)exact[e], held[e]);
        r->off += (held[e] == down ? 0 : 1) - (double)(bits & 0xffff) / 0x10000;
        r->others += held[e] != nearest;
        r->elems += 1;
    }
    return NULL;
}

/* Parameter q of the model, as its shards know it. */
static status *look_at_parameter(const struct trainer *t, const struct param *q, struct rounding *r)
{
    const struct param *p = q;
    struct shards *s = trainer_shards_of(t, t->model, &p);
    bool stochastic = t->cfg->train.param_rounding == ROUNDING_STOCHASTIC && !p->frozen;
    if (!s || !shards_cut_values(s) || q->value.dtype != DTYPE_BF16)
        return ERR(INTERNAL, "%s is no bf16, or the parameter itself", p->name);
    struct shard_runs own = shards_own(s, p->frozen);
    const float *value = own.value;
    for (uint64_t k = 0; p->alias < 0 && k < own.runs; value += run_elems(own.run[k]), k++) {
        uint64_t lo = own.run[k].begin, hi = own.run[k].end, end = p->offset + param_elems(p);
        lo = lo > p->offset ? lo : p->offset;
        hi = hi < end ? hi : end;
        if (lo < hi)
            TRY(look_at(t, p, q->value.data, (struct zero_run){ lo, hi }, value + (lo - own.run[k].begin), stochastic,
                        r));
    }
    return NULL;
}

static status *tensors_are_roundings(struct trainer *t)
{
    struct shards *s[SHARDS_MOST];
    int n = trainer_all_shards(t, t->model, s);
    bool stochastic = t->cfg->train.param_rounding == ROUNDING_STOCHASTIC;
    struct rounding r = { 0 };
    status *st = NULL;
    for (int i = 0; i < n; i++)
        TRY(shards_hold(s[i], false));
    for (int i = 0; !st && i < t->model->params.count; i++)
        if (!t->model->params.p[i].away)
            st = look_at_parameter(t, &t->model->params.p[i], &r);
    for (int i = 0; i < n; i++)
        shards_release(s[i], false);
    TRY(st);
    double mean = r.off / fmax(r.elems, 1), others = r.others / fmax(r.elems, 1);
    if (r.elems > 1000 && !(fabs(mean) < 0.05 && (stochastic ? others > 0.02 : others == 0)))
        return ERR(INTERNAL, "mean error %g steps, %g not to the nearest", mean, others);
    return NULL;
}

/* Bytes of parameters: two a value in tensors, four in a shard; and no f32 beside them. elems: in tensors. */
static status *bytes_of(struct zero *z, int64_t stage, uint64_t shards, uint64_t elems, uint64_t count)
{
    struct shards *s = zero_shards(z);
    struct shard_runs own[2] = { shards_own(s, false), shards_own(s, true) };
    uint64_t held = own[0].elems + own[1].elems, slack = (own[0].runs + own[1].runs + count) * PARAM_ALIGN;
    struct zero_memory m = zero_memory(z);
    if (held > elems / shards + slack || (shards == 1 && held != elems))
        return ERR(INTERNAL, "a shard of %d of %llu parameters has %llu", (int)shards, (unsigned long long)elems,
                   (unsigned long long)held);
    if (m.parameters != 4 * held + 2 * (stage == 3 ? held : elems) || (m.windows == 0) != (stage < 2))
        return ERR(INTERNAL, "%llu bytes of parameters with stage %d", (unsigned long long)m.parameters, (int)stage);
    return NULL;
}

static status *bytes_are_the_formulas(struct trainer *t)
{
    const struct params *ps = &t->model->params;
    int64_t stage = t->cfg->parallel.zero, cut = t->cfg->parallel.dp_shard ? t->cfg->parallel.dp_shard : t->dp->size;
    uint64_t shards = stage ? (uint64_t)cut : 1, count = (uint64_t)ps->count, experts = 0;
    if (ps->data)
        return ERR(INTERNAL, "there is an f32 block, too");
    for (int i = 0; t->ep && i < ps->count; i++)
        experts += ps->p[i].experts && !ps->p[i].away ? (param_elems(&ps->p[i]) + PARAM_ALIGN - 1) / PARAM_ALIGN : 0;
    experts *= PARAM_ALIGN;
    if (experts)
        TRY(bytes_of(t->experts->zero, stage, stage ? (uint64_t)t->ep_dp->size : 1, experts, count));
    return bytes_of(t->zero, stage, shards, ps->total + ps->frozen - experts, count);
}

static status *look_at_all(struct trainer *t)
{
    TRY(comm_agree(t->world, bytes_are_the_formulas(t)));
    return comm_agree(t->world, tensors_are_roundings(t));
}

/* ---- jobs ---- */

static struct job run_case(const char *name, const struct mesh_case *c, int more, const char *const *extra)
{
    char text[2048];
    make_config(text, sizeof text, name);
    struct job j = { .config = text, .after = look_at_all };
    const char *common[] = { "threads=1", "train.param_dtype=bf16", "train.grad_dtype=bf16", "optim.lr=1e-3" };
    for (size_t i = 0; i < sizeof common / sizeof *common; i++)
        j.overrides[j.override_count++] = common[i];
    for (int i = 0; i < more; i++)
        j.overrides[j.override_count++] = extra[i];
    for (int i = 0; i < 6 && c->o[i]; i++)
        j.overrides[j.override_count++] = c->o[i];
    must(comm_threads_run(c->ranks, run_rank, &j));
    return j;
}

static void expect_equal(const struct mesh_case *c, const struct job *got, const struct job *want, const char *run_name)
{
    for (int step = 1; run_name && step <= STEPS; step++)
        if (metric(run_name, step, "loss") != metric("whole", step, "loss"))
            fail_msg("%s: step %d: loss %.17g, not %.17g", c->o[0], step, metric(run_name, step, "loss"),
                     metric("whole", step, "loss"));
    if (got->hashes.weights != want->hashes.weights || got->hashes.moments != want->hashes.moments ||
        got->hashes.reference != want->hashes.reference)
        fail_msg("%d ranks, %s: other weights, moments or reference", c->ranks, c->o[0]);
}

static const struct mesh_case whole = { 1, { "parallel.zero=0" } };

static void layouts_change_no_bit(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.zero=0" } },
        { 4, { "parallel.zero=1", "parallel.dp_shard=2" } },
        { 3, { "parallel.zero=2", "memory.recompute=block" } },
        { 8, { "parallel.zero=3", "parallel.dp_shard=4" } },
        { 6, { "parallel.zero=3", "parallel.pp=2", "parallel.dp=3", "parallel.schedule=zero-bubble" } },
        { 4, { "parallel.zero=1", "parallel.pp=2" } },
        { 4, { "parallel.zero=0", "parallel.pp=2", "parallel.schedule=interleaved" } },
        { 4, { "parallel.zero=3", "parallel.pp=2", "parallel.schedule=interleaved" } },
    };
    static const char *const kinds[][5] = {
        { "train.param_rounding=stochastic", "algo.reference=live", "algo.ref_sync_steps=2", "train.lanes=8",
          "train.freeze=*norm*" },
        { "train.param_rounding=nearest", "algo.reference=precomputed", "model.tied=false", "train.dtype=bf16",
          "optim.kind=muon" },
        { "train.param_rounding=stochastic", "lora.targets=*_proj", "algo.reference=base", "algo.warmup_sft_steps=0",
          "train.lanes=8" },
    };
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const char *o[7] = { kinds[k][0], kinds[k][1],       kinds[k][2],    kinds[k][3],
                             kinds[k][4], "checkpoint.url=", "train.steps=6" };
        struct job want = run_case("whole", &whole, 7, o);
        for (size_t c = k; c < sizeof cases / sizeof *cases; c += k == 2 ? 2 : 1) {
            if (!runs_kind(c, k, 2))
                continue;
            struct job got = run_case("cut", &cases[c], 7, o);
            expect_equal(&cases[c], &got, &want, "cut");
        }
    }
}

static void a_resume_rounds_alike(void **state)
{
    (void)state;
    static const struct mesh_case hops[] = { { 4, { "parallel.zero=3", "train.steps=4" } },
                                             { 2, { "parallel.zero=0", "train.steps=5" } },
                                             { 4, { "parallel.zero=1", "parallel.pp=2", "train.steps=6" } } },
                                  end = { 1, { "parallel.zero=0", "train.steps=6" } };
    /* of the second kind biases move, too, which do not learn */
    static const char *const kinds[][10] = {
        { "train.param_rounding=stochastic", "checkpoint.every=1" },
        { "train.param_rounding=stochastic", "checkpoint.every=1", "model.layers=3", "model.experts=8",
          "model.experts_per_token=2", "model.expert_ffn=16", "model.router=sigmoid", "model.router_bias=true",
          "model.balance_rate=0.013" },
    };
    for (int k = 0; k < 2; k++) {
        char name[16];
        const char *o[10];
        int n = 0;
        for (; kinds[k][n]; n++)
            o[n] = kinds[k][n];
        snprintf(name, sizeof name, "hops%d", k);
        o[n] = "checkpoint.url=";
        struct job want = run_case("whole", &end, n + 1, o), got = { 0 };
        for (int i = 0; i < 3; i++)
            got = run_case(name, &hops[i], n, o);
        assert_int_equal(got.resumed_from, 5);
        expect_equal(&hops[2], &got, &want, name);
    }
}

/* Near f32, but not its bits; and half of what is sent. Other meshes, too, of which the bits are not those of one rank.
 */
static void beside_f32(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 4, { "parallel.zero=0", "checkpoint.url=", "train.steps=6" } },
        { 4, { "parallel.zero=1", "checkpoint.url=", "train.steps=6" } },
        { 4, { "parallel.zero=3", "checkpoint.url=", "train.steps=6" } },
        { 4, { "parallel.zero=2", "checkpoint.url=", "train.steps=6", "train.deterministic=false" } },
        { 4, { "parallel.zero=1", "checkpoint.url=", "train.steps=6", "parallel.tp=2", "parallel.sequence=true" } },
        { 4, { "parallel.zero=3", "checkpoint.url=", "train.steps=6", "parallel.cp=2" } },
    };
    static const char *const stochastic[] = { "train.param_rounding=stochastic" };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char text[2048];
        make_config(text, sizeof text, "f32");
        const char *o[8] = { "threads=1", "optim.lr=1e-3" };
        int n = 2;
        for (int i = 0; i < 6 && cases[c].o[i]; i++)
            o[n++] = cases[c].o[i];
        (void)run(text, 4, n, o);
        (void)run_case("bf16", &cases[c], 1, stochastic);
        double sent = metric("bf16", STEPS, "dp_sent_bytes") / metric("f32", STEPS, "dp_sent_bytes");
        if (!(sent > 0.49 && sent < 0.55))
            fail_msg("case %zu: %g of the bytes", c, sent);
        for (int step = 1; step <= STEPS; step++) {
            double got = metric("bf16", step, "loss"), want = metric("f32", step, "loss");
            if (!(fabs(got - want) <= 2e-2 * want) || (step == STEPS && got == want))
                fail_msg("case %zu: step %d: loss %.9g beside %.9g", c, step, got, want);
        }
    }
}

/* Experts on several ranks, which have shards of their own: losses are near those of one rank, the same after a resume;
 * the reference, which follows in the last step, is what the weights are then. With a learning rate of 0 weights are
 * those of one rank. */
static void experts_apart(void **state)
{
    (void)state;
    static const char *const kinds[][10] = {
        { "model.layers=3", "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24",
          "model.dense_layers=1", "train.param_rounding=stochastic" },
        { "model.layers=3", "model.experts=8", "model.experts_per_token=3", "model.expert_ffn=16",
          "model.router=sigmoid", "model.router_bias=true", "model.balance_rate=0.013", "train.freeze=*experts*" },
    };
    static const struct mesh_case one = { 1, { "parallel.zero=0", "train.steps=6" } },
                                  cases[] = { { 2, { "parallel.ep=2", "parallel.zero=0", "train.steps=6" } },
                                              { 4, { "parallel.ep=2", "parallel.zero=1", "train.steps=6" } },
                                              { 8, { "parallel.ep=2", "parallel.pp=2", "train.steps=6" } },
                                              { 4, { "parallel.ep=2", "parallel.tp=2", "train.steps=6" } },
                                              { 4, { "parallel.ep=2", "parallel.zero=3", "train.steps=6" } } },
                                  cut = { 4, { "parallel.ep=2", "parallel.zero=1", "train.steps=4" } };
    for (int k = 0; k < 2; k++) {
        const char *o[16] = { "checkpoint.every=1", "algo.reference=live", "algo.ref_sync_steps=3",
                              "algo.ref_sync_alpha=1" };
        char name[16];
        int n = 4;
        for (int i = 0; kinds[k][i]; i++)
            o[n++] = kinds[k][i];
        snprintf(name, sizeof name, "ep%d", k);
        (void)run_case(name, &cut, n, o);
        struct job got = run_case(name, &cases[1], n, o);
        assert_int_equal(got.resumed_from, 4);
        o[n++] = "checkpoint.url=";
        struct job want = run_case("whole", &cases[1], n, o);
        expect_equal(&cases[1], &got, &want, name);
        (void)run_case("one", &one, n, o);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            got = run_case("apart", &cases[c], n, o);
            assert_true(got.hashes.reference == got.hashes.weights);
            for (int step = 1; step <= STEPS; step++)
                if (!(fabs(metric("apart", step, "loss") - metric("one", step, "loss")) <= 2e-3))
                    fail_msg("kind %d, mesh %zu, step %d: loss %.9g beside %.9g", k, c, step,
                             metric("apart", step, "loss"), metric("one", step, "loss"));
        }
        o[n++] = "optim.lr=0";
        o[n++] = "model.balance_rate=0";
        want = run_case("one", &one, n, o);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            got = run_case("apart", &cases[c], n, o);
            assert_true(got.hashes.weights == want.hashes.weights && got.hashes.reference == want.hashes.reference);
        }
    }
}

static void what_does_not_go(void **state)
{
    (void)state;
    static const char *const rounding[] = { "train.param_rounding=stochastic", NULL };
    refused(1, rounding, "train.param_rounding: stochastic needs train.param_dtype: bf16");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_change_no_bit), cmocka_unit_test(a_resume_rounds_alike), cmocka_unit_test(beside_f32),
        cmocka_unit_test(experts_apart),         cmocka_unit_test(what_does_not_go),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
