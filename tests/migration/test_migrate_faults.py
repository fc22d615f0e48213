# SPDX-License-Identifier: BSD-3-Clause
"""Migrations that fail, at every step and in every way: the source goes on, or the report says why not; and
a device at the destination is either whole and running, or as new.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.fault_scene import LARGE, OPTIONS, STEPS, open_scene
from migration.moving import SOAK, WAYS, open_yard, seeded
from migration.spoilers import SPOILERS, Spoiler
from vfio_user.client.migration.migrate import Migration, migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Outcome, Progress, Step, Where
from vfio_user.device_models.device import Device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.constants import DeviceFeature, MigrationState
from vfio_user.protocol.values import Payload
from vfio_user.server.host import ServerHost


def at(step: Step, action: Callable[[], None]) -> Callable[[Progress], None]:
    """Do it when the migration comes to the step."""

    def progress(now: Progress) -> None:
        if now.step is step:
            action()

    return progress


# The stream


@pytest.mark.parametrize("name", SPOILERS)
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_a_spoilt_state(tmp_path: Path, source: str, destination: str, name: str) -> None:
    with seeded(f"spoilt {source} {destination} {name}") as chance:
        async with open_scene(tmp_path, chance) as scene:
            for _ in range(20 if SOAK else 2):
                link = partial(Spoiler, spoil=SPOILERS[name], chance=chance)
                report = await scene.attempt(Options(source, destination, link=link))
                assert report.failure is not None
                assert (report.failure.where, report.failure.device) == (Where.DESTINATION, 0)
                assert "EINVAL" in report.failure.reason
                assert report.source_runs
                await scene.check(report)
            # Nothing has been lost: over a link that works it arrives.
            report = (await scene.attempt(Options(source, destination))).check()
            await scene.check(report)


@pytest.mark.parametrize(("source", "destination"), WAYS)
@pytest.mark.parametrize("make", [Scratch, Faulty], ids=["less memory", "another model"])
async def test_a_destination_with_another_device(
    tmp_path: Path, source: str, destination: str, make: Callable[[ServerHost], Device]
) -> None:
    async with open_scene(tmp_path, random.Random(1)) as scene:
        await scene.new_destination(make)
        report = await scene.attempt(Options(source, destination))
        assert report.failure is not None
        assert (report.failure.where, report.source_runs) == (Where.DESTINATION, True)
        await scene.guest_goes_on()


# Servers that end or hang


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_a_server_that_is_killed(tmp_path: Path, protocol: str, victim: str, step: Step) -> None:
    async with open_scene(tmp_path, random.Random(2)) as scene:
        server = scene.here if victim == "source" else scene.there
        options = Options(protocol, protocol)
        report = await scene.attempt(options, at(step, server.kill))
        await scene.check(report, dead=server)
        if report.failure is not None:
            assert report.failure.where.value == victim
        late = step in (Step.LOAD, Step.SWITCH, Step.START, Step.FINISH)
        if victim == "source":
            assert not report.source_runs
            assert report.outcome is (Outcome.COMPLETED if late else Outcome.FAILED)
        elif step is not Step.FINISH:
            assert report.outcome is Outcome.FAILED
            assert report.source_runs or (report.failure and report.failure.step is Step.START)


@pytest.mark.parametrize("step", [Step.PREPARE, Step.PRECOPY, Step.STOP, Step.STATE, Step.START])
@pytest.mark.parametrize("victim", ["source", "destination"])
async def test_a_server_that_hangs(tmp_path: Path, victim: str, step: Step) -> None:
    async with open_scene(tmp_path, random.Random(3), OPTIONS) as scene:
        server = scene.here if victim == "source" else scene.there
        report = await scene.attempt(Options("v2", "v2"), at(step, server.hang))
        if victim == "source" and step is Step.START:
            assert report.outcome is Outcome.COMPLETED
            assert "no reply within 1 s" in report.notes[0]
            return
        assert report.failure is not None
        assert "no reply within 1 s" in report.failure.reason
        assert report.source_runs == (victim == "destination")
        if victim == "destination":
            await scene.guest_goes_on()


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
