/* block: a model's blocks, or their attention alone, with activations kept, or run again in backward (Chen et al. 2016,
 * arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, 5).
 *
 * What a block takes lies in a region of the arena that is released when it is done; a dry pass notes the largest one,
 * and tape_end lets the arena hold it behind all that is kept, where backward needs it. */
#include "trainer/ops/op.h"

/* One end of a block's records on the tape, for tape_blocks. */
struct end_record {
    struct tape_record base;
    int64_t index;
};

struct block_record {
    struct tape_record base;
    struct tensor *x, *y;
    block_fn *run;
    const void *arg;
    int64_t index;
    bool whole; /* a block, not a part of one: what surrounds blocks is called around it */
};

/* What of a tape must not point into a region that is gone. */
struct region {
    struct arena_mark mark, host;
    struct tape_record *last;
    bool grads_open;
    struct rope_table *rope;
    struct tape_copy *copies;
    float *room, *context_part;
    int64_t room_floats, context_floats, context_rows, block;
    int32_t *context_order;
    enum tape_mode mode;
};

/* block: what runs in it. */
static struct region open_region(struct tape *t, int64_t block, enum tape_mode mode)
{
    struct region r = { .mark = arena_mark(&t->arena),
                        .host = arena_mark(&t->host),
                        .copies = t->copies,
                        .last = t->last,
                        .grads_open = t->grads.open,
                        .rope = t->rope,
                        .room = t->room,
                        .context_part = t->context_part,
                        .room_floats = t->room_floats,
                        .context_floats = t->context_floats,
                        .context_rows = t->context_rows,
                        .context_order = t->context_order,
                        .block = t->block,
                        .mode = t->mode };
    t->last = NULL;
    t->grads.open = false;
    t->block = block;
    t->outside = t->inside = NULL;
    t->mode = mode;
    return r;
}

static void close_region(struct tape *t, const struct region *r)
{
    size_t bytes = t->arena.used_bytes - r->mark.used_bytes, host = t->host.used_bytes - r->host.used_bytes;
    t->block_bytes = bytes > t->block_bytes ? bytes : t->block_bytes;
    t->block_host = host > t->block_host ? host : t->block_host;
    arena_release(&t->arena, r->mark);
    arena_release(&t->host, r->host);
    t->copies = r->copies;
    t->last = r->last;
    t->grads.open = r->grads_open;
    t->rope = r->rope;
    t->room = r->room;
    t->room_floats = r->room_floats;
    t->context_part = r->context_part;
    t->context_floats = r->context_floats;
    t->context_rows = r->context_rows;
    t->context_order = r->context_order;
    t->outside = t->inside = NULL;
    t->block = r->block;
    t->mode = r->mode;
}

/* False: the tape has failed. */
static bool enter(struct tape *t, int64_t index, bool backward)
{
    status *st = t->blocks && runs(t) && !t->error ? t->blocks->enter(t->blocks->arg, index, backward) : NULL;
    if (st)
        tape_fail(t, st);
    return !t->error;
}

static bool leave(struct tape *t, int64_t index, bool backward)
{
    status *st = t->blocks && runs(t) && !t->error ? t->blocks->leave(t->blocks->arg, index, backward) : NULL;
    if (st)
        tape_fail(t, st);
    return !t->error;
}

static void first_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    if (WEIGHT_HALF(halves))
        (void)leave(t, ((const struct end_record *)base)->index, true);
}

static void last_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    (void)halves;
    (void)enter(t, ((const struct end_record *)base)->index, true);
}

static void mark_end(struct tape *t, int64_t index,
                     void (*backward)(struct tape *, const struct tape_record *, unsigned))
{
    struct end_record *r = t->blocks && t->mode != TAPE_FORWARD ? record(t, sizeof *r, backward) : NULL;
    if (r)
        r->index = index;
}

/* The gradient of a block's output is needed while that of the next block's activations is made. */
static void keep_gradient(struct tape *t, struct tensor *y)
{
    struct tensor *own = y ? owner_of(y) : NULL;
    const char *p = own ? own->grad : NULL, *from = t->grads.at;
    if (p && (p == (const char *)t || (from && p >= from && p < from + t->grads.bytes)))
        own->grad = take_there(t, (size_t)tensor_elems(own), own->low_grad ? sizeof(uint16_t) : sizeof(float));
}

/* A block whose activations are kept. */
static struct tensor *run_kept(struct tape *t, block_fn *run, const void *arg, int64_t index, struct tensor *x)
{
    if (!enter(t, index, false))
        return NULL;
    mark_end(t, index, first_backward);
    t->block = index;
    t->grads.open = t->share && t->mode != TAPE_FORWARD;
    t->grads.used = 0;
    struct tensor *y = run(t, arg, index, x);
    t->grads.open = false;
    keep_gradient(t, y);
    t->block = -1;
    mark_end(t, index, last_backward);
    return leave(t, index, false) ? y : NULL;
}

static void block_backward(struct tape *t, const struct tape_record *base, unsigned halves)
{
    const struct block_record *r = (const void *)base;
    if (t->error || (r->whole && !enter(t, r->index, true)))
        return;
    struct region region = open_region(t, r->index, TAPE_TRAIN);
    struct tensor *x = twin(t, r->x), *y = x ? r->run(t, r->arg, r->index, x) : NULL;
    if (y && y->grad && !t->error) {
        unsigned needed = WEIGHT_HALF(halves) ? (unsigned)TAPE_BACKWARD_ALL : halves; /* gradients inside are gone */
        t->kernels->scale(t->workers, grad_over(y), grad_f32(t, r->y), 1.0f, tensor_elems(y));
        tape_replay(t, t->last, needed);
        if (INPUT_HALF(halves) && r->x->grad)
            t->kernels->axpy(t->workers, grad_f32(t, r->x), grad_f32(t, x), 1.0f, tensor_elems(x));
    }
    close_region(t, &region);
    if (r->whole && WEIGHT_HALF(halves))
        (void)leave(t, r->index, true);
}

/* Keeps x and y alone. */
static struct tensor *run_dropped(struct tape *t, block_fn *run, const void *arg, size_t bytes, int64_t index,
                                  struct tensor *x, bool whole)
{
    struct tensor *y = make_like(t, x, true, false);
    void *own = take(t, 1, bytes);
    if (!y || !own)
        return NULL;
    memcpy(own, arg, bytes);
    if (whole && !enter(t, index, false))
        return NULL;
    struct region region = open_region(t, index, runs(t) ? TAPE_FORWARD : TAPE_DRY);
    struct tensor *in = runs(t) ? x : twin(t, x), *out = in ? run(t, own, index, in) : NULL;
    if (out && (!same_shape(out, x) || !is_f32(out)))
        out = misfit(t, "op_block", "a block's output has its input's shape", x, out);
    if (out && runs(t))
        copy_there(t, y->data, out->data, (size_t)tensor_elems(y) * sizeof(float));
    close_region(t, &region);
    if (whole)
        (void)leave(t, index, false);
    struct block_record *r = out && y->grad ? record(t, sizeof *r, block_backward) : NULL;
    if (r) {
        r->x = x;
        r->y = y;
        r->run = run;
        r->arg = own;
        r->index = index;
        r->whole = whole;
        r->base.look = (struct tape_look){ whole ? "op_block" : "op_block_attention", { x }, { NULL } };
    }
    return out && !t->error ? y : NULL;
}

struct tensor *op_block(struct tape *t, block_fn *run, const void *arg, size_t bytes, int64_t index, struct tensor *x)
{
    if (!x)
        return missing(t, "op_block");
    if (t->recompute != TAPE_RECOMPUTE_BLOCK)
        return run_kept(t, run, arg, index, x);
    return run_dropped(t, run, arg, bytes, index, x, true);
}

struct tensor *op_block_attention(struct tape *t, block_fn *run, const void *arg, size_t bytes, int64_t index,
                                  struct tensor *x)
{
    if (!x)
        return missing(t, "op_block_attention");
    if (t->recompute != TAPE_RECOMPUTE_ATTENTION)
        return run(t, arg, index, x);
    return run_dropped(t, run, arg, bytes, index, x, false);
}
