/* hf_lora: the adapters of a step (part adapter, model/lora.h) for `tessera ckpt export`: merged into the weights they
 * adapt, or as a folder that peft reads. Not collective. */
#ifndef TESSERA_TRAINER_HF_HF_LORA_H
#define TESSERA_TRAINER_HF_HF_LORA_H

#include "ckpt/layout.h"
#include "ckpt/tessera.h"
#include "comm/base/status.h"

/* An adapter in memory, as f32. Zeroed: none. */
struct hf_adapter {
    float *a, *b; /* [rank, K], [M, rank] */
    uint64_t rank, k;
    float scale;
};

/* Whether the step that t settled on has an adapter of the matrix `name` ("....q_proj.weight", or of one expert:
 * "....experts.7.up_proj.weight"). */
bool hf_adapter_exists(tessera *t, const char *name);
/* Load it; `config` is the step's stored configuration. NOT_FOUND, CORRUPT. */
status *hf_adapter_load(tessera *t, uint64_t step, const char *name, const char *config,
                        struct hf_adapter *out) WARN_UNUSED;
void hf_adapter_free(struct hf_adapter *a);

#define HF_ADAPTER_PREFIX "base_model.model." /* of peft's names, before ours */
/* peft's adapter_config.json for a stored configuration and the step's adapters; the caller frees it (mem_free). */
status *hf_adapter_json(tessera *t, const char *config, char **text) WARN_UNUSED;

#endif
