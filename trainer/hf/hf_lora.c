/* hf_lora: see hf_lora.h. */
#include "trainer/hf/hf_lora.h"

#include "ckpt/ckpt.h"
#include "comm/base/mem.h"
#include "trainer/hf/hf_load.h"
#include "trainer/model/lora.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

static const char weight[] = ".weight", a_ends[] = ".lora_A.weight";

static bool matrix_name(const char *name, const char *which, char out[PARAM_NAME_BYTES])
{
    size_t n = strlen(name), w = sizeof weight - 1;
    if (n <= w || strcmp(name + n - w, weight) != 0)
        return false;
    return snprintf(out, PARAM_NAME_BYTES, "%.*s.%s.weight", (int)(n - w), name, which) < PARAM_NAME_BYTES;
}

bool hf_adapter_exists(tessera *t, const char *name)
{
    struct tessera_tensor d = TESSERA_TENSOR;
    char a[PARAM_NAME_BYTES], ours[PARAM_NAME_BYTES];
    (void)hf_expert(name, ours);
    status *st = matrix_name(ours, "lora_A", a) ? tessera_stored(t, "adapter", a, &d) : ERR(NOT_FOUND, "%s", name);
    bool found = !st;
    status_free(st);
    return found;
}

/* A matrix of the adapter, or of one expert's, whole, added to s. */
static status *add_matrix(tessera *t, tessera_state *s, const char *name, const char *which, float **to,
                          uint64_t dim[2])
{
    struct tessera_tensor stored = TESSERA_TENSOR;
    char full[PARAM_NAME_BYTES], ours[PARAM_NAME_BYTES];
    int64_t expert = hf_expert(name, ours);
    int first = expert < 0 ? 0 : 1; /* of the matrix's dimensions */
    if (!matrix_name(ours, which, full))
        return ERR(NOT_FOUND, "%s has no adapter", name);
    TRY(tessera_stored(t, "adapter", full, &stored));
    if (stored.ndim != first + 2 || (first && (uint64_t)expert >= stored.shape[0]))
        return ERR(CORRUPT, "adapter/%s has no matrix for %s", full, name);
    struct shape shape = { .ndim = 2, .dim = { stored.shape[first], stored.shape[first + 1] } };
    bool ok;
    uint64_t n = shape_volume(&shape, &ok);
    *to = ok ? mem_array(NULL, n + 1, sizeof **to) : NULL;
    if (!*to)
        return ERR(NO_MEMORY, "adapter/%s", full);
    memcpy(dim, shape.dim, 2 * sizeof *dim);
    struct tessera_tensor d = hf_part(full, DTYPE_F32, &shape, expert, stored.shape[0]);
    d.part = "adapter";
    d.data = *to;
    return tessera_state_add_tensor(s, &d);
}

status *hf_adapter_load(tessera *t, uint64_t step, const char *name, const char *config, struct hf_adapter *out)
{
    struct lora_config c;
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    tessera_state *s = NULL;
    uint64_t a[2] = { 0 }, b[2] = { 0 };
    *out = (struct hf_adapter){ .a = NULL };
    TRY(lora_stored(config, &c));
    TRY(tessera_state_new(t, &s));
    o.allow = TESSERA_ALLOW_UNEXPECTED | TESSERA_ALLOW_CAST;
    status *st = add_matrix(t, s, name, "lora_A", &out->a, a);
    if (!st)
        st = add_matrix(t, s, name, "lora_B", &out->b, b);
    if (!st && (a[0] != b[1] || a[0] != (uint64_t)c.rank))
        st = ERR(CORRUPT, "the adapter of %s has ranks %llu and %llu, the stored configuration says %lld", name,
                 (unsigned long long)a[0], (unsigned long long)b[1], (long long)c.rank);
    if (!st)
        st = tessera_load_parts(t, s, step, &o);
    tessera_state_free(s);
    out->rank = a[0];
    out->k = a[1];
    out->scale = lora_scale(&c);
    if (st)
        hf_adapter_free(out);
    return st;
}

void hf_adapter_free(struct hf_adapter *a)
{
    mem_free(a->a);
    mem_free(a->b);
    *a = (struct hf_adapter){ .a = NULL };
}

/* ---- peft ---- */

/* Of the matrix a, each expert's layer by the name that peft has for it, or the only one. */
static status *add_targets(const struct tessera_tensor *a, json_t *targets)
{
    char one[PARAM_NAME_BYTES];
    for (uint64_t e = 0; e < (a->ndim == 3 ? a->shape[0] : 1); e++) {
        if (a->ndim == 3)
            hf_name(a->name, e, one);
        else
            snprintf(one, sizeof one, "%s", a->name);
        if (json_array_append_new(targets, json_stringn(one, strlen(one) - (sizeof a_ends - 1))))
            return ERR(INVALID, "the name of adapter/%s is not UTF-8", a->name);
    }
    return NULL;
}

/* Names of the adapted layers. */
static status *list_targets(tessera *t, json_t *targets)
{
    struct tessera_step s = { .size = sizeof s };
    TRY(tessera_get_step(t, &s));
    for (uint64_t i = 0; i < s.tensors; i++) {
        struct tessera_tensor d = TESSERA_TENSOR;
        TRY(tessera_stored_at(t, i, &d));
        size_t n = strlen(d.name), end = sizeof a_ends - 1;
        if (!strcmp(d.part, "adapter") && n > end && !strcmp(d.name + n - end, a_ends))
            TRY(add_targets(&d, targets));
    }
    return NULL;
}

/* model.init_from of a stored configuration: what the adapters belong to; null if the base is this step's own. */
static json_t *base_of(const char *config)
{
    static const char key[] = "model.init_from=";
    for (const char *at = config; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        size_t n = strcspn(at, "\n"), k = sizeof key - 1;
        if (!strncmp(at, key, k) && n > k)
            return json_stringn(at + k, n - k);
    }
    return json_null();
}

status *hf_adapter_json(tessera *t, const char *config, char **text)
{
    const size_t how = JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(9);
    struct lora_config c;
    TRY(lora_stored(config, &c));
    json_t *targets = json_array(), *base = base_of(config);
    status *st = targets && base ? list_targets(t, targets) : ERR(NO_MEMORY, "adapter_config.json");
    json_t *root = json_pack("{s:s, s:s, s:O, s:I, s:f, s:O, s:b, s:s, s:f, s:b, s:b}", "peft_type", "LORA",
                             "task_type", "CAUSAL_LM", "base_model_name_or_path", base, "r", (json_int_t)c.rank,
                             "lora_alpha", c.alpha, "target_modules", targets, "use_rslora", (int)c.rank_stabilised,
                             "bias", "none", "lora_dropout", 0.0, "fan_in_fan_out", 0, "inference_mode", 1);
    size_t n = root && !st ? json_dumpb(root, NULL, 0, how) : 0;
    char *out = n ? mem_alloc(n + 2) : NULL;
    if (out) {
        (void)json_dumpb(root, out, n, how);
        memcpy(out + n, "\n", 2);
        *text = out;
    } else if (!st) {
        st = ERR(NO_MEMORY, "adapter_config.json");
    }
    json_decref(root);
    json_decref(base);
    json_decref(targets);
    return st;
}
