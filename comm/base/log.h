/* log: levelled lines on stderr, prefixed with the rank. A log is a value in its owner's handle; there is no global
 * one. */
#ifndef TESSERA_COMM_BASE_LOG_H
#define TESSERA_COMM_BASE_LOG_H

#include "comm/base/status.h"

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

struct log {
    enum log_level level; /* lines above it are dropped */
    int rank;             /* -1: no prefix */
};

/* One line, written by one write(2) so that lines of different ranks do not mix. l may be NULL (dropped). */
void log_line(const struct log *l, enum log_level level, const char *fmt, ...) PRINTF(3, 4);

/* Print an error in full: code, message, rank, place. The one place that prints; st stays the caller's. */
void log_status(const struct log *l, enum log_level level, const status *st);

#endif
