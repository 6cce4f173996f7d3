/* moe: which experts a token takes, and the sum of what they make of it. A task is a run of tokens; its bounds change
 * no bit. Scores are computed in f64 and rounded once. */
#include "trainer/ops/cpu/cpu.h"

#include <math.h>
#include <string.h>

/* What keeps the sum of scores that are all zero from being divided by (DeepSeek-V3's). */
static const double tiny = 1e-20;

static void scores_of(const struct router *how, const float *z, float *s)
{
    double most = (double)z[0], sum = 0, e[EXPERTS_MAX];
    if (how->sigmoid) {
        for (int64_t i = 0; i < how->experts; i++)
            s[i] = (float)(1 / (1 + exp(-(double)z[i])));
        return;
    }
    for (int64_t i = 1; i < how->experts; i++)
        most = (double)z[i] > most ? (double)z[i] : most;
    for (int64_t i = 0; i < how->experts; i++)
        sum += e[i] = exp((double)z[i] - most);
    for (int64_t i = 0; i < how->experts; i++)
        s[i] = (float)(e[i] / sum);
}

/* The largest of value[0, n) that is not taken; it is then. The smallest index among equal ones. */
static int64_t take_largest(const float *value, bool *taken, int64_t n)
{
    int64_t best = 0;
    while (taken[best])
        best++;
    for (int64_t i = best + 1; i < n; i++)
        if (!taken[i] && value[i] > value[best])
            best = i;
    taken[best] = true;
    return best;
}

/* The rank of a group of n experts. */
static float group_rank(const struct router *how, const float *value, int64_t n)
{
    bool taken[EXPERTS_MAX] = { false };
    float sum = value[take_largest(value, taken, n)];
    if (how->sigmoid && n > 1)
        sum += value[take_largest(value, taken, n)];
    return sum;
}

/* Experts of all but the best groups are taken. */
static void limit_groups(const struct router *how, const float *value, bool *taken)
{
    int64_t each = how->experts / how->groups;
    float rank[EXPERTS_MAX];
    bool chosen[EXPERTS_MAX] = { false };
    for (int64_t g = 0; g < how->groups; g++)
        rank[g] = group_rank(how, value + g * each, each);
    for (int64_t i = 0; i < how->top_groups; i++)
        (void)take_largest(rank, chosen, how->groups);
    for (int64_t e = 0; e < how->experts; e++)
        taken[e] = !chosen[e / each];
}

static void choose(const struct router *how, const float *s, const float *bias, int32_t *expert)
{
    float value[EXPERTS_MAX];
    bool taken[EXPERTS_MAX] = { false };
    for (int64_t e = 0; e < how->experts; e++)
        value[e] = bias ? s[e] + bias[e] : s[e];
    if (how->groups > 1)
        limit_groups(how, value, taken);
    for (int64_t j = 0; j < how->top; j++)
        expert[j] = (int32_t)take_largest(value, taken, how->experts);
}

static double sum_of_chosen(const struct router *how, const float *s, const int32_t *expert)
{
    double sum = how->sigmoid ? tiny : 0;
    for (int64_t j = 0; j < how->top; j++)
        sum += (double)s[expert[j]];
    return sum;
}

static void route_tokens(void *arg, size_t index)
{
    const struct route *r = arg;
    const struct router *how = r->how;
    int64_t each = task_rows(how->experts), first = (int64_t)index * each, end = min64(first + each, r->n);
    for (int64_t n = first; n < end; n++) {
        float *s = r->score + n * how->experts;
        int32_t *expert = r->expert + n * how->top;
        scores_of(how, r->z + n * how->experts, s);
        if (!r->given)
            choose(how, s, r->bias, expert);
        double factor = (double)how->scale / (how->normalise ? sum_of_chosen(how, s, expert) : 1);
        for (int64_t j = 0; j < how->top; j++)
            r->weight[n * how->top + j] = (float)(factor * (double)s[expert[j]]);
    }
}

void cpu_route(struct workers *w, const struct route *r)
{
    workers_for(w, task_count(r->n, task_rows(r->how->experts)), route_tokens, (void *)(size_t)r);
}

/* ds[e] of a token. */
static void score_gradient(const struct route *r, const float *s, const int32_t *expert, const float *dweight,
                           double *ds)
{
    const struct router *how = r->how;
    double sum = sum_of_chosen(how, s, expert), dot = 0;
    for (int64_t e = 0; e < how->experts; e++)
        ds[e] = r->dshare && !how->sigmoid ? (double)r->dshare[e] : 0;
    for (int64_t j = 0; how->normalise && j < how->top; j++)
        dot += (double)dweight[j] * (double)s[expert[j]];
    for (int64_t j = 0; j < how->top; j++)
        ds[expert[j]] +=
            (double)how->scale * (how->normalise ? ((double)dweight[j] - dot / sum) / sum : (double)dweight[j]);
    if (!r->dshare || !how->sigmoid)
        return;
    double all = 0, mean = 0; /* of shares s / all */
    for (int64_t e = 0; e < how->experts; e++)
        all += (double)s[e];
    for (int64_t e = 0; e < how->experts; e++)
        mean += (double)r->dshare[e] * (double)s[e] / all;
    for (int64_t e = 0; e < how->experts; e++)
        ds[e] += ((double)r->dshare[e] - mean) / all;
}

static void route_back(void *arg, size_t index)
{
    const struct route *r = arg;
    const struct router *how = r->how;
    int64_t each = task_rows(how->experts), first = (int64_t)index * each, end = min64(first + each, r->n);
    double ds[EXPERTS_MAX];
    for (int64_t n = first; n < end; n++) {
        const float *s = r->score + n * how->experts;
        float *dz = r->dz + n * how->experts;
        score_gradient(r, s, r->expert + n * how->top, r->dweight + n * how->top, ds);
        double mean = 0;
        for (int64_t e = 0; !how->sigmoid && e < how->experts; e++)
            mean += (double)s[e] * ds[e];
        for (int64_t e = 0; e < how->experts; e++)
            dz[e] += (float)((how->sigmoid ? 1 - (double)s[e] : 1) * (double)s[e] * (ds[e] - mean));
    }
}

void cpu_route_bwd(struct workers *w, const struct route *r)
{
    workers_for(w, task_count(r->n, task_rows(r->how->experts)), route_back, (void *)(size_t)r);
}

/* ---- what experts have made ---- */

static void mix_tokens(void *arg, size_t index)
{
    const struct mix *m = arg;
    int64_t each = task_rows(m->c), first = (int64_t)index * each, end = min64(first + each, m->n);
    for (int64_t n = first; n < end; n++) {
        float *y = m->y + n * m->c;
        memset(y, 0, (size_t)m->c * sizeof *y);
        for (int64_t j = n * m->k; j < (n + 1) * m->k; j++) {
            const float *row = m->row + m->place[j] * m->c, weight = m->weight[j];
            for (int64_t c = 0; c < m->c; c++)
                y[c] += weight * row[c];
        }
    }
}

void cpu_mix(struct workers *w, const struct mix *m)
{
    workers_for(w, task_count(m->n, task_rows(m->c)), mix_tokens, (void *)(size_t)m);
}

/* In four sums, so that the machine has something to do meanwhile. */
static double dot(const float *x, const float *y, int64_t n)
{
    double sum[4] = { 0 };
    for (int64_t i = 0; i < n; i++)
        sum[i & 3] += (double)x[i] * (double)y[i];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static void mix_back(void *arg, size_t index)
{
    const struct mix *m = arg;
    int64_t each = task_rows(m->c), first = (int64_t)index * each, end = min64(first + each, m->n);
    for (int64_t n = first; n < end; n++) {
        const float *dy = m->dy + n * m->c;
        for (int64_t j = n * m->k; j < (n + 1) * m->k; j++) {
            int64_t at = m->place[j] * m->c;
            if (m->dweight)
                m->dweight[j] += (float)dot(m->row + at, dy, m->c);
            for (int64_t c = 0; m->drow && c < m->c; c++)
                m->drow[at + c] = m->weight[j] * dy[c];
        }
    }
}

void cpu_mix_bwd(struct workers *w, const struct mix *m)
{
    workers_for(w, task_count(m->n, task_rows(m->c)), mix_back, (void *)(size_t)m);
}

/* ---- the order of experts, and their loads ---- */

void cpu_sort_experts(struct workers *w, const struct expert_sort *s)
{
    int32_t *at = s->offset;
    int64_t choices = s->n * s->top;
    (void)w;
    memset(at, 0, (size_t)(s->experts + 1) * sizeof *at);
    for (int64_t i = 0; i < choices; i++)
        at[s->expert[i] + 1]++;
    for (int64_t e = 0; e < s->experts; e++)
        at[e + 1] += at[e];
    for (int64_t i = 0; i < choices; i++) { /* an offset moves to the end of the expert's */
        int32_t to = at[s->expert[i]]++;
        s->place[i] = to;
        s->token[to] = (int32_t)(i / s->top);
    }
    for (int64_t e = s->experts; e > 0; e--)
        at[e] = at[e - 1];
    at[0] = 0;
}

void cpu_load_sums(struct workers *w, const struct route_load *l)
{
    int64_t experts = l->how->experts, own = l->n - l->padding;
    double *mean = l->sums + 1, *count = mean + experts;
    (void)w;
    l->sums[0] = (double)own;
    for (int64_t e = 0; e < experts; e++) {
        mean[e] = 0;
        count[e] = (double)(l->offset[e + 1] - l->offset[e]);
    }
    for (int64_t i = own * l->how->top; i < l->n * l->how->top; i++)
        count[l->expert[i]]--;
    for (int64_t i = 0; i < own; i++) {
        const float *s = l->score + i * experts;
        double sum = 0;
        for (int64_t e = 0; l->how->sigmoid && e < experts; e++)
            sum += (double)s[e];
        for (int64_t e = 0; e < experts; e++)
            mean[e] += l->how->sigmoid ? (double)s[e] / sum : (double)s[e];
    }
}

void cpu_load_shares(struct workers *w, const struct route_load *l)
{
    int64_t experts = l->how->experts;
    const double *mean = l->sums + 1, *count = mean + experts;
    double n = l->sums[0], loss = 0;
    (void)w;
    for (int64_t e = 0; e < experts; e++) {
        double slope = n > 0 ? (double)experts * count[e] / n / n : 0;
        loss += slope * mean[e];
        l->dshare[e] = (float)((double)l->weight * slope);
        if (l->count)
            l->count[e] = (int32_t)count[e];
    }
    if (l->balance)
        *l->balance = loss;
}
