/* pipe: see pipe.h.
 *
 * Receives wait; sends do not, until their memory is needed again: an output stays where it is until its tape begins
 * anew, and by then its gradient has come, so it was received; an input's gradient is copied, for its tape is free
 * after the backward pass. Every wait is thus for something that the neighbour does earlier in its own order, and no
 * stage waits in a circle. From the last rank's chunks to the next ones of the first rank it is as between neighbours,
 * but that the first rank keeps so many copies of gradients that go back: the last receives them a group of
 * micro-batches later. Forward alone, outputs are received before as many as a group have come behind them.
 *
 * On a device the calls of a communicator run in the order in which they were started, each until its peer has joined
 * it: a send would hold up the receive behind it, which the peer may wait for. So each way between two neighbours is a
 * communicator of these two alone, on which one sends and the other receives, in the same order. */
#include "trainer/parallel/pipe.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/ops.h"

enum { TAG_FORWARD, TAG_BACKWARD, WAYS, OWN_MOST = 2 * WAYS };

/* One way to or from a neighbour. */
struct lane {
    struct comm *comm;
    int peer;
};

struct slot {
    struct tape *tape;
    bool busy; /* its activations are kept, for a backward pass of this piece */
    uint32_t k;
    int chunk;
    struct tensor *x, *y;
    struct comm_req sent; /* y */
};

struct copy { /* of an input's gradient */
    float *data;
    int64_t elems;
    struct comm_req sent;
};

struct pipe {
    struct comm *pp;                 /* NULL: one stage */
    struct lane in[WAYS], out[WAYS]; /* by tag */
    struct comm *own[OWN_MOST];      /* on a device: of lanes */
    int owns;
    struct compute *compute;
    struct pipe_shape s;
    int slots, copies, live, peak, next_copy;
    int64_t width;
    struct slot *slot;
    struct copy *copy;

    uint32_t most, planned; /* op is of so many micro-batches */
    struct pipe_op *op;     /* [schedule_ops(most)] */
    uint64_t *scratch;      /* of schedule_make */
    size_t ops;
};

static uint32_t group_of(const struct pipe *p)
{
    return p->most < (uint32_t)p->s.stages ? p->most : (uint32_t)p->s.stages;
}

static status *open_all(struct pipe *p, struct workers *w, struct compute *c, size_t cap_bytes)
{
    int depth = schedule_in_flight(&p->s, p->most), copies = p->s.chunks > 1 && p->s.stage == 0 ? (int)group_of(p) : 1;
    p->op = mem_array(NULL, schedule_ops(&p->s, p->most) + 1, sizeof *p->op);
    p->scratch = mem_array(NULL, schedule_scratch(&p->s, p->most) + 1, sizeof *p->scratch);
    p->slot = mem_calloc((size_t)depth, sizeof *p->slot);
    p->copy = mem_calloc((size_t)copies, sizeof *p->copy);
    if (!p->op || !p->scratch || !p->slot || !p->copy)
        return ERR(NO_MEMORY, "%d tapes of a pipeline", depth);
    p->copies = copies;
    for (; p->slots < depth; p->slots++) {
        TRY(tape_open(w, c, cap_bytes / (size_t)depth, &p->slot[p->slots].tape));
        tape_share(p->slot[p->slots].tape, p->s.how != PIPE_ZERO_BUBBLE);
    }
    return NULL;
}

static int rank_before(const struct pipe *p)
{
    return (p->s.stage + p->s.stages - 1) % p->s.stages;
}

static int rank_behind(const struct pipe *p)
{
    return (p->s.stage + 1) % p->s.stages;
}

/* In host memory no message holds up another. */
static void share_lanes(struct pipe *p)
{
    p->in[TAG_FORWARD] = p->out[TAG_BACKWARD] = (struct lane){ p->pp, rank_before(p) };
    p->out[TAG_FORWARD] = p->in[TAG_BACKWARD] = (struct lane){ p->pp, rank_behind(p) };
}

/* Of every border, both ways. Only with chunks something goes from the last rank to the first. Collective. */
static status *open_lanes(struct pipe *p)
{
    int borders = p->s.chunks > 1 ? p->s.stages : p->s.stages - 1;
    status *st = NULL;
    for (int i = 0; i < borders * WAYS; i++) {
        int before = i / WAYS, tag = i % WAYS;
        bool first = p->s.stage == before, second = p->s.stage == (before + 1) % p->s.stages;
        struct comm *c = NULL;
        st = status_first(st, comm_split(p->pp, first || second ? 0 : -1, second, &c));
        if (!c)
            continue;
        p->own[p->owns++] = c;
        *(first == (tag == TAG_FORWARD) ? &p->out[tag] : &p->in[tag]) = (struct lane){ c, first };
    }
    return st;
}

status *pipe_open(struct comm *pp, enum pipe_schedule how, int chunks, uint32_t most, int64_t width, struct workers *w,
                  struct compute *c, size_t cap_bytes, struct pipe **out)
{
    struct pipe *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a pipeline");
    CHECK(chunks == 1 || (pp && how == PIPE_INTERLEAVED), "%d chunks of a stage", chunks);
    p->pp = pp;
    p->s = (struct pipe_shape){ how, pp ? pp->size : 1, pp ? pp->rank : 0, chunks };
    p->width = width;
    p->most = most;
    p->compute = c;
    status *st = open_all(p, w, c, cap_bytes);
    if (pp && compute_host(c))
        share_lanes(p);
    else if (pp)
        st = comm_agree(pp, status_first(st, open_lanes(p)));
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
    for (int i = 0; i < p->copies; i++)
        compute_free(p->compute, p->copy[i].data, (size_t)p->copy[i].elems * sizeof(float));
    for (int i = 0; i < p->owns; i++)
        comm_close(p->own[i]);
    mem_free(p->slot);
    mem_free(p->copy);
    mem_free(p->op);
    mem_free(p->scratch);
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

static bool begins(const struct pipe *p, int chunk)
{
    return p->s.stage == 0 && chunk == 0;
}

bool pipe_last(const struct pipe *p)
{
    return p->s.stage == p->s.stages - 1;
}

bool pipe_ends(const struct pipe *p, int chunk)
{
    return pipe_last(p) && chunk == p->s.chunks - 1;
}

int pipe_peak(const struct pipe *p)
{
    return p->peak;
}

uint64_t pipe_sent_bytes(const struct pipe *p)
{
    uint64_t bytes = p->pp ? p->pp->sent_bytes : 0;
    for (int i = 0; i < p->owns; i++)
        bytes += p->own[i]->sent_bytes;
    return bytes;
}

/* ---- messages ---- */

static status *receive(struct pipe *p, struct tensor *x, int tag)
{
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    struct comm_xfer m = { p->in[tag].peer, tag, false, tag == TAG_FORWARD ? x->data : x->grad, bytes };
    return comm_exchange(p->in[tag].comm, &m, 1, compute_stream(p->compute));
}

static status *send(struct pipe *p, float *data, size_t bytes, int tag, struct comm_req *sent)
{
    struct comm_xfer m = { p->out[tag].peer, tag, true, data, bytes };
    return comm_iexchange(p->out[tag].comm, &m, 1, compute_stream(p->compute), sent);
}

static status *send_gradient(struct pipe *p, const struct tensor *x)
{
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    struct copy *c = &p->copy[p->next_copy];
    p->next_copy = (p->next_copy + 1) % p->copies;
    TRY(comm_wait(&c->sent));
    TRY(compute_copy(p->compute, c->data, x->grad, bytes));
    return send(p, c->data, bytes, TAG_BACKWARD, &c->sent);
}

static status *wait_sent(struct pipe *p)
{
    for (int i = 0; i < p->slots; i++)
        TRY(comm_wait(&p->slot[i].sent));
    for (int i = 0; i < p->copies; i++)
        TRY(comm_wait(&p->copy[i].sent));
    return NULL;
}

/* ---- passes ---- */

/* Before a pass, or instead of one that has no micro-batch: then *k is UINT32_MAX. */
static status *begin_pass(const struct pipe_work *w, uint32_t pass, int chunk, unsigned halves, uint32_t *k)
{
    *k = pass;
    bool any = !w->micro_batch || w->micro_batch(w->arg, pass, k);
    status *(*first)(void *, int, unsigned) = any ? w->begin : w->idle;
    *k = any ? *k : UINT32_MAX;
    return first ? first(w->arg, chunk, halves) : NULL;
}

static status *run_forward(struct pipe *p, uint32_t k, int chunk, struct slot *s, enum tape_mode mode,
                           const struct pipe_work *w)
{
    TRY(comm_wait(&s->sent));
    int64_t tokens = w->prepare(w->arg, k);
    tape_begin(s->tape, mode);
    s->tape->micro_batch = k;
    s->x = begins(p, chunk) ? NULL : op_boundary(s->tape, tokens, p->width);
    if (s->x)
        TRY(receive(p, s->x, TAG_FORWARD));
    s->y = w->forward(w->arg, s->tape, chunk, s->x);
    TRY(tape_end(s->tape));
    if (pipe_ends(p, chunk))
        return w->result(w->arg, k, s->y);
    return send(p, s->y->data, (size_t)tensor_elems(s->y) * sizeof(float), TAG_FORWARD, &s->sent);
}

static status *run_backward(struct pipe *p, struct slot *s, unsigned halves, const struct pipe_work *w)
{
    bool input = halves & (unsigned)TAPE_BACKWARD_INPUT, weight = halves & (unsigned)TAPE_BACKWARD_WEIGHT;
    if (input && !pipe_ends(p, s->chunk))
        TRY(receive(p, s->y, TAG_BACKWARD));
    (void)w->prepare(w->arg, s->k);
    TRY(tape_backward(s->tape, s->y, NULL, halves));
    if (input && s->x)
        TRY(send_gradient(p, s->x));
    if (!weight)
        return NULL;
    p->live--;
    s->busy = false;
    return w->added(w->arg, s->k, s->chunk);
}

static struct slot *free_slot(struct pipe *p)
{
    for (int i = 0; i < p->slots; i++)
        if (!p->slot[i].busy)
            return &p->slot[i];
    CHECK(false, "%d micro-batches are on %d tapes", p->live, p->slots);
}

static struct slot *slot_of(struct pipe *p, uint32_t k, int chunk)
{
    for (int i = 0; i < p->slots; i++)
        if (p->slot[i].busy && p->slot[i].k == k && p->slot[i].chunk == chunk)
            return &p->slot[i];
    CHECK(false, "micro-batch %u of chunk %d has no tape", k, chunk);
}

static status *run_op(struct pipe *p, uint32_t pass, const struct pipe_op *op, const struct pipe_work *w)
{
    static const unsigned halves[] = { [PIPE_PASS_FORWARD] = 0,
                                       [PIPE_PASS_BACKWARD] = TAPE_BACKWARD_ALL,
                                       [PIPE_PASS_INPUT] = TAPE_BACKWARD_INPUT,
                                       [PIPE_PASS_WEIGHT] = TAPE_BACKWARD_WEIGHT };
    uint32_t k;
    TRY(begin_pass(w, pass, op->chunk, halves[op->pass], &k));
    if (k == UINT32_MAX)
        return NULL;
    if (op->pass != PIPE_PASS_FORWARD)
        return run_backward(p, slot_of(p, k, op->chunk), halves[op->pass], w);
    struct slot *s = free_slot(p);
    s->busy = true;
    s->k = k;
    s->chunk = op->chunk;
    p->live++;
    p->peak = p->live > p->peak ? p->live : p->peak;
    return run_forward(p, k, op->chunk, s, TAPE_TRAIN, w);
}

status *pipe_train(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w)
{
    uint32_t n = end - first;
    CHECK(n <= p->most, "%u micro-batches where %u are the most", n, p->most);
    if (n != p->planned)
        p->ops = schedule_make(&p->s, n, p->scratch, p->op);
    p->planned = n;
    for (size_t i = 0; i < p->ops; i++)
        TRY(run_op(p, first + p->op[i].k, &p->op[i], w));
    return wait_sent(p);
}

status *pipe_forward(struct pipe *p, uint32_t first, uint32_t end, const struct pipe_work *w)
{
    uint32_t group = p->s.chunks > 1 ? group_of(p) : 1, pass = 0;
    for (uint32_t begin = first; begin < end; begin += group)
        for (int chunk = 0; chunk < p->s.chunks; chunk++)
            for (uint32_t i = 0, k; i < group && i < end - begin; i++, pass++) {
                TRY(begin_pass(w, begin + i, chunk, 0, &k));
                if (k != UINT32_MAX)
                    TRY(run_forward(p, k, chunk, &p->slot[pass % (uint32_t)p->slots], TAPE_FORWARD, w));
            }
    return wait_sent(p);
}

static status *take_copies(struct pipe *p, int64_t elems)
{
    for (int i = 0; i < p->copies && elems > p->copy[i].elems; i++) {
        struct copy *c = &p->copy[i];
        void *data;
        compute_free(p->compute, c->data, (size_t)c->elems * sizeof *c->data);
        *c = (struct copy){ 0 };
        TRY(status_wrap(compute_alloc(p->compute, (size_t)elems * sizeof *c->data, &data),
                        "a gradient between stages"));
        c->data = data;
        c->elems = elems;
    }
    return NULL;
}

status *pipe_dry(struct pipe *p, int64_t tokens, const struct pipe_work *w)
{
    for (int i = 0; i < p->slots * p->s.chunks; i++) {
        struct tape *t = p->slot[i / p->s.chunks].tape;
        int chunk = i % p->s.chunks;
        tape_begin(t, TAPE_DRY);
        struct tensor *x = begins(p, chunk) ? NULL : op_boundary(t, tokens, p->width);
        int64_t elems = x ? tensor_elems(x) : 0;
        (void)w->forward(w->arg, t, chunk, x);
        TRY(tape_end(t));
        TRY(take_copies(p, elems));
    }
    return NULL;
}
