/* dataset: see dataset.h. One pass over the file; each row is laid out at the end of the token array, and taken back
 * from there if it is to be dropped.
 *
 * Dropped and counted are rows that could teach nothing: no scored token fits into max_length behind BOS and the
 * prompt, or chosen and rejected are the same tokens (also when only the cut made them so). In a conversation the
 * newline that ends an assistant's turn is scored with it, the "assistant: " before it is not. */
#include "trainer/data/dataset.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "trainer/data/lines.h"
#include "trainer/data/rows.h"
#include "trainer/data/tokenizer.h"

#include <string.h>

struct build {
    struct dataset *d;
    struct lines lines;
    uint32_t max_length;
    enum row_form form; /* of the first row; all others have it too */
    uint64_t first_line;
    uint64_t cap_rows, cap_tokens;
};

static status *no_memory(const struct build *b, const char *what, uint64_t count)
{
    return ERR(NO_MEMORY, "%s:%llu: room for %llu %s", b->lines.path, (unsigned long long)b->lines.number,
               (unsigned long long)count, what);
}

/* Make *array hold `cap` items; *array stays valid when it cannot. */
static bool grow(void *array, uint64_t cap, size_t bytes)
{
    void *old, *p;
    memcpy(&old, array, sizeof old);
    p = mem_array(old, cap, bytes);
    if (p)
        memcpy(array, &p, sizeof p);
    return p != NULL;
}

static status *reserve_tokens(struct build *b, uint64_t more)
{
    struct dataset *d = b->d;
    if (d->tokens + more <= b->cap_tokens)
        return NULL;
    uint64_t cap = 2 * b->cap_tokens + more + 4096;
    if (!grow(&d->token, cap, sizeof *d->token) || !grow(&d->score, cap, sizeof *d->score))
        return no_memory(b, "tokens", cap);
    b->cap_tokens = cap;
    return NULL;
}

static status *reserve_row(struct build *b)
{
    struct dataset *d = b->d;
    if (d->rows < b->cap_rows)
        return NULL;
    uint64_t cap = 2 * b->cap_rows + 64;
    bool labels = d->kind == DATASET_LABELLED;
    if (!grow(&d->seq, cap * (uint64_t)d->sequences, sizeof *d->seq) || !grow(&d->hash, cap, sizeof *d->hash) ||
        !grow(&d->group, cap, sizeof *d->group) || (labels && !grow(&d->desirable, cap, sizeof *d->desirable)))
        return no_memory(b, "rows", cap);
    b->cap_rows = cap;
    return NULL;
}

static status *put_text(struct build *b, struct text t, bool scored)
{
    struct dataset *d = b->d;
    TRY(reserve_tokens(b, t.n));
    size_t n = tokenize_bytes(t.p, t.n, d->token + d->tokens);
    memset(d->score + d->tokens, scored, n);
    d->tokens += n;
    return NULL;
}

static status *put_special(struct build *b, int32_t id, bool scored)
{
    TRY(reserve_tokens(b, 1));
    b->d->token[b->d->tokens] = id;
    b->d->score[b->d->tokens++] = scored;
    return NULL;
}

static status *put_messages(struct build *b, const struct row *r)
{
    static const struct text colon = { ": ", 2 }, newline = { "\n", 1 };
    for (size_t i = 0; i < json_array_size(r->messages); i++) {
        struct text role, content;
        bool scored = row_message(r, i, &role, &content);
        TRY(put_text(b, role, false));
        TRY(put_text(b, colon, false));
        TRY(put_text(b, content, scored));
        TRY(put_text(b, newline, scored));
        if (scored)
            TRY(put_special(b, TOKEN_EOS, true));
    }
    return NULL;
}

/* Lay out one sequence at the end of the tokens, cut to max_length. */
static status *put_sequence(struct build *b, const struct row *r, int side, struct sequence *out)
{
    struct dataset *d = b->d;
    struct sequence s = { .begin = d->tokens };
    TRY(put_special(b, TOKEN_BOS, false));
    if (r->form == ROW_MESSAGES) {
        TRY(put_messages(b, r));
    } else {
        TRY(put_text(b, r->prompt, false));
        TRY(put_text(b, r->completion[side], true));
        TRY(put_special(b, TOKEN_EOS, true));
    }
    if (d->tokens - s.begin > b->max_length)
        d->tokens = s.begin + b->max_length;
    s.length = (uint32_t)(d->tokens - s.begin);
    for (uint32_t i = 0; i < s.length; i++)
        s.scored += d->score[s.begin + i];
    *out = s;
    return NULL;
}

/* Whether row's sequences, just laid out, can teach anything. */
static bool is_useful(const struct dataset *d, const struct sequence *s)
{
    int laid = d->kind == DATASET_PREFS ? 2 : 1;
    for (int side = 0; side < laid; side++)
        if (!s[side].scored)
            return false;
    return laid == 1 || s[0].length != s[1].length ||
           memcmp(d->token + s[0].begin, d->token + s[1].begin, s[0].length * sizeof *d->token) != 0;
}

static size_t prompt_tokens(const struct dataset *d, const struct sequence *s)
{
    size_t prompt = 0;
    while (!d->score[s->begin + prompt])
        prompt++;
    return prompt;
}

static void hash_row(struct dataset *d, uint64_t row)
{
    const struct sequence *s = d->seq + row * (uint64_t)d->sequences;
    struct hash128 h = hash_init(0);
    for (int side = 0; side < d->sequences; side++) {
        hash_update(&h, d->token + s[side].begin, s[side].length * sizeof *d->token);
        hash_update(&h, d->score + s[side].begin, s[side].length);
    }
    d->hash[row] = hash_final(h).a;
    d->group[row] = hash64(d->token + s->begin, prompt_tokens(d, s) * sizeof *d->token);
}

static status *add_row(struct build *b, const struct row *r)
{
    struct dataset *d = b->d;
    uint64_t before = d->tokens;
    TRY(reserve_row(b));
    struct sequence *s = d->seq + d->rows * (uint64_t)d->sequences;
    s[d->sequences - 1] = (struct sequence){ 0 }; /* a mismatched one is laid out when all rows are known */
    for (int side = 0; side < (d->kind == DATASET_PREFS ? 2 : 1); side++)
        TRY(put_sequence(b, r, side, &s[side]));
    if (!is_useful(d, s)) {
        d->tokens = before;
        d->dropped++;
        return NULL;
    }
    if (d->desirable)
        d->desirable[d->rows] = r->desirable;
    hash_row(d, d->rows++);
    for (int side = 0; side < d->sequences; side++)
        if (s[side].length > d->longest)
            d->longest = s[side].length;
    return NULL;
}

/* Lay out row `row`'s prompt with the completion of row `from`. */
static status *put_mismatched(struct build *b, uint64_t row, uint64_t from)
{
    struct dataset *d = b->d;
    const struct sequence *p = &d->seq[2 * row], *c = &d->seq[2 * from];
    size_t prompt = prompt_tokens(d, p), skip = prompt_tokens(d, c), length = prompt + c->scored;
    TRY(reserve_tokens(b, length));
    length = length < b->max_length ? length : b->max_length;
    struct sequence s = { d->tokens, (uint32_t)length, (uint32_t)(length - prompt) };
    memcpy(d->token + s.begin, d->token + p->begin, prompt * sizeof *d->token);
    memcpy(d->token + s.begin + prompt, d->token + c->begin + skip, s.scored * sizeof *d->token);
    memset(d->score + s.begin, 0, prompt);
    memset(d->score + s.begin + prompt, 1, s.scored);
    d->tokens += length;
    d->longest = s.length > d->longest ? s.length : d->longest;
    d->seq[2 * row + 1] = s;
    hash_row(d, row);
    return NULL;
}

/* Rows from the last of a run of equal prompts backwards, so that the next row with another prompt is always known. */
static status *put_all_mismatched(struct build *b)
{
    struct dataset *d = b->d;
    uint64_t n = d->rows, end = 0, from = 0;
    while (end < n && d->group[end] == d->group[(end + 1) % n])
        end++;
    if (end == n)
        return ERR(INVALID,
                   "%s: all %llu rows have the same prompt: labelled rows are compared with completions of other "
                   "prompts, so there must be two at least",
                   b->lines.path, (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t row = (end + n - i) % n, next = (row + 1) % n;
        if (d->group[row] != d->group[next])
            from = next;
        TRY(put_mismatched(b, row, from));
    }
    return NULL;
}

/* The row's form must be of the wanted kind, and that of the first row. */
static status *check_form(struct build *b, const struct row *r)
{
    unsigned long long line = b->lines.number;
    if (row_kind(r->form) != b->d->kind) {
        static const struct {
            const char *name;
            enum row_form form, other;
        } wanted[DATASET_KINDS] = { [DATASET_SFT] = { "SFT", ROW_COMPLETION, ROW_MESSAGES },
                                    [DATASET_PREFS] = { "preference", ROW_PREFS, ROW_PREFS_IMPLICIT },
                                    [DATASET_LABELLED] = { "labelled", ROW_LABELLED, ROW_LABELLED } };
        enum row_form form = wanted[b->d->kind].form, other = wanted[b->d->kind].other;
        return ERR(INVALID, "%s:%llu: %s rows are wanted here, but this is a row of %s (legal forms: %s%s%s)",
                   b->lines.path, line, wanted[b->d->kind].name, row_form_text(r->form), row_form_text(form),
                   other == form ? "" : "; ", other == form ? "" : row_form_text(other));
    }
    if (!b->first_line) {
        b->first_line = line;
        b->form = r->form;
    }
    if (r->form != b->form)
        return ERR(INVALID, "%s:%llu: a row of %s, but the rows from line %llu on are %s: one form a file",
                   b->lines.path, line, row_form_text(r->form), (unsigned long long)b->first_line,
                   row_form_text(b->form));
    return NULL;
}

static status *read_rows(struct build *b)
{
    for (;;) {
        bool more;
        struct row r;
        TRY(lines_next(&b->lines, &more));
        if (!more)
            break;
        TRY(row_parse(&b->lines, &r));
        status *st = check_form(b, &r);
        if (!st)
            st = add_row(b, &r);
        row_close(&r);
        TRY(st);
    }
    if (b->d->dropped && !b->d->rows)
        return ERR(INVALID,
                   "%s: all %llu rows were dropped: their prompts leave no room in max_length %u, or chosen "
                   "and rejected are equal",
                   b->lines.path, (unsigned long long)b->d->dropped, b->max_length);
    if (!b->d->rows)
        return ERR(INVALID, "%s: the file has no rows", b->lines.path);
    return b->d->kind == DATASET_LABELLED ? put_all_mismatched(b) : NULL;
}

status *dataset_open(const char *path, enum dataset_kind kind, uint32_t max_length, struct dataset **out)
{
    if (max_length < 2)
        return ERR(INVALID, "%s: max_length is %u, but a sequence has at least 2 tokens", path, max_length);
    struct build b = { .max_length = max_length, .d = mem_calloc(1, sizeof *b.d) };
    if (!b.d)
        return ERR(NO_MEMORY, "%s: a dataset", path);
    b.d->kind = kind;
    b.d->sequences = kind == DATASET_SFT ? 1 : 2;
    status *st = lines_open(&b.lines, path);
    if (!st)
        st = read_rows(&b);
    lines_close(&b.lines);
    if (st) {
        dataset_close(b.d);
        return st;
    }
    *out = b.d;
    return NULL;
}

void dataset_close(struct dataset *d)
{
    if (!d)
        return;
    mem_free(d->seq);
    mem_free(d->hash);
    mem_free(d->group);
    mem_free(d->desirable);
    mem_free(d->token);
    mem_free(d->score);
    mem_free(d);
}
