/* status: one error value. NULL is success; anything else is an immutable object with exactly one owner.
 *
 * Whoever detects an error describes it with the facts (object, call, errno); everyone else passes it on, or wraps one
 * fact around it; one place prints it, once. Never log and return both. Outputs are set only on success.
 *
 *     status *st = store_get(s, key, 0, buf, n);
 *     if (st) return status_wrap(st, "step %llu", step);
 */
#ifndef TESSERA_COMM_BASE_STATUS_H
#define TESSERA_COMM_BASE_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/* What the caller can do about it. The numbers are part of the public API (ckpt/tessera.h) and never change. */
enum status_code {
    ST_OK = 0,
    ST_INVALID = 1,      /* the input is wrong: fix it */
    ST_NOT_FOUND = 2,    /* what was named is not there */
    ST_EXISTS = 3,       /* what was to be made is there already */
    ST_NO_MEMORY = 4,    /* host or device memory ran out */
    ST_IO = 5,           /* a read or write failed for good */
    ST_NO_SPACE = 6,     /* storage is full or over quota */
    ST_CORRUPT = 7,      /* stored bytes are not what was written */
    ST_UNAVAILABLE = 8,  /* try again later */
    ST_TIMEOUT = 9,      /* a deadline passed */
    ST_CANCELLED = 10,   /* someone asked for it to stop */
    ST_PEER = 11,        /* another rank failed */
    ST_DEVICE = 12,      /* an accelerator failed or is missing */
    ST_UNSUPPORTED = 13, /* this build or backend cannot do it */
    ST_INTERNAL = 14,    /* a bug of ours */
    ST_CODE_COUNT
};

typedef struct tessera_status status;

#define WARN_UNUSED  __attribute__((warn_unused_result))
#define PRINTF(f, a) __attribute__((format(printf, f, a)))

/* Describe an error at the place where it is detected: `return ERR(INVALID, "key %s: ...", key)`. Never returns NULL
 * (when memory is out it returns a static object that status_free ignores). */
#define ERR(code, ...) status_new(__FILE__, __LINE__, ST_##code, __VA_ARGS__)
status *status_new(const char *file, int line, enum status_code code, const char *fmt, ...) PRINTF(4, 5) WARN_UNUSED;

/* The same for a failed system call: the code is chosen from `errnum` (ENOSPC, EDQUOT -> NO_SPACE, ENOENT -> NOT_FOUND,
 * EEXIST -> EXISTS, ENOMEM -> NO_MEMORY, EAGAIN, EINTR -> UNAVAILABLE, else IO) and ": strerror" is appended. */
#define ERR_SYS(errnum, ...) status_new_sys(__FILE__, __LINE__, errnum, __VA_ARGS__)
status *status_new_sys(const char *file, int line, int errnum, const char *fmt, ...) PRINTF(4, 5) WARN_UNUSED;

/* Take st, return it with "fmt: " put before its message. NULL stays NULL. */
status *status_wrap(status *st, const char *fmt, ...) PRINTF(2, 3) WARN_UNUSED;

/* Take both, return the first that is not NULL and free the other: clean-up that keeps the first error. */
status *status_first(status *a, status *b) WARN_UNUSED;

/* Take st, return it marked as rank's (-1: no rank), if no rank was set before. */
status *status_at_rank(status *st, int rank) WARN_UNUSED;

/* A copy with its own life. */
status *status_copy(const status *st) WARN_UNUSED;
void status_free(status *st); /* NULL is fine */

enum status_code status_code(const status *st); /* ST_OK for NULL */
const char *status_message(const status *st);   /* "" for NULL; without code and place */
const char *status_file(const status *st);
int status_line(const status *st);
int status_rank(const status *st);                   /* -1: not known */
const char *status_code_name(enum status_code code); /* "INVALID" */

/* The process exit code for an outcome: 0 for NULL, else 64 + code, so that launch/ can restart PEER, DEVICE and
 * UNAVAILABLE but not INVALID. */
int status_exit_code(const status *st);

/* Return early with the error of a status-valued expression. Not to be used between two collectives. */
#define TRY(expr)                                                                                                      \
    do {                                                                                                               \
        status *try_st_ = (expr);                                                                                      \
        if (try_st_)                                                                                                   \
            return try_st_;                                                                                            \
    } while (0)

/* An invariant that stays checked in release builds: prints and aborts. For bugs, never for input. */
#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (__builtin_expect(!(cond), 0))                                                                              \
            check_failed(__FILE__, __LINE__, #cond, " " __VA_ARGS__);                                                  \
    } while (0)
void check_failed(const char *file, int line, const char *cond, const char *fmt, ...) PRINTF(4, 5)
    __attribute__((noreturn));

#ifdef __cplusplus
}
#endif

#endif
