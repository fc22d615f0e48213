# SPDX-License-Identifier: BSD-3-Clause
"""The reverse ARP requests that reach a bridge: a card says where it is now."""

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu.moving import BRIDGE
from vfio_user.client.qemu.namespace import Namespace

RARP = 0x8035
TIMES = 5
_BROADCAST, _REQUEST = b"\xff" * 6, bytes.fromhex("0001 0800 06 04 0003")


@dataclass(slots=True)
class Announcements:
    """When each came, in seconds of trio, and whose it was; `bad` is what is not as RFC 903 has it."""

    times: list[float] = field(default_factory=list)
    senders: list[bytes] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)
    _came: trio.Condition = field(default_factory=trio.Condition)

    async def first_since(self, begun: float, timeout: float = 20.0) -> float:
        """When the first one came that came after a time."""
        with trio.fail_after(timeout):
            async with self._came:
                while not (found := [time for time in self.times if time >= begun]):
                    await self._came.wait()
        return found[0]

    async def receive(self, sock: trio.socket.SocketType) -> None:
        while True:
            frame = await sock.recv(2048)
            sender = frame[6:12]
            # Ethernet's addresses; the hardware address of who asks, and of whom he asks for, are his own.
            good = frame[:6] == _BROADCAST and frame[14:22] == _REQUEST
            if not (good and frame[22:28] == frame[32:38] == sender):
                self.bad.append(frame)
            self.times.append(trio.current_time())
            self.senders.append(sender)
            async with self._came:
                self._came.notify_all()


@contextlib.asynccontextmanager
async def listening(namespace: Namespace) -> AsyncIterator[Announcements]:
    """To the bridge of a namespace."""
    raw = namespace.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(RARP))
    raw.bind((BRIDGE, RARP))
    raw.setblocking(False)
    with trio.socket.from_stdlib_socket(raw) as sock:
        announcements = Announcements()
        async with background() as nursery:
            nursery.start_soon(announcements.receive, sock)
            yield announcements
