/* limits: what the file system does with plain writes and reads, the yardstick beside saves and loads. No checkpoint
 * code is in it: open, pwrite or pread in pieces of 4 MiB, fdatasync, close. On object storage, what curl(1) does. */
#ifndef TESSERA_TRAINER_BENCH_LIMITS_H
#define TESSERA_TRAINER_BENCH_LIMITS_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LIMIT_PIECE_BYTES = 4 << 20, LIMIT_THREADS = 4, LIMIT_METHODS = 10, LIMIT_REPEATS = 32 };

/* Seconds that each method took, by repeat. */
struct limits {
    bool remote; /* an object store: by curl; else files. Set it, and all else to 0, before the first use */
    double seconds[LIMIT_METHODS][LIMIT_REPEATS];
    bool missing[LIMIT_METHODS]; /* the file system refuses O_DIRECT */
    size_t repeats;
};
/* "4 threads, O_DIRECT", "curl x4" */
const char *limit_method(size_t i);
/* The smallest median over repeats of any method, and the smallest of all. best: that method. */
double limits_median(struct limits *l, size_t *best);
double limits_least(const struct limits *l);

/* Write `bytes` to new files in dir, a file a thread, by each method once; durable before the clock stops; removed
 * afterwards. The bytes are those of `from` (4 KiB aligned, at least a piece long), again and again. Remote: dir is a
 * URL, an object is put for each 16 MiB. */
status *limits_write(struct limits *l, const char *dir, const void *from, size_t from_bytes,
                     uint64_t bytes) WARN_UNUSED;

struct file_list {
    char root[1024];    /* remote: the URL */
    char (*path)[1024]; /* remote: keys below it */
    uint64_t *bytes, total;
    size_t count;
};
/* Regular files below dir whose name ends in `suffix`; dir may be the URL of an object store. */
status *files_below(const char *dir, const char *suffix, struct file_list *out) WARN_UNUSED;
void files_free(struct file_list *l);
/* Take the files (of a file system) out of the page cache, as far as they are on storage already. */
status *files_drop(const struct file_list *l) WARN_UNUSED;
/* Share of the files' pages that are in the page cache: what files_drop has left. */
status *files_cached(const struct file_list *l, double *share) WARN_UNUSED;

/* Read all bytes of the files by each method once, threads taking neighbouring shares; the files are dropped from the
 * page cache before each. They land in `to` (4 KiB aligned, touched, at least LIMIT_THREADS pieces long), whose
 * parts the threads fill again and again. Remote: curl gets ranges of 16 MiB and drops them. */
status *limits_read(struct limits *l, const struct file_list *f, void *to, size_t to_bytes) WARN_UNUSED;

#endif
