#!/bin/sh
# tests/gpu/run on a machine without a GPU: one line that says so, and exit status 77, which is no pass.
set -eu
if [ -e "$TESSERA_BUILD/tessera_cuda.so" ] && TESSERA_PLUGINS=$TESSERA_BUILD "$TESSERA_BUILD/tests/test_device" open cuda >/dev/null 2>&1; then
    echo "skipped: this machine has a GPU; tests/gpu/run is for it"
    exit 77
fi
rc=0
said=$("$TESSERA_SRC/tests/gpu/run" "$TESSERA_BUILD" 2>&1) || rc=$?
case $rc:$(echo "$said" | wc -l):$said in
"77:1:no GPU: "*) echo "gpu/run: all passed ($said)" ;;
*)
    echo "FAILED: exit $rc, and it says: $said" >&2
    exit 1
    ;;
esac
