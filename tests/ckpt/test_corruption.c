/* A thousand seeded corruptions, truncations, extensions and deletions of what a root holds: the newest step's shards
 * and metadata.pb, LATEST, and the lease. Verify tells each that concerns the step; a load sees each that touches bytes
 * it wants, names step, file, tensor and offset, and falls back to the older step, whose tensors are bitwise right.
 *
 * Where a change must be seen is worked out here from the metadata and the place of the change alone. */
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

enum { CASES = 1000, OBJECTS = 64, TEXT = 8192, OLD = 4, NEW = 9 };

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

static status *save_job(struct comm *world, void *arg)
{
    struct tessera_options o = TESSERA_OPTIONS;
    tessera *t;
    struct fake f;
    uint64_t committed;
    TRY(ckpt_open(&o, world, NULL, arg, &t));
    TRY(fake_open(&saved, world->rank, &f));
    for (uint64_t step = OLD; step <= NEW; step += NEW - OLD) {
        fake_fill(&f, step);
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
    size_t begin, end; /* bytes that differ, or from where the object ends otherwise */
};

static uint64_t draw(uint64_t seed, uint64_t i, uint64_t n)
{
    return rng_below((struct rng_at){ seed, 5, 5, 5 }, i, n);
}

/* Change bytes of a copy; false if that changes nothing. */
static bool change_bytes(struct change *c, unsigned char *b, uint64_t seed)
{
    size_t n = c->object->n, at = (size_t)draw(seed, 2, n), len = 1 + (size_t)draw(seed, 3, draw(seed, 4, 2) ? 16 : n);
    len = c->how == FLIP ? 1 : len < n - at ? len : n - at;
    for (size_t i = at; i < at + len; i++) {
        uint32_t other = c->how == FLIP ? b[i] ^ 1u << draw(seed, 5, 8) : rng_u32((struct rng_at){ seed, 6, 6, 6 }, i);
        b[i] = c->how == ZERO ? 0 : (unsigned char)other;
    }
    c->begin = n;
    c->end = 0;
    for (size_t i = at; i < at + len; i++)
        if (b[i] != c->object->bytes[i]) {
            c->begin = i < c->begin ? i : c->begin;
            c->end = i + 1;
        }
    return c->begin < c->end;
}

/* Do it to the store; false: the draw changed nothing. */
static bool do_change(struct world *w, struct change *c, uint64_t seed)
{
    size_t n = c->object->n, extra = 1 + (size_t)draw(seed, 6, 5000);
    unsigned char *b = mem_calloc(1, n + extra);
    assert_non_null(b);
    memcpy(b, c->object->bytes, n);
    bool changed = true;
    if (c->how <= ZERO) {
        changed = n && change_bytes(c, b, seed);
    } else {
        c->begin = c->how == CUT ? (size_t)draw(seed, 2, n) : c->how == EXTEND ? n : 0;
        c->end = c->how == EXTEND ? n + extra : n;
        n = c->how == CUT ? c->begin : n + extra;
        if (draw(seed, 7, 2)) /* an extension of zeros, or of anything */
            for (size_t i = c->object->n; i < c->object->n + extra; i++)
                b[i] = (unsigned char)rng_u32((struct rng_at){ seed, 7, 7, 7 }, i);
    }
    if (changed && c->how == DELETE)
        assert_ok(store_remove(w->s, c->object->key));
    else if (changed)
        assert_ok(store_put(w->s, c->object->key, b, n, STORE_REPLACE));
    mem_free(b);
    return changed;
}

/* ---- what must be seen */

static void must_say(const char *text, const char *what, const struct change *c)
{
    if (strstr(text, what))
        return;
    print_error("%s, change %d of bytes %zu to %zu: \"%s\" is not in: %s\n", c->object->key, (int)c->how, c->begin,
                c->end, what, text);
    fail();
}

/* The first checksum block that the change touches, in file order: its tensor and offset. False: only header or
 * padding.
 */
static bool first_block(const struct world *w, uint32_t file, const struct change *c, const struct meta_tensor **tensor,
                        uint64_t *offset)
{
    bool found = false;
    for (uint64_t t = 0; t < w->m->tensor_count; t++)
        for (uint64_t k = 0; k < w->m->tensor[t].piece_count; k++) {
            const struct meta_piece *p = &w->m->piece[w->m->tensor[t].first_piece + k];
            for (uint64_t b = 0; p->file == file && b < meta_blocks(p->bytes); b++) {
                uint64_t begin = p->offset + b * META_BLOCK_BYTES, end = p->offset + p->bytes;
                end = end < begin + META_BLOCK_BYTES ? end : begin + META_BLOCK_BYTES;
                if (c->begin < end && begin < c->end && (!found || begin < *offset)) {
                    *tensor = &w->m->tensor[t];
                    *offset = begin;
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

static void name_payload(const struct change *c, const struct meta_tensor *t, uint64_t offset, const char *text)
{
    char want[600];
    snprintf(want, sizeof want, "%s/%s", t->part, t->name);
    must_say(text, want, c);
    snprintf(want, sizeof want, "offset %llu", (unsigned long long)offset);
    must_say(text, want, c);
}

/* Of the step: verify and load against each other and against the place. Returns whether the load fell back. */
static bool check_step(const struct world *w, const struct change *c, const struct text *lines, const struct load *l)
{
    const struct meta_tensor *tensor = NULL;
    uint64_t offset = 0;
    const char *name = strchr(c->object->key, '/') + 1;
    int64_t file = file_of(w, name);
    bool length = c->how == CUT || c->how == EXTEND || c->how == DELETE;
    bool payload = file >= 0 && c->how != DELETE && first_block(w, (uint32_t)file, c, &tensor, &offset);
    must_say(lines->text, "step 9", c);
    must_say(lines->text, name, c);
    if (payload)
        name_payload(c, tensor, offset, lines->text);
    bool back = file < 0 || length || payload;
    assert_int_equal(l->step, back ? OLD : NEW); /* a header's or padding's bytes are not wanted by a load */
    if (!back) {
        assert_string_equal(l->warned.text, "");
        return false;
    }
    must_say(l->warned.text, "step 9", c);
    must_say(l->warned.text, name, c);
    if (payload && !length)
        must_say(l->warned.text, "offset", c);
    return true;
}

/* Some damaged block of the file is named by the load, too; which one it meets first depends on its ranks. */
static void check_named_block(const struct world *w, const struct change *c, const struct load *l)
{
    int64_t file = file_of(w, strchr(c->object->key, '/') + 1);
    for (uint64_t t = 0; t < w->m->tensor_count; t++)
        for (uint64_t k = 0; k < w->m->tensor[t].piece_count; k++) {
            const struct meta_piece *p = &w->m->piece[w->m->tensor[t].first_piece + k];
            char tensor[600], offset[40];
            snprintf(tensor, sizeof tensor, "%s/%s", w->m->tensor[t].part, w->m->tensor[t].name);
            for (uint64_t b = 0; p->file == file && b < meta_blocks(p->bytes); b++) {
                uint64_t begin = p->offset + b * META_BLOCK_BYTES, end = p->offset + p->bytes;
                end = end < begin + META_BLOCK_BYTES ? end : begin + META_BLOCK_BYTES;
                snprintf(offset, sizeof offset, "offset %llu", (unsigned long long)begin);
                if (c->begin < end && begin < c->end && strstr(l->warned.text, tensor) &&
                    strstr(l->warned.text, offset))
                    return;
            }
        }
    must_say(l->warned.text, "<tensor and offset of a damaged block>", c);
}

struct tally {
    size_t step, fell_back, elsewhere, payload;
};

static void one_case(struct world *w, uint64_t seed, struct tally *tally)
{
    struct change c = { .how = (enum how)draw(seed, 0, HOWS), .object = &w->object[draw(seed, 1, w->count)] };
    if (!do_change(w, &c, seed))
        return;
    struct text lines = { "" };
    struct verify_result r = { 0 };
    struct load l = { .s = w->s };
    status *st = commit_verify(w->s, NEW, collect, &lines, &r);
    assert_ok(comm_threads_run(1 + (int)draw(seed, 8, 3), load_job, &l));
    if (strncmp(c.object->key, "step-", 5) != 0) { /* hints and leases say nothing about a step */
        assert_ok(st);
        assert_int_equal(r.damages, 0);
        assert_int_equal(l.step, NEW);
        tally->elsewhere++;
    } else if (c.how == DELETE && strstr(c.object->key, "metadata.pb")) {
        assert_int_equal(status_code(st), ST_NOT_FOUND); /* no step any more: nothing to warn of */
        status_free(st);
        assert_int_equal(l.step, OLD);
        tally->step++;
    } else {
        assert_ok(st);
        if (!r.damages)
            must_say("nothing", "a damage", &c);
        bool back = check_step(w, &c, &lines, &l);
        tally->step++;
        tally->fell_back += back;
        if (back && c.how <= ZERO && !strstr(c.object->key, "metadata.pb")) {
            check_named_block(w, &c, &l);
            tally->payload++;
        }
    }
    assert_ok(store_put(w->s, c.object->key, c.object->bytes, c.object->n, STORE_REPLACE));
}

static void test_thousand(void **state)
{
    (void)state;
    struct root r = root_open(false);
    struct world w = { .s = r.store };
    struct tally tally = { 0 };
    struct verify_result clean;
    assert_ok(comm_threads_run(saved.size, save_job, r.store));
    assert_ok(commit_read(r.store, NEW, &w.m));
    assert_ok(commit_verify(r.store, NEW, NULL, NULL, &clean));
    assert_int_equal(clean.damages, 0);
    take(&w, "");
    take(&w, "LEASE");
    take(&w, "step-000000000009");
    assert_true(w.count >= 6);
    uint64_t seed = 1;
    for (; tally.step < CASES; seed++)
        one_case(&w, seed, &tally);
    print_message("%zu changes of the step seen, %zu passed over by a load, %zu of payload named; %zu elsewhere\n",
                  tally.step, tally.fell_back, tally.payload, tally.elsewhere);
    assert_true(tally.fell_back > CASES / 2 && tally.payload > 50 && tally.elsewhere > 50 && seed < 3 * CASES);
    for (size_t i = 0; i < w.count; i++)
        mem_free(w.object[i].bytes);
    metadata_free(w.m);
    root_close(&r);
}

/* The few bytes before metadata.pb's body decide how it is read: each of their bits. */
static void test_metadata_header(void **state)
{
    (void)state;
    struct root r = root_open(false);
    char key[STORE_KEY_BYTES];
    void *bytes;
    size_t n;
    assert_ok(comm_threads_run(saved.size, save_job, r.store));
    assert_ok(commit_file_key(NEW, "metadata.pb", key));
    assert_ok(store_get_all(r.store, key, 1 << 20, &bytes, &n));
    for (int bit = 0; bit < 24 * 8; bit++) {
        unsigned char *b = (unsigned char *)bytes + bit / 8;
        struct load l = { .s = r.store };
        struct verify_result v = { 0 };
        *b ^= (unsigned char)(1 << bit % 8);
        assert_ok(store_put(r.store, key, bytes, n, STORE_REPLACE));
        assert_ok(commit_verify(r.store, NEW, NULL, NULL, &v));
        assert_int_equal(v.damages, 1);
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
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_thousand), cmocka_unit_test(test_metadata_header) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
