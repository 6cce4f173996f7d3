/* safetensors: writing. All headers follow from the list, so they are made first; then bytes go out in one order, file
 * after file, and the folder appears by one rename where the store has it. Where it has none (objects), files are
 * written under their last names and the index comes last: readers that find no index find no model of several files.
 */
#include "trainer/hf/safetensors.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <sys/random.h>

enum { KEY_BYTES = 256, STEM_BYTES = 24, FILE_BYTES = 96, ALIGN = 8 };

struct shard {
    uint64_t first, count; /* of order[] */
    uint64_t data_bytes;
};

struct safetensors_writer {
    struct store *store;
    char stem[STEM_BYTES];
    char *url, *name, folder[KEY_BYTES]; /* the folder that is written to, until it gets its name */
    const struct safetensors_spec *list; /* the caller's, until safetensors_create returns */
    uint64_t count, *order, *bytes;      /* bytes: by the list's index */
    struct shard *shard;
    uint64_t shards, at_shard, at_byte; /* where the next byte goes */
    uint64_t header_bytes;              /* of the shard that is open, with its prefix */
    struct store_writer *open;
    json_t **header; /* one a shard */
    json_t *map;     /* weight_map */
    bool rename;
};

/* ---- the plan ---- */

static status *measure(struct safetensors_writer *w)
{
    for (uint64_t i = 0; i < w->count; i++) {
        const struct safetensors_spec *t = &w->list[i];
        bool ok;
        uint64_t elems = shape_volume(&t->shape, &ok);
        if (!safetensors_dtype(t->dtype))
            return ERR(UNSUPPORTED, "%s: tensor \"%s\": safetensors has no type for %s", w->url, t->name,
                       dtype_name(t->dtype));
        if (!ok || elems > INT64_MAX / dtype_bytes(t->dtype))
            return ERR(INVALID, "%s: tensor \"%s\" is too large", w->url, t->name);
        w->bytes[i] = elems * dtype_bytes(t->dtype);
        w->order[i] = i;
    }
    return NULL;
}

/* Larger elements first, so that every tensor is aligned to its own; then by name. */
static int in_file(const void *x, const void *y, void *arg)
{
    const struct safetensors_spec *list = arg, *a = &list[*(const uint64_t *)x], *b = &list[*(const uint64_t *)y];
    size_t m = dtype_bytes(a->dtype), n = dtype_bytes(b->dtype);
    return m != n ? (m > n ? -1 : 1) : strcmp(a->name, b->name);
}

static void cut_shards(struct safetensors_writer *w, uint64_t most)
{
    w->shards = 1;
    for (uint64_t i = 0; i < w->count; i++) {
        struct shard *s = &w->shard[w->shards - 1];
        if (s->count && (s->data_bytes > most || w->bytes[i] > most - s->data_bytes)) {
            *++s = (struct shard){ .first = i };
            w->shards++;
        }
        s->count++;
        s->data_bytes += w->bytes[i];
    }
    for (uint64_t s = 0; s < w->shards; s++)
        qsort_r(w->order + w->shard[s].first, w->shard[s].count, sizeof *w->order, in_file, (void *)(size_t)w->list);
}

static void file_name(const struct safetensors_writer *w, uint64_t shard, char name[FILE_BYTES])
{
    if (w->shards == 1)
        snprintf(name, FILE_BYTES, "%s.safetensors", w->stem);
    else
        snprintf(name, FILE_BYTES, "%s-%05" PRIu64 "-of-%05" PRIu64 ".safetensors", w->stem, shard + 1, w->shards);
}

static json_t *entry_of(const struct safetensors_spec *t, uint64_t begin, uint64_t end)
{
    json_t *shape = json_array();
    for (int d = 0; d < t->shape.ndim; d++)
        json_array_append_new(shape, json_integer((json_int_t)t->shape.dim[d]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", safetensors_dtype(t->dtype), "shape", shape, "data_offsets",
                     (json_int_t)begin, (json_int_t)end);
}

static status *plan_shard(struct safetensors_writer *w, uint64_t s)
{
    char file[FILE_BYTES];
    uint64_t at = 0;
    file_name(w, s, file);
    w->header[s] = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (uint64_t i = w->shard[s].first; i < w->shard[s].first + w->shard[s].count; i++) {
        const struct safetensors_spec *t = &w->list[w->order[i]];
        if (json_object_get(w->map, t->name) || !strcmp(t->name, "__metadata__"))
            return ERR(INVALID, "%s: tensor \"%s\" %s", w->url, t->name,
                       *t->name == '_' ? "has the name of the header's own entry" : "is listed twice");
        if (json_object_set_new(w->header[s], t->name, entry_of(t, at, at + w->bytes[w->order[i]])) ||
            json_object_set_new(w->map, t->name, json_string(file)))
            return ERR(INVALID, "%s: tensor \"%s\": its name is not UTF-8", w->url, t->name);
        at += w->bytes[w->order[i]];
    }
    return NULL;
}

static status *plan(struct safetensors_writer *w, uint64_t shard_bytes)
{
    w->order = mem_calloc(w->count + 1, sizeof *w->order);
    w->bytes = mem_calloc(w->count + 1, sizeof *w->bytes);
    w->shard = mem_calloc(w->count + 1, sizeof *w->shard);
    w->header = mem_calloc(w->count + 1, sizeof(json_t *));
    w->map = json_object();
    if (!w->order || !w->bytes || !w->shard || !w->header || !w->map)
        return ERR(NO_MEMORY, "%s: a list of %" PRIu64 " tensors", w->url, w->count);
    TRY(measure(w));
    cut_shards(w, shard_bytes);
    for (uint64_t s = 0; s < w->shards; s++)
        TRY(plan_shard(w, s));
    return NULL;
}

/* ---- the folder ---- */

static status *choose_folder(struct safetensors_writer *w)
{
    struct store_list there = { 0 };
    struct store_info info;
    char mark[8] = "";
    uint32_t random = 0;
    TRY(status_wrap(store_check_key(w->name), "%s", w->url));
    TRY(store_list(w->store, w->name, &there));
    size_t found = there.count;
    store_list_free(&there);
    status *st = store_stat(w->store, w->name, &info);
    bool missing = status_code(st) == ST_NOT_FOUND;
    if (st && !missing)
        return st;
    status_free(st);
    if (found || !missing)
        return ERR(EXISTS, "%s is there already: export to a new folder", w->url);
    w->rename = w->store->ops->rename_tree != NULL;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        return ERR(IO, "%s: no random numbers for the name of a folder", w->url);
    snprintf(mark, sizeof mark, "%04x", (unsigned)random & 0xffff);
    if (snprintf(w->folder, sizeof w->folder, "%s%s%s", w->name, w->rename ? ".part-" : "", w->rename ? mark : "") >=
        (int)sizeof w->folder)
        return ERR(INVALID, "%s: its name is too long", w->url);
    return NULL;
}

static void key_of(const struct safetensors_writer *w, const char *file, char key[STORE_KEY_BYTES])
{
    snprintf(key, STORE_KEY_BYTES, "%s/%s", w->folder, file);
}

static void free_writer(struct safetensors_writer *w)
{
    for (uint64_t s = 0; w->header && s < w->shards; s++)
        json_decref(w->header[s]);
    json_decref(w->map);
    mem_free(w->header);
    mem_free(w->shard);
    mem_free(w->order);
    mem_free(w->bytes);
    mem_free(w->name);
    mem_free(w->url);
    store_close(w->store);
    mem_free(w);
}

void safetensors_abort(struct safetensors_writer *w)
{
    if (!w)
        return;
    store_writer_abort(w->open);
    if (*w->folder)
        status_free(store_remove_tree(w->store, w->folder));
    free_writer(w);
}

/* Open the file that the next byte goes to, with its header. */
static status *open_shard(struct safetensors_writer *w)
{
    char file[FILE_BYTES], key[STORE_KEY_BYTES];
    file_name(w, w->at_shard, file);
    key_of(w, file, key);
    size_t n = json_dumpb(w->header[w->at_shard], NULL, 0, JSON_COMPACT), padded = (n + ALIGN - 1) / ALIGN * ALIGN;
    char *text = n ? mem_alloc(ALIGN + padded) : NULL;
    if (!text)
        return ERR(NO_MEMORY, "%s/%s: its header", w->url, file);
    put_u64(text, padded);
    (void)json_dumpb(w->header[w->at_shard], text + ALIGN, n, JSON_COMPACT);
    memset(text + ALIGN + n, ' ', padded - n);
    w->header_bytes = ALIGN + padded;
    w->at_byte = 0;
    status *st = store_writer_open(w->store, key, w->header_bytes + w->shard[w->at_shard].data_bytes, &w->open);
    if (!st)
        st = store_write(w->open, 0, text, ALIGN + padded);
    mem_free(text);
    return st;
}

/* Finish files that have all their bytes (also files of empty tensors only), and open the one that has not. */
static status *move_on(struct safetensors_writer *w)
{
    while (w->open && w->at_byte == w->shard[w->at_shard].data_bytes) {
        struct store_writer *done = w->open;
        w->open = NULL;
        TRY(store_writer_finish(done));
        if (++w->at_shard < w->shards)
            TRY(open_shard(w));
    }
    return NULL;
}

status *safetensors_create(const char *url, const struct safetensors_spec *list, uint64_t count, uint64_t shard_bytes,
                           struct safetensors_writer **out)
{
    return safetensors_create_as(url, "model", list, count, shard_bytes, out);
}

status *safetensors_create_as(const char *url, const char *stem, const struct safetensors_spec *list, uint64_t count,
                              uint64_t shard_bytes, struct safetensors_writer **out)
{
    char *parent = NULL;
    struct safetensors_writer *w = mem_calloc(1, sizeof *w);
    if (!w)
        return ERR(NO_MEMORY, "%s", url);
    snprintf(w->stem, sizeof w->stem, "%s", stem);
    w->list = list;
    w->count = count;
    w->url = mem_strdup(url);
    status *st = w->url ? safetensors_split(url, &parent, &w->name) : ERR(NO_MEMORY, "%s", url);
    if (!st)
        st = plan(w, shard_bytes);
    if (!st)
        st = store_open(parent, true, &w->store);
    if (!st)
        st = choose_folder(w);
    if (!st)
        st = open_shard(w);
    if (!st)
        st = move_on(w);
    mem_free(parent);
    w->list = NULL;
    if (st) {
        safetensors_abort(w);
        return st;
    }
    *out = w;
    return NULL;
}

uint64_t safetensors_order(const struct safetensors_writer *w, uint64_t i)
{
    return w->order[i];
}

status *safetensors_append(struct safetensors_writer *w, const void *buf, size_t n)
{
    const unsigned char *from = buf;
    while (n) {
        if (!w->open)
            return ERR(INVALID, "%s: %zu bytes more than its tensors have", w->url, n);
        uint64_t room = w->shard[w->at_shard].data_bytes - w->at_byte;
        size_t take = n < room ? n : (size_t)room;
        TRY(store_write(w->open, w->header_bytes + w->at_byte, from, take));
        w->at_byte += take;
        from += take;
        n -= take;
        TRY(move_on(w));
    }
    return NULL;
}

status *safetensors_extra(struct safetensors_writer *w, const char *name, const char *text)
{
    char key[STORE_KEY_BYTES];
    key_of(w, name, key);
    return store_put(w->store, key, text, strlen(text), STORE_REPLACE);
}

static status *write_index(struct safetensors_writer *w)
{
    uint64_t total = 0;
    for (uint64_t s = 0; s < w->shards; s++)
        total += w->shard[s].data_bytes;
    json_t *root = json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)total, "weight_map", w->map);
    const size_t how = JSON_INDENT(2) | JSON_SORT_KEYS;
    size_t n = root ? json_dumpb(root, NULL, 0, how) : 0;
    char *text = n ? mem_alloc(n + 2) : NULL;
    if (text) {
        (void)json_dumpb(root, text, n, how);
        memcpy(text + n, "\n", 2);
    }
    json_decref(root);
    char name[FILE_BYTES];
    snprintf(name, sizeof name, "%s.safetensors.index.json", w->stem);
    status *st = text ? safetensors_extra(w, name, text)
                      : ERR(NO_MEMORY, "%s: the index of %" PRIu64 " tensors", w->url, w->count);
    mem_free(text);
    return st;
}

status *safetensors_finish(struct safetensors_writer *w)
{
    status *st = NULL;
    if (w->at_shard < w->shards)
        st = ERR(INVALID, "%s: the tensors of %" PRIu64 " files are not all there", w->url, w->shards - w->at_shard);
    if (!st && w->shards > 1)
        st = write_index(w);
    if (!st && w->rename)
        st = store_rename_tree(w->store, w->folder, w->name);
    if (st) {
        safetensors_abort(w);
        return st;
    }
    free_writer(w);
    return NULL;
}
