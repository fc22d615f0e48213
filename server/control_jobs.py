# SPDX-License-Identifier: BSD-3-Clause
"""Long work of the control socket in the server's one thread: generators that yield what they wait for.

A step between two yields is bounded, about a millisecond: between steps the client's messages are answered.
"""

import contextlib
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from vfio_user.device_models.net import CallLater, Cancellable
from vfio_user.protocol.json_rpc import FAILED, INTERNAL_ERROR, RpcError
from vfio_user.transport.poller import Poller

logger = logging.getLogger(__name__)

MILLISECOND = 1_000_000  # ns


@dataclass(frozen=True, slots=True)
class Later:
    """Go on after so many nanoseconds; 0: once everything else has had its turn."""

    nanoseconds: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """Go on when the descriptor can be read, or written."""

    fd: int
    writable: bool


Steps = Generator[Later | Ready, None, Any]
"""Work that returns the result of a request, or raises RpcError; closed when nobody wants it any more."""

Done = Callable[[Any, RpcError | None], None]


class Job:
    """Drives `steps` until they end; then calls `done`, once, with the result or the error."""

    def __init__(self, steps: Steps, poller: Poller, call_later: CallLater, done: Done) -> None:
        self._steps = steps
        self._poller = poller
        self._call_later = call_later
        self._done = done
        self._timer: Cancellable | None = None
        self._waits: Ready | None = None

    def step(self) -> None:
        """Take one step, and arrange for the next."""
        self._rest()
        try:
            wait = next(self._steps)
        except StopIteration as end:
            self._done(end.value, None)
        except RpcError as error:
            self._done(None, error)
        except Exception as error:
            logger.exception("a request of a controller failed")
            self._done(None, RpcError(INTERNAL_ERROR, f"{type(error).__name__}: {error}"))
        else:
            self._arrange(wait)

    def abort(self, reason: str) -> None:
        """Cut the work where it is; its `finally` blocks undo what is half done."""
        self._rest()
        try:
            self._steps.close()
        except Exception:
            logger.exception("a request of a controller failed while it was cut")
        self._done(None, RpcError(FAILED, reason))

    def _arrange(self, wait: Later | Ready) -> None:
        if isinstance(wait, Later):
            self._timer = self._call_later(wait.nanoseconds, self.step)
            return
        self._waits = wait
        if wait.writable:
            self._poller.watch_writable(wait.fd, self.step)
        else:
            self._poller.register(wait.fd, self.step)

    def _rest(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        waits, self._waits = self._waits, None
        if waits is not None:
            with contextlib.suppress(OSError):  # the poller is closed: the server ends
                self._poller.watch_writable(waits.fd, None)
                self._poller.unregister(waits.fd)
