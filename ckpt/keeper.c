/* keeper: keeper_main sleeps on a condition until there are metrics to store, a commit to write, the lease is due, or,
 * last of all, a report wants to be written or a committed step wants its view. What retention no longer keeps goes
 * right after a commit was told: removing a step takes longer than committing one. */
#include "ckpt/keeper.h"

#include "ckpt/refs.h"
#include "ckpt/view.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum job { JOB_NONE, JOB_QUEUED, JOB_DONE };
enum { VIEWS = 16 };

struct waiting_mark {
    uint64_t step;
    struct mark mark;
};

struct keeper {
    struct store *store;
    struct lease lease; /* the thread's alone while it runs */
    struct keep_rules keep;
    uint64_t newest;      /* the thread's alone: the step that it committed last */
    uint64_t view_pieces; /* most of a step whose view is written */
    uint64_t view[VIEWS]; /* the thread's alone: steps that want theirs, in order */
    size_t views;
    struct thread thread;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        enum job job;
        bool retaining; /* a step was committed since old ones were last removed */
        const struct metadata *m;
        struct report *cost;          /* of the commit that is queued */
        struct report *first, **past; /* to be written, in order; past: where the next one is linked */
        status *outcome, *lost, *note;
        struct waiting_mark *mark; /* to be set, in order */
        size_t marks;
        bool quit;
    } synced;
};

static void add_note(struct keeper *k, status *st)
{
    pthread_mutex_lock(&k->synced.lock);
    k->synced.note = status_first(k->synced.note, st);
    pthread_mutex_unlock(&k->synced.lock);
}

/* CANCELLED means that another attempt holds the lease: no save of ours may count any more. Anything else may pass. */
static void renew(struct keeper *k)
{
    status *st = lease_renew(&k->lease);
    if (!st)
        return;
    if (status_code(st) != ST_CANCELLED) {
        add_note(k, status_wrap(st, "the lease could not be renewed"));
        return;
    }
    pthread_mutex_lock(&k->synced.lock);
    k->synced.lost = status_first(k->synced.lost, st);
    pthread_mutex_unlock(&k->synced.lock);
}

static status *commit(struct keeper *k, const struct metadata *m)
{
    TRY(lease_check(&k->lease));
    if (m->owner_count)
        TRY(refs_check_files(k->store, m, true));
    TRY(commit_put(k->store, m));
    k->newest = m->step;
    if (m->piece_count <= k->view_pieces && k->views < VIEWS) /* saves come first: one too many goes without */
        k->view[k->views++] = m->step;
    return NULL;
}

/* After the commit was told: the step counts, so what fails from here on is only worth a note. */
static void retain(struct keeper *k)
{
    status *st = lease_check(&k->lease); /* what another attempt has taken over is its to tidy */
    if (!st)
        st = commit_retain(k->store, k->newest, &k->keep);
    if (st)
        add_note(k, status_wrap(st, "old steps could not be removed"));
}

static void write_view(struct keeper *k)
{
    struct metadata *m = NULL;
    const uint64_t step = k->view[0];
    memmove(k->view, k->view + 1, --k->views * sizeof *k->view);
    status *st = commit_read_metadata(k->store, step, &m);
    if (!st)
        st = view_write(k->store, m);
    metadata_free(m);
    if (status_code(st) == ST_NOT_FOUND) { /* removed meanwhile */
        status_free(st);
        return;
    }
    if (st)
        add_note(k, status_wrap(st, "step %llu has no view.h5", (unsigned long long)step));
}

static void set_marks(struct keeper *k, struct waiting_mark *m, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        status *st = commit_mark(k->store, m[i].step, m[i].mark.name, m[i].mark.value);
        if (st)
            add_note(k, status_wrap(st, "a metric of step %llu could not be stored", (unsigned long long)m[i].step));
    }
    mem_free(m);
}

/* The commit of r's save has ended; is it worth a report? */
static struct report *end_commit(struct report *r, const status *st, uint64_t begin_ns)
{
    if (!r || st) {
        mem_free(r);
        return NULL;
    }
    uint64_t now = clock_ns();
    struct report_clock *c = &r->rank[0].stage[REPORT_COMMIT];
    report_add(c, begin_ns - r->start_ns, now - r->start_ns, 0, 0);
    r->span_ns = now - r->start_ns;
    return r;
}

static void queue_locked(struct keeper *k, struct report *r)
{
    if (!r)
        return;
    *k->synced.past = r;
    k->synced.past = &r->next;
}

/* After the commit was told, too. */
static void write_report(struct keeper *k, struct report *r)
{
    status *st = report_write(k->store, r);
    if (st)
        add_note(k, status_wrap(st, "no report of the %s of step %llu", r->load ? "load" : "save",
                                (unsigned long long)r->step));
    mem_free(r);
}

static void wait_until(struct keeper *k, uint64_t ns)
{
    struct timespec t = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
    pthread_cond_timedwait(&k->synced.changed, &k->synced.lock, &t);
}

static status *keeper_main(void *arg)
{
    struct keeper *k = arg;
    const uint64_t period = (uint64_t)k->lease.seconds * 1000000000u / 6; /* half of what lease_renew acts on */
    pthread_mutex_lock(&k->synced.lock);
    for (uint64_t next = clock_ns() + period; !k->synced.quit || k->synced.job == JOB_QUEUED || k->synced.retaining ||
                                              k->synced.marks || k->synced.first || k->views;) {
        if (k->synced.marks) {
            struct waiting_mark *mark = k->synced.mark;
            size_t marks = k->synced.marks;
            k->synced.mark = NULL;
            k->synced.marks = 0;
            pthread_mutex_unlock(&k->synced.lock);
            set_marks(k, mark, marks);
            pthread_mutex_lock(&k->synced.lock);
        } else if (k->synced.job == JOB_QUEUED) {
            const struct metadata *m = k->synced.m;
            struct report *cost = k->synced.cost;
            k->synced.cost = NULL;
            pthread_mutex_unlock(&k->synced.lock);
            uint64_t begin = clock_ns();
            status *st = commit(k, m);
            cost = end_commit(cost, st, begin);
            pthread_mutex_lock(&k->synced.lock);
            queue_locked(k, cost);
            k->synced.outcome = st;
            k->synced.job = JOB_DONE;
            k->synced.retaining = k->synced.retaining || (!st && k->keep.last > 0);
            pthread_cond_broadcast(&k->synced.changed);
        } else if (k->synced.retaining) {
            pthread_mutex_unlock(&k->synced.lock);
            retain(k);
            pthread_mutex_lock(&k->synced.lock);
            k->synced.retaining = false;
            pthread_cond_broadcast(&k->synced.changed);
        } else if (clock_ns() >= next) {
            pthread_mutex_unlock(&k->synced.lock);
            renew(k);
            pthread_mutex_lock(&k->synced.lock);
            next = clock_ns() + period;
        } else if (k->synced.first) {
            struct report *r = k->synced.first;
            k->synced.first = r->next;
            k->synced.past = r->next ? k->synced.past : &k->synced.first;
            pthread_mutex_unlock(&k->synced.lock);
            write_report(k, r);
            pthread_mutex_lock(&k->synced.lock);
        } else if (k->views) {
            pthread_mutex_unlock(&k->synced.lock);
            write_view(k);
            pthread_mutex_lock(&k->synced.lock);
        } else {
            wait_until(k, next);
        }
    }
    pthread_mutex_unlock(&k->synced.lock);
    return NULL;
}

static void free_keeper(struct keeper *k)
{
    mem_free(k->synced.mark);
    mem_free(k->synced.cost);
    for (struct report *r = k->synced.first, *next; r; r = next) {
        next = r->next;
        mem_free(r);
    }
    status_free(k->synced.outcome);
    status_free(k->synced.lost);
    status_free(k->synced.note);
    pthread_cond_destroy(&k->synced.changed);
    pthread_mutex_destroy(&k->synced.lock);
    mem_free(k);
}

status *keeper_open(struct store *s, const struct lease *l, const struct keep_rules *keep, uint64_t view_pieces,
                    struct keeper **out)
{
    struct keeper *k = mem_calloc(1, sizeof *k);
    if (!k)
        return ERR(NO_MEMORY, "a keeper");
    k->store = s;
    k->lease = *l;
    k->keep = *keep;
    k->view_pieces = view_pieces;
    k->synced.past = &k->synced.first;
    status *no_view = view_check(s);
    if (no_view)
        k->view_pieces = 0;
    status_free(no_view);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&k->synced.changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&k->synced.lock, NULL);
    status *st = thread_start(&k->thread, "tsr-keeper", keeper_main, k);
    if (st) {
        free_keeper(k);
        return st;
    }
    *out = k;
    return NULL;
}

status *keeper_close(struct keeper *k)
{
    if (!k)
        return NULL;
    pthread_mutex_lock(&k->synced.lock);
    k->synced.quit = true;
    pthread_cond_broadcast(&k->synced.changed);
    pthread_mutex_unlock(&k->synced.lock);
    status *st = thread_join(&k->thread);
    if (!k->synced.lost)
        st = status_first(st, lease_give_back(&k->lease));
    free_keeper(k);
    return st;
}

status *keeper_lost(struct keeper *k)
{
    pthread_mutex_lock(&k->synced.lock);
    status *st = k->synced.lost ? status_copy(k->synced.lost) : NULL;
    pthread_mutex_unlock(&k->synced.lock);
    return st;
}

void keeper_report(struct keeper *k, struct report *r)
{
    pthread_mutex_lock(&k->synced.lock);
    queue_locked(k, r);
    pthread_cond_broadcast(&k->synced.changed);
    pthread_mutex_unlock(&k->synced.lock);
}

void keeper_commit(struct keeper *k, const struct metadata *m, struct report *r)
{
    pthread_mutex_lock(&k->synced.lock);
    CHECK(k->synced.job == JOB_NONE, "one commit at a time");
    k->synced.m = m;
    k->synced.cost = r;
    k->synced.job = JOB_QUEUED;
    pthread_cond_broadcast(&k->synced.changed);
    pthread_mutex_unlock(&k->synced.lock);
}

status *keeper_mark(struct keeper *k, uint64_t step, const char *metric, double value)
{
    struct waiting_mark w = { .step = step, .mark = { .value = value } };
    if ((size_t)snprintf(w.mark.name, sizeof w.mark.name, "%s", metric) >= sizeof w.mark.name)
        return ERR(INVALID, "a metric's name of %zu characters", strlen(metric));
    pthread_mutex_lock(&k->synced.lock);
    struct waiting_mark *more = mem_array(k->synced.mark, k->synced.marks + 1, sizeof *more);
    if (more) {
        k->synced.mark = more;
        more[k->synced.marks++] = w;
        pthread_cond_broadcast(&k->synced.changed);
    }
    pthread_mutex_unlock(&k->synced.lock);
    return more ? NULL : ERR(NO_MEMORY, "a metric of step %llu", (unsigned long long)step);
}

bool keeper_outcome(struct keeper *k, bool wait, status **outcome)
{
    pthread_mutex_lock(&k->synced.lock);
    while (wait && k->synced.job == JOB_QUEUED)
        pthread_cond_wait(&k->synced.changed, &k->synced.lock);
    bool done = k->synced.job == JOB_DONE;
    if (done) {
        *outcome = k->synced.outcome;
        k->synced.outcome = NULL;
        k->synced.job = JOB_NONE;
    }
    pthread_mutex_unlock(&k->synced.lock);
    return done;
}

void keeper_rest(struct keeper *k)
{
    if (!k)
        return;
    pthread_mutex_lock(&k->synced.lock);
    while (k->synced.retaining)
        pthread_cond_wait(&k->synced.changed, &k->synced.lock);
    pthread_mutex_unlock(&k->synced.lock);
}

status *keeper_note(struct keeper *k)
{
    pthread_mutex_lock(&k->synced.lock);
    status *st = k->synced.note;
    k->synced.note = NULL;
    pthread_mutex_unlock(&k->synced.lock);
    return st;
}
