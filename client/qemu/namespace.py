# SPDX-License-Identifier: BSD-3-Clause
"""A network namespace of our own: interfaces, sockets and programs in it, and nothing of it outside.

Needs root. The host's network is neither used nor changed.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import trio

from vfio_user.client.qemu.process import namespace_words, running

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_LISTENING = "00010000"  # __SO_ACCEPTCON of linux/net.h, in the flags of /proc/net/unix
UPLINK = "uplink0"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of `ip netns`."""

    name: str

    def run(self, *words: str) -> str:
        """A program in it that must succeed; its output. OSError with its own words when it does not."""
        return _run([*namespace_words(self.name), *words])

    def ip(self, words: str) -> str:
        """`ip` with a line of arguments."""
        return self.run("ip", *words.split())

    def sysctl(self, name: str, value: object) -> None:
        self.run("sysctl", "-q", "-w", f"{name}={value}")

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket that belongs to it, whoever uses it."""
        # A thread of its own changes over: this one stays where it is.
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(self._open_socket, family, kind, protocol).result()

    def _open_socket(self, family: int, kind: int, protocol: int) -> socket.socket:
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            if _LIBC.setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            return socket.socket(family, kind, protocol)
        finally:
            os.close(fd)

    def add_tap(self, name: str, *addresses: str, mtu: int = 1500) -> None:
        """A TAP device that is up; without addresses it has no IPv6 either, so nothing speaks unasked."""
        self.ip(f"tuntap add dev {name} mode tap")
        self.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 1)
        self.ip(f"link set {name} mtu {mtu} up")
        for address in addresses:
            self.ip(f"address add {address} dev {name}")

    def add_ipv6(self, name: str, address: str) -> None:
        """IPv6 on an interface, with an address that is valid at once."""
        self.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 0)
        self.ip(f"-6 address add {address} dev {name} nodad")

    def add_uplink(self, address: str, gateway: str) -> None:
        """An interface with an address and a default route, as passt wants to see; it leads nowhere."""
        self.ip(f"link add {UPLINK} type veth peer name {UPLINK}-end")
        self.ip(f"address add {address} dev {UPLINK}")
        self.ip(f"link set {UPLINK} up")
        self.ip(f"link set {UPLINK}-end up")
        self.ip(f"route add default via {gateway}")

    @contextlib.asynccontextmanager
    async def passt(self, folder: Path) -> AsyncIterator[Path]:
        """A passt in it, IPv4 only; gives its socket. As root it wants another user for its work."""
        path, log = folder / "passt.socket", folder / "passt.log"
        os.chmod(folder, 0o777)  # that user must reach it
        words = ["passt", "--foreground", "--ipv4-only", "--runas", "nobody", "--socket", str(path)]
        async with running(words, log, netns=self.name) as child:
            with trio.fail_after(60):
                while not self.listens(path):
                    if child.popen.poll() is not None:
                        raise OSError(f"passt has ended: {child.log_text()}")
                    await trio.sleep(0.01)
            yield path

    def listens(self, path: Path) -> bool:
        """Asked of the kernel: it is bound a moment before it listens, and passt takes one client only."""
        rows = (line.split() for line in self.run("cat", "/proc/net/unix").splitlines()[1:])
        return any(row[3] == _LISTENING and row[-1] == str(path) for row in rows)


def _run(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def open_namespace(name: str) -> Iterator[Namespace]:
    """A new namespace with `lo` up; deleted at the end. OSError when it cannot be made."""
    _run(["ip", "netns", "add", name])
    try:
        namespace = Namespace(name)
        namespace.ip("link set lo up")
        yield namespace
    finally:
        _run(["ip", "netns", "delete", name])
