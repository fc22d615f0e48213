# SPDX-License-Identifier: BSD-3-Clause
"""Migrations that fail, at every step and in every way: the source goes on, or the report says why not; and
a device at the destination is either whole and running, or as new.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.fault_scene import LARGE, OPTIONS, PATIENT, STEPS, Scene, open_scene
from migration.moving import PATIENCE, SOAK, WAYS, Make, open_yard, seeded, wait_until
from migration.nic_scene import open_nic_scene
from migration.spoilers import REASONS, SPOILERS, Spoiler
from vfio_user.client.migration.migrate import Migration, migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Progress, Step, Where
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.constants import DeviceFeature, MigrationState
from vfio_user.protocol.values import Payload


def at(step: Step, action: Callable[[], None]) -> Callable[[Progress], None]:
    """Do it when the migration comes to the step."""

    def progress(now: Progress) -> None:
        if now.step is step:
            action()

    return progress


# The stream


@pytest.mark.parametrize("name", SPOILERS)
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_spoilt_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, destination: str, name: str
) -> None:
    """The same destination is asked again."""
    with seeded(f"spoilt {source} {destination} {name}") as chance:
        async with open_scene(tmp_path, chance) as scene:
            options = Options(source, destination)
            for _ in range(20 if SOAK else 2):
                await refuses(scene, caplog, options, name, chance)
            # Nothing has been lost: over a link that works it arrives.
            report = (await scene.attempt(options)).check()
            await scene.check(report)


@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_spoilt_state_of_an_e1000(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, destination: str
) -> None:
    """Spoilt in each way in turn. The destination is another one each time: the cable of the last one has
    frames in it that have gone to the source since."""
    with seeded(f"spoilt e1000 {source} {destination}") as chance:
        async with open_nic_scene(tmp_path, chance, PATIENT) as scene:
            options = Options(source, destination, switch=scene.switch)
            for name in SPOILERS:
                for _ in range(20 if SOAK else 1):
                    await refuses(scene, caplog, options, name, chance)
                    await scene.new_destination()
            report = (await scene.attempt(options)).check()
            await scene.check(report)
            await scene.finish()


async def refuses(
    scene: Scene, caplog: pytest.LogCaptureFixture, options: Options, name: str, chance: random.Random
) -> None:
    caplog.clear()
    link = partial(Spoiler, spoil=SPOILERS[name], chance=chance)
    report = await scene.attempt(replace(options, link=link))
    assert report.failure is not None
    assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
    assert "EINVAL" in report.failure.reason
    assert REASONS.get(name, "") in refusal(caplog)
    assert report.source_runs
    await scene.check(report)


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    """What the destination's server has said of the state that it refused, once."""
    (said,) = [text for text in caplog.messages if "the state cannot be restored: " in text]
    return said


@pytest.mark.parametrize(("source", "destination"), WAYS)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Scratch, "section bar2: this device has no such memory", id="no memory"),
        pytest.param(
            partial(Scratch, memory=LARGE // 2),
            f"section bar2, field size: {LARGE} bytes from 0, not the {LARGE // 2} of this device",
            id="less memory",
        ),
        pytest.param(Faulty, "field model: it is of scratch, not of faulty", id="another model"),
    ],
)
async def test_a_destination_with_another_device(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, destination: str, make: Make, reason: str
) -> None:
    async with open_scene(tmp_path, random.Random(1)) as scene:
        await scene.new_destination(make)
        report = await scene.attempt(Options(source, destination))
        assert report.failure is not None
        assert (report.failure.where, report.source_runs) == (Where.DESTINATION, True)
        assert "EINVAL" in report.failure.reason
        assert refusal(caplog).endswith(f": {reason}")
        await scene.guest_goes_on()


# Servers that end or hang


LATE = (Step.LOAD, Step.SWITCH, Step.START, Step.FINISH)
"""From here on the source is needed no longer."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_server_that_is_killed(
    tmp_path: Path, source: str, destination: str, victim: str, step: Step
) -> None:
    async with open_scene(tmp_path, random.Random(2)) as scene:
        server = scene.here if victim == "source" else scene.there
        report = await scene.attempt(Options(source, destination), at(step, server.kill))
        await scene.check(report, dead=server)
        if report.failure is not None:
            assert report.failure.where.value == victim
        if victim == "source":
            assert not report.source_runs
            assert report.outcome is (Outcome.COMPLETED if step in LATE else Outcome.FAILED)
        elif step is not Step.FINISH:
            assert report.outcome is Outcome.FAILED
            assert report.source_runs or (report.failure and report.failure.step is Step.START)


AT_SOURCE = (
    *(Step.LOG, Step.PRECOPY, Step.PAUSE, Step.QUIESCE, Step.STOP),
    *(Step.MEMORY, Step.STATE, Step.LOAD, Step.START, Step.FINISH),
)
AT_DESTINATION = (Step.PREPARE, Step.PRECOPY, Step.STATE, Step.LOAD, Step.SWITCH, Step.START)
"""Steps at which it is asked something: elsewhere a hang is found at the next of these."""


@pytest.mark.parametrize("step", AT_SOURCE)
@pytest.mark.parametrize(("source", "destination"), [("v1", "v2"), ("v2", "v1")])
async def test_a_source_that_hangs(tmp_path: Path, source: str, destination: str, step: Step) -> None:
    """The destination is as new, or has the guest."""
    async with open_scene(tmp_path, random.Random(3), OPTIONS) as scene:
        report = await scene.attempt(Options(source, destination), at(step, scene.here.hang))
        await scene.check(report)
        if step in LATE:
            assert report.outcome is Outcome.COMPLETED
            assert "no reply within 1 s" in report.notes[0]
            return
        assert report.failure is not None
        assert (report.failure.where, report.failure.device) == (Where.SOURCE, 0)
        assert "no reply within 1 s" in report.failure.reason
        assert not report.source_runs


async def test_a_guest_whose_access_is_never_answered_can_be_stopped(tmp_path: Path) -> None:
    async with open_scene(tmp_path, random.Random(6), OPTIONS) as scene:
        scene.here.hang()
        scene.guest.start(scene.run_while_it_can, partial(scene.guest.devices[0].read, 0, 0))
        await wait_until(lambda: scene.source.vmm.client.link.under_way > 0)
        with trio.fail_after(PATIENCE):
            await scene.guest.pause()


@pytest.mark.parametrize("step", AT_DESTINATION)
@pytest.mark.parametrize(("source", "destination"), [("v1", "v2"), ("v2", "v1")])
async def test_a_destination_that_hangs(tmp_path: Path, source: str, destination: str, step: Step) -> None:
    async with open_scene(tmp_path, random.Random(3), OPTIONS) as scene:
        report = await scene.attempt(Options(source, destination), at(step, scene.there.hang))
        await scene.check(report, dead=scene.there)
        assert report.failure is not None
        assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
        assert "no reply within 1 s" in report.failure.reason
        assert report.source_runs
        assert report.notes
        assert all("not reset" in note for note in report.notes)


@pytest.mark.parametrize("step", [step for step in Step if step not in (Step.CHECK, Step.FINISH, Step.DONE)])
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_cancelled(tmp_path: Path, source: str, destination: str, step: Step) -> None:
    async with open_scene(tmp_path, random.Random(5)) as scene:
        options = Options(source, destination, switch=trio.lowlevel.checkpoint)
        migration = Migration(
            scene.source.vmm,
            scene.destination.vmm,
            guest=scene.guest,
            limits=Limits(rounds=1),
            options=options,
            progress=at(step, lambda: migration.cancel()),
        )
        report = await migration.run()
        assert report.failure is not None
        assert (report.outcome, report.failure.reason) == (Outcome.CANCELLED, "cancelled")
        assert (report.source_runs, report.notes) == (True, ())
        await scene.check(report)
        report = (await scene.attempt(options)).check()
        await scene.check(report)


async def test_unknown_whether_the_destination_runs(tmp_path: Path) -> None:
    """The request to run is sent, and no answer comes: the source must not run beside it. Who knows better
    may say so."""
    async with open_scene(tmp_path, random.Random(4)) as scene:
        client = scene.destination.vmm.client
        set_feature = client.set_feature

        async def hang_at_running(feature: DeviceFeature, data: Payload = b"") -> Payload:
            if data[:1] == bytes([MigrationState.RUNNING]):
                scene.there.hang()
                await trio.sleep(0.01)
            return await set_feature(feature, data)

        client.set_feature = hang_at_running  # type: ignore[method-assign]
        migration = Migration(
            scene.source.vmm, scene.destination.vmm, guest=scene.guest, options=Options("v2", "v2")
        )
        report = await migration.run()
        assert report.failure is not None
        assert report.failure.step is Step.START
        assert not report.source_runs
        assert report.source_reason == "device 0 has run at the destination, as far as one can tell"
        assert not scene.guest.vcpus.running
        assert await migration.resume_source() == ""
        await scene.guest_goes_on()


# Devices that fail


@pytest.mark.parametrize(("source", "destination"), WAYS)
@pytest.mark.parametrize("place", ["save", "take", "log", "state"])
async def test_a_source_whose_device_fails(tmp_path: Path, source: str, destination: str, place: str) -> None:
    """The device goes on where it was; the second attempt succeeds where the first was the only failure."""
    once = "state" if place == "state" else f"{place}-once"
    async with open_yard(tmp_path) as yard:
        here = await yard.start(yard.serve(partial(Faulty, fail=once, memory=LARGE)))
        there = await yard.incoming(yard.serve(partial(Faulty, memory=LARGE)))
        await here.vmm.write(0, 0, 0x600D)
        await here.vmm.client.region_write(2, 0, b"large" * 1000)
        options = Options(source, destination)
        report = await migrate(here.vmm, there.vmm, options=options)
        assert report.failure is not None
        at_source = place != "state"
        assert report.failure.where is (Where.SOURCE if at_source else Where.DESTINATION)
        assert report.source_runs
        assert await here.vmm.read(0, 0) == 0x600D
        assert await there.vmm.read(0, 0) == 0
        if at_source:
            (await migrate(here.vmm, there.vmm, options=options)).check()
            assert await there.vmm.read(0, 0) == 0x600D
            assert (await there.vmm.client.region_read(2, 0, 5000)) == b"large" * 1000


@pytest.mark.parametrize(("source", "destination"), WAYS)
@pytest.mark.parametrize("place", ["load", "apply", "restored", "adopt"])
async def test_a_destination_whose_device_fails(
    tmp_path: Path, source: str, destination: str, place: str
) -> None:
    async with open_yard(tmp_path) as yard:
        here = await yard.start(yard.serve(partial(Faulty, memory=LARGE)))
        there = await yard.incoming(yard.serve(partial(Faulty, fail=f"{place}-once", memory=LARGE)))
        await here.vmm.write(0, 0, 0x600D)
        options = Options(source, destination)
        report = await migrate(here.vmm, there.vmm, options=options)
        assert report.failure is not None
        assert report.failure.step is (Step.LOAD if destination == "v2" else Step.START)
        assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
        assert report.source_runs
        assert (await here.vmm.read(0, 0), await there.vmm.read(0, 0)) == (0x600D, 0)
        (await migrate(here.vmm, there.vmm, options=options)).check()
        assert await there.vmm.read(0, 0) == 0x600D
