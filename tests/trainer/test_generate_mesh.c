/* generate on meshes, their ranks threads of this process: completions and their log-probabilities have the bits of one
 * rank with the whole model and all prompts, greedy ones and drawn ones, for prompts and completions of many lengths,
 * however few prompts a rank has; beside tensor parallelism those of tensor parallelism alone. (test_generate compares
 * one rank with plain decoding.) */
#include "comm/base/mem.h"
#include "comm/mesh.h"
#include "tests/support/comm_threads.h"
#include "trainer/parallel/tied.h"
#include "trainer/rollout/generate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define EXPECT(condition, ...)                                                                                         \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return ERR(INTERNAL, "(" #condition ") " __VA_ARGS__);                                                     \
    } while (0)

enum { VOCAB = 29, PROMPTS = 16, LONGEST = 9, NEW = 12, EOS = 7, TEMPERATURES = 2 };
static const float temperatures[TEMPERATURES] = { 0, 1.3f };

/* One of the two has a layer without experts. */
#define EXPERTS "experts=4,experts_per_token=2,expert_ffn=12,max_positions=20,init_std=0.4"
static const char dense[] = "layers=4,hidden=24,heads=4,kv_heads=2,ffn=40,tied=true,max_positions=20,init_std=0.4",
                  routed[] = "layers=4,hidden=16,heads=4,kv_heads=2,ffn=24,first_dense=1," EXPERTS,
                  biased[] = "layers=2,hidden=16,heads=4,kv_heads=2,ffn=24,router=sigmoid,router_bias=true,"
                             "shared_experts=1,tied=true," EXPERTS;

struct kept {
    int32_t count, token[NEW];
    float logp[NEW];
    bool ended;
};

struct mesh_case {
    const char *options;
    struct mesh mesh;
    int batch, prompts;
    bool sequence;
    int chunks;
    const char *stages;
};

/* A case, and what is expected of it, or where that goes. */
struct work {
    const struct mesh_case *c;
    struct kept (*want)[PROMPTS], (*out)[PROMPTS]; /* [TEMPERATURES] */
};

static void must(status *st)
{
    if (st)
        fail_msg("%s (rank %d, %s:%d)", status_message(st), status_rank(st), status_file(st), status_line(st));
}

static status *open_model(const char *options, const struct tp_place *at, struct model **out)
{
    const struct model_ops *ops;
    char text[256];
    TRY(model_lookup("llama", &ops));
    void *config = mem_calloc(1, ops->config_bytes);
    TRY(options_defaults(ops->options, config));
    snprintf(text, sizeof text, "%s", options);
    for (char *save = NULL, *pair = strtok_r(text, ",", &save); pair; pair = strtok_r(NULL, ",", &save)) {
        char *equal = strchr(pair, '=');
        *equal = 0;
        TRY(options_set(ops->options, pair, equal + 1, config, "test"));
    }
    TRY(model_open_at(ops, config, VOCAB, at, out));
    options_fini(ops->options, config);
    mem_free(config);
    TRY(model_alloc(*out, false));
    return params_init(&(*out)->params, 5);
}

/* A rank's communicators; NULL: alone there. */
struct axes {
    struct comm *pp, *ep, *tp;
    int part, parts; /* of the prompts */
    bool first;      /* of all ranks */
};

static status *axis(const struct mesh *m, struct comm *world, enum mesh_axis a, struct comm **out)
{
    *out = NULL;
    return m->size[a] > 1 ? mesh_comm(m, world, 1u << a, out) : NULL;
}

static status *open_axes(const struct mesh *m, struct comm *world, struct axes *a)
{
    int at[MESH_AXES];
    mesh_coords(m, world->rank, at);
    TRY(axis(m, world, MESH_PP, &a->pp));
    TRY(axis(m, world, MESH_EP, &a->ep));
    TRY(axis(m, world, MESH_TP, &a->tp));
    a->parts = m->size[MESH_DP] * m->size[MESH_EP];
    a->first = world->rank == 0;
    a->part = at[MESH_DP] * m->size[MESH_EP] + at[MESH_EP];
    return NULL;
}

static struct tp_place place_of(const struct mesh_case *c, const struct axes *a)
{
    return (struct tp_place){ .size = a->tp ? a->tp->size : 1,
                              .rank = a->tp ? a->tp->rank : 0,
                              .sequence = c->sequence,
                              .stages = a->pp ? a->pp->size : 1,
                              .stage = a->pp ? a->pp->rank : 0,
                              .chunks = a->pp ? c->chunks : 1,
                              .list = c->stages,
                              .experts = a->ep ? a->ep->size : 1,
                              .expert = a->ep ? a->ep->rank : 0 };
}

static void make_prompt(uint32_t i, int32_t token[LONGEST], struct prompt *p)
{
    int32_t count = 1 + (int32_t)(i * 5 + 3) % LONGEST;
    for (int32_t k = 0; k < count; k++)
        token[k] = ((int32_t)i * 13 + k * k * 3 + 1) % VOCAB;
    *p = (struct prompt){ token, count, 100 + i };
}

static struct kept keep(const struct completion *c)
{
    struct kept k = { .count = c->count, .ended = c->ended };
    memcpy(k.token, c->token, (size_t)c->count * sizeof *k.token);
    memcpy(k.logp, c->logp, (size_t)c->count * sizeof *k.logp);
    return k;
}

/* This rank's prompts, in batches, of which all have as many. */
static status *complete(struct generator *g, const struct work *w, const struct axes *a, int temperature)
{
    const struct generate_options o = { EOS, temperatures[temperature], 77, 3, true };
    struct completion c[PROMPTS];
    struct prompt p[PROMPTS];
    int32_t token[PROMPTS][LONGEST];
    uint64_t begin, end, batch = (uint64_t)w->c->batch, most = (uint64_t)((w->c->prompts + a->parts - 1) / a->parts);
    layout_cut((uint64_t)w->c->prompts, (uint64_t)a->parts, (uint64_t)a->part, &begin, &end);
    for (uint64_t first = begin; first < begin + most; first += batch) {
        int32_t n = first >= end ? 0 : (int32_t)(end - first < batch ? end - first : batch);
        for (int32_t i = 0; i < n; i++)
            make_prompt((uint32_t)first + (uint32_t)i, token[i], &p[i]);
        TRY(generate(g, &o, p, n, c));
        for (int32_t i = 0; i < n; i++) {
            struct kept got = keep(&c[i]);
            uint64_t at = first + (uint64_t)i;
            if (w->out && a->first)
                w->out[temperature][at] = got;
            EXPECT(w->out || !memcmp(&got, &w->want[temperature][at], sizeof got), "temperature %g, prompt %d",
                   (double)o.temperature, (int)at);
        }
    }
    return NULL;
}

static status *rank_main(struct comm *world, void *arg)
{
    const struct work *w = arg;
    const struct mesh_case *c = w->c;
    struct mesh mesh = c->mesh;
    struct axes a;
    struct model *m;
    struct tape *t;
    struct generator *g;
    TRY(mesh_init(&mesh, world->size));
    TRY(open_axes(&mesh, world, &a));
    const struct tp_place at = place_of(c, &a);
    TRY(open_model(c->options, &at, &m));
    TRY(tied_share(m, NULL, a.pp));
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_spread(t, a.tp, c->sequence);
    tape_experts(t, a.ep);
    TRY(generator_open(m, t, a.pp, c->batch, LONGEST, NEW, &g));
    for (int k = 0; k < TEMPERATURES; k++)
        TRY(complete(g, w, &a, k));
    generator_close(g);
    tape_close(t);
    model_close(m);
    comm_close(a.pp);
    comm_close(a.ep);
    comm_close(a.tp);
    return NULL;
}

/* Against the same without pp, dp and ep. */
static void expect_bits_of_one(const struct mesh_case *c)
{
    static struct kept want[TEMPERATURES][PROMPTS];
    char text[64];
    struct mesh_case one = *c;
    one.batch = PROMPTS;
    one.mesh = (struct mesh){ { 1, 1, 1, 1, c->mesh.size[MESH_TP] } };
    memset(want, 0, sizeof want);
    must(comm_threads_run(mesh_world(&one.mesh), rank_main, &(struct work){ .c = &one, .out = want }));
    int ended = 0, cut = 0;
    for (int k = 0; k < TEMPERATURES; k++)
        for (int i = 0; i < c->prompts; i++) {
            ended += want[k][i].ended && want[k][i].count < NEW;
            cut += !want[k][i].ended;
        }
    if (c->prompts == PROMPTS && !(ended >= 3 && cut >= 3))
        fail_msg("%s: %d ended, %d did not", c->options, ended, cut);
    mesh_text(&c->mesh, text, sizeof text);
    must(status_wrap(comm_threads_run(mesh_world(&c->mesh), rank_main, &(struct work){ .c = c, .want = want }),
                     "%s, batch %d, %d prompts of %s", text, c->batch, c->prompts, c->options));
}

static void experts_on_ranks(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { routed, { { 1, 1, 2, 1, 1 } }, 16, 16, false, 1, NULL },
        { routed, { { 1, 1, 4, 1, 1 } }, 4, 16, false, 1, NULL },
        { routed, { { 1, 2, 2, 1, 1 } }, 3, 16, false, 1, NULL },
        { routed, { { 1, 1, 4, 1, 1 } }, 2, 2, false, 1, NULL },
        { biased, { { 1, 1, 2, 1, 1 } }, 5, 15, false, 1, NULL },
        { biased, { { 1, 2, 4, 1, 1 } }, 1, 3, false, 1, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_bits_of_one(&cases[i]);
}

/* Uneven stages, stages without layers, more of them than prompts, several on a rank. */
static void stages_on_ranks(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { dense, { { 2, 1, 1, 1, 1 } }, 16, 16, false, 1, NULL },
        { dense, { { 3, 1, 1, 1, 1 } }, 5, 16, false, 1, "0,3,1" },
        { dense, { { 4, 2, 1, 1, 1 } }, 8, 16, false, 1, NULL },
        { dense, { { 6, 1, 1, 1, 1 } }, 4, 15, false, 1, NULL },
        { dense, { { 4, 1, 1, 1, 1 } }, 2, 2, false, 1, NULL },
        { dense, { { 2, 4, 1, 1, 1 } }, 1, 3, false, 1, NULL },
        { dense, { { 2, 1, 1, 1, 1 } }, 7, 16, false, 3, NULL },
        { dense, { { 3, 1, 1, 1, 1 } }, 16, 16, false, 2, NULL },
        { dense, { { 2, 1, 1, 1, 2 } }, 16, 16, true, 1, "3,1" },
        { dense, { { 2, 1, 1, 1, 2 } }, 6, 16, false, 2, "0,1,2,1" },
        { routed, { { 2, 1, 1, 1, 1 } }, 16, 16, false, 1, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_bits_of_one(&cases[i]);
}

/* A first stage without experts, chunks with and without. */
static void stages_with_experts_on_ranks(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { routed, { { 2, 1, 2, 1, 1 } }, 16, 16, false, 1, "1,3" },
        { routed, { { 3, 1, 2, 1, 1 } }, 3, 16, false, 1, "1,2,1" },
        { routed, { { 2, 1, 4, 1, 1 } }, 2, 2, false, 1, NULL },
        { routed, { { 2, 1, 2, 1, 1 } }, 8, 15, false, 2, "0,1,2,1" },
        { biased, { { 2, 2, 2, 1, 1 } }, 1, 5, false, 1, NULL },
        { biased, { { 2, 1, 2, 1, 2 } }, 4, 16, true, 2, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_bits_of_one(&cases[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(experts_on_ranks),
        cmocka_unit_test(stages_on_ranks),
        cmocka_unit_test(stages_with_experts_on_ranks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
