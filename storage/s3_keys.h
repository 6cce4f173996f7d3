/* s3_keys: where credentials come from, and keeping them current. The public side is in s3_config.h. */
#ifndef TESSERA_STORAGE_S3_KEYS_H
#define TESSERA_STORAGE_S3_KEYS_H

#include "storage/s3_config.h"

/* A keyring that has looked for nothing yet. The profile is copied. */
status *s3_keyring_open(const char *profile, struct s3_keyring **out) WARN_UNUSED;
void s3_keyring_close(struct s3_keyring *r); /* wipes; NULL is fine */

#endif
