# SPDX-License-Identifier: BSD-3-Clause
"""One interrupt vector: its eventfds and its mask."""

from collections.abc import Callable

from vfio_user.protocol.constants import IrqSetFlags
from vfio_user.server.eventfds import Eventfd, drain
from vfio_user.transport.poller import Poller


class IrqVector:
    """The connection's side of a vector. `on_mask` and `on_unmask`: the client has signalled its eventfd."""

    __slots__ = ("_callbacks", "_incoming", "_poller", "fired", "masked", "trigger", "unanswered")

    def __init__(self, poller: Poller, on_mask: Callable[[], None], on_unmask: Callable[[], None]) -> None:
        self._poller = poller
        self._callbacks = {IrqSetFlags.ACTION_MASK: on_mask, IrqSetFlags.ACTION_UNMASK: on_unmask}
        self._incoming: dict[IrqSetFlags, Eventfd] = {}
        self.trigger: Eventfd | None = None
        self.masked = False
        self.fired = False
        """Signalled at least once since the client came; `release` leaves it."""
        self.unanswered = False
        """INTx has been fired, and its UNMASK has not come."""

    @property
    def deliverable(self) -> bool:
        return self.trigger is not None and not self.masked

    def set_eventfd(self, action: IrqSetFlags, eventfd: Eventfd | None) -> None:
        """Take ownership of the eventfd for an action in place of the one before; None: take it away."""
        if action is IrqSetFlags.ACTION_TRIGGER:
            old, self.trigger = self.trigger, eventfd
            if old is not None:
                old.close()
            return
        self._forget(action)
        if eventfd is not None:
            self._incoming[action] = eventfd
            self._poller.register(eventfd.fileno(), lambda: self._signalled(action))

    def release(self) -> None:
        """Close every eventfd, forget the masks."""
        self.set_eventfd(IrqSetFlags.ACTION_TRIGGER, None)
        for action in list(self._incoming):
            self._forget(action)
        self.masked = self.unanswered = False

    def _forget(self, action: IrqSetFlags) -> None:
        eventfd = self._incoming.pop(action, None)
        if eventfd is not None:
            self._poller.unregister(eventfd.fileno())
            eventfd.close()

    def _signalled(self, action: IrqSetFlags) -> None:
        if drain(self._incoming[action].fileno()):
            self._callbacks[action]()
