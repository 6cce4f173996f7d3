/* models: the tables add up to what was published, and what every rank of a mesh holds tiles every tensor. */
#include "ckpt/models.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* Llama 3 and Qwen3: the totals of the published checkpoints; DiT-XL/2: of the authors' code, fixed positions too. */
static void test_totals(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint64_t params;
    } known[] = { { "llama3-8b", 8030261248 },
                  { "llama3-70b", 70553706496 },
                  { "llama3-405b", 405853388800 },
                  { "qwen3-30b-a3b", 30532122624 },
                  { "dit-xl2", 675129632 } };
    char names[256];
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        assert_non_null(model_find(known[i].name));
        assert_int_equal(model_params(model_find(known[i].name)), known[i].params);
        model_names(names, sizeof names);
        assert_non_null(strstr(names, known[i].name));
    }
    assert_null(model_find("llama3"));
}

/* Plan it: refused if a tensor is not tiled. Elements of the stored weights and of each optimiser part must be the
 * model's, whatever the mesh. */
static void check_mesh(const char *name, struct mesh m, int zero, double most_over_mean)
{
    const struct model_table *t = model_find(name);
    struct descs d;
    struct plan *p = NULL;
    status *st = model_descs(t, &m, zero, &d);
    if (!st)
        st = plan_make(d.desc, d.count, d.text, d.text_bytes, d.ranks, NULL, &p);
    if (st)
        fail_msg("%s: %s", name, status_message(st));
    uint64_t model = 0, optim = 0, trainable = 0, bytes = 0, most = 0;
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        bool ok;
        const struct plan_tensor *x = &p->tensor[i];
        uint64_t n = shape_volume(&x->shape, &ok);
        model += strcmp(x->part, "model") ? 0 : n;
        trainable += strcmp(x->part, "model") || !x->trainable ? 0 : n;
        optim += strcmp(x->part, "optim") ? 0 : n;
    }
    for (int r = 0; r < p->ranks; r++) {
        bytes += p->rank_bytes[r];
        most = p->rank_bytes[r] > most ? p->rank_bytes[r] : most;
    }
    assert_int_equal(model, model_params(t));
    assert_int_equal(optim, 3 * trainable);
    assert_int_equal(bytes, 2 * model + 4 * optim);
    assert_int_equal(p->ranks, mesh_world(&m));
    if ((double)most * p->ranks > most_over_mean * (double)bytes)
        fail_msg("%s: %.4f of the mean", name, (double)most * p->ranks / (double)bytes);
    plan_free(p);
    descs_free(&d);
}

static void test_meshes(void **state)
{
    (void)state;
    /* pp, dp, ep, cp, tp */
    check_mesh("dit-xl2", (struct mesh){ { 1, 1, 1, 1, 1 } }, 1, 1.0);
    check_mesh("dit-xl2", (struct mesh){ { 4, 3, 1, 1, 2 } }, 1, 1.05);
    check_mesh("dit-xl2", (struct mesh){ { 1, 5, 1, 2, 1 } }, 0, 1.05);
    check_mesh("llama3-8b", (struct mesh){ { 1, 7, 1, 1, 8 } }, 1, 1.05);
    check_mesh("llama3-8b", (struct mesh){ { 2, 4, 1, 1, 4 } }, 1, 1.05);
    check_mesh("llama3-70b", (struct mesh){ { 4, 2, 1, 2, 8 } }, 1, 1.05);
    check_mesh("qwen3-30b-a3b", (struct mesh){ { 2, 2, 8, 1, 4 } }, 1, 1.05);
    check_mesh("qwen3-30b-a3b", (struct mesh){ { 1, 2, 2, 2, 1 } }, 0, 1.05);
    check_mesh("llama3-405b", (struct mesh){ { 16, 2, 1, 1, 8 } }, 1, 1.05);
    /* 126 layers, embedding and head: no cut into 126 stages can be even, but each has something */
    check_mesh("llama3-405b", (struct mesh){ { 126, 1, 1, 1, 1 } }, 1, 2.1);
}

static void refused(const char *name, struct mesh m, int zero, const char *says)
{
    struct descs d;
    status *st = model_descs(model_find(name), &m, zero, &d);
    assert_int_equal(status_code(st), ST_INVALID);
    if (!strstr(status_message(st), says))
        fail_msg("'%s' does not say '%s'", status_message(st), says);
    status_free(st);
}

static void test_refused(void **state)
{
    (void)state;
    refused("llama3-8b", (struct mesh){ { 33, 1, 1, 1, 1 } }, 1, "pp=33 stages for 32 layers");
    refused("llama3-8b", (struct mesh){ { 1, 1, 1, 1, 3 } }, 1, "tp=3 does not divide");
    refused("llama3-8b", (struct mesh){ { 1, 1, 2, 1, 1 } }, 1, "no experts");
    refused("qwen3-30b-a3b", (struct mesh){ { 1, 1, 3, 1, 1 } }, 1, "128 experts");
    refused("llama3-8b", (struct mesh){ { 1, 0, 1, 1, 1 } }, 1, "at least 1");
    refused("llama3-8b", (struct mesh){ { 1, 1 << 20, 1, 1, 2 } }, 1, "at most");
    refused("llama3-8b", (struct mesh){ { 1, 1, 1, 1, 1 } }, 2, "zero is 0 or 1");
}

static void test_synthetic(void **state)
{
    (void)state;
    static const uint64_t pieces[] = { 1, 3, 64, 5000 };
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        struct descs d;
        struct plan *p;
        assert_null(model_synthetic(7, pieces[i], (int)pieces[i], &d));
        assert_int_equal(d.count, 7 * pieces[i]);
        assert_null(plan_make(d.desc, d.count, d.text, d.text_bytes, d.ranks, NULL, &p));
        assert_int_equal(p->piece_count, 7 * pieces[i]);
        assert_int_equal(p->tensor_count, 7);
        plan_free(p);
        descs_free(&d);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_totals), cmocka_unit_test(test_meshes),
                                        cmocka_unit_test(test_refused), cmocka_unit_test(test_synthetic) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
