#!/bin/sh
# tests/gpu/run on the emulated GPU: every command of it that does not measure the hardware runs and is understood, and all its rows pass.
set -eu
[ -e "$TESSERA_BUILD/tests/emu/tessera_ops_cuda.so" ] || {
    echo "FAILED: there is no emulated GPU in $TESSERA_BUILD/tests/emu" >&2
    exit 1
}
keep=$(mktemp -d)
trap 'rm -rf "$keep"' EXIT
rc=0
TESSERA_GPU_KEEP=$keep "$TESSERA_SRC/tests/gpu/run" --emulated "$TESSERA_BUILD" >"$keep/out" 2>&1 || rc=$?
rows=$(grep -c '| pass$' "$keep/table" || true)
if [ "$rc" -ne 0 ] || [ "$rows" -lt 10 ] || grep -qE '\| (FAIL|not possible)$' "$keep/table"; then
    cat "$keep/out" >&2
    echo "FAILED: exit $rc, $rows rows passed" >&2
    exit 1
fi
cat "$keep/table"
echo "gpu/emulated: all passed"
