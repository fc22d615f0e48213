# SPDX-License-Identifier: BSD-3-Clause
"""Moves in which something fails at random: the state on its way, either server, either connection, a device
that cannot be saved, or somebody who gives up. `chance` is where all of it comes from.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import trio

from migration.fault_scene import STEPS, Scene
from migration.moving import WAYS, Server, wait_until
from migration.spoilers import SPOILERS, Spoiler
from vfio_user.client.background import background
from vfio_user.client.migration.migrate import Migration
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Progress, Report, Step, Where
from vfio_user.device_models.device import Device
from vfio_user.device_models.state import Section

LOST = ("kill", "hang", "unplug")
"""After these a server is of no use any more."""
ACTIONS = ("cancel", "cancel", "kill", "kill", "unplug", "unplug", "fail", "fail", "hang")
"""A hang costs a time-out: it comes less often."""
PATIENCE = 5.0
LONGEST = 120.0
"""Seconds that an attempt, the way back and a look at what is left may take by their own limits, and more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes wrong in one attempt: `action` hits `victim`, `delay` seconds after `step` has begun."""

    options: Options
    rounds: int
    step: Step | None = None
    action: str = ""
    victim: str = ""
    delay: float = 0.0


def make_plan(chance: Random) -> Plan:
    options = Options(*chance.choice(WAYS), irqs_first=chance.random() < 0.5)
    rounds = chance.randrange(3)
    kind = chance.randrange(6)
    if kind == 0:
        spoil = SPOILERS[chance.choice(list(SPOILERS))]
        return Plan(replace(options, link=partial(Spoiler, spoil=spoil, chance=chance)), rounds)
    if kind == 1:
        return Plan(options, rounds)
    delay = chance.choice([0.0, chance.random() * 0.01])
    victim = chance.choice(["source", "destination"])
    return Plan(options, rounds, chance.choice(STEPS), chance.choice(ACTIONS), victim, delay)


def fail_once(device: Device) -> None:
    """The next time that the device is asked for its state, saved or restored, it fails."""
    sections = device.sections

    def fail() -> Sequence[Section]:
        device.sections = sections  # type: ignore[method-assign]
        raise RuntimeError("as it was told to")

    device.sections = fail  # type: ignore[method-assign]


class Attempt:
    """One move after a plan. `run` it once; then `report`, and `struck`: it has come to what was planned."""

    report: Report

    def __init__(self, scene: Scene, plan: Plan) -> None:
        self.plan = plan
        self.struck = False
        self._scene = scene
        self._due = trio.Event()
        self._migration = Migration(
            scene.source.vmm,
            scene.destination.vmm,
            guest=scene.guest,
            limits=Limits(rounds=plan.rounds, recovery=3 * PATIENCE, timeout=PATIENCE),
            options=replace(plan.options, switch=scene.switch),
            progress=self._progress,
        )

    async def run(self) -> None:
        async with background() as nursery:
            nursery.start_soon(self._strike_later)
            self.report = await self._migration.run()

    def _progress(self, now: Progress) -> None:
        if now.step is self.plan.step and not self._due.is_set():
            self._due.set()
            if not self.plan.delay:
                self._strike()

    async def _strike_later(self) -> None:
        await self._due.wait()
        if self.plan.delay:
            await trio.sleep(self.plan.delay)
            self._strike()

    def _strike(self) -> None:
        self.struck = True
        server, scene = self.victim, self._scene
        vmm = (scene.source if self.plan.victim == "source" else scene.destination).vmm
        actions: Mapping[str, Callable[[], None]] = {
            "kill": server.kill,
            "hang": server.hang,
            "unplug": vmm.client.close,
            "cancel": self._migration.cancel,
            "fail": lambda: fail_once(server.device),
        }
        actions[self.plan.action]()

    @property
    def victim(self) -> Server:
        return self._scene.here if self.plan.victim == "source" else self._scene.there

    @property
    def lost(self) -> Server | None:
        """The server that is of no use any more."""
        return self.victim if self.struck and self.plan.action in LOST else None


async def attempt(scene: Scene, plan: Plan) -> bool:
    """Whether it is known where the guest runs now, and can be moved from there."""
    with trio.fail_after(LONGEST):
        return await _attempt(scene, plan)


async def _attempt(scene: Scene, plan: Plan) -> bool:
    one = Attempt(scene, plan)
    print(plan)  # before: it is what one wants to know of an attempt that does not end
    await one.run()
    report, lost = one.report, one.lost
    print(report)
    heal(scene)
    await scene.check(report, dead=lost)
    judge(one)
    if lost and plan.action == "unplug":  # whole or not, it runs nothing
        await wait_until(lambda: not lost.native.host.running)
    if report.outcome is Outcome.COMPLETED and lost is not scene.there:
        await scene.leave_source()
    elif not report.source_runs:
        return False
    await scene.new_destination()
    return True


def heal(scene: Scene) -> None:
    """A failure that was to come, and was not met."""
    for server in (scene.here, scene.there):
        with suppress(AttributeError, AssertionError):
            del server.device.sections


def judge(one: Attempt) -> None:
    """What is known of the outcome from what was done."""
    report, plan = one.report, one.plan
    if plan.action == "fail" and report.failure is not None:
        assert report.failure.where.value == plan.victim
        assert report.failure.device == 0
        assert "EIO" in report.failure.reason
        assert report.source_runs
    if one.lost is not None and plan.victim == "source" and report.failure is not None:
        assert report.failure.where in (Where.SOURCE, Where.HERE)
        assert not report.source_runs
