# SPDX-License-Identifier: BSD-3-Clause
"""Packets of a guest: built, and taken apart with everything in them checked.

Ethernet without FCS, ARP (RFC 826), IPv4 (RFC 791), ICMP echo (RFC 792), UDP (RFC 768), TCP (RFC 9293).
"""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Literal

BROADCAST = b"\xff" * 6
MINIMUM_FRAME, FCS_SIZE = 60, 4
ETHERTYPE_IPV4, ETHERTYPE_ARP = 0x0800, 0x0806
ICMP, TCP, UDP = 1, 6, 17
ETHERNET_SIZE, IPV4_SIZE, ICMP_SIZE, UDP_SIZE, TCP_SIZE = 14, 20, 8, 8, 20
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_ECHO = struct.Struct("!BBHHH")
_UDP = struct.Struct("!HHHH")
_TCP = struct.Struct("!HHIIBBHHH")
_DATA_OFFSET = 5 << 4  # a TCP header without options
_ACK_PSH = 0x18

Kind = Literal["arp", "icmp", "udp", "tcp"]


class BadPacket(Exception):
    """A frame is not what it should be; the text says where."""


@dataclass(frozen=True, slots=True)
class Station:
    """Where a packet comes from or goes to."""

    mac: bytes
    ip: IPv4Address


@dataclass(frozen=True, slots=True)
class Packet:
    """What a checked frame says. `operation` is the ARP operation or the ICMP type; `identifier` and
    `sequence` are those of an echo, or the source and destination port; `number` is TCP's."""

    kind: Kind
    source: Station
    destination: Station
    payload: bytes = b""
    operation: int = 0
    identifier: int = 0
    sequence: int = 0
    number: int = 0


def ones_sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words, big-endian (RFC 1071); 0 when it is "minus zero" too.

    Arithmetic modulo 2^16-1 on the whole as one number does the same, and fast.
    """
    return int.from_bytes(data + b"\0" * (len(data) & 1), "big") % 0xFFFF


def checksum(data: bytes) -> int:
    return ~ones_sum(data) & 0xFFFF


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    return source + destination + struct.pack("!HH", protocol, length)


# Building


def arp_request(sender: Station, wanted: IPv4Address) -> bytes:
    body = _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, 1, sender.mac, sender.ip.packed, bytes(6), wanted.packed)
    return (_ETHERNET.pack(BROADCAST, sender.mac, ETHERTYPE_ARP) + body).ljust(MINIMUM_FRAME, b"\0")


def ping(sender: Station, receiver: Station, identifier: int, sequence: int, payload: bytes) -> bytes:
    """An echo request."""
    head = _ECHO.pack(8, 0, 0, identifier, sequence)
    total = checksum(head + payload)
    echo = _ECHO.pack(8, 0, total, identifier, sequence) + payload
    return _ipv4(sender, receiver, ICMP, echo)


def udp(sender: Station, receiver: Station, ports: tuple[int, int], payload: bytes) -> bytes:
    """`ports` are (source, destination)."""
    length = UDP_SIZE + len(payload)
    pseudo = pseudo_header(sender.ip.packed, receiver.ip.packed, UDP, length)
    head = _UDP.pack(*ports, length, 0)
    total = checksum(pseudo + head + payload) or 0xFFFF
    return _ipv4(sender, receiver, UDP, _UDP.pack(*ports, length, total) + payload)


def tcp_segmentation_header(sender: Station, receiver: Station, ports: tuple[int, int], number: int) -> bytes:
    """The headers that go before a payload which the device cuts into segments: total length 0, and the
    pseudo header's sum without a length in the place of the TCP checksum (82540EM manual, 3.5)."""
    pseudo = pseudo_header(sender.ip.packed, receiver.ip.packed, TCP, 0)
    segment = _TCP.pack(*ports, number, 1, _DATA_OFFSET, _ACK_PSH, 0xFFFF, ones_sum(pseudo), 0)
    ethernet = _ETHERNET.pack(receiver.mac, sender.mac, ETHERTYPE_IPV4)
    return ethernet + _IPV4.pack(0x45, 0, 0, 1, 0x4000, 64, TCP, 0, *_addresses(sender, receiver)) + segment


def _addresses(sender: Station, receiver: Station) -> tuple[bytes, bytes]:
    return sender.ip.packed, receiver.ip.packed


def _ipv4(sender: Station, receiver: Station, protocol: int, body: bytes) -> bytes:
    fields = (0x45, 0, IPV4_SIZE + len(body), 1, 0x4000, 64, protocol)
    head = _IPV4.pack(*fields, 0, *_addresses(sender, receiver))
    head = _IPV4.pack(*fields, checksum(head), *_addresses(sender, receiver))
    ethernet = _ETHERNET.pack(receiver.mac, sender.mac, ETHERTYPE_IPV4)
    return (ethernet + head + body).ljust(MINIMUM_FRAME, b"\0")


# Taking apart


def parse(frame: bytes) -> Packet:
    """Check a frame of the kinds that this module builds. BadPacket names what is wrong with it."""
    _require(len(frame) >= MINIMUM_FRAME, f"the frame has only {len(frame)} bytes")
    destination, source, kind = _ETHERNET.unpack_from(frame)
    if kind == ETHERTYPE_ARP:
        return _parse_arp(frame)
    _require(kind == ETHERTYPE_IPV4, f"ethertype {kind:#06x}")
    head = frame[ETHERNET_SIZE : ETHERNET_SIZE + IPV4_SIZE]
    version, _, length, _, fragment, _, protocol, _, source_ip, destination_ip = _IPV4.unpack(head)
    _require(version == 0x45, f"IPv4 version and header length {version:#x}")
    _require(ones_sum(head) == 0, "IPv4 header checksum")
    _require(not fragment & 0x3FFF, "IPv4 fragment")
    _require(IPV4_SIZE <= length <= len(frame) - ETHERNET_SIZE, f"IPv4 length {length} of {len(frame)}")
    body = frame[ETHERNET_SIZE + IPV4_SIZE : ETHERNET_SIZE + length]
    stations = Station(source, IPv4Address(source_ip)), Station(destination, IPv4Address(destination_ip))
    if protocol == ICMP:
        return _parse_icmp(*stations, body)
    pseudo = pseudo_header(source_ip, destination_ip, protocol, len(body))
    _require(protocol in (TCP, UDP), f"IPv4 protocol {protocol}")
    _require(ones_sum(pseudo + body) == 0, f"checksum of IPv4 protocol {protocol}")
    return _parse_udp(*stations, body) if protocol == UDP else _parse_tcp(*stations, body)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise BadPacket(what)


def _parse_arp(frame: bytes) -> Packet:
    hardware, protocol, *_, operation, mac, ip, target_mac, target_ip = _ARP.unpack_from(frame, ETHERNET_SIZE)
    _require((hardware, protocol) == (1, ETHERTYPE_IPV4), "ARP of other kinds of addresses")
    _require(frame[6:12] == mac, "ARP sender is not the frame's")
    sender, target = Station(mac, IPv4Address(ip)), Station(target_mac, IPv4Address(target_ip))
    return Packet("arp", sender, target, operation=operation)


def _parse_icmp(source: Station, destination: Station, body: bytes) -> Packet:
    _require(len(body) >= ICMP_SIZE and ones_sum(body) == 0, "ICMP checksum")
    operation, _, _, identifier, sequence = _ECHO.unpack_from(body)
    return Packet("icmp", source, destination, body[ICMP_SIZE:], operation, identifier, sequence)


def _parse_udp(source: Station, destination: Station, body: bytes) -> Packet:
    _require(len(body) >= UDP_SIZE, "UDP header")
    source_port, destination_port, length, _ = _UDP.unpack_from(body)
    _require(length == len(body), f"UDP length {length} of {len(body)}")
    return Packet(
        "udp", source, destination, body[UDP_SIZE:], identifier=source_port, sequence=destination_port
    )


def _parse_tcp(source: Station, destination: Station, body: bytes) -> Packet:
    _require(len(body) >= TCP_SIZE, "TCP header")
    source_port, destination_port, number, _, offset, *_ = _TCP.unpack_from(body)
    _require(offset == _DATA_OFFSET, f"TCP data offset {offset:#x}")
    return Packet("tcp", source, destination, body[TCP_SIZE:], 0, source_port, destination_port, number)
