/* train: the loop and the step.
 *
 * A step: deal the global batch into micro-batches; run this rank's (passes.c: forward, loss, backward, into the lane's
 * gradients); sum gradients over ranks; wait until the save in flight has copied what will be overwritten; update; move
 * the save on. Nothing of a step depends on the mesh but who does what. */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

void trainer_abort(struct trainer *t, status *st)
{
    log_status(t->log, LOG_ERROR, status_at_rank(st, t->world->rank));
    comm_abort(t->world, status_exit_code(st));
}

void trainer_watch(struct trainer *t, const char *name, double value)
{
    bool warmup =
        trainer_phase_at(t, t->step ? t->step - 1 : 0) != t->phases - 1; /* another loss, not to be compared */
    if (warmup || strcmp(name, t->cfg->checkpoint.keep_metric) != 0)
        return;
    t->watched = value;
    t->watched_step = t->step;
}

int trainer_phase_at(const struct trainer *t, uint64_t step)
{
    int p = t->phases - 1;
    while (p > 0 && step < t->phase[p].first_step)
        p--;
    return p;
}

/* --- phases */

/* Of a model's values: those that train, and frozen ones; and the same of experts, where they have shards of their own.
 */
enum { FROZEN = 1, EXPERTS = 2, PARTS = 4 };

/* A part of the live reference's values, as far as this rank holds them: *n floats; *theta: those of the model beside
 * them. */
static float *reference_values(const struct trainer *t, int part, float **theta, uint64_t *n)
{
    const struct params *ps = &t->model->params;
    bool frozen = part & FROZEN, experts = part & EXPERTS;
    uint64_t at = frozen ? ps->total : 0;
    if (t->ref_shards) {
        struct shards *s[SHARDS_MOST] = { NULL }, *ref[SHARDS_MOST] = { NULL };
        (void)trainer_all_shards(t, t->model, s);
        (void)trainer_all_shards(t, t->ref_model, ref);
        struct shard_runs none = { 0 }, own = s[experts] ? shards_own(s[experts], frozen) : none;
        *n = own.elems;
        *theta = own.value;
        return ref[experts] ? shards_own(ref[experts], frozen).value : NULL;
    }
    *n = experts ? 0 : frozen ? ps->frozen : ps->total;
    *theta = ps->data + at;
    return t->ref_model->params.data + at;
}

/* After t->step steps, or by other means. */
static status *reference_changed(struct trainer *t)
{
    t->ref_heldout_known = false;
    return t->ref_model ? trainer_refresh(t, t->ref_model, t->step, true) : NULL;
}

/* The live reference: the weights as they are, or those without adapters, and room for what they make of held-out rows.
 */
static status *copy_reference(struct trainer *t)
{
    status *st = t->heldout ? ref_logps_init(&t->ref_heldout, t->heldout) : NULL;
    TRY(comm_agree(t->world, st));
    for (int part = 0; t->ref_model && part < PARTS; part++) {
        uint64_t n;
        float *theta, *ref = reference_values(t, part, &theta, &n);
        if (n)
            TRY(compute_copy(t->compute, ref, theta, n * sizeof *ref));
    }
    t->ref_live = true;
    TRY(reference_changed(t));
    return tied_share(t->ref_model, t->ref_shards, t->pp);
}

static status *compute_references(struct trainer *t)
{
    struct phase *p = &t->phase[t->current];
    if (t->ref_model || t->cfg->algo.reference == REFERENCE_BASE)
        return copy_reference(t);
    metrics_say(t->metrics, "step %" PRIu64 ": computing reference log-probabilities of %" PRIu64 " rows", t->step,
                p->data->rows + (t->heldout ? t->heldout->rows : 0));
    status *st = ref_logps_init(&t->ref, p->data);
    if (!st && t->heldout)
        st = ref_logps_init(&t->ref_heldout, t->heldout);
    TRY(comm_agree(t->world, st));
    TRY(evaluate_logps(t, t->model, p->data, &p->pack, t->ref.logp));
    return t->heldout ? evaluate_logps(t, t->model, t->heldout, &t->heldout_pack, t->ref_heldout.logp) : NULL;
}

status *trainer_enter_phase(struct trainer *t, int phase)
{
    TRY(state_finish(t)); /* the moments are about to be cleared, the list of tensors to change */
    t->current = phase;
    t->optimiser_step = 0;
    zero_reset_moments(t->zero);
    if (t->experts && t->experts->zero)
        zero_reset_moments(t->experts->zero);
    if (algo_needs_reference(t->phase[phase].algo, t->phase[phase].algo_config)) {
        TRY(compute_references(t));
        TRY(evaluate_heldout(t));
    }
    if (phase == t->phases - 1)
        TRY(evaluate_tasks(t));
    metrics_begin(t->metrics, "phase", t->step);
    metrics_text(t->metrics, "name", t->phase[phase].name);
    metrics_end(t->metrics);
    return state_build(t);
}

/* --- a step */

static uint64_t row_tokens(const struct dataset *d, uint64_t row)
{
    uint64_t n = 0;
    for (int s = 0; s < d->sequences; s++)
        n += d->seq[row * (uint64_t)d->sequences + (uint64_t)s].length;
    return n;
}

static uint64_t count_tokens(const struct phase *p)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < p->stream.global_batch; i++)
        n += row_tokens(p->data, p->stream.row[i]);
    return n;
}

/* Of all samples of all phases so far. */
static uint64_t count_tokens_seen(const struct trainer *t)
{
    uint64_t n = 0;
    for (int i = 0; i < t->phases; i++)
        for (uint64_t sample = 0; sample < t->samples[i]; sample++)
            n += row_tokens(t->phase[i].data, stream_row(&t->phase[i].stream, sample));
    return n;
}

static status *before_overwrite(void *arg, const void *addr, size_t bytes)
{
    struct trainer *t = arg;
    return t->ckpt ? tessera_fence(t->ckpt, addr, bytes, compute_stream(t->compute)) : NULL;
}

static void mix(const struct trainer *t, const float *theta, float *ref, uint64_t n)
{
    double alpha = t->cfg->algo.ref_sync_alpha;
    const struct compute *c = t->compute;
    if (!compute_host(c)) {
        c->kernels->scale(c->workers, ref, ref, (float)(1 - alpha), (int64_t)n);
        c->kernels->axpy(c->workers, ref, theta, (float)alpha, (int64_t)n);
    }
    for (uint64_t i = 0; compute_host(c) && i < n; i++)
        ref[i] = (float)(alpha * (double)theta[i] + (1 - alpha) * (double)ref[i]);
}

/* What steps change without training it (balance.h), among what is frozen: where ZeRO cuts values, this shard's runs.
 */
static status *sync_buffers(struct trainer *t)
{
    const struct params *ps = t->ref_shards ? shards_params(t->ref_shards) : &t->model->params;
    uint64_t n;
    float *theta, *ref = reference_values(t, FROZEN, &theta, &n);
    struct zero_run all = { ps->total, ps->total + ps->frozen };
    struct shard_runs own = { .run = &all, .runs = 1 };
    if (t->ref_shards)
        own = shards_own(t->ref_shards, true);
    TRY(comm_agree(t->world, before_overwrite(t, ref, n * sizeof *ref)));
    for (uint64_t r = 0, at = 0; r < own.runs; at += own.run[r].end - own.run[r].begin, r++)
        for (int i = 0; i < ps->count; i++) {
            const struct param *p = &ps->p[i];
            uint64_t begin = p->offset, end = begin + param_elems(p);
            begin = begin > own.run[r].begin ? begin : own.run[r].begin;
            end = end < own.run[r].end ? end : own.run[r].end;
            if (p->buffer && !p->away && begin < end)
                mix(t, theta + at + (begin - own.run[r].begin), ref + at + (begin - own.run[r].begin), end - begin);
        }
    return NULL;
}

/* TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656; TRL): ref <- alpha theta + (1 - alpha) ref. Biases that choose
 * experts follow in the same way: the reference's experts are those of its routers. */
static status *sync_reference(struct trainer *t)
{
    const struct algo_choice *c = &t->cfg->algo;
    if (!t->ref_live || !t->ref_model || !c->ref_sync_steps || t->optimiser_step % (uint64_t)c->ref_sync_steps)
        return NULL;
    for (int part = 0; part < PARTS; part += EXPERTS) { /* what is frozen is the same in both */
        uint64_t n;
        float *theta, *ref = reference_values(t, part, &theta, &n);
        TRY(comm_agree(t->world, before_overwrite(t, ref, n * sizeof *ref)));
        mix(t, theta, ref, n);
    }
    if (t->model->moe.rate > 0)
        TRY(sync_buffers(t));
    TRY(reference_changed(t));
    return tied_share(t->ref_model, t->ref_shards, t->pp);
}

struct step_result {
    double metric[ALGO_METRICS]; /* divided by their counts */
    double norm, lr, seconds;
    double dp_flight, dp_wait, tp_wait, pp_wait; /* of this rank's exchanges, in seconds */
    struct load_metrics load;
    uint64_t tokens, allocations, dp_sent, ep_sent, cp_sent, tp_sent,
        pp_sent; /* bytes that this rank gave to others of the axis */
};

/* Muon's factor is the host's. */
static bool uses_muon(const struct trainer *t)
{
    return t->owners || (t->experts && t->experts->owners);
}

/* On a device all of it is queued, and the norm is t->seen when it has been fetched. One that is not finite changes
 * nothing: kernels see that for themselves. */
static status *optimise(struct trainer *t, const struct phase *p, double lr)
{
    const struct optim_config *o = &t->cfg->optim;
    const double *squares;
    TRY(zero_squares(t->zero, &squares));
    TRY(experts_reduce(t->experts, &squares));
    TRY(debug_gradients(t));
    compute_kernels(t->compute)->clip(compute_workers(t->compute, t->workers), t->clipped, squares, o->clip);
    TRY(compute_fetch(t->compute, &t->seen, t->clipped, sizeof t->seen));
    struct adamw a = { lr, o->beta1, o->beta2, o->eps, o->weight_decay, 1, t->optimiser_step + 1, &t->clipped->scale };
    struct muon muon = { .lr = p->peak_lr > 0 ? o->muon_lr * (lr / p->peak_lr) : 0,
                         .momentum = o->muon_momentum,
                         .weight_decay = o->weight_decay,
                         .nesterov = o->muon_nesterov,
                         .scale = (enum muon_scale)o->muon_scale };
    if (uses_muon(t)) {
        TRY(compute_fetched(t->compute));
        muon.grad_scale = t->seen.scale;
        if (!isfinite(t->seen.norm))
            return NULL;
    }
    if (t->owners)
        TRY(owners_step(t->owners, &muon, before_overwrite, t));
    status *st = zero_update(t->zero, &a, before_overwrite, t);
    return status_first(st, experts_update(t->experts, &a, &muon, before_overwrite, t));
}

/* The parameters of the next step, all of which have moved: to where tensors are. Balanced biases are frozen ones. */
static status *show_update(struct trainer *t)
{
    TRY(trainer_refresh(t, t->model, t->step + 1, t->balance != NULL));
    return t->tied ? tied_share(t->model, trainer_shards(t, t->model), t->pp) : NULL;
}

/* The update has left all as it was if the norm is not. */
static status *check_finite(const struct trainer *t, const struct step_result *r)
{
    const char *what = !isfinite(r->metric[0]) ? "loss" : "gradient", *other = what[0] == 'l' ? " or optim.clip" : "";
    if (isfinite(r->metric[0]) && isfinite(r->norm))
        return NULL;
    return ERR(INVALID,
               "the %s is not finite at step %" PRIu64 ": try a smaller optim.lr%s; debug: nan says where it began",
               what, t->step + 1, other);
}

static status *train_step(struct trainer *t, struct step_result *r)
{
    struct phase *p = &t->phase[t->current];
    uint32_t k = p->stream.global_batch / p->stream.micro_batch;
    stream_deal(&p->stream, t->samples[t->current]);
    struct batch_counts counts = algo_count(p->data, p->stream.row, p->stream.global_batch);
    double statistic[ALGO_STATISTICS], sums[ALGO_METRICS];
    TRY(passes_statistics(t, p, k, statistic, &counts));
    r->tokens = count_tokens(p);
    balance_begin(t->balance);
    TRY(passes_train(t, p, k, &counts));
    TRY(zero_reduce(t->zero, NULL)); /* first of all: others may be waiting for what is under way */
    TRY(tied_sum(t->tied, t->zero));
    r->lr = schedule_lr(&t->cfg->optim, p->peak_lr, t->step - p->first_step, p->steps);
    TRY(balance_fetch(t->balance));
    TRY(optimise(t, p, r->lr));
    TRY(balance_finish(t->balance, t->zero, k, t->dp, t->pp, before_overwrite, t, &r->load));
    TRY(show_update(t));
    TRY(compute_fetched(t->compute)); /* on a device the host waits here */
    TRY(passes_metrics(t, p, k, &counts, sums));
    r->norm = t->seen.norm;
    for (int m = 0; m < p->algo->metric_count; m++)
        r->metric[m] = sums[m] / algo_divisor(&counts, p->algo->metrics[m].per);
    TRY(check_finite(t, r));
    TRY(debug_values(t));
    t->samples[t->current] += counts.rows;
    t->tokens += r->tokens;
    t->step++;
    t->optimiser_step++;
    TRY(sync_reference(t));
    return compute_check(t->compute, false);
}

/* --- watching */

static const char *const phase_words[] = { "idle", "capture", "write", "vote", "commit" };

static void save_in_flight(struct trainer *t, struct progress_line *line)
{
    line->save_percent = -1;
    if (!t->ckpt || t->tick.phase == TESSERA_IDLE)
        return;
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t->ckpt, &p);
    line->save_step = p.step;
    line->save_phase = phase_words[t->tick.phase];
    line->save_percent = p.total_bytes ? (int)(p.written_bytes * 100 / p.total_bytes) : 100;
}

static double accuracy_of(const struct phase *p, const struct step_result *r)
{
    for (int m = 0; m < p->algo->metric_count; m++)
        if (!strcmp(p->algo->metrics[m].name, "rewards/accuracies"))
            return r->metric[m];
    return -1;
}

/* Calls of our allocator since the last step's end, on all threads; the most of any rank. */
static status *count_allocations(struct trainer *t, struct step_result *r)
{
    uint64_t now = mem_count();
    r->allocations = now - t->allocations;
    t->allocations = now;
    return comm_allreduce(t->world, &r->allocations, 1, COMM_U64, COMM_MAX, NULL);
}

static void report(struct trainer *t, const struct step_result *r)
{
    const struct phase *p = &t->phase[trainer_phase_at(t, t->step - 1)];
    struct progress_line line = { .step = t->step,
                                  .steps = (uint64_t)t->cfg->train.steps,
                                  .phase = p->name,
                                  .loss = r->metric[0],
                                  .accuracy = accuracy_of(p, r),
                                  .tokens_per_s = (double)r->tokens / r->seconds };
    line.eta_s = (double)(line.steps - line.step) * r->seconds;
    save_in_flight(t, &line);
    metrics_progress(t->metrics, &line, t->step % (uint64_t)t->cfg->train.log_every == 0 || t->step == line.steps);
    metrics_begin(t->metrics, "step", t->step);
    metrics_text(t->metrics, "phase", p->name);
    for (int m = 0; m < p->algo->metric_count; m++) {
        metrics_number(t->metrics, p->algo->metrics[m].name, r->metric[m]);
        trainer_watch(t, p->algo->metrics[m].name, r->metric[m]);
    }
    metrics_number(t->metrics, "grad_norm", r->norm);
    metrics_number(t->metrics, "learning_rate", r->lr);
    if (t->balance) {
        metrics_number(t->metrics, "expert_load_max", r->load.most);
        metrics_number(t->metrics, "expert_load_min", r->load.least);
        metrics_number(t->metrics, "balance_loss", r->load.loss);
    }
    metrics_number(t->metrics, "epoch", (double)t->samples[p - t->phase] / (double)p->data->rows);
    metrics_integer(t->metrics, "tokens", r->tokens);
    metrics_integer(t->metrics, "num_tokens", t->tokens);
    metrics_number(t->metrics, "seconds", r->seconds);
    metrics_integer(t->metrics, "samples", t->samples[trainer_phase_at(t, t->step - 1)]);
    metrics_integer(t->metrics, "allocations", r->allocations);
    metrics_integer(t->metrics, "dp_sent_bytes", r->dp_sent);
    metrics_integer(t->metrics, "ep_sent_bytes", r->ep_sent);
    metrics_integer(t->metrics, "cp_sent_bytes", r->cp_sent);
    metrics_integer(t->metrics, "tp_sent_bytes", r->tp_sent);
    metrics_integer(t->metrics, "pp_sent_bytes", r->pp_sent);
    metrics_number(t->metrics, "dp_flight_s", r->dp_flight);
    metrics_number(t->metrics, "dp_wait_s", r->dp_wait);
    metrics_number(t->metrics, "tp_wait_s", r->tp_wait);
    metrics_number(t->metrics, "pp_wait_s", r->pp_wait);
    metrics_integer(t->metrics, "pp_in_flight", (uint64_t)pipe_peak(t->pipe));
    if (line.save_percent >= 0) {
        metrics_integer(t->metrics, "saving", line.save_step);
        metrics_text(t->metrics, "save_phase", line.save_phase);
    }
    metrics_end(t->metrics);
}

/* --- the loop */

static bool last_step(const struct trainer *t)
{
    return t->step == (uint64_t)t->cfg->train.steps;
}

static bool save_due(const struct trainer *t)
{
    const struct period *p = &t->cfg->checkpoint.period;
    if (!t->ckpt || t->step == t->saved_step)
        return false;
    return last_step(t) || (p->kind == PERIOD_STEPS && p->steps && t->step % p->steps == 0);
}

/* Act on what all ranks agreed on. What was asked for up to the step after a save's start asks for that save: ranks
 * notice a signal within a step of each other, and rank 0's clock asks again until it sees the save begin. */
static status *answer(struct trainer *t)
{
    int ask = t->tick.flag[TICK_ASK];
    bool fresh = t->paced_step == UINT64_MAX || t->step > t->paced_step + 1;
    if (!t->ckpt || last_step(t))
        return NULL;
    if (ask >= ASK_STOP_LIMIT) {
        t->stopped_by = (enum ask)ask;
        return t->step == t->saved_step || t->step == t->save_started ? NULL : state_save(t, true);
    }
    if (fresh && (ask || t->tick.flag[TICK_TIMED]))
        return state_save(t, ask != ASK_NOTHING);
    return NULL;
}

static bool evaluation_due(const struct trainer *t)
{
    uint64_t every = (uint64_t)t->cfg->train.eval_every;
    return t->step == (uint64_t)t->cfg->train.steps || (every && t->step % every == 0);
}

static uint64_t sent_by(const struct comm *c)
{
    return c ? c->sent_bytes : 0;
}

static uint64_t dp_sent(const struct trainer *t)
{
    uint64_t experts = t->experts && t->experts->zero ? zero_sent_bytes(t->experts->zero) : 0;
    return sent_by(t->dp_tp) + sent_by(t->ep_dp_tp) + zero_sent_bytes(t->zero) + tied_sent_bytes(t->tied) + experts;
}

/* Seconds since *then, of which *then is set to now. */
static double take_seconds(uint64_t *then, uint64_t now)
{
    double s = ns_to_s(now - *then);
    *then = now;
    return s;
}

/* What the step's exchanges took. */
static void take_times(struct trainer *t, struct step_result *r)
{
    uint64_t flight = 0, wait = 0;
    zero_times(t->zero, &flight, &wait);
    tied_times(t->tied, &flight, &wait);
    r->dp_flight = take_seconds(&t->flight_ns, flight);
    r->dp_wait = take_seconds(&t->wait_ns[0], wait);
    r->tp_wait = take_seconds(&t->wait_ns[1], t->tp ? t->tp->wait_ns : 0);
    r->pp_wait = take_seconds(&t->wait_ns[2], t->pp ? t->pp->wait_ns : 0);
}

static status *one_step(struct trainer *t)
{
    uint64_t began = clock_ns();
    bool saving = t->save_started != UINT64_MAX;
    struct step_result r = { .dp_sent = dp_sent(t),
                             .ep_sent = sent_by(t->ep),
                             .cp_sent = sent_by(t->cp),
                             .tp_sent = sent_by(t->tp),
                             .pp_sent = pipe_sent_bytes(t->pipe) };
    take_times(t, &r);
    TRY(train_step(t, &r));
    take_times(t, &r);
    r.dp_sent = dp_sent(t) - r.dp_sent;
    r.ep_sent = sent_by(t->ep) - r.ep_sent;
    r.cp_sent = sent_by(t->cp) - r.cp_sent;
    r.tp_sent = sent_by(t->tp) - r.tp_sent;
    r.pp_sent = pipe_sent_bytes(t->pipe) - r.pp_sent;
    r.seconds = ns_to_s(clock_ns() - began);
    save_cost_step(&t->cost, saving, r.seconds);
    TRY(count_allocations(t, &r));
    report(t, &r);
    if (evaluation_due(t)) {
        TRY(evaluate_heldout(t));
        TRY(evaluate_tasks(t));
    }
    int next = trainer_phase_at(t, t->step);
    if (next != t->current && t->step < (uint64_t)t->cfg->train.steps)
        TRY(trainer_enter_phase(t, next)); /* before the save, so that it holds the references */
    if (save_due(t))
        TRY(state_save(t, last_step(t)));
    TRY(state_tick(t));
    return answer(t);
}

static status *say_stopped(struct trainer *t)
{
    const char *why = t->stopped_by == ASK_STOP_SIGNAL ? "SIGTERM" : "train.max_seconds";
    uint32_t crc;
    TRY(state_weights_crc(t, &crc));
    metrics_begin(t->metrics, "stop", t->step);
    metrics_text(t->metrics, "by", why);
    metrics_integer(t->metrics, "saved_step", t->saved_step);
    metrics_integer(t->metrics, "weights_crc32c", crc);
    metrics_end(t->metrics);
    metrics_say(t->metrics, "stopped by %s at step %" PRIu64 ", saved; start again to go on", why, t->step);
    return NULL;
}

static status *finish(struct trainer *t)
{
    TRY(state_finish(t));
    if (t->stopped_by)
        return say_stopped(t);
    uint32_t crc;
    TRY(state_weights_crc(t, &crc));
    metrics_begin(t->metrics, "end", t->step);
    metrics_integer(t->metrics, "weights_crc32c", crc);
    metrics_integer(t->metrics, "peak_rss_bytes", mem_peak_rss_bytes());
    metrics_say(t->metrics, "done: step %" PRIu64 ", weights crc32c %08x, peak memory of rank 0 %.0f MiB", t->step, crc,
                (double)mem_peak_rss_bytes() / (1 << 20));
    metrics_end(t->metrics);
    return NULL;
}

static void say_memory(struct trainer *t)
{
    struct zero_memory m = zero_memory(t->zero);
    tied_memory(t->tied, &m);
    if (t->experts && t->experts->zero) {
        struct zero_memory e = zero_memory(t->experts->zero);
        m.parameters += e.parameters;
        m.gradients += e.gradients;
        m.moments += e.moments;
        m.windows += e.windows;
        m.messages += e.messages + owners_bytes(t->experts->owners);
    }
    m.messages += owners_bytes(t->owners);
    double mib = 1 << 20;
    metrics_integer(t->metrics, "parameter_bytes", m.parameters);
    metrics_integer(t->metrics, "gradient_bytes", m.gradients);
    metrics_integer(t->metrics, "optimizer_bytes", m.moments);
    metrics_integer(t->metrics, "window_bytes", m.windows);
    metrics_integer(t->metrics, "message_bytes", m.messages);
    metrics_say(t->metrics,
                "rank 0 holds %.1f MiB of parameters, %.1f of gradients, %.1f of optimiser state; %.1f of "
                "windows, %.1f for messages",
                (double)m.parameters / mib, (double)m.gradients / mib, (double)m.moments / mib, (double)m.windows / mib,
                (double)m.messages / mib);
}

static void say_run(struct trainer *t)
{
    char mesh[64];
    mesh_text(&t->mesh, mesh, sizeof mesh);
    uint64_t weights = params_unique_elems(&t->model->params), trained = params_trained_elems(&t->model->params);
    char part[64] = "";
    if (trained < weights)
        snprintf(part, sizeof part, " (%.3f M train)", (double)trained * 1e-6);
    metrics_say(t->metrics,
                "run %s: %s of %.2f M parameters%s, %s, ZeRO %d, %d thread%s a rank%s, steps %" PRIu64 " to %lld",
                t->cfg->run.name, t->model->ops->name, (double)weights * 1e-6, part, mesh, (int)t->cfg->parallel.zero,
                workers_count(t->workers), workers_count(t->workers) == 1 ? "" : "s",
                t->progress ? " and one for messages" : "", t->step, (long long)t->cfg->train.steps);
    metrics_begin(t->metrics, "run", t->step);
    metrics_text(t->metrics, "name", t->cfg->run.name);
    metrics_text(t->metrics, "mesh", mesh);
    metrics_text(t->metrics, "progress", t->progress ? "thread" : "calls");
    metrics_integer(t->metrics, "parameters", weights);
    metrics_integer(t->metrics, "trained_parameters", trained);
    say_memory(t);
    metrics_end(t->metrics);
}

status *trainer_run(struct trainer *t)
{
    say_run(t);
    if (t->resumed_from == UINT64_MAX)
        TRY(trainer_enter_phase(t, trainer_phase_at(t, 0)));
    if (t->step >= (uint64_t)t->cfg->train.steps)
        metrics_say(t->metrics, "nothing to do: step %" PRIu64 " of train.steps %lld is done", t->step,
                    (long long)t->cfg->train.steps);
    t->tokens = count_tokens_seen(t);
    t->paced_ns = clock_ns();
    while (t->step < (uint64_t)t->cfg->train.steps && !t->stopped_by)
        TRY(one_step(t));
    return finish(t);
}
