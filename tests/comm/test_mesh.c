/* mesh: coordinates against the formula of mesh.h written out, sizes that do not fit, and text. mesh_comm is in the
 * suite. */
#include "comm/mesh.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void test_coords(void **state)
{
    (void)state;
    struct mesh m = { { 2, 3, 2, 1, 4 } };
    status *st = mesh_init(&m, 48);
    assert_null(st);
    assert_int_equal(mesh_world(&m), 48);
    int rank = 0;
    for (int pp = 0; pp < 2; pp++)
        for (int dp = 0; dp < 3; dp++)
            for (int ep = 0; ep < 2; ep++)
                for (int tp = 0; tp < 4; tp++, rank++) { /* tp fastest */
                    int want[MESH_AXES] = { pp, dp, ep, 0, tp }, got[MESH_AXES];
                    mesh_coords(&m, rank, got);
                    assert_memory_equal(got, want, sizeof want);
                    assert_int_equal(mesh_rank(&m, want), rank);
                }
}

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        int size[MESH_AXES], world, dp; /* dp 0: refused */
    } cases[] = {
        { { 1, 0, 1, 1, 1 }, 1, 1 },          { { 1, 0, 1, 1, 1 }, 6, 6 },         { { 2, 0, 1, 1, 3 }, 12, 2 },
        { { 1, 4, 1, 1, 1 }, 4, 4 },          { { 1, 4, 1, 1, 2 }, 8, 4 },         { { 1, 4, 1, 1, 1 }, 5, 0 },
        { { 1, 2, 1, 1, 1 }, 4, 0 },          { { 1, 0, 1, 1, 3 }, 4, 0 },         { { 1, 0, 1, 1, 8 }, 4, 0 },
        { { 0, 0, 1, 1, 1 }, 4, 0 },          { { 1, 1, 1, 1, 0 }, 1, 0 },         { { 1, -1, 1, 1, 1 }, 1, 0 },
        { { -2, 0, 1, 1, -2 }, 4, 0 },        { { 65536, 65536, 1, 1, 1 }, 0, 0 }, { { 65536, 0, 65536, 1, 1 }, 1, 0 },
        { { 2147483647, 2, 1, 1, 1 }, 2, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct mesh m;
        memcpy(m.size, cases[i].size, sizeof m.size);
        status *st = mesh_init(&m, cases[i].world);
        assert_int_equal(status_code(st), cases[i].dp ? ST_OK : ST_INVALID);
        if (cases[i].dp)
            assert_int_equal(m.size[MESH_DP], cases[i].dp);
        else
            assert_memory_equal(m.size, cases[i].size, sizeof m.size); /* untouched */
        status_free(st);
    }
    struct mesh m = { { 1, 4, 1, 1, 1 } };
    status *st = mesh_init(&m, 6);
    assert_non_null(strstr(status_message(st), "pp=1,dp=4,ep=1,cp=1,tp=1"));
    assert_non_null(strstr(status_message(st), "6 ranks"));
    status_free(st);
}

static void test_text(void **state)
{
    (void)state;
    struct mesh m = { { 2, 4, 1, 1, 8 } };
    char text[64];
    mesh_text(&m, text, sizeof text);
    assert_string_equal(text, "pp=2,dp=4,ep=1,cp=1,tp=8");
    mesh_text(&m, text, 6);
    assert_string_equal(text, "pp=2,");
    assert_string_equal(mesh_axis_names[MESH_TP], "tp");
    assert_string_equal(mesh_axis_names[MESH_PP], "pp");
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_coords), cmocka_unit_test(test_sizes),
                                        cmocka_unit_test(test_text) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
