/* generate: see generate.h.
 *
 * One pass takes all prompts, every further one the newest token of the sequences still growing; those that ended stay
 * in the pack as empty segments, so that a sequence keeps its place in the caches. Only the last token's row of each
 * sequence meets the output matrix.
 *
 * Ranks that share experts each make a pass where one of them does, with or without tokens of their own: their
 * exchanges meet. A pass in which nobody had a token, as the counts of rows that they tell each other say, was the
 * last.
 *
 * On P stages there are P groups of prompts, which take turns: while one is on a stage, the others are on the others.
 * The last stage tells all the tokens it has drawn, so every stage knows which sequences go on. What waits for a
 * message waits for what its sender does earlier in the same order (round, chunk, group), and sends have memory of
 * their own for each group: no stage waits in a circle. */
#include "trainer/rollout/generate.h"

#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/ops/compute.h"
#include "trainer/rollout/kv_cache.h"
#include "trainer/rollout/sample.h"

#include <string.h>

enum { TAG_HIDDEN, TAG_TOKENS, TAG_LOGPS };

/* Prompts that make their passes together. */
struct group {
    int32_t first, end; /* of the sequences */
    bool open;          /* it makes passes on this stage, be they empty */
    int64_t routed;     /* rows that it and its like on other ranks have sent to experts here, in this round */
    struct kv_caches caches;
    int32_t *picked; /* [most] tokens of a round, for the sequences that had not ended, in order */
    float *logp;     /* [most] of these */
    float *hidden;   /* [most * longest_prompt * width] to the next stage; NULL: there is one */
    struct comm_req sent, told;
};

struct generator {
    struct model *model;
    struct tape *tape;
    struct comm *pp; /* NULL: one stage */
    int32_t batch, longest_prompt, max_tokens;
    int groups, chunks;
    int32_t most; /* sequences of a group */
    struct group *group;
    struct comm_xfer *xfer; /* [2 * stages] */

    /* the pack of a pass */
    int32_t *token, *position; /* [most * longest_prompt] */
    int32_t *offset;           /* [most + 1] */

    /* what has been generated: of sequence s from s * max_tokens on */
    int32_t *out;  /* [batch * max_tokens] */
    float *logp;   /* [batch * max_tokens] */
    float *heard;  /* as group.hidden, from the stage before, where it computes on a device: every pass waits for tokens
                    * in the end, and host memory may be sent in any order; else NULL */
    float *logits; /* [most * vocabulary] of a pass on a device; NULL: the host reads them where they are */
    int32_t *made; /* [batch] tokens so far */
    bool *ended;   /* [batch] */
};

static bool is_done(const struct generator *g, int32_t s)
{
    return g->ended[s] || g->made[s] == g->max_tokens;
}

static int32_t growing(const struct generator *g, const struct group *q)
{
    int32_t n = 0;
    for (int32_t s = q->first; s < q->end; s++)
        n += !is_done(g, s);
    return n;
}

/* ---- stages ---- */

static int stages_of(const struct generator *g)
{
    return g->pp ? g->pp->size : 1;
}

static bool is_last(const struct generator *g)
{
    return !g->pp || g->pp->rank == g->pp->size - 1;
}

static bool begins(const struct generator *g, int chunk)
{
    return (!g->pp || g->pp->rank == 0) && chunk == 0;
}

static bool ends(const struct generator *g, int chunk)
{
    return is_last(g) && chunk == g->chunks - 1;
}

static status *hidden_from_before(struct generator *g, struct tensor *x)
{
    int from = (g->pp->rank + g->pp->size - 1) % g->pp->size;
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    struct comm_xfer m = { from, TAG_HIDDEN, false, g->heard ? g->heard : x->data, bytes };
    TRY(comm_exchange(g->pp, &m, 1, NULL));
    return g->heard ? compute_put(g->tape->compute, x->data, g->heard, bytes) : NULL;
}

static status *hidden_to_next(struct generator *g, struct group *q, const struct tensor *x)
{
    size_t bytes = (size_t)tensor_elems(x) * sizeof(float);
    TRY(comm_wait(&q->sent));
    TRY(compute_get(g->tape->compute, q->hidden, x->data, bytes));
    struct comm_xfer m = { (g->pp->rank + 1) % g->pp->size, TAG_HIDDEN, true, q->hidden, bytes };
    return comm_iexchange(g->pp, &m, 1, NULL, &q->sent);
}

/* Messages of a round's tokens, with one peer. */
static size_t drawn_messages(const struct group *q, int peer, bool send, int32_t rows, bool logps, struct comm_xfer *x)
{
    x[0] = (struct comm_xfer){ peer, TAG_TOKENS, send, q->picked, (size_t)rows * sizeof *q->picked };
    x[1] = (struct comm_xfer){ peer, TAG_LOGPS, send, q->logp, logps ? (size_t)rows * sizeof *q->logp : 0 };
    return 2;
}

/* The last stage has drawn. */
static status *tell(struct generator *g, const struct generate_options *o, struct group *q, int32_t rows)
{
    size_t n = 0;
    for (int peer = 0; peer < stages_of(g) - 1; peer++)
        n += drawn_messages(q, peer, true, rows, o->logps, g->xfer + n);
    return n ? comm_iexchange(g->pp, g->xfer, n, NULL, &q->told) : NULL;
}

static status *hear(struct generator *g, const struct generate_options *o, const struct group *q, int32_t rows)
{
    size_t n = drawn_messages(q, g->pp->size - 1, false, rows, o->logps, g->xfer);
    return comm_exchange(g->pp, g->xfer, n, NULL);
}

/* ---- a pass ---- */

static struct model_input input_of(struct generator *g, const struct group *q, int32_t sequences, int chunk)
{
    return (struct model_input){ .tokens = g->offset[sequences],
                                 .token = g->token,
                                 .seg = { sequences, g->offset, g->position },
                                 .cache = q->caches.layer,
                                 .chunk = chunk };
}

/* Hidden states -> the row of each sequence's last token in this pass [rows, C]. */
static struct tensor *last_rows(struct generator *g, struct tensor *hidden, int32_t sequences, int32_t rows)
{
    hidden = op_whole(g->tape, hidden);
    if (!hidden)
        return NULL;
    int64_t c = hidden->dim[1];
    struct tensor *x = op_new(g->tape, 2, (int64_t[]){ rows, c }, false);
    status *st = NULL;
    if (!x || g->tape->mode == TAPE_DRY)
        return x;
    for (int32_t s = 0, r = 0; s < sequences; s++)
        if (g->offset[s] < g->offset[s + 1])
            st = status_first(st, compute_copy(g->tape->compute, (float *)x->data + r++ * c,
                                               (float *)hidden->data + (g->offset[s + 1] - 1) * c,
                                               (size_t)c * sizeof(float)));
    return st ? tape_fail(g->tape, st) : x;
}

/* A token for each row: q's sequences that have not ended, in order. On a device it waits for the logits: the tokens
 * are the next pass. */
static status *draw(struct generator *g, const struct generate_options *o, const struct prompt *prompt, struct group *q,
                    const struct tensor *logits)
{
    int64_t vocab = logits->dim[1], r = 0;
    const float *row = g->logits ? g->logits : logits->data;
    if (g->logits)
        TRY(compute_get(g->tape->compute, g->logits, logits->data, (size_t)tensor_elems(logits) * sizeof *row));
    for (int32_t s = q->first; s < q->end; s++) {
        if (is_done(g, s))
            continue;
        struct rng_at at = { o->seed, prompt[s].sample, o->step, RNG_GENERATE };
        double u = o->temperature > 0 ? rng_uniform(at, (uint64_t)g->made[s]) : 0;
        q->picked[r] = sample_token(row + r * vocab, vocab, o->temperature, u);
        r++;
    }
    return NULL;
}

/* The tokens that were drawn go behind their sequences. */
static void append(struct generator *g, const struct generate_options *o, const struct group *q)
{
    for (int32_t s = q->first, r = 0; s < q->end; s++) {
        if (is_done(g, s))
            continue;
        size_t at = (size_t)s * (size_t)g->max_tokens + (size_t)g->made[s]++;
        g->out[at] = q->picked[r];
        g->logp[at] = q->logp[r];
        g->ended[s] = q->picked[r++] == o->eos;
    }
}

/* Final hidden states -> the next token of each of `rows` sequences, and what it is worth. */
static status *finish_pass(struct generator *g, const struct generate_options *o, const struct prompt *prompt,
                           struct group *q, struct tensor *x, int32_t rows)
{
    struct tensor *logp = NULL, *logits = NULL, *head = g->model->ops->head(g->model);
    TRY(comm_wait(&q->told));
    if (rows) {
        x = last_rows(g, x, q->end - q->first, rows);
        logits = op_logits(g->tape, x, head);
    }
    if (logits)
        TRY(draw(g, o, prompt, q, logits));
    if (logits && o->logps)
        logp = op_logprob(g->tape, x, head, q->picked, o->temperature > 0 ? o->temperature : 1.0f);
    if (logp)
        TRY(compute_get(g->tape->compute, q->logp, logp->data, (size_t)rows * sizeof *q->logp));
    TRY(tape_end(g->tape));
    append(g, o, q);
    return tell(g, o, q, rows);
}

/* The pack that lies in g, of q, in whose segments there are `rows` last tokens, through a chunk of the model. */
static status *run_pass(struct generator *g, const struct generate_options *o, const struct prompt *prompt,
                        struct group *q, int chunk, int32_t rows)
{
    struct model_input in = input_of(g, q, q->end - q->first, chunk);
    tape_begin(g->tape, TAPE_FORWARD);
    if (!begins(g, chunk)) {
        in.x = op_boundary(g->tape, in.tokens, g->model->width);
        if (in.x)
            TRY(hidden_from_before(g, in.x));
    }
    struct tensor *x = g->model->ops->forward(g->model, g->tape, &in);
    q->routed += g->tape->routed;
    if (ends(g, chunk))
        return finish_pass(g, o, prompt, q, x, rows);
    TRY(tape_end(g->tape));
    return hidden_to_next(g, q, x);
}

/* ---- packs ---- */

static void pack_prompts(struct generator *g, const struct prompt *prompt, const struct group *q)
{
    g->offset[0] = 0;
    for (int32_t s = q->first, i = 0; s < q->end; s++, i++) {
        int32_t at = g->offset[i];
        memcpy(g->token + at, prompt[s].token, (size_t)prompt[s].count * sizeof *g->token);
        for (int32_t k = 0; k < prompt[s].count; k++)
            g->position[at + k] = k;
        g->offset[i + 1] = at + prompt[s].count;
    }
}

/* The newest token of every growing sequence. */
static void pack_newest(struct generator *g, const struct prompt *prompt, const struct group *q)
{
    g->offset[0] = 0;
    for (int32_t s = q->first, i = 0; s < q->end; s++, i++) {
        int32_t at = g->offset[i];
        g->offset[i + 1] = at + !is_done(g, s);
        if (is_done(g, s))
            continue;
        g->token[at] = g->out[s * g->max_tokens + g->made[s] - 1];
        g->position[at] = prompt[s].count + g->made[s] - 1;
    }
}

/* ---- rounds: a token for each sequence that goes on ---- */

/* What q's last round has made is heard of, and whether there is one more. */
static status *begin_round(struct generator *g, const struct generate_options *o, struct group *q, bool first)
{
    int32_t rows = growing(g, q);
    if (!first && q->open && rows && !is_last(g)) {
        TRY(hear(g, o, q, rows));
        append(g, o, q);
        rows = growing(g, q);
    }
    q->open = rows || (first ? g->tape->ep != NULL : q->open && q->routed);
    q->routed = 0;
    return NULL;
}

/* *more: a group has made passes, here. */
static status *run_round(struct generator *g, const struct generate_options *o, const struct prompt *prompt, bool first,
                         bool *more)
{
    *more = false;
    for (int chunk = 0; chunk < g->chunks; chunk++)
        for (struct group *q = g->group; q < g->group + g->groups; q++) {
            if (chunk == 0)
                TRY(begin_round(g, o, q, first));
            if (!q->open)
                continue;
            *more = true;
            if (first)
                pack_prompts(g, prompt, q);
            else
                pack_newest(g, prompt, q);
            TRY(run_pass(g, o, prompt, q, chunk, growing(g, q)));
        }
    return NULL;
}

static status *wait_sent(struct generator *g)
{
    for (int i = 0; i < g->groups; i++) {
        TRY(comm_wait(&g->group[i].sent));
        TRY(comm_wait(&g->group[i].told));
    }
    return NULL;
}

static status *check_prompt(const struct generator *g, int32_t s, const struct prompt *p)
{
    if (p->count < 1 || p->count > g->longest_prompt)
        return ERR(INVALID, "generate: prompt %d has %d tokens (legal: 1 to %d)", s, p->count, g->longest_prompt);
    for (int32_t i = 0; i < p->count; i++)
        if (p->token[i] < 0 || p->token[i] >= g->model->vocab)
            return ERR(INVALID, "generate: token %d of prompt %d is %d, none of the model's %lld", i, s, p->token[i],
                       (long long)g->model->vocab);
    return NULL;
}

static status *check_call(const struct generator *g, const struct generate_options *o, const struct prompt *prompt,
                          int32_t n)
{
    if (n < 0 || n > g->batch)
        return ERR(INVALID, "generate: %d prompts, a batch has 0 to %d", n, g->batch);
    if (!(o->temperature >= 0))
        return ERR(INVALID, "generate: temperature %g is not 0 or above", (double)o->temperature);
    for (int32_t s = 0; s < n; s++)
        TRY(check_prompt(g, s, &prompt[s]));
    return NULL;
}

static void begin_groups(struct generator *g, int32_t n)
{
    memset(g->made, 0, (size_t)n * sizeof *g->made);
    memset(g->ended, 0, (size_t)n * sizeof *g->ended);
    for (int i = 0; i < g->groups; i++) {
        struct group *q = &g->group[i];
        uint64_t first, end;
        layout_cut((uint64_t)n, (uint64_t)g->groups, (uint64_t)i, &first, &end);
        q->first = (int32_t)first;
        q->end = (int32_t)end;
        kv_caches_reset(&q->caches, q->end - q->first);
    }
}

status *generate(struct generator *g, const struct generate_options *o, const struct prompt *prompt, int32_t n,
                 struct completion *out)
{
    TRY(check_call(g, o, prompt, n));
    begin_groups(g, n);
    for (bool first = true, more = true; more; first = false)
        TRY(run_round(g, o, prompt, first, &more));
    TRY(wait_sent(g));
    for (int32_t s = 0; s < n; s++) {
        size_t at = (size_t)s * (size_t)g->max_tokens;
        out[s] = (struct completion){ g->out + at, o->logps ? g->logp + at : NULL, g->made[s], g->ended[s] };
    }
    return NULL;
}

/* ---- opening ---- */

static status *take_group(struct generator *g, const struct kv_shape *shape, struct group *q)
{
    size_t most = (size_t)g->most, hidden = most * (size_t)g->longest_prompt * (size_t)g->model->width;
    q->picked = mem_calloc(most, sizeof *q->picked);
    q->logp = mem_calloc(most, sizeof *q->logp);
    q->hidden = g->pp ? mem_array(NULL, hidden, sizeof *q->hidden) : NULL;
    if (!q->picked || !q->logp || (g->pp && !q->hidden))
        return ERR(NO_MEMORY, "%zu prompts of %d tokens", most, g->longest_prompt);
    return kv_caches_init(&q->caches, shape, &g->model->params, g->most, g->longest_prompt + g->max_tokens - 1);
}

static status *take_memory(struct generator *g, const struct kv_shape *shape)
{
    size_t batch = (size_t)g->batch, tokens = (size_t)g->most * (size_t)g->longest_prompt,
           made = batch * (size_t)g->max_tokens;
    g->group = mem_calloc((size_t)g->groups, sizeof *g->group);
    g->xfer = mem_calloc(2 * (size_t)stages_of(g), sizeof *g->xfer);
    g->token = mem_calloc(tokens, sizeof *g->token);
    g->position = mem_calloc(tokens, sizeof *g->position);
    g->offset = mem_calloc((size_t)g->most + 1, sizeof *g->offset);
    g->out = mem_calloc(made, sizeof *g->out);
    g->logp = mem_calloc(made, sizeof *g->logp);
    g->made = mem_calloc(batch, sizeof *g->made);
    g->ended = mem_calloc(batch, sizeof *g->ended);
    bool copied = !compute_host(g->tape->compute);
    if (copied)
        g->logits = mem_array(NULL, (size_t)g->most * (size_t)g->model->vocab, sizeof *g->logits);
    if (copied && g->pp)
        g->heard = mem_array(NULL, tokens * (size_t)g->model->width, sizeof *g->heard);
    if ((copied && (!g->logits || (g->pp && !g->heard))) || !g->group || !g->xfer || !g->token || !g->position ||
        !g->offset || !g->out || !g->logp || !g->made || !g->ended)
        return ERR(NO_MEMORY, "a generator of %zu prompt tokens and %zu new ones", tokens, made);
    for (int i = 0; i < g->groups; i++)
        TRY(take_group(g, shape, &g->group[i]));
    return NULL;
}

/* A group's largest pass, through every chunk. */
static status *dry_run(struct generator *g)
{
    g->offset[g->most] = g->most * g->longest_prompt;
    for (int chunk = 0; chunk < g->chunks; chunk++) {
        struct model_input in = input_of(g, &g->group[0], g->most, chunk);
        tape_begin(g->tape, TAPE_DRY);
        in.x = begins(g, chunk) ? NULL : op_boundary(g->tape, in.tokens, g->model->width);
        struct tensor *x = g->model->ops->forward(g->model, g->tape, &in);
        if (ends(g, chunk)) {
            struct tensor *head = g->model->ops->head(g->model);
            x = last_rows(g, x, g->most, g->most);
            (void)op_logits(g->tape, x, head);
            (void)op_logprob(g->tape, x, head, g->group[0].picked, 1.0f);
        }
        TRY(status_wrap(tape_end(g->tape), "a batch of %d prompts of %d tokens", g->most, g->longest_prompt));
    }
    return NULL;
}

static status *check_sizes(const struct kv_shape *shape, int32_t batch, int32_t longest_prompt, int32_t max_tokens)
{
    if (batch < 1 || longest_prompt < 1 || max_tokens < 1)
        return ERR(INVALID, "a generator for %d prompts of %d tokens and %d new ones: all must be at least 1", batch,
                   longest_prompt, max_tokens);
    if ((int64_t)batch * ((int64_t)longest_prompt + max_tokens) > INT32_MAX)
        return ERR(INVALID, "%d prompts of %d tokens and %d new ones are more than a pack holds", batch, longest_prompt,
                   max_tokens);
    if ((int64_t)longest_prompt + max_tokens - 1 > shape->max_positions)
        return ERR(INVALID,
                   "a prompt of %d tokens and %d new ones, the last of which is not read, outgrow "
                   "model.max_positions %lld",
                   longest_prompt, max_tokens, (long long)shape->max_positions);
    return NULL;
}

status *generator_open(struct model *m, struct tape *t, struct comm *pp, int32_t batch, int32_t longest_prompt,
                       int32_t max_tokens, struct generator **out)
{
    struct kv_shape shape = m->ops->kv_shape(m);
    TRY(check_sizes(&shape, batch, longest_prompt, max_tokens));
    struct generator *g = mem_calloc(1, sizeof *g);
    if (!g)
        return ERR(NO_MEMORY, "a generator");
    int groups = pp ? pp->size : 1;
    *g = (struct generator){ .model = m,
                             .tape = t,
                             .pp = pp,
                             .batch = batch,
                             .longest_prompt = longest_prompt,
                             .max_tokens = max_tokens,
                             .groups = groups,
                             .chunks = params_chunks(&m->params),
                             .most = (batch + groups - 1) / groups };
    status *st = take_memory(g, &shape);
    if (!st)
        st = dry_run(g);
    if (st) {
        generator_close(g);
        return st;
    }
    *out = g;
    return NULL;
}

void generator_close(struct generator *g)
{
    if (!g)
        return;
    for (int i = 0; g->group && i < g->groups; i++) {
        kv_caches_fini(&g->group[i].caches);
        mem_free(g->group[i].picked);
        mem_free(g->group[i].logp);
        mem_free(g->group[i].hidden);
    }
    mem_free(g->heard);
    mem_free(g->group);
    mem_free(g->xfer);
    mem_free(g->token);
    mem_free(g->position);
    mem_free(g->offset);
    mem_free(g->out);
    mem_free(g->logp);
    mem_free(g->logits);
    mem_free(g->made);
    mem_free(g->ended);
    mem_free(g);
}
