/* s3_config: what a program needs to know to talk to one bucket: names, addresses and credentials, from the URL, the
 * environment and the shared files of the AWS command line. docs/s3.md lists the settings and which one wins.
 *
 *     struct s3_config c;
 *     struct s3_keys keys;
 *     TRY(s3_config_open("//bucket/runs/a", &c));
 *     TRY(s3_config_keys(&c, &keys));
 *     TRY(s3_config_url(&c, "step-000000000100/metadata.pb", NULL, url, sizeof url));
 *     ... sign with keys, send; the server says ExpiredToken: s3_config_renew(&c, &keys), s3_config_keys again ...
 *     s3_keys_wipe(&keys);
 *     s3_config_close(&c);
 *
 * No message of these functions holds a credential or a value of a line in a file; no struct that holds one is ever
 * printed. All but open and close may be called from any thread. */
#ifndef TESSERA_STORAGE_S3_CONFIG_H
#define TESSERA_STORAGE_S3_CONFIG_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    S3_KEY_BYTES = 1025,       /* longest object key, with its NUL: the protocol's 1024 bytes */
    S3_URL_BYTES = 8192,       /* holds every URL of one object with a query of a few parameters */
    S3_ACCESS_KEY_BYTES = 256, /* longest access key id and secret, each with its NUL */
    S3_SESSION_TOKEN_BYTES = 8192
};

struct s3_keyring; /* storage/s3_keys.c */

/* One bucket. The strings are the struct's; they do not change between open and close. */
struct s3_config {
    char *bucket;
    char *prefix;    /* "" or "runs/a": no slash at either end */
    bool tls;        /* https */
    char *origin;    /* "https://bucket.s3.eu-west-1.amazonaws.com", "http://127.0.0.1:7480": a URL up to its path */
    char *host;      /* the Host header that goes with it: "127.0.0.1:7480"; no port if it is the scheme's own */
    char *base_path; /* what paths begin with: "" or "/bucket", after the path of the endpoint if that has one */
    char *region;
    bool path_style; /* the bucket is in the path, not in the host */
    char *ca_file;   /* PEM file of certificates to trust; NULL: the system's */
    char *profile;   /* of the shared files; "default" if none is named */
    struct s3_keyring *keys;
};

/* Credentials, by value. Wipe each copy when it was used. */
struct s3_keys {
    char access_key[S3_ACCESS_KEY_BYTES];
    char secret_key[S3_ACCESS_KEY_BYTES];
    char session_token[S3_SESSION_TOKEN_BYTES]; /* "": none */
    uint64_t generation;                        /* grows with each renewal */
};

/* Read `path`, what follows "s3:" ("//bucket" or "//bucket/prefix"), the environment and the shared files. Looks for
 * credentials only when s3_config_keys is called. INVALID: the URL, a variable or a line is wrong (the message names
 * it, file and line, and what is legal), or the profile that AWS_PROFILE names is in no file. IO: a file cannot be
 * read. */
status *s3_config_open(const char *path, struct s3_config *out) WARN_UNUSED;
void s3_config_close(struct s3_config *c); /* wipes the credentials; {0} is fine */

/* A copy of the current credentials. The first call looks for them; later ones read the files or ask the provider
 * command again shortly before they expire (by one thread, while the others go on with the old ones as long as those
 * are valid). INVALID: none are configured (the message lists where was looked), or half of a pair is missing.
 * UNAVAILABLE, TIMEOUT: the provider command failed, or ran longer than its limit. UNSUPPORTED: the profile asks for
 * a way to get them that is not built in. `out` is untouched on error. */
status *s3_config_keys(struct s3_config *c, struct s3_keys *out) WARN_UNUSED;

/* The server refused `refused` as expired: get newer ones now. Nothing is done if that has happened since they were
 * copied. INVALID: what there is to read still holds the refused ones; otherwise as s3_config_keys. */
status *s3_config_renew(struct s3_config *c, const struct s3_keys *refused) WARN_UNUSED;
void s3_keys_wipe(struct s3_keys *k);

/* How long the provider command may run; 60 s at open. Before the first s3_config_keys. */
void s3_config_set_provider_limit(struct s3_config *c, uint32_t limit_ms);

/* The object's whole key in the bucket: "prefix/key", or key where there is no prefix. "" gives "prefix/", what lists
 * begin with. INVALID: it does not fit. */
status *s3_config_object(const struct s3_config *c, const char *key, char *buf, size_t size) WARN_UNUSED;

/* The path of a request as it is sent and signed (the canonical URI of SigV4, which for S3 is encoded once): every
 * byte but A-Z a-z 0-9 - . _ ~ and "/" as %XX in upper case. key: relative to the prefix; NULL: the bucket itself. */
status *s3_config_path(const struct s3_config *c, const char *key, char *buf, size_t size) WARN_UNUSED;

/* origin + path + "?" + query. query: from s3_query; NULL or "": none. INVALID: it does not fit. */
status *s3_config_url(const struct s3_config *c, const char *key, const char *query, char *buf,
                      size_t size) WARN_UNUSED;

struct s3_param {
    const char *name, *value; /* as they are, not encoded; value "" gives "name=" */
};
/* The parameters as SigV4 wants them, sent and signed alike: names and values encoded ("/" too), sorted by encoded
 * name, "=" always there, joined by "&". Names differ. INVALID: it does not fit. */
status *s3_query(const struct s3_param *param, size_t count, char *buf, size_t size) WARN_UNUSED;

/* text, encoded as above; keep_slash leaves "/". INVALID: it does not fit. For x-amz-copy-source, among others. */
status *s3_encode(const char *text, bool keep_slash, char *buf, size_t size) WARN_UNUSED;

#endif
