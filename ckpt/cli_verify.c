/* cli_verify: `tessera ckpt verify`, and the progress line of long verbs.
 *
 * What is found goes to standard output, as if one thread had read all; figures and progress to standard error. Under
 * mpirun rank 0 lists the steps and prints. */
#include "ckpt/cli.h"
#include "ckpt/pin.h"
#include "ckpt/verify.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- Progress */

static const uint64_t FIRST_NS = 2000000000u, TTY_NS = 500000000u, LOG_NS = 10000000000u, LONG_NS = 1000000000u;
enum { MOST_THREADS = 8 }; /* unless more are asked for */

void cli_progress_begin(struct cli_progress *p, const char *what)
{
    *p = (struct cli_progress){ .start_ns = clock_ns(), .tty = isatty(STDERR_FILENO) == 1 };
    p->next_ns = p->start_ns + (p->tty ? FIRST_NS : LOG_NS);
    snprintf(p->what, sizeof p->what, "%s", what);
}

void cli_progress_add(void *arg, uint64_t bytes, uint64_t total)
{
    struct cli_progress *p = arg;
    uint64_t now = clock_ns();
    p->done += bytes;
    if (now < p->next_ns)
        return;
    char size[16];
    cli_size(total, size);
    fprintf(stderr, "%s%s: %.0f %% of %s, %.2f GB/s%s", p->tty ? "\r" : "", p->what,
            total ? 100.0 * (double)p->done / (double)total : 100.0, size,
            (double)p->done / (double)(now - p->start_ns), p->tty ? "\033[K" : "\n");
    p->shown = true;
    p->next_ns = now + (p->tty ? TTY_NS : LOG_NS);
}

void cli_progress_end(struct cli_progress *p)
{
    if (p->tty && p->shown)
        fputs("\r\033[K", stderr);
}

/* ---- verify */

static void print_damage(void *arg, const char *line)
{
    (void)arg;
    cli_print(line);
    putchar('\n');
}

/* What rank 0 sees, on all ranks. */
static status *steps_of_all(const struct request *r, struct step_list *out)
{
    struct step_list l = { 0 };
    bool leads = !r->comm || r->comm->rank == 0;
    status *st = leads ? cli_steps(r, &l) : NULL;
    if (r->comm) {
        void *list = l.step;
        size_t bytes = l.count * sizeof *l.step;
        st = comm_agree(r->comm, st);
        if (!st)
            st = comm_bcast_bytes(r->comm, &list, &bytes, 0);
        l = (struct step_list){ .step = list, .count = bytes / sizeof *l.step };
    }
    if (st) {
        step_list_free(&l);
        return st;
    }
    *out = l;
    return NULL;
}

static int threads_of(const struct request *r)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN), ranks = r->comm ? r->comm->size : 1;
    long n = r->threads ? r->threads : cpus / ranks < MOST_THREADS ? cpus / ranks : MOST_THREADS;
    return n < 1 ? 1 : (int)n;
}

static status *verify_steps(const struct request *r, const struct step_list *l, struct verify_result *sum,
                            uint64_t *bad)
{
    bool leads = !r->comm || r->comm->rank == 0;
    for (size_t i = 0; i < l->count; i++) {
        struct verify_result one = { 0 };
        struct cli_progress p;
        char what[64];
        snprintf(what, sizeof what, "verify: step %" PRIu64 " (%zu of %zu)", l->step[i], i + 1, l->count);
        cli_progress_begin(&p, what);
        struct verify_options o = { .threads = threads_of(r),
                                    .comm = r->comm,
                                    .found = print_damage,
                                    .progress = leads ? cli_progress_add : NULL,
                                    .progress_arg = &p };
        struct pin *pin = NULL; /* a step stays while it is looked at, if we may say so */
        if (leads)
            status_free(pin_open(r->store, l->step[i], 0, &pin));
        status *st = verify_step(r->store, l->step[i], &o, &one);
        pin_close(pin);
        cli_progress_end(&p);
        if (st)
            return st;
        sum->files += one.files;
        sum->tensors += one.tensors;
        sum->bytes += one.bytes;
        sum->damages += one.damages;
        *bad += one.damages != 0;
    }
    return NULL;
}

/* Who read how fast, where that is of interest. */
static void print_rate(const struct request *r, uint64_t bytes, uint64_t ns)
{
    char size[16];
    int ranks = r->comm ? r->comm->size : 1;
    if (!r->threads && ranks == 1 && ns < LONG_NS)
        return;
    cli_size(bytes, size);
    fprintf(stderr, "verify: %s in %.2f s, %.2f GB/s, by %d rank%s of %d thread%s\n", size, (double)ns / 1e9,
            (double)bytes / (double)(ns ? ns : 1), ranks, ranks == 1 ? "" : "s", threads_of(r),
            threads_of(r) == 1 ? "" : "s");
}

status *cli_verify(const struct request *r)
{
    struct step_list l;
    struct verify_result sum = { 0 };
    uint64_t bad = 0, start = clock_ns();
    TRY(steps_of_all(r, &l));
    status *st = verify_steps(r, &l, &sum, &bad);
    size_t steps = l.count;
    step_list_free(&l);
    if (st)
        return st;
    if (steps == 0)
        return ERR(NOT_FOUND, "%s: no committed step", r->store->uri);
    if (!r->comm || r->comm->rank == 0) {
        print_rate(r, sum.bytes, clock_ns() - start);
        printf("verified %zu step%s, %" PRIu64 " files, %" PRIu64 " tensors, %" PRIu64 " bytes: ", steps,
               steps == 1 ? "" : "s", sum.files, sum.tensors, sum.bytes);
        if (sum.damages)
            printf("%" PRIu64 " damage%s in %" PRIu64 " step%s\n", sum.damages, sum.damages == 1 ? "" : "s", bad,
                   bad == 1 ? "" : "s");
        else
            puts("no damage");
    }
    return sum.damages ? ERR(CORRUPT, "%s: %" PRIu64 " damage%s in %" PRIu64 " step%s, listed on standard output",
                             r->store->uri, sum.damages, sum.damages == 1 ? "" : "s", bad, bad == 1 ? "" : "s")
                       : NULL;
}
