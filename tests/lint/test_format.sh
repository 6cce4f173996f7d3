#!/bin/sh
# The code is as clang-format leaves it, under the .clang-format of the repository.
set -eu
cd "${TESSERA_SRC:-$(dirname "$0")/../..}"

if ! command -v clang-format >/dev/null; then
    echo "clang-format is not installed"
    exit 1
fi
files=$(git ls-files -- '*.c' '*.h' '*.cu' 2>/dev/null || true)
[ -n "$files" ] || files=$(find comm storage ckpt trainer tests -name '*.[ch]' -o -name '*.cu')
# shellcheck disable=SC2086 # names of this repository have no blanks
if ! clang-format --dry-run -Werror $files; then
    echo "format: run clang-format -i on the files above"
    exit 1
fi
echo "format: $(echo "$files" | wc -l) files are as they should be"
