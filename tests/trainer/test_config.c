/* config: presets of algorithms, and what keys of section "algo" say to each other. */
#include "trainer/config.h"

#include "comm/base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static status *parse(const char *algo, struct config **out)
{
    char text[1024];
    snprintf(text, sizeof text,
             "run: {name: t}\nmodel: {kind: llama, layers: 1, hidden: 8, heads: 1, ffn: 8}\n"
             "data: {sft: a, prefs: b, labelled: c}\ntrain: {steps: 10, global_batch: 1}\noptim: {lr: 1}\nalgo: {%s}\n",
             algo);
    return config_parse(text, strlen(text), "here", 0, NULL, out);
}

static char *text_of(const char *algo)
{
    struct config *c = NULL;
    char *text = NULL;
    status *st = parse(algo, &c);
    if (st)
        fail_msg("%s: %s", algo, status_message(st));
    assert_null(config_text(c, &text));
    config_free(c);
    return text;
}

/* Is there a line "algo.KEY=VALUE", values compared as numbers where they are some? */
static bool has(const char *text, const char *pair)
{
    char line[128];
    size_t key = strcspn(pair, "=") + 1;
    snprintf(line, sizeof line, "\nalgo.%.*s", (int)key, pair);
    const char *at = strstr(text, line);
    double got, want;
    if (!at)
        return false;
    at += strlen(line);
    if (sscanf(pair + key, "%lf", &want) == 1)
        return sscanf(at, "%lf", &got) == 1 && got == want;
    size_t n = strlen(pair + key);
    return !strncmp(at, pair + key, n) && at[n] == '\n';
}

static void refused(const char *algo, const char *words)
{
    struct config *c = NULL;
    status *st = parse(algo, &c);
    assert_null(c);
    if (!st || status_code(st) != ST_INVALID || !strstr(status_message(st), words))
        fail_msg("%s: %s", algo, st ? status_message(st) : "taken");
    status_free(st);
}

/* Every preset is taken, and says what it says; what the config sets itself stays. */
static void test_presets(void **state)
{
    (void)state;
    int presets = 0;
    for (size_t a = 0; algo_registry[a]; a++)
        for (const struct algo_preset *p = algo_registry[a]->presets; p && p->name; p++, presets++) {
            char algo[256], pair[64];
            snprintf(algo, sizeof algo, "kind: %s, preset: %s", algo_registry[a]->name, p->name);
            char *text = text_of(algo);
            int n;
            for (const char *at = p->settings; sscanf(at, "%63s%n", pair, &n) == 1; at += n)
                if (!has(text, pair))
                    fail_msg("%s does not say %s", algo, pair);
            mem_free(text);
            snprintf(algo, sizeof algo, "beta: 0.75, kind: %s, preset: %s", algo_registry[a]->name, p->name);
            text = text_of(algo);
            assert_true(has(text, "beta=0.75") && strlen(p->source) > 4);
            mem_free(text);
            for (const struct algo_preset *q = algo_registry[a]->presets; q < p; q++)
                assert_string_not_equal(p->name, q->name);
        }
    assert_true(presets >= 15);
}

static void test_preset_values(void **state)
{
    (void)state;
    static const char *const of[][3] = { { "kind: dpo, preset: simpo", "loss=simpo", "simpo_gamma=1" },
                                         { "kind: dpo, preset: ''", "loss=sigmoid", "beta=0.1" },
                                         { "kind: dpo, preset: tr_dpo", "reference=live", "ref_sync_steps=512" },
                                         { "preset: simpo, loss: hinge, kind: dpo", "loss=hinge", "beta=2" },
                                         { "kind: kto, preset: apo_zero_unpaired", "loss=apo_zero_unpaired",
                                           "beta=0.1" },
                                         { "kind: dpo, preset: sppo", "loss=sppo_hard", "beta=0.001" } };
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        char *text = text_of(of[i][0]);
        if (!has(text, of[i][1]) || !has(text, of[i][2]))
            fail_msg("%s: %s", of[i][0], text);
        mem_free(text);
    }
}

static void test_complaints(void **state)
{
    (void)state;
    refused("kind: dpo, preset: simp", "here:6: algo.preset: algo.kind dpo has no preset \"simp\" (legal: dpo, ");
    refused("kind: kto, preset: simpo", "(legal: kto, apo_zero_unpaired)");
    refused("kind: sft, preset: dpo", "(legal: none)");
    refused("kind: dpo, preset: simpo, reference_free: true", "no reference");
    refused("kind: dpo, ref_sync_steps: 5", "algo.ref_sync_steps needs algo.reference: live");
    refused("kind: dpo, reference: alive", "precomputed");
    refused("kind: kto, loss: hinge", "apo_zero_unpaired");
    refused("kind: kto, label_smoothing: 0.1", "label_smoothing");
    refused("kind: dpo}\ncomm: nccl\nmemory: {recompute: none",
            "comm: nccl moves the memory of GPUs: it needs device: cuda");
}

static void test_data_of_kinds(void **state)
{
    (void)state;
    static const char *const kinds[][3] = { { "dpo", "labelled: c", "data.prefs is required" },
                                            { "kto", "prefs: b", "data.labelled is required" },
                                            { "sft", "prefs: b, labelled: c", "data.sft is required" } };
    for (int i = 0; i < 3; i++) {
        char text[512];
        struct config *c = NULL;
        snprintf(text, sizeof text,
                 "run: {name: t}\nmodel: {kind: llama, layers: 1, hidden: 8, heads: 1, ffn: 8}\n"
                 "data: {%s}\ntrain: {steps: 10, global_batch: 1}\noptim: {lr: 1}\nalgo: {kind: %s}\n",
                 kinds[i][1], kinds[i][0]);
        status *st = config_parse(text, strlen(text), "here", 0, NULL, &c);
        assert_true(st && status_code(st) == ST_INVALID && strstr(status_message(st), kinds[i][2]));
        status_free(st);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_presets), cmocka_unit_test(test_preset_values),
                                        cmocka_unit_test(test_complaints), cmocka_unit_test(test_data_of_kinds) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
