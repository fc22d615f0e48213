# SPDX-License-Identifier: BSD-3-Clause
"""The device that fails on demand fails as it says."""

import pytest

from vfio_user.device_models.device import IrqIndex
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.faulty import (
    CANCEL_ITSELF,
    DMA_READ,
    DMA_WRITE,
    ENDLESS,
    RAISE,
    STORM,
    STORM_INTX,
    STORM_MSI,
    Fault,
    Faulty,
)


def make(fail: str = "nowhere") -> tuple[FakeHost, Faulty]:
    host = FakeHost()
    device = Faulty(host, fail=fail)
    device.config.write(4, b"\x06\x00")
    return host, device


def write(device: Faulty, name: str, value: int) -> None:
    cell = device.registers.cell(name)
    device.regions[0].write(cell.offset, value.to_bytes(cell.width, "little"))


def read(device: Faulty, name: str) -> int:
    cell = device.registers.cell(name)
    return int.from_bytes(device.regions[0].read(cell.offset, cell.width), "little")


def test_it_works_where_it_is_not_asked_to_fail() -> None:
    host, device = make()
    write(device, "WORD", 0x12345678)
    assert read(device, "WORD") == 0x12345678
    host.reset()
    device.reset()
    assert read(device, "WORD") == 0
    assert device.counters()["done"] == 0


def test_registers_that_raise_and_one_that_is_short() -> None:
    _, device = make()
    with pytest.raises(Fault):
        read(device, "RAISES")
    with pytest.raises(Fault):
        write(device, "RAISES", 1)
    assert len(device.regions[0].read(device.registers.cell("WRONG_SIZE").offset, 4)) == 3


def test_places() -> None:
    with pytest.raises(Fault):
        make("constructor")
    with pytest.raises(Fault):
        make("config")
    for place, act in (
        ("reset", lambda device: device.reset()),
        ("region", lambda device: read(device, "WORD")),
        ("unmask", lambda device: device.irq_unmasked(IrqIndex.MSI, 0)),
        ("counters", lambda device: device.counters()),
    ):
        with pytest.raises(Fault):
            act(make(place)[1])


def test_a_task_and_a_timer_that_raise() -> None:
    host, device = make()
    failures: list[tuple[object, Exception]] = []
    host.tasks._on_error = lambda key, error: failures.append((key, error))
    write(device, "START", RAISE)
    host.run()
    assert [type(error) for _, error in failures] == [Fault]
    write(device, "TIMER_RAISES", 1)
    with pytest.raises(Fault):
        host.advance(1)


def test_an_endless_task_lets_others_work_until_it_is_cut() -> None:
    host, device = make()
    write(device, "START", ENDLESS)
    for _ in range(100):
        host.tasks.run_ready()
    assert read(device, "TURNS") == 100
    write(device, "STOP", 1)
    assert host.tasks.idle


def test_dma_good_and_bad() -> None:
    host, device = make()
    write(device, "LENGTH", 16)
    write(device, "ADDRESS", 0x100)
    for kind in (DMA_READ, DMA_WRITE):
        write(device, "START", kind)
        host.run()
    assert read(device, "DONE") == 2
    assert bytes(host.dma.memory[0x100:0x110]) == b"\xfa" * 16
    write(device, "ADDRESS", 2**64 - 8)
    for kind in (DMA_READ, DMA_WRITE):
        write(device, "START", kind)
        host.run()
    assert read(device, "DMA_ERRORS") == 2


def test_storms() -> None:
    host, device = make()
    write(device, "START", STORM_INTX)
    host.run()
    assert (host.irq_rises, host.irq_level) == (STORM // 2, False)
    host.enabled_irqs.add(IrqIndex.MSI)
    write(device, "START", STORM_MSI)
    host.run()
    assert len(host.fired) == STORM


def test_a_task_that_cuts_itself() -> None:
    host, device = make()
    write(device, "START", CANCEL_ITSELF)
    host.run()
    assert (read(device, "DONE"), read(device, "TURNS"), host.tasks.idle) == (1, 0, True)
