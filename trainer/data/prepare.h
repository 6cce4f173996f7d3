/* prepare: `tessera data prepare|show`: real and generated data into the JSONL forms that dataset.h reads. */
#ifndef TESSERA_TRAINER_DATA_PREPARE_H
#define TESSERA_TRAINER_DATA_PREPARE_H

#include "comm/base/status.h"

/* argv[0] is the verb:
 *
 *   prepare gsm8k SOURCE_DIR OUT_DIR [heldout=0.2] [pairs=4] [folds=0] [seed=0] [annotations=strip]
 *       SOURCE_DIR/train.jsonl {"question", "answer"} -> sft.jsonl {"prompt", "completion"}
 *       SOURCE_DIR/example_model_solutions.jsonl -> prefs_train.jsonl, prefs_heldout.jsonl
 *       {"prompt", "chosen", "rejected", "problem"}: chosen = a solution marked correct, rejected = one of the same
 *       problem marked wrong, duplicates dropped, at most `pairs` pairs a problem, a `heldout` share of the problems
 *       (keyed by the seed and the question's hash) in the second file, never in both. folds=K also writes all pairs
 *       K times, cut by problem: foldK_train.jsonl, foldK_validation.jsonl, foldK_test.jsonl.
 *       Prompt "Question: ...\nAnswer:\n". Calculator annotations <<...>> are taken out unless annotations=keep; a last
 *       line "#### 18" becomes "A: 18", the form of the model solutions. Those belong to problems of GSM8K's test
 *       split: no GSM8K score may be reported after training on them.
 *
 *   prepare arithmetic OUT_DIR [rows=4000] [heldout=400] [digits=2] [seed=0]
 *       sums, differences and products with worked solutions: sft.jsonl, prefs_train.jsonl, prefs_heldout.jsonl in the
 *       same forms; the rejected solution goes wrong at one step and carries the mistake on. Problems of the held-out
 *       file are in neither other file.
 *
 *   prepare sort OUT_DIR [rows=20000] [heldout=500] [digits=5] [seed=0]
 *       digits to put in order, "52819=" -> "12589": the same three files (the rejected answer has one digit replaced)
 *       and tasks.jsonl {"prompt", "answer"} of the held-out prompts. Whether a prompt is held out follows from its own
 *       hash alone, so no training file has a prompt of a held-out one, whatever seed and sizes made either.
 *
 *   show FILE [N]
 *       the first N rows with token counts, and a summary (rows, tokens, longest, dropped)
 *
 *   help
 *
 * Files are written under temporary names and renamed together at the end; a line a file goes to stdout. Errors name
 * the file and line, or the word of the command line and what is legal; they leave the files of an earlier call. */
status *data_cli(int argc, char **argv) WARN_UNUSED;

#endif
