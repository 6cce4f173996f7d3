/* setup: opens what a run needs, in order, and closes it in reverse. Every step that can fail on one rank alone ends in
 * comm_agree. */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/data/tokenizer.h"
#include "trainer/hf/hf_load.h"
#include "trainer/mesh_plan.h"
#include "trainer/rank_device.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

/* --- data and phases */

static status *open_data(struct trainer *t)
{
    const struct data_config *c = &t->cfg->data;
    const char *const paths[DATASET_KINDS] = { c->sft, c->prefs, c->labelled };
    uint32_t max = (uint32_t)c->max_length;
    for (int kind = 0; kind < DATASET_KINDS; kind++)
        if (kind == (int)t->cfg->algo_ops->data || (kind == DATASET_SFT && t->cfg->algo.warmup_sft_steps))
            TRY(dataset_open(paths[kind], (enum dataset_kind)kind, max, &t->data[kind]));
    return *c->heldout ? dataset_open(c->heldout, DATASET_PREFS, max, &t->heldout) : NULL;
}

static status *open_pack(const struct trainer *t, struct pack *p, const struct dataset *d)
{
    TRY(pack_init(p, d, (uint32_t)t->cfg->train.micro_batch));
    return t->cp ? pack_share(p, t->cp->rank, t->cp->size) : NULL;
}

static status *add_phase(struct trainer *t, const struct algo_ops *algo, const void *config, struct dataset *d,
                         double lr, uint64_t steps)
{
    const struct train_config *c = &t->cfg->train;
    struct phase *p = &t->phase[t->phases];
    *p = (struct phase){
        .name = algo->name, .algo = algo, .algo_config = config, .data = d, .peak_lr = lr, .steps = steps
    };
    p->first_step = t->phases ? p[-1].first_step + p[-1].steps : 0;
    t->phases++;
    TRY(stream_init(&p->stream, d, (uint64_t)t->cfg->run.seed, (uint32_t)c->global_batch, (uint32_t)c->micro_batch,
                    true));
    return open_pack(t, &p->pack, d);
}

static status *open_phases(struct trainer *t)
{
    const struct config *c = t->cfg;
    const struct algo_ops *sft;
    uint64_t warmup = (uint64_t)c->algo.warmup_sft_steps;
    if (warmup) {
        TRY(algo_lookup("sft", &sft));
        TRY(add_phase(t, sft, NULL, t->data[DATASET_SFT],
                      c->algo.warmup_sft_lr > 0 ? c->algo.warmup_sft_lr : c->optim.lr, warmup));
    }
    TRY(add_phase(t, c->algo_ops, c->algo_own, t->data[c->algo_ops->data], c->optim.lr,
                  (uint64_t)c->train.steps - warmup));
    return t->heldout ? open_pack(t, &t->heldout_pack, t->heldout) : NULL;
}

static status *open_scratch(struct trainer *t)
{
    int64_t segments = 2 * t->cfg->train.micro_batch, k = t->cfg->train.global_batch / t->cfg->train.micro_batch;
    bool live = t->cfg->algo.reference != REFERENCE_PRECOMPUTED;
    t->scratch = mem_array(NULL, (size_t)segments * 5, sizeof *t->scratch);
    t->scalar = mem_calloc((size_t)k * ALGO_METRICS, sizeof *t->scalar);
    t->live_sums = live ? mem_array(NULL, (size_t)(k * segments), sizeof *t->live_sums) : NULL;
    t->heldout_sums = t->heldout ? mem_array(NULL, t->heldout->rows * 2, sizeof *t->heldout_sums) : NULL;
    t->heldout_loss = t->heldout ? mem_array(NULL, t->heldout->rows, sizeof *t->heldout_loss) : NULL;
    return t->scratch && t->scalar && (!live || t->live_sums) && (!t->heldout || (t->heldout_sums && t->heldout_loss))
               ? NULL
               : ERR(NO_MEMORY, "work space of a step");
}

/* --- numbers */

static int threads_of(const struct trainer *t)
{
    return t->cfg->top.threads ? (int)t->cfg->top.threads : t->place.threads;
}

/* Stages of the pipeline on each rank. */
static int chunks_of(const struct trainer *t)
{
    const struct parallel_config *c = &t->cfg->parallel;
    if (!t->pp || c->schedule != PIPE_INTERLEAVED)
        return 1;
    return c->chunks ? (int)c->chunks : 2;
}

static status *open_routes(struct trainer *t)
{
    TRY(routes_open(t->cfg->train.routes, &t->routes));
    if (t->routes && !t->routes->replay && t->world->size > 1)
        return ERR(INVALID, "train.routes: routes are recorded on one rank, not on %d", t->world->size);
    t->model->routes = t->routes;
    if (t->ref_model) {
        t->ref_model->routes = t->routes;
        t->ref_model->role = 1;
    }
    return NULL;
}

/* What is not cut or rounded. */
static status *alloc_model(struct model *m, int64_t zero, bool bf16)
{
    if (zero < 3 && !bf16)
        return model_alloc(m, zero < 2);
    if (zero < 2)
        TRY(params_alloc_grads(&m->params));
    return model_alloc_tied(m, bf16 ? DTYPE_BF16 : DTYPE_F32, zero < 2);
}

static status *open_model_at(const struct trainer *t, const struct tp_place *at, const struct tuning *tuning,
                             struct model **out)
{
    TRY(model_open_tuned(t->cfg->model_ops, t->cfg->model, TOKEN_VOCAB, at, tuning, out));
    (*out)->params.compute = (*out)->tied.compute = t->compute;
    return NULL;
}

static status *open_model(struct trainer *t)
{
    TRY(workers_open(threads_of(t), &t->workers));
    TRY(compute_open(t->device, t->workers, t->cfg->train.deterministic, &t->compute));
    struct tp_place at = { .size = t->tp ? t->tp->size : 1,
                           .rank = t->tp ? t->tp->rank : 0,
                           .sequence = t->tp && t->cfg->parallel.sequence,
                           .apart = t->cfg->train.deterministic,
                           .stages = t->pp ? t->pp->size : 1,
                           .stage = t->pp ? t->pp->rank : 0,
                           .chunks = chunks_of(t),
                           .list = t->cfg->parallel.stages,
                           .experts = t->ep ? t->ep->size : 1,
                           .expert = t->ep ? t->ep->rank : 0 };
    const struct optim_config *optim = &t->cfg->optim;
    const struct tuning tuning = { &t->cfg->lora, t->cfg->train.freeze,
                                   optim->kind == OPTIM_MUON ? optim->muon : NULL };
    TRY(open_model_at(t, &at, &tuning, &t->model));
    int64_t zero = t->training ? t->cfg->parallel.zero : 0; /* what that cuts gets its memory in open_zero */
    bool bf16 = t->training && t->cfg->train.param_dtype == TRAIN_BF16;
    TRY(alloc_model(t->model, zero, bf16));
    if (t->cfg->algo.reference == REFERENCE_LIVE && algo_needs_reference(t->cfg->algo_ops, t->cfg->algo_own)) {
        TRY(open_model_at(t, &at, &tuning, &t->ref_model));
        TRY(alloc_model(t->ref_model, zero < 2 ? 2 : zero, bf16));
    }
    uint32_t most = (uint32_t)(t->cfg->train.global_batch / t->cfg->train.micro_batch);
    TRY(open_routes(t));
    if (t->training)
        TRY(balance_open(t->model, t->model->ops->layers(t->model), most, &t->balance));
    return NULL;
}

/* Collective: a pipeline's stages open their ways to each other. */
static status *open_passes(struct trainer *t)
{
    uint32_t most = (uint32_t)(t->cfg->train.global_batch / t->cfg->train.micro_batch);
    TRY(pipe_open(t->pp, (enum pipe_schedule)t->cfg->parallel.schedule, chunks_of(t), most, t->model->width, t->workers,
                  t->compute, (size_t)t->cfg->memory.activations, &t->pipe));
    for (int i = 0; i < pipe_tapes(t->pipe); i++) {
        tape_spread(pipe_tape(t->pipe, i), t->tp, t->tp && t->cfg->parallel.sequence);
        tape_context(pipe_tape(t->pipe, i), t->cp);
        tape_bf16(pipe_tape(t->pipe, i), t->cfg->train.dtype == TRAIN_BF16);
        tape_low(pipe_tape(t->pipe, i), t->cfg->train.dtype == TRAIN_BF16);
        tape_experts(pipe_tape(t->pipe, i), t->ep);
        tape_recompute(pipe_tape(t->pipe, i), (enum tape_recompute)t->cfg->memory.recompute);
    }
    t->tape = pipe_tape(t->pipe, 0);
    return debug_open(t);
}

struct dry {
    struct trainer *t;
    struct pack *pack;
};

static struct tensor *dry_forward(void *arg, struct tape *tape, int chunk, struct tensor *x)
{
    const struct dry *d = arg;
    struct logprob_stats stats;
    return trainer_forward(d->t, d->t->model, d->pack, tape, chunk, x, &stats);
}

/* The longest rows of a data set in one pack: the most memory a micro-batch can need. */
static status *dry_run(struct trainer *t, struct pack *p)
{
    const struct dataset *d = p->data;
    uint64_t longest = 0, best = 0;
    for (uint64_t r = 0; r < d->rows; r++) {
        uint64_t n = 0;
        for (int s = 0; s < d->sequences; s++)
            n += d->seq[r * (uint64_t)d->sequences + (uint64_t)s].length;
        if (n > best) {
            best = n;
            longest = r;
        }
    }
    for (uint32_t i = 0; i < p->cap_rows; i++)
        p->row[i] = longest;
    pack_build(p, p->row, p->cap_rows);
    trainer_hooks(t, t->model, t->training);
    struct dry one = { t, p };
    struct pipe_work w = { .forward = dry_forward, .arg = &one };
    return status_wrap(pipe_dry(t->pipe, p->own.tokens, &w),
                       "a micro-batch of %u rows, the longest has %" PRIu64 " tokens", p->cap_rows, best);
}

static status *dry_runs(struct trainer *t)
{
    status *st = NULL;
    for (int i = 0; i < t->phases && !st; i++)
        st = dry_run(t, &t->phase[i].pack);
    if (!st && t->heldout)
        st = dry_run(t, &t->heldout_pack);
    return comm_agree(t->world, st);
}

/* parallel: auto: the least memory of any rank counts. Collective. */
static status *choose_mesh(struct trainer *t)
{
    uint64_t memory = mesh_plan_memory(t->cfg, t->place.ranks_here);
    if (!t->cfg->parallel.automatic)
        return NULL;
    TRY(comm_allreduce(t->world, &memory, 1, COMM_U64, COMM_MIN, NULL));
    status *st = mesh_plan_make(t->cfg, t->world->size, memory, &t->plan);
    if (!st)
        st = mesh_plan_take(t->plan, t->cfg);
    return comm_agree(t->world, st);
}

static void say_line(void *arg, const char *line)
{
    metrics_say(arg, "%s", line);
}

/* The ranks that differ from this one along these axes only: for host memory and the device's. Collective over all. */
static status *open_axis(struct trainer *t, unsigned mask, struct comm **out)
{
    struct comm *ranks = NULL;
    TRY(mesh_comm(&t->mesh, t->world, mask, &ranks));
    if (t->device->host || ranks->size == 1) { /* alone there is nothing to move */
        *out = ranks;
        return NULL;
    }
    status *st = comm_agree(t->world, comm_over(ranks, t->device, 0, out));
    comm_close(ranks);
    return st;
}

static status *open_mesh(struct trainer *t)
{
    const struct config *c = t->cfg;
    t->mesh = (struct mesh){ { (int)c->parallel.pp, (int)c->parallel.dp, (int)c->parallel.ep, (int)c->parallel.cp,
                               (int)c->parallel.tp } };
    TRY(mesh_init(&t->mesh, t->world->size));
    TRY(open_axis(t, 1u << MESH_DP | 1u << MESH_EP, &t->dp));
    if (t->mesh.size[MESH_EP] > 1) {
        TRY(open_axis(t, 1u << MESH_EP, &t->ep));
        TRY(open_axis(t, 1u << MESH_DP, &t->ep_dp));
    }
    if (t->mesh.size[MESH_PP] > 1)
        TRY(open_axis(t, 1u << MESH_PP, &t->pp));
    if (t->mesh.size[MESH_CP] > 1)
        TRY(open_axis(t, 1u << MESH_CP, &t->cp));
    return t->mesh.size[MESH_TP] > 1 ? open_axis(t, 1u << MESH_TP, &t->tp) : NULL;
}

/* Half a core that no compute thread takes will do: most of the time nothing moves. Memory of a device moves without.
 */
static bool wants_progress(const struct trainer *t)
{
    int how = t->cfg->parallel.progress;
    bool spare = t->place.share >= threads_of(t) + 0.5 && t->world->ops->thread_multiple;
    return t->world->size > 1 && t->device->host && (how == PROGRESS_THREAD || (how == PROGRESS_AUTO && spare));
}

/* The axes whose messages are under way while passes run. Local. */
static status *open_progress(struct trainer *t)
{
    struct comm **axes[] = { &t->dp, &t->ep_dp, &t->pp };
    if (!wants_progress(t))
        return NULL;
    if (!t->world->ops->thread_multiple)
        return ERR(UNSUPPORTED, "parallel.progress: thread: this MPI lets one thread of a rank call it (legal: auto, "
                                "calls)");
    TRY(progress_open(&t->progress));
    for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
        TRY(progress_drive(t->progress, axes[i]));
    return NULL;
}

static status *open_muon(struct trainer *t, struct params *dense)
{
    if (t->tp)
        TRY(open_axis(t, 1u << MESH_DP | 1u << MESH_EP | 1u << MESH_TP, &t->dp_tp));
    if (t->tp && t->experts)
        TRY(open_axis(t, 1u << MESH_DP | 1u << MESH_TP, &t->ep_dp_tp));
    status *st = owners_open(dense, t->zero, t->dp, t->tp, t->tp ? t->dp_tp : t->dp, t->workers, &t->owners);
    if (!st && t->experts)
        st = experts_open_muon(t->experts, t->tp, t->tp ? t->ep_dp_tp : t->ep_dp, t->workers);
    return comm_agree(t->world, st);
}

static status *open_zero(struct trainer *t)
{
    const struct config *c = t->cfg;
    struct zero_options o = { .stage = (int)c->parallel.zero,
                              .deterministic = c->train.deterministic,
                              .lanes = (int)c->train.lanes,
                              .bucket_elems = c->parallel.bucket / sizeof(float) / PARAM_ALIGN * PARAM_ALIGN,
                              .cp = t->cp,
                              .tp = t->tp,
                              .pp = t->pp,
                              .shards = (int)c->parallel.dp_shard,
                              .workers = t->workers,
                              .param_dtype = c->train.param_dtype == TRAIN_BF16 ? DTYPE_BF16 : DTYPE_F32,
                              .grad_dtype = c->train.grad_dtype == TRAIN_BF16 ? DTYPE_BF16 : DTYPE_F32,
                              .stochastic = c->train.param_rounding == ROUNDING_STOCHASTIC,
                              .seed = (uint64_t)c->run.seed,
                              .micro_batches = (uint32_t)(c->train.global_batch / c->train.micro_batch) };
    if (t->ep)
        TRY(experts_open(&o, &t->model->params, t->ep_dp, t->ep, &t->experts));
    struct params *dense = t->experts ? &t->experts->dense : &t->model->params;
    TRY(zero_open(&o, dense, t->dp, &t->zero));
    if (t->experts && t->experts->zero && zero_shards(t->zero))
        shards_join(zero_shards(t->zero), zero_shards(t->experts->zero));
    TRY(tied_open(&o, t->model, t->dp, t->pp, &t->tied));
    void *clipped = NULL;
    TRY(comm_agree(t->world, compute_alloc(t->compute, sizeof *t->clipped, &clipped)));
    t->clipped = clipped;
    if (c->optim.kind == OPTIM_MUON)
        TRY(open_muon(t, dense));
    bool bf16 = o.param_dtype == DTYPE_BF16;
    if (!t->ref_model || (o.stage < 3 && !bf16))
        return NULL;
    struct shards_options ref = { .data = true,
                                  .bucket_elems = o.bucket_elems,
                                  .shards = !o.stage   ? 1
                                            : o.shards ? o.shards
                                                       : t->dp->size,
                                  .dtype = o.param_dtype,
                                  .resident = bf16 && o.stage < 3 }; /* to the nearest: it has no steps */
    if (t->experts)
        TRY(experts_open_reference(t->experts, &ref, &t->ref_model->params));
    TRY(shards_open(&ref, t->experts ? &t->experts->ref_dense : &t->ref_model->params, t->dp, &t->ref_shards));
    if (t->experts)
        shards_join(t->ref_shards, t->experts->ref_shards);
    return NULL;
}

/* --- checkpoints */

static void say_warning(void *arg, const char *line)
{
    struct trainer *t = arg;
    metrics_say(t->metrics, "warning: %s", line);
}

/* What stays as it is to the end. */
static bool any_frozen(const struct params *ps)
{
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].frozen && !ps->p[i].buffer)
            return true;
    return false;
}

static status *open_checkpoint(struct trainer *t, bool read_only)
{
    const struct checkpoint_config *c = &t->cfg->checkpoint;
    if (!*c->url)
        return NULL;
    struct tessera_options o = TESSERA_OPTIONS;
    o.url = c->url;
    o.read_only = read_only;
    o.keep_last = (int)c->keep_last;
    o.keep_every = (uint64_t)c->keep_every;
    o.keep_best = (int)c->keep_best;
    o.keep_lowest = c->keep_order == KEEP_LOWEST;
    o.keep_metric = c->keep_metric;
    o.view = c->view == VIEW_NEVER ? -1 : c->view == VIEW_ALWAYS;
    o.reference_frozen = c->reference_frozen == REFERENCE_FROZEN_TRUE ||
                         (c->reference_frozen == REFERENCE_FROZEN_AUTO && any_frozen(&t->model->params));
    o.irregular = c->irregular;
    o.rewind = c->rewind;
    o.staging_bytes = c->staging_bytes;
    o.chunk_bytes = c->chunk_bytes;
    o.writers = (int)c->writers;
    o.lease_seconds = (uint32_t)c->lease_seconds;
    o.build = "tessera " TESSERA_BUILD_ID;
    memcpy(o.mesh, t->mesh.size, sizeof o.mesh);
    o.warn = say_warning;
    o.warn_arg = t;
    TRY(ckpt_open(&o, t->world, t->device, NULL, &t->ckpt));
    ckpt_set_stream(t->ckpt, compute_stream(t->compute));
    return NULL;
}

/* Weights of model.init_from, where no step was resumed from. Collective. */
static status *init_weights(struct trainer *t)
{
    const char *folder = t->cfg->model_choice.init_from;
    uint64_t read = 0, begun = clock_ns();
    if (!*folder || t->resumed_from != UINT64_MAX)
        return NULL;
    struct shards *shards[SHARDS_MOST];
    int n = trainer_all_shards(t, t->model, shards);
    uint32_t crc;
    for (int i = 0; i < n; i++)
        TRY(shards_hold(shards[i], true));
    TRY(status_wrap(hf_load(t->world, folder, &t->model->params, &read), "model.init_from"));
    for (int i = 0; i < n; i++)
        shards_release(shards[i], true);
    TRY(trainer_refresh(t, t->model, t->step, true));
    TRY(state_weights_crc(t, &crc));
    TRY(comm_allreduce(t->world, &read, 1, COMM_U64, COMM_SUM, NULL));
    metrics_begin(t->metrics, "init_from", t->step);
    metrics_integer(t->metrics, "bytes_read", read);
    metrics_integer(t->metrics, "weights_crc32c", crc);
    metrics_say(t->metrics, "weights of %s in %.2f s", folder, ns_to_s(clock_ns() - begun));
    metrics_end(t->metrics);
    return NULL;
}

/* Initial values, where no step is resumed from. */
static status *init_params(struct trainer *t)
{
    struct shards *s[SHARDS_MOST];
    int n = trainer_all_shards(t, t->model, s);
    uint64_t seed = (uint64_t)t->cfg->run.seed;
    if (!n || !shards_cut_values(s[0]))
        return comm_agree(t->world, params_init(&t->model->params, seed));
    status *st = NULL;
    for (int i = 0; !st && i < n; i++)
        st = shards_init(s[i], seed);
    TRY(comm_agree(t->world, st));
    return trainer_refresh(t, t->model, 0, true);
}

static status *open_all(struct trainer *t)
{
    t->training = true;
    TRY(placement_read(t->world, &t->place));
    TRY(choose_mesh(t));
    TRY(rank_device_open(&t->cfg->top, t->world, &t->place, &t->device));
    TRY(open_mesh(t));
    TRY(comm_agree(t->world, open_progress(t)));
    TRY(comm_agree(t->world, metrics_open(t->cfg->run.dir, t->world->rank == 0, &t->metrics)));
    if (t->plan)
        mesh_plan_print(t->plan, say_line, t->metrics);
    status *st = open_data(t);
    if (!st)
        st = open_phases(t);
    if (!st)
        st = open_scratch(t);
    if (!st)
        st = open_model(t);
    TRY(comm_agree(t->world, st));
    TRY(comm_agree(t->world, open_passes(t)));
    TRY(open_zero(t));
    TRY(comm_agree(t->world, logps_open(t)));
    TRY(dry_runs(t));
    TRY(comm_agree(t->world, task_eval_open(t)));
    TRY(init_params(t));
    TRY(open_checkpoint(t, false));
    TRY(state_resume(t));
    TRY(init_weights(t));
    TRY(tied_share(t->ref_model, t->ref_shards, t->pp));
    return tied_share(t->model, trainer_shards(t, t->model), t->pp);
}

/* One phase without data: the algorithm, for its sums and its loss. */
static status *open_eval_data(struct trainer *t)
{
    const struct config *c = t->cfg;
    if (c->algo_ops->data != DATASET_PREFS || !*c->data.heldout || !*c->checkpoint.url)
        return ERR(INVALID, "eval needs %s",
                   c->algo_ops->data != DATASET_PREFS ? "an algorithm of preference pairs (algo.kind: dpo)"
                   : !*c->data.heldout                ? "data.heldout: the pairs to evaluate"
                                                      : "checkpoint.url: where the weights are");
    TRY(dataset_open(c->data.heldout, DATASET_PREFS, (uint32_t)c->data.max_length, &t->heldout));
    t->phase[0] = (struct phase){ .name = c->algo_ops->name, .algo = c->algo_ops, .algo_config = c->algo_own };
    t->phases = 1;
    TRY(open_pack(t, &t->heldout_pack, t->heldout));
    TRY(ref_logps_init(&t->ref_heldout, t->heldout));
    return open_scratch(t);
}

static status *open_for_eval(struct trainer *t)
{
    TRY(placement_read(t->world, &t->place));
    TRY(choose_mesh(t));
    TRY(rank_device_open(&t->cfg->top, t->world, &t->place, &t->device));
    TRY(open_mesh(t));
    status *st = open_eval_data(t);
    if (!st)
        st = open_model(t);
    if (!st)
        st = logps_open(t);
    TRY(comm_agree(t->world, st));
    TRY(comm_agree(t->world, open_passes(t)));
    TRY(comm_agree(t->world, dry_run(t, &t->heldout_pack)));
    TRY(comm_agree(t->world, params_init(&t->model->params, (uint64_t)t->cfg->run.seed)));
    TRY(init_weights(t));
    TRY(tied_share(t->model, NULL, t->pp));
    return open_checkpoint(t, true);
}

static status *open_trainer(struct config *cfg, struct comm *world, const struct log *log,
                            status *(*open)(struct trainer *), struct trainer **out)
{
    struct trainer *t = mem_calloc(1, sizeof *t);
    TRY(comm_agree(world, t ? NULL : ERR(NO_MEMORY, "trainer")));
    *t = (struct trainer){ .cfg = cfg,
                           .world = world,
                           .log = log,
                           .save_started = UINT64_MAX,
                           .saved_step = UINT64_MAX,
                           .paced_step = UINT64_MAX,
                           .watched_step = UINT64_MAX,
                           .opened_ns = clock_ns(),
                           .resumed_from = UINT64_MAX,
                           .tick = TESSERA_TICK };
    *out = t; /* also on error: trainer_close accepts what is there */
    return open(t);
}

status *trainer_open(struct config *cfg, struct comm *world, const struct log *log, struct trainer **out)
{
    return open_trainer(cfg, world, log, open_all, out);
}

status *trainer_open_eval(struct config *cfg, struct comm *world, const struct log *log, struct trainer **out)
{
    return open_trainer(cfg, world, log, open_for_eval, out);
}

status *trainer_close(struct trainer *t)
{
    if (!t)
        return NULL;
    status *st = t->ckpt ? tessera_close(t->ckpt) : NULL;
    tessera_state_free(t->state);
    tied_close(t->tied);
    owners_close(t->owners);
    balance_close(t->balance);
    shards_close(t->ref_shards);
    zero_close(t->zero);
    compute_free(t->compute, t->clipped, sizeof *t->clipped);
    experts_close(t->experts);
    task_eval_close(t);
    pipe_close(t->pipe);
    model_close(t->ref_model);
    model_close(t->model);
    watch_close(t->watch);
    logps_close(t);
    compute_close(t->compute);
    workers_close(t->workers);
    comm_close(t->dp_tp);
    comm_close(t->ep_dp_tp);
    comm_close(t->pp);
    comm_close(t->tp);
    comm_close(t->cp);
    comm_close(t->ep);
    comm_close(t->ep_dp);
    comm_close(t->dp);
    device_close(t->device);
    progress_close(t->progress);
    for (int i = 0; i < t->phases; i++) {
        pack_fini(&t->phase[i].pack);
        stream_fini(&t->phase[i].stream);
    }
    pack_fini(&t->heldout_pack);
    ref_logps_fini(&t->ref);
    ref_logps_fini(&t->ref_heldout);
    for (int kind = 0; kind < DATASET_KINDS; kind++)
        dataset_close(t->data[kind]);
    dataset_close(t->heldout);
    mesh_plan_free(t->plan);
    mem_free(t->scratch);
    mem_free(t->live_sums);
    mem_free(t->scalar);
    mem_free(t->heldout_sums);
    mem_free(t->heldout_loss);
    metrics_close(t->metrics);
    st = status_first(st, routes_close(t->routes));
    mem_free(t);
    return st;
}
