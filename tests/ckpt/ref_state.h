/* ref_state: jobs of some ranks that save, refer to and load one small model, and what is then in the root.
 *
 * The model: "w" (frozen, several checksum blocks), "n" (frozen, five bytes, on all ranks), "t" (trained). Each element
 * follows from (tensor, element, version), so that a load says whose bytes it got. For files that include cmocka.h. */
#ifndef TESSERA_TESTS_CKPT_REF_STATE_H
#define TESSERA_TESTS_CKPT_REF_STATE_H

#include "ckpt/ckpt.h"
#include "ckpt/refs.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 37, COLS = 16001, SMALL = 5, T_COLS = 3 };

/* What a rank holds: its rows of w and t (whole: all of them on every rank), and all of n. */
struct held {
    tessera_state *state;
    uint64_t first, rows;
    uint32_t *w, *t;
    uint8_t n[SMALL + 1];
};

struct shape_of_job {
    bool whole;
    const struct tessera_reference *w, *n; /* NULL: stored by itself */
};

static inline uint32_t value(char tensor, uint64_t elem, uint64_t version)
{
    return (uint32_t)((elem * 2654435761u) ^ (version * 40503u + (unsigned char)tensor));
}

static inline status *add(struct held *h, const char *name, int dtype, uint64_t d0, uint64_t d1, uint64_t first,
                          uint64_t rows, void *data, const struct tessera_reference *ref)
{
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model", a.name = name, a.dtype = dtype, a.ndim = d1 ? 2 : 1;
    a.shape[0] = d0, a.shape[1] = a.length[1] = d1;
    a.offset[0] = first, a.length[0] = rows;
    a.data = data, a.reference = ref, a.frozen = name[0] != 't';
    return tessera_state_add_tensor(h->state, &a);
}

static inline status *held_open(struct comm *world, const struct shape_of_job *x, struct held *h)
{
    uint64_t r = (uint64_t)world->rank, n = (uint64_t)world->size;
    *h = (struct held){ .rows = ROWS };
    if (!x->whole) {
        h->first = ROWS * r / n;
        h->rows = ROWS * (r + 1) / n - h->first;
    }
    h->w = mem_calloc(ROWS * COLS, sizeof *h->w);
    h->t = mem_calloc(ROWS * T_COLS, sizeof *h->t);
    TRY(tessera_state_new(NULL, &h->state));
    TRY(add(h, "w", TESSERA_U32, ROWS, COLS, h->first, h->rows, h->w, x->w));
    TRY(add(h, "n", TESSERA_U8, SMALL, 0, 0, SMALL, h->n, x->n));
    return add(h, "t", TESSERA_I32, ROWS, T_COLS, h->first, h->rows, h->t, NULL);
}

static inline void held_close(struct held *h)
{
    tessera_state_free(h->state);
    mem_free(h->w);
    mem_free(h->t);
}

static inline void fill(struct held *h, uint64_t w, uint64_t n, uint64_t t)
{
    for (uint64_t e = 0; e < h->rows * COLS; e++)
        h->w[e] = value('w', h->first * COLS + e, w);
    for (uint64_t e = 0; e < h->rows * T_COLS; e++)
        h->t[e] = value('t', h->first * T_COLS + e, t);
    for (uint64_t e = 0; e < SMALL; e++)
        h->n[e] = (uint8_t)value('n', e, n);
}

static inline bool holds(const struct held *h, uint64_t w, uint64_t n, uint64_t t)
{
    bool same = true;
    for (uint64_t e = 0; e < h->rows * COLS; e++)
        same = same && h->w[e] == value('w', h->first * COLS + e, w);
    for (uint64_t e = 0; e < h->rows * T_COLS; e++)
        same = same && h->t[e] == value('t', h->first * T_COLS + e, t);
    for (uint64_t e = 0; e < SMALL; e++)
        same = same && h->n[e] == (uint8_t)value('n', e, n);
    return same;
}

static inline status *open_in(struct comm *world, struct store *s, bool read_only, int keep_last, bool frozen,
                              tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    o.keep_last = keep_last;
    o.reference_frozen = frozen;
    o.rewind = 1;
    return ckpt_open(&o, world, NULL, s, out);
}

static inline status *save(tessera *t, struct held *h, uint64_t step)
{
    uint64_t committed;
    TRY(tessera_save(t, h->state, step));
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == step);
    return NULL;
}

/* One save of a step with the versions given, by a job of its own. */
struct one_save {
    struct store *store;
    struct shape_of_job shape;
    uint64_t step, w, n, t;
    int keep_last;
};

static inline status *save_job(struct comm *world, void *arg)
{
    const struct one_save *x = arg;
    struct held h;
    tessera *t;
    TRY(open_in(world, x->store, false, x->keep_last, false, &t));
    TRY(held_open(world, &x->shape, &h));
    fill(&h, x->w, x->n, x->t);
    status *st = save(t, &h, x->step);
    held_close(&h);
    return status_first(st, tessera_close(t));
}

static inline status *load_job(struct comm *world, void *arg)
{
    const struct one_save *x = arg;
    struct held h;
    tessera *t;
    TRY(open_in(world, x->store, true, 0, false, &t));
    TRY(held_open(world, &x->shape, &h));
    status *st = tessera_load(t, h.state, x->step);
    if (!st && !holds(&h, x->w, x->n, x->t))
        st = ERR(INTERNAL, "step %llu does not hold w%llu n%llu t%llu", (unsigned long long)x->step,
                 (unsigned long long)x->w, (unsigned long long)x->n, (unsigned long long)x->t);
    held_close(&h);
    return status_first(st, tessera_close(t));
}

static inline void put(int ranks, struct one_save x)
{
    assert_ok(comm_threads_run(ranks, save_job, &x));
}

static inline void refused(int ranks, struct one_save x, enum status_code code, const char *words)
{
    assert_ok(expect_error(comm_threads_run(ranks, save_job, &x), code, words, __FILE__, __LINE__));
}

/* At every number of ranks and both cuts. */
static inline void loads(struct one_save x)
{
    for (int ranks = 1; ranks <= 4; ranks++) {
        x.shape = (struct shape_of_job){ .whole = ranks % 2 == 0 };
        assert_ok(comm_threads_run(ranks, load_job, &x));
    }
}

static inline struct metadata *read_step(struct store *s, uint64_t step)
{
    struct metadata *m;
    assert_ok(commit_read(s, step, &m));
    return m;
}

static inline const struct meta_tensor *find(const struct metadata *m, const char *name)
{
    int64_t i = metadata_find(m, "model", name);
    assert_true(i >= 0);
    return &m->tensor[i];
}

/* The step's tensor lies in `owner` (0: in itself) of that root (NULL: the same), and is called `as` there. */
static inline void lies_in(struct store *s, uint64_t step, const char *name, uint64_t owner, const char *url,
                           const char *as)
{
    struct metadata *m = read_step(s, step);
    const struct meta_tensor *t = find(m, name);
    const struct meta_owner *o = metadata_owner(m, t);
    assert_int_equal(o != NULL, owner != 0);
    if (o) {
        assert_int_equal(o->step, owner);
        assert_string_equal(t->owner_name, as);
        assert_string_equal(t->owner_part, "model");
        assert_true(!o->url == !url && (!url || strstr(o->url, url)));
        struct metadata *of = url ? NULL : read_step(s, owner);
        assert_true(!of || (o->attempt == of->attempt && o->run_id == of->run_id));
        metadata_free(of);
    }
    metadata_free(m);
}

/* Bytes of all files of a step's folder. */
static inline uint64_t bytes_of(struct store *s, uint64_t step)
{
    char dir[STEP_DIR_BYTES];
    struct store_list l;
    uint64_t n = 0;
    commit_step_dir(step, dir);
    assert_ok(store_list(s, dir, &l));
    for (size_t i = 0; i < l.count; i++)
        n += l.entry[i].info.bytes;
    store_list_free(&l);
    return n;
}

static inline void steps_are(struct store *s, const char *want)
{
    struct step_list l;
    char have[256] = "";
    assert_ok(commit_list(s, &l));
    for (size_t i = 0; i < l.count; i++)
        snprintf(have + strlen(have), sizeof have - strlen(have), "%s%llu", i ? " " : "",
                 (unsigned long long)l.step[i]);
    step_list_free(&l);
    assert_string_equal(have, want);
}

static inline struct tessera_reference to(uint64_t step)
{
    struct tessera_reference r = TESSERA_REFERENCE;
    r.step = step;
    return r;
}

static inline status *newest_job(struct comm *world, void *arg)
{
    struct one_save *x = arg;
    struct held h;
    tessera *t;
    uint64_t step;
    TRY(open_in(world, x->store, true, 0, false, &t));
    TRY(held_open(world, &x->shape, &h));
    status *st = tessera_load_newest(t, h.state, &step);
    if (!st && (step != x->step || !holds(&h, x->w, x->n, x->t)))
        st = ERR(INTERNAL, "step %llu came, or other bytes", (unsigned long long)step);
    held_close(&h);
    return status_first(st, tessera_close(t));
}

static inline void expect_cli(const char *root, const char *words, enum status_code code, const char *message)
{
    char text[256], *argv[8], *save_at = NULL;
    int argc = 0;
    snprintf(text, sizeof text, words, root);
    for (char *w = strtok_r(text, " ", &save_at); w; w = strtok_r(NULL, " ", &save_at))
        argv[argc++] = w;
    argv[argc] = NULL;
    status *st = ckpt_cli(argc, argv);
    if (status_code(st) != code || !strstr(status_message(st), message))
        fail_msg("%s: %s: %s", words, status_code_name(status_code(st)), status_message(st));
    status_free(st);
}

#endif
