/* http: requests to a server and their replies: the only user of libcurl. Nothing here knows of S3.
 *
 * A client keeps connections alive and lends each to one request at a time, so any number of threads may call http_do;
 * there are as many connections as there were ever requests at once. HTTP/1.1, because many connections are what fills
 * a line. Redirections are not followed. Proxies are those of the environment (http_proxy, HTTPS_PROXY, NO_PROXY).
 *
 * No message of these functions holds a header or what follows '?' in a URL: both carry signatures. */
#ifndef TESSERA_STORAGE_HTTP_H
#define TESSERA_STORAGE_HTTP_H

#include "comm/base/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http;

struct http_options {
    const char *ca_file; /* PEM file of the certificates to trust; NULL: the system's */
    uint32_t connect_ms; /* until the connection stands, TLS included */
};
/* Copies what it wants of *o. */
status *http_open(const struct http_options *o, struct http **out) WARN_UNUSED;
void http_close(struct http *h); /* NULL is fine; no request may be under way */

struct http_piece {
    const void *data;
    size_t bytes;
};

struct http_request {
    const char *method; /* "GET", "HEAD", "PUT", "POST", "DELETE" */
    const char *url;
    const char *const *header; /* [headers] "Name: value"; "Name:" takes away one that libcurl would add */
    size_t headers;
    const struct http_piece *body; /* sent one after another from where they are; PUT and POST always have a body */
    size_t pieces;
    void *into; /* where the body of a 2xx reply goes, at most `room` bytes; NULL: it goes to the reply's text */
    size_t room;
    bool more;       /* the body may be longer than `room`: http_more gets the rest, on the same connection */
    size_t text_max; /* of a body that does not go to `into` */
    uint32_t stall_ms, total_ms; /* most time without a byte, and in all */
    const atomic_bool *cancel;   /* NULL, or: give up when it turns true (seen within 100 ms) */
    /* NULL, or: asked now and then while the request is under way; once it says true, the request is sent again on
     * another connection, and the first 2xx of the two counts. Not for requests with `into`. */
    bool (*hedge)(void *arg, uint64_t elapsed_ns);
    void *hedge_arg;
};

enum { HTTP_HEADER_BYTES = 8192 };

struct http_rest;
struct http_reply {
    int status;      /* 200; 0: none came */
    uint64_t length; /* of the body, as Content-Length states it; UINT64_MAX: it does not */
    size_t got;      /* bytes that are in `into`; also after an error: they are the first of the body */
    char *text;      /* the body, with a NUL behind it; NULL: none */
    size_t text_bytes;
    struct http_rest *rest;             /* of the body, which is still to come; NULL: nothing is */
    bool hedged;                        /* it was sent twice */
    char header[HTTP_HEADER_BYTES + 1]; /* lines "name: value\n", names in lower case; what does not fit is left out */
};

/* Send a request and wait for its reply. Any status is a reply, not an error. UNAVAILABLE, which another try may mend:
 * no connection, a reset, time-outs, a body that ends early. INVALID: the server's certificate is not trusted, the URL
 * is none. CANCELLED. CORRUPT: more body than there is room for. *r is set in any case; free it. */
status *http_do(struct http *h, const struct http_request *q, struct http_reply *r) WARN_UNUSED;
void http_reply_free(struct http_reply *r);
/* Of r->rest: the next bytes of the body, as many as there is room for, or all that is left; r->got: how many. more: as
 * in a request; the last time it must be false. The total_ms of the request goes on. After an error, or the body's end,
 * r->rest is NULL. Errors as above. */
status *http_more(struct http *h, struct http_reply *r, void *into, size_t room, bool more) WARN_UNUSED;
/* Do without the rest, if there is one: costs the connection. */
void http_leave(struct http *h, struct http_reply *r);

/* The value of a reply's header (name in lower case) in buf; false, and "", if there is none or it does not fit. */
bool http_header(const struct http_reply *r, const char *name, char *buf, size_t size);

/* One header line as it came, of n bytes, appended to `have` as http_reply.header keeps them; true if it was. Refused:
 * lines that are no header, hold control characters, or do not fit. For http.c and its tests. */
bool http_header_add(char have[HTTP_HEADER_BYTES + 1], const char *line, size_t n);

/* Seconds since 1970 of a date as HTTP writes it ("Sun, 06 Nov 1994 08:49:37 GMT"); false for anything else. */
bool http_date(const char *text, uint64_t *seconds);

#endif
