/* models: see models.h. A model is three lists of rows: before the layers, one layer, after them. A row is a tensor's
 * shape and how Megatron cuts it. `expand` makes the list of tensors, `cut_stages` says which stage has which, then
 * each rank's descriptors follow from layout_piece. */
#include "ckpt/models.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdio.h>
#include <string.h>

enum { ROWS = 16, DIMS = 4, RUN_ALIGN = 1024, MAX_RANKS = 1 << 20 };

/* Which dimensions tp and ep cut. */
enum cut {
    REPLICATED,
    COLUMN,        /* tp: dimension 0 */
    ROW,           /* tp: dimension 1 */
    EXPERT_COLUMN, /* ep: dimension 0, tp: 1 */
    EXPERT_ROW     /* ep: dimension 0, tp: 2 */
};

struct row {
    const char *name;
    uint64_t dim[DIMS]; /* ends with 0 */
    enum cut cut;
    bool frozen;
};

struct model_table {
    const char *name;
    uint64_t layers;
    struct row before[ROWS], layer[ROWS], after[ROWS]; /* end with a row without a name; %llu: the layer */
};

#define LLAMA3(NAME, LAYERS, D, FFN)                                                                                   \
    {                                                                                                                  \
        .name = NAME, .layers = LAYERS, .before = { { "model.embed_tokens.weight", { 128256, D }, COLUMN, false } },   \
        .layer = { { "model.layers.%llu.input_layernorm.weight", { D }, REPLICATED, false },                           \
                   { "model.layers.%llu.self_attn.q_proj.weight", { D, D }, COLUMN, false },                           \
                   { "model.layers.%llu.self_attn.k_proj.weight", { 1024, D }, COLUMN, false },                        \
                   { "model.layers.%llu.self_attn.v_proj.weight", { 1024, D }, COLUMN, false },                        \
                   { "model.layers.%llu.self_attn.o_proj.weight", { D, D }, ROW, false },                              \
                   { "model.layers.%llu.post_attention_layernorm.weight", { D }, REPLICATED, false },                  \
                   { "model.layers.%llu.mlp.gate_proj.weight", { FFN, D }, COLUMN, false },                            \
                   { "model.layers.%llu.mlp.up_proj.weight", { FFN, D }, COLUMN, false },                              \
                   { "model.layers.%llu.mlp.down_proj.weight", { D, FFN }, ROW, false } },                             \
        .after = {                                                                                                     \
            { "model.norm.weight", { D }, REPLICATED, false },                                                         \
            { "lm_head.weight", { 128256, D }, COLUMN, false }                                                         \
        }                                                                                                              \
    }

static const struct model_table models[] = {
    /* Llama 3 (arXiv 2407.21783), table 3; 8 key-value heads of 128 */
    LLAMA3("llama3-8b", 32, 4096, 14336),
    LLAMA3("llama3-70b", 80, 8192, 28672),
    LLAMA3("llama3-405b", 126, 16384, 53248),
    /* Qwen3 (arXiv 2505.09388): 32 query and 4 key-value heads of 128, 128 experts of 768 */
    { .name = "qwen3-30b-a3b",
      .layers = 48,
      .before = { { "model.embed_tokens.weight", { 151936, 2048 }, COLUMN, false } },
      .layer = { { "model.layers.%llu.input_layernorm.weight", { 2048 }, REPLICATED, false },
                 { "model.layers.%llu.self_attn.q_proj.weight", { 4096, 2048 }, COLUMN, false },
                 { "model.layers.%llu.self_attn.k_proj.weight", { 512, 2048 }, COLUMN, false },
                 { "model.layers.%llu.self_attn.v_proj.weight", { 512, 2048 }, COLUMN, false },
                 { "model.layers.%llu.self_attn.o_proj.weight", { 2048, 4096 }, ROW, false },
                 { "model.layers.%llu.self_attn.q_norm.weight", { 128 }, REPLICATED, false },
                 { "model.layers.%llu.self_attn.k_norm.weight", { 128 }, REPLICATED, false },
                 { "model.layers.%llu.post_attention_layernorm.weight", { 2048 }, REPLICATED, false },
                 { "model.layers.%llu.mlp.gate.weight", { 128, 2048 }, REPLICATED, false },
                 { "model.layers.%llu.mlp.experts.gate_proj.weight", { 128, 768, 2048 }, EXPERT_COLUMN, false },
                 { "model.layers.%llu.mlp.experts.up_proj.weight", { 128, 768, 2048 }, EXPERT_COLUMN, false },
                 { "model.layers.%llu.mlp.experts.down_proj.weight", { 128, 2048, 768 }, EXPERT_ROW, false } },
      .after = { { "model.norm.weight", { 2048 }, REPLICATED, false },
                 { "lm_head.weight", { 151936, 2048 }, COLUMN, false } } },
    /* DiT-XL/2 at 256 x 256 (arXiv 2212.09748); positions are fixed, variances are learned: 8 channels out */
    { .name = "dit-xl2",
      .layers = 28,
      .before = { { "x_embedder.proj.weight", { 1152, 4, 2, 2 }, REPLICATED, false },
                  { "x_embedder.proj.bias", { 1152 }, REPLICATED, false },
                  { "pos_embed", { 1, 256, 1152 }, REPLICATED, true },
                  { "t_embedder.mlp.0.weight", { 1152, 256 }, REPLICATED, false },
                  { "t_embedder.mlp.0.bias", { 1152 }, REPLICATED, false },
                  { "t_embedder.mlp.2.weight", { 1152, 1152 }, REPLICATED, false },
                  { "t_embedder.mlp.2.bias", { 1152 }, REPLICATED, false },
                  { "y_embedder.embedding_table.weight", { 1001, 1152 }, REPLICATED, false } },
      .layer = { { "blocks.%llu.attn.qkv.weight", { 3456, 1152 }, COLUMN, false },
                 { "blocks.%llu.attn.qkv.bias", { 3456 }, COLUMN, false },
                 { "blocks.%llu.attn.proj.weight", { 1152, 1152 }, ROW, false },
                 { "blocks.%llu.attn.proj.bias", { 1152 }, REPLICATED, false },
                 { "blocks.%llu.mlp.fc1.weight", { 4608, 1152 }, COLUMN, false },
                 { "blocks.%llu.mlp.fc1.bias", { 4608 }, COLUMN, false },
                 { "blocks.%llu.mlp.fc2.weight", { 1152, 4608 }, ROW, false },
                 { "blocks.%llu.mlp.fc2.bias", { 1152 }, REPLICATED, false },
                 { "blocks.%llu.adaLN_modulation.1.weight", { 6912, 1152 }, COLUMN, false },
                 { "blocks.%llu.adaLN_modulation.1.bias", { 6912 }, COLUMN, false } },
      .after = { { "final_layer.linear.weight", { 32, 1152 }, REPLICATED, false },
                 { "final_layer.linear.bias", { 32 }, REPLICATED, false },
                 { "final_layer.adaLN_modulation.1.weight", { 2304, 1152 }, COLUMN, false },
                 { "final_layer.adaLN_modulation.1.bias", { 2304 }, COLUMN, false } } },
};
enum { MODELS = sizeof models / sizeof *models };

const struct model_table *model_find(const char *name)
{
    for (size_t i = 0; i < MODELS; i++)
        if (!strcmp(models[i].name, name))
            return &models[i];
    return NULL;
}

void model_names(char *text, size_t bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < MODELS && n < bytes; i++)
        n += (size_t)snprintf(text + n, bytes - n, "%s%s", i ? ", " : "", models[i].name);
}

static uint64_t row_params(const struct row *r)
{
    uint64_t n = 1;
    for (int d = 0; d < DIMS && r->dim[d]; d++)
        n *= r->dim[d];
    return n;
}

static uint64_t list_params(const struct row *r)
{
    uint64_t n = 0;
    for (; r->name; r++)
        n += row_params(r);
    return n;
}

uint64_t model_params(const struct model_table *t)
{
    return list_params(t->before) + t->layers * list_params(t->layer) + list_params(t->after);
}

/* ---- stages. Units are the embedding (0), the layers, and what follows them. */

static uint64_t unit_params(const struct model_table *t, uint64_t unit)
{
    return list_params(unit == 0 ? t->before : unit <= t->layers ? t->layer : t->after);
}

/* How many stages of at most `most` parameters the units need, with at least one unit left for each later stage. */
static uint64_t fill_stages(const struct model_table *t, uint64_t most, uint64_t stages, uint32_t *stage_of)
{
    uint64_t units = t->layers + 2, stage = 0, have = 0;
    for (uint64_t u = 0; u < units; u++) {
        uint64_t n = unit_params(t, u);
        bool must = stage + 1 < stages && units - u <= stages - 1 - stage;
        if (u && (have + n > most || (must && have))) {
            stage++;
            have = 0;
        }
        have += n;
        if (stage_of)
            stage_of[u] = (uint32_t)stage;
    }
    return stage + 1;
}

/* The stage of each unit: as small a largest stage as consecutive units allow. */
static void cut_stages(const struct model_table *t, uint64_t stages, uint32_t *stage_of)
{
    uint64_t lo = 0, hi = model_params(t);
    for (uint64_t u = 0; u < t->layers + 2; u++)
        lo = unit_params(t, u) > lo ? unit_params(t, u) : lo;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (fill_stages(t, mid, stages, NULL) <= stages)
            hi = mid;
        else
            lo = mid + 1;
    }
    fill_stages(t, lo, stages, stage_of);
}

/* ---- does it fit */

static int tp_dim(enum cut c)
{
    return c == COLUMN ? 0 : c == ROW || c == EXPERT_COLUMN ? 1 : c == EXPERT_ROW ? 2 : -1;
}

static bool is_expert(enum cut c)
{
    return c == EXPERT_COLUMN || c == EXPERT_ROW;
}

static status *rows_fit(const struct model_table *t, const struct row *r, const struct mesh *m, bool *experts)
{
    uint64_t tp = (uint64_t)m->size[MESH_TP], ep = (uint64_t)m->size[MESH_EP];
    for (; r->name; r++) {
        int d = tp_dim(r->cut);
        if (d >= 0 && r->dim[d] % tp)
            return ERR(INVALID, "%s: tp=%d does not divide the %llu of dimension %d of %s", t->name, m->size[MESH_TP],
                       (unsigned long long)r->dim[d], d, r->name);
        if (is_expert(r->cut) && r->dim[0] % ep)
            return ERR(INVALID, "%s: ep=%d does not divide its %llu experts", t->name, m->size[MESH_EP],
                       (unsigned long long)r->dim[0]);
        *experts = *experts || is_expert(r->cut);
    }
    return NULL;
}

status *model_fits(const struct model_table *t, const struct mesh *m, int zero)
{
    int64_t ranks = 1;
    bool experts = false;
    for (int a = 0; a < MESH_AXES; a++) {
        ranks *= m->size[a];
        if (m->size[a] < 1 || ranks > MAX_RANKS)
            return ERR(INVALID, "a mesh of pp=%d,dp=%d,ep=%d,cp=%d,tp=%d: axes of at least 1, at most %d ranks",
                       m->size[MESH_PP], m->size[MESH_DP], m->size[MESH_EP], m->size[MESH_CP], m->size[MESH_TP],
                       MAX_RANKS);
    }
    if (zero < 0 || zero > 1)
        return ERR(INVALID, "zero is 0 or 1, not %d", zero);
    if ((uint64_t)m->size[MESH_PP] > t->layers)
        return ERR(INVALID, "%s: pp=%d stages for %llu layers", t->name, m->size[MESH_PP],
                   (unsigned long long)t->layers);
    TRY(rows_fit(t, t->before, m, &experts));
    TRY(rows_fit(t, t->layer, m, &experts));
    TRY(rows_fit(t, t->after, m, &experts));
    if (m->size[MESH_EP] > 1 && !experts)
        return ERR(INVALID, "%s: ep=%d, but it has no experts", t->name, m->size[MESH_EP]);
    return NULL;
}

/* ---- tensors */

enum { NAME = 96 };

struct tensor {
    char name[NAME];
    struct layout weight, optim; /* optim: of each of the three */
    bool frozen;
};

struct tensors {
    struct tensor *t;
    uint64_t count;
    uint64_t *stage; /* [stages + 1] first tensor of a stage: units, so tensors too, follow the stages */
};

static void free_tensors(struct tensors *l)
{
    mem_free(l->t);
    mem_free(l->stage);
}

static struct layout lay_out(const struct row *r, uint32_t stage)
{
    struct layout l = { .stage = (int)stage, .cut = { -1, -1, -1, -1, -1, -1, -1, -1 } };
    for (; l.shape.ndim < DIMS && r->dim[l.shape.ndim]; l.shape.ndim++)
        l.shape.dim[l.shape.ndim] = r->dim[l.shape.ndim];
    if (tp_dim(r->cut) >= 0)
        l.cut[tp_dim(r->cut)] = MESH_TP;
    if (is_expert(r->cut))
        l.cut[0] = MESH_EP;
    return l;
}

static uint64_t local_volume(const struct layout *l, const struct mesh *m)
{
    uint64_t n = 1;
    for (int d = 0; d < l->shape.ndim; d++)
        n *= l->shape.dim[d] / (l->cut[d] >= 0 ? (uint64_t)m->size[l->cut[d]] : 1);
    return n;
}

static void add_rows(const struct row *r, uint64_t layer, uint32_t stage, int zero, struct tensors *l)
{
    for (; r->name; r++) {
        struct tensor *t = &l->t[l->count++];
        const char *hole = strstr(r->name, "%llu");
        if (hole)
            snprintf(t->name, sizeof t->name, "%.*s%llu%s", (int)(hole - r->name), r->name, (unsigned long long)layer,
                     hole + 4);
        else
            snprintf(t->name, sizeof t->name, "%s", r->name);
        t->weight = t->optim = lay_out(r, stage);
        t->frozen = r->frozen;
        if (zero)
            t->optim.run_axes = 1u << MESH_DP | 1u << MESH_CP | (is_expert(r->cut) ? 0 : 1u << MESH_EP);
        t->optim.run_align = RUN_ALIGN;
    }
}

/* A stage's trainable tensors lie one behind the other in a bucket; experts, which fewer ranks share, in another. */
static void fill_buckets(const struct mesh *m, struct tensor *t, uint64_t n)
{
    uint64_t total[2] = { 0, 0 };
    for (int pass = 0; pass < 2; pass++)
        for (uint64_t i = 0; i < n; i++) {
            int kind = t[i].weight.cut[0] == MESH_EP;
            if (t[i].frozen)
                continue;
            if (pass) {
                t[i].optim.bucket_total = total[kind];
                continue;
            }
            t[i].optim.bucket_begin = total[kind];
            total[kind] += local_volume(&t[i].weight, m);
        }
}

static status *expand(const struct model_table *t, const struct mesh *m, int zero, struct tensors *out)
{
    uint64_t stages = (uint64_t)m->size[MESH_PP], units = t->layers + 2;
    struct tensors l = { .t = mem_calloc(units * ROWS, sizeof *l.t), .stage = mem_calloc(stages + 1, sizeof *l.stage) };
    uint32_t *stage_of = mem_calloc(units, sizeof *stage_of);
    if (!l.t || !l.stage || !stage_of) {
        free_tensors(&l);
        mem_free(stage_of);
        return ERR(NO_MEMORY, "the tensors of %s", t->name);
    }
    cut_stages(t, stages, stage_of);
    for (uint64_t u = 0; u < units; u++) {
        add_rows(u == 0 ? t->before : u <= t->layers ? t->layer : t->after, u - 1, stage_of[u], zero, &l);
        l.stage[stage_of[u] + 1] = l.count;
    }
    for (uint64_t s = 0; s < stages; s++)
        fill_buckets(m, l.t + l.stage[s], l.stage[s + 1] - l.stage[s]);
    mem_free(stage_of);
    *out = l;
    return NULL;
}

/* ---- descriptors */

void descs_free(struct descs *d)
{
    mem_free(d->desc);
    mem_free(d->first);
    mem_free(d->text);
    *d = (struct descs){ 0 };
}

static status *start(int ranks, struct descs *d)
{
    *d = (struct descs){ .ranks = ranks, .first = mem_calloc((size_t)ranks + 1, sizeof *d->first) };
    return d->first ? NULL : ERR(NO_MEMORY, "%d ranks", ranks);
}

/* Part or name "prefix" + "name", behind what this rank has already. */
static status *put_text(struct descs *d, const char *prefix, const char *name, uint64_t *at)
{
    size_t a = strlen(prefix), b = strlen(name) + 1;
    if (d->text_cap - d->text_bytes < a + b) {
        size_t cap = d->text_cap * 2 + a + b + 4096;
        char *more = mem_realloc(d->text, cap);
        if (!more)
            return ERR(NO_MEMORY, "names of %zu bytes", cap);
        d->text = more;
        d->text_cap = cap;
    }
    *at = d->text_bytes;
    memcpy(d->text + d->text_bytes, prefix, a);
    memcpy(d->text + d->text_bytes + a, name, b);
    d->text_bytes += a + b;
    return NULL;
}

static status *put_desc(struct descs *d, const struct plan_desc *from)
{
    if (d->count == d->cap) {
        uint64_t cap = d->cap ? d->cap * 2 : 1024;
        struct plan_desc *more = mem_array(d->desc, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "%llu descriptors", (unsigned long long)cap);
        d->desc = more;
        d->cap = cap;
    }
    d->desc[d->count++] = *from;
    return NULL;
}

static status *add_rank(const struct tensors *l, const struct mesh *m, int rank, struct descs *d)
{
    static const char *const kinds[] = { "master.", "exp_avg.", "exp_avg_sq." };
    int coord[MESH_AXES];
    uint64_t model, optim;
    mesh_coords(m, rank, coord);
    TRY(put_text(d, "", "model", &model));
    TRY(put_text(d, "", "optim", &optim));
    for (uint64_t i = l->stage[coord[MESH_PP]]; i < l->stage[coord[MESH_PP] + 1]; i++) {
        const struct tensor *t = &l->t[i];
        struct plan_desc desc = { .part = model,
                                  .alias = UINT64_MAX,
                                  .dtype = DTYPE_BF16,
                                  .trainable = !t->frozen,
                                  .shape = t->weight.shape,
                                  .piece = layout_piece(&t->weight, m, rank),
                                  .rank = rank,
                                  .local = (uint32_t)(d->count - d->first[rank]) };
        TRY(put_text(d, "", t->name, &desc.name));
        TRY(put_desc(d, &desc));
        desc.piece = layout_piece(&t->optim, m, rank);
        desc.part = optim;
        desc.dtype = DTYPE_F32;
        for (size_t k = 0; k < 3 && !t->frozen && piece_elems(&desc.piece); k++) {
            desc.local++;
            TRY(put_text(d, kinds[k], t->name, &desc.name));
            TRY(put_desc(d, &desc));
        }
    }
    return NULL;
}

status *model_descs(const struct model_table *t, const struct mesh *m, int zero, struct descs *out)
{
    struct tensors l;
    struct descs d;
    TRY(model_fits(t, m, zero));
    TRY(expand(t, m, zero, &l));
    status *st = start(mesh_world(m), &d);
    for (int r = 0; r < d.ranks && !st; r++) {
        st = add_rank(&l, m, r, &d);
        d.first[r + 1] = d.count;
    }
    free_tensors(&l);
    if (st)
        descs_free(&d);
    else
        *out = d;
    return st;
}

status *model_synthetic(uint64_t tensors, uint64_t pieces, int ranks, struct descs *out)
{
    struct descs d;
    uint64_t rows = pieces <= 4096 ? 4096 : pieces;
    struct mesh m = { .size = { 1, ranks, 1, 1, 1 } };
    TRY(start(ranks, &d));
    status *st = NULL;
    for (int r = 0; r < ranks && !st; r++) {
        uint64_t part = 0;
        st = put_text(&d, "", "model", &part);
        for (uint64_t i = 0; i < tensors && !st; i++) {
            char name[48];
            struct layout l = { .shape = { .ndim = 2, .dim = { rows, 4096 + i % 3 } },
                                .cut = { MESH_DP, -1 },
                                .stage = -1 };
            struct plan_desc desc = { .part = part,
                                      .alias = UINT64_MAX,
                                      .dtype = DTYPE_F32,
                                      .trainable = 1,
                                      .shape = l.shape,
                                      .piece = layout_piece(&l, &m, r),
                                      .rank = r,
                                      .local = (uint32_t)i };
            snprintf(name, sizeof name, "tensor.%llu.weight", (unsigned long long)i);
            st = put_text(&d, "", name, &desc.name);
            if (!st)
                st = put_desc(&d, &desc);
        }
        d.first[r + 1] = d.count;
    }
    if (st)
        descs_free(&d);
    else
        *out = d;
    return st;
}
