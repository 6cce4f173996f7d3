/* Damage to what a root holds: the newest step's shards and metadata.pb, LATEST, and the lease. Verify tells all that
 * concerns the step; a load sees all that touches bytes it wants, names step, file, tensor and offset, and falls back
 * to the older step, whose tensors are bitwise right. Three attackers:
 *
 *   test_thousand  a thousand seeded corruptions, truncations, extensions and deletions
 *   test_regions   the bytes on both sides of every border that the format has, turned over or made the end of the file
 *   test_swaps     whole files for others: of another rank, part, step, of a save of other values, zeros, a folder
 *
 * Where a change must be seen is worked out here from the metadata and the changed bytes alone. */
#include "ckpt/commit.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#if defined(__SANITIZE_THREAD__) /* the sanitizers look for wrong code, not for blind spots */
enum { CASES = 40, FEW = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { CASES = 150, FEW = 0 };
#else
enum { CASES = 1000, FEW = 0 };
#endif
enum { OBJECTS = 64, BORDERS = 1024, TEXT = 8192, OLD = 4, NEW = 9 };

struct text {
    char text[TEXT];
};

static void collect(void *arg, const char *line)
{
    struct text *t = arg;
    size_t n = strlen(t->text);
    snprintf(t->text + n, sizeof t->text - n, "%s\n", line);
}

/* ---- the root */

static const struct fake_cut saved = { 3, 1, true, false, 16 };

struct save {
    struct store *s;
    uint64_t version; /* the values of a step are those of version + step */
};

static status *save_job(struct comm *world, void *arg)
{
    const struct save *v = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    tessera *t;
    struct fake f;
    uint64_t committed;
    TRY(ckpt_open(&o, world, NULL, v->s, &t));
    TRY(fake_open(&saved, world->rank, &f));
    for (uint64_t step = OLD; step <= NEW; step += NEW - OLD) {
        fake_fill(&f, v->version + step);
        TRY(tessera_save(t, f.state, step));
        TRY(tessera_wait(t, &committed));
        EXPECT(committed == step);
    }
    fake_close(&f);
    return tessera_close(t);
}

struct load {
    struct store *s;
    struct text warned;
    uint64_t step;
};

/* Whichever step it is, its tensors are right. */
static status *load_job(struct comm *world, void *arg)
{
    struct load *l = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct fake_cut cut = { world->size, 1, true, world->size == 2, saved.shrink };
    tessera *t;
    struct fake f;
    uint64_t step = 0;
    o.read_only = 1;
    o.warn = collect;
    o.warn_arg = &l->warned;
    TRY(ckpt_open(&o, world, NULL, l->s, &t));
    TRY(fake_open(&cut, world->rank, &f));
    fake_spoil(&f);
    status *st = tessera_load_newest(t, f.state, &step);
    if (!st)
        st = fake_check(&f, step);
    if (world->rank == 0)
        l->step = step;
    fake_close(&f);
    return status_first(st, tessera_close(t));
}

/* ---- the damage */

enum how { FLIP, OVERWRITE, ZERO, CUT, EXTEND, DELETE, HOWS };

struct object {
    char key[STORE_KEY_BYTES];
    unsigned char *bytes;
    size_t n;
};

struct world {
    struct root root;
    struct store *s;
    struct metadata *m; /* of NEW, as it was saved */
    struct object object[OBJECTS];
    size_t count;
};

/* Every object of `dir` (a directory, or "" for the objects of the root itself). */
static void take(struct world *w, const char *dir)
{
    struct store_list l;
    assert_ok(store_list(w->s, dir, &l));
    for (size_t i = 0; i < l.count; i++) {
        struct object *o = &w->object[w->count];
        void *bytes;
        if (l.entry[i].info.is_dir)
            continue;
        assert_true(++w->count < OBJECTS);
        assert_true((size_t)snprintf(o->key, sizeof o->key, "%s%s%s", dir, *dir ? "/" : "", l.entry[i].name) <
                    sizeof o->key);
        assert_ok(store_get_all(w->s, o->key, 1 << 28, &bytes, &o->n));
        o->bytes = bytes;
    }
    store_list_free(&l);
}

struct change {
    enum how how;
    const struct object *object;
    const unsigned char *bytes; /* [n]: what it is now */
    size_t n;
};

static uint64_t draw(uint64_t seed, uint64_t i, uint64_t n)
{
    return rng_below((struct rng_at){ seed, 5, 5, 5 }, i, n);
}

/* Change bytes of a copy. */
static void change_bytes(const struct change *c, unsigned char *b, uint64_t seed)
{
    size_t n = c->object->n, at = (size_t)draw(seed, 2, n), len = 1 + (size_t)draw(seed, 3, draw(seed, 4, 2) ? 16 : n);
    len = c->how == FLIP ? 1 : len < n - at ? len : n - at;
    for (size_t i = at; i < at + len; i++) {
        uint32_t other = c->how == FLIP ? b[i] ^ 1u << draw(seed, 5, 8) : rng_u32((struct rng_at){ seed, 6, 6, 6 }, i);
        b[i] = c->how == ZERO ? 0 : (unsigned char)other;
    }
}

static bool changes(const struct change *c)
{
    return c->how == DELETE || c->n != c->object->n || memcmp(c->bytes, c->object->bytes, c->n) != 0;
}

static void do_change(struct world *w, const struct change *c)
{
    if (c->how == DELETE)
        assert_ok(store_remove(w->s, c->object->key));
    else
        assert_ok(store_put(w->s, c->object->key, c->bytes, c->n, STORE_REPLACE));
}

static void undo(struct world *w, const struct object *o)
{
    assert_ok(store_put(w->s, o->key, o->bytes, o->n, STORE_REPLACE));
}

/* ---- what must be seen */

static void must_say(const char *text, const char *what, const struct change *c)
{
    if (strstr(text, what))
        return;
    print_error("%s, change %d of %zu bytes to %zu: \"%s\" is not in: %s\n", c->object->key, (int)c->how, c->object->n,
                c->n, what, text);
    fail();
}

struct block {
    const struct meta_tensor *tensor;
    uint64_t begin;
};

/* The checksum blocks of a file whose bytes are not what they were, in file order from *from on; the next one, or
 * false. */
static bool next_block(const struct world *w, int64_t file, const struct change *c, uint64_t from, struct block *out)
{
    bool found = false;
    for (uint64_t t = 0; t < w->m->tensor_count; t++)
        for (uint64_t k = 0; k < w->m->tensor[t].piece_count; k++) {
            const struct meta_piece *p = &w->m->piece[w->m->tensor[t].first_piece + k];
            for (uint64_t b = 0; p->file == file && b < meta_blocks(p->bytes); b++) {
                uint64_t begin = p->offset + b * META_BLOCK_BYTES, end = p->offset + p->bytes;
                end = end < begin + META_BLOCK_BYTES ? end : begin + META_BLOCK_BYTES;
                if (begin < from || (found && begin >= out->begin))
                    continue;
                if (end > c->n || memcmp(c->bytes + begin, c->object->bytes + begin, end - begin) != 0) {
                    *out = (struct block){ &w->m->tensor[t], begin };
                    found = true;
                }
            }
        }
    return found;
}

/* The file's number in the metadata, or -1. */
static int64_t file_of(const struct world *w, const char *name)
{
    for (uint64_t i = 0; i < w->m->file_count; i++)
        if (!strcmp(w->m->file[i].name, name))
            return (int64_t)i;
    return -1;
}

static bool names_block(const struct block *b, const char *text)
{
    char tensor[600], offset[40];
    snprintf(tensor, sizeof tensor, "%s/%s", b->tensor->part, b->tensor->name);
    snprintf(offset, sizeof offset, "offset %llu", (unsigned long long)b->begin);
    return strstr(text, tensor) && strstr(text, offset);
}

/* Some damaged block of the file is named by the load, too; which one it meets first depends on its ranks. */
static void check_named_block(const struct world *w, const struct change *c, int64_t file, const struct load *l)
{
    struct block b;
    for (uint64_t from = 0; next_block(w, file, c, from, &b); from = b.begin + 1)
        if (names_block(&b, l->warned.text))
            return;
    must_say(l->warned.text, "<tensor and offset of a damaged block>", c);
}

/* Of the step: verify and load against each other and against the place. Returns whether the load fell back. */
static bool check_step(const struct world *w, const struct change *c, const struct text *lines, const struct load *l)
{
    struct block first;
    const char *name = strchr(c->object->key, '/') + 1;
    int64_t file = file_of(w, name);
    bool length = c->how == DELETE || c->n != c->object->n;
    bool payload = file >= 0 && c->how != DELETE && next_block(w, file, c, 0, &first);
    must_say(lines->text, "step 9", c);
    must_say(lines->text, name, c);
    if (payload && !names_block(&first, lines->text))
        must_say(lines->text, "<tensor and offset of the first damaged block>", c);
    bool back = file < 0 || length || payload;
    assert_int_equal(l->step, back ? OLD : NEW); /* a header's or padding's bytes are not wanted by a load */
    if (!back) {
        assert_string_equal(l->warned.text, "");
        return false;
    }
    must_say(l->warned.text, "step 9", c);
    must_say(l->warned.text, name, c);
    if (payload && !length)
        check_named_block(w, c, file, l);
    return true;
}

struct tally {
    size_t step, fell_back, elsewhere, payload;
};

/* Verify and load while the change is in the store. */
static void judge(struct world *w, const struct change *c, int ranks, struct tally *tally)
{
    struct text lines = { "" };
    struct verify_result r = { 0 };
    struct load l = { .s = w->s };
    status *st = commit_verify(w->s, NEW, collect, &lines, &r);
    assert_ok(comm_threads_run(ranks, load_job, &l));
    if (strncmp(c->object->key, "step-", 5) != 0) { /* hints and leases say nothing about a step */
        assert_ok(st);
        assert_int_equal(r.damages, 0);
        assert_int_equal(l.step, NEW);
        tally->elsewhere++;
        return;
    }
    tally->step++;
    if (c->how == DELETE && strstr(c->object->key, "metadata.pb")) {
        assert_int_equal(status_code(st), ST_NOT_FOUND); /* no step any more: nothing to warn of */
        status_free(st);
        assert_int_equal(l.step, OLD);
        return;
    }
    assert_ok(st);
    if (!r.damages)
        must_say("nothing", "a damage", c);
    bool back = check_step(w, c, &lines, &l);
    tally->fell_back += back;
    tally->payload += back && c->n == c->object->n && !strstr(c->object->key, "metadata.pb");
}

/* Damage, judgement, and all as before. */
static void one_change(struct world *w, const struct change *c, int ranks, struct tally *tally)
{
    do_change(w, c);
    judge(w, c, ranks, tally);
    undo(w, c->object);
}

static void drawn_change(struct world *w, uint64_t seed, struct tally *tally)
{
    struct change c = { .how = (enum how)draw(seed, 0, HOWS), .object = &w->object[draw(seed, 1, w->count)] };
    size_t n = c.object->n, extra = 1 + (size_t)draw(seed, 6, 5000);
    unsigned char *b = mem_calloc(1, n + extra);
    assert_non_null(b);
    memcpy(b, c.object->bytes, n);
    if (c.how <= ZERO && n)
        change_bytes(&c, b, seed);
    if (draw(seed, 7, 2)) /* an extension of zeros, or of anything */
        for (size_t i = n; i < n + extra; i++)
            b[i] = (unsigned char)rng_u32((struct rng_at){ seed, 7, 7, 7 }, i);
    c.bytes = b;
    c.n = c.how <= ZERO ? n : c.how == CUT ? (size_t)draw(seed, 2, n) : c.how == EXTEND ? n + extra : 0;
    if (changes(&c))
        one_change(w, &c, 1 + (int)draw(seed, 8, 3), tally);
    mem_free(b);
}

/* OLD and NEW, saved; the objects of NEW and those beside the steps. */
static void world_open(struct world *w, uint64_t version)
{
    struct verify_result clean;
    *w = (struct world){ .root = root_open(false) };
    w->s = w->root.store;
    struct save v = { w->s, version };
    assert_ok(comm_threads_run(saved.size, save_job, &v));
    assert_ok(commit_read(w->s, NEW, &w->m));
    assert_ok(commit_verify(w->s, NEW, NULL, NULL, &clean));
    assert_int_equal(clean.damages, 0);
    take(w, "");
    take(w, "LEASE");
    take(w, "step-000000000009");
    assert_true(w->count >= 6);
}

static void world_close(struct world *w)
{
    for (size_t i = 0; i < w->count; i++)
        mem_free(w->object[i].bytes);
    metadata_free(w->m);
    root_close(&w->root);
}

static void test_thousand(void **state)
{
    (void)state;
    struct world w;
    struct tally tally = { 0 };
    uint64_t seed = 1;
    world_open(&w, 0);
    for (; tally.step < CASES; seed++)
        drawn_change(&w, seed, &tally);
    print_message("%zu changes of the step seen, %zu passed over by a load, %zu of payload named; %zu elsewhere\n",
                  tally.step, tally.fell_back, tally.payload, tally.elsewhere);
    assert_true(tally.fell_back > CASES / 2 && tally.payload > CASES / 20 && tally.elsewhere > CASES / 20 &&
                seed < 3 * CASES);
    world_close(&w);
}

/* ---- borders */

static int by_size(const void *a, const void *b)
{
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return x < y ? -1 : x > y;
}

/* Where something begins or ends in an object of the step, ascending, each once. */
static size_t borders_of(const struct world *w, const struct object *o, size_t border[BORDERS])
{
    static const size_t of_metadata[] = { 8, 12, 20, 24 }; /* magic, version, length, checksum, body */
    int64_t file = file_of(w, strchr(o->key, '/') + 1);
    size_t count = 0, kept = 0;
    border[count++] = 0;
    border[count++] = o->n;
    for (size_t i = 0; file < 0 && i < sizeof of_metadata / sizeof *of_metadata; i++)
        border[count++] = of_metadata[i];
    if (file >= 0)
        border[count++] = (size_t)w->m->file[file].header_bytes;
    for (uint64_t i = 0; i < w->m->piece_count; i++) {
        const struct meta_piece *p = &w->m->piece[i];
        assert_true(count + meta_blocks(p->bytes) + 1 < BORDERS);
        for (uint64_t b = 0; p->file == file && b < meta_blocks(p->bytes); b++)
            border[count++] = (size_t)(p->offset + b * META_BLOCK_BYTES);
        if (p->file == file && p->bytes)
            border[count++] = (size_t)(p->offset + p->bytes);
    }
    qsort(border, count, sizeof *border, by_size);
    for (size_t i = 0; i < count; i++)
        if (!kept || border[kept - 1] != border[i])
            border[kept++] = border[i];
    return kept;
}

static void change_at(struct world *w, const struct object *o, unsigned char *b, size_t at, struct tally *tally)
{
    const int ranks = 1 + (int)(tally->step % 3);
    if (at < o->n) { /* the file ends here */
        const struct change cut = { .how = CUT, .object = o, .bytes = b, .n = at };
        one_change(w, &cut, ranks, tally);
        b[at] ^= (unsigned char)(1 << at % 8);
        const struct change flip = { .how = FLIP, .object = o, .bytes = b, .n = o->n };
        one_change(w, &flip, ranks, tally);
        b[at] ^= (unsigned char)(1 << at % 8);
    }
}

static void test_regions(void **state)
{
    (void)state;
    struct world w;
    struct tally tally = { 0 };
    static size_t border[BORDERS];
    world_open(&w, 0);
    for (size_t i = 0; i < w.count; i++) {
        const struct object *o = &w.object[i];
        if (strncmp(o->key, "step-", 5) != 0)
            continue;
        unsigned char *b = mem_alloc(o->n);
        assert_non_null(b);
        memcpy(b, o->bytes, o->n);
        size_t borders = borders_of(&w, o, border);
        assert_true(borders >= 3);
        for (size_t k = 0; k < borders; k++) {
            change_at(&w, o, b, border[k], &tally);
            if (k && border[k] - 1 != border[k - 1])
                change_at(&w, o, b, border[k] - 1, &tally);
        }
        mem_free(b);
    }
    print_message("%zu changes at borders, %zu passed over by a load, %zu of payload named\n", tally.step,
                  tally.fell_back, tally.payload);
    assert_true(tally.payload > 30 && tally.fell_back > tally.step / 2 && tally.fell_back < tally.step);
    world_close(&w);
}

/* ---- whole files */

static bool is_shard(const struct object *o)
{
    return strstr(o->key, ".h5") != NULL;
}

static void replace(struct world *w, const struct object *o, const unsigned char *bytes, size_t n, struct tally *tally)
{
    const struct change c = { .how = n < o->n   ? CUT
                                     : n > o->n ? EXTEND
                                                : OVERWRITE,
                              .object = o,
                              .bytes = bytes,
                              .n = n };
    assert_true(changes(&c));
    one_change(w, &c, 1 + (int)(tally->step % 3), tally);
}

/* The file of the same name in the older step: it has the same length, and metadata.pb is sound, too. */
static void replace_by_old(struct world *w, const struct object *o, struct tally *tally)
{
    char key[STORE_KEY_BYTES];
    void *bytes;
    size_t n;
    snprintf(key, sizeof key, "step-%012d/%s", OLD, strchr(o->key, '/') + 1);
    assert_ok(store_get_all(w->s, key, 1 << 28, &bytes, &n));
    assert_true(!is_shard(o) || n == o->n);
    replace(w, o, bytes, n, tally);
    mem_free(bytes);
}

static void replace_by_folder(struct world *w, const struct object *o, struct tally *tally)
{
    const struct change gone = { .how = DELETE, .object = o };
    char inside[STORE_KEY_BYTES];
    assert_true((size_t)snprintf(inside, sizeof inside, "%s/x", o->key) < sizeof inside);
    assert_ok(store_remove(w->s, o->key));
    assert_ok(store_put(w->s, inside, "x", 1, STORE_REPLACE));
    judge(w, &gone, 2, tally);
    assert_ok(store_remove_tree(w->s, o->key));
    undo(w, o);
}

static void test_swaps(void **state)
{
    (void)state;
    struct world w;
    struct tally tally = { 0 };
    world_open(&w, 0);
    for (size_t i = 0; i < w.count; i++) {
        const struct object *o = &w.object[i];
        if (strncmp(o->key, "step-", 5) != 0)
            continue;
        unsigned char *zero = mem_calloc(1, o->n);
        assert_non_null(zero);
        replace(&w, o, zero, o->n, &tally);
        mem_free(zero);
        replace_by_old(&w, o, &tally);
        replace_by_folder(&w, o, &tally);
        for (size_t k = 0; k < w.count; k++) /* among them shards of other ranks and parts, and metadata.pb */
            if (k != i)
                replace(&w, o, w.object[k].bytes, w.object[k].n, &tally);
    }
    print_message("%zu whole files replaced\n", tally.step);
    assert_int_equal(tally.fell_back + 1, tally.step); /* but for the step that is none: a folder called metadata.pb */
    world_close(&w);
}

/* Whether the step is as good as new (no damage, loaded) or as bad (damage, and the older one is loaded). */
static void expect_step(struct world *w, bool good)
{
    struct text lines = { "" };
    struct verify_result r;
    assert_ok(commit_verify(w->s, NEW, collect, &lines, &r));
    assert_int_equal(r.damages == 0, good);
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct load l = { .s = w->s };
        assert_ok(comm_threads_run(ranks, load_job, &l));
        assert_int_equal(l.step, good ? NEW : OLD);
        assert_true(good || strstr(l.warned.text, "offset"));
    }
}

/* The names of two attempts' files differ in the attempt alone, and their lists are in one order. */
static void put_as(struct world *w, const struct object *o, const char *key)
{
    assert_ok(store_put(w->s, key, o->bytes, o->n, STORE_REPLACE));
}

/* Another attempt has saved other values as the same step. Its metadata.pb is sound, and so are files that have the
 * names and lengths it tells of; only the contents are not what it says. */
static void test_stale_metadata(void **state)
{
    (void)state;
    struct world w, twin;
    world_open(&w, 0);
    world_open(&twin, 100);
    assert_int_equal(w.count, twin.count);
    for (size_t i = 0; i < w.count; i++) /* the twin's files beside: they are nobody's */
        if (is_shard(&w.object[i]))
            put_as(&w, &twin.object[i], twin.object[i].key);
    expect_step(&w, true);
    for (size_t i = 0; i < w.count; i++) {
        if (!is_shard(&w.object[i]))
            continue;
        assert_string_not_equal(w.object[i].key, twin.object[i].key);
        assert_int_equal(w.object[i].n, twin.object[i].n);
        put_as(&w, &twin.object[i], w.object[i].key); /* one file of the other attempt */
        expect_step(&w, false);
        put_as(&w, &w.object[i], w.object[i].key);
        put_as(&w, &w.object[i], twin.object[i].key);
    }
    expect_step(&w, true);
    for (size_t i = 0; i < w.count; i++)
        if (strstr(w.object[i].key, "/metadata.pb"))
            put_as(&w, &twin.object[i], w.object[i].key);
    expect_step(&w, false);
    world_close(&twin);
    world_close(&w);
}

/* The few bytes before metadata.pb's body decide how it is read: each of their bits. */
static void test_metadata_header(void **state)
{
    (void)state;
    struct root r = root_open(false);
    char key[STORE_KEY_BYTES];
    void *bytes;
    size_t n;
    struct save v = { r.store, 0 };
    assert_ok(comm_threads_run(saved.size, save_job, &v));
    assert_ok(commit_file_key(NEW, "metadata.pb", key));
    assert_ok(store_get_all(r.store, key, 1 << 20, &bytes, &n));
    for (int bit = 0; bit < 24 * 8; bit++) {
        unsigned char *b = (unsigned char *)bytes + bit / 8;
        struct load l = { .s = r.store };
        struct verify_result found = { 0 };
        *b ^= (unsigned char)(1 << bit % 8);
        assert_ok(store_put(r.store, key, bytes, n, STORE_REPLACE));
        assert_ok(commit_verify(r.store, NEW, NULL, NULL, &found));
        assert_int_equal(found.damages, 1);
        assert_ok(comm_threads_run(1, load_job, &l));
        assert_int_equal(l.step, OLD);
        assert_non_null(strstr(l.warned.text, key));
        *b ^= (unsigned char)(1 << bit % 8);
    }
    mem_free(bytes);
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest few[] = { cmocka_unit_test(test_thousand), cmocka_unit_test(test_stale_metadata) };
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_thousand), cmocka_unit_test(test_regions),
                                        cmocka_unit_test(test_swaps), cmocka_unit_test(test_stale_metadata),
                                        cmocka_unit_test(test_metadata_header) };
    return FEW ? cmocka_run_group_tests(few, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
}
