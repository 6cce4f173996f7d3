#include "trainer/metrics.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LINE_BYTES = 4096, PATH_BYTES = 1024 };

struct metrics {
    int fd;
    bool terminal, bar_shown, failed;
    char path[PATH_BYTES];
    char line[LINE_BYTES];
    size_t used;
};

static status *make_folders(const char *dir)
{
    char path[PATH_BYTES];
    size_t n = (size_t)snprintf(path, sizeof path, "%s", dir);
    if (n >= sizeof path - 32)
        return ERR(INVALID, "run.dir is longer than %d bytes", PATH_BYTES - 32);
    for (size_t i = 1; i <= n; i++) {
        if (path[i] != '/' && path[i])
            continue;
        char kept = path[i];
        path[i] = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return ERR_SYS(errno, "run.dir: make folder %s", path);
        path[i] = kept;
    }
    return NULL;
}

status *metrics_open(const char *dir, bool active, struct metrics **out)
{
    *out = NULL;
    if (!active)
        return NULL;
    TRY(make_folders(dir));
    struct metrics *m = mem_calloc(1, sizeof *m);
    if (!m)
        return ERR(NO_MEMORY, "metrics");
    snprintf(m->path, sizeof m->path, "%s/metrics.jsonl", dir);
    m->fd = open(m->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (m->fd < 0) {
        status *st = ERR_SYS(errno, "open %s", m->path);
        mem_free(m);
        return st;
    }
    m->terminal = isatty(STDERR_FILENO);
    *out = m;
    return NULL;
}

void metrics_close(struct metrics *m)
{
    if (!m)
        return;
    if (m->bar_shown)
        fprintf(stderr, "\n");
    close(m->fd);
    mem_free(m);
}

/* The value of "step" in a line of ours, or 0: lines of no step are older than any. */
static uint64_t step_of(const char *line)
{
    const char *p = strstr(line, "\"step\": ");
    uint64_t step = 0;
    return p && sscanf(p + 8, "%" SCNu64, &step) == 1 ? step : 0;
}

static status *copy_kept(const struct metrics *m, FILE *from, FILE *to, uint64_t step)
{
    char line[2 * LINE_BYTES];
    while (fgets(line, sizeof line, from))
        if (strchr(line, '\n') && step_of(line) <= step && fputs(line, to) < 0)
            return ERR_SYS(errno, "rewrite %s", m->path);
    return fflush(to) == 0 && fsync(fileno(to)) == 0 ? NULL : ERR_SYS(errno, "rewrite %s", m->path);
}

status *metrics_rewind(struct metrics *m, uint64_t step)
{
    if (!m)
        return NULL;
    char tmp[PATH_BYTES + 8];
    snprintf(tmp, sizeof tmp, "%s.tmp", m->path);
    FILE *to = fopen(tmp, "we"), *from = step ? fopen(m->path, "re") : NULL;
    status *st = to ? NULL : ERR_SYS(errno, "open %s", tmp);
    if (!st && from)
        st = copy_kept(m, from, to, step);
    if (from)
        fclose(from);
    if (to && fclose(to) != 0 && !st)
        st = ERR_SYS(errno, "close %s", tmp);
    if (!st && rename(tmp, m->path) != 0)
        st = ERR_SYS(errno, "rename %s", tmp);
    if (st) {
        unlink(tmp);
        return st;
    }
    int fd = open(m->path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0)
        return ERR_SYS(errno, "open %s", m->path);
    close(m->fd);
    m->fd = fd;
    return NULL;
}

/* Append to the line if it fits with room for the closing brace. */
static void add(struct metrics *m, const char *fmt, ...) PRINTF(2, 3);
static void add(struct metrics *m, const char *fmt, ...)
{
    size_t room = sizeof m->line - m->used - 3;
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(m->line + m->used, room, fmt, ap);
    va_end(ap);
    if (n > 0 && (size_t)n < room)
        m->used += (size_t)n;
    else
        m->line[m->used] = 0;
}

void metrics_begin(struct metrics *m, const char *event, uint64_t step)
{
    if (!m)
        return;
    m->used = 0;
    add(m, "{\"event\": \"%s\", \"step\": %" PRIu64, event, step);
}

void metrics_number(struct metrics *m, const char *key, double v)
{
    if (!m)
        return;
    if (isfinite(v))
        add(m, ", \"%s\": %.17g", key, v);
    else
        add(m, ", \"%s\": null", key);
}

void metrics_integer(struct metrics *m, const char *key, uint64_t v)
{
    if (m)
        add(m, ", \"%s\": %" PRIu64, key, v);
}

void metrics_text(struct metrics *m, const char *key, const char *v)
{
    if (!m)
        return;
    char escaped[1024];
    size_t n = 0;
    for (; *v && n < sizeof escaped - 7; v++) {
        unsigned char c = (unsigned char)*v;
        if (c == '"' || c == '\\')
            n += (size_t)snprintf(escaped + n, 3, "\\%c", c);
        else if (c < 0x20)
            n += (size_t)snprintf(escaped + n, 7, "\\u%04x", c);
        else
            escaped[n++] = (char)c;
    }
    escaped[n] = 0;
    add(m, ", \"%s\": \"%s\"", key, escaped);
}

void metrics_end(struct metrics *m)
{
    if (!m)
        return;
    memcpy(m->line + m->used, "}\n", 3);
    size_t n = m->used + 2;
    for (size_t done = 0; done < n;) {
        ssize_t w = write(m->fd, m->line + done, n - done);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0) {
            if (!m->failed)
                metrics_say(m, "warning: %s cannot be written: %s", m->path, strerror(errno));
            m->failed = true;
            return;
        }
        done += (size_t)w;
    }
}

static int time_text(double seconds, char *text, size_t bytes)
{
    uint64_t s = seconds > 0 && seconds < 1e8 ? (uint64_t)seconds : 0;
    return s >= 3600 ? snprintf(text, bytes, "%" PRIu64 "h%02" PRIu64 "m", s / 3600, s / 60 % 60)
                     : snprintf(text, bytes, "%" PRIu64 "m%02" PRIu64 "s", s / 60, s % 60);
}

void metrics_progress(struct metrics *m, const struct progress_line *p, bool due)
{
    if (!m || (!m->terminal && !due))
        return;
    char bar[24] = "", accuracy[32] = "", save[64] = "", eta[32];
    if (m->terminal) {
        size_t full = p->steps ? (size_t)(p->step * 20 / p->steps) : 0;
        for (size_t i = 0; i < 20; i++)
            bar[i] = i < full ? '=' : ' ';
        bar[20] = 0;
    }
    if (p->accuracy >= 0)
        snprintf(accuracy, sizeof accuracy, "  acc %.3f", p->accuracy);
    if (p->save_percent >= 0)
        snprintf(save, sizeof save, "  save %" PRIu64 ": %s %d%%", p->save_step, p->save_phase, p->save_percent);
    time_text(p->eta_s, eta, sizeof eta);
    fprintf(stderr, "%s%s%s%s %" PRIu64 "/%" PRIu64 "  loss %.5f%s  %.0f tok/s  eta %s%s%s",
            m->terminal ? "\r\033[K[" : "", bar, m->terminal ? "] " : "", p->phase, p->step, p->steps, p->loss,
            accuracy, p->tokens_per_s, eta, save, m->terminal ? "" : "\n");
    m->bar_shown = m->terminal;
}

void metrics_say(struct metrics *m, const char *fmt, ...)
{
    if (!m)
        return;
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(stderr, "%s%s\n", m->bar_shown ? "\r\033[K" : "", text);
    m->bar_shown = false;
}
