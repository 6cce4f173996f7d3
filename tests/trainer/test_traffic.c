/* test_traffic: bytes that ranks send in a step, as counted by comm, against the formulas of docs/parallelism.md,
 * computed here from the shapes of the tensors. Ranks are threads; their counts are added up, so that it does not
 * matter who has the longer part. A step is what two runs of different length differ by. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/trainer/thread_jobs.h"
#include "trainer/model/stages.h"
#include "trainer/parallel/schedule.h"
#include "trainer/parallel/treesum.h"

/* micro-batches; a tensor's elements are a multiple of ALIGN in memory */
enum { LAYERS = 3, HIDDEN = 32, FFN = 32, KV = 16, VOCAB = 320, BATCH = 8, ALIGN = 1024, BUCKET = 4096, RANKS = 8 };
enum { EXPERTS = 4 };

struct mesh_case {
    int pp, dp, tp, zero, chunks, ep; /* ep above 0: of a model with experts in all layers */
    bool recompute, tied, deterministic;
};

static uint64_t sent[RANKS][3]; /* dp, tp, pp, since the beginning */

static status *note_sent(struct trainer *t)
{
    uint64_t *mine = sent[t->world->rank];
    mine[0] = zero_sent_bytes(t->zero) + tied_sent_bytes(t->tied);
    mine[0] += t->experts ? zero_sent_bytes(t->experts->zero) : 0;
    mine[1] = t->tp ? t->tp->sent_bytes : 0;
    mine[2] = t->pp ? t->pp->sent_bytes : 0;
    return NULL;
}

/* Sums over all ranks of a run of so many steps; the tokens of its steps. */
static void run_steps(const struct mesh_case *c, int steps, double sum[3], double *tokens)
{
    char text[2048], mesh[9][48];
    const char *const fixed[] = { "threads=1",       "algo.warmup_sft_steps=0", "data.heldout=",
                                  "checkpoint.url=", "model.layers=3",          "model.ffn=32",
                                  "model.vocab=320" };
    make_config(text, sizeof text, "traffic");
    struct job j = { .config = text, .after = note_sent };
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        j.overrides[j.override_count++] = fixed[i];
    snprintf(mesh[0], sizeof mesh[0], "train.steps=%d", steps);
    snprintf(mesh[1], sizeof mesh[1], "parallel.pp=%d", c->pp);
    snprintf(mesh[2], sizeof mesh[2], "parallel.dp=%d", c->dp);
    snprintf(mesh[3], sizeof mesh[3], "parallel.tp=%d", c->tp);
    snprintf(mesh[4], sizeof mesh[4], "parallel.zero=%d", c->zero);
    snprintf(mesh[5], sizeof mesh[5], "model.tied=%s", c->tied ? "true" : "false");
    snprintf(mesh[6], sizeof mesh[6], "memory.recompute=%s", c->recompute ? "block" : "none");
    snprintf(mesh[7], sizeof mesh[7], "train.deterministic=%s", c->deterministic ? "true" : "false");
    for (int i = 0; i < 8; i++)
        j.overrides[j.override_count++] = mesh[i];
    if (c->chunks > 1) { /* in the place of what its default says as well */
        j.overrides[0] = "parallel.schedule=interleaved";
        snprintf(mesh[6], sizeof mesh[6], "parallel.chunks=%d", c->chunks);
    }
    const char *const experts[] = { "model.experts=4", "model.experts_per_token=2", "model.expert_ffn=32", mesh[8] };
    snprintf(mesh[8], sizeof mesh[8], "parallel.ep=%d", c->ep);
    for (int i = 0; c->ep && i < 4; i++)
        j.overrides[j.override_count++] = experts[i];
    memset(sent, 0, sizeof sent);
    must(comm_threads_run(c->pp * c->dp * c->tp * (c->ep ? c->ep : 1), run_rank, &j));
    for (int a = 0; a < 3; a++) {
        sum[a] = 0;
        for (int r = 0; r < RANKS; r++)
            sum[a] += (double)sent[r][a];
    }
    *tokens = 0;
    for (int s = 2; s <= steps; s++)
        *tokens += metric("traffic", s, "tokens");
}

/* ---- what the model has */

static double in_memory(double elements)
{
    return ceil(elements / ALIGN) * ALIGN;
}

/* Elements of a rank of tp (all of them have as many here), of a layer without its experts, of what is outside. */
static double of_layer(int tp, bool experts)
{
    int kv = tp > 2 ? KV / 2 : KV / tp; /* two heads */
    return 2 * in_memory(HIDDEN) + 2 * in_memory(HIDDEN * HIDDEN / tp) + 2 * in_memory(kv * HIDDEN) +
           (experts ? in_memory(EXPERTS * HIDDEN) : 3 * in_memory(FFN * HIDDEN / tp));
}

/* Of a layer's experts, of a rank of ep. */
static double of_experts(int ep)
{
    return ep ? 3 * in_memory(EXPERTS / ep * FFN * HIDDEN) : 0;
}

static double of_table(int tp)
{
    return in_memory(VOCAB / tp * HIDDEN);
}

/* ---- formulas, of all ranks and a step */

/* Blocks that the stages of a pipeline gather in a step of n passes of ZeRO 3: those that are not in their window when
 * a pass comes to them, in the order of the schedule. Block b has window b % 2. */
static double gathered_blocks(const struct mesh_case *c, uint32_t n)
{
    double count = 0;
    for (int stage = 0; stage < c->pp; stage++) {
        struct pipe_shape shape = { c->chunks > 1 ? PIPE_INTERLEAVED : PIPE_1F1B, c->pp, stage, c->chunks };
        uint64_t scratch[512];
        struct pipe_op op[128];
        int holds[2] = { -1, -1 };
        assert_true(schedule_scratch(&shape, n) <= 512 && schedule_ops(&shape, n) <= 128);
        size_t ops = schedule_make(&shape, n, scratch, op);
        for (size_t i = 0; i < ops; i++) {
            int first, end;
            must(stages_cut(NULL, LAYERS, c->pp * c->chunks, c->chunks, op[i].chunk * c->pp + stage, &first, &end));
            for (int u = 0; u < end - first; u++) { /* unit 0 is the embedding, the last one the head */
                int block = (op[i].pass == PIPE_PASS_FORWARD ? first + u : end - 1 - u) - 1;
                if (block < 0 || block >= LAYERS || holds[block % 2] == block)
                    continue;
                holds[block % 2] = block;
                count++;
            }
        }
    }
    return count;
}

static int ranks_of_ep(const struct mesh_case *c)
{
    return c->ep ? c->ep : 1;
}

/* Elements outside of blocks and in each, that n ranks share, are sent (n - 1) times as often as they are many. */
static double shared_by(const struct mesh_case *c, int n, double outside, double layer)
{
    double all = outside + LAYERS * layer, others = n - 1, passes = (double)BATCH / c->dp / ranks_of_ep(c), sum = 0,
           apart = outside > 0 && c->tied && c->deterministic ? of_table(c->tp) : 0;
    if (c->zero < 2)
        sum = 2 * others * (all + apart);
    else
        sum = others * passes * (all + apart);
    if (c->zero == 2)
        sum += others * all;
    if (c->zero == 3 && c->pp > 1)
        sum += others * (outside + layer * gathered_blocks(c, (uint32_t)passes));
    else if (c->zero == 3) /* a window for each of two neighbours: what is in it when a pass turns is not sent again */
        sum += others * (outside + layer * (LAYERS + (2 * passes - 1) * (LAYERS - 2)));
    return 4 * c->tp * sum;
}

/* Of ranks of one (pp, tp): what is dense is shared by all of these, experts by those with the same ones. */
static double dp_bytes(const struct mesh_case *c)
{
    double outside = of_table(c->tp) * (c->tied ? 1 : 2) + in_memory(HIDDEN);
    return shared_by(c, c->dp * ranks_of_ep(c), outside, of_layer(c->tp, c->ep)) +
           ranks_of_ep(c) * shared_by(c, c->dp, 0, of_experts(c->ep));
}

/* Of micro-batches of so many tokens together: sums of a layer and of the table, and what log-probabilities exchange.
 */
static double tp_bytes(const struct mesh_case *c, double tokens)
{
    double sums = (c->recompute ? 6 : 4) * LAYERS + 2, others = c->tp - 1;
    return 2 * others * sums * tokens * HIDDEN * 4 + c->tp * others * 48 * tokens;
}

/* Activations and their gradients over each border, whole from every rank of tp; a tied table's gradient and values. */
static double pp_bytes(const struct mesh_case *c, double tokens, double steps)
{
    double borders = c->pp * (c->chunks ? c->chunks : 1) - 1, tied = c->tied ? of_table(c->tp) * c->tp : 0;
    return c->pp == 1 ? 0 : 2 * 4 * (borders * tokens * HIDDEN * c->tp + steps * tied * c->dp);
}

/* Beside the formulas there are norms and metrics: all-gathers of doubles, at most `more` bytes. */
static void check(const struct mesh_case *c, const char *axis, double got, double want, double more)
{
    if (got < want || got > want + more)
        fail_msg("pp %d dp %d tp %d zero %d chunks %d tied %d ep %d: %s sent %.0f bytes, not %.0f to %.0f", c->pp,
                 c->dp, c->tp, c->zero, c->chunks, c->tied, c->ep, axis, got, want, want + more);
}

static void counts_are_the_formulas(void **state)
{
    (void)state;
    static const struct mesh_case cases[] = {
        { .pp = 1, .dp = 2, .tp = 1, .zero = 0 },
        { .pp = 1, .dp = 4, .tp = 1, .zero = 1 },
        { .pp = 1, .dp = 4, .tp = 1, .zero = 1, .tied = true, .deterministic = true },
        { .pp = 1, .dp = 2, .tp = 1, .zero = 2 },
        { .pp = 1, .dp = 4, .tp = 1, .zero = 3 },
        { .pp = 1, .dp = 1, .tp = 2, .zero = 1 },
        { .pp = 1, .dp = 2, .tp = 2, .zero = 1, .recompute = true },
        { .pp = 2, .dp = 1, .tp = 1, .zero = 1, .tied = true },
        { .pp = 2, .dp = 1, .tp = 1, .zero = 0, .chunks = 2 },
        { .pp = 2, .dp = 2, .tp = 2, .zero = 1 },
        { .pp = 2, .dp = 2, .tp = 1, .zero = 3, .chunks = 1 },
        { .pp = 2, .dp = 2, .tp = 1, .zero = 2, .chunks = 2 },
        { .pp = 2, .dp = 2, .tp = 1, .zero = 3, .chunks = 2 },
        { .pp = 1, .dp = 2, .tp = 1, .zero = 1, .ep = 2 },
        { .pp = 1, .dp = 2, .tp = 1, .zero = 2, .ep = 2 },
        { .pp = 1, .dp = 2, .tp = 1, .zero = 3, .ep = 2 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct mesh_case *c = &cases[i];
        enum { STEPS = 2 };
        double one[3], three[3], none, tokens, data = c->dp * ranks_of_ep(c), ranks = c->pp * data * c->tp,
                                               chunks = c->chunks ? c->chunks : 1,
                                               blocks = (3 * of_table(1) + LAYERS * of_layer(1, false)) / ALIGN;
        blocks += LAYERS * of_experts(1) / ALIGN;
        run_steps(c, 1, one, &none);
        run_steps(c, 1 + STEPS, three, &tokens);
        check(c, "dp", three[0] - one[0], STEPS * dp_bytes(c), STEPS * ranks * (data - 1) * 8 * (blocks + 8 * BATCH));
        check(c, "tp", three[1] - one[1], tp_bytes(c, tokens), STEPS * ranks * (c->tp - 1) * 8);
        check(c, "pp", three[2] - one[2], pp_bytes(c, tokens, STEPS),
              STEPS * ranks * (c->pp - 1) * chunks * TREE_NODES * sizeof(double));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(counts_are_the_formulas) };
    return cmocka_run_group_tests(tests, make_data, remove_data);
}
