# SPDX-License-Identifier: BSD-3-Clause
"""Traffic between a guest and this side of its network, with every byte checked.

The guest has a file of random bytes, BLOB. What a transfer carries is that file again and again, each time
after its number, so that a piece lost, doubled or moved changes the sum.
"""

import hashlib
import os
import random
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import trio

from vfio_user.client.qemu.machine import Machine, MachineError
from vfio_user.client.qemu.namespace import Namespace

BLOB_PATH = "blob"
BLOB = random.Random(82540).randbytes(1_000_003)
GUEST_FILES: Mapping[str, bytes] = {BLOB_PATH: BLOB}
"""For MachineOptions.files."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much a test does: the full counts with VFIO_USER_SOAK, else fewer."""

    pings: int
    rounds: int
    """Of BLOB (a megabyte) in a transfer."""
    short_rounds: int
    """The same where a transfer is one of several variants."""
    pair_rounds: int
    """The same where two devices have traffic at once."""
    link_cycles: int
    module_cycles: int
    guests: int
    """That boot one after the other where each ends in the middle of traffic."""
    seconds: int
    """That one test may take."""


REDUCED = Counts(
    pings=20,
    rounds=4,
    short_rounds=2,
    pair_rounds=2,
    link_cycles=2,
    module_cycles=2,
    guests=2,
    seconds=1200,
)
FULL = Counts(
    pings=200,
    rounds=200,
    short_rounds=50,
    pair_rounds=200,
    link_cycles=10,
    module_cycles=10,
    guests=4,
    seconds=7200,
)


def counts() -> Counts:
    return FULL if os.environ.get("VFIO_USER_SOAK") else REDUCED


class TrafficError(Exception):
    """Something was lost or came out differently."""


def time_limit(rounds: int) -> float:
    """Seconds for a transfer: enough where four of them share two CPUs with the guest and two servers, and
    all DMA goes by message."""
    return 300.0 + 5.0 * rounds


def _stream(rounds: int) -> Iterator[bytes]:
    for number in range(rounds):
        yield b"%d\n" % number + BLOB


def digest(rounds: int) -> str:
    """SHA-256 of a transfer, in hexadecimal."""
    sha = hashlib.sha256()
    for piece in _stream(rounds):
        sha.update(piece)
    return sha.hexdigest()


async def bring_up(guest: Machine, *addresses: str, interface: str = "eth0", mtu: int = 0) -> None:
    """Gives a guest's interface its addresses, and waits until its driver sees the link."""
    size = f" mtu {mtu}" if mtu else ""
    lines = [f"ip link set {interface}{size} up"]
    lines += [f"ip address add {address} dev {interface}" for address in addresses]
    await guest.check(" && ".join(lines))
    await wait_carrier(guest, interface)


async def wait_carrier(
    guest: Machine, interface: str = "eth0", seconds: int = 60, *, up: bool = True
) -> None:
    """Waits until the link is there, or gone; without an interrupt the driver looks every two seconds."""
    look = f"[ $(cat /sys/class/net/{interface}/carrier) = {up:d} ]"
    loop = f"for i in $(seq {seconds * 10}); do {look} && exit 0; sleep 0.1; done; exit 1"
    await guest.check(loop, 10 * seconds)


async def ping(guest: Machine, address: str, count: int, *, size: int = 56, options: str = "") -> None:
    """`count` pings, a hundredth of a second apart. Raises TrafficError when one is lost.

    Large ones go one after the other: busybox's ping has a buffer for three of them, and loses answers that
    come while it is not running.
    """
    program, pace = "ping6" if ":" in address else "ping", "-A" if size > 1500 else "-i 0.01"
    status, text = await guest.run(f"{program} -q -c {count} {pace} -s {size} {options} {address}", 60)
    match = re.search(r"(\d+) packets transmitted, (\d+) packets received", text)
    if status or match is None or match.groups() != (str(count), str(count)):
        raise TrafficError(f"pings to {address} were lost: {text[-300:]}")


@dataclass(frozen=True, slots=True)
class Wire:
    """Guest and this side of its network: `address` is where the guest finds us, `bind` where we are."""

    guest: Machine
    namespace: Namespace
    address: str
    bind: str = ""
    options: str = ""
    """More of the guest's socat: `mss=1111`."""

    async def receive(self, rounds: int, timeout: float | None = None) -> None:
        """The guest sends, we receive, in `time_limit` if no other is given. Raises TrafficError when the sum
        is wrong.

        We say a byte first: passt of 2023 takes the handshake's last ACK for none, and 24 s later resets a
        connection on which the guest has had nothing else to acknowledge.
        """
        loop = f"i=0; while [ $i -lt {rounds} ]; do echo $i; cat /{BLOB_PATH}; i=$((i+1)); done"
        sha = hashlib.sha256()

        async def take(stream: trio.SocketStream) -> None:
            await stream.send_all(b"\n")
            async for data in stream:
                sha.update(data)

        socat = self._socat("- {}", "-t 600")
        command = f"set -o pipefail; ({loop}) | {socat} > /dev/null"
        await self._with_peer(take, command, timeout or time_limit(rounds))
        self._compare("guest to host", sha.hexdigest(), rounds)

    async def send(self, rounds: int, timeout: float | None = None) -> None:
        """We send, the guest receives, in `time_limit` if no other is given. Raises TrafficError when the sum
        is wrong.

        The guest speaks first: passt of 2023 forgets what a server says before the guest's first ACK.
        """

        async def give(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            for piece in _stream(rounds):
                await stream.send_all(piece)
            await stream.send_eof()

        await self._receive_in_guest(give, lambda: rounds, timeout or time_limit(rounds))

    async def both(self, rounds: int) -> None:
        """Both ways at once, each again until both are through: neither ever has the wire to itself."""
        done = [trio.Event(), trio.Event()]

        async def repeat(transfer: Callable[[int], Awaitable[None]], mine: int) -> None:
            while not all(event.is_set() for event in done):
                await transfer(rounds)
                done[mine].set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(repeat, self.receive, 0)
            nursery.start_soon(repeat, self.send, 1)

    async def receive_until(self, stop: str, least: int = 0, timeout: float = 600.0) -> int:
        """As `receive`, until the guest has a file `stop`, and `least` rounds came; how many did. Leaves time
        for others."""
        more = f"[ ! -e {stop} -o $i -lt {least} ]"
        loop = f"i=0; while {more}; do echo $i; cat /{BLOB_PATH}; usleep 20000; i=$((i+1)); done"
        sha, size = hashlib.sha256(), 0

        async def take(stream: trio.SocketStream) -> None:
            nonlocal size
            async for data in stream:
                sha.update(data)
                size += len(data)

        await self._with_peer(take, f"set -o pipefail; ({loop}) | {self._socat('- {}')}", timeout)
        rounds = size // len(BLOB)
        self._compare("guest to host", sha.hexdigest(), rounds)
        return rounds

    async def send_until(self, stop: trio.Event, least: int = 0, timeout: float = 600.0) -> int:
        """As `send`, until the event, and `least` rounds were sent; how many were. Leaves time for others."""
        rounds = 0

        async def give(stream: trio.SocketStream) -> None:
            nonlocal rounds
            await stream.receive_some()
            while not stop.is_set() or rounds < least:
                await stream.send_all(b"%d\n" % rounds + BLOB)
                rounds += 1
                await trio.sleep(0.02)
            await stream.send_eof()

        await self._receive_in_guest(give, lambda: rounds, timeout)
        return rounds

    def _socat(self, ends: str, words: str = "-u") -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        where = ",".join(word for word in (f"TCP:{address}:PORT", self.options) if word)
        return f"socat -b 65536 {words} {ends.format(where)}"

    async def _receive_in_guest(
        self,
        give: Callable[[trio.SocketStream], Awaitable[None]],
        rounds: Callable[[], int],
        timeout: float,
    ) -> None:
        command = f"set -o pipefail; echo | {self._socat('- {},shut-none', '-t 600')} | sha256sum"
        text = await self._with_peer(give, command, timeout)
        self._compare("host to guest", text.split()[0], rounds())

    async def _with_peer(
        self, serve: Callable[[trio.SocketStream], Awaitable[None]], command: str, timeout: float
    ) -> str:
        """Runs the guest's command, which connects to a PORT of ours that `serve` is given; its output."""
        with self._listen() as listener:
            listener.settimeout(0)
            text = command.replace("PORT", str(listener.getsockname()[1]))
            output: list[str] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_answer, listener, serve)
                output.append(await self.guest.check(text, timeout))
            return output[0]

    def _listen(self) -> socket.socket:
        bind = self.bind or self.address
        listener = self.namespace.open_socket(socket.AF_INET6 if ":" in bind else socket.AF_INET)
        try:
            listener.bind((bind, 0))
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        return listener

    def _compare(self, way: str, found: str, rounds: int) -> None:
        if found != digest(rounds):
            raise TrafficError(f"{way}: {rounds} rounds have SHA-256 {found} instead of {digest(rounds)}")


async def _answer(listener: socket.socket, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    with trio.socket.from_stdlib_socket(listener.dup()) as ours:
        connection, _ = await ours.accept()
    async with trio.SocketStream(connection) as stream:
        await serve(stream)


async def flood(wire: Wire) -> None:
    """Endless traffic both ways, until cancelled or until the guest is gone, which is no error here."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            for transfer in (wire.receive, wire.send):
                nursery.start_soon(_until_broken, transfer, scope)


async def _until_broken(transfer: Callable[[int, float], Awaitable[None]], scope: trio.CancelScope) -> None:
    try:
        await transfer(100_000, 3600.0)
    except* (MachineError, trio.BrokenResourceError):
        scope.cancel()


TRIES = 4


class SelfTest(NamedTuple):
    """The report of the driver's self-test, and how many tries it took."""

    report: str
    tries: int


async def self_test(guest: Machine) -> SelfTest:
    """Loopback 14 is no fault of a frame: the driver has found all of them right, but its CPU, which other
    programs here share, took more than two ticks to look at them."""
    tries = 0
    while True:
        tries += 1
        _, report = await guest.run("ethtool -t eth0 offline", timeout=90)
        late = re.search(r"^Loopback test .*\t\s*14$", report, re.MULTILINE)
        if late is None or tries == TRIES:
            return SelfTest(report, tries)
