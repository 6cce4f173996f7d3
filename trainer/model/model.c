/* model: the registry, and parameter lists: declared first, given memory at once, filled by name and element. */
#include "trainer/model/model.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"

#include <stdio.h>
#include <string.h>

/* ---- parameters ---- */

static uint64_t elems_of(const struct param *p)
{
    bool ok;
    return shape_volume(&p->shape, &ok);
}

static struct param *append(struct params *ps, const char *name)
{
    if (ps->count == ps->cap) {
        int cap = ps->cap ? 2 * ps->cap : 64;
        struct param *p = mem_array(ps->p, (size_t)cap, sizeof *p);
        if (!p)
            return NULL;
        ps->p = p;
        ps->cap = cap;
    }
    struct param *p = &ps->p[ps->count++];
    *p = (struct param){ .alias = -1 };
    snprintf(p->name, sizeof p->name, "%s", name);
    for (int i = 0; i < LAYOUT_DIMS; i++)
        p->cut[i] = -1;
    return p;
}

struct param *params_add(struct params *ps, const char *name, uint64_t rows, uint64_t cols, enum param_init init,
                         float std, bool decay)
{
    struct param *p = append(ps, name);
    if (!p)
        return NULL;
    p->init = init;
    p->init_std = std;
    p->decay = decay;
    p->shape = rows ? (struct shape){ 2, { rows, cols } } : (struct shape){ 1, { cols } };
    p->value = (struct tensor){ .dtype = DTYPE_F32, .ndim = p->shape.ndim };
    for (int i = 0; i < p->shape.ndim; i++)
        p->value.dim[i] = (int64_t)p->shape.dim[i];
    p->offset = ps->total;
    ps->total += (elems_of(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    return p;
}

struct param *params_alias(struct params *ps, const char *name, const struct param *of)
{
    int index = (int)(of - ps->p); /* before the array may move */
    struct param *p = append(ps, name);
    if (!p)
        return NULL;
    char own[PARAM_NAME_BYTES];
    memcpy(own, p->name, sizeof own);
    *p = ps->p[index];
    memcpy(p->name, own, sizeof own);
    p->alias = index;
    return p;
}

status *params_alloc(struct params *ps, bool with_grad)
{
    float *data = mem_block(ps->total * sizeof(float), 4096), *grad = NULL;
    if (with_grad)
        grad = mem_block(ps->total * sizeof(float), 4096);
    if (!data || (with_grad && !grad)) {
        mem_block_free(data, ps->total * sizeof(float));
        return ERR(NO_MEMORY, "%llu bytes of parameters%s", (unsigned long long)(ps->total * sizeof(float)),
                   with_grad ? ", twice" : "");
    }
    ps->data = data;
    ps->grad = grad;
    for (int i = 0; i < ps->count; i++) {
        ps->p[i].value.data = data + ps->p[i].offset;
        ps->p[i].value.grad = grad ? grad + ps->p[i].offset : NULL;
    }
    return NULL;
}

static void init_one(const struct param *p, float *x, uint64_t seed)
{
    uint64_t n = elems_of(p);
    if (p->init == INIT_NORMAL) {
        uint64_t hash = hash64(p->name, strlen(p->name));
        rng_normals((struct rng_at){ .seed = seed, .sample = (uint32_t)hash, .stream = RNG_INIT }, 0, n, x);
    }
    for (uint64_t e = 0; e < n; e++)
        x[e] = p->init == INIT_NORMAL ? x[e] * p->init_std : p->init == INIT_ONE ? 1.0f : 0.0f;
}

void params_init(struct params *ps, uint64_t seed)
{
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].alias < 0)
            init_one(&ps->p[i], ps->data + ps->p[i].offset, seed);
}

void params_free(struct params *ps)
{
    mem_block_free(ps->data, ps->total * sizeof(float));
    mem_block_free(ps->grad, ps->total * sizeof(float));
    mem_free(ps->p);
    *ps = (struct params){ 0 };
}

struct param *params_find(const struct params *ps, const char *name)
{
    for (int i = 0; i < ps->count; i++)
        if (!strcmp(ps->p[i].name, name))
            return &ps->p[i];
    return NULL;
}

uint64_t params_unique_elems(const struct params *ps)
{
    uint64_t n = 0;
    for (int i = 0; i < ps->count; i++)
        n += ps->p[i].alias < 0 ? elems_of(&ps->p[i]) : 0;
    return n;
}

/* ---- registry ---- */

status *model_lookup(const char *name, const struct model_ops **out)
{
    char names[256] = "";
    size_t used = 0;
    for (const struct model_ops *const *m = model_registry; *m; m++) {
        if (!strcmp((*m)->name, name)) {
            *out = *m;
            return NULL;
        }
        if (used < sizeof names)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", (*m)->name);
    }
    return ERR(INVALID, "no model is called \"%s\" (there are: %s)", name, names);
}

status *model_open(const struct model_ops *ops, const void *config, int64_t vocab, struct model **out)
{
    TRY(ops->check(config));
    struct model *m = mem_calloc(1, sizeof *m);
    void *copy = mem_alloc(ops->config_bytes);
    if (!m || !copy) {
        mem_free(m);
        mem_free(copy);
        return ERR(NO_MEMORY, "a model");
    }
    memcpy(copy, config, ops->config_bytes);
    *m = (struct model){ .ops = ops, .config = copy, .vocab = vocab };
    status *st = ops->declare(m);
    if (st) {
        model_close(m);
        return st;
    }
    *out = m;
    return NULL;
}

void model_close(struct model *m)
{
    if (!m)
        return;
    if (m->impl)
        m->ops->close(m);
    params_free(&m->params);
    mem_free(m->config);
    mem_free(m);
}
