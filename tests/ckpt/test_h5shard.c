/* h5shard: the bytes it makes, with payload written at its offsets by plain writes, are a file that libhdf5 reads.
 *
 * `test_h5shard write PATH` writes a sample of every dtype and kind of piece instead, for test_h5_values.py, which
 * computes the values by itself: element g (row-major, of the whole tensor) of a tensor is number_of(dtype, g). */
#include "ckpt/h5shard.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>
#include <hdf5.h>

/* IEEE half of a small multiple of 1/4. */
static uint16_t half_of(double v)
{
    uint16_t sign = v < 0 ? 0x8000 : 0;
    v = v < 0 ? -v : v;
    if (v == 0)
        return 0;
    int e = 0;
    for (; v >= 2; v /= 2)
        e++;
    for (; v < 1; v *= 2)
        e--;
    return (uint16_t)(sign | (e + 15) << 10 | (int)((v - 1) * 1024));
}

/* The bytes of element g. */
static void put_element(enum dtype t, uint64_t g, unsigned char *to)
{
    int64_t whole = (int64_t)((g * 7 + 3) % 97);
    double real = (double)(whole - 48) * 0.25;
    float single = (float)real;
    uint16_t narrow = t == DTYPE_BF16 ? bf16_from_f32(single) : half_of(real);
    switch (t) {
    case DTYPE_F64:
        memcpy(to, &real, 8);
        break;
    case DTYPE_F32:
        memcpy(to, &single, 4);
        break;
    case DTYPE_F16:
    case DTYPE_BF16:
        memcpy(to, &narrow, 2);
        break;
    case DTYPE_F8E5M2:
        *to = (unsigned char)((uint64_t)(g % 3 == 0) << 7 | (g % 5 + 13) << 2 | g % 4);
        break;
    case DTYPE_I64:
    case DTYPE_I32:
    case DTYPE_I16:
    case DTYPE_I8:
        whole -= 48;
        memcpy(to, &whole, dtype_bytes(t));
        break;
    case DTYPE_U64:
    case DTYPE_U32:
    case DTYPE_U16:
    case DTYPE_U8:
        memcpy(to, &whole, dtype_bytes(t));
        break;
    case DTYPE_BOOL:
        *to = (unsigned char)(whole % 2);
        break;
    default:
        *to = (unsigned char)(g * 7 + 3);
        break;
    }
}

/* Write the image and its payload as any store would: header at 0, each payload at its offset. */
static void write_file(const char *path, const struct h5shard_item *item, size_t count, const struct h5shard_image *i)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(i->header, 1, i->header_bytes, f), i->header_bytes);
    for (size_t k = 0; k < count; k++) {
        size_t size = dtype_bytes(item[k].dtype);
        uint64_t n = piece_elems(&item[k].piece);
        unsigned char *bytes = mem_alloc(n * size);
        for (uint64_t e = 0; e < n; e++)
            put_element(item[k].dtype, box_global(&item[k].shape, &item[k].piece.box, item[k].piece.begin + e),
                        bytes + e * size);
        assert_int_equal(fseek(f, (long)i->offset[k], SEEK_SET), 0);
        assert_int_equal(fwrite(bytes, size, n, f), n);
        mem_free(bytes);
    }
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    assert_int_equal(ftell(f), i->file_bytes);
    assert_int_equal(fclose(f), 0);
}

enum { SAMPLE_MAX = 256 };
struct sample {
    struct h5shard_item item[SAMPLE_MAX];
    char tensor[SAMPLE_MAX][64], name[SAMPLE_MAX][16];
    size_t count;
};

static void sample_add(struct sample *s, const char *tensor, enum dtype t, struct shape shape, struct piece p)
{
    size_t i = s->count++;
    int same = 0;
    for (size_t k = 0; k < i; k++)
        same += !strcmp(s->tensor[k], tensor);
    snprintf(s->tensor[i], sizeof s->tensor[i], "%s", tensor);
    snprintf(s->name[i], sizeof s->name[i], "p%d", same);
    s->item[i] =
        (struct h5shard_item){ .tensor = s->tensor[i], .name = s->name[i], .dtype = t, .shape = shape, .piece = p };
}

/* Every dtype as: two column boxes and two runs of a third of a matrix; a scalar; an empty tensor; an empty run. */
static void sample_fill(struct sample *s)
{
    s->count = 0;
    for (int t = 1; t < DTYPE_COUNT; t++) {
        char name[64];
        enum dtype type = (enum dtype)t;
        struct shape m = { .ndim = 2, .dim = { 5, 11 } }, scalar = { 0 }, empty = { .ndim = 2, .dim = { 0, 7 } };
        struct shape cube = { .ndim = 3, .dim = { 2, 3, 4 } };
        struct box left = { { 0, 0 }, { 5, 3 } }, mid = { { 0, 3 }, { 5, 2 } }, right = { { 0, 5 }, { 5, 6 } };
        struct piece a = piece_of_box(2, &right), b = a, none = a;
        a.end = b.begin = 13;
        none.end = 0;
        snprintf(name, sizeof name, "model.layers.%d.weight.%s", t, dtype_name(type));
        sample_add(s, name, type, m, piece_of_box(2, &left));
        sample_add(s, name, type, m, a);
        sample_add(s, name, type, m, none);
        sample_add(s, name, type, m, b);
        sample_add(s, name, type, m, piece_of_box(2, &mid));
        snprintf(name, sizeof name, "deep/er/scalar.%s", dtype_name(type));
        sample_add(s, name, type, scalar, piece_whole(&scalar));
        snprintf(name, sizeof name, "deep/empty.%s", dtype_name(type));
        sample_add(s, name, type, empty, piece_whole(&empty));
        snprintf(name, sizeof name, "cube.%s", dtype_name(type));
        sample_add(s, name, type, cube, piece_whole(&cube));
    }
}

static void make(const struct h5shard_item *item, size_t count, struct h5shard_image *i)
{
    status *st = h5shard_image(item, count, i);
    if (st)
        fail_msg("%s", status_message(st));
}

/* Offsets, one by one: in order, aligned, adjacent, behind the header; the file ends with the last. */
static void check_places(const struct h5shard_item *item, size_t count, const struct h5shard_image *i)
{
    uint64_t at = i->header_bytes;
    assert_true(i->header_bytes && i->header_bytes % 4096 == 0);
    for (size_t k = 0; k < count; k++) {
        uint64_t bytes = piece_elems(&item[k].piece) * dtype_bytes(item[k].dtype);
        if (!bytes) {
            assert_int_equal(i->offset[k], 0);
            continue;
        }
        assert_int_equal(i->offset[k], (at + 4095) / 4096 * 4096);
        at = i->offset[k] + bytes;
    }
    assert_int_equal(i->file_bytes, at);
}

static herr_t check_times(hid_t object, const char *name, const H5O_info_t *info, void *count)
{
    (void)object;
    if (info->atime || info->mtime || info->ctime || info->btime)
        fail_msg("%s carries a time", name);
    ++*(int *)count;
    return 0;
}

/* Read every dataset back through libhdf5 and compare its raw bytes. */
static void check_file(const char *path, const struct h5shard_item *item, size_t count)
{
    hid_t f = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(f >= 0);
    for (size_t k = 0; k < count; k++) {
        char name[128];
        size_t size = dtype_bytes(item[k].dtype);
        uint64_t n = piece_elems(&item[k].piece);
        snprintf(name, sizeof name, "%s/%s", item[k].tensor, item[k].name);
        hid_t d = H5Dopen2(f, name, H5P_DEFAULT), t = H5Dget_type(d), s = H5Dget_space(d);
        assert_int_equal(H5Tget_size(t), size);
        assert_int_equal(H5Sget_simple_extent_npoints(s), n);
        unsigned char *got = mem_alloc(n * size), want[8];
        assert_true(H5Dread(d, t, H5S_ALL, H5S_ALL, H5P_DEFAULT, got) >= 0);
        for (uint64_t e = 0; e < n; e++) {
            put_element(item[k].dtype, box_global(&item[k].shape, &item[k].piece.box, item[k].piece.begin + e), want);
            assert_memory_equal(got + e * size, want, size);
        }
        mem_free(got);
        H5Sclose(s);
        H5Tclose(t);
        H5Dclose(d);
    }
    int objects = 0;
    assert_true(H5Ovisit2(f, H5_INDEX_NAME, H5_ITER_NATIVE, check_times, &objects, H5O_INFO_TIME) >= 0);
    assert_true((size_t)objects > count);
    assert_true(H5Fclose(f) >= 0);
}

static void test_file(void **state)
{
    (void)state;
    struct sample *s = mem_calloc(1, sizeof *s);
    struct h5shard_image i;
    char path[] = "h5shard.XXXXXX";
    close(mkstemp(path));
    sample_fill(s);
    make(s->item, s->count, &i);
    check_places(s->item, s->count, &i);
    write_file(path, s->item, s->count, &i);
    check_file(path, s->item, s->count);
    struct h5shard_image again;
    make(s->item, s->count, &again);
    assert_int_equal(i.header_bytes, again.header_bytes);
    assert_memory_equal(i.header, again.header, i.header_bytes);
    assert_memory_equal(i.offset, again.offset, s->count * 8);
    h5shard_image_free(&i);
    h5shard_image_free(&again);
    unlink(path);
    mem_free(s);
}

/* Few datasets: a few KiB. None: a file that opens. */
static void test_small(void **state)
{
    (void)state;
    char path[] = "h5shard.XXXXXX";
    close(mkstemp(path));
    struct sample *s = mem_calloc(1, sizeof *s);
    struct shape shape = { .ndim = 2, .dim = { 30, 70 } };
    for (int k = 0; k <= 12; k++) {
        struct h5shard_image i;
        make(s->item, s->count, &i);
        check_places(s->item, s->count, &i);
        assert_true(i.header_bytes <= (k < 4 ? 4096 : k < 8 ? 8192 : 16384));
        write_file(path, s->item, s->count, &i);
        check_file(path, s->item, s->count);
        h5shard_image_free(&i);
        char name[32];
        snprintf(name, sizeof name, "layers.%d.w", k);
        sample_add(s, name, DTYPE_BF16, shape, piece_whole(&shape));
    }
    unlink(path);
    mem_free(s);
}

static void test_errors(void **state)
{
    (void)state;
    struct shape shape = { .ndim = 1, .dim = { 4 } };
    struct piece p = piece_whole(&shape), bad = p;
    bad.end = 5;
    const struct h5shard_item lists[][2] = {
        { { "a", "p0", DTYPE_F32, shape, p }, { "a", "p0", DTYPE_F32, shape, p } },   /* twice */
        { { "a", "p0", DTYPE_F32, shape, p }, { "a/", "p0", DTYPE_F32, shape, p } },  /* twice, spelt otherwise */
        { { "a", "p0", DTYPE_F32, shape, p }, { "a/p0", "x", DTYPE_F32, shape, p } }, /* a dataset is no group */
        { { "a/p0", "x", DTYPE_F32, shape, p }, { "a", "p0", DTYPE_F32, shape, p } },
        { { "a", "p0", DTYPE_F32, shape, p }, { "", "p1", DTYPE_F32, shape, p } },
        { { "a", "p0", DTYPE_F32, shape, p }, { "b", "", DTYPE_F32, shape, p } },
        { { "a", "p0", DTYPE_F32, shape, p }, { "b", "x/y", DTYPE_F32, shape, p } },
        { { "a", "p0", DTYPE_F32, shape, p }, { "b", "p0", DTYPE_NONE, shape, p } },
        { { "a", "p0", DTYPE_F32, shape, p }, { "b", "p0", DTYPE_F32, shape, bad } },
    };
    for (size_t k = 0; k < sizeof lists / sizeof *lists; k++) {
        struct h5shard_image i = { .header = NULL };
        status *st = h5shard_image(lists[k], 2, &i);
        if (status_code(st) != ST_INVALID)
            fail_msg("list %zu: %s %s", k, status_code_name(status_code(st)), status_message(st));
        status_free(st);
        assert_null(i.header);
    }
    struct h5shard_image i;
    make(lists[0], 1, &i); /* and it still works */
    h5shard_image_free(&i);
}

/* Larger than memory: only headers are made. */
static void test_huge(void **state)
{
    (void)state;
    struct shape shape = { .ndim = 2, .dim = { 1u << 20, 1u << 20 } };
    struct piece p = piece_whole(&shape), a = p, b = p;
    a.end = b.begin = 12345678901;
    const struct h5shard_item item[] = { { "w", "p0", DTYPE_BF16, shape, a }, { "w", "p1", DTYPE_BF16, shape, b } };
    struct h5shard_image i;
    make(item, 2, &i);
    check_places(item, 2, &i);
    assert_int_equal(i.header_bytes, 4096);
    h5shard_image_free(&i);
}

static void test_many(void **state)
{
    (void)state;
    enum { N = 2000 };
    struct h5shard_item *item = mem_calloc(N, sizeof *item);
    char(*name)[48] = mem_calloc(N, sizeof *name);
    struct shape shape = { .ndim = 1, .dim = { 3 } };
    for (int k = 0; k < N; k++) {
        snprintf(name[k], sizeof name[k], "model.layers.%d.mlp.up_proj.weight", k);
        item[k] = (struct h5shard_item){ name[k], "p0", DTYPE_F32, shape, piece_whole(&shape) };
    }
    struct h5shard_image i;
    uint64_t t0 = clock_ns();
    make(item, N, &i);
    printf("many: %d datasets, %.0f header bytes each, %.3f s\n", N, (double)i.header_bytes / N,
           ns_to_s(clock_ns() - t0));
    check_places(item, N, &i);
    char path[] = "h5shard.XXXXXX";
    close(mkstemp(path));
    write_file(path, item, N, &i);
    check_file(path, item, N);
    unlink(path);
    h5shard_image_free(&i);
    mem_free(item);
    mem_free(name);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "write")) {
        struct sample *s = mem_calloc(1, sizeof *s);
        struct h5shard_image i;
        sample_fill(s);
        status *st = h5shard_image(s->item, s->count, &i);
        if (st) {
            fprintf(stderr, "%s\n", status_message(st));
            return 1;
        }
        write_file(argv[2], s->item, s->count, &i);
        h5shard_image_free(&i);
        mem_free(s);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_file), cmocka_unit_test(test_small), cmocka_unit_test(test_errors),
        cmocka_unit_test(test_huge), cmocka_unit_test(test_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
