# SPDX-License-Identifier: BSD-3-Clause
"""Many file descriptors behind one: what a device's loop watches, asked at a cost of one system call.

The poller is an epoll set, and an epoll set has a descriptor of its own that becomes readable with any
of its members. So a loop may ask it often (`poll`, while it spins) and then sleep on one descriptor.
"""

import select
from collections.abc import Callable

Callback = Callable[[], None]


class Poller:
    """Calls back for readable file descriptors. It owns none of them: unregister before closing."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}

    def fileno(self) -> int:
        """Readable when `poll` would call something."""
        return self._epoll.fileno()

    def register(self, fd: int, callback: Callback) -> None:
        """Call `callback` while `fd` is readable, or broken."""
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def unregister(self, fd: int) -> None:
        """Forget `fd`; harmless when it is not registered."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def poll(self) -> bool:
        """Serve everything that is readable now, without waiting. Returns whether there was anything."""
        ready = self._epoll.poll(0)
        for fd, _ in ready:
            callback = self._callbacks.get(fd)  # an earlier callback of this turn may have removed it
            if callback is not None:
                callback()
        return bool(ready)

    def close(self) -> None:
        self._callbacks.clear()
        self._epoll.close()
