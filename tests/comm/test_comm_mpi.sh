#!/bin/sh
# The conformance suite as MPI jobs of 1, 2 and 4 ranks, and once without mpirun (a world of one); beside a thread that
# drives what is under way with 2, 4 and 8.
set -eu
program=$TESSERA_BUILD/tests/test_comm_suite
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}" # under that sanitizer: the MPI library has leaks of its own
unset OMPI_MCA_pml OMPI_MCA_btl # as a user's jobs find them
log=$(mktemp)
trap 'rm -f "$log"' EXIT

expect() # expect LINE COMMAND...
{
    line=$1
    shift
    if ! timeout 300 "$@" >"$log" 2>&1 || ! grep -qx "$line" "$log"; then
        echo "FAILED: $*" >&2
        cat "$log" >&2
        exit 1
    fi
}

expect 'comm suite over mpi: 1 ranks passed' "$program" mpi
for n in 1 2 4; do
    expect "comm suite over mpi: $n ranks passed" mpirun --oversubscribe --bind-to none -np "$n" "$program" mpi
done
for n in 2 4 8; do
    expect "comm suite over progress: $n ranks passed" mpirun --oversubscribe --bind-to none -np "$n" "$program" mpi progress
done
# With mpirun's own choice of binding, a rank of a small job must still see every core it may use.
cores=$(nproc)
expect "cores: $cores" mpirun --oversubscribe -np 1 "$program" mpi cores
echo "comm suite over mpi: all passed"
