/* state: the one list of what is saved, and the way back from it.
 *
 *   model      every parameter of this rank's pipeline stage: this rank's tensor-parallel part, the same on every
 *              data-parallel rank (replicas: written once), or with ZeRO 3 its runs of that; tied names as aliases, on
 *              the stage of their target
 *   adapter    the matrices of LoRA's adapters, in the same way; model then is the base, which is frozen: written once,
 *              and referred to by later steps
 *   optim      NAME.exp_avg, NAME.exp_avg_sq, with Muon NAME.momentum: the runs of the flat block that this rank's
 *              optimiser holds
 *   ref/logps  row, hash, logp (and heldout.*) once the algorithm's reference has been computed
 *   ref/model  with a live reference instead: its parameters, and ref/adapter; nothing if it is the base of the model
 *   loader     blob "samples": consumed samples of each phase
 *   rng        blob "seed"
 *   extra      blobs "progress" (step, phase, optimiser step) and "config"
 *
 * Tensors are added in the order in which the optimiser overwrites them, parameter by parameter, so that a fence waits
 * as little as can be. */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/ops/flat.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PROGRESS_BYTES = 24, SAMPLES_BYTES = 8 * PHASES };

static void shape_of(struct tessera_tensor *d, const struct shape *s)
{
    d->ndim = s->ndim;
    for (int i = 0; i < s->ndim; i++)
        d->shape[i] = d->length[i] = s->dim[i];
}

/* The part of a checkpoint that p's values are in; of_ref: of the live reference's. */
static const char *home_of(const struct param *p, bool of_ref)
{
    if (of_ref)
        return p->adapter ? "ref/adapter" : "ref/model";
    return p->adapter ? "adapter" : "model";
}

/* The part of p that is here; ranks with equal parts are replicas. */
static struct tessera_tensor part_of(const char *part, const struct param *p)
{
    struct tessera_tensor d = TESSERA_TENSOR;
    d.part = part;
    d.name = p->name;
    d.dtype = (int)p->value.dtype;
    d.data = p->value.data;
    shape_of(&d, &p->shape);
    for (int i = 0; i < p->shape.ndim; i++) {
        d.offset[i] = p->box.off[i];
        d.length[i] = p->box.len[i];
    }
    return d;
}

/* What ZeRO leaves this rank of p in `block`, whose elements are those of run[runs]: each run meets p in at most one
 * piece. d: what is the same for all. */
static status *add_runs(struct trainer *t, const struct param *p, struct tessera_tensor d, const struct zero_run *run,
                        uint64_t runs, float *block)
{
    uint64_t begin = p->offset, end = begin + box_volume(p->shape.ndim, &p->box), held = 0;
    for (uint64_t r = 0; r < runs; held += run_elems(run[r]), r++) {
        uint64_t lo = run[r].begin > begin ? run[r].begin : begin, hi = run[r].end < end ? run[r].end : end;
        if (lo >= hi)
            continue;
        d.run_begin = lo - begin;
        d.run_end = hi - begin;
        d.data = block + held + (lo - run[r].begin);
        TRY(tessera_state_add_tensor(t->state, &d));
    }
    return NULL;
}

static status *add_moments(struct trainer *t, const struct param *p)
{
    struct zero_moments z = zero_moments(experts_zero(t->experts, t->zero, &t->model->params, &p));
    char name[PARAM_NAME_BYTES + 16];
    struct tessera_tensor d = part_of("optim", p);
    d.name = name;
    d.dtype = TESSERA_F32;
    snprintf(name, sizeof name, "%s.%s", p->name, p->muon ? "momentum" : "exp_avg");
    TRY(add_runs(t, p, d, z.run, z.run_count, z.m));
    if (p->muon)
        return NULL;
    snprintf(name, sizeof name, "%s.exp_avg_sq", p->name);
    return add_runs(t, p, d, z.v_run, z.v_run_count, z.v);
}

/* Parameters as this rank holds them: whole parts, or with ZeRO 3 this shard's runs. */
static status *add_values(struct trainer *t, const struct param *p, struct tessera_tensor d, const struct model *m)
{
    const struct shards *s = trainer_shards_of(t, m, &p);
    d.dtype = TESSERA_F32; /* tensors may hold a copy in bf16 */
    if (!s || !shards_cut_values(s) || p->alias >= 0)
        return tessera_state_add_tensor(t->state, &d);
    struct shard_runs own = shards_own(s, p->frozen);
    return add_runs(t, p, d, own.run, own.runs, own.value);
}

static status *add_param(struct trainer *t, const struct params *ps, const struct param *p)
{
    struct tessera_tensor d = part_of(home_of(p, false), p);
    d.frozen = p->frozen && !p->buffer;
    if (p->alias >= 0) {
        d.alias_of = ps->p[p->alias].name;
        d.data = NULL;
    }
    return add_values(t, p, d, t->model);
}

static status *add_ref(struct trainer *t, const char *prefix, struct ref_logps *r)
{
    const struct {
        const char *name;
        int dtype, ndim;
        void *data;
    } column[] = { { "row", TESSERA_U64, 1, r->row },
                   { "hash", TESSERA_U64, 1, r->hash },
                   { "logp", TESSERA_F64, 2, r->logp } };
    for (size_t i = 0; r->rows && i < sizeof column / sizeof column[0]; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s%s", prefix, column[i].name);
        struct tessera_tensor d = TESSERA_TENSOR;
        d.part = "ref/logps";
        d.name = name;
        d.dtype = column[i].dtype;
        shape_of(&d, &(struct shape){ column[i].ndim, { r->rows, (uint64_t)r->sequences } });
        d.data = column[i].data;
        d.frozen = 1;
        TRY(tessera_state_add_tensor(t->state, &d));
    }
    return NULL;
}

static status *add_ref_model(struct trainer *t)
{
    const struct params *ps = &t->ref_model->params;
    for (int i = 0; i < ps->count; i++) {
        struct tessera_tensor d = part_of(home_of(&ps->p[i], true), &ps->p[i]);
        if (ps->p[i].alias >= 0 || ps->p[i].away)
            continue;
        d.frozen = (ps->p[i].frozen && !ps->p[i].buffer) || t->cfg->algo.ref_sync_steps == 0;
        TRY(add_values(t, &ps->p[i], d, t->ref_model));
    }
    return NULL;
}

static status *fill_state(struct trainer *t)
{
    const struct params *ps = &t->model->params;
    for (int frozen = 0; frozen < 2; frozen++) /* nobody waits for those that are not overwritten */
        for (int i = 0; i < ps->count; i++) {
            if (ps->p[i].frozen != frozen || ps->p[i].away)
                continue;
            TRY(add_param(t, ps, &ps->p[i]));
            if (ps->p[i].alias < 0 && !frozen)
                TRY(add_moments(t, &ps->p[i]));
        }
    if (t->ref_live)
        return t->ref_model ? add_ref_model(t) : NULL;
    TRY(add_ref(t, "", &t->ref));
    return add_ref(t, "heldout.", &t->ref_heldout);
}

status *state_build(struct trainer *t)
{
    if (!t->ckpt)
        return NULL;
    TRY(state_finish(t));
    tessera_state_free(t->state);
    t->state = NULL;
    status *st = tessera_state_new(t->ckpt, &t->state);
    if (!st)
        st = fill_state(t);
    return comm_agree(t->world, st);
}

static status *put_blobs(struct trainer *t)
{
    unsigned char samples[SAMPLES_BYTES], seed[8], progress[PROGRESS_BYTES];
    for (int i = 0; i < PHASES; i++)
        put_u64(samples + 8 * i, t->samples[i]);
    put_u64(seed, (uint64_t)t->cfg->run.seed);
    put_u64(progress, t->step);
    put_u64(progress + 8, (uint64_t)t->current);
    put_u64(progress + 16, t->optimiser_step);
    TRY(tessera_state_add_blob(t->state, "loader", "samples", 0, samples, sizeof samples));
    TRY(tessera_state_add_blob(t->state, "rng", "seed", 0, seed, sizeof seed));
    TRY(tessera_state_add_blob(t->state, "extra", "progress", 0, progress, sizeof progress));
    char *config;
    TRY(config_text(t->cfg, &config));
    status *st = tessera_state_add_blob(t->state, "extra", "config", 0, config, strlen(config));
    mem_free(config);
    return st;
}

status *state_weights_crc(struct trainer *t, uint32_t *crc)
{
    struct shards *s[SHARDS_MOST];
    int n = trainer_all_shards(t, t->model, s);
    if (!n || !shards_cut_values(s[0])) {
        *crc = 0;
        return flat_crc(t->compute, t->model->params.data, params_bytes(&t->model->params), crc);
    }
    TRY(shards_crc(s[0], crc));
    uint32_t both[2] = { *crc };
    if (n < 2)
        return NULL;
    TRY(shards_crc(s[1], &both[1]));
    *crc = crc32c(0, both, sizeof both);
    return NULL;
}

static status *log_hashes(struct trainer *t)
{
    if (!t->cfg->checkpoint.state_hash)
        return NULL;
    struct state_hashes h;
    uint32_t crc;
    TRY(state_hashes(t, &h));
    TRY(state_weights_crc(t, &crc));
    metrics_integer(t->metrics, "weights_crc32c", crc);
    metrics_integer(t->metrics, "weights_hash", h.weights);
    metrics_integer(t->metrics, "moments_hash", h.moments);
    if (t->ref.rows)
        metrics_integer(t->metrics, "ref_hash",
                        hash64(t->ref.logp, t->ref.rows * (size_t)t->ref.sequences * sizeof(double)));
    if (t->ref_live && t->ref_model)
        metrics_integer(t->metrics, "ref_hash", h.reference);
    return NULL;
}

/* --- saving */

static status *save_failed(struct trainer *t, status *st)
{
    t->save_started = UINT64_MAX;
    t->cost.excess_s = 0;
    metrics_begin(t->metrics, "save_failed", t->step);
    metrics_text(t->metrics, "error", status_message(st));
    if (status_rank(st) >= 0)
        metrics_integer(t->metrics, "rank", (uint64_t)status_rank(st));
    metrics_end(t->metrics);
    if (t->cfg->checkpoint.on_error == ON_ERROR_STOP || t->stopped_by)
        return status_wrap(st, "save failed");
    char where[32] = "";
    if (status_rank(st) >= 0)
        snprintf(where, sizeof where, " on rank %d", status_rank(st));
    metrics_say(t->metrics, "warning: save failed%s, training goes on: %s", where, status_message(st));
    status_free(st);
    return NULL;
}

static status *save_committed(struct trainer *t, uint64_t step)
{
    if (step == UINT64_MAX)
        return NULL;
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t->ckpt, &p);
    t->save_started = UINT64_MAX;
    t->saved_step = step;
    if (isfinite(t->save_watched))
        TRY(comm_agree(t->world, tessera_mark(t->ckpt, step, t->cfg->checkpoint.keep_metric, t->save_watched)));
    save_cost_committed(&t->cost, ns_to_s(p.call_ns), ns_to_s(p.fence_wait_ns), ns_to_s(p.save_ns));
    metrics_begin(t->metrics, "save", t->step);
    metrics_integer(t->metrics, "saved_step", step);
    metrics_integer(t->metrics, "bytes", p.total_bytes);
    metrics_number(t->metrics, "seconds", ns_to_s(p.save_ns));
    metrics_number(t->metrics, "call_ms", ns_to_s(p.call_ns) * 1e3);
    metrics_number(t->metrics, "fence_ms", ns_to_s(p.fence_wait_ns) * 1e3);
    metrics_integer(t->metrics, "staging_peak_bytes", p.staging_peak_bytes);
    metrics_end(t->metrics);
    return NULL;
}

/* What this rank would want; only the agreed maximum counts. */
static enum ask asked_here(const struct trainer *t)
{
    double limit = t->cfg->train.max_seconds;
    enum ask ask = signals_take();
    if (ask < ASK_STOP_LIMIT && limit > 0 && ns_to_s(clock_ns() - t->opened_ns) >= limit)
        ask = ASK_STOP_LIMIT;
    return ask;
}

/* Rank 0's clock decides. */
static bool timed_save_due(const struct trainer *t)
{
    const struct checkpoint_config *c = &t->cfg->checkpoint;
    if (t->world->rank != 0 || c->period.kind == PERIOD_STEPS)
        return false;
    double period = c->period.kind == PERIOD_AUTO ? save_cost_period(&t->cost, c->mtbf) : c->period.seconds;
    return ns_to_s(clock_ns() - t->paced_ns) >= period;
}

status *state_tick(struct trainer *t)
{
    if (!t->ckpt)
        return NULL;
    memset(t->tick.flag, 0, sizeof t->tick.flag);
    t->tick.flag[TICK_ASK] = (int32_t)asked_here(t);
    t->tick.flag[TICK_TIMED] = timed_save_due(t);
    status *st = tessera_tick(t->ckpt, &t->tick);
    return st ? save_failed(t, st) : save_committed(t, t->tick.committed);
}

status *state_finish(struct trainer *t)
{
    if (!t->ckpt)
        return NULL;
    uint64_t committed = UINT64_MAX;
    status *st = tessera_wait(t->ckpt, &committed);
    t->tick.phase = TESSERA_IDLE;
    return st ? save_failed(t, st) : save_committed(t, committed);
}

/* A save is due and another in flight: *go says whether the new one is to be taken. */
static status *settle_overlap(struct trainer *t, bool needed, bool *go)
{
    int overlap = needed ? OVERLAP_WAIT : t->cfg->checkpoint.overlap;
    *go = overlap != OVERLAP_SKIP;
    if (overlap == OVERLAP_SKIP) {
        metrics_begin(t->metrics, "save_skipped", t->step);
        metrics_integer(t->metrics, "saving", t->save_started);
        metrics_end(t->metrics);
        return NULL;
    }
    if (overlap == OVERLAP_WAIT)
        return state_finish(t);
    uint64_t step = t->save_started;
    status *st = tessera_cancel(t->ckpt);
    if (st)
        return status_wrap(st, "cancel of the save of step %" PRIu64, step);
    TRY(state_finish(t)); /* it may have been committed before */
    if (t->save_started == UINT64_MAX)
        return NULL;
    t->save_started = UINT64_MAX;
    t->cost.excess_s = 0;
    metrics_begin(t->metrics, "save_cancelled", t->step);
    metrics_integer(t->metrics, "saving", step);
    metrics_end(t->metrics);
    return NULL;
}

status *state_save(struct trainer *t, bool needed)
{
    bool go = true;
    t->paced_ns = clock_ns();
    t->paced_step = t->step;
    if (t->tick.phase != TESSERA_IDLE || t->save_started != UINT64_MAX)
        TRY(settle_overlap(t, needed, &go));
    if (!go)
        return NULL;
    metrics_begin(t->metrics, "save_start", t->step);
    TRY(log_hashes(t));
    metrics_end(t->metrics);
    TRY(comm_agree(t->world, put_blobs(t)));
    status *st = tessera_save(t->ckpt, t->state, t->step);
    if (st)
        return save_failed(t, st);
    t->save_started = t->step;
    t->save_watched = t->watched_step == t->step ? t->watched : (double)NAN;
    t->tick.phase = TESSERA_CAPTURE;
    return t->cfg->checkpoint.async ? NULL : state_finish(t);
}

/* --- reading */

status *state_load_weights(struct trainer *t, uint64_t step, bool of_ref)
{
    static const char *const ref_roles[] = { "model=ref/model", "adapter=ref/adapter", NULL };
    const struct params *ps = &t->model->params;
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    o.roles = of_ref ? ref_roles : NULL;
    o.allow = TESSERA_ALLOW_UNEXPECTED; /* names that share their memory with another */
    tessera_state_free(t->state);
    t->state = NULL;
    status *st = tessera_state_new(t->ckpt, &t->state);
    for (int i = 0; i < ps->count && !st; i++)
        if (ps->p[i].alias < 0 && !ps->p[i].away)
            st = add_param(t, ps, &ps->p[i]);
    if (!st)
        st = compute_check(t->compute, true); /* of values that the load overwrites */
    TRY(comm_agree(t->world, st));
    TRY(tessera_load_parts(t->ckpt, t->state, step, &o));
    return tied_share(t->model, trainer_shards(t, t->model), t->pp);
}

/* --- resuming */

static status *blob_of(struct trainer *t, const char *part, const char *name, size_t bytes, const unsigned char **out)
{
    const void *data;
    size_t n;
    TRY(tessera_blob(t->ckpt, part, name, -1, &data, &n));
    if (n != bytes && bytes)
        return ERR(CORRUPT, "blob %s/%s has %zu bytes, not %zu", part, name, n, bytes);
    *out = data;
    return NULL;
}

static status *read_progress(struct trainer *t)
{
    const unsigned char *progress = NULL, *samples = NULL;
    TRY(blob_of(t, "extra", "progress", PROGRESS_BYTES, &progress));
    TRY(blob_of(t, "loader", "samples", SAMPLES_BYTES, &samples));
    const void *text;
    size_t n;
    TRY(tessera_blob(t->ckpt, "extra", "config", -1, &text, &n));
    char note[512], *stored = mem_alloc(n + 1);
    if (!stored)
        return ERR(NO_MEMORY, "stored configuration of %zu bytes", n);
    memcpy(stored, text, n);
    stored[n] = 0;
    status *st = config_compare(t->cfg, stored, note, sizeof note);
    mem_free(stored);
    TRY(st);
    if (*note)
        metrics_say(t->metrics, "config changed since the checkpoint: %s", note);
    t->step = get_u64(progress);
    t->optimiser_step = get_u64(progress + 16);
    uint64_t phase = get_u64(progress + 8);
    if (phase >= (uint64_t)t->phases)
        return ERR(CORRUPT, "the checkpoint is in phase %" PRIu64 " of %d", phase, t->phases);
    t->current = (int)phase;
    for (int i = 0; i < PHASES; i++)
        t->samples[i] = get_u64(samples + 8 * i);
    return NULL;
}

/* References are state only in a phase that needs them. */
static status *shape_refs(struct trainer *t)
{
    ref_logps_fini(&t->ref);
    ref_logps_fini(&t->ref_heldout);
    t->ref_live = t->ref_heldout_known = false;
    if (!algo_needs_reference(t->phase[t->current].algo, t->phase[t->current].algo_config))
        return NULL;
    t->ref_live = t->ref_model || t->cfg->algo.reference == REFERENCE_BASE;
    if (!t->ref_live)
        TRY(ref_logps_init(&t->ref, t->phase[t->current].data));
    return t->heldout ? ref_logps_init(&t->ref_heldout, t->heldout) : NULL;
}

static status *check_refs(const struct trainer *t)
{
    if (!t->ref.rows)
        return NULL;
    TRY(ref_logps_check(&t->ref, t->phase[t->current].data));
    return t->heldout ? ref_logps_check(&t->ref_heldout, t->heldout) : NULL;
}

static status *load_step(struct trainer *t, uint64_t step)
{
    TRY(comm_agree(t->world, read_progress(t)));
    TRY(comm_agree(t->world, shape_refs(t)));
    TRY(state_build(t));
    TRY(comm_agree(t->world, compute_check(t->compute, true))); /* of values that the load overwrites */
    TRY(tessera_load(t->ckpt, t->state, step));
    TRY(trainer_refresh(t, t->model, t->step, true));
    if (t->ref_model)
        TRY(trainer_refresh(t, t->ref_model, t->step, true));
    return comm_agree(t->world, check_refs(t));
}

static status *say_resumed(struct trainer *t)
{
    t->resumed_from = t->saved_step = t->step;
    TRY(comm_agree(t->world, metrics_rewind(t->metrics, t->step)));
    struct tessera_load_report r = TESSERA_LOAD_REPORT;
    tessera_get_load_report(t->ckpt, &r);
    metrics_begin(t->metrics, "resume", t->step);
    metrics_integer(t->metrics, "ranks", (uint64_t)t->world->size);
    metrics_number(t->metrics, "seconds", ns_to_s(r.ns));
    metrics_integer(t->metrics, "storage_bytes", r.storage_bytes);
    TRY(log_hashes(t));
    metrics_say(t->metrics, "resumed from step %" PRIu64 " (%s) on %d ranks in %.2f s", t->step,
                t->phase[t->current].name, t->world->size, ns_to_s(r.ns));
    metrics_end(t->metrics);
    return NULL;
}

/* Start anew under a root that may hold steps. */
static status *start_anew(struct trainer *t)
{
    uint64_t newest;
    status *st = tessera_find(t->ckpt, TESSERA_NEWEST, &newest);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return comm_agree(t->world, metrics_rewind(t->metrics, 0));
    }
    TRY(st);
    if (!t->cfg->checkpoint.rewind)
        return ERR(EXISTS,
                   "%s holds step %" PRIu64
                   "; checkpoint.resume=never would start over: set checkpoint.rewind=true to retire its steps, "
                   "or choose another checkpoint.url",
                   t->cfg->checkpoint.url, newest);
    TRY(tessera_rewind(t->ckpt, TESSERA_NEWEST));
    return comm_agree(t->world, metrics_rewind(t->metrics, 0));
}

status *state_resume(struct trainer *t)
{
    const char *resume = t->cfg->checkpoint.resume;
    if (!t->ckpt)
        return comm_agree(t->world, metrics_rewind(t->metrics, 0));
    if (!strcmp(resume, "never"))
        return start_anew(t);
    bool exact = strcmp(resume, "newest-valid") != 0;
    uint64_t at_most = exact ? strtoull(resume, NULL, 10) : TESSERA_NEWEST, damaged = 0;
    for (;;) {
        uint64_t step;
        status *st = tessera_find(t->ckpt, at_most, &step);
        if (status_code(st) == ST_NOT_FOUND && !exact && !damaged) {
            status_free(st);
            return comm_agree(t->world, metrics_rewind(t->metrics, 0)); /* a first start */
        }
        TRY(st);
        if (exact && step != at_most)
            return ERR(NOT_FOUND,
                       "%s holds no valid step %" PRIu64 " (checkpoint.resume); the newest below it is %" PRIu64,
                       t->cfg->checkpoint.url, at_most, step);
        st = load_step(t, step);
        if (!st)
            return say_resumed(t);
        if (status_code(st) != ST_CORRUPT || exact)
            return status_wrap(st, "resume from step %" PRIu64, step);
        metrics_say(t->metrics, "warning: step %" PRIu64 " is damaged, falling back: %s", step, status_message(st));
        status_free(st);
        damaged++;
    }
}
