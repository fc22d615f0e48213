# SPDX-License-Identifier: BSD-3-Clause
"""Many file descriptors behind one: what a device's loop watches, asked at a cost of one system call.

The poller is an epoll set, and an epoll set has a descriptor of its own that becomes readable with any
of its members. So a loop may ask it often (`poll`, while it spins) and then sleep on one descriptor.
"""

import select
from collections.abc import Callable

EVENTS = 16  # of one `poll`; the default makes room for 1,023 each time
Callback = Callable[[], None]


class Poller:
    """Calls back for file descriptors that are ready. It owns none of them: unregister before closing."""

    def __init__(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """`on_error` is told of an exception that a callback let out; without it `poll` raises it."""
        self._on_error = on_error
        self._epoll = select.epoll()
        self._urgent = select.poll()
        self._urgent_fds: set[int] = set()
        self._readable: dict[int, Callback] = {}
        self._writable: dict[int, Callback] = {}

    def fileno(self) -> int:
        """Readable when `poll` would call something."""
        return self._epoll.fileno()

    def register(self, fd: int, callback: Callback, *, urgent: bool = False) -> None:
        """Call `callback` while `fd` is readable, or broken; an `urgent` one by `poll_urgent` too."""
        self._set(self._readable, fd, callback)
        if urgent:
            self._urgent.register(fd, select.POLLIN)
            self._urgent_fds.add(fd)

    def unregister(self, fd: int) -> None:
        """Stop watching `fd` for reading; harmless when it is not registered."""
        self._set(self._readable, fd, None)
        if fd in self._urgent_fds:
            self._urgent.unregister(fd)
            self._urgent_fds.remove(fd)

    def watch_writable(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` while `fd` can be written to, or is broken; None: no longer."""
        self._set(self._writable, fd, callback)

    def _set(self, callbacks: dict[int, Callback], fd: int, callback: Callback | None) -> None:
        before = self._events(fd)
        if callback is None:
            callbacks.pop(fd, None)
        else:
            callbacks[fd] = callback
        after = self._events(fd)
        if before == after:
            return
        if not after:
            self._epoll.unregister(fd)
        elif before:
            self._epoll.modify(fd, after)
        else:
            self._epoll.register(fd, after)

    def _events(self, fd: int) -> int:
        readable = select.EPOLLIN if fd in self._readable else 0
        return readable | (select.EPOLLOUT if fd in self._writable else 0)

    def poll(self) -> bool:
        """Serve everything that is ready now, without waiting. Returns whether there was anything."""
        ready = self._epoll.poll(0, EVENTS)
        for fd, events in ready:
            # An earlier callback of this turn may have removed a later one.
            try:
                if events & ~select.EPOLLOUT and (callback := self._readable.get(fd)) is not None:
                    callback()
                if events & ~select.EPOLLIN and (callback := self._writable.get(fd)) is not None:
                    callback()
            except Exception as error:
                if self._on_error is None:
                    raise
                self._on_error(error)
        return bool(ready)

    def poll_urgent(self) -> None:
        """Serve those that somebody waits for: to be called between the pieces of longer work.

        A callback that takes 64 frames off a network keeps a guest's CPU, which waits for a register, for
        200 µs. This call costs 0.3 µs when there is nothing. What it calls may change anything, as an
        await in a task may.
        """
        for fd, _ in self._urgent.poll(0):
            if (callback := self._readable.get(fd)) is not None:
                callback()

    def close(self) -> None:
        self._readable.clear()
        self._writable.clear()
        self._epoll.close()
