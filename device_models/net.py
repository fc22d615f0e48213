# SPDX-License-Identifier: BSD-3-Clause
"""The packet port: how a NIC model and a network backend know each other.

A backend is made first, the device gets it as `port` and attaches itself as the receiver. Both sides are
synchronous. A frame is an Ethernet frame from the destination address on, without the FCS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from vfio_user.device_models.device import Device
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
    already; both 0: nothing to sum. With `segmentation` (then `checksum_start` is where the TCP header
    begins), the headers are repeated before each `segment_size` bytes of payload; the lengths, the IPv4
    identification and all sums are made anew, whatever stood there. `header_length` is a hint: the TCP
    header itself says where the payload begins.
    """

    checksum_start: int = 0
    checksum_offset: int = 0
    segmentation: Segmentation = Segmentation.NONE
    header_length: int = 0
    segment_size: int = 0


class WireSize(NamedTuple):
    """Frames on the wire and their bytes, without FCS, preamble and padding; a NIC adds 4 a frame for FCS."""

    frames: int
    bytes: int


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

    def send(self, buffers: Sequence[Buffer], offload: Offload | None = None) -> WireSize:
        """Send one frame or burst, given in pieces that are not kept after the call. Never waits or raises.

        Gives what it is on the wire, for the statistics of the device: `WireSize(0, 0)` if it is malformed
        (`segmentation`), else that even if nobody takes it: what the wire cannot take now is dropped and
        counted, an Ethernet has no more to promise. May call `Receiver.receive` before it returns.
        """

    def ready(self) -> None:
        """The device can take frames again, after a `receive` that was answered with False."""

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out; without it all frames, both ways, are dropped and counted."""

    def counters(self) -> Mapping[str, int]:
        """Frames and bytes on the wire, by name; "sent" is by the device, "received" by the device.

        `sent_frames`, `sent_bytes`: the sum of what `send` gave. `sent_dropped`: those frames of them that
        nobody took. `sent_malformed`: frames or bursts that never came to the wire. `received_frames`,
        `received_bytes`: `Receiver.receive` gave True. `received_dropped`: never offered, or never taken.
        Bytes are without FCS.
        """

    def close(self) -> None:
        """Release everything that the backend holds; harmless the second time."""


class Cancellable(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """Never make it; harmless afterwards."""


CallLater = Callable[[int, Callable[[], None]], Cancellable]
"""Call once after so many nanoseconds; of the wire's time, which goes on while the device is stopped."""


class NetDevice(Device):
    """A device model with a packet port; a NIC inherits from this and from `PciDevice`."""

    port: NetBackend

    def station_address(self) -> bytes | None:
        """The address under which it receives at the moment, 6 bytes; None: none, or it cannot be told."""
        return None

    def announce(self) -> bool:
        """Tell the network where this station is now, once; False: it has no address. For a running device.

        Switches learn from the source address of any frame; a reverse ARP request asks nobody for anything.
        """
        address = self.station_address()
        if address is None:
            return False
        self.port.send([reverse_arp_request(address)])
        return True


def reverse_arp_request(address: bytes) -> bytes:
    """RFC 903: a broadcast by which a station asks for its own protocol address; 60 bytes."""
    ethernet = b"\xff" * 6 + address + b"\x80\x35"
    request = bytes.fromhex("0001 0800 06 04 0003")  # Ethernet, IPv4, lengths of addresses, request reverse
    return (ethernet + request + (address + bytes(4)) * 2).ljust(60, b"\0")
