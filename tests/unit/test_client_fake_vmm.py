# SPDX-License-Identifier: BSD-3-Clause
"""The fake VMM on the native server, in one process: start-up, BARs, interrupts, DMA both ways."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from vfio_user.client.background import background
from vfio_user.client.config_space import Bar, Capability, CommandBits
from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.device_models.scratch import DONE, FAILED, Scratch
from vfio_user.protocol.constants import PciIrq
from vfio_user.server.engines.native import NativeServer, Settings

STATUS = 0xFFC
RAM = ((0, 0x10000), (1 << 32, 0x10000))


@contextlib.asynccontextmanager
async def attached(steps: list[str] | None = None, **options: object) -> AsyncIterator[FakeVmm]:
    """A scratch device and its VMM; afterwards nothing is open that was not before."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    said = [] if steps is None else steps
    with NativeServer(Settings(spin_us=0)) as server:
        server.install(Scratch)
        server.adopt(theirs)
        async with background() as nursery:
            nursery.start_soon(server.run)
            chosen = VmmOptions(**{"memory": RAM, **options})  # type: ignore[arg-type]
            async with open_vmm(ours, chosen, step=said.append) as vmm:
                yield vmm
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # trio's own, made at its first use


async def copy(vmm: FakeVmm, data: bytes) -> bytes:
    """Let the device copy `data` above 4 GiB; what is there after the interrupt."""
    source, destination = RAM[0][0], RAM[1][0] + 0x100
    vmm.ram.write(source, data)
    await vmm.write(0, 0xFE0, source, 8)
    await vmm.write(0, 0xFE8, destination, 8)
    await vmm.write(0, 0xFF0, len(data))
    await vmm.write(0, 0xFF8, 1)
    await vmm.intx.wait()
    assert await vmm.read(0, STATUS) == DONE
    return vmm.ram.read(destination, len(data))


async def test_start_up_in_qemus_order() -> None:
    steps: list[str] = []
    async with attached(steps) as vmm:
        assert [step.split(",")[0] for step in steps] == [
            "VERSION",
            "2 DMA_MAPs",
            "7 region infos",
            "SET_IRQS",
            "2 BARs sized and assigned",
        ]
        assert vmm.bars[0] == Bar(0, 4096, address=0xE000_0000)
        assert vmm.initial_config[:4] == b"\x34\x12\x7a\x5c"
        assert (vmm.rom_size, vmm.posts_writes) == (0, True)
        assert set(await vmm.config.capabilities()) == {Capability.MSI, Capability.MSIX}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("resample", [True, False])
async def test_dma_and_intx(shared: bool, resample: bool) -> None:
    async with attached(shared=shared, resample=resample) as vmm:
        for number in range(3):
            assert await copy(vmm, b"round %d" % number) == b"round %d" % number
            await vmm.write(0, STATUS, DONE)
            await vmm.read(0, STATUS)  # the level is down before the unmask
            await vmm.intx.acknowledge()
        counters = vmm.ram.counters
        assert (counters.reads, counters.writes) == ((0, 0) if shared else (3, 3))
        assert vmm.intx.count == 3


async def test_intx_fires_again_while_its_cause_is_there() -> None:
    async with attached() as vmm:
        await copy(vmm, b"x")
        assert vmm.intx.vectors[0].take() == 0
        await vmm.intx.acknowledge()
        with trio.fail_after(20):
            assert await vmm.intx.wait() == 1


async def test_message_dma_is_refused_while_the_bus_master_is_off() -> None:
    async with attached(shared=False) as vmm:
        await vmm.config.clear_command(CommandBits.BUS_MASTER)
        await vmm.write(0, 0xFF0, 4)
        await vmm.write(0, 0xFF8, 1)
        await vmm.intx.wait()
        assert await vmm.read(0, STATUS) == FAILED


@pytest.mark.parametrize("name", ["msi", "msix"])
async def test_messages_in_place_of_intx(name: str) -> None:
    async with attached() as vmm:
        irqs = {"msi": vmm.msi, "msix": vmm.msix}[name]
        await {"msi": vmm.enable_msi, "msix": vmm.enable_msix}[name](1)
        await vmm.write(0, 0xFF8, 1)
        with trio.fail_after(20):
            assert await irqs.wait() == 1
        assert not vmm.intx.vectors
        await vmm.write(0, STATUS, DONE)
        await {"msi": vmm.disable_msi, "msix": vmm.disable_msix}[name]()
        await copy(vmm, b"by the pin again")


async def test_reset_and_bars_again() -> None:
    async with attached() as vmm:
        await vmm.write(0, 0, 0x1234)
        await vmm.reset()
        assert await vmm.read(0, 0) == 0
        assert vmm.config.bus_master
        assert await vmm.config.read(0x10, 4) == 0xE000_0000


async def test_a_refused_access_is_an_exception() -> None:
    async with attached() as vmm:
        with pytest.raises(RemoteError):
            await vmm.read(0, 0xFFE, 4)
        assert vmm.irqs[PciIrq.MSIX].count == 1
