# SPDX-License-Identifier: BSD-3-Clause
"""Doorbells by eventfd (specification: "VFIO_USER_DEVICE_GET_REGION_IO_FDS").

A client gives the eventfds to KVM, and a guest's write to a doorbell reaches us without a message.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vfio_user.device_models.regions import Doorbell, Region
from vfio_user.protocol.constants import SCM_MAX_FD, IoeventfdFlags
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.messages import Ioeventfd
from vfio_user.server.eventfds import drain
from vfio_user.transport.fds import OwnedFd, close_all
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IoFds:
    """What the reply carries. The descriptors stay ours; sending duplicates them."""

    sub_regions: tuple[Ioeventfd, ...]
    fds: tuple[int, ...]


class Ioeventfds:
    """Makes an eventfd for each doorbell of a region when a client asks first, and serves them."""

    def __init__(self, poller: Poller, regions: Mapping[int, Region]) -> None:
        self._poller = poller
        self._regions = regions
        self._fds: dict[int, list[OwnedFd]] = {}
        self._ringers: list[Callable[[], None]] = []

    def offer(self, index: int, max_fds: int) -> IoFds:
        """The sub-regions of region `index` with their eventfds; the same ones when asked again.

        A message carries at most `max_fds` descriptors (the client's max_msg_fds): doorbells past that
        are left out, and reach us as ordinary writes. EINVAL: there is no such region.
        """
        region = self._regions.get(index)
        if region is None:
            raise RemoteProtocolError(f"there is no region {index}")
        doorbells = region.doorbells[: min(max_fds, SCM_MAX_FD)]
        fds = self._eventfds(index, region, doorbells)
        sub_regions = tuple(_sub_region(doorbell, i) for i, doorbell in enumerate(doorbells))
        return IoFds(sub_regions, tuple(fd.fileno() for fd in fds))

    def ring_all(self) -> None:
        """Write what was signalled and not yet polled: a device that is stopped has got all its doorbells."""
        for ring in self._ringers:
            ring()

    def release(self) -> None:
        """The client has gone: close every eventfd. KVM may still signal its own; nobody listens."""
        self._ringers.clear()
        for fds in self._fds.values():
            for fd in fds:
                self._poller.unregister(fd.fileno())
            close_all(fds)
        self._fds.clear()

    def _eventfds(self, index: int, region: Region, doorbells: tuple[Doorbell, ...]) -> list[OwnedFd]:
        fds = self._fds.setdefault(index, [])
        for doorbell in doorbells[len(fds) :]:
            fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            ring = _ringer(fd, region, doorbell)
            self._poller.register(fd.fileno(), ring)
            self._ringers.append(ring)
            fds.append(fd)
        return fds[: len(doorbells)]


def _sub_region(doorbell: Doorbell, fd_index: int) -> Ioeventfd:
    flags = 0 if doorbell.value is None else IoeventfdFlags.DATAMATCH
    return Ioeventfd(doorbell.offset, doorbell.size, fd_index, flags, doorbell.value or 0)


def _ringer(fd: OwnedFd, region: Region, doorbell: Doorbell) -> Callable[[], None]:
    """What is done when the eventfd was signalled: one write, however often it was."""
    data = (doorbell.value or 0).to_bytes(doorbell.size, "little")

    def ring() -> None:
        if not drain(fd.fileno()):
            return
        try:
            region.write(doorbell.offset, data)
        except Exception:
            logger.exception("the doorbell at %#x failed", doorbell.offset)

    return ring
