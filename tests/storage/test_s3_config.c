/* Settings and credentials for S3: which source wins, files with mistakes, the provider command at its worst, renewal,
 * URLs, and that no secret is in any message of this test or in memory that was freed. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "storage/s3_config.h"
#include "storage/s3_ini.h"
#include "storage/s3_provider.h"
#include "tests/support/test_root.h"

#include <fcntl.h>
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

extern char **environ;

#define SECRET "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
#define TOKEN  "FwoGZXIvYXdzEJr8f4kqhN"

static char home[FOLDER_BYTES];
static int leaked; /* blocks that were freed with a secret in them */

void __real_mem_free(void *p);
void __wrap_mem_free(void *p)
{
    size_t n = p ? malloc_usable_size(p) : 0;
    if (n && (memmem(p, n, SECRET, strlen(SECRET)) || memmem(p, n, TOKEN, strlen(TOKEN))))
        leaked++;
    __real_mem_free(p);
}

static uint64_t later_ns; /* how far the wall clock is ahead */

uint64_t __real_clock_wall_ns(void);
uint64_t __wrap_clock_wall_ns(void)
{
    return __real_clock_wall_ns() + later_ns;
}

static void wait_until(int64_t seconds) /* after the test's start, for the code that is tested */
{
    later_ns = (uint64_t)seconds * 1000000000u;
}

/* As FAILS, and no secret is in the message. */
static void refused(status *st, enum status_code want, const char *words, const char *what)
{
    const char *says = status_message(st);
    if (status_code(st) != want || !strstr(says, words))
        fail_msg("%s: %s: %s\n    instead of %s with \"%s\"", what, status_code_name(status_code(st)), says,
                 status_code_name(want), words);
    if (strstr(says, SECRET) || strstr(says, TOKEN))
        fail_msg("%s: a secret in: %s", what, says);
    status_free(st);
}
#define REFUSED(want, words, expr) refused(expr, want, words, #expr)

static void put_file(const char *name, const char *text, mode_t mode)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", home, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode); /* a FILE's buffer would hold secrets when it is freed */
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    assert_int_equal(close(fd), 0);
    assert_int_equal(chmod(path, mode), 0);
}

/* NULL: there is none. */
static void put_settings(const char *config, const char *credentials)
{
    char path[256];
    snprintf(path, sizeof path, "%s/.aws", home);
    mkdir(path, 0700);
    const char *text[] = { config, credentials }, *name[] = { ".aws/config", ".aws/credentials" };
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", home, name[i]);
        unlink(path);
        if (text[i])
            put_file(name[i], text[i], 0600);
    }
}

static void clear_environment(void)
{
    char name[128];
    for (char **e = environ; *e;) {
        size_t n = strcspn(*e, "=");
        if ((strncmp(*e, "AWS_", 4) == 0 || strncmp(*e, "TESSERA_S3_", 11) == 0) && n < sizeof name) {
            memcpy(name, *e, n);
            name[n] = 0;
            unsetenv(name);
            e = environ;
        } else {
            e++;
        }
    }
}

/* "NAME=value NAME=value" */
static void set_environment(const char *text)
{
    char buf[1024], *save, *word;
    snprintf(buf, sizeof buf, "%s", text ? text : "");
    for (word = strtok_r(buf, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *equals = strchr(word, '=');
        *equals = 0;
        setenv(word, equals + 1, 1);
    }
}

static int start(void **state)
{
    (void)state;
    folder_make(home);
    clear_environment();
    setenv("HOME", home, 1);
    put_settings(NULL, NULL);
    leaked = 0;
    later_ns = 0;
    return 0;
}

static int stop(void **state)
{
    (void)state;
    folder_remove(home);
    assert_int_equal(leaked, 0);
    return 0;
}

static void open_bucket(struct s3_config *c)
{
    OK(s3_config_open("//bucket/runs", c));
}

static void expect_keys(struct s3_config *c, const char *access, const char *token)
{
    struct s3_keys k;
    OK(s3_config_keys(c, &k));
    assert_string_equal(k.access_key, access);
    assert_string_equal(k.secret_key, SECRET);
    assert_string_equal(k.session_token, token);
    s3_keys_wipe(&k);
    assert_int_equal(k.secret_key[0], 0);
}

/* ---- Where settings come from */

#define KEYS(access) "aws_access_key_id = " access "\naws_secret_access_key = " SECRET "\n"
#define ENV(access)  "AWS_ACCESS_KEY_ID=" access " AWS_SECRET_ACCESS_KEY=" SECRET " "
#define PROCESS                                                                                                        \
    "credential_process = printf '{\"Version\":1,\"AccessKeyId\":\"COMMAND\",\"SecretAccessKey\":\"" SECRET "\"}'\n"

static const struct row {
    const char *env, *config, *credentials, *origin, *region, *access, *token;
} precedence[] = {
    /* the environment before files, the more special before the more general */
    { ENV("E") "AWS_REGION=r1 AWS_DEFAULT_REGION=r2", "[default]\nregion=r3\n" KEYS("F"), "[default]\n" KEYS("C"), NULL,
      "r1", "E", "" },
    { ENV("E") "AWS_DEFAULT_REGION=r2 AWS_SESSION_TOKEN=" TOKEN, "[default]\nregion=r3\n", NULL, NULL, "r2", "E",
      TOKEN },
    { "", "[default]\nregion=r3\n" KEYS("F"), "[default]\n" KEYS("C"), NULL, "r3", "C", "" },
    { "", "[default]\nregion=r3\n" KEYS("F"), "[default]\nregion=r4\n", NULL, "r4", "F", "" },
    { "", "[default]\n" KEYS("F") PROCESS, "[default]\n" KEYS("C"), NULL, "us-east-1", "C", "" },
    { "", "[default]\n" KEYS("F") PROCESS, NULL, NULL, "us-east-1", "COMMAND", "" },
    { "", NULL, "[default]\n" PROCESS, NULL, "us-east-1", "COMMAND", "" },
    { "", NULL, "[default]\n" KEYS("C") "aws_session_token=" TOKEN "\n", NULL, "us-east-1", "C", TOKEN },
    /* an empty variable is not set; a token of the environment does not go with a file's keys */
    { "AWS_ACCESS_KEY_ID= AWS_SECRET_ACCESS_KEY= AWS_REGION= AWS_SESSION_TOKEN=" TOKEN, NULL, "[default]\n" KEYS("C"),
      NULL, "us-east-1", "C", "" },
    /* profiles */
    { "AWS_PROFILE=x", "[default]\nregion=no\n[profile x]\nregion=yes\n[profile y]\nregion=no\n",
      "[default]\n" KEYS("D") "[x]\n" KEYS("X") "[y]\n" KEYS("Y"), NULL, "yes", "X", "" },
    { "AWS_PROFILE=x AWS_DEFAULT_PROFILE=y", "[profile \"x\"]\nregion=yes\n", "[y]\n[x]\n" KEYS("X"), NULL, "yes", "X",
      "" },
    { "AWS_PROFILE=x", "[profile x]\nregion = one\n[default]\n[profile x]\nREGION = two # and more\n" KEYS("X"), NULL,
      NULL, "two", "X", "" },
    { "", "[profile default]\nregion = long\n" KEYS("L") "[default]\nregion = short\n" KEYS("S"), NULL, NULL, "long",
      "L", "" },
    { "AWS_PROFILE=x " ENV("E"), "[profile x]\nregion=yes\n", "[x]\n" KEYS("X"), NULL, "yes", "E", "" },
    /* text: byte order mark, carriage returns, comments, blanks, no newline at the end */
    { "", "\xef\xbb\xbf; a comment\r\n[default] # one\r\n\r\nregion\t=\tr5 ; two\r\noutput = json\r\n" KEYS("F") "z=",
      NULL, NULL, "r5", "F", "" },
    /* endpoints */
    { ENV("E") "AWS_ENDPOINT_URL_S3=http://s.example AWS_ENDPOINT_URL=http://g.example",
      "[default]\nendpoint_url = http://p.example\n", NULL, "http://s.example", "us-east-1", "E", "" },
    { ENV("E") "AWS_ENDPOINT_URL=http://g.example", "[default]\nendpoint_url = http://p.example\n", NULL,
      "http://g.example", "us-east-1", "E", "" },
    { ENV("E"),
      "[default]\nendpoint_url = http://p.example\nservices = o\n"
      "[services o]\ndynamodb =\n  endpoint_url = http://d.example\ns3 =\n  # this one\n  endpoint_url = "
      "http://v.example\n",
      NULL, "http://v.example", "us-east-1", "E", "" },
    { ENV("E"), "[default]\nendpoint_url = http://p.example\ns3 =\n  endpoint_url = http://n.example\n", NULL,
      "http://n.example", "us-east-1", "E", "" },
    { ENV("E"), "[default]\nendpoint_url = https://p.example:8443/s3/\n", NULL, "https://p.example:8443", "us-east-1",
      "E", "" },
    { ENV("E") "AWS_ENDPOINT_URL=http://g.example AWS_IGNORE_CONFIGURED_ENDPOINT_URLS=true AWS_REGION=eu-west-3", NULL,
      NULL, "https://bucket.s3.eu-west-3.amazonaws.com", "eu-west-3", "E", "" },
    { ENV("E") "AWS_REGION=cn-north-1", NULL, NULL, "https://bucket.s3.cn-north-1.amazonaws.com.cn", "cn-north-1", "E",
      "" },
};

static void test_precedence(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof precedence / sizeof *precedence; i++) {
        const struct row *r = &precedence[i];
        struct s3_config c;
        clear_environment();
        put_settings(r->config, r->credentials);
        set_environment(r->env);
        print_message("row %zu\n", i);
        open_bucket(&c);
        assert_string_equal(c.bucket, "bucket");
        assert_string_equal(c.prefix, "runs");
        assert_string_equal(c.region, r->region);
        if (r->origin)
            assert_string_equal(c.origin, r->origin);
        expect_keys(&c, r->access, r->token);
        s3_config_close(&c);
    }
}

static void test_file_names(void **state)
{
    (void)state;
    struct s3_config c;
    put_settings("[default]\nregion = not-this\n", "[default]\n" KEYS("NOT"));
    put_file("other", "[default]\nregion = this\n", 0600);
    put_file("keys", "[default]\n" KEYS("YES"), 0600);
    char path[256];
    setenv("AWS_CONFIG_FILE", "~/other", 1);
    snprintf(path, sizeof path, "%s/keys", home);
    setenv("AWS_SHARED_CREDENTIALS_FILE", path, 1);
    open_bucket(&c);
    assert_string_equal(c.region, "this");
    expect_keys(&c, "YES", "");
    s3_config_close(&c);

    /* the bundle is a file that can be read */
    set_environment("AWS_CA_BUNDLE=/no/such/file");
    REFUSED(ST_NOT_FOUND, "AWS_CA_BUNDLE", s3_config_open("//bucket", &c));
    setenv("AWS_CA_BUNDLE", path, 1);
    open_bucket(&c);
    assert_string_equal(c.ca_file, path);
    s3_config_close(&c);
    unsetenv("AWS_CA_BUNDLE");
    put_file("other", "[default]\nca_bundle = /no/such/file\n", 0600);
    REFUSED(ST_NOT_FOUND, "other:2: the file of certificates", s3_config_open("//bucket", &c));
    snprintf(path, sizeof path, "%s", home); /* a folder */
    setenv("AWS_CONFIG_FILE", path, 1);
    REFUSED(ST_IO, path, s3_config_open("//bucket", &c));
}

/* ---- Mistakes */

static const struct mistake {
    const char *env, *config, *credentials, *words;
    enum status_code code;
} mistakes[] = {
    { "", "[default]\nregion\n", NULL, ".aws/config:2: a line is", ST_INVALID },
    { "", NULL, "[default]\n\n# x\naws_secret_access_key " SECRET "\n", ".aws/credentials:4: a line is", ST_INVALID },
    { "", NULL, "[default]\n" SECRET " = x\n", "credentials:2: a line is", ST_INVALID },
    { "", NULL, "aws_secret_access_key = " SECRET "\n", "credentials:1: a setting stands before", ST_INVALID },
    { "", NULL, "[default\n", "credentials:1: a section's line", ST_INVALID },
    { "", NULL, "[default] " SECRET "\n", "credentials:1: a section's line", ST_INVALID },
    { "", "[]\n", NULL, "config:1: a section's line", ST_INVALID },
    { "", "[profile \"\"]\n", NULL, "config:1: a section's line", ST_INVALID },
    { "", "[default]\n = x\n", NULL, "config:2: a line that begins with a blank", ST_INVALID },
    { "", "[default]\n= x\n", NULL, "config:2: a line is", ST_INVALID },
    { "", "[default]\ns3 =\n  addressing_style\n", NULL, "config:3: a line is", ST_INVALID },
    { "", "[default]\ns3 =\n  [default]\n", NULL, "config:3: a section's line begins", ST_INVALID },
    { "", "[default]\nregion = x\n  y\n", NULL, "config:2: region takes one line", ST_INVALID },
    { "", "[default]\nregion = x\x01\n", NULL, "config:2: a control character", ST_INVALID },
    { "", "[default]\nregion = eu west\n", NULL, "config:2: a region is", ST_INVALID },
    { "AWS_REGION=eu/west", NULL, NULL, "AWS_REGION: a region is", ST_INVALID },
    { "", "[default]\ns3 =\n  addressing_style = dns\n", NULL, "config:3: an addressing style is auto, path or virtual",
      ST_INVALID },
    { "AWS_ENDPOINT_URL_S3=s3.example", NULL, NULL, "AWS_ENDPOINT_URL_S3: an endpoint is http://", ST_INVALID },
    { "AWS_ENDPOINT_URL=https://AKIA:" SECRET "@s3.example", NULL, NULL, "AWS_ENDPOINT_URL: an endpoint", ST_INVALID },
    { "", "[default]\nendpoint_url = http://h:0\n", NULL, "config:2: an endpoint is", ST_INVALID },
    { "", "[default]\nendpoint_url = http://h:65536\n", NULL, "config:2: an endpoint is", ST_INVALID },
    { "", "[default]\nendpoint_url = http://h/?x\n", NULL, "config:2: an endpoint is", ST_INVALID },
    { "", "[default]\nendpoint_url = http://h/a/..\n", NULL, "config:2: an endpoint is", ST_INVALID },
    { "", "[default]\nendpoint_url = http://[::1\n", NULL, "config:2: an endpoint is", ST_INVALID },
    { "", "[default]\nservices = gone\n", NULL, "config:2: the section that services names", ST_INVALID },
    { "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS=1", NULL, NULL, "has to be true or false", ST_INVALID },
    { "AWS_PROFILE=x", "[x]\nregion=a\n", NULL, "config:1: [x] is no profile in this file", ST_INVALID },
    { "AWS_PROFILE=x", "[profile y]\n", "[y]\n", "AWS_PROFILE: no profile x", ST_INVALID },
    /* found only when credentials are wanted */
    { "", NULL, NULL, "AWS_ACCESS_KEY_ID", ST_INVALID },
    { "", "[default]\nregion=a\n", NULL, ".aws/credentials (no such file) and ", ST_INVALID },
    { "", "[default]\nregion=a\n", "[other]\n" KEYS("O"), "(no such profile in it)", ST_INVALID },
    { "AWS_ACCESS_KEY_ID=A", NULL, "[default]\n" KEYS("C"), "AWS_SECRET_ACCESS_KEY is not", ST_INVALID },
    { "AWS_SECRET_ACCESS_KEY=" SECRET, NULL, NULL, "AWS_ACCESS_KEY_ID is not", ST_INVALID },
    { "", NULL, "[default]\nregion=a\naws_secret_access_key=" SECRET "\n", "credentials:3: profile default has",
      ST_INVALID },
    { "", NULL, "[default]\naws_access_key_id=A\naws_secret_access_key=" SECRET " " SECRET "\n",
      "credentials:3: aws_secret_access_key holds a blank", ST_INVALID },
    { "", "[default]\n" KEYS("A") "role_arn = arn:x\n", NULL, "config:4: profile default has role_arn",
      ST_UNSUPPORTED },
    { "", "[default]\nsso_session = x\n", NULL, "credential_process = aws configure", ST_UNSUPPORTED },
};

static void test_mistakes(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        const struct mistake *m = &mistakes[i];
        struct s3_config c = { 0 };
        struct s3_keys k;
        clear_environment();
        put_settings(m->config, m->credentials);
        set_environment(m->env);
        print_message("row %zu\n", i);
        status *st = s3_config_open("//bucket", &c);
        if (!st)
            st = s3_config_keys(&c, &k);
        refused(st, m->code, m->words, m->words);
        s3_config_close(&c);
    }
    struct s3_ini f;
    REFUSED(ST_INVALID, "f:2: a NUL byte", s3_ini_parse("[a]\nb=\0c\n", 9, "f", true, &f));
}

static void test_bad_urls(void **state)
{
    (void)state;
    static const char *const bad[] = { "",
                                       "bucket",
                                       "/bucket",
                                       "//",
                                       "///x",
                                       "//ab",
                                       "//-abc",
                                       "//abc-",
                                       "//a b c",
                                       "//b%20cket",
                                       "//bucket//",
                                       "//bucket//x",
                                       "//bucket/x//",
                                       "//bucket/x//y",
                                       "//bucket/./x",
                                       "//bucket/..",
                                       "//bucket/x?y",
                                       "//bucket/x#y",
                                       "//bucket/%41",
                                       "//bucket/a b" };
    struct s3_config c;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(s3_config_open(bad[i], &c), ST_INVALID, "s3://BUCKET/PREFIX", bad[i]);
    REFUSED(ST_INVALID, "credentials have no place", s3_config_open("//AKIA:" SECRET "@bucket/x", &c));
    char long_one[700];
    memset(long_one, 'x', sizeof long_one);
    memcpy(long_one, "//bucket/", 9);
    long_one[sizeof long_one - 1] = 0;
    REFUSED(ST_INVALID, "segments of 1 to 255", s3_config_open(long_one, &c));
    OK(s3_config_open("//Old_Bucket.name/a=1/b/", &c));
    assert_string_equal(c.bucket, "Old_Bucket.name");
    assert_string_equal(c.prefix, "a=1/b");
    s3_config_close(&c);
}

/* ---- Requests */

static const struct address {
    const char *endpoint, *style, *bucket, *origin, *host, *base_path;
} addresses[] = {
    { "", NULL, "bucket", "https://bucket.s3.us-east-1.amazonaws.com", "bucket.s3.us-east-1.amazonaws.com", "" },
    { "", "path", "bucket", "https://s3.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com", "/bucket" },
    { "", "auto", "a.bucket", "https://s3.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com", "/a.bucket" },
    { "", NULL, "Bucket", "https://s3.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com", "/Bucket" },
    { "", NULL, "10.20.30.40", "https://s3.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com", "/10.20.30.40" },
    { "http://s3.eu-west-1.amazonaws.com", NULL, "a.bucket", "http://a.bucket.s3.eu-west-1.amazonaws.com",
      "a.bucket.s3.eu-west-1.amazonaws.com", "" },
    { "http://127.0.0.1:7480", NULL, "bucket", "http://127.0.0.1:7480", "127.0.0.1:7480", "/bucket" },
    { "http://LocalHost:80", NULL, "bucket", "http://localhost", "localhost", "/bucket" },
    { "https://[::1]:8443/", NULL, "bucket", "https://[::1]:8443", "[::1]:8443", "/bucket" },
    { "https://s3.example:443", NULL, "bucket", "https://s3.example", "s3.example", "/bucket" },
    { "http://s3.example:443/a/b/", NULL, "bucket", "http://s3.example:443", "s3.example:443", "/a/b/bucket" },
    { "http://s3.example:80", "virtual", "bucket", "http://bucket.s3.example", "bucket.s3.example", "" },
    { "http://localhost:7480", "VIRTUAL", "bucket", "http://bucket.localhost:7480", "bucket.localhost:7480", "" },
    { "https://s3.example/x", "virtual", "a.bucket", "https://a.bucket.s3.example", "a.bucket.s3.example", "/x" },
    { "http://127.0.0.1", "virtual", "bucket", NULL, NULL, NULL },
    { "http://[::1]", "virtual", "bucket", NULL, NULL, NULL },
    { "http://s3.example", "virtual", "Bucket", NULL, NULL, NULL },
};

static void test_addressing(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        const struct address *a = &addresses[i];
        char text[256], path[64], want[S3_URL_BYTES], url[S3_URL_BYTES];
        snprintf(text, sizeof text, "[default]\nendpoint_url = %s\ns3 =\n  addressing_style = %s\n", a->endpoint,
                 a->style ? a->style : "");
        put_settings(text, NULL);
        snprintf(path, sizeof path, "//%s/p", a->bucket);
        print_message("row %zu\n", i);
        struct s3_config c;
        if (!a->origin) {
            REFUSED(ST_INVALID, "config:4: addressing style virtual needs", s3_config_open(path, &c));
            continue;
        }
        OK(s3_config_open(path, &c));
        assert_string_equal(c.origin, a->origin);
        assert_string_equal(c.host, a->host);
        assert_string_equal(c.base_path, a->base_path);
        assert_int_equal(c.tls, a->origin[4] == 's');
        OK(s3_config_url(&c, "k", NULL, url, sizeof url));
        snprintf(want, sizeof want, "%s%s/p/k", a->origin, a->base_path);
        assert_string_equal(url, want);
        OK(s3_config_url(&c, NULL, "list-type=2", url, sizeof url));
        snprintf(want, sizeof want, "%s%s?list-type=2", a->origin, *a->base_path ? a->base_path : "/");
        assert_string_equal(url, want);
        s3_config_close(&c);
    }
}

static void test_requests(void **state)
{
    (void)state;
    struct s3_config c;
    char buf[S3_URL_BYTES];
    set_environment("AWS_ENDPOINT_URL=http://127.0.0.1:1");
    OK(s3_config_open("//bucket/a=1/(b)", &c));
    OK(s3_config_object(&c, "x y", buf, sizeof buf));
    assert_string_equal(buf, "a=1/(b)/x y");
    OK(s3_config_object(&c, "", buf, sizeof buf));
    assert_string_equal(buf, "a=1/(b)/");
    OK(s3_config_path(&c, "x y+%/\xc3\xa4~", buf, sizeof buf));
    assert_string_equal(buf, "/bucket/a%3D1/%28b%29/x%20y%2B%25/%C3%A4~");
    OK(s3_config_path(&c, NULL, buf, sizeof buf));
    assert_string_equal(buf, "/bucket");
    s3_config_close(&c);
    OK(s3_config_open("//bucket", &c));
    OK(s3_config_object(&c, "", buf, sizeof buf));
    assert_string_equal(buf, "");
    OK(s3_config_url(&c, "k", "", buf, sizeof buf));
    assert_string_equal(buf, "http://127.0.0.1:1/bucket/k");
    OK(s3_config_url(&c, "k", "uploads=", buf, strlen("http://127.0.0.1:1/bucket/k?uploads=") + 1));
    REFUSED(ST_INVALID, "URL has 36 bytes, and 35 are the most", s3_config_url(&c, "k", "uploads=", buf, 36));
    s3_config_close(&c);

    /* all bytes: 66 stay (with the slash), the rest become three */
    char all[256];
    for (int i = 1; i < 256; i++)
        all[i - 1] = (char)i;
    all[255] = 0;
    OK(s3_encode(all, true, buf, sizeof buf));
    assert_int_equal(strlen(buf), 67 + 3 * (255 - 67));
    assert_non_null(strstr(buf, "%2C-./0123456789%3A"));
    assert_non_null(strstr(buf, "%5B%5C%5D%5E_%60ab"));
    assert_non_null(strstr(buf, "%7D~%7F%80"));
    OK(s3_encode("a/b", false, buf, sizeof buf));
    assert_string_equal(buf, "a%2Fb");

    struct s3_param list[] = { { "prefix", "a/b c" }, { "list-type", "2" },
                               { "delimiter", "/" },  { "continuation-token", "1+/=" },
                               { "uploads", "" },     { "a~", "1" },
                               { "a/", "2" },         { "a", "3" },
                               { "a+", "4" } };
    OK(s3_query(list, sizeof list / sizeof *list, buf, sizeof buf));
    assert_string_equal(buf, "a=3&a%2B=4&a%2F=2&a~=1&continuation-token=1%2B%2F%3D&delimiter=%2F&list-type=2&"
                             "prefix=a%2Fb%20c&uploads=");
    OK(s3_query(NULL, 0, buf, 1));
    assert_string_equal(buf, "");
    REFUSED(ST_INVALID, "query", s3_query(list, 1, buf, 16));
}

/* ---- The provider command */

#define REPLY "{\"Version\": 1, \"AccessKeyId\": \"P\", \"SecretAccessKey\": \"" SECRET "\""

static const struct reply {
    const char *text, *words; /* NULL: fine */
} replies[] = {
    { REPLY "}", NULL },
    { " " REPLY
      ",\"SessionToken\":null,\"Expiration\":null,\"AccountId\":\"1\",\"x\":[1,{\"y\":[]},{}, -2.5e3, true]}\n",
      NULL },
    { "{\"SecretAccessKey\":\"" SECRET "\",\"AccessKeyId\":\"\\u0050\",\"Version\":1}", NULL },
    { REPLY ",\"Expiration\":\"2999-01-02T03:04:05Z\"}", NULL },
    { REPLY ",\"Expiration\":\"2999-01-02T03:04:05.123+02:00\"}", NULL },
    { "", "not the JSON object" },
    { SECRET, "not the JSON object" },
    { REPLY, "not the JSON object" },
    { REPLY "} x", "not the JSON object" },
    { REPLY ",}", "not the JSON object" },
    { REPLY ",\"x\":[1,]}", "not the JSON object" },
    { REPLY ",\"x\":[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]}", "not the JSON object" },
    { REPLY ",\"x\":{\"y\":1]}", "not the JSON object" },
    { REPLY ",\"x\":" SECRET "}", "not the JSON object" },
    { "{\"Version\": 2, \"AccessKeyId\": \"P\", \"SecretAccessKey\": \"" SECRET "\"}", "Version" },
    { "{\"Version\": \"1\", \"AccessKeyId\": \"P\", \"SecretAccessKey\": \"" SECRET "\"}", "Version" },
    { "{\"AccessKeyId\": \"P\", \"SecretAccessKey\": \"" SECRET "\"}", "Version is missing" },
    { "{\"Version\": 1, \"SecretAccessKey\": \"" SECRET "\"}", "AccessKeyId is missing" },
    { "{\"Version\": 1, \"AccessKeyId\": \"P\"}", "SecretAccessKey is missing" },
    { "{\"Version\": 1, \"AccessKeyId\": \"P\", \"SecretAccessKey\": 7}",
      "SecretAccessKey in the command's output is not" },
    { REPLY ",\"SecretAccessKey\":\"x\"}", "SecretAccessKey twice" },
    { REPLY ",\"SessionToken\":\"" TOKEN "\\n\"}", "SessionToken in the command's output holds a blank" },
    { REPLY ",\"Expiration\":\"tomorrow\"}", "Expiration in the command's output is no time" },
    { REPLY ",\"Expiration\":\"2999-01-02T03:04:05\"}", "Expiration in the command's output is no time" },
    { REPLY ",\"Expiration\":\"2999-01-02T03:04:05+25:00\"}", "Expiration in the command's output is no time" },
};

static void test_replies(void **state)
{
    (void)state;
    struct s3_keys k;
    uint64_t expires;
    for (size_t i = 0; i < sizeof replies / sizeof *replies; i++) {
        print_message("row %zu\n", i);
        status *st = s3_provider_parse(replies[i].text, strlen(replies[i].text), "w:1", &k, &expires);
        if (replies[i].words) {
            refused(st, ST_INVALID, replies[i].words, replies[i].words);
            continue;
        }
        OK(st);
        assert_string_equal(k.access_key, "P");
        assert_string_equal(k.secret_key, SECRET);
        assert_string_equal(k.session_token, "");
    }
    /* 2026-03-01T00:30:00-01:30 is two o'clock in UTC */
    const char *timed = REPLY ",\"Expiration\":\"2026-03-01T00:30:00-01:30\",\"SessionToken\":\"" TOKEN "\"}";
    OK(s3_provider_parse(timed, strlen(timed), "w:1", &k, &expires));
    assert_int_equal(expires, 1772330400ull * 1000000000u);
    assert_string_equal(k.session_token, TOKEN);
    const char *late = REPLY ",\"Expiration\":\"9999-01-01T00:00:00Z\"}"; /* more nanoseconds than there are */
    OK(s3_provider_parse(late, strlen(late), "w:1", &k, &expires));
    assert_int_equal(expires, 18000000000ull * 1000000000u);
}

static status *run(const char *command, uint32_t limit_ms, struct s3_keys *k)
{
    uint64_t expires = 0;
    return s3_provider_run(command, "config:7", limit_ms, k, &expires);
}

enum { LONG_MS = 60000 };

static void test_command_words(void **state)
{
    (void)state;
    struct s3_keys k;
    char command[400];
    /* its words as it got them become the access key; a shell would have made more of $HOME, ; and * */
    put_file("show me",
             "#!/bin/sh\n[ -z \"$(cat)\" ] || exit 3\n[ \"$(ls /proc/self/fd | wc -l)\" -le 4 ] || exit 4\n"
             "printf '{\"Version\":1,\"AccessKeyId\":\"%s\",\"SecretAccessKey\":\"" SECRET "\"}' \"$#:$1:$2:$3:$4\"\n",
             0700);
    FILE *open_file = fopen("/proc/self/stat", "r"); /* a file of ours that is open, and stays ours */
    snprintf(command, sizeof command, "'%s/show me'  $HOME;ls 'a'\"b\"\\* * \"\"", home);
    OK(run(command, LONG_MS, &k));
    assert_string_equal(k.access_key, "4:$HOME;ls:ab*:*:");
    fclose(open_file);
    REFUSED(ST_INVALID, "config:7: credential_process ends in a quote", run("cat 'x", LONG_MS, &k));
    REFUSED(ST_INVALID, "ends in a quote that is not closed, or in a backslash", run("cat \\", LONG_MS, &k));
    REFUSED(ST_INVALID, "names no command", run(" \t", LONG_MS, &k));
    REFUSED(ST_INVALID, "names no command", run("''", LONG_MS, &k));
    REFUSED(ST_INVALID, "config:7: cannot start the command", run("/no/such/command " SECRET, LONG_MS, &k));
}

static void test_command_fails(void **state)
{
    (void)state;
    struct s3_keys k;
    char command[256];
    REFUSED(ST_UNAVAILABLE, "ended with status 3; it said: no ticket",
            run("sh -c 'echo no ticket >&2; exit 3'", LONG_MS, &k));
    REFUSED(ST_UNAVAILABLE, "died of signal 9", run("sh -c 'kill -9 $$'", LONG_MS, &k));
    REFUSED(ST_INVALID, "not the JSON object", run("echo " SECRET, LONG_MS, &k));
    REFUSED(ST_INVALID, "printed more than", run("yes " SECRET, LONG_MS, &k));
    /* what it says on both is said by neither */
    put_file("chatty", "#!/bin/sh\necho '" REPLY "}'\necho got key=" SECRET ", sorry >&2\nexit 1\n", 0700);
    snprintf(command, sizeof command, "%s/chatty", home);
    REFUSED(ST_UNAVAILABLE, "it said: got key=(hidden), sorry", run(command, LONG_MS, &k));
    /* a time limit, for all it has started */
    put_file("hang", "#!/bin/sh\necho waiting >&2\nsleep 1000 & echo $! >${0}.pid\nwait\n", 0700);
    snprintf(command, sizeof command, "%s/hang", home);
    REFUSED(ST_TIMEOUT, "ran longer than 300 ms and was killed; it said: waiting", run(command, 300, &k));
    /* what it leaves behind with its pipes open is not waited for */
    put_file("leave", "#!/bin/sh\nsleep 1000 & echo $! >${0}.pid\necho '" REPLY "}'\n", 0700);
    snprintf(command, sizeof command, "%s/leave", home);
    OK(run(command, LONG_MS, &k));
    assert_string_equal(k.secret_key, SECRET);
    snprintf(command, sizeof command, "sh -c 'kill $(cat %s/leave.pid)'", home);
    REFUSED(ST_INVALID, "not the JSON object", run(command, LONG_MS, &k));
}

/* ---- Renewal */

/* A command that counts its runs in the file `runs`, and prints the key of the run's number with an end `seconds` from
 * now (0: none), unless there is a file `broken`. */
static void put_counter(int seconds)
{
    char text[700];
    snprintf(text, sizeof text,
             "#!/bin/sh\ncd %s || exit 1\necho run >>runs\n[ ! -e broken ] || { echo out of order >&2; exit 5; }\n"
             "[ %d = 0 ] || end=',\"Expiration\":\"'$(date -u -d '+%d seconds' +%%Y-%%m-%%dT%%H:%%M:%%SZ)'\"'\n"
             "echo '{\"Version\":1,\"AccessKeyId\":\"R'$(wc -l <runs)'\",\"SecretAccessKey\":\"" SECRET "\"'$end'}'\n",
             home, seconds, seconds);
    put_file("counter", text, 0700);
    snprintf(text, sizeof text, "[default]\ncredential_process = %s/counter\n", home);
    put_settings(text, NULL);
}

static int runs(void)
{
    char path[256];
    snprintf(path, sizeof path, "%s/runs", home);
    FILE *f = fopen(path, "r");
    int lines = 0;
    for (int c; f && (c = getc(f)) != EOF;)
        lines += c == '\n';
    if (f)
        fclose(f);
    return lines;
}

struct asker {
    struct thread thread;
    struct s3_config *c;
    const struct s3_keys *expired; /* NULL: just ask */
    struct s3_keys got;
};

static status *ask(void *arg)
{
    struct asker *a = arg;
    if (a->expired)
        TRY(s3_config_renew(a->c, a->expired));
    return s3_config_keys(a->c, &a->got);
}

static void ask_all(struct s3_config *c, const struct s3_keys *expired, const char *want)
{
    enum { ASKERS = 8 };
    struct asker a[ASKERS] = { 0 };
    for (int i = 0; i < ASKERS; i++) {
        a[i].c = c;
        a[i].expired = expired;
        OK(thread_start(&a[i].thread, "ask", ask, &a[i]));
    }
    for (int i = 0; i < ASKERS; i++) {
        OK(thread_join(&a[i].thread));
        assert_string_equal(a[i].got.access_key, want);
    }
}

static void test_one_run_for_all(void **state)
{
    (void)state;
    struct s3_config c;
    struct s3_keys k;
    put_counter(0);
    open_bucket(&c);
    assert_int_equal(runs(), 0); /* nobody has asked yet */
    ask_all(&c, NULL, "R1");
    assert_int_equal(runs(), 1);
    OK(s3_config_keys(&c, &k));
    ask_all(&c, &k, "R2");
    assert_int_equal(runs(), 2);
    OK(s3_config_renew(&c, &k)); /* long renewed */
    assert_int_equal(runs(), 2);
    s3_config_close(&c);
}

/* Renewed five minutes before the end. While the command is broken the old ones serve until then, and it is run again
 * every half minute; once it works again so do we. (The command may take some seconds: no time below is near one that
 * matters.) */
static void test_expiry(void **state)
{
    (void)state;
    struct s3_config c;
    struct s3_keys k;
    put_counter(10000);
    open_bucket(&c);
    expect_keys(&c, "R1", "");
    put_counter(100000);
    wait_until(10000 - 400);
    expect_keys(&c, "R1", "");
    wait_until(10000 - 200);
    expect_keys(&c, "R2", "");
    assert_int_equal(runs(), 2);

    put_file("broken", "", 0600);
    wait_until(100000 - 200);
    expect_keys(&c, "R2", "");
    expect_keys(&c, "R2", "");
    assert_int_equal(runs(), 3);
    wait_until(100000 - 160);
    expect_keys(&c, "R2", "");
    assert_int_equal(runs(), 4);
    wait_until(100000 + 100);
    REFUSED(ST_UNAVAILABLE, "ended with status 5; it said: out of order", s3_config_keys(&c, &k));

    char broken[256];
    snprintf(broken, sizeof broken, "%s/broken", home);
    unlink(broken);
    put_counter(200000);
    expect_keys(&c, "R6", "");
    put_counter(10);
    wait_until(200000 + 100);
    REFUSED(ST_UNAVAILABLE, "have expired already", s3_config_keys(&c, &k));
    s3_config_close(&c);
}

static void test_limit(void **state)
{
    (void)state;
    struct s3_config c;
    struct s3_keys k;
    put_settings("[default]\ncredential_process = sleep 1000\n", NULL);
    open_bucket(&c);
    s3_config_set_provider_limit(&c, 100);
    REFUSED(ST_TIMEOUT, ".aws/config:2: the command of credential_process ran longer than 100 ms",
            s3_config_keys(&c, &k));
    s3_config_close(&c);
}

static void test_file_renewed(void **state)
{
    (void)state;
    struct s3_config c;
    struct s3_keys k;
    put_settings(NULL, "[default]\n" KEYS("OLD") "aws_session_token = " TOKEN "\n");
    open_bucket(&c);
    OK(s3_config_keys(&c, &k));
    REFUSED(ST_INVALID, "their source still holds the same", s3_config_renew(&c, &k));
    expect_keys(&c, "OLD", TOKEN);
    put_settings(NULL, "[default]\naws_access_key_id = OLD\n" SECRET "\n");
    REFUSED(ST_INVALID, ".aws/credentials:3", s3_config_renew(&c, &k));
    put_settings(NULL, "[default]\n" KEYS("OLD") "aws_session_token = " TOKEN "2\n"); /* only the token is new */
    OK(s3_config_renew(&c, &k));
    expect_keys(&c, "OLD", TOKEN "2");

    /* somebody replaces them now and then, and does not say when they end */
    put_settings(NULL, "[default]\n" KEYS("NEW") "aws_session_token = " TOKEN "3\n");
    wait_until(200);
    expect_keys(&c, "OLD", TOKEN "2");
    wait_until(400);
    expect_keys(&c, "NEW", TOKEN "3");
    put_settings(NULL, "[default]\n[");
    wait_until(800);
    expect_keys(&c, "NEW", TOKEN "3");
    s3_config_close(&c);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_precedence, start, stop),
        cmocka_unit_test_setup_teardown(test_file_names, start, stop),
        cmocka_unit_test_setup_teardown(test_mistakes, start, stop),
        cmocka_unit_test_setup_teardown(test_bad_urls, start, stop),
        cmocka_unit_test_setup_teardown(test_addressing, start, stop),
        cmocka_unit_test_setup_teardown(test_requests, start, stop),
        cmocka_unit_test_setup_teardown(test_replies, start, stop),
        cmocka_unit_test_setup_teardown(test_command_words, start, stop),
        cmocka_unit_test_setup_teardown(test_command_fails, start, stop),
        cmocka_unit_test_setup_teardown(test_one_run_for_all, start, stop),
        cmocka_unit_test_setup_teardown(test_expiry, start, stop),
        cmocka_unit_test_setup_teardown(test_limit, start, stop),
        cmocka_unit_test_setup_teardown(test_file_renewed, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
