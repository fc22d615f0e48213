# SPDX-License-Identifier: BSD-3-Clause
"""Transmit descriptors put together to packets, and what the wire is to do with each.

Source: Software Developer's Manual, 3.3.3 (legacy), 3.3.6 (context), 3.3.7 (data), 3.5 (segmentation).
"""

from dataclasses import dataclass, field

from vfio_user.device_models.checksums import complement, nonzero, ones_sum
from vfio_user.device_models.e1000 import descriptors as d
from vfio_user.device_models.e1000.descriptors import Context
from vfio_user.device_models.net import Offload, Segmentation
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.segmentation import skip_head, take_head

LONGEST_FRAME = 16288
"""Bytes of a frame that is not segmented (3.3.1)."""
LONGEST_BURST = 256 * 1024
"""Bytes of one that is; PAYLEN could say 1 MiB, but no IP stack makes more than 64 KiB."""
SEGMENT_COST = 512
"""What a segment of a burst counts for against the bytes of a batch: a guest that asks for segments of one
byte must not hold up everybody else."""


class Packet:
    """The descriptors up to one with EOP."""

    __slots__ = ("context", "css", "end", "lower", "options", "segments", "total", "upper")

    def __init__(self, context: Context, lower: int, upper: int) -> None:
        """`lower` and `upper` are words of the first descriptor."""
        self.context = context
        self.segments: list[tuple[int, int]] = []
        self.total = 0
        self.options = upper if lower & d.CMD_DEXT else 0
        self.css = upper >> 8 & 0xFF
        self.lower, self.upper = lower, upper
        """Words of the last descriptor; there the commands count."""
        self.end = 0
        """Descriptors from the head to behind the last."""

    @property
    def extended(self) -> bool:
        return bool(self.lower & d.CMD_DEXT)

    @property
    def segmented(self) -> bool:
        return self.extended and bool(self.lower & d.CMD_TSE)

    @property
    def inserts_fcs(self) -> bool:
        return bool(self.lower & d.CMD_IFCS)

    @property
    def tag(self) -> int | None:
        """The VLAN tag to be inserted."""
        return self.upper >> 16 if self.lower & d.CMD_VLE else None

    def prepare(
        self, pieces: list[Buffer], tag: int | None, vlan_type: int
    ) -> tuple[list[Buffer], Offload | None, int] | None:
        """Pieces, offload and bytes of the frame as the port wants it; None: malformed."""
        total = sum(map(len, pieces))
        if not 14 <= total <= (LONGEST_BURST if self.segmented else LONGEST_FRAME):
            return None
        if self.segmented:
            offload = self._segmentation(total)
            if offload is None:
                return None
        else:
            pieces, offload = self._insert_checksums(pieces, total)
        if tag is not None:
            pieces, offload = _insert_tag(pieces, offload, vlan_type << 16 | tag)
            total += 4
        return pieces, offload, total

    def _segmentation(self, total: int) -> Offload | None:
        context = self.context
        if not context.tcp or not context.segment_size or context.header_length >= total:
            return None
        return Offload(
            checksum_start=context.tcp_start,
            checksum_offset=max(context.tcp_offset - context.tcp_start, 0),
            segmentation=Segmentation.TCPV4 if context.ipv4 else Segmentation.TCPV6,
            header_length=context.header_length,
            segment_size=context.segment_size,
        )

    def _insert_checksums(self, pieces: list[Buffer], total: int) -> tuple[list[Buffer], Offload | None]:
        """The sums that the descriptors ask for: one to the end of the frame is left to the wire."""
        context = self.context
        if not self.extended:
            if self.lower & d.CMD_IC:
                return _insert(pieces, self.css, self.lower >> 16 & 0xFF, 0, total)
            return pieces, None
        if self.options & d.POPTS_IXSM:
            place = context.ip_start, context.ip_offset, context.ip_end or total - 1
            pieces, _ = _insert(pieces, *place, total)
        if self.options & d.POPTS_TXSM:
            return _insert(pieces, context.tcp_start, context.tcp_offset, context.tcp_end, total)
        return pieces, None


def _insert(
    pieces: list[Buffer], start: int, place: int, last: int, total: int
) -> tuple[list[Buffer], Offload | None]:
    """Sum the bytes `start` to `last` (0: to the end) into `place`: now, or by the wire where it can."""
    if start >= total or place + 2 > total:
        return pieces, None
    if not last and 14 <= start <= place:
        return pieces, Offload(start, place - start)
    end = min(last + 1, total) if last else total
    upto = max(end, place + 2)
    head = bytearray(take_head(pieces, upto))
    field_value = nonzero(complement(ones_sum(head[start:end])))
    head[place : place + 2] = field_value.to_bytes(2, "big")
    return [bytes(head), *skip_head(pieces, upto)], None


def _insert_tag(
    pieces: list[Buffer], offload: Offload | None, tag: int
) -> tuple[list[Buffer], Offload | None]:
    """Put type and tag (32 bits) behind the addresses; what `offload` says moves along."""
    pieces = [take_head(pieces, 12) + tag.to_bytes(4, "big"), *skip_head(pieces, 12)]
    if offload is not None:
        offload = Offload(
            checksum_start=offload.checksum_start + 4,
            checksum_offset=offload.checksum_offset,
            segmentation=offload.segmentation,
            header_length=offload.header_length + 4 if offload.header_length else 0,
            segment_size=offload.segment_size,
        )
    return pieces, offload


@dataclass(slots=True)
class Parsed:
    """Whole packets from the head on."""

    context: Context
    """After the last of `used`."""
    used: int = 0
    """Descriptors, up to the end of the last whole packet and with context descriptors behind it."""
    packets: list[Packet] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)
    """Of all packets, address and bytes."""
    reports: list[tuple[int, bool]] = field(default_factory=list)
    """Which descriptors want a report, and whether its interrupt may be delayed."""


def parse(ring: bytes, context: Context, most_bytes: int) -> Parsed:
    """The packets in the descriptors `ring`; it stops after the one that makes `most_bytes` full.

    Each costs about a microsecond, and a burst has twenty: hence one loop, without calls for the usual case.
    """
    parsed = Parsed(context)
    packet: Packet | None = None
    total = 0
    for step, (address, lower, upper) in enumerate(d.TRANSMIT.iter_unpack(ring)):
        if lower & d.CMD_RS:
            parsed.reports.append((step, bool(lower & d.CMD_IDE)))
        if lower & d.CMD_DEXT and not lower & d.TYPE:
            context = d.parse_context(ring[step * d.SIZE : (step + 1) * d.SIZE])
            if packet is None:
                parsed.context, parsed.used = context, step + 1
            continue
        if packet is None:
            packet = Packet(context, lower, upper)
        length = lower & (d.LENGTH_DATA if lower & d.CMD_DEXT else d.LENGTH_LEGACY)
        if length:
            packet.segments.append((address, length))
            packet.total += length
        if lower & d.CMD_EOP:
            packet.lower, packet.upper, packet.end = lower, upper, step + 1
            if packet.total > LONGEST_BURST:
                packet.segments.clear()  # not even read; `prepare` finds it too short
            parsed.packets.append(packet)
            parsed.segments += packet.segments
            parsed.context, parsed.used = context, step + 1
            total += packet.total
            if packet.segmented and packet.context.segment_size:
                total += packet.total // packet.context.segment_size * SEGMENT_COST
            packet = None
            if total >= most_bytes:
                break
    parsed.reports = [report for report in parsed.reports if report[0] < parsed.used]
    return parsed
