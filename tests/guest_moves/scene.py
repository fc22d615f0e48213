# SPDX-License-Identifier: BSD-3-Clause
"""A move between two QEMUs without a guest, at whose steps anything may happen; what a way back leaves."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from guest_moves.fake_qemu import FakeQemu
from guest_moves.pair import move_request, opened_pair
from migration.control_bed import Served
from vfio_user.client.control import ControlClient
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.report import Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import Limits, Request, Writes

REGISTER = 0x10


@dataclass
class Scene:
    """A device at both sides. `begin` is told of the step that begins."""

    source: FakeQemu
    destination: FakeQemu
    here: ControlClient
    there: ControlClient
    vmms: tuple[FakeVmm, FakeVmm]
    servers: tuple[Served, Served]
    limits: Limits = field(default_factory=lambda: Limits(timeout=5, stop=1, recovery=3))
    writes: Writes = Writes.HAND_OVER
    begin: Callable[[Step], None] = lambda step: None
    migration: GuestMigration | None = None
    steps: list[Step] = field(default_factory=list)

    def request(self) -> Request:
        here, there = self.servers
        ends, paths = (self.source, self.destination), (here.control_path, there.control_path)
        return move_request(ends, paths, self.limits, self.writes)

    def tell(self, progress: Progress) -> None:
        if progress.step not in self.steps:
            self.steps.append(progress.step)
            self.begin(progress.step)

    async def move(self) -> Report:
        self.migration = GuestMigration(self.request(), self.tell)
        with trio.fail_after(20):
            return await self.migration.run()

    async def state(self, control: ControlClient) -> Any:
        return await control.call("state")

    def at(self, step: Step, act: Callable[[], None]) -> None:
        """Do this when the step begins."""
        self.begin = lambda begun: act() if begun is step else None


@asynccontextmanager
async def opened_scene(folder: Path) -> AsyncIterator[Scene]:
    async with opened_pair(folder) as pair:
        await pair.vmms[0].write(0, REGISTER, 0xCAFE)
        yield Scene(*pair.qemus, *pair.controls, pair.vmms, pair.servers)


async def home_again(scene: Scene, report: Report, outcome: Outcome = Outcome.FAILED) -> None:
    """The source's guest and device go on as if nothing had been, and nothing runs at the destination."""
    assert (report.outcome, report.guest) == (outcome, "source"), report
    assert scene.source.running, report
    assert not scene.destination.running
    assert scene.destination.ran == []
    state = await scene.state(scene.here)
    assert (state["running"], state["transfer"], state["write_through"]) == (True, None, False), report
    assert state["dirty_log"]["owner"] is None
    assert await scene.vmms[0].client.region_read(0, REGISTER, 2) == b"\xfe\xca"
    remains = scene.destination.status != "gone"
    assert [line.startswith("end the destination's QEMU") for line in report.by_hand] == [True] * remains
    assert not any(scene.source.capabilities.values())
    assert scene.source.parameters["downtime-limit"] == 300
    assert "its guest runs; dev runs" in report.source
