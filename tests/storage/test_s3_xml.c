/* The XML replies of S3: what servers send, what is broken, and every cut of it; headers and dates of HTTP. */
#include "comm/base/mem.h"
#include "storage/http.h"
#include "storage/s3_xml.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

struct heard {
    char text[4096];
};

static status *hear(void *arg, const char *path, const char *text)
{
    struct heard *h = arg;
    size_t n = strlen(h->text);
    snprintf(h->text + n, sizeof h->text - n, "%s=%s;", path, text);
    return NULL;
}

static status *hear_end(void *arg, const char *path)
{
    return hear(arg, path, "END");
}

static void walks_to(const char *doc, const char *want)
{
    struct heard h = { "" };
    const struct s3_xml_sink sink = { .arg = &h, .leaf = hear, .leave = hear_end };
    OK(s3_xml_walk(doc, strlen(doc), &sink));
    assert_string_equal(h.text, want);
}

static void test_walk(void **state)
{
    (void)state;
    walks_to("<a/>", "a=;");
    walks_to("<a></a >", "a=;");
    walks_to(" <?xml version=\"1.0\"?>\n<a x=\"1\" y='>'><b>t</b><c/></a>\n<!-- end -->", "a/b=t;a/c=;a=END;");
    walks_to("<n:a xmlns:n='u'><n:b>1&lt;2 &amp;&gt;&quot;&apos;&#65;&#x42;&#xe9;&#x20ac;&#x1f600;</n:b></n:a>",
             "a/b=1<2 &>\"'AB\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80;a=END;");
    walks_to("<a><![CDATA[<b>&amp;]]></a>", "a=<b>&amp;;");
    walks_to("<a>&#1;</a>", "a=?;"); /* keys of others hold such */
    walks_to("<a>x<!-- y -->z</a>", "a=xz;");
    walks_to("<a><b>1</b> <b>2</b></a>", "a/b=1;a/b=2;a=END;");
}

static void test_broken(void **state)
{
    (void)state;
    static const char *const bad[] = { "",
                                       " ",
                                       "x",
                                       "<a>",
                                       "<a></b>",
                                       "<a></a><b/>",
                                       "</a>",
                                       "<a",
                                       "<a x='>",
                                       "<>",
                                       "<a>&x;</a>",
                                       "<a>&#;</a>",
                                       "<a>&#xg;</a>",
                                       "<a>&#1114112;</a>",
                                       "<a>&amp</a>",
                                       "<!DOCTYPE a><a/>",
                                       "<a/>t",
                                       "<a><![CDATA[x</a>",
                                       "<a><!-- </a>",
                                       "<?xml",
                                       "<a></a",
                                       "<a></a x>",
                                       "<a!/>",
                                       "<a><a><a><a><a><a><a><a><a/></a></a></a></a></a></a></a></a>",
                                       "<a><b</a>" };
    const struct s3_xml_sink sink = { .arg = &(struct heard){ "" }, .leaf = hear };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        status *st = s3_xml_walk(bad[i], strlen(bad[i]), &sink);
        if (status_code(st) != ST_CORRUPT)
            fail_msg("\"%s\" was taken", bad[i]);
        status_free(st);
    }
    FAILS(ST_CORRUPT, "NUL", s3_xml_walk("<a>\0</a>", 8, &sink));
    char *text = mem_alloc(S3_XML_TEXT_BYTES + 10);
    memcpy(text, "<a>", 3);
    memset(text + 3, 'x', S3_XML_TEXT_BYTES - 1);
    memcpy(text + 3 + S3_XML_TEXT_BYTES - 1, "</a>", 4);
    OK(s3_xml_walk(text, S3_XML_TEXT_BYTES + 6, &(struct s3_xml_sink){ .leaf = hear, .arg = &(struct heard){ "" } }));
    memset(text + 3, 'x', S3_XML_TEXT_BYTES);
    memcpy(text + 3 + S3_XML_TEXT_BYTES, "</a>", 4);
    FAILS(ST_CORRUPT, "too long", s3_xml_walk(text, S3_XML_TEXT_BYTES + 7, &sink));
    mem_free(text);
}

static const char list[] =
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">"
    "<Name>ckpt</Name><Prefix>runs/</Prefix><MaxKeys>2</MaxKeys><IsTruncated>true</IsTruncated>"
    "<NextContinuationToken>a+/b=</NextContinuationToken>"
    "<Contents><Key>runs/LATEST</Key><LastModified>2026-11-22T09:56:49.123Z</LastModified><ETag>&quot;x&quot;</ETag>"
    "<Size>18</Size><Owner><ID>test</ID></Owner></Contents>"
    "<CommonPrefixes><Prefix>runs/step-000000000100/</Prefix></CommonPrefixes></ListBucketResult>";

struct entries {
    char text[1000];
};

static status *enter(void *arg, const struct s3_found *f)
{
    struct entries *e = arg;
    size_t n = strlen(e->text);
    snprintf(e->text + n, sizeof e->text - n, "%s%s %llu %llu %s\n", f->key, f->is_prefix ? " prefix" : "",
             (unsigned long long)f->bytes, (unsigned long long)f->mtime_ns, f->upload_id ? f->upload_id : "-");
    return NULL;
}

static void test_pages(void **state)
{
    (void)state;
    struct entries e = { "" };
    struct s3_page p;
    OK(s3_xml_page(list, strlen(list), enter, &e, &p));
    assert_string_equal(e.text, "runs/LATEST 18 1795341409123000000 -\nruns/step-000000000100/ prefix 0 0 -\n");
    assert_true(p.truncated);
    assert_string_equal(p.next, "a+/b=");
    assert_int_equal(p.found, 2);
    for (size_t n = 0; n < strlen(list); n++) { /* a reply that ends early is no list, wherever it ends */
        e.text[0] = 0;
        FAILS(ST_CORRUPT, "", s3_xml_page(list, n, enter, &e, &p));
    }
    static const char uploads[] = "<ListMultipartUploadsResult><NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>2~u"
                                  "</NextUploadIdMarker><IsTruncated>true</IsTruncated><Upload><Key>k</Key><UploadId>"
                                  "2~u</UploadId><Initiated>2026-11-22T09:56:49Z</Initiated></Upload>"
                                  "</ListMultipartUploadsResult>";
    e.text[0] = 0;
    OK(s3_xml_page(uploads, strlen(uploads), enter, &e, &p));
    assert_string_equal(e.text, "k 0 0 2~u\n");
    assert_string_equal(p.next, "k");
    assert_string_equal(p.next_upload, "2~u");
    static const char *const bad[] = {
        "<Error><Code>SlowDown</Code></Error>",
        "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        "<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>",
        "<ListBucketResult><Contents><Key>k</Key><Size>-1</Size></Contents></ListBucketResult>",
        "<ListBucketResult><Contents><Key>k</Key><Size>99999999999999999999</Size></Contents>"
        "</ListBucketResult>",
        "<ListBucketResult><Contents><Key>k</Key><LastModified>now</LastModified></Contents>"
        "</ListBucketResult>",
        "<ListMultipartUploadsResult><Upload><Key>k</Key></Upload></ListMultipartUploadsResult>"
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        FAILS(ST_CORRUPT, "", s3_xml_page(bad[i], strlen(bad[i]), enter, &e, &p));
}

static void test_faults(void **state)
{
    (void)state;
    struct s3_fault f;
    static const char error[] = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong\tregion</Message>"
                                "<Region>eu-west-1</Region><HostId>x</HostId></Error>";
    assert_true(s3_xml_fault(error, strlen(error), &f));
    assert_string_equal(f.code, "AuthorizationHeaderMalformed");
    assert_string_equal(f.message, "wrongregion"); /* no control character reaches a terminal */
    assert_string_equal(f.region, "eu-west-1");
    assert_false(s3_xml_fault(list, strlen(list), &f));
    assert_string_equal(f.code, "");
    assert_false(s3_xml_fault("<html><Code>x</Code></html>", 27, &f));
    assert_string_equal(f.code, "");
    assert_false(s3_xml_fault(NULL, 0, &f));

    char id[20], key[64];
    static const char begun[] =
        "<InitiateMultipartUploadResult><Key>k</Key><UploadId>2~abc</UploadId></InitiateMultipartUploadResult>";
    OK(s3_xml_upload_id(begun, strlen(begun), id, sizeof id));
    assert_string_equal(id, "2~abc");
    FAILS(ST_CORRUPT, "too long", s3_xml_upload_id(begun, strlen(begun), id, 5));
    FAILS(ST_CORRUPT, "without an id", s3_xml_upload_id("<a/>", 4, id, sizeof id));

    static const char deleted[] =
        "<DeleteResult><Deleted><Key>a</Key></Deleted><Error><Key>gone</Key><Code>NoSuchKey</Code></Error>"
        "<Error><Key>b&amp;c</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        "<Error><Key>d</Key><Code>InternalError</Code></Error></DeleteResult>";
    OK(s3_xml_deleted(deleted, strlen(deleted), key, sizeof key, &f));
    assert_string_equal(key, "b&c");
    assert_string_equal(f.code, "AccessDenied");
    OK(s3_xml_deleted("<DeleteResult/>", 15, key, sizeof key, &f));
    assert_string_equal(key, "");
    FAILS(ST_CORRUPT, "", s3_xml_deleted(error, strlen(error), key, sizeof key, &f));
}

static void test_times(void **state)
{
    (void)state;
    uint64_t v;
    assert_true(s3_xml_time("1970-01-01T00:00:01Z", &v));
    assert_int_equal(v, 1000000000u);
    assert_true(s3_xml_time("2024-02-29T23:59:59.5Z", &v));
    assert_int_equal(v, 1709251199500000000u);
    static const char *const bad[] = { "",
                                       "2024",
                                       "2024-13-01T00:00:00Z",
                                       "2024-01-01 00:00:00",
                                       "2024-01-01T00:00:00X",
                                       "1969-12-31T23:59:59Z",
                                       "2024-01-01T24:00:00Z" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(s3_xml_time(bad[i], &v));
    assert_true(http_date("Sun, 06 Nov 1994 08:49:37 GMT", &v));
    assert_int_equal(v, 784111777);
    assert_false(http_date("soon", &v));
}

static void test_headers(void **state)
{
    (void)state;
    struct http_reply r = { 0 };
    char v[16];
    assert_true(http_header_add(r.header, "ETag:  \"abc\" \r\n", 15));
    assert_true(http_header_add(r.header, "X-Long-Name: 1\r\n", 16));
    assert_true(http_header_add(r.header, "Empty:\r\n", 8));
    assert_true(http_header(&r, "etag", v, sizeof v));
    assert_string_equal(v, "\"abc\"");
    assert_true(http_header(&r, "x-long-name", v, sizeof v));
    assert_string_equal(v, "1");
    assert_true(http_header(&r, "empty", v, sizeof v));
    assert_string_equal(v, "");
    assert_false(http_header(&r, "long-name", v, sizeof v)); /* the end of another's */
    assert_false(http_header(&r, "etag", v, 5));
    assert_string_equal(v, "");
    static const char *const bad[] = { "\r\n", ": x", "no colon", "a b: c", "a: b\nc: d", "a: \x01" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(http_header_add(r.header, bad[i], strlen(bad[i])));
    char *big = mem_calloc(1, HTTP_HEADER_BYTES);
    memset(big, 'x', HTTP_HEADER_BYTES - 1);
    big[1] = ':';
    assert_false(http_header_add(r.header, big, HTTP_HEADER_BYTES - 1));
    assert_true(http_header(&r, "x-long-name", v, sizeof v));
    mem_free(big);
}

static void test_writing(void **state)
{
    (void)state;
    struct s3_text t = { 0 };
    s3_text_add(&t, "<Key>");
    s3_text_escaped(&t, "a&b<c>\"'");
    for (int i = 0; i < 1000; i++)
        s3_text_add(&t, "%03d", i);
    assert_false(t.failed);
    assert_int_equal(t.bytes, strlen(t.text));
    assert_int_equal(t.bytes, 5 + 28 + 3000);
    assert_memory_equal(t.text, "<Key>a&amp;b&lt;c&gt;&quot;&apos;000001", 39);
    assert_string_equal(t.text + t.bytes - 6, "998999");
    mem_free(t.text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_walk),    cmocka_unit_test(test_broken), cmocka_unit_test(test_pages),
        cmocka_unit_test(test_faults),  cmocka_unit_test(test_times),  cmocka_unit_test(test_headers),
        cmocka_unit_test(test_writing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
