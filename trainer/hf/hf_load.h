/* hf_load: weights of a folder into parameters that are spread over ranks in whatever way. */
#ifndef TESSERA_TRAINER_HF_HF_LOAD_H
#define TESSERA_TRAINER_HF_HF_LOAD_H

#include "ckpt/tessera.h"
#include "comm/comm.h"
#include "trainer/hf/safetensors.h"
#include "trainer/model/model.h"

/* A tensor of part "model" as a state describes it: whole, its memory not yet named. `name` is borrowed. */
struct tessera_tensor hf_tensor(const char *name, enum dtype dtype, const struct shape *shape);

/* Experts' matrices are one tensor here and one for each of them there: hf_name is the name of expert e's
 * ("model.layers.0.mlp.experts.3.gate_proj.weight"; of another name, that name), hf_expert the way back: the number, or
 * -1 of a name that has none. Neither is collective. */
void hf_name(const char *ours, uint64_t e, char out[PARAM_NAME_BYTES]);
int64_t hf_expert(const char *theirs, char ours[PARAM_NAME_BYTES]);
/* A tensor of a folder as such a part of ours: of expert e of `experts`; or, with e -1, hf_tensor. `ours` is borrowed.
 */
struct tessera_tensor hf_part(const char *ours, enum dtype dtype, const struct shape *theirs, int64_t e,
                              uint64_t experts);

/* Hold names, shapes and types against the parameters. INVALID names all that are missing, unexpected, misshapen or no
 * floats. Not missed: names that share another's memory. Not unexpected: such names, and buffers of angles
 * (*.rotary_emb.inv_freq) that old files have. Not collective. */
status *hf_match(const struct safetensors *s, const struct params *ps) WARN_UNUSED;

/* Fill the parameters' parts on every rank of `world`. Each rank reads 1/n of every tensor, once, and what it holds
 * comes from those who have read it (tessera_reshard), cast if types differ, rounded once; some tensors at a time, so
 * that a rank needs the larger of 256 MiB and its share of the largest one besides the parameters; where these are in
 * another memory than the host's, what it holds of these tensors besides. *read: bytes that
 * this rank read. Collective; errors are the same on all ranks, and leave the values undefined. */
status *hf_load(struct comm *world, const char *folder, struct params *ps, uint64_t *read) WARN_UNUSED;

#endif
