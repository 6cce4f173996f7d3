/* The power fails at any sync of a job's life: what is listed afterwards is whole, what was said to be committed is
 * there, what was said to have failed or was rewound is not, and a new job goes on from it.
 *
 * A child saves on a recorded store (tests/support/store_crash.h) and dies; every crash of its trace is then played, in
 * several ways, and looked at. Each save has a number of its own, its version: the contents of its tensors, and a blob.
 */
#include "ckpt/commit.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/store_crash.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* What the job was told: a = step, b = version. */
enum said { COMMITTED, FAILED, REWINDING, REWOUND };

enum { MAX_VERSIONS = 64 };

struct job {
    struct store *store;
    struct crash_trace *trace;
    struct fake_cut cut;
    int keep_last;
    uint64_t faults; /* failing saves to try */
};

static const struct fake_cut reader_cut = { 1, 1, false, false, 1000 };

static status *open_job(struct comm *world, struct store *s, int keep_last, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.keep_last = keep_last;
    o.read_only = read_only;
    o.chunk_bytes = 1 << 20;
    o.staging_bytes = 2 << 20;
    return ckpt_open(&o, world, NULL, s, out);
}

/* Save and tell the trace what came of it. */
static status *save(struct comm *world, struct crash_trace *trace, tessera *t, struct fake *f, uint64_t step,
                    uint64_t version, bool *good)
{
    uint64_t committed;
    TRY(tessera_state_add_blob(f->state, "crash", "version", 0, &version, sizeof version));
    fake_fill(f, version);
    TRY(tessera_save(t, f->state, step));
    if (version % 2) { /* else everything may go from live memory */
        TRY(tessera_fence(t, NULL, 0, NULL));
        fake_spoil(f);
    }
    status *st = tessera_wait(t, &committed);
    *good = !st;
    TRY(st ? expect_error(st, ST_IO, "injected fault", __FILE__, __LINE__) : NULL);
    EXPECT(!*good || committed == step);
    if (trace && world->rank == 0)
        crash_mark(trace, *good ? COMMITTED : FAILED, step, version);
    return NULL;
}

/* Saves that an operation of one rank spoils; which rank and which operation moves on. */
static status *failing_saves(struct comm *world, const struct job *j, struct store *s, tessera *t, struct fake *f,
                             uint64_t *step, uint64_t *version)
{
    for (uint64_t k = 0; k < j->faults; k++) {
        bool good;
        if (world->rank == (int)(k % (uint64_t)world->size))
            store_fault_arm(s, 1 + k * 2, k & 2 ? FAULT_AFTER : FAULT_BEFORE);
        TRY(save(world, j->trace, t, f, ++*step, ++*version, &good));
        store_fault_disarm(s);
        TRY(comm_barrier(world));
        TRY(save(world, j->trace, t, f, ++*step, ++*version, &good));
        EXPECT(good);
    }
    return NULL;
}

static status *life(struct comm *world, void *arg)
{
    const struct job *j = arg;
    struct store *s;
    tessera *t;
    struct fake f;
    uint64_t step = 0, version = 0;
    bool good;
    TRY(store_fault_open(j->store, &s));
    TRY(open_job(world, s, j->keep_last, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    for (int i = 0; i < 3; i++)
        TRY(save(world, j->trace, t, &f, ++step, ++version, &good));
    TRY(failing_saves(world, j, s, t, &f, &step, &version));
    TRY(tessera_save(t, f.state, step + 1));
    TRY(tessera_cancel(t));
    TRY(tessera_wait(t, NULL));
    TRY(save(world, j->trace, t, &f, step += 2, ++version, &good));
    if (j->keep_last == 0) { /* one step back, then the same number again with other contents */
        TRY(comm_barrier(world));
        if (world->rank == 0)
            crash_mark(j->trace, REWINDING, step - 1, 0);
        TRY(tessera_rewind(t, step - 1));
        if (world->rank == 0)
            crash_mark(j->trace, REWOUND, step - 1, 0);
        TRY(save(world, j->trace, t, &f, step, ++version, &good));
    }
    fake_close(&f);
    TRY(tessera_close(t));
    store_fault_close(s);
    return NULL;
}

/* ---- looking at what is left */

/* What must and must not be there after a crash. */
struct duty {
    uint64_t newest; /* version: this one, or a later one, is listed; 0: none has to be */
    uint64_t step_of[MAX_VERSIONS];
    bool dead[MAX_VERSIONS];
};

static struct duty duty_of(const struct crash_trace *t, size_t n)
{
    struct duty d = { 0 };
    const struct crash_mark *m;
    for (size_t i = 0; (m = crash_marks(t, n, i)) != NULL; i++) {
        if (m->what == FAILED) {
            d.dead[m->b] = true;
        } else if (m->what == COMMITTED) {
            d.step_of[m->b] = m->a;
            d.newest = m->b;
        } else {
            d.newest = 0;
            for (uint64_t v = 1; v < MAX_VERSIONS; v++)
                if (d.step_of[v] > m->a)
                    d.dead[v] = d.dead[v] || m->what == REWOUND;
                else if (d.step_of[v] && !d.dead[v])
                    d.newest = v;
        }
    }
    return d;
}

struct damage {
    char line[300];
};

static void first_line(void *arg, const char *line)
{
    struct damage *d = arg;
    if (!d->line[0])
        snprintf(d->line, sizeof d->line, "%s", line);
}

/* One listed step: whole, and one that may be there. */
static status *look_at(struct store *s, uint64_t step, const struct duty *d, uint64_t *version)
{
    struct damage found = { "" };
    struct verify_result r;
    struct metadata *m;
    TRY(commit_verify(s, step, first_line, &found, &r));
    if (r.damages)
        return ERR(CORRUPT, "a listed step is broken: %s", found.line);
    TRY(commit_read(s, step, &m));
    const struct meta_blob *b = metadata_blob(m, "crash", "version", -1);
    if (b)
        memcpy(version, b->data, sizeof *version);
    metadata_free(m);
    EXPECT(b && *version < MAX_VERSIONS);
    if (d->dead[*version])
        return ERR(CORRUPT, "step %llu is listed with version %llu, which had failed or was rewound",
                   (unsigned long long)step, (unsigned long long)*version);
    return NULL;
}

static status *read_back(struct comm *world, struct store *s, uint64_t newest_step, uint64_t version)
{
    tessera *t;
    struct fake f;
    uint64_t step;
    TRY(open_job(world, s, 0, true, &t));
    TRY(fake_open(&reader_cut, 0, &f));
    status *st = tessera_load_newest(t, f.state, &step);
    if (!st && step != newest_step)
        st = ERR(CORRUPT, "step %llu was loaded, not %llu", (unsigned long long)step, (unsigned long long)newest_step);
    if (!st)
        st = fake_check(&f, version);
    fake_close(&f);
    return status_first(st, tessera_close(t));
}

struct after {
    struct store *store;
    uint64_t step, version; /* newest listed; version 0: none */
};

static status *read_job(struct comm *world, void *arg)
{
    const struct after *a = arg;
    return read_back(world, a->store, a->step, a->version);
}

/* The next job of the root: takes the dead one's lease, loads, saves, and what it saved can be read. */
static status *next_job(struct comm *world, void *arg)
{
    const struct after *a = arg;
    tessera *t;
    struct fake f;
    uint64_t step = 0;
    bool good;
    struct fake_cut cut = { world->size, 1, true, false, reader_cut.shrink };
    TRY(open_job(world, a->store, 1, false, &t));
    TRY(fake_open(&cut, world->rank, &f));
    if (a->version) {
        TRY(tessera_load_newest(t, f.state, &step));
        EXPECT(step == a->step);
        TRY(fake_check(&f, a->version));
    } else {
        EXPECT_ERROR(tessera_load_newest(t, f.state, &step), NOT_FOUND, "no committed step");
    }
    TRY(save(world, NULL, t, &f, step + 1, MAX_VERSIONS - 1, &good));
    EXPECT(good);
    fake_close(&f);
    TRY(tessera_close(t));
    if (world->rank == 0) {
        struct step_list l;
        TRY(commit_list(a->store, &l));
        bool alone = l.count == 1 && l.step[0] == step + 1;
        step_list_free(&l);
        EXPECT(alone);
    }
    return NULL;
}

static status *look(struct store *s, const struct duty *d, struct after *out)
{
    struct step_list l;
    uint64_t newest = 0;
    *out = (struct after){ .store = s };
    TRY(commit_list(s, &l));
    status *st = NULL;
    for (size_t i = 0; i < l.count && !st; i++) {
        st = look_at(s, l.step[i], d, &out->version);
        out->step = l.step[i];
        newest = out->version > newest ? out->version : newest;
    }
    step_list_free(&l);
    if (!st && newest < d->newest)
        st = ERR(CORRUPT, "version %llu (step %llu) was committed and is gone; the newest is %llu",
                 (unsigned long long)d->newest, (unsigned long long)d->step_of[d->newest], (unsigned long long)newest);
    return st;
}

/* One crash, one way; some are also read back, and some go to the next job. */
static status *crash(const struct crash_trace *t, size_t n, enum crash_choice choice, uint64_t seed,
                     enum crash_broken broken)
{
    bool files = seed % 5 == 0;
    struct root r = root_open(files);
    struct after a;
    struct duty d = duty_of(t, n);
    status *st = crash_replay(t, n, choice, seed, broken, r.path, files ? NULL : r.store);
    if (!st)
        st = look(r.store, &d, &a);
    if (!st && a.version && seed % 3 == 0)
        st = comm_threads_run(1, read_job, &a);
    if (!st && seed % 29 == 0)
        st = comm_threads_run(2, next_job, &a);
    root_close(&r);
    return status_wrap(st, "crash at sync %zu of %zu, choice %d, seed %llu", n, crash_syncs(t), (int)choice,
                       (unsigned long long)seed);
}

/* Every path and its bytes, for comparing two directories. */
static uint64_t tree_hash(struct store *s, const char *dir)
{
    struct store_list l;
    uint64_t sum = 0;
    assert_ok(store_list(s, dir, &l));
    for (size_t i = 0; i < l.count; i++) {
        char key[STORE_KEY_BYTES];
        void *buf;
        size_t n;
        assert_true((size_t)snprintf(key, sizeof key, "%s%s%s", dir, *dir ? "/" : "", l.entry[i].name) < sizeof key);
        if (l.entry[i].info.is_dir) {
            sum += 1 + 3 * tree_hash(s, key);
            continue;
        }
        assert_ok(store_get_all(s, key, 1 << 28, &buf, &n));
        for (size_t k = 0; k < n; k++)
            sum = sum * 31 + ((unsigned char *)buf)[k];
        mem_free(buf);
        for (const char *p = key; *p; p++)
            sum = sum * 31 + (unsigned char)*p;
    }
    store_list_free(&l);
    return sum;
}

/* A job lives and dies in a child; its trace stays. */
static struct crash_trace *record(int size, int keep_last, uint64_t faults)
{
    struct root r = root_open(true);
    char *path = realpath(r.path, NULL);
    struct crash_trace *t;
    assert_non_null(path);
    assert_ok(crash_trace_new(&t));
    pid_t child = fork();
    if (child == 0) {
        struct job j = { .store = r.store, .trace = t, .cut = { size, 1, size == 3, false, reader_cut.shrink } };
        j.keep_last = keep_last;
        j.faults = faults;
        crash_record(t, path);
        status *st = comm_threads_run(size, life, &j);
        if (st)
            fprintf(stderr, "the recorded job: %s\n", status_message(st));
        _exit(st != NULL);
    }
    int rc;
    assert_true(child > 0 && waitpid(child, &rc, 0) == child && WIFEXITED(rc) && WEXITSTATUS(rc) == 0);
    free(path);
    /* the trace is all that happened */
    struct root again = root_open(true);
    assert_ok(crash_replay(t, crash_syncs(t), CRASH_KEEP, 1, CRASH_HONEST, again.path, NULL));
    assert_true(tree_hash(r.store, "") == tree_hash(again.store, ""));
    assert_true(crash_syncs(t) > 50);
    struct store_writer *w; /* where the file system takes direct writes, they were made, and are in the trace */
    assert_ok(store_writer_open(again.store, "x", 1 << 20, &w));
    if (store_writer_direct(w).offset)
        assert_true(crash_direct_writes(t) >= 8); /* a cancelled save may make none; four are committed at least */
    store_writer_abort(w);
    root_close(&again);
    root_close(&r);
    return t;
}

#ifdef __SANITIZE_THREAD__
enum { STRIDE = 16 }; /* looks for races, not for every sync */
#elif defined(__SANITIZE_ADDRESS__)
enum { STRIDE = 4 };
#else
enum { STRIDE = 1 };
#endif

static void every_sync(int size, int keep_last, uint64_t faults)
{
    struct crash_trace *t = record(size, keep_last, faults);
    for (size_t n = 0; n <= crash_syncs(t); n += STRIDE)
        for (int k = 0; k < CRASH_CHOICES + 2; k++) {
            enum crash_choice choice = k < CRASH_CHOICES ? (enum crash_choice)k : CRASH_ANY;
            assert_ok(crash(t, n, choice, n * (CRASH_CHOICES + 2) + (size_t)k, CRASH_HONEST));
        }
    crash_trace_free(t);
}

static void test_every_sync(void **state)
{
    (void)state;
    every_sync(1, 1, 1);
    every_sync(2, 2, 3);
    every_sync(3, 0, 2);
}

/* The same on a disk that lies: the test must see it. */
static void test_lying_disk(void **state)
{
    (void)state;
    struct crash_trace *t = record(2, 2, 1);
    for (enum crash_broken b = CRASH_FILES_NOT_SYNCED; b <= CRASH_DIRS_NOT_SYNCED; b++) {
        size_t seen = 0;
        for (size_t n = 0; n <= crash_syncs(t); n += 5)
            for (int choice = 0; choice < CRASH_CHOICES; choice++) {
                status *st = crash(t, n, (enum crash_choice)choice, n, b);
                seen += status_code(st) == ST_CORRUPT;
                status_free(st);
            }
        assert_true(seen > 10);
    }
    crash_trace_free(t);
}

/* ---- the store alone: what each call promised by returning */

enum act_kind { PUT, PUT_NEW, WRITER, REMOVE, REMOVE_TREE, MOVE };
struct act {
    enum act_kind kind;
    const char *key, *to;
};

static const struct act acts[] = {
    { PUT, "x", NULL },        { PUT, "a/b/c", NULL },      { WRITER, "a/b/d", NULL },  { PUT_NEW, "a/e/f/g", NULL },
    { PUT, "a/b/c", NULL },    { MOVE, "a/b", "h/i/j" },    { PUT, "x", NULL },         { REMOVE, "x", NULL },
    { WRITER, "a/b/c", NULL }, { PUT_NEW, "x", NULL },      { REMOVE_TREE, "h", NULL }, { MOVE, "a", "k" },
    { WRITER, "k/b/c", NULL }, { REMOVE, "k/e/f/g", NULL }, { PUT, "h/i/j/c", NULL },   { REMOVE_TREE, "k", NULL },
};
enum { ACTS = sizeof acts / sizeof *acts };
static const char *const act_keys[] = { "x",       "a/b/c", "a/b/d", "a/e/f/g", "h/i/j/c",
                                        "h/i/j/d", "k/b/c", "k/b/d", "k/e/f/g" };
enum { ACT_KEYS = sizeof act_keys / sizeof *act_keys, ACT_BYTES = 2000 };

static void act_bytes(int i, unsigned char b[ACT_BYTES])
{
    for (int k = 0; k < ACT_BYTES; k++)
        b[k] = (unsigned char)(1 + i * 13 + k * 7 % 101);
}

static const char *tail(const char *key, const char *dir)
{
    size_t n = strlen(dir);
    return !strncmp(key, dir, n) && key[n] == '/' ? key + n : NULL;
}

/* The act whose bytes `key` has once the first n acts are done; -1: it is not there. */
static int holds(const char *name, int n)
{
    char key[STORE_KEY_BYTES];
    snprintf(key, sizeof key, "%s", name);
    for (int i = n - 1; i >= 0; i--) {
        const struct act *a = &acts[i];
        bool same = !strcmp(a->key, key);
        if (same && a->kind <= WRITER)
            return i;
        if ((same && a->kind == REMOVE) || (tail(key, a->key) && (a->kind == REMOVE_TREE || a->kind == MOVE)))
            return -1;
        if (a->kind == MOVE && tail(key, a->to)) {
            char from[STORE_KEY_BYTES];
            snprintf(from, sizeof from, "%s%s", a->key, tail(key, a->to));
            memcpy(key, from, sizeof key);
        }
    }
    return -1;
}

static status *act(struct store *s, int i)
{
    const struct act *a = &acts[i];
    unsigned char b[ACT_BYTES];
    struct store_writer *w;
    act_bytes(i, b);
    switch (a->kind) {
    case PUT:
        return store_put(s, a->key, b, sizeof b, STORE_REPLACE);
    case PUT_NEW:
        return store_put(s, a->key, b, sizeof b, STORE_EXCLUSIVE);
    case WRITER:
        TRY(store_writer_open(s, a->key, sizeof b, &w));
        TRY(store_write(w, 1000, b + 1000, sizeof b - 1000));
        TRY(store_write(w, 0, b, 1000));
        return store_writer_finish(w);
    case REMOVE:
        return store_remove(s, a->key);
    case REMOVE_TREE:
        return store_remove_tree(s, a->key);
    case MOVE:
        return store_rename_tree(s, a->key, a->to);
    }
    return NULL;
}

/* `key` is as after `done` acts, or, while the next one was under way, as after that. */
static status *look_at_key(struct store *s, const char *key, int done, bool under_way)
{
    int before = holds(key, done), then = under_way ? holds(key, done + 1) : before;
    unsigned char want[2][ACT_BYTES];
    void *got;
    size_t n;
    act_bytes(before, want[0]);
    act_bytes(then, want[1]);
    status *st = store_get_all(s, key, 1 << 20, &got, &n);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return before < 0 || then < 0 ? NULL : ERR(CORRUPT, "%s is gone after act %d", key, done);
    }
    TRY(st);
    bool good =
        n == ACT_BYTES && ((before >= 0 && !memcmp(got, want[0], n)) || (then >= 0 && !memcmp(got, want[1], n)));
    mem_free(got);
    return good ? NULL : ERR(CORRUPT, "%s, %zu bytes: not what it was after act %d", key, n, done);
}

static status *store_crash(const struct crash_trace *t, size_t n, enum crash_choice choice, enum crash_broken broken)
{
    struct root r = root_open(true);
    int marks = 0;
    while (crash_marks(t, n, (size_t)marks))
        marks++;
    status *st = crash_replay(t, n, choice, n, broken, r.path, NULL);
    for (int k = 0; k < ACT_KEYS && !st; k++)
        st = look_at_key(r.store, act_keys[k], marks, marks < ACTS);
    root_close(&r);
    return status_wrap(st, "crash at sync %zu of %zu, choice %d", n, crash_syncs(t), (int)choice);
}

static void test_store_promises(void **state)
{
    (void)state;
    struct root r = root_open(true);
    char *path = realpath(r.path, NULL);
    struct crash_trace *t;
    assert_non_null(path);
    assert_ok(crash_trace_new(&t));
    crash_record(t, path);
    for (int i = 0; i < ACTS; i++) {
        assert_ok(act(r.store, i));
        crash_mark(t, 0, 0, 0);
    }
    crash_record(NULL, NULL);
    free(path);
    root_close(&r);
    size_t seen[3] = { 0 };
    for (enum crash_broken b = CRASH_HONEST; b <= CRASH_DIRS_NOT_SYNCED; b++)
        for (size_t n = 0; n <= crash_syncs(t); n++)
            for (int choice = 0; choice < CRASH_CHOICES; choice++) {
                status *st = store_crash(t, n, (enum crash_choice)choice, b);
                if (st && b == CRASH_HONEST)
                    print_error("%s\n", status_message(st));
                seen[b] += st != NULL;
                status_free(st);
            }
    assert_int_equal(seen[CRASH_HONEST], 0);
    assert_true(seen[CRASH_FILES_NOT_SYNCED] > 10 && seen[CRASH_DIRS_NOT_SYNCED] > 10);
    crash_trace_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_store_promises), cmocka_unit_test(test_every_sync),
                                        cmocka_unit_test(test_lying_disk) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
