/* s3_multipart: read s3_multipart_complete: what counts as done. */
#include "storage/s3_multipart.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "storage/s3_xml.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { COMPLETE_STALL_MS = 300000 }; /* a server may join large objects for minutes before it says a word */

#define MARK_HEADER "x-amz-meta-tessera-put"

status *s3_mark_draw(char mark[S3_MARK_BYTES])
{
    uint64_t r;
    TRY(s3_random(&r));
    snprintf(mark, S3_MARK_BYTES, "%016" PRIx64, r);
    return NULL;
}

status *s3_mark_is_on(struct s3 *s, const char *key, const char *mark, bool *yes)
{
    const struct s3_call c = { .method = "HEAD", .key = key };
    char have[S3_MARK_BYTES];
    struct http_reply r;
    status *st = s3_send(s, &c, &r);
    *yes = !st && http_header(&r, MARK_HEADER, have, sizeof have) && strcmp(have, mark) == 0;
    http_reply_free(&r);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

void s3_crc32c_of(const struct http_piece *piece, size_t pieces, char out[S3_CRC32C_TEXT_BYTES])
{
    uint32_t crc = 0;
    for (size_t i = 0; i < pieces; i++)
        crc = crc32c(crc, piece[i].data, piece[i].bytes);
    s3_crc32c_text(crc, out);
}

status *s3_multipart_begin(struct s3 *s, const char *key, const char *mark, char id[S3_UPLOAD_ID_BYTES])
{
    const struct s3_call c = { .method = "POST",
                               .key = key,
                               .param = { { "uploads", "" } },
                               .header = { { MARK_HEADER, mark }, { "x-amz-checksum-algorithm", "CRC32C" } } };
    struct http_reply r;
    status *st = s3_send(s, &c, &r);
    if (!st)
        st = status_wrap(s3_xml_upload_id(r.text ? r.text : "", r.text_bytes, id, S3_UPLOAD_ID_BYTES), "%s", key);
    http_reply_free(&r);
    return st;
}

status *s3_multipart_part(struct s3 *s, const char *key, const char *id, uint32_t number, const struct http_piece *body,
                          size_t pieces, bool (*hedge)(void *, uint64_t), void *hedge_arg, struct s3_part *out)
{
    char text[16];
    snprintf(text, sizeof text, "%" PRIu32, number);
    s3_crc32c_of(body, pieces, out->crc32c);
    const struct s3_call c = { .method = "PUT",
                               .key = key,
                               .param = { { "partNumber", text }, { "uploadId", id } },
                               .header = { { "x-amz-checksum-crc32c", out->crc32c } },
                               .body = body,
                               .pieces = pieces,
                               .hedge = hedge,
                               .hedge_arg = hedge_arg };
    struct http_reply r;
    status *st = s3_send(s, &c, &r);
    char echo[S3_CRC32C_TEXT_BYTES];
    if (!st && !http_header(&r, "x-amz-checksum-crc32c", echo, sizeof echo))
        out->crc32c[0] = 0; /* a server that does not know it may not take it in the list of parts, either */
    if (!st && !http_header(&r, "etag", out->etag, sizeof out->etag))
        st = ERR(IO, "%s: part %" PRIu32 ": the server's reply has no ETag", key, number);
    http_reply_free(&r);
    return st;
}

static void list_parts(const struct s3_part *part, size_t parts, struct s3_text *t)
{
    s3_text_add(t, "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
    for (size_t i = 0; i < parts; i++) {
        s3_text_add(t, "<Part><PartNumber>%zu</PartNumber><ETag>", i + 1);
        s3_text_escaped(t, part[i].etag);
        s3_text_add(t, "</ETag>");
        if (part[i].crc32c[0])
            s3_text_add(t, "<ChecksumCRC32C>%s</ChecksumCRC32C>", part[i].crc32c);
        s3_text_add(t, "</Part>");
    }
    s3_text_add(t, "</CompleteMultipartUpload>");
}

/* One try. A 200 only says that the server began; what it says in the end is in the body. */
static status *complete_once(struct s3 *s, const struct s3_call *c, struct s3_tries *t, struct http_reply *r)
{
    struct s3_fault fault;
    TRY(s3_try(s, c, t, r));
    if (!s3_xml_fault(r->text, r->text_bytes, &fault))
        return NULL;
    r->status = 500;
    return s3_refusal(s, c, r);
}

/* Whether the failure is the echo of a success whose reply got lost: the request was sent again, by us or by libcurl.
 */
static status *own_success(struct s3 *s, const struct s3_call *c, const char *mark, status *st)
{
    bool ours = false;
    enum status_code code = status_code(st);
    if (code != ST_NOT_FOUND && code != ST_EXISTS)
        return st;
    status *look = s3_mark_is_on(s, c->key, mark, &ours);
    status_free(look); /* not known: then the first error stands */
    if (!ours)
        return st;
    status_free(st);
    return NULL;
}

status *s3_multipart_complete(struct s3 *s, const char *key, const char *id, const char *mark,
                              const struct s3_part *part, size_t parts, bool exclusive)
{
    struct s3_text text = { 0 };
    list_parts(part, parts, &text);
    if (text.failed) {
        mem_free(text.text);
        return ERR(NO_MEMORY, "%s: the list of %zu parts", key, parts);
    }
    const struct http_piece body = { text.text, text.bytes };
    const struct s3_call c = { .method = "POST",
                               .key = key,
                               .param = { { "uploadId", id } },
                               .header = { { exclusive ? "if-none-match" : NULL, "*" } },
                               .body = &body,
                               .pieces = 1,
                               .stall_ms = COMPLETE_STALL_MS };
    struct s3_tries t = { 0 };
    struct http_reply r;
    status *st;
    for (;;) {
        st = complete_once(s, &c, &t, &r);
        bool again = st && s3_again(s, &t, &r, &st);
        http_reply_free(&r);
        if (!again)
            break;
    }
    if (st)
        st = own_success(s, &c, mark, st);
    mem_free(text.text);
    return st;
}

status *s3_multipart_abort(struct s3 *s, const char *key, const char *id)
{
    const struct s3_call c = { .method = "DELETE", .key = key, .param = { { "uploadId", id } } };
    status *st = s3_send_only(s, &c);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}
