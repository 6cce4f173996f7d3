/* cli_run: `tessera ckpt` run inside the test, on a folder of its own, with what it prints kept. */
#ifndef TESSERA_TESTS_SUPPORT_CLI_RUN_H
#define TESSERA_TESTS_SUPPORT_CLI_RUN_H

#include "comm/base/status.h"
#include "tests/support/test_root.h"

struct cli {
    char dir[FOLDER_BYTES], out[FOLDER_BYTES + 16];
    char text[16384]; /* what the last command printed */
    enum status_code code;
    char message[1100];
};

void cli_open(struct cli *c);
void cli_close(struct cli *c);
/* Run the words of `line`, where "%" is the folder. */
void cli_run(struct cli *c, const char *line);
/* And it returns `code` and has `words` in what it prints, or in its error. */
void cli_expect(struct cli *c, const char *line, enum status_code code, const char *words);

#endif
