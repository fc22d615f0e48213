# SPDX-License-Identifier: BSD-3-Clause
"""What a client asks of the dirty log: v1's DIRTY_PAGES and DMA_UNMAP, v2's features of DMA logging.

Everything is checked before the log is touched: a request that is refused, or whose reply would be too
long, has lost no page.
"""

import errno
import struct
from bisect import bisect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.bitmaps import ADDRESS_SPACE, is_page_size, pages_of
from vfio_user.protocol.constants import (
    BITMAP_RANGE_SIZE,
    BITMAP_SIZE,
    DIRTY_PAGES_SIZE,
    DMA_UNMAP_SIZE,
    DirtyPagesFlags,
    DmaUnmapFlags,
)
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError
from vfio_user.server.answer import Answer
from vfio_user.server.dirty_tracking import DirtyTracking
from vfio_user.transport.fds import OwnedFd

if TYPE_CHECKING:
    from vfio_user.server.session import Session

MAX_RANGES: Final = 256
"""Of DMA_LOGGING_START, as in the kernel: they fit into one of its pages."""

_REPORT_HEAD = struct.Struct("=QQQ")
_CONTROL_HEAD = struct.Struct("=QI4x")


# v1


def dma_unmap(session: "Session", request: m.DmaUnmapRequest, fds: list[OwnedFd]) -> Answer:
    """v1 specification: "VFIO_USER_DMA_UNMAP". The flags exclude each other."""
    if request.argsz < DMA_UNMAP_SIZE:
        raise RemoteProtocolError(f"DMA_UNMAP: argsz {request.argsz} is below {DMA_UNMAP_SIZE}")
    return _UNMAPS[_one_of(_UNMAPS, request.flags)](session, request)


def _unmap(session: "Session", request: m.DmaUnmapRequest) -> Answer:
    regions = session.host.table.unmap(request.address, request.size)
    size = sum(region.size for region in regions)
    return Answer(m.DmaUnmapReply(request.flags, request.address, size))


def _unmap_all(session: "Session", request: m.DmaUnmapRequest) -> Answer:
    if request.address or request.size:
        raise RemoteProtocolError("DMA_UNMAP of all regions: address and size must be 0")
    size = sum(region.size for region in session.host.table.unmap_all())
    return Answer(m.DmaUnmapReply(request.flags, 0, size))


def _unmap_with_bitmap(session: "Session", request: m.DmaUnmapRequest) -> Answer:
    """Of one region or a range of whole ones; the bitmap is that of the range."""
    wanted, table = request.bitmap, session.host.table
    assert wanted is not None
    if request.argsz < DMA_UNMAP_SIZE + BITMAP_SIZE + wanted.size:
        raise RemoteProtocolError(f"DMA_UNMAP: argsz {request.argsz} has no room for the dirty bitmap")
    _check_claim(session.host.dirty)
    asked = m.BitmapRange(request.address, request.size, wanted)
    _check_v1(session.host.dirty, asked)
    table.whole_regions(request.address, request.size)
    data = _take_v1(session.host.dirty, asked)
    size = sum(region.size for region in table.unmap(request.address, request.size))
    return Answer(m.DmaUnmapReply(request.flags, request.address, size, wanted, data), lasting=True)


_UNMAPS: Mapping[int, Callable[["Session", m.DmaUnmapRequest], Answer]] = {
    0: _unmap,
    int(DmaUnmapFlags.GET_DIRTY_BITMAP): _unmap_with_bitmap,
    int(DmaUnmapFlags.ALL): _unmap_all,
}


def dirty_pages(session: "Session", request: m.DirtyPagesRequest, fds: list[OwnedFd]) -> Answer:
    """v1 specification: "VFIO_USER_DIRTY_PAGES"."""
    if request.argsz < DIRTY_PAGES_SIZE:
        raise RemoteProtocolError(f"DIRTY_PAGES: argsz {request.argsz} is below {DIRTY_PAGES_SIZE}")
    _check_claim(session.host.dirty)
    return _DIRTY_PAGES[_one_of(_DIRTY_PAGES, request.flags)](session.host.dirty, request)


def _start(tracking: DirtyTracking, request: m.DirtyPagesRequest) -> Answer:
    """Harmless when logging is on, as in the kernel: nothing is forgotten."""
    if not tracking.active:
        tracking.start(tracking.pgsize, keep_unmapped=False)
    return Answer(m.DirtyPagesReply())


def _stop(tracking: DirtyTracking, request: m.DirtyPagesRequest) -> Answer:
    tracking.stop()
    return Answer(m.DirtyPagesReply())


def _get_bitmap(tracking: DirtyTracking, request: m.DirtyPagesRequest) -> Answer:
    asked = request.range
    assert asked is not None
    _check_v1(tracking, asked)
    needed = DIRTY_PAGES_SIZE + BITMAP_RANGE_SIZE + asked.bitmap.size
    if request.argsz < needed:  # specification: "Message sizes"; nothing is reported, nothing is cleared
        return Answer(m.DirtyPagesReply(request.flags, argsz=needed))
    return Answer(m.DirtyPagesReply(request.flags, asked, _take_v1(tracking, asked)), lasting=True)


_DIRTY_PAGES: Mapping[int, Callable[[DirtyTracking, m.DirtyPagesRequest], Answer]] = {
    int(DirtyPagesFlags.START): _start,
    int(DirtyPagesFlags.STOP): _stop,
    int(DirtyPagesFlags.GET_BITMAP): _get_bitmap,
}


def _check_claim(tracking: DirtyTracking) -> None:
    if tracking.claim is not None:
        raise DeviceError("the control socket has the dirty log", errno.EBUSY)


def _one_of(known: Mapping[int, object], flags: int) -> int:
    if flags not in known:
        raise RemoteProtocolError(f"flags {flags:#x} are none of {', '.join(map(hex, known))}")
    return flags


def _check_v1(tracking: DirtyTracking, asked: m.BitmapRange) -> None:
    """The bitmap has the size that its range needs, in bytes or (as everybody has it) in u64s."""
    pgsize, size = asked.bitmap.pgsize, asked.bitmap.size
    length = tracking.check(asked.iova, asked.size, pgsize)
    if pgsize < tracking.pgsize:
        raise RemoteProtocolError(f"page size {pgsize}: {tracking.pgsize} has been negotiated")
    if not pages_of(asked.size, 8 * pgsize) <= size <= length:
        raise RemoteProtocolError(f"a bitmap of {size} bytes for {asked.size:#x} bytes: {length} are needed")


def _take_v1(tracking: DirtyTracking, asked: m.BitmapRange) -> m.Payload:
    return memoryview(tracking.report(asked.iova, asked.size, asked.bitmap.pgsize))[: asked.bitmap.size]


# v2: methods of features; each gives the data of the reply


def logging_start(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    """SET of DMA_LOGGING_START. Every write is logged: the ranges are a hint that we do not need.

    As the kernel: EINVAL when logging is on, when ranges overlap, are empty or are not whole pages of the
    page size, E2BIG for more than 256, EOVERFLOW for one that wraps around. No ranges are allowed, as the
    specification has it.
    """
    tracking = session.host.dirty
    _check_claim(tracking)
    control = _control(bytes(request.data))
    if tracking.active:
        raise DeviceError("dirty pages are being logged already")
    if control.page_size < 1 or control.page_size & (control.page_size - 1):
        raise RemoteProtocolError(f"page size {control.page_size} is not a power of two")
    _check_ranges(control)
    page_size = tracking.start(control.page_size, keep_unmapped=True)
    return (layouts.build(m.DmaLoggingControl(page_size, control.ranges)),)


def _control(data: bytes) -> m.DmaLoggingControl:
    if len(data) >= _CONTROL_HEAD.size and (count := _CONTROL_HEAD.unpack_from(data)[1]) > MAX_RANGES:
        raise RemoteProtocolError(f"{count} ranges to log, at most {MAX_RANGES}", errno.E2BIG)
    return layouts.parse(m.DmaLoggingControl, data)


def _check_ranges(control: m.DmaLoggingControl) -> None:
    starts: list[int] = []
    ends: list[int] = []
    for wanted in control.ranges:
        start, end = wanted.iova, wanted.iova + wanted.length
        _check_wrap(start, wanted.length)
        place = bisect(starts, start)
        overlaps = (place and ends[place - 1] > start) or (place < len(starts) and starts[place] < end)
        if start == end or (start | end) & (control.page_size - 1) or overlaps:
            raise RemoteProtocolError(
                f"range of {wanted.length:#x} bytes at {start:#x}: empty, not whole pages, or there twice"
            )
        starts.insert(place, start)
        ends.insert(place, end)


def _check_wrap(start: int, length: int) -> None:
    if start + length > ADDRESS_SPACE:
        raise RemoteProtocolError(f"{length:#x} bytes at {start:#x} wrap around", errno.EOVERFLOW)


def logging_stop(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    """SET of DMA_LOGGING_STOP: harmless when logging is off, as in the kernel's drivers."""
    _check_claim(session.host.dirty)
    session.host.dirty.stop()
    return (bytes(request.data),)


def logging_report_size(session: "Session", request: m.DeviceFeatureRequest) -> int:
    """Of the data that GET of DMA_LOGGING_REPORT will give.

    EINVAL when logging is off, and for a page size, a range or a length of the bitmap as
    `DirtyTracking.check` has them; EOVERFLOW for a range that wraps around.
    """
    tracking = session.host.dirty
    _check_claim(tracking)
    if len(request.data) < _REPORT_HEAD.size:
        raise RemoteProtocolError(f"DMA_LOGGING_REPORT: {len(request.data)} bytes of data")
    iova, length, page_size = _REPORT_HEAD.unpack_from(request.data)
    if is_page_size(page_size):  # the kernel looks at the page size first
        _check_wrap(iova, length)
    return _REPORT_HEAD.size + tracking.check(iova, length, page_size)


def logging_report(session: "Session", request: m.DeviceFeatureRequest) -> tuple[m.Payload, ...]:
    """GET of DMA_LOGGING_REPORT: the bitmap of any range, also across regions and where nothing is mapped.

    The head and the bitmap, which is not copied: that of 1 TiB has 32 MiB. `logging_report_size` has checked.
    """
    iova, length, page_size = _REPORT_HEAD.unpack_from(request.data)
    bitmap = session.host.dirty.report(iova, length, page_size)
    return _REPORT_HEAD.pack(iova, length, page_size), memoryview(bitmap)
