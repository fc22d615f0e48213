# SPDX-License-Identifier: BSD-3-Clause
"""An asyncio loop beside trio, for a library that knows only asyncio: one thread for the whole program."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")


class AsyncioThread:
    """A thread that runs an asyncio loop from `__init__` to `stop`."""

    def __init__(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(started),), name="asyncio")
        self._thread.daemon = True
        self._thread.start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._end.wait()

    def stop(self) -> None:
        """End the loop and the thread; waits for both, which takes well under a millisecond."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """From trio: the result of a coroutine that runs in the loop. Cancelling here cancels it there."""
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        waiting = True

        def wake(future: Future[T]) -> None:
            if waiting:
                trio.lowlevel.reschedule(task, outcome.capture(future.result))

        def done(future: Future[T]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(wake, future)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            nonlocal waiting
            waiting = False
            future.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.add_done_callback(done)
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result


_lock = threading.Lock()
_users: list[AsyncioThread] = []
"""The one thread, once for each user."""


@contextlib.contextmanager
def asyncio_thread() -> Iterator[AsyncioThread]:
    """The program's thread, started by its first user and ended by its last."""
    with _lock:
        _users.append(_users[0] if _users else AsyncioThread())
        thread = _users[0]
    try:
        yield thread
    finally:
        with _lock:
            _users.pop()
            last = not _users
        if last:
            thread.stop()
