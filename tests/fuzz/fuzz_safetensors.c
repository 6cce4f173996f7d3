/* fuzz_safetensors: any bytes as a file of weights, as the header of one, and as an index beside a good file. What
 * opens can be read whole: every tensor lies in the file, and together they fill it. */
#include "comm/base/bytes.h"
#include "tests/fuzz/fuzz.h"
#include "trainer/hf/hf_config.h"
#include "trainer/hf/safetensors.h"

#include <unistd.h>

static void put(struct store *s, const char *key, const void *bytes, size_t n)
{
    MUST(fuzz_ok(store_put(s, key, bytes, n, STORE_REPLACE)));
}

static void walk(const char *dir)
{
    struct safetensors *s;
    if (!fuzz_ok(safetensors_open(dir, &s)))
        return;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < s->count; i++) {
        const struct safetensor *t = &s->tensor[i];
        MUST(safetensors_find(s, t->name) == t && t->file < s->files);
        struct piece whole = piece_whole(&t->shape);
        unsigned char *bytes = mem_alloc(t->bytes + 1);
        MUST(bytes && fuzz_ok(safetensors_read(s, t, &whole, bytes)));
        mem_free(bytes);
        sum += t->bytes;
    }
    MUST(s->bytes_read == sum);
    safetensors_close(s);
}

static void try_header(const uint8_t *data, size_t n, uint64_t file_bytes)
{
    struct safetensor *t;
    uint64_t count = 0, end = 8 + n;
    char *text = fuzz_text(data, n);
    if (fuzz_ok(safetensors_parse(text, n, file_bytes, "header", &t, &count))) {
        for (uint64_t i = 0; i < count; i++) {
            MUST(t[i].at == end && dtype_bytes(t[i].dtype) && safetensors_dtype(t[i].dtype));
            end += t[i].bytes;
        }
        MUST(end == file_bytes);
        safetensors_list_free(t, count);
    }
    mem_free(text);
}

static void try_config(const uint8_t *data, size_t n)
{
    struct hf_config c, again;
    char *text = fuzz_text(data, n), *json = NULL;
    if (fuzz_ok(hf_config_parse(text, n, "config", &c)) && fuzz_ok(hf_config_json(&c, "F32", &json)))
        (void)fuzz_ok(hf_config_parse(json, strlen(json), "again", &again)); /* numbers may be ones that no model has */
    mem_free(json);
    mem_free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char good[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}";
    char dir[64], file[sizeof good + 9];
    struct store *s;
    try_config(data, n);
    try_header(data, n, 8 + n);
    try_header(data, n, 8 + n + 16);
    snprintf(dir, sizeof dir, "/dev/shm/fuzz-safetensors-%d", (int)getpid());
    MUST(fuzz_ok(store_open(dir, true, &s)));
    put(s, "model.safetensors", data, n);
    walk(dir);
    put_u64(file, sizeof good - 1);
    memcpy(file + 8, good, sizeof good - 1);
    memcpy(file + 8 + sizeof good - 1, "xy", 2);
    put(s, "x.safetensors", file, sizeof file);
    put(s, "model.safetensors.index.json", data, n);
    walk(dir);
    store_close(s);
    MUST(fuzz_ok(store_open("/dev/shm", false, &s)));
    MUST(fuzz_ok(store_remove_tree(s, dir + strlen("/dev/shm/"))));
    store_close(s);
    return 0;
}
