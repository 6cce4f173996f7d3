/* config: a YAML recipe and key=value overrides -> one checked struct. The only user of libyaml.
 *
 * Every key is a row of the component that owns it (comm/base/options.h). Rank 0 reads the file; every rank parses the
 * same text. Unknown keys, wrong types, out-of-range values, duplicates and missing required keys are INVALID with
 * file, line and the legal values. */
#ifndef TESSERA_TRAINER_CONFIG_H
#define TESSERA_TRAINER_CONFIG_H

#include "comm/base/options.h"
#include "comm/comm.h"
#include "trainer/algo/algo.h"
#include "trainer/model/lora.h"
#include "trainer/model/model.h"
#include "trainer/optim/optim.h"
#include "trainer/when.h"

enum { DEVICE_CPU, DEVICE_CUDA };
enum { TRANSPORT_AUTO, TRANSPORT_MPI, TRANSPORT_NCCL, TRANSPORT_SELF };
struct top_config { /* keys without a section */
    int device;     /* DEVICE_CPU, DEVICE_CUDA */
    int comm;
    int debug; /* DEBUG_OFF, DEBUG_NAN */
    int64_t threads;
};
enum { DEBUG_OFF, DEBUG_NAN };

struct run_config {
    char *name, *dir;
    int64_t seed;
};

struct model_choice { /* of every kind of model */
    char *init_from;
};

struct data_config {
    char *sft, *prefs, *labelled, *heldout, *tasks;
    int64_t max_length;
};

struct algo_choice {
    char *kind, *preset;
    int64_t warmup_sft_steps;
    double warmup_sft_lr;
    int reference;
    int64_t ref_sync_steps;
    double ref_sync_alpha;
};
enum { REFERENCE_PRECOMPUTED, REFERENCE_LIVE, REFERENCE_BASE };

enum { TRAIN_F32, TRAIN_BF16 };
struct train_config {
    int64_t steps, global_batch, micro_batch, lanes, eval_every, log_every;
    double max_seconds;
    bool deterministic;
    int dtype;
    char *freeze, *routes;
    int param_dtype, grad_dtype, param_rounding;
};
enum { ROUNDING_NEAREST, ROUNDING_STOCHASTIC };

/* parallel_config.fixed: keys that the config sets, for parallel: auto */
enum {
    FIXED_PP = 1,
    FIXED_DP = 2,
    FIXED_TP = 4,
    FIXED_ZERO = 8,
    FIXED_SEQUENCE = 16,
    FIXED_RECOMPUTE = 32,
};
struct parallel_config {
    bool automatic; /* mesh_plan.h chooses what is not in `fixed` */
    unsigned fixed;
    int64_t pp, dp, ep, cp, tp, zero, dp_shard;
    int schedule;   /* enum pipe_schedule */
    int64_t chunks; /* 0: as the schedule needs */
    char *stages;
    uint64_t bucket;
    bool sequence;
    int progress;
};
enum { CP_MAX = 64 };
enum { PROGRESS_AUTO, PROGRESS_THREAD, PROGRESS_CALLS };

struct memory_config {
    uint64_t activations, rank; /* rank: of all, for parallel: auto; 0: what the machine has */
    int recompute;              /* enum tape_recompute */
};

struct eval_config { /* tessera eval */
    char *step, *reference, *pairs;
};

enum { ON_ERROR_WARN, ON_ERROR_STOP };
enum { KEEP_HIGHEST, KEEP_LOWEST };
enum { VIEW_AUTO, VIEW_ALWAYS, VIEW_NEVER };
enum { REFERENCE_FROZEN_AUTO, REFERENCE_FROZEN_FALSE, REFERENCE_FROZEN_TRUE };
enum { OVERLAP_WAIT, OVERLAP_SKIP, OVERLAP_CANCEL };
struct checkpoint_config {
    char *url, *resume, *every, *keep_metric;
    struct period period; /* of `every` */
    double mtbf;
    int64_t keep_last, keep_every, keep_best, writers, lease_seconds;
    uint64_t staging_bytes, chunk_bytes;
    bool async, rewind, state_hash;
    int on_error, overlap, keep_order, view, reference_frozen;
    int irregular; /* TESSERA_AS_GIVEN, TESSERA_MERGE, TESSERA_GATHER */
};

struct config {
    struct top_config top;
    struct run_config run;
    struct model_choice model_choice;
    struct lora_config lora;
    struct data_config data;
    struct algo_choice algo;
    struct train_config train;
    struct optim_config optim;
    struct parallel_config parallel;
    struct memory_config memory;
    struct checkpoint_config checkpoint;
    struct eval_config eval;
    const struct model_ops *model_ops;
    const struct algo_ops *algo_ops;
    void *model, *algo_own; /* the model's and the algorithm's structs */
};

/* Read `path` on rank 0, give its text to all, parse, apply overrides ("train.steps=10"), check what single rows
 * cannot. Collective. */
status *config_load(struct comm *world, const char *path, int overrides, char **override,
                    struct config **out) WARN_UNUSED;
/* The same from text; `name` stands for the file in messages. Not collective. */
status *config_parse(const char *text, size_t bytes, const char *name, int overrides, char **override,
                     struct config **out) WARN_UNUSED;
void config_free(struct config *c); /* NULL is fine */

/* Every key with its value, one "key=value" a line, sorted by section: what a checkpoint stores. The caller frees it
 * (mem_free). */
status *config_text(const struct config *c, char **out) WARN_UNUSED;
/* Compare with a stored text. Keys that define numeric state (model, seed, data files, batch, algorithm, lanes) and
 * differ: INVALID with all of them. Other differences are written to `note`, "key: old -> new" separated by "; " (cut
 * to fit). */
status *config_compare(const struct config *c, const char *stored, char *note, size_t note_bytes) WARN_UNUSED;

/* All options of all components, for people. */
void config_help(FILE *to);

#endif
