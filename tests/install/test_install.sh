#!/usr/bin/env bash
# The library as others get it: installs this build into a folder of its own, moves that folder, and builds the examples against it and
# nothing else: C and Fortran by pkg-config, C++ by find_package(tessera), shared and static. Each saves a table on 4 ranks and loads it on
# 3 and 5, and each loads what the others saved. Also: what is installed, and which symbols each library shows.
set -euo pipefail
export LC_ALL=C OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

fail()
{
    echo "install: $*" >&2
    exit 1
}

# expect COMMAND...: it succeeds; what it printed is shown only if it does not
expect()
{
    timeout 300 "$@" >"$tmp/log" 2>&1 || {
        cat "$tmp/log" >&2
        fail "failed: $*"
    }
}

# same WHAT FILE FILE
same()
{
    diff "$2" "$3" >&2 || fail "$1 differ (<: expected)"
}

if grep -q '^TESSERA_SANITIZE:[A-Z]*=.' "$TESSERA_BUILD/CMakeCache.txt"; then
    echo "install: a build with sanitizers is not one to install; nothing looked at"
    exit 0
fi

# --- install; the tree must work wherever it lies
expect cmake --install "$TESSERA_BUILD" --prefix "$tmp/first"
mv "$tmp/first" "$tmp/prefix"
prefix=$tmp/prefix
libdir=$(dirname "$(find "$prefix" -name libtessera.a)")
[[ -f $libdir/libtessera.a && -L $libdir/libtessera.so ]] || fail "no libtessera.a and libtessera.so"

find "$prefix" -name '*.h' -printf '%P\n' >"$tmp/headers"
echo include/tessera.h | same "installed headers" - "$tmp/headers"
! grep -rIlF -e "$TESSERA_BUILD" -e "$TESSERA_SRC" -e "$tmp/first" "$prefix" >&2 || fail "the files above name folders of the build"
[[ ! -e $prefix/bin/tessera ]] || expect "$prefix/bin/tessera" train --help-config
for f in "$prefix"/bin/tessera "$libdir"/libtessera.so "$prefix"/lib/tessera/*.so; do
    [[ ! -e $f ]] || ! readelf -d "$f" | grep -E 'R(UN)?PATH' | grep -F "$TESSERA_BUILD" || fail "$f searches the build folder"
done

# --- what each library shows is what the header declares
sed -E 's|/\*.*\*/||' "$prefix/include/tessera.h" | grep -E '^[a-z]' | grep -oE '\btessera_[a-z_]+\(' | tr -d '(' | sort -u >"$tmp/declared"
[[ $(wc -l <"$tmp/declared") -ge 20 ]] || fail "found only these functions in tessera.h: $(cat "$tmp/declared")"
nm -D --defined-only "$libdir/libtessera.so" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' | sort -u >"$tmp/shown"
same "functions of tessera.h and those shown by libtessera.so" "$tmp/declared" "$tmp/shown"
nm -g --defined-only "$libdir/libtessera.a" | awk 'NF == 3 { print $3 }' | sort -u >"$tmp/shown"
same "functions of tessera.h and those shown by libtessera.a" "$tmp/declared" "$tmp/shown"
readelf -d "$libdir/libtessera.so" | grep -q 'SONAME.*\[libtessera\.so\.[0-9]*\]' || fail "libtessera.so has no numbered soname"
! readelf -d "$libdir/libtessera.so" | grep NEEDED | grep -vE 'lib(c|m|mpi|hdf5[a-z_]*|protobuf-c|isal|curl|crypto|pthread|dl)\.so|ld-linux' >&2 ||
    fail "libtessera.so needs the libraries above"

# --- the header by itself, in both languages, with warnings as errors
{
    echo '#include <tessera.h>'
    for s in options reference tensor tick progress load_report load_options step blob_info; do
        echo "struct tessera_$s $s = TESSERA_${s^^};"
    done
} >"$tmp/header.c"
for std in c99 c11 c17; do
    expect gcc -std=$std -pedantic -Wall -Wextra -Wstrict-prototypes -Werror -I"$prefix/include" -fsyntax-only "$tmp/header.c"
done
for std in c++11 c++17 c++20; do
    expect g++ -x c++ -std=$std -pedantic -Wall -Wextra -Werror -I"$prefix/include" -fsyntax-only "$tmp/header.c"
done

# --- build the examples out of the installed tree
export PKG_CONFIG_PATH=$libdir/pkgconfig
unset PKG_CONFIG_LIBDIR CPATH C_INCLUDE_PATH LIBRARY_PATH LD_LIBRARY_PATH
examples=$(pkg-config --variable=datadir tessera)
read -ra cflags < <(pkg-config --cflags tessera)
read -ra libs < <(pkg-config --libs tessera)
read -ra static < <(pkg-config --static --libs tessera | sed 's/-ltessera/-l:libtessera.a/')
mkdir "$tmp/bin" "$tmp/mod"
cd "$tmp/mod"
warn=(-Wall -Wextra -Werror)
expect mpicc -std=c99 "${warn[@]}" "${cflags[@]}" -o "$tmp/bin/c_shared" "$examples/save_load.c" "${libs[@]}"
expect mpicc -std=c99 "${warn[@]}" "${cflags[@]}" -o "$tmp/bin/c_static" "$examples/save_load.c" "${static[@]}"
expect mpif90 -Wall -o "$tmp/bin/f_shared" "$examples/tessera.f90" "$examples/save_load.f90" "${libs[@]}"
expect mpif90 -Wall -o "$tmp/bin/f_static" "$examples/tessera.f90" "$examples/save_load.f90" "${static[@]}"
expect cmake -S "$here/cmake" -B "$tmp/cmake" -DCMAKE_PREFIX_PATH="$prefix" -DEXAMPLES="$examples" -DCMAKE_CXX_FLAGS="${warn[*]}"
expect cmake --build "$tmp/cmake"
cp "$tmp/cmake/save_load_shared" "$tmp/bin/cpp_shared"
cp "$tmp/cmake/save_load_static" "$tmp/bin/cpp_static"
for p in "$tmp"/bin/*; do
    case $p in
        *_shared) readelf -d "$p" | grep -q 'NEEDED.*libtessera' || fail "$p does not use libtessera.so" ;;
        *) ! readelf -d "$p" | grep 'NEEDED.*libtessera' || fail "$p uses libtessera.so" ;;
    esac
done

# --- the Fortran types are the C structs
expect gcc "${cflags[@]}" -o layout_c "$here/layout.c"
expect gfortran -o layout_f "$examples/tessera.f90" "$here/layout.f90" "${libs[@]}"
./layout_c >c.txt
LD_LIBRARY_PATH=$libdir ./layout_f >f.txt
same "the structs of tessera.h and tessera.f90" c.txt f.txt

# --- run them
# ranks N PROGRAM ROOT: every rank finds step 1 and no wrong element
ranks()
{
    LD_LIBRARY_PATH=$libdir expect mpirun --oversubscribe --bind-to none -np "$1" "$tmp/bin/$2" "$tmp/steps/$3"
    [[ $(grep -c "^rank [0-9]* of $1: step 1, 0 elements wrong\$" "$tmp/log") == "$1" ]] || {
        cat "$tmp/log" >&2
        fail "$2 on $1 ranks of $3: not every rank has it right"
    }
}
mkdir "$tmp/steps"
for p in c_shared c_static f_shared f_static cpp_shared cpp_static; do
    ranks 4 "$p" "$p" # saves
    ranks 3 "$p" "$p" # loads
done
ranks 5 f_shared c_shared
ranks 3 c_shared f_shared
ranks 5 c_shared cpp_shared
ranks 3 cpp_shared f_static

[[ ! -e $prefix/bin/tessera ]] || expect "$prefix/bin/tessera" ckpt verify "$tmp/steps/f_static"

# The checks above can fail: a byte of the table turned over is an error of the load.
shard=$(find "$tmp/steps/c_shared" -name '*.h5' | sort | head -n 1)
at=$(LC_ALL=C grep -obUaP -m 1 '\x00\x00\x00\x00\x00\x00\x59\x40' "$shard" | head -n 1 | cut -d: -f 1) # 100.0
printf '\x41' | dd of="$shard" bs=1 seek="$at" conv=notrunc status=none
if LD_LIBRARY_PATH=$libdir timeout 300 mpirun --oversubscribe --bind-to none -np 3 "$tmp/bin/c_shared" "$tmp/steps/c_shared" >"$tmp/log" 2>&1; then
    fail "a damaged file was loaded without an error"
fi
grep -q 'save_load: .*damaged' "$tmp/log" || fail "the error does not speak of damage: $(cat "$tmp/log")"

echo "install: $(wc -l <"$tmp/declared") functions, 6 programs, all as they should be"
