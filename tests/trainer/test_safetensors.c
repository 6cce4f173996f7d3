/* safetensors: bytes of a small file written out by hand, round trips of every type by whole tensors and by random
 * pieces, what is on storage before the end, and headers and indexes that a stranger might send. */
#include "trainer/hf/safetensors.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "tests/support/test_root.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { PATH_BYTES = 128 };

static void path_in(const char *dir, const char *name, char path[PATH_BYTES])
{
    snprintf(path, PATH_BYTES, "%s/%s", dir, name);
}

static void put_file(const char *dir, const char *name, const void *bytes, size_t n)
{
    struct store *s;
    OK(store_open(dir, true, &s));
    OK(store_put(s, name, bytes, n, STORE_REPLACE));
    store_close(s);
}

/* Caller frees. */
static unsigned char *get_file(const char *dir, const char *name, size_t *n)
{
    struct store *s;
    void *bytes;
    OK(store_open(dir, false, &s));
    OK(store_get_all(s, name, 1 << 20, &bytes, n));
    store_close(s);
    return bytes;
}

static size_t entries(const char *dir)
{
    struct store *s;
    struct store_list l = { 0 };
    OK(store_open(dir, false, &s));
    OK(store_list(s, "", &l));
    size_t n = l.count;
    store_list_free(&l);
    store_close(s);
    return n;
}

/* A file of this header and so many bytes 0, 1, 2, ... of data. */
static void put_header(const char *dir, const char *name, const char *header, size_t data)
{
    size_t n = strlen(header);
    unsigned char *bytes = mem_alloc(8 + n + data);
    put_u64(bytes, n);
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < data; i++)
        bytes[8 + n + i] = (unsigned char)i;
    put_file(dir, name, bytes, 8 + n + data);
    mem_free(bytes);
}

/* ---- known bytes ---- */

static void bytes_by_hand(void **state)
{
    (void)state;
    /* b before a: larger elements first; the header is padded to a multiple of 8 */
    static const char text[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                               "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                               "\"a\":{\"dtype\":\"BF16\",\"shape\":[3,1],\"data_offsets\":[4,10]}}";
    const struct safetensors_spec list[] = { { "a", DTYPE_BF16, { 2, { 3, 1 } } }, { "b", DTYPE_F32, { 1, { 1 } } } };
    char dir[FOLDER_BYTES], path[PATH_BYTES];
    struct safetensors_writer *w;
    folder_make(dir);
    path_in(dir, "out", path);
    OK(safetensors_create(path, list, 2, 1000, &w));
    assert_int_equal(safetensors_order(w, 0), 1);
    assert_int_equal(safetensors_order(w, 1), 0);
    OK(safetensors_append(w, "01234", 5));
    OK(safetensors_append(w, "56789", 5));
    OK(safetensors_extra(w, "config.json", "{}"));
    OK(safetensors_finish(w));
    size_t n, header = (sizeof text - 1 + 7) / 8 * 8;
    unsigned char *got = get_file(path, "model.safetensors", &n);
    assert_int_equal(n, 8 + header + 10);
    assert_int_equal(get_u64(got), header);
    assert_memory_equal(got + 8, text, sizeof text - 1);
    for (size_t i = sizeof text - 1; i < header; i++)
        assert_int_equal(got[8 + i], ' ');
    assert_memory_equal(got + 8 + header, "0123456789", 10);
    mem_free(got);
    assert_int_equal(entries(path), 2);
    assert_int_equal(entries(dir), 1);
    folder_remove(dir);
}

/* ---- round trips ---- */

static const struct safetensors_spec all[] = {
    { "f64", DTYPE_F64, { 2, { 3, 5 } } },     { "f32", DTYPE_F32, { 2, { 7, 4 } } },
    { "f16", DTYPE_F16, { 1, { 9 } } },        { "bf16", DTYPE_BF16, { 3, { 4, 3, 5 } } },
    { "e4m3", DTYPE_F8E4M3, { 2, { 2, 8 } } }, { "e5m2", DTYPE_F8E5M2, { 2, { 3, 3 } } },
    { "e8m0", DTYPE_E8M0, { 1, { 5 } } },      { "i64", DTYPE_I64, { 1, { 3 } } },
    { "i32", DTYPE_I32, { 2, { 2, 2 } } },     { "i16", DTYPE_I16, { 1, { 11 } } },
    { "i8", DTYPE_I8, { 4, { 2, 3, 2, 3 } } }, { "u64", DTYPE_U64, { 0, { 0 } } },
    { "u32", DTYPE_U32, { 1, { 6 } } },        { "u16", DTYPE_U16, { 2, { 1, 7 } } },
    { "u8", DTYPE_U8, { 1, { 13 } } },         { "bool", DTYPE_BOOL, { 2, { 5, 1 } } },
    { "empty", DTYPE_F32, { 2, { 0, 4 } } },   { "q\"uo\\te.\xc3\xa9", DTYPE_F32, { 1, { 2 } } },
};
enum { ALL = sizeof all / sizeof *all, MOST_BYTES = 512 };

static uint64_t bytes_of(const struct safetensors_spec *t)
{
    bool ok;
    return shape_volume(&t->shape, &ok) * dtype_bytes(t->dtype);
}

static unsigned char byte_at(uint64_t tensor, uint64_t i)
{
    return (unsigned char)(tensor * 37 + i * 11 + (i >> 5));
}

/* All tensors at path, `step` bytes at a time. */
static void write_all(const char *path, uint64_t shard_bytes, size_t step)
{
    struct safetensors_writer *w;
    unsigned char *bytes = mem_alloc(ALL * MOST_BYTES);
    size_t n = 0;
    OK(safetensors_create(path, all, ALL, shard_bytes, &w));
    for (uint64_t i = 0; i < ALL; i++) {
        uint64_t k = safetensors_order(w, i);
        for (uint64_t b = 0; b < bytes_of(&all[k]); b++)
            bytes[n++] = byte_at(k, b);
    }
    for (size_t at = 0; at < n; at += step)
        OK(safetensors_append(w, bytes + at, step < n - at ? step : n - at));
    mem_free(bytes);
    OK(safetensors_finish(w));
}

/* A piece of t by the definition of one: every element of the box in row-major order, those of the run kept. */
static size_t piece_plainly(uint64_t tensor, const struct piece *p, unsigned char *out)
{
    const struct safetensors_spec *t = &all[tensor];
    size_t size = dtype_bytes(t->dtype), n = 0;
    uint64_t volume = box_volume(t->shape.ndim, &p->box);
    for (uint64_t e = p->begin; e < p->end && e < volume; e++) {
        uint64_t left = e, at = 0, stride = 1;
        for (int d = t->shape.ndim - 1; d >= 0; d--) {
            at += (p->box.off[d] + left % p->box.len[d]) * stride;
            left /= p->box.len[d];
            stride *= t->shape.dim[d];
        }
        for (size_t b = 0; b < size; b++)
            out[n++] = byte_at(tensor, at * size + b);
    }
    return n;
}

static uint64_t draw(uint64_t *s, uint64_t below)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (*s >> 33) % below;
}

static struct piece draw_piece(uint64_t *s, const struct shape *shape)
{
    struct box b = { 0 };
    for (int d = 0; d < shape->ndim; d++) {
        b.off[d] = draw(s, shape->dim[d] + 1);
        b.len[d] = draw(s, shape->dim[d] - b.off[d] + 1);
        if (draw(s, 3) == 0)
            b.off[d] = 0, b.len[d] = shape->dim[d];
    }
    struct piece p = piece_of_box(shape->ndim, &b);
    if (draw(s, 2)) {
        p.begin = draw(s, p.end + 1);
        p.end = p.begin + draw(s, p.end - p.begin + 1);
    }
    return p;
}

static void check_tensor(struct safetensors *s, uint64_t k, uint64_t *seed)
{
    unsigned char got[MOST_BYTES], want[MOST_BYTES];
    const struct safetensor *t = safetensors_find(s, all[k].name);
    assert_non_null(t);
    assert_int_equal(t->dtype, all[k].dtype);
    assert_int_equal(t->bytes, bytes_of(&all[k]));
    assert_memory_equal(&t->shape, &all[k].shape, sizeof t->shape);
    for (int i = 0; i < 60; i++) {
        struct piece p = i ? draw_piece(seed, &t->shape) : piece_whole(&t->shape);
        size_t n = piece_plainly(k, &p, want);
        uint64_t before = s->bytes_read;
        OK(safetensors_read(s, t, &p, got));
        assert_int_equal(s->bytes_read - before, n);
        assert_memory_equal(got, want, n);
    }
    struct piece beyond = piece_whole(&t->shape);
    beyond.end++;
    FAILS(ST_INVALID, all[k].name, safetensors_read(s, t, &beyond, got));
}

static void round_trips(void **state)
{
    (void)state;
    static const uint64_t shard[] = { UINT64_MAX, 200, 64, 1 };
    uint64_t seed = 5;
    for (size_t i = 0; i < sizeof shard / sizeof *shard; i++) {
        char dir[FOLDER_BYTES], path[PATH_BYTES];
        struct safetensors *s;
        folder_make(dir);
        path_in(dir, "out", path);
        write_all(path, shard[i], 1 + i * 7);
        assert_int_equal(entries(dir), 1);
        OK(safetensors_open(path, &s));
        assert_int_equal(s->count, ALL);
        assert_int_equal(s->bytes_read, 0);
        assert_true(i == 0 ? s->files == 1 : s->files > i + 1);
        assert_int_equal(entries(path), s->files + (i > 0));
        uint64_t most[ALL] = { 0 }, tensors[ALL] = { 0 };
        for (uint64_t k = 0; k < ALL; k++) {
            check_tensor(s, k, &seed);
            most[s->tensor[k].file] += s->tensor[k].bytes;
            tensors[s->tensor[k].file]++;
        }
        for (uint32_t f = 0; f < s->files; f++)
            assert_true(most[f] <= shard[i] || tensors[f] == 1 || most[f] == 0);
        assert_null(safetensors_find(s, "f3"));
        safetensors_close(s);
        folder_remove(dir);
    }
}

static void same_list_same_bytes(void **state)
{
    (void)state;
    char dir[FOLDER_BYTES], path[2][PATH_BYTES], file[PATH_BYTES];
    struct safetensors *s;
    folder_make(dir);
    path_in(dir, "one", path[0]);
    path_in(dir, "two", path[1]);
    write_all(path[0], 150, 1000);
    write_all(path[1], 150, 3);
    OK(safetensors_open(path[0], &s));
    for (uint32_t f = 0; f <= s->files; f++) {
        const char *name = f < s->files ? s->file[f] : "model.safetensors.index.json";
        size_t n[2];
        unsigned char *bytes[2] = { get_file(path[0], name, &n[0]), get_file(path[1], name, &n[1]) };
        assert_int_equal(n[0], n[1]);
        assert_memory_equal(bytes[0], bytes[1], n[0]);
        mem_free(bytes[0]);
        mem_free(bytes[1]);
    }
    snprintf(file, sizeof file, "%s", s->file[0]);
    safetensors_close(s);
    /* one file of a folder, without its index */
    char one[2 * PATH_BYTES];
    snprintf(one, sizeof one, "%s/%s", path[0], file);
    OK(safetensors_open(one, &s));
    assert_int_equal(s->files, 1);
    assert_true(s->count > 0 && s->count < ALL);
    safetensors_close(s);
    folder_remove(dir);
}

static void nothing_before_the_end(void **state)
{
    (void)state;
    char dir[FOLDER_BYTES], path[PATH_BYTES];
    const struct safetensors_spec list[] = { { "a", DTYPE_U8, { 1, { 4 } } }, { "b", DTYPE_U8, { 1, { 4 } } } };
    struct safetensors_writer *w;
    struct safetensors *s;
    folder_make(dir);
    path_in(dir, "out", path);
    OK(safetensors_create(path, list, 2, 4, &w));
    OK(safetensors_append(w, "abcdef", 6));
    FAILS(ST_NOT_FOUND, "", safetensors_open(path, &s));
    assert_int_equal(entries(dir), 1); /* out.part-... */
    safetensors_abort(w);
    assert_int_equal(entries(dir), 0);

    OK(safetensors_create(path, list, 2, 4, &w));
    OK(safetensors_append(w, "abcdef", 6));
    FAILS(ST_INVALID, "not all there", safetensors_finish(w));
    assert_int_equal(entries(dir), 0);

    OK(safetensors_create(path, list, 2, 4, &w));
    OK(safetensors_append(w, "abcdefgh", 8));
    FAILS(ST_INVALID, "1 bytes more", safetensors_append(w, "i", 1));
    safetensors_abort(w);
    assert_int_equal(entries(dir), 0);

    put_file(dir, "out/kept", "x", 1);
    FAILS(ST_EXISTS, "is there already", safetensors_create(path, list, 2, 4, &w));
    assert_int_equal(entries(path), 1);
    folder_remove(dir);
}

static void refused_lists(void **state)
{
    (void)state;
    char dir[FOLDER_BYTES], path[PATH_BYTES];
    struct safetensors_writer *w;
    const struct safetensors_spec twice[] = { { "a", DTYPE_U8, { 1, { 4 } } }, { "a", DTYPE_U8, { 1, { 4 } } } },
                                  packed[] = { { "p", DTYPE_U4X2, { 1, { 4 } } } },
                                  latin[] = { { "\xe9", DTYPE_U8, { 1, { 4 } } } },
                                  meta[] = { { "__metadata__", DTYPE_U8, { 1, { 4 } } } };
    folder_make(dir);
    path_in(dir, "out", path);
    FAILS(ST_INVALID, "\"a\" is listed twice", safetensors_create(path, twice, 2, 100, &w));
    FAILS(ST_UNSUPPORTED, "\"p\"", safetensors_create(path, packed, 1, 100, &w));
    FAILS(ST_INVALID, "UTF-8", safetensors_create(path, latin, 1, 100, &w));
    FAILS(ST_INVALID, "own entry", safetensors_create(path, meta, 1, 100, &w));
    assert_int_equal(entries(dir), 0);
    folder_remove(dir);
}

static void splits(void **state)
{
    (void)state;
    static const char *const rows[][3] = {
        { "/a/b", "/a", "b" },
        { "a", ".", "a" },
        { "/a", "/", "a" },
        { "a/b/", "a", "b" },
        { "file:/a/b", "file:/a", "b" },
        { "file:/a", "file:/", "a" },
        { "file:a", "file:.", "a" },
        { "mem:x/y", "mem:x", "y" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *parent, *last;
        OK(safetensors_split(rows[i][0], &parent, &last));
        assert_string_equal(parent, rows[i][1]);
        assert_string_equal(last, rows[i][2]);
        mem_free(parent);
        mem_free(last);
    }
}

/* ---- strangers ---- */

#define T(dtype, shape, begin, end) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

static void hostile_headers(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data;
        enum status_code code;
        const char *words;
    } rows[] = {
        { "{}", 0, ST_OK, "" },
        { "{\"a\":" T("F32", "[2]", "0", "8") "}   ", 8, ST_OK, "" },
        { "{\"__metadata__\":{\"any\":\"thing\"},\"a\":" T("F32", "[]", "0", "4") "}", 4, ST_OK, "" },
        { "{\"e\":" T("F32", "[0]", "4", "4") ",\"a\":" T("F32", "[]", "0", "4") "}", 4, ST_OK, "" },
        { "", 4, ST_CORRUPT, "does not begin with {" },
        { " {}", 0, ST_CORRUPT, "does not begin with {" },
        { "[]", 0, ST_CORRUPT, "does not begin with {" },
        { "{\"a\":", 0, ST_CORRUPT, "not a JSON object" },
        { "{} x", 0, ST_CORRUPT, "not a JSON object" },
        { "{\"a\":3}", 0, ST_CORRUPT, "\"a\": not an object of" },
        { "{\"a\":{}}", 0, ST_CORRUPT, "not an object of" },
        { "{\"a\":" T("F32", "[2]", "0", "8") ",\"a\":" T("F32", "[2]", "0", "8") "}", 8, ST_CORRUPT, "duplicate" },
        { "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[]}}", 4, ST_CORRUPT, "duplicate" },
        { "{\"a\":" T("F31", "[2]", "0", "8") "}", 8, ST_UNSUPPORTED, "dtype \"F31\" is not one of F64, F32" },
        { "{\"a\":" T("f32", "[2]", "0", "8") "}", 8, ST_UNSUPPORTED, "dtype \"f32\"" },
        { "{\"a\":{\"dtype\":1,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, ST_CORRUPT, "dtype is not a text" },
        { "{\"a\":" T("F32", "2", "0", "8") "}", 8, ST_CORRUPT, "shape is not a list" },
        { "{\"a\":" T("F32", "[-2]", "0", "8") "}", 8, ST_CORRUPT, "dimension 0" },
        { "{\"a\":" T("F32", "[1,2.0]", "0", "8") "}", 8, ST_CORRUPT, "dimension 1" },
        { "{\"a\":" T("F32", "[99999999999999999999]", "0", "8") "}", 8, ST_CORRUPT, "integer" },
        { "{\"a\":" T("F32", "[1,1,1,1,1,1,1,1,2]", "0", "8") "}", 8, ST_CORRUPT, "9 dimensions" },
        { "{\"a\":" T("F32", "[4294967296,4294967296]", "0", "0") "}", 0, ST_CORRUPT, "more bytes than a file" },
        { "{\"a\":" T("F64", "[4611686018427387904]", "0", "0") "}", 0, ST_CORRUPT, "more bytes than a file" },
        { "{\"a\":" T("F32", "[3]", "0", "8") "}", 8, ST_CORRUPT, "make 12 bytes, data_offsets 8" },
        { "{\"a\":" T("F32", "[2]", "8", "0") "}", 8, ST_CORRUPT, "0 <= begin <= end" },
        { "{\"a\":" T("F32", "[2]", "-8", "0") "}", 8, ST_CORRUPT, "0 <= begin <= end" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, ST_CORRUPT, "[begin, end]" },
        { "{\"a\":" T("F32", "[2]", "0", "8") "}", 7, ST_CORRUPT, "bytes [0, 8) of data that are 7 long" },
        { "{\"a\":" T("F32", "[2]", "0", "8") "}", 9, ST_CORRUPT, "end at byte 8 of 9" },
        { "{\"a\":" T("F32", "[2]", "1", "9") "}", 9, ST_CORRUPT,
          "begins at 1 of the data, where the one before has "
          "ended at 0" },
        { "{\"a\":" T("F32", "[2]", "0", "8") ",\"b\":" T("U8", "[4]", "6", "10") "}", 10, ST_CORRUPT,
          "\"b\": begins at 6 of the data, where the one before still runs to 8" },
        { "{\"a\":" T("F32", "[2]", "0", "8") ",\"b\":" T("F32", "[2]", "0", "8") "}", 8, ST_CORRUPT, "still runs to" },
        { "{\"a\":" T("U8", "[1]", "9223372036854775806", "9223372036854775807") "}", 1, ST_CORRUPT, "of data" },
        { "{\"a\\u0000b\":" T("U8", "[1]", "0", "1") "}", 1, ST_CORRUPT, "not a JSON object" },
        { "{\"a\xff\":" T("U8", "[1]", "0", "1") "}", 1, ST_CORRUPT, "not a JSON object" },
        { "{\"a\\nb\":3}", 0, ST_CORRUPT, "\"a?b\"" },
    };
    char dir[FOLDER_BYTES];
    folder_make(dir);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct safetensors *s = NULL;
        put_header(dir, "model.safetensors", rows[i].header, rows[i].data);
        status *st = safetensors_open(dir, &s);
        if (status_code(st) != rows[i].code || !strstr(status_message(st), rows[i].words) ||
            (st && !strstr(status_message(st), "model.safetensors")))
            fail_msg("row %zu, %s: %s", i, rows[i].header, status_message(st));
        status_free(st);
        safetensors_close(s);
    }
    folder_remove(dir);
}

static void hostile_lengths(void **state)
{
    (void)state;
    static const uint64_t length[] = { 3, 100000001, UINT64_MAX, UINT64_MAX - 7, 1ull << 63 };
    char dir[FOLDER_BYTES];
    struct safetensors *s;
    unsigned char bytes[10] = { 0 };
    folder_make(dir);
    FAILS(ST_NOT_FOUND, "neither", safetensors_open(dir, &s));
    for (size_t i = 0; i < sizeof length / sizeof *length; i++) {
        put_u64(bytes, length[i]);
        put_file(dir, "model.safetensors", bytes, sizeof bytes);
        FAILS(ST_CORRUPT, "in a file of 10", safetensors_open(dir, &s));
    }
    put_file(dir, "model.safetensors", bytes, 7);
    FAILS(ST_CORRUPT, "shorter than", safetensors_open(dir, &s));
    folder_remove(dir);
}

static void hostile_indexes(void **state)
{
    (void)state;
    static const struct {
        const char *index, *words;
    } rows[] = {
        { "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\"}}", NULL },
        { "{\"weight_map\":{\"a\":\"x.safetensors\",\"d\":\"z.safetensors\"}}", "\"a\" is in two files" },
        { "{\"weight_map\":{}}", NULL },
        { "{}", "no weight_map" },
        { "{\"weight_map\":[]}", "no weight_map" },
        { "nonsense", "does not begin" },
        { "{\"weight_map\":{\"a\":3}}", "something else" },
        { "{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "not a file of this folder" },
        { "{\"weight_map\":{\"a\":\"..\"}}", "weight_map names" },
        { "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"gone.safetensors\"}}", "gone.safetensors" },
        { "{\"weight_map\":{\"a\":\"y.safetensors\",\"b\":\"x.safetensors\"}}", "weight_map has it in" },
        { "{\"weight_map\":{\"b\":\"y.safetensors\",\"c\":\"x.safetensors\"}}", "weight_map has it in no file" },
        { "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\",\"c\":\"y.safetensors\"}}",
          "\"c\" is not in y.safetensors" },
    };
    char dir[FOLDER_BYTES];
    folder_make(dir);
    put_header(dir, "x.safetensors", "{\"a\":" T("U8", "[2]", "0", "2") "}", 2);
    put_header(dir, "y.safetensors", "{\"b\":" T("U8", "[3]", "0", "3") "}", 3);
    put_header(dir, "z.safetensors", "{\"a\":" T("U8", "[2]", "0", "2") "}", 2);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct safetensors *s = NULL;
        const char *index = rows[i].index;
        put_file(dir, "model.safetensors.index.json", index, strlen(index));
        status *st = safetensors_open(dir, &s);
        if (!rows[i].words != !st || (st && !strstr(status_message(st), rows[i].words)))
            fail_msg("row %zu, %s: %s", i, index, status_message(st));
        status_free(st);
        safetensors_close(s);
    }
    folder_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_by_hand),        cmocka_unit_test(round_trips),
        cmocka_unit_test(same_list_same_bytes), cmocka_unit_test(nothing_before_the_end),
        cmocka_unit_test(refused_lists),        cmocka_unit_test(splits),
        cmocka_unit_test(hostile_headers),      cmocka_unit_test(hostile_lengths),
        cmocka_unit_test(hostile_indexes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
