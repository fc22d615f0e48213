# SPDX-License-Identifier: BSD-3-Clause
"""A guest's move whose control connections are cut, whose server is killed, and one with two devices of which
one is lost: what is left goes on, and the tool says what is not."""

import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_moves.cut_wire import Wire, open_wire
from guest_moves.fake_qemu import FakeQemu, fake_pair
from guest_moves.scene import REGISTER, Scene, home_again, opened_scene
from migration.control_bed import SMALL_RAM, opened
from vfio_user.client.control import ControlClient
from vfio_user.client.fake_vmm import open_vmm
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.report import Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import DeviceRequest, Limits, Request, Writes
from vfio_user.client.server_process import serving

BEFORE = [Step.RECEIVE, Step.LOG, Step.MEASURE, Step.STATE, Step.SETTINGS, Step.PRECOPY, Step.STOP]
BEFORE += [Step.HAND_OVER]
AFTER = [Step.LAST_PASS, Step.RESTORE, Step.START, Step.FINISH]
LIMITS = Limits(timeout=5, stop=1, standstill=2, recovery=3)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(tmp_path) as scene:
        scene.limits = LIMITS
        yield scene


@contextlib.asynccontextmanager
async def wired(scene: Scene, folder: Path, side: int) -> AsyncIterator[Wire]:
    """The move reaches that side's server over a wire."""
    served = scene.servers[side]
    async with open_wire(folder / "wire", served.control_path) as wire:
        served.control_path = wire.path
        yield wire


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize("step", [*BEFORE, *AFTER], ids=lambda step: step.name)
async def test_control_connections_that_end(scene: Scene, tmp_path: Path, step: Step, side: int) -> None:
    """The server lives, and new connections are possible: as when a tunnel was restarted."""
    async with wired(scene, tmp_path, side) as wire:
        scene.writes = Writes.AUTO if step is Step.MEASURE else Writes.HAND_OVER
        scene.at(step, wire.drop)
        report = await scene.move()
        # At the hand-over nothing may be left to ask of a source that had nothing in its log.
        if step in BEFORE and (step, side) != (Step.HAND_OVER, 0):
            assert report.outcome is Outcome.FAILED, report
        if report.outcome is Outcome.FAILED:
            await home_again(scene, report)
        else:
            await arrived(scene, report)


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize("step", [Step.PRECOPY, Step.HAND_OVER, Step.LAST_PASS, Step.START])
async def test_a_way_to_the_server_that_is_cut_for_good(
    scene: Scene, tmp_path: Path, step: Step, side: int
) -> None:
    async with wired(scene, tmp_path, side) as wire:
        scene.at(step, wire.cut)
        report = await scene.move()
        if report.outcome is Outcome.COMPLETED:
            await arrived(scene, report)
            return
        assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
        assert (scene.source.running, scene.destination.ran) == (True, [])
        source_is_known = side == 1
        assert (await scene.state(scene.here))["running"] or not source_is_known
        advice = [line for line in report.by_hand if line.startswith("look for the server of dev")]
        assert len(advice) == (not source_is_known), report.by_hand


async def arrived(scene: Scene, report: Report) -> None:
    assert (report.guest, scene.destination.running, scene.source.running) == ("destination", True, False)
    assert (await scene.state(scene.there))["running"] is True
    assert (await scene.state(scene.here))["running"] is False
    assert await scene.vmms[1].client.region_read(0, REGISTER, 2) == b"\xfe\xca"


@pytest.mark.parametrize("step", [Step.PRECOPY, Step.HAND_OVER, Step.LAST_PASS])
async def test_a_source_server_that_is_killed(tmp_path: Path, step: Step) -> None:
    """The guest goes on without its device, and the tool says so; or it has left already, with all of it."""
    control = tmp_path / "a.control"
    async with (
        serving("scratch", tmp_path / "a", ["--control", str(control)]) as server,
        open_vmm(tmp_path / "a", SMALL_RAM) as vmm,
        opened(tmp_path, name="b", options=SMALL_RAM) as (destination, _, other),
        fake_pair(tmp_path, {"dev": vmm}, {"dev": other}) as (here, there),
    ):

        def tell(progress: Progress) -> None:
            if progress.step is step:
                server.popen.send_signal(signal.SIGKILL)
                server.popen.wait()

        if step is Step.PRECOPY:
            here.may_switch = trio.Event()
        if step is Step.LAST_PASS:
            here.hooks["finish"] = lambda qemu: qemu.fail("failed")
        devices = (DeviceRequest("dev", control, destination.control_path),)
        ends = str(here.path), str(there.path)
        request = Request(*ends, devices, "tcp:127.0.0.1:4444", LIMITS, Writes.HAND_OVER)
        with trio.fail_after(20):
            report = await GuestMigration(request, tell).run()
        if step is Step.HAND_OVER and report.outcome is Outcome.COMPLETED:
            assert (here.running, there.running, report.guest) == (False, True, "destination"), report
            return
        assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
        assert (here.running, there.ran) == (True, [])
        assert not any(here.capabilities.values())
        assert "dev is lost: its server cannot be asked" in report.source
        assert any(
            "the device is lost to this guest, which goes on without it" in line for line in report.by_hand
        )


# Two devices


class Two:
    """A scene with two devices; the move reaches the second one's source server over a wire."""

    def __init__(self, qemus: tuple[FakeQemu, FakeQemu], request: Request, wire: Wire) -> None:
        self.source, self.destination = qemus
        self.request = request
        self.wire = wire

    async def move(self, step: Step, act: Callable[[], None]) -> Report:
        def tell(progress: Progress) -> None:
            if progress.step is step:
                act()

        with trio.fail_after(20):
            return await GuestMigration(self.request, tell).run()


@pytest.mark.parametrize("step", [Step.PRECOPY, Step.HAND_OVER, Step.LAST_PASS])
async def test_one_of_two_devices_is_lost_on_the_way_back(
    tmp_path: Path, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one in the order of the rows; the other one goes on, and all of its things are put back."""
    done, call = list[str](), ControlClient.call

    async def note(control: ControlClient, method: str, **params: Any) -> Any:
        result = await call(control, method, **params)
        done.append(method if params.get("on") is not False else f"{method} off")
        return result

    monkeypatch.setattr(ControlClient, "call", note)
    async with (
        opened(tmp_path, name="a1", options=SMALL_RAM) as (a1, _, vmm_a1),
        opened(tmp_path, name="a2", options=SMALL_RAM) as (a2, a2_control, vmm_a2),
        opened(tmp_path, name="b1", options=SMALL_RAM) as (b1, _, vmm_b1),
        opened(tmp_path, name="b2", options=SMALL_RAM) as (b2, _, vmm_b2),
        open_wire(tmp_path / "wire", a1.control_path) as wire,
        fake_pair(tmp_path, {"one": vmm_a1, "two": vmm_a2}, {"one": vmm_b1, "two": vmm_b2}) as qemus,
    ):
        devices = (
            DeviceRequest("one", wire.path, b1.control_path),
            DeviceRequest("two", a2.control_path, b2.control_path),
        )
        ends = str(qemus[0].path), str(qemus[1].path)
        request = Request(*ends, devices, "tcp:127.0.0.1:4444", LIMITS, Writes.WRITE_THROUGH)
        two = Two(qemus, request, wire)
        if step is Step.PRECOPY:
            two.source.may_switch = trio.Event()
        two.source.hooks["finish"] = lambda qemu: qemu.fail("failed")
        report = await two.move(step, wire.cut)
        assert (report.outcome, report.guest) == (Outcome.FAILED, "source"), report
        assert (two.source.running, two.destination.ran) == (True, [])
        assert not any(two.source.capabilities.values())
        assert "two runs" in report.source
        assert [line.split()[5] for line in report.by_hand if line.startswith("look for")] == ["one:"]
        # Not only as leases end with the connections.
        assert (done.count("log-stop"), done.count("write-through off"), done.count("reset")) == (1, 1, 2)
        state = await a2_control.call("state")
        assert (state["running"], state["transfer"], state["write_through"]) == (True, None, False)
        assert state["dirty_log"]["owner"] is None
