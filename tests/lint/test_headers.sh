#!/bin/sh
# Every header opens with a comment, and every function it declares has one: on its line, directly above, or above the first of a
# group that no blank line cuts. Static functions defined in a header are its own affair.
set -eu
cd "${TESSERA_SRC:-$(dirname "$0")/../..}"
export LC_ALL=C

# shellcheck disable=SC2016 # that is awk
find comm storage ckpt trainer -name '*.h' | sort | xargs awk '
function bad(line, why) { print FILENAME ":" line ": " why; failures++ }
FNR == 1 {
    files++
    depth = 0; documented = 0; comment = 0; statement = ""; noted = 0
    if ($0 !~ /^\/\*/) bad(1, "the file does not open with a comment that says what it is for")
}
{
    line = $0
    had_comment = comment || line ~ /\/\*/
    # take comments out of the line
    code = ""
    while (length(line)) {
        if (comment) {
            end = index(line, "*/")
            if (!end) { line = ""; break }
            line = substr(line, end + 2)
            comment = 0
        } else {
            start = index(line, "/*")
            if (!start) { code = code line; break }
            code = code substr(line, 1, start - 1)
            line = substr(line, start + 2)
            comment = 1
        }
    }
    if (had_comment && depth == 0) documented = 1
    if (code ~ /^[ \t]*$/) {
        if (!had_comment) documented = 0 # a blank line ends the group
        next
    }
    if (code ~ /^[ \t]*#/ || continued) { continued = code ~ /\\$/; next }
    if (code ~ /^extern "C" \{/) next
    if (depth == 0) {
        if (statement == "") { start_line = FNR; noted = documented }
        noted = noted || had_comment
        statement = statement " " code
    }
    opens = gsub(/\{/, "{", code)
    closes = gsub(/\}/, "}", code)
    depth += opens - closes
    if (depth < 0) depth = 0 # the end of extern "C"
    if (depth == 0 && code ~ /[;}][ \t]*$/) {
        if (statement ~ /\(/ && statement !~ /^ *(typedef|static)/ && statement !~ /[{=]/) check()
        statement = ""
    }
}
function check(    name) {
    functions++
    name = statement
    sub(/__attribute__.*/, "", name)
    sub(/\(.*/, "", name)
    sub(/[ \t]*$/, "", name)
    sub(/.*[ *]/, "", name)
    if (!noted) bad(start_line, name " has no comment on its line, above it, or above its group")
}
END {
    if (files == 0) { print "no headers found"; exit 1 }
    if (failures) { print "headers: " failures " places lack words"; exit 1 }
    print "headers: " functions " functions in " files " headers are explained"
}'
