#!/usr/bin/env bash
# launch/bundle, packed and unpacked into a root that holds nothing but it, this machine's glibc and a shell: two ranks train, two ranks resume
# from what they saved, and the losses are those of the build outside. Then what a user meets first: the packed tests run, a missing GPU is
# one line, and no library of ours is left out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

fail()
{
    echo "FAILED: $*" >&2
    exit 1
}

in_namespace=(unshare -m)
[[ $(id -u) -eq 0 ]] || in_namespace=(unshare -rm)
"${in_namespace[@]}" sh -c 'mkdir "$1/try" && mount --rbind /proc "$1/try" && umount -l "$1/try"' _ "$folder" 2>/dev/null || {
    echo "skipped: no mount namespace of its own is allowed here"
    exit 77
}

# --- pack, unpack
"$TESSERA_SRC/launch/bundle" "$TESSERA_BUILD" "$folder/bundle" >"$folder/said" || fail "launch/bundle"
packed=$(echo "$folder"/bundle.tar.*)
[[ $(stat -c %s "$packed") -lt $((60 << 20)) ]] || fail "$packed is too large"
"$TESSERA_SRC/launch/bundle" "$TESSERA_BUILD" "$TESSERA_SRC" 2>/dev/null && fail "a folder that is no bundle was written over"
root=$folder/root
mkdir -p "$root"/{bin,proc,dev,sys,tmp,opt,run,etc}
rm -r "$folder/bundle"
case $packed in
*.zst) zstd -qdc "$packed" | tar -C "$root/opt" -x ;;
*.gz) tar -C "$root/opt" -xzf "$packed" ;;
esac
[[ -x $root/opt/bundle/tessera ]] || fail "no tessera in what was unpacked"

# --- the machine: a shell and glibc, taken from here
cp -L /bin/sh "$root/bin/sh"
ldd /bin/sh "$root/opt/bundle/bin/tessera" | grep -oE '/[^ ]*/(ld-linux[^ ]*|lib(c|m|mvec|dl|rt|pthread|util|resolv)\.so[^ ]*)' | sort -u |
    while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
# What is opened by name later, as glibc's own parts are.
place=$(dirname "$(ldd /bin/sh | grep -oE '/[^ ]*/libc\.so[^ ]*')")
for library in "$place"/lib{dl,rt,pthread,util,nss_files}.so.*; do
    [[ ! -e $library ]] || cp -L "$library" "$root$place/"
done
echo 'root:x:0:0::/:/bin/sh' >"$root/etc/passwd"

job='checkpoint.every=4 train.log_every=1 algo.warmup_sft_steps=8 train.global_batch=4 train.micro_batch=2 train.lanes=2 model.layers=1'
job+=' model.hidden=32 model.heads=2 model.kv_heads=1 model.head_dim=16 model.ffn=64 data.heldout= threads=1'
cat >"$root/job" <<JOB
set -e
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cd /opt/bundle
./tessera data prepare arithmetic data/arithmetic
train() { ./mpirun --oversubscribe --bind-to none -np 2 ./tessera train configs/quickstart.yaml data.prefs=data/arithmetic/prefs_heldout.jsonl run.dir=/tmp/run checkpoint.url=file:/tmp/ckpt $job "\$@" </dev/null; }
train train.steps=12 checkpoint.keep_last=9
./tessera ckpt rm /tmp/ckpt 12 --force
train train.steps=12 checkpoint.keep_last=9
./tessera ckpt verify /tmp/ckpt
cd tests
export TESSERA_PLUGINS=../bin
LD_LIBRARY_PATH=../lib ./golden rl.json diffusion.json
LD_LIBRARY_PATH=../lib ./hf_logits fixtures/*
cd ..
rc=0
./tessera train configs/quickstart.yaml device=cuda comm=self run.dir=/tmp/none checkpoint.url=file:/tmp/none || rc=\$?
echo "without a GPU: exit \$rc"
JOB
# A clean environment: nothing of this machine's MPI or paths may help.
rc=0
env -i "${in_namespace[@]}" /bin/sh -c '
    for d in proc dev sys; do /bin/mount --rbind /$d "$0/$d" || exit 1; done
    exec /usr/sbin/chroot "$0" /bin/sh /job' "$root" >"$folder/log" 2>&1 || rc=$?
show()
{
    cat "$folder/log" >&2
    fail "$*"
}
[[ $rc -eq 0 ]] || show "the job in the empty root ended with $rc"
grep -q 'resum' "$folder/log" || show "the second job did not resume"
if [[ -e $TESSERA_BUILD/tessera_cuda.so ]]; then
    grep -q 'without a GPU: exit 7[67]' "$folder/log" || show "device: cuda without a GPU"
    grep -qE 'no usable GPU|this build trains on the CPU' "$folder/log" || show "device: cuda without a GPU says something else"
fi

# --- the same bits outside
"$TESSERA" data prepare arithmetic "$folder/data" >/dev/null
# shellcheck disable=SC2086
"$TESSERA" train "$TESSERA_SRC/configs/quickstart.yaml" comm=self run.dir="$folder/out" checkpoint.url="file:$folder/ckpt" data.sft="$folder/data/sft.jsonl" \
    data.prefs="$folder/data/prefs_heldout.jsonl" $job train.steps=12 >"$folder/outside" 2>&1 || show "the same job outside: $(cat "$folder/outside")"
losses()
{
    python3 - "$1" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
last = {r["step"]: r["loss"] for r in rows if "loss" in r and "step" in r}
print(len(last), sorted(last.items()))
PYTHON
}
inside=$(losses "$root/tmp/run/metrics.jsonl") outside=$(losses "$folder/out/metrics.jsonl")
[[ ${inside%% *} -ge 10 && $inside == "$outside" ]] || fail "losses inside: $inside, outside: $outside"
tail -1 "$folder/said"
echo "bundle: all passed"
