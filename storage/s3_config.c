/* s3_config: the settings of one bucket. To read: s3_config_open at the end, which calls the parts in order: the URL,
 * the profile, region, certificates, endpoint, and how the bucket is addressed. */
#include "storage/s3_config.h"

#include "comm/base/mem.h"
#include "storage/s3_ini.h"
#include "storage/s3_keys.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

enum { HOST_BYTES = 254, PREFIX_BYTES = 512, SEGMENT_BYTES = 255, WHERE_BYTES = 600 };

/* A variable, or what s3_value says of a file; path is the variable's name then and line 0. */
static void where(const struct s3_value *v, char text[WHERE_BYTES])
{
    if (v->line)
        snprintf(text, WHERE_BYTES, "%s:%d", v->path, v->line);
    else
        snprintf(text, WHERE_BYTES, "%s", v->path);
}

static bool from_variable(const char *name, struct s3_value *out)
{
    const char *v = getenv(name);
    if (!v || !*v)
        return false;
    *out = (struct s3_value){ v, name, 0 };
    return true;
}

static bool letter_or_digit(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

static bool all_of(const char *s, size_t n, const char *marks)
{
    for (size_t i = 0; i < n; i++)
        if (!letter_or_digit(s[i]) && (!s[i] || !strchr(marks, s[i])))
            return false;
    return true;
}

static bool ends_with(const char *s, const char *tail)
{
    size_t n = strlen(s), m = strlen(tail);
    return n >= m && strcmp(s + n - m, tail) == 0;
}

static status *copy(const char *s, size_t n, char **out)
{
    *out = mem_alloc(n + 1);
    if (!*out)
        return ERR(NO_MEMORY, "s3: %zu bytes", n);
    memcpy(*out, s, n);
    (*out)[n] = 0;
    return NULL;
}

/* ---- s3://BUCKET/PREFIX */

/* The message does not quote the URL: somebody may have put a key into it. */
static status *wrong_url(void)
{
    return ERR(INVALID, "s3: a URL is s3://BUCKET or s3://BUCKET/PREFIX; BUCKET: 3 to 255 of A-Za-z0-9._-, the first "
                        "and the last a letter or digit; PREFIX: segments of 1 to 255 of A-Za-z0-9._~=+@,:!*'()-, none "
                        "\".\" or \"..\", separated by single slashes, 511 in all; nothing is percent-encoded, and "
                        "credentials have no place in it");
}

static bool good_bucket(const char *s, size_t n)
{
    return n >= 3 && n <= SEGMENT_BYTES && all_of(s, n, "._-") && letter_or_digit(s[0]) && letter_or_digit(s[n - 1]);
}

static bool good_prefix(const char *s, size_t n)
{
    if (n >= PREFIX_BYTES)
        return false;
    for (size_t at = 0; at < n;) {
        const char *slash = memchr(s + at, '/', n - at);
        size_t len = slash ? (size_t)(slash - (s + at)) : n - at;
        bool dots = (len == 1 && s[at] == '.') || (len == 2 && s[at] == '.' && s[at + 1] == '.');
        if (!len || len > SEGMENT_BYTES || dots || !all_of(s + at, len, "._~=+@,:!*'()-"))
            return false;
        at += len + (slash != NULL);
    }
    return true;
}

static status *read_url(const char *path, struct s3_config *c)
{
    if (strncmp(path, "//", 2) != 0)
        return wrong_url();
    const char *bucket = path + 2;
    size_t n = strcspn(bucket, "/");
    const char *prefix = bucket[n] ? bucket + n + 1 : "";
    size_t m = strlen(prefix);
    if (m && prefix[m - 1] == '/')
        m--;
    if (!good_bucket(bucket, n) || !good_prefix(prefix, m) || (*prefix && (!m || prefix[m - 1] == '/')))
        return wrong_url();
    TRY(copy(bucket, n, &c->bucket));
    return copy(prefix, m, &c->prefix);
}

/* ---- The profile and what it says */

static status *read_profile(const struct s3_files *f, struct s3_config *c)
{
    struct s3_value v;
    if (!from_variable("AWS_PROFILE", &v) && !from_variable("AWS_DEFAULT_PROFILE", &v))
        return copy("default", strlen("default"), &c->profile);
    if (!s3_ini_find(&f->credentials, S3_PROFILE, v.text, NULL, NULL) &&
        !s3_ini_find(&f->config, S3_PROFILE, v.text, NULL, NULL)) {
        const struct s3_entry *bare = s3_ini_find(&f->config, S3_OTHER, v.text, NULL, NULL);
        if (bare)
            return ERR(INVALID, "%s:%d: [%s] is no profile in this file; it has to be [profile %s]", f->config.path,
                       bare->line, v.text, v.text);
        return ERR(INVALID, "%s: no profile %.64s in %.300s or in %.300s", v.path, v.text,
                   f->credentials.path ? f->credentials.path : "~/.aws/credentials",
                   f->config.path ? f->config.path : "~/.aws/config");
    }
    return copy(v.text, strlen(v.text), &c->profile);
}

static status *read_region(const struct s3_files *f, struct s3_config *c)
{
    struct s3_value v = { 0 };
    if (!from_variable("AWS_REGION", &v) && !from_variable("AWS_DEFAULT_REGION", &v))
        TRY(s3_files_value(f, c->profile, NULL, "region", &v));
    const char *region = v.text ? v.text : "us-east-1";
    size_t n = strlen(region);
    if (n > 63 || !all_of(region, n, "_-")) {
        char at[WHERE_BYTES];
        where(&v, at);
        return ERR(INVALID, "%s: a region is 1 to 63 of A-Za-z0-9_-", at);
    }
    return copy(region, n, &c->region);
}

static status *read_ca(const struct s3_files *f, struct s3_config *c)
{
    struct s3_value v = { 0 };
    if (!from_variable("AWS_CA_BUNDLE", &v))
        TRY(s3_files_value(f, c->profile, NULL, "ca_bundle", &v));
    if (!v.text)
        return NULL;
    if (access(v.text, R_OK) != 0) {
        char at[WHERE_BYTES];
        int why = errno;
        where(&v, at);
        return ERR_SYS(why, "%s: the file of certificates cannot be read", at);
    }
    return copy(v.text, strlen(v.text), &c->ca_file);
}

/* ---- The endpoint */

struct endpoint {
    bool tls, given;       /* given: by a setting; otherwise it is Amazon's own for the region */
    char host[HOST_BYTES]; /* in lower case; an IPv6 address has its brackets */
    char port[8];          /* ":7480", or "" for the scheme's own */
    char path[PREFIX_BYTES];
};

/* The [services NAME] section that the profile names. */
static status *from_services(const struct s3_files *f, const char *profile, struct s3_value *out)
{
    struct s3_value services;
    TRY(s3_files_value(f, profile, NULL, "services", &services));
    if (!services.text)
        return NULL;
    if (!s3_ini_find(&f->config, S3_SERVICES, services.text, NULL, NULL))
        return ERR(INVALID, "%s:%d: the section that services names is not there: [services NAME] in %s", services.path,
                   services.line, f->config.path ? f->config.path : "~/.aws/config");
    return s3_entry_value(&f->config, s3_ini_find(&f->config, S3_SERVICES, services.text, "s3", "endpoint_url"), out);
}

static status *ignored(const struct s3_files *f, const char *profile, bool *out)
{
    struct s3_value v = { 0 };
    if (!from_variable("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", &v))
        TRY(s3_files_value(f, profile, NULL, "ignore_configured_endpoint_urls", &v));
    *out = v.text && strcasecmp(v.text, "true") == 0;
    if (v.text && !*out && strcasecmp(v.text, "false") != 0) {
        char at[WHERE_BYTES];
        where(&v, at);
        return ERR(INVALID, "%s: has to be true or false", at);
    }
    return NULL;
}

/* text NULL: no endpoint is set. */
static status *find_endpoint(const struct s3_files *f, const char *profile, struct s3_value *v)
{
    bool none;
    TRY(ignored(f, profile, &none));
    if (none || from_variable("AWS_ENDPOINT_URL_S3", v) || from_variable("AWS_ENDPOINT_URL", v))
        return NULL;
    TRY(from_services(f, profile, v));
    if (!v->text)
        TRY(s3_files_value(f, profile, "s3", "endpoint_url", v));
    return v->text ? NULL : s3_files_value(f, profile, NULL, "endpoint_url", v);
}

static bool read_host(const char *s, size_t n, char host[HOST_BYTES])
{
    if (!n || n >= HOST_BYTES)
        return false;
    for (size_t i = 0; i < n; i++)
        host[i] = (char)tolower((unsigned char)s[i]);
    host[n] = 0;
    if (*host != '[')
        return all_of(host, n, ".-_") && letter_or_digit(*host) && letter_or_digit(host[n - 1]) && !strstr(host, "..");
    struct in6_addr address;
    host[n - 1] = 0;
    bool good = n > 2 && s[n - 1] == ']' && inet_pton(AF_INET6, host + 1, &address) == 1;
    host[n - 1] = ']';
    return good;
}

/* s: what follows the host, ":PORT" or nothing, n bytes. */
static bool read_port(const char *s, size_t n, struct endpoint *e)
{
    unsigned port = 0;
    if (!n)
        return true;
    if (*s != ':' || n < 2 || n > 6)
        return false;
    for (size_t i = 1; i < n; i++) {
        if (s[i] < '0' || s[i] > '9')
            return false;
        port = port * 10 + (unsigned)(s[i] - '0');
    }
    if (port < 1 || port > 65535)
        return false;
    if (port != (e->tls ? 443u : 80u))
        snprintf(e->port, sizeof e->port, ":%u", port);
    return true;
}

static bool read_endpoint(const char *s, struct endpoint *e)
{
    size_t skip = strncasecmp(s, "http://", 7) == 0 ? 7 : strncasecmp(s, "https://", 8) == 0 ? 8 : 0;
    if (!skip)
        return false;
    e->tls = skip == 8;
    s += skip;
    size_t n = strcspn(s, "/"), host = *s == '[' ? strcspn(s, "]") + 1 : strcspn(s, ":/");
    if (host > n || !read_host(s, host, e->host) || !read_port(s + host, n - host, e))
        return false;
    const char *path = s + n;
    size_t m = strlen(path);
    while (m && path[m - 1] == '/')
        m--;
    if (m >= sizeof e->path || !all_of(path, m, "/-._~"))
        return false;
    memcpy(e->path, path, m);
    e->path[m] = 0;
    return !strstr(e->path, "//") && !strstr(e->path, "/./") && !strstr(e->path, "/../") && !ends_with(e->path, "/.") &&
           !ends_with(e->path, "/..");
}

static status *choose_endpoint(const struct s3_files *f, const struct s3_config *c, struct endpoint *e)
{
    struct s3_value v = { 0 };
    TRY(find_endpoint(f, c->profile, &v));
    *e = (struct endpoint){ .tls = true, .given = v.text != NULL };
    if (!v.text) {
        const char *domain = strncmp(c->region, "cn-", 3) == 0 ? "amazonaws.com.cn" : "amazonaws.com";
        if (strchr(c->region, '_'))
            return ERR(INVALID, "s3: without an endpoint the region is part of a host name: letters, digits and -");
        snprintf(e->host, sizeof e->host, "s3.%s.%s", c->region, domain);
        return NULL;
    }
    if (!read_endpoint(v.text, e)) {
        char at[WHERE_BYTES];
        where(&v, at);
        return ERR(INVALID,
                   "%s: an endpoint is http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH], without a "
                   "user, a query or percent signs; an IPv6 address stands in brackets",
                   at);
    }
    return NULL;
}

/* ---- Where the bucket's name goes */

enum style { STYLE_AUTO, STYLE_PATH, STYLE_VIRTUAL };

static status *read_style(const struct s3_files *f, const char *profile, enum style *out, struct s3_value *v)
{
    static const char *const name[] = { "auto", "path", "virtual" };
    *v = (struct s3_value){ 0 };
    *out = STYLE_AUTO;
    if (!from_variable("TESSERA_S3_ADDRESSING_STYLE", v))
        TRY(s3_files_value(f, profile, "s3", "addressing_style", v));
    for (int i = 0; v->text && i < 3; i++)
        if (strcasecmp(v->text, name[i]) == 0) {
            *out = (enum style)i;
            return NULL;
        }
    if (!v->text)
        return NULL;
    char at[WHERE_BYTES];
    where(v, at);
    return ERR(INVALID, "%s: an addressing style is auto, path or virtual", at);
}

static bool is_address(const char *host)
{
    struct in_addr address;
    return *host == '[' || inet_pton(AF_INET, host, &address) == 1;
}

/* Whether the bucket can be part of a host name. dots: with TLS a certificate for *.HOST fits one label only. */
static bool dns_name(const char *s, bool dots)
{
    size_t n = strlen(s);
    if (n > 63 || is_address(s) || strstr(s, "..") || strstr(s, ".-") || strstr(s, "-."))
        return false;
    for (size_t i = 0; i < n; i++)
        if (s[i] == '_' || (s[i] >= 'A' && s[i] <= 'Z') || (s[i] == '.' && !dots))
            return false;
    return true;
}

/* As the AWS command line does: the bucket is in the host name where Amazon's certificates and name servers make that
 * work, and in the path at any other endpoint, unless a setting says otherwise. */
static status *choose_style(const struct s3_files *f, const struct endpoint *e, struct s3_config *c)
{
    enum style style;
    struct s3_value v;
    TRY(read_style(f, c->profile, &style, &v));
    bool amazon = !e->given || ends_with(e->host, ".amazonaws.com") || ends_with(e->host, ".amazonaws.com.cn");
    c->path_style = style == STYLE_PATH || (style == STYLE_AUTO && !(amazon && dns_name(c->bucket, !e->tls)));
    if (style == STYLE_VIRTUAL && (is_address(e->host) || !dns_name(c->bucket, true))) {
        char at[WHERE_BYTES];
        where(&v, at);
        return ERR(INVALID,
                   "%s: addressing style virtual needs an endpoint with a host name, and a bucket that can be "
                   "part of one: at most 63 of a-z0-9.-",
                   at);
    }
    return NULL;
}

static status *write_address(const struct endpoint *e, struct s3_config *c)
{
    char host[HOST_BYTES + 80], origin[HOST_BYTES + 96], path[PREFIX_BYTES + SEGMENT_BYTES + 2];
    c->tls = e->tls;
    snprintf(host, sizeof host, "%s%s%s%s", c->path_style ? "" : c->bucket, c->path_style ? "" : ".", e->host, e->port);
    snprintf(origin, sizeof origin, "%s://%s", e->tls ? "https" : "http", host);
    snprintf(path, sizeof path, "%s%s%s", e->path, c->path_style ? "/" : "", c->path_style ? c->bucket : "");
    TRY(copy(host, strlen(host), &c->host));
    TRY(copy(origin, strlen(origin), &c->origin));
    return copy(path, strlen(path), &c->base_path);
}

static status *read_settings(const struct s3_files *f, struct s3_config *c)
{
    struct endpoint e;
    TRY(read_profile(f, c));
    TRY(read_region(f, c));
    TRY(read_ca(f, c));
    TRY(choose_endpoint(f, c, &e));
    TRY(choose_style(f, &e, c));
    TRY(write_address(&e, c));
    return s3_keyring_open(c->profile, &c->keys);
}

status *s3_config_open(const char *path, struct s3_config *out)
{
    struct s3_config c = { 0 };
    struct s3_files f = { 0 };
    status *st = read_url(path, &c);
    if (!st)
        st = s3_files_read(&f);
    if (!st)
        st = read_settings(&f, &c);
    s3_files_free(&f);
    if (st)
        s3_config_close(&c);
    else
        *out = c;
    return st;
}

void s3_config_close(struct s3_config *c)
{
    s3_keyring_close(c->keys);
    mem_free(c->bucket);
    mem_free(c->prefix);
    mem_free(c->origin);
    mem_free(c->host);
    mem_free(c->base_path);
    mem_free(c->region);
    mem_free(c->ca_file);
    mem_free(c->profile);
    *c = (struct s3_config){ 0 };
}
