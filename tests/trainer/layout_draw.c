/* layout_draw: what is computed, and on which layout, from one row of random numbers. */
#include "tests/trainer/layouts.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void words_add(struct words *w, const char *format, ...)
{
    va_list a;
    va_start(a, format);
    if (w->count == JOB_WORDS || vsnprintf(w->word[w->count++], WORD_BYTES, format, a) >= WORD_BYTES)
        abort();
    va_end(a);
}

static int find(const struct words *w, const char *key)
{
    size_t n = strlen(key);
    for (int i = 0; i < w->count; i++)
        if (!strncmp(w->word[i], key, n) && w->word[i][n] == '=')
            return i;
    return -1;
}

const char *words_get(const struct words *w, const char *key, const char *otherwise)
{
    int i = find(w, key);
    return i < 0 ? otherwise : w->word[i] + strlen(key) + 1;
}

long words_number(const struct words *w, const char *key, long otherwise)
{
    const char *text = words_get(w, key, NULL);
    return text ? strtol(text, NULL, 10) : otherwise;
}

static void words_set(struct words *w, const char *key, const char *value)
{
    int i = find(w, key);
    if (i >= 0) /* the last of the list takes its place */
        memmove(w->word[i], w->word[--w->count], WORD_BYTES);
    words_add(w, "%s=%s", key, value);
}

static void words_set_number(struct words *w, const char *key, long value)
{
    char text[24];
    snprintf(text, sizeof text, "%ld", value);
    words_set(w, key, text);
}

/* ---- lines ---- */

static bool is_how(const char *word)
{
    return !strncmp(word, "parallel.", 9) || !strncmp(word, "memory.", 7) || !strncmp(word, "threads=", 8);
}

void job_line(const struct layout_job *j, char line[LINE_BYTES])
{
    int n = snprintf(line, LINE_BYTES, "ranks=%d", j->ranks);
    const struct words *const both[] = { &j->what, &j->how };
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < both[b]->count && n < LINE_BYTES; i++)
            n += snprintf(line + n, (size_t)(LINE_BYTES - n), " %s", both[b]->word[i]);
}

bool job_parse(const char *line, struct layout_job *out)
{
    char word[WORD_BYTES];
    int used;
    memset(out, 0, sizeof *out);
    for (; sscanf(line, " %95s%n", word, &used) == 1; line += used) {
        if (!strchr(word, '='))
            return false;
        if (!strncmp(word, "ranks=", 6))
            out->ranks = (int)strtol(word + 6, NULL, 10);
        else
            words_add(is_how(word) ? &out->how : &out->what, "%s", word);
    }
    return out->ranks >= 1 && out->ranks <= RANKS_MAX;
}

/* ---- what is computed ---- */

#define ONE_OF(d, ...) ((const int[]){ __VA_ARGS__ })[draw_below(d, sizeof((const int[]){ __VA_ARGS__ }) / sizeof(int))]

static bool one_in(struct draw *d, uint64_t n)
{
    return draw_below(d, n) == 0;
}

static const char *yes_no(bool yes)
{
    return yes ? "true" : "false";
}

static void draw_model(struct draw *d, struct words *w)
{
    static const char *const ropes[] = { "none", "none", "linear", "llama3", "yarn" };
    int heads = ONE_OF(d, 2, 3, 4, 4, 6, 8, 8), kv = heads;
    while (heads % (kv = (int)draw_between(d, 1, (uint64_t)heads)))
        ;
    words_add(w, "model.layers=%d", ONE_OF(d, 1, 2, 3, 4));
    words_add(w, "model.hidden=%d", ONE_OF(d, 12, 20, 24, 36));
    words_add(w, "model.heads=%d", heads);
    words_add(w, "model.kv_heads=%d", kv);
    words_add(w, "model.head_dim=%d", ONE_OF(d, 4, 6, 8));
    words_add(w, "model.ffn=%d", ONE_OF(d, 12, 20, 24, 40, 48));
    words_add(w, "model.vocab=%d", ONE_OF(d, 0, 0, 261, 263)); /* 0: 258 */
    words_add(w, "model.tied=%s", yes_no(one_in(d, 2)));
    words_add(w, "model.qk_norm=%s", yes_no(one_in(d, 3)));
    words_add(w, "model.qkv_bias=%s", yes_no(one_in(d, 3)));
    words_add(w, "model.sliding_window=%d", ONE_OF(d, 0, 0, 5));
    words_add(w, "model.init_std=%s", one_in(d, 2) ? "0.02" : "0.1");
    int rope = (int)draw_below(d, 5);
    words_add(w, "model.rope_scaling=%s", ropes[rope]);
    if (rope > 1)
        words_add(w, "model.rope_factor=2");
    if (rope > 2)
        words_add(w, "model.rope_original=16");
}

/* Keys and values of latents, as many heads of both, which have sizes of their own. */
static void draw_latent(struct draw *d, struct words *w)
{
    words_set(w, "model.kv_heads", words_get(w, "model.heads", ""));
    words_set(w, "model.head_dim", "0");
    words_set(w, "model.qk_norm", "false");
    words_set(w, "model.qkv_bias", "false");
    words_add(w, "model.kv_lora_rank=%d", ONE_OF(d, 4, 7, 12));
    words_add(w, "model.q_lora_rank=%d", ONE_OF(d, 0, 5, 9));
    words_add(w, "model.qk_nope_head_dim=%d", ONE_OF(d, 3, 4));
    words_add(w, "model.qk_rope_head_dim=%d", ONE_OF(d, 2, 4));
    words_add(w, "model.v_head_dim=%d", ONE_OF(d, 3, 6, 9));
    if (strcmp(words_get(w, "model.rope_scaling", ""), "none"))
        words_add(w, "model.rope_mscale_all_dim=%s", one_in(d, 2) ? "0" : "0.8");
    if (!strncmp(words_get(w, "lora.targets", ""), "*.q_proj", 8)) /* there may be none, as there is no v_proj */
        words_set(w, "lora.targets", "*.kv_*,*.o_proj");
}

/* Layers whose tokens choose their experts. Whether biases choose with them, which adapters leave as they are. */
static bool draw_experts(struct draw *d, struct words *w)
{
    int experts = ONE_OF(d, 3, 4, 6, 8), top = (int)draw_between(d, 1, 3),
        groups = experts % 2 ? 1 : ONE_OF(d, 1, 1, 2);
    bool bias = one_in(d, 2);
    words_add(w, "model.experts=%d", experts);
    words_add(w, "model.experts_per_token=%d", top);
    words_add(w, "model.expert_ffn=%d", ONE_OF(d, 8, 12, 24));
    words_add(w, "model.shared_experts=%d", ONE_OF(d, 0, 0, 1, 2));
    words_add(w, "model.first_dense=%d", ONE_OF(d, 0, 0, 1));
    words_add(w, "model.sparse_step=%d", ONE_OF(d, 1, 1, 2));
    words_add(w, "model.router=%s", one_in(d, 2) ? "softmax" : "sigmoid");
    words_add(w, "model.router_norm=%s", yes_no(one_in(d, 2)));
    words_add(w, "model.router_bias=%s", yes_no(bias));
    words_add(w, "model.balance_loss=%s", one_in(d, 2) ? "0" : "0.01");
    words_add(w, "model.router_groups=%d", groups);
    words_add(w, "model.router_top_groups=%d", groups == 2 && top <= experts / 2 ? 1 : groups);
    return bias;
}

/* Whether some layer has experts: of those behind the first ones every sparse_step-th. */
static bool has_experts(const struct words *what)
{
    long step = words_number(what, "model.sparse_step", 1), i = words_number(what, "model.first_dense", 0);
    while ((i + 1) % step)
        i++;
    return words_number(what, "model.experts", 0) && i < words_number(what, "model.layers", 1);
}

/* Adapters, frozen parameters, or neither. */
static bool draw_tuning(struct draw *d, struct words *w)
{
    static const char *const targets[] = { "*_proj", "*.q_proj,*.v_proj,*.o_proj", "*.0.self_attn.*", "*.experts.*" },
                             *const freeze[] = { "*embed*", "*.layers.0.*", "*norm*,*_proj*" };
    int kind = (int)draw_below(d, 6);
    if (kind == 0) {
        words_add(w, "lora.targets=%s", targets[draw_below(d, has_experts(w) ? 4 : 3)]);
        words_add(w, "lora.rank=%d", ONE_OF(d, 2, 3, 5));
    }
    if (kind == 1)
        words_add(w, "train.freeze=%s", freeze[draw_below(d, 3)]);
    return kind == 0;
}

static void draw_algorithm(struct draw *d, struct words *w, bool lora)
{
    static const char *const kinds[][2] = { { "sft" },
                                            { "dpo", "algo.loss=sigmoid" },
                                            { "dpo", "algo.loss=kto_pair" },
                                            { "dpo", "algo.ld_alpha=0.5" },
                                            { "kto", "algo.loss=kto" } };
    int kind = (int)draw_below(d, 5);
    words_add(w, "algo.kind=%s", kinds[kind][0]);
    if (!kind)
        return;
    words_add(w, "%s", kinds[kind][1]);
    int warmup = one_in(d, 2) ? 3 : 0, reference = (int)draw_below(d, lora && !warmup ? 3 : 2);
    words_add(w, "algo.warmup_sft_steps=%d", warmup);
    words_add(w, "algo.reference=%s", reference == 0 ? "precomputed" : reference == 1 ? "live" : "base");
    if (reference == 1)
        words_add(w, "algo.ref_sync_steps=%d", ONE_OF(d, 0, 2));
}

static void draw_what(struct draw *d, struct words *w)
{
    int micro = ONE_OF(d, 1, 1, 2, 3), k = (int)draw_between(d, 1, 9);
    draw_model(d, w);
    bool bias = draw_below(d, 5) < 2 && draw_experts(d, w), lora = draw_tuning(d, w);
    words_add(w, "model.balance_rate=%s", bias && !lora ? "0.01" : "0");
    draw_algorithm(d, w, lora);
    words_add(w, "train.global_batch=%d", micro * k);
    words_add(w, "train.micro_batch=%d", micro);
    words_add(w, "train.lanes=%d", ONE_OF(d, 8, 8, 8, 4, 2));
    words_add(w, "train.deterministic=%s", yes_no(draw_below(d, 4)));
    words_add(w, "train.eval_every=%d", one_in(d, 6) ? 4 : 0); /* then completions of tasks are generated */
    words_add(w, "optim.clip=%s", one_in(d, 3) ? "0" : one_in(d, 2) ? "0.05" : "1");
    words_add(w, "optim.weight_decay=%s", one_in(d, 2) ? "0" : "0.1");
    words_add(w, "optim.kind=%s", one_in(d, 6) ? "muon" : "adamw");
    if (one_in(d, 5))
        draw_latent(d, w);
}

bool job_has_experts(const struct layout_job *j)
{
    return has_experts(&j->what);
}

/* ---- layouts ---- */

/* Layers of each stage: the first and the last may have none. */
static void draw_stages(struct draw *d, struct words *how, int layers, int stages)
{
    int layer[RANKS_MAX] = { 0 }, left = layers - (stages - 2);
    char text[64] = "";
    for (int s = 0; s < stages; s++)
        layer[s] = s > 0 && s < stages - 1;
    for (; left > 0; left--)
        layer[draw_below(d, (uint64_t)stages)]++;
    for (int s = 0, n = 0; s < stages; s++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%s%d", s ? "," : "", layer[s]);
    words_add(how, "parallel.stages=%s", text);
}

static void draw_pipeline(struct draw *d, struct words *how, int layers, int pp)
{
    static const char *const schedules[] = { "1f1b", "zero-bubble", "interleaved" };
    int schedule = (int)draw_below(d, 3), chunks = schedule == 2 ? ONE_OF(d, 0, 2, 3) : 0,
        stages = pp * (schedule < 2 ? 1
                       : chunks     ? chunks
                                    : 2);
    words_add(how, "parallel.schedule=%s", schedules[schedule]);
    words_add(how, "parallel.chunks=%d", chunks);
    if (one_in(d, 2) && stages <= layers + 2)
        draw_stages(d, how, layers, stages);
}

/* Stages of the whole pipeline. */
static long stages_of(const struct words *how)
{
    bool interleaved = !strcmp(words_get(how, "parallel.schedule", ""), "interleaved");
    long chunks = words_number(how, "parallel.chunks", 0);
    return words_number(how, "parallel.pp", 1) * (!interleaved ? 1 : chunks ? chunks : 2);
}

static int draw_divisor(struct draw *d, int n)
{
    int by;
    while (n % (by = (int)draw_between(d, 1, (uint64_t)n)))
        ;
    return by;
}

static void draw_how(struct draw *d, const struct words *what, int ranks, struct words *how)
{
    enum { PP, DP, CP, TP, EP, AXES };
    static const char *const buckets[] = { "4K", "16K", "1M" }, *const recompute[] = { "none", "none", "block",
                                                                                       "attention" };
    int size[AXES] = { 1, 1, 1, 1, 1 }, layers = (int)words_number(what, "model.layers", 1),
        axes = has_experts(what) ? AXES : EP;
    for (int left = ranks, by = 2; left > 1; left /= by) {
        for (by = 2; left % by; by++)
            ;
        size[draw_below(d, (uint64_t)axes)] *= by;
    }
    how->count = 0;
    words_add(how, "parallel.pp=%d", size[PP]);
    words_add(how, "parallel.dp=%d", one_in(d, 2) ? size[DP] : 0);
    words_add(how, "parallel.cp=%d", size[CP]);
    words_add(how, "parallel.tp=%d", size[TP]);
    words_add(how, "parallel.ep=%d", size[EP]);
    if (size[TP] > 1)
        words_add(how, "parallel.sequence=%s", yes_no(one_in(d, 2)));
    if (size[PP] > 1)
        draw_pipeline(d, how, layers, size[PP]);
    words_add(how, "parallel.zero=%d", (int)draw_below(d, 4));
    words_add(how, "parallel.dp_shard=%d", one_in(d, 2) ? 0 : draw_divisor(d, size[DP] * size[EP]));
    words_add(how, "parallel.bucket=%s", buckets[draw_below(d, 3)]);
    words_add(how, "memory.recompute=%s", recompute[draw_below(d, 4)]);
    words_add(how, "threads=%d", ONE_OF(d, 1, 1, 2));
}

/* Ranks that take micro-batches of their own. */
static int dp_ep_of(const struct layout_job *j)
{
    const struct words *how = &j->how;
    return j->ranks / (int)(words_number(how, "parallel.pp", 1) * words_number(how, "parallel.cp", 1) *
                            words_number(how, "parallel.tp", 1));
}

/* By the rules of docs/parallelism.md. */
static bool is_legal(const struct layout_job *j)
{
    const struct words *what = &j->what, *how = &j->how;
    long tp = words_number(how, "parallel.tp", 1), ep = words_number(how, "parallel.ep", 1), dp = dp_ep_of(j),
         zero = words_number(how, "parallel.zero", 1), shard = words_number(how, "parallel.dp_shard", 0),
         kv = words_number(what, "model.kv_heads", 1);
    bool heads = words_number(what, "model.heads", 1) % tp == 0 && (kv % tp == 0 || tp % kv == 0);
    if (!heads || words_number(what, "model.ffn", 1) % tp || words_number(what, "model.expert_ffn", 0) % tp)
        return false;
    if (stages_of(how) > words_number(what, "model.layers", 1) + 2)
        return false;
    if (ep > 1 && (!has_experts(what) || words_number(what, "model.experts", 0) % ep))
        return false;
    long groups = zero < 2 ? dp : shard ? dp / shard : 1;
    if (!strcmp(words_get(what, "train.deterministic", "true"), "true") &&
        words_number(what, "train.lanes", 8) < groups)
        return false;
    return true;
}

/* Whether Muon has a matrix to update, in any such model. */
static bool trains_matrices(const struct words *what)
{
    const char *freeze = words_get(what, "train.freeze", "");
    return !words_get(what, "lora.targets", NULL) && (!*freeze || !strcmp(freeze, "*embed*"));
}

void draw_other_layout(struct draw *d, struct layout_job *j)
{
    do {
        j->ranks = ONE_OF(d, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8, 8);
        draw_how(d, &j->what, j->ranks, &j->how);
    } while (!is_legal(j));
}

void draw_job(struct draw *d, struct layout_job *out)
{
    memset(out, 0, sizeof *out);
    draw_what(d, &out->what);
    if (!trains_matrices(&out->what))
        words_set(&out->what, "optim.kind", "adamw");
    draw_other_layout(d, out);
}

struct layout_job job_on_one_rank(const struct layout_job *j)
{
    struct layout_job one = { .ranks = 1, .what = j->what };
    words_add(&one.how, "parallel.zero=0");
    words_add(&one.how, "threads=1");
    return one;
}

/* ---- what must be refused ---- */

/* No axis is used, on so many ranks; what else was drawn stays. */
static void flatten(struct layout_job *j, int ranks)
{
    static const char *const plain[][2] = { { "parallel.pp", "1" },       { "parallel.dp", "0" },
                                            { "parallel.cp", "1" },       { "parallel.schedule", "1f1b" },
                                            { "parallel.tp", "1" },       { "parallel.sequence", "false" },
                                            { "parallel.stages", "" },    { "parallel.zero", "1" },
                                            { "parallel.dp_shard", "0" }, { "parallel.chunks", "0" },
                                            { "parallel.ep", "1" } };
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        words_set(&j->how, plain[i][0], plain[i][1]);
    words_set(&j->what, "optim.kind", "adamw");
    words_set(&j->what, "train.lanes", "8");
    j->ranks = ranks;
}

/* Adapters, if there are some, are of layers that every model has. */
static void any_targets(struct layout_job *j)
{
    if (words_get(&j->what, "lora.targets", NULL))
        words_set(&j->what, "lora.targets", "*_proj");
}

static const char *mistake_of_tp(struct draw *d, struct layout_job *j)
{
    int tp = (int)draw_between(d, 2, 4), which = (int)draw_below(d, 4);
    flatten(j, which == 3 ? TP_MAX : tp);
    words_set_number(&j->how, "parallel.tp", which == 3 ? TP_MAX + 1 : tp);
    words_set_number(&j->what, "model.heads", which == 0 ? 2 * tp + 1 : which == 1 ? tp * (tp + 1) : tp);
    words_set_number(&j->what, "model.kv_heads", which == 0 ? 1 : which == 1 ? tp + 1 : tp);
    words_set_number(&j->what, "model.ffn", which == 2 ? 5 * tp + 1 : 5 * tp);
    if (which == 2) { /* some layer has such a block */
        words_set(&j->what, "model.first_dense", "1");
        any_targets(j);
    }
    return ((const char *const[]){ "model.heads", "model.kv_heads", "model.ffn", "parallel.tp" })[which];
}

static const char *mistake_of_pp(struct draw *d, struct layout_job *j)
{
    static const char *const lists[] = { "1,4", "0,9", "1,1,1,1,1,1", "1", "2,-1", "1;1" };
    int layers = (int)words_number(&j->what, "model.layers", 1);
    if (draw_below(d, 4) == 0) {
        flatten(j, 2);
        words_set(&j->how, "parallel.pp", "2");
        words_set(&j->how, "parallel.chunks", "2");
        return "parallel.chunks";
    }
    if (draw_below(d, 3) == 0) { /* more stages than there are parts */
        flatten(j, layers + 3);
        words_set_number(&j->how, "parallel.pp", layers + 3);
        return "parallel.pp";
    }
    flatten(j, 2);
    words_set(&j->how, "parallel.pp", draw_below(d, 4) ? "2" : "1");
    words_set(&j->how, "parallel.stages", lists[draw_below(d, 6)]);
    if (!strcmp(words_get(&j->how, "parallel.pp", ""), "1"))
        j->ranks = 1;
    return "parallel.stages";
}

static const char *mistake_of_experts(struct draw *d, struct layout_job *j)
{
    int which = (int)draw_below(d, 6);
    flatten(j, which > 3 ? 4 : 2);
    words_set(&j->what, "model.experts", which == 5 ? "0" : "6");
    words_set_number(&j->what, "model.experts_per_token", which == 0 ? 7 : 2);
    words_set_number(&j->what, "model.expert_ffn", which == 1 ? 9 : 8);
    words_set_number(&j->what, "model.router_groups", which == 2 ? 4 : 3);
    words_set_number(&j->what, "model.router_top_groups", which == 3 ? 4 : 2);
    words_set(&j->what, "model.heads", "2");
    words_set(&j->what, "model.kv_heads", "2");
    words_set(&j->what, "model.ffn", "8");
    words_set(&j->what, "model.first_dense", "0");
    words_set(&j->what, "model.sparse_step", "1");
    any_targets(j);
    if (which > 3)
        words_set(&j->how, "parallel.ep", "4");
    else
        words_set(&j->how, "parallel.tp", "2");
    return ((const char *const[]){ "model.experts_per_token", "model.expert_ffn", "model.router_groups",
                                   "model.router_top_groups", "parallel.ep", "parallel.ep" })[which];
}

static const char *mistake_of_dp(struct draw *d, struct layout_job *j)
{
    int ranks = (int)draw_between(d, 2, RANKS_MAX);
    switch (draw_below(d, 3)) {
    case 0:
        flatten(j, ranks);
        words_set_number(&j->how, "parallel.dp_shard", ranks + 1);
        return "parallel.dp_shard";
    case 1:
        words_set_number(&j->what, "train.micro_batch", words_number(&j->what, "train.global_batch", 1) + 1);
        return "train.micro_batch";
    default: /* fewer lanes than ranks that add up gradients */
        flatten(j, ranks);
        words_set(&j->what, "train.deterministic", "true");
        words_set(&j->what, "train.lanes", "1");
        return "lanes";
    }
}

const char *draw_mistake(struct draw *d, struct layout_job *j)
{
    words_set(&j->what, "train.eval_every", "0");
    switch (draw_below(d, 5)) {
    case 0: /* the sizes multiply to more ranks, or to no divisor of theirs */
        if (draw_below(d, 2))
            words_set_number(&j->how, "parallel.dp", dp_ep_of(j) + (long)draw_between(d, 1, 3));
        else {
            flatten(j, j->ranks);
            words_set_number(&j->how, "parallel.pp", j->ranks + 1);
        }
        return "does not fit";
    case 1:
        return mistake_of_tp(d, j);
    case 2:
        return mistake_of_pp(d, j);
    case 3:
        return mistake_of_experts(d, j);
    default:
        return mistake_of_dp(d, j);
    }
}
