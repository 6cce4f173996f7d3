/* Adapters and frozen parameters. On a model: the first pass is the base's to the last bit, the merged weights compute
 * what the adapters do, by the chain rule their gradients are the adapters' ones, switched off they are not there,
 * patterns fit what they say. In whole jobs whose ranks are threads: the base stays as it was; ranks, ZeRO stage,
 * recomputed blocks and the kind of reference change no bit; resumes at other meshes bring every tensor back; a save
 * writes the adapters and their moments and no more. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/trainer/thread_jobs.h"
#include "trainer/model/lora.h"

/* ---- on a model ---- */

enum { VOCAB = 29, TOKENS = 40, RANK = 3 };

static const struct model_ops *llama(void)
{
    const struct model_ops *ops = NULL;
    must(model_lookup("llama", &ops));
    return ops;
}

static status *open_sized(bool experts, const char *targets, const char *freeze, struct model **out)
{
    const char *const sizes[][2] = {
        { "layers", "2" },
        { "hidden", "24" },
        { "heads", "4" },
        { "ffn", "40" },
        { "tied", "true" },
        { "kv_heads", "2" },
        { "experts", experts ? "5" : "0" },
        { "experts_per_token", experts ? "2" : "0" },
        { "expert_ffn", experts ? "10" : "0" },
    };
    void *config = mem_calloc(1, llama()->config_bytes);
    struct lora_config lora;
    status *st = options_defaults(llama()->options, config);
    for (size_t i = 0; !st && i < sizeof sizes / sizeof *sizes; i++)
        st = options_set(llama()->options, sizes[i][0], sizes[i][1], config, "test");
    must(st);
    must(options_defaults(&lora_options, &lora));
    must(options_set(&lora_options, "targets", targets, &lora, "test"));
    lora.rank = RANK;
    lora.alpha = 4.5;
    st = model_open_tuned(llama(), config, VOCAB, &(struct tp_place){ .size = 1 },
                          &(struct tuning){ &lora, freeze, NULL }, out);
    options_fini(llama()->options, config);
    options_fini(&lora_options, &lora);
    mem_free(config);
    if (!st)
        must(params_alloc(&(*out)->params, true));
    if (!st)
        must(params_init(&(*out)->params, 5));
    return st;
}

static status *open_tuned(const char *targets, const char *freeze, struct model **out)
{
    return open_sized(false, targets, freeze, out);
}

static struct model *opened(const char *targets, const char *freeze)
{
    struct model *m = NULL;
    must(open_tuned(targets, freeze, &m));
    return m;
}

/* Of a model; and with gradients those of their sum, each times another number. */
static void pass(struct model *m, bool gradients, float out[TOKENS])
{
    int32_t token[TOKENS], target[TOKENS], position[TOKENS], offset[] = { 0, 17, TOKENS };
    float by[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        token[i] = (i * 11 + 3) % VOCAB;
        target[i] = (i * 7 + 5) % VOCAB;
        position[i] = i < offset[1] ? i : i - offset[1];
        by[i] = (float)(i % 5) - 1.5f;
    }
    struct model_input in = { .tokens = TOKENS, .token = token, .seg = { 2, offset, position } };
    struct tape *t;
    must(tape_open(NULL, NULL, 0, &t));
    tape_begin(t, gradients ? TAPE_TRAIN : TAPE_FORWARD);
    struct tensor *h = m->ops->forward(m, t, &in), *y = op_logprob(t, h, m->ops->head(m), target, 1);
    must(tape_end(t));
    memcpy(out, y->data, TOKENS * sizeof *out);
    if (gradients)
        must(tape_backward(t, y, by, TAPE_BACKWARD_ALL));
    tape_close(t);
}

static void logps(struct model *m, float out[TOKENS])
{
    pass(m, false, out);
}

static void starts_at_the_base(void **state)
{
    (void)state;
    struct model *plain = opened("", ""), *m = opened("*", "");
    float want[TOKENS], got[TOKENS];
    logps(plain, want);
    logps(m, got);
    assert_memory_equal(got, want, sizeof got);
    assert_int_equal(m->params.count, plain->params.count + 2 * 7 * 2);
    assert_true(m->lora_scale == 1.5f);
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        const float *x = p->value.data;
        size_t n = param_elems(p);
        bool b = strstr(p->name, "lora_B") != NULL;
        double most = 0, squares = 0, bound = 1 / sqrt((double)p->shape.dim[p->shape.ndim - 1]);
        assert_int_equal(p->frozen, !p->adapter);
        assert_true(p->frozen ? !p->value.grad : p->value.grad && p->offset < m->params.total);
        if (!p->adapter)
            assert_memory_equal(x, plain->params.p[i].value.data, n * sizeof *x);
        for (size_t e = 0; e < n; e++) {
            most = fmax(most, fabs((double)x[e]));
            squares += (double)x[e] * (double)x[e];
        }
        if (p->adapter && !b) /* uniform in +-bound: a variance of bound^2 / 3 */
            assert_true(most <= bound && most > 0.9 * bound &&
                        fabs(3 * squares / (double)n / bound / bound - 1) < 0.35);
        if (b)
            assert_true(most == 0);
    }
    assert_int_equal(params_unique_elems(&m->params) - params_trained_elems(&m->params),
                     params_unique_elems(&plain->params));
    model_close(plain);
    model_close(m);
}

/* |z - scale y|^2 / |scale y|^2 of y [m, n] = a [m, k] x [k, n], row-major, each given so or transposed. */
static double off_product(const float *a, bool a_trans, const float *x, bool x_trans, uint64_t m, uint64_t k,
                          uint64_t n, double scale, const float *z)
{
    double off = 0, all = 0;
    for (uint64_t i = 0; i < m; i++)
        for (uint64_t j = 0; j < n; j++) {
            double y = 0;
            for (uint64_t l = 0; l < k; l++)
                y += (double)a[a_trans ? l * m + i : i * k + l] * (double)x[x_trans ? j * k + l : l * n + j];
            off += ((double)z[i * n + j] - scale * y) * ((double)z[i * n + j] - scale * y);
            all += scale * scale * y * y;
        }
    return all > 0 ? off / all : off;
}

/* By the chain rule the gradients of B and A are scale dW A^T and scale B^T dW, each expert's too. */
static void expect_chain_rule(struct model *plain, struct model *m)
{
    float seen[TOKENS];
    pass(plain, true, seen);
    pass(m, true, seen);
    for (int i = 0; i < plain->params.count; i++) {
        const struct param *of = &m->params.p[i];
        if (of->lora_a < 0)
            continue;
        const struct tensor *a = &m->params.p[of->lora_a].value, *b = &m->params.p[of->lora_b].value;
        int first = of->shape.ndim - 2;
        uint64_t rows = of->shape.dim[first], cols = of->shape.dim[first + 1];
        double scale = (double)m->lora_scale;
        for (uint64_t e = 0; e < (first ? of->shape.dim[0] : 1); e++) {
            const float *dw = (const float *)plain->params.p[i].value.grad + e * rows * cols,
                        *ea = (const float *)a->data + e * RANK * cols, *eb = (const float *)b->data + e * rows * RANK;
            double da = off_product(eb, true, dw, false, RANK, rows, cols, scale,
                                    (const float *)a->grad + e * RANK * cols),
                   db = off_product(dw, false, ea, true, rows, cols, RANK, scale,
                                    (const float *)b->grad + e * rows * RANK);
            if (!(da < 1e-8 && db < 1e-8))
                fail_msg("%s, matrix %d: gradients of A and B are off by %g, %g", of->name, (int)e, sqrt(da), sqrt(db));
        }
    }
}

static int merge_all(struct model *plain, struct model *m)
{
    int layers = 0;
    for (int i = 0; i < plain->params.count; i++) {
        struct param *w = &plain->params.p[i], *of = &m->params.p[i];
        if (of->lora_a < 0)
            continue;
        const float *a = m->params.p[of->lora_a].value.data, *b = m->params.p[of->lora_b].value.data;
        int at = w->shape.ndim - 2;
        uint64_t rows = w->shape.dim[at], cols = w->shape.dim[at + 1], n = rows * cols, part = n / 3;
        for (uint64_t e = 0; e < (at ? w->shape.dim[0] : 1); e++) { /* in two goes, the second from inside a row */
            float *x = (float *)w->value.data + e * n;
            const float *ea = a + e * RANK * cols, *eb = b + e * rows * RANK;
            lora_merge(x, 0, part, cols, ea, eb, RANK, m->lora_scale);
            lora_merge(x + part, part, n - part, cols, ea, eb, RANK, m->lora_scale);
            layers++;
        }
    }
    return layers;
}

static void merged_is_adapted(void **state)
{
    (void)state;
    for (int experts = 0; experts < 2; experts++) {
        struct model *plain = NULL, *m = NULL;
        must(open_sized(experts, "", "", &plain));
        must(open_sized(experts, experts ? "*.k_proj,*.experts.*" : "*.k_proj,*.o_proj,*.1.mlp.*", "", &m));
        float base[TOKENS], adapted[TOKENS], off[TOKENS], merged[TOKENS];
        for (int i = 0; i < m->params.count; i++)
            for (uint64_t e = 0; m->params.p[i].adapter && e < param_elems(&m->params.p[i]); e++)
                ((float *)m->params.p[i].value.data)[e] =
                    0.2f * (float)rng_normal((struct rng_at){ .seed = 1, .sample = (uint32_t)i }, e);
        logps(plain, base);
        logps(m, adapted);
        m->adapters_off = true;
        logps(m, off);
        assert_memory_equal(off, base, sizeof off);
        m->adapters_off = false;
        assert_int_equal(merge_all(plain, m), experts ? 2 + 2 * 3 * 5 : 2 + 2 + 3);
        logps(plain, merged);
        double most = 0;
        for (int i = 0; i < TOKENS; i++) {
            assert_true(fabs((double)merged[i] - (double)adapted[i]) <= 1e-5 * fabs((double)adapted[i]));
            most = fmax(most, fabs((double)adapted[i] - (double)base[i]));
        }
        assert_true(most > 1e-2);
        expect_chain_rule(plain, m);
        model_close(plain);
        model_close(m);
    }
}

static void patterns(void **state)
{
    (void)state;
    struct model *m = NULL;
    FAILS(ST_INVALID, "lora.targets: \"q_proj\" fits no linear layer of this model (there are: *.self_attn.q_proj, ",
          open_tuned("*.v_proj,q_proj", "", &m));
    FAILS(ST_INVALID, "fits no linear layer", open_tuned("*embed_tokens", "", &m));
    FAILS(ST_INVALID, "fits no linear layer", open_tuned("*norm*", "", &m));
    FAILS(ST_INVALID,
          "train.freeze: \"*.bias\" fits no parameter of this model (there are: model.embed_tokens.weight, ",
          open_tuned("", "*norm*,*.bias", &m));
    FAILS(ST_INVALID, "leaves nothing to train", open_tuned("", "*", &m));
    FAILS(ST_INVALID, "with lora.targets all parameters but the adapters are frozen", open_tuned("*", "*norm*", &m));
    m = opened("", "lm_head.weight,model.layers.1.*"); /* tied: frozen under its other name too */
    for (int i = 0; i < m->params.count; i++) {
        const char *name = m->params.p[i].name;
        assert_int_equal(m->params.p[i].frozen,
                         !!strstr(name, ".1.") || !!strstr(name, "embed") || !!strstr(name, "head"));
        assert_true(!m->params.p[i].value.grad == m->params.p[i].frozen);
        assert_true(m->params.p[i].frozen == (m->params.p[i].offset >= m->params.total));
    }
    model_close(m);
}

/* ---- in whole jobs ---- */

static const char targets[] = "lora.targets=*.q_proj,*.v_proj,*.down_proj";

/* What is frozen has its first values, the rest has not. */
static status *base_stayed(struct trainer *t)
{
    const struct config *c = t->cfg;
    const struct tuning tuning = { &c->lora, c->train.freeze, NULL };
    struct tp_place at = { .size = t->tp ? t->tp->size : 1, .rank = t->tp ? t->tp->rank : 0 };
    struct model *m = NULL;
    TRY(model_open_tuned(c->model_ops, c->model, t->model->vocab, &at, &tuning, &m));
    TRY(params_alloc(&m->params, false));
    TRY(params_init(&m->params, (uint64_t)c->run.seed));
    int moved = 0;
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &t->model->params.p[i];
        bool same = !memcmp(p->value.data, m->params.p[i].value.data, param_elems(p) * sizeof(float));
        if (same != p->frozen)
            return ERR(INTERNAL, "%s %s", p->name, same ? "did not move" : "was to stay");
        moved += !same;
    }
    model_close(m);
    return moved ? NULL : ERR(INTERNAL, "nothing moved");
}

static struct job run_watched(const char *config, int ranks, int overrides, const char **override)
{
    struct job j = { .config = config, .override_count = overrides, .after = base_stayed };
    memcpy(j.overrides, override, (size_t)overrides * sizeof *override);
    must(comm_threads_run(ranks, run_rank, &j));
    return j;
}

enum { STEPS = 6 };

static void references_and_ranks_change_no_bit(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *reference, *zero, *recompute;
    } same[] = { { 1, "base", "0", "none" },
                 { 2, "live", "1", "none" },
                 { 4, "precomputed", "0", "block" },
                 { 4, "base", "1", "block" } };
    uint32_t want = 0;
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        char text[2048], name[32], words[3][64];
        snprintf(name, sizeof name, "lora-%zu", i);
        make_config(text, sizeof text, name);
        snprintf(words[0], sizeof words[0], "algo.reference=%s", same[i].reference);
        snprintf(words[1], sizeof words[1], "parallel.zero=%s", same[i].zero);
        snprintf(words[2], sizeof words[2], "memory.recompute=%s", same[i].recompute);
        const char *o[] = { targets,         "lora.rank=4",     "algo.warmup_sft_steps=0",
                            "train.steps=6", "checkpoint.url=", words[0],
                            words[1],        words[2],          "optim.lr=3e-3" };
        uint32_t got = run_watched(text, same[i].ranks, sizeof o / sizeof *o, o).weights;
        want = i ? want : got;
        assert_int_equal(got, want);
        assert_true(metric(name, 1, "loss") == 0.69314718055994530942);
        assert_true(metric(name, 1, "rewards/margins") == 0 && metric(name, 2, "rewards/margins") != 0);
        for (int step = 1; step <= STEPS; step++)
            assert_true(metric(name, step, "loss") == metric("lora-0", step, "loss") &&
                        metric(name, step, "grad_norm") == metric("lora-0", step, "grad_norm"));
        char eval[2][32];
        last_value(name, "eval", STEPS, "loss", eval[0]);
        last_value("lora-0", "eval", STEPS, "loss", eval[1]);
        assert_string_equal(eval[0], eval[1]);
    }
}

/* SFT, then DPO, some parameters frozen: stopped twice, resumed on other ranks. */
static void frozen_parameters_stay(void **state)
{
    (void)state;
    char text[2048];
    const char *o[] = { "train.freeze=*norm*,model.embed_tokens.weight,*.0.mlp.up_proj.weight", "optim.lr=3e-3",
                        "train.steps=9" };
    make_config(text, sizeof text, "frozen-whole");
    uint32_t want = run_watched(text, 1, 3, o).weights;
    make_config(text, sizeof text, "frozen-cut");
    o[2] = "train.steps=4";
    assert_int_equal(run_watched(text, 3, 3, o).saved, 4);
    o[2] = "train.steps=6";
    assert_int_equal(run_watched(text, 2, 3, o).resumed_from, 4);
    o[2] = "train.steps=9";
    assert_int_equal(run_watched(text, 4, 3, o).weights, want);
    o[0] = "train.freeze=*norm*";
    struct job other = { .config = text, .overrides = { o[0] }, .override_count = 1 };
    FAILS(ST_INVALID, "train.freeze: ", comm_threads_run(1, run_rank, &other));
}

static uint64_t saved_bytes(const char *name, int step)
{
    char value[32];
    last_value(name, "save", step, "bytes", value);
    return strtoull(value, NULL, 10);
}

static uint64_t base_elems, trained_elems;

static status *count_elems(struct trainer *t)
{
    trained_elems = params_trained_elems(&t->model->params);
    base_elems = params_unique_elems(&t->model->params) - trained_elems;
    return NULL;
}

/* The base once, and then adapters and moments: 12 bytes for each number that trains. */
static void a_save_writes_what_trains(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "bytes");
    const char *o[] = { targets,
                        "algo.warmup_sft_steps=0",
                        "algo.reference=base",
                        "train.steps=6",
                        "checkpoint.every=1",
                        "checkpoint.async=false",
                        "checkpoint.keep_last=1" };
    struct job j = { .config = text, .override_count = 7, .after = count_elems };
    memcpy(j.overrides, o, sizeof o);
    must(comm_threads_run(1, run_rank, &j));
    uint64_t changing = 3 * trained_elems * sizeof(float);
    assert_true(trained_elems > 0 && base_elems > 4 * trained_elems);
    assert_int_equal(saved_bytes("bytes", 1), base_elems * sizeof(float) + changing);
    for (int step = 2; step <= STEPS; step++) /* the second save is the one that finds the base there */
        assert_int_equal(saved_bytes("bytes", step), changing);
    j.overrides[3] = "train.steps=9";
    must(comm_threads_run(1, run_rank, &j));
    assert_int_equal(j.resumed_from, 6);
    assert_int_equal(saved_bytes("bytes", 8), changing);
    assert_int_equal(saved_bytes("bytes", 9), changing);
}

static void resumes_at_another_mesh(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *tp, *zero, *sequence;
    } to[] = { { 1, "parallel.tp=1", "parallel.zero=1", "parallel.sequence=false" },
               { 4, "parallel.tp=4", "parallel.zero=0", "parallel.sequence=true" },
               { 3, "parallel.tp=1", "parallel.zero=0", "parallel.sequence=false" } };
    static const char *const hashes[] = { "weights_hash", "moments_hash" };
    char text[2048], want[32], got[32];
    const char *o[16] = { targets,
                          "algo.warmup_sft_steps=0",
                          "algo.reference=base",
                          "checkpoint.state_hash=true",
                          "checkpoint.keep_last=0",
                          "optim.lr=3e-3",
                          "parallel.tp=2",
                          "parallel.zero=1",
                          "parallel.sequence=true",
                          "train.steps=6" };
    make_config(text, sizeof text, "lora-undisturbed");
    (void)run_watched(text, 4, 10, o);
    make_config(text, sizeof text, "lora-moved");
    o[9] = "train.steps=3";
    assert_int_equal(run_watched(text, 4, 10, o).saved, 3);
    for (size_t c = 0; c < sizeof to / sizeof *to; c++) {
        o[6] = to[c].tp;
        o[7] = to[c].zero;
        o[8] = to[c].sequence;
        o[9] = "train.steps=6";
        o[10] = "checkpoint.resume=3";
        o[11] = "checkpoint.rewind=true";
        assert_int_equal(run_watched(text, to[c].ranks, 12, o).resumed_from, 3);
        for (size_t h = 0; h < sizeof hashes / sizeof *hashes; h++) {
            last_value("lora-moved", "save_start", 3, hashes[h], want);
            last_value("lora-moved", "resume", 3, hashes[h], got);
            assert_string_equal(got, want);
        }
        for (int step = 4; step <= STEPS; step++) {
            double a = metric("lora-moved", step, "loss"), b = metric("lora-undisturbed", step, "loss");
            assert_true(fabs(a - b) <= 1e-5 * b);
        }
    }
}

static void settings(void **state)
{
    (void)state;
    static const struct {
        const char *o[3], *words;
    } bad[] = {
        { { "algo.reference=base", "algo.warmup_sft_steps=0" }, "algo.reference: base needs lora.targets" },
        { { targets, "algo.reference=base" }, "algo.reference: base is not what algo.warmup_sft_steps leaves" },
        { { "lora.rank=4" }, "lora.rank needs lora.targets" },
        { { "lora.targets=*.q", "algo.warmup_sft_steps=0" }, "lora.targets: \"*.q\" fits no linear layer" },
    };
    char text[2048], list[2400];
    make_config(text, sizeof text, "settings");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct job j = { .config = text };
        for (; bad[i].o[j.override_count]; j.override_count++)
            j.overrides[j.override_count] = bad[i].o[j.override_count];
        FAILS(ST_INVALID, bad[i].words, comm_threads_run(2, run_rank, &j));
    }
    struct config *c = NULL;
    snprintf(list, sizeof list, "%slora: {targets: ['*.q_proj', \"*.v_proj\"], rank: 2}\n", text);
    must(config_parse(list, strlen(list), "here", 0, NULL, &c));
    assert_string_equal(c->lora.targets, "*.q_proj,*.v_proj");
    config_free(c);
    snprintf(list, sizeof list, "%slora: {targets: [['a']]}\n", text);
    FAILS(ST_INVALID, "a list here has single values", config_parse(list, strlen(list), "here", 0, NULL, &c));
    snprintf(list, sizeof list, "%slora: {targets: '*', rank: [2]}\n", text);
    FAILS(ST_INVALID, "lora.rank must have a single value, not a list",
          config_parse(list, strlen(list), "here", 0, NULL, &c));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(starts_at_the_base),
        cmocka_unit_test(merged_is_adapted),
        cmocka_unit_test(patterns),
        cmocka_unit_test(settings),
        cmocka_unit_test(references_and_ranks_change_no_bit),
        cmocka_unit_test(frozen_parameters_stay),
        cmocka_unit_test(a_save_writes_what_trains),
        cmocka_unit_test(resumes_at_another_mesh),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
