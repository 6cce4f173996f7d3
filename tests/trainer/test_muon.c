/* Muon: its step against the same formulas in double, whose products are written out here; what a step of a job does to
 * matrices, each expert's too, and to all else; the same bits for any number of ranks and after resumes on others. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/trainer/thread_jobs.h"
#include "trainer/optim/muon.h"

/* ---- the step ---- */

enum { MOST = 40 * 24 };

/* X = a X + (b A + c A A) X, A = X X^T, on [m, k]. */
static void newton_schulz(double *x, int m, int k)
{
    static _Thread_local double gram[40][40], poly[40][40], next[MOST];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < m; j++) {
            gram[i][j] = 0;
            for (int e = 0; e < k; e++)
                gram[i][j] += x[i * k + e] * x[j * k + e];
        }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < m; j++) {
            poly[i][j] = -4.7750 * gram[i][j] + (i == j ? 3.4445 : 0);
            for (int e = 0; e < m; e++)
                poly[i][j] += 2.0315 * gram[i][e] * gram[e][j];
        }
    for (int i = 0; i < m; i++)
        for (int e = 0; e < k; e++) {
            next[i * k + e] = 0;
            for (int j = 0; j < m; j++)
                next[i * k + e] += poly[i][j] * x[j * k + e];
        }
    memcpy(x, next, (size_t)(m * k) * sizeof *x);
}

static void orthogonal(void **state)
{
    (void)state;
    static const int shapes[][2] = { { 24, 40 }, { 40, 24 }, { 16, 16 }, { 1, 33 }, { 33, 1 } };
    static float u[MOST], again[MOST], room[8 * MOST];
    static double x[MOST];
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int m = shapes[s][0], k = shapes[s][1], less = m < k ? m : k;
        double norm = 0, squares = 0;
        assert_true(muon_room((uint64_t)m, (uint64_t)k) <= sizeof room / sizeof *room);
        for (int i = 0; i < m * k; i++) {
            u[i] = (float)rng_normal((struct rng_at){ .seed = 4, .sample = (uint32_t)s }, (uint64_t)i);
            again[i] = u[i];
            norm += (double)u[i] * (double)u[i];
        }
        for (int i = 0; i < m * k; i++)
            x[i] = (double)u[i] / sqrt(norm);
        for (int step = 0; step < 5; step++)
            newton_schulz(x, m, k); /* transposed or not: (b A + c A A) X is X (b A' + c A' A'), A' = X^T X */
        must(muon_orthogonalise(NULL, NULL, u, (uint64_t)m, (uint64_t)k, room));
        for (int i = 0; i < m * k; i++) {
            if (!(fabs((double)u[i] - x[i]) <= 1e-4))
                fail_msg("[%d, %d] element %d: %g, not %g", m, k, i, (double)u[i], x[i]);
            squares += (double)u[i] * (double)u[i];
        }
        assert_true(squares / less > 0.68 * 0.68 && squares / less < 1.21 * 1.21); /* squares of singular values */
        struct workers *w;
        must(workers_open(3, &w));
        must(muon_orthogonalise(NULL, w, again, (uint64_t)m, (uint64_t)k, room));
        assert_memory_equal(again, u, (size_t)(m * k) * sizeof *u);
        workers_close(w);
    }
    memset(u, 0, sizeof u);
    must(muon_orthogonalise(NULL, NULL, u, 24, 40, room));
    for (int i = 0; i < MOST; i++)
        assert_true(u[i] == 0);
}

static void momentum_and_update(void **state)
{
    (void)state;
    for (int nesterov = 0; nesterov < 2; nesterov++) {
        struct muon o = { 0.5, 0.75, 0.25, 2, nesterov, MUON_ORIGINAL };
        float g[2] = { 3, -1 }, buffer[2] = { 8, 0 }, w[2] = { 1, 2 };
        const float direction[2] = { 1, -1 };
        muon_momentum(&o, NULL, g, buffer, 2); /* gradients 6 and -2 */
        assert_true(buffer[0] == 7.5f && buffer[1] == -0.5f);
        assert_true(g[0] == (nesterov ? 7.125f : 7.5f) && g[1] == (nesterov ? -0.875f : -0.5f));
        muon_apply(&o, NULL, w, direction, 2, 4, 1); /* 1 - lr decay = 0.875; sqrt(4 / 1) = 2 */
        assert_true(w[0] == 0.875f - 1 && w[1] == 1.75f + 1);
        muon_apply(&o, NULL, w, direction, 2, 1, 4); /* max(1, 1 / 4) */
        assert_true(w[0] == 0.875f * -0.125f - 0.5f);
        o.scale = MUON_MATCH_RMS_ADAMW;
        w[0] = 0;
        muon_apply(&o, NULL, w, direction, 1, 9, 25); /* 0.2 sqrt(25) */
        assert_true(fabsf(w[0] + 0.5f) < 1e-6f);
    }
}

/* ---- jobs ---- */

/* After one step: a matrix of a layer has moved by lr sqrt(max(1, M / K)) times a nearly orthogonal matrix, all else by
 * AdamW's lr an element at most. */
static status *looked_at(struct trainer *t)
{
    struct model *m = NULL;
    int matrices = 0;
    TRY(model_open(t->cfg->model_ops, t->cfg->model, t->model->vocab, &m));
    TRY(params_alloc(&m->params, false));
    TRY(params_init(&m->params, (uint64_t)t->cfg->run.seed));
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        const float *now = p->value.data, *before = m->params.p[i].value.data;
        double squares = 0, most = 0, k = (double)p->shape.dim[1], rows = (double)p->shape.dim[0];
        for (uint64_t e = 0; e < param_elems(p); e++) {
            double d = (double)now[e] - (double)before[e];
            squares += d * d;
            most = fmax(most, fabs(d));
        }
        double lr = t->cfg->optim.muon_lr * sqrt(fmax(1, rows / k)), each = squares / lr / lr / fmin(rows, k);
        if (p->muon && !(each > 0.3 && each < 1.5))
            return ERR(INTERNAL, "%s: mean square of singular values %g", p->name, each);
        if (!p->muon && !(most <= 1.01 * t->cfg->optim.lr && most > 0.5 * t->cfg->optim.lr))
            return ERR(INTERNAL, "%s moved by %g", p->name, most);
        if (p->muon != (strstr(p->name, "_proj.weight") && !strstr(p->name, "o_proj")))
            return ERR(INTERNAL, "%s: Muon's: %d", p->name, p->muon);
        matrices += p->muon;
    }
    model_close(m);
    return matrices == 2 * 6 ? NULL : ERR(INTERNAL, "%d matrices are Muon's", matrices);
}

static void who_moves_how(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "muon-one");
    const char *o[] = { "optim.kind=muon",         "optim.muon=*.[qkv]_proj,*.mlp.*",
                        "algo.warmup_sft_steps=0", "train.steps=1",
                        "checkpoint.url=",         "optim.clip=0" };
    struct job j = { .config = text, .override_count = 6, .after = looked_at };
    memcpy(j.overrides, o, sizeof o);
    for (int ranks = 1; ranks <= 3; ranks += 2)
        must(comm_threads_run(ranks, run_rank, &j));
}

/* Where nothing but Muon's matrices moves: gradients that are clipped mix otherwise in the momentum. */
static void clipped(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "muon-clip");
    const char *o[] = { "optim.kind=muon", "train.freeze=*embed*,*norm*,*lm_head*", "train.steps=4",
                        "checkpoint.url=", "optim.clip=0" };
    uint32_t free = run(text, 1, 5, o).weights;
    o[4] = "optim.clip=1e9"; /* more than any norm: the same */
    assert_int_equal(run(text, 2, 5, o).weights, free);
    o[4] = "optim.clip=0.001";
    uint32_t clipped = run(text, 1, 5, o).weights;
    assert_int_not_equal(clipped, free);
    assert_int_equal(run(text, 3, 5, o).weights, clipped);
}

static void ranks_and_resumes_change_no_bit(void **state)
{
    (void)state;
    char text[2048];
    const char *o[] = { "optim.kind=muon", "optim.muon_lr=0.01", "optim.weight_decay=0.1", "train.steps=9" };
    make_config(text, sizeof text, "muon-whole");
    uint32_t want = run(text, 1, 4, o).weights;
    assert_int_equal(run(text, 4, 4, (const char *[]){ o[0], o[1], o[2], "checkpoint.url=" }).weights, want);
    assert_int_not_equal(run(text, 2, 3, (const char *[]){ "checkpoint.url=", o[1], o[2] }).weights, want);
    make_config(text, sizeof text, "muon-cut");
    o[3] = "train.steps=5";
    assert_int_equal(run(text, 3, 4, o).saved, 5);
    o[3] = "train.steps=7";
    assert_int_equal(run(text, 2, 4, o).resumed_from, 5);
    o[3] = "train.steps=9";
    assert_int_equal(run(text, 5, 4, o).weights, want);
    static const char *const bad[][3] = {
        { "optim.kind=adamw", "train.steps=9", "optim.kind: muon -> adamw" },
        { "optim.kind=muon", "optim.muon=*.x", "optim.muon: \"*.x\" fits no linear layer" },
        { "optim.kind=muon", "lora.targets=*", "fits no linear layer that trains" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct job j = { .config = text, .overrides = { bad[i][0], bad[i][1] }, .override_count = 2 };
        FAILS(ST_INVALID, bad[i][2], comm_threads_run(1, run_rank, &j));
    }
}

/* ---- on every mesh ---- */

enum { MUON_STEPS = 5 };

struct muon_case {
    int ranks;
    const char *o[16];
};

/* Matrices have no second moment, in memory either: AdamW's of embedding and norms alone. */
static status *one_moment(struct trainer *t)
{
    struct zero_moments z = zero_moments(t->zero);
    uint64_t others = 0;
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        if (!p->muon && p->alias < 0)
            others += (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    }
    if (t->cfg->parallel.zero == 0 && z.v_elems != others)
        return ERR(INTERNAL, "%llu second moments, not %llu", (unsigned long long)z.v_elems,
                   (unsigned long long)others);
    uint64_t sum = z.v_elems;
    TRY(comm_allreduce(t->dp, &sum, 1, COMM_U64, COMM_SUM, NULL));
    uint64_t holders = t->cfg->parallel.zero == 0      ? (uint64_t)t->dp->size
                       : t->cfg->parallel.dp_shard > 0 ? (uint64_t)(t->dp->size / t->cfg->parallel.dp_shard)
                                                       : 1;
    return sum == others * holders ? NULL : ERR(INTERNAL, "%llu second moments in all", (unsigned long long)sum);
}

static struct job run_muon(const char *name, const struct muon_case *c, const char *steps, const char *url)
{
    char text[2048];
    make_config(text, sizeof text, name);
    struct job j = { .config = text, .after = one_moment };
    const char *common[] = { "optim.kind=muon",
                             "optim.muon_lr=0.01",
                             "optim.weight_decay=0.1",
                             "threads=1",
                             steps,
                             "model.layers=3",
                             "checkpoint.every=1",
                             url };
    for (size_t i = 0; i < sizeof common / sizeof *common; i++)
        j.overrides[j.override_count++] = common[i];
    for (int i = 0; c->o[i]; i++)
        j.overrides[j.override_count++] = c->o[i];
    must(comm_threads_run(c->ranks, run_rank, &j));
    return j;
}

static void expect_equal(const char *what, const struct job *got, const struct job *want)
{
    if (got->hashes.weights != want->hashes.weights || got->hashes.moments != want->hashes.moments)
        fail_msg("%s: other weights or moments", what);
}

/* Matrices that are cut by rows, by columns and shared by ranks (one key/value head of two), one or several an owner.
 */
static void layouts_change_no_bit(void **state)
{
    (void)state;
    static const struct muon_case whole = { 1, { "parallel.zero=1" } }, halves = { 2, { "parallel.tp=2" } },
                                  cases[] = { { 2, { "parallel.zero=0" } },
                                              { 4, { "parallel.dp_shard=2" } },
                                              { 4, { "parallel.zero=2", "parallel.dp_shard=2" } },
                                              { 3, { "parallel.zero=3", "memory.recompute=block" } },
                                              { 6, { "parallel.pp=3", "parallel.zero=3" } },
                                              { 4, { "parallel.pp=2", "parallel.zero=0" } } },
                                  cut[] = { { 4, { "parallel.tp=2", "parallel.zero=0" } },
                                            { 4, { "parallel.tp=2", "parallel.zero=3", "parallel.sequence=true" } },
                                            { 8, { "parallel.tp=2", "parallel.pp=2", "parallel.zero=2" } } };
    struct job want = run_muon("muon-whole", &whole, "train.steps=5", "checkpoint.url=");
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct job got = run_muon("muon-cut", &cases[c], "train.steps=5", "checkpoint.url=");
        expect_equal(cases[c].o[0], &got, &want);
    }
    struct job tp = run_muon("muon-tp", &halves, "train.steps=5", "checkpoint.url=");
    for (int step = 1; step <= MUON_STEPS; step++) {
        double a = metric("muon-tp", step, "loss"), b = metric("muon-whole", step, "loss");
        if (!(fabs(a - b) <= 1e-5 * b))
            fail_msg("tp 2, step %d: loss %.9g, not %.9g", step, a, b);
    }
    for (size_t c = 0; c < sizeof cut / sizeof *cut; c++) {
        struct job got = run_muon("muon-cut", &cut[c], "train.steps=5", "checkpoint.url=");
        if (c != 1) /* sequence: sums of norms in another order */
            expect_equal(cut[c].o[1], &got, &tp);
        for (int step = 1; step <= MUON_STEPS; step++)
            if (!(fabs(metric("muon-cut", step, "loss") - metric("muon-whole", step, "loss")) <= 1e-5))
                fail_msg("%s: step %d: loss %.9g", cut[c].o[1], step, metric("muon-cut", step, "loss"));
    }
}

static void a_checkpoint_goes_on_anywhere(void **state)
{
    (void)state;
    static const struct muon_case whole = { 1, { "parallel.zero=1" } },
                                  hops[] = { { 4, { "parallel.pp=2", "parallel.zero=3" } },
                                             { 2, { "parallel.zero=0" } },
                                             { 4, { "parallel.zero=2", "parallel.dp_shard=2" } } };
    static const char *const until[] = { "train.steps=4", "train.steps=5", "train.steps=6" };
    struct job want = run_muon("muon-whole", &whole, "train.steps=6", "checkpoint.url="), got = { 0 };
    char url[160];
    snprintf(url, sizeof url, "checkpoint.url=file:%s/muon-hops/ckpt", root);
    for (int i = 0; i < 3; i++)
        got = run_muon("muon-hops", &hops[i], until[i], url);
    assert_int_equal(got.resumed_from, 5);
    expect_equal("hops", &got, &want);
}

/* ---- experts ---- */

#define EXPERTS "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24"

/* One expert's matrix, of which this rank has all: what the first step's momentum makes of it, by the formulas in
 * double, is how it has moved. *still: it has no gradient, and has not moved. */
static status *look_at_matrix(const struct param *p, const float *m, const float *now, const float *before,
                              const struct optim_config *o, bool *still)
{
    static _Thread_local double x[MOST]; /* ranks are threads */
    int rows = (int)p->shape.dim[1], cols = (int)p->shape.dim[2];
    double norm = 0, scale = o->muon_lr * sqrt(fmax(1, (double)rows / cols));
    assert_true(rows <= 40 && cols <= 40 && rows * cols <= MOST);
    for (int i = 0; i < rows * cols; i++)
        norm += (double)m[i] * (double)m[i];
    for (int i = 0; i < rows * cols; i++)
        x[i] = norm > 0 ? (double)m[i] / sqrt(norm) : 0;
    for (int step = 0; step < 5; step++)
        newton_schulz(x, rows, cols);
    for (int i = 0; i < rows * cols; i++) {
        double moved = (double)now[i] - (double)before[i];
        if (!(fabs(moved + scale * x[i]) <= 5e-4 * scale))
            return ERR(INTERNAL, "%s, element %d moved by %g, not %g", p->name, i, moved, -scale * x[i]);
    }
    *still = !(norm > 0);
    return NULL;
}

static status *each_expert_moves(struct trainer *t)
{
    struct model *m = NULL;
    int moved = 0;
    TRY(model_open(t->cfg->model_ops, t->cfg->model, t->model->vocab, &m));
    TRY(params_alloc(&m->params, false));
    TRY(params_init(&m->params, (uint64_t)t->cfg->run.seed));
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &t->model->params.p[i], *q = p;
        const float *now = p->value.data, *before = m->params.p[i].value.data;
        if (!p->experts)
            continue;
        struct zero_moments z = zero_moments(experts_zero(t->experts, t->zero, &t->model->params, &q));
        uint64_t each = p->shape.dim[1] * p->shape.dim[2];
        if (!p->muon || z.run_count != 1 || z.run->begin)
            return ERR(INTERNAL, "%s is not Muon's, or not whole", p->name);
        for (uint64_t e = 0; e < p->box.len[0]; e++) {
            bool still = false;
            TRY(look_at_matrix(p, z.m + q->offset + e * each, now + e * each, before + (p->box.off[0] + e) * each,
                               &t->cfg->optim, &still));
            moved += !still;
        }
    }
    model_close(m);
    return moved >= 6 ? NULL : ERR(INTERNAL, "%d matrices have moved", moved);
}

static void each_expert_is_a_matrix(void **state)
{
    (void)state;
    static const struct muon_case cases[] = { { 1, { EXPERTS } },
                                              { 2, { EXPERTS } },
                                              { 2, { EXPERTS, "parallel.ep=2" } },
                                              { 4, { EXPERTS, "parallel.ep=2", "parallel.pp=2" } } };
    char text[2048];
    make_config(text, sizeof text, "muon-experts");
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct job j = { .config = text, .after = each_expert_moves };
        const char *common[] = { "optim.kind=muon", "parallel.zero=0", "algo.warmup_sft_steps=0", "train.steps=1",
                                 "checkpoint.url=", "optim.clip=0",    "optim.weight_decay=0",    "threads=1" };
        for (size_t i = 0; i < sizeof common / sizeof *common; i++)
            j.overrides[j.override_count++] = common[i];
        for (int i = 0; cases[c].o[i]; i++)
            j.overrides[j.override_count++] = cases[c].o[i];
        must(comm_threads_run(cases[c].ranks, run_rank, &j));
    }
}

/* With ep 1 the same bits on all meshes that promise them; on others the losses of one rank that takes the same routes.
 */
static void experts_on_meshes(void **state)
{
    (void)state;
    char record[160], replay[160];
    snprintf(record, sizeof record, "train.routes=record:%s/muon-routes", root);
    snprintf(replay, sizeof replay, "train.routes=replay:%s/muon-routes", root);
    const struct muon_case whole = { 1, { EXPERTS, record } },
                           same[] = { { 3, { EXPERTS, "parallel.zero=2" } },
                                      { 4, { EXPERTS, "parallel.zero=3", "parallel.dp_shard=2" } },
                                      { 4, { EXPERTS, "parallel.pp=2", "parallel.zero=0" } } },
                           near[] = {
                               { 2, { EXPERTS, replay, "parallel.tp=2", "parallel.zero=1" } },
                               { 2, { EXPERTS, replay, "parallel.ep=2", "parallel.zero=0" } },
                               { 4, { EXPERTS, replay, "parallel.ep=2", "parallel.zero=1" } },
                               { 4, { EXPERTS, replay, "parallel.ep=2", "parallel.zero=3" } },
                               { 8, { EXPERTS, replay, "parallel.ep=2", "parallel.zero=1", "parallel.tp=2" } },
                               { 8, { EXPERTS, replay, "parallel.ep=4", "parallel.pp=2", "parallel.zero=0" } },
                               { 8, { EXPERTS, replay, "parallel.ep=2", "parallel.dp_shard=4", "parallel.bucket=8K" } },
                           };
    struct job want = run_muon("muon-whole", &whole, "train.steps=5", "checkpoint.url=");
    for (size_t c = 0; c < sizeof same / sizeof *same; c++) {
        struct job got = run_muon("muon-cut", &same[c], "train.steps=5", "checkpoint.url=");
        expect_equal(same[c].o[3], &got, &want);
    }
    for (size_t c = 0; c < sizeof near / sizeof *near; c++) {
        (void)run_muon("muon-cut", &near[c], "train.steps=5", "checkpoint.url=");
        for (int step = 1; step <= MUON_STEPS; step++)
            if (!(fabs(metric("muon-cut", step, "loss") - metric("muon-whole", step, "loss")) <= 2e-5))
                fail_msg("mesh %zu: step %d: loss %.9g, not %.9g", c, step, metric("muon-cut", step, "loss"),
                         metric("muon-whole", step, "loss"));
    }
}

/* Momentum is one tensor of all experts, whatever each rank had. */
static void experts_go_on_anywhere(void **state)
{
    (void)state;
    static const struct muon_case hops[] = {
        { 4, { EXPERTS, "checkpoint.state_hash=true", "parallel.ep=2", "parallel.bucket=8K" } },
        { 4, { EXPERTS, "checkpoint.state_hash=true", "parallel.ep=4", "parallel.zero=0" } },
        { 2, { EXPERTS, "checkpoint.state_hash=true", "parallel.pp=2" } },
    };
    static const char *const until[] = { "train.steps=4", "train.steps=5", "train.steps=6" };
    char url[160], saved[HASHES][32];
    snprintf(url, sizeof url, "checkpoint.url=file:%s/muon-dealt/ckpt", root);
    for (int i = 0; i < 3; i++) {
        struct job j = run_muon("muon-dealt", &hops[i], until[i], url);
        if (i)
            assert_int_equal(j.resumed_from, 3 + i);
        if (i)
            expect_resumed("muon-dealt", 3 + i, saved);
        state_hashes_of("muon-dealt", "save_start", 4 + i, saved);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(orthogonal),
        cmocka_unit_test(momentum_and_update),
        cmocka_unit_test(who_moves_how),
        cmocka_unit_test(clipped),
        cmocka_unit_test(ranks_and_resumes_change_no_bit),
        cmocka_unit_test(layouts_change_no_bit),
        cmocka_unit_test(a_checkpoint_goes_on_anywhere),
        cmocka_unit_test(each_expert_is_a_matrix),
        cmocka_unit_test(experts_on_meshes),
        cmocka_unit_test(experts_go_on_anywhere),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
