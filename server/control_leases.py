# SPDX-License-Identifier: BSD-3-Clause
"""What a controller has switched on only for as long as it is there: it ends with the connection.

So a program that is killed in the middle of a move leaves no log, and no device that writes by message.
"""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Leases:
    """One for the server. Of each method the last request decides, whoever sent it."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[object, Callable[[], object]]] = {}

    def note(self, method: str, holder: object, end: Callable[[], object] | None) -> None:
        """`holder` has switched something on; `end` switches it off once it leaves (None: it stays)."""
        self._held.pop(method, None)
        if end is not None:
            self._held[method] = holder, end

    def leave(self, holder: object) -> None:
        """Ends what is leased to it."""
        for method, (owner, end) in list(self._held.items()):
            if owner is holder:
                del self._held[method]
                _attempt(method, end)


def _attempt(method: str, end: Callable[[], object]) -> None:
    """A fault of one must not keep the next one from its end."""
    try:
        end()
    except Exception:
        logger.exception("the lease of %s cannot be ended", method)
    else:
        logger.info("the controller has left: its lease of %s has ended", method)
