# SPDX-License-Identifier: BSD-3-Clause
"""A fake guest that can be moved: its processors, and its devices as it knows them.

    async with open_guest([vmm]) as guest:
        device = guest.devices[0]
        guest.start(driver, device)
        ...
        await migrate([vmm], [other], guest=guest)

A driver holds a `GuestDevice` where it could hold a `FakeVmm`, and does not notice that what stands behind
has changed.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import trio

from vfio_user.client.background import background
from vfio_user.client.config_space import Bar, ConfigSpace
from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.interrupts import Intx, Irqs
from vfio_user.client.memory import GuestRam
from vfio_user.client.vcpu import Vcpus


class IrqLine(Protocol):
    """What a driver needs of INTx."""

    async def wait(self, vector: int = 0) -> int: ...

    async def acknowledge(self) -> None: ...


class DriverAccess(Protocol):
    """What a guest's driver needs of its device: `FakeVmm` and `GuestDevice` have it."""

    @property
    def ram(self) -> GuestRam: ...

    @property
    def config(self) -> ConfigSpace: ...

    @property
    def bars(self) -> Mapping[int, Bar]: ...

    @property
    def intx(self) -> IrqLine: ...

    async def read(self, region: int, offset: int, width: int = 4) -> int: ...

    async def write(self, region: int, offset: int, value: int, width: int = 4) -> None: ...


IrqsT = TypeVar("IrqsT", bound=Irqs)


class GuestIrqs(Generic[IrqsT]):
    """MSI or MSI-X of a device. A message that the guest has not taken goes with it to the other side."""

    def __init__(self, irqs: IrqsT) -> None:
        self._irqs = irqs
        self._carried: Counter[int] = Counter()
        self._waiting: set[trio.CancelScope] = set()

    async def wait(self, vector: int = 0) -> int:
        """Wait for a vector: the number of its signals."""
        while True:
            if signals := self._carried.pop(vector, 0):
                return signals
            irqs = self._irqs
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    return await irqs.wait(vector)
                except (trio.ClosedResourceError, IndexError):
                    if irqs is self._irqs:
                        raise
                finally:
                    self._waiting.discard(scope)

    def move(self, irqs: IrqsT) -> None:
        """Wait there from now on."""
        self._take_along()
        self._irqs = irqs
        for scope in self._waiting:
            scope.cancel()

    def _take_along(self) -> None:
        for vector, event in enumerate(self._irqs.vectors):
            self._carried[vector] += event.take()


class GuestIntx(GuestIrqs[Intx]):
    """INTx of a device: a level, which the device itself holds and signals anew at the other side."""

    async def acknowledge(self) -> None:
        """Unmask after an interrupt was handled."""
        await self._irqs.acknowledge()

    def _take_along(self) -> None:
        """Nothing."""


class GuestDevice:
    """A device as the guest knows it."""

    def __init__(self, vmm: FakeVmm) -> None:
        self.vmm = vmm
        """What stands behind it now."""
        self.intx = GuestIntx(vmm.intx)
        self.msi = GuestIrqs(vmm.msi)
        self.msix = GuestIrqs(vmm.msix)

    @property
    def ram(self) -> GuestRam:
        return self.vmm.ram

    @property
    def config(self) -> ConfigSpace:
        return self.vmm.config

    @property
    def bars(self) -> Mapping[int, Bar]:
        return self.vmm.bars

    async def read(self, region: int, offset: int, width: int = 4) -> int:
        return await self.vmm.read(region, offset, width)

    async def write(self, region: int, offset: int, value: int, width: int = 4) -> None:
        await self.vmm.write(region, offset, value, width)

    def move(self, vmm: FakeVmm) -> None:
        """From now on it is reached there; to be called while the processors stand still."""
        self.vmm = vmm
        self.intx.move(vmm.intx)
        self.msi.move(vmm.msi)
        self.msix.move(vmm.msix)


class Guest:
    """Make it with `open_guest`."""

    def __init__(self, vmms: Sequence[FakeVmm], nursery: trio.Nursery) -> None:
        self.vcpus = Vcpus()
        self.devices = tuple(GuestDevice(vmm) for vmm in vmms)
        self._nursery = nursery

    @property
    def ram(self) -> GuestRam:
        return self.devices[0].ram

    def start(self, work: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Run guest code beside everything else."""
        self._nursery.start_soon(self.vcpus.run, work, *args)

    async def run(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run guest code and wait for its end."""
        return await self.vcpus.run(work, *args)

    async def pause(self) -> None:
        """Stop the processors: returns when no access of theirs is under way."""
        await self.vcpus.pause(device.vmm.client.link for device in self.devices)

    def resume(self) -> None:
        self.vcpus.resume()

    def move(self, vmms: Sequence[FakeVmm]) -> None:
        """The guest is now at these VMMs, device by device, with the memory that they share."""
        before = self.ram
        for device, vmm in zip(self.devices, vmms, strict=True):
            device.move(vmm)
        self.ram.adopt_allocations(before)


@contextlib.asynccontextmanager
async def open_guest(vmms: Sequence[FakeVmm]) -> AsyncIterator[Guest]:
    """A guest on these devices, which share one memory; its tasks are cancelled at the end."""
    async with background() as nursery:
        guest = Guest(vmms, nursery)
        try:
            yield guest
        finally:
            guest.vcpus.end()
