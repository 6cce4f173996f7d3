/* layouts: jobs that are watched: what is saved at a step is, from the list that checkpoints are made of, put together
 * to whole tensors, where each element must be given by some rank, and by all that give it alike. */
#include "tests/trainer/layouts.h"

#include "ckpt/state.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "tests/support/fake_state.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- snapshots ---- */

static bool same_tensor(const struct tensor_copy *a, const char *part, const char *name)
{
    return !strcmp(a->part, part) && !strcmp(a->name, name);
}

static struct tensor_copy *find_tensor(const struct snapshot *s, const char *part, const char *name)
{
    for (int i = 0; i < s->count; i++)
        if (same_tensor(&s->tensor[i], part, name))
            return &s->tensor[i];
    return NULL;
}

static status *new_tensor(struct snapshot *s, const struct state_piece *p, struct tensor_copy **out)
{
    bool ok;
    struct tensor_copy n = { .dtype = p->dtype, .trainable = p->trainable, .shape = p->shape };
    EXPECT(snprintf(n.part, sizeof n.part, "%s", p->part) < (int)sizeof n.part);
    EXPECT(snprintf(n.name, sizeof n.name, "%s", p->name) < (int)sizeof n.name);
    struct tensor_copy *more = mem_array(s->tensor, (size_t)s->count + 1, sizeof *more);
    EXPECT(more);
    s->tensor = more;
    n.elems = shape_volume(&p->shape, &ok);
    n.data = mem_calloc(n.elems + 1, dtype_bytes(p->dtype));
    n.seen = mem_calloc(n.elems + 1, sizeof *n.seen);
    EXPECT(ok && n.data && n.seen);
    s->tensor[s->count++] = n;
    *out = &s->tensor[s->count - 1];
    return NULL;
}

static status *add_piece(struct snapshot *s, const struct state_piece *p, int rank)
{
    struct tensor_copy *t = find_tensor(s, p->part, p->name);
    if (!t)
        TRY(new_tensor(s, p, &t));
    EXPECT(t->dtype == p->dtype && t->trainable == p->trainable && !memcmp(&t->shape, &p->shape, sizeof t->shape));
    EXPECT(!p->strided);
    size_t bytes = dtype_bytes(p->dtype);
    for (uint64_t i = p->piece.begin; i < p->piece.end; i++) {
        uint64_t at = box_global(&p->shape, &p->piece.box, i);
        const unsigned char *from = (const unsigned char *)p->data + (i - p->piece.begin) * bytes;
        if (t->seen[at] && memcmp(t->data + at * bytes, from, bytes) != 0)
            return ERR(INTERNAL, "%s/%s: rank %d holds element %" PRIu64 " otherwise than another rank", p->part,
                       p->name, rank, at);
        memcpy(t->data + at * bytes, from, bytes);
        t->seen[at] = true;
    }
    return NULL;
}

static status *add_state(struct snapshot *s, const struct tessera_state *held, int rank)
{
    for (size_t i = 0; i < held->count; i++)
        if (!held->piece[i].alias_of)
            TRY(add_piece(s, &held->piece[i], rank));
    return NULL;
}

void snapshot_free(struct snapshot *s)
{
    for (int i = 0; i < s->count; i++) {
        mem_free(s->tensor[i].data);
        mem_free(s->tensor[i].seen);
    }
    mem_free(s->tensor);
    *s = (struct snapshot){ 0 };
}

status *snapshot_check(const struct snapshot *s)
{
    EXPECT(s->count > 0);
    for (int i = 0; i < s->count; i++)
        for (uint64_t e = 0; e < s->tensor[i].elems; e++)
            if (!s->tensor[i].seen[e])
                return ERR(INTERNAL, "%s/%s: no rank holds element %" PRIu64, s->tensor[i].part, s->tensor[i].name, e);
    return NULL;
}

/* The tensor of `want` that is t's; both have as many. */
static status *partner(const struct snapshot *got, const struct tensor_copy *t, const struct snapshot *want,
                       const struct tensor_copy **out)
{
    *out = find_tensor(want, t->part, t->name);
    if (!*out || got->count != want->count)
        return ERR(INTERNAL, "%s/%s: among %d tensors, not %d", t->part, t->name, got->count, want->count);
    EXPECT((*out)->dtype == t->dtype && !memcmp(&(*out)->shape, &t->shape, sizeof t->shape));
    return NULL;
}

static status *same_bits(const struct tensor_copy *got, const struct tensor_copy *want)
{
    size_t bytes = dtype_bytes(got->dtype);
    for (uint64_t e = 0; e < got->elems; e++)
        if (memcmp(got->data + e * bytes, want->data + e * bytes, bytes) != 0)
            return ERR(INTERNAL, "%s/%s: element %" PRIu64 " has other bits", got->part, got->name, e);
    return NULL;
}

status *snapshot_same(const struct snapshot *got, const struct snapshot *want)
{
    for (int i = 0; i < got->count; i++) {
        const struct tensor_copy *t;
        TRY(partner(got, &got->tensor[i], want, &t));
        TRY(same_bits(&got->tensor[i], t));
    }
    return NULL;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

static bool is_gradient(const struct tensor_copy *t)
{
    return !strcmp(t->part, "optim") && (ends_with(t->name, ".exp_avg") || ends_with(t->name, ".momentum"));
}

static status *near(const struct tensor_copy *got, const struct tensor_copy *want, double bound, double *worst)
{
    const float *g = (const float *)got->data, *w = (const float *)want->data;
    double off = 0, all = 0;
    EXPECT(got->dtype == DTYPE_F32);
    for (uint64_t e = 0; e < got->elems; e++) {
        off += ((double)g[e] - (double)w[e]) * ((double)g[e] - (double)w[e]);
        all += (double)w[e] * (double)w[e];
    }
    *worst = fmax(*worst, off > 0 ? sqrt(off / all) : 0);
    if (!(sqrt(off) <= bound * sqrt(all)))
        return ERR(INTERNAL, "gradient of %s is off by %.3g of its norm %.3g", got->name, sqrt(off / all), sqrt(all));
    return NULL;
}

status *snapshot_near(const struct snapshot *got, const struct snapshot *want, double bound, double *worst)
{
    for (int i = 0; i < got->count; i++) {
        const struct tensor_copy *g = &got->tensor[i], *t;
        TRY(partner(got, g, want, &t));
        if (is_gradient(g))
            TRY(near(g, t, bound, worst));
        else if (!g->trainable && (!strcmp(g->part, "model") || !strcmp(g->part, "adapter")))
            TRY(same_bits(g, t));
    }
    return NULL;
}

/* ---- watching a job ---- */

/* Of the rank that this thread is. */
static _Thread_local struct layout_run *running;
static _Thread_local uint64_t dealt;

bool watch_step(uint64_t step)
{
    return step == 1 || step == 2 || step == 4 || step == JOB_STEPS;
}

static status *watch(struct trainer *t, struct layout_run *r, struct snapshot *into)
{
    pthread_mutex_lock(&r->lock);
    status *st = add_state(into, t->state, t->world->rank);
    pthread_mutex_unlock(&r->lock);
    return st;
}

status *__real_state_save(struct trainer *t, bool needed);
status *__wrap_state_save(struct trainer *t, bool needed);
void __real_stream_deal(struct stream *s, uint64_t first);
void __wrap_stream_deal(struct stream *s, uint64_t first);

/* A save is due at every step. */
status *__wrap_state_save(struct trainer *t, bool needed)
{
    struct layout_run *r = running;
    if (r->save_at && r->stop && t->step > r->save_at) {
        TRY(state_finish(t));
        TRY(comm_barrier(t->world)); /* an error breaks the job: nobody may be on the way here */
        return ERR(CANCELLED, "given up");
    }
    if (watch_step(t->step) || t->step == r->save_at || t->step == r->watch_at)
        TRY(watch(t, r, &r->after[t->step]));
    return t->step == r->save_at ? __real_state_save(t, needed) : NULL;
}

/* Every rank deals the same rows. */
void __wrap_stream_deal(struct stream *s, uint64_t first)
{
    struct layout_run *r = running;
    __real_stream_deal(s, first);
    uint64_t step = ++dealt, rows = hash64(s->row, s->global_batch * sizeof *s->row) | 1;
    pthread_mutex_lock(&r->lock);
    if (step > JOB_STEPS || (r->dealt[step] && r->dealt[step] != rows))
        abort();
    r->dealt[step] = rows;
    pthread_mutex_unlock(&r->lock);
}

/* ---- running ---- */

/* A text of 1 to 9 letters, or, one time in eight, of up to 45: more than data.max_length in all. */
static void draw_text(struct draw *d, char text[64])
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    int n = (int)draw_between(d, 1, draw_below(d, 8) ? 9 : 45), from = (int)draw_below(d, 17);
    snprintf(text, 64, "%.*s", n, letters + from);
}

static status *open_rows(const char *root, const char *name, FILE **out)
{
    char path[ROOT_BYTES + 64];
    snprintf(path, sizeof path, "%s/data/%s.jsonl", root, name);
    *out = fopen(path, "w");
    EXPECT(*out);
    return NULL;
}

status *layout_data(const char *root)
{
    enum { ROWS = 53, TASKS = 7 }; /* tasks: a model that has learnt little ends at once, and is right */
    char dir[ROOT_BYTES + 16], prompt[64], good[64], bad[64];
    snprintf(dir, sizeof dir, "%s/data", root);
    EXPECT(!mkdir(dir, 0777));
    FILE *sft, *prefs, *labelled, *tasks;
    TRY(open_rows(root, "sft", &sft));
    TRY(open_rows(root, "prefs", &prefs));
    TRY(open_rows(root, "labelled", &labelled));
    TRY(open_rows(root, "tasks", &tasks));
    struct draw d = draw_from(5, 0);
    for (int i = 0; i < ROWS; i++) {
        draw_text(&d, prompt);
        draw_text(&d, good);
        draw_text(&d, bad);
        fprintf(sft, "{\"prompt\": \"%s\", \"completion\": \"%s\"}\n", prompt, good);
        fprintf(prefs, "{\"prompt\": \"%s\", \"chosen\": \"%s\", \"rejected\": \"-%s\"}\n", prompt, good, bad);
        fprintf(labelled, "{\"prompt\": \"%d%.20s\", \"completion\": \"%s\", \"label\": %s}\n", i, prompt,
                i % 3 ? bad : good, i % 3 ? "false" : "true");
        if (i < TASKS)
            fprintf(tasks, "{\"prompt\": \"%.*s\", \"answer\": \"%s\"}\n", 1 + i, prompt, i ? "" : "abc");
    }
    EXPECT(!fclose(sft) && !fclose(prefs) && !fclose(labelled) && !fclose(tasks));
    return NULL;
}

/* eps: else AdamW divides gradients that are little but rounding by themselves; muon_lr: Muon makes small singular
 * values, which are the same, large. */
static status *config_of(const struct layout_run *r, struct config **out)
{
    char text[2048], routes[ROOT_BYTES + 64], tasks[ROOT_BYTES + 64], *words[2 * JOB_WORDS + 2];
    const struct words *const both[] = { &r->job->what, &r->job->how };
    int n = 0;
    snprintf(text, sizeof text,
             "comm: self\nrun: {name: %s, dir: %s/%s, seed: 3}\n"
             "model: {kind: llama}\n"
             "data: {sft: %s/data/sft.jsonl, prefs: %s/data/prefs.jsonl, labelled: %s/data/labelled.jsonl, "
             "max_length: 40}\n"
             "algo: {kind: sft}\n"
             "train: {steps: %d, log_every: 1000}\n"
             "optim: {lr: 3e-3, warmup_steps: 2, schedule: constant, eps: 1e-2, muon_lr: 2e-3, beta1: %s, "
             "muon_momentum: %s}\n"
             "checkpoint: {url: '%s%s%s%s', every: 1, keep_last: 0, view: never, chunk_bytes: 1MiB, on_error: stop}\n",
             r->name, r->root, r->name, r->root, r->root, r->root, JOB_STEPS, r->gradients ? "0" : "0.9",
             r->gradients ? "0" : "0.95", r->url ? r->url : r->root, r->url ? "" : "/", r->url ? "" : r->name,
             r->url ? "" : "/ckpt");
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < both[b]->count; i++)
            words[n++] = (char *)(size_t)both[b]->word[i];
    if (words_number(&r->job->what, "train.eval_every", 0)) {
        snprintf(tasks, sizeof tasks, "data.tasks=%s/data/tasks.jsonl", r->root);
        words[n++] = tasks;
    }
    if (r->routes) {
        snprintf(routes, sizeof routes, "train.routes=%s:%s/routes", r->routes, r->root);
        words[n++] = routes;
    }
    return config_parse(text, strlen(text), "job", n, words, out);
}

static status *run_opened(struct trainer *t, struct layout_run *r)
{
    dealt = t->resumed_from == UINT64_MAX ? 0 : t->resumed_from;
    if (t->world->rank == 0)
        r->resumed_from = t->resumed_from;
    if (t->resumed_from != UINT64_MAX)
        TRY(watch(t, r, &r->loaded));
    return trainer_run(t);
}

static status *run_rank(struct comm *world, void *arg)
{
    struct layout_run *r = arg;
    struct log log = { LOG_ERROR, world->rank };
    struct config *cfg = NULL;
    struct trainer *t = NULL;
    running = r;
    status *st = config_of(r, &cfg);
    if (!st)
        st = trainer_open(cfg, world, &log, &t);
    if (!st)
        st = run_opened(t, r);
    r->codes[world->rank] = status_code(st);
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

static status *check_snapshots(const struct layout_run *r)
{
    for (uint64_t s = r->resumed_from == UINT64_MAX ? 1 : r->resumed_from + 1; s <= JOB_STEPS; s++)
        if (r->after[s].count || (!r->stop && watch_step(s)))
            TRY(snapshot_check(&r->after[s]));
    return r->loaded.count ? snapshot_check(&r->loaded) : NULL;
}

status *layout_run(struct layout_run *r)
{
    r->resumed_from = UINT64_MAX;
    pthread_mutex_init(&r->lock, NULL);
    status *st = comm_threads_run(r->job->ranks, run_rank, r);
    pthread_mutex_destroy(&r->lock);
    if (r->stop && status_code(st) == ST_CANCELLED) {
        status_free(st);
        st = NULL;
    }
    return st ? st : check_snapshots(r);
}

void layout_run_free(struct layout_run *r)
{
    for (int i = 0; i <= JOB_STEPS; i++)
        snapshot_free(&r->after[i]);
    snapshot_free(&r->loaded);
}

/* ---- losses ---- */

static const char *const keys[] = { "loss", "grad_norm", "entropy",    "rewards/chosen", "rewards/margins",
                                    "kl",   "tokens",    "task/solved" };
enum { KEYS = sizeof keys / sizeof *keys };

/* Of the last events of each step in metrics.jsonl; NAN: a key that none has. */
static status *read_metrics(const char *root, const char *name, double value[JOB_STEPS + 1][KEYS])
{
    char path[ROOT_BYTES + 64], line[4096];
    snprintf(path, sizeof path, "%s/%s/metrics.jsonl", root, name);
    FILE *f = fopen(path, "r");
    EXPECT(f);
    for (int s = 0; s <= JOB_STEPS; s++)
        for (int k = 0; k < KEYS; k++)
            value[s][k] = (double)NAN;
    while (fgets(line, sizeof line, f)) {
        unsigned step;
        char event[8];
        if (sscanf(line, "{\"event\": \"%7[a-z]\", \"step\": %u,", event, &step) != 2 || step > JOB_STEPS)
            continue;
        bool tasks = !strcmp(event, "eval");
        if (!tasks && strcmp(event, "step") != 0)
            continue;
        for (int k = tasks ? KEYS - 1 : 0; k < (tasks ? KEYS : KEYS - 1); k++) {
            char quoted[64];
            snprintf(quoted, sizeof quoted, "\"%s\": ", keys[k]);
            const char *at = strstr(line, quoted);
            value[step][k] = at && at[strlen(quoted)] != 'n' ? strtod(at + strlen(quoted), NULL) : (double)NAN;
        }
    }
    fclose(f);
    return NULL;
}

/* Rewards and such are differences of sums of many log-probabilities: what they are off by counts against 1. */
static bool number_near(int key, double got, double want, double bound)
{
    if (isnan(got) || isnan(want))
        return isnan(got) && isnan(want) && key != 0;
    double size = key < 2 ? fabs(want) : fmax(fabs(want), 1);
    return bound == 0 ? got == want : fabs(got - want) <= bound * size;
}

status *losses_near(const char *root, const char *got, const char *want, uint64_t after, double bound)
{
    double g[JOB_STEPS + 1][KEYS], w[JOB_STEPS + 1][KEYS];
    TRY(read_metrics(root, got, g));
    TRY(read_metrics(root, want, w));
    for (uint64_t s = after + 1; s <= JOB_STEPS; s++)
        for (int k = 0; k < KEYS; k++)
            if (!number_near(k, g[s][k], w[s][k], bound))
                return ERR(INTERNAL, "step %" PRIu64 ": %s is %.17g, not %.17g", s, keys[k], g[s][k], w[s][k]);
    return NULL;
}
