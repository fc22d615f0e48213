# SPDX-License-Identifier: BSD-3-Clause
"""Checksums and TCP segmentation in software, against scapy's own sums and a scapy-built reference."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum as scapy_checksum

from vfio_user.device_models.checksums import checksum, complement, is_intact, ones_sum
from vfio_user.device_models.net import Offload, Segmentation, WireSize
from vfio_user.device_models.segmentation import (
    MAX_SEGMENTS,
    NOTHING,
    Burst,
    cut,
    merged_headers,
    parse_burst,
    segment,
    skip_head,
    take_head,
    wire_size,
)

ETHER = Ether(dst="52:54:00:12:34:56", src="02:00:00:00:00:01")
LINKS = [ETHER, ETHER / Dot1Q(vlan=5), ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=5)]
NETWORKS = {
    "v4": IP(src="10.0.2.15", dst="10.0.2.2", id=0xFFFE),
    "v4 options": IP(src="10.0.2.15", dst="192.0.2.1", id=7, options=[IPOption_NOP()] * 4),
    "v6": IPv6(src="fd00::15", dst="fd00::2"),
    "v6 options": IPv6(src="fd00::15", dst="fd00::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(),
}
TIMESTAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]


def build(link: Packet, network: str, flags: str, options: Sequence[object], payload: bytes) -> bytes:
    tcp = TCP(sport=1234, dport=80, seq=0xFFFFFF00, ack=5, flags=flags, options=options)
    return bytes(link / NETWORKS[network] / tcp / Raw(payload))


def offload_of(frame: bytes, size: int) -> Offload:
    packet = Ether(frame)
    below = len(packet) - len(packet[TCP])
    kind = Segmentation.TCPV4 if IP in packet else Segmentation.TCPV6
    return Offload(below, 16, kind, below + 4 * packet[TCP].dataofs, size)


def spoil(frame: bytes, offload: Offload) -> bytes:
    """Overwrite what the device need not fill in: the TCP sum and IPv4's length and sum."""
    spoiled = bytearray(frame)
    at = offload.checksum_start
    spoiled[at + 16 : at + 18] = b"\xa5\x5a"
    if offload.segmentation == Segmentation.TCPV4:
        network = len(frame) - len(Ether(frame)[IP])
        spoiled[network + 2 : network + 4] = spoiled[network + 10 : network + 12] = bytes(2)
    return bytes(spoiled)


def expected_segments(frame: bytes, size: int) -> list[bytes]:
    """What scapy makes of each piece when it has to fill in lengths and sums itself."""
    payload = bytes(Ether(frame)[TCP].payload)
    starts = list(range(0, len(payload), size)) or [0]
    return [expected_segment(frame, start, payload[start : start + size], size, start == starts[-1])
            for start in starts]  # fmt: skip


def expected_segment(frame: bytes, start: int, payload: bytes, size: int, last: bool) -> bytes:
    packet = Ether(frame)
    tcp = packet[TCP]
    tcp.seq = (tcp.seq + start) & 0xFFFFFFFF
    tcp.flags = "".join(
        flag for flag in str(tcp.flags) if (last or flag not in "FP") and not (start and flag == "C")
    )
    tcp.remove_payload()
    tcp.add_payload(payload)
    del tcp.chksum
    if IP in packet:
        packet[IP].id = (packet[IP].id + start // size) & 0xFFFF
        del packet[IP].len, packet[IP].chksum
    else:
        del packet[IPv6].plen
    return bytes(packet)


def pieces_of(frame: bytes, borders: Sequence[int]) -> list[memoryview]:
    marks = [0, *sorted(min(border, len(frame)) for border in borders), len(frame)]
    return [memoryview(frame)[a:b] for a, b in pairwise(marks)]


@given(st.binary(max_size=200))
def test_checksum_is_scapys(data: bytes) -> None:
    assert checksum(data) == scapy_checksum(data)


@given(st.binary(min_size=2, max_size=99))
def test_a_frame_with_its_sum_is_intact_and_one_bit_breaks_it(data: bytes) -> None:
    summed = bytearray(data)
    summed[0:2] = bytes(2)
    summed[0:2] = checksum(summed).to_bytes(2, "big")
    assert is_intact(summed)
    summed[-1] ^= 1
    assert not is_intact(summed)


def test_sums_add_up_over_even_parts() -> None:
    data = os.urandom(64) + b"odd"
    assert complement(ones_sum(data[:40]) + ones_sum(data[40:])) == checksum(data)
    assert checksum(b"\xff\xff") == 0
    assert checksum(bytes(6)) == 0xFFFF


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("link", range(len(LINKS)))
@pytest.mark.parametrize("size", [536, 1447, 1448, 8948])
def test_segments_are_what_scapy_builds(link: int, network: str, size: int) -> None:
    payload = bytes(i * 7 & 0xFF for i in range(12_345))
    frame = build(LINKS[link], network, "FPACUE", TIMESTAMPS, payload)
    offload = offload_of(frame, size)
    segments = segment([spoil(frame, offload)], offload)
    assert segments == expected_segments(frame, size)
    assert wire_size([frame], offload) == (len(segments), sum(map(len, segments)))


@given(st.data())
def test_any_burst_in_any_pieces(data: st.DataObject) -> None:
    payload = data.draw(st.binary(max_size=300))
    flags = data.draw(st.sampled_from(["A", "PA", "FA", "FPAC", "ACE", "SA"]))
    network = data.draw(st.sampled_from(sorted(NETWORKS)))
    frame = build(data.draw(st.sampled_from(LINKS)), network, flags, [], payload)
    offload = offload_of(frame, data.draw(st.integers(1, 320)))
    pieces = pieces_of(spoil(frame, offload), data.draw(st.lists(st.integers(0, 400), max_size=5)))
    segments = segment(pieces, offload)
    assert segments == expected_segments(frame, offload.segment_size)
    assert wire_size(pieces, offload) == (len(segments), sum(map(len, segments)))


@pytest.mark.parametrize("network", NETWORKS)
def test_merged_headers_are_whole_and_hold_the_pseudo_sum(network: str) -> None:
    frame = build(ETHER, network, "PA", TIMESTAMPS, b"x" * 5001)
    offload = offload_of(frame, 1000)
    burst = parse_burst([spoil(frame, offload)], offload)
    assert isinstance(burst, Burst)
    headers = merged_headers(burst)
    assert headers is not None
    assert segment([headers, b"x" * 5001], replace(offload, segmentation=Segmentation.NONE)) == [frame]


def test_a_burst_longer_than_ip_can_say_is_cut_only() -> None:
    frame = build(ETHER, "v4", "PA", [], b"x" * 60_000)
    offload = offload_of(frame, 1460)
    buffers = [frame, b"y" * 6_000]
    burst = parse_burst(buffers, offload)
    assert burst is not None
    assert merged_headers(burst) is None
    assert b"".join(s[54:] for s in cut(burst, buffers)) == b"x" * 60_000 + b"y" * 6_000


def test_congestion_flag_is_seen() -> None:
    for flags, has_cwr in (("PA", False), ("PAC", True)):
        frame = build(ETHER, "v4", flags, [], b"x" * 100)
        burst = parse_burst([frame], offload_of(frame, 10))
        assert burst is not None
        assert burst.has_cwr == has_cwr


@pytest.mark.parametrize("layer", [UDP(sport=1, dport=2), TCP(sport=1, dport=2)])
@given(payload=st.binary(max_size=40))
def test_one_checksum_is_filled_in(layer: Packet, payload: bytes) -> None:
    whole = bytes(ETHER / NETWORKS["v4"] / layer / Raw(payload))
    offset = 6 if layer.name == "UDP" else 16
    frame = bytearray(whole)
    pseudo = bytes([10, 0, 2, 15, 10, 0, 2, 2, 0, 17 if offset == 6 else 6]) + (len(whole) - 34).to_bytes(
        2, "big"
    )
    frame[34 + offset : 36 + offset] = ones_sum(pseudo).to_bytes(2, "big")
    filled = segment([frame[:20], frame[20:]], Offload(34, offset))
    expected = int.from_bytes(whole[34 + offset : 36 + offset], "big") or 0xFFFF
    assert filled == [whole[: 34 + offset] + expected.to_bytes(2, "big") + whole[36 + offset :]]


def test_a_plain_frame_is_joined() -> None:
    frame = bytes(ETHER / NETWORKS["v4"] / ICMP())
    assert segment([frame[:3], memoryview(frame)[3:]]) == [frame]
    assert wire_size([frame[:3], frame[3:]]) == WireSize(1, len(frame))
    assert segment([frame], Offload()) == [frame]


GOOD = build(ETHER, "v4", "A", [], b"x" * 3000)
GOOD_OFFLOAD = offload_of(GOOD, 1460)
V6 = build(ETHER, "v6 options", "A", [], b"x" * 3000)


def changed(frame: bytes, offset: int, value: int) -> bytes:
    return frame[:offset] + bytes([value]) + frame[offset + 1 :]


@pytest.mark.parametrize(
    ("frame", "offload"),
    [
        (b"", None),
        (GOOD[:13], None),
        (GOOD, Offload(len(GOOD) - 17, 16)),
        (GOOD, Offload(2, 16)),
        (GOOD, replace(GOOD_OFFLOAD, segment_size=0)),
        (GOOD, replace(GOOD_OFFLOAD, segment_size=1)),
        (GOOD, replace(GOOD_OFFLOAD, checksum_start=38)),
        (GOOD, replace(GOOD_OFFLOAD, checksum_start=0)),
        (GOOD, replace(GOOD_OFFLOAD, checksum_start=0xFFFF)),
        (GOOD, replace(GOOD_OFFLOAD, checksum_offset=6)),
        (GOOD, replace(GOOD_OFFLOAD, segmentation=Segmentation.TCPV6)),
        (GOOD[:53], GOOD_OFFLOAD),
        (changed(GOOD, 14, 0x65), GOOD_OFFLOAD),
        (changed(GOOD, 14, 0x44), GOOD_OFFLOAD),
        (changed(GOOD, 23, 17), GOOD_OFFLOAD),
        (changed(GOOD, 46, 0x40), GOOD_OFFLOAD),
        (changed(GOOD[:56], 46, 0xF0), GOOD_OFFLOAD),
        (GOOD[:12] + b"\x81\x00\x00\x05" * 3 + GOOD[12:], replace(GOOD_OFFLOAD, checksum_start=46)),
        (changed(V6, 14, 0x45), offload_of(V6, 1000)),
        (changed(V6, 20, 44), offload_of(V6, 1000)),
        (changed(V6, 55, 5), offload_of(V6, 1000)),
        (GOOD + bytes(70_000), replace(GOOD_OFFLOAD, segment_size=65_500)),
        (GOOD + bytes(MAX_SEGMENTS * 2), replace(GOOD_OFFLOAD, segment_size=2)),
    ],
)
def test_malformed_has_no_frames(frame: bytes, offload: Offload | None) -> None:
    assert segment([frame], offload) == []
    assert wire_size([frame], offload) == NOTHING


@given(
    st.binary(max_size=120),
    st.builds(
        Offload,
        st.integers(0, 140),
        st.sampled_from([0, 6, 16, 1000]),
        st.sampled_from(Segmentation),
        st.integers(0, 140),
        st.integers(0, 2000),
    ),
    st.sampled_from([b"", GOOD[:14], GOOD[:34], V6[:14], V6[:54], V6[:70]]),
)
def test_no_input_raises_and_the_size_is_right(tail: bytes, offload: Offload, head: bytes) -> None:
    segments = segment([head, tail], offload)
    assert wire_size([head, tail], offload) == (len(segments), sum(map(len, segments)))


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 40))
def test_head_and_rest_make_the_whole(pieces: list[bytes], length: int) -> None:
    whole = b"".join(pieces)
    assert take_head(pieces, length) == whole[:length]
    assert b"".join(skip_head(pieces, length)) == whole[length:]
