/* when: what asks for a save or for the end of a run besides a step number: signals, clocks, and the length of a
 * period.
 *
 * Signals are blocked in the whole process and stay pending until a step ends and asks for them, so there is no
 * handler, no thread and no global. Nobody acts on what is asked here alone: ranks agree on the maximum first
 * (state_tick). */
#ifndef TESSERA_TRAINER_WHEN_H
#define TESSERA_TRAINER_WHEN_H

#include <stdbool.h>
#include <stdint.h>

/* In order of weight: the maximum over ranks counts. */
enum ask { ASK_NOTHING, ASK_SAVE, ASK_STOP_LIMIT, ASK_STOP_SIGNAL };

/* Block SIGTERM and SIGUSR1 in this thread and in those it starts from now on: to be called before there are others
 * (MPI's), for a signal goes to any thread that does not block it. */
void signals_hold(void);
/* Undo that in this thread: the signals end the process again. */
void signals_release(void);
/* What the signals since the last call ask for; each counts once, however often it came. Waits for nothing. */
enum ask signals_take(void);

enum period_kind { PERIOD_STEPS, PERIOD_SECONDS, PERIOD_AUTO };
struct period {
    enum period_kind kind;
    uint64_t steps; /* 0: none */
    double seconds;
};
/* "100": steps; "600s": seconds, above 0; "auto". false: none of these. */
bool period_parse(const char *text, struct period *out);
/* Seconds of work between two saves that lose the least of the run, where a save costs `cost` seconds of training and
 * the job dies every `mtbf` seconds on average (J. T. Daly, FGCS 22 (2006), 303-312, eq. 37; its first term is
 * Young's). */
double period_daly(double cost, double mtbf);

/* What saves cost a run, measured on one rank. Start from {0}. */
struct save_cost {
    double plain_s;  /* a step with no save in flight: a running mean */
    double excess_s; /* what the steps under the save in flight took beyond that, so far */
    double cost_s;   /* of the last committed save */
    double write_s;  /* from its start to its commit */
    uint64_t plain_steps, saves;
};
void save_cost_step(struct save_cost *c, bool saving, double seconds);
/* A save that began in tessera_save's `call_s` is committed after `write_s`; the fence made steps wait for `fence_s`.
 */
void save_cost_committed(struct save_cost *c, double call_s, double fence_s, double write_s);
/* Seconds between saves under "auto": period_daly of the measured cost, at least as long as a save takes. Until one was
 * measured the cost counts as one second. */
double save_cost_period(const struct save_cost *c, double mtbf);

#endif
