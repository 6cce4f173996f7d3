/* thread_jobs: whole training jobs whose ranks are threads of this process, for tests that include cmocka.h. Each gives
 * make_data and remove_data to cmocka_run_group_tests. */
#ifndef TESSERA_TESTS_TRAINER_THREAD_JOBS_H
#define TESSERA_TESTS_TRAINER_THREAD_JOBS_H

#include "tests/support/comm_threads.h"
#include "tests/support/sanitized.h"
#include "tests/support/test_root.h"
#include "trainer/data/prepare.h"
#include "trainer/trainer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct job {
    const char *config;
    const char *overrides[32];
    int override_count;
    void (*before)(struct trainer *t);   /* NULL, or what is changed before it runs, on each rank */
    status *(*after)(struct trainer *t); /* NULL, or a look at what is left, on each rank */
    uint32_t weights;                    /* of rank 0 at the end */
    struct state_hashes hashes;          /* of all ranks */
    uint64_t resumed_from, saved;
};

static char root[FOLDER_BYTES];

static inline status *run_rank(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct log log = { LOG_WARN, world->rank };
    struct config *cfg = NULL;
    TRY(config_parse(j->config, strlen(j->config), "job", j->override_count, (char **)(size_t)j->overrides, &cfg));
    struct trainer *t = NULL;
    status *st = trainer_open(cfg, world, &log, &t);
    if (!st && j->before)
        j->before(t);
    if (!st)
        st = trainer_run(t);
    if (!st && j->after)
        st = j->after(t);
    struct state_hashes hashes;
    uint32_t crc = 0;
    if (!st)
        st = state_hashes(t, &hashes);
    if (!st)
        st = state_weights_crc(t, &crc);
    if (!st && world->rank == 0) {
        j->hashes = hashes;
        j->weights = crc;
        j->resumed_from = t->resumed_from;
        j->saved = t->saved_step;
    }
    st = status_first(st, trainer_close(t));
    config_free(cfg);
    return st;
}

static inline void must(status *st)
{
    if (st)
        fail_msg("%s (rank %d, %s:%d)", status_message(st), status_rank(st), status_file(st), status_line(st));
}

/* A constant schedule, so that a run cut short by train.steps is the beginning of a longer one. */
static inline void make_config(char *text, size_t bytes, const char *name)
{
    snprintf(text, bytes,
             "comm: self\nthreads: 2\nrun: {name: %s, dir: %s/%s, seed: 3}\n"
             "model: {kind: llama, layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, tied: true}\n"
             "data: {sft: %s/data/sft.jsonl, prefs: %s/data/prefs_train.jsonl, heldout: %s/data/prefs_heldout.jsonl, "
             "max_length: 64}\n"
             "algo: {kind: dpo, warmup_sft_steps: 3, beta: 0.2}\n"
             "train: {steps: 9, global_batch: 8, micro_batch: 1}\n"
             "optim: {lr: 3e-4, schedule: constant}\n"
             "parallel: {zero: 1, bucket: 16K}\n"
             "checkpoint: {url: 'file:%s/%s/ckpt', every: 2, keep_last: 2, chunk_bytes: 1MiB, on_error: stop}\n",
             name, root, name, root, root, root, root, name);
}

static inline struct job run(const char *config, int ranks, int overrides, const char **override)
{
    struct job j = { .config = config, .override_count = overrides };
    for (int i = 0; i < overrides; i++)
        j.overrides[i] = override[i];
    must(comm_threads_run(ranks, run_rank, &j));
    return j;
}

/* A job of these settings, up to a NULL, is refused as invalid with those words. */
static inline void refused(int ranks, const char *const *settings, const char *words)
{
    char text[2048];
    make_config(text, sizeof text, "refused");
    struct job j = { .config = text };
    for (; settings[j.override_count]; j.override_count++)
        j.overrides[j.override_count] = settings[j.override_count];
    status *st = comm_threads_run(ranks, run_rank, &j);
    assert_int_equal(status_code(st), ST_INVALID);
    if (!strstr(status_message(st), words))
        fail_msg("\"%s\" is not in \"%s\"", words, status_message(st));
    status_free(st);
}

/* ---- metrics of a step, as metrics.jsonl has them ---- */

static inline double metric(const char *run_name, int step, const char *key)
{
    char path[128], line[4096], want[64], name[64];
    double value = NAN;
    bool found = false;
    snprintf(path, sizeof path, "%s/%s/metrics.jsonl", root, run_name);
    snprintf(want, sizeof want, "{\"event\": \"step\", \"step\": %d,", step);
    snprintf(name, sizeof name, "\"%s\": ", key);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) {
        const char *at = strncmp(line, want, strlen(want)) ? NULL : strstr(line, name);
        if (!at)
            continue;
        found = true;
        value = strncmp(at + strlen(name), "null", 4) ? strtod(at + strlen(name), NULL) : (double)NAN;
    }
    fclose(f);
    if (!found)
        fail_msg("%s: step %d has no %s", run_name, step, key);
    return value;
}

/* The text of a number of the last such event of a step. */
static inline void last_value(const char *run_name, const char *event, int step, const char *key, char out[32])
{
    char path[128], line[4096], want[64], name[64];
    snprintf(path, sizeof path, "%s/%s/metrics.jsonl", root, run_name);
    snprintf(want, sizeof want, "{\"event\": \"%s\", \"step\": %d,", event, step);
    snprintf(name, sizeof name, "\"%s\": ", key);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    *out = 0;
    while (fgets(line, sizeof line, f)) {
        const char *at = strncmp(line, want, strlen(want)) ? NULL : strstr(line, name);
        if (at)
            snprintf(out, 32, "%.*s", (int)strcspn(at + strlen(name), ",}"), at + strlen(name));
    }
    fclose(f);
    if (!*out)
        fail_msg("%s: step %d has no %s in an event %s", run_name, step, key, event);
}

/* Hashes of weights, moments and reference that an event "save_start" or "resume" has (checkpoint.state_hash). */
enum { HASHES = 3 };
static inline void state_hashes_of(const char *run_name, const char *event, int step, char out[HASHES][32])
{
    static const char *const hashes[HASHES] = { "weights_hash", "moments_hash", "ref_hash" };
    for (int h = 0; h < HASHES; h++)
        last_value(run_name, event, step, hashes[h], out[h]);
}
/* The last resume from that step had what was saved there. */
static inline void expect_resumed(const char *run_name, int step, char want[HASHES][32])
{
    char got[HASHES][32];
    state_hashes_of(run_name, "resume", step, got);
    for (int h = 0; h < HASHES; h++)
        assert_string_equal(got[h], want[h]);
}

static const char *const algorithms[][4] = { { "algo.kind=dpo", "algo.loss=sigmoid" },
                                             { "algo.kind=dpo", "algo.loss=kto_pair" },
                                             { "algo.kind=dpo", "algo.ld_alpha=0.5" },
                                             { "algo.kind=kto", "algo.loss=kto" } };
enum { ALGORITHMS = sizeof algorithms / sizeof algorithms[0] };

static inline const char *labelled_override(void)
{
    static char text[160];
    snprintf(text, sizeof text, "data.labelled=%s/data/labelled.jsonl", root);
    return text;
}

static inline int make_data(void **state)
{
    (void)state;
    folder_make(root);
    char dir[128];
    snprintf(dir, sizeof dir, "%s/data", root);
    char *argv[] = { "prepare", "arithmetic", dir, "rows=40", "heldout=10" };
    status *st = data_cli(5, argv);
    must(st);
    snprintf(dir, sizeof dir, "%s/data/labelled.jsonl", root);
    FILE *f = fopen(dir, "w");
    for (int i = 0; f && i < 30; i++) /* two completions a prompt, of other lengths */
        fprintf(f, "{\"prompt\": \"%d+%d=\", \"completion\": \"%d\", \"label\": %s}\n", i / 2, 7 * i / 2,
                i % 2 ? i * i * i : i / 2 + 7 * i / 2, i % 2 ? "false" : "true");
    return f ? fclose(f) : -1;
}

static inline int remove_data(void **state)
{
    (void)state;
    folder_remove(root);
    return 0;
}

/* The last line of an event of a run, after its step. */
static inline void last_event(const char *run_name, const char *event, char out[4096])
{
    char path[128], line[4096], want[64];
    snprintf(path, sizeof path, "%s/%s/metrics.jsonl", root, run_name);
    snprintf(want, sizeof want, "{\"event\": \"%s\",", event);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    *out = 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, want, strlen(want)))
            snprintf(out, 4096, "%s", line);
    fclose(f);
    assert_true(*out);
}

#endif
