# SPDX-License-Identifier: BSD-3-Clause
"""A guest at work on a device, a destination for it, and what must hold after a move that may have failed."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from migration.moving import MEMORY, Make, Server, Yard, open_yard, wait_until
from migration.scratch_guest import Copier
from vfio_user.client.attachment import Attachment
from vfio_user.client.fake_vmm import QEMU_VERSION, VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.migrate import migrate
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.report import Limits, Outcome, Progress, Report, Step
from vfio_user.device_models.device import Device
from vfio_user.device_models.e1000.statistics import STATISTICS
from vfio_user.device_models.scratch import Scratch
from vfio_user.device_models.state import Fields, save_sections
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.host import ServerHost

SMALL = replace(QEMU_VERSION, capabilities=replace(QEMU_VERSION.capabilities, max_data_xfer_size=4096))
"""Small messages, so that a state has many of them."""
OPTIONS = VmmOptions(memory=MEMORY, version=SMALL, timeout=1.0)
"""For tests in which a server may hang."""
PATIENT = replace(OPTIONS, timeout=5.0)
"""For tests in which nothing hangs, and a busy machine must not look like that."""
RECOVERY = 6 * OPTIONS.timeout
"""A server that hangs is asked three times on the way back."""
LARGE = 64 * 1024
BEFORE_THE_STOP = (Step.CHECK, Step.PREPARE, Step.LOG, Step.PRECOPY)
STEPS = [step for step in Step if step not in (Step.CHECK, Step.VERIFY, Step.DONE)]


def scratch(host: ServerHost) -> Device:
    return Scratch(host, memory=LARGE)


class Scene(ABC):
    """A guest that works all the time at `here`, and a destination."""

    there: Server
    destination: Attachment
    ended: VfioUserError | None = None
    """Why the guest has ended."""

    def __init__(self, yard: Yard, here: Server, source: Attachment, guest: Guest) -> None:
        self.yard = yard
        self.guest = guest
        self.here = here
        self.source = source

    @abstractmethod
    def done(self) -> int:
        """How much the guest has done and found right."""

    @abstractmethod
    async def new_destination(self) -> None: ...

    async def switch(self) -> None:  # noqa: B027  # not every device has a network
        """Both stand still: the network goes along."""

    async def switch_back(self) -> None:  # noqa: B027
        """It was too early: the guest goes on at the source."""

    async def finish(self) -> None:  # noqa: B027
        """The guest, which still runs, looks at what it can only look at in the end."""

    async def leave_source(self) -> None:
        """The guest has gone; the destination is where it is now."""
        await self.source.close()
        self.here, self.source = self.there, self.destination

    async def attempt(
        self, options: Options, progress: Callable[[Progress], None] = lambda _: None, rounds: int = 1
    ) -> Report:
        return await migrate(
            self.source.vmm,
            self.destination.vmm,
            guest=self.guest,
            limits=Limits(rounds=rounds, recovery=RECOVERY),
            options=options,
            progress=progress,
        )

    async def guest_goes_on(self) -> None:
        before = self.done()
        await wait_until(lambda: self.done() > before or self.ended is not None)
        assert self.ended is None

    async def run_while_it_can(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Guest code: it ends when the device vanishes under it."""
        try:
            await work()
        except VfioUserError as error:
            self.ended = error

    async def check(self, report: Report, dead: Server | None = None) -> None:
        """Somewhere the guest runs, or the report says why not; nowhere is half a device."""
        if report.outcome is Outcome.COMPLETED:
            assert not report.source_runs
            if dead is not self.there:
                await self.guest_goes_on()
            return
        if report.source_runs:
            assert not report.source_reason
            await self.switch_back()
            await self.guest_goes_on()
        else:
            assert "device 0" in report.source_reason
            # Nobody stops a guest whose device dies under it; once stopped it stays so.
            assert report.failure is not None
            assert self.guest.vcpus.running == (report.failure.step in BEFORE_THE_STOP)
        if dead is not self.there and "has run" not in report.source_reason:
            assert is_as_new(self.there)


class ScratchScene(Scene):
    """The guest copies."""

    def __init__(self, yard: Yard, here: Server, source: Attachment, guest: Guest, copier: Copier) -> None:
        super().__init__(yard, here, source, guest)
        self.copier = copier

    def done(self) -> int:
        return self.copier.copies

    async def new_destination(self, make: Make = scratch) -> None:
        self.there = self.yard.serve(make)
        self.destination = await self.yard.incoming(self.there)


@contextlib.asynccontextmanager
async def open_scene(
    folder: Path, chance: Random, options: VmmOptions = PATIENT
) -> AsyncIterator[ScratchScene]:
    async with open_yard(folder, options) as yard:
        here = yard.serve(scratch)
        source = await yard.start(here)
        await source.vmm.client.region_write(2, 0, chance.randbytes(LARGE))
        async with open_guest([source.vmm]) as guest:
            copier = Copier(guest.devices[0], chance)
            scene = ScratchScene(yard, here, source, guest, copier)
            guest.start(scene.run_while_it_can, copier.run)
            await scene.guest_goes_on()
            await scene.new_destination()
            yield scene


def is_as_new(server: Server) -> bool:
    """Its device has the state that a reset leaves, and the engine is out of the migration."""
    device, state = server.device, server.native.host.migration.state
    found = device_state(device)
    large = any(any(memory.view) for memory in device.memories().values())
    device.reset()
    return found == device_state(device) and not large and state is MigrationState.RUNNING


_NOT_BY_RESET = {"config", "phy", "link", "octets"}
"""Sections: the VMM sets up the configuration space, a link comes up by itself, and then frames may come."""
_COMES_BY_ITSELF = {"ICR", *(register.name for register in STATISTICS)}


def device_state(device: Device) -> Mapping[str, Fields]:
    """What a reset decides."""
    return {
        name: {field: value for field, value in fields.items() if field not in _COMES_BY_ITSELF}
        for name, (_, fields) in save_sections(device.sections()).items()
        if name not in _NOT_BY_RESET
    }
