# SPDX-License-Identifier: BSD-3-Clause
"""The stream backend with the real passt, in a network namespace of the test's own."""

import ctypes
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from vfio_user.device_models.net import Cancellable, NetBackend, Offload, Segmentation
from vfio_user.device_models.timers import NANOSECONDS, Timers
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.factory import open_backend
from vfio_user.server.net.stream import RECONNECT_INTERVAL
from vfio_user.transport.poller import Poller

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt: apt-get install passt"),
]

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)
GUEST = "52:54:00:12:34:56"
ADDRESS, GATEWAY = "192.0.2.15", "192.0.2.1"
NETWORK = f"""
ip link set lo up
ip link add up0 type veth peer name up1
ip addr add {ADDRESS}/24 dev up0
ip link set up0 up
ip link set up1 up
ip route add default via {GATEWAY}
"""


@pytest.fixture
def namespace() -> Iterator[None]:
    """A fresh network namespace for this thread, with the address and the route that passt hands on."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert LIBC.unshare(CLONE_NEWNET) == 0
    try:
        subprocess.run(["sh", "-ec", NETWORK], check=True)
        yield
    finally:
        assert LIBC.setns(before, CLONE_NEWNET) == 0
        os.close(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that passt can reach without its privileges; pytest's own is root's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


class Passt:
    """A passt process on a socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "socket"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        command = [
            "passt",
            "--foreground",
            "--quiet",
            "--ipv4-only",
            "--runas",
            "nobody",
            "--socket",
            str(self.path),
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self.path.exists():
            assert self.process.poll() is None, "passt has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Nic:
    """A device on passt, and the loop that serves it; the wire's time can be moved on."""

    def __init__(self, path: Path) -> None:
        self.ahead = 0
        self.timers = Timers(lambda: time.monotonic_ns() + self.ahead)
        self.poller = Poller()
        self.frames: list[Packet] = []
        self.links: list[bool] = []
        self.port = self.open(f"stream:{path}")
        self.port.attach(self)

    def open(self, text: str) -> NetBackend:
        """The socket is there a moment before passt listens on it."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return open_backend(text, self.poller, self.call_later)
            except BackendError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def call_later(self, delay: int, callback: Callable[[], None]) -> Cancellable:
        return self.timers.call_at(self.timers.clock() + delay, callback)

    def receive(self, frame: bytes) -> bool:
        self.frames.append(Ether(frame))
        return True

    def link_changed(self, up: bool) -> None:
        self.links.append(up)

    def wait(self, done: Callable[[], object], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"after {self.frames!r}"
            select.select([self.poller.fileno()], [], [], 0.02)
            self.poller.poll()
            self.timers.run_due()

    def ask(self, request: Packet, layer: type[Packet]) -> Packet:
        """Send and give the first frame with `layer` that comes."""
        self.frames.clear()
        self.port.send([bytes(request)])
        self.wait(lambda: any(layer in frame for frame in self.frames))
        return next(frame for frame in self.frames if layer in frame)

    def gateway(self) -> str:
        """The MAC address that answers for the gateway."""
        request = Ether(dst="ff:ff:ff:ff:ff:ff", src=GUEST) / ARP(hwsrc=GUEST, psrc=ADDRESS, pdst=GATEWAY)
        reply = self.ask(request, ARP)[ARP]
        assert (reply.op, reply.psrc, reply.pdst) == (2, GATEWAY, ADDRESS)
        return str(reply.hwsrc)

    def close(self) -> None:
        self.port.close()
        self.poller.close()


@pytest.fixture
def passt(namespace: None, folder: Path) -> Iterator[Passt]:
    passt = Passt(folder)
    yield passt
    passt.stop()


@pytest.fixture
def nic(passt: Passt) -> Iterator[Nic]:
    nic = Nic(passt.path)
    yield nic
    nic.close()


def test_arp_and_dhcp(nic: Nic) -> None:
    assert nic.gateway() != GUEST
    discover = (
        Ether(dst="ff:ff:ff:ff:ff:ff", src=GUEST)
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=bytes.fromhex(GUEST.replace(":", "")), xid=7)
        / DHCP(options=[("message-type", "discover"), "end"])
    )
    offer = nic.ask(discover, BOOTP)
    assert (offer[BOOTP].op, offer[BOOTP].xid, offer[BOOTP].yiaddr) == (2, 7, ADDRESS)
    assert ("message-type", 2) in offer[DHCP].options
    counters = nic.port.counters()
    assert (counters["sent_frames"], counters["sent_dropped"], counters["received_dropped"]) == (2, 0, 0)


def test_a_burst_goes_through_a_tcp_connection(nic: Nic) -> None:
    """The gateway's address is the host's loopback: passt's own mapping."""
    payload = bytes(i * 31 >> 3 & 0xFF for i in range(20_001))
    link = Ether(dst=nic.gateway(), src=GUEST) / IP(src=ADDRESS, dst=GATEWAY)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 8080))
        listener.listen()
        syn = TCP(sport=4321, dport=8080, flags="S", seq=999, options=[("MSS", 1460), ("WScale", 7)])
        answer = nic.ask(link / syn, TCP)[TCP]
        assert (str(answer.flags), answer.ack) == ("SA", 1000)
        headers = bytes(
            link / TCP(sport=4321, dport=8080, flags="PA", seq=1000, ack=answer.seq + 1, window=512)
        )
        nic.port.send([headers])
        assert nic.port.send([headers, payload], Offload(34, 16, Segmentation.TCPV4, 54, 1447)).frames == 14
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            received = bytearray()

            def whole() -> bool:
                received.extend(read(connection))
                return len(received) >= len(payload)

            nic.wait(whole)
            assert bytes(received) == payload
            connection.setblocking(True)
            connection.sendall(payload[:1000])
            nic.wait(lambda: payload[:1000] in (bytes(f[TCP].payload) for f in nic.frames if TCP in f))


def read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except BlockingIOError:
        return b""


def test_the_link_follows_passt(nic: Nic, passt: Passt) -> None:
    nic.gateway()
    passt.stop()
    nic.wait(lambda: nic.links == [False])
    passt.start()
    nic.ahead += RECONNECT_INTERVAL
    nic.wait(lambda: nic.links == [False, True], seconds=2 * RECONNECT_INTERVAL / NANOSECONDS + 5)
    nic.gateway()
