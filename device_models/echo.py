# SPDX-License-Identifier: BSD-3-Clause
"""The backend `echo`: a network that answers by itself, without privileges.

Every address of its networks, except the one that asks, is at home: it answers ARP and neighbour
solicitations, ping over IPv4 and IPv6, and the UDP echo service (port 7, RFC 862). Frames with VLAN tags,
IP fragments and what has a wrong checksum get no answer.
"""

import struct
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from vfio_user.device_models.backends import Backend, Backlog
from vfio_user.device_models.checksums import checksum, complement, is_intact, ones_sum, pseudo_sum
from vfio_user.device_models.segmentation import ETHERNET_HEADER

Network = IPv4Network | IPv6Network

DEFAULT_NETWORKS: tuple[Network, ...] = tuple(map(ip_network, ("10.0.2.0/24", "fd00:2::/64", "fe80::/64")))
"""`ping 10.0.2.2` and `ping6 fd00:2::2` work for a guest with an address of the same network."""
DEFAULT_MAC = bytes.fromhex("026563686f00")
"""The station that answers for everybody."""
MINIMUM_FRAME = 60
"""Shorter replies are padded, as every Ethernet station does (IEEE 802.3, 64 bytes with FCS)."""
UDP_ECHO_PORT = 7
ARP_IPV4 = bytes.fromhex("0001080006040001")
"""Ethernet, IPv4, their address lengths, request (RFC 826)."""
ANY_V6 = bytes(16)


def _has_host(network: Network, address: IPv4Address | IPv6Address) -> bool:
    """Whether `address` belongs to a host of `network`; IPv4's first and last are the network's own."""
    if address.version != network.version or address not in network:
        return False
    own = (network.network_address, network.broadcast_address)
    return address.version == 6 or network.prefixlen >= 31 or address not in own


class Responder:
    """What the network answers to a frame; pure. `bad_checksums` counts frames that came with a wrong sum."""

    def __init__(
        self, networks: tuple[Network, ...] = DEFAULT_NETWORKS, address: bytes = DEFAULT_MAC
    ) -> None:
        self.networks = networks
        self.address = address
        self.bad_checksums = 0
        self._protocols: dict[bytes, Callable[[bytes], bytes | None]] = {
            b"\x08\x06": self._arp,
            b"\x08\x00": self._ipv4,
            b"\x86\xdd": self._ipv6,
        }

    def answer(self, frame: bytes) -> bytes | None:
        """The reply to a frame, complete, or None."""
        if len(frame) < ETHERNET_HEADER or not (frame[0] & 1 or frame[:6] == self.address):
            return None
        handle = self._protocols.get(frame[12:14])
        reply = handle(frame[14:]) if handle is not None else None
        if reply is None:
            return None
        return (frame[6:12] + self.address + frame[12:14] + reply).ljust(MINIMUM_FRAME, b"\0")

    def _is_home(self, packed: bytes) -> bool:
        """Whether a host with this address answers: in a network, and no group or broadcast address."""
        address = ip_address(packed)
        return not address.is_multicast and any(_has_host(network, address) for network in self.networks)

    def _intact(self, data: bytes, pseudo: int = 0) -> bool:
        intact = is_intact(data, pseudo)
        self.bad_checksums += not intact
        return intact

    def _arp(self, packet: bytes) -> bytes | None:
        """RFC 826. A probe or an announcement (RFC 5227) asks who else has the address: nobody."""
        if len(packet) < 28 or packet[:8] != ARP_IPV4:
            return None
        sender, target = packet[14:18], packet[24:28]
        if sender in (target, bytes(4)) or not self._is_home(target):
            return None
        return packet[:7] + b"\x02" + self.address + target + packet[8:18]

    def _ipv4(self, packet: bytes) -> bytes | None:
        """RFC 791. The reply has no options."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return None
        header, (length, fragment) = (packet[0] & 0xF) * 4, struct.unpack_from(">H2xH", packet, 2)
        if (
            not 20 <= header <= length <= len(packet)
            or fragment & 0x3FFF
            or not self._intact(packet[:header])
        ):
            return None
        source, destination = packet[12:16], packet[16:20]
        if source == destination or not self._intact(packet[:header]) or not self._is_home(destination):
            return None
        reply = self._reply_v4(packet[9], packet[header:length], source + destination)
        if reply is None:
            return None
        fixed = struct.pack(">BBH4sBBH", 0x45, packet[1], 20 + len(reply), packet[4:8], 64, packet[9], 0)
        total = ones_sum(fixed) + ones_sum(source + destination)
        return fixed[:10] + complement(total).to_bytes(2, "big") + destination + source + reply

    def _reply_v4(self, protocol: int, data: bytes, addresses: bytes) -> bytes | None:
        if protocol == 1:
            return self._icmp(data)
        return self._udp(data, addresses) if protocol == 17 else None

    def _icmp(self, data: bytes) -> bytes | None:
        """Echo request to echo reply (RFC 792)."""
        if len(data) < 8 or data[:2] != b"\x08\x00" or not self._intact(data):
            return None
        reply = bytes(4) + data[4:]
        return reply[:2] + checksum(reply).to_bytes(2, "big") + reply[4:]

    def _udp(self, data: bytes, addresses: bytes) -> bytes | None:
        """RFC 862. With the ports and the addresses changed over the sum is what it was."""
        if len(data) < 8:
            return None
        source, port, length, field = struct.unpack_from(">HHHH", data)
        if port != UDP_ECHO_PORT or source == UDP_ECHO_PORT or not 8 <= length <= len(data):
            return None
        may_be_unsummed = len(addresses) == 8  # RFC 768; not in IPv6 (RFC 8200, 8.1)
        if field or not may_be_unsummed:
            pseudo = pseudo_sum(addresses, 17, length)
            if not field or not self._intact(data[:length], pseudo):
                return None
        return data[2:4] + data[0:2] + data[4:length]

    def _ipv6(self, packet: bytes) -> bytes | None:
        """RFC 8200, without extension headers."""
        if len(packet) < 40 or packet[0] >> 4 != 6:
            return None
        length, following, hops = struct.unpack_from(">HBB", packet, 4)
        data, addresses = packet[40 : 40 + length], packet[8:40]
        if len(data) < length:
            return None
        reply, home = self._reply_v6(following, data, addresses, hops)
        if reply is None or home == packet[8:24] or not self._is_home(home):
            return None
        fixed = packet[:4] + struct.pack(">HBB", len(reply), following, 255)
        return fixed + home + packet[8:24] + reply

    def _reply_v6(
        self, protocol: int, data: bytes, addresses: bytes, hops: int
    ) -> tuple[bytes | None, bytes]:
        """The reply and the address that gives it."""
        if protocol == 58:
            return self._icmpv6(data, addresses, hops)
        return (self._udp(data, addresses) if protocol == 17 else None), addresses[16:]

    def _icmpv6(self, data: bytes, addresses: bytes, hops: int) -> tuple[bytes | None, bytes]:
        nothing = (None, b"")
        if len(data) < 8 or data[1] or not self._intact(data, pseudo_sum(addresses, 58, len(data))):
            return nothing
        if data[0] == 128:
            home, reply = addresses[16:], bytes([129, 0, 0, 0]) + data[4:]
        elif data[0] == 135 and len(data) >= 24 and hops == 255 and addresses[:16] != ANY_V6:
            # Neighbour advertisement (RFC 4861, 4.4): solicited, override; the link-layer address. One that
            # comes from the unspecified address looks for duplicates (RFC 4862, 5.4): there are none.
            home = data[8:24]
            reply = bytes([136, 0, 0, 0, 0x60, 0, 0, 0]) + home + b"\x02\x01" + self.address
        else:
            return nothing
        total = ones_sum(reply) + pseudo_sum(home + addresses[:16], 58, len(reply))
        return reply[:2] + complement(total).to_bytes(2, "big") + reply[4:], home


class EchoBackend(Backend):
    """`Responder` as a backend. Replies come while `send` runs, and wait while the device is not ready."""

    def __init__(
        self, networks: tuple[Network, ...] = DEFAULT_NETWORKS, address: bytes = DEFAULT_MAC
    ) -> None:
        super().__init__()
        self.responder = Responder(networks, address)
        self._backlog = Backlog(self._offer)

    def _transmit_frames(self, frames: list[bytes]) -> int:
        for frame in frames:
            reply = self.responder.answer(frame)
            if reply is not None and not self._backlog.put(reply):
                self.counts.received_dropped += 1
        return 0

    def ready(self) -> None:
        self._backlog.flush()

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "bad_checksums": self.responder.bad_checksums}
