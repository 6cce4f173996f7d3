/* s3_list: pages of objects, common prefixes and uploads, and removal by the thousand. */
#ifndef TESSERA_STORAGE_S3_LIST_H
#define TESSERA_STORAGE_S3_LIST_H

#include "storage/s3_call.h"
#include "storage/s3_xml.h"

struct s3_listing {
    const char *prefix; /* below the prefix of the URL: "" or "step-000000000100/" */
    bool flat;          /* what is below too; else up to the next '/', the rest as common prefixes */
    bool uploads;       /* uploads that are under way, not objects; flat */
    uint32_t most;      /* stop after one page of so many; 0: all pages of 1,000 */
    /* key: behind the prefix of the URL */
    status *(*found)(void *arg, const char *key, const struct s3_found *f);
    void *arg;
};
/* Walk all entries; *server_ns, unless NULL: the server's clock at the last page. */
status *s3_list(struct s3 *s, const struct s3_listing *l, uint64_t *server_ns) WARN_UNUSED;

/* Whether anything is below prefix. */
status *s3_any_below(struct s3 *s, const char *prefix, bool *yes) WARN_UNUSED;

/* Remove every object below prefix, 1,000 a request. What cannot be removed is an error with its key. */
status *s3_remove_below(struct s3 *s, const char *prefix) WARN_UNUSED;

/* The server's clock, from a reply's Date. */
status *s3_date(const struct http_reply *r, uint64_t *ns) WARN_UNUSED;

#endif
