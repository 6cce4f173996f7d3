#!/usr/bin/env python3
"""Every fault of faults.py as a client sees it, what is recorded, and that nothing else is changed: before a small server that checks signatures."""

import hashlib
import http.client
import http.server
import json
import pathlib
import re
import sys
import threading
import time
import urllib.parse

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import faults  # noqa: E402
import s3  # noqa: E402

ENV = {"AWS_ACCESS_KEY_ID": "WHO", "AWS_SECRET_ACCESS_KEY": "secret/word+", "AWS_REGION": "there"}
objects, calls = {}, []


class Upstream(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def say(self, status, body=b"", chunked=False):
        self.send_response(status)
        self.send_header("Transfer-Encoding" if chunked else "Content-Length", "chunked" if chunked else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            for at in range(0, len(body), 1000) if chunked else ():
                piece = body[at : at + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n" if chunked else body)

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        calls.append((self.command, path))
        given = self.headers.get("Authorization", "")
        signed = {k: self.headers.get(k, "") for k in re.sub(".*SignedHeaders=|,.*", "", given).split(";")}
        if "host" not in signed or s3.signature_headers(ENV, self.command, path, pairs, signed)["Authorization"] != given:
            return self.say(403)
        if self.headers["x-amz-content-sha256"] not in (s3.UNSIGNED, hashlib.sha256(body).hexdigest()):
            return self.say(400)
        if self.command == "PUT":
            if self.headers.get("If-None-Match") and path in objects:
                return self.say(412)
            objects[path] = body
            return self.say(200)
        if self.command == "DELETE":
            objects.pop(path, None)
            return self.say(204)
        if "list-type" in query:
            prefix = dict(pairs)["prefix"]
            if dict(pairs).get("delimiter"):
                names = sorted({k.partition("/b/")[2].partition("/")[0] for k in objects if "/" in k.partition("/b/")[2]})
                return self.say(200, "".join(f"<CommonPrefixes><Prefix>{n}/</Prefix></CommonPrefixes>" for n in names).encode(), True)
            found = "".join(f"<Contents><Key>{k[3:]}</Key><Size>{len(v)}</Size></Contents>" for k, v in objects.items() if k[3:].startswith(prefix))
            return self.say(200, f"<R>{found}<IsTruncated>false</IsTruncated></R>".encode(), True)
        if path not in objects:
            return self.say(404)
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        cut = slice(int(found[1]), int(found[2]) + 1) if found else slice(None)
        return self.say(206 if found else 200, objects[path][cut])

    do_PUT = do_DELETE = do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


def check(condition, text):
    if not condition:
        print("FAILED: " + text, file=sys.stderr)
        sys.exit(1)


upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
upstream.daemon_threads = True
threading.Thread(target=upstream.serve_forever, args=(0.05,), daemon=True).start()
ENV["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{upstream.server_address[1]}"
proxy = faults.Proxy(ENV)
control = faults.Control(proxy.control_url)
client = s3.Client({**ENV, "AWS_ENDPOINT_URL": proxy.url})
DATA = bytes(i * 7 % 251 for i in range(700_000))


def fails(text, *request, **more):
    """The request ends without a whole reply."""
    try:
        reply = client.request(*request, **more)
    except (OSError, http.client.HTTPException) as e:
        return e
    check(False, f"{text}: HTTP {reply.status} with {len(reply.body)} bytes")


# Nothing to spoil: bytes, ranges, odd keys, chunked replies, HEAD and DELETE pass, and wrong keys are still refused.
client.put("/b/a b+c%", DATA)
check(client.get("/b/a b+c%") == DATA, "other bytes came back")
check(client.request("GET", "/b/a b+c%", headers={"Range": "bytes=10-19"}).body == DATA[10:20], "a range")
check(client.request("HEAD", "/b/a b+c%").status == 200 and client.request("DELETE", "/b/none").status == 204, "HEAD, DELETE")
check(client.keys("b") == {"a%20b%2Bc%25": 700_000}, f"list: {client.keys('b')}")
wrong = s3.Client({**client.env, "AWS_SECRET_ACCESS_KEY": "other"})
check(wrong.request("GET", "/b/a b+c%").status == 403, "a wrong key is let in")
raw = s3.Client(client.env).connect()
raw.putrequest("PUT", "/b/continue", skip_host=False)
for name, what in (("Content-Length", "5"), ("Expect", "100-continue")):
    raw.putheader(name, what)
raw.endheaders()
check(raw.sock.recv(100).startswith(b"HTTP/1.1 100"), "no 100 Continue")
raw.send(b"12345")
check(raw.getresponse().status == 403, "an unsigned PUT")
raw.close()
log = control.log()
check([r["method"] for r in log[:4]] == ["PUT", "GET", "GET", "HEAD"] and log[0]["put"] == 700_000 and log[1]["got"] == 700_000, f"records: {log[:4]}")
check(log[2]["range"] == "bytes=10-19" and log[2]["got"] == 10 and log[2]["status"] == 206 and log[2]["path"] == "/b/a b+c%", f"record: {log[2]}")
text = json.dumps(log)
check(not any(word in text for word in ("AWS4", "Signature", ENV["AWS_SECRET_ACCESS_KEY"])), "a record has the signature")
control.forget()
check(control.log() == [], "records stay")

# Replies in the server's place; count, skip and fitting.
for name, (status, code) in faults.REPLIES.items():
    control.rules({"fault": name, "count": 1})
    reply = client.request("GET", "/b/a b+c%")
    check(reply.status == status and f"<Code>{code}</Code>" in reply.body.decode(), f"{name}: {reply}")
    check(client.request("GET", "/b/a b+c%").status == 200, f"{name}: more than one")
    check(control.applied() == [1], f"{name}: applied {control.applied()}")
control.rules({"fault": "slowdown", "headers": {"Retry-After": "3"}, "method": "PUT"}, {"fault": "reply", "status": 418, "query": "partNumber=2&", "skip": 1, "count": 2})
check(client.request("PUT", "/b/x", body=b"x" * 300_000).headers["Retry-After"] == "3", "Retry-After")
got = [client.request("GET", "/b/y", query=[("partNumber", "2"), ("uploadId", "u")]).status for _ in range(4)]
check(got == [404, 418, 418, 404], f"skip and count: {got}")
check("/b/x" not in objects, "a spoiled PUT went through")
control.rules({"fault": "skewed", "hours": 3})
date = client.request("HEAD", "/b/x").headers["Date"]
ahead = time.mktime(time.strptime(date, "%a, %d %b %Y %H:%M:%S GMT")) - time.mktime(time.gmtime())
check(abs(ahead - 3 * 3600) < 120, f"Date {date}")

# Connections and bodies.
control.rules({"fault": "reset", "method": "GET"}, {"fault": "reset", "method": "PUT", "after": 400_000})
check(isinstance(fails("reset", "GET", "/b/a b+c%"), ConnectionResetError), "no reset before the reply")
before = len(calls)
fails("reset in an upload", "PUT", "/b/x", body=DATA)
check("/b/x" not in objects and len(calls) == before, "half an upload arrived")
control.rules({"fault": "reset", "after": 1000}, {"fault": "cut"})
fails("reset in a reply", "GET", "/b/a b+c%")
control.rules({"fault": "cut", "count": 1}, {"fault": "cut", "after": 5})
e = fails("cut", "GET", "/b/a b+c%")
check(isinstance(e, http.client.IncompleteRead) and len(e.partial) == 350_000, f"cut at the half: {e!r}")
e = fails("cut after 5", "GET", "/b/a b+c%")
check(e.partial == DATA[:5], f"cut after 5: {e!r}")
check([r["got"] for r in control.log(fault="cut")] == [350_000, 5], f"records of cuts: {control.log(fault='cut')}")
control.rules({"fault": "flip", "after": 300_000})
got = client.get("/b/a b+c%")
check([i for i in range(len(DATA)) if got[i] != DATA[i]] == [300_000], "flip")
control.rules({"fault": "slow", "rate": 2_000_000})
check(client.get("/b/a b+c%") == DATA, "slow: other bytes")
check(control.log(fault="slow")[-1]["seconds"] > 0.3, "slow is not slow")
control.rules({"fault": "lost", "method": "PUT"})
fails("lost", "PUT", "/b/lost", body=b"arrived")
check(objects["/b/lost"] == b"arrived", "lost: the server did nothing")
control.rules({"fault": "hang", "path": "^/b/hang$"})
hanging = []
waiter = threading.Thread(target=lambda: hanging.append(fails("hang", "GET", "/b/hang")))
waiter.start()
while control.applied() != [1]:
    check(waiter.is_alive(), "it does not hang")
check(client.request("GET", "/b/lost").status == 200, "others hang, too")
check(not hanging, "it does not hang")
control.rules()
waiter.join(10)
check(hanging, "it hangs after the rules are gone")

# Conditions and lists.
control.rules({"fault": "strip", "path": "strip"})
for want, name in ((200, "strip"), (200, "strip"), (200, "other"), (412, "other")):
    got = client.request("PUT", f"/b/{name}", headers={"If-None-Match": "*"}, body=b"1").status
    check(got == want, f"If-None-Match: {name}: {got}")
control.rules({"fault": "lag", "seconds": 1})
client.put("/b/dir/new", b"n")
objects["/b/old"] = b"from before"
dirs = [("delimiter", "/"), ("list-type", "2"), ("prefix", "")]
check("dir/new" not in client.keys("b") and b"dir/" not in client.get("/b", query=dirs), "a list without a lag")
check(client.get("/b/dir/new") == b"n" and "old" in client.keys("b"), "objects lag, or old ones do")
end = time.monotonic() + 10
while "dir/new" not in client.keys("b") or b"dir/" not in client.get("/b", query=dirs):
    check(time.monotonic() < end, "it is never listed")
try:
    control.rules({"fault": "sabotage"})
    check(False, "an unknown fault is taken")
except ValueError as e:
    check("sabotage" in str(e) and "lost" in str(e), f"{e}")

# The server goes: so does the client's connection, without a reply that the server did not give.
upstream.shutdown()
upstream.server_close()
control.rules()
proxy.upstream = ("127.0.0.1", 1)
fails("no server", "GET", "/b/lost")
proxy.close()
print("passed: faults")
