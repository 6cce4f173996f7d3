/* tessera: the program. `tessera train|plan|eval CONFIG [key=value ...]`, `tessera ckpt ...`, `tessera data ...`,
 * `tessera bench ...`. Errors are printed here, once. */
#include "ckpt/ckpt.h"
#include "comm/agree.h"
#include "trainer/bench/bench.h"
#include "trainer/config.h"
#include "trainer/data/prepare.h"
#include "trainer/hf/hf_cli.h"
#include "trainer/mesh_plan.h"
#include "trainer/trainer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: tessera train CONFIG [key=value ...]     train, under mpirun or srun; resumes from "
    "the newest valid checkpoint\n"
    "       tessera train --help-config              every key of a config\n"
    "       tessera plan CONFIG [ranks=N ...]        the meshes that N ranks can run it on, and the one parallel: auto "
    "takes; runs nothing\n"
    "       tessera eval CONFIG [eval.step=best ...] score the held-out pairs under saved weights\n"
    "       tessera ckpt VERB URL ...                look at checkpoints, compare and tidy them (tessera ckpt --help)\n"
    "       tessera data prepare|show ...            make and look at training data\n"
    "       tessera bench save|load|train ...        under mpirun: rates, and what saves cost; training steps\n"
    "       tessera --version                        version and build, as checkpoints name it\n";

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

static status *train(struct comm *world, const struct log *log, int argc, char **argv)
{
    return argc ? train_config(world, log, argc, argv) : ERR(INVALID, "train: which CONFIG? (tessera --help)");
}

static status *eval(struct comm *world, const struct log *log, int argc, char **argv)
{
    return argc ? eval_config(world, log, argc, argv) : ERR(INVALID, "eval: which CONFIG? (tessera --help)");
}

static status *bench(struct comm *world, const struct log *log, int argc, char **argv)
{
    (void)log;
    return bench_cli(world, argc, argv);
}

static status *ckpt(struct comm *world, const struct log *log, int argc, char **argv)
{
    (void)log;
    return hf_cli_has(argc, argv) ? hf_cli(argc, argv) : ckpt_cli_ranks(world, argc, argv);
}

/* Run a verb on the ranks of a backend (NULL: this process alone, world is NULL). Its error is the same on all ranks
 * and told by the first. */
static int on(const char *backend, status *(*verb)(struct comm *, const struct log *, int, char **), int argc,
              char **argv)
{
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL;
    status *st = backend ? comm_open(backend, NULL, NULL, &world) : NULL;
    bool alone = st || !backend;
    if (!st)
        st = verb(world, &log, argc, argv);
    if (alone || world->rank == 0)
        log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    comm_close(world);
    return code;
}

/* verify shares its work over the ranks it is started on; all other verbs are for one process. */
static bool verify_on_ranks(int argc, char **argv)
{
    static const char *const size[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS" };
    bool several = false;
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        several = several || (getenv(size[i]) && strcmp(getenv(size[i]), "1") != 0);
    return several && argc && !strcmp(argv[0], "verify");
}

int main(int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "";
    const int words = argc - 2;
    char **word = argv + 2;
    /* Of a GPU, before anybody opens it: with fewer queues than streams one that waits for a peer holds up another. */
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    if (!strcmp(verb, "train") && words && !strcmp(word[0], "--help-config")) {
        config_help(stdout);
        return 0;
    }
    if (!strcmp(verb, "train")) {
        signals_hold(); /* before MPI starts its threads */
        return on(backend_of(words, word), train, words, word);
    }
    if (!strcmp(verb, "eval"))
        return on(backend_of(words, word), eval, words, word);
    if (!strcmp(verb, "bench"))
        return on("mpi", bench, words, word);
    if (!strcmp(verb, "ckpt"))
        return on(verify_on_ranks(words, word) ? "mpi" : NULL, ckpt, words, word);
    struct log log = { LOG_INFO, -1 };
    status *st = NULL;
    if (!strcmp(verb, "plan"))
        st = mesh_plan_cli(words, word);
    else if (!strcmp(verb, "data"))
        st = data_cli(words, word);
    else if (!strcmp(verb, "--help") || !strcmp(verb, "help"))
        fputs(usage, stdout);
    else if (!strcmp(verb, "--version"))
        puts("tessera " TESSERA_VERSION " (build " TESSERA_BUILD_ID ")");
    else if (*verb)
        st = ERR(INVALID, "unknown verb \"%s\" (legal: train, plan, eval, ckpt, data, bench; tessera --help)", verb);
    else
        st = ERR(INVALID, "which verb? (legal: train, plan, eval, ckpt, data, bench; tessera --help)");
    log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    return code;
}
