/* report: what a save or a load cost, rank by rank and stage by stage. Pipelines add up clocks while they work; rank 0
 * gets every rank's with what it gathers anyway, and its keeper leaves a small JSON object on the root:
 *
 *   ROOT/reports/save-000000000100.json, ROOT/reports/load-000000000100.json
 *
 * Invariants: (1) a report is no part of a step: nothing reads it but `tessera ckpt report`, what goes wrong with one
 * is a warning; (2) a save that was not committed has none; (3) the root keeps the REPORT_KEEP last written of each
 * kind; (4) clocks cost two looks at the time for each thing done, and no memory. docs/checkpoint.md has every field of
 * the JSON. report.c makes and writes them, report_read.c reads them. */
#ifndef TESSERA_CKPT_REPORT_H
#define TESSERA_CKPT_REPORT_H

#include "comm/mesh.h"
#include "storage/store.h"

#include <pthread.h>

enum { REPORT_KEEP = 64 };

enum report_stage {
    REPORT_CAPTURE,  /* copies out of tensors: into staging, or into a writer's bounce buffer */
    REPORT_CHECKSUM, /* crc32c, of a save or a load */
    REPORT_WRITE,
    REPORT_FSYNC,    /* finish: until a file is durable and has its name */
    REPORT_VOTE,     /* waits: until the slowest rank's files are durable; then rank 0's gather */
    REPORT_COMMIT,   /* rank 0's keeper: the lease, metadata.pb, LATEST */
    REPORT_READ,     /* of a load, from here */
    REPORT_EXCHANGE, /* packing and sending; waits: for what other ranks send */
    REPORT_PLACE,    /* into the tensors: what was received, and scattering and casting */
    REPORT_STAGES,
    REPORT_TOTAL = REPORT_STAGES /* to ask for: from the call until the rank's own part was done */
};
extern const char *const report_stage_names[REPORT_STAGES + 1]; /* "capture" ... "place", "total" */

/* Whether a load, or a save, has it. */
bool report_has_stage(bool load, enum report_stage stage);

/* One stage on one rank. While it runs first_ns and last_ns are of clock_ns, in a report since the rank's call; 0 and
 * 0: nothing was done. */
struct report_clock {
    uint64_t bytes;
    uint64_t busy_ns; /* summed over threads */
    uint64_t wait_ns; /* not in busy_ns */
    uint64_t retries; /* operations of the storage that were tried again */
    uint64_t first_ns, last_ns;
};
/* Something was done from begin_ns to end_ns, waited_ns of it in vain. */
void report_add(struct report_clock *c, uint64_t begin_ns, uint64_t end_ns, uint64_t waited_ns, uint64_t bytes);
void report_merge(struct report_clock *into, const struct report_clock *from);

/* Clocks that several threads add to. */
struct report_sum {
    pthread_mutex_t lock;
    struct report_clock stage[REPORT_STAGES];
};
void report_sum_init(struct report_sum *s);
void report_sum_fini(struct report_sum *s);
/* Something of a stage was done from begin_ns to now; as report_add. s NULL: nobody wants to know. */
void report_note(struct report_sum *s, enum report_stage stage, uint64_t begin_ns, uint64_t waited_ns, uint64_t bytes);
void report_note_clock(struct report_sum *s, enum report_stage stage, const struct report_clock *c);

/* One rank; u64 alone, so that it travels as it is. */
struct report_rank {
    uint64_t begin_ns; /* its call: wall clock while it travels, in a report after the first rank's */
    uint64_t total_ns; /* until its part was done: its files durable, its tensors filled */
    uint64_t stall_ns; /* training held up: inside tessera_save and in fences; all of a load */
    uint64_t bytes;    /* of tensors, written or read by it */
    struct report_clock stage[REPORT_STAGES];
};
/* From clock_ns to times since start_ns. */
void report_relative(struct report_rank *r, uint64_t start_ns);

struct report {
    struct report *next; /* of a list of its owner's */
    bool load;           /* else of a save */
    uint64_t step, attempt;
    uint64_t time_ns;     /* wall clock: rank 0's call */
    uint64_t span_ns;     /* rank 0: from its call until the step counted, or all ranks had loaded */
    uint64_t interval_ns; /* a save: since the call of the one that this handle committed before; 0: there is none */
    uint64_t storage_bytes, unique_bytes; /* a load: read by all ranks, and wanted */
    uint64_t start_ns;                    /* rank 0's call by clock_ns; not stored */
    struct mesh mesh;
    int world;
    struct report_rank rank[]; /* [world] */
};
status *report_new(int world, struct report **out) WARN_UNUSED; /* zeroed; mem_free */
/* Turn the ranks' begin_ns from wall clock times into times after the first of them. */
void report_align(struct report *r);
/* Put it on the root and remove what is one too many of its kind. */
status *report_write(struct store *s, const struct report *r) WARN_UNUSED;
/* The same text; mem_free. */
status *report_text(const struct report *r, char **out, size_t *bytes) WARN_UNUSED;
/* "reports/save-000000000100.json" */
void report_key(bool load, uint64_t step, char key[STORE_KEY_BYTES]);
/* Remove all but the last REPORT_KEEP of a kind; calls `found` (may be NULL) for each before it goes. dry: that is all.
 */
status *report_prune(struct store *s, bool load, bool dry, void (*found)(void *arg, const char *key, uint64_t bytes),
                     void *arg) WARN_UNUSED;
/* What a name in that directory says; false: it is no report. */
bool report_parse_name(const char *name, bool *load, uint64_t *step);

/* ---- report_read.c */

/* CORRUPT: no report, by its form or its numbers; the words say where. */
status *report_parse(const char *text, size_t bytes, struct report **out) WARN_UNUSED;
/* Of a step, or the last one written (step NULL); the store is a root, or a folder of reports. NOT_FOUND: there is
 * none.
 */
status *report_read(struct store *s, bool load, const uint64_t *step, struct report **out) WARN_UNUSED;

/* Nanoseconds a rank was busy with a stage, or REPORT_TOTAL. */
uint64_t report_ns(const struct report *r, int rank, enum report_stage stage);
/* The lower median over ranks of the same. */
status *report_median(const struct report *r, enum report_stage stage, uint64_t *ns) WARN_UNUSED;

/* Effective training time ratio: of the time between two failures, the part that brought training forward.
 *
 *   lost = load + save + interval / 2,   ETTR = (1 - lost / mtbf) * interval / (interval + block)
 *
 * as in ByteCheckpoint (arXiv 2407.20143), whose lost time is that of Gemini (SOSP 2023, eq. 1): a failure falls, on
 * average, in the middle of an interval, the step that counts is the one before, for it takes `save` until a step does,
 * and then it is loaded. Seconds; interval: training between the calls of two saves; block: training held up by a save.
 * At least 0. NaN unless mtbf and interval are above 0. */
double report_ettr(double interval, double block, double save, double load, double mtbf);

#endif
