# SPDX-License-Identifier: BSD-3-Clause
"""`ping -i 0.01` from this side of the guest's network, which remembers which echo was not answered."""

import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from vfio_user.client.background import background
from vfio_user.client.qemu.namespace import Namespace

INTERVAL = 0.01
_REQUEST, _REPLY, _IP_HEADER = 8, 0, 20
_HEADER = struct.Struct("!BBHHH")
_ID = 0x5C81

ROOM = 100
"""Answers that the guest's kernel keeps to be sent (net/ipv4/icmp.c, icmp_sk_init: bytes for two of 64 KiB,
and an answer takes 1,280). Of a guest that serves no interrupt for more than a second all others are lost,
also without a move."""


@dataclass(slots=True)
class Pinger:
    """When each echo was sent, and when it was answered, by trio's clock in seconds."""

    sent: list[float] = field(default_factory=list)
    answered: dict[int, float] = field(default_factory=dict)
    _changed: trio.Condition = field(default_factory=trio.Condition)

    def lost(self, since: float, until: float) -> int:
        """Of those sent in between, how many were not answered, and that not for want of the guest's room."""
        return sum(
            since <= time < until and number not in self.answered and self.waiting(time) < ROOM
            for number, time in enumerate(self.sent)
        )

    def waiting(self, moment: float) -> int:
        """How many of those sent until a moment were answered after it."""
        return sum(
            answer > moment and self.sent[number] <= moment for number, answer in self.answered.items()
        )

    def slowest(self, since: float, until: float) -> float:
        """The longest way there and back of those that were sent and answered in between, in seconds."""
        trips = (
            answer - self.sent[number]
            for number, answer in self.answered.items()
            if answer <= until and self.sent[number] >= since
        )
        return max(trips, default=0.0)

    def silence(self, since: float, until: float) -> float:
        """The longest time in between without an answer."""
        times = sorted(time for time in self.answered.values() if since <= time <= until)
        return max((b - a for a, b in itertools.pairwise([since, *times, until])), default=0.0)

    async def next_answer(self, timeout: float = 60.0) -> float:
        """Waits until an echo that is still to be sent is answered; when it was."""
        first = len(self.sent)
        with trio.fail_after(timeout):
            async with self._changed:
                while max(self.answered, default=-1) < first:
                    await self._changed.wait()
        return trio.current_time()

    async def send(self, sock: trio.socket.SocketType, address: str) -> None:
        """Never two within INTERVAL: what is late on a busy machine is not made up for at the stop."""
        for number in itertools.count():
            self.sent.append(trio.current_time())
            # Until the neighbour is known, or while its host is away, the kernel may refuse.
            with contextlib.suppress(OSError):
                await sock.sendto(_echo(number), (address, 0))
            await trio.sleep(INTERVAL)

    async def receive(self, sock: trio.socket.SocketType) -> None:
        while True:
            kind, _, _, id, low = _HEADER.unpack_from(await sock.recv(2048), _IP_HEADER)
            if (kind, id) == (_REPLY, _ID):
                last = len(self.sent) - 1
                self.answered.setdefault(last - ((last - low) & 0xFFFF), trio.current_time())
                async with self._changed:
                    self._changed.notify_all()


def _echo(number: int) -> bytes:
    words = (_REQUEST << 8, 0, _ID, number & 0xFFFF)
    total = sum(words)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return _HEADER.pack(_REQUEST, 0, checksum, _ID, number & 0xFFFF)


@contextlib.asynccontextmanager
async def pinging(namespace: Namespace, address: str) -> AsyncIterator[Pinger]:
    """Inside the block, pings; begins with the first answer."""
    raw = namespace.open_socket(kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP)
    raw.setblocking(False)
    with trio.socket.from_stdlib_socket(raw) as sock:
        pinger = Pinger()
        async with background() as nursery:
            nursery.start_soon(pinger.send, sock, address)
            nursery.start_soon(pinger.receive, sock)
            await pinger.next_answer()
            yield pinger
