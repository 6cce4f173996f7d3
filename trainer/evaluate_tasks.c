/* evaluate_tasks: held-out task accuracy: how many prompts of data.tasks the model completes, each time with its most
 * likely token, to exactly the answer. Ranks take equal runs of the tasks, but for one; batches of them change no bit.
 * All make as many batches: those that share experts make their passes together. */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/data/tasks.h"
#include "trainer/data/tokenizer.h"
#include "trainer/rollout/generate.h"

#include <inttypes.h>

enum { TASK_BATCH = 64 };

struct task_eval {
    struct tasks *tasks;
    struct generator *generator;
    struct prompt prompt[TASK_BATCH];
    struct completion completion[TASK_BATCH];
    uint64_t evaluated_step; /* UINT64_MAX: none */
};

/* Runs of tasks that ranks take, and the most that one of them has. */
static uint64_t parts_of(const struct trainer *t)
{
    return (uint64_t)t->dp->size * (t->cp ? (uint64_t)t->cp->size : 1);
}

static uint64_t tasks_most(const struct trainer *t, const struct task_eval *e)
{
    return (e->tasks->rows + parts_of(t) - 1) / parts_of(t);
}

status *task_eval_open(struct trainer *t)
{
    const struct data_config *c = &t->cfg->data;
    if (!*c->tasks)
        return NULL;
    struct task_eval *e = t->task_eval = mem_calloc(1, sizeof *e);
    if (!e)
        return ERR(NO_MEMORY, "%s: an evaluation", c->tasks);
    e->evaluated_step = UINT64_MAX;
    TRY(tasks_open(c->tasks, (uint32_t)c->max_length, &e->tasks));
    uint64_t most = tasks_most(t, e);
    /* one token more than the longest answer has would be wrong whatever it is */
    tape_context(t->tape, NULL);
    status *st = generator_open(t->model, t->tape, t->pp, most < TASK_BATCH ? (int32_t)most : TASK_BATCH,
                                (int32_t)e->tasks->longest_prompt, (int32_t)e->tasks->longest_answer, &e->generator);
    tape_context(t->tape, t->cp);
    return status_wrap(st, "%s", c->tasks);
}

void task_eval_close(struct trainer *t)
{
    if (!t->task_eval)
        return;
    generator_close(t->task_eval->generator);
    tasks_close(t->task_eval->tasks);
    mem_free(t->task_eval);
    t->task_eval = NULL;
}

/* Of tasks [begin, end), of which ranks have `most` at most: how many are solved. */
static status *count_solved(struct task_eval *e, uint64_t begin, uint64_t end, uint64_t most, uint64_t *solved)
{
    const struct generate_options greedy = { .eos = TOKEN_EOS };
    const struct tasks *k = e->tasks;
    for (uint64_t first = begin; first < begin + most; first += TASK_BATCH) {
        int32_t n = first >= end ? 0 : (int32_t)(end - first < TASK_BATCH ? end - first : TASK_BATCH);
        for (int32_t i = 0; i < n; i++) {
            const struct task *task = &k->task[first + (uint64_t)i];
            e->prompt[i] = (struct prompt){ .token = k->token + task->begin, .count = (int32_t)task->prompt };
        }
        TRY(generate(e->generator, &greedy, e->prompt, n, e->completion));
        for (int32_t i = 0; i < n; i++)
            *solved += tasks_solved(k, first + (uint64_t)i, e->completion[i].token, e->completion[i].count);
    }
    return NULL;
}

status *evaluate_tasks(struct trainer *t)
{
    struct task_eval *e = t->task_eval;
    if (!e || e->evaluated_step == t->step)
        return NULL;
    uint64_t begin, end, solved = 0, rows = e->tasks->rows;
    uint64_t c = t->cp ? (uint64_t)t->cp->size : 1, own = t->cp ? (uint64_t)t->cp->rank : 0;
    layout_cut(rows, parts_of(t), (uint64_t)t->dp->rank * c + own, &begin, &end);
    struct shards *shards[SHARDS_MOST];
    int n = trainer_all_shards(t, t->model, shards);
    for (int i = 0; i < n; i++)
        TRY(shards_hold(shards[i], false)); /* how many passes a rank makes, its completions decide */
    tape_blocks(t->tape, NULL);
    tape_context(t->tape, NULL); /* each rank generates for prompts of its own */
    status *st = count_solved(e, begin, end, tasks_most(t, e), &solved);
    tape_context(t->tape, t->cp);
    for (int i = 0; i < n; i++)
        shards_release(shards[i], false);
    if (st && (t->tp || t->pp || t->ep)) /* others wait for it in the same pass */
        trainer_abort(t, st);
    st = comm_agree(t->dp, st);
    TRY(t->cp ? comm_agree(t->cp, st) : st);
    TRY(comm_allreduce(t->dp, &solved, 1, COMM_U64, COMM_SUM, NULL));
    if (t->cp)
        TRY(comm_allreduce(t->cp, &solved, 1, COMM_U64, COMM_SUM, NULL));
    e->evaluated_step = t->step;
    double accuracy = (double)solved / (double)rows;
    trainer_watch(t, "eval/task/accuracy", accuracy);
    metrics_begin(t->metrics, "eval", t->step);
    metrics_integer(t->metrics, "tasks", rows);
    metrics_integer(t->metrics, "task/solved", solved);
    metrics_number(t->metrics, "task/accuracy", accuracy);
    metrics_end(t->metrics);
    metrics_say(t->metrics, "step %" PRIu64 ": held-out task accuracy %.4f (%" PRIu64 " of %" PRIu64 " answers exact)",
                t->step, accuracy, solved, rows);
    return NULL;
}
