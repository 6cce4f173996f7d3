/* dataset: token by token against sequences written out by hand, and the words of every complaint. */
#include "tests/trainer/data_file.h"
#include "trainer/data/dataset.h"
#include "trainer/data/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static struct dataset *open_text(const char *text, enum dataset_kind kind, uint32_t max_length)
{
    struct data_file f = data_file_make(text, strlen(text));
    struct dataset *d = NULL;
    status *st = dataset_open(f.path, kind, max_length, &d);
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
    data_file_remove(&f);
    return d;
}

/* The file is refused; the message is "<path><rest>", where a '*' at the end of rest stands for anything. */
static void refused_bytes(const char *text, size_t n, enum dataset_kind kind, uint32_t max_length, const char *rest)
{
    struct data_file f = data_file_make(text, n);
    struct dataset *d = NULL;
    status *st = dataset_open(f.path, kind, max_length, &d);
    data_file_remove(&f);
    assert_null(d);
    assert_int_equal(status_code(st), ST_INVALID);
    const char *m = status_message(st);
    size_t path = strlen(f.path), length = strlen(rest);
    assert_true(strlen(m) >= path && !memcmp(m, f.path, path));
    if (rest[length - 1] == '*') {
        if (strncmp(m + path, rest, length - 1))
            assert_string_equal(m + path, rest);
    } else {
        assert_string_equal(m + path, rest);
    }
    status_free(st);
}

static void refused(const char *text, enum dataset_kind kind, const char *rest)
{
    refused_bytes(text, strlen(text), kind, 100, rest);
}

/* Sequence `index` is what `want` spells: '<' BOS, '>' EOS, else the byte itself; the mark below a character, '1' or
 * '0', is its score. */
static void expect_sequence(const struct dataset *d, uint64_t index, const char *want, const char *marks)
{
    struct sequence s = d->seq[index];
    assert_int_equal(s.length, strlen(want));
    assert_int_equal(strlen(want), strlen(marks));
    uint32_t scored = 0;
    for (uint32_t i = 0; i < s.length; i++) {
        int32_t id = want[i] == '<' ? TOKEN_BOS : want[i] == '>' ? TOKEN_EOS : (unsigned char)want[i];
        assert_int_equal(d->token[s.begin + i], id);
        assert_int_equal(d->score[s.begin + i], marks[i] - '0');
        scored += marks[i] == '1';
    }
    assert_int_equal(s.scored, scored);
}

static void test_tokenizer(void **state)
{
    (void)state;
    char all[256];
    int32_t id[257] = { [256] = -7 };
    for (int i = 0; i < 256; i++)
        all[i] = (char)i;
    assert_int_equal(tokenize_bytes(all, 256, id), 256);
    for (int i = 0; i < 256; i++)
        assert_int_equal(id[i], i);
    assert_int_equal(id[256], -7);
    assert_int_equal(tokenize_bytes(all, 0, id), 0);
}

static void test_prefs(void **state)
{
    (void)state;
    struct dataset *d = open_text("{\"prompt\": \"ab\", \"chosen\": \"c\", \"rejected\": \"de\", \"more\": [1]}\n"
                                  "{\"rejected\": \"\", \"chosen\": \"xyz\", \"prompt\": \"\"}\n",
                                  DATASET_PREFS, 100);
    assert_int_equal(d->kind, DATASET_PREFS);
    assert_int_equal(d->sequences, 2);
    assert_int_equal(d->rows, 2);
    assert_int_equal(d->dropped, 0);
    expect_sequence(d, 0, "<abc>", "00011");
    expect_sequence(d, 1, "<abde>", "000111");
    expect_sequence(d, 2, "<xyz>", "01111");
    expect_sequence(d, 3, "<>", "01");
    assert_int_equal(d->longest, 6);
    assert_int_equal(d->tokens, 5 + 6 + 5 + 2);
    dataset_close(d);
}

static void test_implicit(void **state)
{
    (void)state;
    /* e-acute is c3 a9, e-grave c3 a8: the common byte c3 is no prefix of characters. Euro is e2 82 ac, e2 82 ad is
     * kip. */
    struct dataset *d = open_text("{\"chosen\": \"Q: A\", \"rejected\": \"Q: BB\"}\n"
                                  "{\"chosen\": \"a\xc3\xa9\", \"rejected\": \"a\xc3\xa8z\"}\n"
                                  "{\"chosen\": \"\xe2\x82\xac\", \"rejected\": \"\xe2\x82\xad\"}\n"
                                  "{\"chosen\": \"ab\xc3\xa9\", \"rejected\": \"ab\xc3\xa9yy\"}\n"
                                  "{\"chosen\": \"\xc3\xa9q\", \"rejected\": \"\xc3\xa9\xc3\xa9\"}\n"
                                  "{\"chosen\": \"x\", \"rejected\": \"y\"}",
                                  DATASET_PREFS, 100);
    assert_int_equal(d->rows, 6);
    expect_sequence(d, 0, "<Q: A>", "000011");
    expect_sequence(d, 1, "<Q: BB>", "0000111");
    expect_sequence(d, 2, "<a\xc3\xa9>", "00111");
    expect_sequence(d, 3, "<a\xc3\xa8z>", "001111");
    expect_sequence(d, 4, "<\xe2\x82\xac>", "01111");
    expect_sequence(d, 5, "<\xe2\x82\xad>", "01111");
    expect_sequence(d, 6, "<ab\xc3\xa9>", "000001");
    expect_sequence(d, 7, "<ab\xc3\xa9yy>", "00000111");
    expect_sequence(d, 8, "<\xc3\xa9q>", "00011");
    expect_sequence(d, 9, "<\xc3\xa9\xc3\xa9>", "000111");
    expect_sequence(d, 10, "<x>", "011");
    dataset_close(d);
}

static void test_sft(void **state)
{
    (void)state;
    struct dataset *d = open_text("{\"prompt\": \"p\", \"completion\": \"cd\"}\n", DATASET_SFT, 100);
    assert_int_equal(d->sequences, 1);
    expect_sequence(d, 0, "<pcd>", "00111");
    dataset_close(d);
    d = open_text(
        "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"hi\"},"
        "{\"role\": \"assistant\", \"content\": \"yo\"}, {\"content\": \"\", \"role\": \"user\"},"
        "{\"role\": \"assistant\", \"content\": \"\"}], \"id\": 3}\n",
        DATASET_SFT, 100);
    expect_sequence(d, 0, "<system: s\nuser: hi\nassistant: yo\n>user: \nassistant: \n>",
                    "0000000000"
                    "0"
                    "000000000"
                    "00000000000"
                    "1111"
                    "0000000"
                    "00000000000"
                    "11");
    dataset_close(d);
}

/* max_length around every border of a row with prompt "ppp" (BOS and prompt: 4 tokens) and completion "cc" (7 in all).
 */
static void test_cut(void **state)
{
    (void)state;
    static const char text[] =
        "{\"prompt\": \"\", \"completion\": \"\"}\n{\"prompt\": \"ppp\", \"completion\": \"cc\"}\n";
    for (uint32_t most = 2; most <= 9; most++) {
        struct dataset *d = open_text(text, DATASET_SFT, most);
        expect_sequence(d, 0, "<>", "01");
        bool kept = most >= 5;
        assert_int_equal(d->rows, kept ? 2 : 1);
        assert_int_equal(d->dropped, kept ? 0 : 1);
        if (most == 5)
            expect_sequence(d, 1, "<pppc", "00001");
        if (most == 6)
            expect_sequence(d, 1, "<pppcc", "000011");
        if (most >= 7)
            expect_sequence(d, 1, "<pppcc>", "0000111");
        assert_int_equal(d->longest, kept ? d->seq[1].length : 2);
        assert_int_equal(d->tokens, kept ? 2 + d->seq[1].length : 2);
        dataset_close(d);
    }
}

/* Rows without a difference between chosen and rejected are dropped, also if only the cut hides it; the row after a
 * dropped one is laid out where it was. */
static void test_drops(void **state)
{
    (void)state;
    static const char text[] = "{\"chosen\": \"same\", \"rejected\": \"same\"}\n"
                               "{\"chosen\": \"a1\", \"rejected\": \"b\"}\n"
                               "{\"chosen\": \"longlong1\", \"rejected\": \"longlong2\"}\n"
                               "{\"chosen\": \"c\", \"rejected\": \"d2\"}\n";
    struct dataset *d = open_text(text, DATASET_PREFS, 100);
    assert_int_equal(d->rows, 3);
    assert_int_equal(d->dropped, 1);
    expect_sequence(d, 2, "<longlong1>", "00000000011");
    dataset_close(d);
    d = open_text(text, DATASET_PREFS, 9);
    assert_int_equal(d->rows, 2);
    assert_int_equal(d->dropped, 2);
    expect_sequence(d, 0, "<a1>", "0111");
    expect_sequence(d, 2, "<c>", "011");
    expect_sequence(d, 3, "<d2>", "0111");
    assert_int_equal(d->tokens, 4 + 3 + 3 + 4);
    dataset_close(d);
    /* equal after the cut, though each has scored tokens */
    static const char late[] = "{\"prompt\": \"p\", \"chosen\": \"abcX\", \"rejected\": \"abcY\"}\n"
                               "{\"prompt\": \"p\", \"chosen\": \"1\", \"rejected\": \"2\"}\n";
    d = open_text(late, DATASET_PREFS, 5);
    assert_int_equal(d->rows, 1);
    assert_int_equal(d->dropped, 1);
    dataset_close(d);
    d = open_text(late, DATASET_PREFS, 6);
    assert_int_equal(d->rows, 2);
    dataset_close(d);
    refused("{\"chosen\": \"same\", \"rejected\": \"same\"}\n", DATASET_PREFS, ": all 1 rows were dropped*");
}

static void test_hashes(void **state)
{
    (void)state;
    struct dataset *d =
        open_text("{\"prompt\": \"ab\", \"chosen\": \"c\", \"rejected\": \"d\"}\n"
                  "{\"prompt\": \"ab\", \"chosen\": \"d\", \"rejected\": \"c\"}\n"
                  "{\"prompt\": \"a\", \"chosen\": \"bc\", \"rejected\": \"bd\"}\n" /* same tokens as the first */
                  "{\"prompt\": \"ab\", \"chosen\": \"c\", \"rejected\": \"d\"}\n",
                  DATASET_PREFS, 100);
    assert_int_equal(d->rows, 4);
    assert_true(d->hash[0] == d->hash[3]);
    assert_true(d->hash[0] != d->hash[1] && d->hash[0] != d->hash[2] && d->hash[1] != d->hash[2]);
    assert_true(d->group[0] == d->group[1] && d->group[0] == d->group[3] && d->group[0] != d->group[2]);
    dataset_close(d);
    /* the implicit prompt gives the same group and row as the explicit one */
    struct dataset *e = open_text("{\"prompt\": \"ab\", \"chosen\": \"c\", \"rejected\": \"d\"}\n", DATASET_PREFS, 100);
    struct dataset *i = open_text("{\"chosen\": \"abc\", \"rejected\": \"abd\"}\n", DATASET_PREFS, 100);
    assert_true(e->hash[0] == i->hash[0] && e->group[0] == i->group[0]);
    dataset_close(e);
    dataset_close(i);
}

static void test_lines(void **state)
{
    (void)state;
    struct dataset *d = open_text("\xef\xbb\xbf{\"prompt\": \"a\", \"completion\": \"b\"}\r\n\r\n \t\n"
                                  "{\"prompt\": \"c\", \"completion\": \"d\\r\"}\r\n\n\n",
                                  DATASET_SFT, 100);
    assert_int_equal(d->rows, 2);
    expect_sequence(d, 0, "<ab>", "0011");
    expect_sequence(d, 1, "<cd\r>", "00111");
    dataset_close(d);
    /* line numbers count blank lines; a mark elsewhere than at the start is no mark */
    refused("\n{\"prompt\": \"a\", \"completion\": \"b\"}\n\n{}\n", DATASET_SFT, ":4: the row has none of the keys*");
    refused("{\"prompt\": \"a\", \"completion\": \"b\"}\n\xef\xbb\xbf{}\n", DATASET_SFT, ":2: not a JSON object*");
    /* an escaped NUL is a byte like others */
    d = open_text("{\"prompt\": \"\\u0000\", \"completion\": \"x\"}", DATASET_SFT, 100);
    assert_int_equal(d->seq[0].length, 4);
    assert_int_equal(d->token[1], 0);
    dataset_close(d);
}

/* A line of exactly `bytes`, then a short one. */
static struct data_file long_line(size_t bytes)
{
    static const char head[] = "{\"prompt\": \"\", \"completion\": \"",
                      tail[] = "\"}\n{\"prompt\": \"\", \"completion\": \"z\"}\n";
    size_t fill = bytes - (sizeof head - 1) - 2, total = bytes + sizeof tail - 3;
    char *text = test_malloc(total);
    memcpy(text, head, sizeof head - 1);
    memset(text + sizeof head - 1, 'y', fill);
    memcpy(text + sizeof head - 1 + fill, tail, sizeof tail - 1);
    struct data_file f = data_file_make(text, total);
    test_free(text);
    return f;
}

static void test_long_lines(void **state)
{
    (void)state;
    const size_t limit = 16 << 20;
    struct dataset *d = NULL;
    struct data_file f = long_line(limit);
    assert_null(dataset_open(f.path, DATASET_SFT, 100, &d));
    data_file_remove(&f);
    assert_int_equal(d->rows, 2);
    assert_int_equal(d->seq[0].length, 100);
    expect_sequence(d, 1, "<z>", "011");
    dataset_close(d);
    d = NULL;
    f = long_line(limit + 1);
    status *st = dataset_open(f.path, DATASET_SFT, 100, &d);
    data_file_remove(&f);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), ":1: the line is longer than 16777216 bytes"));
    assert_null(d);
    status_free(st);
}

static void test_many_rows(void **state)
{
    (void)state;
    enum { ROWS = 3000 };
    char *text = test_malloc(ROWS * 96);
    size_t n = 0;
    for (int i = 0; i < ROWS; i++)
        n += (size_t)snprintf(text + n, 96, "{\"prompt\": \"%d\", \"chosen\": \"c%d\", \"rejected\": \"r%d\"}\n", i,
                              i * i, -i);
    struct dataset *d = open_text(text, DATASET_PREFS, 100);
    test_free(text);
    assert_int_equal(d->rows, ROWS);
    uint64_t begin = 0;
    for (uint64_t i = 0; i < ROWS; i++) {
        char want[64], marks[64];
        for (int side = 0; side < 2; side++) {
            int prompt = snprintf(want, sizeof want, "<%d", (int)i);
            int all = snprintf(want, sizeof want, side ? "<%dr%d>" : "<%dc%d>", (int)i, side ? -(int)i : (int)(i * i));
            memset(marks, '1', (size_t)all);
            memset(marks, '0', (size_t)prompt);
            marks[all] = 0;
            assert_int_equal(d->seq[2 * i + (uint64_t)side].begin, begin);
            expect_sequence(d, 2 * i + (uint64_t)side, want, marks);
            begin += (uint64_t)all;
        }
    }
    assert_int_equal(d->tokens, begin);
    dataset_close(d);
}

#define PREFS "{\"prompt\": text, \"chosen\": text, \"rejected\": text}"
#define PAIR  "{\"chosen\": text, \"rejected\": text}"
#define SFT   "{\"prompt\": text, \"completion\": text}"
#define CHAT  "{\"messages\": [{\"role\": system, user, assistant or tool, \"content\": text}, ...]}"
#define GOOD  "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}\n"
#define LEGAL4                                                                                                         \
    " (legal forms: {\"prompt\", \"chosen\", \"rejected\"}, {\"chosen\", \"rejected\"}, {\"prompt\", "                 \
    "\"completion\"}, {\"prompt\", \"completion\", \"label\"}, {\"messages\"})"
#define LABELLED       "{\"prompt\": text, \"completion\": text, \"label\": true or false}"
#define LABEL(p, c, l) "{\"prompt\": \"" p "\", \"completion\": \"" c "\", \"label\": " l "}\n"

static void test_complaints(void **state)
{
    (void)state;
    const enum dataset_kind P = DATASET_PREFS, S = DATASET_SFT;
    refused(GOOD "{\"prompt\": \"p\", \"chosen\": 3, \"rejected\": \"r\"}\n", P,
            ":2: key \"chosen\" must be a string, not a number (legal forms: " PREFS ")");
    refused("{\"prompt\": null, \"chosen\": \"c\", \"rejected\": \"r\"}\n", P,
            ":1: key \"prompt\" must be a string, not null (legal forms: " PREFS ")");
    refused("{\"chosen\": \"c\", \"rejected\": [\"r\"]}\n", P,
            ":1: key \"rejected\" must be a string, not an array (legal forms: " PAIR ")");
    refused("{\"chosen\": \"c\"}\n", P, ":1: key \"rejected\" is missing (legal forms: " PAIR ")");
    refused("{\"rejected\": \"c\"}\n", P, ":1: key \"chosen\" is missing (legal forms: " PAIR ")");
    refused("{\"prompt\": \"p\", \"rejected\": \"c\"}\n", P, ":1: key \"chosen\" is missing (legal forms: " PREFS ")");
    refused("{\"completion\": \"c\"}\n", S, ":1: key \"prompt\" is missing (legal forms: " SFT ")");
    refused("{\"prompt\": true, \"completion\": \"c\"}\n", S,
            ":1: key \"prompt\" must be a string, not a boolean (legal forms: " SFT ")");
    refused("{\"prompt\": \"c\", \"completion\": {}}\n", S,
            ":1: key \"completion\" must be a string, not an object (legal forms: " SFT ")");
    refused("{\"messages\": \"x\"}\n", S,
            ":1: key \"messages\" must be an array, not a string (legal forms: " CHAT ")");
    refused("{\"messages\": [7]}\n", S,
            ":1: key \"messages[0]\" must be an object, not a number (legal forms: " CHAT ")");
    refused("{\"messages\": [{\"role\": \"user\", \"content\": \"c\"}, {\"content\": \"c\"}]}\n", S,
            ":1: key \"messages[1].role\" is missing (legal forms: " CHAT ")");
    refused("{\"messages\": [{\"role\": \"user\", \"content\": 1.5}]}\n", S,
            ":1: key \"messages[0].content\" must be a string, not a number (legal forms: " CHAT ")");
    refused("{\"messages\": [{\"role\": \"robot\", \"content\": \"\"}]}\n", S,
            ":1: messages[0].role: \"robot\" is no role (legal: system, user, assistant, tool)");
    refused("{\"messages\": []}\n", S, ":1: none of the 0 messages is the assistant's, so nothing would be trained");
    refused("{\"question\": \"p\", \"answer\": \"a\"}\n", S,
            ":1: the row has none of the keys \"chosen\", \"completion\", \"messages\"; its first key is "
            "\"question\"" LEGAL4);
    refused("{}\n", S, ":1: the row has none of the keys \"chosen\", \"completion\", \"messages\"; it is empty" LEGAL4);
    refused("{\"prompt\": \"p\", \"completion\": \"c\", \"chosen\": \"c\"}\n", S,
            ":1: the row has keys of more than one form" LEGAL4);
    /* kinds and forms */
    refused(GOOD, S, ":1: SFT rows are wanted here, but this is a row of " PREFS " (legal forms: " SFT "; " CHAT ")");
    refused("{\"prompt\": \"p\", \"completion\": \"c\"}\n", P,
            ":1: preference rows are wanted here, but this is a row of " SFT " (legal forms: " PREFS "; " PAIR ")");
    refused("\n" GOOD "{\"chosen\": \"c\", \"rejected\": \"r\"}\n", P,
            ":3: a row of " PAIR ", but the rows from line 2 on are " PREFS ": one form a file");
    /* no JSON at all */
    refused("", P, ": the file has no rows");
    refused("\xef\xbb\xbf\r\n \n", P, ": the file has no rows");
    refused(GOOD "[1]\n", P, ":2: a line must be a JSON object, not an array");
    refused("7\n", P, ":1: a line must be a JSON object, not a number");
    refused(GOOD GOOD "{\"prompt\": \"p\", \n", P, ":3: not a JSON object (column *");
    refused(GOOD "{\"prompt\": \"p\", \"chosen\": \"\xff\", \"rejected\": \"r\"}\n", P,
            ":2: not a JSON object (column *");
    refused("{\"prompt\": \"p\", \"prompt\": \"q\", \"completion\": \"r\"}\n", S, ":1: not a JSON object (column *");
    refused("{\"prompt\": \"p\", \"completion\": \"r\"} 7\n", S, ":1: not a JSON object (column *");
    refused_bytes("{\"prompt\": \"\0\", \"completion\": \"r\"}\n", 35, S, 100, ":1: not a JSON object (column *");
    refused_bytes(GOOD, strlen(GOOD), P, 1, ": max_length is 1, but a sequence has at least 2 tokens");
}

static void test_labelled(void **state)
{
    (void)state;
    /* Rows 0 and 4 stand in one run of equal prompts: the first comes after the last. */
    struct dataset *d = open_text(LABEL("ab", "c", "true") LABEL("x", "yz", "false") LABEL("x", "w", "true")
                                      LABEL("ab", "dd", "false") LABEL("ab", "e", "true"),
                                  DATASET_LABELLED, 100);
    assert_int_equal(d->kind, DATASET_LABELLED);
    assert_int_equal(d->sequences, 2);
    assert_int_equal(d->rows, 5);
    const uint8_t labels[] = { 1, 0, 1, 0, 1 };
    assert_memory_equal(d->desirable, labels, sizeof labels);
    expect_sequence(d, 0, "<abc>", "00011");
    expect_sequence(d, 2, "<xyz>", "00111");
    expect_sequence(d, 4, "<xw>", "0011");
    expect_sequence(d, 6, "<abdd>", "000111");
    expect_sequence(d, 8, "<abe>", "00011");
    expect_sequence(d, 1, "<abyz>", "000111");
    expect_sequence(d, 3, "<xdd>", "00111");
    expect_sequence(d, 5, "<xdd>", "00111");
    expect_sequence(d, 7, "<abyz>", "000111");
    expect_sequence(d, 9, "<abyz>", "000111");
    assert_true(d->group[0] == d->group[3] && d->group[0] == d->group[4] && d->group[1] == d->group[2]);
    assert_true(d->hash[3] != d->hash[4] && d->group[0] != d->group[1]);
    dataset_close(d);
    /* the hash sees the mismatched sequence, which another row brings */
    struct dataset *a = open_text(LABEL("p", "q", "true") LABEL("r", "s", "true"), DATASET_LABELLED, 100);
    struct dataset *b = open_text(LABEL("p", "q", "true") LABEL("r", "t", "true"), DATASET_LABELLED, 100);
    assert_true(a->hash[0] != b->hash[0]);
    dataset_close(a);
    dataset_close(b);
}

/* Every prompt different, so that the completion is the next row's, at every length; long ones are cut. */
static void test_labelled_cut(void **state)
{
    (void)state;
    char text[4096] = "";
    for (int i = 0; i < 9; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), LABEL("%.*s", "%.*s", "%s"), i + 1, "pppppppppp",
                 9 - i, "cccccccccc", i % 2 ? "true" : "false");
    for (uint32_t most = 12; most < 22; most++) {
        struct dataset *d = open_text(text, DATASET_LABELLED, most);
        assert_int_equal(d->rows, 9);
        uint32_t longest = 0;
        for (uint64_t i = 0; i < 9; i++) {
            uint32_t prompt = 2 + (uint32_t)i, own = 10 - (uint32_t)i, other = 10 - (uint32_t)((i + 1) % 9);
            own = prompt + own < most ? own : most - prompt; /* of 12 tokens each: the first cut has no effect */
            const struct sequence *s = &d->seq[2 * i];
            assert_int_equal(s[0].length, prompt + own);
            assert_int_equal(s[1].length, prompt + other < most ? prompt + other : most);
            assert_int_equal(s[1].scored, s[1].length - prompt);
            assert_int_equal(s[0].scored, own);
            for (uint32_t k = 0; k < s[1].length; k++)
                assert_int_equal(d->score[s[1].begin + k], k >= prompt);
            for (int side = 0; side < 2; side++)
                longest = s[side].length > longest ? s[side].length : longest;
        }
        assert_int_equal(d->longest, longest);
        dataset_close(d);
    }
    /* dropped: its prompt leaves no room; then no row's mismatched completion is its */
    struct dataset *d =
        open_text(LABEL("a", "b", "true") LABEL("ccccc", "d", "true") LABEL("e", "f", "false"), DATASET_LABELLED, 6);
    assert_true(d->rows == 2 && d->dropped == 1 && d->desirable[0] == 1 && d->desirable[1] == 0);
    expect_sequence(d, 1, "<af>", "0011");
    expect_sequence(d, 3, "<eb>", "0011");
    dataset_close(d);
}

static void test_labelled_complaints(void **state)
{
    (void)state;
    const enum dataset_kind L = DATASET_LABELLED;
    refused(LABEL("p", "c", "true") LABEL("q", "c", "1"), L,
            ":2: key \"label\" must be true (desirable) or false (undesirable), not a number (legal forms: " LABELLED
            ")");
    refused(LABEL("p", "c", "\"true\""), L,
            ":1: key \"label\" must be true (desirable) or false (undesirable), not a "
            "string (legal forms: " LABELLED ")");
    refused(LABEL("p", "c", "null"), L, ":1: key \"label\" must be true (desirable) or false (undesirable), not null*");
    refused(LABEL("p", "", "true"), L, ":1: key \"completion\" must not be empty (legal forms: " LABELLED ")");
    refused("{\"completion\": \"c\", \"label\": true}\n", L,
            ":1: key \"prompt\" is missing (legal forms: " LABELLED ")");
    refused("{\"prompt\": \"c\", \"label\": true}\n", L, ":1: the row has none of the keys*");
    refused("{\"prompt\": \"p\", \"completion\": [], \"label\": true}\n", L,
            ":1: key \"completion\" must be a string, not an array (legal forms: " LABELLED ")");
    refused("{\"prompt\": \"p\", \"completion\": \"c\"}\n", L,
            ":1: labelled rows are wanted here, but this is a row of " SFT " (legal forms: " LABELLED ")");
    refused(LABEL("p", "c", "true"), DATASET_SFT,
            ":1: SFT rows are wanted here, but this is a row of " LABELLED " (legal forms: " SFT "; " CHAT ")");
    refused(LABEL("p", "c", "true") LABEL("p", "d", "false"), L, ": all 2 rows have the same prompt: labelled rows*");
    refused(LABEL("p", "c", "true"), L, ": all 1 rows have the same prompt: labelled rows*");
}

static void test_paths(void **state)
{
    (void)state;
    struct dataset *d = NULL;
    status *st = dataset_open("no/such/file.jsonl", DATASET_SFT, 100, &d);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    assert_non_null(strstr(status_message(st), "no/such/file.jsonl"));
    status_free(st);
    st = dataset_open(".", DATASET_SFT, 100, &d); /* a folder opens, but cannot be read */
    assert_int_equal(status_code(st), ST_IO);
    status_free(st);
    assert_null(d);
    dataset_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizer),
        cmocka_unit_test(test_prefs),
        cmocka_unit_test(test_implicit),
        cmocka_unit_test(test_sft),
        cmocka_unit_test(test_cut),
        cmocka_unit_test(test_drops),
        cmocka_unit_test(test_hashes),
        cmocka_unit_test(test_lines),
        cmocka_unit_test(test_long_lines),
        cmocka_unit_test(test_many_rows),
        cmocka_unit_test(test_complaints),
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_labelled),
        cmocka_unit_test(test_labelled_cut),
        cmocka_unit_test(test_labelled_complaints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
