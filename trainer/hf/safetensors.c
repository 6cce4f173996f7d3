/* safetensors: reading. Order of trust: the file's length comes from the store; the header's length is held against it;
 * each tensor's length follows from its type and shape and is held against its offsets; the offsets together must tile
 * the rest of the file. After that every range lies inside. */
#include "trainer/hf/safetensors.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>

enum { PREFIX_BYTES = 8, TEXT_BYTES = 128 };

static const struct {
    const char *name;
    enum dtype dtype;
} dtypes[] = {
    { "F64", DTYPE_F64 },   { "F32", DTYPE_F32 },        { "F16", DTYPE_F16 },        { "BF16", DTYPE_BF16 },
    { "I64", DTYPE_I64 },   { "I32", DTYPE_I32 },        { "I16", DTYPE_I16 },        { "I8", DTYPE_I8 },
    { "U64", DTYPE_U64 },   { "U32", DTYPE_U32 },        { "U16", DTYPE_U16 },        { "U8", DTYPE_U8 },
    { "BOOL", DTYPE_BOOL }, { "F8_E4M3", DTYPE_F8E4M3 }, { "F8_E5M2", DTYPE_F8E5M2 }, { "F8_E8M0", DTYPE_E8M0 },
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

const char *safetensors_dtype(enum dtype t)
{
    for (size_t i = 0; i < DTYPES; i++)
        if (dtypes[i].dtype == t)
            return dtypes[i].name;
    return NULL;
}

enum dtype safetensors_dtype_parse(const char *name)
{
    for (size_t i = 0; i < DTYPES; i++)
        if (!strcmp(dtypes[i].name, name))
            return dtypes[i].dtype;
    return DTYPE_NONE;
}

void safetensors_text(const char *from, char *text, size_t bytes)
{
    size_t n = 0;
    for (; from[n] && n + 1 < bytes; n++)
        text[n] = (unsigned char)from[n] < 0x20 || from[n] == 0x7f ? '?' : from[n];
    if (from[n] && n >= 3)
        memcpy(text + n - 3, "...", 3);
    text[n] = 0;
}

status *safetensors_split(const char *url, char **parent, char **last)
{
    size_t n = strlen(url);
    while (n > 1 && url[n - 1] == '/')
        n--;
    size_t from = n;
    while (from > 0 && url[from - 1] != '/' && url[from - 1] != ':')
        from--;
    char *p = mem_alloc(n + 3), *l = mem_alloc(n + 1);
    if (!p || !l) {
        mem_free(p);
        mem_free(l);
        return ERR(NO_MEMORY, "the name of a folder");
    }
    memcpy(l, url + from, n - from);
    l[n - from] = 0;
    bool root = from == 1 || (from > 1 && url[from - 2] == ':'); /* "/x", "file:/x": the '/' stays */
    size_t keep = from && url[from - 1] == '/' && !root ? from - 1 : from;
    memcpy(p, url, keep);
    p[keep] = from == 0 || url[from - 1] == ':' ? '.' : 0;
    p[keep + 1] = 0;
    *parent = p;
    *last = l;
    return NULL;
}

/* ---- a header ---- */

/* Where a header is from, for messages. */
struct place {
    const char *file;
    char tensor[TEXT_BYTES];
};

#define BAD(place, fmt, ...) ERR(CORRUPT, "%s: tensor \"%s\": " fmt, (place)->file, (place)->tensor, __VA_ARGS__)

static status *parse_shape(const struct place *at, const json_t *v, struct shape *out)
{
    if (!json_is_array(v))
        return BAD(at, "%s", "shape is not a list");
    size_t n = json_array_size(v);
    if (n > LAYOUT_DIMS)
        return BAD(at, "%zu dimensions, at most %d are handled", n, LAYOUT_DIMS);
    *out = (struct shape){ .ndim = (int)n };
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(v, i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            return BAD(at, "dimension %zu of shape is not a number of elements", i);
        out->dim[i] = (uint64_t)json_integer_value(d);
    }
    return NULL;
}

static status *parse_dtype(const struct place *at, const json_t *v, enum dtype *out)
{
    char legal[256] = "", text[32];
    if (!json_is_string(v))
        return BAD(at, "%s", "dtype is not a text");
    *out = safetensors_dtype_parse(json_string_value(v));
    if (*out != DTYPE_NONE)
        return NULL;
    for (size_t i = 0, n = 0; i < DTYPES; i++)
        n += (size_t)snprintf(legal + n, sizeof legal - n, "%s%s", i ? ", " : "", dtypes[i].name);
    safetensors_text(json_string_value(v), text, sizeof text);
    return ERR(UNSUPPORTED, "%s: tensor \"%s\": dtype \"%s\" is not one of %s", at->file, at->tensor, text, legal);
}

/* t->at is the offset in the data. */
static status *parse_tensor(const struct place *at, const char *name, const json_t *v, struct safetensor *t)
{
    const json_t *offsets = json_object_get(v, "data_offsets");
    if (!json_is_object(v) || json_object_size(v) != 3)
        return BAD(at, "%s", "not an object of dtype, shape and data_offsets");
    TRY(parse_dtype(at, json_object_get(v, "dtype"), &t->dtype));
    TRY(parse_shape(at, json_object_get(v, "shape"), &t->shape));
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return BAD(at, "%s", "data_offsets is not [begin, end], 0 <= begin <= end");
    t->at = (uint64_t)json_integer_value(begin);
    t->bytes = (uint64_t)json_integer_value(end) - t->at;
    bool ok;
    uint64_t elems = shape_volume(&t->shape, &ok), size = dtype_bytes(t->dtype);
    if (!ok || elems > INT64_MAX / size)
        return BAD(at, "%s", "its shape has more bytes than a file can");
    if (elems * size != t->bytes)
        return BAD(at, "shape and dtype make %" PRIu64 " bytes, data_offsets %" PRIu64, elems * size, t->bytes);
    t->name = mem_strdup(name);
    return t->name ? NULL : ERR(NO_MEMORY, "the name of a tensor");
}

static int by_place(const void *x, const void *y)
{
    const struct safetensor *a = x, *b = y;
    return a->at != b->at ? (a->at < b->at ? -1 : 1) : a->bytes != b->bytes ? (a->bytes < b->bytes ? -1 : 1) : 0;
}

static status *check_tiling(struct safetensor *t, uint64_t count, uint64_t data_bytes, const char *file)
{
    uint64_t end = 0;
    struct place at = { .file = file };
    qsort(t, count, sizeof *t, by_place);
    for (uint64_t i = 0; i < count; i++) {
        safetensors_text(t[i].name, at.tensor, sizeof at.tensor);
        if (t[i].bytes > data_bytes || t[i].at > data_bytes - t[i].bytes)
            return BAD(&at, "bytes [%" PRIu64 ", %" PRIu64 ") of data that are %" PRIu64 " long", t[i].at,
                       t[i].at + t[i].bytes, data_bytes);
        if (t[i].at != end)
            return BAD(&at, "begins at %" PRIu64 " of the data, where the one before %s %" PRIu64, t[i].at,
                       t[i].at < end ? "still runs to" : "has ended at", end);
        end += t[i].bytes;
    }
    return end == data_bytes ? NULL
                             : ERR(CORRUPT, "%s: its tensors end at byte %" PRIu64 " of %" PRIu64 " bytes of data",
                                   file, end, data_bytes);
}

static status *parse_object(const json_t *root, const char *file, struct safetensor *t, uint64_t *count)
{
    for (void *i = json_object_iter((json_t *)(size_t)root); i; i = json_object_iter_next((json_t *)(size_t)root, i)) {
        const char *name = json_object_iter_key(i);
        struct place at = { .file = file };
        if (!strcmp(name, "__metadata__"))
            continue;
        safetensors_text(name, at.tensor, sizeof at.tensor);
        TRY(parse_tensor(&at, name, json_object_iter_value(i), &t[*count]));
        ++*count;
    }
    return NULL;
}

void safetensors_list_free(struct safetensor *t, uint64_t count)
{
    for (uint64_t i = 0; t && i < count; i++)
        mem_free(t[i].name);
    mem_free(t);
}

/* The object that n bytes of JSON are; the caller puts it back (json_decref). */
static status *load_object(const char *json, size_t n, const char *file, json_t **out)
{
    json_error_t e;
    json_t *root = n && *json == '{' ? json_loadb(json, n, JSON_REJECT_DUPLICATES, &e) : NULL;
    if (root) {
        *out = root;
        return NULL;
    }
    char text[TEXT_BYTES] = "it does not begin with {";
    if (n && *json == '{')
        safetensors_text(e.text, text, sizeof text);
    return ERR(CORRUPT, "%s: not a JSON object: %s", file, text);
}

status *safetensors_parse(const char *header, size_t n, uint64_t file_bytes, const char *name, struct safetensor **out,
                          uint64_t *count)
{
    json_t *root = NULL;
    if (file_bytes < PREFIX_BYTES || n > file_bytes - PREFIX_BYTES)
        return ERR(CORRUPT, "%s: %" PRIu64 " bytes do not hold a header of %zu", name, file_bytes, n);
    TRY(load_object(header, n, name, &root));
    uint64_t found = 0, data = PREFIX_BYTES + n;
    struct safetensor *t = mem_calloc(json_object_size(root) + 1, sizeof *t);
    status *st = t ? parse_object(root, name, t, &found) : ERR(NO_MEMORY, "%s: its tensors", name);
    json_decref(root);
    if (!st)
        st = check_tiling(t, found, file_bytes - data, name);
    if (st) {
        safetensors_list_free(t, found);
        return st;
    }
    for (uint64_t i = 0; i < found; i++)
        t[i].at += data;
    *out = t;
    *count = found;
    return NULL;
}

/* ---- a folder ---- */

static status *read_header(struct store *s, const char *key, const char *where, struct safetensor **out,
                           uint64_t *count)
{
    struct store_info info;
    unsigned char prefix[PREFIX_BYTES];
    TRY(store_stat(s, key, &info));
    if (info.is_dir || info.bytes < PREFIX_BYTES)
        return ERR(CORRUPT, "%s: %s", where, info.is_dir ? "a folder" : "shorter than the length of its header");
    TRY(store_get(s, key, 0, prefix, sizeof prefix));
    uint64_t n = get_u64(prefix);
    if (n > SAFETENSORS_HEADER_MAX || n > info.bytes - PREFIX_BYTES)
        return ERR(CORRUPT, "%s: a header of %" PRIu64 " bytes in a file of %" PRIu64 " (the format's limit is %d)",
                   where, n, info.bytes, SAFETENSORS_HEADER_MAX);
    char *text = mem_alloc(n + 1);
    if (!text)
        return ERR(NO_MEMORY, "%s: a header of %" PRIu64 " bytes", where, n);
    status *st = store_get(s, key, PREFIX_BYTES, text, n);
    if (!st)
        st = safetensors_parse(text, n, info.bytes, where, out, count);
    mem_free(text);
    return st;
}

static status *add_file(struct safetensors *s, uint32_t file)
{
    struct safetensor *t = NULL;
    uint64_t n = 0;
    char where[512];
    snprintf(where, sizeof where, "%s/%s", s->url, s->file[file]);
    TRY(read_header(s->store, s->file[file], where, &t, &n));
    struct safetensor *all = mem_array(s->tensor, s->count + n + 1, sizeof *all);
    if (!all) {
        safetensors_list_free(t, n);
        return ERR(NO_MEMORY, "%s: %" PRIu64 " tensors", where, n);
    }
    s->tensor = all;
    for (uint64_t i = 0; i < n; i++) {
        t[i].file = file;
        all[s->count++] = t[i];
    }
    mem_free(t);
    return NULL;
}

static int by_name(const void *x, const void *y)
{
    return strcmp(((const struct safetensor *)x)->name, ((const struct safetensor *)y)->name);
}

static int by_text(const void *x, const void *y)
{
    return strcmp(*(char *const *)x, *(char *const *)y);
}

static status *add_name(struct safetensors *s, const char *name)
{
    s->file[s->files] = mem_strdup(name);
    return s->file[s->files++] ? NULL : ERR(NO_MEMORY, "%s: the names of its files", s->url);
}

/* The files that the weight_map names, each once. */
static status *index_files(struct safetensors *s, const json_t *map, const char *where)
{
    s->file = mem_calloc(json_object_size(map) + 1, sizeof *s->file);
    if (!s->file)
        return ERR(NO_MEMORY, "%s: its files", where);
    for (void *i = json_object_iter((json_t *)(size_t)map); i; i = json_object_iter_next((json_t *)(size_t)map, i)) {
        const char *file = json_string_value(json_object_iter_value(i));
        char text[TEXT_BYTES];
        if (!file)
            return ERR(CORRUPT, "%s: weight_map has something else than names of files", where);
        safetensors_text(file, text, sizeof text);
        if (strchr(file, '/'))
            return ERR(CORRUPT, "%s: weight_map names \"%s\", which is not a file of this folder", where, text);
        status *st = store_check_key(file);
        if (st)
            return status_wrap(st, "%s: weight_map names \"%s\"", where, text);
        TRY(add_name(s, file));
    }
    qsort(s->file, s->files, sizeof *s->file, by_text);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->files; i++)
        if (kept && !strcmp(s->file[i], s->file[kept - 1]))
            mem_free(s->file[i]);
        else
            s->file[kept++] = s->file[i];
    s->files = kept;
    return NULL;
}

/* Each tensor is where the index says, and the index says nothing more. */
static status *check_index(const struct safetensors *s, const json_t *map, const char *where)
{
    char text[TEXT_BYTES];
    for (uint64_t i = 0; i < s->count; i++) {
        const struct safetensor *t = &s->tensor[i];
        const char *file = json_string_value(json_object_get(map, t->name));
        safetensors_text(t->name, text, sizeof text);
        if (!file || strcmp(file, s->file[t->file]))
            return ERR(CORRUPT, "%s: tensor \"%s\" is in %s; weight_map has it in %s", where, text, s->file[t->file],
                       file ? file : "no file");
    }
    for (void *i = json_object_iter((json_t *)(size_t)map); i; i = json_object_iter_next((json_t *)(size_t)map, i))
        if (!safetensors_find(s, json_object_iter_key(i))) {
            safetensors_text(json_object_iter_key(i), text, sizeof text);
            return ERR(CORRUPT, "%s: tensor \"%s\" is not in %s", where, text,
                       json_string_value(json_object_iter_value(i)));
        }
    return NULL;
}

static status *read_files(struct safetensors *s)
{
    for (uint32_t i = 0; i < s->files; i++)
        TRY(add_file(s, i));
    if (s->count)
        qsort(s->tensor, s->count, sizeof *s->tensor, by_name);
    for (uint64_t i = 1; i < s->count; i++)
        if (!strcmp(s->tensor[i].name, s->tensor[i - 1].name)) {
            char text[TEXT_BYTES];
            safetensors_text(s->tensor[i].name, text, sizeof text);
            return ERR(CORRUPT, "%s: tensor \"%s\" is in two files, %s and %s", s->url, text,
                       s->file[s->tensor[i - 1].file], s->file[s->tensor[i].file]);
        }
    return NULL;
}

static status *read_index(struct safetensors *s, const char *key)
{
    char where[512];
    void *text = NULL;
    size_t n;
    json_t *root = NULL;
    snprintf(where, sizeof where, "%s/%s", s->url, key);
    TRY(store_get_all(s->store, key, SAFETENSORS_INDEX_MAX, &text, &n));
    status *st = load_object(text, n, where, &root);
    mem_free(text);
    TRY(st);
    const json_t *map = json_object_get(root, "weight_map");
    st = json_is_object(map) ? index_files(s, map, where) : ERR(CORRUPT, "%s: it has no weight_map", where);
    if (!st)
        st = read_files(s);
    if (!st)
        st = check_index(s, map, where);
    json_decref(root);
    return st;
}

static status *read_folder(struct safetensors *s, const char *file)
{
    static const char index[] = "model.safetensors.index.json", one[] = "model.safetensors";
    struct store_info info;
    status *st = file ? NULL : store_stat(s->store, index, &info);
    if (!st && !file)
        return read_index(s, index);
    if (st && status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    if (!file) {
        st = store_stat(s->store, one, &info);
        if (status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            return ERR(NOT_FOUND, "%s: neither %s nor %s is there", s->url, index, one);
        }
        TRY(st);
    }
    s->file = mem_calloc(1, sizeof *s->file);
    if (!s->file)
        return ERR(NO_MEMORY, "%s: its file", s->url);
    TRY(add_name(s, file ? file : one));
    return read_files(s);
}

status *safetensors_open(const char *url, struct safetensors **out)
{
    static const char suffix[] = ".safetensors";
    size_t n = strlen(url), m = sizeof suffix - 1;
    bool one = n > m && !strcmp(url + n - m, suffix);
    char *parent = NULL, *last = NULL;
    struct safetensors *s = mem_calloc(1, sizeof *s);
    status *st = s ? NULL : ERR(NO_MEMORY, "%s", url);
    if (!st && one)
        st = safetensors_split(url, &parent, &last);
    if (!st && !(s->url = mem_strdup(one ? parent : url)))
        st = ERR(NO_MEMORY, "%s", url);
    if (!st)
        st = store_open(s->url, false, &s->store);
    if (!st)
        st = read_folder(s, last);
    mem_free(parent);
    mem_free(last);
    if (st) {
        safetensors_close(s);
        return st;
    }
    *out = s;
    return NULL;
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    safetensors_list_free(s->tensor, s->count);
    for (uint32_t i = 0; s->file && i < s->files; i++)
        mem_free(s->file[i]);
    mem_free(s->file);
    mem_free(s->url);
    store_close(s->store);
    mem_free(s);
}

const struct safetensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct safetensor key = { .name = (char *)(size_t)name };
    return s->count ? bsearch(&key, s->tensor, s->count, sizeof key, by_name) : NULL;
}

/* ---- ranges ---- */

/* A box is runs of neighbours in the file: its trailing dimensions that are whole, times the one before them. */
static status *read_box(struct safetensors *s, const struct safetensor *t, const struct box *b, unsigned char *out)
{
    const uint64_t size = dtype_bytes(t->dtype), *dim = t->shape.dim;
    uint64_t stride[LAYOUT_DIMS], run = 1, runs = 1, step = 1;
    int inner = t->shape.ndim;
    for (int d = t->shape.ndim - 1; d >= 0; d--) {
        stride[d] = step;
        step *= dim[d];
    }
    for (bool whole = true; inner > 0 && whole; inner--) {
        run *= b->len[inner - 1];
        whole = b->len[inner - 1] == dim[inner - 1];
    }
    for (int d = 0; d < inner; d++)
        runs *= b->len[d];
    for (uint64_t r = 0; r < runs && run; r++) {
        uint64_t left = r, from = 0;
        for (int d = t->shape.ndim - 1; d >= 0; d--) {
            uint64_t at = d < inner ? left % b->len[d] : 0;
            left = d < inner ? left / b->len[d] : left;
            from += (b->off[d] + at) * stride[d];
        }
        TRY(store_get(s->store, s->file[t->file], t->at + from * size, out + r * run * size, run * size));
    }
    s->bytes_read += runs * run * size;
    return NULL;
}

status *safetensors_read(struct safetensors *s, const struct safetensor *t, const struct piece *p, void *out)
{
    struct piece_box box[LAYOUT_BOXES];
    TRY(status_wrap(piece_check(&t->shape, p), "%s: tensor \"%s\"", s->url, t->name));
    int n = piece_boxes(t->shape.ndim, p, box);
    for (int i = 0; i < n; i++)
        TRY(read_box(s, t, &box[i].box, (unsigned char *)out + box[i].start * dtype_bytes(t->dtype)));
    return NULL;
}
