#include "trainer/hf/hf_config.h"

#include "comm/base/mem.h"
#include "storage/store.h"
#include "trainer/hf/safetensors.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Keys that are the same thing under two names. A default of NULL: the key must be there. */
static const struct same {
    const char *theirs, *ours, *def;
    char type; /* i, f, b */
} same[] = {
    { "num_hidden_layers", "layers", NULL, 'i' },
    { "hidden_size", "hidden", NULL, 'i' },
    { "num_attention_heads", "heads", NULL, 'i' },
    { "num_key_value_heads", "kv_heads", "0", 'i' },
    { "intermediate_size", "ffn", NULL, 'i' },
    { "vocab_size", "vocab", NULL, 'i' },
    { "max_position_embeddings", "max_positions", NULL, 'i' },
    { "rms_norm_eps", "norm_eps", "1e-6", 'f' },
    { "tie_word_embeddings", "tied", "false", 'b' },
    { "initializer_range", "init_std", "0.02", 'f' },
};
enum { SAME = sizeof same / sizeof *same };

/* The same of families with experts; those of qwen3_moe have a name of their own for the number of experts. */
static const struct same of_experts[] = {
    { "num_experts_per_tok", "experts_per_token", NULL, 'i' },
    { "moe_intermediate_size", "expert_ffn", NULL, 'i' },
    { "norm_topk_prob", "router_norm", "false", 'b' },
}, of_deepseek[] = {
    { "n_routed_experts", "experts", NULL, 'i' },
    { "first_k_dense_replace", "first_dense", "0", 'i' },
    { "routed_scaling_factor", "router_scale", "1", 'f' },
    { "n_shared_experts", "shared_experts", "0", 'i' },
}, of_groups[] = {
    { "n_group", "router_groups", "1", 'i' },
    { "topk_group", "router_top_groups", "1", 'i' },
}, of_latent[] = {
    { "kv_lora_rank", "kv_lora_rank", NULL, 'i' },
    { "qk_nope_head_dim", "qk_nope_head_dim", NULL, 'i' },
    { "qk_rope_head_dim", "qk_rope_head_dim", NULL, 'i' },
    { "v_head_dim", "v_head_dim", NULL, 'i' },
    { "q_lora_rank", "q_lora_rank", "0", 'i' }, /* null: none */
}, of_qwen[] = {
    { "num_experts", "experts", NULL, 'i' }, /* or num_local_experts (transformers 5) */
    { "decoder_sparse_step", "sparse_step", "1", 'i' },
};
#define COUNT(a) (sizeof(a) / sizeof *(a))

/* What is being read, for messages. */
struct reading {
    const char *name;
    const json_t *root;
    struct hf_config *out;
    bool latent; /* deepseek_v2, deepseek_v3 */
};

#define NOT_BUILT(r, fmt, ...) ERR(UNSUPPORTED, "%s: " fmt, (r)->name, __VA_ARGS__)

void hf_config_vocab(struct hf_config *c, uint64_t rows)
{
    for (int i = 0; i < c->count; i++)
        if (strcmp(c->set[i].key, "vocab") == 0)
            snprintf(c->set[i].value, sizeof c->set[i].value, "%" PRIu64, rows);
}

const char *hf_config_get(const struct hf_config *c, const char *key)
{
    for (int i = 0; i < c->count; i++)
        if (!strcmp(c->set[i].key, key))
            return c->set[i].value;
    return NULL;
}

static status *put(struct hf_config *c, const char *key, const char *value)
{
    struct hf_setting *s = &c->set[c->count];
    if (c->count == HF_SETTINGS || strlen(key) >= sizeof s->key || strlen(value) >= sizeof s->value)
        return ERR(INVALID, "model.%.60s=%.60s: too many settings, or too long", key, value);
    snprintf(s->key, sizeof s->key, "%s", key);
    snprintf(s->value, sizeof s->value, "%s", value);
    c->count++;
    return NULL;
}

/* null counts as not there. */
static const json_t *value_of(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return json_is_null(v) ? NULL : v;
}

static status *put_number(const struct reading *r, const char *theirs, const char *ours, const json_t *v, char type)
{
    char text[HF_VALUE_BYTES];
    if (type == 'b' ? !json_is_boolean(v) : type == 'i' ? !json_is_integer(v) : !json_is_number(v))
        return ERR(INVALID, "%s: key %s is not %s", r->name, theirs,
                   type == 'b'   ? "true or false"
                   : type == 'i' ? "a whole number"
                                 : "a number");
    if (type == 'b')
        snprintf(text, sizeof text, "%s", json_is_true(v) ? "true" : "false");
    else if (json_is_integer(v))
        snprintf(text, sizeof text, "%lld", (long long)json_integer_value(v));
    else
        snprintf(text, sizeof text, "%.17g", json_real_value(v));
    return put(r->out, ours, text);
}

/* ---- the angles ---- */

static status *take_yarn_amplitude(const struct reading *r, const json_t *s)
{
    const json_t *given = value_of(s, "attention_factor"), *m = value_of(s, "mscale"),
                 *all = value_of(s, "mscale_all_dim"), *truncate = value_of(s, "truncate");
    if (json_is_false(truncate))
        return NOT_BUILT(r, "%s", "rope scaling yarn with truncate: false is not built");
    if (given)
        return put_number(r, "attention_factor", "rope_amplitude", given, 'f');
    double factor = json_number_value(value_of(s, "factor")), a = json_number_value(m), b = json_number_value(all);
    if (!(a > 0 && b > 0 && factor > 1))
        return NULL;
    /* DeepSeek's form of the same factor (transformers, _compute_yarn_parameters) */
    json_t *ratio = json_real((0.1 * a * log(factor) + 1) / (0.1 * b * log(factor) + 1));
    status *st = put_number(r, "mscale", "rope_amplitude", ratio, 'f');
    json_decref(ratio);
    return st;
}

static status *take_one(const struct reading *r, const json_t *s, const char *theirs, const char *ours, bool needed)
{
    const json_t *v = value_of(s, theirs);
    if (!v)
        return needed ? ERR(INVALID, "%s: rope scaling without %s", r->name, theirs) : NULL;
    return put_number(r, theirs, ours, v, 'f');
}

static status *take_scaling(const struct reading *r, const json_t *s, const char *type)
{
    TRY(put(r->out, "rope_scaling", type));
    TRY(take_one(r, s, "factor", "rope_factor", true));
    if (r->latent)
        TRY(take_one(r, s, "mscale_all_dim", "rope_mscale_all_dim", false));
    bool yarn = !strcmp(type, "yarn");
    if (!strcmp(type, "linear"))
        return NULL;
    if (yarn && !value_of(s, "original_max_position_embeddings"))
        TRY(put_number(r, "max_position_embeddings", "rope_original", value_of(r->root, "max_position_embeddings"),
                       'i'));
    else
        TRY(take_one(r, s, "original_max_position_embeddings", "rope_original", true));
    if (!yarn) {
        TRY(take_one(r, s, "low_freq_factor", "rope_low", true));
        return take_one(r, s, "high_freq_factor", "rope_high", true);
    }
    TRY(take_one(r, s, "beta_fast", "rope_beta_fast", false));
    TRY(take_one(r, s, "beta_slow", "rope_beta_slow", false));
    return take_yarn_amplitude(r, s);
}

/* rope_theta and rope_scaling, or both in rope_parameters (transformers 5). */
static status *take_rope(const struct reading *r)
{
    const json_t *s = value_of(r->root, "rope_parameters"), *theta = value_of(s, "rope_theta"), *type;
    if (!s)
        s = value_of(r->root, "rope_scaling");
    if (!theta)
        theta = value_of(r->root, "rope_theta");
    if (theta)
        TRY(put_number(r, "rope_theta", "rope_theta", theta, 'f'));
    if (s && !json_is_object(s))
        return ERR(INVALID, "%s: key rope_scaling is not an object", r->name);
    const json_t *partial = value_of(s, "partial_rotary_factor");
    if (!partial)
        partial = value_of(r->root, "partial_rotary_factor");
    if (partial && json_number_value(partial) < 1)
        return NOT_BUILT(r, "%s", "partial_rotary_factor below 1 is not built");
    type = value_of(s, "rope_type");
    if (!type)
        type = value_of(s, "type");
    const char *name = json_string_value(type);
    if (!s || !json_object_size(s) || (name && !strcmp(name, "default")))
        return NULL;
    char text[32];
    safetensors_text(name ? name : "", text, sizeof text);
    if (!name && theta && json_object_size(s) == 1)
        return NULL; /* rope_theta alone */
    if (!name || (strcmp(name, "linear") && strcmp(name, "llama3") && strcmp(name, "yarn")))
        return NOT_BUILT(r, "rope scaling \"%s\" is not built (legal: default, linear, llama3, yarn)", text);
    return take_scaling(r, s, name);
}

/* ---- windows ---- */

/* Qwen's layers: full ones first, then those with a window. */
static status *take_layer_types(const struct reading *r, const json_t *types)
{
    size_t full = 0, n = json_array_size(types);
    while (full < n && !strcmp(json_string_value(json_array_get(types, full)) ?: "", "full_attention"))
        full++;
    for (size_t i = full; i < n; i++)
        if (strcmp(json_string_value(json_array_get(types, i)) ?: "", "sliding_attention"))
            return NOT_BUILT(r, "%s", "layer_types other than full_attention, then sliding_attention, is not built");
    char text[24];
    snprintf(text, sizeof text, "%zu", full);
    return put(r->out, "window_from", text);
}

/* dots1: layers from max_window_layers on have a window, if there are any. */
static status *refuse_window(const struct reading *r)
{
    const json_t *from = value_of(r->root, "max_window_layers"), *types = value_of(r->root, "layer_types");
    double layers = json_number_value(value_of(r->root, "num_hidden_layers"));
    bool some = value_of(r->root, "sliding_window") && layers > (from ? json_number_value(from) : 62);
    for (size_t i = 0; i < json_array_size(types); i++)
        some = some || !strcmp(json_string_value(json_array_get(types, i)) ?: "", "sliding_attention");
    return some ? NOT_BUILT(r, "%s", "dots1 with sliding_attention is not built") : NULL;
}

static status *take_window(const struct reading *r, const char *family)
{
    if (!strcmp(family, "dots1"))
        return refuse_window(r);
    const json_t *window = value_of(r->root, "sliding_window"), *types = value_of(r->root, "layer_types"),
                 *from = value_of(r->root, "max_window_layers");
    bool qwen = !strncmp(family, "qwen", 4);
    if (!window || !strcmp(family, "llama") || (qwen && !json_is_true(value_of(r->root, "use_sliding_window"))))
        return NULL;
    TRY(put_number(r, "sliding_window", "sliding_window", window, 'i'));
    if (!qwen)
        return NULL;
    if (json_is_array(types))
        return take_layer_types(r, types);
    return from ? put_number(r, "max_window_layers", "window_from", from, 'i') : put(r->out, "window_from", "28");
}

/* ---- the whole ---- */

static status *refuse_rest(const struct reading *r)
{
    static const char *const biases[] = { "attention_bias", "mlp_bias" };
    for (size_t i = 0; i < 2; i++)
        if (json_is_true(value_of(r->root, biases[i])))
            return NOT_BUILT(r, "%s: true is not built", biases[i]);
    if (value_of(r->root, "quantization_config"))
        return NOT_BUILT(r, "%s", "quantized weights (quantization_config) are not built");
    const char *act = json_string_value(value_of(r->root, "hidden_act"));
    char text[32];
    safetensors_text(act ? act : "", text, sizeof text);
    return act && strcmp(act, "silu") ? NOT_BUILT(r, "hidden_act \"%s\" is not built (legal: silu)", text) : NULL;
}

/* ---- experts ---- */

static status *take_same(const struct reading *r, const struct same *keys, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const json_t *v = value_of(r->root, keys[i].theirs);
        if (!v && !strcmp(keys[i].theirs, "num_experts"))
            v = value_of(r->root, "num_local_experts");
        if (!v && !keys[i].def)
            return ERR(INVALID, "%s: key %s is missing", r->name, keys[i].theirs);
        TRY(v ? put_number(r, keys[i].theirs, keys[i].ours, v, keys[i].type) : put(r->out, keys[i].ours, keys[i].def));
    }
    return NULL;
}

static status *take_dense_layers(const struct reading *r, const json_t *layers)
{
    char text[HF_VALUE_BYTES] = "";
    size_t used = 0;
    for (size_t i = 0; i < json_array_size(layers); i++) {
        const json_t *n = json_array_get(layers, i);
        if (!json_is_integer(n))
            return ERR(INVALID, "%s: key mlp_only_layers is no list of whole numbers", r->name);
        int more = snprintf(text + used, sizeof text - used, "%s%lld", i ? "," : "", (long long)json_integer_value(n));
        if (more < 0 || (size_t)more >= sizeof text - used)
            return NOT_BUILT(r, "more than %zu mlp_only_layers are not built", i);
        used += (size_t)more;
    }
    return *text ? put(r->out, "dense_layers", text) : NULL;
}

/* Where their classes' defaults are other numbers than ours. */
static status *need_defaults(const struct reading *r, bool v3)
{
    static const char *const keys[] = { "n_shared_experts",      "norm_topk_prob", "first_k_dense_replace",
                                        "routed_scaling_factor", "n_group",        "topk_group" };
    for (size_t i = 0; i < (v3 ? COUNT(keys) : 1); i++)
        if (!value_of(r->root, keys[i]))
            return ERR(INVALID, "%s: key %s is missing", r->name, keys[i]);
    return NULL;
}

/* What DeepSeek-V2 and V3 have besides, and how each chooses experts. */
static status *take_latent(const struct reading *r, const char *family)
{
    bool v3 = !strcmp(family, "deepseek_v3");
    const char *method = json_string_value(value_of(r->root, "topk_method")),
               *scores = json_string_value(value_of(r->root, "scoring_func"));
    bool greedy = !v3 && (!method || !strcmp(method, "greedy"));
    TRY(take_same(r, of_latent, COUNT(of_latent)));
    if (json_is_false(value_of(r->root, "rope_interleave")))
        return NOT_BUILT(r, "%s", "rope_interleave: false is not built");
    if (method && !greedy && strcmp(method, v3 ? "noaux_tc" : "group_limited_greedy"))
        return NOT_BUILT(r, "%s with another topk_method than %s is not built", family,
                         v3 ? "noaux_tc" : "greedy and group_limited_greedy");
    if (scores && strcmp(scores, v3 ? "sigmoid" : "softmax"))
        return NOT_BUILT(r, "%s with another scoring_func than %s is not built", family, v3 ? "sigmoid" : "softmax");
    if (!v3 && json_is_true(value_of(r->root, "norm_topk_prob")))
        return NOT_BUILT(r, "%s", "deepseek_v2 with norm_topk_prob: true is not built");
    TRY(need_defaults(r, v3));
    TRY(put(r->out, "router", v3 ? "sigmoid" : "softmax"));
    TRY(put(r->out, "router_bias", v3 ? "true" : "false"));
    return greedy ? NULL : take_same(r, of_groups, COUNT(of_groups));
}

static status *take_experts(const struct reading *r, const char *family)
{
    bool qwen = !strcmp(family, "qwen3_moe"), dots = !strcmp(family, "dots1");
    if (!qwen && !dots && strncmp(family, "deepseek", 8) != 0)
        return NULL;
    if (!r->latent && json_number_value(value_of(r->root, "kv_lora_rank")) > 0)
        return NOT_BUILT(r, "multi-head latent attention (kv_lora_rank) of %s is not built", family);
    const json_t *freq = value_of(r->root, "moe_layer_freq");
    if (freq && json_integer_value(freq) != 1)
        return NOT_BUILT(r, "%s", "moe_layer_freq other than 1 is not built");
    TRY(take_same(r, of_experts, COUNT(of_experts)));
    TRY(qwen ? take_same(r, of_qwen, COUNT(of_qwen)) : take_same(r, of_deepseek, COUNT(of_deepseek)));
    if (json_is_true(value_of(r->root, "output_router_logits")) && value_of(r->root, "router_aux_loss_coef"))
        TRY(put_number(r, "router_aux_loss_coef", "balance_loss", value_of(r->root, "router_aux_loss_coef"), 'f'));
    if (qwen)
        return take_dense_layers(r, value_of(r->root, "mlp_only_layers"));
    if (r->latent)
        return take_latent(r, family);
    TRY(take_same(r, of_groups, COUNT(of_groups)));
    const char *scores = json_string_value(value_of(r->root, "scoring_func"));
    bool sigmoid = dots || (scores && !strcmp(scores, "sigmoid"));
    if (scores && strcmp(scores, "sigmoid") && strcmp(scores, "softmax"))
        return NOT_BUILT(r, "%s", "scoring_func other than softmax and sigmoid is not built");
    TRY(put(r->out, "router", sigmoid ? "sigmoid" : "softmax"));
    return put(r->out, "router_bias", dots ? "true" : "false");
}

static status *take_family(struct reading *r, const char **family)
{
    static const char *const families[] = { "llama",    "mistral", "qwen2",       "qwen3",      "qwen3_moe",
                                            "deepseek", "dots1",   "deepseek_v2", "deepseek_v3" };
    const char *type = json_string_value(value_of(r->root, "model_type"));
    char text[40];
    safetensors_text(type ? type : "", text, sizeof text);
    for (size_t i = 0; type && i < sizeof families / sizeof *families; i++)
        if (!strcmp(type, families[i])) {
            *family = families[i];
            r->latent = !strncmp(type, "deepseek_v", 10);
            return NULL;
        }
    return NOT_BUILT(r,
                     "model_type \"%s\" is not built (legal: llama, mistral, qwen2, qwen3, qwen3_moe, deepseek, "
                     "deepseek_v2, deepseek_v3, dots1)",
                     text);
}

static status *take_all(struct reading *r)
{
    const char *family = NULL;
    TRY(take_family(r, &family));
    TRY(refuse_rest(r));
    TRY(put(r->out, "kind", "llama"));
    TRY(take_same(r, same, SAME));
    TRY(take_experts(r, family));
    const json_t *dim = value_of(r->root, "head_dim");
    if (dim && !r->latent) /* there it is qk_rope_head_dim */
        TRY(put_number(r, "head_dim", "head_dim", dim, 'i'));
    else if (!strcmp(family, "qwen3"))
        TRY(put(r->out, "head_dim", "128")); /* Qwen3Config's default */
    if (!strcmp(family, "qwen2"))
        TRY(put(r->out, "qkv_bias", "true"));
    if (!strncmp(family, "qwen3", 5) || !strcmp(family, "dots1"))
        TRY(put(r->out, "qk_norm", "true"));
    TRY(take_rope(r));
    return take_window(r, family);
}

status *hf_config_parse(const char *json, size_t n, const char *name, struct hf_config *out)
{
    json_error_t e;
    char text[128];
    json_t *root = json_loadb(json, n, JSON_REJECT_DUPLICATES, &e);
    if (!root)
        safetensors_text(e.text, text, sizeof text);
    struct hf_config c = { .count = 0 };
    struct reading r = { .name = name, .root = root, .out = &c };
    status *st = !root                  ? ERR(INVALID, "%s:%d: %s", name, e.line, text)
                 : json_is_object(root) ? take_all(&r)
                                        : ERR(INVALID, "%s: not an object", name);
    json_decref(root);
    if (!st)
        *out = c;
    return st;
}

status *hf_config_read(const char *folder, struct hf_config *out)
{
    char name[512];
    void *text = NULL;
    size_t n;
    struct store *s;
    snprintf(name, sizeof name, "%s/config.json", folder);
    TRY(store_open(folder, false, &s));
    status *st = store_get_all(s, "config.json", HF_CONFIG_MAX, &text, &n);
    store_close(s);
    TRY(st);
    st = hf_config_parse(text, n, name, out);
    mem_free(text);
    return st;
}

/* ---- back ---- */

status *hf_config_stored(const char *text, struct hf_config *out)
{
    static const char mine[] = "model.";
    *out = (struct hf_config){ .count = 0 };
    for (const char *line = text; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        size_t n = strcspn(line, "\n"), key = strcspn(line, "=");
        if (strncmp(line, mine, sizeof mine - 1) || key >= n || !strncmp(line, "model.init_from=", 16))
            continue;
        char k[HF_KEY_BYTES + 1], v[HF_VALUE_BYTES + 1];
        snprintf(k, sizeof k, "%.*s", (int)(key - (sizeof mine - 1)), line + sizeof mine - 1);
        snprintf(v, sizeof v, "%.*s", (int)(n - key - 1), line + key + 1);
        TRY(put(out, k, v));
    }
    return out->count ? NULL : ERR(INVALID, "the stored configuration has no section model");
}

static double number(const struct hf_config *c, const char *key, double otherwise)
{
    const char *v = hf_config_get(c, key);
    return v ? strtod(v, NULL) : otherwise;
}

static bool is(const struct hf_config *c, const char *key, const char *value)
{
    const char *v = hf_config_get(c, key);
    return v && !strcmp(v, value);
}

static json_t *whole(double v)
{
    return json_integer((json_int_t)fmin(fmax(v, -1e15), 1e15)); /* sizes; a stranger's number may be any */
}

static json_t *scaling_json(const struct hf_config *c)
{
    const char *type = hf_config_get(c, "rope_scaling");
    if (!type || !strcmp(type, "none"))
        return json_null();
    json_t *s = json_pack("{s:s, s:f}", "rope_type", type, "factor", number(c, "rope_factor", 1));
    if (strcmp(type, "linear"))
        json_object_set_new(s, "original_max_position_embeddings", whole(number(c, "rope_original", 0)));
    if (!strcmp(type, "llama3")) {
        json_object_set_new(s, "low_freq_factor", json_real(number(c, "rope_low", 1)));
        json_object_set_new(s, "high_freq_factor", json_real(number(c, "rope_high", 4)));
    }
    if (!strcmp(type, "yarn")) {
        json_object_set_new(s, "beta_fast", json_real(number(c, "rope_beta_fast", 32)));
        json_object_set_new(s, "beta_slow", json_real(number(c, "rope_beta_slow", 1)));
        if (number(c, "rope_amplitude", 0) > 0)
            json_object_set_new(s, "attention_factor", json_real(number(c, "rope_amplitude", 0)));
    }
    if (number(c, "rope_mscale_all_dim", 0) > 0)
        json_object_set_new(s, "mscale_all_dim", json_real(number(c, "rope_mscale_all_dim", 0)));
    return s;
}

/* With latent attention. */
static status *family_of_latent(const struct hf_config *c, const char **type, const char **class)
{
    bool bias = is(c, "router_bias", "true"), sigmoid = is(c, "router", "sigmoid"),
         norm = is(c, "router_norm", "true") || !hf_config_get(c, "router_norm"),
         plain = number(c, "experts", 0) > 0 && number(c, "sliding_window", 0) <= 0 &&
                 !*(hf_config_get(c, "dense_layers") ?: "") && number(c, "sparse_step", 1) < 2;
    if (!plain || (bias != sigmoid) || (norm && !bias))
        return ERR(
            UNSUPPORTED,
            "no Hugging Face family has this model with latent attention: both have experts, without dense_layers, "
            "sparse_step and sliding_window; deepseek_v3 has a sigmoid with router_bias, deepseek_v2 a softmax "
            "without it and without router_norm");
    *type = bias ? "deepseek_v3" : "deepseek_v2";
    *class = bias ? "DeepseekV3ForCausalLM" : "DeepseekV2ForCausalLM";
    return NULL;
}

/* A model of the three, or none. */
static status *family_of_experts(const struct hf_config *c, const char **type, const char **class)
{
    bool norm = is(c, "qk_norm", "true"), bias = is(c, "router_bias", "true"), sigmoid = is(c, "router", "sigmoid"),
         plain = !is(c, "qkv_bias", "true") && number(c, "sliding_window", 0) <= 0,
         lists = *(hf_config_get(c, "dense_layers") ?: "") || number(c, "sparse_step", 1) > 1,
         qwen = !bias && !sigmoid && number(c, "shared_experts", 0) < 1 && number(c, "router_groups", 1) < 2 &&
                !(fabs(number(c, "router_scale", 1) - 1) > 0);
    if (plain && norm && qwen)
        *type = "qwen3_moe";
    else if (plain && norm && bias && sigmoid && !lists)
        *type = "dots1";
    else if (plain && !norm && !bias && !lists)
        *type = "deepseek";
    else
        return ERR(UNSUPPORTED,
                   "no Hugging Face family has these experts: qwen3_moe has qk_norm and a softmax, without "
                   "shared experts, groups and biases; dots1 has qk_norm and a sigmoid with router_bias; "
                   "deepseek has neither; none has qkv_bias or sliding_window, and only qwen3_moe has "
                   "dense_layers and sparse_step");
    *class = !strcmp(*type, "qwen3_moe") ? "Qwen3MoeForCausalLM"
             : !strcmp(*type, "dots1")   ? "Dots1ForCausalLM"
                                         : "DeepseekForCausalLM";
    return NULL;
}

static status *family_of(const struct hf_config *c, const char **type, const char **class)
{
    bool norm = is(c, "qk_norm", "true"), bias = is(c, "qkv_bias", "true");
    double window = number(c, "sliding_window", 0), from = number(c, "window_from", 0);
    if (number(c, "kv_lora_rank", 0) > 0)
        return family_of_latent(c, type, class);
    if (number(c, "experts", 0) > 0)
        return family_of_experts(c, type, class);
    if (norm && bias)
        return ERR(UNSUPPORTED, "no Hugging Face family has both model.qk_norm and model.qkv_bias");
    if (!norm && !bias && window > 0 && from > 0)
        return ERR(UNSUPPORTED, "no Hugging Face family has model.window_from without qk_norm or qkv_bias");
    *type = norm ? "qwen3" : bias ? "qwen2" : window > 0 ? "mistral" : "llama";
    *class = norm         ? "Qwen3ForCausalLM"
             : bias       ? "Qwen2ForCausalLM"
             : window > 0 ? "MistralForCausalLM"
                          : "LlamaForCausalLM";
    return NULL;
}

static void add_same(json_t *o, const struct hf_config *c, const struct same *keys, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double v = number(c, keys[i].ours, keys[i].def ? strtod(keys[i].def, NULL) : 0);
        json_object_set_new(o, keys[i].theirs,
                            keys[i].type == 'b'   ? json_boolean(is(c, keys[i].ours, "true"))
                            : keys[i].type == 'i' ? whole(v)
                                                  : json_real(v));
    }
}

/* Layers without experts, first_dense among them, in order. */
static json_t *dense_layers(const struct hf_config *c)
{
    json_t *all = json_array();
    double first = number(c, "first_dense", 0), layers = number(c, "layers", 0);
    for (double i = 0; i < first && i < layers; i++)
        json_array_append_new(all, whole(i));
    for (const char *at = hf_config_get(c, "dense_layers") ?: ""; *at; at += strcspn(at, ","), at += *at == ',')
        if (strtod(at, NULL) >= first)
            json_array_append_new(all, whole(strtod(at, NULL)));
    return all;
}

static void add_experts(json_t *o, const struct hf_config *c, const char *type)
{
    bool qwen = !strcmp(type, "qwen3_moe"), sigmoid = is(c, "router", "sigmoid");
    if (number(c, "experts", 0) < 1)
        return;
    add_same(o, c, of_experts, COUNT(of_experts));
    if (qwen) {
        add_same(o, c, of_qwen, COUNT(of_qwen));
        json_object_set_new(o, "mlp_only_layers", dense_layers(c));
    } else {
        add_same(o, c, of_deepseek, COUNT(of_deepseek));
        add_same(o, c, of_groups, COUNT(of_groups));
        json_object_set_new(o, "scoring_func", json_string(sigmoid ? "sigmoid" : "softmax"));
        json_object_set_new(o, "moe_layer_freq", whole(1));
    }
    if (number(c, "balance_loss", 0) > 0) {
        json_object_set_new(o, "router_aux_loss_coef", json_real(number(c, "balance_loss", 0)));
        json_object_set_new(o, "output_router_logits", json_true());
    }
}

static void add_latent(json_t *o, const struct hf_config *c, const char *type)
{
    add_same(o, c, of_latent, COUNT(of_latent));
    if (number(c, "q_lora_rank", 0) < 1)
        json_object_set_new(o, "q_lora_rank", json_null());
    json_object_set_new(o, "head_dim", whole(number(c, "qk_rope_head_dim", 0)));
    json_object_set_new(o, "topk_method",
                        json_string(!strcmp(type, "deepseek_v3")        ? "noaux_tc"
                                    : number(c, "router_groups", 1) > 1 ? "group_limited_greedy"
                                                                        : "greedy"));
}

static json_t *config_json(const struct hf_config *c, const char *dtype, const char *type, const char *class)
{
    double heads = number(c, "heads", 0), kv = number(c, "kv_heads", 0), dim = number(c, "head_dim", 0),
           hidden = number(c, "hidden", 0), window = number(c, "sliding_window", 0);
    json_t *o = json_pack("{s:[s], s:s, s:s, s:s}", "architectures", class, "model_type", type, "torch_dtype",
                          !strcmp(dtype, "BF16")  ? "bfloat16"
                          : !strcmp(dtype, "F16") ? "float16"
                          : !strcmp(dtype, "F64") ? "float64"
                                                  : "float32",
                          "hidden_act", "silu");
    add_same(o, c, same, SAME);
    add_experts(o, c, type);
    json_object_set_new(o, "num_key_value_heads", whole(kv > 0 ? kv : heads));
    json_object_set_new(o, "head_dim", whole(dim > 0 || heads < 1 ? dim : floor(hidden / heads)));
    if (number(c, "kv_lora_rank", 0) > 0)
        add_latent(o, c, type);
    json_object_set_new(o, "rope_theta", json_real(number(c, "rope_theta", 10000)));
    json_object_set_new(o, "rope_scaling", scaling_json(c));
    if (strcmp(type, "qwen2"))
        json_object_set_new(o, "attention_bias", json_false());
    if (strcmp(type, "llama"))
        json_object_set_new(o, "sliding_window", window > 0 ? whole(window) : json_null());
    if (!strncmp(type, "qwen", 4)) {
        json_object_set_new(o, "use_sliding_window", json_boolean(window > 0));
        json_object_set_new(o, "max_window_layers",
                            whole(window > 0 ? number(c, "window_from", 0) : number(c, "layers", 0)));
    }
    return o;
}

status *hf_config_json(const struct hf_config *c, const char *dtype, char **text)
{
    const char *type = NULL, *class = NULL;
    if (!is(c, "kind", "llama"))
        return ERR(UNSUPPORTED, "a model of kind %s has no Hugging Face family", hf_config_get(c, "kind") ?: "unknown");
    TRY(family_of(c, &type, &class));
    json_t *o = config_json(c, dtype, type, class);
    const size_t how = JSON_INDENT(2) | JSON_REAL_PRECISION(17);
    size_t n = json_dumpb(o, NULL, 0, how);
    char *out = n ? mem_alloc(n + 2) : NULL;
    if (out) {
        (void)json_dumpb(o, out, n, how);
        memcpy(out + n, "\n", 2);
        *text = out;
    }
    json_decref(o);
    return out ? NULL : ERR(NO_MEMORY, "config.json");
}
