/* s3_provider_json: what a credential command prints. A small reader of its own, since a JSON library keeps copies of
 * the strings in memory that it frees without wiping them. */
#include "storage/s3_provider.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { DEPTH = 16, NAME_BYTES = 32, TIME_BYTES = 64 };
static const time_t LAST_S = 18000000000; /* the year 2540: nanoseconds fit into 64 bits */

struct json {
    const char *at, *end;
    const char *where;
};

static status *rubbish(const struct json *j)
{
    return ERR(INVALID,
               "%s: the command's output is not the JSON object of credentials that it has to be: {\"Version\": 1, "
               "\"AccessKeyId\": ..., \"SecretAccessKey\": ..., \"SessionToken\": ..., \"Expiration\": ...}",
               j->where);
}

static void skip_blanks(struct json *j)
{
    while (j->at < j->end && strchr(" \t\r\n", *j->at) && *j->at)
        j->at++;
}

/* Whether c comes next; takes it then. */
static bool next_is(struct json *j, char c)
{
    skip_blanks(j);
    if (j->at == j->end || *j->at != c)
        return false;
    j->at++;
    return true;
}

static bool hex4(struct json *j, unsigned *out)
{
    unsigned v = 0;
    if (j->end - j->at < 4)
        return false;
    for (int i = 0; i < 4; i++) {
        char c = *j->at++;
        unsigned d = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                     : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a' + 10)
                     : c >= 'A' && c <= 'F' ? (unsigned)(c - 'A' + 10)
                                            : 16;
        if (d > 15)
            return false;
        v = v * 16 + d;
    }
    *out = v;
    return true;
}

/* One character of a string, after its backslash was seen. What is not ASCII becomes 0x7f, which no credential,
 * name or time may hold. */
static bool escaped(struct json *j, char *out)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (j->at == j->end)
        return false;
    char c = *j->at++;
    unsigned v;
    if (c == 'u') {
        if (!hex4(j, &v))
            return false;
        *out = v && v < 0x7f ? (char)v : 0x7f;
        return true;
    }
    const char *p = c ? strchr(from, c) : NULL;
    if (!p)
        return false;
    *out = to[p - from];
    return true;
}

/* A string; its opening quote was taken. buf NULL: skip it. *fits false: it has more than size - 1 bytes. */
static bool string(struct json *j, char *buf, size_t size, bool *fits)
{
    size_t n = 0;
    for (;;) {
        if (j->at == j->end)
            return false;
        char c = *j->at++;
        if (c == '"')
            break;
        if ((unsigned char)c < ' ')
            return false;
        if (c == '\\' && !escaped(j, &c))
            return false;
        if (n + 1 < size)
            buf[n] = c;
        n++;
    }
    *fits = n < size;
    if (size)
        buf[n < size ? n : size - 1] = 0;
    return true;
}

/* A number or word: what stands up to the next , ] } or blank. */
static bool scalar(struct json *j, char *buf, size_t size)
{
    size_t n = 0;
    for (; j->at < j->end && ((*j->at >= '0' && *j->at <= '9') || (*j->at >= 'a' && *j->at <= 'z') || *j->at == '-' ||
                              *j->at == '+' || *j->at == '.' || *j->at == 'E');
         j->at++)
        if (n + 1 < size)
            buf[n++] = *j->at;
        else
            return false;
    buf[n] = 0;
    return n > 0;
}

static bool skip_scalar(struct json *j)
{
    char word[NAME_BYTES];
    if (!scalar(j, word, sizeof word))
        return false;
    return strcmp(word, "true") == 0 || strcmp(word, "false") == 0 || strcmp(word, "null") == 0 || *word == '-' ||
           (*word >= '0' && *word <= '9');
}

/* Any value, with what it nests; `open` has the bracket of each level. */
static bool skip_value(struct json *j)
{
    char open[DEPTH];
    int depth = 0;
    bool fits;
    do {
        bool ended = false; /* a value ended here */
        if (next_is(j, '{')) {
            if (depth == DEPTH)
                return false;
            open[depth++] = '}';
            ended = next_is(j, '}');
        } else if (next_is(j, '[')) {
            if (depth == DEPTH)
                return false;
            open[depth++] = ']';
            ended = next_is(j, ']');
        } else {
            if (!(next_is(j, '"') ? string(j, NULL, 0, &fits) : skip_scalar(j)))
                return false;
            depth++; /* a level of its own, closed below */
            ended = true;
        }
        while (ended) {
            depth--;
            if (depth == 0)
                return true;
            if (next_is(j, open[depth - 1]))
                continue;
            if (!next_is(j, ','))
                return false;
            break;
        }
        if (depth && open[depth - 1] == '}' && (!next_is(j, '"') || !string(j, NULL, 0, &fits) || !next_is(j, ':')))
            return false;
    } while (depth);
    return true;
}

/* ---- The members */

struct reply {
    char access[S3_ACCESS_KEY_BYTES], secret[S3_ACCESS_KEY_BYTES], token[S3_SESSION_TOKEN_BYTES], time[TIME_BYTES];
    bool version, has_access, has_secret, has_token, has_time;
};

/* A string or null into buf; *has tells which. */
static status *text_member(struct json *j, const char *name, char *buf, size_t size, bool *has)
{
    char word[NAME_BYTES];
    bool fits = true;
    skip_blanks(j);
    if (*has)
        return ERR(INVALID, "%s: the command's output has %s twice", j->where, name);
    if (next_is(j, '"')) {
        if (!string(j, buf, size, &fits))
            return rubbish(j);
        if (!fits)
            return ERR(INVALID, "%s: %s in the command's output has more than %zu characters", j->where, name,
                       size - 1);
        *has = true;
        return NULL;
    }
    if (!scalar(j, word, sizeof word) || strcmp(word, "null") != 0)
        return ERR(INVALID, "%s: %s in the command's output is not a string", j->where, name);
    return NULL;
}

static status *version_member(struct json *j, struct reply *r)
{
    char word[NAME_BYTES];
    skip_blanks(j);
    if (!scalar(j, word, sizeof word) || strcmp(word, "1") != 0)
        return ERR(INVALID, "%s: Version in the command's output is not the number 1", j->where);
    r->version = true;
    return NULL;
}

static status *member(struct json *j, struct reply *r)
{
    char name[NAME_BYTES];
    bool fits;
    if (!next_is(j, '"') || !string(j, name, sizeof name, &fits) || !next_is(j, ':'))
        return rubbish(j);
    if (fits && strcmp(name, "Version") == 0)
        return version_member(j, r);
    if (fits && strcmp(name, "AccessKeyId") == 0)
        return text_member(j, "AccessKeyId", r->access, sizeof r->access, &r->has_access);
    if (fits && strcmp(name, "SecretAccessKey") == 0)
        return text_member(j, "SecretAccessKey", r->secret, sizeof r->secret, &r->has_secret);
    if (fits && strcmp(name, "SessionToken") == 0)
        return text_member(j, "SessionToken", r->token, sizeof r->token, &r->has_token);
    if (fits && strcmp(name, "Expiration") == 0)
        return text_member(j, "Expiration", r->time, sizeof r->time, &r->has_time);
    return skip_value(j) ? NULL : rubbish(j);
}

static status *members(struct json *j, struct reply *r)
{
    if (!next_is(j, '{'))
        return rubbish(j);
    if (!next_is(j, '}')) {
        do
            TRY(member(j, r));
        while (next_is(j, ','));
        if (!next_is(j, '}'))
            return rubbish(j);
    }
    skip_blanks(j);
    if (j->at != j->end)
        return rubbish(j);
    if (!r->version)
        return ERR(INVALID, "%s: Version is missing in the command's output", j->where);
    if (!r->has_access || !r->has_secret)
        return ERR(INVALID, "%s: %s is missing in the command's output", j->where,
                   r->has_access ? "SecretAccessKey" : "AccessKeyId");
    return NULL;
}

/* "+02:00", "-0530", "Z" at s as seconds east of UTC. */
static bool read_offset(const char *s, long *out)
{
    int h, m, n = 0;
    *out = 0;
    if (strcmp(s, "Z") == 0 || strcmp(s, "z") == 0)
        return true;
    if (*s != '+' && *s != '-')
        return false;
    if ((sscanf(s + 1, "%2d:%2d%n", &h, &m, &n) != 2 || s[1 + n]) &&
        (sscanf(s + 1, "%2d%2d%n", &h, &m, &n) != 2 || s[1 + n]))
        return false;
    if (h < 0 || h > 23 || m < 0 || m > 59)
        return false;
    *out = (*s == '-' ? -1 : 1) * (h * 3600L + m * 60L);
    return true;
}

/* RFC 3339: 2026-01-31T12:00:00Z, with a fraction or an offset if it likes. */
static bool read_time(const char *s, uint64_t *ns)
{
    struct tm tm = { 0 };
    const char *rest = strptime(s, "%Y-%m-%dT%H:%M:%S", &tm);
    long east;
    if (!rest)
        return false;
    if (*rest == '.') {
        size_t digits = strspn(rest + 1, "0123456789");
        if (!digits)
            return false;
        rest += 1 + digits;
    }
    if (!read_offset(rest, &east))
        return false;
    time_t t = timegm(&tm) - east;
    if (t <= 0)
        return false;
    *ns = (uint64_t)(t < LAST_S ? t : LAST_S) * 1000000000u;
    return true;
}

static status *take_reply(const struct json *j, const struct reply *r, struct s3_keys *k, uint64_t *expires_ns)
{
    char what[600];
    snprintf(what, sizeof what, "%s: AccessKeyId in the command's output", j->where);
    TRY(s3_keys_copy(k->access_key, sizeof k->access_key, r->access, what));
    snprintf(what, sizeof what, "%s: SecretAccessKey in the command's output", j->where);
    TRY(s3_keys_copy(k->secret_key, sizeof k->secret_key, r->secret, what));
    snprintf(what, sizeof what, "%s: SessionToken in the command's output", j->where);
    if (r->has_token && *r->token)
        TRY(s3_keys_copy(k->session_token, sizeof k->session_token, r->token, what));
    if (r->has_time && !read_time(r->time, expires_ns))
        return ERR(INVALID, "%s: Expiration in the command's output is no time like 2026-01-31T12:00:00Z", j->where);
    return NULL;
}

status *s3_provider_parse(const char *text, size_t n, const char *where, struct s3_keys *out, uint64_t *expires_ns)
{
    struct json j = { text, text + n, where };
    struct reply r = { 0 };
    struct s3_keys k = { 0 };
    uint64_t expires = 0;
    status *st = members(&j, &r);
    if (!st)
        st = take_reply(&j, &r, &k, &expires);
    if (!st) {
        *out = k;
        *expires_ns = expires;
    }
    explicit_bzero(&r, sizeof r);
    s3_keys_wipe(&k);
    return st;
}
