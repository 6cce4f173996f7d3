/* options: every type's good and bad texts, exact messages, suggestions, defaults, and texts that read back. */
#include "comm/base/mem.h"
#include "comm/base/options.h"

#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

struct settings {
    bool async;
    int64_t steps, any;
    double rate, free;
    char *url, *name;
    int kind;
    uint64_t buffer, limit;
    char *list;
};

#define ROW(field) .offset = offsetof(struct settings, field)
static const struct option rows[] = {
    { "async", OPT_BOOL, "true", 0, 0, NULL, "", "Save while training.", ROW(async) },
    { "steps", OPT_INT, "100", 1, 1e9, NULL, "steps", "How long.", ROW(steps) },
    { "any_int", OPT_INT, "-5", 0, 0, NULL, "", "Unbounded.", ROW(any) },
    { "rate", OPT_FLOAT, "3e-4", 0, 0.5, NULL, "", "Learning rate.", ROW(rate) },
    { "free", OPT_FLOAT, "-1.5", 0, 0, NULL, "", "Unbounded.", ROW(free) },
    { "url", OPT_STRING, NULL, 0, 0, NULL, "", "Where to.", ROW(url) },
    { "name", OPT_STRING, "", 0, 0, NULL, NULL, "What.", ROW(name) },
    { "kind", OPT_ENUM, "hinge", 0, 0, "sigmoid|hinge|ipo", "", "Which loss.", ROW(kind) },
    { "buffer", OPT_SIZE, "64KiB", 0, 0, NULL, "bytes", "Staging.", ROW(buffer) },
    { "limit", OPT_SIZE, "1M", 4096, 1073741824, NULL, "bytes", "Most.", ROW(limit) },
    { "list", OPT_LIST, "", 0, 0, NULL, "", "Words.", ROW(list) },
};
static const struct option_table table = { "train", rows, sizeof rows / sizeof *rows };
static const struct option_table top = { "", rows, sizeof rows / sizeof *rows };

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

static void set(struct settings *s, const char *key, const char *text)
{
    assert_ok(options_set(&table, key, text, s, "a.yaml:1"));
}

/* The text is refused with this message, and the struct is not touched. */
static void refuse(const char *key, const char *text, const char *message)
{
    struct settings s, before;
    memset(&s, 0x5a, sizeof s);
    s.url = s.name = NULL;
    before = s;
    status *st = options_set(&table, key, text, &s, "configs/a.yaml:12");
    assert_int_equal(status_code(st), ST_INVALID);
    assert_string_equal(status_message(st), message);
    assert_memory_equal(&s, &before, sizeof s);
    status_free(st);
}

static void test_lists(void **state)
{
    (void)state;
    static const char *const text[][2] = { { "", "" },
                                           { "a", "a" },
                                           { "a,b", "a,b" },
                                           { " a , b", "a,b" },
                                           { "[3, 5, 4]", "3,5,4" },
                                           { "[\"*.q_proj\", '*.v_proj']", "*.q_proj,*.v_proj" },
                                           { "[]", "" },
                                           { "a,", "a," },
                                           { "[ab]*,*[cd]", "[ab]*,*[cd]" },
                                           { "[[ab]*,*[cd]]", "[ab]*,*[cd]" },
                                           { "[a", "[a" },
                                           { "\"a\"", "\"a\"" },
                                           { "[", "[" } };
    struct settings s;
    memset(&s, 0, sizeof s);
    assert_ok(options_defaults(&table, &s));
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        set(&s, "list", text[i][0]);
        assert_string_equal(s.list, text[i][1]);
    }
    options_fini(&table, &s);
}

static void test_defaults(void **state)
{
    (void)state;
    struct settings s;
    memset(&s, 0x5a, sizeof s);
    assert_ok(options_defaults(&table, &s));
    assert_true(s.async);
    assert_int_equal(s.steps, 100);
    assert_int_equal(s.any, -5);
    assert_true(s.rate > 2.99999e-4 && s.rate < 3.00001e-4);
    assert_null(s.url); /* required: zero */
    assert_string_equal(s.name, "");
    assert_int_equal(s.kind, 1);
    assert_int_equal(s.buffer, 65536);
    assert_int_equal(s.limit, 1048576);
    set(&s, "url", "file:///a");
    set(&s, "url", "file:///b"); /* the first is freed */
    assert_string_equal(s.url, "file:///b");
    options_fini(&table, &s);
    assert_null(s.url);
    assert_null(s.name);
    options_fini(&table, &s);
}

static void test_good(void **state)
{
    (void)state;
    struct settings s = { 0 };
    static const struct {
        const char *text;
        bool v;
    } bools[] = { { "true", true },   { "on", true },   { "yes", true },
                  { "false", false }, { "off", false }, { "no", false } };
    for (size_t i = 0; i < 6; i++) {
        s.async = !bools[i].v;
        set(&s, "async", bools[i].text);
        assert_int_equal(s.async, bools[i].v);
    }
    static const struct {
        const char *text;
        uint64_t v;
    } sizes[] = { { "0", 0 },
                  { "4096", 4096 },
                  { "7B", 7 },
                  { "64K", 65536 },
                  { "64k", 65536 },
                  { "64KB", 65536 },
                  { "64KiB", 65536 },
                  { "16MiB", 16777216 },
                  { "16M", 16777216 },
                  { "3MB", 3145728 },
                  { "2GiB", 2147483648u },
                  { "2G", 2147483648u },
                  { "5GB", 5368709120u },
                  { "1T", (uint64_t)1 << 40 },
                  { "18446744073709551615", UINT64_MAX },
                  { "17179869183G", (uint64_t)17179869183u << 30 } };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        set(&s, "buffer", sizes[i].text);
        assert_int_equal(s.buffer, sizes[i].v);
    }
    set(&s, "steps", "1");
    assert_int_equal(s.steps, 1);
    set(&s, "steps", "1000000000");
    assert_int_equal(s.steps, 1000000000);
    set(&s, "any_int", "-9223372036854775808");
    assert_int_equal(s.any, INT64_MIN);
    set(&s, "any_int", "+9223372036854775807");
    assert_int_equal(s.any, INT64_MAX);
    set(&s, "rate", "0");
    set(&s, "rate", ".5");
    assert_true(s.rate >= 0.5 && s.rate <= 0.5);
    set(&s, "free", "-1E3");
    assert_true(s.free >= -1000 && s.free <= -1000);
    static const char *const kinds[] = { "sigmoid", "hinge", "ipo" };
    for (int i = 0; i < 3; i++) {
        set(&s, "kind", kinds[i]);
        assert_int_equal(s.kind, i);
    }
    set(&s, "limit", "4K");
    set(&s, "limit", "1G");
}

static void test_bad(void **state)
{
    (void)state;
    static const char *const not_int[] = { "abc", "", "1.5", "1e3", "0x10", " 1", "1 ", "-", "+", "--1", "1k" };
    char want[300];
    for (size_t i = 0; i < sizeof not_int / sizeof *not_int; i++) {
        snprintf(want, sizeof want, "configs/a.yaml:12: train.steps: \"%s\" is not an integer (legal: 1 to 1e9)",
                 not_int[i]);
        refuse("steps", not_int[i], want);
    }
    static const char *const outside[] = { "0", "-1", "1000000001", "9223372036854775808", "-99999999999999999999" };
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++) {
        snprintf(want, sizeof want, "configs/a.yaml:12: train.steps: \"%s\" is out of range (legal: 1 to 1e9)",
                 outside[i]);
        refuse("steps", outside[i], want);
    }
    refuse("any_int", "9223372036854775808",
           "configs/a.yaml:12: train.any_int: \"9223372036854775808\" is out of range (legal: any 64-bit integer)");
    refuse("async", "True",
           "configs/a.yaml:12: train.async: \"True\" is not a boolean (legal: true, false, on, off, yes, no)");
    static const char *const not_float[] = { "", "x", "nan", "inf", "0x1", "1e", "1.2.3", " 1", "1 ", "e5", "-" };
    for (size_t i = 0; i < sizeof not_float / sizeof *not_float; i++) {
        snprintf(want, sizeof want, "configs/a.yaml:12: train.rate: \"%s\" is not a number (legal: 0 to 0.5)",
                 not_float[i]);
        refuse("rate", not_float[i], want);
    }
    refuse("rate", "0.51", "configs/a.yaml:12: train.rate: \"0.51\" is out of range (legal: 0 to 0.5)");
    refuse("rate", "-1e-9", "configs/a.yaml:12: train.rate: \"-1e-9\" is out of range (legal: 0 to 0.5)");
    refuse("free", "1e999", "configs/a.yaml:12: train.free: \"1e999\" is out of range (legal: any finite number)");
    static const char *const not_size[] = { "", "K", "4Q", "4KK", "-4", "4.5K", "4 K", "4Ki", "KiB", "4KiBs", "4i" };
    for (size_t i = 0; i < sizeof not_size / sizeof *not_size; i++) {
        snprintf(
            want, sizeof want,
            "configs/a.yaml:12: train.buffer: \"%s\" is not a size (legal: bytes, written like 4096, 64K, 16MiB, 2GiB)",
            not_size[i]);
        refuse("buffer", not_size[i], want);
    }
    static const char *const too_big[] = { "18446744073709551616", "17179869184G", "18014398509481984K", "16777216T" };
    for (size_t i = 0; i < sizeof too_big / sizeof *too_big; i++) {
        snprintf(want, sizeof want,
                 "configs/a.yaml:12: train.buffer: \"%s\" is out of range (legal: bytes, written like 4096, 64K, "
                 "16MiB, 2GiB)",
                 too_big[i]);
        refuse("buffer", too_big[i], want);
    }
    refuse("limit", "4095",
           "configs/a.yaml:12: train.limit: \"4095\" is out of range (legal: 4KiB to 1GiB, written like 4096, 64K, "
           "16MiB)");
}

static void test_choices(void **state)
{
    (void)state;
    refuse("kind", "xyz",
           "configs/a.yaml:12: train.kind: \"xyz\" is not one of its choices (legal: sigmoid, hinge, ipo)");
    refuse("kind", "hing",
           "configs/a.yaml:12: train.kind: \"hing\" is not one of its choices; did you mean \"hinge\"? (legal: "
           "sigmoid, hinge, ipo)");
    static const char *const near[] = { "", "hingee", "sigmoid|hinge", "ip", "Hinge", "|" };
    for (size_t i = 0; i < sizeof near / sizeof *near; i++) {
        struct settings s = { 0 };
        status *st = options_set(&table, "kind", near[i], &s, NULL);
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
}

static void test_unknown_keys(void **state)
{
    (void)state;
    const char *all = "async, steps, any_int, rate, free, url, name, kind, buffer, limit, list";
    static const struct {
        const char *key, *hint;
    } cases[] = { { "setps", "steps" },  { "step", "steps" }, { "stepss", "steps" },
                  { "bufer", "buffer" }, { "urls", "url" },   { "raet", "rate" },
                  { "zzzzzz", NULL },    { "", NULL },        { "xx", NULL } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char want[400], hint[64] = "";
        if (cases[i].hint)
            snprintf(hint, sizeof hint, "; did you mean \"%s\"?", cases[i].hint);
        snprintf(want, sizeof want, "configs/a.yaml:12: train.%s: unknown key%s (legal in train: %s)", cases[i].key,
                 hint, all);
        refuse(cases[i].key, "1", want);
    }
    status *st = options_set(&top, "stepz", "1", NULL, NULL); /* no place, no section */
    char want[300];
    snprintf(want, sizeof want, "stepz: unknown key; did you mean \"steps\"? (legal: %s)", all);
    assert_string_equal(status_message(st), want);
    status_free(st);
    char longest[500];
    memset(longest, 'k', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    st = options_set(&top, longest, "1", NULL, "");
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    assert_null(options_find(&table, "stepz"));
    assert_ptr_equal(options_find(&table, "limit"), &rows[9]);
}

/* The message of a section with very many keys still ends well. */
static void test_many_keys(void **state)
{
    (void)state;
    static char keys[200][24];
    static struct option many[200];
    for (int i = 0; i < 200; i++) {
        snprintf(keys[i], sizeof keys[i], "an_option_number_%d", i);
        many[i] = (struct option){ .key = keys[i], .type = OPT_INT, .help = "" };
    }
    struct option_table t = { "s", many, 200 };
    int64_t v;
    status *st = options_set(&t, "an_option_nubmer_7", "1", &v, "x");
    const char *m = status_message(st);
    assert_non_null(strstr(m, "did you mean \"an_option_number_7\"?"));
    assert_string_equal(m + strlen(m) - 6, ", ...)");
    status_free(st);
}

/* What options_get writes, options_set reads as the same value. */
static void test_round_trip(void **state)
{
    (void)state;
    struct settings a = { 0 }, b = { 0 };
    char text[64];
    static const double floats[] = { 0,       1,      100,     -2.5,          3e-4,         1e9,
                                     1e-5,    0.1,    1.0 / 3, 123456789.125, 1e300,        5e-324,
                                     DBL_MAX, 999999, 1000000, 1234567,       6.02214076e23 };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        a.free = floats[i];
        options_get(&table, "free", &a, text, sizeof text);
        set(&b, "free", text);
        assert_memory_equal(&a.free, &b.free, sizeof a.free);
    }
    static const uint64_t sizes[] = {
        0, 1, 1000, 1024, 1536, 65536, 1048577, (uint64_t)3 << 30, (uint64_t)1 << 50, UINT64_MAX
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        a.buffer = sizes[i];
        options_get(&table, "buffer", &a, text, sizeof text);
        set(&b, "buffer", text);
        assert_int_equal(a.buffer, b.buffer);
    }
    a = (struct settings){ .async = true, .any = INT64_MIN, .kind = 2 };
    static const struct {
        const char *key, *text;
    } want[] = { { "async", "true" }, { "any_int", "-9223372036854775808" },
                 { "kind", "ipo" },   { "url", "" },
                 { "nothing", "" },   { "buffer", "0" } };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        options_get(&table, want[i].key, &a, text, sizeof text);
        assert_string_equal(text, want[i].text);
    }
    a.rate = 3e-4;
    options_get(&table, "rate", &a, text, sizeof text);
    assert_string_equal(text, "0.0003");
    a.buffer = 65536;
    options_get(&table, "buffer", &a, text, sizeof text);
    assert_string_equal(text, "64KiB");
}

static void test_help(void **state)
{
    (void)state;
    char text[4096] = "";
    FILE *f = tmpfile();
    assert_non_null(f);
    options_help(&table, f);
    rewind(f);
    size_t n = fread(text, 1, sizeof text - 1, f), lines = 0;
    fclose(f);
    for (size_t i = 0; i < n; i++)
        lines += text[i] == '\n';
    assert_int_equal(lines, table.count);
    assert_non_null(strstr(text, "train.steps"));
    assert_non_null(strstr(text, "default 100; 1 to 1e9; in steps: How long."));
    assert_non_null(strstr(text, "required; any text: Where to."));
    assert_non_null(strstr(text, "sigmoid, hinge, ipo"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lists),     cmocka_unit_test(test_defaults),   cmocka_unit_test(test_good),
        cmocka_unit_test(test_bad),       cmocka_unit_test(test_choices),    cmocka_unit_test(test_unknown_keys),
        cmocka_unit_test(test_many_keys), cmocka_unit_test(test_round_trip), cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
