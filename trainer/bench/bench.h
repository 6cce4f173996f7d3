/* bench: `tessera bench save|load|irregular|train|comm`: what checkpoints cost training, how fast training and its sums
 * over ranks are, and how near they come to the hardware.
 *
 * Every ratio is of two figures that the same run took on the same machine, files and bytes. docs/performance.md says
 * how each is measured. Under mpirun; every rank takes part, rank 0 prints.
 *
 *   bench.c    command line, working folder, printing        field.c   the tensors that are saved and loaded
 *   bench_save.c, bench_load.c   the two benches              limits.c  plain writes and reads beside them
 *                                                             curl.c    the same on object storage, by curl(1)
 *   bench_irregular.c   ways to store runs                    slices.c  the tensors of that one
 *   bench_train.c   training steps     ceiling.c  their products and updates alone     peer.c  PyTorch beside them
 *   bench_comm.c   sums of gradients over ranks
 *   measure.c  medians, intervals, CPU seconds        site.c  the CPU or a GPU, products and copies on it */
#ifndef TESSERA_TRAINER_BENCH_BENCH_H
#define TESSERA_TRAINER_BENCH_BENCH_H

#include "comm/base/options.h"
#include "comm/comm.h"

enum { BENCH_PATH_BYTES = 1024 };

/* argv[0] is "save", "load", "irregular", "train", "comm" or "help"; then key=value words, --json, --quick. Collective
 * over world; the error is the same on all ranks. */
status *bench_cli(struct comm *world, int argc, char **argv) WARN_UNUSED;

struct bench {
    struct comm *world;
    char dir[BENCH_PATH_BYTES]; /* of this run alone; removed at the end. Remote: a URL */
    bool remote;                /* on object storage */
    bool json;
};

#define BENCH_NO_URL SIZE_MAX

/* One of them. `run` gets options filled from the table. */
struct bench_verb {
    const char *name, *help;
    struct option_table options;
    size_t options_bytes;
    size_t url_offset;             /* of the char * that names where the folder is made, or BENCH_NO_URL: none is */
    bool remote;                   /* url may be s3:... */
    const char *const (*quick)[2]; /* key, value: what --quick changes in the defaults; ends with NULL */
    status *(*run)(struct bench *b, const void *options);
};
extern const struct bench_verb bench_save, bench_load, bench_irregular, bench_train, bench_comm;

/* Start together, without spinning: ranks that wait leave the cores to those that work. Collective. */
status *bench_meet(struct bench *b) WARN_UNUSED;

/* One result: a key of the JSON object, or a row of the table. */
struct figure {
    const char *key;
    double value;     /* not finite: null */
    const char *text; /* instead of value, or NULL */
    int digits;       /* after the point */
    const char *note; /* what it is, with its unit */
};
/* A JSON object on a line, or a table. Rank 0; elsewhere nothing. */
void bench_print(const struct bench *b, const struct figure *f, size_t count);

#endif
