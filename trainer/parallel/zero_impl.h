/* zero_impl: what the files of zero share: zero.c opens, updates and sums scalars, zero_sum.c adds gradients.
 *
 * Invariants:
 * - Everything that decides who sends what (lane of a micro-batch, owner of a run, which tree nodes are empty) is
 *   a pure function of the options, dp, K and the buckets, so ranks agree on it without a message.
 * - What a group adds up is the field: with stages 0 and 1 the flat block, with 2 and 3 this shard's runs, one after
 *   another. A micro-batch's gradient of some elements (a leaf) is added to the open lane's sum; a closed lane is a
 *   node on the stack, combined with its siblings at once, in the memory of the earlier one. With stages 0 and 1 the
 *   last leaf stays in params.grad, where it is.
 * - A node is a value or empty (NULL); a parent is left + right if both have values, else the one that has.
 * - After zero_reduce the field (params.grad, or the first buffer) holds the global sum in this shard's runs.
 * - Buckets are summed over groups in the order of `due`, the same on all ranks whenever each of them begins: by a
 *   communicator of their own, so that other calls may come between. What comes of a bucket is added up by who finds it
 *   there, which may be another thread (progress.h): that reads the flight and what stays as it is for a step, and
 *   writes this rank's part of the bucket.
 *
 * Read add_leaf (a group's part of the tree), then collect_unit (how leaves come to a shard), then move_on (the rest of
 * the tree, bucket by bucket, with stages 0 and 1 while the last backward pass runs), then zero_update. */
#ifndef TESSERA_TRAINER_PARALLEL_ZERO_IMPL_H
#define TESSERA_TRAINER_PARALLEL_ZERO_IMPL_H

#include "trainer/ops/flat.h"
#include "trainer/parallel/shards.h"
#include "trainer/parallel/treesum.h"
#include "trainer/parallel/zero.h"

enum {
    LANES_MAX = 64,
    STACK_MAX = 2 * 6 + 1, /* nodes of a run of LANES_MAX lanes, and the one being pushed */
    FLIGHTS = 2,           /* buckets whose sums over groups are under way at a time */
};

/* A gradient summed over the lanes of tree node (level, index). */
struct grad_node {
    unsigned level;
    uint32_t index;
    float *value; /* NULL: none of its lanes has a micro-batch */
};

struct grad_stack {
    int n;
    struct grad_node node[STACK_MAX];
};

/* What a group has added so far. */
struct lane_sum {
    uint32_t lane;           /* first open lane */
    float *open;             /* its sum; NULL: none of its micro-batches has come */
    struct grad_stack stack; /* of closed lanes */
};

/* Passes of a chunk of the model, and their sum. Stages 2 and 3: sum is as of the pass before, after has this pass's
 * leaves too. */
struct chunk_sum {
    uint32_t pass;
    struct lane_sum sum, after;
};

/* An aligned node of one group's run of lanes: what that group sends. In order of lanes over all groups. */
struct part {
    int group, tag; /* tag: its number among the group's parts */
    unsigned level;
    uint32_t begin, end; /* lanes */
};

/* A bucket's place among those that are summed: with the last backward pass of this chunk of the model, and with stages
 * 0 and 1 as soon as that has left this unit. */
struct due {
    uint64_t bucket;
    int chunk, unit;
};

/* A bucket whose nodes are on their way between groups. */
struct flight {
    struct zero *of;
    uint64_t bucket;
    float *own[STACK_MAX]; /* this group's nodes, by tag */
    struct comm_req req;
    struct comm_xfer *xfer;
    float *recv; /* other groups' nodes */
};

/* grad_dtype bf16: what messages were before they became low ones, and these. */
struct low_room {
    struct comm_xfer *wide;
    uint16_t *low;
    size_t elems, narrowed; /* narrowed: messages that are in flight */
};

/* The global norm: its additions, and where its numbers are among plan.v. Between the phases of the plan numbers come
 * from other ranks. */
struct norm {
    struct sum_plan plan;
    uint32_t squares;               /* [blocks] of the blocks of this rank's parts, bucket by bucket */
    uint32_t nodes, node_cap;       /* [dp][node_cap]: each rank's nodes of these */
    uint32_t stages, tp;            /* [pp][chunks][TREE_NODES] of each stage's chunks, [tp] of each rank; or 0 */
    uint32_t total;                 /* of all */
    int own, over_dp, over_pp, sum; /* phases */
    struct uncounted {
        uint64_t first, n; /* blocks */
    } * uncounted;         /* [gaps]: what another rank of tp counts */
    uint64_t gaps;
};

struct zero {
    struct zero_options o;
    struct params *p;         /* borrowed */
    struct comm *dp;          /* borrowed */
    struct comm *shard, *rep; /* this replica's shards; this shard's replicas */
    struct shards *shards;    /* stages 2 and 3 */
    struct buckets own_k;     /* stages 0 and 1 */
    const struct buckets *k;
    struct comm *group; /* who exchanges sums: one rank of each group; dp or rep */
    struct comm *sums;  /* the same ranks, for sums over groups alone */
    uint32_t lanes;
    struct zero_moments moments;
    struct zero_run *run, *v_run;
    struct adamw_run *update; /* [params.count] of a bucket */
    bool gathered;            /* stage 0: gradients are whole already */

    struct part *part;
    int parts, own_parts;
    uint64_t field_elems;
    float *buffer[STACK_MAX]; /* [field_elems] each */
    int buffers;
    float *recv; /* [FLIGHTS x recv_bytes]: of flights; and other ranks' leaves of the run being added */
    size_t recv_bytes;
    struct comm_xfer *xfer;
    struct due *due; /* [k->n] */
    struct flight flight[FLIGHTS];
    float *cp_room; /* of sums over cp */
    uint64_t cp_elems;
    struct low_room low[FLIGHTS + 1]; /* of each flight, and of xfer */

    struct norm norm;
    struct shared_grads *shared;
    double *scalar; /* [dp][scalar_cap] of zero_sum_scalars */
    size_t scalar_cap;

    /* of the step: micro-batches, passes done, what was added; in the end all chunks' are as the first one's */
    uint32_t kk, pass;
    struct lane_sum sum;          /* stages 0 and 1: as of the last pass, whichever elements it has added so far */
    struct chunk_sum *chunk;      /* [chunks] */
    uint64_t added, begun, ended; /* of `due`: this group's sum is complete; exchanges begun, and finished */
    struct comm_req req;
    bool flying; /* leaves of bucket `collected` are on their way */
    uint64_t collected;
};

static inline struct compute *where(const struct zero *z)
{
    return z->p->compute;
}

static inline struct stream *stream_of(const struct zero *z)
{
    return compute_stream(where(z));
}

/* ---- who has what: pure ---- */

static inline bool is_cut(const struct zero *z)
{
    return z->o.stage >= 2;
}

static inline bool is_low(const struct zero *z)
{
    return z->o.grad_dtype == DTYPE_BF16;
}

static inline uint32_t part_of(uint64_t total, uint64_t n, uint64_t i)
{
    return (uint32_t)(total * i / n);
}

/* Ranks of a group, each with a micro-batch at a time. */
static inline uint32_t group_width(const struct zero *z)
{
    return is_cut(z) ? (uint32_t)z->k->shards : 1;
}

static inline uint32_t lane_of_group(const struct zero *z, int group)
{
    return part_of(z->lanes, (uint64_t)z->group->size, (uint64_t)group);
}

static inline uint32_t first_of_lane(const struct zero *z, uint32_t k, uint32_t lane)
{
    return part_of(k, z->lanes, lane);
}

static inline void group_micro_batches(const struct zero *z, uint32_t k, int group, uint32_t *first, uint32_t *end)
{
    *first = first_of_lane(z, k, lane_of_group(z, group));
    *end = first_of_lane(z, k, lane_of_group(z, group + 1));
}

/* The micro-batch of the rank at `place` of its group. */
static inline bool micro_batch_at(const struct zero *z, uint32_t k, uint32_t pass, int place, uint32_t *out)
{
    uint32_t first, end;
    group_micro_batches(z, k, z->group->rank, &first, &end);
    *out = first + pass * group_width(z) + (uint32_t)place;
    return *out < end;
}

static inline bool part_empty(const struct zero *z, const struct part *t)
{
    return first_of_lane(z, z->kk, t->begin) == first_of_lane(z, z->kk, t->end);
}

static inline struct zero_run own_run(const struct zero *z, uint64_t bucket)
{
    return bucket_run(z->k, bucket, z->k->shard);
}

static inline int chunk_of(const struct zero *z, uint64_t bucket)
{
    uint64_t begin, end;
    int c = 0;
    for (; c + 1 < params_chunks(z->p); c++) {
        params_chunk_elems(z->p, c, &begin, &end);
        if (z->k->b[bucket].begin < end)
            break;
    }
    return c;
}

/* The part of `run` that is in one chunk with its beginning; *block: the number of its first block among the norm's
 * blocks of the whole model. */
static inline struct zero_run norm_piece(const struct zero *z, struct zero_run run, int *chunk, uint64_t *block)
{
    uint64_t begin, end;
    params_chunk_elems(z->p, *chunk, &begin, &end);
    while (run.begin >= end && *chunk + 1 < params_chunks(z->p))
        params_chunk_elems(z->p, ++*chunk, &begin, &end);
    *block = (z->p->chunk[*chunk].before + (run.begin - begin)) / PARAM_ALIGN;
    return (struct zero_run){ run.begin, run.end < end ? run.end : end };
}

/* What of a bucket the rank of group `group` finishes the sum of, among those that exchange with this rank. */
static inline struct zero_run group_part(const struct zero *z, uint64_t bucket, int group)
{
    if (is_cut(z))
        return bucket_part(z->k, bucket, z->k->shard, group);
    return bucket_part(z->k, bucket, group % z->k->shards, group / z->k->shards);
}

static inline struct zero_run own_part(const struct zero *z, uint64_t bucket)
{
    return group_part(z, bucket, z->group->rank);
}

/* Where element `at` of the flat block, in this bucket, lies in the field. */
static inline uint64_t field_at(const struct zero *z, uint64_t bucket, uint64_t at)
{
    return is_cut(z) ? z->k->b[bucket].own + (at - own_run(z, bucket).begin) : at;
}

static inline float *field(const struct zero *z)
{
    return is_cut(z) ? z->buffer[0] : z->p->grad;
}

/* The ranks of c, each with a run of this bucket, give it to the others, in place in `block`, where element `origin` of
 * the flat block is. */
status *spread_bucket(struct zero *z, struct comm *c, uint64_t bucket, float *block, uint64_t origin, bool gradients,
                      struct zero_run (*run_of)(const struct zero *, uint64_t, int)) WARN_UNUSED;
/* List what the norm adds up, and take memory for it. Collective over pp. */
status *open_norm(struct zero *z) WARN_UNUSED;
void close_norm(struct zero *z);
/* For shards_collect: adds a unit's gradients. */
status *collect_unit(void *arg, int unit) WARN_UNUSED;

#endif
