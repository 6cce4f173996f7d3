/* test_mesh_plan: what parallel: auto chooses. Bytes are those of the formulas, computed here from shapes; what is
 * chosen is legal, fits, keeps the keys that are set, and runs with the bits of one rank. And what is refused where a
 * mesh is set that does not go. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/mesh_plan.h"

/* Of thread_jobs.h's model, 2 layers untied with 4 heads: elements in memory, multiples of 1,024. */
enum { PADDED_LAYER = 12 * 1024, OUTSIDE = 2 * 9 * 1024 + 1024, BATCH = 8 };

static struct config *parse(int n, const char *const *o)
{
    char text[2048];
    struct config *c = NULL;
    make_config(text, sizeof text, "planned");
    must(config_parse(text, strlen(text), "job", n, (char **)(size_t)o, &c));
    return c;
}

static const struct mesh_plan_row *only(struct config *c, int world, struct mesh_plan **p)
{
    must(mesh_plan_make(c, world, UINT64_MAX, p));
    const struct mesh_plan_row *r = mesh_plan_best(*p);
    assert_non_null(r);
    return r;
}

static void bytes_are_the_formulas(void **state)
{
    (void)state;
    const uint64_t whole = OUTSIDE + 2 * PADDED_LAYER, bucket = 16384, dp = 4;
    for (uint64_t i = 0; i < 8; i++) {
        uint64_t zero = i % 4;
        bool bf16 = i > 3;
        char key[32];
        snprintf(key, sizeof key, "parallel.zero=%d", (int)zero);
        const char *const o[] = { "model.tied=false",
                                  "parallel.auto=true",
                                  "parallel.pp=1",
                                  "parallel.tp=1",
                                  "memory.recompute=none",
                                  key,
                                  bf16 ? "train.param_dtype=bf16" : "train.param_dtype=f32",
                                  bf16 ? "train.grad_dtype=bf16" : "train.grad_dtype=f32" };
        struct config *c = parse(8, o);
        struct mesh_plan *p = NULL;
        const struct mesh_plan_row *r = only(c, (int)dp, &p);
        assert_true(r->pp == 1 && r->dp == 4 && r->tp == 1 && r->zero == (int)zero && r->recompute == 0);
        /* 8 lanes, a micro-batch each: sums of 2 lanes a rank with stages 0 and 1, of 8 a replica with 2 and 3 */
        uint64_t sums = zero < 2 ? 1 : 3, cut = zero == 3 ? dp : 1;
        assert_int_equal(r->parameters, bf16 ? 2 * whole / cut + 4 * whole / (zero ? dp : 1) : 4 * whole / cut);
        assert_int_equal(r->gradients, zero < 2 ? 4 * whole * (1 + sums) : 4 * whole / dp * sums);
        assert_int_equal(r->moments, 8 * whole / (zero ? dp : 1));
        uint64_t window = zero < 2 ? 0 : zero == 2 ? 4 : bf16 ? 6 : 8;
        assert_int_equal(r->other, (bf16 ? 9 : 4) * bucket / 2 + window * (OUTSIDE + 2 * PADDED_LAYER));
        double once = 3.0 / 4 * 4 * (double)whole, passes = BATCH / 4.0;
        double sent = zero < 2 ? 2 * once : zero == 2 ? (passes + 1) * once : 3 * passes * once;
        assert_true(fabs(r->sent - (bf16 ? sent / 2 : sent)) < 1);
        mesh_plan_free(p);
        config_free(c);
    }
}

/* With less and less memory: always a mesh that fits, and the cheapest, until none does. */
static void less_memory(void **state)
{
    (void)state;
    const char *const o[] = { "parallel=auto", "train.micro_batch=2" };
    double cost = 0;
    int steps = 0;
    for (uint64_t memory = 64 << 20;; memory = memory * 3 / 4, steps++) {
        struct config *c = parse(2, o);
        struct mesh_plan *p = NULL;
        assert_true(c->parallel.automatic);
        must(mesh_plan_make(c, 8, memory, &p));
        const struct mesh_plan_row *r = mesh_plan_best(p);
        status *st = mesh_plan_take(p, c);
        if (!r) {
            assert_int_equal(status_code(st), ST_NO_MEMORY);
            assert_non_null(strstr(status_message(st), "no mesh of 8 ranks fits in"));
            assert_non_null(strstr(status_message(st), "MB more"));
            status_free(st);
            mesh_plan_free(p);
            config_free(c);
            break;
        }
        must(st);
        assert_true(mesh_plan_need(r) <= memory && r->cost >= cost);
        assert_int_equal(r->pp * r->dp * r->tp, 8);
        assert_true(c->parallel.pp == r->pp && c->parallel.dp == r->dp && c->parallel.tp == r->tp &&
                    c->parallel.zero == r->zero && c->memory.recompute == r->recompute &&
                    c->parallel.sequence == (r->tp > 1));
        cost = r->cost;
        mesh_plan_free(p);
        config_free(c);
    }
    assert_true(steps > 3);
}

/* Proposed is what the trainer runs: ZeRO 2 and 3 on pipelines too, with interleaved stages, Muon and a
 * frozen base. */
static void what_runs_is_proposed(void **state)
{
    (void)state;
    static const struct {
        const char *o[5];
        bool runs;
    } all[] = {
        { { "parallel=auto", "parallel.zero=2", "parallel.pp=2" }, true },
        { { "parallel=auto", "parallel.zero=3", "parallel.pp=2", "lora.targets=*_proj" }, true },
        { { "parallel=auto", "parallel.zero=3", "parallel.tp=2", "optim.kind=muon" }, true },
        { { "parallel=auto", "parallel.zero=2", "parallel.pp=1", "parallel.schedule=interleaved" }, true },
        { { "parallel=auto", "parallel.zero=2", "parallel.pp=2", "parallel.schedule=interleaved" }, true },
        { { "parallel=auto", "parallel.pp=2", "data.tasks=tasks.jsonl" }, true },
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        int n = 0;
        while (n < 5 && all[i].o[n])
            n++;
        struct config *c = parse(n, all[i].o);
        struct mesh_plan *p = NULL;
        status *st = mesh_plan_make(c, 8, UINT64_MAX, &p);
        assert_int_equal(status_code(st), all[i].runs ? ST_OK : ST_INVALID);
        assert_true(st || mesh_plan_best(p));
        status_free(st);
        mesh_plan_free(p);
        config_free(c);
    }
}

/* On 8 ranks of dp 4 and ep 2: of what is not of experts a shard has an eighth, of its rank's experts a quarter. With
 * dp_shard 2, half, and all: the ranks of a replica have other experts each. */
static void dealt_experts_are_counted(void **state)
{
    (void)state;
    const uint64_t dense = OUTSIDE + 2 * 7 * 1024, own = 2 * 3 * 1024;
    for (uint64_t i = 0; i < 8; i++) {
        uint64_t zero = i % 4, shards = i < 4 ? 8 : 2, holders = i < 4 ? 4 : 1;
        char key[32];
        snprintf(key, sizeof key, "parallel.zero=%d", (int)zero);
        const char *const o[] = { "parallel=auto",
                                  "parallel.ep=2",
                                  "model.experts=4",
                                  "model.experts_per_token=2",
                                  "model.expert_ffn=8",
                                  "model.tied=false",
                                  "parallel.pp=1",
                                  "parallel.tp=1",
                                  "memory.recompute=none",
                                  i < 4 ? "parallel.dp_shard=0" : "parallel.dp_shard=2",
                                  key };
        struct config *c = parse(11, o);
        struct mesh_plan *p = NULL;
        const struct mesh_plan_row *r = only(c, 8, &p);
        assert_true(r->dp == 4 && r->zero == (int)zero);
        /* 8 lanes, one for each rank with stages 0 and 1, or for each micro-batch of a replica; of experts one sum */
        uint64_t sums = i < 4 ? 3 : 1, cut = dense / shards + own / holders;
        assert_int_equal(r->parameters, 4 * (zero == 3 ? cut : dense + own));
        assert_int_equal(r->gradients, 4 * (zero < 2 ? dense + own : sums * dense / shards + own / holders));
        assert_int_equal(r->moments, 8 * (zero ? cut : dense + own));
        assert_int_equal(r->other, 2 * 16384 + (zero < 2 ? 0 : zero == 2 ? 4 : 8) * (dense + own));
        mesh_plan_free(p);
        config_free(c);
    }
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        int world;
        const char *o[4], *words;
    } bad[] = {
        { 3, { "parallel=auto", "parallel.pp=1", "parallel.dp=1" }, "parallel.tp: 3 does not fit model.heads: 4" },
        { 64, { "parallel=auto", "parallel.zero=1", "parallel.pp=1", "parallel.tp=1" }, "train.lanes: 8" },
        { 4, { "parallel=auto", "parallel.pp=3" }, "no mesh of 4 ranks goes with the keys that are set" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int n = 0;
        while (n < 4 && bad[i].o[n])
            n++;
        struct config *c = parse(n, bad[i].o);
        struct mesh_plan *p = NULL;
        status *st = mesh_plan_make(c, bad[i].world, UINT64_MAX, &p);
        assert_int_equal(status_code(st), ST_INVALID);
        if (!strstr(status_message(st), bad[i].words))
            fail_msg("\"%s\" is not in \"%s\"", bad[i].words, status_message(st));
        status_free(st);
        config_free(c);
    }
}

/* Without auto: what does not go is refused in one line with what would. */
static void meshes_that_do_not_go(void **state)
{
    (void)state;
    static const struct {
        int ranks;
        const char *o[6], *words;
    } bad[] = {
        { 3,
          { "parallel.tp=3" },
          "parallel.tp: 3 does not fit model.heads: 4 (this model can be cut over 1, 2, 4 ranks)" },
        { 4,
          { "parallel.tp=4", "model.ffn=66" },
          "parallel.tp: 4 does not fit model.ffn: 66 (this model can be cut over 1, 2 ranks)" },
        { 4,
          { "parallel.tp=4", "model.heads=6", "model.kv_heads=3", "model.head_dim=8", "model.ffn=96" },
          "parallel.tp: 4 does not fit model.heads: 6 (this model can be cut over 1, 3, 6 ranks)" },
        { 1, { "model.heads=4", "model.kv_heads=3" }, "model.heads: 4 is not a multiple of model.kv_heads: 3" },
        { 1, { "model.heads=3", "model.kv_heads=3" }, "model.hidden: 32 is not a multiple of model.heads: 3" },
        { 4,
          { "parallel.dp_shard=3" },
          "parallel.dp_shard: 3 does not divide 4 data-parallel ranks (legal: 1, 2, 4; 0: all)" },
        { 2, { "train.lanes=1", "parallel.zero=1" }, "1 lanes cannot feed dp = 2 ranks" },
        { 1, { "train.lanes=6" }, "train.lanes must be a power of two" },
        { 5, { "parallel.pp=2", "parallel.tp=2" }, "does not fit 5 ranks: dp=0 takes what remains" },
        { 4, { "parallel.pp=2", "parallel.dp=3" }, "does not fit 4 ranks" },
        { 4, { "parallel.pp=4", "parallel.stages=1,0,0,1" }, "leaves a stage in the middle without a layer" },
        { 2, { "parallel.pp=2", "parallel.schedule=interleaved", "parallel.stages=1,1,1,1" }, "does not add up" },
        { 6, { "parallel.pp=6" }, "legal is 1 to 4" },
        { 4, { "parallel=auto", "memory.rank=100KiB" }, "no mesh of 4 ranks fits in" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[2048];
        make_config(text, sizeof text, "refused");
        struct job j = { .config = text };
        for (; bad[i].o[j.override_count]; j.override_count++)
            j.overrides[j.override_count] = bad[i].o[j.override_count];
        status *st = comm_threads_run(bad[i].ranks, run_rank, &j);
        assert_true(st && (status_code(st) == ST_INVALID || status_code(st) == ST_NO_MEMORY));
        if (!strstr(status_message(st), bad[i].words))
            fail_msg("\"%s\" is not in \"%s\"", bad[i].words, status_message(st));
        status_free(st);
    }
}

static status *note_mesh(struct trainer *t)
{
    const struct mesh_plan_row *r = mesh_plan_best(t->plan);
    bool same = r && t->mesh.size[MESH_PP] == r->pp && t->mesh.size[MESH_DP] == r->dp && r->tp == 1;
    return same ? NULL : ERR(INTERNAL, "the mesh is not the planned one");
}

static void runs(void **state)
{
    (void)state;
    char text[2048];
    make_config(text, sizeof text, "auto");
    struct job one = { .config = text, .overrides = { "threads=1", "checkpoint.url=" }, .override_count = 2 };
    must(comm_threads_run(1, run_rank, &one));
    struct job j = { .config = text,
                     .overrides = { "threads=1", "checkpoint.url=", "parallel=auto", "parallel.tp=1",
                                    "memory.rank=1GiB" },
                     .override_count = 5,
                     .after = note_mesh };
    must(comm_threads_run(4, run_rank, &j));
    assert_true(j.hashes.weights == one.hashes.weights && j.hashes.moments == one.hashes.moments);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_are_the_formulas),
        cmocka_unit_test(less_memory),
        cmocka_unit_test(refusals),
        cmocka_unit_test(what_runs_is_proposed),
        cmocka_unit_test(dealt_experts_are_counted),
        cmocka_unit_test(meshes_that_do_not_go),
        cmocka_unit_test(runs),
    };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
