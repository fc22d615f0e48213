# SPDX-License-Identifier: BSD-3-Clause
"""The PHY over MDIC: identity, negotiation, forced modes, power-down, the link as driver and MAC see it."""

import pytest

from vfio_user.device_models.e1000.bench import Bench
from vfio_user.device_models.e1000.bits import Cause
from vfio_user.device_models.e1000.phy import NEGOTIATION_TIME

LINK_UP, SPEED = 2, 3 << 6
CONTROL, STATUS, RESET, RESTART, POWER_DOWN = 0, 1, 0x8000, 0x0200, 0x0800


def has_link(bench: Bench) -> bool:
    return bool(bench.read("STATUS") & LINK_UP)


def test_identity_and_the_other_addresses() -> None:
    bench = Bench()
    assert (bench.read_phy(2), bench.read_phy(3)) == (0x0141, 0x0C20)
    for address in (0, 2, 31):
        assert bench.read_phy(2, address) is None


def test_mdic_can_interrupt_and_refuses_an_unknown_operation() -> None:
    bench = Bench()
    bench.write("MDIC", 2 << 16 | 1 << 21 | 2 << 26 | 1 << 29)
    assert bench.read("ICR") & Cause.MDAC
    bench.write("MDIC", 2 << 16 | 1 << 21)
    assert bench.read("MDIC") & 1 << 30


def test_the_link_comes_up_after_negotiation() -> None:
    bench = Bench()
    bench.advance(NEGOTIATION_TIME - 1)
    assert not has_link(bench)
    assert not bench.read_phy(STATUS) or not (bench.read_phy(STATUS) or 0) & 0x24
    bench.advance(1)
    assert has_link(bench)
    assert bench.read("ICR") & Cause.LSC
    bench.read_phy(STATUS)  # latched low, until read
    assert (bench.read_phy(STATUS) or 0) & 0x24 == 0x24
    assert bench.read_phy(17) == 0xAC00
    assert (bench.read_phy(5), bench.read_phy(10)) == (0x41E1, 0x7C00)
    assert bench.read("STATUS") & (SPEED | 1) == 0x81


def test_the_drivers_link_test_after_a_restart() -> None:
    bench = Bench()
    bench.link_up()
    bench.write_phy(CONTROL, 0x1140 | RESTART)
    assert not has_link(bench)
    assert (bench.read_phy(CONTROL) or 0) & RESTART == 0
    bench.advance(4_000_000_000)
    assert has_link(bench)


@pytest.mark.parametrize(
    ("advertise", "gigabit", "status"),
    [
        (0x0DE1, 0x0200, 0x81),
        (0x0DE1, 0x0100, 0x80),
        (0x0DE1, 0, 0x41),
        (0x0081, 0, 0x40),
        (0x0061, 0, 0x01),
        (0x0021, 0, 0x00),
    ],
)
def test_the_best_common_mode_wins(advertise: int, gigabit: int, status: int) -> None:
    bench = Bench()
    bench.write_phy(4, advertise)
    bench.write_phy(9, gigabit)
    bench.write_phy(CONTROL, 0x1140 | RESTART)
    bench.link_up()
    assert bench.read("STATUS") & (SPEED | 3) == status | LINK_UP


def test_nothing_in_common_no_link() -> None:
    bench = Bench()
    bench.write_phy(4, 1)
    bench.write_phy(9, 0)
    bench.write_phy(CONTROL, 0x1140 | RESTART)
    bench.link_up()
    assert not has_link(bench)


def test_forced_modes_have_a_link_at_once() -> None:
    bench = Bench()
    bench.write_phy(CONTROL, 0x2100)
    assert bench.read("STATUS") & (SPEED | 3) == 0x43
    bench.write_phy(CONTROL, 0x0000)
    assert bench.read("STATUS") & (SPEED | 3) == 0x02
    bench.write("CTRL", bench.read("CTRL") | 1 << 11 | 1 << 12 | 2 << 8 | 1)
    assert bench.read("STATUS") & (SPEED | 3) == 0x83


def test_power_down_takes_the_link_and_power_up_brings_it_back() -> None:
    bench = Bench()
    bench.link_up()
    bench.read("ICR")
    bench.write_phy(CONTROL, 0x1140 | POWER_DOWN)
    assert not has_link(bench)
    assert bench.read("ICR") & Cause.LSC
    bench.advance(10 * NEGOTIATION_TIME)
    assert not has_link(bench)
    bench.write_phy(CONTROL, 0x1140)
    bench.link_up()
    assert has_link(bench)
    assert bench.read("ICR") & Cause.LSC


def test_the_cable_is_pulled_and_plugged_at_run_time() -> None:
    bench = Bench()
    bench.start()
    bench.port.set_link(False)
    assert not has_link(bench)
    assert bench.read("ICR") & Cause.LSC
    bench.transmit([b"\xff" * 60])
    assert (bench.port.frames, bench.read("TDH")) == ([], 0)
    bench.port.set_link(True)
    bench.link_up()
    assert has_link(bench)
    assert bench.port.frames == [b"\xff" * 60]
    bench.port.set_link(True)
    assert has_link(bench)


def test_a_cable_that_is_missing_from_the_start() -> None:
    bench = Bench()
    bench.port.set_link(False)
    bench.host.reset()
    bench.device.reset()
    bench.advance(10 * NEGOTIATION_TIME)
    assert not has_link(bench)


def test_the_link_bit_latches_low() -> None:
    bench = Bench()
    bench.link_up()
    bench.read_phy(STATUS)
    bench.port.set_link(False)
    bench.port.set_link(True)
    bench.link_up()
    assert not (bench.read_phy(STATUS) or 0) & 4
    assert (bench.read_phy(STATUS) or 0) & 4


def test_resets_of_the_phy() -> None:
    bench = Bench()
    bench.link_up()
    bench.write_phy(16, 0x0808)
    bench.write_phy(CONTROL, 0x9140)
    assert (bench.read_phy(CONTROL), bench.read_phy(16), has_link(bench)) == (0x1140, 0x0808, False)
    bench.write_phy(CONTROL, 0x2100)
    bench.write("CTRL", bench.read("CTRL") | 1 << 31)
    assert not bench.read("CTRL") & 1 << 31
    assert (bench.read_phy(CONTROL), bench.read_phy(16)) == (0x1140, 0x0068)
    bench.link_up()
    assert has_link(bench)


def test_read_only_registers_and_pages() -> None:
    bench = Bench()
    before = [bench.read_phy(number) for number in (2, 3, 15, 17)]
    for number in (1, 2, 3, 5, 10, 15, 17):
        bench.write_phy(number, 0xFFFF)
    assert [bench.read_phy(number) for number in (2, 3, 15, 17)] == before
    for page, value in ((0x1F, 0x8FFC), (0x1A, 0x8FF0)):
        bench.write_phy(29, page)
        bench.write_phy(30, value)
    bench.write_phy(29, 0x1F)
    assert bench.read_phy(30) == 0x8FFC
    for page in range(0x10000):
        bench.device.mac.phy.write(29, page)
        bench.device.mac.phy.write(30, 1)
    assert len(bench.device.mac.phy.paged) <= 256
