/* cli_run: standard output is a file while a command runs. */
#include "tests/support/cli_run.h"
#include "ckpt/ckpt.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

void cli_open(struct cli *c)
{
    folder_make(c->dir);
    snprintf(c->out, sizeof c->out, "%s/out", c->dir);
}

void cli_close(struct cli *c)
{
    folder_remove(c->dir);
}

void cli_run(struct cli *c, const char *line)
{
    char words[512] = "", *argv[16], *save = NULL;
    int argc = 0;
    for (const char *p = line; *p; p++) {
        size_t n = strlen(words);
        snprintf(words + n, sizeof words - n, *p == '%' ? "%s" : "%.1s", *p == '%' ? c->dir : p);
    }
    for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save))
        argv[argc++] = w;
    argv[argc] = NULL;
    fflush(stdout);
    int keep = dup(1), fd = open(c->out, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(keep >= 0 && fd >= 0);
    dup2(fd, 1);
    status *st = ckpt_cli(argc, argv);
    fflush(stdout);
    dup2(keep, 1);
    close(keep);
    ssize_t n = pread(fd, c->text, sizeof c->text - 1, 0);
    close(fd);
    c->text[n > 0 ? n : 0] = 0;
    c->code = status_code(st);
    snprintf(c->message, sizeof c->message, "%s", status_message(st));
    status_free(st);
}

void cli_expect(struct cli *c, const char *line, enum status_code code, const char *words)
{
    cli_run(c, line);
    if (c->code != code || !strstr(code == ST_OK ? c->text : c->message, words))
        fail_msg("ckpt %s: wanted %s \"%s\", got %s \"%s\", and on stdout: %s", line, status_code_name(code), words,
                 status_code_name(c->code), c->message, c->text);
}
