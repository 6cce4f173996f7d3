/* rows: which form a line has is decided by its keys alone; every complaint names the place and the legal forms. */
#include "trainer/data/rows.h"

#include <string.h>

static const char *const form_texts[ROW_FORMS] = {
    [ROW_PREFS] = "{\"prompt\": text, \"chosen\": text, \"rejected\": text}",
    [ROW_PREFS_IMPLICIT] = "{\"chosen\": text, \"rejected\": text}",
    [ROW_COMPLETION] = "{\"prompt\": text, \"completion\": text}",
    [ROW_LABELLED] = "{\"prompt\": text, \"completion\": text, \"label\": true or false}",
    [ROW_MESSAGES] = "{\"messages\": [{\"role\": system, user, assistant or tool, \"content\": text}, ...]}",
};
static const char all_forms[] = "{\"prompt\", \"chosen\", \"rejected\"}, {\"chosen\", \"rejected\"}, "
                                "{\"prompt\", \"completion\"}, {\"prompt\", \"completion\", \"label\"}, {\"messages\"}";

enum dataset_kind row_kind(enum row_form form)
{
    static const enum dataset_kind kinds[ROW_FORMS] = { [ROW_PREFS] = DATASET_PREFS,
                                                        [ROW_PREFS_IMPLICIT] = DATASET_PREFS,
                                                        [ROW_COMPLETION] = DATASET_SFT,
                                                        [ROW_LABELLED] = DATASET_LABELLED,
                                                        [ROW_MESSAGES] = DATASET_SFT };
    return kinds[form];
}

const char *row_form_text(enum row_form form)
{
    return form_texts[form];
}

static const char *type_text(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "unknown";
}

#define AT(l) (l)->path, (unsigned long long)(l)->number

status *row_json(const struct lines *l, json_t **out)
{
    json_error_t e;
    json_t *v = json_loadb(l->text, l->n, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &e);
    if (!v)
        return ERR(INVALID, "%s:%llu: not a JSON object (column %d: %s)", AT(l), e.column, e.text);
    if (!json_is_object(v)) {
        status *st = ERR(INVALID, "%s:%llu: a line must be a JSON object, not %s", AT(l), type_text(v));
        json_decref(v);
        return st;
    }
    *out = v;
    return NULL;
}

/* `label` names the place in the complaint: "chosen", "messages[2].role". */
static status *string_at(const struct lines *l, const json_t *v, const char *label, const char *legal, struct text *out)
{
    if (!v)
        return ERR(INVALID, "%s:%llu: key \"%s\" is missing (legal forms: %s)", AT(l), label, legal);
    if (!json_is_string(v))
        return ERR(INVALID, "%s:%llu: key \"%s\" must be a string, not %s (legal forms: %s)", AT(l), label,
                   type_text(v), legal);
    *out = (struct text){ json_string_value(v), json_string_length(v) };
    return NULL;
}

status *row_string(const struct lines *l, const json_t *object, const char *key, const char *legal, struct text *out)
{
    return string_at(l, json_object_get(object, key), key, legal, out);
}

/* Which form the keys mean. */
static status *find_form(const struct lines *l, const json_t *o, enum row_form *out)
{
    bool prefs = json_object_get(o, "chosen") || json_object_get(o, "rejected");
    bool completion = json_object_get(o, "completion"), messages = json_object_get(o, "messages");
    if (prefs + completion + messages > 1)
        return ERR(INVALID, "%s:%llu: the row has keys of more than one form (legal forms: %s)", AT(l), all_forms);
    if (!prefs && !completion && !messages) {
        const char *first = json_object_iter_key(json_object_iter((json_t *)(size_t)o));
        return ERR(INVALID,
                   "%s:%llu: the row has none of the keys \"chosen\", \"completion\", \"messages\"%s%.40s%s"
                   " (legal forms: %s)",
                   AT(l), first ? "; its first key is \"" : "; it is empty", first ? first : "", first ? "\"" : "",
                   all_forms);
    }
    *out = messages                       ? ROW_MESSAGES
           : completion                   ? json_object_get(o, "label") ? ROW_LABELLED : ROW_COMPLETION
           : json_object_get(o, "prompt") ? ROW_PREFS
                                          : ROW_PREFS_IMPLICIT;
    return NULL;
}

/* Bytes of the longest common prefix of two texts that ends between characters. */
static size_t common_prefix(struct text a, struct text b)
{
    size_t n = a.n < b.n ? a.n : b.n, i = 0;
    while (i < n && a.p[i] == b.p[i])
        i++;
    /* a byte 10xxxxxx continues a character that began before i; both texts agree up to i, so both are inside it */
    while (i > 0 && i < n && ((unsigned char)a.p[i] & 0xc0) == 0x80)
        i--;
    return i;
}

static status *parse_prefs(const struct lines *l, struct row *r)
{
    const char *legal = form_texts[r->form];
    TRY(row_string(l, r->json, "chosen", legal, &r->completion[0]));
    TRY(row_string(l, r->json, "rejected", legal, &r->completion[1]));
    if (r->form == ROW_PREFS)
        return row_string(l, r->json, "prompt", legal, &r->prompt);
    size_t n = common_prefix(r->completion[0], r->completion[1]);
    r->prompt = (struct text){ r->completion[0].p, n };
    for (int side = 0; side < 2; side++)
        r->completion[side] = (struct text){ r->completion[side].p + n, r->completion[side].n - n };
    return NULL;
}

static bool text_is(struct text t, const char *word)
{
    return t.n == strlen(word) && !memcmp(t.p, word, t.n);
}

static bool is_role(struct text t)
{
    return text_is(t, "system") || text_is(t, "user") || text_is(t, "assistant") || text_is(t, "tool");
}

bool row_message(const struct row *r, size_t i, struct text *role, struct text *content)
{
    const json_t *m = json_array_get(r->messages, i);
    const json_t *who = json_object_get(m, "role"), *what = json_object_get(m, "content");
    *role = (struct text){ json_string_value(who), json_string_length(who) };
    *content = (struct text){ json_string_value(what), json_string_length(what) };
    return text_is(*role, "assistant");
}

static status *parse_messages(const struct lines *l, struct row *r)
{
    const char *legal = form_texts[ROW_MESSAGES];
    bool scored = false;
    r->messages = json_object_get(r->json, "messages");
    if (!json_is_array(r->messages))
        return ERR(INVALID, "%s:%llu: key \"messages\" must be an array, not %s (legal forms: %s)", AT(l),
                   type_text(r->messages), legal);
    for (size_t i = 0; i < json_array_size(r->messages); i++) {
        const json_t *m = json_array_get(r->messages, i);
        struct text role, content;
        if (!json_is_object(m))
            return ERR(INVALID, "%s:%llu: key \"messages[%zu]\" must be an object, not %s (legal forms: %s)", AT(l), i,
                       type_text(m), legal);
        char label[48];
        snprintf(label, sizeof label, "messages[%zu].role", i);
        TRY(string_at(l, json_object_get(m, "role"), label, legal, &role));
        if (!is_role(role))
            return ERR(INVALID, "%s:%llu: %s: \"%.40s\" is no role (legal: system, user, assistant, tool)", AT(l),
                       label, role.p);
        snprintf(label, sizeof label, "messages[%zu].content", i);
        TRY(string_at(l, json_object_get(m, "content"), label, legal, &content));
        scored |= text_is(role, "assistant");
    }
    if (!scored)
        return ERR(INVALID, "%s:%llu: none of the %zu messages is the assistant's, so nothing would be trained", AT(l),
                   json_array_size(r->messages));
    return NULL;
}

/* An empty completion is no answer to call good or bad. */
static status *parse_labelled(const struct lines *l, struct row *r)
{
    const char *legal = form_texts[ROW_LABELLED];
    const json_t *label = json_object_get(r->json, "label");
    TRY(row_string(l, r->json, "prompt", legal, &r->prompt));
    TRY(row_string(l, r->json, "completion", legal, &r->completion[0]));
    if (!json_is_boolean(label))
        return ERR(INVALID,
                   "%s:%llu: key \"label\" must be true (desirable) or false (undesirable), not %s (legal "
                   "forms: %s)",
                   AT(l), type_text(label), legal);
    if (!r->completion[0].n)
        return ERR(INVALID, "%s:%llu: key \"completion\" must not be empty (legal forms: %s)", AT(l), legal);
    r->desirable = json_is_true(label);
    return NULL;
}

static status *parse_form(const struct lines *l, struct row *r)
{
    TRY(find_form(l, r->json, &r->form));
    switch (r->form) {
    case ROW_COMPLETION:
        TRY(row_string(l, r->json, "prompt", form_texts[r->form], &r->prompt));
        return row_string(l, r->json, "completion", form_texts[r->form], &r->completion[0]);
    case ROW_LABELLED:
        return parse_labelled(l, r);
    case ROW_MESSAGES:
        return parse_messages(l, r);
    default:
        return parse_prefs(l, r);
    }
}

status *row_parse(const struct lines *l, struct row *out)
{
    struct row r = { 0 };
    TRY(row_json(l, &r.json));
    status *st = parse_form(l, &r);
    if (st) {
        row_close(&r);
        return st;
    }
    *out = r;
    return NULL;
}

void row_close(struct row *r)
{
    json_decref(r->json);
    *r = (struct row){ 0 };
}
