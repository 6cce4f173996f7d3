/* hf_config: the config.json of a Hugging Face model as settings of section model, and back.
 *
 * Families: llama (also SmolLM2), mistral, qwen2, qwen3, and with routed experts qwen3_moe, deepseek (DeepSeekMoE),
 * dots1 (with DeepSeek-V3's router), deepseek_v2 and deepseek_v3. What a config.json asks for and this program does not
 * do (biases elsewhere, other scalings of positions, quantized weights) is UNSUPPORTED, in one line with the key; keys
 * that change no number are not looked at. Not collective. */
#ifndef TESSERA_TRAINER_HF_HF_CONFIG_H
#define TESSERA_TRAINER_HF_HF_CONFIG_H

#include "comm/base/status.h"

#include <stddef.h>
#include <stdint.h>

enum { HF_SETTINGS = 64, HF_KEY_BYTES = 24, HF_VALUE_BYTES = 128, HF_CONFIG_MAX = 1 << 20 };

struct hf_setting {
    char key[HF_KEY_BYTES], value[HF_VALUE_BYTES]; /* "heads", "32", as options_set reads them */
};
struct hf_config {
    struct hf_setting set[HF_SETTINGS];
    int count;
};

/* Settings from n bytes of JSON; `name` stands for the file in messages. INVALID: not JSON, or a key is missing or has
 * no legal value. */
status *hf_config_parse(const char *json, size_t n, const char *name, struct hf_config *out) WARN_UNUSED;
/* The same of FOLDER/config.json. NOT_FOUND: it is not there. */
status *hf_config_read(const char *folder, struct hf_config *out) WARN_UNUSED;
/* The value of a key, or NULL. Borrowed. */
const char *hf_config_get(const struct hf_config *c, const char *key);

/* Settings from a stored configuration (config_text): its lines "model.KEY=VALUE". */
status *hf_config_stored(const char *text, struct hf_config *out) WARN_UNUSED;
/* A stored vocabulary is 0 where it was the tokenizer's: let it be as many tokens as the embedding has rows. */
void hf_config_vocab(struct hf_config *c, uint64_t rows);
/* A config.json for these settings, with weights of that type ("F32" as in safetensors.h); the caller frees it
 * (mem_free). UNSUPPORTED: no family has such a model. */
status *hf_config_json(const struct hf_config *c, const char *dtype, char **text) WARN_UNUSED;

#endif
