# SPDX-License-Identifier: BSD-3-Clause
"""The pure backends: what is counted, what waits for a device that is not ready, the bad wire."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.device_models.backends import Backend, Backlog, NoneBackend
from vfio_user.device_models.net import Cancellable, NetBackend, Offload, Segmentation, WireSize
from vfio_user.device_models.regions import Buffer
from vfio_user.device_models.timers import Timers
from vfio_user.device_models.wire_faults import DELAYED_LIMIT, NO_FAULTS, REORDER_LIMIT, Faults, FaultyBackend

MS = 1_000_000


@dataclass
class Nic:
    """A receiver with room for `room` frames."""

    port: NetBackend
    room: int = 1_000_000
    frames: list[bytes] = field(default_factory=list)
    links: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port.attach(self)

    def receive(self, frame: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(frame)
        return True

    def link_changed(self, up: bool) -> None:
        self.links.append(up)


class LoopBackend(Backend):
    """Gives back what is sent, in order, when the device has room."""

    def __init__(self) -> None:
        super().__init__()
        self.wire: list[bytes] = []
        self.bursts = 0
        self.backlog = Backlog(self._offer)

    def send(self, buffers: Sequence[Buffer], offload: Offload | None = None) -> WireSize:
        self.bursts += 1
        return super().send(buffers, offload)

    def _transmit_frames(self, frames: list[bytes]) -> int:
        self.wire += frames
        for frame in frames:
            assert self.backlog.put(frame)
        return 0

    def ready(self) -> None:
        self.backlog.flush()


class Clock:
    def __init__(self) -> None:
        self.now = 0
        self.timers = Timers(lambda: self.now)

    def call_later(self, delay: int, callback: object) -> Cancellable:
        assert callable(callback)
        return self.timers.call_at(self.now + delay, callback)

    def advance(self, nanoseconds: int) -> None:
        end = self.now + nanoseconds
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            self.now = deadline
            self.timers.run_due()
        self.now = end


def frame(number: int, length: int = 60) -> bytes:
    return number.to_bytes(14, "big").ljust(length, b"\0")


FRAMES = [frame(i) for i in range(200)]
ETHER_IP_TCP = bytes(12) + b"\x08\x00\x45" + bytes(8) + b"\x06" + bytes(22) + b"\x50" + bytes(7)
BURST = Offload(34, 16, Segmentation.TCPV4, 54, 1000)


def test_none_takes_everything_and_counts() -> None:
    backend = NoneBackend()
    assert backend.send([bytes(14), bytes(46)]) == (1, 60)
    assert backend.send([bytes(13)]) == (0, 0)
    assert backend.send([ETHER_IP_TCP, bytes(2500)], BURST) == (3, 2500 + 3 * 54)
    assert backend.send([ETHER_IP_TCP[:40], bytes(2500)], BURST) == (0, 0)
    assert backend.counters() == {
        "sent_frames": 4,
        "sent_bytes": 60 + 2500 + 3 * 54,
        "sent_dropped": 0,
        "sent_malformed": 2,
        "received_frames": 0,
        "received_bytes": 0,
        "received_dropped": 0,
    }


def test_without_a_cable_frames_are_dropped_but_were_sent() -> None:
    backend = NoneBackend()
    nic = Nic(backend)
    backend.set_link(False)
    backend.set_link(False)
    assert backend.send([ETHER_IP_TCP, bytes(2500)], BURST) == (3, 2500 + 3 * 54)
    assert (backend.counters()["sent_dropped"], nic.links) == (3, [False])
    backend.set_link(True)
    backend.send([bytes(60)])
    assert (backend.counters()["sent_dropped"], nic.links, backend.link_up) == (3, [False, True], True)


def test_received_without_cable_or_device_is_dropped() -> None:
    backend = LoopBackend()
    backend.send([frame(1)])
    nic = Nic(backend)
    backend.set_link(False)
    backend._offer(frame(2))
    assert (nic.frames, backend.counters()["received_dropped"]) == ([], 2)


@given(st.lists(st.integers(0, 7), max_size=30))
def test_backlog_keeps_order_and_loses_nothing(rooms: list[int]) -> None:
    backend = LoopBackend()
    nic = Nic(backend, room=0)
    sent = FRAMES[: 3 * len(rooms)]
    for number, room in enumerate(rooms):
        for one in sent[3 * number : 3 * number + 3]:
            backend.send([one])
        nic.room = room
        backend.ready()
    nic.room = 1000
    backend.ready()
    assert nic.frames == sent
    counters = backend.counters()
    assert (counters["received_frames"], counters["received_bytes"]) == (len(sent), 60 * len(sent))


def test_backlog_is_bounded_and_survives_a_call_from_within() -> None:
    taken: list[bytes] = []
    backlog = Backlog(lambda frame: False, limit=2)
    assert [backlog.put(frame(i)) for i in range(3)] == [True, True, False]

    def offer(one: bytes) -> bool:
        again.flush()
        taken.append(one)
        return len(taken) > 3

    again = Backlog(offer)
    for i in range(3):
        again.put(frame(i))
    again.flush()
    assert len(again) == 0
    assert set(taken) == {frame(0), frame(1), frame(2)}


def bad_wire(
    sent: Faults = NO_FAULTS, received: Faults = NO_FAULTS, seed: int = 1
) -> tuple[Nic, LoopBackend, Clock]:
    clock, inner = Clock(), LoopBackend()
    return Nic(FaultyBackend(inner, clock.call_later, sent, received, seed)), inner, clock


def run(nic: Nic, clock: Clock) -> list[bytes]:
    for one in FRAMES:
        nic.port.send([one])
    clock.advance(1000 * MS)
    return nic.frames


def test_without_faults_bursts_stay_whole() -> None:
    nic, inner, _ = bad_wire()
    assert nic.port.send([ETHER_IP_TCP, bytes(2500)], BURST) == (3, 2662)
    assert (inner.bursts, len(inner.wire), len(nic.frames)) == (1, 3, 3)


@pytest.mark.parametrize("direction", ["sent", "received"])
@pytest.mark.parametrize(
    "faults", [Faults(drop=0.3), Faults(corrupt=0.3), Faults(duplicate=0.3), Faults(reorder=0.3)]
)
def test_faults_are_repeatable_and_counted(direction: str, faults: Faults) -> None:
    results = []
    for seed in (1, 1, 2):
        nic, _, clock = bad_wire(**{direction: faults}, seed=seed)
        results.append((run(nic, clock), nic.port.counters()))
    assert results[0] == results[1]
    assert results[0] != results[2]
    frames, counters = results[0]
    name = {"drop": "dropped", "corrupt": "corrupted", "duplicate": "duplicated", "reorder": "reordered"}
    (kind,) = (name[key] for key in name if getattr(faults, key))
    times = counters[f"{direction}_faults_{kind}"]
    assert 30 < times < 90
    falls = sum(a > b for a, b in pairwise(frames))
    differing = sum(a != b for a, b in zip(frames, FRAMES, strict=False))
    check = {
        "dropped": (len(frames), falls) == (len(FRAMES) - times, 0),
        "corrupted": (len(frames), differing) == (len(FRAMES), times),
        "duplicated": (len(frames), falls, set(frames)) == (len(FRAMES) + times, 0, set(FRAMES)),
        "reordered": (sorted(frames), falls) == (FRAMES, times),
    }
    assert check[kind]


def test_corruption_is_one_bit() -> None:
    nic, _, clock = bad_wire(Faults(corrupt=1.0))
    for got, one in zip(run(nic, clock), FRAMES, strict=True):
        assert (int.from_bytes(got, "big") ^ int.from_bytes(one, "big")).bit_count() == 1


def test_delay_keeps_order_and_the_cable_cuts_it() -> None:
    nic, _, clock = bad_wire(Faults(delay=5 * MS), Faults(delay=2 * MS))
    nic.port.send([frame(1)])
    clock.advance(1 * MS)
    nic.port.send([frame(2)])
    clock.advance(5 * MS)
    assert nic.frames == []
    clock.advance(1 * MS)
    assert nic.frames == [frame(1)]
    clock.advance(1 * MS)
    assert nic.frames == [frame(1), frame(2)]
    nic.port.send([frame(3)])
    nic.port.set_link(False)
    clock.advance(10 * MS)
    assert (len(nic.frames), nic.links) == (2, [False])


def test_a_frame_held_back_alone_arrives_later() -> None:
    nic, _, clock = bad_wire(Faults(reorder=1.0))
    nic.port.send([frame(1)])
    clock.advance(REORDER_LIMIT - 1)
    assert nic.frames == []
    clock.advance(1)
    assert nic.frames == [frame(1)]


def test_too_much_under_way_is_dropped() -> None:
    nic, _, clock = bad_wire(Faults(delay=MS))
    for _ in range(DELAYED_LIMIT + 5):
        nic.port.send([frame(0)])
    assert nic.port.counters()["sent_dropped"] == 5
    nic.port.close()
    clock.advance(10 * MS)
    assert nic.frames == []


def test_back_pressure_goes_through_the_bad_wire() -> None:
    nic, inner, _ = bad_wire(received=Faults(duplicate=1e-9))
    nic.room = 0
    inner.backlog = Backlog(inner._offer, limit=1000)
    for number in range(600):
        nic.port.send([frame(number)])
    assert len(inner.backlog) == 600 - 256
    for _ in range(100):
        nic.room = 7
        nic.port.ready()
    assert nic.frames == [frame(number) for number in range(600)]
    assert nic.port.counters()["received_dropped"] == 0
    assert nic.port.counters()["inner_received_frames"] == 600
