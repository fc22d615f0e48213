# SPDX-License-Identifier: BSD-3-Clause
"""Dirty page logging over all DMA regions of a client: the one log behind v1 and v2 of the protocol.

Each region that the device can write without the client's seeing it (mapped or by file) has a `DirtyLog`
while logging is on. A report takes from the logs in one step, without an await: what is written afterwards
is in the next report. Regions that come while logging is on are logged from their first byte.

A region that goes takes its log with it in v1, whose DMA_UNMAP can ask for the bitmap. v2 has no such
thing, and a report names addresses, not regions: there the pages of a region that went are kept until they
are reported, as the kernel's device tracking does.
"""

import errno
from collections.abc import Iterator

from vfio_user.protocol.bitmaps import (
    ADDRESS_SPACE,
    MIN_PAGE_SIZE,
    bitmap_bytes,
    bitmap_size,
    is_page_size,
    pages_of,
)
from vfio_user.protocol.capabilities import Migration
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError
from vfio_user.server.dirty import Bits, DirtyLog, merge, zeroed
from vfio_user.server.dma_region import Access, DmaRegion
from vfio_user.server.dma_table import DmaTable

MAX_PAGE_SIZE = 1 << 30
"""Coarsest pages that are tracked; a report may have any. A page that is reported in parts takes a bit for
each 4 KiB of it then."""

MAX_MEMORY = 512 << 20
"""Bytes of all bitmaps of a client: 16 TiB in pages of 4 KiB."""

MAX_KEPT = 65536
"""Regions that went and whose dirty pages wait for their report."""

_STEP = 4 * MAX_PAGE_SIZE  # bytes: whole pages of whatever size is tracked

_Place = tuple[int, int]
"""Address and size of a region."""
_Log = tuple[int, DirtyLog]
"""A log, and the address where it begins."""


class DirtyTracking:
    """`precise` False: the device cannot tell what it wrote, and each report has all that it could write.

    `page_size` is 0 while logging is off. `pgsize` and `max_bitmap_size` are v1's capability `migration`:
    the page size in which v1 logs, and the longest bitmap in bytes that a client gets.
    """

    def __init__(self, table: DmaTable) -> None:
        self.precise = True
        self.page_size = 0
        self.claim: object | None = None
        """Who else than the client has the log (`server/control_dirty.py`): requests of the client for it are
        refused. It ends with the log."""
        self.pgsize = MIN_PAGE_SIZE
        self.max_bitmap_size = Migration().max_bitmap_size
        self._table = table
        self._keep = False
        self._kept: dict[_Place, DirtyLog] = {}
        self._memory = 0
        self._lost = False

    @property
    def active(self) -> bool:
        return self.page_size != 0

    def negotiated(self, agreed: Migration | None) -> None:
        """VERSION: what both sides said of dirty pages; None when one of them said nothing."""
        agreed = agreed or Migration()
        self.pgsize = max(agreed.pgsize, MIN_PAGE_SIZE)
        self.max_bitmap_size = agreed.max_bitmap_size

    def start(self, page_size: int, *, keep_unmapped: bool) -> int:
        """Log from now on; the page size in which that is done, `page_size` (a power of two) if possible.

        `keep_unmapped`: see this module's description. ENOMEM: more memory than can be logged.
        """
        self.stop()
        self.page_size = min(max(page_size, MIN_PAGE_SIZE), MAX_PAGE_SIZE)
        self._keep = keep_unmapped
        try:
            for region in self._table:
                self.mapped(region)
        except DeviceError:
            self.stop()
            raise
        self._table.watcher = self
        return self.page_size

    def stop(self) -> None:
        """Log no more and forget everything; harmless when logging is off."""
        self._table.watcher = None
        self.claim = None
        for region in self._table:
            region.dirty = None
        self._kept.clear()
        self.page_size = self._memory = 0
        self._lost = False

    # The table of regions tells what comes and goes

    def mapped(self, region: DmaRegion) -> None:
        """A region is there: log it, unless the device cannot write it or the client makes the writes."""
        if region.access is Access.MESSAGE or not region.writable:
            return
        region.dirty = self._kept.pop((region.address, region.size), None) or self._log(region)

    def _log(self, region: DmaRegion) -> DirtyLog:
        # Pages that begin where the region begins must be pages of the address space too.
        page_size = min(self.page_size, region.address & -region.address or self.page_size)
        needed = bitmap_bytes(pages_of(region.size, page_size))
        if self._memory + needed > MAX_MEMORY:
            raise DeviceError(f"the dirty log would need more than {MAX_MEMORY} bytes", errno.ENOMEM)
        try:
            log = DirtyLog(region.size, page_size)
        except MemoryError as error:
            raise DeviceError(f"no memory for the dirty log: {error}", errno.ENOMEM) from error
        self._memory += needed
        return log

    def unmapped(self, region: DmaRegion) -> None:
        """A region has gone; its log can still be asked until this."""
        log, region.dirty = region.dirty, None
        if log is None:
            return
        if self._keep and not self.precise:
            log.mark_all()
        if not self._keep or log.clean:
            self._memory -= len(log.bits)
        elif len(self._kept) < MAX_KEPT:
            self._kept[region.address, region.size] = log
        else:
            self._memory -= len(log.bits)
            self._lost = True

    # Reports

    def check(self, address: int, size: int, page_size: int) -> int:
        """The length in bytes of the bitmap that a report would have.

        EINVAL: logging is off, a page size that is no power of two from 4 KiB up, an empty range, one that
        is not whole pages of 4 KiB or wraps around, a bitmap longer than `max_bitmap_size`.
        ENOMEM: pages were lost, because more than 65,536 dirty regions went without a report.
        """
        if not self.active:
            raise RemoteProtocolError("dirty pages are not being logged")
        if not is_page_size(page_size):
            raise RemoteProtocolError(f"page size {page_size} is not a power of two of at least 4096")
        if not size or (address | size) & (MIN_PAGE_SIZE - 1) or address + size > ADDRESS_SPACE:
            raise RemoteProtocolError(f"{size:#x} bytes at {address:#x} are not a range of whole pages")
        length = bitmap_size(size, page_size)
        if length > self.max_bitmap_size:
            raise RemoteProtocolError(f"a bitmap of {length} bytes is above {self.max_bitmap_size}")
        if self._lost:
            raise DeviceError("dirty pages of regions that went were lost: start again", errno.ENOMEM)
        return length

    def report(self, address: int, size: int, page_size: int) -> Bits:
        """The dirty pages of any range, which are clean then. Nobody else has the buffer.

        Bit n is the n-th page of `page_size` from `address`; nothing is dirty between the regions. A range
        that is one region, in the page size that is tracked, costs one allocation. Raises as `check`.
        """
        length = self.check(address, size, page_size)
        logs = [*self._live(address, size), *self._gone(address, size)]
        if len(logs) == 1 and logs[0][0] == address:
            log = logs[0][1]
            if (log.size, log.page_size) == (size, page_size):
                bitmap = log.take()
                self._drop_reported(address, size)
                return bitmap
        bitmap = zeroed(length)
        for start, log in logs:
            _move(log, start, bitmap, address, size, page_size)
        self._drop_reported(address, size)
        return bitmap

    @property
    def lost(self) -> bool:
        """Pages were lost: more than 65,536 dirty regions went without a report."""
        return self._lost

    def logs(self) -> list[_Log]:
        """The logs of all regions, and those that were kept of regions that went, with their addresses."""
        return [*self._live(0, ADDRESS_SPACE), *self._gone(0, ADDRESS_SPACE)]

    def _live(self, address: int, size: int) -> Iterator[_Log]:
        """The logs of the regions that have a byte of the range."""
        for region in self._table.overlapping(address, size):
            if region.dirty is not None:
                if not self.precise:
                    region.dirty.mark_all()
                yield region.address, region.dirty

    def _gone(self, address: int, size: int) -> Iterator[_Log]:
        """The logs that were kept and have a byte of the range."""
        for (start, length), log in self._kept.items():
            if start < address + size and address < start + length:
                yield start, log

    def _drop_reported(self, address: int, size: int) -> None:
        for start, log in list(self._gone(address, size)):
            if log.clean:
                self._memory -= len(log.bits)
                del self._kept[start, log.size]


def _move(log: DirtyLog, start: int, bitmap: Bits, address: int, size: int, page_size: int) -> None:
    """Take the part of a log, which begins at `start`, that lies in the range of a bitmap.

    In steps, so that a change of the page size takes little memory, and hardly time where nothing is dirty.
    """
    low, end = max(start, address), min(start + log.size, address + size)
    whole = (low - start, end - low, page_size) == (0, log.size, log.page_size)
    while low < end:
        step = log.size if whole else _STEP - (low - start) % _STEP
        high = min(low + step, end)
        first, lead = divmod(low - address, page_size)
        merge(bitmap, first, log.report_and_clear(low - start, high - low, page_size, lead))
        low = high
