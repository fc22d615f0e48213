# SPDX-License-Identifier: BSD-3-Clause
"""The destination's side of a migration: a VM that takes a guest in."""

from collections.abc import Sequence

from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.migration.driver import Driver, reason
from vfio_user.client.migration.report import MigrationError, Where
from vfio_user.client.migration.trail import Trail
from vfio_user.client.vmm_state import VmmState, restore_config, restore_irqs
from vfio_user.protocol.constants import MigrationState
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.values import Payload


class Incoming:
    """A `Sink`. The devices run when `start` returns.

    `irqs_first`: the servers get their eventfds before the devices run, as from QEMU, else after.
    """

    def __init__(
        self, vmms: Sequence[FakeVmm], drivers: Sequence[Driver], trail: Trail, *, irqs_first: bool = True
    ) -> None:
        self.vmms = tuple(vmms)
        self.drivers = tuple(drivers)
        self.ran: int | None = None
        """The first device that runs, or may do so for all that we know."""
        self._trail = trail
        self._irqs_first = irqs_first
        self._states: tuple[VmmState, ...] = ()
        self._touched = False

    # Sink

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        self._trail.at(Where.DESTINATION)
        mine = [(part.address, part.size) for part in self.vmms[0].ram.ranges]
        if mine != list(ranges):
            raise MigrationError(f"its memory is {_layout(mine)}, the guest's is {_layout(ranges)}")
        if devices != len(self.vmms):
            raise MigrationError(f"it has {len(self.vmms)} devices, the guest has {devices}")
        self._touched = True
        for index, driver in enumerate(self.drivers):
            self._trail.at(Where.DESTINATION, index)
            await driver.prepare()

    async def memory(self, address: int, data: memoryview) -> None:
        self._trail.at(Where.DESTINATION)
        self.vmms[0].ram.write(address, data)

    async def state(self, device: int, data: Payload) -> None:
        self._trail.at(Where.DESTINATION, device)
        await self.drivers[device].write_state(data)

    async def setup(self, states: Sequence[VmmState]) -> None:
        self._states = tuple(states)
        for index, (vmm, state) in enumerate(zip(self.vmms, states, strict=True)):
            self._trail.at(Where.DESTINATION, index)
            await restore_config(vmm, state)

    async def complete(self) -> None:
        for index, driver in enumerate(self.drivers):
            self._trail.at(Where.DESTINATION, index)
            await driver.load()

    async def abandon(self) -> None:
        """Take away from every device what was written to it. If one has run, they are only stopped: what
        they have is all that there is."""
        if not self._touched:
            return
        for index, driver in enumerate(self.drivers):
            try:
                await (driver.discard() if self.ran is None else driver.enter(MigrationState.STOP))
            except VfioUserError as error:
                what = "reset" if self.ran is None else "stopped"
                self._trail.note(f"destination, device {index}: not {what}: {reason(error)}")

    # Start

    async def start(self) -> None:
        """Interrupts, then the devices: all of them first to P2P, where none starts anything."""
        if self._irqs_first:
            await self._restore_irqs()
        for index, driver in enumerate(self.drivers):
            if driver.p2p:
                self._trail.at(Where.DESTINATION, index)
                await driver.enter(MigrationState.RUNNING_P2P)
        for index in range(len(self.drivers)):
            await self._run(index)
        if not self._irqs_first:
            await self._restore_irqs()

    async def _run(self, index: int) -> None:
        self._trail.at(Where.DESTINATION, index)
        first = self.ran is None
        self.ran = index if first else self.ran
        try:
            await self.drivers[index].enter(MigrationState.RUNNING)
        except RemoteError:
            if first:  # it says itself that it does not run
                self.ran = None
            raise

    async def _restore_irqs(self) -> None:
        for index, (vmm, state) in enumerate(zip(self.vmms, self._states, strict=True)):
            self._trail.at(Where.DESTINATION, index)
            await restore_irqs(vmm, state)


def _layout(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{size:#x} bytes at {address:#x}" for address, size in ranges) or "none"
