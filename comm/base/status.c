#include "comm/base/status.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024 };

struct tessera_status {
    enum status_code code;
    int line;
    int rank;
    bool constant; /* never written, never freed; a flag, since a plugin has a copy of out_of_memory of its own */
    const char *file;
    char message[MESSAGE_BYTES];
};

/* Returned when there is no memory left to describe an error in; never written, never freed. */
static const struct tessera_status out_of_memory = { ST_NO_MEMORY, 0, -1, true, "", "out of memory" };

static const char *const code_names[ST_CODE_COUNT] = {
    "OK",          "INVALID", "NOT_FOUND", "EXISTS", "NO_MEMORY", "IO",          "NO_SPACE", "CORRUPT",
    "UNAVAILABLE", "TIMEOUT", "CANCELLED", "PEER",   "DEVICE",    "UNSUPPORTED", "INTERNAL",
};

static status *new_v(const char *file, int line, enum status_code code, const char *fmt, va_list ap)
{
    status *st = mem_alloc(sizeof *st);
    if (!st)
        return (status *)(void *)(size_t)&out_of_memory;
    *st = (struct tessera_status){ .code = code, .line = line, .rank = -1, .file = file };
    vsnprintf(st->message, sizeof st->message, fmt, ap);
    return st;
}

status *status_new(const char *file, int line, enum status_code code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    status *st = new_v(file, line, code, fmt, ap);
    va_end(ap);
    return st;
}

static enum status_code code_of_errno(int errnum)
{
    switch (errnum) {
    case ENOSPC:
    case EDQUOT:
        return ST_NO_SPACE;
    case ENOENT:
    case ENOTDIR:
        return ST_NOT_FOUND;
    case EEXIST:
        return ST_EXISTS;
    case ENOMEM:
        return ST_NO_MEMORY;
    case EAGAIN:
    case EINTR:
        return ST_UNAVAILABLE;
    default:
        return ST_IO;
    }
}

status *status_new_sys(const char *file, int line, int errnum, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    status *st = new_v(file, line, code_of_errno(errnum), fmt, ap);
    va_end(ap);
    if (!st->constant) {
        size_t n = strlen(st->message);
        char text[128];
        snprintf(st->message + n, sizeof st->message - n, ": %s", strerror_r(errnum, text, sizeof text));
    }
    return st;
}

status *status_wrap(status *st, const char *fmt, ...)
{
    if (!st || st->constant)
        return st;
    char text[2 * MESSAGE_BYTES]; /* apart from st->message, which an argument may point into */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, MESSAGE_BYTES, fmt, ap);
    va_end(ap);
    size_t n = strlen(text);
    snprintf(text + n, sizeof text - n, ": %s", st->message);
    text[MESSAGE_BYTES - 1] = 0;
    memcpy(st->message, text, MESSAGE_BYTES);
    return st;
}

status *status_first(status *a, status *b)
{
    if (!a)
        return b;
    status_free(b);
    return a;
}

status *status_at_rank(status *st, int rank)
{
    if (st && !st->constant && st->rank < 0)
        st->rank = rank;
    return st;
}

status *status_copy(const status *st)
{
    if (!st || st->constant)
        return (status *)(void *)(size_t)st;
    status *c = mem_alloc(sizeof *c);
    if (!c)
        return (status *)(void *)(size_t)&out_of_memory;
    *c = *st;
    return c;
}

void status_free(status *st)
{
    if (st && !st->constant)
        mem_free(st);
}

enum status_code status_code(const status *st)
{
    return st ? st->code : ST_OK;
}

const char *status_message(const status *st)
{
    return st ? st->message : "";
}

const char *status_file(const status *st)
{
    return st ? st->file : "";
}

int status_line(const status *st)
{
    return st ? st->line : 0;
}

int status_rank(const status *st)
{
    return st ? st->rank : -1;
}

const char *status_code_name(enum status_code code)
{
    return (unsigned)code < ST_CODE_COUNT ? code_names[code] : "?";
}

int status_exit_code(const status *st)
{
    return st ? 64 + (int)st->code : 0;
}

void check_failed(const char *file, int line, const char *cond, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(stderr, "tessera: %s:%d: broken invariant: %s %s\n", file, line, cond, text);
    abort();
}
