# SPDX-License-Identifier: BSD-3-Clause
"""What real servers and fake QEMUs say before a move, and the tool then leaves alone (the rows one by one are
in test_guest_move_checks.py)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from guest_moves.scene import Scene, opened_scene
from migration.control_bed import opened, until
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.qemu_migration.report import Refused, Step
from vfio_user.protocol.constants import PCI_NUM_REGIONS, DeviceFeature

Ask = Callable[[FakeVmm], Awaitable[object]]
ASK: dict[str, Ask] = {
    "v2": lambda vmm: vmm.client.get_migration_flags(),
    "v2, the state": lambda vmm: vmm.client.get_feature(DeviceFeature.MIG_DEVICE_STATE),
    "v2, a probe": lambda vmm: vmm.client.probe_feature(DeviceFeature.MIGRATION),
    "v1": lambda vmm: vmm.client.region_read(PCI_NUM_REGIONS, 0, 4),
}
NOT_FOR_A_MOVE: dict[str, Ask] = {
    "where the region is": lambda vmm: vmm.client.get_region_info(PCI_NUM_REGIONS),
    "dirty pages": lambda vmm: vmm.client.dirty_pages_start(),
    "logging": lambda vmm: vmm.client.probe_feature(DeviceFeature.DMA_LOGGING_START),
}
"""A client may ask so for other ends."""


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(tmp_path) as scene:
        yield scene


async def refused(scene: Scene) -> tuple[str, ...]:
    """The reasons; nothing has been touched."""
    before = await scene.state(scene.here), await scene.state(scene.there)
    with pytest.raises(Refused) as raised:
        await scene.move()
    assert scene.steps == [Step.CONNECT, Step.CHECK]
    assert (await scene.state(scene.here), await scene.state(scene.there)) == before
    for qemu in (scene.source, scene.destination):
        assert not {"migrate", "stop", "migrate-set-capabilities"} & set(qemu.commands)
    return raised.value.reasons


async def test_a_view_that_cannot_be_restored(scene: Scene) -> None:
    scene.source.machine = scene.destination.machine = "microvm-11.1"
    (reason,) = await refused(scene)
    assert reason.startswith("dev: the machine microvm-11.1 is neither i440fx nor q35")


async def test_reasons_of_a_view_come_with_all_others(scene: Scene) -> None:
    scene.source.machine = scene.destination.machine = "microvm-11.1"
    scene.source.capabilities["postcopy-ram"] = True
    reasons = await refused(scene)
    assert ["postcopy-ram" in reasons[0], "neither i440fx nor q35" in reasons[1]] == [True, True], reasons


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize("how", ASK)
async def test_a_vmm_that_moves_its_devices_itself(scene: Scene, how: str, side: int) -> None:
    """It has asked how when it took the device, and has done nothing since: it is in RUNNING."""
    await ASK[how](scene.vmms[side])
    (reason,) = await refused(scene)
    name = ("source", "destination")[side]
    assert reason.startswith(f"dev: the {name}'s VMM moves the device itself"), reason
    assert f"asked for the protocol's migration, {how[:2]})" in reason


@pytest.mark.parametrize("how", ASK)
async def test_the_next_client_has_asked_for_nothing(tmp_path: Path, how: str) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        assert (await controller.call("state"))["client"]["migrates_by"] is None
        await ASK[how](vmm)
        assert (await controller.call("state"))["client"]["migrates_by"] == how[:2]
        await vmm.client.reset()  # QEMU does, after it has asked
        assert (await controller.call("state"))["client"]["migrates_by"] == how[:2]
        vmm.client.close()
        state = await until(controller, lambda state: not state["client"]["attached"])
        assert state["client"]["migrates_by"] is None


@pytest.mark.parametrize("how", NOT_FOR_A_MOVE)
async def test_other_questions_say_nothing_of_a_move(tmp_path: Path, how: str) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        await NOT_FOR_A_MOVE[how](vmm)
        assert (await controller.call("state"))["client"]["migrates_by"] is None
