/* options: one row per option: name, type, default, range, unit, help, place in a struct. The same rows parse configs
 * and key=value overrides, give defaults and print help. Rows live in the file of the component that owns them. */
#ifndef TESSERA_COMM_BASE_OPTIONS_H
#define TESSERA_COMM_BASE_OPTIONS_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum option_type {
    OPT_BOOL,   /* bool     true|false|on|off|yes|no */
    OPT_INT,    /* int64_t  decimal */
    OPT_FLOAT,  /* double */
    OPT_STRING, /* char *   owned by the struct; freed by options_fini */
    OPT_ENUM,   /* int      index into `choices` */
    OPT_SIZE,   /* uint64_t bytes: 4096, 64K, 16MiB, 2GiB (powers of 1024) */
    OPT_LIST,   /* char *   words with commas between, also as [a, "b"]; in YAML a list will do */
};

struct option {
    const char *key; /* inside its section: "global_batch" */
    enum option_type type;
    const char *def;     /* text of the default; NULL: the key is required */
    double min, max;     /* numbers only; min == max == 0: no range */
    const char *choices; /* OPT_ENUM: "sigmoid|hinge|ipo" */
    const char *unit;    /* "" if none */
    const char *help;    /* one sentence */
    size_t offset;       /* offsetof(struct ..., field) */
};

struct option_table {
    const char *section; /* "train"; "" for top-level keys */
    const struct option *rows;
    size_t count;
};

/* The row with that key, or NULL. */
const struct option *options_find(const struct option_table *t, const char *key);
/* Parse `text` into the row's field of `base`. `where` begins the message: "configs/a.yaml:12". INVALID names the key,
 * the text and the legal values. */
status *options_set(const struct option_table *t, const char *key, const char *text, void *base,
                    const char *where) WARN_UNUSED;
/* Every field from its default (required ones: zero). Fields must not hold strings yet. */
status *options_defaults(const struct option_table *t, void *base) WARN_UNUSED;
void options_fini(const struct option_table *t, void *base); /* frees strings */
/* The field's value as text that options_set would read back. */
void options_get(const struct option_table *t, const char *key, const void *base, char *text, size_t bytes);
/* One line an option: key, type, default, range or choices, unit, help. */
void options_help(const struct option_table *t, FILE *to);

#endif
