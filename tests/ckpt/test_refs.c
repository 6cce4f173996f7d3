/* Tensors stored by reference to another step: what is recorded, that a load at any cut gives the owner's bytes, that
 * damage of the owner is seen and named through the reference, that retention, rm and gc keep owners, wherever they are
 * stopped; and frozen tensors that refer by themselves. */
#include "ckpt/ckpt.h"
#include "ckpt/refs.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/ckpt/ref_state.h"

/* ---- what is recorded, and loads */

static void test_same_root(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        struct root r = root_open(ranks % 2);
        struct tessera_reference one = to(1), two = to(2), renamed = to(3);
        put(ranks, (struct one_save){ r.store, { .whole = ranks == 2 }, 1, 10, 20, 30, 0 });
        put(ranks, (struct one_save){ r.store, { .w = &one, .n = &one }, 2, 0, 0, 31, 0 });
        put(5 - ranks, (struct one_save){ r.store, { .w = &two }, 3, 0, 22, 32, 0 });
        renamed.name = "n";
        put(ranks, (struct one_save){ r.store, { .w = &two, .n = &renamed }, 4, 0, 0, 33, 0 });
        lies_in(r.store, 1, "w", 0, NULL, NULL);
        lies_in(r.store, 2, "w", 1, NULL, "w");
        lies_in(r.store, 2, "n", 1, NULL, "n");
        lies_in(r.store, 2, "t", 0, NULL, NULL);
        lies_in(r.store, 3, "w", 1, NULL, "w"); /* the owner of the bytes, not the step that was named */
        lies_in(r.store, 4, "w", 1, NULL, "w");
        lies_in(r.store, 4, "n", 3, NULL, "n");
        assert_true(bytes_of(r.store, 1) > ROWS * COLS * 4 && bytes_of(r.store, 2) < 40000);
        loads((struct one_save){ r.store, { 0 }, 1, 10, 20, 30, 0 });
        loads((struct one_save){ r.store, { 0 }, 2, 10, 20, 31, 0 });
        loads((struct one_save){ r.store, { 0 }, 3, 10, 22, 32, 0 });
        loads((struct one_save){ r.store, { 0 }, 4, 10, 22, 33, 0 });
        root_close(&r);
    }
}

static void test_other_roots(void **state)
{
    (void)state;
    struct root a = root_open(true), b = root_open(true), c = root_open(true);
    struct tessera_reference at_a = to(7), at_b = to(1), back = to(1);
    char slashes[64];
    snprintf(slashes, sizeof slashes, "file:./%s/", a.path);
    at_a.url = slashes, at_b.url = b.path, back.url = b.store->uri;
    put(2, (struct one_save){ a.store, { 0 }, 7, 70, 71, 72, 0 });
    put(3, (struct one_save){ b.store, { .w = &at_a }, 1, 0, 11, 12, 0 });
    put(1, (struct one_save){ c.store, { .w = &at_b, .n = &at_b }, 5, 0, 0, 52, 0 });
    put(1, (struct one_save){ a.store, { .w = &back, .n = &back }, 8, 0, 0, 82, 0 });
    lies_in(b.store, 1, "w", 7, a.path, "w");
    lies_in(c.store, 5, "w", 7, a.path, "w");
    lies_in(c.store, 5, "n", 1, b.path, "n");
    lies_in(a.store, 8, "w", 7, NULL, "w"); /* found to be its own root */
    lies_in(a.store, 8, "n", 1, b.path, "n");
    loads((struct one_save){ b.store, { 0 }, 1, 70, 11, 12, 0 });
    loads((struct one_save){ c.store, { 0 }, 5, 70, 11, 52, 0 });
    loads((struct one_save){ a.store, { 0 }, 8, 70, 11, 82, 0 });
    struct metadata *m = read_step(c.store, 5); /* means the same from every folder */
    for (uint64_t i = 0; i < m->owner_count; i++)
        assert_memory_equal(m->owner[i].url, "file:/", 6);
    metadata_free(m);
    /* the other root is gone: the step is damaged, and says why */
    char moved[64];
    snprintf(moved, sizeof moved, "%s.away", a.path);
    assert_int_equal(rename(a.path, moved), 0);
    status *st = commit_read(c.store, 5, &m);
    assert_ok(expect_error(st, ST_CORRUPT, "tensor model/w lies in step 7 of file:/", __FILE__, __LINE__));
    assert_int_equal(rename(moved, a.path), 0);
    loads((struct one_save){ c.store, { 0 }, 5, 70, 11, 52, 0 });
    root_close(&a);
    root_close(&b);
    root_close(&c);
}

static status *arguments_job(struct comm *world, void *arg)
{
    struct held h;
    struct tessera_reference r = to(1);
    struct tessera_tensor a = TESSERA_TENSOR;
    tessera *t;
    TRY(open_in(world, arg, true, 0, false, &t));
    TRY(tessera_state_new(t, &h.state));
    a.part = "model", a.name = "x", a.dtype = TESSERA_U8, a.reference = &r, a.data = &r;
    a.alias_of = "y";
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "an alias and a reference");
    a.alias_of = NULL;
    r.size--;
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "TESSERA_REFERENCE");
    r.size++;
    r.url = "";
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "URL");
    r.url = "file:/a\nb";
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "control character");
    r.url = NULL;
    r.part = "../x";
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "its reference");
    r.part = NULL;
    r.name = "a//b";
    EXPECT_ERROR(tessera_state_add_tensor(h.state, &a), INVALID, "its reference");
    tessera_state_free(h.state);
    /* what a step says of its tensors */
    uint64_t step;
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    a.size = sizeof a;
    TRY(tessera_stored_at(t, 2, &a)); /* n, t, w */
    EXPECT(!strcmp(a.name, "w") && a.reference && a.reference->step == 1 && !a.reference->url);
    EXPECT(!strcmp(a.reference->part, "model") && !strcmp(a.reference->name, "w"));
    TRY(tessera_stored_at(t, 1, &a));
    EXPECT(!strcmp(a.name, "t") && !a.reference);
    a.size = offsetof(struct tessera_tensor, reference); /* an older caller's */
    a.reference = &r;
    TRY(tessera_stored_at(t, 2, &a));
    EXPECT(a.reference == &r);
    return tessera_close(t);
}

/* A rank that gives another reference, or none. */
static status *disagree_job(struct comm *world, void *arg)
{
    struct tessera_reference r = to(world->rank == 1 ? 1 : 2);
    struct one_save x = { arg, { .whole = true, .w = &r }, 9, 0, 0, 0, 0 };
    return save_job(world, &x);
}

static status *absent_job(struct comm *world, void *arg)
{
    struct tessera_reference r = to(1);
    struct one_save x = { arg, { .whole = true, .w = world->rank ? &r : NULL }, 9, 0, 0, 0, 0 };
    return save_job(world, &x);
}

static void test_refused(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct tessera_reference one = to(1), none = to(5), self = to(9), later = to(10), name = to(1), other = to(1);
    put(2, (struct one_save){ r.store, { 0 }, 1, 1, 1, 1, 0 });
    put(2, (struct one_save){ r.store, { .w = &one }, 2, 1, 1, 1, 0 });
    name.name = "nothing";
    other.name = "t";
    refused(2, (struct one_save){ r.store, { .w = &none }, 9, 0, 0, 0, 0 }, ST_NOT_FOUND,
            "tensor model/w by reference to model/w of step 5: step 5 is not committed");
    refused(2, (struct one_save){ r.store, { .w = &self }, 9, 0, 0, 0, 0 }, ST_NOT_FOUND, "step 9 is not committed");
    refused(2, (struct one_save){ r.store, { .w = &later }, 9, 0, 0, 0, 0 }, ST_NOT_FOUND, "step 10");
    refused(3, (struct one_save){ r.store, { .w = &name }, 9, 0, 0, 0, 0 }, ST_NOT_FOUND, "model/nothing of step 1");
    refused(1, (struct one_save){ r.store, { .w = &other }, 9, 0, 0, 0, 0 }, ST_INVALID, "it is i32 (37, 3) there");
    other.url = "file:/no/such/root";
    refused(1, (struct one_save){ r.store, { .w = &other }, 9, 0, 0, 0, 0 }, ST_NOT_FOUND, "file:/no/such/root");
    struct tessera_reference two = to(2); /* an earlier attempt's step that is saved anew cannot refer to itself */
    refused(2, (struct one_save){ r.store, { .n = &two }, 2, 0, 0, 0, 0 }, ST_INVALID, "step 2 is not before step 2");
    put(2, (struct one_save){ r.store, { .w = &two }, 2, 0, 5, 6, 0 }); /* but to who owns its bytes */
    loads((struct one_save){ r.store, { 0 }, 2, 1, 5, 6, 0 });
    assert_ok(expect_error(comm_threads_run(3, disagree_job, r.store), ST_INVALID, "disagree on its reference",
                           __FILE__, __LINE__));
    assert_ok(expect_error(comm_threads_run(2, absent_job, r.store), ST_INVALID, "disagree on its reference", __FILE__,
                           __LINE__));
    for (int ranks = 1; ranks <= 2; ranks++)
        assert_ok(comm_threads_run(ranks, arguments_job, r.store));
    steps_are(r.store, "1 2");
    root_close(&r);
}

/* ---- damage */

/* The file that holds the first piece of a tensor, under the root's folder. */
static void file_of(const struct root *r, uint64_t step, const char *name, char path[300], uint64_t *offset)
{
    struct metadata *m = read_step(r->store, step);
    const struct meta_piece *p = &m->piece[find(m, name)->first_piece];
    char key[STORE_KEY_BYTES];
    assert_ok(origins_key(m, &m->file[p->file], key));
    snprintf(path, 300, "%s/%.250s", r->path, key);
    *offset = p->offset;
    metadata_free(m);
}

static void flip(const char *path, uint64_t offset)
{
    int fd = open(path, O_RDWR);
    unsigned char c;
    assert_true(fd >= 0 && pread(fd, &c, 1, (off_t)offset) == 1);
    c ^= 4;
    assert_true(pwrite(fd, &c, 1, (off_t)offset) == 1 && close(fd) == 0);
}

struct told {
    int lines;
    char text[4096];
};

static void tell(void *arg, const char *line)
{
    struct told *t = arg;
    t->lines++;
    snprintf(t->text + strlen(t->text), sizeof t->text - strlen(t->text), "%s\n", line);
}

/* verify of a step says so many damages, with these words in the first. */
static void verifies(struct store *s, uint64_t step, int damages, const char *words)
{
    struct told t = { 0 };
    struct verify_result v;
    assert_ok(commit_verify(s, step, tell, &t, &v));
    if (t.lines != damages || (damages && !strstr(t.text, words)))
        fail_msg("step %llu: %d damages: %s", (unsigned long long)step, t.lines, t.text);
}

static void test_damage(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct tessera_reference two = to(2);
    char path[300], small[300], away[320];
    uint64_t at, at_small;
    struct one_save first = { r.store, { 0 }, 1, 1, 2, 3, 0 }, third = { r.store, { 0 }, 3, 10, 22, 33, 0 };
    put(2, first);
    put(2, (struct one_save){ r.store, { 0 }, 2, 10, 20, 30, 0 });
    put(2, (struct one_save){ r.store, { .w = &two }, 3, 0, 22, 33, 0 });
    for (uint64_t step = 1; step <= 3; step++)
        verifies(r.store, step, 0, "");
    file_of(&r, 3, "w", path, &at);
    assert_non_null(strstr(path, "step-000000000002"));
    /* one byte, at the end of the first block, in the first of the second */
    static const uint64_t bytes[] = { 0, (1 << 20) - 1, 1 << 20 };
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) {
        flip(path, at + bytes[i]);
        verifies(r.store, 3, 1, "step 3: tensor model/w lies in step 2: model-");
        verifies(r.store, 2, 1, "step 2: model-");
        for (int ranks = 1; ranks <= 3; ranks++) {
            assert_ok(expect_error(comm_threads_run(ranks, load_job, &third), ST_CORRUPT,
                                   "step 3: tensor model/w lies in step 2: file model-", __FILE__, __LINE__));
            assert_ok(comm_threads_run(ranks, newest_job, &first)); /* past both */
        }
        flip(path, at + bytes[i]);
    }
    /* what is not referred to is the owner's own matter: another tensor of its file, its padding */
    file_of(&r, 2, "n", small, &at_small);
    flip(small, at_small);
    flip(small, at_small + SMALL);
    verifies(r.store, 3, 0, "");
    verifies(r.store, 2, 2, "model/n");
    assert_ok(comm_threads_run(2, newest_job, &third));
    flip(small, at_small);
    flip(small, at_small + SMALL);
    /* cut short, gone */
    struct stat sb;
    assert_int_equal(stat(path, &sb), 0);
    assert_int_equal(truncate(path, sb.st_size - 1), 0);
    verifies(r.store, 3, 1, "step 3: tensor model/w lies in step 2: model-");
    assert_ok(
        expect_error(comm_threads_run(2, load_job, &third), ST_CORRUPT, "lies in step 2: file", __FILE__, __LINE__));
    assert_int_equal(truncate(path, sb.st_size), 0);
    snprintf(away, sizeof away, "%s.away", path);
    assert_int_equal(rename(path, away), 0);
    verifies(r.store, 3, 1, "the file is missing");
    assert_ok(expect_error(comm_threads_run(2, load_job, &third), ST_CORRUPT, "is missing", __FILE__, __LINE__));
    assert_ok(comm_threads_run(2, newest_job, &first));
    assert_int_equal(rename(away, path), 0);
    loads(third);
    root_close(&r);
}

/* ---- what stays */

static void test_retention(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct tessera_reference one = to(1), two = to(2), three = to(3);
    put(2, (struct one_save){ r.store, { 0 }, 1, 1, 2, 3, 1 });
    put(2, (struct one_save){ r.store, { .w = &one }, 2, 0, 20, 30, 1 });
    steps_are(r.store, "1 2");
    put(1, (struct one_save){ r.store, { .w = &two, .n = &two }, 3, 0, 0, 33, 1 });
    steps_are(r.store, "1 2 3");
    put(3, (struct one_save){ r.store, { .w = &three }, 4, 0, 40, 50, 1 });
    steps_are(r.store, "1 4"); /* nobody needs 2 and 3 any more */
    loads((struct one_save){ r.store, { 0 }, 4, 1, 40, 50, 0 });
    expect_cli(r.path, "rm %s 1", ST_INVALID, "step 1 owns bytes of step 4: remove that one, too, or neither");
    expect_cli(r.path, "rm %s 1 --force", ST_INVALID, "step 1 owns bytes of step 4");
    expect_cli(r.path, "gc %s --age=0", ST_OK, "");
    expect_cli(r.path, "ls %s", ST_OK, "");
    expect_cli(r.path, "show %s --json", ST_OK, "");
    loads((struct one_save){ r.store, { 0 }, 4, 1, 40, 50, 0 });
    put(2, (struct one_save){ r.store, { 0 }, 5, 7, 8, 9, 1 });
    steps_are(r.store, "5");
    struct tessera_reference five = to(5);
    put(2, (struct one_save){ r.store, { .w = &five }, 6, 0, 8, 9, 0 });
    put(2, (struct one_save){ r.store, { 0 }, 7, 0, 8, 9, 0 });
    expect_cli(r.path, "rm %s 5 6", ST_OK, "");
    steps_are(r.store, "7");
    root_close(&r);
}

/* Fails every removal from the n-th on: what is listed then is whole. */
struct stopped {
    const struct store_ops *real;
    struct store_ops ops;
    int left;
};

static struct stopped *stopped_of(struct store *s)
{
    return (struct stopped *)(void *)((char *)(size_t)s->ops - offsetof(struct stopped, ops));
}

static status *stop_remove(struct store *s, const char *key)
{
    struct stopped *f = stopped_of(s);
    if (f->left == 0)
        return ERR(IO, "remove %s: planted", key);
    f->left--;
    return f->real->remove(s, key);
}

static status *stop_remove_tree(struct store *s, const char *dir)
{
    struct stopped *f = stopped_of(s);
    if (f->left == 0)
        return ERR(IO, "remove %s: planted", dir);
    f->left--;
    return f->real->remove_tree(s, dir);
}

static void test_stopped_removals(void **state)
{
    (void)state;
    for (int left = 0; left <= 9; left++) {
        struct root r = root_open(true);
        struct tessera_reference one = to(1), two = to(2);
        put(1, (struct one_save){ r.store, { 0 }, 1, 1, 2, 3, 0 });
        put(1, (struct one_save){ r.store, { .w = &one }, 2, 0, 20, 3, 0 });
        put(1, (struct one_save){ r.store, { .w = &two, .n = &two }, 3, 0, 0, 3, 0 });
        put(1, (struct one_save){ r.store, { 0 }, 4, 1, 2, 3, 0 });
        struct stopped f = { .real = r.store->ops, .ops = *r.store->ops, .left = left };
        f.ops.remove = stop_remove;
        f.ops.remove_tree = stop_remove_tree;
        r.store->ops = &f.ops;
        status *st = commit_retain(r.store, 4, &(struct keep_rules){ .last = 1 });
        assert_int_equal(status_code(st), left < 6 ? ST_IO : ST_OK);
        status_free(st);
        r.store->ops = f.real;
        struct step_list l;
        assert_ok(commit_list(r.store, &l));
        for (size_t i = 0; i < l.count; i++)
            verifies(r.store, l.step[i], 0, "");
        assert_int_equal(l.step[l.count - 1], 4);
        assert_int_equal(l.count, left < 6 ? 4 - (left + 1) / 2 : 1);
        step_list_free(&l);
        root_close(&r);
    }
}

/* ---- frozen tensors */

struct frozen_run {
    struct store *store;
    int part; /* of the test */
    bool whole;
};

static status *frozen_job(struct comm *world, void *arg)
{
    const struct frozen_run *x = arg;
    struct shape_of_job shape = { .whole = x->whole };
    struct held h;
    tessera *t;
    uint64_t step;
    TRY(open_in(world, x->store, false, 2, true, &t));
    TRY(held_open(world, &shape, &h));
    if (x->part == 0) {
        for (step = 1; step <= 5; step++) {
            fill(&h, 1, 2, step);
            TRY(save(t, &h, step));
        }
        EXPECT(ckpt_plans_made(t) == 2); /* one that writes, one that refers */
    } else if (x->part == 1) {           /* goes on, perhaps at another cut */
        TRY(tessera_load_newest(t, h.state, &step));
        EXPECT(step == 5 && holds(&h, 1, 2, 5));
        for (step = 6; step <= 8; step++) {
            fill(&h, 1, 2, step);
            TRY(save(t, &h, step));
        }
        EXPECT(ckpt_plans_made(t) <= 2);
    } else if (x->part == 2) { /* n is another one now: it is written, w is not */
        TRY(tessera_load_newest(t, h.state, &step));
        EXPECT(step == 8 && holds(&h, 1, 2, 8));
        fill(&h, 1, 77, 9);
        TRY(save(t, &h, 9));
        fill(&h, 1, 77, 10);
        TRY(save(t, &h, 10));
    } else { /* back to before the owner: nothing may refer to what was retired */
        TRY(tessera_load(t, h.state, 9));
        EXPECT(holds(&h, 1, 77, 9));
        fill(&h, 5, 6, 11);
        TRY(save(t, &h, 11));
        TRY(save(t, &h, 12));
        TRY(tessera_rewind(t, 11));
        TRY(save(t, &h, 13));
        TRY(tessera_rewind(t, 9));
        TRY(save(t, &h, 14)); /* 11 to 13 are gone */
        EXPECT_ERROR(tessera_load(t, h.state, 11), NOT_FOUND, "11");
        TRY(tessera_load(t, h.state, 14));
        EXPECT(holds(&h, 5, 6, 11));
    }
    held_close(&h);
    return tessera_close(t);
}

static void frozen_part(struct store *s, int ranks, int part, bool whole)
{
    struct frozen_run x = { s, part, whole };
    assert_ok(comm_threads_run(ranks, frozen_job, &x));
}

static void test_frozen(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        struct root r = root_open(ranks % 2);
        int others = ranks == 3 ? 2 : ranks;
        frozen_part(r.store, ranks, 0, false);
        steps_are(r.store, "1 4 5");
        lies_in(r.store, 5, "w", 1, NULL, "w");
        lies_in(r.store, 5, "n", 1, NULL, "n");
        lies_in(r.store, 5, "t", 0, NULL, NULL);
        loads((struct one_save){ r.store, { 0 }, 5, 1, 2, 5, 0 });
        frozen_part(r.store, others, 1, ranks == 4);
        uint64_t owner = ranks == 3 ? 6 : 1; /* other cuts, but whole tensors hold every cut's rows */
        lies_in(r.store, 8, "w", owner, NULL, "w");
        lies_in(r.store, 8, "n", 1, NULL, "n");
        loads((struct one_save){ r.store, { 0 }, 8, 1, 2, 8, 0 });
        frozen_part(r.store, others, 2, ranks == 4);
        lies_in(r.store, 9, "w", owner, NULL, "w");
        lies_in(r.store, 9, "n", 0, NULL, NULL);
        lies_in(r.store, 10, "n", 9, NULL, "n");
        loads((struct one_save){ r.store, { 0 }, 10, 1, 77, 10, 0 });
        frozen_part(r.store, others, 3, ranks == 4);
        lies_in(r.store, 14, "w", 0, NULL, NULL);
        loads((struct one_save){ r.store, { 0 }, 14, 5, 6, 11, 0 });
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_root), cmocka_unit_test(test_other_roots), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_damage),    cmocka_unit_test(test_retention),   cmocka_unit_test(test_stopped_removals),
        cmocka_unit_test(test_frozen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
