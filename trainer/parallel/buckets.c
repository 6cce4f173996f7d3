/* buckets: see buckets.h. */
#include "trainer/parallel/buckets.h"

#include "comm/base/mem.h"

/* Parameters of one kind, in the elements of the flat block that are theirs. */
struct kind {
    const struct params *p;
    bool units, frozen;
    uint64_t begin, end;
};

/* Of another kind, or elements that another name or another pipeline stage has. */
static bool passed_over(const struct kind *k, const struct param *p)
{
    return p->alias >= 0 || p->away || p->frozen != k->frozen;
}

/* The end of the stretch of one unit that begins at `begin`, where parameter *i lies, and that unit; *i moves on. */
static uint64_t stretch(const struct kind *k, uint64_t begin, int *i, int *unit)
{
    const struct params *p = k->p;
    *unit = 0;
    if (!k->units)
        return k->end;
    while (*i < p->count && (passed_over(k, &p->p[*i]) || p->p[*i].offset < begin))
        ++*i;
    *unit = *i < p->count ? p->p[*i].block + 1 : 0;
    for (; *i < p->count; ++*i)
        if (!passed_over(k, &p->p[*i]) && (p->p[*i].block + 1 != *unit || (!*unit && p->p[*i].offset > begin)))
            return p->p[*i].offset;
    return k->end;
}

/* Buckets in order; b NULL: counted only. */
static uint64_t list_buckets(const struct kind *k, uint64_t elems, struct bucket *b)
{
    uint64_t n = 0;
    int i = 0;
    for (uint64_t at = k->begin; at < k->end;) {
        int unit;
        uint64_t end = stretch(k, at, &i, &unit);
        while (at < end) {
            uint64_t left = end - at, size = left < elems ? left : elems;
            if (b)
                b[n] = (struct bucket){ .begin = at, .end = at + size, .unit = unit };
            n++;
            at += size;
        }
    }
    return n;
}

status *buckets_open(const struct params *p, uint64_t elems, bool units, bool frozen, int ranks, int shards, int rank,
                     struct buckets *out)
{
    uint64_t begin = frozen ? p->total : 0, end = frozen ? p->total + p->frozen : p->total;
    const struct kind kind = { p, units, frozen, begin, end };
    *out = (struct buckets){ .shards = shards, .reps = ranks / shards, .shard = rank % shards, .rep = rank / shards };
    out->units = 1;
    for (int i = 0; units && i < p->count; i++)
        if (p->p[i].block + 2 > out->units)
            out->units = p->p[i].block + 2;
    out->n = list_buckets(&kind, elems, NULL);
    out->b = mem_array(NULL, out->n + 1, sizeof *out->b);
    out->unit_elems = mem_calloc((size_t)out->units, sizeof *out->unit_elems);
    if (!out->b || !out->unit_elems)
        return ERR(NO_MEMORY, "%llu buckets", (unsigned long long)out->n);
    list_buckets(&kind, elems, out->b);
    for (uint64_t b = 0; b < out->n; b++) {
        struct bucket *k = &out->b[b];
        uint64_t own = run_elems(bucket_run(out, b, out->shard));
        k->at = out->unit_elems[k->unit];
        k->own = out->own_elems;
        out->unit_elems[k->unit] += k->end - k->begin;
        out->own_elems += own;
        out->largest = own > out->largest ? own : out->largest;
    }
    return NULL;
}

void buckets_fini(struct buckets *k)
{
    mem_free(k->b);
    mem_free(k->unit_elems);
    *k = (struct buckets){ 0 };
}

static struct zero_run cut(struct zero_run all, int parts, int i)
{
    struct zero_run r;
    layout_cut_aligned(run_elems(all), PARAM_ALIGN, (uint64_t)parts, (uint64_t)i, &r.begin, &r.end);
    return (struct zero_run){ all.begin + r.begin, all.begin + r.end };
}

struct zero_run bucket_run(const struct buckets *k, uint64_t b, int shard)
{
    return cut((struct zero_run){ k->b[b].begin, k->b[b].end }, k->shards, shard);
}

struct zero_run bucket_part(const struct buckets *k, uint64_t b, int shard, int rep)
{
    return cut(bucket_run(k, b, shard), k->reps, rep);
}
