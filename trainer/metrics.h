/* metrics: what people watch. A progress line on stderr (a bar on a terminal, plain lines elsewhere) and metrics.jsonl.
 * Rank 0 only; on other ranks every call does nothing. No allocation after metrics_open.
 *
 * metrics.jsonl has one object a line: {"event": "step", "step": ...} after every step, and events "run", "resume",
 * "phase", "save", "save_failed", "eval", "end". Numbers are printed so that they read back exactly. A resume drops the
 * lines of steps that the checkpoint has not seen. */
#ifndef TESSERA_TRAINER_METRICS_H
#define TESSERA_TRAINER_METRICS_H

#include "comm/base/log.h"

#include <stdbool.h>
#include <stdint.h>

struct metrics;

/* Open DIR/metrics.jsonl for appending, made with its folders if missing. active: this is rank 0. */
status *metrics_open(const char *dir, bool active, struct metrics **out) WARN_UNUSED;
void metrics_close(struct metrics *m); /* NULL is fine */
/* Keep only the lines of steps <= step (0: none), through a temporary file and a rename. Call before the first event.
 */
status *metrics_rewind(struct metrics *m, uint64_t step) WARN_UNUSED;

/* Build one line: begin, fields, end. A line that outgrows its buffer loses its last fields, never its shape. */
void metrics_begin(struct metrics *m, const char *event, uint64_t step);
void metrics_number(struct metrics *m, const char *key, double v); /* NaN and infinities become null */
void metrics_integer(struct metrics *m, const char *key, uint64_t v);
void metrics_text(struct metrics *m, const char *key, const char *v);
/* Write the line. A line that cannot be written (disk full) is a warning, the first time, and training goes on: an
 * error of rank 0 alone must not lead it out of a collective. */
void metrics_end(struct metrics *m);

/* What the progress line shows. */
struct progress_line {
    uint64_t step, steps;
    const char *phase;     /* "sft", "dpo", "reference" */
    double loss, accuracy; /* accuracy < 0: not shown */
    double tokens_per_s, eta_s;
    int save_percent; /* -1: no save in flight */
    uint64_t save_step;
    const char *save_phase;
};
/* On a terminal: redraw the bar. Elsewhere: print a line if `due`. */
void metrics_progress(struct metrics *m, const struct progress_line *p, bool due);
/* A line of its own, above the bar. */
void metrics_say(struct metrics *m, const char *fmt, ...) PRINTF(2, 3);

#endif
