/* dataset: JSONL rows, read once, tokenised and kept in memory.
 *
 * Row forms, told apart by their keys, one form a file (rl.md; the field's standard ones):
 *   {"prompt": text, "chosen": text, "rejected": text}     preferences: 2 sequences a row, chosen first
 *   {"chosen": text, "rejected": text}                     implicit prompt: the longest common prefix is split off
 *   {"prompt": text, "completion": text}                   SFT: 1 sequence a row
 *   {"messages": [{"role": text, "content": text}, ...]}   SFT: assistant turns are scored
 *   {"prompt": text, "completion": text, "label": bool}    labelled (KTO): 2 sequences a row, see below
 * Other keys are ignored. A sequence is BOS prompt completion EOS; completion tokens and EOS are scored (loss,
 * log-probability), BOS and the prompt are not. Messages are laid out as "role: content\n" each, EOS after an assistant
 * turn; an assistant's content, newline and EOS are scored. A sequence longer than max_length is cut at the end of its
 * completion (then without EOS); a row whose prompt alone reaches max_length - 1 is dropped and counted, and so is a
 * row whose chosen and rejected are the same tokens after the cut. Byte order mark, CR LF and blank lines are passed
 * over.
 *
 * The second sequence of a labelled row is mismatched: the row's prompt with the completion of the next row that has
 * another prompt, the first row coming after the last. So a row's mismatched sequence never changes, its reference
 * value can be computed once, and no cut of a step into packs or ranks touches it. */
#ifndef TESSERA_TRAINER_DATA_DATASET_H
#define TESSERA_TRAINER_DATA_DATASET_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dataset_kind { DATASET_SFT, DATASET_PREFS, DATASET_LABELLED, DATASET_KINDS };

struct sequence {
    uint64_t begin;  /* first token in dataset.token */
    uint32_t length; /* tokens, BOS and EOS included; at least 2 */
    uint32_t scored; /* how many of them are scored */
};

struct dataset {
    enum dataset_kind kind;
    int sequences; /* a row: 1 (SFT) or 2 (preferences: chosen, rejected; labelled: completion, mismatched) */
    uint64_t rows, dropped;
    struct sequence *seq; /* [rows * sequences] */
    uint64_t *hash;       /* [rows] of token ids and score masks: tells a stale reference value */
    uint8_t *desirable;   /* [rows] labelled rows: 1 desirable, 0 not; NULL in other kinds */
    uint64_t *group;      /* [rows] hash of the tokens before the first scored one: rows of one problem share it */
    int32_t *token;
    uint8_t *score; /* 1: this token is scored */
    uint64_t tokens;
    uint32_t longest; /* tokens of the longest sequence */
};

/* Read a file. Errors: NOT_FOUND with the path; INVALID as "data/x.jsonl:17: ..." for a line that is no JSON object, a
 * missing or wrongly typed key (naming key and legal forms), an empty labelled completion, mixed forms, invalid UTF-8,
 * or a file of another kind; an empty file; a labelled file with one prompt alone. Identical on every rank. */
status *dataset_open(const char *path, enum dataset_kind kind, uint32_t max_length, struct dataset **out) WARN_UNUSED;
void dataset_close(struct dataset *d); /* NULL is fine */

#endif
