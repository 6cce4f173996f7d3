/* eval: `tessera eval`: saved weights on the pairs of data.heldout, against saved reference weights. Nothing of the
 * run is changed: the checkpoint root is only read, and metrics.jsonl stays as it is.
 *
 * eval.step chooses by what was stored in training alone (the number, or checkpoint.keep_metric), before the file of
 * pairs counts for anything. The reference values are computed here, so any file of pairs will do. */
#include "trainer/trainer.h"

#include "comm/agree.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A word that is a step number. */
static bool is_number(const char *word)
{
    return *word && !word[strspn(word, "0123456789")] && strlen(word) < 20;
}

static status *choose_step(struct trainer *t, uint64_t *step)
{
    const struct config *c = t->cfg;
    const char *word = c->eval.step, *metric = c->checkpoint.keep_metric;
    if (!strcmp(word, "best")) {
        if (!*metric)
            return ERR(INVALID, "eval.step: best needs checkpoint.keep_metric");
        return ckpt_best(t->ckpt, metric, c->checkpoint.keep_order == KEEP_LOWEST, step);
    }
    if (strcmp(word, "newest") != 0 && !is_number(word))
        return ERR(INVALID, "eval.step: \"%s\" is not one of newest, best, or a step number", word);
    uint64_t wanted = is_number(word) ? strtoull(word, NULL, 10) : TESSERA_NEWEST, found;
    status *st = tessera_find(t->ckpt, wanted, &found);
    if (st)
        return status_wrap(st, "%s: eval.step %s", c->checkpoint.url, word);
    if (wanted != TESSERA_NEWEST && found != wanted)
        return ERR(NOT_FOUND, "%s holds no valid step %" PRIu64 " (eval.step); the newest below it is %" PRIu64,
                   c->checkpoint.url, wanted, found);
    *step = found;
    return NULL;
}

/* Let the model hold the reference: as eval.reference says, else what the algorithm began from. The initial weights are
 * there already. */
static status *load_reference(struct trainer *t, uint64_t step, char *name, size_t bytes)
{
    const struct config *c = t->cfg;
    const char *word = c->eval.reference;
    if (*word && !is_number(word))
        return ERR(INVALID, "eval.reference: \"%s\" is not a step number", word);
    if (!*word && c->algo.reference == REFERENCE_BASE) {
        snprintf(name, bytes, "\"base of %" PRIu64 "\"", step);
        t->model->adapters_off = true;
        return state_load_weights(t, step, false);
    }
    if (!*word && c->algo.reference == REFERENCE_LIVE) {
        snprintf(name, bytes, "\"ref/model of %" PRIu64 "\"", step);
        return state_load_weights(t, step, true);
    }
    uint64_t from = *word ? strtoull(word, NULL, 10) : (uint64_t)c->algo.warmup_sft_steps;
    snprintf(name, bytes, "%" PRIu64, from);
    if (!from)
        return NULL;
    status *st = state_load_weights(t, from, false);
    return st ? status_wrap(st, "the reference is step %" PRIu64 " (let checkpoint.keep_every or keep_last keep it)",
                            from)
              : NULL;
}

static status *write_lines(const struct trainer *t, FILE *f, const char *path)
{
    const struct dataset *d = t->heldout;
    const double *now = t->heldout_sums, *ref = t->ref_heldout.logp;
    for (uint64_t i = 0; i < d->rows; i++) {
        double margin = (now[2 * i] - now[2 * i + 1]) - (ref[2 * i] - ref[2 * i + 1]);
        int n = fprintf(f,
                        "{\"row\": %" PRIu64 ", \"problem\": \"%016" PRIx64 "\", \"margin\": %.17g, \"logps\": [%.17g, "
                        "%.17g], \"ref_logps\": [%.17g, %.17g]",
                        i, d->group[i], margin, now[2 * i], now[2 * i + 1], ref[2 * i], ref[2 * i + 1]);
        if (n >= 0 && isfinite(t->heldout_loss[i]))
            n = fprintf(f, ", \"loss\": %.17g", t->heldout_loss[i]);
        if (n < 0 || fputs("}\n", f) < 0)
            return ERR_SYS(errno, "eval.pairs: write %s", path);
    }
    return NULL;
}

/* A line a pair; dropped rows (dataset.h) have none, `row` counts those that are left. */
static status *write_pairs(const struct trainer *t)
{
    const char *path = t->cfg->eval.pairs;
    if (!*path || t->world->rank != 0)
        return NULL;
    FILE *f = fopen(path, "we");
    if (!f)
        return ERR_SYS(errno, "eval.pairs: open %s", path);
    status *st = write_lines(t, f, path);
    if (fclose(f) != 0 && !st)
        st = ERR_SYS(errno, "eval.pairs: close %s", path);
    return st;
}

static status *print_result(const struct trainer *t, uint64_t step, const char *reference, const struct evaluation *e)
{
    if (t->world->rank != 0)
        return NULL;
    printf("{\"step\": %" PRIu64 ", \"reference\": %s, \"pairs\": %" PRIu64 ", ", step, reference, t->heldout->rows);
    if (isfinite(e->loss))
        printf("\"loss\": %.17g, ", e->loss);
    printf("\"rewards/accuracy\": %.17g, \"rewards/accuracy_lo\": %.17g, \"rewards/accuracy_hi\": %.17g, "
           "\"logps/margin\": %.17g, \"logps/accuracy\": %.17g}\n",
           e->accuracy.mean, e->accuracy.lo, e->accuracy.hi, e->margin, e->preferred);
    return fflush(stdout) || ferror(stdout) ? ERR_SYS(errno, "eval: cannot write to stdout") : NULL;
}

status *trainer_eval(struct trainer *t)
{
    uint64_t step = 0;
    char reference[64];
    struct evaluation e;
    TRY(choose_step(t, &step));
    TRY(load_reference(t, step, reference, sizeof reference));
    TRY(evaluate_logps(t, t->model, t->heldout, &t->heldout_pack, t->ref_heldout.logp));
    t->model->adapters_off = false;
    TRY(state_load_weights(t, step, false));
    TRY(evaluate_pairs(t, &e));
    TRY(comm_agree(t->world, write_pairs(t)));
    return comm_agree(t->world, print_result(t, step, reference, &e));
}
