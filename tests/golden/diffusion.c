/* Cases of diffusion.json: so far its random numbers. Inputs and results stand together in such a file, so a case is
 * copied and its results replaced by ours. */
#include "tests/golden/golden.h"

#include "comm/base/philox.h"

/* words[n] of a list of 32-bit integers. */
static status *words_of(const json_t *o, const char *key, size_t n, uint32_t *words)
{
    const json_t *list = json_object_get(o, key);
    if (json_array_size(list) != n)
        return ERR(INVALID, "%s is no list of %zu words", key, n);
    for (size_t i = 0; i < n; i++)
        words[i] = (uint32_t)json_integer_value(json_array_get(list, i));
    return NULL;
}

static status *replace_blocks(json_t *blocks)
{
    for (size_t i = 0; i < json_array_size(blocks); i++) {
        json_t *b = json_array_get(blocks, i);
        uint32_t counter[4], key[2], out[4];
        TRY(words_of(b, "ctr", 4, counter));
        TRY(words_of(b, "key", 2, key));
        philox4x32(counter, key, out);
        json_t *list = json_array();
        for (int j = 0; j < 4; j++)
            json_array_append_new(list, json_integer(out[j]));
        json_object_set_new(b, "out", list);
    }
    return NULL;
}

static status *replace_normals(json_t *blocks)
{
    for (size_t i = 0; i < json_array_size(blocks); i++) {
        json_t *b = json_array_get(blocks, i);
        uint32_t counter[4], key[2];
        TRY(words_of(b, "ctr", 4, counter));
        TRY(words_of(b, "key", 2, key));
        struct rng_at at = { (uint64_t)key[1] << 32 | key[0], counter[1], counter[2], counter[3] };
        json_t *list = json_array();
        for (uint64_t j = 0; j < 4; j++)
            json_array_append_new(list, json_real(rng_normal(at, 4 * (uint64_t)counter[0] + j)));
        json_object_set_new(b, "normals", list);
    }
    return NULL;
}

static status *run_philox(const struct golden_kind *k, const struct golden_case *c, json_t **got)
{
    (void)k;
    json_t *o = json_deep_copy(c->inputs);
    status *st = replace_blocks(json_object_get(o, "kat"));
    if (!st)
        st = replace_normals(json_object_get(o, "normals_box_muller"));
    if (st) {
        json_decref(o);
        return st;
    }
    *got = o;
    return NULL;
}

const struct golden_kind golden_diffusion[] = {
    { "philox4x32_10", "kat", "kat", GOLDEN_F64, run_philox, "", NULL, NULL },
    { 0 },
};
