# SPDX-License-Identifier: BSD-3-Clause
"""Capture files, read back by scapy and by dpkt."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dpkt import pcap  # type: ignore[import-untyped]
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import rdpcap

from vfio_user.device_models.echo import DEFAULT_MAC, EchoBackend
from vfio_user.device_models.net import Cancellable, NetBackend, Offload, Segmentation
from vfio_user.device_models.timers import Timers
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.pcap import FLUSH_INTERVAL, CaptureBackend

START = 1_700_000_000_123_456_789


@dataclass
class Nic:
    """A device that has room for `room` frames, the wire's time, and a capture of the two."""

    path: Path
    now: int = START
    room: int = 1000
    frames: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.timers = Timers(lambda: self.now)
        self.port: NetBackend = CaptureBackend(
            EchoBackend(), str(self.path), self.call_later, lambda: self.now
        )
        self.port.attach(self)

    def call_later(self, delay: int, callback: Callable[[], None]) -> Cancellable:
        return self.timers.call_at(self.now + delay, callback)

    def receive(self, frame: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(frame)
        return True

    def link_changed(self, up: bool) -> None:
        raise AssertionError


@pytest.fixture
def nic(tmp_path: Path) -> Iterator[Nic]:
    nic = Nic(tmp_path / "nic.pcap")
    yield nic
    nic.port.close()


LINK = Ether(dst=DEFAULT_MAC.hex(":"), src="52:54:00:12:34:56")
PING = bytes(LINK / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(seq=1) / Raw(b"x" * 56))
BURST = bytes(LINK / IP(src="10.0.2.15", dst="10.0.2.2") / TCP() / Raw(b"y" * 5000))
BURST_OFFLOAD = Offload(34, 16, Segmentation.TCPV4, 54, 1448)


def test_both_directions_are_recorded_in_order_with_nanoseconds(nic: Nic) -> None:
    nic.port.send([PING[:30], PING[30:]])
    nic.port.close()
    with nic.path.open("rb") as file:
        records = list(pcap.Reader(file))
    assert [bytes(data) for _, data in records] == [PING, nic.frames[0]]
    assert int(records[0][0] * 10**9) == START
    request, reply = rdpcap(str(nic.path))
    assert (request[ICMP].type, reply[ICMP].type) == (8, 0)


def test_a_burst_is_recorded_as_segments_and_the_counts_agree(nic: Nic) -> None:
    assert nic.port.send([BURST], BURST_OFFLOAD).frames == 4
    nic.port.send([b"short"])
    nic.port.send([bytes(LINK / ARP(psrc="10.0.2.15", pdst="10.0.2.2"))])
    nic.port.close()
    packets = rdpcap(str(nic.path))
    assert [len(p) for p in packets if TCP in p] == [1502, 1502, 1502, 710]
    assert b"".join(bytes(p[TCP].payload) for p in packets if TCP in p) == b"y" * 5000
    counters = nic.port.counters()
    assert (
        len(packets) == counters["sent_frames"] + counters["received_frames"] == counters["captured_frames"]
    )
    assert sum(map(len, packets)) == counters["sent_bytes"] + counters["received_bytes"]
    assert counters["sent_malformed"] == 1


def test_a_refused_frame_is_recorded_once_when_it_is_taken(nic: Nic) -> None:
    nic.room = 0
    nic.port.send([PING])
    nic.port.ready()
    assert nic.port.counters()["captured_frames"] == 1
    nic.room = 1
    nic.port.ready()
    assert nic.port.counters()["captured_frames"] == 2


def test_frames_are_in_the_file_soon(nic: Nic) -> None:
    assert nic.path.stat().st_size == 24
    nic.port.send([PING])
    assert nic.path.stat().st_size == 24
    nic.now += FLUSH_INTERVAL
    nic.timers.run_due()
    assert len(rdpcap(str(nic.path))) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_ends_the_recording_not_the_traffic(nic: Nic, caplog: pytest.LogCaptureFixture) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert isinstance(nic.port, CaptureBackend)
    assert nic.port._file is not None
    os.dup2(full, nic.port._file.fileno())
    os.close(full)
    nic.port.send([PING])
    nic.now += FLUSH_INTERVAL
    nic.timers.run_due()
    assert os.strerror(errno.ENOSPC) in caplog.text
    nic.port.send([PING])
    assert len(nic.frames) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no/dir/x.pcap", "make its directory"),
        (".", "choose another file"),
        ("fifo", "choose another file"),
        ("busy fifo", "not a regular file"),
    ],
)
def test_a_file_that_cannot_be_had(tmp_path: Path, name: str, text: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "busy fifo")
    reader = os.open(tmp_path / "busy fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BackendError, match=text) as caught:
        Nic(tmp_path / name)
    assert "\n" not in str(caught.value)
    os.close(reader)
