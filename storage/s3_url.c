/* s3_url: keys and parameters as text for requests. What is sent is what is signed, so there is one way to write each:
 * RFC 3986 unreserved bytes stay, all others are %XX in upper case (SigV4, "UriEncode"). */
#include "storage/s3_config.h"

#include <stdio.h>
#include <string.h>

enum { PARAMS = 16 }; /* more than any request has */

struct text {
    char *at;
    size_t used, size;
};

static void put(struct text *t, char c)
{
    if (t->used < t->size)
        t->at[t->used] = c;
    t->used++;
}

static void put_all(struct text *t, const char *s)
{
    while (*s)
        put(t, *s++);
}

static bool plain(char c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' ||
           c == '_' || c == '~';
}

static void put_encoded(struct text *t, const char *s, bool keep_slash)
{
    static const char hex[] = "0123456789ABCDEF";
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (plain(*s) || (keep_slash && c == '/')) {
            put(t, *s);
            continue;
        }
        put(t, '%');
        put(t, hex[c >> 4]);
        put(t, hex[c & 15]);
    }
}

static status *finish(struct text *t, const char *what)
{
    put(t, 0);
    if (t->used > t->size)
        return ERR(INVALID, "s3: the %s has %zu bytes, and %zu are the most", what, t->used - 1,
                   t->size ? t->size - 1 : 0);
    return NULL;
}

status *s3_encode(const char *text, bool keep_slash, char *buf, size_t size)
{
    struct text t = { buf, 0, size };
    put_encoded(&t, text, keep_slash);
    return finish(&t, "encoded text");
}

status *s3_config_object(const struct s3_config *c, const char *key, char *buf, size_t size)
{
    struct text t = { buf, 0, size };
    put_all(&t, c->prefix);
    if (*c->prefix)
        put(&t, '/');
    put_all(&t, key);
    return finish(&t, "object's key");
}

static void put_path(struct text *t, const struct s3_config *c, const char *key)
{
    put_all(t, c->base_path); /* encoded at open */
    if (!key) {
        if (!*c->base_path)
            put(t, '/');
        return;
    }
    put(t, '/');
    put_encoded(t, c->prefix, true);
    if (*c->prefix)
        put(t, '/');
    put_encoded(t, key, true);
}

status *s3_config_path(const struct s3_config *c, const char *key, char *buf, size_t size)
{
    struct text t = { buf, 0, size };
    put_path(&t, c, key);
    return finish(&t, "path");
}

status *s3_config_url(const struct s3_config *c, const char *key, const char *query, char *buf, size_t size)
{
    struct text t = { buf, 0, size };
    put_all(&t, c->origin);
    put_path(&t, c, key);
    if (query && *query) {
        put(&t, '?');
        put_all(&t, query);
    }
    return finish(&t, "URL");
}

/* Names compare as if they were encoded: of two bytes that differ the unreserved ones stand for themselves, the others
 * for '%', which is below them all; two encoded ones compare by their hex digits, which order as the bytes do. */
static int compare_encoded(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    unsigned char x = (unsigned char)*a, y = (unsigned char)*b;
    if (x == y)
        return 0;
    if (!x || !y)
        return x ? 1 : -1;
    if (plain(*a) != plain(*b))
        return plain(*a) ? 1 : -1;
    return x < y ? -1 : 1;
}

status *s3_query(const struct s3_param *param, size_t count, char *buf, size_t size)
{
    size_t order[PARAMS];
    if (count > PARAMS)
        return ERR(INVALID, "s3: a query of %zu parameters, and %d are the most", count, PARAMS);
    for (size_t i = 0; i < count; i++) {
        size_t to = i;
        for (; to > 0 && compare_encoded(param[order[to - 1]].name, param[i].name) > 0; to--)
            order[to] = order[to - 1];
        order[to] = i;
    }
    struct text t = { buf, 0, size };
    for (size_t i = 0; i < count; i++) {
        if (i)
            put(&t, '&');
        put_encoded(&t, param[order[i]].name, false);
        put(&t, '=');
        put_encoded(&t, param[order[i]].value, false);
    }
    return finish(&t, "query");
}
