/* s3_provider: the command is run here, its output read in s3_provider_json.c. */
#include "storage/s3_provider.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS = 64, OUT_BYTES = 64 << 10, SAID_BYTES = 400, HIDDEN_BYTES = 8, SLICE_MS = 10, READS = 16 };

/* ---- The command as words */

struct words {
    char *at[WORDS + 1]; /* ends with NULL; they point into `text` */
    size_t count;
    char *text;
};

/* The end of the quoted part at s (after its quote), its characters appended to *to; NULL: no closing quote. */
static const char *quoted(const char *s, char quote, char **to)
{
    for (; *s && *s != quote; s++) {
        if (quote == '"' && *s == '\\' && (s[1] == '"' || s[1] == '\\'))
            s++;
        *(*to)++ = *s;
    }
    return *s ? s + 1 : NULL;
}

/* One word from s on; NULL: a quote or backslash has nothing behind it. */
static const char *word(const char *s, char **to)
{
    while (s && *s && *s != ' ' && *s != '\t') {
        if (*s == '"' || *s == '\'') {
            s = quoted(s + 1, *s, to);
            continue;
        }
        if (*s == '\\' && !*++s)
            return NULL;
        *(*to)++ = *s++;
    }
    return s;
}

static status *split(const char *command, const char *where, struct words *w)
{
    w->text = mem_alloc(strlen(command) + 1);
    if (!w->text)
        return ERR(NO_MEMORY, "%s: the command", where);
    char *to = w->text;
    const char *s = command;
    for (;;) {
        s += strspn(s, " \t");
        if (!*s)
            break;
        if (w->count == WORDS)
            return ERR(INVALID, "%s: credential_process has more than %d words", where, WORDS);
        w->at[w->count++] = to;
        s = word(s, &to);
        if (!s)
            return ERR(INVALID, "%s: credential_process ends in a quote that is not closed, or in a backslash", where);
        *to++ = 0;
    }
    if (!w->count || !*w->at[0])
        return ERR(INVALID, "%s: credential_process names no command", where);
    return NULL;
}

/* ---- The process */

struct child {
    pid_t pid;
    int out, err; /* read ends; -1: at their end */
    bool ended;
    int how;    /* waitpid's status, once ended */
    char *text; /* its stdout */
    size_t used;
    bool too_long;
    char said[SAID_BYTES]; /* the last bytes of its stderr */
    size_t said_used;
};

/* All that can fail before the command runs, but not its start. */
static int set_up(posix_spawn_file_actions_t *files, posix_spawnattr_t *how, int out, int err)
{
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    int bad = posix_spawn_file_actions_addopen(files, 0, "/dev/null", O_RDONLY, 0);
    bad = bad ? bad : posix_spawn_file_actions_adddup2(files, out, 1);
    bad = bad ? bad : posix_spawn_file_actions_adddup2(files, err, 2);
    bad = bad ? bad : posix_spawn_file_actions_addclosefrom_np(files, 3);
    bad = bad ? bad : posix_spawnattr_setsigmask(how, &none); /* our threads block all signals */
    bad = bad ? bad : posix_spawnattr_setsigdefault(how, &all);
    bad = bad ? bad : posix_spawnattr_setpgroup(how, 0);
    return bad ? bad
               : posix_spawnattr_setflags(how, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
}

static int spawn(char *const *words, int out, int err, pid_t *pid)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t how;
    int bad = posix_spawn_file_actions_init(&files);
    if (bad)
        return bad;
    bad = posix_spawnattr_init(&how);
    if (!bad) {
        bad = set_up(&files, &how, out, err);
        bad = bad ? bad : posix_spawnp(pid, words[0], &files, &how, words, environ);
        posix_spawnattr_destroy(&how);
    }
    posix_spawn_file_actions_destroy(&files);
    return bad;
}

/* A pipe above stderr, so that no end of it is one that the child's own take the place of. */
static int high_pipe(int end[2])
{
    if (pipe2(end, O_CLOEXEC) != 0)
        return errno;
    for (int i = 0; i < 2; i++) {
        if (end[i] > 2)
            continue;
        int high = fcntl(end[i], F_DUPFD_CLOEXEC, 3);
        if (high < 0) {
            int bad = errno;
            close(end[0]);
            close(end[1]);
            return bad;
        }
        close(end[i]);
        end[i] = high;
    }
    fcntl(end[0], F_SETFL, O_NONBLOCK);
    return 0;
}

static status *start(const struct words *w, const char *where, struct child *c)
{
    int out[2], err[2];
    int bad = high_pipe(out);
    if (bad)
        return ERR_SYS(bad, "%s: pipe", where);
    bad = high_pipe(err);
    if (bad) {
        close(out[0]);
        close(out[1]);
        return ERR_SYS(bad, "%s: pipe", where);
    }
    c->out = out[0];
    c->err = err[0];
    bad = spawn(w->at, out[1], err[1], &c->pid);
    close(out[1]);
    close(err[1]);
    if (bad) {
        char text[128];
        return ERR(INVALID, "%s: cannot start the command of credential_process: %s", where,
                   strerror_r(bad, text, sizeof text));
    }
    return NULL;
}

static void take_out(struct child *c, const char *bytes, size_t n)
{
    if (n > OUT_BYTES - c->used) {
        c->too_long = true;
        n = OUT_BYTES - c->used;
    }
    memcpy(c->text + c->used, bytes, n);
    c->used += n;
}

static void take_err(struct child *c, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (c->said_used == sizeof c->said)
            memmove(c->said, c->said + 1, --c->said_used);
        c->said[c->said_used++] = bytes[i];
    }
}

/* What is there now on one pipe; a bounded number of reads, since somebody may write for ever. */
static void drain(struct child *c, int *fd, void (*take)(struct child *, const char *, size_t))
{
    char buf[4096];
    for (int i = 0; i < READS && *fd >= 0; i++) {
        ssize_t n = read(*fd, buf, sizeof buf);
        if (n > 0) {
            take(c, buf, (size_t)n);
            continue;
        }
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        close(*fd);
        *fd = -1;
    }
    explicit_bzero(buf, sizeof buf);
}

/* Until the command has ended, printed too much, or time is up. Somebody it has left behind may hold the pipes open, so
 * their end is not waited for. True: it ended. */
static bool follow(struct child *c, uint64_t limit_ns)
{
    uint64_t start_ns = clock_ns();
    while (!c->ended && !c->too_long && clock_ns() - start_ns < limit_ns) {
        struct pollfd p[2] = { { .fd = c->out, .events = POLLIN }, { .fd = c->err, .events = POLLIN } };
        (void)poll(p, 2, SLICE_MS); /* -1 as fd is left out */
        pid_t got = waitpid(c->pid, &c->how, WNOHANG);
        c->ended = got == c->pid || (got < 0 && errno == ECHILD); /* a host program that ignores SIGCHLD: how is 0 */
        drain(c, &c->out, take_out);
        drain(c, &c->err, take_err);
    }
    if (!c->ended) {
        kill(-c->pid, SIGKILL);
        while (waitpid(c->pid, &c->how, 0) < 0 && errno == EINTR)
            ;
    }
    return c->ended;
}

/* ---- What it said */

/* How many bytes of stderr from `from` on are in stdout too; 0 if fewer than HIDDEN_BYTES. */
static size_t shared(const struct child *c, size_t from)
{
    size_t n = 0;
    for (size_t len = HIDDEN_BYTES; from + len <= c->said_used; len++) {
        if (!memmem(c->text, c->used, c->said + from, len))
            break;
        n = len;
    }
    return n;
}

/* Its stderr as one printable line in `line`, without what stdout holds too: a command that tells what it does may say
 * too much. */
static void say(const struct child *c, char *line, size_t size)
{
    static const char hidden[] = "(hidden)";
    size_t n = 0;
    for (size_t i = 0; i < c->said_used && n + sizeof hidden < size;) {
        size_t len = shared(c, i);
        if (len) {
            memcpy(line + n, hidden, sizeof hidden - 1);
            n += sizeof hidden - 1;
            i += len;
        } else {
            line[n++] = isprint((unsigned char)c->said[i]) ? c->said[i] : ' ';
            i++;
        }
    }
    while (n && line[n - 1] == ' ')
        n--;
    line[n] = 0;
}

static status *judge(const struct child *c, bool in_time, const char *where, uint32_t limit_ms, struct s3_keys *out,
                     uint64_t *expires_ns)
{
    char line[SAID_BYTES + 32];
    say(c, line, sizeof line);
    const char *lead = *line ? "; it said: " : "";
    if (c->too_long)
        return ERR(INVALID, "%s: the command of credential_process printed more than %d bytes", where, OUT_BYTES);
    if (!in_time)
        return ERR(TIMEOUT, "%s: the command of credential_process ran longer than %u ms and was killed%s%s", where,
                   limit_ms, lead, line);
    if (WIFSIGNALED(c->how))
        return ERR(UNAVAILABLE, "%s: the command of credential_process died of signal %d%s%s", where, WTERMSIG(c->how),
                   lead, line);
    if (WEXITSTATUS(c->how) != 0)
        return ERR(UNAVAILABLE, "%s: the command of credential_process ended with status %d%s%s", where,
                   WEXITSTATUS(c->how), lead, line);
    return s3_provider_parse(c->text, c->used, where, out, expires_ns);
}

status *s3_provider_run(const char *command, const char *where, uint32_t limit_ms, struct s3_keys *out,
                        uint64_t *expires_ns)
{
    struct words w = { 0 };
    struct child c = { .out = -1, .err = -1, .text = mem_alloc(OUT_BYTES) };
    status *st = c.text ? split(command, where, &w) : ERR(NO_MEMORY, "%s: %d bytes", where, OUT_BYTES);
    if (!st)
        st = start(&w, where, &c);
    if (!st)
        st = judge(&c, follow(&c, (uint64_t)limit_ms * 1000000u), where, limit_ms, out, expires_ns);
    if (c.out >= 0)
        close(c.out);
    if (c.err >= 0)
        close(c.err);
    if (c.text)
        explicit_bzero(c.text, OUT_BYTES);
    explicit_bzero(c.said, sizeof c.said);
    if (w.text)
        explicit_bzero(w.text, strlen(command) + 1);
    mem_free(c.text);
    mem_free(w.text);
    return st;
}
