/* model: parameters declared once, a forward pass over ops, nothing else. One file a family: model_<name>.c defines
 * model_<name>_ops.
 *
 * A tensor's name, shape, initialisation and placement are written once, in `declare`; the checkpoint list,
 * weight-decay mask, sharding and export all come from that list. Names are the Hugging Face ones. */
#ifndef TESSERA_TRAINER_MODEL_MODEL_H
#define TESSERA_TRAINER_MODEL_MODEL_H

#include "ckpt/layout.h"
#include "comm/base/options.h"
#include "trainer/ops/ops.h"

enum param_init { INIT_NORMAL, INIT_ONE, INIT_ZERO, INIT_UNIFORM };

enum { PARAM_NAME_BYTES = 96, PARAM_ALIGN = 1024 /* elements; 4 KiB of f32 */ };

/* Where the parts of a parameter that tensor parallelism cuts may end, for `declare`: at multiples of `unit` along the
 * cut dimension. */
enum cut_fit {
    CUT_EVEN,   /* parts of equal size: the ranks must divide the units */
    CUT_SHARED, /* or the units the ranks: then neighbouring ranks hold the same unit */
    CUT_UNEVEN, /* rows only: parts differ by a unit at most; in memory shorter ones are padded with zeros to the
                   longest */
};
struct param_cut {
    uint64_t unit; /* 0: 1 */
    enum cut_fit fit;
    const char *units; /* the key that counts the units, for messages: "model.heads" */
};

struct param {
    char name[PARAM_NAME_BYTES]; /* "model.layers.0.self_attn.q_proj.weight" */
    struct shape shape;          /* of the whole tensor */
    enum param_init init;
    float init_std;       /* INIT_UNIFORM: draws are from -init_std to init_std */
    bool decay;           /* weight decay applies */
    int alias;            /* index of the parameter whose memory this name shares (tied weights), or -1 */
    int cut[LAYOUT_DIMS]; /* mesh axis that cuts each dimension (MESH_TP; one dimension at most), or -1 */
    struct param_cut rule;
    int block;          /* the block (op_block) that alone uses it, or -1 */
    bool on_heads;      /* whole, but applied to this rank's heads: its gradient is a part of the whole one's */
    bool linear;        /* the matrix of a linear layer, or of each expert's: lora.h may adapt it */
    bool frozen;        /* does not train: no gradient, no optimiser state */
    bool buffer;        /* frozen, but steps change it by other means: saved anew each time */
    bool experts;       /* dimension 0 counts experts */
    bool adapter;       /* a matrix that lora.h added */
    bool muon;          /* a matrix that Muon updates; AdamW the others */
    int lora_a, lora_b; /* indices of the adapter's matrices, or -1 */
    int unit;           /* of the model's units (stages.h), the one that it is part of */
    bool away;          /* another pipeline stage holds it (of an alias: its target): here it has a name and a shape,
                         * and no elements */

    struct box box;         /* what of it this rank holds; padding is no part of it */
    int share;              /* so many neighbouring tensor-parallel ranks hold the same box (1: only this one) */
    bool partial;           /* share > 1, and the gradients of these ranks add up to the gradient */
    uint64_t offset;        /* first element in the flat block; a multiple of PARAM_ALIGN. The same on all ranks; those
                             * of frozen ones come after all others */
    struct tensor value;    /* the box, padded; data and grad point into the blocks */
    struct tensor_cut part; /* what value.cut points to */
};

enum { TP_MAX = 8 }; /* ranks that parallel.tp can be */

/* A rank's place among those that a model is cut over. */
struct tp_place {
    int size, rank;      /* of tensor parallelism */
    bool sequence;       /* activations between blocks are cut by tokens (parallel.sequence) */
    bool apart;          /* a tied weight's uses have a gradient each (model.tied) even if one rank has both */
    int stages, stage;   /* of the pipeline: ranks, and which of them; stages 0 is 1 */
    int chunks;          /* stages of the pipeline on each rank, `stages` apart; 0 is 1 */
    const char *list;    /* stages.h; may be NULL. Borrowed for the call */
    int experts, expert; /* ranks of expert parallelism, this one's number; 0 is 1. Above 1: what trains of experts lies
                          * behind all else that trains */
};

/* A run of units on this pipeline rank. */
enum { CHUNKS_MAX = 16 };
struct param_chunk {
    int unit_begin, unit_end;
    uint64_t begin;  /* of what trains here, its first element; chunks lie one behind another */
    uint64_t before; /* of what trains in the whole model, elements before it, of the same tensor-parallel rank */
};

/* All parameters of a model: one block of values, and one of gradients (or none) of those that train. */
struct params {
    struct param *p;
    int count, cap;
    uint64_t total;   /* elements that train, paddings included: of the block of gradients; a multiple of PARAM_ALIGN */
    uint64_t frozen;  /* further elements of the block of values: of frozen parameters; the same */
    uint64_t experts; /* of total: of experts, at its end; 0: they lie among the others */
    int unit;         /* for `declare`: of what is added next */
    int chunks;       /* runs of units that are here; 0: all units, as one run */
    struct param_chunk chunk[CHUNKS_MAX]; /* of what lies before `experts` */
    float *data, *grad;
    struct compute *compute; /* where the blocks are (compute.h), to be set before they are; NULL: the host. Borrowed */
    struct params *whole;    /* of a view (parallel/experts.h): the list that this is a part of; else NULL */
};

/* For `declare`: append a parameter of 1 or 2 dimensions (rows 0: one dimension). NULL when out of memory. */
struct param *params_add(struct params *ps, const char *name, uint64_t rows, uint64_t cols, enum param_init init,
                         float std, bool decay);
/* The same of any shape of 1 to 3 dimensions. */
struct param *params_add_shape(struct params *ps, const char *name, const struct shape *shape, enum param_init init,
                               float std, bool decay);
/* Append a name that shares the memory of parameter `of`. */
struct param *params_alias(struct params *ps, const char *name, const struct param *of);
/* Set every parameter's part, tensor and offset for a place and the units that are here, from what was declared.
 * INVALID names the parameter that `size` does not fit, with the sizes that fit all. */
status *params_spread(struct params *ps, const struct tp_place *at) WARN_UNUSED;
/* Elements of the block that are p's: those of its part, and its padding. */
uint64_t param_elems(const struct param *p);
/* Give the blocks memory of params.compute; with_grad false: values only. */
status *params_alloc(struct params *ps, bool with_grad) WARN_UNUSED;
status *params_alloc_grads(struct params *ps) WARN_UNUSED; /* gradients only */
/* Fill with initial values: element e of a whole tensor is std * N(0,1) drawn at (seed, hash of name, e): the same on
 * every mesh. Drawn by the host, a piece at a time. */
status *params_init(struct params *ps, uint64_t seed) WARN_UNUSED;
void param_init(const struct param *p, uint64_t seed, float *x); /* of one, to x, the host's; paddings stay */
void params_free(struct params *ps);
/* Runs of units that are here, at least 1; does run `chunk` hold a unit; its elements among those that train. */
int params_chunks(const struct params *ps);
bool params_hold(const struct params *ps, int chunk, int64_t unit);
void params_chunk_elems(const struct params *ps, int chunk, uint64_t *begin, uint64_t *end);
struct param *params_find(const struct params *ps, const char *name);
uint64_t params_unique_elems(const struct params *ps);  /* of whole tensors, without aliases */
uint64_t params_trained_elems(const struct params *ps); /* of these, of tensors that are not frozen */
size_t params_bytes(const struct params *ps);           /* of the block of values */

/* A packed micro-batch of token sequences as models see it. Borrowed. */
struct model_input {
    int64_t tokens;
    const int32_t *token; /* [N] */
    struct segments seg;
    struct kv_cache *cache; /* [layers], or NULL */
    uint32_t micro_batch;   /* its number in the step, for model.load */
    int chunk;              /* of params.chunk, the one to run */
    uint64_t content;       /* a hash of the whole pack's tokens and segments, for model.routes */
    int64_t padding;        /* so many of the tokens, the last ones, are none (pack.own) */
    struct tensor *x;       /* what the pipeline stage before has made of them (op_boundary); NULL on the first stage */
};

/* What a cache of keys and values needs to know; layers: of the whole model; kv_heads: those that this rank holds. */
struct kv_shape {
    int32_t layers, kv_heads, head_dim;
    int64_t max_positions;
};

/* What training passes see of routed experts (struct route_watch), by micro-batch and layer; arrays are in the memory
 * of activations. */
struct expert_load {
    int64_t layers, experts; /* of the whole model */
    int32_t *count;          /* [micro-batches][layers][experts] */
    double *balance;         /* [micro-batches][layers] */
    float balance_weight;
};

struct model;
struct model_ops {
    const char *name;
    const struct option_table *options; /* section "model"; the first field of the config struct is `int kind` */
    size_t config_bytes;
    status *(*check)(const void *config); /* what single option rows cannot: heads divide, head size even, ... */
    status *(*declare)(struct model *m);  /* fill m->params; keep what forward needs in m->impl */
    /* Units of in->chunk: final hidden states [N, C], normalised; before the last pipeline stage, those between two
     * layers. */
    struct tensor *(*forward)(struct model *m, struct tape *t, const struct model_input *in);
    struct tensor *(*head)(struct model *m);                               /* output matrix [V, C]; last stage only */
    double (*flops_per_token)(const struct model *m, double mean_context); /* forward; multiply-adds count 2 */
    struct kv_shape (*kv_shape)(const struct model *m);
    int (*layers)(const struct model *m); /* of the whole model: what pipeline stages divide */
    void (*close)(struct model *m);       /* frees impl */
};

struct model {
    const struct model_ops *ops;
    void *config; /* owned copy; strings in it stay the config's */
    struct params params;
    /* A tied weight (an alias in params) whose two uses are kept apart: its use under the alias. One parameter, or
     * none. It has a gradient of its own, and values of its own where its target is on another stage (parallel/tied.h).
     */
    struct params tied;
    int64_t vocab, width; /* width: C; both set by `declare` */
    struct {              /* set by `declare`; experts 0: it has none */
        int64_t experts, layers;
        double balance, rate; /* coefficient of the balance loss; what a step adds to or takes from a bias */
    } moe;
    const struct expert_load *load; /* borrowed; NULL: nobody looks */
    struct routes *routes;          /* borrowed; NULL: none (ops/routes.h) */
    uint32_t role;                  /* in these */
    void *impl;
    float lora_scale;  /* lora.h: a layer with an adapter is W + lora_scale B A; */
    bool adapters_off; /* or, while this is set, W */
};

/* For `forward`: y = x w^T + b, with the adapter of parameter w, if it has one; indices into params.p, bias -1: none.
 */
struct tensor *model_linear(struct model *m, struct tape *t, struct tensor *x, int w, int bias);
/* onto + that, for a residual stream (op_linear_add). */
struct tensor *model_linear_add(struct model *m, struct tape *t, struct tensor *onto, struct tensor *x, int w,
                                int bias);

/* For `forward`: the adapter of parameter w; a NULL: it has none, or adapters are off. */
struct low_rank model_adapter(struct model *m, int w);

extern const struct model_ops *const model_registry[]; /* generated; ends with NULL */

/* The registry row, or INVALID with the list of names. */
status *model_lookup(const char *name, const struct model_ops **out) WARN_UNUSED;
/* Declare a model from a filled config struct (copied). Parameters have no memory yet. vocab is the tokenizer's. */
status *model_open(const struct model_ops *ops, const void *config, int64_t vocab, struct model **out) WARN_UNUSED;
/* Memory of params and tied; with_grad false: values only. */
status *model_alloc(struct model *m, bool with_grad) WARN_UNUSED;
/* The same of tied alone: values of this dtype, only where its target is on another stage. */
status *model_alloc_tied(struct model *m, enum dtype dtype, bool with_grad) WARN_UNUSED;
/* model_open, cut for a place: INVALID (alike on all ranks) if the model cannot be cut so. */
status *model_open_at(const struct model_ops *ops, const void *config, int64_t vocab, const struct tp_place *at,
                      struct model **out) WARN_UNUSED;
/* The same, of which a part trains (lora.h); tuning NULL: all. INVALID: a pattern fits nothing, or nothing trains. */
struct tuning;
status *model_open_tuned(const struct model_ops *ops, const void *config, int64_t vocab, const struct tp_place *at,
                         const struct tuning *tuning, struct model **out) WARN_UNUSED;
void model_close(struct model *m);

#endif
