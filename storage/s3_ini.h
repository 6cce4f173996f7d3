/* s3_ini: the shared files of the AWS command line, "config" and "credentials", as lists of settings.
 *
 *     [profile research]              in config; [research] in credentials; [default] in both
 *     region = eu-west-1              # a comment begins a line, or follows a blank
 *     s3 =                            a setting without a value takes the indented lines below it as its group
 *       addressing_style = path
 *     [services office]
 *     s3 =
 *       endpoint_url = https://s3.office.example
 *
 * As there: a name that comes again replaces the one before, in the same section or another of the same name; sections
 * of other kinds are read and left alone; [profile default] hides [default]; names are compared in lower case. Unlike
 * there: a line that is none of these is an error, with its number. Messages never hold a line's text. */
#ifndef TESSERA_STORAGE_S3_INI_H
#define TESSERA_STORAGE_S3_INI_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>

enum s3_section { S3_PROFILE, S3_SERVICES, S3_OTHER };

struct s3_entry {
    enum s3_section kind;
    const char *section; /* the profile's name, say */
    const char *group;   /* "s3" for a line below "s3 ="; NULL: in the section itself */
    const char *name;    /* in lower case; NULL: the section's own line */
    const char *value;
    int line;
    bool more; /* further lines follow it that are no part of value */
};

/* One file. The entries point into its text. */
struct s3_ini {
    char *path;
    char *text; /* wiped when freed */
    size_t bytes;
    struct s3_entry *entry;
    size_t count;
    bool found; /* false: there is no such file, and no entries */
};

enum { S3_INI_BYTES = 1 << 20 }; /* longest file */

/* Parse n bytes of a file of that name. credentials: section names are profiles. INVALID: path:line and why. */
status *s3_ini_parse(const char *text, size_t n, const char *path, bool credentials, struct s3_ini *out) WARN_UNUSED;
/* The same from the file; path may be NULL (no such file), and a file that is missing is no error. IO: cannot be
 * read. */
status *s3_ini_read(const char *path, bool credentials, struct s3_ini *out) WARN_UNUSED;
void s3_ini_free(struct s3_ini *f); /* wipes; {0} is fine */

/* The setting, or NULL. group: NULL or "s3". name NULL: the section's line. */
const struct s3_entry *s3_ini_find(const struct s3_ini *f, enum s3_section kind, const char *section, const char *group,
                                   const char *name);

/* Both files, from AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE, else ~/.aws/config and ~/.aws/credentials. */
struct s3_files {
    struct s3_ini config, credentials;
};
status *s3_files_read(struct s3_files *out) WARN_UNUSED;
void s3_files_free(struct s3_files *f);

/* One value of a profile, from credentials, else from config, with the file that has it. text NULL: in neither, or
 * empty. INVALID: it goes on over several lines. */
struct s3_value {
    const char *text;
    const char *path;
    int line;
};
status *s3_files_value(const struct s3_files *f, const char *profile, const char *group, const char *name,
                       struct s3_value *out) WARN_UNUSED;
/* The value of an entry of `f`, {0} for NULL. INVALID: as above. */
status *s3_entry_value(const struct s3_ini *f, const struct s3_entry *e, struct s3_value *out) WARN_UNUSED;

#endif
