/* copy_step over stores whose every operation fails once, into a root where a job is live, and what it reads. The
 * values of copies, as h5py shows them, are test_copy.py's. */
#include "ckpt/copy.h"
#include "ckpt/verify.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { STEP = 7, BEFORE = 3 };
static const struct copy_options as_it_is;

static uint64_t listed(struct store *s)
{
    struct step_list l;
    assert_ok(commit_list(s, &l));
    uint64_t n = l.count;
    step_list_free(&l);
    return n;
}

/* The step of `s` is that of the fake one, byte for byte, whatever its attempt. */
static void expect_whole(struct store *s, const struct fake_step *x)
{
    struct verify_result v;
    struct metadata *m = NULL;
    assert_ok(commit_verify(s, STEP, NULL, NULL, &v));
    assert_int_equal(v.damages, 0);
    assert_ok(commit_read(s, STEP, &m));
    assert_int_equal(m->tensor_count, x->m.tensor_count);
    assert_int_equal(m->blob_count, x->m.blob_count);
    assert_int_equal(m->crc_count, x->m.crc_count);
    assert_memory_equal(m->crc, x->crc, m->crc_count * sizeof *m->crc);
    assert_int_not_equal(m->attempt, x->m.attempt);
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        assert_string_equal(m->tensor[i].name, x->tensor[i].name);
        assert_int_equal(m->tensor[i].trainable, x->tensor[i].trainable);
    }
    metadata_free(m);
}

static void test_what_is_read(void **state)
{
    (void)state;
    struct root from = root_open(false), to = root_open(false);
    struct fake_step *x = fake_step_make(STEP, 0xa1, "big");
    struct copy_result r;
    uint64_t bytes = 0;
    assert_ok(fake_step_put_files(from.store, x));
    assert_ok(commit_put(from.store, &x->m));
    for (uint64_t i = 0; i < x->m.piece_count; i++)
        bytes += x->piece[i].bytes;
    assert_ok(copy_step(from.store, STEP, to.store, &as_it_is, &r));
    assert_int_equal(r.bytes, bytes);
    assert_int_equal(r.read_bytes, bytes); /* nothing twice */
    assert_int_equal(r.tensors, FAKE_TENSORS);
    assert_int_equal(r.files, 2);
    expect_whole(to.store, x);
    status *st = copy_step(from.store, STEP, to.store, &as_it_is, &r);
    assert_int_equal(status_code(st), ST_EXISTS);
    status_free(st);
    expect_whole(to.store, x);

    struct copy_options cut = { .recut = true, .mesh = { { 1, 2, 1, 1, 3 } } };
    struct root other = root_open(false);
    assert_ok(copy_step(to.store, STEP, other.store, &cut, &r));
    assert_int_equal(r.bytes, bytes);
    assert_true(r.read_bytes >= bytes && r.read_bytes < bytes + (4 << 20)); /* blocks at the cuts */
    struct verify_result v;
    assert_ok(commit_verify(other.store, STEP, NULL, NULL, &v));
    assert_int_equal(v.damages, 0);
    fake_step_free(x);
    root_close(&from);
    root_close(&to);
    root_close(&other);
}

static void test_live_root(void **state)
{
    (void)state;
    struct root from = root_open(false), to = root_open(true);
    struct copy_result r = { .files = 99 };
    struct lease l;
    char note[NOTE_BYTES];
    assert_ok(fake_step_commit(from.store, STEP, 0xa1));
    assert_ok(lease_take(to.store, 30, &l, note));
    status *st = copy_step(from.store, STEP, to.store, &as_it_is, &r);
    assert_int_equal(status_code(st), ST_EXISTS);
    assert_int_equal(r.files, 99);
    status_free(st);
    struct store_list left;
    assert_ok(store_list(to.store, "step-000000000007", &left));
    assert_int_equal(left.count, 0);
    store_list_free(&left);
    assert_ok(lease_give_back(&l));
    assert_ok(copy_step(from.store, STEP, to.store, &as_it_is, &r));
    assert_int_equal(r.files, 2);
    root_close(&from);
    root_close(&to);
}

/* Another attempt takes the root over in the middle, as it may after a long stop of this process. */
static void take_over(void *arg, uint64_t bytes, uint64_t total)
{
    struct store *to = arg;
    assert_true(bytes <= total);
    assert_ok(store_put(to, "LEASE/0000000002", "attempt=00000000000000bb\n", 25, STORE_REPLACE));
}

static void test_lost_lease(void **state)
{
    (void)state;
    struct root from = root_open(false), to = root_open(true);
    struct copy_options o = { .progress = take_over, .progress_arg = to.store };
    struct copy_result r;
    assert_ok(fake_step_commit(from.store, STEP, 0xa1));
    status *st = copy_step(from.store, STEP, to.store, &o, &r);
    assert_int_equal(status_code(st), ST_CANCELLED);
    status_free(st);
    assert_int_equal(listed(to.store), 0);
    struct store_list left;
    assert_ok(store_list(to.store, "step-000000000007", &left));
    assert_int_equal(left.count, 0);
    store_list_free(&left);
    root_close(&from);
    root_close(&to);
}

/* Each operation of either store fails once, before or after it is done: the copy fails and nothing is listed, or what
 * is listed is whole; the next copy is. Returns how many operations there are. */
static int fail_each(bool source, enum fault_mode mode)
{
    struct fake_step *x = fake_step_make(STEP, 0xa1, "big");
    int failures = 0;
    for (uint64_t n = 0;; n++) {
        struct root from = root_open(false), to = root_open(false);
        struct store *fault;
        struct copy_result r;
        assert_ok(fake_step_commit(to.store, BEFORE, 0xb0)); /* another step, which must not suffer */
        assert_ok(fake_step_put_files(from.store, x));
        assert_ok(commit_put(from.store, &x->m));
        assert_ok(store_fault_open(source ? from.store : to.store, &fault));
        store_fault_arm(fault, n, mode);
        status *st = copy_step(source ? fault : from.store, STEP, source ? to.store : fault, &as_it_is, &r);
        bool happened = store_fault_disarm(fault) != NULL, failed = st != NULL;
        status_free(st);
        assert_true(listed(to.store) == 1 || listed(to.store) == 2);
        if (listed(to.store) == 2)
            expect_whole(to.store, x);
        else
            assert_true(failed);
        if (failed && listed(to.store) == 1) {
            failures++;
            status *again = NULL;
            for (int i = 0; i < 3; i++) { /* a lease that was not given back is this process's: another would wait */
                again = copy_step(from.store, STEP, to.store, &as_it_is, &r);
                if (status_code(again) != ST_EXISTS)
                    break;
                status_free(again);
                again = NULL;
                assert_ok(store_remove_tree(to.store, "LEASE"));
            }
            assert_ok(again);
            expect_whole(to.store, x);
        }
        store_fault_close(fault);
        root_close(&from);
        root_close(&to);
        if (!happened)
            break;
    }
    fake_step_free(x);
    return failures;
}

static void test_faults(void **state)
{
    (void)state;
    for (int mode = FAULT_BEFORE; mode <= FAULT_AFTER; mode++) {
        assert_true(fail_each(true, (enum fault_mode)mode) >= 7);  /* metadata, two lengths, blocks */
        assert_true(fail_each(false, (enum fault_mode)mode) >= 8); /* lease, files, commit */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_what_is_read), cmocka_unit_test(test_live_root),
                                        cmocka_unit_test(test_lost_lease), cmocka_unit_test(test_faults) };
    return cmocka_run_group_tests_name("copy", tests, NULL, NULL);
}
