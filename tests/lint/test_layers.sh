#!/bin/sh
# Who may include whom. Layers: trainer -> ckpt -> storage -> comm/base, and trainer, ckpt -> comm -> comm/device -> comm/base;
# never upward, never sideways between storage and comm. The include root is the repository. A vendor's header is included by
# the file or files of `vendor` below and no other; what is neither ours, a vendor's, nor on the list of `system` is an error.
# Tests may include anything.
set -eu
cd "${TESSERA_SRC:-$(dirname "$0")/../..}"
export LC_ALL=C

find comm storage ckpt trainer -name '*.[ch]' -o -name '*.cu' | sort | xargs grep -nHE '^[[:space:]]*#[[:space:]]*include' /dev/null |
    awk '
function layer(path) {
    if (path ~ /^comm\/base\//) return "comm/base"
    if (path ~ /^comm\/device\//) return "comm/device"
    sub(/\/.*/, "", path)
    return path
}
function bad(why) { print at ": " why; failures++ }
BEGIN {
    below["comm/base"] = " comm/base "
    below["comm/device"] = " comm/base comm/device "
    below["comm"] = " comm/base comm/device comm "
    below["storage"] = " comm/base storage "
    below["ckpt"] = " comm/base comm/device comm storage ckpt "
    below["trainer"] = " comm/base comm/device comm storage ckpt trainer "
    vendor["mpi\\.h"] = "^comm/comm_mpi\\.c$"
    vendor["nccl\\.h"] = "^comm/comm_nccl\\.c$"
    vendor["(hdf5|H5[A-Za-z]*)\\.h"] = "^ckpt/(h5shard|view)\\.c$"
    vendor["curl/.*"] = "^storage/http\\.c$"
    vendor["yaml\\.h"] = "^trainer/config\\.c$"
    vendor["isa-l(\\.h|/.*)"] = "^comm/base/bytes\\.c$"
    vendor["openssl/.*"] = "^storage/[a-z0-9_]*\\.c$"
    vendor["pcre2\\.h"] = "^trainer/data/tokenizer\\.c$"
    vendor["(cblas|openblas[a-z_/]*)\\.h"] = "^trainer/ops/cpu/blas\\.c$"
    vendor["(dnnl|oneapi/dnnl/dnnl)\\.h"] = "^trainer/ops/cpu/dnnl\\.c$"
    vendor["(cuda|cublas|nv)[A-Za-z0-9_/]*\\.h"] = "(\\.cu|^comm/comm_nccl\\.c)$"
    vendor["(jansson|png|protobuf-c/protobuf-c)\\.h"] = "."
    system_headers = "^(assert|complex|cpuid|ctype|dirent|dlfcn|errno|fcntl|fenv|float|fnmatch|ftw|getopt|glob|immintrin|inttypes|" \
        "libgen|limits|locale|math|netdb|poll|pthread|sched|semaphore|setjmp|signal|spawn|stdalign|stdarg|stdatomic|stdbool|" \
        "stddef|stdint|stdio|stdlib|stdnoreturn|string|strings|termios|time|unistd|wchar|" \
        "(arpa|linux|net|netinet|sys)/[a-z0-9_/]*)\\.h$"
}
{
    split($0, part, ":")
    file = part[1]
    at = file ":" part[2]
    text = substr($0, length(at) + 2)
    sub(/^[ \t]*#[ \t]*include[ \t]*/, "", text)
    if (text ~ /^"/) {
        name = substr(text, 2)
        sub(/".*/, "", name)
        if (name ~ /^metadata\.pb-c\.h$/) {
            if (layer(file) != "ckpt") bad("generated " name " is the business of ckpt/")
        } else if (name !~ /^(comm|storage|ckpt|trainer)\//)
            bad("\"" name "\" is not named from the repository, with its layer")
        else if (index(below[layer(file)], " " layer(name) " ") == 0)
            bad(layer(file) " must not include " layer(name) " (" name ")")
        next
    }
    if (text !~ /^</) { bad("cannot read this include: " text); next }
    name = substr(text, 2)
    sub(/>.*/, "", name)
    for (v in vendor)
        if (name ~ "^(" v ")$") {
            if (file !~ vendor[v]) bad("<" name "> may be included only by " vendor[v])
            next
        }
    if (name !~ system_headers) bad("<" name "> is neither a system header nor in the table of vendors")
}
END {
    if (NR == 0) { print "no includes found in " ENVIRON["PWD"]; exit 1 }
    if (failures) { print failures " includes break the layers"; exit 1 }
    print "layers: " NR " includes are as they should be"
}'
