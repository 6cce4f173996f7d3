/* s3_multipart: the requests of a multipart upload, one function each. An upload is invisible until it is completed,
 * and stays on the server, at the owner's cost, until it is completed or aborted. */
#ifndef TESSERA_STORAGE_S3_MULTIPART_H
#define TESSERA_STORAGE_S3_MULTIPART_H

#include "storage/s3_call.h"

enum {
    S3_PARTS = 10000,          /* most parts of an object */
    S3_PART_LEAST = 5 << 20,   /* bytes of a part, except the last */
    S3_ETAG_BYTES = 128,       /* with its NUL */
    S3_UPLOAD_ID_BYTES = 1024, /* with its NUL */
    S3_MARK_BYTES = 17         /* of an object's mark, with its NUL */
};

struct s3_part {
    char etag[S3_ETAG_BYTES];
    char crc32c[S3_CRC32C_TEXT_BYTES]; /* "" from a server that does not know of it */
};

/* x-amz-meta-tessera-put: a random word by which a writer tells its own object from one that another put under the same
 * name, when the reply to its request got lost. */
status *s3_mark_draw(char mark[S3_MARK_BYTES]) WARN_UNUSED;
/* Whether the object is there and carries the mark. */
status *s3_mark_is_on(struct s3 *s, const char *key, const char *mark, bool *yes) WARN_UNUSED;

/* Initiate: *id names the upload from here on. */
status *s3_multipart_begin(struct s3 *s, const char *key, const char *mark, char id[S3_UPLOAD_ID_BYTES]) WARN_UNUSED;
/* hedge, hedge_arg: of struct s3_call. */
status *s3_multipart_part(struct s3 *s, const char *key, const char *id, uint32_t number, const struct http_piece *body,
                          size_t pieces, bool (*hedge)(void *, uint64_t), void *hedge_arg,
                          struct s3_part *out) WARN_UNUSED;
/* Part i has number i + 1. exclusive: with If-None-Match (EXISTS, where the server honours it). Done also when a try
 * before had done it and its reply was lost. After an error the upload may still be there: abort it. */
status *s3_multipart_complete(struct s3 *s, const char *key, const char *id, const char *mark,
                              const struct s3_part *part, size_t parts, bool exclusive) WARN_UNUSED;
/* Missing is fine. */
status *s3_multipart_abort(struct s3 *s, const char *key, const char *id) WARN_UNUSED;

/* crc32c of the pieces one after another, as x-amz-checksum-crc32c has it. */
void s3_crc32c_of(const struct http_piece *piece, size_t pieces, char out[S3_CRC32C_TEXT_BYTES]);

#endif
