# SPDX-License-Identifier: BSD-3-Clause
"""The Internet checksum (RFC 1071), as sums that can be added before they are folded."""

from vfio_user.device_models.regions import Buffer


def ones_sum(data: Buffer) -> int:
    """The ones' complement sum of the 16-bit big-endian words of `data`; an odd end is padded with zero.

    0..65535, and 0 only if all words are zero.
    A sum of 16-bit words is the number's remainder by 65535 (2**16 is 1 there), and CPython divides a long
    number by a short one in C: 2 ns a byte, three times faster than `sum` over a cast view. Reading the
    number little-endian gives the sum with its bytes swapped (RFC 1071, 2.B) and pads an odd end for free.
    """
    number = int.from_bytes(data, "little")
    remainder = number % 65535 or (65535 if number else 0)
    return (remainder & 0xFF) << 8 | remainder >> 8


def complement(total: int) -> int:
    """The checksum field for `total`, any sum of `ones_sum` values and 16-bit words, 0..65535."""
    return 0xFFFF - (total % 65535 or 65535) if total else 0xFFFF


def checksum(data: Buffer) -> int:
    """The checksum field for `data`, whose own field holds zero (or the pseudo-header's sum)."""
    return complement(ones_sum(data))


def is_intact(data: Buffer, pseudo: int = 0) -> bool:
    """Whether `data`, its checksum field included, sums up right together with `pseudo`."""
    return complement(ones_sum(data) + pseudo) == 0


def pseudo_sum(addresses: Buffer, protocol: int, length: int) -> int:
    """The sum of the pseudo-header of TCP, UDP or ICMPv6 (RFC 9293, 3.1; RFC 8200, 8.1), not folded.

    `addresses`: source and destination one after the other; `length`: of the header and the payload.
    """
    return ones_sum(addresses) + protocol + length


def nonzero(field: int) -> int:
    """`field` in its representation that is not 0: in UDP a 0 would say "no checksum" (RFC 768)."""
    return field or 0xFFFF
