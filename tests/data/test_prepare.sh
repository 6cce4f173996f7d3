#!/bin/sh
# `tessera data` as a person runs it: files made, shown, refused; one clear line and a code of its own for each failure.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

fail() {
    echo "FAILED: $*"
    cat err 2>/dev/null || true
    exit 1
}

# expect CODE WORDS command...: that exit code, and one line on stderr with those words
expect() {
    want=$1 words=$2
    shift 2
    code=0
    "$@" >out 2>err || code=$?
    [ "$code" -eq "$want" ] || fail "exit code $code instead of $want: $*"
    [ "$(wc -l <err)" -eq 1 ] || fail "not one line: $*"
    grep -qF -- "$words" err || fail "no \"$words\": $*"
}

"$TESSERA" data prepare arithmetic made/here rows=50 heldout=8 >out
[ "$(wc -l <out)" -eq 3 ] || fail "a line a file"
[ "$(wc -l <made/here/sft.jsonl)" -eq 50 ] || fail "sft rows"
[ "$(wc -l <made/here/prefs_train.jsonl)" -eq 50 ] || fail "train rows"
[ "$(wc -l <made/here/prefs_heldout.jsonl)" -eq 8 ] || fail "held-out rows"
"$TESSERA" data show made/here/prefs_train.jsonl 2 >out
grep -q "^row 1: chosen .* rejected" out || fail "show"
grep -q "50 preference rows, 0 dropped" out || fail "show: summary"
cp -r made/here kept

# INVALID is 65, NOT_FOUND 66, IO 69, NO_SPACE 70
expect 65 "legal: prepare, show, help" "$TESSERA" data mistake
expect 65 'did you mean "rows"?' "$TESSERA" data prepare arithmetic made/here rowz=3
expect 65 'must be a string, not a number (legal forms:' sh -c '
    echo "{\"prompt\": \"p\", \"chosen\": 3, \"rejected\": \"r\"}" >bad.jsonl; exec "$TESSERA" data show bad.jsonl'
expect 66 "nowhere/train.jsonl: cannot open" "$TESSERA" data prepare gsm8k nowhere made/gsm8k
expect 66 "bad.jsonl/x: cannot make the folder" "$TESSERA" data prepare arithmetic bad.jsonl/x
[ -w /dev/full ] && expect 70 "cannot write to stdout" sh -c 'exec "$TESSERA" data show made/here/sft.jsonl >/dev/full'

# a write that fails half-way (a file larger than allowed): the files of before stay, nothing is left over
expect 69 "cannot write" sh -c "trap '' XFSZ; ulimit -f 64; exec \"\$TESSERA\" data prepare arithmetic made/here rows=20000"
diff -r made/here kept || fail "an earlier file changed"

# three writers at once: the last to rename wins, and each file is whole
for seed in 1 2 3; do
    "$TESSERA" data prepare arithmetic "made/$seed" rows=400 heldout=40 seed=$seed >/dev/null
    "$TESSERA" data prepare arithmetic made/race rows=400 heldout=40 seed=$seed >/dev/null &
done
wait
[ "$(ls made/race | wc -l)" -eq 3 ] || fail "left over: $(ls made/race)"
for file in sft.jsonl prefs_train.jsonl prefs_heldout.jsonl; do
    cmp -s made/race/$file made/1/$file || cmp -s made/race/$file made/2/$file || cmp -s made/race/$file made/3/$file ||
        fail "$file is a mixture"
done
echo "data: files made, shown and refused as they should be"
