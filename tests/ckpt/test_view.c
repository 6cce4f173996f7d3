/* The view of a step. `test_view write ROOT` saves one state at several meshes, for test_view_h5py.py and
 * test_stranger_reader.py, which know the table below and what every element is. Alone it checks what needs no h5py:
 * when a view is written, what replaces and removes it, and names that collide. */
#include "ckpt/view.h"

#include "ckpt/ckpt.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/comm_threads.h"
#include "tests/support/test_root.h"

#include <hdf5.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- A state, cut by any mesh */

struct row {
    const char *part, *name, *alias_of;
    enum dtype dtype;
    int ndim;
    uint64_t dim[4];
    int tp_dim; /* cut over tp; -1: none */
    int stage;  /* of two, where there are; -1: all */
    bool zero;  /* runs over dp */
};

static const struct row table[] = {
    { "policy/model", "embed.weight", NULL, DTYPE_F32, 2, { 67, 16 }, 0, -1, false },
    { "policy/model", "head.weight", "embed.weight", DTYPE_F32, 2, { 67, 16 }, -1, -1, false },
    { "policy/model", "layers.0.q/weight", NULL, DTYPE_BF16, 2, { 33, 7 }, 1, 0, false },
    { "policy/model", "layers.1.up", NULL, DTYPE_F16, 3, { 12, 5, 6 }, 1, 1, false },
    { "policy/model", "100%_%b", NULL, DTYPE_F32, 1, { 9 }, -1, -1, false },
    { "policy/model", "a", NULL, DTYPE_I32, 1, { 4 }, -1, -1, false },
    { "policy/model", "a/b", NULL, DTYPE_I32, 1, { 5 }, -1, -1, false },
    { "policy/model", "same", NULL, DTYPE_U8, 1, { 6 }, -1, -1, false },
    { "policy", "model/same", NULL, DTYPE_I8, 1, { 7 }, -1, -1, false },
    { "policy/model", "empty", NULL, DTYPE_F32, 2, { 0, 5 }, -1, -1, false },
    { "policy/model", "scalar", NULL, DTYPE_F64, 0, { 0 }, -1, 1, false },
    { "optim", "big.m", NULL, DTYPE_F32, 2, { 300, 1100 }, 0, 0, true },
    { "optim", "cols.v", NULL, DTYPE_F64, 3, { 7, 11, 13 }, 2, 1, true },
    { "optim", "e5m2", NULL, DTYPE_F8E5M2, 2, { 5, 7 }, 1, 0, true },
    { "optim", "e4m3", NULL, DTYPE_F8E4M3, 2, { 5, 7 }, 0, 0, true },
    { "optim", "e8m0", NULL, DTYPE_E8M0, 4, { 3, 1, 5, 2 }, 2, 1, true },
    { "optim", "u4x2", NULL, DTYPE_U4X2, 1, { 31 }, 0, 1, true },
    { "optim", "i64", NULL, DTYPE_I64, 2, { 9, 9 }, 1, -1, true },
    { "optim", "i16", NULL, DTYPE_I16, 2, { 1, 19 }, 1, -1, true },
    { "optim", "u64", NULL, DTYPE_U64, 2, { 19, 1 }, 0, -1, true },
    { "optim", "u32", NULL, DTYPE_U32, 3, { 2, 3, 4 }, 0, -1, true },
    { "optim", "u16", NULL, DTYPE_U16, 1, { 8 }, 0, -1, true },
    { "optim", "bool", NULL, DTYPE_BOOL, 2, { 6, 6 }, 1, -1, true },
    { "optim", "scalar", NULL, DTYPE_F32, 0, { 0 }, -1, -1, true },
};
enum { ROWS = sizeof table / sizeof *table };

/* step s is saved at meshes[s - 1]: pp, dp, ep, cp, tp; zero: runs over dp are cut at multiples of align */
static const struct {
    int size[MESH_AXES];
    uint64_t align;
} meshes[] = {
    { { 1, 1, 1, 1, 1 }, 1 }, { { 1, 1, 1, 1, 3 }, 1 }, { { 2, 1, 1, 1, 2 }, 1 },  { { 1, 3, 1, 1, 1 }, 1 },
    { { 2, 3, 1, 1, 2 }, 1 }, { { 1, 5, 1, 1, 1 }, 7 }, { { 1, 2, 1, 1, 4 }, 16 }, { { 1, 2, 1, 1, 1 }, 1 },
};
enum { MESHES = sizeof meshes / sizeof *meshes };

/* The last step writes no bytes of these: they are those of an older one. */
static const struct {
    const char *name;
    uint64_t step;
} references[] = { { "big.m", 6 }, { "cols.v", 5 }, { "i64", 5 }, { "100%_%b", 5 } };

static uint64_t mix(uint64_t t, uint64_t g, uint64_t step)
{
    uint64_t x = g * 0x9e3779b97f4a7c15u + t * 0xbf58476d1ce4e5b9u + step * 0x94d049bb133111ebu + 1;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

/* Element g of tensor t as it is stored: numbers that each float type holds exactly. */
static uint64_t element_bits(uint64_t t, uint64_t g, uint64_t step)
{
    uint64_t h = mix(t, g, step), bits = 0;
    float f = (float)((int64_t)(h % 2000003) - 1000001);
    double d = (double)((int64_t)(h % 2000003) - 1000001) / 4;
    switch (table[t].dtype) {
    case DTYPE_F64:
        memcpy(&bits, &d, 8);
        return bits;
    case DTYPE_F32:
        memcpy(&bits, &f, 4);
        return bits;
    case DTYPE_BF16: /* -127 to 127: 8 bits of precision */
        f = (float)((int64_t)(h % 255) - 127);
        memcpy(&bits, &f, 4);
        return bits >> 16;
    case DTYPE_F16: /* sign, exponent 1 to 30, mantissa */
        return (h & 0x83ff) | (1 + h / 65536 % 30) << 10;
    case DTYPE_F8E5M2:
        return (h & 0x83) | (1 + h / 256 % 30) << 2;
    case DTYPE_BOOL:
        return h & 1;
    default:
        return h;
    }
}

static uint64_t row_volume(const struct row *r)
{
    uint64_t n = 1;
    for (int d = 0; d < r->ndim; d++)
        n *= r->dim[d];
    return n;
}

static struct piece row_piece(const struct row *r, const struct mesh *m, int rank, uint64_t align)
{
    struct layout l = { .shape = { .ndim = r->ndim }, .stage = m->size[MESH_PP] > 1 ? r->stage : -1 };
    for (int d = 0; d < r->ndim; d++) {
        l.shape.dim[d] = r->dim[d];
        l.cut[d] = d == r->tp_dim ? MESH_TP : -1;
    }
    if (r->zero && m->size[MESH_DP] > 1) {
        l.run_axes = 1u << MESH_DP;
        l.run_align = align;
    }
    return layout_piece(&l, m, rank);
}

struct job {
    struct store *store;
    uint64_t step;
    struct mesh mesh;
    uint64_t align;
    int view;
    int keep_last;
    bool refers;
    const char *owner; /* URL of the owners' root; NULL: the same */
};

/* False: the tensor has bytes of its own. */
static bool reference_of(const struct job *j, const char *name, struct tessera_reference *r)
{
    for (size_t i = 0; j->refers && i < sizeof references / sizeof *references; i++)
        if (strcmp(references[i].name, name) == 0) {
            r->url = j->owner;
            r->step = references[i].step;
            return true;
        }
    return false;
}

static status *add_row(tessera_state *s, uint64_t t, const struct job *j, int rank, void **memory)
{
    const struct row *r = &table[t];
    struct piece p = row_piece(r, &j->mesh, rank, j->align);
    size_t bytes = dtype_bytes(r->dtype);
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = r->part;
    a.name = r->name;
    a.alias_of = r->alias_of;
    a.dtype = (int)r->dtype;
    a.ndim = r->ndim;
    a.frozen = t % 3 == 0;
    struct tessera_reference older = TESSERA_REFERENCE;
    a.reference = reference_of(j, r->name, &older) ? &older : NULL;
    memcpy(a.shape, r->dim, sizeof r->dim);
    if (!r->alias_of && !piece_elems(&p) && row_volume(r))
        return NULL; /* held by others */
    if (!r->alias_of) {
        uint64_t n = piece_elems(&p);
        unsigned char *to = mem_alloc(n * bytes + 1);
        if (!to)
            return ERR(NO_MEMORY, "a tensor");
        for (uint64_t i = 0; i < n; i++) {
            uint64_t at = p.begin + i, g = 0, scale = 1;
            for (int d = r->ndim - 1; d >= 0; d--) {
                g += (p.box.off[d] + at % p.box.len[d]) * scale;
                at /= p.box.len[d];
                scale *= r->dim[d];
            }
            uint64_t bits = element_bits(t, g, j->step);
            memcpy(to + i * bytes, &bits, bytes);
        }
        *memory = to;
        memcpy(a.offset, p.box.off, sizeof a.offset);
        memcpy(a.length, p.box.len, sizeof a.length);
        a.run_begin = p.begin;
        a.run_end = p.end;
        a.data = to;
    }
    return tessera_state_add_tensor(s, &a);
}

static status *save_rank(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t = NULL;
    tessera_state *s = NULL;
    void *memory[ROWS] = { NULL };
    struct tessera_options o = TESSERA_OPTIONS;
    o.view = j->view;
    o.keep_last = j->keep_last;
    o.build = "test";
    memcpy(o.mesh, j->mesh.size, sizeof o.mesh);
    TRY(ckpt_open(&o, world, NULL, j->store, &t));
    TRY(tessera_state_new(t, &s));
    for (uint64_t i = 0; i < ROWS; i++)
        TRY(add_row(s, i, j, world->rank, &memory[i]));
    TRY(tessera_state_add_blob(s, "extra", "config", 0, "a: 1\n", 5));
    TRY(tessera_state_add_blob(s, "rng", "state", 1, &world->rank, sizeof world->rank));
    TRY(tessera_save(t, s, j->step));
    uint64_t committed = 0;
    TRY(tessera_wait(t, &committed));
    if (committed != j->step)
        return ERR(INTERNAL, "step %d was not committed", (int)j->step);
    status *st = tessera_close(t);
    tessera_state_free(s);
    for (uint64_t i = 0; i < ROWS; i++)
        mem_free(memory[i]);
    return st;
}

static status *run_job(struct job *j, int at)
{
    int ranks = 1;
    j->align = meshes[at].align;
    for (int a = 0; a < MESH_AXES; a++)
        ranks *= j->mesh.size[a] = meshes[at].size[a];
    return comm_threads_run(ranks, save_rank, j);
}

static status *save(struct store *store, uint64_t step, int at, int view, int keep_last)
{
    struct job j = { .store = store, .step = step, .view = view, .keep_last = keep_last };
    return run_job(&j, at);
}

/* Step 1 of ROOT.other, whose tensors by reference lie in ROOT. */
static status *write_other(const char *root)
{
    char path[512];
    struct store *s = NULL;
    snprintf(path, sizeof path, "%s.other", root);
    status *st = store_open(path, true, &s);
    struct job j = { .store = s, .step = 1, .refers = true, .owner = root };
    if (!st)
        st = run_job(&j, 1);
    store_close(s);
    return st;
}

static int write_root(const char *root)
{
    struct store *s = NULL;
    status *st = store_open(root, true, &s);
    for (int i = 0; i < MESHES && !st; i++)
        st = run_job(&(struct job){ .store = s, .step = (uint64_t)i + 1, .refers = i == MESHES - 1 }, i);
    store_close(s);
    if (!st)
        st = write_other(root);
    if (st)
        fprintf(stderr, "%s\n", status_message(st));
    return st ? 1 : 0;
}

/* Step 1 of one tensor of so many MiB, all zero, of two pieces in files that take no room: rows [0, 1/2) and the rest.
 */
static int write_large(const char *root, uint64_t mib)
{
    enum { HEADER = 100 };
    struct store *s = NULL;
    const uint64_t half = mib << 19, blocks = mib / 2;
    char key[2][STORE_KEY_BYTES];
    void *zero = mem_calloc(1, META_BLOCK_BYTES);
    uint32_t *crc = mem_calloc(2 * blocks, sizeof *crc);
    struct meta_file file[2];
    struct meta_piece piece[2];
    struct meta_tensor t = { .part = (char *)(size_t) "model",
                             .name = (char *)(size_t) "w",
                             .dtype = DTYPE_F32,
                             .shape = { 2, { 2 * mib, 1 << 17 } },
                             .piece_count = 2 };
    status *st = store_open(root, true, &s);
    for (uint64_t i = 0; i < 2 * blocks; i++)
        crc[i] = crc32c(0, zero, META_BLOCK_BYTES);
    for (int i = 0; i < 2 && !st; i++) {
        struct store_writer *w = NULL;
        commit_shard_key(1, "model", i, 0xaa, key[i]);
        file[i] = (struct meta_file){ .name = strchr(key[i], '/') + 1, .bytes = 4096 + half, .header_bytes = HEADER };
        file[i].header_crc = crc32c(0, zero, HEADER);
        piece[i] = (struct meta_piece){ { { { (uint64_t)i * mib, 0 }, { mib, 1 << 17 } }, 0, half / 4 },
                                        (uint32_t)i,
                                        4096,
                                        half,
                                        (uint64_t)i * blocks };
        st = store_writer_open(s, key[i], 4096 + half, &w);
        if (!st)
            st = store_writer_finish(w);
    }
    struct metadata m = { .run_id = 1,
                          .attempt = 0xaa,
                          .step = 1,
                          .mesh = { { 1, 2, 1, 1, 1 } },
                          .world = 2,
                          .file = file,
                          .tensor = &t,
                          .piece = piece,
                          .crc = crc,
                          .file_count = 2,
                          .tensor_count = 1,
                          .piece_count = 2,
                          .crc_count = 2 * blocks };
    if (!st)
        st = commit_put(s, &m);
    store_close(s);
    if (st)
        fprintf(stderr, "%s\n", status_message(st));
    mem_free(zero);
    mem_free(crc);
    return st ? 1 : 0;
}

/* ---- Tests */

static bool there(struct store *s, const char *key)
{
    struct store_info info;
    status *st = store_stat(s, key, &info);
    bool yes = !st;
    status_free(st);
    return yes;
}

#define VIEW(n) "step-00000000000" #n "/view.h5"

static void test_when(void **state)
{
    (void)state;
    struct root r = root_open(true);
    assert_ok(save(r.store, 1, 4, 0, 0));
    assert_true(there(r.store, VIEW(1)));
    assert_ok(save(r.store, 2, 1, -1, 0));
    assert_false(there(r.store, VIEW(2)));
    assert_ok(save(r.store, 3, 1, 1, 2)); /* retention takes the view with its step */
    assert_true(there(r.store, VIEW(3)));
    assert_false(there(r.store, VIEW(1)));
    struct store_list l;
    assert_ok(store_list(r.store, "step-000000000001", &l));
    assert_int_equal(l.count, 0);
    store_list_free(&l);

    struct gc_options gc = { .age_seconds = 0 };
    struct gc_result swept = { 0 };
    assert_ok(commit_gc(r.store, &gc, NULL, NULL, &swept)); /* a committed step's stays */
    assert_true(there(r.store, VIEW(3)));
    struct verify_result v;
    assert_ok(store_put(r.store, VIEW(3), "not a view", 10, STORE_REPLACE));
    assert_ok(commit_verify(r.store, 3, NULL, NULL, &v)); /* it is none of the step's bytes */
    assert_int_equal(v.damages, 0);
    assert_ok(store_remove(r.store, "step-000000000003/metadata.pb"));
    assert_ok(commit_gc(r.store, &gc, NULL, NULL, &swept)); /* an uncommitted one's does not */
    assert_false(there(r.store, VIEW(3)));
    root_close(&r);
}

static void test_other_stores(void **state)
{
    (void)state;
    struct root r = root_open(false);
    assert_ok(save(r.store, 1, 1, 1, 0)); /* a save does not mind */
    assert_false(there(r.store, VIEW(1)));
    struct metadata *m = NULL;
    assert_ok(commit_read(r.store, 1, &m));
    status *st = view_write(r.store, m);
    assert_int_equal(status_code(st), ST_UNSUPPORTED);
    assert_non_null(strstr(status_message(st), "mem:"));
    assert_null(strchr(status_message(st), '\n'));
    status_free(st);
    metadata_free(m);
    root_close(&r);
}

/* The view of the number that is committed anew is not the old one. */
static void test_anew(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct fake_step *x = fake_step_make(3, 0xa, "big");
    assert_ok(fake_step_put_files(r.store, x));
    assert_ok(store_put(r.store, VIEW(3), "old", 3, STORE_REPLACE));
    assert_ok(commit_put(r.store, &x->m));
    assert_false(there(r.store, VIEW(3)));
    assert_ok(view_write(r.store, &x->m));
    assert_true(there(r.store, VIEW(3)));
    fake_step_free(x);
    root_close(&r);
}

/* ---- Paths that collide, read back by libhdf5 */

static void flat_metadata(struct metadata *m, struct meta_tensor *t, const char *const (*names)[3], size_t n)
{
    for (size_t i = 0; i < n; i++)
        t[i] = (struct meta_tensor){ .part = (char *)(size_t)names[i][0],
                                     .name = (char *)(size_t)names[i][1],
                                     .alias_of = (char *)(size_t)names[i][2],
                                     .dtype = DTYPE_U8,
                                     .shape = { 1, { 0 } } };
    *m = (struct metadata){ .mesh = { { 1, 1, 1, 1, 1 } }, .world = 1, .tensor = t, .tensor_count = n };
}

static void expect_dataset(hid_t f, const char *path)
{
    hid_t d = H5Dopen2(f, path, H5P_DEFAULT);
    if (d < 0)
        fail_msg("no dataset %s", path);
    H5Dclose(d);
}

static void test_collisions(void **state)
{
    (void)state;
    static const char *const names[][3] = { { "a", "b", "b/c" },  { "a", "b/c", NULL },   { "a", "b/c/d", NULL },
                                            { "a/b", "c", NULL }, { "a/b/c", "_", NULL }, { "x", "y", NULL },
                                            { "x", "z", "y" } };
    struct meta_tensor t[7];
    struct metadata m;
    void *buf;
    size_t n;
    flat_metadata(&m, t, names, 7);
    assert_ok(view_make(&m, &buf, &n));
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_fapl_core(access, 4096, false);
    H5Pset_file_image(access, buf, n);
    mem_free(buf);
    hid_t f = H5Fopen("image", H5F_ACC_RDONLY, access);
    assert_true(f >= 0);
    expect_dataset(f, "/a/b/c/d");
    expect_dataset(f, "/a/b/c/_");   /* of part a/b/c, its own name */
    expect_dataset(f, "/a/b/c/__");  /* a: b/c stepped aside */
    expect_dataset(f, "/a/b/c/___"); /* a/b: c */
    expect_dataset(f, "/a/b/_");     /* the alias */
    expect_dataset(f, "/x/y");
    expect_dataset(f, "/x/z");
    char target[64] = "";
    assert_true(H5Lget_val(f, "/a/b/_", target, sizeof target, H5P_DEFAULT) >= 0);
    assert_string_equal(target, "/a/b/c/__");
    H5Fclose(f);
    H5Pclose(access);
}

/* As many mappings as a view has unasked. */
static void test_many(void **state)
{
    (void)state;
    enum { N = VIEW_PIECES };
    struct metadata m = {
        .mesh = { { 1, 1, 1, 1, 1 } }, .world = 1, .tensor_count = 1, .piece_count = N, .file_count = 1
    };
    struct meta_file file = { .name = (char *)(size_t) "model-00000.0000000000000001.h5" };
    struct meta_tensor t = { .part = (char *)(size_t) "model",
                             .name = (char *)(size_t) "w",
                             .dtype = DTYPE_F32,
                             .shape = { 2, { N, 3 } },
                             .piece_count = N };
    struct meta_piece *p = mem_calloc(N, sizeof *p);
    for (uint64_t i = 0; i < N; i++)
        p[i] = (struct meta_piece){ .piece = { { { i, 0 }, { 1, 3 } }, 0, 3 }, .bytes = 12 };
    m.file = &file;
    m.tensor = &t;
    m.piece = p;
    void *buf;
    size_t n;
    assert_ok(view_make(&m, &buf, &n));
    assert_true(n > N * 50 && n < (size_t)N * 300);
    mem_free(buf);
    mem_free(p);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "write") == 0)
        return write_root(argv[2]);
    if (argc == 4 && strcmp(argv[1], "large") == 0)
        return write_large(argv[2], strtoull(argv[3], NULL, 10));
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_when), cmocka_unit_test(test_other_stores),
                                        cmocka_unit_test(test_anew), cmocka_unit_test(test_collisions),
                                        cmocka_unit_test(test_many) };
    return cmocka_run_group_tests_name("view", tests, NULL, NULL);
}
