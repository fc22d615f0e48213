# SPDX-License-Identifier: BSD-3-Clause
"""Streams of every version so far, as bytes, go into a server of today by each way that there is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from golden import scenes, streams
from migration.control_bed import load, save, serving
from migration.moving import open_yard
from vfio_user.client.control import open_control
from vfio_user.client.migration.driver import Driver
from vfio_user.client.migration.v1 import V1Driver
from vfio_user.client.migration.v2 import V2Driver
from vfio_user.device_models.device import Device, Host
from vfio_user.device_models.e1000.bench import RecordingPort
from vfio_user.device_models.e1000.device import E1000
from vfio_user.device_models.fake_migration import SavedDevice, restore_device, save_device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import SavedSections, save_sections
from vfio_user.protocol.constants import MigrationState

MAKE: dict[str, Callable[[Host], Device]] = {
    "e1000": lambda host: E1000(host, RecordingPort()),
    "scratch": lambda host: Scratch(host, memory=1 << 20),
    "faulty": lambda host: Faulty(host, memory=4096),
}
FILES = [pytest.param(model, path, id=path.stem) for model in scenes.SCENES for path in streams.files(model)]
State = tuple[SavedSections, dict[str, bytes]]


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def state(device: Device) -> State:
    memories = {name: bytes(memory.view) for name, memory in device.memories().items()}
    return save_sections(device.sections()), memories


def expected(model: str, path: Path) -> State:
    """What a device of today has once the file that the stream was made of is loaded, without a server."""
    host, device = scenes.SCENES[model][1]()
    restore_device(host, device, scenes.read(path.with_suffix(".json")))
    saved: SavedDevice = save_device(host, device)
    return dict(saved.sections), saved.memories


def watch(device: Device) -> list[State]:
    """The state each time that one has been loaded, before the device runs with it."""
    seen: list[State] = []
    restored = device.restored

    def note() -> None:
        restored()
        seen.append(state(device))

    device.restored = note  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("model", MAKE)
def test_todays_writer_makes_the_newest_stream(model: str) -> None:
    path = streams.files(model)[-1]
    made = streams.make(scenes.read(path.with_suffix(".json")))
    assert made == bytes_of(path), "cd tests && python -m golden.scenes"
    assert streams.parsed(scenes.SCENES[model][1]()[1], made) == expected(model, path)


def test_the_e1000_has_streams_of_two_versions() -> None:
    _, device = scenes.SCENES["e1000"][1]()
    versions = [streams.parsed(device, bytes_of(path))[0]["receive"][0] for path in streams.files("e1000")]
    assert versions == [1, 2]


async def into(driver: Driver, stream: bytes, size: int) -> None:
    await driver.prepare()
    for place in range(0, len(stream), size):
        await driver.write_state(stream[place : place + size])
    await driver.load()


@pytest.mark.parametrize("size", [997, 1 << 20], ids=["in pieces", "whole"])
@pytest.mark.parametrize(("model", "path"), FILES)
async def test_by_data_messages_of_v2(tmp_path: Path, model: str, path: Path, size: int) -> None:
    wanted = expected(model, path)
    async with open_yard(tmp_path) as yard:
        server = yard.serve(MAKE[model])
        vmm = (await yard.incoming(server)).vmm
        driver = await V2Driver.open(vmm.client)
        assert driver is not None
        seen = watch(server.device)
        await into(driver, bytes_of(path), size)
        assert seen == [wanted]
        await driver.enter(MigrationState.STOP_COPY)
        again = b""
        while (piece := await driver.read_state()) is not None:
            again += piece
        assert streams.parsed(server.device, again) == wanted
        await driver.enter(MigrationState.RUNNING)
        assert await driver.state() is MigrationState.RUNNING
        assert server.native.host.running


@pytest.mark.parametrize("mapped", [False, True], ids=["trapped", "mapped"])
@pytest.mark.parametrize(("model", "path"), FILES)
async def test_by_the_region_of_v1(tmp_path: Path, model: str, path: Path, mapped: bool) -> None:
    async with open_yard(tmp_path) as yard:
        server = yard.serve(MAKE[model])
        vmm = (await yard.incoming(server)).vmm
        driver = await V1Driver.open(vmm.client, mapped=mapped)
        assert driver is not None
        seen = watch(server.device)
        await into(driver, bytes_of(path), 4096)
        assert seen == []
        await driver.enter(MigrationState.RUNNING)
        assert seen == [expected(model, path)]
        assert server.native.host.running
        driver.close()


@pytest.mark.parametrize(("model", "path"), FILES)
async def test_by_the_control_socket(tmp_path: Path, model: str, path: Path) -> None:
    """Before any client: what is loaded waits for one, as a device that was just made."""
    async with serving(tmp_path, MAKE[model]) as served, open_control(served.control_path) as controller:
        device = served.server.device
        assert device is not None
        seen = watch(device)
        assert (await load(controller, path))["bytes"] == len(bytes_of(path))
        assert seen == [expected(model, path)]
        assert (await controller.call("state"))["migration"]["owner"] == "client"
        await save(controller, tmp_path / "again")
        assert streams.parsed(device, bytes_of(tmp_path / "again")) == expected(model, path)
