/* cuda_runtime: what comm/device/device_cuda.cu finds under this name when g++ compiles it for the emulated GPU. */
#include "tests/support/cuda_emu.h"
