#!/usr/bin/env python3
"""`tessera bench save` and `load` on object storage: beside curl, with the keys that files have, and nothing stays behind. How fast anything was is not
looked at. Without curl they say so, and without the bucket, too; no secret is in what they say."""

import json
import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

root = s3job.server("radosgw")
tmp = job.workspace()


def bench(*words, ranks=2, path=None):
    program = [*(["env", f"PATH={path}"] if path else []), job.TESSERA]
    run = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *program, "bench", *words, "--quick", "--json"]
    r = subprocess.run(run, capture_output=True, text=True, env=job.environment(), cwd=tmp)
    job.said.append(r.stdout + r.stderr)
    return r.returncode, r.stdout, r.stderr


METHODS = {"curl x1", "curl x2", "curl x4", "curl x8"}
url = f"url={root}/below/"
code, out, err = bench("save", url, "state_bytes=40MiB", "steps=3", "step_ms=5", "windows=1")
job.check(code == 0, f"bench save: {out}{err}")
save = json.loads(out)
job.check(save["limit_method"] in METHODS and 0 < save["limit_gbps"] <= save["limit_gbps_best"] and 0 < save["save_gbps"], f"bench save: {save}")
job.check(abs(save["rate_ratio"] - save["save_gbps"] / save["limit_gbps"]) < 0.05 * save["rate_ratio"] + 0.01, f"bench save: {save}")
job.check(save["live_bytes_share"] == 0 and 0 < save["staging_peak_bytes"] <= save["staging_cap_bytes"], f"bench save: {save}")
code, out, err = bench("load", url, "state_bytes=40MiB", "tensors=3", "cases=dp2-dp1,dp2-tp2")
job.check(code == 0, f"bench load: {out}{err}")
for load in map(json.loads, out.splitlines()):
    job.check(load["limit_method"] in METHODS and 0 < load["load_gbps"] and 0 < load["limit_gbps"], f"bench load: {load}")
    job.check(load["read_amplification"] <= 1.05 and load["cached_share"] is None, f"bench load: {load}")
job.check(not s3job.keys(f"{root}/below"), f"left behind: {s3job.keys(f'{root}/below')}")
job.say("passed: save and load beside curl")

code, out, err = bench("save", url, "state_bytes=10MiB", "steps=2", "step_ms=1", "windows=1", ranks=1, path=str(tmp))
job.check(code != 0 and "there is no curl(1) here" in err, f"without curl: {code} {out}{err}")
code, out, err = bench("load", "url=s3://no-such-bucket-here/x", "state_bytes=10MiB")
job.check(code != 0 and "no-such-bucket-here" in err and "there is no such bucket" in err, f"without the bucket: {code} {out}{err}")
job.say("passed: what is missing is said")
secrets = s3job.secret_forms()
job.check(not any(s in text.encode() for s in secrets for text in job.said), "the secret key is in an output")
