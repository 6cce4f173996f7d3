#!/usr/bin/env python3
"""OpenStack Swift with its S3 API (s3api): a second server of other authors, which verifies signatures and regions, honours If-None-Match on
CompleteMultipartUpload and answers 501 to it on PUT.

    swift.py start | stop | env | status DIR

Needs the Debian packages swift-proxy, swift-account, swift-container, swift-object; no root. DIR must be on a file system with user xattrs (ext4, xfs). Its
access keys have a colon in them (ACCOUNT:USER)."""

import getpass
import os
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import daemon  # noqa: E402
import s3  # noqa: E402

PACKAGES = "swift-proxy swift-account swift-container swift-object"
# Debian's programs look for swift.conf in /etc/swift only; here they are told where it is.
RUN = """import runpy, sys, swift.common.utils as utils
utils.SWIFT_CONF_FILE = sys.argv[1]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")"""
# A ring a server: one device with one copy of everything.
RINGS = """import sys
from swift.common.ring import RingBuilder
for word in sys.argv[2:]:
    name, host, port = word.split(",")
    ring = RingBuilder(2, 1, 0)
    ring.add_dev({"region": 1, "zone": 1, "ip": host, "port": int(port), "device": "d1", "weight": 1, "meta": ""})
    ring.rebalance()
    ring.get_ring().save(sys.argv[1] + "/" + name + ".ring.gz")"""
DEFAULT = """[DEFAULT]
bind_ip = {host}
bind_port = {port}
user = {user}
swift_dir = {etc}
devices = {dir}/dev
mount_check = false
workers = 0
log_level = WARNING
log_address = /nonexistent
"""
STORAGE = """[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY = """[pipeline:main]
pipeline = catch_errors cache s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
# There is no memcached at this address: each look-up goes to the servers.
[filter:cache]
use = egg:swift#memcache
memcache_servers = {host}:9
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {secret} .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
check_bucket_owner = false
auth_pipeline_check = false
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


class Swift(daemon.Server):
    names = ("account", "container", "object", "proxy")
    region = "us-east-1"

    def make(self):
        daemon.need(["swift-proxy-server", "swift-account-server", "swift-container-server", "swift-object-server"], PACKAGES)
        etc = self.dir / "etc"
        etc.mkdir()
        (self.dir / "dev" / "d1").mkdir(parents=True)
        try:
            os.setxattr(self.dir / "dev" / "d1", "user.test", b"x" * 1000)
        except OSError as e:
            raise daemon.Missing(f"{self.dir}: no user xattrs on this file system: {e.strerror}") from None
        ports = daemon.free_ports("127.0.0.1", 4)
        self.set = {"host": "127.0.0.1", "port": ports[3], "bucket": "ckpt", "access": "test:tester", "secret": daemon.new_secret(), **self.set}
        s = self.set
        (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\nswift_hash_path_prefix = test\n")
        for name, port in zip(self.names, ports):
            text = DEFAULT.format(host=s["host"], port=port, user=getpass.getuser(), etc=etc, dir=self.dir)
            if name == "proxy":
                account, _, user = s["access"].partition(":")
                text += PROXY.format(host=s["host"], account=account, user=user, secret=s["secret"])
            else:
                text += STORAGE.format(name=name)
            (etc / f"{name}-server.conf").write_text(text)
        self.call("/usr/bin/python3", "-I", "-c", RINGS, etc, *(f"{n},{s['host']},{p}" for n, p in zip(self.names[:3], ports)))

    def run(self, fresh):
        etc = self.dir / "etc"
        for name in self.names:
            if not self.pid(name):
                self.launch(name, ["/usr/bin/python3", "-I", "-c", RUN, etc / "swift.conf", f"/usr/bin/swift-{name}-server", etc / f"{name}-server.conf"])
        for name in self.names:
            self.wait_for(name, 60, self.answers)
        if fresh:
            self.wait_for("proxy", 30, lambda: s3.Client(self.environment()).request("PUT", f"/{self.set['bucket']}").status == 200)


if __name__ == "__main__":
    daemon.command_line(Swift, __doc__)
