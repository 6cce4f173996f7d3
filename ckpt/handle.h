/* handle: what a tessera is made of; shared by ckpt.c (the state machine), save.c (a save's steps), load.c, inspect.c
 * and nothing else. */
#ifndef TESSERA_CKPT_HANDLE_H
#define TESSERA_CKPT_HANDLE_H

#include "ckpt/ckpt.h"
#include "ckpt/keeper.h"
#include "ckpt/match.h"
#include "ckpt/merge.h"
#include "ckpt/nodes.h"
#include "ckpt/pin.h"
#include "ckpt/pipeline.h"
#include "ckpt/refs.h"
#include "ckpt/vote.h"

/* The reduction of a tick: maxima over ranks. */
enum tick_slot {
    TICK_NOT_CAPTURED,
    TICK_NOT_DRAINED,
    TICK_FAILED, /* size - rank of the lowest rank that failed; 0: none */
    TICK_COMMIT, /* rank 0: enum commit_state */
    TICK_FLAG,   /* four of the caller's */
    TICK_SLOTS = TICK_FLAG + 4
};
enum commit_state { COMMIT_NONE, COMMIT_RUNNING, COMMIT_DONE };

/* The reduction of a save: maxima over ranks. */
enum settle_slot {
    SETTLE_CHANGED, /* a rank's state is not the one of the cached plan */
    SETTLE_STEP,
    SETTLE_STEP_NOT, /* ~step: its maximum is the complement of the smallest */
    SETTLE_BLOBS,    /* longest blobs of a rank other than 0 */
    SETTLE_BEGUN,    /* a rank has begun this save */
    SETTLE_REFUSED,  /* a rank has refused it, for its arguments */
    SETTLE_SLOTS
};

/* One save. Agreed: the same on every rank at the same call. Local: this rank's alone, and nobody acts on it. */
struct saving {
    /* agreed */
    int phase;      /* enum tessera_phase */
    uint64_t epoch; /* counts saves and what ends them; tells a reduction that was started for another one */
    uint64_t step;
    bool unsettled;     /* the reduction of tessera_save is in flight */
    status *verdict;    /* this save has failed, for this reason, everywhere; reported by the next tick */
    uint64_t committed; /* found committed, not yet reported; UINT64_MAX: none */
    /* local */
    const tessera_state *state;
    status *error;
    enum commit_state commit;
    struct metadata *metadata; /* rank 0, while the keeper writes it */
    uint64_t reduce_in[SETTLE_SLOTS], reduce_out[SETTLE_SLOTS];
    struct comm_req reduce;
    uint64_t start_ns, start_wall_ns;
    uint64_t vote_ns; /* clock_ns of the vote's start */
};

/* The plan that the last save used; agreed to be there or not. */
struct cached_plan {
    struct plan *plan;
    struct roster roster;
    struct share *share;
    struct refs refs;           /* rank 0: what its tensors by reference are made of */
    struct hash128 fingerprint; /* of this rank's state */
    uint64_t made;              /* plans made so far */
    /* agreed */
    bool refers;         /* it has tensors by reference */
    bool stale;          /* what it refers to may be gone: not to be used again */
    bool frozen_written; /* frozen tensors are written by it */
    int compared;        /* how often the newest step was looked at for frozen tensors of this state (frozen.c) */
};

/* Which pieces of the newest step were found in the memory of frozen tensors. m NULL: there is nothing to refer to. */
struct frozen {
    uint64_t step;
    struct metadata *m;
    uint8_t *found; /* [pieces of m] */
};

struct ticking {
    bool started;
    uint64_t epoch;
    int64_t in[TICK_SLOTS], out[TICK_SLOTS];
    struct comm_req req;
    bool held; /* flags that a tick inside wait or close received, for the caller's next tick */
    int64_t flag[4];
};

struct step_set {
    uint64_t *step;
    size_t count, cap;
    status *first; /* what was wrong with the first one; NULL when empty */
};

struct tessera {
    struct tessera_options o; /* url and build are owned */
    struct mesh mesh;
    struct comm *ticks; /* only the ticks' reductions */
    struct comm *x;     /* all else */
    struct nodes nodes; /* of x */
    struct device *dev;
    struct stream *stream; /* of dev, that writes the tensors */
    struct store *store;
    bool own_dev, own_store;
    uint64_t attempt, run_id, parent; /* agreed */
    uint64_t saved_ns;                /* clock_ns of the call of the save committed last; 0: there is none */
    struct keeper *keeper;            /* rank 0 of a writing handle */
    struct pipeline *pipe;            /* writing handles */
    struct merge *merge;              /* those with options.irregular */

    struct saving save;
    struct cached_plan cache;
    struct ticking tick;
    struct vote vote;
    struct state_bytes blobs; /* of the save in flight */
    bool has_newest, newest_is_ours;
    uint64_t newest; /* newest committed step; agreed */
    struct tessera_progress progress;

    struct metadata *meta; /* what find or load settled on; agreed */
    bool meta_stale;       /* that step was saved again since: its blobs may still be looked at, a load reads it anew */
    struct step_set bad;   /* rank 0: steps found damaged */
    struct pin *pin;       /* rank 0 of a read-only handle: on the step that was found and is not yet loaded */
    bool lost;             /* the last load failed because its step was removed meanwhile; agreed */
    struct tessera_load_report report;
    struct match_lists lists;                  /* of the last load; agreed */
    struct tessera_reference stored_reference; /* what tessera_stored_at gave out */
};

/* INVALID on every rank unless all gave the same value. Collective. */
status *handle_same(tessera *t, const char *what, uint64_t value) WARN_UNUSED;
/* Make a struct of the caller, whose first field is its size, hold as much of `from` as it has room for. */
void handle_give(void *to, const void *from, size_t bytes);
/* A line for people, on rank 0. Takes st. */
void handle_warn(tessera *t, status *st);

/* ---- save.c: steps of a save. "Local" ones keep their error in t->save.error. */

/* Local: describe the state, pack blobs, tell whether the cached plan serves; if so start capturing. */
bool save_begin(tessera *t, tessera_state *s);
/* Start the reduction of tessera_save. */
status *save_reduce(tessera *t, bool same, bool refused) WARN_UNUSED;
/* This rank refuses its arguments for the reason st (taken). Waits for the other ranks' calls: if all refuse, the error
 * is returned; else ranks were given different arguments, and this one joins the save that fails for that reason. */
status *save_refuse(tessera *t, uint64_t step, status *st) WARN_UNUSED;
/* Complete the reduction without planning: for a save that is given up. */
status *save_unsettle(tessera *t) WARN_UNUSED;
/* Complete the reduction of tessera_save: plan again if a rank's state changed. Collective; nothing when it is settled.
 * Fails only with the transport; what a plan finds wrong becomes the save's verdict. */
status *save_settle(tessera *t) WARN_UNUSED;
/* All ranks' files are durable: start the vote, with what it cost this rank so far. Fails only with the transport. */
status *save_vote(tessera *t) WARN_UNUSED;
/* Move votes and the commit on as far as they are without waiting. */
status *save_poll(tessera *t) WARN_UNUSED;
/* tessera_fence once the save is settled: nanoseconds waited. */
uint64_t save_fence(tessera *t, const void *addr, size_t bytes, struct stream *s);
/* What this rank knows of the save in flight, for the tick's reduction. */
void save_report(tessera *t, int64_t in[TICK_SLOTS]);
/* All ranks: the save is over; forget it. keep: its files count. */
void save_forget(tessera *t, bool keep);
/* All ranks: stop, agree on the reason, remove what was written. *outcome: the reason, the same everywhere; NULL:
 * nobody has one (the save was cancelled). Fails only with the transport. */
status *save_undo(tessera *t, status **outcome) WARN_UNUSED;
void save_drop_plan(tessera *t);
/* Collective, after a load of t->meta into s: if the step was saved on the same mesh from a state like s on every rank,
 * its plan is the cached one from here on. Fails only with the transport. */
status *save_adopt_step(tessera *t, tessera_state *s) WARN_UNUSED;

/* ---- frozen.c */

/* The cached plan writes frozen tensors, and the newest step is one that may have them. Agreed. */
bool frozen_due(const tessera *t);
/* For a new plan. Collective; the error is agreed. */
status *frozen_compare(tessera *t, const tessera_state *s, struct frozen *out) WARN_UNUSED;
void frozen_free(struct frozen *f);
/* Rank 0: let the descriptors of what was found refer to it. The texts may move. */
status *frozen_refer(const struct frozen *f, struct plan_desc *desc, uint64_t count, char **text,
                     size_t *text_bytes) WARN_UNUSED;
/* Of the whole plan: whether it has tensors by reference, whether it writes frozen ones. */
void frozen_note_plan(const struct plan *p, uint8_t flags[2]);

/* ---- load.c */
/* Rank 0 has *m (NULL: none; ignored elsewhere, and after an error st of its own, which is taken); afterwards every
 * rank has it. Collective; the error is agreed, and nobody has one then. */
status *load_share_metadata(tessera *t, struct metadata **m, status *st) WARN_UNUSED;
status *load_set_newest(tessera *t) WARN_UNUSED; /* Collective: what rank 0's listing shows */
void step_set_remove(struct step_set *s, uint64_t step);
void step_set_free(struct step_set *s);

#endif
