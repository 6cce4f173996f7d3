/* cli: what the verbs of `tessera ckpt` share: the request and the ways to print. cli.c has the verbs' table. */
#ifndef TESSERA_CKPT_CLI_H
#define TESSERA_CKPT_CLI_H

#include "ckpt/commit.h"
#include "comm/comm.h"

enum { CLI_ARGUMENTS = 64, CLI_THREADS = 256 };

struct request {
    struct store *store; /* of the URL; NULL for a verb that opens its own */
    const char *url;     /* as it was given */
    bool json, has_step, force, dry_run;
    uint64_t step; /* that the URL or the argument after it names */
    uint64_t age_seconds;
    int threads;                         /* 0: not said */
    struct comm *comm;                   /* several ranks run the verb; NULL: this process alone */
    const char *argument[CLI_ARGUMENTS]; /* after the URL, for verbs that take others than one step */
    int arguments;
};

/* Text that may come from a stranger's checkpoint: control characters become '?'. */
void cli_print(const char *text);
/* 17 -> "17 B", 3 << 20 -> "3.0 MiB" */
void cli_size(uint64_t bytes, char text[16]);
status *cli_step(const char *text, uint64_t *step) WARN_UNUSED;
/* Cut "/step-N" off url; its step then. */
bool cli_cut_step(char *url, uint64_t *step);

/* The committed steps, or just the one that was asked for (NOT_FOUND if it is not there). */
status *cli_steps(const struct request *r, struct step_list *out) WARN_UNUSED;
/* The step that was asked for, else the newest. */
status *cli_one_step(const struct request *r, uint64_t *step) WARN_UNUSED;

/* A line on standard error about work that goes on for long: rewritten in place on a terminal, else now and then. */
struct cli_progress {
    char what[64];
    uint64_t start_ns, next_ns, done;
    bool tty, shown;
};
void cli_progress_begin(struct cli_progress *p, const char *what);
void cli_progress_add(void *p, uint64_t bytes, uint64_t total); /* more bytes, of so many */
void cli_progress_end(struct cli_progress *p);                  /* wipes the line */

/* cli_verify.c */
status *cli_verify(const struct request *r) WARN_UNUSED;
/* cli_view.c */
status *cli_view(const struct request *r) WARN_UNUSED;
/* cli_copy.c */
status *cli_copy(const struct request *r) WARN_UNUSED;
/* cli_tidy.c */
status *cli_mark(const struct request *r) WARN_UNUSED;
status *cli_rm(const struct request *r) WARN_UNUSED;
status *cli_gc(const struct request *r) WARN_UNUSED;
/* cli_diff.c */
status *cli_diff(const struct request *r) WARN_UNUSED;
/* cli_report.c */
status *cli_report(const struct request *r) WARN_UNUSED;
/* cli_plan.c */
status *cli_plan(const struct request *r) WARN_UNUSED;

#endif
