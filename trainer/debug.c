/* debug: debug: nan at the two places of a step where no op is at work: gradients once they are summed, parameters once
 * they are updated. What ops do is looked at by the tape (ops/watch.h). */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "trainer/ops/kernels.h"

#include <inttypes.h>

static const char *name_in(const struct params *ps, const struct tensor *weight)
{
    for (int i = 0; i < ps->count; i++)
        if (&ps->p[i].value == weight)
            return ps->p[i].name;
    return NULL;
}

static const char *name_of(const void *arg, const struct tensor *weight)
{
    const struct trainer *t = arg;
    const struct model *const models[] = { t->model, t->ref_model };
    const char *name = NULL;
    for (int i = 0; i < 2 && !name; i++) {
        name = models[i] ? name_in(&models[i]->params, weight) : NULL;
        if (models[i] && !name)
            name = name_in(&models[i]->tied, weight);
    }
    return name;
}

status *debug_open(struct trainer *t)
{
    if (t->cfg->top.debug != DEBUG_NAN)
        return NULL;
    TRY(watch_open(t->compute, name_of, t, &t->watch));
    for (int i = 0; i < pipe_tapes(t->pipe); i++)
        tape_watch(pipe_tape(t->pipe, i), t->watch);
    return NULL;
}

/* Element e of this rank's part of p. */
static status *bad(const struct trainer *t, const char *what, const struct param *p, uint64_t e, float value)
{
    uint64_t cols = p->box.len[p->shape.ndim - 1], at = box_element(&p->shape, &p->box, e - e % cols) + e % cols;
    uint64_t left = at, index[LAYOUT_DIMS] = { 0 };
    char shape[96], place[96];
    for (int i = p->shape.ndim - 1; i >= 0; i--) {
        index[i] = left % p->shape.dim[i];
        left /= p->shape.dim[i];
    }
    dims_text(p->shape.ndim, p->shape.dim, shape, sizeof shape);
    dims_text(p->shape.ndim, index, place, sizeof place);
    return ERR(INVALID, "step %" PRIu64 ": %s of %s %s is %s at %s, element %" PRIu64, t->step + 1, what, p->name,
               shape, watch_word(value), place, at);
}

/* Elements [begin, end) of p's part, which lie at x; padding does not count. */
static status *look(const struct trainer *t, const char *what, const struct param *p, uint64_t begin, uint64_t end,
                    const float *x)
{
    uint64_t held = box_volume(p->shape.ndim, &p->box);
    end = end < held ? end : held;
    if (begin >= end)
        return NULL;
    int64_t n = (int64_t)(end - begin), first;
    float value;
    TRY(watch_find(t->watch, array_of(x), n, &first, &value));
    return first < n ? bad(t, what, p, begin + (uint64_t)first, value) : NULL;
}

/* What of p is in `run`, which lies at x. */
static status *look_run(const struct trainer *t, const char *what, const struct param *p, struct zero_run run,
                        const float *x)
{
    uint64_t begin = p->offset, end = begin + param_elems(p);
    uint64_t lo = run.begin > begin ? run.begin : begin, hi = run.end < end ? run.end : end;
    return lo < hi ? look(t, what, p, lo - begin, hi - begin, x + (lo - run.begin)) : NULL;
}

static status *gradient_of(struct trainer *t, const struct param *p)
{
    struct zero *z = experts_zero(t->experts, t->zero, &t->model->params, &p);
    struct zero_moments m = zero_moments(z);
    uint64_t before = 0;
    for (uint64_t r = 0; r < m.run_count; r++) {
        TRY(look_run(t, "the summed gradient", p, m.run[r], zero_sums(z, m.run[r], before)));
        before += run_elems(m.run[r]);
    }
    return NULL;
}

static status *value_of(struct trainer *t, const struct param *p)
{
    const struct shards *s = trainer_shards_of(t, t->model, &p);
    if (!s || !shards_cut_values(s))
        return look(t, "after the update the value", p, 0, param_elems(p), p->value.data);
    struct shard_runs own = shards_own(s, p->frozen);
    const float *x = own.value;
    for (uint64_t r = 0; r < own.runs; r++) {
        TRY(look_run(t, "after the update the value", p, own.run[r], x));
        x += run_elems(own.run[r]);
    }
    return NULL;
}

static status *look_at_all(struct trainer *t, bool gradients)
{
    status *st = NULL;
    if (!t->watch)
        return NULL;
    for (int i = 0; i < t->model->params.count && !st; i++) {
        const struct param *p = &t->model->params.p[i];
        if (p->alias < 0 && !p->away && !(gradients && p->frozen))
            st = gradients ? gradient_of(t, p) : value_of(t, p);
    }
    return comm_agree(t->world, st);
}

status *debug_gradients(struct trainer *t)
{
    return look_at_all(t, true);
}

status *debug_values(struct trainer *t)
{
    return look_at_all(t, false);
}
