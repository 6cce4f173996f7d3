/* show: rows of a file as the trainer sees them, for people.
 *
 *   row 0: chosen 112 tokens (30 scored), rejected 121 tokens (39 scored)
 *     prompt   | Question: ...
 *     chosen   | ...
 *              | A: 18 [EOS]
 *     rejected | ...
 */
#include "trainer/data/lines.h"
#include "trainer/data/rows.h"
#include "trainer/data/sources.h"
#include "trainer/data/tokenizer.h"

#include <stddef.h>

enum { ALL_TOKENS = 1 << 30 }; /* a max_length no line reaches */

static const struct option rows_option[] = { { "N", OPT_INT, "3", 0, 1e9, NULL, "rows", "rows to show", 0 } };
static const struct option_table show_options = { "", rows_option, 1 };

static const char *side_name(const struct dataset *d, int side)
{
    static const char *const names[DATASET_KINDS][2] = { [DATASET_SFT] = { "completion", "" },
                                                         [DATASET_PREFS] = { "chosen", "rejected" },
                                                         [DATASET_LABELLED] = { "completion", "mismatched" } };
    return names[d->kind][side];
}

static void print_label(const char *label)
{
    printf("  %-10s | ", label);
}

/* A token as text; what a terminal would obey is escaped. */
static void print_token(int32_t id)
{
    if (id == TOKEN_BOS)
        printf("[BOS]");
    else if (id == TOKEN_EOS)
        printf("[EOS]");
    else if (id < 0x20 || id == 0x7f)
        printf("\\x%02x", (unsigned)id);
    else
        putchar(id);
}

/* Tokens [from, to) behind a label, line by line. */
static void print_run(const struct dataset *d, uint64_t from, uint64_t to, const char *label)
{
    print_label(label);
    for (uint64_t i = from; i < to; i++) {
        if (d->token[i] != '\n') {
            print_token(d->token[i]);
        } else if (i + 1 < to && d->token[i + 1] != TOKEN_EOS) {
            putchar('\n');
            print_label("");
        }
    }
    putchar('\n');
}

/* The runs of unscored and scored tokens in turn; the prompt that chosen and rejected share only once. */
static void print_sequence(const struct dataset *d, uint64_t row, int side)
{
    struct sequence s = d->seq[row * (uint64_t)d->sequences + (uint64_t)side];
    uint64_t end = s.begin + s.length;
    for (uint64_t i = s.begin + 1 /* BOS */, from = i; i < end; from = i) {
        while (i < end && d->score[i] == d->score[from])
            i++;
        if (d->score[from] || side == 0)
            print_run(d, from, i, d->score[from] ? side_name(d, side) : "prompt");
    }
}

static void print_row(const struct dataset *d, uint64_t row)
{
    printf("row %llu:", (unsigned long long)row);
    if (d->desirable)
        printf(" %s:", d->desirable[row] ? "desirable" : "undesirable");
    for (int side = 0; side < d->sequences; side++) {
        struct sequence s = d->seq[row * (uint64_t)d->sequences + (uint64_t)side];
        printf("%s %s%s%u tokens (%u scored)", side ? "," : "", d->sequences == 2 ? side_name(d, side) : "",
               d->sequences == 2 ? " " : "", s.length, s.scored);
    }
    putchar('\n');
    for (int side = 0; side < d->sequences; side++)
        print_sequence(d, row, side);
    putchar('\n');
}

static void print_summary(const char *path, const struct dataset *d)
{
    static const char *const kinds[DATASET_KINDS] = { "SFT", "preference", "labelled" };
    uint64_t n = d->rows * (uint64_t)d->sequences, scored = 0;
    for (uint64_t i = 0; i < n; i++)
        scored += d->seq[i].scored;
    printf("%s: %llu %s rows, %llu dropped (chosen and rejected equal); %llu tokens, %llu scored; a sequence has %.1f "
           "tokens in the mean, the longest %u\n",
           path, (unsigned long long)d->rows, kinds[d->kind], (unsigned long long)d->dropped,
           (unsigned long long)d->tokens, (unsigned long long)scored, (double)d->tokens / (double)n, d->longest);
}

/* What the first row says the file is; a file without rows is dataset_open's to refuse. */
static status *find_kind(const char *path, enum dataset_kind *out)
{
    struct lines l;
    struct row r;
    bool more = false;
    enum dataset_kind kind = DATASET_SFT;
    status *st = lines_open(&l, path);
    if (!st)
        st = lines_next(&l, &more);
    if (!st && more)
        st = row_parse(&l, &r);
    if (!st && more) {
        kind = row_kind(r.form);
        row_close(&r);
    }
    lines_close(&l);
    *out = kind;
    return st;
}

status *show_file(const char *path, const char *rows)
{
    int64_t most;
    enum dataset_kind kind;
    struct dataset *d;
    TRY(options_defaults(&show_options, &most));
    if (rows)
        TRY(options_set(&show_options, "N", rows, &most, "data show"));
    TRY(find_kind(path, &kind));
    TRY(dataset_open(path, kind, ALL_TOKENS, &d));
    for (uint64_t row = 0; row < d->rows && row < (uint64_t)most; row++)
        print_row(d, row);
    print_summary(path, d);
    dataset_close(d);
    return NULL;
}
