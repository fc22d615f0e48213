# SPDX-License-Identifier: BSD-3-Clause
"""A guest put into a file, and taken out of it: `save` and `restore`.

A file that could not be written to its end is removed; one that is not whole is refused before any device
is touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.migration.attempt import Attempt, as_vm
from vfio_user.client.migration.choose import open_drivers
from vfio_user.client.migration.driver import Driver
from vfio_user.client.migration.incoming import Incoming
from vfio_user.client.migration.options import DEFAULT_LIMITS, DEFAULT_OPTIONS, Options, silent
from vfio_user.client.migration.outgoing import Movable
from vfio_user.client.migration.report import Failure, Limits, Outcome, Progress, Report, Step, Where
from vfio_user.client.migration.saved_file import (
    FileSink,
    Kind,
    Record,
    SavedFile,
    SavedFileError,
    parse_json,
)
from vfio_user.client.migration.trail import Trail
from vfio_user.client.vmm_state import VmmState, parse_vmm_state
from vfio_user.protocol.errors import VfioUserError


class Saving(Attempt):
    """One attempt to save a guest. With `go_on` it runs on afterwards, else it stays stopped."""

    def __init__(
        self,
        source: FakeVmm | Sequence[FakeVmm],
        path: Path,
        *,
        go_on: bool = False,
        guest: Movable | None = None,
        limits: Limits = DEFAULT_LIMITS,
        options: Options = DEFAULT_OPTIONS,
        progress: Callable[[Progress], None] = silent,
    ) -> None:
        super().__init__(source, guest, limits, options, progress)
        self._path = path
        self._go_on = go_on

    async def _move(self) -> None:
        outgoing = await self._open_source()
        self._outgoing = outgoing
        self._sink = sink = self._options.link(FileSink(self._path, self.trail))
        self.trail.begin(Step.PREPARE)
        ranges = [(part.address, part.size) for part in outgoing.ram.ranges]
        await sink.open(ranges, len(self.source))
        await outgoing.send(sink)
        self.trail.begin(Step.LOAD)
        self.trail.lap()
        await sink.complete()
        outgoing.downtime = replace(outgoing.downtime, load=self.trail.lap())

    async def _complete(self) -> Report:
        if not self._go_on:
            return await super()._complete()
        why = "the source did not answer"
        with trio.move_on_after(self._limits.recovery):
            why = await self._back()
        self.trail.begin(Step.DONE)
        report = self._report(Outcome.COMPLETED, why=why)
        return replace(report, source_runs=not why)


async def save(
    source: FakeVmm | Sequence[FakeVmm],
    path: Path,
    *,
    go_on: bool = False,
    guest: Movable | None = None,
    limits: Limits = DEFAULT_LIMITS,
    options: Options = DEFAULT_OPTIONS,
    progress: Callable[[Progress], None] = silent,
) -> Report:
    """Put a guest into a file at `path`, which is there only if the report says "completed".

    With `go_on` the guest runs on afterwards, else it stays stopped, as do its devices.
    """
    return await Saving(
        source, path, go_on=go_on, guest=guest, limits=limits, options=options, progress=progress
    ).run()


class Restoring:
    """One attempt to bring a saved guest into a VM."""

    def __init__(
        self,
        destination: Sequence[FakeVmm],
        path: Path,
        guest: Movable | None,
        options: Options,
        trail: Trail,
    ) -> None:
        self._vmms = destination
        self._path = path
        self._guest = guest
        self._options = options
        self._trail = trail
        self._incoming: Incoming | None = None
        self._drivers: list[Driver] = []
        self._state = [0] * len(destination)

    async def run(self, limits: Limits) -> Report:
        failure: Failure | None = None
        with trio.move_on_after(float("inf") if limits.timeout is None else limits.timeout) as scope:
            try:
                await self._restore()
            except (VfioUserError, OSError) as error:
                failure = self._trail.failure(error)
        if scope.cancelled_caught:
            failure = self._trail.failure(SavedFileError(f"not done within {limits.timeout:g} s"))
        if failure is not None and self._incoming is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + limits.recovery):
                await self._incoming.abandon()
        for driver in self._drivers:
            driver.close()
        return self._report(failure)

    async def _restore(self) -> None:
        trail, options = self._trail, self._options
        trail.begin(Step.CHECK)
        trail.at(Where.FILE)
        with SavedFile(self._path) as saved:
            self._drivers = await open_drivers(
                self._vmms, Where.DESTINATION, trail, options.destination, options.page_size, options.mapped
            )
            incoming = Incoming(self._vmms, self._drivers, trail, irqs_first=options.irqs_first)
            self._incoming = incoming
            trail.begin(Step.PREPARE)
            await incoming.open(saved.ranges, saved.devices)
            trail.begin(Step.STATE)
            for record in saved.records():
                await self._give(incoming, record)
        trail.begin(Step.LOAD)
        await incoming.complete()
        trail.begin(Step.SWITCH)
        await options.switch()
        trail.begin(Step.START)
        await incoming.start()
        if self._guest is not None:
            self._guest.move(self._vmms)
            self._guest.resume()
        trail.begin(Step.DONE)

    async def _give(self, incoming: Incoming, record: Record) -> None:
        match record.kind:
            case Kind.MEMORY:
                await incoming.memory(record.address, memoryview(record.payload))
            case Kind.ZERO:
                length = int.from_bytes(record.payload, "little")
                await incoming.memory(record.address, memoryview(bytes(min(length, 1 << 20))))
            case Kind.STATE if record.device < len(self._vmms):
                self._state[record.device] += len(record.payload)
                await incoming.state(record.device, record.payload)
            case Kind.SETUP:
                await incoming.setup(_vmm_states(record.payload, len(self._vmms)))
            case _:
                raise SavedFileError(f"there is no device {record.device}")
        self._trail.at(Where.FILE)
        await trio.lowlevel.checkpoint()

    def _report(self, failure: Failure | None) -> Report:
        return Report(
            outcome=Outcome.FAILED if failure else Outcome.COMPLETED,
            state=tuple(self._state),
            failure=failure,
            notes=tuple(self._trail.notes),
            ms=self._trail.ms,
        )


def _vmm_states(data: bytes, count: int) -> list[VmmState]:
    try:
        states = [parse_vmm_state(values) for values in parse_json(data)]
    except (TypeError, KeyError, AttributeError):
        raise SavedFileError("what it says of the VMM is not what a VMM saves") from None
    if len(states) != count:
        raise SavedFileError(f"it says of {len(states)} devices what the VMM knew, of {count} it should")
    return states


async def restore(
    destination: FakeVmm | Sequence[FakeVmm],
    path: Path,
    *,
    guest: Movable | None = None,
    limits: Limits = DEFAULT_LIMITS,
    options: Options = DEFAULT_OPTIONS,
    progress: Callable[[Progress], None] = silent,
) -> Report:
    """Bring a saved guest into a VM, started by `start_incoming`; its devices run then, and so does `guest`.

    Never raises for what the file holds or a server does: see the report.
    """
    trail = Trail(progress)
    return await Restoring(as_vm(destination), path, guest, options, trail).run(limits)
