# SPDX-License-Identifier: BSD-3-Clause
"""The processors of a fake guest: trio tasks that can be stopped between any two steps of theirs.

A guest's driver is a set of coroutines. `Vcpus.run` drives such a coroutine itself and passes on what it
waits for; when that has come, and the processors are stopped, the coroutine is left where it is until they
run again. So nothing of the guest happens meanwhile: no access, no look into memory. An access that was
under way is finished first, and its result waits for the guest, as with a real processor.
"""

from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from types import coroutine
from typing import Any, TypeVar

import trio

from vfio_user.client.link import Link

T = TypeVar("T")

_LOOK_AGAIN = 0.0002  # seconds


class Vcpus:
    """All processors of one guest. They run at first."""

    def __init__(self) -> None:
        self._runs = trio.Event()
        self._runs.set()
        self._ended = False

    @property
    def running(self) -> bool:
        return self._runs.is_set()

    async def run(self, work: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run guest code. Tasks that it starts itself are not stopped: give each to `run`."""

        async def call() -> T:
            await self._gate()
            return await work(*args)

        return await self._drive(call())

    @coroutine
    def _drive(self, guest: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
        step: Callable[[Any], Any] = guest.send
        value: Any = None
        while True:
            try:
                wanted = step(value)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            try:
                step, value = guest.send, (yield wanted)
            except GeneratorExit:
                guest.close()
                raise
            except BaseException as error:
                step, value = guest.throw, error
            if not self._runs.is_set():
                yield from self._gate().__await__()

    async def _gate(self) -> None:
        # Shielded: a time-out of the guest's own must not let it run on. `end` opens it.
        with trio.CancelScope(shield=True):
            while not self._runs.is_set():
                await self._runs.wait()

    async def pause(self, links: Iterable[Link]) -> None:
        """Stop: returns when no access on these connections is under way."""
        if self._ended:
            return
        if self.running:  # else somebody waits for the event that is there
            self._runs = trio.Event()
        links = tuple(links)
        while any(link.under_way for link in links):  # noqa: ASYNC110  # a link tells nobody
            await trio.sleep(_LOOK_AGAIN)

    def resume(self) -> None:
        self._runs.set()

    def end(self) -> None:
        """They are never stopped again: who cancels the guest must be able to."""
        self._ended = True
        self._runs.set()
