# SPDX-License-Identifier: BSD-3-Clause
"""Packets against scapy, an implementation that is not ours; and every damage is noticed."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether

from vfio_user.client.drivers.packets import (
    BadPacket,
    Station,
    arp_request,
    parse,
    ping,
    tcp_segmentation_header,
    udp,
)

ME = Station(bytes.fromhex("525400123456"), IPv4Address("10.0.2.15"))
PEER = Station(bytes.fromhex("026563686f00"), IPv4Address("10.0.2.2"))
ETHER = Ether(src="52:54:00:12:34:56", dst="02:65:63:68:6f:00")
ADDRESSES = IP(src="10.0.2.15", dst="10.0.2.2", flags="DF", id=1, ttl=64)
payloads = st.binary(min_size=0, max_size=1400)


def padded(packet: Ether) -> bytes:
    return bytes(packet).ljust(60, b"\0")


@settings(max_examples=30)
@given(payloads)
def test_ping_is_what_scapy_builds(data: bytes) -> None:
    frame = ping(ME, PEER, 7, 9, data)
    assert frame == padded(ETHER / ADDRESSES / ICMP(type=8, id=7, seq=9) / data)
    packet = parse(frame)
    assert (packet.kind, packet.operation, packet.identifier, packet.sequence) == ("icmp", 8, 7, 9)
    assert (packet.source, packet.destination, packet.payload) == (ME, PEER, data)


@settings(max_examples=30)
@given(payloads)
def test_udp_is_what_scapy_builds(data: bytes) -> None:
    frame = udp(ME, PEER, (1000, 7), data)
    assert frame == padded(ETHER / ADDRESSES / UDP(sport=1000, dport=7) / data)
    packet = parse(frame)
    assert (packet.kind, packet.identifier, packet.sequence, packet.payload) == ("udp", 1000, 7, data)


def test_arp() -> None:
    frame = arp_request(ME, PEER.ip)
    expected = Ether(src="52:54:00:12:34:56", dst="ff:ff:ff:ff:ff:ff") / ARP(
        op=1, hwsrc="52:54:00:12:34:56", psrc="10.0.2.15", pdst="10.0.2.2"
    )
    assert frame == padded(expected)
    packet = parse(frame)
    assert (packet.operation, packet.source, packet.destination.ip) == (1, ME, PEER.ip)


def test_the_header_before_segments() -> None:
    """Lengths and sums as 82540EM manual 3.5 wants them; filled in they make a packet."""
    header = tcp_segmentation_header(ME, PEER, (1, 2), 1000)
    shown = Ether(header)
    assert (shown[IP].len, shown[IP].chksum, shown[TCP].seq) == (0, 0, 1000)
    del shown[IP].len, shown[IP].chksum, shown[TCP].chksum
    packet = parse(bytes(shown / (b"data" * 5)))
    assert (packet.kind, packet.number, packet.payload) == ("tcp", 1000, b"data" * 5)


@pytest.mark.parametrize("place", [*range(14, 16), *range(16, 60)])
def test_every_damaged_byte_is_noticed(place: int) -> None:
    frame = bytearray(udp(ME, PEER, (1000, 7), b"payload of eighteen"))
    assert len(frame) > 60
    frame[place] ^= 0x40
    with pytest.raises(BadPacket):
        parse(bytes(frame))


@pytest.mark.parametrize("frame", [b"", bytes(59), bytes(60), b"\xff" * 60])
def test_no_packet_at_all(frame: bytes) -> None:
    with pytest.raises(BadPacket):
        parse(frame)
