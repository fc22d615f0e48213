# SPDX-License-Identifier: BSD-3-Clause
"""What every way to take a guest from its VM has in common: time-out, cancel, the way back, the report."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import trio

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.migration.choose import open_drivers
from vfio_user.client.migration.driver import Driver
from vfio_user.client.migration.options import Options
from vfio_user.client.migration.outgoing import Movable, Outgoing
from vfio_user.client.migration.report import (
    Downtime,
    Failure,
    Limits,
    MigrationError,
    Outcome,
    Progress,
    Report,
    Step,
    Where,
)
from vfio_user.client.migration.sink import Sink
from vfio_user.client.migration.trail import Trail
from vfio_user.protocol.errors import VfioUserError


class Attempt(ABC):
    """One attempt. `run` may be called once."""

    def __init__(
        self,
        source: FakeVmm | Sequence[FakeVmm],
        guest: Movable | None,
        limits: Limits,
        options: Options,
        progress: Callable[[Progress], None],
    ) -> None:
        self.source = as_vm(source)
        self.trail = Trail(progress)
        self._guest = guest
        self._limits = limits
        self._options = options
        self._scope = trio.CancelScope()
        self._cancelled = False
        self._outgoing: Outgoing | None = None
        self._sink: Sink | None = None
        self._verified = (0, 0.0)
        self._drivers: list[Driver] = []

    def cancel(self) -> None:
        """Give up: `run` leads back as after a failure, if that is still possible."""
        self._cancelled = True
        self._scope.cancel()

    async def run(self) -> Report:
        """The attempt and, if it fails, the way back. What is cancelled from outside, or raised by a
        callback, is raised again after the way back."""
        try:
            try:
                failure = await self._try()
            except BaseException as error:
                await self._recover(self.trail.failure(error))
                raise
            return await (self._recover(failure) if failure else self._complete())
        finally:
            for driver in self._drivers:
                driver.close()

    async def resume_source(self) -> str:
        """Let the source run again where `run` would not, for who knows that nothing has come of what
        the destination did. The reason if it does not run."""
        return await self._outgoing.recover() if self._outgoing else "nothing was begun"

    async def _try(self) -> Failure | None:
        if self._limits.timeout is not None:
            self._scope.deadline = trio.current_time() + self._limits.timeout
        try:
            with self._scope:
                await self._move()
                return None
        except (VfioUserError, OSError) as error:
            return self.trail.failure(error)
        why = "cancelled" if self._cancelled else f"not done within {self._limits.timeout:g} s"
        return self.trail.failure(MigrationError(why))

    @abstractmethod
    async def _move(self) -> None:
        """All of it, up to where nothing can lead back any more. Sets `_outgoing` and `_sink` on the way."""

    def _stuck(self) -> str:
        """Why nothing leads back, if that is so."""
        return ""

    async def _open(self, vmms: Sequence[FakeVmm], where: Where, protocol: str | None) -> list[Driver]:
        options = self._options
        drivers = await open_drivers(vmms, where, self.trail, protocol, options.page_size, options.mapped)
        self._drivers += drivers
        return drivers

    async def _open_source(self) -> Outgoing:
        self.trail.begin(Step.CHECK)
        drivers = await self._open(self.source, Where.SOURCE, self._options.source)
        self.trail.at(Where.HERE)
        without = [str(index) for index, driver in enumerate(drivers) if not driver.p2p]
        if len(drivers) > 1 and without and not self._options.alone:
            raise MigrationError(f"several devices need P2P states: device {', '.join(without)} has none")
        return Outgoing(self.source, drivers, self._guest, self._limits, self.trail)

    # The end

    async def _complete(self) -> Report:
        assert self._outgoing is not None
        with trio.move_on_after(self._limits.recovery) as scope:
            await self._outgoing.finish()
        if scope.cancelled_caught:
            self.trail.note("the source did not answer")
        self.trail.begin(Step.DONE)
        return self._report(Outcome.COMPLETED)

    async def _recover(self, failure: Failure) -> Report:
        """Source first: every moment of it is downtime."""
        why = "the way back took too long"
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._limits.recovery):
            why = await self._back()
            if self._sink is not None:
                await self._sink.abandon()
        outcome = Outcome.CANCELLED if self._cancelled else Outcome.FAILED
        return self._report(outcome, failure, why)

    async def _back(self) -> str:
        if self._outgoing is None:
            return ""  # nothing was done to it
        return self._stuck() or await self._outgoing.recover()

    def _report(self, outcome: Outcome, failure: Failure | None = None, why: str = "") -> Report:
        outgoing = self._outgoing
        pages, verify_ms = self._verified
        return Report(
            outcome=outcome,
            rounds=tuple(outgoing.rounds) if outgoing else (),
            downtime=outgoing.downtime if outgoing else Downtime(),
            state=tuple(outgoing.state_bytes) if outgoing else (),
            failure=failure,
            source_runs=failure is not None and not why,
            source_reason=why,
            notes=tuple(self.trail.notes),
            ms=self.trail.ms,
            verified_pages=pages,
            verify_ms=verify_ms,
        )


def as_vm(devices: FakeVmm | Sequence[FakeVmm]) -> tuple[FakeVmm, ...]:
    """The devices of one VM. ValueError when there are none, or when they do not share one memory."""
    vm = (devices,) if isinstance(devices, FakeVmm) else tuple(devices)
    if not vm or any(vmm.ram is not vm[0].ram for vmm in vm):
        raise ValueError("a VM has at least one device, and all of its devices share one memory")
    return vm
