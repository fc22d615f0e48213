# SPDX-License-Identifier: BSD-3-Clause
"""A whole migration, from one VM to another: `migrate`, or a `Migration` that can be cancelled.

Until the first device runs at the destination, whatever fails leads back: the destination's devices are
reset, the source's go on. After that there is no way back, for a device that has run may have sent
something that cannot be sent twice; the report says then what runs and what does not.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.memory import PAGE, GuestRam, RamRange
from vfio_user.client.migration.choose import open_drivers
from vfio_user.client.migration.driver import Driver
from vfio_user.client.migration.incoming import Incoming
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


async def _nothing() -> None:
    """No network has to be told."""


def _direct(sink: Sink) -> Sink:
    return sink


def _silent(_progress: Progress) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Options:
    """`source` and `destination` are "v1" or "v2"; None: what the server has, v2 first.

    `page_size` (bytes) is that of the dirty log. `irqs_first`: interrupts before the devices run, as from
    QEMU. `verify`: compare the two memories before the destination runs. `alone`: move several devices
    even if some have no P2P states. `link` is what lies between the hosts: it may slow down, count or spoil
    what passes. `switch` is called when the source stands still and before the destination runs: the time
    to move the wire.
    """

    source: str | None = None
    destination: str | None = None
    page_size: int = PAGE
    mapped: bool = False
    irqs_first: bool = True
    verify: bool = True
    alone: bool = False
    link: Callable[[Sink], Sink] = _direct
    switch: Callable[[], Awaitable[None]] = _nothing


DEFAULT_OPTIONS = Options()
DEFAULT_LIMITS = Limits()


class Migration:
    """One attempt. `run` may be called once."""

    def __init__(
        self,
        source: FakeVmm | Sequence[FakeVmm],
        destination: FakeVmm | Sequence[FakeVmm],
        *,
        guest: Movable | None = None,
        limits: Limits = DEFAULT_LIMITS,
        options: Options = DEFAULT_OPTIONS,
        progress: Callable[[Progress], None] = _silent,
    ) -> None:
        self.source = as_vm(source)
        self.destination = as_vm(destination)
        self._guest = guest
        self._limits = limits
        self._options = options
        self._trail = Trail(progress)
        self._scope = trio.CancelScope()
        self._cancelled = False
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._sink: Sink | None = None
        self._verified = (0, 0.0)
        self._drivers: list[Driver] = []

    def cancel(self) -> None:
        """Give up: `run` leads back as after a failure, if that is still possible."""
        self._cancelled = True
        self._scope.cancel()

    async def run(self) -> Report:
        """The migration and, if it fails, the way back. What is cancelled from outside, or raised by a
        callback, is raised again after the way back."""
        try:
            try:
                failure = await self._attempt()
            except BaseException as error:
                await self._recover(self._trail.failure(error))
                raise
            return await (self._recover(failure) if failure else self._complete())
        finally:
            for driver in self._drivers:
                driver.close()

    async def resume_source(self) -> str:
        """Let the source run again where `run` would not, for who knows that nothing has come of what
        the destination did. The reason if it does not run."""
        return await self._outgoing.recover() if self._outgoing else "nothing was begun"

    async def _attempt(self) -> Failure | None:
        if self._limits.timeout is not None:
            self._scope.deadline = trio.current_time() + self._limits.timeout
        try:
            with self._scope:
                await self._move()
                return None
        except (VfioUserError, OSError) as error:
            return self._trail.failure(error)
        why = "cancelled" if self._cancelled else f"not done within {self._limits.timeout:g} s"
        return self._trail.failure(MigrationError(why))

    # The way there

    async def _move(self) -> None:
        options, trail = self._options, self._trail
        outgoing, incoming = await self._check()
        self._outgoing, self._incoming = outgoing, incoming
        self._sink = sink = options.link(incoming)
        trail.begin(Step.PREPARE)
        ranges = [(part.address, part.size) for part in outgoing.ram.ranges]
        await sink.open(ranges, len(self.source))
        await outgoing.send(sink)
        if options.verify:
            self._verify(outgoing.ram, self.destination[0].ram)
        trail.begin(Step.LOAD)
        trail.lap()
        await sink.complete()
        load = trail.lap()
        trail.begin(Step.SWITCH)
        await options.switch()
        trail.begin(Step.START)
        await incoming.start()
        if self._guest is not None:
            self._guest.move(self.destination)
            self._guest.resume()
        outgoing.paused = False
        outgoing.downtime = replace(outgoing.downtime, load=load, start=trail.lap())

    async def _check(self) -> tuple[Outgoing, Incoming]:
        options, trail = self._options, self._trail
        trail.begin(Step.CHECK)
        if self.source[0].ram is self.destination[0].ram:
            raise MigrationError("source and destination have the same memory")
        source = await self._open(self.source, Where.SOURCE, options.source)
        trail.at(Where.HERE)
        without = [str(index) for index, driver in enumerate(source) if not driver.p2p]
        if len(source) > 1 and without and not options.alone:
            raise MigrationError(f"several devices need P2P states: device {', '.join(without)} has none")
        destination = await self._open(self.destination, Where.DESTINATION, options.destination)
        return (
            Outgoing(self.source, source, self._guest, self._limits, trail),
            Incoming(self.destination, destination, trail, irqs_first=options.irqs_first),
        )

    async def _open(self, vmms: Sequence[FakeVmm], where: Where, protocol: str | None) -> list[Driver]:
        options = self._options
        drivers = await open_drivers(vmms, where, self._trail, protocol, options.page_size, options.mapped)
        self._drivers += drivers
        return drivers

    def _verify(self, source: GuestRam, destination: GuestRam) -> None:
        self._trail.begin(Step.VERIFY)
        begun = time.perf_counter()
        different = compare_memory(source, destination)
        if different:
            first = ", ".join(f"{address:#x}" for address in different[:4])
            raise MigrationError(f"{len(different)} pages of memory differ: {first}, ...")
        pages = sum(part.size for part in source.ranges) // PAGE
        self._verified = (pages, (time.perf_counter() - begun) * 1000)

    # The end

    async def _complete(self) -> Report:
        assert self._outgoing is not None
        with trio.move_on_after(self._limits.recovery) as scope:
            await self._outgoing.finish()
        if scope.cancelled_caught:
            self._trail.note("the source did not answer")
        self._trail.begin(Step.DONE)
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
        ran = self._incoming.ran if self._incoming else None
        if ran is not None:
            return f"device {ran} has run at the destination, as far as one can tell"
        return await self._outgoing.recover()

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
            notes=tuple(self._trail.notes),
            ms=self._trail.ms,
            verified_pages=pages,
            verify_ms=verify_ms,
        )


def as_vm(devices: FakeVmm | Sequence[FakeVmm]) -> tuple[FakeVmm, ...]:
    """The devices of one VM. ValueError when there are none, or when they do not share one memory."""
    vm = (devices,) if isinstance(devices, FakeVmm) else tuple(devices)
    if not vm or any(vmm.ram is not vm[0].ram for vmm in vm):
        raise ValueError("a VM has at least one device, and all of its devices share one memory")
    return vm


def compare_memory(one: GuestRam, other: GuestRam, step: int = 1 << 20) -> list[int]:
    """The addresses of the pages (4 KiB) that differ; both have the same ranges."""
    different = []
    for mine, theirs in zip(one.ranges, other.ranges, strict=True):
        for begin in range(0, mine.size, step):
            end = min(begin + step, mine.size)
            if bytes(mine.view[begin:end]) != bytes(theirs.view[begin:end]):
                different += [mine.address + place for place in _different(mine, theirs, begin, end)]
    return different


def _different(mine: RamRange, theirs: RamRange, begin: int, end: int) -> list[int]:
    places = range(begin, end, PAGE)
    return [place for place in places if mine.view[place : place + PAGE] != theirs.view[place : place + PAGE]]


async def migrate(
    source: FakeVmm | Sequence[FakeVmm],
    destination: FakeVmm | Sequence[FakeVmm],
    *,
    guest: Movable | None = None,
    limits: Limits = DEFAULT_LIMITS,
    options: Options = DEFAULT_OPTIONS,
    progress: Callable[[Progress], None] = _silent,
) -> Report:
    """Move a guest from one VM to another; both are started, the destination by `start_incoming`.

    Never raises for what a server does: see the report.
    """
    migration = Migration(source, destination, guest=guest, limits=limits, options=options, progress=progress)
    return await migration.run()
