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

static status *bad_list(const char *list, int layers, int stages, const char *why)
{
    return ERR(INVALID,
               "parallel.stages: \"%.100s\" %s: it needs %d numbers of layers, one for each of parallel.pp stages, "
               "that add up to model.layers: %d; only the first and the last may be 0",
               list, why, stages, layers);
}

static status *check_list(const char *list, int layers, int stages)
{
    int count = 0;
    long sum = 0;
    for (const char *at = list;; at++) {
        char *end;
        if (*at < '0' || *at > '9')
            return bad_list(list, layers, stages, "is no list of numbers");
        long n = strtol(at, &end, 10);
        if (n > layers)
            return bad_list(list, layers, stages, "has more layers than the model");
        if (n == 0 && count != 0 && count != stages - 1)
            return bad_list(list, layers, stages, "leaves a stage in the middle without a layer");
        sum += n;
        count++;
        at = end;
        if (!*at)
            break;
        if (*at != ',' || count >= stages)
            return bad_list(list, layers, stages, *at == ',' ? "is too long" : "is no list of numbers");
    }
    if (count != stages)
        return bad_list(list, layers, stages, "is too short");
    return sum == layers ? NULL : bad_list(list, layers, stages, "does not add up");
}

status *stages_cut(const char *list, int layers, int stages, int stage, int *begin, int *end)
{
    int units = layers + 2;
    if (list && *list) {
        TRY(check_list(list, layers, stages));
        *begin = stage == 0 ? 0 : 1 + layers_before(list, stage);
        *end = stage == stages - 1 ? units : 1 + layers_before(list, stage + 1);
        return NULL;
    }
    if (stages > units)
        return ERR(INVALID,
                   "parallel.pp: %d stages are more than the parts of a model with model.layers: %d (embedding, layers "
                   "and head: legal is 1 to %d)",
                   stages, layers, units);
    uint64_t from, to;
    layout_cut((uint64_t)units, (uint64_t)stages, (uint64_t)stage, &from, &to);
    *begin = (int)from;
    *end = (int)to;
    return NULL;
}
