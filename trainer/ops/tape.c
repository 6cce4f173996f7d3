/* tape: begin, end, replay. What an op does and records is in ops.c. */
#include "trainer/ops/tape.h"

#include "comm/base/mem.h"
#include "comm/comm.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/watch.h"

enum { BLOCK_BYTES = 4 << 20 };

int64_t tensor_elems(const struct tensor *x)
{
    int64_t n = 1;
    for (int i = 0; i < x->ndim; i++)
        n *= x->dim[i];
    return n;
}

static void *get_there(void *arg, size_t bytes)
{
    void *p = NULL;
    status *st = compute_alloc(arg, bytes, &p);
    status_free(st); /* the caller says how much it wanted */
    return st ? NULL : p;
}

static void put_there(void *arg, void *p, size_t bytes)
{
    compute_free(arg, p, bytes);
}

status *tape_open(struct workers *w, struct compute *c, size_t cap_bytes, struct tape **out)
{
    struct tape *t = mem_calloc(1, sizeof *t);
    if (!t)
        return ERR(NO_MEMORY, "a tape");
    t->compute = c;
    t->workers = c ? c->workers : w;
    t->kernels = c ? c->kernels : &kernels_cpu;
    t->mode = TAPE_FORWARD;
    size_t block = cap_bytes && cap_bytes < BLOCK_BYTES ? cap_bytes : BLOCK_BYTES;
    t->records = &t->arena;
    if (compute_host(c)) {
        arena_init(&t->arena, block, cap_bytes);
    } else {
        arena_init_from(&t->arena, (struct arena_source){ get_there, put_there, c }, block, cap_bytes);
        arena_init(&t->host, 0, 0);
        t->records = &t->host;
    }
    *out = t;
    return NULL;
}

void tape_close(struct tape *t)
{
    if (!t)
        return;
    status_free(t->error);
    arena_fini(&t->arena);
    arena_fini(&t->host);
    mem_free(t);
}

void tape_bf16(struct tape *t, bool bf16)
{
    t->bf16 = bf16;
}

void tape_low(struct tape *t, bool low)
{
    t->low = low && !compute_host(t->compute);
}

void tape_share(struct tape *t, bool share)
{
    t->share = share;
}

void tape_recompute(struct tape *t, enum tape_recompute what)
{
    t->recompute = what;
}

void tape_watch(struct tape *t, struct watch *w)
{
    t->watch = w;
}

void tape_blocks(struct tape *t, const struct tape_blocks *b)
{
    t->blocks = b;
}

void tape_spread(struct tape *t, struct comm *tp, bool sequence)
{
    t->tp = tp;
    t->sequence = sequence;
}

void tape_experts(struct tape *t, struct comm *ep)
{
    t->ep = ep;
}

void tape_context(struct tape *t, struct comm *context)
{
    t->context = context && context->size > 1 ? context : NULL;
}

void tape_begin(struct tape *t, enum tape_mode mode)
{
    status_free(t->error);
    t->error = NULL;
    t->last = NULL;
    t->rope = NULL;
    t->copies = NULL;
    t->outside = t->inside = NULL;
    t->room = NULL;
    t->room_floats = 0;
    t->context_part = NULL;
    t->context_floats = 0;
    t->context_order = NULL;
    t->block_bytes = t->block_host = 0;
    t->grads.at = NULL;
    t->grads.used = t->grads.most = 0;
    t->grads.open = false;
    t->block = -1;
    t->routed = 0;
    t->mode = mode;
    arena_reset(&t->arena);
    arena_reset(&t->host);
}

/* Replace the blocks a dry pass has grown by one of the same use: then any pass that takes no more fits, whatever its
 * sizes. */
static status *settle(struct arena *a)
{
    size_t peak = a->peak_bytes, cap = a->cap_bytes;
    if (!a->first || a->held_bytes <= a->block_bytes)
        return NULL;
    uint64_t grown = a->grown;
    struct arena_source source = a->source;
    arena_fini(a);
    arena_init_from(a, source, peak, cap);
    void *p = arena_alloc(a, peak);
    a->grown += grown;
    arena_reset(a);
    return p ? NULL : ERR(NO_MEMORY, "%zu bytes for activations", peak);
}

/* Room for a block that backward runs again. */
static void reserve(struct tape *t, struct arena *a, size_t bytes)
{
    if (!t->error && bytes && !arena_alloc(a, bytes))
        tape_fail(t, ERR(NO_MEMORY, "%zu bytes of activations of a block: %zu in use, cap %zu", bytes, a->used_bytes,
                         a->cap_bytes));
}

/* The first error since it was last taken. */
static status *take_error(struct tape *t)
{
    status *st = t->error;
    t->error = NULL;
    return status_first(st, compute_check(t->compute, false));
}

status *tape_end(struct tape *t)
{
    if (t->mode == TAPE_DRY) {
        t->grads.bytes = t->grads.most > t->grads.bytes ? t->grads.most : t->grads.bytes;
        reserve(t, &t->arena, t->grads.bytes);
        reserve(t, &t->arena, t->block_bytes);
        reserve(t, &t->host, t->block_host);
    }
    status *st = take_error(t);
    if (st) { /* nothing to replay */
        t->last = NULL;
        t->mode = TAPE_FORWARD;
        return st;
    }
    if (t->mode != TAPE_DRY)
        return NULL;
    TRY(settle(&t->arena));
    return settle(&t->host);
}

void tape_replay(struct tape *t, const struct tape_record *last, unsigned halves)
{
    for (const struct tape_record *r = last; r && (!t->watch || !t->error); r = r->prev) {
        r->backward(t, r, halves);
        if (t->watch)
            watch_record(t, r, halves);
    }
}

status *tape_backward(struct tape *t, struct tensor *root, const float *droot, unsigned halves)
{
    if (t->mode != TAPE_TRAIN || t->error)
        return ERR(INVALID, "backward needs a TAPE_TRAIN pass without error");
    if (!root || !root->grad)
        return ERR(INVALID, "backward from a tensor without gradient");
    if (halves == 0 || halves > TAPE_BACKWARD_ALL)
        return ERR(INVALID, "backward halves %u are none", halves);
    if (halves != TAPE_BACKWARD_ALL && t->grads.at)
        return ERR(INVALID, "backward in halves, and blocks share the memory of gradients");
    if (root->low_grad || root->owner)
        return ERR(INVALID, "backward from a view, or from a tensor with a gradient in bf16");
    if (droot && droot != root->grad)
        t->kernels->scale(t->workers, root->grad, droot, 1.0f, tensor_elems(root));
    root->fresh = false;
    if (t->watch)
        watch_root(t, root);
    if (!t->watch || !t->error)
        tape_replay(t, t->last, halves);
    return take_error(t);
}

struct tensor *tape_fail(struct tape *t, status *st)
{
    if (t->error)
        status_free(st);
    else
        t->error = st;
    return NULL;
}
