#!/bin/sh
# `tessera bench` on a small state: every documented key is there with a number that can be, nothing stays behind, and wrong words are
# refused. How fast anything was is not looked at: the machine may be busy.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

fail() {
    echo "FAILED: $*"
    cat out err 2>/dev/null || true
    exit 1
}

ranks() {
    n=$1
    shift
    mpirun --oversubscribe --bind-to none -np "$n" "$TESSERA" bench "$@" >out 2>err
}

ranks 4 save --quick --json state_bytes=24MiB steps=3 step_ms=20 save_every=1 || fail "bench save"
python3 - <<'END' || fail "bench save: values"
import json

lines = open("out").read().splitlines()
assert len(lines) == 1, "one object on one line"
r = json.loads(lines[0])
keys = """call_cpu_ms_max call_wall_ms_p50 fence_ms_max throughput_ratio throughput_ratio_lo throughput_ratio_hi fence_step_ratio
    ckpt_cpu_share save_gbps limit_gbps rate_ratio staging_peak_bytes rss_peak_bytes load_start load_end""".split()
for k in keys:
    assert isinstance(r[k], (int, float)) and not isinstance(r[k], bool), f"{k}: {r.get(k)}"
assert 0 < r["throughput_ratio_lo"] <= r["throughput_ratio"] <= r["throughput_ratio_hi"] < 100
assert 0 < r["ckpt_cpu_share"] < 1
assert 0 < r["ckpt_cpu_ms_save"]
assert 0 < r["call_wall_ms_p50"] and 0 < r["call_cpu_ms_max"] and 0 <= r["fence_ms_max"]
assert 0 < r["fence_step_ratio"] and 0 < r["save_gbps"] <= r["save_gbps_best"] and 0 < r["limit_gbps"] <= r["limit_gbps_best"]
assert abs(r["rate_ratio"] - r["save_gbps"] / r["limit_gbps"]) < 0.05 * r["rate_ratio"] + 0.01
assert 0 < r["staging_peak_bytes"] <= r["staging_cap_bytes"] or r["staging_peak_bytes"] == 0
assert r["rss_peak_bytes"] > r["state_bytes"] / r["ranks"], "a rank holds its tensors"
assert r["device"] == "cpu" and r["d2h_gbps"] is r["h2d_gbps"] is r["save_d2h_gbps"] is r["d2h_ratio"] is None, "no link"
assert r["state_bytes"] == 24 << 20 and r["ranks"] == 4 and r["pairs"] == 3 and r["saves"] == 6, "2 saves in each of 3 windows"
END

ranks 2 load --quick --json state_bytes=20MiB tensors=3 || fail "bench load"
python3 - <<'END' || fail "bench load: values"
import json

cases = [json.loads(line) for line in open("out")]
assert [(c["from_mesh"], c["to_mesh"]) for c in cases] == [("dp=2", "dp=2"), ("dp=2", "dp=1"), ("dp=1", "dp=2"), ("dp=2", "tp=2")]
for c in cases:
    assert 0 < c["load_gbps"] <= c["load_gbps_best"] and 0 < c["limit_gbps"] <= c["limit_gbps_best"] and 0 < c["rate_ratio"]
    assert 1 <= c["read_amplification"] < 1.2, c
    assert 0 <= c["cached_share"] <= 1, c
    assert c["state_bytes"] == (20 << 20) // 3 // 4096 * 4096 * 3
END

for n in 1 2; do
  ranks $n comm --quick --json bucket=1MiB || fail "bench comm on $n ranks"
  python3 - $n <<'END' || fail "bench comm: values"
import json, sys

n = int(sys.argv[1])
[r] = [json.loads(line) for line in open("out")]
assert r["ranks"] == n and r["bytes"] == 4 << 20
for k in ("sum_ms", "all_ms", "allreduce_ms"):
    assert r[k] > 0 or n == 1, f"{k}: {r.get(k)}"
assert r["sum_ms"] <= r["all_ms"]
assert n == 1 or r["allreduce_ratio"] > 0
END
done

ranks 3 load --json state_bytes=3MiB tensors=2 repeats=1 cases=dp2-dp3,tp3-dp1 || fail "bench load of chosen cases"
[ "$(grep -c '"from_mesh": "dp=2", "to_mesh": "dp=3"\|"from_mesh": "tp=3", "to_mesh": "dp=1"' out)" = 2 ] || fail "chosen cases"
for bad in dp2-dp4 dp2 dp2- "dp2-dp1," ",dp2-dp1" dp0-dp1 pp2-dp1 dp1-dp1x dp1-tp; do
  if ranks 3 load state_bytes=3MiB tensors=2 "cases=$bad"; then fail "cases=$bad passed"; fi
  grep -q 'cases: ' err || fail "cases=$bad is not named"
done

ranks 4 irregular --quick --json state_bytes=32MiB steps=3 step_ms=5 || fail "bench irregular"
python3 - <<'END' || fail "bench irregular: values"
import json

modes = {r["mode"]: r for r in map(json.loads, open("out"))}
assert list(modes) == ["default", "merge", "gather"]
for r in modes.values():
    assert r["tp"] == 2 and r["dp"] == 2 and r["ranks"] == 4 and r["state_bytes"] == 2 * 1001 * 1500 * 10
    assert 0 < r["plan_s"] < 10 and 0 < r["call_wall_ms_p50"] and 0 <= r["fence_ms_max"] and 0 < r["stall_ms"]
    assert 0 < r["save_gbps"] and 0 < r["load_s"] and isinstance(r["lost_ms"], (int, float))
    assert 0 < r["load_wire_bytes"] < r["state_bytes"] and 0 < r["staging_bytes"]
moments = 2 * 1001 * 1500 * 8
assert modes["default"]["wire_bytes"] == 0
assert abs(modes["merge"]["wire_bytes"] / (moments / 2) - 1) < 0.01, "of two runs of a box one travels"
assert modes["gather"]["wire_bytes"] == moments, "of two runs of a box both do"
END

ranks 1 save --quick state_bytes=5MiB windows=1 steps=2 step_ms=1 repeats=1 || fail "bench save, one rank, as a table"
grep -q "^throughput_ratio  " out || fail "table"

cat >peer <<'END'
#!/usr/bin/env python3
# Stands for a Python with PyTorch: every step takes it a quarter of a second.
import json
import sys

assert sys.argv[1] == "-c" and "scaled_dot_product_attention" in sys.argv[2]
c = json.loads(sys.argv[3])
assert (c["layers"], c["hidden"], c["vocab"], c["sequences"], c["tokens"], c["threads"]) == (2, 64, 521, 3, 20, 2), c
print("ready torch none", c["dtype"], flush=True)
for line in sys.stdin:
    print(0.25 * int(line), flush=True)
END
chmod +x peer
ranks 1 train --quick --json sequences=3 tokens=20 steps=2 peer=./peer || fail "bench train beside a peer"
python3 - <<'END' || fail "bench train: values"
import json

cases = [json.loads(line) for line in open("out")]
assert cases
for r in cases:
    keys = """device model params dtype threads tokens_per_s peer peer_tokens_per_s ratio ceiling_tokens_per_s ceiling_share
        flops_per_token peak_tflops mfu peer_mfu matmul_tflops mfu_matmul"""
    assert list(r) == keys.split(), r
    assert r["model"] == "tiny 3x20" and r["params"] == 2 * 30848 + 521 * 64 + 64 and r["threads"] == 2
    assert r["peer"] == "torch none " + r["dtype"] and r["peer_tokens_per_s"] == 60 / 0.25
    assert 0 < r["tokens_per_s"] and 0 < r["ceiling_tokens_per_s"]
    assert abs(r["ratio"] * r["peer_tokens_per_s"] / r["tokens_per_s"] - 1) < 0.01
    assert abs(r["ceiling_share"] * r["ceiling_tokens_per_s"] / r["tokens_per_s"] - 1) < 0.01
    assert r["device"] == "cpu" and r["peak_tflops"] is r["mfu"] is r["peer_mfu"] is None, "nobody's data sheet"
    assert r["flops_per_token"] == 6 * r["params"] + 12 * 2 * 64 * 20
    assert r["matmul_tflops"] > 0 and abs(r["mfu_matmul"] * r["matmul_tflops"] * 1e12 / (r["flops_per_token"] * r["tokens_per_s"]) - 1) < 0.1
END
ranks 1 train --quick || fail "bench train without a peer, as a table"
grep -q "^peer  *-  *$" out || fail "a peer came from nowhere"
if ranks 1 train --quick peer=/bin/true; then fail "a peer that says nothing passed"; fi
grep -q 'the peer ended' err || fail "the silent peer is not named"
if ranks 1 train --quick peer=/nonexistent/python; then fail "a peer that is not there passed"; fi
if ranks 2 train --quick; then fail "bench train on two ranks passed"; fi
rm -f peer

if ranks 1 save speed=3; then fail "an unknown key passed"; fi
grep -q 'speed: unknown key' err || fail "the unknown key is not named"
if ranks 2 load state_bytes=1KiB; then fail "a state too small passed"; fi
if ranks 1 walk; then fail "an unknown bench passed"; fi
if ranks 1 save url=mem:x/; then fail "a url that is no folder passed"; fi
if ranks 4 irregular url=s3://bucket; then fail "bench irregular passed on object storage"; fi
grep -q 'a folder is needed' err || fail "what irregular needs is not named"
rm -f out err
[ -z "$(ls -A)" ] || fail "left behind: $(ls -A)"
echo "bench: as it should be"
