/* layouts: training jobs at drawn layouts, their ranks threads of this process: what one is, how it is drawn, how it is
 * run and watched, and how two of them are compared. Tests that use it are linked with layouts.c, layout_draw.c,
 * layout_grid.c and -Wl,--wrap of state_save and stream_deal.
 *
 * A job is a line of settings, "ranks=4 model.layers=3 ... parallel.tp=2 ...": what is computed (`what`), and the
 * layout (`how`: sections parallel and memory, and threads). The same line runs the same job again. */
#ifndef TESSERA_TESTS_TRAINER_LAYOUTS_H
#define TESSERA_TESTS_TRAINER_LAYOUTS_H

#include "tests/ckpt/draw.h"
#include "tests/support/comm_threads.h"
#include "trainer/trainer.h"

#include <pthread.h>

enum { JOB_STEPS = 10, JOB_WORDS = 64, WORD_BYTES = 96, LINE_BYTES = 4096, RANKS_MAX = 8, ROOT_BYTES = 64 };

struct words {
    char word[JOB_WORDS][WORD_BYTES];
    int count;
};
void words_add(struct words *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The value of a key, or `otherwise`. */
const char *words_get(const struct words *w, const char *key, const char *otherwise);
long words_number(const struct words *w, const char *key, long otherwise);

struct layout_job {
    int ranks;
    struct words what, how;
};
void job_line(const struct layout_job *j, char line[LINE_BYTES]);
/* False: that is no such line. */
bool job_parse(const char *line, struct layout_job *out);

/* ---- drawing ---- */

/* What is computed, and a layout of it that the trainer promises to run. The draw says all. */
void draw_job(struct draw *d, struct layout_job *out);
/* Another layout of the same. */
void draw_other_layout(struct draw *d, struct layout_job *j);
/* Make of a legal job one that must be refused as INVALID; returns words that the message must have. */
const char *draw_mistake(struct draw *d, struct layout_job *j);
/* One rank, plainly: the same is computed. */
struct layout_job job_on_one_rank(const struct layout_job *j);
bool job_has_experts(const struct layout_job *j);

/* ---- every mesh ---- */

/* All of {pp, dp, ep, cp, tp of 1 to 8 ranks} x {ZeRO 0, 1, 3} x {recompute none, block, attention} x {dense, experts}
 * x {SFT, DPO} that the trainer promises to run, counted from 0: the number-th. False: there are not so many. */
bool grid_job(uint32_t number, struct layout_job *out);
uint32_t grid_jobs(void);

/* ---- what all ranks of a job hold, put together ---- */

struct tensor_copy {
    char part[32], name[PARAM_NAME_BYTES + 16];
    enum dtype dtype;
    bool trainable;
    struct shape shape;
    uint64_t elems;
    unsigned char *data; /* [elems] */
    bool *seen;          /* [elems]: a rank has given it */
};
struct snapshot {
    struct tensor_copy *tensor;
    int count;
};
void snapshot_free(struct snapshot *s);
/* INTERNAL names a tensor that not all elements were given of. */
status *snapshot_check(const struct snapshot *s) WARN_UNUSED;
/* Both hold the same tensors, bit for bit. */
status *snapshot_same(const struct snapshot *got, const struct snapshot *want) WARN_UNUSED;
/* Both hold the same tensors; gradients, as AdamW's exp_avg (beta1 0) and Muon's momentum (0) have them, within
 * ||g - g'|| <= bound ||g||; frozen parameters bit for bit. *worst: the largest ||g - g'|| / ||g|| so far. */
status *snapshot_near(const struct snapshot *got, const struct snapshot *want, double bound, double *worst) WARN_UNUSED;

/* ---- running ---- */

struct layout_run {
    const struct layout_job *job;
    const char *root, *name; /* data are in ROOT/data, the run's folder is ROOT/NAME */
    const char *url;         /* of checkpoints; NULL: ROOT/NAME/ckpt */
    const char *routes;      /* "record" or "replay": of ROOT/routes, train.routes; NULL: neither */
    bool gradients;          /* moments keep the gradient of the last step alone */
    uint64_t save_at;        /* step that is really saved; 0: none */
    bool stop;               /* a step after save_at the job is given up */
    uint64_t watch_at;       /* a step that is watched besides; 0: none */

    /* found */
    uint64_t resumed_from;                /* UINT64_MAX: from the start */
    struct snapshot after[JOB_STEPS + 1]; /* of steps that watch_step names, save_at and watch_at */
    struct snapshot loaded;               /* before the first step, of a resumed job */
    uint64_t dealt[JOB_STEPS + 1];        /* hash of the rows of each step's micro-batches */
    enum status_code codes[RANKS_MAX];    /* of each rank */
    pthread_mutex_t lock;
};
/* Steps whose state is put together. */
bool watch_step(uint64_t step);
/* Run it; the error that came first. */
status *layout_run(struct layout_run *r) WARN_UNUSED;
void layout_run_free(struct layout_run *r);
/* SFT, preference and labelled rows of uneven lengths in ROOT/data. */
status *layout_data(const char *root) WARN_UNUSED;

/* Losses and other numbers of every step in (after, JOB_STEPS]; bound 0: bit for bit. */
status *losses_near(const char *root, const char *got, const char *want, uint64_t after, double bound) WARN_UNUSED;

#endif
