# SPDX-License-Identifier: BSD-3-Clause
"""What `Offload` asks for, done in software: checksums filled in, a TCP burst cut into its segments.

A frame or burst that cannot be what its `Offload` says is malformed: it has no frames on the wire, and
nothing here raises. Guest memory may change at any time: what is decided upon is copied before.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vfio_user.device_models.checksums import complement, nonzero, ones_sum, pseudo_sum
from vfio_user.device_models.net import Offload, Segmentation, WireSize
from vfio_user.device_models.regions import Buffer

ETHERNET_HEADER = 14
"""A frame that is shorter than this is malformed."""
MAX_SEGMENTS = 2048
"""Segments of one burst: 64 KiB by the smallest segment size that Linux sends (48). More is malformed."""

VLAN_TYPES = (b"\x81\x00", b"\x88\xa8")
ETHERTYPES = {Segmentation.TCPV4: b"\x08\x00", Segmentation.TCPV6: b"\x86\xdd"}
TCP = 6
TCP_MAX_HEADER = 60
TCP_CHECKSUM_OFFSET = 16
IPV4_HEADER, IPV6_HEADER = 20, 40
IPV6_SKIPPED_HEADERS = (0, 43, 60)
"""Hop-by-hop options, routing, destination options: what may stand before TCP (RFC 8200, 4.1)."""
FIN, PSH, CWR = 0x01, 0x08, 0x80


NOTHING = WireSize(0, 0)
"""The wire size of what is malformed."""


@dataclass(frozen=True, slots=True)
class Burst:
    """A TCP burst, understood: a copy of its headers and where they begin, offsets in bytes."""

    kind: Segmentation
    network: int
    """Of the IP header."""
    transport: int
    """Of the TCP header."""
    headers: bytes
    """Ethernet, VLAN tags, IP with its extensions, TCP with its options."""
    payload_length: int
    segment_size: int

    @property
    def wire_size(self) -> WireSize:
        """A burst without payload is one frame."""
        frames = -(-self.payload_length // self.segment_size) or 1
        return WireSize(frames, self.payload_length + frames * len(self.headers))

    @property
    def has_cwr(self) -> bool:
        """Whether the congestion window was reduced, which the first segment alone says (RFC 3168, 6.1.2)."""
        return bool(self.headers[self.transport + 13] & CWR)


def total_length(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))


def take_head(buffers: Sequence[Buffer], length: int) -> bytes:
    """A copy of the first `length` bytes, or of all there is."""
    if buffers and len(buffers[0]) >= length:
        return bytes(buffers[0][:length])
    head = bytearray()
    for piece in buffers:
        head += piece[: length - len(head)]
        if len(head) == length:
            break
    return bytes(head)


def skip_head(buffers: Sequence[Buffer], length: int) -> list[Buffer]:
    """Views of what follows the first `length` bytes."""
    if buffers and len(buffers[0]) >= length:  # as drivers do it: the headers come in one piece
        return [memoryview(buffers[0])[length:], *buffers[1:]]
    rest: list[Buffer] = []
    for piece in buffers:
        if length < len(piece):
            rest.append(memoryview(piece)[length:])
        length = max(0, length - len(piece))
    return rest


def _network_offset(head: bytes, ethertype: bytes) -> int | None:
    """Where the IP header begins, behind at most two VLAN tags."""
    for offset in (12, 16, 20):
        found = head[offset : offset + 2]
        if found == ethertype:
            return offset + 2
        if found not in VLAN_TYPES:
            return None
    return None


def _is_tcpv4(head: bytes, network: int, transport: int) -> bool:
    header = (head[network] & 0xF) * 4
    if head[network] >> 4 != 4 or header < IPV4_HEADER or network + header != transport:
        return False
    return head[network + 9] == TCP


def _is_tcpv6(head: bytes, network: int, transport: int) -> bool:
    if head[network] >> 4 != 6:
        return False
    following, offset = head[network + 6], network + IPV6_HEADER
    while offset < transport and following in IPV6_SKIPPED_HEADERS:
        following, offset = head[offset], offset + 8 * (head[offset + 1] + 1)
    return offset == transport and following == TCP


TCP_CHECKS = {Segmentation.TCPV4: (_is_tcpv4, IPV4_HEADER), Segmentation.TCPV6: (_is_tcpv6, IPV6_HEADER)}


def parse_burst(buffers: Sequence[Buffer], offload: Offload) -> Burst | None:
    """Understand a frame whose `offload` has a segmentation; None: malformed.

    The TCP header itself says where the payload begins, as virtio wants it (`hdr_len` is a hint there).
    """
    total, transport = total_length(buffers), offload.checksum_start
    head = take_head(buffers, transport + TCP_MAX_HEADER)
    network = _network_offset(head, ETHERTYPES[offload.segmentation])
    is_tcp, smallest = TCP_CHECKS[offload.segmentation]
    if network is None or not network + smallest <= transport <= len(head) - 20:
        return None
    if offload.checksum_offset != TCP_CHECKSUM_OFFSET or not is_tcp(head, network, transport):
        return None
    return _checked(offload, network, head, total)


def _checked(offload: Offload, network: int, head: bytes, total: int) -> Burst | None:
    """The burst, if the sizes are possible: every segment fits in an IP packet, and they are not too many."""
    transport, size = offload.checksum_start, offload.segment_size
    length = transport + (head[transport + 12] >> 4) * 4
    payload = total - length
    if not transport + 20 <= length <= len(head) or size <= 0 or payload > size * MAX_SEGMENTS:
        return None
    if length - network + min(size, payload) > 0xFFFF:
        return None
    return Burst(offload.segmentation, network, transport, head[:length], payload, size)


def _is_plain(offload: Offload | None, total: int) -> bool | None:
    """Whether the frame goes out as it is (True) or with one sum filled in (False); None: malformed."""
    if offload is None or not (offload.checksum_start or offload.checksum_offset):
        return True if total >= ETHERNET_HEADER else None
    end = offload.checksum_start + offload.checksum_offset + 2
    return False if offload.checksum_start >= ETHERNET_HEADER and end <= total else None


def wire_size(buffers: Sequence[Buffer], offload: Offload | None = None) -> WireSize:
    """What the frame or burst is on the wire; `NOTHING` if it is malformed, and no backend sends it.

    A NIC's statistics that use this equal the `sent_frames` and `sent_bytes` of its backend.
    """
    if offload is not None and offload.segmentation:
        burst = parse_burst(buffers, offload)
        return NOTHING if burst is None else burst.wire_size
    total = total_length(buffers)
    return NOTHING if _is_plain(offload, total) is None else WireSize(1, total)


def segment(buffers: Sequence[Buffer], offload: Offload | None = None) -> list[bytes]:
    """The frames on the wire, complete with their sums; none if it is malformed."""
    if offload is not None and offload.segmentation:
        burst = parse_burst(buffers, offload)
        return [] if burst is None else cut(burst, buffers)
    frame = b"".join(buffers)
    plain = _is_plain(offload, len(frame))
    if plain is None or plain or offload is None:
        return [frame] if plain else []
    return [_with_checksum(frame, offload.checksum_start, offload.checksum_offset)]


def _with_checksum(frame: bytes, start: int, offset: int) -> bytes:
    changed = bytearray(frame)
    field = nonzero(complement(ones_sum(memoryview(frame)[start:])))
    struct.pack_into(">H", changed, start + offset, field)
    return bytes(changed)


def cut(burst: Burst, buffers: Sequence[Buffer]) -> list[bytes]:
    """The segments of a burst, as `buffers` are now."""
    payload = memoryview(b"".join(skip_head(buffers, len(burst.headers))))[: burst.payload_length]
    borders = [*range(0, burst.payload_length, burst.segment_size), burst.payload_length]
    parts = [payload[begin:end] for begin, end in pairwise(borders)] or [payload]
    headers = _Headers(burst)
    last = len(parts) - 1
    return [b"".join((headers.make(i, part, i == last), part)) for i, part in enumerate(parts)]


class _Headers:
    """Makes the headers of each segment: what is the same in all of them is summed once."""

    def __init__(self, burst: Burst) -> None:
        self.burst = burst
        self.header = bytearray(burst.headers)
        network, transport = burst.network, burst.transport
        self.sequence: int = struct.unpack_from(">I", burst.headers, transport + 4)[0]
        self.flags = burst.headers[transport + 13]
        self.is_v4 = burst.kind == Segmentation.TCPV4
        self.identification: int = struct.unpack_from(">H", burst.headers, network + 4)[0]
        self._clear()
        self.ip_sum = ones_sum(self.header[network:transport])
        addresses = self.header[network + 12 : network + 20] if self.is_v4 else self._v6_addresses()
        self.tcp_sum = ones_sum(self.header[transport:]) + pseudo_sum(addresses, TCP, 0)

    def _v6_addresses(self) -> bytearray:
        return self.header[self.burst.network + 8 : self.burst.network + 40]

    def _clear(self) -> None:
        """Zero what differs from segment to segment, and the sums."""
        network, transport = self.burst.network, self.burst.transport
        struct.pack_into(">I", self.header, transport + 4, 0)
        self.header[transport + 13] = 0
        struct.pack_into(">H", self.header, transport + TCP_CHECKSUM_OFFSET, 0)
        if self.is_v4:
            struct.pack_into(">HH", self.header, network + 2, 0, 0)
            struct.pack_into(">H", self.header, network + 10, 0)

    def make(self, index: int, payload: memoryview, last: bool) -> bytearray:
        """The headers of segment number `index`. The next call overwrites them."""
        burst, header = self.burst, self.header
        length = len(header) - burst.transport + len(payload)
        self._write_ip(index, len(header) - burst.network + len(payload))
        sequence = (self.sequence + index * burst.segment_size) & 0xFFFFFFFF
        flags = self.flags & ~(CWR if index else 0) & ~(0 if last else FIN | PSH)
        struct.pack_into(">I", header, burst.transport + 4, sequence)
        header[burst.transport + 13] = flags
        total = self.tcp_sum + length + (sequence >> 16) + (sequence & 0xFFFF) + flags + ones_sum(payload)
        struct.pack_into(">H", header, burst.transport + TCP_CHECKSUM_OFFSET, complement(total))
        return header

    def _write_ip(self, index: int, length: int) -> None:
        network = self.burst.network
        if not self.is_v4:
            struct.pack_into(">H", self.header, network + 4, length - IPV6_HEADER)
            return
        identification = (self.identification + index) & 0xFFFF
        struct.pack_into(">HH", self.header, network + 2, length, identification)
        struct.pack_into(">H", self.header, network + 10, complement(self.ip_sum + length + identification))


def merged_headers(burst: Burst) -> bytes | None:
    """Headers for the burst in one piece, for a peer that cuts it itself (a TAP with vnet header).

    IP says the whole length, and TCP's sum is that of the pseudo-header with the whole length. None: IP
    cannot say it, the burst has to be cut here.
    """
    header = bytearray(burst.headers)
    network, transport = burst.network, burst.transport
    length = len(header) - network + burst.payload_length
    is_v4 = burst.kind == Segmentation.TCPV4
    if length - (0 if is_v4 else IPV6_HEADER) > 0xFFFF:
        return None
    if is_v4:
        struct.pack_into(">H", header, network + 2, length)
        struct.pack_into(">H", header, network + 10, 0)
        struct.pack_into(">H", header, network + 10, complement(ones_sum(header[network:transport])))
        addresses = header[network + 12 : network + 20]
    else:
        struct.pack_into(">H", header, network + 4, length - IPV6_HEADER)
        addresses = header[network + 8 : network + 40]
    pseudo = pseudo_sum(addresses, TCP, length - (transport - network))
    struct.pack_into(">H", header, transport + TCP_CHECKSUM_OFFSET, 0xFFFF - complement(pseudo))
    return bytes(header)
