# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the control socket stand on: a server in this process, a controller, a VMM."""

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, ControlLost, open_control
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions, open_vmm
from vfio_user.device_models.device import Device, Host
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import DeviceFeature, MigrationState
from vfio_user.protocol.json_rpc import RpcError
from vfio_user.server.control import ControlServer
from vfio_user.server.engines.native import NativeServer, Settings

SMALL_RAM = VmmOptions(((0, 1 << 20),))


@dataclass
class Served:
    server: NativeServer
    path: Path
    control_path: Path
    controls: ControlServer | None = None
    ended: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def serving(
    folder: Path, make: Callable[[Host], Device] = Scratch, name: str = "s"
) -> AsyncIterator[Served]:
    with ExitStack() as stack:
        server = stack.enter_context(NativeServer(Settings(spin_us=0)))
        server.install(make)
        server.listen_at(folder / name)
        served = Served(server, folder / name, folder / f"{name}.control")
        served.controls = ControlServer(server, "native", served.control_path, served.ended.set)
        stack.callback(served.controls.close)
        async with background() as nursery:
            nursery.start_soon(server.run)
            yield served


def make_large(host: Host) -> Scratch:
    return Scratch(host, memory=16 << 20)


@asynccontextmanager
async def opened(
    folder: Path, make: Callable[[Host], Device] = Scratch, name: str = "s", options: VmmOptions = SMALL_RAM
) -> AsyncIterator[tuple[Served, ControlClient, FakeVmm]]:
    """A server, a controller, and a VMM."""
    async with (
        serving(folder, make, name) as served,
        open_control(served.control_path) as controller,
        open_vmm(served.path, options) as vmm,
    ):
        yield served, controller, vmm


async def save(controller: ControlClient, path: Path, **params: Any) -> Any:
    with path.open("wb") as file:
        return await controller.call("save", fd=file.fileno(), **params)


async def load(controller: ControlClient, path: Path) -> Any:
    with path.open("rb") as file:
        return await controller.call("load", fd=file.fileno())


async def copy(vmm: FakeVmm, source: int, target: int, length: int) -> None:
    """Let `scratch` copy, and wait for the interrupt."""
    await vmm.write(0, 0xFE0, source, width=8)
    await vmm.write(0, 0xFE8, target, width=8)
    await vmm.write(0, 0xFF0, length)
    await vmm.write(0, 0xFF8, 1)
    await vmm.intx.wait()
    await vmm.write(0, 0xFFC, 2)
    await vmm.intx.acknowledge()


def listen(vmm: FakeVmm) -> list[tuple[int, int]]:
    """Address and length of each DMA_WRITE that comes from now on."""
    told: list[tuple[int, int]] = []
    write = vmm.dma_write

    def note(address: int, data: m.Payload) -> None:
        told.append((address, len(data)))
        write(address, data)

    vmm.dma_write = note  # type: ignore[method-assign]
    return told


async def set_state(vmm: FakeVmm, state: MigrationState) -> None:
    """As a client that migrates its device by v2."""
    data = layouts.build(m.FeatureMigState(state, 0xFFFFFFFF))
    await vmm.client.set_feature(DeviceFeature.MIG_DEVICE_STATE, data)


def refused(match: str) -> Any:
    return pytest.raises(RpcError, match=match)


async def until(controller: ControlClient, wanted: Callable[[Any], Any]) -> Any:
    """The state once it is as wanted."""
    with trio.fail_after(5):
        while not wanted(state := await controller.call("state")):  # noqa: ASYNC110
            await trio.sleep(0.002)
    return state


async def ignore(controller: ControlClient, method: str, fd: int, **params: Any) -> None:
    with pytest.raises((ControlLost, RpcError)):
        await controller.call(method, fd=fd, **params)
