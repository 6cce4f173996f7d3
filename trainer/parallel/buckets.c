/* buckets: see buckets.h. */
#include "trainer/parallel/buckets.h"

#include "comm/base/mem.h"

/* Has no gradient, or another name has it. */
static bool passed_over(const struct param *p)
{
    return p->alias >= 0 || p->frozen;
}

/* The end of the stretch of one unit that begins at `begin`, where parameter *i lies, and that unit; *i moves on. */
static uint64_t stretch(const struct params *p, bool units, uint64_t begin, int *i, int *unit)
{
    if (!units) {
        *unit = 0;
        return begin < p->total ? p->total : begin;
    }
    while (*i < p->count && (passed_over(&p->p[*i]) || p->p[*i].offset < begin))
        ++*i;
    *unit = *i < p->count ? p->p[*i].block + 1 : 0;
    for (; *i < p->count; ++*i)
        if (!passed_over(&p->p[*i]) && (p->p[*i].block + 1 != *unit || (!*unit && p->p[*i].offset > begin)))
            return p->p[*i].offset;
    return p->total;
}

/* Buckets in order; b NULL: counted only. */
static uint64_t list_buckets(const struct params *p, uint64_t elems, bool units, struct bucket *b)
{
    uint64_t n = 0;
    int i = 0;
    for (uint64_t at = 0; at < p->total;) {
        int unit;
        uint64_t end = stretch(p, units, at, &i, &unit);
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

status *buckets_open(const struct params *p, uint64_t elems, bool units, int ranks, int shards, int rank,
                     struct buckets *out)
{
    *out = (struct buckets){ .shards = shards, .reps = ranks / shards, .shard = rank % shards, .rep = rank / shards };
    out->units = 1;
    for (int i = 0; units && i < p->count; i++)
        if (p->p[i].block + 2 > out->units)
            out->units = p->p[i].block + 2;
    out->n = list_buckets(p, elems, units, NULL);
    out->b = mem_array(NULL, out->n + 1, sizeof *out->b);
    out->unit_elems = mem_calloc((size_t)out->units, sizeof *out->unit_elems);
    if (!out->b || !out->unit_elems)
        return ERR(NO_MEMORY, "%llu buckets", (unsigned long long)out->n);
    list_buckets(p, elems, units, out->b);
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
