/* s3_call: one request to a bucket: signed, sent, tried again, and what the server refuses as one clear sentence.
 *
 * A try is signed anew. Between tries: a random time below 0.1 s, 0.2 s, ... 10 s, or what Retry-After asks for, until
 * `retry_ms` have passed since the first failure. Two refusals are mended and tried at once: a clock that differs from
 * the server's (its Date is what requests carry from then on) and credentials that have expired (renewed once). */
#ifndef TESSERA_STORAGE_S3_CALL_H
#define TESSERA_STORAGE_S3_CALL_H

#include "storage/http.h"
#include "storage/s3_config.h"
#include "storage/s3_sign.h"

/* How an exclusive put is done on this server; s3_put.h. */
enum s3_exclusive { S3_EXCLUSIVE_UNKNOWN, S3_EXCLUSIVE_PUT, S3_EXCLUSIVE_CLAIM };

/* One bucket. All functions may be called from any thread. */
struct s3 {
    struct s3_config config;
    struct http *http;
    uint32_t stall_ms, retry_ms;
    bool sign_bodies;          /* with their hash; else UNSIGNED-PAYLOAD */
    _Atomic int64_t skew_s;    /* the server's clock less ours */
    _Atomic int exclusive;     /* enum s3_exclusive */
    _Atomic uint64_t *retries; /* counts tries beyond the first */
};

/* Read the settings (s3_config.h, and the TESSERA_S3_... variables of docs/s3.md). Sends nothing. */
status *s3_open(const char *path, _Atomic uint64_t *retries, struct s3 *out) WARN_UNUSED;
void s3_close(struct s3 *s);

enum { S3_CALL_PARAMS = 8, S3_CALL_HEADERS = 8 };

struct s3_call {
    const char *method;
    const char *key;                          /* below the prefix of the URL; NULL: the bucket */
    struct s3_param param[S3_CALL_PARAMS];    /* up to the first without a name */
    struct s3_header header[S3_CALL_HEADERS]; /* up to the first without a name; beside those of every request */
    const struct http_piece *body;
    size_t pieces;
    void *into;
    size_t room;
    uint64_t more;     /* bytes of the reply's body beyond `room`, which http_more is to get; 0: there are none */
    uint32_t stall_ms; /* 0: that of s */
    bool (*hedge)(void *arg, uint64_t elapsed_ns);
    void *hedge_arg;
};

/* What a call has gone through so far. Start from {0}. */
struct s3_tries {
    uint64_t first_failure_ns;
    uint32_t tries;
    bool skew_fixed, keys_renewed;
    uint64_t generation; /* of the credentials of the last try */
    bool has_token;
    char payload[S3_SHA256_HEX_BYTES]; /* hash of the body, once taken */
};

/* One try. NULL: the reply is a 2xx. r->status is set whenever there was a reply. Free r's text in any case. */
status *s3_try(struct s3 *s, const struct s3_call *c, struct s3_tries *t, struct http_reply *r) WARN_UNUSED;
/* Whether to try again after *st, which it takes then; it has waited, or mended what was wrong. */
bool s3_again(struct s3 *s, struct s3_tries *t, const struct http_reply *r, status **st);
/* Both in a loop. */
status *s3_send(struct s3 *s, const struct s3_call *c, struct http_reply *r) WARN_UNUSED;
/* s3_send for who wants nothing of the reply but that it is good. */
status *s3_send_only(struct s3 *s, const struct s3_call *c) WARN_UNUSED;

/* The error for what a server answered: NOT_FOUND, EXISTS (a condition does not hold), NO_SPACE, UNAVAILABLE (another
 * try may mend it), UNSUPPORTED, INVALID (settings to be mended), IO. fault: of the reply's body. */
status *s3_refusal(const struct s3 *s, const struct s3_call *c, const struct http_reply *r) WARN_UNUSED;

/* Random, for names that must not meet. */
status *s3_random(uint64_t *out) WARN_UNUSED;

#endif
