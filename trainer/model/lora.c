/* lora: see lora.h. */
#include "trainer/model/lora.h"

#include "comm/base/mem.h"

#include <fnmatch.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define ROW(type_, field_, def_, min_, max_, unit_, help_)                                                             \
    {                                                                                                                  \
#field_, type_, def_, min_, max_, NULL, unit_, help_, offsetof(struct lora_config, field_)                     \
    }
static const struct option rows[] = {
    ROW(OPT_LIST, targets, "", 0, 0, "",
        "patterns of the linear layers that get adapters, [\"*.q_proj\", \"*.v_proj\"]; all else is frozen; empty: no "
        "adapters"),
    ROW(OPT_INT, rank, "8", 1, 4096, "", "rank of an adapter: rows of A, columns of B"),
    ROW(OPT_FLOAT, alpha, "16", 1e-6, 1e6, "", "B A is multiplied by alpha / rank"),
    ROW(OPT_BOOL, rank_stabilised, "false", 0, 0, "", "by alpha / sqrt(rank) instead"),
};
const struct option_table lora_options = { "lora", rows, sizeof rows / sizeof *rows };

enum { NAMES_BYTES = 512 };

float lora_scale(const struct lora_config *c)
{
    double rank = (double)c->rank;
    return (float)(c->alpha / (c->rank_stabilised ? sqrt(rank) : rank));
}

/* ---- patterns ---- */

/* The next of "a,b,c" as text; false after the last. */
static bool next_pattern(const char **list, char pattern[PARAM_NAME_BYTES])
{
    *list += strspn(*list, ",");
    size_t n = strcspn(*list, ",");
    snprintf(pattern, PARAM_NAME_BYTES, "%.*s", (int)n, *list);
    *list += n;
    return n > 0;
}

/* What patterns of `targets` (a layer) or of `freeze` (a parameter) are held against. */
static void name_of(const struct param *p, bool layer, char name[PARAM_NAME_BYTES])
{
    static const char weight[] = ".weight";
    snprintf(name, PARAM_NAME_BYTES, "%s", p->name);
    size_t n = strlen(name), w = sizeof weight - 1;
    if (layer && n > w && !strcmp(name + n - w, weight))
        name[n - w] = 0;
}

/* Names that a pattern could have been, each last word of a kind once. */
static void list_names(const struct params *ps, bool layers, char text[NAMES_BYTES])
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < ps->count; i++) {
        char name[PARAM_NAME_BYTES], kind[PARAM_NAME_BYTES + 4];
        if (layers && !ps->p[i].linear)
            continue;
        name_of(&ps->p[i], layers, name);
        const char *digits = strpbrk(name, "0123456789"), *rest = digits ? strchr(digits, '.') : NULL;
        snprintf(kind, sizeof kind, "%s%s", rest ? "*" : "", rest ? rest : name);
        const char *seen = strstr(text, kind);
        size_t n = strlen(kind);
        if ((seen && (!seen[n] || seen[n] == ',')) || used + n + 3 > NAMES_BYTES)
            continue;
        used += (size_t)snprintf(text + used, NAMES_BYTES - used, "%s%s", used ? ", " : "", kind);
    }
}

/* mark[i] for every parameter that a pattern fits. */
static status *match(const struct params *ps, const char *key, const char *patterns, bool layers, bool *mark)
{
    char pattern[PARAM_NAME_BYTES];
    while (next_pattern(&patterns, pattern)) {
        bool any = false;
        for (int i = 0; i < ps->count; i++) {
            char name[PARAM_NAME_BYTES];
            name_of(&ps->p[i], layers, name);
            bool fits = (!layers || ps->p[i].linear) && !fnmatch(pattern, name, 0);
            mark[i] = mark[i] || fits;
            any = any || fits;
        }
        if (!any) {
            char names[NAMES_BYTES];
            list_names(ps, layers, names);
            return ERR(INVALID, "%s: \"%s\" fits no %s of this model (there are: %s)", key, pattern,
                       layers ? "linear layer" : "parameter", names);
        }
    }
    return NULL;
}

/* ---- adapters ---- */

/* One of the two matrices of parameter w's adapter, or of each expert's; its rows (side 0) or columns (1) are cut where
 * w's are. Returns its index, or -1. */
static int add_matrix(struct params *ps, int w, const char *which, uint64_t rows_, uint64_t cols, int side)
{
    char layer[PARAM_NAME_BYTES], name[PARAM_NAME_BYTES];
    name_of(&ps->p[w], true, layer);
    if (snprintf(name, sizeof name, "%s.%s.weight", layer, which) >= (int)sizeof name)
        return -1;
    bool zero = side == 0;
    int first = ps->p[w].shape.ndim - 2; /* of the two dimensions */
    struct shape shape = { 2, { rows_, cols } };
    if (first)
        shape = (struct shape){ 3, { ps->p[w].shape.dim[0], rows_, cols } };
    struct param *p =
        params_add_shape(ps, name, &shape, zero ? INIT_ZERO : INIT_UNIFORM, zero ? 0 : 1 / sqrtf((float)cols), true);
    if (!p)
        return -1;
    const struct param *of = &ps->p[w];
    p->experts = of->experts;
    p->adapter = true;
    p->unit = of->unit;
    p->block = of->block;
    p->cut[first + side] = of->cut[first + side];
    p->rule = of->rule;
    p->on_heads = of->cut[first + 1 - side] >= 0; /* whole, and seen by a part of the layer */
    return ps->count - 1;
}

static status *adapt(struct params *ps, int w, uint64_t rank)
{
    const struct shape *s = &ps->p[w].shape;
    uint64_t m = s->dim[s->ndim - 2], k = s->dim[s->ndim - 1];
    int a = add_matrix(ps, w, "lora_A", rank, k, 1), b = a < 0 ? -1 : add_matrix(ps, w, "lora_B", m, rank, 0);
    if (b < 0)
        return ERR(NO_MEMORY, "the adapter of %s", ps->p[w].name);
    ps->p[w].lora_a = a;
    ps->p[w].lora_b = b;
    return NULL;
}

static status *tune(struct model *m, const struct tuning *how, bool *mark)
{
    struct params *ps = &m->params;
    int base = ps->count;
    bool lora = *how->lora->targets;
    TRY(match(ps, lora ? "lora.targets" : "train.freeze", lora ? how->lora->targets : how->freeze, lora, mark));
    for (int i = 0; i < base; i++) {
        struct param *p = &ps->p[i];
        p->frozen = p->frozen || lora || mark[i];
        if (p->alias >= 0)
            ps->p[p->alias].frozen = p->frozen = p->frozen || ps->p[p->alias].frozen;
        if (lora && mark[i])
            TRY(adapt(ps, i, (uint64_t)how->lora->rank));
    }
    for (int i = 0; i < base; i++) /* other names of what the last of them froze */
        if (ps->p[i].alias >= 0)
            ps->p[i].frozen = ps->p[ps->p[i].alias].frozen;
    if (!params_trained_elems(ps))
        return ERR(INVALID, "train.freeze: \"%.200s\" leaves nothing to train", how->freeze);
    m->lora_scale = lora_scale(how->lora);
    return NULL;
}

static status *give_to_muon(struct params *ps, const char *patterns, bool *mark)
{
    int n = 0;
    TRY(match(ps, "optim.muon", patterns, true, mark));
    for (int i = 0; i < ps->count; i++)
        n += ps->p[i].muon = mark[i] && !ps->p[i].frozen;
    return n ? NULL : ERR(INVALID, "optim.muon: \"%.200s\" fits no linear layer that trains", patterns);
}

status *model_tune(struct model *m, const struct tuning *how)
{
    bool some = *how->lora->targets || *how->freeze, muon = how->muon && *how->muon;
    if (*how->lora->targets && *how->freeze)
        return ERR(INVALID, "train.freeze: with lora.targets all parameters but the adapters are frozen");
    if (*how->lora->targets && m->moe.rate > 0)
        return ERR(INVALID,
                   "model.balance_rate: %g would change the biases of a base that lora.targets leaves as it is "
                   "(legal: 0)",
                   m->moe.rate);
    bool *mark = mem_calloc((size_t)m->params.count + 1, sizeof *mark);
    status *st = mark ? NULL : ERR(NO_MEMORY, "a list of %d parameters", m->params.count);
    if (!st && some)
        st = tune(m, how, mark);
    mem_free(mark);
    mark = !st && muon ? mem_calloc((size_t)m->params.count + 1, sizeof *mark) : NULL;
    if (!st && muon)
        st = mark ? give_to_muon(&m->params, how->muon, mark) : ERR(NO_MEMORY, "Muon's parameters");
    mem_free(mark);
    return st;
}

struct low_rank model_adapter(struct model *m, int w)
{
    struct param *p = m->params.p;
    if (p[w].lora_a < 0 || m->adapters_off)
        return (struct low_rank){ 0 };
    return (struct low_rank){ &p[p[w].lora_a].value, &p[p[w].lora_b].value, m->lora_scale };
}

struct tensor *model_linear(struct model *m, struct tape *t, struct tensor *x, int w, int bias)
{
    struct tensor *b = bias < 0 ? NULL : &m->params.p[bias].value;
    struct low_rank low = model_adapter(m, w);
    return op_linear_low_rank(t, x, &m->params.p[w].value, b, low.a ? &low : NULL);
}

struct tensor *model_linear_add(struct model *m, struct tape *t, struct tensor *onto, struct tensor *x, int w, int bias)
{
    struct tensor *b = bias < 0 ? NULL : &m->params.p[bias].value;
    struct low_rank low = model_adapter(m, w);
    return op_linear_add(t, onto, x, &m->params.p[w].value, b, low.a ? &low : NULL);
}

/* ---- from a checkpoint ---- */

status *lora_stored(const char *text, struct lora_config *out)
{
    *out = (struct lora_config){ .targets = NULL };
    TRY(options_defaults(&lora_options, out));
    options_fini(&lora_options, out);
    out->targets = NULL;
    for (const char *at = text; at; at = strchr(at, '\n')) {
        char key[32], value[64];
        at += *at == '\n';
        if (sscanf(at, "lora.%31[^=\n]=%63[^\n]", key, value) == 2 && strcmp(key, "targets") != 0)
            TRY(status_wrap(options_set(&lora_options, key, value, out, NULL), "the stored configuration"));
    }
    return NULL;
}

void lora_merge(float *w, uint64_t first, uint64_t n, uint64_t k, const float *a, const float *b, uint64_t rank,
                float scale)
{
    for (uint64_t e = 0; e < n; e++) {
        uint64_t row = (first + e) / k, col = (first + e) % k;
        double sum = 0;
        for (uint64_t r = 0; r < rank; r++)
            sum += (double)b[row * rank + r] * (double)a[r * k + col];
        w[e] = (float)((double)w[e] + (double)scale * sum);
    }
}
