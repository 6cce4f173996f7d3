/* commit: when a step counts. Step directories, attempts, the lease, metadata.pb, LATEST, retention, candidates.
 * Storage only, no MPI: rank 0 (or one rank a node) calls it.
 *
 * Invariants: (1) a step is read only if its metadata.pb decodes and its files have the lengths it states; (2)
 * metadata.pb is put once, exclusively, after every rank said yes; (3) a step is removed metadata.pb first, and never
 * the newest valid one; (4) nothing that another attempt could have committed is overwritten: file names carry the
 * attempt. */
#ifndef TESSERA_CKPT_COMMIT_H
#define TESSERA_CKPT_COMMIT_H

#include "ckpt/metadata.h"
#include "storage/store.h"

/* Object in a step's directory that view.h makes. Not of the step: whoever removes the step removes it, nobody reads
 * it.
 */
#define COMMIT_VIEW "view.h5"

enum { STEP_DIR_BYTES = 32, MAX_METADATA_BYTES = 1 << 30 };

/* "step-000000000100" */
void commit_step_dir(uint64_t step, char dir[STEP_DIR_BYTES]);
/* The step of such a name; false for anything else (".bad-..." too). */
bool commit_parse_dir(const char *name, uint64_t *step);
/* "step-000000000100/policy.model-00003.a1b2c3d4e5f60718.h5": '/' of the part becomes '.'; a part longer than 160 bytes
 * is cut and its hash added */
void commit_shard_key(uint64_t step, const char *part, int writer, uint64_t attempt, char key[STORE_KEY_BYTES]);

/* The writer in the name of a shard file (without its directory); false for anything else. */
bool commit_parse_writer(const char *name, int32_t *writer);

/* "step-000000000100/NAME" of a file that a metadata file names. CORRUPT if that is no key inside the step's directory.
 */
status *commit_file_key(uint64_t step, const char *name, char key[STORE_KEY_BYTES]) WARN_UNUSED;

/* --- the lease
 *
 * Objects LEASE/0000000001, LEASE/0000000002, ...: the lease's epochs. The highest one is the lease; it names its
 * attempt, host and process, and whether it was given back. Taking over from epoch n is the exclusive put of n + 1, so
 * of any number of takers exactly one wins, on any store that has an atomic exclusive put. Only an epoch's owner
 * replaces its object (to renew: its age by the storage's clock is then small again), so a zombie can at most refresh a
 * superseded epoch, which nobody looks at; lease_check and lease_renew tell it that a higher one is there.
 *
 * Limits: a job stopped for longer than its lease (SIGSTOP, a partition) may be taken over while it lives and cannot
 * know before it looks: between its lease_check and its put of metadata.pb another attempt can have begun. That is why
 * file names carry the attempt and metadata.pb is put exclusively: such a commit is whole, never a mixture. Removing
 * LEASE by hand under a live job lets a second one in; the first notices. */
struct lease {
    struct store *store;
    uint64_t attempt, run_id, parent;
    uint64_t epoch, counter; /* of the object; how often it was renewed */
    uint32_t seconds;
    uint64_t renewed_ns; /* monotonic */
    char host[64];
};
/* Take the root's lease for a new attempt (drawn from the system's randomness). The run id is the root's: taken over
 * from the last lease, or drawn. A lease whose process runs on this host (same host name, boot and pid namespace) is
 * EXISTS at once, one whose process is gone from it is taken over at once; any other is watched until it is renewed
 * (EXISTS) or older than its seconds (taken over). seconds 0: 30. `note` (NOTE_BYTES) is set to a line for people when
 * a dead job's lease was taken over, else "". */
enum { NOTE_BYTES = 256 };
status *lease_take(struct store *s, uint32_t seconds, struct lease *out, char note[NOTE_BYTES]) WARN_UNUSED;
/* Who holds the root: *live is false when nobody does, the holder has given it back, or its process is known to be
 * gone; otherwise *attempt is the holder's. Waits for nothing. */
status *lease_holder(struct store *s, uint64_t *attempt, bool *live) WARN_UNUSED;
/* Renew if a third of its time has passed. CANCELLED: another attempt holds it now. */
status *lease_renew(struct lease *l) WARN_UNUSED;
/* Check that it is still ours (before a commit). CANCELLED names who holds it. */
status *lease_check(struct lease *l) WARN_UNUSED;
/* Mark it given back: the next taker need not wait, and keeps the run id. NULL also when another attempt holds it. */
status *lease_give_back(struct lease *l) WARN_UNUSED;

/* --- committed steps */
struct step_list {
    uint64_t *step; /* ascending: listing + LATEST, steps with a metadata.pb */
    size_t count;
};
status *commit_list(struct store *s, struct step_list *out) WARN_UNUSED;
/* The newest one. NOT_FOUND names the root: there is none. */
status *commit_newest(struct store *s, uint64_t *step) WARN_UNUSED;
void step_list_free(struct step_list *l);
/* Read and check one step's metadata and the lengths of all files that it names, its own and its owners'. NOT_FOUND:
 * not committed; CORRUPT names the file, and the tensor that lies in an owner's. */
status *commit_read(struct store *s, uint64_t step, struct metadata **out) WARN_UNUSED;
/* Put metadata.pb exclusively, then LATEST (a hint: its failure is none). If a metadata.pb of another attempt is there
 * (a zombie's), its bytes go to metadata.pb.ATTEMPT first. EXISTS: our own attempt's. After any other error the step is
 * not committed: what could have become visible was removed (or, if the store refuses even that, the message says so).
 */
status *commit_put(struct store *s, const struct metadata *m) WARN_UNUSED;
/* Read one step's metadata without a look at its files. NOT_FOUND, CORRUPT, UNSUPPORTED. */
status *commit_read_metadata(struct store *s, uint64_t step, struct metadata **out) WARN_UNUSED;
/* The same if the step may have owners; else, and where it is not committed or damaged, NULL: it keeps no other step.
 */
status *commit_read_owners(struct store *s, uint64_t step, struct metadata **out) WARN_UNUSED;
/* Let LATEST name the newest committed step again, after a removal. */
status *commit_point_latest(struct store *s) WARN_UNUSED;
/* Whether the step has a metadata.pb. */
status *commit_is_committed(struct store *s, uint64_t step, bool *yes) WARN_UNUSED;
/* Remove a step, metadata.pb first, so that a crash in between leaves no half step that counts. Missing is fine. */
status *commit_remove(struct store *s, uint64_t step) WARN_UNUSED;

/* --- retention (retain.c) */

/* What stays; `last` 0: everything. Else the last so many steps, and besides them those that another rule keeps. */
struct keep_rules {
    int last;
    uint64_t every;     /* steps that it divides; 0: no such rule */
    int best;           /* so many with the best `metric` among the marked; 0: no such rule */
    const char *metric; /* of commit_mark */
    bool lowest;        /* the best is the smallest */
};
/* Apply the rules to `newest`, which the caller has just committed and which stays, and to the committed steps before
 * it. Whatever the rules say, steps that readers have pinned and those that own bytes of a step that stays do so, too.
 * Nothing is removed if `newest` is not committed; steps above it are left alone. */
status *commit_retain(struct store *s, uint64_t newest, const struct keep_rules *k) WARN_UNUSED;

/* Metrics of committed steps, for keep_rules.best. Names are letters, digits and "._-/"; names that differ in '/'
 * against
 * '.' alone are one. commit_mark sets or replaces one. INVALID: the name, or the value is not finite; NOT_FOUND: no
 * such step. */
enum { MARK_NAME_BYTES = 128 };
struct mark {
    char name[MARK_NAME_BYTES];
    double value;
};
struct mark_list {
    struct mark *mark; /* by name */
    size_t count;
};
status *commit_mark(struct store *s, uint64_t step, const char *metric, double value) WARN_UNUSED;
status *commit_marks(struct store *s, uint64_t step, struct mark_list *out) WARN_UNUSED;
void mark_list_free(struct mark_list *l);
/* Remove the marks and the view of a step, for its number is committed anew. */
status *commit_drop_marks(struct store *s, uint64_t step) WARN_UNUSED;
bool commit_is_mark(const char *name); /* an object's name in a step's directory */

/* Rename step-N to step-N.WHY-ATTEMPT (WHY: "bad", "retired"); where the store cannot rename, remove its metadata.pb.
 * Missing is fine. */
status *commit_retire(struct store *s, uint64_t step, const char *why, uint64_t attempt) WARN_UNUSED;
/* Remove files of `attempt` in the step's directory (a failed or cancelled save), finished or not, and the directory if
 * it is empty then. EXISTS, and nothing removed: that attempt has committed the step. */
status *commit_discard(struct store *s, uint64_t step, uint64_t attempt) WARN_UNUSED;

/* --- gc (gc.c): remove what no committed step needs, if it is older than `age_seconds` by the storage's clock: files
 * in step directories that their metadata.pb does not name (all, where there is none), step-N.bad-* and
 * step-N.retired-*, and, if no job is live, empty step directories and temporary files. Of a live job's attempt nothing
 * is touched; a step whose metadata.pb is damaged is left alone. The caller holds the lease, or `live` is the attempt
 * of who does. Calls `found` for each object before it goes; dry_run: that is all. */
struct gc_options {
    uint64_t age_seconds;
    bool dry_run, has_live;
    uint64_t live;
};
struct gc_result {
    uint64_t objects, bytes;
};
status *commit_gc(struct store *s, const struct gc_options *o,
                  void (*found)(void *arg, const char *key, uint64_t bytes), void *arg,
                  struct gc_result *out) WARN_UNUSED;

/* --- verify: read every byte of a step. Calls `found` with a line for each damage: step, file, tensor (header or
 * padding) and offset. NULL also when damage was found (out->damages); NOT_FOUND: the step is not committed; other
 * errors: it could not be read to the end. */
struct verify_result {
    uint64_t files, tensors, bytes, damages;
};
status *commit_verify(struct store *s, uint64_t step, void (*found)(void *arg, const char *line), void *arg,
                      struct verify_result *out) WARN_UNUSED;

#endif
