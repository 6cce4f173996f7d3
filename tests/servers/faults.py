"""An HTTP proxy that spoils what it is told to spoil, between an S3 client and a server, and records every request.

Requests go through as they are, with their Host, so signatures stay right. Rules and records are had at the control address:

    GET /rules         the rules, with how often each was applied        PUT /rules    JSON: a list of rules, in place of those before
    GET /log           the records since the last DELETE /log            DELETE /log

A rule is an object; the first that fits a request and has some `count` left is applied. Which requests it fits: `method`, `path` (decoded, /bucket/key),
`query` (decoded): regular expressions, searched for; `skip`: so many that fit are let through first; `count`: how many it spoils (all of them if it is not there).
What it does:

    fault=reply    status, code, headers: an answer of S3's form instead of the server's. REPLIES has the usual ones by name: fault=slowdown, internal,
                   throttled, skewed (with a Date of `hours` ahead), expired, quota
    fault=reset    the connection is reset when `after` bytes (0) of the body have passed: of the request's for PUT and POST, else of the reply's
    fault=cut      the reply ends after `after` bytes (half of it), whatever its Content-Length said
    fault=flip     bit 0 of byte `after` (0) of the reply's body is the other way round
    fault=slow     bodies pass at `rate` bytes a second, in both directions
    fault=hang     no answer, until the rules are replaced
    fault=lost     the server does the work, then the connection is reset instead of the reply
    fault=strip    the server does not see `header` (If-None-Match): the request is signed anew
    fault=lag      what appeared in the last `seconds` is not in lists of objects

A record: n, time, method, path, query, range, status (0: none was sent), put and got (bytes of the two bodies that passed), fault, seconds. No record has a
header of the request but Range. Control and proxy listen on loopback only. Bodies pass in pieces: memory is bounded."""

import email.utils
import http.client
import http.server
import json
import re
import select
import socket
import socketserver
import struct
import threading
import time
import urllib.parse

import s3

PIECE = 1 << 18
REPLIES = {
    "slowdown": (503, "SlowDown"), "internal": (500, "InternalError"), "throttled": (429, "TooManyRequests"), "skewed": (403, "RequestTimeTooSkewed"),
    "expired": (400, "ExpiredToken"), "quota": (403, "QuotaExceeded"), "reply": (500, "InternalError"),
}
KNOWN = {*REPLIES, "reset", "cut", "flip", "slow", "hang", "lost", "strip", "lag"}


class Closed(Exception):
    """A connection ended, or is to end, without more."""


class Stream:
    """One side's connection: lines and bodies of HTTP/1.1."""

    def __init__(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.file = sock, sock.makefile("rb", PIECE)

    def head(self):
        """First line and [(name, value)]; None at the end of the connection."""
        first = self.file.readline(65536).decode("latin-1").rstrip("\r\n")
        headers = []
        while first:
            line = self.file.readline(65536).decode("latin-1")
            if not line.strip():
                return first, headers
            name, _, value = line.partition(":")
            headers.append((name, value.strip()))
        return None

    def body(self, headers, none=False):
        """Its pieces."""
        length = value(headers, "content-length")
        if none:
            return
        if (value(headers, "transfer-encoding") or "").lower() == "chunked":
            while size := int(self.file.readline(1000).split(b";")[0], 16):
                yield self.read(size)
                self.file.readline(10)
            while self.file.readline(65536).strip():
                pass
            return
        left = int(length or 0)
        while left:
            piece = self.file.read1(min(left, PIECE))
            if not piece:
                raise Closed
            left -= len(piece)
            yield piece

    def read(self, n):
        got = self.file.read(n)
        if len(got) < n:
            raise Closed
        return got

    def send_head(self, first, headers):
        self.sock.sendall("".join([first, "\r\n", *(f"{k}: {v}\r\n" for k, v in headers), "\r\n"]).encode("latin-1"))

    def reset(self):
        """The other side sees `connection reset by peer`."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()
        raise Closed

    def close(self):
        self.file.close()
        self.sock.close()


def value(headers, name):
    return next((v for k, v in headers if k.lower() == name), None)


def without(headers, *names):
    return [(k, v) for k, v in headers if k.lower() not in names]


class Rules:
    def __init__(self):
        self.lock = threading.Lock()
        self.rules, self.records, self.born = [], [], {}
        self.changed = threading.Event()

    def replace(self, rules):
        for rule in rules:
            if rule.get("fault") not in KNOWN:
                raise ValueError(f"fault={rule.get('fault')}: none of {', '.join(sorted(KNOWN))}")
        with self.lock:
            self.rules = [{"skip": 0, "count": None, **rule, "applied": 0} for rule in rules]
            self.changed.set()
            self.changed = threading.Event()

    def choose(self, method, path, query):
        with self.lock:
            for rule in self.rules:
                text = {"method": method, "path": path, "query": query}
                if rule["count"] == 0 or not all(re.search(rule[k], text[k]) for k in text if k in rule):
                    continue
                if rule["skip"]:
                    rule["skip"] -= 1
                    continue
                rule["count"] = rule["count"] and rule["count"] - 1
                rule["applied"] += 1
                return dict(rule), self.changed
        return {"fault": None}, self.changed

    def record(self, fields):
        with self.lock:
            fields["n"] = len(self.records)
            self.records.append(fields)

    def note(self, method, path, query, headers, status):
        """When keys came and went, for lists that lag."""
        if status in (200, 204):
            with self.lock:
                if method == "PUT" and "partNumber=" not in query or method == "POST" and "uploadId=" in query:
                    self.born.setdefault(path, time.monotonic())
                elif method == "DELETE" and "uploadId=" not in query:
                    self.born.pop(path, None)

    def visible(self, path, seconds):
        """Is an object, or anything below a prefix, old enough? What this proxy has not seen come is."""
        with self.lock:
            times = [t for key, t in self.born.items() if key == path or path.endswith("/") and key.startswith(path)]
        return not times or min(times) <= time.monotonic() - seconds


class Exchange:
    """One request and its reply."""

    def __init__(self, proxy, client, head):
        self.proxy, self.client = proxy, client
        self.first, self.headers = head
        self.method, self.target, _ = self.first.split(" ", 2)
        path, _, query = self.target.partition("?")
        self.path, self.query = urllib.parse.unquote(path), urllib.parse.unquote(query)
        self.rule, self.changed = proxy.rules.choose(self.method, self.path, self.query)
        self.fault = self.rule["fault"]
        self.begin = time.monotonic()
        # There from the beginning, and ahead of what the client sees: a client with a whole reply finds a whole record.
        self.record = {"time": time.time(), "method": self.method, "path": self.path, "query": self.query, "range": value(self.headers, "range"),
                       "status": 0, "put": 0, "got": 0, "fault": self.fault, "seconds": 0.0}
        proxy.rules.record(self.record)

    def note(self, **more):
        """More bytes, or the status."""
        for name, n in more.items():
            self.record[name] += n
        self.record["seconds"] = round(time.monotonic() - self.begin, 4)

    def through(self, server):
        upload = self.method in ("PUT", "POST")
        if self.fault == "hang":
            self.hang()
        if (value(self.headers, "expect") or "").lower() == "100-continue":
            self.client.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces = self.paced(self.client.body(self.headers))
        if self.fault == "reset" and (upload or not self.rule.get("after", 0)):
            for piece in pieces:
                if self.record["put"] + len(piece) >= self.rule.get("after", 0):
                    break
                self.note(put=len(piece))
            self.client.reset()
        if self.fault in REPLIES:
            self.note(put=sum(map(len, pieces)))
            return self.reply()
        up = server()
        try:
            up.send_head(self.first, self.forwarded())
            for piece in pieces:
                self.note(put=len(piece))
                up.sock.sendall(piece)
            head = up.head()
            while head and head[0].split(" ")[1] == "100":
                head = up.head()
        except OSError:
            head = None
        if not head:
            raise Closed  # the server went away: so do we
        self.back(up, *head)

    def back(self, up, first, headers):
        status = int(first.split(" ")[1])
        bare = self.method == "HEAD" or status in (204, 304)
        pieces = up.body(headers, bare)
        self.proxy.rules.note(self.method, self.path, self.query, self.headers, status)
        if self.fault == "lost":
            for _ in pieces:
                pass
            self.client.reset()
        listing = self.fault == "lag" and self.method == "GET" and "list-type=2" in self.query
        if listing or value(headers, "transfer-encoding"):
            whole = b"".join(pieces)
            whole = self.lag(whole) if listing and status == 200 else whole
            headers = [*without(headers, "transfer-encoding", "content-length"), ("Content-Length", str(len(whole)))]
            pieces = [whole]
        length = int(value(headers, "content-length") or 0)
        end = {"cut": self.rule.get("after", length // 2), "reset": self.rule.get("after", 0)}.get(self.fault, length) if not bare else 0
        self.note(status=status)
        self.client.send_head(first, headers)
        for piece in self.paced(pieces):
            if self.fault == "flip":
                piece = self.flip(piece)
            piece = piece[: max(0, end - self.record["got"])]
            self.note(got=len(piece))
            self.client.sock.sendall(piece)
        if self.fault == "reset":
            self.client.reset()
        if self.fault == "cut" or (value(headers, "connection") or "").lower() == "close":
            raise Closed

    def reply(self):
        status, code = REPLIES[self.fault]
        status = self.rule.get("status", status)
        date = time.time() + 3600 * self.rule.get("hours", 7 if self.fault == "skewed" else 0)
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{self.rule.get("code", code)}</Code><Message>made by faults.py</Message></Error>'
        body = b"" if self.method == "HEAD" else text.encode()
        headers = {"Content-Type": "application/xml", "Content-Length": len(text), "Date": email.utils.formatdate(date, usegmt=True), **self.rule.get("headers", {})}
        self.note(status=status, got=len(body))
        self.client.send_head(f"HTTP/1.1 {status} {code}", headers.items())
        self.client.sock.sendall(body)

    def forwarded(self):
        headers = without(self.headers, "expect")
        if self.fault != "strip":
            return headers
        headers = without(headers, self.rule.get("header", "If-None-Match").lower(), "authorization")
        signed = {k: v for k, v in headers if k.lower() in ("host", "content-type", "content-md5", "range") or k.lower().startswith("x-amz-")}
        path, _, query = self.target.partition("?")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        return [*headers, *s3.signature_headers(self.proxy.env, self.method, path, pairs, signed).items()]

    def lag(self, body):
        seconds, bucket = self.rule.get("seconds", 5), "/" + self.path.strip("/") + "/"

        def keep(found):
            key = s3.tag(found.group(0), "Key") or s3.tag(found.group(0), "Prefix")
            return found.group(0) if self.proxy.rules.visible(bucket + urllib.parse.unquote(s3.unescape(key)), seconds) else ""

        return re.sub("<(Contents|CommonPrefixes)>.*?</\\1>", keep, body.decode(), flags=re.S).encode()

    def flip(self, piece):
        at = self.rule.get("after", 0) - self.record["got"]
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1:] if 0 <= at < len(piece) else piece

    def paced(self, pieces):
        """The pieces, no faster than the rule says."""
        if self.fault != "slow":
            yield from pieces
            return
        step = max(1, self.rule["rate"] // 20)
        for piece in pieces:
            for at in range(0, len(piece), step):
                part = piece[at : at + step]
                self.changed.wait(len(part) / self.rule["rate"])
                yield part

    def hang(self):
        """Until the rules change or the client leaves; then the connection is over."""
        while not self.changed.wait(0.05):
            if select.select([self.client.sock], [], [], 0)[0] and not self.client.sock.recv(PIECE, socket.MSG_DONTWAIT):
                break
        raise Closed


class Proxy:
    """A running proxy. env: address and keys of the server. url and control_url are where it is."""

    def __init__(self, env):
        self.env, self.rules = env, Rules()
        address = urllib.parse.urlsplit(env["AWS_ENDPOINT_URL"])
        self.upstream = (address.hostname, address.port)
        self.servers = [_Threads(("127.0.0.1", 0), self._serve), _Threads(("127.0.0.1", 0), self._control)]
        self.url, self.control_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)
        for s in self.servers:
            threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        for s in self.servers:
            s.shutdown()
            s.server_close()
        self.rules.replace([])

    def _serve(self, sock, address, _):
        client, up = Stream(sock), []

        def server():
            # A connection that the server has closed meanwhile is readable; it must be a new one, for a PUT cannot be sent twice.
            if up and select.select([up[0].sock], [], [], 0)[0]:
                up.pop().close()
            if not up:
                up.append(Stream(socket.create_connection(self.upstream, 30)))
                up[0].sock.settimeout(None)
            return up[0]

        try:
            while head := client.head():
                Exchange(self, client, head).through(server)
        except (Closed, OSError, ValueError):
            pass
        finally:
            for stream in (client, *up):
                stream.close()

    def _control(self, sock, address, server):
        rules = self.rules

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status, what):
                body = json.dumps(what).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                with rules.lock:
                    what = {"/rules": rules.rules, "/log": rules.records}.get(self.path)
                    self.answer(404 if what is None else 200, what)

            def do_PUT(self):
                try:
                    rules.replace(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                    self.answer(200, "done")
                except (ValueError, AttributeError) as e:
                    self.answer(400, str(e))

            def do_DELETE(self):
                with rules.lock:
                    rules.records.clear()
                self.answer(200, "done")

            def log_message(self, *_):
                pass

        Handler(sock, address, server)


class _Threads(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 128, True

    def handle_error(self, *_):
        pass


class Control:
    """The control address as a test uses it."""

    def __init__(self, url):
        self.address = urllib.parse.urlsplit(url).netloc

    def _ask(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.address, timeout=30)
        connection.request(method, path, None if body is None else json.dumps(body))
        reply = connection.getresponse()
        answer = json.loads(reply.read())
        connection.close()
        if reply.status != 200:
            raise ValueError(answer)
        return answer

    def rules(self, *rules):
        self._ask("PUT", "/rules", rules)

    def applied(self):
        """How often each rule was."""
        return [rule["applied"] for rule in self._ask("GET", "/rules")]

    def log(self, **fields):
        """The records in which these fields have these values, or match them if they are patterns."""
        return [r for r in self._ask("GET", "/log") if all(re.search(v, r[k] or "") if isinstance(v, str) else r[k] == v for k, v in fields.items())]

    def forget(self):
        self._ask("DELETE", "/log")
