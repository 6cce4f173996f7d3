/* hf_cli: `tessera ckpt export` and `tessera ckpt import`: between steps of a checkpoint and folders of Hugging Face.
 * They know models, so they are not in ckpt/. One process, without MPI. */
#ifndef TESSERA_TRAINER_HF_HF_CLI_H
#define TESSERA_TRAINER_HF_HF_CLI_H

#include "comm/base/status.h"

#include <stdbool.h>

/* Whether argv[0] is one of the two, and nobody asks for help. */
bool hf_cli_has(int argc, char **argv);
/* Run it. What was made is printed to stdout. */
status *hf_cli(int argc, char **argv) WARN_UNUSED;

#endif
