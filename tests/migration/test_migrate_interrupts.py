# SPDX-License-Identifier: BSD-3-Clause
"""Interrupts across a move: causes, levels and what the guest has masked go along; eventfds, VFIO's masks and
its automatic mask belong to the connection, and do not.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from migration.moving import PATIENCE, WAYS, open_yard, wait_until
from vfio_user.client.config_space import STATUS as PCI_STATUS
from vfio_user.client.config_space import Capability, CommandBits
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.guest import open_guest
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits
from vfio_user.device_models.scratch import Scratch

DOORBELL, STATUS, DONE = 0xFF8, 0xFFC, 2
TABLE_BAR = 1
VECTOR_CONTROL = 12
MASK_ALL = 1 << 14
INTERRUPT_STATUS = 1 << 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A started source, and a destination that waits."""

    source: FakeVmm
    destination: FakeVmm
    options: Options

    async def move(self) -> FakeVmm:
        limits = Limits(rounds=1)
        (await migrate(self.source, self.destination, limits=limits, options=self.options)).check()
        return self.destination


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]} to {way[1]}")
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(params=[True, False], ids=["eventfds first", "eventfds last"])
async def pair(request: pytest.FixtureRequest, way: tuple[str, str], tmp_path: Path) -> AsyncIterator[Pair]:
    async with open_yard(tmp_path) as yard:
        source = await yard.start(yard.serve(Scratch))
        destination = await yard.incoming(yard.serve(Scratch))
        yield Pair(source.vmm, destination.vmm, Options(*way, irqs_first=request.param))


async def finish_something(vmm: FakeVmm) -> None:
    """A copy of no bytes: it is done at once, and raises the interrupt's cause."""
    await vmm.write(0, DOORBELL, 1)
    with trio.fail_after(PATIENCE):
        while await vmm.read(0, STATUS) != DONE:  # noqa: ASYNC110  # without the interrupt
            await trio.sleep(0.001)


async def quiet(vmm: FakeVmm) -> bool:
    """No interrupt comes, although everything sent before has been answered."""
    await vmm.read(0, STATUS)
    await trio.sleep(0.005)
    return not (vmm.intx.count or vmm.msi.count or vmm.msix.count)


async def test_a_level_that_was_not_handled_fires_there(pair: Pair) -> None:
    await finish_something(pair.source)
    assert pair.source.intx.count == 1
    vmm = await pair.move()
    with trio.fail_after(PATIENCE):
        await vmm.intx.wait()
    assert await vmm.read(0, STATUS) == DONE
    # The automatic mask is on there as well: it fires again when it is unmasked, while it is high.
    await vmm.intx.acknowledge()
    with trio.fail_after(PATIENCE):
        await vmm.intx.wait()
    await vmm.write(0, STATUS, DONE)
    await vmm.intx.acknowledge()
    assert not await vmm.read(0, STATUS)
    await trio.sleep(0.005)
    assert vmm.intx.count == 2


async def test_a_level_that_is_low_fires_nothing(pair: Pair) -> None:
    await finish_something(pair.source)
    await pair.source.write(0, STATUS, DONE)
    assert await quiet(await pair.move())


async def test_a_level_under_vfios_mask_fires_there(pair: Pair) -> None:
    await pair.source.intx.mask()
    await finish_something(pair.source)
    assert await quiet(pair.source)
    vmm = await pair.move()
    with trio.fail_after(PATIENCE):
        await vmm.intx.wait()


async def test_the_guests_interrupt_disable_bit_goes_along(pair: Pair) -> None:
    await pair.source.config.set_command(CommandBits.INTX_DISABLE)
    await finish_something(pair.source)
    vmm = await pair.move()
    assert await quiet(vmm)
    assert await vmm.config.read(PCI_STATUS, 2) & INTERRUPT_STATUS
    await vmm.config.clear_command(CommandBits.INTX_DISABLE)
    with trio.fail_after(PATIENCE):
        await vmm.intx.wait()


async def test_a_level_without_an_eventfd_fires_there_once_there_is_one(pair: Pair) -> None:
    await pair.source.intx.disable()
    await finish_something(pair.source)
    vmm = await pair.move()
    assert not vmm.intx.vectors
    await vmm.intx.enable()
    with trio.fail_after(PATIENCE):
        await vmm.intx.wait()


async def test_a_message_that_could_not_be_sent_is_sent_there(pair: Pair) -> None:
    """MSI without per-vector masks; VFIO's mask belongs to the connection."""
    await pair.source.enable_msi()
    await pair.source.msi.mask()
    await finish_something(pair.source)
    assert await quiet(pair.source)
    vmm = await pair.move()
    with trio.fail_after(PATIENCE):
        await vmm.msi.wait()
    assert await vmm.read(0, STATUS) == DONE
    await trio.sleep(0.005)
    assert (vmm.msi.count, vmm.intx.count) == (1, 0)


@pytest.mark.parametrize("whole", [False, True], ids=["its mask", "the function's mask"])
async def test_a_masked_msix_vector_keeps_its_pending_bit(pair: Pair, whole: bool) -> None:
    source = pair.source
    await source.enable_msix(1)
    place = await source.config.find_capability(Capability.MSIX)
    pending = await source.config.read(place + 8, 4) & ~7
    await source.write(TABLE_BAR, VECTOR_CONTROL, int(not whole))
    control = await source.config.read(place + 2, 2)
    await source.config.write(place + 2, control | MASK_ALL * whole, 2)
    await source.msix.mask(0)  # as a VMM does, which watches the table
    await finish_something(source)
    assert await source.read(TABLE_BAR, pending) == 1
    vmm = await pair.move()
    assert await quiet(vmm)
    assert await vmm.read(TABLE_BAR, pending) == 1
    assert await vmm.read(TABLE_BAR, VECTOR_CONTROL) == int(not whole)
    if whole:
        await vmm.config.write(place + 2, control, 2)
    else:
        await vmm.write(TABLE_BAR, VECTOR_CONTROL, 0)
    assert await quiet(vmm)
    await vmm.msix.unmask(0)
    with trio.fail_after(PATIENCE):
        await vmm.msix.wait()
    assert await vmm.read(TABLE_BAR, pending) == 0
    assert vmm.msix.count == 1


@pytest.mark.parametrize("kind", ["intx", "msi", "msix"])
async def test_a_guest_that_waits_is_woken_wherever_it_is(
    tmp_path: Path, way: tuple[str, str], kind: str
) -> None:
    """Once by a signal that it had not taken before the move, then by one that comes after it."""
    woken = [0]
    async with open_yard(tmp_path) as yard:
        here = await yard.start(yard.serve(Scratch))
        there = await yard.incoming(yard.serve(Scratch))
        if kind != "intx":
            await (here.vmm.enable_msi() if kind == "msi" else here.vmm.enable_msix(1))
        async with open_guest([here.vmm]) as guest:
            device = guest.devices[0]

            async def driver() -> None:
                while True:
                    await getattr(device, kind).wait()
                    if await device.read(0, STATUS) == DONE:
                        await device.write(0, STATUS, DONE)
                        woken[0] += 1
                    if kind == "intx":
                        await device.intx.acknowledge()

            guest.start(driver)
            await guest.pause()
            await finish_something(here.vmm)
            (await migrate(here.vmm, there.vmm, guest=guest, options=Options(*way))).check()
            await wait_until(lambda: woken[0] == 1)
            await device.write(0, DOORBELL, 1)
            await wait_until(lambda: woken[0] == 2)
