/* sample: logits -> a token. Pure. */
#ifndef TESSERA_TRAINER_ROLLOUT_SAMPLE_H
#define TESSERA_TRAINER_ROLLOUT_SAMPLE_H

#include <stdint.h>

/* logits [V], V >= 1. Temperature 0: the largest one's index, the lowest of equals. Above 0: the token whose share of
 * softmax(logits / temperature) `u`, in (0, 1), falls into; shares lie side by side by index. Sums are f64, ascending.
 */
int32_t sample_token(const float *logits, int64_t vocab, float temperature, double u);

#endif
