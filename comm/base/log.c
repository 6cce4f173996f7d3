#include "comm/base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char *const level_names[] = { "error", "warning", "info", "debug" };

void log_line(const struct log *l, enum log_level level, const char *fmt, ...)
{
    if (!l || level > l->level)
        return;
    char line[2048];
    int n = l->rank >= 0 ? snprintf(line, sizeof line, "tessera[%d] %s: ", l->rank, level_names[level])
                         : snprintf(line, sizeof line, "tessera: %s: ", level_names[level]);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = strlen(line);
    line[len++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, len);
    (void)written; /* nobody is left to tell */
}

void log_status(const struct log *l, enum log_level level, const status *st)
{
    if (!st)
        return;
    char where[32] = "";
    if (status_rank(st) >= 0)
        snprintf(where, sizeof where, " (rank %d)", status_rank(st));
    log_line(l, level, "%s%s [%s, %s:%d]", status_message(st), where, status_code_name(status_code(st)),
             status_file(st), status_line(st));
}
