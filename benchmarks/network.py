# SPDX-License-Identifier: BSD-3-Clause
"""The guest's NICs and the network of each, in a namespace of our own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vfio_user.client.qemu.namespace import Namespace, open_namespace


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of the guest on a network of its own. `options` go to our e1000; None: QEMU's built-in one.

    `tuned`: as one would run it for speed: QEMU on one CPU, the server on another, and idle CPUs that wake
    at once (`serve --cpu-latency 0`). Else the scheduler places both, and all is as it comes.
    """

    key: str
    number: int
    options: tuple[str, ...] | None
    tuned: bool = False

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


@contextlib.contextmanager
def namespace_with(nics: Sequence[Nic]) -> Iterator[Namespace]:
    """A namespace with the TAPs of all NICs up and addressed; gone when the block is left."""
    with open_namespace(f"vfio-user-bench-{os.getpid()}") as namespace:
        for nic in nics:
            namespace.add_tap(nic.tap, f"{nic.host4}/24")
            namespace.add_ipv6(nic.tap, f"{nic.host6}/64")
        yield namespace
