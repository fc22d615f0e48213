# SPDX-License-Identifier: BSD-3-Clause
"""Device time: a clock in nanoseconds and one-shot timers, both frozen while the device is stopped."""

import heapq
from collections.abc import Callable
from itertools import count

NANOSECONDS = 1_000_000_000


class Timer:
    """A one-shot timer of `Timers.call_at`."""

    __slots__ = ("_callback", "deadline")

    def __init__(self, deadline: int, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self._callback: Callable[[], None] | None = callback

    @property
    def active(self) -> bool:
        """Whether the callback is still to come."""
        return self._callback is not None

    def cancel(self) -> None:
        """Never call back; harmless when that has happened already."""
        self._callback = None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Timers:
    """Timers over `now`, a monotonic clock in nanoseconds.

    Device time stands still between `freeze` and `thaw`, so that a deadline keeps the time that it had
    left however long the device was stopped.
    """

    def __init__(self, now: Callable[[], int], on_error: Callable[[Exception], None] | None = None) -> None:
        """`on_error` is told of an exception that a callback let out; without it `run_due` raises it."""
        self._now = now
        self._on_error = on_error
        self._offset = 0  # device time = now() - offset
        self._frozen_at: int | None = None
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = count()  # timers with equal deadlines fire in the order in which they were set

    @property
    def pending(self) -> bool:
        """Whether there may be anything to do for `run_due`: cheap, for loops."""
        return bool(self._heap)

    def clock(self) -> int:
        """Device time in nanoseconds."""
        return self._now() - self._offset if self._frozen_at is None else self._frozen_at

    def call_at(self, deadline: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, when device time has reached `deadline` (nanoseconds)."""
        timer = Timer(deadline, callback)
        heapq.heappush(self._heap, (deadline, next(self._order), timer))
        return timer

    def freeze(self) -> None:
        if self._frozen_at is None:
            self._frozen_at = self.clock()

    def thaw(self) -> None:
        if self._frozen_at is not None:
            self._offset = self._now() - self._frozen_at
            self._frozen_at = None

    def clear(self) -> None:
        """Cancel every timer."""
        for _, _, timer in self._heap:
            timer.cancel()
        self._heap.clear()

    def next_deadline(self) -> int | None:
        """When `run_due` is wanted next, on the `now` clock in nanoseconds; None: nothing is due ever."""
        heap = self._heap
        while heap and not heap[0][2].active:
            heapq.heappop(heap)
        if not heap or self._frozen_at is not None:
            return None
        return heap[0][0] + self._offset

    def run_due(self) -> None:
        """Fire every timer whose deadline has come; one set by a callback waits for the next call."""
        deadline = self.next_deadline()
        if deadline is None or deadline > self._now():
            return
        now, due = self.clock(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for timer in due:
            try:
                timer.fire()
            except Exception as error:
                if self._on_error is None:
                    raise
                self._on_error(error)
