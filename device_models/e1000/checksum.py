# SPDX-License-Identifier: BSD-3-Clause
"""Checksums of received frames (Software Developer's Manual, 3.2.9, "Receive Packet Checksum Offloading")."""

import struct

from vfio_user.device_models.checksums import checksum, is_intact, pseudo_sum
from vfio_user.device_models.e1000.bits import Rxcsum
from vfio_user.device_models.e1000.descriptors import IPCS, IPE, IXSM, TCPCS, TCPE

_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_TCP, _UDP = 6, 17
_CHECKSUM_AT = {_TCP: 16, _UDP: 6}
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_LOOK = struct.Struct(">12xHB5xHxB")
"""What tells of a frame: the type, and of IPv4 the first byte, flags with fragment offset, and protocol."""
_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = 0x0800, 0x86DD
_NO_OPTIONS = 0x45
_WHOLE = (0x4000, 0)
"""Flags and fragment offset: may not be fragmented, or may and is not."""
_SHORTEST = 14 + 20 + 20  # bytes: Ethernet, IPv4, TCP
_V4_BITS = (0, IPCS, TCPCS, IPCS | TCPCS)  # by RXCSUM.IPOFL and TUOFL, its bits 8 and 9
_V6_WANTED = Rxcsum.TUOFL | Rxcsum.IPV6OFL


def packet_checksum(frame: bytes, start: int) -> int:
    """The packet checksum field: the one's complement of the sum from byte `start` on."""
    return checksum(frame[start:])


def vouched(frame: bytes, control: int) -> int:
    """Status bits, as RXCSUM (`control`) wants them, of a frame whose network vouches for it; 0: look at it.

    Vouched for is what comes in bulk and is told by a few bytes: TCP without a tag, over IPv4 without options
    and fragments, or over IPv6 without extensions.
    """
    if len(frame) < _SHORTEST:
        return 0
    kind, first, fragment, protocol = _LOOK.unpack_from(frame)
    if kind == _ETHERTYPE_IPV4:
        vouches = first == _NO_OPTIONS and protocol == _TCP and fragment in _WHOLE
        return _V4_BITS[control >> 8 & 3] if vouches else 0
    if kind == _ETHERTYPE_IPV6 and frame[20] == _TCP and control & _V6_WANTED == _V6_WANTED:
        return TCPCS
    return 0


def examine(frame: bytes, control: int, network: int) -> tuple[int, int]:
    """Status and error bits of a frame with its IP header at `network`, as RXCSUM (`control`) wants them."""
    kind = frame[network - 2 : network]
    if kind == _IPV4:
        return _examine_ipv4(frame, control, network)
    if kind == _IPV6 and control & Rxcsum.IPV6OFL and control & Rxcsum.TUOFL:
        end = network + _IPV6_HEADER + int.from_bytes(frame[network + 4 : network + 6], "big")
        start = network + _IPV6_HEADER
        if end <= len(frame):
            status, errors = _examine_transport(
                frame, frame[network + 6], frame[network + 8 : start], start, end
            )
            return status or IXSM, errors
    return IXSM, 0


def _examine_ipv4(frame: bytes, control: int, network: int) -> tuple[int, int]:
    header = 4 * (frame[network] & 15) if len(frame) > network else 0
    end = network + int.from_bytes(frame[network + 2 : network + 4], "big")
    if header < _IPV4_HEADER or not network + header <= end <= len(frame):
        return IXSM, 0
    status = errors = 0
    if control & Rxcsum.IPOFL:
        status, errors = IPCS, 0 if is_intact(frame[network : network + header]) else IPE
    fragment = frame[network + 6] & 0x3F or frame[network + 7]
    if control & Rxcsum.TUOFL and not fragment:
        addresses = frame[network + 12 : network + 20]
        more = _examine_transport(frame, frame[network + 9], addresses, network + header, end)
        status, errors = status | more[0], errors | more[1]
    return status or IXSM, errors


def _examine_transport(
    frame: bytes, protocol: int, addresses: bytes, start: int, end: int
) -> tuple[int, int]:
    """TCP or UDP from `start` to `end`; `addresses` are the pseudo-header's."""
    place = start + _CHECKSUM_AT.get(protocol, 0)
    if place == start or place + 2 > end:
        return 0, 0
    if protocol == _UDP and frame[place : place + 2] == b"\0\0":  # the sender made none
        return 0, 0
    intact = is_intact(frame[start:end], pseudo_sum(addresses, protocol, end - start))
    return TCPCS, 0 if intact else TCPE
