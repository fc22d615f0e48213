# SPDX-License-Identifier: BSD-3-Clause
"""The work of a device model as coroutines, driven without an event loop.

A task is a coroutine that awaits nothing but a `Completion` (a DMA reply) or `pause()`. The runner is
plain code that an engine calls between two batches of messages, so the same device model runs under the
trio engine, under libvfio-user and under a test's fake host.
"""

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Work = Callable[[], Coroutine[Any, Any, None]]
"""Makes the coroutine of a task; called again each time the task is started."""

ErrorHook = Callable[[Hashable, Exception], None]
"""Told of an exception that a task let out: the task's key and the exception."""


class Completion(Generic[T]):
    """A result that comes later: finished or failed exactly once, awaited by one task."""

    __slots__ = ("_error", "_on_done", "_result", "done")

    def __init__(self) -> None:
        self.done = False
        self._result: T | None = None
        self._error: Exception | None = None
        self._on_done: Callable[[], None] | None = None

    def finish(self, result: T) -> None:
        """Give the result and make the waiting task ready."""
        self._result = result
        self._settle()

    def fail(self, error: Exception) -> None:
        """Raise `error` in the waiting task when it runs next."""
        self._error = error
        self._settle()

    def _settle(self) -> None:
        if self.done:
            raise RuntimeError("this completion has been settled already")
        self.done = True
        if self._on_done is not None:
            self._on_done()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the completion settles; it replaces an earlier callback."""
        self._on_done = callback

    def __await__(self) -> Generator["Completion[T]", None, T]:
        if not self.done:
            yield self
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # settled without an error: a T


class Gate:
    """Where tasks wait before each DMA while the device is stopped."""

    __slots__ = ("_waiting", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._waiting: list[Completion[None]] = []

    async def passed(self) -> None:
        """Wait until the gate is open."""
        while self.closed:
            waiting: Completion[None] = Completion()
            self._waiting.append(waiting)
            await waiting

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.finish(None)


class _Pause:
    """Awaited by `pause()`: yields None, which sends the task to the end of the queue."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield None


_PAUSE = _Pause()


async def pause() -> None:
    """Let the VMM's messages and the other tasks go first. A task calls it after each bounded batch."""
    await _PAUSE


class _Task:
    __slots__ = ("again", "answered", "cancelled", "coroutine", "key", "work")

    def __init__(self, key: Hashable, work: Work) -> None:
        self.key = key
        self.work = work
        self.coroutine: Coroutine[Any, Any, None] | None = None
        self.again = False
        self.cancelled = False
        self.answered = False  # what it waited for has come, and it has not run since


class TaskRunner:
    """At most one task per key; started by handlers, run between batches of messages.

    A start while the task of that key runs means "look again": the work is begun anew once the present
    run ends. While the runner is stopped a start is remembered and nothing runs.
    """

    def __init__(self, on_error: ErrorHook) -> None:
        self._on_error = on_error
        self._tasks: dict[Hashable, _Task] = {}
        self._ready: deque[_Task] = deque()
        self._current: _Task | None = None
        self.stopped = False

    @property
    def ready(self) -> bool:
        """Whether `run_ready` would do something."""
        return bool(self._ready) and not self.stopped

    @property
    def idle(self) -> bool:
        """Whether no task is under way or owed."""
        return not self._tasks

    def start(self, key: Hashable, work: Work) -> None:
        """Run `work` soon, or once more if it is running."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = _Task(key, work)
            self._ready.append(task)
        elif task.coroutine is not None:
            task.again = True

    def run_ready(self) -> None:
        """Run each ready task until it ends, pauses or waits for a completion. Never raises."""
        if self.stopped:
            return
        for _ in range(len(self._ready)):
            if not self._ready or self.stopped:  # cancelled or stopped by an earlier task of this turn
                return
            self._step(self._ready.popleft())

    def settle(self) -> None:
        """Let each task whose answer has come take the step after it, also while stopped: before a save.

        An answered write is in guest memory, and the guest may act on it. Were the task cut just there, it
        would be written again after the guest has put something else in its place.
        """
        for task in [task for task in self._ready if task.answered]:
            if not task.cancelled:
                self._ready.remove(task)
                self._step(task)

    def cancel(self, key: Hashable) -> None:
        """Cut the task at the await where it is and forget that it was started. Synchronous."""
        task = self._tasks.pop(key, None)
        if task is not None:
            self._discard(task)

    def cancel_all(self) -> None:
        for key in list(self._tasks):
            self.cancel(key)

    def stop(self) -> None:
        """Let every task stand still where it is until `resume`. What it waits for may come meanwhile."""
        self.stopped = True

    def resume(self) -> None:
        """Run again; harmless if it runs."""
        self.stopped = False

    def cut(self) -> None:
        """While stopped: cut every task, for nobody will answer; each is owed a fresh start at `resume`."""
        for key, task in list(self._tasks.items()):
            self._discard(task)
            self._tasks[key] = fresh = _Task(key, task.work)
            self._ready.append(fresh)

    def _discard(self, task: _Task) -> None:
        task.cancelled = True
        if task in self._ready:
            self._ready.remove(task)
        if task.coroutine is not None and task is not self._current:
            self._close(task)

    def _close(self, task: _Task) -> None:
        assert task.coroutine is not None
        try:
            task.coroutine.close()
        except Exception as error:  # from a `finally`, or because it goes on awaiting
            self._on_error(task.key, error)

    def _step(self, task: _Task) -> None:
        self._current = task
        task.answered = False
        try:
            if task.coroutine is None:
                task.coroutine = task.work()
            waits_for = task.coroutine.send(None)
            if waits_for is not None and not isinstance(waits_for, Completion):
                raise TypeError(f"a task awaited {waits_for!r}: only DMA and pause() can be awaited")
        except StopIteration:
            self._finished(task)
        except Exception as error:
            # One broken batch must not end the device: it is reported, and a later doorbell starts anew.
            if task.coroutine is not None:
                self._close(task)
            self._finished(task)
            self._on_error(task.key, error)
        else:
            self._suspended(task, waits_for)
        finally:
            self._current = None

    def _suspended(self, task: _Task, waits_for: Completion[Any] | None) -> None:
        if task.cancelled:  # cancelled itself, while it ran
            self._close(task)
        elif waits_for is None:
            self._ready.append(task)
        else:
            waits_for.when_done(lambda: self._wake(task))

    def _wake(self, task: _Task) -> None:
        if not task.cancelled:
            task.answered = True
            self._ready.append(task)

    def _finished(self, task: _Task) -> None:
        if task.cancelled:
            return
        del self._tasks[task.key]
        if task.again:
            self.start(task.key, task.work)
