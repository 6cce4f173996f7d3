/* model: the registry, and parameter lists: declared first, given memory at once, filled by name and element. */
#include "trainer/model/model.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/model/lora.h"
#include "trainer/model/stages.h"
#include "trainer/ops/compute.h"

#include <stdio.h>
#include <string.h>

/* ---- parameters ---- */

static uint64_t elems_of(const struct param *p)
{
    bool ok;
    return shape_volume(&p->shape, &ok);
}

uint64_t param_elems(const struct param *p)
{
    return (uint64_t)tensor_elems(&p->value);
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
    *p = (struct param){ .alias = -1, .block = -1, .lora_a = -1, .lora_b = -1, .unit = ps->unit };
    snprintf(p->name, sizeof p->name, "%s", name);
    for (int i = 0; i < LAYOUT_DIMS; i++)
        p->cut[i] = -1;
    return p;
}

/* ---- parts ---- */

static const struct tp_place one_rank = { .size = 1 };

static int cut_dim(const struct param *p)
{
    for (int i = 0; i < p->shape.ndim; i++)
        if (p->cut[i] == MESH_TP)
            return i;
    return -1;
}

static uint64_t units_of(const struct param *p)
{
    uint64_t unit = p->rule.unit ? p->rule.unit : 1;
    return p->shape.dim[cut_dim(p)] / unit;
}

static bool fits(const struct param *p, int size)
{
    if (cut_dim(p) < 0)
        return true;
    uint64_t units = units_of(p), n = (uint64_t)size;
    if (p->rule.fit == CUT_UNEVEN)
        return units >= n;
    return units % n == 0 || (p->rule.fit == CUT_SHARED && n % units == 0);
}

/* The part, and the tensor that holds it. */
static void place(struct param *p, const struct tp_place *at)
{
    int dim = cut_dim(p);
    p->box = piece_whole(&p->shape).box;
    p->share = dim < 0 ? at->size : 1;
    p->value = (struct tensor){ .dtype = DTYPE_F32, .ndim = p->shape.ndim };
    for (int i = 0; i < p->shape.ndim; i++)
        p->value.dim[i] = (int64_t)p->shape.dim[i];
    if (dim >= 0 && at->size > 1) {
        uint64_t unit = p->shape.dim[dim] / units_of(p), units = units_of(p), n = (uint64_t)at->size, begin, end;
        p->share = units < n ? (int)(n / units) : 1;
        layout_cut(units, n / (uint64_t)p->share, (uint64_t)(at->rank / p->share), &begin, &end);
        p->box.off[dim] = begin * unit;
        p->box.len[dim] = (end - begin) * unit;
        p->value.dim[dim] = (int64_t)((units + n - 1) / n * unit);
        p->part =
            (struct tensor_cut){ dim, (int64_t)p->box.off[dim], (int64_t)p->box.len[dim], (int64_t)p->shape.dim[dim] };
    }
    if (p->experts && at->experts > 1) {
        layout_cut(p->shape.dim[0], (uint64_t)at->experts, (uint64_t)at->expert, &p->box.off[0], &p->box.len[0]);
        p->box.len[0] -= p->box.off[0];
        p->value.dim[0] = (int64_t)p->box.len[0];
    }
    p->partial = !p->frozen && p->share > 1 && (dim >= 0 || p->on_heads || at->sequence);
}

static uint64_t padded(const struct param *p)
{
    return (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
}

static status *does_not_fit(const struct params *ps, const struct param *p, int size)
{
    char legal[256] = "";
    for (int n = 1; n <= TP_MAX; n++) {
        bool all = true;
        for (int i = 0; all && i < ps->count; i++)
            all = fits(&ps->p[i], n);
        size_t used = strlen(legal);
        if (all && used < sizeof legal)
            snprintf(legal + used, sizeof legal - used, "%s%d", used ? ", " : "", n);
    }
    return ERR(INVALID, "parallel.tp: %d does not fit %s: %llu (this model can be cut over %s ranks)", size,
               p->rule.units ? p->rule.units : p->name, (unsigned long long)units_of(p), legal);
}

int params_chunks(const struct params *ps)
{
    return ps->chunks ? ps->chunks : 1;
}

bool params_hold(const struct params *ps, int chunk, int64_t unit)
{
    return !ps->chunks || (unit >= ps->chunk[chunk].unit_begin && unit < ps->chunk[chunk].unit_end);
}

void params_chunk_elems(const struct params *ps, int chunk, uint64_t *begin, uint64_t *end)
{
    *begin = ps->chunk[chunk].begin;
    *end = chunk + 1 < ps->chunks ? ps->chunk[chunk + 1].begin : ps->total;
}

static bool unit_here(const struct params *ps, int unit)
{
    for (int c = 0; c < params_chunks(ps); c++)
        if (params_hold(ps, c, unit))
            return true;
    return false;
}

/* Experts are dealt evenly. */
static status *check_experts(const struct params *ps, int ranks)
{
    uint64_t experts = 0;
    for (int i = 0; i < ps->count && !experts; i++)
        experts = ps->p[i].experts ? ps->p[i].shape.dim[0] : 0;
    if (!experts)
        return ERR(INVALID, "parallel.ep: %d ranks, but the model has no experts (legal: 1, or model.experts above 0)",
                   ranks);
    char legal[256] = "";
    for (uint64_t n = 1, used = 0; n <= experts && used + 24 < sizeof legal; n++)
        if (experts % n == 0)
            used += (uint64_t)snprintf(legal + used, sizeof legal - used, "%s%llu", used ? ", " : "",
                                       (unsigned long long)n);
    if (experts % (uint64_t)ranks)
        return ERR(INVALID, "parallel.ep: %d does not divide model.experts: %llu (legal: %s)", ranks,
                   (unsigned long long)experts, legal);
    return NULL;
}

static bool is_away(const struct params *ps, const struct param *p)
{
    return !unit_here(ps, p->alias < 0 ? p->unit : ps->p[p->alias].unit);
}

/* What trains goes on in front of the chunks behind it. */
static void count_before(struct params *ps, const struct param *p)
{
    for (int c = 0; c < ps->chunks; c++)
        if (p->unit < ps->chunk[c].unit_begin) {
            ps->chunk[c].before += padded(p);
            ps->chunk[c].begin += p->away ? 0 : padded(p);
        }
}

/* Nothing of p is here. */
static void leave_out(struct param *p)
{
    memset(&p->box, 0, sizeof p->box);
    memset(p->value.dim, 0, sizeof p->value.dim);
    p->part = (struct tensor_cut){ 0 };
    p->share = 1;
    p->partial = false;
}

status *params_spread(struct params *ps, const struct tp_place *at)
{
    for (int i = 0; i < ps->count; i++)
        if (!fits(&ps->p[i], at->size))
            return does_not_fit(ps, &ps->p[i], at->size);
    enum { DENSE, EXPERTS, FROZEN, KINDS };
    bool apart = at->experts > 1;
    uint64_t end = 0, begin[KINDS];
    if (apart)
        TRY(check_experts(ps, at->experts));
    for (int c = 0; c < ps->chunks; c++)
        ps->chunk[c].before = ps->chunk[c].begin = 0;
    for (int kind = 0; kind < KINDS; kind++) {
        begin[kind] = end;
        for (int i = 0; i < ps->count; i++) {
            struct param *p = &ps->p[i];
            if (kind != (p->frozen ? FROZEN : apart && p->experts ? EXPERTS : DENSE))
                continue;
            place(p, at);
            p->away = is_away(ps, p);
            if (p->alias < 0 && kind == DENSE)
                count_before(ps, p);
            if (p->away)
                leave_out(p);
            p->offset = p->alias < 0 ? end : ps->p[p->alias].offset;
            end += p->alias < 0 ? padded(p) : 0;
        }
    }
    ps->total = begin[FROZEN];
    ps->experts = begin[FROZEN] - begin[EXPERTS];
    ps->frozen = end - begin[FROZEN];
    return NULL;
}

/* ---- the list ---- */

struct param *params_add(struct params *ps, const char *name, uint64_t rows, uint64_t cols, enum param_init init,
                         float std, bool decay)
{
    struct shape shape = rows ? (struct shape){ 2, { rows, cols } } : (struct shape){ 1, { cols } };
    return params_add_shape(ps, name, &shape, init, std, decay);
}

struct param *params_add_shape(struct params *ps, const char *name, const struct shape *shape, enum param_init init,
                               float std, bool decay)
{
    struct param *p = append(ps, name);
    if (!p)
        return NULL;
    p->init = init;
    p->init_std = std;
    p->decay = decay;
    p->shape = *shape;
    place(p, &one_rank);
    p->offset = ps->total;
    ps->total += padded(p);
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
    p->unit = ps->unit;
    return p;
}

status *params_alloc(struct params *ps, bool with_grad)
{
    void *data;
    TRY(status_wrap(compute_alloc(ps->compute, params_bytes(ps), &data), "parameters"));
    ps->data = data;
    for (int i = 0; i < ps->count; i++) {
        ps->p[i].value.data = ps->data + ps->p[i].offset;
        ps->p[i].value.cut = ps->p[i].part.total ? &ps->p[i].part : NULL;
    }
    return with_grad ? params_alloc_grads(ps) : NULL;
}

status *params_alloc_grads(struct params *ps)
{
    void *grad;
    TRY(status_wrap(compute_alloc(ps->compute, ps->total * sizeof(float), &grad), "gradients"));
    ps->grad = grad;
    for (int i = 0; i < ps->count; i++)
        ps->p[i].value.grad = ps->p[i].frozen ? NULL : ps->grad + ps->p[i].offset;
    return NULL;
}

/* Elements [first, first + n) of the whole tensor. */
static void draw(const struct param *p, uint64_t seed, uint64_t first, uint64_t n, float *x)
{
    uint64_t hash = hash64(p->name, strlen(p->name));
    struct rng_at at = { .seed = seed, .sample = (uint32_t)hash, .stream = RNG_INIT };
    if (p->init == INIT_NORMAL)
        rng_normals(at, first, n, x);
    for (uint64_t e = 0; e < n; e++)
        x[e] = p->init == INIT_NORMAL ? x[e] * p->init_std : p->init == INIT_ONE ? 1.0f : 0.0f;
    for (uint64_t e = 0; p->init == INIT_UNIFORM && e < n; e++)
        x[e] = (float)((2 * rng_uniform(at, first + e) - 1) * (double)p->init_std);
}

void param_init(const struct param *p, uint64_t seed, float *x)
{
    int last = p->shape.ndim - 1;
    uint64_t cols = p->box.len[last], rows = cols ? box_volume(p->shape.ndim, &p->box) / cols : 0;
    for (uint64_t r = 0; r < rows; r++, x += cols)
        draw(p, seed, box_element(&p->shape, &p->box, r * cols), cols, x);
}

enum { DRAWN = 1 << 16 }; /* elements at a time, for another memory than the host's */

static status *init_there(const struct params *ps, const struct param *p, uint64_t seed, float *room)
{
    uint64_t cols = p->box.len[p->shape.ndim - 1], elems = box_volume(p->shape.ndim, &p->box);
    float *to = p->value.data;
    for (uint64_t e = 0, drawn; e < elems; to += drawn) {
        drawn = 0;
        for (uint64_t n; e < elems && drawn < DRAWN; e += n, drawn += n) { /* what of a row there is room for */
            n = cols - e % cols < DRAWN - drawn ? cols - e % cols : DRAWN - drawn;
            draw(p, seed, box_element(&p->shape, &p->box, e), n, room + drawn);
        }
        TRY(compute_put(ps->compute, to, room, drawn * sizeof *room));
    }
    return NULL;
}

status *params_init(struct params *ps, uint64_t seed)
{
    status *st = NULL;
    bool host = compute_host(ps->compute);
    float *room = host ? NULL : mem_array(NULL, DRAWN, sizeof *room);
    if (!host && !room)
        return ERR(NO_MEMORY, "initial values");
    for (int i = 0; i < ps->count && !st; i++) {
        const struct param *p = &ps->p[i];
        if (p->alias >= 0 || p->away)
            continue;
        if (host)
            param_init(p, seed, p->value.data);
        else
            st = init_there(ps, p, seed, room);
    }
    mem_free(room);
    return st;
}

void params_free(struct params *ps)
{
    compute_free(ps->compute, ps->data, params_bytes(ps));
    compute_free(ps->compute, ps->grad, ps->total * sizeof(float));
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

uint64_t params_trained_elems(const struct params *ps)
{
    uint64_t n = 0;
    for (int i = 0; i < ps->count; i++)
        n += ps->p[i].alias < 0 && !ps->p[i].frozen ? elems_of(&ps->p[i]) : 0;
    return n;
}

size_t params_bytes(const struct params *ps)
{
    return (ps->total + ps->frozen) * sizeof(float);
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
    return model_open_at(ops, config, vocab, &one_rank, out);
}

/* The first name that shares another's memory and is used by this stage. */
static struct param *find_tied(const struct model *m)
{
    const struct params *ps = &m->params;
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].alias >= 0 && unit_here(ps, ps->p[i].unit))
            return &ps->p[i];
    return NULL;
}

static status *keep_apart(struct model *m, const struct tp_place *at)
{
    const struct param *use = find_tied(m);
    if (!use || !((at->apart && !use->frozen) || use->away))
        return NULL;
    struct param *own = append(&m->tied, use->name);
    if (!own)
        return ERR(NO_MEMORY, "a tied weight");
    *own = *use;
    own->alias = -1;
    own->away = false;
    own->offset = 0;
    place(own, at);
    m->tied.total = padded(own);
    return NULL;
}

status *model_alloc(struct model *m, bool with_grad)
{
    TRY(params_alloc(&m->params, with_grad));
    return model_alloc_tied(m, DTYPE_F32, with_grad);
}

status *model_alloc_tied(struct model *m, enum dtype dtype, bool with_grad)
{
    struct params *own = &m->tied;
    void *data = NULL, *grad = NULL;
    if (!own->count)
        return NULL;
    struct param *use = find_tied(m), *p = own->p;
    bool values = use->away;
    if (values)
        TRY(status_wrap(compute_alloc(own->compute, own->total * dtype_bytes(dtype), &data), "a tied weight"));
    own->data = data;
    if (with_grad && !use->frozen)
        TRY(status_wrap(compute_alloc(own->compute, own->total * sizeof(float), &grad), "a tied weight's gradient"));
    own->grad = grad;
    p->value.dtype = dtype;
    p->value.data = values ? own->data : use->value.data;
    p->value.grad = own->grad;
    p->value.cut = p->part.total ? &p->part : NULL;
    use->value = p->value;
    return NULL;
}

status *model_open_at(const struct model_ops *ops, const void *config, int64_t vocab, const struct tp_place *at,
                      struct model **out)
{
    return model_open_tuned(ops, config, vocab, at, NULL, out);
}

/* The runs of units of a pipeline rank. */
static status *take_chunks(struct params *ps, int layers, const struct tp_place *at)
{
    int chunks = at->chunks ? at->chunks : 1;
    CHECK(chunks <= CHUNKS_MAX, "%d chunks of a model", chunks);
    for (ps->chunks = 0; ps->chunks < chunks; ps->chunks++) {
        struct param_chunk *c = &ps->chunk[ps->chunks];
        TRY(stages_cut(at->list, layers, at->stages * chunks, chunks, ps->chunks * at->stages + at->stage,
                       &c->unit_begin, &c->unit_end));
    }
    return NULL;
}

status *model_open_tuned(const struct model_ops *ops, const void *config, int64_t vocab, const struct tp_place *at,
                         const struct tuning *tuning, struct model **out)
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
    if (!st && tuning)
        st = model_tune(m, tuning);
    if (!st && at->stages > 1)
        st = take_chunks(&m->params, ops->layers(m), at);
    if (!st)
        st = params_spread(&m->params, at);
    if (!st)
        st = keep_apart(m, at);
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
    params_free(&m->tied);
    params_free(&m->params);
    mem_free(m->config);
    mem_free(m);
}
