#!/bin/sh
# Plugins of another interface, another build, another backend, or no plugin at all are refused in words that say which.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

try() # try WORDS C-SOURCE-OF-THE-ENTRY
{
    {
        echo '#include "comm/device/device.h"'
        echo 'static const struct device_ops ops = { .name = "cuda" };'
        echo "$2"
    } >"$folder/fake.c"
    ${CC:-cc} -std=c11 -shared -fPIC -I"$TESSERA_SRC" -o "$folder/tessera_cuda.so" "$folder/fake.c"
    rc=0
    said=$(TESSERA_PLUGINS=$folder "$TESSERA_BUILD/tests/test_device" open cuda) || rc=$?
    case $rc:$said in
    77:UNSUPPORTED:*"$1"*) ;;
    *)
        echo "FAILED: expected UNSUPPORTED and '$1', got exit $rc and: $said" >&2
        exit 1
        ;;
    esac
}

try 'exports no device_plugin' 'const struct device_ops *unused(void); const struct device_ops *unused(void) { return &ops; }'
entry='device_plugin_fn device_plugin; const struct device_plugin *device_plugin(void) { return &p; }'
try 'has plugin interface 99' "static const struct device_plugin p = { 99, \"x\", &ops }; $entry"
try 'is of build some-other' "static const struct device_plugin p = { DEVICE_ABI, \"some-other\", &ops }; $entry"
echo "plugins: all passed"
