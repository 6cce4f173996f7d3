#!/bin/sh
# Calls and globals that this project does without: unbounded string functions, bare allocation outside comm/base (mem.h counts),
# exit outside main, sleeping as synchronisation, and mutable state at file scope.
set -eu
lint=$(cd "$(dirname "$0")" && pwd)
cd "${TESSERA_SRC:-$lint/../..}"
export LC_ALL=C
code=$(mktemp)
trap 'rm -f "$code"' EXIT
failed=0

find comm storage ckpt trainer -name '*.[ch]' -o -name '*.cu' | sort | xargs awk -f "$lint/code.awk" /dev/null >"$code"
if ! [ -s "$code" ]; then
    echo "no code found in $PWD"
    exit 1
fi

ban() # ban 'NAMES' 'FILES WHERE THEY ARE ALLOWED' 'WHY': calls of NAMES, but not of members x.NAME or x->NAME
{
    hits=$(grep -E "^[^:]*:[0-9]*:(.*[^A-Za-z0-9_.>])?($1)[[:space:]]*\\(" "$code" | grep -Ev "^($2):" || true)
    if [ -n "$hits" ]; then
        echo "$hits" | sed "s|\$|    <- $3|"
        failed=1
    fi
}
ban 'sprintf|vsprintf|strcpy|stpcpy|strcat|gets|strtok|alloca' '-' 'bounded forms: snprintf, memcpy with a length'
ban 'atoi|atol|atoll|atof' '-' 'they cannot report an error: strtoll, strtod'
ban 'malloc|calloc|realloc|reallocarray|free|aligned_alloc|posix_memalign|memalign|strdup|strndup|asprintf|vasprintf' \
    'comm/base/[a-z]*\.c' 'comm/base/mem.h'
ban 'exit|quick_exit' 'trainer/main\.c' 'return a status'
ban 'sleep|usleep|nanosleep|clock_nanosleep' 'comm/base/clock\.c' 'wait for what you wait for; between tests backoff_wait'

# Mutable globals, from the symbol tables: what lies in .data or .bss (tables of const pointers lie in .data.rel.ro). Allowed: the
# counter of mem.c, and the code protoc-c writes.
globals=0
for library in base storage comm ckpt trainer; do
    archive=${TESSERA_BUILD:-none}/libtessera_$library.a
    [ -f "$archive" ] || continue
    if nm "$archive" 2>/dev/null | grep -qE '__(asan|tsan|ubsan)_'; then
        echo "globals: $archive is built with a sanitizer, which adds its own; not looked at"
        continue
    fi
    globals=$((globals + 1))
    if objdump -t "$archive" | awk -v archive="$archive" '
        /file format/ { object = $1; sub(/:.*/, "", object) }
        / (\.data|\.bss|\.tdata|\.tbss|\*COM\*)/ {
            for (i = 2; i < NF; i++)
                if ($i ~ /^(\.data|\.bss|\.tdata|\.tbss|\*COM\*)/) break
            if ($i ~ /^\.data\.rel\.ro/ || $NF ~ /^\./ || $(i - 1) == "d") next
            if (object == "metadata.pb-c.c.o" || (object == "mem.c.o" && $NF == "calls")) next
            print archive "(" object "): " $NF " in " $i "    <- no mutable globals: it belongs in a handle"
            found = 1
        }
        END { exit !found }'; then
        failed=1
    fi
done

if [ "$failed" -ne 0 ]; then
    echo "banned: see above"
    exit 1
fi
echo "banned: $(wc -l <"$code") lines and the globals of $globals libraries are as they should be"
