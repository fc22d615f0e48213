# SPDX-License-Identifier: BSD-3-Clause
"""Migrations that fail, at every step and in every way: the source goes on, or the report says why not; and
a device at the destination is either whole and running, or as new.
"""

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.moving import MEMORY, SOAK, WAYS, Server, Yard, open_yard, seeded, wait_until
from migration.scratch_guest import Copier
from migration.spoilers import SPOILERS, Spoiler
from vfio_user.client.attachment import Attachment
from vfio_user.client.fake_vmm import QEMU_VERSION, VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.migrate import Migration, migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Progress, Report, Step, Where
from vfio_user.device_models.device import Device
from vfio_user.device_models.faulty import Faulty
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import save_sections
from vfio_user.protocol.constants import DeviceFeature, MigrationState
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.values import Payload
from vfio_user.server.host import ServerHost

SMALL = replace(QEMU_VERSION, capabilities=replace(QEMU_VERSION.capabilities, max_data_xfer_size=4096))
"""Small messages, so that a state has many of them."""
OPTIONS = VmmOptions(memory=MEMORY, version=SMALL, timeout=0.5)
LARGE = 64 * 1024
BEFORE_THE_STOP = (Step.CHECK, Step.PREPARE, Step.LOG, Step.PRECOPY)
STEPS = [step for step in Step if step not in (Step.CHECK, Step.VERIFY, Step.DONE)]


def scratch(host: ServerHost) -> Device:
    return Scratch(host, memory=LARGE)


class Scene:
    """A guest that copies all the time at `here`, and a destination."""

    def __init__(self, yard: Yard, here: Server, source: Attachment, guest: Guest, copier: Copier) -> None:
        self.yard = yard
        self.guest = guest
        self.copier = copier
        self.here = here
        self.source = source
        self.there: Server
        self.destination: Attachment

    async def new_destination(self, make: Callable[[ServerHost], Device] = scratch) -> None:
        self.there = self.yard.serve(make)
        self.destination = await self.yard.incoming(self.there)

    async def attempt(
        self, options: Options, progress: Callable[[Progress], None] = lambda _: None, rounds: int = 1
    ) -> Report:
        return await migrate(
            self.source.vmm,
            self.destination.vmm,
            guest=self.guest,
            limits=Limits(rounds=rounds, recovery=3),
            options=options,
            progress=progress,
        )

    async def guest_goes_on(self) -> None:
        before = self.copier.copies
        await wait_until(lambda: self.copier.copies > before)

    async def check(self, report: Report, dead: Server | None = None) -> None:
        """Somewhere the guest runs, or the report says why not; nowhere is half a device."""
        if report.outcome is Outcome.COMPLETED:
            assert not report.source_runs
            if dead is not self.there:
                await self.guest_goes_on()
            return
        if report.source_runs:
            assert not report.source_reason
            await self.guest_goes_on()
        else:
            assert "device 0" in report.source_reason
            # Nobody stops a guest whose device dies under it; once stopped it stays so.
            assert report.failure is not None
            assert self.guest.vcpus.running == (report.failure.step in BEFORE_THE_STOP)
        if dead is not self.there and "has run" not in report.source_reason:
            assert is_as_new(self.there)


@contextlib.asynccontextmanager
async def open_scene(folder: Path, chance: random.Random) -> AsyncIterator[Scene]:
    async with open_yard(folder, OPTIONS) as yard:
        here = yard.serve(scratch)
        source = await yard.start(here)
        await source.vmm.client.region_write(2, 0, chance.randbytes(LARGE))
        async with open_guest([source.vmm]) as guest:
            copier = Copier(guest.devices[0], chance)
            guest.start(run_while_it_can, copier)
            scene = Scene(yard, here, source, guest, copier)
            await scene.guest_goes_on()
            await scene.new_destination()
            yield scene


async def run_while_it_can(copier: Copier) -> None:
    """A guest whose device has vanished under it ends there."""
    with contextlib.suppress(VfioUserError):
        await copier.run()


def is_as_new(server: Server) -> bool:
    """Its device has the state that a reset leaves, and the engine is out of the migration."""
    device, state = server.device, server.native.host.migration.state
    found, large = device_state(device), bytes(device.memories()["bar2"].view)
    device.reset()
    return found == device_state(device) and not any(large) and state is MigrationState.RUNNING


def device_state(device: Device) -> Mapping[str, object]:
    """All but the configuration space, which the VMM has set up."""
    return {name: saved for name, saved in save_sections(device.sections()).items() if name != "config"}


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
    async with open_scene(tmp_path, random.Random(3)) as scene:
        server = scene.here if victim == "source" else scene.there
        report = await scene.attempt(Options("v2", "v2"), at(step, server.hang))
        if victim == "source" and step is Step.START:
            assert report.outcome is Outcome.COMPLETED
            assert "no reply within 0.5 s" in report.notes[0]
            return
        assert report.failure is not None
        assert "no reply within 0.5 s" in report.failure.reason
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


# Everything, at random


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes wrong in one attempt."""

    options: Options
    rounds: int
    step: Step | None = None
    action: str = ""


def make_plan(chance: random.Random) -> Plan:
    options = Options(*chance.choice(WAYS), irqs_first=chance.random() < 0.5)
    rounds = chance.randrange(3)
    kind = chance.randrange(4)
    if kind == 0:
        spoil = SPOILERS[chance.choice(list(SPOILERS))]
        return Plan(replace(options, link=partial(Spoiler, spoil=spoil, chance=chance)), rounds)
    if kind == 1:
        return Plan(options, rounds)
    return Plan(options, rounds, chance.choice(STEPS), chance.choice(["cancel", "kill", "hang", "unplug"]))


@pytest.mark.timeout(0)
async def test_anything_may_fail_at_any_time(tmp_path: Path) -> None:
    """The destination and what lies between fail at random; the guest must not notice."""
    with seeded("anything") as chance:
        left = 500 if SOAK else 25
        while left > 0:
            folder = tmp_path / str(left)
            folder.mkdir()
            async with open_scene(folder, chance) as scene:
                while left > 0 and await one_attempt(scene, make_plan(chance)):
                    left -= 1
                left -= 1


async def one_attempt(scene: Scene, plan: Plan) -> bool:
    """Whether it is known where the guest runs now, and can be moved from there."""
    report, struck = await try_plan(scene, plan)
    print(plan, report)
    lost = struck and plan.action in ("kill", "hang", "unplug")
    await scene.check(report, dead=scene.there if lost else None)
    if struck and plan.action == "unplug":  # whole or not, it runs nothing
        await wait_until(lambda: not scene.there.native.host.running)
    if report.outcome is Outcome.COMPLETED and not lost:
        await scene.source.close()
        scene.here, scene.source = scene.there, scene.destination
    elif not report.source_runs:
        return False
    await scene.new_destination()
    return True


async def try_plan(scene: Scene, plan: Plan) -> tuple[Report, bool]:
    """The report, and whether the migration has come to the step where something was to happen."""
    struck = False

    def progress(now: Progress) -> None:
        nonlocal struck
        if now.step is plan.step and not struck:
            struck = True
            actions[plan.action]()

    migration = Migration(
        scene.source.vmm,
        scene.destination.vmm,
        guest=scene.guest,
        limits=Limits(rounds=plan.rounds, recovery=3),
        options=plan.options,
        progress=progress,
    )
    actions: dict[str, Callable[[], None]] = {
        "kill": scene.there.kill,
        "hang": scene.there.hang,
        "unplug": scene.destination.vmm.client.close,
        "cancel": migration.cancel,
    }
    return await migration.run(), struck
