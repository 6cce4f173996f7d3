/* outfile: the JSONL files that `data prepare` makes, all or none: three, tasks.jsonl where answers can be checked, and
 * three more for each fold.
 *
 * Rows go to temporary files in the folder; outset_commit flushes and syncs all of them before it renames the first, so
 * a full disk leaves what was there before. */
#ifndef TESSERA_TRAINER_DATA_OUTFILE_H
#define TESSERA_TRAINER_DATA_OUTFILE_H

#include "comm/base/status.h"
#include "trainer/data/rows.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum outset_file { OUT_SFT, OUT_TRAIN, OUT_HELDOUT, OUT_TASKS, OUT_FILES };

struct outfile {
    char *path, *temp;
    FILE *file;
    uint64_t rows, bytes;
    uint64_t problems; /* of the preference files: how many were begun */
    int64_t last_problem;
};
/* The three files of fold k: foldK_train.jsonl, foldK_validation.jsonl, foldK_test.jsonl. */
enum fold_part { FOLD_TRAIN, FOLD_VALIDATION, FOLD_TEST, FOLD_PARTS };
enum { MAX_FOLDS = 20, OUT_SLOTS = OUT_FILES + MAX_FOLDS * FOLD_PARTS };

struct outset {
    struct outfile file[OUT_SLOTS]; /* without a path: this set has none of that kind */
};

/* Make `dir` (and what is missing above it) and the temporary files. Errors name the path. */
status *outset_open(struct outset *o, const char *dir) WARN_UNUSED;
/* The fourth file too: tasks.jsonl, prompts with the answers that count as right (trainer/data/tasks.h). */
status *outset_open_tasks(struct outset *o, const char *dir) WARN_UNUSED;
/* And those of `folds` folds, at most MAX_FOLDS. */
status *outset_open_folds(struct outset *o, const char *dir, int folds) WARN_UNUSED;
status *outset_sft(struct outset *o, struct text prompt, struct text completion) WARN_UNUSED;
/* A preference row. All pairs of one problem are to be put one after the other. */
status *outset_pair(struct outset *o, bool heldout, struct text prompt, struct text chosen, struct text rejected,
                    int64_t problem) WARN_UNUSED;
status *outset_fold_pair(struct outset *o, int fold, enum fold_part part, struct text prompt, struct text chosen,
                         struct text rejected, int64_t problem) WARN_UNUSED;
status *outset_task(struct outset *o, struct text prompt, struct text answer) WARN_UNUSED;
status *outset_commit(struct outset *o) WARN_UNUSED;
/* A line a file on stdout: path, rows, problems, bytes. */
void outset_summary(const struct outset *o);
void outset_close(struct outset *o); /* removes what was not committed; also after a failed open */

#endif
