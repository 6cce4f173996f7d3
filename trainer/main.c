/* tessera: the program. `tessera train|eval CONFIG [key=value ...]`, `tessera ckpt ...`, `tessera data ...`,
 * `tessera bench ...`. Errors are printed here, once. */
#include "ckpt/ckpt.h"
#include "comm/agree.h"
#include "trainer/bench/bench.h"
#include "trainer/config.h"
#include "trainer/data/prepare.h"
#include "trainer/trainer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: tessera train CONFIG [key=value ...]     train, under mpirun or srun; resumes from "
    "the newest valid checkpoint\n"
    "       tessera train --help-config              every key of a config\n"
    "       tessera eval CONFIG [eval.step=best ...] score the held-out pairs under saved weights\n"
    "       tessera ckpt VERB URL ...                look at checkpoints, compare and tidy them (tessera ckpt --help)\n"
    "       tessera data prepare|show ...            make and look at training data\n"
    "       tessera bench save|load ...              under mpirun: rates, and what saves cost\n";

/* comm: self is asked for before MPI could be: look for it among the overrides. */
static const char *backend_of(int argc, char **argv)
{
    for (int i = 0; i < argc; i++)
        if (!strcmp(argv[i], "comm=self"))
            return "self";
    return "mpi";
}

static status *train_config(struct comm *world, const struct log *log, int argc, char **argv)
{
    struct config *cfg = NULL;
    TRY(config_load(world, argv[0], argc - 1, argv + 1, &cfg));
    if (!*cfg->checkpoint.url)
        signals_release(); /* there is nothing to save */
    struct trainer *t = NULL;
    status *st = trainer_open(cfg, world, log, &t);
    if (!st)
        st = trainer_run(t);
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

static status *eval_config(struct comm *world, const struct log *log, int argc, char **argv)
{
    struct config *cfg = NULL;
    TRY(config_load(world, argv[0], argc - 1, argv + 1, &cfg));
    struct trainer *t = NULL;
    status *st = trainer_open_eval(cfg, world, log, &t);
    if (!st)
        st = trainer_eval(t);
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

static int eval(int argc, char **argv)
{
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL;
    status *st = comm_open(backend_of(argc, argv), NULL, NULL, &world);
    if (st) {
        log_status(&log, LOG_ERROR, st);
        return status_exit_code(st);
    }
    st = argc ? eval_config(world, &log, argc, argv) : ERR(INVALID, "eval: which CONFIG?\n%s", usage);
    if (world->rank == 0)
        log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    comm_close(world);
    return code;
}

static int train(int argc, char **argv)
{
    if (argc && !strcmp(argv[0], "--help-config")) {
        config_help(stdout);
        return 0;
    }
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL;
    signals_hold(); /* before MPI starts its threads */
    status *st = comm_open(backend_of(argc, argv), NULL, NULL, &world);
    if (st) {
        log_status(&log, LOG_ERROR, st);
        return status_exit_code(st);
    }
    st = argc ? train_config(world, &log, argc, argv) : ERR(INVALID, "train: which CONFIG? (tessera --help)");
    /* what reaches this point is the same on all ranks */
    if (world->rank == 0)
        log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    comm_close(world);
    return code;
}

/* verify shares its work over the ranks it is started on; all other verbs are for one process. */
static bool on_ranks(int argc, char **argv)
{
    static const char *const size[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS" };
    bool several = false;
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        several = several || (getenv(size[i]) && strcmp(getenv(size[i]), "1") != 0);
    return several && argc && !strcmp(argv[0], "verify");
}

static int ckpt(int argc, char **argv)
{
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL;
    status *st = on_ranks(argc, argv) ? comm_open("mpi", NULL, NULL, &world) : NULL;
    if (!st)
        st = ckpt_cli_ranks(world, argc, argv); /* the same on all ranks */
    if (!world || world->rank == 0)
        log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    comm_close(world);
    return code;
}

static int bench(int argc, char **argv)
{
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL;
    status *st = comm_open("mpi", NULL, NULL, &world);
    if (st) {
        log_status(&log, LOG_ERROR, st);
        return status_exit_code(st);
    }
    st = bench_cli(world, argc, argv); /* the same on all ranks */
    if (world->rank == 0)
        log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    comm_close(world);
    return code;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "";
    if (!strcmp(verb, "train"))
        return train(argc - 2, argv + 2);
    if (!strcmp(verb, "eval"))
        return eval(argc - 2, argv + 2);
    if (!strcmp(verb, "bench"))
        return bench(argc - 2, argv + 2);
    if (!strcmp(verb, "ckpt"))
        return ckpt(argc - 2, argv + 2);
    struct log log = { LOG_INFO, -1 };
    status *st = NULL;
    if (!strcmp(verb, "data"))
        st = data_cli(argc - 2, argv + 2);
    else if (!strcmp(verb, "--help") || !strcmp(verb, "help"))
        fputs(usage, stdout);
    else if (*verb)
        st = ERR(INVALID, "unknown verb \"%s\" (legal: train, ckpt, data, bench; tessera --help)", verb);
    else
        st = ERR(INVALID, "which verb? (legal: train, ckpt, data, bench; tessera --help)");
    log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    return code;
}
