# SPDX-License-Identifier: BSD-3-Clause
"""A guest that writes anything anywhere: the e1000 must not raise, run forever, or write where it may not."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfio_user.device_models.e1000.bench import RX_RING, TX_RING, Bench
from vfio_user.device_models.e1000.device import REGISTERS
from vfio_user.device_models.e1000.options import Verify

FRAMES = (b"\xff" * 60, b"\x52\x54\x00\x12\x34\x56" + bytes(1500), b"\x01\x80\xc2\0\0\x01" + bytes(9000), b"")
WORD = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from((0, 1, 2, 0x80, 0x1000, TX_RING, RX_RING, 0xFFFF, 0xFFFFFFFF)),
    st.integers(0, 31).map(lambda bit: 1 << bit),
)
WRITE = st.tuples(st.sampled_from([row.name for row in REGISTERS]), WORD)
DESCRIPTOR = st.tuples(st.integers(0, 1 << 23) | st.integers(0, (1 << 64) - 1), WORD, WORD)
ACTION = st.one_of(
    WRITE,
    st.tuples(st.sampled_from(("TDT", "RDT", "TDLEN", "TCTL", "RCTL")), WORD),
    st.tuples(st.just("deliver"), st.integers(0, len(FRAMES) - 1)),
    st.tuples(st.just("answer"), st.integers(0, 5)),
    st.tuples(st.just("advance"), st.integers(0, 10_000_000)),
    st.tuples(st.just("cable"), st.integers(0, 1)),
    st.tuples(st.just("reset"), st.integers(0, 1)),
    st.tuples(st.just("stop"), st.integers(0, 1)),
)
slow = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def do(bench: Bench, name: str, value: int) -> None:
    if name == "deliver":
        bench.port.offer(FRAMES[value])
    elif name == "answer":
        bench.host.answer(value)
    elif name == "advance":
        bench.host.advance(value)
    elif name == "cable":
        bench.port.set_link(bool(value))
    elif name == "reset":
        bench.host.reset()
        bench.device.reset()
        bench.device.config.write(4, b"\x07\x00")
    elif name == "stop":
        bench.host.stop()
        bench.host.dma.waiting.clear()
        bench.host.resume()
    else:
        bench.write(name, value)
        assert 0 <= bench.read(name) <= 0xFFFFFFFF


@pytest.mark.parametrize("mapped", [True, False])
@slow
@given(actions=st.lists(ACTION, max_size=30), ring=st.lists(DESCRIPTOR, min_size=1, max_size=16))
def test_a_guest_that_does_anything(
    mapped: bool, actions: list[tuple[str, int]], ring: list[tuple[int, int, int]]
) -> None:
    bench = Bench(mapped=mapped)
    bench.host.tasks._on_error = _fail
    bench.start(tx=64, rx=64)
    for index in range(64):
        struct.pack_into("<QII", bench.memory, TX_RING + index * 16, *ring[index % len(ring)])
    for name, value in actions:
        do(bench, name, value)
    bench.run()
    bench.host.reset()
    bench.device.reset()
    assert not bench.host.irq_level
    bench.memory[:] = bytes(len(bench.memory))
    bench.device.config.write(4, b"\x07\x00")
    bench.port.set_link(True)
    bench.start()
    bench.port.frames.clear()
    bench.deliver(FRAMES[0])
    bench.transmit([FRAMES[1]])
    assert (bench.received(), bench.port.frames) == ([FRAMES[0]], [FRAMES[1]])


def _fail(key: object, error: Exception) -> None:
    raise AssertionError(f"task {key!r} raised") from error


@slow
@given(writes=st.lists(st.tuples(st.integers(0, 0x1FFFF), st.binary(min_size=1, max_size=9)), max_size=20))
def test_accesses_of_any_place_and_size(writes: list[tuple[int, bytes]]) -> None:
    bench = Bench()
    bar = bench.device.regions[0]
    for offset, data in writes:
        data = data[: 0x20000 - offset]
        bar.write(offset, data)
        assert len(bar.read(offset, len(data))) == len(data)
        bench.run()


@slow
@given(pins=st.lists(st.integers(0, 0x3FF), max_size=200))
def test_any_wiggling_of_the_eeproms_pins(pins: list[int]) -> None:
    bench = Bench()
    for value in pins:
        bench.write("EECD", value)
        bench.read("EECD")
    eeprom = bench.device.mac.eeprom
    assert len(eeprom.words) == 64
    assert all(0 <= word <= 0xFFFF for word in eeprom.words)


@slow
@given(
    frame=st.binary(min_size=14, max_size=120),
    control=st.integers(0, 0x7FF),
    verify=st.sampled_from((Verify.ALWAYS, Verify.TRUST)),
)
def test_checksums_of_any_frame(frame: bytes, control: int, verify: Verify) -> None:
    bench = Bench(verify=verify)
    bench.start(rctl=1 << 3 | 1 << 4)
    bench.write("RXCSUM", control)
    for kind in (b"\x08\x00\x45", b"\x86\xdd\x60", b"\x81\x00\x00\x01\x08\x00\x45"):
        bench.deliver(frame[:12] + kind + frame[12:])
    assert len(bench.received()) == 3


def test_an_endless_stream_of_doorbells_lets_others_go_first() -> None:
    """A full ring is worked off in bounded batches, with the turn given back after each."""
    bench = Bench()
    bench.start(tx=256)
    for _ in range(255):
        bench.put_data(b"\xff" * 60)
    bench.write("TDT", bench.tail)
    turns = 0
    while bench.host.tasks.ready:
        before = len(bench.port.frames)
        bench.host.tasks.run_ready()
        assert len(bench.port.frames) - before <= 64
        turns += 1
    assert turns == 4
