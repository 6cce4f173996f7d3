/* optim: option rows of AdamW, schedules as closed forms. See optim.h. */
#include "trainer/optim/optim.h"

#include <math.h>

#define ROW(type_, field_, def_, min_, max_, choices_, unit_, help_)                                                   \
    {                                                                                                                  \
#field_, type_, def_, min_, max_, choices_, unit_, help_, offsetof(struct optim_config, field_)                \
    }

static const struct option rows[] = {
    ROW(OPT_FLOAT, lr, "3e-4", 0, 1, NULL, "", "peak learning rate"),
    ROW(OPT_FLOAT, min_lr, "0", 0, 1, NULL, "", "learning rate of the last step (linear and cosine)"),
    ROW(OPT_ENUM, schedule, "cosine", 0, 0, "constant|linear|cosine", "", "learning rate after the warm-up"),
    ROW(OPT_INT, warmup_steps, "0", 0, 1e12, NULL, "steps", "steps over which the learning rate rises to lr"),
    ROW(OPT_FLOAT, beta1, "0.9", 0, 0.999999, NULL, "", "AdamW: decay of the first moment"),
    ROW(OPT_FLOAT, beta2, "0.95", 0, 0.999999, NULL, "", "AdamW: decay of the second moment"),
    ROW(OPT_FLOAT, eps, "1e-8", 1e-30, 1, NULL, "", "AdamW: added to the root of the second moment"),
    ROW(OPT_FLOAT, weight_decay, "0", 0, 1e3, NULL, "", "AdamW: decoupled decay, of parameters that the model marks"),
    ROW(OPT_ENUM, kind, "adamw", 0, 0, "adamw|muon", "",
        "muon: matrices of linear layers, experts' too, by Muon, all else by AdamW"),
    ROW(OPT_LIST, muon, "*", 0, 0, NULL, "", "with muon: patterns of the layers whose matrices it updates"),
    ROW(OPT_FLOAT, muon_lr, "0.02", 0, 10, NULL, "", "with muon: its peak learning rate; follows the schedule of lr"),
    ROW(OPT_FLOAT, muon_momentum, "0.95", 0, 0.999999, NULL, "", "with muon: decay of its momentum"),
    ROW(OPT_BOOL, muon_nesterov, "true", 0, 0, NULL, "", "with muon: Nesterov's momentum"),
    ROW(OPT_ENUM, muon_scale, "original", 0, 0, "original|match_rms_adamw", "",
        "with muon: updates of an M x K matrix times sqrt(max(1, M / K)), or times 0.2 sqrt(max(M, K)) for AdamW's lr"),
    ROW(OPT_FLOAT, clip, "1", 0, 1e30, NULL, "", "largest global L2 norm of the gradient; 0: no clipping"),
};

const struct option_table optim_options = { "optim", rows, sizeof rows / sizeof rows[0] };

double schedule_lr(const struct optim_config *c, double peak_lr, uint64_t s, uint64_t total)
{
    const double pi = 3.14159265358979323846;
    uint64_t warmup = c->warmup_steps > 1 ? (uint64_t)c->warmup_steps : 1; /* no warm-up: step 0 has the peak */
    if (s < warmup)
        return peak_lr * ((double)(s + 1) / (double)warmup);
    if (c->schedule == SCHEDULE_CONSTANT)
        return peak_lr;
    double done = s >= total ? 1 : (double)(s - (warmup - 1)) / (double)(total - warmup);
    double left = c->schedule == SCHEDULE_LINEAR ? 1 - done : 0.5 * (1 + cos(pi * done));
    return c->min_lr + (peak_lr - c->min_lr) * left;
}
