/* The lease: one live attempt a root, over every store. Foreign hosts are made by editing a record; dead jobs are
 * children that were killed. */
#include "ckpt/commit.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "tests/support/test_root.h"

#include <fcntl.h>
#include <inttypes.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

struct fixture {
    char dir[FOLDER_BYTES], uri[TEST_URI_BYTES];
    struct store *s;
};

static void fixture_open(struct fixture *f, const struct store_ops *ops)
{
    folder_make(f->dir);
    store_test_uri(ops, f->dir, f->uri);
    OK(store_open(f->uri, true, &f->s));
}

static void fixture_close(struct fixture *f)
{
    store_close(f->s);
    folder_remove(f->dir);
}

static void each_store(void (*check)(struct fixture *f), const char *scheme)
{
    int run = 0;
    for (size_t i = 0; store_registry[i]; i++) {
        struct fixture f;
        if (!store_is_tested(store_registry[i]) || (scheme && strcmp(scheme, store_registry[i]->scheme) != 0))
            continue;
        fixture_open(&f, store_registry[i]);
        check(&f);
        fixture_close(&f);
        run++;
    }
    if (run == 0)
        skip(); /* a server, and a test of files */
}

static void epoch_key(uint64_t epoch, char key[STORE_KEY_BYTES])
{
    snprintf(key, STORE_KEY_BYTES, "LEASE/%010" PRIu64, epoch);
}

/* Replace the value of `field` in the record of an epoch; the record keeps its length. */
static status *edit(struct store *s, uint64_t epoch, const char *field, const char *value)
{
    char key[STORE_KEY_BYTES], head[64], fresh[600];
    void *buf;
    size_t n;
    epoch_key(epoch, key);
    TRY(store_get_all(s, key, sizeof fresh, &buf, &n));
    snprintf(head, sizeof head, "%s=", field);
    char *at = strstr(buf, head), *end = strchr(at, '\n');
    *at = 0;
    memset(fresh, ' ', sizeof fresh);
    int len = snprintf(fresh, sizeof fresh, "%s%s%s%s", (char *)buf, head, value, end);
    fresh[len] = ' ';
    fresh[n - 1] = '\n';
    status *st = store_put(s, key, fresh, n, STORE_REPLACE);
    mem_free(buf);
    return st;
}

static void expect_field(struct store *s, uint64_t epoch, const char *line, bool there)
{
    char key[STORE_KEY_BYTES];
    void *buf;
    size_t n;
    epoch_key(epoch, key);
    OK(store_get_all(s, key, 600, &buf, &n));
    assert_true(!!strstr(buf, line) == there);
    mem_free(buf);
}

static size_t epochs(struct store *s)
{
    struct store_list l;
    OK(store_list(s, "LEASE", &l));
    size_t n = l.count;
    store_list_free(&l);
    return n;
}

/* ---- One after another */

static void check_succession(struct fixture *f)
{
    struct lease a, b;
    char note[NOTE_BYTES], text[40];
    OK(lease_take(f->s, 0, &a, note));
    assert_string_equal(note, "");
    assert_true(a.attempt != 0 && a.run_id != 0);
    assert_int_equal(a.parent, 0);
    assert_int_equal(a.seconds, 30);
    assert_true(a.host[0] != 0);
    OK(lease_check(&a));

    uint64_t begin = clock_ns();
    snprintf(text, sizeof text, "%016" PRIx64, a.attempt);
    FAILS(ST_EXISTS, text, lease_take(f->s, 1, &b, note)); /* with attempt and host, and at once */
    FAILS(ST_EXISTS, a.host, lease_take(f->s, 1, &b, note));
    assert_true(clock_ns() - begin < 5000000000u);
    OK(lease_check(&a));

    expect_field(f->s, 1, "counter=00000000000000000001\n", true);
    OK(lease_renew(&a)); /* too early: nothing is written */
    expect_field(f->s, 1, "counter=00000000000000000001\n", true);
    a.renewed_ns -= 10000000001u; /* as if more than a third of 30 s had passed */
    uint64_t allocations = mem_count();
    OK(lease_renew(&a));
    if (strcmp(f->s->ops->name, "posix") == 0) /* a steady job renews between steps */
        assert_int_equal(mem_count(), allocations);
    expect_field(f->s, 1, "counter=00000000000000000002\n", true);
    assert_true(clock_ns() - a.renewed_ns < 5000000000u);
    OK(lease_check(&a));

    OK(lease_give_back(&a));
    OK(lease_take(f->s, 7, &b, note));
    assert_string_equal(note, ""); /* nobody died */
    assert_int_equal(b.run_id, a.run_id);
    assert_int_equal(b.parent, a.attempt);
    assert_true(b.attempt != a.attempt);
    assert_int_equal(b.seconds, 7);
    FAILS(ST_CANCELLED, "", lease_check(&a)); /* given back is given back */
    OK(lease_check(&b));
    assert_int_equal(epochs(f->s), 1); /* the old ones are removed */
    OK(lease_give_back(&b));
}

/* ---- Jobs on this host */

/* A child that takes the lease, says so, and waits to be killed; exits at once if it is told to. */
static pid_t job(const char *uri, bool exits)
{
    int said[2];
    assert_int_equal(pipe(said), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct store *s;
        struct lease l;
        char note[NOTE_BYTES];
        close(said[0]);
        status *st = store_open(uri, true, &s);
        if (!st)
            st = lease_take(s, 30, &l, note);
        if (st || write(said[1], "y", 1) != 1)
            _exit(1);
        while (!exits)
            pause();
        _exit(0);
    }
    char byte = 0;
    close(said[1]);
    assert_int_equal(read(said[0], &byte, 1), 1);
    close(said[0]);
    return pid;
}

static void check_jobs(struct fixture *f)
{
    struct lease a;
    char note[NOTE_BYTES], pid_text[32];
    pid_t pid = job(f->uri, true); /* gone without a word */
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT),
                     0); /* dead, but its parent has not looked yet */
    uint64_t begin = clock_ns();
    OK(lease_take(f->s, 30, &a, note));
    assert_true(clock_ns() - begin < 5000000000u); /* no wait for its 30 s */
    snprintf(pid_text, sizeof pid_text, " %d ", pid);
    assert_non_null(strstr(note, pid_text));
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    OK(lease_give_back(&a));

    pid = job(f->uri, false);
    FAILS(ST_EXISTS, "live", lease_take(f->s, 30, &a, note));
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    OK(lease_take(f->s, 30, &a, note));
    assert_true(note[0] != 0);
    assert_true(a.parent != 0);

    /* the pid is in use again, by a process that started at another time */
    struct lease b;
    OK(edit(f->s, a.epoch, "start", "1"));
    OK(lease_take(f->s, 30, &b, note));
    assert_true(note[0] != 0);
    /* the same numbers in another pid namespace, or after a reboot, say nothing about the process */
    static const char *const field[] = { "host", "boot", "pidns" };
    for (int i = 0; i < 3; i++) {
        OK(edit(f->s, b.epoch, field[i], "elsewhere"));
        OK(edit(f->s, b.epoch, "seconds", "1"));
        begin = clock_ns();
        OK(lease_take(f->s, 30, &b, note));
        assert_in_range(clock_ns() - begin, 800000000u, 10000000000u); /* it was watched for its second */
    }
}

/* ---- Jobs elsewhere */

static void check_expiry(struct fixture *f)
{
    struct lease zombie, a, b;
    char note[NOTE_BYTES], text[40];
    OK(lease_take(f->s, 1, &zombie, note));
    OK(edit(f->s, 1, "host", "far.away"));
    uint64_t begin = clock_ns();
    OK(lease_take(f->s, 30, &a, note));
    assert_in_range(clock_ns() - begin, 800000000u, 10000000000u);
    assert_non_null(strstr(note, "far.away"));
    assert_int_equal(a.parent, zombie.attempt);
    assert_int_equal(a.run_id, zombie.run_id);

    /* the zombie wakes */
    snprintf(text, sizeof text, "%016" PRIx64, a.attempt);
    FAILS(ST_CANCELLED, text, lease_check(&zombie));
    zombie.renewed_ns -= 1000000000u;
    FAILS(ST_CANCELLED, text, lease_renew(&zombie));
    OK(lease_give_back(&zombie));
    OK(lease_check(&a));
    /* it was stopped between its check and its write: what it writes is of an epoch that nobody looks at */
    char key[STORE_KEY_BYTES];
    void *record;
    size_t n;
    epoch_key(a.epoch, key);
    OK(store_get_all(f->s, key, 600, &record, &n));
    epoch_key(zombie.epoch, key);
    OK(store_put(f->s, key, record, n, STORE_REPLACE));
    mem_free(record);
    OK(edit(f->s, zombie.epoch, "released", "1"));
    OK(lease_check(&a));
    FAILS(ST_CANCELLED, "", lease_check(&zombie));
    FAILS(ST_EXISTS, text, lease_take(f->s, 1, &b, note));
    OK(lease_give_back(&a));
    OK(lease_take(f->s, 1, &b, note));
    assert_int_equal(b.parent, a.attempt);
    assert_int_equal(epochs(f->s), 1);

    OK(store_remove_tree(f->s, "LEASE")); /* by hand */
    FAILS(ST_CANCELLED, "", lease_check(&b));
    OK(lease_give_back(&b));
    assert_int_equal(epochs(f->s), 0);
    OK(lease_take(f->s, 1, &a, note));
    while (a.epoch < b.epoch) {
        OK(lease_give_back(&a));
        OK(lease_take(f->s, 1, &a, note));
    }
    assert_int_equal(a.epoch, b.epoch);
    FAILS(ST_CANCELLED, "", lease_check(&b)); /* the same number, another attempt */
    OK(lease_check(&a));
}

struct far_job {
    struct store *s;
    const char *field, *value;
};

static status *far_job(void *arg)
{
    const struct far_job *j = arg;
    clock_sleep_us(300000);
    return edit(j->s, 1, j->field, j->value);
}

/* A job elsewhere does something while its lease is watched. */
static void check_watch(struct fixture *f)
{
    struct lease far, a;
    char note[NOTE_BYTES];
    OK(lease_take(f->s, 20, &far, note));
    OK(edit(f->s, 1, "host", "far.away"));
    struct far_job j = { f->s, "counter", "00000000000000000002" };
    struct thread t;
    uint64_t begin = clock_ns();
    OK(thread_start(&t, "far", far_job, &j)); /* it renews: alive */
    FAILS(ST_EXISTS, "far.away", lease_take(f->s, 1, &a, note));
    OK(thread_join(&t));
    j = (struct far_job){ f->s, "released", "1" };
    OK(thread_start(&t, "far", far_job, &j)); /* it ends: nothing to wait for any longer */
    OK(lease_take(f->s, 1, &a, note));
    OK(thread_join(&t));
    assert_in_range(clock_ns() - begin, 600000000u, 15000000000u);
    assert_string_equal(note, "");
    assert_int_equal(a.parent, far.attempt);
}

static void make_old(const struct fixture *f, uint64_t epoch)
{
    char path[160];
    const struct timespec hour_ago[2] = { { time(NULL) - 3600, 0 }, { time(NULL) - 3600, 0 } };
    snprintf(path, sizeof path, "%s/LEASE/%010" PRIu64, f->dir, epoch);
    assert_int_equal(utimensat(AT_FDCWD, path, hour_ago, 0), 0);
}

static void check_old_and_unreadable(struct fixture *f)
{
    struct lease a, b;
    char note[NOTE_BYTES];
    static const char *const garbage[] = { "", "attempt=1\n", "not a lease at all" };
    for (size_t i = 0; i < 4; i++) {
        char big[2000], key[STORE_KEY_BYTES];
        memset(big, 'x', sizeof big);
        epoch_key(10 * i + 5, key);
        OK(store_put(f->s, key, i < 3 ? garbage[i] : big, i < 3 ? strlen(garbage[i]) : sizeof big, STORE_REPLACE));
        make_old(f, 10 * i + 5);
        OK(lease_take(f->s, 30, &a, note)); /* its age is all that is known */
        assert_non_null(strstr(note, "cannot be read"));
        assert_int_equal(a.epoch, 10 * i + 6);
        assert_true(a.run_id != 0 && a.parent == 0);
    }
    OK(store_put(f->s, "LEASE/people-put-this-here", "x", 1, STORE_REPLACE));
    OK(lease_check(&a));
    OK(edit(f->s, a.epoch, "host", "far.away"));
    make_old(f, a.epoch);
    uint64_t begin = clock_ns();
    OK(lease_take(f->s, 30, &b, note)); /* expired long ago: no wait */
    assert_true(clock_ns() - begin < 5000000000u);
    assert_non_null(strstr(note, "far.away"));
    make_old(f, b.epoch); /* old, but its process is here and lives */
    FAILS(ST_EXISTS, "", lease_take(f->s, 30, &a, note));
    b.renewed_ns -= 10000000001u;
    OK(lease_renew(&b));
    OK(lease_check(&b));
}

/* ---- Races */

enum { TAKERS = 6, ROUNDS = 15 };

struct taker {
    struct store *s;
    struct lease l;
    pthread_barrier_t *start;
    int won;
};

static status *race(void *arg)
{
    struct taker *k = arg;
    char note[NOTE_BYTES];
    pthread_barrier_wait(k->start);
    status *st = lease_take(k->s, 30, &k->l, note);
    k->won = !st;
    if (status_code(st) == ST_EXISTS) {
        status_free(st);
        st = NULL;
    }
    return st;
}

/* From no lease, one given back and a dead one, in turn: exactly one taker wins, and knows that it has. */
static void check_race(struct fixture *f)
{
    uint64_t last = 0;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, TAKERS);
        struct taker k[TAKERS];
        struct thread t[TAKERS];
        for (int i = 0; i < TAKERS; i++) {
            k[i] = (struct taker){ .s = f->s, .start = &start };
            OK(thread_start(&t[i], "taker", race, &k[i]));
        }
        int winners = 0, winner = -1;
        for (int i = 0; i < TAKERS; i++) {
            OK(thread_join(&t[i]));
            winners += k[i].won;
            winner = k[i].won ? i : winner;
        }
        pthread_barrier_destroy(&start);
        assert_int_equal(winners, 1);
        OK(lease_check(&k[winner].l));
        assert_int_equal(k[winner].l.parent, last);
        last = k[winner].l.attempt;
        if (round % 3 == 2) {
            OK(store_remove_tree(f->s, "LEASE"));
            last = 0;
        } else if (round % 3 == 1) {
            OK(edit(f->s, k[winner].l.epoch, "start", "1"));
        } else {
            OK(lease_give_back(&k[winner].l));
        }
    }
}

struct lagging {
    struct store_ops ops;
    const struct store_ops *real;
    int lists; /* how many are old */
};

/* What a listing said before epoch 2 was made, removed, and followed by 3. */
static status *old_list(struct store *s, const char *dir, struct store_list *out)
{
    struct lagging *g = (struct lagging *)(size_t)s->ops;
    if (g->lists-- > 0)
        return store_list_add(out, "0000000001", &(struct store_info){ 0 });
    return g->real->list(s, dir, out);
}

static void check_old_list(struct fixture *f)
{
    struct lease a, b;
    char note[NOTE_BYTES];
    OK(lease_take(f->s, 30, &a, note));
    OK(lease_give_back(&a));
    char key[STORE_KEY_BYTES];
    void *first;
    size_t n;
    epoch_key(1, key);
    OK(store_get_all(f->s, key, 600, &first, &n));
    OK(lease_take(f->s, 30, &a, note));
    OK(lease_give_back(&a));
    OK(lease_take(f->s, 30, &a, note));
    assert_int_equal(a.epoch, 3);
    OK(store_put(f->s, key, first, n, STORE_REPLACE));
    mem_free(first);

    struct lagging g = { .ops = *f->s->ops, .real = f->s->ops, .lists = 1 };
    g.ops.list = old_list;
    f->s->ops = &g.ops;
    FAILS(ST_EXISTS, "", lease_take(f->s, 30, &b, note)); /* it made epoch 2, saw 3, and took 2 back */
    assert_true(g.lists < 0);
    f->s->ops = g.real;
    OK(lease_check(&a));
    struct store_info info;
    epoch_key(2, key);
    FAILS(ST_NOT_FOUND, "", store_stat(f->s, key, &info));
}

static void test_succession(void **state)
{
    (void)state;
    each_store(check_succession, NULL);
}

static void test_jobs_on_this_host(void **state)
{
    (void)state;
    each_store(check_jobs, "file");
}

static void test_expiry(void **state)
{
    (void)state;
    each_store(check_expiry, NULL);
}

static void test_watch(void **state)
{
    (void)state;
    each_store(check_watch, NULL);
}

static void test_old_and_unreadable(void **state)
{
    (void)state;
    each_store(check_old_and_unreadable, "file");
}

static void test_race(void **state)
{
    (void)state;
    each_store(check_race, NULL);
}

static void test_old_list(void **state)
{
    (void)state;
    each_store(check_old_list, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_succession), cmocka_unit_test(test_jobs_on_this_host),  cmocka_unit_test(test_expiry),
        cmocka_unit_test(test_watch),      cmocka_unit_test(test_old_and_unreadable), cmocka_unit_test(test_race),
        cmocka_unit_test(test_old_list),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
