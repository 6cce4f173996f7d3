#!/usr/bin/env python3
"""Run by tests/servers/with: is the server what the tests of S3 take it for? It checks signatures, keeps bytes, and has the answers to conditions that the
store is made for; the link is slow; the proxy spoils signed requests."""

import http.client
import os
import pathlib
import re
import socket
import ssl
import sys
import time
import urllib.parse

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import faults  # noqa: E402
import s3  # noqa: E402

KIND = os.environ["TESSERA_SERVER"]
# (PUT, CompleteMultipartUpload) with If-None-Match: * where the key exists: Ceph forgets about it in the second, Swift refuses the first.
CONDITIONS = (501, 412) if KIND == "swift" else (412, 200)


def check(condition, text):
    if not condition:
        sys.exit(f"FAILED: {KIND}: {text}")


bucket, _, prefix = os.environ["TESSERA_TEST_S3"].removeprefix("s3://").partition("/")
root = f"/{bucket}/{prefix}"
client = s3.Client()
check(client.keys(bucket, prefix) == {}, "the prefix is not empty")

body = os.urandom(100_000)
client.put(f"{root}/a b+c%\u00e9", body)
check(client.get(f"{root}/a b+c%\u00e9") == body, "other bytes")
check(client.request("GET", f"{root}/a b+c%\u00e9", headers={"Range": "bytes=1000-1999"}).body == body[1000:2000], "a range")
check(client.keys(bucket, prefix) == {f"{prefix}/a b+c%\u00e9": 100_000}, f"list: {client.keys(bucket, prefix)}")
check(client.request("GET", f"{root}/none").status == 404, "a missing key")
for change in ({"AWS_SECRET_ACCESS_KEY": "x" + client.env["AWS_SECRET_ACCESS_KEY"][1:]}, {"AWS_ACCESS_KEY_ID": "NOBODY:x"}):
    status = s3.Client({**client.env, **change}).request("GET", f"{root}/a b+c%\u00e9").status
    check(status == 403, f"another {list(change)[0]}: {status}")
check(client.request("PUT", f"{root}/x", headers={"X-Amz-Content-Sha256": "0" * 64}, body=b"x").status == 400, "a wrong hash of a body is taken")

part = os.urandom(5 << 20)
upload = s3.tag(client.want(200, "POST", f"{root}/big", query=[("uploads", "")]).body.decode(), "UploadId")
check([k for k, _ in client.uploads(bucket, prefix)] == [f"{prefix}/big"], "an upload is not listed")
tags = [client.put(f"{root}/big", data, query=[("partNumber", str(n)), ("uploadId", upload)]).headers["ETag"] for n, data in ((1, part), (2, b"end"))]
listed = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{e}</ETag></Part>" for n, e in enumerate(tags, 1))
complete = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
check(client.request("GET", f"{root}/big").status == 404, "half an upload can be read")
client.put(f"{root}/big", b"older")
reply = client.request("POST", f"{root}/big", query=[("uploadId", upload)], headers={"If-None-Match": "*"}, body=complete)
got = (client.request("PUT", f"{root}/big", headers={"If-None-Match": "*"}, body=b"2").status, reply.status)
check(got == CONDITIONS, f"If-None-Match: {got}, not {CONDITIONS}: {reply.body}")
check(client.get(f"{root}/big") == (b"older" if KIND == "swift" else part + b"end"), "other bytes of the upload")
check(client.request("DELETE", f"{root}/big").status == 204 and client.request("GET", f"{root}/big").status == 404, "DELETE")

url = urllib.parse.urlsplit(client.env["AWS_ENDPOINT_URL"])
if KIND == "radosgw-tls":
    check(url.scheme == "https", "no TLS")
    try:
        http.client.HTTPSConnection(url.netloc, timeout=10, context=ssl.create_default_context()).request("GET", "/")
        check(False, "anybody vouches for this certificate")
    except ssl.SSLCertVerificationError:
        pass
if KIND == "far":
    # Both have a lower bound whatever else the machine does: the round trip, and the time that the rate wants for these bytes.
    begin = time.monotonic()
    socket.create_connection((url.hostname, url.port), 10).close()
    check(time.monotonic() - begin >= 0.005, "no round trip of 5 ms")
    begin = time.monotonic()
    client.put(f"{root}/long", part * 4)
    check(time.monotonic() - begin >= len(part) * 4 * 8 / 1.05e9, "faster than 1 Gbit/s")
if KIND == "faults":
    control = faults.Control(os.environ["TESSERA_FAULTS"])
    control.rules({"fault": "slowdown", "count": 1}, {"fault": "strip", "method": "PUT"})
    name = f"{root}/a b+c%\u00e9"
    got = [client.request("PUT", name, headers={"If-None-Match": "*"}, body=b"3").status for _ in range(2)]
    check(got == [503, 200] and client.get(name) == b"3", f"503 once, then a server that ignores If-None-Match: {got}")
    check([r["status"] for r in control.log(method="PUT", path=re.escape(name))][-2:] == got, "the records")
print(f"passed: {KIND}")
