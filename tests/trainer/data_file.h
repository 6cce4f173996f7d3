/* data_file: small files for the tests of trainer/data, made in the working directory and removed again. */
#ifndef TESSERA_TESTS_TRAINER_DATA_FILE_H
#define TESSERA_TESTS_TRAINER_DATA_FILE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct data_file {
    char path[64];
};

static inline struct data_file data_file_make(const char *text, size_t n)
{
    struct data_file f = { "tessera-data-XXXXXX" };
    int fd = mkstemp(f.path);
    if (fd < 0 || write(fd, text, n) != (ssize_t)n || close(fd) != 0)
        abort();
    return f;
}

static inline void data_file_remove(const struct data_file *f)
{
    (void)unlink(f->path);
}

#endif
