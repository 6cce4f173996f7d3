/* mesh_plan: see mesh_plan.h. */
#include "trainer/mesh_plan.h"

#include "comm/base/mem.h"
#include "trainer/data/tokenizer.h"
#include "trainer/ops/ops.h"
#include "trainer/parallel/schedule.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RECOMPUTES = 3, ZEROS = 4 };

/* What one micro-batch leaves on a tape for backward, in bytes; region: of what is run again, at most. */
struct kept {
    double first, layer, head, region; /* a token */
    double chunk;                      /* of logits, for any number of tokens */
};

/* A stage of a model over (pp, tp). */
struct stage {
    double trained, frozen;         /* elements */
    double experts, frozen_experts; /* of these, of experts that are dealt to ranks of ep */
    double tied;                    /* of a tied output matrix that is kept apart */
    double outside, block;          /* elements outside of blocks, of the largest block */
    double work;                    /* elements that tokens are multiplied with */
    int layers;
    bool first, last;
};

struct mesh_plan {
    const struct config *c;
    int world;
    uint64_t memory;
    double tokens, micro_batches, width, flops; /* a micro-batch, a step; channels; forward, a token */
    struct mesh_plan_row *row;
    size_t count, cap;
    status *refused; /* the last mesh that the model cannot be cut over */
};

/* ---- what a cut model has ---- */

static status *open_cut(const struct mesh_plan *p, int stages, int stage, int tp, const char *list, struct model **out)
{
    const struct config *c = p->c;
    const struct tp_place at = { .size = tp,
                                 .apart = c->train.deterministic,
                                 .sequence = tp > 1,
                                 .stages = stages,
                                 .stage = stage,
                                 .list = list,
                                 .experts = (int)c->parallel.ep };
    const struct tuning tuning = { &c->lora, c->train.freeze, c->optim.kind == OPTIM_MUON ? c->optim.muon : NULL };
    return model_open_tuned(c->model_ops, c->model, TOKEN_VOCAB, &at, &tuning, out);
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* ep: ranks that experts are dealt to; work is that of all of them. */
static struct stage stage_of(const struct model *m, int64_t ep)
{
    const struct params *ps = &m->params;
    int layers = m->ops->layers(m);
    double blocks = 0, block = 0, head = 0, dealt = 0;
    struct stage s = { .trained = (double)ps->total,
                       .frozen = (double)ps->frozen,
                       .experts = (double)ps->experts,
                       .tied = (double)m->tied.total };
    for (int i = 0; i < ps->count && ep > 1; i++)
        s.frozen_experts += ps->p[i].experts && ps->p[i].frozen ? (double)param_elems(&ps->p[i]) : 0;
    for (int unit = 0; unit < layers + 2; unit++) {
        double n = 0;
        for (int i = 0; i < ps->count; i++)
            if (ps->p[i].unit == unit && ps->p[i].alias < 0 && !ps->p[i].away) {
                n += (double)param_elems(&ps->p[i]);
                dealt += ps->p[i].experts ? (double)param_elems(&ps->p[i]) * (double)(ep - 1) : 0;
            }
        bool here = params_hold(ps, 0, unit);
        s.first = s.first || (here && unit == 0);
        s.last = s.last || (here && unit == layers + 1);
        if (unit == 0 || unit == layers + 1) {
            head += unit ? n : 0;
            continue;
        }
        s.layers += here;
        blocks += n;
        block = larger(block, n);
    }
    const struct param *out = s.last ? params_find(ps, "lm_head.weight") : NULL;
    bool alias = out && out->alias >= 0; /* of the embedding, which is on another stage or counted with the first */
    s.work =
        blocks + dealt + head + (alias ? (double)(ps->p[out->alias].shape.dim[0] * ps->p[out->alias].shape.dim[1]) : 0);
    s.block = block;
    s.outside = larger(s.trained + s.frozen - blocks, 0);
    return s;
}

/* For a dry pass: shapes and who learns, no memory. */
static void pretend_memory(struct model *m, float *anything)
{
    struct params *ps = &m->params;
    for (int i = 0; i < ps->count; i++) {
        ps->p[i].value.grad = ps->p[i].frozen ? NULL : anything;
        ps->p[i].value.cut = ps->p[i].part.total ? &ps->p[i].part : NULL;
    }
    struct param *use = m->tied.count ? params_find(ps, m->tied.p->name) : NULL;
    if (!use)
        return;
    m->tied.p->value.cut = m->tied.p->part.total ? &m->tied.p->part : NULL;
    m->tied.p->value.grad = use->frozen ? NULL : anything;
    use->value = m->tied.p->value;
}

/* Bytes on the tape after a dry pass of n tokens through the only unit of a stage. */
static status *dry_unit(const struct mesh_plan *p, int unit, int units, int tp, int recompute, int n, double *kept,
                        double *region)
{
    struct model *m = NULL;
    struct tape *t = NULL;
    struct comm ranks = { .size = tp }, ep = { .size = (int)p->c->parallel.ep };
    float anything = 0;
    int32_t token[2 * PLAN_TOKENS] = { 0 }, position[2 * PLAN_TOKENS], offset[2] = { 0, n };
    struct logprob_stats stats;
    for (int i = 0; i < n; i++)
        position[i] = i;
    TRY(open_cut(p, units, unit, tp, NULL, &m));
    pretend_memory(m, &anything);
    status *st = tape_open(NULL, NULL, 0, &t);
    if (!st) {
        struct model_input in = { .tokens = n, .token = token, .seg = { 1, offset, position } };
        if (tp > 1)
            tape_spread(t, &ranks, true);
        if (ep.size > 1)
            tape_experts(t, &ep);
        tape_recompute(t, (enum tape_recompute)recompute);
        tape_share(t, p->c->parallel.schedule != PIPE_ZERO_BUBBLE);
        tape_begin(t, TAPE_DRY);
        in.x = unit ? op_boundary(t, n, m->width) : NULL;
        size_t before = t->arena.used_bytes; /* the unit before has made it */
        struct tensor *h = m->ops->forward(m, t, &in);
        if (unit == units - 1)
            h = op_logprob_stats(t, h, m->ops->head(m), token, 1.0f, &stats);
        *kept = (double)(t->arena.used_bytes - before);
        *region = (double)(t->block_bytes + t->grads.most);
        st = tape_end(t);
    }
    tape_close(t);
    model_close(m);
    return st;
}

/* The head makes logits chunk by chunk: of two lengths, what does not grow is a chunk. */
static status *measure(const struct mesh_plan *p, int layers, int tp, int recompute, struct kept *out)
{
    enum { N = PLAN_TOKENS };
    double none, region[2], first, layer[2], head[2];
    int units = layers + 2;
    TRY(dry_unit(p, 0, units, tp, recompute, N, &first, &none));
    TRY(dry_unit(p, 1, units, tp, recompute, N, &layer[0], &region[0]));
    TRY(dry_unit(p, layers, units, tp, recompute, N, &layer[1], &region[1])); /* models may begin with other layers */
    TRY(dry_unit(p, units - 1, units, tp, recompute, N, &head[0], &none));
    TRY(dry_unit(p, units - 1, units, tp, recompute, 2 * N, &head[1], &none));
    out->first = first / N;
    out->layer = larger(layer[0], layer[1]) / N;
    out->region = larger(region[0], region[1]) / N;
    out->head = (head[1] - head[0]) / N;
    out->chunk = head[0] - out->head * N;
    return NULL;
}

/* ---- formulas ---- */

/* Ranks that micro-batches are dealt to. */
static int ranks_of(const struct config *c, const struct mesh_plan_row *r)
{
    return r->dp * (int)c->parallel.ep;
}

static int shards_of(const struct config *c, const struct mesh_plan_row *r)
{
    return c->parallel.dp_shard ? (int)c->parallel.dp_shard : ranks_of(c, r);
}

/* The same of ranks with the same experts (experts.h). */
static int expert_shards_of(const struct config *c, const struct mesh_plan_row *r)
{
    int shards = shards_of(c, r), ep = (int)c->parallel.ep;
    return shards % ep ? 1 : shards / ep;
}

/* Of so many elements, experts among them, a shard's. */
static double cut(const struct config *c, const struct mesh_plan_row *r, double all, double experts)
{
    return (all - experts) / shards_of(c, r) + experts / expert_shards_of(c, r);
}

static double levels_of(const struct config *c, const struct mesh_plan_row *r, double micro_batches)
{
    int lanes = (int)c->train.lanes, ranks = ranks_of(c, r), groups = r->zero < 2 ? ranks : ranks / shards_of(c, r),
        levels = 0;
    if (!c->train.deterministic)
        return 0;
    for (int l = lanes / groups; l > 1; l /= 2)
        levels++;
    return levels + (micro_batches > lanes);
}

static void count_state(const struct mesh_plan *p, const struct stage *s, struct mesh_plan_row *r)
{
    const struct config *c = p->c;
    double n = levels_of(c, r, p->micro_batches), dense = s->trained - s->experts + s->tied; /* of experts one sum */
    bool live = c->algo.reference == REFERENCE_LIVE, bf16 = c->train.param_dtype == TRAIN_BF16;
    double own = r->zero ? cut(c, r, s->trained, s->experts) : s->trained, all = s->trained + s->frozen;
    double part = cut(c, r, all, s->experts + s->frozen_experts), held = bf16 ? 2 : 4;
    double values = held * (r->zero == 3 ? part : all) + (bf16 ? 4 * (r->zero ? part : all) : 0);
    double grads =
        r->zero < 2 ? (1 + n) * dense + s->experts : cut(c, r, (n > 1 ? n : 1) * dense + s->experts, s->experts);
    double window = r->zero < 2 ? 0 : r->zero == 2 ? 4 : 4 + held;
    /* of two buckets under way; in bf16 each half as much again, and what is sent */
    double messages = c->train.grad_dtype == TRAIN_BF16 ? 4.5 : 2;
    r->parameters = (uint64_t)(values * (live ? 2 : 1) + (r->pp > 1 ? held * s->tied : 0));
    r->gradients = (uint64_t)(4 * grads);
    r->moments = (uint64_t)(8 * own);
    r->other = (uint64_t)(window * (s->outside + 2 * s->block) +
                          (ranks_of(c, r) > 1 ? messages * (double)c->parallel.bucket : 0));
}

static double count_activations(const struct mesh_plan *p, const struct stage *s, const struct kept *k, int stage,
                                const struct mesh_plan_row *r)
{
    const struct parallel_config *c = &p->c->parallel;
    int chunks = c->schedule != PIPE_INTERLEAVED || r->pp == 1 ? 1 : c->chunks ? (int)c->chunks : 2;
    struct pipe_shape shape = { (enum pipe_schedule)c->schedule, r->pp, stage, chunks };
    double each = k->layer * s->layers + (s->first ? k->first : 0) + (s->last ? k->head : 0) + k->region * chunks;
    uint32_t most = (uint32_t)p->micro_batches;
    return (p->tokens * each + (s->last ? k->chunk : 0)) / chunks * (r->pp > 1 ? schedule_in_flight(&shape, most) : 1);
}

static double count_sent(const struct mesh_plan *p, const struct stage *s, const struct mesh_plan_row *r, double passes)
{
    const struct train_config *c = &p->c->train;
    double ranks = ranks_of(p->c, r), dp = r->dp, tp = r->tp, floats = 4 * p->tokens * p->width;
    double grad = c->grad_dtype == TRAIN_BF16 ? 2 : 4, value = c->param_dtype == TRAIN_BF16 ? 2 : 4;
    double each = r->zero == 0   ? 2 * grad
                  : r->zero == 1 ? grad + value
                  : r->zero == 2 ? passes * grad + value
                                 : passes * (grad + 2 * value);
    double data = (ranks - 1) / ranks * (each * (s->trained - s->experts) + (r->zero < 2 ? 2 * grad * s->tied : 0)) +
                  (dp - 1) / dp * each * s->experts;
    double sums = r->recompute == TAPE_RECOMPUTE_BLOCK ? 6 * s->layers + 2 : 4 * s->layers + 2;
    double tensors = passes * (2 * (tp - 1) / tp * sums * floats + (tp - 1) * 48 * p->tokens);
    return data + tensors + (r->pp > 1 ? passes * 2 * floats / tp : 0);
}

/* Fill in what r needs; stage[pp], kept: of its tp and recomputation. */
static void weigh(const struct mesh_plan *p, const struct stage *stage, const struct kept *k, struct mesh_plan_row *r)
{
    static const double again[RECOMPUTES] = {
        [TAPE_RECOMPUTE_NONE] = 1, [TAPE_RECOMPUTE_BLOCK] = 4.0 / 3, [TAPE_RECOMPUTE_ATTENTION] = 1.1
    };
    int64_t ranks = ranks_of(p->c, r);
    double passes = (double)(((int64_t)p->micro_batches + ranks - 1) / ranks), most = 0, all = 0;
    for (int s = 0; s < r->pp; s++) {
        struct mesh_plan_row here = *r;
        count_state(p, &stage[s], &here);
        here.activations = (uint64_t)count_activations(p, &stage[s], k, s, r);
        if (mesh_plan_need(&here) > mesh_plan_need(r)) {
            r->parameters = here.parameters;
            r->gradients = here.gradients;
            r->moments = here.moments;
            r->other = here.other;
            r->activations = here.activations;
        }
        most = larger(most, stage[s].work);
        all += stage[s].work;
        r->sent = larger(r->sent, count_sent(p, &stage[s], r, passes));
    }
    double micro_batch = 3 * p->flops * p->tokens / r->tp, rounds = passes + r->pp - 1;
    double spent = rounds * micro_batch * most / all * again[r->recompute],
           useful = p->micro_batches / (double)ranks * micro_batch / r->pp;
    r->waits = 1 - useful / spent;
    r->cost = spent + PLAN_BYTE * r->sent;
}

/* ---- candidates ---- */

static bool may_be(const struct config *c, unsigned key, int64_t set, int64_t value)
{
    return !(c->parallel.fixed & key) || set == value;
}

/* What other parts of the program refuse. */
static bool legal(const struct mesh_plan *p, const struct mesh_plan_row *r)
{
    const struct config *c = p->c;
    int shards = shards_of(c, r), ranks = ranks_of(c, r);
    if (ranks % shards)
        return false;
    int64_t groups = r->zero < 2 ? ranks : ranks / shards;
    if (c->train.deterministic && groups > c->train.lanes)
        return false;
    return may_be(c, FIXED_ZERO, c->parallel.zero, r->zero) &&
           may_be(c, FIXED_RECOMPUTE, c->memory.recompute, r->recompute);
}

static status *add_row(struct mesh_plan *p, const struct mesh_plan_row *r)
{
    if (p->count == p->cap) {
        size_t cap = p->cap ? 2 * p->cap : 64;
        struct mesh_plan_row *row = mem_array(p->row, cap, sizeof *row);
        if (!row)
            return ERR(NO_MEMORY, "a plan of %zu meshes", cap);
        p->row = row;
        p->cap = cap;
    }
    p->row[p->count++] = *r;
    return NULL;
}

static status *open_stages(const struct mesh_plan *p, int pp, int tp, struct stage *stage, int *layers)
{
    const char *list = p->c->parallel.fixed & FIXED_PP ? p->c->parallel.stages : NULL;
    for (int s = 0; s < pp; s++) {
        struct model *m = NULL;
        TRY(open_cut(p, pp, s, tp, pp > 1 && p->c->parallel.schedule != PIPE_INTERLEAVED ? list : NULL, &m));
        stage[s] = stage_of(m, p->c->parallel.ep);
        *layers = m->ops->layers(m);
        model_close(m);
    }
    return NULL;
}

static status *add_meshes(struct mesh_plan *p, int pp, int dp, int tp, const struct stage *stage, int layers)
{
    for (int recompute = 0; recompute < RECOMPUTES; recompute++) {
        struct kept kept;
        TRY(measure(p, layers, tp, recompute, &kept));
        for (int zero = 0; zero < ZEROS; zero++) {
            struct mesh_plan_row r = { .pp = pp, .dp = dp, .tp = tp, .zero = zero, .recompute = recompute };
            if (!legal(p, &r))
                continue;
            weigh(p, stage, &kept, &r);
            TRY(add_row(p, &r));
        }
    }
    return NULL;
}

static status *try_mesh(struct mesh_plan *p, int pp, int dp, int tp)
{
    const struct parallel_config *c = &p->c->parallel;
    if (!may_be(p->c, FIXED_PP, c->pp, pp) || !may_be(p->c, FIXED_TP, c->tp, tp) ||
        ((c->fixed & FIXED_DP) && c->dp && c->dp != dp))
        return NULL;
    int layers = 0;
    struct stage *stage = mem_calloc((size_t)pp, sizeof *stage);
    if (!stage)
        return ERR(NO_MEMORY, "%d stages", pp);
    status *st = open_stages(p, pp, tp, stage, &layers);
    if (status_code(st) == ST_INVALID) { /* the model cannot be cut so */
        status_free(p->refused);
        p->refused = st;
        st = NULL;
    } else if (!st) {
        st = add_meshes(p, pp, dp, tp, stage, layers);
    }
    mem_free(stage);
    return st;
}

static status *describe(struct mesh_plan *p)
{
    struct model *m = NULL;
    const struct config *c = p->c;
    int sequences = c->algo_ops->data == DATASET_PREFS ? 2 : 1;
    TRY(open_cut(p, 1, 0, 1, NULL, &m));
    p->tokens = (double)(c->train.micro_batch * sequences * c->data.max_length) / (double)c->parallel.cp;
    p->micro_batches = (double)(c->train.global_batch / c->train.micro_batch);
    p->width = (double)m->width;
    p->flops = m->ops->flops_per_token(m, (double)c->data.max_length / 2);
    model_close(m);
    return NULL;
}

static status *try_all(struct mesh_plan *p)
{
    int64_t others = p->c->parallel.ep * p->c->parallel.cp;
    if (p->world % others)
        return ERR(INVALID, "parallel: auto: %d ranks are not divided by parallel.ep x parallel.cp: %lld", p->world,
                   (long long)others);
    int ranks = p->world / (int)others;
    TRY(describe(p));
    for (int pp = 1; pp <= ranks; pp++)
        for (int tp = 1; tp <= TP_MAX && ranks % pp == 0; tp++)
            if (ranks / pp % tp == 0)
                TRY(try_mesh(p, pp, ranks / pp / tp, tp));
    if (p->count)
        return NULL;
    if (!p->refused)
        return ERR(INVALID,
                   "parallel: auto: no mesh of %d ranks goes with the keys that are set (train.lanes: %lld, "
                   "parallel.*, optim.kind)",
                   p->world, (long long)p->c->train.lanes);
    status *st = status_wrap(p->refused, "parallel: auto: no mesh of %d ranks", p->world);
    p->refused = NULL;
    return st;
}

status *mesh_plan_make(const struct config *c, int world, uint64_t memory, struct mesh_plan **out)
{
    struct mesh_plan *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a plan");
    *p = (struct mesh_plan){ .c = c, .world = world, .memory = memory };
    status *st = try_all(p);
    if (st) {
        mesh_plan_free(p);
        return st;
    }
    *out = p;
    return NULL;
}

void mesh_plan_free(struct mesh_plan *p)
{
    if (!p)
        return;
    status_free(p->refused);
    mem_free(p->row);
    mem_free(p);
}

/* ---- the choice ---- */

uint64_t mesh_plan_need(const struct mesh_plan_row *r)
{
    return r->parameters + r->gradients + r->moments + r->other + r->activations;
}

/* Is a to be taken before b? What fits before what does not; then the cheaper; or the smaller. */
static bool before(const struct mesh_plan *p, const struct mesh_plan_row *a, const struct mesh_plan_row *b)
{
    bool fits = mesh_plan_need(a) <= p->memory;
    if (!b || fits != (mesh_plan_need(b) <= p->memory))
        return !b || fits;
    return fits ? a->cost < b->cost : mesh_plan_need(a) < mesh_plan_need(b);
}

/* Of one pp and tp, or of all (pp 0). */
static const struct mesh_plan_row *first_of(const struct mesh_plan *p, int pp, int tp)
{
    const struct mesh_plan_row *best = NULL;
    for (size_t i = 0; i < p->count; i++)
        if ((!pp || (p->row[i].pp == pp && p->row[i].tp == tp)) && before(p, &p->row[i], best))
            best = &p->row[i];
    return best;
}

const struct mesh_plan_row *mesh_plan_best(const struct mesh_plan *p)
{
    const struct mesh_plan_row *best = first_of(p, 0, 0);
    return best && mesh_plan_need(best) <= p->memory ? best : NULL;
}

static const char *const recomputed[RECOMPUTES] = {
    [TAPE_RECOMPUTE_NONE] = "none", [TAPE_RECOMPUTE_BLOCK] = "block", [TAPE_RECOMPUTE_ATTENTION] = "attention"
};

void mesh_plan_print(const struct mesh_plan *p, void (*say)(void *arg, const char *line), void *arg)
{
    char line[256];
    const struct mesh_plan_row *best = first_of(p, 0, 0);
    double mb = 1e6;
    snprintf(line, sizeof line,
             "parallel: auto: %d ranks of %.0f MB; micro-batches of up to %.0f tokens, %.0f a step; MB a rank:",
             p->world, (double)p->memory / mb, p->tokens, p->micro_batches);
    say(arg, line);
    snprintf(line, sizeof line, "%4s %5s %3s %4s %-9s %8s %8s %8s %8s %8s %8s %8s %6s %6s", "pp", "dp", "tp", "zero",
             "recompute", "values", "grads", "moments", "other", "activ.", "all", "sent", "lost", "cost");
    say(arg, line);
    for (int pp = 1; pp <= p->world; pp++)
        for (int tp = 1; tp <= TP_MAX; tp++) {
            const struct mesh_plan_row *r = first_of(p, pp, tp);
            if (!r)
                continue;
            snprintf(line, sizeof line,
                     "%4d %5d %3d %4d %-9s %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f %5.0f%% %6.2f%s", r->pp, r->dp,
                     r->tp, r->zero, recomputed[r->recompute], (double)r->parameters / mb, (double)r->gradients / mb,
                     (double)r->moments / mb, (double)r->other / mb, (double)r->activations / mb,
                     (double)mesh_plan_need(r) / mb, r->sent / mb, 100 * r->waits, r->cost / best->cost,
                     mesh_plan_need(r) > p->memory ? "  does not fit"
                     : r == best                   ? "  chosen"
                                                   : "");
            say(arg, line);
        }
}

status *mesh_plan_take(const struct mesh_plan *p, struct config *c)
{
    const struct mesh_plan_row *r = first_of(p, 0, 0);
    if (mesh_plan_need(r) > p->memory)
        return ERR(
            NO_MEMORY,
            "parallel: auto: no mesh of %d ranks fits in %.0f MB a rank (memory.rank): the smallest, pp=%d dp=%d "
            "tp=%d zero=%d recompute=%s, needs %.0f MB, %.0f MB more: use more ranks, a smaller "
            "train.micro_batch or data.max_length",
            p->world, (double)p->memory / 1e6, r->pp, r->dp, r->tp, r->zero, recomputed[r->recompute],
            (double)mesh_plan_need(r) / 1e6, (double)(mesh_plan_need(r) - p->memory) / 1e6);
    c->parallel.pp = r->pp;
    c->parallel.dp = r->dp;
    c->parallel.tp = r->tp;
    c->parallel.zero = r->zero;
    if (!(c->parallel.fixed & FIXED_SEQUENCE))
        c->parallel.sequence = r->tp > 1;
    c->memory.recompute = r->recompute;
    return NULL;
}

uint64_t mesh_plan_memory(const struct config *c, int ranks)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return c->memory.rank ? c->memory.rank : (uint64_t)pages * (uint64_t)size / (uint64_t)(ranks > 0 ? ranks : 1);
}

/* ---- tessera plan ---- */

static void print_line(void *arg, const char *line)
{
    fprintf(arg, "%s\n", line);
}

static status *mesh_plan_config(struct config *c, int ranks)
{
    struct mesh_plan *p = NULL;
    TRY(mesh_plan_make(c, ranks, mesh_plan_memory(c, ranks), &p));
    mesh_plan_print(p, print_line, stdout);
    status *st = mesh_plan_take(p, c);
    if (!st)
        printf("parallel.pp=%lld parallel.dp=%lld parallel.tp=%lld parallel.zero=%lld parallel.sequence=%s "
               "memory.recompute=%s\n",
               (long long)c->parallel.pp, (long long)c->parallel.dp, (long long)c->parallel.tp,
               (long long)c->parallel.zero, c->parallel.sequence ? "true" : "false", recomputed[c->memory.recompute]);
    mesh_plan_free(p);
    return st;
}

status *mesh_plan_cli(int argc, char **argv)
{
    struct config *c = NULL;
    struct comm *self = NULL;
    long ranks = 1;
    int n = 0;
    if (!argc)
        return ERR(INVALID, "plan: which CONFIG? (tessera plan CONFIG [ranks=N] [key=value ...])");
    for (int i = 1; i < argc; i++) {
        char *end = NULL;
        if (strncmp(argv[i], "ranks=", 6)) {
            argv[1 + n++] = argv[i];
            continue;
        }
        ranks = strtol(argv[i] + 6, &end, 10);
        if (!argv[i][6] || *end || ranks < 1 || ranks > 1 << 20)
            return ERR(INVALID, "plan: \"%.40s\" is no number of ranks (legal: ranks=1 to ranks=%d)", argv[i], 1 << 20);
    }
    TRY(comm_open("self", NULL, NULL, &self));
    status *st = config_load(self, argv[0], n, argv + 1, &c);
    if (!st)
        st = mesh_plan_config(c, (int)ranks);
    config_free(c);
    comm_close(self);
    return st;
}
