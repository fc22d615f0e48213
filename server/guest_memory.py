# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory as a device model sees it: the contract's `Dma` over the table of DMA regions.

Mapped and file memory is accessed at once: the coroutines never suspend. Memory without a descriptor is
accessed by message, and a task really waits. `counters` tell which way the bytes went.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from vfio_user.device_models.device import DmaError
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Gate
from vfio_user.server.dma_region import Access, DmaRegion, RegionSpec
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.message_dma import MessageDma, MessageWriter

_Part = tuple[DmaRegion, int, int]
"""Region, offset in the region, length."""


@dataclass(slots=True)
class DmaCounters:
    """Accesses and bytes by way. A range that crosses regions counts once for each of them."""

    mapped_reads: int = 0
    mapped_read_bytes: int = 0
    mapped_writes: int = 0
    mapped_write_bytes: int = 0
    file_reads: int = 0
    file_read_bytes: int = 0
    file_writes: int = 0
    file_write_bytes: int = 0
    message_reads: int = 0
    message_read_bytes: int = 0
    message_writes: int = 0
    message_write_bytes: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name, for people."""
        return asdict(self)

    def count_read(self, access: Access, length: int) -> None:
        if access is Access.MAPPED:
            self.mapped_reads += 1
            self.mapped_read_bytes += length
        elif access is Access.FILE:
            self.file_reads += 1
            self.file_read_bytes += length
        else:
            self.message_reads += 1
            self.message_read_bytes += length

    def count_write(self, access: Access, length: int) -> None:
        if access is Access.MAPPED:
            self.mapped_writes += 1
            self.mapped_write_bytes += length
        elif access is Access.FILE:
            self.file_writes += 1
            self.file_write_bytes += length
        else:
            self.message_writes += 1
            self.message_write_bytes += length


class GuestMemory:
    """The contract's `Dma`. Without `messages` (no client yet), regions by message give DmaError.

    A read of mapped memory is a read-only view. One that crosses regions, or comes by file or message, is
    a copy.
    """

    def __init__(self, table: DmaTable, messages: MessageDma | None = None, gate: Gate | None = None) -> None:
        """`gate` is passed before each access; when it closes, `take_no_short_way` is to be called."""
        self.enabled = False
        self.gate = gate or Gate()
        self.table = table
        self.messages = messages
        self.write_through = False
        """Write by message although the memory is mapped, so that the client knows of each write; to be set
        with `set_write_through`."""
        self.counters = DmaCounters()
        # The region of the last access; one that has been unmapped covers nothing and never hits.
        self.take_no_short_way()

    def take_no_short_way(self) -> None:
        """Let the next access look for its region, and pass the gate."""
        self._last = DmaRegion(RegionSpec(0, 0))

    def set_write_through(self, on: bool) -> None:
        """From the next access on; reads come from the mapping all the same."""
        self.write_through = on
        self.take_no_short_way()

    # The test for the fast path is written out in each method: a call would cost as much as all of it.
    # No local variable holds a view where DmaError may pass: its traceback would keep the view alive.

    async def read(self, address: int, length: int) -> Buffer:
        region = self._last
        offset = address - region.address
        able = region.read_view is not None and self.enabled
        if able and offset >= 0 and 0 < length <= region.end - address:
            counters = self.counters
            counters.mapped_reads += 1
            counters.mapped_read_bytes += length
            return region.read_view[offset : offset + length]  # type: ignore[index]  # able
        return (await self._read_slowly([(address, length)]))[0]

    async def write(self, address: int, data: Buffer) -> None:
        region = self._last
        offset = address - region.address
        length = len(data)
        able = region.write_view is not None and self.enabled
        if able and offset >= 0 and 0 < length <= region.end - address:
            region.store(offset, data)
            counters = self.counters
            counters.mapped_writes += 1
            counters.mapped_write_bytes += length
        else:
            await self._write_slowly([(address, data)])

    async def read_many(self, segments: Sequence[tuple[int, int]]) -> list[Buffer]:
        views = self._views(segments) if self.enabled else None
        return await self._read_slowly(segments) if views is None else views

    def _views(self, segments: Sequence[tuple[int, int]]) -> list[Buffer] | None:
        """The segments, if all of them lie in the mapped region of the last access."""
        region = self._last
        view, start, end = region.read_view, region.address, region.end
        if view is None:
            return None
        views: list[Buffer] = []
        total = 0
        for address, length in segments:
            offset = address - start
            if offset < 0 or length <= 0 or address + length > end:
                return None
            views.append(view[offset : offset + length])
            total += length
        self.counters.mapped_reads += len(views)
        self.counters.mapped_read_bytes += total
        return views

    async def write_many(self, segments: Sequence[tuple[int, Buffer]]) -> None:
        region = self._last
        start, end = region.address, region.end
        if region.write_view is not None and self.enabled:
            total = 0
            for address, data in segments:
                length = len(data)
                if address < start or address + length > end or not length:
                    break
                total += length
            else:
                region.store_many(segments)
                self.counters.mapped_writes += len(segments)
                self.counters.mapped_write_bytes += total
                return
        await self._write_slowly(segments)

    async def write_each(self, segments: deque[tuple[int, Buffer]]) -> None:
        region = self._last
        if region.write_view is not None and self.enabled:
            start, end = region.address, region.end
            while segments and start <= segments[0][0] and segments[0][0] + len(segments[0][1]) <= end:
                address, data = segments.popleft()
                region.store(address - start, data)
                self.counters.count_write(region.access, len(data))
        if segments:
            await self._write_slowly(tuple(segments), segments.popleft)

    def _part(self, address: int, length: int) -> _Part:
        """The part of a range that lies in one region, from the start of the range.

        DmaError when the bus master is off or nothing is mapped there.
        """
        if not self.enabled:
            raise DmaError(address, length, "the bus master is off")
        region = self.table.find(address)
        if region is None:
            raise DmaError(address, length, "nothing is mapped there")
        if not (self.gate.closed or self.write_through):  # nobody may take the short way past them
            self._last = region
        return region, address - region.address, min(length, region.end - address)

    def _readable_parts(self, address: int, length: int) -> list[_Part]:
        if length < 0 or not self.enabled:
            raise DmaError(address, length, "negative length" if length < 0 else "the bus master is off")
        parts: list[_Part] = []
        place, end = address, address + length
        while place < end:
            part = self._part(place, end - place)
            if not part[0].readable:
                raise DmaError(place, part[2], "the region is not readable")
            parts.append(part)
            place += part[2]
        return parts

    async def _read_slowly(self, segments: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Every way and every error; suspends only when a part goes by message, or at the gate."""
        await self.gate.passed()
        located = [self._readable_parts(address, length) for address, length in segments]
        by_message = [part for parts in located for part in parts if part[0].access is Access.MESSAGE]
        if not by_message:
            return [self._load(parts) for parts in located]
        # What can be had at once is copied before the first wait, after which it may be unmapped.
        results = [[self._copy_now(part) for part in parts] for parts in located]
        reader = self._require_messages(*by_message[0]).reader()
        for region, offset, length in by_message:
            await reader.add(region.address + offset, length)
            self.counters.count_read(Access.MESSAGE, length)
        for parts, pieces in zip(located, results, strict=True):
            for i, piece in enumerate(pieces):
                pieces[i] = await reader.result(parts[i][2]) if piece is None else piece
        return [_joined(pieces) for pieces in results]

    def _load(self, parts: list[_Part]) -> Buffer:
        for region, _, length in parts:
            self.counters.count_read(region.access, length)
        if len(parts) == 1:
            region, offset, length = parts[0]
            return region.load(offset, length)
        return b"".join([region.load(offset, length) for region, offset, length in parts])

    def _copy_now(self, part: _Part) -> Buffer | None:
        if part[0].access is Access.MESSAGE:
            return None
        return bytes(self._load([part]))

    async def _write_slowly(
        self, segments: Sequence[tuple[int, Buffer]], written: Callable[[], object] = lambda: None
    ) -> None:
        """Every way and every error, in order; suspends only when a part goes by message, or at the gate.

        `written` is called after each of the segments that has reached guest memory.
        """
        await self.gate.passed()
        writer: MessageWriter | None = None
        for address, data in segments:
            if not self.enabled:
                raise DmaError(address, len(data), "the bus master is off")
            view = memoryview(data)
            while view:
                region, offset, length = part = self._part(address, len(view))
                if not region.writable:
                    raise DmaError(address, length, "the region is read-only")
                access = Access.MESSAGE if self.write_through else region.access
                if access is Access.MESSAGE:
                    writer = writer or self._require_messages(*part).writer()
                    await writer.add(address, view[:length], written if length == len(view) else None)
                elif writer is not None:
                    # What was sent before has to arrive before. Then look again: it may be unmapped.
                    await writer.finish()
                    writer = None
                    continue
                else:
                    region.store(offset, view[:length])
                    if length == len(view):
                        written()
                self.counters.count_write(access, length)
                address, view = address + length, view[length:]
        if writer is not None:
            await writer.finish()

    def _require_messages(self, region: DmaRegion, offset: int, length: int) -> MessageDma:
        if self.messages is None:
            raise DmaError(region.address + offset, length, "no client is there to ask")
        return self.messages


def _joined(pieces: list[Buffer | None]) -> Buffer:
    whole = [piece for piece in pieces if piece is not None]
    return whole[0] if len(whole) == 1 else b"".join(whole)
