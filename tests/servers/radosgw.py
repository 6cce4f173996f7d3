#!/usr/bin/env python3
"""A Ceph Object Gateway with a monitor and one OSD of its own: an S3 server that verifies signatures, honours If-None-Match on PUT and knows quotas.

    radosgw.py start DIR [store=bluestore] [tls=1] [gb=8]   make it, or bring back what is missing; prints its environment
    radosgw.py stop DIR                                     end its daemons; with store=bluestore the data stays
    radosgw.py env DIR
    radosgw.py status DIR
    radosgw.py quota DIR BYTES | off                        403 QuotaExceeded above that many bytes of the user
    radosgw.py key DIR ACCESS SECRET | ACCESS off           one more key of the user; it is no key any more

Needs the Debian packages ceph-mon, ceph-osd, radosgw and, for tls=1, openssl; no root. memstore keeps all bytes in the OSD's memory: they survive the
death of radosgw, but not of the OSD. bluestore is one sparse file in DIR. DIR/run/{mon,osd,rgw}.pid are there to be signalled."""

import pathlib
import sys
import uuid

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import daemon  # noqa: E402
import s3  # noqa: E402

PACKAGES = "ceph-mon ceph-osd radosgw"
CONF = """[global]
fsid = {fsid}
mon host = [v2:{host}:{mon_port}]
public addr = {host}
cluster addr = {host}
ms bind msgr1 = false
# One machine trusts itself; radosgw still authenticates its S3 clients.
auth cluster required = none
auth service required = none
auth client required = none
run dir = {dir}/run
admin socket = {dir}/run/$name.$pid.asok
log file = {dir}/log/$name.log
crash dir = {dir}/log
keyring = {dir}/keyring
pid file =
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon max pg per osd = 2000
# A new pool is a proposal: not one a second.
paxos propose interval = 0.02
paxos min wait = 0.01

[mon]
mon data = {dir}/mon
mon data avail warn = 1
mon data avail crit = 1

[osd]
osd data = {dir}/osd
osd objectstore = {store}
memstore device bytes = {bytes}
bluestore block create = true
bluestore block size = {bytes}
osd memory target = 1073741824
# A fast shutdown would lose memstore's data.
osd fast shutdown = {fast}
osd mon shutdown timeout = 1
osd class load list = *
osd class default list = *

[client.rgw]
rgw frontends = beast {frontend}
rgw data = {dir}/rgw
rgw rados pool pg num min = 4
rgw thread pool size = 64
rgw enable usage log = false
rgw enable ops log = false
rgw dynamic resharding = false
# These threads would make it stop slowly.
rgw enable lc threads = false
# What is deleted is freed, and counted as free, within seconds.
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 5
rgw bucket quota ttl = 1
# The default, secure, needs cephx.
ms mon client mode = crc
"""


class Radosgw(daemon.Server):
    names = ("mon", "osd", "rgw")
    region = "default"

    def make(self):
        daemon.need(["ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool"], PACKAGES)
        if len(str(self.dir)) > 70:
            raise daemon.Broken(f"{self.dir}: too long a path for the sockets in it")
        given = self.set
        mon_port, port = daemon.free_ports(given.get("host", "127.0.0.1") if not given.get("netns") else "127.0.0.1", 2)
        self.set = {"host": "127.0.0.1", "store": "memstore", "gb": 8, "mon_port": mon_port, "port": port, "fsid": str(uuid.uuid4()), "bucket": "ckpt",
                    "access": "TESTACCESSKEY" + uuid.uuid4().hex[:7].upper(), "secret": daemon.new_secret(), **given}
        s = self.set
        frontend = f"endpoint={s['host']}:{s['port']} tcp_nodelay=1"
        if s.get("tls"):
            daemon.need(["openssl"], "openssl")
            self.call("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=tessera-test",
                      "-addext", f"subjectAltName=IP:{s['host']}", "-keyout", self.dir / "tls.key", "-out", self.dir / "tls.crt")
            frontend = f"ssl_endpoint={s['host']}:{s['port']} ssl_certificate={self.dir}/tls.crt ssl_private_key={self.dir}/tls.key tcp_nodelay=1"
        for sub in ("mon", "osd", "rgw"):
            (self.dir / sub).mkdir()
        self.conf.write_text(CONF.format(dir=self.dir, frontend=frontend, bytes=int(s["gb"]) << 30, fast=str(s["store"] != "memstore").lower(), **s))

    @property
    def conf(self):
        return self.dir / "ceph.conf"

    def ceph(self, *words):
        return self.call("ceph", "-c", self.conf, "--name", "client.rgw", "--connect-timeout", "20", *words)

    def admin(self, *words):
        return self.call("radosgw-admin", "-c", self.conf, "-n", "client.rgw", *words)

    def run(self, fresh):
        s = self.set
        if fresh:
            self.call("monmaptool", "--create", "--fsid", s["fsid"], "--addv", "a", f"[v2:{s['host']}:{s['mon_port']}]", self.dir / "monmap")
            self.call("ceph-mon", "-c", self.conf, "--mkfs", "-i", "a", "--monmap", self.dir / "monmap")
        if not self.pid("mon"):
            self.launch("mon", ["ceph-mon", "-c", self.conf, "-i", "a", "-f"])
        if fresh:
            osd = str(uuid.uuid4())
            self.ceph("osd", "new", osd)
            self.call("ceph-osd", "-c", self.conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        if not self.pid("osd"):
            if not fresh:
                self.ceph("osd", "down", "0")  # after a crash the map says it is up
            self.launch("osd", ["ceph-osd", "-c", self.conf, "-i", "0", "-f"])
            self.wait_for("osd", 30, lambda: " 1 up" in self.ceph("osd", "stat"))
        if not self.pid("rgw"):
            self.launch("rgw", ["radosgw", "-c", self.conf, "-n", "client.rgw", "-f"])
        if fresh:
            self.admin("user", "create", "--uid=test", "--display-name=test", f"--access-key={s['access']}", f"--secret={s['secret']}")
        self.wait_for("rgw", 60, self.answers)
        if fresh:
            s3.Client(self.environment()).want(200, "PUT", f"/{s['bucket']}")

    def quota(self, limit):
        """Of the user; None: none."""
        scope = ["--quota-scope=user", "--uid=test"]
        if limit is not None:
            self.admin("quota", "set", *scope, f"--max-size={limit}")
        self.admin("quota", "disable" if limit is None else "enable", *scope)

    def key(self, access, secret):
        """Of the user; None: take it away."""
        which = ["--uid=test", "--key-type=s3", f"--access-key={access}"]
        self.admin("key", "rm" if secret is None else "create", *which, *([] if secret is None else [f"--secret-key={secret}"]))


if __name__ == "__main__":
    daemon.command_line(Radosgw, __doc__, {
        "quota": lambda s: s.quota(None if s.words == ["off"] else int(s.words[0])),
        "key": lambda s: s.key(s.words[0], None if s.words[1] == "off" else s.words[1])})
