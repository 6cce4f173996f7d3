/* trainer: one run: everything train.c, evaluate.c and state.c share. Opened by trainer_open, driven by trainer_run.
 *
 * A run is one or two phases (SFT warm-up, then the algorithm). A phase has its own data, loss and sample counter; at
 * the switch the optimiser restarts and, if the algorithm wants them, reference log-probabilities are computed once.
 * What a run has done is (step, samples of each phase, optimiser step): the loader, the schedule and every draw follow
 * from these. */
#ifndef TESSERA_TRAINER_TRAINER_H
#define TESSERA_TRAINER_TRAINER_H

#include "ckpt/ckpt.h"
#include "comm/progress.h"
#include "trainer/balance.h"
#include "trainer/config.h"
#include "trainer/logps.h"
#include "trainer/metrics.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/routes.h"
#include "trainer/ops/watch.h"
#include "trainer/parallel/experts.h"
#include "trainer/parallel/owners.h"
#include "trainer/parallel/pipe.h"
#include "trainer/parallel/shards.h"
#include "trainer/parallel/tied.h"
#include "trainer/parallel/zero.h"
#include "trainer/placement.h"
#include "trainer/when.h"

enum { PHASES = 2 };

struct phase {
    const char *name; /* "sft", "dpo" */
    const struct algo_ops *algo;
    const void *algo_config;
    struct dataset *data; /* borrowed from the trainer */
    struct stream stream;
    struct pack pack;
    double peak_lr;
    uint64_t first_step, steps;
};

struct trainer {
    struct config *cfg; /* borrowed, as are world and log */
    struct comm *world;
    const struct log *log;
    struct placement place;
    struct mesh mesh;
    struct mesh_plan *plan;         /* of parallel: auto, else NULL */
    struct comm *dp, *cp, *tp, *pp; /* the ranks of this one's axes; cp, tp, pp NULL: there is one; dp: of dp x ep */
    struct comm *ep, *ep_dp;        /* of ep, NULL: there is one; with it, of dp alone */
    struct progress *progress;      /* what moves messages of dp, ep_dp and pp; NULL: the calls that are made */
    bool training; /* not an evaluation alone: those hold whole parameters, whatever parallel.zero says */
    struct device *device;
    struct workers *workers;
    struct compute *compute; /* on device, with workers */
    struct watch *watch;     /* NULL: no debug: nan */
    struct metrics *metrics;

    struct dataset *data[DATASET_KINDS], *heldout; /* data: by kind, NULL where the run has none */
    struct phase phase[PHASES];
    int phases;
    struct pack heldout_pack;

    struct model *model;
    struct pipe *pipe;
    struct tape *tape;       /* the pipeline's first, for what is not its business */
    struct zero *zero;       /* with expert parallelism: of all but the experts */
    struct experts *experts; /* NULL: no expert parallelism, or no training */
    struct tape_blocks sums; /* around blocks of passes that train */
    struct tied *tied;       /* NULL: no weight whose uses are kept apart has a part here */
    struct owners *owners;   /* NULL: no Muon */
    struct comm *dp_tp;      /* the owners, where there is a tp; else NULL */
    struct comm *ep_dp_tp;   /* the same of experts' matrices, with ep */
    struct routes *routes;   /* NULL: no train.routes */
    struct balance *balance; /* NULL: no experts, or no training */

    struct ref_logps ref, ref_heldout; /* rows 0 until the main phase of an algorithm that needs them */
    struct shards *ref_shards;         /* of ref_model, with ZeRO 3; else NULL */
    struct model *ref_model;           /* algo.reference: live: the copy, without gradients; else NULL */
    bool ref_live;               /* the reference is run at every step: ref_model (saved as part ref/model), or where
                                    that is NULL the model without its adapters; ref is empty */
    bool ref_heldout_known;      /* with ref_live: ref_heldout is of the reference's present weights */
    struct logps_room logps;     /* on a device: what the host reads and writes of passes' results (logps.h) */
    struct clipped *clipped;     /* the step's norm and factor, where parameters are, */
    struct clipped seen;         /* and when they have been fetched */
    double *scratch;             /* sums, gradients and reference values of one pack's sequences */
    double *live_sums;           /* [K][segments of a pack] the live reference's sums of own micro-batches; or NULL */
    double *scalar;              /* [K * ALGO_METRICS] metrics of own micro-batches */
    double *heldout_sums;        /* [heldout rows * 2] */
    struct task_eval *task_eval; /* NULL: no data.tasks */
    double *heldout_loss;        /* [heldout rows] */

    tessera *ckpt; /* NULL: no checkpoints */
    tessera_state *state;
    struct tessera_tick tick;
    uint64_t save_started, saved_step; /* UINT64_MAX: none */
    struct save_cost cost;
    uint64_t opened_ns, paced_ns; /* monotonic: trainer_open, the last save's start (or that it was skipped) */
    uint64_t paced_step;          /* of that; UINT64_MAX: none yet */
    double watched, save_watched; /* checkpoint.keep_metric, last seen; at the save in flight (NAN: unknown) */
    uint64_t watched_step;        /* of watched; UINT64_MAX: none */
    enum ask stopped_by;          /* agreed: save what was done and end the run */

    /* what a checkpoint remembers */
    uint64_t step, samples[PHASES], optimiser_step;
    uint64_t tokens;                /* of all samples: not stored, their rows say it */
    int current;                    /* phase */
    uint64_t resumed_from;          /* UINT64_MAX: from the start */
    uint64_t allocations;           /* mem_count() at the end of the last step */
    uint64_t flight_ns, wait_ns[3]; /* of exchanges, by then: of dp; of dp, tp, pp */
};

/* Everything but the first step: data, model, optimiser, checkpoint root, resume. Collective. */
status *trainer_open(struct config *cfg, struct comm *world, const struct log *log, struct trainer **out) WARN_UNUSED;
/* Only what an evaluation of data.heldout needs, with initial weights and the checkpoint root to read from; nothing is
 * written. The algorithm must be one of pairs. Collective. */
status *trainer_open_eval(struct config *cfg, struct comm *world, const struct log *log,
                          struct trainer **out) WARN_UNUSED;
/* `tessera eval`: the weights that section eval names, on data.heldout: one JSON object on stdout, and eval.pairs.
 * Collective. */
status *trainer_eval(struct trainer *t) WARN_UNUSED;
/* Train to the last step, evaluate, save. Collective. */
status *trainer_run(struct trainer *t) WARN_UNUSED;
/* Waits for the save in flight. Accepts a half-open trainer. Collective. */
status *trainer_close(struct trainer *t) WARN_UNUSED;

/* passes.c: what a micro-batch goes through */
/* A chunk of what of m is here, on a pack; on the last stage log-probabilities of its targets, with *tok if not NULL.
 */
struct tensor *trainer_forward(struct trainer *t, struct model *m, struct pack *p, struct tape *tape, int chunk,
                               struct tensor *x, struct logprob_stats *tok);
/* Of p's step of k micro-batches, as dealt: what its loss wants to know of all of them first (counts->statistic; stays
 * NULL if nothing), from a forward pass of its own. Collective over pp and dp. A rank alone that fails aborts. */
status *passes_statistics(struct trainer *t, struct phase *p, uint32_t k, double sums[ALGO_STATISTICS],
                          struct batch_counts *counts) WARN_UNUSED;
/* All of them forward and backward: gradients are in t->zero and t->tied. Collective over pp and dp. */
status *passes_train(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts) WARN_UNUSED;
/* What the step's losses and metrics were, in sums, after compute_fetched. Collective over pp and dp. */
status *passes_metrics(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts,
                       double sums[ALGO_METRICS]) WARN_UNUSED;
/* From the last pipeline stage to all. Collective over pp. */
status *passes_share(struct trainer *t, double *value, size_t count) WARN_UNUSED;
/* What parameters or gradients of m are cut into (shards.h); NULL: nothing is. */
struct shards *trainer_shards(const struct trainer *t, const struct model *m);
/* With expert parallelism a model may have two: all of m's, their number; and those of its parameter *p, which becomes
 * the parameter as they know it. */
enum { SHARDS_MOST = 2 };
int trainer_all_shards(const struct trainer *t, const struct model *m, struct shards *out[SHARDS_MOST]);
struct shards *trainer_shards_of(const struct trainer *t, const struct model *m, const struct param **p);
/* Of all of them: what trains, after a step, or all by other means (shards_refresh). Collective. */
status *trainer_refresh(const struct trainer *t, const struct model *m, uint64_t step, bool all) WARN_UNUSED;
/* The tapes' hooks, for passes of m; early: sums over dp begin while the last of them goes back. */
void trainer_hooks(struct trainer *t, const struct model *m, bool early);

/* evaluate.c */
/* Sums of scored log-probabilities of every sequence of d under the weights of m: sums[rows * sequences], the same on
 * all ranks. Collective. */
status *evaluate_logps(struct trainer *t, struct model *m, const struct dataset *d, struct pack *p,
                       double *sums) WARN_UNUSED;
/* The model that a live reference runs, until reference_done. */
struct model *reference_begin(struct trainer *t);
void reference_done(struct trainer *t);
/* Fraction of right[i] over n rows with a 95 % percentile bootstrap over groups (2,000 resamples, Philox stream
 * RNG_BOOTSTRAP). */
struct interval {
    double mean, lo, hi;
};
status *bootstrap_by_group(const uint8_t *right, const uint64_t *group, uint64_t n, uint64_t seed,
                           struct interval *out) WARN_UNUSED;
/* Of data.heldout: the mean loss of a pair, each taken as a batch of its own (NAN: there is none, as before the
 * algorithm's reference is known, or with a loss that needs a whole batch's KL), the share of pairs whose log-ratio
 * grew more (or fell less) for the chosen side, with its interval, that growth's mean, and the share of pairs whose
 * chosen side is the likelier one. A constant loss has exactly that mean. */
struct evaluation {
    double loss, margin, preferred;
    struct interval accuracy;
};
/* Score data.heldout under the present weights, with t->ref_heldout as the reference (rows 0: none); what single pairs
 * have stays in heldout_sums and heldout_loss. Collective. */
status *evaluate_pairs(struct trainer *t, struct evaluation *out) WARN_UNUSED;
/* The same, logged as event "eval". Without held-out data nothing happens. Collective. */
status *evaluate_heldout(struct trainer *t) WARN_UNUSED;

/* evaluate_tasks.c */
/* Read data.tasks, if given, and take memory to generate for it. Closing accepts what a failed open left. */
status *task_eval_open(struct trainer *t) WARN_UNUSED;
void task_eval_close(struct trainer *t);
/* Greedy completions of data.tasks, logged as event "eval" with the share that is exactly the answer. Once a step;
 * without tasks nothing happens. Collective. */
status *evaluate_tasks(struct trainer *t) WARN_UNUSED;

/* state.c: the one list of what is saved */
status *state_build(struct trainer *t)
    WARN_UNUSED; /* t->state for the current phase; waits for a save of the old one. Collective */
/* Start saving t->step. While another save is in flight: wait for it, or do as checkpoint.overlap says if this one is
 * not `needed`. Collective */
status *state_save(struct trainer *t, bool needed) WARN_UNUSED;
status *state_resume(struct trainer *t) WARN_UNUSED; /* from the newest valid step, or start anew. Collective */
/* Move the save on, handling its outcome as on_error says, and start agreeing on what this rank's signals and clocks
 * ask for; what the last call's asked for is in t->tick.flag[TICK_ASK], t->tick.flag[TICK_TIMED]. Collective */
enum { TICK_ASK, TICK_TIMED };
status *state_tick(struct trainer *t) WARN_UNUSED;
/* The parameters alone, adapters too, of a step; of_ref: those of its live reference. Collective. */
status *state_load_weights(struct trainer *t, uint64_t step, bool of_ref) WARN_UNUSED;
status *state_finish(struct trainer *t) WARN_UNUSED; /* wait for the save in flight. Collective */
/* Of this rank's block of parameters, whole if ZeRO cuts it. Collective. */
status *state_weights_crc(struct trainer *t, uint32_t *crc) WARN_UNUSED;
/* state_hash.c: of all weights, AdamW's moments and a live reference's weights (else 0), the same on every mesh.
 * Collective. */
struct state_hashes {
    uint64_t weights, moments, reference;
};
status *state_hashes(struct trainer *t, struct state_hashes *out) WARN_UNUSED;

/* debug.c: debug: nan */
/* Have the tapes' ops looked at, if the config asks for it. */
status *debug_open(struct trainer *t) WARN_UNUSED;
/* INVALID names the first parameter whose summed gradient, or whose value after the update, is not finite. Both
 * collective; without debug: nan nothing happens. */
status *debug_gradients(struct trainer *t) WARN_UNUSED;
status *debug_values(struct trainer *t) WARN_UNUSED;

/* Enter the phase of t->step: at the switch from SFT the optimiser restarts and references are computed. Collective. */
status *trainer_enter_phase(struct trainer *t, int phase) WARN_UNUSED;
int trainer_phase_at(const struct trainer *t, uint64_t step);
/* A metric of t->step, alike on all ranks: remembered if it is the one that retention looks at. */
void trainer_watch(struct trainer *t, const char *name, double value);
/* A rank alone met an error inside a step: say so and end the job. */
void trainer_abort(struct trainer *t, status *st) __attribute__((noreturn));

#endif
