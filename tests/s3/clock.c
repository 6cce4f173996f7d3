/* A clock that is off by hours, on a server that refuses such signatures: one refusal, and requests carry the server's
 * time from then on; also when the clock is moved under a handle. By tests/servers/with. */
#include "storage/store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

uint64_t __real_clock_wall_ns(void);
uint64_t __wrap_clock_wall_ns(void);
static int64_t off_s;

uint64_t __wrap_clock_wall_ns(void)
{
    return __real_clock_wall_ns() + (uint64_t)(off_s * 1000000000);
}

static void ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

/* Every kind of request; none is tried again. */
static void use(struct store *s)
{
    char back[6];
    struct store_info info;
    struct store_list list = { 0 };
    uint64_t before = s->retries;
    ok(store_put(s, "some/key", "bytes", 6, STORE_REPLACE));
    ok(store_get(s, "some/key", 0, back, sizeof back));
    assert_string_equal(back, "bytes");
    ok(store_stat(s, "some/key", &info));
    assert_int_equal(info.bytes, 6);
    ok(store_list(s, "some", &list));
    assert_int_equal(list.count, 1);
    store_list_free(&list);
    ok(store_remove(s, "some/key"));
    assert_int_equal(s->retries, before);
}

static struct store *open_with(int64_t off)
{
    struct store *s;
    off_s = off;
    ok(store_open(getenv("TESSERA_TEST_S3"), true, &s));
    return s;
}

static void test_off_from_the_start(void **state)
{
    (void)state;
    const int64_t off[] = { 2 * 3600, -2 * 3600, 40 * 86400, 0 };
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        struct store *s = open_with(off[i]);
        assert_int_equal(s->retries, off[i] != 0);
        use(s);
        store_close(s);
    }
}

/* The storage's clock is the server's, whatever ours shows. */
static void test_now(void **state)
{
    (void)state;
    struct store *s = open_with(5 * 3600);
    uint64_t server, here = __real_clock_wall_ns();
    ok(store_now(s, &server));
    assert_true(server + 60000000000ull > here && server < here + 60000000000ull);
    store_close(s);
}

static void test_moved(void **state)
{
    (void)state;
    struct store *s = open_with(0);
    struct store_info info;
    const int64_t moves[] = { 3 * 3600, 0, -3600 };
    use(s);
    for (size_t i = 0; i < 3; i++) {
        uint64_t before = s->retries;
        off_s = moves[i];
        ok(store_put(s, "moved", "x", 1, STORE_REPLACE));
        assert_int_equal(s->retries, before + 1);
        use(s);
    }
    ok(store_stat(s, "moved", &info));
    ok(store_remove(s, "moved"));
    store_close(s);
}

int main(void)
{
    if (!getenv("TESSERA_TEST_S3"))
        return 77;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_off_from_the_start),
        cmocka_unit_test(test_now),
        cmocka_unit_test(test_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
