/* fuzz_http: lines as the headers of a reply, and as dates. What is kept is found again, has no control character, and
 * never more than there is room for. */
#include "storage/http.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct http_reply r = { 0 };
    char *text = fuzz_text(data, n), value[HTTP_HEADER_BYTES];
    uint64_t seconds;
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t line = end ? (size_t)(end - text) - at + 1 : n - at, before = strlen(r.header);
        bool kept = http_header_add(r.header, text + at, line);
        MUST(kept == (strlen(r.header) > before) && strlen(r.header) <= HTTP_HEADER_BYTES);
        if (kept) {
            char name[HTTP_HEADER_BYTES];
            size_t length = strcspn(r.header + before, ":");
            memcpy(name, r.header + before, length);
            name[length] = 0;
            MUST(length && r.header[strlen(r.header) - 1] == '\n');
            MUST(http_header(&r, name, value, sizeof value));
        }
        at += line;
    }
    for (const char *p = r.header; *p; p++)
        MUST((unsigned char)*p >= ' ' || *p == '\n' || *p == '\t');
    (void)http_date(text, &seconds);
    mem_free(text);
    return 0;
}
