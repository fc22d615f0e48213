# SPDX-License-Identifier: BSD-3-Clause
"""Dirty reports for 16 GiB and for 1 TiB, of v1 (DIRTY_PAGES) and of v2 (DMA_LOGGING_REPORT), with no page
dirty and with some all over: against libvfio-user's C sample.

The memory is a sparse file. What a report costs follows from its length; what is dirty costs us page faults
in the bitmap. The sample knows v1 only, and its device writes nothing to speak of: all of ours are compared
with its v1 report of clean memory, which is its best case (it skips bytes that are 0). It takes 16 regions,
and gives bitmaps of just under 1 MiB, for one region each: there 1 TiB is 33 calls, for which the 15 regions
besides that of 16 GiB are taken in turn. We give the bitmap of 1 TiB, 32 MiB, in one.
"""

import contextlib
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfio_user.benchmarks import scatter_device
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
from vfio_user.protocol.codec import pack_header, pack_region_read, pack_region_write
from vfio_user.protocol.constants import (
    BITMAP_RANGE_SIZE,
    DEVICE_FEATURE_SIZE,
    DIRTY_PAGES_SIZE,
    HEADER_SIZE,
    TYPE_REPLY,
    Command,
    DeviceFeature,
    DeviceFeatureFlags,
    DirtyPagesFlags,
    DmaMapFlags,
    PciRegion,
)

PAGE = 4096
SMALL = 16 << 30
TIB = 1 << 40
C_CALLS = 33
C_REGION = -(-TIB // C_CALLS // (64 * PAGE)) * 64 * PAGE
"""Bytes; 33 of these are 1 TiB, and their bitmaps are as long as libvfio-user gives them."""
_HEAD = HEADER_SIZE + DIRTY_PAGES_SIZE + BITMAP_RANGE_SIZE
_V2_HEAD = struct.Struct("=QQQ")
WRITTEN = {SMALL: 1024, TIB: 4096}
"""Pages of a range that our device writes before each report of a log with something in it: at the same
distance, so that hardly a part of the bitmap stays clean."""


@dataclass(frozen=True, slots=True)
class Report:
    """One request, and the length of its reply's head and of all of the reply, in bytes."""

    command: Command
    request: bytes
    head: int
    reply_size: int


def report_of(address: int, size: int) -> Report:
    """v1's GET_BITMAP of a range in pages of 4 KiB."""
    length = bitmap_size(size, PAGE)
    wanted = m.BitmapRange(address, size, m.Bitmap(PAGE, length))
    body = m.DirtyPagesRequest(int(DirtyPagesFlags.GET_BITMAP), wanted)
    return _report(Command.DIRTY_PAGES, body, _HEAD, length)


def logging_report_of(address: int, size: int) -> Report:
    """v2's DMA_LOGGING_REPORT of a range in pages of 4 KiB."""
    length, data = bitmap_size(size, PAGE), _V2_HEAD.pack(address, size, PAGE)
    flags = DeviceFeature.DMA_LOGGING_REPORT | DeviceFeatureFlags.GET
    body = m.DeviceFeatureRequest(flags, data, DEVICE_FEATURE_SIZE + len(data) + length)
    return _report(Command.DEVICE_FEATURE, body, HEADER_SIZE + DEVICE_FEATURE_SIZE + _V2_HEAD.size, length)


def _report(command: Command, request: m.Message, head: int, length: int) -> Report:
    body = layouts.build(request)
    return Report(command, pack_header(1, command, HEADER_SIZE + len(body)) + body, head, head + length)


def write_all_over(wire: Wire, address: int, size: int) -> None:
    """Our device writes into WRITTEN pages of a range. BenchmarkError when it does not."""
    count = WRITTEN[size]
    for place, value in (
        (scatter_device.ADDRESS, address),
        (scatter_device.STRIDE, size // count),
        (scatter_device.COUNT, count),
    ):
        body = pack_region_write(1, place, 0, value.to_bytes(8, "little"))[HEADER_SIZE:]
        wire.request(Command.REGION_WRITE, body)
    look = pack_region_read(1, scatter_device.LEFT, 0, 8)[HEADER_SIZE:]
    deadline = time.monotonic() + 5
    while any(wire.request(Command.REGION_READ, look)[-8:]):
        if time.monotonic() > deadline:
            raise BenchmarkError("the device does not write")


def report_latency(
    wire: Wire, reports: Sequence[Report], buffer: bytearray, calls: int, dirty: int = 0
) -> float:
    """Seconds for `calls` reports, one after the other, the given ones in turn; the last one has `dirty`
    pages."""
    send, receive = wire.socket.send, wire.receive_into
    turns = [reports[number % len(reports)] for number in range(calls)]
    views = {report.reply_size: memoryview(buffer)[: report.reply_size] for report in reports}
    begun = time.perf_counter()
    for report in turns:
        send(report.request)
        receive(views[report.reply_size])
    elapsed = time.perf_counter() - begun
    last = turns[-1]
    expected = pack_header(1, last.command, last.reply_size, TYPE_REPLY)
    bitmap = bytes(views[last.reply_size][last.head :])
    if buffer[:HEADER_SIZE] != expected or int.from_bytes(bitmap, "little").bit_count() != dirty:
        raise BenchmarkError(f"wrong report: {bytes(buffer[:64]).hex()}")
    return elapsed


def map_and_log(wire: Wire, places: Sequence[tuple[int, int]], fd: int) -> list[Report]:
    """Map the start of the file at each (address, size), log dirty pages, and give their reports."""
    flags = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
    for address, size in places:
        wire.request(Command.DMA_MAP, layouts.build(m.DmaMapRequest(flags, 0, address, size)), (fd,))
    wire.request(Command.DIRTY_PAGES, layouts.build(m.DirtyPagesRequest(int(DirtyPagesFlags.START))))
    return [report_of(address, size) for address, size in places]


def enable_bus_master(wire: Wire) -> None:
    """The command register of the configuration space."""
    body = pack_region_write(1, 4, PciRegion.CONFIG, b"\x06\0")[HEADER_SIZE:]
    wire.request(Command.REGION_WRITE, body)


@dataclass(frozen=True, slots=True)
class Asked:
    """The reports of one server; `calls` of `large`, in turn, make 1 TiB. `v2`: it knows that, and writes."""

    small: Report
    large: Sequence[Report]
    calls: int
    v2: bool


@dataclass(frozen=True, slots=True)
class DirtyContest:
    """Two servers that log, what to ask of each (by the identity of its wire), and room for the replies."""

    pair: Pair
    asked: Mapping[int, Asked]
    buffer: bytearray

    def round(self, number: int, results: Results) -> None:
        in_both_modes(self.pair, number, results, self._measure)

    def _measure(self, wire: Wire) -> Measured:
        asked = self.asked[id(wire)]
        small = self._median(wire, [asked.small], 1, 100)
        large = self._median(wire, asked.large, asked.calls, 5)
        if not asked.v2:  # what it can is what all of ours are compared with
            return {
                f"{key}{kind}.{{}}": value
                for key, value in (("dirty16g", small), ("dirty1t", large))
                for kind in ("", *KINDS)
            }
        return {
            "dirty16g.{}": small,
            "dirty1t.{}": large,
            **self._others(wire, "dirty16g", 0, SMALL, 30),
            **self._others(wire, "dirty1t", TIB, TIB, 5),
        }

    def _others(self, wire: Wire, key: str, address: int, size: int, times: int) -> Measured:
        """With pages that were written, and over v2."""
        v1, v2 = report_of(address, size), logging_report_of(address, size)
        kinds = ((v2, False), (v1, True), (v2, True))
        return {
            f"{key}{kind}.{{}}": self._median(wire, [report], 1, times, (address, size) if written else None)
            for kind, (report, written) in zip(KINDS, kinds, strict=True)
        }

    def _median(
        self,
        wire: Wire,
        reports: Sequence[Report],
        calls: int,
        times: int,
        written: tuple[int, int] | None = None,
    ) -> float:
        """Milliseconds. `written`: address and size of what the device writes into before each."""
        taken = []
        for _ in range(times):
            if written:
                write_all_over(wire, *written)
            dirty = WRITTEN[written[1]] if written else 0
            taken.append(report_latency(wire, reports, self.buffer, calls, dirty))
        return percentile(taken, 50) * 1000


KINDS = (".v2", ".written", ".v2.written")
"""What is measured besides v1's report of clean memory."""


def _asked(wire: Wire, fd: int, regions: int, size: int, calls: int, *, v2: bool = False) -> Asked:
    small, *large = map_and_log(wire, [(0, SMALL), *((TIB + n * size, size) for n in range(regions))], fd)
    return Asked(small, large, calls, v2)


@contextlib.contextmanager
def against_sample(lab: Lab, folder: Path) -> Iterator[DirtyContest]:
    """A device of ours and libvfio-user's sample: a region of 16 GiB, and others that make 1 TiB."""
    sample = [str(lab.sample("server")), "{socket}"]
    ours_words = our_server("vfio_user.benchmarks.scatter_device:Scatterer")
    servers = open_pair(("scatterer", ours_words), ("c-sample", sample), folder)
    with guest_memory(TIB) as fd, servers as pair:
        ours, theirs = pair.ours.wire, pair.theirs.wire
        asked = {
            id(ours): _asked(ours, fd, 1, TIB, 1, v2=True),
            id(theirs): _asked(theirs, fd, C_LIMIT - 1, C_REGION, C_CALLS),
        }
        enable_bus_master(ours)
        yield DirtyContest(pair, asked, bytearray(_HEAD + bitmap_size(TIB, PAGE)))
