/* s3_sign: AWS Signature Version 4 in the Authorization header, and the digests that requests carry. The only user of
 * libcrypto. Pure functions.
 *
 * Signed here and not by libcurl (CURLOPT_AWS_SIGV4), because the time must be the server's where the clocks differ, a
 * body's hash must be taken once for all tries of a request, and what is signed must be testable against AWS's
 * published vectors.
 *
 *   canonical = method \n path \n query \n headers \n\n names \n payload
 *   to sign   = "AWS4-HMAC-SHA256" \n time \n scope \n hex(SHA256(canonical))
 *   key       = HMAC(HMAC(HMAC(HMAC("AWS4" + secret, date), region), service), "aws4_request")
 *   (AWS, "Signature Version 4 signing process") */
#ifndef TESSERA_STORAGE_S3_SIGN_H
#define TESSERA_STORAGE_S3_SIGN_H

#include "storage/http.h"

enum {
    S3_SHA256_HEX_BYTES = 65,     /* with its NUL */
    S3_MD5_TEXT_BYTES = 25,       /* base64, with its NUL */
    S3_CRC32C_TEXT_BYTES = 9,     /* base64 of the big-endian value, with its NUL */
    S3_TIME_BYTES = 17,           /* "20130524T000000Z", with its NUL */
    S3_AUTHORIZATION_BYTES = 2048 /* longest value that s3_sign makes, with its NUL */
};

struct s3_header {
    const char *name; /* in lower case */
    const char *value;
};

struct s3_signing {
    const char *method;
    const char *path;               /* as it is sent: encoded */
    const char *query;              /* as it is sent: encoded, sorted by name; "" */
    const struct s3_header *header; /* [headers] those to sign, sorted by name; "host" and "x-amz-date" among them */
    size_t headers;
    const char *payload; /* hex(SHA256(body)), or "UNSIGNED-PAYLOAD" */
    const char *time;    /* as x-amz-date has it */
    const char *region, *service, *access_key, *secret_key;
};
/* The value of the Authorization header. INVALID: a text is too long. */
status *s3_sign(const struct s3_signing *in, char out[S3_AUTHORIZATION_BYTES]) WARN_UNUSED;

/* Of the pieces one after another. */
status *s3_sha256(const struct http_piece *piece, size_t count, char out[S3_SHA256_HEX_BYTES]) WARN_UNUSED;
status *s3_md5(const void *data, size_t n, char out[S3_MD5_TEXT_BYTES]) WARN_UNUSED;
/* The form that x-amz-checksum-crc32c has. */
void s3_crc32c_text(uint32_t crc, char out[S3_CRC32C_TEXT_BYTES]);
/* Seconds since 1970 as x-amz-date has them. */
void s3_time_text(uint64_t seconds, char out[S3_TIME_BYTES]);

#endif
