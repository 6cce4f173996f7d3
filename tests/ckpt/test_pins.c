/* Readers' pins: what keeps a step, and what it refers to, from retention, rm and gc while it is read; for how long;
 * and what a load does when its step is lost all the same. */
#include "ckpt/ckpt.h"
#include "ckpt/pin.h"
#include "ckpt/refs.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utime.h>

#include <cmocka.h>

#include "tests/ckpt/ref_state.h"

static void pins_are(struct store *s, const char *want)
{
    struct step_list l;
    char have[128] = "";
    assert_ok(pins_read(s, false, &l));
    for (size_t i = 0; i < l.count; i++)
        snprintf(have + strlen(have), sizeof have - strlen(have), "%s%llu", i ? " " : "",
                 (unsigned long long)l.step[i]);
    step_list_free(&l);
    assert_string_equal(have, want);
}

static void retain(struct store *s, uint64_t newest, const char *left)
{
    assert_ok(commit_retain(s, newest, &(struct keep_rules){ .last = 1 }));
    steps_are(s, left);
}

/* A pin as a dead reader left it, so many seconds ago. */
static void old_pin(const struct root *r, const char *name, const char *text, int64_t seconds)
{
    char key[64], path[128];
    snprintf(key, sizeof key, "PINS/%s", name);
    assert_ok(store_put(r->store, key, text, strlen(text), STORE_REPLACE));
    snprintf(path, sizeof path, "%s/%s", r->path, key);
    uint64_t now;
    assert_ok(store_now(r->store, &now));
    time_t then = (time_t)((int64_t)(now / 1000000000u) - seconds);
    assert_int_equal(utime(path, &(struct utimbuf){ then, then }), 0);
}

static void test_pins(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct tessera_reference one = to(1);
    struct pin *p, *q;
    struct store_list l;
    put(1, (struct one_save){ r.store, { 0 }, 1, 1, 2, 3, 0 });
    put(1, (struct one_save){ r.store, { .w = &one }, 2, 0, 2, 3, 0 });
    put(1, (struct one_save){ r.store, { 0 }, 3, 1, 2, 3, 0 });
    put(1, (struct one_save){ r.store, { 0 }, 4, 1, 2, 3, 0 });
    assert_ok(pin_open(r.store, 2, 0, &p));
    assert_ok(pin_open(r.store, 2, 0, &q));
    assert_true(p && q && pin_step(p) == 2);
    pins_are(r.store, "2 2");
    retain(r.store, 4, "1 2 4"); /* the pinned one, and what owns bytes of it */
    expect_cli(r.path, "rm %s 2", ST_INVALID, "step 2 is being read: --force");
    pin_close(p);
    retain(r.store, 4, "1 2 4");
    pin_close(q);
    pins_are(r.store, "");
    assert_ok(store_list(r.store, "", &l));
    for (size_t i = 0; i < l.count; i++)
        assert_string_not_equal(l.entry[i].name, "PINS");
    store_list_free(&l);
    /* those of the dead, for as long as they said; what is no pin counts for nothing, and goes after a while */
    old_pin(&r, "a", "step=00000000000000000002 seconds=0000000100\n", 90);
    old_pin(&r, "b", "nonsense", 90);
    old_pin(&r, "c", "nonsense", 30);
    pins_are(r.store, "2");
    retain(r.store, 4, "1 2 4");
    assert_ok(store_list(r.store, "PINS", &l));
    assert_int_equal(l.count, 2); /* b is gone */
    store_list_free(&l);
    old_pin(&r, "a", "step=00000000000000000002 seconds=0000000100\n", 110);
    expect_cli(r.path, "gc %s --age=0 --dry-run", ST_OK, "");
    pins_are(r.store, "");
    retain(r.store, 4, "4");
    assert_ok(store_list(r.store, "PINS", &l));
    assert_int_equal(l.count, 1);
    store_list_free(&l);
    root_close(&r);
}

static void test_pin_is_renewed(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct pin *p;
    assert_ok(pin_open(r.store, 7, 1, &p));
    for (uint64_t end = clock_ns() + 2500000000u; clock_ns() < end; clock_sleep_us(50000))
        pins_are(r.store, "7");
    pin_close(p);
    pins_are(r.store, "");
    pin_close(NULL);
    root_close(&r);
}

static void test_gc_and_pins(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct pin *p;
    put(1, (struct one_save){ r.store, { 0 }, 1, 1, 2, 3, 0 });
    put(1, (struct one_save){ r.store, { 0 }, 2, 1, 2, 3, 0 });
    assert_ok(pin_open(r.store, 2, 0, &p));
    assert_ok(commit_retire(r.store, 2, "retired", 5));
    old_pin(&r, "dead", "step=00000000000000000001 seconds=0000000010\n", 11);
    struct gc_options o = { .age_seconds = 0 };
    struct gc_result sum;
    assert_ok(commit_gc(r.store, &o, NULL, NULL, &sum));
    assert_int_equal(sum.objects, 0);
    pin_close(p);
    assert_ok(commit_gc(r.store, &o, NULL, NULL, &sum));
    assert_int_equal(sum.objects, 1);
    steps_are(r.store, "1");
    expect_cli(r.path, "rm %s 1 --force", ST_OK, "");
    root_close(&r);
}

/* A root whose step 2 goes when its first file is read, and where step 3 is there then. Or one that takes no writes. */
struct moving {
    const struct store_ops *real;
    struct store_ops ops;
    atomic_flag moved;
    bool read_only;
    atomic_int puts;
};

static struct moving *moving_of(struct store *s)
{
    return (struct moving *)(void *)((char *)(size_t)s->ops - offsetof(struct moving, ops));
}

static status *moving_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    struct moving *f = moving_of(s);
    if (strncmp(key, "step-000000000002/model", 23) == 0 && !atomic_flag_test_and_set(&f->moved)) {
        TRY(f->real->rename_tree(s, "hidden", "step-000000000003"));
        TRY(f->real->remove(s, "step-000000000002/metadata.pb"));
        TRY(f->real->remove_tree(s, "step-000000000002"));
    }
    return f->real->get(s, key, offset, buf, n, got);
}

static status *moving_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    struct moving *f = moving_of(s);
    atomic_fetch_add(&f->puts, 1);
    return f->read_only ? ERR(IO, "put %s: read-only file system", key) : f->real->put(s, key, buf, n, mode);
}

static void move(struct moving *f, struct store *s, bool moved, bool read_only)
{
    *f = (struct moving){ .real = s->ops, .ops = *s->ops, .read_only = read_only };
    if (moved)
        (void)atomic_flag_test_and_set(&f->moved);
    f->ops.get = moving_get;
    f->ops.get_direct = NULL;
    f->ops.put = moving_put;
    s->ops = &f->ops;
}

static void test_lost_step(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int newest = 0; newest < 2; newest++) {
            struct root r = root_open(true);
            struct moving f;
            for (uint64_t step = 1; step <= 3; step++)
                put(ranks, (struct one_save){ r.store, { 0 }, step, step, step, step, 0 });
            assert_ok(store_rename_tree(r.store, "step-000000000003", "hidden"));
            move(&f, r.store, false, false);
            struct one_save third = { r.store, { 0 }, 3, 3, 3, 3, 0 }, second = { r.store, { 0 }, 2, 2, 2, 2, 0 };
            if (newest)
                assert_ok(comm_threads_run(ranks, newest_job, &third)); /* forward, not back to 1 */
            else
                assert_ok(expect_error(comm_threads_run(ranks, load_job, &second), ST_NOT_FOUND,
                                       "step 2 was removed while it was read", __FILE__, __LINE__));
            assert_true(atomic_load(&f.puts) > 0);
            pins_are(r.store, "");
            r.store->ops = f.real;
            root_close(&r);
        }
}

static status *pinned_job(struct comm *world, void *arg)
{
    struct one_save *x = arg;
    struct step_list l = { 0 };
    struct held h;
    tessera *t;
    uint64_t step;
    struct moving *f = moving_of(x->store);
    size_t want = f->read_only ? 0 : 1;
    TRY(open_in(world, x->store, true, 0, false, &t));
    TRY(held_open(world, &x->shape, &h));
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    TRY(comm_barrier(world));
    TRY(pins_read(x->store, false, &l));
    EXPECT(step == 3 && l.count == want && (!want || l.step[0] == 3));
    step_list_free(&l);
    TRY(comm_barrier(world));
    TRY(tessera_find(t, 2, &step)); /* the pin goes along */
    TRY(comm_barrier(world));
    TRY(pins_read(x->store, false, &l));
    EXPECT(step == 2 && l.count == want && (!want || l.step[0] == 2));
    step_list_free(&l);
    TRY(comm_barrier(world));
    TRY(tessera_load(t, h.state, 2));
    EXPECT(holds(&h, 2, 2, 2));
    TRY(comm_barrier(world));
    TRY(pins_read(x->store, false, &l));
    EXPECT(l.count == 0);
    step_list_free(&l);
    TRY(comm_barrier(world));
    TRY(tessera_find(t, TESSERA_NEWEST, &step)); /* and with the handle */
    held_close(&h);
    return tessera_close(t);
}

static void test_who_pins(void **state)
{
    (void)state;
    for (int read_only = 0; read_only < 2; read_only++) {
        struct root r = root_open(true);
        struct moving f;
        for (uint64_t step = 1; step <= 3; step++)
            put(2, (struct one_save){ r.store, { 0 }, step, step, step, step, 0 });
        move(&f, r.store, true, read_only);
        struct one_save x = { r.store, { 0 }, 3, 3, 3, 3, 0 };
        for (int ranks = 1; ranks <= 3; ranks++)
            assert_ok(comm_threads_run(ranks, pinned_job, &x));
        pins_are(r.store, "");
        r.store->ops = f.real;
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pins),      cmocka_unit_test(test_pin_is_renewed), cmocka_unit_test(test_gc_and_pins),
        cmocka_unit_test(test_lost_step), cmocka_unit_test(test_who_pins),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
