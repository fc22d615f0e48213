# SPDX-License-Identifier: BSD-3-Clause
"""The stream backend against a real UNIX socket: framing, a slow far end, one that dies and comes back."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfio_user.device_models.net import Cancellable, Offload, Segmentation
from vfio_user.device_models.timers import Timers
from vfio_user.server.net.errors import BackendError
from vfio_user.server.net.stream import (
    MAX_FRAME,
    QUEUE_LIMIT,
    RECONNECT_INTERVAL,
    FramingError,
    Inbox,
    StreamBackend,
    without_padding,
)
from vfio_user.transport.poller import Poller


class Peer:
    """A backend, its device with `room` for frames, and the far end of its wire."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0
        self.timers = Timers(lambda: self.now)
        self.room = 1_000_000
        self.frames: list[bytes] = []
        self.links: list[bool] = []
        self.poller = Poller()
        self.listener: socket.socket | None = None
        self.far: socket.socket | None = None
        self.listen()
        self.backend = StreamBackend(str(path), self.poller, self.call_later)
        self.backend.attach(self)
        self.accept()

    def call_later(self, delay: int, callback: Callable[[], None]) -> Cancellable:
        return self.timers.call_at(self.now + delay, callback)

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()

    def accept(self) -> None:
        assert self.listener is not None
        if self.far is not None:
            self.far.close()
        self.far, _ = self.listener.accept()
        self.far.setblocking(False)

    @property
    def wire(self) -> socket.socket:
        assert self.far is not None
        return self.far

    def hang_up(self) -> None:
        self.wire.close()
        if self.listener is not None:
            self.listener.close()

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.timers.run_due()

    def poll(self) -> None:
        for _ in range(100):
            if not self.poller.poll():
                return
        raise AssertionError("busy")

    def receive(self, frame: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(frame)
        return True

    def link_changed(self, up: bool) -> None:
        self.links.append(up)

    def read_all(self) -> bytes:
        data = bytearray()
        while True:
            try:
                part = self.wire.recv(1 << 20)
            except BlockingIOError:
                return bytes(data)
            data += part
            self.poll()

    def close(self) -> None:
        self.backend.close()
        self.poller.close()
        self.hang_up()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path / "wire")
    yield peer
    peer.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def frame(number: int, length: int = 60) -> bytes:
    return number.to_bytes(14, "big").ljust(length, b"\0")


def unframed(data: bytes) -> list[bytes]:
    frames: list[bytes] = []

    def take(frame: bytes) -> bool:
        frames.append(frame)
        return True

    inbox = Inbox(take)
    left, right = socket.socketpair()
    with left, right:
        for start in range(0, len(data), 50_000):
            left.sendall(data[start : start + 50_000])
            inbox.fill(right)
            assert inbox.deliver()
    return frames


def test_frames_pass_both_ways_and_are_counted(peer: Peer) -> None:
    assert peer.backend.send([frame(1)[:20], frame(1)[20:]]) == (1, 60)
    peer.backend.send([frame(2, 1514)])
    assert peer.read_all() == framed(frame(1), frame(2, 1514))
    peer.wire.send(framed(frame(3), frame(4, 1514), bytes(13), b"", frame(5)))
    peer.poll()
    assert peer.frames == [frame(3), frame(4, 1514), frame(5)]
    counters = peer.backend.counters()
    assert (counters["received_frames"], counters["received_bytes"], counters["received_dropped"]) == (
        3,
        1634,
        2,
    )
    assert (counters["sent_frames"], counters["sent_bytes"], counters["sent_dropped"]) == (2, 1574, 0)


def test_a_burst_goes_out_as_its_segments(peer: Peer) -> None:
    headers = bytes(12) + b"\x08\x00\x45" + bytes(8) + b"\x06" + bytes(22) + b"\x50" + bytes(7)
    assert peer.backend.send([headers, b"x" * 2500], Offload(34, 16, Segmentation.TCPV4, 54, 1000)) == (
        3,
        2662,
    )
    assert [len(one) for one in unframed(peer.read_all())] == [1054, 1054, 554]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(st.integers(14, 400), max_size=20), st.integers(1, 90), st.lists(st.integers(0, 3), max_size=60)
)
def test_any_chunks_and_any_pauses_lose_nothing(
    tmp_path: Path, lengths: list[int], chunk: int, rooms: list[int]
) -> None:
    peer = Peer(tmp_path / "wire")
    sent = [frame(number, length) for number, length in enumerate(lengths)]
    data = framed(*sent)
    rooms_left = iter(rooms)
    for start in range(0, len(data), chunk):
        peer.wire.send(data[start : start + chunk])
        peer.room = next(rooms_left, 1)
        peer.poll()
        peer.backend.ready()
    peer.room = 1000
    peer.backend.ready()
    peer.poll()
    peer.close()
    assert peer.frames == sent


def test_a_device_that_is_not_ready_stops_the_reading(peer: Peer) -> None:
    peer.room = 0
    peer.wire.send(framed(*(frame(i) for i in range(5))))
    peer.poll()
    assert not peer.poller.poll()
    peer.backend.ready()
    assert peer.frames == []
    peer.room = 2
    peer.backend.ready()
    peer.wire.send(framed(frame(5)))
    assert not peer.poller.poll()
    peer.room = 9
    peer.backend.ready()
    peer.poll()
    assert peer.frames == [frame(i) for i in range(6)]


def test_a_slow_far_end_gets_whole_frames_in_order(peer: Peer) -> None:
    peer.wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = [frame(number, 9014) for number in range(200)]
    for one in sent:
        peer.backend.send([one])
    dropped = peer.backend.counters()["sent_dropped"]
    assert 0 < dropped < 200
    got = unframed(peer.read_all())
    assert got == sent[: len(got)]
    assert len(got) == 200 - dropped
    assert sum(map(len, got)) > QUEUE_LIMIT
    peer.poll()
    peer.backend.send([frame(7)])
    assert peer.read_all() == framed(frame(7))


def test_the_link_goes_down_with_the_far_end_and_comes_back(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.wire.send(framed(frame(1)) + framed(frame(2))[:30])
    peer.hang_up()
    peer.poll()
    assert (peer.frames, peer.links, peer.backend.link_up) == ([frame(1)], [False], False)
    assert "closed" in caplog.text
    assert peer.backend.send([frame(3)]) == (1, 60)
    assert peer.backend.counters()["sent_dropped"] == 1
    peer.advance(RECONNECT_INTERVAL)
    assert peer.links == [False]
    peer.listen()
    peer.advance(RECONNECT_INTERVAL)
    peer.accept()
    assert peer.links == [False, True]
    peer.backend.send([frame(4)])
    assert peer.read_all() == framed(frame(4))
    peer.wire.send(framed(frame(5)))
    peer.poll()
    assert peer.frames == [frame(1), frame(5)]


def test_a_far_end_that_dies_while_frames_wait(peer: Peer) -> None:
    for number in range(100):
        peer.backend.send([frame(number, 9014)])
    peer.hang_up()
    peer.backend.send([frame(1)])
    peer.poll()
    assert peer.links == [False]
    peer.listen()
    peer.advance(RECONNECT_INTERVAL)
    peer.accept()
    peer.backend.send([frame(9)])
    assert peer.read_all() == framed(frame(9))


def test_sending_to_a_far_end_that_just_died_drops(peer: Peer) -> None:
    peer.hang_up()
    assert peer.backend.send([frame(1)]) == (1, 60)
    assert (peer.links, peer.backend.counters()["sent_dropped"]) == ([], 1)
    peer.poll()
    assert peer.links == [False]


def test_a_far_end_that_dies_while_the_device_is_not_ready(peer: Peer) -> None:
    peer.room = 0
    peer.wire.send(framed(frame(1), frame(2)))
    peer.poll()
    peer.hang_up()
    peer.poll()
    assert peer.links == []
    peer.room = 10
    peer.backend.ready()
    peer.poll()
    assert (peer.frames, peer.links) == ([frame(1), frame(2)], [False])


def test_lost_framing_ends_the_connection(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    peer.wire.send(framed(frame(1)) + b"GET / HTTP/1.0\r\n\r\n")
    peer.poll()
    assert (peer.frames, peer.links) == ([frame(1)], [False])
    assert f"{MAX_FRAME} is the limit" in caplog.text
    assert peer.wire.recv(1) == b""
    peer.advance(RECONNECT_INTERVAL)
    peer.accept()
    assert peer.links == [False, True]


def test_the_longest_frame() -> None:
    longest = frame(1, MAX_FRAME)
    assert unframed(framed(longest)) == [longest]
    with pytest.raises(FramingError, match="69633 bytes"):
        unframed(framed(frame(1, MAX_FRAME + 1)))


def test_pulling_the_cable_is_not_undone_by_a_new_connection(peer: Peer) -> None:
    peer.backend.set_link(False)
    peer.hang_up()
    peer.poll()
    peer.listen()
    peer.advance(RECONNECT_INTERVAL)
    peer.accept()
    assert (peer.links, peer.backend.link_up) == ([False], False)
    peer.backend.set_link(True)
    assert peer.links == [False, True]


def test_closed_it_comes_back_no_more(peer: Peer) -> None:
    peer.hang_up()
    peer.poll()
    peer.backend.close()
    peer.listen()
    peer.advance(2 * RECONNECT_INTERVAL)
    assert peer.links == [False]
    assert peer.listener is not None
    peer.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.listener.accept()
    peer.backend.close()


def never(delay: int, callback: Callable[[], None]) -> Cancellable:
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent", "no such socket; start passt"),
        ("stale", "nobody listens there"),
        ("file", "nobody listens there"),
        ("x" * 120, "too long; give the path"),
        ("", "where to"),
        ("datagram", "give the path of a UNIX stream socket"),
    ],
)
def test_no_far_end_at_the_start(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagram.bind(str(tmp_path / "datagram"))
    poller = Poller()
    with pytest.raises(BackendError, match=text) as caught:
        StreamBackend(str(tmp_path / name) if name else "", poller, never)
    assert "\n" not in str(caught.value)
    poller.close()
    datagram.close()


def ip_frame(kind: int, packet: bytes) -> bytes:
    return (bytes(12) + kind.to_bytes(2, "big") + packet).ljust(60, b"\0")


@pytest.mark.parametrize(
    ("kind", "packet"),
    [
        (0x0800, b"\x45\0\0\x28" + bytes(36)),  # a bare ACK, IPv4
        (0x86DD, b"\x60\0\0\0\0\x04\x11\x40" + bytes(36)),  # four bytes over IPv6
    ],
    ids=["IPv4", "IPv6"],
)
def test_padding_is_not_sent_on(peer: Peer, kind: int, packet: bytes) -> None:
    padded = ip_frame(kind, packet)
    assert peer.backend.send([padded]).bytes == 60
    assert peer.read_all() == framed(padded[: 14 + len(packet)])


@pytest.mark.parametrize(
    ("kind", "packet"),
    [(0x0806, bytes(28)), (0x0800, b"\x45\0\0\x05"), (0x0800, b"\x45\0\xff\xff"), (0x86DD, bytes(40))],
    ids=["ARP", "too short for IPv4", "longer than the frame", "IPv6 without payload"],
)
def test_what_is_no_padding_stays(kind: int, packet: bytes) -> None:
    padded = ip_frame(kind, packet)
    assert without_padding(padded) == (padded[:54] if kind == 0x86DD else padded)
