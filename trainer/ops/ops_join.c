/* ops_join: parts of tensors side by side. */
#include "trainer/ops/op.h"

struct join_record {
    struct tape_record base;
    struct tensor *y;
    struct join_part part[JOIN_PARTS];
    int parts;
};

/* The copy of a part to y's columns from `at` on. */
static struct column_copy forward_copy(const struct tensor *y, const struct join_part *p, int64_t at)
{
    const struct tensor *x = p->x;
    struct column_copy c = { .n = y->dim[0],
                             .heads = y->dim[1],
                             .count = p->count,
                             .y = (float *)y->data + at,
                             .y_token = y->dim[1] * y->dim[2],
                             .y_head = y->dim[2],
                             .y_step = 1 };
    if (!x)
        return c;
    bool shared = x->ndim == 2 || x->dim[1] != y->dim[1];
    int64_t width = x->dim[x->ndim - 1];
    c.x = (const float *)x->data + p->first;
    c.x_token = shared ? width : x->dim[1] * width;
    c.x_head = shared ? 0 : width;
    c.x_step = p->step;
    return c;
}

static void join_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct join_record *r = (const void *)base;
    for (int64_t i = 0, at = 0; INPUT_HALF(halves) && i < r->parts; at += r->part[i++].count) {
        const struct join_part *p = &r->part[i];
        if (!p->x || !p->x->grad)
            continue;
        struct column_copy c = forward_copy(r->y, p, at);
        t->kernels->columns(t->workers, &(struct column_copy){ .n = c.n,
                                                               .heads = c.heads,
                                                               .count = c.count,
                                                               .x = grad_f32(t, r->y) + at,
                                                               .x_token = c.y_token,
                                                               .x_head = c.y_head,
                                                               .x_step = c.y_step,
                                                               .y = grad_f32(t, p->x) + p->first,
                                                               .y_token = c.x_token,
                                                               .y_head = c.x_head,
                                                               .y_step = c.x_step,
                                                               .add = true });
    }
}

static const char *part_misfit(const struct join_part *p, const struct tensor *any, int64_t heads)
{
    const struct tensor *x = p->x;
    if (p->count < 1 || (x && (p->first < 0 || p->step < 1)))
        return "a part has at least one element";
    if (!x)
        return NULL;
    if (x->ndim < 2 || x->ndim > 3 || (x->ndim == 3 && x->dim[1] != heads && x->dim[1] != 1))
        return "x is f32 [N, H, W], [N, 1, W] or [N, W]";
    if (x->dim[0] != any->dim[0] || x->cut_rows != any->cut_rows)
        return "parts are of the same tokens";
    return p->first + (p->count - 1) * p->step < x->dim[x->ndim - 1] ? NULL : "x has not so many columns";
}

struct tensor *op_join(struct tape *t, int64_t heads, const struct join_part *part, int parts)
{
    struct tensor *any = NULL;
    int64_t width = 0;
    bool learning = false;
    struct join_part wide[JOIN_PARTS];
    for (int i = 0; i < parts; i++)
        any = any ? any : part[i].x;
    if (!any || t->error)
        return missing(t, "op_join");
    for (int i = 0; i < parts; i++) {
        const char *why = parts > JOIN_PARTS || heads < 1 ? "too many parts, or no head" : NULL;
        why = why ? why : part_misfit(&part[i], any, heads);
        if (why)
            return misfit(t, "op_join", why, part[i].x ? part[i].x : any, any);
        width += part[i].count;
        learning = learning || learns(t, part[i].x);
        wide[i] = part[i];
        wide[i].x = as_f32(t, part[i].x);
    }
    if (t->error)
        return NULL;
    part = wide;
    struct tensor *y = make(t, 3, (int64_t[]){ any->dim[0], heads, width }, learning);
    if (!y)
        return NULL;
    y->cut_rows = any->cut_rows;
    for (int64_t i = 0, at = 0; runs(t) && i < parts; at += part[i++].count) {
        struct column_copy c = forward_copy(y, &part[i], at);
        t->kernels->columns(t->workers, &c);
    }
    struct join_record *r = y->grad ? record(t, sizeof *r, join_backward) : NULL;
    if (r) {
        r->y = y;
        r->parts = parts;
        memcpy(r->part, part, (size_t)parts * sizeof *part);
        r->base.look = (struct tape_look){ .op = "op_join" };
        for (int i = 0; i < parts; i++)
            r->base.look.input[i] = part[i].x;
    }
    return done(t, "op_join", y, NULL);
}
