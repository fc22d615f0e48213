# SPDX-License-Identifier: BSD-3-Clause
"""The packet port: how a NIC model and a network backend know each other.

A backend is made first, the device gets it as `port` and attaches itself as the receiver. Both sides are
synchronous. A frame is an Ethernet frame from the destination address on, without the FCS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from vfio_user.device_models.device import Device, Host
from vfio_user.device_models.regions import Buffer


class Segmentation(IntEnum):
    """What the segments of a large frame are (virtio 1.2, 5.1.6, `gso_type`)."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4


@dataclass(frozen=True, slots=True)
class Offload:
    """Work on a frame that the device leaves to the backend, in the terms of virtio's net header.

    `checksum_start` and `checksum_offset`: sum from `checksum_start` to the end, stored at
    `checksum_start + checksum_offset`, where the pseudo-header's sum (with the whole length) stands
    already; both 0: nothing to sum. With `segmentation`, the headers of `header_length` bytes are repeated
    before each `segment_size` bytes of payload; lengths, IPv4 identification and sums are adapted.
    """

    checksum_start: int = 0
    checksum_offset: int = 0
    segmentation: Segmentation = Segmentation.NONE
    header_length: int = 0
    segment_size: int = 0


class Receiver(Protocol):
    """The device's side of the port."""

    def receive(self, frame: bytes) -> bool:
        """Take a frame from the wire. False: not taken; offer it again after `NetBackend.ready`."""

    def link_changed(self, up: bool) -> None:
        """The backend's cable was plugged in or pulled out."""


class NetBackend(Protocol):
    """The wire's side of the port."""

    link_up: bool

    def attach(self, receiver: Receiver) -> None:
        """Deliver frames to `receiver` from now on."""

    def send(self, buffers: Sequence[Buffer], offload: Offload | None = None) -> None:
        """Send one frame, given in pieces that are not kept after the call. Never waits, never raises.

        What the wire cannot take now is dropped and counted: an Ethernet has no more to promise.
        """

    def ready(self) -> None:
        """The device can take frames again, after a `receive` that was answered with False."""

    def counters(self) -> Mapping[str, int]:
        """Frames and bytes sent, received and dropped."""


class NetDevice(Device):
    """A device model with a packet port; a NIC inherits from this and from `PciDevice`."""

    port: NetBackend


NetDeviceFactory = Callable[[Host, NetBackend], NetDevice]
