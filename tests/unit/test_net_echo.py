# SPDX-License-Identifier: BSD-3-Clause
"""The network that answers by itself: requests and expected replies are scapy's."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from vfio_user.device_models.backends import BACKLOG_LIMIT
from vfio_user.device_models.echo import DEFAULT_MAC, EchoBackend, Responder
from vfio_user.device_models.net import Offload

GUEST = "52:54:00:12:34:56"
HOME = DEFAULT_MAC.hex(":")
DATA = Raw(b"payload of odd length..")


def ask(packet: Packet, responder: Responder | None = None) -> Packet | None:
    reply = (responder or Responder()).answer(bytes(packet))
    return None if reply is None else Ether(reply)


def link(destination: str = HOME) -> Packet:
    return Ether(dst=destination, src=GUEST)


def rebuilt(packet: Packet) -> bytes:
    """The same packet with lengths and sums made by scapy."""
    again = packet.copy()
    for layer in (IP, TCP, UDP, ICMP, ICMPv6EchoReply, ICMPv6ND_NA):
        if layer in again:
            for name in ("len", "chksum", "cksum"):
                if name in again[layer].fields:
                    del again[layer].fields[name]
    return bytes(again)


@pytest.mark.parametrize("target", ["10.0.2.2", "10.0.2.254"])
def test_arp(target: str) -> None:
    request = link("ff:ff:ff:ff:ff:ff") / ARP(hwsrc=GUEST, psrc="10.0.2.15", pdst=target)
    reply = ask(request)
    assert reply is not None
    assert (reply.dst, reply.src, len(reply)) == (GUEST, HOME, 60)
    arp = reply[ARP]
    assert (arp.op, arp.hwsrc, arp.psrc, arp.hwdst, arp.pdst) == (2, HOME, target, GUEST, "10.0.2.15")


@pytest.mark.parametrize(
    "arp",
    [
        ARP(hwsrc=GUEST, psrc="0.0.0.0", pdst="10.0.2.15"),
        ARP(hwsrc=GUEST, psrc="10.0.2.15", pdst="10.0.2.15"),
        ARP(hwsrc=GUEST, psrc="10.0.2.15", pdst="10.0.3.1"),
        ARP(hwsrc=GUEST, psrc="10.0.2.15", pdst="10.0.2.255"),
        ARP(op=2, hwsrc=GUEST, psrc="10.0.2.15", pdst="10.0.2.2"),
    ],
)
def test_arp_without_answer(arp: Packet) -> None:
    assert ask(link("ff:ff:ff:ff:ff:ff") / arp) is None


def test_ping() -> None:
    reply = ask(link() / IP(src="10.0.2.15", dst="10.0.2.2", id=77, tos=8) / ICMP(id=5, seq=6) / DATA)
    assert reply is not None
    assert (reply[IP].src, reply[IP].dst, reply[IP].ttl, reply[IP].id) == ("10.0.2.2", "10.0.2.15", 64, 77)
    assert (reply[ICMP].type, reply[ICMP].id, reply[ICMP].seq) == (0, 5, 6)
    assert reply[Raw].load == DATA.load
    assert bytes(reply) == rebuilt(reply)


def test_ping6() -> None:
    reply = ask(
        link() / IPv6(src="fd00:2::15", dst="fd00:2::2") / ICMPv6EchoRequest(id=5, seq=6, data=b"abc")
    )
    assert reply is not None
    assert (reply[IPv6].src, reply[IPv6].dst) == ("fd00:2::2", "fd00:2::15")
    assert (reply[ICMPv6EchoReply].id, reply[ICMPv6EchoReply].data) == (5, b"abc")
    assert bytes(reply) == rebuilt(reply)


@pytest.mark.parametrize("network", [IP(src="10.0.2.15", dst="10.0.2.2"), IPv6(src="fe80::1", dst="fe80::2")])
def test_udp_echo(network: Packet) -> None:
    request = link() / network / UDP(sport=4000, dport=7) / DATA
    reply = ask(request)
    assert reply is not None
    assert (reply[UDP].sport, reply[UDP].dport, bytes(reply[UDP].payload)) == (7, 4000, DATA.load)
    assert bytes(reply) == rebuilt(reply)


def test_neighbour_solicitation() -> None:
    request = (
        link("33:33:ff:00:00:02")
        / IPv6(src="fe80::5054:ff:fe12:3456", dst="ff02::1:ff00:2", hlim=255)
        / ICMPv6ND_NS(tgt="fd00:2::2")
        / ICMPv6NDOptSrcLLAddr(lladdr=GUEST)
    )
    reply = ask(request)
    assert reply is not None
    advertisement = reply[ICMPv6ND_NA]
    assert (reply[IPv6].src, reply[IPv6].dst, reply[IPv6].hlim) == (
        "fd00:2::2",
        "fe80::5054:ff:fe12:3456",
        255,
    )
    assert (advertisement.R, advertisement.S, advertisement.O, advertisement.tgt) == (0, 1, 1, "fd00:2::2")
    assert reply[ICMPv6NDOptDstLLAddr].lladdr == HOME
    assert bytes(reply) == rebuilt(reply)


@pytest.mark.parametrize(
    "packet",
    [
        link("33:33:ff:00:00:02")
        / IPv6(src="::", dst="ff02::1:ff00:2", hlim=255)
        / ICMPv6ND_NS(tgt="fd00:2::2"),
        link("33:33:ff:00:00:02")
        / IPv6(src="fe80::1", dst="ff02::1:ff00:2", hlim=64)
        / ICMPv6ND_NS(tgt="fd00:2::2"),
        link() / IPv6(src="fd00:2::15", dst="fd00:3::2") / ICMPv6EchoRequest(),
        link() / IPv6(src="fd00:2::15", dst="ff02::1") / ICMPv6EchoRequest(),
        link() / IPv6(src="fd00:2::15", dst="fd00:2::2") / TCP(),
        link() / IPv6(src="fd00:2::15", dst="fd00:2::2") / UDP(sport=1, dport=8),
        link("02:00:00:00:00:99") / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(),
        link() / Dot1Q(vlan=1) / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(),
        link() / IP(src="10.0.2.15", dst="10.0.2.2", flags="MF") / ICMP(),
        link() / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(type=0),
        link() / IP(src="10.0.2.15", dst="10.0.2.255") / ICMP(),
        link() / IP(src="10.0.2.2", dst="10.0.2.2") / ICMP(),
        link() / IP(src="10.0.2.15", dst="10.0.2.2") / UDP(sport=7, dport=7),
        link() / IP(src="10.0.2.15", dst="10.0.2.2") / TCP(),
        link() / b"\x00\x01",
    ],
)
def test_no_answer(packet: Packet) -> None:
    responder = Responder()
    assert ask(packet, responder) is None
    assert responder.bad_checksums == 0


@pytest.mark.parametrize(
    "packet",
    [
        link() / IP(src="10.0.2.15", dst="10.0.2.2", chksum=1) / ICMP(),
        link() / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(chksum=1),
        link() / IP(src="10.0.2.15", dst="10.0.2.2") / UDP(sport=1, dport=7, chksum=1),
        link() / IPv6(src="fd00:2::15", dst="fd00:2::2") / ICMPv6EchoRequest(cksum=1),
    ],
)
def test_a_wrong_sum_gets_no_answer_and_is_counted(packet: Packet) -> None:
    responder = Responder()
    assert ask(packet, responder) is None
    assert responder.bad_checksums == 1


def test_udp_without_sum_is_answered_over_ipv4_only() -> None:
    assert ask(link() / IP(src="10.0.2.15", dst="10.0.2.2") / UDP(sport=1, dport=7, chksum=0)) is not None
    assert ask(link() / IPv6(src="fd00:2::15", dst="fd00:2::2") / UDP(sport=1, dport=7, chksum=0)) is None


def test_its_networks_and_address_can_be_chosen() -> None:
    responder = Responder((ip_network("192.0.2.0/31"),), bytes.fromhex("020000000001"))
    request = Ether(dst="02:00:00:00:00:01", src=GUEST) / IP(src="192.0.2.1", dst="192.0.2.0") / ICMP()
    reply = ask(request, responder)
    assert reply is not None
    assert reply.src == "02:00:00:00:00:01"
    assert ask(link() / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(), responder) is None


@given(
    st.binary(max_size=90), st.sampled_from(["0806", "0800", "86dd", "86dd6000000000183aff", "08004500", ""])
)
def test_no_frame_raises(tail: bytes, head: str) -> None:
    reply = Responder().answer(b"\xff" * 6 + bytes(6) + bytes.fromhex(head) + tail)
    assert reply is None or len(reply) >= 60


class Nic:
    def __init__(self) -> None:
        self.room = 0
        self.frames: list[bytes] = []

    def receive(self, frame: bytes) -> bool:
        if self.room:
            self.frames.append(frame)
            self.room -= 1
            return True
        return False

    def link_changed(self, up: bool) -> None:
        raise AssertionError


def test_backend_answers_an_offloaded_ping_and_replies_wait_for_the_device() -> None:
    backend, nic = EchoBackend(), Nic()
    backend.attach(nic)
    ping = bytearray(bytes(link() / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(seq=1) / DATA))
    ping[36:38] = bytes(2)
    for _ in range(BACKLOG_LIMIT + 3):
        assert backend.send([ping[:14], ping[14:]], Offload(34, 2)) == (1, len(ping))
    assert nic.frames == []
    nic.room = 1000
    backend.ready()
    assert len(nic.frames) == BACKLOG_LIMIT
    assert Ether(nic.frames[0])[ICMP].type == 0
    assert backend.counters()["received_dropped"] == 3
    assert backend.counters()["bad_checksums"] == 0
