"""A small S3 client of the standard library, so that tests see what is stored without the program under test: signed requests (SigV4, written
from Amazon's description of it, for bodies that fit in memory), path-style addresses."""

import collections
import datetime
import hashlib
import hmac
import http.client
import os
import re
import ssl
import urllib.parse

Reply = collections.namedtuple("Reply", "status headers body")
UNSIGNED = "UNSIGNED-PAYLOAD"


def quote(text, safe=""):
    return urllib.parse.quote(text, safe=safe + "-._~")


def _mac(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def signature_headers(env, method, path, query, headers):
    """The Authorization header for a request. path: encoded, query: [(name, value)] not encoded, headers: {name: value} with Host, X-Amz-Date and
    X-Amz-Content-Sha256; all of them are signed. env has the keys and the region under their usual names."""
    low = sorted((k.lower(), " ".join(v.split())) for k, v in headers.items())
    names = ";".join(k for k, _ in low)
    pairs = "&".join(f"{k}={v}" for k, v in sorted((quote(k), quote(v)) for k, v in query))
    given = dict(low)
    canonical = "\n".join([method, path, pairs, *(f"{k}:{v}" for k, v in low), "", names, given["x-amz-content-sha256"]])
    stamp = given["x-amz-date"]
    scope = f"{stamp[:8]}/{env['AWS_REGION']}/s3/aws4_request"
    key = ("AWS4" + env["AWS_SECRET_ACCESS_KEY"]).encode()
    for part in scope.split("/"):
        key = _mac(key, part)
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={env['AWS_ACCESS_KEY_ID']}/{scope}, SignedHeaders={names}, Signature={_mac(key, text).hex()}"}


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")


class Client:
    """env: a dictionary with the AWS_ variables that tests/servers/with exports; os.environ if none is given."""

    def __init__(self, env=None):
        self.env = dict(env or os.environ)
        self.url = urllib.parse.urlsplit(self.env["AWS_ENDPOINT_URL"])

    def connect(self, timeout=60):
        if self.url.scheme == "https":
            context = ssl.create_default_context(cafile=self.env.get("AWS_CA_BUNDLE"))
            return http.client.HTTPSConnection(self.url.netloc, timeout=timeout, context=context)
        return http.client.HTTPConnection(self.url.netloc, timeout=timeout)

    def request(self, method, path, query=(), headers=None, body=b"", timeout=60):
        """path: /bucket/key, not encoded. Returns status, headers and body whatever the status is."""
        path = quote(path, "/")
        given = {"Host": self.url.netloc, "X-Amz-Date": now(), "X-Amz-Content-Sha256": hashlib.sha256(body).hexdigest(), **(headers or {})}
        given.update(signature_headers(self.env, method, path, list(query), given))
        text = "&".join(f"{quote(k)}={quote(v)}" for k, v in sorted(query))
        connection = self.connect(timeout)
        try:
            connection.request(method, path + ("?" + text if text else ""), body, given)
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def unsigned(self):
        """The status of a request without a signature, to see whether somebody is there."""
        connection = self.connect(2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        finally:
            connection.close()

    def want(self, status, *arguments, **more):
        reply = self.request(*arguments, **more)
        if reply.status != status:
            raise RuntimeError(f"{arguments}: HTTP {reply.status}, not {status}: {reply.body[:500]!r}")
        return reply

    def get(self, path, **more):
        return self.want(200, "GET", path, **more).body

    def put(self, path, body, **more):
        return self.want(200, "PUT", path, body=body, **more)

    def keys(self, bucket, prefix=""):
        """{key: bytes} of everything below a prefix."""
        found, token = {}, []
        while True:
            text = self.get(f"/{bucket}", query=[("list-type", "2"), ("prefix", prefix), *token]).decode()
            for entry in re.findall("<Contents>(.*?)</Contents>", text, re.S):
                found[unescape(tag(entry, "Key"))] = int(tag(entry, "Size"))
            if tag(text, "IsTruncated") != "true":
                return found
            token = [("continuation-token", unescape(tag(text, "NextContinuationToken")))]

    def uploads(self, bucket, prefix=""):
        """[(key, upload id)] of the multipart uploads that nobody has completed or aborted."""
        text = self.get(f"/{bucket}", query=[("uploads", "")]).decode()
        found = [(unescape(tag(u, "Key")), tag(u, "UploadId")) for u in re.findall("<Upload>(.*?)</Upload>", text, re.S)]
        return [u for u in found if u[0].startswith(prefix)]


def tag(text, name):
    found = re.search(f"<{name}>(.*?)</{name}>", text, re.S)
    return found.group(1) if found else ""


def unescape(text):
    for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, char)
    return text
