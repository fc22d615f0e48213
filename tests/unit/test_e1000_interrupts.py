# SPDX-License-Identifier: BSD-3-Clause
"""Causes, masks, throttling and delays; test 3 of `ethtool -t` with a handler as the driver has it."""

from collections.abc import Callable
from typing import Any

import pytest

from vfio_user.device_models.e1000.bench import DATA, IDE, IFCS, RS, Bench
from vfio_user.device_models.e1000.bits import Cause, Rctl

MILLISECOND = 1_000_000
FRAME = b"\xff" * 60
LARGE = b"\xff" * 1514


class Line:
    """The guest's handler on the INTx line: reads ICR as long as the line is high."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seen = 0
        self.calls = 0

    def sleep(self, nanoseconds: int) -> None:
        for _ in range(10):
            while self.bench.host.irq_level:
                self.calls += 1
                self.seen |= self.bench.read("ICR")
            self.bench.advance(nanoseconds // 10)


@pytest.mark.parametrize("options", [{}, {"itr": 1 * MILLISECOND}, {"itr": 5 * MILLISECOND}])
def test_the_drivers_interrupt_test_on_an_unshared_line(options: dict[str, Any]) -> None:
    bench = Bench(**options)
    bench.link_up()
    bench.read("ICR")
    line = Line(bench)
    bench.write("IMC", 0xFFFFFFFF)
    line.sleep(10 * MILLISECOND)
    for bit in range(10):
        mask = 1 << bit
        line.seen = 0
        bench.write("IMC", mask)
        bench.write("ICS", mask)
        line.sleep(10 * MILLISECOND)
        assert not line.seen & mask, "fired though masked"
        line.seen = 0
        bench.write("IMS", mask)
        bench.write("ICS", mask)
        line.sleep(10 * MILLISECOND)
        assert line.seen & mask, "did not fire"
        line.seen = 0
        bench.write("IMC", ~mask & 0x7FFF)
        bench.write("ICS", ~mask & 0x7FFF)
        line.sleep(10 * MILLISECOND)
        assert line.seen == 0, "another fired"
        assert bench.read("ICS") == ~mask & 0x7FFF


def test_mask_registers() -> None:
    bench = Bench()
    bench.write("IMS", 0x55)
    bench.write("IMS", 0x0A)
    assert bench.read("IMS") == 0x5F
    bench.write("IMC", 0x0F)
    assert bench.read("IMS") == 0x50
    bench.write("IMS", 0xFFFFFFFF)
    assert bench.read("IMS") == Cause.ALL


def test_reading_icr_clears_it_and_lowers_the_line() -> None:
    bench = Bench()
    bench.write("IMS", Cause.LSC)
    bench.write("ICS", Cause.LSC | Cause.TXDW)
    assert bench.host.irq_level
    assert bench.read("ICR") == Cause.LSC | Cause.TXDW
    assert bench.read("ICR") == 0
    assert not bench.host.irq_level


def test_writing_icr_acknowledges_and_masking_lowers_the_line() -> None:
    bench = Bench()
    bench.write("IMS", Cause.LSC | Cause.TXDW)
    bench.write("ICS", Cause.LSC | Cause.TXDW)
    bench.write("ICR", Cause.LSC)
    assert (bench.read("ICS"), bench.host.irq_level) == (Cause.TXDW, True)
    bench.write("IMC", Cause.TXDW)
    assert not bench.host.irq_level
    bench.write("IMS", Cause.TXDW)
    assert bench.host.irq_level


def rise_after(bench: Bench, limit: int) -> int:
    """How long it takes until the line rises, in nanoseconds."""
    begin = bench.host.now
    while not bench.host.irq_level and bench.host.now < begin + limit:
        deadline = bench.host.timers.next_deadline()
        bench.advance(limit if deadline is None else deadline - bench.host.now)
    return bench.host.now - begin


def cause_again(bench: Bench) -> None:
    bench.read("ICR")
    bench.write("ICS", Cause.TXDW)


def receive_bulk(bench: Bench, rx: int = 64, rctl: int = Rctl.BAM) -> None:
    """So much has come since the last interrupt that a floor counts at the next; the ring is full again."""
    bench.start(rx=rx, rctl=rctl)
    bench.deliver(*[LARGE] * 7)
    bench.write("RDT", 6)
    bench.read("ICR")


def test_itr_spaces_interrupts() -> None:
    bench = Bench()
    bench.write("ITR", 1000)  # 256 us
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    assert bench.host.irq_level
    cause_again(bench)
    assert not bench.host.irq_level
    assert rise_after(bench, MILLISECOND) == 256_000
    bench.read("ICR")
    bench.advance(300_000)
    bench.write("ICS", Cause.TXDW)
    assert bench.host.irq_level
    assert bench.device.counters()["interrupts"] == 3


def test_a_floor_makes_the_guests_interval_longer_but_never_shorter() -> None:
    for itr, expected in ((0, MILLISECOND), (1000, MILLISECOND), (8000, 2_048_000)):
        bench = Bench(itr=MILLISECOND)
        receive_bulk(bench)
        bench.write("ITR", itr)
        bench.write("IMS", Cause.TXDW)
        bench.write("ICS", Cause.TXDW)
        cause_again(bench)
        assert rise_after(bench, 10 * MILLISECOND) == expected


@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [(7, 20, 5 * MILLISECOND), (7, 200, MILLISECOND), (0, 20, 256_000)],
    ids=["only received", "sent as well", "hardly anything"],
)
def test_a_floor_of_its_own_for_a_guest_that_only_receives(large: int, small: int, expected: int) -> None:
    bench = Bench(itr=MILLISECOND, rx_itr=5 * MILLISECOND)
    bench.start(rx=64, tx=256)
    bench.write("ITR", 1000)  # 256 us
    bench.deliver(*[LARGE] * large)
    bench.transmit([FRAME] * small)
    bench.write("RDT", 6)
    bench.read("ICR")
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    assert rise_after(bench, 10 * MILLISECOND) == expected


def received_until(bench: Bench, frames: int, rctl: int = Rctl.BAM) -> bool:
    """Whether the line has risen once so many more frames are in a ring of 64, long before the floor ends."""
    receive_bulk(bench, rctl=rctl)
    bench.write("IMS", Cause.RXT0 | Cause.RXDMT0)
    bench.deliver(FRAME)
    assert bench.host.irq_level
    bench.read("ICR")
    bench.deliver(*[FRAME] * frames)
    return bench.host.irq_level


@pytest.mark.parametrize(
    ("share", "frames"), [(0, 55), (1, 55), (2, 55)], ids=["half", "a quarter", "an eighth"]
)
def test_a_floor_does_not_hold_back_what_empties_a_full_ring(share: int, frames: int) -> None:
    """63 descriptors are the device's at first; RCTL.RDMTS says what share of 64 is few, and an eighth is."""
    threshold = Rctl.BAM | share << Rctl.RDMTS_SHIFT
    for count, risen in ((frames - 2, False), (frames, True)):
        assert received_until(Bench(itr=5 * MILLISECOND), count, threshold) == risen


@pytest.mark.parametrize("rdtr", [0, 32, 1000, 5000])
def test_a_ring_that_empties_frame_by_frame_is_seen_whatever_delays_the_cause(rdtr: int) -> None:
    bench = Bench(itr=5 * MILLISECOND)
    assert not received_until(bench, 0)
    bench.write("RDTR", rdtr)
    owned = 63
    while not bench.host.irq_level and owned:
        bench.deliver(FRAME)
        owned = (bench.read("RDT") - bench.read("RDH")) % 64
    assert owned == 8


@pytest.mark.parametrize(("rx", "buffers"), [(64, 3), (8, 0)], ids=["256 B", "a ring of 8"])
def test_a_frame_that_needs_more_descriptors_than_are_left_is_not_held_back(rx: int, buffers: int) -> None:
    jumbo, size = b"\xff" * 9014, 2048 >> buffers
    bench = Bench(itr=5 * MILLISECOND)
    bench.start(rx=rx, rctl=Rctl.BAM | Rctl.LPE | buffers << Rctl.BSIZE_SHIFT)
    bench.write("IMS", Cause.RXT0 | Cause.RXDMT0)
    for _ in range(2):  # so much that the floor counts from now on
        bench.deliver(jumbo)
        bench.write("RDT", (bench.read("RDH") - 1) % rx)
        bench.advance(6 * MILLISECOND)
        bench.read("ICR")
    bench.deliver(jumbo)
    bench.read("ICR")
    bench.write("RDT", (bench.read("RDH") - 1) % rx)
    while (bench.read("RDT") - bench.read("RDH")) % rx > 9018 // size:
        assert not bench.host.irq_level
        bench.deliver(jumbo)
    bench.deliver(jumbo)
    assert bench.host.irq_level


def test_a_floor_that_is_not_in_force_does_not_lengthen_what_the_guest_shortens() -> None:
    bench = Bench(rx_itr=5 * MILLISECOND)
    bench.write("ITR", 60_000)
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    assert not bench.host.irq_level
    bench.write("ITR", 0)
    assert bench.host.irq_level


def test_the_guests_own_interval_holds_for_a_full_ring_too() -> None:
    bench = Bench(itr=5 * MILLISECOND)
    bench.write("ITR", 1000)  # 256 us
    assert not received_until(bench, 55)
    assert rise_after(bench, 10 * MILLISECOND) == 256_000


def test_a_ring_that_was_filled_again_does_not_hurry() -> None:
    """The cause is still there from when it was nearly empty; the guest has seen to it since."""
    bench = Bench(itr=5 * MILLISECOND)
    receive_bulk(bench)
    bench.write("IMS", Cause.RXT0 | Cause.RXDMT0)
    bench.deliver(FRAME)
    bench.read("ICR")
    bench.write("IMC", Cause.RXT0 | Cause.RXDMT0)
    bench.deliver(*[FRAME] * 50)
    bench.write("RDT", 57)
    bench.write("IMS", Cause.RXT0 | Cause.RXDMT0)
    assert not bench.host.irq_level
    assert rise_after(bench, 10 * MILLISECOND) == 5 * MILLISECOND


def test_a_floor_does_not_hold_up_round_trips() -> None:
    """Neither those of small frames nor the first frames after them; what is moved in bulk it does."""
    bench = Bench(itr=5 * MILLISECOND)
    receive_bulk(bench)
    bench.write("IMS", Cause.RXT0)
    bench.deliver(FRAME)
    bench.read("ICR")
    assert rise_when_delivered(bench, FRAME) == 5 * MILLISECOND  # much had come before the last one
    for _ in range(10):
        assert rise_when_delivered(bench, FRAME) == 0
    bench.transmit([LARGE] * 7)
    assert rise_when_delivered(bench, LARGE) == 0
    assert rise_when_delivered(bench, FRAME) == 5 * MILLISECOND


def rise_when_delivered(bench: Bench, frame: bytes) -> int:
    """Nanoseconds from a frame to the interrupt for it, which is served."""
    bench.deliver(frame)
    waited = rise_after(bench, 10 * MILLISECOND)
    bench.read("ICR")
    return waited


def test_a_floor_that_was_restored_goes_on() -> None:
    bench = Bench(itr=5 * MILLISECOND)
    receive_bulk(bench)
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    bench.advance(2 * MILLISECOND)
    assert rise_after(bench.moved(), 10 * MILLISECOND) == 3 * MILLISECOND


def test_a_shorter_interval_holds_at_once() -> None:
    bench = Bench()
    bench.write("ITR", 0xFFFF)  # 16.8 ms
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    bench.write("ITR", 100)
    assert rise_after(bench, 20 * MILLISECOND) == 25_600
    cause_again(bench)
    bench.write("ITR", 0)
    assert bench.host.irq_level


def test_a_cause_that_goes_away_while_throttled_does_not_fire() -> None:
    bench = Bench()
    bench.write("ITR", 1000)
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    bench.read("ICR")
    bench.advance(MILLISECOND)
    assert not bench.host.irq_level
    assert bench.host.irq_rises == 1


def receive_one(bench: Bench) -> None:
    bench.deliver(FRAME)


def send_one(bench: Bench) -> None:
    bench.put_data(FRAME, command=IFCS | RS | IDE)
    bench.ring_bell()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(
    ("packet", "absolute", "cause", "act"),
    [("RDTR", "RADV", Cause.RXT0, receive_one), ("TIDV", "TADV", Cause.TXDW, send_one)],
)
def test_delay_timers(
    mapped: bool, packet: str, absolute: str, cause: int, act: Callable[[Bench], None]
) -> None:
    """The packet timer begins anew with each event, up to the end of the absolute timer."""
    bench = Bench(mapped=mapped)
    bench.start()
    bench.write(packet, 10)
    bench.write(absolute, 25)
    act(bench)
    bench.advance(10 * 1024 - 1)
    assert not bench.read("ICR") & cause
    bench.advance(1)
    assert bench.read("ICR") & cause
    for _ in range(3):
        act(bench)
        bench.advance(8 * 1024)
        assert not bench.read("ICR") & cause
    bench.advance(1024)
    assert bench.read("ICR") & cause
    bench.advance(MILLISECOND)
    assert not bench.read("ICR") & cause


def test_the_flush_bits_end_a_delay() -> None:
    bench = Bench()
    bench.start()
    bench.write("RDTR", 1000)
    bench.write("TIDV", 1000)
    receive_one(bench)
    send_one(bench)
    assert not bench.read("ICR") & (Cause.RXT0 | Cause.TXDW)
    bench.write("RDTR", 1000 | 1 << 31)
    bench.write("TIDV", 1000 | 1 << 31)
    assert bench.read("ICR") & (Cause.RXT0 | Cause.TXDW) == Cause.RXT0 | Cause.TXDW
    bench.write("TIDV", 1000 | 1 << 31)
    assert not bench.read("ICR")


def test_transmit_causes() -> None:
    bench = Bench()
    bench.start()
    bench.put_data(FRAME, command=IFCS)
    bench.ring_bell()
    assert bench.read("ICR") == Cause.TXQE
    bench.put_data(FRAME, command=IFCS | RS)
    bench.ring_bell()
    assert bench.read("ICR") == Cause.TXDW | Cause.TXQE
    bench.write("TIDV", 100)
    bench.put_data(FRAME, command=DATA | IFCS | RS)  # not delayed without IDE
    bench.ring_bell()
    assert bench.read("ICR") & Cause.TXDW


def test_the_low_threshold_of_the_transmit_ring() -> None:
    bench = Bench()
    bench.start(tctl=0)
    bench.write("TXDCTL", 1 << 25)
    bench.write("TCTL", 0)
    for _ in range(20):
        bench.put_data(FRAME, command=IFCS)
    bench.ring_bell()
    bench.write("TCTL", 2)
    bench.run()
    assert bench.read("ICR") & Cause.TXD_LOW


def test_interrupts_stay_pending_over_a_stop_of_the_device() -> None:
    bench = Bench()
    bench.write("ITR", 1000)
    bench.write("IMS", Cause.TXDW)
    bench.write("ICS", Cause.TXDW)
    cause_again(bench)
    bench.host.stop()
    bench.advance(10 * MILLISECOND)
    assert not bench.host.irq_level
    bench.host.resume()
    assert rise_after(bench, MILLISECOND) == 256_000
