/* store_crash: what a power cut leaves of a directory that storage/store_posix.c wrote to. The program under test runs
 * with its system calls recorded (ld --wrap, see tests/CMakeLists.txt); afterwards a crash can be played at any sync.
 *
 * Model, weaker than any file system in use: fsync of a file makes its bytes and length durable, fsync of a directory
 * its entries. What was not made durable before the cut (writes, truncations, and entries made, removed or renamed) may
 * be there, or not, or, for writes, in part: each as the seed says, in any combination. A rename is one entry change:
 * never both names lost. Entries of a directory that is not reachable are lost with it.
 *
 *   crash_trace_new -> crash_record -> the program, with crash_mark between -> crash_record(NULL)
 *   for n of crash_syncs: crash_replay(n) into an empty directory -> look at it; crash_marks(n): what had been said
 *
 * The trace is shared memory: a child may record it and die, as the writer of what is looked at should. Recording is
 * of one directory of the process at a time. In a program linked with --wrap, fsync does nothing but be recorded. */
#ifndef TESSERA_TESTS_SUPPORT_STORE_CRASH_H
#define TESSERA_TESTS_SUPPORT_STORE_CRASH_H

#include "storage/store.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct crash_trace;

struct crash_mark {
    int what; /* the test's */
    uint64_t a, b;
};

enum crash_choice {
    CRASH_DROP,    /* nothing that was not durable */
    CRASH_KEEP,    /* all of it */
    CRASH_ORDERED, /* all of it up to some point, where a write may be torn: a journal */
    CRASH_ANY,     /* each by itself: dropped, kept or torn */
    CRASH_CHOICES
};
/* A broken disk, to see that the test sees: syncs of this kind do nothing. */
enum crash_broken { CRASH_HONEST, CRASH_FILES_NOT_SYNCED, CRASH_DIRS_NOT_SYNCED };

status *crash_trace_new(struct crash_trace **out) WARN_UNUSED;
void crash_trace_free(struct crash_trace *t); /* NULL is fine */
/* Record what happens below `path` (absolute, an empty directory) from now on; t NULL: stop. */
void crash_record(struct crash_trace *t, const char *path);
/* Note what the program has told its user by now. */
void crash_mark(struct crash_trace *t, int what, uint64_t a, uint64_t b);

/* How many writes went by O_DIRECT. Until they are synced they may be lost or torn like any other. */
size_t crash_direct_writes(const struct crash_trace *t);
/* How many syncs there were. Crash n is the one in which sync n, and all after it, did not happen; crash crash_syncs
 * comes after everything. */
size_t crash_syncs(const struct crash_trace *t);
/* The marks made before crash n: the i-th, or NULL. */
const struct crash_mark *crash_marks(const struct crash_trace *t, size_t n, size_t i);
/* Put what crash n leaves into the empty directory `path`, or, if `into` is not NULL, its objects alone (no empty
 * directories, no unfinished files) into that store, which is faster. */
status *crash_replay(const struct crash_trace *t, size_t n, enum crash_choice choice, uint64_t seed,
                     enum crash_broken broken, const char *path, struct store *into) WARN_UNUSED;

#endif
