/* optim: learning-rate schedules and the options of AdamW, Muon and clipping (clip.h). Pure. */
#ifndef TESSERA_TRAINER_OPTIM_OPTIM_H
#define TESSERA_TRAINER_OPTIM_OPTIM_H

#include "comm/base/options.h"
#include "trainer/ops/clip.h"

enum optim_kind { OPTIM_ADAMW, OPTIM_MUON };
enum schedule_kind { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE };

struct optim_config { /* section "optim" */
    double lr, min_lr, beta1, beta2, eps, weight_decay, clip;
    int schedule;
    int64_t warmup_steps;
    int kind;
    char *muon;
    double muon_lr, muon_momentum;
    bool muon_nesterov;
    int muon_scale; /* enum muon_scale */
};
extern const struct option_table optim_options;

/* Learning rate of step s (0-based) of `total`: linear from lr / W to lr over the first W = warmup_steps steps, then
 * constant, or linear or cosine down to min_lr at step total - 1 and after it. W = 0: step 0 has lr, also when it is
 * the only one. */
double schedule_lr(const struct optim_config *c, double peak_lr, uint64_t s, uint64_t total);

#endif
