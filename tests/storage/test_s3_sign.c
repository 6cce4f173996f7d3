/* Signatures against the examples that AWS publishes: the signature test suite (region us-east-1, service "service")
 * and the S3 guide's "Authenticating requests: using the Authorization header". Digests against known values. */
#include "comm/base/bytes.h"
#include "storage/s3_sign.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define EMPTY "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

struct example {
    const char *method, *path, *query;
    struct s3_header header[6];
    size_t headers;
    const char *payload, *time, *service, *access_key, *secret_key, *names, *signature;
};

static const struct example examples[] = {
    /* the test suite: get-vanilla */
    { "GET",
      "/",
      "",
      { { "host", "example.amazonaws.com" }, { "x-amz-date", "20150830T123600Z" } },
      2,
      EMPTY,
      "20150830T123600Z",
      "service",
      "AKIDEXAMPLE",
      "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
      "host;x-amz-date",
      "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31" },
    /* get-vanilla-query-order-key-case */
    { "GET",
      "/",
      "Param1=value1&Param2=value2",
      { { "host", "example.amazonaws.com" }, { "x-amz-date", "20150830T123600Z" } },
      2,
      EMPTY,
      "20150830T123600Z",
      "service",
      "AKIDEXAMPLE",
      "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
      "host;x-amz-date",
      "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500" },
    /* get-header-value-trim: blanks around values go, those inside become one */
    { "GET",
      "/",
      "",
      { { "host", "example.amazonaws.com" },
        { "my-header1", " value1" },
        { "my-header2", " \"a   b   c\"" },
        { "x-amz-date", "20150830T123600Z" } },
      4,
      EMPTY,
      "20150830T123600Z",
      "service",
      "AKIDEXAMPLE",
      "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
      "host;my-header1;my-header2;x-amz-date",
      "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736" },
    /* post-vanilla */
    { "POST",
      "/",
      "",
      { { "host", "example.amazonaws.com" }, { "x-amz-date", "20150830T123600Z" } },
      2,
      EMPTY,
      "20150830T123600Z",
      "service",
      "AKIDEXAMPLE",
      "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
      "host;x-amz-date",
      "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b" },
    /* the S3 guide: GET object with a range */
    { "GET",
      "/test.txt",
      "",
      { { "host", "examplebucket.s3.amazonaws.com" },
        { "range", "bytes=0-9" },
        { "x-amz-content-sha256", EMPTY },
        { "x-amz-date", "20130524T000000Z" } },
      4,
      EMPTY,
      "20130524T000000Z",
      "s3",
      "AKIAIOSFODNN7EXAMPLE",
      "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
      "host;range;x-amz-content-sha256;x-amz-date",
      "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41" },
    /* PUT object: "test$file.text", body "Welcome to Amazon S3." */
    { "PUT",
      "/test%24file.text",
      "",
      { { "date", "Fri, 24 May 2013 00:00:00 GMT" },
        { "host", "examplebucket.s3.amazonaws.com" },
        { "x-amz-content-sha256", "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072" },
        { "x-amz-date", "20130524T000000Z" },
        { "x-amz-storage-class", "REDUCED_REDUNDANCY" } },
      5,
      "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
      "20130524T000000Z",
      "s3",
      "AKIAIOSFODNN7EXAMPLE",
      "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
      "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
      "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd" },
    /* GET bucket lifecycle: a parameter without a value */
    { "GET",
      "/",
      "lifecycle=",
      { { "host", "examplebucket.s3.amazonaws.com" },
        { "x-amz-content-sha256", EMPTY },
        { "x-amz-date", "20130524T000000Z" } },
      3,
      EMPTY,
      "20130524T000000Z",
      "s3",
      "AKIAIOSFODNN7EXAMPLE",
      "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
      "host;x-amz-content-sha256;x-amz-date",
      "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543" },
    /* list objects */
    { "GET",
      "/",
      "max-keys=2&prefix=J",
      { { "host", "examplebucket.s3.amazonaws.com" },
        { "x-amz-content-sha256", EMPTY },
        { "x-amz-date", "20130524T000000Z" } },
      3,
      EMPTY,
      "20130524T000000Z",
      "s3",
      "AKIAIOSFODNN7EXAMPLE",
      "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
      "host;x-amz-content-sha256;x-amz-date",
      "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7" },
};

static void test_examples(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        const struct example *e = &examples[i];
        const struct s3_signing in = { .method = e->method,
                                       .path = e->path,
                                       .query = e->query,
                                       .header = e->header,
                                       .headers = e->headers,
                                       .payload = e->payload,
                                       .time = e->time,
                                       .region = "us-east-1",
                                       .service = e->service,
                                       .access_key = e->access_key,
                                       .secret_key = e->secret_key };
        char have[S3_AUTHORIZATION_BYTES], want[S3_AUTHORIZATION_BYTES];
        snprintf(want, sizeof want,
                 "AWS4-HMAC-SHA256 Credential=%s/%.8s/us-east-1/%s/aws4_request,SignedHeaders=%s,Signature=%s",
                 e->access_key, e->time, e->service, e->names, e->signature);
        OK(s3_sign(&in, have));
        assert_string_equal(have, want);
    }
}

static void test_too_long(void **state)
{
    (void)state;
    char region[300], have[S3_AUTHORIZATION_BYTES];
    memset(region, 'r', sizeof region - 1);
    region[sizeof region - 1] = 0;
    struct s3_signing in = { .method = "GET",
                             .path = "/",
                             .query = "",
                             .payload = EMPTY,
                             .time = "20130524T000000Z",
                             .region = region,
                             .service = "s3",
                             .access_key = "A",
                             .secret_key = "S" };
    FAILS(ST_INVALID, "too long", s3_sign(&in, have));
    region[20] = 0;
    OK(s3_sign(&in, have));
}

static void test_digests(void **state)
{
    (void)state;
    char sha[S3_SHA256_HEX_BYTES], md5[S3_MD5_TEXT_BYTES], crc[S3_CRC32C_TEXT_BYTES], time[S3_TIME_BYTES];
    OK(s3_sha256(NULL, 0, sha));
    assert_string_equal(sha, EMPTY);
    const struct http_piece abc[] = { { "a", 1 }, { "", 0 }, { "bc", 2 } };
    OK(s3_sha256(abc, 3, sha));
    assert_string_equal(sha, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    OK(s3_md5("", 0, md5));
    assert_string_equal(md5, "1B2M2Y8AsgTpgAmY7PhCfg==");
    OK(s3_md5("abc", 3, md5));
    assert_string_equal(md5, "kAFQmDzST7DWlj99KOF/cg==");
    s3_crc32c_text(crc32c(0, "123456789", 9), crc);
    assert_string_equal(crc, "4waSgw=="); /* e3 06 92 83 */
    s3_time_text(1369353600, time);
    assert_string_equal(time, "20130524T000000Z");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_examples),
        cmocka_unit_test(test_too_long),
        cmocka_unit_test(test_digests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
