#!/usr/bin/env python3
"""The CUDA plugins as they were built: each exports its one function and nothing else, and each piece of device code in the
kernels' plugin is there twice, for sm_90 and as PTX for later chips. Skipped where the build has no plugins (no nvcc, or
-DTESSERA_CUDA=OFF); that they compile without a warning is the build's own business (TESSERA_WERROR)."""
import os
import struct
import subprocess
import sys

MAGIC = 0xBA55ED50  # of a fat binary
PTX, CUBIN = 1, 2

build = os.environ["TESSERA_BUILD"]
plugins = {"tessera_cuda.so": "device_plugin", "tessera_ops_cuda.so": "ops_plugin"}
there = [name for name in plugins if os.path.exists(os.path.join(build, name))]
if not there:
    print("cuda_build: this build has no CUDA plugins")
    sys.exit(77)


def exported(path):
    out = subprocess.run(["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return sorted(line.split()[-1] for line in out.splitlines() if line.split()[-2] not in "AV")


def pieces(data):
    """(kinds and architectures) of each fat binary in a file."""
    at = data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end, found = at + header, at + header + size, set()
        if header == 16 and end <= len(data):
            while entry < end:
                kind, _, head, payload = struct.unpack_from("<HHIQ", data, entry)
                found.add((kind, struct.unpack_from("<I", data, entry + 28)[0]))
                entry += head + payload
            yield found
        at = data.find(struct.pack("<I", MAGIC), at + 4)


failures = []
for name, function in plugins.items():
    if name not in there:
        failures.append(f"{name} was not built, {there[0]} was")
        continue
    path = os.path.join(build, name)
    names = exported(path)
    if names != [function]:
        failures.append(f"{name} exports {', '.join(names)}, not {function} alone")
    if name == "tessera_ops_cuda.so":
        with open(path, "rb") as f:
            found = [p for p in pieces(f.read()) if p]
        if not found:
            failures.append(f"{name} holds no device code")
        failures += [f"{name}: device code for {sorted(p)}, not for sm_90 and as PTX" for p in found
                     if not {(PTX, 90), (CUBIN, 90)} <= p]
if failures:
    print("\n".join(failures))
    sys.exit(1)
print("cuda_build: both plugins are as they should be")
