/* test_job_moe: whole jobs of models with routed experts, their ranks threads of this process: the same bits on any dp,
 * pp and ZeRO stage, as without experts; on other meshes losses within rounding; across resumes, biases included. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"

#include <pthread.h>

enum { STEPS = 4 };

struct mesh_case {
    int ranks;
    const char *o[6];
};

/* Two kinds of layers with experts. */
static const char *const kinds[][9] = {
    { "model.layers=3", "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=24", "model.dense_layers=1",
      "model.balance_loss=0.05", "algo.reference=live" },
    { "model.layers=3", "model.experts=8", "model.experts_per_token=3", "model.expert_ffn=16", "model.first_dense=1",
      "model.shared_experts=2", "model.router=sigmoid", "model.router_bias=true", "model.balance_rate=0.01" },
};

/* Tensors of a whole model, put together from what ranks hold. */
struct whole {
    char name[96];
    float *x;
    uint64_t n;
};
struct wholes {
    pthread_mutex_t lock;
    struct whole t[64];
    int count;
};
static struct wholes gradients = { .lock = PTHREAD_MUTEX_INITIALIZER }; /* AdamW's first moments of the last run */

static void forget_gradients(void)
{
    while (gradients.count)
        free(gradients.t[--gradients.count].x);
}

static struct whole *whole_of(const struct param *p)
{
    for (int i = 0; i < gradients.count; i++)
        if (!strcmp(gradients.t[i].name, p->name))
            return &gradients.t[i];
    struct whole *w = &gradients.t[gradients.count++];
    bool ok;
    assert_true(gradients.count <= 64);
    snprintf(w->name, sizeof w->name, "%s", p->name);
    w->n = shape_volume(&p->shape, &ok);
    w->x = calloc(w->n, sizeof *w->x);
    return w;
}

/* What lies outside of blocks, and the largest blocks of odd and even numbers, in a window each: elements with values
 * (frozen ones too), and with gradients. Of experts, or of all else. */
static uint64_t window_bytes(const struct trainer *t, bool experts)
{
    enum { BLOCKS = 8 };
    uint64_t elems[2][BLOCKS + 1] = { { 0 } }, most[2][3] = { { 0 } }, stage = (uint64_t)t->cfg->parallel.zero;
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        uint64_t n = (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
        if (p->experts != experts || p->alias >= 0 || p->away)
            continue;
        elems[0][p->block + 1] += n;
        elems[1][p->block + 1] += p->frozen ? 0 : n;
    }
    for (int u = 0; u <= BLOCKS; u++)
        for (int kind = 0; kind < 2; kind++) {
            uint64_t *w = &most[kind][u ? 1 + u % 2 : 0];
            *w = elems[kind][u] > *w ? elems[kind][u] : *w;
        }
    uint64_t values = most[0][0] + most[0][1] + most[0][2], grads = most[1][0] + most[1][1] + most[1][2];
    return 4 * ((stage == 3 ? values : 0) + (stage > 1 ? grads : 0));
}

/* Together the ranks of c hold each element of z's once a replica. */
static status *check_cut(const struct trainer *t, struct zero *z, struct comm *c, bool experts)
{
    struct zero_memory m = zero_memory(z);
    uint64_t held[3] = { m.parameters, m.gradients, m.moments }, all = 0, trained = 0, stage, replicas;
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        uint64_t n = (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
        bool theirs = p->experts == experts && p->alias < 0 && !p->away;
        all += theirs ? 4 * n : 0;
        trained += theirs && !p->frozen ? 4 * n : 0;
    }
    TRY(comm_allreduce(c, held, 3, COMM_U64, COMM_SUM, NULL));
    stage = (uint64_t)t->cfg->parallel.zero;
    replicas = (uint64_t)(c->size / zero_holders(z));
    uint64_t own = stage == 3 ? replicas : (uint64_t)c->size;
    if (m.windows != window_bytes(t, experts))
        return ERR(INTERNAL, "%llu bytes of windows, not %llu", (unsigned long long)m.windows,
                   (unsigned long long)window_bytes(t, experts));
    /* of experts one sum, else as many as a replica's lanes make */
    bool sums =
        !trained || experts ? held[1] == replicas * trained : held[1] % trained == 0 && held[1] >= replicas * trained;
    return stage < 2 || !trained || (held[0] == own * all && sums && held[2] == 2 * replicas * trained)
               ? NULL
               : ERR(INTERNAL, "%llu, %llu and %llu bytes of parameters, gradients and moments",
                     (unsigned long long)held[0], (unsigned long long)held[1], (unsigned long long)held[2]);
}

static status *keep_gradients(struct trainer *t)
{
    if (t->experts)
        TRY(check_cut(t, t->zero, t->dp, false));
    if (t->experts && t->experts->zero)
        TRY(check_cut(t, t->experts->zero, t->ep_dp, true));
    pthread_mutex_lock(&gradients.lock);
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        if (p->alias >= 0 || p->away || p->frozen)
            continue;
        struct zero_moments z = zero_moments(experts_zero(t->experts, t->zero, &t->model->params, &p));
        uint64_t held = 0, elems = box_volume(p->shape.ndim, &p->box);
        float *whole = whole_of(p)->x;
        for (uint64_t r = 0; r < z.run_count; held += z.run[r].end - z.run[r].begin, r++)
            for (uint64_t e = 0; e < elems; e++)
                if (p->offset + e >= z.run[r].begin && p->offset + e < z.run[r].end)
                    whole[box_element(&p->shape, &p->box, e)] = z.m[held + p->offset + e - z.run[r].begin];
    }
    pthread_mutex_unlock(&gradients.lock);
    return NULL;
}

static struct job run_case(const char *name, int kind, const struct mesh_case *c, const char *const *more)
{
    char text[2048];
    struct job j = { .config = text, .after = keep_gradients };
    forget_gradients();
    make_config(text, sizeof text, name);
    static const char *const common[] = { "threads=1",      "train.steps=4", "algo.warmup_sft_steps=2",
                                          "optim.clip=0.3", "optim.lr=2e-3", NULL };
    const char *const *lists[] = { common, kinds[kind], c ? c->o : NULL, more };
    for (size_t l = 0; l < sizeof lists / sizeof *lists; l++)
        for (int i = 0; lists[l] && i < 9 && lists[l][i]; i++)
            j.overrides[j.override_count++] = lists[l][i];
    must(comm_threads_run(c ? c->ranks : 1, run_rank, &j));
    return j;
}

static const char *const keys[] = { "loss", "grad_norm", "balance_loss", "expert_load_max", "expert_load_min" };
enum { KEYS = sizeof keys / sizeof *keys };
static const char *const unsaved[] = { "checkpoint.url=", NULL };

static void same_bits(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.dp=2", "parallel.zero=0" } },
        { 4, { "parallel.dp=4", "parallel.zero=1" } },
        { 2, { "parallel.dp=2", "parallel.zero=2" } },
        { 2, { "parallel.pp=2", "parallel.zero=1", "parallel.schedule=zero-bubble", "memory.recompute=block" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=1" } },
        { 2, { "parallel.dp=2", "parallel.zero=3" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=3" } },
    };
    for (int kind = 0; kind < 2; kind++) {
        struct job want = run_case("whole", kind, NULL, unsaved);
        assert_true(metric("whole", STEPS, "expert_load_max") > 1 && metric("whole", STEPS, "expert_load_min") < 1);
        assert_true(metric("whole", STEPS, "balance_loss") > 1);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (!runs_kind(c, (size_t)kind, 2))
                continue;
            struct job got = run_case("spread", kind, &cases[c], unsaved);
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++)
                    if (metric("spread", step, keys[k]) != metric("whole", step, keys[k]))
                        fail_msg("kind %d, mesh %zu, step %d: %s is %.17g, not %.17g", kind, c, step, keys[k],
                                 metric("spread", step, keys[k]), metric("whole", step, keys[k]));
            assert_true(got.hashes.weights == want.hashes.weights);
            assert_true(got.hashes.moments == want.hashes.moments);
            assert_true(got.hashes.reference == want.hashes.reference);
        }
    }
}

/* What keeps loads equal does something. */
static void loads_become_equal(void **state)
{
    (void)state;
    static const char *const off[][3] = { { "model.balance_loss=0", "checkpoint.url=" },
                                          { "model.balance_rate=0", "checkpoint.url=" } };
    for (int kind = 0; kind < 2; kind++) {
        struct job with = run_case("with", kind, NULL, unsaved), without = run_case("without", kind, NULL, off[kind]);
        assert_true(metric("with", 1, "balance_loss") == metric("without", 1, "balance_loss"));
        assert_true(metric("with", 1, "loss") == metric("without", 1, "loss"));
        assert_true((metric("with", 1, "grad_norm") == metric("without", 1, "grad_norm")) == (kind == 1));
        assert_true(with.hashes.weights != without.hashes.weights);
    }
}

/* A reference that becomes the policy in each step has its biases, too. */
static status *reference_is_the_policy(struct trainer *t)
{
    int biases = 0, moved = 0;
    for (int i = 0; i < t->model->params.count; i++) {
        const struct param *p = &t->model->params.p[i], *ref = &t->ref_model->params.p[i];
        const float *x = p->value.data;
        if (!p->buffer)
            continue;
        if (memcmp(ref->value.data, x, param_elems(p) * sizeof *x) != 0)
            return ERR(INTERNAL, "%s of the reference is another", p->name);
        biases++;
        for (uint64_t e = 0; e < param_elems(p); e++)
            moved += fabsf(x[e]) > 0.005f;
    }
    return biases && moved ? NULL : ERR(INTERNAL, "%d biases, of which %d elements moved", biases, moved);
}

static void references_have_biases(void **state)
{
    (void)state;
    static const char *const alphas[] = { "algo.ref_sync_alpha=1", "algo.ref_sync_alpha=0.3" };
    static const struct mesh_case cases[] = {
        { 2, { "parallel.dp=2", "parallel.zero=3" } },
        { 4, { "parallel.pp=2", "parallel.dp=2", "parallel.zero=1" } },
    };
    uint64_t reference[2];
    for (int a = 0; a < 2; a++) {
        const char *o[] = { "checkpoint.url=", "algo.reference=live", "algo.ref_sync_steps=1", alphas[a], NULL };
        char text[2048];
        make_config(text, sizeof text, "synced");
        struct job j = { .config = text, .after = a ? NULL : reference_is_the_policy };
        for (int i = 0; i < 4; i++)
            j.overrides[j.override_count++] = o[i];
        for (int i = 0; i < 9 && kinds[1][i]; i++)
            j.overrides[j.override_count++] = kinds[1][i];
        must(comm_threads_run(1, run_rank, &j));
        struct job want = run_case("synced", 1, NULL, o);
        reference[a] = want.hashes.reference;
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
            assert_true(run_case("synced", 1, &cases[c], o).hashes.reference == want.hashes.reference);
    }
    assert_true(reference[0] != reference[1]);
}

static void tensor_parallel(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { 2, { "parallel.tp=2", "parallel.zero=0" } },
        { 4, { "parallel.tp=2", "parallel.dp=2", "parallel.sequence=true" } },
        { 4, { "parallel.tp=4", "parallel.sequence=true", "memory.recompute=block" } },
    };
    for (int kind = 0; kind < 2; kind++) {
        (void)run_case("whole", kind, NULL, unsaved);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (!runs_kind(c, (size_t)kind, 2))
                continue;
            (void)run_case("cut", kind, &cases[c], unsaved);
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++) {
                    double got = metric("cut", step, keys[k]), want = metric("whole", step, keys[k]);
                    if (!(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1)))
                        fail_msg("kind %d, mesh %zu, step %d: %s is %.12g, not %.12g", kind, c, step, keys[k], got,
                                 want);
                }
        }
    }
}

/* ---- experts on several ranks ---- */

static void routes_option(char text[160], const char *what, int number)
{
    snprintf(text, 160, "train.routes=%s:%s/routes-%d", what, root, number);
}

static void expect_near(const char *name, const char *want_run, int step, const char *key)
{
    double got = metric(name, step, key), want = metric(want_run, step, key);
    if (!(fabs(got - want) <= 1e-5 * fmax(fabs(want), 0.1)))
        fail_msg("%s: step %d: %s is %.12g, not %.12g", name, step, key, got, want);
}

/* ||g - want|| / ||want|| of every tensor. */
static void expect_gradients(struct whole *want, int count)
{
    assert_int_equal(gradients.count, count);
    for (int i = 0; i < count; i++) {
        const struct whole *got = NULL;
        double off = 0, all = 0;
        for (int k = 0; k < gradients.count; k++)
            got = strcmp(gradients.t[k].name, want[i].name) ? got : &gradients.t[k];
        assert_true(got && got->n == want[i].n);
        for (uint64_t e = 0; e < want[i].n; e++) {
            double d = (double)got->x[e] - (double)want[i].x[e];
            off += d * d;
            all += (double)want[i].x[e] * (double)want[i].x[e];
        }
        if (!(all > 0 && sqrt(off / all) <= 1e-5))
            fail_msg("%s: gradients differ by %.3g of %.3g", want[i].name, sqrt(off), sqrt(all));
    }
}

static const struct mesh_case spreads[] = {
    { 2, { "parallel.ep=2", "parallel.zero=0" } },
    { 4, { "parallel.ep=4", "parallel.zero=1" } },
    { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=1", "memory.recompute=block" } },
    { 4, { "parallel.ep=2", "parallel.tp=2", "parallel.sequence=true" } },
    { 4, { "parallel.ep=2", "parallel.pp=2", "parallel.schedule=zero-bubble" } },
    { 8, { "parallel.ep=4", "parallel.dp=2", "train.deterministic=false" } },
    { 4, { "parallel.ep=2", "parallel.pp=2", "parallel.schedule=interleaved" } },
    { 4, { "parallel.ep=2", "parallel.cp=2", "parallel.zero=1" } },
    { 2, { "parallel.ep=2", "parallel.zero=3" } },
    { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=2", "parallel.bucket=8K", "memory.recompute=block" } },
    { 8, { "parallel.ep=2", "parallel.dp=2", "parallel.pp=2", "parallel.zero=3", "parallel.schedule=zero-bubble" } },
    { 8, { "parallel.ep=2", "parallel.dp=2", "parallel.pp=2", "parallel.zero=3", "parallel.schedule=interleaved" } },
    { 8, { "parallel.ep=2", "parallel.dp=4", "parallel.zero=3", "parallel.dp_shard=4", "train.deterministic=false" } },
    { 8, { "parallel.ep=4", "parallel.dp=2", "parallel.zero=2", "parallel.dp_shard=2" } }, /* experts are not cut */
    { 6, { "parallel.ep=2", "parallel.dp=3", "parallel.zero=3", "parallel.dp_shard=2" } }, /* passes of some alone */
    { 8, { "parallel.ep=2", "parallel.dp=2", "parallel.tp=2", "parallel.sequence=true", "parallel.zero=3" } },
    { 8, { "parallel.ep=2", "parallel.dp=2", "parallel.cp=2", "parallel.zero=3", "memory.recompute=attention" } },
};
enum { SPREADS = sizeof spreads / sizeof *spreads };

/* Losses and norms of some steps; and the gradient of every tensor in one of 4 micro-batches, so that of 8 ranks some
 * have none. */
static void expert_parallel(void **state)
{
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        char record[160], replay[160];
        routes_option(record, "record", kind);
        routes_option(replay, "replay", kind);
        (void)run_case("whole", kind, NULL, (const char *[]){ "checkpoint.url=", record, NULL });
        for (int c = 0; c < SPREADS; c++) {
            if (!runs_kind((size_t)c, (size_t)kind, 2))
                continue;
            (void)run_case("spread", kind, &spreads[c], (const char *[]){ "checkpoint.url=", replay, NULL });
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++)
                    expect_near("spread", "whole", step, keys[k]);
            assert_true(metric("spread", STEPS, "ep_sent_bytes") > 0);
        }
        struct wholes want;
        const char *one_step[] = { "checkpoint.url=",     record, "train.steps=1", "algo.warmup_sft_steps=0",
                                   "train.micro_batch=2", NULL };
        (void)run_case("whole", kind, NULL, one_step);
        want = gradients;
        gradients.count = 0;
        one_step[1] = replay;
        for (int c = 0; c < SPREADS; c++) {
            if (!runs_kind((size_t)c, 1 - (size_t)kind, 2))
                continue;
            (void)run_case("spread", kind, &spreads[c], one_step);
            expect_gradients(want.t, want.count);
        }
        forget_gradients();
        memcpy(gradients.t, want.t, sizeof want.t);
        gradients.count = want.count;
        forget_gradients();
    }
}

/* Every loss, with live references and those computed once; and the same bits again on the same mesh. */
static void every_loss_on_cut_experts(void **state)
{
    (void)state;
    static const struct mesh_case cut[] = {
        { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=3", "parallel.bucket=8K" } },
        { 6, { "parallel.ep=2", "parallel.dp=3", "parallel.zero=2", "parallel.dp_shard=2" } },
    };
    for (int a = 0; a < ALGORITHMS; a++) {
        char record[160], replay[160];
        routes_option(record, "record", 9);
        routes_option(replay, "replay", 9);
        const char *o[] = { algorithms[a][0],
                            algorithms[a][1],
                            labelled_override(),
                            a % 2 ? "algo.reference=precomputed" : "algo.reference=live",
                            a % 2 ? "algo.ref_sync_steps=0" : "algo.ref_sync_steps=1",
                            "checkpoint.url=",
                            record,
                            NULL };
        (void)run_case("whole", a % 2, NULL, o);
        o[6] = replay;
        struct job first = run_case("spread", a % 2, &cut[a / 2], o);
        for (int step = 1; step <= STEPS; step++)
            for (size_t k = 0; k < KEYS; k++)
                expect_near("spread", "whole", step, keys[k]);
        struct job again = run_case("spread", a % 2, &cut[a / 2], o);
        assert_true(again.hashes.weights == first.hashes.weights && again.hashes.moments == first.hashes.moments &&
                    again.hashes.reference == first.hashes.reference);
    }
}

/* Experts are frozen, or most of what is not of experts. */
static void frozen_experts(void **state)
{
    (void)state;
    static const struct mesh_case cut[] = {
        { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=3" } },
        { 4, { "parallel.ep=2", "parallel.pp=2", "parallel.zero=3" } },
        { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.zero=2" } },
    };
    static const char *const frozen[] = { "train.freeze=*.experts.*",
                                          "train.freeze=*norm*,*embed*,*attn*,*gate.weight" };
    for (int f = 0; f < 2; f++) {
        char record[160], replay[160];
        routes_option(record, "record", 8);
        routes_option(replay, "replay", 8);
        const char *o[] = { frozen[f], "checkpoint.url=", record, NULL };
        (void)run_case("whole", f, NULL, o);
        o[2] = replay;
        for (size_t c = 0; c < sizeof cut / sizeof *cut; c++) {
            (void)run_case("spread", f, &cut[c], o);
            for (int step = 1; step <= STEPS; step++)
                for (size_t k = 0; k < KEYS; k++)
                    expect_near("spread", "whole", step, keys[k]);
        }
    }
}

/* Adapters of experts lie with them; the reference is the base. */
static void adapters_of_experts(void **state)
{
    (void)state;
    char record[160], replay[160];
    routes_option(record, "record", 9);
    routes_option(replay, "replay", 9);
    const char *o[] = { "lora.targets=*.experts.*,*.q_proj",
                        "lora.rank=3",
                        "algo.reference=base",
                        "algo.warmup_sft_steps=0",
                        record,
                        "checkpoint.url=",
                        NULL,
                        NULL,
                        NULL };
    (void)run_case("whole", 0, NULL, o);
    o[4] = replay;
    for (int c = 0; c < SPREADS; c += UNDER_TSAN ? 4 : 1) { /* adapters go the ways of what they adapt */
        (void)run_case("spread", 0, &spreads[c], o);
        for (int step = 1; step <= STEPS; step++) {
            expect_near("spread", "whole", step, "loss");
            expect_near("spread", "whole", step, "grad_norm");
        }
    }
    static const struct mesh_case from = { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.bucket=8K" } },
                                  to[] = { { 1, { "parallel.zero=0" } }, { 4, { "parallel.ep=4" } } };
    static const char *const hashes[] = { "weights_hash", "moments_hash" }; /* the reference is no state */
    o[5] = "checkpoint.every=1";
    o[6] = "checkpoint.keep_last=0";
    o[7] = "checkpoint.state_hash=true";
    (void)run_case("low", 0, &from, o);
    o[5] = "checkpoint.resume=3";
    o[6] = "checkpoint.rewind=true";
    for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
        char saved[32], loaded[32];
        assert_int_equal(run_case("low", 0, &to[c], o).resumed_from, 3);
        for (int h = 0; h < 2; h++) {
            last_value("low", "save_start", 3, hashes[h], saved);
            last_value("low", "resume", 3, hashes[h], loaded);
            assert_string_equal(loaded, saved);
        }
        expect_near("low", "whole", STEPS, "loss");
    }
}

/* Saved with experts on two ranks, resumed on one and more: every tensor bit for bit. */
static void resumes_with_other_experts(void **state)
{
    (void)state;
    static const struct mesh_case
        froms[] = { { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.bucket=8K" } },
                    { 4, { "parallel.ep=2", "parallel.dp=2", "parallel.bucket=8K", "parallel.zero=3" } } },
        to[] = { { 1, { "parallel.zero=0" } },
                 { 4, { "parallel.ep=4", "parallel.zero=1" } },
                 { 8, { "parallel.ep=2", "parallel.dp=4", "parallel.zero=3", "parallel.dp_shard=4" } },
                 { 4, { "parallel.pp=2", "parallel.ep=2", "parallel.zero=2" } } };
    for (int kind = 0; kind < 2; kind++) {
        const struct mesh_case from = froms[kind];
        const char *name = kind ? "dealt-1" : "dealt-0";
        char saved[HASHES][32], record[160], replay[160];
        routes_option(record, "record", kind);
        routes_option(replay, "replay", kind);
        (void)run_case("whole", kind, NULL, (const char *[]){ "checkpoint.url=", record, NULL });
        const char *const all[] = { "checkpoint.every=1", "checkpoint.keep_last=0", "checkpoint.state_hash=true",
                                    replay, NULL },
                          *const rest[] = { "checkpoint.every=1",
                                            "checkpoint.keep_last=0",
                                            "checkpoint.resume=3",
                                            "checkpoint.rewind=true",
                                            "checkpoint.state_hash=true",
                                            replay,
                                            NULL };
        (void)run_case(name, kind, &from, all);
        for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
            assert_int_equal(run_case(name, kind, &to[c], rest).resumed_from, 3);
            state_hashes_of(name, "save_start", 3, saved);
            expect_resumed(name, 3, saved);
            expect_near(name, "whole", STEPS, "loss");
        }
    }
}

/* Saved at one mesh, resumed at another: the same weights and moments (biases are weights), and the same bits after. */
static void resumes(void **state)
{
    (void)state;
    static const struct mesh_case from = { 4, { "parallel.pp=2", "parallel.dp=2" } },
                                  to[] = { { 1, { "parallel.zero=0" } },
                                           { 2, { "parallel.dp=2", "parallel.zero=1" } } };
    static const char *const all[] = { "checkpoint.every=1", "checkpoint.keep_last=0", "checkpoint.state_hash=true",
                                       NULL },
                             *const rest[] = { "checkpoint.every=1",         "checkpoint.keep_last=0",
                                               "checkpoint.resume=2",        "checkpoint.rewind=true",
                                               "checkpoint.state_hash=true", NULL };
    for (int kind = 0; kind < 2; kind++) {
        const char *name = kind ? "moved-1" : "moved-0";
        char saved[32], got[32];
        struct job want = run_case(name, kind, &from, all);
        double loss = metric(name, STEPS, "loss");
        last_value(name, "save_start", 2, "weights_hash", saved);
        for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
            struct job again = run_case(name, kind, &to[c], rest);
            assert_int_equal(again.resumed_from, 2);
            last_value(name, "resume", 2, "weights_hash", got);
            assert_string_equal(got, saved);
            assert_true(metric(name, STEPS, "loss") == loss);
            assert_true(again.hashes.weights == want.hashes.weights && again.hashes.moments == want.hashes.moments);
        }
    }
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[6], *words;
    } bad[] = {
        { 1, { "model.experts=4", "model.expert_ffn=8" }, "model.experts_per_token: 0 is not one of 1 to" },
        { 1, { "model.experts=4", "model.experts_per_token=5", "model.expert_ffn=8" }, "is not one of 1 to" },
        { 1, { "model.experts=4", "model.experts_per_token=2" }, "model.expert_ffn: 0" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.dense_layers=7" },
          "model.dense_layers: \"7\" is not one of the layers 0 to 1" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.router_groups=3" },
          "model.router_groups: 3 does not divide model.experts: 4" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.router_groups=4" },
          "too few to take model.experts_per_token: 2" },
        { 1,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=8", "model.balance_rate=0.1" },
          "needs model.router_bias" },
        { 2,
          { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=9", "parallel.tp=2" },
          "model.expert_ffn: 9 (this model can be cut over 1 ranks)" },
        { 2, { "parallel.ep=2" }, "the model has no experts" },
        { 3,
          { "model.experts=8", "model.experts_per_token=2", "model.expert_ffn=8", "parallel.ep=3" },
          "parallel.ep: 3 does not divide model.experts: 8 (legal: 1, 2, 4, 8)" },
        { 1, { "train.routes=play:it" }, "\"play:it\" is none of record:PATH, replay:PATH" },
        { 2, { "train.routes=record:nowhere" }, "on one rank, not on 2" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].ranks, bad[i].o, bad[i].words);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refusals),
        cmocka_unit_test(same_bits),
        cmocka_unit_test(loads_become_equal),
        cmocka_unit_test(references_have_biases),
        cmocka_unit_test(tensor_parallel),
        cmocka_unit_test(resumes),
        cmocka_unit_test(expert_parallel),
        cmocka_unit_test(every_loss_on_cut_experts),
        cmocka_unit_test(frozen_experts),
        cmocka_unit_test(resumes_with_other_experts),
        cmocka_unit_test(adapters_of_experts),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
