/* peer: see peer.h. Two pipes carry lines of text; the child ends when the first one is closed. */
#include "trainer/bench/peer.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
extern const char torch_train_py[]; /* generated from trainer/bench/torch_train.py */

enum { LINE_BYTES = 200 };

struct peer {
    pid_t pid; /* 0: none */
    FILE *to, *from;
    char line[LINE_BYTES]; /* the first one: "ready NAME" or "none WHY" */
};

/* Both ends are closed in programs that are started later; dup2 opens the child's two again. */
static status *open_pipes(int in[2], int out[2])
{
    if (pipe2(in, O_CLOEXEC))
        return ERR_SYS(errno, "a pipe");
    if (!pipe2(out, O_CLOEXEC))
        return NULL;
    int why = errno;
    close(in[0]);
    close(in[1]);
    return ERR_SYS(why, "a pipe");
}

static status *start(struct peer *p, const char *python, const char *sizes)
{
    char *argv[] = { (char *)python, "-c", (char *)torch_train_py, (char *)sizes, NULL };
    int in[2], out[2];
    posix_spawn_file_actions_t files;
    TRY(open_pipes(in, out));
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_adddup2(&files, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files, out[1], STDOUT_FILENO);
    int rc = posix_spawnp(&p->pid, python, &files, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    close(in[0]);
    close(out[1]);
    p->to = fdopen(in[1], "w");
    p->from = fdopen(out[0], "r");
    if (rc)
        p->pid = 0;
    return rc ? ERR_SYS(rc, "start %s", python) : p->to && p->from ? NULL : ERR(NO_MEMORY, "pipes");
}

static status *read_line(struct peer *p, char line[LINE_BYTES])
{
    if (!fgets(line, LINE_BYTES, p->from))
        return ERR(IO, "the peer ended without a word (see above)");
    line[strcspn(line, "\n")] = 0;
    return NULL;
}

status *peer_open(const char *python, const char *sizes, struct peer **out)
{
    bool found = !*python;
    struct peer *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a peer");
    status *st = start(p, found ? "python3" : python, sizes);
    if (!st)
        st = read_line(p, p->line);
    if (!st && strncmp(p->line, "ready ", 6) != 0)
        st = ERR(INVALID, "peer=%s: no PyTorch: %s", python, p->line);
    if (st) {
        peer_close(p);
        p = NULL;
    }
    if (st && found) {
        status_free(st);
        st = NULL;
    }
    if (!st)
        *out = p;
    return st;
}

const char *peer_name(const struct peer *p)
{
    return p->line + 6;
}

status *peer_run(struct peer *p, int steps, double *seconds)
{
    char line[LINE_BYTES];
    if (fprintf(p->to, "%d\n", steps) < 0 || fflush(p->to))
        return ERR_SYS(errno, "the peer takes no more words");
    TRY(read_line(p, line));
    *seconds = strtod(line, NULL);
    return *seconds > 0 ? NULL : ERR(IO, "the peer said \"%s\"", line);
}

void peer_close(struct peer *p)
{
    if (!p)
        return;
    if (p->to)
        fclose(p->to); /* its standard input ends, and so does it */
    if (p->from)
        fclose(p->from);
    while (p->pid && waitpid(p->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    mem_free(p);
}
