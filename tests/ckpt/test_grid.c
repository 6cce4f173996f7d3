/* The promise that every byte comes back, through files and in memory: a drawn model is saved by one drawn mesh of
 * ranks (threads) and loaded, or resharded, by another, and every element of every rank is what its place in the tensor
 * says; however runs were stored: as given, merged, or gathered first.
 *
 * A case is a number: TESSERA_GRID_FIRST (0) and TESSERA_GRID_CASES (200; 30 under sanitizers) say which are run, so
 * that nightly runs go on where this one ends and a failing case can be run alone. */
#include "ckpt/commit.h"
#include "comm/base/dtype.h"
#include "comm/base/mem.h"
#include "tests/ckpt/draw.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/huge_pages.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { TENSORS = 6, MAX_RANKS = 8 };
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { CASES = 30 }; /* these look for wrong code, not for odd cuts */
#else
enum { CASES = 200 };
#endif

/* Without huge pages slots are filled by way of the readers' own memory. */
/* A tensor, and how this mesh cuts it. */
struct drawn {
    char name[32];
    const char *part;
    enum dtype dtype;
    int alias_of; /* -1: none */
    struct layout layout;
};

struct side {
    struct mesh mesh;
    struct drawn tensor[TENSORS];
    int count;
};

struct grid_case {
    struct store *store;
    uint32_t number;
    struct side save, load;
    uint64_t staging;
    int irregular;
    int node; /* ranks of one; 0: all, who share memory; -N: every N-th rank */
};

/* Bytes go through shared memory within a node, and as messages between nodes. */
static status *open_handle(struct comm *world, const struct grid_case *c, const struct tessera_options *o, tessera **t)
{
    char host[16];
    int r = world->rank;
    TRY(ckpt_open(o, world, NULL, c->store, t));
    snprintf(host, sizeof host, "h%d", c->node > 0 ? r / c->node : c->node < 0 ? r % -c->node : 0);
    return ckpt_set_node(*t, host);
}

static struct mesh draw_mesh(struct draw *d)
{
    struct mesh m = { .size = { 1, 1, 1, 1, 1 } };
    for (int k = 0; k < 3; k++) { /* three factors of 1 to 3 on any axes, as long as they fit */
        int axis = (int)draw_below(d, MESH_AXES), by = (int)draw_between(d, 1, 3);
        if (mesh_world(&m) * by <= MAX_RANKS)
            m.size[axis] *= by;
    }
    return m;
}

static struct shape draw_shape(struct draw *d)
{
    static const uint64_t sizes[] = { 0, 1, 2, 3, 5, 7, 16, 31, 64, 129 };
    struct shape s = { .ndim = (int)draw_below(d, 5) };
    uint64_t volume = 1;
    for (int k = 0; k < s.ndim; k++) {
        s.dim[k] = sizes[draw_below(d, sizeof sizes / sizeof *sizes)];
        if (!s.dim[k] && draw_below(d, 4)) /* empty tensors, but not one in two */
            s.dim[k] = 4;
        if (volume * s.dim[k] > 1 << 17)
            s.dim[k] = 2;
        volume *= s.dim[k];
    }
    if (s.ndim == 1 && draw_below(d, 8) == 0)
        s.dim[0] = (1 << 20) + draw_below(d, 1 << 19); /* more than a checksum block */
    return s;
}

/* Box cuts along drawn axes, runs over the others or none, a stage or all of them. */
static void draw_layout(struct draw *d, const struct mesh *m, struct layout *l)
{
    unsigned used = 0;
    for (int k = 0; k < LAYOUT_DIMS; k++)
        l->cut[k] = -1;
    for (int k = 0; k < l->shape.ndim; k++) {
        int axis = 1 + (int)draw_below(d, MESH_AXES - 1);
        if (draw_below(d, 2) || used >> axis & 1)
            continue;
        l->cut[k] = axis;
        used |= 1u << axis;
    }
    l->stage = draw_below(d, 2) ? (int)draw_below(d, (uint64_t)m->size[MESH_PP]) : -1;
    l->run_axes = 0;
    if (draw_below(d, 2))
        l->run_axes = (unsigned)draw_below(d, 1u << MESH_AXES) & ~used & ~(1u << MESH_PP);
    static const uint64_t aligns[] = { 0, 1, 3, 1024 };
    l->run_align = aligns[draw_below(d, 4)];
    l->bucket_begin = l->bucket_total =
        0; /* a lone tensor: boxes of one tensor differ in volume when cuts are uneven */
}

static void draw_tensor(struct draw *d, int i, struct drawn *t)
{
    static const char *const parts[] = { "model", "optim", "teacher/model" };
    static const enum dtype dtypes[] = { DTYPE_F32, DTYPE_BF16, DTYPE_U8, DTYPE_F64, DTYPE_I16 };
    *t = (struct drawn){ .part = parts[draw_below(d, 3)], .dtype = dtypes[draw_below(d, 5)], .alias_of = -1 };
    snprintf(t->name, sizeof t->name, "layers.%d/w%d", i / 2, i);
    t->layout.shape = draw_shape(d);
}

static void draw_case(uint32_t number, struct grid_case *c)
{
    struct draw d = draw_from(2026, number);
    c->number = number;
    c->save.mesh = draw_mesh(&d);
    c->load.mesh = draw_mesh(&d);
    c->save.count = c->load.count = (int)draw_between(&d, 1, TENSORS);
    c->staging = draw_below(&d, 3) ? 0 : 1;
    c->node = (int)(number * 5 / 3 % 6) - 2;
    for (int i = 0; i < c->save.count; i++) {
        struct drawn *a = &c->save.tensor[i], *b = &c->load.tensor[i];
        draw_tensor(&d, i, a);
        if (i && draw_below(&d, 5) == 0 && c->save.tensor[i - 1].alias_of < 0) { /* tied weights */
            char name[sizeof a->name];
            memcpy(name, a->name, sizeof name);
            *a = c->save.tensor[i - 1];
            memcpy(a->name, name, sizeof name);
            a->alias_of = i - 1;
        }
        *b = *a;
        draw_layout(&d, &c->save.mesh, &a->layout);
        draw_layout(&d, &c->load.mesh, &b->layout);
    }
}

/* ---- one rank */

static void element(uint32_t number, int tensor, uint64_t global, size_t bytes, unsigned char *out)
{
    uint64_t x = (global + 1) * UINT64_C(0x9e3779b97f4a7c15) + (uint64_t)tensor * 77777 + number;
    x ^= x >> 31;
    memcpy(out, &x, bytes);
}

/* Row-major index in the tensor of the run's element i. */
static uint64_t global_of(const struct shape *s, const struct piece *p, uint64_t i)
{
    return box_global(s, &p->box, p->begin + i);
}

struct held {
    tessera_state *state;
    struct piece piece[TENSORS];
    unsigned char *data[TENSORS];
};

static void close_held(struct held *h)
{
    tessera_state_free(h->state);
    for (int i = 0; i < TENSORS; i++)
        mem_free(h->data[i]);
}

static status *open_held(const struct side *s, int rank, struct held *h)
{
    *h = (struct held){ .state = NULL };
    TRY(tessera_state_new(NULL, &h->state));
    for (int i = 0; i < s->count; i++) {
        const struct drawn *t = &s->tensor[i];
        struct tessera_tensor a = TESSERA_TENSOR;
        h->piece[i] = layout_piece(&t->layout, &s->mesh, rank);
        const struct piece *p = &h->piece[i];
        h->data[i] = mem_calloc(piece_elems(p) + 1, dtype_bytes(t->dtype));
        a.part = t->part;
        a.name = t->name;
        a.dtype = (int)t->dtype;
        a.ndim = t->layout.shape.ndim;
        for (int k = 0; k < a.ndim; k++) {
            a.shape[k] = t->layout.shape.dim[k];
            a.offset[k] = p->box.off[k];
            a.length[k] = p->box.len[k];
        }
        if (t->alias_of >= 0)
            a.alias_of = s->tensor[t->alias_of].name;
        else if (!piece_elems(p)) /* 0, 0 would be the whole box */
            memset(a.length, 0, sizeof a.length), memset(a.offset, 0, sizeof a.offset);
        a.run_begin = p->begin;
        a.run_end = p->end;
        if (!piece_elems(p) && !a.ndim)
            continue; /* a scalar has no empty piece */
        a.data = h->data[i];
        TRY(tessera_state_add_tensor(h->state, &a));
    }
    return NULL;
}

static void fill_held(const struct grid_case *c, struct held *h)
{
    for (int i = 0; i < c->save.count; i++) {
        const struct drawn *d = &c->save.tensor[i];
        size_t size = dtype_bytes(d->dtype);
        for (uint64_t e = 0; e < piece_elems(&h->piece[i]); e++)
            element(c->number, i, global_of(&d->layout.shape, &h->piece[i], e), size, h->data[i] + e * size);
    }
}

/* Every element is what was saved; aliases' bytes are their targets'. */
static status *check_held(const struct grid_case *c, const struct held *h, int rank)
{
    for (int i = 0; i < c->load.count; i++) {
        const struct drawn *d = &c->load.tensor[i];
        size_t size = dtype_bytes(d->dtype);
        if (d->alias_of >= 0)
            continue;
        for (uint64_t e = 0; e < piece_elems(&h->piece[i]); e++) {
            unsigned char want[8];
            element(c->number, i, global_of(&d->layout.shape, &h->piece[i], e), size, want);
            if (memcmp(h->data[i] + e * size, want, size) != 0)
                return ERR(INTERNAL, "%s/%s: element %llu of rank %d", d->part, d->name, (unsigned long long)e, rank);
        }
    }
    return NULL;
}

static void spoil_held(const struct grid_case *c, struct held *h)
{
    for (int i = 0; i < c->save.count; i++)
        memset(h->data[i], 0xa5, piece_elems(&h->piece[i]) * dtype_bytes(c->save.tensor[i].dtype));
}

/* Every stored piece is a box: the ranks of this grid hold the whole of each box between them. */
static status *check_boxes(const struct grid_case *c)
{
    struct metadata *m;
    TRY(commit_read(c->store, 2, &m));
    for (uint64_t i = 0; i < m->tensor_count; i++)
        for (uint64_t k = 0; k < m->tensor[i].piece_count; k++)
            EXPECT(piece_is_box(m->tensor[i].shape.ndim, &m->piece[m->tensor[i].first_piece + k].piece));
    metadata_free(m);
    return NULL;
}

static status *save_side(struct comm *world, void *arg)
{
    const struct grid_case *c = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct held h;
    tessera *t;
    uint64_t committed;
    o.staging_bytes = c->staging;
    o.irregular = c->irregular;
    TRY(ckpt_open(&o, world, NULL, c->store, &t));
    TRY(open_held(&c->save, world->rank, &h));
    for (uint64_t step = 1; step <= 2; step++) { /* planned, then by that plan */
        fill_held(c, &h);
        TRY(tessera_save(t, h.state, step));
        TRY(tessera_fence(t, NULL, 0, NULL));
        spoil_held(c, &h);
        TRY(tessera_wait(t, &committed));
        EXPECT(committed == step);
    }
    EXPECT(ckpt_plans_made(t) == 1);
    close_held(&h);
    TRY(world->rank || !c->irregular ? NULL : check_boxes(c));
    return tessera_close(t);
}

static status *load_side(struct comm *world, void *arg)
{
    const struct grid_case *c = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct held h;
    tessera *t;
    o.read_only = (int)(c->number % 2);
    TRY(open_handle(world, c, &o, &t));
    TRY(open_held(&c->load, world->rank, &h));
    TRY(tessera_load(t, h.state, 2));
    TRY(check_held(c, &h, world->rank));
    struct tessera_load_report r = TESSERA_LOAD_REPORT;
    tessera_get_load_report(t, &r);
    EXPECT(r.storage_bytes >= r.unique_bytes && r.storage_bytes <= r.unique_bytes + r.unique_bytes / 20 + (1 << 20));
    close_held(&h);
    return tessera_close(t);
}

/* A rank beyond a mesh holds nothing. */
static status *open_side(const struct side *s, int rank, struct held *h)
{
    *h = (struct held){ .state = NULL };
    return rank < mesh_world(&s->mesh) ? open_held(s, rank, h) : tessera_state_new(NULL, &h->state);
}

/* The same without files: all ranks of both meshes in one job. */
static status *reshard_sides(struct comm *world, void *arg)
{
    const struct grid_case *c = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct held from, to;
    tessera *t;
    o.read_only = (int)(c->number % 2);
    TRY(open_handle(world, c, &o, &t));
    TRY(open_side(&c->save, world->rank, &from));
    TRY(open_side(&c->load, world->rank, &to));
    if (world->rank < mesh_world(&c->save.mesh))
        fill_held(c, &from);
    for (int again = 0; again < 2; again++) {
        TRY(tessera_reshard(t, from.state, to.state, NULL));
        if (world->rank < mesh_world(&c->load.mesh))
            TRY(check_held(c, &to, world->rank));
    }
    close_held(&from);
    close_held(&to);
    return tessera_close(t);
}

static uint32_t setting(const char *name, uint32_t otherwise)
{
    const char *v = getenv(name);
    return v && *v ? (uint32_t)strtoul(v, NULL, 10) : otherwise;
}

static status *run_case(struct grid_case *c)
{
    struct root r = root_open(true);
    c->store = r.store;
    int save = mesh_world(&c->save.mesh), load = mesh_world(&c->load.mesh);
    status *st = comm_threads_run(save, save_side, c);
    if (!st)
        st = comm_threads_run(load, load_side, c);
    if (!st && !c->irregular) /* reads no file */
        st = comm_threads_run(save > load ? save : load, reshard_sides, c);
    root_close(&r);
    return st;
}

static void test_grid(void **state)
{
    (void)state;
    uint32_t first = setting("TESSERA_GRID_FIRST", 0), cases = setting("TESSERA_GRID_CASES", CASES);
    for (uint32_t i = first; i < first + cases; i++) {
        static struct grid_case c;
        memset(&c, 0, sizeof c);
        draw_case(i, &c);
        char from[128], to[128];
        mesh_text(&c.save.mesh, from, sizeof from);
        mesh_text(&c.load.mesh, to, sizeof to);
        status *st = NULL;
        no_huge = i / 2 % 2;
        for (c.irregular = TESSERA_AS_GIVEN; !st && c.irregular <= TESSERA_GATHER; c.irregular++)
            st = run_case(&c);
        if (st)
            fail_msg("case %u, %s to %s, irregular %d: %s", i, from, to, c.irregular - 1, status_message(st));
    }
    printf("%u cases from %u on: every byte came back\n", cases, first);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_grid) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
