/* s3_put: read s3_put_exclusive: the probe, then the way it found. */
#include "storage/s3_put.h"

#include "comm/base/clock.h"
#include "storage/s3_list.h"
#include "storage/s3_multipart.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { CLAIM_SECONDS = 60, CLAIM_WAIT_US = 200000, CLAIM_WAIT_MOST_US = 3200000 };

#define CLAIM_RANDOM 0xccccccccccccccccu

status *s3_temp_key(const char *key, uint64_t random, char *buf, size_t size)
{
    const char *slash = strrchr(key, '/'), *name = slash ? slash + 1 : key;
    int n = snprintf(buf, size, "%.*s.tmp-%016" PRIx64 "-%s", (int)(name - key), key, random, name);
    return n > 0 && (size_t)n < size ? NULL : ERR(INVALID, "key %.60s...: too long", key);
}

/* One PUT. mark: NULL, or what the object carries. */
static status *put(struct s3 *s, const char *key, const void *buf, size_t n, const char *mark, bool conditional)
{
    char crc[S3_CRC32C_TEXT_BYTES];
    const struct http_piece body = { buf, n };
    s3_crc32c_of(&body, 1, crc);
    struct s3_call c = {
        .method = "PUT", .key = key, .header = { { "x-amz-checksum-crc32c", crc } }, .body = &body, .pieces = 1
    };
    size_t more = 1;
    if (mark)
        c.header[more++] = (struct s3_header){ "x-amz-meta-tessera-put", mark };
    if (conditional)
        c.header[more++] = (struct s3_header){ "if-none-match", "*" };
    struct http_reply r;
    status *st = s3_send(s, &c, &r);
    http_reply_free(&r);
    return st;
}

status *s3_put(struct s3 *s, const char *key, const void *buf, size_t n)
{
    return put(s, key, buf, n, NULL, false);
}

static status *drop(struct s3 *s, const char *key)
{
    const struct s3_call c = { .method = "DELETE", .key = key };
    status *st = s3_send_only(s, &c);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

/* ---- What the server honours */

/* What a conditional put over an object that is there shows: EXISTS: honoured. Anything that the server can say to what
 * it does not know means no; what may be a passing failure is none. */
static status *judge(status *st, bool *honoured)
{
    enum status_code code = status_code(st);
    *honoured = code == ST_EXISTS;
    if (code != ST_OK && code != ST_EXISTS && code != ST_UNSUPPORTED && code != ST_IO)
        return st;
    status_free(st);
    return NULL;
}

static status *ask(struct s3 *s, const char *temp, const char *mark, enum s3_exclusive *out)
{
    bool by_put;
    TRY(judge(put(s, temp, "x", 1, mark, true), &by_put));
    *out = by_put ? S3_EXCLUSIVE_PUT : S3_EXCLUSIVE_CLAIM;
    return NULL;
}

static status *probe(struct s3 *s, const char *key, enum s3_exclusive *out)
{
    char temp[S3_KEY_BYTES], mark[S3_MARK_BYTES];
    uint64_t random;
    *out = (enum s3_exclusive)atomic_load(&s->exclusive);
    if (*out != S3_EXCLUSIVE_UNKNOWN)
        return NULL;
    TRY(s3_random(&random));
    TRY(s3_temp_key(key, random, temp, sizeof temp));
    TRY(s3_mark_draw(mark));
    TRY(put(s, temp, "x", 1, NULL, false));
    status *st = ask(s, temp, mark, out);
    st = status_first(st, drop(s, temp));
    if (!st)
        atomic_store(&s->exclusive, *out);
    return status_wrap(st, "finding out how this server puts exclusively");
}

/* ---- Claims */

static status *is_there(struct s3 *s, const char *key, bool *yes)
{
    const struct s3_call c = { .method = "HEAD", .key = key };
    status *st = s3_send_only(s, &c);
    *yes = !st;
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

struct claims {
    struct s3 *s;
    const char *own;  /* key of ours */
    size_t prefix;    /* bytes of it before the random word */
    uint64_t now_ns;  /* the server's clock after ours was put */
    bool any, before; /* there are others; one whose name comes before ours */
};

static status *other_claim(void *arg, const char *key, const struct s3_found *f)
{
    struct claims *k = arg;
    int order = strcmp(key, k->own);
    if (strlen(key) != k->prefix + 16 || order == 0) /* of "NAME.x", or ours */
        return NULL;
    if (k->now_ns > f->mtime_ns && k->now_ns - f->mtime_ns > CLAIM_SECONDS * 1000000000ull)
        return drop(k->s, key);
    k->any = true;
    k->before = k->before || order < 0;
    return NULL;
}

static void wait_random(uint32_t most_us)
{
    uint64_t random = 0;
    status_free(s3_random(&random));
    clock_sleep_us((uint32_t)(random % most_us));
}

/* Our claim is there: wait until it is the only one. *lost: one whose name comes before ours is there, too. */
static status *outlast(struct s3 *s, const char *prefix, const char *own, bool *lost)
{
    const struct s3_call look = { .method = "HEAD" };
    struct claims k = { .s = s, .own = own, .prefix = strlen(prefix) };
    const struct s3_listing l = { .prefix = prefix, .flat = true, .found = other_claim, .arg = &k };
    for (;;) {
        struct http_reply r;
        status *st = s3_send(s, &look, &r);
        if (!st)
            st = s3_date(&r, &k.now_ns);
        http_reply_free(&r);
        TRY(st);
        k.any = k.before = false;
        TRY(s3_list(s, &l, NULL));
        *lost = k.before;
        if (!k.any || k.before)
            return NULL;
        wait_random(CLAIM_WAIT_US); /* the others see ours and go, or die */
    }
}

/* Claim the key and put the object if it is not there; *lost: another claim comes first. */
static status *try_claim(struct s3 *s, const char *key, const char *prefix, const void *buf, size_t n, bool *lost)
{
    char own[S3_KEY_BYTES];
    uint64_t random;
    bool there = false;
    TRY(s3_random(&random));
    snprintf(own, sizeof own, "%s%016" PRIx64, prefix, random);
    TRY(put(s, own, "x", 1, NULL, false));
    status *st = outlast(s, prefix, own, lost);
    if (!st && !*lost)
        st = is_there(s, key, &there);
    if (!st && !*lost)
        st = there ? ERR(EXISTS, "%s is there already", key) : put(s, key, buf, n, NULL, false);
    return status_first(st, drop(s, own));
}

static status *put_by_claim(struct s3 *s, const char *key, const void *buf, size_t n)
{
    char prefix[S3_KEY_BYTES - 32];
    TRY(s3_temp_key(key, CLAIM_RANDOM, prefix, sizeof prefix - 1));
    size_t used = strlen(prefix);
    prefix[used] = '.';
    prefix[used + 1] = 0;
    uint64_t begin = clock_ns();
    uint32_t most_us = CLAIM_WAIT_US;
    for (;;) {
        bool there, lost = false;
        TRY(is_there(s, key, &there));
        if (there)
            return ERR(EXISTS, "%s is there already", key);
        TRY(try_claim(s, key, prefix, buf, n, &lost));
        if (!lost)
            return NULL;
        if (clock_ns() - begin > 2ull * CLAIM_SECONDS * 1000000000u)
            return ERR(UNAVAILABLE, "%s: others claim it again and again", key);
        wait_random(most_us);
        most_us = most_us < CLAIM_WAIT_MOST_US ? 2 * most_us : most_us;
    }
}

/* ---- Exclusive puts */

/* What is there already may be ours: a reply got lost, and the request was sent again, by s3_send or by libcurl. */
static status *put_if_none(struct s3 *s, const char *key, const void *buf, size_t n, const char *mark)
{
    bool ours = false;
    status *st = put(s, key, buf, n, mark, true);
    if (status_code(st) != ST_EXISTS)
        return st;
    status *look = s3_mark_is_on(s, key, mark, &ours);
    status_free(look); /* not known: somebody's it is */
    if (!ours)
        return st;
    status_free(st);
    return NULL;
}

status *s3_put_exclusive(struct s3 *s, const char *key, const void *buf, size_t n)
{
    enum s3_exclusive how;
    char mark[S3_MARK_BYTES];
    TRY(probe(s, key, &how));
    TRY(s3_mark_draw(mark));
    if (how == S3_EXCLUSIVE_PUT)
        return put_if_none(s, key, buf, n, mark);
    return put_by_claim(s, key, buf, n);
}
