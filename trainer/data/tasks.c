/* tasks: see tasks.h. */
#include "trainer/data/tasks.h"

#include "comm/base/mem.h"
#include "trainer/data/lines.h"
#include "trainer/data/rows.h"
#include "trainer/data/tokenizer.h"

#include <string.h>

static const char form[] = "{\"prompt\": text, \"answer\": text}";

struct build {
    struct tasks *t;
    struct lines lines;
    uint32_t max_length;
    uint64_t cap_rows, cap_tokens;
};

static status *reserve(struct build *b, uint64_t tokens)
{
    struct tasks *t = b->t;
    if (t->rows == b->cap_rows) {
        uint64_t cap = 2 * b->cap_rows + 64;
        struct task *task = mem_array(t->task, cap, sizeof *task);
        if (!task)
            return ERR(NO_MEMORY, "%s: room for %llu tasks", b->lines.path, (unsigned long long)cap);
        t->task = task;
        b->cap_rows = cap;
    }
    if (t->tokens + tokens > b->cap_tokens) {
        uint64_t cap = 2 * b->cap_tokens + tokens + 4096;
        int32_t *token = mem_array(t->token, cap, sizeof *token);
        if (!token)
            return ERR(NO_MEMORY, "%s: room for %llu tokens", b->lines.path, (unsigned long long)cap);
        t->token = token;
        b->cap_tokens = cap;
    }
    return NULL;
}

static status *add_task(struct build *b, struct text prompt, struct text answer)
{
    struct tasks *t = b->t;
    uint64_t tokens = prompt.n + answer.n + 2;
    if (tokens > b->max_length)
        return ERR(INVALID, "%s:%llu: a task of %llu tokens, data.max_length is %u", b->lines.path,
                   (unsigned long long)b->lines.number, (unsigned long long)tokens, b->max_length);
    TRY(reserve(b, tokens));
    struct task k = { t->tokens, (uint32_t)prompt.n + 1, (uint32_t)answer.n + 1 };
    int32_t *to = t->token + t->tokens;
    *to++ = TOKEN_BOS;
    to += tokenize_bytes(prompt.p, prompt.n, to);
    to += tokenize_bytes(answer.p, answer.n, to);
    *to = TOKEN_EOS;
    t->tokens += tokens;
    t->task[t->rows++] = k;
    t->longest_prompt = k.prompt > t->longest_prompt ? k.prompt : t->longest_prompt;
    t->longest_answer = k.answer > t->longest_answer ? k.answer : t->longest_answer;
    return NULL;
}

static status *add_line(struct build *b)
{
    json_t *row;
    struct text prompt, answer;
    TRY(row_json(&b->lines, &row));
    status *st = row_string(&b->lines, row, "prompt", form, &prompt);
    if (!st)
        st = row_string(&b->lines, row, "answer", form, &answer);
    if (!st)
        st = add_task(b, prompt, answer);
    json_decref(row);
    return st;
}

static status *read_tasks(struct build *b)
{
    bool more;
    for (;;) {
        TRY(lines_next(&b->lines, &more));
        if (!more)
            break;
        TRY(add_line(b));
    }
    return b->t->rows ? NULL : ERR(INVALID, "%s: the file has no tasks", b->lines.path);
}

status *tasks_open(const char *path, uint32_t max_length, struct tasks **out)
{
    struct build b = { .max_length = max_length, .t = mem_calloc(1, sizeof *b.t) };
    if (!b.t)
        return ERR(NO_MEMORY, "%s: tasks", path);
    status *st = lines_open(&b.lines, path);
    if (!st)
        st = read_tasks(&b);
    lines_close(&b.lines);
    if (st) {
        tasks_close(b.t);
        return st;
    }
    *out = b.t;
    return NULL;
}

void tasks_close(struct tasks *t)
{
    if (!t)
        return;
    mem_free(t->task);
    mem_free(t->token);
    mem_free(t);
}

bool tasks_solved(const struct tasks *t, uint64_t i, const int32_t *token, int32_t count)
{
    const struct task *k = &t->task[i];
    return (uint32_t)count == k->answer && !memcmp(token, t->token + k->begin + k->prompt, k->answer * sizeof *token);
}
