/* generate: see generate.h.
 *
 * One pass takes all prompts, every further one the newest token of the sequences still growing; those that ended stay
 * in the pack as empty segments, so that a sequence keeps its place in the caches. Only the last token's row of each
 * sequence meets the output matrix.
 *
 * Ranks that share experts each make a pass where one of them does, with or without tokens of their own: their
 * exchanges meet. A pass in which nobody had a token, as the counts of rows that they tell each other say, was the
 * last. */
#include "trainer/rollout/generate.h"

#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/rollout/kv_cache.h"
#include "trainer/rollout/sample.h"

#include <string.h>

struct generator {
    struct model *model;
    struct tape *tape;
    int32_t batch, longest_prompt, max_tokens;
    struct kv_caches caches;

    /* the pack of a pass */
    int32_t *token, *position; /* [batch * longest_prompt] */
    int32_t *offset;           /* [batch + 1] */
    int32_t *row;              /* [batch] sequence of each row that meets the output matrix */
    int32_t *picked;           /* [batch] the token drawn for that row */

    /* what has been generated: of sequence s from s * max_tokens on */
    int32_t *out;  /* [batch * max_tokens] */
    float *logp;   /* [batch * max_tokens] */
    int32_t *made; /* [batch] tokens so far */
    bool *ended;   /* [batch] */
};

static struct model_input input_of(struct generator *g, int32_t sequences)
{
    return (struct model_input){ .tokens = g->offset[sequences],
                                 .token = g->token,
                                 .seg = { sequences, g->offset, g->position },
                                 .cache = g->caches.layer };
}

static bool is_done(const struct generator *g, int32_t s)
{
    return g->ended[s] || g->made[s] == g->max_tokens;
}

/* ---- a pass ---- */

/* Hidden states -> the row of each sequence's last token in this pass [rows, C]; g->row says whose they are. */
static struct tensor *last_rows(struct generator *g, struct tensor *hidden, int32_t n, int32_t rows)
{
    hidden = op_whole(g->tape, hidden);
    if (!hidden)
        return NULL;
    int64_t c = hidden->dim[1];
    struct tensor *x = op_new(g->tape, 2, (int64_t[]){ rows, c }, false);
    if (!x || g->tape->mode == TAPE_DRY)
        return x;
    for (int32_t s = 0, r = 0; s < n; s++) {
        if (g->offset[s] == g->offset[s + 1])
            continue;
        memcpy((float *)x->data + r * c, (float *)hidden->data + (g->offset[s + 1] - 1) * c, (size_t)c * sizeof(float));
        g->row[r++] = s;
    }
    return x;
}

/* Draw a token for each row and append it to its sequence. */
static void append(struct generator *g, const struct generate_options *o, const struct prompt *prompt,
                   const struct tensor *logits, int32_t rows)
{
    int64_t vocab = logits->dim[1];
    for (int32_t r = 0; r < rows; r++) {
        int32_t s = g->row[r], at = g->made[s]++;
        struct rng_at draw = { o->seed, prompt[s].sample, o->step, RNG_GENERATE };
        double u = o->temperature > 0 ? rng_uniform(draw, (uint64_t)at) : 0;
        g->picked[r] = sample_token((const float *)logits->data + r * vocab, vocab, o->temperature, u);
        g->out[s * g->max_tokens + at] = g->picked[r];
        g->ended[s] = g->picked[r] == o->eos;
    }
}

/* The pack that lies in g, `rows` of whose n segments have tokens, then one more token for each of these. */
static status *run_pass(struct generator *g, const struct generate_options *o, const struct prompt *prompt, int32_t n,
                        int32_t rows)
{
    struct tensor *logp = NULL, *head = g->model->ops->head(g->model);
    struct model_input in = input_of(g, n);
    tape_begin(g->tape, TAPE_FORWARD);
    struct tensor *x = g->model->ops->forward(g->model, g->tape, &in), *logits = NULL;
    if (rows) {
        x = last_rows(g, x, n, rows);
        logits = op_logits(g->tape, x, head);
    }
    if (logits)
        append(g, o, prompt, logits, rows);
    if (logits && o->logps)
        logp = op_logprob(g->tape, x, head, g->picked, o->temperature > 0 ? o->temperature : 1.0f);
    for (int32_t r = 0; logp && r < rows; r++)
        g->logp[g->row[r] * g->max_tokens + g->made[g->row[r]] - 1] = ((const float *)logp->data)[r];
    return tape_end(g->tape);
}

static void pack_prompts(struct generator *g, const struct prompt *prompt, int32_t n)
{
    g->offset[0] = 0;
    for (int32_t s = 0; s < n; s++) {
        int32_t at = g->offset[s];
        memcpy(g->token + at, prompt[s].token, (size_t)prompt[s].count * sizeof *g->token);
        for (int32_t i = 0; i < prompt[s].count; i++)
            g->position[at + i] = i;
        g->offset[s + 1] = at + prompt[s].count;
    }
}

/* The newest token of every growing sequence; how many there are. */
static int32_t pack_newest(struct generator *g, const struct prompt *prompt, int32_t n)
{
    g->offset[0] = 0;
    for (int32_t s = 0; s < n; s++) {
        int32_t at = g->offset[s];
        g->offset[s + 1] = at + !is_done(g, s);
        if (is_done(g, s))
            continue;
        g->token[at] = g->out[s * g->max_tokens + g->made[s] - 1];
        g->position[at] = prompt[s].count + g->made[s] - 1;
    }
    return g->offset[n];
}

static status *check_call(const struct generator *g, const struct generate_options *o, const struct prompt *prompt,
                          int32_t n)
{
    if (n < 0 || n > g->batch)
        return ERR(INVALID, "generate: %d prompts, a batch has 0 to %d", n, g->batch);
    if (!(o->temperature >= 0))
        return ERR(INVALID, "generate: temperature %g is not 0 or above", (double)o->temperature);
    for (int32_t s = 0; s < n; s++)
        if (prompt[s].count < 1 || prompt[s].count > g->longest_prompt)
            return ERR(INVALID, "generate: prompt %d has %d tokens (legal: 1 to %d)", s, prompt[s].count,
                       g->longest_prompt);
    return NULL;
}

status *generate(struct generator *g, const struct generate_options *o, const struct prompt *prompt, int32_t n,
                 struct completion *out)
{
    TRY(check_call(g, o, prompt, n));
    kv_caches_reset(&g->caches, n);
    memset(g->made, 0, (size_t)n * sizeof *g->made);
    memset(g->ended, 0, (size_t)n * sizeof *g->ended);
    pack_prompts(g, prompt, n);
    bool more = n || g->tape->ep;
    for (int32_t rows = n; more; more = rows || g->tape->routed) {
        TRY(run_pass(g, o, prompt, n, rows));
        rows = pack_newest(g, prompt, n);
    }
    for (int32_t s = 0; s < n; s++) {
        size_t at = (size_t)s * (size_t)g->max_tokens;
        out[s] = (struct completion){ g->out + at, o->logps ? g->logp + at : NULL, g->made[s], g->ended[s] };
    }
    return NULL;
}

/* ---- opening ---- */

static status *take_memory(struct generator *g)
{
    size_t batch = (size_t)g->batch, tokens = batch * (size_t)g->longest_prompt, made = batch * (size_t)g->max_tokens;
    g->token = mem_calloc(tokens, sizeof *g->token);
    g->position = mem_calloc(tokens, sizeof *g->position);
    g->offset = mem_calloc(batch + 1, sizeof *g->offset);
    g->row = mem_calloc(batch, sizeof *g->row);
    g->picked = mem_calloc(batch, sizeof *g->picked);
    g->out = mem_calloc(made, sizeof *g->out);
    g->logp = mem_calloc(made, sizeof *g->logp);
    g->made = mem_calloc(batch, sizeof *g->made);
    g->ended = mem_calloc(batch, sizeof *g->ended);
    bool all = g->token && g->position && g->offset && g->row && g->picked && g->out && g->logp && g->made && g->ended;
    return all ? NULL : ERR(NO_MEMORY, "a generator of %zu prompt tokens and %zu new ones", tokens, made);
}

static status *dry_run(struct generator *g)
{
    struct tensor *head = g->model->ops->head(g->model);
    g->offset[g->batch] = g->batch * g->longest_prompt;
    struct model_input in = input_of(g, g->batch);
    tape_begin(g->tape, TAPE_DRY);
    struct tensor *x = last_rows(g, g->model->ops->forward(g->model, g->tape, &in), g->batch, g->batch);
    (void)op_logits(g->tape, x, head);
    (void)op_logprob(g->tape, x, head, g->picked, 1.0f);
    return status_wrap(tape_end(g->tape), "a batch of %d prompts of %d tokens", g->batch, g->longest_prompt);
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

status *generator_open(struct model *m, struct tape *t, int32_t batch, int32_t longest_prompt, int32_t max_tokens,
                       struct generator **out)
{
    struct kv_shape shape = m->ops->kv_shape(m);
    TRY(check_sizes(&shape, batch, longest_prompt, max_tokens));
    struct generator *g = mem_calloc(1, sizeof *g);
    if (!g)
        return ERR(NO_MEMORY, "a generator");
    *g = (struct generator){
        .model = m, .tape = t, .batch = batch, .longest_prompt = longest_prompt, .max_tokens = max_tokens
    };
    status *st = take_memory(g);
    if (!st)
        st = kv_caches_init(&g->caches, &shape, batch, longest_prompt + max_tokens - 1);
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
    kv_caches_fini(&g->caches);
    mem_free(g->token);
    mem_free(g->position);
    mem_free(g->offset);
    mem_free(g->row);
    mem_free(g->picked);
    mem_free(g->out);
    mem_free(g->logp);
    mem_free(g->made);
    mem_free(g->ended);
    mem_free(g);
}
