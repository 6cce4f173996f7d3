#!/bin/sh
# `tessera ckpt plan`: its keys, its bounds, and what it says to wrong words.
set -eu
plan() { "$TESSERA" ckpt plan "$@"; }

# keys_hold JSON: every promised key is there, and the figures keep the bounds that hold on any machine
keys_hold() {
    python3 - "$1" <<'PY'
import json, sys
r = json.loads(sys.argv[1])
for k in ("pieces", "ranks", "plan_s", "cached_plan_s", "metadata_bytes", "metadata_bytes_per_piece",
          "rank_bytes_max_over_mean", "files", "load_plan_s", "read_amplification"):
    assert k in r, k
assert r["pieces"] > 0 and r["files"] > 0, r
beside = (r["metadata_bytes"] - r["checksum_bytes"]) / r["pieces"]
assert abs(beside - r["metadata_bytes_per_piece"]) < 0.001 and beside <= 32, r
assert 1 <= r["rank_bytes_max_over_mean"] <= 1.05, r
assert 1 <= r["read_amplification"] <= 1.05, r
PY
}
says() { # TEXT then the command that must fail with it
    text=$1
    shift
    if out=$(plan "$@" 2>&1); then
        echo "no error: $*"
        exit 1
    fi
    case $out in *"$text"*) ;; *) echo "'$out' does not say '$text'"; exit 1 ;; esac
}

keys_hold "$(plan --model llama3-8b --mesh pp=2,dp=8,tp=4 --to pp=1,dp=6,tp=8 --json)"
keys_hold "$(plan --model llama3-405b --mesh=pp=16,dp=4,tp=8 --to=pp=8,dp=5,tp=8 --zero=1 --json)"
keys_hold "$(plan --synthetic tensors=64,pieces=128 --to dp=96 --json)"

# Runs: nothing is sent as given; merged, each box but the writer's own run; gathered, each box to all of its dp ranks.
wire() { plan --model llama3-8b --mesh dp=4,tp=8 --to tp=8 --json "$@" | python3 -c 'import json,sys; r = json.load(sys.stdin); print(r["irregular"], r["wire_bytes"])'; }
python3 - "$(wire)" "$(wire --irregular merge)" "$(wire --irregular=gather)" <<'PY'
import sys
(d, default), (m, merge), (g, gather) = (line.split() for line in sys.argv[1:])
assert (d, m, g) == ("default", "merge", "gather"), sys.argv
assert int(default) == 0 < int(merge), sys.argv
assert 3 < int(gather) / int(merge) < 6, sys.argv  # 4 where all runs of a box are equal; buckets end within boxes
PY
says 'default, merge or gather' --model llama3-8b --mesh dp=1 --irregular yes
plan --model dit-xl2 --mesh dp=4 --zero 0 | grep -q 'dit-xl2 on 4 ranks'
test "$(plan --model llama3-70b --mesh pp=4,dp=2,tp=8 --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["params"])')" = 70553706496

says 'there are llama3-8b, llama3-70b, llama3-405b, qwen3-30b-a3b, dit-xl2' --model llama4 --mesh dp=1
says 'tp=7 does not divide' --model llama3-8b --mesh tp=7
says 'pp=64 stages' --model llama3-8b --mesh dp=2 --to pp=64
says 'needs --mesh' --model llama3-8b
says 'a mesh is' --model llama3-8b --mesh qq=2
says 'a mesh is' --model llama3-8b --mesh 4
says 'wants a number' --model llama3-8b --mesh dp=x
says 'wants a number' --model llama3-8b --mesh dp=0
says '--zero is 0 or 1' --model llama3-8b --mesh dp=1 --zero 3
says 'one of --model and --synthetic'
says 'one of --model and --synthetic' --model llama3-8b --synthetic tensors=1,pieces=1
says 'needs tensors= and pieces=' --synthetic tensors=3
says 'no option' --models llama3-8b
