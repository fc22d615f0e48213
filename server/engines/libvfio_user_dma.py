# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory under libvfio-user: the library maps it and keeps the dirty log, we read and write it.

The regions are those of the native engine's table (`DmaRegion`, whose `store` is the one way in which a
device's write reaches memory), so a device's accesses take the same way under both engines.
"""

import ctypes
import errno
import gc
import logging
import sys
from bisect import insort
from collections.abc import Callable
from typing import Any

from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.tasks import Completion
from vfio_user.protocol.errors import DeviceError, VfioUserError
from vfio_user.server.dma_region import Access, DmaRegion, RegionSpec
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_context import Context

logger = logging.getLogger(__name__)

LOST = frozenset({errno.EPROTO, errno.EINTR})
"""The library has taken another message for a reply, or a signal came while it waited for one: what comes
next in the stream is not what it takes it for."""
MESSAGE_SIZE = 4096
"""Bytes of a DMA message: the library does not tell what the client's max_data_xfer_size is."""

_WRITABLE = 0x200  # PyBUF_WRITE
_view_of_memory: Callable[[int, int, int], memoryview] = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object  # type: ignore[attr-defined]  # it is a ctypes function
_view_of_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)  # type: ignore[attr-defined]


class LibraryRegion(DmaRegion):
    """A region that the library has mapped at `place`; it unmaps it when `close` has returned."""

    __slots__ = ("_mark_dirty",)

    access = Access.MAPPED

    def __init__(self, spec: RegionSpec, place: int, mark_dirty: Callable[[int, int], None]) -> None:
        super().__init__(spec)
        self._mark_dirty = mark_dirty
        whole = _view_of_memory(place, spec.size, _WRITABLE)
        self.read_view = whole.toreadonly() if spec.readable else None
        self.write_view = whole if spec.writable else None

    def load(self, offset: int, length: int) -> Buffer:
        assert self.read_view is not None
        return self.read_view[offset : offset + length]

    def store(self, offset: int, data: Buffer) -> None:
        assert self.write_view is not None
        length = len(data)
        if length:
            self.write_view[offset : offset + length] = data
            self._mark_dirty(self.address + offset, length)

    def close(self) -> None:
        """Let go of the memory. Unlike the native engine's, it goes even while a device keeps a view."""
        super().close()
        ours = [view for view in (self.read_view, self.write_view) if view is not None]
        if ours and _views_of(ours[0]) > len(ours):
            logger.error(
                "the device still holds a view of guest memory %#x, which is unmapped now: the next use of "
                "that view ends this process",
                self.address,
            )
        self.read_view = self.write_view = None


def _views_of(view: memoryview) -> int:
    """How many memoryviews, this one included, share its memory: each holds the same managed buffer."""
    (managed,) = gc.get_referents(view)
    return sys.getrefcount(managed) - 2  # less our name for it and the argument


class LibraryTable(DmaTable):
    """The regions that the library has, but for those that `check` refuses."""

    def check(self, spec: RegionSpec) -> None:
        """Errors are those of `map`."""
        self._check(spec)

    def insert(self, region: DmaRegion) -> None:
        """Add a region that is open already, and has been checked."""
        insort(self._starts, region.address)
        self._regions[region.address] = region


class LibraryDma:
    """Keeps the table in step with the library, and carries what goes by message (`DmaSender`)."""

    def __init__(self, table: LibraryTable, context: Context) -> None:
        self._table = table
        self._context = context
        self._warned = False
        self._lost = 0

    def register(self, info: Any) -> None:
        """The client has mapped a region (vfu_dma_register_cb_t). The same one may come twice.

        One that we refuse is mapped all the same, as far as the client is told: this callback has no result.
        """
        spec = _spec(info)
        known = self._table.find(spec.address)
        if known is not None and (known.address, known.size) == (spec.address, spec.size):
            return
        try:
            self._table.check(spec)
        except VfioUserError as error:
            logger.warning("the device cannot use guest memory that has been mapped: %s", error.reason)
            return
        mapped = LibraryRegion(spec, info.vaddr, self._context.mark_dirty) if info.vaddr else DmaRegion(spec)
        self._table.insert(mapped)

    def unregister(self, info: Any) -> None:
        """A region goes (vfu_dma_unregister_cb_t)."""
        spec = _spec(info)
        self._table.unmap(spec.address, spec.size)

    def mark_all(self) -> None:
        """Note that all mapped memory may have been written; no effect while nothing is logged."""
        for region in self._table:
            if region.write_view is not None:
                self._context.mark_dirty(region.address, region.size)

    def send_dma_read(self, address: int, count: int, completion: Completion[Buffer]) -> None:
        """DMA_READ: see `message_dma.DmaSender`. The reply is there when this returns."""
        self._check(address, count)
        try:
            data = self._context.read(address, count)
        except OSError as error:
            self._failed(error)
        else:
            completion.finish(data)

    def send_dma_write(self, address: int, data: Buffer, completion: Completion[int]) -> None:
        """DMA_WRITE: see `message_dma.DmaSender`. The reply is there when this returns."""
        self._check(address, len(data))
        try:
            self._context.write(address, data)
        except OSError as error:
            self._failed(error)
        else:
            completion.finish(len(data))

    def take_lost(self) -> int:
        """The errno, once, of `LOST`."""
        lost, self._lost = self._lost, 0
        return lost

    def _failed(self, error: OSError) -> None:
        """Raise, unless the client has been lost: its task has been cut then, and ends at this await."""
        if error.errno in LOST:
            self._lost = error.errno or 0
        if error.errno != errno.ENOTCONN:
            raise DeviceError(f"DMA by message: {error.strerror}", error.errno) from error

    def _check(self, address: int, length: int) -> None:
        region = self._table.find(address)
        if self._context.abi is abi.Abi.V1 and region is not None and region.address != address:
            raise DeviceError(
                f"{length} bytes at {address:#x}: libvfio-user before July 2023 accesses the start of the "
                "region instead"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "guest memory without a descriptor is accessed by message: with libvfio-user that works only "
                "while the client sends nothing else"
            )


def _spec(info: Any) -> RegionSpec:
    return RegionSpec(
        info.iova.base or 0,
        info.iova.length,
        readable=bool(info.prot & abi.PROT_READ),
        writable=bool(info.prot & abi.PROT_WRITE),
    )
