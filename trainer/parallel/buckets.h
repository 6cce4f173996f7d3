/* buckets: which rank owns which part of a model's flat block of parameters (model.h): of those that train, or of the
 * frozen ones behind them. Pure.
 *
 * The block is cut into buckets, in order. A bucket lies in one unit: unit 0 is all that is used outside of the model's
 * blocks, unit 1 + i is block i (param.block); without units there is one. dp ranks are reps x shards, shards fastest:
 * rank r is shard r % shards of replica r / shards. A bucket is cut over the shards at multiples of PARAM_ALIGN
 * elements (a shard's run), and each such run over the replicas (a rank's part): the same run is held by all replicas,
 * and summed in parts. */
#ifndef TESSERA_TRAINER_PARALLEL_BUCKETS_H
#define TESSERA_TRAINER_PARALLEL_BUCKETS_H

#include "trainer/model/model.h"

/* Elements [begin, end) of the flat block. */
struct zero_run {
    uint64_t begin, end;
};

struct bucket {
    uint64_t begin, end;
    int unit;
    uint64_t at;  /* elements of the unit's buckets before this one: its place in a copy of the unit */
    uint64_t own; /* elements of this shard's runs before this one: its place among what the shard keeps */
};

struct buckets {
    struct bucket *b; /* [n] */
    uint64_t n;
    uint64_t *unit_elems; /* [units] */
    int units;
    int shards, reps;
    int shard, rep;     /* of this rank */
    uint64_t own_elems; /* of this shard's runs */
    uint64_t largest;   /* this shard's longest run */
};

/* Buckets of `elems` elements (a multiple of PARAM_ALIGN) or less, for rank `rank` of `ranks` that `shards` divide.
 * units: buckets end where units do, and where parameters of unit 0 do: those of a parameter there are the same ones
 * wherever it lies. frozen: of frozen parameters, else of those that train. NO_MEMORY. */
status *buckets_open(const struct params *p, uint64_t elems, bool units, bool frozen, int ranks, int shards, int rank,
                     struct buckets *out) WARN_UNUSED;
void buckets_fini(struct buckets *k); /* {0} is fine */
/* The run of a shard in bucket b; the part of it that replica `rep` of that shard sums. */
struct zero_run bucket_run(const struct buckets *k, uint64_t b, int shard);
struct zero_run bucket_part(const struct buckets *k, uint64_t b, int shard, int rep);

static inline uint64_t run_elems(struct zero_run r)
{
    return r.end - r.begin;
}

#endif
