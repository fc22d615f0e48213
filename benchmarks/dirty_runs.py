# SPDX-License-Identifier: BSD-3-Clause
"""Dirty reports of v1 (DIRTY_PAGES) for 16 GiB and for 1 TiB: against libvfio-user's C sample.

The memory is a sparse file, and no page is dirty: what a report costs follows from its length, and for
libvfio-user this is the best case (it skips bytes that are 0). It takes 16 regions, and gives bitmaps of
just under 1 MiB, for one region each: there 1 TiB is 33 calls, for which the 15 regions besides that of
16 GiB are taken in turn. We give the bitmap of 1 TiB, 32 MiB, in one.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks.dma_runs import C_LIMIT, guest_memory
from vfio_user.benchmarks.processes import BenchmarkError, our_server
from vfio_user.benchmarks.protocol_runs import Measured, Pair, in_both_modes, open_pair
from vfio_user.benchmarks.results import Results
from vfio_user.benchmarks.statistics import percentile
from vfio_user.benchmarks.wire import Wire
from vfio_user.client.qemu.lab import Lab
from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.bitmaps import bitmap_size
from vfio_user.protocol.codec import pack_header
from vfio_user.protocol.constants import (
    BITMAP_RANGE_SIZE,
    DIRTY_PAGES_SIZE,
    HEADER_SIZE,
    TYPE_REPLY,
    Command,
    DirtyPagesFlags,
    DmaMapFlags,
)

PAGE = 4096
SMALL = 16 << 30
TIB = 1 << 40
C_CALLS = 33
C_REGION = -(-TIB // C_CALLS // (64 * PAGE)) * 64 * PAGE
"""Bytes; 33 of these are 1 TiB, and their bitmaps are as long as libvfio-user gives them."""
_HEAD = HEADER_SIZE + DIRTY_PAGES_SIZE + BITMAP_RANGE_SIZE


@dataclass(frozen=True, slots=True)
class Report:
    """One request and the length of its reply, in bytes."""

    request: bytes
    reply_size: int


def report_of(address: int, size: int) -> Report:
    """GET_BITMAP of a range in pages of 4 KiB."""
    length = bitmap_size(size, PAGE)
    wanted = m.BitmapRange(address, size, m.Bitmap(PAGE, length))
    body = layouts.build(m.DirtyPagesRequest(int(DirtyPagesFlags.GET_BITMAP), wanted))
    return Report(pack_header(1, Command.DIRTY_PAGES, HEADER_SIZE + len(body)) + body, _HEAD + length)


def report_latency(wire: Wire, reports: Sequence[Report], buffer: bytearray, calls: int) -> float:
    """Seconds for `calls` reports, one after the other, the given ones in turn."""
    send, receive = wire.socket.send, wire.receive_into
    turns = [reports[number % len(reports)] for number in range(calls)]
    views = {report.reply_size: memoryview(buffer)[: report.reply_size] for report in reports}
    begun = time.perf_counter()
    for report in turns:
        send(report.request)
        receive(views[report.reply_size])
    elapsed = time.perf_counter() - begun
    expected = pack_header(1, Command.DIRTY_PAGES, turns[-1].reply_size, TYPE_REPLY)
    if buffer[:HEADER_SIZE] != expected or any(buffer[_HEAD : _HEAD + 64]):
        raise BenchmarkError(f"wrong report: {bytes(buffer[:64]).hex()}")
    return elapsed


def map_and_log(wire: Wire, places: Sequence[tuple[int, int]], fd: int) -> list[Report]:
    """Map the start of the file at each (address, size), log dirty pages, and give their reports."""
    flags = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
    for address, size in places:
        wire.request(Command.DMA_MAP, layouts.build(m.DmaMapRequest(flags, 0, address, size)), (fd,))
    wire.request(Command.DIRTY_PAGES, layouts.build(m.DirtyPagesRequest(int(DirtyPagesFlags.START))))
    return [report_of(address, size) for address, size in places]


@dataclass(frozen=True, slots=True)
class Asked:
    """The reports of one server, by wire; `calls` of `large`, in turn, make 1 TiB."""

    small: Report
    large: Sequence[Report]
    calls: int


@dataclass(frozen=True, slots=True)
class DirtyContest:
    """Two servers that log, what to ask of each (by the identity of its wire), and room for the replies."""

    pair: Pair
    asked: Mapping[int, Asked]
    buffer: bytearray

    def round(self, number: int, results: Results) -> None:
        in_both_modes(self.pair, number, results, self._measure)

    def _measure(self, wire: Wire) -> Measured:
        asked, buffer = self.asked[id(wire)], self.buffer
        small = [report_latency(wire, [asked.small], buffer, 1) for _ in range(100)]
        large = [report_latency(wire, asked.large, buffer, asked.calls) for _ in range(5)]
        return {
            "dirty16g.{}": percentile(small, 50) * 1000,
            "dirty1t.{}": percentile(large, 50) * 1000,
        }


def _asked(wire: Wire, fd: int, regions: int, size: int, calls: int) -> Asked:
    small, *large = map_and_log(wire, [(0, SMALL), *((TIB + n * size, size) for n in range(regions))], fd)
    return Asked(small, large, calls)


@contextlib.contextmanager
def against_sample(lab: Lab, folder: Path) -> Iterator[DirtyContest]:
    """Our `scratch` and libvfio-user's sample: a region of 16 GiB, and others that make 1 TiB."""
    sample = [str(lab.sample("server")), "{socket}"]
    servers = open_pair(("scratch", our_server("scratch")), ("c-sample", sample), folder)
    with guest_memory(TIB) as fd, servers as pair:
        ours, theirs = pair.ours.wire, pair.theirs.wire
        asked = {
            id(ours): _asked(ours, fd, 1, TIB, 1),
            id(theirs): _asked(theirs, fd, C_LIMIT - 1, C_REGION, C_CALLS),
        }
        yield DirtyContest(pair, asked, bytearray(_HEAD + bitmap_size(TIB, PAGE)))
