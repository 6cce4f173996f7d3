"""A far host on this machine: a network namespace behind a link of a given rate and round trip.

The link is a pair of TUN devices, one here and one in a namespace without a name, and a process that carries packets between them and lets each wait
half a round trip (many kernels have no netem). The rate is tc's token bucket at both ends. Packets travel as the kernel's own large segments, so that
the process needs a few thousand turns a second, not a hundred thousand. All of it, devices, addresses and namespace, ends with that process.

Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN), iproute2 and /dev/net/tun."""

import collections
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import time

import daemon

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04  # checksums, TSO for IPv4 and IPv6
LARGEST = 65536 + 64


def tun(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    return fd


def carry(a, b, delay):
    """Packets of each device to the other one, `delay` seconds later, until somebody ends this process."""
    waiting = {a: collections.deque(), b: collections.deque()}  # (when, packet) to be written there
    while True:
        now = time.monotonic()
        for fd, queue in waiting.items():
            while queue and queue[0][0] <= now:
                try:
                    os.write(fd, queue.popleft()[1])
                except OSError:
                    pass  # a packet lost
        next_one = min((q[0][0] for q in waiting.values() if q), default=now + 1)
        for fd in select.select([a, b], [], [], max(0, next_one - time.monotonic()))[0]:
            other = b if fd == a else a
            try:
                for _ in range(64):
                    waiting[other].append((time.monotonic() + delay, os.read(fd, LARGEST)))
            except BlockingIOError:
                pass



class Link:
    """host: the address of the far end. netns: the process whose network namespace it is."""

    def __init__(self, rate="1gbit", round_trip_ms=5):
        daemon.need(["ip", "tc"], "iproute2")
        if os.geteuid() != 0:
            raise daemon.Missing("a link to a namespace needs root")
        if not os.path.exists("/dev/net/tun"):
            raise daemon.Missing("there is no /dev/net/tun")
        name = f"far{os.getpid()}"
        # Addresses for tests of networks (RFC 2544), four of them a link, of which nobody has one yet.
        for n in range(os.getpid(), os.getpid() + 100):
            net, near, self.host = (socket.inet_ntoa(struct.pack(">I", (198 << 24 | 18 << 16) + n % 32768 * 4 + i)) for i in range(3))
            if not subprocess.run(["ip", "route", "show", "root", net + "/30"], capture_output=True, text=True).stdout:
                break
        here = tun(name)
        ready, tell = os.pipe()
        self.netns = os.fork()
        if self.netns == 0:
            self._far(here, name, tell, round_trip_ms)
        os.close(here)
        os.close(tell)
        said = os.read(ready, 1000).decode()
        os.close(ready)
        shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms"]
        inside = ["nsenter", f"--net=/proc/{self.netns}/ns/net"]
        for command in ([], ["ip", "addr", "add", near + "/30", "dev", name], ["ip", "link", "set", name, "up"],
                        [*inside, "ip", "addr", "add", self.host + "/30", "dev", name], [*inside, "ip", "link", "set", name, "up"],
                        [*inside, "ip", "link", "set", "lo", "up"], ["tc", "qdisc", "add", "dev", name, *shape],
                        [*inside, "tc", "qdisc", "add", "dev", name, *shape]):
            if command:
                r = subprocess.run(command, capture_output=True, text=True)
                said = "ok" if r.returncode == 0 else f"{' '.join(command)}: {r.stderr.strip()}"
            if said != "ok":
                self.close()
                raise daemon.Missing(f"no namespace behind a link can be made here: {said}")

    def _far(self, here, name, tell, round_trip_ms):
        """The process that carries; it lives in the far namespace."""
        try:
            daemon.dies_with_parent(signal.SIGKILL)()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
            there = tun(name)
            os.write(tell, b"ok")
            os.close(tell)
            carry(here, there, round_trip_ms / 2000)
        except OSError as e:
            os.write(tell, str(e).encode())
        finally:
            os._exit(1)

    def close(self):
        os.kill(self.netns, signal.SIGKILL)
        os.waitpid(self.netns, 0)
