# SPDX-License-Identifier: BSD-3-Clause
"""The example device under the fake host: with mapped memory, and with every DMA waiting for an answer."""

import pytest

from vfio_user.device_models.device import IrqIndex, RegionIndex
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.scratch import BUSY, DONE, FAILED, Scratch

COMMAND, STATUS, DOORBELL = 0x04, 0xFFC, 0xFF8


def make(mapped: bool, *, bus_master: bool = True) -> tuple[FakeHost, Scratch]:
    host = FakeHost(mapped=mapped)
    device = Scratch(host)
    device.regions[RegionIndex.CONFIG].write(COMMAND, b"\x06\x00" if bus_master else b"\x02\x00")
    return host, device


def ring(device: Scratch, source: int, destination: int, length: int) -> None:
    bar = device.regions[0]
    bar.write(0xFE0, source.to_bytes(8, "little"))
    bar.write(0xFE8, destination.to_bytes(8, "little"))
    bar.write(0xFF0, length.to_bytes(4, "little"))
    bar.write(DOORBELL, bytes(4))


def status(device: Scratch) -> int:
    return int.from_bytes(device.regions[0].read(STATUS, 4), "little")


@pytest.mark.parametrize("mapped", [True, False])
def test_copies_and_interrupts(mapped: bool) -> None:
    host, device = make(mapped)
    host.dma.memory[0x1000:0x1005] = b"hello"
    ring(device, 0x1000, 0x40000, 200_000)
    assert status(device) == BUSY
    host.answer()
    assert status(device) == DONE
    assert host.dma.memory[0x40000:0x40005] == b"hello"
    assert host.irq_level
    device.regions[0].write(STATUS, DONE.to_bytes(4, "little"))
    assert not host.irq_level
    assert status(device) == 0


@pytest.mark.parametrize("mapped", [True, False])
def test_a_copy_outside_of_memory_fails_and_interrupts(mapped: bool) -> None:
    host, device = make(mapped)
    ring(device, 0x1000, 1 << 40, 4)
    host.answer()
    assert status(device) == FAILED
    assert host.irq_level


def test_without_bus_master_nothing_is_copied() -> None:
    host, device = make(True, bus_master=False)
    ring(device, 0, 0x1000, 4)
    host.run()
    assert status(device) == FAILED
    assert host.dma.bytes_read == 0


def test_msix_that_is_masked_stays_pending_and_fires_on_unmask() -> None:
    host, device = make(True)
    host.enabled_irqs.add(IrqIndex.MSIX)
    host.masked.add((IrqIndex.MSIX, 0))
    ring(device, 0, 0x1000, 4)
    host.run()
    pba = device.regions[1]
    assert (host.fired, pba.read(2048, 1)) == ([], b"\x01")
    assert not host.irq_level
    host.masked.clear()
    device.irq_unmasked(IrqIndex.MSIX, 0)
    assert (host.fired, pba.read(2048, 1)) == ([(IrqIndex.MSIX, 0)], b"\x00")


def test_stopped_in_the_middle_the_copy_is_begun_anew() -> None:
    host, device = make(False)
    host.dma.memory[0x1000] = 7
    ring(device, 0x1000, 0x2000, 4)
    host.answer(1)
    host.stop()
    host.answer()
    assert status(device) == BUSY
    host.resume()
    host.answer()
    assert (status(device), host.dma.memory[0x2000]) == (DONE, 7)


def test_reset_cuts_the_copy_and_clears_the_words() -> None:
    host, device = make(False)
    device.regions[0].write(0x10, b"\xff" * 8)
    ring(device, 0, 0x2000, 4)
    host.reset()
    device.reset()
    host.answer()
    assert (status(device), device.regions[0].read(0x10, 8), host.irq_level) == (0, bytes(8), False)
    assert not host.dma.enabled
