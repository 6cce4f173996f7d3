/* cuda_experts: cases of routing and mixing of experts; see test_cuda_kernels.c. */
#include "tests/trainer/cuda_cases.h"

/* ---- experts ---- */

struct choices {
    int64_t n;
    struct router how;
    bool bias, given, share, none;
};

static void call_route(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct choices *c = arg;
    struct route r = { .n = c->n,
                       .how = &c->how,
                       .z = p[0],
                       .bias = c->bias ? p[1] : NULL,
                       .given = c->given,
                       .score = p[2],
                       .expert = p[3],
                       .weight = p[4],
                       .dweight = p[5],
                       .dshare = c->share ? p[6] : NULL,
                       .dz = p[7] };
    k->route(w, &r);
    k->route_bwd(w, &r);
}

static void check_route(struct choices c)
{
    struct run r = { .what = "route", .call = call_route, .arg = &c, .tolerance = 2e-6 };
    int64_t e = c.how.experts, top = c.how.top;
    float *z = floats(&r, READ, c.n * e), *bias = floats(&r, READ, e);
    for (int64_t i = 0; i < c.n * e; i++)
        z[i] = i % 3 == 0 ? roundf(z[i]) : z[i]; /* ties */
    for (int64_t i = 0; c.none && i < e; i++)
        z[e + i] = -200; /* all scores are 0 */
    for (int64_t i = 0; i < e; i++)
        bias[i] = roundf(bias[i]) * 0.125f;
    floats(&r, CLOSE, c.n * e);
    int32_t *expert = add_buffer(&r, EXACT, (size_t)(c.n * top) * sizeof *expert);
    for (int64_t i = 0; c.given && i < c.n * top; i++)
        expert[i] = (int32_t)((i / top * 3 + i % top) % e);
    floats(&r, CLOSE, c.n * top);
    floats(&r, READ, c.n * top);
    floats(&r, READ, e);
    floats(&r, CLOSE, c.n * e);
    check_one(&r, false);
}

void test_routes(void **state)
{
    (void)state;
    check_route((struct choices){ 1, { .experts = 1, .top = 1, .scale = 1 }, false, false, false, false });
    check_route(
        (struct choices){ 9, { .experts = 8, .top = 2, .normalise = true, .scale = 1 }, false, false, true, false });
    check_route((struct choices){ 6, { .experts = 100, .top = 40, .scale = 2.5f }, true, false, true, false });
    check_route((struct choices){
        7,
        { .experts = 64, .top = 6, .groups = 8, .top_groups = 3, .sigmoid = true, .normalise = true, .scale = 2.5f },
        true,
        false,
        true,
        false });
    check_route((struct choices){
        5, { .experts = 160, .top = 3, .groups = 40, .top_groups = 2, .scale = 1 }, false, false, false, false });
    check_route((struct choices){
        3, { .experts = 1024, .top = 64, .normalise = true, .scale = 1 }, false, false, true, false });
    check_route(
        (struct choices){ 5, { .experts = 33, .top = 4, .sigmoid = true, .scale = 1 }, true, true, true, false });
    check_route((struct choices){
        .n = 5, .how = { .experts = 40, .top = 38, .sigmoid = true, .normalise = true, .scale = 1 }, .none = true });
}

/* Choices that leave some experts out and give one many. */
static int32_t chosen(int64_t i, int64_t experts)
{
    return (int32_t)(i % 5 == 0 ? experts / 2 : (i * i + i / 7) % (experts > 2 ? experts - 1 : experts));
}

static void call_sort(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    struct expert_sort s = *(const struct expert_sort *)arg;
    s.expert = p[0];
    s.place = p[1];
    s.token = p[2];
    s.offset = p[3];
    k->sort_experts(w, &s);
}

void test_sorts(void **state)
{
    (void)state;
    static const struct expert_sort shapes[] = {
        { .n = 1, .top = 1, .experts = 1 },    { .n = 0, .top = 2, .experts = 4 },
        { .n = 300, .top = 1, .experts = 1 },  { .n = 77, .top = 3, .experts = 9 },
        { .n = 129, .top = 2, .experts = 40 }, { .n = 700, .top = 8, .experts = 64 },
        { .n = 5, .top = 2, .experts = 1024 }
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct expert_sort *s = &shapes[i];
        int64_t choices = s->n * s->top;
        struct run r = { .what = "sort_experts", .call = call_sort, .arg = s };
        int32_t *expert = ints(&r, choices);
        for (int64_t c = 0; c < choices; c++)
            expert[c] = chosen(c, s->experts);
        (void)add_buffer(&r, EXACT, (size_t)choices * sizeof *expert);
        (void)add_buffer(&r, EXACT, (size_t)choices * sizeof *expert);
        (void)add_buffer(&r, EXACT, (size_t)(s->experts + 1) * sizeof *expert);
        check_one(&r, false);
    }
}

struct loads {
    int64_t n, padding;
    struct router how;
    bool quiet; /* nobody wants counts and loss */
};

static void call_loads(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct loads *c = arg;
    struct route_load l = { .n = c->n,
                            .padding = c->padding,
                            .how = &c->how,
                            .score = p[0],
                            .expert = p[1],
                            .offset = p[2],
                            .sums = p[3],
                            .weight = 0.5f,
                            .dshare = p[4],
                            .count = c->quiet ? NULL : p[5],
                            .balance = c->quiet ? NULL : p[6] };
    k->load_sums(w, &l);
    k->load_shares(w, &l);
}

/* Scores of few bits, whose sum over experts is 4, for a number of tokens that is a power of two: all sums are exact,
 * in whatever order. */
static void check_loads(struct loads c)
{
    struct run r = { .what = "loads", .call = call_loads, .arg = &c };
    int64_t e = c.how.experts, choices = c.n * c.how.top;
    float *score = floats(&r, READ, c.n * e);
    for (int64_t i = 0; i < c.n * e; i++)
        score[i] = (float)draw_below(256) / 256 * 0.0625f;
    for (int64_t i = 0; i < c.n; i++) {
        float rest = 4;
        for (int64_t j = 0; j + 1 < e; j++)
            rest -= score[i * e + j];
        score[i * e + e - 1] = rest;
    }
    int32_t *expert = ints(&r, choices), *offset = ints(&r, e + 1);
    for (int64_t i = 0; i < choices; i++) {
        expert[i] = chosen(i, e);
        offset[expert[i] + 1]++;
    }
    for (int64_t i = 0; i < e; i++)
        offset[i + 1] += offset[i];
    (void)add_buffer(&r, EXACT, (size_t)(1 + 2 * e) * sizeof(double));
    (void)add_buffer(&r, EXACT, (size_t)e * sizeof(float));
    (void)add_buffer(&r, EXACT, (size_t)e * sizeof(int32_t));
    (void)add_buffer(&r, EXACT, sizeof(double));
    check_one(&r, false);
}

void test_loads(void **state)
{
    (void)state;
    for (int sigmoid = 0; sigmoid < 2; sigmoid++) {
        check_loads((struct loads){ 1, 0, { .experts = 1, .top = 1, .sigmoid = sigmoid }, false });
        check_loads((struct loads){ 256, 0, { .experts = 40, .top = 3, .sigmoid = sigmoid }, false });
        check_loads((struct loads){ 133, 5, { .experts = 7, .top = 2, .sigmoid = sigmoid }, false });
        check_loads((struct loads){ 3, 3, { .experts = 300, .top = 2, .sigmoid = sigmoid }, false });
        check_loads((struct loads){ 64, 0, { .experts = 64, .top = 1, .sigmoid = sigmoid }, true });
    }
    check_loads((struct loads){ 0, 0, { .experts = 4, .top = 1 }, false });
}

struct mixing {
    int64_t n, k, c;
    bool in_place;
};

static void call_mix(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct mixing *t = arg;
    struct mix m = {
        .n = t->n, .k = t->k, .c = t->c, .row = p[0], .weight = p[1], .place = p[2], .y = p[3], .dy = p[4]
    };
    k->mix(w, &m);
    m.dweight = p[6];
    k->mix_bwd(w, &m);
    m.drow = t->in_place ? p[0] : p[5];
    k->mix_bwd(w, &m);
}

void test_mixes(void **state)
{
    (void)state;
    static const struct mixing shapes[] = { { 1, 1, 1, false }, { 5, 3, 70, false }, { 13, 2, 33, true } };
    for (size_t i = 0; i < 3; i++) {
        const struct mixing *t = &shapes[i];
        struct run r = { .what = "mix", .call = call_mix, .arg = t, .tolerance = 3e-6 };
        floats(&r, t->in_place ? CLOSE : READ, t->n * t->k * t->c);
        floats(&r, READ, t->n * t->k);
        int32_t *place = ints(&r, t->n * t->k);
        for (int64_t j = 0; j < t->n * t->k; j++)
            place[j] = (int32_t)(t->n * t->k - 1 - j);
        floats(&r, CLOSE, t->n * t->c);
        floats(&r, READ, t->n * t->c);
        floats(&r, CLOSE, t->n * t->k * t->c);
        floats(&r, CLOSE, t->n * t->k);
        check_one(&r, false);
    }
}
