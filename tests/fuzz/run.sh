#!/usr/bin/env bash
# run.sh [SECONDS [BUILD]]: every fuzzer of BUILD (build-fuzz) for SECONDS (60), two at a time, from the seeds in corpus/NAME (for
# configs also the repository's own). Prints a line `NAME STATUS` each; of a finding also its log, on stderr, and the input stays as
# BUILD/findings/NAME-crash-... What a run finds interesting stays in BUILD/corpus/NAME for the next one.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
seconds=${1:-60}
build=$(realpath -m "${2:-$root/build-fuzz}")
export here root seconds build

one()
{
    local name=${1##*/fuzz_} status seeds
    seeds=("$here/corpus/$name")
    [[ $name != config ]] || seeds+=("$root/configs")
    mkdir -p "$build/corpus/$name" "$build/findings"
    "$1" -max_total_time="$seconds" -max_len=8192 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$build/findings/$name-" "$build/corpus/$name" "${seeds[@]}" >"$build/$name.log" 2>&1
    status=$?
    if [[ $status -ne 0 ]]; then
        tail -60 "$build/$name.log" >&2
    else
        echo "fuzz_$name: $(sed -n 's/^stat::number_of_executed_units: */runs: /p' "$build/$name.log")" >&2
    fi
    echo "$name $status"
}
export -f one

programs=()
for source in "$here"/fuzz_*.c; do
    programs+=("$build/$(basename "$source" .c)")
done
printf '%s\0' "${programs[@]}" | xargs -0 -n 1 -P 2 bash -c 'one "$1"' _
