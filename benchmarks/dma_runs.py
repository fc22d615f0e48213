# SPDX-License-Identifier: BSD-3-Clause
"""DMA_MAP and DMA_UNMAP: against libvfio-user's C sample, and at 10,000 live regions against none."""

import contextlib
import fcntl
import os
import resource
import socket
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.processes import BenchmarkError, our_server
from vfio_user.benchmarks.protocol_runs import Measured, Pair, in_both_modes, open_pair
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import percentile
from vfio_user.benchmarks.wire import Nanoseconds, Wire
from vfio_user.client.qemu.lab import Lab
from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.codec import HEADER, pack_header
from vfio_user.protocol.constants import FLAG_ERROR, HEADER_SIZE, Command, DmaMapFlags

PAGE = 4096
SPARE = 1 << 20
"""Bytes of the region that comes and goes; it lies in the middle of the others."""
MANY = 10_000
C_LIMIT = 16
"""libvfio-user's sample takes no more regions than that."""
_FDS_BESIDE = 200
_READ_WRITE = DmaMapFlags.READ | DmaMapFlags.WRITE


@dataclass(frozen=True, slots=True)
class MapPair:
    """The two messages of a region of guest memory."""

    map_message: bytes
    unmap_message: bytes


def map_pair(address: int, size: int) -> MapPair:
    """The region at `address` is the start of the file that travels with the message."""
    mapped = layouts.build(m.DmaMapRequest(int(_READ_WRITE), 0, address, size))
    unmapped = layouts.build(m.DmaUnmapRequest(0, address, size))
    return MapPair(
        pack_header(1, Command.DMA_MAP, HEADER_SIZE + len(mapped)) + mapped,
        pack_header(2, Command.DMA_UNMAP, HEADER_SIZE + len(unmapped)) + unmapped,
    )


@contextlib.contextmanager
def guest_memory(size: int) -> Iterator[int]:
    """The descriptor of a memfd that cannot shrink, as QEMU's memory backend makes it."""
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        yield fd
    finally:
        os.close(fd)


def map_latencies(wire: Wire, pair: MapPair, fd: int, rounds: int) -> list[Nanoseconds]:
    """Time of each of `rounds` pairs: map, wait for the reply, unmap, wait for the reply."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
    parts, unmap_message = [pair.map_message], pair.unmap_message
    send_with_fd, send, receive = wire.socket.sendmsg, wire.socket.send, wire.socket.recv
    times, clock = [], time.perf_counter_ns
    for _ in range(rounds):
        begun = clock()
        send_with_fd(parts, ancillary)
        mapped = receive(PAGE)
        send(unmap_message)
        unmapped = receive(PAGE)
        times.append(clock() - begun)
        _check(mapped, Command.DMA_MAP)
        _check(unmapped, Command.DMA_UNMAP)
    return times


def _check(reply: bytes, command: Command) -> None:
    _, replied, size, flags, error = HEADER.unpack_from(reply.ljust(HEADER_SIZE, b"\0"))
    if replied != command or size != len(reply) or flags & FLAG_ERROR:
        raise BenchmarkError(f"{command.name}: {len(reply)} bytes, error {error}: {reply[:40].hex()}")


def fill(wire: Wire, count: int, fd: int | None) -> None:
    """Map `count` regions of one page, half of them below the spare one's place and half above."""
    fds = () if fd is None else (fd,)
    for number in range(count):
        address = _SPARE_AT + (number - count // 2) * 2 * PAGE - PAGE
        if number >= count // 2:
            address += 2 * SPARE
        body = layouts.build(m.DmaMapRequest(int(_READ_WRITE), 0, address, PAGE))
        wire.request(Command.DMA_MAP, body, fds)


_SPARE_AT = 1 << 32


def time_of_a_pair(wire: Wire, fd: int, rounds: int) -> float:
    """Median of mapping and unmapping the spare region, in microseconds."""
    times = map_latencies(wire, map_pair(_SPARE_AT, SPARE), fd, rounds + rounds // 10)
    return percentile(times[rounds // 10 :], 50) / 1000


@dataclass(frozen=True, slots=True)
class DmaContest:
    """Two servers, the memory to map, and the text before the mode in the keys of the results."""

    pair: Pair
    fd: int
    key: str

    def round(self, number: int, results: Results) -> None:
        def measure(wire: Wire) -> Measured:
            return {f"{self.key}.{{}}": time_of_a_pair(wire, self.fd, 300)}

        in_both_modes(self.pair, number, results, measure)


@contextlib.contextmanager
def against_sample(lab: Lab, folder: Path, live: int = 0) -> Iterator[DmaContest]:
    """Our `scratch` and libvfio-user's sample, both with `live` regions mapped beforehand."""
    sample = [str(lab.sample("server")), "{socket}"]
    servers = open_pair(("scratch", our_server("scratch")), ("c-sample", sample), folder)
    with guest_memory(SPARE) as fd, servers as pair:
        for peer in (pair.ours, pair.theirs):
            fill(peer.wire, live, fd)
        yield DmaContest(pair, fd, f"dma{live or ''}")


@contextlib.contextmanager
def against_empty(_lab: Lab, folder: Path) -> Iterator[DmaContest]:
    """Two servers of ours, one with 10,000 regions. They are mapped where there are descriptors enough."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = limit == resource.RLIM_INFINITY or limit > MANY + _FDS_BESIDE
    full, empty = ((name, our_server("scratch")) for name in ("full", "empty"))
    with raised_limit(), open_pair(full, empty, folder) as pair, guest_memory(SPARE) as fd:
        fill(pair.ours.wire, MANY, fd if enough else None)
        yield DmaContest(pair, fd, "dma10k")


@contextlib.contextmanager
def raised_limit() -> Iterator[None]:
    """As many descriptors as the administrator allows, for us and the processes that we start."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
