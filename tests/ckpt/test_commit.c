/* commit and verify over every store: what is listed, read, put, kept, retired and discarded; and that no byte of a
 * step can change without verify saying where. Stores that fail at a chosen call are the real ones with one function
 * exchanged. */
#include "ckpt/commit.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/test_root.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

enum { A = 0xaaaa, B = 0xbbbb };

/* ---- Stores, and stores that fail */

struct fixture {
    char dir[64];
    struct store *s;
    const struct store_ops *real;
    struct store_ops ops; /* s->ops: the real ones until a test changes some */
    char removed[4096];   /* what was removed, in order */
};

static void fixture_open(struct fixture *f, const struct store_ops *ops)
{
    char uri[TEST_URI_BYTES];
    folder_make(f->dir);
    store_test_uri(ops, f->dir, uri);
    OK(store_open(uri, true, &f->s));
    f->real = f->s->ops;
    f->ops = *f->real;
    f->s->ops = &f->ops;
}

static void fixture_close(struct fixture *f)
{
    store_close(f->s);
    folder_remove(f->dir);
}

static void each_store(void (*check)(struct fixture *f))
{
    for (size_t i = 0; store_registry[i]; i++) {
        struct fixture f;
        if (!store_is_tested(store_registry[i]))
            continue;
        fixture_open(&f, store_registry[i]);
        check(&f);
        fixture_close(&f);
    }
}

/* The fixture of a handle whose table was exchanged. */
static struct fixture *fixture_of(const struct store *s)
{
    return (struct fixture *)(size_t)((const char *)s->ops - offsetof(struct fixture, ops));
}

static void expect_steps(struct store *s, const char *want)
{
    struct step_list l;
    char have[256] = "";
    OK(commit_list(s, &l));
    for (size_t i = 0; i < l.count; i++) {
        size_t n = strlen(have);
        snprintf(have + n, sizeof have - n, "%s%" PRIu64, i ? " " : "", l.step[i]);
    }
    step_list_free(&l);
    assert_string_equal(have, want);
}

static void expect_names(struct store *s, const char *dir, const char *want)
{
    struct store_list l;
    char have[1024] = "";
    OK(store_list(s, dir, &l));
    for (size_t i = 0; i < l.count; i++) {
        size_t n = strlen(have);
        snprintf(have + n, sizeof have - n, "%s%s", i ? " " : "", l.entry[i].name);
    }
    store_list_free(&l);
    assert_string_equal(have, want);
}

static void *get_all(struct store *s, const char *key, size_t *n)
{
    void *buf = NULL;
    OK(store_get_all(s, key, MAX_METADATA_BYTES, &buf, n));
    return buf;
}

static void flip(struct store *s, const char *key, uint64_t at)
{
    size_t n;
    unsigned char *b = get_all(s, key, &n);
    assert_true(at < n);
    b[at] ^= 0x10;
    OK(store_put(s, key, b, n, STORE_REPLACE));
    mem_free(b);
}

/* Cut to `bytes`, or lengthen with zeros. */
static void resize(struct store *s, const char *key, uint64_t bytes)
{
    size_t n;
    unsigned char *b = get_all(s, key, &n), *to = mem_calloc(1, bytes);
    memcpy(to, b, n < bytes ? n : bytes);
    OK(store_put(s, key, to, bytes, STORE_REPLACE));
    mem_free(b);
    mem_free(to);
}

/* ---- Names */

static void test_names(void **state)
{
    (void)state;
    static const uint64_t steps[] = { 0, 1, 100, 999999999999, 1000000000000, UINT64_MAX };
    char dir[STEP_DIR_BYTES], key[STORE_KEY_BYTES];
    uint64_t step;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        commit_step_dir(steps[i], dir);
        assert_true(commit_parse_dir(dir, &step));
        assert_int_equal(step, steps[i]);
    }
    commit_step_dir(100, dir);
    assert_string_equal(dir, "step-000000000100");
    static const char *const none[] = { "",
                                        "step-",
                                        "step-1",
                                        "step-00000000001",
                                        "step-0000000000100",
                                        "step-000000000100.bad-aa",
                                        "step-000000000100 ",
                                        "LATEST",
                                        "xstep-000000000100",
                                        "step-+00000000001",
                                        "step--00000000001",
                                        "step-18446744073709551616",
                                        "step-0x0000000001" };
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        assert_false(commit_parse_dir(none[i], &step));
    commit_shard_key(100, "policy/model", 3, 0xa1b2c3d4e5f60718, key);
    assert_string_equal(key, "step-000000000100/policy.model-00003.a1b2c3d4e5f60718.h5");
    commit_shard_key(UINT64_MAX, "model", 123456, 1, key);
    assert_string_equal(key, "step-18446744073709551615/model-123456.0000000000000001.h5");
    char part[400], other[STORE_KEY_BYTES];
    memset(part, 'p', sizeof part);
    part[399] = 0;
    commit_shard_key(1, part, 0, A, key);
    OK(store_check_key(key));
    part[398] = 'q';
    commit_shard_key(1, part, 0, A, other);
    OK(store_check_key(other));
    assert_string_not_equal(key, other);
    OK(commit_file_key(1, "metadata.pb", key));
    assert_string_equal(key, "step-000000000001/metadata.pb");
    FAILS(ST_CORRUPT, "", commit_file_key(1, "../x", key));
    FAILS(ST_CORRUPT, "", commit_file_key(1, "..", key));
    FAILS(ST_CORRUPT, "", commit_file_key(1, "", key));
    FAILS(ST_CORRUPT, "", commit_file_key(1, ".tmp-x", key));
}

/* ---- Lists and reads */

static status *list_nothing(struct store *s, const char *dir, struct store_list *out)
{
    (void)s, (void)dir, (void)out;
    return NULL;
}

static void check_list(struct fixture *f)
{
    struct store *s = f->s;
    struct metadata *m;
    expect_steps(s, "");
    FAILS(ST_NOT_FOUND, "step 1", commit_read(s, 1, &m));
    OK(fake_step_commit(s, 10, A));
    OK(fake_step_commit(s, 9, A));
    OK(fake_step_commit(s, 1000000000000, A));
    struct fake_step *x = fake_step_make(11, A, "big");
    OK(fake_step_put_files(s, x)); /* never committed */
    fake_step_free(x);
    OK(store_put(s, "step-000000000012.bad-aa/metadata.pb", "x", 1, STORE_REPLACE));
    OK(store_put(s, "step-13/metadata.pb", "x", 1, STORE_REPLACE));
    OK(store_put(s, "step-000000000014/metadata.pb/dir", "x", 1, STORE_REPLACE));
    OK(store_put(s, "step-000000000015", "a file", 6, STORE_REPLACE));
    expect_steps(s, "9 10 1000000000000");
    FAILS(ST_NOT_FOUND, "", commit_read(s, 11, &m));

    /* a listing that lags: LATEST names one step at least; it may also name one that is gone, or nothing */
    f->ops.list = list_nothing;
    expect_steps(s, "1000000000000");
    OK(store_put(s, "LATEST", "step-000000000011\n", 18, STORE_REPLACE));
    expect_steps(s, "");
    OK(store_put(s, "LATEST", "garbage", 7, STORE_REPLACE));
    expect_steps(s, "");
    f->ops.list = f->real->list;
    OK(store_put(s, "LATEST", "step-000000000009\n", 18, STORE_REPLACE));
    expect_steps(s, "9 10 1000000000000"); /* once */
}

static void check_read(struct fixture *f)
{
    struct store *s = f->s;
    struct metadata *m;
    struct fake_step *x = fake_step_make(7, A, "big");
    char key[STORE_KEY_BYTES];
    OK(fake_step_put_files(s, x));
    OK(commit_put(s, &x->m));
    OK(commit_read(s, 7, &m));
    assert_int_equal(m->step, 7);
    assert_int_equal(m->attempt, A);
    assert_int_equal(m->file_count, FAKE_FILES);
    assert_int_equal(m->tensor_count, FAKE_TENSORS);
    assert_string_equal(m->file[1].name, x->name[1]);
    metadata_free(m);
    for (int i = 0; i < FAKE_FILES; i++) {
        OK(commit_file_key(7, x->name[i], key));
        const uint64_t wrong[] = { 0, x->file[i].bytes - 1, x->file[i].bytes + 1 };
        for (size_t k = 0; k < 3; k++) {
            resize(s, key, wrong[k]);
            FAILS(ST_CORRUPT, x->name[i], commit_read(s, 7, &m));
        }
        OK(store_remove(s, key));
        FAILS(ST_CORRUPT, x->name[i], commit_read(s, 7, &m));
        OK(store_put(s, key, x->data[i], x->file[i].bytes, STORE_REPLACE));
    }
    OK(commit_read(s, 7, &m));
    metadata_free(m);
    size_t n;
    void *meta = get_all(s, "step-000000000007/metadata.pb", &n);
    OK(store_put(s, "step-000000000008/metadata.pb", meta, n, STORE_REPLACE)); /* of another step */
    mem_free(meta);
    FAILS(ST_CORRUPT, "step 7", commit_read(s, 8, &m));
    flip(s, "step-000000000007/metadata.pb", n / 2);
    FAILS(ST_CORRUPT, "step-000000000007/metadata.pb", commit_read(s, 7, &m));
    fake_step_free(x);
}

/* ---- Committing */

static status *put_no_latest(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    if (strcmp(key, "LATEST") == 0)
        return ERR(NO_SPACE, "full");
    return fixture_of(s)->real->put(s, key, buf, n, mode);
}

/* Visible, but the directory's fsync failed. */
static status *put_unsure(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    TRY(fixture_of(s)->real->put(s, key, buf, n, mode));
    return ERR(IO, "fsync");
}

static void check_put(struct fixture *f)
{
    struct store *s = f->s;
    struct metadata *m;
    OK(fake_step_commit(s, 1, A));
    size_t n, k;
    void *first = get_all(s, "step-000000000001/metadata.pb", &n), *again;
    char *latest = get_all(s, "LATEST", &k);
    assert_string_equal(latest, "step-000000000001\n");
    mem_free(latest);
    FAILS(ST_EXISTS, "step 1", fake_step_commit(s, 1, A));
    again = get_all(s, "step-000000000001/metadata.pb", &k);
    assert_int_equal(n, k);
    assert_memory_equal(first, again, n);
    mem_free(again);

    OK(fake_step_commit(s, 1, B)); /* A was a zombie */
    OK(commit_read(s, 1, &m));
    assert_int_equal(m->attempt, B);
    metadata_free(m);
    again = get_all(s, "step-000000000001/metadata.pb.000000000000aaaa", &k);
    assert_int_equal(n, k);
    assert_memory_equal(first, again, n);
    mem_free(again);
    mem_free(first);
    flip(s, "step-000000000001/metadata.pb", 30);
    OK(fake_step_commit(s, 1, B)); /* what was there could not be read */
    OK(commit_read(s, 1, &m));
    metadata_free(m);

    f->ops.put = put_no_latest;
    OK(fake_step_commit(s, 2, A));
    expect_steps(s, "1 2");
    f->ops.put = f->real->put;
    struct fake_step *x = fake_step_make(3, A, "big");
    OK(fake_step_put_files(s, x));
    f->ops.put = put_unsure;
    FAILS(ST_IO, "fsync", commit_put(s, &x->m));
    f->ops.put = f->real->put;
    expect_steps(s, "1 2"); /* what was reported as failed does not count later */
    OK(commit_put(s, &x->m));
    expect_steps(s, "1 2 3");
    fake_step_free(x);
}

/* ---- Removing */

static status *recorded_remove(struct store *s, const char *key)
{
    struct fixture *f = fixture_of(s);
    size_t n = strlen(f->removed);
    snprintf(f->removed + n, sizeof f->removed - n, "-%s\n", key);
    return fixture_of(s)->real->remove(s, key);
}

static status *recorded_remove_tree(struct store *s, const char *dir)
{
    struct fixture *f = fixture_of(s);
    size_t n = strlen(f->removed);
    snprintf(f->removed + n, sizeof f->removed - n, "-%s/*\n", dir);
    return fixture_of(s)->real->remove_tree(s, dir);
}

static void check_retain(struct fixture *f)
{
    struct store *s = f->s;
    for (uint64_t step = 1; step <= 6; step++)
        OK(fake_step_commit(s, step, A));
    f->removed[0] = 0;
    f->ops.remove = recorded_remove;
    f->ops.remove_tree = recorded_remove_tree;
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 0 }));
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = -1 }));
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 6 }));
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 100 }));
    OK(commit_retain(s, 7, &(struct keep_rules){ .last = 1 })); /* 7 is not committed: nothing may go */
    assert_string_equal(f->removed, "");
    OK(commit_retain(s, 5, &(struct keep_rules){ .last = 3 })); /* 6 lies above and is not counted */
    expect_steps(s, "3 4 5 6");
    assert_string_equal(f->removed, "-step-000000000002/metadata.pb\n-step-000000000002/*\n"
                                    "-step-000000000001/metadata.pb\n-step-000000000001/*\n");
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 2 }));
    expect_steps(s, "5 6");
    expect_names(s, "step-000000000004", "");
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 1 }));
    expect_steps(s, "6");
    OK(commit_retain(s, 6, &(struct keep_rules){ .last = 1 }));
    expect_steps(s, "6");
    expect_names(s, "", "LATEST step-000000000006");
}

static void check_retire(struct fixture *f)
{
    struct store *s = f->s;
    OK(fake_step_commit(s, 1, A));
    OK(fake_step_commit(s, 2, A));
    OK(commit_retire(s, 1, "bad", B));
    expect_steps(s, "2");
    OK(commit_retire(s, 1, "bad", B)); /* missing is fine */
    OK(fake_step_commit(s, 1, A));
    OK(commit_retire(s, 1, "bad", B)); /* the name is taken */
    OK(commit_retire(s, 2, "retired", B));
    expect_steps(s, "");
    if (f->real->rename_tree)
        expect_names(s, "",
                     "LATEST step-000000000001.bad-000000000000bbbb step-000000000001.bad-000000000000bbbb-2 "
                     "step-000000000002.retired-000000000000bbbb");
    OK(fake_step_commit(s, 1, B)); /* reached again */
    expect_steps(s, "1");
    f->ops.rename_tree = NULL; /* a store that cannot rename */
    OK(commit_retire(s, 1, "bad", B));
    OK(commit_retire(s, 1, "bad", B));
    OK(commit_retire(s, 5, "bad", B));
    expect_steps(s, "");
}

static void check_discard(struct fixture *f)
{
    struct store *s = f->s;
    struct fake_step *a = fake_step_make(4, A, "big"), *b = fake_step_make(4, B, "big");
    OK(fake_step_put_files(s, a));
    OK(fake_step_put_files(s, b));
    struct store_writer *w[2];
    char key[STORE_KEY_BYTES];
    const uint64_t attempt[] = { A, B };
    for (int i = 0; i < 2; i++) {
        commit_shard_key(4, "extra", 1, attempt[i], key);
        OK(store_writer_open(s, key, 10, &w[i]));
    }
    OK(commit_discard(s, 4, A));
    expect_names(s, "step-000000000004", "model-00000.000000000000bbbb.h5 policy.optim-00000.000000000000bbbb.h5");
    OK(store_writer_finish(w[1])); /* B's was spared */
    if (strcmp(f->real->scheme, "s3") == 0) {
        OK(store_writer_finish(w[0])); /* so small that there was no upload to abort: it is gc's */
    } else if (f->real->sweep) {
        FAILS(ST_NOT_FOUND, "", store_writer_finish(w[0]));
    } else {
        store_writer_abort(w[0]);
    }
    OK(commit_put(s, &b->m));
    FAILS(ST_EXISTS, "step 4", commit_discard(s, 4, B)); /* committed: not to be discarded, by mistake neither */
    OK(commit_discard(s, 4, A));
    struct metadata *m;
    OK(commit_read(s, 4, &m));
    metadata_free(m);
    OK(store_remove_tree(s, "step-000000000004"));
    OK(fake_step_put_files(s, a));
    OK(commit_discard(s, 4, A));
    expect_names(s, "", "LATEST"); /* the empty directory has gone */
    OK(commit_discard(s, 4, A));
    fake_step_free(a);
    fake_step_free(b);
}

/* ---- verify */

struct found {
    char text[8192];
};

static void collect(void *arg, const char *line)
{
    struct found *f = arg;
    size_t n = strlen(f->text);
    snprintf(f->text + n, sizeof f->text - n, "%s\n", line);
}

/* Damages that verify finds in step 7; text gets their lines. */
static uint64_t verify(struct store *s, struct found *found)
{
    struct verify_result r = { 0 };
    found->text[0] = 0;
    OK(commit_verify(s, 7, collect, found, &r));
    uint64_t lines = 0;
    for (const char *p = found->text; *p; p++)
        lines += *p == '\n';
    assert_int_equal(lines, r.damages); /* one line a damage */
    return r.damages;
}

/* What verify must name for a change of byte `at` of file i, by looking the places up the slow way; *offset: of the
 * block or byte. */
static const char *owner_of(const struct fake_step *x, uint32_t i, uint64_t at, uint64_t *offset)
{
    *offset = 0;
    if (at < FAKE_HEADER)
        return "header";
    for (uint64_t t = 0; t < x->m.tensor_count; t++)
        for (uint64_t k = 0; k < x->tensor[t].piece_count; k++) {
            const struct meta_piece *p = &x->piece[x->tensor[t].first_piece + k];
            if (p->file == i && at >= p->offset && at < p->offset + p->bytes) {
                *offset = p->offset + (at - p->offset) / META_BLOCK_BYTES * META_BLOCK_BYTES;
                return x->tensor[t].name;
            }
        }
    *offset = at;
    return "padding";
}

static void check_flip(struct store *s, const struct fake_step *x, uint32_t i, uint64_t at)
{
    char key[STORE_KEY_BYTES], place[64];
    struct found found;
    uint64_t offset;
    if (at >= x->file[i].bytes)
        return;
    OK(commit_file_key(7, x->name[i], key));
    flip(s, key, at);
    uint64_t damages = verify(s, &found);
    const char *owner = owner_of(x, i, at, &offset);
    snprintf(place, sizeof place, strcmp(owner, "header") == 0 ? "" : "offset %" PRIu64, offset);
    if (damages != 1 || !strstr(found.text, owner) || !strstr(found.text, x->name[i]) ||
        !strstr(found.text, "step 7") || !strstr(found.text, place))
        fail_msg("byte %" PRIu64 " of %s is of %s %s, and verify says: %s", at, x->name[i], owner, place, found.text);
    flip(s, key, at);
}

static void check_verify_flips(struct fixture *f)
{
    struct fake_step *x = fake_step_make(7, A, "big");
    OK(fake_step_put_files(f->s, x));
    OK(commit_put(f->s, &x->m));
    for (uint32_t i = 0; i < FAKE_FILES; i++) {
        const uint64_t edge[] = { 0, FAKE_HEADER, 4096, x->file[i].bytes, x->file[i].bytes - FAKE_TAIL };
        for (size_t k = 0; k < sizeof edge / sizeof *edge; k++) {
            check_flip(f->s, x, i, edge[k]);
            check_flip(f->s, x, i, edge[k] ? edge[k] - 1 : 1);
        }
    }
    for (uint64_t p = 0; p < x->m.piece_count; p++) /* both sides of each block's edges */
        for (uint64_t at = 0; at <= x->piece[p].bytes + META_BLOCK_BYTES && x->piece[p].bytes; at += META_BLOCK_BYTES) {
            uint64_t edge = x->piece[p].offset + (at < x->piece[p].bytes ? at : x->piece[p].bytes);
            check_flip(f->s, x, x->piece[p].file, edge - 1);
            check_flip(f->s, x, x->piece[p].file, edge);
        }
    struct found found;
    assert_int_equal(verify(f->s, &found), 0);
    fake_step_free(x);
}

static void check_verify_rest(struct fixture *f)
{
    struct store *s = f->s;
    struct verify_result r;
    struct found found;
    FAILS(ST_NOT_FOUND, "step 7", commit_verify(s, 7, collect, &found, &r));
    struct fake_step *x = fake_step_make(7, A, "big");
    OK(fake_step_put_files(s, x));
    OK(commit_put(s, &x->m));
    size_t meta;
    mem_free(get_all(s, "step-000000000007/metadata.pb", &meta));
    OK(commit_verify(s, 7, NULL, NULL, &r));
    assert_int_equal(r.damages, 0);
    assert_int_equal(r.files, FAKE_FILES);
    assert_int_equal(r.tensors, FAKE_TENSORS);
    assert_int_equal(r.bytes, meta + x->file[0].bytes + x->file[1].bytes); /* every byte, once */

    char key[2][STORE_KEY_BYTES];
    OK(commit_file_key(7, x->name[0], key[0]));
    OK(commit_file_key(7, x->name[1], key[1]));
    flip(s, key[0], 5); /* several damages are several lines */
    flip(s, key[0], x->piece[0].offset);
    flip(s, key[0], x->piece[0].offset + META_BLOCK_BYTES);
    flip(s, key[1], FAKE_HEADER);
    assert_int_equal(verify(s, &found), 4);
    OK(fake_step_put_files(s, x));

    const uint64_t keep[] = { 0,
                              1,
                              FAKE_HEADER - 1,
                              FAKE_HEADER,
                              x->piece[0].offset,
                              x->piece[0].offset + META_BLOCK_BYTES + 1,
                              x->file[0].bytes - FAKE_TAIL - 1,
                              x->file[0].bytes - FAKE_TAIL,
                              x->file[0].bytes - 1 };
    for (size_t k = 0; k < sizeof keep / sizeof *keep; k++) {
        resize(s, key[0], keep[k]);
        assert_true(verify(s, &found) >= 1);
        char words[64];
        snprintf(words, sizeof words, "%" PRIu64 " bytes, not %" PRIu64, keep[k], x->file[0].bytes);
        assert_non_null(strstr(found.text, words));
        assert_true(!!strstr(found.text, "tensor model/big") ==
                    (keep[k] < x->piece[1].offset + x->piece[1].bytes)); /* who lost bytes */
        assert_true(!!strstr(found.text, "tensor model/norm") == (keep[k] < x->file[0].bytes - FAKE_TAIL));
        assert_true(!!strstr(found.text, "header") == (keep[k] < FAKE_HEADER));
        OK(fake_step_put_files(s, x));
    }
    resize(s, key[1], x->file[1].bytes + 1); /* extra length, even of zeros */
    assert_int_equal(verify(s, &found), 1);
    OK(store_remove(s, key[1]));
    assert_int_equal(verify(s, &found), 1);
    assert_non_null(strstr(found.text, "missing"));
    OK(fake_step_put_files(s, x));
    for (size_t at = 0; at < meta; at += 1 + meta / 100) { /* metadata.pb covers itself */
        flip(s, "step-000000000007/metadata.pb", at);
        struct verify_result one;
        OK(commit_verify(s, 7, collect, &found, &one));
        assert_int_equal(one.damages, 1);
        flip(s, "step-000000000007/metadata.pb", at);
    }
    resize(s, "step-000000000007/metadata.pb", meta + 1);
    assert_int_equal(verify(s, &found), 1);
    assert_non_null(strstr(found.text, "metadata.pb"));
    resize(s, "step-000000000007/metadata.pb", meta);
    OK(store_put(s, "step-000000000007/orphan.h5", "x", 1, STORE_REPLACE)); /* of a dead attempt: nobody's, no damage */
    assert_int_equal(verify(s, &found), 0);
    fake_step_free(x);
}

static void test_list(void **state)
{
    (void)state;
    each_store(check_list);
}

static void test_read(void **state)
{
    (void)state;
    each_store(check_read);
}

static void test_put(void **state)
{
    (void)state;
    each_store(check_put);
}

static void test_retain(void **state)
{
    (void)state;
    each_store(check_retain);
}

static void test_retire(void **state)
{
    (void)state;
    each_store(check_retire);
}

static void test_discard(void **state)
{
    (void)state;
    each_store(check_discard);
}

static void test_verify(void **state)
{
    (void)state;
    each_store(check_verify_flips);
    each_store(check_verify_rest);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),   cmocka_unit_test(test_list),   cmocka_unit_test(test_read),
        cmocka_unit_test(test_put),     cmocka_unit_test(test_retain), cmocka_unit_test(test_retire),
        cmocka_unit_test(test_discard), cmocka_unit_test(test_verify),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
