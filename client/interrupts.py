# SPDX-License-Identifier: BSD-3-Clause
"""Interrupts as a VMM receives them: an eventfd for each vector, given to the server with SET_IRQS."""

import contextlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import trio

from vfio_user.protocol.constants import IrqSetFlags, PciIrq

_EVENTFDS = IrqSetFlags.DATA_EVENTFD
_NO_DATA = IrqSetFlags.DATA_NONE


class IrqSetter(Protocol):
    """The part of `Client` that is needed here."""

    async def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        data: Sequence[bool] = (),
        fds: Sequence[int] = (),
    ) -> None: ...


class EventFd:
    """An eventfd that is waited for or signalled; every signal counts."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._count = 0

    def take(self) -> int:
        """How many signals have come since the last `take`; never waits. 0 when it is closed."""
        if self.fd < 0:
            return 0
        try:
            signals = os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
        self._count += signals
        return signals

    @property
    def count(self) -> int:
        """How many signals there were in all. Looking takes those that nobody has waited for."""
        self.take()
        return self._count

    async def wait(self) -> int:
        """Wait until there is a signal and take all: how many they were."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (signals := self.take()):
            if self.fd < 0:
                raise trio.ClosedResourceError("the eventfd is closed")
            await trio.lowlevel.wait_readable(self.fd)
        return signals

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Who waits gets `trio.ClosedResourceError`. Closing twice is harmless."""
        if self.fd < 0:
            return
        with contextlib.suppress(RuntimeError):  # no trio runs: nobody waits
            trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)
        self.fd = -1


class Irqs:
    """One interrupt index of the device (`PciIrq`), with an `EventFd` for each enabled vector."""

    def __init__(self, client: IrqSetter, index: int) -> None:
        self.index = index
        self.vectors: list[EventFd] = []
        self.masked: set[int] = set()
        """The vectors that we have masked."""
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def enable(self, count: int = 1) -> None:
        """Give the server new eventfds for vectors 0 to `count` - 1; earlier ones are dropped."""
        fresh: list[EventFd] = []
        try:
            fresh.extend(EventFd() for _ in range(count))
            await self._set(_EVENTFDS | IrqSetFlags.ACTION_TRIGGER, 0, count, [e.fd for e in fresh])
        except BaseException:
            _close_all(fresh)
            raise
        _close_all(self.vectors)
        self.vectors = fresh

    async def disable(self) -> None:
        """Take back every vector (DATA_NONE, count 0)."""
        await self._set(_NO_DATA | IrqSetFlags.ACTION_TRIGGER, 0, 0)
        self.masked.clear()
        self.close()

    async def disable_vector(self, vector: int) -> None:
        """Take the eventfd of one vector away from the server, as QEMU does: DATA_EVENTFD without one."""
        await self._set(_EVENTFDS | IrqSetFlags.ACTION_TRIGGER, vector, 1)

    async def enable_vector(self, vector: int) -> None:
        """Give the server the eventfd of one vector again."""
        await self._set(_EVENTFDS | IrqSetFlags.ACTION_TRIGGER, vector, 1, [self.vectors[vector].fd])

    async def mask(self, vector: int = 0) -> None:
        await self._set(_NO_DATA | IrqSetFlags.ACTION_MASK, vector, 1)
        self.masked.add(vector)

    async def unmask(self, vector: int = 0) -> None:
        await self._set(_NO_DATA | IrqSetFlags.ACTION_UNMASK, vector, 1)
        self.masked.discard(vector)

    async def trigger(self, vector: int = 0) -> None:
        """Ask the server to fire the vector (DATA_NONE), as a test of the way back."""
        await self._set(_NO_DATA | IrqSetFlags.ACTION_TRIGGER, vector, 1)

    async def wait(self, vector: int = 0) -> int:
        """Wait for a vector: the number of its signals."""
        return await self.vectors[vector].wait()

    @property
    def count(self) -> int:
        """Signals of all the present vectors."""
        return sum(vector.count for vector in self.vectors)

    async def _set(self, flags: int, start: int, count: int, fds: Sequence[int] = ()) -> None:
        await self._client.set_irqs(self.index, flags, start, count, fds=fds)

    def close(self) -> None:
        _close_all(self.vectors)
        self.vectors = []


class Intx(Irqs):
    """The INTx pin. The server masks it when it fires; `acknowledge` lets it fire again if it is still high.

    With `resample` the unmasking goes by an eventfd, as under KVM, else by a message, as under TCG.
    """

    def __init__(self, client: IrqSetter) -> None:
        super().__init__(client, PciIrq.INTX)
        self._resample: EventFd | None = None

    @property
    def resamples(self) -> bool:
        """Unmasking goes by an eventfd."""
        return self._resample is not None

    async def enable(self, count: int = 1, *, resample: bool = False) -> None:
        await super().enable(count)
        if resample:
            await self._enable_resample()

    async def _enable_resample(self) -> None:
        fresh = EventFd()
        try:
            await self._set(_EVENTFDS | IrqSetFlags.ACTION_UNMASK, 0, 1, [fresh.fd])
        except BaseException:
            fresh.close()
            raise
        if self._resample is not None:
            self._resample.close()
        self._resample = fresh

    async def acknowledge(self) -> None:
        """Unmask after an interrupt was handled."""
        if self._resample is not None:
            self._resample.signal()
        else:
            await self.unmask()

    def close(self) -> None:
        super().close()
        if self._resample is not None:
            self._resample.close()
            self._resample = None


def _close_all(events: list[EventFd]) -> None:
    for event in events:
        event.close()
