#!/bin/sh
# The true libnccl on a machine without a GPU: the communicator is refused in one line, with exit status 76.
set -eu
program=$TESSERA_BUILD/tests/test_nccl
if ! [ -x "$program" ]; then
    echo "skipped: built without nccl.h"
    exit 77
fi
if [ -e /dev/nvidiactl ]; then
    echo "skipped: this machine has a GPU"
    exit 77
fi
rc=0
said=$(timeout 120 "$program" true "${TESSERA_NCCL:-libnccl.so.2}" 2>&1) || rc=$?
case $rc:$(echo "$said" | wc -l):$said in
77:1:UNSUPPORTED:*)
    echo "skipped: $said"
    exit 77
    ;;
"76:1:DEVICE: comm nccl: ncclCommInitRankConfig: "*) echo "true libnccl: all passed ($said)" ;;
*)
    echo "FAILED: exit $rc, and it says: $said" >&2
    exit 1
    ;;
esac
