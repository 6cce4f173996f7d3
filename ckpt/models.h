/* models: tensor tables of published models, and what every rank of a mesh would hold of one: descriptors as a save
 * gathers them, without a byte of tensor memory. For `tessera ckpt plan` and tests. Pure.
 *
 * Parallel cuts are Megatron's: tp cuts attention and MLP inputs by rows of the weight (column parallel), outputs by
 * columns (row parallel), embedding and head by vocabulary; pp gives each stage consecutive units (embedding, layers,
 * head), the largest stage as small as can be; ep divides the experts. Weights are bf16, replicated over dp (and cp,
 * and over ep but for experts). Optimiser state is f32: master weights and two moments; ZeRO-1 cuts each rank's flat
 * bucket over the replicas at multiples of 1,024 elements, ZeRO-0 replicates it. */
#ifndef TESSERA_CKPT_MODELS_H
#define TESSERA_CKPT_MODELS_H

#include "ckpt/plan.h"

struct model_table;

/* NULL: no model of that name. */
const struct model_table *model_find(const char *name);
/* Every name, joined by ", ". */
void model_names(char *text, size_t bytes);
uint64_t model_params(const struct model_table *t);
/* INVALID, with the reason, if the model cannot be cut so. */
status *model_fits(const struct model_table *t, const struct mesh *m, int zero) WARN_UNUSED;

/* What all ranks hold: each rank's descriptors adjacent, in rank order, with texts of its own. */
struct descs {
    struct plan_desc *desc;
    uint64_t count, cap;
    uint64_t *first; /* [ranks + 1] each rank's */
    char *text;
    size_t text_bytes, text_cap;
    int ranks;
};
void descs_free(struct descs *d);
status *model_descs(const struct model_table *t, const struct mesh *m, int zero, struct descs *out) WARN_UNUSED;
/* A made-up state: `tensors` f32 matrices of 4,096 rows or the next multiple of `pieces`, cut by rows into as many
 * pieces as `ranks`, one a rank. */
status *model_synthetic(uint64_t tensors, uint64_t pieces, int ranks, struct descs *out) WARN_UNUSED;

#endif
