/* Loads of a part of a step: selection, roles, casts, lists of what does not fit, and listings, over 1 to 4 ranks.
 *
 * The step: three tensors in policy/model, two in teacher/model, one in optim, each element a number that follows from
 * the tensor and the element and that every float type holds exactly (or, for "odd", rounds). */
#include "ckpt/cast.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { ROWS = 11, COLS = 3, ELEMS = ROWS * COLS, MOST = 16 };

/* A state whose tensors are ROWS x COLS, cut by rows; memory as f64, however it is stored. */
struct some {
    tessera_state *state;
    int count;
    int dtype[MOST];
    uint64_t first, rows;
    unsigned char memory[MOST][(ELEMS + 1) * 2 * 8]; /* room for strides of two */
    bool strided[MOST];
};

static double number(int tensor, uint64_t elem)
{
    return (double)((int)(elem % 7) - 3) * (tensor + 1) + (tensor == 2 ? (double)elem / 3 : 0);
}

static status *add(struct some *s, const char *part, const char *name, int dtype, const uint64_t shape[2], bool strided,
                   const char *alias)
{
    static const int64_t two[2] = { 2 * COLS, 2 };
    struct tessera_tensor a = TESSERA_TENSOR;
    int i = s->count++;
    a.part = part, a.name = name, a.dtype = dtype, a.ndim = 2, a.data = s->memory[i], a.alias_of = alias;
    a.shape[0] = shape ? shape[0] : ROWS, a.shape[1] = shape ? shape[1] : COLS;
    a.offset[0] = shape ? 0 : s->first, a.length[0] = shape ? 0 : s->rows, a.length[1] = a.shape[1];
    a.stride = strided ? two : NULL;
    s->strided[i] = strided;
    s->dtype[i] = dtype;
    memset(s->memory[i], 0xee, sizeof s->memory[i]);
    return tessera_state_add_tensor(s->state, &a);
}

static status *begin(struct comm *world, struct some *s)
{
    uint64_t r = (uint64_t)world->rank, n = (uint64_t)world->size;
    memset(s, 0, sizeof *s);
    s->first = ROWS * r / n;
    s->rows = ROWS * (r + 1) / n - s->first;
    return tessera_state_new(NULL, &s->state);
}

/* Element e of the rank's rows, in memory i. */
static unsigned char *place_of(struct some *s, int i, uint64_t e)
{
    return s->memory[i] + e * (s->strided[i] ? 2 : 1) * dtype_bytes((enum dtype)s->dtype[i]);
}

static void fill(struct some *s, int i, int tensor)
{
    for (uint64_t e = 0; e < s->rows * COLS; e++) {
        double x = number(tensor, s->first * COLS + e);
        int32_t n = (int32_t)x;
        if (s->dtype[i] == TESSERA_I32)
            memcpy(place_of(s, i, e), &n, 4);
        else
            cast_elems(DTYPE_F64, (enum dtype)s->dtype[i], &x, place_of(s, i, e), 1);
    }
}

/* Memory i holds tensor `tensor`, which was stored as `stored`; -1: it is untouched. */
static status *holds(struct some *s, int i, int tensor, int stored)
{
    enum dtype t = (enum dtype)s->dtype[i];
    for (uint64_t e = 0; e < s->rows * COLS; e++) {
        unsigned char want[8], was[8];
        double x = tensor < 0 ? 0 : number(tensor, s->first * COLS + e);
        int32_t n = (int32_t)x;
        memset(want, 0xee, sizeof want);
        if (tensor >= 0 && t == DTYPE_I32) {
            memcpy(want, &n, 4);
        } else if (tensor >= 0) {
            cast_elems(DTYPE_F64, (enum dtype)stored, &x, was, 1);
            cast_elems((enum dtype)stored, t, was, want, 1);
        }
        if (memcmp(place_of(s, i, e), want, dtype_bytes(t)) != 0)
            return ERR(INTERNAL, "memory %d, element %llu is not what was expected", i, (unsigned long long)e);
    }
    EXPECT(*place_of(s, i, s->rows * COLS) == 0xee); /* and nothing behind it */
    return NULL;
}

static status *open_root(struct comm *world, struct store *s, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    o.build = "test 1";
    return ckpt_open(&o, world, NULL, s, out);
}

enum { EMBED, NORM, ODD, T_EMBED, T_NORM, MOMENT, COUNT, STORED_AS_INT = MOMENT };
static const char *const part_of[] = { "policy/model",  "policy/model",  "policy/model",
                                       "teacher/model", "teacher/model", "optim" };
static const char *const name_of[] = { "embed.weight", "layer.0.norm", "odd", "embed.weight", "layer.0.norm", "m" };
static const int type_of[] = { TESSERA_F32, TESSERA_BF16, TESSERA_F64, TESSERA_F16, TESSERA_F32, TESSERA_I32 };

/* Save the step and a later one of blobs alone; every other part of the test reads it. */
static status *save_job(struct comm *world, void *arg)
{
    struct some s;
    tessera *t;
    uint64_t committed;
    TRY(open_root(world, arg, false, &t));
    TRY(begin(world, &s));
    for (int i = 0; i < COUNT; i++) {
        TRY(add(&s, part_of[i], name_of[i], type_of[i], NULL, false, NULL));
        fill(&s, i, i);
    }
    TRY(add(&s, "policy/model", "head.weight", TESSERA_F32, NULL, false, "embed.weight"));
    char mine[16];
    snprintf(mine, sizeof mine, "r%d", world->rank);
    TRY(tessera_state_add_blob(s.state, "rng", "state", 1, mine, 2));
    TRY(tessera_state_add_blob(s.state, "extra", "config", 0, "same", 4));
    TRY(tessera_save(t, s.state, 3));
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == 3);
    tessera_state_free(s.state);
    return tessera_close(t);
}

struct lists {
    const char *list[3]; /* the names, joined by blanks */
};

static status *check_lists(tessera *t, const struct lists *want)
{
    for (int k = 0; k < 3; k++) {
        char text[1000] = "";
        const char *name;
        for (uint64_t i = 0; (name = tessera_load_name(t, TESSERA_MISSING + k, i)); i++)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", i ? " " : "", name);
        if (strcmp(text, want->list[k] ? want->list[k] : ""))
            return ERR(INTERNAL, "list %d is \"%s\", expected \"%s\"", k, text, want->list[k] ? want->list[k] : "");
    }
    EXPECT(!tessera_load_name(t, 0, 0) && !tessera_load_name(t, 4, 0));
    return NULL;
}

/* ---- selection */

struct choice {
    const char *part[4], *name[4];
    unsigned loaded; /* bits: which of the six */
    const char *unexpected;
};

static const struct choice choices[] = {
    { { NULL }, { NULL }, 0x3f, "policy/model/head.weight" },
    { { "policy/model" }, { NULL }, 0x07, "policy/model/head.weight" },
    { { "*/model" }, { NULL }, 0x1f, "policy/model/head.weight" },
    { { "!optim" }, { NULL }, 0x1f, "policy/model/head.weight" },
    { { "*/model", "!teacher/*" }, { NULL }, 0x07, "policy/model/head.weight" },
    { { "optim", "teacher/model" }, { NULL }, 0x38, NULL },
    { { NULL }, { "*.weight" }, 0x09, "policy/model/head.weight" },
    { { NULL }, { "*.weight", "!head*" }, 0x09, NULL },
    { { NULL }, { "!*", "layer.?.norm" }, 0x12, NULL },
    { { NULL }, { "!*.weight" }, 0x36, NULL },
    { { NULL }, { "!*.weight", "embed.*" }, 0x3f, NULL },
    { { "policy/*", "optim" }, { "[mo]*" }, 0x24, NULL },
    { { "*" }, { "*", "!*", "m" }, 0x20, NULL },
};

static status *select_job(struct comm *world, void *arg)
{
    tessera *t;
    TRY(open_root(world, arg, true, &t));
    for (size_t c = 0; c < sizeof choices / sizeof *choices; c++) {
        const struct choice *x = &choices[c];
        struct some s;
        struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
        o.parts = x->part, o.names = x->name;
        for (int strict = 0; strict < 2; strict++) {
            TRY(begin(world, &s));
            for (int i = 0; i < COUNT; i++)
                TRY(add(&s, part_of[i], name_of[i], type_of[i], NULL, (size_t)i % 2 == c % 2, NULL));
            o.allow = strict ? 0 : TESSERA_ALLOW_UNEXPECTED;
            status *st = tessera_load_parts(t, s.state, 3, &o);
            if (strict && x->unexpected) {
                EXPECT_ERROR(st, INVALID, "1 unexpected: policy/model/head.weight");
            } else {
                TRY(st);
                for (int i = 0; i < COUNT; i++)
                    TRY(holds(&s, i, x->loaded >> i & 1 ? i : -1, type_of[i]));
            }
            TRY(check_lists(t, &(struct lists){ { NULL, x->unexpected, NULL } }));
            tessera_state_free(s.state);
        }
    }
    return tessera_close(t);
}

/* ---- roles */

static status *roles_job(struct comm *world, void *arg)
{
    static const struct {
        const char *wanted, *role[3];
        int embed; /* which one arrives; -1: none is there */
    } rules[] = {
        { "model", { "model=policy/model" }, EMBED },
        { "model", { "=policy" }, EMBED },
        { "model", { "=teacher" }, T_EMBED },
        { "student/model", { "student=teacher" }, T_EMBED },
        { "student/model", { "student/model=policy/model" }, EMBED },
        { "a/b/model", { "a=x", "a/b=policy" }, -1 }, /* the first that fits */
        { "a/b/model", { "a/b=policy", "a=x" }, EMBED },
        { "policy/policy/model", { "policy=" }, EMBED },
        { "policy/model", { "poli=teacher", "policy=teacher" }, T_EMBED }, /* whole segments only */
        { "policy/model", { "teacher=optim" }, EMBED },
    };
    tessera *t;
    struct some s;
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    TRY(open_root(world, arg, true, &t));
    for (size_t k = 0; k < sizeof rules / sizeof *rules; k++) {
        int from = rules[k].embed;
        TRY(begin(world, &s));
        TRY(add(&s, rules[k].wanted, "embed.weight", from < 0 ? TESSERA_F32 : type_of[from], NULL, false, NULL));
        o.roles = rules[k].role;
        o.parts = (const char *const[]){ rules[k].wanted, NULL }; /* as the state calls it */
        o.allow = TESSERA_ALLOW_UNEXPECTED;
        status *st = tessera_load_parts(t, s.state, 3, &o);
        if (from < 0)
            EXPECT_ERROR(st, NOT_FOUND, "1 missing: a/b/model/embed.weight");
        else
            TRY(st);
        TRY(holds(&s, 0, from, from < 0 ? 0 : type_of[from]));
        tessera_state_free(s.state);
    }
    TRY(begin(world, &s));
    TRY(add(&s, "model", "embed.weight", TESSERA_F32, NULL, false, NULL));
    o = (struct tessera_load_options)TESSERA_LOAD_OPTIONS;
    o.roles = (const char *const[]){ "model", NULL };
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "WANTED=STORED");
    o.roles = (const char *const[]){ "model=", NULL };
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "no part");
    char longest[200];
    memset(longest, 'x', sizeof longest);
    memcpy(longest, "model=", 6);
    longest[sizeof longest - 1] = 0;
    o.roles = (const char *const[]){ longest, NULL };
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "no part");
    tessera_state_free(s.state);
    return tessera_close(t);
}

/* ---- casts */

static status *cast_job(struct comm *world, void *arg)
{
    static const int types[] = { TESSERA_F64, TESSERA_F32, TESSERA_F16, TESSERA_BF16 };
    tessera *t;
    struct some s;
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    TRY(open_root(world, arg, true, &t));
    for (int k = 0; k < 8; k++) {
        TRY(begin(world, &s));
        for (int i = 0; i < MOMENT; i++) /* strided every other time */
            TRY(add(&s, part_of[i], name_of[i], types[(k + i) % 4], NULL, k >= 4, NULL));
        o.allow = TESSERA_ALLOW_CAST | TESSERA_ALLOW_UNEXPECTED;
        TRY(tessera_load_parts(t, s.state, 3, &o));
        for (int i = 0; i < MOMENT; i++)
            TRY(holds(&s, i, i, type_of[i]));
        TRY(check_lists(t, &(struct lists){ { NULL, "policy/model/head.weight", NULL } }));
        tessera_state_free(s.state);
    }
    /* not without asking, and no integers */
    TRY(begin(world, &s));
    TRY(add(&s, "policy/model", "embed.weight", TESSERA_F64, NULL, false, NULL));
    TRY(add(&s, "optim", "m", TESSERA_F32, NULL, false, NULL));
    TRY(add(&s, "teacher/model", "layer.0.norm", TESSERA_I32, NULL, false, NULL));
    EXPECT_ERROR(tessera_load(t, s.state, 3), INVALID, "stored as f32 and wanted as f64 (ALLOW_CAST)");
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "optim/m is stored as i32 and wanted as f32");
    TRY(check_lists(t, &(struct lists){ { NULL,
                                          "policy/model/head.weight policy/model/layer.0.norm policy/model/odd "
                                          "teacher/model/embed.weight",
                                          "optim/m teacher/model/layer.0.norm" } }));
    TRY(holds(&s, 0, -1, 0)); /* seen before anything is read */
    o.allow |= TESSERA_ALLOW_MISSHAPEN;
    TRY(tessera_load_parts(t, s.state, 3, &o));
    TRY(holds(&s, 0, EMBED, TESSERA_F32));
    TRY(holds(&s, 1, -1, 0));
    TRY(holds(&s, 2, -1, 0));
    o.allow = 16;
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "allow 0x10");
    tessera_state_free(s.state);
    return tessera_close(t);
}

/* ---- tied weights: "head.weight" is stored as an alias of "embed.weight" */

static status *tied_load(tessera *t, struct some *s, const char *only, int allow)
{
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    o.names = only ? (const char *const[]){ only, NULL } : NULL;
    o.allow = allow;
    return tessera_load_parts(t, s->state, 3, &o);
}

static status *alias_job(struct comm *world, void *arg)
{
    static const uint64_t wrong[2] = { ROWS, COLS + 1 };
    const char *model = "policy/model";
    tessera *t;
    struct some s;
    TRY(open_root(world, arg, true, &t));
    /* an alias in both: only the alias is chosen, or only the target; strided, and cast */
    for (int k = 0; k < 8; k++) {
        int type = k & 4 ? TESSERA_F64 : TESSERA_F32;
        TRY(begin(world, &s));
        TRY(add(&s, model, "head.weight", type, NULL, false, "embed.weight")); /* before its target */
        TRY(add(&s, model, "embed.weight", type, NULL, k & 2, NULL));
        TRY(add(&s, model, "head.again", type, NULL, false, "embed.weight"));
        TRY(tied_load(t, &s, k & 1 ? "head.*" : "embed.*", TESSERA_ALLOW_CAST));
        TRY(holds(&s, 1, EMBED, TESSERA_F32));
        TRY(check_lists(t, &(struct lists){ { NULL } }));
        tessera_state_free(s.state);
    }
    /* stored as an alias, wanted as a tensor of its own: with its target, and alone */
    TRY(begin(world, &s));
    TRY(add(&s, model, "head.weight", TESSERA_F32, NULL, false, NULL));
    TRY(add(&s, model, "embed.weight", TESSERA_F32, NULL, false, NULL));
    TRY(tied_load(t, &s, "head.weight", 0));
    TRY(holds(&s, 0, EMBED, TESSERA_F32));
    TRY(holds(&s, 1, -1, 0));
    TRY(tied_load(t, &s, "*.weight", 0));
    TRY(holds(&s, 0, EMBED, TESSERA_F32));
    TRY(holds(&s, 1, EMBED, TESSERA_F32));
    tessera_state_free(s.state);
    /* stored as tensors of their own, wanted as an alias: the target's bytes, or, chosen alone, the alias' */
    TRY(begin(world, &s));
    TRY(add(&s, "teacher/model", "embed.weight", TESSERA_F16, NULL, false, NULL));
    TRY(add(&s, "teacher/model", "layer.0.norm", TESSERA_F16, NULL, false, "embed.weight"));
    TRY(tied_load(t, &s, NULL, 0));
    TRY(holds(&s, 0, T_EMBED, TESSERA_F16));
    TRY(tied_load(t, &s, "layer.0.norm", TESSERA_ALLOW_CAST));
    TRY(holds(&s, 0, T_NORM, TESSERA_F32));
    EXPECT_ERROR(tied_load(t, &s, "layer.0.norm", 0), INVALID, "1 misshapen: teacher/model/layer.0.norm");
    tessera_state_free(s.state);
    /* nowhere; under the target's name alone; of another shape */
    TRY(begin(world, &s));
    TRY(add(&s, model, "nowhere", TESSERA_F32, NULL, false, NULL));
    TRY(add(&s, model, "tied", TESSERA_F32, NULL, false, "nowhere"));
    EXPECT_ERROR(tied_load(t, &s, "tied", 0), NOT_FOUND, "1 missing: policy/model/tied");
    tessera_state_free(s.state);
    TRY(begin(world, &s));
    TRY(add(&s, model, "embed.weight", TESSERA_F32, NULL, false, NULL));
    TRY(add(&s, model, "new.name", TESSERA_F32, NULL, false, "embed.weight"));
    TRY(tied_load(t, &s, "new.name", 0));
    TRY(holds(&s, 0, EMBED, TESSERA_F32));
    tessera_state_free(s.state);
    TRY(begin(world, &s));
    TRY(add(&s, model, "embed.weight", TESSERA_F32, wrong, false, NULL));
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = model, a.name = "head.weight", a.dtype = TESSERA_F32, a.ndim = 2, a.alias_of = "embed.weight";
    a.shape[0] = wrong[0], a.shape[1] = wrong[1];
    TRY(tessera_state_add_tensor(s.state, &a));
    EXPECT_ERROR(tied_load(t, &s, "head.weight", 0), INVALID, "1 misshapen: policy/model/head.weight has shape");
    tessera_state_free(s.state);
    return tessera_close(t);
}

/* ---- lists: what one rank alone wants counts for all */

static status *lists_job(struct comm *world, void *arg)
{
    static const uint64_t wrong[2] = { ROWS, COLS + 1 };
    tessera *t;
    struct some s;
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    bool last = world->rank == world->size - 1;
    TRY(open_root(world, arg, true, &t));
    TRY(begin(world, &s));
    TRY(add(&s, "optim", "m", TESSERA_I32, NULL, false, NULL));
    TRY(add(&s, "optim", "m", TESSERA_I32, NULL, false, NULL)); /* each name once, however often it is added */
    TRY(add(&s, "optim", "v", TESSERA_I32, NULL, false, NULL));
    if (last)
        TRY(add(&s, "policy/model", "odd", TESSERA_F64, wrong, false, NULL));
    if (world->rank == 0)
        TRY(add(&s, "policy/model", "nowhere", TESSERA_F64, NULL, false, NULL));
    TRY(add(&s, "policy/model", "head.weight", TESSERA_F32, NULL, false, "embed.weight"));
    const struct lists want = { { "optim/v policy/model/nowhere", "policy/model/embed.weight policy/model/layer.0.norm",
                                  "policy/model/odd" } };
    static const struct {
        int allow;
        enum status_code code;
        const char *words;
    } rules[] = {
        { 0, ST_INVALID,
          "1 misshapen: policy/model/odd has shape (11, 3) and is wanted as (11, 4); 2 missing: optim/v "
          "policy/model/nowhere; 2 unexpected: policy/model/embed.weight policy/model/layer.0.norm" },
        { TESSERA_ALLOW_MISSHAPEN, ST_NOT_FOUND, "2 missing" },
        { TESSERA_ALLOW_MISSING, ST_INVALID, "1 misshapen" },
        { TESSERA_ALLOW_MISSING | TESSERA_ALLOW_MISSHAPEN, ST_INVALID, "2 unexpected" },
        { TESSERA_ALLOW_MISSING | TESSERA_ALLOW_UNEXPECTED, ST_INVALID, "1 misshapen" },
        { TESSERA_ALLOW_UNEXPECTED | TESSERA_ALLOW_MISSHAPEN, ST_NOT_FOUND, "2 missing" },
        { TESSERA_LENIENT, ST_OK, "" },
    };
    for (size_t k = 0; k < sizeof rules / sizeof *rules; k++) {
        o.allow = rules[k].allow;
        status *st = tessera_load_parts(t, s.state, 3, &o);
        if (rules[k].code)
            TRY(expect_error(st, rules[k].code, rules[k].words, __FILE__, __LINE__));
        else
            TRY(st);
        TRY(check_lists(t, &want));
        TRY(holds(&s, 0, rules[k].code ? -1 : MOMENT, TESSERA_I32));
    }
    TRY(holds(&s, 1, MOMENT, TESSERA_I32));
    TRY(holds(&s, 2, -1, 0));
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, NULL), INVALID, "2 missing"); /* NULL is strict */
    EXPECT_ERROR(tessera_load(t, s.state, 3), INVALID, "2 missing");
    /* nothing selected is a mistake even so; nothing wanted is none */
    o.allow = TESSERA_LENIENT;
    o.parts = (const char *const[]){ "optimizer", NULL };
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, &o), INVALID, "select no tensor");
    TRY(check_lists(t, &(struct lists){ { NULL } }));
    tessera_state_free(s.state);
    TRY(begin(world, &s));
    TRY(tessera_load_parts(t, s.state, 3, NULL));
    EXPECT_ERROR(tessera_load_parts(t, s.state, 4, NULL), NOT_FOUND, "4");
    EXPECT_ERROR(tessera_load_parts(t, last ? NULL : s.state, 3, NULL), INVALID, "no state");
    o.size = 8;
    EXPECT_ERROR(tessera_load_parts(t, s.state, 3, last ? &o : NULL), INVALID, "TESSERA_LOAD_OPTIONS");
    tessera_state_free(s.state);
    return tessera_close(t);
}

/* More names than an error has room for: the words say so, the list is whole. */
static status *many_job(struct comm *world, void *arg)
{
    tessera *t;
    struct some s;
    char name[64];
    TRY(open_root(world, arg, true, &t));
    TRY(begin(world, &s));
    for (int i = 0; i < 3000; i++) {
        s.count = 0; /* all in one memory: nothing is loaded */
        snprintf(name, sizeof name, "block.%04d.a.rather.long.name.of.a.weight", (i * 7 + world->rank) % 3000);
        TRY(add(&s, "policy/model", name, TESSERA_F32, NULL, false, NULL));
    }
    status *st = tessera_load(t, s.state, 3);
    EXPECT(strstr(status_message(st), "3000 missing: policy/model/block.0000.a") && strstr(status_message(st), "..."));
    EXPECT_ERROR(st, NOT_FOUND, "block.0001");
    for (int i = 0; i < 3000; i++) {
        const char *have = tessera_load_name(t, TESSERA_MISSING, (uint64_t)i);
        snprintf(name, sizeof name, "policy/model/block.%04d.a.rather.long.name.of.a.weight", i);
        EXPECT(have && !strcmp(have, name));
    }
    EXPECT(!tessera_load_name(t, TESSERA_MISSING, 3000));
    tessera_state_free(s.state);
    return tessera_close(t);
}

/* ---- listing */

struct listing {
    struct store *store;
    int saved_ranks;
};

static status *listing_job(struct comm *world, void *arg)
{
    const struct listing *l = arg;
    tessera *t;
    uint64_t step, steps[3] = { 0, 77, 77 };
    size_t count = 0;
    struct tessera_step info = TESSERA_STEP;
    struct tessera_tensor a = TESSERA_TENSOR;
    struct tessera_blob_info b = TESSERA_BLOB_INFO;
    TRY(open_root(world, l->store, true, &t));
    EXPECT_ERROR(tessera_get_step(t, &info), NOT_FOUND, "no step was found");
    EXPECT_ERROR(tessera_stored_at(t, 0, &a), NOT_FOUND, "no step was found");
    EXPECT_ERROR(tessera_blob_at(t, 0, &b), NOT_FOUND, "no step was found");
    TRY(tessera_list_steps(t, NULL, 0, &count));
    EXPECT(count == 1);
    TRY(tessera_list_steps(t, steps, world->rank ? 1 : 2, &count));
    EXPECT(count == 1 && steps[0] == 3 && steps[1] == 77);
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    TRY(tessera_get_step(t, &info));
    EXPECT(info.step == 3 && info.ranks == l->saved_ranks && info.tensors == COUNT + 1);
    EXPECT(info.blobs == (uint64_t)l->saved_ranks + 1 && !strcmp(info.build, "test 1"));
    EXPECT(info.mesh[0] == 1 && info.mesh[1] == l->saved_ranks && info.mesh[4] == 1);
    EXPECT(info.attempt && info.run_id && info.time_ns > 1600000000ull * 1000000000);
    /* sorted by part, then name */
    static const int order[] = { MOMENT, EMBED, COUNT, NORM, ODD, T_EMBED, T_NORM };
    for (uint64_t i = 0; i < info.tensors; i++) {
        int k = order[i];
        TRY(tessera_stored_at(t, i, &a));
        EXPECT(!strcmp(a.part, k == COUNT ? "policy/model" : part_of[k]));
        EXPECT(!strcmp(a.name, k == COUNT ? "head.weight" : name_of[k]));
        EXPECT(a.dtype == (k == COUNT ? TESSERA_F32 : type_of[k]) && a.ndim == 2 && a.shape[0] == ROWS);
        EXPECT(k == COUNT ? !strcmp(a.alias_of, "embed.weight") : !a.alias_of);
    }
    EXPECT_ERROR(tessera_stored_at(t, info.tensors, &a), NOT_FOUND, "no tensor 7 of 7");
    unsigned ranks = 0;
    for (uint64_t i = 0; i < info.blobs; i++) {
        TRY(tessera_blob_at(t, i, &b));
        if (b.rank < 0) {
            EXPECT(!strcmp(b.part, "extra") && !strcmp(b.name, "config") && b.bytes == 4 && !memcmp(b.data, "same", 4));
            continue;
        }
        char want[16];
        snprintf(want, sizeof want, "r%d", b.rank);
        EXPECT(!strcmp(b.part, "rng") && !strcmp(b.name, "state") && b.bytes == 2 && !memcmp(b.data, want, 2));
        ranks |= 1u << b.rank;
    }
    EXPECT(ranks == (1u << l->saved_ranks) - 1);
    EXPECT_ERROR(tessera_blob_at(t, info.blobs, &b), NOT_FOUND, "no blob");
    b.size = 12; /* room for no whole field */
    b.part = NULL;
    TRY(tessera_blob_at(t, 0, &b));
    EXPECT(b.size == 12);
    return tessera_close(t);
}

/* ---- */

static void each(status *(*job)(struct comm *world, void *arg))
{
    for (int size = 1; size <= 4; size++) {
        struct root r = root_open(false);
        assert_ok(comm_threads_run(5 - size, save_job, r.store));
        assert_ok(comm_threads_run(size, job, r.store));
        root_close(&r);
    }
}

static void test_select(void **state)
{
    (void)state;
    each(select_job);
}

static void test_roles(void **state)
{
    (void)state;
    each(roles_job);
}

static void test_casts(void **state)
{
    (void)state;
    each(cast_job);
}

static void test_aliases(void **state)
{
    (void)state;
    each(alias_job);
}

static void test_lists(void **state)
{
    (void)state;
    each(lists_job);
}

static void test_many_names(void **state)
{
    (void)state;
    each(many_job);
}

static void test_listing(void **state)
{
    (void)state;
    for (int size = 1; size <= 4; size++) {
        struct root r = root_open(size % 2);
        struct listing l = { .store = r.store, .saved_ranks = 5 - size };
        assert_ok(comm_threads_run(l.saved_ranks, save_job, r.store));
        assert_ok(comm_threads_run(size, listing_job, &l));
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select),  cmocka_unit_test(test_roles), cmocka_unit_test(test_casts),
        cmocka_unit_test(test_aliases), cmocka_unit_test(test_lists), cmocka_unit_test(test_many_names),
        cmocka_unit_test(test_listing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
