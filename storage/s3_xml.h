/* s3_xml: the XML replies of S3, read and (CompleteMultipartUpload, Delete) written. Pure functions on bounded memory:
 * any bytes give a value or an error.
 *
 * The reader knows what these replies consist of: elements, attributes (skipped), text, the five named and the numeric
 * character references, comments, processing instructions and CDATA. A document type is refused, and with it every
 * entity. Element names lose their prefix up to ':'. */
#ifndef TESSERA_STORAGE_S3_XML_H
#define TESSERA_STORAGE_S3_XML_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    S3_XML_DEPTH = 8,         /* of elements in one another */
    S3_XML_PATH_BYTES = 256,  /* longest path of element names, with its NUL */
    S3_XML_TEXT_BYTES = 4096, /* longest text of an element, decoded, with its NUL */
    S3_XML_REPLY_BYTES =
        8 << 20 /* most that is read of a reply: 1,000 objects of 1,024 bytes' name, escaped, and more */
};

/* Both get the path of an element that ends, "ListBucketResult/Contents/Key". leaf: it had no elements in it. */
struct s3_xml_sink {
    void *arg;
    status *(*leaf)(void *arg, const char *path, const char *text);
    status *(*leave)(void *arg, const char *path);
};
/* Walk a document of n bytes. CORRUPT: it is not well-formed, too deep, or too long somewhere. */
status *s3_xml_walk(const char *text, size_t n, const struct s3_xml_sink *sink) WARN_UNUSED;

/* <Error>, also as what a 200 may turn out to hold. Fields are "" where there is none; control characters are dropped.
 */
struct s3_fault {
    char code[64], message[256], region[64], endpoint[256];
};
/* True if the document is an <Error>; for anything else false and all fields "". */
bool s3_xml_fault(const char *text, size_t n, struct s3_fault *out);

/* One page of ListObjectsV2 or ListMultipartUploads, for the caller's function; strings live for the call. */
struct s3_found {
    const char *key;       /* an object's or an upload's; a common prefix, ending with the delimiter */
    const char *upload_id; /* of an upload; else NULL */
    bool is_prefix;
    uint64_t bytes, mtime_ns; /* of an object */
};
struct s3_page {
    bool truncated;
    char next[2048];        /* NextContinuationToken, or NextKeyMarker */
    char next_upload[1024]; /* NextUploadIdMarker */
    uint64_t found;
};
status *s3_xml_page(const char *text, size_t n, status *(*found)(void *arg, const struct s3_found *f), void *arg,
                    struct s3_page *out) WARN_UNUSED;

/* InitiateMultipartUploadResult: the upload's id. */
status *s3_xml_upload_id(const char *text, size_t n, char *id, size_t size) WARN_UNUSED;
/* DeleteResult: the first key that was not removed, NoSuchKey apart, in *key ("" if there is none) and why. */
status *s3_xml_deleted(const char *text, size_t n, char *key, size_t size, struct s3_fault *why) WARN_UNUSED;

/* "2026-11-22T09:56:49.123Z" as nanoseconds since 1970; false for anything else. */
bool s3_xml_time(const char *text, uint64_t *ns);

/* A text that grows; `failed` sticks. Start from {0}; text is mem_free'd by the caller. */
struct s3_text {
    char *text;
    size_t bytes, room;
    bool failed;
};
void s3_text_add(struct s3_text *t, const char *fmt, ...) PRINTF(2, 3);
/* The same, with & < > " ' escaped. */
void s3_text_escaped(struct s3_text *t, const char *raw);

#endif
