/* sources: the verbs behind `tessera data`. Each gets what follows its name on the command line. */
#ifndef TESSERA_TRAINER_DATA_SOURCES_H
#define TESSERA_TRAINER_DATA_SOURCES_H

#include "comm/base/options.h"
#include "comm/base/status.h"

/* key=value words into base, after its defaults. `where` begins the messages. */
status *parse_words(const struct option_table *t, void *base, int argc, char **argv, const char *where) WARN_UNUSED;

extern const struct option_table gsm8k_options, arithmetic_options, sort_options;

/* Make the files in folder `out`, from the GSM8K files in `source` or from nothing; a line a file on stdout. */
status *prepare_gsm8k(const char *source, const char *out, int argc, char **argv) WARN_UNUSED;
status *prepare_arithmetic(const char *out, int argc, char **argv) WARN_UNUSED;
status *prepare_sort(const char *out, int argc, char **argv) WARN_UNUSED;
/* Print rows of a file on stdout. */
status *show_file(const char *path, const char *rows) WARN_UNUSED; /* rows: text of a number, or NULL */

#endif
