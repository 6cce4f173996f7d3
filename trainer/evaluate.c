/* evaluate: forward passes over a whole data set, shared among the ranks, and reward accuracy with its interval. */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rows of chunk k: the data set in file order, micro_batch rows at a time. A sequence's bits do not depend on its pack.
 */
static uint32_t chunk_rows(const struct trainer *t, const struct dataset *d, uint64_t k, uint64_t *row)
{
    uint64_t mb = (uint64_t)t->cfg->train.micro_batch, first = k * mb, n = d->rows - first < mb ? d->rows - first : mb;
    for (uint64_t i = 0; i < n; i++)
        row[i] = first + i;
    return (uint32_t)n;
}

/* Each row's loss as if it were the whole batch: the pack seen through a window of one row. */
static void row_losses(struct trainer *t, const struct pack *p, const float *logp, const double *ref, double *loss)
{
    const struct phase *now = &t->phase[t->phases - 1];
    double metric[ALGO_METRICS];
    for (uint32_t r = 0; r < p->rows; r++) {
        struct pack one = *p;
        one.rows = 1;
        one.row = p->row + r;
        one.offset = p->offset + 2 * r;
        one.in.seg.offset = one.offset;
        one.in.seg.count = 2;
        struct batch_counts counts = algo_count(p->data, one.row, 1);
        now->algo->loss(now->algo_config, &one, logp, NULL, ref ? ref + 2 * r : NULL, &counts, t->scratch, NULL,
                        metric);
        loss[r] = metric[0];
    }
}

/* A pass over a data set, a chunk a micro-batch. loss: of preferences, NULL if it is not wanted; ref goes with it. */
struct scoring {
    struct trainer *t;
    struct model *m;
    const struct dataset *d;
    struct pack *p;
    double *sums, *loss;
    const double *ref;
    uint32_t end; /* of this rank's chunks; with expert parallelism passes behind it are empty */
};

static bool micro_batch(void *arg, uint32_t pass, uint32_t *k)
{
    const struct scoring *s = arg;
    *k = pass;
    return pass < s->end || s->t->ep;
}

/* Where parameters are cut over ranks. */
static status *begin(void *arg, int chunk, unsigned halves)
{
    const struct scoring *s = arg;
    struct shards *shards = trainer_shards(s->t, s->m);
    (void)chunk;
    (void)halves;
    return shards ? shards_begin(shards, false) : NULL;
}

static status *idle(void *arg, int chunk, unsigned halves)
{
    const struct scoring *s = arg;
    (void)halves;
    return shards_idle(trainer_shards(s->t, s->m), chunk);
}

static int64_t prepare(void *arg, uint32_t k)
{
    const struct scoring *s = arg;
    pack_build(s->p, s->p->row, k < s->end ? chunk_rows(s->t, s->d, k, s->p->row) : 0);
    return s->p->own.tokens;
}

static struct tensor *forward(void *arg, struct tape *tape, int chunk, struct tensor *x)
{
    const struct scoring *s = arg;
    return trainer_forward(s->t, s->m, s->p, tape, chunk, x, NULL);
}

static status *keep(void *arg, uint32_t k, struct tensor *logp)
{
    const struct scoring *s = arg;
    struct logps x;
    if (k >= s->end)
        return NULL;
    TRY(logps_get(s->t, logp, NULL, &x));
    const struct phase *now = &s->t->phase[s->t->phases - 1]; /* the algorithm's own sums, in its warm-up too */
    uint64_t row = k * (uint64_t)s->t->cfg->train.micro_batch, at = row * (uint64_t)s->d->sequences;
    algo_sums(now->algo, now->algo_config, s->p, x.logp, s->sums + at);
    if (s->loss)
        row_losses(s->t, s->p, x.logp, s->ref ? s->ref + at : NULL, s->loss + row);
    return NULL;
}

/* Every value is one rank's; the others add zero, so the sum is exact in any order. */
static status *share(struct trainer *t, double *value, uint64_t n)
{
    TRY(comm_allreduce(t->dp, value, n, COMM_F64, COMM_SUM, NULL));
    return passes_share(t, value, n);
}

static status *evaluate_rows(struct scoring *s)
{
    struct trainer *t = s->t;
    uint64_t mb = (uint64_t)t->cfg->train.micro_batch, rows = s->d->rows, chunks = (rows + mb - 1) / mb, first, end,
             values = rows * (uint64_t)s->d->sequences;
    const struct pipe_work w = { .micro_batch = micro_batch,
                                 .begin = begin,
                                 .idle = idle,
                                 .prepare = prepare,
                                 .forward = forward,
                                 .result = keep,
                                 .arg = s };
    memset(s->sums, 0, values * sizeof *s->sums);
    if (s->loss)
        memset(s->loss, 0, rows * sizeof *s->loss);
    layout_cut(chunks, (uint64_t)t->dp->size, (uint64_t)t->dp->rank, &first, &end);
    uint64_t most = (chunks + (uint64_t)t->dp->size - 1) / (uint64_t)t->dp->size; /* of any rank */
    s->end = (uint32_t)end;
    trainer_hooks(t, s->m, false);
    bool together = trainer_shards(t, s->m) || t->ep; /* every rank makes as many passes */
    status *st = pipe_forward(t->pipe, (uint32_t)first, (uint32_t)(together ? first + most : end), &w);
    if (st && (t->tp || t->cp || t->pp || together)) /* others wait for it in the same pass */
        trainer_abort(t, st);
    TRY(comm_agree(t->dp, st));
    TRY(share(t, s->sums, values));
    return s->loss ? share(t, s->loss, rows) : NULL;
}

status *evaluate_logps(struct trainer *t, struct model *m, const struct dataset *d, struct pack *p, double *sums)
{
    return evaluate_rows(&(struct scoring){ t, m, d, p, sums, NULL, NULL, 0 });
}

struct model *reference_begin(struct trainer *t)
{
    t->model->adapters_off = !t->ref_model;
    return t->ref_model ? t->ref_model : t->model;
}

void reference_done(struct trainer *t)
{
    t->model->adapters_off = false;
}

static int by_group(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return x[0] != y[0] ? (x[0] < y[0] ? -1 : 1) : x[1] < y[1] ? -1 : x[1] > y[1];
}

static int by_value(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

enum { RESAMPLES = 2000 };

/* count[g], hits[g]: rows and right ones of group g. Returns the number of groups. */
static uint64_t count_groups(const uint8_t *right, uint64_t (*key)[2], uint64_t n, uint32_t *count, uint32_t *hits)
{
    uint64_t groups = 0;
    qsort(key, n, sizeof *key, by_group);
    for (uint64_t i = 0; i < n; i++) {
        if (i == 0 || key[i][0] != key[i - 1][0])
            count[groups] = hits[groups] = 0, groups++;
        count[groups - 1]++;
        hits[groups - 1] += right[key[i][1]] != 0;
    }
    return groups;
}

status *bootstrap_by_group(const uint8_t *right, const uint64_t *group, uint64_t n, uint64_t seed, struct interval *out)
{
    *out = (struct interval){ 0 };
    if (!n)
        return NULL;
    uint64_t(*key)[2] = mem_array(NULL, n, sizeof *key);
    uint32_t *count = mem_array(NULL, n, sizeof *count), *hits = mem_array(NULL, n, sizeof *hits);
    double *mean = mem_array(NULL, RESAMPLES, sizeof *mean);
    status *st =
        key && count && hits && mean ? NULL : ERR(NO_MEMORY, "bootstrap over %llu rows", (unsigned long long)n);
    if (!st) {
        uint64_t total = 0;
        for (uint64_t i = 0; i < n; i++) {
            key[i][0] = group[i];
            key[i][1] = i;
            total += right[i] != 0;
        }
        uint64_t groups = count_groups(right, key, n, count, hits);
        for (uint32_t r = 0; r < RESAMPLES; r++) {
            uint64_t rows = 0, right_rows = 0;
            for (uint64_t g = 0; g < groups; g++) {
                uint64_t pick = rng_below((struct rng_at){ seed, 0, r, RNG_BOOTSTRAP }, g, groups);
                rows += count[pick];
                right_rows += hits[pick];
            }
            mean[r] = (double)right_rows / (double)rows;
        }
        qsort(mean, RESAMPLES, sizeof *mean, by_value);
        *out = (struct interval){ (double)total / (double)n, mean[RESAMPLES * 25 / 1000],
                                  mean[RESAMPLES * 975 / 1000 - 1] };
    }
    mem_free(key);
    mem_free(count);
    mem_free(hits);
    mem_free(mean);
    return st;
}

/* A mean that is exact where all values are equal. */
static void add_to_mean(double *mean, double x, uint64_t before)
{
    *mean += (x - *mean) / (double)(before + 1);
}

/* Whether the algorithm's loss of a held-out pair can be told. */
static bool has_loss(const struct trainer *t)
{
    const struct phase *p = &t->phase[t->phases - 1];
    return p->algo->data == DATASET_PREFS && (t->ref_heldout.rows || !algo_needs_reference(p->algo, p->algo_config));
}

status *evaluate_pairs(struct trainer *t, struct evaluation *out)
{
    const struct dataset *d = t->heldout;
    if (t->ref_live && !t->ref_heldout_known) {
        status *st = evaluate_logps(t, reference_begin(t), d, &t->heldout_pack, t->ref_heldout.logp);
        reference_done(t);
        TRY(st);
    }
    t->ref_heldout_known = t->ref_live;
    const double *now = t->heldout_sums, *ref = t->ref_heldout.rows ? t->ref_heldout.logp : NULL;
    bool loss = has_loss(t);
    struct scoring all = { t, t->model, d, &t->heldout_pack, t->heldout_sums, loss ? t->heldout_loss : NULL, ref, 0 };
    TRY(evaluate_rows(&all));
    uint8_t *right = mem_calloc(d->rows, 1);
    TRY(comm_agree(t->world, right ? NULL : ERR(NO_MEMORY, "evaluation of %llu rows", (unsigned long long)d->rows)));
    struct evaluation e = { .loss = loss ? 0 : (double)NAN };
    for (uint64_t i = 0; i < d->rows; i++) {
        double delta = now[2 * i] - now[2 * i + 1];
        e.preferred += delta > 0;
        delta -= ref ? ref[2 * i] - ref[2 * i + 1] : 0;
        e.margin += delta;
        right[i] = delta > 0;
        if (loss)
            add_to_mean(&e.loss, t->heldout_loss[i], i);
    }
    status *st = bootstrap_by_group(right, d->group, d->rows, (uint64_t)t->cfg->run.seed, &e.accuracy);
    mem_free(right);
    TRY(comm_agree(t->world, st));
    e.preferred /= (double)d->rows;
    e.margin /= (double)d->rows;
    *out = e;
    return NULL;
}

status *evaluate_heldout(struct trainer *t)
{
    if (!t->heldout)
        return NULL;
    struct evaluation e;
    TRY(evaluate_pairs(t, &e));
    unsigned long long step = t->step, rows = t->heldout->rows;
    metrics_begin(t->metrics, "eval", t->step);
    metrics_integer(t->metrics, "rows", t->heldout->rows);
    metrics_number(t->metrics, "logps/accuracy", e.preferred);
    trainer_watch(t, "eval/logps/accuracy", e.preferred);
    if (has_loss(t)) {
        trainer_watch(t, "eval/loss", e.loss);
        metrics_number(t->metrics, "loss", e.loss);
    }
    if (t->ref_heldout.rows) {
        trainer_watch(t, "eval/rewards/accuracy", e.accuracy.mean);
        trainer_watch(t, "eval/logps/margin", e.margin);
        metrics_number(t->metrics, "rewards/accuracy", e.accuracy.mean);
        metrics_number(t->metrics, "rewards/accuracy_lo", e.accuracy.lo);
        metrics_number(t->metrics, "rewards/accuracy_hi", e.accuracy.hi);
        metrics_number(t->metrics, "logps/margin", e.margin);
        char loss[32] = "";
        if (isfinite(e.loss))
            snprintf(loss, sizeof loss, ", loss %.6f", e.loss);
        metrics_say(t->metrics,
                    "step %llu: held-out reward accuracy %.4f (95 %% interval by problem %.4f to %.4f, %llu pairs)%s; "
                    "chosen more likely than rejected: %.4f",
                    step, e.accuracy.mean, e.accuracy.lo, e.accuracy.hi, rows, loss, e.preferred);
    } else {
        metrics_say(t->metrics, "step %llu: held-out pairs whose chosen solution is the more likely one: %.4f of %llu",
                    step, e.preferred, rows);
    }
    metrics_end(t->metrics);
    return NULL;
}
