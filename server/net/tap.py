# SPDX-License-Identifier: BSD-3-Clause
"""The backend `tap:NAME`: a TAP device of the kernel (Documentation/networking/tuntap.rst).

A TAP that exists is used as it is; one that does not is created, brought up, and goes with the backend.
Frames have a virtio_net_hdr before them (linux/virtio_net.h): a TCP burst goes to the kernel in one write,
and the kernel cuts it, or never needs to. From the kernel we want no offloads: it cuts and sums at a tenth
of our cost.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyroute2 import IPRoute, NetlinkError  # type: ignore[import-untyped]

from vfio_user.device_models.backends import Backend
from vfio_user.device_models.net import Offload, Receiver, Segmentation
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import Burst, cut, merged_headers, segment, skip_head
from vfio_user.server.net.errors import BackendError
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

# linux/if_tun.h, with the numbers of the architectures that follow asm-generic/ioctl.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFREQ = struct.Struct("16sH22x")
NAME_LIMIT = 15  # IFNAMSIZ without the NUL

# linux/virtio_net.h: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, in the CPU's byte order
VNET_HEADER = struct.Struct("=BBHHHH")
NEEDS_CSUM = 1
GSO_ECN = 0x80
NO_OFFLOAD = VNET_HEADER.pack(0, 0, 0, 0, 0, 0)

READ_SIZE = VNET_HEADER.size + 65536 + 18
BATCH = 64
"""Frames read in one turn."""
URGENT = 8
"""Frames between two looks at what cannot wait."""
IOV_MAX = 1024

CREATE_HINT = "run as root, or let root do: ip tuntap add dev {0} mode tap user $USER; ip link set {0} up"
ATTACH_ERRORS = {
    errno.EPERM: f"no permission to use or create it; {CREATE_HINT}",
    errno.EBUSY: "another program is using it; stop that, or choose another name",
    errno.EINVAL: "it is not a TAP device with one queue; choose another name",
}


class TapBackend(Backend):
    """Frames to and from a TAP device. Raises `BackendError` if it cannot be had."""

    def __init__(self, name: str, poller: Poller) -> None:
        super().__init__()
        self.name = name
        self._poller = poller
        self._refused: list[bytes] = []
        self._fd = open_tap(name)

    def attach(self, receiver: Receiver) -> None:
        super().attach(receiver)
        self._refused = []
        self._poller.unregister(self._fd)
        self._poller.register(self._fd, self._readable)

    def _readable(self) -> None:
        """Deliver up to `BATCH` frames."""
        for _ in range(BATCH // URGENT):
            frames, error = self._read()
            self._refused = frames[self._offer_all(frames) :]
            if error is not None:
                self._lost(error)
            elif self._refused:
                self._poller.unregister(self._fd)
            if self._refused or len(frames) < URGENT:
                return
            self._poller.poll_urgent()

    def _read(self) -> tuple[list[bytes], OSError | None]:
        """The next frames, up to `URGENT`, and why there can be no more.

        os.read and a slice: a quarter faster than readv into a buffer.
        """
        fd, read, skipped = self._fd, os.read, VNET_HEADER.size
        frames: list[bytes] = []
        try:
            for _ in range(URGENT):
                frames.append(read(fd, READ_SIZE)[skipped:])
        except BlockingIOError:
            pass
        except OSError as error:
            return frames, error
        return frames, None

    def ready(self) -> None:
        frames, self._refused = self._refused, []
        if frames:
            self._refused = frames[self._offer_all(frames) :]
            if not self._refused and self._carrier:
                self._poller.register(self._fd, self._readable)

    def _lost(self, error: OSError) -> None:
        """The device was deleted under us."""
        logger.error(
            "TAP device %s is gone (%s); the link is down until the server is restarted", self.name, error
        )
        self._poller.unregister(self._fd)
        self._set_carrier(False)

    def _transmit(self, buffers: Sequence[Buffer], offload: Offload | None, burst: Burst | None) -> int:
        if burst is not None:
            return self._transmit_burst(buffers, burst)
        if offload is None or not offload.checksum_start:
            return self._write([NO_OFFLOAD, *buffers])
        if offload.checksum_start > 0xFFFF or offload.checksum_offset > 0xFFFF:
            return self._transmit_frames(segment(buffers, offload))
        header = VNET_HEADER.pack(NEEDS_CSUM, 0, 0, 0, offload.checksum_start, offload.checksum_offset)
        return self._write([header, *buffers])

    def _transmit_burst(self, buffers: Sequence[Buffer], burst: Burst) -> int:
        headers, frames = merged_headers(burst), burst.wire_size.frames
        if headers is None:
            return self._transmit_frames(cut(burst, buffers))
        kind = burst.kind | (GSO_ECN if burst.has_cwr else 0) if frames > 1 else Segmentation.NONE
        size = burst.segment_size if frames > 1 else 0
        vnet = VNET_HEADER.pack(NEEDS_CSUM, kind, len(headers), size, burst.transport, 16)
        return self._write([vnet, headers, *skip_head(buffers, len(headers))]) and frames

    def _transmit_frames(self, frames: list[bytes]) -> int:
        return sum(self._write([NO_OFFLOAD, frame]) for frame in frames)

    def _write(self, pieces: list[Buffer]) -> int:
        """0, or 1 if the kernel did not take it: its queue is full, or the interface is down."""
        if len(pieces) > IOV_MAX:
            pieces = [b"".join(pieces)]
        try:
            os.writev(self._fd, pieces)
        except OSError:
            return 1
        return 0

    def close(self) -> None:
        """Let the TAP go: it disappears, unless it is a persistent one."""
        if self._fd >= 0:
            self._poller.unregister(self._fd)
            os.close(self._fd)
            self._fd = -1


def open_tap(name: str) -> int:
    """Attach to the TAP device `name`, made if it is not there. Returns a non-blocking descriptor."""
    _check_name(name)
    fd = _open_tun(name)
    try:
        _configure(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_name(name: str) -> None:
    if not name:
        raise BackendError("tap: which one? Give a name: tap:NAME")
    if len(os.fsencode(name)) > NAME_LIMIT:
        raise BackendError(
            f"tap:{name}: the name is too long; an interface name has at most {NAME_LIMIT} bytes"
        )
    if name in (".", "..") or any(c in "/%:" or c.isspace() or not c.isprintable() for c in name):
        raise BackendError(f"tap:{name!r}: not an interface name; use letters, digits, '-', '_' and '.'")


def _open_tun(name: str) -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    except PermissionError:
        hint = "run as root, or give the user access to it"
        raise BackendError(f"tap:{name}: no permission to open /dev/net/tun; {hint}") from None
    except OSError as error:
        hint = "load the module (modprobe tun), or pass the device into the container"
        raise BackendError(f"tap:{name}: no /dev/net/tun ({error.strerror}); {hint}") from None


def _configure(fd: int, name: str) -> None:
    existed = _exists(name)
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(os.fsencode(name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", VNET_HEADER.size))
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    except OSError as error:
        reason = ATTACH_ERRORS.get(error.errno or 0, f"{error.strerror}; choose another name").format(name)
        raise BackendError(f"tap:{name}: {reason}") from None
    with _route(name) as route:
        _bring_up(route, name, existed)


def _exists(name: str) -> bool:
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


@contextmanager
def _route(name: str) -> Iterator[IPRoute]:
    """A netlink socket, whose errors become ours."""
    try:
        with IPRoute() as route:
            yield route
    except (NetlinkError, OSError) as error:
        raise BackendError(
            f"tap:{name}: it cannot be brought up ({error}); {CREATE_HINT.format(name)}"
        ) from None


def _bring_up(route: IPRoute, name: str, existed: bool) -> None:
    """A TAP of our own is of no use while it is down; somebody else's is left to them."""
    index = socket.if_nametoindex(name)
    if not existed:
        route.link("set", index=index, state="up")
    elif route.get_links(index)[0].get("state") != "up":
        logger.warning("TAP device %s is down, so nothing passes; bring it up: ip link set %s up", name, name)
