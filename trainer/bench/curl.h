/* curl: objects of an S3 bucket put or got by so many curl(1) commands at once: the yardstick beside saves and loads on
 * object storage. No line of this project's own client is in it but the one that finds settings and credentials.
 *
 * Each command moves its share one after another on a connection that it keeps. Requests are signed (--aws-sigv4),
 * bodies are not hashed (UNSIGNED-PAYLOAD). Starting the commands is part of what they take. */
#ifndef TESSERA_TRAINER_BENCH_CURL_H
#define TESSERA_TRAINER_BENCH_CURL_H

#include "comm/base/status.h"

#include <stddef.h>
#include <stdint.h>

/* One request. */
struct curl_move {
    const char *key; /* below the URL */
    uint64_t begin, bytes;
};
struct curl_moves {
    const char *url;    /* s3://BUCKET/PREFIX */
    const char *upload; /* a file, whose first bytes are the objects'; NULL: ranges of objects are got, and dropped */
    const struct curl_move *move;
    size_t count;
};
/* Move them all by `commands` processes. UNSUPPORTED: there is no curl here. IO: one failed; its words. */
status *curl_run(const struct curl_moves *m, int commands, double *seconds) WARN_UNUSED;

#endif
