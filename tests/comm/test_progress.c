/* A thread that drives what is under way: the conformance suite over it, with ranks as threads; and over a backend made
 * up here, whose requests are done when the test says so, that it is that thread who finds them done, what of errors,
 * and who is told. */
#include "comm/base/mem.h"
#include "comm/progress.h"
#include "tests/support/comm_suite.h"
#include "tests/support/comm_threads.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

/* ---- ranks as threads ---- */

/* fn over a driven duplicate. */
static status *driven(struct comm *world, status *(*fn)(struct comm *, int), int arg)
{
    struct progress *p = NULL;
    struct comm *c = NULL;
    status *st = comm_dup(world, &c);
    if (!st)
        st = progress_open(&p);
    if (!st)
        st = progress_drive(p, &c);
    if (!st)
        st = fn(c, arg);
    comm_close(c);
    progress_close(p);
    return st;
}

static status *pass_suite(struct comm *c, int arg)
{
    (void)arg;
    if (c->size > 1 && strcmp(c->ops->name, "progress") != 0)
        return ERR(INTERNAL, "nothing drives %s", c->ops->name);
    return comm_suite_run(c);
}

static status *suite_rank(struct comm *world, void *arg)
{
    (void)arg;
    return driven(world, pass_suite, 0);
}

static void test_suite(void **state)
{
    (void)state;
    for (int size = 1; size <= 5; size++)
        assert_ok(comm_threads_run(size, suite_rank, NULL));
}

enum { ROUNDS = 300, IN_FLIGHT = 5, BYTES = 700 };

/* Requests on two communicators, some waited for as soon as they are started, some late, some looked at until done. */
static status *crowd(struct comm *c, int arg)
{
    (void)arg;
    struct comm *d;
    TRY(comm_dup(c, &d));
    for (int round = 0; round < ROUNDS; round++) {
        struct comm_req req[IN_FLIGHT];
        unsigned char in[IN_FLIGHT][BYTES], out[IN_FLIGHT][BYTES];
        int to = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size;
        for (int i = 0; i < IN_FLIGHT; i++) {
            memset(out[i], c->rank + round + i, BYTES);
            struct comm_xfer x[] = { { to, i, true, out[i], BYTES }, { from, i, false, in[i], BYTES } };
            TRY(comm_iexchange(i % 2 ? c : d, x, 2, NULL, &req[i]));
            if ((round + i + c->rank) % 4 == 0)
                TRY(comm_wait(&req[i]));
        }
        for (int i = IN_FLIGHT - 1; i >= 0; i--) {
            bool done = false;
            while ((round + i) % 3 == 0 && !done)
                TRY(comm_test(&req[i], &done));
            TRY(comm_wait(&req[i]));
            for (int b = 0; b < BYTES; b++)
                if (in[i][b] != (unsigned char)(from + round + i))
                    return ERR(INTERNAL, "round %d, message %d: byte %d is %d", round, i, b, in[i][b]);
        }
    }
    comm_close(d);
    return NULL;
}

static status *crowd_rank(struct comm *world, void *arg)
{
    (void)arg;
    return driven(world, crowd, 0);
}

static void test_crowd(void **state)
{
    (void)state;
    assert_ok(comm_threads_run(2, crowd_rank, NULL));
    assert_ok(comm_threads_run(4, crowd_rank, NULL));
}

/* The others are told of a rank that ends with an error, however they look. */
static status *one_fails(struct comm *c, int how)
{
    unsigned char a[8] = { 0 }, b[8];
    struct comm_req req;
    struct comm_xfer x = { 2, 0, false, b, 8 };
    if (c->rank == 2)
        return ERR(IO, "rank 2 has had enough");
    if (how % 2)
        TRY(comm_iallreduce(c, a, b, 8, COMM_U8, COMM_SUM, &req));
    else
        TRY(comm_iexchange(c, &x, 1, NULL, &req));
    bool done = how >= 2;
    while (!done)
        TRY(comm_test(&req, &done));
    TRY(comm_wait(&req));
    return ERR(INTERNAL, "rank %d was told nothing", c->rank);
}

static status *failing_rank(struct comm *world, void *arg)
{
    return driven(world, one_fails, *(int *)arg);
}

static void test_broken_job(void **state)
{
    (void)state;
    for (int how = 0; how < 4; how++) {
        status *st = comm_threads_run(4, failing_rank, &how);
        assert_int_equal(status_code(st), ST_IO);
        assert_int_equal(status_rank(st), 2);
        status_free(st);
    }
}

/* ---- a backend whose requests are done when the test says so ---- */

struct made_up {
    pthread_mutex_t lock;
    pthread_cond_t looked;
    pthread_t self;      /* who starts requests */
    bool done, fails;    /* what a look says */
    unsigned here, away; /* looks: by who starts requests, by another thread */
    unsigned after;      /* looks at a request that was done */
    bool over;
    int closed;
};

static status *made_up_iexchange(struct comm *c, const struct comm_xfer *x, size_t n, struct comm_req *req)
{
    (void)x;
    (void)n;
    req->impl = c->impl;
    return NULL;
}

static status *made_up_test(struct comm_req *req, bool *done)
{
    struct made_up *m = req->impl;
    pthread_mutex_lock(&m->lock);
    bool self = pthread_equal(pthread_self(), m->self), fails = m->fails;
    m->here += self;
    m->away += !self;
    m->after += m->over;
    m->over = *done = m->done || fails;
    pthread_cond_broadcast(&m->looked);
    pthread_mutex_unlock(&m->lock);
    return fails ? ERR(PEER, "the peer has died") : NULL;
}

static void made_up_close(struct comm *c)
{
    struct made_up *m = c->impl;
    m->closed++;
}

static const struct comm_ops made_up_ops = { .name = "made up",
                                             .iexchange = made_up_iexchange,
                                             .test = made_up_test,
                                             .close = made_up_close,
                                             .thread_multiple = true },
                             one_thread_ops = { .name = "one thread", .close = made_up_close };

struct one {
    pthread_t followed_on;
    int followed;
    struct made_up m;
    struct progress *p;
    struct comm *c;
    struct comm_req req;
};

static struct comm *new_comm(const struct comm_ops *ops, void *impl)
{
    struct comm *c = mem_calloc(1, sizeof *c);
    assert_non_null(c);
    *c = (struct comm){ .ops = ops, .size = 2, .impl = impl };
    return c;
}

static void set(struct made_up *m, bool done, bool fails)
{
    pthread_mutex_lock(&m->lock);
    m->done = done;
    m->fails = fails;
    pthread_mutex_unlock(&m->lock);
}

static void follow(void *arg)
{
    struct one *o = arg;
    o->followed_on = pthread_self();
    o->followed++;
}

static void start(struct one *o)
{
    char byte = 0;
    struct comm_xfer x = { 1, 0, true, &byte, 1 };
    o->m.over = false;
    assert_ok(comm_iexchange_then(o->c, &x, 1, NULL, follow, o, &o->req));
    assert_true(comm_pending(&o->req));
}

static void open_one(struct one *o)
{
    *o = (struct one){ .m = { .self = pthread_self() } };
    pthread_mutex_init(&o->m.lock, NULL);
    pthread_cond_init(&o->m.looked, NULL);
    o->c = new_comm(&made_up_ops, &o->m);
    assert_ok(progress_open(&o->p));
    assert_ok(progress_drive(o->p, &o->c));
}

static void close_one(struct one *o)
{
    comm_close(o->c);
    progress_close(o->p);
    assert_int_equal(o->m.closed, 1);
    assert_int_equal(o->m.after, 0);
    pthread_mutex_destroy(&o->m.lock);
    pthread_cond_destroy(&o->m.looked);
}

/* Until another thread has found it done, or failed: nobody here asks. */
static void until_found(struct made_up *m)
{
    pthread_mutex_lock(&m->lock);
    while (!m->over)
        pthread_cond_wait(&m->looked, &m->lock);
    pthread_mutex_unlock(&m->lock);
}

static void until_looked(struct made_up *m, unsigned times)
{
    pthread_mutex_lock(&m->lock);
    for (times += m->away; m->away < times;)
        pthread_cond_wait(&m->looked, &m->lock);
    pthread_mutex_unlock(&m->lock);
}

static void test_found_by_the_thread(void **state)
{
    (void)state;
    struct one o;
    open_one(&o);
    for (int round = 0; round < 20; round++) {
        bool done = false;
        set(&o.m, false, false);
        start(&o);
        until_looked(&o.m, 100); /* past the yields */
        assert_ok(comm_test(&o.req, &done));
        assert_false(done);
        set(&o.m, true, false);
        until_found(&o.m);
        if (round % 2)
            assert_ok(comm_wait(&o.req));
        while (!done && !(round % 2))
            assert_ok(comm_test(&o.req, &done));
        assert_false(comm_pending(&o.req));
        assert_true(o.c->flight_ns >= o.c->wait_ns);
        assert_int_equal(o.followed, round + 1);
        assert_false(pthread_equal(o.followed_on, pthread_self()));
    }
    assert_int_equal(o.m.here, 0);
    close_one(&o);
}

static void test_errors_reach_the_caller(void **state)
{
    (void)state;
    struct one o;
    open_one(&o);
    for (int waits = 0; waits < 2; waits++) {
        status *st = NULL;
        set(&o.m, false, false);
        start(&o);
        until_looked(&o.m, 1);
        set(&o.m, false, true);
        until_found(&o.m);
        if (waits)
            st = comm_wait(&o.req);
        for (bool done = false; !st && !done;)
            st = comm_test(&o.req, &done);
        assert_int_equal(status_code(st), ST_PEER);
        assert_false(comm_pending(&o.req));
        status_free(st);
    }
    set(&o.m, false, true); /* and one that a waiter may find itself */
    start(&o);
    status *st = comm_wait(&o.req);
    assert_int_equal(status_code(st), ST_PEER);
    status_free(st);
    assert_int_equal(o.followed, 0);
    close_one(&o);
}

/* After an error elsewhere what is under way stays so: closing waits for nobody, and no error is lost memory. */
static void test_closed_under_way(void **state)
{
    (void)state;
    for (int failed = 0; failed < 2; failed++) {
        struct one o;
        open_one(&o);
        start(&o);
        until_looked(&o.m, 1);
        if (failed) {
            set(&o.m, false, true);
            until_found(&o.m);
        }
        close_one(&o);
    }
}

static void test_left_as_it_is(void **state)
{
    (void)state;
    struct made_up m = { .closed = 0 };
    struct progress *p;
    struct comm *c = new_comm(&one_thread_ops, &m), *was = c, *none = NULL;
    assert_ok(progress_open(&p));
    status *st = progress_drive(p, &c);
    assert_int_equal(status_code(st), ST_UNSUPPORTED);
    status_free(st);
    assert_ok(progress_drive(NULL, &c));
    assert_ok(progress_drive(p, &none));
    c->size = 1;
    assert_ok(progress_drive(p, &c));
    assert_ptr_equal(c, was);
    assert_null(none);
    comm_close(c);
    assert_int_equal(m.closed, 1);
    progress_close(p);
    progress_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_suite),
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_broken_job),
        cmocka_unit_test(test_found_by_the_thread),
        cmocka_unit_test(test_errors_reach_the_caller),
        cmocka_unit_test(test_closed_under_way),
        cmocka_unit_test(test_left_as_it_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
