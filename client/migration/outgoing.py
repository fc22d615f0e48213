# SPDX-License-Identifier: BSD-3-Clause
"""The source's side of a migration: rounds while the guest runs, the stop, the last round, the state."""

import time
from collections.abc import Awaitable, Sequence
from typing import Protocol

import trio

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.memory import PAGE
from vfio_user.client.migration.driver import Driver, reason
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import Downtime, Limits, MigrationError, Round, Step, Where
from vfio_user.client.migration.sink import Sink
from vfio_user.client.migration.trail import Trail
from vfio_user.client.vmm_state import save_vmm
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import VfioUserError

ENOUGH = 256 << 10
"""Bytes of a round that show how fast the way is. A round of less shows how long a message takes."""


class Movable(Protocol):
    """The guest, as a migration sees it. `guest.Guest` is one."""

    async def pause(self) -> None:
        """Stop its processors: returns when no access of theirs is under way."""

    def resume(self) -> None: ...

    def move(self, vmms: Sequence[FakeVmm]) -> None:
        """Its devices are behind these from now on; it is stopped."""


class Outgoing:
    """`guest` None: nobody uses the devices but themselves."""

    def __init__(
        self,
        vmms: Sequence[FakeVmm],
        drivers: Sequence[Driver],
        guest: Movable | None,
        limits: Limits,
        trail: Trail,
    ) -> None:
        self.vmms = tuple(vmms)
        self.drivers = tuple(drivers)
        self.ram = vmms[0].ram
        self.rounds: list[Round] = []
        self.state_bytes = [0] * len(drivers)
        self.downtime = Downtime()
        self.paused = False
        """The guest does not run."""
        self._guest = guest
        self._limits = limits
        self._trail = trail
        self._pages = PageSet(self.ram.ranges)
        self._logging: list[int] = []
        self._drained = False
        self._rate = 0.0
        """Bytes a millisecond: how fast the way is, as far as is known."""

    async def send(self, sink: Sink) -> None:
        """All that the other side needs, down to the state of the stopped devices."""
        await self._start_log()
        if self._limits.rounds:
            await self._precopy(sink)
        await self._stop()
        await self._last_round(sink)

    # While the guest runs

    async def _start_log(self) -> None:
        self._trail.begin(Step.LOG)
        self.ram.log = self._pages
        self._pages.mark_all()
        for index, driver in enumerate(self.drivers):
            self._trail.at(Where.SOURCE, index)
            self._logging.append(index)
            await driver.start_log(self.ram.ranges)

    async def _precopy(self, sink: Sink) -> None:
        self._trail.begin(Step.PRECOPY)
        for index, driver in enumerate(self.drivers):
            if driver.pre_copy:
                self._trail.at(Where.SOURCE, index)
                await driver.enter(MigrationState.PRE_COPY)
        for number in range(self._limits.rounds):
            if number and self._fits():
                return
            await self._round(number, sink, stopped=False)
            await self._collect()
        if not self._limits.force and not self._fits():
            self._trail.at(Where.HERE)
            left = f"{self._pages.size} bytes of memory are still dirty"
            raise MigrationError(f"after {self._limits.rounds} rounds, {left}: the guest is too busy")

    def _fits(self) -> bool:
        """What is left can be sent within the downtime. Nobody tells what a device will have to say besides,
        once it stands still."""
        return self._drained and self._pages.size <= self._rate * self._limits.downtime * 1000

    def _measure(self, sent: int, ms: float) -> None:
        rate = sent / max(ms, 1e-3)
        self._rate = rate if sent >= ENOUGH else max(rate, self._rate)

    async def _collect(self) -> None:
        """What the devices have written since the last time is dirty; the rest has been marked at once."""
        for index, driver in enumerate(self.drivers):
            self._trail.at(Where.SOURCE, index)
            await driver.read_log(self._pages)

    async def _round(self, number: int, sink: Sink, *, stopped: bool) -> None:
        """Send the pages that are dirty now; running devices give their state besides."""
        at, pages = self._trail.ms, self._pages.take()
        count = len(pages)
        self._trail.tell(0, count * PAGE, number)
        await self._send_memory(number, pages, sink)
        state = 0 if stopped else await self._read_running(sink)
        ms = self._trail.ms - at
        self._measure(count * PAGE + state, ms)
        self.rounds.append(Round(number, count, count * PAGE, state, at, ms, stopped))

    async def _send_memory(self, number: int, pages: PageSet, sink: Sink) -> None:
        left, sent = pages.size, 0
        for part, offset, length in pages.runs():
            await sink.memory(part.address + offset, part.view[offset : offset + length])
            sent += length
            self._trail.tell(sent, left - sent, number)
            await trio.lowlevel.checkpoint()

    async def _read_running(self, sink: Sink) -> int:
        self._drained, before = True, sum(self.state_bytes)
        for index, driver in enumerate(self.drivers):
            if driver.pre_copy:
                self._drained &= await self._read_state(index, sink, self._limits.round)
        return sum(self.state_bytes) - before

    async def _read_state(self, index: int, sink: Sink, seconds: float | None) -> bool:
        """Whether the device had nothing more before the time was up."""
        end = None if seconds is None else time.perf_counter() + seconds
        while True:
            self._trail.at(Where.SOURCE, index)
            data = await self.drivers[index].read_state()
            if data is None:
                return True
            self.state_bytes[index] += len(data)
            await sink.state(index, data)
            if end is not None and time.perf_counter() > end:
                return False

    # The stop

    async def _stop(self) -> None:
        trail = self._trail
        trail.begin(Step.PAUSE)
        trail.lap()
        self.paused = True
        if self._guest is not None:
            await self._guest.pause()
        pause = trail.lap()
        trail.begin(Step.QUIESCE)
        running = MigrationState.PRE_COPY_P2P if self._limits.rounds else MigrationState.RUNNING_P2P
        for index, driver in enumerate(self.drivers):
            if driver.p2p:
                trail.at(Where.SOURCE, index)
                await driver.enter(running if driver.pre_copy else MigrationState.RUNNING_P2P)
        trail.begin(Step.STOP)
        for index, driver in enumerate(self.drivers):
            trail.at(Where.SOURCE, index)
            await driver.enter(MigrationState.STOP_COPY)
        self.downtime = Downtime(pause=pause, stop=trail.lap())

    async def _last_round(self, sink: Sink) -> None:
        trail, stop = self._trail, self.downtime
        trail.begin(Step.MEMORY)
        await self._collect()
        await self._round(len(self.rounds), sink, stopped=True)
        memory = trail.lap()
        trail.begin(Step.STATE)
        before = sum(self.state_bytes)
        for index in range(len(self.drivers)):
            await self._read_state(index, sink, None)
        await sink.setup([save_vmm(vmm) for vmm in self.vmms])
        self.downtime = Downtime(stop.pause, stop.stop, memory, trail.lap())
        self._add_state(sum(self.state_bytes) - before)

    def _add_state(self, count: int) -> None:
        """The state of the stopped devices belongs to the last round too."""
        last = self.rounds[-1]
        ms = last.ms + self.downtime.state
        self.rounds[-1] = Round(last.number, last.pages, last.bytes, count, last.at, ms, True)

    # The end

    async def finish(self) -> None:
        """The guest runs elsewhere: nothing that fails here matters to it."""
        self._trail.begin(Step.FINISH)
        self.ram.log = None
        for index, driver in enumerate(self.drivers):
            await self._try(index, "not put to STOP", driver.enter(MigrationState.STOP))
        await self._stop_logs()

    async def recover(self) -> str:
        """Let everything run again as before. The reason if a device does not; then the guest stays
        stopped."""
        self.ram.log = None
        wrong: dict[int, str] = {}
        # All of them to P2P first: none must be touched by another while it stands still.
        for step in (Driver.quiet, Driver.resume):
            for index, driver in enumerate(self.drivers):
                try:
                    await step(driver)
                except VfioUserError as error:
                    wrong.setdefault(index, f"device {index}: {reason(error)}")
        await self._stop_logs()
        if wrong:
            return "; ".join(wrong.values())
        if self.paused and self._guest is not None:
            self._guest.resume()
        self.paused = False
        return ""

    async def _stop_logs(self) -> None:
        while self._logging:
            index = self._logging.pop()
            await self._try(index, "its dirty log goes on", self.drivers[index].stop_log())

    async def _try(self, index: int, what: str, work: Awaitable[None]) -> None:
        try:
            await work
        except VfioUserError as error:
            self._trail.note(f"source, device {index}: {what}: {reason(error)}")
