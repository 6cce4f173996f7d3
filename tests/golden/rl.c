/* Cases of rl.json that concern DPO and its relatives, and log-probabilities of tokens.
 *
 * A case of pairs gets everything that pref_losses.h can say about its pairs under one config; what of it the case
 * expects is compared. Names of fields are make_rl.py's. */
#include "tests/golden/golden.h"

#include "comm/base/mem.h"
#include "trainer/algo/algo.h"
#include "trainer/algo/pref_losses.h"
#include "trainer/ops/ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- reading and writing JSON ---- */

static double number_of(const json_t *inputs, const char *key)
{
    return json_number_value(json_object_get(inputs, key));
}

/* Numbers of inputs[key], which must be a list of n (any length if *n is 0). The caller frees. */
static status *numbers_of(const json_t *inputs, const char *key, size_t *n, double **out)
{
    const json_t *list = json_object_get(inputs, key);
    size_t count = json_array_size(list);
    if (!count || (*n && count != *n))
        return ERR(INVALID, "inputs.%s has %zu numbers where %zu are needed", key, count, *n ? *n : 1);
    double *v = mem_array(NULL, count, sizeof *v);
    if (!v)
        return ERR(NO_MEMORY, "%zu numbers", count);
    for (size_t i = 0; i < count; i++)
        v[i] = json_number_value(json_array_get(list, i));
    *n = count;
    *out = v;
    return NULL;
}

/* JSON has no NaN: a text differs from every number. */
static json_t *number(double v)
{
    return isfinite(v) ? json_real(v) : json_string("not finite");
}

static json_t *numbers(const double *v, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, number(v[i]));
    return list;
}

static json_t *floats(const float *v, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, number((double)v[i]));
    return list;
}

/* ---- configs ---- */

static status *set_number(struct pref_config *c, const char *option, const json_t *value)
{
    char text[40];
    if (!option || !value)
        return NULL;
    snprintf(text, sizeof text, "%.17g", json_number_value(value));
    return options_set(&pref_options, option, text, c, "inputs");
}

/* Defaults, then the kind's settings, then the case's inputs. */
static status *config_of(const struct golden_kind *k, const struct golden_case *c, struct pref_config *out)
{
    TRY(options_defaults(&pref_options, out));
    char pair[80];
    int n;
    for (const char *at = k->settings; sscanf(at, "%79s%n", pair, &n) == 1; at += n) {
        char *eq = strchr(pair, '=');
        *eq = 0;
        TRY(options_set(&pref_options, pair, eq + 1, out, "settings"));
    }
    TRY(set_number(out, "beta", json_object_get(c->inputs, "beta")));
    TRY(set_number(out, "label_smoothing", json_object_get(c->inputs, "label_smoothing")));
    TRY(set_number(out, "simpo_gamma", json_object_get(c->inputs, "gamma")));
    TRY(set_number(out, "simpo_gamma", json_object_get(c->inputs, "simpo_gamma")));
    const json_t *weights = json_object_get(c->inputs, "weights");
    TRY(set_number(out, "weight", json_array_get(weights, 0)));
    TRY(set_number(out, "weight_2", json_array_get(weights, 1)));
    TRY(set_number(out, k->tau, json_object_get(c->inputs, "tau")));
    TRY(set_number(out, k->alpha, json_object_get(c->inputs, "alpha")));
    const char *order = strstr(c->name, "alpha_"); /* fdpo_alpha_0.5 has its order in its name only */
    if (out->f_divergence == PREF_ALPHA && order && !json_object_get(c->inputs, "alpha"))
        out->f_alpha = strtod(order + strlen("alpha_"), NULL);
    return pref_check(out);
}

/* ---- pairs ---- */

struct pairs {
    size_t n;
    double *lw, *ll, *rw, *rl, *nw, *nl; /* [n]; lengths NULL if the case has none */
    double *ww, *wl;                     /* [n] WPO's log-weights; NULL if the case has none */
    double tokens;                       /* sum of nw */
};

static void pairs_fini(struct pairs *p)
{
    double *of[] = { p->lw, p->ll, p->rw, p->rl, p->nw, p->nl, p->ww, p->wl };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++)
        mem_free(of[i]);
}

static status *pairs_read(const json_t *inputs, struct pairs *p)
{
    TRY(numbers_of(inputs, "policy_chosen_logps", &p->n, &p->lw));
    TRY(numbers_of(inputs, "policy_rejected_logps", &p->n, &p->ll));
    TRY(numbers_of(inputs, "ref_chosen_logps", &p->n, &p->rw));
    TRY(numbers_of(inputs, "ref_rejected_logps", &p->n, &p->rl));
    if (json_object_get(inputs, "chosen_log_weights")) {
        TRY(numbers_of(inputs, "chosen_log_weights", &p->n, &p->ww));
        TRY(numbers_of(inputs, "rejected_log_weights", &p->n, &p->wl));
    }
    if (!json_object_get(inputs, "chosen_lengths"))
        return NULL;
    TRY(numbers_of(inputs, "chosen_lengths", &p->n, &p->nw));
    TRY(numbers_of(inputs, "rejected_lengths", &p->n, &p->nl));
    for (size_t i = 0; i < p->n; i++)
        p->tokens += p->nw[i];
    return NULL;
}

static struct pref_pair pair_at(const struct pairs *p, size_t i)
{
    return (struct pref_pair){ { p->lw[i], p->ll[i] },
                               { p->rw[i], p->rl[i] },
                               { p->nw ? p->nw[i] : 0, p->nl ? p->nl[i] : 0 } };
}

static void put(json_t *o, const char *key, json_t *value)
{
    json_object_set_new(o, key, value);
}

static void put_mean(json_t *o, const char *key, const double *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += v[i];
    put(o, key, number(sum / (double)n));
}

/* v: work space [4 * n]. Losses and gradients of the mean over pairs. */
static void put_losses(json_t *o, const struct pref_config *c, const struct pairs *p, double *v)
{
    double *loss = v, *dw = v + p->n, *dl = v + 2 * p->n, n = (double)p->n, ratios[2] = { 0 }, kl[2];
    for (size_t i = 0; i < p->n; i++) {
        struct pref_pair x = pair_at(p, i);
        ratios[PREF_CHOSEN] += pref_ratio(c, &x, PREF_CHOSEN);
        ratios[PREF_REJECTED] += pref_ratio(c, &x, PREF_REJECTED);
    }
    for (int side = 0; side < 2; side++)
        kl[side] = pref_kl(ratios[side], n);
    for (size_t i = 0; i < p->n; i++) {
        struct pref_pair x = pair_at(p, i);
        struct pref_value y = pref_loss(c, &x, kl);
        if (p->ww)
            y = pref_wpo(y, (double[]){ p->ww[i], p->wl[i] });
        loss[i] = y.loss;
        dw[i] = y.d[PREF_CHOSEN] / n;
        dl[i] = y.d[PREF_REJECTED] / n;
    }
    put(o, "per_pair_loss", numbers(loss, p->n));
    put_mean(o, "loss", loss, p->n);
    put_mean(o, "or_term_loss", loss, p->n);
    put(o, "grad_policy_chosen_logps", numbers(dw, p->n));
    put(o, "grad_policy_rejected_logps", numbers(dl, p->n));
    put(o, "grad_chosen", numbers(dw, p->n));
    put(o, "grad_rejected", numbers(dl, p->n));
    put(o, "grad_total_rejected", numbers(dl, p->n));
    put(o, "chosen_KL", number(kl[PREF_CHOSEN]));
    put(o, "rejected_KL", number(kl[PREF_REJECTED]));
}

/* The same with the NLL term; loss and dw as put_losses left them in v, v[3 n ..) is free. */
static void put_totals(json_t *o, const struct pref_config *c, const struct pairs *p, double *v)
{
    static const struct {
        enum pref_nll_norm norm;
        const char *loss, *grad, *nll;
    } names[] = { { PREF_NLL_SEQUENCE, "loss_seqnorm", "grad_seqnorm_chosen", "nll_sequence_mean" },
                  { PREF_NLL_TOKEN, "loss_tokmean", "grad_tokmean_chosen", "nll_token_mean" },
                  { PREF_NLL_TOKEN, "loss_total", "grad_total_chosen", "nll_token_mean" } };
    const double *loss = v, *dw = v + p->n;
    double *grad = v + 3 * p->n, n = (double)p->n, alpha = pref_nll_alpha(c), slope;
    for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
        struct pref_config with = *c;
        with.nll_norm = names[k].norm;
        double total = 0, nll_sum = 0;
        for (size_t i = 0; i < p->n; i++) {
            double nll = pref_nll(&with, p->lw[i], p->nw[i], p->tokens / n, &slope);
            nll_sum += nll;
            total += loss[i] + alpha * nll;
            grad[i] = dw[i] + alpha * slope / n;
        }
        put(o, names[k].loss, number(total / n));
        put(o, names[k].nll, number(nll_sum / n));
        put(o, names[k].grad, numbers(grad, p->n));
    }
}

static void put_rewards(json_t *o, const struct pref_config *c, const struct pairs *p, double *v)
{
    static const char *const names[PREF_REWARDS] = { "rewards/chosen", "rewards/rejected", "rewards/margins",
                                                     "rewards/accuracies" };
    for (int j = 0; j < PREF_REWARDS; j++) {
        for (size_t i = 0; i < p->n; i++) {
            struct pref_pair x = pair_at(p, i);
            double reward[PREF_REWARDS];
            pref_rewards(c, &x, reward);
            v[i] = reward[j];
        }
        put_mean(o, names[j], v, p->n);
        if (j == PREF_REWARD_ACCURACY)
            put_mean(o, "accuracy", v, p->n);
        else if (j != PREF_REWARD_MARGIN)
            put(o, j == PREF_REWARD_CHOSEN ? "per_pair_chosen" : "per_pair_rejected", numbers(v, p->n));
    }
    put_mean(o, "logps/chosen", p->lw, p->n);
    put_mean(o, "logps/rejected", p->ll, p->n);
}

static status *put_pairs(const struct golden_kind *k, const struct golden_case *c, struct pairs *p, json_t **got)
{
    struct pref_config config;
    TRY(config_of(k, c, &config));
    TRY(pairs_read(c->inputs, p));
    double *v = mem_array(NULL, 4 * p->n, sizeof *v);
    if (!v)
        return ERR(NO_MEMORY, "%zu pairs", p->n);
    json_t *o = json_object();
    put_losses(o, &config, p, v);
    if (p->nw)
        put_totals(o, &config, p, v);
    put_rewards(o, &config, p, v);
    mem_free(v);
    *got = o;
    return NULL;
}

static status *run_pairs(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    struct pairs p = { 0 };
    status *st = put_pairs(k, c, &p, got);
    pairs_fini(&p);
    return st;
}

/* ---- KTO without pairs: chosen rows are desirable, rejected ones not; mean over all rows ---- */

static status *put_kto(const struct golden_case *c, struct pairs *p, json_t **got)
{
    TRY(pairs_read(c->inputs, p));
    double beta = number_of(c->inputs, "beta"), z0 = number_of(c->inputs, "z0"), rows = 2 * (double)p->n, loss = 0;
    double weight[2] = { number_of(c->inputs, "desirable_weight"), number_of(c->inputs, "undesirable_weight") };
    json_t *o = json_object();
    for (int side = 0; side < 2; side++) {
        json_t *grads = json_array();
        for (size_t i = 0; i < p->n; i++) {
            double slope, ratio = side ? p->ll[i] - p->rl[i] : p->lw[i] - p->rw[i];
            loss += pref_kto(beta, ratio, z0, side == PREF_CHOSEN, weight[side], &slope) / rows;
            json_array_append_new(grads, number(slope / rows));
        }
        put(o, side ? "grad_rejected" : "grad_chosen", grads);
    }
    put(o, "loss", number(loss));
    *got = o;
    return NULL;
}

static status *run_kto(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    (void)k;
    struct pairs p = { 0 };
    status *st = put_kto(c, &p, got);
    pairs_fini(&p);
    return st;
}

/* ---- KTO by algo_kto itself: a row is a token of its own, with the sum as its log-probability ---- */

struct kto_rows {
    size_t n;
    double *policy, *ref, *label, *mismatched, *mismatched_ref;
    struct dataset data;
    struct pack pack;
    float *logp, *dlogp;
    double *scratch;
    void *config;
};

static void kto_rows_fini(struct kto_rows *k)
{
    void *of[] = { k->policy,         k->ref,      k->label,    k->mismatched,  k->mismatched_ref,
                   k->data.desirable, k->data.seq, k->pack.row, k->pack.offset, k->pack.target,
                   k->logp,           k->dlogp,    k->scratch,  k->config };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++)
        mem_free(of[i]);
}

static status *kto_rows_read(const json_t *inputs, const struct algo_ops *ops, struct kto_rows *k)
{
    static const char *const options[] = { "beta", "desirable_weight", "undesirable_weight" };
    TRY(numbers_of(inputs, "policy_logps", &k->n, &k->policy));
    TRY(numbers_of(inputs, "ref_logps", &k->n, &k->ref));
    TRY(numbers_of(inputs, "labels", &k->n, &k->label));
    TRY(numbers_of(inputs, "mismatched_policy_logps", &k->n, &k->mismatched));
    TRY(numbers_of(inputs, "mismatched_ref_logps", &k->n, &k->mismatched_ref));
    k->data = (struct dataset){ .kind = DATASET_LABELLED, .sequences = 2, .rows = k->n };
    k->data.desirable = mem_calloc(k->n, 1);
    k->data.seq = mem_calloc(2 * k->n, sizeof *k->data.seq);
    k->pack = (struct pack){ .data = &k->data, .rows = (uint32_t)k->n, .sides = 1 };
    k->pack.in.seg.count = (int32_t)k->n;
    k->pack.in.tokens = (int64_t)k->n;
    k->pack.row = mem_calloc(k->n, sizeof *k->pack.row);
    k->pack.offset = mem_calloc(k->n + 1, sizeof *k->pack.offset);
    k->pack.target = mem_calloc(k->n, sizeof *k->pack.target);
    k->logp = mem_calloc(k->n, sizeof *k->logp);
    k->dlogp = mem_calloc(k->n, sizeof *k->dlogp);
    k->scratch = mem_calloc(4 * k->n, sizeof *k->scratch);
    k->config = mem_calloc(1, ops->config_bytes);
    if (!k->data.desirable || !k->data.seq || !k->pack.row || !k->pack.offset || !k->pack.target || !k->logp ||
        !k->dlogp || !k->scratch || !k->config)
        return ERR(NO_MEMORY, "%zu rows", k->n);
    for (size_t i = 0; i < k->n; i++) {
        k->data.desirable[i] = k->label[i] != 0;
        k->pack.row[i] = i;
        k->pack.offset[i + 1] = (int32_t)i + 1;
    }
    TRY(options_defaults(ops->options, k->config));
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        char text[40];
        snprintf(text, sizeof text, "%.17g", number_of(inputs, options[i]));
        TRY(options_set(ops->options, options[i], text, k->config, "inputs"));
    }
    return NULL;
}

static status *put_kto_rows(const struct golden_case *c, struct kto_rows *k, json_t **got)
{
    const struct algo_ops *ops;
    TRY(algo_lookup("kto", &ops));
    TRY(kto_rows_read(c->inputs, ops, k));
    double statistic, metric[ALGO_METRICS];
    struct batch_counts counts = algo_count(&k->data, k->pack.row, k->n);
    counts.statistic = &statistic;
    for (size_t i = 0; i < k->n; i++)
        k->logp[i] = (float)k->mismatched[i];
    ops->statistic(k->config, &k->pack, k->logp, k->mismatched_ref, k->scratch, &statistic);
    for (size_t i = 0; i < k->n; i++)
        k->logp[i] = (float)k->policy[i];
    ops->loss(k->config, &k->pack, k->logp, NULL, k->ref, &counts, k->scratch, k->dlogp, metric);
    json_t *o = json_object();
    put(o, "grad_policy_logps", floats(k->dlogp, k->n));
    for (int i = 0; i < ops->metric_count; i++)
        put(o, ops->metrics[i].name, number(metric[i] / algo_divisor(&counts, ops->metrics[i].per)));
    *got = o;
    return NULL;
}

static status *run_kto_rows(const struct golden_kind *kind, const struct golden_case *c, json_t **got)
{
    (void)kind;
    struct kto_rows k = { 0 };
    status *st = put_kto_rows(c, &k, got);
    kto_rows_fini(&k);
    return st;
}

/* ---- LD-DPO sums, in the f32 tokens of training ---- */

static status *ld_sum(const json_t *inputs, const char *key, const char *other, json_t **out)
{
    size_t n = 0, shared = json_array_size(json_object_get(inputs, other));
    double *v;
    TRY(numbers_of(inputs, key, &n, &v));
    float *logp = mem_array(NULL, n, sizeof *logp);
    int32_t *target = mem_calloc(n, sizeof *target); /* 0: all are scored */
    for (size_t i = 0; logp && target && i < n; i++)
        logp[i] = (float)v[i];
    status *st = logp && target ? NULL : ERR(NO_MEMORY, "%zu tokens", n);
    if (!st)
        *out = number(
            pref_ld_sum(logp, target, (int32_t)n, (uint32_t)(shared < n ? shared : n), number_of(inputs, "ld_alpha")));
    mem_free(v);
    mem_free(logp);
    mem_free(target);
    return st;
}

static status *run_ld(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    (void)k;
    json_t *w = NULL, *l = NULL;
    TRY(ld_sum(c->inputs, "chosen_token_logps", "rejected_token_logps", &w));
    status *st = ld_sum(c->inputs, "rejected_token_logps", "chosen_token_logps", &l);
    if (st) {
        json_decref(w);
        return st;
    }
    *got = json_pack("{s:o, s:o}", "chosen_logp", w, "rejected_logp", l);
    return NULL;
}

/* ---- log-probabilities of tokens: op_logprob over an identity matrix, so that inputs are logits ---- */

struct scorer {
    int64_t n, v;
    float *x, *dx, *w; /* [n, v], [n, v], [v, v] */
    int32_t *target;   /* [n] */
    float *logp;       /* [n] */
    float *stats;      /* [4, n] entropy, logit, log_square, top */
};

static void scorer_fini(struct scorer *s)
{
    mem_free(s->x);
    mem_free(s->dx);
    mem_free(s->w);
    mem_free(s->target);
    mem_free(s->logp);
    mem_free(s->stats);
}

static status *scorer_init(struct scorer *s, const json_t *rows)
{
    s->n = (int64_t)json_array_size(rows);
    s->v = (int64_t)json_array_size(json_array_get(rows, 0));
    size_t n = (size_t)s->n, v = (size_t)s->v;
    if (!n || !v)
        return ERR(INVALID, "inputs.logits is no list of rows");
    s->x = mem_calloc(n * v, sizeof *s->x);
    s->dx = mem_calloc(n * v, sizeof *s->dx);
    s->w = mem_calloc(v * v, sizeof *s->w);
    s->target = mem_calloc(n, sizeof *s->target);
    s->logp = mem_calloc(n, sizeof *s->logp);
    s->stats = mem_calloc(4 * n, sizeof *s->stats);
    if (!s->x || !s->dx || !s->w || !s->target || !s->logp || !s->stats)
        return ERR(NO_MEMORY, "%zu x %zu logits", n, v);
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        if (json_array_size(row) != v)
            return ERR(INVALID, "inputs.logits: row %zu has %zu numbers, the first %zu", i, json_array_size(row), v);
        for (size_t j = 0; j < v; j++)
            s->x[i * v + j] = (float)json_number_value(json_array_get(row, j));
    }
    for (size_t j = 0; j < v; j++)
        s->w[j * v + j] = 1;
    return NULL;
}

/* logp of the targets; with dlogp also dx. */
static status *scorer_run(struct scorer *s, float temperature, const float *dlogp)
{
    struct tensor x = {
        .dtype = DTYPE_F32, .ndim = 2, .dim = { s->n, s->v }, .data = s->x, .grad = dlogp ? s->dx : NULL
    };
    struct tensor w = { .dtype = DTYPE_F32, .ndim = 2, .dim = { s->v, s->v }, .data = s->w };
    struct tape *t;
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_begin(t, TAPE_TRAIN);
    struct logprob_stats stats;
    struct tensor *y = op_logprob_stats(t, &x, &w, s->target, temperature, &stats);
    status *st = tape_end(t);
    if (!st)
        memcpy(s->logp, y->data, (size_t)s->n * sizeof *s->logp);
    const float *const of[] = { stats.entropy, stats.logit, stats.log_square, stats.top };
    for (size_t i = 0; !st && i < sizeof of / sizeof of[0]; i++)
        memcpy(s->stats + i * (size_t)s->n, of[i], (size_t)s->n * sizeof *s->stats);
    if (!st && dlogp)
        st = tape_backward(t, y, dlogp, TAPE_BACKWARD_ALL);
    tape_close(t);
    return st;
}

static status *put_tokens(const struct golden_case *c, struct scorer *s, json_t **got)
{
    const json_t *ids = json_object_get(c->inputs, "input_ids"), *mask = json_object_get(c->inputs, "completion_mask");
    TRY(scorer_init(s, json_object_get(c->inputs, "logits")));
    size_t n = (size_t)s->n;
    if (json_array_size(ids) != n + 1 || json_array_size(mask) != n + 1)
        return ERR(INVALID, "inputs: %zu rows of logits belong to %zu ids and masks", n, n + 1);
    float *dlogp = mem_calloc(n, sizeof *dlogp);
    if (!dlogp)
        return ERR(NO_MEMORY, "%zu tokens", n);
    for (size_t i = 0; i < n; i++) {
        s->target[i] = (int32_t)json_integer_value(json_array_get(ids, i + 1));
        dlogp[i] = (float)json_number_value(json_array_get(mask, i + 1));
    }
    status *st = scorer_run(s, 1, dlogp);
    for (size_t i = 0; i < n; i++)
        if (dlogp[i] == 0)
            s->target[i] = -1; /* as pack_build leaves tokens of the prompt */
    mem_free(dlogp);
    TRY(st);
    int32_t offset[2] = { 0, (int32_t)n };
    uint32_t scored;
    struct pack p = { .in.tokens = s->n, .in.seg.count = 1, .offset = offset, .target = s->target };
    double sum;
    pack_sequence_sums(&p, s->logp, &sum, &scored);
    json_t *grads = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(grads, floats(s->dx + i * (size_t)s->v, (size_t)s->v));
    *got = json_pack("{s:o, s:o, s:o, s:o}", "per_token_logps", floats(s->logp, n), "masked_sum", number(sum),
                     "masked_mean", number(sum / (double)scored), "grad_logits", grads);
    static const char *const names[] = { "entropy", "mean_logit", "log_sum_square", "top1" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        put(*got, names[i], floats(s->stats + i * n, n));
    return NULL;
}

static status *run_tokens(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    (void)k;
    struct scorer s = { 0 };
    status *st = put_tokens(c, &s, got);
    scorer_fini(&s);
    return st;
}

static status *put_temperature(const struct golden_case *c, struct scorer *s, const json_t *rows, json_t **got)
{
    TRY(scorer_init(s, rows));
    s->target[0] = (int32_t)json_integer_value(json_object_get(c->inputs, "token"));
    TRY(scorer_run(s, (float)number_of(c->inputs, "temperature"), NULL));
    double at = (double)s->logp[0];
    TRY(scorer_run(s, 1, NULL));
    *got = json_pack("{s:o, s:o}", "logp", number(at), "logp_wrong_T1", number((double)s->logp[0]));
    return NULL;
}

static status *run_temperature(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    (void)k;
    struct scorer s = { 0 };
    json_t *rows = json_pack("[O]", json_object_get(c->inputs, "logits"));
    status *st = put_temperature(c, &s, rows, got);
    scorer_fini(&s);
    json_decref(rows);
    return st;
}

/* ---- the kinds ---- */

#define PAIR_KEYS "policy_chosen_logps policy_rejected_logps ref_chosen_logps ref_rejected_logps"
#define PAIRS(name, only, settings, tau, alpha)                                                                        \
    {                                                                                                                  \
        name, PAIR_KEYS, only, GOLDEN_F64, run_pairs, settings, tau, alpha                                             \
    }

const struct golden_kind golden_rl[] = {
    PAIRS("dpo_metrics", "rewards/chosen", "loss=sigmoid", NULL, NULL),
    PAIRS("dpo_sigmoid", NULL, "loss=sigmoid", NULL, NULL),
    PAIRS("sigmoid", NULL, "loss=sigmoid", NULL, NULL),
    PAIRS("dpo_at_reference", "accuracy", "loss=sigmoid", NULL, NULL),
    PAIRS("at_reference", NULL, "loss=sigmoid", NULL, NULL),
    PAIRS("cdpo", NULL, "loss=cdpo", NULL, NULL),
    PAIRS("robust_dpo", NULL, "loss=robust", NULL, NULL),
    PAIRS("robust", NULL, "loss=robust", NULL, NULL),
    PAIRS("hinge", NULL, "loss=hinge", NULL, NULL),
    PAIRS("ipo", NULL, "loss=ipo", "beta", NULL),
    PAIRS("ipo_avg", NULL, "loss=ipo", "beta", NULL),
    PAIRS("ipo_sum", NULL, "loss=ipo_sum", "beta", NULL),
    PAIRS("dpo_sigmoid_norm", NULL, "loss=sigmoid_norm", NULL, NULL),
    PAIRS("sigmoid_norm", NULL, "loss=sigmoid_norm", NULL, NULL),
    PAIRS("dpo_reference_free", NULL, "loss=sigmoid reference_free=true", NULL, NULL),
    PAIRS("reference_free", NULL, "loss=sigmoid reference_free=true", NULL, NULL),
    PAIRS("simpo", "gamma", "loss=simpo", NULL, NULL),
    PAIRS("orpo", "or_term_loss", "loss=orpo", NULL, NULL),
    PAIRS("rpo", "loss_seqnorm", "loss=rpo", NULL, "nll_alpha"),
    PAIRS("kto_pair", "chosen_KL", "loss=kto_pair", NULL, NULL),
    PAIRS("bco_pair", NULL, "loss=bco_pair", NULL, NULL),
    PAIRS("nca_pair", NULL, "loss=nca_pair", NULL, NULL),
    PAIRS("sppo_hard", NULL, "loss=sppo_hard", NULL, NULL),
    PAIRS("exo_pair", NULL, "loss=exo_pair", NULL, NULL),
    PAIRS("apo_zero", NULL, "loss=apo_zero", NULL, NULL),
    PAIRS("apo_down", NULL, "loss=apo_down", NULL, NULL),
    PAIRS("discopop", NULL, "loss=discopop", "discopop_tau", NULL),
    PAIRS("alphapo", NULL, "loss=alphapo", NULL, "alphapo_alpha"),
    PAIRS("mpo", "weights", "loss=sigmoid loss_2=bco_pair", NULL, NULL),
    PAIRS("wpo", "chosen_log_weights", "loss=sigmoid wpo=true", NULL, NULL),
    PAIRS("fdpo_reverse_kl", NULL, "loss=sigmoid f_divergence=reverse_kl", NULL, NULL),
    PAIRS("fdpo_forward_kl", NULL, "loss=sigmoid f_divergence=forward_kl", NULL, NULL),
    PAIRS("fdpo_js", NULL, "loss=sigmoid f_divergence=js", NULL, NULL),
    PAIRS("fdpo_alpha", NULL, "loss=sigmoid f_divergence=alpha", NULL, "f_alpha"),
    { "kto_unpaired", PAIR_KEYS " z0", "z0", GOLDEN_F64, run_kto, "", NULL, NULL },
    { "kto_labelled", "policy_logps ref_logps labels mismatched_policy_logps mismatched_ref_logps", "labels",
      GOLDEN_F32, run_kto_rows, "", NULL, NULL },
    { "ld_dpo", "chosen_token_logps rejected_token_logps ld_alpha", "ld_alpha", GOLDEN_F32, run_ld, "", NULL, NULL },
    { "token_logps", "logits input_ids completion_mask", "completion_mask", GOLDEN_F32, run_tokens, "", NULL, NULL },
    { "temperature", "logits token temperature", "temperature", GOLDEN_F32, run_temperature, "", NULL, NULL },
    { 0 },
};
