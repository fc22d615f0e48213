# SPDX-License-Identifier: BSD-3-Clause
"""Contexts that are left in another order than that in which they were entered."""

from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Held(Generic[T]):
    """A context that has been entered; `value` is what it gave. Make it with `hold`."""

    def __init__(self, value: T) -> None:
        self.value = value
        self._leave = trio.Event()
        self._gone = trio.Event()

    async def leave(self) -> None:
        """Leave the context; returns when that is done."""
        self._leave.set()
        await self._gone.wait()

    async def _stay(self) -> None:
        await self._leave.wait()


async def hold(nursery: trio.Nursery, context: AbstractAsyncContextManager[T]) -> Held[T]:
    """Enter a context in a task of the nursery, where it is left too: at the latest when that is cancelled.
    What leaving it raises ends the nursery."""
    found: list[Held[T]] = []
    await nursery.start(_hold, context, found)
    return found[0]


async def _hold(
    context: AbstractAsyncContextManager[T],
    found: list[Held[T]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with context as value:
        held = Held(value)
        found.append(held)
        task_status.started()
        await held._stay()
    held._gone.set()
