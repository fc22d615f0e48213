# SPDX-License-Identifier: BSD-3-Clause
"""A whole migration, from one VM to another: `migrate`, or a `Migration` that can be cancelled.

Until the first device runs at the destination, whatever fails leads back: the destination's devices are
reset, the source's go on. After that there is no way back, for a device that has run may have sent
something that cannot be sent twice; the report says then what runs and what does not.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.memory import PAGE, GuestRam
from vfio_user.client.migration.attempt import Attempt, as_vm
from vfio_user.client.migration.compare import compare_memory
from vfio_user.client.migration.incoming import Incoming
from vfio_user.client.migration.options import DEFAULT_LIMITS, DEFAULT_OPTIONS, Options, silent
from vfio_user.client.migration.outgoing import Movable
from vfio_user.client.migration.report import Limits, MigrationError, Progress, Report, Step, Where

__all__ = ["Migration", "Options", "compare_memory", "migrate"]


class Migration(Attempt):
    """One attempt. `run` may be called once."""

    def __init__(
        self,
        source: FakeVmm | Sequence[FakeVmm],
        destination: FakeVmm | Sequence[FakeVmm],
        *,
        guest: Movable | None = None,
        limits: Limits = DEFAULT_LIMITS,
        options: Options = DEFAULT_OPTIONS,
        progress: Callable[[Progress], None] = silent,
    ) -> None:
        super().__init__(source, guest, limits, options, progress)
        self.destination = as_vm(destination)
        self._incoming: Incoming | None = None

    async def _move(self) -> None:
        options, trail = self._options, self.trail
        outgoing = await self._open_source()
        self._outgoing, self._incoming = outgoing, await self._open_destination()
        self._sink = sink = options.link(self._incoming)
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
        await self._incoming.start()
        if self._guest is not None:
            self._guest.move(self.destination)
            self._guest.resume()
        outgoing.paused = False
        outgoing.downtime = replace(outgoing.downtime, load=load, start=trail.lap())

    async def _open_destination(self) -> Incoming:
        if self.source[0].ram is self.destination[0].ram:
            raise MigrationError("source and destination have the same memory")
        drivers = await self._open(self.destination, Where.DESTINATION, self._options.destination)
        return Incoming(self.destination, drivers, self.trail, irqs_first=self._options.irqs_first)

    def _verify(self, source: GuestRam, destination: GuestRam) -> None:
        self.trail.begin(Step.VERIFY)
        begun = time.perf_counter()
        different = compare_memory(source, destination)
        if different:
            first = ", ".join(f"{address:#x}" for address in different[:4])
            raise MigrationError(f"{len(different)} pages of memory differ: {first}, ...")
        pages = sum(part.size for part in source.ranges) // PAGE
        self._verified = (pages, (time.perf_counter() - begun) * 1000)

    def _stuck(self) -> str:
        ran = self._incoming.ran if self._incoming else None
        return "" if ran is None else f"device {ran} has run at the destination, as far as one can tell"


async def migrate(
    source: FakeVmm | Sequence[FakeVmm],
    destination: FakeVmm | Sequence[FakeVmm],
    *,
    guest: Movable | None = None,
    limits: Limits = DEFAULT_LIMITS,
    options: Options = DEFAULT_OPTIONS,
    progress: Callable[[Progress], None] = silent,
) -> Report:
    """Move a guest from one VM to another; both are started, the destination by `start_incoming`.

    Never raises for what a server does: see the report.
    """
    return await Migration(
        source, destination, guest=guest, limits=limits, options=options, progress=progress
    ).run()
