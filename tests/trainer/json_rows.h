/* json_rows: JSONL files as arrays of rows, for tests. For files that include cmocka.h. */
#ifndef TESSERA_TESTS_TRAINER_JSON_ROWS_H
#define TESSERA_TESTS_TRAINER_JSON_ROWS_H

#include <jansson.h>
#include <stdio.h>

/* The caller's to json_decref. */
static inline json_t *json_rows(const char *path)
{
    char line[1 << 14];
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    json_t *rows = json_array();
    while (fgets(line, sizeof line, f)) {
        json_t *row = json_loads(line, 0, NULL);
        assert_non_null(row);
        json_array_append_new(rows, row);
    }
    fclose(f);
    return rows;
}

/* The text under `key` of the i-th row; fails the test where there is none. */
static inline const char *row_text(const json_t *rows, size_t i, const char *key)
{
    const char *s = json_string_value(json_object_get(json_array_get(rows, i), key));
    assert_non_null(s);
    return s;
}

#endif
