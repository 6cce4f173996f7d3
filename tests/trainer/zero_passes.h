/* zero_passes: for tests of zero: parameters, gradients of micro-batches as tables of wide range, so that another order
 * of additions shows, and the passes of a step. Give make_gradients and drop_gradients to cmocka_run_group_tests. Rank
 * functions return errors; only the main thread asserts. */
#ifndef TESSERA_TESTS_TRAINER_ZERO_PASSES_H
#define TESSERA_TESTS_TRAINER_ZERO_PASSES_H

#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "trainer/parallel/shards.h"
#include "trainer/parallel/zero.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

enum { BLOCKS = 13, TOTAL = BLOCKS * PARAM_ALIGN, STEPS = 3, MICRO = 40, PARAMS = 6 };

static const struct {
    uint64_t rows, cols; /* cols 0: a vector */
    bool decay;
    int alias, block; /* block -1: in none */
} param_rows[PARAMS] = {
    { 60, 50, true, -1, -1 }, { 1024, 0, false, -1, 0 }, { 2, 1025, true, -1, 1 },
    { 60, 50, false, 0, -1 }, /* shares the first one's memory; were it updated, it would be updated twice */
    { 1, 0, false, -1, 1 },   { 70, 70, true, -1, 2 },
};
enum { UNITS = 4 };

#define EXPECT(cond, ...)                                                                                              \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            return ERR(INTERNAL, __VA_ARGS__);                                                                         \
    } while (0)

static inline void expect_ok(status *st)
{
    if (st)
        fail_msg("rank %d: %s (%s:%d)", status_rank(st), status_message(st), status_file(st), status_line(st));
}

static inline void expect_code(status *st, enum status_code code)
{
    assert_int_equal(status_code(st), code);
    status_free(st);
}

static inline bool same(const void *a, const void *b, size_t n)
{
    return memcmp(a, b, n) == 0;
}

/* ---- parameters and gradients ---- */

static inline uint64_t elems_of_row(int i)
{
    return param_rows[i].rows * (param_rows[i].cols ? param_rows[i].cols : 1);
}

/* Is element e of the flat block part of a parameter? */
static inline bool in_param(const struct params *ps, uint64_t e)
{
    for (int i = 0; i < ps->count; i++)
        if (e >= ps->p[i].offset &&
            e < ps->p[i].offset + param_rows[i].rows * (param_rows[i].cols ? param_rows[i].cols : 1))
            return true;
    return false;
}

static inline float draw(uint32_t sample, uint32_t step, uint64_t e)
{
    struct rng_at at = { 5, sample, step, RNG_DATA };
    double u = 2 * rng_uniform(at, 2 * e) - 1;
    return (float)ldexp(u, (int)(rng_u32(at, 2 * e + 1) % 14) - 7);
}

/* Paddings hold 7: nothing may touch them. */
static inline struct params *params_make(void)
{
    struct params *ps = mem_calloc(1, sizeof *ps);
    ps->p = mem_calloc(PARAMS, sizeof *ps->p);
    ps->count = ps->cap = PARAMS;
    for (int i = 0; i < PARAMS; i++) {
        struct param *p = &ps->p[i];
        uint64_t rows = param_rows[i].rows, cols = param_rows[i].cols;
        p->shape = (struct shape){ .ndim = cols ? 2 : 1, .dim = { rows, cols } };
        p->value = (struct tensor){ .ndim = p->shape.ndim, .dim = { (int64_t)rows, (int64_t)cols } };
        p->decay = param_rows[i].decay;
        p->alias = param_rows[i].alias;
        p->block = param_rows[i].block;
        p->unit = p->block + 1;
        p->offset = p->alias >= 0 ? ps->p[p->alias].offset : ps->total;
        if (p->alias < 0)
            ps->total += (rows * (cols ? cols : 1) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    }
    assert_int_equal(ps->total, TOTAL);
    ps->data = mem_alloc(TOTAL * sizeof(float));
    ps->grad = mem_alloc(TOTAL * sizeof(float));
    for (int i = 0; i < PARAMS; i++)
        ps->p[i].value.data = ps->data + ps->p[i].offset;
    for (uint64_t e = 0; e < TOTAL; e++) {
        ps->data[e] = in_param(ps, e) ? draw(1000, 0, e) : 7;
        ps->grad[e] = 99; /* zero_begin clears it */
    }
    return ps;
}

static inline void params_drop(struct params *ps)
{
    mem_free(ps->grad);
    mem_free(ps->data);
    mem_free(ps->p);
    mem_free(ps);
}

/* gradient[step][micro][e], 0 in paddings: a pure function of its indices. */
static float (*gradient)[MICRO][TOTAL];

static inline int make_gradients(void **state)
{
    (void)state;
    gradient = mem_alloc(STEPS * sizeof *gradient);
    struct params *ps = params_make();
    for (uint32_t s = 0; s < STEPS; s++)
        for (uint32_t i = 0; i < MICRO; i++)
            for (uint64_t e = 0; e < TOTAL; e++)
                gradient[s][i][e] = in_param(ps, e) ? draw(i, s, e) : 0;
    params_drop(ps);
    return 0;
}

static inline int drop_gradients(void **state)
{
    (void)state;
    mem_free(gradient);
    return 0;
}

/* ---- the passes of a step ---- */

static inline struct adamw adamw_of(uint32_t step, double norm)
{
    return (struct adamw){ 1e-2 / (step + 1), 0.9, 0.95, 1e-8, 0.1, norm > 10 ? 10 / norm : 1, step + 1, NULL };
}

/* What backward does in a window: adds to what is there. */
static inline void add_gradients(struct params *ps, int unit, uint32_t step, uint32_t micro)
{
    for (int i = 0; i < PARAMS; i++)
        for (uint64_t e = 0; ps->p[i].alias < 0 && ps->p[i].block + 1 == unit && e < elems_of_row(i); e++)
            ((float *)ps->p[i].value.grad)[e] += gradient[step][micro][ps->p[i].offset + e];
}

/* Parameters of a unit, where tensors point, are those of step `step` - 1 (NULL: not compared). */
static inline status *check_unit(const struct params *ps, int unit, const float *want)
{
    for (int i = 0; i < PARAMS; i++)
        if (want && ps->p[i].block + 1 == unit)
            EXPECT(same(ps->p[i].value.data, want + ps->p[i].offset, elems_of_row(i) * sizeof(float)),
                   "unit %d has other parameters when it is used", unit);
    return NULL;
}

/* A pass as tape and trainer make it. */
static inline status *windowed_pass(struct zero *z, struct params *ps, uint32_t step, uint32_t micro, const float *data)
{
    struct shards *s = zero_shards(z);
    const struct tape_blocks *h = shards_hooks(s);
    TRY(shards_begin(s, true));
    TRY(check_unit(ps, 0, data));
    for (int i = 0; i < UNITS - 1; i++) {
        TRY(h->enter(h->arg, i, false));
        TRY(check_unit(ps, i + 1, data));
        TRY(h->leave(h->arg, i, false));
    }
    for (int i = UNITS - 1; i-- > 0;) {
        TRY(h->enter(h->arg, i, true));
        TRY(check_unit(ps, i + 1, data));
        add_gradients(ps, i + 1, step, micro);
        TRY(h->leave(h->arg, i, true));
    }
    add_gradients(ps, 0, step, micro);
    return zero_added(z, micro);
}

/* What backward does in the flat block, unit by unit: the others' gradients are not there yet. A rank may say that it
 * has left a unit, or not. */
static inline status *backward_of_chunk(struct zero *z, struct params *ps, uint32_t step, uint32_t micro, int chunk)
{
    for (int unit = UNITS; unit-- > 0;) {
        if (!params_hold(ps, chunk, unit))
            continue;
        for (int i = 0; i < PARAMS; i++)
            for (uint64_t e = 0; ps->p[i].alias < 0 && ps->p[i].unit == unit && e < elems_of_row(i); e++)
                ps->grad[ps->p[i].offset + e] += gradient[step][micro][ps->p[i].offset + e];
        if ((step + micro + (uint32_t)unit) % 4)
            TRY(zero_left(z, unit));
    }
    return NULL;
}

/* data: what parameters shall be; NULL: anything. */
static inline status *run_micro_batches(struct zero *z, struct params *ps, uint32_t step, uint32_t k, const float *data)
{
    uint32_t i;
    zero_begin(z, k);
    for (uint32_t pass = 0; pass < zero_passes(z, k); pass++) {
        if (!zero_micro_batch(z, k, pass, &i)) {
            TRY(shards_idle(zero_shards(z), 0));
            TRY(zero_idle(z, 0));
        } else if (zero_shards(z)) {
            TRY(windowed_pass(z, ps, step, i, data));
        } else if (params_chunks(ps) == 1) {
            TRY(backward_of_chunk(z, ps, step, i, 0));
            TRY(zero_added(z, i));
        }
    }
    for (int c = params_chunks(ps) > 1 ? params_chunks(ps) : 0; c-- > 0;)
        for (uint32_t pass = 0; pass < zero_passes(z, k) && zero_micro_batch(z, k, pass, &i); pass++) {
            TRY(backward_of_chunk(z, ps, step, i, c));
            TRY(zero_added_chunk(z, i, c));
        }
    return NULL;
}

static inline double scalar(uint32_t k, uint32_t j)
{
    return (double)draw(k, 77 + j, 3) * 1e10 + (double)draw(k, 99, j);
}

#endif
