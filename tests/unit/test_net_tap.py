# SPDX-License-Identifier: BSD-3-Clause
"""The TAP backend with the kernel's real TAP devices, in a network namespace of the test's own."""

import ctypes
import errno
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from vfio_user.device_models.net import Cancellable, NetBackend, Offload, Segmentation
from vfio_user.device_models.segmentation import segment, wire_size
from vfio_user.device_models.timers import Timer
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.factory import open_backend
from vfio_user.server.net.tap import TapBackend
from vfio_user.transport.poller import Poller

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and TAP devices"),
]

CLONE_NEWNET = 0x40000000
IFA_F_NODAD = 0x02
LIBC = ctypes.CDLL(None, use_errno=True)
GUEST, HOST = "02:00:00:00:00:15", "02:00:00:00:00:01"


@pytest.fixture
def route() -> Iterator[IPRoute]:
    """A fresh network namespace for this thread, and a netlink socket in it."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert LIBC.unshare(CLONE_NEWNET) == 0
    try:
        Path("/proc/sys/net/ipv6/conf/default/addr_gen_mode").write_text("1")  # no link-local traffic
        with IPRoute() as route:
            yield route
    finally:
        assert LIBC.setns(before, CLONE_NEWNET) == 0
        os.close(before)


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


def no_timer(delay: int, callback: Callable[[], None]) -> Cancellable:
    return Timer(delay, callback)


class Nic:
    """A device on a backend, with room for `room` frames; what the kernel sends of itself is left out."""

    def __init__(self, port: NetBackend, poller: Poller, wanted: Callable[[bytes], bool] = bool) -> None:
        self.port = port
        self.poller = poller
        self.wanted = wanted
        self.room = 1_000_000
        self.frames: list[bytes] = []
        self.links: list[bool] = []
        port.attach(self)

    def receive(self, frame: bytes) -> bool:
        if not self.wanted(frame):
            return True
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(frame)
        return True

    def link_changed(self, up: bool) -> None:
        self.links.append(up)

    def wait(self, done: Callable[[], bool]) -> None:
        """Serve the poller until `done`; at most five seconds."""
        deadline = time.monotonic() + 5
        while not done():
            assert time.monotonic() < deadline, f"nothing more comes after {len(self.frames)} frames"
            select.select([self.poller.fileno()], [], [], 0.05)
            self.poller.poll()


def setup(route: IPRoute, poller: Poller, name: str = "tap0") -> Nic:
    """A TAP whose kernel side has addresses, and knows the guest as its neighbour."""
    nic = Nic(
        TapBackend(name, poller), poller, lambda frame: frame[:6] == bytes.fromhex(GUEST.replace(":", ""))
    )
    index = route.link_lookup(ifname=name)[0]
    route.link("set", index=index, address=HOST)
    route.addr("add", index=index, address="10.9.0.1", prefixlen=24)
    route.addr("add", index=index, address="fd09::1", prefixlen=64, flags=IFA_F_NODAD)
    for guest in ("10.9.0.15", "fd09::15"):
        route.neigh("add", ifindex=index, dst=guest, lladdr=GUEST, state="permanent")
    wait_for_local_route(name)
    return nic


def wait_for_local_route(name: str) -> None:
    """Of a new IPv6 address: a worker of the kernel adds it in its own time; frames before it are dropped."""
    address, deadline = ip_address("fd09::1").packed.hex(), time.monotonic() + 5
    while not any(
        line.startswith(f"{address} 80 ") and line.endswith(f" {name}")
        for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.001)


LINK = Ether(dst=HOST, src=GUEST)
NETWORKS = {
    "v4": IP(src="10.9.0.15", dst="10.9.0.1", id=0xFFF0),
    "v6": IPv6(src="fd09::15", dst="fd09::1"),
}
PAYLOAD = bytes(i * 31 >> 3 & 0xFF for i in range(60_001))


def offload_of(frame: bytes, size: int) -> Offload:
    packet = Ether(frame)
    start = len(packet) - len(packet[TCP])
    kind = Segmentation.TCPV4 if IP in packet else Segmentation.TCPV6
    return Offload(start, 16, kind, start + 4 * packet[TCP].dataofs, size)


def burst(network: Packet, size: int, flags: str = "PA", seq: int = 0) -> tuple[bytes, Offload]:
    frame = bytes(
        LINK / network / TCP(flags=flags, seq=seq, options=[("Timestamp", (3, 4))]) / Raw(PAYLOAD[: 1 << 15])
    )
    whole = frame + PAYLOAD[1 << 15 :]  # scapy cannot write a longer packet's length; nor has the device to
    return whole, offload_of(frame, size)


@pytest.mark.parametrize("size", [1447, 1448, 536, 88])
@pytest.mark.parametrize(
    "network",
    [
        IP(src="10.9.0.15", dst="192.0.2.1", id=0xFFF0),
        IPv6(src="fd09::15", dst="2001:db8::1"),
        IPv6(src="fd09::15", dst="2001:db8::1") / IPv6ExtHdrDestOpt(),
        Dot1Q(vlan=5) / IP(src="10.9.0.15", dst="192.0.2.1", id=1),
    ],
    ids=["v4", "v6", "v6 with options", "vlan"],
)
def test_the_kernel_cuts_a_burst_as_we_do(route: IPRoute, poller: Poller, network: Packet, size: int) -> None:
    """Two TAPs on a bridge: what goes into one as a burst has to leave the other in segments."""
    ports = [TapBackend(name, poller) for name in ("in0", "out0")]
    route.link("add", ifname="bridge0", kind="bridge")
    bridge = route.link_lookup(ifname="bridge0")[0]
    route.link("set", index=bridge, state="up")
    for port in ports:
        route.link("set", index=route.link_lookup(ifname=port.name)[0], master=bridge)
    to_host = bytes.fromhex(HOST.replace(":", ""))
    source = Nic(ports[0], poller, lambda frame: False)
    sink = Nic(ports[1], poller, lambda frame: frame[:6] == to_host)
    wait_for_bridge(source, sink)
    frame, offload = burst(network, size, "PACE", seq=0xFFFF8000)
    expected = segment([frame], offload)
    assert source.port.send([frame[:7], frame[7:300], memoryview(frame)[300:]], offload) == (
        len(expected),
        sum(map(len, expected)),
    )
    sink.wait(lambda: len(sink.frames) >= len(expected))
    assert sink.frames == expected
    assert source.port.counters()["sent_dropped"] == 0
    for port in ports:
        port.close()


def wait_for_bridge(source: Nic, sink: Nic) -> None:
    """Its ports begin to forward a moment after they came up."""
    probe = bytes(Ether(dst=HOST, src=GUEST, type=0x88B5) / Raw(b"probe" * 10))
    deadline = time.monotonic() + 5
    while not sink.frames:
        assert time.monotonic() < deadline
        source.port.send([probe])
        select.select([sink.poller.fileno()], [], [], 0.02)
        sink.poller.poll()
    sink.poller.poll()
    sink.frames.clear()


class TcpGuest:
    """As much of TCP as it takes to open a connection to the host and to push one burst into it."""

    def __init__(self, nic: Nic, network: Packet, port: int) -> None:
        self.nic = nic
        self.network = network
        self.port = port

    def connect(self) -> tuple[int, int]:
        """The numbers after the handshake: ours and the host's."""
        syn = TCP(sport=4321, dport=self.port, flags="S", seq=999, options=[("MSS", 1460), ("WScale", 7)])
        self.nic.port.send([bytes(LINK / self.network / syn)])
        self.nic.wait(lambda: bool(self.nic.frames))
        answer = Ether(self.nic.frames[0])[TCP]
        assert (str(answer.flags), answer.ack) == ("SA", 1000)
        acknowledgement = TCP(sport=4321, dport=self.port, flags="A", seq=1000, ack=answer.seq + 1)
        self.nic.port.send([bytes(LINK / self.network / acknowledgement)])
        return 1000, answer.seq + 1


def read_to_end(listener: socket.socket, received: bytearray) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(5)
        while part := connection.recv(1 << 16):
            received += part


@pytest.mark.parametrize("size", [1447, 1460, 8947])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_burst_reaches_a_listener_of_the_host_whole(
    route: IPRoute, poller: Poller, kind: str, size: int
) -> None:
    nic = setup(route, poller)
    family, address = (socket.AF_INET, "10.9.0.1") if kind == "v4" else (socket.AF_INET6, "fd09::1")
    received = bytearray()
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        listener.bind((address, 80))
        listener.listen()
        reader = threading.Thread(target=read_to_end, args=(listener, received))
        reader.start()
        sequence, acknowledged = TcpGuest(nic, NETWORKS[kind], 80).connect()
        headers = bytes(
            LINK / NETWORKS[kind] / TCP(sport=4321, dport=80, flags="FPA", seq=sequence, ack=acknowledged)
        )
        before = link_statistics(route)["rx_packets"]
        size_on_wire = nic.port.send([headers, PAYLOAD], offload_of(headers, size))
        assert link_statistics(route)["rx_packets"] == before + 1
        reader.join(10)
    assert bytes(received) == PAYLOAD
    assert size_on_wire == (-(-60_001 // size), 60_001 + -(-60_001 // size) * len(headers))
    assert nic.port.counters()["sent_dropped"] == 0
    nic.port.close()


def test_a_burst_that_ip_cannot_say_is_cut_by_us(route: IPRoute, poller: Poller) -> None:
    nic = setup(route, poller)
    frame, offload = burst(NETWORKS["v4"], 1448)
    size = nic.port.send([frame, bytes(6000)], offload)
    assert size.frames == -(-66_001 // 1448)
    assert nic.port.counters()["sent_dropped"] == 0
    assert link_statistics(route)["rx_packets"] >= size.frames
    nic.port.close()


def link_statistics(route: IPRoute, name: str = "tap0") -> dict[str, int]:
    statistics = route.get_links(ifname=name)[0].get("stats64")
    return {key: int(value) for key, value in statistics.items()}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checksum_is_filled_in_by_the_kernel(route: IPRoute, poller: Poller, kind: str) -> None:
    nic = setup(route, poller)
    family, address = (socket.AF_INET, "10.9.0.1") if kind == "v4" else (socket.AF_INET6, "fd09::1")
    whole = bytes(LINK / NETWORKS[kind] / UDP(sport=5000, dport=5001) / Raw(b"offloaded"))
    start = len(whole) - 17
    field = (segment_seed(whole, start) ^ 0xFFFF).to_bytes(2, "big")
    frame = whole[: start + 6] + field + whole[start + 8 :]
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.settimeout(5)
        server.bind((address, 5001))
        nic.port.send(
            [whole[: start + 6] + b"\x12\x34" + whole[start + 8 :]]
        )  # wrong, and nothing to fill in
        nic.port.send([frame[:20], frame[20:]], Offload(start, 6))
        assert server.recv(100) == b"offloaded"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)
    nic.port.close()


def segment_seed(frame: bytes, start: int) -> int:
    """The complement of the pseudo-header's sum: what the sum field would be over no data."""
    zeroed = frame[: start + 6] + bytes(2) + frame[start + 8 :]
    data = int.from_bytes(segment([zeroed], Offload(start, 6))[0][start + 6 : start + 8], "big") ^ 0xFFFF
    whole = int.from_bytes(frame[start + 6 : start + 8], "big") ^ 0xFFFF
    return (whole - data) % 65535 ^ 0xFFFF


def test_received_frames_wait_for_the_device_and_none_is_lost(route: IPRoute, poller: Poller) -> None:
    nic = setup(route, poller)
    nic.room = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for number in range(700):
            client.sendto(number.to_bytes(2, "big") * 700, ("10.9.0.15", 9))
    for _ in range(5):
        poller.poll()
    assert nic.frames == []
    assert not poller.poll()
    for number in range(100):
        nic.room = 7
        nic.port.ready()
        nic.wait(lambda number=number: len(nic.frames) == 7 * number + 7)  # type: ignore[misc]
    assert [Ether(frame)[UDP].load for frame in nic.frames] == [
        n.to_bytes(2, "big") * 700 for n in range(700)
    ]
    nic.room = 1
    nic.port.ready()
    counters = nic.port.counters()
    assert (counters["received_frames"] >= 700, counters["received_dropped"]) == (True, 0)
    nic.port.close()


def test_what_the_kernel_sends_is_complete(route: IPRoute, poller: Poller) -> None:
    """Without offloads towards us a large send of the host comes in segments with their sums."""
    nic = setup(route, poller)
    guest = TcpGuest(nic, NETWORKS["v4"], 80)
    with socket.socket() as listener:
        listener.bind(("10.9.0.1", 80))
        listener.listen()
        guest.connect()
        connection, _ = listener.accept()
        with connection:
            connection.send(PAYLOAD[:10_000])
            nic.frames.clear()
            nic.wait(lambda: sum(len(Ether(f)[TCP].payload) for f in nic.frames) >= 10_000)
    for frame in nic.frames:
        again = Ether(frame)
        del again[IP].chksum, again[TCP].chksum
        assert bytes(again) == frame
        assert len(frame) <= 1514
    nic.port.close()


def test_a_created_tap_goes_and_a_persistent_one_stays(route: IPRoute, poller: Poller) -> None:
    backend = TapBackend("mine0", poller)
    assert route.get_links(ifname="mine0")[0].get("state") == "up"
    backend.close()
    backend.close()
    assert not route.link_lookup(ifname="mine0")
    route.link("add", ifname="theirs0", kind="tuntap", mode="tap")
    for _ in range(2):
        backend = TapBackend("theirs0", poller)
        assert route.get_links(ifname="theirs0")[0].get("state") == "down"
        backend.close()
    assert route.link_lookup(ifname="theirs0")


def test_an_interface_that_is_down_drops_and_one_that_is_deleted_cuts_the_link(
    route: IPRoute, poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    nic = setup(route, poller)
    index = route.link_lookup(ifname="tap0")[0]
    frame = bytes(LINK / ARP(psrc="10.9.0.15", pdst="10.9.0.1")).ljust(60, b"\0")
    route.link("set", index=index, state="down")
    assert nic.port.send([frame]) == (1, 60)
    assert nic.port.counters()["sent_dropped"] == 1
    route.link("del", index=index)
    nic.wait(lambda: bool(nic.links))
    assert (nic.links, "is gone" in caplog.text) == ([False], True)
    assert not poller.poll()
    nic.port.send([frame])
    assert nic.port.counters()["sent_dropped"] == 2
    nic.port.close()


def test_what_was_read_before_an_interface_is_deleted_still_arrives(
    route: IPRoute, poller: Poller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nic = setup(route, poller)
    poller.poll()
    address = bytes.fromhex(GUEST.replace(":", ""))
    first, second = address + b"first" * 12, address + b"second" * 10
    header, coming = bytes(10), [first, second]

    def read(_fd: int, _size: int) -> bytes:
        if not coming:
            raise OSError(errno.EBADFD, "deleted")
        return header + coming.pop(0)

    nic.frames.clear()
    nic.room = 1
    monkeypatch.setattr(os, "read", read)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"wakes the poller", ("10.9.0.15", 9))
    poller.poll()
    assert (nic.frames, nic.links) == ([first], [False])
    nic.room = 1
    nic.port.ready()
    counters = nic.port.counters()
    assert (len(nic.frames), counters["received_dropped"], caplog.text.count("is gone")) == (1, 1, 1)
    assert not poller.poll()
    nic.port.close()


def test_malformed_frames_do_not_reach_the_kernel(route: IPRoute, poller: Poller) -> None:
    nic = setup(route, poller)
    frame, offload = burst(NETWORKS["v4"], 1448)
    before = link_statistics(route)
    for bad in (
        replace(offload, segment_size=0),
        replace(offload, checksum_start=60_100),
        Offload(70_000, 6),
    ):
        assert nic.port.send([frame], bad) == wire_size([frame], bad) == (0, 0)
    assert nic.port.counters()["sent_malformed"] == 3
    assert link_statistics(route) == before
    nic.port.send([bytes(14)] + [b"x"] * 2000)  # more pieces than one system call takes
    nic.port.send([bytes(70_000)], Offload(66_000, 6))
    assert nic.port.counters()["sent_malformed"] == 3
    nic.port.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [("busy0", "another program is using it"), ("lo", "not a TAP device"), ("bridge0", "not a TAP device")],
)
def test_a_tap_that_cannot_be_had(route: IPRoute, poller: Poller, name: str, text: str) -> None:
    holder = TapBackend("busy0", poller)
    route.link("add", ifname="bridge0", kind="bridge")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError, match=f"tap:{name}: .*{text}") as caught:
        open_backend(f"tap:{name}", poller, no_timer)
    assert "\n" not in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before
    holder.close()


def test_without_privileges_the_error_says_so(route: IPRoute, poller: Poller) -> None:
    route.link("add", ifname="theirs0", kind="tuntap", mode="tap")
    os.seteuid(65534)
    try:
        with pytest.raises(BackendError, match=r"no permission .*run as root") as caught:
            TapBackend("theirs0", poller)
    finally:
        os.seteuid(0)
    assert "\n" not in str(caught.value)
    backend = TapBackend("theirs0", poller)
    backend.close()


def test_a_capture_that_fails_takes_the_new_tap_away(route: IPRoute, poller: Poller) -> None:
    with pytest.raises(BackendError, match="make its directory"):
        open_backend("tap:mine0,pcap=/nowhere/x", poller, no_timer)
    assert not route.link_lookup(ifname="mine0")


def test_the_namespace_is_ours(route: IPRoute) -> None:
    names = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert names.split()[0] == "lo"
    assert len(names.splitlines()) == 1
