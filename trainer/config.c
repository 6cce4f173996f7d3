#include "trainer/config.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/hf/hf_config.h"
#include "trainer/ops/moe.h"
#include "trainer/parallel/schedule.h"

#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#define ROW(type_, struct_, field_, key_, def_, min_, max_, choices_, unit_, help_)                                    \
    {                                                                                                                  \
        key_, type_, def_, min_, max_, choices_, unit_, help_, offsetof(struct struct_, field_)                        \
    }
#define TABLE(section_, rows_)                                                                                         \
    {                                                                                                                  \
        section_, rows_, sizeof(rows_) / sizeof((rows_)[0])                                                            \
    }

static const struct option top_rows[] = {
    ROW(OPT_ENUM, top_config, device, "device", "cpu", 0, 0, "cpu|cuda", "", "where tensors live"),
    ROW(OPT_ENUM, top_config, comm, "comm", "auto", 0, 0, "auto|mpi|nccl|self", "",
        "how ranks move tensors; auto: nccl with device: cuda, else mpi; self: one process without MPI"),
    ROW(OPT_INT, top_config, threads, "threads", "0", 0, 1024, NULL, "",
        "compute threads of a rank; 0: its share of the cores that it may run on"),
    ROW(OPT_ENUM, top_config, debug, "debug", "off", 0, 0, "off|nan", "",
        "nan: look at what every op, its backward, the sums of gradients and the update have written; the first NaN or "
        "infinity ends the run with the op's or the parameter's name. Slow"),
};
static const struct option run_rows[] = {
    ROW(OPT_STRING, run_config, name, "name", NULL, 0, 0, NULL, "", "name of the run, in logs and metrics"),
    ROW(OPT_STRING, run_config, dir, "dir", "", 0, 0, NULL, "", "folder for metrics.jsonl; empty: runs/NAME"),
    ROW(OPT_INT, run_config, seed, "seed", "0", 0, 9e15, NULL, "",
        "seed of initialisation, shuffling and every other draw"),
};
static const struct option model_rows[] = {
    ROW(OPT_STRING, model_choice, init_from, "init_from", "", 0, 0, NULL, "",
        "folder of a Hugging Face model (config.json, safetensors): the first weights, and the keys of this section "
        "that "
        "are not set here; empty: random weights"),
};
static const struct option data_rows[] = {
    ROW(OPT_STRING, data_config, sft, "sft", "", 0, 0, NULL, "",
        "JSONL of prompt/completion or messages rows, for SFT"),
    ROW(OPT_STRING, data_config, prefs, "prefs", "", 0, 0, NULL, "", "JSONL of prompt/chosen/rejected rows, for DPO"),
    ROW(OPT_STRING, data_config, labelled, "labelled", "", 0, 0, NULL, "",
        "JSONL of prompt/completion/label rows, for KTO"),
    ROW(OPT_STRING, data_config, heldout, "heldout", "", 0, 0, NULL, "",
        "JSONL of preference rows for evaluation; empty: none"),
    ROW(OPT_STRING, data_config, tasks, "tasks", "", 0, 0, NULL, "",
        "JSONL of prompt/answer rows: evaluation by generating the answers; empty: none"),
    ROW(OPT_INT, data_config, max_length, "max_length", "1024", 8, 1 << 20, NULL, "tokens",
        "longer sequences are cut at their end"),
};
static const struct option algo_rows[] = {
    ROW(OPT_STRING, algo_choice, kind, "kind", NULL, 0, 0, NULL, "", "the algorithm: sft, dpo, kto"),
    ROW(OPT_STRING, algo_choice, preset, "preset", "", 0, 0, NULL, "",
        "published settings (listed below) for the keys of this section that are not set here; empty: none"),
    ROW(OPT_INT, algo_choice, warmup_sft_steps, "warmup_sft_steps", "0", 0, 1e9, NULL, "steps",
        "SFT steps before the algorithm starts, part of train.steps"),
    ROW(OPT_FLOAT, algo_choice, warmup_sft_lr, "warmup_sft_lr", "0", 0, 1, NULL, "",
        "peak learning rate of those steps; 0: optim.lr"),
    ROW(OPT_ENUM, algo_choice, reference, "reference", "precomputed", 0, 0, "precomputed|live|base", "",
        "the weights the algorithm starts from: their log-probabilities once, or a copy of them run at every step; "
        "with lora, base: the model without its adapters, run at every step, and no copy"),
    ROW(OPT_INT, algo_choice, ref_sync_steps, "ref_sync_steps", "0", 0, 1e12, NULL, "steps",
        "TR-DPO, with reference: live: after so many steps, again and again, the copy moves to the weights; 0: never"),
    ROW(OPT_FLOAT, algo_choice, ref_sync_alpha, "ref_sync_alpha", "0.6", 0, 1, NULL, "",
        "how far: copy = alpha * weights + (1 - alpha) * copy"),
};
static const struct option train_rows[] = {
    ROW(OPT_INT, train_config, steps, "steps", NULL, 1, 1e12, NULL, "steps",
        "optimiser steps in all, SFT warm-up included"),
    ROW(OPT_INT, train_config, global_batch, "global_batch", NULL, 1, 1 << 20, NULL, "rows",
        "rows (sequences or pairs) an optimiser step"),
    ROW(OPT_INT, train_config, micro_batch, "micro_batch", "1", 1, 1 << 20, NULL, "rows",
        "rows of one forward pass; divides global_batch"),
    ROW(OPT_INT, train_config, lanes, "lanes", "8", 1, 64, NULL, "",
        "summation lanes of deterministic mode: a power of two, at least dp"),
    ROW(OPT_INT, train_config, eval_every, "eval_every", "0", 0, 1e12, NULL, "steps",
        "evaluate on data.heldout and data.tasks; 0: only where the algorithm starts and at the end"),
    ROW(OPT_INT, train_config, log_every, "log_every", "10", 1, 1e12, NULL, "steps", "steps between progress lines"),
    ROW(OPT_FLOAT, train_config, max_seconds, "max_seconds", "0", 0, 1e9, NULL, "s",
        "wall-clock limit: save and stop once the run is this old; 0: none"),
    ROW(OPT_BOOL, train_config, deterministic, "deterministic", "true", 0, 0, NULL, "",
        "the same bits for any number of ranks up to lanes"),
    ROW(OPT_ENUM, train_config, dtype, "dtype", "f32", 0, 0, "f32|bf16", "",
        "bf16: matrix products of weights are of factors rounded to bf16, with f32 sums; all that is stored stays f32"),
    ROW(OPT_LIST, train_config, freeze, "freeze", "", 0, 0, NULL, "",
        "patterns of the parameters that stay as they are, [\"model.embed_tokens.*\"]; empty: all train"),
    ROW(OPT_STRING, train_config, routes, "routes", "", 0, 0, NULL, "",
        "to compare meshes: record:PATH writes down which experts tokens take, on one rank; replay:PATH takes these"),
    ROW(OPT_ENUM, train_config, param_dtype, "param_dtype", "f32", 0, 0, "f32|bf16", "",
        "what passes compute with and ZeRO gathers: the parameters, or a rounded copy; updated and saved are f32"),
    ROW(OPT_ENUM, train_config, param_rounding, "param_rounding", "nearest", 0, 0, "nearest|stochastic", "",
        "with param_dtype: bf16; stochastic: up or down by chance, anew at each step"),
    ROW(OPT_ENUM, train_config, grad_dtype, "grad_dtype", "f32", 0, 0, "f32|bf16", "",
        "bf16: gradients are sent in it over dp, so every micro-batch's and every sum of them is rounded to it"),
};
static const struct option parallel_rows[] = {
    ROW(OPT_BOOL, parallel_config, automatic, "auto", "false", 0, 0, NULL, "",
        "choose pp, dp, tp, zero, sequence and memory.recompute, as far as they are not set, and say why; "
        "also written parallel: auto"),
    ROW(OPT_INT, parallel_config, pp, "pp", "1", 1, 1024, NULL, "ranks",
        "pipeline stages: each has a run of the model's layers"),
    ROW(OPT_ENUM, parallel_config, schedule, "schedule", "1f1b", 0, 0, "1f1b|zero-bubble|interleaved", "",
        "with pp: the order of passes; 1f1b: one forward, one backward in turn; zero-bubble: gradients of weights "
        "later; interleaved: every rank has several stages"),
    ROW(OPT_INT, parallel_config, chunks, "chunks", "0", 0, CHUNKS_MAX, NULL, "stages",
        "with schedule interleaved: stages of each rank, so that there are pp x chunks; 0: 2"),
    ROW(OPT_LIST, parallel_config, stages, "stages", "", 0, 0, NULL, "layers",
        "with pp: layers of each stage, a list of pp x chunks numbers ([3, 5, 4]); empty: even, embedding and head "
        "counted as layers"),
    ROW(OPT_INT, parallel_config, dp, "dp", "0", 0, 1 << 20, NULL, "ranks",
        "data-parallel ranks; 0: all that mpirun started"),
    ROW(OPT_INT, parallel_config, ep, "ep", "1", 1, EXPERTS_MAX, NULL, "ranks",
        "expert-parallel ranks: each has as many of every layer's experts, and micro-batches of its own"),
    ROW(OPT_INT, parallel_config, cp, "cp", "1", 1, CP_MAX, NULL, "ranks",
        "context-parallel ranks: they share the tokens of each micro-batch"),
    ROW(OPT_INT, parallel_config, tp, "tp", "1", 1, TP_MAX, NULL, "ranks",
        "tensor-parallel ranks: each matrix is cut over them, heads and vocabulary too"),
    ROW(OPT_BOOL, parallel_config, sequence, "sequence", "false", 0, 0, NULL, "",
        "with tp: activations between blocks are cut by tokens"),
    ROW(OPT_INT, parallel_config, zero, "zero", "1", 0, 3, NULL, "",
        "ZeRO stage: 0 cuts nothing, 1 optimiser state over the data-parallel ranks, 2 gradients too, 3 parameters "
        "too"),
    ROW(OPT_INT, parallel_config, dp_shard, "dp_shard", "0", 0, 1 << 20, NULL, "ranks",
        "over so many neighbours of dp zero cuts, dp / dp_shard replicas of all of them; 0: all of dp"),
    ROW(OPT_SIZE, parallel_config, bucket, "bucket", "16MiB", 4096, 4e9, NULL, "bytes",
        "gradient bytes reduced at a time"),
    ROW(OPT_ENUM, parallel_config, progress, "progress", "auto", 0, 0, "auto|thread|calls", "",
        "what moves messages under way over dp and pp: a thread of its own, or the calls of who computes; auto: a "
        "thread "
        "where a rank has a core to spare"),
};
static const struct option memory_rows[] = {
    ROW(OPT_SIZE, memory_config, activations, "activations", "0", 0, 0, NULL, "bytes",
        "cap on a rank's activations; 0: none"),
    ROW(OPT_SIZE, memory_config, rank, "rank", "0", 0, 0, NULL, "bytes",
        "with parallel: auto, what a rank may use in all; 0: the machine's memory, shared by its ranks"),
    ROW(OPT_ENUM, memory_config, recompute, "recompute", "none", 0, 0, "none|block|attention", "",
        "block: keep the outputs of the model's blocks alone, and run each again in backward; attention: of what is "
        "attention in a block the output alone"),
};
static const struct option checkpoint_rows[] = {
    ROW(OPT_STRING, checkpoint_config, url, "url", "", 0, 0, NULL, "",
        "where steps are saved: file:PATH; empty: no checkpoints"),
    ROW(OPT_STRING, checkpoint_config, resume, "resume", "newest-valid", 0, 0, NULL, "",
        "newest-valid, never, or a step number"),
    ROW(OPT_STRING, checkpoint_config, every, "every", "100", 0, 0, NULL, "",
        "between saves: steps (100), seconds (600s) or auto (Young/Daly from the measured cost and mtbf); 0: only at "
        "the end"),
    ROW(OPT_FLOAT, checkpoint_config, mtbf, "mtbf", "86400", 1e-3, 1e9, NULL, "s",
        "mean time between failures of the job, for every: auto"),
    ROW(OPT_ENUM, checkpoint_config, overlap, "overlap", "wait", 0, 0, "wait|skip|cancel", "",
        "when a save is due and the last one still runs: wait for it, skip the new one, or cancel the old one"),
    ROW(OPT_INT, checkpoint_config, keep_last, "keep_last", "3", 0, 1e6, NULL, "steps",
        "committed steps that stay; 0: all"),
    ROW(OPT_INT, checkpoint_config, keep_every, "keep_every", "0", 0, 1e12, NULL, "steps",
        "with keep_last: steps that this divides stay too; 0: none"),
    ROW(OPT_INT, checkpoint_config, keep_best, "keep_best", "0", 0, 1e6, NULL, "steps",
        "with keep_last: so many steps with the best keep_metric stay too; 0: none"),
    ROW(OPT_ENUM, checkpoint_config, reference_frozen, "reference_frozen", "auto", 0, 0, "auto|false|true", "",
        "frozen weights and tables are written once; later steps refer to the step that has them, which stays, whole; "
        "auto: if parameters are frozen (lora.targets, train.freeze)"),
    ROW(OPT_ENUM, checkpoint_config, irregular, "irregular", "default", 0, 0, "default|merge|gather", "",
        "runs that are no boxes of their tensors (ZeRO's): stored as they are, merged into boxes by messages while "
        "training goes on, or gathered before the save (to compare with)"),
    ROW(OPT_STRING, checkpoint_config, keep_metric, "keep_metric", "", 0, 0, NULL, "",
        "a step metric of metrics.jsonl, or eval/loss, eval/logps/accuracy, eval/rewards/accuracy, eval/logps/margin, "
        "eval/task/accuracy; stored with each step that has it"),
    ROW(OPT_ENUM, checkpoint_config, keep_order, "keep_order", "highest", 0, 0, "highest|lowest", "",
        "which values of keep_metric are the best"),
    ROW(OPT_ENUM, checkpoint_config, view, "view", "auto", 0, 0, "auto|always|never", "",
        "view.h5 beside each step's files: every tensor whole, for h5py and h5dump; auto: for steps of up to 20,000 "
        "pieces"),
    ROW(OPT_INT, checkpoint_config, writers, "writers", "0", 0, 64, NULL, "",
        "writer threads of a rank; 0: as many as the storage wants: 2, on S3 up to 8"),
    ROW(OPT_INT, checkpoint_config, lease_seconds, "lease_seconds", "30", 1, 86400, NULL, "s",
        "a job silent for this long is taken for dead"),
    ROW(OPT_SIZE, checkpoint_config, staging_bytes, "staging_bytes", "0", 0, 0, NULL, "bytes",
        "cap on a rank's staging memory; 0: what it writes in a save"),
    ROW(OPT_SIZE, checkpoint_config, chunk_bytes, "chunk_bytes", "16MiB", 1 << 20, 1 << 30, NULL, "bytes",
        "most that is captured and written as one"),
    ROW(OPT_BOOL, checkpoint_config, async, "async", "true", 0, 0, NULL, "", "save while training goes on"),
    ROW(OPT_BOOL, checkpoint_config, rewind, "rewind", "false", 0, 0, NULL, "",
        "allow starting below the newest step; later ones are retired"),
    ROW(OPT_BOOL, checkpoint_config, state_hash, "state_hash", "false", 0, 0, NULL, "",
        "log a hash of the whole state at every save and resume"),
    ROW(OPT_ENUM, checkpoint_config, on_error, "on_error", "warn", 0, 0, "warn|stop", "",
        "what a failed save does to training"),
};

static const struct option eval_rows[] = {
    ROW(OPT_STRING, eval_config, step, "step", "newest", 0, 0, NULL, "",
        "tessera eval: whose weights: newest, best (by checkpoint.keep_metric), or a step number"),
    ROW(OPT_STRING, eval_config, reference, "reference", "", 0, 0, NULL, "",
        "tessera eval: against whose: a step number, 0 for initial weights; empty: those the algorithm began from"),
    ROW(OPT_STRING, eval_config, pairs, "pairs", "", 0, 0, NULL, "",
        "tessera eval: JSONL file to write, a line a pair; empty: none"),
};

static const struct option_table top_table = TABLE("", top_rows), run_table = TABLE("run", run_rows),
                                 model_table = TABLE("model", model_rows), data_table = TABLE("data", data_rows),
                                 algo_table = TABLE("algo", algo_rows), train_table = TABLE("train", train_rows),
                                 parallel_table = TABLE("parallel", parallel_rows),
                                 memory_table = TABLE("memory", memory_rows),
                                 checkpoint_table = TABLE("checkpoint", checkpoint_rows),
                                 eval_table = TABLE("eval", eval_rows);

/* A section's rows and the struct they fill. "algo" has two: the common one and the algorithm's own. */
struct section {
    const struct option_table *table;
    void *base;
    const char *chosen_by; /* "" or the kind that brings it, for messages */
};
enum { MAX_SECTIONS = 16, MAX_SEEN = 256, LIST_BYTES = 4000 /* config_text keeps a little more of a value */ };

struct sections {
    struct section s[MAX_SECTIONS];
    int count;
};

static void add_section(struct sections *all, const struct option_table *t, void *base)
{
    if (t)
        all->s[all->count++] = (struct section){ t, base, "" };
}

static struct sections sections_of(struct config *c)
{
    struct sections all = { .count = 0 };
    add_section(&all, &top_table, &c->top);
    add_section(&all, &run_table, &c->run);
    add_section(&all, &model_table, &c->model_choice);
    add_section(&all, c->model_ops ? c->model_ops->options : NULL, c->model);
    add_section(&all, &lora_options, &c->lora);
    add_section(&all, &data_table, &c->data);
    add_section(&all, &algo_table, &c->algo);
    add_section(&all, c->algo_ops ? c->algo_ops->options : NULL, c->algo_own);
    add_section(&all, &train_table, &c->train);
    add_section(&all, &optim_options, &c->optim);
    add_section(&all, &parallel_table, &c->parallel);
    add_section(&all, &memory_table, &c->memory);
    add_section(&all, &checkpoint_table, &c->checkpoint);
    add_section(&all, &eval_table, &c->eval);
    return all;
}

/* One parsed assignment and where it came from. */
struct assignment {
    char section[64], key[64];
    const char *value; /* owned by the YAML document or the command line, or `list` */
    char *list;        /* of a YAML list: its words with commas between */
    char where[256];
};
struct assignments {
    struct assignment *a;
    size_t count, cap;
};

static status *assign(struct assignments *l, const char *section, const char *key, const char *value, const char *where,
                      bool replace)
{
    struct assignment n = { .value = value };
    if (snprintf(n.section, sizeof n.section, "%s", section) >= (int)sizeof n.section ||
        snprintf(n.key, sizeof n.key, "%s", key) >= (int)sizeof n.key)
        return ERR(INVALID, "%s: key \"%.80s\" is too long", where, key);
    snprintf(n.where, sizeof n.where, "%s", where);
    for (size_t i = 0; i < l->count; i++) {
        struct assignment *old = &l->a[i];
        if (strcmp(old->section, section) || strcmp(old->key, key))
            continue;
        if (!replace)
            return ERR(INVALID, "%s: key %s%s%s was set before, at %s", where, section, *section ? "." : "", key,
                       old->where);
        mem_free(old->list);
        *old = n;
        return NULL;
    }
    if (l->count == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        struct assignment *a = mem_array(l->a, cap, sizeof *a);
        if (!a)
            return ERR(NO_MEMORY, "%s: configuration", where);
        l->a = a;
        l->cap = cap;
    }
    l->a[l->count++] = n;
    return NULL;
}

/* YAML's ways to write nothing mean an empty value here. */
static const char *scalar_text(const yaml_node_t *n)
{
    const char *s = (const char *)n->data.scalar.value;
    bool plain = n->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    return plain && (!strcmp(s, "~") || !strcmp(s, "null")) ? "" : s;
}

/* The words of a list with commas between; the caller frees them. */
static status *list_text(yaml_document_t *doc, const yaml_node_t *list, const char *where, const char *key, char **out)
{
    size_t bytes = 1, n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (const yaml_node_item_t *i = list->data.sequence.items.start; i < list->data.sequence.items.top; i++) {
            const yaml_node_t *word = yaml_document_get_node(doc, *i);
            if (word->type != YAML_SCALAR_NODE)
                return ERR(INVALID, "%s: %s: a list here has single values", where, key);
            if (pass)
                n += (size_t)snprintf(*out + n, bytes - n, "%s%s", n ? "," : "", scalar_text(word));
            else
                bytes += strlen(scalar_text(word)) + 1;
        }
        if (bytes > LIST_BYTES)
            return ERR(INVALID, "%s: %s: a list of more than %d bytes", where, key, LIST_BYTES);
        if (!pass && !(*out = mem_calloc(bytes, 1)))
            return ERR(NO_MEMORY, "%s: %s", where, key);
    }
    return NULL;
}

static status *assign_list(yaml_document_t *doc, const yaml_node_t *list, const char *section, const char *key,
                           const char *where, struct assignments *out)
{
    char *text = NULL;
    TRY(list_text(doc, list, where, key, &text));
    status *st = assign(out, section, key, text, where, false);
    if (st)
        mem_free(text);
    else
        out->a[out->count - 1].list = text;
    return st;
}

/* parallel: auto, where a section is expected. */
static bool says_auto(const char *section, const char *key, const char *value)
{
    return !*section && !strcmp(key, "parallel") && !strcmp(value, "auto");
}

static status *walk_section(yaml_document_t *doc, const yaml_node_t *map, const char *section, const char *name,
                            struct assignments *out)
{
    for (const yaml_node_pair_t *p = map->data.mapping.pairs.start; p < map->data.mapping.pairs.top; p++) {
        const yaml_node_t *k = yaml_document_get_node(doc, p->key), *v = yaml_document_get_node(doc, p->value);
        char where[256];
        snprintf(where, sizeof where, "%.200s:%zu", name, k->start_mark.line + 1);
        if (k->type != YAML_SCALAR_NODE)
            return ERR(INVALID, "%s: a key must be a word", where);
        const char *key = (const char *)k->data.scalar.value;
        if (v->type == YAML_SCALAR_NODE && says_auto(section, key, scalar_text(v)))
            TRY(assign(out, "parallel", "auto", "true", where, false));
        else if (v->type == YAML_SCALAR_NODE)
            TRY(assign(out, section, key, scalar_text(v), where, false));
        else if (v->type == YAML_MAPPING_NODE && !*section)
            TRY(walk_section(doc, v, key, name, out));
        else if (v->type == YAML_SEQUENCE_NODE)
            TRY(assign_list(doc, v, section, key, where, out));
        else
            return ERR(INVALID, "%s: %s%s%s must have a single value, not a section", where, section,
                       *section ? "." : "", key);
    }
    return NULL;
}

static status *read_yaml(const char *text, size_t bytes, const char *name, yaml_document_t *doc)
{
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser))
        return ERR(NO_MEMORY, "%s: YAML parser", name);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, bytes);
    status *st = NULL;
    if (!yaml_parser_load(&parser, doc))
        st = ERR(INVALID, "%s:%zu: not YAML: %s", name, parser.problem_mark.line + 1,
                 parser.problem ? parser.problem : "unreadable");
    yaml_parser_delete(&parser);
    return st;
}

static const char *value_of(const struct assignments *l, const char *section, const char *key, const char **where)
{
    for (size_t i = 0; i < l->count; i++)
        if (!strcmp(l->a[i].section, section) && !strcmp(l->a[i].key, key)) {
            *where = l->a[i].where;
            return l->a[i].value;
        }
    return NULL;
}

/* The kinds decide which rows exist, so they are looked up first. */
static status *choose_kinds(struct config *c, const struct assignments *l, const char *name)
{
    const char *where = name, *kind = value_of(l, "model", "kind", &where);
    if (!kind)
        return ERR(INVALID, "%s: key model.kind is required", name);
    status *st = model_lookup(kind, &c->model_ops);
    if (st)
        return status_wrap(st, "%s: model.kind", where);
    kind = value_of(l, "algo", "kind", &where);
    if (!kind)
        return ERR(INVALID, "%s: key algo.kind is required", name);
    st = algo_lookup(kind, &c->algo_ops);
    if (st)
        return status_wrap(st, "%s: algo.kind", where);
    c->model = mem_calloc(1, c->model_ops->config_bytes);
    c->algo_own = mem_calloc(1, c->algo_ops->config_bytes);
    return c->model && c->algo_own ? NULL : ERR(NO_MEMORY, "%s: configuration", name);
}

static status *apply_one(struct sections *all, const struct assignment *a)
{
    const struct section *owner = NULL;
    char known[256] = "";
    for (int i = 0; i < all->count; i++) {
        const struct section *s = &all->s[i];
        size_t n = strlen(known);
        if (*s->table->section && !strstr(known, s->table->section))
            snprintf(known + n, sizeof known - n, "%s%s", n ? ", " : "", s->table->section);
        if (strcmp(s->table->section, a->section))
            continue;
        if (!owner || options_find(s->table, a->key))
            owner = s;
    }
    const struct option *row = owner && a->list ? options_find(owner->table, a->key) : NULL;
    if (row && row->type != OPT_LIST)
        return ERR(INVALID, "%s: %s%s%s must have a single value, not a list", a->where, a->section,
                   *a->section ? "." : "", a->key);
    if (!owner)
        return ERR(INVALID, "%s: unknown section \"%s\" (legal: %s)", a->where, a->section, known);
    return options_set(owner->table, a->key, a->value, owner->base, a->where);
}

/* Apply the settings of the preset that is asked for, as if they stood before all others. */
static status *apply_preset(struct sections *all, const struct algo_ops *algo, const struct assignments *l)
{
    const char *where = "", *name = value_of(l, "algo", "preset", &where);
    char legal[512] = "", value[64];
    struct assignment a = { .section = "algo", .value = value };
    if (!name || !*name)
        return NULL;
    const struct algo_preset *p = algo->presets;
    for (size_t n = 0; p && p->name && strcmp(p->name, name); p++)
        n += (size_t)snprintf(legal + n, sizeof legal - n, "%s%s", n ? ", " : "", p->name);
    if (!p || !p->name)
        return ERR(INVALID, "%s: algo.preset: algo.kind %s has no preset \"%s\" (legal: %s)", where, algo->name, name,
                   p ? legal : "none");
    snprintf(a.where, sizeof a.where, "%.100s: algo.preset %s", where, name);
    int used;
    for (const char *at = p->settings; sscanf(at, " %63[^=]=%63s%n", a.key, value, &used) == 2; at += used)
        TRY(apply_one(all, &a));
    return NULL;
}

/* Keys that say what tensors a model has: where a config says otherwise than config.json, one of them is wrong. */
static bool shapes_tensors(const char *key)
{
    static const char *const keys[] = { "kind",
                                        "layers",
                                        "hidden",
                                        "heads",
                                        "kv_heads",
                                        "head_dim",
                                        "ffn",
                                        "vocab",
                                        "qk_norm",
                                        "qkv_bias",
                                        "experts",
                                        "shared_experts",
                                        "expert_ffn",
                                        "router_bias",
                                        "first_dense",
                                        "sparse_step",
                                        "dense_layers",
                                        "kv_lora_rank",
                                        "q_lora_rank",
                                        "qk_nope_head_dim",
                                        "qk_rope_head_dim",
                                        "v_head_dim" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!strcmp(key, keys[i]))
            return true;
    return false;
}

/* Take what config.json of model.init_from says as if it were set here; what is set here stays. */
static status *take_init_from(struct assignments *l, struct hf_config *hf)
{
    const char *where = "", *folder = value_of(l, "model", "init_from", &where);
    char from[256];
    *hf = (struct hf_config){ .count = 0 };
    if (!folder || !*folder)
        return NULL;
    status *st = hf_config_read(folder, hf);
    if (st)
        return status_wrap(st, "%s: model.init_from", where);
    snprintf(from, sizeof from, "%.200s/config.json", folder);
    for (int i = 0; i < hf->count; i++) {
        const char *key = hf->set[i].key, *theirs = hf->set[i].value, *ours = value_of(l, "model", key, &where);
        if (!ours)
            TRY(assign(l, "model", key, theirs, from, false));
        else if (shapes_tensors(key) && strcmp(ours, theirs))
            return ERR(INVALID, "%s: model.%s: %.60s, but %s in %s (leave it out to take that)", where, key, ours,
                       theirs, from);
    }
    return NULL;
}

/* The keys of section lora say how the layers of its targets are adapted, and `base` is what is left without. */
static status *check_lora(const struct config *c, const struct assignments *l, const char *name)
{
    bool base = c->algo.reference == REFERENCE_BASE;
    const char *where, *targets = value_of(l, "lora", "targets", &where);
    for (size_t i = 0; i < l->count && !targets; i++)
        if (!strcmp(l->a[i].section, "lora"))
            return ERR(INVALID, "%s: lora.%s needs lora.targets: the layers that get adapters, [\"*.q_proj\", ...]",
                       l->a[i].where, l->a[i].key);
    if (base && !*c->lora.targets)
        return ERR(INVALID, "%s: algo.reference: base needs lora.targets: it is the model without adapters", name);
    if (base && c->algo.warmup_sft_steps)
        return ERR(INVALID,
                   "%s: algo.reference: base is not what algo.warmup_sft_steps leaves, which train the adapters too: "
                   "use precomputed or live, or export the SFT model and start from it (model.init_from)",
                   name);
    return NULL;
}

static status *check_required(const struct sections *all, const struct assignments *l, const char *name)
{
    for (int i = 0; i < all->count; i++) {
        const struct option_table *t = all->s[i].table;
        for (size_t r = 0; r < t->count; r++) {
            const char *where;
            if (!t->rows[r].def && !value_of(l, t->section, t->rows[r].key, &where))
                return ERR(INVALID, "%s: key %s%s%s is required: %s", name, t->section, *t->section ? "." : "",
                           t->rows[r].key, t->rows[r].help);
        }
    }
    return NULL;
}

static status *check_keep(const struct config *c, const char *name)
{
    enum { TASK = 4 };
    static const char *const evaluated[] = { "eval/loss", "eval/logps/accuracy", "eval/rewards/accuracy",
                                             "eval/logps/margin", "eval/task/accuracy" };
    const struct checkpoint_config *k = &c->checkpoint;
    const struct algo_ops *a = c->algo_ops;
    if (k->keep_last == 0 && (k->keep_every || k->keep_best))
        return ERR(INVALID, "%s: checkpoint.keep_last 0 keeps every step: keep_every and keep_best want another", name);
    if (!*k->keep_metric)
        return k->keep_best ? ERR(INVALID, "%s: checkpoint.keep_best needs checkpoint.keep_metric", name) : NULL;
    char legal[512] = "";
    for (size_t i = 0; i < sizeof evaluated / sizeof *evaluated; i++)
        if (!strcmp(k->keep_metric, evaluated[i]))
            return *(i == TASK ? c->data.tasks : c->data.heldout)
                       ? NULL
                       : ERR(INVALID, "%s: checkpoint.keep_metric: %s needs data.%s", name, k->keep_metric,
                             i == TASK ? "tasks" : "heldout");
    for (int i = 0; i < a->metric_count; i++) {
        if (!strcmp(k->keep_metric, a->metrics[i].name))
            return NULL;
        size_t n = strlen(legal);
        snprintf(legal + n, sizeof legal - n, "%s, ", a->metrics[i].name);
    }
    return ERR(INVALID, "%s: checkpoint.keep_metric: \"%s\" is not one of %s%s, %s, %s, %s, %s", name, k->keep_metric,
               legal, evaluated[0], evaluated[1], evaluated[2], evaluated[3], evaluated[TASK]);
}

/* What single rows cannot say. */
static status *check_together(struct config *c, const char *name)
{
    const struct train_config *t = &c->train;
    if (c->top.comm == TRANSPORT_NCCL && c->top.device == DEVICE_CPU)
        return ERR(INVALID, "%s: comm: nccl moves the memory of GPUs: it needs device: cuda (with device: cpu: mpi)",
                   name);
    if (t->global_batch % t->micro_batch)
        return ERR(INVALID, "%s: train.micro_batch %lld does not divide train.global_batch %lld", name,
                   (long long)t->micro_batch, (long long)t->global_batch);
    if (t->lanes & (t->lanes - 1))
        return ERR(INVALID, "%s: train.lanes must be a power of two (1, 2, 4, ... 64), not %lld", name,
                   (long long)t->lanes);
    bool sft = c->algo_ops->data == DATASET_SFT;
    if (sft && c->algo.warmup_sft_steps)
        return ERR(INVALID, "%s: algo.warmup_sft_steps is for algorithms other than sft", name);
    if (c->algo.warmup_sft_steps >= t->steps)
        return ERR(INVALID, "%s: algo.warmup_sft_steps %lld leaves no step of train.steps %lld to %s", name,
                   (long long)c->algo.warmup_sft_steps, (long long)t->steps, c->algo_ops->name);
    if ((sft || c->algo.warmup_sft_steps) && !*c->data.sft)
        return ERR(INVALID, "%s: data.sft is required: a JSONL file of prompt/completion or messages rows", name);
    if (c->algo_ops->data == DATASET_LABELLED && !*c->data.labelled)
        return ERR(INVALID, "%s: data.labelled is required: a JSONL file of prompt/completion/label rows", name);
    if (c->algo_ops->data == DATASET_PREFS && !*c->data.prefs)
        return ERR(INVALID, "%s: data.prefs is required: a JSONL file of prompt/chosen/rejected rows", name);
    if (t->param_rounding == ROUNDING_STOCHASTIC && t->param_dtype != TRAIN_BF16)
        return ERR(INVALID, "%s: train.param_rounding: stochastic needs train.param_dtype: bf16", name);
    if (c->parallel.pp == 1 && *c->parallel.stages)
        return ERR(INVALID, "%s: parallel.stages: \"%.100s\" needs parallel.pp above 1", name, c->parallel.stages);
    if (c->parallel.schedule != PIPE_INTERLEAVED && c->parallel.chunks > 1)
        return ERR(INVALID, "%s: parallel.chunks: %lld needs parallel.schedule: interleaved (legal without: 0 or 1)",
                   name, (long long)c->parallel.chunks);
    if (c->algo.ref_sync_steps && c->algo.reference != REFERENCE_LIVE)
        return ERR(INVALID, "%s: algo.ref_sync_steps needs algo.reference: live", name);
    if (!period_parse(c->checkpoint.every, &c->checkpoint.period))
        return ERR(INVALID,
                   "%s: checkpoint.every: \"%s\" is not one of a number of steps (100), of seconds (600s), or auto",
                   name, c->checkpoint.every);
    TRY(check_keep(c, name));
    if (t->max_seconds > 0 && !*c->checkpoint.url)
        return ERR(INVALID, "%s: train.max_seconds needs checkpoint.url: it saves before it stops", name);
    const char *resume = c->checkpoint.resume;
    if (strcmp(resume, "newest-valid") && strcmp(resume, "never") && (!*resume || resume[strspn(resume, "0123456789")]))
        return ERR(INVALID, "%s: checkpoint.resume: \"%s\" is not one of newest-valid, never, or a step number", name,
                   resume);
    status *st = c->model_ops->check ? c->model_ops->check(c->model) : NULL;
    if (!st && c->algo_ops->check)
        st = c->algo_ops->check(c->algo_own);
    return st ? status_wrap(st, "%s", name) : NULL;
}

static status *collect(yaml_document_t *doc, const char *name, int overrides, char **override, struct assignments *l)
{
    const yaml_node_t *root = yaml_document_get_root_node(doc);
    if (!root || root->type != YAML_MAPPING_NODE)
        return ERR(INVALID, "%s: a config is a mapping of sections (run:, model:, ...)", name);
    TRY(walk_section(doc, root, "", name, l));
    for (int i = 0; i < overrides; i++) {
        const char *eq = strchr(override[i], '='), *dot = strchr(override[i], '.');
        if (!eq || eq == override[i])
            return ERR(INVALID, "command line: \"%s\" is not key=value", override[i]);
        char section[64] = "", key[64];
        const char *k = override[i];
        if (dot && dot < eq) {
            snprintf(section, sizeof section, "%.*s", (int)(dot - k), k);
            k = dot + 1;
        }
        snprintf(key, sizeof key, "%.*s", (int)(eq - k), k);
        if (says_auto(section, key, eq + 1))
            TRY(assign(l, "parallel", "auto", "true", "command line", true));
        else
            TRY(assign(l, section, key, eq + 1, "command line", true));
    }
    return NULL;
}

/* What parallel: auto leaves as it is. */
static void note_fixed(struct config *c, const struct assignments *l)
{
    static const struct {
        const char *section, *key;
        unsigned bit;
    } keys[] = { { "parallel", "pp", FIXED_PP },
                 { "parallel", "dp", FIXED_DP },
                 { "parallel", "tp", FIXED_TP },
                 { "parallel", "zero", FIXED_ZERO },
                 { "parallel", "sequence", FIXED_SEQUENCE },
                 { "memory", "recompute", FIXED_RECOMPUTE } };
    const char *where;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (value_of(l, keys[i].section, keys[i].key, &where))
            c->parallel.fixed |= keys[i].bit;
}

static status *fill(struct config *c, struct assignments *l, const char *name)
{
    struct hf_config hf;
    TRY(take_init_from(l, &hf));
    TRY(choose_kinds(c, l, name));
    struct sections all = sections_of(c);
    for (int i = 0; i < all.count; i++)
        TRY(options_defaults(all.s[i].table, all.s[i].base));
    TRY(apply_preset(&all, c->algo_ops, l));
    for (size_t i = 0; i < l->count; i++)
        TRY(apply_one(&all, &l->a[i]));
    TRY(check_required(&all, l, name));
    if (!*c->run.dir) {
        char dir[512];
        snprintf(dir, sizeof dir, "runs/%s", c->run.name);
        TRY(options_set(&run_table, "dir", dir, &c->run, name));
    }
    TRY(check_lora(c, l, name));
    note_fixed(c, l);
    return check_together(c, name);
}

status *config_parse(const char *text, size_t bytes, const char *name, int overrides, char **override,
                     struct config **out)
{
    yaml_document_t doc;
    TRY(read_yaml(text, bytes, name, &doc));
    struct config *c = mem_calloc(1, sizeof *c);
    struct assignments l = { 0 };
    status *st = c ? NULL : ERR(NO_MEMORY, "%s: configuration", name);
    if (!st)
        st = collect(&doc, name, overrides, override, &l);
    if (!st)
        st = fill(c, &l, name);
    for (size_t i = 0; i < l.count; i++)
        mem_free(l.a[i].list);
    mem_free(l.a);
    yaml_document_delete(&doc);
    if (st) {
        config_free(c);
        return st;
    }
    *out = c;
    return NULL;
}

enum { MAX_CONFIG_BYTES = 1 << 20 };

static status *read_file(const char *path, char **text, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return ERR(NOT_FOUND, "config %s: %m", path);
    char *buf = mem_alloc(MAX_CONFIG_BYTES + 1);
    size_t n = buf ? fread(buf, 1, MAX_CONFIG_BYTES + 1, f) : 0;
    bool bad = ferror(f);
    fclose(f);
    if (buf && !bad && n <= MAX_CONFIG_BYTES) {
        *text = buf;
        *bytes = n;
        return NULL;
    }
    mem_free(buf);
    return buf ? ERR(INVALID, "config %s: %s", path, bad ? "cannot be read (a folder?)" : "larger than 1 MiB")
               : ERR(NO_MEMORY, "config %s", path);
}

status *config_load(struct comm *world, const char *path, int overrides, char **override, struct config **out)
{
    char *text = NULL;
    size_t bytes = 0;
    TRY(comm_agree(world, world->rank == 0 ? read_file(path, &text, &bytes) : NULL));
    void *buf = text;
    TRY(comm_bcast_bytes(world, &buf, &bytes, 0));
    struct config *c = NULL;
    status *st = comm_agree(world, config_parse(buf, bytes, path, overrides, override, &c));
    mem_free(buf);
    if (st)
        config_free(c);
    else
        *out = c;
    return st;
}

void config_free(struct config *c)
{
    if (!c)
        return;
    struct sections all = sections_of(c);
    for (int i = 0; i < all.count; i++)
        if (all.s[i].base)
            options_fini(all.s[i].table, all.s[i].base);
    mem_free(c->model);
    mem_free(c->algo_own);
    mem_free(c);
}

status *config_text(const struct config *c, char **out)
{
    struct sections all = sections_of((struct config *)(size_t)c);
    size_t cap = 64 << 10, n = 0;
    char *text = mem_alloc(cap);
    if (!text)
        return ERR(NO_MEMORY, "configuration text");
    for (int i = 0; i < all.count; i++)
        for (size_t r = 0; r < all.s[i].table->count && n < cap; r++) {
            const struct option_table *t = all.s[i].table;
            char value[4096];
            options_get(t, t->rows[r].key, all.s[i].base, value, sizeof value);
            n += (size_t)snprintf(text + n, cap - n, "%s%s%s=%s\n", t->section, *t->section ? "." : "", t->rows[r].key,
                                  value);
        }
    if (n >= cap) {
        mem_free(text);
        return ERR(INVALID, "the configuration is longer than 64 KiB");
    }
    *out = text;
    return NULL;
}

/* Keys that define numeric state: another value would go on with another run. */
static bool defines_state(const char *key)
{
    static const char *const exact[] = {
        "run.seed",           "data.sft",      "data.prefs",     "data.labelled",
        "data.max_length",    "algo.kind",     "algo.reference", "algo.warmup_sft_steps",
        "train.global_batch", "algo.ld_alpha", "train.freeze",   "optim.kind"
    };
    for (size_t i = 0; i < sizeof exact / sizeof exact[0]; i++)
        if (!strcmp(key, exact[i]))
            return true;
    return !strncmp(key, "lora.", 5) || !strcmp(key, "optim.muon") ||
           (!strncmp(key, "model.", 6) && strcmp(key, "model.init_from") != 0);
}

/* Where a text's key ends the run, it is not news. */
static bool is_place(const char *key)
{
    return !strncmp(key, "checkpoint.", 11) || !strncmp(key, "run.", 4) || !strncmp(key, "eval.", 5) ||
           !strcmp(key, "threads") || !strcmp(key, "debug") || !strcmp(key, "parallel.progress") ||
           !strcmp(key, "train.max_seconds");
}

static const char *find_line(const char *text, const char *key, size_t key_len, size_t *value_len)
{
    for (const char *p = text; p && *p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL)
        if (!strncmp(p, key, key_len) && p[key_len] == '=') {
            *value_len = strcspn(p + key_len + 1, "\n");
            return p + key_len + 1;
        }
    return NULL;
}

status *config_compare(const struct config *c, const char *stored, char *note, size_t note_bytes)
{
    char *now;
    TRY(config_text(c, &now));
    char refused[768] = "";
    *note = 0;
    for (const char *p = now; *p;) {
        size_t line = strcspn(p, "\n"), key_len = strcspn(p, "="), old_len = 0, new_len = line - key_len - 1;
        const char *old = find_line(stored, p, key_len, &old_len);
        char key[128];
        snprintf(key, sizeof key, "%.*s", (int)key_len, p);
        bool differs = old && (old_len != new_len || memcmp(old, p + key_len + 1, new_len) != 0);
        if (differs && (defines_state(key) || !is_place(key))) {
            char *to = defines_state(key) ? refused : note;
            size_t size = defines_state(key) ? sizeof refused : note_bytes, n = strlen(to);
            snprintf(to + n, size - n, "%s%s: %.*s -> %.*s", n ? "; " : "", key, (int)old_len, old, (int)new_len,
                     p + key_len + 1);
        }
        p += line + (p[line] == '\n');
    }
    mem_free(now);
    return *refused ? ERR(INVALID, "the checkpoint was written by another run (stored -> now): %s", refused) : NULL;
}

static void help_presets(const struct algo_ops *algo, FILE *to)
{
    fprintf(to, "# presets of algo.kind: %s\n", algo->name);
    for (const struct algo_preset *p = algo->presets; p && p->name; p++)
        fprintf(to, "#   algo.preset=%-18s %s  (%s)\n", p->name, p->settings, p->source);
}

void config_help(FILE *to)
{
    static const struct option_table *const common[] = { &top_table,    &run_table,        &data_table,
                                                         &model_table,  &lora_options,     &algo_table,
                                                         &train_table,  &optim_options,    &parallel_table,
                                                         &memory_table, &checkpoint_table, &eval_table };
    for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
        options_help(common[i], to);
    for (int i = 0; model_registry[i]; i++) {
        fprintf(to, "\n# with model.kind: %s\n", model_registry[i]->name);
        options_help(model_registry[i]->options, to);
    }
    for (int i = 0; algo_registry[i]; i++)
        if (algo_registry[i]->options) {
            fprintf(to, "\n# with algo.kind: %s\n", algo_registry[i]->name);
            options_help(algo_registry[i]->options, to);
            help_presets(algo_registry[i], to);
        }
}
