/* layout_grid: every mesh of 1 to 8 ranks, with every ZeRO stage that cuts something else, and recomputation. Models
 * are the smallest that all meshes of so many ranks can cut. */
#include "tests/trainer/layouts.h"

#include <stdio.h>
#include <string.h>

enum { ZEROS = 3, RECOMPUTES = 3, KINDS = 2, LOSSES = 2, VARIANTS = ZEROS * RECOMPUTES * KINDS * LOSSES };
static const int zeros[ZEROS] = { 0, 1, 3 };
static const char *const recomputes[RECOMPUTES] = { "none", "block", "attention" };
static const char *const schedules[] = { "1f1b", "zero-bubble", "interleaved" }; /* the last: two stages a rank */

struct grid_mesh {
    int ranks, pp, dp, ep, cp, tp;
};

/* Sizes that multiply to `ranks`, one list of them after the other. False: that was the last. */
static bool next_mesh(struct grid_mesh *m)
{
    for (;;) {
        int *const size[] = { &m->cp, &m->ep, &m->dp, &m->pp };
        int i = 0;
        for (; i < 4 && ++*size[i] > m->ranks; i++)
            *size[i] = 1;
        if (i == 4 && ++m->ranks > RANKS_MAX)
            return false;
        int others = m->pp * m->dp * m->ep * m->cp;
        m->tp = m->ranks / others;
        if (others * m->tp == m->ranks)
            return true;
    }
}

/* Heads, columns of feed-forward blocks and experts that all divisors of `ranks` divide; a layer for most stages. */
static void add_model(const struct grid_mesh *m, bool experts, bool odd, struct words *w)
{
    int heads = m->ranks % 3 == 0 ? 6 : m->ranks == 5 || m->ranks == 7 ? m->ranks : 8;
    words_add(w, "model.layers=%d", m->pp > 5 ? m->pp - 2 : 3);
    words_add(w, "model.hidden=20");
    words_add(w, "model.heads=%d", heads);
    words_add(w, "model.kv_heads=%d", heads == 8 ? 2 : heads == 6 ? 6 : 1);
    words_add(w, "model.head_dim=4");
    words_add(w, "model.ffn=%d", 3 * heads);
    words_add(w, "model.tied=%s", odd ? "true" : "false");
    words_add(w, "model.init_std=0.1");
    if (!experts)
        return;
    words_add(w, "model.experts=%d", heads);
    words_add(w, "model.experts_per_token=2");
    words_add(w, "model.expert_ffn=%d", 2 * heads);
    words_add(w, "model.shared_experts=1");
    words_add(w, "model.first_dense=1");
    words_add(w, "model.router=%s", odd ? "sigmoid" : "softmax");
    words_add(w, "model.router_bias=true");
    words_add(w, "model.balance_rate=0.01");
    words_add(w, "model.balance_loss=0.01");
}

static void add_loss(bool dpo, struct words *w)
{
    words_add(w, "algo.kind=%s", dpo ? "dpo" : "sft");
    if (dpo)
        words_add(w, "algo.warmup_sft_steps=3");
    words_add(w, "train.global_batch=8");
    words_add(w, "train.micro_batch=1");
    words_add(w, "train.lanes=8");
    words_add(w, "optim.clip=1");
    words_add(w, "optim.weight_decay=0.1");
}

static void make(const struct grid_mesh *m, int variant, struct layout_job *out)
{
    int loss = variant % LOSSES, kind = variant / LOSSES % KINDS, recompute = variant / (LOSSES * KINDS) % RECOMPUTES,
        zero = variant / (LOSSES * KINDS * RECOMPUTES);
    int turn = recompute + zero + m->pp + m->tp;
    bool odd = turn % 2;
    *out = (struct layout_job){ .ranks = m->ranks };
    add_model(m, kind, odd, &out->what);
    add_loss(loss, &out->what);
    words_add(&out->how, "parallel.pp=%d", m->pp);
    words_add(&out->how, "parallel.dp=%d", m->dp);
    words_add(&out->how, "parallel.ep=%d", m->ep);
    words_add(&out->how, "parallel.cp=%d", m->cp);
    words_add(&out->how, "parallel.tp=%d", m->tp);
    words_add(&out->how, "parallel.sequence=%s", m->tp > 1 && odd ? "true" : "false");
    words_add(&out->how, "parallel.schedule=%s", m->pp == 1 ? "1f1b" : schedules[turn % (m->pp == 2 ? 3 : 2)]);
    words_add(&out->how, "parallel.zero=%d", zeros[zero]);
    words_add(&out->how, "parallel.bucket=8K");
    words_add(&out->how, "memory.recompute=%s", recomputes[recompute]);
    words_add(&out->how, "threads=1");
}

/* Count up to `number`; returns how many there are where that is too many. */
static uint32_t count_to(uint32_t number, struct layout_job *out)
{
    struct grid_mesh m = { .ranks = 1, .pp = 1, .dp = 1, .ep = 1, .cp = 0 };
    uint32_t n = 0;
    while (next_mesh(&m))
        for (int v = 0; v < VARIANTS; v++) {
            bool experts = v / LOSSES % KINDS;
            if (m.ep > 1 && !experts)
                continue;
            if (n == number) {
                make(&m, v, out);
                return n;
            }
            n++;
        }
    return n;
}

bool grid_job(uint32_t number, struct layout_job *out)
{
    return number < grid_jobs() && count_to(number, out) == number;
}

uint32_t grid_jobs(void)
{
    return count_to(UINT32_MAX, NULL);
}
