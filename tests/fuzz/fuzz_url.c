/* fuzz_url: one text as a store's URL, an object's key, a step directory's name, a file named by a metadata file, and a
 * part. Nothing is created outside memory. A key that passes the check names one object below the root. */
#include "ckpt/commit.h"
#include "storage/store.h"
#include "tests/fuzz/fuzz.h"

static void try_url(const char *url)
{
    struct store *s;
    if (!strncmp(url, "s3:", 3)) /* it would ask a server; fuzz_s3_url reads such URLs */
        return;
    if (fuzz_ok(store_open(url, false, &s)))
        store_close(s);
}

static bool climbs(const char *key)
{
    char text[STORE_KEY_BYTES + 3];
    snprintf(text, sizeof text, "/%s/", key);
    return strstr(text, "/../") || strstr(text, "/./") || strstr(text, "//");
}

static void try_key(const char *key)
{
    struct store *s;
    MUST(fuzz_ok(store_open("mem:", true, &s)));
    bool good = fuzz_ok(store_check_key(key));
    MUST(!good || (*key && !climbs(key) && strlen(key) < STORE_KEY_BYTES));
    MUST(good == fuzz_ok(store_put(s, key, "x", 1, STORE_EXCLUSIVE)));
    struct store_info info = { 0 };
    MUST(good == fuzz_ok(store_stat(s, key, &info)));
    MUST(!good || info.bytes == 1);
    char top[STORE_KEY_BYTES] = "";
    struct store_list l;
    MUST(fuzz_ok(store_list(s, "", &l)));
    MUST(l.count == good);
    if (good) {
        memcpy(top, key, strcspn(key, "/"));
        MUST(!strcmp(l.entry[0].name, top));
    }
    store_list_free(&l);
    store_close(s);
}

static void try_names(const char *text)
{
    char dir[STEP_DIR_BYTES], key[STORE_KEY_BYTES];
    uint64_t step;
    if (commit_parse_dir(text, &step)) {
        commit_step_dir(step, dir);
        MUST(!strcmp(dir, text));
    }
    if (fuzz_ok(commit_file_key(7, text, key)))
        MUST(fuzz_ok(store_check_key(key)) && !strncmp(key, "step-000000000007/", 18) && !strchr(key + 18, '/'));
    commit_shard_key(UINT64_MAX, text, 99999, UINT64_MAX, key);
    const char *name = strchr(key, '/');
    MUST(name && !strchr(name + 1, '/') && strlen(key) < STORE_KEY_BYTES - 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *text = fuzz_text(data, n);
    try_url(text);
    try_key(text);
    try_names(text);
    mem_free(text);
    return 0;
}
