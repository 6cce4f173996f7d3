/* lines: a text file read line by line, with a bound on the length of a line.
 *
 * Kind to what editors leave behind: a byte order mark at the start, CR LF ends (JSON takes the CR for a blank) and
 * blank lines are no error; line numbers count every line, as an editor does. */
#ifndef TESSERA_TRAINER_DATA_LINES_H
#define TESSERA_TRAINER_DATA_LINES_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { LINE_BYTES = 16 << 20 }; /* most bytes of a line */

struct lines {
    const char *path; /* borrowed */
    FILE *file;
    char *text;      /* the current line, without its end */
    size_t n, cap;   /* bytes of it, and of the buffer */
    uint64_t number; /* of the current line, from 1 */
};

/* NOT_FOUND, IO with the path. */
status *lines_open(struct lines *l, const char *path) WARN_UNUSED;
/* The next line that is not blank; *more is false at the end of the file. INVALID for a line that is too long. */
status *lines_next(struct lines *l, bool *more) WARN_UNUSED;
void lines_close(struct lines *l); /* also after a failed open */

#endif
