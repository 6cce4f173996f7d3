/* s3_provider: credentials from a command that prints them (credential_process of the shared files). */
#ifndef TESSERA_STORAGE_S3_PROVIDER_H
#define TESSERA_STORAGE_S3_PROVIDER_H

#include "storage/s3_config.h"

/* Run `command` and read what it prints. It is split into words at blanks; '...' and "..." hold blanks, a backslash
 * takes the next character as it is (between "..." only before \ and "); there is no shell, so no variables, globs or
 * pipes. The first word is found through PATH. stdin is empty; of the caller's files only stderr's pipe and stdout's
 * are open in it. After limit_ms it and its process group are killed.
 *
 * `where` begins messages ("/home/u/.aws/config:12"). *expires_ns: wall time, 0: never. Errors as s3_config_keys says;
 * they hold the end of what the command wrote to stderr, without any eight bytes in a row that its
 * stdout holds too, and nothing of its stdout. */
status *s3_provider_run(const char *command, const char *where, uint32_t limit_ms, struct s3_keys *out,
                        uint64_t *expires_ns) WARN_UNUSED;

/* n bytes of its stdout: one JSON object {"Version": 1, "AccessKeyId", "SecretAccessKey", and if they like
 * "SessionToken" and "Expiration" (RFC 3339)}; other members are skipped. INVALID says what is wrong with it. */
status *s3_provider_parse(const char *text, size_t n, const char *where, struct s3_keys *out,
                          uint64_t *expires_ns) WARN_UNUSED;

/* Copy a credential of any source. INVALID: too long, or not of printable ASCII without blanks; `what` names it. */
status *s3_keys_copy(char *out, size_t size, const char *text, const char *what) WARN_UNUSED;

#endif
