# SPDX-License-Identifier: BSD-3-Clause
"""Interrupt receivers against a list of what they tell the server; the eventfds are real."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vfio_user.client.errors import RemoteError
from vfio_user.client.interrupts import EventFd, Intx, Irqs
from vfio_user.protocol.constants import Command, IrqSetFlags, PciIrq

TRIGGER = IrqSetFlags.ACTION_TRIGGER
EVENTFD = IrqSetFlags.DATA_EVENTFD
NONE = IrqSetFlags.DATA_NONE


@dataclass
class Recorder:
    """Takes SET_IRQS; keeps duplicates of the eventfds, as a server would."""

    sent: list[tuple[int, int, int, int]] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    failing: bool = False

    async def set_irqs(
        self,
        index: int,
        flags: int,
        start: int,
        count: int,
        data: Sequence[bool] = (),
        fds: Sequence[int] = (),
    ) -> None:
        if self.failing:
            raise RemoteError(Command.DEVICE_SET_IRQS, 22)
        self.sent.append((index, flags, start, count))
        self.fds += [os.dup(fd) for fd in fds]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


async def test_signals_are_waited_for_and_counted() -> None:
    event = EventFd()
    os.eventfd_write(event.fd, 3)
    assert await event.wait() == 3
    event.signal()
    assert (event.count, event.take()) == (4, 0)
    event.close()
    event.close()


async def test_who_waits_for_a_closed_eventfd_is_told() -> None:
    event = EventFd()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await event.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        event.close()


async def test_msix_vectors_each_have_an_eventfd() -> None:
    server = Recorder()
    async with Irqs(server, PciIrq.MSIX) as irqs:
        await irqs.enable(3)
        assert server.sent == [(PciIrq.MSIX, EVENTFD | TRIGGER, 0, 3)]
        os.eventfd_write(server.fds[2], 1)
        assert await irqs.wait(2) == 1
        assert irqs.count == 1
        await irqs.disable_vector(2)
        await irqs.enable_vector(2)
        await irqs.mask(1)
        await irqs.unmask(1)
        await irqs.trigger(0)
        await irqs.disable()
        assert [message[1:] for message in server.sent[1:]] == [
            (EVENTFD | TRIGGER, 2, 1),
            (EVENTFD | TRIGGER, 2, 1),
            (NONE | IrqSetFlags.ACTION_MASK, 1, 1),
            (NONE | IrqSetFlags.ACTION_UNMASK, 1, 1),
            (NONE | TRIGGER, 0, 1),
            (NONE | TRIGGER, 0, 0),
        ]
    server.close()


async def test_intx_unmasks_by_message_or_by_eventfd() -> None:
    server = Recorder()
    async with Intx(server) as intx:
        await intx.enable()
        await intx.acknowledge()
        assert server.sent[-1] == (PciIrq.INTX, NONE | IrqSetFlags.ACTION_UNMASK, 0, 1)
        await intx.enable(resample=True)
        assert server.sent[-1] == (PciIrq.INTX, EVENTFD | IrqSetFlags.ACTION_UNMASK, 0, 1)
        await intx.acknowledge()
        assert os.eventfd_read(server.fds[-1]) == 1
    server.close()


async def test_a_refusal_leaves_nothing_open_and_the_old_vectors_alone() -> None:
    server = Recorder()
    async with Irqs(server, PciIrq.MSI) as irqs:
        await irqs.enable(1)
        before = set(os.listdir("/proc/self/fd"))
        server.failing = True
        with pytest.raises(RemoteError):
            await irqs.enable(4)
        assert set(os.listdir("/proc/self/fd")) == before
        assert len(irqs.vectors) == 1
    server.close()
