/* rows: a line of JSONL -> the row form it has and its texts. What dataset.h promises about lines is kept here. */
#ifndef TESSERA_TRAINER_DATA_ROWS_H
#define TESSERA_TRAINER_DATA_ROWS_H

#include "comm/base/status.h"
#include "trainer/data/dataset.h"
#include "trainer/data/lines.h"

#include <jansson.h>

enum row_form { ROW_PREFS, ROW_PREFS_IMPLICIT, ROW_COMPLETION, ROW_LABELLED, ROW_MESSAGES, ROW_FORMS };

struct text {
    const char *p;
    size_t n;
};

/* A row of one of the forms. Texts point into `json`. */
struct row {
    json_t *json;
    enum row_form form;
    struct text prompt;        /* all but ROW_MESSAGES; of ROW_PREFS_IMPLICIT the common prefix */
    struct text completion[2]; /* chosen, rejected; or completion, none */
    bool desirable;            /* ROW_LABELLED */
    const json_t *messages;    /* ROW_MESSAGES: checked, see row_message */
};

/* The kind of file that rows of this form make, and the form in words. */
enum dataset_kind row_kind(enum row_form form);
const char *row_form_text(enum row_form form); /* {"prompt": text, ...} */

/* The current line as a JSON object: INVALID with path, line and the parser's words. The caller's to json_decref. */
status *row_json(const struct lines *l, json_t **out) WARN_UNUSED;
/* The string under `key`: INVALID, naming what it is instead; `legal` ends the message. */
status *row_string(const struct lines *l, const json_t *object, const char *key, const char *legal,
                   struct text *out) WARN_UNUSED;
/* Parse the current line of l. On success close it with row_close. */
status *row_parse(const struct lines *l, struct row *out) WARN_UNUSED;
void row_close(struct row *r);
/* Message i: its role and content, and whether it is the assistant's (scored). */
bool row_message(const struct row *r, size_t i, struct text *role, struct text *content);

#endif
