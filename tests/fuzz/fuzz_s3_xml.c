/* fuzz_s3_xml: one text as every XML reply of S3. What a walk hands out is bounded and ended; a page that goes on says
 * where; what was escaped reads back as it was. */
#include "storage/s3_xml.h"
#include "tests/fuzz/fuzz.h"

static status *hear(void *arg, const char *path, const char *text)
{
    uint64_t *heard = arg;
    MUST(*path && strlen(path) < S3_XML_PATH_BYTES && strlen(text) < S3_XML_TEXT_BYTES);
    ++*heard;
    return NULL;
}

static status *leave(void *arg, const char *path)
{
    return hear(arg, path, "");
}

static status *found(void *arg, const struct s3_found *f)
{
    uint64_t *heard = arg;
    MUST(strlen(f->key) < S3_XML_TEXT_BYTES);
    ++*heard;
    return NULL;
}

static status *same(void *arg, const char *path, const char *text)
{
    (void)path;
    MUST(!strcmp(arg, text));
    return NULL;
}

static void try_escaped(const char *text)
{
    struct s3_text t = { 0 };
    s3_text_add(&t, "<k>");
    s3_text_escaped(&t, text);
    s3_text_add(&t, "</k>");
    MUST(!t.failed);
    const struct s3_xml_sink sink = { .arg = (void *)text, .leaf = same };
    if (strlen(text) < S3_XML_TEXT_BYTES)
        MUST(fuzz_ok(s3_xml_walk(t.text, t.bytes, &sink)));
    mem_free(t.text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *text = fuzz_text(data, n), id[64], key[64];
    uint64_t heard = 0, ns;
    const struct s3_xml_sink sink = { .arg = &heard, .leaf = hear, .leave = leave };
    bool good = fuzz_ok(s3_xml_walk(text, n, &sink));
    MUST(!good || heard);
    struct s3_page page;
    heard = 0;
    if (fuzz_ok(s3_xml_page(text, n, found, &heard, &page)))
        MUST(good && heard == page.found && (!page.truncated || page.next[0]));
    struct s3_fault fault;
    if (s3_xml_fault(text, n, &fault))
        MUST(fault.code[0]);
    if (fuzz_ok(s3_xml_upload_id(text, n, id, sizeof id)))
        MUST(good && id[0]);
    if (fuzz_ok(s3_xml_deleted(text, n, key, sizeof key, &fault)))
        MUST(good);
    (void)s3_xml_time(text, &ns);
    try_escaped(text);
    mem_free(text);
    return 0;
}
