"""What the servers of these tests have in common: processes by pid, free ports, a folder that holds all of a server's state.

A server is a folder with server.json (what it was made with), run/NAME.pid, log/. Nothing outside the folder is read or written, apart from
shared memory and sockets that end with the processes. Only the standard library."""

import ctypes
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time

import s3

PR_SET_PDEATHSIG = 1


class Missing(Exception):
    """The machine lacks a package or a right: the test is skipped."""


class Broken(Exception):
    """The server did not come up."""


def need(programs, packages):
    for name in programs:
        if not shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
            raise Missing(f"{name} is not installed (Debian: {packages})")


def dies_with_parent(sig):
    """For preexec_fn: this signal when the process that starts it is gone, however it ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, sig)


def free_ports(host, count):
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind((host, 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def poll(seconds, condition, text):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Broken(text)
        time.sleep(0.02)


class Server:
    """bound: the daemons end when this process does. The settings of a folder are those of its first start that came to its end; one that did not
    must be made in another folder."""

    names = ()  # of the daemons, in the order of starting

    def __init__(self, folder, bound=False, **settings):
        self.dir = pathlib.Path(folder).resolve()
        self.bound = bound
        file = self.dir / "server.json"
        self.made = file.is_file()
        self.set = json.loads(file.read_text()) if self.made else settings

    def save(self):
        """The folder is a server from here on."""
        file = self.dir / "server.json"
        file.touch(0o600)
        file.write_text(json.dumps(self.set, indent=1))
        self.made = True

    def inside(self, command):
        """The command in the network namespace of the server."""
        pid = self.set.get("netns")
        return [*(["nsenter", f"--net=/proc/{pid}/ns/net"] if pid else []), *map(str, command)]

    def call(self, *command):
        r = subprocess.run(self.inside(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        if r.returncode:
            raise Broken(f"{command[0]}: exit status {r.returncode}: {r.stderr[-500:]}")
        return r.stdout

    def launch(self, name, command):
        with open(self.dir / "log" / f"{name}.out", "ab") as out:
            p = subprocess.Popen(self.inside(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=not self.bound,
                                 preexec_fn=dies_with_parent(signal.SIGKILL) if self.bound else None)
        # For a moment after exec the command line is empty, by which pid() knows what is ours.
        poll(10, lambda: p.poll() is not None or pathlib.Path(f"/proc/{p.pid}/cmdline").read_bytes(), f"{name} does not start")
        (self.dir / "run" / f"{name}.pid").write_text(str(p.pid))

    def pid(self, name):
        """Of a daemon that runs (or is stopped); None. A process that has not our folder on its command line is not ours."""
        try:
            pid = int((self.dir / "run" / f"{name}.pid").read_text())
            ours = os.fsencode(self.dir) in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            return pid if ours else None
        except (OSError, ValueError):
            return None

    def wait_for(self, name, seconds, condition):
        def there():
            if not self.pid(name):
                raise Broken(f"{name} died: {self.said(name)}")
            return condition()

        poll(seconds, there, f"{name} is not ready after {seconds} s: {self.said(name)}")

    def said(self, name):
        try:
            return (self.dir / "log" / f"{name}.out").read_text(errors="replace")[-800:].strip()
        except OSError:
            return ""

    def start(self):
        """Make the server, or bring back those of its daemons that are gone; it serves when this returns."""
        for sub in ("log", "run"):
            (self.dir / sub).mkdir(parents=True, exist_ok=True)
        if self.made:
            self.run(False)
            return
        try:
            self.make()
            self.run(True)
            self.save()
        except BaseException:
            self.stop()
            raise

    def stop(self):
        for name in reversed(self.names):
            self.end(name, signal.SIGTERM)
            (self.dir / "run" / f"{name}.pid").unlink(missing_ok=True)

    def end(self, name, sig, seconds=10):
        """Signal a daemon and wait until it is gone; KILL after that many seconds."""
        pid = self.pid(name)
        if not pid:
            return
        os.kill(pid, sig)
        os.kill(pid, signal.SIGCONT)
        try:
            poll(seconds, lambda: _gone(pid), "")
        except Broken:
            os.kill(pid, signal.SIGKILL)
            poll(60, lambda: _gone(pid), f"{name} does not die")

    def answers(self):
        """Is there any reply of HTTP?"""
        try:
            return s3.Client(self.environment()).unsigned() > 0
        except OSError:
            return False

    def environment(self):
        """What a client needs, under the names that S3 clients know."""
        s = self.set
        env = {"AWS_ENDPOINT_URL": f"http{'s' if s.get('tls') else ''}://{s['host']}:{s['port']}", "AWS_REGION": self.region,
               "AWS_ACCESS_KEY_ID": s["access"], "AWS_SECRET_ACCESS_KEY": s["secret"]}
        if s.get("tls"):
            env["AWS_CA_BUNDLE"] = str(self.dir / "tls.crt")
        return env


def _gone(pid):
    try:
        os.waitpid(pid, os.WNOHANG)  # if it is our child
    except ChildProcessError:
        pass
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def new_secret():
    """Like Amazon's: 40 characters, of which some need care in URLs."""
    return secrets.token_hex(15) + "/+=" + secrets.token_urlsafe(12)[:7]


def command_line(kind, text, *more):
    """start, stop, env, status DIR for a script: settings are NAME=VALUE after DIR."""
    verbs = {"start": lambda s: s.start(), "stop": lambda s: s.stop(), "env": lambda s: None,
             "status": lambda s: print("\n".join(f"{n}: {s.pid(n) or 'not running'}" for n in s.names))}
    verbs.update(more[0] if more else {})
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(text.strip())
    words = [a.partition("=")[::2] for a in sys.argv[3:]]
    try:
        server = kind(sys.argv[2], **{k: v for k, v in words if v})
        server.words = [k for k, v in words if not v]
        verbs[sys.argv[1]](server)
        if sys.argv[1] in ("start", "env"):
            for name, value in server.environment().items():
                print(f"export {name}='{value}'")
    except Missing as e:
        print(f"skipped: {e}")
        sys.exit(77)
    except Broken as e:
        sys.exit(f"{sys.argv[0]}: {e}")
