# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log in a controller's hands, and the ways to let a VMM know of the device's writes that knows
nothing of such a log: hand it over at the end, or write through.

Handing over: for each dirty page one DMA_WRITE with what is there already. The VMM makes the write, and
marks the page as written. That is only right while the device and the guest's CPUs are stopped: what a CPU
wrote between our read and the VMM's write would be lost.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vfio_user.device_models.device import DmaError
from vfio_user.device_models.tasks import Completion
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.json_rpc import FAILED, REFUSED, RpcError
from vfio_user.server.control_jobs import Later, Steps
from vfio_user.server.dirty import Bits, DirtyLog
from vfio_user.server.dma_region import DmaRegion
from vfio_user.server.engines.engine import Engine
from vfio_user.server.engines.native import NativeServer
from vfio_user.server.session import Session

WINDOW = 256
"""Writes of a hand-over under way at once."""
BATCH = 64
"""Writes in one step."""
MOST_BYTES = 64 << 10
"""Of one write when whole pages are rewritten."""
MAX_RANGES = 4096
"""Ranges that a report lists."""
_DIRTY = re.compile(rb"[^\0]")


def dirty_runs(bits: bytes | Bits) -> Iterator[tuple[int, int]]:
    """First page and number of pages of each run."""
    first = count = 0
    for found in _DIRTY.finditer(bits):
        value, base = bits[found.start()], 8 * found.start()
        for page in (base + bit for bit in range(8) if value >> bit & 1):
            if page != first + count:
                if count:
                    yield first, count
                first, count = page, 0
            count += 1
    if count:
        yield first, count


def count_pages(log: DirtyLog) -> int:
    return int.from_bytes(log.bits, "little").bit_count()


_Log = tuple[int, DirtyLog]
"""The address where a log begins, and the log."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One write of a hand-over: `covered` bytes of a log from `offset` on, of which `length` are written."""

    start: int
    log: DirtyLog
    offset: int
    covered: int
    length: int


@dataclass(slots=True)
class _HandOver:
    """What has become of the pages so far."""

    pages: int = 0
    bytes: int = 0
    under_way: int = 0
    refused: int = 0
    reason: str = ""

    def note(self, error: Exception) -> None:
        self.refused += 1
        self.reason = self.reason or str(error)


class DirtyControl:
    """One for the server. The native engine only: libvfio-user keeps the log inside the library."""

    def __init__(self, engine: Engine[Any]) -> None:
        self._engine = engine

    def _native(self) -> NativeServer:
        if not isinstance(self._engine, NativeServer):
            raise RpcError(
                REFUSED, "the libvfio-user engine has its dirty log inside the library: serve with native"
            )
        return self._engine

    def figures(self) -> Any:
        """For `state`: None where there is no log to look at."""
        if not isinstance(self._engine, NativeServer):
            return None
        tracking = self._engine.host.dirty
        logs = tracking.logs() if tracking.active else []
        counts = [(count_pages(log), log.page_size) for _, log in logs]
        pages, size = sum(count for count, _ in counts), sum(count * page for count, page in counts)
        owner = "controller" if tracking.claim is self else "client" if tracking.active else None
        return {
            "owner": owner,
            "page_size": tracking.page_size,
            "pages": pages,
            "bytes": size,
            "lost": tracking.lost,
        }

    # Start, stop, report

    def start(self, page_size: int) -> Any:
        """Log from now on; with a log that a controller has started already, nothing is forgotten."""
        tracking = self._native().host.dirty
        if tracking.active and tracking.claim is not self:
            raise RpcError(REFUSED, "the client has the dirty log: it migrates the guest itself")
        if tracking.active and tracking.page_size != page_size:
            size = tracking.page_size
            raise RpcError(REFUSED, f"a log with pages of {size} bytes runs: take these, or stop it first")
        if not tracking.active:
            try:
                tracking.start(page_size, keep_unmapped=True)
            except VfioUserError as error:
                raise RpcError(FAILED, error.reason) from error
            tracking.claim = self
        return {"page_size": tracking.page_size}

    def stop(self) -> Any:
        """Forget the log; harmless when there is none."""
        self.end()
        if self._native().host.dirty.active:
            raise RpcError(REFUSED, "the dirty log is the client's")
        return {}

    def end(self) -> None:
        """Forget a log that a controller has started; one of the client's stays."""
        tracking = self._native().host.dirty
        if tracking.claim is self:
            tracking.stop()

    def _logs(self) -> list[_Log]:
        tracking = self._native().host.dirty
        if tracking.claim is not self:
            raise RpcError(REFUSED, "no controller has started the dirty log, or its client has left")
        if tracking.lost:
            raise RpcError(FAILED, "pages of regions that went were lost: the log must be started again")
        return tracking.logs()

    def report(self, clear: bool) -> Any:
        """How much is dirty, and where; `clear`: forget it, so that the next report has what comes after."""
        ranges: list[list[int]] = []
        pages = size = 0
        for address, log in self._logs():
            bits = log.take() if clear else log.bits
            for first, count in dirty_runs(bits):
                pages, size = pages + count, size + count * log.page_size
                if len(ranges) < MAX_RANGES:
                    ranges.append([address + first * log.page_size, count * log.page_size])
        return {"pages": pages, "bytes": size, "ranges": ranges, "complete": len(ranges) < MAX_RANGES}

    # Write-through

    def write_through(self, on: bool) -> Any:
        """Whether the device writes by message although guest memory is mapped."""
        server = self._native()
        if on and not server.attached:
            raise RpcError(REFUSED, "no client is there to write")
        server.host.dma.set_write_through(on)
        return {"on": on}

    # Hand-over

    def hand_over(self, whole: bool) -> Steps:
        """Let the client write what is in the dirty pages already; what it has written leaves the log.

        One byte of each page, or with `whole` all of it in writes of at most 64 KiB. What the client refused
        is an error, and stays in the log, as does what it had not answered when the request was cut.
        """
        server, logs = self._native(), self._logs()
        if server.host.running:
            raise RpcError(REFUSED, "the device runs, and could write meanwhile: stop it first")
        if server.session is None or not server.attached:
            raise RpcError(REFUSED, "no client is there to hand the log to")
        if not server.host.dma.enabled and any(not log.clean for _, log in logs):
            raise RpcError(REFUSED, "pages are dirty, but the bus master is off: no DMA goes")
        began, state = time.monotonic_ns(), _HandOver()
        yield from self._send_all(server, server.session, logs, whole, state)
        if state.refused:
            raise RpcError(FAILED, f"{state.refused} writes failed, and stay in the log: {state.reason}")
        return {"pages": state.pages, "bytes": state.bytes, "ns": time.monotonic_ns() - began}

    def _send_all(
        self, server: NativeServer, session: Session, logs: list[_Log], whole: bool, state: _HandOver
    ) -> Steps:
        assert server.host.dma.messages is not None
        most = min(MOST_BYTES, server.host.dma.messages.max_transfer) if whole else 1
        for number, piece in enumerate(_pieces(logs, most), 1):
            _write(server, session, piece, state)
            if number % BATCH == 0:
                yield from self._wait(server, session, state, WINDOW - BATCH)
        yield from self._wait(server, session, state, 0)

    def _wait(self, server: NativeServer, session: Session, state: _HandOver, most: int) -> Steps:
        """Send, and let the client answer until at most so many writes are under way."""
        while True:
            server.send_owed()
            if server.session is not session or not server.attached:
                raise RpcError(FAILED, "the client has left")
            if server.host.running:
                raise RpcError(FAILED, "the device was started meanwhile: the log is not handed over")
            if state.under_way <= most:
                yield Later()
                return
            yield Later(50_000)


class _Written(Completion[int]):
    """Notes what the client answered to one write."""

    __slots__ = ("_piece", "_state")

    def __init__(self, piece: _Piece, state: _HandOver) -> None:
        super().__init__()
        self._piece, self._state = piece, state

    def finish(self, result: int) -> None:
        piece, state = self._piece, self._state
        if result != piece.length:
            self.fail(ValueError(f"the client wrote {result} of {piece.length} bytes"))
            return
        super().finish(result)
        piece.log.clear(piece.offset, piece.covered)
        state.under_way -= 1
        state.pages += -(-piece.covered // piece.log.page_size)
        state.bytes += piece.length

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self._state.under_way -= 1
        self._state.note(error)


def _pieces(logs: list[_Log], most: int) -> Iterator[_Piece]:
    """The writes of a hand-over: of `most` bytes, or one byte of each page where that is less."""
    for start, log in logs:
        step = max(most >> log.shift, 1)
        for first, count in dirty_runs(bytes(log.bits)):
            for page in range(first, first + count, step):
                offset = page << log.shift
                covered = min(min(step, first + count - page) << log.shift, log.size - offset)
                yield _Piece(start, log, offset, covered, covered if covered <= most else 1)


def _write(server: NativeServer, session: Session, piece: _Piece, state: _HandOver) -> None:
    address = piece.start + piece.offset
    region = server.host.table.find(address)
    completion = _Written(piece, state)
    state.under_way += 1
    if region is None or not region.writable:
        completion.fail(ValueError(f"nothing is mapped at {address:#x} any more"))
        return
    try:
        session.send_dma_write(address, _bytes_of(region, address - region.address, piece.length), completion)
    except (DmaError, VfioUserError) as error:
        completion.fail(error)


def _bytes_of(region: DmaRegion, offset: int, length: int) -> bytes:
    """What is in the region, also where the device may only write."""
    view = region.write_view
    return bytes(region.load(offset, length) if view is None else view[offset : offset + length])
