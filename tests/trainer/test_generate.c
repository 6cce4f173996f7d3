/* generate against plain decoding: for every token the whole sequence is run again without a cache, its last row meets
 * the output matrix in double precision, and the largest logit, or the share of the softmax that the draw falls into,
 * is looked up here. Then what must not matter (batches, neighbours, threads), where completions end, and what is
 * refused. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/model/lora.h"
#include "trainer/rollout/generate.h"
#include "trainer/rollout/kv_cache.h"
#include "trainer/rollout/sample.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 29, PROMPTS = 16, LONGEST = 9, NEW = 20, EOS = 7, SEQUENCE = LONGEST + NEW };

struct fixture {
    struct model *m;
    struct tape *tape;
    int32_t token[PROMPTS][LONGEST];
    struct prompt prompt[PROMPTS];
};

/* Large weights, so that distributions are far from uniform and differ from place to place. */
static void stir(struct model *m)
{
    for (int i = 0; i < m->params.count; i++) {
        struct param *p = &m->params.p[i];
        float *x = p->value.data;
        for (int64_t e = 0; p->alias < 0 && e < tensor_elems(&p->value); e++) {
            double z = rng_normal((struct rng_at){ 5, (uint32_t)i, 0, RNG_DATA }, (uint64_t)e);
            x[e] = (float)(p->init == INIT_NORMAL || p->adapter ? 0.35 * z : 1 + 0.2 * z);
        }
    }
}

/* targets: of adapters; "": none. */
static struct model *open_model(const char *const *setting, const char *targets)
{
    const struct model_ops *ops;
    struct model *m;
    struct lora_config lora;
    assert_null(model_lookup("llama", &ops));
    assert_null(options_defaults(&lora_options, &lora));
    assert_null(options_set(&lora_options, "targets", targets, &lora, "test"));
    void *config = mem_calloc(1, ops->config_bytes);
    assert_null(options_defaults(ops->options, config));
    for (; *setting; setting += 2)
        assert_null(options_set(ops->options, setting[0], setting[1], config, "test"));
    assert_null(
        model_open_tuned(ops, config, VOCAB, &(struct tp_place){ .size = 1 }, &(struct tuning){ &lora, "", NULL }, &m));
    options_fini(ops->options, config);
    options_fini(&lora_options, &lora);
    mem_free(config);
    assert_null(params_alloc(&m->params, false));
    stir(m);
    return m;
}

/* Prompts of 1 to LONGEST tokens. */
static int setup_with(void **state, const char *const *setting, const char *targets)
{
    struct fixture *f = test_calloc(1, sizeof *f);
    f->m = open_model(setting, targets);
    assert_null(tape_open(NULL, NULL, 0, &f->tape));
    for (int i = 0; i < PROMPTS; i++) {
        int32_t count = 1 + (i * 5 + 3) % LONGEST;
        for (int32_t k = 0; k < count; k++)
            f->token[i][k] = (i * 13 + k * k * 3 + 1) % VOCAB;
        f->prompt[i] = (struct prompt){ f->token[i], count, (uint32_t)(100 + i) };
    }
    *state = f;
    return 0;
}

static int setup(void **state)
{
    static const char *const small[] = { "layers", "2",  "hidden", "24",    "heads",         "4",  "kv_heads", "2",
                                         "ffn",    "40", "tied",   "false", "max_positions", "28", NULL };
    return setup_with(state, small, "");
}

/* Two of three layers have experts, attention has adapters. */
static int setup_experts(void **state)
{
    static const char *const small[] = {
        "layers",     "3",  "hidden",         "24", "heads",       "4", "kv_heads",          "2",
        "ffn",        "40", "max_positions",  "28", "experts",     "8", "experts_per_token", "3",
        "expert_ffn", "16", "shared_experts", "1",  "first_dense", "1", "router_bias",       "true",
        NULL
    };
    return setup_with(state, small, "*.q_proj,*.v_proj,*.o_proj");
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    tape_close(f->tape);
    model_close(f->m);
    test_free(f);
    return 0;
}

static void must(status *st)
{
    if (st)
        fail_msg("%s", status_message(st));
}

static void refused(status *st, const char *part)
{
    assert_int_equal(status_code(st), ST_INVALID);
    if (!strstr(status_message(st), part))
        assert_string_equal(status_message(st), part);
    status_free(st);
}

/* ---- plain decoding ---- */

struct sequence {
    int32_t token[SEQUENCE];
    int32_t prompt, count;
};

/* Logits behind the last token, without a cache; sums in double. */
static void plain_logits(struct fixture *f, const struct sequence *s, double logit[VOCAB])
{
    int32_t position[SEQUENCE], offset[2] = { 0, s->count };
    for (int32_t i = 0; i < s->count; i++)
        position[i] = i;
    struct model_input in = { .tokens = s->count, .token = s->token, .seg = { 1, offset, position } };
    struct tape *t;
    must(tape_open(NULL, NULL, 0, &t));
    tape_begin(t, TAPE_FORWARD);
    struct tensor *h = f->m->ops->forward(f->m, t, &in), *w = f->m->ops->head(f->m);
    must(tape_end(t));
    int64_t c = h->dim[1];
    const float *x = (const float *)h->data + (s->count - 1) * c;
    for (int v = 0; v < VOCAB; v++) {
        logit[v] = 0;
        for (int64_t k = 0; k < c; k++)
            logit[v] += (double)x[k] * (double)((const float *)w->data)[v * c + k];
    }
    tape_close(t);
}

/* log softmax(logit / temperature)[token] */
static double plain_logp(const double *logit, double temperature, int32_t token)
{
    double sum = 0;
    for (int v = 0; v < VOCAB; v++)
        sum += exp((logit[v] - logit[token]) / temperature);
    return -log(sum);
}

static int32_t plain_greedy(const double *logit)
{
    int32_t best = 0;
    for (int32_t v = 1; v < VOCAB; v++)
        if (logit[v] > logit[best])
            best = v;
    return best;
}

static int32_t plain_draw(const double *logit, double temperature, double u)
{
    double below = 0;
    for (int32_t v = 0; v < VOCAB; v++) {
        below += exp(plain_logp(logit, temperature, v));
        if (u < below)
            return v;
    }
    return VOCAB - 1;
}

/* One completion against plain decoding, token by token. */
static void check_plain(struct fixture *f, const struct generate_options *o, const struct prompt *p,
                        const struct completion *c)
{
    double temperature = o->temperature > 0 ? (double)o->temperature : 1, logit[VOCAB];
    struct sequence s = { .prompt = p->count, .count = p->count };
    memcpy(s.token, p->token, (size_t)p->count * sizeof *p->token);
    for (int32_t i = 0; i < c->count; i++) {
        plain_logits(f, &s, logit);
        double u = rng_uniform((struct rng_at){ o->seed, p->sample, o->step, RNG_GENERATE }, (uint64_t)i);
        assert_int_equal(c->token[i], o->temperature > 0 ? plain_draw(logit, temperature, u) : plain_greedy(logit));
        if (o->logps)
            assert_true(fabs((double)c->logp[i] - plain_logp(logit, temperature, c->token[i])) < 2e-5);
        assert_true(i == c->count - 1 || c->token[i] != o->eos);
        s.token[s.count++] = c->token[i];
    }
    assert_int_equal(c->ended, c->token[c->count - 1] == o->eos);
    assert_true(c->ended || c->count == NEW);
}

static void equals_plain_decoding(void **state)
{
    struct fixture *f = *state;
    static const float temperature[] = { 0, 0.6f, 1.7f };
    struct generator *g;
    struct completion c[PROMPTS];
    int ended = 0, cut = 0;
    must(generator_open(f->m, f->tape, NULL, PROMPTS, LONGEST, NEW, &g));
    for (int k = 0; k < 3; k++) {
        struct generate_options o = { EOS, temperature[k], 77, (uint32_t)k, true };
        must(generate(g, &o, f->prompt, PROMPTS, c));
        for (int i = 0; i < PROMPTS; i++) {
            check_plain(f, &o, &f->prompt[i], &c[i]);
            ended += c[i].ended;
            cut += !c[i].ended;
        }
    }
    assert_true(ended >= 5 && cut >= 5); /* else half of the cases were not there */
    generator_close(g);
}

/* The log-probabilities of a training pass over the finished sequences, bit for bit. */
static void logps_are_those_of_training(void **state)
{
    struct fixture *f = *state;
    struct generate_options o = { EOS, 0.8f, 3, 0, true };
    struct generator *g;
    struct completion c[PROMPTS];
    struct tape *t;
    must(generator_open(f->m, f->tape, NULL, PROMPTS, LONGEST, NEW, &g));
    must(generate(g, &o, f->prompt, PROMPTS, c));
    must(tape_open(NULL, NULL, 0, &t));
    for (int i = 0; i < PROMPTS; i++) {
        int32_t token[SEQUENCE], target[SEQUENCE], position[SEQUENCE];
        int32_t p = f->prompt[i].count, n = p + c[i].count - 1, offset[2] = { 0, n };
        for (int32_t k = 0; k < n; k++) {
            position[k] = k;
            token[k] = k < p ? f->prompt[i].token[k] : c[i].token[k - p];
            target[k] = k < p - 1 ? -1 : c[i].token[k - p + 1];
        }
        struct model_input in = { .tokens = n, .token = token, .seg = { 1, offset, position } };
        tape_begin(t, TAPE_FORWARD);
        struct tensor *h = f->m->ops->forward(f->m, t, &in);
        struct tensor *lp = op_logprob(t, h, f->m->ops->head(f->m), target, o.temperature);
        must(tape_end(t));
        assert_memory_equal((const float *)lp->data + p - 1, c[i].logp, (size_t)c[i].count * sizeof(float));
    }
    tape_close(t);
    generator_close(g);
}

/* ---- what must not matter ---- */

struct kept {
    int32_t count, token[NEW];
    float logp[NEW];
    bool ended;
};

static void generate_in_batches(struct fixture *f, int batch, int threads, bool backwards,
                                const struct generate_options *o, struct kept out[PROMPTS])
{
    struct generator *g;
    struct tape *t;
    struct workers *w;
    struct prompt p[PROMPTS];
    struct completion c[PROMPTS];
    must(workers_open(threads, &w));
    must(tape_open(w, NULL, 0, &t));
    must(generator_open(f->m, t, NULL, batch, LONGEST, NEW, &g));
    for (int first = 0; first < PROMPTS; first += batch) {
        int n = PROMPTS - first < batch ? PROMPTS - first : batch;
        for (int i = 0; i < n; i++)
            p[i] = f->prompt[backwards ? PROMPTS - 1 - first - i : first + i];
        must(generate(g, o, p, n, c));
        for (int i = 0; i < n; i++) {
            struct kept *k = &out[backwards ? PROMPTS - 1 - first - i : first + i];
            *k = (struct kept){ .count = c[i].count, .ended = c[i].ended };
            memcpy(k->token, c[i].token, (size_t)c[i].count * sizeof(int32_t));
            memcpy(k->logp, c[i].logp, (size_t)c[i].count * sizeof(float));
        }
    }
    generator_close(g);
    tape_close(t);
    workers_close(w);
}

static void batches_and_threads_do_not_matter(void **state)
{
    struct fixture *f = *state;
    static const struct {
        int batch, threads;
        bool backwards;
    } other[] = { { 1, 1, false }, { 3, 1, false }, { 3, 2, true }, { 5, 3, false }, { 16, 2, true } };
    static struct kept want[PROMPTS], got[PROMPTS];
    for (int k = 0; k < 2; k++) {
        struct generate_options o = { EOS, k ? 1.3f : 0, 11, 4, true };
        generate_in_batches(f, 16, 1, false, &o, want);
        for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
            generate_in_batches(f, other[i].batch, other[i].threads, other[i].backwards, &o, got);
            assert_memory_equal(got, want, sizeof want);
        }
    }
}

/* Every part of a draw's address changes the draw; without temperature none does. */
static void draws_are_addressed(void **state)
{
    struct fixture *f = *state;
    static struct kept base[PROMPTS], other[PROMPTS];
    struct generate_options o = { EOS, 1.5f, 11, 4, true }, seed = o, step = o;
    seed.seed++;
    step.step++;
    generate_in_batches(f, 4, 1, false, &o, base);
    generate_in_batches(f, 4, 1, false, &seed, other);
    assert_memory_not_equal(base, other, sizeof base);
    generate_in_batches(f, 4, 1, false, &step, other);
    assert_memory_not_equal(base, other, sizeof base);
    struct fixture moved = *f;
    for (int i = 0; i < PROMPTS; i++) /* the same prompt under other numbers */
        moved.prompt[i] = (struct prompt){ f->prompt[0].token, f->prompt[0].count, (uint32_t)i };
    generate_in_batches(&moved, 4, 1, false, &o, other);
    int same = 0;
    for (int i = 1; i < PROMPTS; i++)
        same += !memcmp(&other[i], &other[0], sizeof other[0]);
    assert_true(same < PROMPTS / 2);
    o.temperature = seed.temperature = 0;
    generate_in_batches(f, 4, 1, false, &o, base);
    generate_in_batches(f, 4, 1, false, &seed, other);
    assert_memory_equal(base, other, sizeof base);
}

/* ---- ends, reuse, refusals ---- */

static void ends(void **state)
{
    struct fixture *f = *state;
    struct generator *g;
    struct completion c[PROMPTS];
    must(generator_open(f->m, f->tape, NULL, PROMPTS, LONGEST, NEW, &g));
    must(generate(g, &(struct generate_options){ .eos = -1 }, f->prompt, PROMPTS, c));
    int32_t third = c[2].token[0];
    for (int i = 0; i < PROMPTS; i++) { /* without an end token all run to the last */
        assert_int_equal(c[i].count, NEW);
        assert_false(c[i].ended);
        assert_null(c[i].logp);
    }
    must(generate(g, &(struct generate_options){ .eos = third }, f->prompt, PROMPTS, c));
    assert_int_equal(c[2].count, 1); /* the end token comes first */
    assert_true(c[2].ended);
    assert_int_equal(c[2].token[0], third);
    must(generate(g, &(struct generate_options){ .eos = third }, f->prompt, 0, c));
    generator_close(g);
    must(generator_open(f->m, f->tape, NULL, 1, 1, 1, &g)); /* the smallest */
    int32_t one = 5;
    must(generate(g, &(struct generate_options){ .eos = -1 }, &(struct prompt){ &one, 1, 0 }, 1, c));
    assert_int_equal(c[0].count, 1);
    generator_close(g);
}

static void steady_calls_allocate_nothing(void **state)
{
    struct fixture *f = *state;
    struct generate_options o = { EOS, 1, 1, 0, true };
    struct generator *g;
    struct completion c[PROMPTS];
    struct prompt longest[PROMPTS];
    for (int i = 0; i < PROMPTS; i++)
        longest[i] = (struct prompt){ f->token[i], LONGEST, 0 };
    must(generator_open(f->m, f->tape, NULL, PROMPTS, LONGEST, NEW, &g));
    uint64_t before = mem_count();
    must(generate(g, &o, longest, PROMPTS, c));
    assert_int_equal(mem_count() - before, 0);
    generator_close(g);
}

static void refusals(void **state)
{
    struct fixture *f = *state;
    struct generator *g;
    struct completion c[4];
    struct generate_options o = { .eos = EOS };
    refused(generator_open(f->m, f->tape, NULL, 0, 1, 1, &g), "at least 1");
    refused(generator_open(f->m, f->tape, NULL, 1, 0, 1, &g), "at least 1");
    refused(generator_open(f->m, f->tape, NULL, 1, 1, 0, &g), "at least 1");
    refused(generator_open(f->m, f->tape, NULL, 1, LONGEST, 21, &g), "outgrow model.max_positions 28");
    refused(generator_open(f->m, f->tape, NULL, 1 << 30, 1, 1, &g), "more than a pack holds");
    must(generator_open(f->m, f->tape, NULL, 2, 3, 4, &g));
    int32_t strange[] = { 1, VOCAB, 2 };
    struct prompt p[3] = { { f->token[0], 0, 0 }, { f->token[0], 4, 0 }, { strange, 3, 0 } };
    refused(generate(g, &o, p, 3, c), "3 prompts, a batch has 0 to 2");
    refused(generate(g, &o, p, 1, c), "prompt 0 has 0 tokens (legal: 1 to 3)");
    refused(generate(g, &o, p + 1, 1, c), "prompt 0 has 4 tokens");
    refused(generate(g, &o, p + 2, 1, c), "29");
    p[0].count = 3;
    o.temperature = -1;
    refused(generate(g, &o, p, 1, c), "temperature -1");
    o.temperature = NAN;
    refused(generate(g, &o, p, 1, c), "temperature");
    o.temperature = 0;
    must(generate(g, &o, p, 1, c)); /* and it still works */
    generator_close(g);
    generator_close(NULL);
}

/* ---- a token from logits ---- */

static void sampling(void **state)
{
    (void)state;
    const float x[] = { 1, 3, -2, 3, 0 }, one[] = { -7 }, none[] = { -INFINITY, 2, -INFINITY };
    assert_int_equal(sample_token(x, 5, 0, 0.999), 1); /* the lowest of equals */
    assert_int_equal(sample_token(x + 2, 3, 0, 0), 1);
    assert_int_equal(sample_token(one, 1, 0, 0.5), 0);
    assert_int_equal(sample_token(one, 1, 2, 0.999), 0);
    for (double u = 0.001; u < 1; u += 0.037)
        assert_int_equal(sample_token(none, 3, 1, u), 1);
    assert_int_equal(sample_token(none, 3, 1, 1), 1); /* beyond what a draw gives */
    /* shares of softmax({0, ln 2, ln 5}): 1/8, 2/8, 5/8; at temperature 1/2: 1/30, 4/30, 25/30 */
    const float y[] = { 0, 0.69314718f, 1.6094379f };
    static const struct {
        double u;
        float temperature;
        int32_t token;
    } at[] = {
        { 0.124, 1, 0 },     { 0.126, 1, 1 },     { 0.374, 1, 1 },     { 0.376, 1, 2 },     { 1e-10, 1, 0 },
        { 0.0332, 0.5f, 0 }, { 0.0335, 0.5f, 1 }, { 0.1666, 0.5f, 1 }, { 0.1668, 0.5f, 2 }, { 0.99999, 0.5f, 2 }
    };
    for (size_t i = 0; i < sizeof at / sizeof *at; i++)
        assert_int_equal(sample_token(y, 3, at[i].temperature, at[i].u), at[i].token);
    const float huge[] = { 1e30f, -1e30f, 1e30f }; /* no overflow */
    assert_int_equal(sample_token(huge, 3, 1, 0.49), 0);
    assert_int_equal(sample_token(huge, 3, 1, 0.51), 2);
}

static void caches(void **state)
{
    (void)state;
    struct kv_caches c;
    struct kv_shape shape = { 3, 2, 4, 100 };
    must(kv_caches_init(&c, &shape, NULL, 5, 7));
    for (int l = 0; l < 3; l++)
        for (int s = 0; s < 5; s++)
            c.layer[l].len[s] = 1 + l + s;
    for (int l = 0; l < 3; l++) { /* blocks do not overlap */
        for (int e = 0; e < 5 * 7 * 2 * 4; e++) {
            c.layer[l].k[e] = (float)(10 * l);
            c.layer[l].v[e] = (float)(10 * l + 1);
        }
        assert_int_equal(c.layer[l].cap, 7);
    }
    for (int l = 0; l < 3; l++)
        for (int e = 0; e < 5 * 7 * 2 * 4; e++)
            assert_true(c.layer[l].k[e] == (float)(10 * l) && c.layer[l].v[e] == (float)(10 * l + 1));
    for (int l = 0; l < 3; l++)
        for (int s = 0; s < 5; s++)
            assert_int_equal(c.layer[l].len[s], 1 + l + s);
    kv_caches_reset(&c, 4);
    for (int l = 0; l < 3; l++) {
        assert_int_equal(c.layer[l].segments, 4);
        for (int s = 0; s < 4; s++)
            assert_int_equal(c.layer[l].len[s], 0);
    }
    kv_caches_fini(&c);
    kv_caches_fini(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(equals_plain_decoding, setup, teardown),
        cmocka_unit_test_setup_teardown(logps_are_those_of_training, setup, teardown),
        cmocka_unit_test_setup_teardown(batches_and_threads_do_not_matter, setup, teardown),
        cmocka_unit_test_setup_teardown(equals_plain_decoding, setup_experts, teardown),
        cmocka_unit_test_setup_teardown(logps_are_those_of_training, setup_experts, teardown),
        cmocka_unit_test_setup_teardown(batches_and_threads_do_not_matter, setup_experts, teardown),
        cmocka_unit_test_setup_teardown(draws_are_addressed, setup, teardown),
        cmocka_unit_test_setup_teardown(ends, setup, teardown),
        cmocka_unit_test_setup_teardown(steady_calls_allocate_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(refusals, setup, teardown),
        cmocka_unit_test(sampling),
        cmocka_unit_test(caches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
