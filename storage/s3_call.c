/* s3_call: read s3_try (what is signed and sent) and s3_again (what is tried again). */
#include "storage/s3_call.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "storage/s3_xml.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum {
    CONNECT_MS = 10000,
    STALL_SECONDS = 30,
    RETRY_SECONDS = 60,
    TOTAL_MS = 300000, /* of a request, besides what its bytes take at TOTAL_RATE */
    TOTAL_RATE = 256,  /* bytes a millisecond */
    BACKOFF_FIRST_MS = 100,
    BACKOFF_MOST_MS = 10000,
    SKEW_SECONDS = 240, /* servers refuse 900; what differs less is not the reason */
    SIGNED_HEADERS = S3_CALL_HEADERS + 4,
    LINE_BYTES = S3_SESSION_TOKEN_BYTES + 64
};

/* ---- Settings */

static status *setting(const char *name, uint32_t most, uint32_t *out)
{
    const char *text = getenv(name);
    if (!text || !*text)
        return NULL;
    char *end;
    errno = 0;
    unsigned long v = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || v > most)
        return ERR(INVALID, "%s=%.40s: a whole number from 0 to %u is wanted", name, text, (unsigned)most);
    *out = (uint32_t)v;
    return NULL;
}

/* The bytes leave this machine in no way that could change them. */
static bool is_loopback(const char *host)
{
    size_t name = strcspn(host, ":");
    return (strncmp(host, "127.", 4) == 0 && strspn(host, "0123456789.") == name) ||
           (name == 9 && strncmp(host, "localhost", 9) == 0) || strncmp(host, "[::1]", 5) == 0;
}

status *s3_open(const char *path, _Atomic uint64_t *retries, struct s3 *out)
{
    uint32_t stall = STALL_SECONDS, retry = RETRY_SECONDS, sign = 2;
    TRY(setting("TESSERA_S3_STALL_SECONDS", 3600, &stall));
    TRY(setting("TESSERA_S3_RETRY_SECONDS", 86400, &retry));
    TRY(setting("TESSERA_S3_SIGN_BODIES", 1, &sign));
    *out = (struct s3){ .stall_ms = (stall ? stall : 1) * 1000, .retry_ms = retry * 1000, .retries = retries };
    TRY(s3_config_open(path, &out->config));
    out->sign_bodies = sign == 2 ? !out->config.tls && !is_loopback(out->config.host) : sign;
    const struct http_options o = { .ca_file = out->config.ca_file, .connect_ms = CONNECT_MS };
    status *st = http_open(&o, &out->http);
    if (st)
        s3_config_close(&out->config);
    return st;
}

void s3_close(struct s3 *s)
{
    http_close(s->http);
    s3_config_close(&s->config);
}

status *s3_random(uint64_t *out)
{
    while (getrandom(out, sizeof *out, 0) != (ssize_t)sizeof *out)
        if (errno != EINTR)
            return ERR_SYS(errno, "getrandom");
    return NULL;
}

/* ---- Words */

/* "GET s3://bucket/prefix/key", "GET s3://bucket" */
static void describe(const struct s3 *s, const struct s3_call *c, char *buf, size_t size)
{
    char object[S3_KEY_BYTES] = "";
    status *st = s3_config_object(&s->config, c->key ? c->key : "", object, sizeof object);
    status_free(st);
    snprintf(buf, size, "%s s3://%s/%s", c->method, s->config.bucket, c->key ? object : "");
}

static int64_t server_less_ours(const struct http_reply *r)
{
    char date[64];
    uint64_t then;
    if (!http_header(r, "date", date, sizeof date) || !http_date(date, &then))
        return 0;
    return (int64_t)then - (int64_t)(clock_wall_ns() / 1000000000u);
}

struct refusal {
    const char *code; /* of the fault */
    enum status_code as;
    const char *advice;
};

/* What is wrong and what to check. UNAVAILABLE: another try may mend it. */
static const struct refusal refusals[] = {
    { "NoSuchKey", ST_NOT_FOUND, "there is no such object" },
    { "NoSuchUpload", ST_NOT_FOUND, "there is no such upload (it was completed or aborted)" },
    { "NoSuchBucket", ST_INVALID, "there is no such bucket: check the URL and AWS_ENDPOINT_URL_S3, or create it" },
    { "InvalidBucketName", ST_INVALID, "the server does not take this name of a bucket: check the URL" },
    { "PreconditionFailed", ST_EXISTS, "an object of that name is there already" },
    { "ConditionalRequestConflict", ST_UNAVAILABLE, "another request for the same object was under way" },
    { "OperationAborted", ST_UNAVAILABLE, "another request for the same object was under way" },
    { "InvalidAccessKeyId", ST_INVALID,
      "the server does not know the access key id: check AWS_ACCESS_KEY_ID or the profile, and that they belong to "
      "this "
      "endpoint" },
    { "SignatureDoesNotMatch", ST_INVALID,
      "the signature is not right: check AWS_SECRET_ACCESS_KEY or the profile (a proxy that changes requests does it, "
      "too)" },
    { "AccessDenied", ST_INVALID,
      "access is denied: check that the credentials may read, write, list and delete in this bucket" },
    { "AllAccessDisabled", ST_INVALID, "access to this bucket is disabled" },
    { "AccountProblem", ST_INVALID, "there is a problem with the account" },
    { "ExpiredToken", ST_INVALID, "the session token has expired: renew the credentials" },
    { "TokenRefreshRequired", ST_INVALID, "the session token has expired: renew the credentials" },
    { "InvalidToken", ST_INVALID, "the session token is not valid: check AWS_SESSION_TOKEN, or renew the credentials" },
    { "QuotaExceeded", ST_NO_SPACE, "the quota is used up: remove old steps or ask for more" },
    { "XMinioStorageFull", ST_NO_SPACE, "the storage is full" },
    { "StorageFull", ST_NO_SPACE, "the storage is full" },
    { "EntityTooLarge", ST_INVALID, "the object is larger than the server takes" },
    { "BadDigest", ST_UNAVAILABLE, "the bytes that arrived are not those that were sent" },
    { "XAmzContentSHA256Mismatch", ST_UNAVAILABLE, "the bytes that arrived are not those that were sent" },
    { "IncompleteBody", ST_UNAVAILABLE, "not all bytes arrived" },
    { "RequestTimeout", ST_UNAVAILABLE, "the server waited too long for the request" },
    { "SlowDown", ST_UNAVAILABLE, "the server asks for fewer requests" },
    { "TooManyRequests", ST_UNAVAILABLE, "the server asks for fewer requests" },
    { "ServiceUnavailable", ST_UNAVAILABLE, "the server is not available" },
    { "InternalError", ST_UNAVAILABLE, "the server failed" },
    { "NotImplemented", ST_UNSUPPORTED, "the server cannot do this" },
};

static enum status_code code_of(int http)
{
    if (http == 404)
        return ST_NOT_FOUND;
    if (http == 412)
        return ST_EXISTS;
    if (http == 507)
        return ST_NO_SPACE;
    if (http == 501)
        return ST_UNSUPPORTED;
    if (http == 408 || http == 409 || http == 425 || http == 429 || http >= 500)
        return ST_UNAVAILABLE;
    return http == 401 || http == 403 || (http >= 300 && http < 400) ? ST_INVALID : ST_IO;
}

static bool is_skew(const struct http_reply *r, const struct s3_fault *f)
{
    if (strcmp(f->code, "RequestTimeTooSkewed") == 0)
        return true;
    int64_t d = server_less_ours(r);
    return r->status == 403 && !f->code[0] && (d > SKEW_SECONDS || d < -SKEW_SECONDS);
}

static bool is_expired(const struct http_reply *r, const struct s3_fault *f, bool has_token)
{
    return strcmp(f->code, "ExpiredToken") == 0 || strcmp(f->code, "ExpiredTokenException") == 0 ||
           strcmp(f->code, "TokenRefreshRequired") == 0 ||
           (has_token && !f->code[0] && (r->status == 400 || r->status == 403)); /* HEAD gives no reason */
}

/* The region that the server names when it was asked by another. */
static bool right_region(const struct http_reply *r, const struct s3_fault *f, char region[64])
{
    snprintf(region, 64, "%s", f->region);
    bool wrong = strcmp(f->code, "AuthorizationHeaderMalformed") == 0 || strcmp(f->code, "PermanentRedirect") == 0 ||
                 strcmp(f->code, "TemporaryRedirect") == 0 ||
                 strcmp(f->code, "IllegalLocationConstraintException") == 0 || (r->status >= 300 && r->status < 400) ||
                 (!f->code[0] && r->status == 400);
    if (wrong && !region[0])
        (void)http_header(r, "x-amz-bucket-region", region, 64);
    return wrong && region[0];
}

static status *refuse(enum status_code code, const char *what, const struct http_reply *r, const struct s3_fault *f,
                      const char *advice)
{
    return status_new(__FILE__, __LINE__, code, "%s: %s (HTTP %d%s%s%s%s)", what, advice, r->status,
                      f->code[0] ? " " : "", f->code, f->message[0] ? ": " : "", f->message);
}

status *s3_refusal(const struct s3 *s, const struct s3_call *c, const struct http_reply *r)
{
    char what[1200], region[64], advice[300];
    struct s3_fault f;
    s3_xml_fault(r->text, r->text_bytes, &f);
    describe(s, c, what, sizeof what);
    if (is_skew(r, &f)) {
        snprintf(advice, sizeof advice,
                 "the clocks differ: the server's is %lld s ahead of this machine's; set the clock",
                 (long long)server_less_ours(r));
        return refuse(ST_INVALID, what, r, &f, advice);
    }
    if (right_region(r, &f, region) && strcmp(region, s->config.region) != 0) {
        snprintf(
            advice, sizeof advice,
            "the bucket is in region %s, but requests are signed for %s: set AWS_REGION=%s (and the endpoint, if it "
            "names a region)",
            region, s->config.region, region);
        return refuse(ST_INVALID, what, r, &f, advice);
    }
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
        if (strcmp(refusals[i].code, f.code) == 0)
            return refuse(refusals[i].as, what, r, &f, refusals[i].advice);
    enum status_code code = code_of(r->status);
    const char *plain = code == ST_NOT_FOUND     ? "there is no such object"
                        : code == ST_EXISTS      ? "an object of that name is there already"
                        : code == ST_UNAVAILABLE ? "the server is not available"
                        : r->status == 403       ? "access is denied: check the credentials and what they may do"
                        : code == ST_INVALID && r->status < 400
                            ? "the server sends elsewhere: check the endpoint and AWS_REGION"
                            : "the server refuses";
    return refuse(code, what, r, &f, plain);
}

/* ---- One try */

struct attempt {
    struct s3_keys keys;
    char url[S3_URL_BYTES], path[S3_URL_BYTES], query[S3_URL_BYTES];
    char time[S3_TIME_BYTES], authorization[S3_AUTHORIZATION_BYTES];
    struct s3_header header[SIGNED_HEADERS];
    size_t headers;
    char line[SIGNED_HEADERS + 1][LINE_BYTES];
    const char *lines[SIGNED_HEADERS + 1];
};

static void add_header(struct attempt *a, const char *name, const char *value)
{
    size_t i = a->headers++;
    for (; i > 0 && strcmp(a->header[i - 1].name, name) > 0; i--)
        a->header[i] = a->header[i - 1];
    a->header[i] = (struct s3_header){ name, value };
}

static size_t count_params(const struct s3_call *c)
{
    size_t n = 0;
    while (n < S3_CALL_PARAMS && c->param[n].name)
        n++;
    return n;
}

static status *hash_body(const struct s3 *s, const struct s3_call *c, struct s3_tries *t)
{
    if (t->payload[0])
        return NULL;
    if (s->sign_bodies || !c->pieces)
        return s3_sha256(c->body, c->pieces, t->payload);
    snprintf(t->payload, sizeof t->payload, "UNSIGNED-PAYLOAD");
    return NULL;
}

static status *sign(struct s3 *s, const struct s3_call *c, struct s3_tries *t, struct attempt *a)
{
    TRY(s3_config_keys(&s->config, &a->keys));
    t->generation = a->keys.generation;
    t->has_token = a->keys.session_token[0];
    TRY(s3_query(c->param, count_params(c), a->query, sizeof a->query));
    TRY(s3_config_path(&s->config, c->key, a->path, sizeof a->path));
    TRY(s3_config_url(&s->config, c->key, a->query, a->url, sizeof a->url));
    TRY(hash_body(s, c, t));
    s3_time_text((uint64_t)((int64_t)(clock_wall_ns() / 1000000000u) + atomic_load(&s->skew_s)), a->time);
    add_header(a, "host", s->config.host);
    add_header(a, "x-amz-content-sha256", t->payload);
    add_header(a, "x-amz-date", a->time);
    if (a->keys.session_token[0])
        add_header(a, "x-amz-security-token", a->keys.session_token);
    for (size_t i = 0; i < S3_CALL_HEADERS && c->header[i].name; i++)
        add_header(a, c->header[i].name, c->header[i].value);
    const struct s3_signing in = { .method = c->method,
                                   .path = a->path,
                                   .query = a->query,
                                   .header = a->header,
                                   .headers = a->headers,
                                   .payload = t->payload,
                                   .time = a->time,
                                   .region = s->config.region,
                                   .service = "s3",
                                   .access_key = a->keys.access_key,
                                   .secret_key = a->keys.secret_key };
    TRY(s3_sign(&in, a->authorization));
    for (size_t i = 0; i < a->headers; i++) {
        snprintf(a->line[i], sizeof a->line[i], "%s: %s", a->header[i].name, a->header[i].value);
        a->lines[i] = a->line[i];
    }
    snprintf(a->line[a->headers], sizeof a->line[0], "Authorization: %s", a->authorization);
    a->lines[a->headers] = a->line[a->headers];
    return NULL;
}

static status *send_signed(struct s3 *s, const struct s3_call *c, const struct attempt *a, struct http_reply *r)
{
    uint64_t bytes = c->room + c->more;
    for (size_t i = 0; i < c->pieces; i++)
        bytes += c->body[i].bytes;
    const struct http_request q = { .method = c->method,
                                    .url = a->url,
                                    .header = a->lines,
                                    .headers = a->headers + 1,
                                    .body = c->body,
                                    .pieces = c->pieces,
                                    .into = c->into,
                                    .room = c->room,
                                    .more = c->more,
                                    .text_max = S3_XML_REPLY_BYTES,
                                    .stall_ms = c->stall_ms ? c->stall_ms : s->stall_ms,
                                    .total_ms = (uint32_t)(TOTAL_MS + bytes / TOTAL_RATE),
                                    .hedge = c->hedge,
                                    .hedge_arg = c->hedge_arg };
    return http_do(s->http, &q, r);
}

status *s3_try(struct s3 *s, const struct s3_call *c, struct s3_tries *t, struct http_reply *r)
{
    *r = (struct http_reply){ .length = UINT64_MAX };
    if (t->tries++)
        atomic_fetch_add(s->retries, 1);
    struct attempt *a = mem_calloc(1, sizeof *a);
    if (!a)
        return ERR(NO_MEMORY, "a request");
    status *st = sign(s, c, t, a);
    if (!st)
        st = send_signed(s, c, a, r);
    explicit_bzero(a, sizeof *a);
    mem_free(a);
    if (!st && (r->status < 200 || r->status > 299))
        st = s3_refusal(s, c, r);
    return st;
}

/* ---- Trying again */

/* Mend what the refusal is about, once a call: true if there is reason to try at once. */
static bool mend(struct s3 *s, struct s3_tries *t, const struct http_reply *r)
{
    struct s3_fault f;
    if (r->status < 400 || r->status > 499)
        return false;
    s3_xml_fault(r->text, r->text_bytes, &f);
    if (is_skew(r, &f) && !t->skew_fixed) {
        atomic_store(&s->skew_s, server_less_ours(r));
        t->skew_fixed = true;
        return true;
    }
    if (is_expired(r, &f, t->has_token) && !t->keys_renewed) {
        const struct s3_keys refused = { .generation = t->generation };
        status *st = s3_config_renew(&s->config, &refused);
        t->keys_renewed = true;
        bool renewed = !st;
        status_free(st); /* the refusal itself says what is wrong */
        return renewed;
    }
    return false;
}

static uint64_t backoff_us(const struct s3_tries *t, const struct http_reply *r)
{
    uint32_t doublings = t->tries < 8 ? t->tries - 1 : 7;
    uint64_t most = (uint64_t)BACKOFF_FIRST_MS << doublings, random = 0;
    most = most < BACKOFF_MOST_MS ? most : BACKOFF_MOST_MS;
    status_free(s3_random(&random));
    uint64_t us = most * 500 + random % (most * 500 + 1);
    char after[32];
    if (http_header(r, "retry-after", after, sizeof after) && after[0] >= '0' && after[0] <= '9') {
        uint64_t asked = strtoull(after, NULL, 10) * 1000000;
        asked = asked < BACKOFF_MOST_MS * 1000ull ? asked : BACKOFF_MOST_MS * 1000ull;
        us = us > asked ? us : asked;
    }
    return us;
}

bool s3_again(struct s3 *s, struct s3_tries *t, const struct http_reply *r, status **st)
{
    bool again = mend(s, t, r);
    if (!again && status_code(*st) == ST_UNAVAILABLE) {
        uint64_t now = clock_ns(), wait = backoff_us(t, r);
        if (!t->first_failure_ns)
            t->first_failure_ns = now;
        again = now + wait * 1000 - t->first_failure_ns <= (uint64_t)s->retry_ms * 1000000;
        if (again)
            clock_sleep_us((uint32_t)wait);
        else
            *st = status_wrap(*st, "given up after %u tries in %.0f s", t->tries, ns_to_s(now - t->first_failure_ns));
    }
    if (again) {
        status_free(*st);
        *st = NULL;
    }
    return again;
}

status *s3_send(struct s3 *s, const struct s3_call *c, struct http_reply *r)
{
    struct s3_tries t = { 0 };
    for (;;) {
        status *st = s3_try(s, c, &t, r);
        if (!st || !s3_again(s, &t, r, &st))
            return st;
        http_reply_free(r);
    }
}

status *s3_send_only(struct s3 *s, const struct s3_call *c)
{
    struct http_reply *r = mem_calloc(1, sizeof *r);
    if (!r)
        return ERR(NO_MEMORY, "a reply");
    status *st = s3_send(s, c, r);
    http_reply_free(r);
    mem_free(r);
    return st;
}
