#!/bin/sh
# Each lint finds what it is for: a small tree with one thing wrong must make it fail and name the place; the tree without, pass.
set -eu
lint=$(cd "$(dirname "$0")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
export TESSERA_SRC="$tree" TESSERA_BUILD="$tree/build"

fresh() # the tree without anything wrong
{
    rm -rf "${tree:?}"/*
    mkdir -p "$tree/comm/base" "$tree/storage" "$tree/ckpt" "$tree/trainer" "$tree/tests" "$tree/build"
    cp "$lint/../../.clang-format" "$tree/"
    printf '/* a: what it is for. */\n\n/* Adds. */\nint add(int a, int b);\nint sub(int a, int b);\n' >"$tree/comm/base/a.h"
    printf '/* sprintf(x) and malloc(1) in words are fine. */\n#include "comm/base/a.h"\n\n#include <stdio.h>\n\n' >"$tree/ckpt/c.c"
    printf 'static const char *const names[] = { "exit(1)", "strcpy(" };\n' >>"$tree/ckpt/c.c"
    printf 'const char *name(int i)\n{\n    return names[i];\n}\n' >>"$tree/ckpt/c.c"
}

passes() # passes LINT
{
    if ! said=$("$lint/test_$1.sh" 2>&1); then
        echo "FAILED: $1 refuses a tree that is right: $said" >&2
        exit 1
    fi
}

fails() # fails LINT PLACE LINE-OF-C: with the line at the end of PLACE
{
    echo "$3" >>"$tree/$2"
    if said=$("$lint/test_$1.sh" 2>&1); then
        echo "FAILED: $1 did not see in $2: $3" >&2
        exit 1
    fi
    case $said in
    *"$2:"*) ;;
    *)
        echo "FAILED: $1 saw '$3' but did not name $2: $said" >&2
        exit 1
        ;;
    esac
    fresh
}

fresh
for l in layers banned headers format; do
    passes "$l"
done

fails layers comm/base/a.h '#include "storage/store.h"'
fails layers comm/x.c '#include "storage/store.h"'
fails layers storage/x.c '#include "comm/comm.h"'
fails layers storage/x.c '#include "ckpt/plan.h"'
fails layers ckpt/x.c '#include "trainer/trainer.h"'
mkdir -p "$tree/comm/device"
fails layers comm/base/x.c '#include "comm/device/device.h"'
fails layers ckpt/c.c '#include "plan.h"'
fails layers ckpt/c.c '#include <mpi.h>'
fails layers ckpt/c.c '#  include <hdf5.h>'
fails layers trainer/x.c '#include <yaml.h>'
fails layers trainer/x.c '#include <cuda_runtime.h>'
fails layers trainer/x.c '#include <some_vendor.h>'
echo '#include <mpi.h>' >"$tree/comm/comm_mpi.c"
passes layers
fresh

fails banned ckpt/c.c 'void f(char *s) { sprintf(s, "x"); }'
fails banned trainer/x.c 'void f(char *s) { (void)strcpy (s, "x"); }'
fails banned ckpt/c.c 'int f(const char *s) { return atoi(s); }'
fails banned storage/x.c 'void *f(void) { return malloc(3); }'
fails banned storage/x.c 'void f(void *p) { free(p); }'
fails banned trainer/x.c 'void f(void) { /* why */ exit(1); }'
fails banned ckpt/c.c 'void f(void) { usleep(10); }'
echo 'void f(struct d *d) { d->ops->free(d); d->x.malloc(1); mem_free(d); }' >>"$tree/ckpt/c.c"
echo 'void *g(void) { return malloc(1); }' >"$tree/comm/base/mem.c"
echo 'int main(void) { exit(0); }' >"$tree/trainer/main.c"
passes banned
fresh

globals() # globals WORD-OF-C: compiled into a library
{
    echo "$1" >"$tree/build/g.c"
    (cd "$tree/build" && ${CC:-cc} -fPIC -c g.c -o g.c.o && rm -f libtessera_ckpt.a && ar rcs libtessera_ckpt.a g.c.o)
}
for c in 'int counter;' 'static int n; int f(void); int f(void) { return ++n; }' 'int f(void) { static int n = 4; return ++n; }' \
    '__thread int t;'; do
    globals "$c"
    if "$lint/test_banned.sh" >/dev/null 2>&1; then
        echo "FAILED: banned did not see the global in: $c" >&2
        exit 1
    fi
done
globals 'const int table[] = { 1 }; const char *const names[] = { "a", "b" }; int f(int i); int f(int i) { return table[i]; }'
passes banned
fresh

fails headers comm/base/a.h "
int unexplained(void);"
fails headers comm/base/a.h "
int two_lines(int a,
              int b);"
fails headers storage/y.h 'int no_opening_comment(void); /* but this */'
fails format ckpt/c.c 'int  f( void );'
echo "lints: each one fails when it should"
