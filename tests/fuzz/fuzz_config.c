/* fuzz_config: a YAML text, then overrides, each after a NUL. What parses prints as text, and that text is no other
 * config than itself. The input is also taken for the text that a checkpoint stored. */
#include "tests/fuzz/fuzz.h"
#include "trainer/config.h"

enum { OVERRIDES = 8 };

static void compare(const struct config *c, const char *stored)
{
    char *text, note[200];
    MUST(fuzz_ok(config_text(c, &text)));
    MUST(fuzz_ok(config_compare(c, text, note, sizeof note)) && !*note);
    mem_free(text);
    fuzz_ok(config_compare(c, stored, note, sizeof note));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *text = fuzz_text(data, n), *override[OVERRIDES];
    int count = 0;
    size_t yaml = strlen(text);
    for (size_t at = yaml + 1; at < n && count < OVERRIDES; at += strlen(text + at) + 1)
        override[count++] = text + at;
    struct config *c;
    if (fuzz_ok(config_parse(text, yaml, "fuzz.yaml", count, override, &c))) {
        compare(c, text);
        config_free(c);
    }
    mem_free(text);
    return 0;
}
