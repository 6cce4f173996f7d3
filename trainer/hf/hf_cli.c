/* hf_cli: export reads a step in runs of at most CHUNK_BYTES and appends them to the files, so a model need not fit in
 * memory. Import maps the files: what is saved is copied from the mapping a chunk at a time, and the kernel drops pages
 * as it needs. */
#include "trainer/hf/hf_cli.h"

#include "ckpt/cast.h"
#include "ckpt/ckpt.h"
#include "ckpt/cli.h"
#include "comm/base/mem.h"
#include "trainer/hf/hf_config.h"
#include "trainer/hf/hf_load.h"
#include "trainer/hf/hf_lora.h"
#include "trainer/model/lora.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHUNK_BYTES = 64 << 20, WORDS = 3 };
static const uint64_t shard_bytes_default = 5000000000u; /* that of transformers */

struct words {
    const char *word[WORDS];
    int count;
    enum dtype dtype; /* NONE: as stored */
    uint64_t shard_bytes;
    bool adapter; /* export it alone */
};

static const char usage_export[] = "URL [STEP] FOLDER [--dtype=bf16|f16|f32|f64] [--shard-bytes=N] [--adapter]",
                  usage_import[] = "FOLDER URL [STEP]";

static bool is_float(enum dtype t)
{
    return t == DTYPE_F64 || t == DTYPE_F32 || t == DTYPE_F16 || t == DTYPE_BF16;
}

static status *take_words(int argc, char **argv, const char *usage, struct words *w)
{
    bool exports = !strcmp(argv[0], "export");
    *w = (struct words){ .shard_bytes = shard_bytes_default };
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (exports && !strncmp(a, "--dtype=", 8)) {
            w->dtype = dtype_parse(a + 8);
            if (!is_float(w->dtype))
                return ERR(INVALID, "ckpt export: --dtype wants bf16, f16, f32 or f64, not \"%s\"", a + 8);
        } else if (exports && !strncmp(a, "--shard-bytes=", 14)) {
            TRY(status_wrap(cli_step(a + 14, &w->shard_bytes), "ckpt export: --shard-bytes"));
        } else if (exports && !strcmp(a, "--adapter")) {
            w->adapter = true;
        } else if (a[0] == '-') {
            return ERR(INVALID, "ckpt %s: no option \"%s\"; it takes %s", argv[0], a, usage);
        } else if (w->count == WORDS) {
            return ERR(INVALID, "ckpt %s: one argument too many: \"%s\"; it takes %s", argv[0], a, usage);
        } else {
            w->word[w->count++] = a;
        }
    }
    return w->count >= 2 ? NULL : ERR(INVALID, "ckpt %s takes %s", argv[0], usage);
}

/* ---- export ---- */

struct export
{
    tessera *t;
    uint64_t step, count;
    struct safetensors_spec *list; /* names are ours, the texts too */
    uint64_t experts;              /* of tensors that are written one an expert */
    struct safetensors_writer *w;
    unsigned char *buf;
    char *config;              /* of the step, as stored; "" if it has none */
    const char *part;          /* "model", or "adapter": then names in the list begin with peft's prefix */
    struct hf_adapter adapter; /* of the tensor that is being merged */
};

static const char part_model[] = "model", part_adapter[] = "adapter";

static const char *prefix_of(const struct export *e)
{
    return e->part == part_adapter ? HF_ADAPTER_PREFIX : "";
}

static status *open_root(struct export *e, const struct words *w)
{
    struct tessera_options o = TESSERA_OPTIONS;
    uint64_t at_most = TESSERA_NEWEST, in_url;
    char *url = mem_strdup(w->word[0]);
    if (!url)
        return ERR(NO_MEMORY, "ckpt export");
    bool cut = cli_cut_step(url, &in_url), given = w->count == WORDS;
    status *st = given ? cli_step(w->word[1], &at_most) : NULL;
    if (!st && cut && given && at_most != in_url)
        st =
            ERR(INVALID, "ckpt export: the URL names step %" PRIu64 " and the argument step %" PRIu64, in_url, at_most);
    if (!st && cut)
        at_most = in_url;
    o.url = url;
    o.mpi_comm = -1;
    o.read_only = 1;
    if (!st)
        st = tessera_open(&o, &e->t);
    if (!st)
        st = tessera_find(e->t, at_most, &e->step);
    if (!st && (cut || given) && e->step != at_most)
        st = ERR(NOT_FOUND, "%s holds no valid step %" PRIu64, url, at_most);
    mem_free(url);
    return st;
}

/* A stored tensor, or expert number `expert` of it, is to be written. */
static status *list_one(struct export *e, const struct tessera_tensor *d, uint64_t expert, enum dtype dtype)
{
    bool one = d->ndim == 3;
    char theirs[PARAM_NAME_BYTES];
    struct safetensors_spec *t = &e->list[e->count];
    t->dtype = dtype != DTYPE_NONE && is_float((enum dtype)d->dtype) ? dtype : (enum dtype)d->dtype;
    t->shape.ndim = one ? 2 : d->ndim;
    for (int k = 0; k < t->shape.ndim; k++)
        t->shape.dim[k] = d->shape[one ? k + 1 : k];
    if (one)
        hf_name(d->name, expert, theirs);
    const char *given = one ? theirs : d->name;
    size_t bytes = strlen(prefix_of(e)) + strlen(given) + 1;
    char *name = mem_alloc(bytes);
    if (!name)
        return ERR(NO_MEMORY, "the name of a tensor");
    snprintf(name, bytes, "%s%s", prefix_of(e), given);
    t->name = name;
    e->count++;
    return NULL;
}

/* Tensors of the file that tensor i of the step makes: none of another part or of a tied name. */
static status *count_of(const struct export *e, uint64_t i, struct tessera_tensor *d, uint64_t *n)
{
    *d = (struct tessera_tensor)TESSERA_TENSOR;
    TRY(tessera_stored_at(e->t, i, d));
    *n = strcmp(d->part, e->part) || d->alias_of ? 0 : d->ndim == 3 ? d->shape[0] : 1;
    return NULL;
}

/* The tensors of the part; tied names are one tensor, as transformers has them, and experts one each. */
static status *list_model(struct export *e, enum dtype dtype)
{
    struct tessera_step s = { .size = sizeof s };
    struct tessera_tensor d;
    uint64_t all = 0, n;
    TRY(tessera_get_step(e->t, &s));
    for (uint64_t i = 0; i < s.tensors; i++) {
        TRY(count_of(e, i, &d, &n));
        if (n && d.ndim == 3)
            e->experts = n;
        all += n;
    }
    e->list = mem_calloc(all + 1, sizeof *e->list);
    if (!e->list)
        return ERR(NO_MEMORY, "a list of %" PRIu64 " tensors", all);
    for (uint64_t i = 0; i < s.tensors; i++) {
        TRY(count_of(e, i, &d, &n));
        for (uint64_t k = 0; k < n; k++)
            TRY(list_one(e, &d, k, dtype));
    }
    return e->count ? NULL : ERR(INVALID, "step %" PRIu64 " has no tensors in part %s", e->step, e->part);
}

static status *take_config(struct export *e)
{
    const void *data;
    size_t n;
    TRY(status_wrap(tessera_blob(e->t, "extra", "config", -1, &data, &n), "the step has no stored configuration"));
    e->config = mem_alloc(n + 1);
    if (!e->config)
        return ERR(NO_MEMORY, "a stored configuration of %zu bytes", n);
    memcpy(e->config, data, n);
    e->config[n] = 0;
    return NULL;
}

static status *make_config(const struct export *e, char **json)
{
    struct hf_config c;
    if (e->part == part_adapter)
        return hf_adapter_json(e->t, e->config, json);
    TRY(hf_config_stored(e->config, &c));
    for (uint64_t i = 0; i < e->count; i++)
        if (strcmp(e->list[i].name, "model.embed_tokens.weight") == 0)
            hf_config_vocab(&c, e->list[i].shape.dim[0]);
    const char *dtype = e->list[0].dtype == DTYPE_BF16  ? "BF16"
                        : e->list[0].dtype == DTYPE_F16 ? "F16"
                        : e->list[0].dtype == DTYPE_F64 ? "F64"
                                                        : "F32";
    return hf_config_json(&c, dtype, json);
}

static status *add_run(const struct export *e, tessera_state *s, const struct safetensors_spec *t, enum dtype dtype,
                       uint64_t begin, uint64_t end, void *to)
{
    char ours[PARAM_NAME_BYTES];
    int64_t expert = e->experts ? hf_expert(t->name + strlen(prefix_of(e)), ours) : -1;
    const char *name = expert < 0 ? t->name + strlen(prefix_of(e)) : ours;
    struct tessera_tensor d = hf_part(name, dtype, &t->shape, expert, e->experts);
    d.part = e->part;
    d.run_begin = begin;
    d.run_end = end;
    d.data = to;
    return tessera_state_add_tensor(s, &d);
}

static status *load_runs(const struct export *e, tessera_state *s)
{
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    o.allow = TESSERA_ALLOW_UNEXPECTED | TESSERA_ALLOW_CAST;
    return tessera_load_parts(e->t, s, e->step, &o);
}

/* The next elements of a tensor that has an adapter: both are added as f32, then rounded to the file's type. */
static status *export_merged(struct export *e, const struct safetensors_spec *t, uint64_t *from, uint64_t elems)
{
    enum { MOST = CHUNK_BYTES / (sizeof(float) + sizeof(double)) };
    uint64_t n = elems - *from < MOST ? elems - *from : MOST;
    float *w = (float *)(void *)e->buf;
    void *out = w + n;
    tessera_state *s = NULL;
    if (!e->adapter.a)
        TRY(hf_adapter_load(e->t, e->step, t->name, e->config, &e->adapter));
    TRY(tessera_state_new(e->t, &s));
    status *st = add_run(e, s, t, DTYPE_F32, *from, *from + n, w);
    if (!st)
        st = load_runs(e, s);
    tessera_state_free(s);
    TRY(st);
    lora_merge(w, *from, n, e->adapter.k, e->adapter.a, e->adapter.b, e->adapter.rank, e->adapter.scale);
    cast_elems(DTYPE_F32, t->dtype, w, out, n);
    *from += n;
    if (*from == elems)
        hf_adapter_free(&e->adapter);
    return safetensors_append(e->w, out, n * dtype_bytes(t->dtype));
}

/* The next chunk: tensors from *at on, *from elements of the first being done. They lie in buf as in the file: larger
 * elements first, so each at a multiple of its own. */
static status *export_chunk(struct export *e, uint64_t *at, uint64_t *from)
{
    size_t used = 0;
    tessera_state *s = NULL;
    status *st = tessera_state_new(e->t, &s);
    while (!st && *at < e->count) {
        const struct safetensors_spec *t = &e->list[safetensors_order(e->w, *at)];
        bool ok;
        uint64_t size = dtype_bytes(t->dtype), elems = shape_volume(&t->shape, &ok), room = (CHUNK_BYTES - used) / size;
        if (elems && e->part == part_model && hf_adapter_exists(e->t, t->name)) {
            if (used)
                break;
            st = export_merged(e, t, from, elems);
            if (*from == elems) {
                *from = 0;
                ++*at;
            }
            continue;
        }
        if (used % size || (room == 0 && elems))
            break;
        uint64_t n = elems - *from < room ? elems - *from : room;
        if (n)
            st = add_run(e, s, t, t->dtype, *from, *from + n, e->buf + used);
        used += n * size;
        *from += n;
        if (*from < elems)
            break;
        *from = 0;
        ++*at;
    }
    if (!st && used)
        st = load_runs(e, s);
    if (!st && used)
        st = safetensors_append(e->w, e->buf, used);
    tessera_state_free(s);
    return st;
}

static status *write_folder(struct export *e, const char *folder, uint64_t shard_bytes, const char *config)
{
    bool adapter = e->part == part_adapter;
    TRY(safetensors_create_as(folder, adapter ? "adapter_model" : "model", e->list, e->count, shard_bytes, &e->w));
    TRY(safetensors_extra(e->w, adapter ? "adapter_config.json" : "config.json", config));
    for (uint64_t at = 0, from = 0; at < e->count;)
        TRY(export_chunk(e, &at, &from));
    struct safetensors_writer *w = e->w;
    e->w = NULL;
    return safetensors_finish(w);
}

static status *run_export(const struct words *w)
{
    struct export e = { .part = w->adapter ? part_adapter : part_model };
    const char *folder = w->word[w->count - 1];
    char *config = NULL;
    status *st = open_root(&e, w);
    if (!st)
        st = list_model(&e, w->dtype);
    if (!st)
        st = take_config(&e);
    if (!st)
        st = make_config(&e, &config);
    if (!st && !(e.buf = mem_alloc(CHUNK_BYTES)))
        st = ERR(NO_MEMORY, "a buffer of %d bytes", CHUNK_BYTES);
    if (!st)
        st = write_folder(&e, folder, w->shard_bytes, config);
    if (!st)
        printf("wrote %s: %" PRIu64 " tensors of step %" PRIu64 "\n", folder, e.count, e.step);
    safetensors_abort(e.w);
    for (uint64_t i = 0; e.list && i < e.count; i++)
        mem_free((void *)(size_t)e.list[i].name);
    mem_free(e.list);
    mem_free(e.buf);
    mem_free(e.config);
    hf_adapter_free(&e.adapter);
    mem_free(config);
    return e.t ? status_first(st, tessera_close(e.t)) : st;
}

/* ---- import ---- */

struct mapping {
    void *at;
    size_t bytes;
};

struct import {
    struct safetensors *s;
    struct model *m;
    struct mapping *map; /* one a file */
    char *config;        /* "model.KEY=VALUE" lines */
    tessera *t;
    tessera_state *state;
};

static status *map_file(const struct import *in, uint32_t file)
{
    const char *dir = in->s->url;
    char path[4096];
    struct store_info info;
    if (strcmp(in->s->store->ops->scheme, "file"))
        return ERR(UNSUPPORTED, "ckpt import: %s: only folders of a file system (file:PATH) can be imported", dir);
    if (!strncmp(dir, "file:", 5))
        dir += strncmp(dir, "file://", 7) ? 5 : 7;
    snprintf(path, sizeof path, "%s/%s", dir, in->s->file[file]);
    TRY(store_stat(in->s->store, in->s->file[file], &info));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return ERR_SYS(errno, "open %s", path);
    void *at = mmap(NULL, info.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    int why = errno;
    close(fd);
    if (at == MAP_FAILED)
        return ERR_SYS(why, "mmap %s", path);
    in->map[file] = (struct mapping){ at, info.bytes };
    return NULL;
}

static status *map_files(struct import *in)
{
    in->map = mem_calloc(in->s->files + 1, sizeof *in->map);
    if (!in->map)
        return ERR(NO_MEMORY, "a list of %u files", in->s->files);
    for (uint32_t i = 0; i < in->s->files; i++)
        TRY(map_file(in, i));
    for (uint64_t i = 0; i < in->s->count; i++) {
        const struct safetensor *t = &in->s->tensor[i];
        if (t->at > in->map[t->file].bytes || t->bytes > in->map[t->file].bytes - t->at)
            return ERR(CORRUPT, "%s/%s has become shorter", in->s->url, in->s->file[t->file]);
    }
    return NULL;
}

/* The model of config.json, declared, to hold the files against. */
static status *declare(struct import *in, const struct hf_config *c, const char *folder)
{
    const struct model_ops *ops = NULL;
    TRY(model_lookup(hf_config_get(c, "kind"), &ops));
    void *config = mem_calloc(1, ops->config_bytes);
    status *st = config ? options_defaults(ops->options, config) : ERR(NO_MEMORY, "%s", folder);
    for (int i = 0; i < c->count && !st; i++)
        st = options_set(ops->options, c->set[i].key, c->set[i].value, config, folder);
    if (!st)
        st = model_open(ops, config, 1, &in->m);
    if (config)
        options_fini(ops->options, config);
    mem_free(config);
    return st ? st : hf_match(in->s, &in->m->params);
}

static status *settings_text(struct import *in, const struct hf_config *c)
{
    size_t cap = (size_t)c->count * (HF_KEY_BYTES + HF_VALUE_BYTES + 8) + 1, n = 0;
    in->config = mem_alloc(cap);
    if (!in->config)
        return ERR(NO_MEMORY, "settings of a model");
    in->config[0] = 0;
    for (int i = 0; i < c->count; i++)
        n += (size_t)snprintf(in->config + n, cap - n, "model.%s=%s\n", c->set[i].key, c->set[i].value);
    return NULL;
}

/* expert -1: all of p. */
static status *add_tensor(struct import *in, const struct param *p, int64_t expert)
{
    const struct params *ps = &in->m->params;
    char name[PARAM_NAME_BYTES];
    snprintf(name, sizeof name, "%s", p->alias < 0 ? p->name : ps->p[p->alias].name);
    if (expert >= 0)
        hf_name(p->name, (uint64_t)expert, name);
    const struct safetensor *t = safetensors_find(in->s, name);
    struct tessera_tensor d = hf_part(p->name, t->dtype, &t->shape, expert, p->shape.dim[0]);
    d.data = (unsigned char *)in->map[t->file].at + t->at; /* read only: saving reads */
    if (p->alias >= 0) {
        d.alias_of = ps->p[p->alias].name;
        d.data = NULL;
    }
    return tessera_state_add_tensor(in->state, &d);
}

static status *add_tensors(struct import *in)
{
    const struct params *ps = &in->m->params;
    for (int i = 0; i < ps->count; i++) {
        const struct param *p = &ps->p[i];
        for (uint64_t e = 0; e < (p->experts ? p->shape.dim[0] : 1); e++)
            TRY(add_tensor(in, p, p->experts ? (int64_t)e : -1));
    }
    return tessera_state_add_blob(in->state, "extra", "config", 0, in->config, strlen(in->config));
}

static status *save_step(struct import *in, const char *url, uint64_t step)
{
    struct tessera_options o = TESSERA_OPTIONS;
    uint64_t committed = UINT64_MAX;
    o.url = url;
    o.mpi_comm = -1;
    o.staging_bytes = CHUNK_BYTES;
    TRY(tessera_open(&o, &in->t));
    status *st = tessera_find(in->t, TESSERA_NEWEST, &committed);
    if (!st)
        return ERR(EXISTS, "%s holds step %" PRIu64 " already: import into a new root", url, committed);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    TRY(tessera_state_new(in->t, &in->state));
    TRY(add_tensors(in));
    TRY(tessera_save(in->t, in->state, step));
    return tessera_wait(in->t, &committed);
}

static status *run_import(const struct words *w)
{
    struct import in = { .t = NULL };
    struct hf_config c;
    uint64_t step = 0;
    status *st = w->count == WORDS ? cli_step(w->word[2], &step) : NULL;
    if (!st)
        st = hf_config_read(w->word[0], &c);
    if (!st)
        st = safetensors_open(w->word[0], &in.s);
    if (!st)
        st = declare(&in, &c, w->word[0]);
    if (!st)
        st = settings_text(&in, &c);
    if (!st)
        st = map_files(&in);
    if (!st)
        st = save_step(&in, w->word[1], step);
    uint32_t files = in.s ? in.s->files : 0;
    if (!st)
        printf("wrote step %" PRIu64 " of %s: %" PRIu64 " tensors of %s\n", step, w->word[1], in.s->count, w->word[0]);
    tessera_state_free(in.state);
    if (in.t)
        st = status_first(st, tessera_close(in.t));
    for (uint32_t i = 0; in.map && i < files; i++)
        if (in.map[i].at)
            munmap(in.map[i].at, in.map[i].bytes);
    mem_free(in.map);
    mem_free(in.config);
    model_close(in.m);
    safetensors_close(in.s);
    return st;
}

bool hf_cli_has(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
            return false;
    return argc && (!strcmp(argv[0], "export") || !strcmp(argv[0], "import"));
}

status *hf_cli(int argc, char **argv)
{
    struct words w;
    bool exports = !strcmp(argv[0], "export");
    TRY(take_words(argc, argv, exports ? usage_export : usage_import, &w));
    status *st = exports ? run_export(&w) : run_import(&w);
    if (fflush(stdout) != 0)
        st = status_first(st, ERR_SYS(errno, "write to standard output"));
    return st;
}
