/* watch: see watch.h. */
#include "trainer/ops/watch.h"

#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/op.h"

#include <math.h>

struct watch {
    struct compute *compute;
    watch_name *name;
    const void *arg;
    int64_t *first; /* in its memory */
};

enum { PLACE_BYTES = 160, BAD_BYTES = 256 };

status *watch_open(struct compute *c, watch_name *name, const void *arg, struct watch **out)
{
    struct watch *w = mem_calloc(1, sizeof *w);
    void *first = NULL;
    status *st = w ? compute_alloc(c, sizeof *w->first, &first) : ERR(NO_MEMORY, "debug: nan");
    if (st) {
        mem_free(w);
        return st;
    }
    *w = (struct watch){ c, name, arg, first };
    *out = w;
    return NULL;
}

void watch_close(struct watch *w)
{
    if (!w)
        return;
    compute_free(w->compute, w->first, sizeof *w->first);
    mem_free(w);
}

status *watch_find(struct watch *w, struct array x, int64_t n, int64_t *first, float *value)
{
    const struct kernels *k = w->compute ? w->compute->kernels : &kernels_cpu;
    k->find_nonfinite(w->compute ? w->compute->workers : NULL, w->first, x, n);
    TRY(compute_check(w->compute, false));
    TRY(compute_get(w->compute, first, w->first, sizeof *first)); /* the host decides whether to go on */
    if (*first >= n)
        return NULL;
    if (!x.low)
        return compute_get(w->compute, value, (const float *)x.at + *first, sizeof *value);
    uint16_t low = 0;
    TRY(compute_get(w->compute, &low, (const uint16_t *)x.at + *first, sizeof low));
    *value = bf16_to_f32(low);
    return NULL;
}

const char *watch_word(float value)
{
    return isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

/* "[2, 1]": element e of x. */
static struct shape_text place_of(const struct tensor *x, int64_t e)
{
    struct tensor at = { .dtype = DTYPE_F32, .ndim = x->ndim };
    for (int i = x->ndim - 1; i >= 0; i--) {
        at.dim[i] = e % x->dim[i];
        e /= x->dim[i];
    }
    return text_of(&at);
}

static const char *name_of(const struct watch *w, const struct tensor *weight)
{
    const char *name = weight && w->name ? w->name(w->arg, weight) : NULL;
    return name ? name : "";
}

/* "op_linear of model.layers.1.mlp.up_proj.weight, block 1" */
static void describe(const struct tape *t, const char *op, int64_t block, const struct tensor *weight,
                     char text[PLACE_BYTES])
{
    const char *name = name_of(t->watch, weight);
    size_t used = (size_t)snprintf(text, PLACE_BYTES, "%s%s%.96s", op, *name ? " of " : "", name);
    if (block >= 0 && used < PLACE_BYTES)
        snprintf(text + used, PLACE_BYTES - used, ", block %lld", (long long)block);
}

/* Of x's array: its first element that is not finite, as text; false: there is none, or the tape has failed. */
static bool is_bad(struct tape *t, const struct tensor *x, struct array array, char text[BAD_BYTES])
{
    int64_t n = tensor_elems(x), first = n;
    float value = 0;
    status *st = t->error || !n ? NULL : watch_find(t->watch, array, n, &first, &value);
    if (st)
        tape_fail(t, st);
    if (t->error || first >= n)
        return false;
    snprintf(text, BAD_BYTES, "%s is %s at %s, element %lld", text_of(x).s, watch_word(value), place_of(x, first).s,
             (long long)first);
    return true;
}

void watch_output(struct tape *t, const char *op, const struct tensor *y, const struct tensor *weight)
{
    char bad[BAD_BYTES], cause[BAD_BYTES], place[PLACE_BYTES];
    if (!is_bad(t, y, data_of(y), bad))
        return;
    describe(t, op, t->block, weight, place);
    bool too = weight && weight->dtype == DTYPE_F32 && is_bad(t, weight, data_of(weight), cause);
    tape_fail(t, ERR(INVALID, "%s, forward of micro-batch %u: its output %s%s%s", place, t->micro_batch, bad,
                     too ? "; its weight " : "", too ? cause : ""));
}

static void look(struct tape *t, const struct tape_record *r, const char *what, struct tensor *x, bool weight)
{
    char bad[BAD_BYTES], place[PLACE_BYTES];
    if (t->error || !x || !x->grad || !is_bad(t, x, grad_of(t, x), bad))
        return;
    describe(t, r->look.op, r->block, weight ? x : r->look.weight[0], place);
    tape_fail(
        t, ERR(INVALID, "%s, backward of micro-batch %u: the gradient of its %s %s", place, t->micro_batch, what, bad));
}

void watch_record(struct tape *t, const struct tape_record *r, unsigned halves)
{
    for (int i = 0; i < TAPE_LOOK && halves & (unsigned)TAPE_BACKWARD_INPUT; i++)
        look(t, r, "input", r->look.input[i], false);
    for (int i = 0; i < TAPE_LOOK && halves & (unsigned)TAPE_BACKWARD_WEIGHT; i++)
        look(t, r, "weight", r->look.weight[i], true);
}

void watch_root(struct tape *t, const struct tensor *root)
{
    char bad[BAD_BYTES];
    if (is_bad(t, root, array_of(root->grad), bad))
        tape_fail(t,
                  ERR(INVALID, "backward of micro-batch %u: the gradient that it begins with %s", t->micro_batch, bad));
}
