# SPDX-License-Identifier: BSD-3-Clause
"""A network namespace of our own, with a TAP for each NIC: nothing here touches the machine's network."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vfio_user.benchmarks.processes import BenchmarkError


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of the guest on a network of its own. `options` go to our e1000; None: QEMU's built-in one."""

    key: str
    number: int
    options: tuple[str, ...] | None

    @property
    def tap(self) -> str:
        return f"vub{self.number}"

    @property
    def mac(self) -> str:
        return f"52:54:00:be:0c:{self.number:02x}"

    def addresses(self, end: int) -> tuple[str, str]:
        """IPv4 and IPv6 of the host's end (1) or the guest's (2), without prefix length."""
        return f"10.99.{self.number}.{end}", f"fd99:0:0:{self.number}::{end}"

    @property
    def host4(self) -> str:
        return self.addresses(1)[0]

    @property
    def host6(self) -> str:
        return self.addresses(1)[1]


def inside(namespace: str) -> list[str]:
    """Prefix that runs a command in the namespace; it execs, so the pid stays."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--"]


def ip(namespace: str, *words: str) -> None:
    """`ip` in the namespace. BenchmarkError with its own words when it fails."""
    _run(["ip", "-netns", namespace, *words])


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespace_with(nics: Sequence[Nic]) -> Iterator[str]:
    """The name of a namespace with the TAPs of all NICs up and addressed; gone when the block is left."""
    name = f"vfio-user-bench-{os.getpid()}"
    _run(["ip", "netns", "add", name])
    try:
        ip(name, "link", "set", "lo", "up")
        for nic in nics:
            ip(name, "tuntap", "add", nic.tap, "mode", "tap")
            v4, v6 = nic.addresses(1)
            ip(name, "addr", "add", f"{v4}/24", "dev", nic.tap)
            ip(name, "addr", "add", f"{v6}/64", "dev", nic.tap, "nodad")
            ip(name, "link", "set", nic.tap, "up")
        yield name
    finally:
        _run(["ip", "netns", "delete", name])
