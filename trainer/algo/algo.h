/* algo: a loss over the token log-probabilities of a pack, with its gradient. One file an algorithm: algo_<name>.c
 * defines algo_<name>_ops.
 *
 * The trainer runs the model, gets logp[N], calls `loss`, and feeds dlogp[N] to tape_backward. Losses are scaled by
 * global counts before backward, so gradients of packs simply add up over micro-batches and ranks: a loss never knows
 * the mesh. All arithmetic is f64 on the host, in row order. A loss must not keep pointers, allocate or print. */
#ifndef TESSERA_TRAINER_ALGO_ALGO_H
#define TESSERA_TRAINER_ALGO_ALGO_H

#include "comm/base/options.h"
#include "trainer/data/stream.h"
#include "trainer/ops/pref.h"

struct kernels;
struct loss_work; /* trainer/ops/kernels.h */

/* Counts of the whole step, over all packs and ranks. */
struct batch_counts {
    uint64_t rows, sequences, scored_tokens;
    uint64_t first_tokens; /* scored tokens of the rows' first sequences: of the chosen ones in preferences */
    uint64_t desirable, desirable_tokens; /* labelled rows: the desirable ones, scored tokens of their completions */
    const double
        *statistic; /* [algo_statistics] sums over all packs and ranks of what ops->statistic gave; NULL: none */
};
/* Counts of the rows of a step: row[0..rows) of d. */
struct batch_counts algo_count(const struct dataset *d, const uint64_t *row, uint64_t rows);

enum { ALGO_METRICS = 16, ALGO_STATISTICS = 4 };
enum metric_per {           /* what the metric's sum is divided by; a mean over nothing is NaN */
                  PER_STEP, /* nothing: a total */
                  PER_ROW,
                  PER_TOKEN,       /* scored */
                  PER_FIRST_TOKEN, /* scored, of the rows' first sequences */
                  PER_OTHER_TOKEN, /* scored, of the others */
                  PER_DESIRABLE,
                  PER_UNDESIRABLE,
                  PER_DESIRABLE_TOKEN,
                  PER_UNDESIRABLE_TOKEN,
};
double algo_divisor(const struct batch_counts *c, enum metric_per per);
struct algo_metric {
    const char *name; /* "rewards/accuracies" */
    enum metric_per per;
};

/* Published settings under a name (algo.preset): what a config does not set itself. Rows end with a nameless one. */
struct algo_preset {
    const char *name;     /* "simpo" */
    const char *settings; /* options of section "algo", the algorithm's or the common ones: "loss=simpo beta=2" */
    const char *source;   /* where the values are from */
};

struct algo_ops {
    const char *name;
    enum dataset_kind data; /* DATASET_LABELLED: packs of `loss` hold the completions, those of `statistic` the
                               mismatched sequences */
    bool needs_reference;   /* unless `reference_free` says otherwise: ask algo_needs_reference */
    const struct option_table *options; /* section "algo"; NULL: none */
    size_t config_bytes;
    const struct algo_metric *metrics; /* the first is "loss": its sum is this pack's share of the step's loss, already
                                          scaled (per ignored) */
    int metric_count;
    /* logp[N] and tok (NULL: metrics that need it are 0) as op_logprob_stats gives them; ref[rows * sides] reference
     * sums of the pack's sequences (NULL if not needed); scratch [4 * segments]. Writes dlogp[N] = d loss / d logp (0
     * where the target is -1; ignored if NULL) and metric[metric_count] = sums over this pack's rows. */
    void (*loss)(const void *config, const struct pack *p, const float *logp, const struct logprob_stats *tok,
                 const double *ref, const struct batch_counts *counts, double *scratch, float *dlogp, double *metric);

    /* ---- optional: NULL where an algorithm has no use for it ---- */
    /* With both, nobody waits for logp on a device: `slopes` queues kernels that make dlogp and each sequence's sums
     * (kernels.h), and `from_sums` is `loss` without a gradient when these have been read. Without, `loss` is called in
     * every pass, which waits. */
    void (*slopes)(const void *config, const struct batch_counts *counts, const struct kernels *k, struct workers *w,
                   struct loss_work *work);
    void (*from_sums)(const void *config, const struct pack *p, const struct sequence_sums *sums, const double *ref,
                      const struct batch_counts *counts, double *metric);
    const struct algo_preset *presets;
    status *(*check)(const void *config);       /* INVALID: what single option rows cannot say */
    bool (*reference_free)(const void *config); /* true: with this config no reference is needed */
    double (*alpha)(const void *config);        /* of sequence_sums.weighted, as `slopes` has it; NULL: 1 */
    /* What a reference value is, and `ref` above must hold: one number a sequence of the pack. Ask algo_sums. */
    void (*sums)(const void *config, const struct pack *p, const float *logp, double *sums);
    /* A loss whose gradient depends on a mean over the whole step: how many sums it wants before any `loss` of the step
     * (at most ALGO_STATISTICS), and this pack's share of them, value[algo_statistics]. Needs a forward pass over the
     * step's packs of its own, without backward; scratch as above. */
    int (*statistics)(const void *config);
    void (*statistic)(const void *config, const struct pack *p, const float *logp, const double *ref, double *scratch,
                      double *value);
};

/* Whether `loss` reads ref under this config. */
bool algo_needs_reference(const struct algo_ops *a, const void *config);
/* How many sums over the step this config wants before `loss`; 0 for most. */
int algo_statistics(const struct algo_ops *a, const void *config);
double algo_alpha(const struct algo_ops *a, const void *config);
/* sums[segments]: ops->sums, or plain sums of the scored tokens. */
void algo_sums(const struct algo_ops *a, const void *config, const struct pack *p, const float *logp, double *sums);

/* Of segment s of a pack; `shared` tokens of it weigh 1, the others alpha. tok may be NULL: its sums are 0, log_weight
 * NAN, for a weight that is wanted and unknown must not look like one. */
struct sequence_sums algo_sequence_sums(const struct pack *p, uint32_t s, const float *logp,
                                        const struct logprob_stats *tok, uint32_t shared, double alpha);
/* Sum in f64 of v[N], 0 where a token is not scored, over the pack's segment s; 0 if v is NULL. */
double algo_segment_sum(const struct pack *p, uint32_t s, const float *v);

extern const struct algo_ops *const algo_registry[];                            /* generated; ends with NULL */
status *algo_lookup(const char *name, const struct algo_ops **out) WARN_UNUSED; /* INVALID lists the names */

/* Reference log-probabilities, computed once, saved and resharded like any other state (part ref/logps). */
struct ref_logps {
    uint64_t rows;
    int sequences;
    uint64_t *row;  /* [rows] row ids: 0, 1, 2, ... */
    uint64_t *hash; /* [rows] dataset.hash at the time: a mismatch is a stale cache */
    double *logp;   /* [rows * sequences] */
};
status *ref_logps_init(struct ref_logps *r, const struct dataset *d) WARN_UNUSED; /* sized for d, values zero */
void ref_logps_fini(struct ref_logps *r);
/* INVALID names the first row whose hash differs from the dataset's, or the sizes. */
status *ref_logps_check(const struct ref_logps *r, const struct dataset *d) WARN_UNUSED;

#endif
