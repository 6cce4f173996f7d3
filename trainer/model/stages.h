/* stages: which part of a model a pipeline stage holds. A model of L layers has L + 2 units in order: 0 is the
 * embedding, 1 to L the layers, L + 1 the final norm and the head. A stage holds units [begin, end). A rank has one
 * stage, or with an interleaved schedule several, P apart (parallel/schedule.h). Pure. */
#ifndef TESSERA_TRAINER_MODEL_STAGES_H
#define TESSERA_TRAINER_MODEL_STAGES_H

#include "comm/base/status.h"

/* list: layers of each stage, "3,5,4" (parallel.stages); the embedding goes to the first stage and the head to the
 * last. "" or NULL: units are cut evenly. INVALID names the key, what is wrong and what is legal: the list has a number
 * a stage and they add up to the layers; a stage that has neither embedding nor head has a layer. chunks: how many of
 * the stages each rank has, for messages; it divides them. */
status *stages_cut(const char *list, int layers, int stages, int chunks, int stage, int *begin, int *end) WARN_UNUSED;

#endif
