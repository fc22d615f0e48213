# SPDX-License-Identifier: BSD-3-Clause
"""Python functions as C callbacks that are kept alive and never raise into C.

An exception would be lost in ctypes, and C would go on with a result that nobody chose. So each one becomes
the failure result of its callback and an errno, and the log has it: of a request that is refused on purpose
its reason, of everything else a traceback.
"""

import ctypes
import errno
import logging
from collections.abc import Callable
from typing import Any

from vfio_user.protocol.errors import VfioUserError
from vfio_user.server.engines.libvfio_user_abi import CType

logger = logging.getLogger(__name__)


class Guard:
    """Makes callbacks of one context. They live as long as this object: keep it until C is done."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._interruption: BaseException | None = None

    def callback(self, kind: CType, function: Callable[..., Any], failure: int | None = -1) -> CType:
        """`function` as a C callback of the type `kind`, which gives `failure` when it raises."""

        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                ctypes.set_errno(self._take(function.__name__, error))
                return failure

        made = kind(guarded)
        self._kept.append(made)
        return made

    def _take(self, name: str, error: BaseException) -> int:
        """Report the exception; the errno that C is told."""
        if isinstance(error, VfioUserError):
            logger.debug("%s refused: %s", name, error.reason)
            return error.errno
        if isinstance(error, Exception):
            logger.error("the device failed in %s: %s", name, error, exc_info=error)
            return errno.EIO
        self._interruption = error  # Ctrl-C, for one
        return errno.EINTR

    def release(self) -> None:
        """C is done with the callbacks. Each knows its context, which has us: they would wait, with all that
        they hold, for a garbage collection that may be far away."""
        self._kept.clear()

    def reraise(self) -> None:
        """Raise what interrupted a callback and is no `Exception`; to be called once C has returned."""
        error, self._interruption = self._interruption, None
        if error is not None:
            raise error
