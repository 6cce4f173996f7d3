/* tasks: prompts whose answer can be checked: JSONL rows {"prompt": text, "answer": text}, other keys ignored.
 *
 * A task is solved by a completion that is the answer, byte for byte, and then ends. */
#ifndef TESSERA_TRAINER_DATA_TASKS_H
#define TESSERA_TRAINER_DATA_TASKS_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stdint.h>

struct task {
    uint64_t begin;  /* first token in tasks.token: BOS, prompt, answer, EOS, as dataset.h lays out a row */
    uint32_t prompt; /* tokens of BOS and the prompt */
    uint32_t answer; /* tokens of the answer and EOS */
};

struct tasks {
    struct task *task; /* [rows] */
    uint64_t rows;
    int32_t *token;
    uint64_t tokens;
    uint32_t longest_prompt, longest_answer;
};

/* Read a file. INVALID as "data/x.jsonl:17: ..." for a line that is no such row or has more than max_length tokens
 * (nothing is cut: a task cut short would be another task); an empty file. */
status *tasks_open(const char *path, uint32_t max_length, struct tasks **out) WARN_UNUSED;
void tasks_close(struct tasks *t); /* NULL is fine */
/* Whether `count` generated tokens are task i's answer and its end. */
bool tasks_solved(const struct tasks *t, uint64_t i, const int32_t *token, int32_t count);

#endif
