/* s3_put: small objects, and exclusive puts on servers that differ in what they honour.
 *
 * The first exclusive put of a handle asks the server with objects of its own (".tmp-..."), once:
 *   PUT       If-None-Match: * on PUT is honoured (412)              -> one conditional PUT
 *             (on CompleteMultipartUpload Swift honours it, but of 8 racing requests up to 3 succeed)
 *   CLAIM     it is ignored (200) or refused (501)      -> claims, below
 *
 * Claims: put ".tmp-cccccccccccccccc-NAME.RANDOM" beside the object, then list the claims on NAME. Go on once there is
 * no other; if there is one whose name comes before ours, take ours back, wait a random time and begin anew. Holding
 * the only claim: EXISTS if the object is there, else put it; then remove the claim. Of two, the one whose claim came
 * later sees the other's, whatever the order of requests, so at most one goes on, as long as listings show every put
 * that was answered. A claim older than 60 s by the server's clock is a dead one's and is removed: who stops for longer
 * between its listing and its put may overwrite. */
#ifndef TESSERA_STORAGE_S3_PUT_H
#define TESSERA_STORAGE_S3_PUT_H

#include "storage/s3_call.h"

/* n bytes, replacing what is there. */
status *s3_put(struct s3 *s, const char *key, const void *buf, size_t n) WARN_UNUSED;
/* EXISTS if the key is there. Success also when a try before had put it and its reply was lost. */
status *s3_put_exclusive(struct s3 *s, const char *key, const void *buf, size_t n) WARN_UNUSED;

/* "DIR/.tmp-0123456789abcdef-NAME" for "DIR/NAME", from 64 bits. INVALID: too long. */
status *s3_temp_key(const char *key, uint64_t random, char *buf, size_t size) WARN_UNUSED;

#endif
