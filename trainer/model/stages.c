/* stages: see stages.h. */
#include "trainer/model/stages.h"

#include "ckpt/layout.h"

#include <stdlib.h>
#include <string.h>

/* Layers before stage `stage` in a list whose numbers are checked. */
static int layers_before(const char *list, int stage)
{
    long sum = 0;
    for (; stage; stage--, list = strchr(list, ',') + 1)
        sum += strtol(list, NULL, 10);
    return (int)sum;
}

struct cut {
    const char *list;
    int layers, stages, chunks;
};

static status *bad_list(const struct cut *c, const char *why)
{
    return ERR(INVALID,
               "parallel.stages: \"%.100s\" %s: it needs %d numbers of layers, one for each of parallel.pp%s stages, "
               "that add up to model.layers: %d; only the first and the last may be 0",
               c->list, why, c->stages, c->chunks > 1 ? " x parallel.chunks" : "", c->layers);
}

static status *check_list(const struct cut *c)
{
    int count = 0;
    long sum = 0;
    for (const char *at = c->list;; at++) {
        char *end;
        if (*at < '0' || *at > '9')
            return bad_list(c, "is no list of numbers");
        long n = strtol(at, &end, 10);
        if (n > c->layers)
            return bad_list(c, "has more layers than the model");
        if (n == 0 && count != 0 && count != c->stages - 1)
            return bad_list(c, "leaves a stage in the middle without a layer");
        sum += n;
        count++;
        at = end;
        if (!*at)
            break;
        if (*at != ',' || count >= c->stages)
            return bad_list(c, *at == ',' ? "is too long" : "is no list of numbers");
    }
    if (count != c->stages)
        return bad_list(c, "is too short");
    return sum == c->layers ? NULL : bad_list(c, "does not add up");
}

/* The most chunks that leave every stage a unit. */
static status *too_many(const struct cut *c)
{
    int units = c->layers + 2, ranks = c->stages / c->chunks;
    if (c->chunks == 1 || units < ranks)
        return ERR(INVALID,
                   "parallel.pp: %d stages are more than the parts of a model with model.layers: %d (embedding, layers "
                   "and head: legal is 1 to %d)",
                   ranks, c->layers, units);
    return ERR(INVALID,
               "parallel.chunks: %d on each of parallel.pp: %d ranks are more than the parts of a model with "
               "model.layers: %d (embedding, layers and head: legal is 1 to %d)",
               c->chunks, ranks, c->layers, units / ranks);
}

status *stages_cut(const char *list, int layers, int stages, int chunks, int stage, int *begin, int *end)
{
    int units = layers + 2;
    struct cut c = { list, layers, stages, chunks };
    if (list && *list) {
        TRY(check_list(&c));
        *begin = stage == 0 ? 0 : 1 + layers_before(list, stage);
        *end = stage == stages - 1 ? units : 1 + layers_before(list, stage + 1);
        return NULL;
    }
    if (stages > units)
        return too_many(&c);
    uint64_t from, to;
    layout_cut((uint64_t)units, (uint64_t)stages, (uint64_t)stage, &from, &to);
    *begin = (int)from;
    *end = (int)to;
    return NULL;
}
