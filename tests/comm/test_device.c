/* device: the CPU's contract, and what asking for cuda says where there is no plugin, a broken one, or no GPU. With a
 * GPU and a plugin the same contract is checked there: `test_device cuda`, a test of its own, which counts as skipped
 * where the plugin was not built. `test_device open NAME` prints what device_open says (test_plugins.sh). */
#include "comm/base/mem.h"
#include "comm/device/device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { SKIPPED = 77 }; /* ctest's */

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

/* host -> device -> device -> host, through an event that a second stream waits for. */
static void check_round_trip(struct device *d)
{
    enum { N = 100003 };
    void *a, *b, *in, *out;
    struct stream *s1, *s2, *low;
    struct event *e;
    bool done = false;
    assert_ok(d->ops->alloc(d, N, &a));
    assert_ok(d->ops->alloc(d, N, &b));
    assert_ok(d->ops->alloc_pinned(d, N, &in));
    assert_ok(d->ops->alloc_pinned(d, N, &out));
    assert_int_equal((size_t)a % 4096, 0);
    assert_int_equal((size_t)b % 4096, 0);
    assert_ok(d->ops->stream_open(d, &s1));
    assert_ok(d->ops->stream_open(d, &s2));
    assert_ok(d->ops->stream_open_low(d, &low));
    assert_ok(d->ops->stream_sync(d, low));
    d->ops->stream_close(d, low);
    assert_ok(d->ops->event_open(d, &e));
    memset(out, 1, N);
    assert_ok(d->ops->copy(d, out, a, N, s1)); /* fresh memory is zero */
    assert_ok(d->ops->stream_sync(d, s1));
    for (size_t i = 0; i < N; i++)
        assert_int_equal(((unsigned char *)out)[i], 0);
    for (size_t i = 0; i < N; i++)
        ((unsigned char *)in)[i] = (unsigned char)(i * 7 + 1);
    assert_ok(d->ops->copy(d, a, in, N, s1));
    assert_ok(d->ops->event_record(d, e, s1));
    assert_ok(d->ops->stream_wait(d, s2, e));
    assert_ok(d->ops->copy(d, b, a, N, s2));
    assert_ok(d->ops->copy(d, out, b, N, s2));
    assert_ok(d->ops->copy(d, out, b, 0, s2));
    assert_ok(d->ops->event_record(d, e, s2));
    while (!done)
        assert_ok(d->ops->event_query(d, e, &done));
    assert_memory_equal(in, out, N);
    d->ops->event_close(d, e);
    d->ops->stream_close(d, s2);
    d->ops->stream_close(d, s1);
    d->ops->free_pinned(d, out, N);
    d->ops->free_pinned(d, in, N);
    d->ops->free(d, b, N);
    d->ops->free(d, a, N);
}

static void check_out_of_memory(struct device *d)
{
    void *p = NULL;
    for (int i = 0; i < 2; i++) { /* the second: the first left nothing behind */
        status *st = d->ops->alloc(d, (size_t)1 << 50, &p);
        assert_int_equal(status_code(st), ST_NO_MEMORY);
        assert_null(p);
        status_free(st);
    }
    assert_ok(d->ops->alloc(d, 1 << 20, &p));
    d->ops->free(d, p, 1 << 20);
}

/* Who can read what, where the device's memory is not the host's. */
static void check_places(struct device *d)
{
    void *own, *pinned;
    int local = 0;
    assert_ok(d->ops->alloc(d, 10000, &own));
    assert_ok(d->ops->alloc_pinned(d, 10000, &pinned));
    assert_true(d->ops->on_device(d, own));
    assert_true(d->ops->on_device(d, (char *)own + 9999));
    assert_false(d->ops->on_device(d, pinned));
    assert_false(d->ops->on_device(d, &local));
    assert_false(d->ops->on_device(d, NULL));
    d->ops->free_pinned(d, pinned, 10000);
    d->ops->free(d, own, 10000);
}

static void test_cpu(void **state)
{
    (void)state;
    struct device *d;
    assert_ok(device_open("cpu", 0, &d));
    assert_true(d->host);
    assert_string_equal(d->ops->name, "cpu");
    check_round_trip(d);
    device_close(d);
    device_close(NULL);
}

static void expect_error(status *st, enum status_code code, const char *words)
{
    assert_non_null(st);
    if (status_code(st) != code || !strstr(status_message(st), words))
        fail_msg("%s: %s", status_code_name(status_code(st)), status_message(st));
    status_free(st);
}

static void test_names(void **state)
{
    (void)state;
    struct device *d = NULL;
    expect_error(device_open("tpu", 0, &d), ST_INVALID, "\"tpu\" (there are: cpu, cuda)");
    expect_error(device_open("cpu", -1, &d), ST_INVALID, "-1");
    assert_null(d);
}

static void test_no_plugin(void **state)
{
    (void)state;
    struct device *d = NULL;
    char folder[] = "test_device_XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    assert_int_equal(setenv("TESSERA_PLUGINS", folder, 1), 0);
    expect_error(device_open("cuda", 0, &d), ST_UNSUPPORTED,
                 "cuda was asked for, but this program was built or installed");
    snprintf(path, sizeof path, "%s/tessera_cuda.so", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("not a library", f);
    fclose(f);
    expect_error(device_open("cuda", 0, &d), ST_UNSUPPORTED, "cannot be opened");
    unlink(path);
    rmdir(folder);
    assert_null(d);
}

static void test_cuda(void **state)
{
    (void)state;
    struct device *d = NULL;
    assert_int_equal(setenv("TESSERA_PLUGINS", "..", 0), 0);
    status *st = device_open("cuda", 0, &d);
    if (status_code(st) == ST_DEVICE) { /* no GPU: one clear error, and the handle untouched */
        expect_error(st, ST_DEVICE, "device: cuda was asked for, but");
        assert_null(d);
        return;
    }
    assert_ok(st);
    assert_false(d->host);
    check_round_trip(d);
    check_out_of_memory(d);
    check_places(d);
    check_round_trip(d); /* an error that was told is over */
    device_close(d);
    expect_error(device_open("cuda", 1000, &d), ST_DEVICE, "1000");
}

static int open_and_say(const char *name)
{
    struct device *d;
    status *st = device_open(name, 0, &d);
    printf("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    int code = status_exit_code(st);
    if (!st)
        device_close(d);
    status_free(st);
    return code;
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "open"))
        return open_and_say(argv[2]);
    const struct CMUnitTest cuda[] = { cmocka_unit_test(test_cuda) };
    if (argc > 1 && !strcmp(argv[1], "cuda"))
        return !getenv("TESSERA_PLUGINS") && access("../tessera_cuda.so", F_OK)
                   ? SKIPPED
                   : cmocka_run_group_tests(cuda, NULL, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_no_plugin),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
