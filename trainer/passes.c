/* passes: what a micro-batch goes through: forward, loss and backward, on as many stages as there are.
 *
 * Every stage builds every micro-batch of its data-parallel index itself, and has a part of the model; the last stage
 * has the loss. What the live reference makes of the micro-batches, and what a loss wants to know of the whole step,
 * come from passes over all of them before the first that trains: forward only, so no stage waits for a way back. */
#include "trainer/trainer.h"

#include <inttypes.h>
#include <string.h>

/* ---- where parameters or gradients are cut over ranks ---- */

struct shards *trainer_shards(const struct trainer *t, const struct model *m)
{
    if (m == t->ref_model)
        return t->ref_shards;
    return t->zero ? zero_shards(t->zero) : NULL;
}

int trainer_all_shards(const struct trainer *t, const struct model *m, struct shards *out[SHARDS_MOST])
{
    struct shards *experts = !t->experts         ? NULL
                             : m == t->ref_model ? t->experts->ref_shards
                             : t->experts->zero  ? zero_shards(t->experts->zero)
                                                 : NULL;
    int n = 0;
    out[n] = trainer_shards(t, m);
    n += out[n] != NULL;
    if (experts)
        out[n++] = experts;
    return n;
}

struct shards *trainer_shards_of(const struct trainer *t, const struct model *m, const struct param **p)
{
    if (m == t->ref_model)
        return experts_ref_shards(t->experts, t->ref_shards, &m->params, p);
    return t->zero ? zero_shards(experts_zero(t->experts, t->zero, &m->params, p)) : NULL;
}

status *trainer_refresh(const struct trainer *t, const struct model *m, uint64_t step, bool all)
{
    struct shards *s[SHARDS_MOST];
    int n = trainer_all_shards(t, m, s);
    for (int i = 0; i < n; i++)
        TRY(shards_refresh(s[i], step, all));
    return NULL;
}

/* ---- sums over dp that begin while backward goes on ---- */

static status *enter_block(void *arg, int64_t block, bool backward)
{
    struct trainer *t = arg;
    struct shards *s = trainer_shards(t, t->model);
    const struct tape_blocks *h = s ? shards_hooks(s) : NULL;
    return h ? h->enter(h->arg, block, backward) : NULL;
}

/* Block i is unit i + 1. A chunk that ends the model has the tied head behind its blocks. */
static status *leave_block(void *arg, int64_t block, bool backward)
{
    struct trainer *t = arg;
    const struct params *ps = &t->model->params;
    struct shards *s = trainer_shards(t, t->model);
    const struct tape_blocks *h = s ? shards_hooks(s) : NULL;
    if (h)
        TRY(h->leave(h->arg, block, backward));
    if (!backward)
        return NULL;
    if (params_hold(ps, params_chunks(ps) - 1, block + 1))
        TRY(tied_left(t->tied));
    return zero_left(t->zero, (int)block + 1);
}

void trainer_hooks(struct trainer *t, const struct model *m, bool early)
{
    struct shards *s = trainer_shards(t, m);
    t->sums = (struct tape_blocks){ t, enter_block, leave_block };
    for (int i = 0; i < pipe_tapes(t->pipe); i++)
        tape_blocks(pipe_tape(t->pipe, i), early ? &t->sums : s ? shards_hooks(s) : NULL);
}

/* ---- passes ---- */

/* How often a live reference has moved. */
static uint64_t reference_age(const struct trainer *t)
{
    int64_t every = t->cfg->algo.ref_sync_steps;
    return every ? t->optimiser_step / (uint64_t)every : 0;
}

struct tensor *trainer_forward(struct trainer *t, struct model *m, struct pack *p, struct tape *tape, int chunk,
                               struct tensor *x, struct logprob_stats *tok)
{
    if (t->routes)
        t->routes->step = m == t->ref_model || m->adapters_off ? reference_age(t) : t->step;
    p->own.x = x;
    p->own.chunk = chunk;
    struct tensor *h = m->ops->forward(m, tape, &p->own);
    if (!pipe_ends(t->pipe, chunk))
        return op_outgoing(tape, h);
    struct tensor *logp = op_logprob_stats(tape, h, m->ops->head(m), p->own_target, 1.0f, tok);
    return op_all_tokens(tape, logp, p->in.tokens, tok);
}

status *passes_share(struct trainer *t, double *value, size_t count)
{
    return t->pp ? comm_bcast(t->pp, value, count * sizeof *value, t->pp->size - 1, NULL) : NULL;
}

/* One pass over the micro-batches of a step. */
struct passing {
    struct trainer *t;
    struct phase *p;
    struct model *m;
    uint32_t k;    /* micro-batches */
    bool training; /* packs for `loss`, else for `statistic`: algo_ops.data says which sequences these are */
    const struct batch_counts *counts;
    struct logprob_stats tok;
    uint32_t end; /* with expert parallelism: a micro-batch of this number or more is an empty one */
};

static bool is_empty(const struct passing *g, uint32_t k)
{
    return g->t->ep && k >= g->end;
}

static int64_t prepare(void *arg, uint32_t k)
{
    const struct passing *g = arg;
    struct phase *p = g->p;
    uint32_t mb = p->stream.micro_batch;
    const uint64_t *row = p->stream.row + (size_t)k * mb;
    if (is_empty(g, k))
        pack_build(&p->pack, NULL, 0);
    else if (p->data->kind == DATASET_LABELLED)
        pack_build_sides(&p->pack, row, mb, g->training ? 0 : 1, 1);
    else
        pack_build(&p->pack, row, mb);
    p->pack.own.micro_batch = k;
    return p->pack.own.tokens;
}

static struct tensor *forward(void *arg, struct tape *tape, int chunk, struct tensor *x)
{
    struct passing *g = arg;
    return trainer_forward(g->t, g->m, &g->p->pack, tape, chunk, x, NULL);
}

static struct tensor *forward_with_stats(void *arg, struct tape *tape, int chunk, struct tensor *x)
{
    struct passing *g = arg;
    return trainer_forward(g->t, g->m, &g->p->pack, tape, chunk, x, &g->tok);
}

static bool micro_batch(void *arg, uint32_t pass, uint32_t *k)
{
    const struct passing *g = arg;
    return zero_micro_batch(g->t->zero, g->k, pass, k) || g->t->ep;
}

static bool makes_gradients(unsigned halves)
{
    return halves & (unsigned)TAPE_BACKWARD_WEIGHT;
}

/* Around a pass where parameters or gradients are cut over ranks. */
static status *begin(void *arg, int chunk, unsigned halves)
{
    const struct passing *g = arg;
    struct shards *s = trainer_shards(g->t, g->m);
    if (makes_gradients(halves) && pipe_ends(g->t->pipe, chunk))
        tied_begin_pass(g->t->tied);
    return s ? shards_begin(s, makes_gradients(halves)) : NULL;
}

static status *idle(void *arg, int chunk, unsigned halves)
{
    const struct passing *g = arg;
    struct shards *s = trainer_shards(g->t, g->m);
    if (!halves)
        return s ? shards_idle(s, chunk) : NULL; /* a live reference is whole with ZeRO 2 */
    if (!makes_gradients(halves))
        return shards_idle_backward(s, chunk, false);
    TRY(zero_idle(g->t->zero, chunk));
    return pipe_ends(g->t->pipe, chunk) ? tied_idle(g->t->tied) : NULL;
}

/* This rank's passes of a step. */
static status *pass_all(struct passing *g, bool training, struct pipe_work w)
{
    struct trainer *t = g->t;
    uint32_t passes = zero_passes(t->zero, g->k);
    if (t->ep) { /* every rank makes as many */
        g->end = zero_micro_batches_end(t->zero, g->k);
        passes = zero_most_passes(t->zero, g->k);
        if (training)
            experts_begin(t->experts, passes);
    }
    w.micro_batch = micro_batch;
    w.begin = begin;
    w.idle = idle;
    w.prepare = prepare;
    w.arg = g;
    /* an empty pass behind the last micro-batch: gradients are complete when that is done */
    trainer_hooks(t, g->m, training && zero_passes(t->zero, g->k) == passes);
    return training ? pipe_train(t->pipe, 0, passes, &w) : pipe_forward(t->pipe, 0, passes, &w);
}

/* ---- references ---- */

static double *live_sums(const struct trainer *t, uint32_t k)
{
    return t->live_sums + (size_t)k * 2 * (size_t)t->cfg->train.micro_batch;
}

/* Whether losses are made on the device. */
static bool made_there(const struct passing *g)
{
    return logps_stay(g->t) && g->p->algo->slopes;
}

/* Whether what a step's losses are made of stays on the device until the step has been queued. A loss that wants to
 * know something of the whole step first does not: the host sums that up over ranks. */
static bool losses_stay(const struct passing *g)
{
    return made_there(g) && !algo_statistics(g->p->algo, g->p->algo_config);
}

static status *keep_sums(void *arg, uint32_t k, struct tensor *logp)
{
    const struct passing *g = arg;
    struct logps x;
    if (is_empty(g, k))
        return NULL;
    if (losses_stay(g))
        return logps_live(g->t, g->p, k, logp);
    TRY(logps_get(g->t, logp, NULL, &x));
    algo_sums(g->p->algo, g->p->algo_config, &g->p->pack, x.logp, live_sums(g->t, k));
    return NULL;
}

/* The live reference's sums of this rank's micro-batches. */
static status *live_references(const struct passing *like)
{
    struct trainer *t = like->t;
    struct passing g = *like;
    if (!t->ref_live)
        return NULL;
    t->logps.live.used = 0;
    g.m = reference_begin(t);
    status *st = pass_all(&g, false, (struct pipe_work){ .forward = forward, .result = keep_sums });
    reference_done(t);
    return st;
}

/* Reference sums of the sequences of pack k, which is built; NULL if the loss needs none. */
static const double *references(const struct passing *g, uint32_t k)
{
    const struct trainer *t = g->t;
    const struct pack *pack = &g->p->pack;
    if (!algo_needs_reference(g->p->algo, g->p->algo_config))
        return NULL;
    if (t->ref_live)
        return live_sums(t, k);
    double *out = t->scratch + 4 * (size_t)pack->in.seg.count;
    uint64_t s = (uint64_t)g->p->data->sequences, first = (uint64_t)pack->first_side, n = (uint64_t)pack->sides;
    for (uint32_t r = 0; r < pack->rows; r++)
        for (uint64_t i = 0; i < n; i++)
            out[r * n + i] = t->ref.logp[pack->row[r] * s + first + i];
    return out;
}

/* ---- statistics ---- */

static status *keep_statistics(void *arg, uint32_t k, struct tensor *logp)
{
    const struct passing *g = arg;
    const struct algo_ops *a = g->p->algo;
    size_t n = (size_t)algo_statistics(a, g->p->algo_config);
    struct logps x;
    if (is_empty(g, k))
        return NULL;
    TRY(logps_get(g->t, logp, NULL, &x));
    a->statistic(g->p->algo_config, &g->p->pack, x.logp, references(g, k), g->t->scratch, g->t->scalar + k * n);
    return NULL;
}

/* Sums over all micro-batches of what the last stage has in t->scalar, to all stages. */
static status *sum_scalars(struct trainer *t, uint32_t k, int width, double *sums)
{
    if (pipe_last(t->pipe))
        TRY(zero_sum_scalars(t->zero, t->scalar, k, (uint32_t)width, sums));
    return passes_share(t, sums, (size_t)width);
}

/* Shapes were checked before: what fails on a rank is a bug or a broken machine, and the others wait for it. */
static void must_pass(struct trainer *t, status *st)
{
    if (st)
        trainer_abort(t, status_wrap(st, "step %" PRIu64, t->step + 1));
}

status *passes_statistics(struct trainer *t, struct phase *p, uint32_t k, double sums[ALGO_STATISTICS],
                          struct batch_counts *counts)
{
    struct passing g = { .t = t, .p = p, .m = t->model, .k = k };
    int n = algo_statistics(p->algo, p->algo_config);
    if (!n)
        return NULL;
    must_pass(t, live_references(&g));
    must_pass(t, pass_all(&g, false, (struct pipe_work){ .forward = forward, .result = keep_statistics }));
    counts->statistic = sums;
    return sum_scalars(t, k, n, sums);
}

/* ---- training ---- */

static double *metric_of(const struct passing *g, uint32_t k)
{
    return g->t->scalar + (size_t)k * (size_t)g->p->algo->metric_count;
}

/* The loss of micro-batch k, whose pack is built, and its gradient. */
static status *take_loss(void *arg, uint32_t k, struct tensor *logp)
{
    const struct passing *g = arg;
    const struct algo_ops *a = g->p->algo;
    struct logps x;
    if (is_empty(g, k))
        return NULL;
    bool live = g->t->ref_live && losses_stay(g) && algo_needs_reference(a, g->p->algo_config);
    if (made_there(g))
        return logps_loss(g->t, g->p, k, g->counts, logp, &g->tok, live ? NULL : references(g, k), live);
    TRY(logps_get(g->t, logp, &g->tok, &x));
    a->loss(g->p->algo_config, &g->p->pack, x.logp, &x.tok, references(g, k), g->counts, g->t->scratch,
            logps_dlogp(g->t, logp), metric_of(g, k));
    return logps_put(g->t, logp);
}

/* What the device has kept of this rank's micro-batches becomes losses and metrics. */
static void take_kept(struct passing *g)
{
    struct trainer *t = g->t;
    const struct logps_room *r = &t->logps;
    for (uint32_t i = 0; losses_stay(g) && i < r->live.used; i++)
        for (int32_t s = 0; s < r->segments; s++)
            live_sums(t, r->live.micro_batch[i])[s] = r->live.seen[(int32_t)i * r->segments + s].weighted;
    for (uint32_t i = 0; i < r->step.used; i++) {
        uint32_t k = r->step.micro_batch[i];
        (void)prepare(g, k);
        g->p->algo->from_sums(g->p->algo_config, &g->p->pack, r->step.seen + (size_t)i * (size_t)r->segments,
                              references(g, k), g->counts, metric_of(g, k));
    }
}

static status *added(void *arg, uint32_t k, int chunk)
{
    const struct passing *g = arg;
    struct trainer *t = g->t;
    bool empty = is_empty(g, k);
    TRY(experts_added(t->experts, chunk));
    TRY(empty ? zero_added_none(t->zero, chunk) : zero_added_chunk(t->zero, k, chunk));
    if (!pipe_ends(t->pipe, chunk))
        return NULL;
    return empty ? tied_added_none(t->tied) : tied_added(t->tied, k);
}

status *passes_train(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts)
{
    struct passing g = { .t = t, .p = p, .m = t->model, .k = k, .training = true, .counts = counts };
    t->logps.step.used = t->logps.live.used = 0;
    zero_begin(t->zero, k);
    tied_begin(t->tied, k);
    if (algo_needs_reference(p->algo, p->algo_config))
        must_pass(t, live_references(&g));
    must_pass(t, pass_all(&g, true,
                          (struct pipe_work){ .forward = forward_with_stats, .result = take_loss, .added = added }));
    must_pass(t, logps_fetch(t));
    return NULL;
}

status *passes_metrics(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts,
                       double sums[ALGO_METRICS])
{
    struct passing g = { .t = t, .p = p, .k = k, .training = true, .counts = counts };
    g.end = zero_micro_batches_end(t->zero, k);
    take_kept(&g);
    return sum_scalars(t, k, p->algo->metric_count, sums);
}
