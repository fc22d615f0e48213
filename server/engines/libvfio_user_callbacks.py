# SPDX-License-Identifier: BSD-3-Clause
"""What libvfio-user is told of a device, and what it calls: accesses, memory, interrupt masks, reset."""

import ctypes
import errno
from collections.abc import Callable

from vfio_user.device_models.device import Device, IrqIndex
from vfio_user.device_models.regions import Area, Region
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.engines import libvfio_user_abi as abi
from vfio_user.server.engines.libvfio_user_context import Context, RegionAccess
from vfio_user.server.engines.libvfio_user_host import LibraryHost

DOORBELLS = 16
"""Eventfds of a region: as many as QEMU takes in a message. The library does not mind the client's limit."""


class Callbacks:
    """Between a context and a device. `client_lost` is called when the library lets go of its client."""

    def __init__(
        self, context: Context, host: LibraryHost, device: Device, client_lost: Callable[[], None]
    ) -> None:
        self._context = context
        self._host = host
        self._device = device
        self._client_lost = client_lost

    def set_up(self, max_dma_maps: int) -> None:
        """Tell the library of the device. DeviceError: it has something that the library cannot have."""
        context, dma = self._context, self._host.library_dma
        for index, region in self._device.regions.items():
            self._set_up_region(index, region)
        for irq in IrqIndex:
            context.setup_irqs(irq, self._device.irqs.get(irq, 0), self._state_changer(irq))
        context.setup_dma(dma.register, dma.unregister, max_dma_maps)
        context.setup_life(self._quiesce, self._reset)
        context.realize()

    # Regions

    def _set_up_region(self, index: int, region: Region) -> None:
        if not 0 <= index < abi.REGIONS:
            raise DeviceError(f"libvfio-user has no region {index}")
        fd = -1
        areas: tuple[Area, ...] = ()
        if region.memory is not None and region.mmap_areas:
            fd = self._host.memory_fd(region.memory)
            areas = region.mmap_areas if region.mmap_areas != (Area(0, region.size),) else ()
        access, flags = self._accessor(index, region), _flags(index, region)
        self._context.setup_region(index, region.size, access, flags, areas, fd)
        offer = self._host.ioeventfds.offer(index, DOORBELLS)
        for sub_region in reversed(offer.sub_regions):  # the library puts each before those that it has
            self._context.create_ioeventfd(index, offer.fds[sub_region.fd_index], sub_region)

    def _accessor(self, index: int, region: Region) -> RegionAccess:
        host = self._host

        def region_access(_context: object, buffer: int, count: int, offset: int, is_write: bool) -> int:
            if not host.running and host.migration.may_run:
                host.resume()  # the client has set itself up and begins to use the device
            if is_write:
                if not region.writable:
                    raise DeviceError(f"region {index} cannot be written", errno.EPERM)
                if not host.is_blank(index):
                    region.write(offset, ctypes.string_at(buffer, count))
            else:
                if not region.readable:
                    raise DeviceError(f"region {index} cannot be read", errno.EPERM)
                blank = host.is_blank(index)
                data = bytes(count) if blank else bytes(memoryview(region.read(offset, count)))
                if len(data) != count:
                    raise ValueError(f"region {index} gave {len(data)} bytes, not {count}")
                ctypes.memmove(buffer, data, count)
            return count

        return region_access

    # Interrupts

    def _state_changer(self, irq: IrqIndex) -> Callable[[int, int, bool], None]:
        def change_state(start: int, count: int, masked: bool) -> None:
            self._host.irqs.change_state(irq, start, count, masked)

        return change_state

    # Life

    def _quiesce(self) -> None:
        """Nothing is under way: tasks run between requests, and hold no memory over an await.

        What is reported of a device that cannot tell what it wrote is all that it could write. It is marked
        here, before memory goes and before the device stands still.
        """
        if not self._device.precise_dirty:
            self._host.library_dma.mark_all()

    def _reset(self, why: abi.Reset) -> None:
        if why is abi.Reset.LOST_CONN:
            self._client_lost()
            return
        self._host.reset()
        self._device.reset()
        self._host.migration.reset()


def _flags(index: int, region: Region) -> abi.RegionFlag:
    """The library only announces the directions: `region_access` refuses."""
    if index == abi.CONFIG_REGION:
        return abi.RegionFlag.READ | abi.RegionFlag.WRITE | abi.RegionFlag.ALWAYS_CB
    return abi.RegionFlag.MEM | abi.RegionFlag.READ * region.readable | abi.RegionFlag.WRITE * region.writable
