/* generate: text generation inside the trainer: a batch of prompts, continued token by token against caches of keys and
 * values until each has ended.
 *
 *     TRY(generator_open(model, tape, NULL, 16, longest_prompt, 32, &g));
 *     TRY(generate(g, &(struct generate_options){ .eos = TOKEN_EOS }, prompt, n, completion));   // greedy
 *
 * What a prompt gets depends on the weights, its tokens, its sample number and the options, and on nothing else: not on
 * the batch, its other prompts, threads or ranks (tensor-parallel ranks round otherwise). A token decoded against the
 * cache has the bits of a full pass over its sequence, and so has its log-probability: where the policy has not moved
 * since, the ratio to a training pass is exactly 1. */
#ifndef TESSERA_TRAINER_ROLLOUT_GENERATE_H
#define TESSERA_TRAINER_ROLLOUT_GENERATE_H

#include "trainer/model/model.h"

#include <stdbool.h>

struct generator;

/* Room for `batch` prompts of at most longest_prompt tokens and max_tokens new ones each (all at least 1). pp: the
 * ranks that have the other stages of the model, in order; NULL: m is whole. model, tape and pp are borrowed; the tape
 * is left with the memory that the largest batch takes (TAPE_DRY passes). Caches have room for what of the model is
 * here. INVALID if sequences outgrow the model's positions. Not collective. */
status *generator_open(struct model *m, struct tape *t, struct comm *pp, int32_t batch, int32_t longest_prompt,
                       int32_t max_tokens, struct generator **out) WARN_UNUSED;
void generator_close(struct generator *g); /* NULL is fine */

struct generate_options {
    int32_t eos;       /* ends a completion; negative: none does */
    float temperature; /* 0: the most likely token each time */
    uint64_t seed;     /* draws are at (seed, the prompt's sample, step, RNG_GENERATE), one element a token */
    uint32_t step;
    bool logps; /* fill completion.logp */
};

struct prompt {
    const int32_t *token; /* [count], count >= 1 */
    int32_t count;
    uint32_t sample; /* number of this sequence among all of the step, whatever rank and batch it is in */
};

/* Belongs to the generator until its next call. */
struct completion {
    const int32_t *token; /* [count], count >= 1; the end token, if it came, is the last */
    const float *logp;    /* [count] log softmax(logits / temperature)[token] (temperature 0: of 1), as op_logprob gives
                             it; NULL without options.logps */
    int32_t count;
    bool ended; /* by the end token; false: max_tokens were reached */
};

/* Continue prompt[0..n), n <= batch, into out[n], on all stages. No allocation, but in messages. Collective over pp and
 * the tape's tensor-parallel ranks, with the same prompts, and over its ranks of experts, each with prompts of its own
 * or none; a rank's error leaves the others waiting. INVALID for a prompt that is empty or too long, or a token that
 * the model does not have. */
status *generate(struct generator *g, const struct generate_options *o, const struct prompt *prompt, int32_t n,
                 struct completion *out) WARN_UNUSED;

#endif
