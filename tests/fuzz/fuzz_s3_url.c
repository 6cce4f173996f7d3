/* fuzz_s3_url: a text of up to four lines: what follows "s3:", an endpoint, a style, a key. What opens gives URLs that
 * are made of legal characters only, lie on the endpoint, and decode to the bucket, prefix and key. */
#include "storage/s3_config.h"
#include "tests/fuzz/fuzz.h"

#include <ctype.h>

static void legal(const char *url)
{
    for (const char *c = url; *c; c++) {
        MUST(isalnum((unsigned char)*c) || strchr("-._~/:[]?=&%", *c));
        MUST(*c != '%' || (strchr("0123456789ABCDEF", c[1]) && c[1] && strchr("0123456789ABCDEF", c[2]) && c[2]));
    }
}

static void decode(const char *s, char *out)
{
    for (; *s; s++) {
        unsigned v = (unsigned char)*s;
        if (*s == '%') {
            MUST(sscanf(s + 1, "%2X", &v) == 1);
            s += 2;
        }
        *out++ = (char)v;
    }
    *out = 0;
}

static void try_key(const struct s3_config *c, const char *key)
{
    char object[S3_KEY_BYTES], path[S3_URL_BYTES], url[S3_URL_BYTES], plain[S3_URL_BYTES], query[S3_URL_BYTES];
    size_t base = strlen(c->base_path), origin = strlen(c->origin);
    if (!fuzz_ok(s3_config_object(c, key, object, sizeof object)))
        return;
    MUST(fuzz_ok(s3_config_path(c, key, path, sizeof path)));
    MUST(!strncmp(path, c->base_path, base) && path[base] == '/');
    decode(path + base + 1, plain);
    MUST(!strcmp(plain, object));
    struct s3_param param[] = { { "prefix", key }, { "list-type", "2" } };
    if (!fuzz_ok(s3_query(param, 2, query, sizeof query)) || !fuzz_ok(s3_config_url(c, key, query, url, sizeof url)))
        return;
    legal(url);
    MUST(!strncmp(url, c->origin, origin) && !strncmp(url + origin, path, strlen(path)));
    MUST(url[origin + strlen(path)] == '?' && !strcmp(url + origin + strlen(path) + 1, query));
    MUST(!strncmp(query, "list-type=2&prefix=", 19));
    decode(query + 19, plain);
    MUST(!strcmp(plain, key));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *text = fuzz_text(data, n), *line[4] = { text, "", "", "" };
    for (int i = 1; i < 4; i++) {
        char *end = strchr(line[i - 1], '\n');
        if (!end)
            break;
        *end = 0;
        line[i] = end + 1;
    }
    setenv("AWS_CONFIG_FILE", "/no/such/file", 1);
    setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file", 1);
    setenv("AWS_ENDPOINT_URL", line[1], 1);
    setenv("TESSERA_S3_ADDRESSING_STYLE", line[2], 1);
    struct s3_config c;
    if (fuzz_ok(s3_config_open(line[0], &c))) {
        MUST(!strncmp(c.origin, c.tls ? "https://" : "http://", c.tls ? 8 : 7));
        MUST(!strcmp(strchr(c.origin, '/') + 2, c.host) && !strchr(c.host, '@'));
        MUST(c.path_style ? strstr(c.base_path, c.bucket) != NULL : !strncmp(c.host, c.bucket, strlen(c.bucket)));
        legal(c.origin);
        legal(c.base_path);
        try_key(&c, line[3]);
        s3_config_close(&c);
    }
    mem_free(text);
    return 0;
}
