# SPDX-License-Identifier: BSD-3-Clause
"""One function per command that a client sends: takes the request, gives the reply, or raises.

A `VfioUserError` becomes an error reply with its errno. Descriptors that came with a request are in
`fds`; a handler pops those that it keeps, the session closes the others.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vfio_user.device_models.regions import Region
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    PCI_NUM_IRQS,
    REGION_SUBTYPE_MIGRATION,
    REGION_TYPE_MIGRATION,
    Command,
    DeviceFlags,
    DmaMapFlags,
    RegionInfoFlags,
)
from vfio_user.protocol.errors import DeviceError
from vfio_user.server.answer import Answer
from vfio_user.server.dirty_handlers import dirty_pages, dma_unmap
from vfio_user.server.migration.features import device_feature, mig_data_read, mig_data_write
from vfio_user.transport.fds import OwnedFd

if TYPE_CHECKING:
    from vfio_user.server.session import Session


Handler = Callable[["Session", Any, list[OwnedFd]], Answer]


def version(session: "Session", request: m.VersionRequest, fds: list[OwnedFd]) -> Answer:
    return Answer(session.negotiate(request))


def dma_map(session: "Session", request: m.DmaMapRequest, fds: list[OwnedFd]) -> Answer:
    fd = fds.pop() if fds else None
    session.host.table.map(
        request.address,
        request.size,
        fd,
        request.offset,
        readable=bool(request.flags & DmaMapFlags.READ),
        writable=bool(request.flags & DmaMapFlags.WRITE),
    )
    return Answer(m.DmaMapReply())


def device_get_info(session: "Session", request: m.DeviceGetInfoRequest, fds: list[OwnedFd]) -> Answer:
    flags = DeviceFlags.PCI | DeviceFlags.RESET
    return Answer(m.fit(m.DeviceGetInfoReply(flags, session.num_regions, PCI_NUM_IRQS), request.argsz))


def device_get_region_info(
    session: "Session", request: m.DeviceGetRegionInfoRequest, fds: list[OwnedFd]
) -> Answer:
    if request.index >= session.num_regions:
        raise DeviceError(f"region {request.index}: the device has {session.num_regions} region indexes")
    region = session.regions.get(request.index)
    if region is None:
        return Answer(m.fit(m.DeviceGetRegionInfoReply(0, request.index, 0), request.argsz))
    flags = RegionInfoFlags.READ * region.readable | RegionInfoFlags.WRITE * region.writable
    capabilities: tuple[m.RegionCapability, ...] = ()
    if region is session.host.migration_region:
        capabilities = (m.TypeCapability(REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION),)
    lent: tuple[int, ...] = ()
    # A client that takes no descriptors cannot map anything.
    if session.max_send_fds and region.mmap_areas and region.memory is not None:
        flags |= RegionInfoFlags.MMAP
        capabilities += _sparse_areas(region)
        lent = (session.host.memory_fd(region.memory),)
    reply = m.DeviceGetRegionInfoReply(flags, request.index, region.size, capabilities=capabilities)
    # Who asks only for the size has no room for descriptors: libvfio-user's client takes them for an error.
    return Answer(m.fit(reply, request.argsz), lent if reply.argsz <= request.argsz else ())


def _sparse_areas(region: Region) -> tuple[m.RegionCapability, ...]:
    """The areas that may be mapped, unless that is the whole region."""
    areas = tuple(m.SparseMmapArea(area.offset, area.size) for area in region.mmap_areas)
    if not areas or areas == (m.SparseMmapArea(0, region.size),):
        return ()
    return (m.SparseMmapCapability(areas),)


def device_get_region_io_fds(
    session: "Session", request: m.DeviceGetRegionIoFdsRequest, fds: list[OwnedFd]
) -> Answer:
    if request.flags or request.count:
        raise DeviceError("DEVICE_GET_REGION_IO_FDS: flags and count must be 0", errno.EINVAL)
    doorbells = session.host.ioeventfds.offer(request.index, session.max_send_fds)
    reply = m.fit(m.DeviceGetRegionIoFdsReply(request.index, doorbells.sub_regions), request.argsz)
    return Answer(reply, doorbells.fds if reply.sub_regions else ())


def device_get_irq_info(session: "Session", request: m.DeviceGetIrqInfoRequest, fds: list[OwnedFd]) -> Answer:
    flags, count = session.host.irqs.info(request.index)
    return Answer(m.fit(m.DeviceGetIrqInfoReply(flags, request.index, count), request.argsz))


def device_set_irqs(session: "Session", request: m.DeviceSetIrqsRequest, fds: list[OwnedFd]) -> Answer:
    given = fds[:]
    fds.clear()  # theirs from now on
    session.host.irqs.set_irqs(
        request.flags, request.index, request.start, request.count, request.data, given
    )
    return Answer(m.DeviceSetIrqsReply())


def region_read(session: "Session", request: m.RegionReadRequest, fds: list[OwnedFd]) -> Answer:
    region = _accessed(session, request.region, request.offset, request.count)
    if not region.readable:
        raise DeviceError(f"region {request.region} cannot be read", errno.EPERM)
    if session.host.is_blank(request.region):
        return Answer(m.RegionReadReply(request.offset, request.region, bytes(request.count)))
    data = region.read(request.offset, request.count)
    if memoryview(data).nbytes != request.count:  # TypeError, when it is nothing of that kind
        raise ValueError(f"region {request.region} gave {len(data)} bytes, not {request.count}")
    return Answer(m.RegionReadReply(request.offset, request.region, data))


def region_write(session: "Session", request: m.RegionWriteRequest, fds: list[OwnedFd]) -> Answer:
    _write(session, request.region, request.offset, request.data)
    return Answer(m.RegionWriteReply(request.offset, request.region, len(request.data)))


def region_write_multi(session: "Session", request: m.RegionWriteMultiRequest, fds: list[OwnedFd]) -> Answer:
    """The reply tells how many writes were done; the first one that fails ends them."""
    done = 0
    for write in request.writes:
        try:
            _write(session, write.region, write.offset, write.data)
        except DeviceError:
            if not done:
                raise
            break
        done += 1
    return Answer(m.RegionWriteMultiReply(done))


def device_reset(session: "Session", request: m.DeviceResetRequest, fds: list[OwnedFd]) -> Answer:
    session.host.reset()
    session.device.reset()
    session.host.migration.reset()
    return Answer(m.DeviceResetReply())


def _region(session: "Session", index: int) -> Region:
    region = session.regions.get(index)
    if region is None:
        raise DeviceError(f"the device has no region {index}")
    return region


def _accessed(session: "Session", index: int, offset: int, count: int) -> Region:
    region = _region(session, index)
    if offset + count > region.size:
        raise DeviceError(f"{count} bytes at {offset:#x} leave region {index} of {region.size:#x} bytes")
    if count > session.max_data_xfer_size:
        raise DeviceError(f"{count} bytes are more than max_data_xfer_size ({session.max_data_xfer_size})")
    return region


def _write(session: "Session", index: int, offset: int, data: m.Payload) -> None:
    region = _accessed(session, index, offset, len(data))
    if not region.writable:
        raise DeviceError(f"region {index} cannot be written", errno.EPERM)
    if not session.host.is_blank(index):
        region.write(offset, data)


HANDLERS: dict[Command, Handler] = {
    Command.VERSION: version,
    Command.DMA_MAP: dma_map,
    Command.DMA_UNMAP: dma_unmap,
    Command.DEVICE_GET_INFO: device_get_info,
    Command.DEVICE_GET_REGION_INFO: device_get_region_info,
    Command.DEVICE_GET_REGION_IO_FDS: device_get_region_io_fds,
    Command.DEVICE_GET_IRQ_INFO: device_get_irq_info,
    Command.DEVICE_SET_IRQS: device_set_irqs,
    Command.REGION_READ: region_read,
    Command.REGION_WRITE: region_write,
    Command.DEVICE_RESET: device_reset,
    Command.DIRTY_PAGES: dirty_pages,
    Command.REGION_WRITE_MULTI: region_write_multi,
    Command.DEVICE_FEATURE: device_feature,
    Command.MIG_DATA_READ: mig_data_read,
    Command.MIG_DATA_WRITE: mig_data_write,
}
"""Every command that the server takes; a test compares it with `protocol.commands.COMMANDS`."""

SET_UP = frozenset(
    {
        Command.VERSION,
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_SET_IRQS,
        Command.DIRTY_PAGES,
        Command.DEVICE_FEATURE,
        Command.MIG_DATA_READ,
        Command.MIG_DATA_WRITE,
    }
)
"""With these a client sets itself up (or moves the device); any other command, an access or a reset, shows
that it is ready for the device to work."""
