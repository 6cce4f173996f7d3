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

/* Counts of the whole step, over all packs and ranks. */
struct batch_counts {
    uint64_t rows, sequences, scored_tokens;
};

enum { ALGO_METRICS = 16 };
enum metric_per { PER_ROW, PER_TOKEN }; /* what the metric's sum is divided by: counts.rows or counts.scored_tokens */
struct algo_metric {
    const char *name; /* "rewards/accuracies" */
    enum metric_per per;
};

struct algo_ops {
    const char *name;
    enum dataset_kind data;
    bool needs_reference;
    const struct option_table *options; /* section "algo"; NULL: none */
    size_t config_bytes;
    const struct algo_metric *metrics; /* the first is "loss": its sum is this pack's share of the step's loss, already
                                          scaled (per ignored) */
    int metric_count;
    /* logp[N] as op_logprob gives it; ref[rows * sequences] reference sums of the pack's sequences (NULL if not
     * needed); scratch [4 * segments]. Writes dlogp[N] = d loss / d logp (0 where the target is -1; ignored if NULL)
     * and metric[metric_count] = sums over this pack's rows. */
    void (*loss)(const void *config, const struct pack *p, const float *logp, const double *ref,
                 const struct batch_counts *counts, double *scratch, float *dlogp, double *metric);
};

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

/* Stable -log sigmoid(z) = max(-z, 0) + log1p(exp(-|z|)), and sigmoid. */
double algo_neg_log_sigmoid(double z);
double algo_sigmoid(double z);

#endif
