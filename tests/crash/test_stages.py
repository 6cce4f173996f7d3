#!/usr/bin/env python3
"""kill -9 of one rank at every stage of the pipeline, by construction: kill_at.so counts a rank's calls by stage (its header says what a stage
is) and ends it at the n-th call of one.

Three runs that nobody kills say which stages there are, on which ranks, and how often: a start from nothing, a resumed one, and one that is resumed and
merges runs (checkpoint.irregular). Each kill is one
attempt on a root that earlier kills have left, with another number of ranks, and would end by itself some saves later. After it: what a save
event called committed is there, every listed step passes `tessera ckpt verify`, and the attempt had resumed from the newest committed step with
the hashes of its save and then had the losses of a run that nobody disturbed, bit for bit, and that run's weights if it came to its end.

The state is 2.8 MB and a chunk 1 MiB, so one or two ranks write from their tensors, and three or four stage all they have at once.

By default each stage that was found is hit once, at a drawn rank and call. KILL_STAGES=all: on each of its ranks, at every call up to EACH and
at SAMPLES drawn ones beyond (half an hour). KILL_SEED: another draw."""

import collections
import math
import os
import pathlib
import random
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, SWITCH, EVERY, RANKS = 200, 16, 2, 4
SAVES, REACH = 6, 3  # of an attempt; those from whose calls one is drawn
EACH, SAMPLES, TRIES = 16, 6, 4
everything = os.environ.get("KILL_STAGES") == "all"
draw = random.Random(int(os.environ.get("KILL_SEED", "9")))
tmp = job.workspace()
job.write_data(tmp / "data")

# What a save, a commit, retention and a load must at least consist of: a stage that the dry runs no longer find is a hole in this test.
REQUIRED = """
    main/create/lease main/write/lease main/fsync/lease main/link/lease main/rename/lease
    main/pread/metadata load/pread/shard load/crc/none
    main/reduce/first main/reduce/second main/vote/second
    capture/lock/none merge/lock/none write/lock/none write/crc/none
    write/create/shard write/mkdir/step write/ftruncate/shard write/pwrite/shard write/fsync/shard write/rename/shard write/fsync/step write/fsync/root
    keeper/lock/none keeper/crc/none keeper/create/metadata keeper/write/metadata keeper/fsync/metadata keeper/link/metadata
    keeper/untemp/metadata keeper/fsync/step keeper/fsync/root
    keeper/create/latest keeper/write/latest keeper/fsync/latest keeper/rename/latest
    keeper/create/mark keeper/write/mark keeper/fsync/mark keeper/rename/mark
    keeper/unlink/metadata keeper/unlink/shard keeper/unlink/mark keeper/rmdir/step
""".split()


def config(name):
    return job.write_config(tmp, name, tmp / "data", train_steps=STEPS, algo_warmup_sft_steps=SWITCH, checkpoint_every=EVERY, checkpoint_keep_last=2,
                            checkpoint_keep_best=1, checkpoint_keep_metric="loss", checkpoint_keep_order="lowest", checkpoint_chunk_bytes="1MiB", optim_schedule="constant", model_hidden=64, model_head_dim=16,
                            model_ffn=500)  # rows of 500: ZeRO's runs of down_proj are no boxes


class Attempt:
    """One job of SAVES saves with kill_at.so and metrics of its own, on the root of the config `name`; `target`: "RANK STAGE N" or None."""

    def __init__(self, name, number, ranks, target=None, merge=False):
        self.name, self.dir, self.ckpt = name, tmp / name / f"attempt-{number}", tmp / name / "ckpt"
        self.log = tmp / name / f"kill-{number}"
        self.newest = (job.committed(self.ckpt) or [None])[-1]
        preload = {"LD_PRELOAD": os.path.join(os.environ["TESSERA_BUILD"], "tests", "kill_at.so"), "KILL_ROOT": self.ckpt, "KILL_LOG": self.log}
        if target:
            preload["KILL_AT"] = target
        self.log.parent.mkdir(exist_ok=True)
        self.log.touch()
        self.job = job.start(ranks, config(name), f"run.dir={self.dir}", f"train.steps={max(self.newest or 0, SWITCH) + SAVES * EVERY}",
                             f"checkpoint.irregular={'merge' if merge else 'default'}", environ=preload)
        self.status = self.job.wait()

    def events(self):
        return job.events(self.dir)

    def hit(self):
        return self.log.read_text().startswith("killed ")

    def counts(self):
        """{stage: {rank: calls}}"""
        found = collections.defaultdict(dict)
        for line in self.log.read_text().splitlines():
            rank, stage, n = line.split()
            found[stage][int(rank)] = int(n)
        return found

    def check(self, text):
        """What it logged is right, and nothing that was committed is gone or broken."""
        got = self.events()
        resumed = job.last(got, "resume")
        if job.last(got, "run"):
            job.check((resumed and resumed["step"]) == self.newest, f"{text}: resumed from {resumed}, the newest committed step is {self.newest}")
        if resumed:
            job.same_state(job.last(whole, "save_start", step=resumed["step"]), resumed, text)
        for step, loss in job.losses(got).items():
            job.check(loss == want[step], f"{text}: loss of step {step} is {loss!r}, not {want[step]!r}")
        end = job.last(got, "end")
        if end:
            saved = job.last(whole, "save_start", step=end["step"])
            job.check(end["weights_crc32c"] == saved["weights_crc32c"], f"{text}: other weights at step {end['step']} than the undisturbed run")
        promised = max([e["saved_step"] for e in got if e["event"] == "save"] + [self.newest or 0])
        steps = job.committed(self.ckpt)
        job.check(promised == 0 or (steps and steps[-1] >= promised), f"{text}: step {promised} was committed; now there are {steps}")
        if steps:
            job.tool("ckpt", "verify", f"file:{self.ckpt}")
        return steps[-1] if steps else None


# ---- what there is to hit

job.run(2, config("whole"), "checkpoint.keep_best=0", "checkpoint.keep_metric=")
whole = job.events(tmp / "whole")
want = job.losses(whole)
dry = {}
for kind in ("fresh", "resumed", "merged"):
    a = Attempt("dry", kind, RANKS, merge=kind == "merged")
    job.check(a.status == 0, f"the {kind} dry run failed:\n{a.job.output}")
    a.check(f"the {kind} dry run")
    dry[kind] = a.counts()
stages = sorted({*dry["fresh"], *dry["resumed"], *dry["merged"]})
job.check(not set(REQUIRED) - set(stages), f"no such stages any more: {sorted(set(REQUIRED) - set(stages))}; found {stages}")


def calls(kind, stage, rank):
    """How many calls of a stage a rank makes up to its REACH-th save, about; all of them if it makes less than one a save."""
    n, saves = dry[kind][stage][rank], SAVES + (kind == "fresh") * SWITCH // EVERY
    return n if n <= saves else math.ceil(n * REACH / saves)


def targets():
    """(kind of start, stage, rank, call)"""
    for stage in stages:
        kind = next(k for k in ("resumed", "fresh", "merged") if stage in dry[k])
        ranks = sorted(dry[kind][stage])
        if not everything:
            rank = draw.choice(ranks)
            yield kind, stage, rank, draw.randint(1, calls(kind, stage, rank))
            continue
        for rank in ranks:
            n = calls(kind, stage, rank)
            beyond = range(EACH + 1, n + 1)
            for call in [*range(1, min(n, EACH) + 1), *draw.sample(beyond, min(SAMPLES, len(beyond)))]:
                yield kind, stage, rank, call


# ---- the kills

hits, missed, chain, number, newest = collections.Counter(), 0, 0, 0, None


def attempt(ranks, target=None, merge=False):
    """Returns whether it died where it should."""
    global number, newest
    number += 1
    text = f"attempt {number}: {ranks} ranks, {target or 'nobody killed'}"
    a = Attempt(f"chain-{chain}", number, ranks, target, merge)
    job.check((a.status == 0) == (not a.hit()), f"{text}: exit status {a.status}:\n{a.job.output}")
    before, newest = a.newest, a.check(text)
    job.say(f"{text}{' (not reached)' if target and not a.hit() else ''}: newest committed step {before} -> {newest}")
    return a.hit()


def one_kill(kind, stage, rank, call):
    global chain, newest
    if kind == "fresh" or chain == 0 or (newest or 0) > STEPS - SAVES * EVERY:
        chain += 1
        newest = None
    if kind != "fresh" and newest is None:
        attempt(2)
    return attempt(draw.choice([n for n in range(1, RANKS + 1) if n > rank and (n > 1 or not ("/vote/" in stage or kind == "merged"))]),
                   f"{rank} {stage} {call}", kind == "merged")


plan = list(targets())
draw.shuffle(plan)
for kind, stage, rank, call in plan:
    for _ in range(TRIES):
        if one_kill(kind, stage, rank, call):
            hits[stage] += 1
            break
        missed += 1
        call = (call + 1) // 2

for stage in stages:
    job.say(f"{hits[stage]:5d} kills at {stage}")
# Whether helpers without a name get to do anything is up to the scheduler, and whether an attempt lives to the renewal of its lease to the machine.
renewal = {f"keeper/{verb}/lease" for verb in ("create", "write", "fsync", "rename")}
sure = [s for s in stages if not s.startswith("none/") and s not in renewal]
job.check(all(hits[s] for s in sure), f"never hit: {[s for s in sure if not hits[s]]}")
attempt(3)
for ckpt in tmp.glob("chain-*/ckpt"):
    leftover = [p.name for p in ckpt.iterdir() if ".bad-" in p.name]
    job.check(not leftover, f"a kill made a committed step bad: {leftover}")
job.say(f"passed: {sum(hits.values())} kills at {len(hits)} stages in {chain} chains; {missed} calls were not reached at first")
