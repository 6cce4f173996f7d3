/* pipe: see pipe.h.
 *
 * Receives wait; sends do not, until their memory is needed again: an output stays where it is until its tape begins
 * anew, and by then its gradient has come, so it was received; an input's gradient is copied, for its tape is free
 * after the backward pass. Every wait is thus for something that the neighbour does earlier in its own order, and no
 * stage waits in a circle. */
#include "trainer/parallel/pipe.h"

#include "comm/base/mem.h"
#include "trainer/ops/ops.h"

#include <string.h>

enum { TAG_FORWARD, TAG_BACKWARD };

struct slot {
    struct tape *tape;
    struct tensor *x, *y;
    struct comm_req sent; /* y */
};

struct pipe {
    struct comm *pp; /* NULL: one stage */
    int stages, stage, slots, live, peak;
    int delay; /* passes from a micro-batch's gradients of activations to those of weights; 0: both at once */
    int64_t width;
    struct slot *slot;
    float *dx; /* a copy of an input's gradient */
    int64_t dx_elems;
    struct comm_req dx_sent;
};

status *pipe_open(struct comm *pp, enum pipe_schedule how, uint32_t most, int64_t width, struct workers *w,
                  size_t cap_bytes, struct pipe **out)
{
    struct pipe *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a pipeline");
    p->pp = pp;
    p->stages = pp ? pp->size : 1;
    p->stage = pp ? pp->rank : 0;
    p->width = width;
    p->delay = how == PIPE_ZERO_BUBBLE ? p->stage : 0;
    int depth = p->stages - p->stage + p->delay;
    depth = most < (uint32_t)depth ? (int)most : depth;
    p->slot = mem_calloc((size_t)depth, sizeof *p->slot);
    status *st = p->slot ? NULL : ERR(NO_MEMORY, "%d tapes", depth);
    for (; !st && p->slots < depth; p->slots++)
        st = tape_open(w, NULL, cap_bytes / (size_t)depth, &p->slot[p->slots].tape);
    if (st) {
        pipe_close(p);
        return st;
    }
    *out = p;
    return NULL;
}

void pipe_close(struct pipe *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->slots; i++)
        tape_close(p->slot[i].tape);
    mem_free(p->slot);
    mem_free(p->dx);
    mem_free(p);
}

int pipe_tapes(const struct pipe *p)
{
    return p->slots;
}

struct tape *pipe_tape(struct pipe *p, int i)
{
    return p->slot[i].tape;
}

static bool is_first(const struct pipe *p)
{
    return p->stage == 0;
}

bool pipe_last(const struct pipe *p)
{
    return p->stage == p->stages - 1;
}

int pipe_peak(const struct pipe *p)
{
    return p->peak;
}

/* ---- messages ---- */

static struct comm_xfer message(struct tensor *x, bool send, int peer, int tag)
{
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    return (struct comm_xfer){ peer, tag, send, tag == TAG_FORWARD ? x->data : x->grad, bytes };
}

static status *receive(struct pipe *p, struct tensor *x, int peer, int tag)
{
    struct comm_xfer m = message(x, false, peer, tag);
    return comm_exchange(p->pp, &m, 1, NULL);
}

static status *send_gradient(struct pipe *p, const struct tensor *x)
{
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    TRY(comm_wait(&p->dx_sent));
    memcpy(p->dx, x->grad, bytes);
    struct comm_xfer m = { p->stage - 1, TAG_BACKWARD, true, p->dx, bytes };
    return comm_iexchange(p->pp, &m, 1, NULL, &p->dx_sent);
}

static status *wait_sent(struct pipe *p)
{
    for (int i = 0; i < p->slots; i++)
        TRY(comm_wait(&p->slot[i].sent));
    return comm_wait(&p->dx_sent);
}

/* ---- passes ---- */

static status *run_forward(struct pipe *p, uint32_t k, struct slot *s, enum tape_mode mode, const struct pipe_work *w)
{
    TRY(comm_wait(&s->sent));
    int64_t tokens = w->prepare(w->arg, k);
    tape_begin(s->tape, mode);
    s->x = is_first(p) ? NULL : op_boundary(s->tape, tokens, p->width);
    if (s->x)
        TRY(receive(p, s->x, p->stage - 1, TAG_FORWARD));
    s->y = w->forward(w->arg, s->tape, s->x);
    TRY(tape_end(s->tape));
    if (pipe_last(p)) {
        w->result(w->arg, k, s->y);
        return NULL;
    }
    struct comm_xfer m = message(s->y, true, p->stage + 1, TAG_FORWARD);
    return comm_iexchange(p->pp, &m, 1, NULL, &s->sent);
}

static status *run_backward(struct pipe *p, uint32_t k, struct slot *s, unsigned halves, const struct pipe_work *w)
{
    bool input = halves & (unsigned)TAPE_BACKWARD_INPUT, weight = halves & (unsigned)TAPE_BACKWARD_WEIGHT;
    if (input && !pipe_last(p))
        TRY(receive(p, s->y, p->stage + 1, TAG_BACKWARD));
    (void)w->prepare(w->arg, k);
    TRY(tape_backward(s->tape, s->y, NULL, halves));
    if (input && s->x)
        TRY(send_gradient(p, s->x));
    if (!weight)
        return NULL;
    p->live--;
    return w->added(w->arg, k);
}

status *pipe_train(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w)
{
    uint32_t n = end - first, ahead = (uint32_t)(p->stages - p->stage - 1), delay = (uint32_t)p->delay,
             slots = (uint32_t)p->slots;
    unsigned now = delay ? TAPE_BACKWARD_INPUT : TAPE_BACKWARD_ALL;
    ahead = n < ahead ? n : ahead;
    for (uint32_t i = 0; i < n + ahead + delay; i++) {
        if (i < n) {
            p->live++;
            p->peak = p->live > p->peak ? p->live : p->peak;
            CHECK(p->live <= p->slots, "%d micro-batches on %d tapes", p->live, p->slots);
            TRY(run_forward(p, first + i, &p->slot[i % slots], TAPE_TRAIN, w));
        }
        if (i >= ahead && i - ahead < n)
            TRY(run_backward(p, first + i - ahead, &p->slot[(i - ahead) % slots], now, w));
        if (delay && i >= ahead + delay) {
            uint32_t k = i - ahead - delay;
            TRY(run_backward(p, first + k, &p->slot[k % slots], TAPE_BACKWARD_WEIGHT, w));
        }
    }
    return wait_sent(p);
}

status *pipe_forward(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w)
{
    for (uint32_t k = first; k < end; k++)
        TRY(run_forward(p, k, &p->slot[(k - first) % (uint32_t)p->slots], TAPE_FORWARD, w));
    return wait_sent(p);
}

status *pipe_dry(struct pipe *p, int64_t tokens, const struct pipe_work *w)
{
    for (int i = 0; i < p->slots; i++) {
        struct tape *t = p->slot[i].tape;
        tape_begin(t, TAPE_DRY);
        struct tensor *x = is_first(p) ? NULL : op_boundary(t, tokens, p->width);
        int64_t elems = x ? tensor_elems(x) : 0;
        (void)w->forward(w->arg, t, x);
        TRY(tape_end(t));
        if (elems <= p->dx_elems)
            continue;
        float *dx = mem_array(p->dx, (size_t)elems, sizeof *dx);
        if (!dx)
            return ERR(NO_MEMORY, "a gradient between stages of %lld elements", (long long)elems);
        p->dx = dx;
        p->dx_elems = elems;
    }
    return NULL;
}
